// Weights in rows of which few are kept, as operations take them: see kernels/sparse_rows.h. On the CPU, in float32
// and float64.
#pragma once

#include "ops/torch.h"

#include "kernels/sparse_rows.h"
#include "ops/checks.h"

namespace pyens {

// One layer of an ensemble: `rows` of `inputs` weights for each member.
struct SparseWeight {
  const at::Tensor &values, &columns, &starts, &order;
  c10::SymInt inputs;
  int64_t layer = -1;  // -1: the only one

  c10::SymInt members() const { return starts.sym_size(0); }
  c10::SymInt rows() const { return order.sym_size(2); }
};

// Types, shapes and devices.
inline void check_sparse_shape(const char* op, const SparseWeight& w) {
  const ArgumentName values{"values", w.layer}, columns{"columns", w.layer},
      starts{"starts", w.layer}, order{"order", w.layer};
  PYENS_CHECK_TYPE(w.values.scalar_type() == at::kFloat || w.values.scalar_type() == at::kDouble,
                   op, values, "float32 or float64", w.values.scalar_type());
  PYENS_CHECK_VALUE(w.values.dim() == 1, op, values, "[numbers]", "shape ", w.values.sym_sizes());
  PYENS_CHECK_TYPE(w.columns.scalar_type() == at::kByte, op, columns, "uint8",
                   w.columns.scalar_type());
  PYENS_CHECK_VALUE(w.columns.sym_sizes() == w.values.sym_sizes(), op, columns,
                    c10::str("shape ", w.values.sym_sizes(), " as the values"), "shape ",
                    w.columns.sym_sizes());
  for (const auto& [tensor, name] : {std::pair{&w.starts, starts}, std::pair{&w.order, order}}) {
    PYENS_CHECK_TYPE(tensor->scalar_type() == at::kInt, op, name, "int32", tensor->scalar_type());
  }
  for (const auto& [tensor, name] :
       {std::pair{&w.columns, columns}, std::pair{&w.starts, starts}, std::pair{&w.order, order}}) {
    PYENS_CHECK_TYPE(tensor->device() == w.values.device(), op, name,
                     c10::str("the device of values (", w.values.device(), ")"), tensor->device());
  }
  PYENS_CHECK_VALUE(w.inputs >= 1, op, "in_features", "at least 1", w.inputs);
  const c10::SymInt blocks = (w.inputs + (kSparseBlock - 1)) / kSparseBlock;
  PYENS_CHECK_VALUE(w.order.dim() == 3 && w.order.sym_numel() >= 1 && w.order.sym_size(1) == blocks,
                    op, order, c10::str("[E, ", blocks, ", rows] of ", w.inputs, " inputs"),
                    "shape ", w.order.sym_sizes());
  PYENS_CHECK_VALUE(
      w.starts.dim() == 3 && w.starts.sym_size(0) == w.order.sym_size(0) &&
          w.starts.sym_size(1) == blocks && w.starts.sym_size(2) == w.order.sym_size(2) + 1,
      op, starts,
      c10::str("[", w.order.sym_size(0), ", ", blocks, ", ", w.order.sym_size(2) + 1, "]"),
      "shape ", w.starts.sym_sizes());
}

// What the kernels read, all of it looked at: a start, a row or a column out of range would be read or written there.
// The tensors are contiguous.
inline SparseRows checked_rows(const char* op, const SparseWeight& w) {
  const int64_t blocks = w.order.size(1), rows = w.order.size(2), numbers = w.values.size(0);
  const int64_t inputs = w.inputs.expect_int();
  const SparseRows sparse{w.values.const_data_ptr(), w.starts.const_data_ptr<int32_t>(),
                          w.order.const_data_ptr<int32_t>(), w.columns.const_data_ptr<uint8_t>()};
  std::vector<char> seen(static_cast<size_t>(rows));
  for (int64_t i = 0; i < w.order.size(0) * blocks; ++i) {
    const int32_t* const starts = sparse.starts + i * (rows + 1);
    bool ascend = starts[0] >= 0 && starts[rows] <= numbers;
    for (int64_t n = 0; n < rows; ++n) ascend = ascend && starts[n] <= starts[n + 1];
    PYENS_CHECK_VALUE(ascend, op, (ArgumentName{"starts", w.layer}),
                      c10::str("ascending within the ", numbers, " values"), "others in block ",
                      i % blocks, " of member ", i / blocks);
    std::fill(seen.begin(), seen.end(), 0);
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t row = sparse.order[i * rows + n];
      const bool new_row = row >= 0 && row < rows && !seen[static_cast<size_t>(row)];
      PYENS_CHECK_VALUE(new_row, op, (ArgumentName{"order", w.layer}),
                        c10::str("each row from 0 to ", rows - 1, " once"), row, " in block ",
                        i % blocks, " of member ", i / blocks);
      seen[static_cast<size_t>(row)] = 1;
    }
    const int64_t most = std::min(kSparseBlock, inputs - i % blocks * kSparseBlock);
    uint8_t largest = 0;
    for (int64_t n = starts[0]; n < starts[rows]; ++n)
      largest = std::max(largest, sparse.columns[n]);
    PYENS_CHECK_VALUE(starts[0] == starts[rows] || largest < most, op,
                      (ArgumentName{"columns", w.layer}),
                      c10::str("below ", most, " in block ", i % blocks), int{largest});
  }
  return sparse;
}

}  // namespace pyens
