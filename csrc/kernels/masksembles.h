// Masks over channels, and weights restricted to them. Raw pointers, no torch.
//
// mask_channels keeps or zeroes channels: each row of a batch has a mask of its own. masked_weights
// gathers from one shared matrix the rows and columns that each mask keeps, so that a masked MLP is
// an ensemble of small dense ones; masked_weights_backward is its transpose.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/types.h"

namespace pyens {

struct MaskChannelsParams {
  int64_t rows, channels, inner;  // input [rows, channels, inner], contiguous
  size_t element_bytes;
  const void* input;
  const bool* masks;  // [N, channels], contiguous
  int64_t num_masks;
  const int64_t* index;  // [rows]; or nullptr: N contiguous groups, as tensor_split cuts them
  void* output;          // like the input
};

// The kept rows and columns of each mask ascend; -1 pads them to the same number for all masks.
struct MaskedWeightsParams {
  int64_t num_masks;
  int64_t rows, columns;        // of the shared matrix
  const int64_t* row_index;     // [N, kept_rows]; or nullptr: all rows
  const int64_t* column_index;  // [N, kept_columns]; or nullptr: all columns
  int64_t kept_rows, kept_columns;
};

namespace masksembles_cpu {
// Items are rows of the batch. What `index` says must lie in [0, num_masks).
void mask_channels(const MaskChannelsParams& params, int64_t begin, int64_t end);

// weight [rows, columns] -> output [N, kept_rows, kept_columns], both contiguous, of elements of
// 2, 4 or 8 bytes; padding gives zeros. Items are [0, num_masks * kept_rows).
void masked_weights(const MaskedWeightsParams& params, size_t element_bytes, const void* weight,
                    void* output, int64_t begin, int64_t end);

// Its transpose: adds gathered [N, kept_rows, kept_columns] into weight [rows, columns], masks in
// order; float32, or float64 if `wide`. Items are [0, rows).
void masked_weights_backward(const MaskedWeightsParams& params, bool wide, const void* gathered,
                             void* weight, int64_t begin, int64_t end);
}  // namespace masksembles_cpu

// CUDA: as above, all items at once. Launches on `stream` (a cudaStream_t) of the current device and
// returns nullptr, or says in a phrase why it did not. What an index out of range would choose is NaN.
namespace masksembles_cuda {
const char* mask_channels(const MaskChannelsParams& params, void* stream);
const char* masked_weights(const MaskedWeightsParams& params, size_t element_bytes,
                           const void* weight, void* output, void* stream);
const char* masked_weights_backward(const MaskedWeightsParams& params, bool wide,
                                    const void* gathered, void* weight, void* stream);
}  // namespace masksembles_cuda

}  // namespace pyens
