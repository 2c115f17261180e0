#include "ops/torch.h"

#include "ops/ensemble_mlp_composed.h"

namespace pyens {
namespace {

using at::Tensor;
using at::TensorList;

// Each activation in torch's operations: value(z, a), and backward(grad, z, h, a), grad times its derivative
// where h = value(z, a); a is its parameter.
struct Relu {
  static Tensor value(const Tensor& z, double /*a*/) { return at::relu(z); }
  static Tensor backward(const Tensor& grad, const Tensor& z, const Tensor& /*h*/, double /*a*/) {
    return at::threshold_backward(grad, z, 0);
  }
};
struct Gelu {
  static Tensor value(const Tensor& z, double /*a*/) { return at::gelu(z); }
  static Tensor backward(const Tensor& grad, const Tensor& z, const Tensor& /*h*/, double /*a*/) {
    return at::gelu_backward(grad, z);
  }
};
struct GeluTanh {
  static Tensor value(const Tensor& z, double /*a*/) { return at::gelu(z, "tanh"); }
  static Tensor backward(const Tensor& grad, const Tensor& z, const Tensor& /*h*/, double /*a*/) {
    return at::gelu_backward(grad, z, "tanh");
  }
};
struct Silu {
  static Tensor value(const Tensor& z, double /*a*/) { return at::silu(z); }
  static Tensor backward(const Tensor& grad, const Tensor& z, const Tensor& /*h*/, double /*a*/) {
    const Tensor s = at::sigmoid(z);  // at::silu_backward has no derivative
    return grad * s * (1 + z * (1 - s));
  }
};
struct Mish {
  static Tensor value(const Tensor& z, double /*a*/) { return at::mish(z); }
  static Tensor backward(const Tensor& grad, const Tensor& z, const Tensor& /*h*/, double /*a*/) {
    const Tensor t = at::tanh(at::softplus(z));  // nor has at::mish_backward
    return grad * (t + z * (1 - t * t) * at::sigmoid(z));
  }
};
struct Elu {
  static Tensor value(const Tensor& z, double a) { return at::elu(z, a); }
  static Tensor backward(const Tensor& grad, const Tensor& z, const Tensor& /*h*/, double a) {
    return at::elu_backward(grad, a, 1, 1, /*is_result=*/false, z);
  }
};
struct Celu {
  static Tensor value(const Tensor& z, double a) { return at::celu(z, a); }
  static Tensor backward(const Tensor& grad, const Tensor& z, const Tensor& /*h*/, double a) {
    return at::elu_backward(grad, a, 1, 1 / a, /*is_result=*/false, z);
  }
};
struct LeakyRelu {
  static Tensor value(const Tensor& z, double a) { return at::leaky_relu(z, a); }
  static Tensor backward(const Tensor& grad, const Tensor& z, const Tensor& /*h*/, double a) {
    return at::leaky_relu_backward(grad, z, a, /*self_is_result=*/false);
  }
};
struct Softplus {
  static Tensor value(const Tensor& z, double /*a*/) { return at::softplus(z); }
  static Tensor backward(const Tensor& grad, const Tensor& z, const Tensor& /*h*/, double /*a*/) {
    return at::softplus_backward(grad, z, 1, 20);
  }
};
struct Tanh {
  static Tensor value(const Tensor& z, double /*a*/) { return at::tanh(z); }
  static Tensor backward(const Tensor& grad, const Tensor& /*z*/, const Tensor& h, double /*a*/) {
    return at::tanh_backward(grad, h);
  }
};
struct Sigmoid {
  static Tensor value(const Tensor& z, double /*a*/) { return at::sigmoid(z); }
  static Tensor backward(const Tensor& grad, const Tensor& /*z*/, const Tensor& h, double /*a*/) {
    return at::sigmoid_backward(grad, h);
  }
};
struct Hardswish {
  static Tensor value(const Tensor& z, double /*a*/) { return at::hardswish(z); }
  static Tensor backward(const Tensor& grad, const Tensor& z, const Tensor& /*h*/, double /*a*/) {
    return at::where(z <= -3, 0, at::where(z < 3, grad * (z / 3 + 0.5), grad));
  }
};
struct Sin {
  static Tensor value(const Tensor& z, double /*a*/) { return at::sin(z); }
  static Tensor backward(const Tensor& grad, const Tensor& z, const Tensor& /*h*/, double /*a*/) {
    return grad * at::cos(z);
  }
};
struct Identity {
  static Tensor value(const Tensor& z, double /*a*/) { return z; }
  static Tensor backward(const Tensor& grad, const Tensor& /*z*/, const Tensor& /*h*/,
                         double /*a*/) {
    return grad;
  }
};

Tensor activate(const Activation& activation, const Tensor& z) {
  switch (activation.kind) {
#define PYENS_CASE(name, Formulas, standard) \
  case ActivationKind::name: return Formulas::value(z, activation.parameter);
    PYENS_ACTIVATIONS(PYENS_CASE)
#undef PYENS_CASE
  }
  return {};
}
Tensor activate_backward(const Activation& activation, const Tensor& grad, const Tensor& z,
                         const Tensor& h) {
  switch (activation.kind) {
#define PYENS_CASE(name, Formulas, standard) \
  case ActivationKind::name: return Formulas::backward(grad, z, h, activation.parameter);
    PYENS_ACTIVATIONS(PYENS_CASE)
#undef PYENS_CASE
  }
  return {};
}

// Rates of the members at a hidden layer, [E or 1, 1, 1].
Tensor rates_at(const Tensor& rates, int64_t layer) {
  return (rates.dim() == 1 ? rates : rates.select(1, layer)).view({-1, 1, 1});
}

// bool [E, B, units]: what kernels/dropout.h keeps. torch has hardly any unsigned arithmetic, so
// 32-bit numbers lie in int64.
Tensor kept_by_dropout(const MLPOptions& options, int64_t layer, const c10::SymInt& batch,
                       const c10::SymInt& unit_count) {
  const Tensor& seeds = *options.dropout_seeds;
  const auto shifted = [](const Tensor& x, int64_t bits) {  // as if unsigned
    return at::__rshift__(x, bits).bitwise_and((int64_t{1} << (64 - bits)) - 1);
  };
  const auto signed_constant = [](uint64_t x) { return static_cast<int64_t>(x); };
  const auto mix = [&](Tensor x) {
    x = x + signed_constant(0x9e3779b97f4a7c15u);
    x = at::bitwise_xor(x, shifted(x, 30)) * signed_constant(0xbf58476d1ce4e5b9u);
    x = at::bitwise_xor(x, shifted(x, 27)) * signed_constant(0x94d049bb133111ebu);
    return at::bitwise_xor(x, shifted(x, 31));
  };
  constexpr int64_t kLow = 0xffffffff;
  const Tensor units = at::arange(unit_count, seeds.options());
  const Tensor key = mix((mix(mix(seeds) + layer).unsqueeze(1) + units)).unsqueeze(1);
  const Tensor rows = at::arange(batch, seeds.options()).unsqueeze(1);
  Tensor x = (rows + key.bitwise_and(kLow)).bitwise_and(kLow);
  x = at::bitwise_xor(x, at::__rshift__(x, 16));
  x = (x * int64_t{0x21f0aaad}).bitwise_and(kLow);
  x = at::bitwise_xor(x, at::__rshift__(x, 15));
  x = at::bitwise_xor(x, shifted(key, 32));
  x = (x * int64_t{0x735a2d97}).bitwise_and(kLow);
  x = at::bitwise_xor(x, at::__rshift__(x, 15));
  if (options.dropout_rates)
    return x >= (rates_at(*options.dropout_rates, layer) * 0x1p32).to(at::kLong);
  return x >= static_cast<int64_t>(options.dropout * 0x1p32);
}

// A norm over the features of h [E, B, h], and its derivative, in operations that have one themselves.
struct ComposedNorm {
  NormKind kind = NormKind::none;
  double epsilon = 0;
  Tensor weight, bias;       // [E, 1, h], or undefined
  Tensor normalized, scale;  // of the forward pass

  Tensor value(const Tensor& h) {
    const at::ScalarType type = h.scalar_type();
    const Tensor x = h.to(accumulation_type(type));
    const Tensor centred = kind == NormKind::layer_norm ? x - x.mean(-1, /*keepdim=*/true) : x;
    scale = at::rsqrt(centred.square().mean(-1, /*keepdim=*/true) + epsilon);
    normalized = centred * scale;
    Tensor y = weight.defined() ? normalized * weight : normalized;
    if (bias.defined()) y = y + bias;
    return y.to(type);
  }
  // By h; those of weight and bias [E, h] go to `of_weight` and `of_bias`, where they are asked for.
  Tensor backward(const Tensor& grad, Tensor* of_weight, Tensor* of_bias) const {
    const Tensor g = grad.to(normalized.scalar_type());
    if (of_weight) *of_weight = (g * normalized).sum(1);
    if (of_bias) *of_bias = g.sum(1);
    const Tensor scaled = weight.defined() ? g * weight : g;
    const Tensor along = (scaled * normalized).mean(-1, /*keepdim=*/true);
    Tensor by = scaled - normalized * along;
    if (kind == NormKind::layer_norm) by = by - scaled.mean(-1, /*keepdim=*/true);
    return (by * scale).to(grad.scalar_type());
  }
};

}  // namespace

std::vector<Tensor> composed_backward(const char* op, Tensor grad, const Network& network,
                                      const MLPOptions& options, const NeedsGrad& needs_grad) {
  const size_t layers = network.weights.size();
  const LayersOptions given = parse_layers(op, options, layers);
  const bool shared_input = network.input.dim() == 2;
  const bool drops = options.dropout > 0 || options.dropout_rates;
  // Parameters of the members that are computed.
  const auto of_chosen = [&](const Tensor& t) {
    return network.chosen ? t.index_select(0, members_within(network)) : t;
  };
  std::vector<Tensor> weights, biases(layers);
  std::vector<ComposedNorm> norms(layers);
  for (size_t l = 0, normed = 0; l < layers; ++l) {
    weights.push_back(of_chosen(network.weights[l]));
    if (!network.biases.empty() && network.biases[l].sym_size(1) != 0) {
      biases[l] = of_chosen(network.biases[l]).unsqueeze(1);
    }
    norms[l].kind = given[l].norm;
    norms[l].epsilon = options.norm_eps;
    if (given[l].norm == NormKind::none) continue;
    const auto read = [&](TensorList from) {
      return from.empty() ? Tensor() : of_chosen(from[normed]).unsqueeze(1);
    };
    norms[l].weight = read(network.norm_weights);
    norms[l].bias = read(network.norm_biases);
    ++normed;
  }

  // Dropout of a hidden layer: what it keeps, drawn once.
  std::vector<Tensor> kept(layers);
  const auto apply_dropout = [&](const Tensor& x, size_t l) {
    const auto layer = static_cast<int64_t>(l);
    if (!kept[l].defined()) {
      kept[l] = kept_by_dropout(options, layer, network.batch(), network.weights[l].sym_size(1));
    }
    Tensor scaled;
    if (options.dropout_rates) {  // in the precision in which a number times a tensor is computed
      const Tensor scales = (1 / (1 - rates_at(*options.dropout_rates, layer)))
                                .to(accumulation_type(grad.scalar_type()));
      scaled = (x * scales).to(x.scalar_type());
    } else {
      scaled = x * (1 / (1 - options.dropout));
    }
    return at::where(kept[l], scaled, at::zeros({}, x.options()));
  };
  const auto drops_before_norm = [&](size_t l) {
    return drops && options.dropout_before_norm && given[l].norm != NormKind::none;
  };
  const auto norm_at = [&](size_t l, bool after_activation) {
    return given[l].norm != NormKind::none && options.norm_after_activation == after_activation;
  };

  // What each layer reads, and what its activation reads and gives.
  std::vector<Tensor> h{shared_input ? network.input.unsqueeze(0) : network.input};
  std::vector<Tensor> z(layers), activated(layers);
  const bool with_output = given.back().activation.kind != ActivationKind::identity;
  for (size_t l = 0; l + (with_output ? 0 : 1) < layers; ++l) {
    const Tensor transposed = weights[l].transpose(1, 2);
    const bool own = l > 0 || !shared_input;  // [E, B, in], which is what the fused sum takes
    Tensor x = own && biases[l].defined() ? at::baddbmm(biases[l], h[l], transposed)
                                          : at::matmul(h[l], transposed);
    if (!own && biases[l].defined()) x = x + biases[l];
    const bool hidden = l + 1 < layers;
    for (const bool after : {false, true}) {
      if (after) {
        z[l] = x;
        x = activated[l] = activate(given[l].activation, x);
      }
      if (!hidden || !norm_at(l, after)) continue;
      if (drops_before_norm(l)) x = apply_dropout(x, l);
      x = norms[l].value(x);
    }
    if (!hidden) break;
    if (drops && !drops_before_norm(l)) x = apply_dropout(x, l);
    h.push_back(given[l].residual ? x + h[l] : x);
  }

  std::vector<Tensor> gradients(network.tensors());
  const size_t first_norm_weight = 1 + layers + network.biases.size();
  const size_t first_norm_bias = first_norm_weight + network.norm_weights.size();
  size_t normed = 0;  // layers with a norm below
  for (size_t l = 0; l < layers; ++l) normed += given[l].norm != NormKind::none;
  for (size_t l = layers; l-- > 0;) {
    const bool hidden = l + 1 < layers;
    const Tensor from_above = grad;
    if (hidden && drops && !drops_before_norm(l)) grad = apply_dropout(grad, l);
    if (hidden && given[l].norm != NormKind::none) --normed;
    for (const bool after : {true, false}) {
      if (hidden && norm_at(l, after)) {
        const auto wanted = [&](TensorList list, size_t first) {
          const bool needed = !list.empty() && needs_grad[first + normed];
          return needed ? &gradients[first + normed] : nullptr;
        };
        grad = norms[l].backward(grad, wanted(network.norm_weights, first_norm_weight),
                                 wanted(network.norm_biases, first_norm_bias));
        if (drops_before_norm(l)) grad = apply_dropout(grad, l);
      }
      if (after && z[l].defined()) {
        grad = activate_backward(given[l].activation, grad, z[l], activated[l]);
      }
    }
    const size_t weight = 1 + l, bias = 1 + layers + l;
    if (needs_grad[weight]) gradients[weight] = at::matmul(grad.transpose(1, 2), h[l]);
    if (!network.biases.empty() && needs_grad[bias]) {
      gradients[bias] = biases[l].defined() ? grad.sum(1) : at::zeros_like(network.biases[l]);
    }
    if (l == 0 && !needs_grad[0]) break;
    grad = at::matmul(grad, weights[l]);
    if (hidden && given[l].residual) grad = grad + from_above;
  }
  if (needs_grad[0]) gradients[0] = shared_input ? grad.sum(0) : grad;
  std::vector<Tensor> needed;
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (!needs_grad[i]) continue;
    const bool empty = i > layers && network.tensor(i).sym_size(1) == 0;
    const Tensor of_all = i == 0 || empty ? gradients[i] : gradient_of_all(network, gradients[i]);
    needed.push_back(of_all.to(network.tensor(i).scalar_type()));
  }
  return needed;
}

}  // namespace pyens
