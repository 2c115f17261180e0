// keyed_permutation: a bijection, the same in every cut, in 32 bits and in 64.

#include "kernels/keyed_permutation.h"

#include <algorithm>
#include <cstdio>
#include <vector>

namespace {

int failures = 0, problems = 0;

void check(bool condition, const char* what, int64_t n, int64_t first) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s (%lld, %lld)\n", what, static_cast<long long>(n),
              static_cast<long long>(first));
}

// One place after the other, in 64 bits.
int64_t plain(int64_t key, int64_t n, int64_t place) {
  const pyens::PermutationRounds rounds = pyens::permutation_rounds(key);
  const int bits = pyens::permutation_bits(n);
  auto x = static_cast<uint64_t>(place);
  do {
    x = pyens::permute_once<uint64_t>(x, rounds, bits);
  } while (x >= static_cast<uint64_t>(n));
  return static_cast<int64_t>(x);
}

std::vector<int64_t> run(const std::vector<int64_t>& keys, int64_t n, int64_t first, int64_t count,
                         int64_t step) {
  ++problems;
  std::vector<int64_t> output(keys.size() * static_cast<size_t>(count), -1);
  pyens::KeyedPermutationParams p{};
  p.keys = keys.data();
  p.members = static_cast<int64_t>(keys.size());
  p.n = n;
  p.first = first;
  p.count = count;
  p.output = output.data();
  const int64_t items = pyens::keyed_permutation_cpu::work_items(p);
  for (int64_t begin = 0; begin < items; begin += step) {
    pyens::keyed_permutation_cpu::run(p, begin, std::min(items, begin + step));
  }
  return output;
}

void test_places(const std::vector<int64_t>& keys, int64_t n, int64_t first, int64_t count) {
  const std::vector<int64_t> found = run(keys, n, first, count, 1);
  bool same = true;
  for (size_t m = 0; m < keys.size(); ++m) {
    for (int64_t i = 0; i < count; ++i) {
      same &= found[m * static_cast<size_t>(count) + static_cast<size_t>(i)] ==
              plain(keys[m], n, first + i);
    }
  }
  check(same, "places", n, first);
  check(run(keys, n, first, count, 1 << 20) == found, "cuts", n, first);
}

void test_bijection(int64_t n) {
  const std::vector<int64_t> found = run({n * 7919}, n, 0, n, 3);
  std::vector<bool> there(static_cast<size_t>(n));
  for (const int64_t row : found) {
    if (row >= 0 && row < n) there[static_cast<size_t>(row)] = true;
  }
  check(std::count(there.begin(), there.end(), true) == n, "bijection", n, 0);
}

}  // namespace

int main() {
  const std::vector<int64_t> keys = {0, 1, -1, INT64_MIN, INT64_MAX};
  for (const int64_t n : {1, 2, 3, 10, 1023, 1024, 1025, 4097, 100003}) {
    test_bijection(n);
    test_places(keys, n, 0, std::min<int64_t>(n, 1500));
    test_places(keys, n, n / 2, n - n / 2 < 100 ? n - n / 2 : 100);
    test_places(keys, n, n, 0);
  }
  for (const int bits : {31, 32, 33, 40, 61, 62}) {
    const int64_t power = int64_t{1} << bits;
    for (const int64_t n : {power - 1, power, bits < 62 ? power + 1 : power}) {
      test_places(keys, n, 0, 40);
      test_places(keys, n, n - 1500, 1500);
    }
  }
  if (failures == 0) std::printf("ok: %d problems\n", problems);
  return failures != 0;
}
