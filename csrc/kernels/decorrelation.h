// Decorrelation loss: how much the components of an ensemble move together over a batch.
//
//   C_ij = 1/B sum_b z_ib z_jb,   loss = sum_{i<j} C_ij^2     for each model and label
//
// One parameter block and the CPU launchers. Raw pointers, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/types.h"

namespace pyens {

// What z is: the outputs, the outputs less the component's mean over the batch, or less the
// example's mean over the components.
enum class DecorrelationKind : int { correlation, covariance, residue };

// Real is double for float64 outputs and float for all others.
struct DecorrelationParams {
  DType dtype;
  DecorrelationKind kind;
  bool sum_labels;  // one loss per model, or one per model and label
  int64_t models, components, batch, labels;
  const void* outputs;  // [M, J, B, K], [B, K] contiguous
  int64_t model_stride, component_stride;

  // Written by the forward pass, read by the backward.
  void* correlations;  // Real [M, K, J, J], diagonal 0
  void* centre;        // Real [2, M, J, K], covariance only: mean = centre[0] + centre[1]

  void*
      partials;  // CPU: Real [partials_size], of each chunk of the batch, between run() and finish()
  void* loss;    // Real [M] or [M, K]

  const void* grad_loss;  // Real [M] or [M, K]
  void* grad_outputs;     // [M, J, B, K], contiguous
};

// The caller calls prepare(), splits [0, work_items) of run() among its threads as it likes with
// scratch of its own, 64-byte aligned, for each call, then calls finish(). No split changes a bit.
// The backward is run_backward() alone.
namespace decorrelation_cpu {
int64_t work_items(const DecorrelationParams& params);
int64_t grain_size(const DecorrelationParams& params);
size_t scratch_bytes(const DecorrelationParams& params);
int64_t partials_size(const DecorrelationParams& params);
void prepare(const DecorrelationParams& params);
void run(const DecorrelationParams& params, int64_t begin, int64_t end, void* scratch);
void finish(const DecorrelationParams& params);
void run_backward(const DecorrelationParams& params, int64_t begin, int64_t end, void* scratch);
}  // namespace decorrelation_cpu

// CUDA: launches on `stream` (a cudaStream_t) of the current device and returns nullptr, or says in a
// phrase why it did not. Scratch is global memory, 256-byte aligned.
namespace decorrelation_cuda {
size_t scratch_bytes(const DecorrelationParams& params);           // of run
size_t backward_scratch_bytes(const DecorrelationParams& params);  // of run_backward
const char* run(const DecorrelationParams& params, void* scratch, void* stream);
const char* run_backward(const DecorrelationParams& params, void* scratch, void* stream);
}  // namespace decorrelation_cuda

}  // namespace pyens
