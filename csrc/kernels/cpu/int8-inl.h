// Products of bytes, and the way of numbers into bytes and back.
//
// A "unit" is what one lane of 32 bits holds of a row: with VNNI four unsigned bytes, which one instruction multiplies
// by four signed ones and adds up; without it two numbers of 16 bits, which take a multiplication and an addition. The
// bytes of VNNI's predecessor would saturate in 16 bits.

namespace pyens::PYENS_ISA {

template <int N>
using Ints = Vec<int32_t, N>;

// Four bytes to a unit.
struct Quads {
  static constexpr int kPerUnit = 4;
  using Element = int8_t;

  // sum + the products of signed bytes w and unsigned bytes x.
  template <class V>
  static inline __attribute__((always_inline)) V product(V w, V x, V sum) {
#if PYENS_HAS(AVX512_VNNI)
    if constexpr (sizeof(V) == 64) {
      return (V)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
    }
    if constexpr (sizeof(V) == 32) {
      return (V)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
    }
#elif PYENS_HAS(AVX_VNNI)
    if constexpr (sizeof(V) == 32) {
      return (V)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
    }
#endif
    // What stands in for the instruction where tests ask for it.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      sum += (w << (24 - 8 * i) >> 24) * (x >> (8 * i) & 255);
    }
    return sum;
  }
};

// Two numbers of 16 bits to a unit.
struct Pairs {
  static constexpr int kPerUnit = 2;
  using Element = int16_t;

  template <class V>
  static inline __attribute__((always_inline)) V product(V w, V x, V sum) {
#if PYENS_HAS(AVX512)
    if constexpr (sizeof(V) == 64) return sum + (V)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#endif
#if PYENS_HAS(AVX2)
    if constexpr (sizeof(V) == 32) return sum + (V)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#endif
#if defined(__x86_64__)
    if constexpr (sizeof(V) == 16) return sum + (V)_mm_madd_epi16((__m128i)w, (__m128i)x);
#endif
    return sum + (w << 16 >> 16) * (x << 16 >> 16) + (w >> 16) * (x >> 16);
  }
};

#if PYENS_HAS(AVX512_VNNI) || PYENS_HAS(AVX_VNNI) || defined(PYENS_VNNI_STAND_IN)
using Int8Format = Quads;
#else
using Int8Format = Pairs;
#endif

inline int64_t int8_units(int64_t features) {
  return (features + Int8Format::kPerUnit - 1) / Int8Format::kPerUnit;
}

// How the inputs of a member become bytes.
struct Quantizer {
  float inverse, lowest, highest;
  int32_t zero_point;

  Quantizer(const Int8Weight& weight, int64_t member)
      : inverse(1 / weight.input_scale[member]),
        lowest(-static_cast<float>(weight.input_zero_point[member])),
        highest(static_cast<float>(255 - weight.input_zero_point[member])),
        zero_point(weight.input_zero_point[member]) {}
  bool operator==(const Quantizer& other) const {
    return inverse == other.inverse && zero_point == other.zero_point;
  }

  // Bytes in lanes of 32 bits. Of NaN any byte.
  template <class V>
  inline __attribute__((always_inline)) auto operator()(V x) const {
    using I = Ints<lanes_of<V>()>;
    const V high = broadcast<V>(highest);
    V q = at_least(broadcast<V>(lowest), x * inverse);
    q = q < high ? q : high;
    // Beside 1.5 * 2^23 a float has no fraction: the addition rounds it away, halves to even.
    return ((I)(q + 0x1.8p23f) - 0x4b400000 + zero_point) & 255;
  }
};

// bytes[0 .. kPerUnit) into one unit.
template <class I>
inline __attribute__((always_inline)) I unit_of(const I* bytes) {
  constexpr int kBits = 32 / Int8Format::kPerUnit;
  I unit = bytes[0];
#pragma GCC unroll 4
  for (int i = 1; i < Int8Format::kPerUnit; ++i) unit |= bytes[i] << (i * kBits);
  return unit;
}

// rows x count weights at `from`, in_stride apart, as units at `to`, to_stride apart; zeros behind the last one.
inline void weight_units(const int8_t* from, int64_t in_stride, int64_t rows, int64_t count,
                         int32_t* to, int64_t to_stride) {
  using Element = Int8Format::Element;
  const int64_t unit_count = int8_units(count);
  for (int64_t r = 0; r < rows; ++r, from += in_stride, to += to_stride) {
    Element row[4] = {};
    const int64_t whole = count / Int8Format::kPerUnit * Int8Format::kPerUnit;
    if constexpr (sizeof(Element) == 1) {
      std::memcpy(to, from, static_cast<size_t>(whole));
    } else {
      constexpr int N = kWideLanes<int16_t>;
      int64_t k = 0;
      for (; k + N <= whole; k += N) {
        const auto bytes = load<Vec<int8_t, N>>(from + k);
        const auto wide = __builtin_convertvector(bytes, Vec<int16_t, N>);
        std::memcpy(to + k / 2, &wide, sizeof(wide));
      }
      for (; k < whole; k += 2) {
        row[0] = from[k], row[1] = from[k + 1];
        std::memcpy(to + k / 2, row, sizeof(int32_t));
      }
    }
    if (whole == count) continue;
    std::fill(row, row + 4, Element{0});
    for (int64_t k = whole; k < count; ++k) row[k - whole] = from[k];
    std::memcpy(to + unit_count - 1, row, sizeof(int32_t));
  }
}

}  // namespace pyens::PYENS_ISA
