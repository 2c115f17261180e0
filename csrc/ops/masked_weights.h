// What others need of masked_weights.
#pragma once

#include "ops/options.h"

namespace pyens {

// The rows and columns of a weight that each of `num_masks` masks keeps.
at::Tensor masked_weights(const at::Tensor& weight, const OptionalTensor& rows,
                          const OptionalTensor& columns, int64_t num_masks);

// Its transpose on the CPU, of accumulation_type: the sum over the masks to `weight`, or to what it holds.
void spread_masked_weights(const at::Tensor& grad, const OptionalTensor& rows,
                           const OptionalTensor& columns, bool add, const at::Tensor& weight);

}  // namespace pyens
