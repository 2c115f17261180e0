// The weights of a layer in bytes, and how its inputs become bytes.
//
//   q[k]   = clamp(round(x[k] / input_scale) + input_zero_point, 0, 255)     halves to even; times 1 / input_scale
//   sum[o] = sum_k values[o][k] q[k] + offset[o]                             offset[o] = -zero point * sum_k values[o][k]
//   z[o]   = float(sum[o]) * (scale[o] * input_scale) + bias[o]              each rounded: no fused multiply-add
//
// All that is added up is whole numbers, so no order of the sums and no instruction set changes a bit of them.
#pragma once

#include <cstdint>

namespace pyens {

struct Int8Weight {
  const int8_t* values;             // [E, rows, inputs], contiguous, as all of these
  const float* scale;               // [E, rows]
  const int32_t* offset;            // [E, rows]
  const float* input_scale;         // [E]
  const uint8_t* input_zero_point;  // [E]
};

}  // namespace pyens
