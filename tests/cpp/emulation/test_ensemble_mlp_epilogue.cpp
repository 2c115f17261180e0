// The layers of a wide ensemble MLP one by one, as ops/ensemble_mlp_call.cpp puts them together: products,
// here by the host in float64, and the CUDA kernel of the epilogue. Against the CPU's kernel.

#include "kernels/cuda/ensemble_mlp_epilogue.cu"

#include "strength_model.h"

namespace {

using namespace emulated_test;

template <class T>
T element(const void* from, int64_t at) {
  return static_cast<const T*>(from)[at];
}

// [E, rows, out] of inputs [E, rows, in] (those of a shared one are given with a stride of 0).
template <class T>
std::vector<RealFor<T>> products(const pyens::EnsembleMLPParams& p, const pyens::MLPLayer& layer,
                                 int64_t rows, const T* input, int64_t member_stride) {
  std::vector<RealFor<T>> z;
  for (int64_t m = 0; m < p.ensemble_size; ++m) {
    const int64_t found = p.parameters_of(m);
    const int64_t parameters = p.members && (found < 0 || found >= p.stored_members) ? 0 : found;
    for (int64_t b = 0; b < rows; ++b) {
      for (int64_t o = 0; o < layer.out; ++o) {
        double sum = 0;
        for (int64_t i = 0; i < layer.in; ++i) {
          const int64_t w =
              parameters * layer.weight.member_stride + o * layer.weight.row_stride + i;
          sum += to_double(input[m * member_stride + b * layer.in + i]) *
                 to_double(element<T>(layer.weight.data, w));
        }
        z.push_back(static_cast<RealFor<T>>(sum));
      }
    }
  }
  return z;
}

// All layers of rows [first, first + rows) of the batch.
template <class T>
const char* forward(const pyens::EnsembleMLPParams& p, int64_t first, int64_t rows) {
  using R = RealFor<T>;
  const T* input = static_cast<const T*>(p.input) + first * p.input_row_stride;
  int64_t member_stride = p.input_member_stride;
  std::vector<T> hidden;
  for (int64_t l = 0; l < p.num_layers; ++l) {
    const pyens::MLPLayer& layer = p.layers[l];
    const bool last = l + 1 == p.num_layers;
    const Global<R> z(products<T>(p, layer, rows, input, member_stride), "z");
    const Global<T> x(hidden, "x");
    const Global<T> h(static_cast<size_t>(p.ensemble_size * rows * layer.out), "h");
    pyens::EnsembleMLPEpilogue e{};
    e.layer = l;
    e.first_row = first;
    e.rows = rows;
    e.z = z.data();
    const bool in_place = std::is_same_v<T, R> && l % 2 == 0;
    if (layer.residual) {
      e.x = l == 0 ? static_cast<const void*>(input) : x.data();
      e.x_member_stride = member_stride;
      e.x_row_stride = layer.in;
    }
    e.h = in_place ? static_cast<void*>(z.data()) : h.data();
    e.h_member_stride = rows * layer.out;
    if (last) {
      e.h = static_cast<T*>(p.output) + first * layer.out;
      e.h_member_stride = p.batch * layer.out;
    }
    if (const char* error = pyens::ensemble_mlp_cuda::run_epilogue(p, e, nullptr)) return error;
    if (last) break;
    if (in_place) {
      const std::vector<R> values = z.host();
      hidden.assign(reinterpret_cast<const T*>(values.data()),
                    reinterpret_cast<const T*>(values.data()) + values.size());
    } else {
      hidden = h.host();
    }
    input = hidden.data();
    member_stride = rows * layer.out;
  }
  return nullptr;
}

template <class T>
void compare(Model<T>& model, bool with_strength, bool pack) {
  const int64_t batch = model.batch;
  const auto whole = [&](const auto& p) { return forward<T>(p, 0, batch); };
  const auto in_two = [&](const auto& p) {  // chunks of the batch
    const char* error = forward<T>(p, 0, batch / 2);
    return error ? error : forward<T>(p, batch / 2, batch - batch / 2);
  };
  const Results<T> expected = model.on_cpu(pack, with_strength);
  const Results<T> first = model.on_gpu(pack, 1, with_strength, whole);
  for (const uint64_t seed : {2, 3}) {
    const Results<T> again = seed == 2 ? model.on_gpu(pack, seed, with_strength, in_two)
                                       : model.on_gpu(pack, seed, with_strength, whole);
    check(same_bits(again.output, first.output), "output: other bits in another order or chunks");
    if (!with_strength) continue;
    check(same_bits(again.value, first.value) && again.active == first.active,
          "strength: other bits in another order or chunks");
  }
  // Half precision: hidden activations are rounded here, and on the CPU only by some processors.
  const double tolerance = sizeof(T) == 2 ? (std::is_same_v<T, pyens::BFloat16> ? 0.03 : 0.004) : 0;
  check_close("output", first.output, expected.output, tolerance);
  if (!with_strength) return;
  check_close("value", first.value, expected.value, tolerance);
  if (kIsReal<T>) check(first.active == expected.active, "active as on the CPU");
}

template <class T>
void test(int64_t members, int64_t batch, const std::vector<int64_t>& widths,
          ActivationKind activation, Statistics statistics, bool with_strength, bool pack,
          double dropout, double planted = 0) {
  ++problems;
  Model<T> model(members, batch, widths, activation, statistics);
  if (planted != 0) model.plant_in_input(planted);
  model.dropout = dropout;
  compare(model, with_strength, pack);
}

template <class T>
void test_shapes() {
  const std::vector<std::vector<int64_t>> shapes = {
      {4, 2},     {3, 1, 1, 1, 9, 1, 7, 2}, {5, 16, 8, 24, 3}, {5, 16, 3, 8, 2}, {7, 300, 5},
      {6, 280, 8}};
  int i = 0;
  for (const auto& widths : shapes) {
    for (const int64_t batch : {1, 7, 70}) {
      const Statistics statistics = i % 2 ? Statistics::own : Statistics::shared;
      const ActivationKind activation = pyens::kActivationKinds[i % pyens::kActivations];
      const bool with_strength = widths.size() > 2;
      test<T>(1 + i % 3, batch, widths, activation, statistics, false, false, i % 2 ? 0.3 : 0);
      test<T>(1 + i % 2, batch, widths, activation, statistics, with_strength, i % 3 > 0, 0);
      ++i;
    }
  }
}

// Norms and residuals, activations of each layer and of outputs, members by index.
template <class T>
void test_rich() {
  const std::vector<std::vector<int64_t>> shapes = {
      {4, 4, 2},          {3, 1, 1, 1, 9, 9, 2}, {16, 16, 8, 8, 8, 3},
      {5, 35, 35, 35, 3}, {3, 2100, 2100, 2},    {7, 300, 300, 5}};
  int i = 0;
  for (const auto& widths : shapes) {
    for (const int64_t batch : {1, 5, 21}) {
      if (widths[1] > 2000 && batch > 1 + (i % 4)) continue;
      ++problems;
      const Statistics statistics = i % 2 ? Statistics::own : Statistics::shared;
      Model<T> model(1 + i % 3, batch, widths, varied_layers(widths, i, true, false), statistics,
                     i % 2 == 1);
      const bool with_strength = i % 3 == 0, pack = i % 2 == 0;
      model.dropout = with_strength || i % 3 == 1 ? 0 : 0.3;
      model.drops_before_norm = i % 4 < 2;
      compare(model, with_strength, pack);
      // As if one of the members was none.
      if (i % 2 == 1 && model.members > 1) {
        const Results<T> right = model.on_gpu(
            pack, 1, with_strength, [&](const auto& p) { return forward<T>(p, 0, batch); });
        std::vector<int64_t> changed = model.indices->cpu;
        changed[1] = i % 4 == 1 ? -1 : model.stored;
        model.indices = std::make_unique<Values<int64_t>>(changed, "members");
        const Results<T> got = model.on_gpu(pack, 1, with_strength,
                                            [&](const auto& p) { return forward<T>(p, 0, batch); });
        const size_t rows = static_cast<size_t>(batch * widths.back());
        for (size_t at = 0; at < got.output.size(); ++at) {
          const bool missing = at / rows == 1;
          check(missing ? std::isnan(to_double(got.output[at]))
                        : to_double(got.output[at]) == to_double(right.output[at]),
                "a member that is none");
        }
      }
      ++i;
    }
  }
}

// Infinite numbers, NaN, and those whose products overflow: those of 16 bits where they are rounded, which is not
// the same everywhere.
template <class T>
void test_unusual() {
  const double infinity = std::numeric_limits<double>::infinity();
  int i = 0;
  for (const double planted : {infinity, -infinity, double{NAN}, 3e38, -6e4}) {
    if (sizeof(T) == 2 && std::isfinite(planted)) continue;
    for (const ActivationKind activation : pyens::kActivationKinds) {
      // Of numbers so large, another rounding is another angle.
      if (std::isfinite(planted) && activation == ActivationKind::sin) continue;
      const Statistics statistics = ++i % 2 ? Statistics::own : Statistics::shared;
      test<T>(2, 9, {5, 16, 9, 3}, activation, statistics, i % 3 > 0, i % 4 == 0,
              i % 3 == 0 ? 0.3 : 0, planted);
    }
  }
}

// A NaN stays in its example, and reaches the values of what is alive.
void test_nan() {
  ++problems;
  Model<float> model(1, 2, {3, 8, 2}, ActivationKind::relu, Statistics::shared);
  model.input->gpu.data()[0] = std::numeric_limits<float>::quiet_NaN();
  const auto run = [](const auto& p) { return forward<float>(p, 0, 2); };
  const Results<float> got = model.on_gpu(false, 1, true, run);
  for (size_t u = 0; u < 8; ++u) {
    const bool dead = u % 5 == 1;
    check(dead ? got.value[u] == 0 : std::isnan(got.value[u]), "NaN in example 0");
    check(got.active[u] == 0, "a NaN is not active");
    check(!std::isnan(got.value[8 + u]), "example 1 beside a NaN");
  }
  check(std::isnan(got.output[0]) && !std::isnan(got.output[2]), "outputs beside a NaN");
}

}  // namespace

int main() {
  test_shapes<float>();
  test_shapes<double>();
  test_shapes<pyens::BFloat16>();
  test_shapes<pyens::Float16>();
  test_rich<float>();
  test_rich<double>();
  test_rich<pyens::BFloat16>();
  test_rich<pyens::Float16>();
  test_unusual<float>();
  test_unusual<double>();
  test_unusual<pyens::BFloat16>();
  test_unusual<pyens::Float16>();
  test_nan();
  return finish();
}
