// Which instruction set the CPU kernels run on: chosen once per process, from what the processor
// has, capped by the environment variable PYENS_CPU_CAPABILITY (base, avx2, avx512, avx512_bf16).
#pragma once

namespace pyens {

// Ordered: each level contains the ones before it.
enum class Isa : int { base = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The level that every kernel of this process uses. Throws std::invalid_argument if
// PYENS_CPU_CAPABILITY names no level; a level above the processor's own is lowered to it.
Isa chosen_isa();

const char* isa_name(Isa isa);

}  // namespace pyens
