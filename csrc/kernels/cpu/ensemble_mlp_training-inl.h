// One training pass of the ensemble MLP: forward, loss, backward, tile by tile.
//
// A tile of examples goes through all layers of one member and back before the next one starts, so
// activations are never stored: they lie in cache, in the panels of ensemble_mlp_panels-inl.h. (A forward
// pass may have kept its sums: then the pass begins with those.) Three products per layer, each bound by
// multiply-adds:
//
//   outputs          z = W x      kRows neurons x kVectors vectors in registers, weights broadcast
//   input gradients  W^T g        the same with the weights read down their columns
//   weight gradients g x^T        as many (neuron, input) pairs as a vector has lanes; each lane sums
//                                 its examples, and at the end of the tile the lanes are summed; where
//                                 vectors are short, outer products (see kOuterProducts)
//
// Order of summation, fixed by the batch alone. A weight gradient: per lane one chain of multiply-
// adds over the tile's examples (one chain of all examples in outer products); the lanes of a tile in a
// tree; the tiles of a span in order; the
// (at most kMaxSpans) spans in order. The gradient of a shared input: members in order within each
// of at most kMaxGroups groups, the groups in order. So no bit depends on the number of threads, and
// but for a shared input none on the members beside.

#include "kernels/cpu/wide-inl.h"
#include "kernels/cpu/elementary-inl.h"
#include "kernels/cpu/activations-inl.h"
#include "kernels/cpu/ensemble_mlp_common-inl.h"
#include "kernels/cpu/ensemble_mlp_epilogue-inl.h"
#include "kernels/cpu/ensemble_mlp_losses-inl.h"
#include "kernels/cpu/ensemble_mlp_panels-inl.h"

namespace pyens::PYENS_ISA::ensemble_mlp {

using ensemble_mlp_cpu::Training;

constexpr int64_t kMaxSpans = 16;
constexpr int64_t kMaxGroups = 8;

// With 16 registers; see outer_weight_gradient.
constexpr bool kOuterProducts = kVectors == 2;
constexpr int kColumnVectors = 2;
template <class Real>
constexpr int64_t kOuterColumns = kColumnVectors * kWideLanes<Real>;

// --- how the work is cut ---------------------------------------------------------------------------

inline MLPLayerGradient requested_gradient(const Training& t, int64_t l) {
  return t.gradients ? t.gradients[l] : MLPLayerGradient{};
}

template <class A>
struct TrainingSchedule {
  using Real = typename A::Real;
  int64_t tile, tiles;  // examples per tile; tiles in the batch
  int64_t tiles_per_span, spans;
  int64_t group_members, groups;  // a group's members add to one gradient of a shared input
  int64_t member_gradients;       // weights and biases of one member, those asked for
  int64_t input_gradients;        // of one group
  bool by_span;                   // spans run apart: an item is a span of a group
  int64_t lowest;                 // the lowest layer that is differentiated

  explicit TrainingSchedule(const Training& t) {
    const EnsembleMLPParams& p = t.forward;
    int64_t widths = p.layers[0].in;
    for (int64_t l = 0; l < p.num_layers; ++l) widths += p.layers[l].out;
    int64_t largest = kMaxTile;
    while (largest > kPanel<A> && largest * widths > (int64_t{1} << 20)) largest /= 2;
    tiles = std::max<int64_t>(1, (p.batch + largest - 1) / largest);  // of an empty batch too
    tile = round_up((p.batch + tiles - 1) / tiles, kPanel<A>);
    tiles = (p.batch + tile - 1) / tile;
    tiles_per_span = (tiles + kMaxSpans - 1) / kMaxSpans;
    spans = (tiles + tiles_per_span - 1) / tiles_per_span;

    member_gradients = 0;
    lowest = p.num_layers;
    for (int64_t l = p.num_layers; l-- > 0;) {
      const MLPLayerGradient requested = requested_gradient(t, l);
      if (requested.weight) member_gradients += p.layers[l].out * p.layers[l].in;
      for (const void* of : {requested.bias, requested.norm_weight, requested.norm_bias}) {
        if (of) member_gradients += p.layers[l].out;
      }
      if (requested.any()) lowest = l;
    }
    if (t.grad_input) lowest = 0;

    const bool shared = t.grad_input && t.sum_grad_input;
    group_members = shared ? (p.ensemble_size + kMaxGroups - 1) / kMaxGroups : 1;
    groups = (p.ensemble_size + group_members - 1) / group_members;
    input_gradients = shared ? tiles * tile * p.layers[0].in : 0;
    // Used when groups alone would leave threads idle. It costs memory and changes no bit.
    constexpr int64_t kMostBytes = int64_t{1} << 29;
    by_span = spans > 1 && groups < 4 * t.threads &&
              spans * p.ensemble_size * member_gradients <
                  kMostBytes / static_cast<int64_t>(sizeof(Real));
  }

  int64_t items() const { return by_span ? spans * groups : groups; }
};

// Shared by all threads: what one round leaves for the next.
template <class A>
struct TrainingPartial {
  using Real = typename A::Real;
  double* weight_scale;  // [E], by which sample weights are multiplied
  double* weight_sum;    // [E], of weights times that
  double* loss_sum;      // [E, spans]
  Real* gradients;       // [spans, E, member_gradients], by_span
  Real* input;           // [groups, tiles, panels of in], of a shared input
  size_t bytes;

  TrainingPartial(const Training& t, const TrainingSchedule<A>& s) {
    const int64_t e = t.forward.ensemble_size;
    bytes = 0;
    auto take = [&](int64_t size) {
      char* at = t.partial ? static_cast<char*>(t.partial) + bytes : nullptr;
      bytes += static_cast<size_t>(round_up(size, 64));
      return at;
    };
    const auto real = static_cast<int64_t>(sizeof(Real)),
               wide = static_cast<int64_t>(sizeof(double));
    weight_scale = reinterpret_cast<double*>(take(e * wide));
    weight_sum = reinterpret_cast<double*>(take(e * wide));
    loss_sum = reinterpret_cast<double*>(take(e * s.spans * wide));
    gradients =
        reinterpret_cast<Real*>(take(s.by_span ? s.spans * e * s.member_gradients * real : 0));
    input = reinterpret_cast<Real*>(take(s.groups * s.input_gradients * real));
  }
};

inline int64_t outputs_of(const Training& t) {
  return t.forward.layers[t.forward.num_layers - 1].out;
}
inline int64_t target_features(const Training& t) { return target_features(t, outputs_of(t)); }
inline int64_t loss_terms(const Training& t) { return loss_terms(t, outputs_of(t)); }

// Whether the derivative of layer l's activation gets panels of its own.
inline bool needs_slope(const EnsembleMLPParams& p, int64_t l) {
  const MLPLayer& layer = p.layers[l];
  const bool identity = layer.activation.kind == ActivationKind::identity;
  if (l + 1 == p.num_layers || layer.rich())
    return !identity && !(l + 1 < p.num_layers && slope_shows(layer));
  return !slope_shows(layer);
}

// Of one thread.
template <class A>
struct TrainingScratch {
  using Real = typename A::Real;
  Real* input;                   // panels of the tile's input
  Real* target;                  // panels of its targets
  Real* example_weight;          // [tile], scaled; 0 behind the last example
  Real* class_weight;            // [out], scaled, where there are some
  Real** hidden;                 // [layers]: panels of what each layer puts out
  const Real** reads;            // [layers]: panels of what each layer reads
  Real** slope;                  // [layers]: derivative of the activation there, where it is needed
  Normalized<Real>* normalized;  // [layers]: of a norm there
  Real* output;                  // where the outputs' place has their gradient, the outputs
  Real* gradient[2];             // by what a layer reads, in turn
  Real* weights;                 // a block of weights, converted
  Real* outer_rows;              // of a weight gradient of outer products
  Real* bias;                    // of one layer
  Real* norm;                    // weights and biases of one norm
  Real* norm_sums;               // their gradients over the tile, lane by lane
  Real* member;                  // weights and biases of one member over one span
  size_t bytes;

  TrainingScratch(const Training& t, const TrainingSchedule<A>& s, void* base) {
    const EnsembleMLPParams& p = t.forward;
    bytes = 0;
    auto take = [&](int64_t size) {
      char* at = base ? static_cast<char*>(base) + bytes : nullptr;
      bytes += static_cast<size_t>(round_up(size, 64));
      return at;
    };
    auto reals = [&](int64_t n) {
      return reinterpret_cast<Real*>(take(n * static_cast<int64_t>(sizeof(Real))));
    };
    const int64_t pointers = p.num_layers * static_cast<int64_t>(sizeof(Real*));
    hidden = reinterpret_cast<Real**>(take(pointers));
    reads = reinterpret_cast<const Real**>(take(pointers));
    slope = reinterpret_cast<Real**>(take(pointers));
    normalized = reinterpret_cast<Normalized<Real>*>(
        take(p.num_layers * static_cast<int64_t>(sizeof(Normalized<Real>))));
    input = reals(s.tile * p.layers[0].in);
    target = reals(s.tile * target_features(t));
    example_weight = reals(s.tile);
    class_weight = reals(t.of_loss.class_weight ? outputs_of(t) : 0);
    int64_t widest = t.grad_input ? p.layers[0].in : 0;  // of the layers' inputs
    for (int64_t l = 0; l < p.num_layers; ++l) {
      const bool last = l + 1 == p.num_layers;
      const MLPLayer& layer = p.layers[l];
      const bool has_slope = l >= s.lowest && needs_slope(p, l);
      const bool has_norm = l >= s.lowest && layer.has_norm();
      Real* h = reals(s.tile * layer.out);
      Real* d = reals(has_slope ? s.tile * layer.out : 0);
      Real* x = reals(has_norm ? s.tile * layer.out : 0);
      Real* r = reals(has_norm ? s.tile : 0);
      if (base) {
        hidden[l] = h, slope[l] = has_slope ? d : nullptr;
        normalized[l] = has_norm ? Normalized<Real>{x, r} : Normalized<Real>{};
      }
      if (!last) widest = std::max(widest, layer.out);
    }
    const int64_t outputs = p.layers[p.num_layers - 1].out;
    output = reals(t.loss == Loss::none && keeps(p, p.num_layers - 1) ? s.tile * outputs : 0);
    for (Real*& g : gradient) g = reals(s.lowest < p.num_layers ? s.tile * widest : 0);
    weights = reals(A::kDirect ? 0 : kNeuronBlock * kBlock);
    outer_rows =
        reals(kOuterProducts ? round_up(s.tile, kWideLanes<Real>) * kOuterColumns<Real> : 0);
    bias = reals(round_up(max_width(p), kNarrowLanes<Real>));
    norm = reals(p.rich() ? 2 * max_width(p) : 0);
    norm_sums = reals(p.rich() ? 2 * max_width(p) * lanes_of<Wide<Real>>() : 0);
    member = reals(s.by_span ? 0 : s.member_gradients);
  }
};

// --- gradients -------------------------------------------------------------------------------------

// g[r] <- ((first ? 0 : g[r]) + sum_o w[o][r] z[o]) times the derivative of the activation, which is
// what `slope` holds; or for the ReLU, scaled by dropout, `scale` where `relu` is not <= 0. Lanes of weight 0
// get nothing: those without an example, and examples that are left out.
template <class A>
struct InputGradientBlock {
  using Real = typename A::Real;
  const Real* w;
  int64_t w_stride;
  const Real* x;
  int64_t k_count;
  Real* z;
  bool first;
  const Real* slope;
  const Real* relu;
  Real scale;
  bool cuts;  // dropout and cuts_off: slopes of 0 are selected, not multiplied
  const Real* example_weight;

  template <int R, int NV>
  void run(int64_t row) const {
    using V = WideOf<A>;
    V sum[R][NV];
    panel_products<A, true, R, NV>(w + row, w_stride, x, k_count, sum);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const int64_t at = (row + r) * kPanel<A> + v * lanes_of<V>();
        const V before = first ? V{} : load<V>(z + at);
        V g = first ? sum[r][v] : before + sum[r][v];
        if (relu) g = load<V>(relu + at) <= V{} ? V{} : g * broadcast<V>(scale);
        if (slope) {
          const V by = load<V>(slope + at);
          g = cuts && by == V{} ? V{} : g * by;
        }
        store(z + at, load<V>(example_weight + v * lanes_of<V>()) == V{} ? before : g);
      }
    }
  }
};

// The gradient of layer l's input, from that of its output. `add`: to what `result` holds.
template <class A>
void input_gradient(const EnsembleMLPParams& p, int64_t l, int64_t member, int64_t examples,
                    const typename A::Real* gradient, typename A::Real* result, bool add,
                    const typename A::Real* hidden, const typename A::Real* slope,
                    const typename A::Real* example_weight, typename A::Real* weights) {
  constexpr int64_t P = kPanel<A>;
  const MLPLayer& layer = p.layers[l];
  // A rich layer below has an epilogue of its own to go back through.
  const bool below = l > 0 && !p.layers[l - 1].rich();
  const bool relu = below && slope_shows(p.layers[l - 1]);
  const double rate = l > 0 ? p.dropout.of(member, l - 1) : 0;
  for (int64_t row = 0; row < layer.in; row += kBlock) {
    const int64_t rows = std::min(kBlock, layer.in - row);
    for (int64_t k = 0; k < layer.out; k += kBlock) {
      InputGradientBlock<A> block;
      block.k_count = std::min(kBlock, layer.out - k);
      block.w = A::weight_block(layer, p.parameters_of(member), k, block.k_count, row, rows,
                                weights, &block.w_stride);
      block.first = k == 0 && !add;
      block.scale = static_cast<typename A::Real>(1 / (1 - rate));
      block.cuts = rate > 0 || (below && cuts_off(p.layers[l - 1].activation.kind));
      const bool finished = k + block.k_count == layer.out;
      for (int64_t panel = 0; panel * P < examples; ++panel) {
        const int64_t at = (panel * layer.in + row) * P;
        block.x = gradient + (panel * layer.out + k) * P;
        block.z = result + at;
        block.relu = finished && relu ? hidden + at : nullptr;
        block.slope = finished && below && slope ? slope + at : nullptr;
        block.example_weight = example_weight + panel * P;
        run_panel<A>(rows, examples - panel * P, block);
      }
    }
  }
}

template <class Real>
void store_or_add(Real* to, Real value, bool first) {
  *to = first ? value : *to + value;
}

// Neurons x columns of a weight gradient that fill one vector of sums.
template <class Real>
constexpr int kColumns = kWideLanes<Real> < 4 ? kWideLanes<Real> : 4;
template <class Real>
constexpr int kNeurons = kWideLanes<Real> / kColumns<Real>;

// Lane r * kColumns + c <- sum_b g[r][b] x[c][b]. Rows and columns behind the last repeat it.
template <class Real, bool kFull>
Wide<Real> weight_gradient_block(const Real* g, int64_t g_stride, int64_t rows, const Real* x,
                                 int64_t x_stride, int64_t columns, int64_t examples) {
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>(), C = kColumns<Real>, R = kNeurons<Real>;
  constexpr int64_t P = kPanelOf<Real>;
  V sum[N] = {};
  for (int64_t first = 0; first < examples; first += P, g += g_stride, x += x_stride) {
    const int64_t count = std::min(P, examples - first);
    for (int64_t b = 0; b < count; b += N) {
      V xs[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        xs[c] = load<V>(x + (kFull ? c : std::min<int64_t>(c, columns - 1)) * P + b);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const V gs = load<V>(g + (kFull ? r : std::min<int64_t>(r, rows - 1)) * P + b);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sum[r * C + c] = madd(gs, xs[c], sum[r * C + c]);
      }
    }
  }
  return sum_lanes(sum);
}

// With 16 registers a block of lanes is too small to feed the multiply-adds. There a weight gradient is a sum of
// outer products instead: kColumnVectors vectors of inputs, transposed to rows [example][input] once for all
// neurons, times the gradients of kRows neurons, broadcast. Per example 8 loads feed 12 multiply-adds. Each
// sum is one chain over the tile's examples.
// Whether that pays: columns behind the last are computed too.
template <class Real>
constexpr bool takes_outer_products(int64_t in) {
  return kOuterProducts && 4 * round_up(in, kOuterColumns<Real>) <= 5 * in;
}

// Inputs [first, first + kOuterColumns) of panels [in][kPanel] to rows [example][kOuterColumns], zeros where
// there is no input.
template <class Real>
void to_outer_rows(const Real* x, int64_t in, int64_t first, int64_t examples, Real* rows) {
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>();
  constexpr int64_t P = kPanelOf<Real>;
  for (int64_t b = 0; b < examples; b += N) {
    for (int64_t c = 0; c < kOuterColumns<Real>; c += N) {
      V r[N];
      for (int i = 0; i < N; ++i) {
        const int64_t u = first + c + i;
        r[i] = u < in ? load<V>(x + (b / P * in + u) * P + b % P) : V{};
      }
      transpose(r);
      for (int i = 0; i < N; ++i) store(rows + (b + i) * kOuterColumns<Real> + c, r[i]);
    }
  }
}

template <class Real>
struct OuterProducts {
  const Real* g;  // panels [out][kPanel]
  int64_t out;
  const Real* rows;
  int64_t examples;
  Real* weight;  // [out][in], from the first of the columns on
  int64_t in, columns;
  bool first;

  template <int R, int /*NV*/>
  void run(int64_t row) const {
    using V = Wide<Real>;
    constexpr int N = lanes_of<V>();
    constexpr int64_t P = kPanelOf<Real>;
    V sum[R][kColumnVectors] = {};
    const Real* x = rows;
    for (int64_t b = 0; b < examples; b += P) {
      const Real* from = g + (b * out / P + row) * P;
      const int64_t count = std::min(P, examples - b);
      for (int64_t i = 0; i < count; ++i, x += kOuterColumns<Real>) {
        const V left = load<V>(x), right = load<V>(x + N);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const V by = broadcast<V>(from[r * P + i]);
          sum[r][0] = madd(by, left, sum[r][0]);
          sum[r][1] = madd(by, right, sum[r][1]);
        }
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      Real* to = weight + (row + r) * in;
      if (columns == kOuterColumns<Real>) {
        store(to, first ? sum[r][0] : load<V>(to) + sum[r][0]);
        store(to + N, first ? sum[r][1] : load<V>(to + N) + sum[r][1]);
        continue;
      }
      for (int64_t c = 0; c < columns; ++c) store_or_add(to + c, sum[r][c / N][c % N], first);
    }
  }
};

template <class Real>
void outer_weight_gradient(const Real* g, int64_t out, const Real* x, int64_t in, int64_t examples,
                           Real* weight, bool first, Real* rows) {
  for (int64_t i = 0; i < in; i += kOuterColumns<Real>) {
    to_outer_rows(x, in, i, examples, rows);
    const int64_t columns = std::min(kOuterColumns<Real>, in - i);
    run_rows<1>(out, OuterProducts<Real>{g, out, rows, examples, weight + i, in, columns, first});
  }
}

// weight[o][i] <- (first ? 0 : weight[o][i]) + sum_b g[o][b] x[i][b] over the tile.
template <class Real>
void weight_gradient(const Real* g, int64_t out, const Real* x, int64_t in, int64_t examples,
                     Real* weight, bool first, [[maybe_unused]] Real* outer_rows) {
  if constexpr (kOuterProducts) {
    if (takes_outer_products<Real>(in)) {
      return outer_weight_gradient(g, out, x, in, examples, weight, first, outer_rows);
    }
  }
  constexpr int64_t P = kPanelOf<Real>;
  constexpr int C = kColumns<Real>, R = kNeurons<Real>;
  Real sums[R * C];
  for (int64_t o = 0; o < out; o += R) {
    const int64_t rows = std::min<int64_t>(R, out - o);
    for (int64_t i = 0; i < in; i += C) {
      const int64_t columns = std::min<int64_t>(C, in - i);
      Real* to = weight + o * in + i;
      if (rows == R && columns == C) {
        store(sums, weight_gradient_block<Real, true>(g + o * P, out * P, R, x + i * P, in * P, C,
                                                      examples));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) store_or_add(to + r * in + c, sums[r * C + c], first);
        }
      } else {
        store(sums, weight_gradient_block<Real, false>(g + o * P, out * P, rows, x + i * P, in * P,
                                                       columns, examples));
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < columns; ++c)
            store_or_add(to + r * in + c, sums[r * C + c], first);
        }
      }
    }
  }
}

// bias[o] <- (first ? 0 : bias[o]) + sum_b g[o][b] over the tile.
template <class Real>
void bias_gradient(const Real* g, int64_t out, int64_t examples, Real* bias, bool first) {
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>(), C = kColumns<Real>;
  constexpr int64_t P = kPanelOf<Real>;
  for (int64_t o = 0; o < out; o += N) {
    const int64_t rows = std::min<int64_t>(N, out - o);
    V sum[N] = {};
    for (int64_t r = 0; r < rows; r += C) {
      V partial[C] = {};
      for (int64_t b = 0; b < examples; b += N) {
        const Real* at = g + (b / P * out + o + r) * P + b % P;
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          partial[c] += load<V>(at + std::min<int64_t>(c, rows - 1 - r) * P);
        }
      }
      for (int c = 0; c < C; ++c) sum[r + c] = partial[c];
    }
    const V total = sum_lanes(sum);
    for (int r = 0; r < rows; ++r) store_or_add(bias + o + r, total[r], first);
  }
}

// to[o] <- (first ? 0 : to[o]) + the sum of vector o's lanes; nothing where `to` is nullptr.
template <class Real>
void add_lanes(const Real* vectors, int64_t out, Real* to, bool first) {
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>();
  for (int64_t o = 0; to && o < out; o += N) {
    const int64_t rows = std::min<int64_t>(N, out - o);
    V sum[N];
    for (int r = 0; r < N; ++r) sum[r] = r < rows ? load<V>(vectors + (o + r) * N) : V{};
    const V total = sum_lanes(sum);
    for (int r = 0; r < rows; ++r) store_or_add(to + o + r, total[r], first);
  }
}

// to <- (first ? 0 : to) + from
template <class Real>
void add_panels(const Real* from, int64_t n, Real* to, bool first) {
  using V = Wide<Real>;
  for (int64_t i = 0; i < n; i += lanes_of<V>()) {
    const V v = load<V>(from + i);
    store(to + i, first ? v : load<V>(to + i) + v);
  }
}

// The gradient by what a rich hidden layer puts out, without its residual, becomes that by its sums: the
// steps of hidden_epilogue in reverse.
template <class A>
void epilogue_gradient(const EnsembleMLPParams& p, int64_t l, int64_t member, int64_t first,
                       int64_t examples, const TrainingScratch<A>& scratch, typename A::Real* g,
                       const MLPLayerGradient& to, bool first_sum) {
  using Real = typename A::Real;
  const MLPLayer& layer = p.layers[l];
  const bool drops = p.dropout.of(member, l) > 0, drops_early = drops && drops_before_norm(p, l);
  const Normalized<Real> left = scratch.normalized[l];
  const auto dropout = [&] { apply_dropout<Real>(p, l, member, first, examples, g, nullptr); };
  // A ReLU between it and what the layer puts out shows there.
  const bool shows = slope_shows(layer);
  const auto norm = [&] {
    load_norm<A>(layer, p.parameters_of(member), scratch.norm, scratch.norm + layer.out);
    const int64_t lanes = layer.out * lanes_of<Wide<Real>>();
    std::fill(scratch.norm_sums, scratch.norm_sums + 2 * lanes, Real{0});
    for_each_column<Real>(
        examples, NormTileBackward<Real>{layer, scratch.norm, shows ? scratch.hidden[l] : nullptr,
                                         g, left, scratch.norm_sums});
    add_lanes(scratch.norm_sums, layer.out, static_cast<Real*>(to.norm_weight), first_sum);
    add_lanes(scratch.norm_sums + lanes, layer.out, static_cast<Real*>(to.norm_bias), first_sum);
  };
  if (drops && !drops_early) dropout();
  if (layer.has_norm() && layer.norm.after_activation) norm();
  if (drops_early && layer.norm.after_activation) dropout();
  if (scratch.slope[l]) {
    multiply_by_slope(layer.out, examples, scratch.example_weight, scratch.slope[l], g);
  }
  if (layer.has_norm() && !layer.norm.after_activation) norm();
  if (drops_early && !layer.norm.after_activation) dropout();
}

// --- one member over one tile ----------------------------------------------------------------------

// Which tile of a shared input and of a shared target is in scratch already.
struct InPanels {
  int64_t input = -1, target = -1;
};

template <class A>
void load_tile(const Training& t, const TrainingSchedule<A>& s, const TrainingPartial<A>& partial,
               int64_t member, int64_t tile, const TrainingScratch<A>& scratch,
               InPanels& in_panels) {
  using Real = typename A::Real;
  using Elem = typename A::Elem;
  const EnsembleMLPParams& p = t.forward;
  const int64_t first = tile * s.tile, examples = std::min(s.tile, p.batch - first);
  const auto* weight = static_cast<const Real*>(t.sample_weight);
  if (weight) weight += member * t.sample_weight_member_stride + first;
  // Examples that are left out are 0 in the input, so that nothing in them reaches a gradient.
  const bool same_for_all = !weight || t.sample_weight_member_stride == 0;
  if (p.input_member_stride != 0 || !same_for_all || in_panels.input != tile) {
    const auto* rows = static_cast<const Elem*>(p.input) + member * p.input_member_stride +
                       first * p.input_row_stride;
    to_panels<A>(rows, p.input_row_stride, examples, p.layers[0].in, scratch.input, weight);
    in_panels.input = tile;
    for (int64_t b = 0; b < s.tile; ++b) {
      scratch.example_weight[b] =
          b >= examples ? 0
          : weight      ? scaled_sample_weight(weight[b], partial.weight_scale[member])
                        : 1;
    }
  }
  // A given gradient of activated outputs has been multiplied by the slopes where it was.
  const bool changed = t.loss == Loss::none && keeps(p, p.num_layers - 1);
  if (t.target_member_stride == 0 && in_panels.target == tile && !changed) return;
  in_panels.target = tile;
  const int64_t offset = member * t.target_member_stride + first * t.target_row_stride;
  if (t.loss == Loss::none) {  // into the place of the outputs
    to_panels<A>(static_cast<const Elem*>(t.target) + offset, t.target_row_stride, examples,
                 target_features(t), scratch.hidden[p.num_layers - 1]);
  } else if (t.loss == Loss::cross_entropy) {
    const auto* labels = static_cast<const int64_t*>(t.target) + offset;
    for (int64_t b = 0; b < examples; ++b) {
      scratch.target[b] = static_cast<Real>(labels[b * t.target_row_stride]);
    }
    std::fill(scratch.target + examples, scratch.target + s.tile, 0);
  } else {
    to_panels<Plain<Real, Real>>(static_cast<const Real*>(t.target) + offset, t.target_row_stride,
                                 examples, target_features(t), scratch.target);
  }
}

// Returns the weighted sum of the examples' losses. `sums` are the member's gradients: weight and
// bias of each layer that are asked for, one after the other from the last layer down.
template <class A>
double train_tile(const Training& t, const TrainingSchedule<A>& s, int64_t member, int64_t tile,
                  typename A::Real scale, const TrainingScratch<A>& scratch, typename A::Real* sums,
                  bool first_sum, typename A::Real* shared_input, bool first_member) {
  using Real = typename A::Real;
  const EnsembleMLPParams& p = t.forward;
  const int64_t first = tile * s.tile, examples = std::min(s.tile, p.batch - first);
  const int64_t layers = p.num_layers;
  const int64_t out = p.layers[layers - 1].out;

  const Real* x = scratch.input;
  for (int64_t l = 0; l < layers; ++l) {
    const MLPLayer& layer = p.layers[l];
    const bool last = l + 1 == layers, gradient_given = last && t.loss == Loss::none;
    scratch.reads[l] = x;
    if (gradient_given && !keeps(p, l)) break;
    Real* h = gradient_given ? scratch.output : scratch.hidden[l];
    const Real* const kept = kept_sums<Real>(p, member, l, first);
    if (kept && sums_are_read(p, member, l)) {
      x = kept;
      continue;
    }
    if (!kept) {
      forward_layer<A>(layer, p.parameters_of(member), examples, x, h, scratch.weights,
                       scratch.bias);
    }
    if (last) {
      output_activation<Real>(layer, examples, kept ? kept : h, h, scratch.slope[l]);
      break;
    }
    hidden_epilogue<A>(p, l, member, first, examples, kept ? kept : h, h, scratch.slope[l], x,
                       scratch.norm, scratch.normalized[l]);
    clear_padding(h, layer.out, examples);
    x = h;
  }

  if (t.of_loss.class_weight) scale_class_weights(t, member, out, scratch.class_weight);
  const double loss =
      loss_tile(t, member, scratch.class_weight, scratch.hidden[layers - 1], out, scratch.target,
                target_features(t), scratch.example_weight, examples, scale);

  Real* gradient = scratch.hidden[layers - 1];
  for (int64_t l = layers; l-- > s.lowest;) {
    const MLPLayer& layer = p.layers[l];
    const int64_t rows = layer.out, in = layer.in;
    const bool goes_on = l > s.lowest || (l == 0 && t.grad_input);
    MLPLayerGradient to = requested_gradient(t, l);  // from here on the tile's sums
    const auto take = [&](void*& sum, int64_t size) {
      if (sum) sum = std::exchange(sums, sums + size);
    };
    take(to.weight, rows * in);
    for (void** sum : {&to.bias, &to.norm_weight, &to.norm_bias}) take(*sum, rows);
    Real* const result = l == 0 && shared_input ? shared_input : scratch.gradient[l % 2];
    bool add = l == 0 && shared_input && !first_member;
    if (l + 1 == layers) {
      if (scratch.slope[l]) {
        multiply_by_slope(rows, examples, scratch.example_weight, scratch.slope[l], gradient);
      }
    } else if (layer.rich()) {
      if (layer.residual && goes_on) {  // the other way to what the layer reads
        add_panels(gradient, round_up(examples, kPanel<A>) * rows, result, !add);
        add = true;
      }
      epilogue_gradient<A>(p, l, member, first, examples, scratch, gradient, to, first_sum);
    }
    if (to.weight) {
      weight_gradient(gradient, rows, scratch.reads[l], in, examples, static_cast<Real*>(to.weight),
                      first_sum, scratch.outer_rows);
    }
    if (to.bias) {
      bias_gradient(gradient, rows, examples, static_cast<Real*>(to.bias), first_sum);
    }
    if (!goes_on) break;
    input_gradient<A>(p, l, member, examples, gradient, result, add, scratch.reads[l],
                      l > 0 ? scratch.slope[l - 1] : nullptr, scratch.example_weight,
                      scratch.weights);
    if (l == 0 && !shared_input) {
      from_panels<Plain<Real, Real>>(
          result, examples, in, static_cast<Real*>(t.grad_input) + (member * p.batch + first) * in);
    }
    gradient = result;
  }
  return loss;
}

// --- the rounds ------------------------------------------------------------------------------------

template <class A>
ensemble_mlp_cpu::TrainingPlan plan_training(const Training& t) {
  const TrainingSchedule<A> s(t);
  const EnsembleMLPParams& p = t.forward;
  ensemble_mlp_cpu::TrainingPlan plan{};
  plan.items = s.items();
  plan.partial_bytes = TrainingPartial<A>(t, s).bytes;
  plan.scratch_bytes = TrainingScratch<A>(t, s, nullptr).bytes;
  double work = 1;
  for (int64_t l = 0; l < p.num_layers; ++l) {
    work += 3 * static_cast<double>(p.layers[l].in * p.layers[l].out * (p.batch + 1));
  }
  plan.grain_size = items_worth_a_thread(kMultiplyAddsWorthAThread,
                                         work * static_cast<double>(p.ensemble_size), plan.items);
  // Members, then tiles of a shared input.
  plan.finish_items = p.ensemble_size + (s.input_gradients ? s.tiles : 0);
  const bool sums = s.by_span || s.input_gradients;
  plan.finish_grain_size = sums ? 1 : plan.finish_items;
  return plan;
}

template <class A>
ensemble_mlp_cpu::TrainingError prepare_training(const Training& t, int64_t begin, int64_t end) {
  using Real = typename A::Real;
  using ensemble_mlp_cpu::TrainingError;
  const TrainingPartial<A> partial(t, TrainingSchedule<A>(t));
  const EnsembleMLPParams& p = t.forward;
  const int64_t classes = outputs_of(t);
  const bool own_weights = (t.sample_weight && t.sample_weight_member_stride != 0) ||
                           (t.of_loss.class_weight && (t.of_loss.class_weight_member_stride != 0 ||
                                                       t.target_member_stride != 0));
  for (int64_t m = begin; m < end; ++m) {
    const auto* weight = static_cast<const Real*>(t.sample_weight);
    if (weight) weight += m * t.sample_weight_member_stride;
    double scale = 1, sum = weight ? 0 : static_cast<double>(p.batch);
    if (m > begin && !own_weights) {
      scale = partial.weight_scale[begin];
      sum = partial.weight_sum[begin];
    } else if (weight) {
      Real largest = 0;
      for (int64_t b = 0; b < p.batch; ++b) {
        if (!(weight[b] >= 0) || std::isinf(weight[b])) return TrainingError::sample_weight_invalid;
        largest = std::max(largest, weight[b]);
      }
      scale = sample_weight_scale(static_cast<double>(largest));
      for (int64_t b = 0; b < p.batch; ++b) sum += static_cast<double>(weight[b]) * scale;
    }
    partial.weight_scale[m] = scale;
    partial.weight_sum[m] = sum;
    if (t.loss != Loss::cross_entropy) continue;
    if (m > begin && !own_weights && t.target_member_stride == 0) continue;  // checked already
    const auto* labels = static_cast<const int64_t*>(t.target) + m * t.target_member_stride;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t label = labels[b * t.target_row_stride];
      const bool left_out = weight && weight[b] == 0;
      if (!left_out && (label < 0 || label >= classes)) return TrainingError::target_out_of_range;
    }
    if (!t.of_loss.class_weight) continue;
    // The mean divides by the weights of the examples times those of their classes.
    const auto* of_class = class_weights<Real>(t, m);
    const double class_scale = class_weight_scale(of_class, classes);
    sum = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      if (weight && weight[b] == 0) continue;
      const Real own = weight ? scaled_sample_weight(weight[b], scale) : 1;
      const Real by = scaled_sample_weight(of_class[labels[b * t.target_row_stride]], class_scale);
      sum += static_cast<double>(own) * static_cast<double>(by);
    }
    partial.weight_sum[m] = sum;
  }
  return TrainingError::none;
}

// Adds one member's sums over a span to the result.
template <class A>
void add_span(const Training& t, int64_t member, const typename A::Real* sums, bool first) {
  using Real = typename A::Real;
  const auto add = [&](void* result, int64_t n) {
    if (!result) return;
    Real* to = static_cast<Real*>(result) + member * n;
    for (int64_t i = 0; i < n; ++i) store_or_add(to + i, sums[i], first);
    sums += n;
  };
  for (int64_t l = t.forward.num_layers; l-- > 0;) {
    const MLPLayer& layer = t.forward.layers[l];
    const MLPLayerGradient to = requested_gradient(t, l);
    add(to.weight, layer.out * layer.in);
    for (void* of : {to.bias, to.norm_weight, to.norm_bias}) add(of, layer.out);
  }
}

template <class A>
void train_group(const Training& t, const TrainingSchedule<A>& s, const TrainingPartial<A>& partial,
                 const TrainingScratch<A>& scratch, int64_t span, int64_t group,
                 InPanels& in_panels) {
  using Real = typename A::Real;
  const EnsembleMLPParams& p = t.forward;
  const int64_t first_member = group * s.group_members, first_tile = span * s.tiles_per_span;
  const int64_t last_member = std::min(first_member + s.group_members, p.ensemble_size);
  const int64_t last_tile = std::min(first_tile + s.tiles_per_span, s.tiles);
  for (int64_t m = first_member; m < last_member; ++m) {
    const double terms = partial.weight_sum[m] * static_cast<double>(loss_terms(t));
    Real scale = mean_scale<Real>(terms);
    if (t.member_scale) scale *= static_cast<const Real*>(t.member_scale)[m];
    Real* sums = s.by_span ? partial.gradients + (span * p.ensemble_size + m) * s.member_gradients
                           : scratch.member;
    double loss = 0;
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      Real* shared_input = nullptr;
      if (s.input_gradients) {
        shared_input = partial.input + group * s.input_gradients + tile * s.tile * p.layers[0].in;
      }
      load_tile(t, s, partial, m, tile, scratch, in_panels);
      loss += train_tile(t, s, m, tile, scale, scratch, sums, tile == first_tile, shared_input,
                         m == first_member);
    }
    partial.loss_sum[m * s.spans + span] = loss;
    if (!s.by_span) add_span<A>(t, m, sums, span == 0);
  }
}

template <class A>
void train(const Training& t, int64_t begin, int64_t end, void* base) {
  const TrainingSchedule<A> s(t);
  const TrainingPartial<A> partial(t, s);
  const TrainingScratch<A> scratch(t, s, base);
  InPanels in_panels;
  if (s.by_span) {
    for (int64_t item = begin; item < end; ++item) {
      train_group(t, s, partial, scratch, item / s.groups, item % s.groups, in_panels);
    }
    return;
  }
  // Members run fastest: a shared input goes to panels once per tile.
  for (int64_t span = 0; span < s.spans; ++span) {
    for (int64_t group = begin; group < end; ++group) {
      train_group(t, s, partial, scratch, span, group, in_panels);
    }
  }
}

// Adds the groups' gradients of a tile of the shared input, in order.
template <class A>
void finish_shared_input(const Training& t, const TrainingSchedule<A>& s,
                         const TrainingPartial<A>& partial, int64_t tile) {
  using Real = typename A::Real;
  using V = WideOf<A>;
  const int64_t in = t.forward.layers[0].in, first = tile * s.tile;
  const int64_t examples = std::min(s.tile, t.forward.batch - first);
  Real* sum = partial.input + tile * s.tile * in;
  for (int64_t group = 1; group < s.groups; ++group) {
    const Real* more = sum + group * s.input_gradients;
    for (int64_t i = 0; i < s.tile * in; i += lanes_of<V>()) {
      store(sum + i, load<V>(sum + i) + load<V>(more + i));
    }
  }
  from_panels<Plain<Real, Real>>(sum, examples, in, static_cast<Real*>(t.grad_input) + first * in);
}

template <class A>
void finish_training(const Training& t, int64_t begin, int64_t end) {
  using Real = typename A::Real;
  const TrainingSchedule<A> s(t);
  const TrainingPartial<A> partial(t, s);
  const int64_t ensemble_size = t.forward.ensemble_size;
  for (int64_t item = begin; item < end; ++item) {
    if (item >= ensemble_size) {
      finish_shared_input(t, s, partial, item - ensemble_size);
      continue;
    }
    if (t.loss_output) {
      double loss = 0;
      for (int64_t i = 0; i < s.spans; ++i) loss += partial.loss_sum[item * s.spans + i];
      const double terms = partial.weight_sum[item] * static_cast<double>(loss_terms(t));
      static_cast<Real*>(t.loss_output)[item] = terms > 0 ? static_cast<Real>(loss / terms) : 0;
    }
    for (int64_t span = 0; s.by_span && span < s.spans; ++span) {
      const int64_t at = (span * ensemble_size + item) * s.member_gradients;
      add_span<A>(t, item, partial.gradients + at, span == 0);
    }
  }
}

template <class E, class R, class A = Plain<E, R>>
constexpr TrainingFunctions kTrainingFunctions = {plan_training<A>, prepare_training<A>, train<A>,
                                                  finish_training<A>};

}  // namespace pyens::PYENS_ISA::ensemble_mlp
