// Sine and cosine of the CUDA kernels against the C library's, over all sizes of numbers.

#include "kernels/cuda/common.cuh"

#include "emulated_test.h"

namespace {

using namespace emulated_test;

// In units of the last place of `expected`.
template <class T>
double error_of(T got, double expected) {
  if (std::isnan(expected)) return std::isnan(got) ? 0 : INFINITY;
  const T size = static_cast<T>(std::abs(expected));
  const T unit = std::nextafter(size, std::numeric_limits<T>::infinity()) - size;
  const double error = std::abs(static_cast<double>(got) - expected) / static_cast<double>(unit);
  return std::isnan(error) ? INFINITY : error;
}

template <class T>
void test(const char* what, T x) {
  ++problems;
  const double of = static_cast<double>(x);
  const double worst =
      std::max(error_of(pyens::sine(x), static_cast<double>(static_cast<T>(std::sin(of)))),
               error_of(pyens::cosine(x), static_cast<double>(static_cast<T>(std::cos(of)))));
  check(worst <= 4, std::string(what) + " of " + std::to_string(x) + ": " + std::to_string(worst) +
                        " units of the last place");
}

}  // namespace

int main() {
  Random random(1);
  for (int i = 0; i < 200000; ++i) {
    const uint64_t word = random();
    const auto half = static_cast<uint32_t>(word);
    double any;
    float any_float;
    std::memcpy(&any, &word, 8);
    std::memcpy(&any_float, &half, 4);
    const double ordinary = std::ldexp(static_cast<double>(word), i % 48 - 64);
    const double near =
        std::rint(ordinary) * 1.5707963267948966;  // where the result is near 0 or 1
    for (const double x : {any, ordinary, -near}) test("float64", x);
    for (const double x : {ordinary, -near}) test("float32", static_cast<float>(x));
    test("float32", any_float);
  }
  // Both sides of the boundaries, and what has no sine.
  for (const double x :
       {2147483647.0, 2147483648.0, 20000.0, 0.0, std::numeric_limits<double>::max(),
        std::numeric_limits<double>::infinity(), double{NAN}}) {
    for (const double signed_x : {x, -x}) {
      test("float64", signed_x);
      test("float32", static_cast<float>(signed_x));
    }
  }
  // The one that is nearest to a multiple of pi/2; the C library is some units off.
  const double nearest = pyens::cosine(0x1.6ac5b262ca1ffp+849);
  check(error_of(nearest, -4.68716592425462761112e-19) <= 2, "near a multiple of pi/2");
  return finish();
}
