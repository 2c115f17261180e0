// A permutation of [0, n) as a pure function of a key and a place: nothing is stored, so any part of the order of
// any number of rows is there at once, in constant memory, the same on every device.
//
// A place is a number of `bits` bits, the least that hold n - 1, and 10 at least. Six rounds of
//
//   x <- (x * multiplier + summand) mod 2^bits,  x <- x xor (x >> ceil(bits / 2))
//
// each a bijection of [0, 2^bits), as the multiplier is odd: carries take the low half into the high one, the shift
// takes it back. What comes out at n or above goes through the rounds again until it does not, twice at most on
// average ("cycle walking"), which makes of the bijection one of [0, n). Multipliers and summands are 64 bits each,
// mixed from the key.
//
// Six, and ten bits, by experiment (tests/test_keyed_permutation.py has what they pass): of 2 to 6 rows every order
// comes equally often; single bits of places and results, and of the differences of neighbours, go together no more
// than by chance. With four rounds differences over half of 2^10 rows did, and a handful of rows needs 6 bits or more.
//
// The vector form is in kernels/cpu/keyed_permutation-inl.h, the specification in pyens/reference/keyed_permutation.py.
// Source: ours; cycle walking is from Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.
#pragma once

#include <cstdint>

#include "kernels/splitmix.h"
#include "kernels/types.h"

namespace pyens {

constexpr int kPermutationRounds = 6;
constexpr int kLeastPermutationBits = 10;
constexpr int64_t kMostPermuted = int64_t{1} << 62;

struct PermutationRounds {
  uint64_t multiplier[kPermutationRounds], summand[kPermutationRounds];
};

PYENS_HOST_DEVICE inline PermutationRounds permutation_rounds(int64_t key) {
  const uint64_t mixed = splitmix(static_cast<uint64_t>(key));
  PermutationRounds rounds;
  for (int r = 0; r < kPermutationRounds; ++r) {
    rounds.multiplier[r] = splitmix(mixed + static_cast<uint64_t>(2 * r)) | 1;
    rounds.summand[r] = splitmix(mixed + static_cast<uint64_t>(2 * r + 1));
  }
  return rounds;
}

// Of numbers from 0 to n - 1, n >= 1.
PYENS_HOST_DEVICE inline int permutation_bits(int64_t n) {
  int bits = kLeastPermutationBits;
  while (bits < 62 && (int64_t{1} << bits) < n) ++bits;
  return bits;
}

// Once through the rounds. Word is uint64_t, or uint32_t for up to 32 bits: the same numbers.
template <class Word>
PYENS_HOST_DEVICE inline __attribute__((always_inline)) Word
permute_once(Word x, const PermutationRounds& rounds, int bits) {
  const auto mask = static_cast<Word>((uint64_t{1} << bits) - 1);
  const int half = (bits + 1) / 2;
  for (int r = 0; r < kPermutationRounds; ++r) {
    x = (x * static_cast<Word>(rounds.multiplier[r]) + static_cast<Word>(rounds.summand[r])) & mask;
    x ^= x >> half;
  }
  return x;
}

struct KeyedPermutationParams {
  const int64_t* keys;  // [members]
  int64_t members;
  int64_t n;             // rows, 1 to kMostPermuted
  int64_t first, count;  // places: first >= 0, count >= 0, first + count <= n
  int64_t* output;       // [members, count]
};

namespace keyed_permutation_cpu {
// Items are parts of `kPart` places, members outermost.
constexpr int64_t kPart = 1024;
int64_t work_items(const KeyedPermutationParams& params);
int64_t grain_size(const KeyedPermutationParams& params);
void run(const KeyedPermutationParams& params, int64_t begin, int64_t end);
}  // namespace keyed_permutation_cpu

// CUDA: all at once. Launches on `stream` (a cudaStream_t) of the current device and returns nullptr, or says in a
// phrase why it did not.
namespace keyed_permutation_cuda {
const char* run(const KeyedPermutationParams& params, void* stream);
}  // namespace keyed_permutation_cuda

}  // namespace pyens
