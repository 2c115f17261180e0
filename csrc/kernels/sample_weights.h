// Sample weights in a range in which they can be summed and divided, the same on every device.
//
// Only their ratios count, so those of a member are multiplied by the power of two that brings the largest to
// [1, 2): weights that are all subnormal, or whose sum overflows, are like any others, and no bit of ordinary
// ones changes. One that is too small beside the largest stays above 0, for 0 leaves an example out.
#pragma once

#include <cmath>

#include "kernels/types.h"

namespace pyens {

// `largest`: at least 0; of 0 it is 1.
PYENS_HOST_DEVICE inline double sample_weight_scale(double largest) {
  if (!(largest > 0)) return 1;
  const int exponent = -ilogb(largest);
  return ldexp(1.0, exponent < 1023 ? exponent : 1023);  // which is enough for subnormal float64
}

template <class R>
PYENS_HOST_DEVICE inline R scaled_sample_weight(R weight, double scale) {
  const R smallest = sizeof(R) == 8 ? R(4.9406564584124654e-324) : R(1.40129846e-45f);
  const R scaled = static_cast<R>(static_cast<double>(weight) * scale);
  return scaled == R(0) && weight > R(0) ? smallest : scaled;
}

// 1 / terms, by which the sum of the losses becomes their mean; 0 where there are none, NaN of NaN. As large as
// R can be where class weights make them so small that it would be infinite.
template <class R>
PYENS_HOST_DEVICE inline R mean_scale(double terms) {
  if (terms == 0) return R(0);
  const double largest = sizeof(R) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;
  const double scale = 1 / terms;
  return static_cast<R>(scale > largest ? largest : scale);
}

}  // namespace pyens
