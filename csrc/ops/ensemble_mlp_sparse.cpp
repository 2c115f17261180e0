// The ensemble MLP on weights of which few are kept: inference on the CPU, in float32 and float64.

#include "ops/torch.h"

#include <vector>

#include "ops/ensemble_mlp.h"
#include "ops/operation.h"
#include "ops/sparse_rows.h"

namespace pyens {
namespace {

using at::IntArrayRef;
using at::Tensor;
using at::TensorList;

constexpr char kOp[] = "ensemble_mlp_sparse";

SparseWeight weight_of(TensorList values, TensorList columns, TensorList starts, TensorList order,
                       IntArrayRef in_features, size_t l) {
  return {values[l], columns[l], starts[l], order[l], in_features[l], static_cast<int64_t>(l)};
}

void check_sparse(const Tensor& input, TensorList values, TensorList columns, TensorList starts,
                  TensorList order, IntArrayRef in_features, TensorList biases) {
  const size_t layers = values.size();
  PYENS_CHECK_VALUE(layers >= 1 && columns.size() == layers && starts.size() == layers &&
                        order.size() == layers && in_features.size() == layers,
                    kOp, "values", "one of each for every layer, at least one", values.size(),
                    " values, ", columns.size(), " columns, ", starts.size(), " starts, ",
                    order.size(), " orders, ", in_features.size(), " in_features");
  PYENS_CHECK_VALUE(biases.empty() || biases.size() == layers, kOp, "biases",
                    c10::str(layers, ", or none"), biases.size());
  for (size_t l = 0; l < layers; ++l) {
    const auto n = static_cast<int64_t>(l);
    const SparseWeight w = weight_of(values, columns, starts, order, in_features, l);
    check_sparse_shape(kOp, w);
    check_same_kind(kOp, {"values", n}, values[l], {"values", 0}, values[0]);
    PYENS_CHECK_VALUE(w.members() == starts[0].sym_size(0), kOp, (ArgumentName{"starts", n}),
                      c10::str(starts[0].sym_size(0), " members as in starts[0]"), w.members());
    if (l > 0) {
      PYENS_CHECK_VALUE(w.inputs == order[l - 1].sym_size(2), kOp, (ArgumentName{"in_features", n}),
                        c10::str("the rows of the layer before (", order[l - 1].sym_size(2), ")"),
                        w.inputs);
    }
    if (biases.empty()) continue;
    check_same_kind(kOp, {"biases", n}, biases[l], {"values", 0}, values[0]);
    const auto& b = biases[l];
    PYENS_CHECK_VALUE(b.dim() == 2 && b.sym_size(0) == w.members() &&
                          (b.sym_size(1) == 0 || b.sym_size(1) == w.rows()),
                      kOp, (ArgumentName{"biases", n}),
                      c10::str("[", w.members(), ", ", w.rows(), "] or [", w.members(), ", 0]"),
                      "shape ", b.sym_sizes());
  }
  check_same_kind(kOp, {"input"}, input, {"values", 0}, values[0]);
  const bool own = input.dim() == 3 && input.sym_size(0) == starts[0].sym_size(0);
  PYENS_CHECK_VALUE((input.dim() == 2 || own) && input.sym_size(-1) == in_features[0], kOp, "input",
                    c10::str("[B, ", in_features[0], "] or [", starts[0].sym_size(0), ", B, ",
                             in_features[0], "]"),
                    "shape ", input.sym_sizes());
}

Tensor output_like(const Tensor& input, TensorList starts, TensorList order) {
  return empty_result_symint(
      {starts[0].sym_size(0), input.sym_size(-2), order[order.size() - 1].sym_size(2)},
      input.options());
}

Tensor ensemble_mlp_sparse(const Tensor& input, TensorList values, TensorList columns,
                           TensorList starts, TensorList order, IntArrayRef in_features,
                           TensorList biases, std::string_view activation,
                           std::string_view output_activation) {
  check_sparse(input, values, columns, starts, order, in_features, biases);
  const size_t count = values.size();
  const LayersOptions given =
      parse_layers(kOp, plain_options(activation, output_activation), count);
  std::forward_list<Tensor> copies;
  const auto whole = [&](const Tensor& t) -> const Tensor& {
    return t.is_contiguous() ? t : copies.emplace_front(t.contiguous());
  };
  std::vector<MLPLayer> layers(count);
  std::vector<SparseRows> rows(count);
  ensemble_mlp_cpu::Forward p{};
  for (size_t l = 0; l < count; ++l) {
    const SparseWeight w{whole(values[l]), whole(columns[l]), whole(starts[l]),
                         whole(order[l]),  in_features[l],    static_cast<int64_t>(l)};
    rows[l] = checked_rows(kOp, w);
    MLPLayer& layer = layers[l];
    layer.in = in_features[l];
    layer.out = w.order.size(2);
    layer.weight.data = &rows[l];
    layer.weight.row_stride = kSparseStride;
    layer.weight.format = kernel_dtype(w.values.scalar_type());
    layer.activation = given[l].activation;
    if (biases.empty() || biases[l].size(1) == 0) continue;
    const Tensor& bias = with_contiguous_rows(biases[l], copies);
    layer.bias = {bias.const_data_ptr(), bias.stride(0)};
  }
  const Tensor& x = with_contiguous_rows(input, copies);
  Tensor output = output_like(input, starts, order);
  p.dtype = kernel_dtype(input.scalar_type());
  p.ensemble_size = starts[0].size(0);
  p.num_layers = static_cast<int64_t>(count);
  p.layers = layers.data();
  p.batch = x.size(-2);
  p.input = x.const_data_ptr();
  p.input_row_stride = x.stride(-2);
  p.input_member_stride = x.dim() == 3 && p.ensemble_size > 1 ? x.stride(0) : 0;
  p.output = output.mutable_data_ptr();
  launch_cpu(ensemble_mlp_cpu::work_items(p), ensemble_mlp_cpu::grain_size(p),
             ensemble_mlp_cpu::scratch_bytes(p), [&](int64_t begin, int64_t end, void* scratch) {
               ensemble_mlp_cpu::run(p, begin, end, scratch);
             });
  return output;
}

Tensor ensemble_mlp_sparse_meta(const Tensor& input, TensorList values, TensorList columns,
                                TensorList starts, TensorList order, IntArrayRef in_features,
                                TensorList biases, std::string_view activation,
                                std::string_view output_activation) {
  check_sparse(input, values, columns, starts, order, in_features, biases);
  parse_layers(kOp, plain_options(activation, output_activation), values.size());
  return output_like(input, starts, order);
}

// In the dtype of the weights.
Tensor ensemble_mlp_sparse_autocast(const Tensor& input, TensorList values, TensorList columns,
                                    TensorList starts, TensorList order, IntArrayRef in_features,
                                    TensorList biases, std::string_view activation,
                                    std::string_view output_activation) {
  const Autocast cast(input);
  const bool lowered = input.is_floating_point() && !values.empty();
  return call<ensemble_mlp_sparse, kOp>(lowered ? input.to(values[0].scalar_type()) : input, values,
                                        columns, starts, order, in_features, biases, activation,
                                        output_activation);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  Operation(m,
            "ensemble_mlp_sparse(Tensor input, Tensor[] values, Tensor[] columns, Tensor[] starts,"
            " Tensor[] order, int[] in_features, Tensor[] biases, str activation,"
            " str output_activation) -> Tensor")
      .cpu<ensemble_mlp_sparse>()
      .meta<ensemble_mlp_sparse_meta>()
      .autocast<ensemble_mlp_sparse_autocast>()
      .not_differentiable();
}

}  // namespace pyens
