// Weights in bytes, as operations take them: see kernels/int8.h. On the CPU, with inputs and outputs in float32.
#pragma once

#include "ops/torch.h"

#include "kernels/int8.h"
#include "ops/checks.h"

namespace pyens {

// One layer of an ensemble. The scale is known by [E, rows]; whatever the values have behind that is one row.
struct Int8Tensors {
  const at::Tensor &values, &scale, &offset, &input_scale, &input_zero_point;
  int64_t layer = -1;  // -1: the only one

  c10::SymInt members() const { return values.sym_size(0); }
  c10::SymInt rows() const { return values.sym_size(1); }
};

// Types, shapes and devices; `dims` of the values, and what these are called in errors.
inline void check_int8(const char* op, const Int8Tensors& w, int64_t dims, const char* shape) {
  const ArgumentName values{"values", w.layer};
  PYENS_CHECK_TYPE(w.values.scalar_type() == at::kChar, op, values, "int8", w.values.scalar_type());
  PYENS_CHECK_VALUE(w.values.dim() == dims && w.values.sym_numel() >= 1, op, values,
                    c10::str(shape, ", none of them 0"), "shape ", w.values.sym_sizes());
  const auto check = [&](const at::Tensor& t, const char* name, at::ScalarType type, int64_t dim) {
    const ArgumentName argument{name, w.layer};
    PYENS_CHECK_TYPE(t.scalar_type() == type, op, argument, type, t.scalar_type());
    PYENS_CHECK_TYPE(t.device() == w.values.device(), op, argument,
                     c10::str("the device of values (", w.values.device(), ")"), t.device());
    const bool fits =
        t.dim() == dim && t.sym_size(0) == w.members() && (dim == 1 || t.sym_size(1) == w.rows());
    const std::string rows = dim == 1 ? "" : c10::str(", ", w.rows());
    PYENS_CHECK_VALUE(fits, op, argument, c10::str("[", w.members(), rows, "]"), "shape ",
                      t.sym_sizes());
  };
  check(w.scale, "scale", at::kFloat, 2);
  check(w.offset, "offset", at::kInt, 2);
  check(w.input_scale, "input_scale", at::kFloat, 1);
  check(w.input_zero_point, "input_zero_point", at::kByte, 1);
}

inline void check_int8_bias(const char* op, const Int8Tensors& w, const at::Tensor& bias,
                            const char* name, bool may_be_empty) {
  const ArgumentName argument{name, w.layer};
  PYENS_CHECK_TYPE(bias.scalar_type() == at::kFloat, op, argument, "float32", bias.scalar_type());
  PYENS_CHECK_TYPE(bias.device() == w.values.device(), op, argument,
                   c10::str("the device of values (", w.values.device(), ")"), bias.device());
  const bool fits = bias.dim() == 2 && bias.sym_size(0) == w.members() &&
                    (bias.sym_size(1) == w.rows() || (may_be_empty && bias.sym_size(1) == 0));
  const std::string or_none = may_be_empty ? c10::str(" or [", w.members(), ", 0]") : "";
  PYENS_CHECK_VALUE(fits, op, argument, c10::str("[", w.members(), ", ", w.rows(), "]", or_none),
                    "shape ", bias.sym_sizes());
}

// What the kernels read. The tensors are contiguous.
inline Int8Weight int8_weight(const Int8Tensors& w) {
  return {w.values.const_data_ptr<int8_t>(), w.scale.const_data_ptr<float>(),
          w.offset.const_data_ptr<int32_t>(), w.input_scale.const_data_ptr<float>(),
          w.input_zero_point.const_data_ptr<uint8_t>()};
}

}  // namespace pyens
