// Predictive uncertainty with classes in the lanes, one row of one member at a time: a row of a
// thousand classes stays in L1 between its three passes (largest, exponentials, probabilities).

namespace pyens::PYENS_ISA::uncertainty {

// A row into scratch, `padding` behind it; its largest value, and in `at` the first class with it.
template <class T, class Real>
Real load_row(const T* source, int64_t classes, Real padding, Real* z, int64_t* at) {
  using V = Wide<Real>;
  using Ints = WideInts<Real>;
  constexpr int64_t N = kWideLanes<Real>;
  Ints index, largest_at;
  for (int i = 0; i < N; ++i) index[i] = i;
  largest_at = index;
  V largest = broadcast<V>(-std::numeric_limits<Real>::infinity());
  int64_t k = 0;
  for (; k + N <= classes; k += N) {
    const V v = load_wide<Real>(source + k);
    store(z + k, v);
    const Ints greater = v > largest;
    largest = greater ? v : largest;
    largest_at = greater ? index : largest_at;
    index += N;
  }
  Real best = largest[0];
  int64_t best_at = largest_at[0];
  for (int i = 1; i < N; ++i) {
    if (largest[i] > best || (largest[i] == best && largest_at[i] < best_at)) {
      best = largest[i];
      best_at = largest_at[i];
    }
  }
  for (; k < round_up(classes, N); ++k) {
    z[k] = k < classes ? to_float(source[k]) : padding;
    if (k < classes && z[k] > best) {
      best = z[k];
      best_at = k;
    }
  }
  *at = best_at;
  return best;
}

// Adds softmax(z) to `sums`; returns its entropy.
template <class Real>
Real add_row_of_logits(Real* z, int64_t width, Real largest, Real* sums) {
  using V = Wide<Real>;
  constexpr int64_t N = kWideLanes<Real>;
  const V top = broadcast<V>(largest);
  V sum{}, weighted{};
  for (int64_t k = 0; k < width; k += N) {
    V d;
    const V e = exp_or_zero(load<V>(z + k) - top, d);
    store(z + k, e);
    sum += e;
    weighted = madd(e, d, weighted);
  }
  const Real whole = sum_lanes(sum), scale = 1 / whole;
  const V scales = broadcast<V>(scale);
  for (int64_t k = 0; k < width; k += N) {
    store(sums + k, madd(load<V>(z + k), scales, load<V>(sums + k)));
  }
  return log_of(broadcast<V>(whole))[0] - sum_lanes(weighted) * scale;
}

// Adds the probabilities z to `sums`; returns their entropy, and whether they are a distribution
// (or NaN).
template <class Real>
Real add_row_of_probabilities(const Real* z, int64_t width, Real tolerance, Real* sums,
                              bool* good) {
  using V = Wide<Real>;
  constexpr int64_t N = kWideLanes<Real>;
  V sum{}, entropy{}, lowest{};
  for (int64_t k = 0; k < width; k += N) {
    const V v = load<V>(z + k);
    lowest = v < lowest ? v : lowest;
    sum += v;
    entropy -= x_log_x<Real>(v);
    store(sums + k, load<V>(sums + k) + v);
  }
  const Real whole = sum_lanes(sum);
  bool negative = false;
  for (int i = 0; i < N; ++i) negative |= lowest[i] < 0;
  *good = whole != whole || (!negative && std::abs(whole - 1) <= tolerance);
  return sum_lanes(entropy);
}

template <class T, class Real>
void finish_row(const UncertaintyParams& p, int64_t b, const Real* total, double entropy_sum,
                const int32_t* votes) {
  using V = Wide<Real>;
  constexpr int64_t N = kWideLanes<Real>;
  const V count = broadcast<V>(static_cast<Real>(p.ensemble_size));
  using D = Entropies<Real>;
  D entropy{};
  for (int64_t k = 0; k < p.classes; k += N) {
    const V mean = load<V>(total + k) / count;
    entropy -= to_double<Real>(x_log_x<Real>(mean));
    store_wide_first<Real>(static_cast<T*>(p.mean_probability) + b * p.classes + k, mean,
                           p.classes - k);
  }
  const int32_t most = *std::max_element(votes, votes + p.classes);
  store_measures<T, Real>(p, b, 1, broadcast<D>(sum_lanes(entropy)), broadcast<D>(entropy_sum),
                          broadcast<V>(static_cast<Real>(most)));
  if (p.votes) std::copy(votes, votes + p.classes, p.votes + b * p.classes);
}

template <class T, class Real>
void run_rows(const UncertaintyParams& p, int64_t b, int64_t examples, const Scratch<Real>& s) {
  const Real padding = p.from_probabilities ? 0 : -std::numeric_limits<Real>::infinity();
  for (int64_t m = 0; m < p.ensemble_size; ++m) {
    for (int64_t i = 0; i < examples; ++i) {
      const T* source =
          static_cast<const T*>(p.members) + m * p.member_stride + (b + i) * p.row_stride;
      int64_t vote;
      const Real largest = load_row(source, p.classes, padding, s.member, &vote);
      Real* sums = s.block + i * s.width;
      if (p.from_probabilities) {
        bool good;
        s.entropy[i] += add_row_of_probabilities(s.member, s.width,
                                                 static_cast<Real>(p.sum_tolerance), sums, &good);
        if (!good && s.bad[i] < 0) s.bad[i] = static_cast<int32_t>(m);
      } else {
        s.entropy[i] += add_row_of_logits(s.member, s.width, largest, sums);
      }
      ++s.votes[i * s.width + vote];
    }
    if ((m + 1) % kMemberBlock == 0 || m + 1 == p.ensemble_size) {
      fold(s.block, s.total, examples * s.width);
    }
  }
  for (int64_t i = 0; i < examples; ++i) {
    finish_row<T>(p, b + i, s.total + i * s.width, s.entropy[i], s.votes + i * s.width);
  }
}

}  // namespace pyens::PYENS_ISA::uncertainty
