// What the operations of a loss inside the ensemble MLP share: ensemble_mlp_loss and ensemble_mlp_loss_step.
#pragma once

#include "ops/ensemble_mlp.h"

namespace pyens {

inline constexpr char kLossOp[] = "ensemble_mlp_loss";  // of errors

// --- checks --------------------------------------------------------------------------------------

// The loss by its name, with a network, a target and options that fit it.
Loss check_loss(const Network& network, const at::Tensor& target, const LossOptions& options);
// The values of small tensors, on the CPU.
void check_loss_values(const LossOptions& options);

// Whether a tensor's numbers lie in memory that can be looked at here.
inline bool is_readable(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet traced =
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize});
  return tensor.device().is_cpu() && !tensor.key_set().has_any(traced) && !is_batched(tensor);
}

inline bool holds(const at::Tensor& all) { return at::native::is_nonzero(all.all()); }
inline constexpr char kNotIt[] = "one that is not";

// --- calls ---------------------------------------------------------------------------------------

// Through the dispatcher.
at::Tensor call_ensemble_mlp_loss(const LossOptions& options, const Network& network,
                                  const at::Tensor& target);

// A training pass of what has been checked, and the members' mean losses.
struct LossCall : TrainingCall {
  at::Tensor mean;  // [E]

  LossCall(const Network& network, const at::Tensor& target, const LossOptions& options,
           const OptionalTensor& member_scale, const NeedsGrad& needs_grad);
};

}  // namespace pyens
