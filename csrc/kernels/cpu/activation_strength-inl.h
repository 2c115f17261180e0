// Activation strength: turns the hidden layers of a tile or of a small batch into rows [units] of
// value and active.
//
//   value = (h - mean) * scale, scale = 1 / std; value is 0 if std is below any normal number
//   active = h > 0
//
// Bound by writing. A few examples' activations are gathered to whole rows; each row is computed
// vector by vector into a stage, the last vector reaching into the next row, which then overwrites
// it: there are no tails. Rows follow each other without gaps in memory, so a stage is copied out
// as one run of whole cache lines, past the cache where all rows together would not stay in it.

namespace pyens::PYENS_ISA::ensemble_mlp {

constexpr int64_t kStageRows = 64;
// Results of this size would leave the cache before anyone reads them.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

template <class A>
struct StrengthScratch {
  using Real = typename A::Real;
  Real *mean, *scale;  // of one member
  Real* rows;          // activations of a few examples
  typename A::Elem* value;
  uint8_t* active;
  uint8_t* flags;  // of one example, before they become bits
  int64_t row_stride;

  // `take(n)` gives room for n Reals.
  template <class Take>
  void allocate(const EnsembleMLPParams& p, const Take& take) {
    constexpr int64_t N = kWideLanes<Real>;
    const int64_t units = p.strength.units;
    // Whole vectors are stored at any unit.
    row_stride = round_up(units + N, N);
    const int64_t stage = units == 0 ? 0 : kStageRows * units + N;
    mean = take(row_stride);
    scale = take(row_stride);
    rows = take(kNarrowLanes<Real> * row_stride);
    value = reinterpret_cast<typename A::Elem*>(take(stage));
    active = reinterpret_cast<uint8_t*>(take(stage / static_cast<int64_t>(sizeof(Real)) + N));
    flags = reinterpret_cast<uint8_t*>(take(row_stride));
  }
};

inline int64_t active_bytes(const ActivationStrengthParams& s) {
  return s.bitpack ? (s.units + 7) / 8 : s.units;
}

// The member's statistics, padded to whole vectors.
template <class Real>
void load_statistics(const ActivationStrengthParams& s, int64_t member, Real* mean, Real* scale) {
  const auto* from_mean = static_cast<const Real*>(s.mean) + member * s.mean_member_stride;
  const auto* from_std = static_cast<const Real*>(s.std) + member * s.std_member_stride;
  const int64_t padded = round_up(s.units, kWideLanes<Real>);
  for (int64_t u = 0; u < padded; ++u) {
    const bool present = u < s.units;
    mean[u] = present ? from_mean[u] : 0;
    // An infinite scale, which is that of no normal number, is the sign of a dead unit.
    const bool dead = !present || std::abs(from_std[u]) < std::numeric_limits<Real>::min();
    scale[u] = dead ? std::numeric_limits<Real>::infinity() : 1 / from_std[u];
  }
}

// One example's row of activations to its row of values and flags; writes up to a vector beyond.
template <class A>
void strength_row(const StrengthScratch<A>& s, const typename A::Real* h, int64_t units,
                  typename A::Elem* value, uint8_t* flags) {
  using Real = typename A::Real;
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>();
  const V dead = broadcast<V>(std::numeric_limits<Real>::infinity());
  for (int64_t u = 0; u < units; u += N) {
    const V x = load<V>(h + u), scale = load<V>(s.scale + u);
    const V z = (x - load<V>(s.mean + u)) * scale;
    store_wide<Real>(value + u, scale == dead ? V{} : z);  // a NaN in a dead unit too
    store(flags + u, __builtin_convertvector((x > V{}) & 1, Vec<uint8_t, N>));
  }
}

// 8 flags a byte: the product brings flag i from bit 8 i to bit 56 + i.
inline void bitpack_flags(uint8_t* flags, int64_t units, uint8_t* packed) {
  std::memset(flags + units, 0, static_cast<size_t>(round_up(units, 8) - units));
  for (int64_t u = 0; u < units; u += 8) {
    uint64_t eight;
    std::memcpy(&eight, flags + u, sizeof(eight));
    packed[u / 8] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
  }
}

// memcpy that leaves what it writes out of the cache. The caller ends with a fence.
inline void stream_copy(void* target, const void* source, size_t bytes) {
#if defined(__x86_64__)
  auto* to = static_cast<char*>(target);
  const auto* from = static_cast<const char*>(source);
  const size_t head = std::min(bytes, (64 - reinterpret_cast<uintptr_t>(to) % 64) % 64);
  std::memcpy(to, from, head);
  size_t i = head;
  for (; i + 64 <= bytes; i += 64) {
#if PYENS_HAS(AVX512)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#else
    for (size_t j = i; j < i + 64; j += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + j),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j)));
    }
#endif
  }
  std::memcpy(to + i, from + i, bytes - i);
#else
  std::memcpy(target, source, bytes);
#endif
}

// Rows of `count` examples of one member, from example `first` on. `gather(b, n)` brings the
// activations of examples [b, b + n), n up to a narrow vector's lanes, to s.rows.
template <class A, class Gather>
void write_strengths(const EnsembleMLPParams& p, int64_t member, int64_t first, int64_t count,
                     const StrengthScratch<A>& s, const Gather& gather) {
  using Elem = typename A::Elem;
  const ActivationStrengthParams& strength = p.strength;
  const int64_t units = strength.units, bytes = active_bytes(strength);
  const auto row_bytes = static_cast<size_t>(units) * sizeof(Elem);
  const bool stream = p.ensemble_size * p.batch * static_cast<int64_t>(row_bytes) >= kStreamBytes;
  load_statistics(strength, member, s.mean, s.scale);
  for (int64_t b = 0; b < count; b += kStageRows) {
    const int64_t staged = std::min(kStageRows, count - b);
    for (int64_t i = 0; i < staged; i += kNarrowLanes<typename A::Real>) {
      const int64_t n = std::min<int64_t>(kNarrowLanes<typename A::Real>, staged - i);
      gather(b + i, n);
      for (int64_t j = i; j < i + n; ++j) {
        uint8_t* const flags = strength.bitpack ? s.flags : s.active + j * bytes;
        strength_row<A>(s, s.rows + (j - i) * s.row_stride, units, s.value + j * units, flags);
        if (strength.bitpack) bitpack_flags(flags, units, s.active + j * bytes);
      }
    }
    const int64_t row = member * p.batch + first + b;
    auto* value = static_cast<Elem*>(strength.value) + row * units;
    uint8_t* active = strength.active + row * bytes;
    const auto value_size = static_cast<size_t>(staged) * row_bytes;
    const auto active_size = static_cast<size_t>(staged * bytes);
    if (stream) {
      stream_copy(value, s.value, value_size);
      stream_copy(active, s.active, active_size);
    } else {
      std::memcpy(value, s.value, value_size);
      std::memcpy(active, s.active, active_size);
    }
  }
#if defined(__x86_64__)
  if (stream) _mm_sfence();
#endif
}

}  // namespace pyens::PYENS_ISA::ensemble_mlp
