// mask_channels against plain loops, on buffers that end where the sanitizers watch.

#include "kernels/mask_channels.h"

#include <algorithm>
#include <cstdio>
#include <vector>

#include "masks.h"

namespace {

int failures = 0, problems = 0;

void check(bool condition, const char* what, int64_t a, int64_t b, int64_t c) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s (%lld, %lld, %lld)\n", what, static_cast<long long>(a),
              static_cast<long long>(b), static_cast<long long>(c));
}

template <class Word>
void test_mask_channels(int64_t rows, int64_t channels, int64_t inner, int64_t num_masks) {
  ++problems;
  std::mt19937_64 random(static_cast<uint64_t>(rows * 1000 + channels * 10 + inner));
  const Masks masks(num_masks, channels, random);
  const auto size = static_cast<size_t>(rows * channels * inner);
  // All bits set are a NaN: what is masked must not be multiplied.
  std::vector<Word> input(size, static_cast<Word>(~Word{0}));
  for (size_t i = 0; i < size; i += 2) input[i] = static_cast<Word>(random() | 1);

  std::vector<int64_t> groups, index;  // the mask of each row
  for (int64_t mask = 0; mask < num_masks; ++mask) {
    const int64_t length = rows / num_masks + (mask < rows % num_masks);
    for (int64_t i = 0; i < length; ++i) groups.push_back(mask);
  }
  for (int64_t row = 0; row < rows; ++row) {
    index.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(num_masks)));
  }
  for (const bool indexed : {false, true}) {
    const std::vector<int64_t>& mask_of = indexed ? index : groups;
    pyens::MaskChannelsParams params{};
    params.rows = rows;
    params.channels = channels;
    params.inner = inner;
    params.element_bytes = sizeof(Word);
    params.input = input.data();
    params.masks = masks.kept.get();
    params.num_masks = num_masks;
    params.index = indexed ? index.data() : nullptr;
    for (const int64_t step : {int64_t{1}, int64_t{3}, rows}) {
      std::vector<Word> output(size, Word{7});
      params.output = output.data();
      for (int64_t begin = 0; begin < rows; begin += step) {
        pyens::mask_channels_cpu::run(params, begin, std::min(rows, begin + step));
      }
      bool same = true;
      size_t i = 0;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = 0; c < channels; ++c) {
          const bool kept = masks(mask_of[static_cast<size_t>(row)], c);
          for (int64_t k = 0; k < inner; ++k, ++i) same &= output[i] == (kept ? input[i] : Word{0});
        }
      }
      check(same, "mask_channels", rows, channels, inner);
    }
  }
}

template <class Word>
void test_all_mask_channels() {
  for (const int64_t channels : {1, 2, 31, 33, 130}) {
    for (const int64_t inner : {1, 2, 33, 1024}) {
      for (const int64_t rows : {1, 4, 7}) {
        test_mask_channels<Word>(rows, channels, inner, 1 + (rows + channels) % 4);
      }
    }
  }
  test_mask_channels<Word>(2, 3, 1, 5);  // groups without a row
}

}  // namespace

int main() {
  test_all_mask_channels<uint16_t>();
  test_all_mask_channels<uint32_t>();
  test_all_mask_channels<uint64_t>();
  if (failures == 0) std::printf("ok: %d problems\n", problems);
  return failures != 0;
}
