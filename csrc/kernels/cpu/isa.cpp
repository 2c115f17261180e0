#include "kernels/cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pyens {
namespace {

constexpr CpuCapability kCapabilities[] = {kBase,   kAvx2,       kAvxVnni,
                                           kAvx512, kAvx512Vnni, kAvx512Bf16};

CpuFeatures processor_features() {
  CpuFeatures features = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Not every compiler's __builtin_cpu_supports knows f16c, avx512bf16 and avxvnni.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
  const bool more = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx);
  const bool bf16 = more && (eax >> 5 & 1), avx_vnni = more && (eax >> 4 & 1);
  // The others also ask the operating system whether it saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx2) features |= PYENS_FEATURE_AVX2;
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (avx2 && avx_vnni) features |= PYENS_FEATURE_AVX_VNNI;
  if (avx512) features |= PYENS_FEATURE_AVX512;
  if (vnni) features |= PYENS_FEATURE_AVX512_VNNI;
  if (vnni && bf16) features |= PYENS_FEATURE_AVX512_BF16;
#endif
  return features;
}

CpuFeatures choose() {
  const CpuFeatures processor = processor_features();
  const char* cap = std::getenv("PYENS_CPU_CAPABILITY");
  if (cap == nullptr || *cap == '\0') return processor;
  // What it names, and all before it: a processor may have AVX-VNNI and no AVX-512.
  CpuFeatures allowed = 0;
  std::string names;
  for (const CpuCapability& capability : kCapabilities) {
    allowed |= capability.features;
    if (std::string(cap) == capability.name) return processor & allowed;
    names += std::string(names.empty() ? "" : ", ") + capability.name;
  }
  throw std::invalid_argument("PYENS_CPU_CAPABILITY: expected one of " + names + ", got " + cap);
}

}  // namespace

CpuFeatures cpu_features() {
  static const CpuFeatures features = choose();
  return features;
}

const char* cpu_capability() {
  const char* name = nullptr;
  for (const CpuCapability& capability : kCapabilities) {
    if ((capability.features & ~cpu_features()) == 0) name = capability.name;
  }
  return name;
}

}  // namespace pyens
