// Predictive uncertainty and moments on one instruction set: reductions over the member axis.
//
// Every member's output is read once. With z a row of logits, m its largest, e_k = e^(z_k - m),
// S = sum_k e_k and T = sum_k e_k (z_k - m):
//
//   p_k = e_k / S,   H(p) = log S - T / S
//
// so a logit costs one exponential and a row one logarithm; the logarithms of the mean are taken once
// per class, not once per member.
//
// What members disagree on is a small difference of large entropies: of members as sure as 1 - 1e-7 it
// is some 1e-9, where entropies in float32 are off by 1e-7. So logits are exact in double, and
// everything made of them is double. Sums over members are of differences from the first one: members
// that are equal differ by exactly 0. The exponentials bind (some 20 operations per vector of 8
// doubles, of 26), memory does not.
//
// A work item is a tile of examples. Its sums over the members, [tile, K], stay in cache while all
// members stream by. Two mappings by the number of classes: examples in the lanes
// (uncertainty_columns-inl.h), and from kManyClasses on classes in the lanes
// (uncertainty_rows-inl.h). An example's results depend on nothing beside it.

#include "kernels/cpu/wide-inl.h"
#include "kernels/cpu/elementary-inl.h"

namespace pyens::PYENS_ISA::uncertainty {

constexpr int64_t kManyClasses = 128;
constexpr int64_t kTileElements =
    1024;  // of a member: 8 KB of sums, and as much of what they are relative to
constexpr int64_t kFewTiles = 16;  // fewer tiles than this: smaller ones, for the threads' sake

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

using Doubles = Wide<double>;
constexpr int64_t kDoubles = kWideLanes<double>;

template <class Real>
inline __attribute__((always_inline)) Doubles load_doubles(const Real* p) {
  return __builtin_convertvector(load<Vec<Real, kDoubles>>(p), Doubles);
}
template <class Real>
inline __attribute__((always_inline)) void store_doubles(Real* p, Doubles v) {
  store(p, __builtin_convertvector(v, Vec<Real, kDoubles>));
}

// x log x; 0 for 0 and for what is subnormal.
inline __attribute__((always_inline)) Doubles x_log_x(Doubles x) {
  const Doubles product = x * log_of_doubles(x);
  return x < broadcast<Doubles>(std::numeric_limits<double>::min()) ? Doubles{} : product;
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
  int64_t width;  // elements of a row or of a group's columns
  Real* member;   // one row or group of one member
  Real* rows;     // by columns: where rows are copied that cannot be read in place
  double* exponentials;
  double *first, *sum;                  // the first member's probabilities; differences from them
  double *first_entropy, *entropy_sum;  // of its entropy; of differences from it
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
    take(exponentials, by_rows ? width : p.classes * kDoubles);
    take(first, units * width);
    take(sum, units * width);
    take(first_entropy, tile);
    take(entropy_sum, tile);
    take(votes, units * width);
    take(bad, tile);
  }
};

template <class Real>
void clear(const UncertaintyParams& p, const Scratch<Real>& s) {
  const int64_t tile = tile_size<Real>(p);
  const int64_t n = (classes_in_lanes(p) ? tile : tile / kWideLanes<Real>)*s.width;
  std::fill(s.sum, s.sum + n, 0);
  std::fill(s.votes, s.votes + n, 0);
  std::fill(s.entropy_sum, s.entropy_sum + tile, 0);
  std::fill(s.bad, s.bad + tile, -1);
}

// Probabilities p of one member, and of the first one: into its place, or their difference to the sum.
inline __attribute__((always_inline)) void add_member(bool is_first, Doubles p, double* first,
                                                      double* sum) {
  if (is_first) {
    store(first, p);
  } else {
    store(sum, load<Doubles>(sum) + (p - load<Doubles>(first)));
  }
}

// n lanes of v to elements `at` and following of a result.
template <class T, class Real>
inline void store_result(void* result, int64_t at, Wide<Real> v, int64_t n) {
  store_wide_first<Real>(static_cast<T*>(result) + at, v, n);
}

// What is known of up to a vector of examples once all members have been seen.
template <class Real>
struct Measures {
  static constexpr int64_t N = kWideLanes<Real>;
  Real total[N], expected[N], information[N], variation[N], disagreement[N];

  // Of kDoubles examples from lane l on: entropies of the mean and of the first member, both from their
  // probabilities; the latter's own and the sum of differences from it; the most votes for a class.
  void set(const UncertaintyParams& p, int64_t l, Doubles of_mean, Doubles of_first,
           Doubles first_entropy, Doubles entropy_sum, Doubles most_votes) {
    const Doubles members = broadcast<Doubles>(static_cast<double>(p.ensemble_size));
    const Doubles mean_difference = entropy_sum / members;
    const Doubles of_members = at_least(Doubles{}, first_entropy + mean_difference);
    const Doubles disagreed = at_least(Doubles{}, (of_mean - of_first) - mean_difference);
    const Doubles minority = broadcast<Doubles>(1.0) - most_votes / members;
    store_doubles(total + l, at_least(Doubles{}, of_mean));
    store_doubles(expected + l, of_members);
    store_doubles(information + l, disagreed);
    store_doubles(variation + l, disagreed * members);
    store_doubles(disagreement + l, of_members != of_members ? of_members : minority);
  }

  // The first n of them, of the examples from b on.
  template <class T>
  void write(const UncertaintyParams& p, int64_t b, int64_t n) const {
    using V = Wide<Real>;
    store_result<T, Real>(p.predictive_entropy, b, load<V>(total), n);
    store_result<T, Real>(p.expected_entropy, b, load<V>(expected), n);
    store_result<T, Real>(p.mutual_information, b, load<V>(information), n);
    store_result<T, Real>(p.distribution_pv, b, load<V>(variation), n);
    store_result<T, Real>(p.vote_disagreement, b, load<V>(disagreement), n);
  }
};

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
constexpr MomentsFunctions kMoments = {moments_work_items, moments_scratch_bytes,
                                       run_moments<T, Real>};

}  // namespace pyens::PYENS_ISA::uncertainty
