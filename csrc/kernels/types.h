// Element types, as the kernels know them.
#pragma once

#include <cstddef>
#include <cstdint>

// Of functions for both.
#if defined(__CUDACC__)
#define PYENS_HOST_DEVICE __host__ __device__
#else
#define PYENS_HOST_DEVICE
#endif

namespace pyens {

enum class DType : int { float32, float64, bfloat16, float16 };
constexpr int kDTypes = 4;

inline size_t element_size(DType dtype) {
  switch (dtype) {
    case DType::float32: return 4;
    case DType::float64: return 8;
    default: return 2;
  }
}

// Storage only; the arithmetic is done in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace pyens
