// Chooses the instruction set and the element type, splits members into parts, and adds the parts up to norms; what is
// done with the numbers of a part is in clip_member_grad_norm-inl.h.

#include "kernels/clip_member_grad_norm.h"

#include "kernels/cpu/choose.h"

#define PYENS_KERNEL_SOURCE "kernels/cpu/clip_member_grad_norm-inl.h"
#include "kernels/cpu/foreach_isa.h"

namespace pyens::clip_member_grad_norm_cpu {
namespace {

using Measure = ClipPart(const void* gradient, int64_t size, Norm norm);
using Scale = void(void* gradient, int64_t size, double factor);

// Elements: some thousand are worth the call and fit the first cache; a multiple of all vectors.
constexpr int64_t kPart = 8192;

const Chosen<Measure>& measures() {
  static const Chosen<Measure> chosen{PYENS_VARIANTS(clip_member_grad_norm, measure)};
  return chosen;
}
const Chosen<Scale>& scales() {
  static const Chosen<Scale> chosen{PYENS_VARIANTS(clip_member_grad_norm, scale)};
  return chosen;
}

// use(tensor, first number, size, part) for each of these parts.
template <class Use>
void for_parts(const ClipParams& p, int64_t begin, int64_t end, const Use& use) {
  if (begin >= end) return;
  const int64_t parts = parts_of_member(p);
  int64_t member = begin / parts, part = begin % parts;
  const ClipTensor* t =
      std::upper_bound(p.tensors, p.tensors + p.count, part,
                       [](int64_t at, const ClipTensor& tensor) { return at < tensor.first_part; });
  --t;
  for (int64_t i = begin; i < end; ++i, ++part) {
    if (part == parts) {
      part = 0;
      ++member;
      t = p.tensors;
    }
    while (part >= t->first_part + parts_of(t->size)) ++t;
    const int64_t from = (part - t->first_part) * kPart;
    use(*t, static_cast<char*>(t->gradient) + (member * t->size + from) * element_size(t->dtype),
        std::min(kPart, t->size - from), i);
  }
}

// NaN where either is.
double larger(double a, double b) { return a != a || a > b ? a : b; }

double norm_of(const ClipPart* parts, int64_t count, Norm norm) {
  double sums[3] = {};  // of each scale, -1 first
  for (int64_t i = 0; i < count; ++i) {
    double& sum = sums[parts[i].scale + 1];
    sum = norm == Norm::largest ? larger(sum, parts[i].value) : sum + parts[i].value;
  }
  if (norm != Norm::two) return sums[1];
  // In the largest scale that there is; what the others lose is below a rounding.
  if (sums[2] != 0) return std::sqrt(sums[2] + sums[1] * 0x1p-600 * 0x1p-600) * 0x1p600;
  if (sums[1] != 0) return std::sqrt(sums[1] + sums[0] * 0x1p-600 * 0x1p-600);
  return std::sqrt(sums[0]) * 0x1p-600;
}

// What member m's gradients are multiplied by; NaN for a norm of NaN.
double factor_of(const ClipParams& p, int64_t m) {
  const double factor = p.max_norm / (p.norms[m] + 1e-6);
  return factor > 1 ? 1 : factor;
}

}  // namespace

int64_t parts_of(int64_t size) { return (size + kPart - 1) / kPart; }

int64_t parts_of_member(const ClipParams& p) {
  if (p.count == 0) return 0;
  const ClipTensor& last = p.tensors[p.count - 1];
  return last.first_part + parts_of(last.size);
}

int64_t grain_size(const ClipParams& p, int64_t items) {
  double numbers = 0;
  for (int64_t i = 0; i < p.count; ++i) numbers += static_cast<double>(p.tensors[i].size);
  const double numbers_worth_a_thread = 32e3;  // some microseconds
  return items_worth_a_thread(numbers_worth_a_thread, numbers * static_cast<double>(p.members),
                              items);
}

void measure(const ClipParams& p, int64_t begin, int64_t end) {
  for_parts(p, begin, end, [&](const ClipTensor& t, const char* at, int64_t size, int64_t part) {
    p.parts[part] = measures()[t.dtype](at, size, p.norm);
  });
}

void add_up(const ClipParams& p, int64_t begin, int64_t end) {
  const int64_t parts = parts_of_member(p);
  for (int64_t m = begin; m < end; ++m) p.norms[m] = norm_of(p.parts + m * parts, parts, p.norm);
}

void scale(const ClipParams& p, int64_t begin, int64_t end) {
  const int64_t parts = parts_of_member(p);
  while (begin < end) {
    const int64_t m = begin / parts, of_member = std::min(end, (m + 1) * parts);
    const double factor = factor_of(p, m);
    if (factor != 1) {  // what is not clipped is not written
      for_parts(p, begin, of_member, [&](const ClipTensor& t, char* at, int64_t size, int64_t) {
        scales()[t.dtype](at, size, factor);
      });
    }
    begin = of_member;
  }
}

void clip(const ClipParams& p, int64_t begin, int64_t end) {
  const int64_t parts = parts_of_member(p);
  for (int64_t m = begin; m < end; ++m) {
    measure(p, m * parts, (m + 1) * parts);
    add_up(p, m, m + 1);
    scale(p, m * parts, (m + 1) * parts);  // from the caches, where a member fits them
  }
}

}  // namespace pyens::clip_member_grad_norm_cpu
