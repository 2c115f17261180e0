// The CUDA kernels of a training pass of the ensemble MLP, run on the host, against the CPU's.
//
// Inputs and parameters lie on a coarse grid, on which the outputs of a ReLU network are exact: no
// rounding turns a ReLU on or off. Norms leave the grid: beside them activations are smooth.

#include "kernels/cuda/ensemble_mlp_training.cu"

#include "../layer_options.h"
#include "emulated_test.h"

namespace {

using namespace emulated_test;
using pyens::ActivationKind;
using pyens::kActivationKinds;
using pyens::kActivations;
using pyens::Loss;
namespace cpu = pyens::ensemble_mlp_cpu;
namespace gpu = pyens::ensemble_mlp_cuda;

// Where sample weights lie: in the middle of their range, at its ends, so that the smallest ones and the sum
// of the largest ones are no normal numbers, all but one so much smaller than that one, or all at 0.
enum class Weights { ordinary, subnormal, overflowing, one_huge, zero };

// What is no ordinary number, and where. Example 2 has it, or all of member 1 has.
enum class Place { nowhere, input, target, weight, bias };
struct Planted {
  Place place = Place::nowhere;
  double value = 0;
};

struct Case {
  int64_t members, batch;
  std::vector<int64_t> widths;
  Loss loss;
  ActivationKind activation;
  bool shared_input, shared_target, with_bias;
  int weighted;  // 0 no, 1 one weight per example, 2 one per member and example
  double dropout;
  unsigned needs_grad =
      31;  // bit 0 the input's gradient, 1 the weights', 2 the biases', 3 and 4 norms'
  Weights sample_weights = Weights::ordinary;
  Planted planted = {};
  bool with_options = false;               // weights of the classes, bounds of the log variance
  std::vector<LayerOptions> options = {};  // of each layer, in the place of `activation`
  bool by_index = false;                   // members, among two more
  bool rate_of_each_layer = false, drops_before_norm = false;

  int64_t stored() const { return members + (by_index ? 2 : 0); }
};

template <class T>
std::vector<T> grid(Random& random, int64_t n, double scale, double step) {
  std::vector<T> values = normal<T>(random, n, scale / step);
  for (T& value : values) value = from_double<T>(std::round(to_double(value)) * step);
  return values;
}

template <class T>
struct Problem {
  using R = RealFor<T>;
  Case c;
  int64_t targets;  // of an example
  std::unique_ptr<Values<T>> input, output_gradient;
  std::vector<std::unique_ptr<Values<T>>> weights, biases, norm_weights, norm_biases;
  std::unique_ptr<Values<R>> target, sample_weight, member_scale;
  std::unique_ptr<Values<int64_t>> labels, seeds, indices;
  std::unique_ptr<Values<double>> rates;  // of dropout, of the members or of their layers
  std::unique_ptr<Values<double>> quantiles;
  std::unique_ptr<Values<R>> class_weight, log_variance_min, log_variance_max;
  bool own_options;  // of each member

  explicit Problem(const Case& given) : c(given) {
    if (c.options.empty()) c.options = plain_layers(c.widths.size() - 1, c.activation);
    Random random(static_cast<uint64_t>(c.members * 1000 + c.batch));
    const int64_t e = c.members, b = c.batch, out = c.widths.back();
    std::vector<double> some{0.125, 0.5, 0.875};
    while (out % static_cast<int64_t>(some.size()) != 0) some.pop_back();
    quantiles = std::make_unique<Values<double>>(some, "quantiles");
    targets = c.loss == Loss::gaussian_nll ? out / 2
              : c.loss == Loss::quantile   ? out / static_cast<int64_t>(some.size())
                                           : out;
    std::vector<T> x = grid<T>(random, (c.shared_input ? 1 : e) * b * c.widths[0], 1, 0.25);
    std::vector<R> y = grid<R>(random, (c.shared_target ? 1 : e) * b * targets, 1, 0.125);
    if (c.loss == Loss::poisson_nll || c.loss == Loss::soft_cross_entropy) {
      for (R& value : y) value = std::abs(value);
    }
    own_options = (c.members + b) % 2 == 0;
    const auto option = [&](int64_t size) {
      std::vector<R> values = grid<R>(random, (own_options ? e : 1) * size, 1, 0.25);
      return values;
    };
    std::vector<R> of_class = option(out), low = option(out / 2), high = low;
    // None is 0 beside sample weights of which one is all that counts.
    const R least = c.sample_weights == Weights::ordinary ? R(0) : R(0.25);
    for (R& value : of_class) value = (std::abs(value) + least) * weight(b + 1);
    for (R& value : high) value += R(1.5);
    class_weight = std::make_unique<Values<R>>(of_class, "class_weight");
    log_variance_min = std::make_unique<Values<R>>(low, "log_variance_min");
    log_variance_max = std::make_unique<Values<R>>(high, "log_variance_max");
    std::vector<int64_t> classes, dropout_seeds;
    for (int64_t i = 0; i < (c.shared_target ? 1 : e) * b; ++i) {
      classes.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(out)));
    }
    for (int64_t m = 0; m < e; ++m) dropout_seeds.push_back(m * 7919 - 3);
    for (size_t l = 0; l + 1 < c.widths.size(); ++l) {
      const int64_t size = c.stored() * c.widths[l + 1];
      const double scale = 1.4 / std::sqrt(static_cast<double>(c.widths[l]));
      weights.push_back(
          std::make_unique<Values<T>>(grid<T>(random, size * c.widths[l], scale, 0.125)));
      biases.push_back(std::make_unique<Values<T>>(grid<T>(random, size, 0.3, 0.125)));
      std::vector<T> by = grid<T>(random, size, 0.5, 0.125);
      for (T& value : by) value = from_double<T>(to_double(value) + 1);
      norm_weights.push_back(std::make_unique<Values<T>>(by));
      norm_biases.push_back(std::make_unique<Values<T>>(grid<T>(random, size, 0.3, 0.125)));
    }
    indices = std::make_unique<Values<int64_t>>(some_members(e), "members");
    std::vector<R> example_weights;
    for (int64_t i = 0; i < (c.weighted == 2 ? e : 1) * b; ++i) {
      const bool left_out = b > 1 && i % 5 == 1;
      example_weights.push_back(left_out ? R(0) : weight(i));
      if (!left_out || c.weighted != 1) continue;
      // What all members leave out may be anything.
      for (int64_t m = 0; m < (c.shared_input ? 1 : e); ++m) {
        x[static_cast<size_t>((m * b + i) * c.widths[0])] = from_double<T>(NAN);
      }
      for (int64_t m = 0; m < (c.shared_target ? 1 : e); ++m) {
        classes[static_cast<size_t>(m * b + i)] = -100;
        y[static_cast<size_t>((m * b + i) * targets)] = std::numeric_limits<R>::infinity();
      }
    }
    plant(x, y);
    std::vector<R> scales;
    for (int64_t m = 0; m < e; ++m) scales.push_back(static_cast<R>(m) - R(0.5));
    input = std::make_unique<Values<T>>(x, "input");
    target = std::make_unique<Values<R>>(y, "target");
    labels = std::make_unique<Values<int64_t>>(classes, "labels");
    seeds = std::make_unique<Values<int64_t>>(dropout_seeds, "dropout_seeds");
    sample_weight = std::make_unique<Values<R>>(example_weights, "sample_weight");
    std::vector<double> dropout_rates;
    for (int64_t i = 0; i < e * rates_of_member(); ++i)
      dropout_rates.push_back(i % 3 == 1 ? 0 : c.dropout / double(1 + i));
    rates = std::make_unique<Values<double>>(dropout_rates, "dropout_rates");
    member_scale = std::make_unique<Values<R>>(scales, "member_scale");
    output_gradient = std::make_unique<Values<T>>(grid<T>(random, e * b * out, 1, 0.25), "grad");
  }

  int64_t rates_of_member() const {
    return c.rate_of_each_layer ? static_cast<int64_t>(c.widths.size()) - 2 : 1;
  }

  R weight(int64_t i) const {
    using Limits = std::numeric_limits<R>;
    const R ordinary = static_cast<R>(0.25 * static_cast<double>(1 + i % 7));
    switch (c.sample_weights) {
      case Weights::ordinary: return ordinary;
      case Weights::subnormal: return ordinary * (Limits::min() / 64);
      case Weights::overflowing: return ordinary * (Limits::max() / 2);
      case Weights::one_huge: return i % c.batch == 0 ? Limits::max() : ordinary * Limits::min();
      case Weights::zero: return i / c.batch == 0 ? R(0) : ordinary;  // of the first member
    }
    return ordinary;
  }

  void plant(std::vector<T>& x, std::vector<R>& y) {
    const T value = from_double<T>(c.planted.value);
    const auto of_member = [&](auto& values) {  // the first number of member 1's
      auto changed = values->cpu;
      changed[changed.size() / static_cast<size_t>(c.members)] = value;
      values = std::make_unique<Values<T>>(changed);
    };
    switch (c.planted.place) {
      case Place::nowhere: return;
      case Place::input: x[static_cast<size_t>(2 * c.widths[0])] = value; return;
      case Place::target:
        y[static_cast<size_t>(2 * targets)] = static_cast<R>(c.planted.value);
        return;
      case Place::weight: return of_member(weights[0]);
      case Place::bias: return of_member(biases[0]);
    }
  }

  // What both sides are given, but for the memory they write to.
  struct Parameters {
    std::vector<pyens::MLPLayer> layers;
    std::vector<pyens::MLPLayerGradient> gradients;
    cpu::Training training{};
  };

  // at(values): where that side reads them.
  template <class At>
  void set(Parameters& p, const At& at) const {
    const size_t n = weights.size();
    p.layers.resize(n);
    p.gradients.resize(n);
    for (size_t l = 0; l < n; ++l) {
      pyens::MLPLayer& layer = p.layers[l];
      layer.weight.format = dtype_of<T>();
      const LayerOptions& options = c.options[l];
      layer.activation = options.activation;
      layer.residual = options.residual;
      layer.norm = {options.norm, options.after_activation, options.epsilon, {}, {}};
      if (options.norm_weight) layer.norm.weight = {at(*norm_weights[l]), c.widths[l + 1]};
      if (options.norm_bias) layer.norm.bias = {at(*norm_biases[l]), c.widths[l + 1]};
      layer.in = c.widths[l];
      layer.out = c.widths[l + 1];
      layer.weight.data = at(*weights[l]);
      layer.bias.data = c.with_bias ? at(*biases[l]) : nullptr;
      layer.weight.member_stride = layer.out * layer.in;
      layer.weight.row_stride = layer.in;
      layer.bias.member_stride = layer.out;
    }
    cpu::Training& t = p.training;
    pyens::EnsembleMLPParams& f = t.forward;
    f.dtype = dtype_of<T>();
    f.ensemble_size = c.members;
    f.batch = c.batch;
    f.num_layers = static_cast<int64_t>(n);
    f.layers = p.layers.data();
    f.members = c.by_index ? at(*indices) : nullptr;
    f.stored_members = c.by_index ? c.stored() : 0;
    f.input = at(*input);
    f.input_row_stride = c.widths[0];
    f.input_member_stride = c.shared_input ? 0 : c.batch * c.widths[0];
    const bool own_rates = c.dropout > 0 && (c.batch % 2 == 1 || c.rate_of_each_layer);
    f.dropout.p = own_rates ? 0 : c.dropout;
    f.dropout.rates = own_rates ? at(*rates) : nullptr;
    f.dropout.rates_member_stride = rates_of_member();
    f.dropout.rates_layer_stride = c.rate_of_each_layer ? 1 : 0;
    f.dropout.before_norm = c.drops_before_norm;
    f.dropout.seeds = at(*seeds);
    t.loss = c.loss;
    pyens::LossParameters& of_loss = t.of_loss;
    of_loss.temperature = 0.75;
    of_loss.label_smoothing = (c.batch + c.weighted) % 2 ? 0.2 : 0;
    of_loss.delta = 0.75;
    of_loss.quantiles = at(*quantiles);
    of_loss.num_quantiles = static_cast<int64_t>(quantiles->cpu.size());
    if (c.with_options) {
      const int64_t out = own_options ? c.widths.back() : 0;
      if (c.loss == Loss::cross_entropy) of_loss.class_weight = at(*class_weight);
      of_loss.class_weight_member_stride = out;
      of_loss.log_variance_min = at(*log_variance_min);
      of_loss.log_variance_max = at(*log_variance_max);
      of_loss.log_variance_min_member_stride = of_loss.log_variance_max_member_stride = out / 2;
    }
    if (c.loss == Loss::none) {
      t.target = at(*output_gradient);
      t.target_row_stride = c.widths.back();
      t.target_member_stride = c.batch * c.widths.back();
    } else {
      const bool classes = c.loss == Loss::cross_entropy;
      t.target = classes ? static_cast<const void*>(at(*labels)) : at(*target);
      t.target_row_stride = classes ? 1 : targets;
      t.target_member_stride = c.shared_target ? 0 : c.batch * t.target_row_stride;
      if (c.weighted) t.sample_weight = at(*sample_weight);
      t.sample_weight_member_stride = c.weighted == 2 ? c.batch : 0;
      if (c.batch % 2 == 0) t.member_scale = at(*member_scale);
    }
    t.sum_grad_input = c.shared_input;
    t.gradients = p.gradients.data();
    t.threads = 2;
  }

  size_t input_size() const {
    return static_cast<size_t>((c.shared_input ? 1 : c.members) * c.batch * c.widths[0]);
  }

  // The loss, then the gradients of input, weights, biases, norms' weights and biases: those that are needed.
  using Results = std::vector<std::vector<R>>;

  // f(layer, which of its gradients, how many numbers, where the pointer to them is): one gradient after the
  // other, all weights first.
  template <class F>
  void for_each_gradient(std::vector<pyens::MLPLayerGradient>& gradients, const F& f) const {
    for (int which = 0; which < 4; ++which) {
      for (size_t l = 0; l < weights.size(); ++l) {
        pyens::MLPLayerGradient& g = gradients[l];
        void** const to[] = {&g.weight, &g.bias, &g.norm_weight, &g.norm_bias};
        const int64_t out = c.members * c.widths[l + 1];
        f(which, l, static_cast<size_t>(which == 0 ? out * c.widths[l] : out), to[which]);
      }
    }
  }

  // Whether there is such a gradient.
  bool exists(int which, size_t l) const {
    if (which < 2) return which == 0 || c.with_bias;
    return l + 1 < weights.size() && c.options[l].has_norm();
  }

  Results run_cpu() const {
    Results r{std::vector<R>(static_cast<size_t>(c.members)), std::vector<R>(input_size())};
    r.reserve(2 + 4 * weights.size());
    Parameters p;
    set(p, [](const auto& values) { return values.cpu.data(); });
    cpu::Training& t = p.training;
    if (c.loss != Loss::none) t.loss_output = r[0].data();
    t.grad_input = r[1].data();
    for_each_gradient(p.gradients, [&](int which, size_t l, size_t n, void** to) {
      r.emplace_back(n);
      if (exists(which, l)) *to = r.back().data();
    });
    const cpu::TrainingPlan plan = cpu::plan_training(t);
    const Scratch partial(plan.partial_bytes), scratch(plan.scratch_bytes);
    t.partial = partial.get();
    if (c.loss != Loss::none) {
      check(cpu::prepare_training(t, 0, c.members) == cpu::TrainingError::none, "the CPU's checks");
    }
    cpu::train(t, 0, plan.items, scratch.get());
    cpu::finish_training(t, 0, plan.finish_items);
    return r;
  }

  Results run_gpu(const std::string& what) const {
    Parameters p;
    set(p, [](const auto& values) { return values.gpu.data(); });
    cpu::Training& t = p.training;
    Global<R> loss(static_cast<size_t>(c.members), "loss"), grad_input(input_size(), "grad_input");
    std::vector<std::unique_ptr<Global<R>>> of_parameters;
    for_each_gradient(p.gradients, [&](int which, size_t l, size_t n, void** to) {
      of_parameters.push_back(std::make_unique<Global<R>>(n, "grad of a parameter"));
      if (exists(which, l) && (c.needs_grad & 2u << which)) *to = of_parameters.back()->data();
    });
    if (c.loss != Loss::none) t.loss_output = loss.data();
    if (c.needs_grad & 1) t.grad_input = grad_input.data();
    check(gpu::training_fits_one_launch(t.forward), what + ": can be trained");
    Global<char> scratch(gpu::scratch_bytes(t), "scratch");
    const char* error = gpu::train(t, scratch.data(), nullptr);
    check(error == nullptr, what + ": " + (error ? error : ""));
    Results r{loss.host(), grad_input.host()};
    for (const auto& g : of_parameters) r.push_back(g->host());
    return r;
  }

  bool needs_grad(size_t i) const {
    if (i == 0) return c.loss != Loss::none;
    if (i == 1) return c.needs_grad & 1;
    const int which = static_cast<int>((i - 2) / weights.size());
    return exists(which, (i - 2) % weights.size()) && (c.needs_grad & 2u << which);
  }
};

template <class T>
void test(const Case& c) {
  ++problems;
  const std::string what = "training, E " + std::to_string(c.members) + ", B " +
                           std::to_string(c.batch) + ", " + std::to_string(c.widths.size() - 1) +
                           " layers, loss " + std::to_string(static_cast<int>(c.loss)) +
                           ", activation " + std::to_string(static_cast<int>(c.activation));
  const Problem<T> problem(c);
  const auto expected = problem.run_cpu();
  typename Problem<T>::Results first;
  for (const uint64_t seed : {1, 2}) {
    emulation::set_seed(seed);
    const auto got = problem.run_gpu(what);
    if (seed == 1) first = got;
    for (size_t i = 0; i < got.size(); ++i) {
      if (problem.needs_grad(i))
        check(same_bits(first[i], got[i]), what + ": other bits in another order");
    }
  }
  const double tolerance = std::is_same_v<T, double> ? 1e-12 : 3e-5;
  for (size_t i = 0; i < first.size(); ++i) {
    if (!problem.needs_grad(i)) continue;
    const double error = worst(first[i], expected[i]);
    check(error <= tolerance,
          what + ": result " + std::to_string(i) + " differs by " + std::to_string(error));
  }
}

// An index that is none: NaN for all of that member, and for no other.
void test_missing_member() {
  for (int i = 0; i < 8; ++i) {
    ++problems;
    Case c{3,         9, {4, 6, 6, 3}, i % 2 ? Loss::mse : Loss::none, {}, i / 4 == 1, false,
           i % 3 > 0, 0, 0.25};
    c.options = varied_layers(c.widths, i, i % 4 < 2, true);
    c.by_index = true;
    Problem<float> problem(c);
    const auto right = problem.run_gpu("a missing member");
    std::vector<int64_t> changed = problem.indices->cpu;
    changed[1] = std::vector<int64_t>{-1, 5, INT64_MIN, INT64_MAX}[static_cast<size_t>(i % 4)];
    problem.indices = std::make_unique<Values<int64_t>>(changed, "members");
    const auto got = problem.run_gpu("a missing member");
    for (size_t j = 0; j < got.size(); ++j) {
      if (!problem.needs_grad(j)) continue;
      const bool all = j == 1 && c.shared_input;  // summed over the members
      for (size_t k = 0; k < got[j].size(); ++k) {
        const bool missing = all || k / (got[j].size() / 3) == 1;
        check(missing ? std::isnan(got[j][k]) : got[j][k] == right[j][k],
              "result " + std::to_string(j) + " beside a missing member");
      }
    }
  }
}

// An out-of-range class and a negative weight: NaN for those members, and for no others.
void test_wrong_values(bool with_options) {
  Case c{3, 9, {4, 5, 3}, Loss::cross_entropy, ActivationKind::tanh, true, false, true, 2, 0};
  c.with_options = with_options;
  for (const int which : {0, 1, 2, 3}) {
    if (which == 3 && !with_options) continue;
    Problem<float> problem(c);
    const auto right = problem.run_gpu("wrong values");
    if (which < 2) {
      problem.labels->cpu[9 + 3] = which == 0 ? -1 : 3;  // of member 1
      problem.labels = std::make_unique<Values<int64_t>>(problem.labels->cpu, "labels");
    } else if (which == 2) {
      problem.sample_weight->cpu[9 + 3] = -1;
      problem.sample_weight =
          std::make_unique<Values<float>>(problem.sample_weight->cpu, "weights");
    } else {
      problem.class_weight->cpu[3 + 1] = -1;
      problem.class_weight = std::make_unique<Values<float>>(problem.class_weight->cpu, "weights");
    }
    const auto got = problem.run_gpu("wrong values");
    for (size_t m = 0; m < 3; ++m) {
      const float loss = got[0][m], gradient = got[2][m * 20];
      check(m == 1 ? std::isnan(loss) : loss == right[0][m], "the loss of a wrong value is NaN");
      check(m == 1 ? std::isnan(gradient) : gradient == right[2][m * 20], "so is its gradient");
    }
  }
}

}  // namespace

int main() {
  const Loss losses[] = {
      Loss::none,  Loss::mse,       Loss::bce,      Loss::gaussian_nll, Loss::cross_entropy,
      Loss::huber, Loss::smooth_l1, Loss::quantile, Loss::poisson_nll,  Loss::soft_cross_entropy};
  const std::vector<std::vector<int64_t>> shapes = {{3, 2}, {5, 7, 4}, {9, 13, 6, 2}};
  int i = 0;
  for (const auto& widths : shapes) {
    for (const int64_t batch : {1, 6, 67}) {
      for (const Loss loss : losses) {
        Case c{1 + i % 3,  batch,      widths,     loss,      kActivationKinds[i % kActivations],
               i % 2 == 0, i % 3 == 0, i % 4 != 1, i / 2 % 3, i % 3 == 1 ? 0.25 : 0.0};
        if (i % 5 == 4) c.needs_grad = static_cast<unsigned>(i / 5 % 8);
        test<double>(c);
        if (i % 2 == 0) test<float>(c);
        ++i;
        if (loss != Loss::gaussian_nll && loss != Loss::cross_entropy) continue;
        c.with_options = true;
        c.members = 3;
        test<double>(c);
        test<float>(c);
      }
    }
  }
  // Sample weights at the ends of their range.
  for (const Weights weights :
       {Weights::subnormal, Weights::overflowing, Weights::one_huge, Weights::zero}) {
    for (const Loss loss : losses) {
      if (loss == Loss::none) continue;
      const int weighted = 1 + i++ % 2;
      Case c{3, 70, {5, 7, 4}, loss, ActivationKind::tanh, weighted == 2, true, true, weighted, 0};
      c.sample_weights = weights;
      c.with_options = i % 2 == 0;
      test<double>(c);
      test<float>(c);
    }
  }
  // Infinite numbers, NaN, and those whose products overflow.
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double value : {infinity, -infinity, double{NAN}, 3e38, -6e4}) {
    for (const Place place : {Place::input, Place::target, Place::weight, Place::bias}) {
      for (const Loss loss : losses) {
        const auto kind = i % 2 ? ActivationKind::relu : kActivationKinds[i / 2 % kActivations];
        Case c{2, 19, {5, 7, 4}, loss, kind, i % 3 == 0, true, true, i % 3, i % 4 == 0 ? 0.25 : 0};
        if (loss == Loss::none) c.weighted = 0;
        c.planted = {place, value};
        c.with_options = i % 4 < 2;
        test<double>(c);
        test<float>(c);
        test<pyens::BFloat16>(c);
        test<pyens::Float16>(c);
        ++i;
      }
    }
  }
  // The same through norms, residuals and activations of outputs; no dropout, for what it cuts off of a NaN is
  // not the same on both sides, nor is what is left out and meets a weight that is infinite.
  for (const double value : {infinity, -infinity, double{NAN}}) {
    for (const Place place : {Place::input, Place::target, Place::weight, Place::bias}) {
      for (const Loss loss : losses) {
        const int weighted = loss == Loss::none || place == Place::weight ? 0 : i % 3;
        Case c{2, 11, {5, 6, 6, 4}, loss, {}, i % 3 == 0, true, true, weighted, 0};
        c.options = varied_layers(c.widths, i, true, true);
        c.planted = {place, value};
        test<double>(c);
        test<float>(c);
        ++i;
      }
    }
  }
  // Inputs longer than a block of 128; a tile of fewer than 64 examples.
  test<float>({2, 70, {131, 140, 5}, Loss::mse, ActivationKind::relu, true, true, true, 0, 0});
  // More tiles than spans.
  test<float>({1, 64 * 33 + 5, {1, 1}, Loss::mse, ActivationKind::relu, true, true, true, 1, 0});
  test<pyens::BFloat16>({2, 6, {5, 4, 2}, Loss::mse, ActivationKind::relu, true, true, true, 0, 0});
  test<pyens::Float16>(
      {2, 5, {5, 4, 2}, Loss::bce, ActivationKind::relu, false, false, true, 0, 0});
  // Activations of each layer and of outputs; norms and residuals; rates of each layer; members by index.
  const std::vector<std::vector<int64_t>> deep = {
      {4, 2}, {2, 2, 2}, {5, 7, 7, 7, 2}, {17, 40, 40, 4}, {3, 9, 9, 5, 2}};
  for (const auto& widths : deep) {
    for (const int64_t batch : {1, 6, 67}) {
      for (const bool rich : {false, true}) {
        for (const Loss loss : {losses[i % 5], Loss::none}) {
          Case c{1 + i % 3,  batch,      widths,     loss,      ActivationKind::identity,
                 i % 2 == 0, i % 3 == 0, i % 4 != 1, i / 2 % 3, i % 3 == 1 ? 0.25 : 0.0};
          c.options = varied_layers(widths, i, rich, rich);
          if (i % 5 == 4) c.needs_grad = static_cast<unsigned>(i / 5 * 11 % 32);
          c.by_index = i / 2 % 3 > 0;
          c.rate_of_each_layer = c.dropout > 0 && widths.size() > 2 && i % 2 == 0;
          c.drops_before_norm = i % 4 < 2;
          test<double>(c);
          test<float>(c);
          if (i % 4 == 0) test<pyens::BFloat16>(c);
          if (i % 4 == 1) test<pyens::Float16>(c);
          ++i;
        }
      }
    }
  }
  test_missing_member();
  test_wrong_values(false);
  test_wrong_values(true);
  return finish();
}
