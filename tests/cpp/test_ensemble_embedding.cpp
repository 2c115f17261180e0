// The embedding kernels against plain loops in double, on buffers that end where the sanitizers
// watch.

#include "kernels/ensemble_embedding.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

namespace {

using pyens::DType;
namespace cpu = pyens::ensemble_embedding_cpu;

int failures = 0, problems = 0;

void check(bool condition, const char* what, int64_t e, int64_t b) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s (E %lld, B %lld)\n", what, static_cast<long long>(e),
              static_cast<long long>(b));
}

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

// Runs a kernel with its work cut into pieces of `step` items.
template <class Params>
bool run(const Params& params, int64_t step) {
  const int64_t items = cpu::work_items(params);
  const size_t bytes = (cpu::scratch_bytes(params) + 63) / 64 * 64;
  bool in_range = true;
  for (int64_t begin = 0; begin < items; begin += step) {
    const std::unique_ptr<void, FreeDeleter> scratch(std::aligned_alloc(64, bytes));
    if (bytes > 0) std::memset(scratch.get(), 0xff, bytes);  // NaN, if read before it is written
    in_range &= cpu::run(params, begin, std::min(items, begin + step), scratch.get());
  }
  return in_range;
}

template <class T>
DType dtype_of() {
  return sizeof(T) == 8 ? DType::float64 : sizeof(T) == 4 ? DType::float32 : DType::bfloat16;
}
template <class T>
double value_of(T x) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof(f));
    return static_cast<double>(f);
  } else {
    return static_cast<double>(x);
  }
}
// Of few bits, so that bfloat16 (a uint16_t here) holds it and sums of some are exact.
template <class T>
T small_value(std::mt19937_64& random) {
  const float value = static_cast<float>(static_cast<int>(random() % 15) - 7) / 8;
  if constexpr (sizeof(T) == 2) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return static_cast<T>(bits >> 16);
  } else {
    return static_cast<T>(value);
  }
}

struct Table {
  int64_t num_embeddings, dim;
};

template <class T>
struct Problem {
  int64_t e, b;
  std::vector<Table> tables;
  int64_t numeric_features;
  bool shared_index, shared_numeric;
  int64_t features = 0, columns;
  std::vector<std::vector<T>> weights;
  std::vector<T> numeric, grad;
  std::vector<int64_t> index;  // [E or 1, B, columns]

  Problem(int64_t e_, int64_t b_, std::vector<Table> tables_, int64_t f, bool shared_i,
          bool shared_n)
      : e(e_),
        b(b_),
        tables(std::move(tables_)),
        numeric_features(f),
        shared_index(shared_i),
        shared_numeric(shared_n),
        columns(static_cast<int64_t>(tables.size())) {
    std::mt19937_64 random(static_cast<uint64_t>(e * 1000 + b));
    const auto fill = [&](int64_t n) {
      std::vector<T> values(static_cast<size_t>(n));
      for (T& value : values) value = small_value<T>(random);
      return values;
    };
    for (const Table& table : tables) {
      weights.push_back(fill(e * table.num_embeddings * table.dim));
      features += table.dim;
    }
    features += f;
    numeric = fill((shared_numeric ? 1 : e) * b * f);
    grad = fill(e * b * features);
    for (int64_t i = 0; i < (shared_index ? 1 : e) * b; ++i) {
      for (const Table& table : tables) {
        index.push_back(
            static_cast<int64_t>(random() % static_cast<uint64_t>(table.num_embeddings)));
      }
    }
  }

  int64_t row(int64_t m, int64_t example, int64_t t) const {
    const int64_t member = shared_index ? 0 : m;
    return index[static_cast<size_t>((member * b + example) * columns + t)];
  }

  // `grads` is where the scatter writes; empty for the gather.
  std::vector<pyens::EmbeddingTable> entries(std::vector<std::vector<T>>& grads) const {
    std::vector<pyens::EmbeddingTable> result;
    int64_t offset = 0;
    for (size_t t = 0; t < tables.size(); ++t) {
      pyens::EmbeddingTable entry{};
      entry.weight = weights[t].data();
      entry.grad = grads.empty() ? nullptr : grads[t].data();
      entry.index = index.data() + t;
      entry.num_embeddings = tables[t].num_embeddings;
      entry.dim = tables[t].dim;
      entry.member_stride = tables[t].num_embeddings * tables[t].dim;
      entry.row_stride = tables[t].dim;
      entry.offset = offset;
      offset += tables[t].dim;
      result.push_back(entry);
    }
    return result;
  }

  bool gather(int64_t step, std::vector<T>& out) const {
    out.assign(static_cast<size_t>(e * b * features), T(-1));
    std::vector<std::vector<T>> none;
    const auto table_entries = entries(none);
    pyens::EmbeddingGather params{};
    params.dtype = dtype_of<T>();
    params.ensemble_size = e;
    params.batch = b;
    params.num_tables = columns;
    params.tables = table_entries.data();
    params.index_member_stride = shared_index ? 0 : b * columns;
    params.index_row_stride = columns;
    params.numeric = numeric.data();
    params.numeric_features = numeric_features;
    params.numeric_member_stride = shared_numeric ? 0 : b * numeric_features;
    params.numeric_row_stride = numeric_features;
    params.features = out.data();
    params.num_features = features;
    return run(params, step);
  }

  bool scatter(int64_t step, std::vector<std::vector<T>>& grads,
               std::vector<T>& numeric_grad) const {
    grads.clear();
    for (const auto& weight : weights) grads.emplace_back(weight.size(), T(-1));
    numeric_grad.assign(numeric.size(), T(-1));
    const auto table_entries = entries(grads);
    pyens::EmbeddingScatter params{};
    params.dtype = dtype_of<T>();
    params.ensemble_size = e;
    params.batch = b;
    params.num_tables = columns;
    params.tables = table_entries.data();
    params.index_member_stride = shared_index ? 0 : b * columns;
    params.index_row_stride = columns;
    params.grad = grad.data();
    params.grad_member_stride = b * features;
    params.grad_row_stride = features;
    params.numeric_grad = numeric_features > 0 ? numeric_grad.data() : nullptr;
    params.numeric_features = numeric_features;
    params.numeric_offset = features - numeric_features;
    params.numeric_shared = shared_numeric;
    return run(params, step);
  }

  void test() {
    ++problems;
    std::vector<T> out, again;
    check(gather(1 << 20, out), "gather: indices in range", e, b);
    size_t i = 0;
    bool same = true;
    for (int64_t m = 0; m < e; ++m) {
      for (int64_t example = 0; example < b; ++example) {
        for (size_t t = 0; t < tables.size(); ++t) {
          const int64_t r = row(m, example, static_cast<int64_t>(t));
          for (int64_t d = 0; d < tables[t].dim; ++d) {
            const int64_t at = (m * tables[t].num_embeddings + r) * tables[t].dim + d;
            same &= out[i++] == weights[t][static_cast<size_t>(at)];
          }
        }
        for (int64_t f = 0; f < numeric_features; ++f) {
          const int64_t at = ((shared_numeric ? 0 : m) * b + example) * numeric_features + f;
          same &= out[i++] == numeric[static_cast<size_t>(at)];
        }
      }
    }
    check(same, "gather: values", e, b);
    check(gather(1, again) && again == out, "gather: same bits for any split of the work", e, b);

    std::vector<std::vector<T>> grads, grads_again;
    std::vector<T> numeric_grad, numeric_again;
    check(scatter(1 << 20, grads, numeric_grad), "scatter: indices in range", e, b);
    std::vector<std::vector<double>> sums;
    for (const auto& weight : weights) sums.emplace_back(weight.size());
    std::vector<double> numeric_sums(numeric.size());
    i = 0;
    for (int64_t m = 0; m < e; ++m) {
      for (int64_t example = 0; example < b; ++example) {
        for (size_t t = 0; t < tables.size(); ++t) {
          const int64_t r = row(m, example, static_cast<int64_t>(t));
          for (int64_t d = 0; d < tables[t].dim; ++d) {
            const int64_t at = (m * tables[t].num_embeddings + r) * tables[t].dim + d;
            sums[t][static_cast<size_t>(at)] += value_of(grad[i++]);
          }
        }
        for (int64_t f = 0; f < numeric_features; ++f) {
          const int64_t at = ((shared_numeric ? 0 : m) * b + example) * numeric_features + f;
          numeric_sums[static_cast<size_t>(at)] += value_of(grad[i++]);
        }
      }
    }
    // Sums of eighths are exact but for the rounding to bfloat16.
    const auto agree = [](const std::vector<T>& got, const std::vector<double>& expected) {
      for (size_t k = 0; k < got.size(); ++k) {
        const double error = std::abs(value_of(got[k]) - expected[k]);
        if (!(error <= (sizeof(T) == 2 ? std::abs(expected[k]) / 256 : 0))) return false;
      }
      return true;
    };
    for (size_t t = 0; t < tables.size(); ++t) {
      check(agree(grads[t], sums[t]), "scatter: values", e, b);
    }
    check(agree(numeric_grad, numeric_sums), "scatter: numeric values", e, b);
    check(scatter(1, grads_again, numeric_again) && grads_again == grads &&
              numeric_again == numeric_grad,
          "scatter: same bits for any split of the work", e, b);

    // The same sums row by row, of the first table.
    std::vector<pyens::EmbeddingRow> rows;
    std::vector<int64_t> order;
    for (int64_t m = 0; m < e; ++m) {
      for (int64_t r = 0; r < tables[0].num_embeddings; ++r) {
        const auto begin = static_cast<int64_t>(order.size());
        for (int64_t example = 0; example < b; ++example) {
          if (row(m, example, 0) == r) order.push_back(example);
        }
        rows.push_back({m, begin, static_cast<int64_t>(order.size())});
      }
    }
    std::vector<T> row_sums(weights[0].size(), T(-1));
    pyens::EmbeddingRowSums params{};
    params.dtype = dtype_of<T>();
    params.num_rows = static_cast<int64_t>(rows.size());
    params.dim = tables[0].dim;
    params.rows = rows.data();
    params.order = order.data();
    params.grad = grad.data();
    params.grad_member_stride = b * features;
    params.grad_row_stride = features;
    params.sums = row_sums.data();
    run(params, 3);
    check(row_sums == grads[0], "row sums: the bits of the scatter", e, b);

    for (int64_t wrong : {int64_t{-1}, tables.back().num_embeddings, int64_t{1} << 62}) {
      if (index.empty()) break;
      std::swap(index.back(), wrong);
      check(!gather(1 << 20, again), "gather: index out of range", e, b);
      check(!scatter(1 << 20, grads_again, numeric_again), "scatter: index out of range", e, b);
      std::swap(index.back(), wrong);
    }
  }
};

template <class T>
void test_all() {
  const std::vector<std::vector<Table>> table_sets = {
      {{1, 1}},
      {{5, 2}, {9, 3}, {2, 4}},
      {{40, 8}, {30, 8}, {7, 3}, {21, 5}},
      {{11, 7}, {3, 6}, {4, 9}, {2, 17}, {3, 33}},
      {{9001, 5}, {2, 70000}},
  };
  int i = 0;
  for (const auto& tables : table_sets) {
    const bool large = tables[0].num_embeddings > 9000;
    for (const int64_t batch : {0, 1, 63, 64, 65, 200}) {
      if (large && batch > 1) continue;
      const int64_t members = large ? 2 : 1 + i % 4 + (i % 5 == 0 ? 20 : 0);
      Problem<T>(members, batch, tables, i % 3 * 5, i % 2 == 0, i % 4 < 2).test();
      ++i;
    }
  }
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  test_all<uint16_t>();  // bfloat16
  if (failures == 0) std::printf("ok: %d problems\n", problems);
  return failures != 0;
}
