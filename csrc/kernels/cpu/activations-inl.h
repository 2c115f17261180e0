// The hidden activations over rows of numbers, in the vectors of one instruction set.

#include "kernels/activation_formulas-inl.h"

namespace pyens::PYENS_ISA {

template <class F, class Real, class V>
inline void apply_rows(Real* rows, int64_t n) {
  if constexpr (!std::is_same_v<F, Relu> && !std::is_same_v<F, Identity>) {
    for (int64_t i = 0; i < n; i += lanes_of<V>()) {
      V v = load<V>(rows + i);
      if constexpr (std::is_same_v<Real, float>) {
        v = F::template vector<V>(v);
      } else {
        for (int lane = 0; lane < lanes_of<V>(); ++lane) v[lane] = F::value(v[lane]);
      }
      store(rows + i, v);
    }
  }
}

template <class F, class Real, class V>
inline void apply_rows_with_slope(Real* rows, Real* slope, int64_t n) {
  if constexpr (!std::is_same_v<F, Relu>) {
    for (int64_t i = 0; i < n; i += lanes_of<V>()) {
      const V x = load<V>(rows + i);
      V h = x, d{};
      if constexpr (std::is_same_v<Real, float>) {
        h = F::template vector<V>(x);
        d = F::template vector_slope<V>(x, h);
      } else {
        for (int lane = 0; lane < lanes_of<V>(); ++lane) {
          h[lane] = F::value(x[lane]);
          d[lane] = F::slope(x[lane], h[lane]);
        }
      }
      store(rows + i, h);
      store(slope + i, d);
    }
  }
}

// rows[i] <- act(rows[i]), i < n; n is a multiple of V's lanes. A ReLU is done where sums are stored.
template <class V, class Real>
inline void activate(ActivationKind kind, Real* rows, int64_t n) {
  switch (kind) {
#define PYENS_CASE(name, F) \
  case ActivationKind::name: return apply_rows<F, Real, V>(rows, n);
    PYENS_ACTIVATIONS(PYENS_CASE)
#undef PYENS_CASE
  }
}

// rows[i] <- act(rows[i]) and slope[i] <- act'(rows[i]), likewise.
template <class V, class Real>
inline void activate_with_slope(ActivationKind kind, Real* rows, Real* slope, int64_t n) {
  switch (kind) {
#define PYENS_CASE(name, F) \
  case ActivationKind::name: return apply_rows_with_slope<F, Real, V>(rows, slope, n);
    PYENS_ACTIVATIONS(PYENS_CASE)
#undef PYENS_CASE
  }
}

}  // namespace pyens::PYENS_ISA
