// The training kernel against a plain loop in double, on buffers that end where the sanitizers watch.
//
// Inputs and parameters lie on a coarse grid, on which the outputs of a ReLU network are exact: no
// rounding turns a ReLU on or off. Norms leave the grid: beside them activations are smooth. bfloat16 holds
// the grid; where the kernel rounds to it, so does the plain loop.

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/dropout.h"
#include "kernels/ensemble_mlp.h"
#include "layer_options.h"
#include "plain_mlp.h"

namespace {

using plain::Doubles;
using plain::sigmoid;
using plain::softplus;
using pyens::ActivationKind;
using pyens::DType;
using pyens::kActivationKinds;
using pyens::kActivations;
using pyens::Loss;

int failures = 0;

// Where sample weights lie: in the middle of their range, at its ends, so that the smallest ones and the sum
// of the largest ones are no normal numbers, all but one so much smaller than that one, or all at 0.
enum class Weights { ordinary, subnormal, overflowing, one_huge, zero };

struct Case {
  int64_t ensemble_size, batch;
  std::vector<int64_t> widths;
  Loss loss;
  ActivationKind activation;
  bool shared_input, shared_target, with_bias;
  int weighted;  // 0 no, 1 one weight per example, 2 one per member and example
  double dropout;
  Weights weights = Weights::ordinary;
  std::vector<LayerOptions> options = {};  // in the place of `activation`
  std::vector<int64_t> members = {};       // among two more that are stored; or each its own
  bool rate_of_each_layer = false, drops_before_norm = false;

  int64_t stored() const { return ensemble_size + (members.empty() ? 0 : 2); }
};

void check(bool condition, const char* what, const Case& c, double error = 0) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s (E %lld, B %lld, %zu layers, loss %d, activation %d, error %g)\n", what,
              static_cast<long long>(c.ensemble_size), static_cast<long long>(c.batch),
              c.widths.size() - 1, static_cast<int>(c.loss), static_cast<int>(c.activation), error);
}

size_t index(int64_t i) { return static_cast<size_t>(i); }

// Options of the losses, of one member.
struct Options {
  double temperature, label_smoothing, delta;
  Doubles quantiles, class_weight, log_variance_min, log_variance_max;  // empty: without
};

// Loss of one example, and its gradient in the place of the outputs.
double example_loss(Loss loss, Doubles& z, const Doubles& y, const Options& options) {
  const size_t n = z.size();
  const auto terms = static_cast<double>(n);
  double sum = 0;
  if (loss == Loss::mse) {
    for (size_t k = 0; k < n; ++k) {
      const double error = z[k] - y[k];
      sum += error * error / terms;
      z[k] = 2 * error / terms;
    }
  } else if (loss == Loss::bce) {
    for (size_t k = 0; k < n; ++k) {
      sum += (std::max(z[k], 0.0) - z[k] * y[k] + std::log1p(std::exp(-std::abs(z[k])))) / terms;
      z[k] = (sigmoid(z[k]) - y[k]) / terms;
    }
  } else if (loss == Loss::huber || loss == Loss::smooth_l1) {
    const double d = options.delta, by = terms * (loss == Loss::huber ? 1 : d);
    for (size_t k = 0; k < n; ++k) {
      const double error = z[k] - y[k], size = std::abs(error);
      sum += (size <= d ? error * error / 2 : d * (size - d / 2)) / by;
      z[k] = (size <= d ? error : std::copysign(d, error)) / by;
    }
  } else if (loss == Loss::quantile) {
    const size_t count = options.quantiles.size();
    for (size_t k = 0; k < n; ++k) {
      const double tau = options.quantiles[k % count], error = y[k / count] - z[k];
      sum += std::max(tau * error, (tau - 1) * error) / terms;
      z[k] = (error > 0 ? -tau : error < 0 ? 1 - tau : 0) / terms;
    }
  } else if (loss == Loss::poisson_nll) {
    for (size_t k = 0; k < n; ++k) {
      sum += (std::exp(z[k]) - y[k] * z[k]) / terms;
      z[k] = (std::exp(z[k]) - y[k]) / terms;
    }
  } else if (loss == Loss::gaussian_nll) {
    const auto half = n / 2;
    const auto halves = static_cast<double>(half);
    for (size_t k = 0; k < half; ++k) {
      const double raw = z[half + k], error = z[k] - y[k];
      double s, slope;  // log variance, and its derivative
      if (options.log_variance_min.empty()) {
        const double variance = softplus(raw) + 1e-6;
        s = std::log(variance);
        slope = sigmoid(raw) / variance;
      } else {
        const double low = options.log_variance_min[k], high = options.log_variance_max[k];
        const double t = high - std::log1p(std::exp(high - raw));
        s = low + std::log1p(std::exp(t - low));
        slope = sigmoid(t - low) * sigmoid(high - raw);
      }
      const double squares = error * error * std::exp(-s);
      sum += (s + squares) / 2 / halves;
      z[k] = error * std::exp(-s) / halves;
      z[half + k] = (1 - squares) / 2 * slope / halves;
    }
  } else {  // cross_entropy, soft_cross_entropy
    double largest = z[0], total = 0, shares = 0;
    for (const double value : z) largest = std::max(largest, value);
    for (const double value : z) total += std::exp((value - largest) / options.temperature);
    const auto share = [&](size_t k) {
      const bool given = loss == Loss::soft_cross_entropy;
      double q = given ? y[k] : k == static_cast<size_t>(y[0]) ? 1 : 0;
      q = q * (1 - options.label_smoothing) + options.label_smoothing / terms;
      return options.class_weight.empty() ? q : q * options.class_weight[k];
    };
    for (size_t k = 0; k < n; ++k) shares += share(k);
    for (size_t k = 0; k < n; ++k) {
      const double scaled = (z[k] - largest) / options.temperature;
      sum += share(k) * (std::log(total) - scaled);
      z[k] = (std::exp(scaled) / total * shares - share(k)) / options.temperature;
    }
  }
  return sum;
}

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, FreeDeleter>;

uint16_t to_bfloat16(double x) {
  const auto value = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
double rounded_to_bfloat16(double x) {
  const uint32_t bits = uint32_t{to_bfloat16(x)} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return static_cast<double>(value);
}
// Whether products of bfloat16 are those of pairs of bfloat16.
bool multiplies_pairs(DType dtype) {
  return dtype == DType::bfloat16 && (pyens::cpu_features() & PYENS_FEATURE_AVX512_BF16) != 0;
}

// What the kernel reads elements of `dtype` from, made of numbers that it can hold.
class Elements {
 public:
  template <class T>
  Elements(const std::vector<T>& values, DType dtype) : data_(values.data()) {
    if (values.empty()) data_ = nullptr;
    if (dtype != DType::bfloat16) return;
    for (const T value : values) halves_.push_back(to_bfloat16(static_cast<double>(value)));
    if (!values.empty()) data_ = halves_.data();
  }
  const void* data() const { return data_; }

 private:
  const void* data_;
  std::vector<uint16_t> halves_;
};

// Filled with NaN, if anything is read before it is written.
Buffer buffer(size_t bytes) {
  const size_t size = (bytes + 63) / 64 * 64;
  Buffer result(std::aligned_alloc(64, size));
  std::memset(result.get(), 0xff, size);
  return result;
}

// Loss [E], and gradients: the input's, then weights and biases of each layer and of its norm.
template <class T>
using Results = std::vector<std::vector<T>>;

template <class T>
struct Model {
  Case c;
  DType dtype;
  bool shared_gradient;  // sum the members' gradients of a shared input
  size_t layers;
  std::vector<std::vector<T>> weights, biases, norm_weights, norm_biases;
  std::vector<T> input, target, sample_weight, member_scale;
  std::vector<int64_t> labels, seeds;
  Doubles rates;  // of dropout, of the members or of their layers; empty: one for all
  double temperature = 0.75, label_smoothing, delta = 0.75;
  Doubles quantiles;
  std::vector<T> class_weight, log_variance_min, log_variance_max;  // empty: without
  bool own_options;                                                 // of each member

  explicit Model(const Case& given,
                 DType elements = sizeof(T) == 4 ? DType::float32 : DType::float64)
      : c(given), dtype(elements), shared_gradient(given.shared_input) {
    label_smoothing = (c.batch + c.weighted) % 2 == 0 ? 0 : 0.2;
    layers = c.widths.size() - 1;
    if (c.options.empty()) c.options = plain_layers(layers, c.activation);
    std::mt19937_64 random(index(c.ensemble_size * 1000 + c.batch));
    std::normal_distribution<double> normal;
    const auto grid = [&](int64_t n, double scale, double step) {
      std::vector<T> values(index(n));
      for (T& value : values)
        value = static_cast<T>(std::round(normal(random) * scale / step) * step);
      return values;
    };
    const int64_t e = c.ensemble_size, b = c.batch, out = c.widths.back();
    input = grid((c.shared_input ? 1 : e) * b * c.widths[0], 1, 0.25);
    for (size_t l = 0; l < layers; ++l) {
      const double scale = 1.4 / std::sqrt(static_cast<double>(c.widths[l]));
      const int64_t all = c.stored() * c.widths[l + 1];
      const LayerOptions& options = c.options[l];
      weights.push_back(grid(all * c.widths[l], scale, 0.125));
      biases.push_back(grid(c.with_bias ? all : 0, 0.3, 0.125));
      norm_weights.push_back(grid(options.norm_weight ? all : 0, 0.5, 0.125));
      for (T& value : norm_weights[l]) value += 1;
      norm_biases.push_back(grid(options.norm_bias ? all : 0, 0.3, 0.125));
    }
    if (c.loss == Loss::cross_entropy) {
      for (int64_t i = 0; i < (c.shared_target ? 1 : e) * b; ++i) {
        labels.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(out)));
      }
    } else {
      if (c.loss == Loss::quantile) {
        quantiles = {0.125, 0.5, 0.875};
        while (out % static_cast<int64_t>(quantiles.size()) != 0) quantiles.pop_back();
      }
      target = grid((c.shared_target ? 1 : e) * b * target_features(), 1, 0.125);
      if (c.loss == Loss::poisson_nll || c.loss == Loss::soft_cross_entropy) {
        for (T& value : target) value = std::abs(value);
      }
    }
    own_options = b % 2 == 0;
    const int64_t sets = own_options ? e : 1;
    if (c.loss == Loss::cross_entropy && b % 3 != 0) {
      class_weight = grid(sets * out, 1, 0.25);
      // None is 0 beside sample weights of which one is all that counts.
      const T least = c.weights == Weights::ordinary ? T{0} : T{0.25};
      for (T& value : class_weight) value = (std::abs(value) + least) * weight(b + 1);
    }
    if (c.loss == Loss::gaussian_nll && b % 3 != 0) {
      log_variance_min = grid(sets * out / 2, 1, 0.25);
      log_variance_max = log_variance_min;
      for (T& value : log_variance_max) value += T{1.5};
    }
    for (int64_t i = 0; i < (c.weighted == 0 ? 0 : c.weighted == 1 ? 1 : e) * b; ++i) {
      const bool left_out = b > 1 && i % 5 == 1;
      sample_weight.push_back(left_out ? 0 : weight(i));
      // What is left out may be anything.
      if (left_out && c.weighted == 1) {
        for (int64_t m = 0; m < (c.shared_input ? 1 : e); ++m) {
          input[index((m * b + i) * c.widths[0])] = std::numeric_limits<T>::quiet_NaN();
        }
        for (int64_t m = 0; m < (c.shared_target ? 1 : e); ++m) {
          if (c.loss == Loss::cross_entropy) {
            labels[index(m * b + i)] = -100;
          } else {
            target[index((m * b + i) * target_features())] = std::numeric_limits<T>::infinity();
          }
        }
      }
    }
    if (c.loss != Loss::none && b % 2 == 0) {
      for (int64_t m = 0; m < e; ++m) member_scale.push_back(static_cast<T>(m) - T{0.5});
    }
    for (int64_t m = 0; m < e; ++m) seeds.push_back(m * 7919 - 3);
    // 1 / (1 - p) is on the grid.
    const int64_t n = c.rate_of_each_layer ? e * static_cast<int64_t>(layers - 1) : e;
    for (int64_t i = 0; i < n && c.dropout > 0 && (c.batch % 2 == 1 || c.rate_of_each_layer); ++i) {
      rates.push_back(std::array{c.dropout, 0.0, 0.75}[index(i % 3)]);
    }
  }

  T weight(int64_t i) const {
    using Limits = std::numeric_limits<T>;
    const T ordinary = static_cast<T>(0.25 * static_cast<double>(1 + i % 7));
    switch (c.weights) {
      case Weights::ordinary: return ordinary;
      case Weights::subnormal: return ordinary * (Limits::min() / 64);
      case Weights::overflowing: return ordinary * (Limits::max() / 2);
      case Weights::one_huge: return i % c.batch == 0 ? Limits::max() : ordinary * Limits::min();
      case Weights::zero: return i / c.batch == 0 ? 0 : ordinary;  // of the first member
    }
    return ordinary;
  }

  int64_t target_features() const {
    const int64_t out = c.widths.back();
    if (c.loss == Loss::quantile) return out / static_cast<int64_t>(quantiles.size());
    return c.loss == Loss::gaussian_nll ? out / 2 : out;
  }

  Doubles of_member(const std::vector<T>& values, int64_t m) const {
    const int64_t each = static_cast<int64_t>(values.size()) / (own_options ? c.ensemble_size : 1);
    const T* at = values.data() + (own_options ? m : 0) * each;
    return Doubles(at, at + each);
  }
  Options options_of(int64_t m) const {
    Doubles of_classes = of_member(class_weight, m);  // only their ratios count
    double largest = 0;
    for (const double value : of_classes) largest = std::max(largest, value);
    for (double& value : of_classes) value /= largest > 0 ? largest : 1;
    return {temperature,
            label_smoothing,
            delta,
            quantiles,
            of_classes,
            of_member(log_variance_min, m),
            of_member(log_variance_max, m)};
  }

  // Runs the three rounds with their items cut into pieces of `step`. `needs_grad`: bit 0 the input's
  // gradient, bits 1 and 2 those of weights and biases of even layers, bits 3 and 4 of odd ones, bits 5 and 6
  // those of norms. `keeps`: a forward pass leaves its sums first.
  Results<T> run(int64_t step, int threads, unsigned needs_grad = 127, bool keeps = false) {
    const int64_t e = c.ensemble_size, b = c.batch;
    std::vector<Elements> elements;
    elements.reserve(4 * layers + 2);
    const auto read = [&](const std::vector<T>& values) {
      return elements.emplace_back(values, dtype).data();
    };
    std::vector<pyens::MLPLayer> parameters(layers);
    std::vector<pyens::MLPLayerGradient> gradients(layers);
    Results<T> results{
        std::vector<T>(c.loss == Loss::none ? 0 : index(e)),
        std::vector<T>((needs_grad & 1) ? index((shared_gradient ? 1 : e) * b * c.widths[0]) : 0)};
    for (size_t l = 0; l < layers; ++l) {
      const unsigned bits = needs_grad >> (l % 2 == 0 ? 1 : 3);
      const int64_t in = c.widths[l], out = c.widths[l + 1];
      const bool of_norm = c.options[l].has_norm();
      results.emplace_back((bits & 1) ? index(e * out * in) : 0);
      results.emplace_back((bits & 2) && c.with_bias ? index(e * out) : 0);
      results.emplace_back((needs_grad & 32) && of_norm ? index(e * out) : 0);
      results.emplace_back((needs_grad & 64) && of_norm ? index(e * out) : 0);
    }
    for (size_t l = 0; l < layers; ++l) {
      const int64_t in = c.widths[l], out = c.widths[l + 1];
      const LayerOptions& options = c.options[l];
      const auto pointer = [](auto& values) { return values.empty() ? nullptr : values.data(); };
      parameters[l] = {in,
                       out,
                       {read(weights[l]), out * in, in, dtype},
                       {read(biases[l]), out},
                       {options.norm,
                        options.after_activation,
                        options.epsilon,
                        {read(norm_weights[l]), out},
                        {read(norm_biases[l]), out}},
                       options.activation,
                       options.residual};
      std::vector<T>* const of_layer = &results[2 + 4 * l];
      gradients[l] = {pointer(of_layer[0]), pointer(of_layer[1]), pointer(of_layer[2]),
                      pointer(of_layer[3])};
    }

    pyens::ensemble_mlp_cpu::Training t{};
    t.forward.dtype = dtype;
    t.forward.ensemble_size = e;
    t.forward.batch = b;
    t.forward.num_layers = static_cast<int64_t>(layers);
    t.forward.layers = parameters.data();
    t.forward.members = c.members.empty() ? nullptr : c.members.data();
    t.forward.stored_members = c.members.empty() ? 0 : c.stored();
    t.forward.input = read(input);
    t.forward.input_member_stride = c.shared_input ? 0 : b * c.widths[0];
    t.forward.input_row_stride = c.widths[0];
    t.forward.dropout.p = rates.empty() ? c.dropout : 0;
    t.forward.dropout.rates = rates.empty() ? nullptr : rates.data();
    t.forward.dropout.rates_member_stride =
        c.rate_of_each_layer ? static_cast<int64_t>(layers - 1) : 1;
    t.forward.dropout.rates_layer_stride = c.rate_of_each_layer ? 1 : 0;
    t.forward.dropout.before_norm = c.drops_before_norm;
    t.forward.dropout.seeds = seeds.data();
    t.loss = c.loss;
    pyens::LossParameters& of_loss = t.of_loss;
    of_loss.temperature = temperature;
    of_loss.label_smoothing = label_smoothing;
    of_loss.delta = delta;
    of_loss.quantiles = quantiles.data();
    of_loss.num_quantiles = static_cast<int64_t>(quantiles.size());
    const auto set = [&](const std::vector<T>& values, const void*& data, int64_t& member_stride) {
      if (values.empty()) return;
      data = values.data();
      member_stride = own_options ? static_cast<int64_t>(values.size()) / e : 0;
    };
    set(class_weight, of_loss.class_weight, of_loss.class_weight_member_stride);
    set(log_variance_min, of_loss.log_variance_min, of_loss.log_variance_min_member_stride);
    set(log_variance_max, of_loss.log_variance_max, of_loss.log_variance_max_member_stride);
    const bool classes = c.loss == Loss::cross_entropy;
    t.target_row_stride = classes ? 1 : target_features();
    t.target_member_stride = c.shared_target ? 0 : b * t.target_row_stride;
    if (classes) {
      t.target = labels.data();
    } else {
      t.target = c.loss == Loss::none ? read(target) : target.data();
    }
    if (c.weighted) t.sample_weight = sample_weight.data();
    t.sample_weight_member_stride = c.weighted == 2 ? b : 0;
    if (!member_scale.empty()) t.member_scale = member_scale.data();
    t.gradients = gradients.data();
    if (needs_grad & 1) t.grad_input = results[1].data();
    t.sum_grad_input = shared_gradient;
    if (c.loss != Loss::none) t.loss_output = results[0].data();
    t.threads = threads;

    using namespace pyens::ensemble_mlp_cpu;
    const Buffer kept =
        buffer(sizeof(T) * index(keeps ? pyens::kept_elements(t.forward, t.forward.batch) : 0));
    if (keeps) {
      t.forward.kept = kept.get();
      Forward forward{};
      static_cast<pyens::EnsembleMLPParams&>(forward) = t.forward;
      std::vector<T> output(index(e * b * c.widths.back()));
      forward.output = output.data();
      const Buffer scratch = buffer(pyens::ensemble_mlp_cpu::scratch_bytes(forward));
      pyens::ensemble_mlp_cpu::run(forward, 0, work_items(forward), scratch.get());
    }
    const TrainingPlan plan = plan_training(t);
    const Buffer partial = buffer(plan.partial_bytes);
    t.partial = partial.get();
    const auto pieces = [&](int64_t items, const auto& call) {
      for (int64_t begin = 0; begin < items; begin += step) {
        call(begin, std::min(items, begin + step));
      }
    };
    if (c.loss != Loss::none) {
      pieces(e, [&](int64_t begin, int64_t end) {
        check(prepare_training(t, begin, end) == TrainingError::none, "values accepted", c);
      });
    }
    pieces(plan.items, [&](int64_t begin, int64_t end) {
      const Buffer scratch = buffer(plan.scratch_bytes);
      train(t, begin, end, scratch.get());
    });
    pieces(plan.finish_items, [&](int64_t begin, int64_t end) { finish_training(t, begin, end); });
    return results;
  }

  // The same by plain loops in double.
  Results<double> expected() const {
    const int64_t e = c.ensemble_size, b = c.batch;
    Results<double> results{Doubles(c.loss == Loss::none ? 0 : index(e)),
                            Doubles(index((shared_gradient ? 1 : e) * b * c.widths[0]))};
    std::vector<plain::Gradients> of_member(layers);
    for (size_t l = 0; l < layers; ++l) {
      const int64_t in = c.widths[l], out = c.widths[l + 1];
      results.emplace_back(index(e * out * in));
      results.emplace_back(c.with_bias ? index(e * out) : 0);
      for (int i = 0; i < 2; ++i)
        results.emplace_back(c.options[l].has_norm() ? index(e * out) : 0);
    }
    for (int64_t m = 0; m < e; ++m) {
      const auto weight_of = [&](int64_t row) {
        if (!c.weighted) return 1.0L;  // long double: its range is wider
        return static_cast<long double>(sample_weight[index((c.weighted == 2 ? m * b : 0) + row)]);
      };
      const Options options = options_of(m);
      long double total = 0;
      for (int64_t row = 0; row < b; ++row) {
        const long double weight = weight_of(row);
        if (weight == 0) continue;
        total += options.class_weight.empty()
                     ? weight
                     : weight * options.class_weight[index(label_of(m, row))];
      }
      for (size_t l = 0; l < layers; ++l) {
        const size_t in = index(c.widths[l]), out = index(c.widths[l + 1]);
        of_member[l] = {Doubles(out * in), Doubles(out), Doubles(out), Doubles(out)};
      }
      const std::vector<plain::Layer> parameters = layers_of(m);
      for (int64_t row = 0; row < b; ++row) {
        const long double weight = weight_of(row);
        if (weight == 0 || total == 0) continue;
        add_example(m, row, static_cast<double>(weight / total), options, parameters, of_member,
                    results);
      }
      for (size_t l = 0; l < layers; ++l) {
        const plain::Gradients& g = of_member[l];
        const Doubles* const from[] = {&g.weight, &g.bias, &g.norm_weight, &g.norm_bias};
        for (size_t i = 0; i < 4; ++i) {
          Doubles& to = results[2 + 4 * l + i];
          if (!to.empty()) {
            std::copy(from[i]->begin(), from[i]->end(),
                      to.begin() + m * static_cast<int64_t>(from[i]->size()));
          }
        }
      }
    }
    return results;
  }

  int64_t label_of(int64_t m, int64_t row) const {
    return labels[index((c.shared_target ? 0 : m * c.batch) + row)];
  }

  // The layers of the member at position m.
  std::vector<plain::Layer> layers_of(int64_t m) const {
    const int64_t stored = c.members.empty() ? m : c.members[index(m)];
    const auto part = [&](const std::vector<T>& values, int64_t size, double otherwise) {
      if (values.empty()) return Doubles(index(size), otherwise);
      const auto begin = values.begin() + stored * size;
      return Doubles(begin, begin + size);
    };
    std::vector<plain::Layer> result;
    for (size_t l = 0; l < layers; ++l) {
      const int64_t in = c.widths[l], out = c.widths[l + 1];
      result.push_back({c.options[l], part(weights[l], out * in, 0), part(biases[l], out, 0),
                        part(norm_weights[l], out, 1), part(norm_biases[l], out, 0)});
    }
    return result;
  }

  double rate(int64_t m, int64_t l) const {
    if (rates.empty()) return c.dropout;
    return rates[index(c.rate_of_each_layer ? m * static_cast<int64_t>(layers - 1) + l : m)];
  }

  void add_example(int64_t m, int64_t row, double share, const Options& options,
                   const std::vector<plain::Layer>& parameters,
                   std::vector<plain::Gradients>& gradients, Results<double>& results) const {
    const int64_t b = c.batch, in = c.widths[0];
    const T* x = input.data() + ((c.shared_input ? 0 : m * b) + row) * in;
    const plain::Factor factor = [&](int64_t l, int64_t o) {
      const double p = rate(m, l);
      if (p == 0) return 1.0;
      const uint64_t key = pyens::dropout_unit_key(pyens::dropout_layer_key(seeds[index(m)], l), o);
      const uint32_t hash = pyens::dropout_hash(static_cast<uint32_t>(row), key);
      return hash >= pyens::dropout_threshold(p) ? 1 / (1 - p) : 0;
    };
    plain::Trace trace;
    if (multiplies_pairs(dtype)) trace.operand = rounded_to_bfloat16;
    Doubles g = plain::forward(parameters, Doubles(x, x + in), factor, c.drops_before_norm, trace);
    const int64_t features = target_features();
    if (c.loss == Loss::none) {
      const T* y = target.data() + ((c.shared_target ? 0 : m * b) + row) * features;
      g.assign(y, y + features);
    } else {
      Doubles y;
      if (c.loss == Loss::cross_entropy) {
        y.push_back(static_cast<double>(label_of(m, row)));
      } else {
        const T* at = target.data() + ((c.shared_target ? 0 : m * b) + row) * features;
        y.assign(at, at + features);
      }
      results[0][index(m)] += share * example_loss(c.loss, g, y, options);
      const double scale = member_scale.empty() ? 1 : static_cast<double>(member_scale[index(m)]);
      for (double& value : g) value *= share * scale;
    }
    g = plain::backward(parameters, trace, g, factor, c.drops_before_norm, gradients);
    for (int64_t i = 0; i < in; ++i) {
      results[1][index(((shared_gradient ? 0 : m * b) + row) * in + i)] += g[index(i)];
    }
  }
};

template <class T>
void test(const Case& c, DType dtype = sizeof(T) == 4 ? DType::float32 : DType::float64) {
  Model<T> model(c, dtype);
  const Results<T> got = model.run(1 << 20, 1);
  const Results<double> expected = model.expected();
  for (size_t i = 0; i < expected.size(); ++i) {
    double error = 0, size = 0;
    bool finite = true;
    for (size_t j = 0; j < expected[i].size(); ++j) {
      const auto value = static_cast<double>(got[i][j]);
      finite &= std::isfinite(value);
      error = std::max(error, std::abs(value - expected[i][j]));
      size = std::max(size, std::abs(expected[i][j]));
    }
    // A number that float32 and double round to different neighbours in bfloat16 is off by 2^-8.
    const double allowed = multiplies_pairs(dtype) ? 0x1p-9 : sizeof(T) == 4 ? 2e-5 : 1e-13;
    check(finite && error <= allowed * size,
          i == 0   ? "loss"
          : i == 1 ? "gradient of the input"
                   : "gradients",
          c, error / size);
  }
  check(model.run(1, 1) == got, "same bits for any split of the work", c);
  check(model.run(2, 2) == got, "same bits for two threads", c);
  check(model.run(3, 64) == got, "same bits for many threads", c);
  const bool keeps = c.weighted == 0;  // what is left out is in the sums of a forward pass
  check(!keeps || model.run(1 << 20, 1, 127, true) == got, "same bits from sums that were kept", c);

  // Each gradient is the same whatever else is asked for.
  for (const unsigned needs_grad : {1u, 2u, 4u, 8u, 16u, 32u, 64u, 6u, 0u}) {
    if (c.batch > 100) break;
    const Results<T> part = model.run(1 << 20, 4, needs_grad);
    for (size_t i = 0; i < part.size(); ++i) {
      check(part[i].empty() || part[i] == got[i], "same bits whatever needs a gradient", c);
    }
    if (keeps && needs_grad == 6) {
      check(model.run(1, 4, needs_grad, true) == part, "and from sums that were kept", c);
    }
  }
  if (c.shared_input) {  // each member its own gradient: what the shared one sums
    model.shared_gradient = false;
    const Results<T> own = model.run(1 << 20, 1);
    double error = 0, size = 0;
    for (size_t i = 0; i < got[1].size(); ++i) {
      double sum = 0;
      for (int64_t m = 0; m < c.ensemble_size; ++m) {
        sum += static_cast<double>(own[1][index(m) * got[1].size() + i]);
      }
      error = std::max(error, std::abs(sum - static_cast<double>(got[1][i])));
      size = std::max(size, std::abs(sum));
    }
    check(error <= (sizeof(T) == 4 ? 2e-5 : 1e-13) * size, "sum over the members", c, error / size);
  }
}

// Elsewhere than in pairs it is float32's kernel behind a conversion.
void test_bfloat16(const Case& c) {
  if (multiplies_pairs(DType::bfloat16)) test<float>(c, DType::bfloat16);
}

// What cannot be trained on is found wherever it is.
void test_values() {
  using pyens::ensemble_mlp_cpu::TrainingError;
  const Case c{3, 9, {4, 3}, Loss::cross_entropy, ActivationKind::relu, true, false, true, 2, 0};
  for (int64_t at = 0; at < 27; ++at) {
    for (const bool own_labels : {false, true}) {
      const auto prepare = [&](double weight, int64_t label) {
        Model<float> model(c);
        const size_t i = index(at), j = own_labels ? i : i % 9;
        model.sample_weight.assign(27, 1);
        model.sample_weight[i] = static_cast<float>(weight);
        model.labels[j] = label;
        const std::vector<float> w(3 * 3 * 4);
        pyens::MLPLayer layer{};
        layer.in = 4;
        layer.out = 3;
        layer.weight = {w.data(), 12, 4, DType::float32};
        pyens::ensemble_mlp_cpu::Training t{};
        t.forward.dtype = DType::float32;
        t.forward.ensemble_size = 3;
        t.forward.batch = 9;
        t.forward.num_layers = 1;
        t.forward.layers = &layer;
        t.loss = Loss::cross_entropy;
        t.target = model.labels.data();
        t.target_row_stride = 1;
        t.target_member_stride = own_labels ? 9 : 0;
        t.sample_weight = model.sample_weight.data();
        t.sample_weight_member_stride = 9;
        const Buffer partial = buffer(pyens::ensemble_mlp_cpu::plan_training(t).partial_bytes);
        t.partial = partial.get();
        return pyens::ensemble_mlp_cpu::prepare_training(t, 0, 3);
      };
      check(prepare(1, 2) == TrainingError::none, "a good label", c);
      check(prepare(1, 3) == TrainingError::target_out_of_range, "a label too large", c);
      check(prepare(1, -1) == TrainingError::target_out_of_range, "a negative label", c);
      check(prepare(0, own_labels ? 3 : 2) == TrainingError::none, "a label left out", c);
      check(prepare(-1, 2) == TrainingError::sample_weight_invalid, "a negative weight", c);
      check(prepare(NAN, 2) == TrainingError::sample_weight_invalid, "a NaN for a weight", c);
      check(prepare(INFINITY, 2) == TrainingError::sample_weight_invalid, "an infinite weight", c);
    }
  }
}

}  // namespace

int main() {
  const std::vector<std::vector<int64_t>> shapes = {
      {1, 1}, {5, 3}, {8, 8, 8}, {33, 17, 9, 7}, {32, 50, 20, 10, 1}, {129, 13, 16}, {140, 200, 3}};
  const Loss losses[] = {
      Loss::none,  Loss::mse,       Loss::bce,      Loss::gaussian_nll, Loss::cross_entropy,
      Loss::huber, Loss::smooth_l1, Loss::quantile, Loss::poisson_nll,  Loss::soft_cross_entropy};
  int i = 0;
  const auto test_both = [&](int64_t batch, const std::vector<int64_t>& widths, int loss) {
    Case c{};
    c.ensemble_size = 1 + i % 4 + (i % 9 == 0 ? 8 : 0);  // 9 and more: groups of several members
    c.batch = batch;
    c.widths = widths;
    c.loss = losses[loss];
    c.activation = kActivationKinds[i % 3 == 0 ? 0 : i % kActivations];
    c.shared_input = i % 2 == 0;
    c.shared_target = i % 4 < 2;
    c.with_bias = i % 6 != 5;
    c.weighted = c.loss == Loss::none ? 0 : i % 3;
    c.dropout = i % 4 == 3 ? 0.5 : 0;  // 1 / (1 - p) is on the grid too
    if (c.loss == Loss::gaussian_nll) c.widths.back() *= 2;
    if (c.loss == Loss::quantile) c.widths.back() *= 3;
    test<float>(c);
    c.shared_input = !c.shared_input;
    test<double>(c);
    if (i % 2 == 0) test_bfloat16(c);
    ++i;
  };
  for (const auto& widths : shapes) {
    for (const int64_t batch : {1, 7, 9, 16, 17, 65, 300}) {
      const int loss = i;
      test_both(batch, widths, loss % 5);
      if (batch < 100) test_both(batch, widths, 5 + loss % 5);
    }
  }
  // Several tiles to a span; so wide that tiles are smaller.
  for (int repeat = 0; repeat < 4; ++repeat) test_both(4097 + 64 * repeat, {3, 4, 2}, 1 + repeat);
  test_both(140, {4200, 3, 2}, 4);
  // Sample weights at the ends of their range.
  for (const Weights weights :
       {Weights::subnormal, Weights::overflowing, Weights::one_huge, Weights::zero}) {
    for (const Loss loss : losses) {
      if (loss == Loss::none) continue;
      for (const int weighted : {1, 2}) {
        Case c{3,    70,       {5, 7, 4}, loss,   ActivationKind::tanh, weighted == 2, true,
               true, weighted, 0,         weights};
        test<float>(c);
        test<double>(c);
        test_bfloat16(c);
        ++i;
      }
    }
  }
  // Activations of each layer and of outputs; norms and residuals; rates of each layer; members by index.
  const std::vector<std::vector<int64_t>> deep = {
      {4, 3}, {2, 2, 2}, {8, 8, 8, 8}, {5, 7, 7, 7, 2}, {33, 17, 17, 9, 9, 3}, {16, 140, 140, 3}};
  for (const auto& widths : deep) {
    for (const int64_t batch : {1, 7, 16, 65, 300}) {
      for (const bool rich : {false, true}) {
        Case c{};
        c.ensemble_size = 1 + i % 4 + (i % 9 == 0 ? 8 : 0);
        c.batch = batch;
        c.widths = widths;
        c.loss = losses[i % 7 < 3 ? 0 : i % 5];
        if (c.loss == Loss::gaussian_nll) c.widths.back() *= 2;
        c.options = varied_layers(c.widths, i, rich, rich);
        c.shared_input = i % 2 == 0;
        c.shared_target = i % 4 < 2;
        c.with_bias = i % 6 != 5;
        c.weighted = c.loss == Loss::none ? 0 : i % 3;
        if (i / 2 % 3 > 0) c.members = some_members(c.ensemble_size);
        c.dropout = i / 2 % 4 == 3 ? 0.5 : 0;
        c.rate_of_each_layer = c.dropout > 0 && widths.size() > 2 && i % 3 > 0;
        c.drops_before_norm = i % 5 < 3;
        test<float>(c);
        c.shared_input = !c.shared_input;
        test<double>(c);
        if (i % 2 == 1) test_bfloat16(c);
        ++i;
      }
    }
  }
  if (!multiplies_pairs(DType::bfloat16)) {
    std::printf("bfloat16 in pairs: not run, no AVX512-BF16 here\n");
  }
  test_values();
  if (failures == 0) std::printf("ok: %d cases\n", i);
  return failures != 0;
}
