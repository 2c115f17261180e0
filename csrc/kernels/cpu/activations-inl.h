// The hidden activations over rows of numbers, in the vectors of one instruction set.

#include "kernels/activation_formulas-inl.h"

namespace pyens::PYENS_ISA {

template <class F, class Real, class V>
inline void apply_rows(const Real* from, Real* rows, int64_t n, Real parameter) {
  for (int64_t i = 0; i < n; i += lanes_of<V>()) {
    V v = load<V>(from + i);
    if constexpr (std::is_same_v<Real, float>) {
      v = F::template vector<V>(v, broadcast<V>(parameter));
    } else {
      for (int lane = 0; lane < lanes_of<V>(); ++lane) v[lane] = F::value(v[lane], parameter);
    }
    store(rows + i, v);
  }
}

template <class F, class Real, class V>
inline void apply_rows_with_slope(const Real* from, Real* rows, Real* slope, int64_t n,
                                  Real parameter) {
  for (int64_t i = 0; i < n; i += lanes_of<V>()) {
    const V x = load<V>(from + i), a = broadcast<V>(parameter);
    V h = x, d{};
    if constexpr (std::is_same_v<Real, float>) {
      h = F::template vector<V>(x, a);
      d = F::template vector_slope<V>(x, h, a);
    } else {
      for (int lane = 0; lane < lanes_of<V>(); ++lane) {
        h[lane] = F::value(x[lane], parameter);
        d[lane] = F::slope(x[lane], h[lane], parameter);
      }
    }
    store(rows + i, h);
    store(slope + i, d);
  }
}

// rows[i] <- act(from[i]), i < n, which may be the same; n is a multiple of V's lanes.
template <class V, class Real>
inline void activate(const Activation& activation, const Real* from, Real* rows, int64_t n) {
  const auto a = static_cast<Real>(activation.parameter);
  switch (activation.kind) {
#define PYENS_CASE(name, F, standard) \
  case ActivationKind::name: return apply_rows<F, Real, V>(from, rows, n, a);
    PYENS_ACTIVATIONS(PYENS_CASE)
#undef PYENS_CASE
  }
}

// rows[i] <- act(from[i]) and slope[i] <- act'(from[i]), likewise.
template <class V, class Real>
inline void activate_with_slope(const Activation& activation, const Real* from, Real* rows,
                                Real* slope, int64_t n) {
  const auto a = static_cast<Real>(activation.parameter);
  switch (activation.kind) {
#define PYENS_CASE(name, F, standard) \
  case ActivationKind::name: return apply_rows_with_slope<F, Real, V>(from, rows, slope, n, a);
    PYENS_ACTIVATIONS(PYENS_CASE)
#undef PYENS_CASE
  }
}

}  // namespace pyens::PYENS_ISA
