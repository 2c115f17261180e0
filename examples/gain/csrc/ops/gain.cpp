// A factor for each feature of each member: gain(input, scale).

#include "ops/torch.h"

#include <forward_list>

#include "kernels/gain.h"
#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/operation.h"

namespace pyens {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kOp[] = "gain";

void check_gain(const Tensor& input, const Tensor& scale) {
  PYENS_CHECK_TYPE(is_kernel_dtype(input.scalar_type()), kOp, "input",
                   "float32, float64, bfloat16 or float16", input.scalar_type());
  PYENS_CHECK_VALUE(input.dim() == 2 || input.dim() == 3, kOp, "input", "[B, D] or [E, B, D]",
                    "shape ", input.sym_sizes());
  check_same_kind(kOp, {"scale"}, scale, {"input"}, input);
  PYENS_CHECK_VALUE(scale.dim() == 2 && scale.sym_size(1) == input.sym_size(-1), kOp, "scale",
                    c10::str("[E, ", input.sym_size(-1), "]"), "shape ", scale.sym_sizes());
  PYENS_CHECK_VALUE(input.dim() == 2 || scale.sym_size(0) == input.sym_size(0), kOp, "scale",
                    c10::str("[", input.sym_size(0), ", ", input.sym_size(-1), "]"), "shape ",
                    scale.sym_sizes());
}

Tensor gain_meta(const Tensor& input, const Tensor& scale) {
  check_gain(input, scale);
  return at::empty_symint({scale.sym_size(0), input.sym_size(-2), input.sym_size(-1)},
                          input.options());
}

Tensor gain(const Tensor& input, const Tensor& scale) {
  const Tensor output = gain_meta(input, scale);
  if (output.numel() == 0) return output;
  std::forward_list<Tensor> copies;
  const Tensor& x = with_contiguous_rows(input, copies);
  const Tensor& factors = with_contiguous_rows(scale, copies);
  GainParams params{};
  params.dtype = kernel_dtype(x.scalar_type());
  params.ensemble_size = output.size(0);
  params.batch = output.size(1);
  params.features = output.size(2);
  params.input = x.const_data_ptr();
  params.input_member_stride = x.dim() == 3 ? x.stride(0) : 0;
  params.input_row_stride = x.stride(-2);
  params.scale = factors.const_data_ptr();
  params.scale_member_stride = factors.stride(0);
  params.output = output.mutable_data_ptr();
  if (x.is_cuda()) {
    launch_cuda(kOp, x, [&](void* stream) { return gain_cuda::run(params, stream); });
  } else {
    launch_cpu(
        params.ensemble_size * params.batch, gain_cpu::grain_size(params), 0,
        [&](int64_t begin, int64_t end, void* /*scratch*/) { gain_cpu::run(params, begin, end); });
  }
  return output;
}

// The gradients are this operation and aten's, all differentiable: so is the backward pass.
class GainFunction : public torch::autograd::Function<GainFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({input, scale});
    return call<gain, kOp>(input, scale);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    SavedTensors saved(ctx);
    const Tensor& input = saved.next();
    const Tensor& scale = saved.next();
    Tensor grad_input, grad_scale;
    if (ctx->needs_input_grad(0)) {
      grad_input = call<gain, kOp>(grads[0], scale);
      if (input.dim() == 2) grad_input = grad_input.sum(0);
    }
    if (ctx->needs_input_grad(1)) grad_scale = (grads[0] * input).sum(1);
    return {grad_input, grad_scale};
  }
};

Tensor gain_autograd(const Tensor& input, const Tensor& scale) {
  return GainFunction::apply(input, scale);
}

// A parameter in float32 meets activations that autocast has made bfloat16: both become the latter.
Tensor gain_autocast(const Tensor& input, const Tensor& scale) {
  const Autocast cast(input);
  return call<gain, kOp>(cast.lower(input), cast.lower(scale));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  Operation(m, "gain(Tensor input, Tensor scale) -> Tensor")
      .cpu_and_cuda<gain>()
      .meta<gain_meta>()
      .autograd<gain_autograd>()
      .autocast<gain_autocast>();
}

}  // namespace pyens
