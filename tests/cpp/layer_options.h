// What the layers of a tested MLP have beside weights and biases.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/ensemble_mlp.h"

struct LayerOptions {
  pyens::Activation activation;
  pyens::NormKind norm = pyens::NormKind::none;
  bool after_activation = false, norm_weight = false, norm_bias = false, residual = false;
  double epsilon = 0;

  bool has_norm() const { return norm != pyens::NormKind::none; }
};

inline pyens::Activation default_activation(pyens::ActivationKind kind) {
  return {kind, pyens::kDefaultParameters[static_cast<int>(kind)]};
}

// One activation for the hidden layers, and the sums for outputs.
inline std::vector<LayerOptions> plain_layers(size_t layers, pyens::ActivationKind kind) {
  std::vector<LayerOptions> options(layers);
  for (size_t l = 0; l + 1 < layers; ++l) options[l].activation = default_activation(kind);
  return options;
}

// Of each layer its own activation, with a parameter that is no default, an output activation too; with
// `rich`, norms of all kinds and residuals where they fit. `smooth`: activations without a step in their
// slope, for sums that are off the grid.
inline std::vector<LayerOptions> varied_layers(const std::vector<int64_t>& widths, int number,
                                               bool rich, bool smooth) {
  using Kind = pyens::ActivationKind;
  std::vector<Kind> kinds = {Kind::silu, Kind::celu, Kind::tanh,      Kind::gelu,   Kind::softplus,
                             Kind::mish, Kind::sin,  Kind::gelu_tanh, Kind::sigmoid};
  if (!smooth) {
    kinds.insert(kinds.end(), {Kind::leaky_relu, Kind::relu, Kind::elu, Kind::hardswish});
  }
  kinds.push_back(Kind::identity);
  const int layers = static_cast<int>(widths.size()) - 1;
  std::vector<LayerOptions> options(static_cast<size_t>(layers));
  for (int l = 0; l < layers; ++l) {
    const int i = number + l;
    LayerOptions& layer = options[static_cast<size_t>(l)];
    layer.activation.kind = kinds[static_cast<size_t>(number + 3 * l) % kinds.size()];
    layer.activation.parameter = i % 2 == 0 ? 0.25 : 1.5;
    if (!rich || l + 1 == layers) continue;
    const bool fits = widths[static_cast<size_t>(l)] == widths[static_cast<size_t>(l) + 1];
    layer.residual = fits && i % 4 != 3;
    layer.norm = i % 5 == 4   ? pyens::NormKind::none
                 : i % 2 == 0 ? pyens::NormKind::layer_norm
                              : pyens::NormKind::rms_norm;
    layer.after_activation = (number / 2 + l) % 2 == 0;
    layer.epsilon = i % 3 == 0 ? 0.1 : 1e-3;
    layer.norm_weight = layer.has_norm() && i % 7 != 5;
    layer.norm_bias = layer.has_norm() && i % 7 != 3;
  }
  return options;
}

// Whose parameters `count` members have among `count` + 2 that are stored: the last first, one twice.
inline std::vector<int64_t> some_members(int64_t count) {
  std::vector<int64_t> members;
  for (int64_t m = 0; m < count; ++m) members.push_back(m % 3 == 2 ? members[0] : count + 1 - m);
  return members;
}
