// The formulas of the activations, a struct each: value(x, a), and slope(x, h, a), its derivative where
// h = value(x, a); a is the activation's parameter, where it has one. Of one number (double on the CPU; float and double on the GPU), and as `vector` and
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

struct Relu {
  PYENS_SCALAR R value(R x, R /*a*/ = R(0)) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(R) == 4) {  // one instruction, where `x < 0 ? 0 : x` is two
      asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(x));
      return x;
    }
#endif
    return x < R(0) ? R(0) : x;
  }
  PYENS_SCALAR R slope(R x, R /*h*/, R /*a*/ = R(0)) { return x <= R(0) ? R(0) : R(1); }
#if defined(PYENS_ISA)
  template <class V>
  static V vector(V x, V /*a*/ = V{}) {
    return at_least(V{}, x);
  }
  template <class V>
  static V vector_slope(V x, V /*h*/, V /*a*/ = V{}) {
    return x <= V{} ? V{} : broadcast<V>(1.0f);
  }
#endif
};

struct Gelu {  // x Phi(x) = x/2 erfc(-x/sqrt 2);  Phi(x) + x phi(x)
  PYENS_SCALAR R value(R x, R /*a*/ = R(0)) {
    return R(0.5) * x * std::erfc(-x * R(0.70710678118654752440));
  }
  PYENS_SCALAR R slope(R x, R /*h*/, R /*a*/ = R(0)) {
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
  static V vector(V x, V /*a*/ = V{}) {
    V density;
    const V size = absolute(x);
    const V negative = broadcast<V>(-0.5f) * size * tail(x, density);  // x Phi(x) for x < 0
    // For +inf that is inf * 0: select by the sign, and let -inf be the NaN that torch gives.
    const V positive = size < broadcast<V>(20.0f) ? x + negative : x;
    return x > V{} ? positive : negative;
  }
  template <class V>
  static V vector_slope(V x, V /*h*/, V /*a*/ = V{}) {
    V density;
    const V half = broadcast<V>(0.5f) * tail(x, density);
    const V phi = x > V{} ? broadcast<V>(1.0f) - half : half;
    return madd(x * broadcast<V>(0.398942280f), density, phi);
  }
#endif
};

struct Silu {  // x s, s = 1 / (1 + e^-x);  s (1 + x (1 - s))
  PYENS_SCALAR R value(R x, R /*a*/ = R(0)) { return x / (R(1) + std::exp(-x)); }
  PYENS_SCALAR R slope(R x, R /*h*/, R /*a*/ = R(0)) {
    const R s = R(1) / (R(1) + std::exp(-x));
    return s * (R(1) + x * (R(1) - s));
  }
#if defined(PYENS_ISA)
  template <class V>
  static V vector(V x, V /*a*/ = V{}) {
    const V one = broadcast<V>(1.0f), e = exp_nonpositive(-absolute(x));
    return x * (x < V{} ? e : one) / (one + e);
  }
  template <class V>
  static V vector_slope(V x, V /*h*/, V /*a*/ = V{}) {
    const V one = broadcast<V>(1.0f), e = exp_nonpositive(-absolute(x)), r = one / (one + e);
    const V s = x < V{} ? e * r : r, rest = x < V{} ? r : e * r;
    return s * madd(x, rest, one);
  }
#endif
};

struct Elu {  // x > 0 ? x : a (e^x - 1);  x > 0 ? 1 : a e^x
  PYENS_SCALAR R value(R x, R a) { return x > R(0) ? x : a * std::expm1(x); }
  PYENS_SCALAR R slope(R x, R /*h*/, R a) { return x > R(0) ? R(1) : a * std::exp(x); }
#if defined(PYENS_ISA)
  template <class V>
  static V vector(V x, V a) {
    return x > V{} ? x : a * expm1_nonpositive(x);
  }
  template <class V>
  static V vector_slope(V x, V h, V a) {
    return x > V{} ? broadcast<V>(1.0f) : h + a;
  }
#endif
};

struct Celu {  // x > 0 ? x : a (e^(x/a) - 1);  x > 0 ? 1 : e^(x/a)
  PYENS_SCALAR R value(R x, R a) { return x > R(0) ? x : a * std::expm1(x / a); }
  PYENS_SCALAR R slope(R x, R /*h*/, R a) { return x > R(0) ? R(1) : std::exp(x / a); }
#if defined(PYENS_ISA)
  template <class V>
  static V vector(V x, V a) {
    return x > V{} ? x : a * expm1_nonpositive(x / a);
  }
  template <class V>
  static V vector_slope(V x, V /*h*/, V a) {
    return x > V{} ? broadcast<V>(1.0f) : exp_nonpositive(x / a);
  }
#endif
};

struct LeakyRelu {  // x > 0 ? x : a x
  PYENS_SCALAR R value(R x, R a) { return x > R(0) ? x : a * x; }
  PYENS_SCALAR R slope(R x, R /*h*/, R a) { return x > R(0) ? R(1) : a; }
#if defined(PYENS_ISA)
  template <class V>
  static V vector(V x, V a) {
    return x > V{} ? x : a * x;
  }
  template <class V>
  static V vector_slope(V x, V /*h*/, V a) {
    return x > V{} ? broadcast<V>(1.0f) : a;
  }
#endif
};

struct Sigmoid {  // s = 1 / (1 + e^-x);  s (1 - s)
  PYENS_SCALAR R value(R x, R /*a*/ = R(0)) { return R(1) / (R(1) + std::exp(-x)); }
  PYENS_SCALAR R slope(R x, R /*h*/, R /*a*/ = R(0)) {
    const R e = std::exp(x < R(0) ? x : -x), r = R(1) / (R(1) + e);  // nothing cancels
    return e * r * r;
  }
#if defined(PYENS_ISA)
  template <class V>
  static V vector(V x, V /*a*/ = V{}) {
    const V one = broadcast<V>(1.0f), e = exp_nonpositive(-absolute(x));
    return (x < V{} ? e : one) / (one + e);
  }
  template <class V>
  static V vector_slope(V x, V /*h*/, V /*a*/ = V{}) {
    const V one = broadcast<V>(1.0f), e = exp_nonpositive(-absolute(x)), r = one / (one + e);
    return e * r * r;
  }
#endif
};

// x s, s = 1 / (1 + e^-v) = (1 + tanh(v / 2)) / 2, v = x c (1 + k x^2), c = 2 sqrt(2/pi), k = 0.044715;
// s + x s (1 - s) v', v' = c (1 + 3 k x^2), which where s (1 - s) is 0 may have overflowed.
struct GeluTanh {
  PYENS_SCALAR R value(R x, R /*a*/ = R(0)) {
    const R v = x * R(1.59576912160573071176) * (R(1) + R(0.044715) * x * x);
    return x / (R(1) + std::exp(-v));
  }
  PYENS_SCALAR R slope(R x, R /*h*/, R /*a*/ = R(0)) {
    const R v = x * R(1.59576912160573071176) * (R(1) + R(0.044715) * x * x);
    const R rise = R(1.59576912160573071176) * (R(1) + R(3 * 0.044715) * x * x);
    const R bell = Sigmoid::slope(v, R(0));
    return Sigmoid::value(v) + (bell == R(0) ? x * bell : x * bell * rise);
  }
#if defined(PYENS_ISA)
  template <class V>
  static V vector(V x, V /*a*/ = V{}) {
    const V one = broadcast<V>(1.0f), scaled = x * broadcast<V>(1.59576912f);
    const V v = scaled * madd(broadcast<V>(0.044715f), x * x, one);
    const V e = exp_nonpositive(-absolute(v));
    return x * (v < V{} ? e : one) / (one + e);
  }
  template <class V>
  static V vector_slope(V x, V /*h*/, V /*a*/ = V{}) {
    const V one = broadcast<V>(1.0f), c = broadcast<V>(1.59576912f), square = x * x;
    const V v = x * c * madd(broadcast<V>(0.044715f), square, one);
    const V rise = c * madd(broadcast<V>(0.134145f), square, one);
    const V e = exp_nonpositive(-absolute(v)), r = one / (one + e), bell = e * r * r;
    const V s = v < V{} ? e * r : r;
    const V by = x * bell;
    return bell == V{} ? s + by : madd(by, rise, s);
  }
#endif
};

// x t, t = tanh(log(1 + e^x));  t + x (1 - t^2) s, s = 1 / (1 + e^-x). With w = e^-|x|:
// t = n / d, n = w (w + 2), d = n + 2 for x <= 0; n = 1 + 2 w, d = n + 2 w^2 for x > 0;
// (1 - t^2) s = 4 q (1 + w) / d^2, q = w or w^2. Nothing cancels.
struct Mish {
  PYENS_SCALAR R value(R x, R /*a*/ = R(0)) { return x * std::tanh(std::log1p(std::exp(x))); }
  PYENS_SCALAR R slope(R x, R /*h*/, R /*a*/ = R(0)) {
    const bool low = x <= R(0);
    const R w = std::exp(low ? x : -x), n = low ? w * (w + R(2)) : R(1) + R(2) * w;
    const R d = low ? n + R(2) : n + R(2) * w * w;
    return n / d + x * (R(4) * (low ? w : w * w) * (R(1) + w) / (d * d));
  }
#if defined(PYENS_ISA)
  template <class V>
  static V vector(V x, V /*a*/ = V{}) {
    const V two = broadcast<V>(2.0f), w = exp_nonpositive(-absolute(x));
    const V low = w * (w + two), high = madd(two, w, broadcast<V>(1.0f));
    const V n = x > V{} ? high : low, d = x > V{} ? madd(two * w, w, high) : low + two;
    return x * n / d;
  }
  template <class V>
  static V vector_slope(V x, V /*h*/, V /*a*/ = V{}) {
    const V one = broadcast<V>(1.0f), two = broadcast<V>(2.0f), w = exp_nonpositive(-absolute(x));
    const V low = w * (w + two), high = madd(two, w, one);
    const V n = x > V{} ? high : low, d = x > V{} ? madd(two * w, w, high) : low + two;
    const V bell = broadcast<V>(4.0f) * (x > V{} ? w * w : w) * (one + w) / (d * d);
    return madd(x, bell, n / d);
  }
#endif
};

struct Hardswish {  // x min(max(x + 3, 0), 6) / 6;  0 up to -3, x/3 + 1/2 below 3, else 1
  PYENS_SCALAR R value(R x, R /*a*/ = R(0)) {
    const R up = x + R(3);
    return x * (up < R(0) ? R(0) : up > R(6) ? R(6) : up) / R(6);
  }
  PYENS_SCALAR R slope(R x, R /*h*/, R /*a*/ = R(0)) {
    return x <= R(-3) ? R(0) : x < R(3) ? x / R(3) + R(0.5) : R(1);
  }
#if defined(PYENS_ISA)
  template <class V>
  static V vector(V x, V /*a*/ = V{}) {
    return x * clamp(x + broadcast<V>(3.0f), 0.0f, 6.0f) / broadcast<V>(6.0f);
  }
  template <class V>
  static V vector_slope(V x, V /*h*/, V /*a*/ = V{}) {
    const V three = broadcast<V>(3.0f), between = x / three + broadcast<V>(0.5f);
    return x <= -three ? V{} : x < three ? between : broadcast<V>(1.0f);
  }
#endif
};

struct Sin {  // sin x;  cos x
#if !defined(PYENS_ISA)
  PYENS_SCALAR R value(R x, R /*a*/ = R(0)) { return sine(x); }  // kernels/cuda/sine.cuh
  PYENS_SCALAR R slope(R x, R /*h*/, R /*a*/ = R(0)) { return cosine(x); }
#else
  PYENS_SCALAR R value(R x, R /*a*/ = R(0)) { return std::sin(x); }
  PYENS_SCALAR R slope(R x, R /*h*/, R /*a*/ = R(0)) { return std::cos(x); }
  // sin(x - n pi), n an integer or halfway between two, for |n| < 2^13: n times the first two parts of pi is
  // exact. On [-pi/2, pi/2] sin r = r + r^3 P(r^2), relative error 6e-9.
  template <class V>
  static V reduced(V x, V n) {
    V r = madd(n, broadcast<V>(-3.140625f), x);
    r = madd(n, broadcast<V>(-0.0009675025939941406f), r);
    r = madd(n, broadcast<V>(-1.5099580252808664e-07f), r);
    r = madd(n, broadcast<V>(3.43024902e-15f), r);
    const V square = r * r;
    V p = broadcast<V>(2.605290895e-06f);
    p = madd(p, square, broadcast<V>(-0.0001980939323f));
    p = madd(p, square, broadcast<V>(0.008333063566f));
    p = madd(p, square, broadcast<V>(-0.1666665945f));
    return madd(r * square, p, r);
  }
  // v where n, which magic was added to, is even; -v where it is odd.
  template <class V>
  static V alternate(V v, V shifted) {
    using Words = Vec<uint32_t, lanes_of<V>()>;
    return (V)((Words)v ^ (Words)shifted << 31);
  }
  // Beyond that, and for NaN, the C library; few networks get there.
  template <class V, class F>
  static V elsewhere(V x, V found, F function) {
    const auto inside = absolute(x) < broadcast<V>(20000.0f);
    bool all = true;
    for (int i = 0; i < lanes_of<V>(); ++i) all &= inside[i] != 0;
    for (int i = 0; !all && i < lanes_of<V>(); ++i) {
      if (!inside[i]) found[i] = static_cast<float>(function(static_cast<double>(x[i])));
    }
    return found;
  }
  template <class V>
  static V vector(V x, V /*a*/ = V{}) {
    const V magic = broadcast<V>(0x1.8p23f);
    const V shifted = madd(x, broadcast<V>(0.318309886f), magic);
    const V found = alternate(reduced(x, shifted - magic), shifted);
    return elsewhere(x, found, [](double one) { return std::sin(one); });
  }
  template <class V>
  static V vector_slope(V x, V /*h*/, V /*a*/ = V{}) {
    const V magic = broadcast<V>(0x1.8p23f), half = broadcast<V>(0.5f);
    const V shifted = madd(x, broadcast<V>(0.318309886f), -half) + magic;
    const V found = -alternate(reduced(x, shifted - magic + half), shifted);
    return elsewhere(x, found, [](double one) { return std::cos(one); });
  }
#endif
};

struct Softplus {  // log(1 + e^x); x itself above 20, as torch has it
  PYENS_SCALAR R value(R x, R /*a*/ = R(0)) { return x > R(20) ? x : std::log1p(std::exp(x)); }
  PYENS_SCALAR R slope(R x, R /*h*/, R /*a*/ = R(0)) {
    return x > R(20) ? R(1) : Sigmoid::value(x);
  }
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
  static V vector(V x, V /*a*/ = V{}) {
    return x > broadcast<V>(20.0f) ? x : at_least(V{}, x) + excess(x);
  }
  template <class V>
  static V vector_slope(V x, V /*h*/, V /*a*/ = V{}) {
    return x > broadcast<V>(20.0f) ? broadcast<V>(1.0f) : Sigmoid::vector(x);
  }
#endif
};

struct Tanh {  // 1 - h^2
  PYENS_SCALAR R value(R x, R /*a*/ = R(0)) { return std::tanh(x); }
  PYENS_SCALAR R slope(R /*x*/, R h, R /*a*/ = R(0)) { return R(1) - h * h; }
#if defined(PYENS_ISA)
  template <class V>
  static V vector(V x, V /*a*/ = V{}) {
    // -em / (em + 2), em = e^(-2|x|) - 1
    const V em = expm1_nonpositive(broadcast<V>(-2.0f) * absolute(x));
    return copy_sign(-em / (em + broadcast<V>(2.0f)), x);
  }
  template <class V>
  static V vector_slope(V /*x*/, V h, V /*a*/ = V{}) {
    return (broadcast<V>(1.0f) - h) * (broadcast<V>(1.0f) + h);
  }
#endif
};

struct Identity {
  PYENS_SCALAR R value(R x, R /*a*/ = R(0)) { return x; }
  PYENS_SCALAR R slope(R /*x*/, R /*h*/, R /*a*/ = R(0)) { return R(1); }
#if defined(PYENS_ISA)
  template <class V>
  static V vector(V x, V /*a*/ = V{}) {
    return x;
  }
  template <class V>
  static V vector_slope(V /*x*/, V /*h*/, V /*a*/ = V{}) {
    return broadcast<V>(1.0f);
  }
#endif
};

}  // namespace pyens

#undef PYENS_SCALAR
