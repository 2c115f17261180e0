// A factor for each feature of each member, on the GPU.
//
//   output[m, b, d] = input[m, b, d] * scale[m, d]
//
// Mapping: a thread per element of the output, neighbours in memory. Bound by memory.

#include <type_traits>

#include "kernels/cuda/common.cuh"
#include "kernels/gain.h"

namespace pyens {
namespace {

constexpr unsigned kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) gain_kernel(const GainParams p) {
  const int64_t size = p.ensemble_size * p.batch * p.features;
  for (int64_t i = first_item(); i < size; i += all_threads()) {
    const int64_t d = i % p.features, row = i / p.features;
    const int64_t m = row / p.batch, b = row % p.batch;
    const int64_t at = m * p.input_member_stride + b * p.input_row_stride + d;
    const auto x = to_real(static_cast<const T*>(p.input)[at]);
    const auto scale = to_real(static_cast<const T*>(p.scale)[m * p.scale_member_stride + d]);
    from_real(x * scale, static_cast<T*>(p.output) + i);
  }
}

}  // namespace

namespace gain_cuda {

const char* run(const GainParams& p, void* stream) {
  const unsigned blocks = striding_blocks(p.ensemble_size * p.batch * p.features, kThreads);
  return by_dtype(p.dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    return launch(gain_kernel<T>, blocks, kThreads, 0, stream, p);
  });
}

}  // namespace gain_cuda
}  // namespace pyens
