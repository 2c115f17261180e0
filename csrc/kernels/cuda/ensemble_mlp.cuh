// What the kernels of the ensemble MLP share: those among which ensemble_mlp.cu chooses, and how blocks
// divide the examples.
#pragma once

#include <algorithm>

#include "kernels/cuda/common.cuh"
#include "kernels/dropout.h"
#include "kernels/ensemble_mlp.h"

namespace pyens {

constexpr int kMaxLayers = 32;  // that a kernel's arguments hold

// That many layers with all that a layer may get beside what it has (a norm: kind, epsilon, two pointers
// with their strides; a residual; two scales with their strides) have to fit what a kernel may be given.
constexpr size_t kLayerRoom = 48 + 16 + 32;
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

// Dropout of a member's hidden activation: x / (1 - p) where batch row `row` keeps the unit of this key, else
// 0. NaN at a rate that is none, which nobody on the host has seen.
template <class R>
struct ApplyDropout {
  uint32_t threshold;
  R scale;

  __device__ ApplyDropout(const Dropout& dropout, int64_t member)
      : ApplyDropout(dropout.of(member)) {}
  __device__ explicit ApplyDropout(double p) {
    const bool is_rate = p >= 0 && p < 1;
    threshold = is_rate ? dropout_threshold(p) : 0;
    scale = is_rate ? R(1 / (1 - p)) : static_cast<R>(NAN);
  }
  __device__ R operator()(R x, int64_t row, uint64_t unit_key) const {
    return dropout_hash(static_cast<uint32_t>(row), unit_key) >= threshold ? x * scale : R(0);
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
