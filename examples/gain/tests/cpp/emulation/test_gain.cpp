// The CUDA kernel of gain, run on the host, against the CPU's: the same bits.

#include "kernels/cuda/gain.cu"

#include "emulated_test.h"

namespace {

using namespace emulated_test;

template <class T>
void test_gain(int64_t members, int64_t batch, int64_t features, bool shared) {
  Random random(members * 1000 + batch * 10 + features);
  std::vector<T> numbers = normal<T>(random, (shared ? 1 : members) * batch * features);
  plant_unusual(numbers);
  const Values<T> input(numbers, "input");
  const Values<T> scale(random, members * features, 2);
  std::vector<T> expected(static_cast<size_t>(members * batch * features));
  pyens::GainParams p{};
  p.dtype = dtype_of<T>();
  p.ensemble_size = members;
  p.batch = batch;
  p.features = features;
  p.input_member_stride = shared ? 0 : batch * features;
  p.input_row_stride = features;
  p.scale_member_stride = features;
  p.input = input.cpu.data();
  p.scale = scale.cpu.data();
  p.output = expected.data();
  pyens::gain_cpu::run(p, 0, members * batch);
  p.input = input.gpu.data();
  p.scale = scale.gpu.data();
  expect_bits("gain", expected, [&](T* output) {
    p.output = output;
    return pyens::gain_cuda::run(p, nullptr);
  });
}

}  // namespace

int main() {
  for (const int64_t features : {1, 5, 33}) {
    for (const bool shared : {false, true}) {
      test_gain<float>(3, 7, features, shared);
      test_gain<double>(2, 3, features, shared);
      test_gain<pyens::BFloat16>(1, 4, features, shared);
      test_gain<pyens::Float16>(2, 1, features, shared);
    }
  }
  return finish();
}
