// New tensors for what kernels write.
#pragma once

#include "ops/torch.h"

namespace pyens {

// at::empty, whose memory on the CPU is that of an earlier result where one of about this size has been freed.
//
// A step of training asks for the same sizes each time. The C library gives what is freed back to the system, from
// 32 MB on at once and else when the end of its heap falls free, and gets it again as fresh pages, each zeroed on first
// touch: up to half of a step's time. So freed memory is kept for the next result: blocks from 64 KB on, the
// last ones freed, together at most PYENS_KEEP_MB megabytes (an environment variable; 256 if it is not set, 0 for none).
// New ones from 32 MB on are in huge pages where the system has some.
at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options);
// Of sizes that may be symbols, which no memory on the CPU has.
at::Tensor empty_result_symint(c10::SymIntArrayRef sizes, const at::TensorOptions& options);

// The same for memory of other uses on the CPU, such as a thread's scratch, and for tensors that grow.
c10::Allocator* result_allocator();

// Gives back what is kept, and returns its bytes.
int64_t release_memory();

}  // namespace pyens
