// Sums over the weights that are kept: one multiply-add for each of them and each vector.
//
// Two rows of as many weights run side by side, 2 x kVectors sums in registers. A weight costs a broadcast, a load of
// its column and kVectors loads that the multiply-adds take from memory: 12 loads for 8 multiply-adds, so that loads
// bind at two thirds of the peak, and at few weights a row the loads and stores of its sums too. What is read of x is a
// block of kBlock inputs, which stays in the L1 cache while all rows run by. The order of the sums is that of the dense
// kernels, so the bits are theirs where nothing but zeros is left out and all is finite.

namespace pyens::PYENS_ISA {

static_assert(kSparseBlock == kBlock, "one block of sums");

// A block of a member.
template <class Real>
struct SparseBlock {
  int64_t rows;
  const Real* values;
  const uint8_t* columns;
  const int32_t *starts, *order;

  SparseBlock(const SparseRows& sparse, int64_t member, int64_t block, int64_t blocks,
              int64_t row_count)
      : rows(row_count),
        values(static_cast<const Real*>(sparse.values)),
        columns(sparse.columns),
        starts(sparse.starts + (member * blocks + block) * (row_count + 1)),
        order(sparse.order + (member * blocks + block) * row_count) {}
};

// Which rows a block of sums is of: neighbours, or any.
struct NextRows {
  int64_t first;
  inline __attribute__((always_inline)) int64_t operator()(int r) const { return first + r; }
};
struct ListedRows {
  const int32_t* rows;
  inline __attribute__((always_inline)) int64_t operator()(int r) const { return rows[r]; }
};

// R rows that keep `count` weights each, the first of them the n-th.
template <int R, int NV, class V, class Real, class Offset, class Finish>
inline __attribute__((always_inline)) void sparse_rows(const SparseBlock<Real>& block, int64_t n,
                                                       int64_t count, const Real* const* x,
                                                       const Offset& offset, const Finish& finish) {
  V sum[R][NV];
  const Real *value[R], *at[NV];
  const uint8_t* column[R];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) at[v] = x[v];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) {
    value[r] = block.values + block.starts[n + r];
    column[r] = block.columns + block.starts[n + r];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[r][v] = V{};
  }
  for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      const int64_t from = offset(column[r][k]);
      const V weight = broadcast<V>(value[r][k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] = madd(weight, load<V>(at[v] + from), sum[r][v]);
    }
  }
  finish.template finish<R, NV>(ListedRows{block.order + n}, sum);
}

// finish.finish<R, NV>(rows, sums) for all rows of a block. offset(c): where input c of it lies, from x[v] on.
template <int NV, class V, class Real, class Offset, class Finish>
void run_sparse(const SparseBlock<Real>& block, const Real* const* x, const Offset& offset,
                const Finish& finish) {
  const int32_t* const starts = block.starts;
  for (int64_t n = 0; n < block.rows;) {
    const int64_t count = starts[n + 1] - starts[n];
    if (n + 1 < block.rows && starts[n + 2] - starts[n + 1] == count) {
      sparse_rows<2, NV, V>(block, n, count, x, offset, finish);
      n += 2;
    } else {
      sparse_rows<1, NV, V>(block, n, count, x, offset, finish);
      n += 1;
    }
  }
}

// The same for up to kVectors vectors.
template <class V, class Real, class Offset, class Finish>
void run_sparse_vectors(int64_t vectors, const SparseBlock<Real>& block, const Real* const* x,
                        const Offset& offset, const Finish& finish) {
  if constexpr (kVectors == 4) {
    if (vectors == 4) return run_sparse<4, V>(block, x, offset, finish);
    if (vectors == 3) return run_sparse<3, V>(block, x, offset, finish);
  }
  if (vectors == 2) return run_sparse<2, V>(block, x, offset, finish);
  run_sparse<1, V>(block, x, offset, finish);
}

}  // namespace pyens::PYENS_ISA
