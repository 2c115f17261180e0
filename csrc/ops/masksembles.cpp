// torch-facing side of Masksembles.
//
//   mask_channels            keeps or zeroes channels, a mask for each row of the batch
//   masked_weights           the rows and columns of a shared matrix that each mask keeps
//   masked_weights_backward  its transpose
//
// The last two are linear and each other's derivative. masked_mlp itself is Python: the gathered
// matrices are an ensemble, and ensemble_mlp does the rest.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "kernels/mask_channels.h"
#include "kernels/masked_weights.h"
#include "ops/checks.h"
#include "ops/dispatch.h"
#include "ops/launch.h"

namespace pyens {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// --- mask_channels -------------------------------------------------------------------------------

constexpr const char* kMaskChannels = "mask_channels";

void check_mask_channels(const Tensor& input, const Tensor& masks, const OptionalTensor& index) {
  const char* op = kMaskChannels;
  PYENS_CHECK_TYPE(is_kernel_dtype(input.scalar_type()), op, "input",
                   "float32, float64, bfloat16 or float16", input.scalar_type());
  PYENS_CHECK_VALUE(input.dim() >= 2, op, "input", "[B, C, ...]", "shape ", input.sym_sizes());
  PYENS_CHECK_TYPE(masks.scalar_type() == at::kBool, op, "masks", "bool", masks.scalar_type());
  PYENS_CHECK_TYPE(masks.device() == input.device(), op, "masks",
                   c10::str("the device of input (", input.device(), ")"), masks.device());
  PYENS_CHECK_VALUE(
      masks.dim() == 2 && masks.sym_size(0) >= 1 && masks.sym_size(1) == input.sym_size(1), op,
      "masks", c10::str("[N, ", input.sym_size(1), "]"), "shape ", masks.sym_sizes());
  if (!index) return;
  PYENS_CHECK_TYPE(index->scalar_type() == at::kLong, op, "index", "int64", index->scalar_type());
  PYENS_CHECK_TYPE(index->device() == input.device(), op, "index",
                   c10::str("the device of input (", input.device(), ")"), index->device());
  PYENS_CHECK_VALUE(index->dim() == 1 && index->sym_size(0) == input.sym_size(0), op, "index",
                    c10::str("[", input.sym_size(0), "]"), "shape ", index->sym_sizes());
}

Tensor mask_channels(const Tensor& input, const Tensor& masks, const OptionalTensor& index) {
  check_mask_channels(input, masks, index);
  const Tensor x = input.contiguous(), kept = masks.contiguous();
  Tensor output = at::empty(x.sizes(), x.options());
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
    launch_cuda(kMaskChannels, x,
                [&](void* stream) { return mask_channels_cuda::run(params, stream); });
    return output;
  }
  if (index) {
    for (int64_t row = 0; row < params.rows; ++row) {
      const int64_t mask = params.index[row];
      PYENS_CHECK_VALUE(mask >= 0 && mask < params.num_masks, kMaskChannels, "index",
                        c10::str("masks from 0 to ", params.num_masks - 1), mask, " for row ", row);
    }
  }
  constexpr int64_t kWorthAThread = 65536;  // elements
  launch_cpu(params.rows, std::max<int64_t>(1, kWorthAThread / (params.channels * params.inner)), 0,
             [&](int64_t begin, int64_t end, void* /*scratch*/) {
               mask_channels_cpu::run(params, begin, end);
             });
  return output;
}

Tensor mask_channels_meta(const Tensor& input, const Tensor& masks, const OptionalTensor& index) {
  check_mask_channels(input, masks, index);
  return at::empty_symint(input.sym_sizes(), input.options());
}

Tensor call_mask_channels(const Tensor& input, const Tensor& masks, const OptionalTensor& index) {
  static const auto op = dispatcher_op<Tensor(const Tensor&, const Tensor&, const OptionalTensor&)>(
      "pyens::mask_channels");
  return op.call(input, masks, index);
}

// Its own transpose, so differentiable as often as one likes.
class MaskChannelsFunction : public torch::autograd::Function<MaskChannelsFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& masks,
                        const OptionalTensor& index) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({masks, index.value_or(Tensor())});
    return call_mask_channels(input, masks, index);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor index = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
    return {call_mask_channels(grads[0], saved[0], index), Tensor(), Tensor()};
  }
};

Tensor mask_channels_autograd(const Tensor& input, const Tensor& masks,
                              const OptionalTensor& index) {
  return MaskChannelsFunction::apply(input, masks, index);
}

// --- masked_weights ------------------------------------------------------------------------------

constexpr const char* kMaskedWeights = "masked_weights";

// The number of masks, and of the kept of `all` rows or columns.
c10::SymInt kept(const OptionalTensor& index, const c10::SymInt& all) {
  return index ? index->sym_size(1) : all;
}

void check_rank(const char* argument, const OptionalTensor& index) {
  if (!index) return;
  PYENS_CHECK_VALUE(index->dim() == 2, kMaskedWeights, argument, "[N, kept]", "shape ",
                    index->sym_sizes());
}

void check_index(const char* argument, const OptionalTensor& index, const c10::SymInt& num_masks,
                 const Tensor& like) {
  if (!index) return;
  PYENS_CHECK_TYPE(index->scalar_type() == at::kLong, kMaskedWeights, argument, "int64",
                   index->scalar_type());
  PYENS_CHECK_TYPE(index->device() == like.device(), kMaskedWeights, argument,
                   c10::str("the device of the weight (", like.device(), ")"), index->device());
  PYENS_CHECK_VALUE(index->dim() == 2 && index->sym_size(0) == num_masks, kMaskedWeights, argument,
                    c10::str("[", num_masks, ", kept]"), "shape ", index->sym_sizes());
}

void check_dtype(const char* argument, const Tensor& tensor) {
  PYENS_CHECK_TYPE(is_kernel_dtype(tensor.scalar_type()), kMaskedWeights, argument,
                   "float32, float64, bfloat16 or float16", tensor.scalar_type());
}

// The CPU's kernel trusts what it is given: that is checked here. The GPU's does not.
void check_range(const char* argument, const Tensor& index, int64_t limit) {
  if (!index.is_cpu()) return;
  const int64_t* values = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i) {
    PYENS_CHECK_VALUE(values[i] >= -1 && values[i] < limit, kMaskedWeights, argument,
                      c10::str("from -1 (padding) to ", limit - 1), values[i]);
  }
}

struct MaskedWeightsProblem {
  MaskedWeightsParams params{};
  Tensor row_index, column_index;

  MaskedWeightsProblem(int64_t num_masks, int64_t rows, int64_t columns,
                       const OptionalTensor& row_indices, const OptionalTensor& column_indices) {
    params.num_masks = num_masks;
    params.rows = params.kept_rows = rows;
    params.columns = params.kept_columns = columns;
    if (row_indices) {
      row_index = row_indices->contiguous();
      check_range("rows", row_index, rows);
      params.row_index = row_index.const_data_ptr<int64_t>();
      params.kept_rows = row_index.size(1);
    }
    if (column_indices) {
      column_index = column_indices->contiguous();
      check_range("columns", column_index, columns);
      params.column_index = column_index.const_data_ptr<int64_t>();
      params.kept_columns = column_index.size(1);
    }
  }
};

void check_masked_weights(const Tensor& weight, const OptionalTensor& rows,
                          const OptionalTensor& columns, const c10::SymInt& num_masks) {
  check_dtype("weight", weight);
  PYENS_CHECK_VALUE(weight.dim() == 2, kMaskedWeights, "weight", "[rows, columns]", "shape ",
                    weight.sym_sizes());
  PYENS_CHECK_VALUE(num_masks >= 1, kMaskedWeights, "num_masks", "at least 1", num_masks);
  check_index("rows", rows, num_masks, weight);
  check_index("columns", columns, num_masks, weight);
}

constexpr int64_t kWorthAThread = 32768;  // elements

Tensor masked_weights(const Tensor& weight, const OptionalTensor& rows,
                      const OptionalTensor& columns, int64_t num_masks) {
  check_masked_weights(weight, rows, columns, num_masks);
  const Tensor w = weight.contiguous();
  const MaskedWeightsProblem problem(num_masks, w.size(0), w.size(1), rows, columns);
  const MaskedWeightsParams& p = problem.params;
  Tensor output = at::empty({num_masks, p.kept_rows, p.kept_columns}, w.options());
  void* to = output.mutable_data_ptr();
  if (w.is_cuda()) {
    launch_cuda(kMaskedWeights, w, [&](void* stream) {
      return masked_weights_cuda::run(p, w.element_size(), w.const_data_ptr(), to, stream);
    });
    return output;
  }
  launch_cpu(num_masks * p.kept_rows, kWorthAThread / std::max<int64_t>(1, p.kept_columns) + 1, 0,
             [&](int64_t begin, int64_t end, void* /*scratch*/) {
               masked_weights_cpu::run(p, w.element_size(), w.const_data_ptr(), to, begin, end);
             });
  return output;
}

Tensor masked_weights_meta(const Tensor& weight, const OptionalTensor& rows,
                           const OptionalTensor& columns, int64_t num_masks) {
  check_masked_weights(weight, rows, columns, num_masks);
  return at::empty_symint(
      {num_masks, kept(rows, weight.sym_size(0)), kept(columns, weight.sym_size(1))},
      weight.options());
}

void check_masked_weights_backward(const Tensor& grad, const OptionalTensor& rows,
                                   const OptionalTensor& columns, const c10::SymInt& num_rows,
                                   const c10::SymInt& num_columns) {
  check_dtype("grad", grad);
  check_rank("rows", rows);
  check_rank("columns", columns);
  const bool fits = grad.dim() == 3 && grad.sym_size(1) == kept(rows, num_rows) &&
                    grad.sym_size(2) == kept(columns, num_columns);
  PYENS_CHECK_VALUE(fits, kMaskedWeights, "grad",
                    c10::str("[N, ", kept(rows, num_rows), ", ", kept(columns, num_columns), "]"),
                    "shape ", grad.sym_sizes());
  check_index("rows", rows, grad.sym_size(0), grad);
  check_index("columns", columns, grad.sym_size(0), grad);
}

Tensor masked_weights_backward(const Tensor& grad, const OptionalTensor& rows,
                               const OptionalTensor& columns, int64_t num_rows,
                               int64_t num_columns) {
  check_masked_weights_backward(grad, rows, columns, num_rows, num_columns);
  const Tensor g = grad.to(accumulation_type(grad.scalar_type())).contiguous();
  const DType dtype = kernel_dtype(g.scalar_type());
  const MaskedWeightsProblem problem(g.size(0), num_rows, num_columns, rows, columns);
  const MaskedWeightsParams& p = problem.params;
  Tensor weight = at::empty({num_rows, num_columns}, g.options());
  void* to = weight.mutable_data_ptr();
  if (g.is_cuda()) {
    launch_cuda(kMaskedWeights, g, [&](void* stream) {
      return masked_weights_cuda::run_backward(p, dtype, g.const_data_ptr(), to, stream);
    });
    return weight.to(grad.scalar_type());
  }
  launch_cpu(num_rows, kWorthAThread / std::max<int64_t>(1, p.num_masks * p.kept_columns) + 1, 0,
             [&](int64_t begin, int64_t end, void* /*scratch*/) {
               masked_weights_cpu::run_backward(p, dtype, g.const_data_ptr(), to, begin, end);
             });
  return weight.to(grad.scalar_type());
}

Tensor masked_weights_backward_meta(const Tensor& grad, const OptionalTensor& rows,
                                    const OptionalTensor& columns, c10::SymInt num_rows,
                                    c10::SymInt num_columns) {
  check_masked_weights_backward(grad, rows, columns, num_rows, num_columns);
  return at::empty_symint({num_rows, num_columns}, grad.options());
}

Tensor call_masked_weights(const Tensor& weight, const OptionalTensor& rows,
                           const OptionalTensor& columns, c10::SymInt num_masks) {
  static const auto op =
      dispatcher_op<Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t)>(
          "pyens::masked_weights");
  return op.call(weight, rows, columns, num_masks.guard_int(__FILE__, __LINE__));
}

Tensor call_masked_weights_backward(const Tensor& grad, const OptionalTensor& rows,
                                    const OptionalTensor& columns, c10::SymInt num_rows,
                                    c10::SymInt num_columns) {
  static const auto op =
      dispatcher_op<Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, c10::SymInt,
                           c10::SymInt)>("pyens::masked_weights_backward");
  return op.call(grad, rows, columns, std::move(num_rows), std::move(num_columns));
}

// Gather and scatter-add: each is the other's derivative.

class MaskedWeightsFunction : public torch::autograd::Function<MaskedWeightsFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& weight, const OptionalTensor& rows,
                        const OptionalTensor& columns, int64_t num_masks) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor output =
        call_masked_weights(weight, rows, columns, num_masks);  // it checks, so it is first
    ctx->save_for_backward({rows.value_or(Tensor()), columns.value_or(Tensor())});
    ctx->saved_data["rows"] = weight.sym_size(0);
    ctx->saved_data["columns"] = weight.sym_size(1);
    return output;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [](const Tensor& t) {
      return t.defined() ? OptionalTensor(t) : std::nullopt;
    };
    return {call_masked_weights_backward(grads[0], optional(saved[0]), optional(saved[1]),
                                         ctx->saved_data["rows"].toSymInt(),
                                         ctx->saved_data["columns"].toSymInt()),
            Tensor(), Tensor(), Tensor()};
  }
};

class MaskedWeightsBackwardFunction
    : public torch::autograd::Function<MaskedWeightsBackwardFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const OptionalTensor& rows,
                        const OptionalTensor& columns, c10::SymInt num_rows,
                        c10::SymInt num_columns) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor weight = call_masked_weights_backward(grad, rows, columns, std::move(num_rows),
                                                       std::move(num_columns));
    ctx->save_for_backward({rows.value_or(Tensor()), columns.value_or(Tensor())});
    ctx->saved_data["masks"] = grad.sym_size(0);
    return weight;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [](const Tensor& t) {
      return t.defined() ? OptionalTensor(t) : std::nullopt;
    };
    return {call_masked_weights(grads[0], optional(saved[0]), optional(saved[1]),
                                ctx->saved_data["masks"].toSymInt()),
            Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor masked_weights_autograd(const Tensor& weight, const OptionalTensor& rows,
                               const OptionalTensor& columns, int64_t num_masks) {
  return MaskedWeightsFunction::apply(weight, rows, columns, num_masks);
}

Tensor masked_weights_backward_autograd(const Tensor& grad, const OptionalTensor& rows,
                                        const OptionalTensor& columns, c10::SymInt num_rows,
                                        c10::SymInt num_columns) {
  return MaskedWeightsBackwardFunction::apply(grad, rows, columns, std::move(num_rows),
                                              std::move(num_columns));
}

}  // namespace

TORCH_LIBRARY_IMPL(pyens, CPU, m) {
  m.impl("mask_channels", mask_channels);
  m.impl("masked_weights", masked_weights);
  m.impl("masked_weights_backward", masked_weights_backward);
}

TORCH_LIBRARY_IMPL(pyens, CUDA, m) {
  m.impl("mask_channels", mask_channels);
  m.impl("masked_weights", masked_weights);
  m.impl("masked_weights_backward", masked_weights_backward);
}

TORCH_LIBRARY_IMPL(pyens, Meta, m) {
  m.impl("mask_channels", mask_channels_meta);
  m.impl("masked_weights", masked_weights_meta);
  m.impl("masked_weights_backward", masked_weights_backward_meta);
}

TORCH_LIBRARY_IMPL(pyens, Autograd, m) {
  m.impl("mask_channels", mask_channels_autograd);
  m.impl("masked_weights", masked_weights_autograd);
  m.impl("masked_weights_backward", masked_weights_backward_autograd);
}

}  // namespace pyens
