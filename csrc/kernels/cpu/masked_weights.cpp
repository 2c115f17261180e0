// Weights restricted to masks, on the CPU: moves kept_rows * kept_columns elements per mask, some per cent
// of the multiply-adds that follow for any batch worth masking.

#include "kernels/masked_weights.h"

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

namespace pyens {
namespace {

// The columns that a mask keeps, read and checked once: who holds the index may change it meanwhile.
struct Columns {
  std::vector<int64_t> at;  // -1: out of range
  bool all_in_range = true;

  void read(const MaskedWeightsParams& p, int64_t mask) {
    const int64_t* index = p.column_index + mask * p.kept_columns;
    at.assign(index, index + p.kept_columns);
    all_in_range = true;
    for (int64_t& column : at) {
      if (column >= 0 && column < p.columns) continue;
      column = -1;
      all_in_range = false;
    }
  }
};

template <class Word>
void gather(const MaskedWeightsParams& p, const Word* weight, Word* output, int64_t begin,
            int64_t end) {
  Columns columns;
  int64_t mask_read = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = p.row_index ? p.row_index[item] : item % p.kept_rows;
    Word* const to = output + item * p.kept_columns;
    if (row < 0 || row >= p.rows) {
      std::fill(to, to + p.kept_columns, Word{0});
      continue;
    }
    const Word* const from = weight + row * p.columns;
    if (!p.column_index) {
      std::copy(from, from + p.kept_columns, to);
      continue;
    }
    const int64_t mask = item / p.kept_rows;
    if (mask != mask_read) columns.read(p, mask_read = mask);
    const int64_t* const at = columns.at.data();
    if (columns.all_in_range) {
      for (int64_t c = 0; c < p.kept_columns; ++c) to[c] = from[at[c]];
    } else {
      for (int64_t c = 0; c < p.kept_columns; ++c) to[c] = at[c] < 0 ? Word{0} : from[at[c]];
    }
  }
}

// The masks in order, so that every element has one order of summation. Each looks through its rows for those of
// this part; an inverse of the index would be looked up no faster.
template <class Real>
void scatter(const MaskedWeightsParams& p, const Real* gathered, Real* weight, int64_t begin,
             int64_t end) {
  std::fill(weight + begin * p.columns, weight + end * p.columns, Real{0});
  Columns columns;
  for (int64_t mask = 0; mask < p.num_masks; ++mask) {
    if (p.column_index) columns.read(p, mask);
    const int64_t* const at = columns.at.data();
    const int64_t first = mask * p.kept_rows;
    const auto [lowest, highest] =
        p.row_index ? std::pair{int64_t{0}, p.kept_rows} : std::pair{begin, end};
    for (int64_t r = lowest; r < highest; ++r) {
      const int64_t row = p.row_index ? p.row_index[first + r] : r;
      if (row < begin || row >= end) continue;
      const Real* const from = gathered + (first + r) * p.kept_columns;
      Real* const to = weight + row * p.columns;
      if (!p.column_index) {
        for (int64_t c = 0; c < p.columns; ++c) to[c] += from[c];
      } else if (columns.all_in_range) {
        for (int64_t c = 0; c < p.kept_columns; ++c) to[at[c]] += from[c];
      } else {
        for (int64_t c = 0; c < p.kept_columns; ++c) {
          if (at[c] >= 0) to[at[c]] += from[c];
        }
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
