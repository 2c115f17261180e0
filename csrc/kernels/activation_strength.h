// Activation strength: what the hidden units of an ensemble MLP did on its way to the output.
//
// Not a kernel of its own: `MLPCall::strength` asks ensemble_mlp_cpu::run and ensemble_mlp_cuda::run
// for it.
#pragma once

#include <cstdint>

namespace pyens {

// For each unit of each hidden layer, one layer after the other:
//   value = (h - mean) / std, and 0 where std is smaller than any normal number;   active = h > 0
// "Real" is float64 for float64 and float32 for all others.
struct ActivationStrengthParams {
  int64_t units;     // of all hidden layers together; 0: not asked for
  const void* mean;  // Real [units] (member stride 0) or [E, units], like std
  const void* std;
  int64_t mean_member_stride, std_member_stride;
  void* value;      // [E, B, units], contiguous, of the type of the output
  uint8_t* active;  // [E, B, units], each 0 or 1; bitpack: [E, B, ceil(units / 8)]
  bool bitpack;     // unit u is bit u % 8 of byte u / 8, the lowest bit first; bits left over are 0
};

}  // namespace pyens
