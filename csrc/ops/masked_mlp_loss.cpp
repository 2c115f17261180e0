// The loss of a masked MLP whose masks meet examples of their own, on the CPU:
//
//   masked_mlp_total_loss                 sum_n mask_weight[n] loss[n], loss[n] the mean loss of mask n
//   masked_mlp_total_loss_with_gradients  the same, and its gradients by those of [weights.., biases..] that need
//                                         one, of accumulation_type
//
// Some masks at a time go through ensemble_mlp_loss: their weights are gathered, and their gradients added into those of
// the shared weights, while both are in L2. All masks at once are megabytes, written and read again. A mask's gradient
// does not depend on the masks beside it, and the masks are added in order: no bit depends on how many go at a time.
//
// masked_mlp_loss gives the losses themselves; torch's own operations over masked_weights and ensemble_mlp_loss are
// the second derivative.

#include "ops/torch.h"

#include <algorithm>
#include <vector>

#include "ops/ensemble_mlp_loss.h"
#include "ops/masked_weights.h"
#include "ops/operation.h"

namespace pyens {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kOp[] = "masked_mlp_total_loss";
constexpr char kWithGradients[] = "masked_mlp_total_loss_with_gradients";
constexpr char kWeights[] = "masked_weights";

// Bytes of the weights that masks have which go together; their gradients are as many.
constexpr int64_t kAtOnce = 512 << 10;

struct MaskedNetwork {
  TensorList weights, biases, plan;

  size_t layers() const { return weights.size(); }
  size_t parameters() const { return weights.size() + biases.size(); }
  const Tensor& parameter(size_t i) const {
    return i < weights.size() ? weights[i] : biases[i - weights.size()];
  }
  // Of parameter i, for masks [first, first + count).
  OptionalTensor rows(size_t i, int64_t first, int64_t count) const {
    const size_t layer = i % layers();
    return layer + 1 < layers() ? OptionalTensor(plan[layer].narrow(0, first, count))
                                : std::nullopt;
  }
  OptionalTensor columns(size_t i, int64_t first, int64_t count) const {
    return i > 0 && i < layers() ? OptionalTensor(plan[i - 1].narrow(0, first, count))
                                 : std::nullopt;
  }
};

// Whether the target has an axis of masks, and not one for all of them.
bool has_members(const LossOptions& options, const Tensor& target) {
  return target.dim() == (options.loss == "cross_entropy" ? 2 : 3);
}

void check(const LossOptions& options, const MaskedNetwork& network, const Tensor& input,
           const Tensor& target, const Tensor& mask_weight, const NeedsGrad& needs_grad) {
  PYENS_CHECK_VALUE(network.layers() >= 2 && network.plan.size() == network.layers() - 1, kOp,
                    "plan", "one for each hidden layer, of at least one", network.plan.size());
  PYENS_CHECK_VALUE(network.biases.empty() || network.biases.size() == network.layers(), kOp,
                    "biases", c10::str(network.layers(), ", or none"), network.biases.size());
  PYENS_CHECK_VALUE(input.dim() == 3 && input.sym_size(0) >= 1, kOp, "input", "[N, B, I]", "shape ",
                    input.sym_sizes());
  PYENS_CHECK_VALUE(needs_grad.size() == network.parameters(), kOp, "needs_grad",
                    c10::str(network.parameters(), " flags"), needs_grad.size());
  // Of tensors that some masks at a time are taken of.
  const auto check_masks = [&](const char* argument, const Tensor& tensor) {
    PYENS_CHECK_VALUE(tensor.sym_size(0) == input.sym_size(0), kOp, argument,
                      c10::str(input.sym_size(0), " masks first"), "shape ", tensor.sym_sizes());
  };
  if (has_members(options, target)) check_masks("target", target);
  const auto check_option = [&](const char* argument, const OptionalTensor& tensor) {
    if (tensor && tensor->dim() == 2) check_masks(argument, *tensor);
  };
  check_option("sample_weight", options.sample_weight);
  check_option("class_weight", options.class_weight);
  check_option("log_variance_min", options.log_variance_min);
  check_option("log_variance_max", options.log_variance_max);
  PYENS_CHECK_VALUE(!options.mlp.members && !options.mlp.dropout_seeds &&
                        !options.mlp.dropout_rates && options.mlp.dropout == 0 &&
                        options.mlp.norm == "none",
                    kOp, "options", "those of a loss, and activations", "others");
  for (const Tensor& plan : network.plan) {
    PYENS_CHECK_VALUE(plan.dim() == 2 && plan.sym_size(0) == input.sym_size(0), kOp, "plan",
                      c10::str("[", input.sym_size(0), ", kept]"), "shape ", plan.sym_sizes());
  }
  for (size_t i = 0; i < network.parameters(); ++i) {
    const Tensor& parameter = network.parameter(i);
    const bool is_weight = i < network.layers();
    PYENS_CHECK_VALUE(parameter.dim() == (is_weight ? 2 : 1), kOp, is_weight ? "weights" : "biases",
                      is_weight ? "[out, in]" : "[out]", "shape ", parameter.sym_sizes());
  }
  PYENS_CHECK_VALUE(mask_weight.dim() == 1 && mask_weight.sym_size(0) == input.sym_size(0), kOp,
                    "mask_weight", c10::str("[", input.sym_size(0), "]"), "shape ",
                    mask_weight.sym_sizes());
}

int64_t masks_at_once(const MaskedNetwork& network, int64_t masks) {
  int64_t bytes = 1;  // of a mask's weights
  for (size_t l = 0; l < network.layers(); ++l) {
    const Tensor& weight = network.weights[l];
    const int64_t rows = l + 1 < network.layers() ? network.plan[l].size(1) : weight.size(0);
    const int64_t columns = l > 0 ? network.plan[l - 1].size(1) : weight.size(1);
    bytes += rows * columns * static_cast<int64_t>(weight.element_size());
  }
  // A thread takes masks as a whole where they are small.
  const int64_t count = std::max<int64_t>(kAtOnce / bytes, at::get_num_threads());
  return std::min(count, masks);
}

// Options of masks [first, first + count): of tensors that have an axis of members, theirs.
LossOptions options_of(const LossOptions& options, int64_t first, int64_t count) {
  LossOptions part = options;
  for (OptionalTensor* tensor :
       {&part.sample_weight, &part.class_weight, &part.log_variance_min, &part.log_variance_max}) {
    if (*tensor && (*tensor)->dim() == 2) *tensor = (*tensor)->narrow(0, first, count);
  }
  return part;
}

std::tuple<Tensor, std::vector<Tensor>> masked_mlp_total_loss_with_gradients(
    const LossOptions& options, const Tensor& input, const Tensor& target, TensorList weights,
    TensorList biases, TensorList plan, const Tensor& mask_weight, NeedsGrad needs_grad) {
  const MaskedNetwork network{weights, biases, plan};
  check(options, network, input, target, mask_weight, needs_grad);
  const at::ScalarType real = accumulation_type(input.scalar_type());
  const int64_t masks = input.size(0);
  NeedsGrad of_part{false};
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < network.parameters(); ++i) {
    of_part.push_back(needs_grad[i]);
    const Tensor& parameter = network.parameter(i);
    if (needs_grad[i]) {
      gradients.push_back(empty_result(parameter.sizes(), parameter.options().dtype(real)));
    }
  }
  const Tensor scale = mask_weight.to(real).contiguous();
  const Tensor scales = scale.to(at::kDouble);
  const int64_t at_once = masks_at_once(network, masks);
  double total = 0;
  for (int64_t first = 0; first < masks; first += at_once) {
    const int64_t count = std::min(at_once, masks - first);
    std::vector<Tensor> parameters;
    for (size_t i = 0; i < network.parameters(); ++i) {
      const bool is_weight = i < network.layers();
      const Tensor& shared = network.parameter(i);
      const Tensor own =
          masked_weights(is_weight ? shared : shared.unsqueeze(1), network.rows(i, first, count),
                         network.columns(i, first, count), count);
      parameters.push_back(is_weight ? own : own.squeeze(2));
    }
    const LossOptions part = options_of(options, first, count);
    const Tensor x = input.narrow(0, first, count);
    const Tensor y = has_members(options, target) ? target.narrow(0, first, count) : target;
    const auto all = TensorList(parameters);
    const Network members{
        x, all.slice(0, network.layers()), all.slice(network.layers()), {}, {}, part.mlp.members};
    check_loss(members, y, part);
    check_loss_values(part);
    LossCall call(members, y, part, scale.narrow(0, first, count), of_part);
    call.run(kLossOp);
    const Tensor losses = call.mean.to(at::kDouble);
    for (int64_t m = 0; m < count; ++m) {
      total += losses.const_data_ptr<double>()[m] * scales.const_data_ptr<double>()[first + m];
    }
    for (size_t i = 0, next = 0; i < network.parameters(); ++i) {
      if (!needs_grad[i]) continue;
      const Tensor& own = call.gradients[next];
      const Tensor& shared = gradients[next++];
      const bool is_weight = i < network.layers();
      spread_masked_weights(is_weight ? own : own.unsqueeze(2), network.rows(i, first, count),
                            network.columns(i, first, count), first > 0,
                            is_weight ? shared : shared.unsqueeze(1));
    }
  }
  // A number beyond float32 is infinite there, which scalar_tensor would refuse.
  const double rounded = real == at::kDouble ? total : static_cast<float>(total);
  return {at::scalar_tensor(rounded, input.options().dtype(real)), gradients};
}

std::tuple<Tensor, std::vector<Tensor>> masked_mlp_total_loss_with_gradients_meta(
    const LossOptions& options, const Tensor& input, const Tensor& target, TensorList weights,
    TensorList biases, TensorList plan, const Tensor& mask_weight, NeedsGrad needs_grad) {
  const MaskedNetwork network{weights, biases, plan};
  check(options, network, input, target, mask_weight, needs_grad);
  const at::ScalarType real = accumulation_type(input.scalar_type());
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < network.parameters(); ++i) {
    if (!needs_grad[i]) continue;
    const Tensor& parameter = network.parameter(i);
    gradients.push_back(at::empty_symint(parameter.sym_sizes(), parameter.options().dtype(real)));
  }
  return {at::empty({}, input.options().dtype(real)), gradients};
}

NeedsGrad no_gradients(size_t parameters) {
  NeedsGrad none;
  none.resize(parameters, false);
  return none;
}

Tensor masked_mlp_total_loss(const LossOptions& options, const Tensor& input, const Tensor& target,
                             TensorList weights, TensorList biases, TensorList plan,
                             const Tensor& mask_weight) {
  return std::get<0>(masked_mlp_total_loss_with_gradients(
      options, input, target, weights, biases, plan, mask_weight,
      no_gradients(weights.size() + biases.size())));
}

Tensor masked_mlp_total_loss_meta(const LossOptions& options, const Tensor& input,
                                  const Tensor& target, TensorList weights, TensorList biases,
                                  TensorList plan, const Tensor& mask_weight) {
  return std::get<0>(masked_mlp_total_loss_with_gradients_meta(
      options, input, target, weights, biases, plan, mask_weight,
      no_gradients(weights.size() + biases.size())));
}

// --- autograd ------------------------------------------------------------------------------------

// Differentiable as often as its operations are.
Tensor composed(const LossOptions& options, const MaskedNetwork& network, const Tensor& input,
                const Tensor& target, const Tensor& mask_weight) {
  const int64_t masks = input.size(0);
  std::vector<Tensor> parameters;
  for (size_t i = 0; i < network.parameters(); ++i) {
    const bool is_weight = i < network.layers();
    const Tensor& shared = network.parameter(i);
    const Tensor own = call<masked_weights, kWeights>(is_weight ? shared : shared.unsqueeze(1),
                                                      network.rows(i, 0, masks),
                                                      network.columns(i, 0, masks), masks);
    parameters.push_back(is_weight ? own : own.squeeze(2));
  }
  const auto all = TensorList(parameters);
  const OptionalTensor everyone;
  const Network members{
      input, all.slice(0, network.layers()), all.slice(network.layers()), {}, {}, everyone};
  const Tensor losses = call_ensemble_mlp_loss(options, members, target);
  return (losses * mask_weight.to(losses.scalar_type())).sum();
}

class MaskedTotalLossFunction : public torch::autograd::Function<MaskedTotalLossFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, TensorList weights,
                        TensorList biases, TensorList plan, const Tensor& mask_weight,
                        const Tensor& target, const LossOptions& options,
                        const NeedsGrad& needs_grad) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [total, gradients] = call_with<masked_mlp_total_loss_with_gradients, kWithGradients>(
        options, input, target, weights, biases, plan, mask_weight, needs_grad);
    variable_list saved{input, target, mask_weight};
    save_options(ctx, options, saved);
    for (const TensorList list : {weights, biases, plan, TensorList(gradients)}) {
      saved.insert(saved.end(), list.begin(), list.end());
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["weights"] = static_cast<int64_t>(weights.size());
    ctx->saved_data["biases"] = static_cast<int64_t>(biases.size());
    ctx->saved_data["gradients"] = needs_grad;
    return total;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    SavedTensors saved(ctx);
    const Tensor& input = saved.next();
    const Tensor& target = saved.next();
    const Tensor& mask_weight = saved.next();
    const auto options = saved_options<LossOptions>(ctx, saved);
    const auto layers = static_cast<size_t>(ctx->saved_data["weights"].toInt());
    const TensorList weights = saved.next(layers);
    const TensorList biases = saved.next(static_cast<size_t>(ctx->saved_data["biases"].toInt()));
    const MaskedNetwork network{weights, biases, saved.next(layers - 1)};
    const Tensor& grad = grad_outputs[0];
    // Input, parameters, plan; mask_weight, target, options, needs_grad.
    variable_list grads(1 + network.parameters() + network.plan.size() + 4);

    const bool create_graph = at::GradMode::is_enabled();
    if (create_graph || is_batched(grad) || ctx->needs_input_grad(0)) {
      const at::AutoGradMode differentiable(true);
      variable_list by;
      for (size_t i = 0; i <= network.parameters(); ++i) {
        if (ctx->needs_input_grad(i)) by.push_back(i == 0 ? input : network.parameter(i - 1));
      }
      const Tensor total = composed(options, network, input, target, mask_weight);
      const variable_list found =
          torch::autograd::grad({total}, by, {grad}, /*retain_graph=*/true, create_graph);
      for (size_t i = 0, next = 0; i <= network.parameters(); ++i) {
        if (ctx->needs_input_grad(i)) grads[i] = found[next++];
      }
      return grads;
    }

    const bool is_one = is_readable(grad) && grad.item<double>() == 1;
    // Another backward may follow, and a hook may change in place what this one returns.
    const bool kept = torch::autograd::get_current_graph_task_keep_graph();
    const auto there = ctx->saved_data["gradients"].toBoolList();
    for (size_t i = 0; i < network.parameters(); ++i) {
      if (!there.get(i)) continue;
      const Tensor& gradient = saved.next();
      if (!ctx->needs_input_grad(1 + i)) continue;
      const Tensor scaled = is_one ? gradient : kept ? gradient * grad : gradient.mul_(grad);
      grads[1 + i] = scaled.to(network.parameter(i).scalar_type(), /*non_blocking=*/false,
                               /*copy=*/is_one && kept);
    }
    return grads;
  }
};

Tensor masked_mlp_total_loss_autograd(const LossOptions& options, const Tensor& input,
                                      const Tensor& target, TensorList weights, TensorList biases,
                                      TensorList plan, const Tensor& mask_weight) {
  const auto check_constant = [](const char* argument, const OptionalTensor& tensor) {
    PYENS_CHECK_VALUE(!tensor || !tensor->requires_grad(), kOp, argument,
                      "requires_grad=False (it gets no gradient)", "True");
  };
  check_constant("target", target);
  check_constant("mask_weight", mask_weight);
  check_constant("sample_weight", options.sample_weight);
  check_constant("quantiles", options.quantiles);
  check_constant("class_weight", options.class_weight);
  check_constant("log_variance_min", options.log_variance_min);
  check_constant("log_variance_max", options.log_variance_max);
  const MaskedNetwork network{weights, biases, plan};
  NeedsGrad needs_grad;
  for (size_t i = 0; i < network.parameters(); ++i) {
    needs_grad.push_back(at::GradMode::is_enabled() && network.parameter(i).requires_grad());
  }
  return MaskedTotalLossFunction::apply(input, weights, biases, plan, mask_weight, target, options,
                                        needs_grad);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  const std::string network =
      "Tensor input, Tensor target, Tensor[] weights, Tensor[] biases, Tensor[] plan, Tensor "
      "mask_weight";
  const std::string options = std::string(LossOptions::kSchema) + MLPOptions::kSchema;
  Operation(m, "masked_mlp_total_loss(" + network + options + ") -> Tensor")
      .cpu<masked_mlp_total_loss>()
      .meta<masked_mlp_total_loss_meta>()
      .autograd<masked_mlp_total_loss_autograd>();
  Operation(m, "masked_mlp_total_loss_with_gradients(" + network + ", bool[] needs_grad" + options +
                   ") -> (Tensor, Tensor[])")
      .cpu<masked_mlp_total_loss_with_gradients>()
      .meta<masked_mlp_total_loss_with_gradients_meta>()
      .not_differentiable();
}

}  // namespace pyens
