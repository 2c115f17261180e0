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
// there is nothing to wait for: the group meets only in shuffles. Bound by memory for many examples
// (4 E B K bytes in float32), by the exponentials where they stay in L2.
//
// Sums over members go in blocks of kMemberBlock, as on the CPU; every lane's sum is the same for any
// examples beside, and the lanes' sums meet in one order: the same bits in every run.
//
// Moments: a thread per element, members in order.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels/cuda/common.cuh"
#include "kernels/uncertainty.h"

namespace pyens {
namespace {

constexpr int kThreads = 128;
constexpr int kMemberBlock = 32;
constexpr int kMomentBlock = 16;

// How an example's classes are spread, and where what is kept of them lies.
struct Plan {
  int width;                 // lanes of an example
  unsigned threads, blocks;  // a block has threads / width examples at a time
  int64_t example_bytes;
  bool in_shared;
};

template <class R>
Plan make_plan(const UncertaintyParams& p) {
  Plan plan{};
  plan.width = 1;
  while (plan.width < 32 && plan.width < p.classes) plan.width *= 2;
  // An exponential, two sums and a count of votes for each class.
  plan.example_bytes =
      ceil_div(p.classes * static_cast<int64_t>(3 * sizeof(R) + sizeof(int32_t)), 16) * 16;
  const int64_t limit = shared_limit();
  const auto fits = [&](int64_t threads) {
    return threads / plan.width * plan.example_bytes <= limit;
  };
  plan.threads = fits(kThreads) || !fits(32) ? kThreads : 32;
  plan.in_shared = fits(plan.threads);
  plan.blocks = striding_blocks(p.batch * plan.width, plan.threads);
  return plan;
}

// e^x for x <= 0, 0 where it is subnormal; d = x, but finite where e^x is 0.
template <class R>
__device__ inline R exp_or_zero(R x, R* d) {
  const R low = sizeof(R) == 4 ? R(-87) : R(-745);
  *d = x < low ? low : x;
  return x < low ? R(0) : exp(*d);
}

// x log x; 0 for 0 and for what is subnormal.
template <class R>
__device__ inline R x_log_x(R x) {
  return x < smallest_normal<R>() ? R(0) : x * log(x);
}

template <class R>
__device__ inline R not_below_zero(R x) {
  return x < R(0) ? R(0) : x;  // NaN stays
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
  R *exponentials, *block, *total;  // [classes], each lane's own ones
  int32_t* votes;
  double entropy_sum;
  bool bad;  // some member's row is no distribution

  __device__ Example(const UncertaintyParams& params, int64_t example, int lane_of_group, int lanes,
                     void* memory)
      : p(params),
        b(example),
        lane(lane_of_group),
        width(lanes),
        exponentials(static_cast<R*>(memory)),
        block(exponentials + params.classes),
        total(block + params.classes),
        votes(reinterpret_cast<int32_t*>(total + params.classes)),
        entropy_sum(0),
        bad(false) {
    for (int64_t k = lane; k < p.classes; k += width) {
      block[k] = total[k] = 0;
      votes[k] = 0;
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
    R sum = 0, weighted = 0;
    for (int64_t k = lane; k < p.classes; k += width) {
      R d;
      const R e = exp_or_zero(load_class<T>(p, member, b, k) - largest, &d);
      exponentials[k] = e;
      sum += e;
      weighted = fma(e, d, weighted);
    }
    sum = sum_lanes(sum, width);
    weighted = sum_lanes(weighted, width);
    const R scale = R(1) / sum;
    for (int64_t k = lane; k < p.classes; k += width) {
      block[k] = fma(exponentials[k], scale, block[k]);
    }
    entropy_sum += static_cast<double>(log(sum) - weighted * scale);
  }

  __device__ void add_probabilities(int64_t member) {
    R sum = 0, entropy = 0;
    int negative = 0;
    for (int64_t k = lane; k < p.classes; k += width) {
      const R v = load_class<T>(p, member, b, k);
      negative |= v < R(0);
      sum += v;
      entropy -= x_log_x(v);
      block[k] += v;
    }
    sum = sum_lanes(sum, width);
    entropy_sum += static_cast<double>(sum_lanes(entropy, width));
    const R off = sum - R(1), tolerance = static_cast<R>(p.sum_tolerance);
    bad |= sum_lanes(negative, width) > 0 || off > tolerance || off < -tolerance;
  }

  __device__ void fold() {
    for (int64_t k = lane; k < p.classes; k += width) {
      total[k] += block[k];
      block[k] = 0;
    }
  }

  // Stores nothing if the example is only there to fill the warp.
  __device__ void finish(bool exists) {
    const R nan = static_cast<R>(NAN), members = static_cast<R>(p.ensemble_size);
    double entropy = 0;
    int32_t most = 0;
    for (int64_t k = lane; k < p.classes; k += width) {
      const R mean = bad ? nan : total[k] / members;
      entropy -= static_cast<double>(x_log_x(mean));
      most = max(most, votes[k]);
      if (!exists) continue;
      T* out = static_cast<T*>(p.mean_probability);
      if (!p.binary) {
        from_real(mean, out + b * p.classes + k);
      } else if (k == 1) {
        from_real(mean, out + b);
      }
      if (p.votes) p.votes[b * p.classes + k] = votes[k];
    }
    entropy = sum_lanes(entropy, width);
    for (int bit = width / 2; bit > 0; bit /= 2) {
      most = max(most, __shfl_xor_sync(kWholeWarp, most, bit));
    }
    if (!exists || lane != 0) return;
    const double count = static_cast<double>(p.ensemble_size);
    const double of_mean = not_below_zero(entropy);
    const double expected = not_below_zero((bad ? NAN : entropy_sum) / count);
    const double information = not_below_zero(of_mean - expected);
    const R disagreement = R(1) - static_cast<R>(most) / members;
    store(p.predictive_entropy, static_cast<R>(of_mean));
    store(p.expected_entropy, static_cast<R>(expected));
    store(p.mutual_information, static_cast<R>(information));
    store(p.distribution_pv, static_cast<R>(information * count));
    store(p.vote_disagreement, expected != expected ? nan : disagreement);
  }
  __device__ void store(void* result, R value) const {
    from_real(value, static_cast<T*>(result) + b);
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
      if ((m + 1) % kMemberBlock == 0 || m + 1 == p.ensemble_size) example.fold();
    }
    example.finish(first + group < p.batch);
  }
}

// --- moments -------------------------------------------------------------------------------------

// Blocks of members: sums, and sums of deviations from the block's first member, merged into mean and
// squared deviations (Chan), the means relative to the first member of all. So members that are equal
// have a spread of exactly 0, and an offset costs no digits.
template <class T>
__global__ void __launch_bounds__(kThreads) moments_kernel(const MomentsParams p) {
  using R = Real<T>;
  const R members = static_cast<R>(p.ensemble_size);
  const auto store = [](void* to, int64_t i, R value) {
    from_real(value, static_cast<T*>(to) + i);
  };
  for (int64_t i = first_item(); i < p.size; i += all_threads()) {
    const T* x = static_cast<const T*>(p.outputs) + i;
    const R origin = to_real(*x);
    R sum = 0, mean = 0, squares = 0, low = origin, high = origin, nan = 0;
    for (int64_t m = 0; m < p.ensemble_size; m += kMomentBlock) {
      const int64_t end = min(m + kMomentBlock, p.ensemble_size);
      const R count = static_cast<R>(end - m), before = static_cast<R>(m);
      const R first = to_real(x[m * p.outputs_stride]);
      R of_block = 0, deviations = 0, block_squares = 0;
      for (int64_t e = m; e < end; ++e) {
        const R v = to_real(x[e * p.outputs_stride]), d = v - first;
        of_block += v;
        deviations += d;
        block_squares = fma(d, d, block_squares);
        low = v < low ? v : low;
        high = v > high ? v : high;
        nan = v != v ? v : nan;
      }
      const R block_mean = first - origin + deviations / count;
      block_squares = not_below_zero(block_squares - deviations * deviations / count);
      const R delta = block_mean - mean;
      if (m == 0) {
        mean = block_mean;
        squares = block_squares;
      } else {
        mean = fma(delta, count / (before + count), mean);
        squares += block_squares + delta * delta * (before * count / (before + count));
      }
      sum += of_block;
    }
    // The sum of equal members, divided, need not be what they are.
    store(p.mean, i, squares == R(0) ? origin : sum / members);
    store(p.std, i, sqrt(squares / (members - R(1))));
    store(p.min, i, nan != nan ? nan : low);
    store(p.max, i, nan != nan ? nan : high);
    store(p.epistemic, i, squares / members);
    if (!p.variances) continue;
    const T* variance = static_cast<const T*>(p.variances) + i;
    R total = 0;
    for (int64_t m = 0; m < p.ensemble_size; m += kMomentBlock) {
      R of_block = 0;
      for (int64_t e = m; e < min(m + kMomentBlock, p.ensemble_size); ++e) {
        of_block += to_real(variance[e * p.variances_stride]);
      }
      total += of_block;
    }
    store(p.aleatoric, i, total / members);
  }
}

Plan plan_for(const UncertaintyParams& p) {
  return p.dtype == DType::float64 ? make_plan<double>(p) : make_plan<float>(p);
}

}  // namespace

namespace uncertainty_cuda {

size_t scratch_bytes(const UncertaintyParams& p) {
  const Plan plan = plan_for(p);
  const int64_t examples = int64_t{plan.blocks} * (plan.threads / plan.width);
  return plan.in_shared ? 0 : static_cast<size_t>(examples * plan.example_bytes);
}

const char* run(const UncertaintyParams& p, void* scratch, void* stream) {
  if (p.batch == 0) return nullptr;
  const Plan plan = plan_for(p);
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
