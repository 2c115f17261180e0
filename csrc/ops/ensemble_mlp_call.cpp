// Checks of an ensemble MLP, and its calls in the terms of the kernels, on the CPU and on CUDA.
//
// The forward pass on CUDA is one launch or, for members whose weights are too wide for that, the library's
// batched product and a kernel for what follows it (kernels/cuda/ensemble_mlp_epilogue.cu), layer by layer.
// Products of 16-bit types come out in float32, so that an activation is rounded once, when it is stored.
// In float32 they follow torch's TF32 setting. Nothing waits for the GPU, and buffers come from torch's
// allocator: a CUDA graph can capture it.

#include "ops/torch.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>

#include "ops/ensemble_mlp.h"

namespace pyens {

using at::Tensor;
using at::TensorList;

// --- checks --------------------------------------------------------------------------------------

namespace {

// The i-th of the names between commas.
std::string_view entry(std::string_view list, size_t i) {
  for (; i > 0; --i) list.remove_prefix(list.find(',') + 1);
  list = list.substr(0, list.find(','));
  while (!list.empty() && list.front() == ' ') list.remove_prefix(1);
  while (!list.empty() && list.back() == ' ') list.remove_suffix(1);
  return list;
}

// One entry for all hidden layers, or as many as there are; whether it is one.
bool check_entries(const char* op, const char* argument, std::string_view list, size_t hidden) {
  const auto count = static_cast<size_t>(std::count(list.begin(), list.end(), ',')) + 1;
  PYENS_CHECK_VALUE(count == 1 || count == hidden, op, argument,
                    c10::str("one for all hidden layers, or one for each of the ", hidden), count);
  return count == 1;
}

// name, or name(parameter).
Activation parse_activation(const char* op, const char* argument, std::string_view text) {
  const std::string_view name = text.substr(0, text.find('('));
  const std::optional<ActivationKind> kind = parse_activation_kind(name);
  TORCH_CHECK_VALUE(kind, op, ": ", argument, ": expected one of ", kAllActivationNames, ", got \"",
                    text, "\"");
  Activation activation{*kind, kDefaultParameters[static_cast<int>(*kind)]};
  if (name.size() == text.size()) return activation;
  PYENS_CHECK_VALUE(activation.parameter != 0, op, argument,
                    c10::str(name, ", which has no parameter"), text);
  const std::string inside(text.substr(name.size() + 1, text.size() - name.size() - 2));
  char* end = nullptr;
  activation.parameter = std::strtod(inside.c_str(), &end);
  PYENS_CHECK_VALUE(
      text.back() == ')' && !inside.empty() && *end == '\0' && std::isfinite(activation.parameter),
      op, argument, c10::str(name, "(a finite number)"), text);
  PYENS_CHECK_VALUE(*kind != ActivationKind::celu || activation.parameter > 0, op, argument,
                    "celu(alpha) with alpha > 0", text);
  return activation;
}

NormKind parse_norm(const char* op, std::string_view name) {
  if (name == "none") return NormKind::none;
  if (name == "layer_norm") return NormKind::layer_norm;
  if (name == "rms_norm") return NormKind::rms_norm;
  TORCH_CHECK_VALUE(false, op, ": norm: expected layer_norm, rms_norm or None, got \"", name, "\"");
}

}  // namespace

LayersOptions parse_layers(const char* op, const MLPOptions& options, size_t count) {
  LayersOptions layers(count);
  const size_t hidden = count - 1;
  const bool one_activation = check_entries(op, "activation", options.activation, hidden);
  const bool one_norm = check_entries(op, "norm", options.norm, hidden);
  PYENS_CHECK_VALUE(options.residual.empty() || options.residual.size() == hidden, op, "residual",
                    c10::str("one for all hidden layers, or one for each of the ", hidden),
                    options.residual.size());
  // Checked also where there is no hidden layer.
  LayerOptions common;
  if (one_activation) {
    common.activation = parse_activation(op, "activation", options.activation);
  }
  if (one_norm) common.norm = parse_norm(op, options.norm);
  for (size_t l = 0; l < hidden; ++l) {
    layers[l] = common;
    if (!one_activation) {
      layers[l].activation = parse_activation(op, "activation", entry(options.activation, l));
    }
    if (!one_norm) layers[l].norm = parse_norm(op, entry(options.norm, l));
    layers[l].residual = !options.residual.empty() && options.residual[l] == '1';
  }
  layers[hidden].activation = parse_activation(op, "output_activation", options.output_activation);
  return layers;
}

void check_layers(const char* op, TensorList weights, TensorList biases) {
  PYENS_CHECK_VALUE(!weights.empty(), op, "weights", "at least one layer", "an empty list");
  PYENS_CHECK_VALUE(biases.empty() || biases.size() == weights.size(), op, "biases",
                    c10::str("one for each of the ", weights.size(), " layers, or none"),
                    biases.size());
  const Tensor& first = weights[0];
  PYENS_CHECK_TYPE(is_kernel_dtype(first.scalar_type()), op, kFirstWeight,
                   "float32, float64, bfloat16 or float16", first.scalar_type());
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor& w = weights[l];
    const ArgumentName name{"weights", static_cast<int64_t>(l)};
    check_same_kind(op, name, w, kFirstWeight, first);
    PYENS_CHECK_VALUE(w.dim() == 3, op, name, "[E, out, in]", "shape ", w.sym_sizes());
    PYENS_CHECK_VALUE(w.sym_size(0) >= 1 && w.sym_size(1) >= 1 && w.sym_size(2) >= 1, op, name,
                      "[E, out, in], none of them 0", "shape ", w.sym_sizes());
    PYENS_CHECK_VALUE(w.sym_size(0) == first.sym_size(0), op, name,
                      c10::str("the ensemble size of weights[0] (", first.sym_size(0), ")"),
                      "shape ", w.sym_sizes());
    PYENS_CHECK_VALUE(
        l == 0 || w.sym_size(2) == weights[l - 1].sym_size(1), op, name,
        c10::str("in = out of weights[", l - 1, "] (", weights[l - 1].sym_size(1), ")"), "shape ",
        w.sym_sizes());
    if (biases.empty()) continue;
    const Tensor& b = biases[l];
    const ArgumentName bias_name{"biases", static_cast<int64_t>(l)};
    check_same_kind(op, bias_name, b, kFirstWeight, first);
    PYENS_CHECK_VALUE(b.dim() == 2 && b.sym_size(0) == w.sym_size(0) &&
                          (b.sym_size(1) == w.sym_size(1) || b.sym_size(1) == 0),
                      op, bias_name, c10::str("[", w.sym_size(0), ", ", w.sym_size(1), "]"),
                      "shape ", b.sym_sizes());
  }
}

void check_network(const char* op, const Network& network) {
  check_layers(op, network.weights, network.biases);
  const Tensor &input = network.input, &first = network.weights[0];
  check_same_kind(op, {"input"}, input, kFirstWeight, first);
  if (network.chosen) {
    const Tensor& members = *network.chosen;
    PYENS_CHECK_TYPE(members.scalar_type() == at::kLong, op, "members", "int64",
                     members.scalar_type());
    check_device_of_weights(op, "members", members, network.weights);
    PYENS_CHECK_VALUE(members.dim() == 1 && members.sym_size(0) >= 1, op, "members",
                      "[n], at least one of them", "shape ", members.sym_sizes());
  }
  const int64_t dim = input.dim();
  const c10::SymInt members = network.members();
  PYENS_CHECK_VALUE(
      (dim == 2 || (dim == 3 && input.sym_size(0) == members)) &&
          input.sym_size(-1) == first.sym_size(2),
      op, "input",
      c10::str("[B, ", first.sym_size(2), "] or [", members, ", B, ", first.sym_size(2), "]"),
      "shape ", input.sym_sizes());
}

namespace {

void check_norms(const char* op, const Network& network, const MLPOptions& options,
                 const LayersOptions& layers) {
  c10::SmallVector<size_t, 8> normed;
  for (size_t l = 0; l < layers.size(); ++l) {
    const Tensor& weight = network.weights[l];
    if (layers[l].residual) {
      PYENS_CHECK_VALUE(
          weight.sym_size(1) == weight.sym_size(2), op, "residual",
          c10::str("no residual of hidden layer ", l, ", which is not as wide as what it reads"),
          weight.sym_size(2), " inputs and ", weight.sym_size(1), " outputs");
    }
    if (layers[l].norm == NormKind::none) continue;
    PYENS_CHECK_VALUE(weight.sym_size(1) > 1, op, "norm",
                      c10::str("no norm of hidden layer ", l, ", which has one feature"),
                      options.norm);
    normed.push_back(l);
  }
  const std::pair<const char*, TensorList> given[] = {{"norm_weights", network.norm_weights},
                                                      {"norm_biases", network.norm_biases}};
  for (const auto& [argument, tensors] : given) {
    PYENS_CHECK_VALUE(tensors.empty() || tensors.size() == normed.size(), op, argument,
                      c10::str("one for each of the ", normed.size(), " norms, or none"),
                      tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor &t = tensors[i], &w = network.weights[normed[i]];
      const ArgumentName name{argument, static_cast<int64_t>(i)};
      check_same_kind(op, name, t, kFirstWeight, network.weights[0]);
      PYENS_CHECK_VALUE(
          t.dim() == 2 && t.sym_size(0) == w.sym_size(0) && t.sym_size(1) == w.sym_size(1), op,
          name, c10::str("[", w.sym_size(0), ", ", w.sym_size(1), "]"), "shape ", t.sym_sizes());
    }
  }
  PYENS_CHECK_VALUE(normed.empty() || (options.norm_eps > 0 && std::isfinite(options.norm_eps)), op,
                    "norm_eps", "a positive number", options.norm_eps);
  PYENS_CHECK_VALUE(!options.dropout_before_norm || !normed.empty(), op, "dropout_position",
                    "after_activation where no layer has a norm", "before_norm");
}

}  // namespace

void check_device_of_weights(const char* op, const char* argument, const Tensor& tensor,
                             TensorList weights) {
  PYENS_CHECK_TYPE(tensor.device() == weights[0].device(), op, argument,
                   c10::str("the device of ", kFirstWeight, " (", weights[0].device(), ")"),
                   tensor.device());
}

void check_real(const char* op, const char* argument, const Tensor& tensor, TensorList weights) {
  const at::ScalarType type = weights[0].scalar_type(), real = accumulation_type(type);
  PYENS_CHECK_TYPE(
      tensor.scalar_type() == type || tensor.scalar_type() == real, op, argument,
      c10::str("the dtype of ", kFirstWeight, " (", type, ")", type == real ? "" : " or Float"),
      tensor.scalar_type());
  check_device_of_weights(op, argument, tensor, weights);
}

void check_mlp(const char* op, const Network& network, const MLPOptions& options) {
  PYENS_CHECK_VALUE(!network.weights.empty(), op, "weights", "at least one layer", "an empty list");
  const LayersOptions layers = parse_layers(op, options, network.weights.size());
  check_network(op, network);
  check_norms(op, network, options, layers);
  PYENS_CHECK_VALUE(options.dropout >= 0 && options.dropout < 1, op, "dropout", "0 <= dropout < 1",
                    options.dropout);
  if (options.dropout_rates) {
    const Tensor& rates = *options.dropout_rates;
    PYENS_CHECK_VALUE(options.dropout == 0, op, "dropout", "one rate, or one for each member",
                      options.dropout, " and a tensor");
    PYENS_CHECK_TYPE(rates.scalar_type() == at::kDouble, op, "dropout", "float64 rates",
                     rates.scalar_type());
    check_device_of_weights(op, "dropout", rates, network.weights);
    const c10::SymInt hidden = static_cast<int64_t>(layers.size()) - 1, e = network.members();
    PYENS_CHECK_VALUE((rates.dim() == 1 && rates.sym_size(0) == e) ||
                          (rates.dim() == 2 && (rates.sym_size(0) == e || rates.sym_size(0) == 1) &&
                           rates.sym_size(1) == hidden),
                      op, "dropout",
                      c10::str("a number, or [", e, "], or [1 or ", e, ", ", hidden, "]"), "shape ",
                      rates.sym_sizes());
    PYENS_CHECK_VALUE(!rates.requires_grad(), op, "dropout",
                      "requires_grad=False (it gets no gradient)", "True");
  }
  if (!options.dropout_seeds) {
    PYENS_CHECK_VALUE(
        options.dropout == 0 && !options.dropout_rates, op, "dropout_seeds",
        options.dropout_rates
            ? c10::str("int64 [", network.members(), "] with a dropout of each member")
            : c10::str("int64 [", network.members(), "] with dropout ", options.dropout),
        "None");
    return;
  }
  const Tensor& seeds = *options.dropout_seeds;
  PYENS_CHECK_TYPE(seeds.scalar_type() == at::kLong, op, "dropout_seeds", "int64",
                   seeds.scalar_type());
  check_device_of_weights(op, "dropout_seeds", seeds, network.weights);
  PYENS_CHECK_VALUE(seeds.dim() == 1 && seeds.sym_size(0) == network.members(), op, "dropout_seeds",
                    c10::str("[", network.members(), "]"), "shape ", seeds.sym_sizes());
}

// --- autograd ------------------------------------------------------------------------------------

using torch::autograd::AutogradContext;

void save_network(AutogradContext* ctx, const Network& network,
                  torch::autograd::variable_list& tensors) {
  std::vector<int64_t> sizes;
  for (const TensorList list : network.lists()) {
    sizes.push_back(static_cast<int64_t>(list.size()));
    tensors.insert(tensors.end(), list.begin(), list.end());
  }
  ctx->saved_data["network"] = sizes;
}

Network saved_network(AutogradContext* ctx, const Tensor& input, const MLPOptions& options,
                      SavedTensors& tensors) {
  const std::vector<int64_t> sizes = ctx->saved_data["network"].toIntVector();
  const auto next = [&](size_t i) { return tensors.next(static_cast<size_t>(sizes[i])); };
  return {input, next(0), next(1), next(2), next(3), options.members};
}

// --- forward -------------------------------------------------------------------------------------

ForwardCall::ForwardCall(TensorList weights, TensorList biases) {
  layers.reserve(weights.size());
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor& w = with_contiguous_rows(weights[l], copies);
    MLPLayer layer{};
    layer.weight.data = w.const_data_ptr();
    layer.weight.format = kernel_dtype(w.scalar_type());
    layer.out = w.size(1);
    layer.in = w.size(2);
    layer.weight.member_stride = w.stride(0);
    layer.weight.row_stride = w.stride(1);
    if (!biases.empty() && biases[l].size(1) > 0) {
      const Tensor& b = with_contiguous_rows(biases[l], copies);
      layer.bias.data = b.const_data_ptr();
      layer.bias.member_stride = b.stride(0);
    }
    layers.push_back(layer);
  }
  params.dtype = kernel_dtype(weights[0].scalar_type());
  params.ensemble_size = weights[0].size(0);
  params.num_layers = static_cast<int64_t>(layers.size());
  params.layers = layers.data();
}

void ForwardCall::set_input(const Tensor& input) {
  const Tensor& x = with_contiguous_rows(input, copies);
  params.input = x.const_data_ptr();
  params.batch = x.size(-2);
  params.input_row_stride = x.stride(-2);
  params.input_member_stride = x.dim() == 3 && params.ensemble_size > 1 ? x.stride(0) : 0;
}

ForwardCall::ForwardCall(const char* op, const Network& network, const MLPOptions& options)
    : ForwardCall(network.weights, network.biases) {
  set_layers(op, network, options);
  set_members(op, network);
  set_input(network.input);
  set_dropout(op, options);
}

void ForwardCall::set_layers(const char* op, const Network& network, const MLPOptions& options) {
  const LayersOptions given = parse_layers(op, options, layers.size());
  const auto read = [&](TensorList tensors, size_t i, MLPBias& to) {
    if (tensors.empty()) return;
    const Tensor& t = with_contiguous_rows(tensors[i], copies);
    to = {t.const_data_ptr(), t.stride(0)};
  };
  for (size_t l = 0, normed = 0; l < layers.size(); ++l) {
    MLPLayer& layer = layers[l];
    layer.activation = given[l].activation;
    layer.residual = given[l].residual;
    layer.norm.kind = given[l].norm;
    if (!layer.has_norm()) continue;
    layer.norm.after_activation = options.norm_after_activation;
    layer.norm.epsilon = options.norm_eps;
    read(network.norm_weights, normed, layer.norm.weight);
    read(network.norm_biases, normed, layer.norm.bias);
    ++normed;
  }
}

void ForwardCall::set_members(const char* op, const Network& network) {
  if (!network.chosen) return;
  const Tensor& members = with_contiguous_rows(*network.chosen, copies);
  const int64_t stored = params.ensemble_size;
  params.ensemble_size = members.size(0);
  params.stored_members = stored;
  params.members = members.const_data_ptr<int64_t>();
  for (int64_t i = 0; members.is_cpu() && i < params.ensemble_size; ++i) {
    const int64_t m = params.members[i];
    PYENS_CHECK_VALUE(m >= 0 && m < stored, op, "members",
                      c10::str("members from 0 to ", stored - 1), m);
  }
}

void ForwardCall::set_dropout(const char* op, const MLPOptions& options) {
  Dropout& dropout = params.dropout;
  dropout.p = options.dropout;
  dropout.before_norm = options.dropout_before_norm;
  if (options.dropout_rates) {
    const Tensor& rates = with_contiguous_rows(*options.dropout_rates, copies);
    dropout.rates = rates.const_data_ptr<double>();
    dropout.rates_member_stride = rates.size(0) == 1 ? 0 : rates.stride(0);
    dropout.rates_layer_stride = rates.dim() == 1 ? 0 : 1;
    const int64_t count = rates.dim() == 1 ? 1 : rates.size(1);
    for (int64_t i = 0; rates.is_cpu() && i < rates.size(0) * count; ++i) {
      const double p = dropout.rates[i / count * rates.stride(0) + i % count];
      PYENS_CHECK_VALUE(p >= 0 && p < 1, op, "dropout", "0 <= dropout < 1 of each member", p,
                        " of member ", i / count);
    }
  }
  if (dropout.any()) {
    const Tensor& seeds = with_contiguous_rows(*options.dropout_seeds, copies);
    dropout.seeds = seeds.const_data_ptr<int64_t>();
  }
}

namespace {

// Of a buffer. What needs more goes through the layers in chunks of the batch.
constexpr int64_t kMostElements = int64_t{1} << 28;

// [E, B, I]. A shared input is expanded, and must not be copied for each member: what the library
// would not read as it lies is copied before.
Tensor member_inputs(const Tensor& input, int64_t members) {
  const auto reads = [&](int64_t along, int64_t across) {
    return input.stride(along) == 1 && input.stride(across) >= input.size(along);
  };
  const Tensor x = reads(-1, -2) || reads(-2, -1) ? input : input.contiguous();
  return x.dim() == 3 ? x : x.unsqueeze(0).expand({members, -1, -1});
}

int64_t rows_at_once(const EnsembleMLPParams& params) {
  int64_t widest = 1;
  for (int64_t l = 0; l < params.num_layers; ++l) widest = std::max(widest, params.layers[l].out);
  const int64_t rows = kMostElements / (params.ensemble_size * widest);
  return std::clamp<int64_t>(rows < 256 ? rows : rows / 256 * 256, 1, params.batch);
}

void run_layer_by_layer(const char* op, const EnsembleMLPParams& params, const Network& network) {
  const Tensor& input = network.input;
  const at::ScalarType type = input.scalar_type(), real = accumulation_type(type);
  const Tensor inputs = member_inputs(input, params.ensemble_size);
  const int64_t most = rows_at_once(params);
  EnsembleMLPEpilogue epilogue{};
  for (; epilogue.first_row < params.batch; epilogue.first_row += epilogue.rows) {
    epilogue.rows = std::min(most, params.batch - epilogue.first_row);
    Tensor h = inputs.narrow(1, epilogue.first_row, epilogue.rows), read;
    for (epilogue.layer = 0; epilogue.layer < params.num_layers; ++epilogue.layer) {
      const int64_t out = params.layers[epilogue.layer].out;
      const Tensor& stored = network.weights[static_cast<size_t>(epilogue.layer)];
      const Tensor chosen =
          network.chosen ? stored.index_select(0, members_within(network)) : stored;
      const Tensor weight = chosen.transpose(1, 2);
      if (params.layers[epilogue.layer].residual) {
        read = h.stride(2) == 1 ? h : h.contiguous();
        epilogue.x = read.const_data_ptr();
        epilogue.x_member_stride = read.stride(0);
        epilogue.x_row_stride = read.stride(1);
      }
      const Tensor z = type == real ? at::bmm(h, weight) : at::bmm(h, weight, real);
      epilogue.z = z.const_data_ptr();
      if (epilogue.layer + 1 == params.num_layers) {
        const int64_t skipped = epilogue.first_row * out * input.element_size();
        epilogue.h = static_cast<char*>(params.output) + skipped;
        epilogue.h_member_stride = params.batch * out;
      } else {
        h = type == real ? z : at::empty(z.sizes(), input.options());
        epilogue.h = h.mutable_data_ptr();
        epilogue.h_member_stride = epilogue.rows * out;
      }
      launch_cuda(op, input, [&](void* stream) {
        return ensemble_mlp_cuda::run_epilogue(params, epilogue, stream);
      });
    }
  }
}

}  // namespace

void ForwardCall::run(const char* op, const Network& network) {
  if (network.input.is_cuda()) {
    const bool tf32 = allows_tf32();
    bool one_launch = false;
    launch_cuda(op, network.input, [&](void* stream) {
      one_launch = ensemble_mlp_cuda::fits_one_launch(params, tf32);
      return one_launch ? ensemble_mlp_cuda::run(params, tf32, stream) : nullptr;
    });
    if (!one_launch) run_layer_by_layer(op, params, network);
    return;
  }
  launch_cpu(ensemble_mlp_cpu::work_items(params), ensemble_mlp_cpu::grain_size(params),
             ensemble_mlp_cpu::scratch_bytes(params),
             [&](int64_t begin, int64_t end, void* scratch) {
               ensemble_mlp_cpu::run(params, begin, end, scratch);
             });
}

// --- training ------------------------------------------------------------------------------------

namespace {

// What there is of each tensor behind the input, taken in their order, to the layers.
template <class OfLayers, class Take>
void give_to_layers(const Network& network, const c10::SmallVector<MLPLayer, 8>& layers,
                    OfLayers& to, const Take& take) {
  for (auto& layer : to) layer.weight = take();
  for (size_t l = 0; l < network.biases.size(); ++l) to[l].bias = take();
  c10::SmallVector<size_t, 8> normed;
  for (size_t l = 0; l < layers.size(); ++l) {
    if (layers[l].has_norm()) normed.push_back(l);
  }
  for (size_t i = 0; i < network.norm_weights.size(); ++i) to[normed[i]].norm_weight = take();
  for (size_t i = 0; i < network.norm_biases.size(); ++i) to[normed[i]].norm_bias = take();
}

}  // namespace

TrainingCall::TrainingCall(const char* op, const Network& network, const MLPOptions& options,
                           const NeedsGrad& needs_grad)
    : ForwardCall(op, network, options),
      input_(network.input),
      layer_gradients_(network.weights.size()) {
  const auto real = input_.options().dtype(accumulation_type(input_.scalar_type()));
  gradients = for_each_needed(op, network, needs_grad, [&](const Tensor& of) {
    c10::DimVector sizes(of.sizes());
    if (&of != &network.input) sizes[0] = params.ensemble_size;
    return params.batch == 0 ? at::zeros(sizes, real) : empty_result(sizes, real);
  });
  auto next = gradients.begin();
  size_t position = 0;
  const auto take = [&] { return needs_grad[position++] ? (next++)->mutable_data_ptr() : nullptr; };
  training.grad_input = take();
  training.sum_grad_input = input_.dim() == 2;
  give_to_layers(network, layers, layer_gradients_, take);
  training.gradients = layer_gradients_.data();
}

void TrainingCall::make_steps(const Network& network, c10::ArrayRef<MLPParameterStep> steps) {
  layer_steps_.resize(layers.size());
  const auto* next = steps.begin();
  give_to_layers(network, layers, layer_steps_, [&] { return *next++; });
  next = steps.begin();
  give_to_layers(network, layers, layer_gradients_, [&] {
    const StepTensor* const tensor = (next++)->tensor;
    return tensor ? tensor->parameter : nullptr;
  });
  training.steps = layer_steps_.data();
}

void TrainingCall::run(const char* op, const std::function<void()>& accepted) {
  if (params.batch == 0) return;
  training.forward = params;
  if (input_.is_cpu()) return run_on_cpu(op, accepted);
  launch_cuda(op, input_, [&](void* stream) {
    const auto bytes = static_cast<int64_t>(ensemble_mlp_cuda::scratch_bytes(training));
    const Tensor scratch = at::empty({bytes}, input_.options().dtype(at::kByte));
    return ensemble_mlp_cuda::train(training, scratch.mutable_data_ptr(), stream);
  });
}

void TrainingCall::run_on_cpu(const char* op, const std::function<void()>& accepted) {
  using namespace ensemble_mlp_cpu;
  training.threads = at::get_num_threads();
  const TrainingPlan plan = plan_training(training);
  const c10::DataPtr partial = result_allocator()->allocate(plan.partial_bytes);
  training.partial = partial.get();
  if (training.loss != Loss::none) {
    std::atomic<TrainingError> error{TrainingError::none};
    launch_cpu(params.ensemble_size, std::max<int64_t>(1, 65536 / params.batch), 0,
               [&](int64_t begin, int64_t end, void* /*scratch*/) {
                 const TrainingError found = prepare_training(training, begin, end);
                 if (found != TrainingError::none) error = found;
               });
    PYENS_CHECK_VALUE(error != TrainingError::sample_weight_invalid, op, "sample_weight",
                      "finite weights of at least 0", "one that is not");
    PYENS_CHECK_VALUE(error != TrainingError::target_out_of_range, op, "target",
                      c10::str("classes from 0 to ", params.layers[params.num_layers - 1].out - 1),
                      "one that is not");
  }
  if (accepted) accepted();
  launch_cpu(
      plan.items, plan.grain_size, plan.scratch_bytes,
      [&](int64_t begin, int64_t end, void* scratch) { train(training, begin, end, scratch); });
  launch_cpu(plan.finish_items, plan.finish_grain_size, 0,
             [&](int64_t begin, int64_t end, void* /*scratch*/) {
               finish_training(training, begin, end);
             });
}

Tensor members_within(const Network& network) {
  const Tensor& members = *network.chosen;
  // On the CPU the values have been looked at, or are those of a trace.
  return members.is_cuda() ? members.clamp(0, network.weights[0].size(0) - 1) : members;
}

Tensor gradient_of_all(const Network& network, const Tensor& gradient) {
  if (!network.chosen) return gradient;
  auto sizes = gradient.sym_sizes().vec();
  sizes[0] = network.weights[0].sym_size(0);
  const Tensor zeros = at::zeros_symint(sizes, gradient.options());
  // index_put, because index_add on CUDA adds in any order.
  if (gradient.is_cuda()) {
    return zeros.index_put({members_within(network)}, gradient, /*accumulate=*/true);
  }
  return zeros.index_add(0, *network.chosen, gradient);
}

bool training_fits_one_launch([[maybe_unused]] const char* op, [[maybe_unused]] TensorList weights,
                              [[maybe_unused]] const MLPOptions& options) {
#if defined(PYENS_WITH_CUDA)
  const auto is_stacked = [](const Tensor& w) { return w.dim() == 3; };
  if (weights.empty() || !std::all_of(weights.begin(), weights.end(), is_stacked)) return false;
  const LayersOptions given = parse_layers(op, options, weights.size());
  std::vector<MLPLayer> layers(weights.size());
  EnsembleMLP mlp{};
  for (size_t l = 0; l < weights.size(); ++l) {
    layers[l].out = weights[l].sym_size(1).guard_int(__FILE__, __LINE__);
    layers[l].in = weights[l].sym_size(2).guard_int(__FILE__, __LINE__);
    layers[l].activation = given[l].activation;
    layers[l].norm.kind = given[l].norm;
    layers[l].residual = given[l].residual;
  }
  mlp.dtype = kernel_dtype(weights[0].scalar_type());
  mlp.ensemble_size = weights[0].sym_size(0).guard_int(__FILE__, __LINE__);
  mlp.num_layers = static_cast<int64_t>(layers.size());
  mlp.layers = layers.data();
  return ensemble_mlp_cuda::training_fits_one_launch(mlp);
#else
  return false;
#endif
}

}  // namespace pyens
