// The formulas of the activations, a struct each: value(x), and slope(x, h), its derivative where
// h = value(x). Of one number (double on the CPU; float and double on the GPU), and as `vector` and
// `vector_slope` of a float vector of the CPU: polynomials, within 3 ulp of the exact value; for gelu below
// zero within 12 ulp at -5, where e^(-x^2/2) magnifies the rounding of its argument. Every step of those is
// an explicit madd or a single operation, so wide and narrow vectors give the same bits. NaN in, NaN out.
//
// Included once per instruction set by cpu/activations-inl.h, and by cuda/common.cuh.

#define PYENS_SCALAR \
  template <class R> \
  PYENS_HOST_DEVICE static inline

#if defined(PYENS_ISA)
namespace pyens::PYENS_ISA {
#else
namespace pyens {
#endif

struct Relu {  // the CPU has it done where sums are stored
  PYENS_SCALAR R value(R x) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(R) == 4) {  // one instruction, where `x < 0 ? 0 : x` is two
      asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(x));
      return x;
    }
#endif
    return x < R(0) ? R(0) : x;
  }
  PYENS_SCALAR R slope(R x, R /*h*/) { return x <= R(0) ? R(0) : R(1); }
};

struct Gelu {  // x Phi(x) = x/2 erfc(-x/sqrt 2);  Phi(x) + x phi(x)
  PYENS_SCALAR R value(R x) { return R(0.5) * x * std::erfc(-x * R(0.70710678118654752440)); }
  PYENS_SCALAR R slope(R x, R /*h*/) {
    const R density = R(0.39894228040143267794) * std::exp(R(-0.5) * x * x);
    return R(0.5) * std::erfc(-x * R(0.70710678118654752440)) + x * density;
  }
#if defined(PYENS_ISA)
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
  static V vector_slope(V x, V /*h*/) {
    V density;
    const V half = broadcast<V>(0.5f) * tail(x, density);
    const V phi = x > V{} ? broadcast<V>(1.0f) - half : half;
    return madd(x * broadcast<V>(0.398942280f), density, phi);
  }
#endif
};

struct Silu {  // x s, s = 1 / (1 + e^-x);  s (1 + x (1 - s))
  PYENS_SCALAR R value(R x) { return x / (R(1) + std::exp(-x)); }
  PYENS_SCALAR R slope(R x, R /*h*/) {
    const R s = R(1) / (R(1) + std::exp(-x));
    return s * (R(1) + x * (R(1) - s));
  }
#if defined(PYENS_ISA)
  template <class V>
  static V vector(V x) {
    const V one = broadcast<V>(1.0f), e = exp_nonpositive(-absolute(x));
    return x * (x < V{} ? e : one) / (one + e);
  }
  template <class V>
  static V vector_slope(V x, V /*h*/) {
    const V one = broadcast<V>(1.0f), e = exp_nonpositive(-absolute(x)), r = one / (one + e);
    const V s = x < V{} ? e * r : r, rest = x < V{} ? r : e * r;
    return s * madd(x, rest, one);
  }
#endif
};

struct Elu {  // x > 0 ? x : e^x - 1;  x > 0 ? 1 : e^x
  PYENS_SCALAR R value(R x) { return x > R(0) ? x : std::expm1(x); }
  PYENS_SCALAR R slope(R x, R /*h*/) { return x > R(0) ? R(1) : std::exp(x); }
#if defined(PYENS_ISA)
  template <class V>
  static V vector(V x) {
    return x > V{} ? x : expm1_nonpositive(x);
  }
  template <class V>
  static V vector_slope(V x, V h) {
    return x > V{} ? broadcast<V>(1.0f) : h + broadcast<V>(1.0f);
  }
#endif
};

struct Sigmoid {  // 1 / (1 + e^-x)
  PYENS_SCALAR R value(R x) { return R(1) / (R(1) + std::exp(-x)); }
#if defined(PYENS_ISA)
  template <class V>
  static V vector(V x) {
    const V one = broadcast<V>(1.0f), e = exp_nonpositive(-absolute(x));
    return (x < V{} ? e : one) / (one + e);
  }
#endif
};

struct Softplus {  // log(1 + e^x); x itself above 20, as torch has it
  PYENS_SCALAR R value(R x) { return x > R(20) ? x : std::log1p(std::exp(x)); }
  PYENS_SCALAR R slope(R x, R /*h*/) { return x > R(20) ? R(1) : Sigmoid::value(x); }
#if defined(PYENS_ISA)
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
  static V vector_slope(V x, V /*h*/) {
    return x > broadcast<V>(20.0f) ? broadcast<V>(1.0f) : Sigmoid::vector(x);
  }
#endif
};

struct Tanh {  // 1 - h^2
  PYENS_SCALAR R value(R x) { return std::tanh(x); }
  PYENS_SCALAR R slope(R /*x*/, R h) { return R(1) - h * h; }
#if defined(PYENS_ISA)
  template <class V>
  static V vector(V x) {
    // -em / (em + 2), em = e^(-2|x|) - 1
    const V em = expm1_nonpositive(broadcast<V>(-2.0f) * absolute(x));
    return copy_sign(-em / (em + broadcast<V>(2.0f)), x);
  }
  template <class V>
  static V vector_slope(V /*x*/, V h) {
    return (broadcast<V>(1.0f) - h) * (broadcast<V>(1.0f) + h);
  }
#endif
};

struct Mish {  // x t, t = tanh(log(1 + e^x));  t + x s (1 - t^2), s = 1 / (1 + e^-x)
  PYENS_SCALAR R value(R x) { return x * std::tanh(std::log1p(std::exp(x))); }
  PYENS_SCALAR R slope(R x, R /*h*/) {
    const R t = std::tanh(std::log1p(std::exp(x)));
    return t + x * (R(1) - t * t) / (R(1) + std::exp(-x));
  }
#if defined(PYENS_ISA)
  // t = (e^2 + 2e) / (e^2 + 2e + 2) with e = e^x; divided by e^2 above zero, where e is large.
  template <class V>
  static V tangent(V x, V u, V& rest) {  // u = e^-|x|; rest = 1 - t
    const V one = broadcast<V>(1.0f), two = broadcast<V>(2.0f);
    const V above = x < V{} ? u * (u + two) : madd(two, u, one);
    const V difference = x < V{} ? two : two * u * u, r = one / (above + difference);
    rest = difference * r;
    return above * r;
  }
  template <class V>
  static V vector(V x) {
    V rest;
    return x * tangent(x, exp_nonpositive(-absolute(x)), rest);
  }
  template <class V>
  static V vector_slope(V x, V /*h*/) {
    const V one = broadcast<V>(1.0f), u = exp_nonpositive(-absolute(x));
    V rest;
    const V t = tangent(x, u, rest), s = (x < V{} ? u : one) / (one + u);
    return madd(x * s, rest * (one + t), t);
  }
#endif
};

struct Identity {
  PYENS_SCALAR R value(R x) { return x; }
  PYENS_SCALAR R slope(R /*x*/, R /*h*/) { return R(1); }
#if defined(PYENS_ISA)
  template <class V>
  static V vector(V x) {
    return x;
  }
  template <class V>
  static V vector_slope(V /*x*/, V /*h*/) {
    return broadcast<V>(1.0f);
  }
#endif
};

}  // namespace pyens

#undef PYENS_SCALAR
