// Mean, spread, smallest and largest over the members, element by element: bound by memory, also with
// twice the operations that double takes.
//
// All sums are double, of differences d from the first member, and of their squares:
//
//   mean = first + sum d / E,   sum (y - mean)^2 = sum d^2 - (sum d)^2 / E
//
// The first member is one of those whose spread is wanted, so (mean - first)^2 <= sum (y - mean)^2, and
// the difference costs no more than a factor E of double's precision. Members that are equal have a
// spread of exactly 0, and an offset costs no digits. No square of a float leaves double's range; where
// one of a double does, the element is computed again from members that a power of two brings near 1.

namespace pyens::PYENS_ISA::uncertainty {

constexpr int64_t kMomentBlock = 16;     // members at a time, with sums in registers
constexpr int64_t kMaxMomentTile = 512;  // elements: 4 KB of each sum

inline int64_t moment_tile(const MomentsParams& p) {
  int64_t tile = kMaxMomentTile;
  while (tile > 64 && p.size < kFewTiles * tile) tile /= 2;
  return tile;
}

inline int64_t moments_work_items(const MomentsParams& p) {
  const int64_t tile = moment_tile(p);
  return (p.size + tile - 1) / tile;
}

struct Moments {
  double *sum, *squares;  // of differences from the first member
  double *low, *high;
  double* nan;  // NaN where a member has one, else 0
  double* variances;
};

inline size_t moments_scratch_bytes(const MomentsParams& p) {
  return static_cast<size_t>(6 * moment_tile(p)) * sizeof(double);
}

// The first n elements at p, zeros behind them; reads nothing beyond.
template <class T>
inline __attribute__((always_inline)) Doubles load_numbers(const T* p, int64_t n) {
  T cut[kDoubles] = {};
  if (n < kDoubles) {
    std::memcpy(cut, p, static_cast<size_t>(n) * sizeof(T));
    p = cut;
  }
  if constexpr (sizeof(T) == 2) {
    const auto bits = load<Vec<uint16_t, kDoubles>>(p);
    return __builtin_convertvector((widen<T, kDoubles>(bits, static_cast<T*>(nullptr))), Doubles);
  } else {
    return load_doubles(p);
  }
}

template <class T>
inline void store_numbers(void* result, int64_t at, Doubles v, int64_t n) {
  T rounded[kDoubles];
  if constexpr (sizeof(T) == 2) {
    const auto single = __builtin_convertvector(v, Vec<float, kDoubles>);
    store(rounded, narrow<T, kDoubles>(single, static_cast<T*>(nullptr)));
  } else {
    store_doubles(rounded, v);
  }
  std::memcpy(static_cast<T*>(result) + at, rounded,
              static_cast<size_t>(std::min(n, kDoubles)) * sizeof(T));
}

inline __attribute__((always_inline)) Doubles square_root(Doubles v) {
#if PYENS_HAS(AVX512)
  return (Doubles)_mm512_maskz_sqrt_pd(0xff, (__m512d)v);
#elif PYENS_HAS(AVX2)
  return (Doubles)_mm256_sqrt_pd((__m256d)v);
#else
  for (int i = 0; i < kDoubles; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// Members [m, m + count) of n elements, member 0's at x.
template <class T>
void add_outputs(const T* x, int64_t stride, int64_t m, int64_t count, int64_t n,
                 const Moments& moments) {
  for (int64_t i = 0; i < n; i += kDoubles) {
    const Doubles first = load_numbers(x + i, n - i);
    Doubles low = m ? load<Doubles>(moments.low + i) : first;
    Doubles high = m ? load<Doubles>(moments.high + i) : first;
    Doubles nan = m ? load<Doubles>(moments.nan + i) : Doubles{};
    Doubles sum{}, squares{};
    const T* at = x + m * stride + i;
    for (int64_t b = 0; b < count; ++b, at += stride) {
      const Doubles v = load_numbers(at, n - i);
      const Doubles d = v - first;
      sum += d;
      squares = madd(d, d, squares);
      low = v < low ? v : low;
      high = v > high ? v : high;
      nan = v != v ? v : nan;
    }
    store(moments.sum + i, m ? load<Doubles>(moments.sum + i) + sum : sum);
    store(moments.squares + i, m ? load<Doubles>(moments.squares + i) + squares : squares);
    store(moments.low + i, low);
    store(moments.high + i, high);
    store(moments.nan + i, nan);
  }
}

template <class T>
void add_variances(const T* x, int64_t stride, int64_t m, int64_t count, int64_t n, double* total) {
  for (int64_t i = 0; i < n; i += kDoubles) {
    Doubles sum{};
    for (int64_t b = 0; b < count; ++b) sum += load_numbers(x + (m + b) * stride + i, n - i);
    store(total + i, m ? load<Doubles>(total + i) + sum : sum);
  }
}

// Whether finite doubles have differences or squares beyond double's range.
inline bool out_of_range(double sum, double squares, double low, double high) {
  if (!std::isfinite(low) || !std::isfinite(high) || low == high) return false;
  return !std::isfinite(sum) || !std::isfinite(squares) || squares < 1e-280;
}

// One element again: mean, std and epistemic variance of members that 2^exponent makes small or large.
inline void scaled_moments(const double* x, int64_t stride, int64_t members, double low,
                           double high, double* mean, double* std, double* epistemic) {
  const int exponent = std::ilogb(std::max(std::abs(low), std::abs(high)));
  const double count = static_cast<double>(members), first = std::ldexp(*x, -exponent);
  double sum = 0, squares = 0;
  for (int64_t m = 0; m < members; ++m) {
    const double d = std::ldexp(x[m * stride], -exponent) - first;
    sum += d;
    squares += d * d;
  }
  squares = std::max(0.0, squares - sum * sum / count);
  *mean = std::ldexp(first + sum / count, exponent);
  *std = std::ldexp(std::sqrt(squares / (count - 1)), exponent);
  *epistemic = std::ldexp(squares / count, 2 * exponent);
}

template <class T, class Real>
void run_moments(const MomentsParams& p, int64_t begin, int64_t end, void* base) {
  const int64_t tile = moment_tile(p);
  double* scratch = static_cast<double*>(base);
  const Moments moments = {
      scratch,           scratch + tile, scratch + 2 * tile, scratch + 3 * tile, scratch + 4 * tile,
      scratch + 5 * tile};
  const double count = static_cast<double>(p.ensemble_size);
  const Doubles members = broadcast<Doubles>(count), degrees = broadcast<Doubles>(count - 1);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t start = item * tile, n = std::min(tile, p.size - start);
    const T* outputs = static_cast<const T*>(p.outputs) + start;
    const T* variances = static_cast<const T*>(p.variances) + (p.variances ? start : 0);
    for (int64_t m = 0; m < p.ensemble_size; m += kMomentBlock) {
      const int64_t block = std::min(kMomentBlock, p.ensemble_size - m);
      add_outputs(outputs, p.outputs_stride, m, block, n, moments);
      if (p.variances) {
        add_variances(variances, p.variances_stride, m, block, n, moments.variances);
      }
    }
    for (int64_t i = 0; i < n; i += kDoubles) {
      const int64_t at = start + i, left = n - i;
      const Doubles low = load<Doubles>(moments.low + i), high = load<Doubles>(moments.high + i);
      const Doubles nan = load<Doubles>(moments.nan + i), sum = load<Doubles>(moments.sum + i);
      const Doubles raw = load<Doubles>(moments.squares + i);
      const Doubles squares = at_least(Doubles{}, raw - sum * sum / members);
      Doubles mean = load_numbers(outputs + i, left) + sum / members;
      // Infinities of one sign are their own mean.
      mean = sum - sum != Doubles{} ? (nan != nan ? nan : low + high) : mean;
      Doubles std = square_root(squares / degrees), epistemic = squares / members;
      if constexpr (std::is_same_v<T, double>) {
        for (int64_t l = 0; l < std::min(left, kDoubles); ++l) {
          if (nan[l] == 0 && out_of_range(sum[l], raw[l], low[l], high[l])) {
            double again[3];
            scaled_moments(outputs + i + l, p.outputs_stride, p.ensemble_size, low[l], high[l],
                           again, again + 1, again + 2);
            mean[l] = again[0];
            std[l] = again[1];
            epistemic[l] = again[2];
          }
        }
      }
      store_numbers<T>(p.mean, at, mean, left);
      store_numbers<T>(p.std, at, std, left);
      store_numbers<T>(p.min, at, nan != nan ? nan : low, left);
      store_numbers<T>(p.max, at, nan != nan ? nan : high, left);
      store_numbers<T>(p.epistemic, at, epistemic, left);
      if (!p.variances) continue;
      Doubles aleatoric = load<Doubles>(moments.variances + i) / members;
      if constexpr (std::is_same_v<T, double>) {
        for (int64_t l = 0; l < std::min(left, kDoubles); ++l) {
          if (!std::isinf(aleatoric[l])) continue;
          aleatoric[l] = 0;  // the sum may be too large, the mean not
          for (int64_t m = 0; m < p.ensemble_size; ++m) {
            aleatoric[l] += variances[m * p.variances_stride + i + l] / count;
          }
        }
      }
      store_numbers<T>(p.aleatoric, at, aleatoric, left);
    }
  }
}

}  // namespace pyens::PYENS_ISA::uncertainty
