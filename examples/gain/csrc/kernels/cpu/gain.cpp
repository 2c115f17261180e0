// Chooses the instruction set and the element type of gain; the work is in gain-inl.h.

#include "kernels/gain.h"

#include "kernels/cpu/choose.h"

#define PYENS_KERNEL_SOURCE "kernels/cpu/gain-inl.h"
#include "kernels/cpu/foreach_isa.h"

namespace pyens::gain_cpu {

int64_t grain_size(const GainParams& p) {
  constexpr double kNumbersWorthAThread = 16e3;
  const int64_t rows = p.ensemble_size * p.batch;
  return items_worth_a_thread(kNumbersWorthAThread, static_cast<double>(rows * p.features), rows);
}

void run(const GainParams& p, int64_t begin, int64_t end) {
  static const Chosen<void(const GainParams&, int64_t, int64_t)> chosen{PYENS_VARIANTS(gain, run)};
  chosen[p.dtype](p, begin, end);
}

}  // namespace pyens::gain_cpu
