// Runs a torch-free CPU kernel: splits its work items among torch's threads, with scratch for each.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>

namespace pyens {

// run(begin, end, scratch) for disjoint ranges that cover [0, items).
template <class Run>
void launch_cpu(int64_t items, int64_t grain_size, size_t scratch_bytes, const Run& run) {
  at::parallel_for(0, items, grain_size, [&](int64_t begin, int64_t end) {
    // torch's allocator aligns to 64 bytes.
    const c10::DataPtr scratch = c10::GetCPUAllocator()->allocate(scratch_bytes);
    run(begin, end, scratch.get());
  });
}

}  // namespace pyens
