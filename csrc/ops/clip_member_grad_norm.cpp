// Scales each member's gradients where their norm is too large, in place, on the CPU:
//
//   clip_member_grad_norm_(gradients, max_norm, norm_type, error_if_nonfinite) -> norms [E]
//
// Its only caller is pyens.optim.clip_member_grad_norm_, which does it with torch's operations elsewhere.

#include "ops/torch.h"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <vector>

#include "kernels/clip_member_grad_norm.h"
#include "ops/checks.h"
#include "ops/in_place.h"
#include "ops/launch.h"
#include "ops/operation.h"

namespace pyens {
namespace {

namespace kernel = clip_member_grad_norm_cpu;
using at::Tensor;
using at::TensorList;

constexpr char kOp[] = "clip_member_grad_norm_";

// The dispatcher refuses a list of none.
void check(TensorList gradients, double norm_type) {
  PYENS_CHECK_VALUE(norm_type == 1 || norm_type == 2 || norm_type == HUGE_VAL, kOp, "norm_type",
                    "1, 2 or inf", norm_type);
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Tensor &g = gradients[i], &first = gradients[0];
    const ArgumentName name{"gradients", static_cast<int64_t>(i)};
    PYENS_CHECK_TYPE(is_kernel_dtype(g.scalar_type()), kOp, name,
                     "float32, float64, bfloat16 or float16", g.scalar_type());
    PYENS_CHECK_TYPE(g.device() == first.device(), kOp, name,
                     c10::str("the device of gradients[0] (", first.device(), ")"), g.device());
    PYENS_CHECK_VALUE(g.dim() > 0 && g.sym_size(0) == first.sym_size(0), kOp, name,
                      "[E, ...], E as of gradients[0]", "shape ", g.sym_sizes());
  }
}

// The gradients' type, float32 at least.
at::ScalarType norms_type(TensorList gradients) {
  const bool any_double = std::any_of(gradients.begin(), gradients.end(), [](const Tensor& g) {
    return g.scalar_type() == at::kDouble;
  });
  return any_double ? at::kDouble : at::kFloat;
}

void check_finite(const double* norms, int64_t members) {
  std::ostringstream got, of;
  for (int64_t m = 0; m < members; ++m) {
    if (std::isfinite(norms[m])) continue;
    const char* const comma = got.tellp() > 0 ? ", " : "";
    got << comma << (std::isnan(norms[m]) ? "nan" : "inf");
    of << comma << m;
  }
  TORCH_CHECK(got.tellp() == 0, kOp, ": expected finite norms, got [", got.str(), "] for members [",
              of.str(), "]");
}

Tensor clip_member_grad_norm_(TensorList gradients, double max_norm, double norm_type,
                              bool error_if_nonfinite) {
  check(gradients, norm_type);
  const at::AutoDispatchBelowADInplaceOrView no_graph;
  ClipParams p{};
  p.members = gradients[0].size(0);
  p.norm = norm_type == 1 ? Norm::one : norm_type == 2 ? Norm::two : Norm::largest;
  p.max_norm = max_norm;
  InPlace in_place;
  std::vector<ClipTensor> tensors(gradients.size());
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Tensor& g = gradients[i];
    const int64_t size = p.members == 0 ? 0 : g.numel() / p.members;
    const int64_t before =
        i == 0 ? 0 : tensors[i - 1].first_part + kernel::parts_of(tensors[i - 1].size);
    tensors[i] = {kernel_dtype(g.scalar_type()), size, before, in_place.memory(g, true)};
  }
  p.tensors = tensors.data();
  p.count = static_cast<int64_t>(tensors.size());
  const int64_t parts = p.members * kernel::parts_of_member(p);
  std::vector<ClipPart> part(static_cast<size_t>(parts));
  p.parts = part.data();
  const Tensor norms = at::empty({p.members}, gradients[0].options().dtype(at::kDouble));
  p.norms = norms.mutable_data_ptr<double>();

  const auto run = [&](auto* function, int64_t items, int64_t grain_size) {
    launch_cpu(items, grain_size, 0,
               [&](int64_t begin, int64_t end, void* /*scratch*/) { function(p, begin, end); });
  };
  // Gradients on the same memory are scaled one after the other, as torch does.
  const bool alone = !in_place.overlaps();
  // Each member is scaled out of the cache, where threads have several of them; else threads share members.
  if (alone && !error_if_nonfinite && p.members >= 4 * at::get_num_threads()) {
    run(kernel::clip, p.members, kernel::grain_size(p, p.members));
  } else {
    const int64_t grain_size = kernel::grain_size(p, parts);
    run(kernel::measure, parts, grain_size);
    kernel::add_up(p, 0, p.members);
    if (error_if_nonfinite) check_finite(p.norms, p.members);
    run(kernel::scale, parts, alone ? grain_size : parts);
  }
  in_place.done();
  return norms.to(norms_type(gradients));
}

Tensor clip_member_grad_norm_meta(TensorList gradients, double /*max_norm*/, double norm_type,
                                  bool /*error_if_nonfinite*/) {
  check(gradients, norm_type);
  return at::empty_symint({gradients[0].sym_size(0)},
                          gradients[0].options().dtype(norms_type(gradients)));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  Operation(m,
            "clip_member_grad_norm_(Tensor(a!)[] gradients, float max_norm, float norm_type,"
            " bool error_if_nonfinite) -> Tensor")
      .cpu<clip_member_grad_norm_>()
      .meta<clip_member_grad_norm_meta>()
      .in_place();
}

}  // namespace pyens
