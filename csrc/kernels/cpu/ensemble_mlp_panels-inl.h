// The ensemble MLP with examples in the lanes.
//
// Bound by multiply-adds. A tile of examples goes through all layers of one member. It lies in
// panels [feature][kPanel], so an activation is a row of vectors, a weight is a broadcast from
// [out, in] as it is, and widths like 50 or 1 waste no lane. A block of kRows neurons x kVectors
// vectors stays in registers while the inputs run by: per input, kVectors loads and kRows
// broadcasts feed kRows * kVectors multiply-adds.

namespace pyens::PYENS_ISA::ensemble_mlp {

// sum[r][v] <- sum_k w(r, k) x[k] for R rows and NV vectors of examples. w(r, k) is w[r][k], or
// kTransposed w[k][r].
template <class A, bool kTransposed, int R, int NV, class V>
inline __attribute__((always_inline)) void panel_products(const typename A::Real* w,
                                                          int64_t w_stride,
                                                          const typename A::Real* x,
                                                          int64_t k_count, V (&sum)[R][NV]) {
  constexpr int N = lanes_of<V>();
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[r][v] = V{};
  }
  RowNumbers<typename A::Real, R> weights(w, kTransposed ? 1 : w_stride);
  for (int64_t k = 0; k < k_count; ++k, x += kPanel<A>) {
    V input[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) input[v] = load<V>(x + v * N);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V weight = broadcast<V>(weights[r]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[r][v] = A::product(weight, input[v], sum[r][v]);
    }
    weights.advance(kTransposed ? w_stride : 1);
  }
}

// z[r] <- max(floor, (first ? bias[r] : z[r]) + sum_k w[r][k] x[k])
template <class A>
struct ForwardBlock {
  using Real = typename A::Real;
  const Real* w;
  int64_t w_stride;
  const Real* x;
  int64_t k_count;
  Real* z;
  const Real* bias;
  bool first;
  Real floor;
  Ahead* ahead;  // nullptr: nothing to ask for

  template <int R, int NV, class V>
  void run(int64_t row) const {
    if (ahead) ahead->ask();
    V sum[R][NV];
    panel_products<A, false, R, NV>(w + row * w_stride, w_stride, x, k_count, sum);
    const V low = broadcast<V>(floor);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        Real* out = z + (row + r) * kPanel<A> + v * lanes_of<V>();
        const V base = first ? broadcast<V>(bias[row + r]) : load<V>(out);
        store(out, at_least(low, base + sum[r][v]));
      }
    }
  }
};

// block.run<R, NV, V>(row) for all rows, over the vectors that hold the panel's examples.
template <class A, class Block>
void run_panel(int64_t rows, int64_t examples, const Block& block) {
  constexpr int kLanes = kWideLanes<typename A::Real>;
  using V = WideOf<A>;
  if constexpr (kVectors == 4) {
    if (examples > 3 * kLanes) return run_rows<4, V>(rows, block);
    if (examples > 2 * kLanes) return run_rows<3, V>(rows, block);
  }
  if (examples > kLanes) return run_rows<2, V>(rows, block);
  if (examples > kNarrowLanes<typename A::Real>) return run_rows<1, V>(rows, block);
  run_rows<1, NarrowOf<A>>(rows, block);
}

// The tile's rows of [B, I] into panels [unit][kPanel]; lanes without an example are 0, and so are
// examples whose weight is 0.
template <class A>
void to_panels(const typename A::Elem* rows, int64_t row_stride, int64_t examples, int64_t in,
               typename A::Real* panels, const typename A::Real* example_weight = nullptr) {
  using V = NarrowOf<A>;
  constexpr int N = lanes_of<V>();
  const int64_t unit_count = units<A>(in);
  for (int64_t b = 0; b < round_up(examples, kWideLanes<typename A::Real>); b += N) {
    auto* panel = panels + b / kPanel<A> * kPanel<A> * unit_count + b % kPanel<A>;
    for (int64_t u = 0; u < unit_count; u += N) {
      V r[N];
      for (int i = 0; i < N; ++i) {
        const bool present =
            b + i < examples && (example_weight == nullptr || example_weight[b + i] != 0);
        r[i] = present ? A::load_units(rows + (b + i) * row_stride, u, in) : V{};
      }
      transpose(r);
      const int64_t n = std::min<int64_t>(N, unit_count - u);
      for (int64_t i = 0; i < n; ++i) store(panel + (u + i) * kPanel<A>, r[i]);
    }
  }
}

// Panels [out][kPanel] to rows of [B, O], contiguous.
template <class A>
void from_panels(const typename A::Real* panels, int64_t examples, int64_t out,
                 typename A::Elem* rows) {
  using V = NarrowOf<A>;
  constexpr int N = lanes_of<V>();
  for (int64_t b = 0; b < examples; b += N) {
    const auto* panel = panels + b / kPanel<A> * kPanel<A> * out + b % kPanel<A>;
    if (out == 1) {
      store_first<typename A::Real>(rows + b, load<V>(panel), examples - b);
      continue;
    }
    for (int64_t o = 0; o < out; o += N) {
      V r[N];
      for (int i = 0; i < N; ++i) r[i] = o + i < out ? load<V>(panel + (o + i) * kPanel<A>) : V{};
      transpose(r);
      const int64_t n = std::min<int64_t>(N, examples - b);
      for (int64_t i = 0; i < n; ++i) {
        store_first<typename A::Real>(rows + (b + i) * out + o, r[i], out - o);
      }
    }
  }
}

// What becomes of the sums of a block of inputs for some rows, as in ForwardBlock.
template <class Real>
struct SparseSums {
  Real* z;
  const Real* bias;
  bool first;
  Real floor;

  template <int R, int NV, class V>
  inline __attribute__((always_inline)) void finish(const ListedRows& row, V (&sum)[R][NV]) const {
    const V low = broadcast<V>(floor);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      Real* const out = z + row(r) * kPanelOf<Real>;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        Real* const at = out + v * lanes_of<V>();
        const V base = first ? broadcast<V>(bias[row(r)]) : load<V>(at);
        store(at, at_least(low, base + sum[r][v]));
      }
    }
  }
};

template <class Real>
struct PanelOffset {
  inline __attribute__((always_inline)) int64_t operator()(uint8_t column) const {
    return column * kPanelOf<Real>;
  }
};

// forward_layer of a layer whose weights are sparse.
template <class A>
void sparse_layer(const MLPLayer& layer, int64_t member, int64_t examples,
                  const typename A::Real* x, typename A::Real* z, typename A::Real* bias) {
  using Real = typename A::Real;
  using V = WideOf<A>;
  constexpr int64_t P = kPanel<A>, N = lanes_of<V>();
  const int64_t blocks = sparse_blocks(layer.in);
  load_bias<A>(layer, member, bias);
  for (int64_t panel = 0; panel * P < examples; ++panel) {
    const int64_t vectors = (std::min(P, examples - panel * P) + N - 1) / N;
    for (int64_t b = 0; b < blocks; ++b) {
      const Real* at[kVectors];
      for (int v = 0; v < kVectors; ++v) at[v] = x + (panel * layer.in + b * kBlock) * P + v * N;
      const SparseBlock<Real> block(*sparse_rows(layer.weight), member, b, blocks, layer.out);
      const SparseSums<Real> sums{z + panel * layer.out * P, bias, b == 0,
                                  relu_floor<Real>(layer, b + 1 == blocks)};
      run_sparse_vectors<V>(vectors, block, at, PanelOffset<Real>{}, sums);
    }
  }
}

// z <- W x + b of one layer over one tile, and its ReLU if it has one.
template <class A>
void forward_layer(const MLPLayer& layer, int64_t member, int64_t examples,
                   const typename A::Real* x, typename A::Real* z, typename A::Real* weights,
                   typename A::Real* bias) {
  using Real = typename A::Real;
  constexpr int64_t P = kPanel<A>;
  if constexpr (A::kDirect) {
    if (sparse_rows(layer.weight)) return sparse_layer<A>(layer, member, examples, x, z, bias);
  }
  const int64_t unit_count = units<A>(layer.in);
  const int64_t panels = (examples + P - 1) / P;
  load_bias<A>(layer, member, bias);
  for (int64_t row = 0; row < layer.out; row += kNeuronBlock) {
    const int64_t rows = std::min(kNeuronBlock, layer.out - row);
    for (int64_t k = 0; k < unit_count; k += kBlockUnits<A>) {
      const int64_t k_count = std::min(kBlockUnits<A>, unit_count - k);
      const int64_t next = k + k_count < unit_count ? row : row + rows;
      const int64_t column = next == row ? (k + k_count) * A::kPerUnit : 0;
      Ahead ahead;
      if (next < layer.out && is_far<A>(layer)) {
        ahead =
            weights_ahead<A>(layer, member, next, std::min(kNeuronBlock, layer.out - next), column,
                             std::min(kBlock, layer.in - column), row_blocks(rows) * panels);
      }
      ForwardBlock<A> block;
      block.ahead = ahead.at ? &ahead : nullptr;
      block.w = A::weight_block(layer, member, row, rows, k, k_count, examples >= kOften, weights,
                                &block.w_stride);
      block.k_count = k_count;
      block.bias = bias + row;
      block.first = k == 0;
      block.floor = relu_floor<Real>(layer, k + k_count == unit_count);
      for (int64_t panel = 0; panel * P < examples; ++panel) {
        block.x = x + (panel * unit_count + k) * P;
        block.z = z + (panel * layer.out + row) * P;
        run_panel<A>(rows, examples - panel * P, block);
      }
    }
  }
}

// Zeros in the lanes behind the last example, up to `end`, for sums over all lanes: there may be anything.
template <class Real>
void clear_lanes(Real* panels, int64_t width, int64_t examples, int64_t end) {
  constexpr int64_t P = kPanelOf<Real>;
  for (int64_t b = examples; b < end;) {
    const int64_t next = std::min(b / P * P + P, end);
    for (int64_t u = 0; u < width; ++u) {
      Real* lanes = panels + (b / P * width + u) * P;
      std::fill(lanes + b % P, lanes + b % P + (next - b), Real{0});
    }
    b = next;
  }
}
template <class Real>
void clear_padding(Real* panels, int64_t width, int64_t examples) {
  clear_lanes(panels, width, examples, round_up(examples, lanes_of<Wide<Real>>()));
}

// The hidden layers of a tile, panels [out][kPanel] of each, to rows: see write_strengths.
template <class A>
struct GatherPanels {
  const EnsembleMLPParams& p;
  const Scratch<A>& scratch;

  void operator()(int64_t b, int64_t /*count*/) const {
    using V = NarrowOf<A>;
    constexpr int N = lanes_of<V>();
    const StrengthScratch<A>& s = scratch.strength;
    auto* rows = s.rows;
    for (int64_t l = 0; l + 1 < p.num_layers; ++l) {
      const int64_t out = p.layers[l].out;
      const auto* panel = scratch.output_of(p, l) + b / kPanel<A> * kPanel<A> * out + b % kPanel<A>;
      for (int64_t o = 0; o < out; o += N) {
        V r[N];  // what is behind the last unit is overwritten by the next layer
#pragma GCC unroll 8
        for (int64_t i = 0; i < N; ++i) {
          r[i] = load<V>(panel + std::min(o + i, out - 1) * kPanel<A>);
        }
        transpose(r);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) store(rows + i * s.row_stride + o, r[i]);
      }
      rows += out;
    }
  }
};

// All layers of one member over one tile, [first, first + examples), that lies in scratch.input.
template <class A>
void forward_tile(const EnsembleMLPParams& p, int64_t member, int64_t first, int64_t examples,
                  const Scratch<A>& scratch, typename A::Elem* output) {
  using Real = typename A::Real;
  constexpr int64_t P = kPanel<A>;
  const int64_t panel_count = (examples + P - 1) / P;
  const Real* x = scratch.input;  // in units
  const Real* plain = nullptr;    // the same, not in units
  for (int64_t l = 0; l < p.num_layers; ++l) {
    const MLPLayer& layer = p.layers[l];
    const int64_t out = layer.out;
    const bool last = l + 1 == p.num_layers;
    Real* z = scratch.output_of(p, l);
    Real* const kept = kept_sums<Real>(p, member, l, first);
    Real* const sums = kept ? kept : z;
    if (layer.residual && l == 0) plain = A::plain_panels(x, panel_count, layer.in, scratch.plain);
    forward_layer<A>(layer, p.parameters_of(member), examples, x, sums, scratch.weights,
                     scratch.bias);
    if (kept) {
      const bool at_end = first + examples == p.batch;
      if (at_end) clear_lanes(kept, out, examples, kept_rows(p.batch) - first);
      if (sums_are_read(p, member, l) && !p.strength.units) z = kept;
    }
    if (last) {
      output_activation<Real>(layer, examples, sums, z, nullptr);
      from_panels<A>(z, examples, out, output);
      if (p.strength.units) {
        write_strengths<A>(p, member, first, examples, scratch.strength,
                           GatherPanels<A>{p, scratch});
      }
      return;
    }
    hidden_epilogue<A>(p, l, member, first, examples, sums, z, static_cast<Real*>(nullptr), plain,
                       scratch.norm, Normalized<Real>{});
    plain = z;
    x = A::hidden_panels(z, panel_count, out, scratch.pairs);
  }
}

template <class A>
void run_tiles(const EnsembleMLPParams& p, int64_t begin, int64_t end, const Scratch<A>& scratch) {
  using Elem = typename A::Elem;
  const int64_t out = p.layers[p.num_layers - 1].out;
  const int64_t tile = tile_size<A>(p);
  // Members run fastest: a shared input goes to panels once per tile.
  int64_t tile_in_panels = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t t = item / p.ensemble_size, m = item % p.ensemble_size;
    const int64_t first = t * tile, examples = std::min(tile, p.batch - first);
    if (p.input_member_stride != 0 || t != tile_in_panels) {
      const auto* rows = static_cast<const Elem*>(p.input) + m * p.input_member_stride +
                         first * p.input_row_stride;
      to_panels<A>(rows, p.input_row_stride, examples, p.layers[0].in, scratch.input);
      tile_in_panels = t;
    }
    auto* output = static_cast<Elem*>(p.output) + (m * p.batch + first) * out;
    forward_tile<A>(p, m, first, examples, scratch, output);
  }
}

}  // namespace pyens::PYENS_ISA::ensemble_mlp
