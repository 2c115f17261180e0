// Activation strength out of the CUDA kernel of the ensemble MLP, run on the host, against the CPU's.

#include "kernels/cuda/ensemble_mlp.cu"
#include "kernels/cuda/ensemble_mlp_fma.cu"
#include "kernels/cuda/ensemble_mlp_mma.cu"

#include "emulated_test.h"

namespace {

using namespace emulated_test;
using pyens::Activation;

template <class T>
struct Results {
  std::vector<T> output, value;
  std::vector<uint8_t> active;
};

// Statistics: of each member or shared; or a mean of 0 and a std of 1, by which values are activations.
enum class Statistics { own, shared, none };

template <class T>
struct Model {
  using R = RealFor<T>;
  int64_t members, batch, units = 0;
  std::vector<int64_t> widths;
  Activation activation;
  std::unique_ptr<Values<T>> input;
  std::vector<std::unique_ptr<Values<T>>> weights, biases;
  std::unique_ptr<Values<R>> mean, std;
  int64_t member_stride;

  Model(int64_t e, int64_t b, std::vector<int64_t> w, Activation act, Statistics statistics)
      : members(e), batch(b), widths(std::move(w)), activation(act) {
    Random random(e * 1000 + b);
    input = std::make_unique<Values<T>>(random, b * widths[0]);
    for (size_t l = 0; l + 1 < widths.size(); ++l) {
      const int64_t in = widths[l], out = widths[l + 1];
      const double scale = 1.4 / std::sqrt(static_cast<double>(in));
      weights.push_back(std::make_unique<Values<T>>(random, e * out * in, scale));
      biases.push_back(std::make_unique<Values<T>>(random, e * out, 0.3));
      if (l + 2 < widths.size()) units += out;
    }
    member_stride = statistics == Statistics::own ? units : 0;
    const int64_t n = statistics == Statistics::own ? e * units : units;
    std::vector<R> means = normal<R>(random, n), stds = normal<R>(random, n);
    for (size_t u = 0; u < stds.size(); ++u) {
      stds[u] = std::abs(stds[u]) + R(0.1);
      if (u % 5 == 1) stds[u] = u % 2 ? R(0) : -std::numeric_limits<R>::min() / 2;  // dead
      if (statistics == Statistics::none) means[u] = 0, stds[u] = 1;
    }
    mean = std::make_unique<Values<R>>(means, "mean");
    std = std::make_unique<Values<R>>(stds, "std");
  }

  int64_t active_bytes(bool pack) const { return pack ? (units + 7) / 8 : units; }

  // With the pointers of one side, to run(params).
  template <class Run>
  void with_params(bool gpu, bool pack, void* output, void* value, uint8_t* active,
                   const Run& run) {
    const auto side = [&](auto& values) -> const void* {
      return gpu ? static_cast<const void*>(values->gpu.data()) : values->cpu.data();
    };
    std::vector<pyens::MLPLayer> layers;
    for (size_t l = 0; l + 1 < widths.size(); ++l) {
      pyens::MLPLayer layer{};
      layer.in = layer.weight_row_stride = widths[l];
      layer.out = layer.bias_member_stride = widths[l + 1];
      layer.weight_member_stride = layer.in * layer.out;
      layer.weight = side(weights[l]);
      layer.bias = side(biases[l]);
      layers.push_back(layer);
    }
    pyens::ActivationStrengthParams strength{};
    strength.units = units;
    strength.mean = side(mean);
    strength.std = side(std);
    strength.mean_member_stride = strength.std_member_stride = member_stride;
    strength.value = value;
    strength.active = active;
    strength.pack = pack;
    pyens::EnsembleMLPParams p{};
    p.dtype = dtype_of<T>();
    p.activation = activation;
    p.ensemble_size = members;
    p.batch = batch;
    p.num_layers = static_cast<int64_t>(layers.size());
    p.layers = layers.data();
    p.input = side(input);
    p.input_row_stride = widths[0];
    p.output = output;
    if (value) p.strength = &strength;
    run(p);
  }

  Results<T> on_cpu(bool pack) {
    Results<T> r;
    r.output.resize(static_cast<size_t>(members * batch * widths.back()));
    r.value.resize(static_cast<size_t>(members * batch * units));
    r.active.resize(static_cast<size_t>(members * batch * active_bytes(pack)));
    with_params(false, pack, r.output.data(), r.value.data(), r.active.data(), [](const auto& p) {
      namespace cpu = pyens::ensemble_mlp_cpu;
      const Scratch scratch(cpu::scratch_bytes(p));
      cpu::run(p, 0, cpu::work_items(p), scratch.get());
    });
    return r;
  }

  Results<T> on_gpu(bool pack, uint64_t seed, bool with_strength = true) {
    emulation::set_seed(seed);
    const int64_t rows = members * batch;
    Global<T> output(static_cast<size_t>(rows * widths.back()), "output");
    Global<T> value(static_cast<size_t>(rows * units), "value");
    Global<uint8_t> active(static_cast<size_t>(rows * active_bytes(pack)), "active");
    with_params(true, pack, output.data(), with_strength ? value.data() : nullptr, active.data(),
                [](const auto& p) {
                  const char* error = pyens::ensemble_mlp_cuda::run(p, nullptr);
                  check(error == nullptr, error ? error : "");
                });
    return {output.host(), value.host(), active.host()};
  }
};

template <class T>
void test(int64_t members, int64_t batch, const std::vector<int64_t>& widths, Activation activation,
          Statistics statistics, bool pack) {
  ++problems;
  Model<T> model(members, batch, widths, activation, statistics);
  const Results<T> expected = model.on_cpu(pack), first = model.on_gpu(pack, 1);
  for (const uint64_t seed : {2, 3}) {
    const Results<T> again = model.on_gpu(pack, seed);
    check(same_bits(again.output, first.output) && same_bits(again.value, first.value) &&
              again.active == first.active,
          "other bits in another order");
  }
  const std::vector<T> without = model.on_gpu(pack, 1, false).output;
  if constexpr (sizeof(T) == 2) {  // from tensor cores, which hidden activations are rounded for
    const double tolerance = std::is_same_v<T, pyens::BFloat16> ? 0.03 : 0.004;
    check_close("output without strength", without, first.output, tolerance);
  } else {
    check(same_bits(without, first.output), "output as without");
  }
  // Half precision: the CPU may round hidden activations, the GPU does not.
  const double tolerance = sizeof(T) == 2 ? (std::is_same_v<T, pyens::BFloat16> ? 0.03 : 0.004) : 0;
  check_close("output", first.output, expected.output, tolerance);
  check_close("value", first.value, expected.value, tolerance);
  // Sums in the same order have the same signs.
  if (kIsReal<T>) check(first.active == expected.active, "active as on the CPU");
}

// Where values are the activations themselves, their signs say what is active.
template <class T>
void test_active(int64_t members, int64_t batch, const std::vector<int64_t>& widths) {
  ++problems;
  Model<T> model(members, batch, widths, Activation::tanh, Statistics::none);
  const Results<T> got = model.on_gpu(false, 1), packed = model.on_gpu(true, 2);
  check(same_bits(got.value, packed.value), "values beside packed bits");
  int64_t wrong = 0, wrong_bits = 0;
  const int64_t bytes = model.active_bytes(true);
  std::vector<uint8_t> bits(packed.active.size());
  for (size_t i = 0; i < got.active.size(); ++i) {
    const double value = to_double(got.value[i]);
    wrong += value != 0 && got.active[i] != (value > 0);
    const int64_t row = static_cast<int64_t>(i) / model.units,
                  u = static_cast<int64_t>(i) % model.units;
    uint8_t& byte = bits[static_cast<size_t>(row * bytes + u / 8)];
    byte = static_cast<uint8_t>(byte | got.active[i] << u % 8);
  }
  for (size_t i = 0; i < bits.size(); ++i) wrong_bits += bits[i] != packed.active[i];
  check(wrong == 0, "active where positive");
  check(wrong_bits == 0, "packed bits");
}

// A NaN reaches the values of what is alive, and nothing else.
void test_nan() {
  ++problems;
  Model<float> model(1, 2, {3, 7, 2}, Activation::relu, Statistics::shared);
  model.input->gpu.data()[0] = std::numeric_limits<float>::quiet_NaN();
  const Results<float> got = model.on_gpu(false, 1);
  for (size_t u = 0; u < 7; ++u) {
    const bool dead = u % 5 == 1;
    check(dead ? got.value[u] == 0 : std::isnan(got.value[u]), "NaN in example 0");
    check(got.active[u] == 0, "a NaN is not active");
    check(!std::isnan(got.value[7 + u]), "example 1 beside a NaN");
  }
}

}  // namespace

int main() {
  const std::vector<std::vector<int64_t>> shapes = {
      {4, 2}, {1, 1, 1}, {5, 3, 2}, {3, 1, 1, 1, 9, 1, 7, 2}, {33, 17, 9, 7}, {129, 16, 8, 5}};
  const Activation activations[] = {Activation::relu, Activation::gelu, Activation::elu};
  int i = 0;
  for (const auto& widths : shapes) {
    for (const int64_t batch : {1, 7, 65}) {
      const Activation activation = activations[i % 3];
      const Statistics statistics = i % 2 ? Statistics::own : Statistics::shared;
      test<float>(1 + i % 3, batch, widths, activation, statistics, i % 4 < 2);
      test<double>(1 + i % 2, batch, widths, activation, statistics, i % 4 >= 2);
      test<pyens::BFloat16>(2, batch, widths, activation, statistics, true);
      test<pyens::Float16>(1, batch, widths, activation, statistics, false);
      ++i;
    }
    if (widths.size() > 2) {
      test_active<float>(2, 9, widths);
      test_active<pyens::Float16>(2, 9, widths);
    }
  }
  test_nan();
  return finish();
}
