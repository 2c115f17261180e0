// Sine and cosine, within 3 ulp. CUDA's own hold an array where the argument is large, which gives every kernel
// that has them a stack in memory.
//
// x = (q + t) pi/2 with an integer q and |t| <= 1/2: sin x is one of sin, cos, -sin, -cos of t pi/2. A float of
// ordinary size takes the CPU's way.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace pyens {

// 2/pi in fixed point, words of 64 bits; the first one stands before the point.
#if defined(__CUDACC__)
__device__
#endif
    constexpr uint64_t kTwoOverPi[] = {0,
                                       0xa2f9836e4e441529u,
                                       0xfc2757d1f534ddc0u,
                                       0xdb6295993c439041u,
                                       0xfe5163abdebbc561u,
                                       0xb7246e3a424dd2e0u,
                                       0x06492eea09d1921cu,
                                       0xfe1deb1cb129a73eu,
                                       0xe88235f52ebb4484u,
                                       0xe99c7026b45f7e41u,
                                       0x3991d639835339f4u,
                                       0x9c845f8bbdf9283bu,
                                       0x1ff897ffde05980fu,
                                       0xef2f118b5a0a6d1fu,
                                       0x6d367ecf27cb09b7u,
                                       0x4f463f669e5fea2du,
                                       0x7527bac7ebe5f17bu,
                                       0x3d0739f78a5292eau,
                                       0x6bfb5fb11f8d5d08u,
                                       0x56033046fc7b6babu};

// What is left of x in [-pi/4, pi/4], and q modulo 4.
struct Quarters {
  double rest;
  unsigned count;
};

// Of |x| from 2^31 on; NaN of what is not finite.
__device__ inline Quarters reduce_far(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  const int exponent = static_cast<int>(bits >> 52 & 0x7ff);
  if (exponent == 0x7ff) return {x - x, 0};
  // |x| = m 2^e. Of 2^e 2/pi those 192 bits count that weigh 2 and less: multiples of 4 stay so.
  const uint64_t m = (bits & 0xfffffffffffffu) | 0x10000000000000u;
  const int first = exponent - 1075 - 2 + 64, shift = first % 64;
  uint64_t word[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const uint64_t* const at = kTwoOverPi + first / 64 + i;
    word[i] = shift ? at[0] << shift | at[1] >> (64 - shift) : at[0];
  }
  using Wide = unsigned __int128;
  const Wide low = static_cast<Wide>(word[2]) * m;
  Wide high = static_cast<Wide>(word[1]) * m + (static_cast<Wide>(word[0] * m) << 64);
  high += low >> 64;
  // Two bits of quarters, then their share, which is rounded to one in [-1/2, 1/2].
  const auto share = static_cast<__int128>(high << 2);
  const unsigned quarters = static_cast<unsigned>(high >> 126) + (share < 0);
  // Its words apart: the first may be short of digits.
  const auto top = static_cast<int64_t>(share >> 64);
  const double turned = fma(static_cast<double>(static_cast<uint64_t>(share)), 0x1p-128,
                            static_cast<double>(top) * 0x1p-64);
  const double rest = turned * 1.5707963267948966;
  return x < 0 ? Quarters{-rest, 0u - quarters} : Quarters{rest, quarters};
}

__device__ inline Quarters reduce(double x) {
  if (!(fabs(x) < 2147483648.0)) return reduce_far(x);
  const double q = rint(x * 0.6366197723675814);
  double rest = fma(q, -1.5707963267948966, x);
  rest = fma(q, -6.123233995736766e-17, rest);
  return {fma(q, 1.4973849048591698e-33, rest), static_cast<unsigned>(static_cast<int>(q))};
}

// sin(rest + count pi/2): polynomials of Sun's fdlibm.
__device__ inline double sine_of(const Quarters& quarters) {
  const double x = quarters.rest, square = x * x;
  double p, value;
  if (quarters.count & 1) {
    p = -1.13596475577881948265e-11;
    p = fma(p, square, 2.08757232129817482790e-09);
    p = fma(p, square, -2.75573143513906633035e-07);
    p = fma(p, square, 2.48015872894767294178e-05);
    p = fma(p, square, -1.38888888888741095749e-03);
    p = fma(p, square, 4.16666666666666019037e-02);
    const double half = 0.5 * square, rough = 1 - half;
    value = rough + fma(square * square, p, (1 - rough) - half);
  } else {
    p = 1.58969099521155010221e-10;
    p = fma(p, square, -2.50507602534068634195e-08);
    p = fma(p, square, 2.75573137070700676789e-06);
    p = fma(p, square, -1.98412698298579493134e-04);
    p = fma(p, square, 8.33333333332248946124e-03);
    p = fma(p, square, -1.66666666666666324348e-01);
    value = fma(square * x, p, x);
  }
  return quarters.count & 2 ? -value : value;
}

__device__ inline double sine(double x) { return sine_of(reduce(x)); }
__device__ inline double cosine(double x) {
  const Quarters quarters = reduce(x);
  return sine_of({quarters.rest, quarters.count + 1});
}

// As Sin::reduced in activation_formulas-inl.h; n times pi, |n| < 2^13.
__device__ inline float sine_without(float x, float n) {
  float r = fma(n, -3.140625f, x);
  r = fma(n, -0.0009675025939941406f, r);
  r = fma(n, -1.5099580252808664e-07f, r);
  r = fma(n, 3.43024902e-15f, r);
  const float square = r * r;
  float p = 2.605290895e-06f;
  p = fma(p, square, -0.0001980939323f);
  p = fma(p, square, 0.008333063566f);
  p = fma(p, square, -0.1666665945f);
  return fma(r * square, p, r);
}
__device__ inline float sine_far(float x) {
  return static_cast<float>(sine(static_cast<double>(x)));
}
__device__ inline float cosine_far(float x) {
  return static_cast<float>(cosine(static_cast<double>(x)));
}
__device__ inline float sine(float x) {
  if (!(fabs(x) < 20000.0f)) return sine_far(x);
  const float n = rint(x * 0.318309886f), found = sine_without(x, n);
  return static_cast<int>(n) & 1 ? -found : found;
}
__device__ inline float cosine(float x) {
  if (!(fabs(x) < 20000.0f)) return cosine_far(x);
  const float n = rint(fma(x, 0.318309886f, -0.5f)), found = sine_without(x, n + 0.5f);
  return static_cast<int>(n) & 1 ? found : -found;
}

}  // namespace pyens
