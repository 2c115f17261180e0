// What an ensemble's outputs say together: predictive uncertainty of class probabilities, moments of
// any outputs.
//
// Parameter blocks and the CPU launchers. Raw pointers, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/types.h"

namespace pyens {

// Strides are counted in elements; the last dimension has stride 1.
struct UncertaintyParams {
  DType dtype;
  bool from_probabilities;  // else logits
  bool binary;              // [E, B], of class 1 of 2
  int64_t ensemble_size, batch, classes;
  const void* members;  // [E, B, K], or [E, B]
  int64_t member_stride, row_stride;
  double sum_tolerance;  // how far from 1 the sum of a row of probabilities may be

  void* mean_probability;                                            // [B, K], or [B]
  void *predictive_entropy, *expected_entropy, *mutual_information;  // [B]
  void *distribution_pv, *vote_disagreement;                         // [B]
  int32_t* votes;     // [B, K] ([B, 2] for binary), or nullptr
  int64_t* bad_rows;  // [work_items]: m * B + b of a row that is no distribution, or -1; CPU only
};

struct MomentsParams {
  DType dtype;
  int64_t ensemble_size, size;               // elements of a member
  const void *outputs, *variances;           // [E, size]; variances may be nullptr
  int64_t outputs_stride, variances_stride;  // from member to member
  void *mean, *std, *min, *max, *epistemic;  // [size]
  void* aleatoric;                           // [size], or nullptr
};

// The caller splits [0, work_items) among its threads as it likes and gives each call scratch of its
// own, 64-byte aligned: no split changes a bit.
namespace uncertainty_cpu {
int64_t work_items(const UncertaintyParams& params);
int64_t grain_size(const UncertaintyParams& params);
size_t scratch_bytes(const UncertaintyParams& params);
void run(const UncertaintyParams& params, int64_t begin, int64_t end, void* scratch);

int64_t work_items(const MomentsParams& params);
int64_t grain_size(const MomentsParams& params);
size_t scratch_bytes(const MomentsParams& params);
void run(const MomentsParams& params, int64_t begin, int64_t end, void* scratch);
}  // namespace uncertainty_cpu

// CUDA: launches on `stream` (a cudaStream_t) of the current device and returns nullptr, or says in a
// phrase why it did not. An example of which some row is no distribution becomes NaN; `bad_rows` is
// not written.
namespace uncertainty_cuda {
size_t scratch_bytes(const UncertaintyParams& params);  // global memory, on the current device
const char* run(const UncertaintyParams& params, void* scratch, void* stream);
const char* run(const MomentsParams& params, void* stream);
}  // namespace uncertainty_cuda

}  // namespace pyens
