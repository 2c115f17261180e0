// What the kernels of the ensemble MLP share: those among which ensemble_mlp.cu chooses, and how blocks
// divide the examples.
#pragma once

#include <algorithm>

#include "kernels/cuda/common.cuh"
#include "kernels/dropout.h"
#include "kernels/ensemble_mlp.h"

namespace pyens {

constexpr int kMaxLayers = 32;  // that a kernel's arguments hold

// That many layers with what a layer may get beside what it has (two scales with their strides) have to fit
// what a kernel may be given.
constexpr size_t kLayerRoom = 32;
template <class Arguments>
constexpr bool kLeavesRoom = sizeof(Arguments) + kMaxLayers * kLayerRoom <= kMaxArgumentBytes;

// Inputs of a chain of multiply-adds, in float32 and float64; chains are added in order, as on the CPU.
constexpr int kChain = 128;

// Shared memory has 32 banks of 32-bit words: rows of an odd length start in different banks.
template <class Int>
__host__ __device__ inline Int bank_stride(Int width) {
  return width | 1;
}

// Activation strength, value = (h - mean) * scale: scale = 1 / std; infinite, and the value 0, if std is below
// any normal number.
template <class R>
__device__ inline R strength_scale(R std) {
  return fabs(std) < smallest_normal<R>() ? static_cast<R>(INFINITY) : R(1) / std;
}
template <class R>
__device__ inline R strength_value(R h, R mean, R scale) {
  return scale == static_cast<R>(INFINITY)
             ? R(0)
             : (h - mean) * scale;  // a NaN in a dead unit gives 0 too
}

// Whose parameters the members of a call have. What the GPU is given as an index nobody on the host has seen:
// one that is out of range reads the first member's, and what comes of them is NaN.
struct Members {
  const int64_t* indices;  // nullptr: their own
  int64_t stored;

  Members() = default;
  explicit Members(const EnsembleMLP& mlp) : indices(mlp.members), stored(mlp.stored_members) {}

  __device__ bool exists(int64_t member) const {
    return !indices || (indices[member] >= 0 && indices[member] < stored);
  }
  __device__ int64_t parameters_of(int64_t member) const {
    return !indices ? member : exists(member) ? indices[member] : 0;
  }
};

// Dropout of a member's hidden activation: x / (1 - p) where batch row `row` keeps the unit of this key, else
// 0. NaN at a rate that is none, which nobody on the host has seen.
template <class R>
struct ApplyDropout {
  uint32_t threshold;
  R scale;

  __device__ ApplyDropout(const Dropout& dropout, int64_t member, int64_t layer)
      : ApplyDropout(dropout.of(member, layer)) {}
  __device__ explicit ApplyDropout(double p) {
    const bool is_rate = p >= 0 && p < 1;
    threshold = is_rate ? dropout_threshold(p) : 0;
    scale = is_rate ? R(1 / (1 - p)) : static_cast<R>(NAN);
  }
  __device__ R operator()(R x, int64_t row, uint64_t unit_key) const {
    return dropout_hash(static_cast<uint32_t>(row), unit_key) >= threshold ? x * scale : R(0);
  }
};

// --- norms -----------------------------------------------------------------------------------------

// Over the features f of an example that a warp has, in all its lanes: sum <- add(sum, f) for every 32nd
// feature, then the lanes' sums in a tree. The order depends on the number of features alone.
template <class R, class F>
__device__ inline R sum_features(int features, const F& add) {
  R sum = 0;
  for (int f = static_cast<int>(threadIdx.x) % 32; f < features; f += 32) sum = add(sum, f);
  return sum_lanes(sum);
}

// What a norm subtracts from an example, and multiplies it by then.
template <class R>
struct NormOfExample {
  R mean, scale;
};
// at(f): feature f; sum(add): as sum_features.
template <class R, class At, class Sum>
__device__ inline NormOfExample<R> norm_of_example(const MLPNorm& norm, int features, const At& at,
                                                   const Sum& sum) {
  const R count = static_cast<R>(features);
  R mean = 0;
  if (norm.kind == NormKind::layer_norm) {
    mean = sum([&](R total, int f) { return total + at(f); }) / count;
  }
  const R squares = sum([&](R total, int f) {
    const R x = at(f) - mean;
    return fma(x, x, total);
  });
  return {mean, R(1) / sqrt(squares / count + static_cast<R>(norm.epsilon))};
}

// Weight and bias of a member's norm.
template <class T>
struct NormParameters {
  const T *weight, *bias;

  __device__ NormParameters(const MLPNorm& norm, int64_t parameters)
      : weight(static_cast<const T*>(norm.weight.data)),
        bias(static_cast<const T*>(norm.bias.data)) {
    if (weight) weight += parameters * norm.weight.member_stride;
    if (bias) bias += parameters * norm.bias.member_stride;
  }
  __device__ Real<T> weight_of(int f) const { return weight ? to_real(weight[f]) : Real<T>(1); }
  // Of what has been normalized.
  __device__ Real<T> operator()(Real<T> x, int f) const {
    return fma(x, weight_of(f), bias ? to_real(bias[f]) : Real<T>(0));
  }
};

// With fewer examples, lanes and warps of the kernels for batches idle.
constexpr int64_t kFewExamples = 64;

// On tensor cores: 16-bit types, and float32 where TF32 is allowed.
namespace ensemble_mlp_mma {
bool takes(const EnsembleMLPParams& params, bool tf32);
const char* run(const EnsembleMLPParams& params, bool tf32, void* stream);
}  // namespace ensemble_mlp_mma

// Batches of float32.
namespace ensemble_mlp_fma {
bool takes(const EnsembleMLPParams& params);
const char* run(const EnsembleMLPParams& params, void* stream);
}  // namespace ensemble_mlp_fma

// The batch in tiles, one to a warp at a time, and the tiles in spans, one to a block.
struct Spans {
  int tiles, tiles_each, per_member;
  unsigned blocks;

  // About 8 rounds of as many blocks as fit at once: the last round costs little then, and weights are
  // not copied for few examples. Every warp has a tile. nullptr, or why it cannot be.
  const char* cut(const EnsembleMLPParams& params, int64_t tile_examples, int64_t warps,
                  int64_t blocks_per_multiprocessor) {
    const int64_t at_once =
        blocks_per_multiprocessor * device_attribute(cudaDevAttrMultiProcessorCount);
    const int64_t rounds = ceil_div(8 * at_once, params.ensemble_size);
    const int64_t all = ceil_div(params.batch, tile_examples);
    const int64_t each = ceil_div(all, std::min(rounds, ceil_div(all, warps)));
    const int64_t spans = ceil_div(all, each);
    if (all * tile_examples > INT32_MAX || params.ensemble_size * spans > INT32_MAX) {
      return "too many tiles for one launch";
    }
    tiles = static_cast<int>(all);
    tiles_each = static_cast<int>(each);
    per_member = static_cast<int>(spans);
    blocks = static_cast<unsigned>(params.ensemble_size * spans);
    return nullptr;
  }
};

}  // namespace pyens
