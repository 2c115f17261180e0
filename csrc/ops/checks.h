// Argument checks shared by all operations. Every message reads
//   <op>: <argument>: expected <what>, got <what came>
// and is raised once, before anything is computed: ValueError for shapes and values, TypeError for
// dtypes and devices. Sizes are compared symbolically, so that a check costs torch.compile no
// recompilation.
#pragma once

#include "ops/torch.h"

#include <ostream>

#include "kernels/types.h"

#define PYENS_CHECK_VALUE(condition, op, argument, expected, ...)                     \
  TORCH_CHECK_VALUE(condition, op, ": ", argument, ": expected ", expected, ", got ", \
                    ::c10::str(__VA_ARGS__))
#define PYENS_CHECK_TYPE(condition, op, argument, expected, ...)                     \
  TORCH_CHECK_TYPE(condition, op, ": ", argument, ": expected ", expected, ", got ", \
                   ::c10::str(__VA_ARGS__))

namespace pyens {

inline bool is_kernel_dtype(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

inline DType kernel_dtype(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return DType::float64;
    case at::kBFloat16: return DType::bfloat16;
    case at::kHalf: return DType::float16;
    default: return DType::float32;
  }
}

// What sums over elements of this type are formed in.
inline at::ScalarType accumulation_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// An argument or one of a list of them, spelled out only when a check fails.
struct ArgumentName {
  const char* name;
  int64_t index = -1;
};
inline std::ostream& operator<<(std::ostream& out, const ArgumentName& argument) {
  out << argument.name;
  return argument.index < 0 ? out : out << '[' << argument.index << ']';
}

// Same dtype and device as `like`.
inline void check_same_kind(const char* op, ArgumentName argument, const at::Tensor& tensor,
                            ArgumentName like_argument, const at::Tensor& like) {
  PYENS_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), op, argument,
                   c10::str("the dtype of ", like_argument, " (", like.scalar_type(), ")"),
                   tensor.scalar_type());
  PYENS_CHECK_TYPE(tensor.device() == like.device(), op, argument,
                   c10::str("the device of ", like_argument, " (", like.device(), ")"),
                   tensor.device());
}

}  // namespace pyens
