// Activation strength. The kernel is that of ensemble_mlp.

#include "ops/torch.h"

#include <tuple>

#include "ops/ensemble_mlp.h"
#include "ops/operation.h"

namespace pyens {
namespace {

using at::Tensor;
using at::TensorList;
using Strength = std::tuple<Tensor, Tensor, Tensor>;

constexpr char kOp[] = "activation_strength";

c10::SymInt hidden_units(TensorList weights) {
  c10::SymInt units = 0;
  for (size_t l = 0; l + 1 < weights.size(); ++l) units = units + weights[l].sym_size(1);
  return units;
}

void check_statistic(const char* argument, const Tensor& statistic, const Network& network,
                     const c10::SymInt& units) {
  check_real(kOp, argument, statistic, network.weights);
  const auto members = network.members();
  PYENS_CHECK_VALUE(
      (statistic.dim() == 1 || statistic.dim() == 2) && statistic.sym_size(-1) == units &&
          (statistic.dim() == 1 || statistic.sym_size(0) == members),
      kOp, argument,
      c10::str("[", units, "] or [", members, ", ", units, "], a number for each hidden unit"),
      "shape ", statistic.sym_sizes());
}

Strength checked_and_allocated(const Network& network, const Tensor& mean, const Tensor& std,
                               std::string_view activation, bool bitpack) {
  check_mlp(kOp, network, plain_options(activation));
  const c10::SymInt units = hidden_units(network.weights);
  check_statistic("mean", mean, network, units);
  check_statistic("std", std, network, units);
  const auto members = network.members(), batch = network.batch();
  const auto options = network.input.options();
  const auto bits = options.dtype(bitpack ? at::kByte : at::kBool);
  return {empty_result_symint({members, batch, network.out_features()}, options),
          empty_result_symint({members, batch, units}, options),
          empty_result_symint({members, batch, bitpack ? (units + 7) / 8 : units}, bits)};
}

Strength activation_strength(const Tensor& input, TensorList weights, TensorList biases,
                             const Tensor& mean, const Tensor& std, std::string_view activation,
                             bool bitpack) {
  const MLPOptions options = plain_options(activation);
  const Network network{input, weights, biases, {}, {}, options.members};
  Strength result = checked_and_allocated(network, mean, std, activation, bitpack);
  auto& [output, value, active] = result;
  ForwardCall call(kOp, network, options);
  call.params.output = output.mutable_data_ptr();

  const at::ScalarType real = accumulation_type(input.scalar_type());
  const Tensor means = mean.to(real).contiguous(), stds = std.to(real).contiguous();
  ActivationStrengthParams& strength = call.params.strength;
  strength.units = value.size(2);
  strength.mean = means.const_data_ptr();
  strength.std = stds.const_data_ptr();
  strength.mean_member_stride = mean.dim() == 2 ? strength.units : 0;
  strength.std_member_stride = std.dim() == 2 ? strength.units : 0;
  strength.value = value.mutable_data_ptr();
  strength.active = static_cast<uint8_t*>(active.mutable_data_ptr());
  strength.bitpack = bitpack;
  call.run(kOp, network);
  return result;
}

Strength activation_strength_meta(const Tensor& input, TensorList weights, TensorList biases,
                                  const Tensor& mean, const Tensor& std,
                                  std::string_view activation, bool bitpack) {
  const OptionalTensor all;
  return checked_and_allocated({input, weights, biases, {}, {}, all}, mean, std, activation,
                               bitpack);
}

// Casts as ensemble_mlp does; the statistics keep their precision.
Strength activation_strength_autocast(const Tensor& input, TensorList weights, TensorList biases,
                                      const Tensor& mean, const Tensor& std,
                                      std::string_view activation, bool bitpack) {
  const Autocast cast(input);
  return call<activation_strength, kOp>(cast.lower(input), cast.lower(weights), cast.lower(biases),
                                        cast.float32(mean), cast.float32(std), activation, bitpack);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  Operation(m,
            "activation_strength(Tensor input, Tensor[] weights, Tensor[] biases, Tensor mean,"
            " Tensor std, str activation, bool bitpack)"
            " -> (Tensor output, Tensor value, Tensor active)")
      .cpu_and_cuda<activation_strength>()
      .meta<activation_strength_meta>()
      .not_differentiable()
      .autocast<activation_strength_autocast>();
}

}  // namespace pyens
