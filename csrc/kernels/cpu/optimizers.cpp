// Chooses the instruction set and the element type of an optimizer's step, and splits it among threads; the work is
// in optimizers-inl.h.

#include "kernels/optimizers.h"

#include "kernels/cpu/choose.h"

#define PYENS_KERNEL_SOURCE "kernels/cpu/optimizers-inl.h"
#include "kernels/cpu/foreach_isa.h"

namespace pyens::optimizers_cpu {
namespace {

using Function = void(const StepParams&, const StepTensor&, int64_t begin, int64_t end);

constexpr int64_t kItem = 64;  // elements, at least two cache lines: threads meet nowhere

const Chosen<Function>& functions(Optimizer optimizer) {
  static const Chosen<Function> adam{PYENS_VARIANTS(optimizers, adam)};
  static const Chosen<Function> adagrad{PYENS_VARIANTS(optimizers, adagrad)};
  static const Chosen<Function> sgd{PYENS_VARIANTS(optimizers, sgd)};
  switch (optimizer) {
    case Optimizer::adam: return adam;
    case Optimizer::adagrad: return adagrad;
    default: return sgd;
  }
}

}  // namespace

int64_t items_of(int64_t size) { return (size + kItem - 1) / kItem; }

int64_t work_items(const StepParams& p) {
  if (p.count == 0) return 0;
  const StepTensor& last = p.tensors[p.count - 1];
  return last.first_item + items_of(last.size);
}

int64_t grain_size(const StepParams& p) {
  // Some microseconds: a root and a quotient for each number, or none.
  const double numbers_worth_a_thread = p.optimizer == Optimizer::sgd ? 32e3 : 8e3;
  const int64_t items = work_items(p);
  return items_worth_a_thread(numbers_worth_a_thread, static_cast<double>(items * kItem), items);
}

// Every tensor is cut in the same proportions, as a backward pass that splits members cuts it: a thread finds in its
// cache what it wrote there. What does not divide goes to one thread here and to another there, as first_item says.
void run(const StepParams& p, int64_t begin, int64_t end) {
  const Chosen<Function>& chosen = functions(p.optimizer);
  const int64_t items = work_items(p);
  for (const StepTensor* t = p.tensors; t != p.tensors + p.count; ++t) {
    const int64_t own = items_of(t->size);
    const auto cut = [&](int64_t at) { return (at * own + t->first_item) / items * kItem; };
    const int64_t from = cut(begin), to = std::min(t->size, cut(end));
    if (from < to) chosen[t->dtype](p, *t, from, to);
  }
}

void step(const StepParams& p, const StepTensor& tensor, const void* gradient, int64_t begin,
          int64_t end) {
  const auto bytes = static_cast<int64_t>(element_size(tensor.dtype));
  StepTensor part = tensor;
  part.gradient = const_cast<void*>(gradient);
  part.parameter = static_cast<char*>(tensor.parameter) + begin * bytes;
  for (void*& state : part.state) {
    if (state != nullptr) state = static_cast<char*>(state) + begin * bytes;
  }
  // A member's numbers are few: the next one's lie behind them.
  part.ahead = end + (end - begin) <= tensor.size ? end - begin : 0;
  functions(p.optimizer)[tensor.dtype](p, part, 0, end - begin);
}

}  // namespace pyens::optimizers_cpu
