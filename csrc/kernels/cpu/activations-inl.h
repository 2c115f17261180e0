// The hidden activations over rows of numbers, in the vectors of one instruction set.
//
// float: polynomials, within 3 ulp of the exact value; for gelu below zero within 12 ulp at -5, where
// e^(-x^2/2) magnifies the rounding of its argument. double: the C library, lane by lane. Every step
// is an explicit madd or a single operation, so wide and narrow vectors give the same bits. NaN in,
// NaN out.

namespace pyens::PYENS_ISA {

// Each activation: value(x), and gradient(x, h) with h = value(x); `vector` and `scalar` of each.

struct Gelu {  // x Phi(x) = x/2 erfc(-x/sqrt 2);  Phi(x) + x phi(x)
  static double scalar(double x) { return 0.5 * x * std::erfc(-x * 0.70710678118654752440); }
  static double scalar_gradient(double x, double /*h*/) {
    const double density = 0.39894228040143267794 * std::exp(-0.5 * x * x);
    return 0.5 * std::erfc(-x * 0.70710678118654752440) + x * density;
  }
  // erfc(|x|/sqrt 2) and e^(-x^2/2).
  template <class V>
  static V tail(V x, V& density) {
    // erfc(z) = e^(-z^2) t R(t) with t = 1/(1 + 0.35 z), z = |x|/sqrt 2: relative error 8e-9.
    const V one = broadcast<V>(1.0f);
    const V t = one / madd(broadcast<V>(0.35f * 0.707106781f), absolute(x), one);
    V p = broadcast<V>(0.03908269589f);
    p = madd(p, t, broadcast<V>(-0.1627356881f));
    p = madd(p, t, broadcast<V>(0.1906948132f));
    p = madd(p, t, broadcast<V>(-0.04044421358f));
    p = madd(p, t, broadcast<V>(0.09801607125f));
    p = madd(p, t, broadcast<V>(0.1398923504f));
    p = madd(p, t, broadcast<V>(0.1534098505f));
    p = madd(p, t, broadcast<V>(0.1874019261f));
    p = madd(p, t, broadcast<V>(0.1972018855f));
    p = madd(p, t, broadcast<V>(0.1974803165f));
    density = exp_nonpositive(broadcast<V>(-0.5f) * x * x);
    return density * (p * t);
  }
  template <class V>
  static V vector(V x) {
    V density;
    const V size = absolute(x);
    const V negative = broadcast<V>(-0.5f) * size * tail(x, density);  // x Phi(x) for x < 0
    // For +inf that is inf * 0: select by the sign, and let -inf be the NaN that torch gives.
    const V positive = size < broadcast<V>(20.0f) ? x + negative : x;
    return x > V{} ? positive : negative;
  }
  template <class V>
  static V vector_gradient(V x, V /*h*/) {
    V density;
    const V half = broadcast<V>(0.5f) * tail(x, density);
    const V phi = x > V{} ? broadcast<V>(1.0f) - half : half;
    return madd(x * broadcast<V>(0.398942280f), density, phi);
  }
};

struct Silu {  // x s, s = 1 / (1 + e^-x);  s (1 + x (1 - s))
  static double scalar(double x) { return x / (1.0 + std::exp(-x)); }
  static double scalar_gradient(double x, double /*h*/) {
    const double s = 1.0 / (1.0 + std::exp(-x));
    return s * (1.0 + x * (1.0 - s));
  }
  template <class V>
  static V vector(V x) {
    const V one = broadcast<V>(1.0f), e = exp_nonpositive(-absolute(x));
    return x * (x < V{} ? e : one) / (one + e);
  }
  template <class V>
  static V vector_gradient(V x, V /*h*/) {
    const V one = broadcast<V>(1.0f), e = exp_nonpositive(-absolute(x)), r = one / (one + e);
    const V s = x < V{} ? e * r : r, rest = x < V{} ? r : e * r;
    return s * madd(x, rest, one);
  }
};

struct Elu {  // x > 0 ? x : e^x - 1;  x > 0 ? 1 : e^x
  static double scalar(double x) { return x > 0 ? x : std::expm1(x); }
  static double scalar_gradient(double x, double /*h*/) { return x > 0 ? 1 : std::exp(x); }
  template <class V>
  static V vector(V x) {
    return x > V{} ? x : expm1_nonpositive(x);
  }
  template <class V>
  static V vector_gradient(V x, V h) {
    return x > V{} ? broadcast<V>(1.0f) : h + broadcast<V>(1.0f);
  }
};

struct Sigmoid {  // 1 / (1 + e^-x)
  static double scalar(double x) { return 1.0 / (1.0 + std::exp(-x)); }
  template <class V>
  static V vector(V x) {
    const V one = broadcast<V>(1.0f), e = exp_nonpositive(-absolute(x));
    return (x < V{} ? e : one) / (one + e);
  }
};

struct Softplus {  // log(1 + e^x); x itself above 20, as torch has it
  static double scalar(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }
  static double scalar_gradient(double x, double /*h*/) { return x > 20 ? 1 : Sigmoid::scalar(x); }
  // log(1 + e^-|x|). With u = e^-|x|, s = u / (2 + u) <= 1/3 and h = u^2 / 2,
  // log1p(u) = 2 atanh(s) = 2s + s q Q(q) = u - (h - s (h + q Q)), which leads with u itself.
  template <class V>
  static V excess(V x) {
    const V u = exp_nonpositive(-absolute(x));
    const V s = u / (broadcast<V>(2.0f) + u), q = s * s;
    V p = broadcast<V>(0.2430094393f);
    p = madd(p, q, broadcast<V>(0.2142765502f));
    p = madd(p, q, broadcast<V>(0.286168851f));
    p = madd(p, q, broadcast<V>(0.3999887773f));
    p = madd(p, q, broadcast<V>(0.6666667562f));
    const V h = broadcast<V>(0.5f) * u * u;
    return u - (h - s * madd(p, q, h));
  }
  template <class V>
  static V vector(V x) {
    return x > broadcast<V>(20.0f) ? x : at_least(V{}, x) + excess(x);
  }
  template <class V>
  static V vector_gradient(V x, V /*h*/) {
    return x > broadcast<V>(20.0f) ? broadcast<V>(1.0f) : Sigmoid::vector(x);
  }
};

struct Tanh {  // 1 - h^2
  static double scalar(double x) { return std::tanh(x); }
  static double scalar_gradient(double /*x*/, double h) { return 1 - h * h; }
  template <class V>
  static V vector(V x) {
    // -em / (em + 2), em = e^(-2|x|) - 1
    const V em = expm1_nonpositive(broadcast<V>(-2.0f) * absolute(x));
    return copy_sign(-em / (em + broadcast<V>(2.0f)), x);
  }
  template <class V>
  static V vector_gradient(V /*x*/, V h) {
    return (broadcast<V>(1.0f) - h) * (broadcast<V>(1.0f) + h);
  }
};

struct Identity {
  static double scalar(double x) { return x; }
  static double scalar_gradient(double /*x*/, double /*h*/) { return 1; }
  template <class V>
  static V vector(V x) {
    return x;
  }
  template <class V>
  static V vector_gradient(V /*x*/, V /*h*/) {
    return broadcast<V>(1.0f);
  }
};

template <class F, class Real, class V>
inline void apply_rows(Real* rows, int64_t n) {
  for (int64_t i = 0; i < n; i += lanes_of<V>()) {
    V v = load<V>(rows + i);
    if constexpr (std::is_same_v<Real, float>) {
      v = F::template vector<V>(v);
    } else {
      for (int lane = 0; lane < lanes_of<V>(); ++lane) v[lane] = F::scalar(v[lane]);
    }
    store(rows + i, v);
  }
}

// rows[i] <- act(rows[i]), i < n; n is a multiple of V's lanes. relu and identity are done by the
// caller.
template <class V, class Real>
inline void activate(ActivationKind activation, Real* rows, int64_t n) {
  switch (activation) {
    case ActivationKind::gelu: return apply_rows<Gelu, Real, V>(rows, n);
    case ActivationKind::silu: return apply_rows<Silu, Real, V>(rows, n);
    case ActivationKind::elu: return apply_rows<Elu, Real, V>(rows, n);
    case ActivationKind::softplus: return apply_rows<Softplus, Real, V>(rows, n);
    case ActivationKind::tanh: return apply_rows<Tanh, Real, V>(rows, n);
    case ActivationKind::relu:
    case ActivationKind::identity: return;
  }
}

// rows[i] <- act(rows[i]) and gradient[i] <- act'(rows[i]), likewise.
template <class F, class Real, class V>
inline void apply_rows_with_gradient(Real* rows, Real* gradient, int64_t n) {
  for (int64_t i = 0; i < n; i += lanes_of<V>()) {
    const V x = load<V>(rows + i);
    V h = x, d{};
    if constexpr (std::is_same_v<Real, float>) {
      h = F::template vector<V>(x);
      d = F::template vector_gradient<V>(x, h);
    } else {
      for (int lane = 0; lane < lanes_of<V>(); ++lane) {
        h[lane] = F::scalar(x[lane]);
        d[lane] = F::scalar_gradient(x[lane], h[lane]);
      }
    }
    store(rows + i, h);
    store(gradient + i, d);
  }
}
template <class V, class Real>
inline void activate_with_gradient(ActivationKind activation, Real* rows, Real* gradient,
                                   int64_t n) {
  switch (activation) {
    case ActivationKind::gelu: return apply_rows_with_gradient<Gelu, Real, V>(rows, gradient, n);
    case ActivationKind::silu: return apply_rows_with_gradient<Silu, Real, V>(rows, gradient, n);
    case ActivationKind::elu: return apply_rows_with_gradient<Elu, Real, V>(rows, gradient, n);
    case ActivationKind::softplus:
      return apply_rows_with_gradient<Softplus, Real, V>(rows, gradient, n);
    case ActivationKind::tanh: return apply_rows_with_gradient<Tanh, Real, V>(rows, gradient, n);
    case ActivationKind::identity:
      return apply_rows_with_gradient<Identity, Real, V>(rows, gradient, n);
    case ActivationKind::relu: return;
  }
}

}  // namespace pyens::PYENS_ISA
