// The ensemble MLP composed of torch's own differentiable operations: for gradients of gradients, and on
// CUDA for layers too wide for one launch.
#pragma once

#include "ops/torch.h"

#include <vector>

#include "ops/ensemble_mlp.h"

namespace pyens {

// The gradients of the output's grad by those tensors of the network that need one, in their order.
std::vector<at::Tensor> composed_backward(const char* op, at::Tensor grad, const Network& network,
                                          const MLPOptions& options, const NeedsGrad& needs_grad);

}  // namespace pyens
