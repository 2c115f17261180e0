// Chooses the instruction set of the convolution on weights in bytes; the work is in ensemble_conv2d_int8-inl.h.

#include "kernels/ensemble_conv2d.h"

#include "kernels/cpu/choose.h"

namespace pyens {
namespace {

struct Functions {
  int64_t (*work_items)(const EnsembleConv2dParams&);
  size_t (*scratch_bytes)(const EnsembleConv2dParams&);
  void (*run)(const EnsembleConv2dParams&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace
}  // namespace pyens

#define PYENS_KERNEL_SOURCE "kernels/cpu/ensemble_conv2d_int8-inl.h"
#define PYENS_KERNEL_VNNI
#include "kernels/cpu/foreach_isa.h"

namespace pyens {
namespace {

const Functions& functions() {
  static const Chosen<Functions> chosen{PYENS_INT8_VARIANTS(ensemble_conv2d, kFunctions)};
  return chosen[DType::float32];
}

}  // namespace

namespace ensemble_conv2d_int8_cpu {

int64_t work_items(const EnsembleConv2dParams& p) { return functions().work_items(p); }

int64_t grain_size(const EnsembleConv2dParams& p) {
  const double total = static_cast<double>(p.ensemble_size * p.batch) * p.conv.multiply_adds();
  return items_worth_a_thread(2 * kMultiplyAddsWorthAThread, total, work_items(p));
}

size_t scratch_bytes(const EnsembleConv2dParams& p) { return functions().scratch_bytes(p); }

void run(const EnsembleConv2dParams& p, int64_t begin, int64_t end, void* scratch) {
  functions().run(p, begin, end, scratch);
}

}  // namespace ensemble_conv2d_int8_cpu
}  // namespace pyens
