// Activation strength out of the ensemble MLP kernel, against a plain loop in double, on buffers that
// end where the sanitizers watch.

#include "kernels/activation_strength.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels/ensemble_mlp.h"

namespace {

using pyens::DType;

int failures = 0;

void check(bool condition, const char* what, int64_t e, int64_t b, int64_t units) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s (E %lld, B %lld, %lld units)\n", what, static_cast<long long>(e),
              static_cast<long long>(b), static_cast<long long>(units));
}

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

template <class T>
struct Results {
  std::vector<T> output, value;
  std::vector<uint8_t> active;

  bool operator==(const Results& other) const {
    return output == other.output && value == other.value && active == other.active;
  }
};

template <class T>
struct Model {
  int64_t e, b, units = 0;
  std::vector<int64_t> widths;
  std::vector<std::vector<T>> weights, biases;
  std::vector<T> input, mean, std;
  bool own_statistics;  // of each member
  std::vector<pyens::MLPLayer> layers;

  Model(int64_t ensemble_size, int64_t batch, std::vector<int64_t> w, bool per_member)
      : e(ensemble_size), b(batch), widths(std::move(w)), own_statistics(per_member) {
    std::mt19937_64 random(static_cast<uint64_t>(e * 1000 + b));
    std::normal_distribution<double> normal;
    auto fill = [&](int64_t n, double scale) {
      std::vector<T> values(static_cast<size_t>(n));
      for (T& value : values) value = static_cast<T>(normal(random) * scale);
      return values;
    };
    input = fill(b * widths[0], 1);
    for (size_t l = 0; l + 1 < widths.size(); ++l) {
      const int64_t in = widths[l], out = widths[l + 1];
      weights.push_back(fill(e * out * in, 1.4 / std::sqrt(static_cast<double>(in))));
      biases.push_back(fill(e * out, 0.3));
      if (l + 2 < widths.size()) units += out;
    }
    for (size_t l = 0; l + 1 < widths.size(); ++l) {
      pyens::MLPLayer layer{};
      layer.weight.data = weights[l].data();
      layer.bias.data = biases[l].data();
      layer.weight.format = sizeof(T) == 4 ? DType::float32 : DType::float64;
      if (l + 2 < widths.size()) layer.activation.kind = pyens::ActivationKind::relu;
      layer.in = widths[l];
      layer.out = widths[l + 1];
      layer.weight.member_stride = layer.out * layer.in;
      layer.weight.row_stride = layer.in;
      layer.bias.member_stride = layer.out;
      layers.push_back(layer);
    }
    mean = fill((own_statistics ? e : 1) * units, 1);
    std = fill((own_statistics ? e : 1) * units, 1);
    for (size_t u = 0; u < std.size(); ++u) {
      std[u] = u % 5 == 0 ? T(0) : std::abs(std[u]) + T(0.1);
    }
  }

  // Runs the kernel with its work cut into pieces of `step` items, to buffers that start `shift`
  // elements behind an allocation's start.
  Results<T> run(int64_t step, bool pack, bool with_strength, size_t shift = 0) const {
    const int64_t bytes = pack ? (units + 7) / 8 : units;
    std::vector<T> output(static_cast<size_t>(e * b * widths.back()));
    std::vector<T> value(static_cast<size_t>(with_strength ? e * b * units : 0) + shift);
    std::vector<uint8_t> active(static_cast<size_t>(with_strength ? e * b * bytes : 0) + shift, 9);
    pyens::ActivationStrengthParams strength{};
    strength.units = units;
    strength.mean = mean.data();
    strength.std = std.data();
    strength.mean_member_stride = strength.std_member_stride = own_statistics ? units : 0;
    strength.value = value.data() + shift;
    strength.active = active.data() + shift;
    strength.bitpack = pack;
    pyens::ensemble_mlp_cpu::Forward params{};
    params.dtype = sizeof(T) == 4 ? DType::float32 : DType::float64;
    params.ensemble_size = e;
    params.batch = b;
    params.num_layers = static_cast<int64_t>(layers.size());
    params.layers = layers.data();
    params.input = input.data();
    params.input_row_stride = widths[0];
    params.output = output.data();
    if (with_strength) params.strength = strength;
    const int64_t items = pyens::ensemble_mlp_cpu::work_items(params);
    const size_t scratch_bytes = (pyens::ensemble_mlp_cpu::scratch_bytes(params) + 63) / 64 * 64;
    const std::unique_ptr<void, FreeDeleter> scratch(std::aligned_alloc(64, scratch_bytes));
    for (int64_t begin = 0; begin < items; begin += step) {
      std::memset(scratch.get(), 0xff, scratch_bytes);  // NaN, if it is read before it is written
      pyens::ensemble_mlp_cpu::run(params, begin, std::min(items, begin + step), scratch.get());
    }
    const auto offset = static_cast<std::ptrdiff_t>(shift);
    return {output, std::vector<T>(value.begin() + offset, value.end()),
            std::vector<uint8_t>(active.begin() + offset, active.end())};
  }

  // The hidden activations of one example of one member.
  std::vector<double> hidden(int64_t m, int64_t x) const {
    std::vector<double> all, h(input.begin() + x * widths[0], input.begin() + (x + 1) * widths[0]);
    for (size_t l = 0; l + 1 < layers.size(); ++l) {
      std::vector<double> next;
      for (int64_t o = m * widths[l + 1]; o < (m + 1) * widths[l + 1]; ++o) {
        double sum = static_cast<double>(biases[l][static_cast<size_t>(o)]);
        for (size_t i = 0; i < h.size(); ++i) {
          sum += static_cast<double>(weights[l][static_cast<size_t>(o) * h.size() + i]) * h[i];
        }
        next.push_back(std::max(sum, 0.0));
      }
      all.insert(all.end(), next.begin(), next.end());
      h = next;
    }
    return all;
  }
};

template <class T>
void test(int64_t e, int64_t b, const std::vector<int64_t>& widths, bool per_member, size_t shift) {
  const Model<T> model(e, b, widths, per_member);
  const int64_t units = model.units;
  const Results<T> got = model.run(1 << 20, false, true, shift);
  check(got.output == model.run(1 << 20, false, false).output, "output as without", e, b, units);
  check(got == model.run(1, false, true), "same bits for any split of the work", e, b, units);

  double error = 0;
  int64_t wrong = 0, surplus = 0;
  for (int64_t m = 0; m < e; ++m) {
    for (int64_t x = 0; x < b; x += 1 + b / 200) {
      const std::vector<double> h = model.hidden(m, x);
      for (int64_t u = 0; u < units; ++u) {
        const auto at = static_cast<size_t>((m * b + x) * units + u);
        const auto s = static_cast<size_t>((per_member ? m * units : 0) + u);
        const double std = static_cast<double>(model.std[s]);
        const double expected =
            std == 0 ? 0 : (h[static_cast<size_t>(u)] - static_cast<double>(model.mean[s])) / std;
        error = std::max(error, std::abs(static_cast<double>(got.value[at]) - expected));
        // Within a rounding of 0 either is right; 0 itself is what most inactive units are.
        const double activation = h[static_cast<size_t>(u)];
        wrong += got.active[at] > 1 || (activation > 1e-5 && got.active[at] == 0);
        surplus += activation == 0 && got.active[at] != 0;
      }
    }
  }
  check(error <= (sizeof(T) == 4 ? 2e-4 : 1e-12), "values", e, b, units);  // a NaN fails too
  check(wrong == 0 && surplus <= (sizeof(T) == 4 ? 2 : 0), "active", e, b, units);

  const Results<T> packed = model.run(1 << 20, true, true, shift);
  check(packed.value == got.value, "values beside packed bits", e, b, units);
  const int64_t bytes = (units + 7) / 8;
  std::vector<uint8_t> expected(packed.active.size());
  for (int64_t row = 0; row < e * b; ++row) {
    for (int64_t u = 0; u < units; ++u) {
      expected[static_cast<size_t>(row * bytes + u / 8)] =
          static_cast<uint8_t>(expected[static_cast<size_t>(row * bytes + u / 8)] |
                               got.active[static_cast<size_t>(row * units + u)] << u % 8);
    }
  }
  check(packed.active == expected, "packed bits", e, b, units);
}

}  // namespace

int main() {
  const std::vector<std::vector<int64_t>> shapes = {
      {1, 1, 1}, {5, 3, 2}, {8, 8, 8, 8}, {33, 17, 9, 7}, {32, 50, 20, 10, 1}, {13, 140, 200, 3}};
  size_t i = 0;
  for (const auto& widths : shapes) {
    for (const int64_t batch : {1, 2, 7, 8, 9, 15, 16, 17, 63, 65, 130, 300}) {
      test<float>(1 + static_cast<int64_t>(i % 3), batch, widths, i % 2 == 0, i % 4);
      test<double>(1 + static_cast<int64_t>(i % 2), batch, widths, i % 2 == 1, i % 3);
      ++i;
    }
  }
  // Large enough to be written past the cache.
  test<float>(1, 50'001, {3, 12, 13, 1}, false, 3);
  test<double>(2, 20'001, {3, 16, 1}, false, 1);
  if (failures == 0) std::printf("ok: %zu problems\n", i + 2);
  return failures != 0;
}
