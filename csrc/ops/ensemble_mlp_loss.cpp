// torch-facing side of the loss inside the ensemble MLP.
//
//   ensemble_mlp_loss                 per-member mean loss [E]
//   ensemble_mlp_loss_with_gradients  the same, and the gradients of the sum of the losses that
//                                     `wanted` asks for: [input, weights.., biases..], in float32
//                                     (float64 for float64), times `member_scale` [E] if given
//
// The gradients come out of the forward pass, and backward only scales them by what comes from above.
// On CUDA the loss of wide layers is composed of aten operations over ensemble_mlp.

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "ops/ensemble_mlp.h"

namespace pyens {
namespace {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kOp = "ensemble_mlp_loss";

Loss parse_loss(std::string_view name) {
  if (name == "mse") return Loss::mse;
  if (name == "bce") return Loss::bce;
  if (name == "gaussian_nll") return Loss::gaussian_nll;
  if (name == "cross_entropy") return Loss::cross_entropy;
  TORCH_CHECK_VALUE(false, kOp,
                    ": loss: expected one of mse, bce, gaussian_nll, cross_entropy, got \"", name,
                    "\"");
}

// The arguments that are not differentiated.
struct Options {
  const Tensor& target;
  std::string_view loss, activation;
  double temperature;
  const OptionalTensor& sample_weight;
  double dropout;
  const OptionalTensor& dropout_seeds;
};

void check_kind_of_real(const char* argument, const Tensor& tensor, const Tensor& weight) {
  const at::ScalarType type = weight.scalar_type();
  PYENS_CHECK_TYPE(tensor.scalar_type() == type || tensor.scalar_type() == accumulation_type(type),
                   kOp, argument,
                   accumulation_type(type) == type
                       ? c10::str("the dtype of ", kFirstWeight, " (", type, ")")
                       : c10::str("the dtype of ", kFirstWeight, " (", type, ") or Float"),
                   tensor.scalar_type());
}

void check_device(const char* argument, const Tensor& tensor, const Tensor& weight) {
  PYENS_CHECK_TYPE(tensor.device() == weight.device(), kOp, argument,
                   c10::str("the device of ", kFirstWeight, " (", weight.device(), ")"),
                   tensor.device());
}

// `shape` after an optional member axis.
void check_shape(const char* argument, const Tensor& tensor, const c10::SymInt& members,
                 c10::SymIntArrayRef shape) {
  const auto rank = static_cast<int64_t>(shape.size());
  const bool fits =
      tensor.dim() == rank || (tensor.dim() == rank + 1 && tensor.sym_size(0) == members);
  bool same = fits;
  for (int64_t i = 0; same && i < rank; ++i) {
    same = tensor.sym_size(tensor.dim() - rank + i) == shape[static_cast<size_t>(i)];
  }
  PYENS_CHECK_VALUE(
      same, kOp, argument,
      [&] {
        std::vector<c10::SymInt> own{members};
        own.insert(own.end(), shape.begin(), shape.end());
        return c10::str("shape ", shape, " or ", c10::SymIntArrayRef(own));
      }(),
      "shape ", tensor.sym_sizes());
}

Loss check(const Tensor& input, TensorList weights, TensorList biases, const Options& o) {
  const Loss loss = parse_loss(o.loss);
  parse_activation(kOp, o.activation);
  check_layers(kOp, weights, biases);
  check_input(kOp, input, weights);
  check_dropout(kOp, o.dropout, o.dropout_seeds, weights);
  const c10::SymInt members = weights[0].sym_size(0), batch = input.sym_size(-2);
  const c10::SymInt out = weights.back().sym_size(1);
  check_device("target", o.target, weights[0]);
  if (loss == Loss::cross_entropy) {
    PYENS_CHECK_TYPE(o.target.scalar_type() == at::kLong, kOp, "target",
                     "int64 classes for cross_entropy", o.target.scalar_type());
    check_shape("target", o.target, members, {batch});
    PYENS_CHECK_VALUE(o.temperature > 0 && o.temperature < std::numeric_limits<double>::infinity(),
                      kOp, "temperature", "a positive number", o.temperature);
  } else {
    check_kind_of_real("target", o.target, weights[0]);
    PYENS_CHECK_VALUE(o.temperature == 1, kOp, "temperature",
                      c10::str("1 (only cross_entropy has one) with loss ", o.loss), o.temperature);
    if (loss == Loss::gaussian_nll) {
      PYENS_CHECK_VALUE(out % 2 == 0, kOp, c10::str("weights[", weights.size() - 1, "]"),
                        "an even number of outputs for gaussian_nll (means, then raw variances)",
                        out);
    }
    check_shape("target", o.target, members,
                {batch, loss == Loss::gaussian_nll ? c10::SymInt(out / 2) : out});
  }
  if (o.sample_weight) {
    check_device("sample_weight", *o.sample_weight, weights[0]);
    check_kind_of_real("sample_weight", *o.sample_weight, weights[0]);
    check_shape("sample_weight", *o.sample_weight, members, {batch});
  }
  return loss;
}

std::tuple<Tensor, std::vector<Tensor>> ensemble_mlp_loss_with_gradients(
    const Tensor& input, const Tensor& target, TensorList weights, TensorList biases,
    std::string_view loss, std::string_view activation, double temperature,
    const OptionalTensor& sample_weight, double dropout, const OptionalTensor& dropout_seeds,
    const OptionalTensor& member_scale, Wanted wanted) {
  const Options options{target,        loss,    activation,   temperature,
                        sample_weight, dropout, dropout_seeds};
  const Loss kind = check(input, weights, biases, options);
  TrainingProblem problem(kOp, input, weights, biases, parse_activation(kOp, activation), dropout,
                          dropout_seeds, wanted);
  EnsembleMLPTraining& training = problem.training;
  const at::ScalarType real = accumulation_type(input.scalar_type());
  const int64_t members = problem.params.ensemble_size;

  const bool classes = kind == Loss::cross_entropy;
  const Tensor expected = classes ? target : with_contiguous_rows(target.to(real), problem.copies);
  const int64_t batch_dim = expected.dim() - (classes ? 1 : 2);
  training.loss = kind;
  training.temperature = temperature;
  training.target = expected.const_data_ptr();
  training.target_row_stride = expected.stride(batch_dim);
  training.target_member_stride = batch_dim == 1 && members > 1 ? expected.stride(0) : 0;
  Tensor example_weight;
  if (sample_weight) {
    example_weight = with_contiguous_rows(sample_weight->to(real), problem.copies);
    training.sample_weight = example_weight.const_data_ptr();
    const bool own = example_weight.dim() == 2 && members > 1;
    training.sample_weight_member_stride = own ? example_weight.stride(0) : 0;
  }
  Tensor scale;
  if (member_scale) {
    check_device("member_scale", *member_scale, weights[0]);
    PYENS_CHECK_VALUE(member_scale->dim() == 1 && member_scale->size(0) == members, kOp,
                      "member_scale", c10::str("[", members, "]"), "shape ", member_scale->sizes());
    scale = member_scale->to(real).contiguous();
    training.member_scale = scale.const_data_ptr();
  }
  const auto real_options = input.options().dtype(real);
  Tensor mean = problem.params.batch == 0 ? at::zeros({members}, real_options)
                                          : at::empty({members}, real_options);
  training.loss_output = mean.mutable_data_ptr();
  problem.run(kOp);
  return {mean, problem.gradients};
}

Tensor ensemble_mlp_loss(const Tensor& input, const Tensor& target, TensorList weights,
                         TensorList biases, std::string_view loss, std::string_view activation,
                         double temperature, const OptionalTensor& sample_weight, double dropout,
                         const OptionalTensor& dropout_seeds) {
  Wanted nothing;
  nothing.resize(1 + weights.size() + biases.size(), false);
  return std::get<0>(ensemble_mlp_loss_with_gradients(input, target, weights, biases, loss,
                                                      activation, temperature, sample_weight,
                                                      dropout, dropout_seeds, {}, nothing));
}

std::tuple<Tensor, std::vector<Tensor>> ensemble_mlp_loss_with_gradients_meta(
    const Tensor& input, const Tensor& target, TensorList weights, TensorList biases,
    std::string_view loss, std::string_view activation, double temperature,
    const OptionalTensor& sample_weight, double dropout, const OptionalTensor& dropout_seeds,
    const OptionalTensor& /*member_scale*/, Wanted wanted) {
  check(input, weights, biases,
        {target, loss, activation, temperature, sample_weight, dropout, dropout_seeds});
  const auto options = input.options().dtype(accumulation_type(input.scalar_type()));
  std::vector<Tensor> gradients = wanted_of(kOp, input, weights, biases, wanted);
  for (Tensor& gradient : gradients) gradient = at::empty_symint(gradient.sym_sizes(), options);
  return {at::empty_symint({weights[0].sym_size(0)}, options), gradients};
}

Tensor ensemble_mlp_loss_meta(const Tensor& input, const Tensor& target, TensorList weights,
                              TensorList biases, std::string_view loss, std::string_view activation,
                              double temperature, const OptionalTensor& sample_weight,
                              double dropout, const OptionalTensor& dropout_seeds) {
  check(input, weights, biases,
        {target, loss, activation, temperature, sample_weight, dropout, dropout_seeds});
  return at::empty_symint({weights[0].sym_size(0)},
                          input.options().dtype(accumulation_type(input.scalar_type())));
}

// Asked before the layers are checked.
bool may_train_in_one_launch(TensorList weights) {
  const auto is_matrices = [](const Tensor& w) { return w.dim() == 3; };
  if (weights.empty() || !std::all_of(weights.begin(), weights.end(), is_matrices)) return false;
  return trains_in_one_launch(weights);
}

// --- composed of aten ------------------------------------------------------------------------------

// Of outputs [E, B, O] in float32 or float64; the mean over the outputs of each example, [E, B].
Tensor example_losses(const Tensor& z, const Tensor& target, Loss loss, double temperature) {
  switch (loss) {
    case Loss::mse: return (z - target).square().mean(-1);
    case Loss::bce:
      return at::binary_cross_entropy_with_logits(z, target.expand_symint(z.sym_sizes()), {}, {},
                                                  at::Reduction::None)
          .mean(-1);
    case Loss::gaussian_nll: {
      const std::vector<Tensor> halves = z.chunk(2, -1);
      const Tensor variance = at::softplus(halves[1]) + 1e-6;
      return (variance.log() + (target - halves[0]).square() / variance).mean(-1) / 2;
    }
    case Loss::cross_entropy: {
      // Nothing is read out of bounds: a class that there is not gives NaN.
      const Tensor exists = (target >= 0).bitwise_and(target < z.sym_size(-1));
      const Tensor label = at::where(exists, target, at::zeros({}, target.options()));
      const Tensor index = label.expand_symint(z.sym_sizes().slice(0, 2)).unsqueeze(-1);
      const Tensor found = -at::log_softmax(z / temperature, -1).gather(-1, index).squeeze(-1);
      return at::where(exists, found, at::full({}, NAN, found.options()));
    }
    case Loss::none: break;
  }
  return z;
}

// Differentiable as often as ensemble_mlp is.
Tensor composed_loss(const Tensor& input, const Tensor& target, TensorList weights,
                     TensorList biases, std::string_view loss, std::string_view activation,
                     double temperature, const OptionalTensor& sample_weight, double dropout,
                     const OptionalTensor& dropout_seeds) {
  const Loss kind =
      check(input, weights, biases,
            {target, loss, activation, temperature, sample_weight, dropout, dropout_seeds});
  const at::ScalarType real = accumulation_type(input.scalar_type());
  const Tensor expected = kind == Loss::cross_entropy ? target : target.to(real);
  const auto evaluate = [&](const Tensor& x, const Tensor& y) {
    const Tensor z =
        call_ensemble_mlp(x, weights, biases, activation, dropout, dropout_seeds).to(real);
    return example_losses(z, y, kind, temperature);
  };
  if (!sample_weight) {
    const Tensor losses = evaluate(input, expected);
    return losses.sum(-1) /
           at::clamp_min(at::scalar_tensor(input.sym_size(-2), losses.options()), 1);
  }
  // Selected, not multiplied by 0: what is left out may be NaN.
  const Tensor weight = sample_weight->to(real), present = weight != 0;
  const Tensor x = at::where(present.unsqueeze(-1), input, at::zeros({}, input.options()));
  const Tensor y = at::where(kind == Loss::cross_entropy ? present : present.unsqueeze(-1),
                             expected, at::zeros({}, expected.options()));
  const Tensor losses = evaluate(x, y), total = weight.sum(-1);
  const Tensor zero = at::zeros({}, losses.options());
  // Divided by 1 where there is nothing, or the gradient would be 0/0.
  const Tensor mean = (losses * weight).sum(-1) / at::where(total > 0, total, zero + 1);
  return at::where(total > 0, mean, zero);
}

Tensor ensemble_mlp_loss_cuda(const Tensor& input, const Tensor& target, TensorList weights,
                              TensorList biases, std::string_view loss, std::string_view activation,
                              double temperature, const OptionalTensor& sample_weight,
                              double dropout, const OptionalTensor& dropout_seeds) {
  const auto compute = may_train_in_one_launch(weights) ? ensemble_mlp_loss : composed_loss;
  return compute(input, target, weights, biases, loss, activation, temperature, sample_weight,
                 dropout, dropout_seeds);
}

// --- autograd --------------------------------------------------------------------------------------

auto call_with_gradients(const Tensor& input, TensorList weights, TensorList biases,
                         const Options& o, const OptionalTensor& member_scale,
                         const Wanted& wanted) {
  static const auto op = dispatcher_op<std::tuple<Tensor, std::vector<Tensor>>(
      const Tensor&, const Tensor&, TensorList, TensorList, std::string_view, std::string_view,
      double, const OptionalTensor&, double, const OptionalTensor&, const OptionalTensor&, Wanted)>(
      "pyens::ensemble_mlp_loss_with_gradients");
  return op.call(input, o.target, weights, biases, o.loss, o.activation, o.temperature,
                 o.sample_weight, o.dropout, o.dropout_seeds, member_scale, wanted);
}

// Whether it is a tensor of numbers that lie here and are all 1, as loss.sum().backward() gives.
bool is_all_ones(const Tensor& grad) {
  constexpr c10::DispatchKeySet traced =
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize});
  if (!grad.device().is_cpu() || grad.key_set().has_any(traced)) return false;
  return at::native::is_nonzero((grad == 1).all());
}

class EnsembleMLPLossFunction : public torch::autograd::Function<EnsembleMLPLossFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, TensorList weights,
                        TensorList biases, const Tensor& target, std::string loss,
                        std::string activation, double temperature,
                        const OptionalTensor& sample_weight, double dropout,
                        const OptionalTensor& dropout_seeds, const Wanted& wanted) {
    const Options options{target,        loss,    activation,   temperature,
                          sample_weight, dropout, dropout_seeds};
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [mean, gradients] = call_with_gradients(input, weights, biases, options, {}, wanted);
    variable_list saved{input};
    saved.insert(saved.end(), weights.begin(), weights.end());
    saved.insert(saved.end(), biases.begin(), biases.end());
    saved.push_back(target);
    saved.push_back(sample_weight.value_or(Tensor()));
    saved.push_back(dropout_seeds.value_or(Tensor()));
    saved.insert(saved.end(), gradients.begin(), gradients.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["layers"] = static_cast<int64_t>(weights.size());
    ctx->saved_data["biases"] = static_cast<int64_t>(biases.size());
    ctx->saved_data["loss"] = loss;
    ctx->saved_data["activation"] = activation;
    ctx->saved_data["temperature"] = temperature;
    ctx->saved_data["dropout"] = dropout;
    return mean;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const auto layers = static_cast<size_t>(ctx->saved_data["layers"].toInt());
    const auto differentiable = 1 + layers + static_cast<size_t>(ctx->saved_data["biases"].toInt());
    const TensorList all(saved);
    const Tensor& input = saved[0];
    const TensorList weights = all.slice(1, layers);
    const TensorList biases = all.slice(1 + layers, differentiable - 1 - layers);
    const auto optional = [&](const Tensor& t) {
      return t.defined() ? OptionalTensor(t) : std::nullopt;
    };
    const OptionalTensor sample_weight = optional(saved[differentiable + 1]);
    const OptionalTensor seeds = optional(saved[differentiable + 2]);
    const Options options{saved[differentiable],
                          ctx->saved_data["loss"].toStringRef(),
                          ctx->saved_data["activation"].toStringRef(),
                          ctx->saved_data["temperature"].toDouble(),
                          sample_weight,
                          ctx->saved_data["dropout"].toDouble(),
                          seeds};
    const Tensor& grad = grad_outputs[0];
    variable_list grads(differentiable + 8);  // the last ones: target and what follows it

    if (at::GradMode::is_enabled()) {  // create_graph
      const Tensor mean =
          composed_loss(input, options.target, weights, biases, options.loss, options.activation,
                        options.temperature, sample_weight, options.dropout, seeds);
      variable_list by;
      for (size_t i = 0; i < differentiable; ++i) {
        if (ctx->needs_input_grad(i)) by.push_back(saved[i]);
      }
      const variable_list found =
          torch::autograd::grad({mean}, by, {grad}, /*retain_graph=*/true, /*create_graph=*/true);
      for (size_t i = 0, next = 0; i < differentiable; ++i) {
        if (ctx->needs_input_grad(i)) grads[i] = found[next++];
      }
      return grads;
    }

    const bool by_shared_input = input.dim() == 2 && ctx->needs_input_grad(0);
    if (by_shared_input) {
      Wanted input_only;
      input_only.resize(differentiable, false);
      input_only[0] = true;
      const auto found = call_with_gradients(input, weights, biases, options, grad, input_only);
      grads[0] = std::get<1>(found)[0].to(input.scalar_type());
    }
    const bool unscaled = is_all_ones(grad);
    size_t next = differentiable + 3;
    for (size_t i = by_shared_input ? 1 : 0; i < differentiable; ++i) {
      if (!ctx->needs_input_grad(i)) continue;
      const Tensor& gradient = saved[next++];
      const Tensor factor =
          grad.view(gradient.dim() == 3 ? at::IntArrayRef{-1, 1, 1} : at::IntArrayRef{-1, 1});
      grads[i] = (unscaled ? gradient : gradient * factor).to(saved[i].scalar_type());
    }
    return grads;
  }
};

Tensor ensemble_mlp_loss_autograd(const Tensor& input, const Tensor& target, TensorList weights,
                                  TensorList biases, std::string_view loss,
                                  std::string_view activation, double temperature,
                                  const OptionalTensor& sample_weight, double dropout,
                                  const OptionalTensor& dropout_seeds) {
  TORCH_CHECK_VALUE(!target.requires_grad(), kOp,
                    ": target: expected requires_grad=False (it gets no gradient), got True");
  TORCH_CHECK_VALUE(
      !sample_weight || !sample_weight->requires_grad(), kOp,
      ": sample_weight: expected requires_grad=False (it gets no gradient), got True");
  if (input.is_cuda() && !may_train_in_one_launch(weights)) {
    return composed_loss(input, target, weights, biases, loss, activation, temperature,
                         sample_weight, dropout, dropout_seeds);
  }
  const auto is_wanted = [](const Tensor& t) {
    return at::GradMode::is_enabled() && t.requires_grad();
  };
  // A shared input's gradient sums over members whose scale only backward knows.
  Wanted wanted{input.dim() == 3 && is_wanted(input)};
  for (const Tensor& w : weights) wanted.push_back(is_wanted(w));
  for (const Tensor& b : biases) wanted.push_back(is_wanted(b));
  return EnsembleMLPLossFunction::apply(input, weights, biases, target, std::string(loss),
                                        std::string(activation), temperature, sample_weight,
                                        dropout, dropout_seeds, wanted);
}

// --- autocast --------------------------------------------------------------------------------------

// The matrices cast as linear does; the loss is computed in float32 whatever they are.
template <c10::DeviceType device, c10::DispatchKey key>
Tensor ensemble_mlp_loss_autocast(const Tensor& input, const Tensor& target, TensorList weights,
                                  TensorList biases, std::string_view loss,
                                  std::string_view activation, double temperature,
                                  const OptionalTensor& sample_weight, double dropout,
                                  const OptionalTensor& dropout_seeds) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  return ensemble_mlp_loss_autograd(at::autocast::cached_cast(type, input, device), target,
                                    at::autocast::cached_cast(type, weights, device),
                                    at::autocast::cached_cast(type, biases, device), loss,
                                    activation, temperature, sample_weight, dropout, dropout_seeds);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyens, CPU, m) {
  m.impl("ensemble_mlp_loss", ensemble_mlp_loss);
  m.impl("ensemble_mlp_loss_with_gradients", ensemble_mlp_loss_with_gradients);
}

TORCH_LIBRARY_IMPL(pyens, CUDA, m) {
  m.impl("ensemble_mlp_loss", ensemble_mlp_loss_cuda);
  m.impl("ensemble_mlp_loss_with_gradients", ensemble_mlp_loss_with_gradients);
}

TORCH_LIBRARY_IMPL(pyens, Meta, m) {
  m.impl("ensemble_mlp_loss", ensemble_mlp_loss_meta);
  m.impl("ensemble_mlp_loss_with_gradients", ensemble_mlp_loss_with_gradients_meta);
}

TORCH_LIBRARY_IMPL(pyens, Autograd, m) {
  m.impl("ensemble_mlp_loss", ensemble_mlp_loss_autograd);
  m.impl("ensemble_mlp_loss_with_gradients", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(pyens, AutocastCPU, m) {
  m.impl("ensemble_mlp_loss",
         ensemble_mlp_loss_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(pyens, AutocastCUDA, m) {
  m.impl("ensemble_mlp_loss",
         ensemble_mlp_loss_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace pyens
