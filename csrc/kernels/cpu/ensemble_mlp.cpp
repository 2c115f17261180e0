// Chooses the instruction set and the element type of the ensemble MLP; the work is in
// ensemble_mlp-inl.h.

#include "kernels/ensemble_mlp.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/cpu/isa.h"
#include "kernels/dropout.h"

namespace pyens {
namespace {

struct MLPFunctions {
  int64_t (*work_items)(const ensemble_mlp_cpu::Forward&);
  size_t (*scratch_bytes)(const ensemble_mlp_cpu::Forward&);
  void (*run)(const ensemble_mlp_cpu::Forward&, int64_t begin, int64_t end, void* scratch);
  ensemble_mlp_cpu::PrepackedLayout prepacked_layout;
  void (*prepack)(const EnsembleMLP&, int64_t begin, int64_t end, void* prepacked);
};

}  // namespace
}  // namespace pyens

#define PYENS_KERNEL_SOURCE "kernels/cpu/ensemble_mlp-inl.h"
#include "kernels/cpu/foreach_isa.h"

namespace pyens {
namespace {

// A kernel is of one format of weights for all layers.
DType format_of(const EnsembleMLP& mlp) { return mlp.layers[0].weight.format; }

const MLPFunctions& functions(DType dtype) {
#define PYENS_BY_DTYPE(isa, bf16)                                                          \
  switch (dtype) {                                                                         \
    case DType::float64:                                                                   \
      return isa::ensemble_mlp::kFunctions<isa::ensemble_mlp::Plain<double, double>>;      \
    case DType::float16:                                                                   \
      return isa::ensemble_mlp::kFunctions<isa::ensemble_mlp::Plain<Float16, float>>;      \
    case DType::bfloat16: return bf16;                                                     \
    default: return isa::ensemble_mlp::kFunctions<isa::ensemble_mlp::Plain<float, float>>; \
  }
#define PYENS_PLAIN_BF16(isa) \
  isa::ensemble_mlp::kFunctions<isa::ensemble_mlp::Plain<BFloat16, float>>
  switch (chosen_isa()) {
#if defined(__x86_64__)
    case Isa::avx512_bf16:
      PYENS_BY_DTYPE(
          avx512, avx512_bf16::ensemble_mlp::kFunctions<avx512_bf16::ensemble_mlp::Bfloat16Pairs>)
    case Isa::avx512: PYENS_BY_DTYPE(avx512, PYENS_PLAIN_BF16(avx512))
    case Isa::avx2: PYENS_BY_DTYPE(avx2, PYENS_PLAIN_BF16(avx2))
#endif
    default: PYENS_BY_DTYPE(base, PYENS_PLAIN_BF16(base))
  }
#undef PYENS_PLAIN_BF16
#undef PYENS_BY_DTYPE
}

}  // namespace

namespace ensemble_mlp_cpu {

int64_t work_items(const Forward& p) {
  return p.batch == 0 ? 0 : functions(format_of(p)).work_items(p);
}

int64_t grain_size(const Forward& p) {
  // Waking a thread costs some microseconds, about this many multiply-adds.
  constexpr double kWorthAThread = 50e3;
  double total = 0;
  for (int64_t l = 0; l < p.num_layers; ++l) {
    // The small-batch kernel reads every weight once, however few the examples.
    const double examples = static_cast<double>(std::max<int64_t>(p.batch, 4));
    total += static_cast<double>(p.layers[l].in * p.layers[l].out) * examples;
  }
  const double items = static_cast<double>(std::max<int64_t>(work_items(p), 1));
  const double per_item = total * static_cast<double>(p.ensemble_size) / items;
  return std::max<int64_t>(1, static_cast<int64_t>(std::min(items, kWorthAThread / per_item)));
}

size_t scratch_bytes(const Forward& p) { return functions(format_of(p)).scratch_bytes(p); }

void run(const Forward& p, int64_t begin, int64_t end, void* scratch) {
  functions(format_of(p)).run(p, begin, end, scratch);
}

PrepackedLayout prepacked_layout(DType format) { return functions(format).prepacked_layout; }

void prepack(const EnsembleMLP& mlp, int64_t begin, int64_t end, void* prepacked) {
  functions(format_of(mlp)).prepack(mlp, begin, end, prepacked);
}

}  // namespace ensemble_mlp_cpu
}  // namespace pyens
