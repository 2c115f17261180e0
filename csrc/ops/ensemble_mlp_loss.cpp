// The loss inside the ensemble MLP.
//
//   ensemble_mlp_loss                 per-member mean loss [E]
//   ensemble_mlp_loss_with_gradients  the same, and the gradients of the sum of the losses by those tensors
//                                     that need one, [input, weights.., biases..], in float32 (float64 for
//                                     float64), times `member_scale` [E] if given
//   ensemble_mlp_example_losses       the losses of the examples [E, B], times their weights
//
// The gradients come out of the forward pass, and backward only scales them by what comes from above.
// Composed of torch's own operations over ensemble_mlp: the losses of the examples, what bounds that need a
// gradient bound, and on CUDA the loss of wide layers.

#include "ops/torch.h"

#include <tuple>

#include "ops/ensemble_mlp_loss.h"
#include "ops/operation.h"

namespace pyens {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kWithGradients[] = "ensemble_mlp_loss_with_gradients";

// --- the loss and its gradients --------------------------------------------------------------------

std::tuple<Tensor, std::vector<Tensor>> ensemble_mlp_loss_with_gradients(
    const LossOptions& options, const Tensor& input, const Tensor& target, TensorList weights,
    TensorList biases, TensorList norm_weights, TensorList norm_biases,
    const OptionalTensor& member_scale, NeedsGrad needs_grad) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.mlp.members};
  check_loss(network, target, options);
  check_loss_values(options);
  LossCall call(network, target, options, member_scale, needs_grad);
  call.run(kLossOp);
  return {call.mean, call.gradients};
}

std::tuple<Tensor, std::vector<Tensor>> ensemble_mlp_loss_with_gradients_meta(
    const LossOptions& options, const Tensor& input, const Tensor& target, TensorList weights,
    TensorList biases, TensorList norm_weights, TensorList norm_biases,
    const OptionalTensor& member_scale, NeedsGrad needs_grad) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.mlp.members};
  check_loss(network, target, options);
  if (member_scale) check_device_of_weights(kLossOp, "member_scale", *member_scale, weights);
  const auto real = input.options().dtype(accumulation_type(input.scalar_type()));
  return {at::empty_symint({network.members()}, real),
          for_each_needed(kLossOp, network, needs_grad, [&](const Tensor& of) {
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

// The sums of rows, the same bits for any number of threads and of other rows: torch splits the sum of a
// single long row among the threads, but adds up each of several rows whole.
Tensor row_sums(const Tensor& rows) {
  if (rows.sym_numel() != rows.sym_size(-1)) return rows.sum(-1);
  const Tensor twice = rows.reshape_symint({1, rows.sym_size(-1)}).expand_symint({2, -1});
  return twice.sum(-1).select(0, 0).reshape_symint(rows.sym_sizes().slice(0, rows.dim() - 1));
}
Tensor row_means(const Tensor& rows) {
  return row_sums(rows) / at::scalar_tensor(rows.sym_size(-1), rows.options());
}

// Only ratios count. The largest becomes 1, or sums overflow, and a division by a subnormal one gives a
// gradient of NaN; what is too small beside it stays above 0. NaN where one is negative or not finite.
Tensor scaled_weights(const Tensor& given, at::ScalarType real) {
  const Tensor exact =
      at::where(given.isfinite().bitwise_and(given >= 0), given.to(at::kDouble), NAN);
  // The 0 behind them is for an empty batch.
  const Tensor largest = at::constant_pad_nd(exact, {0, 1}).amax(-1, /*keepdim=*/true);
  const Tensor ratio = (exact / at::where(largest == 0, 1, largest)).to(real);
  const double smallest = real == at::kDouble
                              ? std::numeric_limits<double>::denorm_min()
                              : static_cast<double>(std::numeric_limits<float>::denorm_min());
  return at::where((given != 0).bitwise_and(ratio == 0), smallest, ratio).to(real);
}

// What [K] or [E, K] has for an example of each member: to broadcast against [E, B, K].
Tensor for_examples(const Tensor& tensor, at::ScalarType real) {
  const Tensor t = tensor.to(real);
  return t.dim() == 2 ? t.unsqueeze(1) : t;
}

// log(1 + e^x). float64 still sees what torch's threshold of 20 cuts off; in float32 nothing is lost there, and
// e^x times a gradient stays in range.
Tensor exact_softplus(const Tensor& x) {
  return at::softplus(x, 1, x.scalar_type() == at::kDouble ? 50 : 20);
}

// Sums of shares times negative logarithms; a share of 0 leaves its class out, even at probability 0.
Tensor weighted_logs(const Tensor& logs, const Tensor& shares) {
  return -row_sums(at::where(shares == 0, at::zeros({}, logs.options()), logs) * shares);
}

// Labels [B] or [E, B] as [E, B, 1]. Nothing is read out of bounds.
struct Labels {
  Tensor exist, index;

  Labels(const Tensor& target, const Tensor& z)
      : exist((target >= 0).bitwise_and(target < z.sym_size(-1))),
        index(at::where(exist, target, at::zeros({}, target.options()))
                  .expand_symint(z.sym_sizes().slice(0, 2))
                  .unsqueeze(-1)) {}
};

// The weights of the classes of labels: of tensors [K] or [E, K], [E, B].
Tensor weights_of(const Tensor& class_weight, const Labels& labels) {
  const Tensor each = class_weight.dim() == 2 ? class_weight.unsqueeze(1) : class_weight;
  c10::SymInt size = class_weight.sym_size(-1);
  const auto shape = labels.index.sym_sizes();
  return each.expand_symint({shape[0], shape[1], size}).gather(-1, labels.index).squeeze(-1);
}

Tensor cross_entropy_losses(const Tensor& z, const Tensor& target, const Tensor& class_weight,
                            const LossOptions& options) {
  // An out-of-range class gives NaN.
  const Labels labels(target, z);
  const Tensor logs = at::log_softmax(z / options.temperature, -1);
  const double smoothing = options.label_smoothing;
  Tensor found;
  if (!class_weight.defined()) {
    found = logs.gather(-1, labels.index).squeeze(-1);
    if (smoothing > 0) {
      const Tensor mean = logs.mean(-1);
      // At 1 the label does not count: 0 times a logarithm that is infinite would be NaN.
      found = smoothing < 1 ? found * (1 - smoothing) + mean * smoothing : mean;
    }
    found = -found;
  } else {
    const Tensor classes = at::arange(z.sym_size(-1), labels.index.options());
    const auto elsewhere = at::scalar_tensor(z.sym_size(-1), z.options()).reciprocal() * smoothing;
    const Tensor shares = (labels.index == classes).to(z.scalar_type()) * (1 - smoothing);
    found = weighted_logs(logs, (shares + elsewhere) * for_examples(class_weight, z.scalar_type()));
  }
  return at::where(labels.exist, found, at::full({}, NAN, found.options()));
}

Tensor gaussian_nll_losses(const Tensor& z, const Tensor& target, const LossOptions& options) {
  const std::vector<Tensor> halves = z.chunk(2, -1);
  const Tensor squares = (target - halves[0]).square();
  if (!options.log_variance_min) {
    const Tensor variance = at::softplus(halves[1]) + 1e-6;
    return (variance.log() + squares / variance).mean(-1) / 2;
  }
  const Tensor low = for_examples(*options.log_variance_min, z.scalar_type());
  const Tensor high = for_examples(*options.log_variance_max, z.scalar_type());
  const Tensor s = low + exact_softplus(high - exact_softplus(high - halves[1]) - low);
  return row_means(s + squares * (-s).exp()) / 2;
}

// Of outputs [E, B, O] in float32 or float64; the mean over the outputs of each example, [E, B].
Tensor example_losses(const Tensor& z, const Tensor& target, Loss loss, const Tensor& class_weight,
                      const LossOptions& options) {
  switch (loss) {
    case Loss::mse: return (z - target).square().mean(-1);
    case Loss::bce:
      return at::binary_cross_entropy_with_logits(z, target.expand_symint(z.sym_sizes()), {}, {},
                                                  at::Reduction::None)
          .mean(-1);
    case Loss::gaussian_nll: return gaussian_nll_losses(z, target, options);
    case Loss::cross_entropy: return cross_entropy_losses(z, target, class_weight, options);
    case Loss::huber:
    case Loss::smooth_l1: {
      const double delta = z.scalar_type() == at::kDouble
                               ? loss_delta<double>(options.delta)
                               : static_cast<double>(loss_delta<float>(options.delta));
      const Tensor error = z - target, cut = error.clamp(-delta, delta);
      return row_means((loss == Loss::huber ? cut : cut / delta) * (error - cut * 0.5));
    }
    case Loss::quantile: {
      const c10::SymInt count = options.quantiles->sym_size(0);
      const Tensor error = target.unsqueeze(-1) - z.unflatten_symint(-1, {-1, count});
      const Tensor tau = options.quantiles->to(z.scalar_type());
      const Tensor below = (*options.quantiles - 1).to(z.scalar_type());
      const Tensor slope = at::where(error > 0, tau, at::where(error < 0, below, error.detach()));
      return row_means((error * slope).flatten(-2));
    }
    case Loss::poisson_nll:
      return row_means(z.exp() - at::where(target == 0, at::zeros({}, z.options()), target * z));
    case Loss::soft_cross_entropy: {
      const Tensor logs = at::log_softmax(z / options.temperature, -1);
      const double smoothing = options.label_smoothing;
      Tensor shares = target;
      if (smoothing > 0) {
        const Tensor classes = at::scalar_tensor(z.sym_size(-1), z.options());
        shares = target * (1 - smoothing) + classes.reciprocal() * smoothing;
      }
      return weighted_logs(logs, shares);
    }
    case Loss::none: break;
  }
  return z;
}

// What the losses of the examples are computed of, with what is left out out of the way.
struct Examples {
  Tensor losses;         // [E, B], 0 where an example is left out
  Tensor present;        // sample_weight != 0; undefined where there are none
  Tensor labels_weight;  // [E, B], of the classes; likewise
};

Examples composed_examples(const LossOptions& options, const Network& network, const Tensor& target,
                           bool scaled) {
  const Tensor& input = network.input;
  const Loss loss = check_loss(network, target, options);
  const bool classes = loss == Loss::cross_entropy;
  const at::ScalarType real = accumulation_type(input.scalar_type());
  Tensor x = input, y = classes ? target : target.to(real);
  Examples examples;
  // Selected, not multiplied by 0: what is left out may be NaN.
  if (options.sample_weight) {
    examples.present = *options.sample_weight != 0;
    const Tensor rows = examples.present.unsqueeze(-1);
    x = at::where(rows, input, at::zeros({}, input.options()));
    y = at::where(classes ? examples.present : rows, y, at::zeros({}, y.options()));
  }
  const Tensor z = call_ensemble_mlp(options.mlp, network.with_input(x)).to(real);
  Tensor class_weight;
  if (options.class_weight) {
    class_weight =
        scaled ? scaled_weights(*options.class_weight, real) : options.class_weight->to(real);
    examples.labels_weight = weights_of(class_weight, Labels(y, z));
  }
  examples.losses = example_losses(z, y, loss, class_weight, options);
  if (examples.present.defined()) {
    const Tensor zero = at::zeros({}, examples.losses.options());
    examples.losses = at::where(examples.present, examples.losses, zero);
  }
  return examples;
}

// Differentiable as often as ensemble_mlp is.
Tensor composed_loss(const LossOptions& options, const Network& network, const Tensor& target) {
  const Examples examples = composed_examples(options, network, target, /*scaled=*/true);
  const Tensor& losses = examples.losses;
  const Tensor& of_labels = examples.labels_weight;
  if (!options.sample_weight && !options.class_weight) {
    return losses.sum(-1) / at::clamp_min(at::scalar_tensor(network.batch(), losses.options()), 1);
  }
  const Tensor zero = at::zeros({}, losses.options());
  Tensor weighted = losses, each = of_labels;
  if (options.sample_weight) {
    const Tensor weight = scaled_weights(*options.sample_weight, losses.scalar_type());
    weighted = losses * weight;
    each = of_labels.defined() ? weight * of_labels : weight;
  }
  const Tensor total = each.sum(-1);
  // Divided by 1 where there is nothing, or the gradient would be 0/0.
  const Tensor mean = weighted.sum(-1) / at::where(total == 0, zero + 1, total);
  return at::where(total == 0, zero, mean);
}

// The values that the kernels refuse, on the CPU.
void check_all_values(const LossOptions& options, const Network& network, const Tensor& target) {
  check_loss_values(options);
  const OptionalTensor& weight = options.sample_weight;
  if (weight && is_readable(*weight)) {
    PYENS_CHECK_VALUE(holds(weight->isfinite().bitwise_and(*weight >= 0)), kLossOp, "sample_weight",
                      "finite weights of at least 0", kNotIt);
  }
  if (target.scalar_type() != at::kLong || !is_readable(target)) return;
  const c10::SymInt out = network.out_features();
  Tensor right = (target >= 0).bitwise_and(target < out);
  if (weight) {
    if (!is_readable(*weight)) return;
    right = right.bitwise_or(*weight == 0);
  }
  PYENS_CHECK_VALUE(holds(right), kLossOp, "target", c10::str("classes from 0 to ", out - 1),
                    kNotIt);
}

// [E, B]: each example's own loss, times its weight.
Tensor ensemble_mlp_example_losses(const LossOptions& options, const Tensor& input,
                                   const Tensor& target, TensorList weights, TensorList biases,
                                   TensorList norm_weights, TensorList norm_biases) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.mlp.members};
  check_loss(network, target, options);
  check_all_values(options, network, target);
  const Examples examples = composed_examples(options, network, target, /*scaled=*/false);
  if (!options.sample_weight) return examples.losses;
  const Tensor& given = *options.sample_weight;
  const at::ScalarType real = examples.losses.scalar_type();
  return examples.losses *
         at::where(given.isfinite().bitwise_and(given >= 0), given.to(real), NAN).to(real);
}

Tensor ensemble_mlp_example_losses_meta(const LossOptions& options, const Tensor& input,
                                        const Tensor& target, TensorList weights, TensorList biases,
                                        TensorList norm_weights, TensorList norm_biases) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.mlp.members};
  check_loss(network, target, options);
  return at::empty_symint({network.members(), network.batch()},
                          input.options().dtype(accumulation_type(input.scalar_type())));
}

Tensor ensemble_mlp_loss_cuda(const LossOptions& options, const Tensor& input, const Tensor& target,
                              TensorList weights, TensorList biases, TensorList norm_weights,
                              TensorList norm_biases) {
  if (training_fits_one_launch(kLossOp, weights, options.mlp)) {
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

// What comes from above, [E], as a factor of gradients: of loss.sum() all are 1, and of loss.mean() the same, which as a
// number takes one pass of whole vectors. One for each member takes a loop for each row of theirs.
struct Factor {
  Tensor each;
  std::optional<double> of_all;

  explicit Factor(const Tensor& grad) : each(grad) {
    if (!is_readable(grad) || grad.numel() == 0) return;
    const Tensor first = grad.select(0, 0);
    if (holds(grad == first)) of_all = first.item<double>();
  }
  bool is_one() const { return of_all == 1; }
  Tensor times(const Tensor& gradient, bool in_place) const {
    if (of_all) return in_place ? gradient.mul_(*of_all) : gradient * *of_all;
    const Tensor factor = gradient.dim() == 3 ? each.view({-1, 1, 1}) : each.view({-1, 1});
    return in_place ? gradient.mul_(factor) : gradient * factor;
  }
};

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
    const Factor factor(grad);
    // Another backward may follow, and a hook may change in place what this one returns.
    const bool kept = torch::autograd::get_current_graph_task_keep_graph();
    const bool copied = factor.is_one() && kept;
    // Those that there are: which of them this backward is asked for is another matter.
    const auto there = ctx->saved_data["gradients"].toBoolList();
    for (size_t i = 0; i < network.tensors(); ++i) {
      if (!there.get(i)) continue;
      const Tensor& gradient = saved.next();
      if (!ctx->needs_input_grad(i)) continue;
      const at::ScalarType type = network.tensor(i).scalar_type();
      const Tensor scaled = factor.is_one() ? gradient : factor.times(gradient, !kept);
      const Tensor of_all = i == 0 ? scaled : gradient_of_all(network, scaled);
      grads[i] = of_all.to(type, /*non_blocking=*/false, copied && of_all.is_same(gradient));
    }
    return grads;
  }
};

bool needs_gradient(const Tensor& t) { return at::GradMode::is_enabled() && t.requires_grad(); }

void check_constant(const char* argument, const OptionalTensor& tensor) {
  PYENS_CHECK_VALUE(!tensor || !tensor->requires_grad(), kLossOp, argument,
                    "requires_grad=False (it gets no gradient)", "True");
}
void check_constants(const LossOptions& options, const Tensor& target) {
  check_constant("target", target);
  check_constant("sample_weight", options.sample_weight);
  check_constant("quantiles", options.quantiles);
  check_constant("class_weight", options.class_weight);
}

Tensor ensemble_mlp_example_losses_autograd(const LossOptions& options, const Tensor& input,
                                            const Tensor& target, TensorList weights,
                                            TensorList biases, TensorList norm_weights,
                                            TensorList norm_biases) {
  check_constants(options, target);
  return ensemble_mlp_example_losses(options, input, target, weights, biases, norm_weights,
                                     norm_biases);
}

Tensor ensemble_mlp_loss_autograd(const LossOptions& options, const Tensor& input,
                                  const Tensor& target, TensorList weights, TensorList biases,
                                  TensorList norm_weights, TensorList norm_biases) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.mlp.members};
  check_constants(options, target);
  const auto needs = needs_gradient;
  const OptionalTensor &least = options.log_variance_min, &most = options.log_variance_max;
  if ((least && needs(*least)) || (most && needs(*most))) {
    check_loss(network, target, options);
    check_all_values(options, network, target);
    return composed_loss(options, network, target);
  }
  if (input.is_cuda() && !training_fits_one_launch(kLossOp, weights, options.mlp)) {
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

Tensor ensemble_mlp_example_losses_autocast(const LossOptions& options, const Tensor& input,
                                            const Tensor& target, TensorList weights,
                                            TensorList biases, TensorList norm_weights,
                                            TensorList norm_biases) {
  const Autocast cast(input);
  return ensemble_mlp_example_losses_autograd(options, cast.lower(input), target,
                                              cast.lower(weights), cast.lower(biases),
                                              cast.lower(norm_weights), cast.lower(norm_biases));
}

}  // namespace

Tensor call_ensemble_mlp_loss(const LossOptions& options, const Network& network,
                              const Tensor& target) {
  return call_with<ensemble_mlp_loss, kLossOp>(options, network.input, target, network.weights,
                                               network.biases, network.norm_weights,
                                               network.norm_biases);
}

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  const std::string network = "Tensor input, Tensor target, " PYENS_NETWORK;
  const std::string options = std::string(LossOptions::kSchema) + MLPOptions::kSchema;
  Operation(m, "ensemble_mlp_loss(" + network + options + ") -> Tensor")
      .cpu<ensemble_mlp_loss>()
      .cuda<ensemble_mlp_loss_cuda>()
      .meta<ensemble_mlp_loss_meta>()
      .autograd<ensemble_mlp_loss_autograd>()
      .autocast<ensemble_mlp_loss_autocast>();
  Operation(m, "ensemble_mlp_example_losses(" + network + options + ") -> Tensor")
      .cpu_and_cuda<ensemble_mlp_example_losses>()
      .meta<ensemble_mlp_example_losses_meta>()
      .autograd<ensemble_mlp_example_losses_autograd>()
      .autocast<ensemble_mlp_example_losses_autocast>();
  Operation(m, "ensemble_mlp_loss_with_gradients(" + network +
                   ", Tensor? member_scale, bool[] needs_grad" + options +
                   ") -> (Tensor, Tensor[])")
      .cpu_and_cuda<ensemble_mlp_loss_with_gradients>()
      .meta<ensemble_mlp_loss_with_gradients_meta>()
      .not_differentiable();
}

}  // namespace pyens
