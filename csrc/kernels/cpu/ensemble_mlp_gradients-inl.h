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
  Ahead* ahead;  // nullptr: nothing to ask for

  template <int R, int NV, class V>
  void run(int64_t row) const {
    if (ahead) ahead->ask();
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
  const int64_t unit_count = units<A>(layer.out), panels = (examples + P - 1) / P;
  for (int64_t row = 0; row < layer.in; row += kBlock) {
    const int64_t rows = std::min(kBlock, layer.in - row);
    for (int64_t k = 0; k < unit_count; k += kBlockUnits<A>) {
      const int64_t out = (k + kBlockUnits<A>)*A::kPerUnit;
      const int64_t next = out < layer.out ? row : row + rows;
      const int64_t next_out = next == row ? out : 0;
      Ahead ahead;
      if (next < layer.in && is_far<A>(layer)) {
        ahead = weights_ahead<A>(layer, p.parameters_of(member), next_out,
                                 std::min(kBlock, layer.out - next_out), next,
                                 std::min(kBlock, layer.in - next), row_blocks(rows) * panels);
      }
      InputGradientBlock<A> block;
      block.ahead = ahead.at ? &ahead : nullptr;
      block.k_count = std::min(kBlockUnits<A>, unit_count - k);
      block.w = A::column_block(layer, p.parameters_of(member), k, block.k_count, row, rows,
                                examples >= kOften, weights, &block.w_stride);
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

// --- weight gradients ------------------------------------------------------------------------------
//
// weight[o][i] <- (first ? 0 : weight[o][i]) + sum_b g[o][b] x[i][b], block after block of examples, in one of two
// ways:
//
//   outer products   inputs in the lanes. They have to be transposed to rows first, and the last vector of a row may
//                    be part of one.
//   dot products     examples in the lanes, as they lie. Each block of sums ends in a sum across lanes.

// Whether dot products cost less, in multiply-adds of single lanes: by what was measured, a block's sums across lanes
// take as long as 56 examples, and transposing a vector of inputs as long as its products with 6 neurons.
template <class Real>
constexpr bool takes_dot_products(int64_t out, int64_t in, int64_t examples, bool has_rows) {
  constexpr int64_t N = kWideLanes<Real>;
  const int64_t rows = kNeurons<Real>, columns = N / rows;
  const int64_t pairs = out == 1 ? round_up(in, N) : round_up(out, rows) * round_up(in, columns);
  return pairs * (examples + 56) < round_up(in, N) * (out + (has_rows ? 0 : 6)) * examples;
}

// Of panels in units of examples, here and below.
template <class A>
constexpr int64_t kExamplePanel = kPanel<A> / A::kPerUnit;

// Lane r * C + c <- sum_b g[r][b] x[c][b] for R neurons and C inputs. Those behind the last repeat it.
template <class A, int R, bool kFull, class Real = typename A::Real>
Wide<Real> dot_products(const Real* g, int64_t g_stride, int64_t rows, const Real* x,
                        int64_t x_stride, int64_t columns, int64_t examples) {
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>(), C = N / R;
  constexpr int64_t P = kExamplePanel<A>;
  V sum[N] = {};
  for (int64_t first = 0; first < examples; first += P, g += g_stride, x += x_stride) {
    const int64_t count = std::min(P, examples - first);
    for (int64_t b = 0; b < count; b += N) {
      V gs[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        gs[r] = load<V>(g + (kFull ? r : std::min<int64_t>(r, rows - 1)) * P + b);
      }
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        const V xs = load<V>(x + (kFull ? c : std::min<int64_t>(c, columns - 1)) * P + b);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r * C + c] = A::product(gs[r], xs, sum[r * C + c]);
      }
    }
  }
  return sum_lanes(sum);
}

template <class A, int R, class Real = typename A::Real>
void weight_gradient_by_dot_products(const Real* g, int64_t out, const Real* x, int64_t in,
                                     int64_t examples, Real* weight, bool first) {
  constexpr int64_t P = kExamplePanel<A>;
  constexpr int C = kWideLanes<Real> / R;
  Real sums[R * C];
  for (int64_t o = 0; o < out; o += R) {
    const int64_t rows = std::min<int64_t>(R, out - o);
    for (int64_t i = 0; i < in; i += C) {
      const int64_t columns = std::min<int64_t>(C, in - i);
      const auto products =
          rows == R && columns == C ? dot_products<A, R, true> : dot_products<A, R, false>;
      store(sums, products(g + o * P, out * P, rows, x + i * P, in * P, columns, examples));
      for (int64_t r = 0; r < rows; ++r) {
        Real* to = weight + (o + r) * in + i;
        for (int64_t c = 0; c < columns; ++c) {
          to[c] = first ? sums[r * C + c] : to[c] + sums[r * C + c];
        }
      }
    }
  }
}

// Up to kVectors vectors of a row of `width` numbers, from vector `v` on. The last vector of the row steps back into
// the one before, if it can.
template <class Real>
struct Columns {
  int64_t vectors, first;  // number of them, and the first column
  int64_t last;            // where the last of them begins, from the first column on
  int64_t skip, count;     // its lanes [skip, count) are what the vector before has not done

  Columns() = default;
  Columns(int64_t width, int64_t v) {
    constexpr int64_t N = kWideLanes<Real>;
    const int64_t all = (width + N - 1) / N;
    vectors = std::min<int64_t>(kVectors, all - v);
    first = v * N;
    const int64_t end = (vectors - 1) * N;
    last = v + vectors < all || width < N ? end : std::min(end, width - N - first);
    skip = end - last;
    count = std::min(N, width - first - last);
  }
};

// z[r] <- (first ? 0 : z[r]) + sum_k a(r, k) x[k] for rows z[r] and x[k]: kVectors loads and kRows broadcasts feed
// kRows * kVectors multiply-adds. a(r, k) lies in panels [r][kPanel], or kPanels false anywhere.
template <class Real, bool kPanels>
struct RowProducts {
  using V = Wide<Real>;
  const Real* a;
  int64_t a_row, a_k;  // strides; of panels, a_row is how many rows there are, and a_k is not read
  const Real* x;       // from the first of the columns on
  int64_t x_stride, x_last;  // x_last: where the last of the vectors begins
  int64_t k_count;
  Real* z;  // likewise
  int64_t z_stride;
  Columns<Real> columns;
  bool first;
  bool far = false;  // z comes from beyond L2: asks for the next rows of it

  template <int R, int NV, class /*V*/>
  void run(int64_t row) const {
    constexpr int N = lanes_of<V>();
    constexpr int64_t P = kPanelOf<Real>;
    if (far) {
      for (int r = R; r < 2 * R; ++r) {
        for (int v = 0; v < NV; ++v) __builtin_prefetch(z + (row + r) * z_stride + v * N, 1, 3);
      }
    }
    V sum[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] = V{};
    }
    const Real* from = x;
    const auto add = [&](const auto& number) __attribute__((always_inline)) {
      V xs[NV];
#pragma GCC unroll 4
      for (int v = 0; v + 1 < NV; ++v) xs[v] = load<V>(from + v * N);
      xs[NV - 1] = kPanels ? load<V>(from + x_last) : load_lanes(from + x_last, columns.count);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V by = broadcast<V>(number(r));
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[r][v] = madd(by, xs[v], sum[r][v]);
      }
      from += x_stride;
    };
    if constexpr (kPanels) {
      for (int64_t k = 0; k < k_count; k += P) {
        const Real* panel = a + (k * a_row / P + row) * P;
        const int64_t count = std::min(P, k_count - k);
        for (int64_t i = 0; i < count; ++i, ++panel) {
          add([&](int r) __attribute__((always_inline)) { return panel[r * P]; });
        }
      }
    } else {
      RowNumbers<Real, R> numbers(a + row * a_row, a_row);
      for (int64_t k = 0; k < k_count; ++k, numbers.advance(a_k)) {
        add([&](int r) __attribute__((always_inline)) { return numbers[r]; });
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Real* to = z + (row + r) * z_stride;
#pragma GCC unroll 4
      for (int v = 0; v + 1 < NV; ++v) {
        store(to + v * N, first ? sum[r][v] : load<V>(to + v * N) + sum[r][v]);
      }
      to += columns.last;
      const V& total = sum[r][NV - 1];
      if (columns.skip == 0 && columns.count == N) {
        store(to, first ? total : load<V>(to) + total);
      } else {
        store_lanes(to, first ? total : load_lanes(to, columns.count) + total, columns.skip,
                    columns.count);
      }
    }
  }
};

template <class Products>
void run_products(int64_t rows, const Products& products) {
  using V = typename Products::V;
  switch (products.columns.vectors) {
    case 1: run_rows<1, V>(rows, products); break;
    case 2: run_rows<2, V>(rows, products); break;
    case 3: run_rows<std::min(3, kVectors), V>(rows, products); break;
    default: run_rows<kVectors, V>(rows, products); break;
  }
}

// Columns of panels [in][kPanel] to rows [example][vectors], zeros where there is no input.
template <class Real>
void panels_to_rows(const Real* x, int64_t in, const Columns<Real>& columns, int64_t examples,
                    Real* rows, int64_t stride) {
  using V = Narrow<Real>;
  constexpr int N = lanes_of<V>(), kWide = kWideLanes<Real>;
  constexpr int64_t P = kPanelOf<Real>;
  const int64_t last = (columns.vectors - 1) * kWide;
  for (int64_t b = 0; b < examples; b += N) {
    const int64_t count = std::min<int64_t>(N, examples - b);
    const Real* panel = x + b / P * in * P + b % P;
    for (int64_t c = 0; c < columns.vectors * kWide; c += N) {
      const int64_t from = columns.first + (c < last ? c : c - last + columns.last);
      V r[N];
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) r[i] = from + i < in ? load<V>(panel + (from + i) * P) : V{};
      transpose(r);
      Real* to = rows + b * stride + c;
      for (int64_t i = 0; i < count; ++i) store(to + i * stride, r[i]);
    }
  }
}

// The weight gradient of one layer over a tile, in blocks of s.block examples. x: panels. `rows`: the same as rows
// [example][in], `row_stride` apart, or nullptr where they do not lie anywhere. Pairs of examples, as units, take dot
// products; others only where each vector is full, for what lies behind the last example may be anything.
template <class A, class Real = typename A::Real>
void weight_gradient(const TrainingSchedule<A>& s, int64_t batch, bool first_layer, const Real* g,
                     int64_t out, const Real* x, int64_t in, int64_t examples, const Real* rows,
                     int64_t row_stride, Real* weight, bool first,
                     const TrainingScratch<A>& scratch) {
  constexpr int64_t N = kWideLanes<Real>;
  // Many neurons read them: from one place, not from a cache line of each of many pages.
  const bool far = row_stride >= kRowsApart<Real> && out >= 32;
  const bool has_rows = rows != nullptr && in >= N && !far;
  // Not whether they lie there in this call: sample weights would change bits.
  const bool may_have_rows = first_layer && A::kDirect && in >= N;
  const auto count = [&](int64_t b) { return std::min(s.block, examples - b); };
  const bool full = batch > kFewExamples<Real> && batch % N == 0;
  if (A::kPerUnit > 1 ||
      (full && takes_dot_products<Real>(out, in, std::min(s.block, batch), may_have_rows))) {
    const auto run = out == 1 ? weight_gradient_by_dot_products<A, 1>
                              : weight_gradient_by_dot_products<A, kNeurons<Real>>;
    for (int64_t b = 0; b < examples; b += s.block) {
      run(A::example_panels(g + b * out, count(b), out, scratch.units[0]), out,
          A::example_panels(x + b * in, count(b), in, scratch.units[1]), in, units<A>(count(b)),
          weight, first && b == 0);
    }
    return;
  }
  for (int64_t v = 0; v * N < in; v += kVectors) {
    const Columns<Real> columns(in, v);
    for (int64_t b = 0; b < examples; b += s.block) {
      RowProducts<Real, true> products{};
      products.a = g + b * out;
      products.a_row = out;
      products.k_count = count(b);
      products.z = weight + columns.first;
      products.z_stride = in;
      products.columns = columns;
      products.first = first && b == 0;
      products.far = b == 0 && out * in * static_cast<int64_t>(sizeof(Real)) >= kFarBytes;
      if (has_rows) {
        products.x = rows + b * row_stride + columns.first;
        products.x_stride = row_stride;
        products.x_last = columns.last;
      } else {
        products.x = scratch.input_rows;
        products.x_stride = columns.vectors * N;
        products.x_last = (columns.vectors - 1) * N;
        panels_to_rows(x + b * in, in, columns, count(b), scratch.input_rows, products.x_stride);
      }
      run_products(out, products);
    }
  }
}

// bias[o] <- (first ? 0 : bias[o]) + sum_b g[o][b] over a block.
template <class Real>
void bias_gradient(const Real* g, int64_t out, int64_t batch, int64_t examples, Real* bias,
                   bool first) {
  if (batch <= kFewExamples<Real>) {  // as bias_gradient_of_rows
    for (int64_t o = 0; o < out; ++o) {
      bias[o] = 0;
      for (int64_t b = 0; b < examples; ++b) bias[o] += g[o * kPanelOf<Real> + b];
    }
    return;
  }
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>();
  constexpr int64_t P = kPanelOf<Real>;
  // Lanes behind the last example hold anything.
  const auto exists = lane_numbers<Real>() < static_cast<int>(examples - (examples - 1) / N * N);
  for (int64_t o = 0; o < out; o += N) {
    const int64_t rows = std::min<int64_t>(N, out - o);
    V sum[N];
#pragma GCC unroll 16
    for (int r = 0; r < N; ++r) sum[r] = V{};
    for (int64_t b = 0; b < examples; b += N) {
      const Real* at = g + (b / P * out + o) * P + b % P;
      const bool whole = b + N <= examples;
#pragma GCC unroll 16
      for (int r = 0; r < N; ++r) {
        const V v = load<V>(at + std::min<int64_t>(r, rows - 1) * P);
        sum[r] += whole ? v : exists ? v : V{};
      }
    }
    const V total = sum_lanes(sum);
    store_lanes(bias + o, first ? total : load_lanes(bias + o, rows) + total, 0, rows);
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
    store_lanes(to + o, first ? total : load_lanes(to + o, rows) + total, 0, rows);
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

// --- a few examples --------------------------------------------------------------------------------
//
// Fewer examples than lanes: the gradients of all layers go through rows [example][feature], features in the lanes.
// Weights are read as they lie, a bias gradient is a sum of rows, and nothing is summed across lanes.

template <class Real>
void to_rows(const Real* panels, int64_t width, int64_t examples, Real* rows) {
  constexpr int64_t N = kWideLanes<Real>;
  for (int64_t v = 0; v * N < width; v += kVectors) {
    Columns<Real> columns(width, v);
    columns.last = (columns.vectors - 1) * N;
    panels_to_rows(panels, width, columns, examples, rows + v * N, row_stride<Real>(width));
  }
}

// weight[o][i] <- sum_b g[b][o] x[b][i]
template <class Real>
void weight_gradient_of_rows(const Real* g, int64_t out, const Real* x, int64_t x_stride,
                             int64_t in, int64_t examples, Real* weight) {
  for (int64_t v = 0; v * kWideLanes<Real> < in; v += kVectors) {
    const Columns<Real> columns(in, v);
    run_products(out, RowProducts<Real, false>{g, 1, row_stride<Real>(out), x + columns.first,
                                               x_stride, columns.last, examples,
                                               weight + columns.first, in, columns, true});
  }
}

// bias[o] <- sum_b g[b][o]
template <class Real>
void bias_gradient_of_rows(const Real* g, int64_t out, int64_t examples, Real* bias) {
  using V = Wide<Real>;
  constexpr int64_t N = lanes_of<V>();
  for (int64_t o = 0; o < out; o += N) {
    V sum{};
    for (int64_t b = 0; b < examples; ++b) sum += load<V>(g + b * row_stride<Real>(out) + o);
    store_lanes(bias + o, sum, 0, std::min(N, out - o));
  }
}

// The gradient of layer l's input, l > 0, as input_gradient has it. x and slope: rows of what the layer reads, and
// of the derivative of the activation there, or nullptr.
template <class A>
void input_gradient_of_rows(const EnsembleMLPParams& p, int64_t l, int64_t member, int64_t examples,
                            const typename A::Real* g, typename A::Real* result,
                            const typename A::Real* x, const typename A::Real* slope,
                            const typename A::Real* example_weight) {
  using Real = typename A::Real;
  using V = Wide<Real>;
  constexpr int64_t N = lanes_of<V>();
  const MLPLayer& layer = p.layers[l];
  const int64_t g_stride = row_stride<Real>(layer.out), stride = row_stride<Real>(layer.in);
  const Real* const w = weight_row<A>(layer, p.parameters_of(member), 0);
  for (int64_t k = 0; k < layer.out; k += kBlock) {
    for (int64_t v = 0; v * N < layer.in; v += kVectors) {
      const Columns<Real> columns(layer.in, v);
      run_products(examples,
                   RowProducts<Real, false>{
                       g + k, g_stride, 1, w + k * layer.weight.row_stride + columns.first,
                       layer.weight.row_stride, columns.last, std::min(kBlock, layer.out - k),
                       result + columns.first, stride, columns, k == 0});
    }
  }
  const bool relu = slope_shows(p.layers[l - 1]), cuts = cuts_off(p.layers[l - 1].activation.kind);
  for (int64_t b = 0; b < examples; ++b) {
    const bool left_out = example_weight[b] == 0;
    for (int64_t i = b * stride; i < (b + 1) * stride; i += N) {
      V v = load<V>(result + i);
      if (relu) v = load<V>(x + i) <= V{} ? V{} : v;
      if (slope) {
        const V by = load<V>(slope + i);
        v = cuts && by == V{} ? V{} : v * by;
      }
      store(result + i, left_out ? V{} : v);
    }
  }
}

}  // namespace pyens::PYENS_ISA::ensemble_mlp
