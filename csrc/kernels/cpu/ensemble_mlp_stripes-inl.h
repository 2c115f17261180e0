// The ensemble MLP with neurons in the lanes, for small batches.
//
// The weights of a group of up to kGroup stripes of N neurons lie [unit][stripe][N], one stream to
// read: transposed 8 x 8 in registers on the way, or beforehand by prepack(). Bound by reading the
// weights (32 bytes a cycle from L2) when they are prepacked, by loads and shuffles (16 each for 64
// weights) when they are not. Neurons rather than members, because a stripe then reads one row of
// activations for all its lanes, and any number of members runs as well.

namespace pyens::PYENS_ISA::ensemble_mlp {

// What stripe_block reads and writes: stripes of neurons x examples x members.
template <class A>
struct StripeBlock {
  using Real = typename A::Real;
  const Real* w;  // [member][unit][stripe][N]
  int64_t w_unit, w_member;
  const Real* x;  // [member][example][unit]
  int64_t x_example, x_member;
  int64_t k_count;
  Real* z;  // [member][example][neuron]
  int64_t z_example, z_member;
  const Real* bias;  // [member][neuron]
  int64_t bias_member;
  bool first;
  Real floor;
};

// z = max(floor, (first ? bias : z) + sum_k w[..][k] x[..][k]) for S stripes, NB examples, M
// members of the block, from `stripe` and `example` on. (The block goes by reference: copying it
// right after it was written stalls for longer than a narrow layer takes.)
template <class A, int S, int NB, int M>
void stripe_block(const StripeBlock<A>& p, int64_t stripe, int64_t example) {
  using V = NarrowOf<A>;
  constexpr int N = lanes_of<V>();
  const auto* w = p.w + stripe * N;
  const auto* x = p.x + example * p.x_example;
  V sum[M][S][NB];
#pragma GCC unroll 8
  for (int i = 0; i < M * S * NB; ++i) sum[i / (S * NB)][i / NB % S][i % NB] = V{};
  for (int64_t k = 0; k < p.k_count; ++k) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      V input[NB];
#pragma GCC unroll 8
      for (int b = 0; b < NB; ++b) {
        input[b] = broadcast<V>(x[m * p.x_member + b * p.x_example + k]);
      }
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) {
        const V weight = load<V>(w + m * p.w_member + k * p.w_unit + s * N);
#pragma GCC unroll 8
        for (int b = 0; b < NB; ++b) sum[m][s][b] = A::product(weight, input[b], sum[m][s][b]);
      }
    }
  }
  const V low = broadcast<V>(p.floor);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b) {
      auto* z = p.z + m * p.z_member + (example + b) * p.z_example + stripe * N;
      const auto* bases = p.first ? p.bias + m * p.bias_member + stripe * N : z;
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) {
        store(z + s * N, at_least(low, load<V>(bases + s * N) + sum[m][s][b]));
      }
    }
  }
}

// All stripes of the block, as many at a time as keeps 8 chains in registers.
template <class A, int NB, int M>
void stripe_blocks(const StripeBlock<A>& p, int64_t stripes, int64_t example) {
  constexpr int kMost = NB == 4 ? 2 : kGroup;
  for (int64_t s = 0; s < stripes; s += kMost) {
    switch (stripes - s) {
      case 1: stripe_block<A, 1, NB, M>(p, s, example); break;
      case 2: stripe_block<A, 2, NB, M>(p, s, example); break;
      case 3: stripe_block<A, std::min(3, kMost), NB, M>(p, s, example); break;
      default: stripe_block<A, kMost, NB, M>(p, s, example); break;
    }
  }
}

// Neurons [row, row + N) x units [k, k + k_count) of [out, in], transposed: unit i at stripe + i *
// w_unit.
template <class A>
void transpose_stripe(const MLPLayer& layer, int64_t member, int64_t row, int64_t k,
                      int64_t k_count, typename A::Real* stripe, int64_t w_unit) {
  using V = NarrowOf<A>;
  constexpr int N = lanes_of<V>();
  const typename A::Elem* rows[N];
#pragma GCC unroll 8
  for (int64_t i = 0; i < N; ++i) {  // past the last neuron the last one again: never stored
    rows[i] = weight_row<A>(layer, member, std::min(row + i, layer.out - 1));
  }
  if constexpr (A::kDirect) {
    if (k_count >= N) {
      for (int64_t next = 0; next < k_count; next += N) {
        const int64_t u = std::min(next, k_count - N);  // the last block steps back: no tail
        V r[N];
        load_transposed([&](int i) { return rows[i] + k + u; }, r);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) store(stripe + (u + i) * w_unit, r[i]);
      }
      return;
    }
  }
  for (int64_t u = 0; u < k_count; u += N) {
    V r[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) r[i] = A::load_units(rows[i], k + u, layer.in);
    transpose(r);
    const int64_t n = std::min<int64_t>(N, k_count - u);
    for (int64_t i = 0; i < n; ++i) store(stripe + (u + i) * w_unit, r[i]);
  }
}

template <class A>
void transpose_group(const MLPLayer& layer, int64_t member, int64_t stripe, int64_t stripes,
                     int64_t k, int64_t k_count, typename A::Real* group) {
  constexpr int N = kNarrowLanes<typename A::Real>;
  for (int64_t s = 0; s < stripes; ++s) {
    transpose_stripe<A>(layer, member, (stripe + s) * N, k, k_count, group + s * N, stripes * N);
  }
}

template <class A>
constexpr ensemble_mlp_cpu::PrepackedLayout kPrepackedLayout = {
    kNarrowLanes<typename A::Real>, A::kPerUnit, sizeof(typename A::Real)};

template <class A>
int64_t prepacked_reals(const MLPLayer& layer) {
  return kPrepackedLayout<A>.layer_bytes(layer.out, layer.in) / kPrepackedLayout<A>.unit_bytes;
}
template <class A>
int64_t prepacked_reals(const EnsembleMLP& p) {
  int64_t reals = 0;
  for (int64_t l = 0; l < p.num_layers; ++l) reals += prepacked_reals<A>(p.layers[l]);
  return reals;
}

template <class A>
void prepack(const EnsembleMLP& p, int64_t begin, int64_t end,
             ensemble_mlp_cpu::PrepackedWeights* prepacked) {
  constexpr int N = kNarrowLanes<typename A::Real>;
  auto* at = reinterpret_cast<typename A::Real*>(prepacked + 1) + begin * prepacked_reals<A>(p);
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t l = 0; l < p.num_layers; ++l) {
      const MLPLayer& layer = p.layers[l];
      const int64_t unit_count = units<A>(layer.in), stripes = round_up(layer.out, N) / N;
      for (int64_t stripe = 0; stripe < stripes; stripe += kGroup) {
        const int64_t count = std::min<int64_t>(kGroup, stripes - stripe);
        transpose_group<A>(layer, m, stripe, count, 0, unit_count, at);
        at += count * unit_count * N;
      }
      load_bias<A>(layer, m, at);
      at += stripes * N;
    }
  }
}

// The rows that the first layer reads, converted to units if needed.
template <class A>
void small_input(const EnsembleMLPParams& p, int64_t member, int64_t members,
                 const Scratch<A>& scratch, StripeBlock<A>& block) {
  constexpr int N = kNarrowLanes<typename A::Real>;
  const auto* input =
      static_cast<const typename A::Elem*>(p.input) + member * p.input_member_stride;
  if constexpr (A::kDirect) {
    block.x = input;
    block.x_example = p.input_row_stride;
    block.x_member = p.input_member_stride;
  } else {
    const int64_t in = p.layers[0].in, row_reals = round_up(units<A>(in), N);
    for (int64_t r = 0; r < members * p.batch; ++r) {
      const auto* row =
          input + r / p.batch * p.input_member_stride + r % p.batch * p.input_row_stride;
      for (int64_t u = 0; u < units<A>(in); u += N) {
        store(scratch.input + r * row_reals + u, A::load_units(row, u, in));
      }
    }
    block.x = scratch.input;
    block.x_example = row_reals;
    block.x_member = p.batch * row_reals;
  }
}

// For one example nothing is gained by keeping the transposed weights: they feed the multiply-adds
// from the registers in which they were transposed. `p.w` is [out, in] as it is, rows `row_stride`
// apart. S full stripes from `stripe` on, or with S = 0 the first `count` rows of one.
template <class A, int S>
void transposing_block(const StripeBlock<A>& p, int64_t row_stride, int64_t stripe, int64_t count) {
  using V = NarrowOf<A>;
  constexpr int N = lanes_of<V>();
  constexpr int kStripes = S == 0 ? 1 : S;
  const auto* w = p.w + stripe * N * row_stride;
  const typename A::Real* rows[N];
#pragma GCC unroll 8
  for (int64_t i = 0; i < N; ++i) rows[i] = w + std::min(i, count - 1) * row_stride;
  const auto load_block = [&](int s, int64_t k, V(&r)[N]) __attribute__((always_inline)) {
    if constexpr (S == 0) {
      load_transposed([&](int i) { return rows[i] + k; }, r);
    } else {
      const auto* first = w + s * N * row_stride + k;
      asm("" : "+r"(first));  // or the compiler would hold S * N pointers, in spilled registers
      load_transposed([&](int i) { return first + i * row_stride; }, r);
    }
  };
  V sum[kStripes];
#pragma GCC unroll 4
  for (int s = 0; s < kStripes; ++s) sum[s] = V{};
  int64_t k = 0;
  for (; k + N <= p.k_count; k += N) {
#pragma GCC unroll 4
    for (int s = 0; s < kStripes; ++s) {
      V r[N];
      load_block(s, k, r);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) sum[s] = A::product(r[i], broadcast<V>(p.x[k + i]), sum[s]);
    }
  }
  if (k < p.k_count) {
    // The last block starts earlier, to stay in bounds, and skips the columns that are done.
    const int64_t back = p.k_count - N;
#pragma GCC unroll 4
    for (int s = 0; s < kStripes; ++s) {
      V r[N];
      load_block(s, back, r);
#pragma GCC unroll 8
      for (int i = 1; i < N; ++i) {
        if (back + i < k) continue;
        sum[s] = A::product(r[i], broadcast<V>(p.x[back + i]), sum[s]);
      }
    }
  }
  const V low = broadcast<V>(p.floor);
  auto* z = p.z + stripe * N;
  const auto* bases = p.first ? p.bias + stripe * N : z;
#pragma GCC unroll 4
  for (int s = 0; s < kStripes; ++s) {
    store(z + s * N, at_least(low, load<V>(bases + s * N) + sum[s]));
  }
}

// The last R neurons of a layer, too few for a stripe: R scalar chains, the same bits as a lane's.
template <class A, int R>
void scalar_block(const StripeBlock<A>& p, int64_t row_stride, int64_t row) {
  using Real = typename A::Real;
  const Real* w = p.w + row * row_stride;
  Real sum[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) sum[r] = 0;
  for (int64_t k = 0; k < p.k_count; ++k) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r] = madd(w[r * row_stride + k], p.x[k], sum[r]);
  }
  Real* z = p.z + row;
  const Real* bases = p.first ? p.bias + row : z;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const Real total = bases[r] + sum[r];
    z[r] = total < p.floor ? p.floor : total;
  }
}

// A group of stripes, `rows` neurons in all, at least N inputs.
template <class A>
void transposing_blocks(const StripeBlock<A>& p, int64_t row_stride, int64_t rows) {
  constexpr int N = kNarrowLanes<typename A::Real>;
  const int64_t full = rows / N;
  switch (full) {
    case 0: break;
    case 1: transposing_block<A, 1>(p, row_stride, 0, N); break;
    case 2: transposing_block<A, 2>(p, row_stride, 0, N); break;
    case 3: transposing_block<A, 3>(p, row_stride, 0, N); break;
    default: transposing_block<A, kGroup>(p, row_stride, 0, N); break;
  }
  switch (rows - full * N) {
    case 0: break;
    case 1: scalar_block<A, 1>(p, row_stride, full * N); break;
    case 2: scalar_block<A, 2>(p, row_stride, full * N); break;
    case 3: scalar_block<A, 3>(p, row_stride, full * N); break;
    case 4: scalar_block<A, 4>(p, row_stride, full * N); break;
    default: transposing_block<A, 0>(p, row_stride, full, rows - full * N); break;
  }
}

// A group of stripes of one member over the whole batch.
template <class A>
void stripe_batch(const StripeBlock<A>& p, int64_t stripes, int64_t batch) {
  int64_t b = 0;
  for (; b + 4 <= batch; b += 4) stripe_blocks<A, 4, 1>(p, stripes, b);
  for (; b + 2 <= batch; b += 2) stripe_blocks<A, 2, 1>(p, stripes, b);
  if (b < batch) stripe_blocks<A, 1, 1>(p, stripes, b);
}

// The hidden layers of a member, whose examples are rows from `row` on: see write_strengths.
template <class A>
struct GatherRows {
  const EnsembleMLPParams& p;
  const Scratch<A>& scratch;
  int64_t row;

  void operator()(int64_t b, int64_t count) const {
    using Real = typename A::Real;
    const StrengthScratch<A>& s = scratch.strength;
    for (int64_t i = 0; i < count; ++i) {
      Real* to = s.rows + i * s.row_stride;
      for (int64_t l = 0; l + 1 < p.num_layers; ++l) {
        const int64_t out = p.layers[l].out, padded = round_up(out, kNarrowLanes<Real>);
        const Real* from = scratch.output_of(p, l) + (row + b + i) * padded;
        std::memcpy(to, from, static_cast<size_t>(out) * sizeof(Real));
        to += out;
      }
    }
  }
};

// All layers of some members over the whole batch, layer by layer: the members' work is
// independent, so that one's latencies are hidden by the next one's work.
template <class A>
void forward_small(const Forward& p, int64_t member, int64_t members, const Scratch<A>& scratch,
                   typename A::Elem* output) {
  using Real = typename A::Real;
  using V = NarrowOf<A>;
  constexpr int N = lanes_of<V>();
  const int64_t rows = members * p.batch;
  const int64_t prepacked_member = p.prepacked ? prepacked_reals<A>(p) : 0;
  const Real* prepacked =
      p.prepacked ? reinterpret_cast<const Real*>(p.prepacked + 1) + member * prepacked_member
                  : nullptr;
  StripeBlock<A> block{};
  small_input<A>(p, member, members, scratch, block);
  for (int64_t l = 0; l < p.num_layers; ++l) {
    const MLPLayer& layer = p.layers[l];
    const bool last = l + 1 == p.num_layers;
    const int64_t unit_count = units<A>(layer.in), padded = round_up(layer.out, N);
    const Real* const x = block.x;
    Real* const z = scratch.output_of(p, l);
    block.z_example = padded;
    block.z_member = p.batch * padded;
    const Real* bias = prepacked ? prepacked + padded * unit_count : scratch.bias;
    block.bias_member = prepacked ? prepacked_member : padded;
    if (!prepacked) {
      for (int64_t m = 0; m < members; ++m) {
        load_bias<A>(layer, p.parameters_of(member + m), scratch.bias + m * padded);
      }
    }
    for (int64_t stripe = 0; stripe * N < layer.out; stripe += kGroup) {
      const int64_t stripes = std::min<int64_t>(kGroup, padded / N - stripe);
      block.w_unit = stripes * N;
      for (int64_t k = 0; k < unit_count; k += kBlockUnits<A>) {
        block.k_count = std::min(kBlockUnits<A>, unit_count - k);
        block.first = k == 0;
        block.floor = relu_floor<Real>(layer, k + block.k_count == unit_count);
        block.w_member = prepacked ? prepacked_member : block.k_count * block.w_unit;
        for (int64_t m = 0; m < members;) {
          block.x = x + m * block.x_member + k;
          block.z = z + m * block.z_member + stripe * N;
          block.bias = bias + m * block.bias_member + stripe * N;
          if constexpr (A::kDirect) {
            if (p.batch == 1 && !prepacked && block.k_count >= N) {
              block.w = weight_row<A>(layer, p.parameters_of(member + m), stripe * N) + k;
              transposing_blocks<A>(block, layer.weight.row_stride,
                                    std::min<int64_t>(stripes * N, layer.out - stripe * N));
              ++m;
              continue;
            }
          }
          // One example gives a narrow layer too few chains to hide their latency: two members
          // then.
          const int64_t count = p.batch == 1 && m + 2 <= members ? 2 : 1;
          if (prepacked) {
            block.w = prepacked + m * prepacked_member + stripe * N * unit_count + k * block.w_unit;
          } else {
            for (int64_t i = 0; i < count; ++i) {
              transpose_group<A>(layer, p.parameters_of(member + m + i), stripe, stripes, k,
                                 block.k_count, scratch.weights + i * block.w_member);
            }
            block.w = scratch.weights;
          }
          if (count == 2) {
            stripe_blocks<A, 1, 2>(block, stripes, 0);
          } else {
            stripe_batch<A>(block, stripes, p.batch);
          }
          m += count;
        }
      }
    }
    if (prepacked) prepacked += prepacked_reals<A>(layer);
    if (last) {
      if (layer.activation.kind != ActivationKind::identity) {
        activate<V>(layer.activation, z, z, rows * padded);
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t o = 0; o < layer.out; o += N) {
          store_first<Real>(output + r * layer.out + o, load<V>(z + r * padded + o), layer.out - o);
        }
      }
      for (int64_t m = 0; p.strength.units && m < members; ++m) {
        write_strengths<A>(p, member + m, 0, p.batch, scratch.strength,
                           GatherRows<A>{p, scratch, m * p.batch});
      }
      return;
    }
    if (!fuses_relu(layer) && layer.activation.kind != ActivationKind::identity) {
      activate<V>(layer.activation, z, z, rows * padded);
    }
    const auto hidden = A::hidden_rows(z, rows, layer.out, scratch.pairs);
    block.x = hidden.x;
    block.x_example = hidden.stride;
    block.x_member = p.batch * hidden.stride;
  }
}

template <class A>
void run_small(const Forward& p, int64_t begin, int64_t end, const Scratch<A>& scratch) {
  const int64_t member_outputs = p.batch * p.layers[p.num_layers - 1].out;
  for (int64_t m = begin; m < end; m += small_members(p)) {
    forward_small<A>(p, m, std::min(small_members(p), end - m), scratch,
                     static_cast<typename A::Elem*>(p.output) + m * member_outputs);
  }
}

}  // namespace pyens::PYENS_ISA::ensemble_mlp
