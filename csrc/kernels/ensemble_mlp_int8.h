// The ensemble MLP on weights in bytes (kernels/int8.h): each layer h <- act(z), whose inputs become bytes again.
//
// Parameter blocks and the launchers, for the CPU. Raw pointers, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/activations.h"
#include "kernels/int8.h"

namespace pyens {

struct Int8Layer {
  int64_t in, out;
  Int8Weight weight;
  const float* bias;  // [E, out], contiguous, or nullptr
  Activation activation;
};

struct EnsembleMLPInt8Params {
  int64_t ensemble_size, num_layers;
  const Int8Layer* layers;
  int64_t batch;
  const float* input;  // [B, I] (member stride 0) or [E, B, I]
  int64_t input_member_stride, input_row_stride;
  float* output;  // [E, B, O], contiguous; all NaN for an example with one
};

// The caller splits [0, work_items) among its threads as it likes and gives each call scratch of its own, 64-byte
// aligned: no split changes a bit of the output.
namespace ensemble_mlp_int8_cpu {
int64_t work_items(const EnsembleMLPInt8Params& params);
int64_t grain_size(const EnsembleMLPInt8Params& params);
size_t scratch_bytes(const EnsembleMLPInt8Params& params);
void run(const EnsembleMLPInt8Params& params, int64_t begin, int64_t end, void* scratch);
}  // namespace ensemble_mlp_int8_cpu

}  // namespace pyens
