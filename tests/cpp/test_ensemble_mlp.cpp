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

#include "kernels/dropout.h"
#include "layer_options.h"
#include "plain_mlp.h"

namespace {

using plain::Doubles;
using pyens::ActivationKind;
using pyens::DType;
using pyens::kActivationKinds;
using pyens::kActivations;

static_assert(pyens::parse_activation_kind("gelu") == ActivationKind::gelu);
static_assert(!pyens::parse_activation_kind("Gelu"));

int failures = 0;

size_t index(int64_t i) { return static_cast<size_t>(i); }

void check(bool condition, const char* what, int64_t e, int64_t b, size_t layers) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s (E %lld, B %lld, %zu layers)\n", what, static_cast<long long>(e),
              static_cast<long long>(b), layers);
}

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, FreeDeleter>;

// 64-byte aligned, filled with NaN if anything is read before it is written.
Buffer buffer(size_t bytes) {
  const size_t size = (bytes + 63) / 64 * 64;
  Buffer result(std::aligned_alloc(64, size));
  std::memset(result.get(), 0xff, size);
  return result;
}

struct Case {
  int64_t ensemble_size, batch;
  std::vector<int64_t> widths;
  std::vector<LayerOptions> options;  // of each layer
  bool shared_input, with_bias;
  std::vector<int64_t> members = {};  // among two more that are stored; or each its own
  double dropout = 0;
  bool rate_of_each_layer = false, drops_before_norm = false;

  int64_t stored() const { return ensemble_size + (members.empty() ? 0 : 2); }
  int64_t hidden() const { return static_cast<int64_t>(widths.size()) - 2; }
};

template <class T>
struct Model {
  Case c;
  std::vector<std::vector<T>> weights, biases, norm_weights, norm_biases;
  std::vector<T> input;
  std::vector<pyens::MLPLayer> layers;
  std::vector<int64_t> seeds;
  Doubles rates;
  pyens::ensemble_mlp_cpu::Forward params{};

  explicit Model(const Case& given) : c(given) {
    const int64_t e = c.ensemble_size, b = c.batch;
    std::mt19937_64 random(static_cast<uint64_t>(e * 1000 + b));
    std::normal_distribution<double> normal;
    auto fill = [&](int64_t n, double scale, double offset = 0) {
      std::vector<T> values(index(n));
      for (T& value : values) value = static_cast<T>(normal(random) * scale + offset);
      return values;
    };
    input = fill((c.shared_input ? 1 : e) * b * c.widths[0], 1);
    for (size_t l = 0; l + 1 < c.widths.size(); ++l) {
      const int64_t in = c.widths[l], out = c.widths[l + 1], all = c.stored() * out;
      const LayerOptions& options = c.options[l];
      weights.push_back(fill(all * in, 1.4 / std::sqrt(static_cast<double>(in))));
      biases.push_back(fill(c.with_bias ? all : 0, 0.3));
      norm_weights.push_back(fill(options.norm_weight ? all : 0, 0.5, 1));
      norm_biases.push_back(fill(options.norm_bias ? all : 0, 0.3));
      const auto pointer = [](const std::vector<T>& values) {
        return values.empty() ? nullptr : values.data();
      };
      pyens::MLPLayer layer{};
      layer.in = in;
      layer.out = out;
      layer.weight = {weights[l].data(), out * in, in,
                      sizeof(T) == 4 ? DType::float32 : DType::float64};
      layer.bias = {pointer(biases[l]), out};
      layer.norm = {options.norm,
                    options.after_activation,
                    options.epsilon,
                    {pointer(norm_weights[l]), out},
                    {pointer(norm_biases[l]), out}};
      layer.activation = options.activation;
      layer.residual = options.residual;
      layers.push_back(layer);
    }
    for (int64_t m = 0; m < e; ++m) seeds.push_back(m * 7919 - 3);
    const int64_t of_member = c.rate_of_each_layer ? c.hidden() : 1;
    for (int64_t i = 0; i < e * of_member && c.rate_of_each_layer; ++i) {
      rates.push_back(i % 3 == 1 ? 0 : c.dropout / (1 + 0.5 * static_cast<double>(i % 4)));
    }
    params.dtype = sizeof(T) == 4 ? DType::float32 : DType::float64;
    params.ensemble_size = e;
    params.batch = b;
    params.num_layers = static_cast<int64_t>(layers.size());
    params.layers = layers.data();
    params.members = c.members.empty() ? nullptr : c.members.data();
    params.stored_members = c.members.empty() ? 0 : c.stored();
    params.input = input.data();
    params.input_member_stride = c.shared_input ? 0 : b * c.widths[0];
    params.input_row_stride = c.widths[0];
    params.dropout.p = rates.empty() ? c.dropout : 0;
    params.dropout.rates = rates.empty() ? nullptr : rates.data();
    params.dropout.rates_member_stride = of_member;
    params.dropout.rates_layer_stride = 1;
    params.dropout.seeds = seeds.data();
    params.dropout.before_norm = c.drops_before_norm;
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  // Runs the kernel with its work cut into pieces of `step` items.
  std::vector<T> run(int64_t step) {
    std::vector<T> output(index(c.ensemble_size * c.batch * c.widths.back()));
    params.output = output.data();
    const int64_t items = pyens::ensemble_mlp_cpu::work_items(params);
    if (items == 0) pyens::ensemble_mlp_cpu::scratch_bytes(params);  // as launch_cpu does
    for (int64_t begin = 0; begin < items; begin += step) {
      const Buffer scratch = buffer(pyens::ensemble_mlp_cpu::scratch_bytes(params));
      pyens::ensemble_mlp_cpu::run(params, begin, std::min(items, begin + step), scratch.get());
    }
    return output;
  }

  // The layers of the member at position m.
  std::vector<plain::Layer> plain_layers_of(int64_t m) const {
    const int64_t stored = c.members.empty() ? m : c.members[index(m)];
    const auto part = [&](const std::vector<T>& values, int64_t size, double otherwise) {
      if (values.empty()) return Doubles(index(size), otherwise);
      const auto begin = values.begin() + stored * size;
      return Doubles(begin, begin + size);
    };
    std::vector<plain::Layer> result;
    for (size_t l = 0; l < layers.size(); ++l) {
      const int64_t in = c.widths[l], out = c.widths[l + 1];
      result.push_back({c.options[l], part(weights[l], out * in, 0), part(biases[l], out, 0),
                        part(norm_weights[l], out, 1), part(norm_biases[l], out, 0)});
    }
    return result;
  }

  plain::Factor factor(int64_t m, int64_t row) const {
    return [this, m, row](int64_t l, int64_t o) {
      const double rate = params.dropout.of(m, l);
      const uint64_t key = pyens::dropout_unit_key(pyens::dropout_layer_key(seeds[index(m)], l), o);
      const uint32_t hash = pyens::dropout_hash(static_cast<uint32_t>(row), key);
      return hash >= pyens::dropout_threshold(rate) ? 1 / (1 - rate) : 0;
    };
  }

  Doubles expected() const {
    Doubles output;
    for (int64_t m = 0; m < c.ensemble_size; ++m) {
      const std::vector<plain::Layer> of_member = plain_layers_of(m);
      for (int64_t b = 0; b < c.batch; ++b) {
        const T* x = input.data() + ((c.shared_input ? 0 : m * c.batch) + b) * c.widths[0];
        plain::Trace trace;
        const Doubles h = plain::forward(of_member, Doubles(x, x + c.widths[0]), factor(m, b),
                                         c.drops_before_norm, trace);
        output.insert(output.end(), h.begin(), h.end());
      }
    }
    return output;
  }
};

template <class T>
void test(const Case& c) {
  const int64_t e = c.ensemble_size, b = c.batch;
  const size_t count = c.widths.size() - 1;
  Model<T> model(c);
  const std::vector<T> output = model.run(1 << 20);
  const Doubles expected = model.expected();
  double error = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::abs(static_cast<double>(output[i]) - expected[i]);
    error = difference <= error ? error : difference;  // a NaN stays
    size = std::max(size, std::abs(expected[i]));
  }
  const double tolerance = (sizeof(T) == 4 ? 1e-5 : 1e-14) * (1 + size);
  check(error <= tolerance, "values", e, b, count);  // a NaN fails too
  check(model.run(1) == output, "same bits for any split of the work", e, b, count);

  // With its sums kept, which end where the sanitizers watch.
  const Buffer kept =
      buffer(sizeof(T) * index(pyens::kept_elements(model.params, model.params.batch)));
  model.params.kept = kept.get();
  check(model.run(1 << 20) == output, "same bits with sums kept", e, b, count);
  model.params.kept = nullptr;

  // A member has the same bits beside others: those of the positions that share its parameters.
  for (int64_t m = 0; m < e && !c.members.empty() && c.shared_input && c.dropout == 0; ++m) {
    const auto rows = b * c.widths.back();
    for (int64_t before = 0; before < m; ++before) {
      if (c.members[index(before)] != c.members[index(m)]) continue;
      check(std::equal(output.begin() + m * rows, output.begin() + (m + 1) * rows,
                       output.begin() + before * rows),
            "same bits of a member that is there twice", e, b, count);
    }
  }

  namespace cpu = pyens::ensemble_mlp_cpu;
  if (!c.members.empty()) return;  // weights are prepacked for all
  const auto bytes = static_cast<size_t>(cpu::describe_prepacked(model.params).bytes);
  std::vector<int64_t> prepacked(bytes / sizeof(int64_t));
  auto* const weights = reinterpret_cast<cpu::PrepackedWeights*>(prepacked.data());
  cpu::prepack(model.params, weights);
  model.params.prepacked = weights;
  check(model.run(1 << 20) == output, "same bits when prepacked", e, b, count);
}

// An empty batch has no work, and its scratch can be asked for with every option.
template <class T>
void test_empty(const Case& c) {
  Model<T> model(c);
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
  const auto relu = [](int64_t members, const std::vector<int64_t>& widths) {
    return Case{members, 1, widths, plain_layers(2, ActivationKind::relu), true, true};
  };
  const Model<float> model(relu(3, {8, 16, 8}));
  const auto refuses = [&](const std::vector<int64_t>& data) {
    return cpu::check_prepacked(model.params, data.data(), static_cast<int64_t>(data.size() * 8));
  };
  const std::vector<int64_t> right = prepacked_of(model);
  check(refuses(right) == nullptr, "the right weights", 3, 1, 2);
  check(refuses(prepacked_of(Model<double>(relu(3, {8, 16, 8})))), "dtype", 3, 1, 2);
  check(refuses(prepacked_of(Model<float>(relu(3, {16, 8, 8})))), "sizes", 3, 1, 2);
  check(refuses(prepacked_of(Model<float>(relu(2, {8, 16, 8})))), "members", 3, 1, 2);
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
      Case c{3, 0, {4, 2, 3}, plain_layers(2, activation), true, true};
      c.dropout = dropout;
      test_empty<float>(c);
      test_empty<double>(c);
    }
  }
  int i = 0;
  for (const auto& widths : shapes) {
    for (const int64_t batch : {1, 2, 7, 8, 9, 10, 15, 16, 17, 63, 65, 130, 300}) {
      Case c{1 + i % 4,  batch,
             widths,     plain_layers(widths.size() - 1, kActivationKinds[i % kActivations]),
             i % 2 == 0, i % 3 != 0};
      test<float>(c);
      c.ensemble_size = 1 + i % 3;
      c.shared_input = !c.shared_input;
      test<double>(c);
      ++i;
    }
  }
  // Activations of each layer; norms and residuals; rates of each layer; members by index.
  const std::vector<std::vector<int64_t>> deep = {
      {4, 3}, {1, 1, 1}, {8, 8, 8, 8}, {5, 7, 7, 7, 2}, {33, 17, 17, 9, 9, 3}, {16, 140, 140, 3}};
  for (const auto& widths : deep) {
    for (const int64_t batch : {0, 1, 3, 8, 17, 70, 300}) {
      for (const bool rich : {false, true}) {
        Case c{2 + i % 3,  batch,     widths, varied_layers(widths, i, rich, false),
               i % 2 == 0, i % 5 != 0};
        if (i / 2 % 3 > 0) c.members = some_members(c.ensemble_size);
        c.dropout = i % 4 < 2 ? 0 : 0.3;
        c.rate_of_each_layer = c.dropout > 0 && c.hidden() > 0 && i / 4 % 2 == 0;
        c.drops_before_norm = i / 4 % 3 == 0;
        test<float>(c);
        test<double>(c);
        ++i;
      }
    }
  }
  if (failures == 0) std::printf("ok: %d shapes\n", i);
  return failures != 0;
}
