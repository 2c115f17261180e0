// What a machine can do: multiply-add ceilings, which benchmarks divide by, and the instruction set in use.

#include "ops/torch.h"

#include <atomic>
#include <chrono>

#include "kernels/cpu/isa.h"
#include "kernels/fma_peak.h"
#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/operation.h"

namespace pyens {
namespace {

// Multiply-add rate in GF/s of all of torch's threads together, measured for about `milliseconds`.
double measure_cpu(double milliseconds) {
  TORCH_CHECK_VALUE(milliseconds > 0, "fma_peak: milliseconds: expected a positive number, got ",
                    milliseconds);
  const int threads = at::get_num_threads();
  std::atomic<double> rate{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      using Clock = std::chrono::steady_clock;
      float sink = 0;
      double flops = 0, seconds = 0;
      const auto start = Clock::now();
      do {
        flops += fma_peak_cpu::run(100'000, &sink);
        seconds = std::chrono::duration<double>(Clock::now() - start).count();
      } while (seconds * 1e3 < milliseconds);
      for (double old = rate; !rate.compare_exchange_weak(old, old + flops / seconds);) {
      }
    }
  });
  return rate / 1e9;
}

// Runs one launch of multiply-add chains of the sink's type on its GPU; returns their operations.
double measure_cuda([[maybe_unused]] const at::Tensor& sink, [[maybe_unused]] bool tf32,
                    [[maybe_unused]] int64_t rounds) {
#if defined(PYENS_WITH_CUDA)
  TORCH_CHECK_VALUE(sink.is_cuda() && sink.numel() > 0,
                    "fma_peak_cuda: sink: expected a number on a GPU, got shape ", sink.sizes(),
                    " on ", sink.device());
  const DType dtype = kernel_dtype(sink.scalar_type());
  double operations = 0;
  launch_cuda("fma_peak_cuda", sink, [&](void* stream) {
    operations = fma_peak_cuda::operations(dtype, tf32, rounds);
    auto* const to = static_cast<float*>(sink.mutable_data_ptr());
    return fma_peak_cuda::run(dtype, tf32, rounds, to, stream);
  });
  return operations;
#else
  TORCH_CHECK(false, "fma_peak_cuda: pyens was built without CUDA");
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  // Of no device: they have one implementation, whatever their arguments.
  m.def("fma_peak(float milliseconds) -> float", measure_cpu);
  m.def("fma_peak_cuda(Tensor sink, bool tf32, int rounds) -> float", measure_cuda);
  m.def("cpu_capability() -> str", [] { return std::string(cpu_capability()); });
  m.def("compiler() -> str", [] { return std::string(__VERSION__); });
  m.def("release_memory() -> int", release_memory);
}

}  // namespace pyens
