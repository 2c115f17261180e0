// Compiles one kernel source once per instruction set, each in a namespace of its own:
//
//   #include <every std and kernel header that the source needs>   // outside the pragmas
//   #define PYENS_KERNEL_SOURCE "kernels/cpu/<op>-inl.h"
//   #include "kernels/cpu/foreach_isa.h"
//
// The source sees PYENS_ISA (its namespace) and PYENS_HAS(feature), for `#if`. avx512_bf16, and avx_vnni with
// avx512_vnni, are compiled only for sources with something to gain: #define PYENS_KERNEL_AVX512_BF16,
// PYENS_KERNEL_VNNI. No file needs flags of its own. No include guard: once per kernel.

#define PYENS_ISA base
#define PYENS_ISA_FEATURES 0
#include PYENS_KERNEL_SOURCE
#undef PYENS_ISA
#undef PYENS_ISA_FEATURES

#if defined(__x86_64__)

#if defined(__clang__)
#define PYENS_TARGET_PUSH(features) \
  _Pragma(PYENS_STRINGIZE(          \
      clang attribute push(__attribute__((target(features))), apply_to = function)))
#define PYENS_TARGET_POP _Pragma("clang attribute pop")
#else
#define PYENS_TARGET_PUSH(features) \
  _Pragma("GCC push_options") _Pragma(PYENS_STRINGIZE(GCC target(features)))
#define PYENS_TARGET_POP _Pragma("GCC pop_options")
#endif
#define PYENS_STRINGIZE(...) #__VA_ARGS__

PYENS_TARGET_PUSH("avx2,fma,f16c")
#define PYENS_ISA avx2
#define PYENS_ISA_FEATURES PYENS_FEATURE_AVX2
#include PYENS_KERNEL_SOURCE
#undef PYENS_ISA
#undef PYENS_ISA_FEATURES
PYENS_TARGET_POP

PYENS_TARGET_PUSH("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq")
#define PYENS_ISA avx512
#define PYENS_ISA_FEATURES (PYENS_FEATURE_AVX2 | PYENS_FEATURE_AVX512)
#include PYENS_KERNEL_SOURCE
#undef PYENS_ISA
#undef PYENS_ISA_FEATURES
PYENS_TARGET_POP

#if defined(PYENS_KERNEL_AVX512_BF16)
PYENS_TARGET_PUSH("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")
#define PYENS_ISA avx512_bf16
#define PYENS_ISA_FEATURES (PYENS_FEATURE_AVX2 | PYENS_FEATURE_AVX512 | PYENS_FEATURE_AVX512_BF16)
#include PYENS_KERNEL_SOURCE
#undef PYENS_ISA
#undef PYENS_ISA_FEATURES
PYENS_TARGET_POP
#endif

#if defined(PYENS_KERNEL_VNNI)
PYENS_TARGET_PUSH("avx2,fma,f16c,avxvnni")
#define PYENS_ISA avx_vnni
#define PYENS_ISA_FEATURES (PYENS_FEATURE_AVX2 | PYENS_FEATURE_AVX_VNNI)
#include PYENS_KERNEL_SOURCE
#undef PYENS_ISA
#undef PYENS_ISA_FEATURES
PYENS_TARGET_POP

PYENS_TARGET_PUSH("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq,avx512vnni")
#define PYENS_ISA avx512_vnni
#define PYENS_ISA_FEATURES (PYENS_FEATURE_AVX2 | PYENS_FEATURE_AVX512 | PYENS_FEATURE_AVX512_VNNI)
#include PYENS_KERNEL_SOURCE
#undef PYENS_ISA
#undef PYENS_ISA_FEATURES
PYENS_TARGET_POP
#endif

#endif  // __x86_64__

#undef PYENS_KERNEL_SOURCE
#undef PYENS_KERNEL_VNNI
#undef PYENS_KERNEL_AVX512_BF16
