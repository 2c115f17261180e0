// The kernels that measure ceilings, run on the host: that they run and count what they do.

#include "kernels/cuda/fma_peak.cu"

#include "emulated_test.h"

int main() {
  using namespace emulated_test;
  using pyens::DType;
  emulation::device.multiprocessors = 1;
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    for (const bool tf32 : {false, true}) {
      ++problems;
      Global<float> sink(1);
      const char* error = pyens::fma_peak_cuda::run(dtype, tf32, 2, sink.data(), nullptr);
      check(error == nullptr, error ? error : "");
      // 2 blocks of 256 threads, 8 chains, 2 rounds; a warp's product has 16 x 8 x depth multiply-adds.
      const bool tiles = dtype != DType::float64 && (dtype != DType::float32 || tf32);
      const double of_warp = !tiles ? 32 : dtype == DType::float32 ? 16 * 8 * 8 : 16 * 8 * 16;
      check(pyens::fma_peak_cuda::operations(dtype, tf32, 2) == 2 * 8 * 8 * 2 * 2 * of_warp,
            "operations");
    }
  }
  return finish();
}
