// How the weights of one format are read and multiplied: a policy each, which the kernels of the ensemble
// MLP take as their template parameter A.
//
//   Elem, Real       storage; arithmetic
//   kPerUnit         inputs to a "unit", what one multiply-add reads of a row: one Real, or with bfloat16
//                    dot products a pair of bfloat16 in the 32 bits of a float
//   kDirect          rows are read where they lie
//   product          a * b + c of units
//   load_units       a narrow vector of units of a row, zeros behind its end
//   weight_block     rows x units of a layer, to be read `often` or not: a pointer and its row stride
//   column_block     units down the columns x columns, likewise
//   hidden_panels, hidden_rows
//                    what a layer has left, as the units that the next one reads: panels of a tile, or
//                    rows of round_up(units, N) of a small batch
//   plain_panels     panels of units as panels of Reals
//   example_panels   panels of Reals as [feature][kPanel / kPerUnit] units of examples: what the product of a
//                    weight gradient reads. Which examples make a unit is the same for all features

namespace pyens::PYENS_ISA::ensemble_mlp {

template <class A>
constexpr int64_t units(int64_t features) {
  return (features + A::kPerUnit - 1) / A::kPerUnit;
}
template <class A>
constexpr int64_t kBlockUnits = kBlock / A::kPerUnit;

template <class A>
const typename A::Elem* weight_row(const MLPLayer& layer, int64_t member, int64_t row) {
  return static_cast<const typename A::Elem*>(layer.weight.data) +
         member * layer.weight.member_stride + row * layer.weight.row_stride;
}

// Rows so many Reals apart lie on a page each, or in the same sets of the cache: a block of them that is read often is
// copied first.
template <class Real>
constexpr int64_t kRowsApart = 1024 / static_cast<int64_t>(sizeof(Real));

// From this size on a layer's weights come from beyond L2, as good as once a pass.
constexpr int64_t kFarBytes = int64_t{512} << 10;

template <class A>
bool is_far(const MLPLayer& layer) {
  return layer.out * layer.in * static_cast<int64_t>(sizeof(typename A::Elem)) >= kFarBytes;
}

// Rows x columns of a layer's weights, to be asked for in so many calls.
template <class A>
Ahead weights_ahead(const MLPLayer& layer, int64_t member, int64_t row, int64_t rows,
                    int64_t column, int64_t columns, int64_t times) {
  constexpr auto kBytes = static_cast<int64_t>(sizeof(typename A::Elem));
  return {weight_row<A>(layer, member, row) + column, layer.weight.row_stride * kBytes,
          columns * kBytes, rows, times};
}

// A block as a copy in scratch, rows of kBlockUnits.
template <class A>
const typename A::Real* converted_block(const MLPLayer& layer, int64_t member, int64_t row,
                                        int64_t rows, int64_t k, int64_t k_count,
                                        typename A::Real* scratch, int64_t* stride) {
  constexpr int N = kNarrowLanes<typename A::Real>;
  *stride = kBlockUnits<A>;
  for (int64_t r = 0; r < rows; ++r) {
    const auto* source = weight_row<A>(layer, member, row + r);
    for (int64_t u = 0; u < k_count; u += N) {
      store(scratch + r * *stride + u, A::load_units(source, k + u, layer.in));
    }
  }
  return scratch;
}

// The rows that a layer of a small batch reads.
template <class Real>
struct HiddenRows {
  const Real* x;
  int64_t stride;
};

// One element to a unit.
template <class E, class R>
struct Plain {
  using Elem = E;
  using Real = R;
  static constexpr int kPerUnit = 1;
  static constexpr bool kDirect = std::is_same_v<E, R>;
  template <class V>
  static inline __attribute__((always_inline)) V product(V a, V b, V c) {
    return madd(a, b, c);
  }
  static inline Narrow<Real> load_units(const Elem* row, int64_t unit, int64_t in) {
    return load_first<Real>(row + unit, in - unit);
  }
  static const Real* weight_block(const MLPLayer& layer, int64_t member, int64_t row, int64_t rows,
                                  int64_t k, int64_t k_count, bool often, Real* scratch,
                                  int64_t* stride) {
    return block(layer, member, row, rows, k, k_count,
                 often && layer.weight.row_stride % kRowsApart<Real> == 0, scratch, stride);
  }
  // In place, or a copy if it has to be converted or is asked for.
  static const Real* block(const MLPLayer& layer, int64_t member, int64_t row, int64_t rows,
                           int64_t k, int64_t k_count, bool copied, Real* scratch,
                           int64_t* stride) {
    if constexpr (kDirect) {
      if (!copied) {
        *stride = layer.weight.row_stride;
        return weight_row<Plain>(layer, member, row) + k;
      }
    }
    return converted_block<Plain>(layer, member, row, rows, k, k_count, scratch, stride);
  }
  static const Real* column_block(const MLPLayer& layer, int64_t member, int64_t k, int64_t k_count,
                                  int64_t column, int64_t columns, bool often, Real* scratch,
                                  int64_t* stride) {
    return block(layer, member, k, k_count, column, columns,
                 often && layer.weight.row_stride >= kRowsApart<Real>, scratch, stride);
  }
  static const Real* hidden_panels(const Real* z, int64_t /*panels*/, int64_t /*features*/,
                                   Real* /*scratch*/) {
    return z;
  }
  static const Real* example_panels(const Real* z, int64_t /*examples*/, int64_t /*features*/,
                                    Real* /*scratch*/) {
    return z;
  }
  static const Real* plain_panels(const Real* x, int64_t /*panels*/, int64_t /*features*/,
                                  Real* /*scratch*/) {
    return x;
  }
  static HiddenRows<Real> hidden_rows(const Real* z, int64_t /*rows*/, int64_t features,
                                      Real* /*scratch*/) {
    return {z, round_up(features, kNarrowLanes<Real>)};
  }
};

#if PYENS_HAS(AVX512_BF16)
// Two bfloat16 to a unit. Hidden activations are rounded to bfloat16 between layers, and in training the
// gradients by a layer's sums, before they are multiplied. Sums are float32. Rounding and product take
// subnormal numbers for 0.
struct Bfloat16Pairs {
  using Elem = BFloat16;
  using Real = float;
  static constexpr int kPerUnit = 2;
  static constexpr bool kDirect = false;  // an odd row ends in half a unit
  template <class V>
  static inline __attribute__((always_inline)) V product(V a, V b, V c) {
    return madd_pairs(a, b, c);
  }
  static inline Narrow<float> load_units(const Elem* row, int64_t unit, int64_t in) {
    Narrow<float> v{};
    const int64_t left = in - 2 * unit;
    if (left >= 16) return load<Narrow<float>>(row + 2 * unit);
    std::memcpy(&v, row + 2 * unit, static_cast<size_t>(left) * sizeof(Elem));
    return v;
  }
  static const float* weight_block(const MLPLayer& layer, int64_t member, int64_t row, int64_t rows,
                                   int64_t k, int64_t k_count, bool /*often*/, float* scratch,
                                   int64_t* stride) {
    return converted_block<Bfloat16Pairs>(layer, member, row, rows, k, k_count, scratch, stride);
  }
  // Rows 2u and 2u+1 of the weights become unit u, [unit][column].
  static const float* column_block(const MLPLayer& layer, int64_t member, int64_t k,
                                   int64_t k_count, int64_t column, int64_t columns, bool /*often*/,
                                   float* scratch, int64_t* stride) {
    using V = Wide<float>;
    using Words = Vec<uint32_t, lanes_of<V>()>;
    *stride = kBlock;
    for (int64_t u = 0; u < k_count; ++u) {
      const int64_t row = 2 * (k + u);
      const BFloat16* low = weight_row<Bfloat16Pairs>(layer, member, row) + column;
      const BFloat16* high = row + 1 < layer.out ? low + layer.weight.row_stride : nullptr;
      for (int64_t c = 0; c < columns; c += lanes_of<V>()) {
        const auto at_high = high ? (Words)load_wide_first<float>(high + c, columns - c) : Words{};
        const auto at_low = (Words)load_wide_first<float>(low + c, columns - c) >> 16;
        store(scratch + u * *stride + c, at_low | at_high);
      }
    }
    return scratch;
  }
  // Rows 2u and 2u+1 of a panel become unit u.
  static const float* hidden_panels(const float* z, int64_t panels, int64_t features,
                                    float* pairs) {
    using V = Wide<float>;
    constexpr int64_t P = kPanelOf<float>;
    const int64_t unit_count = units<Bfloat16Pairs>(features);
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t u = 0; u < unit_count; ++u) {
        const float* low = z + (p * features + 2 * u) * P;
        for (int64_t i = 0; i < P; i += lanes_of<V>()) {
          const V high = 2 * u + 1 < features ? load<V>(low + P + i) : V{};
          store(pairs + (p * unit_count + u) * P + i, pair_lanes(load<V>(low + i), high));
        }
      }
    }
    return pairs;
  }
  // Two vectors become one; zeros where there is no example.
  static const float* example_panels(const float* z, int64_t examples, int64_t features,
                                     float* pairs) {
    using V = Wide<float>;
    constexpr int N = lanes_of<V>();
    constexpr int64_t P = kPanelOf<float>;
    for (int64_t p = 0; p * P < examples; ++p) {
      const int64_t count = std::min(P, examples - p * P);
      for (int64_t f = p * features; f < (p + 1) * features; ++f) {
        for (int64_t b = 0; b < count; b += 2 * N) {
          const auto at = [&](int64_t i) {
            return load_wide_first<float>(z + f * P + i, count - i);
          };
          const V high = b + N < count ? at(b + N) : V{};
          store(pairs + (f * P + b) / 2, pair_neighbours(at(b), high));
        }
      }
    }
    return pairs;
  }
  static const float* plain_panels(const float* pairs, int64_t panels, int64_t features,
                                   float* plain) {
    using V = Wide<float>;
    using Words = Vec<uint32_t, lanes_of<V>()>;
    constexpr int64_t P = kPanelOf<float>;
    const int64_t unit_count = units<Bfloat16Pairs>(features);
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t f = 0; f < features; ++f) {
        for (int64_t i = 0; i < P; i += lanes_of<V>()) {
          const auto pair = (Words)load<V>(pairs + (p * unit_count + f / 2) * P + i);
          store(plain + (p * features + f) * P + i,
                (V)(f % 2 == 0 ? pair << 16 : pair & 0xffff0000u));
        }
      }
    }
    return plain;
  }
  static HiddenRows<float> hidden_rows(const float* z, int64_t rows, int64_t features,
                                       float* pairs) {
    constexpr int N = kNarrowLanes<float>;
    const int64_t padded = round_up(features, N);
    const int64_t stride = round_up(units<Bfloat16Pairs>(features), N);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = pairs + r * stride;
      std::fill(row, row + stride, 0.0f);  // an odd row ends in half a unit
      for (int64_t o = 0; o < features; o += N) {
        const auto rounded = to_bfloat16(load<Narrow<float>>(z + r * padded + o));
        auto* to = reinterpret_cast<BFloat16*>(row) + o;
        if (features - o >= N) {
          store(to, rounded);
        } else {
          std::memcpy(to, &rounded, static_cast<size_t>(features - o) * sizeof(BFloat16));
        }
      }
    }
    return {pairs, stride};
  }
};
#endif

}  // namespace pyens::PYENS_ISA::ensemble_mlp
