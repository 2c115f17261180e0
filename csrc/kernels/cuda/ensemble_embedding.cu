// Embedding tables per member, on the GPU.
//
//   gather        features[m, b] = tables[t][m, index_t[m, b]] side by side, then numeric[m, b]
//   sorted sums   grad[m, n] = sum of the gradients of the examples that looked row n up
//   numeric       the gradient of the numeric columns, summed over the members where they share them
//
// Mapping: a thread per element of what is written; in the gather a row of the grid per table, so that
// no thread has to search for the table of a column. Bound by memory: with 4-byte elements the gather
// moves 8 E B T (index) + 8 E B I (rows in, features out) bytes, the sums read the gradient once and
// write the rows that were used.
//
// A row's sum is one thread's per column, over its examples in ascending order: no atomics, the same
// bits in every run. A row that many examples used is therefore slow: a chain of that many loads.
// One launch takes as many tables as its arguments hold.

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/common.cuh"
#include "kernels/ensemble_embedding.h"

namespace pyens {
namespace {

constexpr unsigned kThreads = 256;
constexpr int64_t kMaxTables = 32;

struct GatherArguments {
  EmbeddingGather params;  // without its pointer to the tables, which is the host's
  EmbeddingTable tables[kMaxTables];
  int64_t num_tables;
};

template <class Word>
__global__ void __launch_bounds__(kThreads) gather_kernel(const GatherArguments a) {
  const EmbeddingGather& p = a.params;
  Word* features = static_cast<Word*>(p.features);
  const int64_t rows = p.ensemble_size * p.batch;
  if (blockIdx.y == a.num_tables) {
    const int64_t width = p.numeric_features;
    const Word* numeric = static_cast<const Word*>(p.numeric);
    for (int64_t i = first_item(); i < rows * width; i += all_threads()) {
      const int64_t row = i / width, m = row / p.batch, b = row % p.batch, d = i % width;
      features[row * p.num_features + p.num_features - width + d] =
          numeric[m * p.numeric_member_stride + b * p.numeric_row_stride + d];
    }
    return;
  }
  const EmbeddingTable& table = a.tables[blockIdx.y];
  const Word* weight = static_cast<const Word*>(table.weight);
  for (int64_t i = first_item(); i < rows * table.dim; i += all_threads()) {
    const int64_t row = i / table.dim, m = row / p.batch, b = row % p.batch, d = i % table.dim;
    const int64_t n = table.index[m * p.index_member_stride + b * p.index_row_stride];
    const bool exists = n >= 0 && n < table.num_embeddings;
    features[row * p.num_features + table.offset + d] =
        exists ? weight[m * table.member_stride + n * table.row_stride + d] : nan_word<Word>();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sorted_sums_kernel(const EmbeddingSortedSums p) {
  const int64_t items = (p.rows ? p.num_rows : p.ensemble_size * p.batch) * p.dim;
  for (int64_t i = first_item(); i < items; i += all_threads()) {
    const int64_t r = i / p.dim, d = i % p.dim, at = p.rows ? p.rows[r] : r;
    const int64_t m = at / p.batch, begin = at % p.batch;
    const int64_t* sorted = p.sorted + m * p.sorted_member_stride;
    const int64_t n = sorted[begin];
    if (n < 0 || n >= p.num_embeddings) continue;
    if (begin > 0 && sorted[begin - 1] == n) continue;
    const int64_t* order = p.order + m * p.sorted_member_stride;
    const T* grad = static_cast<const T*>(p.grad) + m * p.grad_member_stride + d;
    Real<T> sum = 0;
    for (int64_t j = begin; j < p.batch && sorted[j] == n; ++j) {
      sum += to_real(grad[order[j] * p.grad_row_stride]);
    }
    from_real(sum, static_cast<T*>(p.sums) + (p.rows ? r : m * p.num_embeddings + n) * p.dim + d);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) numeric_kernel(const EmbeddingScatter p) {
  const int64_t width = p.numeric_features, summed = p.numeric_shared ? p.ensemble_size : 1;
  const int64_t items = (p.numeric_shared ? 1 : p.ensemble_size) * p.batch * width;
  for (int64_t i = first_item(); i < items; i += all_threads()) {
    const int64_t row = i / width, m = row / p.batch, b = row % p.batch, d = i % width;
    const T* grad = static_cast<const T*>(p.grad) + m * p.grad_member_stride +
                    b * p.grad_row_stride + p.numeric_offset + d;
    Real<T> sum = 0;
    for (int64_t k = 0; k < summed; ++k) sum += to_real(grad[k * p.grad_member_stride]);
    from_real(sum, static_cast<T*>(p.numeric_grad) + i);
  }
}

}  // namespace

namespace ensemble_embedding_cuda {

const char* run(const EmbeddingGather& params, void* stream) {
  const int64_t rows = params.ensemble_size * params.batch;
  if (rows == 0) return nullptr;
  for (int64_t first = 0; first < params.num_tables; first += kMaxTables) {
    GatherArguments a{};
    a.params = params;
    a.params.tables = nullptr;
    a.num_tables = std::min(kMaxTables, params.num_tables - first);
    std::copy(params.tables + first, params.tables + first + a.num_tables, a.tables);
    const bool last = first + a.num_tables == params.num_tables;
    const bool with_numeric = last && params.numeric_features > 0;
    int64_t widest = with_numeric ? params.numeric_features : 0;
    for (int64_t t = 0; t < a.num_tables; ++t) widest = std::max(widest, a.tables[t].dim);
    const dim3 grid(striding_blocks(rows * widest, kThreads),
                    static_cast<unsigned>(a.num_tables + (with_numeric ? 1 : 0)));
    const char* error = by_bytes(element_size(params.dtype), [&](auto* word) {
      using Word = std::remove_pointer_t<decltype(word)>;
      return launch(gather_kernel<Word>, grid, kThreads, 0, stream, a);
    });
    if (error) return error;
  }
  return nullptr;
}

const char* run(const EmbeddingSortedSums& p, void* stream) {
  const int64_t items = (p.rows ? p.num_rows : p.ensemble_size * p.batch) * p.dim;
  if (items == 0) return nullptr;
  return by_dtype(p.dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    return launch(sorted_sums_kernel<T>, striding_blocks(items, kThreads), kThreads, 0, stream, p);
  });
}

const char* run_numeric(const EmbeddingScatter& p, void* stream) {
  const int64_t items = (p.numeric_shared ? 1 : p.ensemble_size) * p.batch * p.numeric_features;
  if (p.numeric_grad == nullptr || items == 0) return nullptr;
  return by_dtype(p.dtype, [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    return launch(numeric_kernel<T>, striding_blocks(items, kThreads), kThreads, 0, stream, p);
  });
}

}  // namespace ensemble_embedding_cuda
}  // namespace pyens
