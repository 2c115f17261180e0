// The checks of a loss inside the ensemble MLP, and its calls in the terms of the kernels.

#include "ops/torch.h"

#include <limits>

#include "ops/ensemble_mlp_loss.h"

namespace pyens {

using at::Tensor;
using at::TensorList;

// --- checks --------------------------------------------------------------------------------------

namespace {

struct NamedLoss {
  std::string_view name;
  Loss loss;
};
constexpr NamedLoss kLosses[] = {
    {"mse", Loss::mse},
    {"bce", Loss::bce},
    {"gaussian_nll", Loss::gaussian_nll},
    {"cross_entropy", Loss::cross_entropy},
    {"huber", Loss::huber},
    {"smooth_l1", Loss::smooth_l1},
    {"quantile", Loss::quantile},
    {"poisson_nll", Loss::poisson_nll},
    {"soft_cross_entropy", Loss::soft_cross_entropy},
};

Loss parse_loss(std::string_view name) {
  for (const NamedLoss& known : kLosses) {
    if (known.name == name) return known.loss;
  }
  std::string names;
  for (const NamedLoss& known : kLosses) {
    if (!names.empty()) names += ", ";
    names += known.name;
  }
  TORCH_CHECK_VALUE(false, kLossOp, ": loss: expected one of ", names, ", got \"", name, "\"");
}

// `shape` after an optional member axis.
void check_shape(const char* argument, const Tensor& tensor, const c10::SymInt& members,
                 c10::SymIntArrayRef shape) {
  const auto rank = static_cast<int64_t>(shape.size());
  bool same = tensor.dim() == rank || (tensor.dim() == rank + 1 && tensor.sym_size(0) == members);
  for (int64_t i = 0; same && i < rank; ++i) {
    same = tensor.sym_size(tensor.dim() - rank + i) == shape[static_cast<size_t>(i)];
  }
  PYENS_CHECK_VALUE(
      same, kLossOp, argument,
      [&] {
        std::vector<c10::SymInt> own{members};
        own.insert(own.end(), shape.begin(), shape.end());
        return c10::str("shape ", shape, " or ", c10::SymIntArrayRef(own));
      }(),
      "shape ", tensor.sym_sizes());
}

// `value`: of an option that only these losses have, `none` with all others.
void check_is_of(const char* argument, const char* losses, bool has, double value, double none,
                 std::string_view loss) {
  PYENS_CHECK_VALUE(has || value == none, kLossOp, argument,
                    c10::str(none, " (only ", losses, ") with loss ", loss), value);
}
void check_is_of(const char* argument, const char* losses, bool has, const OptionalTensor& value,
                 std::string_view loss) {
  PYENS_CHECK_VALUE(has || !value, kLossOp, argument,
                    c10::str("None (only ", losses, ") with loss ", loss), "a tensor of shape ",
                    value->sym_sizes());
}

void check_positive(const char* argument, double value) {
  PYENS_CHECK_VALUE(value > 0 && value < std::numeric_limits<double>::infinity(), kLossOp, argument,
                    "a positive number", value);
}

// A tensor [K] or [E, K] of one number for each of `size`.
void check_each(const char* argument, const Tensor& tensor, const Network& network,
                const c10::SymInt& size) {
  check_real(kLossOp, argument, tensor, network.weights);
  check_shape(argument, tensor, network.members(), {size});
}

void check_quantiles(const Network& network, const Tensor& quantiles) {
  PYENS_CHECK_TYPE(quantiles.scalar_type() == at::kDouble, kLossOp, "quantiles", "float64",
                   quantiles.scalar_type());
  check_device_of_weights(kLossOp, "quantiles", quantiles, network.weights);
  PYENS_CHECK_VALUE(quantiles.dim() == 1 && quantiles.sym_size(0) >= 1, kLossOp, "quantiles",
                    "[Q], at least one", "shape ", quantiles.sym_sizes());
  const c10::SymInt out = network.out_features(), count = quantiles.sym_size(0);
  PYENS_CHECK_VALUE(out % count == 0, kLossOp,
                    c10::str("weights[", network.weights.size() - 1, "]"),
                    c10::str("a multiple of ", count, " outputs (each target's quantiles)"), out);
}

// What an example's target is: [features], or a class.
std::vector<c10::SymInt> target_shape(const Network& network, Loss loss,
                                      const LossOptions& options) {
  const c10::SymInt out = network.out_features();
  switch (loss) {
    case Loss::cross_entropy: return {network.batch()};
    case Loss::gaussian_nll: return {network.batch(), out / 2};
    case Loss::quantile: return {network.batch(), out / options.quantiles->sym_size(0)};
    default: return {network.batch(), out};
  }
}

}  // namespace

Loss check_loss(const Network& network, const Tensor& target, const LossOptions& options) {
  const Loss loss = parse_loss(options.loss);
  check_mlp(kLossOp, network, options.mlp);
  const TensorList weights = network.weights;
  const c10::SymInt members = network.members(), batch = network.batch();
  const c10::SymInt out = network.out_features();
  check_device_of_weights(kLossOp, "target", target, weights);
  const bool classes = loss == Loss::cross_entropy || loss == Loss::soft_cross_entropy;
  if (loss == Loss::cross_entropy) {
    PYENS_CHECK_TYPE(target.scalar_type() == at::kLong, kLossOp, "target",
                     "int64 classes for cross_entropy", target.scalar_type());
  } else {
    check_real(kLossOp, "target", target, weights);
  }
  const std::string_view name = options.loss;
  check_is_of("temperature", "cross_entropy and soft_cross_entropy have one", classes,
              options.temperature, 1, name);
  check_positive("temperature", options.temperature);
  check_is_of("label_smoothing", "cross_entropy and soft_cross_entropy have it", classes,
              options.label_smoothing, 0, name);
  PYENS_CHECK_VALUE(options.label_smoothing >= 0 && options.label_smoothing <= 1, kLossOp,
                    "label_smoothing", "a number from 0 to 1", options.label_smoothing);
  check_is_of("delta", "huber and smooth_l1 have one",
              loss == Loss::huber || loss == Loss::smooth_l1, options.delta, 1, name);
  check_positive("delta", options.delta);
  check_is_of("quantiles", "quantile has them", loss == Loss::quantile, options.quantiles, name);
  if (loss == Loss::quantile) {
    PYENS_CHECK_VALUE(options.quantiles, kLossOp, "quantiles", "some with loss quantile", "None");
    check_quantiles(network, *options.quantiles);
  }
  check_is_of("class_weight", "cross_entropy has them", loss == Loss::cross_entropy,
              options.class_weight, name);
  if (options.class_weight) check_each("class_weight", *options.class_weight, network, out);
  const bool gaussian = loss == Loss::gaussian_nll;
  check_is_of("log_variance_min", "gaussian_nll has one", gaussian, options.log_variance_min, name);
  check_is_of("log_variance_max", "gaussian_nll has one", gaussian, options.log_variance_max, name);
  if (gaussian) {
    PYENS_CHECK_VALUE(out % 2 == 0, kLossOp, c10::str("weights[", weights.size() - 1, "]"),
                      "an even number of outputs for gaussian_nll (means, then raw variances)",
                      out);
    PYENS_CHECK_VALUE(options.log_variance_min || !options.log_variance_max, kLossOp,
                      "log_variance_min", "one beside log_variance_max", "None");
    PYENS_CHECK_VALUE(options.log_variance_max || !options.log_variance_min, kLossOp,
                      "log_variance_max", "one beside log_variance_min", "None");
    if (options.log_variance_min) {
      check_each("log_variance_min", *options.log_variance_min, network, out / 2);
      check_each("log_variance_max", *options.log_variance_max, network, out / 2);
    }
  }
  check_shape("target", target, members, target_shape(network, loss, options));
  if (options.sample_weight) {
    check_real(kLossOp, "sample_weight", *options.sample_weight, weights);
    check_shape("sample_weight", *options.sample_weight, members, {batch});
  }
  return loss;
}

// The values of small tensors, on the CPU.
void check_loss_values(const LossOptions& options) {
  if (options.quantiles && is_readable(*options.quantiles)) {
    const Tensor& q = *options.quantiles;
    PYENS_CHECK_VALUE(holds((q > 0).bitwise_and(q < 1)), kLossOp, "quantiles",
                      "numbers above 0 and below 1", kNotIt);
  }
  if (options.class_weight && is_readable(*options.class_weight)) {
    const Tensor& w = *options.class_weight;
    PYENS_CHECK_VALUE(holds(w.isfinite().bitwise_and(w >= 0)), kLossOp, "class_weight",
                      "finite weights of at least 0", kNotIt);
  }
  if (!options.log_variance_min) return;
  const Tensor &least = *options.log_variance_min, &most = *options.log_variance_max;
  if (!is_readable(least) || !is_readable(most)) return;
  PYENS_CHECK_VALUE(holds(least.isfinite()), kLossOp, "log_variance_min", "finite numbers", kNotIt);
  PYENS_CHECK_VALUE(holds(most.isfinite()), kLossOp, "log_variance_max", "finite numbers", kNotIt);
  PYENS_CHECK_VALUE(holds(least <= most), kLossOp, "log_variance_min", "at most log_variance_max",
                    "one above it");
}

// --- the call ------------------------------------------------------------------------------------

namespace {

// What the kernels read of the options; the call keeps what had to be copied.
void set_parameters(TrainingCall& call, const LossOptions& options, at::ScalarType real) {
  LossParameters& p = call.training.of_loss;
  p.temperature = options.temperature;
  p.label_smoothing = options.label_smoothing;
  p.delta = options.delta;
  if (options.quantiles) {
    const Tensor& quantiles = call.copies.emplace_front(options.quantiles->contiguous());
    p.quantiles = quantiles.const_data_ptr<double>();
    p.num_quantiles = quantiles.size(0);
  }
  const auto set = [&](const OptionalTensor& given, const void*& data, int64_t& member_stride) {
    if (!given) return;
    const Tensor& tensor = call.copies.emplace_front(given->to(real).contiguous());
    data = tensor.const_data_ptr();
    member_stride = tensor.dim() == 2 ? tensor.size(1) : 0;
  };
  set(options.class_weight, p.class_weight, p.class_weight_member_stride);
  set(options.log_variance_min, p.log_variance_min, p.log_variance_min_member_stride);
  set(options.log_variance_max, p.log_variance_max, p.log_variance_max_member_stride);
}

}  // namespace

LossCall::LossCall(const Network& network, const Tensor& target, const LossOptions& options,
                   const OptionalTensor& member_scale, const NeedsGrad& needs_grad)
    : TrainingCall(kLossOp, network, options.mlp, needs_grad) {
  const Loss loss = parse_loss(options.loss);
  const at::ScalarType real = accumulation_type(network.input.scalar_type());
  const int64_t members = params.ensemble_size;

  const bool classes = loss == Loss::cross_entropy;
  const Tensor expected = classes ? target : with_contiguous_rows(target.to(real), copies);
  copies.emplace_front(expected);
  const int64_t batch_dim = expected.dim() - (classes ? 1 : 2);
  training.loss = loss;
  set_parameters(*this, options, real);
  training.target = expected.const_data_ptr();
  training.target_row_stride = expected.stride(batch_dim);
  training.target_member_stride = batch_dim == 1 && members > 1 ? expected.stride(0) : 0;
  if (options.sample_weight) {
    const Tensor& weight =
        copies.emplace_front(with_contiguous_rows(options.sample_weight->to(real), copies));
    training.sample_weight = weight.const_data_ptr();
    const bool own = weight.dim() == 2 && members > 1;
    training.sample_weight_member_stride = own ? weight.stride(0) : 0;
  }
  if (member_scale) {
    check_device_of_weights(kLossOp, "member_scale", *member_scale, network.weights);
    PYENS_CHECK_VALUE(member_scale->dim() == 1 && member_scale->size(0) == members, kLossOp,
                      "member_scale", c10::str("[", members, "]"), "shape ", member_scale->sizes());
    training.member_scale =
        copies.emplace_front(member_scale->to(real).contiguous()).const_data_ptr();
  }
  const auto of_losses = network.input.options().dtype(real);
  mean = params.batch == 0 ? at::zeros({members}, of_losses) : at::empty({members}, of_losses);
  training.loss_output = mean.mutable_data_ptr();
}

}  // namespace pyens
