// The ensemble MLP on weights in bytes, examples in the lanes.
//
// Bound by the products: with VNNI one instruction multiplies 4 inputs where a multiply-add of floats takes one,
// without it two instructions 2. As in ensemble_mlp_panels-inl.h a tile of examples goes through all layers of one member
// in panels, here [unit][kPanel], and kRows neurons x kVectors vectors of int32 stay in registers: kVectors loads and
// kRows broadcasts feed kRows * kVectors products. A block of neurons has its sums over all inputs, becomes floats, goes
// through its activation and back into bytes while it lies in the L2 cache.

#include "kernels/cpu/register_blocks-inl.h"
#include "kernels/cpu/int8-inl.h"
#include "kernels/cpu/elementary-inl.h"
#include "kernels/cpu/activations-inl.h"

namespace pyens::PYENS_ISA::ensemble_mlp_int8 {

using V = Wide<float>;
constexpr int64_t kLanes = kWideLanes<float>;
constexpr int64_t kPanel = kVectors * kLanes;
constexpr int64_t kMaxTile = 256;      // examples: weights pass once per tile
constexpr int64_t kNeuronBlock = 192;  // a multiple of the inputs of a unit
constexpr int64_t kUnitBlock = 128;    // x kPanel x 4 bytes of inputs stay in L1
static_assert(kNeuronBlock % Int8Format::kPerUnit == 0);

inline int64_t tile_size(const EnsembleMLPInt8Params& p) {
  int64_t tile = kMaxTile;
  while (tile > 64 && p.ensemble_size * ((p.batch + tile - 1) / tile) < 16) tile /= 2;
  tile = std::max(tile, kPanel);
  const int64_t batch = std::max<int64_t>(1, p.batch), tiles = (batch + tile - 1) / tile;
  return round_up((batch + tiles - 1) / tiles, kPanel);
}

struct Scratch {
  int32_t *input,
      *hidden[2];       // units of a tile: of the input; what a layer reads, and what it writes
  int32_t* weights;     // units of a block of weights
  float* z;             // panels of a block of neurons: first their sums
  float *scale, *bias;  // of one layer
  // [tile], not 0 where an example has met one: in the input, or on its way through a member.
  int32_t *nan_input, *nan;
  size_t bytes = 0;

  Scratch(const EnsembleMLPInt8Params& p, void* base) {
    const auto take = [&](int64_t n) {
      auto* at = base ? static_cast<char*>(base) + bytes : nullptr;
      bytes += static_cast<size_t>(round_up(4 * n, 64));
      return at;
    };
    const int64_t tile = tile_size(p);
    int64_t width = 1, units = 1;
    for (int64_t l = 0; l < p.num_layers; ++l) {
      width = std::max(width, p.layers[l].out);
      if (l + 1 < p.num_layers) units = std::max(units, int8_units(p.layers[l].out));
    }
    constexpr int64_t N = kNarrowLanes<float>;
    input = reinterpret_cast<int32_t*>(take(tile * round_up(int8_units(p.layers[0].in), N)));
    for (auto& h : hidden) h = reinterpret_cast<int32_t*>(take(tile * units));
    weights = reinterpret_cast<int32_t*>(take(kNeuronBlock * kUnitBlock));
    z = reinterpret_cast<float*>(take(tile * std::min(width, kNeuronBlock)));
    scale = reinterpret_cast<float*>(take(width));
    bias = reinterpret_cast<float*>(take(width));
    nan_input = reinterpret_cast<int32_t*>(take(tile));
    nan = reinterpret_cast<int32_t*>(take(tile));
  }
};

// The tile's rows into panels [unit][kPanel]; 0 in lanes without an example and behind the last input.
inline void to_units(const float* rows, int64_t row_stride, int64_t examples, int64_t in,
                     const Quantizer& quantizer, int32_t* panels, int32_t* nan) {
  using Floats = Narrow<float>;
  constexpr int N = kNarrowLanes<float>, K = Int8Format::kPerUnit;
  const int64_t unit_count = int8_units(in);
  for (int64_t b = 0; b < round_up(examples, kLanes); b += N) {
    int32_t* const panel = panels + b / kPanel * kPanel * unit_count + b % kPanel;
    Ints<N> met{};
    for (int64_t k = 0; k < in; k += N) {
      Floats r[N];
      for (int i = 0; i < N; ++i) {
        r[i] = b + i < examples ? load_first<float>(rows + (b + i) * row_stride + k, in - k)
                                : Floats{};
      }
      transpose(r);
      Ints<N> bytes[N];
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        met |= r[i] != r[i];
        bytes[i] = k + i < in ? quantizer(r[i]) : Ints<N>{};
      }
      for (int i = 0; i < N && k + i < in; i += K) {
        store(panel + (k + i) / K * kPanel, unit_of(bytes + i));
      }
    }
    store(nan + b, met);
  }
}

// z[r] <- sum so far, or max(floor, float(sum + offset[r]) * scale[r] + bias[r])
struct Block {
  const int32_t* w;
  int64_t w_stride;
  const int32_t* x;
  int64_t k_count;
  float* z;
  const int32_t* offset;
  const float *scale, *bias;
  bool first, last;
  float floor;

  template <int R, int NV, class I>
  void run(int64_t row) const {
    constexpr int N = lanes_of<I>();
    using F = Vec<float, N>;
    I sum[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const I start = first ? broadcast<I>(offset[row + r]) : I{};
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        sum[r][v] = first ? start : load<I>(z + (row + r) * kPanel + v * N);
      }
    }
    RowNumbers<int32_t, R> weights(w + row * w_stride, w_stride);
    const int32_t* at = x;
    for (int64_t k = 0; k < k_count; ++k, at += kPanel) {
      I input[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) input[v] = load<I>(at + v * N);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const I weight = broadcast<I>(weights[r]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          sum[r][v] = Int8Format::product(weight, input[v], sum[r][v]);
        }
      }
      weights.advance(1);
    }
    const F low = broadcast<F>(floor);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float* const to = z + (row + r) * kPanel;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        if (!last) {
          store(to + v * N, sum[r][v]);
          continue;
        }
        const F scaled = __builtin_convertvector(sum[r][v], F) * scale[row + r];
        store(to + v * N, at_least(low, scaled + bias[row + r]));
      }
    }
  }
};

inline void run_panel(int64_t rows, int64_t examples, const Block& block) {
  using Wides = Ints<kWideLanes<float>>;
  if constexpr (kVectors == 4) {
    if (examples > 3 * kLanes) return run_rows<4, Wides>(rows, block);
    if (examples > 2 * kLanes) return run_rows<3, Wides>(rows, block);
  }
  if (examples > kLanes) return run_rows<2, Wides>(rows, block);
  if (examples > kNarrowLanes<float>) return run_rows<1, Wides>(rows, block);
  run_rows<1, Ints<kNarrowLanes<float>>>(rows, block);
}

// Panels of some neurons, [row][kPanel], as columns of rows of the output; all NaN where the example has met one.
inline void to_rows(const float* panels, int64_t examples, int64_t rows, const int32_t* nan,
                    float* output, int64_t out) {
  using Floats = Narrow<float>;
  constexpr int N = kNarrowLanes<float>;
  for (int64_t b = 0; b < examples; b += N) {
    const float* const panel = panels + b / kPanel * kPanel * rows + b % kPanel;
    const auto met = load<Ints<N>>(nan + b) != 0;
    const Floats none = broadcast<Floats>(std::numeric_limits<float>::quiet_NaN());
    for (int64_t o = 0; o < rows; o += N) {
      Floats r[N];
      for (int i = 0; i < N; ++i) {
        r[i] = o + i < rows ? load<Floats>(panel + (o + i) * kPanel) : Floats{};
        r[i] = met ? none : r[i];
      }
      transpose(r);
      const int64_t n = std::min<int64_t>(N, examples - b);
      for (int64_t i = 0; i < n; ++i) {
        store_first<float>(output + (b + i) * out + o, r[i], rows - o);
      }
    }
  }
}

// Panels of some neurons, from neuron `row` on, into units of the next layer's input.
inline void to_next(const float* panels, int64_t examples, int64_t rows, int64_t row,
                    const Quantizer& quantizer, int64_t unit_count, int32_t* units, int32_t* nan) {
  constexpr int K = Int8Format::kPerUnit;
  for (int64_t b = 0; b < examples; b += kLanes) {
    const float* const panel = panels + b / kPanel * kPanel * rows + b % kPanel;
    int32_t* const to = units + (b / kPanel * unit_count + row / K) * kPanel + b % kPanel;
    auto met = load<Ints<kLanes>>(nan + b);
    for (int64_t r = 0; r < rows; r += K) {
      Ints<kLanes> bytes[K] = {};
#pragma GCC unroll 4
      for (int i = 0; i < K; ++i) {
        if (r + i >= rows) break;
        const V value = load<V>(panel + (r + i) * kPanel);
        met |= value != value;
        bytes[i] = quantizer(value);
      }
      store(to + r / K * kPanel, unit_of(bytes));
    }
    store(nan + b, met);
  }
}

// The activation of z, where the block has not done it.
inline void activate_panels(const Activation& activation, int64_t examples, int64_t rows,
                            float* z) {
  if (activation.kind == ActivationKind::relu || activation.kind == ActivationKind::identity)
    return;
  for (int64_t b = 0; b < examples; b += kPanel, z += rows * kPanel) {
    const int64_t used = round_up(std::min(kPanel, examples - b), kLanes);
    if (used == kPanel) {
      activate<V, float>(activation, z, z, rows * kPanel);
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      activate<V, float>(activation, z + r * kPanel, z + r * kPanel, used);
    }
  }
}

// One layer of a tile, from units x; `next` is what its outputs become, or nullptr for those of the last layer.
inline void layer_of_tile(const Int8Layer& layer, int64_t member, int64_t examples,
                          const int32_t* x, const Int8Weight* next, int32_t* units, float* output,
                          const Scratch& s) {
  const int64_t unit_count = int8_units(layer.in), in = layer.in, out = layer.out;
  const float input_scale = layer.weight.input_scale[member];
  for (int64_t o = 0; o < out; ++o) {
    s.scale[o] = layer.weight.scale[member * out + o] * input_scale;
    s.bias[o] = layer.bias ? layer.bias[member * out + o] : 0;
  }
  const int8_t* const values = layer.weight.values + member * out * in;
  // Rows of whole units are read where they lie.
  const bool direct = sizeof(Int8Format::Element) == 1 && in % 4 == 0 &&
                      reinterpret_cast<uintptr_t>(layer.weight.values) % 4 == 0;
  for (int64_t row = 0; row < out; row += kNeuronBlock) {
    const int64_t rows = std::min(kNeuronBlock, out - row);
    for (int64_t k = 0; k < unit_count; k += kUnitBlock) {
      const int64_t k_count = std::min(kUnitBlock, unit_count - k);
      const int8_t* const from = values + row * in + k * Int8Format::kPerUnit;
      Block block;
      if (direct) {
        block.w = reinterpret_cast<const int32_t*>(from), block.w_stride = in / 4;
      } else {
        const int64_t inputs =
            std::min(k_count * Int8Format::kPerUnit, in - k * Int8Format::kPerUnit);
        weight_units(from, in, rows, inputs, s.weights, kUnitBlock);
        block.w = s.weights, block.w_stride = kUnitBlock;
      }
      block.k_count = k_count;
      block.offset = layer.weight.offset + member * out + row;
      block.scale = s.scale + row, block.bias = s.bias + row;
      block.first = k == 0, block.last = k + k_count == unit_count;
      block.floor = layer.activation.kind == ActivationKind::relu
                        ? 0
                        : -std::numeric_limits<float>::infinity();
      for (int64_t b = 0; b < examples; b += kPanel) {
        block.x = x + (b * unit_count + k * kPanel);
        block.z = s.z + b * rows;
        run_panel(rows, examples - b, block);
      }
    }
    activate_panels(layer.activation, examples, rows, s.z);
    if (next) {
      to_next(s.z, examples, rows, row, Quantizer(*next, member), int8_units(out), units, s.nan);
    } else {
      to_rows(s.z, examples, rows, s.nan, output + row, out);
    }
  }
}

inline int64_t work_items(const EnsembleMLPInt8Params& p) {
  return p.ensemble_size * ((p.batch + tile_size(p) - 1) / tile_size(p));
}

inline size_t scratch_bytes(const EnsembleMLPInt8Params& p) { return Scratch(p, nullptr).bytes; }

inline void run(const EnsembleMLPInt8Params& p, int64_t begin, int64_t end, void* base) {
  const Scratch s(p, base);
  const int64_t tile = tile_size(p), in = p.layers[0].in, out = p.layers[p.num_layers - 1].out;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t t = item / p.ensemble_size, m = item % p.ensemble_size;
    const int64_t first = t * tile, examples = std::min(tile, p.batch - first);
    const float* const rows = p.input + m * p.input_member_stride + first * p.input_row_stride;
    // Members run fastest: those that take a shared input alike share its bytes too.
    const Quantizer quantizer(p.layers[0].weight, m);
    const bool same = item > begin && m > 0 && p.input_member_stride == 0 &&
                      quantizer == Quantizer(p.layers[0].weight, m - 1);
    if (!same) to_units(rows, p.input_row_stride, examples, in, quantizer, s.input, s.nan_input);
    std::copy(s.nan_input, s.nan_input + round_up(examples, kLanes), s.nan);
    const int32_t* x = s.input;
    for (int64_t l = 0; l < p.num_layers; ++l) {
      const Int8Weight* next = l + 1 < p.num_layers ? &p.layers[l + 1].weight : nullptr;
      layer_of_tile(p.layers[l], m, examples, x, next, s.hidden[l % 2],
                    p.output + (m * p.batch + first) * out, s);
      x = s.hidden[l % 2];
    }
  }
}

constexpr Functions kFunctions = {work_items, scratch_bytes, run};

}  // namespace pyens::PYENS_ISA::ensemble_mlp_int8
