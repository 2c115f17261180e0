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
constexpr char kKeeping[] = "ensemble_mlp_keeping";

// A kept sum costs 8 bytes of traffic, a computed one a multiply-add for each input (the mean over the hidden
// units): from some inputs on it is cheaper kept. Up to 32 MB the memory comes back from the last call and is
// partly in cache; beyond, the system hands out fresh pages, which it clears first. `keeping` of
// benchmarks/networks.py measures it.
constexpr double kInputsWorthKeeping = 20, kInputsWorthFreshPages = 192;
constexpr int64_t kRecycledBytes = int64_t{32} << 20;
// Of one call. What is kept lives until backward.
constexpr int64_t kMostKeptBytes = int64_t{1} << 30;
constexpr int64_t kFewExamples = 8;

Tensor run(ForwardCall& call, const Network& network) {
  const auto& params = call.params;
  Tensor output = empty_result({params.ensemble_size, params.batch, call.layers.back().out},
                               network.input.options());
  call.params.output = output.mutable_data_ptr();
  call.run(kOp, network);
  return output;
}

Tensor ensemble_mlp(const ForwardOptions& options, const Tensor& input, TensorList weights,
                    TensorList biases, TensorList norm_weights, TensorList norm_biases) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.mlp.members};
  check_mlp(kOp, network, options.mlp);
  ForwardCall call(kOp, network, options.mlp);
  return run(call, network);
}

Tensor output_like(const Network& network) {
  return at::empty_symint({network.members(), network.batch(), network.out_features()},
                          network.input.options());
}

Tensor ensemble_mlp_meta(const ForwardOptions& options, const Tensor& input, TensorList weights,
                         TensorList biases, TensorList norm_weights, TensorList norm_biases) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.mlp.members};
  check_mlp(kOp, network, options.mlp);
  return output_like(network);
}

// --- sums that are kept for backward -----------------------------------------------------------------

// All hidden sums, and those of the outputs where they have an activation.
c10::SymInt kept_elements(const Network& network, const MLPOptions& options) {
  const LayersOptions layers = parse_layers(kOp, options, network.weights.size());
  const size_t last = layers.size() - 1;
  c10::SymInt units = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    const bool keeps = l < last || layers[l].activation.kind != ActivationKind::identity;
    if (keeps) units = units + network.weights[l].sym_size(1);
  }
  return network.members() * kept_rows(network.batch()) * units;
}

std::tuple<Tensor, Tensor> ensemble_mlp_keeping(const MLPOptions& options, const Tensor& input,
                                                TensorList weights, TensorList biases,
                                                TensorList norm_weights, TensorList norm_biases) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.members};
  check_mlp(kOp, network, options);
  ForwardCall call(kOp, network, options);
  const auto real = input.options().dtype(accumulation_type(input.scalar_type()));
  const Tensor kept = empty_result({pyens::kept_elements(call.params, call.params.batch)}, real);
  if (kept.numel() > 0) call.params.kept = kept.mutable_data_ptr();
  return {run(call, network), kept};
}

std::tuple<Tensor, Tensor> ensemble_mlp_keeping_meta(const MLPOptions& options, const Tensor& input,
                                                     TensorList weights, TensorList biases,
                                                     TensorList norm_weights,
                                                     TensorList norm_biases) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.members};
  check_mlp(kOp, network, options);
  const auto real = input.options().dtype(accumulation_type(input.scalar_type()));
  return {output_like(network), at::empty_symint({kept_elements(network, options)}, real)};
}

// Whether keeping the sums is cheaper than computing them again: see kInputsWorthKeeping.
bool worth_keeping(const Network& network, const MLPOptions& options) {
  if (!network.input.device().is_cpu()) return false;
  // Shapes alone decide, and as little of them as possible: compiled code guards what is looked at.
  double operations = 0, elements = 0;
  for (size_t l = 0; l + 1 < network.weights.size(); ++l) {
    const Tensor& w = network.weights[l];
    const double out = static_cast<double>(w.sym_size(1).guard_int(__FILE__, __LINE__));
    operations += out * static_cast<double>(w.sym_size(2).guard_int(__FILE__, __LINE__));
    elements += out;
  }
  // A few examples have a kernel of their own, which keeps nothing.
  if (operations < kInputsWorthKeeping * elements || network.batch() < kFewExamples) return false;
  const c10::SymInt bytes =
      kept_elements(network, options) * elementSize(accumulation_type(network.input.scalar_type()));
  if (operations < kInputsWorthFreshPages * elements) return bytes <= kRecycledBytes;
  return bytes <= kMostKeptBytes;
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
                           TensorList biases, std::string_view activation,
                           std::string_view output_activation) {
  const MLPOptions options = plain_options(activation, output_activation);
  const Network network{input, weights, biases, {}, {}, options.members};
  check_mlp(kOp, network, options);
  ForwardCall call(kOp, network, options);
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
                                TensorList biases, std::string_view activation,
                                std::string_view output_activation) {
  check_device_of_weights(kOp, "packed", packed, weights);
  return ensemble_mlp_meta({plain_options(activation, output_activation), {}}, input, weights,
                           biases, {}, {});
}

// --- backward ------------------------------------------------------------------------------------

void check_backward(const Tensor& grad, const Network& network, const MLPOptions& options) {
  check_mlp(kOp, network, options);
  check_same_kind(kOp, {"grad"}, grad, kFirstWeight, network.weights[0]);
  const c10::SymInt shape[] = {network.members(), network.batch(), network.out_features()};
  PYENS_CHECK_VALUE(grad.sym_sizes() == c10::SymIntArrayRef(shape), kOp, "grad",
                    c10::str("shape ", c10::SymIntArrayRef(shape)), "shape ", grad.sym_sizes());
}

// By all members, of the parameters' dtype.
void finish_gradients(const Network& network, const NeedsGrad& needs_grad,
                      std::vector<Tensor>& gradients) {
  for (size_t i = 0; i < gradients.size(); ++i) {
    const bool of_input = i == 0 && needs_grad[0];
    if (!of_input) gradients[i] = gradient_of_all(network, gradients[i]);
    gradients[i] = gradients[i].to(network.input.scalar_type());
  }
}

std::vector<Tensor> ensemble_mlp_backward(const MLPOptions& options, const Tensor& grad,
                                          const Tensor& input, TensorList weights,
                                          TensorList biases, TensorList norm_weights,
                                          TensorList norm_biases, const OptionalTensor& kept,
                                          NeedsGrad needs_grad) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.members};
  check_backward(grad, network, options);
  TrainingCall call(kOp, network, options, needs_grad);
  if (kept) {
    const int64_t elements = pyens::kept_elements(call.params, call.params.batch);
    PYENS_CHECK_VALUE(kept->is_contiguous() && kept->numel() == elements &&
                          kept->scalar_type() == accumulation_type(input.scalar_type()),
                      kOp, "kept",
                      c10::str("what ensemble_mlp_keeping gives, ", elements, " elements"),
                      kept->numel(), " of ", kept->scalar_type());
    check_device_of_weights(kOp, "kept", *kept, weights);
    // Only read.
    if (elements > 0) call.params.kept = const_cast<void*>(kept->const_data_ptr());
  }
  const Tensor& rows = with_contiguous_rows(grad, call.copies);
  call.training.target = rows.const_data_ptr();
  call.training.target_member_stride = rows.stride(0);
  call.training.target_row_stride = rows.stride(1);
  call.run(kOp);
  finish_gradients(network, needs_grad, call.gradients);
  return call.gradients;
}

std::vector<Tensor> ensemble_mlp_backward_cuda(const MLPOptions& options, const Tensor& grad,
                                               const Tensor& input, TensorList weights,
                                               TensorList biases, TensorList norm_weights,
                                               TensorList norm_biases, const OptionalTensor& kept,
                                               NeedsGrad needs_grad) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.members};
  check_backward(grad, network, options);
  if (training_fits_one_launch(kOp, weights, options)) {
    return ensemble_mlp_backward(options, grad, input, weights, biases, norm_weights, norm_biases,
                                 kept, needs_grad);
  }
  return composed_backward(kOp, grad, network, options, needs_grad);
}

std::vector<Tensor> ensemble_mlp_backward_meta(const MLPOptions& options, const Tensor& grad,
                                               const Tensor& input, TensorList weights,
                                               TensorList biases, TensorList norm_weights,
                                               TensorList norm_biases,
                                               const OptionalTensor& /*kept*/,
                                               NeedsGrad needs_grad) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.members};
  check_backward(grad, network, options);
  return for_each_needed(kOp, network, needs_grad, [&](const Tensor& of) {
    return at::empty_symint(of.sym_sizes(), input.options());
  });
}

class EnsembleMLPFunction : public torch::autograd::Function<EnsembleMLPFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, TensorList weights,
                        TensorList biases, TensorList norm_weights, TensorList norm_biases,
                        const MLPOptions& options, bool keeps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Network network{input, weights, biases, norm_weights, norm_biases, options.members};
    Tensor output, kept;
    if (keeps) {
      std::tie(output, kept) = call_with<ensemble_mlp_keeping, kKeeping>(
          options, input, weights, biases, norm_weights, norm_biases);
    } else {
      output = call_ensemble_mlp(options, network);
    }
    variable_list saved;
    saved.reserve(network.tensors() + 4);
    saved.push_back(input);
    saved.push_back(kept);
    save_options(ctx, options, saved);
    save_network(ctx, network, saved);
    ctx->save_for_backward(saved);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    SavedTensors saved(ctx);
    const Tensor& input = saved.next();
    const Tensor& kept = saved.next();
    const auto options = saved_options<MLPOptions>(ctx, saved);
    const Network network = saved_network(ctx, input, options, saved);
    NeedsGrad needs_grad;
    for (size_t i = 0; i < network.tensors(); ++i) needs_grad.push_back(ctx->needs_input_grad(i));

    const auto gradients =
        at::GradMode::is_enabled() || is_batched(grad_outputs[0])  // create_graph, or within vmap
            ? composed_backward(kOp, grad_outputs[0], network, options, needs_grad)
            : call_with<ensemble_mlp_backward, kBackward>(
                  options, grad_outputs[0], input, network.weights, network.biases,
                  network.norm_weights, network.norm_biases, if_defined(kept), needs_grad);
    variable_list grads(network.tensors() + 2);  // and of options, keeps
    for (size_t i = 0, next = 0; i < network.tensors(); ++i) {
      if (needs_grad[i]) grads[i] = gradients[next++];
    }
    return grads;
  }
};

bool needs_gradient(const Network& network) {
  if (!at::GradMode::is_enabled()) return false;
  for (size_t i = 0; i < network.tensors(); ++i) {
    if (network.tensor(i).requires_grad()) return true;
  }
  return false;
}

Tensor ensemble_mlp_autograd(const ForwardOptions& options, const Tensor& input, TensorList weights,
                             TensorList biases, TensorList norm_weights, TensorList norm_biases) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.mlp.members};
  // What does not fit is refused where the sums are formed.
  const auto is_stacked = [](const Tensor& w) { return w.dim() == 3; };
  const bool keeps =
      needs_gradient(network) && options.save_hidden.value_or(true) && !weights.empty() &&
      input.dim() >= 2 && std::all_of(weights.begin(), weights.end(), is_stacked) &&
      (options.save_hidden ? input.device().is_cpu() : worth_keeping(network, options.mlp));
  return EnsembleMLPFunction::apply(input, weights, biases, norm_weights, norm_biases, options.mlp,
                                    keeps);
}

Tensor ensemble_mlp_autocast(const ForwardOptions& options, const Tensor& input, TensorList weights,
                             TensorList biases, TensorList norm_weights, TensorList norm_biases) {
  const Autocast cast(input);
  return call_with<ensemble_mlp, kOp>(options, cast.lower(input), cast.lower(weights),
                                      cast.lower(biases), cast.lower(norm_weights),
                                      cast.lower(norm_biases));
}

std::vector<std::string> activations() {
  return {std::begin(kActivationNames), std::end(kActivationNames)};
}

}  // namespace

Tensor call_ensemble_mlp(const MLPOptions& options, const Network& network) {
  return call_with<ensemble_mlp, kOp>(ForwardOptions{options, {}}, network.input, network.weights,
                                      network.biases, network.norm_weights, network.norm_biases);
}

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  m.def("activations() -> str[]", activations);
  const std::string network = "Tensor input, " PYENS_NETWORK;
  const std::string options = MLPOptions::kSchema;
  Operation(m, "ensemble_mlp(" + network + options + ForwardOptions::kSchema + ") -> Tensor")
      .cpu_and_cuda<ensemble_mlp>()
      .meta<ensemble_mlp_meta>()
      .autograd<ensemble_mlp_autograd>()
      .autocast<ensemble_mlp_autocast>();
  Operation(m, "ensemble_mlp_keeping(" + network + options + ") -> (Tensor, Tensor)")
      .cpu<ensemble_mlp_keeping>()
      .meta<ensemble_mlp_keeping_meta>()
      .not_differentiable();
  Operation(m, "ensemble_mlp_backward(Tensor grad, " + network +
                   ", Tensor? kept, bool[] needs_grad" + options + ") -> Tensor[]")
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
            " str activation, str output_activation='identity') -> Tensor")
      .cpu<ensemble_mlp_packed>()
      .meta<ensemble_mlp_packed_meta>()
      .not_differentiable();
}

}  // namespace pyens
