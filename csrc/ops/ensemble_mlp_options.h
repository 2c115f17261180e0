// The options of ensemble_mlp and ensemble_mlp_loss, each said once.
#pragma once

#include "ops/options.h"

namespace pyens {

#define PYENS_MLP_OPTIONS(OPTION)                                     \
  OPTION(std::string_view, activation, "str activation")              \
  OPTION(double, dropout, "float dropout=0.0")                        \
  OPTION(OptionalTensor, dropout_seeds, "Tensor? dropout_seeds=None") \
  OPTION(OptionalTensor, dropout_rates, "Tensor? dropout_rates=None") \
  // a further option stands above this line

struct MLPOptions {
  PYENS_OPTIONS(PYENS_MLP_OPTIONS)
};

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
