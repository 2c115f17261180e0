#include "kernels/keyed_permutation.h"

#include "kernels/cpu/choose.h"

namespace pyens {
namespace {
struct PermutationFunctions {  // for n of up to 32 bits, and for all
  void (*narrow)(const KeyedPermutationParams&, int64_t begin, int64_t end);
  void (*wide)(const KeyedPermutationParams&, int64_t begin, int64_t end);
};
}  // namespace
}  // namespace pyens

#define PYENS_KERNEL_SOURCE "kernels/cpu/keyed_permutation-inl.h"
#include "kernels/cpu/foreach_isa.h"

namespace pyens::keyed_permutation_cpu {

int64_t work_items(const KeyedPermutationParams& p) {
  return p.members * ((p.count + kPart - 1) / kPart);
}

// A part of a place takes some nanoseconds, and so many turns of those that n leaves of the bijection's numbers.
int64_t grain_size(const KeyedPermutationParams& p) {
  const double turns =
      static_cast<double>(int64_t{1} << permutation_bits(p.n)) / static_cast<double>(p.n);
  const double places = static_cast<double>(p.members) * static_cast<double>(p.count);
  constexpr double kTurnsWorthAThread = 8192;
  return items_worth_a_thread(kTurnsWorthAThread, places * turns, work_items(p));
}

void run(const KeyedPermutationParams& p, int64_t begin, int64_t end) {
  static const Chosen<PermutationFunctions> chosen{
#if defined(__x86_64__)
      {kAvx512, {&avx512::keyed_permutation::kFunctions}},
      {kAvx2, {&avx2::keyed_permutation::kFunctions}},
#endif
      {kBase, {&base::keyed_permutation::kFunctions}}};
  const PermutationFunctions& functions = chosen[DType::float32];
  (permutation_bits(p.n) <= 32 ? functions.narrow : functions.wide)(p, begin, end);
}

}  // namespace pyens::keyed_permutation_cpu
