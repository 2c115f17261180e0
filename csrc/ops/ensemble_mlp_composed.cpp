#include "ops/torch.h"

#include "ops/ensemble_mlp_composed.h"

namespace pyens {
namespace {

using at::Tensor;
using at::TensorList;

// Each activation in torch's operations: value(z), and backward(grad, z, h), grad times its derivative
// where h = value(z).
struct Relu {
  static Tensor value(const Tensor& z) { return at::relu(z); }
  static Tensor backward(const Tensor& grad, const Tensor& z, const Tensor& /*h*/) {
    return at::threshold_backward(grad, z, 0);
  }
};
struct Gelu {
  static Tensor value(const Tensor& z) { return at::gelu(z); }
  static Tensor backward(const Tensor& grad, const Tensor& z, const Tensor& /*h*/) {
    return at::gelu_backward(grad, z);
  }
};
struct Silu {
  static Tensor value(const Tensor& z) { return at::silu(z); }
  static Tensor backward(const Tensor& grad, const Tensor& z, const Tensor& /*h*/) {
    const Tensor s = at::sigmoid(z);  // at::silu_backward has no derivative
    return grad * s * (1 + z * (1 - s));
  }
};
struct Elu {
  static Tensor value(const Tensor& z) { return at::elu(z); }
  static Tensor backward(const Tensor& grad, const Tensor& z, const Tensor& /*h*/) {
    return at::elu_backward(grad, 1, 1, 1, /*is_result=*/false, z);
  }
};
struct Softplus {
  static Tensor value(const Tensor& z) { return at::softplus(z); }
  static Tensor backward(const Tensor& grad, const Tensor& z, const Tensor& /*h*/) {
    return at::softplus_backward(grad, z, 1, 20);
  }
};
struct Tanh {
  static Tensor value(const Tensor& z) { return at::tanh(z); }
  static Tensor backward(const Tensor& grad, const Tensor& /*z*/, const Tensor& h) {
    return at::tanh_backward(grad, h);
  }
};
struct Identity {
  static Tensor value(const Tensor& z) { return z; }
  static Tensor backward(const Tensor& grad, const Tensor& /*z*/, const Tensor& /*h*/) {
    return grad;
  }
};

// call(formulas) with those of that activation.
template <class Call>
Tensor with_formulas(ActivationKind kind, const Call& call) {
  switch (kind) {
#define PYENS_CASE(name, Formulas, parameter) \
  case ActivationKind::name: return call(Formulas());
    PYENS_ACTIVATIONS(PYENS_CASE)
#undef PYENS_CASE
  }
  return {};
}

Tensor of_members(const Tensor& rates) { return rates.view({-1, 1, 1}); }

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
    return x >= (of_members(*options.dropout_rates) * 0x1p32).to(at::kLong);
  return x >= static_cast<int64_t>(options.dropout * 0x1p32);
}

}  // namespace

std::vector<Tensor> composed_backward(const char* op, Tensor grad, const Network& network,
                                      const MLPOptions& options, const NeedsGrad& needs_grad) {
  const TensorList weights = network.weights, biases = network.biases;
  const ActivationKind activation = parse_activation(op, options.activation);
  const size_t layers = weights.size();
  const bool shared_input = network.input.dim() == 2;
  const bool drops = options.dropout > 0 || options.dropout_rates;
  const double scale = 1 / (1 - options.dropout);
  Tensor scales;  // of the members, in the precision in which a number times a tensor is computed
  if (options.dropout_rates) {
    scales =
        (1 / (1 - of_members(*options.dropout_rates))).to(accumulation_type(grad.scalar_type()));
  }
  const auto apply_dropout = [&](const Tensor& x, const Tensor& kept) {
    if (!kept.defined()) return x;
    const Tensor scaled = scales.defined() ? (x * scales).to(x.scalar_type()) : x * scale;
    return at::where(kept, scaled, at::zeros({}, x.options()));
  };

  // What each layer reads, what it computed before the activation, and what was kept of that.
  std::vector<Tensor> h{shared_input ? network.input.unsqueeze(0) : network.input};
  std::vector<Tensor> z, activated, kept(layers);
  for (size_t l = 0; l + 1 < layers; ++l) {
    Tensor product = at::matmul(h[l], weights[l].transpose(1, 2));
    z.push_back(biases.empty() ? product : product + biases[l].unsqueeze(1));
    activated.push_back(with_formulas(activation, [&](auto f) { return f.value(z[l]); }));
    if (drops) {
      kept[l] = kept_by_dropout(options, static_cast<int64_t>(l), network.batch(),
                                weights[l].sym_size(1));
    }
    h.push_back(apply_dropout(activated[l], kept[l]));
  }

  std::vector<Tensor> gradients(network.tensors());
  for (size_t l = layers; l-- > 0;) {
    const size_t weight = 1 + l, bias = 1 + layers + l;
    if (needs_grad[weight]) gradients[weight] = at::matmul(grad.transpose(1, 2), h[l]);
    if (!biases.empty() && needs_grad[bias]) gradients[bias] = grad.sum(1);
    if (l == 0 && !needs_grad[0]) break;
    grad = at::matmul(grad, weights[l]);
    if (l > 0) {
      grad = apply_dropout(grad, kept[l - 1]);
      grad = with_formulas(activation,
                           [&](auto f) { return f.backward(grad, z[l - 1], activated[l - 1]); });
    }
  }
  if (needs_grad[0]) gradients[0] = shared_input ? grad.sum(0) : grad;
  std::vector<Tensor> needed;
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (needs_grad[i]) needed.push_back(gradients[i]);
  }
  return needed;
}

}  // namespace pyens
