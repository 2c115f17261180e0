// The losses at the end of the ensemble MLP, one example to a thread; formulas as on the CPU.
//
// Each takes the outputs z[0 .. n) of an example, leaves the gradient of the loss times `factor` in
// their place, and returns the sum of the loss over its terms.
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/ensemble_mlp.cuh"
#include "kernels/ensemble_mlp.h"
#include "kernels/sample_weights.h"

namespace pyens {

// Terms of one sign are summed in blocks of so many, as on the CPU.
constexpr int64_t kTerms = 16;

template <class R>
__device__ R mse(R* z, int64_t n, const R* target, R factor) {
  R loss = 0;
  for (int64_t f = 0; f < n; ++f) {
    const R error = z[f] - target[f];
    loss = fma(error, error, loss);
    z[f] = (error + error) * factor;
  }
  return loss;
}

template <class R>
__device__ R bce(R* z, int64_t n, const R* target, R factor) {
  R loss = 0;
  for (int64_t f = 0; f < n; ++f) {
    const R x = z[f], y = target[f];
    R term = (x < R(0) ? R(0) : x) - x * y;
    // A difference of infinities, as torch has it: (1 - y) x - log sigmoid(x).
    if (term - term != R(0)) term = (R(1) - y) * x - (x > R(0) ? R(0) : x);
    loss += term + log1p(exp(-fabs(x)));
    z[f] = (Sigmoid::value(x) - y) * factor;
  }
  return loss;
}

// Means, then raw variances: v = softplus(raw) + 1e-6.
template <class R>
__device__ R gaussian_nll(R* z, int64_t n, const R* target, R factor) {
  const int64_t terms = n / 2;
  R loss = 0;
  for (int64_t f = 0; f < terms; ++f) {
    const R raw = z[terms + f], error = z[f] - target[f];
    const R variance = Softplus::value(raw) + R(1e-6);
    const R precision = R(1) / variance, scaled = error * precision;
    loss += R(0.5) * (log(variance) + error * scaled);
    z[f] = scaled * factor;
    const R slope = Softplus::slope(raw, R(0));
    z[terms + f] = R(0.5) * precision * (R(1) - error * scaled) * slope * factor;
  }
  return loss;
}

template <class R>
__device__ R softplus_excess(R x) {  // log(1 + e^-|x|)
  return log1p(exp(-fabs(x)));
}

// The raw log variances are bounded softly, see the CPU's.
template <class R>
__device__ R bounded_gaussian_nll(R* z, int64_t n, const R* target, const R* low, const R* high,
                                  R factor) {
  const int64_t terms = n / 2;
  R loss = 0;
  for (int64_t f = 0; f < terms; ++f) {
    const R raw = z[terms + f], error = z[f] - target[f], below = high[f] - raw;
    const R t = (raw > high[f] ? high[f] : raw) - softplus_excess(below), above = t - low[f];
    const R s = (t < low[f] ? low[f] : t) + softplus_excess(above);
    const R scaled = error * exp(-s);
    loss += R(0.5) * (s + error * scaled);
    z[f] = scaled * factor;
    const R slope = Sigmoid::value(below) * Sigmoid::value(above);
    z[terms + f] = R(0.5) * (slope - error * (scaled * slope)) * factor;
  }
  return loss;
}

// smooth: by delta.
template <class R>
__device__ R huber(R* z, int64_t n, const R* target, R delta, bool smooth, R factor) {
  R loss = 0;
  for (int64_t first = 0; first < n; first += kTerms) {
    R sum = 0;
    for (int64_t f = first; f < n && f < first + kTerms; ++f) {
      const R error = z[f] - target[f];
      const R cut = error > delta ? delta : error < -delta ? -delta : error;
      const R slope = smooth ? cut / delta : cut;
      sum = fma(slope, fma(R(-0.5), cut, error), sum);
      z[f] = slope * factor;
    }
    loss += sum;
  }
  return loss;
}

template <class R>
__device__ R quantile(R* z, int64_t n, const R* target, const double* quantiles,
                      int64_t num_quantiles, R factor) {
  R loss = 0;
  for (int64_t first = 0; first < n; first += kTerms) {
    R sum = 0;
    for (int64_t f = first; f < n && f < first + kTerms; ++f) {
      const double tau = quantiles[f % num_quantiles];
      const R error = target[f / num_quantiles] - z[f];
      const R slope = error > R(0)   ? static_cast<R>(tau)
                      : error < R(0) ? static_cast<R>(tau - 1)
                                     : error;
      sum = fma(error, slope, sum);
      z[f] = -slope * factor;
    }
    loss += sum;
  }
  return loss;
}

template <class R>
__device__ R poisson_nll(R* z, int64_t n, const R* target, R factor) {
  R loss = 0;
  for (int64_t first = 0; first < n; first += kTerms) {
    R sum = 0;
    for (int64_t f = first; f < n && f < first + kTerms; ++f) {
      const R x = z[f], y = target[f], rate = exp(x);
      sum += y == R(0) ? rate : rate - y * x;
      z[f] = (rate - y) * factor;
    }
    loss += sum;
  }
  return loss;
}

// What is expected of the classes: given, or a label's times the weights of the classes.
template <class R>
struct GivenShares {
  const R* target;
  ExpectedClasses<R> expected;
  __device__ R operator()(int64_t c) const {
    return fma(target[c], expected.kept, expected.elsewhere);
  }
};
template <class R>
struct WeightedShares {
  int64_t label;
  const R* class_weight;
  double class_scale;
  ExpectedClasses<R> expected;
  __device__ R operator()(int64_t c) const {
    const R q = c == label ? expected.at_label : expected.elsewhere;
    return q * scaled_sample_weight(class_weight[c], class_scale);
  }
};

template <class R, class Shares>
__device__ R weighted_cross_entropy(R* z, int64_t n, const Shares& share, R inverse_temperature,
                                    R factor) {
  R largest = z[0], shares = 0, expected = 0, total = 0;
  for (int64_t c = 1; c < n; ++c) largest = z[c] < largest ? largest : z[c];
  for (int64_t first = 0; first < n; first += kTerms) {
    R sum = 0, of_shares = 0, exponentials = 0;
    for (int64_t c = first; c < n && c < first + kTerms; ++c) {
      const R q = share(c), x = (z[c] - largest) * inverse_temperature;
      of_shares += q;
      if (q != R(0)) sum = fma(x, q, sum);
      z[c] = exp(x);
      exponentials += z[c];
    }
    shares += of_shares;
    expected += sum;
    total += exponentials;
  }
  const R inverse = shares / total;
  for (int64_t c = 0; c < n; ++c) {
    z[c] = fma(z[c], inverse, -share(c)) * inverse_temperature * factor;
  }
  return fma(log(total), shares, -expected);
}

// An out-of-range class makes all of it NaN.
template <class R>
__device__ R cross_entropy(R* z, int64_t n, int64_t label, R inverse_temperature,
                           const ExpectedClasses<R>& expected, R factor) {
  const bool exists = label >= 0 && label < n;
  R largest = z[0], total = 0, chosen = 0;
  for (int64_t c = 1; c < n; ++c) largest = z[c] < largest ? largest : z[c];
  R smoothed = 0;
  const bool smooth = expected.elsewhere > R(0);
  for (int64_t first = 0; smooth && first < n; first += kChain) {
    R sum = 0;
    for (int64_t c = first; c < n && c < first + kChain; ++c) {
      const R q = c == label ? expected.at_label : expected.elsewhere;
      sum = fma((z[c] - largest) * inverse_temperature, q, sum);
    }
    smoothed += sum;
  }
  for (int64_t c = 0; c < n; ++c) {
    const R x = (z[c] - largest) * inverse_temperature;
    if (c == label) chosen = x;
    z[c] = exp(x);
    total += z[c];
  }
  const R scale = exists ? inverse_temperature * factor : static_cast<R>(NAN);
  for (int64_t c = 0; c < n; ++c) {
    const R q = c == label ? expected.at_label : expected.elsewhere;
    z[c] = (z[c] / total - q) * scale;
  }
  return exists ? log(total) - (smooth ? smoothed : chosen) : static_cast<R>(NAN);
}

}  // namespace pyens
