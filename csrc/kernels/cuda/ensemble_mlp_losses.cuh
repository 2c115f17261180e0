// The losses at the end of the ensemble MLP, one example to a thread; formulas as on the CPU.
//
// Each takes the outputs z[0 .. n) of an example, leaves the gradient of the loss times `factor` in
// their place, and returns the sum of the loss over its terms.
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/ensemble_mlp.cuh"
#include "kernels/ensemble_mlp.h"

namespace pyens {

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
