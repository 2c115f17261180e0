// gain against plain loops, on buffers that end where the sanitizers watch.

#include "kernels/gain.h"

#include <algorithm>
#include <cstdio>
#include <vector>

namespace {

int failures = 0, problems = 0;

template <class T>
void test_gain(int64_t members, int64_t batch, int64_t features, bool shared) {
  ++problems;
  const int64_t member_size = batch * features;
  std::vector<T> input(static_cast<size_t>((shared ? 1 : members) * member_size));
  std::vector<T> scale(static_cast<size_t>(members * features)), expected;
  for (size_t i = 0; i < input.size(); ++i) input[i] = static_cast<T>(i) - T(7.25);
  for (size_t i = 0; i < scale.size(); ++i) scale[i] = T(1) / static_cast<T>(i + 3);
  for (int64_t i = 0; i < members * member_size; ++i) {
    const int64_t m = i / member_size, d = i % features;
    expected.push_back(input[static_cast<size_t>(shared ? i % member_size : i)] *
                       scale[static_cast<size_t>(m * features + d)]);
  }
  pyens::GainParams p{};
  p.dtype = sizeof(T) == 4 ? pyens::DType::float32 : pyens::DType::float64;
  p.ensemble_size = members;
  p.batch = batch;
  p.features = features;
  p.input = input.data();
  p.input_member_stride = shared ? 0 : member_size;
  p.input_row_stride = features;
  p.scale = scale.data();
  p.scale_member_stride = features;
  const int64_t rows = members * batch;
  for (const int64_t step : {int64_t{1}, int64_t{3}, rows}) {  // any split of the work
    std::vector<T> output(expected.size());
    p.output = output.data();
    for (int64_t begin = 0; begin < rows; begin += step) {
      pyens::gain_cpu::run(p, begin, std::min(rows, begin + step));
    }
    if (output == expected) continue;
    ++failures;
    std::printf("FAILED: gain (E %d, B %d, D %d)\n", static_cast<int>(members),
                static_cast<int>(batch), static_cast<int>(features));
  }
}

}  // namespace

int main() {
  for (const int64_t features : {1, 3, 4, 7, 9, 16, 33}) {
    for (const bool shared : {false, true}) {
      test_gain<float>(3, 5, features, shared);
      test_gain<double>(2, 1, features, shared);
    }
  }
  if (failures == 0) std::printf("ok: %d problems\n", problems);
  return failures != 0;
}
