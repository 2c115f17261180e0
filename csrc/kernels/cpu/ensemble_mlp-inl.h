// The ensemble MLP on one instruction set.
//
// Two mappings, chosen by the batch size alone: examples in the lanes (ensemble_mlp_panels-inl.h),
// and below kSmallBatch examples neurons in the lanes (ensemble_mlp_stripes-inl.h). Both keep hidden
// activations in cache; only the input, the weights, the output and the activation strength, if asked
// for (activation_strength-inl.h), go to memory.
//
// Accumulation contract, the same in both: per output one chain of multiply-adds over each block of
// kBlock inputs in ascending order; the block sums are added in order to the bias. So an output
// does not depend on batch size, tile, thread, or the members beside it.

#include "kernels/cpu/register_blocks-inl.h"
#include "kernels/cpu/sparse_rows-inl.h"
#include "kernels/cpu/elementary-inl.h"
#include "kernels/cpu/activations-inl.h"
#include "kernels/cpu/ensemble_mlp_common-inl.h"
#include "kernels/cpu/ensemble_mlp_epilogue-inl.h"
#include "kernels/cpu/ensemble_mlp_panels-inl.h"
#include "kernels/cpu/ensemble_mlp_stripes-inl.h"

namespace pyens::PYENS_ISA::ensemble_mlp {

template <class A>
int64_t work_items(const Forward& p) {
  if (small_batch(p)) return p.ensemble_size;
  return p.ensemble_size * ((p.batch + tile_size<A>(p) - 1) / tile_size<A>(p));
}

template <class A>
size_t scratch_bytes(const Forward& p) {
  return Scratch<A>(p, nullptr).bytes;
}

template <class A>
void run(const Forward& p, int64_t begin, int64_t end, void* base) {
  const Scratch<A> scratch(p, base);
  if (small_batch(p)) {
    run_small<A>(p, begin, end, scratch);
  } else {
    run_tiles<A>(p, begin, end, scratch);
  }
}

template <class A>
constexpr MLPFunctions kFunctionsOf = {work_items<A>, scratch_bytes<A>, run<A>, kPrepackedLayout<A>,
                                       prepack<A>};
#if PYENS_HAS(AVX512_BF16)
constexpr MLPFunctions kPairFunctions = kFunctionsOf<Bfloat16Pairs>;
#else
template <class E, class R>
constexpr MLPFunctions kFunctions = kFunctionsOf<Plain<E, R> >;
#endif

}  // namespace pyens::PYENS_ISA::ensemble_mlp
