// The CUDA kernels of the ensemble MLP, run on the host, against the CPU's.

#include "../layer_options.h"
#include "emulated_test.h"
#include "kernels/ensemble_mlp.h"

namespace {

using namespace emulated_test;
using pyens::ActivationKind;
using pyens::kActivationKinds;
using pyens::kActivations;

// What a view of another tensor brings along.
struct View {
  int64_t skipped = 0;          // elements before the input
  bool shared_weights = false;  // by all members
  double planted = 0;           // in the input's second row, if it is not finite
};

// What goes beyond one activation of the hidden layers.
struct Extras {
  std::vector<LayerOptions> options = {};  // of each layer
  bool by_index = false;                   // members, among two more
  int64_t missing = 0;                     // an index of member 1 that is none
  bool rate_of_each_layer = false, drops_before_norm = false;
};

// Layer widths, with all that the parameters say about strides: rows lie kPad elements further apart than
// they are long.
template <class T, int64_t kPad = 3>
void test(int64_t members, int64_t batch, const std::vector<int64_t>& widths,
          ActivationKind activation, bool shared_input, bool with_bias, double dropout,
          bool tf32 = false, const View& view = {}, Extras extras = {}) {
  Random random(members * 1000 + batch);
  const size_t layers = widths.size() - 1;
  if (extras.options.empty()) extras.options = plain_layers(layers, activation);
  const int64_t stored = members + (extras.by_index ? 2 : 0);
  const std::vector<int64_t> indices = some_members(members);
  std::vector<int64_t> gpu_indices = indices;
  if (extras.missing != 0) gpu_indices[1] = extras.missing;
  const Global<int64_t> members_of(gpu_indices, "members");
  std::vector<T> inputs =
      normal<T>(random, view.skipped + (shared_input ? 1 : members) * batch * (widths[0] + kPad));
  if (!std::isfinite(view.planted)) {
    inputs[static_cast<size_t>(view.skipped + widths[0] + kPad)] = from_double<T>(view.planted);
  }
  const Values<T> input(std::move(inputs));
  std::vector<std::unique_ptr<Values<T>>> weights, biases, norm_weights, norm_biases;
  std::vector<int64_t> seed_values;
  for (int64_t m = 0; m < members; ++m) seed_values.push_back(m * 77 - 5);
  Global<int64_t> seeds(seed_values, "dropout_seeds");
  // Of members, or of layers, that have their own.
  const int64_t of_member = extras.rate_of_each_layer ? static_cast<int64_t>(layers) - 1 : 1;
  std::vector<double> rate_values;
  for (int64_t i = 0; i < members * of_member; ++i)
    rate_values.push_back(i == 1 ? 0 : dropout / double(1 + i));
  Global<double> rates(rate_values, "dropout_rates");
  std::vector<pyens::MLPLayer> on_cpu, on_gpu;
  for (size_t l = 0; l < layers; ++l) {
    const int64_t in = widths[l], out = widths[l + 1], row = in + kPad;
    const double scale = 1.4 / std::sqrt(static_cast<double>(in));
    const LayerOptions& options = extras.options[l];
    weights.push_back(std::make_unique<Values<T>>(random, stored * out * row, scale));
    biases.push_back(std::make_unique<Values<T>>(random, stored * out, 0.3));
    norm_weights.push_back(std::make_unique<Values<T>>(random, stored * out, 0.5, 1));
    norm_biases.push_back(std::make_unique<Values<T>>(random, stored * out, 0.3));
    pyens::MLPLayer layer{};
    layer.weight.format = dtype_of<T>();
    layer.activation = options.activation;
    layer.residual = options.residual;
    layer.norm.kind = options.norm;
    layer.norm.after_activation = options.after_activation;
    layer.norm.epsilon = options.epsilon;
    layer.norm.weight.member_stride = layer.norm.bias.member_stride = out;
    layer.norm.weight.data = options.norm_weight ? norm_weights[l]->cpu.data() : nullptr;
    layer.norm.bias.data = options.norm_bias ? norm_biases[l]->cpu.data() : nullptr;
    layer.in = in;
    layer.out = out;
    layer.weight.member_stride = view.shared_weights ? 0 : out * row;
    layer.weight.row_stride = row;
    layer.bias.member_stride = view.shared_weights ? 0 : out;
    layer.weight.data = weights[l]->cpu.data();
    layer.bias.data = with_bias ? biases[l]->cpu.data() : nullptr;
    on_cpu.push_back(layer);
    layer.weight.data = weights[l]->gpu.data();
    layer.bias.data = with_bias ? biases[l]->gpu.data() : nullptr;
    layer.norm.weight.data = options.norm_weight ? norm_weights[l]->gpu.data() : nullptr;
    layer.norm.bias.data = options.norm_bias ? norm_biases[l]->gpu.data() : nullptr;
    on_gpu.push_back(layer);
  }
  const size_t outputs = static_cast<size_t>(members * batch * widths.back());
  pyens::ensemble_mlp_cpu::Forward p{};
  p.dtype = dtype_of<T>();
  p.ensemble_size = members;
  p.batch = batch;
  p.num_layers = static_cast<int64_t>(layers);
  p.layers = on_cpu.data();
  p.members = extras.by_index ? indices.data() : nullptr;
  p.stored_members = extras.by_index ? stored : 0;
  p.input = input.cpu.data() + view.skipped;
  p.input_row_stride = widths[0] + kPad;
  p.input_member_stride = shared_input ? 0 : batch * p.input_row_stride;
  const bool own_rates = dropout > 0 && (members > 1 || extras.rate_of_each_layer);
  p.dropout.p = own_rates ? 0 : dropout;
  p.dropout.rates = own_rates ? rate_values.data() : nullptr;
  p.dropout.rates_member_stride = of_member;
  p.dropout.rates_layer_stride = extras.rate_of_each_layer ? 1 : 0;
  p.dropout.before_norm = extras.drops_before_norm;
  p.dropout.seeds = seed_values.data();
  std::vector<T> expected(outputs);
  p.output = expected.data();
  {
    namespace cpu = pyens::ensemble_mlp_cpu;
    const Scratch scratch(cpu::scratch_bytes(p));
    cpu::run(p, 0, cpu::work_items(p), scratch.get());
  }
  if (extras.missing != 0) {
    const int64_t rows = batch * widths.back();
    std::fill(expected.begin() + rows, expected.begin() + 2 * rows, from_double<T>(NAN));
  }
  p.layers = on_gpu.data();
  if (extras.by_index) p.members = members_of.data();
  p.input = input.gpu.data() + view.skipped;
  p.dropout.seeds = seeds.data();
  if (own_rates) p.dropout.rates = rates.data();
  // What hidden activations are rounded to, the CPU's or the GPU's.
  const double tolerance = std::is_same_v<T, pyens::BFloat16> ? 0.03
                           : sizeof(T) == 2 || tf32           ? 0.004
                                                              : kTight;
  run_all_orders<T>("ensemble_mlp", expected, tolerance, [&](void* output) {
    p.output = output;
    return pyens::ensemble_mlp_cuda::run(p, tf32, nullptr);
  });
}

// Weights, biases and an example, against what a block may have.
void test_fits_one_launch() {
  ++problems;
  const auto fits = [](const std::vector<int64_t>& widths, pyens::DType dtype, int64_t batch = 1,
                       bool residual = false) {
    std::vector<pyens::MLPLayer> layers(widths.size() - 1);
    for (size_t l = 0; l < layers.size(); ++l) {
      layers[l].in = widths[l];
      layers[l].out = widths[l + 1];
    }
    layers[0].residual = residual;
    pyens::EnsembleMLPParams p{};
    p.dtype = dtype;
    p.batch = batch;
    p.num_layers = static_cast<int64_t>(layers.size());
    p.layers = layers.data();
    return pyens::ensemble_mlp_cuda::fits_one_launch(p, /*tf32=*/false);
  };
  using pyens::DType;
  emulation::device.shared_limit = 4 * 100 * (99 + 1);
  check(fits({99, 100}, DType::float32) && !fits({100, 100}, DType::float32), "float32");
  check(fits({199, 100}, DType::float16) && !fits({200, 100}, DType::bfloat16), "16 bits");
  check(fits({49, 100}, DType::float64) && !fits({50, 100}, DType::float64), "float64");
  check(!fits({49, 100, 50, 10}, DType::float32), "all layers of a member together");
  check(fits({4999, 1}, DType::float32) && !fits({5001, 1}, DType::bfloat16),
        "two rows of an example");
  const std::vector<int64_t> deep(33, 2), deeper(34, 2);
  check(fits(deep, DType::float32) && !fits(deeper, DType::float32), "32 layers");
  // Batches: where the kernels for them have no room, the library's products.
  check(fits({99, 80, 4}, DType::float32) && !fits({99, 80, 4}, DType::float32, 64), "a batch");
  check(fits({20, 60, 4}, DType::float32, 64) && fits({20, 60, 4}, DType::float16, 64), "narrow");
  check(!fits({20, 300, 4}, DType::float16, 64) && !fits({9, 9}, DType::float16, 64), "16 bits");
  check(fits({20, 90, 4}, DType::float64, 64), "float64 has no other kernel");
  check(fits({80, 80, 4}, DType::float32, 64, true) &&
            !fits({90, 90, 90}, DType::float32, 64, true) &&
            fits({80, 80, 4}, DType::float16, 64, true),
        "norms and residuals have no other kernel");
  emulation::device = {};
}

}  // namespace

int main() {
  test_fits_one_launch();
  const std::vector<std::vector<int64_t>> shapes = {{1, 1}, {5, 3}, {33, 17, 9, 7}, {129, 13, 5}};
  int i = 0;
  for (const auto& widths : shapes) {
    for (const int64_t batch : {1, 7, 65}) {
      const ActivationKind activation = kActivationKinds[i % kActivations];
      const bool shared = i % 2 == 0, with_bias = i % 3 != 0;
      const double dropout = i % 4 == 1 ? 0.3 : 0;
      test<float>(1 + i % 3, batch, widths, activation, shared, with_bias, dropout);
      test<double>(1 + i % 2, batch, widths, activation, !shared, with_bias, dropout);
      test<pyens::BFloat16>(2, batch, widths, activation, shared, with_bias, 0);
      test<pyens::Float16>(1, batch, widths, activation, shared, with_bias, 0);
      ++i;
    }
  }
  // What else tensor cores do: more than 64 hidden units, input by words or not, dropout, activations.
  const std::vector<std::vector<int64_t>> wide = {{20, 64, 33, 5}, {7, 100, 18}, {50, 3, 81, 17}};
  for (const auto& widths : wide) {
    for (const int64_t batch : {1, 33, 150}) {
      const ActivationKind activation = kActivationKinds[i % 3 == 0 ? i / 3 % kActivations : 0];
      const double dropout = i % 4 == 2 ? 0.4 : 0;
      const bool shared = i % 2 == 0;
      test<pyens::BFloat16, 2>(2, batch, widths, activation, shared, true, dropout);
      test<pyens::Float16>(1, batch, widths, activation, shared, true, dropout);
      test<float>(1 + i % 2, batch, widths, activation, shared, i % 3 != 0, dropout, true);
      ++i;
    }
  }
  // Where words and vectors would be read across their alignment; NaN and Inf; weights that members share.
  constexpr double kInf = std::numeric_limits<double>::infinity();
  for (const int64_t skipped : {1, 2, 3, 4}) {
    const double planted = skipped == 1 ? NAN : skipped == 2 ? -kInf : kInf;
    const View view{skipped, skipped % 2 == 1, planted};
    const auto relu = ActivationKind::relu;
    test<pyens::BFloat16, 2>(3, 40, {20, 33, 6}, relu, false, true, 0, false, view);
    test<pyens::Float16, 1>(2, 40, {19, 70, 6}, kActivationKinds[skipped], true, true, 0, false,
                            view);
    test<float, 2>(2, 40, {10, 33, 6}, relu, false, true, 0, true, view);
    test<float, 4>(3, 65, {8, 33, 6}, relu, false, true, 0, false, view);
    test<float, 3>(2, 65, {9, 17, 6}, kActivationKinds[skipped], true, true, 0, false, view);
    test<float, 1>(2, 5, {9, 17, 6}, relu, false, true, 0, false, view);
  }
  // One number through networks of one unit: Inf stays Inf and -Inf ends at the ReLU, for 0 times Inf is in
  // the padding alone.
  for (const double planted : {kInf, -kInf, double{NAN}}) {
    const View view{0, false, planted};
    for (const std::vector<int64_t>& widths : {std::vector<int64_t>{1, 1, 1}, {1, 1, 1, 1, 1}}) {
      const auto relu = ActivationKind::relu;
      test<pyens::BFloat16>(2, 70, widths, relu, false, true, 0, false, view);
      test<pyens::Float16>(2, 70, widths, relu, false, true, 0.4, false, view);
      test<float>(2, 70, widths, relu, false, true, 0, true, view);
      test<float>(2, 70, widths, relu, false, true, 0, false, view);
      test<double>(2, 70, widths, relu, false, true, 0, false, view);
      test<float>(2, 3, widths, ActivationKind::tanh, false, true, 0, false, view);
    }
  }
  // What fits beside the weights: 4, 2 or 1 examples to a lane of plain multiply-adds, or none.
  for (const int kilobytes : {227, 80, 40, 10}) {
    emulation::device.shared_limit = kilobytes * 1024;
    for (const int64_t batch : {64, 333}) {
      test<float>(2, batch, {33, 17, 9, 7}, kActivationKinds[i % kActivations], i % 2 == 0, true,
                  i % 3 * 0.2);
      test<float, 0>(1, batch, {8, 150, 3}, kActivationKinds[i % kActivations], i % 2 == 0, false,
                     0);
      ++i;
    }
  }
  emulation::device = {};
  // Activations of each layer, with parameters, and of outputs; rates of each layer; members by index. Norms
  // and residuals go to the plain kernel whatever the batch.
  const std::vector<std::vector<int64_t>> deep = {
      {4, 3}, {2, 2, 2}, {5, 7, 7, 7, 2}, {17, 40, 40, 3}, {3, 70, 9, 9, 1}};
  for (const auto& widths : deep) {
    for (const int64_t batch : {1, 5, 70}) {
      for (const bool rich : {false, true}) {
        Extras extras{varied_layers(widths, i, rich, false)};
        extras.by_index = i % 3 > 0;
        const double dropout = i % 4 < 2 ? 0 : 0.3;
        extras.rate_of_each_layer = dropout > 0 && widths.size() > 2 && i % 3 < 2;
        extras.drops_before_norm = i % 5 < 3;
        const bool shared = i % 2 == 0, with_bias = i % 5 != 1;
        const auto none = ActivationKind::identity;
        test<float>(2, batch, widths, none, shared, with_bias, dropout, false, {}, extras);
        test<double>(3, batch, widths, none, !shared, with_bias, dropout, false, {}, extras);
        test<float>(2, batch, widths, none, shared, with_bias, dropout, true, {}, extras);
        test<pyens::BFloat16>(2, batch, widths, none, shared, with_bias, 0, false, {}, extras);
        test<pyens::Float16>(1, batch, widths, none, !shared, with_bias, 0, false, {}, extras);
        ++i;
      }
    }
  }
  // An index that is none, which nothing may be read by.
  for (const int64_t missing : {int64_t{-1}, int64_t{5}, INT64_MAX, INT64_MIN}) {
    for (const bool rich : {false, true}) {
      Extras extras{varied_layers({6, 8, 8, 3}, 4, rich, false)};
      extras.by_index = true;
      extras.missing = missing;
      const auto none = ActivationKind::identity;
      for (const int64_t batch : {2, 66}) {
        const bool with_bias = missing != 5;
        test<float>(3, batch, {6, 8, 8, 3}, none, true, with_bias, 0.5, false, {}, extras);
        test<float>(3, batch, {6, 8, 8, 3}, none, true, with_bias, 0.5, true, {}, extras);
        test<double>(3, batch, {6, 8, 8, 3}, none, false, with_bias, 0, false, {}, extras);
        test<pyens::Float16>(3, batch, {6, 8, 8, 3}, none, true, with_bias, 0, false, {}, extras);
      }
    }
  }
  // NaN and infinities in an example stay there.
  for (const double planted : {kInf, -kInf, double{NAN}}) {
    const View view{0, false, planted};
    for (int number = 0; number < 4; ++number) {
      const Extras extras{varied_layers({5, 6, 6, 3}, number, true, true)};
      const auto none = ActivationKind::identity;
      test<float>(2, 6, {5, 6, 6, 3}, none, false, true, 0, false, view, extras);
      test<double>(2, 6, {5, 6, 6, 3}, none, false, true, 0, false, view, extras);
    }
  }
  return finish();
}
