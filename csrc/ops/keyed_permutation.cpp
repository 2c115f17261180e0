// Orders of rows as a pure function of a key and a place, for as many rows as one likes.

#include "ops/torch.h"

#include "kernels/keyed_permutation.h"
#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/operation.h"

namespace pyens {
namespace {

using at::Tensor;

constexpr char kOp[] = "keyed_permutation";

void check(const Tensor& keys, int64_t n, int64_t first, int64_t count) {
  PYENS_CHECK_TYPE(keys.scalar_type() == at::kLong, kOp, "keys", "int64", keys.scalar_type());
  PYENS_CHECK_VALUE(keys.dim() == 1, kOp, "keys", "[E]", "shape ", keys.sym_sizes());
  PYENS_CHECK_VALUE(n >= 0 && n <= kMostPermuted, kOp, "n", "rows from 0 to 2^62", n);
  PYENS_CHECK_VALUE(first >= 0 && first <= n, kOp, "first", c10::str("a place from 0 to ", n),
                    first);
  PYENS_CHECK_VALUE(count >= 0 && count <= n - first, kOp, "count",
                    c10::str("places up to ", n - first, " of ", n, " from ", first, " on"), count);
}

Tensor keyed_permutation(const Tensor& keys, int64_t n, int64_t first, int64_t count) {
  check(keys, n, first, count);
  const Tensor own = keys.contiguous();
  Tensor output = empty_result({own.size(0), count}, own.options());
  if (output.numel() == 0) return output;
  KeyedPermutationParams params{};
  params.keys = own.const_data_ptr<int64_t>();
  params.members = own.size(0);
  params.n = n;
  params.first = first;
  params.count = count;
  params.output = output.mutable_data_ptr<int64_t>();
  if (own.is_cuda()) {
    launch_cuda(kOp, own,
                [&](void* stream) { return keyed_permutation_cuda::run(params, stream); });
    return output;
  }
  launch_cpu(keyed_permutation_cpu::work_items(params), keyed_permutation_cpu::grain_size(params),
             0, [&](int64_t begin, int64_t end, void* /*scratch*/) {
               keyed_permutation_cpu::run(params, begin, end);
             });
  return output;
}

Tensor keyed_permutation_meta(const Tensor& keys, int64_t n, int64_t first, int64_t count) {
  check(keys, n, first, count);
  return at::empty_symint({keys.sym_size(0), count}, keys.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  Operation(m, "keyed_permutation(Tensor keys, int n, int first, int count) -> Tensor")
      .cpu_and_cuda<keyed_permutation>()
      .meta<keyed_permutation_meta>()
      .not_differentiable();
}

}  // namespace pyens
