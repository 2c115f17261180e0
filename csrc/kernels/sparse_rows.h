// Weights of which few are kept: for each member and each row those that are not zero.
//
// The inputs are cut into blocks of kSparseBlock, as the sums are. In a block the rows stand in ascending order of how
// many of its weights they keep, so that loops over them are of one length for long; `order` says which row each is.
//
//   starts   [E, blocks, rows + 1]   where the weights of the block's n-th row begin, among those of all members
//   order    [E, blocks, rows]       the row that the n-th is
//   columns  [numbers]               which input of the block a weight is of
//
//   values   [numbers], Real         the weights, member after member, block after block
#pragma once

#include <cstdint>

namespace pyens {

constexpr int64_t kSparseBlock = 128;

struct SparseRows {
  const void* values;
  const int32_t *starts, *order;
  const uint8_t* columns;
};

inline int64_t sparse_blocks(int64_t inputs) { return (inputs + kSparseBlock - 1) / kSparseBlock; }

}  // namespace pyens
