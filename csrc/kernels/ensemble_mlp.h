// The ensemble MLP: E small networks, each layer h <- act(W h + b), the last one linear.
//
// One parameter block and the launchers, for CPU and CUDA. Raw pointers, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/activation_strength.h"
#include "kernels/types.h"

namespace pyens {

// Strides are counted in elements; the last dimension of every tensor has stride 1.
// A member stride of 0 means that all members share the tensor.
struct MLPLayer {
  const void* weight;  // [E, out, in]
  const void* bias;    // [E, out], or nullptr
  int64_t in, out;
  int64_t weight_member_stride, weight_row_stride;
  int64_t bias_member_stride;
};

struct EnsembleMLPParams {
  DType dtype;
  Activation activation;  // of every layer but the last
  int64_t ensemble_size, batch, num_layers;
  const MLPLayer* layers;
  const void* input;  // [B, I] (member stride 0) or [E, B, I]
  int64_t input_member_stride, input_row_stride;
  void* output;        // [E, B, O], contiguous
  const void* packed;  // what ensemble_mlp_cpu::pack made of the layers, or nullptr
  bool tf32;           // CUDA: products of float32 may be those of TF32
  double dropout;      // share of the hidden activations that become 0; the others are scaled
  const int64_t* dropout_seeds;              // [E], where dropout > 0
  const ActivationStrengthParams* strength;  // written too, without dropout; or nullptr
};

// What is left of one layer after its matrix products: bias, activation, dropout, strength.
struct EnsembleMLPEpilogue {
  int64_t layer;
  int64_t first_row, rows;  // of the batch
  const void* z;            // Real [E, rows, out], contiguous: inputs times weights
  void* h;                  // elements [E, rows, out]; may be z where they are Real
  int64_t h_member_stride;  // its rows lie one after the other
};

// What is differentiated: a loss of the output, or the output itself against a given gradient.
enum class Loss : int { none, mse, bce, gaussian_nll, cross_entropy };

struct MLPLayerGradient {  // contiguous; nullptr where it is not asked for
  void* weight;            // [E, out, in]
  void* bias;              // [E, out]
};

// One training pass. "Real" is float64 for float64 and float32 for all others.
struct EnsembleMLPTraining {
  EnsembleMLPParams forward;  // its output is not written
  Loss loss;
  double temperature;  // of cross_entropy
  // Loss::none: the gradient of the output, elements [E, B, O]. cross_entropy: int64 [B] or [E, B].
  // The others: Real [B, T] or [E, B, T].
  const void* target;
  int64_t target_member_stride, target_row_stride;
  const void* sample_weight;  // Real [B] or [E, B], last stride 1, or nullptr
  int64_t sample_weight_member_stride;
  const void* member_scale;           // Real [E], factors of the gradients, or nullptr
  const MLPLayerGradient* gradients;  // one per layer, of Real; or nullptr: the loss alone
  void* grad_input;                   // Real, contiguous, [E, B, I]; or nullptr
  bool sum_grad_input;                // over the members, to [B, I]
  void* loss_output;                  // Real [E]; not of Loss::none
  void* partial;                      // partial_bytes, for all threads together
  int threads;                        // a hint that changes no bit
};

// CPU. The caller splits [0, work_items) among its threads as it likes and gives each call scratch
// of its own, 64-byte aligned: no split changes a bit of the output.
namespace ensemble_mlp_cpu {
int64_t work_items(const EnsembleMLPParams& params);
// Below this many items in one thread, starting it costs more than it saves.
int64_t grain_size(const EnsembleMLPParams& params);
size_t scratch_bytes(const EnsembleMLPParams& params);
void run(const EnsembleMLPParams& params, int64_t begin, int64_t end, void* scratch);

// The weights in the order in which the small-batch kernel reads them: member by member and layer by
// layer all stripes of neurons, then the biases, zeros in the gaps. The sizes belong to the
// instruction set of this process: packing is done at run time and never stored.
struct PackedLayout {
  int64_t neurons_per_stripe, inputs_per_unit, unit_bytes;

  template <class Int>  // int64_t, or torch's symbolic sizes
  Int layer_bytes(const Int& out, const Int& in) const {
    const Int stripes = (out + (neurons_per_stripe - 1)) / neurons_per_stripe;
    const Int units = (in + (inputs_per_unit - 1)) / inputs_per_unit;
    return stripes * (units + 1) * (neurons_per_stripe * unit_bytes);
  }
};
PackedLayout packed_layout(DType dtype);
void pack(const EnsembleMLPParams& params, int64_t member_begin, int64_t member_end, void* packed);

// Training is three rounds over items, each split among threads like `run`. `prepare_training` sums
// the sample weights of a range of members and tells whether what it reads can be trained on.
enum class TrainingError : int { none, target_out_of_range, sample_weight_negative };
struct TrainingPlan {
  int64_t items, grain_size, finish_items, finish_grain_size;
  size_t partial_bytes;  // needs no initial value
  size_t scratch_bytes;  // per call of `train`
};
TrainingPlan plan_training(const EnsembleMLPTraining& training);
TrainingError prepare_training(const EnsembleMLPTraining& training, int64_t begin, int64_t end);
void train(const EnsembleMLPTraining& training, int64_t begin, int64_t end, void* scratch);
void finish_training(const EnsembleMLPTraining& training, int64_t begin, int64_t end);
}  // namespace ensemble_mlp_cpu

// CUDA: launches on `stream` (a cudaStream_t) of the current device and returns nullptr, or says in
// a phrase why it did not.
namespace ensemble_mlp_cuda {
// Whether `run` takes all layers in one launch: a member's weights fit into the shared memory that a
// block of the current device may have, and a kernel for as many examples has room beside them. If not,
// each layer is the library's batched product and then `run_epilogue`, layer after layer on the same
// stream.
bool in_one_launch(const EnsembleMLPParams& params);
const char* run(const EnsembleMLPParams& params, void* stream);
const char* run_epilogue(const EnsembleMLPParams& params, const EnsembleMLPEpilogue& epilogue,
                         void* stream);

// Whether the layers are narrow enough for the training pass, which does not depend on the GPU. Classes
// out of range and sample weights that are none give NaN.
bool can_train(const EnsembleMLPParams& params);
size_t partial_bytes(
    const EnsembleMLPTraining& training);  // of its `partial`, which may be nullptr here
const char* train(const EnsembleMLPTraining& training, void* stream);
}  // namespace ensemble_mlp_cuda

}  // namespace pyens
