// The options of ensemble_mlp and ensemble_mlp_loss, each said once.
#pragma once

#include "ops/options.h"

namespace pyens {

// Of the layers: one name for all hidden layers, or "a, b, .." with one for each. An activation may have its
// parameter behind it, "elu(0.5)". residual: a 0 or a 1 for each hidden layer, or nothing.
#define PYENS_MLP_OPTIONS(OPTION)                                                 \
  OPTION(std::string_view, activation, "str activation")                          \
  OPTION(double, dropout, "float dropout=0.0")                                    \
  OPTION(OptionalTensor, dropout_seeds, "Tensor? dropout_seeds=None")             \
  OPTION(OptionalTensor, dropout_rates, "Tensor? dropout_rates=None")             \
  OPTION(bool, dropout_before_norm, "bool dropout_before_norm=False")             \
  OPTION(std::string_view, output_activation, "str output_activation='identity'") \
  OPTION(std::string_view, norm, "str norm='none'")                               \
  OPTION(double, norm_eps, "float norm_eps=1e-05")                                \
  OPTION(bool, norm_after_activation, "bool norm_after_activation=False")         \
  OPTION(std::string_view, residual, "str residual=''")                           \
  OPTION(OptionalTensor, members, "Tensor? members=None")                         \
  // a further option stands above this line

struct MLPOptions {
  PYENS_OPTIONS(PYENS_MLP_OPTIONS)
};

// Whether autograd keeps hidden sums for backward; None: where that is cheaper than computing them again.
#define PYENS_FORWARD_OPTIONS(OPTION) \
  OPTION(std::optional<bool>, save_hidden, "bool? save_hidden=None")

struct ForwardOptions {
  MLPOptions mlp;
  PYENS_OPTIONS_AFTER(mlp.fields(), PYENS_FORWARD_OPTIONS)
};

// Of layers that have no more than that.
inline MLPOptions plain_options(std::string_view activation,
                                std::string_view output_activation = "identity") {
  MLPOptions options{};
  options.activation = activation;
  options.output_activation = output_activation;
  options.norm = "none";
  return options;
}

#define PYENS_LOSS_OPTIONS(OPTION)                                     \
  OPTION(std::string_view, loss, "str loss")                           \
  OPTION(double, temperature, "float temperature")                     \
  OPTION(double, label_smoothing, "float label_smoothing")             \
  OPTION(OptionalTensor, sample_weight, "Tensor? sample_weight")       \
  OPTION(double, delta, "float delta")                                 \
  OPTION(OptionalTensor, quantiles, "Tensor? quantiles")               \
  OPTION(OptionalTensor, class_weight, "Tensor? class_weight")         \
  OPTION(OptionalTensor, log_variance_min, "Tensor? log_variance_min") \
  OPTION(OptionalTensor, log_variance_max, "Tensor? log_variance_max")

struct LossOptions {
  PYENS_OPTIONS_AND(PYENS_LOSS_OPTIONS, mlp.fields())
  MLPOptions mlp;
};

}  // namespace pyens
