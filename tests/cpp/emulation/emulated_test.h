// What the tests of emulated kernels share: numbers on both sides, comparison, orders.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "emulation.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "kernels/types.h"

namespace emulated_test {

using emulation::Global;
using Random = std::mt19937_64;

inline int failures = 0, problems = 0;

inline void check(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

inline int finish() {
  if (failures == 0) std::printf("ok: %d problems\n", problems);
  return failures != 0;
}

// Elements are float, double, BFloat16 or Float16.
template <class T>
constexpr bool kIsReal = std::is_floating_point_v<T>;

template <class T>
pyens::DType dtype_of() {
  if (std::is_same_v<T, double>) return pyens::DType::float64;
  if (std::is_same_v<T, pyens::BFloat16>) return pyens::DType::bfloat16;
  if (std::is_same_v<T, pyens::Float16>) return pyens::DType::float16;
  return pyens::DType::float32;
}

template <class T>
double to_double(T x) {
  if constexpr (kIsReal<T>) {
    return static_cast<double>(x);
  } else if constexpr (std::is_same_v<T, pyens::BFloat16>) {
    return static_cast<double>(emulation::widen_bfloat16(x.bits));
  } else {
    return static_cast<double>(emulation::widen_half(x.bits));
  }
}
template <class T>
T from_double(double x) {
  if constexpr (kIsReal<T>) {
    return static_cast<T>(x);
  } else if constexpr (std::is_same_v<T, pyens::BFloat16>) {
    return {emulation::round_to_bfloat16(static_cast<float>(x))};
  } else {
    return {emulation::round_to_half(static_cast<float>(x))};
  }
}

// The arithmetic type of T.
template <class T>
using RealFor = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
std::vector<T> normal(Random& random, int64_t n, double scale = 1, double offset = 0) {
  std::normal_distribution<double> distribution;
  std::vector<T> values(static_cast<size_t>(n));
  for (T& value : values) value = from_double<T>(distribution(random) * scale + offset);
  return values;
}

// The same numbers where the CPU's kernel reads them and where the GPU's does.
template <class T>
struct Values {
  std::vector<T> cpu;
  Global<T> gpu;
  explicit Values(std::vector<T> values, const char* name = "input")
      : cpu(std::move(values)), gpu(cpu, name) {}
  Values(Random& random, int64_t n, double scale = 1, double offset = 0)
      : Values(normal<T>(random, n, scale, offset)) {}
};

// Of a CPU kernel: 64-byte aligned, NaN.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : bytes_((bytes + 64) / 64 * 64) {
    data_ = std::aligned_alloc(64, bytes_);
    std::memset(data_, 0xff, bytes_);
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return data_; }

 private:
  size_t bytes_;
  void* data_;
};

// The largest difference, against the largest number; NaN only where both are.
template <class T>
double worst(const std::vector<T>& got, const std::vector<T>& expected) {
  double error = 0, size = 1e-30;
  for (size_t i = 0; i < got.size(); ++i) {
    const double a = to_double(got[i]), b = to_double(expected[i]);
    if (a == b || (std::isnan(a) && std::isnan(b))) continue;
    const double difference = std::abs(a - b);
    error = difference <= error ? error : difference;  // a NaN stays
    if (std::isfinite(b)) size = std::max(size, std::abs(b));
  }
  for (const T& x : expected) {
    if (std::isfinite(to_double(x))) size = std::max(size, std::abs(to_double(x)));
  }
  return error / size;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  if (a.size() != b.size()) return false;
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

constexpr double kTight = 0;
template <class T>
double tolerance_of(double asked) {
  if (asked != kTight) return asked;
  return std::is_same_v<T, double> ? 1e-12 : std::is_same_v<T, float> ? 1e-5 : 0.01;
}

template <class T>
void check_close(const std::string& what, const std::vector<T>& got, const std::vector<T>& expected,
                 double tolerance = kTight) {
  const double error = worst(got, expected);
  check(error <= tolerance_of<T>(tolerance), what + ": differs by " + std::to_string(error));
}

// launch(output) under several orders of blocks and threads: no fault, the same bits each time, and
// close to what is expected.
template <class T, class Launch>
void run_all_orders(const std::string& what, const std::vector<T>& expected, double tolerance,
                    const Launch& launch) {
  ++problems;
  std::vector<T> first;
  for (const uint64_t seed : {1, 2, 3}) {
    emulation::set_seed(seed);
    Global<T> output(expected.size(), "output");
    const char* error = launch(static_cast<void*>(output.data()));
    if (error) return check(false, what + ": " + error);
    const std::vector<T> got = output.host();
    if (first.empty()) first = got;
    check(same_bits(got, first), what + ": other bits in another order");
  }
  check_close(what, first, expected, tolerance);
}

// No ordinary numbers, and a largest one, any two of which overflow: what is planted where a kernel must keep
// an element to itself.
template <class T>
std::vector<T> unusual() {
  const double infinity = std::numeric_limits<double>::infinity();
  const double largest = std::is_same_v<T, double>            ? std::numeric_limits<double>::max()
                         : std::is_same_v<T, pyens::Float16>  ? 65504
                         : std::is_same_v<T, pyens::BFloat16> ? 0x1.fep127
                                                              : std::numeric_limits<float>::max();
  return {from_double<T>(infinity), from_double<T>(-infinity), from_double<T>(NAN),
          from_double<T>(largest), from_double<T>(-largest)};
}

// Every seventh of them, and the first.
template <class T>
void plant_unusual(std::vector<T>& values) {
  const std::vector<T> planted = unusual<T>();
  for (size_t i = 0; i < values.size(); i += 7) values[i] = planted[i / 7 % planted.size()];
}

// None of them 0; among them NaN and infinities of each type of that size.
template <class Word>
std::vector<Word> random_words(Random& random, int64_t n) {
  std::vector<Word> infinities;
  if (sizeof(Word) == 2) {
    infinities = {static_cast<Word>(0x7c00), static_cast<Word>(0xfc00), static_cast<Word>(0x7f80),
                  static_cast<Word>(0xff80)};
  } else {
    const int exponent = sizeof(Word) == 4 ? 23 : 52, sign = static_cast<int>(sizeof(Word)) * 8 - 1;
    const Word ones = (Word{1} << (sign - exponent)) - 1;
    infinities = {static_cast<Word>(ones << exponent),
                  static_cast<Word>((ones << exponent) | Word{1} << sign)};
  }
  std::vector<Word> words(static_cast<size_t>(n));
  for (size_t i = 0; i < words.size(); ++i) {
    words[i] = static_cast<Word>(random() | 1);
    if (i % 5 == 0)
      words[i] = static_cast<Word>(infinities[i / 5 % infinities.size()] | (i % 3 == 0));
  }
  return words;
}

// launch(output) under several orders, against `expected`, bit by bit.
template <class T, class Launch>
void expect_bits(const std::string& what, const std::vector<T>& expected, const Launch& launch) {
  ++problems;
  for (const uint64_t seed : {1, 2, 3}) {
    emulation::set_seed(seed);
    Global<T> output(expected.size(), "output");
    const char* error = launch(output.data());
    if (error) return check(false, what + ": " + error);
    check(same_bits(output.host(), expected), what + ": other bits than on the CPU");
  }
}

}  // namespace emulated_test
