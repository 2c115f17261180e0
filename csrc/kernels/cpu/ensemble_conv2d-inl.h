// Convolution of the members of an ensemble, forward: bound by multiply-adds.
//
// A convolution is a linear layer whose inputs lie at an index list of places: the tap k of the output pixel at x is
// x + offset[k], the same list for all pixels, and an im2col matrix is never written. A vector is one pixel of as many
// images as it has lanes ("images in the lanes"), or for a few images neighbouring pixels of one ("pixels in the
// lanes"); kRows output channels x kVectors vectors stay in registers while the taps run by. Images are copied to
// scratch first: with their padding as zeros, so that no tap is a special case, and with a stride as planes of every
// s-th pixel, so that neighbouring outputs read neighbouring inputs.
//
// A ReLU and the maximum of a window follow in registers: of 2 x 2 pixels that is one block of vectors. Then what is
// written is a quarter, in the order of the tensor by a transposition at the end of each tile of images.
//
// Accumulation contract, as for the linear layers: per output one chain of multiply-adds over each block of kBlock
// taps in ascending order, the block sums added in order to the bias. So both mappings give the same bits.

#include "kernels/cpu/register_blocks-inl.h"
#include "kernels/cpu/sparse_rows-inl.h"

namespace pyens::PYENS_ISA::ensemble_conv2d {

// With fewer images than this, pixels are in the lanes.
template <class Real>
constexpr int64_t kFewImages = kWideLanes<Real> / 2;

// Where things lie in scratch, counted in numbers of one image.
struct Layout {
  ImageSize convolved, output;
  // A plane holds every stride-th pixel of a padded channel; one for each remainder.
  int64_t pitch, plane, channel;
  // How far a tap's plane position is from the output's own, at most.
  ImageSize shift;
  // Gradients by z: with zeros around them, rows as far apart as those of the images. Rows of the image that no
  // output reaches ask for one more below.
  int64_t gradient_plane, gradient_first;

  explicit Layout(const Conv2d& c) : convolved(c.convolved()), output(c.output()) {
    const auto planes = [](int64_t size, int64_t padding, int64_t stride) {
      return (size + 2 * padding + stride - 1) / stride;
    };
    pitch = planes(c.image.width, c.padding.width, c.stride.width);
    plane = planes(c.image.height, c.padding.height, c.stride.height) * pitch;
    channel = c.stride.pixels() * plane;
    shift = {(c.kernel.height - 1) * c.dilation.height / c.stride.height,
             (c.kernel.width - 1) * c.dilation.width / c.stride.width};
    gradient_first = shift.height * pitch + shift.width;
    gradient_plane = (convolved.height + 1) * pitch + 2 * gradient_first;
  }
  // Of a pixel of a padded channel: the position of its row, and how far along it.
  int64_t row(const Conv2d& c, int64_t y) const {
    return y % c.stride.height * c.stride.width * plane + y / c.stride.height * pitch;
  }
  int64_t column(const Conv2d& c, int64_t x) const {
    return x % c.stride.width * plane + x / c.stride.width;
  }
  int64_t image_numbers(const Conv2d& c) const { return c.channels * channel; }
  // The mark of an output pixel: what its taps' offsets are added to.
  int64_t base(int64_t y, int64_t x) const { return y * pitch + x; }
  // Pixels of a plane from the first to the last output.
  int64_t span() const { return (convolved.height - 1) * pitch + convolved.width; }
};

// Of each tap, in the order of the weights.
inline void fill_offsets(const Conv2d& c, const Layout& at, int64_t lanes, int64_t* offset) {
  int64_t* next = offset;
  for (int64_t i = 0; i < c.kernel.height; ++i) {
    for (int64_t j = 0; j < c.kernel.width; ++j) {
      *next++ = (at.row(c, i * c.dilation.height) + at.column(c, j * c.dilation.width)) * lanes;
    }
  }
  const int64_t kernel = c.kernel.pixels();
  for (int64_t k = kernel; k < c.taps(); ++k) offset[k] = offset[k - kernel] + at.channel * lanes;
}

// Of each pixel that is convolved and read: row by row, or window by window.
inline void fill_bases(const Conv2d& c, const Layout& at, int64_t lanes, int64_t* base) {
  for (int64_t y = 0; y < at.output.height; ++y) {
    for (int64_t x = 0; x < at.output.width; ++x) {
      for (int64_t i = 0; i < c.window.height; ++i) {
        for (int64_t j = 0; j < c.window.width; ++j) {
          *base++ = at.base(y * c.window.height + i, x * c.window.width + j) * lanes;
        }
      }
    }
  }
}

// Of each pixel of a row of an image.
inline void fill_columns(const Conv2d& c, const Layout& at, int64_t lanes, int64_t* column) {
  for (int64_t x = 0; x < c.image.width; ++x) {
    column[x] = at.column(c, x + c.padding.width) * lanes;
  }
}

// Images [C, H, W] into the lanes of their planes, zeros in lanes without one. What is padding is not written.
template <class Elem, class Real>
void images_to_lanes(const Conv2d& c, const Layout& at, const int64_t* column, const Elem* images,
                     int64_t stride, int64_t count, Real* planes) {
  using V = Narrow<Real>;
  constexpr int N = lanes_of<V>(), kLanes = kWideLanes<Real>;
  for (int64_t row = 0; row < c.channels * c.image.height; ++row) {
    const int64_t y = row % c.image.height + c.padding.height;
    Real* const to = planes + (row / c.image.height * at.channel + at.row(c, y)) * kLanes;
    const Elem* const from = images + row * c.image.width;
    for (int64_t x = 0; x < c.image.width; x += N) {
      const int64_t n = std::min<int64_t>(N, c.image.width - x);
      for (int64_t b = 0; b < kLanes; b += N) {
        V r[N];
        for (int i = 0; i < N; ++i) {
          r[i] = b + i < count ? load_first<Real>(from + (b + i) * stride + x, n) : V{};
        }
        transpose(r);
        for (int64_t i = 0; i < n; ++i) {
          store(to + column[x + i] + b, r[i]);
        }
      }
    }
  }
}

// One image into its planes.
template <class Elem, class Real>
void image_to_planes(const Conv2d& c, const Layout& at, const int64_t* column, const Elem* image,
                     Real* planes) {
  for (int64_t y = 0; y < c.image.height; ++y) {
    const int64_t row = at.row(c, y + c.padding.height);
    for (int64_t channel = 0; channel < c.channels; ++channel) {
      Real* const to = planes + channel * at.channel + row;
      const Elem* const from = image + (channel * c.image.height + y) * c.image.width;
      if (c.stride.width == 1) {
        for (int64_t x = 0; x < c.image.width; ++x) {
          to[c.padding.width + x] = static_cast<Real>(to_float(from[x]));
        }
      } else {
        for (int64_t x = 0; x < c.image.width; ++x) {
          to[column[x]] = static_cast<Real>(to_float(from[x]));
        }
      }
    }
  }
}

// [feature][lane] to rows of features.
template <class Elem, class Real>
void lanes_to_rows(const Real* lanes, int64_t features, int64_t count, Elem* rows, int64_t stride) {
  using V = Narrow<Real>;
  constexpr int N = lanes_of<V>(), kLanes = kWideLanes<Real>;
  for (int64_t f = 0; f < features; f += N) {
    for (int64_t b = 0; b < count; b += N) {
      V r[N];
      for (int i = 0; i < N; ++i) {
        r[i] = load<V>(lanes + std::min(f + i, features - 1) * kLanes + b);
      }
      transpose(r);
      const int64_t n = std::min<int64_t>(N, count - b);
      for (int64_t i = 0; i < n; ++i) {
        store_first<Real>(rows + (b + i) * stride + f, r[i], features - f);
      }
    }
  }
}

// sum[r][v] <- sum_k w[r][k] x[v][offset[k]]
template <int R, int NV, class V, class Real>
inline __attribute__((always_inline)) void tap_products(const Real* w, int64_t w_stride,
                                                        const Real* const* x, const int64_t* offset,
                                                        int64_t k_count, V (&sum)[R][NV]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[r][v] = V{};
  }
  const Real* at[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) at[v] = x[v];
  RowNumbers<Real, R> weights(w, w_stride);
  for (int64_t k = 0; k < k_count; ++k, weights.advance(1)) {
    const int64_t tap = offset[k];
    V input[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) input[v] = load<V>(at[v] + tap);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V weight = broadcast<V>(weights[r]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] = madd(weight, input[v], sum[r][v]);
    }
  }
}

// Where `value` takes the place of the maximum so far: where it is larger, or NaN, as in torch. chosen_of(takes, a, b):
// a where it does, else b.
#if PYENS_HAS(AVX512)
inline __attribute__((always_inline)) __mmask16 beats(Vec<float, 16> value, Vec<float, 16> best) {
  return _mm512_cmp_ps_mask((__m512)value, (__m512)best, _CMP_GT_OQ) |
         _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_UNORD_Q);
}
inline __attribute__((always_inline)) __mmask8 beats(Vec<double, 8> value, Vec<double, 8> best) {
  return _mm512_cmp_pd_mask((__m512d)value, (__m512d)best, _CMP_GT_OQ) |
         _mm512_cmp_pd_mask((__m512d)value, (__m512d)value, _CMP_UNORD_Q);
}
template <class V>
inline __attribute__((always_inline)) V chosen_of(__mmask16 takes, V a, V b) {
  return (V)_mm512_mask_blend_epi32(takes, (__m512i)b, (__m512i)a);
}
template <class V>
inline __attribute__((always_inline)) V chosen_of(__mmask8 takes, V a, V b) {
  return (V)_mm512_mask_blend_epi64(takes, (__m512i)b, (__m512i)a);
}
#else
template <class V>
inline __attribute__((always_inline)) auto beats(V value, V best) {
  return (value > best) | (value != value);
}
template <class M, class V>
inline __attribute__((always_inline)) V chosen_of(M takes, V a, V b) {
  return takes ? a : b;
}
#endif
template <class V>
inline __attribute__((always_inline)) V larger(V best, V value) {
  return chosen_of(beats(value, best), value, best);
}

// 0 where the output passes a ReLU, else kNothing.
constexpr int kNothing = 255;
static_assert(kLargestWindow <= kNothing);

template <class Real>
using Bytes = Vec<uint8_t, kWideLanes<Real>>;

// One block of taps for kVectors pixels: z[r][v] <- max(floor, (first ? bias[r] : z[r][v]) + sum), and what a
// backward pass has to know of it.
template <class Real>
struct PixelBlock {
  const Real* w;
  int64_t w_stride;
  const int64_t* offset;
  int64_t k_count;
  const Real* x[kVectors];
  Real* z;
  int64_t z_row, z_vector;
  const Real* bias;
  bool first;
  Real floor;
  uint8_t* chosen;  // as z lies, or nullptr

  template <int R, int NV, class V>
  void run(int64_t row) const {
    V sum[R][NV];
    tap_products<R, NV>(w + row * w_stride, w_stride, x, offset, k_count, sum);
    finish<R, NV>(NextRows{row}, sum);
  }

  template <int R, int NV, class Rows, class V>
  inline __attribute__((always_inline)) void finish(const Rows& row, V (&sum)[R][NV]) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const V before =
            first ? broadcast<V>(bias[row(r)]) : load<V>(z + row(r) * z_row + v * z_vector);
        sum[r][v] = before + sum[r][v];
      }
    }
    if (chosen) store_chosen<R, NV>(row, sum);
    const V low = broadcast<V>(floor);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        store(z + row(r) * z_row + v * z_vector, at_least(low, sum[r][v]));
      }
    }
  }

  template <int R, int NV, class Rows, class V>
  void store_chosen(const Rows& row, const V (&value)[R][NV]) const {
    using Ints = WideInts<Real>;
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < NV; ++v) {
        const Ints which = value[r][v] <= V{} ? Ints{} + kNothing : Ints{};
        store(chosen + row(r) * z_row + v * z_vector, __builtin_convertvector(which, Bytes<Real>));
      }
    }
  }
};

// The last block of taps for some pixels of one window, the others before or after them: their maximum. As in torch, a
// later pixel wins if it is larger, or NaN.
template <class Real>
struct WindowBlock {
  const Real* w;
  int64_t w_stride;
  const int64_t* offset;
  int64_t k_count;
  const Real* x[kVectors];
  const Real* z;  // [row][kVectors] sums of the blocks before
  const Real* bias;
  bool first;
  bool relu;
  int64_t pixel;  // of the window: the first of these
  bool last;      // they are its last ones
  Real* output;
  int64_t output_row;
  uint8_t* chosen;  // as the output lies, or nullptr

  template <int R, int NV, class V>
  void run(int64_t row) const {
    V sum[R][NV];
    tap_products<R, NV>(w + row * w_stride, w_stride, x, offset, k_count, sum);
    finish<R, NV>(NextRows{row}, sum);
  }

  template <int R, int NV, class Rows, class V>
  inline __attribute__((always_inline)) void finish(const Rows& row, V (&sum)[R][NV]) const {
    constexpr int N = lanes_of<V>();
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const V before =
            first ? broadcast<V>(bias[row(r)]) : load<V>(z + (row(r) * kVectors + v) * N);
        sum[r][v] = before + sum[r][v];
      }
    }
    if (chosen) return choose<R, NV>(row, sum);
    const V low = broadcast<V>(last && relu ? 0 : -std::numeric_limits<Real>::infinity());
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Real* const to = output + row(r) * output_row;
      V best = sum[r][0];
      if (pixel > 0) best = larger(load<V>(to), best);
#pragma GCC unroll 4
      for (int v = 1; v < NV; ++v) best = larger(best, sum[r][v]);
      store(to, at_least(low, best));
    }
  }

  template <int R, int NV, class Rows, class V>
  void choose(const Rows& row, const V (&sum)[R][NV]) const {
    using Ints = WideInts<Real>;
    for (int r = 0; r < R; ++r) {
      const int64_t at = row(r) * output_row;
      V best = sum[r][0];
      Ints which = Ints{} + static_cast<int>(pixel);
      if (pixel > 0) {
        const V before = load<V>(output + at);
        const Ints which_before = __builtin_convertvector(load<Bytes<Real>>(chosen + at), Ints);
        const auto takes = beats(best, before);
        best = chosen_of(takes, best, before);
        which = chosen_of(takes, which, which_before);
      }
#pragma GCC unroll 4
      for (int v = 1; v < NV; ++v) {
        const auto takes = beats(sum[r][v], best);
        best = chosen_of(takes, sum[r][v], best);
        which = chosen_of(takes, Ints{} + static_cast<int>(pixel + v), which);
      }
      if (last && relu) {
        which = best <= V{} ? Ints{} + kNothing : which;
        best = at_least(V{}, best);
      }
      store(output + at, best);
      store(chosen + at, __builtin_convertvector(which, Bytes<Real>));
    }
  }
};

template <class V, class Block>
void run_vectors(int64_t vectors, int64_t rows, const Block& block) {
  if constexpr (kVectors == 4) {
    if (vectors == 4) return run_rows<4, V>(rows, block);
    if (vectors == 3) return run_rows<3, V>(rows, block);
  }
  if (vectors == 2) return run_rows<2, V>(rows, block);
  run_rows<1, V>(rows, block);
}

// Where a tap of a block lies.
struct TapOffset {
  const int64_t* offset;
  inline __attribute__((always_inline)) int64_t operator()(uint8_t tap) const {
    return offset[tap];
  }
};

// A member's block of taps, from tap k on, whose weights are all there or sparse.
template <class Real>
struct Taps {
  const EnsembleConv2dParams& p;
  int64_t member;

  int64_t count() const { return p.conv.taps(); }
  int64_t step() const { return kBlock; }
  template <class Block>
  void run(int64_t vectors, int64_t k, const int64_t* offset, Block& block) const {
    using V = Wide<Real>;
    const int64_t taps = p.conv.taps(), rows = p.conv.out_channels;
    if (p.sparse) {
      const SparseBlock<Real> kept(*p.sparse, member, k / kBlock, sparse_blocks(taps), rows);
      return run_sparse_vectors<V>(vectors, kept, block.x, TapOffset{offset + k}, block);
    }
    block.w = static_cast<const Real*>(p.weight) + member * rows * taps + k;
    block.w_stride = taps;
    block.offset = offset + k, block.k_count = std::min(kBlock, taps - k);
    run_vectors<V>(vectors, rows, block);
  }
};

// Numbers in scratch, one array after the other; with nullptr they are counted.
class Memory {
 public:
  explicit Memory(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t n) {
    T* const at = base_ ? reinterpret_cast<T*>(base_ + bytes_) : nullptr;
    bytes_ += static_cast<size_t>(round_up(n * static_cast<int64_t>(sizeof(T)), 64));
    return at;
  }
  // The same, filled with zeros.
  template <class T>
  T* zeros(int64_t n) {
    T* const at = take<T>(n);
    if (at) std::fill(at, at + n, T{});
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

template <class Real>
struct Scratch {
  Layout at;
  bool by_pixel;    // pixels in the lanes
  int64_t* offset;  // [taps]
  int64_t* base;    // of each convolved pixel, of images in the lanes
  int64_t* column;  // of each pixel of a row of an image
  Real* planes;     // of the images
  Real* output;  // [features][lanes]; of pixels in the lanes z, [out_channels][span, whole vectors]
  Real* sums;    // [out_channels][kVectors] of windows over several blocks of taps
  Real* bias;    // zeros where there is none
  size_t bytes;

  // `reads`: the convolution with the taps that are read one by one.
  Scratch(const EnsembleConv2dParams& p, const Conv2d& reads, void* memory) : at(p.conv) {
    constexpr int64_t N = kWideLanes<Real>;
    const Conv2d& c = p.conv;
    by_pixel = p.batch < kFewImages<Real> && !p.chosen;
    const int64_t lanes = by_pixel ? 1 : N;
    Memory m(memory);
    offset = m.take<int64_t>(reads.taps());
    base = m.take<int64_t>(at.output.pixels() * c.window.pixels());
    column = m.take<int64_t>(c.image.width);
    // A vector of pixels may begin at the last one.
    planes = m.zeros<Real>(at.image_numbers(reads) * lanes + N);
    const int64_t of_channel = by_pixel ? round_up(at.span(), N) : at.output.pixels() * N;
    // Rows of windows are read in whole vectors, two at a time.
    output = m.take<Real>(c.out_channels * of_channel + 2 * N);
    sums = m.take<Real>(c.out_channels * kVectors * N);
    bias = m.zeros<Real>(c.out_channels);
    bytes = m.bytes();
    if (!memory) return;
    fill_offsets(reads, at, lanes, offset);
    if (!by_pixel) fill_bases(c, at, lanes, base);
    fill_columns(c, at, lanes, column);
  }
};

// Images that one item takes.
template <class Real>
int64_t images_of_item(const EnsembleConv2dParams& p) {
  return p.batch < kFewImages<Real> && !p.chosen ? 1 : kWideLanes<Real>;
}
template <class Real>
int64_t tiles(const EnsembleConv2dParams& p) {
  return (p.batch + images_of_item<Real>(p) - 1) / images_of_item<Real>(p);
}

// For each vector of pixels of images in the lanes: all taps of all output channels.
template <class Real, class OfMember>
void convolve_lanes(const EnsembleConv2dParams& p, const OfMember& of_member,
                    const Scratch<Real>& s, uint8_t* chosen) {
  constexpr int64_t N = kWideLanes<Real>;
  const Conv2d& c = p.conv;
  const int64_t taps = of_member.count(), step = of_member.step();
  const int64_t window = c.window.pixels(), outputs = s.at.output.pixels();
  const Real lowest = -std::numeric_limits<Real>::infinity();
  for (int64_t pixel = 0; pixel < outputs * window;) {
    // Neighbours, but no further than their window.
    const int64_t of_window = window == 1 ? 0 : pixel % window;
    const int64_t left = window == 1 ? outputs - pixel : window - of_window;
    const int64_t vectors = std::min<int64_t>(kVectors, left);
    const Real* x[kVectors];
    for (int64_t v = 0; v < vectors; ++v) x[v] = s.planes + s.base[pixel + v];
    for (int64_t k = 0; k < taps; k += step) {
      const bool last = k + step >= taps;
      const int64_t at = pixel / window * N;
      if (last && window > 1) {
        WindowBlock<Real> block{};
        std::copy(x, x + vectors, block.x);
        block.z = s.sums;
        block.bias = s.bias;
        block.first = k == 0;
        block.relu = c.relu;
        block.pixel = of_window;
        block.last = vectors == left;
        block.output = s.output + at, block.output_row = outputs * N;
        block.chosen = chosen ? chosen + at : nullptr;
        of_member.run(vectors, k, s.offset, block);
        continue;
      }
      PixelBlock<Real> block{};
      std::copy(x, x + vectors, block.x);
      block.z = window > 1 ? s.sums : s.output + at;
      block.z_row = (window > 1 ? kVectors : outputs) * N, block.z_vector = N;
      block.bias = s.bias;
      block.first = k == 0;
      block.floor = last && c.relu ? 0 : lowest;
      block.chosen = last && chosen ? chosen + at : nullptr;
      of_member.run(vectors, k, s.offset, block);
    }
    pixel += vectors;
  }
}

// Numbers 0, 2, 4 .. of two vectors, or 1, 3, 5 ..
template <int F, class V>
inline __attribute__((always_inline)) V every_second(V a, V b) {
  constexpr int N = lanes_of<V>();
  if constexpr (N == 16) {
    return PYENS_SHUFFLE(a, b, F, F + 2, F + 4, F + 6, F + 8, F + 10, F + 12, F + 14, F + 16,
                         F + 18, F + 20, F + 22, F + 24, F + 26, F + 28, F + 30);
  } else if constexpr (N == 8) {
    return PYENS_SHUFFLE(a, b, F, F + 2, F + 4, F + 6, F + 8, F + 10, F + 12, F + 14);
  } else if constexpr (N == 4) {
    return PYENS_SHUFFLE(a, b, F, F + 2, F + 4, F + 6);
  } else {
    return PYENS_SHUFFLE(a, b, F, F + 2);
  }
}

// The first pixels, or the second ones, of windows of one or two pixels side by side.
template <class Real>
inline __attribute__((always_inline)) Wide<Real> first_of_windows(const Real* row, int64_t width) {
  using V = Wide<Real>;
  return width == 1 ? load<V>(row) : every_second<0>(load<V>(row), load<V>(row + lanes_of<V>()));
}
template <class Real>
inline __attribute__((always_inline)) Wide<Real> second_of_windows(const Real* row) {
  using V = Wide<Real>;
  return every_second<1>(load<V>(row), load<V>(row + lanes_of<V>()));
}

template <class Real, class Elem>
inline __attribute__((always_inline)) void store_some(Elem* to, Wide<Real> v, int64_t n) {
  if constexpr (std::is_same_v<Real, Elem>) {
    store_lanes(to, v, 0, n);
  } else {
    store_wide_first<Real>(to, v, n);
  }
}

// The maxima of a row of windows of any width.
template <class Elem, class Real>
void maximum_of_row(const Real* row, int64_t pitch, ImageSize window, int64_t width, Elem* output) {
  for (int64_t x = 0; x < width; ++x, row += window.width) {
    Real best = row[0];
    for (int64_t i = 0; i < window.height; ++i) {
      for (int64_t j = 0; j < window.width; ++j) {
        const Real value = row[i * pitch + j];
        const bool takes = (value > best) || (value != value);
        best = takes ? value : best;
      }
    }
    store_some<Real>(output + x, broadcast<Wide<Real>>(best), 1);
  }
}

// Pixels of one image in the lanes: z over a whole span of a plane, between whose rows lies what is not read.
template <class Elem, class Real, class OfMember>
void convolve_pixels(const EnsembleConv2dParams& p, const OfMember& of_member,
                     const Scratch<Real>& s, Elem* output) {
  using V = Wide<Real>;
  constexpr int64_t N = lanes_of<V>();
  const Conv2d& c = p.conv;
  const int64_t taps = of_member.count(), step = of_member.step();
  const int64_t all = (s.at.span() + N - 1) / N;
  const Real lowest = -std::numeric_limits<Real>::infinity();
  for (int64_t first = 0; first < all; first += kVectors) {
    const int64_t vectors = std::min<int64_t>(kVectors, all - first);
    for (int64_t k = 0; k < taps; k += step) {
      PixelBlock<Real> block{};
      for (int64_t v = 0; v < vectors; ++v) block.x[v] = s.planes + (first + v) * N;
      block.z = s.output + first * N;
      block.z_row = all * N, block.z_vector = N;
      block.bias = s.bias;
      block.first = k == 0;
      block.floor = k + step >= taps && c.relu ? 0 : lowest;
      of_member.run(vectors, k, s.offset, block);
    }
  }
  const ImageSize size = s.at.output, window = c.window;
  for (int64_t o = 0; o < c.out_channels; ++o) {
    for (int64_t y = 0; y < size.height; ++y, output += size.width) {
      const Real* const row = s.output + o * all * N + s.at.base(y * window.height, 0);
      if (window.width > 2) {
        maximum_of_row(row, s.at.pitch, window, size.width, output);
        continue;
      }
      for (int64_t x = 0; x < size.width; x += N) {
        const Real* const from = row + x * window.width;
        V best = first_of_windows(from, window.width);
        if (window.width == 2) best = larger(best, second_of_windows(from));
        for (int64_t i = 1; i < window.height; ++i) {
          const Real* const below = from + i * s.at.pitch;
          best = larger(best, first_of_windows(below, window.width));
          if (window.width == 2) best = larger(best, second_of_windows(below));
        }
        store_some<Real>(output + x, best, std::min(N, size.width - x));
      }
    }
  }
}

// Of one tile of a member, or nullptr.
template <class Real>
uint8_t* chosen_of_tile(const EnsembleConv2dParams& p, int64_t member, int64_t tile) {
  static_assert(kMostLanes % kWideLanes<Real> == 0, "whole tiles");
  const int64_t features = p.conv.out_channels * p.conv.output().pixels();
  const int64_t images = member * chosen_images(p.batch) + tile * kWideLanes<Real>;
  return p.chosen ? p.chosen + images * features : nullptr;
}

template <class T, class Real>
int64_t work_items(const EnsembleConv2dParams& p) {
  return p.ensemble_size * tiles<Real>(p);
}

template <class T, class Real>
size_t scratch_bytes(const EnsembleConv2dParams& p) {
  return Scratch<Real>(p, p.conv, nullptr).bytes;
}

template <class T, class Real>
void run(const EnsembleConv2dParams& p, int64_t begin, int64_t end, void* memory) {
  const Scratch<Real> s(p, p.conv, memory);
  const Conv2d& c = p.conv;
  const int64_t images = images_of_item<Real>(p), features = c.out_channels * s.at.output.pixels();
  // Members run fastest: shared images are copied once.
  int64_t copied = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item / p.ensemble_size, m = item % p.ensemble_size, first = tile * images;
    if (p.input_member_stride != 0 || tile != copied) {
      const auto* from =
          static_cast<const T*>(p.input) + m * p.input_member_stride + first * p.input_image_stride;
      if (s.by_pixel) {
        image_to_planes(c, s.at, s.column, from, s.planes);
      } else {
        images_to_lanes(c, s.at, s.column, from, p.input_image_stride,
                        std::min(images, p.batch - first), s.planes);
      }
      copied = tile;
    }
    if (p.bias) {
      const auto* bias = static_cast<const Real*>(p.bias) + m * c.out_channels;
      std::copy(bias, bias + c.out_channels, s.bias);
    }
    T* const output = static_cast<T*>(p.output) + (m * p.batch + first) * features;
    if (s.by_pixel) {
      convolve_pixels(p, Taps<Real>{p, m}, s, output);
      continue;
    }
    convolve_lanes(p, Taps<Real>{p, m}, s, chosen_of_tile<Real>(p, m, tile));
    lanes_to_rows(s.output, features, std::min(images, p.batch - first), output, features);
  }
}

}  // namespace pyens::PYENS_ISA::ensemble_conv2d
