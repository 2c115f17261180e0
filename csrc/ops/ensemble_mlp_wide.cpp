// The forward pass on CUDA: one launch, or for members whose weights are too wide for that the library's
// batched product and a kernel for what follows it (kernels/cuda/ensemble_mlp_epilogue.cu), layer by layer.
//
// Products of 16-bit types come out in float32, so that an activation is rounded once, when it is stored.
// In float32 they follow torch's TF32 setting. Nothing waits for the GPU, and buffers come from torch's
// allocator: a CUDA graph can capture it.

#include <algorithm>

#include "ops/ensemble_mlp.h"

namespace pyens {
namespace {

using at::Tensor;
using at::TensorList;

// Of a buffer. What needs more goes through the layers in chunks of the batch.
constexpr int64_t kMostElements = int64_t{1} << 28;

// [E, B, I]. A shared input is expanded, and must not be copied for each member: what the library
// would not read as it lies is copied before.
Tensor member_inputs(const Tensor& input, int64_t members) {
  const auto reads = [&](int64_t along, int64_t across) {
    return input.stride(along) == 1 && input.stride(across) >= input.size(along);
  };
  const Tensor x = reads(-1, -2) || reads(-2, -1) ? input : input.contiguous();
  return x.dim() == 3 ? x : x.unsqueeze(0).expand({members, -1, -1});
}

int64_t rows_at_once(const EnsembleMLPParams& params) {
  int64_t widest = 1;
  for (int64_t l = 0; l < params.num_layers; ++l) widest = std::max(widest, params.layers[l].out);
  const int64_t rows = kMostElements / (params.ensemble_size * widest);
  return std::clamp<int64_t>(rows < 256 ? rows : rows / 256 * 256, 1, params.batch);
}

void run_layer_by_layer(const char* op, const EnsembleMLPParams& params, const Tensor& input,
                        TensorList weights) {
  const at::ScalarType type = input.scalar_type(), real = accumulation_type(type);
  const Tensor inputs = member_inputs(input, params.ensemble_size);
  const int64_t most = rows_at_once(params);
  EnsembleMLPEpilogue epilogue{};
  for (; epilogue.first_row < params.batch; epilogue.first_row += epilogue.rows) {
    epilogue.rows = std::min(most, params.batch - epilogue.first_row);
    Tensor h = inputs.narrow(1, epilogue.first_row, epilogue.rows);
    for (epilogue.layer = 0; epilogue.layer < params.num_layers; ++epilogue.layer) {
      const int64_t out = params.layers[epilogue.layer].out;
      const Tensor weight = weights[static_cast<size_t>(epilogue.layer)].transpose(1, 2);
      const Tensor z = type == real ? at::bmm(h, weight) : at::bmm(h, weight, real);
      epilogue.z = z.const_data_ptr();
      if (epilogue.layer + 1 == params.num_layers) {
        const int64_t skipped = epilogue.first_row * out * input.element_size();
        epilogue.h = static_cast<char*>(params.output) + skipped;
        epilogue.h_member_stride = params.batch * out;
      } else {
        h = type == real ? z : at::empty(z.sizes(), input.options());
        epilogue.h = h.mutable_data_ptr();
        epilogue.h_member_stride = epilogue.rows * out;
      }
      launch_cuda(op, input, [&](void* stream) {
        return ensemble_mlp_cuda::run_epilogue(params, epilogue, stream);
      });
    }
  }
}

}  // namespace

void run_on_cuda(const char* op, const EnsembleMLPParams& params, const Tensor& input,
                 TensorList weights) {
  const bool tf32 = allows_tf32();
  bool one_launch = false;
  launch_cuda(op, input, [&](void* stream) {
    one_launch = ensemble_mlp_cuda::fits_one_launch(params, tf32);
    return one_launch ? ensemble_mlp_cuda::run(params, tf32, stream) : nullptr;
  });
  if (!one_launch) run_layer_by_layer(op, params, input, weights);
}

}  // namespace pyens
