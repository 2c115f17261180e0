// What a part of a gradient adds to its member's norm, and the part times a number, on one instruction set.
//
//   measure  sum |x|, sum x^2 or max |x|, in double: the squares of float32 and of 16 bits neither overflow nor vanish
//            there. Those of float64 do: where the sum says so, once more with x * 2^600 or x / 2^600, which is exact.
//   scale    x <- x * factor, in float32 or float64, rounded once to 16 bits
//
// Elements in the lanes, four vectors of double at a time; the last ones, which do not fill them, are read with zeros
// behind them. So the order of a sum depends on the part's size alone. Bound by the conversion to double and the
// multiply-adds in cache, by memory outside.

#include "kernels/cpu/wide-inl.h"

namespace pyens::PYENS_ISA::clip_member_grad_norm {

using Doubles = Wide<double>;
constexpr int kLanes = kWideLanes<double>;

template <class T>
inline __attribute__((always_inline)) Doubles load_doubles(const T* p) {
  if constexpr (std::is_same_v<T, double>) {
    return load<Doubles>(p);
  } else if constexpr (std::is_same_v<T, float>) {
    return __builtin_convertvector(load<Vec<float, kLanes>>(p), Doubles);
  } else {
    const auto bits = load<Vec<uint16_t, kLanes>>(p);
    return __builtin_convertvector((widen<T, kLanes>(bits, static_cast<T*>(nullptr))), Doubles);
  }
}

template <Norm norm, bool rescaled>
inline __attribute__((always_inline)) Doubles add(Doubles sum, Doubles x, double by) {
  if constexpr (rescaled) x = x * by;
  if constexpr (norm == Norm::two) return madd(x, x, sum);
  const Doubles size = x < Doubles{} ? -x : x;
  if constexpr (norm == Norm::one) return sum + size;
  return sum != sum ? sum : at_least(sum, size);  // NaN where either is
}

template <Norm norm, bool rescaled, class T>
inline double accumulate(const T* p, int64_t size, double by) {
  constexpr int N = kLanes;
  Doubles sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * N <= size; i += 4 * N) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      sums[j] = add<norm, rescaled>(sums[j], load_doubles(p + i + j * N), by);
    }
  }
  if (i < size) {
    T last[4 * N] = {};
    std::memcpy(last, p + i, static_cast<size_t>(size - i) * sizeof(T));
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      sums[j] = add<norm, rescaled>(sums[j], load_doubles(last + j * N), by);
    }
  }
  if constexpr (norm == Norm::largest) {
#pragma GCC unroll 3
    for (int j = 1; j < 4; ++j) sums[0] = add<norm, false>(sums[0], sums[j], by);
    double largest = 0;
    for (int lane = 0; lane < N; ++lane) {
      const double size_of_lane = sums[0][lane];
      largest = largest != largest || largest > size_of_lane ? largest : size_of_lane;
    }
    return largest;
  } else {
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

template <class T, class Real>
ClipPart measure(const void* gradient, int64_t size, Norm norm) {
  const T* p = static_cast<const T*>(gradient);
  if (norm == Norm::one) return {accumulate<Norm::one, false>(p, size, 1), 0};
  if (norm == Norm::largest) return {accumulate<Norm::largest, false>(p, size, 1), 0};
  const double sum = accumulate<Norm::two, false>(p, size, 1);
  if constexpr (std::is_same_v<T, double>) {
    if (sum > 0x1p980) return {accumulate<Norm::two, true>(p, size, 0x1p-600), 1};
    if (sum < 0x1p-900) return {accumulate<Norm::two, true>(p, size, 0x1p600), -1};
  }
  return {sum, 0};
}

template <class T, class Real>
void scale(void* gradient, int64_t size, double factor) {
  T* const p = static_cast<T*>(gradient);
  const auto by = broadcast<Wide<Real>>(static_cast<Real>(factor));
  constexpr int N = kWideLanes<Real>;
  int64_t i = 0;
  for (; i + N <= size; i += N) store_wide<Real>(p + i, load_wide<Real>(p + i) * by);
  if (i < size) {
    store_wide_first<Real>(p + i, load_wide_first<Real>(p + i, size - i) * by, size - i);
  }
}

}  // namespace pyens::PYENS_ISA::clip_member_grad_norm
