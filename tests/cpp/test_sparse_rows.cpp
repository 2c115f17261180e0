// Sparse rows against the dense kernels, bit for bit, on buffers that end where the sanitizers watch.

#include "kernels/sparse_rows.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/ensemble_conv2d.h"
#include "kernels/ensemble_mlp.h"

namespace {

using pyens::DType;
using pyens::MLPLayer;

int failures = 0;

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
std::unique_ptr<void, FreeDeleter> scratch_of(size_t bytes) {
  void* const p = std::aligned_alloc(64, std::max<size_t>(64, (bytes + 63) / 64 * 64));
  std::memset(p, 0xff, bytes);  // NaN: what is read before it is written shows
  return std::unique_ptr<void, FreeDeleter>(p);
}

size_t size(int64_t n) { return static_cast<size_t>(n); }

std::mt19937_64 random_bits(5);

template <class T>
std::vector<T> draw(int64_t n, double kept = 1) {
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform;
  std::vector<T> numbers(size(n));
  for (T& x : numbers) x = uniform(random_bits) < kept ? static_cast<T>(normal(random_bits)) : T{0};
  return numbers;
}

// The format, from weights [members, rows, inputs].
template <class T>
struct Packed {
  std::vector<T> values;
  std::vector<uint8_t> columns;
  std::vector<int32_t> starts, order;

  Packed(const std::vector<T>& weights, int64_t members, int64_t rows, int64_t inputs) {
    for (int64_t m = 0; m < members; ++m) {
      for (int64_t first = 0; first < inputs; first += pyens::kSparseBlock) {
        const int64_t end = std::min(inputs, first + pyens::kSparseBlock);
        const auto row_of = [&](int64_t row) { return weights.data() + (m * rows + row) * inputs; };
        const auto count = [&](int32_t row) {
          return std::count_if(row_of(row) + first, row_of(row) + end, [](T w) { return w != 0; });
        };
        std::vector<int32_t> by_count(size(rows));
        std::iota(by_count.begin(), by_count.end(), 0);
        std::stable_sort(by_count.begin(), by_count.end(),
                         [&](int32_t a, int32_t b) { return count(a) < count(b); });
        for (const int32_t row : by_count) {
          starts.push_back(static_cast<int32_t>(values.size()));
          for (int64_t k = first; k < end; ++k) {
            if (row_of(row)[k] == 0) continue;
            values.push_back(row_of(row)[k]);
            columns.push_back(static_cast<uint8_t>(k - first));
          }
        }
        starts.push_back(static_cast<int32_t>(values.size()));
        order.insert(order.end(), by_count.begin(), by_count.end());
      }
    }
  }
  pyens::SparseRows rows() const {
    return {values.data(), starts.data(), order.data(), columns.data()};
  }
};

template <class T>
void expect_same(const char* what, const std::vector<T>& a, const std::vector<T>& b) {
  if (std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0) return;
  std::printf("%s: other bits than the dense kernel's\n", what);
  ++failures;
}

template <class T>
constexpr DType kDType = sizeof(T) == 4 ? DType::float32 : DType::float64;

template <class T>
std::vector<T> run(pyens::ensemble_mlp_cpu::Forward p, int64_t outputs, int64_t step) {
  std::vector<T> output(size(p.ensemble_size * p.batch * outputs), static_cast<T>(99));
  p.output = output.data();
  const int64_t items = pyens::ensemble_mlp_cpu::work_items(p);
  for (int64_t i = 0; i < items; i += step) {
    const auto scratch = scratch_of(pyens::ensemble_mlp_cpu::scratch_bytes(p));
    pyens::ensemble_mlp_cpu::run(p, i, std::min(i + step, items), scratch.get());
  }
  return output;
}

template <class T>
void check_mlp(int64_t members, int64_t batch, std::vector<int64_t> widths, double kept) {
  std::vector<std::vector<T>> weights, biases;
  std::vector<Packed<T>> packed;
  std::vector<pyens::SparseRows> rows(widths.size());
  std::vector<MLPLayer> layers(widths.size() - 1);
  packed.reserve(widths.size());
  weights.reserve(widths.size());
  biases.reserve(widths.size());
  for (size_t l = 0; l + 1 < widths.size(); ++l) {
    const int64_t in = widths[l], out = widths[l + 1];
    weights.push_back(draw<T>(members * out * in, kept));
    biases.push_back(draw<T>(members * out));
    packed.emplace_back(weights[l], members, out, in);
    rows[l] = packed[l].rows();
    layers[l] = MLPLayer{};
    layers[l].in = in, layers[l].out = out;
    layers[l].weight.data = weights[l].data();
    layers[l].weight.member_stride = out * in;
    layers[l].weight.row_stride = in;
    layers[l].weight.format = kDType<T>;
    layers[l].bias = {biases[l].data(), out};
    const bool last = l + 2 == widths.size();
    layers[l].activation.kind =
        last ? pyens::ActivationKind::identity : pyens::ActivationKind::relu;
  }
  const auto input = draw<T>(batch * widths[0]);
  pyens::ensemble_mlp_cpu::Forward p{};
  p.dtype = kDType<T>;
  p.ensemble_size = members;
  p.num_layers = static_cast<int64_t>(layers.size());
  p.layers = layers.data();
  p.batch = batch;
  p.input = input.data();
  p.input_row_stride = widths[0];
  const auto dense = run<T>(p, widths.back(), 1);
  for (size_t l = 0; l < layers.size(); ++l) {
    layers[l].weight.data = &rows[l];
    layers[l].weight.row_stride = pyens::kSparseStride;
  }
  expect_same("ensemble MLP", run<T>(p, widths.back(), 1), dense);
  expect_same("ensemble MLP, in one", run<T>(p, widths.back(), 1000), dense);
}

template <class T>
std::vector<T> run(pyens::EnsembleConv2dParams p) {
  const int64_t features = p.conv.out_channels * p.conv.output().pixels();
  std::vector<T> output(size(p.ensemble_size * p.batch * features), static_cast<T>(99));
  p.output = output.data();
  const auto scratch = scratch_of(pyens::ensemble_conv2d_cpu::scratch_bytes(p));
  pyens::ensemble_conv2d_cpu::run(p, 0, pyens::ensemble_conv2d_cpu::work_items(p), scratch.get());
  return output;
}

template <class T>
void check_convolution(int64_t batch, const pyens::Conv2d& conv, double kept) {
  constexpr int64_t kMembers = 2;
  const auto input = draw<T>(batch * conv.channels * conv.image.pixels());
  const auto weights = draw<T>(kMembers * conv.out_channels * conv.taps(), kept);
  const auto bias = draw<T>(kMembers * conv.out_channels);
  const Packed<T> packed(weights, kMembers, conv.out_channels, conv.taps());
  const pyens::SparseRows rows = packed.rows();
  pyens::EnsembleConv2dParams p{};
  p.dtype = kDType<T>;
  p.ensemble_size = kMembers;
  p.batch = batch;
  p.conv = conv;
  p.input = input.data();
  p.input_image_stride = conv.channels * conv.image.pixels();
  p.weight = weights.data();
  p.bias = bias.data();
  const auto dense = run<T>(p);
  p.weight = nullptr;
  p.sparse = &rows;
  expect_same("convolution", run<T>(p), dense);
}

template <class T>
void check_all() {
  for (const double kept : {0.0, 0.1, 0.5, 1.0}) {
    for (const int64_t batch : {1, 7, 16, 33, 70, 300}) {
      check_mlp<T>(2, batch, {1, 1}, kept);
      check_mlp<T>(3, batch, {130, 40, 9, 2}, kept);
      check_mlp<T>(1, batch, {128, 257, 1}, kept);
    }
    for (const int64_t batch : {1, 3, 20}) {
      check_convolution<T>(batch, {3, 7, {8, 9}, {3, 2}, {2, 1}, {1, 1}, {1, 1}, {1, 1}, true},
                           kept);
      check_convolution<T>(batch, {20, 9, {7, 7}, {3, 3}, {1, 1}, {0, 0}, {1, 1}, {2, 2}, true},
                           kept);
      check_convolution<T>(batch, {30, 3, {6, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {3, 1}, false},
                           kept);
    }
  }
}

}  // namespace

int main() {
  check_all<float>();
  check_all<double>();
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures > 0;
}
