// masked_weights and its transpose against plain loops, on buffers that end where the sanitizers watch.

#include "kernels/masked_weights.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <vector>

#include "masks.h"

namespace {

namespace cpu = pyens::masked_weights_cpu;

int failures = 0, problems = 0;

void check(bool condition, const char* what, int64_t a, int64_t b, int64_t c) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s (%lld, %lld, %lld)\n", what, static_cast<long long>(a),
              static_cast<long long>(b), static_cast<long long>(c));
}

// The kept ones of each mask, ascending, padded with -1 to `width`.
std::vector<int64_t> plan(const Masks& masks, int64_t& width) {
  std::vector<std::vector<int64_t>> kept(static_cast<size_t>(masks.num_masks));
  width = 1;
  for (int64_t mask = 0; mask < masks.num_masks; ++mask) {
    auto& of_mask = kept[static_cast<size_t>(mask)];
    for (int64_t c = 0; c < masks.channels; ++c) {
      if (masks(mask, c)) of_mask.push_back(c);
    }
    width = std::max(width, static_cast<int64_t>(of_mask.size()));
  }
  std::vector<int64_t> result;
  for (auto& of_mask : kept) {
    of_mask.resize(static_cast<size_t>(width), -1);
    result.insert(result.end(), of_mask.begin(), of_mask.end());
  }
  return result;
}

struct Problem {
  int64_t rows, columns;
  bool by_rows, by_columns;
  std::mt19937_64 random;
  Masks row_masks, column_masks;
  std::vector<int64_t> row_index, column_index;
  pyens::MaskedWeightsParams params{};

  Problem(int64_t num_masks, int64_t rows_, int64_t columns_, bool by_rows_, bool by_columns_,
          bool shuffled)
      : rows(rows_),
        columns(columns_),
        by_rows(by_rows_),
        by_columns(by_columns_),
        random(static_cast<uint64_t>(rows * 100 + columns)),
        row_masks(num_masks, rows, random),
        column_masks(num_masks, columns, random) {
    params.num_masks = num_masks;
    params.rows = params.kept_rows = rows;
    params.columns = params.kept_columns = columns;
    if (by_rows) {
      row_index = plan(row_masks, params.kept_rows);
      params.row_index = row_index.data();
    }
    if (by_columns) {
      column_index = plan(column_masks, params.kept_columns);
      params.column_index = column_index.data();
    }
    if (!shuffled) return;  // as pyens plans them
    std::shuffle(row_index.begin(), row_index.end(), random);
    std::shuffle(column_index.begin(), column_index.end(), random);
  }

  int64_t row_at(int64_t mask, int64_t r) const {
    return by_rows ? row_index[static_cast<size_t>(mask * params.kept_rows + r)] : r;
  }
  int64_t column_at(int64_t mask, int64_t c) const {
    return by_columns ? column_index[static_cast<size_t>(mask * params.kept_columns + c)] : c;
  }
  // visit(position among the gathered, position in the matrix or -1)
  template <class Visit>
  void for_each(const Visit& visit) const {
    int64_t i = 0;
    for (int64_t mask = 0; mask < params.num_masks; ++mask) {
      for (int64_t r = 0; r < params.kept_rows; ++r) {
        for (int64_t c = 0; c < params.kept_columns; ++c, ++i) {
          const int64_t row = row_at(mask, r), column = column_at(mask, c);
          visit(static_cast<size_t>(i), row < 0 || column < 0 ? -1 : row * columns + column);
        }
      }
    }
  }

  template <class Word>
  void test_gather() {
    ++problems;
    std::vector<Word> weight(static_cast<size_t>(rows * columns));
    for (Word& value : weight) value = static_cast<Word>(random() | 1);
    const int64_t items = params.num_masks * params.kept_rows;
    for (const int64_t step : {int64_t{1}, int64_t{5}, items}) {
      std::vector<Word> output(static_cast<size_t>(items * params.kept_columns), Word{7});
      for (int64_t begin = 0; begin < items; begin += step) {
        cpu::run(params, sizeof(Word), weight.data(), output.data(), begin,
                 std::min(items, begin + step));
      }
      bool same = true;
      for_each([&](size_t i, int64_t at) {
        same &= output[i] == (at < 0 ? Word{0} : weight[static_cast<size_t>(at)]);
      });
      check(same, "masked_weights", params.num_masks, rows, columns);
    }
  }

  template <class Real>
  void test_scatter() {
    ++problems;
    const int64_t items = params.num_masks * params.kept_rows;
    std::vector<Real> gathered(static_cast<size_t>(items * params.kept_columns));
    // What pads must not be read: NaN there. Eighths, whose sums are exact.
    for_each([&](size_t i, int64_t at) {
      gathered[i] = at < 0 ? std::numeric_limits<Real>::quiet_NaN()
                           : static_cast<Real>(static_cast<int>(random() % 31) - 15) / 8;
    });
    std::vector<Real> expected(static_cast<size_t>(rows * columns), Real{0});
    for_each([&](size_t i, int64_t at) {
      if (at >= 0) expected[static_cast<size_t>(at)] += gathered[i];
    });
    for (const int64_t step : {int64_t{1}, int64_t{5}, rows}) {
      const auto dtype = sizeof(Real) == 8 ? pyens::DType::float64 : pyens::DType::float32;
      std::vector<Real> weight(expected.size(), std::numeric_limits<Real>::quiet_NaN());
      for (int64_t begin = 0; begin < rows; begin += step) {
        cpu::run_backward(params, dtype, gathered.data(), false, weight.data(), begin,
                          std::min(rows, begin + step));
      }
      check(weight == expected, "masked_weights_backward", params.num_masks, rows, columns);
      // Once more to what is there; eighths, whose sums are exact.
      cpu::run_backward(params, dtype, gathered.data(), true, weight.data(), 0, rows);
      bool twice = true;
      for (size_t i = 0; i < weight.size(); ++i) twice &= weight[i] == 2 * expected[i];
      check(twice, "masked_weights_backward, added", params.num_masks, rows, columns);
    }
  }
};

void test_all_masked_weights() {
  for (const int64_t num_masks : {1, 2, 5}) {
    for (const int64_t rows : {1, 7, 33}) {
      for (const int64_t columns : {1, 16, 65, 200}) {
        for (const int which : {0, 1, 2, 3, 7}) {
          Problem problem(num_masks, rows, columns, which & 1, which & 2, which & 4);
          problem.test_gather<uint16_t>();
          problem.test_gather<uint32_t>();
          problem.test_gather<uint64_t>();
          problem.test_scatter<float>();
          problem.test_scatter<double>();
        }
      }
    }
  }
}

}  // namespace

int main() {
  test_all_masked_weights();
  if (failures == 0) std::printf("ok: %d problems\n", problems);
  return failures != 0;
}
