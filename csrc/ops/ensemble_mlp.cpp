// torch-facing side of the ensemble MLP: checks, allocation, launch; shapes for fake tensors;
// autograd; autocast.
//
//   ensemble_mlp(input, weights, biases, activation)                  weights as they are
//   ensemble_mlp_pack(weights, biases)                                weights for small batches
//   ensemble_mlp_packed(input, packed, weights, biases, activation)   inference with both
//
// `biases` is empty where there are none: Function::apply would lose the gradients of an optional
// list.

#include <ATen/autocast_mode.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <forward_list>
#include <string_view>
#include <vector>

#include "kernels/ensemble_mlp.h"
#include "ops/checks.h"
#include "ops/launch.h"

namespace pyens {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kOp = "ensemble_mlp";

Activation parse_activation(std::string_view name) {
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "silu") return Activation::silu;
  if (name == "elu") return Activation::elu;
  if (name == "softplus") return Activation::softplus;
  if (name == "tanh") return Activation::tanh;
  if (name == "identity") return Activation::identity;
  TORCH_CHECK_VALUE(false, kOp,
                    ": activation: expected one of relu, gelu, silu, elu, softplus, tanh, "
                    "identity, got \"",
                    name, "\"");
}

constexpr ArgumentName kFirstWeight{"weights", 0};

// Layers that fit each other. Independent of the input, so that packing can check alone.
void check_layers(TensorList weights, TensorList biases) {
  PYENS_CHECK_VALUE(!weights.empty(), kOp, "weights", "at least one layer", "an empty list");
  PYENS_CHECK_VALUE(biases.empty() || biases.size() == weights.size(), kOp, "biases",
                    c10::str("one for each of the ", weights.size(), " layers, or none"),
                    biases.size());
  const Tensor& first = weights[0];
  PYENS_CHECK_TYPE(is_kernel_dtype(first.scalar_type()), kOp, kFirstWeight,
                   "float32, float64, bfloat16 or float16", first.scalar_type());
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor& w = weights[l];
    const ArgumentName name{"weights", static_cast<int64_t>(l)};
    check_same_kind(kOp, name, w, kFirstWeight, first);
    PYENS_CHECK_VALUE(w.dim() == 3, kOp, name, "[E, out, in]", "shape ", w.sym_sizes());
    PYENS_CHECK_VALUE(w.sym_size(0) >= 1 && w.sym_size(1) >= 1 && w.sym_size(2) >= 1, kOp, name,
                      "[E, out, in], none of them 0", "shape ", w.sym_sizes());
    PYENS_CHECK_VALUE(w.sym_size(0) == first.sym_size(0), kOp, name,
                      c10::str("the ensemble size of weights[0] (", first.sym_size(0), ")"),
                      "shape ", w.sym_sizes());
    PYENS_CHECK_VALUE(
        l == 0 || w.sym_size(2) == weights[l - 1].sym_size(1), kOp, name,
        c10::str("in = out of weights[", l - 1, "] (", weights[l - 1].sym_size(1), ")"), "shape ",
        w.sym_sizes());
    if (biases.empty()) continue;
    const Tensor& b = biases[l];
    const ArgumentName bias_name{"biases", static_cast<int64_t>(l)};
    check_same_kind(kOp, bias_name, b, kFirstWeight, first);
    PYENS_CHECK_VALUE(
        b.dim() == 2 && b.sym_size(0) == w.sym_size(0) && b.sym_size(1) == w.sym_size(1), kOp,
        bias_name, c10::str("[", w.sym_size(0), ", ", w.sym_size(1), "]"), "shape ", b.sym_sizes());
  }
}

void check_input(const Tensor& input, TensorList weights) {
  check_same_kind(kOp, {"input"}, input, kFirstWeight, weights[0]);
  const auto expected = [&] {
    const auto e = weights[0].sym_size(0), in = weights[0].sym_size(2);
    return c10::str("[B, ", in, "] or [", e, ", B, ", in, "]");
  };
  PYENS_CHECK_VALUE(input.dim() == 2 || input.dim() == 3, kOp, "input", expected(), "shape ",
                    input.sym_sizes());
  PYENS_CHECK_VALUE(input.sym_size(-1) == weights[0].sym_size(2), kOp, "input", expected(),
                    "shape ", input.sym_sizes());
  PYENS_CHECK_VALUE(input.dim() == 2 || input.sym_size(0) == weights[0].sym_size(0), kOp, "input",
                    expected(), "shape ", input.sym_sizes());
}

// A call in the kernel's terms. The tensors outlive it; owns what had to be copied.
struct Problem {
  std::forward_list<Tensor> copies;  // references into it stay valid
  c10::SmallVector<MLPLayer, 8> layers;
  EnsembleMLPParams params{};

  Problem(TensorList weights, TensorList biases) {
    layers.reserve(weights.size());
    for (size_t l = 0; l < weights.size(); ++l) {
      const Tensor& w = with_contiguous_rows(weights[l]);
      MLPLayer layer{};
      layer.weight = w.const_data_ptr();
      layer.out = w.size(1);
      layer.in = w.size(2);
      layer.weight_member_stride = w.stride(0);
      layer.weight_row_stride = w.stride(1);
      if (!biases.empty()) {
        const Tensor& b = with_contiguous_rows(biases[l]);
        layer.bias = b.const_data_ptr();
        layer.bias_member_stride = b.stride(0);
      }
      layers.push_back(layer);
    }
    params.dtype = kernel_dtype(weights[0].scalar_type());
    params.ensemble_size = weights[0].size(0);
    params.num_layers = static_cast<int64_t>(layers.size());
    params.layers = layers.data();
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  void set_input(const Tensor& input) {
    const Tensor& x = with_contiguous_rows(input);
    params.input = x.const_data_ptr();
    params.batch = x.size(-2);
    params.input_row_stride = x.stride(-2);
    params.input_member_stride = x.dim() == 3 && params.ensemble_size > 1 ? x.stride(0) : 0;
  }

 private:
  // All that the kernels need is a contiguous last dimension.
  const Tensor& with_contiguous_rows(const Tensor& tensor) {
    if (tensor.size(-1) <= 1 || tensor.stride(-1) == 1) return tensor;
    return copies.emplace_front(tensor.contiguous());
  }
};

// `size` is TensorBase::size, or sym_size for fake tensors.
template <class Int>
Int packed_bytes_per_member(TensorList weights, Int (at::TensorBase::*size)(int64_t) const) {
  const auto layout = ensemble_mlp_cpu::packed_layout(kernel_dtype(weights[0].scalar_type()));
  Int bytes = 0;
  for (const Tensor& w : weights) bytes += layout.layer_bytes((w.*size)(1), (w.*size)(2));
  return bytes;
}

Tensor run(Problem& problem, const Tensor& input, Activation activation) {
  problem.set_input(input);
  EnsembleMLPParams& params = problem.params;
  params.activation = activation;
  Tensor output =
      at::empty({params.ensemble_size, params.batch, params.layers[params.num_layers - 1].out},
                input.options());
  params.output = output.mutable_data_ptr();
  if (input.is_cuda()) {
    launch_cuda(kOp, input, [&](void* stream) { return ensemble_mlp_cuda::run(params, stream); });
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
                    std::string_view activation) {
  const Activation act = parse_activation(activation);
  check_layers(weights, biases);
  check_input(input, weights);
  Problem problem(weights, biases);
  return run(problem, input, act);
}

Tensor ensemble_mlp_pack(TensorList weights, TensorList biases) {
  check_layers(weights, biases);
  Problem problem(weights, biases);
  const int64_t members = problem.params.ensemble_size;
  const int64_t bytes = packed_bytes_per_member(weights, &at::TensorBase::size);
  Tensor packed = at::empty({members, bytes}, weights[0].options().dtype(at::kByte));
  ensemble_mlp_cpu::pack(problem.params, 0, members, packed.mutable_data_ptr());
  return packed;
}

Tensor ensemble_mlp_packed(const Tensor& input, const Tensor& packed, TensorList weights,
                           TensorList biases, std::string_view activation) {
  const Activation act = parse_activation(activation);
  check_layers(weights, biases);
  check_input(input, weights);
  Problem problem(weights, biases);
  const int64_t members = problem.params.ensemble_size;
  const int64_t bytes = packed_bytes_per_member(weights, &at::TensorBase::size);
  PYENS_CHECK_VALUE(packed.scalar_type() == at::kByte && packed.is_contiguous() &&
                        packed.dim() == 2 && packed.size(0) == members && packed.size(1) == bytes,
                    kOp, "packed",
                    c10::str("what ensemble_mlp_pack makes of these weights (uint8 [", members,
                             ", ", bytes, "])"),
                    packed.scalar_type(), " of shape ", packed.sizes());
  problem.params.packed = packed.const_data_ptr();
  return run(problem, input, act);
}

// --- shapes for fake tensors ---------------------------------------------------------------------

Tensor ensemble_mlp_meta(const Tensor& input, TensorList weights, TensorList biases,
                         std::string_view activation) {
  parse_activation(activation);
  check_layers(weights, biases);
  check_input(input, weights);
  return at::empty_symint({weights[0].sym_size(0), input.sym_size(-2), weights.back().sym_size(1)},
                          input.options());
}

Tensor ensemble_mlp_packed_meta(const Tensor& input, const Tensor& /*packed*/, TensorList weights,
                                TensorList biases, std::string_view activation) {
  return ensemble_mlp_meta(input, weights, biases, activation);
}

Tensor ensemble_mlp_pack_meta(TensorList weights, TensorList biases) {
  check_layers(weights, biases);
  return at::empty_symint(
      {weights[0].sym_size(0), packed_bytes_per_member(weights, &at::TensorBase::sym_size)},
      weights[0].options().dtype(at::kByte));
}

// --- autograd ------------------------------------------------------------------------------------

auto typed_ensemble_mlp() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("pyens::ensemble_mlp", "")
          .typed<Tensor(const Tensor&, TensorList, TensorList, std::string_view)>();
  return op;
}

Tensor activate(const Tensor& z, Activation activation) {
  switch (activation) {
    case Activation::relu: return at::relu(z);
    case Activation::gelu: return at::gelu(z);
    case Activation::silu: return at::silu(z);
    case Activation::elu: return at::elu(z);
    case Activation::softplus: return at::softplus(z);
    case Activation::tanh: return at::tanh(z);
    case Activation::identity: return z;
  }
  return z;
}

// grad * act'(z), given h = act(z) too.
Tensor activate_backward(const Tensor& grad, const Tensor& z, const Tensor& h,
                         Activation activation) {
  switch (activation) {
    case Activation::relu: return at::threshold_backward(grad, z, 0);
    case Activation::gelu: return at::gelu_backward(grad, z);
    case Activation::silu: {  // aten's silu_backward has no derivative
      const Tensor s = at::sigmoid(z);
      return grad * s * (1 + z * (1 - s));
    }
    case Activation::elu: return at::elu_backward(grad, 1, 1, 1, /*is_result=*/false, z);
    case Activation::softplus: return at::softplus_backward(grad, z, 1, 20);
    case Activation::tanh: return at::tanh_backward(grad, h);
    case Activation::identity: return grad;
  }
  return grad;
}

// Composed of differentiable aten operations over recomputed activations, so double backward is
// right too. Nothing of size [E, B, H] outlives the call.
class EnsembleMLPFunction : public torch::autograd::Function<EnsembleMLPFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, TensorList weights,
                        TensorList biases, std::string activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list saved{input};
    saved.insert(saved.end(), weights.begin(), weights.end());
    saved.insert(saved.end(), biases.begin(), biases.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["layers"] = static_cast<int64_t>(weights.size());
    ctx->saved_data["activation"] = activation;
    return typed_ensemble_mlp().call(input, weights, biases, activation);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const auto layers = static_cast<size_t>(ctx->saved_data["layers"].toInt());
    const Activation activation = parse_activation(ctx->saved_data["activation"].toStringRef());
    const bool has_bias = saved.size() > 1 + layers;
    const auto weight = [&](size_t l) { return saved[1 + l]; };
    const Tensor& input = saved[0];
    const bool shared_input = input.dim() == 2;

    // What each layer reads, and what it computed before the activation.
    std::vector<Tensor> h{shared_input ? input.unsqueeze(0) : input}, z;
    for (size_t l = 0; l + 1 < layers; ++l) {
      Tensor product = at::matmul(h[l], weight(l).transpose(1, 2));
      z.push_back(has_bias ? product + saved[1 + layers + l].unsqueeze(1) : product);
      h.push_back(activate(z[l], activation));
    }

    variable_list grads(1 + layers + (has_bias ? layers : 0) + 1);  // the last one: activation
    Tensor grad = grad_outputs[0];
    for (size_t l = layers; l-- > 0;) {
      if (ctx->needs_input_grad(1 + l)) grads[1 + l] = at::matmul(grad.transpose(1, 2), h[l]);
      if (has_bias && ctx->needs_input_grad(1 + layers + l)) grads[1 + layers + l] = grad.sum(1);
      if (l == 0 && !ctx->needs_input_grad(0)) break;
      grad = at::matmul(grad, weight(l));
      if (l > 0) grad = activate_backward(grad, z[l - 1], h[l], activation);
    }
    if (ctx->needs_input_grad(0)) grads[0] = shared_input ? grad.sum(0) : grad;
    return grads;
  }
};

Tensor ensemble_mlp_autograd(const Tensor& input, TensorList weights, TensorList biases,
                             std::string_view activation) {
  return EnsembleMLPFunction::apply(input, weights, biases, std::string(activation));
}

// --- autocast ------------------------------------------------------------------------------------

template <c10::DeviceType device, c10::DispatchKey key>
Tensor ensemble_mlp_autocast(const Tensor& input, TensorList weights, TensorList biases,
                             std::string_view activation) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  return typed_ensemble_mlp().call(at::autocast::cached_cast(type, input, device),
                                   at::autocast::cached_cast(type, weights, device),
                                   at::autocast::cached_cast(type, biases, device), activation);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyens, CPU, m) {
  m.impl("ensemble_mlp", ensemble_mlp);
  m.impl("ensemble_mlp_pack", ensemble_mlp_pack);
  m.impl("ensemble_mlp_packed", ensemble_mlp_packed);
}

// The packed layout is the CPU's.
TORCH_LIBRARY_IMPL(pyens, CUDA, m) { m.impl("ensemble_mlp", ensemble_mlp); }

TORCH_LIBRARY_IMPL(pyens, Meta, m) {
  m.impl("ensemble_mlp", ensemble_mlp_meta);
  m.impl("ensemble_mlp_pack", ensemble_mlp_pack_meta);
  m.impl("ensemble_mlp_packed", ensemble_mlp_packed_meta);
}

TORCH_LIBRARY_IMPL(pyens, Autograd, m) {
  m.impl("ensemble_mlp", ensemble_mlp_autograd);
  m.impl("ensemble_mlp_pack", torch::autograd::autogradNotImplementedFallback());
  m.impl("ensemble_mlp_packed", torch::autograd::autogradNotImplementedFallback());
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
