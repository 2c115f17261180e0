// Scales each member's gradients where their norm, over all tensors together, is too large. In place. Raw pointers, no
// torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/types.h"

namespace pyens {

enum class Norm : int { one, two, largest };

// Contiguous: [members, size].
struct ClipTensor {
  DType dtype;
  int64_t size;        // elements of a member
  int64_t first_part;  // how many parts of a member the tensors before it have
  void* gradient;
};

// What a part of a gradient adds to its member's norm: the sum of its |x| or x^2, or its largest |x|. The squares of
// float64 leave the range of numbers: those of scale 1 are of x / 2^600, of scale -1 of x * 2^600.
struct ClipPart {
  double value;
  int scale;
};

struct ClipParams {
  const ClipTensor* tensors;
  int64_t count;
  int64_t members;
  Norm norm;
  double max_norm;
  ClipPart* parts;  // [members, parts_of_member()]
  double* norms;    // [members]
};

// Parts begin and end where they do whatever the number of members or threads, and a member's are added up in order: no
// split of the work changes a bit.
namespace clip_member_grad_norm_cpu {
int64_t parts_of(int64_t size);  // of so many elements of a member
int64_t parts_of_member(const ClipParams& params);
int64_t grain_size(const ClipParams& params, int64_t items);  // of all the work in so many

// All of it, of members [begin, end).
void clip(const ClipParams& params, int64_t begin, int64_t end);
// The same in three: parts [begin, end) of members * parts_of_member(); members; parts.
void measure(const ClipParams& params, int64_t begin, int64_t end);
void add_up(const ClipParams& params, int64_t begin, int64_t end);
void scale(const ClipParams& params, int64_t begin, int64_t end);
}  // namespace clip_member_grad_norm_cpu

}  // namespace pyens
