// The convolution's kernels against plain loops in double, on buffers that end where the sanitizers watch.

#include "kernels/ensemble_conv2d.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

namespace {

using pyens::Conv2d;
using pyens::DType;
using pyens::ImageSize;
namespace kernel = pyens::ensemble_conv2d_cpu;

int failures = 0;

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
std::unique_ptr<void, FreeDeleter> scratch_of(size_t bytes) {
  void* const p = std::aligned_alloc(64, std::max<size_t>(64, (bytes + 63) / 64 * 64));
  std::memset(p, 0xff, bytes);  // NaN: what is read before it is written shows
  return std::unique_ptr<void, FreeDeleter>(p);
}

size_t size(int64_t n) { return static_cast<size_t>(n); }

template <class T>
struct Problem {
  int64_t members, batch;
  bool own;  // images for each member
  Conv2d conv;
  std::vector<T> input, weight, bias, grad;

  Problem(int64_t e, int64_t b, bool own_images, const Conv2d& of, unsigned seed)
      : members(e), batch(b), own(own_images), conv(of) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    const auto draw = [&](std::vector<T>& to, int64_t n, double scale) {
      to.resize(size(n));
      for (T& x : to) x = static_cast<T>(normal(random) * scale);
    };
    const double fan_in = static_cast<double>(conv.taps());
    draw(input, (own ? e : 1) * b * image(), 1);
    draw(weight, e * conv.out_channels * conv.taps(), std::sqrt(2 / fan_in));
    draw(bias, e * conv.out_channels, .1);
    draw(grad, e * b * features(), 1);
  }
  int64_t image() const { return conv.channels * conv.image.pixels(); }
  int64_t features() const { return conv.out_channels * conv.output().pixels(); }

  struct Result {
    std::vector<T> output, input, weight, bias;
    std::vector<uint8_t> chosen;
  };

  pyens::EnsembleConv2dParams params() const {
    pyens::EnsembleConv2dParams p{};
    p.dtype = sizeof(T) == 4 ? DType::float32 : DType::float64;
    p.ensemble_size = members;
    p.batch = batch;
    p.conv = conv;
    p.input = input.data();
    p.input_member_stride = own ? batch * image() : 0;
    p.input_image_stride = image();
    p.weight = weight.data();
    p.bias = bias.data();
    return p;
  }

  // The work cut into pieces of `step` items.
  std::vector<T> forward(int64_t step, std::vector<uint8_t>* chosen) const {
    pyens::EnsembleConv2dParams p = params();
    std::vector<T> output(size(members * batch * features()), static_cast<T>(99));
    p.output = output.data();
    if (chosen) {
      chosen->assign(size(members * pyens::chosen_images(batch) * features()), 77);
      p.chosen = chosen->data();
    }
    for (int64_t i = 0; i < kernel::work_items(p); i += step) {
      const auto scratch = scratch_of(kernel::scratch_bytes(p));
      kernel::run(p, i, std::min(i + step, kernel::work_items(p)), scratch.get());
    }
    return output;
  }

  Result run(int64_t step, int threads) const {
    Result r;
    r.output = forward(step, conv.chooses() ? &r.chosen : nullptr);
    pyens::EnsembleConv2dParams p = params();
    p.chosen = conv.chooses() ? r.chosen.data() : nullptr;
    r.input.assign(size(members * batch * image()), static_cast<T>(99));
    r.weight.assign(weight.size(), static_cast<T>(99));
    r.bias.assign(bias.size(), static_cast<T>(99));
    pyens::EnsembleConv2dGradients g{};
    g.output = grad.data();
    g.input = r.input.data();
    g.weight = r.weight.data();
    g.bias = r.bias.data();
    g.threads = threads;
    const auto plan = kernel::plan_backward(p, g);
    const auto partial = scratch_of(plan.partial_bytes);
    g.partial = partial.get();
    for (int64_t i = 0; i < plan.items; i += step) {
      const auto scratch = scratch_of(plan.scratch_bytes);
      kernel::run_backward(p, g, i, std::min(i + step, plan.items), scratch.get());
    }
    if (plan.partial_bytes > 0) kernel::finish_backward(p, g, 0, members);
    return r;
  }

  // Plain loops. The forward pass decides where gradients go: `chosen` of double sums might differ.
  struct Exact {
    std::vector<double> output, input, weight, bias;
  };
  Exact exact() const {
    Exact r;
    r.output.resize(size(members * batch * features()));
    r.input.resize(size(members * batch * image()));
    r.weight.resize(weight.size());
    r.bias.resize(bias.size());
    const ImageSize out = conv.output();
    for (int64_t m = 0; m < members; ++m) {
      for (int64_t b = 0; b < batch; ++b) {
        const T* const from = input.data() + (own ? m * batch + b : b) * image();
        for (int64_t o = 0; o < conv.out_channels; ++o) {
          for (int64_t y = 0; y < out.height; ++y) {
            for (int64_t x = 0; x < out.width; ++x) {
              const int64_t at =
                  (m * batch + b) * features() + (o * out.height + y) * out.width + x;
              window(m, b, o, y, x, from, static_cast<double>(grad[size(at)]), r.output[size(at)],
                     r);
            }
          }
        }
      }
    }
    return r;
  }

  void window(int64_t m, int64_t b, int64_t o, int64_t y, int64_t x, const T* from, double above,
              double& output, Exact& r) const {
    double best = 0;
    int64_t best_y = -1, best_x = -1;
    for (int64_t i = 0; i < conv.window.height; ++i) {
      for (int64_t j = 0; j < conv.window.width; ++j) {
        const int64_t cy = y * conv.window.height + i, cx = x * conv.window.width + j;
        double sum = static_cast<double>(bias[size(m * conv.out_channels + o)]);
        taps(m, o, cy, cx, [&](int64_t w, int64_t pixel) {
          sum += static_cast<double>(weight[size(w)]) * static_cast<double>(from[pixel]);
        });
        if (best_y < 0 || sum > best) best = sum, best_y = cy, best_x = cx;
      }
    }
    output = conv.relu ? std::max(best, 0.0) : best;
    if (conv.relu && best <= 0) return;
    r.bias[size(m * conv.out_channels + o)] += above;
    taps(m, o, best_y, best_x, [&](int64_t w, int64_t pixel) {
      r.weight[size(w)] += above * static_cast<double>(from[pixel]);
      r.input[size((m * batch + b) * image() + pixel)] +=
          above * static_cast<double>(weight[size(w)]);
    });
  }

  template <class Visit>
  void taps(int64_t m, int64_t o, int64_t y, int64_t x, const Visit& visit) const {
    const Conv2d& c = conv;
    for (int64_t k = 0; k < c.taps(); ++k) {
      const int64_t channel = k / c.kernel.pixels(), i = k / c.kernel.width % c.kernel.height,
                    j = k % c.kernel.width;
      const int64_t iy = y * c.stride.height + i * c.dilation.height - c.padding.height,
                    ix = x * c.stride.width + j * c.dilation.width - c.padding.width;
      if (iy < 0 || iy >= c.image.height || ix < 0 || ix >= c.image.width) continue;
      visit((m * c.out_channels + o) * c.taps() + k,
            channel * c.image.pixels() + iy * c.image.width + ix);
    }
  }
};

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class T>
void compare(const char* what, const char* name, const std::vector<T>& got,
             const std::vector<double>& expected, double tolerance) {
  double scale = 1e-30, worst = 0;
  for (const double e : expected) scale = std::max(scale, std::abs(e));
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(static_cast<double>(got[i]) - expected[i]) / scale;
    worst = error <= worst ? worst : error;  // NaN too
  }
  if (!(worst <= tolerance)) {
    std::printf("%s, %s: off by %g of the largest\n", what, name, worst);
    ++failures;
  }
}

template <class T>
void check(const char* name, int64_t members, int64_t batch, bool own, const Conv2d& conv) {
  const Problem<T> problem(members, batch, own, conv, 7);
  const auto once = problem.run(1000, 1);
  const auto exact = problem.exact();
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;
  compare("output", name, once.output, exact.output, tolerance);
  compare("gradient of the images", name, once.input, exact.input, tolerance);
  compare("gradient of the weights", name, once.weight, exact.weight, tolerance);
  compare("gradient of the biases", name, once.bias, exact.bias, tolerance);
  // The same bits: in pieces, with spans apart, without `chosen` (a few images: pixels in the lanes).
  for (const int64_t step : {int64_t{1}, int64_t{3}}) {
    for (const int threads : {1, 2, 64}) {
      const auto pieces = problem.run(step, threads);
      if (!same(pieces.output, once.output) || !same(pieces.input, once.input) ||
          !same(pieces.weight, once.weight) || !same(pieces.bias, once.bias)) {
        std::printf("%s: other bits in pieces of %d, %d threads\n", name, static_cast<int>(step),
                    threads);
        ++failures;
      }
    }
    if (!same(problem.forward(step, nullptr), once.output)) {
      std::printf("%s: other bits without what a backward pass reads\n", name);
      ++failures;
    }
  }
  // And image by image.
  Problem<T> one = problem;
  one.batch = 1;
  for (int64_t b = 0; b < batch; ++b) {
    one.input.clear();
    for (int64_t m = 0; m < (own ? members : 1); ++m) {
      const auto from = problem.input.begin() + (m * batch + b) * problem.image();
      one.input.insert(one.input.end(), from, from + problem.image());
    }
    const auto output = one.forward(1000, nullptr);
    for (int64_t m = 0; m < members; ++m) {
      const T* const whole = once.output.data() + (m * batch + b) * problem.features();
      if (std::memcmp(whole, output.data() + m * problem.features(),
                      size(problem.features()) * sizeof(T)) != 0) {
        std::printf("%s: other bits of image %d alone\n", name, static_cast<int>(b));
        ++failures;
      }
    }
  }
}

Conv2d conv_of(int64_t channels, int64_t out, ImageSize image, ImageSize kernel,
               ImageSize stride = {1, 1}, ImageSize padding = {0, 0}, ImageSize dilation = {1, 1},
               ImageSize window = {1, 1}, bool relu = false) {
  return {channels, out, image, kernel, stride, padding, dilation, window, relu};
}

// A NaN or an Inf in an image, and the maximum of a window with a NaN in it.
template <class T>
void check_special() {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const Conv2d conv = conv_of(1, 1, {4, 4}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, {2, 2}, true);
  for (const int64_t batch : {1, 40}) {
    Problem<T> problem(1, batch, false, conv, 3);
    std::fill(problem.weight.begin(), problem.weight.end(), static_cast<T>(1));
    std::fill(problem.bias.begin(), problem.bias.end(), static_cast<T>(0));
    std::fill(problem.input.begin(), problem.input.end(), static_cast<T>(-1));
    problem.input[0] = nan;  // of the first window: the first pixel, then larger ones
    problem.input[1] = static_cast<T>(5);
    problem.input[2] = std::numeric_limits<T>::infinity();
    for (const bool chooses : {false, true}) {
      std::vector<uint8_t> chosen;
      const auto output = problem.forward(1, chooses ? &chosen : nullptr);
      // As in torch, what is larger than a NaN is nothing, but a later pixel wins over none either.
      if (!std::isnan(output[0]) || !std::isinf(output[1]) || output[2] != 0 || output[3] != 0) {
        std::printf("NaN and Inf, %d images: got %g %g %g %g\n", static_cast<int>(batch),
                    static_cast<double>(output[0]), static_cast<double>(output[1]),
                    static_cast<double>(output[2]), static_cast<double>(output[3]));
        ++failures;
      }
    }
  }
}

template <class T>
void check_all() {
  check<T>("one pixel", 1, 1, false, conv_of(1, 1, {1, 1}, {1, 1}));
  check<T>("the first layer", 2, 17, false,
           conv_of(1, 28, {14, 14}, {3, 3}, {1, 1}, {0, 0}, {1, 1}, {2, 2}, true));
  check<T>("the second layer", 2, 35, true,
           conv_of(28, 9, {7, 7}, {5, 5}, {1, 1}, {0, 0}, {1, 1}, {2, 2}, true));
  check<T>("padding", 3, 5, false, conv_of(2, 7, {5, 6}, {3, 3}, {1, 1}, {1, 1}));
  check<T>("stride", 2, 9, true,
           conv_of(3, 5, {11, 9}, {3, 3}, {2, 2}, {1, 1}, {1, 1}, {1, 1}, true));
  check<T>("stride beyond the kernel", 2, 3, false, conv_of(2, 3, {9, 10}, {2, 1}, {3, 4}));
  check<T>("strides that differ", 1, 70, false, conv_of(2, 2, {8, 9}, {3, 2}, {1, 3}, {2, 1}));
  check<T>("dilation", 2, 6, false, conv_of(3, 4, {9, 11}, {3, 3}, {1, 1}, {2, 2}, {2, 3}));
  check<T>("dilation and stride", 2, 18, true,
           conv_of(2, 4, {13, 12}, {3, 2}, {2, 3}, {1, 2}, {3, 2}, {1, 1}, true));
  check<T>("windows that leave pixels over", 2, 4, false,
           conv_of(2, 3, {9, 8}, {2, 2}, {1, 1}, {0, 0}, {1, 1}, {3, 2}, true));
  check<T>("a window of 9 and many taps", 1, 20, false,
           conv_of(30, 13, {8, 8}, {3, 3}, {1, 1}, {0, 0}, {1, 1}, {3, 3}, false));
  check<T>("a window, one column", 2, 3, false,
           conv_of(1, 2, {12, 1}, {3, 1}, {1, 1}, {0, 0}, {1, 1}, {5, 1}, true));
  check<T>("padding larger than the kernel", 1, 3, false,
           conv_of(1, 2, {2, 3}, {2, 2}, {1, 1}, {3, 4}));
  check<T>("many images", 2, 300, false,
           conv_of(1, 3, {4, 4}, {2, 2}, {1, 1}, {0, 0}, {1, 1}, {2, 2}, true));
  check_special<T>();
}

}  // namespace

int main() {
  check_all<float>();
  check_all<double>();
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures > 0;
}
