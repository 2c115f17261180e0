#include "kernels/fma_peak.h"

#include "kernels/cpu/choose.h"

namespace pyens {
namespace {
using PeakFunction = double (*)(int64_t rounds, float* sink);
}
}  // namespace pyens

#define PYENS_KERNEL_SOURCE "kernels/cpu/fma_peak-inl.h"
#include "kernels/cpu/foreach_isa.h"

namespace pyens::fma_peak_cpu {

double run(int64_t rounds, float* sink) {
  static const Chosen<PeakFunction> chosen{
#if defined(__x86_64__)
      {kAvx512, {&avx512::fma_peak::kFunction}},
      {kAvx2, {&avx2::fma_peak::kFunction}},
#endif
      {kBase, {&base::fma_peak::kFunction}}};
  return chosen[DType::float32](rounds, sink);
}

}  // namespace pyens::fma_peak_cpu
