// Wide vectors of any element type, whole or cut off at the end of a row: what the kernels over the
// member axis read and write.

#include "kernels/cpu/simd-inl.h"

namespace pyens::PYENS_ISA {

template <class Real>
using WideInts = Vec<std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>, kWideLanes<Real>>;

template <class Real, class T>
inline __attribute__((always_inline)) Wide<Real> load_wide(const T* p) {
  if constexpr (std::is_same_v<Real, T>) {
    return load<Wide<Real>>(p);
  } else {
    constexpr int N = kWideLanes<Real>;
    return widen<T, N>(load<Vec<uint16_t, N>>(p), static_cast<T*>(nullptr));
  }
}

template <class Real, class T>
inline __attribute__((always_inline)) void store_wide(T* p, Wide<Real> v) {
  if constexpr (std::is_same_v<Real, T>) {
    store(p, v);
  } else {
    store(p, narrow<T, kWideLanes<Real>>(v, static_cast<T*>(nullptr)));
  }
}

// The first n (at least 1) elements at p, zeros behind them; reads nothing beyond.
template <class Real, class T>
inline Wide<Real> load_wide_first(const T* p, int64_t n) {
  constexpr int N = kWideLanes<Real>;
  if (n >= N) return load_wide<Real>(p);
  T all[N] = {};
  std::memcpy(all, p, static_cast<size_t>(n) * sizeof(T));
  return load_wide<Real>(all);
}

// The first n lanes of v to p, as T.
template <class Real, class T>
inline void store_wide_first(T* p, Wide<Real> v, int64_t n) {
  constexpr int N = kWideLanes<Real>;
  if (n >= N) return store_wide<Real>(p, v);
  T all[N];
  store_wide<Real>(all, v);
  std::memcpy(p, all, static_cast<size_t>(n) * sizeof(T));
}

// 0, 1, 2 ... in the lanes.
template <class Real>
inline __attribute__((always_inline)) WideInts<Real> lane_numbers() {
  WideInts<Real> lane{};
  for (int i = 0; i < kWideLanes<Real>; ++i) lane[i] = i;
  return lane;
}

// The first n (at least 1) elements at p, anything behind them; reads nothing beyond.
template <class Real>
inline __attribute__((always_inline)) Wide<Real> load_lanes(const Real* p, int64_t n) {
#if PYENS_HAS(AVX512)
  const auto mask = static_cast<uint32_t>((1u << n) - 1);
  if constexpr (sizeof(Real) == 4) {
    return (Wide<Real>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  } else {
    return (Wide<Real>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
  }
#else
  return load_first<Real>(p, n);
#endif
}

// Lanes [skip, n) of v to p + skip and on. With skip > 0 all of the vector at p is memory that may be written.
template <class Real>
inline __attribute__((always_inline)) void store_lanes(Real* p, Wide<Real> v, int64_t skip,
                                                       int64_t n) {
#if PYENS_HAS(AVX512)
  const auto mask = static_cast<uint32_t>((1u << n) - (1u << skip));
  if constexpr (sizeof(Real) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), (__m512d)v);
  }
#else
  if (skip > 0) {
    const auto done = lane_numbers<Real>() < static_cast<int>(skip);
    v = done ? load<Wide<Real>>(p) : v;
  }
  store_first<Real>(p, v, n);
#endif
}

// Upper half added to lower half until one is left.
template <class V>
inline __attribute__((always_inline)) auto sum_lanes(V v) {
  constexpr int N = lanes_of<V>();
  if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    using Half = Vec<std::decay_t<decltype(v[0])>, N / 2>;
    Half low, high;
    std::memcpy(&low, &v, sizeof(Half));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(Half), sizeof(Half));
    return sum_lanes(low + high);
  }
}

}  // namespace pyens::PYENS_ISA
