// An optimizer's step over elements [begin, end) of one tensor, on one instruction set. With x the parameter, g its
// gradient, all in the tensor's type, 16-bit ones in float32:
//
//   all      g <- g / grad_scale (kept), -g if it maximizes, g + weight_decay x
//   Adam     m <- m + (1 - beta1) (g - m), as lerp,  v <- beta2 v + (1 - beta2) g g,  u <- max(u, v) or v
//            x <- shrink x - rate m / (sqrt(u) root_correction + eps)
//   Adagrad  s <- s + g^2,  x <- x - rate g / (sqrt(s) + eps)
//   SGD      b <- momentum b + (1 - dampening) g, or g in the first step;  x <- x - rate (b or g + momentum b)
//
// Elements in the lanes, each for itself; the last ones, which do not fill a vector, go through the same vector
// arithmetic, so that every element is rounded alike wherever it lies.
//
// Bound by memory: in float32 Adam moves 28 bytes an element (reads 16, writes 12; amsgrad 36), Adagrad 20, SGD 12,
// with momentum 20. In cache, a root and a quotient bind Adam and Adagrad: that the correction of v is a factor saves a
// second quotient. Where a gradient of 0 changes nothing (Adagrad, plain SGD), vectors of them cost 4 bytes an element.

#include "kernels/cpu/wide-inl.h"

namespace pyens::PYENS_ISA::optimizers {

// The larger one, NaN if either is.
template <class V>
inline __attribute__((always_inline)) V larger(V a, V b) {
  return a != a ? a : at_least(a, b);
}

template <class Real>
struct Rule {
  using V = Wide<Real>;
  static inline __attribute__((always_inline)) V all(double x) {
    return broadcast<V>(static_cast<Real>(x));
  }
  // Whether elements whose gradient is 0 stay as they are, and so does what is remembered of them.
  static bool rests(const StepParams& /*p*/) { return false; }
};

template <class Real, bool amsgrad>
struct Adam : Rule<Real> {
  using V = Wide<Real>;
  static constexpr int kStates = amsgrad ? 3 : 2;
  bool nearer_new;
  V part, beta2, new2, shrink, rate, correction, eps;

  Adam(const StepParams& p, const StepTensor& t)
      : nearer_new(1 - p.beta1 >= 0.5),
        part(Adam::all(nearer_new ? -p.beta1 : 1 - p.beta1)),
        beta2(Adam::all(p.beta2)),
        new2(Adam::all(1 - p.beta2)),
        shrink(Adam::all(p.shrink)),
        rate(Adam::all(t.rate)),
        correction(Adam::all(t.root_correction)),
        eps(Adam::all(p.eps)) {}

  inline __attribute__((always_inline)) void apply(V& x, V g, V* state) const {
    const V way = g - state[0];
    state[0] = madd(way, part, nearer_new ? g : state[0]);
    state[1] = madd(state[1], beta2, g * new2 * g);  // as torch: a square alone overflows sooner
    V squares = state[1];
    if constexpr (amsgrad) squares = state[2] = larger(state[2], squares);
    const V denominator = madd(square_root(squares), correction, eps);
    x = x * shrink - rate * state[0] / denominator;
  }
};

template <class Real>
struct Adagrad : Rule<Real> {
  using V = Wide<Real>;
  static constexpr int kStates = 1;
  V rate, eps;

  // Without an eps, 0 / 0 where there never was a gradient.
  static bool rests(const StepParams& p) { return p.eps > 0; }

  Adagrad(const StepParams& p, const StepTensor& t)
      : rate(Adagrad::all(t.rate)), eps(Adagrad::all(p.eps)) {}

  inline __attribute__((always_inline)) void apply(V& x, V g, V* state) const {
    state[0] = madd(g, g, state[0]);
    x = x - rate * g / (square_root(state[0]) + eps);
  }
};

template <class Real, bool with_momentum>
struct Sgd : Rule<Real> {
  using V = Wide<Real>;
  static constexpr int kStates = with_momentum ? 1 : 0;
  V rate, momentum, fresh;
  bool nesterov, begins;

  static bool rests(const StepParams& /*p*/) { return !with_momentum; }

  Sgd(const StepParams& p, const StepTensor& t)
      : rate(Sgd::all(-t.rate)),
        momentum(Sgd::all(p.momentum)),
        fresh(Sgd::all(1 - p.dampening)),
        nesterov(p.nesterov),
        begins(p.begins) {}

  inline __attribute__((always_inline)) void apply(V& x, V g, V* state) const {
    if constexpr (with_momentum) {
      state[0] = begins ? g : madd(state[0], momentum, g * fresh);
      g = nesterov ? madd(state[0], momentum, g) : state[0];
    }
    x = madd(g, rate, x);
  }
};

// The n elements at i; `whole`: they fill a vector.
template <bool whole, class Real, class T>
inline __attribute__((always_inline)) Wide<Real> read(const T* p, int64_t n) {
  if constexpr (whole) return load_wide<Real>(p);
  return load_wide_first<Real>(p, n);
}
template <bool whole, class Real, class T>
inline __attribute__((always_inline)) void write(T* p, Wide<Real> v, int64_t n) {
  if constexpr (whole) {
    store_wide<Real>(p, v);
  } else {
    store_wide_first<Real>(p, v, n);
  }
}

template <class Real>
struct Before {
  Wide<Real> scale, decay;
  bool scaled, maximize, decays;
  bool rests;  // a gradient of 0 changes nothing: no more than it is read
};

template <class V>
inline __attribute__((always_inline)) bool all_bits_zero(V v) {
#if PYENS_HAS(AVX512)
  if constexpr (sizeof(V) == 64) return _mm512_test_epi64_mask((__m512i)v, (__m512i)v) == 0;
#endif
#if PYENS_HAS(AVX2)
  if constexpr (sizeof(V) == 32) return _mm256_testz_si256((__m256i)v, (__m256i)v) != 0;
#endif
  uint64_t words[sizeof(V) / 8], any = 0;
  std::memcpy(words, &v, sizeof(V));
  for (const uint64_t word : words) any |= word;
  return any == 0;
}

template <bool whole, class T, class Real, class R>
inline __attribute__((always_inline)) void update(const R& rule, const Before<Real>& before,
                                                  const StepTensor& t, int64_t i, int64_t n) {
  using V = Wide<Real>;
  T* const parameter = static_cast<T*>(t.parameter) + i;
  T* const gradient = static_cast<T*>(t.gradient) + i;
  V g = read<whole, Real>(gradient, n);
  if (before.rests && all_bits_zero(g)) return;
  V x = read<whole, Real>(parameter, n);
  if (before.scaled) {
    g = g / before.scale;
    write<whole, Real>(gradient, g, n);
  }
  if (before.maximize) g = -g;
  if (before.decays) g = madd(x, before.decay, g);
  V state[3] = {};
#pragma GCC unroll 3
  for (int s = 0; s < R::kStates; ++s) {
    state[s] = read<whole, Real>(static_cast<const T*>(t.state[s]) + i, n);
  }
  rule.apply(x, g, state);
#pragma GCC unroll 3
  for (int s = 0; s < R::kStates; ++s) {
    write<whole, Real>(static_cast<T*>(t.state[s]) + i, state[s], n);
  }
  write<whole, Real>(parameter, x, n);
}

template <class T, class Real, class R>
void step(const StepParams& p, const StepTensor& tensor, int64_t begin, int64_t end) {
  const R rule(p, tensor);
  const StepTensor t = tensor;  // whose pointers no store below can change
  const Before<Real> before{R::all(p.grad_scale == nullptr ? 1 : *p.grad_scale),
                            R::all(p.weight_decay),
                            p.grad_scale != nullptr,
                            p.maximize,
                            p.weight_decay != 0,
                            R::rests(p) && std::isfinite(tensor.rate) && p.grad_scale == nullptr &&
                                !p.maximize && p.weight_decay == 0};
  constexpr int N = kWideLanes<Real>;
  int64_t i = begin;
  // Two vectors at a time keep more loads in flight.
  for (; i + 2 * N <= end; i += 2 * N) {
    if (t.ahead != 0) {
      __builtin_prefetch(static_cast<const T*>(t.parameter) + i + t.ahead, 1, 2);
#pragma GCC unroll 3
      for (int s = 0; s < R::kStates; ++s) {
        __builtin_prefetch(static_cast<const T*>(t.state[s]) + i + t.ahead, 1, 2);
      }
    }
    update<true, T>(rule, before, t, i, N);
    update<true, T>(rule, before, t, i + N, N);
  }
  if (i + N <= end) {
    update<true, T>(rule, before, t, i, N);
    i += N;
  }
  if (i < end) update<false, T>(rule, before, t, i, end - i);
}

template <class T, class Real>
void adam(const StepParams& p, const StepTensor& t, int64_t begin, int64_t end) {
  if (p.amsgrad) return step<T, Real, Adam<Real, true>>(p, t, begin, end);
  step<T, Real, Adam<Real, false>>(p, t, begin, end);
}

template <class T, class Real>
void adagrad(const StepParams& p, const StepTensor& t, int64_t begin, int64_t end) {
  step<T, Real, Adagrad<Real>>(p, t, begin, end);
}

template <class T, class Real>
void sgd(const StepParams& p, const StepTensor& t, int64_t begin, int64_t end) {
  if (p.momentum != 0) return step<T, Real, Sgd<Real, true>>(p, t, begin, end);
  step<T, Real, Sgd<Real, false>>(p, t, begin, end);
}

}  // namespace pyens::PYENS_ISA::optimizers
