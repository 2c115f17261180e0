// Stands in for CUDA's own header: see cuda_runtime.h.
#pragma once

#include <cstdint>

#include "emulation.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return emulation::widen_bfloat16(x.bits); }
inline __nv_bfloat16 __float2bfloat16(float x) { return {emulation::round_to_bfloat16(x)}; }
