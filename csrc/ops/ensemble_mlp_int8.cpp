// The ensemble MLP on weights in bytes: inference on the CPU, with inputs and outputs in float32.

#include "ops/torch.h"

#include <forward_list>
#include <vector>

#include "kernels/ensemble_mlp_int8.h"
#include "ops/ensemble_mlp.h"
#include "ops/int8.h"
#include "ops/launch.h"
#include "ops/operation.h"

namespace pyens {
namespace {

using at::Tensor;
using at::TensorList;

constexpr char kOp[] = "ensemble_mlp_int8";

struct Weights {
  TensorList values, scale, offset, input_scale, input_zero_point, biases;

  Int8Tensors layer(size_t l) const {
    return {values[l],           scale[l],
            offset[l],           input_scale[l],
            input_zero_point[l], static_cast<int64_t>(l)};
  }
  bool has_bias(size_t l) const { return !biases.empty() && biases[l].sym_size(1) != 0; }
};

void check(const Tensor& input, const Weights& w) {
  const size_t layers = w.values.size();
  PYENS_CHECK_VALUE(layers >= 1 && w.scale.size() == layers && w.offset.size() == layers &&
                        w.input_scale.size() == layers && w.input_zero_point.size() == layers,
                    kOp, "values", "one of each for every layer, at least one", layers, " values, ",
                    w.scale.size(), " scales, ", w.offset.size(), " offsets, ",
                    w.input_scale.size(), " input_scales, ", w.input_zero_point.size(),
                    " input_zero_points");
  PYENS_CHECK_VALUE(w.biases.empty() || w.biases.size() == layers, kOp, "biases",
                    c10::str(layers, ", or none"), w.biases.size());
  for (size_t l = 0; l < layers; ++l) {
    const Int8Tensors layer = w.layer(l);
    check_int8(kOp, layer, 3, "[E, out, in]");
    const ArgumentName values{"values", layer.layer};
    check_same_kind(kOp, values, w.values[l], {"values", 0}, w.values[0]);
    PYENS_CHECK_VALUE(layer.members() == w.values[0].sym_size(0), kOp, values,
                      c10::str(w.values[0].sym_size(0), " members as in values[0]"),
                      layer.members());
    if (l > 0) {
      const c10::SymInt before = w.values[l - 1].sym_size(1);
      PYENS_CHECK_VALUE(w.values[l].sym_size(2) == before, kOp, values,
                        c10::str("as many inputs as the layer before has rows (", before, ")"),
                        w.values[l].sym_size(2));
    }
    if (!w.biases.empty()) check_int8_bias(kOp, layer, w.biases[l], "biases", true);
  }
  PYENS_CHECK_TYPE(input.scalar_type() == at::kFloat, kOp, "input", "float32", input.scalar_type());
  PYENS_CHECK_TYPE(input.device() == w.values[0].device(), kOp, "input",
                   c10::str("the device of values (", w.values[0].device(), ")"), input.device());
  const c10::SymInt members = w.values[0].sym_size(0), in = w.values[0].sym_size(2);
  const bool own = input.dim() == 3 && input.sym_size(0) == members;
  PYENS_CHECK_VALUE((input.dim() == 2 || own) && input.sym_size(-1) == in, kOp, "input",
                    c10::str("[B, ", in, "] or [", members, ", B, ", in, "]"), "shape ",
                    input.sym_sizes());
}

Tensor output_like(const Tensor& input, TensorList values) {
  return empty_result_symint(
      {values[0].sym_size(0), input.sym_size(-2), values[values.size() - 1].sym_size(1)},
      input.options());
}

Tensor ensemble_mlp_int8(const Tensor& input, TensorList values, TensorList scale,
                         TensorList offset, TensorList input_scale, TensorList input_zero_point,
                         TensorList biases, std::string_view activation,
                         std::string_view output_activation) {
  const Weights w{values, scale, offset, input_scale, input_zero_point, biases};
  check(input, w);
  const size_t count = values.size();
  const LayersOptions given =
      parse_layers(kOp, plain_options(activation, output_activation), count);
  std::forward_list<Tensor> copies;
  const auto whole = [&](const Tensor& t) -> const Tensor& {
    return t.is_contiguous() ? t : copies.emplace_front(t.contiguous());
  };
  std::vector<Int8Layer> layers(count);
  for (size_t l = 0; l < count; ++l) {
    Int8Layer& layer = layers[l];
    layer.in = values[l].size(2), layer.out = values[l].size(1);
    layer.weight = int8_weight({whole(values[l]), whole(scale[l]), whole(offset[l]),
                                whole(input_scale[l]), whole(input_zero_point[l])});
    layer.activation = given[l].activation;
    layer.bias = w.has_bias(l) ? whole(biases[l]).const_data_ptr<float>() : nullptr;
  }
  const Tensor& x = with_contiguous_rows(input, copies);
  Tensor output = output_like(input, values);
  EnsembleMLPInt8Params p{};
  p.ensemble_size = values[0].size(0);
  p.num_layers = static_cast<int64_t>(count);
  p.layers = layers.data();
  p.batch = x.size(-2);
  p.input = x.const_data_ptr<float>();
  p.input_row_stride = x.stride(-2);
  p.input_member_stride = x.dim() == 3 && p.ensemble_size > 1 ? x.stride(0) : 0;
  p.output = output.mutable_data_ptr<float>();
  launch_cpu(ensemble_mlp_int8_cpu::work_items(p), ensemble_mlp_int8_cpu::grain_size(p),
             ensemble_mlp_int8_cpu::scratch_bytes(p),
             [&](int64_t begin, int64_t end, void* scratch) {
               ensemble_mlp_int8_cpu::run(p, begin, end, scratch);
             });
  return output;
}

Tensor ensemble_mlp_int8_meta(const Tensor& input, TensorList values, TensorList scale,
                              TensorList offset, TensorList input_scale,
                              TensorList input_zero_point, TensorList biases,
                              std::string_view activation, std::string_view output_activation) {
  check(input, {values, scale, offset, input_scale, input_zero_point, biases});
  parse_layers(kOp, plain_options(activation, output_activation), values.size());
  return output_like(input, values);
}

Tensor ensemble_mlp_int8_autocast(const Tensor& input, TensorList values, TensorList scale,
                                  TensorList offset, TensorList input_scale,
                                  TensorList input_zero_point, TensorList biases,
                                  std::string_view activation, std::string_view output_activation) {
  const Autocast cast(input);
  return call<ensemble_mlp_int8, kOp>(cast.float32(input), values, scale, offset, input_scale,
                                      input_zero_point, biases, activation, output_activation);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  Operation(m,
            "ensemble_mlp_int8(Tensor input, Tensor[] values, Tensor[] scale, Tensor[] offset,"
            " Tensor[] input_scale, Tensor[] input_zero_point, Tensor[] biases, str activation,"
            " str output_activation) -> Tensor")
      .cpu<ensemble_mlp_int8>()
      .meta<ensemble_mlp_int8_meta>()
      .autocast<ensemble_mlp_int8_autocast>()
      .not_differentiable();
}

}  // namespace pyens
