// Twelve independent chains: more than latency x issue rate of any current core, fewer than its
// registers.

#include "kernels/cpu/simd-inl.h"

namespace pyens::PYENS_ISA::fma_peak {

inline double run(int64_t rounds, float* sink) {
  using V = Wide<float>;
  constexpr int kChains = 12;
  V sum[kChains];
  for (int c = 0; c < kChains; ++c) sum[c] = broadcast<V>(0.1f * static_cast<float>(c));
  const V factor = broadcast<V>(0.999f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sum[c] = madd(sum[c], factor, factor);
  }
  for (int c = 1; c < kChains; ++c) sum[0] += sum[c];
  *sink = sum[0][0];
  return 2.0 * kChains * lanes_of<V>() * static_cast<double>(rounds);
}

inline constexpr PeakFunction kFunction = run;

}  // namespace pyens::PYENS_ISA::fma_peak
