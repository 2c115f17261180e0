// The ensemble MLP and its derivative.
//
//   ensemble_mlp           weights as they are
//   ensemble_mlp_backward  its gradients, of those tensors that need one: [input, weights.., biases..]
//   ensemble_mlp_prepack   weights as the CPU's kernel reads them for small batches
//   ensemble_mlp_packed    inference with both
//
// `biases` is empty where there are none: Function::apply would lose the gradients of an optional
// list.

#include "ops/torch.h"

#include "ops/ensemble_mlp.h"

#include "ops/ensemble_mlp_composed.h"
#include "ops/operation.h"

namespace pyens {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kOp[] = "ensemble_mlp";
constexpr char kBackward[] = "ensemble_mlp_backward";

Tensor run(ForwardCall& call, const Network& network) {
  call.set_input(network.input);
  const auto& params = call.params;
  Tensor output = at::empty({params.ensemble_size, params.batch, call.layers.back().out},
                            network.input.options());
  call.params.output = output.mutable_data_ptr();
  call.run(kOp, network);
  return output;
}

Tensor ensemble_mlp(const MLPOptions& options, const Tensor& input, TensorList weights,
                    TensorList biases) {
  const Network network{input, weights, biases};
  const ActivationKind activation = check_mlp(kOp, network, options);
  ForwardCall call(weights, biases);
  call.set_options(kOp, activation, options);
  return run(call, network);
}

Tensor ensemble_mlp_meta(const MLPOptions& options, const Tensor& input, TensorList weights,
                         TensorList biases) {
  const Network network{input, weights, biases};
  check_mlp(kOp, network, options);
  return at::empty_symint({network.members(), network.batch(), network.out_features()},
                          input.options());
}

// --- prepacked weights ---------------------------------------------------------------------------

using ensemble_mlp_cpu::PrepackedWeights;

Tensor ensemble_mlp_prepack(TensorList weights, TensorList biases) {
  check_layers(kOp, weights, biases);
  const ForwardCall call(weights, biases);
  const int64_t bytes = ensemble_mlp_cpu::describe_prepacked(call.params).bytes;
  Tensor packed = at::empty({bytes}, weights[0].options().dtype(at::kByte));
  auto* const to = static_cast<PrepackedWeights*>(packed.mutable_data_ptr());
  ensemble_mlp_cpu::prepack(call.params, to);
  return packed;
}

Tensor ensemble_mlp_prepack_meta(TensorList weights, TensorList biases) {
  check_layers(kOp, weights, biases);
  const auto layout = ensemble_mlp_cpu::prepacked_layout(kernel_dtype(weights[0].scalar_type()));
  c10::SymInt bytes = 0;
  for (const Tensor& w : weights) bytes += layout.layer_bytes(w.sym_size(1), w.sym_size(2));
  bytes = bytes * weights[0].sym_size(0) + static_cast<int64_t>(sizeof(PrepackedWeights));
  return at::empty_symint({bytes}, weights[0].options().dtype(at::kByte));
}

Tensor ensemble_mlp_packed(const Tensor& input, const Tensor& packed, TensorList weights,
                           TensorList biases, std::string_view activation) {
  const Network network{input, weights, biases};
  const MLPOptions options{activation};
  const ActivationKind kind = check_mlp(kOp, network, options);
  ForwardCall call(weights, biases);
  call.set_options(kOp, kind, options);
  check_device_of_weights(kOp, "packed", packed, weights);
  const bool is_bytes =
      packed.scalar_type() == at::kByte && packed.dim() == 1 && packed.is_contiguous();
  const char* const found = is_bytes ? ensemble_mlp_cpu::check_prepacked(
                                           call.params, packed.const_data_ptr(), packed.numel())
                                     : "something else";
  PYENS_CHECK_VALUE(found == nullptr, kOp, "packed",
                    "what ensemble_mlp_prepack makes of these weights (uint8, one dimension)",
                    found, ": ", packed.scalar_type(), " of shape ", packed.sizes());
  call.params.prepacked = static_cast<const PrepackedWeights*>(packed.const_data_ptr());
  return run(call, network);
}

Tensor ensemble_mlp_packed_meta(const Tensor& input, const Tensor& packed, TensorList weights,
                                TensorList biases, std::string_view activation) {
  check_device_of_weights(kOp, "packed", packed, weights);
  return ensemble_mlp_meta({activation}, input, weights, biases);
}

// --- backward ------------------------------------------------------------------------------------

void check_backward(const Tensor& grad, const Network& network, const MLPOptions& options) {
  check_mlp(kOp, network, options);
  check_same_kind(kOp, {"grad"}, grad, kFirstWeight, network.weights[0]);
  const c10::SymInt shape[] = {network.members(), network.batch(), network.out_features()};
  PYENS_CHECK_VALUE(grad.sym_sizes() == c10::SymIntArrayRef(shape), kOp, "grad",
                    c10::str("shape ", c10::SymIntArrayRef(shape)), "shape ", grad.sym_sizes());
}

std::vector<Tensor> ensemble_mlp_backward(const MLPOptions& options, const Tensor& grad,
                                          const Tensor& input, TensorList weights,
                                          TensorList biases, NeedsGrad needs_grad) {
  const Network network{input, weights, biases};
  check_backward(grad, network, options);
  TrainingCall call(kOp, network, options, needs_grad);
  const Tensor& rows = with_contiguous_rows(grad, call.copies);
  call.training.target = rows.const_data_ptr();
  call.training.target_member_stride = rows.stride(0);
  call.training.target_row_stride = rows.stride(1);
  call.run(kOp);
  for (Tensor& gradient : call.gradients) gradient = gradient.to(input.scalar_type());
  return call.gradients;
}

std::vector<Tensor> ensemble_mlp_backward_cuda(const MLPOptions& options, const Tensor& grad,
                                               const Tensor& input, TensorList weights,
                                               TensorList biases, NeedsGrad needs_grad) {
  const Network network{input, weights, biases};
  check_backward(grad, network, options);
  if (training_fits_one_launch(weights)) {
    return ensemble_mlp_backward(options, grad, input, weights, biases, needs_grad);
  }
  return composed_backward(kOp, grad, network, options, needs_grad);
}

std::vector<Tensor> ensemble_mlp_backward_meta(const MLPOptions& options, const Tensor& grad,
                                               const Tensor& input, TensorList weights,
                                               TensorList biases, NeedsGrad needs_grad) {
  const Network network{input, weights, biases};
  check_backward(grad, network, options);
  return for_each_needed(kOp, network, needs_grad, [&](const Tensor& of) {
    return at::empty_symint(of.sym_sizes(), input.options());
  });
}

class EnsembleMLPFunction : public torch::autograd::Function<EnsembleMLPFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, TensorList weights,
                        TensorList biases, const MLPOptions& options) {
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list saved;
    saved.reserve(weights.size() + biases.size() + 2);
    saved.push_back(input);
    save_options(ctx, options, saved);
    saved.insert(saved.end(), weights.begin(), weights.end());
    saved.insert(saved.end(), biases.begin(), biases.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["weights"] = static_cast<int64_t>(weights.size());
    return call_ensemble_mlp(options, {input, weights, biases});
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    SavedTensors saved(ctx);
    const Tensor& input = saved.next();
    const auto options = saved_options<MLPOptions>(ctx, saved);
    const TensorList weights = saved.next(ctx->saved_data["weights"].toInt());
    const TensorList biases = saved.rest();
    const Network network{input, weights, biases};
    NeedsGrad needs_grad;
    for (size_t i = 0; i < network.tensors(); ++i) needs_grad.push_back(ctx->needs_input_grad(i));

    const auto gradients =
        at::GradMode::is_enabled() || is_batched(grad_outputs[0])  // create_graph, or within vmap
            ? composed_backward(kOp, grad_outputs[0], network, options, needs_grad)
            : call_with<ensemble_mlp_backward, kBackward>(options, grad_outputs[0], input, weights,
                                                          biases, needs_grad);
    variable_list grads(network.tensors() + 1);  // and of the options
    for (size_t i = 0, next = 0; i < network.tensors(); ++i) {
      if (needs_grad[i]) grads[i] = gradients[next++];
    }
    return grads;
  }
};

Tensor ensemble_mlp_autograd(const MLPOptions& options, const Tensor& input, TensorList weights,
                             TensorList biases) {
  return EnsembleMLPFunction::apply(input, weights, biases, options);
}

Tensor ensemble_mlp_autocast(const MLPOptions& options, const Tensor& input, TensorList weights,
                             TensorList biases) {
  const Autocast cast(input);
  return call_ensemble_mlp(options, {cast.lower(input), cast.lower(weights), cast.lower(biases)});
}

std::vector<std::string> activations() {
  return {std::begin(kActivationNames), std::end(kActivationNames)};
}

}  // namespace

Tensor call_ensemble_mlp(const MLPOptions& options, const Network& network) {
  return call_with<ensemble_mlp, kOp>(options, network.input, network.weights, network.biases);
}

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  m.def("activations() -> str[]", activations);
  const std::string network = "Tensor input, Tensor[] weights, Tensor[] biases";
  const std::string options = MLPOptions::kSchema;
  Operation(m, "ensemble_mlp(" + network + options + ") -> Tensor")
      .cpu_and_cuda<ensemble_mlp>()
      .meta<ensemble_mlp_meta>()
      .autograd<ensemble_mlp_autograd>()
      .autocast<ensemble_mlp_autocast>();
  Operation(m, "ensemble_mlp_backward(Tensor grad, " + network + ", bool[] needs_grad" + options +
                   ") -> Tensor[]")
      .cpu<ensemble_mlp_backward>()
      .cuda<ensemble_mlp_backward_cuda>()
      .meta<ensemble_mlp_backward_meta>()
      .not_differentiable();
  // The packed layout is the CPU's.
  Operation(m, "ensemble_mlp_prepack(Tensor[] weights, Tensor[] biases) -> Tensor")
      .cpu<ensemble_mlp_prepack>()
      .meta<ensemble_mlp_prepack_meta>()
      .not_differentiable();
  Operation(m,
            "ensemble_mlp_packed(Tensor input, Tensor packed, Tensor[] weights, Tensor[] biases,"
            " str activation) -> Tensor")
      .cpu<ensemble_mlp_packed>()
      .meta<ensemble_mlp_packed_meta>()
      .not_differentiable();
}

}  // namespace pyens
