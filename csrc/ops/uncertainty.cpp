// Predictive uncertainty and moments.
//
//   predictive_uncertainty(logits, from_probabilities, with_votes)   votes: empty unless asked for
//   predictive_moments(outputs, variances)                           aleatoric: empty without variances

#include "ops/torch.h"

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels/uncertainty.h"
#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/operation.h"

namespace pyens {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Uncertainty = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Moments = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr char kUncertaintyOp[] = "predictive_uncertainty";
constexpr char kMomentsOp[] = "predictive_moments";

void check_members(const char* op, const char* argument, const Tensor& members) {
  PYENS_CHECK_TYPE(is_kernel_dtype(members.scalar_type()), op, argument,
                   "float32, float64, bfloat16 or float16", members.scalar_type());
  PYENS_CHECK_VALUE(members.dim() == 2 || members.dim() == 3, op, argument, "[E, B] or [E, B, K]",
                    "shape ", members.sym_sizes());
  PYENS_CHECK_VALUE(members.sym_size(0) >= 1 && (members.dim() == 2 || members.sym_size(2) >= 1),
                    op, argument, "at least one member and one class or output", "shape ",
                    members.sym_sizes());
}

// --- predictive_uncertainty ----------------------------------------------------------------------

Uncertainty allocate_uncertainty(const Tensor& logits, bool with_votes) {
  const auto per_example = [&] { return at::empty_symint({logits.sym_size(1)}, logits.options()); };
  const c10::SymInt classes = logits.dim() == 2 ? c10::SymInt(2) : logits.sym_size(2);
  const auto counts = logits.options().dtype(at::kInt);
  return {at::empty_symint(logits.sym_sizes().slice(1), logits.options()),
          per_example(),
          per_example(),
          per_example(),
          per_example(),
          per_example(),
          with_votes ? at::empty_symint({logits.sym_size(1), classes}, counts)
                     : at::empty({0}, counts)};
}

void check_distributions(const Tensor& members, const std::vector<int64_t>& bad_rows,
                         double tolerance) {
  for (const int64_t bad : bad_rows) {
    if (bad < 0) continue;
    const int64_t m = bad / members.size(1), b = bad % members.size(1);
    const Tensor row = members.select(0, m).select(0, b).to(at::kDouble);
    PYENS_CHECK_VALUE(members.dim() == 3, kUncertaintyOp, "logits", "probabilities in [0, 1]",
                      row.item<double>(), " of member ", m, ", example ", b);
    PYENS_CHECK_VALUE(false, kUncertaintyOp, "logits",
                      c10::str("probabilities >= 0 that sum to 1 within ", tolerance),
                      "a row with sum ", row.sum().item<double>(), " and smallest ",
                      row.min().item<double>(), " (member ", m, ", example ", b, ")");
  }
}

Uncertainty predictive_uncertainty(const Tensor& logits, bool from_probabilities, bool with_votes) {
  check_members(kUncertaintyOp, "logits", logits);
  // All that the kernels need is a contiguous last dimension.
  const bool contiguous = logits.size(-1) <= 1 || logits.stride(-1) == 1;
  const Tensor members = contiguous ? logits : logits.contiguous();
  const Uncertainty result = allocate_uncertainty(members, with_votes);
  const auto& [mean, total, expected, information, pv, disagreement, votes] = result;

  UncertaintyParams p{};
  p.dtype = kernel_dtype(members.scalar_type());
  p.from_probabilities = from_probabilities;
  p.binary = members.dim() == 2;
  p.ensemble_size = members.size(0);
  p.batch = members.size(1);
  p.classes = p.binary ? 2 : members.size(2);
  p.members = members.const_data_ptr();
  p.member_stride = members.stride(0);
  p.row_stride = members.stride(1);
  // A row of 16-bit probabilities is off by a rounding.
  const bool half = members.element_size() == 2;
  p.sum_tolerance = 1e-4 + (!half ? 0 : members.scalar_type() == at::kHalf ? 0x1p-10 : 0x1p-7);
  p.mean_probability = mean.mutable_data_ptr();
  p.predictive_entropy = total.mutable_data_ptr();
  p.expected_entropy = expected.mutable_data_ptr();
  p.mutual_information = information.mutable_data_ptr();
  p.distribution_pv = pv.mutable_data_ptr();
  p.vote_disagreement = disagreement.mutable_data_ptr();
  p.votes = with_votes ? votes.mutable_data_ptr<int32_t>() : nullptr;
  if (members.is_cuda()) {
    launch_cuda(kUncertaintyOp, members, [&](void* stream) {
      const auto bytes = static_cast<int64_t>(uncertainty_cuda::scratch_bytes(p));
      const Tensor scratch = at::empty({bytes}, members.options().dtype(at::kByte));
      return uncertainty_cuda::run(p, scratch.mutable_data_ptr(), stream);
    });
    return result;
  }
  const int64_t items = uncertainty_cpu::work_items(p);
  std::vector<int64_t> bad_rows(static_cast<size_t>(items));
  p.bad_rows = bad_rows.data();
  launch_cpu(items, uncertainty_cpu::grain_size(p), uncertainty_cpu::scratch_bytes(p),
             [&](int64_t begin, int64_t end, void* scratch) {
               uncertainty_cpu::run(p, begin, end, scratch);
             });
  if (from_probabilities) check_distributions(members, bad_rows, p.sum_tolerance);
  return result;
}

Uncertainty predictive_uncertainty_meta(const Tensor& logits, bool /*from_probabilities*/,
                                        bool with_votes) {
  check_members(kUncertaintyOp, "logits", logits);
  return allocate_uncertainty(logits, with_votes);
}

// --- predictive_moments --------------------------------------------------------------------------

void check_moments(const Tensor& outputs, const OptionalTensor& variances) {
  check_members(kMomentsOp, "outputs", outputs);
  if (!variances) return;
  check_same_kind(kMomentsOp, {"variances"}, *variances, {"outputs"}, outputs);
  PYENS_CHECK_VALUE(variances->sym_sizes() == outputs.sym_sizes(), kMomentsOp, "variances",
                    c10::str("the shape of outputs ", outputs.sym_sizes()), "shape ",
                    variances->sym_sizes());
}

Moments allocate_moments(const Tensor& outputs, bool with_variances) {
  const auto empty = [&] {
    return at::empty_symint(outputs.sym_sizes().slice(1), outputs.options());
  };
  return {empty(),
          empty(),
          empty(),
          empty(),
          with_variances ? empty() : at::empty({0}, outputs.options()),
          empty()};
}

// All that the kernels need is that each member is contiguous.
Tensor with_contiguous_members(const Tensor& outputs) {
  return outputs.select(0, 0).is_contiguous() ? outputs : outputs.contiguous();
}

Moments predictive_moments(const Tensor& outputs, const OptionalTensor& variances) {
  check_moments(outputs, variances);
  const Tensor x = with_contiguous_members(outputs);
  const Tensor v = variances ? with_contiguous_members(*variances) : Tensor();
  const Moments result = allocate_moments(x, variances.has_value());
  const auto& [mean, std, min, max, aleatoric, epistemic] = result;
  MomentsParams p{};
  p.dtype = kernel_dtype(x.scalar_type());
  p.ensemble_size = x.size(0);
  p.size = mean.numel();
  p.outputs = x.const_data_ptr();
  p.outputs_stride = x.stride(0);
  if (variances) {
    p.variances = v.const_data_ptr();
    p.variances_stride = v.stride(0);
    p.aleatoric = aleatoric.mutable_data_ptr();
  }
  p.mean = mean.mutable_data_ptr();
  p.std = std.mutable_data_ptr();
  p.min = min.mutable_data_ptr();
  p.max = max.mutable_data_ptr();
  p.epistemic = epistemic.mutable_data_ptr();
  if (x.is_cuda()) {
    launch_cuda(kMomentsOp, x, [&](void* stream) { return uncertainty_cuda::run(p, stream); });
    return result;
  }
  launch_cpu(uncertainty_cpu::work_items(p), uncertainty_cpu::grain_size(p),
             uncertainty_cpu::scratch_bytes(p), [&](int64_t begin, int64_t end, void* scratch) {
               uncertainty_cpu::run(p, begin, end, scratch);
             });
  return result;
}

Moments predictive_moments_meta(const Tensor& outputs, const OptionalTensor& variances) {
  check_moments(outputs, variances);
  return allocate_moments(outputs, variances.has_value());
}

// --- autograd ------------------------------------------------------------------------------------
// The gradients are composed of differentiable aten operations, so double backward is right too.

// a + b, where an undefined tensor is 0.
Tensor added(const Tensor& a, const Tensor& b) {
  return !a.defined() ? b : b.defined() ? a + b : a;
}

Tensor uncertainty_backward(const variable_list& grads, const Tensor& members,
                            bool from_probabilities) {
  const Tensor &g_mean = grads[0], &g_total = grads[1], &g_expected = grads[2];
  const Tensor &g_information = grads[3], &g_pv = grads[4];
  const at::Scalar count(members.sym_size(0));
  const bool binary = members.dim() == 2;

  // Information is total less expected entropy, prediction variation E times that.
  const Tensor information = added(g_information, g_pv.defined() ? g_pv * count : g_pv);
  if (!g_mean.defined() && !g_total.defined() && !g_expected.defined() && !information.defined()) {
    return Tensor();
  }

  // Everything below is [E, B, K], in double as the op itself: log p - log p̄ is as small as the
  // members' disagreement. Logarithms end where the smallest normal number's does: what is below adds
  // nothing to an entropy.
  const auto exact = [](const Tensor& x) { return x.to(at::kDouble); };
  const double tiny = std::numeric_limits<double>::min();
  Tensor z = exact(members);
  // An infinite binary logit is a certain one.
  if (binary && !from_probabilities) z = z.clamp_max(std::numeric_limits<float>::max());
  if (binary) z = at::stack({from_probabilities ? 1 - z : at::zeros_like(z), z}, -1);
  const Tensor log_p = from_probabilities ? z.clamp_min(tiny).log()
                                          : at::log_softmax(z, -1).clamp_min(std::log(tiny));
  const Tensor p = from_probabilities ? z : at::softmax(z, -1);
  Tensor g = at::zeros_like(p);  // d / d p, times E
  if (g_mean.defined()) {
    const Tensor of_mean = exact(g_mean);
    g = g + (binary ? at::stack({at::zeros_like(of_mean), of_mean}, -1) : of_mean);
  }
  if (g_total.defined() || information.defined()) {
    const Tensor log_mean = p.mean(0).clamp_min(tiny).log();
    if (g_total.defined()) g = g - exact(g_total).unsqueeze(-1) * (log_mean + 1);
    if (information.defined()) g = g + exact(information).unsqueeze(-1) * (log_p - log_mean);
  }
  if (g_expected.defined()) g = g - exact(g_expected).unsqueeze(-1) * (log_p + 1);
  g = g / count;
  if (!from_probabilities) g = p * (g - (p * g).sum(-1, /*keepdim=*/true));
  if (binary) {
    const Tensor one = g.select(-1, 1);
    g = from_probabilities ? one - g.select(-1, 0) : one;
  }
  return g.to(members.scalar_type());
}

class PredictiveUncertaintyFunction
    : public torch::autograd::Function<PredictiveUncertaintyFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, bool from_probabilities,
                               bool with_votes) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [mean, total, expected, information, pv, disagreement, votes] =
        call<predictive_uncertainty, kUncertaintyOp>(logits, from_probabilities, with_votes);
    ctx->save_for_backward({logits});
    ctx->saved_data["from_probabilities"] = from_probabilities;
    ctx->mark_non_differentiable({disagreement, votes});
    ctx->set_materialize_grads(false);
    return {mean, total, expected, information, pv, disagreement, votes};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {uncertainty_backward(grads, ctx->get_saved_variables()[0],
                                 ctx->saved_data["from_probabilities"].toBool()),
            Tensor(), Tensor()};
  }
};

Uncertainty predictive_uncertainty_autograd(const Tensor& logits, bool from_probabilities,
                                            bool with_votes) {
  const variable_list r =
      PredictiveUncertaintyFunction::apply(logits, from_probabilities, with_votes);
  return {r[0], r[1], r[2], r[3], r[4], r[5], r[6]};
}

// An extreme that several members share passes its gradient to them in equal parts, as torch.amax.
Tensor extreme_backward(const Tensor& grad, const Tensor& outputs, const Tensor& extreme) {
  const Tensor there = outputs.eq(extreme).to(outputs.scalar_type());
  return grad * there / there.sum(0);
}

// Per element the exponent of the members' largest difference from the first one, 0 where there is none.
Tensor exponent_of_spread(const Tensor& x) {
  at::NoGradGuard constant;
  const Tensor half = (x * 0.5 - x.select(0, 0) * 0.5).abs().amax(0);
  const Tensor exponent = std::get<1>(at::frexp(half));
  return at::where(half.isfinite(), exponent, 0).clamp(-1000, 1000).to(x.scalar_type());
}

class PredictiveMomentsFunction : public torch::autograd::Function<PredictiveMomentsFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& outputs,
                               const OptionalTensor& variances) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [mean, std, min, max, aleatoric, epistemic] =
        call<predictive_moments, kMomentsOp>(outputs, variances);
    ctx->save_for_backward({outputs});
    ctx->saved_data["with_variances"] = variances.has_value();
    ctx->set_materialize_grads(false);
    return {mean, std, min, max, aleatoric, epistemic};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor outputs = ctx->get_saved_variables()[0];
    const at::Scalar count(outputs.sym_size(0)), degrees(outputs.sym_size(0) - 1);
    const Tensor x = outputs.to(at::kDouble);  // in which no square of a float leaves the range
    variable_list g;
    for (const Tensor& grad : grads) g.push_back(grad.defined() ? grad.to(at::kDouble) : grad);
    Tensor gradient, of_variances;
    if (g[0].defined()) gradient = (g[0] / count).expand_as(x);
    if (g[1].defined() || g[5].defined()) {
      // std and deviations near 1, by a power of two, so that those of doubles stay in range too.
      const Tensor exponent =
          outputs.scalar_type() == at::kDouble ? exponent_of_spread(x) : Tensor();
      const Tensor y = exponent.defined() ? at::ldexp(x, -exponent) : x;
      const Tensor difference = y - y.select(0, 0);  // an offset costs no digits
      const Tensor deviation = difference - difference.mean(0);
      if (g[1].defined()) {
        const Tensor std = (deviation.square().sum(0) / degrees).sqrt();
        const Tensor scale = (g[1] / (std * degrees)).masked_fill(std.eq(0), 0);  // as torch.std
        gradient = added(gradient, scale * deviation);
      }
      if (g[5].defined()) {
        const Tensor unscaled = exponent.defined() ? at::ldexp(deviation, exponent) : deviation;
        gradient = added(gradient, g[5] * 2 / count * unscaled);
      }
    }
    if (g[2].defined()) gradient = added(gradient, extreme_backward(g[2], x, x.amin(0)));
    if (g[3].defined()) gradient = added(gradient, extreme_backward(g[3], x, x.amax(0)));
    if (gradient.defined()) gradient = gradient.to(outputs.scalar_type());
    if (ctx->saved_data["with_variances"].toBool() && g[4].defined()) {
      of_variances = (g[4] / count).expand_as(x).to(outputs.scalar_type());
    }
    return {gradient, of_variances};
  }
};

Moments predictive_moments_autograd(const Tensor& outputs, const OptionalTensor& variances) {
  const variable_list r = PredictiveMomentsFunction::apply(outputs, variances);
  return {r[0], r[1], r[2], r[3], r[4], r[5]};
}

// --- autocast ------------------------------------------------------------------------------------

Uncertainty predictive_uncertainty_autocast(const Tensor& logits, bool from_probabilities,
                                            bool with_votes) {
  const Autocast cast(logits);
  return call<predictive_uncertainty, kUncertaintyOp>(cast.float32(logits), from_probabilities,
                                                      with_votes);
}

Moments predictive_moments_autocast(const Tensor& outputs, const OptionalTensor& variances) {
  const Autocast cast(outputs);
  return call<predictive_moments, kMomentsOp>(cast.float32(outputs), cast.float32(variances));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  Operation(m,
            "predictive_uncertainty(Tensor logits, bool from_probabilities, bool with_votes)"
            " -> (Tensor mean_probability, Tensor predictive_entropy, Tensor expected_entropy,"
            " Tensor mutual_information, Tensor distribution_pv, Tensor vote_disagreement,"
            " Tensor votes)")
      .cpu_and_cuda<predictive_uncertainty>()
      .meta<predictive_uncertainty_meta>()
      .autograd<predictive_uncertainty_autograd>()
      .autocast<predictive_uncertainty_autocast>();
  Operation(m,
            "predictive_moments(Tensor outputs, Tensor? variances) -> (Tensor mean, Tensor std,"
            " Tensor min, Tensor max, Tensor aleatoric, Tensor epistemic)")
      .cpu_and_cuda<predictive_moments>()
      .meta<predictive_moments_meta>()
      .autograd<predictive_moments_autograd>()
      .autocast<predictive_moments_autocast>();
}

}  // namespace pyens
