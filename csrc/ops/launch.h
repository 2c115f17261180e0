// Runs torch-free kernels: on the CPU split among torch's threads, on the GPU on torch's current
// stream.
#pragma once

#include "ops/results.h"
#include "ops/torch.h"

#include <cstdint>
#include <forward_list>

#if defined(PYENS_WITH_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace pyens {

// The tensor, or a copy of it kept in `copies`: all that kernels need is a contiguous last dimension.
// A list, so that references into it stay valid.
inline const at::Tensor& with_contiguous_rows(const at::Tensor& tensor,
                                              std::forward_list<at::Tensor>& copies) {
  if (tensor.size(-1) <= 1 || tensor.stride(-1) == 1) return tensor;
  return copies.emplace_front(tensor.contiguous());
}

// run(begin, end, scratch) for disjoint ranges that cover [0, items).
template <class Run>
void launch_cpu(int64_t items, int64_t grain_size, size_t scratch_bytes, const Run& run) {
  at::parallel_for(0, items, grain_size, [&](int64_t begin, int64_t end) {
    // Aligned to 64 bytes, as all that torch allocates.
    const c10::DataPtr scratch = result_allocator()->allocate(scratch_bytes);
    run(begin, end, scratch.get());
  });
}

// Whether torch's own products of float32 on CUDA would be those of TF32. Context::allowTF32CuBLAS asks
// the same, but raises once the newer of torch's two settings, fp32_precision, was used.
inline bool allows_tf32() {
  return !at::NoTF32Guard::should_disable_tf32() &&
         at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
             at::Float32Precision::TF32;
}

// run(stream) with the device of `like` current; what it returns other than nullptr is raised for
// `op`.
template <class Run>
void launch_cuda(const char* op, const at::Tensor& like, const Run& run) {
#if defined(PYENS_WITH_CUDA)
  const c10::cuda::CUDAGuard guard(like.device());
  const char* error = run(static_cast<void*>(c10::cuda::getCurrentCUDAStream().stream()));
  TORCH_CHECK_NOT_IMPLEMENTED(error == nullptr, op, ": CUDA: ", error);
#else
  (void)run;
  TORCH_CHECK_NOT_IMPLEMENTED(false, op, ": input on ", like.device(),
                              ", but pyens was built without CUDA (see python -m pyens)");
#endif
}

}  // namespace pyens
