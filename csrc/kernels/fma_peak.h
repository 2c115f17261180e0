// The multiply-add ceiling of one processor core: what benchmarks divide by.
#pragma once

#include <cstdint>

namespace pyens::fma_peak_cpu {

// Runs `rounds` rounds of independent float32 multiply-add chains in registers on the chosen
// instruction set; returns the floating point operations done. The sum is written to `sink` to keep
// them alive.
double run(int64_t rounds, float* sink);

}  // namespace pyens::fma_peak_cpu
