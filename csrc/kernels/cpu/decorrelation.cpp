// Chooses the instruction set and the element type of the decorrelation loss; the work is in
// decorrelation-inl.h.

#include "kernels/decorrelation.h"

#include "kernels/cpu/choose.h"

namespace pyens {
namespace {

struct DecorrelationFunctions {
  int64_t (*work_items)(const DecorrelationParams&);
  size_t (*scratch_bytes)(const DecorrelationParams&);
  int64_t (*partials_size)(const DecorrelationParams&);
  void (*prepare)(const DecorrelationParams&);
  void (*run)(const DecorrelationParams&, int64_t begin, int64_t end, void* scratch);
  void (*finish)(const DecorrelationParams&);
  void (*run_backward)(const DecorrelationParams&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace
}  // namespace pyens

#define PYENS_KERNEL_SOURCE "kernels/cpu/decorrelation-inl.h"
#include "kernels/cpu/foreach_isa.h"

namespace pyens {
namespace {

const DecorrelationFunctions& functions(DType dtype) {
  static const Chosen<DecorrelationFunctions> chosen{PYENS_VARIANTS(decorrelation, kFunctions)};
  return chosen[dtype];
}

}  // namespace

namespace decorrelation_cpu {

int64_t work_items(const DecorrelationParams& p) { return functions(p.dtype).work_items(p); }

int64_t grain_size(const DecorrelationParams& p) {
  const double components = static_cast<double>(p.components);
  const double elements = static_cast<double>(p.models * p.batch * p.labels) * components;
  return items_worth_a_thread(kMultiplyAddsWorthAThread, elements * (components / 2 + 4),
                              work_items(p));
}

size_t scratch_bytes(const DecorrelationParams& p) { return functions(p.dtype).scratch_bytes(p); }

int64_t partials_size(const DecorrelationParams& p) { return functions(p.dtype).partials_size(p); }

void prepare(const DecorrelationParams& p) { functions(p.dtype).prepare(p); }

void run(const DecorrelationParams& p, int64_t begin, int64_t end, void* scratch) {
  functions(p.dtype).run(p, begin, end, scratch);
}

void finish(const DecorrelationParams& p) { functions(p.dtype).finish(p); }

void run_backward(const DecorrelationParams& p, int64_t begin, int64_t end, void* scratch) {
  functions(p.dtype).run_backward(p, begin, end, scratch);
}

}  // namespace decorrelation_cpu
}  // namespace pyens
