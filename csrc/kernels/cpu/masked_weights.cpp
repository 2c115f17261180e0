// Weights restricted to masks, on the CPU: moves kept_rows * kept_columns elements per mask, some per cent
// of the multiply-adds that follow for any batch worth masking.

#include "kernels/masked_weights.h"

#include <algorithm>
#include <type_traits>

namespace pyens {
namespace {

template <class Word>
void gather(const MaskedWeightsParams& p, const Word* weight, Word* output, int64_t begin,
            int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = p.row_index ? p.row_index[item] : item % p.kept_rows;
    Word* to = output + item * p.kept_columns;
    if (row < 0 || row >= p.rows) {
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
      const int64_t column = columns[c];
      to[c] = column < 0 || column >= p.columns ? Word{0} : from[column];
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
        const int64_t column = columns[c];
        if (column >= 0 && column < p.columns) to[column] += from[c];
      }
    }
  }
}

}  // namespace

namespace masked_weights_cpu {

void run(const MaskedWeightsParams& p, size_t element_bytes, const void* weight, void* output,
         int64_t begin, int64_t end) {
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

void run_backward(const MaskedWeightsParams& p, DType dtype, const void* gathered, void* weight,
                  int64_t begin, int64_t end) {
  if (dtype == DType::float64) {
    scatter(p, static_cast<const double*>(gathered), static_cast<double*>(weight), begin, end);
  } else {
    scatter(p, static_cast<const float*>(gathered), static_cast<float*>(weight), begin, end);
  }
}

}  // namespace masked_weights_cpu
}  // namespace pyens
