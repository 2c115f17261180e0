// Masks over channels, on the CPU.
//
// Reads what is kept and writes everything once: bound by memory, and less of it than a copy, for what is
// masked is never read. Planes of a channel are copied or zeroed as a whole; where a channel is one
// element, a row is selected element by element with the mask widened to the element's size, which
// compilers vectorise.

#include "kernels/mask_channels.h"

#include <algorithm>
#include <cstring>

namespace pyens {
namespace {

template <class Word>
void select_elements(const Word* input, const bool* mask, int64_t n, Word* output) {
  for (int64_t i = 0; i < n; ++i) {
    // Selected, not multiplied: 0 * inf would be NaN.
    output[i] = static_cast<Word>(input[i] & static_cast<Word>(-static_cast<Word>(mask[i])));
  }
}

// The first groups are one longer, as torch.tensor_split makes them.
int64_t group_of(int64_t row, int64_t rows, int64_t groups) {
  const int64_t size = rows / groups, longer = rows % groups;
  const int64_t in_longer = longer * (size + 1);
  return row < in_longer ? row / (size + 1) : longer + (row - in_longer) / size;
}

template <class Word>
bool mask_rows(const MaskChannelsParams& p, int64_t begin, int64_t end) {
  const int64_t row_elements = p.channels * p.inner;
  bool in_range = true;
  for (int64_t row = begin; row < end; ++row) {
    // Read once: who holds the index may change it meanwhile.
    const int64_t mask = p.index ? p.index[row] : group_of(row, p.rows, p.num_masks);
    if (mask < 0 || mask >= p.num_masks) {
      auto* const to = static_cast<Word*>(p.output) + row * row_elements;
      std::fill(to, to + row_elements, Word{0});
      in_range = false;
      continue;
    }
    const bool* kept = p.masks + mask * p.channels;
    const Word* from = static_cast<const Word*>(p.input) + row * row_elements;
    Word* to = static_cast<Word*>(p.output) + row * row_elements;
    if (p.inner == 1) {
      select_elements(from, kept, p.channels, to);
      continue;
    }
    for (int64_t c = 0; c < p.channels; ++c, from += p.inner, to += p.inner) {
      if (kept[c]) {
        std::memcpy(to, from, static_cast<size_t>(p.inner) * sizeof(Word));
      } else {
        std::memset(to, 0, static_cast<size_t>(p.inner) * sizeof(Word));
      }
    }
  }
  return in_range;
}

}  // namespace

namespace mask_channels_cpu {

bool run(const MaskChannelsParams& p, int64_t begin, int64_t end) {
  switch (p.element_bytes) {
    case 2: return mask_rows<uint16_t>(p, begin, end);
    case 4: return mask_rows<uint32_t>(p, begin, end);
    default: return mask_rows<uint64_t>(p, begin, end);
  }
}

}  // namespace mask_channels_cpu
}  // namespace pyens
