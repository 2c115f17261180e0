// Activation strength out of the CUDA kernel of the ensemble MLP, run on the host, against the CPU's.

#include "strength_model.h"

namespace {

using namespace emulated_test;

template <class T>
Results<T> on_gpu(Model<T>& model, bool pack, uint64_t seed, bool with_strength = true) {
  return model.on_gpu(pack, seed, with_strength, [](const auto& p) {
    return pyens::ensemble_mlp_cuda::run(p, /*tf32=*/false, nullptr);
  });
}

template <class T>
void compare(Model<T>& model, bool pack) {
  const Results<T> expected = model.on_cpu(pack), first = on_gpu(model, pack, 1);
  for (const uint64_t seed : {2, 3}) {
    const Results<T> again = on_gpu(model, pack, seed);
    check(same_bits(again.output, first.output) && same_bits(again.value, first.value) &&
              again.active == first.active,
          "other bits in another order");
  }
  const std::vector<T> without = on_gpu(model, pack, 1, false).output;
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

template <class T>
void test(int64_t members, int64_t batch, const std::vector<int64_t>& widths,
          ActivationKind activation, Statistics statistics, bool pack, double planted = 0) {
  ++problems;
  Model<T> model(members, batch, widths, activation, statistics);
  if (planted != 0) model.plant_in_input(planted);
  compare(model, pack);
}

template <class T>
void test_rich(int64_t members, int64_t batch, const std::vector<int64_t>& widths,
               Statistics statistics, int number, bool pack) {
  ++problems;
  Model<T> model(members, batch, widths, varied_layers(widths, number, true, false), statistics,
                 number % 2 == 1);
  compare(model, pack);
}

// Where values are the activations themselves, their signs say what is active.
template <class T>
void test_active(int64_t members, int64_t batch, const std::vector<int64_t>& widths) {
  ++problems;
  Model<T> model(members, batch, widths, ActivationKind::tanh, Statistics::none);
  const Results<T> got = on_gpu(model, false, 1), packed = on_gpu(model, true, 2);
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
  Model<float> model(1, 2, {3, 7, 2}, ActivationKind::relu, Statistics::shared);
  model.input->gpu.data()[0] = std::numeric_limits<float>::quiet_NaN();
  const Results<float> got = on_gpu(model, false, 1);
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
  const ActivationKind activations[] = {ActivationKind::relu, ActivationKind::gelu,
                                        ActivationKind::elu};
  int i = 0;
  for (const auto& widths : shapes) {
    for (const int64_t batch : {1, 7, 65}) {
      const ActivationKind activation = activations[i % 3];
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
  // Infinite numbers, NaN, and those whose products overflow: those of 16 bits where they are rounded, which is
  // not the same everywhere.
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double planted : {infinity, -infinity, double{NAN}, 3e38, -6e4}) {
    for (const ActivationKind activation : kActivationKinds) {
      const Statistics statistics = ++i % 2 ? Statistics::own : Statistics::shared;
      test<float>(2, 9, {5, 17, 9, 3}, activation, statistics, i % 4 < 2, planted);
      test<double>(1, 3, {5, 17, 9, 3}, activation, statistics, i % 4 >= 2, planted);
      if (std::isfinite(planted)) continue;
      test<pyens::BFloat16>(2, 9, {5, 17, 9, 3}, activation, statistics, true, planted);
      test<pyens::Float16>(1, 9, {5, 17, 9, 3}, activation, statistics, false, planted);
    }
  }
  // Norms and residuals, activations of each layer and of outputs, members by index.
  const std::vector<std::vector<int64_t>> deep = {
      {4, 2}, {1, 1, 1}, {3, 1, 1, 1, 9, 9, 7, 2}, {33, 17, 17, 7}, {9, 16, 16, 8, 5}};
  for (const auto& widths : deep) {
    for (const int64_t batch : {1, 7, 65}) {
      const Statistics statistics = i % 2 ? Statistics::own : Statistics::shared;
      test_rich<float>(1 + i % 3, batch, widths, statistics, i, i % 4 < 2);
      test_rich<double>(1 + i % 2, batch, widths, statistics, i, i % 4 >= 2);
      test_rich<pyens::BFloat16>(2, batch, widths, statistics, i, true);
      test_rich<pyens::Float16>(1, batch, widths, statistics, i, false);
      ++i;
    }
  }
  test_nan();
  return finish();
}
