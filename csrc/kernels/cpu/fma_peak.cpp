#include "kernels/fma_peak.h"

#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/cpu/isa.h"
#include "kernels/types.h"

#define PYENS_KERNEL_SOURCE "kernels/cpu/fma_peak-inl.h"
#include "kernels/cpu/foreach_isa.h"

namespace pyens::fma_peak_cpu {

double run(int64_t rounds, float* sink) {
  switch (chosen_isa()) {
#if defined(__x86_64__)
    case Isa::avx512_bf16:
    case Isa::avx512: return avx512::fma_peak::run(rounds, sink);
    case Isa::avx2: return avx2::fma_peak::run(rounds, sink);
#endif
    default: return base::fma_peak::run(rounds, sink);
  }
}

}  // namespace pyens::fma_peak_cpu
