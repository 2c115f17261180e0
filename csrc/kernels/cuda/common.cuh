// What the CUDA kernels share: element types, activations, error reporting. No torch below this
// line.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/types.h"

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

// The hidden activations, as in torch.nn with default arguments. NaN in, NaN out.
template <class R>
__device__ inline R activate(Activation activation, R x) {
  switch (activation) {
    case Activation::relu: return x < R(0) ? R(0) : x;
    case Activation::gelu: return R(0.5) * x * erfc(x * R(-0.70710678118654752440));
    case Activation::silu: return x / (R(1) + exp(-x));
    case Activation::elu: return x > R(0) ? x : expm1(x);
    case Activation::softplus: return x > R(20) ? x : log1p(exp(x));
    case Activation::tanh: return tanh(x);
    case Activation::identity: return x;
  }
  return x;
}

// What a launcher returns: nullptr, or what went wrong.
inline const char* last_launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pyens
