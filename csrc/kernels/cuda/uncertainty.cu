// Predictive uncertainty and moments on the GPU: reductions over the member axis.
//
// Every member's output is read once from memory. With z a row of logits, m its largest,
// e_k = e^(z_k - m), S = sum_k e_k and T = sum_k e_k (z_k - m):
//
//   p_k = e_k / S,   H(p) = log S - T / S
//
// Mapping: a group of lanes of one warp has an example (as many lanes as there are classes, rounded
// up to a power of two, at most 32), and goes through its members in order; neighbouring groups have
// neighbouring examples, so a warp reads neighbouring rows. A lane keeps what belongs to its own
// classes k = lane, lane + width, ... in shared memory (in global memory where that is too small), so
// there is nothing to wait for: the group meets only in shuffles.
//
// As on the CPU, everything made of logits is double, and sums over members are of differences from the
// first one: cpu/uncertainty-inl.h says why. Bound by the exponentials in double, some 30 operations
// each, at the rate the GPU has for them: half of float's on data center GPUs, where reading 4 E B K
// bytes takes nearly as long, but a 64th on others, which pay ten times the time of memory for it. Every
// lane's sum is the same for any examples beside, and the lanes' sums meet in one order: the same bits
// in every run.
//
// Moments: a thread per element, members in order, sums in double as on the CPU.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels/cuda/common.cuh"
#include "kernels/uncertainty.h"

namespace pyens {
namespace {

constexpr int kThreads = 128;

// How an example's classes are spread, and where what is kept of them lies.
struct Plan {
  int width;                 // lanes of an example
  unsigned threads, blocks;  // a block has threads / width examples at a time
  int64_t example_bytes;
  bool in_shared;
};

Plan make_plan(const UncertaintyParams& p) {
  Plan plan{};
  plan.width = 1;
  while (plan.width < 32 && plan.width < p.classes) plan.width *= 2;
  // An exponential, the first member's probability, a sum and a count of votes for each class.
  plan.example_bytes =
      ceil_div(p.classes * static_cast<int64_t>(3 * sizeof(double) + sizeof(int32_t)), 16) * 16;
  const int64_t limit = shared_limit();
  const auto fits = [&](int64_t threads) {
    return threads / plan.width * plan.example_bytes <= limit;
  };
  plan.threads = fits(kThreads) || !fits(32) ? kThreads : 32;
  plan.in_shared = fits(plan.threads);
  plan.blocks = striding_blocks(p.batch * plan.width, plan.threads);
  return plan;
}

// e^x for x <= 0, 0 where it is subnormal, as on the CPU.
__device__ inline double exp_or_zero(double x) { return x < -708.0 ? 0.0 : exp(x); }

// x log x; 0 for 0 and for what is subnormal.
__device__ inline double x_log_x(double x) {
  return x < smallest_normal<double>() ? 0.0 : x * log(x);
}

__device__ inline double not_below_zero(double x) {
  return x < 0.0 ? 0.0 : x;  // NaN stays
}

// Class k of what a member says of example b.
template <class T>
__device__ inline Real<T> load_class(const UncertaintyParams& p, int64_t member, int64_t b,
                                     int64_t k) {
  using R = Real<T>;
  const T* row = static_cast<const T*>(p.members) + member * p.member_stride + b * p.row_stride;
  if (!p.binary) return to_real(row[k]);
  const R v = to_real(row[0]);
  if (p.from_probabilities) return k == 0 ? R(1) - v : v;
  // sigmoid(inf) is 1, though inf - inf is NaN.
  const R largest = sizeof(R) == 4 ? R(3.402823466385288e38) : R(1.7976931348623157e308);
  return k == 0 ? R(0) : v > largest ? largest : v;
}

// One example, as its group of lanes goes through it.
template <class T>
struct Example {
  using R = Real<T>;
  const UncertaintyParams& p;
  int64_t b;
  int lane, width;
  double *exponentials, *first, *sum;  // [classes], each lane's own ones
  int32_t* votes;
  double first_entropy, entropy_sum;  // the first member's, and of differences from it
  bool bad;                           // some member's row is no distribution

  __device__ Example(const UncertaintyParams& params, int64_t example, int lane_of_group, int lanes,
                     void* memory)
      : p(params),
        b(example),
        lane(lane_of_group),
        width(lanes),
        exponentials(static_cast<double*>(memory)),
        first(exponentials + params.classes),
        sum(first + params.classes),
        votes(reinterpret_cast<int32_t*>(sum + params.classes)),
        first_entropy(0),
        entropy_sum(0),
        bad(false) {
    for (int64_t k = lane; k < p.classes; k += width) {
      sum[k] = 0;
      votes[k] = 0;
    }
  }

  // A member's probability of class k: into its place for the first one, else the difference to the sum.
  __device__ void add_probability(int64_t member, int64_t k, double probability) {
    if (member == 0) {
      first[k] = probability;
    } else {
      sum[k] += probability - first[k];
    }
  }
  __device__ void add_entropy(int64_t member, double entropy) {
    if (member == 0) {
      first_entropy = entropy;
    } else {
      entropy_sum += entropy - first_entropy;
    }
  }

  // The first class with the largest value gets the vote.
  __device__ R vote(int64_t member) {
    R best = -INFINITY;
    int64_t at = p.classes;
    for (int64_t k = lane; k < p.classes; k += width) {
      const R v = load_class<T>(p, member, b, k);
      if (at == p.classes || v > best) {
        best = v;
        at = k;
      }
    }
    for (int bit = width / 2; bit > 0; bit /= 2) {
      const R other = __shfl_xor_sync(kWholeWarp, best, bit);
      const int64_t other_at = __shfl_xor_sync(kWholeWarp, at, bit);
      if (other > best || (other == best && other_at < at)) {
        best = other;
        at = other_at;
      }
    }
    // With a NaN among them the lanes need not agree; the first one always has a class.
    at = __shfl_sync(kWholeWarp, at, 0, width);
    if (at % width == lane) ++votes[at];
    return best;
  }

  __device__ void add_logits(int64_t member, R largest) {
    double whole = 0, weighted = 0;
    for (int64_t k = lane; k < p.classes; k += width) {
      const double d =
          static_cast<double>(load_class<T>(p, member, b, k)) - static_cast<double>(largest);
      const double e = exp_or_zero(d);
      exponentials[k] = e;
      whole += e;
      if (e != 0.0) weighted = fma(e, d, weighted);
    }
    whole = sum_lanes(whole, width);
    weighted = sum_lanes(weighted, width);
    const double scale = 1.0 / whole;
    // __dmul_rn: a product fused with the subtraction would tell equal members apart.
    for (int64_t k = lane; k < p.classes; k += width) {
      add_probability(member, k, __dmul_rn(exponentials[k], scale));
    }
    add_entropy(member, log(whole) - weighted * scale);
  }

  __device__ void add_probabilities(int64_t member) {
    double whole = 0, entropy = 0;
    int negative = 0;
    for (int64_t k = lane; k < p.classes; k += width) {
      const double v = static_cast<double>(load_class<T>(p, member, b, k));
      negative |= v < 0.0;
      whole += v;
      entropy -= x_log_x(v);
      add_probability(member, k, v);
    }
    whole = sum_lanes(whole, width);
    add_entropy(member, sum_lanes(entropy, width));
    const double off = whole - 1.0;
    bad |= sum_lanes(negative, width) > 0 || off > p.sum_tolerance || off < -p.sum_tolerance;
  }

  // Stores nothing if the example is only there to fill the warp.
  __device__ void finish(bool exists) {
    const double members = static_cast<double>(p.ensemble_size);
    double of_mean = 0, of_first = 0;
    int32_t most = 0;
    for (int64_t k = lane; k < p.classes; k += width) {
      const double mean = bad ? NAN : first[k] + sum[k] / members;
      of_mean -= x_log_x(mean);
      of_first -= x_log_x(first[k]);
      most = max(most, votes[k]);
      if (!exists) continue;
      T* out = static_cast<T*>(p.mean_probability);
      if (!p.binary) {
        from_real(static_cast<R>(mean), out + b * p.classes + k);
      } else if (k == 1) {
        from_real(static_cast<R>(mean), out + b);
      }
      if (p.votes) p.votes[b * p.classes + k] = votes[k];
    }
    of_mean = sum_lanes(of_mean, width);
    of_first = sum_lanes(of_first, width);
    for (int bit = width / 2; bit > 0; bit /= 2) {
      most = max(most, __shfl_xor_sync(kWholeWarp, most, bit));
    }
    if (!exists || lane != 0) return;
    const double mean_difference = entropy_sum / members;
    const double expected = bad ? NAN : not_below_zero(first_entropy + mean_difference);
    const double information = not_below_zero((of_mean - of_first) - mean_difference);
    store(p.predictive_entropy, not_below_zero(of_mean));
    store(p.expected_entropy, expected);
    store(p.mutual_information, information);
    store(p.distribution_pv, information * members);
    store(p.vote_disagreement, expected != expected ? expected : 1.0 - most / members);
  }
  __device__ void store(void* result, double value) const {
    from_real(static_cast<R>(value), static_cast<T*>(result) + b);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 5)
    uncertainty_kernel(const UncertaintyParams p, const Plan plan, unsigned char* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % plan.width;
  const int64_t group = threadIdx.x / plan.width, groups = plan.threads / plan.width;
  unsigned char* memory = plan.in_shared
                              ? dynamic_shared<unsigned char>() + group * plan.example_bytes
                              : scratch + (blockIdx.x * groups + group) * plan.example_bytes;
  // The same number of rounds for all of a warp: groups beyond the last example take that one.
  for (int64_t first = blockIdx.x * groups; first < p.batch; first += gridDim.x * groups) {
    const int64_t b = min(first + group, p.batch - 1);
    Example<T> example(p, b, lane, plan.width, memory);
    for (int64_t m = 0; m < p.ensemble_size; ++m) {
      const Real<T> largest = example.vote(m);
      if (p.from_probabilities) {
        example.add_probabilities(m);
      } else {
        example.add_logits(m, largest);
      }
    }
    example.finish(first + group < p.batch);
  }
}

// --- moments -------------------------------------------------------------------------------------

// Sums of differences from the first member, and of their squares: cpu/uncertainty_moments-inl.h has the
// formulas.
struct MomentsOf {
  double mean, std, epistemic;
};

template <class T>
__device__ MomentsOf moments_of(const MomentsParams& p, const T* x, double low, double high,
                                double nan) {
  constexpr bool kCanLeaveRange = sizeof(T) == 8;  // no square of a float leaves double's
  const double members = static_cast<double>(p.ensemble_size);
  int exponent = 0;  // all is times 2^-exponent
  const auto scaled = [&](const T& v) {
    const double d = static_cast<double>(to_real(v));
    return kCanLeaveRange && exponent != 0 ? ldexp(d, -exponent) : d;
  };
  double sum = 0, raw = 0;
  const auto add_members = [&] {
    const double first = scaled(*x);
    sum = raw = 0;
    for (int64_t m = 0; m < p.ensemble_size; ++m) {
      const double d = scaled(x[m * p.outputs_stride]) - first;
      sum += d;
      raw = fma(d, d, raw);
    }
  };
  add_members();
  if (kCanLeaveRange && nan == 0.0 && isfinite(low) && isfinite(high) && low != high &&
      (!isfinite(sum) || !isfinite(raw) || raw < 1e-280)) {
    exponent = ilogb(max(fabs(low), fabs(high)));
    add_members();
  }
  const double squares = not_below_zero(raw - sum * sum / members);
  MomentsOf result = {scaled(*x) + sum / members, sqrt(squares / (members - 1.0)),
                      squares / members};
  // Infinities of one sign are their own mean.
  if (sum - sum != 0.0) result.mean = nan != nan ? nan : low + high;
  if (!kCanLeaveRange || exponent == 0) return result;
  return {ldexp(result.mean, exponent), ldexp(result.std, exponent),
          ldexp(result.epistemic, 2 * exponent)};
}

template <class T>
__global__ void __launch_bounds__(kThreads, 8) moments_kernel(const MomentsParams p) {
  const auto store = [](void* to, int64_t i, double value) {
    from_real(static_cast<Real<T>>(value), static_cast<T*>(to) + i);
  };
  for (int64_t i = first_item(); i < p.size; i += all_threads()) {
    const T* x = static_cast<const T*>(p.outputs) + i;
    double low = static_cast<double>(to_real(*x)), high = low, nan = 0;
    for (int64_t m = 0; m < p.ensemble_size; ++m) {
      const double v = static_cast<double>(to_real(x[m * p.outputs_stride]));
      low = v < low ? v : low;
      high = v > high ? v : high;
      nan = v != v ? v : nan;
    }
    const MomentsOf moments = moments_of(p, x, low, high, nan);
    store(p.mean, i, moments.mean);
    store(p.std, i, moments.std);
    store(p.min, i, nan != nan ? nan : low);
    store(p.max, i, nan != nan ? nan : high);
    store(p.epistemic, i, moments.epistemic);
    if (!p.variances) continue;
    const T* variance = static_cast<const T*>(p.variances) + i;
    const double members = static_cast<double>(p.ensemble_size);
    double total = 0;
    for (int64_t m = 0; m < p.ensemble_size; ++m) {
      total += static_cast<double>(to_real(variance[m * p.variances_stride]));
    }
    double aleatoric = total / members;
    if (sizeof(T) == 8 && isinf(aleatoric)) {
      aleatoric = 0;  // the sum may be too large, the mean not
      for (int64_t m = 0; m < p.ensemble_size; ++m) {
        aleatoric += static_cast<double>(to_real(variance[m * p.variances_stride])) / members;
      }
    }
    store(p.aleatoric, i, aleatoric);
  }
}

}  // namespace

namespace uncertainty_cuda {

size_t scratch_bytes(const UncertaintyParams& p) {
  const Plan plan = make_plan(p);
  const int64_t examples = int64_t{plan.blocks} * (plan.threads / plan.width);
  return plan.in_shared ? 0 : static_cast<size_t>(examples * plan.example_bytes);
}

const char* run(const UncertaintyParams& p, void* scratch, void* stream) {
  if (p.batch == 0) return nullptr;
  const Plan plan = make_plan(p);
  const int64_t shared = plan.in_shared ? plan.threads / plan.width * plan.example_bytes : 0;
  return by_dtype(p.dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    return launch(uncertainty_kernel<T>, plan.blocks, plan.threads, static_cast<size_t>(shared),
                  stream, p, plan, static_cast<unsigned char*>(scratch));
  });
}

const char* run(const MomentsParams& p, void* stream) {
  if (p.size == 0) return nullptr;
  return by_dtype(p.dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    return launch(moments_kernel<T>, striding_blocks(p.size, kThreads), kThreads, 0, stream, p);
  });
}

}  // namespace uncertainty_cuda
}  // namespace pyens
