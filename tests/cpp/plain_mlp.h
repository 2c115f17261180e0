// The MLP of one member and one example in plain loops of double: what the CPU's kernels are tested against.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <utility>
#include <vector>

#include "layer_options.h"

namespace plain {

using Doubles = std::vector<double>;

struct Activated {
  double value, slope;
};

inline double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }
inline double softplus(double z) { return z > 20 ? z : std::log1p(std::exp(z)); }

inline Activated activate(double z, const pyens::Activation& activation) {
  using pyens::ActivationKind;
  const double a = activation.parameter;
  switch (activation.kind) {
    case ActivationKind::relu: return {z > 0 ? z : 0, z > 0 ? 1.0 : 0.0};
    case ActivationKind::gelu: {
      const double phi = 0.5 * std::erfc(-z / std::sqrt(2.0));
      return {z * phi, phi + z * std::exp(-0.5 * z * z) / std::sqrt(2 * M_PI)};
    }
    case ActivationKind::silu: return {z * sigmoid(z), sigmoid(z) * (1 + z * (1 - sigmoid(z)))};
    case ActivationKind::elu: return {z > 0 ? z : a * std::expm1(z), z > 0 ? 1 : a * std::exp(z)};
    case ActivationKind::softplus: return {softplus(z), sigmoid(z)};
    case ActivationKind::tanh: return {std::tanh(z), 1 - std::tanh(z) * std::tanh(z)};
    case ActivationKind::identity: return {z, 1};
    case ActivationKind::mish: {
      const double t = std::tanh(softplus(z));
      return {z * t, t + z * (1 - t * t) * sigmoid(z)};
    }
    case ActivationKind::celu:
      return {z > 0 ? z : a * std::expm1(z / a), z > 0 ? 1 : std::exp(z / a)};
    case ActivationKind::leaky_relu: return {z > 0 ? z : a * z, z > 0 ? 1 : a};
    case ActivationKind::sigmoid: return {sigmoid(z), sigmoid(z) * sigmoid(-z)};
    case ActivationKind::gelu_tanh: {
      const double c = std::sqrt(2 / M_PI), t = std::tanh(c * (z + 0.044715 * z * z * z));
      return {0.5 * z * (1 + t),
              0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)};
    }
    case ActivationKind::hardswish:
      return {z <= -3 ? 0 : z >= 3 ? z : z * (z + 3) / 6, z <= -3 ? 0 : z >= 3 ? 1 : z / 3 + 0.5};
    case ActivationKind::sin: return {std::sin(z), std::cos(z)};
  }
  std::printf("no such activation\n");
  std::abort();
}

// weight [out][in]; norm_weight and norm_bias: 1 and 0 where they are none.
struct Layer {
  LayerOptions options;
  Doubles weight, bias, norm_weight, norm_bias;
};

// What dropout multiplies unit `unit` of hidden layer `layer` by.
using Factor = std::function<double(int64_t layer, int64_t unit)>;

inline double exactly(double x) { return x; }

// What an example left in each layer for its way back.
struct Trace {
  double (*operand)(double) = exactly;  // what a product reads of an activation or a gradient
  std::vector<Doubles> read, slope, normalized;
  std::vector<double> scale;
};

inline void normalize(const Layer& layer, Doubles& x, Trace& trace) {
  const auto n = static_cast<double>(x.size());
  double mean = 0, square = 0;
  if (layer.options.norm == pyens::NormKind::layer_norm) {
    for (const double value : x) mean += value / n;
  }
  for (const double value : x) square += (value - mean) * (value - mean) / n;
  const double scale = 1 / std::sqrt(square + layer.options.epsilon);
  for (double& value : x) value = (value - mean) * scale;
  trace.normalized.back() = x;
  trace.scale.back() = scale;
  for (size_t o = 0; o < x.size(); ++o) x[o] = x[o] * layer.norm_weight[o] + layer.norm_bias[o];
}

// The outputs of an example.
inline Doubles forward(const std::vector<Layer>& layers, Doubles x, const Factor& factor,
                       bool drops_before_norm, Trace& trace) {
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    const LayerOptions& options = layer.options;
    const size_t out = layer.weight.size() / x.size();
    const bool last = l + 1 == layers.size(), has_norm = !last && options.has_norm();
    const bool early = has_norm && drops_before_norm;
    Doubles z(out), slope(out);
    const auto drop = [&] {
      for (size_t o = 0; !last && o < out; ++o) {
        z[o] *= factor(static_cast<int64_t>(l), static_cast<int64_t>(o));
      }
    };
    trace.normalized.emplace_back();
    trace.scale.push_back(0);
    for (size_t o = 0; o < out; ++o) {
      z[o] = layer.bias.empty() ? 0 : layer.bias[o];
      for (size_t i = 0; i < x.size(); ++i) {
        z[o] += layer.weight[o * x.size() + i] * trace.operand(x[i]);
      }
    }
    if (early && !options.after_activation) drop();
    if (has_norm && !options.after_activation) normalize(layer, z, trace);
    for (size_t o = 0; o < out; ++o) {
      const Activated h = activate(z[o], options.activation);
      z[o] = h.value;
      slope[o] = h.slope;
    }
    if (early && options.after_activation) drop();
    if (has_norm && options.after_activation) normalize(layer, z, trace);
    if (!early) drop();
    for (size_t o = 0; !last && options.residual && o < out; ++o) z[o] += x[o];
    trace.read.push_back(std::move(x));
    trace.slope.push_back(std::move(slope));
    x = std::move(z);
  }
  return x;
}

// What is added to the sums of a layer's gradients.
struct Gradients {
  Doubles weight, bias, norm_weight, norm_bias;
};

// g: by the outputs; returned, by the input.
inline Doubles backward(const std::vector<Layer>& layers, const Trace& trace, Doubles g,
                        const Factor& factor, bool drops_before_norm,
                        std::vector<Gradients>& gradients) {
  for (size_t l = layers.size(); l-- > 0;) {
    const Layer& layer = layers[l];
    const LayerOptions& options = layer.options;
    const Doubles& x = trace.read[l];
    const size_t out = g.size(), in = x.size();
    const bool last = l + 1 == layers.size(), has_norm = !last && options.has_norm();
    const bool early = has_norm && drops_before_norm;
    Gradients& to = gradients[l];
    const auto drop = [&] {
      for (size_t o = 0; !last && o < out; ++o) {
        g[o] *= factor(static_cast<int64_t>(l), static_cast<int64_t>(o));
      }
    };
    const auto undo_norm = [&] {
      const Doubles& normalized = trace.normalized[l];
      const auto n = static_cast<double>(out);
      double mean = 0, along = 0;
      for (size_t o = 0; o < out; ++o) {
        to.norm_weight[o] += g[o] * normalized[o];
        to.norm_bias[o] += g[o];
        g[o] *= layer.norm_weight[o];
        if (options.norm == pyens::NormKind::layer_norm) mean += g[o] / n;
        along += g[o] * normalized[o] / n;
      }
      for (size_t o = 0; o < out; ++o) {
        g[o] = (g[o] - mean - normalized[o] * along) * trace.scale[l];
      }
    };
    Doubles below = !last && options.residual ? g : Doubles(in, 0);
    if (!early) drop();
    if (has_norm && options.after_activation) undo_norm();
    if (early && options.after_activation) drop();
    for (size_t o = 0; o < out; ++o) g[o] *= trace.slope[l][o];
    if (has_norm && !options.after_activation) undo_norm();
    if (early && !options.after_activation) drop();
    for (size_t o = 0; o < out; ++o) {
      const double by = trace.operand(g[o]);
      for (size_t i = 0; i < in; ++i) {
        to.weight[o * in + i] += by * trace.operand(x[i]);
        below[i] += by * layer.weight[o * in + i];
      }
      if (!layer.bias.empty()) to.bias[o] += g[o];
    }
    g = std::move(below);
  }
  return g;
}

}  // namespace plain
