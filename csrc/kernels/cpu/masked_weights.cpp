// Weights restricted to masks, on the CPU: chooses the instruction set, and walks through rows; what happens to a row is
// in masked_weights-inl.h. Bound by memory, and some per cent of the multiply-adds that follow for any batch worth
// masking.

#include "kernels/masked_weights.h"

#include "kernels/cpu/choose.h"

namespace pyens {
namespace {

// The columns that a mask keeps, ascending: one by one, and as bits, 16 columns each.
struct KeptColumns {
  const int64_t* at;
  int64_t count;
  const uint16_t* bits;
  int64_t columns;  // of the matrix
};

struct RowFunctions {
  void (*pack)(const void* from, const KeptColumns& kept, void* to);  // to[c] <- from[at[c]]
  void (*add)(const void* from, const KeptColumns& kept, void* to);   // to[at[c]] += from[c]
  void (*add_all)(const void* from, int64_t count, void* to);         // to[c] += from[c]
};

}  // namespace
}  // namespace pyens

#define PYENS_KERNEL_SOURCE "kernels/cpu/masked_weights-inl.h"
#include "kernels/cpu/foreach_isa.h"

namespace pyens {
namespace {

// Of the sizes that the instruction sets move in vectors.
#define PYENS_ROWS(isa) {&isa::masked_weights::kRows<float>, &isa::masked_weights::kRows<double>}
const RowFunctions& rows_of(DType dtype) {
#if defined(__x86_64__)
  static const Chosen<RowFunctions> chosen{
      {kAvx512, PYENS_ROWS(avx512)}, {kAvx2, PYENS_ROWS(avx2)}, {kBase, PYENS_ROWS(base)}};
#else
  static const Chosen<RowFunctions> chosen{{kBase, PYENS_ROWS(base)}};
#endif
  return chosen[dtype];
}

// A mask's columns, read and checked once: who holds the index may change it meanwhile.
class Columns {
 public:
  void read(const MaskedWeightsParams& p, int64_t mask) {
    const int64_t* index = p.column_index + mask * p.kept_columns;
    at_.assign(index, index + p.kept_columns);
    bits_.assign(static_cast<size_t>(p.columns / 16 + 1), 0);
    count_ = 0;
    ascending_ = true;
    int64_t last = -1;
    for (int64_t& column : at_) {
      if (column < 0 || column >= p.columns) column = -1;
      if (column < 0) continue;  // in order, padding ends them
      ascending_ &= column > last && at_[static_cast<size_t>(count_)] == column;
      bits_[static_cast<size_t>(column / 16)] |= static_cast<uint16_t>(1u << (column % 16));
      last = column;
      ++count_;
    }
    columns_ = p.columns;
  }
  KeptColumns kept() const { return {at_.data(), count_, bits_.data(), columns_}; }

  template <class Word>
  void pack(const Word* from, Word* to) const {
    const auto size = static_cast<int64_t>(at_.size());
    if (sizeof(Word) >= 4 && ascending_) {
      rows_of(sizeof(Word) == 8 ? DType::float64 : DType::float32).pack(from, kept(), to);
      std::fill(to + count_, to + size, Word{0});
      return;
    }
    const int64_t* const at = at_.data();
    for (int64_t c = 0; c < size; ++c) to[c] = at[c] < 0 ? Word{0} : from[at[c]];
  }

  template <class Real>
  void add(const Real* from, Real* to) const {
    if (ascending_) {
      rows_of(sizeof(Real) == 8 ? DType::float64 : DType::float32).add(from, kept(), to);
      return;
    }
    const int64_t* const at = at_.data();
    for (size_t c = 0; c < at_.size(); ++c) {
      if (at[c] >= 0) to[at[c]] += from[c];
    }
  }

 private:
  std::vector<int64_t> at_;  // -1: out of range
  std::vector<uint16_t> bits_;
  int64_t count_ = 0, columns_ = 0;
  bool ascending_ = true;  // and what pads at the end
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
    columns.pack(from, to);
  }
}

// For each row of [begin, end), the masks that keep it, in order: (mask, which of the mask's rows).
class KeptRows {
 public:
  KeptRows(const MaskedWeightsParams& p, int64_t begin, int64_t end)
      : first_(static_cast<size_t>(end - begin + 1), 0) {
    for_each(p, begin, end, [&](int64_t row, Kept) { ++first_[static_cast<size_t>(row + 1)]; });
    std::partial_sum(first_.begin(), first_.end(), first_.begin());
    kept_.resize(first_.back());
    std::vector<size_t> next(first_.begin(), first_.end() - 1);
    for_each(p, begin, end, [&](int64_t row, Kept kept) {
      size_t& at = next[static_cast<size_t>(row)];
      if (at < first_[static_cast<size_t>(row + 1)]) kept_[at++] = kept;
    });
  }
  template <class Visit>
  void visit(int64_t row, const Visit& visit) const {
    for (size_t i = first_[static_cast<size_t>(row)]; i < first_[static_cast<size_t>(row + 1)];
         ++i) {
      visit(kept_[i].mask, kept_[i].row);
    }
  }

 private:
  struct Kept {
    int64_t mask, row;
  };
  template <class Visit>
  static void for_each(const MaskedWeightsParams& p, int64_t begin, int64_t end,
                       const Visit& visit) {
    for (int64_t mask = 0; mask < p.num_masks; ++mask) {
      for (int64_t r = 0; r < p.kept_rows; ++r) {
        const int64_t row = p.row_index ? p.row_index[mask * p.kept_rows + r] : r;
        if (row >= begin && row < end) visit(row - begin, Kept{mask, r});
      }
    }
  }
  std::vector<size_t> first_;
  std::vector<Kept> kept_;
};

// The masks in order, so that every element has one order of summation; a row at a time, which stays in the first cache.
template <class Real>
void scatter(const MaskedWeightsParams& p, const Real* gathered, bool add, Real* weight,
             int64_t begin, int64_t end) {
  if (begin >= end) return;
  std::vector<Columns> columns(static_cast<size_t>(p.column_index ? p.num_masks : 0));
  for (size_t mask = 0; mask < columns.size(); ++mask) {
    columns[mask].read(p, static_cast<int64_t>(mask));
  }
  const KeptRows rows(p, begin, end);
  for (int64_t row = begin; row < end; ++row) {
    Real* const to = weight + row * p.columns;
    if (!add) std::fill(to, to + p.columns, Real{0});
    rows.visit(row - begin, [&](int64_t mask, int64_t r) {
      const Real* const from = gathered + (mask * p.kept_rows + r) * p.kept_columns;
      if (p.column_index) {
        columns[static_cast<size_t>(mask)].add(from, to);
      } else {
        rows_of(sizeof(Real) == 8 ? DType::float64 : DType::float32).add_all(from, p.columns, to);
      }
    });
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

void run_backward(const MaskedWeightsParams& p, DType dtype, const void* gathered, bool add,
                  void* weight, int64_t begin, int64_t end) {
  if (dtype == DType::float64) {
    scatter(p, static_cast<const double*>(gathered), add, static_cast<double*>(weight), begin, end);
  } else {
    scatter(p, static_cast<const float*>(gathered), add, static_cast<float*>(weight), begin, end);
  }
}

}  // namespace masked_weights_cpu
}  // namespace pyens
