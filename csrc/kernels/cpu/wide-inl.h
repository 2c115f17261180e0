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
