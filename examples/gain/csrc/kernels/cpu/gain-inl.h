// output[m, b, d] = input[m, b, d] * scale[m, d] on one instruction set.
//
// A work item is a row, features in the lanes. Bound by memory: a multiplication for every number written.

#include "kernels/cpu/wide-inl.h"

namespace pyens::PYENS_ISA::gain {

template <class T, class Real>
void run(const GainParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t m = row / p.batch, b = row % p.batch;
    const T* input =
        static_cast<const T*>(p.input) + m * p.input_member_stride + b * p.input_row_stride;
    const T* scale = static_cast<const T*>(p.scale) + m * p.scale_member_stride;
    T* output = static_cast<T*>(p.output) + row * p.features;
    for (int64_t d = 0; d < p.features; d += kWideLanes<Real>) {
      const int64_t n = p.features - d;
      const Wide<Real> x = load_wide_first<Real>(input + d, n);
      store_wide_first<Real>(output + d, x * load_wide_first<Real>(scale + d, n), n);
    }
  }
}

}  // namespace pyens::PYENS_ISA::gain
