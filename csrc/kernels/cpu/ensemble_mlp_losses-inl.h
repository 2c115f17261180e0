// The losses at the end of the ensemble MLP, over one tile of examples in the lanes.
//
// Each takes the outputs of one vector of examples, [feature][kPanel], and leaves in their place the
// gradient by them times `factor`; it returns the sum of the losses over the features. Lanes that
// are not `kept` get the gradient 0, whatever was in them. Bound by memory for narrow outputs, by
// the exponentials for wide ones; in both cases a few per cent of the layers before.

namespace pyens::PYENS_ISA::ensemble_mlp {

// --- elementary functions: polynomials for float, the C library for double ------------------------

template <class F, class V>
inline V elementary(V x) {
  if constexpr (sizeof(x[0]) == 4) {
    return F::template vector<V>(x);
  } else {
    for (int i = 0; i < lanes_of<V>(); ++i) x[i] = F::value(x[i]);
    return x;
  }
}

struct ExpNonpositive {
  static double value(double x) { return std::exp(x); }
  template <class V>
  static V vector(V x) {
    return exp_nonpositive(x);
  }
};
struct LogPositive {
  static double value(double x) { return std::log(x); }
  template <class V>
  static V vector(V x) {
    // Inf and NaN stay.
    const V log = log_positive(x);
    return x < broadcast<V>(std::numeric_limits<float>::infinity()) ? log : x;
  }
};
struct SoftplusExcess {  // log(1 + e^-|x|)
  static double value(double x) { return std::log1p(std::exp(-std::abs(x))); }
  template <class V>
  static V vector(V x) {
    return Softplus::excess(x);
  }
};

// --- losses --------------------------------------------------------------------------------------

template <class Real>
struct LossArguments {
  using V = Wide<Real>;
  Real* output;        // [features][kPanel], of this vector
  const Real* target;  // [T][kPanel] likewise; a class as a number
  int64_t features;
  V factor;                  // gradient of the mean loss by one term, 0 where not kept
  decltype(V{} < V{}) kept;  // lanes whose example counts
  Real inverse_temperature;  // of cross_entropy
  ExpectedClasses<Real> classes;
  static constexpr int64_t kStride = kPanelOf<Real>;

  V out(int64_t f) const { return load<V>(output + f * kStride); }
  V expected(int64_t f) const { return load<V>(target + f * kStride); }
  void set_gradient(int64_t f, V gradient) const {
    store(output + f * kStride, kept ? gradient * factor : V{});
  }
};

struct MSE {  // (z - y)^2
  template <class Real, class V = Wide<Real>>
  static V run(const LossArguments<Real>& a) {
    V loss{};
    for (int64_t f = 0; f < a.features; ++f) {
      const V error = a.out(f) - a.expected(f);
      loss = madd(error, error, loss);
      a.set_gradient(f, error + error);
    }
    return loss;
  }
};

struct BCE {  // max(z, 0) - z y + log(1 + e^-|z|)
  template <class Real, class V = Wide<Real>>
  static V run(const LossArguments<Real>& a) {
    V loss{};
    for (int64_t f = 0; f < a.features; ++f) {
      const V z = a.out(f), y = a.expected(f), zy = z * y, excess = elementary<SoftplusExcess>(z);
      const V one = broadcast<V>(Real{1}), negative = z > V{} ? V{} : z;
      // Where that is a difference of infinities, as torch has it: (1 - y) z - log sigmoid(z).
      const V far = (one - y) * z - (negative - excess);
      loss += zy - zy == V{} ? at_least(V{}, z) - zy + excess : far;
      a.set_gradient(f, elementary<Sigmoid>(z) - y);
    }
    return loss;
  }
};

struct GaussianNLL {  // log(v)/2 + (y - mu)^2 / (2 v), v = softplus(raw) + 1e-6
  template <class Real, class V = Wide<Real>>
  static V run(const LossArguments<Real>& a) {
    const V half = broadcast<V>(Real{0.5}), one = broadcast<V>(Real{1});
    const int64_t k = a.features / 2;
    V loss{};
    for (int64_t f = 0; f < k; ++f) {
      const V raw = a.out(k + f), error = a.out(f) - a.expected(f);
      const V variance = elementary<Softplus>(raw) + broadcast<V>(static_cast<Real>(1e-6));
      const V precision = one / variance, scaled = error * precision;
      loss += half * (elementary<LogPositive>(variance) + error * scaled);
      const V slope = raw > broadcast<V>(Real{20}) ? one : elementary<Sigmoid>(raw);
      a.set_gradient(f, scaled);
      a.set_gradient(k + f, half * precision * (one - error * scaled) * slope);
    }
    return loss;
  }
};

// log(sum_c e^(z_c / T)) - sum_c q_c z_c / T, q_c the share that is expected of class c.
struct CrossEntropy {
  template <class Real, class V = Wide<Real>>
  static V run(const LossArguments<Real>& a) {
    const V scale = broadcast<V>(a.inverse_temperature), label = load<V>(a.target);
    const V at_label = broadcast<V>(a.classes.at_label);
    const V elsewhere = broadcast<V>(a.classes.elsewhere);
    V largest = a.out(0);
    for (int64_t c = 1; c < a.features; ++c) largest = at_least(largest, a.out(c));
    V total{}, chosen{}, smoothed{};
    // In blocks, or a long sum of logits of one sign would be rounded all the same way.
    const bool smooth = a.classes.elsewhere > 0;
    for (int64_t first = 0; smooth && first < a.features; first += kBlock) {
      V sum{};
      for (int64_t c = first; c < std::min(first + kBlock, a.features); ++c) {
        const V q = label == broadcast<V>(static_cast<Real>(c)) ? at_label : elsewhere;
        sum = madd((a.out(c) - largest) * scale, q, sum);
      }
      smoothed += sum;
    }
    for (int64_t c = 0; c < a.features; ++c) {
      const V z = (a.out(c) - largest) * scale;
      chosen = label == broadcast<V>(static_cast<Real>(c)) ? z : chosen;
      const V e = elementary<ExpNonpositive>(z);
      total += e;
      store(a.output + c * a.kStride, e);
    }
    const V inverse = broadcast<V>(Real{1}) / total;
    for (int64_t c = 0; c < a.features; ++c) {
      const V p = a.out(c) * inverse;
      const V q = label == broadcast<V>(static_cast<Real>(c)) ? at_label : elsewhere;
      a.set_gradient(c, (p - q) * scale);
    }
    return elementary<LogPositive>(total) - (smooth ? smoothed : chosen);
  }
};

// The weighted sum of the losses of one tile, [feature][kPanel] panels of outputs; the gradient
// times scale * weight takes their place.
template <class L, class Real>
double loss_tile(const MLPTrainingCall& call, Real* output, int64_t features, const Real* target,
                 int64_t target_features, const Real* example_weight, int64_t examples,
                 Real scale) {
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>();
  constexpr int64_t P = kPanelOf<Real>;
  const Real inverse_temperature = 1 / static_cast<Real>(call.temperature);
  const ExpectedClasses<Real> classes(call.label_smoothing, features);
  V total{};
  for (int64_t b = 0; b < examples; b += N) {
    const V weight = load<V>(example_weight + b);
    const LossArguments<Real> a{output + b / P * P * features + b % P,
                                target + b / P * P * target_features + b % P,
                                features,
                                weight * broadcast<V>(scale),
                                weight != V{},
                                inverse_temperature,
                                classes};
    const V loss = L::template run<Real>(a);
    total = a.kept ? madd(weight, loss, total) : total;
  }
  double sum = 0;
  for (int i = 0; i < N; ++i) sum += static_cast<double>(total[i]);
  return sum;
}

template <class Real>
double loss_tile(const MLPTrainingCall& call, Real* output, int64_t features, const Real* target,
                 int64_t target_features, const Real* example_weight, int64_t examples,
                 Real scale) {
  const auto run = [&](auto tile) {
    return tile(call, output, features, target, target_features, example_weight, examples, scale);
  };
  switch (call.loss) {
    case Loss::mse: return run(loss_tile<MSE, Real>);
    case Loss::bce: return run(loss_tile<BCE, Real>);
    case Loss::gaussian_nll: return run(loss_tile<GaussianNLL, Real>);
    case Loss::cross_entropy: return run(loss_tile<CrossEntropy, Real>);
    case Loss::none: return 0;
  }
  return 0;
}

}  // namespace pyens::PYENS_ISA::ensemble_mlp
