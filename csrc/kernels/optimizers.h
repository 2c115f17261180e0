// A step of Adam, AdamW, Adagrad or SGD: parameters and what is remembered of them, in place. Raw pointers, no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/types.h"

namespace pyens {

enum class Optimizer : int { adam, adagrad, sgd };

// A parameter, its gradient and its state, contiguous and of one type, with the numbers that depend on how many
// steps it has made.
struct StepTensor {
  DType dtype;
  int64_t size;        // elements
  int64_t first_item;  // how many items the tensors before it have
  void* parameter;
  void* gradient;  // written only where there is a grad_scale
  // Adam: exp_avg, exp_avg_sq and, for amsgrad, max_exp_avg_sq. Adagrad: sum. SGD: momentum_buffer, if any.
  void* state[3];
  double rate;  // Adam: lr / (1 - beta1^step). Adagrad: lr / (1 + (step - 1) lr_decay). SGD: lr
  double root_correction;  // Adam: 1 / sqrt(1 - beta2^step)
  int64_t ahead;           // where parameter and state are read next, so many elements on, or 0
};

struct StepParams {
  Optimizer optimizer;
  const StepTensor* tensors;
  int64_t count;
  const double* grad_scale;  // gradients are divided by it first, for good; nullptr: they are not
  bool maximize;
  double weight_decay;  // what of the parameter is added to the gradient
  // Adam
  double
      shrink;  // what the parameter is multiplied by first: 1 - lr * weight decay, if it is decoupled
  double beta1, beta2;
  bool amsgrad;
  double eps;  // also Adagrad
  // SGD
  double momentum, dampening;
  bool nesterov;
  bool begins;  // momentum_buffer becomes the gradient; what it holds is not looked at
};

// The caller splits [0, items) among its threads as it likes: no split changes a bit.
namespace optimizers_cpu {
int64_t items_of(int64_t size);  // of a tensor of so many elements
int64_t work_items(const StepParams& params);
int64_t grain_size(const StepParams& params);
void run(const StepParams& params, int64_t begin, int64_t end);
// A step of elements [begin, end) of one tensor. `gradient`: of these alone, in the place of the tensor's.
void step(const StepParams& params, const StepTensor& tensor, const void* gradient, int64_t begin,
          int64_t end);
}  // namespace optimizers_cpu

}  // namespace pyens
