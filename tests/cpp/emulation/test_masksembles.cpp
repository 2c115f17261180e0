// The CUDA kernels of Masksembles, run on the host, against the CPU's: the same bits.

#include "kernels/cuda/masksembles.cu"

#include "emulated_test.h"

namespace {

using namespace emulated_test;
namespace cpu = pyens::masksembles_cpu;
namespace gpu = pyens::masksembles_cuda;

template <class Word>
std::vector<Word> random_words(Random& random, int64_t n) {
  std::vector<Word> words(static_cast<size_t>(n));
  for (Word& word : words) word = static_cast<Word>(random() | 1);
  return words;
}

// launch(output) under every order, against `expected`, bit by bit.
template <class T, class Launch>
void expect_bits(const std::string& what, const std::vector<T>& expected, const Launch& launch) {
  ++problems;
  for (const uint64_t seed : {1, 2, 3}) {
    emulation::set_seed(seed);
    Global<T> output(expected.size(), "output");
    const char* error = launch(output.data());
    if (error) return check(false, what + ": " + error);
    check(same_bits(output.host(), expected), what + ": other bits than on the CPU");
  }
}

// --- mask_channels -------------------------------------------------------------------------------

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
    cpu::mask_channels(p, 0, rows);
    p.input = gpu_input.data();
    p.masks = reinterpret_cast<const bool*>(gpu_masks.data());
    p.index = indexed ? gpu_index.data() : nullptr;
    const auto launch = [&](Word* output) {
      p.output = output;
      return gpu::mask_channels(p, nullptr);
    };
    expect_bits("mask_channels", expected, launch);
    if (!indexed) continue;
    // A row whose mask there is not becomes NaN, and no other.
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

// --- masked_weights ------------------------------------------------------------------------------

// Kept ones of each mask, ascending, -1 behind them; some masks keep fewer, one may keep nothing.
std::vector<int64_t> draw_plan(Random& random, int64_t num_masks, int64_t of, int64_t* width) {
  *width = (of + 1) / 2;
  std::vector<int64_t> plan;
  for (int64_t mask = 0; mask < num_masks; ++mask) {
    std::vector<int64_t> kept;
    for (int64_t i = 0; i < of; ++i) {
      if (static_cast<int64_t>(kept.size()) < *width && random() % 3 > 0) kept.push_back(i);
    }
    if (mask == 1) kept.clear();
    kept.resize(static_cast<size_t>(*width), -1);
    plan.insert(plan.end(), kept.begin(), kept.end());
  }
  return plan;
}

template <class Word, class Real>
void test_masked_weights(int64_t num_masks, int64_t rows, int64_t columns, bool by_rows,
                         bool by_columns) {
  Random random(rows * 100 + columns);
  pyens::MaskedWeightsParams on_cpu{};
  on_cpu.num_masks = num_masks;
  on_cpu.rows = on_cpu.kept_rows = rows;
  on_cpu.columns = on_cpu.kept_columns = columns;
  int64_t kept_rows, kept_columns;
  std::vector<int64_t> row_plan = draw_plan(random, num_masks, rows, &kept_rows);
  std::vector<int64_t> column_plan = draw_plan(random, num_masks, columns, &kept_columns);
  Global<int64_t> gpu_rows(row_plan, "row_index"), gpu_columns(column_plan, "column_index");
  if (by_rows) {
    on_cpu.row_index = row_plan.data();
    on_cpu.kept_rows = kept_rows;
  }
  if (by_columns) {
    on_cpu.column_index = column_plan.data();
    on_cpu.kept_columns = kept_columns;
  }
  pyens::MaskedWeightsParams on_gpu = on_cpu;
  if (by_rows) on_gpu.row_index = gpu_rows.data();
  if (by_columns) on_gpu.column_index = gpu_columns.data();
  const int64_t kept = num_masks * on_cpu.kept_rows * on_cpu.kept_columns;

  const std::vector<Word> weight = random_words<Word>(random, rows * columns);
  const Global<Word> gpu_weight(weight, "weight");
  std::vector<Word> expected(static_cast<size_t>(kept));
  cpu::masked_weights(on_cpu, sizeof(Word), weight.data(), expected.data(), 0,
                      num_masks * on_cpu.kept_rows);
  const auto gather = [&](Word* output) {
    return gpu::masked_weights(on_gpu, sizeof(Word), gpu_weight.data(), output, nullptr);
  };
  expect_bits("masked_weights", expected, gather);

  const Values<Real> grad(random, kept);
  std::vector<Real> sums(static_cast<size_t>(rows * columns));
  constexpr bool kWide = sizeof(Real) == 8;
  cpu::masked_weights_backward(on_cpu, kWide, grad.cpu.data(), sums.data(), 0, rows);
  const auto scatter = [&](Real* output) {
    return gpu::masked_weights_backward(on_gpu, kWide, grad.gpu.data(), output, nullptr);
  };
  expect_bits("masked_weights_backward", sums, scatter);

  if (!by_rows) return;
  // A row that there is not: NaN when gathered, added to nothing.
  row_plan[0] = rows;
  Global<int64_t> gpu_wrong(row_plan, "row_index");
  on_gpu.row_index = gpu_wrong.data();
  std::fill(expected.begin(), expected.begin() + on_gpu.kept_columns, static_cast<Word>(~Word{0}));
  expect_bits("masked_weights, row out of range", expected, gather);
  Global<Real> output(sums.size(), "output");
  check(scatter(output.data()) == nullptr, "masked_weights_backward, row out of range");
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
  for (const int64_t num_masks : {1, 2, 5}) {
    for (const int64_t rows : {1, 7, 33}) {
      for (const int which : {0, 1, 2, 3}) {
        const int64_t columns = rows == 7 ? 300 : 16;
        test_masked_weights<uint16_t, float>(num_masks, rows, columns, which & 1, which & 2);
        test_masked_weights<uint32_t, float>(num_masks, rows, columns, which & 1, which & 2);
        test_masked_weights<uint64_t, double>(num_masks, rows, columns, which & 1, which & 2);
      }
    }
  }
  return finish();
}
