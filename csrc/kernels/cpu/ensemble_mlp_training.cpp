// Chooses the instruction set and the element type of a training pass; the work is in
// ensemble_mlp_training-inl.h.
//
// bfloat16 with AVX512-BF16 is multiplied in pairs, and everything between the products is float32, the
// gradients too: they need its precision. Elsewhere it is widened to float32, as float16 is everywhere.

#include "kernels/cpu/choose.h"
#include "kernels/dropout.h"
#include "kernels/ensemble_mlp.h"
#include "kernels/sample_weights.h"

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
#define PYENS_KERNEL_AVX512_BF16
#include "kernels/cpu/foreach_isa.h"

namespace pyens {
namespace {

const TrainingFunctions& functions(const EnsembleMLPTraining& t) {
  static const Chosen<TrainingFunctions> chosen{
#if defined(__x86_64__)
      {kAvx512Bf16,
       {nullptr, nullptr, &avx512_bf16::ensemble_mlp::kPairTrainingFunctions, nullptr}},
#endif
      PYENS_VARIANTS(ensemble_mlp, kTrainingFunctions)};
  return chosen[t.forward.layers[0].weight.format];
}

}  // namespace

namespace ensemble_mlp_cpu {

TrainingPlan plan_training(const Training& t) { return functions(t).plan(t); }

TrainingError prepare_training(const Training& t, int64_t begin, int64_t end) {
  return functions(t).prepare(t, begin, end);
}

void train(const Training& t, int64_t begin, int64_t end, void* scratch) {
  functions(t).train(t, begin, end, scratch);
}

void finish_training(const Training& t, int64_t begin, int64_t end) {
  functions(t).finish(t, begin, end);
}

}  // namespace ensemble_mlp_cpu
}  // namespace pyens
