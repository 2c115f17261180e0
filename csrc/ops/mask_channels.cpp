// Masked channels: each row of a batch keeps or zeroes channels by a mask of its own.

#include "ops/torch.h"

#include <algorithm>
#include <atomic>

#include "kernels/mask_channels.h"
#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/operation.h"

namespace pyens {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kOp[] = "mask_channels";

void check_mask_channels(const Tensor& input, const Tensor& masks, const OptionalTensor& index) {
  PYENS_CHECK_TYPE(is_kernel_dtype(input.scalar_type()), kOp, "input",
                   "float32, float64, bfloat16 or float16", input.scalar_type());
  PYENS_CHECK_VALUE(input.dim() >= 2, kOp, "input", "[B, C, ...]", "shape ", input.sym_sizes());
  PYENS_CHECK_TYPE(masks.scalar_type() == at::kBool, kOp, "masks", "bool", masks.scalar_type());
  PYENS_CHECK_TYPE(masks.device() == input.device(), kOp, "masks",
                   c10::str("the device of input (", input.device(), ")"), masks.device());
  PYENS_CHECK_VALUE(
      masks.dim() == 2 && masks.sym_size(0) >= 1 && masks.sym_size(1) == input.sym_size(1), kOp,
      "masks", c10::str("[N, ", input.sym_size(1), "]"), "shape ", masks.sym_sizes());
  if (!index) return;
  PYENS_CHECK_TYPE(index->scalar_type() == at::kLong, kOp, "index", "int64", index->scalar_type());
  PYENS_CHECK_TYPE(index->device() == input.device(), kOp, "index",
                   c10::str("the device of input (", input.device(), ")"), index->device());
  PYENS_CHECK_VALUE(index->dim() == 1 && index->sym_size(0) == input.sym_size(0), kOp, "index",
                    c10::str("[", input.sym_size(0), "]"), "shape ", index->sym_sizes());
}

// Looks for the index that the kernel met: the first one, whichever the threads met first.
[[noreturn]] void raise_out_of_range(const Tensor& index, int64_t num_masks) {
  const Tensor wrong = index.lt(0).logical_or_(index.ge(num_masks)).nonzero();
  TORCH_CHECK_VALUE(wrong.numel() > 0, kOp, ": index: changed while it was read");
  const auto row = wrong[0].item<int64_t>();
  PYENS_CHECK_VALUE(false, kOp, "index", c10::str("masks from 0 to ", num_masks - 1),
                    index[row].item<int64_t>(), " for row ", row);
}

Tensor mask_channels(const Tensor& input, const Tensor& masks, const OptionalTensor& index) {
  check_mask_channels(input, masks, index);
  const Tensor x = input.contiguous(), kept = masks.contiguous();
  Tensor output = empty_result(x.sizes(), x.options());
  MaskChannelsParams params{};
  params.rows = x.size(0);
  params.channels = x.size(1);
  if (x.numel() == 0) return output;
  params.inner = x.numel() / (params.rows * params.channels);
  params.element_bytes = x.element_size();
  params.input = x.const_data_ptr();
  params.masks = kept.const_data_ptr<bool>();
  params.num_masks = kept.size(0);
  params.output = output.mutable_data_ptr();
  Tensor chosen;
  if (index) {
    chosen = index->contiguous();
    params.index = chosen.const_data_ptr<int64_t>();
  }
  if (x.is_cuda()) {
    launch_cuda(kOp, x, [&](void* stream) { return mask_channels_cuda::run(params, stream); });
    return output;
  }
  constexpr int64_t kWorthAThread = 65536;  // elements
  std::atomic<bool> in_range{true};
  launch_cpu(params.rows, std::max<int64_t>(1, kWorthAThread / (params.channels * params.inner)), 0,
             [&](int64_t begin, int64_t end, void* /*scratch*/) {
               if (!mask_channels_cpu::run(params, begin, end)) in_range = false;
             });
  if (!in_range) raise_out_of_range(chosen, params.num_masks);
  return output;
}

Tensor mask_channels_meta(const Tensor& input, const Tensor& masks, const OptionalTensor& index) {
  check_mask_channels(input, masks, index);
  return at::empty_symint(input.sym_sizes(), input.options());
}

// Its own transpose, so differentiable any number of times.
class MaskChannelsFunction : public torch::autograd::Function<MaskChannelsFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& masks,
                        const OptionalTensor& index) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({masks, tensor_or_undefined(index)});
    return call<mask_channels, kOp>(input, masks, index);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    SavedTensors saved(ctx);
    const Tensor& masks = saved.next();
    return {call<mask_channels, kOp>(grads[0], masks, if_defined(saved.next())), Tensor(),
            Tensor()};
  }
};

Tensor mask_channels_autograd(const Tensor& input, const Tensor& masks,
                              const OptionalTensor& index) {
  return MaskChannelsFunction::apply(input, masks, index);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  Operation(m, "mask_channels(Tensor input, Tensor masks, Tensor? index) -> Tensor")
      .cpu_and_cuda<mask_channels>()
      .meta<mask_channels_meta>()
      .autograd<mask_channels_autograd>();
}

}  // namespace pyens
