// A factor for each feature of each member. Raw pointers, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/types.h"

namespace pyens {

// Strides are counted in elements; the last dimension has stride 1.
struct GainParams {
  DType dtype;
  int64_t ensemble_size, batch, features;
  const void* input;  // [B, D] (member stride 0) or [E, B, D]
  int64_t input_member_stride, input_row_stride;
  const void* scale;  // [E, D]
  int64_t scale_member_stride;
  void* output;  // [E, B, D], contiguous
};

namespace gain_cpu {
// Items are rows (m, b), E * B of them; no split of them changes a bit.
int64_t grain_size(const GainParams& params);
void run(const GainParams& params, int64_t begin, int64_t end);
}  // namespace gain_cpu

// CUDA: launches on `stream` (a cudaStream_t) of the current device and returns nullptr, or says in a phrase
// why it did not.
namespace gain_cuda {
const char* run(const GainParams& params, void* stream);
}  // namespace gain_cuda

}  // namespace pyens
