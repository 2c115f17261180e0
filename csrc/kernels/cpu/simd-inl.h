// Vectors of one instruction set: loads and stores that convert, fused multiply-add, transposition.
//
// Included once per instruction set by a kernel source (see foreach_isa.h). The types are the
// compiler's own vector extensions, so + - * / < and ?: work on them and `base` builds on any
// processor.

namespace pyens::PYENS_ISA {

template <class T, int N>
struct VecOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vec = typename VecOf<T, N>::type;

// Wide vectors carry examples, narrow ones neurons (a small layer fills 8 lanes better than 16).
#if PYENS_HAS(AVX512)
template <class T>
constexpr int kWideLanes = 64 / sizeof(T);
template <class T>
constexpr int kNarrowLanes = 32 / sizeof(T);
#elif PYENS_HAS(AVX2)
template <class T>
constexpr int kWideLanes = 32 / sizeof(T);
template <class T>
constexpr int kNarrowLanes = 32 / sizeof(T);
#else
template <class T>
constexpr int kWideLanes = 16 / sizeof(T);
template <class T>
constexpr int kNarrowLanes = 16 / sizeof(T);
#endif
template <class T>
using Wide = Vec<T, kWideLanes<T>>;
template <class T>
using Narrow = Vec<T, kNarrowLanes<T>>;

template <class V>
constexpr int lanes_of() {
  return sizeof(V) / sizeof(V{}[0]);
}

template <class V, class T>
inline __attribute__((always_inline)) V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
inline __attribute__((always_inline)) void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
template <class V, class T>
inline __attribute__((always_inline)) V broadcast(T x) {
  return x - V{};  // x in every lane; x - 0 is x for every x, -0 and NaN too
}

// a * b + c, rounded once where the instruction set can.
template <class V>
inline __attribute__((always_inline)) V madd(V a, V b, V c) {
  return a * b + c;
}
#if defined(__aarch64__)
inline __attribute__((always_inline)) Vec<float, 4> madd(Vec<float, 4> a, Vec<float, 4> b,
                                                         Vec<float, 4> c) {
  return (Vec<float, 4>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline __attribute__((always_inline)) Vec<double, 2> madd(Vec<double, 2> a, Vec<double, 2> b,
                                                          Vec<double, 2> c) {
  return (Vec<double, 2>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#endif
#if defined(__aarch64__) || PYENS_HAS(AVX2)
inline __attribute__((always_inline)) float madd(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
inline __attribute__((always_inline)) double madd(double a, double b, double c) {
  return __builtin_fma(a, b, c);
}
#endif
#if PYENS_HAS(AVX2)
inline __attribute__((always_inline)) Vec<float, 8> madd(Vec<float, 8> a, Vec<float, 8> b,
                                                         Vec<float, 8> c) {
  return (Vec<float, 8>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline __attribute__((always_inline)) Vec<double, 4> madd(Vec<double, 4> a, Vec<double, 4> b,
                                                          Vec<double, 4> c) {
  return (Vec<double, 4>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#endif
#if PYENS_HAS(AVX512)
inline __attribute__((always_inline)) Vec<float, 16> madd(Vec<float, 16> a, Vec<float, 16> b,
                                                          Vec<float, 16> c) {
  return (Vec<float, 16>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline __attribute__((always_inline)) Vec<double, 8> madd(Vec<double, 8> a, Vec<double, 8> b,
                                                          Vec<double, 8> c) {
  return (Vec<double, 8>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#endif
#if PYENS_HAS(AVX512_BF16)
// Lane i: c + a[2i] b[2i] + a[2i+1] b[2i+1] of bfloat16 pairs, which travel in float lanes.
inline __attribute__((always_inline)) Vec<float, 8> madd_pairs(Vec<float, 8> a, Vec<float, 8> b,
                                                               Vec<float, 8> c) {
  return (Vec<float, 8>)_mm256_dpbf16_ps((__m256)c, (__m256bh)a, (__m256bh)b);
}
inline __attribute__((always_inline)) Vec<float, 16> madd_pairs(Vec<float, 16> a, Vec<float, 16> b,
                                                                Vec<float, 16> c) {
  return (Vec<float, 16>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
// Lanes rounded to bfloat16 as that product would read them: to nearest, ties to even, NaN quiet; subnormals
// become 0. Neighbours are a pair: those of low, then those of high.
inline __attribute__((always_inline)) Vec<float, 16> pair_neighbours(Vec<float, 16> low,
                                                                     Vec<float, 16> high) {
  return (Vec<float, 16>)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
// The same with lane i of low and lane i of high for pair i.
inline __attribute__((always_inline)) Vec<float, 16> pair_lanes(Vec<float, 16> low,
                                                                Vec<float, 16> high) {
  Vec<uint16_t, 32> order;
#pragma GCC unroll 32
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  return (Vec<float, 16>)_mm512_permutexvar_epi16((__m512i)order,
                                                  (__m512i)pair_neighbours(low, high));
}
inline __attribute__((always_inline)) Vec<uint16_t, 8> to_bfloat16(Vec<float, 8> v) {
  return (Vec<uint16_t, 8>)_mm256_cvtneps_pbh((__m256)v);
}
#endif

// The larger one; a NaN in v stays (as torch.relu keeps it), which max(v, floor) would not promise.
template <class V>
inline __attribute__((always_inline)) V at_least(V floor, V v) {
  return v < floor ? floor : v;
}

// --- conversions ---------------------------------------------------------------------------------

template <class T, int N>
inline __attribute__((always_inline)) Vec<float, N> widen(Vec<uint16_t, N> bits, T*) {
  using Words = Vec<uint32_t, N>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    return (Vec<float, N>)(__builtin_convertvector(bits, Words) << 16);
  } else {
#if PYENS_HAS(AVX2)
    if constexpr (N == 8) return (Vec<float, N>)_mm256_cvtph_ps((__m128i)bits);
#endif
    // Shift the exponent into place; the multiplication rebiases it and makes subnormals right.
    const Words h = __builtin_convertvector(bits, Words);
    const Words sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
    const Vec<float, N> scaled = (Vec<float, N>)magnitude * 0x1p112f;
    const Words special = magnitude | 0x7f800000u;
    const Words finite = (Words)scaled;
    return (Vec<float, N>)(sign | ((h & 0x7fffu) >= 0x7c00u ? special : finite));
  }
}

// The bits of v with the upper half rounded to bfloat16: to nearest, ties to even; NaN stays NaN.
template <class V>
inline __attribute__((always_inline)) auto round_bfloat16(V v) {
  using Words = Vec<uint32_t, lanes_of<V>()>;
  const Words bits = (Words)v;
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Words quiet = bits | 0x400000u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
}

template <class T, int N>
inline __attribute__((always_inline)) Vec<uint16_t, N> narrow(Vec<float, N> v, T*) {
  using Words = Vec<uint32_t, N>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __builtin_convertvector(round_bfloat16(v) >> 16, Vec<uint16_t, N>);
  } else {
#if PYENS_HAS(AVX2)
    if constexpr (N == 8) {
      return (Vec<uint16_t, N>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    }
#endif
    const Words bits = (Words)v, magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
    // Subnormal halves: let the float adder do the rounding at the right place.
    const Words subnormal = (Words)((Vec<float, N>)magnitude + 0.5f) - 0x3f000000u;
    const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Words overflow = Words{} + 0x7c00u;
    const Words nan = Words{} + 0x7e00u;
    Words half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? overflow : half;
    half = magnitude > 0x7f800000u ? nan : half;
    return __builtin_convertvector(sign | half, Vec<uint16_t, N>);
  }
}

template <class T>
inline float to_float(T x) {
  constexpr int N = kNarrowLanes<float>;
  return widen<T, N>(Vec<uint16_t, N>{} + x.bits, static_cast<T*>(nullptr))[0];
}
inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }

// The first n elements at p as a narrow vector of Real, zeros behind them; reads nothing beyond.
template <class Real, class T>
inline __attribute__((always_inline)) Narrow<Real> load_first(const T* p, int64_t n) {
  constexpr int N = kNarrowLanes<Real>;
  if constexpr (std::is_same_v<Real, T>) {
    if (n >= N) return load<Narrow<Real>>(p);
#if PYENS_HAS(AVX2)
    if constexpr (std::is_same_v<T, float>) {
      const auto mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                                           _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
      return (Narrow<Real>)_mm256_maskload_ps(p, mask);
    }
#endif
    Narrow<Real> v{};
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
  } else {
    Vec<uint16_t, N> bits{};
    if (n >= N) {
      bits = load<Vec<uint16_t, N>>(p);
    } else {
      for (int i = 0; i < n; ++i) bits[i] = p[i].bits;
    }
    return widen<T, N>(bits, static_cast<T*>(nullptr));
  }
}

// The first n lanes of v to p, as T.
template <class Real, class T>
inline __attribute__((always_inline)) void store_first(T* p, Narrow<Real> v, int64_t n) {
  constexpr int N = kNarrowLanes<Real>;
  if constexpr (std::is_same_v<Real, T>) {
    if (n >= N) return store(p, v);
#if PYENS_HAS(AVX2)
    if constexpr (std::is_same_v<T, float>) {
      const auto mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                                           _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
      return _mm256_maskstore_ps(p, mask, (__m256)v);
    }
#endif
    for (int i = 0; i < n; ++i) p[i] = v[i];
  } else {
    const Vec<uint16_t, N> bits = narrow<T, N>(v, static_cast<T*>(nullptr));
    if (n >= N) return store(p, bits);
    for (int i = 0; i < n; ++i) p[i].bits = bits[i];
  }
}

// --- transposition -------------------------------------------------------------------------------

#if defined(__clang__) || __GNUC__ >= 12
#define PYENS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PYENS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a < b){__VA_ARGS__})
#endif

// Within each half of 4 lanes: r[i][j] <-> r[j][i] of the four vectors at r.
template <class V>
inline __attribute__((always_inline)) void transpose_halves(V* r) {
  static_assert(lanes_of<V>() == 8);
  const V a = PYENS_SHUFFLE(r[0], r[1], 0, 8, 1, 9, 4, 12, 5, 13);
  const V b = PYENS_SHUFFLE(r[0], r[1], 2, 10, 3, 11, 6, 14, 7, 15);
  const V c = PYENS_SHUFFLE(r[2], r[3], 0, 8, 1, 9, 4, 12, 5, 13);
  const V d = PYENS_SHUFFLE(r[2], r[3], 2, 10, 3, 11, 6, 14, 7, 15);
  r[0] = PYENS_SHUFFLE(a, c, 0, 1, 8, 9, 4, 5, 12, 13);
  r[1] = PYENS_SHUFFLE(a, c, 2, 3, 10, 11, 6, 7, 14, 15);
  r[2] = PYENS_SHUFFLE(b, d, 0, 1, 8, 9, 4, 5, 12, 13);
  r[3] = PYENS_SHUFFLE(b, d, 2, 3, 10, 11, 6, 7, 14, 15);
}

// r[i][j] <-> r[j][i], in registers: 3 x 8 shuffles for 8 x 8, all of them single instructions.
template <class V>
inline __attribute__((always_inline)) void transpose(V (&r)[8]) {
  transpose_halves(r);
  transpose_halves(r + 4);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const V low = r[i], high = r[i + 4];
    r[i] = PYENS_SHUFFLE(low, high, 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = PYENS_SHUFFLE(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
  }
}
template <class V>
inline __attribute__((always_inline)) void transpose(V (&r)[4]) {
  static_assert(lanes_of<V>() == 4);
  V s[4];
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    s[i] = PYENS_SHUFFLE(r[i], r[i + 1], 0, 4, 2, 6);
    s[i + 1] = PYENS_SHUFFLE(r[i], r[i + 1], 1, 5, 3, 7);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[i] = PYENS_SHUFFLE(s[i], s[i + 2], 0, 1, 4, 5);
    r[i + 2] = PYENS_SHUFFLE(s[i], s[i + 2], 2, 3, 6, 7);
  }
}
template <class V>
inline __attribute__((always_inline)) void transpose(V (&r)[2]) {
  static_assert(lanes_of<V>() == 2);
  const V s = PYENS_SHUFFLE(r[0], r[1], 0, 2);
  r[1] = PYENS_SHUFFLE(r[0], r[1], 1, 3);
  r[0] = s;
}

// Lane i: the sum of the lanes of r[i]. Half of the work of a transposition at each of log2(N)
// steps: two vectors are shuffled into one pair of halves, and added.
template <class V>
inline __attribute__((always_inline)) V sum_lanes(V (&r)[2]) {
  return PYENS_SHUFFLE(r[0], r[1], 0, 2) + PYENS_SHUFFLE(r[0], r[1], 1, 3);
}
template <class V>
inline __attribute__((always_inline)) V sum_lanes(V (&r)[4]) {
  const V a = PYENS_SHUFFLE(r[0], r[1], 0, 4, 1, 5) + PYENS_SHUFFLE(r[0], r[1], 2, 6, 3, 7);
  const V b = PYENS_SHUFFLE(r[2], r[3], 0, 4, 1, 5) + PYENS_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
  return PYENS_SHUFFLE(a, b, 0, 1, 4, 5) + PYENS_SHUFFLE(a, b, 2, 3, 6, 7);
}
template <class V>
inline __attribute__((always_inline)) V sum_lanes_of_four(const V* r) {  // in each half of 8 lanes
  static_assert(lanes_of<V>() == 8);
  const V a = PYENS_SHUFFLE(r[0], r[1], 0, 8, 1, 9, 4, 12, 5, 13) +
              PYENS_SHUFFLE(r[0], r[1], 2, 10, 3, 11, 6, 14, 7, 15);
  const V b = PYENS_SHUFFLE(r[2], r[3], 0, 8, 1, 9, 4, 12, 5, 13) +
              PYENS_SHUFFLE(r[2], r[3], 2, 10, 3, 11, 6, 14, 7, 15);
  return PYENS_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
         PYENS_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
template <class V>
inline __attribute__((always_inline)) V sum_lanes(V (&r)[8]) {
  const V a = sum_lanes_of_four(r), b = sum_lanes_of_four(r + 4);
  return PYENS_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
         PYENS_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
template <class V>
inline __attribute__((always_inline)) V sum_lanes(V (&r)[16]) {
  V s[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const V* q = r + 4 * i;
    const V a =
        PYENS_SHUFFLE(q[0], q[1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
        PYENS_SHUFFLE(q[0], q[1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    const V b =
        PYENS_SHUFFLE(q[2], q[3], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
        PYENS_SHUFFLE(q[2], q[3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    s[i] = PYENS_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           PYENS_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  const V a =
      PYENS_SHUFFLE(s[0], s[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
      PYENS_SHUFFLE(s[0], s[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  const V b =
      PYENS_SHUFFLE(s[2], s[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
      PYENS_SHUFFLE(s[2], s[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  return PYENS_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         PYENS_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// r[i] <- element i of each of the N rows that start at row(0) ... row(N - 1).
template <class V, int N, class Row>
inline __attribute__((always_inline)) void load_transposed(const Row& row, V (&r)[N]) {
#if PYENS_HAS(AVX2)
  if constexpr (std::is_same_v<V, Vec<float, 8>>) {
    // Half rows, the upper ones inserted by the load itself: saves a third of the shuffles.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const float *low = row(i), *high = row(i + 4);
      r[i] =
          (V)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
      r[i + 4] = (V)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low + 4)),
                                         _mm_loadu_ps(high + 4), 1);
    }
    transpose_halves(r);
    transpose_halves(r + 4);
    return;
  }
#endif
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) r[i] = load<V>(row(i));
  transpose(r);
}

template <class V>
inline __attribute__((always_inline)) V square_root(V v) {
#if PYENS_HAS(AVX512)
  if constexpr (sizeof(v[0]) == 4) return (V)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
  if constexpr (sizeof(v[0]) == 8) return (V)_mm512_maskz_sqrt_pd(0xff, (__m512d)v);
#elif PYENS_HAS(AVX2)
  if constexpr (sizeof(v[0]) == 4) return (V)_mm256_sqrt_ps((__m256)v);
  if constexpr (sizeof(v[0]) == 8) return (V)_mm256_sqrt_pd((__m256d)v);
#elif defined(__x86_64__)
  if constexpr (sizeof(v[0]) == 4) return (V)_mm_sqrt_ps((__m128)v);
  if constexpr (sizeof(v[0]) == 8) return (V)_mm_sqrt_pd((__m128d)v);
#else
  for (int i = 0; i < lanes_of<V>(); ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

}  // namespace pyens::PYENS_ISA
