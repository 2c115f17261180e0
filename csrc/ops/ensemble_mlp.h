// What the torch-facing sides of ensemble_mlp and ensemble_mlp_loss share.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/List.h>
#include <c10/util/SmallVector.h>

#include <forward_list>
#include <optional>
#include <string_view>
#include <vector>

#include "kernels/ensemble_mlp.h"
#include "ops/checks.h"
#include "ops/dispatch.h"
#include "ops/launch.h"

namespace pyens {

inline ActivationKind parse_activation(const char* op, std::string_view name) {
  const std::optional<ActivationKind> kind = parse_activation_kind(name);
  TORCH_CHECK_VALUE(kind, op, ": activation: expected one of ", kAllActivationNames, ", got \"",
                    name, "\"");
  return *kind;
}

inline constexpr ArgumentName kFirstWeight{"weights", 0};

// Layers that fit each other. Independent of the input, so that packing can check alone.
inline void check_layers(const char* op, at::TensorList weights, at::TensorList biases) {
  PYENS_CHECK_VALUE(!weights.empty(), op, "weights", "at least one layer", "an empty list");
  PYENS_CHECK_VALUE(biases.empty() || biases.size() == weights.size(), op, "biases",
                    c10::str("one for each of the ", weights.size(), " layers, or none"),
                    biases.size());
  const at::Tensor& first = weights[0];
  PYENS_CHECK_TYPE(is_kernel_dtype(first.scalar_type()), op, kFirstWeight,
                   "float32, float64, bfloat16 or float16", first.scalar_type());
  for (size_t l = 0; l < weights.size(); ++l) {
    const at::Tensor& w = weights[l];
    const ArgumentName name{"weights", static_cast<int64_t>(l)};
    check_same_kind(op, name, w, kFirstWeight, first);
    PYENS_CHECK_VALUE(w.dim() == 3, op, name, "[E, out, in]", "shape ", w.sym_sizes());
    PYENS_CHECK_VALUE(w.sym_size(0) >= 1 && w.sym_size(1) >= 1 && w.sym_size(2) >= 1, op, name,
                      "[E, out, in], none of them 0", "shape ", w.sym_sizes());
    PYENS_CHECK_VALUE(w.sym_size(0) == first.sym_size(0), op, name,
                      c10::str("the ensemble size of weights[0] (", first.sym_size(0), ")"),
                      "shape ", w.sym_sizes());
    PYENS_CHECK_VALUE(
        l == 0 || w.sym_size(2) == weights[l - 1].sym_size(1), op, name,
        c10::str("in = out of weights[", l - 1, "] (", weights[l - 1].sym_size(1), ")"), "shape ",
        w.sym_sizes());
    if (biases.empty()) continue;
    const at::Tensor& b = biases[l];
    const ArgumentName bias_name{"biases", static_cast<int64_t>(l)};
    check_same_kind(op, bias_name, b, kFirstWeight, first);
    PYENS_CHECK_VALUE(
        b.dim() == 2 && b.sym_size(0) == w.sym_size(0) && b.sym_size(1) == w.sym_size(1), op,
        bias_name, c10::str("[", w.sym_size(0), ", ", w.sym_size(1), "]"), "shape ", b.sym_sizes());
  }
}

inline void check_input(const char* op, const at::Tensor& input, at::TensorList weights) {
  check_same_kind(op, {"input"}, input, kFirstWeight, weights[0]);
  const auto expected = [&] {
    const auto e = weights[0].sym_size(0), in = weights[0].sym_size(2);
    return c10::str("[B, ", in, "] or [", e, ", B, ", in, "]");
  };
  PYENS_CHECK_VALUE(input.dim() == 2 || input.dim() == 3, op, "input", expected(), "shape ",
                    input.sym_sizes());
  PYENS_CHECK_VALUE(input.sym_size(-1) == weights[0].sym_size(2), op, "input", expected(), "shape ",
                    input.sym_sizes());
  PYENS_CHECK_VALUE(input.dim() == 2 || input.sym_size(0) == weights[0].sym_size(0), op, "input",
                    expected(), "shape ", input.sym_sizes());
}

inline void check_dropout(const char* op, double dropout,
                          const std::optional<at::Tensor>& dropout_seeds, at::TensorList weights) {
  PYENS_CHECK_VALUE(dropout >= 0 && dropout < 1, op, "dropout", "0 <= dropout < 1", dropout);
  if (!dropout_seeds) {
    PYENS_CHECK_VALUE(dropout == 0, op, "dropout_seeds",
                      c10::str("int64 [", weights[0].sym_size(0), "] with dropout ", dropout),
                      "None");
    return;
  }
  const at::Tensor& seeds = *dropout_seeds;
  PYENS_CHECK_TYPE(seeds.scalar_type() == at::kLong, op, "dropout_seeds", "int64",
                   seeds.scalar_type());
  PYENS_CHECK_TYPE(seeds.device() == weights[0].device(), op, "dropout_seeds",
                   c10::str("the device of ", kFirstWeight, " (", weights[0].device(), ")"),
                   seeds.device());
  PYENS_CHECK_VALUE(seeds.dim() == 1 && seeds.sym_size(0) == weights[0].sym_size(0), op,
                    "dropout_seeds", c10::str("[", weights[0].sym_size(0), "]"), "shape ",
                    seeds.sym_sizes());
}

// A call in the kernel's terms. The tensors outlive it; owns what had to be copied.
struct Problem {
  std::forward_list<at::Tensor> copies;
  c10::SmallVector<MLPLayer, 8> layers;
  ensemble_mlp_cpu::Forward params{};

  Problem(at::TensorList weights, at::TensorList biases) {
    layers.reserve(weights.size());
    for (size_t l = 0; l < weights.size(); ++l) {
      const at::Tensor& w = with_contiguous_rows(weights[l], copies);
      MLPLayer layer{};
      layer.weight.data = w.const_data_ptr();
      layer.weight.format = kernel_dtype(w.scalar_type());
      layer.out = w.size(1);
      layer.in = w.size(2);
      layer.weight.member_stride = w.stride(0);
      layer.weight.row_stride = w.stride(1);
      if (!biases.empty()) {
        const at::Tensor& b = with_contiguous_rows(biases[l], copies);
        layer.bias.data = b.const_data_ptr();
        layer.bias.member_stride = b.stride(0);
      }
      layers.push_back(layer);
    }
    params.dtype = kernel_dtype(weights[0].scalar_type());
    params.ensemble_size = weights[0].size(0);
    params.num_layers = static_cast<int64_t>(layers.size());
    params.layers = layers.data();
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  void set_input(const at::Tensor& input) {
    const at::Tensor& x = with_contiguous_rows(input, copies);
    params.input = x.const_data_ptr();
    params.batch = x.size(-2);
    params.input_row_stride = x.stride(-2);
    params.input_member_stride = x.dim() == 3 && params.ensemble_size > 1 ? x.stride(0) : 0;
  }

  void set_activation(ActivationKind kind) {  // of the hidden layers
    for (size_t l = 0; l + 1 < layers.size(); ++l) layers[l].activation.kind = kind;
  }

  void set_dropout(double dropout, const std::optional<at::Tensor>& dropout_seeds) {
    params.dropout.p = dropout;
    if (dropout > 0)
      params.dropout.seeds = with_contiguous_rows(*dropout_seeds, copies).const_data_ptr<int64_t>();
  }
};

// The forward pass on CUDA of a problem whose input and output are set; `weights` are those that it was
// made of.
void run_on_cuda(const char* op, const EnsembleMLPParams& params, const at::Tensor& input,
                 at::TensorList weights);

// One flag for each of [input, weights.., biases..].
using Wanted = c10::List<bool>;

// Those that `wanted` asks for.
inline std::vector<at::Tensor> wanted_of(const char* op, const at::Tensor& input,
                                         at::TensorList weights, at::TensorList biases,
                                         const Wanted& wanted) {
  const size_t layers = weights.size(), count = 1 + layers + biases.size();
  PYENS_CHECK_VALUE(wanted.size() == count, op, "wanted", c10::str(count, " flags"), wanted.size());
  std::vector<at::Tensor> chosen;
  if (wanted[0]) chosen.push_back(input);
  for (size_t l = 0; l < layers; ++l) {
    if (wanted[1 + l]) chosen.push_back(weights[l]);
  }
  for (size_t l = 0; l < biases.size(); ++l) {
    if (wanted[1 + layers + l]) chosen.push_back(biases[l]);
  }
  return chosen;
}

// Whether a training pass on CUDA is one launch, or has to be composed of matrix products.
inline bool trains_in_one_launch([[maybe_unused]] at::TensorList weights) {
#if defined(PYENS_WITH_CUDA)
  std::vector<MLPLayer> layers(weights.size());
  EnsembleMLP mlp{};
  for (size_t l = 0; l < weights.size(); ++l) {
    layers[l].out = weights[l].sym_size(1).guard_int(__FILE__, __LINE__);
    layers[l].in = weights[l].sym_size(2).guard_int(__FILE__, __LINE__);
  }
  mlp.dtype = kernel_dtype(weights[0].scalar_type());
  mlp.ensemble_size = weights[0].sym_size(0).guard_int(__FILE__, __LINE__);
  mlp.num_layers = static_cast<int64_t>(layers.size());
  mlp.layers = layers.data();
  return ensemble_mlp_cuda::training_fits_one_launch(mlp);
#else
  return false;
#endif
}

// A training pass in the kernel's terms: the problem, and the gradients that are wanted of it.
struct TrainingProblem : Problem {
  ensemble_mlp_cpu::Training training{};
  std::vector<at::Tensor> gradients;  // of accumulation_type, in the order of `wanted`
  c10::SmallVector<MLPLayerGradient, 8> layer_gradients;

  TrainingProblem(const char* op, const at::Tensor& input, at::TensorList weights,
                  at::TensorList biases, ActivationKind activation, double dropout,
                  const std::optional<at::Tensor>& dropout_seeds, const Wanted& wanted)
      : Problem(weights, biases), layer_gradients(weights.size()), input_(input) {
    set_input(input);
    set_dropout(dropout, dropout_seeds);
    set_activation(activation);
    const auto options = input.options().dtype(accumulation_type(input.scalar_type()));
    gradients = wanted_of(op, input, weights, biases, wanted);
    for (at::Tensor& gradient : gradients) {
      gradient = params.batch == 0 ? at::zeros(gradient.sizes(), options)
                                   : at::empty(gradient.sizes(), options);
    }
    auto next = gradients.begin();
    if (wanted[0]) training.grad_input = (next++)->mutable_data_ptr();
    training.sum_grad_input = input.dim() == 2;
    for (size_t l = 0; l < weights.size(); ++l) {
      if (wanted[1 + l]) layer_gradients[l].weight = (next++)->mutable_data_ptr();
    }
    for (size_t l = 0; l < biases.size(); ++l) {
      if (wanted[1 + weights.size() + l]) layer_gradients[l].bias = (next++)->mutable_data_ptr();
    }
    training.gradients = layer_gradients.data();
  }

  // On the CPU it raises for values that cannot be trained on; on CUDA they give NaN.
  void run(const char* op);

 private:
  at::Tensor input_;
  void run_on_cpu(const char* op);
};

// The public operation, through the dispatcher.
at::Tensor call_ensemble_mlp(const at::Tensor& input, at::TensorList weights, at::TensorList biases,
                             std::string_view activation, double dropout,
                             const std::optional<at::Tensor>& dropout_seeds);

}  // namespace pyens
