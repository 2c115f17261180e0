// What the torch-facing sides of ensemble_mlp, ensemble_mlp_loss and activation_strength share: their
// options and checks, and calls in the terms of the kernels.
#pragma once

#include "ops/torch.h"

#include <forward_list>
#include <string_view>
#include <vector>

#include "kernels/ensemble_mlp.h"
#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/ensemble_mlp_options.h"

namespace pyens {

// The tensors that are differentiated, and the order of their gradients: input, weights, biases.
struct Network {
  const at::Tensor& input;
  at::TensorList weights, biases;  // biases: empty where there are none

  c10::SymInt members() const { return weights[0].sym_size(0); }
  c10::SymInt batch() const { return input.sym_size(-2); }
  c10::SymInt out_features() const { return weights.back().sym_size(1); }
  size_t tensors() const { return 1 + weights.size() + biases.size(); }
  const at::Tensor& tensor(size_t i) const {
    if (i == 0) return input;
    return i <= weights.size() ? weights[i - 1] : biases[i - 1 - weights.size()];
  }
};

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

// --- checks --------------------------------------------------------------------------------------

ActivationKind parse_activation(const char* op, std::string_view name);

inline constexpr ArgumentName kFirstWeight{"weights", 0};

// Layers that fit each other. Independent of the input, so that prepacking can check alone.
void check_layers(const char* op, at::TensorList weights, at::TensorList biases);
void check_network(const char* op, const Network& network);
// The network and its options; returns the activation that they name.
ActivationKind check_mlp(const char* op, const Network& network, const MLPOptions& options);
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
  ForwardCall(const ForwardCall&) = delete;
  ForwardCall& operator=(const ForwardCall&) = delete;

  void set_input(const at::Tensor& input);
  void set_options(const char* op, ActivationKind activation, const MLPOptions& options);
  // Computes what `params` ask for, on the device of the network that they were made of.
  void run(const char* op, const Network& network);
};

// A training pass, and the gradients that are needed of it, of accumulation_type.
struct TrainingCall : ForwardCall {
  ensemble_mlp_cpu::Training training{};
  std::vector<at::Tensor> gradients;

  TrainingCall(const char* op, const Network& network, const MLPOptions& options,
               const NeedsGrad& needs_grad);
  // On the CPU it raises for values that cannot be trained on; on CUDA they give NaN.
  void run(const char* op);

 private:
  const at::Tensor& input_;
  c10::SmallVector<MLPLayerGradient, 8> layer_gradients_;
  void run_on_cpu(const char* op);
};

// Whether a training pass on CUDA fits one launch, or has to be composed of matrix products. False for what is
// no list of [E, out, in]: it may be asked before the layers are checked.
bool training_fits_one_launch(at::TensorList weights);

// --- through the dispatcher -------------------------------------------------------------------------

at::Tensor call_ensemble_mlp(const MLPOptions& options, const Network& network);

}  // namespace pyens
