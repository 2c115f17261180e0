// Some places of keyed permutations, on the GPU.
//
// Mapping: a thread for each place, neighbours in memory; a warp waits for the slowest of its places, five turns of six
// rounds at most on average. Bound by the integer products where n is just above a power of two, by writing elsewhere.
// The rounds' numbers are mixed again for each place, 12 hashes of 64 bits, since a block's places are of one member or two.

#include "kernels/cuda/common.cuh"
#include "kernels/keyed_permutation.h"

namespace pyens {
namespace {

constexpr unsigned kThreads = 256;

template <class Word>
__global__ void __launch_bounds__(kThreads)
    keyed_permutation_kernel(const KeyedPermutationParams p, int bits) {
  const int64_t size = p.members * p.count;
  for (int64_t i = first_item(); i < size; i += all_threads()) {
    const PermutationRounds rounds = permutation_rounds(p.keys[i / p.count]);
    auto x = static_cast<Word>(p.first + i % p.count);
    const auto most = static_cast<Word>(p.n - 1);
    do {
      x = permute_once<Word>(x, rounds, bits);
    } while (x > most);
    p.output[i] = static_cast<int64_t>(x);
  }
}

}  // namespace

namespace keyed_permutation_cuda {

const char* run(const KeyedPermutationParams& p, void* stream) {
  const unsigned blocks = striding_blocks(p.members * p.count, kThreads);
  const int bits = permutation_bits(p.n);
  return bits <= 32
             ? launch(keyed_permutation_kernel<uint32_t>, blocks, kThreads, 0, stream, p, bits)
             : launch(keyed_permutation_kernel<uint64_t>, blocks, kThreads, 0, stream, p, bits);
}

}  // namespace keyed_permutation_cuda
}  // namespace pyens
