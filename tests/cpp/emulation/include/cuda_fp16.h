// Stands in for CUDA's own header: see cuda_runtime.h.
#pragma once

#include <cstdint>

#include "emulation.h"

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) { return emulation::widen_half(x.bits); }
inline __half __float2half(float x) { return {emulation::round_to_half(x)}; }
