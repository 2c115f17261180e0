// Dropout as a pure function, the same on every device: whether hidden unit u of layer l is kept for
// batch row b of a member depends on (the member's seed, l, u, b) and on nothing else, so any pass
// can draw it again and no member depends on another.
//
// 64 bits mixed from (seed, l, u) key a 32-bit hash of b; the unit is kept where the hash reaches
// p 2^32. The vector form of the hash is in kernels/cpu/ensemble_mlp_epilogue-inl.h, the same
// arithmetic in torch in ops/ensemble_mlp.cpp and pyens/reference/ensemble_mlp.py.
#pragma once

#include <cstdint>

#include "kernels/splitmix.h"
#include "kernels/types.h"

namespace pyens {

PYENS_HOST_DEVICE inline uint64_t dropout_layer_key(int64_t seed, int64_t layer) {
  return splitmix(splitmix(static_cast<uint64_t>(seed)) + static_cast<uint64_t>(layer));
}
PYENS_HOST_DEVICE inline uint64_t dropout_unit_key(uint64_t layer_key, int64_t unit) {
  return splitmix(layer_key + static_cast<uint64_t>(unit));
}

// For uint32_t, and vectors of them.
template <class Words>
PYENS_HOST_DEVICE inline Words dropout_hash(Words row, uint64_t unit_key) {
  Words x = row + static_cast<uint32_t>(unit_key);
  x ^= x >> 16;
  x *= 0x21f0aaadu;
  x ^= x >> 15;
  x ^= static_cast<uint32_t>(unit_key >> 32);
  x *= 0x735a2d97u;
  x ^= x >> 15;
  return x;
}

PYENS_HOST_DEVICE inline uint32_t dropout_threshold(double dropout) {
  return static_cast<uint32_t>(dropout * 4294967296.0);
}

}  // namespace pyens
