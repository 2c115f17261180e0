// The CUDA kernel of mask_channels, run on the host, against the CPU's: the same bits.

#include "kernels/cuda/mask_channels.cu"

#include "emulated_test.h"

namespace {

using namespace emulated_test;

template <class Word>
void test_mask_channels(int64_t rows, int64_t channels, int64_t inner, int64_t num_masks) {
  Random random(rows * 1000 + channels * 10 + inner);
  const std::vector<Word> input = random_words<Word>(random, rows * channels * inner);
  std::vector<uint8_t> mask_bytes(static_cast<size_t>(num_masks * channels));
  for (uint8_t& kept : mask_bytes) kept = random() % 3 > 0;
  std::vector<int64_t> index;
  for (int64_t row = 0; row < rows; ++row) index.push_back(static_cast<int64_t>(random()) & 1);
  for (int64_t& mask : index) mask %= num_masks;
  const Global<Word> gpu_input(input, "input");
  Global<uint8_t> gpu_masks(mask_bytes, "masks");
  Global<int64_t> gpu_index(index, "index");
  for (const bool indexed : {false, true}) {
    pyens::MaskChannelsParams p{};
    p.rows = rows;
    p.channels = channels;
    p.inner = inner;
    p.element_bytes = sizeof(Word);
    p.input = input.data();
    p.masks = reinterpret_cast<const bool*>(mask_bytes.data());
    p.num_masks = num_masks;
    p.index = indexed ? index.data() : nullptr;
    std::vector<Word> expected(input.size());
    p.output = expected.data();
    pyens::mask_channels_cpu::run(p, 0, rows);
    p.input = gpu_input.data();
    p.masks = reinterpret_cast<const bool*>(gpu_masks.data());
    p.index = indexed ? gpu_index.data() : nullptr;
    const auto launch = [&](Word* output) {
      p.output = output;
      return pyens::mask_channels_cuda::run(p, nullptr);
    };
    expect_bits("mask_channels", expected, launch);
    if (!indexed) continue;
    // A row whose index is out of range becomes NaN, and no other.
    for (const int64_t wrong : {int64_t{-1}, num_masks}) {
      std::vector<int64_t> wrong_index = index;
      wrong_index.back() = wrong;
      Global<int64_t> gpu_wrong(wrong_index, "index");
      p.index = gpu_wrong.data();
      std::vector<Word> with_nan = expected;
      std::fill(with_nan.end() - channels * inner, with_nan.end(), static_cast<Word>(~Word{0}));
      expect_bits("mask_channels, index out of range", with_nan, launch);
    }
  }
}

}  // namespace

int main() {
  for (const int64_t channels : {1, 5, 33}) {
    for (const int64_t inner : {1, 3, 130}) {
      for (const int64_t rows : {1, 7}) {
        test_mask_channels<uint16_t>(rows, channels, inner, 3);
        test_mask_channels<uint32_t>(rows, channels, inner, 1);
        test_mask_channels<uint64_t>(rows, channels, inner, 2);
      }
    }
  }
  test_mask_channels<uint32_t>(2, 3, 1, 5);  // groups without a row
  return finish();
}
