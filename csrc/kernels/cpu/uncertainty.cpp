// Chooses the instruction set and the element type of predictive uncertainty and moments; the work
// is in uncertainty-inl.h.

#include "kernels/uncertainty.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/cpu/isa.h"

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

#define PYENS_BY_DTYPE(isa, functions)                                         \
  switch (dtype) {                                                             \
    case DType::float64: return isa::uncertainty::functions<double, double>;   \
    case DType::float16: return isa::uncertainty::functions<Float16, float>;   \
    case DType::bfloat16: return isa::uncertainty::functions<BFloat16, float>; \
    default: return isa::uncertainty::functions<float, float>;                 \
  }
#if defined(__x86_64__)
#define PYENS_BY_ISA(functions)                         \
  switch (chosen_isa()) {                               \
    case Isa::avx512_bf16:                              \
    case Isa::avx512: PYENS_BY_DTYPE(avx512, functions) \
    case Isa::avx2: PYENS_BY_DTYPE(avx2, functions)     \
    default: PYENS_BY_DTYPE(base, functions)            \
  }
#else
#define PYENS_BY_ISA(functions) PYENS_BY_DTYPE(base, functions)
#endif

const UncertaintyFunctions& uncertainty_functions(DType dtype) { PYENS_BY_ISA(kUncertainty) }
const MomentsFunctions& moments_functions(DType dtype){PYENS_BY_ISA(kMoments)}
#undef PYENS_BY_ISA
#undef PYENS_BY_DTYPE

// Waking a thread costs some microseconds; `numbers` of the members take as long.
int64_t items_worth_a_thread(double numbers, double total, int64_t work_items) {
  const double items = static_cast<double>(std::max<int64_t>(work_items, 1));
  const double per_item = std::max(total / items, 1.0);
  return std::max<int64_t>(1, static_cast<int64_t>(std::min(items, numbers / per_item)));
}

}  // namespace

namespace uncertainty_cpu {

int64_t work_items(const UncertaintyParams& p) {
  return uncertainty_functions(p.dtype).work_items(p);
}

int64_t grain_size(const UncertaintyParams& p) {
  const double total = static_cast<double>(p.ensemble_size * p.batch * p.classes);
  return items_worth_a_thread(3e3, total, work_items(p));
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
  return items_worth_a_thread(16e3, total, work_items(p));
}

size_t scratch_bytes(const MomentsParams& p) { return moments_functions(p.dtype).scratch_bytes(p); }

void run(const MomentsParams& p, int64_t begin, int64_t end, void* scratch) {
  moments_functions(p.dtype).run(p, begin, end, scratch);
}

}  // namespace uncertainty_cpu
}  // namespace pyens
