// The decorrelation loss.
//
//   decorrelation_loss(outputs, kind, reduction)           the loss
//   decorrelation_loss_forward(outputs, kind, reduction)   and what the backward reads
//   decorrelation_loss_backward(grad, outputs, correlations, centre, kind, reduction)

#include "ops/torch.h"

#include <string_view>
#include <tuple>

#include "kernels/decorrelation.h"
#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/operation.h"

namespace pyens {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kOp[] = "decorrelation_loss";
constexpr char kForward[] = "decorrelation_loss_forward";
constexpr char kBackward[] = "decorrelation_loss_backward";

DecorrelationKind parse_kind(std::string_view kind) {
  if (kind == "correlation") return DecorrelationKind::correlation;
  if (kind == "covariance") return DecorrelationKind::covariance;
  if (kind == "residue") return DecorrelationKind::residue;
  TORCH_CHECK_VALUE(false, kOp, ": kind: expected correlation, covariance or residue, got \"", kind,
                    "\"");
}

bool parse_sums_labels(std::string_view reduction) {
  if (reduction == "sum") return true;
  if (reduction == "none") return false;
  TORCH_CHECK_VALUE(false, kOp, ": reduction: expected sum or none, got \"", reduction, "\"");
}

void check_outputs(const Tensor& outputs) {
  PYENS_CHECK_TYPE(is_kernel_dtype(outputs.scalar_type()), kOp, "outputs",
                   "float32, float64, bfloat16 or float16", outputs.scalar_type());
  const int64_t dim = outputs.dim();
  PYENS_CHECK_VALUE(dim >= 2 && dim <= 4, kOp, "outputs", "[J, B], [J, B, K] or [M, J, B, K]",
                    "shape ", outputs.sym_sizes());
  PYENS_CHECK_VALUE(
      outputs.sym_size(dim == 4 ? 1 : 0) >= 1 && (dim == 2 || outputs.sym_size(-1) >= 1), kOp,
      "outputs", "at least one component and one label", "shape ", outputs.sym_sizes());
}

// [M, J, B, K] of outputs with or without M and K.
struct Sizes {
  c10::SymInt models, components, batch, labels;
  explicit Sizes(const Tensor& outputs) {
    const int64_t dim = outputs.dim(), j = dim == 4 ? 1 : 0;
    models = dim == 4 ? outputs.sym_size(0) : 1;
    components = outputs.sym_size(j);
    batch = outputs.sym_size(j + 1);
    labels = dim == 2 ? 1 : outputs.sym_size(-1);
  }
};

c10::SymDimVector loss_shape(const Tensor& outputs, bool sum_labels) {
  c10::SymDimVector shape;
  if (outputs.dim() == 4) shape.push_back(outputs.sym_size(0));
  if (outputs.dim() >= 3 && !sum_labels) shape.push_back(outputs.sym_size(-1));
  return shape;
}

struct Forward {
  Tensor loss, correlations, centre;
};

// Uninitialised results; the loss in the type of accumulation.
Forward allocate(const Tensor& outputs, DecorrelationKind kind, bool sum_labels) {
  const Sizes s(outputs);
  const auto options = outputs.options().dtype(accumulation_type(outputs.scalar_type()));
  const bool centred = kind == DecorrelationKind::covariance;
  return {at::empty_symint(loss_shape(outputs, sum_labels), options),
          at::empty_symint({s.models, s.labels, s.components, s.components}, options),
          centred ? at::empty_symint({2, s.models, s.components, s.labels}, options)
                  : at::empty({0}, options)};
}

// All that the kernels need is that [B, K] is contiguous.
Tensor with_contiguous_components(const Tensor& outputs) {
  const int64_t labels = outputs.dim() == 2 ? 1 : outputs.size(-1);
  const int64_t example = outputs.dim() == 2 ? -1 : -2;
  const bool contiguous = (labels == 1 || outputs.stride(-1) == 1) &&
                          (outputs.size(example) <= 1 || outputs.stride(example) == labels);
  return contiguous ? outputs : outputs.contiguous();
}

DecorrelationParams make_params(const Tensor& outputs, DecorrelationKind kind, bool sum_labels) {
  const int64_t dim = outputs.dim(), j = dim == 4 ? 1 : 0;
  DecorrelationParams p{};
  p.dtype = kernel_dtype(outputs.scalar_type());
  p.kind = kind;
  p.sum_labels = sum_labels;
  p.models = dim == 4 ? outputs.size(0) : 1;
  p.components = outputs.size(j);
  p.batch = outputs.size(j + 1);
  p.labels = dim == 2 ? 1 : outputs.size(-1);
  p.outputs = outputs.const_data_ptr();
  p.model_stride = dim == 4 ? outputs.stride(0) : 0;
  p.component_stride = outputs.stride(j);
  return p;
}

std::tuple<Tensor, Tensor, Tensor> decorrelation_loss_forward(const Tensor& outputs,
                                                              std::string_view kind,
                                                              std::string_view reduction) {
  const DecorrelationKind parsed = parse_kind(kind);
  const bool sum_labels = parse_sums_labels(reduction);
  check_outputs(outputs);
  const Tensor z = with_contiguous_components(outputs);
  const Forward result = allocate(z, parsed, sum_labels);
  DecorrelationParams p = make_params(z, parsed, sum_labels);
  p.loss = result.loss.mutable_data_ptr();
  p.correlations = result.correlations.mutable_data_ptr();
  p.centre = result.centre.mutable_data_ptr();
  if (z.is_cuda()) {
    launch_cuda(kOp, z, [&](void* stream) {
      const auto bytes = static_cast<int64_t>(decorrelation_cuda::scratch_bytes(p));
      const Tensor scratch = at::empty({bytes}, z.options().dtype(at::kByte));
      return decorrelation_cuda::run(p, scratch.mutable_data_ptr(), stream);
    });
    return {result.loss.to(outputs.scalar_type()), result.correlations, result.centre};
  }
  const Tensor partials =
      at::empty({decorrelation_cpu::partials_size(p)}, result.correlations.options());
  p.partials = partials.mutable_data_ptr();
  decorrelation_cpu::prepare(p);
  launch_cpu(decorrelation_cpu::work_items(p), decorrelation_cpu::grain_size(p),
             decorrelation_cpu::scratch_bytes(p), [&](int64_t begin, int64_t end, void* scratch) {
               decorrelation_cpu::run(p, begin, end, scratch);
             });
  decorrelation_cpu::finish(p);
  return {result.loss.to(outputs.scalar_type()), result.correlations, result.centre};
}

Tensor decorrelation_loss(const Tensor& outputs, std::string_view kind,
                          std::string_view reduction) {
  return std::get<0>(decorrelation_loss_forward(outputs, kind, reduction));
}

void check_backward(const Tensor& grad, const Tensor& outputs, const Tensor& correlations,
                    const Tensor& centre, DecorrelationKind kind, bool sum_labels) {
  check_outputs(outputs);
  check_same_kind(kOp, {"grad"}, grad, {"outputs"}, outputs);
  const auto expected = loss_shape(outputs, sum_labels);
  PYENS_CHECK_VALUE(grad.sym_sizes() == c10::SymIntArrayRef(expected), kOp, "grad",
                    c10::str("the shape of the loss ", c10::SymIntArrayRef(expected)), "shape ",
                    grad.sym_sizes());
  const Sizes s(outputs);
  const at::ScalarType type = accumulation_type(outputs.scalar_type());
  const c10::SymInt saved = s.models * s.labels * s.components;
  PYENS_CHECK_VALUE(correlations.scalar_type() == type && correlations.is_contiguous() &&
                        correlations.sym_numel() == saved * s.components,
                    kOp, "correlations", "what decorrelation_loss_forward returns",
                    correlations.scalar_type(), " of shape ", correlations.sym_sizes());
  PYENS_CHECK_VALUE(
      centre.scalar_type() == type && centre.is_contiguous() &&
          centre.sym_numel() == (kind == DecorrelationKind::covariance ? saved * 2 : 0),
      kOp, "centre", "what decorrelation_loss_forward returns", centre.scalar_type(), " of shape ",
      centre.sym_sizes());
}

Tensor decorrelation_loss_backward(const Tensor& grad, const Tensor& outputs,
                                   const Tensor& correlations, const Tensor& centre,
                                   std::string_view kind, std::string_view reduction) {
  const DecorrelationKind parsed = parse_kind(kind);
  const bool sum_labels = parse_sums_labels(reduction);
  check_backward(grad, outputs, correlations, centre, parsed, sum_labels);
  const Tensor z = with_contiguous_components(outputs);
  DecorrelationParams p = make_params(z, parsed, sum_labels);
  // One component has a loss of 0 whatever it is: 0 times a NaN would not be.
  if (p.components == 1) return at::zeros(outputs.sizes(), outputs.options());
  const Tensor grad_loss = grad.to(accumulation_type(outputs.scalar_type())).contiguous();
  const Tensor grad_outputs = empty_result(outputs.sizes(), outputs.options());
  p.grad_loss = grad_loss.const_data_ptr();
  p.correlations = const_cast<void*>(correlations.const_data_ptr());
  p.centre = const_cast<void*>(centre.const_data_ptr());
  p.grad_outputs = grad_outputs.mutable_data_ptr();
  if (z.is_cuda()) {
    launch_cuda(kOp, z, [&](void* stream) {
      const auto bytes = static_cast<int64_t>(decorrelation_cuda::backward_scratch_bytes(p));
      const Tensor scratch = at::empty({bytes}, z.options().dtype(at::kByte));
      return decorrelation_cuda::run_backward(p, scratch.mutable_data_ptr(), stream);
    });
    return grad_outputs;
  }
  launch_cpu(decorrelation_cpu::work_items(p), decorrelation_cpu::grain_size(p),
             decorrelation_cpu::scratch_bytes(p), [&](int64_t begin, int64_t end, void* scratch) {
               decorrelation_cpu::run_backward(p, begin, end, scratch);
             });
  return grad_outputs;
}

// --- shapes for fake tensors ---------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> decorrelation_loss_forward_meta(const Tensor& outputs,
                                                                   std::string_view kind,
                                                                   std::string_view reduction) {
  const DecorrelationKind parsed = parse_kind(kind);
  const bool sum_labels = parse_sums_labels(reduction);
  check_outputs(outputs);
  Forward result = allocate(outputs, parsed, sum_labels);
  return {result.loss.to(outputs.scalar_type()), result.correlations, result.centre};
}

Tensor decorrelation_loss_meta(const Tensor& outputs, std::string_view kind,
                               std::string_view reduction) {
  return std::get<0>(decorrelation_loss_forward_meta(outputs, kind, reduction));
}

Tensor decorrelation_loss_backward_meta(const Tensor& grad, const Tensor& outputs,
                                        const Tensor& correlations, const Tensor& centre,
                                        std::string_view kind, std::string_view reduction) {
  check_backward(grad, outputs, correlations, centre, parse_kind(kind),
                 parse_sums_labels(reduction));
  return at::empty_symint(outputs.sym_sizes(), outputs.options());
}

// --- autograd ------------------------------------------------------------------------------------

// The gradient of differentiable aten operations, for gradients of gradients.
Tensor composed_backward(const Tensor& grad, const Tensor& outputs, DecorrelationKind kind,
                         bool sum_labels) {
  if (Sizes(outputs).components == 1) return at::zeros_like(outputs);
  const bool one_label = outputs.dim() == 2;
  const bool covariance = kind == DecorrelationKind::covariance;
  const bool residue = kind == DecorrelationKind::residue;
  Tensor z = outputs.to(accumulation_type(outputs.scalar_type()));
  z = (one_label ? z.unsqueeze(-1) : z).movedim(-1, -3);  // [.., K, J, B]
  if (covariance) z = z - z.mean(-1, /*keepdim=*/true);
  if (residue) z = z - z.mean(-2, /*keepdim=*/true);
  const at::Scalar batch(z.sym_size(-1));
  const Tensor c = at::matmul(z, z.transpose(-1, -2)) / batch;  // [.., K, J, J]
  const Tensor diagonal = at::ones_like(c, c.options().dtype(at::kBool)).tril().triu();
  Tensor g = grad.to(c.scalar_type());
  if (one_label || sum_labels) g = g.unsqueeze(-1);
  g = g.unsqueeze(-1).unsqueeze(-1);  // [.., K or 1, 1, 1]
  Tensor gradient = at::matmul(c.masked_fill(diagonal, 0) * (g * 2 / batch), z);
  if (covariance) gradient = gradient - gradient.mean(-1, /*keepdim=*/true);
  if (residue) gradient = gradient - gradient.mean(-2, /*keepdim=*/true);
  gradient = gradient.movedim(-3, -1);
  return (one_label ? gradient.squeeze(-1) : gradient).to(outputs.scalar_type());
}

class DecorrelationLossFunction : public torch::autograd::Function<DecorrelationLossFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& outputs, std::string kind,
                        std::string reduction) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, correlations, centre] =
        call<decorrelation_loss_forward, kForward>(outputs, kind, reduction);
    ctx->save_for_backward({outputs, correlations, centre});
    ctx->saved_data["kind"] = kind;
    ctx->saved_data["reduction"] = reduction;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const std::string kind = ctx->saved_data["kind"].toStringRef();
    const std::string reduction = ctx->saved_data["reduction"].toStringRef();
    if (at::GradMode::is_enabled()) {  // create_graph
      return {composed_backward(grads[0], saved[0], parse_kind(kind), parse_sums_labels(reduction)),
              Tensor(), Tensor()};
    }
    return {call<decorrelation_loss_backward, kBackward>(grads[0], saved[0], saved[1], saved[2],
                                                         kind, reduction),
            Tensor(), Tensor()};
  }
};

Tensor decorrelation_loss_autograd(const Tensor& outputs, std::string_view kind,
                                   std::string_view reduction) {
  return DecorrelationLossFunction::apply(outputs, std::string(kind), std::string(reduction));
}

Tensor decorrelation_loss_autocast(const Tensor& outputs, std::string_view kind,
                                   std::string_view reduction) {
  const Autocast cast(outputs);
  return call<decorrelation_loss, kOp>(cast.float32(outputs), kind, reduction);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  Operation(m, "decorrelation_loss(Tensor outputs, str kind, str reduction) -> Tensor")
      .cpu_and_cuda<decorrelation_loss>()
      .meta<decorrelation_loss_meta>()
      .autograd<decorrelation_loss_autograd>()
      .autocast<decorrelation_loss_autocast>();
  Operation(m,
            "decorrelation_loss_forward(Tensor outputs, str kind, str reduction)"
            " -> (Tensor loss, Tensor correlations, Tensor centre)")
      .cpu_and_cuda<decorrelation_loss_forward>()
      .meta<decorrelation_loss_forward_meta>()
      .not_differentiable();
  Operation(m,
            "decorrelation_loss_backward(Tensor grad, Tensor outputs, Tensor correlations,"
            " Tensor centre, str kind, str reduction) -> Tensor")
      .cpu_and_cuda<decorrelation_loss_backward>()
      .meta<decorrelation_loss_backward_meta>()
      .not_differentiable();
}

}  // namespace pyens
