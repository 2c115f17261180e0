// Mean, spread, smallest and largest over the members, element by element: bound by memory.
//
// Members go in blocks of kMomentBlock: sums, and sums of deviations from the block's first member in
// registers, then merged into mean and squared deviations (Chan), the means relative to the first
// member of all. So members that are equal have a spread of exactly 0, and an offset costs no digits.

namespace pyens::PYENS_ISA::uncertainty {

constexpr int64_t kMomentBlock = 16;
constexpr int64_t kMaxMomentTile = 1024;  // elements: 4 KB of a member of float32

inline int64_t moment_tile(const MomentsParams& p) {
  int64_t tile = kMaxMomentTile;
  while (tile > 64 && p.size < kFewTiles * tile) tile /= 2;
  return tile;
}

inline int64_t moments_work_items(const MomentsParams& p) {
  const int64_t tile = moment_tile(p);
  return (p.size + tile - 1) / tile;
}

template <class Real>
struct Moments {
  Real* sum;
  Real *mean, *squares;  // the mean relative to the first member; squared deviations
  Real *low, *high;
  Real* nan;  // NaN where a member has one, else 0
  Real* variance;
};

template <class Real>
size_t moments_scratch_bytes(const MomentsParams& p) {
  return static_cast<size_t>(7 * moment_tile(p)) * sizeof(Real);
}

template <class V>
inline __attribute__((always_inline)) V square_root(V v) {
#if PYENS_HAS(AVX512)
  if constexpr (std::is_same_v<V, Vec<float, 16>>)
    return (V)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif PYENS_HAS(AVX2)
  if constexpr (std::is_same_v<V, Vec<float, 8>>) return (V)_mm256_sqrt_ps((__m256)v);
#endif
  for (int i = 0; i < lanes_of<V>(); ++i) v[i] = std::sqrt(v[i]);
  return v;
}

// Members [m, m + count) of n elements, member 0's at x, merged into the moments of the m before.
template <class T, class Real>
void merge_block(const T* x, int64_t stride, int64_t m, int64_t count, int64_t n,
                 const Moments<Real>& moments) {
  using V = Wide<Real>;
  const Real after = static_cast<Real>(m + count), before = static_cast<Real>(m);
  const Real members = static_cast<Real>(count);
  const V inverse = broadcast<V>(1 / members), share = broadcast<V>(members / after);
  const V weight = broadcast<V>(before * members / after);
  for (int64_t i = 0; i < n; i += kWideLanes<Real>) {
    const T* at = x + m * stride + i;
    const V first = load_wide_first<Real>(at, n - i);
    V low = m ? load<V>(moments.low + i) : first, high = m ? load<V>(moments.high + i) : first;
    V nan = m ? load<V>(moments.nan + i) : V{};
    V sum = m ? load<V>(moments.sum + i) : V{};
    V of_block{}, deviations{}, squares{};
    for (int64_t b = 0; b < count; ++b, at += stride) {
      const V v = load_wide_first<Real>(at, n - i);
      const V d = v - first;
      of_block += v;
      deviations += d;
      squares = madd(d, d, squares);
      low = v < low ? v : low;
      high = v > high ? v : high;
      nan = v != v ? v : nan;
    }
    V mean = first - load_wide_first<Real>(x + i, n - i) + deviations * inverse;
    squares = at_least(V{}, squares - deviations * deviations * inverse);
    if (m) {
      const V old = load<V>(moments.mean + i), delta = mean - old;
      mean = madd(delta, share, old);
      squares += load<V>(moments.squares + i) + delta * delta * weight;
    }
    store(moments.sum + i, sum + of_block);
    store(moments.mean + i, mean);
    store(moments.squares + i, squares);
    store(moments.low + i, low);
    store(moments.high + i, high);
    store(moments.nan + i, nan);
  }
}

template <class T, class Real>
void add_variances(const T* x, int64_t stride, int64_t count, int64_t n, Real* total) {
  using V = Wide<Real>;
  for (int64_t i = 0; i < n; i += kWideLanes<Real>) {
    V sum{};
    for (int64_t b = 0; b < count; ++b) sum += load_wide_first<Real>(x + b * stride + i, n - i);
    store(total + i, load<V>(total + i) + sum);
  }
}

template <class T, class Real>
void run_moments(const MomentsParams& p, int64_t begin, int64_t end, void* base) {
  using V = Wide<Real>;
  const int64_t tile = moment_tile(p);
  Real* scratch = static_cast<Real*>(base);
  const Moments<Real> moments = {scratch,
                                 scratch + tile,
                                 scratch + 2 * tile,
                                 scratch + 3 * tile,
                                 scratch + 4 * tile,
                                 scratch + 5 * tile,
                                 scratch + 6 * tile};
  const V members = broadcast<V>(static_cast<Real>(p.ensemble_size));
  const V degrees = members - broadcast<V>(Real{1});
  for (int64_t item = begin; item < end; ++item) {
    const int64_t start = item * tile, n = std::min(tile, p.size - start);
    const T* outputs = static_cast<const T*>(p.outputs) + start;
    const T* variances = static_cast<const T*>(p.variances) + (p.variances ? start : 0);
    std::fill(moments.variance, moments.variance + tile, 0);
    for (int64_t m = 0; m < p.ensemble_size; m += kMomentBlock) {
      const int64_t count = std::min(kMomentBlock, p.ensemble_size - m);
      merge_block(outputs, p.outputs_stride, m, count, n, moments);
      if (p.variances) {
        add_variances(variances + m * p.variances_stride, p.variances_stride, count, n,
                      moments.variance);
      }
    }
    for (int64_t i = 0; i < n; i += kWideLanes<Real>) {
      const int64_t at = start + i, left = n - i;
      const V low = load<V>(moments.low + i), high = load<V>(moments.high + i);
      const V nan = load<V>(moments.nan + i), squares = load<V>(moments.squares + i);
      // The sum of equal members, divided, need not be what they are.
      const V first = load_wide_first<Real>(outputs + i, left), sum = load<V>(moments.sum + i);
      store_result<T, Real>(p.mean, at, squares == V{} ? first : sum / members, left);
      store_result<T, Real>(p.std, at, square_root(squares / degrees), left);
      store_result<T, Real>(p.min, at, nan != nan ? nan : low, left);
      store_result<T, Real>(p.max, at, nan != nan ? nan : high, left);
      store_result<T, Real>(p.epistemic, at, squares / members, left);
      if (p.variances)
        store_result<T, Real>(p.aleatoric, at, load<V>(moments.variance + i) / members, left);
    }
  }
}

}  // namespace pyens::PYENS_ISA::uncertainty
