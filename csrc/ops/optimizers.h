// What a step of an optimizer of torch.optim needs, alone (optimizers.cpp) or within a training pass
// (ensemble_mlp_loss_step.cpp).
#pragma once

#include "ops/torch.h"

#include <cmath>

#include "kernels/optimizers.h"
#include "ops/checks.h"

namespace pyens {

// A step by the options of a group of parameters.
struct StepRule {
  StepParams params{};
  double lr = 0, lr_decay = 0;

  // How many tensors are remembered of a parameter.
  size_t states() const {
    switch (params.optimizer) {
      case Optimizer::adam: return params.amsgrad ? 3 : 2;
      case Optimizer::adagrad: return 1;
      default: return params.momentum != 0 ? 1 : 0;
    }
  }
  bool counts_steps() const { return params.optimizer != Optimizer::sgd; }

  // What depends on how many steps a parameter has made, this one among them.
  void set_numbers(StepTensor& t, double step) const {
    switch (params.optimizer) {
      case Optimizer::adam:
        t.rate = lr / (1 - std::pow(params.beta1, step));
        t.root_correction = 1 / std::sqrt(1 - std::pow(params.beta2, step));
        break;
      case Optimizer::adagrad: t.rate = lr / (1 + (step - 1) * lr_decay); break;
      default: t.rate = lr;
    }
  }
};

inline StepRule adam_rule(double lr, double beta1, double beta2, double eps, double weight_decay,
                          bool decoupled_weight_decay, bool maximize, bool amsgrad) {
  StepRule rule;
  StepParams& p = rule.params;
  p.optimizer = Optimizer::adam;
  p.maximize = maximize;
  p.weight_decay = decoupled_weight_decay ? 0 : weight_decay;
  p.shrink = decoupled_weight_decay ? 1 - lr * weight_decay : 1;
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.eps = eps;
  p.amsgrad = amsgrad;
  rule.lr = lr;
  return rule;
}

inline StepRule adagrad_rule(double lr, double lr_decay, double eps, double weight_decay,
                             bool maximize) {
  StepRule rule;
  StepParams& p = rule.params;
  p.optimizer = Optimizer::adagrad;
  p.maximize = maximize;
  p.weight_decay = weight_decay;
  p.eps = eps;
  rule.lr = lr;
  rule.lr_decay = lr_decay;
  return rule;
}

inline StepRule sgd_rule(double lr, double momentum, double dampening, double weight_decay,
                         bool nesterov, bool maximize, bool begins) {
  StepRule rule;
  StepParams& p = rule.params;
  p.optimizer = Optimizer::sgd;
  p.maximize = maximize;
  p.weight_decay = weight_decay;
  p.momentum = momentum;
  p.dampening = dampening;
  p.nesterov = nesterov;
  p.begins = begins;
  rule.lr = lr;
  return rule;
}

// A tensor made under torch.inference_mode counts no versions outside of it, which would come out too late.
inline void check_can_change(const char* op, const char* name, const at::Tensor& tensor) {
  PYENS_CHECK_VALUE(!tensor.is_inference() || c10::InferenceMode::is_enabled(), op, name,
                    "no tensor made under torch.inference_mode", "one");
}

// Raises for what a step cannot change.
inline void check_parameter(const char* op, int64_t index, const at::Tensor& p) {
  PYENS_CHECK_TYPE(is_kernel_dtype(p.scalar_type()), op, (ArgumentName{"parameters", index}),
                   "float32, float64, bfloat16 or float16", p.scalar_type());
  PYENS_CHECK_VALUE(p.is_contiguous(), op, (ArgumentName{"parameters", index}), "contiguous",
                    "strides ", p.strides());
  check_can_change(op, "parameters", p);
}

// `tensor`, named `name`, is a parameter's gradient or what is remembered of it.
inline void check_belongs(const char* op, const char* name, const at::Tensor& tensor,
                          const at::Tensor& parameter) {
  PYENS_CHECK_VALUE(tensor.scalar_type() == parameter.scalar_type() &&
                        tensor.device() == parameter.device() &&
                        tensor.sym_sizes() == parameter.sym_sizes(),
                    op, name,
                    c10::str("shape, dtype and device of the parameter, ", parameter.sym_sizes(),
                             ", ", parameter.scalar_type(), " and ", parameter.device()),
                    tensor.sym_sizes(), ", ", tensor.scalar_type(), " and ", tensor.device());
  check_can_change(op, name, tensor);
}

inline void check_count(const char* op, const at::Tensor& step) {
  PYENS_CHECK_TYPE(step.scalar_type() == at::kFloat || step.scalar_type() == at::kDouble, op,
                   "state['step']", "float32 or float64", step.scalar_type());
  PYENS_CHECK_VALUE(step.sym_numel() == 1, op, "state['step']", "one number", "shape ",
                    step.sym_sizes());
  PYENS_CHECK_TYPE(step.is_cpu(), op, "state['step']", "a tensor on the CPU", step.device());
  check_can_change(op, "state['step']", step);
}

// The number of steps, one more than before.
inline double count_up(const at::Tensor& step) {
  step.unsafeGetTensorImpl()->bump_version();
  if (step.scalar_type() == at::kDouble) return *step.mutable_data_ptr<double>() += 1;
  return *step.mutable_data_ptr<float>() += 1;
}

}  // namespace pyens
