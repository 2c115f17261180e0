// Chooses the instruction set of the ensemble MLP on weights in bytes; the work is in ensemble_mlp_int8-inl.h.

#include "kernels/ensemble_mlp_int8.h"

#include "kernels/cpu/choose.h"

namespace pyens {
namespace {

struct Functions {
  int64_t (*work_items)(const EnsembleMLPInt8Params&);
  size_t (*scratch_bytes)(const EnsembleMLPInt8Params&);
  void (*run)(const EnsembleMLPInt8Params&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace
}  // namespace pyens

#define PYENS_KERNEL_SOURCE "kernels/cpu/ensemble_mlp_int8-inl.h"
#define PYENS_KERNEL_VNNI
#include "kernels/cpu/foreach_isa.h"

namespace pyens {
namespace {

const Functions& functions() {
  static const Chosen<Functions> chosen{PYENS_INT8_VARIANTS(ensemble_mlp_int8, kFunctions)};
  return chosen[DType::float32];
}

}  // namespace

namespace ensemble_mlp_int8_cpu {

int64_t work_items(const EnsembleMLPInt8Params& p) { return functions().work_items(p); }

int64_t grain_size(const EnsembleMLPInt8Params& p) {
  double total = 0;
  for (int64_t l = 0; l < p.num_layers; ++l) {
    total += static_cast<double>(p.layers[l].in * p.layers[l].out);
  }
  total *= static_cast<double>(std::max<int64_t>(p.batch, 16) * p.ensemble_size);
  return items_worth_a_thread(2 * kMultiplyAddsWorthAThread, total, work_items(p));
}

size_t scratch_bytes(const EnsembleMLPInt8Params& p) { return functions().scratch_bytes(p); }

void run(const EnsembleMLPInt8Params& p, int64_t begin, int64_t end, void* scratch) {
  functions().run(p, begin, end, scratch);
}

}  // namespace ensemble_mlp_int8_cpu
}  // namespace pyens
