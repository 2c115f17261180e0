// The gradients of one tile: by what a layer reads, by its weights and biases, and back through its epilogue.

namespace pyens::PYENS_ISA::ensemble_mlp {

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

// The gradient of layer l's input, from that of its sums, in units. `add`: to what `result` holds.
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
  const int64_t unit_count = units<A>(layer.out);
  for (int64_t row = 0; row < layer.in; row += kBlock) {
    const int64_t rows = std::min(kBlock, layer.in - row);
    for (int64_t k = 0; k < unit_count; k += kBlockUnits<A>) {
      InputGradientBlock<A> block;
      block.k_count = std::min(kBlockUnits<A>, unit_count - k);
      block.w = A::column_block(layer, p.parameters_of(member), k, block.k_count, row, rows,
                                weights, &block.w_stride);
      block.first = k == 0 && !add;
      block.scale = static_cast<typename A::Real>(1 / (1 - rate));
      block.cuts = rate > 0 || (below && cuts_off(p.layers[l - 1].activation.kind));
      const bool finished = k + block.k_count == unit_count;
      for (int64_t panel = 0; panel * P < examples; ++panel) {
        const int64_t at = (panel * layer.in + row) * P;
        block.x = gradient + (panel * unit_count + k) * P;
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

// Of panels in units of examples, here and below.
template <class A>
constexpr int64_t kExamplePanel = kPanel<A> / A::kPerUnit;

// Lane r * kColumns + c <- sum_b g[r][b] x[c][b]. Rows and columns behind the last repeat it.
template <class A, bool kFull, class Real = typename A::Real>
Wide<Real> weight_gradient_block(const Real* g, int64_t g_stride, int64_t rows, const Real* x,
                                 int64_t x_stride, int64_t columns, int64_t examples) {
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>(), C = kColumns<Real>, R = kNeurons<Real>;
  constexpr int64_t P = kExamplePanel<A>;
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
        for (int c = 0; c < C; ++c) sum[r * C + c] = A::product(gs, xs[c], sum[r * C + c]);
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
template <class A, class Real = typename A::Real>
void weight_gradient(const Real* g, int64_t out, const Real* x, int64_t in, int64_t examples,
                     Real* weight, bool first, [[maybe_unused]] Real* outer_rows) {
  if constexpr (kOuterProducts) {
    if (takes_outer_products<Real>(in)) {
      return outer_weight_gradient(g, out, x, in, examples, weight, first, outer_rows);
    }
  }
  constexpr int64_t P = kExamplePanel<A>;
  constexpr int C = kColumns<Real>, R = kNeurons<Real>;
  Real sums[R * C];
  for (int64_t o = 0; o < out; o += R) {
    const int64_t rows = std::min<int64_t>(R, out - o);
    for (int64_t i = 0; i < in; i += C) {
      const int64_t columns = std::min<int64_t>(C, in - i);
      Real* to = weight + o * in + i;
      if (rows == R && columns == C) {
        store(sums, weight_gradient_block<A, true>(g + o * P, out * P, R, x + i * P, in * P, C,
                                                   examples));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) store_or_add(to + r * in + c, sums[r * C + c], first);
        }
      } else {
        store(sums, weight_gradient_block<A, false>(g + o * P, out * P, rows, x + i * P, in * P,
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

}  // namespace pyens::PYENS_ISA::ensemble_mlp
