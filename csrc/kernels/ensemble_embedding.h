// Embedding tables per member: each of E models looks rows up in tables of its own.
//
//   features[m, b] = tables[0][m, index_0[m, b]], tables[1][m, index_1[m, b]], ..., numeric[m, b]
//
// Parameter blocks and launchers of the three directions: gather (forward), scatter (dense
// gradients) and row sums (values of a sparse gradient). Raw pointers, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/types.h"

namespace pyens {

// Strides are counted in elements; the last dimension of every tensor has stride 1, of the index any.
// A member stride of 0 means that all members share the tensor.

// One table, its column of the index, and the columns of the features that its rows fill.
struct EmbeddingTable {
  const void* weight;                 // gather: [E, N, D]
  void* grad;                         // scatter: [E, N, D], contiguous
  const int64_t* index;               // [B] or [E, B]
  int64_t num_embeddings, dim;        // N, D
  int64_t member_stride, row_stride;  // of weight
  int64_t offset;                     // of its first column
};

struct EmbeddingGather {
  DType dtype;
  int64_t ensemble_size, batch, num_tables;
  const EmbeddingTable* tables;
  int64_t index_member_stride, index_row_stride;
  const void* numeric;  // [B, F] or [E, B, F]; the last columns
  int64_t numeric_features, numeric_member_stride, numeric_row_stride;
  void* features;  // [E, B, I], contiguous
  int64_t num_features;
};

struct EmbeddingScatter {
  DType dtype;
  int64_t ensemble_size, batch, num_tables;
  const EmbeddingTable* tables;
  int64_t index_member_stride, index_row_stride;
  const void* grad;  // of the features: [E, B, I]
  int64_t grad_member_stride, grad_row_stride;
  void* numeric_grad;  // [B, F] (summed over the members) or [E, B, F], contiguous; or nullptr
  int64_t numeric_features, numeric_offset;
  bool numeric_shared;
};

// What one row of one member's table was used for: the examples order[begin] ... order[end - 1].
struct EmbeddingRow {
  int64_t member, begin, end;
};
struct EmbeddingRowSums {
  DType dtype;
  int64_t num_rows, dim;
  const EmbeddingRow* rows;
  const int64_t* order;
  const void* grad;  // [E, B, D]
  int64_t grad_member_stride, grad_row_stride;
  void* sums;  // [num_rows, D], contiguous
};

// The same sums where the index comes sorted, as the GPU wants it: a row's examples are neighbours.
struct EmbeddingSortedSums {
  DType dtype;
  int64_t ensemble_size, batch, num_embeddings, dim;
  const int64_t* sorted;  // [B] or [E, B], ascending, contiguous
  const int64_t* order;   // likewise: the example that each one is of, ascending for each row
  int64_t sorted_member_stride;
  const void* grad;  // [E, B, D]
  int64_t grad_member_stride, grad_row_stride;
  // Where rows begin in `sorted`, as m * B + position: their sums go to [num_rows, D]. Or nullptr: all
  // rows that are used, to their places in [E, N, D]; the others, and what there is not, are left alone.
  const int64_t* rows;
  int64_t num_rows;
  void* sums;
};

// CPU. The caller splits [0, work_items) among its threads as it likes and gives each call scratch
// of its own, 64-byte aligned: no split changes a bit of what is written.
namespace ensemble_embedding_cpu {
int64_t work_items(const EmbeddingGather& params);
int64_t work_items(const EmbeddingScatter& params);
int64_t work_items(const EmbeddingRowSums& params);
// Below this many items in one thread, starting it costs more than it saves.
int64_t grain_size(const EmbeddingGather& params);
int64_t grain_size(const EmbeddingScatter& params);
int64_t grain_size(const EmbeddingRowSums& params);
size_t scratch_bytes(const EmbeddingGather& params);
size_t scratch_bytes(const EmbeddingScatter& params);
size_t scratch_bytes(const EmbeddingRowSums& params);
// Whether all indices were in range. Nothing is read or written for one that is not.
bool run(const EmbeddingGather& params, int64_t begin, int64_t end, void* scratch);
bool run(const EmbeddingScatter& params, int64_t begin, int64_t end, void* scratch);
bool run(const EmbeddingRowSums& params, int64_t begin, int64_t end, void* scratch);
}  // namespace ensemble_embedding_cpu

// CUDA: launches on `stream` (a cudaStream_t) of the current device and returns nullptr, or says in a
// phrase why it did not. Features of an index that is out of range are NaN.
namespace ensemble_embedding_cuda {
const char* run(const EmbeddingGather& params, void* stream);
const char* run(const EmbeddingSortedSums& params, void* stream);
// The gradient of the numeric columns; the tables are left to the sorted sums.
const char* run_numeric(const EmbeddingScatter& params, void* stream);
}  // namespace ensemble_embedding_cuda

}  // namespace pyens
