// Predictive uncertainty and moments on one instruction set: reductions over the member axis.
//
// Every member's output is read once. With z a row of logits, m its largest, e_k = e^(z_k - m),
// S = sum_k e_k and T = sum_k e_k (z_k - m):
//
//   p_k = e_k / S,   H(p) = log S - T / S
//
// so a logit costs one exponential and a row one logarithm; the logarithms of the mean are taken once
// per class, not once per member. The exponentials bind (some 25 operations per vector of logits),
// and memory next.
//
// A work item is a tile of examples. Its sums over the members, [tile, K], stay in cache while all
// members stream by. Two mappings by the number of classes: examples in the lanes
// (uncertainty_columns-inl.h), and from kManyClasses on classes in the lanes
// (uncertainty_rows-inl.h). Sums over members go in blocks of kMemberBlock, whose sums are added in
// order: an example's results depend on nothing beside it.

#include "kernels/cpu/wide-inl.h"
#include "kernels/cpu/elementary-inl.h"

namespace pyens::PYENS_ISA::uncertainty {

constexpr int64_t kManyClasses = 128;
constexpr int64_t kMemberBlock = 32;
constexpr int64_t kClassBlock = 16;      // sums over the lanes' own classes, likewise
constexpr int64_t kTileElements = 2048;  // of a member: 8 KB of float at a time
constexpr int64_t kFewTiles = 16;  // fewer tiles than this: smaller ones, for the threads' sake

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// e^x for x <= 0, 0 below about -87 where it is subnormal; d = x, but finite where e^x is 0.
template <class V>
inline __attribute__((always_inline)) V exp_or_zero(V x, V& d) {
  if constexpr (std::is_same_v<V, Wide<float>>) {
    const V low = broadcast<V>(-87.0f);
    d = x < low ? low : x;
    V r;
    const V scale = exp2_integer(split_exponent(d, r));
    const V e = madd(exp_polynomial(r), scale, scale);
    return x < low ? V{} : e;
  } else {
    const V low = broadcast<V>(-745.0);
    d = x < low ? low : x;
    V e{};
    for (int i = 0; i < lanes_of<V>(); ++i) e[i] = std::exp(x[i]);
    return e;
  }
}

template <class V>
inline __attribute__((always_inline)) V log_of(V x) {
  if constexpr (std::is_same_v<V, Wide<float>>) {
    return log_positive(x);
  } else {
    for (int i = 0; i < lanes_of<V>(); ++i) x[i] = std::log(x[i]);
    return x;
  }
}

// x log x; 0 for 0 and for what is subnormal.
template <class Real>
inline __attribute__((always_inline)) Wide<Real> x_log_x(Wide<Real> x) {
  using V = Wide<Real>;
  const V product = x * log_of(x);
  return x < broadcast<V>(std::numeric_limits<Real>::min()) ? V{} : product;
}

inline bool classes_in_lanes(const UncertaintyParams& p) { return p.classes >= kManyClasses; }

template <class Real>
int64_t tile_size(const UncertaintyParams& p) {
  const int64_t unit = classes_in_lanes(p) ? 1 : kWideLanes<Real>;
  int64_t units = std::max<int64_t>(1, kTileElements / (p.classes * unit));
  while (units > 1 && p.batch < kFewTiles * units * unit) units /= 2;
  return units * unit;
}

// What all members add up to, for the examples of a tile: by columns [group][k][lane], by rows
// [example][k].
template <class Real>
struct Scratch {
  int64_t width;        // elements of a row or of a group's columns
  Real* member;         // one row or group of one member: logits, then their exponentials
  Real* rows;           // by columns: where rows are copied that cannot be read in place
  Real *block, *total;  // sums of probabilities: of a block of members, of all
  double* entropy;      // sums of entropies
  int32_t* votes;
  int32_t* bad;  // per example the first member whose row is no distribution, or -1
  size_t bytes;

  Scratch(const UncertaintyParams& p, void* base) {
    constexpr int64_t N = kWideLanes<Real>;
    const int64_t tile = tile_size<Real>(p);
    const bool by_rows = classes_in_lanes(p);
    const int64_t units = by_rows ? tile : tile / N;
    width = by_rows ? round_up(p.classes, N) : std::max<int64_t>(p.classes, 4) * N;
    bytes = 0;
    auto take = [&](auto*& pointer, int64_t n) {
      using T = std::remove_reference_t<decltype(*pointer)>;
      pointer = base ? reinterpret_cast<T*>(static_cast<char*>(base) + bytes) : nullptr;
      bytes += (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    };
    take(member, width);
    take(rows, by_rows ? 0 : N * round_up(p.classes, N));
    take(block, units * width);
    take(total, units * width);
    take(entropy, tile);
    take(votes, units * width);
    take(bad, tile);
  }
};

template <class Real>
void clear(const UncertaintyParams& p, const Scratch<Real>& s) {
  const int64_t tile = tile_size<Real>(p);
  const int64_t n = (classes_in_lanes(p) ? tile : tile / kWideLanes<Real>)*s.width;
  std::fill(s.block, s.block + n, 0);
  std::fill(s.total, s.total + n, 0);
  std::fill(s.votes, s.votes + n, 0);
  std::fill(s.entropy, s.entropy + tile, 0);
  std::fill(s.bad, s.bad + tile, -1);
}

// total += block, block = 0, for n elements, a multiple of the lanes.
template <class Real>
void fold(Real* block, Real* total, int64_t n) {
  using V = Wide<Real>;
  for (int64_t i = 0; i < n; i += kWideLanes<Real>) {
    store(total + i, load<V>(total + i) + load<V>(block + i));
    store(block + i, V{});
  }
}

// n lanes of v to elements `at` and following of a result.
template <class T, class Real>
inline void store_result(void* result, int64_t at, Wide<Real> v, int64_t n) {
  store_wide_first<Real>(static_cast<T*>(result) + at, v, n);
}

// Entropies are summed in double, for their difference is what the members disagree on.
template <class Real>
using Entropies = Vec<double, kWideLanes<Real>>;

template <class Real>
inline __attribute__((always_inline)) Entropies<Real> to_double(Wide<Real> v) {
  return __builtin_convertvector(v, Entropies<Real>);
}

// The measures of up to a vector of examples from b on.
template <class T, class Real>
void store_measures(const UncertaintyParams& p, int64_t b, int64_t n,
                    const Entropies<Real>& entropy_of_mean, const Entropies<Real>& entropy_sum,
                    Wide<Real> most_votes) {
  using V = Wide<Real>;
  using D = Entropies<Real>;
  const D members = broadcast<D>(static_cast<double>(p.ensemble_size));
  const D total = at_least(D{}, entropy_of_mean), expected = at_least(D{}, entropy_sum / members);
  const D information = at_least(D{}, total - expected);
  const V disagreement =
      broadcast<V>(Real{1}) - most_votes / broadcast<V>(static_cast<Real>(p.ensemble_size));
  const V expected_entropy = __builtin_convertvector(expected, V);
  store_result<T, Real>(p.predictive_entropy, b, __builtin_convertvector(total, V), n);
  store_result<T, Real>(p.expected_entropy, b, expected_entropy, n);
  store_result<T, Real>(p.mutual_information, b, __builtin_convertvector(information, V), n);
  store_result<T, Real>(p.distribution_pv, b, __builtin_convertvector(information * members, V), n);
  store_result<T, Real>(p.vote_disagreement, b,
                        expected_entropy != expected_entropy ? expected_entropy : disagreement, n);
}

}  // namespace pyens::PYENS_ISA::uncertainty

#include "kernels/cpu/uncertainty_columns-inl.h"
#include "kernels/cpu/uncertainty_moments-inl.h"
#include "kernels/cpu/uncertainty_rows-inl.h"

namespace pyens::PYENS_ISA::uncertainty {

template <class Real>
int64_t work_items(const UncertaintyParams& p) {
  const int64_t tile = tile_size<Real>(p);
  return (p.batch + tile - 1) / tile;
}

template <class Real>
size_t scratch_bytes(const UncertaintyParams& p) {
  return Scratch<Real>(p, nullptr).bytes;
}

template <class T, class Real>
void run(const UncertaintyParams& p, int64_t begin, int64_t end, void* base) {
  const Scratch<Real> s(p, base);
  const int64_t tile = tile_size<Real>(p);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item * tile, examples = std::min(tile, p.batch - b);
    clear(p, s);
    if (classes_in_lanes(p)) {
      run_rows<T>(p, b, examples, s);
    } else {
      run_columns<T>(p, b, examples, s);
    }
    p.bad_rows[item] = -1;
    for (int64_t i = examples; i-- > 0;) {
      if (s.bad[i] >= 0) p.bad_rows[item] = s.bad[i] * p.batch + b + i;
    }
  }
}

template <class T, class Real>
constexpr UncertaintyFunctions kUncertainty = {work_items<Real>, scratch_bytes<Real>, run<T, Real>};
template <class T, class Real>
constexpr MomentsFunctions kMoments = {moments_work_items, moments_scratch_bytes<Real>,
                                       run_moments<T, Real>};

}  // namespace pyens::PYENS_ISA::uncertainty
