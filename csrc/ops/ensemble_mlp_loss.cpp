// The loss inside the ensemble MLP.
//
//   ensemble_mlp_loss                 per-member mean loss [E]
//   ensemble_mlp_loss_with_gradients  the same, and the gradients of the sum of the losses by those tensors
//                                     that need one, [input, weights.., biases..], in float32 (float64 for
//                                     float64), times `member_scale` [E] if given
//
// The gradients come out of the forward pass, and backward only scales them by what comes from above.
// On CUDA the loss of wide layers is composed of torch's own operations over ensemble_mlp.

#include "ops/torch.h"

#include <limits>
#include <tuple>

#include "ops/ensemble_mlp.h"
#include "ops/operation.h"

namespace pyens {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kOp[] = "ensemble_mlp_loss";
constexpr char kWithGradients[] = "ensemble_mlp_loss_with_gradients";

Loss parse_loss(std::string_view name) {
  if (name == "mse") return Loss::mse;
  if (name == "bce") return Loss::bce;
  if (name == "gaussian_nll") return Loss::gaussian_nll;
  if (name == "cross_entropy") return Loss::cross_entropy;
  TORCH_CHECK_VALUE(false, kOp,
                    ": loss: expected one of mse, bce, gaussian_nll, cross_entropy, got \"", name,
                    "\"");
}

// --- checks --------------------------------------------------------------------------------------

// `shape` after an optional member axis.
void check_shape(const char* argument, const Tensor& tensor, const c10::SymInt& members,
                 c10::SymIntArrayRef shape) {
  const auto rank = static_cast<int64_t>(shape.size());
  bool same = tensor.dim() == rank || (tensor.dim() == rank + 1 && tensor.sym_size(0) == members);
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

Loss check(const Network& network, const Tensor& target, const LossOptions& options) {
  const Loss loss = parse_loss(options.loss);
  check_mlp(kOp, network, options.mlp);
  const TensorList weights = network.weights;
  const c10::SymInt members = network.members(), batch = network.batch();
  const c10::SymInt out = network.out_features();
  check_device_of_weights(kOp, "target", target, weights);
  if (loss == Loss::cross_entropy) {
    PYENS_CHECK_TYPE(target.scalar_type() == at::kLong, kOp, "target",
                     "int64 classes for cross_entropy", target.scalar_type());
    check_shape("target", target, members, {batch});
    PYENS_CHECK_VALUE(
        options.temperature > 0 && options.temperature < std::numeric_limits<double>::infinity(),
        kOp, "temperature", "a positive number", options.temperature);
    PYENS_CHECK_VALUE(options.label_smoothing >= 0 && options.label_smoothing <= 1, kOp,
                      "label_smoothing", "a number from 0 to 1", options.label_smoothing);
  } else {
    check_real(kOp, "target", target, weights);
    PYENS_CHECK_VALUE(options.temperature == 1, kOp, "temperature",
                      c10::str("1 (only cross_entropy has one) with loss ", options.loss),
                      options.temperature);
    PYENS_CHECK_VALUE(options.label_smoothing == 0, kOp, "label_smoothing",
                      c10::str("0 (only cross_entropy has it) with loss ", options.loss),
                      options.label_smoothing);
    if (loss == Loss::gaussian_nll) {
      PYENS_CHECK_VALUE(out % 2 == 0, kOp, c10::str("weights[", weights.size() - 1, "]"),
                        "an even number of outputs for gaussian_nll (means, then raw variances)",
                        out);
    }
    check_shape("target", target, members,
                {batch, loss == Loss::gaussian_nll ? c10::SymInt(out / 2) : out});
  }
  if (options.sample_weight) {
    check_real(kOp, "sample_weight", *options.sample_weight, weights);
    check_shape("sample_weight", *options.sample_weight, members, {batch});
  }
  return loss;
}

// --- the loss and its gradients --------------------------------------------------------------------

std::tuple<Tensor, std::vector<Tensor>> ensemble_mlp_loss_with_gradients(
    const LossOptions& options, const Tensor& input, const Tensor& target, TensorList weights,
    TensorList biases, TensorList norm_weights, TensorList norm_biases,
    const OptionalTensor& member_scale, NeedsGrad needs_grad) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.mlp.members};
  const Loss loss = check(network, target, options);
  TrainingCall call(kOp, network, options.mlp, needs_grad);
  EnsembleMLPTraining& training = call.training;
  const at::ScalarType real = accumulation_type(input.scalar_type());
  const int64_t members = call.params.ensemble_size;

  const bool classes = loss == Loss::cross_entropy;
  const Tensor expected = classes ? target : with_contiguous_rows(target.to(real), call.copies);
  const int64_t batch_dim = expected.dim() - (classes ? 1 : 2);
  training.loss = loss;
  training.temperature = options.temperature;
  training.label_smoothing = options.label_smoothing;
  training.target = expected.const_data_ptr();
  training.target_row_stride = expected.stride(batch_dim);
  training.target_member_stride = batch_dim == 1 && members > 1 ? expected.stride(0) : 0;
  Tensor example_weight;
  if (options.sample_weight) {
    example_weight = with_contiguous_rows(options.sample_weight->to(real), call.copies);
    training.sample_weight = example_weight.const_data_ptr();
    const bool own = example_weight.dim() == 2 && members > 1;
    training.sample_weight_member_stride = own ? example_weight.stride(0) : 0;
  }
  Tensor scale;
  if (member_scale) {
    check_device_of_weights(kOp, "member_scale", *member_scale, weights);
    PYENS_CHECK_VALUE(member_scale->dim() == 1 && member_scale->size(0) == members, kOp,
                      "member_scale", c10::str("[", members, "]"), "shape ", member_scale->sizes());
    scale = member_scale->to(real).contiguous();
    training.member_scale = scale.const_data_ptr();
  }
  const auto real_options = input.options().dtype(real);
  Tensor mean = call.params.batch == 0 ? at::zeros({members}, real_options)
                                       : at::empty({members}, real_options);
  training.loss_output = mean.mutable_data_ptr();
  call.run(kOp);
  return {mean, call.gradients};
}

std::tuple<Tensor, std::vector<Tensor>> ensemble_mlp_loss_with_gradients_meta(
    const LossOptions& options, const Tensor& input, const Tensor& target, TensorList weights,
    TensorList biases, TensorList norm_weights, TensorList norm_biases,
    const OptionalTensor& member_scale, NeedsGrad needs_grad) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.mlp.members};
  check(network, target, options);
  if (member_scale) check_device_of_weights(kOp, "member_scale", *member_scale, weights);
  const auto real = input.options().dtype(accumulation_type(input.scalar_type()));
  return {at::empty_symint({network.members()}, real),
          for_each_needed(kOp, network, needs_grad, [&](const Tensor& of) {
            auto sizes = of.sym_sizes().vec();
            if (&of != &network.input) sizes[0] = network.members();
            return at::empty_symint(sizes, real);
          })};
}

NeedsGrad no_gradients(const Network& network) {
  NeedsGrad none;
  none.resize(network.tensors(), false);
  return none;
}

Tensor ensemble_mlp_loss(const LossOptions& options, const Tensor& input, const Tensor& target,
                         TensorList weights, TensorList biases, TensorList norm_weights,
                         TensorList norm_biases) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.mlp.members};
  return std::get<0>(ensemble_mlp_loss_with_gradients(options, input, target, weights, biases,
                                                      norm_weights, norm_biases, {},
                                                      no_gradients(network)));
}

Tensor ensemble_mlp_loss_meta(const LossOptions& options, const Tensor& input, const Tensor& target,
                              TensorList weights, TensorList biases, TensorList norm_weights,
                              TensorList norm_biases) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.mlp.members};
  return std::get<0>(ensemble_mlp_loss_with_gradients_meta(options, input, target, weights, biases,
                                                           norm_weights, norm_biases, {},
                                                           no_gradients(network)));
}

// --- composed of torch's own operations --------------------------------------------------------------

// Of outputs [E, B, O] in float32 or float64; the mean over the outputs of each example, [E, B].
Tensor example_losses(const Tensor& z, const Tensor& target, Loss loss,
                      const LossOptions& options) {
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
      // Nothing is read out of bounds: an out-of-range class gives NaN.
      const Tensor exists = (target >= 0).bitwise_and(target < z.sym_size(-1));
      const Tensor label = at::where(exists, target, at::zeros({}, target.options()));
      const Tensor index = label.expand_symint(z.sym_sizes().slice(0, 2)).unsqueeze(-1);
      const Tensor logs = at::log_softmax(z / options.temperature, -1);
      const double smoothing = options.label_smoothing;
      Tensor found = logs.gather(-1, index).squeeze(-1);
      if (smoothing > 0) {
        const Tensor mean = logs.mean(-1);
        // At 1 the label does not count: 0 times a logarithm that is infinite would be NaN.
        found = smoothing < 1 ? found * (1 - smoothing) + mean * smoothing : mean;
      }
      return at::where(exists, -found, at::full({}, NAN, found.options()));
    }
    case Loss::none: break;
  }
  return z;
}

// Differentiable as often as ensemble_mlp is.
Tensor composed_loss(const LossOptions& options, const Network& network, const Tensor& target) {
  const Tensor& input = network.input;
  const Loss loss = check(network, target, options);
  const bool classes = loss == Loss::cross_entropy;
  const at::ScalarType real = accumulation_type(input.scalar_type());
  const Tensor expected = classes ? target : target.to(real);
  const auto evaluate = [&](const Tensor& x, const Tensor& y) {
    const Network same{x,
                       network.weights,
                       network.biases,
                       network.norm_weights,
                       network.norm_biases,
                       network.chosen};
    const Tensor z = call_ensemble_mlp(options.mlp, same).to(real);
    return example_losses(z, y, loss, options);
  };
  if (!options.sample_weight) {
    const Tensor losses = evaluate(input, expected);
    return losses.sum(-1) /
           at::clamp_min(at::scalar_tensor(input.sym_size(-2), losses.options()), 1);
  }
  // Selected, not multiplied by 0: what is left out may be NaN.
  const Tensor given = *options.sample_weight, present = given != 0;
  // Only ratios count. The largest becomes 1, or sums overflow, and a division by a subnormal one gives a
  // gradient of NaN; what is too small beside it stays above 0. The 0 behind them is for an empty batch.
  const Tensor exact =
      at::where(given.isfinite().bitwise_and(given >= 0), given.to(at::kDouble), NAN);
  const Tensor largest = at::constant_pad_nd(exact, {0, 1}).amax(-1, /*keepdim=*/true);
  const Tensor ratio = (exact / at::where(largest == 0, 1, largest)).to(real);
  const double smallest = real == at::kDouble
                              ? std::numeric_limits<double>::denorm_min()
                              : static_cast<double>(std::numeric_limits<float>::denorm_min());
  const Tensor weight = at::where(present.bitwise_and(ratio == 0), smallest, ratio).to(real);
  const Tensor x = at::where(present.unsqueeze(-1), input, at::zeros({}, input.options()));
  const Tensor y = at::where(classes ? present : present.unsqueeze(-1), expected,
                             at::zeros({}, expected.options()));
  const Tensor zero = at::zeros({}, weight.options());
  const Tensor losses = at::where(present, evaluate(x, y), zero), total = weight.sum(-1);
  // Divided by 1 where there is nothing, or the gradient would be 0/0.
  const Tensor mean = (losses * weight).sum(-1) / at::where(total == 0, zero + 1, total);
  return at::where(total == 0, zero, mean);
}

Tensor ensemble_mlp_loss_cuda(const LossOptions& options, const Tensor& input, const Tensor& target,
                              TensorList weights, TensorList biases, TensorList norm_weights,
                              TensorList norm_biases) {
  if (training_fits_one_launch(weights)) {
    return ensemble_mlp_loss(options, input, target, weights, biases, norm_weights, norm_biases);
  }
  const Network network{input, weights, biases, norm_weights, norm_biases, options.mlp.members};
  return composed_loss(options, network, target);
}

// --- autograd --------------------------------------------------------------------------------------

auto call_with_gradients(const LossOptions& options, const Network& network, const Tensor& target,
                         const OptionalTensor& member_scale, const NeedsGrad& needs_grad) {
  return call_with<ensemble_mlp_loss_with_gradients, kWithGradients>(
      options, network.input, target, network.weights, network.biases, network.norm_weights,
      network.norm_biases, member_scale, needs_grad);
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
                        TensorList biases, TensorList norm_weights, TensorList norm_biases,
                        const Tensor& target, const LossOptions& options,
                        const NeedsGrad& needs_grad) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Network network{input, weights, biases, norm_weights, norm_biases, options.mlp.members};
    auto [mean, gradients] = call_with_gradients(options, network, target, {}, needs_grad);
    variable_list saved;
    saved.reserve(network.tensors() + gradients.size() + 5);
    saved.push_back(input);
    saved.push_back(target);
    save_options(ctx, options, saved);
    save_network(ctx, network, saved);
    saved.insert(saved.end(), gradients.begin(), gradients.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["gradients"] = needs_grad;
    return mean;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    SavedTensors saved(ctx);
    const Tensor& input = saved.next();
    const Tensor& target = saved.next();
    const auto options = saved_options<LossOptions>(ctx, saved);
    const Network network = saved_network(ctx, input, options.mlp, saved);
    const Tensor& grad = grad_outputs[0];
    variable_list grads(network.tensors() + 3);  // and of target, options, needs_grad

    const bool create_graph = at::GradMode::is_enabled();
    if (create_graph || is_batched(grad)) {
      const at::AutoGradMode differentiable(true);
      variable_list by;
      for (size_t i = 0; i < network.tensors(); ++i) {
        if (ctx->needs_input_grad(i)) by.push_back(network.tensor(i));
      }
      const variable_list found =
          torch::autograd::grad({composed_loss(options, network, target)}, by, {grad},
                                /*retain_graph=*/true, create_graph);
      for (size_t i = 0, next = 0; i < network.tensors(); ++i) {
        if (ctx->needs_input_grad(i)) grads[i] = found[next++];
      }
      return grads;
    }

    // Each gradient that the forward pass left is scaled by what comes from above. One by a shared input
    // sums over members that are scaled differently: it takes a second pass.
    const bool by_shared_input = input.dim() == 2 && ctx->needs_input_grad(0);
    if (by_shared_input) {
      NeedsGrad input_only = no_gradients(network);
      input_only[0] = true;
      const auto found = call_with_gradients(options, network, target, grad, input_only);
      grads[0] = std::get<1>(found)[0].to(input.scalar_type());
    }
    const bool unscaled = is_all_ones(grad);
    // Another backward may follow, and a hook may change in place what this one returns.
    const bool copied = unscaled && torch::autograd::get_current_graph_task_keep_graph();
    // Those that there are: which of them this backward is asked for is another matter.
    const auto there = ctx->saved_data["gradients"].toBoolList();
    for (size_t i = 0; i < network.tensors(); ++i) {
      if (!there.get(i)) continue;
      const Tensor& gradient = saved.next();
      if (!ctx->needs_input_grad(i)) continue;
      const Tensor factor =
          grad.view(gradient.dim() == 3 ? at::IntArrayRef{-1, 1, 1} : at::IntArrayRef{-1, 1});
      const at::ScalarType type = network.tensor(i).scalar_type();
      const Tensor scaled = unscaled ? gradient : gradient * factor;
      const Tensor of_all = i == 0 ? scaled : gradient_of_all(network, scaled);
      grads[i] = of_all.to(type, /*non_blocking=*/false, copied && of_all.is_same(gradient));
    }
    return grads;
  }
};

Tensor ensemble_mlp_loss_autograd(const LossOptions& options, const Tensor& input,
                                  const Tensor& target, TensorList weights, TensorList biases,
                                  TensorList norm_weights, TensorList norm_biases) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.mlp.members};
  const auto needs = [](const Tensor& t) {
    return at::GradMode::is_enabled() && t.requires_grad();
  };
  TORCH_CHECK_VALUE(!target.requires_grad(), kOp,
                    ": target: expected requires_grad=False (it gets no gradient), got True");
  TORCH_CHECK_VALUE(
      !options.sample_weight || !options.sample_weight->requires_grad(), kOp,
      ": sample_weight: expected requires_grad=False (it gets no gradient), got True");
  if (input.is_cuda() && !training_fits_one_launch(weights)) {
    return composed_loss(options, network, target);
  }
  // Not by a shared input: see backward.
  NeedsGrad needs_grad{input.dim() == 3 && needs(input)};
  for (const TensorList list : network.lists()) {
    for (const Tensor& t : list) needs_grad.push_back(needs(t));
  }
  return EnsembleMLPLossFunction::apply(input, weights, biases, norm_weights, norm_biases, target,
                                        options, needs_grad);
}

// The matrices cast as linear does; the loss is computed in float32 whatever they are.
Tensor ensemble_mlp_loss_autocast(const LossOptions& options, const Tensor& input,
                                  const Tensor& target, TensorList weights, TensorList biases,
                                  TensorList norm_weights, TensorList norm_biases) {
  const Autocast cast(input);
  return ensemble_mlp_loss_autograd(options, cast.lower(input), target, cast.lower(weights),
                                    cast.lower(biases), cast.lower(norm_weights),
                                    cast.lower(norm_biases));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  const std::string network = "Tensor input, Tensor target, " PYENS_NETWORK;
  const std::string options = std::string(LossOptions::kSchema) + MLPOptions::kSchema;
  Operation(m, "ensemble_mlp_loss(" + network + options + ") -> Tensor")
      .cpu<ensemble_mlp_loss>()
      .cuda<ensemble_mlp_loss_cuda>()
      .meta<ensemble_mlp_loss_meta>()
      .autograd<ensemble_mlp_loss_autograd>()
      .autocast<ensemble_mlp_loss_autocast>();
  Operation(m, "ensemble_mlp_loss_with_gradients(" + network +
                   ", Tensor? member_scale, bool[] needs_grad" + options +
                   ") -> (Tensor, Tensor[])")
      .cpu_and_cuda<ensemble_mlp_loss_with_gradients>()
      .meta<ensemble_mlp_loss_with_gradients_meta>()
      .not_differentiable();
}

}  // namespace pyens
