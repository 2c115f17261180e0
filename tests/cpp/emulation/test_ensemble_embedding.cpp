// The CUDA kernels of the embeddings per member, run on the host, against the CPU's: the same bits.

#include "kernels/cuda/ensemble_embedding.cu"

#include <numeric>

#include "emulated_test.h"

namespace {

using namespace emulated_test;
namespace cpu = pyens::ensemble_embedding_cpu;
namespace gpu = pyens::ensemble_embedding_cuda;

template <class Params>
bool run_cpu(const Params& p) {
  const Scratch scratch(cpu::scratch_bytes(p));
  return cpu::run(p, 0, cpu::work_items(p), scratch.get());
}

// launch(output) under every order, against `expected`, bit by bit.
template <class T, class Launch>
void expect_bits(const std::string& what, const std::vector<T>& expected, const T* before,
                 const Launch& launch) {
  ++problems;
  for (const uint64_t seed : {1, 2, 3}) {
    emulation::set_seed(seed);
    Global<T> output(std::vector<T>(before, before + expected.size()), "output");
    const char* error = launch(output.data());
    if (error) return check(false, what + ": " + error);
    check(same_bits(output.host(), expected), what + ": other bits than on the CPU");
  }
}

template <class T>
struct Problem {
  int64_t members, batch, numeric;
  std::vector<int64_t> rows, dims;  // of the tables
  bool shared;                      // the index and the numbers
  Random random;
  int64_t features;
  std::unique_ptr<Values<int64_t>> index;  // [B, T] or [E, B, T]

  Problem(int64_t e, int64_t b, std::vector<int64_t> of_rows, std::vector<int64_t> of_dims,
          int64_t f, bool is_shared)
      : members(e),
        batch(b),
        numeric(f),
        rows(std::move(of_rows)),
        dims(std::move(of_dims)),
        shared(is_shared),
        random(static_cast<uint64_t>(e * 100 + b)),
        features(std::accumulate(dims.begin(), dims.end(), f)) {
    std::vector<int64_t> values;
    for (int64_t i = 0; i < (shared ? 1 : members) * batch; ++i) {
      for (const int64_t n : rows) {
        values.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(n)));
      }
    }
    index = std::make_unique<Values<int64_t>>(values, "index");
  }

  int64_t tables() const { return static_cast<int64_t>(dims.size()); }
  int64_t index_member_stride() const { return shared ? 0 : batch * tables(); }

  void test_gather() {
    constexpr int64_t kPad = 2;  // rows lie further apart than they are long
    std::vector<std::unique_ptr<Values<T>>> weights;
    std::vector<T> number_values =
        normal<T>(random, (shared ? 1 : members) * batch * (numeric + kPad));
    plant_unusual(number_values);
    const Values<T> numbers(number_values, "numeric");
    std::vector<pyens::EmbeddingTable> on_cpu, on_gpu;
    int64_t offset = 0;
    for (size_t t = 0; t < dims.size(); ++t) {
      const int64_t row = dims[t] + kPad;
      std::vector<T> rows_of_table = normal<T>(random, members * rows[t] * row);
      plant_unusual(rows_of_table);
      weights.push_back(std::make_unique<Values<T>>(rows_of_table, "weight"));
      pyens::EmbeddingTable table{};
      table.num_embeddings = rows[t];
      table.dim = dims[t];
      table.member_stride = rows[t] * row;
      table.row_stride = row;
      table.offset = offset;
      offset += dims[t];
      table.weight = weights[t]->cpu.data();
      table.index = index->cpu.data() + t;
      on_cpu.push_back(table);
      table.weight = weights[t]->gpu.data();
      table.index = index->gpu.data() + t;
      on_gpu.push_back(table);
    }
    pyens::EmbeddingGather p{};
    p.dtype = dtype_of<T>();
    p.ensemble_size = members;
    p.batch = batch;
    p.num_tables = tables();
    p.tables = on_cpu.data();
    p.index_member_stride = index_member_stride();
    p.index_row_stride = tables();
    p.numeric = numbers.cpu.data();
    p.numeric_features = numeric;
    p.numeric_row_stride = numeric + kPad;
    p.numeric_member_stride = shared ? 0 : batch * p.numeric_row_stride;
    p.num_features = features;
    std::vector<T> expected(static_cast<size_t>(members * batch * features)), before = expected;
    p.features = expected.data();
    check(run_cpu(p), "the CPU's gather");
    p.tables = on_gpu.data();
    p.numeric = numbers.gpu.data();
    const auto launch = [&](T* output) {
      p.features = output;
      return gpu::run(p, nullptr);
    };
    expect_bits("gather", expected, before.data(), launch);
    if (!shared || batch == 0) return;
    // An index out of range: NaN in its columns of its example, and nowhere else.
    for (const int64_t wrong : {int64_t{-1}, rows[0]}) {
      std::vector<int64_t> values = index->cpu;
      values[static_cast<size_t>((batch - 1) * tables())] = wrong;
      const Global<int64_t> wrong_index(values, "index");
      for (size_t t = 0; t < dims.size(); ++t) on_gpu[t].index = wrong_index.data() + t;
      std::vector<T> with_nan = expected;
      for (int64_t m = 0; m < members; ++m) {
        T* from = with_nan.data() + ((m + 1) * batch - 1) * features;
        std::memset(static_cast<void*>(from), 0xff, static_cast<size_t>(dims[0]) * sizeof(T));
      }
      expect_bits("gather, index out of range", with_nan, before.data(), launch);
    }
  }

  void test_scatter(bool with_unusual) {
    std::vector<T> grad_values = normal<T>(random, members * batch * features);
    if (with_unusual) plant_unusual(grad_values);
    const Values<T> grad(grad_values, "grad");
    int64_t offset = 0;
    for (size_t t = 0; t < dims.size(); ++t) {
      const auto size = static_cast<size_t>(members * rows[t] * dims[t]);
      std::vector<T> expected(size);
      pyens::EmbeddingTable table{};
      table.grad = expected.data();
      table.index = index->cpu.data() + t;
      table.num_embeddings = rows[t];
      table.dim = dims[t];
      table.offset = offset;
      pyens::EmbeddingScatter p{};
      p.dtype = dtype_of<T>();
      p.ensemble_size = members;
      p.batch = batch;
      p.num_tables = 1;
      p.tables = &table;
      p.index_member_stride = index_member_stride();
      p.index_row_stride = tables();
      p.grad = grad.cpu.data();
      p.grad_member_stride = batch * features;
      p.grad_row_stride = features;
      check(run_cpu(p), "the CPU's scatter");
      test_sorted_sums(t, grad.gpu.data() + offset, expected);
      offset += dims[t];
    }
    if (numeric == 0) return;
    for (const bool summed : {false, true}) {
      std::vector<T> expected(static_cast<size_t>((summed ? 1 : members) * batch * numeric));
      const std::vector<T> before = expected;
      pyens::EmbeddingScatter p{};
      p.dtype = dtype_of<T>();
      p.ensemble_size = members;
      p.batch = batch;
      p.grad = grad.cpu.data();
      p.grad_member_stride = batch * features;
      p.grad_row_stride = features;
      p.numeric_grad = expected.data();
      p.numeric_features = numeric;
      p.numeric_offset = features - numeric;
      p.numeric_shared = summed;
      check(run_cpu(p), "the CPU's numeric gradient");
      p.grad = grad.gpu.data();
      expect_bits("numeric gradient", expected, before.data(), [&](T* output) {
        p.numeric_grad = output;
        return gpu::run_numeric(p, nullptr);
      });
    }
  }

  // Of table t, whose columns of the gradient begin at `grad`; one index is beyond either end.
  void test_sorted_sums(size_t t, const T* grad, const std::vector<T>& expected) {
    const int64_t lists = shared ? 1 : members;
    std::vector<int64_t> sorted, order, starts;
    for (int64_t list = 0; list < lists; ++list) {
      std::vector<int64_t> examples(static_cast<size_t>(batch));
      std::iota(examples.begin(), examples.end(), 0);
      const auto row_of = [&](int64_t b) {
        return index->cpu[static_cast<size_t>((list * batch + b) * tables()) + t];
      };
      std::stable_sort(examples.begin(), examples.end(),
                       [&](int64_t a, int64_t b) { return row_of(a) < row_of(b); });
      for (const int64_t b : examples) sorted.push_back(row_of(b));
      order.insert(order.end(), examples.begin(), examples.end());
    }
    const Global<int64_t> gpu_sorted(sorted, "sorted"), gpu_order(order, "order");
    pyens::EmbeddingSortedSums p{};
    p.dtype = dtype_of<T>();
    p.ensemble_size = members;
    p.batch = batch;
    p.num_embeddings = rows[t];
    p.dim = dims[t];
    p.sorted = gpu_sorted.data();
    p.order = gpu_order.data();
    p.sorted_member_stride = shared ? 0 : batch;
    p.grad = grad;
    p.grad_member_stride = batch * features;
    p.grad_row_stride = features;
    const std::vector<T> zeros(expected.size());
    const auto launch = [&](T* output) {
      p.sums = output;
      return gpu::run(p, nullptr);
    };
    expect_bits("sorted sums", expected, zeros.data(), launch);

    // The same rows alone, one behind the other.
    std::vector<T> values;
    for (int64_t m = 0; m < members; ++m) {
      const int64_t list = shared ? 0 : m * batch;
      for (int64_t i = 0; i < batch; ++i) {
        const int64_t row = sorted[static_cast<size_t>(list + i)];
        if (i > 0 && sorted[static_cast<size_t>(list + i - 1)] == row) continue;
        starts.push_back(m * batch + i);
        const auto from = expected.begin() + (m * rows[t] + row) * dims[t];
        values.insert(values.end(), from, from + dims[t]);
      }
    }
    const Global<int64_t> gpu_starts(starts, "rows");
    p.rows = gpu_starts.data();
    p.num_rows = static_cast<int64_t>(starts.size());
    const std::vector<T> nothing(values.size());
    expect_bits("sums of rows", values, nothing.data(), launch);

    // Rows that there are not are passed over: nothing is written beyond the table.
    if (batch < 3) return;
    std::vector<int64_t> wrong = sorted;
    for (int64_t list = 0; list < lists; ++list) {
      wrong[static_cast<size_t>(list * batch)] = -1;
      wrong[static_cast<size_t>(list * batch + batch - 1)] = rows[t];
    }
    const Global<int64_t> gpu_wrong(wrong, "sorted");
    p.sorted = gpu_wrong.data();
    p.rows = nullptr;
    Global<T> output(zeros, "output");
    check(launch(output.data()) == nullptr, "rows that there are not: " + emulation::fault());
  }
};

template <class T>
void test(int64_t e, int64_t b, const std::vector<int64_t>& rows, const std::vector<int64_t>& dims,
          int64_t numeric, bool shared) {
  Problem<T> problem(e, b, rows, dims, numeric, shared);
  problem.test_gather();
  problem.test_scatter(false);
  problem.test_scatter(true);
}

template <class T>
void test_all() {
  for (const bool shared : {false, true}) {
    test<T>(1, 1, {1}, {1}, 0, shared);
    test<T>(3, 7, {5}, {3}, 2, shared);
    test<T>(2, 33, {4, 300, 9}, {8, 1, 5}, 3, shared);
    test<T>(2, 0, {4}, {3}, 1, shared);
  }
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  test_all<pyens::BFloat16>();
  test_all<pyens::Float16>();
  // More tables than one launch takes.
  test<float>(2, 5, std::vector<int64_t>(35, 3), std::vector<int64_t>(35, 2), 1, false);
  return finish();
}
