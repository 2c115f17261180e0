// Chooses the instruction set and the element type of a training pass; the work is in
// ensemble_mlp_training-inl.h.
//
// bfloat16 is widened to float32 on every processor: gradients need its range and precision, and
// only the weights and inputs come in bfloat16.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/cpu/isa.h"
#include "kernels/dropout.h"
#include "kernels/ensemble_mlp.h"

namespace pyens {
namespace {

struct TrainingFunctions {
  ensemble_mlp_cpu::TrainingPlan (*plan)(const ensemble_mlp_cpu::Training&);
  ensemble_mlp_cpu::TrainingError (*prepare)(const ensemble_mlp_cpu::Training&, int64_t, int64_t);
  void (*train)(const ensemble_mlp_cpu::Training&, int64_t, int64_t, void*);
  void (*finish)(const ensemble_mlp_cpu::Training&, int64_t, int64_t);
};

}  // namespace
}  // namespace pyens

#define PYENS_KERNEL_SOURCE "kernels/cpu/ensemble_mlp_training-inl.h"
#include "kernels/cpu/foreach_isa.h"

namespace pyens {
namespace {

const TrainingFunctions& functions(DType dtype) {
#define PYENS_BY_DTYPE(isa)                                                    \
  {                                                                            \
    using namespace isa::ensemble_mlp;                                         \
    switch (dtype) {                                                           \
      case DType::float64: return kTrainingFunctions<Plain<double, double>>;   \
      case DType::float16: return kTrainingFunctions<Plain<Float16, float>>;   \
      case DType::bfloat16: return kTrainingFunctions<Plain<BFloat16, float>>; \
      default: return kTrainingFunctions<Plain<float, float>>;                 \
    }                                                                          \
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

namespace ensemble_mlp_cpu {

TrainingPlan plan_training(const Training& t) {
  return functions(t.forward.layers[0].weight.format).plan(t);
}

TrainingError prepare_training(const Training& t, int64_t begin, int64_t end) {
  return functions(t.forward.layers[0].weight.format).prepare(t, begin, end);
}

void train(const Training& t, int64_t begin, int64_t end, void* scratch) {
  functions(t.forward.layers[0].weight.format).train(t, begin, end, scratch);
}

void finish_training(const Training& t, int64_t begin, int64_t end) {
  functions(t.forward.layers[0].weight.format).finish(t, begin, end);
}

}  // namespace ensemble_mlp_cpu
}  // namespace pyens
