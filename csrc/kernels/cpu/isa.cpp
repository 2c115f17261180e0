#include "kernels/cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pyens {
namespace {

constexpr const char* kNames[] = {"base", "avx2", "avx512", "avx512_bf16"};

Isa processor_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // These also ask the operating system whether it saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (avx512) return Isa::avx512;
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
