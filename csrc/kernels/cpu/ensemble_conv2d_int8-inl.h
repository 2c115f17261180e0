// The convolution on weights in bytes: the mappings of ensemble_conv2d-inl.h, with units of bytes for the images' numbers.
//
// A unit of a pixel holds a few channels of it, or where those are few (the grey images of a first layer) a few
// neighbours along its row, each a tap of its own: whatever makes fewer units of a kernel. So planes are as large as those
// of float32, a lane reads a unit where it read a number, and one list of offsets serves both. All taps go into one
// chain: whole numbers need no blocks. The weights of a member become units once per item.

#include "kernels/cpu/ensemble_conv2d-inl.h"
#include "kernels/cpu/int8-inl.h"

namespace pyens::PYENS_ISA::ensemble_conv2d {

constexpr int kPerUnit = Int8Format::kPerUnit;

// Whether neighbours make a unit, not channels.
inline bool takes_neighbours(const Conv2d& c) {
  return c.channels * int8_units(c.kernel.width) < int8_units(c.channels) * c.kernel.width;
}

// The convolution whose taps are units.
inline Conv2d unit_conv(Conv2d c) {
  if (takes_neighbours(c)) {
    c.kernel.width = int8_units(c.kernel.width);
    c.dilation.width *= kPerUnit;
  } else {
    c.channels = int8_units(c.channels);
  }
  return c;
}

// [o][taps of unit_conv] of one member.
inline void conv_weight_units(const Conv2d& c, const int8_t* values, int32_t* units) {
  using Element = Int8Format::Element;
  const Conv2d u = unit_conv(c);
  if (takes_neighbours(c)) {
    weight_units(values, c.kernel.width, c.out_channels * c.channels * c.kernel.height,
                 c.kernel.width, units, u.kernel.width);
    return;
  }
  constexpr int N = kWideLanes<float>;  // taps at a time
  const int64_t kernel = c.kernel.pixels();
  for (int64_t o = 0; o < c.out_channels; ++o) {
    for (int64_t g = 0; g < u.channels; ++g, units += kernel) {
      const int8_t* const from = values + (o * c.channels + g * kPerUnit) * kernel;
      const int64_t channels = std::min<int64_t>(kPerUnit, c.channels - g * kPerUnit);
      for (int64_t t = 0; t < kernel; t += N) {
        const auto n = static_cast<size_t>(std::min<int64_t>(N, kernel - t));
        Ints<N> bytes[kPerUnit] = {};
        for (int64_t i = 0; i < channels; ++i) {
          Vec<int8_t, N> some{};
          std::memcpy(&some, from + i * kernel + t, n);
          bytes[i] = __builtin_convertvector(some, Ints<N>) & (sizeof(Element) == 1 ? 255 : 65535);
        }
        const Ints<N> unit = unit_of(bytes);
        std::memcpy(units + t, &unit, n * sizeof(int32_t));
      }
    }
  }
}

struct Int8Scratch {
  Conv2d units;
  Scratch<float> s;  // planes of units
  int32_t* weights;
  float* scale;
  // Bytes of some pixels: of rows of kPerUnit channels, or of a padded row with what is behind it. In a lane each.
  int32_t* row;
  int32_t* nan;  // [lanes], not 0 where an image has met one
  size_t bytes;

  Int8Scratch(const EnsembleConv2dParams& p, void* memory)
      : units(unit_conv(p.conv)), s(p, units, memory) {
    constexpr int64_t N = kWideLanes<float>;
    const Conv2d& c = p.conv;
    Memory m(memory ? static_cast<char*>(memory) + s.bytes : nullptr);
    weights = m.take<int32_t>(c.out_channels * units.taps());
    scale = m.take<float>(c.out_channels);
    row = m.take<int32_t>(kPerUnit * round_up(c.image.width, N) + row_pixels(c) * row_lanes() + N);
    nan = m.take<int32_t>(N);
    bytes = s.bytes + m.bytes();
  }
  int64_t row_lanes() const { return s.by_pixel ? 1 : kWideLanes<float>; }
  static int64_t padded(const Conv2d& c) { return c.image.width + 2 * c.padding.width; }
  static int64_t row_pixels(const Conv2d& c) {
    return takes_neighbours(c) ? padded(c) + (kPerUnit - 1) * c.dilation.width : 0;
  }
  int32_t* planes() const { return reinterpret_cast<int32_t*>(s.planes); }
};

// A padded row of bytes, [pixel][lanes], becomes units of neighbours.
inline void neighbours_to_units(const Conv2d& c, const Layout& at, const int32_t* row,
                                int64_t lanes, int32_t* to) {
  const int64_t next = c.dilation.width * lanes;
  for (int64_t x = 0; x < Int8Scratch::padded(c); ++x) {
    int32_t* const unit = to + at.column(c, x) * lanes;
    for (int64_t b = 0; b < lanes; ++b) {
      int32_t all = 0;
      for (int i = 0; i < kPerUnit; ++i) {
        all |= row[x * lanes + b + i * next] << (i * (32 / kPerUnit));
      }
      unit[b] = all;
    }
  }
}

// Images [C, H, W] into the lanes of their planes.
inline void images_to_unit_lanes(const Conv2d& c, const Int8Scratch& of, const float* images,
                                 int64_t stride, int64_t count, const Quantizer& quantizer) {
  using V = Narrow<float>;
  constexpr int N = lanes_of<V>(), kLanes = kWideLanes<float>;
  const Layout& at = of.s.at;
  const bool neighbours = takes_neighbours(c);
  const int64_t at_once = neighbours ? 1 : kPerUnit;
  std::fill(of.nan, of.nan + kLanes, 0);
  std::fill(of.row, of.row + Int8Scratch::row_pixels(c) * kLanes, quantizer.zero_point);
  for (int64_t line = 0; line < (c.channels + at_once - 1) / at_once * c.image.height; ++line) {
    const int64_t g = line / c.image.height, y = line % c.image.height;
    int32_t* const to = of.planes() + (g * at.channel + at.row(c, y + c.padding.height)) * kLanes;
    for (int64_t x = 0; x < c.image.width; x += N) {
      const int64_t n = std::min<int64_t>(N, c.image.width - x);
      for (int64_t b = 0; b < kLanes; b += N) {
        Ints<N> bytes[N][kPerUnit] = {};
        auto met = load<Ints<N>>(of.nan + b);
        for (int64_t i = 0; i < at_once && g * at_once + i < c.channels; ++i) {
          const float* const from =
              images + ((g * at_once + i) * c.image.height + y) * c.image.width + x;
          V r[N];
          for (int j = 0; j < N; ++j) {
            r[j] = b + j < count ? load_first<float>(from + (b + j) * stride, n) : V{};
          }
          transpose(r);
          for (int j = 0; j < N; ++j) {
            met |= r[j] != r[j];
            bytes[j][i] = quantizer(r[j]);
          }
        }
        store(of.nan + b, met);
        for (int64_t j = 0; j < n; ++j) {
          if (neighbours) {
            store(of.row + (c.padding.width + x + j) * kLanes + b, bytes[j][0]);
          } else {
            store(to + of.s.column[x + j] + b, unit_of(bytes[j]));
          }
        }
      }
    }
    if (neighbours) neighbours_to_units(c, at, of.row, kLanes, to);
  }
}

// One image into its planes.
inline void image_to_unit_planes(const Conv2d& c, const Int8Scratch& of, const float* image,
                                 const Quantizer& quantizer) {
  using V = Narrow<float>;
  constexpr int N = lanes_of<V>();
  const Layout& at = of.s.at;
  const bool neighbours = takes_neighbours(c);
  const int64_t at_once = neighbours ? 1 : kPerUnit, pitch = round_up(c.image.width, N);
  Ints<N> met{};
  // Behind the rows of channels, or the padded one.
  std::fill(of.row, of.row + Int8Scratch::row_pixels(c), quantizer.zero_point);
  for (int64_t line = 0; line < (c.channels + at_once - 1) / at_once * c.image.height; ++line) {
    const int64_t g = line / c.image.height, y = line % c.image.height;
    const int64_t channels = std::min(at_once, c.channels - g * at_once);
    int32_t* const to = of.planes() + g * at.channel + at.row(c, y + c.padding.height);
    for (int64_t i = 0; i < channels; ++i) {
      const float* const from = image + ((g * at_once + i) * c.image.height + y) * c.image.width;
      int32_t* const bytes = of.row + (neighbours ? c.padding.width : i * pitch);
      for (int64_t x = 0; x < c.image.width; x += N) {
        const int64_t n = std::min<int64_t>(N, c.image.width - x);
        const V pixels = load_first<float>(from + x, n);
        met |= pixels != pixels;
        const Ints<N> q = quantizer(pixels);
        std::memcpy(bytes + x, &q, static_cast<size_t>(n) * sizeof(int32_t));
      }
    }
    if (neighbours) {
      neighbours_to_units(c, at, of.row, 1, to);
      continue;
    }
    for (int64_t x = 0; x < c.image.width; ++x) {
      int32_t unit = 0;
      for (int64_t i = 0; i < channels; ++i) {
        unit |= of.row[i * pitch + x] << (i * (32 / kPerUnit));
      }
      to[of.s.column[x]] = unit;
    }
  }
  of.nan[0] = 0;
  for (int i = 0; i < N; ++i) of.nan[0] |= met[i];
}

// A block of sums, which then goes on as one of floats.
template <class Block>
struct UnitBlock {
  const int32_t* w;
  int64_t taps;
  const int64_t* offset;
  const int32_t* start;
  const float* scale;
  const Block& block;

  template <int R, int NV, class I>
  void run(int64_t row) const {
    using F = Vec<float, lanes_of<I>()>;
    I sum[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] = broadcast<I>(start[row + r]);
    }
    const float* at[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) at[v] = block.x[v];
    RowNumbers<int32_t, R> weights(w + row * taps, taps);
    for (int64_t k = 0; k < taps; ++k, weights.advance(1)) {
      const int64_t tap = offset[k];
      I input[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) input[v] = load<I>(at[v] + tap);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const I weight = broadcast<I>(weights[r]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          sum[r][v] = Int8Format::product(weight, input[v], sum[r][v]);
        }
      }
    }
    F value[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        value[r][v] = __builtin_convertvector(sum[r][v], F) * scale[row + r];
      }
    }
    block.template finish<R, NV>(NextRows{row}, value);
  }
};

// What Taps are of float weights: a member's, all of them at once.
struct UnitTaps {
  const Int8Scratch& of;
  const int32_t* start;

  int64_t count() const { return 1; }
  int64_t step() const { return 1; }
  template <class Block>
  void run(int64_t vectors, int64_t /*k*/, const int64_t* offset, const Block& block) const {
    const UnitBlock<Block> sums{of.weights, of.units.taps(), offset, start, of.scale, block};
    run_vectors<Ints<kWideLanes<float>>>(vectors, of.units.out_channels, sums);
  }
};

inline size_t int8_scratch_bytes(const EnsembleConv2dParams& p) {
  return Int8Scratch(p, nullptr).bytes;
}

inline void run_int8(const EnsembleConv2dParams& p, int64_t begin, int64_t end, void* memory) {
  const Int8Scratch of(p, memory);
  const Scratch<float>& s = of.s;
  const Conv2d& c = p.conv;
  const int64_t images = images_of_item<float>(p), features = c.out_channels * s.at.output.pixels();
  const int64_t planes = s.at.image_numbers(of.units) * of.row_lanes() + kWideLanes<float>;
  int32_t padded_with = 0;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item / p.ensemble_size, m = item % p.ensemble_size, first = tile * images;
    const int64_t count = std::min(images, p.batch - first);
    const Quantizer quantizer(*p.int8, m);
    // Members run fastest: those that take shared images alike share their bytes too.
    const bool same = item > begin && m > 0 && p.input_member_stride == 0 &&
                      quantizer == Quantizer(*p.int8, m - 1);
    if (!same) {
      if (quantizer.zero_point != padded_with) {
        padded_with = quantizer.zero_point;
        int32_t bytes[kPerUnit];
        std::fill(bytes, bytes + kPerUnit, padded_with);
        std::fill(of.planes(), of.planes() + planes, unit_of(bytes));
      }
      const float* const from = static_cast<const float*>(p.input) + m * p.input_member_stride +
                                first * p.input_image_stride;
      if (s.by_pixel) {
        image_to_unit_planes(c, of, from, quantizer);
      } else {
        images_to_unit_lanes(c, of, from, p.input_image_stride, count, quantizer);
      }
    }
    const int64_t rows = m * c.out_channels;
    conv_weight_units(c, p.int8->values + rows * c.taps(), of.weights);
    for (int64_t o = 0; o < c.out_channels; ++o) {
      of.scale[o] = p.int8->scale[rows + o] * p.int8->input_scale[m];
      s.bias[o] = p.bias ? static_cast<const float*>(p.bias)[rows + o] : 0;
    }
    const UnitTaps taps{of, p.int8->offset + rows};
    float* const output = static_cast<float*>(p.output) + (m * p.batch + first) * features;
    if (s.by_pixel) {
      convolve_pixels(p, taps, s, output);
    } else {
      convolve_lanes(p, taps, s, nullptr);
      lanes_to_rows(s.output, features, count, output, features);
    }
    for (int64_t b = 0; b < count; ++b) {
      if (of.nan[b] == 0) continue;
      std::fill(output + b * features, output + (b + 1) * features,
                std::numeric_limits<float>::quiet_NaN());
    }
  }
}

constexpr Functions kFunctions = {work_items<float, float>, int8_scratch_bytes, run_int8};

}  // namespace pyens::PYENS_ISA::ensemble_conv2d
