// Chooses the instruction set and the element type of predictive uncertainty and moments; the work
// is in uncertainty-inl.h.

#include "kernels/uncertainty.h"

#include "kernels/cpu/choose.h"

namespace pyens {
namespace {

struct UncertaintyFunctions {
  int64_t (*work_items)(const UncertaintyParams&);
  size_t (*scratch_bytes)(const UncertaintyParams&);
  void (*run)(const UncertaintyParams&, int64_t begin, int64_t end, void* scratch);
};

struct MomentsFunctions {
  int64_t (*work_items)(const MomentsParams&);
  size_t (*scratch_bytes)(const MomentsParams&);
  void (*run)(const MomentsParams&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace
}  // namespace pyens

#define PYENS_KERNEL_SOURCE "kernels/cpu/uncertainty-inl.h"
#include "kernels/cpu/foreach_isa.h"

namespace pyens {
namespace {

const UncertaintyFunctions& uncertainty_functions(DType dtype) {
  static const Chosen<UncertaintyFunctions> chosen{PYENS_VARIANTS(uncertainty, kUncertainty)};
  return chosen[dtype];
}

const MomentsFunctions& moments_functions(DType dtype) {
  static const Chosen<MomentsFunctions> chosen{PYENS_VARIANTS(uncertainty, kMoments)};
  return chosen[dtype];
}

// Numbers of the members that take as long as waking a thread.
constexpr double kLogitsWorthAThread = 3e3, kNumbersWorthAThread = 16e3;

}  // namespace

namespace uncertainty_cpu {

int64_t work_items(const UncertaintyParams& p) {
  return uncertainty_functions(p.dtype).work_items(p);
}

int64_t grain_size(const UncertaintyParams& p) {
  const double total = static_cast<double>(p.ensemble_size * p.batch * p.classes);
  return items_worth_a_thread(kLogitsWorthAThread, total, work_items(p));
}

size_t scratch_bytes(const UncertaintyParams& p) {
  return uncertainty_functions(p.dtype).scratch_bytes(p);
}

void run(const UncertaintyParams& p, int64_t begin, int64_t end, void* scratch) {
  uncertainty_functions(p.dtype).run(p, begin, end, scratch);
}

int64_t work_items(const MomentsParams& p) { return moments_functions(p.dtype).work_items(p); }

int64_t grain_size(const MomentsParams& p) {
  const double total = static_cast<double>(p.ensemble_size * p.size);
  return items_worth_a_thread(kNumbersWorthAThread, total, work_items(p));
}

size_t scratch_bytes(const MomentsParams& p) { return moments_functions(p.dtype).scratch_bytes(p); }

void run(const MomentsParams& p, int64_t begin, int64_t end, void* scratch) {
  moments_functions(p.dtype).run(p, begin, end, scratch);
}

}  // namespace uncertainty_cpu
}  // namespace pyens
