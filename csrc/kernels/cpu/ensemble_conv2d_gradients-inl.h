// The gradients of a convolution: by its weights, its biases and its images.
//
// Images in the lanes, tile by tile. The gradient by the convolution's sums is made from that of the output and what
// the forward pass has chosen, and laid out as the images are; then
//
//   weight gradients  a sum over all pixels and images of gradient times tap: a block of output channels x taps stays
//                     in registers over all pixels of a tile, and ends in one sum across lanes
//   image gradients   the same convolution the other way: a pixel of an image reads the gradients that it has reached,
//                     through an index list again, with the weights gathered once per member and item. At the edges of
//                     an image fewer taps have reached one: the others are left out
//
// Order of summation, fixed by the batch and the layer alone. A weight gradient: per lane one chain over the pixels of a
// tile, the lanes in a tree, the tiles of a span in order, the (at most kMaxSpans) spans in order; a bias likewise. An
// image gradient: as the outputs, over taps and the output channels of each.

#include "kernels/cpu/ensemble_conv2d-inl.h"

namespace pyens::PYENS_ISA::ensemble_conv2d {

constexpr int64_t kMaxSpans = 16;

// The block of a weight gradient: one sum for each lane of the vector that it ends in.
template <class Real>
constexpr int kTaps = kWideLanes<Real> < 4 ? kWideLanes<Real> : 4;
template <class Real>
constexpr int kChannels = kWideLanes<Real> / kTaps<Real>;

struct BackwardSchedule {
  int64_t tiles, tiles_per_span, spans;
  int64_t weights, member_gradients;  // numbers of a member that are asked for
  bool by_span;                       // spans run apart

  BackwardSchedule(const EnsembleConv2dParams& p, const EnsembleConv2dGradients& g, int64_t lanes) {
    const Conv2d& c = p.conv;
    tiles = (p.batch + lanes - 1) / lanes;
    tiles_per_span = (tiles + kMaxSpans - 1) / kMaxSpans;
    spans = (tiles + tiles_per_span - 1) / tiles_per_span;
    weights = g.weight ? c.out_channels * c.taps() : 0;
    member_gradients = weights + (g.bias ? c.out_channels : 0);
    by_span = g.threads > 1 && spans > 1 && p.ensemble_size < 4 * g.threads;
  }
  int64_t items(const EnsembleConv2dParams& p) const {
    return p.ensemble_size * (by_span ? spans : 1);
  }
};

template <class Real>
struct BackwardScratch {
  Layout at;
  int64_t* offset;  // [taps]
  int64_t* column;  // of each pixel of a row of an image
  Real* planes;     // of the images
  // [out_channels][gradient_plane][lanes]. Where only weights and biases are asked for, of kChannels alone: in L2.
  Real* gradient;
  Real* member;  // weights and biases: over one of several spans
  // Of the image gradient, for each plane of a channel: [tap, output channel], and weights [channel][tap, output channel].
  int64_t* gradient_offset;
  Real* weight;
  Real* image;  // planes of the images' gradients
  Real* zeros;  // in the place of a bias
  size_t bytes;

  BackwardScratch(const EnsembleConv2dParams& p, const EnsembleConv2dGradients& g, void* memory)
      : at(p.conv) {
    constexpr int64_t N = kWideLanes<Real>;
    const Conv2d& c = p.conv;
    const BackwardSchedule s(p, g, N);
    const bool image_too = g.input != nullptr;
    const int64_t taps = c.kernel.pixels();
    Memory m(memory);
    offset = m.take<int64_t>(c.taps());
    column = m.take<int64_t>(c.image.width);
    planes = m.zeros<Real>(g.weight ? at.image_numbers(c) * N : 0);
    const int64_t most = image_too ? c.out_channels : kChannels<Real>;
    gradient = m.zeros<Real>(most * at.gradient_plane * N);
    member = m.take<Real>(!s.by_span && s.spans > 1 ? s.member_gradients : 0);
    gradient_offset = m.take<int64_t>(image_too ? c.out_channels * taps : 0);
    weight = m.take<Real>(image_too ? c.channels * c.out_channels * taps : 0);
    image = m.take<Real>(image_too ? at.image_numbers(c) * N : 0);
    zeros = m.zeros<Real>(image_too ? c.channels : 0);
    bytes = m.bytes();
    if (!memory) return;
    fill_offsets(c, at, N, offset);
    fill_columns(c, at, N, column);
  }
};

// The gradient of the output, rows of images, becomes that of the convolution's sums: of some output channels.
template <class Elem, class Real>
void gradient_to_lanes(const Conv2d& c, const Layout& at, const Elem* rows, int64_t count,
                       const uint8_t* chosen, int64_t first, int64_t channels, Real* gradient) {
  using V = Narrow<Real>;
  constexpr int N = lanes_of<V>(), kLanes = kWideLanes<Real>;
  using Ints = Vec<std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>, N>;
  const ImageSize size = at.output, window = c.window;
  const int64_t features = c.out_channels * size.pixels();
  for (int64_t line = first * size.height; line < (first + channels) * size.height; ++line) {
    const int64_t o = line / size.height - first, y = line % size.height;
    Real* const to =
        gradient +
        (o * at.gradient_plane + at.gradient_first + at.base(y * window.height, 0)) * kLanes;
    for (int64_t x = 0; x < size.width; x += N) {
      const int64_t f = line * size.width + x, n = std::min<int64_t>(N, size.width - x);
      for (int64_t b = 0; b < kLanes; b += N) {
        V r[N];
        for (int i = 0; i < N; ++i) {
          r[i] = b + i < count ? load_first<Real>(rows + (b + i) * features + f, n) : V{};
        }
        transpose(r);
        for (int64_t i = 0; i < n; ++i) {
          Real* pixel = to + (x + i) * window.width * kLanes + b;
          if (!chosen) {
            store(pixel, r[i]);
            continue;
          }
          const auto bytes = load<Vec<uint8_t, N>>(chosen + (f + i) * kLanes + b);
          const Ints which = __builtin_convertvector(bytes, Ints);
          Ints number{};
          for (int64_t h = 0; h < window.height; ++h, pixel += at.pitch * kLanes) {
            for (int64_t w = 0; w < window.width; ++w, number += 1) {
              store(pixel + w * kLanes, which == number ? r[i] : V{});
            }
          }
        }
      }
    }
  }
}

// Pixels that are convolved and read.
inline ImageSize used_pixels(const Conv2d& c, const Layout& at) {
  return {at.output.height * c.window.height, at.output.width * c.window.width};
}

// Lane r * kTaps + t <- sum over pixels and lanes of g[r] x[t], for kChannels output channels and C taps.
template <class Real, int C>
Wide<Real> pixel_products(const Real* g, int64_t g_stride, int64_t channels, const Real* x,
                          const int64_t* offset, ImageSize size, int64_t pitch) {
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>(), R = kChannels<Real>, kRow = kTaps<Real>;
  V sum[N] = {};
  const Real *gs[R], *xs[C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) gs[r] = g + std::min<int64_t>(r, channels - 1) * g_stride;
#pragma GCC unroll 4
  for (int t = 0; t < C; ++t) xs[t] = x + offset[t];
  for (int64_t y = 0; y < size.height; ++y) {
    for (int64_t i = y * pitch * N; i < (y * pitch + size.width) * N; i += N) {
      V of_channel[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) of_channel[r] = load<V>(gs[r] + i);
#pragma GCC unroll 4
      for (int t = 0; t < C; ++t) {
        const V tap = load<V>(xs[t] + i);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          sum[r * kRow + t] = madd(of_channel[r], tap, sum[r * kRow + t]);
        }
      }
    }
  }
  return sum_lanes(sum);
}

// weight[o][k] <- (first ? 0 : weight[o][k]) + the sum over a tile, for up to kChannels output channels whose gradients
// are at g. Taps in blocks as equal as may be.
template <class Real>
void weight_gradient(const Conv2d& c, const BackwardScratch<Real>& s, const Real* g,
                     int64_t channels, Real* weight, bool first) {
  constexpr int64_t N = kWideLanes<Real>, C = kTaps<Real>;
  const int64_t taps = c.taps(), g_stride = s.at.gradient_plane * N, blocks = (taps + C - 1) / C;
  const ImageSize size = used_pixels(c, s.at);
  for (int64_t b = 0, k = 0; b < blocks; ++b) {
    const int64_t count = taps / blocks + (b < taps % blocks);
    const auto products = count == 4   ? pixel_products<Real, std::min<int>(4, C)>
                          : count == 3 ? pixel_products<Real, std::min<int>(3, C)>
                          : count == 2 ? pixel_products<Real, 2>
                                       : pixel_products<Real, 1>;
    Real sums[N];
    store(sums, products(g, g_stride, channels, s.planes, s.offset + k, size, s.at.pitch));
    for (int64_t r = 0; r < channels; ++r) {
      Real* const to = weight + r * taps + k;
      for (int64_t t = 0; t < count; ++t) {
        to[t] = first ? sums[r * C + t] : to[t] + sums[r * C + t];
      }
    }
    k += count;
  }
}

// bias[o] <- (first ? 0 : bias[o]) + the sum over a tile, likewise: channels side by side, which need not wait for each
// other.
template <class Real>
void bias_gradient(const Conv2d& c, const BackwardScratch<Real>& s, const Real* g, int64_t channels,
                   Real* bias, bool first) {
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>(), R = kChannels<Real>;
  const ImageSize size = used_pixels(c, s.at);
  V sum[R] = {};
  for (int64_t y = 0; y < size.height; ++y) {
    for (int64_t i = y * s.at.pitch; i < y * s.at.pitch + size.width; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        sum[r] += load<V>(g + (std::min<int64_t>(r, channels - 1) * s.at.gradient_plane + i) * N);
      }
    }
  }
  for (int64_t r = 0; r < channels; ++r) {
    const Real total = sum_lanes(sum[r]);
    bias[r] = first ? total : bias[r] + total;
  }
}

// --- image gradients -------------------------------------------------------------------------------

// The taps along one axis that fall on one plane of it, and how far back from a position each reads: the n-th is tap
// first + n step, at shift + n shift_step.
struct PlaneTaps {
  int64_t first, step, count, shift, shift_step;

  PlaneTaps(int64_t plane, int64_t kernel, int64_t stride, int64_t dilation)
      : first(0), step(stride / std::gcd(stride, dilation)), count(0), shift(0), shift_step(0) {
    while (first < kernel && first * dilation % stride != plane) ++first;
    if (first < kernel) count = (kernel - 1 - first) / step + 1;
    shift = first * dilation / stride;
    shift_step = step * dilation / stride;
  }
  // [begin, end) of those that read one of `size` gradients from a position in [position, position + width).
  void reaching(int64_t position, int64_t width, int64_t size, int64_t* begin, int64_t* end) const {
    *begin = 0, *end = count;
    while (*begin < *end && position - (shift + *begin * shift_step) >= size) ++*begin;
    while (*begin < *end && position + width - 1 - (shift + (*end - 1) * shift_step) < 0) --*end;
  }
};

// visit(plane's row and column, taps along both axes) for all planes of a channel.
template <class Visit>
void for_each_plane(const Conv2d& c, const Visit& visit) {
  for (int64_t y = 0; y < c.stride.height; ++y) {
    for (int64_t x = 0; x < c.stride.width; ++x) {
      visit(y, x, PlaneTaps(y, c.kernel.height, c.stride.height, c.dilation.height),
            PlaneTaps(x, c.kernel.width, c.stride.width, c.dilation.width));
    }
  }
}

// Gathers a member's weights as the image gradient reads them, and says where the gradients lie.
template <class Real>
void gather_taps(const Conv2d& c, const Real* weight, const BackwardScratch<Real>& s) {
  constexpr int64_t N = kWideLanes<Real>;
  int64_t* offset = s.gradient_offset;
  Real* to = s.weight;
  const int64_t kernel = c.kernel.pixels();
  for_each_plane(c, [&](int64_t, int64_t, const PlaneTaps& rows, const PlaneTaps& columns) {
    for (int64_t channel = -1; channel < c.channels; ++channel) {
      for (int64_t i = 0; i < rows.count; ++i) {
        for (int64_t j = 0; j < columns.count; ++j) {
          const int64_t tap =
              (rows.first + i * rows.step) * c.kernel.width + columns.first + j * columns.step;
          const int64_t back = (rows.shift + i * rows.shift_step) * s.at.pitch + columns.shift +
                               j * columns.shift_step;
          for (int64_t o = 0; o < c.out_channels; ++o) {
            if (channel < 0) {
              *offset++ = (o * s.at.gradient_plane + s.at.gradient_first - back) * N;
            } else {
              *to++ = weight[(o * c.channels + channel) * kernel + tap];
            }
          }
        }
      }
    }
  });
}

// Of a plane: the first position whose pixel is not padding, and the one behind the last.
struct Positions {
  int64_t begin, end;
  Positions(int64_t plane, int64_t size, int64_t padding, int64_t stride)
      : begin((std::max<int64_t>(padding - plane, 0) + stride - 1) / stride),
        end(size - 1 + padding < plane ? 0 : (size - 1 + padding - plane) / stride + 1) {}
};

// `vectors` positions side by side, from a row and column of a plane on: z, a column of channels.
template <class Real>
void image_gradient_block(const Conv2d& c, const BackwardScratch<Real>& s, const PlaneTaps& rows,
                          const PlaneTaps& columns, const int64_t* offset, const Real* weight,
                          int64_t y, int64_t x, int64_t vectors, Real* z) {
  using V = Wide<Real>;
  constexpr int64_t N = lanes_of<V>();
  const int64_t outputs = c.out_channels, all = rows.count * columns.count * outputs;
  const ImageSize size = used_pixels(c, s.at);
  PixelBlock<Real> block{};
  for (int64_t v = 0; v < vectors; ++v) block.x[v] = s.gradient + s.at.base(y, x + v) * N;
  block.z = z;
  block.z_row = s.at.channel * N, block.z_vector = N;
  block.bias = s.zeros;
  block.floor = -std::numeric_limits<Real>::infinity();
  block.w = weight, block.w_stride = all;
  block.offset = offset;
  block.first = true;
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k += kBlock) {
      block.w = weight + k;
      block.offset = offset + k, block.k_count = std::min(kBlock, end - k);
      run_vectors<V>(vectors, c.channels, block);
      block.first = false;
    }
  };
  int64_t i, i_end, j, j_end;
  rows.reaching(y, 1, size.height, &i, &i_end);
  columns.reaching(x, vectors, size.width, &j, &j_end);
  if (j_end - j == columns.count) {
    run(i * columns.count * outputs, i_end * columns.count * outputs);
  } else {
    for (; i < i_end; ++i) {
      run((i * columns.count + j) * outputs, (i * columns.count + j_end) * outputs);
    }
  }
  if (block.first) run_vectors<V>(vectors, c.channels, block);  // none: zeros
}

template <class Real>
void image_gradient(const Conv2d& c, const BackwardScratch<Real>& s) {
  constexpr int64_t N = kWideLanes<Real>;
  const int64_t* offset = s.gradient_offset;
  const Real* weight = s.weight;
  for_each_plane(
      c, [&](int64_t plane_y, int64_t plane_x, const PlaneTaps& rows, const PlaneTaps& columns) {
        const Positions down(plane_y, c.image.height, c.padding.height, c.stride.height);
        const Positions across(plane_x, c.image.width, c.padding.width, c.stride.width);
        Real* const plane = s.image + (plane_y * c.stride.width + plane_x) * s.at.plane * N;
        for (int64_t y = down.begin; y < down.end; ++y) {
          for (int64_t x = across.begin; x < across.end; x += kVectors) {
            const int64_t vectors = std::min<int64_t>(kVectors, across.end - x);
            image_gradient_block(c, s, rows, columns, offset, weight, y, x, vectors,
                                 plane + s.at.base(y, x) * N);
          }
        }
        const int64_t taps = rows.count * columns.count * c.out_channels;
        offset += taps;
        weight += taps * c.channels;
      });
}

// Planes to the images of a tile.
template <class Real>
void lanes_to_images(const Conv2d& c, const Layout& at, const int64_t* column, const Real* planes,
                     int64_t count, Real* images) {
  using V = Narrow<Real>;
  constexpr int N = lanes_of<V>(), kLanes = kWideLanes<Real>;
  const int64_t numbers = c.channels * c.image.pixels();
  for (int64_t row = 0; row < c.channels * c.image.height; ++row) {
    const int64_t y = row % c.image.height + c.padding.height;
    const Real* const from = planes + (row / c.image.height * at.channel + at.row(c, y)) * kLanes;
    for (int64_t x = 0; x < c.image.width; x += N) {
      const int64_t n = std::min<int64_t>(N, c.image.width - x);
      for (int64_t b = 0; b < count; b += N) {
        V r[N];
        for (int64_t i = 0; i < N; ++i) {
          r[i] = load<V>(from + column[x + std::min(i, n - 1)] + b);
        }
        transpose(r);
        Real* const to = images + row * c.image.width + x;
        for (int64_t i = 0; i < std::min<int64_t>(N, count - b); ++i) {
          store_first<Real>(to + (b + i) * numbers, r[i], n);
        }
      }
    }
  }
}

// --- the rounds ------------------------------------------------------------------------------------

template <class T, class Real>
ensemble_conv2d_cpu::BackwardPlan plan_backward(const EnsembleConv2dParams& p,
                                                const EnsembleConv2dGradients& g) {
  const BackwardSchedule s(p, g, kWideLanes<Real>);
  ensemble_conv2d_cpu::BackwardPlan plan{};
  plan.items = s.items(p);
  plan.partial_bytes =
      s.by_span ? static_cast<size_t>(s.spans * p.ensemble_size * s.member_gradients) * sizeof(Real)
                : 0;
  plan.scratch_bytes = BackwardScratch<Real>(p, g, nullptr).bytes;
  return plan;
}

// One member over the tiles of one span. `weight`, `bias`: where their sums go.
template <class T, class Real>
void backward_span(const EnsembleConv2dParams& p, const EnsembleConv2dGradients& g,
                   const BackwardSchedule& s, const BackwardScratch<Real>& scratch, int64_t m,
                   int64_t span, Real* weight, Real* bias) {
  constexpr int64_t N = kWideLanes<Real>;
  const Conv2d& c = p.conv;
  const int64_t features = c.out_channels * scratch.at.output.pixels();
  const int64_t first_tile = span * s.tiles_per_span;
  const int64_t last_tile = std::min(first_tile + s.tiles_per_span, s.tiles);
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int64_t first = tile * N, count = std::min(N, p.batch - first);
    const uint8_t* const chosen = chosen_of_tile<Real>(p, m, tile);
    const auto* above = static_cast<const T*>(g.output) + (m * p.batch + first) * features;
    if (g.input) {
      gradient_to_lanes(c, scratch.at, above, count, chosen, 0, c.out_channels, scratch.gradient);
    }
    if (weight) {
      images_to_lanes(
          c, scratch.at, scratch.column,
          static_cast<const T*>(p.input) + m * p.input_member_stride + first * p.input_image_stride,
          p.input_image_stride, count, scratch.planes);
    }
    for (int64_t o = 0; (weight || bias) && o < c.out_channels; o += kChannels<Real>) {
      const int64_t channels = std::min<int64_t>(kChannels<Real>, c.out_channels - o);
      const Real* from = scratch.gradient + scratch.at.gradient_first * N;
      if (g.input) {
        from += o * scratch.at.gradient_plane * N;
      } else {
        gradient_to_lanes(c, scratch.at, above, count, chosen, o, channels, scratch.gradient);
      }
      if (weight) {
        weight_gradient(c, scratch, from, channels, weight + o * c.taps(), tile == first_tile);
      }
      if (bias) bias_gradient(c, scratch, from, channels, bias + o, tile == first_tile);
    }
    if (!g.input) continue;
    image_gradient(c, scratch);
    lanes_to_images(
        c, scratch.at, scratch.column, scratch.image, count,
        static_cast<Real*>(g.input) + (m * p.batch + first) * c.channels * c.image.pixels());
  }
}

// to <- (first ? 0 : to) + from
template <class Real>
void add_sums(const Real* from, int64_t n, Real* to, bool first) {
  for (int64_t i = 0; i < n; ++i) to[i] = first ? from[i] : to[i] + from[i];
}

// The sums of a member over a span into the results.
template <class Real>
void add_span(const EnsembleConv2dParams& p, const EnsembleConv2dGradients& g,
              const BackwardSchedule& s, int64_t m, const Real* sums, bool first) {
  const int64_t channels = p.conv.out_channels;
  if (g.weight) add_sums(sums, s.weights, static_cast<Real*>(g.weight) + m * s.weights, first);
  if (g.bias)
    add_sums(sums + s.weights, channels, static_cast<Real*>(g.bias) + m * channels, first);
}

template <class T, class Real>
void run_backward(const EnsembleConv2dParams& p, const EnsembleConv2dGradients& g, int64_t begin,
                  int64_t end, void* memory) {
  const BackwardSchedule s(p, g, kWideLanes<Real>);
  const BackwardScratch<Real> scratch(p, g, memory);
  const Conv2d& c = p.conv;
  const int64_t weights = c.out_channels * c.taps();
  int64_t gathered = -1;
  // Spans run fastest: a member's weights are gathered once.
  for (int64_t item = begin; item < end; ++item) {
    const int64_t m = s.by_span ? item / s.spans : item, of_item = s.by_span ? item % s.spans : 0;
    if (g.input && m != gathered) {
      gather_taps(c, static_cast<const Real*>(p.weight) + m * weights, scratch);
      gathered = m;
    }
    for (int64_t span = of_item; span < (s.by_span ? of_item + 1 : s.spans); ++span) {
      Real* const sums = s.by_span     ? static_cast<Real*>(g.partial) +
                                             (span * p.ensemble_size + m) * s.member_gradients
                         : s.spans > 1 ? scratch.member
                                       : nullptr;
      Real* weight = static_cast<Real*>(g.weight);
      Real* bias = static_cast<Real*>(g.bias);
      if (weight) weight = sums ? sums : weight + m * s.weights;
      if (bias) bias = sums ? sums + s.weights : bias + m * c.out_channels;
      backward_span<T>(p, g, s, scratch, m, span, weight, bias);
      if (sums && !s.by_span) add_span(p, g, s, m, sums, span == 0);
    }
  }
}

template <class T, class Real>
void finish_backward(const EnsembleConv2dParams& p, const EnsembleConv2dGradients& g, int64_t begin,
                     int64_t end) {
  const BackwardSchedule s(p, g, kWideLanes<Real>);
  for (int64_t m = begin; s.by_span && m < end; ++m) {
    for (int64_t span = 0; span < s.spans; ++span) {
      add_span(
          p, g, s, m,
          static_cast<const Real*>(g.partial) + (span * p.ensemble_size + m) * s.member_gradients,
          span == 0);
    }
  }
}

template <class T, class Real>
constexpr Functions kFunctions = {work_items<T, Real>,   scratch_bytes<T, Real>,
                                  run<T, Real>,          plan_backward<T, Real>,
                                  run_backward<T, Real>, finish_backward<T, Real>};

}  // namespace pyens::PYENS_ISA::ensemble_conv2d
