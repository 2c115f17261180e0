// Keeps or zeroes channels: each row of a batch has a mask of its own. Raw pointers, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

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

namespace mask_channels_cpu {
// Items are rows of the batch. Whether all indices were in [0, num_masks); a row whose is not becomes 0, and
// no mask is read for it.
bool run(const MaskChannelsParams& params, int64_t begin, int64_t end);
}  // namespace mask_channels_cpu

// CUDA: all rows at once. Launches on `stream` (a cudaStream_t) of the current device and returns nullptr,
// or says in a phrase why it did not. A row whose index is out of range becomes NaN.
namespace mask_channels_cuda {
const char* run(const MaskChannelsParams& params, void* stream);
}  // namespace mask_channels_cuda

}  // namespace pyens
