// torch-facing side of the ensemble MLP: checks, allocation, launch; shapes for fake tensors;
// autograd; autocast.
//
//   ensemble_mlp           weights as they are
//   ensemble_mlp_backward  its gradients, those that `wanted` asks for: [input, weights.., biases..]
//   ensemble_mlp_pack      weights for small batches
//   ensemble_mlp_packed    inference with both
//
// `biases` is empty where there are none: Function::apply would lose the gradients of an optional
// list.

#include "ops/ensemble_mlp.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <atomic>
#include <string_view>
#include <vector>

namespace pyens {
namespace {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kOp = "ensemble_mlp";

Tensor run(Problem& problem, const Tensor& input, TensorList weights, ActivationKind activation) {
  problem.set_input(input);
  problem.set_activation(activation);
  ensemble_mlp_cpu::Forward& params = problem.params;
  Tensor output =
      at::empty({params.ensemble_size, params.batch, params.layers[params.num_layers - 1].out},
                input.options());
  params.output = output.mutable_data_ptr();
  if (input.is_cuda()) {
    run_on_cuda(kOp, params, input, weights);
    return output;
  }
  launch_cpu(ensemble_mlp_cpu::work_items(params), ensemble_mlp_cpu::grain_size(params),
             ensemble_mlp_cpu::scratch_bytes(params),
             [&](int64_t begin, int64_t end, void* scratch) {
               ensemble_mlp_cpu::run(params, begin, end, scratch);
             });
  return output;
}

Tensor ensemble_mlp(const Tensor& input, TensorList weights, TensorList biases,
                    std::string_view activation, double dropout,
                    const OptionalTensor& dropout_seeds) {
  const ActivationKind act = parse_activation(kOp, activation);
  check_layers(kOp, weights, biases);
  check_input(kOp, input, weights);
  check_dropout(kOp, dropout, dropout_seeds, weights);
  Problem problem(weights, biases);
  problem.set_dropout(dropout, dropout_seeds);
  return run(problem, input, weights, act);
}

Tensor ensemble_mlp_pack(TensorList weights, TensorList biases) {
  check_layers(kOp, weights, biases);
  const Problem problem(weights, biases);
  const int64_t bytes = ensemble_mlp_cpu::describe_prepacked(problem.params).bytes;
  Tensor packed = at::empty({bytes}, weights[0].options().dtype(at::kByte));
  auto* const to = static_cast<ensemble_mlp_cpu::PrepackedWeights*>(packed.mutable_data_ptr());
  ensemble_mlp_cpu::prepack(problem.params, to);
  return packed;
}

Tensor ensemble_mlp_packed(const Tensor& input, const Tensor& packed, TensorList weights,
                           TensorList biases, std::string_view activation) {
  const ActivationKind act = parse_activation(kOp, activation);
  check_layers(kOp, weights, biases);
  check_input(kOp, input, weights);
  Problem problem(weights, biases);
  const bool is_bytes =
      packed.scalar_type() == at::kByte && packed.dim() == 1 && packed.is_contiguous();
  const char* const found = is_bytes ? ensemble_mlp_cpu::check_prepacked(
                                           problem.params, packed.const_data_ptr(), packed.numel())
                                     : "something else";
  PYENS_CHECK_VALUE(found == nullptr, kOp, "packed",
                    "what ensemble_mlp_pack makes of these weights (uint8, one dimension)", found,
                    ": ", packed.scalar_type(), " of shape ", packed.sizes());
  problem.params.prepacked =
      static_cast<const ensemble_mlp_cpu::PrepackedWeights*>(packed.const_data_ptr());
  return run(problem, input, weights, act);
}

void check_backward(const Tensor& grad, const Tensor& input, TensorList weights, TensorList biases,
                    double dropout, const OptionalTensor& dropout_seeds) {
  check_layers(kOp, weights, biases);
  check_input(kOp, input, weights);
  check_dropout(kOp, dropout, dropout_seeds, weights);
  check_same_kind(kOp, {"grad"}, grad, kFirstWeight, weights[0]);
  const c10::SymInt shape[] = {weights[0].sym_size(0), input.sym_size(-2),
                               weights.back().sym_size(1)};
  PYENS_CHECK_VALUE(grad.sym_sizes() == c10::SymIntArrayRef(shape), kOp, "grad",
                    c10::str("shape ", c10::SymIntArrayRef(shape)), "shape ", grad.sym_sizes());
}

std::vector<Tensor> ensemble_mlp_backward(const Tensor& grad, const Tensor& input,
                                          TensorList weights, TensorList biases,
                                          std::string_view activation, double dropout,
                                          const OptionalTensor& dropout_seeds, Wanted wanted) {
  check_backward(grad, input, weights, biases, dropout, dropout_seeds);
  TrainingProblem problem(kOp, input, weights, biases, parse_activation(kOp, activation), dropout,
                          dropout_seeds, wanted);
  const Tensor& rows = with_contiguous_rows(grad, problem.copies);
  problem.training.target = rows.const_data_ptr();
  problem.training.target_member_stride = rows.stride(0);
  problem.training.target_row_stride = rows.stride(1);
  problem.run(kOp);
  for (Tensor& gradient : problem.gradients) gradient = gradient.to(input.scalar_type());
  return problem.gradients;
}

// --- shapes for fake tensors ---------------------------------------------------------------------

Tensor ensemble_mlp_meta(const Tensor& input, TensorList weights, TensorList biases,
                         std::string_view activation, double dropout,
                         const OptionalTensor& dropout_seeds) {
  parse_activation(kOp, activation);
  check_layers(kOp, weights, biases);
  check_input(kOp, input, weights);
  check_dropout(kOp, dropout, dropout_seeds, weights);
  return at::empty_symint({weights[0].sym_size(0), input.sym_size(-2), weights.back().sym_size(1)},
                          input.options());
}

Tensor ensemble_mlp_packed_meta(const Tensor& input, const Tensor& /*packed*/, TensorList weights,
                                TensorList biases, std::string_view activation) {
  return ensemble_mlp_meta(input, weights, biases, activation, 0, std::nullopt);
}

Tensor ensemble_mlp_pack_meta(TensorList weights, TensorList biases) {
  check_layers(kOp, weights, biases);
  const auto layout = ensemble_mlp_cpu::prepacked_layout(kernel_dtype(weights[0].scalar_type()));
  c10::SymInt bytes = 0;
  for (const Tensor& w : weights) bytes += layout.layer_bytes(w.sym_size(1), w.sym_size(2));
  bytes = bytes * weights[0].sym_size(0) +
          static_cast<int64_t>(sizeof(ensemble_mlp_cpu::PrepackedWeights));
  return at::empty_symint({bytes}, weights[0].options().dtype(at::kByte));
}

std::vector<Tensor> ensemble_mlp_backward_meta(const Tensor& grad, const Tensor& input,
                                               TensorList weights, TensorList biases,
                                               std::string_view /*activation*/, double dropout,
                                               const OptionalTensor& dropout_seeds, Wanted wanted) {
  check_backward(grad, input, weights, biases, dropout, dropout_seeds);
  std::vector<Tensor> gradients = wanted_of(kOp, input, weights, biases, wanted);
  for (Tensor& gradient : gradients) {
    gradient = at::empty_symint(gradient.sym_sizes(), input.options());
  }
  return gradients;
}

// --- autograd ------------------------------------------------------------------------------------

std::vector<Tensor> call_ensemble_mlp_backward(const Tensor& grad, const Tensor& input,
                                               TensorList weights, TensorList biases,
                                               std::string_view activation, double dropout,
                                               const OptionalTensor& dropout_seeds,
                                               const Wanted& wanted) {
  static const auto op =
      dispatcher_op<std::vector<Tensor>(const Tensor&, const Tensor&, TensorList, TensorList,
                                        std::string_view, double, const OptionalTensor&, Wanted)>(
          "pyens::ensemble_mlp_backward");
  return op.call(grad, input, weights, biases, activation, dropout, dropout_seeds, wanted);
}

Tensor activate(const Tensor& z, ActivationKind activation) {
  switch (activation) {
    case ActivationKind::relu: return at::relu(z);
    case ActivationKind::gelu: return at::gelu(z);
    case ActivationKind::silu: return at::silu(z);
    case ActivationKind::elu: return at::elu(z);
    case ActivationKind::softplus: return at::softplus(z);
    case ActivationKind::tanh: return at::tanh(z);
    case ActivationKind::identity: return z;
  }
  return z;
}

// grad * act'(z), given h = act(z) too.
Tensor activate_backward(const Tensor& grad, const Tensor& z, const Tensor& h,
                         ActivationKind activation) {
  switch (activation) {
    case ActivationKind::relu: return at::threshold_backward(grad, z, 0);
    case ActivationKind::gelu: return at::gelu_backward(grad, z);
    case ActivationKind::silu: {  // aten's silu_backward has no derivative
      const Tensor s = at::sigmoid(z);
      return grad * s * (1 + z * (1 - s));
    }
    case ActivationKind::elu: return at::elu_backward(grad, 1, 1, 1, /*is_result=*/false, z);
    case ActivationKind::softplus: return at::softplus_backward(grad, z, 1, 20);
    case ActivationKind::tanh: return at::tanh_backward(grad, h);
    case ActivationKind::identity: return grad;
  }
  return grad;
}

// bool [E, B, units]: what kernels/dropout.h keeps. torch has no unsigned
// arithmetic to speak of, so 32-bit numbers lie in int64.
Tensor kept_by_dropout(const Tensor& seeds, int64_t layer, const c10::SymInt& batch,
                       const c10::SymInt& unit_count, double dropout) {
  const auto shifted = [](const Tensor& x, int64_t bits) {  // as if unsigned
    return at::__rshift__(x, bits).bitwise_and((int64_t{1} << (64 - bits)) - 1);
  };
  const auto signed_constant = [](uint64_t x) { return static_cast<int64_t>(x); };
  const auto mix = [&](Tensor x) {
    x = x + signed_constant(0x9e3779b97f4a7c15u);
    x = at::bitwise_xor(x, shifted(x, 30)) * signed_constant(0xbf58476d1ce4e5b9u);
    x = at::bitwise_xor(x, shifted(x, 27)) * signed_constant(0x94d049bb133111ebu);
    return at::bitwise_xor(x, shifted(x, 31));
  };
  constexpr int64_t kLow = 0xffffffff;
  const auto options = seeds.options();
  const Tensor units = at::arange(unit_count, options);
  const Tensor key = mix((mix(mix(seeds) + layer).unsqueeze(1) + units)).unsqueeze(1);
  const Tensor rows = at::arange(batch, options).unsqueeze(1);
  Tensor x = (rows + key.bitwise_and(kLow)).bitwise_and(kLow);
  x = at::bitwise_xor(x, at::__rshift__(x, 16));
  x = (x * int64_t{0x21f0aaad}).bitwise_and(kLow);
  x = at::bitwise_xor(x, at::__rshift__(x, 15));
  x = at::bitwise_xor(x, shifted(key, 32));
  x = (x * int64_t{0x735a2d97}).bitwise_and(kLow);
  x = at::bitwise_xor(x, at::__rshift__(x, 15));
  return x >= static_cast<int64_t>(dropout * 0x1p32);
}

// The backward pass composed of differentiable aten operations over recomputed activations: for
// double backward, and on CUDA for layers that are too wide for one launch.
std::vector<Tensor> composed_backward(Tensor grad, const Tensor& input, TensorList weights,
                                      TensorList biases, ActivationKind activation, double dropout,
                                      const OptionalTensor& dropout_seeds, const Wanted& wanted) {
  const size_t layers = weights.size();
  const bool shared_input = input.dim() == 2;
  const double scale = 1 / (1 - dropout);
  const auto drop = [&](const Tensor& x, const Tensor& kept) {
    return kept.defined() ? at::where(kept, x * scale, at::zeros({}, x.options())) : x;
  };

  // What each layer reads, what it computed before the activation, and what was kept of that.
  std::vector<Tensor> h{shared_input ? input.unsqueeze(0) : input}, z, activated, kept(layers);
  for (size_t l = 0; l + 1 < layers; ++l) {
    Tensor product = at::matmul(h[l], weights[l].transpose(1, 2));
    z.push_back(biases.empty() ? product : product + biases[l].unsqueeze(1));
    activated.push_back(activate(z[l], activation));
    if (dropout > 0) {
      kept[l] = kept_by_dropout(*dropout_seeds, static_cast<int64_t>(l), input.sym_size(-2),
                                weights[l].sym_size(1), dropout);
    }
    h.push_back(drop(activated[l], kept[l]));
  }

  std::vector<Tensor> weight_grads(layers), bias_grads(biases.size());
  for (size_t l = layers; l-- > 0;) {
    if (wanted[1 + l]) weight_grads[l] = at::matmul(grad.transpose(1, 2), h[l]);
    if (!biases.empty() && wanted[1 + layers + l]) bias_grads[l] = grad.sum(1);
    if (l == 0 && !wanted[0]) break;
    grad = at::matmul(grad, weights[l]);
    if (l > 0) {
      grad = activate_backward(drop(grad, kept[l - 1]), z[l - 1], activated[l - 1], activation);
    }
  }
  return wanted_of(kOp, wanted[0] && shared_input ? grad.sum(0) : grad, weight_grads, bias_grads,
                   wanted);
}

std::vector<Tensor> ensemble_mlp_backward_cuda(const Tensor& grad, const Tensor& input,
                                               TensorList weights, TensorList biases,
                                               std::string_view activation, double dropout,
                                               const OptionalTensor& dropout_seeds, Wanted wanted) {
  check_backward(grad, input, weights, biases, dropout, dropout_seeds);
  if (trains_in_one_launch(weights)) {
    return ensemble_mlp_backward(grad, input, weights, biases, activation, dropout, dropout_seeds,
                                 wanted);
  }
  return composed_backward(grad, input, weights, biases, parse_activation(kOp, activation), dropout,
                           dropout_seeds, wanted);
}

class EnsembleMLPFunction : public torch::autograd::Function<EnsembleMLPFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, TensorList weights,
                        TensorList biases, std::string activation, double dropout,
                        const OptionalTensor& dropout_seeds) {
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list saved{input};
    saved.insert(saved.end(), weights.begin(), weights.end());
    saved.insert(saved.end(), biases.begin(), biases.end());
    saved.push_back(dropout_seeds.value_or(Tensor()));
    ctx->save_for_backward(saved);
    ctx->saved_data["layers"] = static_cast<int64_t>(weights.size());
    ctx->saved_data["activation"] = activation;
    ctx->saved_data["dropout"] = dropout;
    return call_ensemble_mlp(input, weights, biases, activation, dropout, dropout_seeds);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const auto layers = static_cast<size_t>(ctx->saved_data["layers"].toInt());
    const std::string& activation = ctx->saved_data["activation"].toStringRef();
    const double dropout = ctx->saved_data["dropout"].toDouble();
    const TensorList differentiable = TensorList(saved).slice(0, saved.size() - 1);
    const TensorList weights = differentiable.slice(1, layers);
    const TensorList biases = differentiable.slice(1 + layers);
    const OptionalTensor seeds =
        saved.back().defined() ? OptionalTensor(saved.back()) : std::nullopt;
    Wanted wanted;
    for (size_t i = 0; i < differentiable.size(); ++i) wanted.push_back(ctx->needs_input_grad(i));

    const auto found =
        at::GradMode::is_enabled()  // create_graph
            ? composed_backward(grad_outputs[0], saved[0], weights, biases,
                                parse_activation(kOp, activation), dropout, seeds, wanted)
            : call_ensemble_mlp_backward(grad_outputs[0], saved[0], weights, biases, activation,
                                         dropout, seeds, wanted);
    variable_list grads(differentiable.size() + 3);  // the last ones: activation, dropout, seeds
    for (size_t i = 0, next = 0; i < wanted.size(); ++i) {
      if (wanted[i]) grads[i] = found[next++];
    }
    return grads;
  }
};

Tensor ensemble_mlp_autograd(const Tensor& input, TensorList weights, TensorList biases,
                             std::string_view activation, double dropout,
                             const OptionalTensor& dropout_seeds) {
  return EnsembleMLPFunction::apply(input, weights, biases, std::string(activation), dropout,
                                    dropout_seeds);
}

// --- autocast ------------------------------------------------------------------------------------

template <c10::DeviceType device, c10::DispatchKey key>
Tensor ensemble_mlp_autocast(const Tensor& input, TensorList weights, TensorList biases,
                             std::string_view activation, double dropout,
                             const OptionalTensor& dropout_seeds) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  return call_ensemble_mlp(at::autocast::cached_cast(type, input, device),
                           at::autocast::cached_cast(type, weights, device),
                           at::autocast::cached_cast(type, biases, device), activation, dropout,
                           dropout_seeds);
}

}  // namespace

Tensor call_ensemble_mlp(const Tensor& input, TensorList weights, TensorList biases,
                         std::string_view activation, double dropout,
                         const OptionalTensor& dropout_seeds) {
  static const auto op =
      dispatcher_op<Tensor(const Tensor&, TensorList, TensorList, std::string_view, double,
                           const OptionalTensor&)>("pyens::ensemble_mlp");
  return op.call(input, weights, biases, activation, dropout, dropout_seeds);
}

void TrainingProblem::run(const char* op) {
  if (params.batch == 0) return;
  training.forward = params;
  if (input_.is_cpu()) return run_on_cpu(op);
  launch_cuda(op, input_, [&](void* stream) {
    const auto bytes = static_cast<int64_t>(ensemble_mlp_cuda::scratch_bytes(training));
    const Tensor scratch = at::empty({bytes}, input_.options().dtype(at::kByte));
    return ensemble_mlp_cuda::train(training, scratch.mutable_data_ptr(), stream);
  });
}

void TrainingProblem::run_on_cpu(const char* op) {
  using namespace ensemble_mlp_cpu;
  training.threads = at::get_num_threads();
  const TrainingPlan plan = plan_training(training);
  const c10::DataPtr partial = c10::GetCPUAllocator()->allocate(plan.partial_bytes);
  training.partial = partial.get();
  if (training.loss != Loss::none) {
    std::atomic<TrainingError> error{TrainingError::none};
    launch_cpu(params.ensemble_size, std::max<int64_t>(1, 65536 / params.batch), 0,
               [&](int64_t begin, int64_t end, void* /*scratch*/) {
                 const TrainingError found = prepare_training(training, begin, end);
                 if (found != TrainingError::none) error = found;
               });
    PYENS_CHECK_VALUE(error != TrainingError::sample_weight_negative, op, "sample_weight",
                      "finite weights of at least 0", "one that is not");
    PYENS_CHECK_VALUE(error != TrainingError::target_out_of_range, op, "target",
                      c10::str("classes from 0 to ", params.layers[params.num_layers - 1].out - 1),
                      "one that is not");
  }
  launch_cpu(
      plan.items, plan.grain_size, plan.scratch_bytes,
      [&](int64_t begin, int64_t end, void* scratch) { train(training, begin, end, scratch); });
  launch_cpu(plan.finish_items, plan.finish_grain_size, 0,
             [&](int64_t begin, int64_t end, void* /*scratch*/) {
               finish_training(training, begin, end);
             });
}

TORCH_LIBRARY_IMPL(pyens, CPU, m) {
  m.impl("ensemble_mlp", ensemble_mlp);
  m.impl("ensemble_mlp_backward", ensemble_mlp_backward);
  m.impl("ensemble_mlp_pack", ensemble_mlp_pack);
  m.impl("ensemble_mlp_packed", ensemble_mlp_packed);
}

// The packed layout is the CPU's.
TORCH_LIBRARY_IMPL(pyens, CUDA, m) {
  m.impl("ensemble_mlp", ensemble_mlp);
  m.impl("ensemble_mlp_backward", ensemble_mlp_backward_cuda);
}

TORCH_LIBRARY_IMPL(pyens, Meta, m) {
  m.impl("ensemble_mlp", ensemble_mlp_meta);
  m.impl("ensemble_mlp_backward", ensemble_mlp_backward_meta);
  m.impl("ensemble_mlp_pack", ensemble_mlp_pack_meta);
  m.impl("ensemble_mlp_packed", ensemble_mlp_packed_meta);
}

TORCH_LIBRARY_IMPL(pyens, Autograd, m) {
  m.impl("ensemble_mlp", ensemble_mlp_autograd);
  for (const char* op : {"ensemble_mlp_backward", "ensemble_mlp_pack", "ensemble_mlp_packed"}) {
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(pyens, AutocastCPU, m) {
  m.impl("ensemble_mlp",
         ensemble_mlp_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(pyens, AutocastCUDA, m) {
  m.impl("ensemble_mlp",
         ensemble_mlp_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace pyens
