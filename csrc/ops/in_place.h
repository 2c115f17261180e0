// The memory of tensors that a kernel updates where they are.
#pragma once

#include "ops/torch.h"

#include <ATen/MemoryOverlap.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace pyens {

class InPlace {
 public:
  // What of the tensor the kernel reads or writes, contiguous: its own memory, or a copy.
  void* memory(const at::Tensor& tensor, bool written) {
    at::Tensor here = tensor;
    if (!tensor.is_contiguous()) {
      if (written) at::assert_no_internal_overlap(tensor);
      here = tensor.contiguous();
    }
    if (written || !here.is_same(tensor)) tensors_.push_back({tensor, here, written});
    void* const data = written ? here.mutable_data_ptr() : const_cast<void*>(here.const_data_ptr());
    const char* const begin = static_cast<const char*>(data);
    ranges_.emplace_back(begin, begin + here.nbytes());
    return data;
  }

  // Whether it shares memory with one of these, as a tensor that is only read beside them must not.
  bool overlaps(const at::Tensor& read) const {
    if (read.numel() == 0) return false;
    int64_t last = 0;
    for (int64_t d = 0; d < read.dim(); ++d) last += (read.size(d) - 1) * read.stride(d);
    const char* const begin = static_cast<const char*>(read.const_data_ptr());
    const char* const end = begin + (last + 1) * static_cast<int64_t>(read.element_size());
    return std::any_of(ranges_.begin(), ranges_.end(), [&](const auto& range) {
      return begin < range.second && range.first < end;
    });
  }

  // Whether threads might meet: two of the tensors share memory.
  bool overlaps() {
    std::sort(ranges_.begin(), ranges_.end());
    const char* end = nullptr;
    for (const auto& [from, to] : ranges_) {
      if (from == to) continue;
      if (end != nullptr && from < end) return true;
      end = to;  // no less than any end before, or it had returned
    }
    return false;
  }

  // What was written goes back, and counts.
  void done() {
    for (const auto& [tensor, here, written] : tensors_) {
      if (!written) continue;
      if (here.is_same(tensor)) {
        tensor.unsafeGetTensorImpl()->bump_version();
      } else {
        tensor.copy_(here);
      }
    }
  }

 private:
  struct Used {
    at::Tensor tensor, here;
    bool written;
  };
  std::vector<Used> tensors_;
  std::vector<std::pair<const char*, const char*>> ranges_;
};

}  // namespace pyens
