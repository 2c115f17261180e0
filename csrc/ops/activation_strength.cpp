// torch-facing side of activation strength: checks, allocation, launch; shapes for fake tensors;
// autocast. The kernel is that of ensemble_mlp.

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "ops/ensemble_mlp.h"
#include "ops/launch.h"

namespace pyens {
namespace {

using at::Tensor;
using at::TensorList;
using Strength = std::tuple<Tensor, Tensor, Tensor>;

constexpr const char* kOp = "activation_strength";

c10::SymInt hidden_units(TensorList weights) {
  c10::SymInt units = 0;
  for (size_t l = 0; l + 1 < weights.size(); ++l) units = units + weights[l].sym_size(1);
  return units;
}

// Mean or std: in the type of the weights or, for 16-bit ones, float32.
void check_statistic(const char* argument, const Tensor& statistic, TensorList weights,
                     const c10::SymInt& units) {
  const at::ScalarType type = weights[0].scalar_type(), real = accumulation_type(type);
  PYENS_CHECK_TYPE(statistic.scalar_type() == type || statistic.scalar_type() == real, kOp,
                   argument,
                   type == real ? c10::str("the dtype of weights[0] (", type, ")")
                                : c10::str("the dtype of weights[0] (", type, "), or ", real),
                   statistic.scalar_type());
  PYENS_CHECK_TYPE(statistic.device() == weights[0].device(), kOp, argument,
                   c10::str("the device of weights[0] (", weights[0].device(), ")"),
                   statistic.device());
  const auto members = weights[0].sym_size(0);
  PYENS_CHECK_VALUE(
      (statistic.dim() == 1 || statistic.dim() == 2) && statistic.sym_size(-1) == units &&
          (statistic.dim() == 1 || statistic.sym_size(0) == members),
      kOp, argument,
      c10::str("[", units, "] or [", members, ", ", units, "], a number for each hidden unit"),
      "shape ", statistic.sym_sizes());
}

Strength checked_and_allocated(const Tensor& input, TensorList weights, TensorList biases,
                               const Tensor& mean, const Tensor& std, bool pack) {
  check_layers(kOp, weights, biases);
  check_input(kOp, input, weights);
  const c10::SymInt units = hidden_units(weights);
  check_statistic("mean", mean, weights, units);
  check_statistic("std", std, weights, units);
  const auto members = weights[0].sym_size(0), batch = input.sym_size(-2);
  const auto bits = input.options().dtype(pack ? at::kByte : at::kBool);
  return {at::empty_symint({members, batch, weights.back().sym_size(1)}, input.options()),
          at::empty_symint({members, batch, units}, input.options()),
          at::empty_symint({members, batch, pack ? (units + 7) / 8 : units}, bits)};
}

Strength activation_strength(const Tensor& input, TensorList weights, TensorList biases,
                             const Tensor& mean, const Tensor& std, std::string_view activation,
                             bool pack) {
  const ActivationKind act = parse_activation(kOp, activation);
  Strength result = checked_and_allocated(input, weights, biases, mean, std, pack);
  auto& [output, value, active] = result;
  Problem problem(weights, biases);
  problem.set_input(input);
  problem.set_activation(act);
  ensemble_mlp_cpu::Forward& params = problem.params;
  params.output = output.mutable_data_ptr();

  const at::ScalarType real = accumulation_type(input.scalar_type());
  const Tensor means = mean.to(real).contiguous(), stds = std.to(real).contiguous();
  ActivationStrengthParams& strength = params.strength;
  strength.units = value.size(2);
  strength.mean = means.const_data_ptr();
  strength.std = stds.const_data_ptr();
  strength.mean_member_stride = mean.dim() == 2 ? strength.units : 0;
  strength.std_member_stride = std.dim() == 2 ? strength.units : 0;
  strength.value = value.mutable_data_ptr();
  strength.active = static_cast<uint8_t*>(active.mutable_data_ptr());
  strength.bitpack = pack;
  if (input.is_cuda()) {
    run_on_cuda(kOp, params, input, weights);
    return result;
  }
  launch_cpu(ensemble_mlp_cpu::work_items(params), ensemble_mlp_cpu::grain_size(params),
             ensemble_mlp_cpu::scratch_bytes(params),
             [&](int64_t begin, int64_t end, void* scratch) {
               ensemble_mlp_cpu::run(params, begin, end, scratch);
             });
  return result;
}

Strength activation_strength_meta(const Tensor& input, TensorList weights, TensorList biases,
                                  const Tensor& mean, const Tensor& std,
                                  std::string_view activation, bool pack) {
  parse_activation(kOp, activation);
  return checked_and_allocated(input, weights, biases, mean, std, pack);
}

// Casts as ensemble_mlp does; the statistics keep their precision.
template <c10::DeviceType device, c10::DispatchKey key>
Strength activation_strength_autocast(const Tensor& input, TensorList weights, TensorList biases,
                                      const Tensor& mean, const Tensor& std,
                                      std::string_view activation, bool pack) {
  static const auto op =
      dispatcher_op<Strength(const Tensor&, TensorList, TensorList, const Tensor&, const Tensor&,
                             std::string_view, bool)>("pyens::activation_strength");
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  return op.call(at::autocast::cached_cast(type, input, device),
                 at::autocast::cached_cast(type, weights, device),
                 at::autocast::cached_cast(type, biases, device),
                 at::autocast::cached_cast(at::kFloat, mean, device),
                 at::autocast::cached_cast(at::kFloat, std, device), activation, pack);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyens, CPU, m) { m.impl("activation_strength", activation_strength); }

TORCH_LIBRARY_IMPL(pyens, CUDA, m) { m.impl("activation_strength", activation_strength); }

TORCH_LIBRARY_IMPL(pyens, Meta, m) { m.impl("activation_strength", activation_strength_meta); }

TORCH_LIBRARY_IMPL(pyens, Autograd, m) {
  m.impl("activation_strength", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(pyens, AutocastCPU, m) {
  m.impl("activation_strength",
         activation_strength_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(pyens, AutocastCUDA, m) {
  m.impl("activation_strength",
         activation_strength_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace pyens
