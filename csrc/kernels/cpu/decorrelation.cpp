// Chooses the instruction set and the element type of the decorrelation loss; the work is in
// decorrelation-inl.h.

#include "kernels/decorrelation.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/cpu/isa.h"

namespace pyens {
namespace {

struct DecorrelationFunctions {
  int64_t (*work_items)(const DecorrelationParams&);
  size_t (*scratch_bytes)(const DecorrelationParams&);
  int64_t (*partials_size)(const DecorrelationParams&);
  void (*prepare)(const DecorrelationParams&);
  void (*run)(const DecorrelationParams&, int64_t begin, int64_t end, void* scratch);
  void (*finish)(const DecorrelationParams&);
  void (*run_backward)(const DecorrelationParams&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace
}  // namespace pyens

#define PYENS_KERNEL_SOURCE "kernels/cpu/decorrelation-inl.h"
#include "kernels/cpu/foreach_isa.h"

namespace pyens {
namespace {

const DecorrelationFunctions& functions(DType dtype) {
#define PYENS_BY_DTYPE(isa)                                                       \
  switch (dtype) {                                                                \
    case DType::float64: return isa::decorrelation::kFunctions<double, double>;   \
    case DType::float16: return isa::decorrelation::kFunctions<Float16, float>;   \
    case DType::bfloat16: return isa::decorrelation::kFunctions<BFloat16, float>; \
    default: return isa::decorrelation::kFunctions<float, float>;                 \
  }
  switch (chosen_isa()) {
#if defined(__x86_64__)
    case Isa::avx512_bf16:
    case Isa::avx512: PYENS_BY_DTYPE(avx512)
    case Isa::avx2: PYENS_BY_DTYPE(avx2)
#endif
    default: PYENS_BY_DTYPE(base)
  }
#undef PYENS_BY_DTYPE
}

}  // namespace

namespace decorrelation_cpu {

int64_t work_items(const DecorrelationParams& p) { return functions(p.dtype).work_items(p); }

int64_t grain_size(const DecorrelationParams& p) {
  // Waking a thread costs some microseconds, about this many multiply-adds.
  constexpr double kWorthAThread = 50e3;
  const double items = static_cast<double>(std::max<int64_t>(work_items(p), 1));
  const double components = static_cast<double>(p.components);
  const double elements = static_cast<double>(p.models * p.batch * p.labels) * components;
  const double per_item = std::max(elements * (components / 2 + 4) / items, 1.0);
  return std::max<int64_t>(1, static_cast<int64_t>(std::min(items, kWorthAThread / per_item)));
}

size_t scratch_bytes(const DecorrelationParams& p) { return functions(p.dtype).scratch_bytes(p); }

int64_t partials_size(const DecorrelationParams& p) { return functions(p.dtype).partials_size(p); }

void prepare(const DecorrelationParams& p) { functions(p.dtype).prepare(p); }

void run(const DecorrelationParams& p, int64_t begin, int64_t end, void* scratch) {
  functions(p.dtype).run(p, begin, end, scratch);
}

void finish(const DecorrelationParams& p) { functions(p.dtype).finish(p); }

void run_backward(const DecorrelationParams& p, int64_t begin, int64_t end, void* scratch) {
  functions(p.dtype).run_backward(p, begin, end, scratch);
}

}  // namespace decorrelation_cpu
}  // namespace pyens
