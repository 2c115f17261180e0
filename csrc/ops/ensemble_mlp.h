// What the torch-facing sides of ensemble_mlp, ensemble_mlp_loss and activation_strength share: their
// options and checks, and calls in the terms of the kernels.
#pragma once

#include "ops/torch.h"

#include <array>
#include <forward_list>
#include <functional>
#include <string_view>
#include <vector>

#include "kernels/ensemble_mlp.h"
#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/ensemble_mlp_options.h"
#include "ops/operation.h"

namespace pyens {

// The tensors that are differentiated, and the order of their gradients: input, weights, biases, and the
// weights and biases of the norms.
struct Network {
  const at::Tensor& input;
  at::TensorList weights;
  at::TensorList biases;  // empty where there are none; [E, 0] for a layer that has none
  at::TensorList norm_weights,
      norm_biases;               // of the layers that have a norm; empty: ones and zeros
  const OptionalTensor& chosen;  // members, or all

  // Of the output: those that are computed, and what they compute.
  c10::SymInt members() const { return chosen ? chosen->sym_size(0) : weights[0].sym_size(0); }
  c10::SymInt batch() const { return input.sym_size(-2); }
  c10::SymInt out_features() const { return weights.back().sym_size(1); }

  Network with_input(const at::Tensor& other) const {
    return {other, weights, biases, norm_weights, norm_biases, chosen};
  }
  std::array<at::TensorList, 4> lists() const {
    return {weights, biases, norm_weights, norm_biases};
  }
  size_t tensors() const {
    return 1 + weights.size() + biases.size() + norm_weights.size() + norm_biases.size();
  }
  const at::Tensor& tensor(size_t i) const {
    if (i-- == 0) return input;
    for (const at::TensorList list : lists()) {
      if (i < list.size()) return list[i];
      i -= list.size();
    }
    return input;
  }
};

// What a network's operations take after their first arguments; for backward they lie in this order.
#define PYENS_NETWORK \
  "Tensor[] weights, Tensor[] biases, Tensor[] norm_weights, Tensor[] norm_biases"

// Whether each tensor of a network needs a gradient. The name of the argument is `needs_grad`.
using NeedsGrad = c10::List<bool>;

// Tensors for those of a network that need a gradient, each made by make(tensor), in their order.
template <class Make>
std::vector<at::Tensor> for_each_needed(const char* op, const Network& network,
                                        const NeedsGrad& needs_grad, const Make& make) {
  PYENS_CHECK_VALUE(needs_grad.size() == network.tensors(), op, "needs_grad",
                    c10::str(network.tensors(), " flags"), needs_grad.size());
  std::vector<at::Tensor> made;
  for (size_t i = 0; i < network.tensors(); ++i) {
    if (needs_grad[i]) made.push_back(make(network.tensor(i)));
  }
  return made;
}

// The tensors of a network behind its input, and how many of each kind.
void save_network(torch::autograd::AutogradContext* ctx, const Network& network,
                  torch::autograd::variable_list& tensors);
// Valid for as long as the others are.
Network saved_network(torch::autograd::AutogradContext* ctx, const at::Tensor& input,
                      const MLPOptions& options, SavedTensors& tensors);

// --- checks --------------------------------------------------------------------------------------

// What the options say of each layer; the last one has an activation alone.
struct LayerOptions {
  Activation activation;
  NormKind norm = NormKind::none;
  bool residual = false;
};
using LayersOptions = c10::SmallVector<LayerOptions, 8>;
LayersOptions parse_layers(const char* op, const MLPOptions& options, size_t layers);

inline constexpr ArgumentName kFirstWeight{"weights", 0};

// Layers that fit each other. Independent of the input, so that prepacking can check alone.
void check_layers(const char* op, at::TensorList weights, at::TensorList biases);
void check_network(const char* op, const Network& network);
// The network and its options.
void check_mlp(const char* op, const Network& network, const MLPOptions& options);
void check_device_of_weights(const char* op, const char* argument, const at::Tensor& tensor,
                             at::TensorList weights);
// Of the dtype of the weights or, where those have 16 bits, float32.
void check_real(const char* op, const char* argument, const at::Tensor& tensor,
                at::TensorList weights);

// --- calls in the terms of the kernels -------------------------------------------------------------

// The tensors outlive it; owns what had to be copied.
struct ForwardCall {
  std::forward_list<at::Tensor> copies;
  c10::SmallVector<MLPLayer, 8> layers;
  ensemble_mlp_cpu::Forward params{};

  ForwardCall(at::TensorList weights, at::TensorList biases);
  // Checked before.
  ForwardCall(const char* op, const Network& network, const MLPOptions& options);
  ForwardCall(const ForwardCall&) = delete;
  ForwardCall& operator=(const ForwardCall&) = delete;

  void set_input(const at::Tensor& input);
  // Computes what `params` ask for, on the device of the network that they were made of.
  void run(const char* op, const Network& network);

 private:
  void set_layers(const char* op, const Network& network, const MLPOptions& options);
  void set_members(const char* op, const Network& network);
  void set_dropout(const char* op, const MLPOptions& options);
};

// A training pass, and the gradients that are needed of it, of accumulation_type: those of parameters by
// the members that are computed, [members, ...].
struct TrainingCall : ForwardCall {
  ensemble_mlp_cpu::Training training{};
  std::vector<at::Tensor> gradients;

  TrainingCall(const char* op, const Network& network, const MLPOptions& options,
               const NeedsGrad& needs_grad);
  // On the CPU it raises for values that cannot be trained on; on CUDA they give NaN. `accepted` is called when nothing
  // can be refused any more and nothing has been computed.
  void run(const char* op, const std::function<void()>& accepted = {});
  // In the place of gradients: steps of the network's tensors behind its input, those that have one. They outlive it.
  void make_steps(const Network& network, c10::ArrayRef<MLPParameterStep> steps);

 private:
  const at::Tensor& input_;
  c10::SmallVector<MLPLayerGradient, 8> layer_gradients_;
  c10::SmallVector<MLPLayerSteps, 8> layer_steps_;
  void run_on_cpu(const char* op, const std::function<void()>& accepted);
};

// Whether a training pass on CUDA fits one launch, or has to be composed of matrix products. False for what is
// no list of [E, out, in]: it may be asked before the layers are checked.
bool training_fits_one_launch(const char* op, at::TensorList weights, const MLPOptions& options);

// --- through the dispatcher -------------------------------------------------------------------------

at::Tensor call_ensemble_mlp(const MLPOptions& options, const Network& network);

// Indices that the library can take: on CUDA those out of range, whose outputs are NaN, brought into it.
at::Tensor members_within(const Network& network);

// A parameter's gradient [members, ...] by those that were computed as that of all of them: what one was
// computed for several times is added up, in their order.
at::Tensor gradient_of_all(const Network& network, const at::Tensor& gradient);

}  // namespace pyens
