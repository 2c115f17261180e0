// Stands in for CUDA's own header where kernels are run by tests/cpp/emulation: just what they use.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

using dim3 = emulation::Dim3;
#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

// --- synchronisation -----------------------------------------------------------------------------
// Whole blocks and whole warps only; every thread must come from the same line.

inline void __syncthreads(int line = __builtin_LINE()) { emulation::block_barrier(line); }

inline void emulated_whole_warp(unsigned mask) {
  if (mask != 0xffffffffu) emulation::fail("barrier: a mask that is not the whole warp");
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  emulated_whole_warp(mask);
  emulation::warp_barrier(line);
}

// --- shuffles and votes --------------------------------------------------------------------------

template <class T>
T emulated_exchange(unsigned mask, T value, unsigned from, int line) {
  emulated_whole_warp(mask);
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulation::exchange(bits, from, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, int line = __builtin_LINE()) {
  const unsigned lane = emulation::lane(), w = static_cast<unsigned>(width);
  return emulated_exchange(mask, value, lane / w * w + static_cast<unsigned>(from) % w, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
  const unsigned lane = emulation::lane(), w = static_cast<unsigned>(width);
  const unsigned from = lane ^ static_cast<unsigned>(bits);
  return emulated_exchange(mask, value, from / w == lane / w ? from : lane, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                   int line = __builtin_LINE()) {
  const unsigned lane = emulation::lane(), w = static_cast<unsigned>(width);
  return emulated_exchange(mask, value, lane % w + by < w ? lane + by : lane, line);
}
inline unsigned __ballot_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  emulated_whole_warp(mask);
  return emulation::ballot(vote != 0, line);
}
inline int __any_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return __ballot_sync(mask, vote, line) != 0;
}
inline int __all_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return __ballot_sync(mask, vote, line) == 0xffffffffu;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline double __dmul_rn(double a, double b) { return a * b; }  // built without contraction

// --- tensor cores --------------------------------------------------------------------------------

template <class T>
void emulated_multiply_tiles(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             int line = __builtin_LINE()) {
  const auto elements = std::is_same_v<T, float>    ? emulation::TileElements::tf32
                        : std::is_same_v<T, __half> ? emulation::TileElements::float16
                                                    : emulation::TileElements::bfloat16;
  emulation::multiply_tiles(elements, c, {{a[0], a[1], a[2], a[3]}, {b0, b1}}, line);
}

// --- vectors -------------------------------------------------------------------------------------

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

// --- atomics -------------------------------------------------------------------------------------

template <class T>
T atomicAdd(T* at, T value) {
  const emulation::Atomic atomic;
  const T old = *at;
  *at = old + value;
  return old;
}
template <class T>
T atomicMin(T* at, T value) {
  const emulation::Atomic atomic;
  const T old = *at;
  *at = value < old ? value : old;
  return old;
}
template <class T>
T atomicMax(T* at, T value) {
  const emulation::Atomic atomic;
  const T old = *at;
  *at = value > old ? value : old;
  return old;
}

// --- what device code takes for granted ----------------------------------------------------------

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

// --- the runtime ---------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulation::device.multiprocessors
                                                       : emulation::device.shared_limit;
  return cudaSuccess;
}
