// Predictive uncertainty with examples in the lanes.
//
// A group of N examples is transposed on its way in, so that maximum, sum and entropy over the
// classes are vertical and any number of classes fills the lanes. Transposing costs some 7
// operations per vector; blocks at the edge overlap the ones before them.

namespace pyens::PYENS_ISA::uncertainty {

// r[c][l] = rows[l * stride + c], c < 4: quarters of rows are loaded into their places, and each
// 4 x 4 block is transposed where it lies.
inline __attribute__((always_inline)) void load_quads(const float* rows, int64_t stride,
                                                      Wide<float> (&r)[4]) {
  using V = Wide<float>;
#if PYENS_HAS(AVX512)
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const float* row = rows + i * stride;
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(row));
    v = _mm512_insertf32x4(v, _mm_loadu_ps(row + 4 * stride), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps(row + 8 * stride), 2);
    r[i] = (V)_mm512_insertf32x4(v, _mm_loadu_ps(row + 12 * stride), 3);
  }
#define PYENS_LANES(a, b, c, d) \
  a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
  const V a = PYENS_SHUFFLE(r[0], r[1], PYENS_LANES(0, 16, 1, 17));
  const V b = PYENS_SHUFFLE(r[0], r[1], PYENS_LANES(2, 18, 3, 19));
  const V c = PYENS_SHUFFLE(r[2], r[3], PYENS_LANES(0, 16, 1, 17));
  const V d = PYENS_SHUFFLE(r[2], r[3], PYENS_LANES(2, 18, 3, 19));
  r[0] = PYENS_SHUFFLE(a, c, PYENS_LANES(0, 1, 16, 17));
  r[1] = PYENS_SHUFFLE(a, c, PYENS_LANES(2, 3, 18, 19));
  r[2] = PYENS_SHUFFLE(b, d, PYENS_LANES(0, 1, 16, 17));
  r[3] = PYENS_SHUFFLE(b, d, PYENS_LANES(2, 3, 18, 19));
#undef PYENS_LANES
#elif PYENS_HAS(AVX2)
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const float* row = rows + i * stride;
    r[i] = (V)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)),
                                   _mm_loadu_ps(row + 4 * stride), 1);
  }
  transpose_halves(r);
#else
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) r[i] = load<V>(rows + i * stride);
  transpose(r);
#endif
}

// z[k][lane] of n examples; lanes beyond them are zeros.
template <class T, class Real>
void load_columns(const UncertaintyParams& p, int64_t member, int64_t b, int64_t n, Real* z,
                  Real* copied) {
  using V = Wide<Real>;
  constexpr int64_t N = kWideLanes<Real>;
  const T* source = static_cast<const T*>(p.members) + member * p.member_stride;
  if (p.binary) {
    V v = load_wide_first<Real>(source + b, n);
    const V largest = broadcast<V>(std::numeric_limits<Real>::max());
    v = v > largest ? largest : v;  // sigmoid(inf) is 1, though inf - inf is NaN
    store(z, p.from_probabilities ? broadcast<V>(Real{1}) - v : V{});
    store(z + N, v);
    return;
  }
  source += b * p.row_stride;
  const Real* rows = copied;
  int64_t stride = round_up(p.classes, N);
  bool in_place = false;
  if constexpr (std::is_same_v<T, Real>) {
    in_place = n == N && (p.classes >= 4 || std::is_same_v<Real, double>);
    if (in_place) {
      rows = source;
      stride = p.row_stride;
    }
  }
  if (!in_place) {
    for (int64_t l = 0; l < N; ++l) {
      for (int64_t k = 0; k < p.classes; k += N) {
        store(copied + l * stride + k,
              l < n ? load_wide_first<Real>(source + l * p.row_stride + k, p.classes - k) : V{});
      }
    }
  }
  if constexpr (std::is_same_v<Real, float>) {
    for (int64_t k = 0; k < p.classes; k += 4) {
      const int64_t first = std::max<int64_t>(0, std::min(k, p.classes - 4));
      V r[4];
      load_quads(rows + first, stride, r);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) store(z + (first + c) * N, r[c]);
    }
  } else {
    for (int64_t k = 0; k < p.classes; ++k) {
      for (int64_t l = 0; l < N; ++l) z[k * N + l] = rows[l * stride + k];
    }
  }
}

// The first class with the largest value, in each lane.
template <class Real>
inline __attribute__((always_inline)) WideInts<Real> first_largest(const Real* z, int64_t classes,
                                                                   Wide<Real>& largest) {
  using V = Wide<Real>;
  using Ints = WideInts<Real>;
  Ints at{};
  largest = load<V>(z);
  for (int64_t k = 1; k < classes; ++k) {
    const V v = load<V>(z + k * kWideLanes<Real>);
    const Ints greater = v > largest;
    largest = greater ? v : largest;
    at = greater ? Ints{} + static_cast<decltype(at[0] + 0)>(k) : at;
  }
  return at;
}

// Where a vector of examples of one member goes: kDoubles lanes of a group's columns, [k][N].
struct Columns {
  bool is_first;  // member
  int64_t classes, stride;
  double *first, *sum;  // as in Scratch
};

// Adds softmax(z); returns its entropy.
template <class Real>
Doubles add_logits(const Real* z, Doubles largest, double* exponentials, const Columns& c) {
  Doubles sum{}, weighted{};
  for (int64_t k = 0; k < c.classes; ++k) {
    Doubles d = load_doubles(z + k * c.stride) - largest;
    const Doubles e = exp_of_doubles(d);
    d = e == Doubles{} ? Doubles{} : d;  // 0 times an infinity
    store(exponentials + k * kDoubles, e);
    sum += e;
    weighted = madd(e, d, weighted);
  }
  const Doubles scale = broadcast<Doubles>(1.0) / sum;
  for (int64_t k = 0; k < c.classes; ++k) {
    add_member(c.is_first, load<Doubles>(exponentials + k * kDoubles) * scale,
               c.first + k * c.stride, c.sum + k * c.stride);
  }
  return log_of_doubles(sum) - weighted * scale;
}

// Adds the probabilities z; returns their entropy. bad[l] becomes `member` where they are no
// distribution and no earlier member was bad. NaN is not reported: it reaches the results.
template <class Real>
Doubles add_probabilities(const Real* z, double sum_tolerance, int32_t member, int32_t* bad,
                          const Columns& c) {
  Doubles sum{}, entropy{}, lowest{};
  for (int64_t k = 0; k < c.classes; ++k) {
    const Doubles v = load_doubles(z + k * c.stride);
    lowest = v < lowest ? v : lowest;
    sum += v;
    entropy -= x_log_x(v);
    add_member(c.is_first, v, c.first + k * c.stride, c.sum + k * c.stride);
  }
  const Doubles tolerance = broadcast<Doubles>(sum_tolerance);
  const Doubles off = sum - broadcast<Doubles>(1.0);
  const WideInts<double> wrong = (off > tolerance) | (off < -tolerance) | (lowest < Doubles{});
  for (int64_t l = 0; l < kDoubles; ++l) {
    if (wrong[l] && sum[l] == sum[l] && bad[l] < 0) bad[l] = member;
  }
  return entropy;
}

// The measures of the n examples from b on, group g of the tile, from the sums over all members.
template <class T, class Real>
void finish_columns(const UncertaintyParams& p, int64_t b, int64_t n, int64_t g,
                    const Scratch<Real>& s) {
  using V = Wide<Real>;
  constexpr int64_t N = kWideLanes<Real>;
  const double *first = s.first + g * s.width, *sum = s.sum + g * s.width;
  const int32_t* votes = s.votes + g * s.width;
  Real* mean = s.member;  // no longer needed: all members are in the sums
  const Doubles count = broadcast<Doubles>(static_cast<double>(p.ensemble_size));
  Measures<Real> measures;
  for (int64_t l = 0; l < N; l += kDoubles) {
    Doubles of_mean{}, of_first{};
    Vec<int32_t, kDoubles> most{};
    for (int64_t k = 0; k < p.classes; ++k) {
      const int64_t at = k * N + l;
      const Doubles of_class = load<Doubles>(first + at);
      const Doubles average = of_class + load<Doubles>(sum + at) / count;
      store_doubles(mean + at, average);
      of_mean -= x_log_x(average);
      of_first -= x_log_x(of_class);
      const auto v = load<Vec<int32_t, kDoubles>>(votes + at);
      most = most < v ? v : most;
    }
    measures.set(p, l, of_mean, of_first, load<Doubles>(s.first_entropy + g * N + l),
                 load<Doubles>(s.entropy_sum + g * N + l), __builtin_convertvector(most, Doubles));
  }
  measures.template write<T>(p, b, n);
  T* out = static_cast<T*>(p.mean_probability);
  if (p.binary) {
    store_wide_first<Real>(out + b, load<V>(mean + N), n);
  } else {
    Real row[N] = {};
    for (int64_t l = 0; l < n; ++l) {
      for (int64_t k = 0; k < p.classes; k += N) {
        const int64_t in_row = std::min(N, p.classes - k);
        for (int64_t i = 0; i < in_row; ++i) row[i] = mean[(k + i) * N + l];
        store_wide_first<Real>(out + (b + l) * p.classes + k, load<V>(row), in_row);
      }
    }
  }
  if (p.votes == nullptr) return;
  for (int64_t l = 0; l < n; ++l) {
    for (int64_t k = 0; k < p.classes; ++k) p.votes[(b + l) * p.classes + k] = votes[k * N + l];
  }
}

template <class T, class Real>
void run_columns(const UncertaintyParams& p, int64_t b, int64_t examples, const Scratch<Real>& s) {
  using V = Wide<Real>;
  constexpr int64_t N = kWideLanes<Real>;
  const int64_t groups = (examples + N - 1) / N;
  for (int64_t m = 0; m < p.ensemble_size; ++m) {
    for (int64_t g = 0; g < groups; ++g) {
      load_columns<T>(p, m, b + g * N, std::min(N, examples - g * N), s.member, s.rows);
      V largest;
      const WideInts<Real> vote = first_largest(s.member, p.classes, largest);
      Real top[N];
      store(top, largest);
      for (int64_t l = 0; l < N; l += kDoubles) {
        const int64_t at = g * s.width + l;
        const Columns columns = {m == 0, p.classes, N, s.first + at, s.sum + at};
        const Doubles entropy =
            p.from_probabilities
                ? add_probabilities(s.member + l, p.sum_tolerance, static_cast<int32_t>(m),
                                    s.bad + g * N + l, columns)
                : add_logits(s.member + l, load_doubles(top + l), s.exponentials, columns);
        add_member(m == 0, entropy, s.first_entropy + g * N + l, s.entropy_sum + g * N + l);
      }
      int32_t* votes = s.votes + g * s.width;
      for (int64_t l = 0; l < N; ++l) ++votes[vote[l] * N + l];
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    finish_columns<T>(p, b + g * N, std::min(N, examples - g * N), g, s);
  }
}

}  // namespace pyens::PYENS_ISA::uncertainty
