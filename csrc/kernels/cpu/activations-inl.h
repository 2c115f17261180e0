// The hidden activations over rows of numbers, in the vectors of one instruction set.
//
// float: polynomials, within 3 ulp of the exact value; for gelu below zero within 12 ulp at -5, where
// e^(-x^2/2) magnifies the rounding of its argument. double: the C library, lane by lane. Every step
// is an explicit madd or a single operation, so wide and narrow vectors give the same bits. NaN in,
// NaN out.

#include "kernels/cpu/simd-inl.h"

namespace pyens::PYENS_ISA {

// e^r = 1 + r + r^2 P(r) for |r| <= ln(2)/2, relative error 3e-9.
template <class V>
inline V exp_polynomial(V r) {
  V p = broadcast<V>(0.001381446203f);
  p = madd(p, r, broadcast<V>(0.008368780883f));
  p = madd(p, r, broadcast<V>(0.04166839432f));
  p = madd(p, r, broadcast<V>(0.166665201f));
  p = madd(p, r, broadcast<V>(0.4999999341f));
  return madd(p, r * r, r);  // e^r - 1
}

// x = n ln(2) + r. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
template <class V>
inline V split_exponent(V x, V& r) {
  const V magic = broadcast<V>(0x1.8p23f);
  const V n = madd(x, broadcast<V>(1.44269504f), magic) - magic;
  r = madd(n, broadcast<V>(-0.693145751953125f), x);
  r = madd(n, broadcast<V>(-1.42860677e-6f), r);
  return n;
}

// 2^n for integral n in [-126, 127].
template <class V>
inline V exp2_integer(V n) {
  using Words = Vec<uint32_t, lanes_of<V>()>;
  return (V)(((Words)(n + broadcast<V>(0x1.8p23f + 127.0f))) << 23);
}

template <class V>
inline V clamp(V x, float low, float high) {  // NaN stays
  const V lo = broadcast<V>(low), hi = broadcast<V>(high);
  x = x < lo ? lo : x;
  return x > hi ? hi : x;
}

// e^x for x <= 0 (the only arguments needed here); 0 below -104.
template <class V>
inline V exp_nonpositive(V x) {
  x = clamp(x, -110.0f, 0.0f);
  V r;
  const V n = split_exponent(x, r);
  // In two factors, so that results down to the smallest subnormal come out.
  const V half = madd(n, broadcast<V>(0.5f), broadcast<V>(0x1.8p23f)) - broadcast<V>(0x1.8p23f);
  const V a = exp2_integer(half), b = exp2_integer(n - half);
  return madd(exp_polynomial(r), a, a) * b;
}

// e^x - 1 for x <= 0, without the cancellation near 0.
template <class V>
inline V expm1_nonpositive(V x) {
  x = clamp(x, -20.0f, 0.0f);  // -1 below that
  V r;
  const V n = split_exponent(x, r);
  const V scale = exp2_integer(n);
  return madd(exp_polynomial(r), scale, scale - broadcast<V>(1.0f));
}

// log x for normal x > 0, within 1 ulp; any number for any other x.
template <class V>
inline V log_positive(V x) {
  using Ints = Vec<int32_t, lanes_of<V>()>;
  using Words = Vec<uint32_t, lanes_of<V>()>;
  // x = 2^e m with m in [sqrt(1/2), sqrt(2)); as in Softplus, log(1 + f) = f - (h - s (h + q Q(q))).
  const Words above = (Words)x - 0x3f3504f3u;
  const V exponent = __builtin_convertvector((Ints)above >> 23, V);
  const V f = (V)((Words)x - (above & 0xff800000u)) - broadcast<V>(1.0f);
  const V s = f / (broadcast<V>(2.0f) + f), q = s * s;
  V p = broadcast<V>(0.29878795f);
  p = madd(p, q, broadcast<V>(0.39977252f));
  p = madd(p, q, broadcast<V>(0.6666678f));
  const V h = broadcast<V>(0.5f) * f * f;
  const V low = madd(s, madd(p, q, h), exponent * broadcast<V>(1.42860677e-6f));
  return madd(exponent, broadcast<V>(0.693145751953125f), f - (h - low));
}

template <class V>
inline V absolute(V x) {
  using Words = Vec<uint32_t, lanes_of<V>()>;
  return (V)((Words)x & 0x7fffffffu);
}
template <class V>
inline V copy_sign(V magnitude, V sign) {
  using Words = Vec<uint32_t, lanes_of<V>()>;
  return (V)((Words)magnitude | ((Words)sign & 0x80000000u));
}

struct Gelu {  // x Phi(x) = x/2 erfc(-x/sqrt 2)
  static double scalar(double x) { return 0.5 * x * std::erfc(-x * 0.70710678118654752440); }
  template <class V>
  static V vector(V x) {
    // erfc(z) = e^(-z^2) t R(t) with t = 1/(1 + 0.35 z), z = |x|/sqrt 2: relative error 8e-9.
    const V size = absolute(x), one = broadcast<V>(1.0f);
    const V t = one / madd(broadcast<V>(0.35f * 0.707106781f), size, one);
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
    const V erfc = exp_nonpositive(broadcast<V>(-0.5f) * x * x) * (p * t);
    const V tail = broadcast<V>(-0.5f) * size * erfc;  // x Phi(x) for x < 0
    // For +inf the tail is inf * 0: select by the sign, and let -inf be the NaN that torch gives.
    const V positive = size < broadcast<V>(20.0f) ? x + tail : x;
    return x > V{} ? positive : tail;
  }
};

struct Silu {  // x / (1 + e^-x)
  static double scalar(double x) { return x / (1.0 + std::exp(-x)); }
  template <class V>
  static V vector(V x) {
    const V one = broadcast<V>(1.0f), e = exp_nonpositive(-absolute(x));
    return x * (x < V{} ? e : one) / (one + e);
  }
};

struct Elu {  // x > 0 ? x : e^x - 1
  static double scalar(double x) { return x > 0 ? x : std::expm1(x); }
  template <class V>
  static V vector(V x) {
    return x > V{} ? x : expm1_nonpositive(x);
  }
};

struct Softplus {  // log(1 + e^x); x itself above 20, as torch has it
  static double scalar(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }
  template <class V>
  static V vector(V x) {
    // max(x, 0) + log1p(u), u = e^-|x|. With s = u / (2 + u) <= 1/3 and h = u^2 / 2,
    // log1p(u) = 2 atanh(s) = 2s + s q Q(q) = u - (h - s (h + q Q)), which leads with u itself.
    const V u = exp_nonpositive(-absolute(x));
    const V s = u / (broadcast<V>(2.0f) + u), q = s * s;
    V p = broadcast<V>(0.2430094393f);
    p = madd(p, q, broadcast<V>(0.2142765502f));
    p = madd(p, q, broadcast<V>(0.286168851f));
    p = madd(p, q, broadcast<V>(0.3999887773f));
    p = madd(p, q, broadcast<V>(0.6666667562f));
    const V h = broadcast<V>(0.5f) * u * u;
    const V log1p = u - (h - s * madd(p, q, h));
    return x > broadcast<V>(20.0f) ? x : at_least(V{}, x) + log1p;
  }
};

struct Tanh {
  static double scalar(double x) { return std::tanh(x); }
  template <class V>
  static V vector(V x) {
    // -em / (em + 2), em = e^(-2|x|) - 1
    const V em = expm1_nonpositive(broadcast<V>(-2.0f) * absolute(x));
    return copy_sign(-em / (em + broadcast<V>(2.0f)), x);
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
inline void activate(Activation activation, Real* rows, int64_t n) {
  switch (activation) {
    case Activation::gelu: return apply_rows<Gelu, Real, V>(rows, n);
    case Activation::silu: return apply_rows<Silu, Real, V>(rows, n);
    case Activation::elu: return apply_rows<Elu, Real, V>(rows, n);
    case Activation::softplus: return apply_rows<Softplus, Real, V>(rows, n);
    case Activation::tanh: return apply_rows<Tanh, Real, V>(rows, n);
    case Activation::relu:
    case Activation::identity: return;
  }
}

}  // namespace pyens::PYENS_ISA
