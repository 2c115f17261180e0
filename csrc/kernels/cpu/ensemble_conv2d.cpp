// Chooses the instruction set and the element type of the convolution; the work is in ensemble_conv2d-inl.h and
// ensemble_conv2d_gradients-inl.h.

#include "kernels/ensemble_conv2d.h"

#include "kernels/cpu/choose.h"

namespace pyens {
namespace {

struct Functions {
  int64_t (*work_items)(const EnsembleConv2dParams&);
  size_t (*scratch_bytes)(const EnsembleConv2dParams&);
  void (*run)(const EnsembleConv2dParams&, int64_t begin, int64_t end, void* scratch);
  ensemble_conv2d_cpu::BackwardPlan (*plan_backward)(const EnsembleConv2dParams&,
                                                     const EnsembleConv2dGradients&);
  void (*run_backward)(const EnsembleConv2dParams&, const EnsembleConv2dGradients&, int64_t begin,
                       int64_t end, void* scratch);
  void (*finish_backward)(const EnsembleConv2dParams&, const EnsembleConv2dGradients&,
                          int64_t begin, int64_t end);
};

}  // namespace
}  // namespace pyens

#define PYENS_KERNEL_SOURCE "kernels/cpu/ensemble_conv2d_gradients-inl.h"
#include "kernels/cpu/foreach_isa.h"

namespace pyens {
namespace {

const Functions& functions(DType dtype) {
  static const Chosen<Functions> chosen{PYENS_VARIANTS(ensemble_conv2d, kFunctions)};
  return chosen[dtype];
}

double multiply_adds(const EnsembleConv2dParams& p) {
  return static_cast<double>(p.ensemble_size * p.batch) * p.conv.multiply_adds();
}

}  // namespace

namespace ensemble_conv2d_cpu {

int64_t work_items(const EnsembleConv2dParams& p) { return functions(p.dtype).work_items(p); }

int64_t grain_size(const EnsembleConv2dParams& p) {
  return items_worth_a_thread(kMultiplyAddsWorthAThread, multiply_adds(p), work_items(p));
}

size_t scratch_bytes(const EnsembleConv2dParams& p) { return functions(p.dtype).scratch_bytes(p); }

void run(const EnsembleConv2dParams& p, int64_t begin, int64_t end, void* scratch) {
  functions(p.dtype).run(p, begin, end, scratch);
}

BackwardPlan plan_backward(const EnsembleConv2dParams& p, const EnsembleConv2dGradients& g) {
  BackwardPlan plan = functions(p.dtype).plan_backward(p, g);
  plan.grain_size =
      items_worth_a_thread(kMultiplyAddsWorthAThread, 2 * multiply_adds(p), plan.items);
  return plan;
}

void run_backward(const EnsembleConv2dParams& p, const EnsembleConv2dGradients& g, int64_t begin,
                  int64_t end, void* scratch) {
  functions(p.dtype).run_backward(p, g, begin, end, scratch);
}

void finish_backward(const EnsembleConv2dParams& p, const EnsembleConv2dGradients& g, int64_t begin,
                     int64_t end) {
  functions(p.dtype).finish_backward(p, g, begin, end);
}

}  // namespace ensemble_conv2d_cpu
}  // namespace pyens
