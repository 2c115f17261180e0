// Chooses among what foreach_isa.h compiled, by what the processor has and by the element type: once
// per process and kernel. Also the headers that kernel sources need, which must stand outside of its
// pragmas.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels/cpu/isa.h"
#include "kernels/types.h"

namespace pyens {

// The functions of a kernel, compiled for one set of features: of each element type or nullptr.
template <class Functions>
struct Variant {
  const CpuCapability& needs;
  const Functions* of[kDTypes];
};

template <class Functions>
class Chosen {
 public:
  // The best ones first.
  Chosen(std::initializer_list<Variant<Functions>> variants) {
    for (const Variant<Functions>& variant : variants) {
      if ((variant.needs.features & ~cpu_features()) != 0) continue;
      for (int i = 0; i < kDTypes; ++i) {
        if (of_[i] == nullptr) of_[i] = variant.of[i];
      }
    }
  }
  const Functions& operator[](DType dtype) const { return *of_[static_cast<int>(dtype)]; }

 private:
  const Functions* of_[kDTypes] = {};
};

// op::functions<element type, arithmetic type>, in the order of DType.
#define PYENS_BY_DTYPE(isa, op, functions)                                 \
  {&isa::op::functions<float, float>, &isa::op::functions<double, double>, \
   &isa::op::functions<BFloat16, float>, &isa::op::functions<Float16, float>}

#if defined(__x86_64__)
#define PYENS_VARIANTS(op, functions)                                                             \
  {kAvx512, PYENS_BY_DTYPE(avx512, op, functions)}, {kAvx2, PYENS_BY_DTYPE(avx2, op, functions)}, \
  {                                                                                               \
    kBase, PYENS_BY_DTYPE(base, op, functions)                                                    \
  }
#else
#define PYENS_VARIANTS(op, functions) {kBase, PYENS_BY_DTYPE(base, op, functions)}
#endif

// op::functions of a kernel on bytes, which takes its place under float32.
#if defined(__x86_64__)
#define PYENS_INT8_VARIANTS(op, functions)                                           \
  {kAvx512Vnni, {&avx512_vnni::op::functions}}, {kAvx512, {&avx512::op::functions}}, \
      {kAvxVnni, {&avx_vnni::op::functions}}, {kAvx2, {&avx2::op::functions}}, {     \
    kBase, { &base::op::functions }                                                  \
  }
#else
#define PYENS_INT8_VARIANTS(op, functions) \
  {                                        \
    kBase, { &base::op::functions }        \
  }
#endif

// How many of `items` a thread should have at least, if `worth` units of work, of `total` in all, take
// as long as waking it.
inline int64_t items_worth_a_thread(double worth, double total, int64_t items) {
  const double count = static_cast<double>(std::max<int64_t>(items, 1));
  const double per_item = std::max(total / count, 1.0);
  return std::max<int64_t>(1, static_cast<int64_t>(std::min(count, worth / per_item)));
}
constexpr double kMultiplyAddsWorthAThread = 50e3;  // some microseconds

}  // namespace pyens
