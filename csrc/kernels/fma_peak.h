// Multiply-add ceilings, of one processor core and of a GPU: what benchmarks divide by.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace pyens::fma_peak_cpu {

// Runs `rounds` rounds of independent float32 multiply-add chains in registers on the chosen
// instruction set; returns the floating point operations done. The sum is written to `sink` to keep
// them alive.
double run(int64_t rounds, float* sink);

}  // namespace pyens::fma_peak_cpu

// CUDA: one launch of independent chains on every multiprocessor, on tensor cores for 16-bit types and
// for float32 with tf32. `sink`: a number in global memory, never written in fact: without the possibility
// a compiler would leave the sums out.
namespace pyens::fma_peak_cuda {
double operations(DType dtype, bool tf32, int64_t rounds);
const char* run(DType dtype, bool tf32, int64_t rounds, float* sink, void* stream);
}  // namespace pyens::fma_peak_cuda
