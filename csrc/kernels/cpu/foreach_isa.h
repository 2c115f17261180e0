// Compiles one kernel source once per instruction set, each in a namespace of its own:
//
//   #include <every std and kernel header that the source needs>   // outside the pragmas
//   #define PYENS_KERNEL_SOURCE "kernels/cpu/<op>-inl.h"
//   #include "kernels/cpu/foreach_isa.h"
//
// The source sees PYENS_ISA (its namespace) and PYENS_ISA_LEVEL (the value of pyens::Isa). A source
// that has nothing to gain from a level says so with `#if PYENS_ISA_LEVEL`. No file needs flags of
// its own. No include guard: once per kernel.

#define PYENS_ISA base
#define PYENS_ISA_LEVEL 0
#include PYENS_KERNEL_SOURCE
#undef PYENS_ISA
#undef PYENS_ISA_LEVEL

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
#define PYENS_ISA_LEVEL 1
#include PYENS_KERNEL_SOURCE
#undef PYENS_ISA
#undef PYENS_ISA_LEVEL
PYENS_TARGET_POP

PYENS_TARGET_PUSH("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq")
#define PYENS_ISA avx512
#define PYENS_ISA_LEVEL 2
#include PYENS_KERNEL_SOURCE
#undef PYENS_ISA
#undef PYENS_ISA_LEVEL
PYENS_TARGET_POP

PYENS_TARGET_PUSH("avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")
#define PYENS_ISA avx512_bf16
#define PYENS_ISA_LEVEL 3
#include PYENS_KERNEL_SOURCE
#undef PYENS_ISA
#undef PYENS_ISA_LEVEL
PYENS_TARGET_POP

#endif  // __x86_64__

#undef PYENS_KERNEL_SOURCE
