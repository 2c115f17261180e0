// Weights restricted to masks, on the GPU.
//
//   run            out[n, r, c] = weight[row_index[n, r], column_index[n, c]], 0 where padded
//   run_backward   its transpose
//
// Mapping: a thread per element of what is written, neighbours in memory. Bound by memory: the gather reads
// and writes each kept weight once. The transpose gives a block to each row of the matrix: it looks for that
// row among the kept ones of each mask in order (kept_rows indices, all of them in L2) and adds what it finds
// to the row, which no other block writes. So masks are added in order, as on the CPU, without atomics.
//
// An index that is out of range makes NaN of what it would have chosen; nothing is read for it.

#include <type_traits>

#include "kernels/cuda/common.cuh"
#include "kernels/masked_weights.h"

namespace pyens {
namespace {

constexpr unsigned kThreads = 256;

template <class Word>
__global__ void __launch_bounds__(kThreads)
    masked_weights_kernel(const MaskedWeightsParams p, const Word* weight, Word* output) {
  const int64_t size = p.num_masks * p.kept_rows * p.kept_columns;
  for (int64_t i = first_item(); i < size; i += all_threads()) {
    const int64_t kept_column = i % p.kept_columns, kept_row = i / p.kept_columns;
    const int64_t mask = kept_row / p.kept_rows;
    const int64_t row = p.row_index ? p.row_index[kept_row] : kept_row % p.kept_rows;
    const int64_t column =
        p.column_index ? p.column_index[mask * p.kept_columns + kept_column] : kept_column;
    if (row < -1 || row >= p.rows || column < -1 || column >= p.columns) {
      output[i] = nan_word<Word>();
    } else {
      output[i] = row < 0 || column < 0 ? Word{0} : weight[row * p.columns + column];
    }
  }
}

template <class R>
__global__ void __launch_bounds__(kThreads)
    masked_weights_backward_kernel(const MaskedWeightsParams p, const R* gathered, R* weight) {
  PYENS_SHARED(unsigned long long, position);  // of the row among those that a mask keeps
  constexpr unsigned long long kNone = ~0ull;
  const int64_t row = blockIdx.x;
  R* to = weight + row * p.columns;
  for (int64_t c = threadIdx.x; c < p.columns; c += kThreads) to[c] = 0;
  for (int64_t mask = 0; mask < p.num_masks; ++mask) {
    if (threadIdx.x == 0) position = p.row_index ? kNone : static_cast<unsigned long long>(row);
    __syncthreads();
    if (p.row_index) {
      const int64_t* kept = p.row_index + mask * p.kept_rows;
      for (int64_t i = threadIdx.x; i < p.kept_rows; i += kThreads) {
        if (kept[i] == row) atomicMin(&position, static_cast<unsigned long long>(i));
      }
    }
    __syncthreads();
    if (position != kNone) {
      const int64_t kept_row = mask * p.kept_rows + static_cast<int64_t>(position);
      const R* from = gathered + kept_row * p.kept_columns;
      const int64_t* columns = p.column_index ? p.column_index + mask * p.kept_columns : nullptr;
      for (int64_t c = threadIdx.x; c < p.kept_columns; c += kThreads) {
        const int64_t column = columns ? columns[c] : c;
        if (column >= 0 && column < p.columns) to[column] += from[c];
      }
    }
    __syncthreads();
  }
}

}  // namespace

namespace masked_weights_cuda {

const char* run(const MaskedWeightsParams& p, size_t element_bytes, const void* weight,
                void* output, void* stream) {
  const unsigned blocks = striding_blocks(p.num_masks * p.kept_rows * p.kept_columns, kThreads);
  if (blocks == 0) return nullptr;
  return by_bytes(element_bytes, [&](auto* word) {
    using Word = std::remove_pointer_t<decltype(word)>;
    return launch(masked_weights_kernel<Word>, blocks, kThreads, 0, stream, p,
                  static_cast<const Word*>(weight), static_cast<Word*>(output));
  });
}

const char* run_backward(const MaskedWeightsParams& p, DType dtype, const void* gathered,
                         void* weight, void* stream) {
  if (p.rows == 0 || p.columns == 0) return nullptr;
  if (p.rows > INT32_MAX) return "too many rows for one launch";
  const auto go = [&](auto* real) {
    using R = std::remove_pointer_t<decltype(real)>;
    return launch(masked_weights_backward_kernel<R>, static_cast<unsigned>(p.rows), kThreads, 0,
                  stream, p, static_cast<const R*>(gathered), static_cast<R*>(weight));
  };
  return dtype == DType::float64 ? go(static_cast<double*>(nullptr))
                                 : go(static_cast<float*>(nullptr));
}

}  // namespace masked_weights_cuda
}  // namespace pyens
