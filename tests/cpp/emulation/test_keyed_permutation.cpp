// The CUDA kernel of keyed_permutation, run on the host, against the CPU's: the same bits.

#include "kernels/cuda/keyed_permutation.cu"

#include "emulated_test.h"

namespace {

using namespace emulated_test;

void test_keyed_permutation(int64_t members, int64_t n, int64_t first, int64_t count) {
  Random random(members * 1000 + n);
  std::vector<int64_t> keys;
  for (int64_t m = 0; m < members; ++m) keys.push_back(static_cast<int64_t>(random()));
  const Global<int64_t> gpu_keys(keys, "keys");
  pyens::KeyedPermutationParams p{};
  p.keys = keys.data();
  p.members = members;
  p.n = n;
  p.first = first;
  p.count = count;
  std::vector<int64_t> expected(static_cast<size_t>(members * count));
  p.output = expected.data();
  pyens::keyed_permutation_cpu::run(p, 0, pyens::keyed_permutation_cpu::work_items(p));
  p.keys = gpu_keys.data();
  expect_bits("keyed_permutation", expected, [&](int64_t* output) {
    p.output = output;
    return pyens::keyed_permutation_cuda::run(p, nullptr);
  });
}

}  // namespace

int main() {
  test_keyed_permutation(1, 1, 0, 1);
  test_keyed_permutation(3, 10, 0, 10);
  test_keyed_permutation(2, 1025, 7, 300);
  test_keyed_permutation(5, (int64_t{1} << 32) - 5, 1 << 20, 65);
  test_keyed_permutation(2, (int64_t{1} << 32) + 1, int64_t{1} << 32, 1);
  test_keyed_permutation(2, int64_t{1} << 62, int64_t{1} << 61, 33);
  return finish();
}
