// exp, log and bit tricks on float vectors of one instruction set: polynomials, of which every step is an
// explicit madd or a single operation, so wide and narrow vectors give the same bits.

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

// The same of doubles, in any number of lanes; relative errors below 3e-16.

// e^x for x <= 0, 0 below -708 where it is subnormal. NaN stays.
template <class V>
inline __attribute__((always_inline)) V exp_of_doubles(V x) {
  using Words = Vec<uint64_t, lanes_of<V>()>;
  const V low = broadcast<V>(-708.0);
  const V inside = x < low ? low : x;
  const V magic = broadcast<V>(0x1.8p52);  // as in split_exponent
  const V shifted = madd(inside, broadcast<V>(1.4426950408889634), magic), n = shifted - magic;
  V r = madd(n, broadcast<V>(-0.6931471803691238), inside);
  r = madd(n, broadcast<V>(-1.9082149292705877e-10), r);
  // e^r = 1 + r + r^2 P(r) for |r| <= ln(2)/2
  V p = broadcast<V>(2.51003758422237e-08);
  p = madd(p, r, broadcast<V>(2.7620075892548164e-07));
  p = madd(p, r, broadcast<V>(2.7557268480289716e-06));
  p = madd(p, r, broadcast<V>(2.480152132234228e-05));
  p = madd(p, r, broadcast<V>(0.00019841269863040559));
  p = madd(p, r, broadcast<V>(0.0013888888917196736));
  p = madd(p, r, broadcast<V>(0.008333333333330065));
  p = madd(p, r, broadcast<V>(0.041666666666624164));
  p = madd(p, r, broadcast<V>(0.16666666666666669));
  p = madd(p, r, broadcast<V>(0.5));
  p = madd(p, r * r, r);
  const V scale = (V)(((Words)shifted + 1023u) << 52);  // 2^n
  const V e = madd(p, scale, scale);
  return x < low ? V{} : e;
}

// log x for normal x > 0 (and NaN, which stays); any number for any other x.
template <class V>
inline __attribute__((always_inline)) V log_of_doubles(V x) {
  using Words = Vec<uint64_t, lanes_of<V>()>;
  // As log_positive. The exponent is at most 11 bits and a sign: added to those of 1.5 * 2^52, it is a
  // number without a conversion, which AVX2 lacks.
  const Words above = (Words)x - 0x3fe6a09e667f3bcdu, high = above & 0xfff0000000000000u;
  const V magic = broadcast<V>(0x1.8p52);
  const Words biased = ((above >> 52) ^ 0x800u) - 0x800u;
  const V exponent = (V)((Words)magic + biased) - magic;
  const V f = (V)((Words)x - high) - broadcast<V>(1.0);
  const V s = f / (broadcast<V>(2.0) + f), q = s * s;
  V p = broadcast<V>(0.14616721179861816);
  p = madd(p, q, broadcast<V>(0.15331699633543858));
  p = madd(p, q, broadcast<V>(0.18182889786191042));
  p = madd(p, q, broadcast<V>(0.2222221112572281));
  p = madd(p, q, broadcast<V>(0.28571428626031065));
  p = madd(p, q, broadcast<V>(0.3999999999989938));
  p = madd(p, q, broadcast<V>(0.666666666666667));
  const V h = broadcast<V>(0.5) * f * f;
  const V low = madd(s, madd(p, q, h), exponent * broadcast<V>(1.9082149292705877e-10));
  const V log = madd(exponent, broadcast<V>(0.6931471803691238), f - (h - low));
  return x != x ? x : log;
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

}  // namespace pyens::PYENS_ISA
