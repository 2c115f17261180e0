// The weights of each member of an ensemble of masked networks.
//
//   masked_weights           the rows and columns of a shared matrix that each mask keeps
//   masked_weights_backward  its transpose
//
// A view: shared parameters become stacked weights, and what reads those does the rest (masked_mlp is
// ensemble_mlp over them). The two operations are linear and each other's derivative.

#include "ops/torch.h"

#include <algorithm>

#include "kernels/masked_weights.h"
#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/masked_weights.h"
#include "ops/operation.h"

namespace pyens {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kOp[] = "masked_weights";
constexpr char kBackward[] = "masked_weights_backward";

// The number of masks, and of the kept of `all` rows or columns.
c10::SymInt kept(const OptionalTensor& index, const c10::SymInt& all) {
  return index ? index->sym_size(1) : all;
}

void check_rank(const char* argument, const OptionalTensor& index) {
  if (!index) return;
  PYENS_CHECK_VALUE(index->dim() == 2, kOp, argument, "[N, kept]", "shape ", index->sym_sizes());
}

void check_index(const char* argument, const OptionalTensor& index, const c10::SymInt& num_masks,
                 const Tensor& like) {
  if (!index) return;
  PYENS_CHECK_TYPE(index->scalar_type() == at::kLong, kOp, argument, "int64", index->scalar_type());
  PYENS_CHECK_TYPE(index->device() == like.device(), kOp, argument,
                   c10::str("the device of the weight (", like.device(), ")"), index->device());
  PYENS_CHECK_VALUE(index->dim() == 2 && index->sym_size(0) == num_masks, kOp, argument,
                    c10::str("[", num_masks, ", kept]"), "shape ", index->sym_sizes());
}

void check_dtype(const char* argument, const Tensor& tensor) {
  PYENS_CHECK_TYPE(is_kernel_dtype(tensor.scalar_type()), kOp, argument,
                   "float32, float64, bfloat16 or float16", tensor.scalar_type());
}

// Values raise on the CPU. The kernels read nothing out of range whatever they find: another thread may
// change an index after this.
void check_range(const char* argument, const Tensor& index, int64_t limit) {
  if (!index.is_cpu()) return;
  const int64_t* values = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i) {
    PYENS_CHECK_VALUE(values[i] >= -1 && values[i] < limit, kOp, argument,
                      c10::str("from -1 (padding) to ", limit - 1), values[i]);
  }
}

struct MaskedWeightsCall {
  MaskedWeightsParams params{};
  Tensor row_index, column_index;

  MaskedWeightsCall(int64_t num_masks, int64_t rows, int64_t columns,
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
  PYENS_CHECK_VALUE(weight.dim() == 2, kOp, "weight", "[rows, columns]", "shape ",
                    weight.sym_sizes());
  PYENS_CHECK_VALUE(num_masks >= 1, kOp, "num_masks", "at least 1", num_masks);
  check_index("rows", rows, num_masks, weight);
  check_index("columns", columns, num_masks, weight);
}

constexpr int64_t kWorthAThread = 32768;  // elements

}  // namespace

Tensor masked_weights(const Tensor& weight, const OptionalTensor& rows,
                      const OptionalTensor& columns, int64_t num_masks) {
  check_masked_weights(weight, rows, columns, num_masks);
  const Tensor w = weight.contiguous();
  const MaskedWeightsCall call(num_masks, w.size(0), w.size(1), rows, columns);
  const MaskedWeightsParams& p = call.params;
  Tensor output = empty_result({num_masks, p.kept_rows, p.kept_columns}, w.options());
  void* to = output.mutable_data_ptr();
  if (w.is_cuda()) {
    launch_cuda(kOp, w, [&](void* stream) {
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

void spread_masked_weights(const Tensor& grad, const OptionalTensor& rows,
                           const OptionalTensor& columns, bool add, const Tensor& weight) {
  const Tensor g = grad.contiguous();
  const DType dtype = kernel_dtype(g.scalar_type());
  const MaskedWeightsCall call(g.size(0), weight.size(0), weight.size(1), rows, columns);
  const MaskedWeightsParams& p = call.params;
  void* const to = weight.mutable_data_ptr();
  launch_cpu(p.rows, kWorthAThread / std::max<int64_t>(1, p.num_masks * p.kept_columns) + 1, 0,
             [&](int64_t begin, int64_t end, void* /*scratch*/) {
               masked_weights_cpu::run_backward(p, dtype, g.const_data_ptr(), add, to, begin, end);
             });
}

namespace {

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
  PYENS_CHECK_VALUE(fits, kOp, "grad",
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
  const Tensor weight = empty_result({num_rows, num_columns}, g.options());
  if (g.is_cuda()) {
    const MaskedWeightsCall call(g.size(0), num_rows, num_columns, rows, columns);
    launch_cuda(kOp, g, [&](void* stream) {
      return masked_weights_cuda::run_backward(call.params, kernel_dtype(g.scalar_type()),
                                               g.const_data_ptr(), weight.mutable_data_ptr(),
                                               stream);
    });
  } else {
    spread_masked_weights(g, rows, columns, /*add=*/false, weight);
  }
  return weight.to(grad.scalar_type());
}

Tensor masked_weights_backward_meta(const Tensor& grad, const OptionalTensor& rows,
                                    const OptionalTensor& columns, c10::SymInt num_rows,
                                    c10::SymInt num_columns) {
  check_masked_weights_backward(grad, rows, columns, num_rows, num_columns);
  return at::empty_symint({num_rows, num_columns}, grad.options());
}

// --- autograd ------------------------------------------------------------------------------------

// As the dispatcher types them: with symbolic sizes.
Tensor masked_weights_backward_autograd(const Tensor& grad, const OptionalTensor& rows,
                                        const OptionalTensor& columns, c10::SymInt num_rows,
                                        c10::SymInt num_columns);

class MaskedWeightsFunction : public torch::autograd::Function<MaskedWeightsFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& weight, const OptionalTensor& rows,
                        const OptionalTensor& columns, int64_t num_masks) {
    at::AutoDispatchBelowADInplaceOrView guard;
    // It checks, so it is first.
    const Tensor output = call<masked_weights, kOp>(weight, rows, columns, num_masks);
    ctx->save_for_backward({tensor_or_undefined(rows), tensor_or_undefined(columns)});
    ctx->saved_data["rows"] = weight.sym_size(0);
    ctx->saved_data["columns"] = weight.sym_size(1);
    return output;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    SavedTensors saved(ctx);
    const OptionalTensor rows = if_defined(saved.next()), columns = if_defined(saved.next());
    return {call<masked_weights_backward_autograd, kBackward>(
                grads[0], rows, columns, ctx->saved_data["rows"].toSymInt(),
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
    const Tensor weight = call<masked_weights_backward_autograd, kBackward>(
        grad, rows, columns, std::move(num_rows), std::move(num_columns));
    ctx->save_for_backward({tensor_or_undefined(rows), tensor_or_undefined(columns)});
    ctx->saved_data["masks"] = grad.sym_size(0);
    return weight;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    SavedTensors saved(ctx);
    const OptionalTensor rows = if_defined(saved.next()), columns = if_defined(saved.next());
    const int64_t masks = ctx->saved_data["masks"].toSymInt().guard_int(__FILE__, __LINE__);
    return {call<masked_weights, kOp>(grads[0], rows, columns, masks), Tensor(), Tensor(), Tensor(),
            Tensor()};
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

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  Operation(m,
            "masked_weights(Tensor weight, Tensor? rows, Tensor? columns, int num_masks) -> Tensor")
      .cpu_and_cuda<masked_weights>()
      .meta<masked_weights_meta>()
      .autograd<masked_weights_autograd>();
  Operation(m,
            "masked_weights_backward(Tensor grad, Tensor? rows, Tensor? columns, SymInt num_rows,"
            " SymInt num_columns) -> Tensor")
      .cpu_and_cuda<masked_weights_backward>()
      .meta<masked_weights_backward_meta>()
      .autograd<masked_weights_backward_autograd>();
}

}  // namespace pyens
