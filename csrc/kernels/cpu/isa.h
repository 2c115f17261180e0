// What the CPU kernels use of the processor: chosen once per process, from what it has, capped by the
// environment variable PYENS_CPU_CAPABILITY.
#pragma once

#include <cstdint>

// Features, as bits that `#if` can read too. AMX or SVE would be one more line here, in processor_features(), and a name
// below.
#define PYENS_FEATURE_AVX2 1         // AVX2, FMA and F16C
#define PYENS_FEATURE_AVX512 2       // F, VL, BW and DQ; with those of AVX2
#define PYENS_FEATURE_AVX512_BF16 4  // dot products of bfloat16
#define PYENS_FEATURE_AVX512_VNNI 8  // of bytes
#define PYENS_FEATURE_AVX_VNNI 16    // the same in vectors of AVX2

// In a kernel source (see foreach_isa.h): whether it is compiled for a feature.
#define PYENS_HAS(feature) (PYENS_ISA_FEATURES & PYENS_FEATURE_##feature)

namespace pyens {

using CpuFeatures = uint32_t;

// Sets of features that a kernel is compiled for. PYENS_CPU_CAPABILITY names the largest allowed one.
struct CpuCapability {
  const char* name;
  CpuFeatures features;
};
inline constexpr CpuCapability kBase{"base", 0};
inline constexpr CpuCapability kAvx2{"avx2", PYENS_FEATURE_AVX2};
inline constexpr CpuCapability kAvxVnni{"avx_vnni", kAvx2.features | PYENS_FEATURE_AVX_VNNI};
inline constexpr CpuCapability kAvx512{"avx512", kAvx2.features | PYENS_FEATURE_AVX512};
inline constexpr CpuCapability kAvx512Vnni{"avx512_vnni",
                                           kAvx512.features | PYENS_FEATURE_AVX512_VNNI};
inline constexpr CpuCapability kAvx512Bf16{"avx512_bf16",
                                           kAvx512Vnni.features | PYENS_FEATURE_AVX512_BF16};

// What every kernel of this process uses. Throws std::invalid_argument if PYENS_CPU_CAPABILITY names
// none of the above; what it allows and the processor lacks is left out.
CpuFeatures cpu_features();

// The name of the largest set above that these features contain.
const char* cpu_capability();

}  // namespace pyens
