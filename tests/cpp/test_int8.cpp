// Weights in bytes against plain loops over whole numbers, bit for bit on every instruction set, on buffers that end
// where the sanitizers watch. Compiled once more with what stands in for VNNI's instruction (see CMakeLists.txt), so
// that its layout is tested on processors that lack it.

#include "kernels/int8.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "kernels/ensemble_conv2d.h"
#include "kernels/ensemble_mlp_int8.h"

namespace {

using pyens::Activation;
using pyens::ActivationKind;

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

std::mt19937_64 random_bits(7);
int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }
std::vector<float> draw(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> numbers(size(n));
  for (float& x : numbers) x = 2 * normal(random_bits);
  return numbers;
}

// The weights of a layer, [members, rows, inputs].
struct Layer {
  int64_t members, rows, inputs;
  std::vector<int8_t> values;
  std::vector<float> scale, bias, input_scale;
  std::vector<int32_t> offset;
  std::vector<uint8_t> zero_point;

  Layer(int64_t e, int64_t out, int64_t in)
      : members(e), rows(out), inputs(in), bias(draw(e * out)) {
    for (int64_t i = 0; i < e * out * in; ++i) {
      values.push_back(static_cast<int8_t>(below(8) ? below(255) - 127 : 127));
    }
    for (int64_t m = 0; m < e; ++m) {
      input_scale.push_back(0.01f + 0.001f * static_cast<float>(below(40)));
      zero_point.push_back(static_cast<uint8_t>(below(3) ? below(256) : 0));
      for (int64_t o = 0; o < out; ++o) {
        scale.push_back(0.001f * static_cast<float>(1 + below(20)));
        int64_t sum = 0;
        for (int64_t k = 0; k < in; ++k) sum += values[size((m * out + o) * in + k)];
        offset.push_back(static_cast<int32_t>(-sum * zero_point.back()));
      }
    }
  }
  pyens::Int8Weight weight() const {
    return {values.data(), scale.data(), offset.data(), input_scale.data(), zero_point.data()};
  }
  int byte_of(int64_t m, float x) const {
    const float inverse = 1 / input_scale[size(m)];
    const float q = std::nearbyint(x * inverse) + static_cast<float>(zero_point[size(m)]);
    return static_cast<int>(std::min(255.0f, std::max(0.0f, q)));
  }
  // Of a sum without the offset.
  float output(int64_t m, int64_t o, int64_t sum) const {
    const size_t row = size(m * rows + o);
    const float by = scale[row] * input_scale[size(m)];
    const float product = static_cast<float>(sum + offset[row]) * by;
    return product + bias[row];
  }
};

void expect(const std::vector<float>& got, const std::vector<float>& expected, const char* what) {
  int64_t wrong = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const bool both_nan = std::isnan(got[i]) && std::isnan(expected[i]);
    wrong += !both_nan && got[i] != expected[i];
  }
  if (wrong == 0) return;
  std::printf("%s: %lld of %zu outputs differ\n", what, static_cast<long long>(wrong), got.size());
  ++failures;
}

void test_mlp(int64_t e, int64_t b, const std::vector<int64_t>& widths, ActivationKind kind,
              bool own_input) {
  std::vector<Layer> layers;
  std::vector<pyens::Int8Layer> given;
  for (size_t l = 0; l + 1 < widths.size(); ++l) layers.emplace_back(e, widths[l + 1], widths[l]);
  for (size_t l = 0; l < layers.size(); ++l) {
    const bool last = l + 1 == layers.size();
    const Activation activation{last ? ActivationKind::identity : kind, 0.25};
    given.push_back(
        {layers[l].inputs, layers[l].rows, layers[l].weight(), layers[l].bias.data(), activation});
  }
  std::vector<float> input = draw((own_input ? e : 1) * b * widths[0]);
  if (b > 2) {
    input[size(widths[0] * 2)] = std::numeric_limits<float>::quiet_NaN();
    input[size(widths[0])] = std::numeric_limits<float>::infinity();
  }
  const int64_t out = widths.back();
  std::vector<float> output(size(e * b * out)), expected;
  const pyens::EnsembleMLPInt8Params p{e,
                                       static_cast<int64_t>(given.size()),
                                       given.data(),
                                       b,
                                       input.data(),
                                       own_input ? b * widths[0] : 0,
                                       widths[0],
                                       output.data()};
  namespace cpu = pyens::ensemble_mlp_int8_cpu;
  const auto scratch = scratch_of(cpu::scratch_bytes(p));
  const int64_t items = cpu::work_items(p), half = items / 2;
  cpu::run(p, half, items, scratch.get());
  cpu::run(p, 0, half, scratch.get());
  for (int64_t m = 0; m < e; ++m) {
    for (int64_t i = 0; i < b; ++i) {
      const float* const row = input.data() + ((own_input ? m : 0) * b + i) * widths[0];
      std::vector<float> h(row, row + widths[0]);
      const bool nan = std::any_of(h.begin(), h.end(), [](float x) { return std::isnan(x); });
      for (size_t l = 0; l < layers.size(); ++l) {
        const Layer& layer = layers[l];
        std::vector<float> z;
        for (int64_t o = 0; o < layer.rows; ++o) {
          int64_t sum = 0;
          for (int64_t k = 0; k < layer.inputs; ++k) {
            const int8_t w = layer.values[size((m * layer.rows + o) * layer.inputs + k)];
            sum += nan ? 0 : w * layer.byte_of(m, h[size(k)]);
          }
          const float y = layer.output(m, o, sum);
          const bool cut = l + 1 < layers.size() && y < 0;
          z.push_back(!cut ? y : kind == ActivationKind::relu ? 0 : y * 0.25f);
        }
        h = z;
      }
      for (const float y : h) expected.push_back(nan ? std::nanf("") : y);
    }
  }
  expect(output, expected, "ensemble_mlp_int8");
}

void test_conv(int64_t e, int64_t b, pyens::Conv2d c, bool own_input) {
  const Layer layer(e, c.out_channels, c.taps());
  const int64_t pixels = c.channels * c.image.pixels();
  std::vector<float> input = draw((own_input ? e : 1) * b * pixels);
  if (b > 1) input[size(pixels + pixels / 2)] = std::numeric_limits<float>::quiet_NaN();
  const pyens::ImageSize all = c.convolved(), out = c.output();
  std::vector<float> output(size(e * b * c.out_channels * out.pixels())), expected;
  const pyens::Int8Weight weight = layer.weight();
  pyens::EnsembleConv2dParams p{};
  p.dtype = pyens::DType::float32;
  p.ensemble_size = e, p.batch = b, p.conv = c;
  p.input = input.data();
  p.input_member_stride = own_input ? b * pixels : 0, p.input_image_stride = pixels;
  p.int8 = &weight;
  p.bias = layer.bias.data();
  p.output = output.data();
  namespace cpu = pyens::ensemble_conv2d_int8_cpu;
  const auto scratch = scratch_of(cpu::scratch_bytes(p));
  const int64_t items = cpu::work_items(p), half = items / 2;
  cpu::run(p, half, items, scratch.get());
  cpu::run(p, 0, half, scratch.get());
  for (int64_t m = 0; m < e; ++m) {
    for (int64_t i = 0; i < b; ++i) {
      const float* const image = input.data() + ((own_input ? m : 0) * b + i) * pixels;
      const bool nan = std::any_of(image, image + pixels, [](float x) { return std::isnan(x); });
      for (int64_t o = 0; o < c.out_channels; ++o) {
        std::vector<float> z;
        for (int64_t at = 0; at < all.pixels(); ++at) {
          int64_t sum = 0;
          for (int64_t t = 0; t < c.taps(); ++t) {
            const int64_t channel = t / c.kernel.pixels();
            const int64_t y = at / all.width * c.stride.height - c.padding.height +
                              t % c.kernel.pixels() / c.kernel.width * c.dilation.height;
            const int64_t x = at % all.width * c.stride.width - c.padding.width +
                              t % c.kernel.width * c.dilation.width;
            const bool inside = y >= 0 && y < c.image.height && x >= 0 && x < c.image.width;
            const float pixel =
                inside ? image[(channel * c.image.height + y) * c.image.width + x] : 0;
            const int byte = nan ? 0 : layer.byte_of(m, pixel);
            sum += layer.values[size((m * c.out_channels + o) * c.taps() + t)] * byte;
          }
          const float y = layer.output(m, o, sum);
          z.push_back(c.relu && y < 0 ? 0 : y);
        }
        for (int64_t at = 0; at < out.pixels(); ++at) {
          float best = -std::numeric_limits<float>::infinity();
          for (int64_t w = 0; w < c.window.pixels(); ++w) {
            const int64_t y = at / out.width * c.window.height + w / c.window.width;
            const int64_t x = at % out.width * c.window.width + w % c.window.width;
            best = std::max(best, z[size(y * all.width + x)]);
          }
          expected.push_back(nan ? std::nanf("") : best);
        }
      }
    }
  }
  expect(output, expected, "ensemble_conv2d_int8");
}

}  // namespace

int main() {
  for (const auto kind : {ActivationKind::relu, ActivationKind::leaky_relu}) {
    for (const bool own : {false, true}) {
      test_mlp(1, 1, {1, 1}, kind, own);
      test_mlp(3, 0, {5, 4}, kind, own);
      test_mlp(3, 7, {4, 8, 3}, kind, own);
      test_mlp(2, 70, {13, 50, 21, 3}, kind, own);
      test_mlp(2, 257, {129, 193, 2}, kind, own);
      test_mlp(2, 17, {785, 7, 5, 1}, kind, own);
    }
  }
  const auto conv = [](int64_t channels, int64_t out, pyens::ImageSize image,
                       pyens::ImageSize kernel) {
    pyens::Conv2d c{};
    c.channels = channels, c.out_channels = out, c.image = image, c.kernel = kernel;
    c.stride = c.dilation = c.window = {1, 1};
    return c;
  };
  for (const int64_t b : {1, 3, 20}) {
    for (const bool own : {false, true}) {
      pyens::Conv2d grey = conv(1, 7, {9, 10}, {3, 3});
      grey.relu = true, grey.window = {2, 2};
      test_conv(2, b, grey, own);
      pyens::Conv2d colours = conv(6, 5, {8, 7}, {5, 5});
      colours.padding = {2, 1}, colours.window = {1, 3};
      test_conv(2, b, colours, own);
      pyens::Conv2d apart = conv(3, 9, {11, 12}, {3, 2});
      apart.stride = {2, 3}, apart.dilation = {1, 2}, apart.padding = {1, 2};
      test_conv(3, b, apart, own);
      pyens::Conv2d long_rows = conv(2, 3, {4, 20}, {1, 7});
      long_rows.stride = {1, 2}, long_rows.dilation = {1, 2}, long_rows.padding = {0, 3};
      test_conv(1, b, long_rows, own);
    }
  }
  return failures != 0;
}
