// What the CUDA kernels share: element types, shared memory, sums over a warp, activations, launches.
// No torch below this line.
//
// Kernels launch through `launch` and take shared memory through `dynamic_shared` and
// PYENS_SHARED alone: by these tests/cpp/emulation runs their source on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/activations.h"
#include "kernels/cuda/sine.cuh"
#include "kernels/types.h"
#include "kernels/activation_formulas-inl.h"

namespace pyens {

// The arithmetic type of an element type.
template <class T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <class T>
using Real = typename RealOf<T>::type;

__device__ inline float to_real(float x) { return x; }
__device__ inline double to_real(double x) { return x; }
__device__ inline float to_real(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_real(__half x) { return __half2float(x); }

__device__ inline void from_real(float x, float* out) { *out = x; }
__device__ inline void from_real(double x, double* out) { *out = x; }
__device__ inline void from_real(float x, __nv_bfloat16* out) { *out = __float2bfloat16(x); }
__device__ inline void from_real(float x, __half* out) { *out = __float2half(x); }

// f(static_cast<T*>(nullptr)), T being what elements of that type are here.
template <class F>
const char* by_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32: return f(static_cast<float*>(nullptr));
    case DType::float64: return f(static_cast<double*>(nullptr));
    case DType::bfloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case DType::float16: return f(static_cast<__half*>(nullptr));
  }
  return "unknown dtype";
}

// Where only the size of an element matters.
template <class F>
const char* by_bytes(size_t element_bytes, const F& f) {
  switch (element_bytes) {
    case 2: return f(static_cast<uint16_t*>(nullptr));
    case 4: return f(static_cast<uint32_t*>(nullptr));
    default: return f(static_cast<uint64_t*>(nullptr));
  }
}

// All bits set are a NaN of every type.
template <class Word>
__device__ inline Word nan_word() {
  return static_cast<Word>(~Word{0});
}

// For threads that stride over items along x: the first of this thread, and how far it is to the next.
__device__ inline int64_t first_item() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t all_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// --- shared memory -------------------------------------------------------------------------------

// The block's dynamic shared memory, as T; one per kernel.
template <class T>
__device__ inline T* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char pyens_shared_bytes[];
  return reinterpret_cast<T*>(pyens_shared_bytes);
#else
  return static_cast<T*>(emulation::dynamic_shared());
#endif
}

// A variable in static shared memory: PYENS_SHARED(int[33], sums);
#if defined(__CUDACC__)
template <class T>
using SharedVariable = T;
#define PYENS_SHARED(type, name) __shared__ SharedVariable<type> name
#else
#define PYENS_SHARED(type, name)    \
  static const char name##_key = 0; \
  auto& name = emulation::static_shared<type>(&name##_key)
#endif

// Begins to copy an element of 4, 8 or 16 bytes from memory to shared memory: it is there after the
// thread's own wait_for_copies(), and for other threads after a barrier then.
template <class T>
__device__ inline void copy_async(T* shared, const T* from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "what cp.async copies");
#if defined(__CUDACC__)
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(sizeof(T))
               : "memory");
#else
  emulation::copy_async(shared, from, sizeof(T));
#endif
}
__device__ inline void wait_for_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#else
  emulation::wait_for_copies();
#endif
}

// --- warps ---------------------------------------------------------------------------------------

constexpr unsigned kWholeWarp = 0xffffffffu;

// Over each `width` neighbouring lanes of a warp (a power of two up to 32): the same bits in all.
template <class R>
__device__ inline R sum_lanes(R x, int width = 32) {
  for (int bit = width / 2; bit > 0; bit /= 2) x += __shfl_xor_sync(kWholeWarp, x, bit);
  return x;
}

// --- tensor cores --------------------------------------------------------------------------------
// T is bfloat16, float16, or float: then the product is one of TF32, 10 bits of mantissa.
//
//   C [16, 8] += A [16, depth] B [depth, 8],  depth 16, or 8 of TF32, in float32
//
// A lane holds four bytes at a time, one word: two elements of 16 bits, or one. With g = lane / 4 and
// t = lane % 4, its words are these:
//
//   a[0], a[1]   rows g and g + 8 of A, column t; a[2], a[3] the same rows, column t + 4
//   b[0], b[1]   rows t and t + 4 of B, column g
//   c[0], c[1]   row g of C, columns 2 t and 2 t + 1; c[2], c[3] the same of row g + 8
//
// counting the rows of B and columns of A in words. Which of them is which does not matter as long as
// A and B agree: kernels choose an order in which what a lane has computed is what it needs next.

// The low and the high element of a word; of TF32 there is but one.
template <class T>
constexpr int kWordElements = 4 / static_cast<int>(sizeof(T));

__device__ inline uint32_t to_word(const float (&x)[1], const float*) {
#if defined(__CUDACC__)
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(x[0]));
  return word;
#else
  return emulation::round_to_tf32(x[0]);
#endif
}
template <class T>
__device__ inline uint32_t to_word(const float (&x)[2], const T*) {
  T rounded[2];
  from_real(x[0], &rounded[0]);
  from_real(x[1], &rounded[1]);
  uint32_t word;
  memcpy(&word, rounded, 4);
  return word;
}

template <class T>
__device__ inline void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1, const T*) {
#if defined(__CUDACC__)
// volatile: the whole warp executes it, so it must not move into a branch that only some lanes take.
#define PYENS_MMA(shape_and_types)                                                \
  asm volatile("mma.sync.aligned." shape_and_types                                \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, float>) {
    PYENS_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  } else if constexpr (std::is_same_v<T, __half>) {
    PYENS_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    PYENS_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  }
#undef PYENS_MMA
#else
  emulated_multiply_tiles<T>(c, a, b0, b1);
#endif
}

// --- activations ---------------------------------------------------------------------------------

template <class R>
__device__ inline R smallest_normal() {
  return sizeof(R) == 8 ? R(2.2250738585072014e-308) : R(1.17549435082228751e-38f);
}

// act(x), and its derivative there, given h = act(x) too.
template <class R>
__device__ inline R activate(const Activation& activation, R x) {
  const R parameter = static_cast<R>(activation.parameter);
  switch (activation.kind) {
#define PYENS_CASE(name, Formulas, standard) \
  case ActivationKind::name: return Formulas::value(x, parameter);
    PYENS_ACTIVATIONS(PYENS_CASE)
#undef PYENS_CASE
  }
  return x;
}
template <class R>
__device__ inline R activation_slope(const Activation& activation, R x, R h) {
  const R parameter = static_cast<R>(activation.parameter);
  switch (activation.kind) {
#define PYENS_CASE(name, Formulas, standard) \
  case ActivationKind::name: return Formulas::slope(x, h, parameter);
    PYENS_ACTIVATIONS(PYENS_CASE)
#undef PYENS_CASE
  }
  return R(1);
}

// f(act), act(x) being the activation of an R: one branch for many numbers.
template <class R, class F>
__device__ inline void with_activation(const Activation& activation, const F& f) {
  const R parameter = static_cast<R>(activation.parameter);
  switch (activation.kind) {
#define PYENS_CASE(name, Formulas, standard) \
  case ActivationKind::name: return f([parameter](R x) { return Formulas::value(x, parameter); });
    PYENS_ACTIVATIONS(PYENS_CASE)
#undef PYENS_CASE
  }
}

// --- launches ------------------------------------------------------------------------------------

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// What a block may have of shared memory.
inline int64_t shared_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// Blocks for a kernel whose threads stride over `items`: at most `waves` times as many as fit at once
// if a multiprocessor holds 2048 threads.
inline unsigned striding_blocks(int64_t items, int64_t threads, int64_t waves = 4) {
  const int64_t resident = device_attribute(cudaDevAttrMultiProcessorCount) * (2048 / threads);
  const int64_t needed = ceil_div(items, threads);
  return static_cast<unsigned>(needed < resident * waves ? needed : resident * waves);
}

// Of a kernel's arguments: from CUDA 12.1 on, on Volta and later. Before it was 4,096.
constexpr size_t kMaxArgumentBytes = 32764;
#if defined(__CUDACC__)
static_assert(CUDART_VERSION >= 12010, "kernels are given more than 4,096 bytes of arguments");
#endif

// kernel<<<grid, threads, shared_bytes, stream>>>(args...); nullptr, or what went wrong.
template <class... Params, class... Args>
const char* launch(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared_bytes,
                   void* stream, const Args&... args) {
  static_assert((sizeof(Params) + ... + 0) <= kMaxArgumentBytes);
  static_assert((std::is_trivially_copyable_v<Params> && ...));
#if defined(__CUDACC__)
  // More than 48 KB has to be requested. The limit belongs to the kernel, not to the launch, and another
  // thread may launch it with more, so request all there is. Static shared memory would count too; no such
  // kernel has any.
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_limit()));
    if (error != cudaSuccess) {
      cudaGetLastError();  // or the next launch would be blamed for it
      return cudaGetErrorString(error);
    }
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  (void)stream;
  return emulation::launch(kernel, grid, threads, shared_bytes, args...);
#endif
}

}  // namespace pyens
