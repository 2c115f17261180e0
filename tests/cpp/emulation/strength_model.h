// A random ensemble MLP for the CPU's kernel and the GPU's, with the strength of its hidden units.
#pragma once

#include "../layer_options.h"
#include "emulated_test.h"
#include "kernels/ensemble_mlp.h"

namespace emulated_test {

using pyens::ActivationKind;
using pyens::kActivationKinds;

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
  std::vector<LayerOptions> options;  // of each layer
  std::unique_ptr<Values<T>> input;
  std::vector<std::unique_ptr<Values<T>>> weights, biases, norm_weights, norm_biases;
  std::unique_ptr<Values<R>> mean, std;
  int64_t member_stride;
  double dropout = 0;
  std::unique_ptr<Values<int64_t>> seeds;
  std::unique_ptr<Values<double>> rates;  // of members with dropout that have their own
  bool drops_before_norm = false;
  std::unique_ptr<Values<int64_t>> indices;  // of members among two more, if `by_index`
  int64_t stored;

  Model(int64_t e, int64_t b, std::vector<int64_t> w, ActivationKind act, Statistics statistics)
      : Model(e, b, w, plain_layers(w.size() - 1, act), statistics, false) {}
  Model(int64_t e, int64_t b, std::vector<int64_t> w, std::vector<LayerOptions> of_layers,
        Statistics statistics, bool by_index)
      : members(e),
        batch(b),
        widths(std::move(w)),
        options(std::move(of_layers)),
        stored(e + (by_index ? 2 : 0)) {
    Random random(e * 1000 + b);
    if (by_index) indices = std::make_unique<Values<int64_t>>(some_members(e), "members");
    input = std::make_unique<Values<T>>(random, b * widths[0]);
    for (size_t l = 0; l + 1 < widths.size(); ++l) {
      const int64_t in = widths[l], out = widths[l + 1];
      const double scale = 1.4 / std::sqrt(static_cast<double>(in));
      weights.push_back(std::make_unique<Values<T>>(random, stored * out * in, scale));
      biases.push_back(std::make_unique<Values<T>>(random, stored * out, 0.3));
      norm_weights.push_back(std::make_unique<Values<T>>(random, stored * out, 0.5, 1));
      norm_biases.push_back(std::make_unique<Values<T>>(random, stored * out, 0.3));
      if (l + 2 < widths.size()) units += out;
    }
    member_stride = statistics == Statistics::own ? units : 0;
    const int64_t n = statistics == Statistics::own ? e * units : units;
    std::vector<R> means = normal<R>(random, n), stds = normal<R>(random, n);
    for (size_t u = 0; u < stds.size(); ++u) {
      stds[u] = std::abs(stds[u]) + R(0.1);
      if (u % 5 == 1) stds[u] = u % 2 ? R(0) : -std::numeric_limits<R>::min() / 2;  // dead
      if (u % 7 == 3) stds[u] = std::numeric_limits<R>::infinity();
      if (statistics == Statistics::none) means[u] = 0, stds[u] = 1;
    }
    std::vector<int64_t> seed_values;
    for (int64_t m = 0; m < e; ++m) seed_values.push_back(m * 77 - 5);
    seeds = std::make_unique<Values<int64_t>>(seed_values, "dropout_seeds");
    mean = std::make_unique<Values<R>>(means, "mean");
    std = std::make_unique<Values<R>>(stds, "std");
  }

  // On both sides, in the first number of the last example.
  void plant_in_input(double value) {
    std::vector<T> changed = input->cpu;
    changed[changed.size() - static_cast<size_t>(widths[0])] = from_double<T>(value);
    input = std::make_unique<Values<T>>(changed, "input");
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
      layer.weight.format = dtype_of<T>();
      const LayerOptions& of = options[l];
      layer.activation = of.activation;
      layer.residual = of.residual;
      layer.norm.kind = of.norm;
      layer.norm.after_activation = of.after_activation;
      layer.norm.epsilon = of.epsilon;
      layer.norm.weight = {of.norm_weight ? side(norm_weights[l]) : nullptr, widths[l + 1]};
      layer.norm.bias = {of.norm_bias ? side(norm_biases[l]) : nullptr, widths[l + 1]};
      layer.in = layer.weight.row_stride = widths[l];
      layer.out = layer.bias.member_stride = widths[l + 1];
      layer.weight.member_stride = layer.in * layer.out;
      layer.weight.data = side(weights[l]);
      layer.bias.data = side(biases[l]);
      layers.push_back(layer);
    }
    pyens::ActivationStrengthParams strength{};
    strength.units = units;
    strength.mean = side(mean);
    strength.std = side(std);
    strength.mean_member_stride = strength.std_member_stride = member_stride;
    strength.value = value;
    strength.active = active;
    strength.bitpack = pack;
    pyens::ensemble_mlp_cpu::Forward p{};
    p.dtype = dtype_of<T>();
    p.ensemble_size = members;
    p.batch = batch;
    p.num_layers = static_cast<int64_t>(layers.size());
    p.layers = layers.data();
    p.input = side(input);
    p.input_row_stride = widths[0];
    p.output = output;
    std::vector<double> of_members;
    for (int64_t m = 0; m < members; ++m)
      of_members.push_back(m == 1 ? 0 : dropout / double(1 + m));
    if (!rates) rates = std::make_unique<Values<double>>(of_members, "dropout_rates");
    const bool own_rates = dropout > 0 && members > 1;
    p.dropout.p = own_rates ? 0 : dropout;
    p.dropout.rates = own_rates ? static_cast<const double*>(side(rates)) : nullptr;
    p.dropout.rates_member_stride = 1;
    p.dropout.before_norm = drops_before_norm;
    if (indices) {
      p.members = static_cast<const int64_t*>(side(indices));
      p.stored_members = stored;
    }
    p.dropout.seeds = static_cast<const int64_t*>(side(seeds));
    if (value) p.strength = strength;
    run(p);
  }

  Results<T> on_cpu(bool pack, bool with_strength = true) {
    Results<T> r;
    r.output.resize(static_cast<size_t>(members * batch * widths.back()));
    r.value.resize(static_cast<size_t>(members * batch * units));
    r.active.resize(static_cast<size_t>(members * batch * active_bytes(pack)));
    with_params(false, pack, r.output.data(), with_strength ? r.value.data() : nullptr,
                r.active.data(), [](const auto& p) {
                  namespace cpu = pyens::ensemble_mlp_cpu;
                  const Scratch scratch(cpu::scratch_bytes(p));
                  cpu::run(p, 0, cpu::work_items(p), scratch.get());
                });
    return r;
  }

  // forward(params): what went wrong, or nullptr.
  template <class Forward>
  Results<T> on_gpu(bool pack, uint64_t seed, bool with_strength, const Forward& forward) {
    emulation::set_seed(seed);
    const int64_t rows = members * batch;
    Global<T> output(static_cast<size_t>(rows * widths.back()), "output");
    Global<T> value(static_cast<size_t>(rows * units), "value");
    Global<uint8_t> active(static_cast<size_t>(rows * active_bytes(pack)), "active");
    with_params(true, pack, output.data(), with_strength ? value.data() : nullptr, active.data(),
                [&](const auto& p) {
                  const char* error = forward(p);
                  check(error == nullptr, error ? error : "");
                });
    return {output.host(), value.host(), active.host()};
  }
};

}  // namespace emulated_test
