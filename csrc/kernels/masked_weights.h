// Gathers from one shared matrix the rows and columns that each mask keeps, so that a masked MLP is an
// ensemble of small dense ones; and its transpose. Raw pointers, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/types.h"

namespace pyens {

// The kept rows and columns of each mask ascend; -1 pads them to the same number for all masks.
struct MaskedWeightsParams {
  int64_t num_masks;
  int64_t rows, columns;        // of the shared matrix
  const int64_t* row_index;     // [N, kept_rows]; or nullptr: all rows
  const int64_t* column_index;  // [N, kept_columns]; or nullptr: all columns
  int64_t kept_rows, kept_columns;
};

namespace masked_weights_cpu {
// weight [rows, columns] -> output [N, kept_rows, kept_columns], both contiguous, of elements of
// 2, 4 or 8 bytes; padding gives zeros. Items are [0, num_masks * kept_rows).
void run(const MaskedWeightsParams& params, size_t element_bytes, const void* weight, void* output,
         int64_t begin, int64_t end);

// Its transpose: the sum of gathered [N, kept_rows, kept_columns] over the masks, in order, to
// weight [rows, columns], or with `add` to what it holds; float32 or float64. Items are [0, rows).
void run_backward(const MaskedWeightsParams& params, DType dtype, const void* gathered, bool add,
                  void* weight, int64_t begin, int64_t end);
}  // namespace masked_weights_cpu

// CUDA: as above, all items at once. Launches on `stream` (a cudaStream_t) of the current device and
// returns nullptr, or says in a phrase why it did not. What an index out of range would choose is NaN.
namespace masked_weights_cuda {
const char* run(const MaskedWeightsParams& params, size_t element_bytes, const void* weight,
                void* output, void* stream);
const char* run_backward(const MaskedWeightsParams& params, DType dtype, const void* gathered,
                         void* weight, void* stream);
}  // namespace masked_weights_cuda

}  // namespace pyens
