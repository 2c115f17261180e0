#include "kernels/cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pyens {
namespace {

constexpr const char* kNames[] = {"base", "avx2", "avx512", "avx512_bf16"};

Isa processor_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Not every compiler's __builtin_cpu_supports knows f16c and avx512bf16.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
  const bool bf16 = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
  // The others also ask the operating system whether it saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512) return bf16 ? Isa::avx512_bf16 : Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::base;
}

Isa choose() {
  const Isa processor = processor_isa();
  const char* cap = std::getenv("PYENS_CPU_CAPABILITY");
  if (cap == nullptr || *cap == '\0') return processor;
  for (int level = 0; level < 4; ++level) {
    if (std::string(cap) == kNames[level]) return std::min(processor, static_cast<Isa>(level));
  }
  throw std::invalid_argument(
      std::string("PYENS_CPU_CAPABILITY: expected base, avx2, avx512 or avx512_bf16, got ") + cap);
}

}  // namespace

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace pyens
