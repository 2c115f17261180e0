// What follows the sums of a layer over one tile, and its derivative: dropout, norm, activation, residual.
//
// Examples lie in the lanes, so a norm sums over the rows of a panel: no shuffles. All of it is bound by L1
// and L2; a norm passes over a tile three times forward and twice back, where a layer of 64 inputs takes 64
// multiply-adds an element for each of its three products.

namespace pyens::PYENS_ISA::ensemble_mlp {

// z[u][b] <- kept ? z[u][b] / (1 - p) : 0 over panels [unit][kPanel]. `slope`, if there is one, is the
// derivative of z by what comes before and goes the same way. What is kept: kernels/dropout.h.
template <class Real>
void apply_dropout(const EnsembleMLPParams& p, int64_t l, int64_t member, int64_t first,
                   int64_t examples, Real* z, Real* slope) {
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>();
  constexpr int64_t P = kPanelOf<Real>;
  using Words = Vec<uint32_t, N>;
  using Mask = Vec<std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>, N>;
  const double rate = p.dropout.of(member, l);
  const uint32_t threshold = dropout_threshold(rate);
  const V scale = broadcast<V>(static_cast<Real>(1 / (1 - rate)));
  const uint64_t layer_key = dropout_layer_key(p.dropout.seeds[member], l);
  const int64_t out = p.layers[l].out;
  Words lane{};
  for (int i = 0; i < N; ++i) lane[i] = static_cast<uint32_t>(i);
  for (int64_t u = 0; u < out; ++u) {
    const uint64_t key = dropout_unit_key(layer_key, u);
    for (int64_t b = 0; b < examples; b += N) {
      const Words hash = dropout_hash(lane + static_cast<uint32_t>(first + b), key);
      const Mask kept = __builtin_convertvector(hash >= threshold, Mask);
      const int64_t at = (b / P * out + u) * P + b % P;
      store(z + at, kept ? load<V>(z + at) * scale : V{});
      if (slope) store(slope + at, kept ? load<V>(slope + at) * scale : V{});
    }
  }
}

// --- norms -----------------------------------------------------------------------------------------

// Weights and biases of a member's norm, in scratch: ones and zeros where there are none.
template <class A>
void load_norm(const MLPLayer& layer, int64_t member, typename A::Real* weight,
               typename A::Real* bias) {
  using Real = typename A::Real;
  const auto load_of = [&](const MLPBias& from, Real* to, Real otherwise) {
    const auto* source = static_cast<const typename A::Elem*>(from.data);
    if (source) source += member * from.member_stride;
    for (int64_t o = 0; o < layer.out; ++o) {
      to[o] = source ? static_cast<Real>(to_float(source[o])) : otherwise;
    }
  };
  load_of(layer.norm.weight, weight, 1);
  load_of(layer.norm.bias, bias, 0);
}

// Sums over features go in this many chains, feature f in chain f % kNormChains, so that additions need
// not wait for each other; they are added in a tree.
constexpr int kNormChains = 4;
template <int NV, class V>
inline __attribute__((always_inline)) void add_chains(V (&chain)[kNormChains][NV], V (&sum)[NV]) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    sum[v] = (chain[0][v] + chain[2][v]) + (chain[1][v] + chain[3][v]);
  }
}

// One norm over NV vectors of examples: z <- max(floor, (z - mean) r weight + bias). What a backward pass needs
// goes to `normalized`, (z - mean) r in the same panel, and `scale`, r, where they are given.
template <class Real, int NV>
void norm_columns(const MLPNorm& norm, int64_t out, const Real* weight, const Real* bias,
                  Real floor, Real* z, Real* normalized, Real* scale) {
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>(), C = kNormChains;
  constexpr int64_t P = kPanelOf<Real>;
  const V count = broadcast<V>(static_cast<Real>(out));
  V mean[NV], r[NV];
  for (int v = 0; v < NV; ++v) mean[v] = V{};
  if (norm.kind == NormKind::layer_norm) {
    V chain[C][NV] = {}, sum[NV];
    for (int64_t f = 0; f < out; f += C) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        if (f + c >= out) break;
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) chain[c][v] += load<V>(z + (f + c) * P + v * N);
      }
    }
    add_chains<NV>(chain, sum);
    for (int v = 0; v < NV; ++v) mean[v] = sum[v] / count;
  }
  V chain[C][NV] = {}, sum[NV];
  for (int64_t f = 0; f < out; f += C) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      if (f + c >= out) break;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const V x = load<V>(z + (f + c) * P + v * N) - mean[v];
        chain[c][v] = madd(x, x, chain[c][v]);
      }
    }
  }
  add_chains<NV>(chain, sum);
  const V epsilon = broadcast<V>(static_cast<Real>(norm.epsilon)), one = broadcast<V>(Real{1});
  for (int v = 0; v < NV; ++v) {
    r[v] = one / square_root(sum[v] / count + epsilon);
    if (scale) store(scale + v * N, r[v]);
  }
  const V low = broadcast<V>(floor);
  for (int64_t f = 0; f < out; ++f) {
    const V by = broadcast<V>(weight[f]), plus = broadcast<V>(bias[f]);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const V x = (load<V>(z + f * P + v * N) - mean[v]) * r[v];
      if (normalized) store(normalized + f * P + v * N, x);
      store(z + f * P + v * N, at_least(low, madd(x, by, plus)));
    }
  }
}

// g, the gradient by what a norm puts out, becomes that by what it reads: with x what it normalized,
// r (w g - mean(w g) - x mean(w g x)); an rms_norm has no mean(w g). Where `relu` is not nullptr and <= 0, g is
// 0. On the way g x and g are added to `sums`, [2][out] vectors: the gradients of weight and bias, lane by
// lane.
template <class Real, int NV>
void norm_columns_backward(const MLPNorm& norm, int64_t out, const Real* weight, const Real* relu,
                           Real* g, const Real* normalized, const Real* scale, Real* sums) {
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>(), C = kNormChains;
  constexpr int64_t P = kPanelOf<Real>;
  V chain[C][NV] = {}, along[C][NV] = {}, mean[NV], slope[NV];
  for (int64_t f = 0; f < out; f += C) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      if (f + c >= out) break;
      const V by = broadcast<V>(weight[f + c]);
      Real *of_weight = sums + (f + c) * N, *of_bias = of_weight + out * N;
      V sum = load<V>(of_weight), plain = load<V>(of_bias);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const int64_t at = (f + c) * P + v * N;
        const V x = load<V>(normalized + at);
        const V above = relu && load<V>(relu + at) <= V{} ? V{} : load<V>(g + at);
        const V scaled = above * by;
        chain[c][v] += scaled;
        along[c][v] = madd(scaled, x, along[c][v]);
        sum = madd(above, x, sum);
        plain += above;
      }
      store(of_weight, sum);
      store(of_bias, plain);
    }
  }
  add_chains<NV>(chain, mean);
  add_chains<NV>(along, slope);
  const V count = broadcast<V>(static_cast<Real>(out));
  for (int v = 0; v < NV; ++v) {
    mean[v] = norm.kind == NormKind::layer_norm ? mean[v] / count : V{};
    slope[v] = slope[v] / count;
  }
  for (int64_t f = 0; f < out; ++f) {
    const V by = broadcast<V>(weight[f]);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const int64_t at = f * P + v * N;
      const V above = relu && load<V>(relu + at) <= V{} ? V{} : load<V>(g + at);
      const V centred = above * by - mean[v];
      store(g + at, (centred - load<V>(normalized + at) * slope[v]) * load<V>(scale + v * N));
    }
  }
}

// f.run<NV>(panel, lane): over a tile, as many vectors at a time as a panel has; one by one in the last.
template <class Real, class F>
void for_each_column(int64_t examples, const F& f) {
  constexpr int N = lanes_of<Wide<Real>>();
  constexpr int64_t P = kPanelOf<Real>;
  for (int64_t panel = 0; panel * P < examples; ++panel) {
    const int64_t count = std::min(P, examples - panel * P);
    if (count > (kVectors - 1) * N) {
      f.template run<kVectors>(panel, 0);
    } else {
      for (int64_t b = 0; b < count; b += N) f.template run<1>(panel, b);
    }
  }
}

// What a norm leaves for its derivative: panels of what it normalized, and a number for each example.
template <class Real>
struct Normalized {
  Real *panels, *scale;
};

template <class Real>
struct NormTile {
  const MLPLayer& layer;
  const Real *weight, *bias;
  Real floor;
  Real* z;
  Normalized<Real> left;

  template <int NV>
  void run(int64_t panel, int64_t lane) const {
    constexpr int64_t P = kPanelOf<Real>;
    const int64_t at = panel * layer.out * P + lane;
    norm_columns<Real, NV>(layer.norm, layer.out, weight, bias, floor, z + at,
                           left.panels ? left.panels + at : nullptr,
                           left.scale ? left.scale + panel * P + lane : nullptr);
  }
};

template <class Real>
struct NormTileBackward {
  const MLPLayer& layer;
  const Real *weight, *relu;
  Real* g;
  Normalized<Real> left;
  Real* sums;

  template <int NV>
  void run(int64_t panel, int64_t lane) const {
    constexpr int64_t P = kPanelOf<Real>;
    const int64_t at = panel * layer.out * P + lane;
    norm_columns_backward<Real, NV>(layer.norm, layer.out, weight, relu ? relu + at : nullptr,
                                    g + at, left.panels + at, left.scale + panel * P + lane, sums);
  }
};

// --- a layer's epilogue ----------------------------------------------------------------------------

inline bool drops_before_norm(const EnsembleMLPParams& p, int64_t l) {
  return p.dropout.before_norm && p.layers[l].has_norm();
}

// Whether a backward pass reads the slope of a layer's activation off what the layer puts out: a ReLU is
// where that is not <= 0, unless it was changed on the way.
inline bool slope_shows(const MLPLayer& layer) {
  return layer.activation.kind == ActivationKind::relu && !layer.residual &&
         !(layer.has_norm() && layer.norm.after_activation);
}

// z <- act(from), and its slope where there is room for it, over the vectors of a tile that hold examples: the
// last panel may hold a few, and activations are long.
template <class Real>
void activate_tile(const Activation& activation, int64_t out, int64_t examples, const Real* from,
                   Real* z, Real* slope) {
  using V = Wide<Real>;
  constexpr int64_t P = kPanelOf<Real>;
  const auto run = [&](int64_t at, int64_t n) {
    if (slope) {
      activate_with_slope<V>(activation, from + at, z + at, slope + at, n);
    } else {
      activate<V>(activation, from + at, z + at, n);
    }
  };
  const int64_t lanes = round_up(examples % P, lanes_of<V>());
  const int64_t whole = (examples + (lanes == P ? P - 1 : 0)) / P;  // panels
  run(0, whole * out * P);
  for (int64_t u = 0; whole * P < examples && u < out; ++u) run((whole * out + u) * P, lanes);
}

// Of hidden layer l: panels of sums, which may lie in z, become z, what the next layer reads. `slope`, or nullptr: by which the
// backward pass multiplies; dropout is in it but for a rich layer. x: panels that the layer reads, where it
// has a residual. `norm`: room for twice the layer's width.
template <class A, class Real>
void hidden_epilogue(const EnsembleMLPParams& p, int64_t l, int64_t member, int64_t first,
                     int64_t examples, const Real* sums, Real* z, Real* slope, const Real* x,
                     Real* norm, Normalized<Real> left) {
  using V = Wide<Real>;
  const MLPLayer& layer = p.layers[l];
  const int64_t n = round_up(examples, kPanelOf<Real>) * layer.out;
  const bool drops = p.dropout.of(member, l) > 0, drops_early = drops && drops_before_norm(p, l);
  const bool late_norm = layer.norm.after_activation;
  if (layer.has_norm()) load_norm<A>(layer, p.parameters_of(member), norm, norm + layer.out);
  // A ReLU behind the norm is done where that stores.
  const bool relu = layer.activation.kind == ActivationKind::relu;
  const bool relu_in_norm = relu && layer.has_norm() && !late_norm;
  const NormTile<Real> run_norm{layer,
                                norm,
                                norm + layer.out,
                                relu_in_norm ? Real{0} : -std::numeric_limits<Real>::infinity(),
                                z,
                                left};

  const bool done =
      layer.activation.kind == ActivationKind::identity || fuses_relu(layer) || relu_in_norm;
  const bool activates = slope || !done;
  if (sums != z && ((layer.has_norm() && !late_norm) || !activates)) {
    std::memcpy(z, sums, static_cast<size_t>(n) * sizeof(Real));
    sums = z;
  }
  if (drops_early && !late_norm) apply_dropout<Real>(p, l, member, first, examples, z, nullptr);
  if (layer.has_norm() && !late_norm) for_each_column<Real>(examples, run_norm);
  if (activates) activate_tile(layer.activation, layer.out, examples, sums, z, slope);
  if (drops_early && late_norm) apply_dropout<Real>(p, l, member, first, examples, z, nullptr);
  if (layer.has_norm() && late_norm) for_each_column<Real>(examples, run_norm);
  if (drops && !drops_early) {
    apply_dropout<Real>(p, l, member, first, examples, z, layer.rich() ? nullptr : slope);
  }
  if (layer.residual) {
    for (int64_t i = 0; i < n; i += lanes_of<V>()) store(z + i, load<V>(z + i) + load<V>(x + i));
  }
}

// z <- act(sums) of the last layer, and its derivative where there is room for it.
template <class Real>
void output_activation(const MLPLayer& layer, int64_t examples, const Real* sums, Real* z,
                       Real* slope) {
  if (!slope && layer.activation.kind == ActivationKind::identity) return;
  activate_tile(layer.activation, layer.out, examples, sums, z, slope);
}

// The kept sums of layer l over the tile that begins with example `first`; nullptr where there are none.
template <class Real>
Real* kept_sums(const EnsembleMLPParams& p, int64_t member, int64_t l, int64_t first) {
  if (!p.kept || !keeps(p, l)) return nullptr;
  const int64_t units = member * kept_units_before(p, p.num_layers) + kept_units_before(p, l);
  return static_cast<Real*>(p.kept) + kept_rows(p.batch) * units + first * p.layers[l].out;
}

// Whether nothing follows the sums of a hidden layer, as they are stored: they are what the next one reads.
inline bool sums_are_read(const EnsembleMLPParams& p, int64_t member, int64_t l) {
  const MLPLayer& layer = p.layers[l];
  const bool plain = layer.activation.kind == ActivationKind::relu && !layer.rich();
  return l + 1 < p.num_layers && plain && !(p.dropout.of(member, l) > 0);
}

// g <- g times the slope of an activation, over panels [out][kPanel]: selected where that is 0, and where the
// example's weight is, whatever the slope.
template <class Real>
void multiply_by_slope(int64_t out, int64_t examples, const Real* example_weight, const Real* slope,
                       Real* g) {
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>();
  constexpr int64_t P = kPanelOf<Real>;
  for (int64_t b = 0; b < examples; b += N) {
    const auto left_out = load<V>(example_weight + b) == V{};
    for (int64_t u = 0; u < out; ++u) {
      const int64_t at = (b / P * out + u) * P + b % P;
      const V by = load<V>(slope + at), product = load<V>(g + at) * by;
      store(g + at, left_out ? V{} : by == V{} ? V{} : product);
    }
  }
}

}  // namespace pyens::PYENS_ISA::ensemble_mlp
