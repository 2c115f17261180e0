// Masks over channels, on the CPU.
//
// mask_channels reads what is kept and writes everything once: bound by memory, and less of it than
// a copy, for what is masked is never read. Planes of a channel are copied or zeroed as a whole;
// where a channel is one element, a row is selected element by element with the mask widened to the
// element's size, which compilers vectorise.
//
// masked_weights moves kept_rows * kept_columns elements per mask, some per cent of the
// multiply-adds that follow for any batch worth masking.

#include "kernels/masksembles.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace pyens {
namespace {

// --- mask_channels -------------------------------------------------------------------------------

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
void mask_rows(const MaskChannelsParams& p, int64_t begin, int64_t end) {
  const int64_t row_elements = p.channels * p.inner;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t mask = p.index ? p.index[row] : group_of(row, p.rows, p.num_masks);
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
}

// --- masked_weights ------------------------------------------------------------------------------

template <class Word>
void gather(const MaskedWeightsParams& p, const Word* weight, Word* output, int64_t begin,
            int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = p.row_index ? p.row_index[item] : item % p.kept_rows;
    Word* to = output + item * p.kept_columns;
    if (row < 0) {
      std::fill(to, to + p.kept_columns, Word{0});
      continue;
    }
    const Word* from = weight + row * p.columns;
    if (!p.column_index) {
      std::copy(from, from + p.kept_columns, to);
      continue;
    }
    const int64_t* columns = p.column_index + item / p.kept_rows * p.kept_columns;
    for (int64_t c = 0; c < p.kept_columns; ++c) {
      to[c] = columns[c] < 0 ? Word{0} : from[columns[c]];
    }
  }
}

// Where a row of the shared matrix lies among the kept ones of a mask, or -1.
int64_t position_of(const MaskedWeightsParams& p, int64_t mask, int64_t row) {
  if (!p.row_index) return row;
  const int64_t* first = p.row_index + mask * p.kept_rows;
  const int64_t* found = std::find(first, first + p.kept_rows, row);
  return found == first + p.kept_rows ? -1 : found - first;
}

template <class Real>
void scatter(const MaskedWeightsParams& p, const Real* gathered, Real* weight, int64_t begin,
             int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    Real* to = weight + row * p.columns;
    std::fill(to, to + p.columns, Real{0});
    for (int64_t mask = 0; mask < p.num_masks; ++mask) {
      const int64_t position = position_of(p, mask, row);
      if (position < 0) continue;
      const Real* from = gathered + (mask * p.kept_rows + position) * p.kept_columns;
      if (!p.column_index) {
        for (int64_t c = 0; c < p.columns; ++c) to[c] += from[c];
        continue;
      }
      const int64_t* columns = p.column_index + mask * p.kept_columns;
      for (int64_t c = 0; c < p.kept_columns; ++c) {
        if (columns[c] >= 0) to[columns[c]] += from[c];
      }
    }
  }
}

}  // namespace

namespace masksembles_cpu {

void mask_channels(const MaskChannelsParams& p, int64_t begin, int64_t end) {
  switch (p.element_bytes) {
    case 2: return mask_rows<uint16_t>(p, begin, end);
    case 4: return mask_rows<uint32_t>(p, begin, end);
    default: return mask_rows<uint64_t>(p, begin, end);
  }
}

void masked_weights(const MaskedWeightsParams& p, size_t element_bytes, const void* weight,
                    void* output, int64_t begin, int64_t end) {
  const auto go = [&](auto* word) {
    using Word = std::remove_pointer_t<decltype(word)>;
    gather(p, static_cast<const Word*>(weight), static_cast<Word*>(output), begin, end);
  };
  switch (element_bytes) {
    case 2: return go(static_cast<uint16_t*>(nullptr));
    case 4: return go(static_cast<uint32_t*>(nullptr));
    default: return go(static_cast<uint64_t*>(nullptr));
  }
}

void masked_weights_backward(const MaskedWeightsParams& p, bool wide, const void* gathered,
                             void* weight, int64_t begin, int64_t end) {
  if (wide) {
    scatter(p, static_cast<const double*>(gathered), static_cast<double*>(weight), begin, end);
  } else {
    scatter(p, static_cast<const float*>(gathered), static_cast<float*>(weight), begin, end);
  }
}

}  // namespace masksembles_cpu
}  // namespace pyens
