// The ensemble MLP: E small networks, each layer h <- act(W h + b), with a norm before or after the
// activation, dropout, and a residual where they are asked for.
//
// Parameter blocks and the launchers, for CPU and CUDA. Raw pointers, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/activation_strength.h"
#include "kernels/activations.h"
#include "kernels/optimizers.h"
#include "kernels/sparse_rows.h"
#include "kernels/types.h"

namespace pyens {

// Strides are counted in elements; the last dimension of every tensor has stride 1.
// A member stride of 0 means that all members share the tensor.
//
// A layer is the unit: what it reads its weights from, and what it does to its sums. The scales of its
// weights will stand beside `activation`, as plain data like the rest.
struct MLPWeight {
  const void* data;  // [E, out, in]
  int64_t member_stride, row_stride;
  DType format;  // of its elements, row by row; int8 will be a further format
};
// On the CPU, forward only, in float32 and float64: a row stride that says that `data` is the SparseRows of the layer.
constexpr int64_t kSparseStride = -1;
inline const SparseRows* sparse_rows(const MLPWeight& weight) {
  return weight.row_stride == kSparseStride ? static_cast<const SparseRows*>(weight.data) : nullptr;
}
struct MLPBias {
  const void* data;  // [E, out], or nullptr
  int64_t member_stride;
};
// y = (x - mean) / sqrt(variance + epsilon) * weight + bias over the features of an example, variance with
// their number; rms_norm takes the mean as 0.
enum class NormKind : int { none, layer_norm, rms_norm };
struct MLPNorm {
  NormKind kind;
  bool after_activation;
  double epsilon;
  MLPBias weight, bias;  // [E, out], or nullptr: 1 and 0
};
// The sums, then of a hidden layer: dropout if it comes before the norm; norm; activation; norm; dropout;
// what the layer reads added.
struct MLPLayer {
  int64_t in, out;
  MLPWeight weight;
  MLPBias bias;
  MLPNorm norm;           // of a hidden layer
  Activation activation;  // of the last layer: of the output
  bool residual;          // of a hidden layer as wide as what it reads

  PYENS_HOST_DEVICE bool has_norm() const { return norm.kind != NormKind::none; }
  // Whether more follows the sums than an activation and dropout.
  PYENS_HOST_DEVICE bool rich() const { return has_norm() || residual; }
};

// What is computed. The layers lie on the host.
struct EnsembleMLP {
  DType dtype;  // of inputs, biases and outputs
  int64_t ensemble_size, num_layers;
  const MLPLayer* layers;
  // [ensemble_size]: whose parameters each of them has, among more members that the layers' tensors may
  // hold; nullptr: its own. Inputs, outputs, dropout and gradients count those that are computed.
  const int64_t* members;
  // How many members the layers' tensors hold, where there are `members`. On the GPU the output of one
  // that is none of them is NaN, and so are its gradients; on the CPU the caller has looked.
  int64_t stored_members;

  PYENS_HOST_DEVICE int64_t parameters_of(int64_t member) const {
    return members ? members[member] : member;
  }
  bool rich() const {
    for (int64_t l = 0; l < num_layers; ++l) {
      if (layers[l].rich()) return true;
    }
    return false;
  }
};

// Share of the hidden activations that become 0; the others are scaled. See kernels/dropout.h.
struct Dropout {
  double p;
  const double*
      rates;  // in the place of p: [E, hidden layers], a stride of 0 where they are the same
  int64_t rates_member_stride, rates_layer_stride;
  const int64_t* seeds;  // [E], where there may be some
  bool before_norm;      // of layers that have one

  PYENS_HOST_DEVICE bool any() const { return p > 0 || rates; }
  PYENS_HOST_DEVICE double of(int64_t member, int64_t layer) const {
    return rates ? rates[member * rates_member_stride + layer * rates_layer_stride] : p;
  }
};

// What belongs to one call: plain data, which a GPU is given as it is.
struct MLPCall {
  int64_t batch;
  const void* input;  // [B, I] (member stride 0) or [E, B, I]
  int64_t input_member_stride, input_row_stride;
  void* output;  // [E, B, O], contiguous
  Dropout dropout;
  ActivationStrengthParams strength;  // written too, without dropout
  // CPU: the sums of the layers, Real, kept_elements(mlp, batch); or nullptr. A forward pass leaves them
  // there, and a training pass begins with them instead of computing them.
  void* kept;
};

struct EnsembleMLPParams : EnsembleMLP, MLPCall {};

// Whether the sums of layer l are among those that are kept: all that a backward pass derives something of.
inline bool keeps(const EnsembleMLP& mlp, int64_t l) {
  return l + 1 < mlp.num_layers || mlp.layers[l].activation.kind != ActivationKind::identity;
}
// A member's kept sums lie layer after layer, panels of examples [panel][out][examples of a panel], the
// examples rounded up to kKeptRows.
constexpr int64_t kKeptRows = 64;
template <class Int>
Int kept_rows(const Int& batch) {
  return (batch + (kKeptRows - 1)) / kKeptRows * kKeptRows;
}
inline int64_t kept_units_before(const EnsembleMLP& mlp, int64_t layer) {
  int64_t units = 0;
  for (int64_t l = 0; l < layer; ++l) units += keeps(mlp, l) ? mlp.layers[l].out : 0;
  return units;
}
inline int64_t kept_elements(const EnsembleMLP& mlp, int64_t batch) {
  return mlp.ensemble_size * kept_rows(batch) * kept_units_before(mlp, mlp.num_layers);
}

// What is left of one layer after its matrix products: bias, activation, dropout, strength.
struct EnsembleMLPEpilogue {
  int64_t layer;
  int64_t first_row, rows;  // of the batch
  const void* z;            // Real [E, rows, out], contiguous: inputs times weights
  void* h;                  // elements [E, rows, out]; may be z where they are Real
  int64_t h_member_stride;  // its rows lie one after the other
  const void* x;            // elements [E, rows, in], what a layer with a residual reads
  int64_t x_member_stride, x_row_stride;
};

// What is differentiated: a loss of the output, or the output itself against a given gradient.
enum class Loss : int {
  none,
  mse,
  bce,
  gaussian_nll,
  cross_entropy,
  huber,
  smooth_l1,
  quantile,
  poisson_nll,
  soft_cross_entropy
};

// What cross_entropy expects of K classes: label smoothing s takes the share s from the label, and gives each
// class s / K. Exactly 1 and 0 without smoothing, and 1 where there is one class. A share that is given, as
// soft_cross_entropy has it, becomes kept times itself + elsewhere.
template <class R>
struct ExpectedClasses {
  R at_label, elsewhere, kept;

  PYENS_HOST_DEVICE ExpectedClasses(double smoothing, int64_t classes)
      : at_label(static_cast<R>(1 - smoothing + smoothing / static_cast<double>(classes))),
        elsewhere(static_cast<R>(smoothing / static_cast<double>(classes))),
        kept(static_cast<R>(1 - smoothing)) {}
};

// The least and the largest `delta` that huber and smooth_l1 compute with: normal numbers.
template <class R>
PYENS_HOST_DEVICE inline R loss_delta(double delta) {
  const double least = sizeof(R) == 8 ? 2.2250738585072014e-308 : 1.1754943508222875e-38;
  const double largest = sizeof(R) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;
  return static_cast<R>(delta < least ? least : delta > largest ? largest : delta);
}

// Options of one loss or another, which the others do not read.
struct LossParameters {
  double temperature, label_smoothing;  // of cross_entropy and soft_cross_entropy
  double delta;                         // of huber and smooth_l1
  const double* quantiles;              // [num_quantiles], of quantile
  int64_t num_quantiles;
  // Real [K], a member's own at multiples of the stride, or nullptr.
  const void* class_weight;  // of cross_entropy
  int64_t class_weight_member_stride;
  const void *log_variance_min, *log_variance_max;  // of gaussian_nll: both, or neither
  int64_t log_variance_min_member_stride, log_variance_max_member_stride;
};

struct MLPLayerGradient {                // contiguous; nullptr where it is not asked for
  void* weight;                          // [E, out, in]
  void *bias, *norm_weight, *norm_bias;  // [E, out]

  PYENS_HOST_DEVICE bool any() const { return weight || bias || norm_weight || norm_bias; }
};

// CPU: an optimizer's step, made within the pass, member by member, as soon as the gradient is whole. The
// tensors are those of all members; nullptr where there is no step.
struct MLPParameterStep {
  const StepParams* params;
  const StepTensor* tensor;
};
struct MLPLayerSteps {
  MLPParameterStep weight, bias, norm_weight, norm_bias;
};

// What belongs to one training pass, likewise plain. "Real" is float64 for float64 and float32 for all
// others.
struct MLPTrainingCall {
  Loss loss;
  LossParameters of_loss;
  // Loss::none: the gradient of the output, elements [E, B, O]. cross_entropy: int64 [B] or [E, B].
  // The others: Real [B, T] or [E, B, T].
  const void* target;
  int64_t target_member_stride, target_row_stride;
  const void* sample_weight;  // Real [B] or [E, B], last stride 1, or nullptr
  int64_t sample_weight_member_stride;
  const void* member_scale;  // Real [E], factors of the gradients, or nullptr
  void* grad_input;          // Real, contiguous, [E, B, I]; or nullptr
  bool sum_grad_input;       // over the members, to [B, I]
  void* loss_output;         // Real [E]; not of Loss::none
};

// How many numbers of an example's target meet `outputs` outputs; a class counts as one.
PYENS_HOST_DEVICE inline int64_t target_features(const MLPTrainingCall& t, int64_t outputs) {
  switch (t.loss) {
    case Loss::cross_entropy: return 1;
    case Loss::gaussian_nll: return outputs / 2;
    case Loss::quantile: return outputs / t.of_loss.num_quantiles;
    default: return outputs;
  }
}
// Number of terms that an example's loss averages.
PYENS_HOST_DEVICE inline int64_t loss_terms(const MLPTrainingCall& t, int64_t outputs) {
  switch (t.loss) {
    case Loss::none:
    case Loss::cross_entropy:
    case Loss::soft_cross_entropy: return 1;
    case Loss::gaussian_nll: return outputs / 2;
    default: return outputs;
  }
}

struct EnsembleMLPTraining : MLPTrainingCall {
  EnsembleMLPParams forward;          // its output is not written
  const MLPLayerGradient* gradients;  // one per layer, of Real; or nullptr: the loss alone
};

// CPU. The caller splits [0, work_items) among its threads as it likes and gives each call scratch
// of its own, 64-byte aligned: no split changes a bit of the output.
namespace ensemble_mlp_cpu {
// The weights in the order in which the small-batch kernel reads them: member by member and layer by
// layer all stripes of neurons, then the biases, zeros in the gaps. The sizes belong to the
// instruction set of this process.
struct PrepackedLayout {
  int64_t neurons_per_stripe, inputs_per_unit, unit_bytes;

  template <class Int>  // int64_t, or torch's symbolic sizes
  Int layer_bytes(const Int& out, const Int& in) const {
    const Int stripes = (out + (neurons_per_stripe - 1)) / neurons_per_stripe;
    const Int units = (in + (inputs_per_unit - 1)) / inputs_per_unit;
    return stripes * (units + 1) * (neurons_per_stripe * unit_bytes);
  }
  bool operator!=(const PrepackedLayout& other) const {
    return neurons_per_stripe != other.neurons_per_stripe ||
           inputs_per_unit != other.inputs_per_unit || unit_bytes != other.unit_bytes;
  }
};

// They say what they are, and then follow.
struct PrepackedWeights {
  uint32_t magic = 0x4b435050;  // "PPCK"
  DType format;                 // of the weights that they were made of
  PrepackedLayout layout;
  int64_t ensemble_size, num_layers;
  uint64_t widths;  // a hash of all layers' sizes, and whether they have biases
  int64_t bytes;    // with these
};
static_assert(sizeof(PrepackedWeights) == 64, "whole cache lines, no gaps");

struct Forward : EnsembleMLPParams {
  const PrepackedWeights* prepacked;  // of these layers, for small batches; or nullptr
};
int64_t work_items(const Forward& params);
// Below this many items in one thread, starting it costs more than it saves.
int64_t grain_size(const Forward& params);
size_t scratch_bytes(const Forward& params);
void run(const Forward& params, int64_t begin, int64_t end, void* scratch);

PrepackedLayout prepacked_layout(DType format);
// `prepacked`: as many bytes as `describe_prepacked(mlp).bytes`.
PrepackedWeights describe_prepacked(const EnsembleMLP& mlp);
void prepack(const EnsembleMLP& mlp, PrepackedWeights* prepacked);
// Whether these bytes are what `prepack` would make of weights like these here: nullptr, or what they
// are instead.
const char* check_prepacked(const EnsembleMLP& mlp, const void* prepacked, int64_t bytes);

// Training is three rounds over items, each split among threads like `run`. `prepare_training` sums
// the sample weights of a range of members and tells whether what it reads can be trained on.
enum class TrainingError : int { none, target_out_of_range, sample_weight_invalid };
struct TrainingPlan {
  int64_t items, grain_size, finish_items, finish_grain_size;
  size_t partial_bytes;  // needs no initial value
  size_t scratch_bytes;  // per call of `train`
};
struct Training : EnsembleMLPTraining {
  // One per layer, or nullptr. Then `gradients` say for which parameters there is a step, and none is written;
  // without members that are chosen and a gradient of the input.
  const MLPLayerSteps* steps;
  void* partial;  // partial_bytes, for all threads together
  int threads;    // a hint that changes no bit
};
TrainingPlan plan_training(const Training& training);
TrainingError prepare_training(const Training& training, int64_t begin, int64_t end);
void train(const Training& training, int64_t begin, int64_t end, void* scratch);
void finish_training(const Training& training, int64_t begin, int64_t end);
}  // namespace ensemble_mlp_cpu

// CUDA: launches on `stream` (a cudaStream_t) of the current device and returns nullptr, or says in
// a phrase why it did not. tf32: products of float32 may be those of TF32.
namespace ensemble_mlp_cuda {
// Whether `run` takes all layers in one launch: a member's weights fit into the shared memory that a
// block of the current device may have, and a kernel for as many examples has room beside them. If not,
// each layer is the library's batched product and then `run_epilogue`, layer after layer on the same
// stream.
bool fits_one_launch(const EnsembleMLPParams& params, bool tf32);
const char* run(const EnsembleMLPParams& params, bool tf32, void* stream);
const char* run_epilogue(const EnsembleMLPParams& params, const EnsembleMLPEpilogue& epilogue,
                         void* stream);

// Whether the layers are narrow enough for the training pass, which does not depend on the GPU. Classes
// out of range and sample weights that are negative or not finite give NaN.
bool training_fits_one_launch(const EnsembleMLP& mlp);
size_t scratch_bytes(const EnsembleMLPTraining& training);  // global memory
const char* train(const EnsembleMLPTraining& training, void* scratch, void* stream);
}  // namespace ensemble_mlp_cuda

}  // namespace pyens
