// The CUDA kernels of masked_weights, run on the host, against the CPU's: the same bits.

#include "kernels/cuda/masked_weights.cu"

#include "emulated_test.h"

namespace {

using namespace emulated_test;
namespace cpu = pyens::masked_weights_cpu;
namespace gpu = pyens::masked_weights_cuda;

// Kept ones of each mask, ascending, -1 behind them; some masks keep fewer, one may keep nothing.
std::vector<int64_t> random_plan(Random& random, int64_t num_masks, int64_t of, int64_t* width) {
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
  std::vector<int64_t> row_plan = random_plan(random, num_masks, rows, &kept_rows);
  std::vector<int64_t> column_plan = random_plan(random, num_masks, columns, &kept_columns);
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
  cpu::run(on_cpu, sizeof(Word), weight.data(), expected.data(), 0, num_masks * on_cpu.kept_rows);
  const auto gather = [&](Word* output) {
    return gpu::run(on_gpu, sizeof(Word), gpu_weight.data(), output, nullptr);
  };
  expect_bits("masked_weights", expected, gather);

  std::vector<Real> grad_values = normal<Real>(random, kept);
  if (num_masks > 1) plant_unusual(grad_values);
  const Values<Real> grad(grad_values, "grad");
  std::vector<Real> sums(static_cast<size_t>(rows * columns));
  cpu::run_backward(on_cpu, dtype_of<Real>(), grad.cpu.data(), false, sums.data(), 0, rows);
  const auto scatter = [&](Real* output) {
    return gpu::run_backward(on_gpu, dtype_of<Real>(), grad.gpu.data(), output, nullptr);
  };
  expect_bits("masked_weights_backward", sums, scatter);

  if (!by_rows) return;
  // A row out of range: NaN when gathered, added to nothing.
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
