// Decorrelation loss and its gradient on one instruction set.
//
// Forward: every pair of components is a dot product over the batch, J(J-1)/2 multiply-adds for each
// J elements read, so memory binds up to some ten components and multiply-adds above. Backward:
// grad_i = sum_j W_ij z_j, W being J x J for each label: J multiply-adds per element.
//
// Lanes run along a component's [B, K] as it lies in memory. Labels repeat with a period of
// lcm(K, lanes) elements, P vectors or "phases": what is accumulated phase by phase and lane by lane
// falls into labels at the end, and nothing is transposed. From kManyLabels on a period is one
// example, its last vector cut off.
//
// A tile of kTile periods is centred and copied [component][phase][period] into scratch, so that the
// outputs are read once, and all blocks of kRows x kColumns pairs run over it in cache. Work items
// are chunks of the batch, fixed by the shape: finish() adds their sums in order.
//
// Covariance: z is shifted by the mean of the first examples, and a row of ones takes part in the
// pairs, which gives the rest of the mean; cancellation is bounded by how far that shift is off.

#include "kernels/cpu/wide-inl.h"

namespace pyens::PYENS_ISA::decorrelation {

#if PYENS_HAS(AVX512)
constexpr int kRows = 4, kColumns = 6;        // 24 sums + 4 rows + 1 column of 32 registers
constexpr int kOutRows = 6, kOutPeriods = 4;  // 24 sums + 4 inputs + 1 weight
#else
constexpr int kRows = 3, kColumns = 3;        // 9 + 3 + 1 of 16
constexpr int kOutRows = 6, kOutPeriods = 2;  // 12 + 2 + 1
#endif
constexpr int64_t kTile = 32;  // periods
constexpr int64_t kManyLabels = 64;
constexpr int64_t kShiftExamples = 16;

template <class Real>
struct Layout {
  using V = Wide<Real>;
  static constexpr int64_t N = kWideLanes<Real>;
  bool example_is_period;
  int64_t elements, labels;     // of a component
  int64_t phases, period;       // vectors and elements of a period
  int64_t periods, chunk;       // in the batch, and of them in a work item
  int64_t chunks, blocks;       // work items: models x chunks x blocks of phases
  int64_t block_phases, group;  // phases of a work item, and of them at a time
  int64_t components, rows;     // rows: with the one of ones
  int64_t pairs, row_stride;    // of a tile, odd in vectors: rows fall into different cache sets

  explicit Layout(const DecorrelationParams& p) {
    labels = p.labels;
    elements = p.batch * labels;
    components = p.components;
    rows = components + (p.kind == DecorrelationKind::covariance);
    pairs = rows * (rows - 1) / 2;
    example_is_period = labels > kManyLabels;
    phases = example_is_period ? (labels + N - 1) / N : labels / std::gcd(labels, N);
    period = example_is_period ? labels : phases * N;
    periods = (elements + period - 1) / period;
    chunk = example_is_period ? 512 : 128;
    chunks = (periods + chunk - 1) / chunk;
    block_phases = example_is_period ? 8 : phases;
    blocks = (phases + block_phases - 1) / block_phases;
    group = std::min(block_phases, std::clamp<int64_t>(128 / rows, 1, 8));
    row_stride = (group * kTile + 1) * N;
  }

  // Elements of the vector at (period, phase), from `start` on.
  int64_t valid(int64_t q, int64_t phase, int64_t* start) const {
    *start = q * period + phase * N;
    const int64_t end = example_is_period ? (q + 1) * period : elements;
    return q < periods ? std::clamp<int64_t>(end - *start, 0, N) : 0;
  }

  int64_t pair(int64_t i, int64_t j) const { return i * (2 * rows - i - 1) / 2 + j - i - 1; }
};

template <class Real>
struct Scratch {
  Real* tile;      // [row][phase][period] vectors
  Real* centre;    // [2][component][phase] vectors
  Real* sums;      // forward: [pair][phase] vectors
  Real* weights;   // backward: [i][j][phase] vectors; [i][j] numbers for one label
  int64_t* label;  // [phase][lane], or -1
  size_t bytes;

  Scratch(const Layout<Real>& l, void* base) {
    bytes = 0;
    auto take = [&](auto*& pointer, int64_t n) {
      using T = std::remove_reference_t<decltype(*pointer)>;
      pointer = base ? reinterpret_cast<T*>(static_cast<char*>(base) + bytes) : nullptr;
      bytes += (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    };
    take(tile, l.rows * l.row_stride);
    take(centre, 2 * l.components * l.group * l.N);
    take(sums, std::max(l.pairs, l.components * l.components) * l.group * l.N);
    weights = sums;
    take(label, l.group * l.N);
  }
};

// What the scratch holds: items of one model and phase share it.
struct Loaded {
  int64_t model = -1, phase = -1;
  template <class Item>
  bool same(const Item& item, int64_t its_phase) {
    const bool is = model == item.model && phase == its_phase;
    model = item.model;
    phase = its_phase;
    return is;
  }
};

// A work item's place in the batch.
struct Item {
  int64_t model, chunk, phase_begin, phase_end, q_begin, q_end;
  template <class Real>
  Item(const Layout<Real>& l, int64_t index) {
    const int64_t block = index % l.blocks;
    chunk = index / l.blocks % l.chunks;
    model = index / l.blocks / l.chunks;
    phase_begin = block * l.block_phases;
    phase_end = std::min(l.phases, phase_begin + l.block_phases);
    q_begin = chunk * l.chunk;
    q_end = std::min(l.periods, q_begin + l.chunk);
  }
};

// Loads the labels of the lanes of a group of phases, and what is subtracted to centre them. The
// forward pass knows no offset yet.
template <class Real>
void load_group(const DecorrelationParams& p, const Layout<Real>& l, int64_t model, int64_t phase,
                int64_t phase_count, bool with_offset, const Scratch<Real>& s) {
  const int64_t lanes = phase_count * l.N;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t slot = phase * l.N + lane;
    s.label[lane] = !l.example_is_period ? slot % l.labels : slot < l.labels ? slot : -1;
  }
  if (p.kind != DecorrelationKind::covariance) return;
  const auto* source = static_cast<const Real*>(p.centre) + model * l.components * l.labels;
  const int64_t half = l.components * l.group * l.N;
  for (int64_t j = 0; j < l.components; ++j) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t k = s.label[lane], at = j * l.group * l.N + lane, from = j * l.labels + k;
      s.centre[at] = k < 0 ? 0 : source[from];
      s.centre[half + at] =
          k < 0 || !with_offset ? 0 : source[p.models * l.components * l.labels + from];
    }
  }
}

template <class Real>
Wide<Real> first_lanes(Wide<Real> v, int64_t n) {
  Real all[kWideLanes<Real>] = {};
  std::memcpy(all, &v, static_cast<size_t>(n) * sizeof(Real));
  return load<Wide<Real>>(all);
}

// Copies periods [q, q + count) of a group of phases into the tile, centred and padded with zeros.
template <class T, class Real>
void load_tile(const DecorrelationParams& p, const Layout<Real>& l, int64_t model, int64_t q,
               int64_t count, int64_t phase, int64_t phase_count, const Scratch<Real>& s) {
  using V = Wide<Real>;
  const bool covariance = p.kind == DecorrelationKind::covariance;
  const bool whole = l.example_is_period
                         ? q + count <= l.periods && (phase + phase_count) * l.N <= l.labels
                         : (q + count) * l.period <= l.elements;
  for (int64_t j = 0; j < l.rows; ++j) {
    const bool ones = j == l.components;
    const T* source = static_cast<const T*>(p.outputs) + model * p.model_stride +
                      (ones ? 0 : j * p.component_stride);
    const Real* shift = s.centre + j * l.group * l.N;
    const Real* offset = shift + l.components * l.group * l.N;
    for (int64_t f = 0; f < phase_count; ++f) {
      Real* to = s.tile + j * l.row_stride + f * kTile * l.N;
      if (whole && !ones) {
        const T* from = source + q * l.period + (phase + f) * l.N;
        if (covariance) {
          const V first = load<V>(shift + f * l.N), second = load<V>(offset + f * l.N);
          for (int64_t i = 0; i < count; ++i) {
            store(to + i * l.N, load_wide<Real>(from + i * l.period) - first - second);
          }
        } else {
          for (int64_t i = 0; i < count; ++i) {
            store(to + i * l.N, load_wide<Real>(from + i * l.period));
          }
        }
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        int64_t start;
        const int64_t valid = l.valid(q + i, phase + f, &start);
        V v{};
        if (valid > 0) {
          v = ones ? broadcast<V>(Real{1}) : load_wide_first<Real>(source + start, valid);
          if (covariance && !ones) v = v - load<V>(shift + f * l.N) - load<V>(offset + f * l.N);
          if (valid < l.N) v = first_lanes<Real>(v, valid);
        }
        store(to + i * l.N, v);
      }
    }
  }
  if (p.kind != DecorrelationKind::residue) return;
  // Relative to the first component, so that a common offset cancels exactly; unless it is so far off that the
  // difference overflows.
  const V far = broadcast<V>(static_cast<Real>(sizeof(Real) == 8 ? 0x1p970 : 0x1p102));
  const V j_count = broadcast<V>(static_cast<Real>(l.components));
  for (int64_t f = 0; f < phase_count; ++f) {
    for (int64_t i = 0; i < count; ++i) {
      Real* x = s.tile + (f * kTile + i) * l.N;
      V first = load<V>(x);
      first = first < far && first > -far ? first : V{};
      V sum{};
      for (int64_t j = 0; j < l.components; ++j) sum += load<V>(x + j * l.row_stride) - first;
      const V mean = sum / j_count;
      for (int64_t j = 0; j < l.components; ++j) {
        store(x + j * l.row_stride, load<V>(x + j * l.row_stride) - first - mean);
      }
    }
  }
}

// --- forward -------------------------------------------------------------------------------------

// sums[pair(i + r, j + c)] += sum_q x[i + r][q] x[j + c][q], for the pairs in order among them.
template <int R, int C, class Real>
void pair_block(const Layout<Real>& l, int64_t i, int64_t j, const Real* x, int64_t count,
                Real* sums) {
  using V = Wide<Real>;
  const Real *rows = x + i * l.row_stride, *columns = x + j * l.row_stride;
  V sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[r][c] = V{};
  }
  for (int64_t q = 0; q < count; ++q) {
    V row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = load<V>(rows + r * l.row_stride + q * l.N);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const V column = load<V>(columns + c * l.row_stride + q * l.N);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][c] = madd(row[r], column, sum[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      if (j + c <= i + r) continue;
      Real* at = sums + l.pair(i + r, j + c) * l.group * l.N;
      store(at, load<V>(at) + sum[r][c]);
    }
  }
}

template <int R, int C, class Real>
void pair_blocks(int64_t r, int64_t c, const Layout<Real>& l, int64_t i, int64_t j, const Real* x,
                 int64_t count, Real* sums) {
  if constexpr (R > 1) {
    if (r < R) return pair_blocks<R - 1, C>(r, c, l, i, j, x, count, sums);
  }
  if constexpr (C > 1) {
    if (c < C) return pair_blocks<R, C - 1>(r, c, l, i, j, x, count, sums);
  }
  pair_block<R, C>(l, i, j, x, count, sums);
}

template <class T, class Real>
void run(const DecorrelationParams& p, int64_t begin, int64_t end, void* base) {
  const Layout<Real> l(p);
  const Scratch<Real> s(l, base);
  Loaded loaded;
  for (int64_t index = begin; index < end; ++index) {
    const Item item(l, index);
    Real* partial =
        static_cast<Real*>(p.partials) + (item.model * l.chunks + item.chunk) * l.pairs * l.labels;
    const int64_t label_begin = l.example_is_period ? item.phase_begin * l.N : 0;
    const int64_t label_end =
        l.example_is_period ? std::min(l.labels, item.phase_end * l.N) : l.labels;
    for (int64_t pair = 0; pair < l.pairs; ++pair) {
      std::fill(partial + pair * l.labels + label_begin, partial + pair * l.labels + label_end, 0);
    }
    for (int64_t phase = item.phase_begin; phase < item.phase_end; phase += l.group) {
      const int64_t phase_count = std::min(l.group, item.phase_end - phase);
      if (!loaded.same(item, phase)) {
        load_group(p, l, item.model, phase, phase_count, /*with_offset=*/false, s);
      }
      std::fill(s.sums, s.sums + l.pairs * l.group * l.N, 0);
      for (int64_t q = item.q_begin; q < item.q_end; q += kTile) {
        const int64_t count = std::min(kTile, item.q_end - q);
        load_tile<T>(p, l, item.model, q, count, phase, phase_count, s);
        for (int64_t f = 0; f < phase_count; ++f) {
          const Real* x = s.tile + f * kTile * l.N;
          for (int64_t i = 0; i + 1 < l.rows; i += kRows) {
            for (int64_t j = i + 1; j < l.rows; j += kColumns) {
              pair_blocks<kRows, kColumns>(std::min<int64_t>(kRows, l.rows - 1 - i),
                                           std::min<int64_t>(kColumns, l.rows - j), l, i, j, x,
                                           count, s.sums + f * l.N);
            }
          }
        }
      }
      for (int64_t pair = 0; pair < l.pairs; ++pair) {
        for (int64_t f = 0; f < phase_count; ++f) {
          const Real* sum = s.sums + (pair * l.group + f) * l.N;
          if (l.labels == 1) {
            partial[pair] += sum_lanes(load<Wide<Real>>(sum));
            continue;
          }
          for (int64_t lane = 0; lane < l.N; ++lane) {
            const int64_t k = s.label[f * l.N + lane];
            if (k >= 0) partial[pair * l.labels + k] += sum[lane];
          }
        }
      }
    }
  }
}

template <class T, class Real>
void prepare(const DecorrelationParams& p) {
  if (p.kind != DecorrelationKind::covariance) return;
  const int64_t examples = std::min(kShiftExamples, p.batch);
  auto* centre = static_cast<Real*>(p.centre);
  for (int64_t m = 0; m < p.models; ++m) {
    for (int64_t j = 0; j < p.components; ++j, centre += p.labels) {
      const T* source =
          static_cast<const T*>(p.outputs) + m * p.model_stride + j * p.component_stride;
      std::fill(centre, centre + p.labels, 0);
      for (int64_t b = 0; b < examples; ++b) {
        for (int64_t k = 0; k < p.labels; ++k) centre[k] += to_float(source[b * p.labels + k]);
      }
      for (int64_t k = 0; k < p.labels; ++k) {
        centre[k] /= static_cast<Real>(std::max<int64_t>(examples, 1));
      }
    }
  }
}

// Adds the chunks' sums in double, in order.
template <class Real>
void finish(const DecorrelationParams& p) {
  const Layout<Real> l(p);
  const int64_t components = l.components, labels = l.labels;
  const double batch = static_cast<double>(p.batch);
  const bool covariance = p.kind == DecorrelationKind::covariance;
  std::vector<double> loss(static_cast<size_t>(labels));
  std::vector<double> offset(static_cast<size_t>(covariance ? components * labels : 0));
  for (int64_t m = 0; m < p.models; ++m) {
    const Real* partials = static_cast<const Real*>(p.partials) + m * l.chunks * l.pairs * labels;
    const auto mean_over_batch = [&](int64_t pair, int64_t k) {
      double sum = 0;
      for (int64_t c = 0; c < l.chunks; ++c) sum += partials[(c * l.pairs + pair) * labels + k];
      return sum / batch;
    };
    if (covariance) {
      Real* saved = static_cast<Real*>(p.centre) + (p.models + m) * components * labels;
      for (int64_t j = 0; j < components; ++j) {
        for (int64_t k = 0; k < labels; ++k) {
          const double mean = mean_over_batch(l.pair(j, components), k);
          offset[static_cast<size_t>(j * labels + k)] = mean;
          saved[j * labels + k] = static_cast<Real>(mean);
        }
      }
    }
    Real* correlations = static_cast<Real*>(p.correlations) + m * labels * components * components;
    std::fill(loss.begin(), loss.end(), 0.0);
    for (int64_t i = 0; i < components; ++i) {
      for (int64_t k = 0; k < labels; ++k) {
        correlations[(k * components + i) * components + i] = 0;
      }
      for (int64_t j = i + 1; j < components; ++j) {
        for (int64_t k = 0; k < labels; ++k) {
          double c = mean_over_batch(l.pair(i, j), k);
          if (covariance) {
            const double of_i = offset[static_cast<size_t>(i * labels + k)];
            const double of_j = offset[static_cast<size_t>(j * labels + k)];
            // An infinite mean leaves NaN; a sum that overflowed stays infinite.
            if (!std::isfinite(of_i) || !std::isfinite(of_j)) {
              c = std::numeric_limits<double>::quiet_NaN();
            } else if (!std::isinf(c)) {
              c -= of_i * of_j;
            }
          }
          Real* of_label = correlations + k * components * components;
          of_label[i * components + j] = of_label[j * components + i] = static_cast<Real>(c);
          loss[static_cast<size_t>(k)] += c * c;
        }
      }
    }
    if (p.sum_labels) {
      double sum = 0;
      for (const double of_label : loss) sum += of_label;
      static_cast<Real*>(p.loss)[m] = static_cast<Real>(sum);
    } else {
      Real* out = static_cast<Real*>(p.loss) + m * labels;
      for (int64_t k = 0; k < labels; ++k) out[k] = static_cast<Real>(loss[static_cast<size_t>(k)]);
    }
  }
}

// --- backward ------------------------------------------------------------------------------------

// d loss / d z_i = sum_j W_ij z_j with W = 2/B grad_loss C, diagonal 0. The gradient of removing the
// mean over the batch removes what is 0 already, as the z_j sum to 0; that of removing the mean over
// the components takes from each column of W its mean.
template <class Real>
void load_weights(const DecorrelationParams& p, const Layout<Real>& l, int64_t model,
                  int64_t phase_count, const Scratch<Real>& s) {
  const int64_t n = l.components;
  const bool one_label = l.labels == 1;
  const auto* correlations = static_cast<const Real*>(p.correlations) + model * l.labels * n * n;
  const auto* grad = static_cast<const Real*>(p.grad_loss) + model * (p.sum_labels ? 1 : l.labels);
  for (int64_t lane = 0; lane < (one_label ? 1 : phase_count * l.N); ++lane) {
    const int64_t k = s.label[lane];
    const Real* of_label = correlations + k * n * n;
    const Real scale = k < 0 ? 0 : 2 * grad[p.sum_labels ? 0 : k] / static_cast<Real>(p.batch);
    for (int64_t j = 0; j < n; ++j) {
      Real mean = 0;
      if (p.kind == DecorrelationKind::residue && k >= 0) {
        for (int64_t i = 0; i < n; ++i) mean += of_label[j * n + i];
        mean /= static_cast<Real>(n);
      }
      for (int64_t i = 0; i < n; ++i) {
        const Real w = k < 0 ? 0 : scale * (of_label[j * n + i] - mean);
        s.weights[one_label ? i * n + j : (i * n + j) * l.group * l.N + lane] = w;
      }
    }
  }
}

// kOutPeriods vectors of R rows i, i + 1, ... of the gradient.
template <int R, bool kOneLabel, class T, class Real>
void gradient_block(const Layout<Real>& l, const Real* weights, const Real* x, T* out, int64_t q,
                    int64_t phase) {
  using V = Wide<Real>;
  const int64_t column = kOneLabel ? 1 : l.group * l.N, row = column * l.components;
  V sum[R][kOutPeriods];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kOutPeriods; ++v) sum[r][v] = V{};
  }
  for (int64_t j = 0; j < l.components; ++j) {
    V input[kOutPeriods];
#pragma GCC unroll 8
    for (int v = 0; v < kOutPeriods; ++v) input[v] = load<V>(x + j * l.row_stride + v * l.N);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Real* w = weights + r * row + j * column;
      V weight;
      if constexpr (kOneLabel) {
        weight = broadcast<V>(*w);
      } else {
        weight = load<V>(w);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kOutPeriods; ++v) sum[r][v] = madd(weight, input[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kOutPeriods; ++v) {
    int64_t start;
    const int64_t valid = l.valid(q + v, phase, &start);
    if (valid == 0) return;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      store_wide_first<Real>(out + r * l.elements + start, sum[r][v], valid);
    }
  }
}

template <int R, bool kOneLabel, class T, class Real>
void gradient_rows(int64_t r, const Layout<Real>& l, const Real* weights, const Real* x, T* out,
                   int64_t q, int64_t phase) {
  if constexpr (R > 1) {
    if (r < R) return gradient_rows<R - 1, kOneLabel>(r, l, weights, x, out, q, phase);
  }
  gradient_block<R, kOneLabel>(l, weights, x, out, q, phase);
}

template <class T, class Real>
void run_backward(const DecorrelationParams& p, int64_t begin, int64_t end, void* base) {
  Layout<Real> l(p);
  l.rows = l.components;  // the row of ones has done its work
  const Scratch<Real> s(l, base);
  const bool one_label = l.labels == 1;
  Loaded loaded;
  for (int64_t index = begin; index < end; ++index) {
    const Item item(l, index);
    for (int64_t phase = item.phase_begin; phase < item.phase_end; phase += l.group) {
      const int64_t phase_count = std::min(l.group, item.phase_end - phase);
      if (!loaded.same(item, phase)) {
        load_group(p, l, item.model, phase, phase_count, /*with_offset=*/true, s);
        load_weights(p, l, item.model, phase_count, s);
      }
      for (int64_t q = item.q_begin; q < item.q_end; q += kTile) {
        const int64_t count = std::min(kTile, item.q_end - q);
        const int64_t padded = (count + kOutPeriods - 1) / kOutPeriods * kOutPeriods;
        load_tile<T>(p, l, item.model, q, padded, phase, phase_count, s);
        for (int64_t v = 0; v < count; v += kOutPeriods) {
          for (int64_t f = 0; f < phase_count; ++f) {
            const Real* x = s.tile + (f * kTile + v) * l.N;
            for (int64_t i = 0; i < l.components; i += kOutRows) {
              const int64_t rows = std::min<int64_t>(kOutRows, l.components - i);
              T* out =
                  static_cast<T*>(p.grad_outputs) + (item.model * l.components + i) * l.elements;
              if (one_label) {
                gradient_rows<kOutRows, true>(rows, l, s.weights + i * l.components, x, out, q + v,
                                              phase + f);
              } else {
                const Real* w = s.weights + (i * l.components * l.group + f) * l.N;
                gradient_rows<kOutRows, false>(rows, l, w, x, out, q + v, phase + f);
              }
            }
          }
        }
      }
    }
  }
}

template <class Real>
int64_t work_items(const DecorrelationParams& p) {
  const Layout<Real> l(p);
  return p.models * l.chunks * l.blocks;
}

template <class Real>
size_t scratch_bytes(const DecorrelationParams& p) {
  return Scratch<Real>(Layout<Real>(p), nullptr).bytes;
}

template <class Real>
int64_t partials_size(const DecorrelationParams& p) {
  const Layout<Real> l(p);
  return p.models * l.chunks * l.pairs * l.labels;
}

template <class T, class Real>
constexpr DecorrelationFunctions kFunctions = {
    work_items<Real>, scratch_bytes<Real>, partials_size<Real>,   prepare<T, Real>,
    run<T, Real>,     finish<Real>,        run_backward<T, Real>,
};

}  // namespace pyens::PYENS_ISA::decorrelation
