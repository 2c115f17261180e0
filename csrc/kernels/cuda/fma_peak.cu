// The ceilings of plain multiply-adds and of `mma.sync`: chains in registers, nothing is read.
//
// Bound by the arithmetic: a warp has 8 chains, a quarter of a multiprocessor 4 warps.

#include "kernels/fma_peak.h"

#include <type_traits>

#include "kernels/cuda/common.cuh"

namespace pyens {
namespace {

constexpr int kThreads = 256, kBlocks = 2, kChains = 8;  // blocks to a multiprocessor

int64_t all_blocks() { return int64_t{kBlocks} * device_attribute(cudaDevAttrMultiProcessorCount); }

template <class R>
__global__ void __launch_bounds__(kThreads, kBlocks) fma_peak_kernel(int64_t rounds, float* sink) {
  R sum[kChains];
  const R factor = R(0.999);
  for (int c = 0; c < kChains; ++c) sum[c] = R(0.1) * (c + static_cast<int>(threadIdx.x));
  for (int64_t i = 0; i < rounds; ++i) {
#pragma unroll
    for (int c = 0; c < kChains; ++c) sum[c] = fma(sum[c], factor, factor);
  }
  R total = 0;
  for (int c = 0; c < kChains; ++c) total += sum[c];
  if (total == R(-1)) *sink = static_cast<float>(total);  // never: all terms are positive
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) mma_peak_kernel(int64_t rounds, float* sink) {
  constexpr const T* kType = nullptr;
  float quarters[kWordElements<T>];  // a round adds 1 to each sum, or 1/2
  for (float& x : quarters) x = 0.25f;
  const uint32_t word = to_word(quarters, kType);
  const uint32_t a[4] = {word, word, word, word};
  float sum[kChains][4] = {};
  for (int64_t i = 0; i < rounds; ++i) {
#pragma unroll
    for (int c = 0; c < kChains; ++c) multiply_tiles(sum[c], a, word, word, kType);
  }
  float total = 0;
  for (int c = 0; c < kChains; ++c) total += sum[c][0] + sum[c][1] + sum[c][2] + sum[c][3];
  if (total == -1.0f) *sink = total;
}

// f(kernel, operations of a block in one round)
template <class F>
auto by_kind(DType dtype, bool tf32, const F& f) {
  constexpr double kPlain = 2.0 * kThreads * kChains;
  constexpr double kTiles = 2.0 * kThreads / 32 * kChains * 16 * 8;  // for each of the depth
  switch (dtype) {
    case DType::float64: return f(fma_peak_kernel<double>, kPlain);
    case DType::bfloat16: return f(mma_peak_kernel<__nv_bfloat16>, kTiles * 16);
    case DType::float16: return f(mma_peak_kernel<__half>, kTiles * 16);
    default: break;
  }
  return tf32 ? f(mma_peak_kernel<float>, kTiles * 8) : f(fma_peak_kernel<float>, kPlain);
}

}  // namespace

namespace fma_peak_cuda {

double operations(DType dtype, bool tf32, int64_t rounds) {
  return by_kind(dtype, tf32, [&](auto, double each) {
    return each * static_cast<double>(rounds) * static_cast<double>(all_blocks());
  });
}

const char* run(DType dtype, bool tf32, int64_t rounds, float* sink, void* stream) {
  return by_kind(dtype, tf32, [&](auto kernel, double) {
    return launch(kernel, static_cast<unsigned>(all_blocks()), kThreads, 0, stream, rounds, sink);
  });
}

}  // namespace fma_peak_cuda
}  // namespace pyens
