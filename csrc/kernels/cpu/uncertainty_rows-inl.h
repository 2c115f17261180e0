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

// Adds softmax(z); returns its entropy.
template <class Real>
double add_row_of_logits(const Real* z, int64_t width, Real largest, bool is_first,
                         double* exponentials, double* first, double* sums) {
  const Doubles top = broadcast<Doubles>(static_cast<double>(largest));
  Doubles sum{}, weighted{};
  for (int64_t k = 0; k < width; k += kDoubles) {
    Doubles d = load_doubles(z + k) - top;
    const Doubles e = exp_of_doubles(d);
    d = e == Doubles{} ? Doubles{} : d;  // 0 times an infinity
    store(exponentials + k, e);
    sum += e;
    weighted = madd(e, d, weighted);
  }
  const double whole = sum_lanes(sum), scale = 1 / whole;
  const Doubles scales = broadcast<Doubles>(scale);
  for (int64_t k = 0; k < width; k += kDoubles) {
    add_member(is_first, load<Doubles>(exponentials + k) * scales, first + k, sums + k);
  }
  return log_of_doubles(broadcast<Doubles>(whole))[0] - sum_lanes(weighted) * scale;
}

// Adds the probabilities z; returns their entropy, and whether they are a distribution (or NaN).
template <class Real>
double add_row_of_probabilities(const Real* z, int64_t width, double tolerance, bool is_first,
                                double* first, double* sums, bool* good) {
  Doubles sum{}, entropy{}, lowest{};
  for (int64_t k = 0; k < width; k += kDoubles) {
    const Doubles v = load_doubles(z + k);
    lowest = v < lowest ? v : lowest;
    sum += v;
    entropy -= x_log_x(v);
    add_member(is_first, v, first + k, sums + k);
  }
  const double whole = sum_lanes(sum);
  bool negative = false;
  for (int i = 0; i < kDoubles; ++i) negative |= lowest[i] < 0;
  *good = whole != whole || (!negative && std::abs(whole - 1) <= tolerance);
  return sum_lanes(entropy);
}

// The measures of example b, the i-th of the tile.
template <class T, class Real>
void finish_row(const UncertaintyParams& p, int64_t b, int64_t i, const Scratch<Real>& s) {
  using V = Wide<Real>;
  constexpr int64_t N = kWideLanes<Real>;
  const double *first = s.first + i * s.width, *sum = s.sum + i * s.width;
  const int32_t* votes = s.votes + i * s.width;
  Real* mean = s.member;
  const Doubles count = broadcast<Doubles>(static_cast<double>(p.ensemble_size));
  Doubles of_mean{}, of_first{};
  for (int64_t k = 0; k < s.width; k += kDoubles) {
    const Doubles of_class = load<Doubles>(first + k);
    const Doubles average = of_class + load<Doubles>(sum + k) / count;
    store_doubles(mean + k, average);
    of_mean -= x_log_x(average);
    of_first -= x_log_x(of_class);
  }
  for (int64_t k = 0; k < p.classes; k += N) {
    store_wide_first<Real>(static_cast<T*>(p.mean_probability) + b * p.classes + k,
                           load<V>(mean + k), p.classes - k);
  }
  const auto all = [](double x) { return broadcast<Doubles>(x); };
  Measures<Real> measures{};
  measures.set(p, 0, all(sum_lanes(of_mean)), all(sum_lanes(of_first)), all(s.first_entropy[i]),
               all(s.entropy_sum[i]), all(*std::max_element(votes, votes + p.classes)));
  measures.template write<T>(p, b, 1);
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
      double *first = s.first + i * s.width, *sum = s.sum + i * s.width;
      double entropy;
      if (p.from_probabilities) {
        bool good;
        entropy =
            add_row_of_probabilities(s.member, s.width, p.sum_tolerance, m == 0, first, sum, &good);
        if (!good && s.bad[i] < 0) s.bad[i] = static_cast<int32_t>(m);
      } else {
        entropy = add_row_of_logits(s.member, s.width, largest, m == 0, s.exponentials, first, sum);
      }
      if (m == 0) {
        s.first_entropy[i] = entropy;
      } else {
        s.entropy_sum[i] += entropy - s.first_entropy[i];
      }
      ++s.votes[i * s.width + vote];
    }
  }
  for (int64_t i = 0; i < examples; ++i) finish_row<T>(p, b + i, i, s);
}

}  // namespace pyens::PYENS_ISA::uncertainty
