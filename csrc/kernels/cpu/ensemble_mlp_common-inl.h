// What both mappings of the ensemble MLP share: element types, tiles, scratch.

namespace pyens::PYENS_ISA::ensemble_mlp {

using ensemble_mlp_cpu::Forward;

// Smaller batches put neurons in the lanes: full lanes beat lanes half empty of examples. Prepacked
// weights make that pay for longer.
constexpr int64_t kSmallBatch = 5;
constexpr int64_t kSmallBatchPrepacked = 10;

template <class Real>
constexpr int64_t kPanelOf = kVectors * kWideLanes<Real>;

}  // namespace pyens::PYENS_ISA::ensemble_mlp

#include "kernels/cpu/weight_formats-inl.h"

namespace pyens::PYENS_ISA::ensemble_mlp {

template <class A>
using WideOf = Wide<typename A::Real>;
template <class A>
using NarrowOf = Narrow<typename A::Real>;

template <class A>
constexpr int64_t kPanel = kPanelOf<typename A::Real>;
constexpr int64_t kOften = 128;        // examples that read a block of weights
constexpr int64_t kMaxTile = 256;      // examples: weights pass once per tile
constexpr int64_t kNeuronBlock = 192;  // x kBlock inputs x 4 bytes: 98 KB of weights stay in L2
constexpr int kGroup = 4;              // stripes of neurons that a small batch takes together

inline int64_t max_width(const EnsembleMLP& p) {  // of what a layer writes
  int64_t width = 0;
  for (int64_t l = 0; l < p.num_layers; ++l) width = std::max(width, p.layers[l].out);
  return width;
}

// Examples per tile. Few members or examples: smaller tiles, so that there is work for every
// thread. Very wide layers: smaller ones, so that a tile stays within some megabytes. None of it
// changes a result.
template <class A>
int64_t tile_size(const EnsembleMLPParams& p) {
  int64_t tile = kMaxTile;
  while (tile > kPanel<A> && tile * max_width(p) > (int64_t{1} << 20)) tile /= 2;
  while (tile > 64 && p.ensemble_size * ((p.batch + tile - 1) / tile) < 16) tile /= 2;
  tile = std::max(tile, kPanel<A>);
  const int64_t tiles = std::max<int64_t>(1, (p.batch + tile - 1) / tile);  // of an empty batch too
  return round_up((p.batch + tiles - 1) / tiles, kPanel<A>);
}

inline bool small_batch(const Forward& p) {
  // Dropout, norms, residuals, sums to keep and sparse rows are written with examples in the lanes.
  return !p.dropout.any() && !p.kept && !p.rich() && !sparse_rows(p.layers[0].weight) &&
         p.batch < (p.prepacked ? kSmallBatchPrepacked : kSmallBatch);
}

// Members that a small batch takes through the layers together.
inline int64_t small_members(const EnsembleMLPParams& p) { return p.batch == 1 ? 8 : 1; }

}  // namespace pyens::PYENS_ISA::ensemble_mlp

#include "kernels/cpu/activation_strength-inl.h"

namespace pyens::PYENS_ISA::ensemble_mlp {

// --- scratch -------------------------------------------------------------------------------------

// The widths of the hidden layers before layer l, each rounded up to whole narrow vectors.
template <class Real>
int64_t padded_units_before(const EnsembleMLP& p, int64_t l) {
  int64_t units = 0;
  for (int64_t i = 0; i < l; ++i) units += round_up(p.layers[i].out, kNarrowLanes<Real>);
  return units;
}

template <class A>
struct Scratch {
  using Real = typename A::Real;
  Real* input;      // the tile's input, in units
  int64_t rows;     // of what follows: examples of a tile, or of all members of a small batch
  Real* hidden[2];  // what a layer reads and what it writes; see output_of
  Real* pairs;      // hidden activations in units, where a unit is not a Real
  Real* weights;    // a block of weights, converted or transposed
  Real* bias;       // of one layer, zeros where it has none
  Real* norm;       // weights and biases of one norm
  Real*
      plain;  // the tile's input once more, where the first layer adds it and a unit is not a Real
  StrengthScratch<A> strength;
  size_t bytes;

  Scratch(const Forward& p, void* base) {
    const int64_t width = round_up(max_width(p), kNarrowLanes<Real>);
    const int64_t members = small_batch(p) ? small_members(p) : 1;
    rows = small_batch(p) ? members * p.batch : tile_size<A>(p);
    const int64_t block = small_batch(p) ? 2 * kGroup * kNarrowLanes<Real> : kNeuronBlock;
    bytes = 0;
    auto take = [&](int64_t n) {
      Real* at = base ? reinterpret_cast<Real*>(static_cast<char*>(base) + bytes) : nullptr;
      bytes += static_cast<size_t>(round_up(n * static_cast<int64_t>(sizeof(Real)), 64));
      return at;
    };
    // load_units writes whole vectors, so rows of units end on one.
    input = take(rows * round_up(units<A>(p.layers[0].in), kNarrowLanes<Real>));
    hidden[0] =
        take(rows * (p.strength.units ? padded_units_before<Real>(p, p.num_layers - 1) : width));
    hidden[1] = take(rows * width);
    pairs = take(A::kPerUnit == 1 ? 0 : rows * round_up(units<A>(width), kNarrowLanes<Real>));
    weights = take(block * kBlockUnits<A>);
    bias = take(members * width);
    norm = take(p.rich() ? 2 * width : 0);
    plain = take(A::kPerUnit > 1 && p.layers[0].residual ? rows * width : 0);
    strength.allocate(p, take);
  }

  // Where layer l writes: two buffers in turn. Activation strength needs all hidden layers: they lie
  // one after the other in the first buffer.
  Real* output_of(const EnsembleMLPParams& p, int64_t l) const {
    if (!p.strength.units) return hidden[l % 2];
    if (l + 1 == p.num_layers) return hidden[1];
    return hidden[0] + rows * padded_units_before<Real>(p, l);
  }
};

// A member's bias, padded with zeros; all zeros if the layer has none.
template <class A>
void load_bias(const MLPLayer& layer, int64_t member, typename A::Real* bias) {
  const auto* source = static_cast<const typename A::Elem*>(layer.bias.data);
  int64_t o = 0;
  if (source) {
    source += member * layer.bias.member_stride;
    for (; o < layer.out; ++o) bias[o] = to_float(source[o]);
  }
  std::fill(bias + o, bias + round_up(layer.out, kNarrowLanes<typename A::Real>), 0);
}

// Whether nothing stands between the sums and the ReLU, which is then done where they are stored.
inline bool fuses_relu(const MLPLayer& layer) {
  return layer.activation.kind == ActivationKind::relu &&
         (!layer.has_norm() || layer.norm.after_activation);
}

// Every sum is stored as max(floor, sum): 0 makes that the ReLU, minus infinity leaves it as it is.
template <class Real>
Real relu_floor(const MLPLayer& layer, bool finished) {
  return finished && fuses_relu(layer) ? 0 : -std::numeric_limits<Real>::infinity();
}

}  // namespace pyens::PYENS_ISA::ensemble_mlp
