// Element types, as the kernels know them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyens {

enum class DType : int { float32, float64, bfloat16, float16 };

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
