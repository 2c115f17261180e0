// The ensemble MLP kernel against a plain loop in double, on buffers that end where the sanitizers
// watch.

#include "kernels/ensemble_mlp.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

namespace {

using pyens::ActivationKind;
using pyens::DType;
using pyens::kActivationKinds;
using pyens::kActivations;

static_assert(pyens::parse_activation_kind("gelu") == ActivationKind::gelu);
static_assert(!pyens::parse_activation_kind("Gelu"));

int failures = 0;

void check(bool condition, const char* what, int64_t e, int64_t b, size_t layers) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s (E %lld, B %lld, %zu layers)\n", what, static_cast<long long>(e),
              static_cast<long long>(b), layers);
}

double activate(double z, ActivationKind activation) {
  switch (activation) {
    case ActivationKind::relu: return z > 0 ? z : 0;
    case ActivationKind::gelu: return 0.5 * z * std::erfc(-z / std::sqrt(2.0));
    case ActivationKind::silu: return z / (1 + std::exp(-z));
    case ActivationKind::elu: return z > 0 ? z : std::expm1(z);
    case ActivationKind::softplus: return z > 20 ? z : std::log1p(std::exp(z));
    case ActivationKind::tanh: return std::tanh(z);
    case ActivationKind::mish: return z * std::tanh(std::log1p(std::exp(z)));
    case ActivationKind::identity: return z;
  }
  return z;
}

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

template <class T>
struct Model {
  int64_t ensemble_size, batch;
  std::vector<int64_t> widths;
  std::vector<std::vector<T>> weights, biases;
  std::vector<T> input;
  bool shared;
  std::vector<pyens::MLPLayer> layers;
  ActivationKind activation;
  pyens::ensemble_mlp_cpu::Forward params{};

  Model(int64_t e, int64_t b, std::vector<int64_t> w, ActivationKind hidden_activation,
        bool shared_input, bool with_bias)
      : ensemble_size(e),
        batch(b),
        widths(std::move(w)),
        shared(shared_input),
        activation(hidden_activation) {
    std::mt19937_64 random(static_cast<uint64_t>(e * 1000 + b));
    std::normal_distribution<double> normal;
    auto fill = [&](int64_t n, double scale) {
      std::vector<T> values(static_cast<size_t>(n));
      for (T& value : values) value = static_cast<T>(normal(random) * scale);
      return values;
    };
    input = fill((shared ? 1 : e) * b * widths[0], 1);
    for (size_t l = 0; l + 1 < widths.size(); ++l) {
      const int64_t in = widths[l], out = widths[l + 1];
      weights.push_back(fill(e * out * in, 1.4 / std::sqrt(static_cast<double>(in))));
      biases.push_back(fill(with_bias ? e * out : 0, 0.3));
      pyens::MLPLayer layer{};
      layer.weight.data = weights[l].data();
      layer.bias.data = with_bias ? biases[l].data() : nullptr;
      layer.weight.format = sizeof(T) == 4 ? DType::float32 : DType::float64;
      if (l + 2 < widths.size()) layer.activation.kind = activation;
      layer.in = in;
      layer.out = out;
      layer.weight.member_stride = out * in;
      layer.weight.row_stride = in;
      layer.bias.member_stride = out;
      layers.push_back(layer);
    }
    params.dtype = sizeof(T) == 4 ? DType::float32 : DType::float64;
    params.ensemble_size = e;
    params.batch = b;
    params.num_layers = static_cast<int64_t>(layers.size());
    params.layers = layers.data();
    params.input = input.data();
    params.input_member_stride = shared ? 0 : b * widths[0];
    params.input_row_stride = widths[0];
  }

  // Runs the kernel with its work cut into pieces of `step` items.
  std::vector<T> run(int64_t step) {
    std::vector<T> output(static_cast<size_t>(ensemble_size * batch * widths.back()));
    params.output = output.data();
    const int64_t items = pyens::ensemble_mlp_cpu::work_items(params);
    if (items == 0) pyens::ensemble_mlp_cpu::scratch_bytes(params);  // as launch_cpu does
    for (int64_t begin = 0; begin < items; begin += step) {
      const size_t bytes = (pyens::ensemble_mlp_cpu::scratch_bytes(params) + 63) / 64 * 64;
      const std::unique_ptr<void, FreeDeleter> scratch(std::aligned_alloc(64, bytes));
      std::memset(scratch.get(), 0xff, bytes);  // NaN, if anything is read before it is written
      pyens::ensemble_mlp_cpu::run(params, begin, std::min(items, begin + step), scratch.get());
    }
    return output;
  }

  std::vector<double> expected() const {
    std::vector<double> output;
    for (int64_t m = 0; m < ensemble_size; ++m) {
      for (int64_t b = 0; b < batch; ++b) {
        const T* x = input.data() + ((shared ? 0 : m * batch) + b) * widths[0];
        std::vector<double> h(x, x + widths[0]);
        for (size_t l = 0; l < layers.size(); ++l) {
          const int64_t in = widths[l], out = widths[l + 1];
          std::vector<double> z(static_cast<size_t>(out));
          for (int64_t o = 0; o < out; ++o) {
            double sum = biases[l].empty()
                             ? 0
                             : static_cast<double>(biases[l][static_cast<size_t>(m * out + o)]);
            for (int64_t i = 0; i < in; ++i) {
              sum += static_cast<double>(weights[l][static_cast<size_t>((m * out + o) * in + i)]) *
                     h[static_cast<size_t>(i)];
            }
            z[static_cast<size_t>(o)] = l + 1 < layers.size() ? activate(sum, activation) : sum;
          }
          h = z;
        }
        output.insert(output.end(), h.begin(), h.end());
      }
    }
    return output;
  }
};

template <class T>
void test(int64_t e, int64_t b, const std::vector<int64_t>& widths, ActivationKind activation,
          bool shared, bool with_bias) {
  Model<T> model(e, b, widths, activation, shared, with_bias);
  const std::vector<T> output = model.run(1 << 20);
  const std::vector<double> expected = model.expected();
  double error = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error = std::max(error, std::abs(static_cast<double>(output[i]) - expected[i]));
    size = std::max(size, std::abs(expected[i]));
  }
  const double tolerance = (sizeof(T) == 4 ? 1e-5 : 1e-14) * (1 + size);
  check(error <= tolerance, "values", e, b, widths.size() - 1);  // a NaN fails too
  check(model.run(1) == output, "same bits for any split of the work", e, b, widths.size() - 1);

  namespace cpu = pyens::ensemble_mlp_cpu;
  const auto bytes = static_cast<size_t>(cpu::describe_prepacked(model.params).bytes);
  std::vector<int64_t> prepacked(bytes / sizeof(int64_t));
  auto* const weights = reinterpret_cast<cpu::PrepackedWeights*>(prepacked.data());
  cpu::prepack(model.params, weights);
  model.params.prepacked = weights;
  check(model.run(1 << 20) == output, "same bits when prepacked", e, b, widths.size() - 1);
}

// An empty batch has no work, and its scratch can be asked for with every option.
template <class T>
void test_empty(ActivationKind activation, double dropout) {
  Model<T> model(3, 0, {4, 2, 3}, activation, /*shared_input=*/true, /*with_bias=*/true);
  const std::vector<int64_t> seeds = {0, 1, 2};
  model.params.dropout.p = dropout;
  model.params.dropout.seeds = seeds.data();
  check(pyens::ensemble_mlp_cpu::work_items(model.params) == 0, "no work", 3, 0, 2);
  check(model.run(1).empty(), "no outputs", 3, 0, 2);
}

// What was not made for these layers is told from what was.
void test_prepacked_is_checked() {
  namespace cpu = pyens::ensemble_mlp_cpu;
  const auto prepacked_of = [](const auto& model) {
    std::vector<int64_t> data(static_cast<size_t>(cpu::describe_prepacked(model.params).bytes / 8));
    cpu::prepack(model.params, reinterpret_cast<cpu::PrepackedWeights*>(data.data()));
    return data;
  };
  const auto relu = ActivationKind::relu;
  const Model<float> model(3, 1, {8, 16, 8}, relu, true, true);
  const auto refuses = [&](const std::vector<int64_t>& data) {
    return cpu::check_prepacked(model.params, data.data(), static_cast<int64_t>(data.size() * 8));
  };
  const std::vector<int64_t> right = prepacked_of(model);
  check(refuses(right) == nullptr, "the right weights", 3, 1, 2);
  check(refuses(prepacked_of(Model<double>(3, 1, {8, 16, 8}, relu, true, true))), "dtype", 3, 1, 2);
  check(refuses(prepacked_of(Model<float>(3, 1, {16, 8, 8}, relu, true, true))), "sizes", 3, 1, 2);
  check(refuses(prepacked_of(Model<float>(2, 1, {8, 16, 8}, relu, true, true))), "members", 3, 1,
        2);
  for (const size_t word : {0, 1, 2, 3, 4, 5, 6, 7}) {
    std::vector<int64_t> wrong = right;
    wrong[word] ^= 64;
    check(refuses(wrong), "a word of the description", 3, 1, 2);
  }
  std::vector<int64_t> shorter = right;
  shorter.pop_back();
  check(refuses(shorter) && refuses({}), "the number of bytes", 3, 1, 2);
}

}  // namespace

int main() {
  test_prepacked_is_checked();
  const std::vector<std::vector<int64_t>> shapes = {
      {1, 1}, {5, 3}, {8, 8, 8}, {33, 17, 9, 7}, {32, 50, 20, 10, 1}, {129, 13, 16}, {140, 200, 3}};
  for (const ActivationKind activation : kActivationKinds) {
    for (const double dropout : {0.0, 0.5}) {
      test_empty<float>(activation, dropout);
      test_empty<double>(activation, dropout);
    }
  }
  int i = 0;
  for (const auto& widths : shapes) {
    for (const int64_t batch : {1, 2, 7, 8, 9, 10, 15, 16, 17, 63, 65, 130, 300}) {
      const ActivationKind activation = kActivationKinds[i % kActivations];
      const bool shared = i % 2 == 0, with_bias = i % 3 != 0;
      test<float>(1 + i % 4, batch, widths, activation, shared, with_bias);
      test<double>(1 + i % 3, batch, widths, activation, !shared, with_bias);
      ++i;
    }
  }
  if (failures == 0) std::printf("ok: %d shapes\n", i);
  return failures != 0;
}
