// Some places of keyed permutations on one instruction set.
//
// Places in the lanes, of 32 bits where n allows it: a round is a product, an addition, two bitwise operations and a
// shift. All of a part's places go through the rounds, then those that came out at n or above are collected and go
// again, until there are none: the vectors stay full, where lanes that waited for the slowest of them would
// take five turns instead of two at n just above a power of two. Bound by the integer products (two micro-operations
// each on most processors, of 32 bits; of 64 without AVX-512 three of them) and by collecting, a store a place.

namespace pyens::PYENS_ISA::keyed_permutation {

// places: their number, x[] from places to results.
template <class Word>
void permute(Word* x, int64_t places, const PermutationRounds& rounds, int bits, int64_t n) {
  constexpr int64_t kMost = keyed_permutation_cpu::kPart;
  for (int64_t i = 0; i < places; ++i) x[i] = permute_once<Word>(x[i], rounds, bits);
  const auto most = static_cast<Word>(n - 1);
  uint16_t where[kMost];
  int64_t outside = 0;
  for (int64_t i = 0; i < places; ++i) {
    where[outside] = static_cast<uint16_t>(i);
    outside += x[i] > most;
  }
  Word again[kMost];
  while (outside > 0) {
    for (int64_t i = 0; i < outside; ++i) again[i] = x[where[i]];
    for (int64_t i = 0; i < outside; ++i) again[i] = permute_once<Word>(again[i], rounds, bits);
    int64_t left = 0;
    for (int64_t i = 0; i < outside; ++i) {
      const uint16_t place = where[i];
      x[place] = again[i];
      where[left] = place;
      left += again[i] > most;
    }
    outside = left;
  }
}

template <class Word>
void run_parts(const KeyedPermutationParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kPart = keyed_permutation_cpu::kPart;
  const int64_t parts = (p.count + kPart - 1) / kPart;
  const int bits = permutation_bits(p.n);
  Word x[kPart];
  int64_t of = -1;
  PermutationRounds rounds{};
  for (int64_t item = begin; item < end; ++item) {
    const int64_t m = item / parts, start = item % parts * kPart;
    const int64_t places = std::min(kPart, p.count - start);
    if (m != of) rounds = permutation_rounds(p.keys[of = m]);
    for (int64_t i = 0; i < places; ++i) x[i] = static_cast<Word>(p.first + start + i);
    permute<Word>(x, places, rounds, bits, p.n);
    int64_t* const to = p.output + m * p.count + start;
    for (int64_t i = 0; i < places; ++i) to[i] = static_cast<int64_t>(x[i]);
  }
}

constexpr PermutationFunctions kFunctions{&run_parts<uint32_t>, &run_parts<uint64_t>};

}  // namespace pyens::PYENS_ISA::keyed_permutation
