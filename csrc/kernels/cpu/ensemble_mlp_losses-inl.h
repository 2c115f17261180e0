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
struct Exp {  // of any sign
  static double value(double x) { return std::exp(x); }
  template <class V>
  static V vector(V x) {
    // In two factors, neither of which leaves the range before the product does.
    const V half = exp_nonpositive(broadcast<V>(-0.5f) * absolute(x));
    const V root = x > V{} ? broadcast<V>(1.0f) / half : half;
    return root * root;
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

// Terms of one sign are summed in blocks of so many, or a long sum would be rounded all the same way.
constexpr int64_t kTerms = 16;

// What a member's loss reads beside outputs and targets.
template <class Real>
struct MemberLoss {
  Real inverse_temperature, delta;
  ExpectedClasses<Real> classes;
  const double* quantiles;
  int64_t num_quantiles;
  const Real *class_weight, *log_variance_min, *log_variance_max;  // [K] each

  MemberLoss(const LossParameters& p, int64_t member, int64_t features, const Real* class_weight_)
      : inverse_temperature(1 / static_cast<Real>(p.temperature)),
        delta(loss_delta<Real>(p.delta)),
        classes(p.label_smoothing, features),
        quantiles(p.quantiles),
        num_quantiles(p.num_quantiles),
        class_weight(class_weight_),
        log_variance_min(of_member(p.log_variance_min, member, p.log_variance_min_member_stride)),
        log_variance_max(of_member(p.log_variance_max, member, p.log_variance_max_member_stride)) {}

  static const Real* of_member(const void* data, int64_t member, int64_t stride) {
    return data ? static_cast<const Real*>(data) + member * stride : nullptr;
  }
};

template <class Real>
const Real* class_weights(const MLPTrainingCall& call, int64_t member) {
  return MemberLoss<Real>::of_member(call.of_loss.class_weight, member,
                                     call.of_loss.class_weight_member_stride);
}
// By what a member's class weights are multiplied, as sample weights are.
template <class Real>
double class_weight_scale(const Real* weight, int64_t classes) {
  Real largest = 0;
  for (int64_t c = 0; c < classes; ++c) largest = std::max(largest, weight[c]);
  return sample_weight_scale(static_cast<double>(largest));
}
template <class Real>
void scale_class_weights(const MLPTrainingCall& call, int64_t member, int64_t classes, Real* to) {
  const Real* weight = class_weights<Real>(call, member);
  const double scale = class_weight_scale(weight, classes);
  for (int64_t c = 0; c < classes; ++c) to[c] = scaled_sample_weight(weight[c], scale);
}

template <class Real>
struct LossArguments {
  using V = Wide<Real>;
  Real* output;        // [features][kPanel], of this vector
  const Real* target;  // [T][kPanel] likewise; a class as a number
  int64_t features;
  V factor;                  // gradient of the mean loss by one term, 0 where not kept
  decltype(V{} < V{}) kept;  // lanes whose example counts
  const MemberLoss<Real>& of_loss;
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

// (s + (y - mu)^2 e^-s) / 2, s = min + softplus(t - min), t = max - softplus(max - raw). Both without
// cancellation: max - softplus(max - raw) = min(raw, max) - log(1 + e^-|max - raw|).
struct BoundedGaussianNLL {
  template <class Real, class V = Wide<Real>>
  static V run(const LossArguments<Real>& a) {
    const V half = broadcast<V>(Real{0.5});
    const int64_t k = a.features / 2;
    V loss{};
    for (int64_t f = 0; f < k; ++f) {
      const V low = broadcast<V>(a.of_loss.log_variance_min[f]);
      const V high = broadcast<V>(a.of_loss.log_variance_max[f]);
      const V raw = a.out(k + f), error = a.out(f) - a.expected(f);
      const V below = high - raw;
      const V t = (raw > high ? high : raw) - elementary<SoftplusExcess>(below);
      const V above = t - low;
      const V s = at_least(low, t) + elementary<SoftplusExcess>(above);
      const V scaled = error * elementary<Exp>(-s);
      loss += half * (s + error * scaled);
      a.set_gradient(f, scaled);
      const V slope = elementary<Sigmoid>(below) * elementary<Sigmoid>(above);
      // An error whose square is out of range meets a slope first.
      a.set_gradient(k + f, half * (slope - error * (scaled * slope)));
    }
    return loss;
  }
};

// c (e - c/2), c the error e = z - y cut off at +-delta: e^2/2 within, delta (|e| - delta/2) beyond. Smooth:
// the same by delta.
template <bool kSmooth>
struct Huber {
  template <class Real, class V = Wide<Real>>
  static V run(const LossArguments<Real>& a) {
    const V delta = broadcast<V>(a.of_loss.delta), minus_half = broadcast<V>(Real{-0.5});
    V loss{};
    for (int64_t first = 0; first < a.features; first += kTerms) {
      V sum{};
      for (int64_t f = first; f < std::min(first + kTerms, a.features); ++f) {
        const V error = a.out(f) - a.expected(f);
        V cut = error > delta ? delta : error;
        cut = cut < -delta ? -delta : cut;
        const V slope = kSmooth ? cut / delta : cut;
        sum = madd(slope, madd(minus_half, cut, error), sum);
        a.set_gradient(f, slope);
      }
      loss += sum;
    }
    return loss;
  }
};

// e tau where e = y - z > 0, e (tau - 1) below; the gradient at 0 is 0. Output k Q + q is quantile q of y_k.
struct Quantile {
  template <class Real, class V = Wide<Real>>
  static V run(const LossArguments<Real>& a) {
    const int64_t n = a.of_loss.num_quantiles;
    V loss{};
    for (int64_t first = 0; first < a.features; first += kTerms) {
      V sum{};
      for (int64_t f = first; f < std::min(first + kTerms, a.features); ++f) {
        const double tau = a.of_loss.quantiles[f % n];
        const V error = a.expected(f / n) - a.out(f);
        V slope = error < V{} ? broadcast<V>(static_cast<Real>(tau - 1)) : error;  // NaN stays
        slope = error > V{} ? broadcast<V>(static_cast<Real>(tau)) : slope;
        sum = madd(error, slope, sum);
        a.set_gradient(f, -slope);
      }
      loss += sum;
    }
    return loss;
  }
};

struct PoissonNLL {  // e^z - y z, 0 z being 0
  template <class Real, class V = Wide<Real>>
  static V run(const LossArguments<Real>& a) {
    V loss{};
    for (int64_t first = 0; first < a.features; first += kTerms) {
      V sum{};
      for (int64_t f = first; f < std::min(first + kTerms, a.features); ++f) {
        const V z = a.out(f), y = a.expected(f), rate = elementary<Exp>(z);
        sum += y == V{} ? rate : rate - y * z;
        a.set_gradient(f, rate - y);
      }
      loss += sum;
    }
    return loss;
  }
};

// log(sum_c e^(z_c / T)) - sum_c q_c z_c / T, q_c the share that is expected of class c.
struct CrossEntropy {
  template <class Real, class V = Wide<Real>>
  static V run(const LossArguments<Real>& a) {
    const V scale = broadcast<V>(a.of_loss.inverse_temperature), label = load<V>(a.target);
    const V at_label = broadcast<V>(a.of_loss.classes.at_label);
    const V elsewhere = broadcast<V>(a.of_loss.classes.elsewhere);
    V largest = a.out(0);
    for (int64_t c = 1; c < a.features; ++c) largest = at_least(largest, a.out(c));
    V total{}, chosen{}, smoothed{};
    // In blocks, or a long sum of logits of one sign would be rounded all the same way.
    const bool smooth = a.of_loss.classes.elsewhere > 0;
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

// The same with shares q_c that are given (kGiven), or those of a label times the weights of the classes:
// sum_c q_c (log(sum_j e^(z_j / T)) - z_c / T), where a share of 0 leaves its class out, even at -Inf.
template <bool kGiven>
struct WeightedCrossEntropy {
  template <class Real, class V = Wide<Real>>
  static inline __attribute__((always_inline)) V share(const LossArguments<Real>& a, int64_t c) {
    const V elsewhere = broadcast<V>(a.of_loss.classes.elsewhere);
    if (kGiven) return madd(a.expected(c), broadcast<V>(a.of_loss.classes.kept), elsewhere);
    const V at_label = broadcast<V>(a.of_loss.classes.at_label);
    const V label = load<V>(a.target);
    const V q = label == broadcast<V>(static_cast<Real>(c)) ? at_label : elsewhere;
    return q * broadcast<V>(a.of_loss.class_weight[c]);
  }

  template <class Real, class V = Wide<Real>>
  static V run(const LossArguments<Real>& a) {
    const V scale = broadcast<V>(a.of_loss.inverse_temperature);
    V largest = a.out(0);
    for (int64_t c = 1; c < a.features; ++c) largest = at_least(largest, a.out(c));
    V shares{}, expected{}, total{};
    for (int64_t first = 0; first < a.features; first += kTerms) {
      V sum{}, of_shares{}, exponentials{};
      for (int64_t c = first; c < std::min(first + kTerms, a.features); ++c) {
        const V q = share(a, c), z = (a.out(c) - largest) * scale;
        const V e = elementary<ExpNonpositive>(z);
        of_shares += q;
        sum = madd(q == V{} ? V{} : z, q, sum);
        exponentials += e;
        store(a.output + c * a.kStride, e);
      }
      shares += of_shares;
      expected += sum;
      total += exponentials;
    }
    const V inverse = shares / total;
    for (int64_t c = 0; c < a.features; ++c) {
      a.set_gradient(c, madd(a.out(c), inverse, -share(a, c)) * scale);
    }
    return madd(elementary<LogPositive>(total), shares, -expected);
  }
};

// The weighted sum of the losses of one tile, [feature][kPanel] panels of outputs; the gradient
// times scale * weight takes their place.
template <class L, class Real>
double loss_tile(const MemberLoss<Real>& of_loss, Real* output, int64_t features,
                 const Real* target, int64_t target_features, const Real* example_weight,
                 int64_t examples, Real scale) {
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>();
  constexpr int64_t P = kPanelOf<Real>;
  V total{};
  for (int64_t b = 0; b < examples; b += N) {
    const V weight = load<V>(example_weight + b);
    const LossArguments<Real> a{output + b / P * P * features + b % P,
                                target + b / P * P * target_features + b % P,
                                features,
                                weight * broadcast<V>(scale),
                                weight != V{},
                                of_loss};
    const V loss = L::template run<Real>(a);
    total = a.kept ? madd(weight, loss, total) : total;
  }
  double sum = 0;
  for (int i = 0; i < N; ++i) sum += static_cast<double>(total[i]);
  return sum;
}

// `class_weight`: those of the member, scaled, where the call has some.
template <class Real>
double loss_tile(const MLPTrainingCall& call, int64_t member, const Real* class_weight,
                 Real* output, int64_t features, const Real* target, int64_t target_features,
                 const Real* example_weight, int64_t examples, Real scale) {
  const MemberLoss<Real> of_loss(call.of_loss, member, features, class_weight);
  const auto run = [&](auto tile) {
    return tile(of_loss, output, features, target, target_features, example_weight, examples,
                scale);
  };
  switch (call.loss) {
    case Loss::mse: return run(loss_tile<MSE, Real>);
    case Loss::bce: return run(loss_tile<BCE, Real>);
    case Loss::gaussian_nll:
      return of_loss.log_variance_min ? run(loss_tile<BoundedGaussianNLL, Real>)
                                      : run(loss_tile<GaussianNLL, Real>);
    case Loss::cross_entropy:
      return call.of_loss.class_weight ? run(loss_tile<WeightedCrossEntropy<false>, Real>)
                                       : run(loss_tile<CrossEntropy, Real>);
    case Loss::huber: return run(loss_tile<Huber<false>, Real>);
    case Loss::smooth_l1: return run(loss_tile<Huber<true>, Real>);
    case Loss::quantile: return run(loss_tile<Quantile, Real>);
    case Loss::poisson_nll: return run(loss_tile<PoissonNLL, Real>);
    case Loss::soft_cross_entropy: return run(loss_tile<WeightedCrossEntropy<true>, Real>);
    case Loss::none: return 0;
  }
  return 0;
}

}  // namespace pyens::PYENS_ISA::ensemble_mlp
