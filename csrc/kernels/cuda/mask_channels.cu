// Masks over channels, on the GPU.
//
//   out[r, c, :] = input[r, c, :] where masks[mask of r, c], else 0
//
// Mapping: a thread per element of what is written, neighbours in memory. Bound by memory: reads what is
// kept and writes everything once. A row whose index is out of range becomes NaN, and no mask is read for it.

#include <type_traits>

#include "kernels/cuda/common.cuh"
#include "kernels/mask_channels.h"

namespace pyens {
namespace {

constexpr unsigned kThreads = 256;

// The first groups are one longer, as torch.tensor_split makes them.
__device__ inline int64_t group_of(int64_t row, int64_t rows, int64_t groups) {
  const int64_t size = rows / groups, longer = rows % groups;
  const int64_t in_longer = longer * (size + 1);
  return row < in_longer ? row / (size + 1) : longer + (row - in_longer) / size;
}

template <class Word>
__global__ void __launch_bounds__(kThreads) mask_channels_kernel(const MaskChannelsParams p) {
  const int64_t size = p.rows * p.channels * p.inner;
  for (int64_t i = first_item(); i < size; i += all_threads()) {
    const int64_t channel = i / p.inner % p.channels, row = i / p.inner / p.channels;
    const int64_t mask = p.index ? p.index[row] : group_of(row, p.rows, p.num_masks);
    Word* out = static_cast<Word*>(p.output) + i;
    if (mask < 0 || mask >= p.num_masks) {
      *out = nan_word<Word>();
    } else {
      *out = p.masks[mask * p.channels + channel] ? static_cast<const Word*>(p.input)[i] : Word{0};
    }
  }
}

}  // namespace

namespace mask_channels_cuda {

const char* run(const MaskChannelsParams& p, void* stream) {
  const unsigned blocks = striding_blocks(p.rows * p.channels * p.inner, kThreads);
  return by_bytes(p.element_bytes, [&](auto* word) {
    using Word = std::remove_pointer_t<decltype(word)>;
    return launch(mask_channels_kernel<Word>, blocks, kThreads, 0, stream, p);
  });
}

}  // namespace mask_channels_cuda
}  // namespace pyens
