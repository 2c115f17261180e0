// A step of an optimizer of torch.optim over all parameters of a group, on the CPU:
//
//   adam_(parameters, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, ...)   max_exp_avg_sqs: of amsgrad
//   adagrad_(parameters, gradients, sums, steps, ...)
//   sgd_(parameters, gradients, momentum_buffers, ...)                                 none without momentum
//
// In place: parameters, state, counts of steps and, where there is a grad_scale, gradients. Their only caller is
// pyens.optim.fused, and their errors speak of what it was given. Elsewhere it takes torch's own fused step.

#include "ops/torch.h"

#include <initializer_list>
#include <optional>
#include <vector>

#include "ops/in_place.h"
#include "ops/launch.h"
#include "ops/operation.h"
#include "ops/optimizers.h"

namespace pyens {
namespace {

using at::Tensor;
using at::TensorList;

constexpr char kOp[] = "fused";

// Tensors that belong to the parameters, one each, and what torch's optimizer calls them.
struct Belonging {
  const char* name;
  TensorList tensors;
};
using Belongings = std::initializer_list<Belonging>;

void check_step(TensorList parameters, Belongings belongings, TensorList steps) {
  for (size_t i = 0; i < parameters.size(); ++i) {
    check_parameter(kOp, static_cast<int64_t>(i), parameters[i]);
  }
  for (const Belonging& of : belongings) {
    PYENS_CHECK_VALUE(of.tensors.size() == parameters.size(), kOp, of.name,
                      c10::str("one for each of ", parameters.size(), " parameters"),
                      of.tensors.size());
    for (size_t i = 0; i < parameters.size(); ++i) {
      check_belongs(kOp, of.name, of.tensors[i], parameters[i]);
    }
  }
  for (const Tensor& step : steps) check_count(kOp, step);
}

// `steps`: the parameters' counts of steps, where there are some.
void make_step(const StepRule& rule, TensorList parameters, Belongings belongings, TensorList steps,
               std::optional<double> grad_scale) {
  check_step(parameters, belongings, steps);
  PYENS_CHECK_VALUE(steps.empty() || steps.size() == parameters.size(), kOp, "state['step']",
                    c10::str("one for each of ", parameters.size(), " parameters"), steps.size());
  const at::AutoDispatchBelowADInplaceOrView no_graph;
  StepParams p = rule.params;
  p.grad_scale = grad_scale ? &*grad_scale : nullptr;
  std::vector<StepTensor> tensors(parameters.size());
  InPlace in_place;
  int64_t items = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    StepTensor& t = tensors[i];
    t.dtype = kernel_dtype(parameters[i].scalar_type());
    t.size = parameters[i].numel();
    t.first_item = items;
    items += optimizers_cpu::items_of(t.size);
    t.parameter = in_place.memory(parameters[i], true);
    int64_t at = -1;  // the gradient comes first, then the state
    for (const Belonging& of : belongings) {
      void* const pointer = in_place.memory(of.tensors[i], at >= 0 || grad_scale);
      (at < 0 ? t.gradient : t.state[at]) = pointer;
      ++at;
    }
  }
  // Nothing is refused from here on.
  for (size_t i = 0; i < parameters.size(); ++i) {
    rule.set_numbers(tensors[i], steps.empty() ? 0 : count_up(steps[i]));
  }
  p.tensors = tensors.data();
  p.count = static_cast<int64_t>(tensors.size());
  // Parameters on the same memory are updated one after the other, as torch does.
  const int64_t grain_size = in_place.overlaps() ? items : optimizers_cpu::grain_size(p);
  launch_cpu(items, grain_size, 0, [&](int64_t begin, int64_t end, void* /*scratch*/) {
    optimizers_cpu::run(p, begin, end);
  });
  in_place.done();
}

void adam_(TensorList parameters, TensorList gradients, TensorList exp_avgs, TensorList exp_avg_sqs,
           TensorList max_exp_avg_sqs, TensorList steps, std::optional<double> grad_scale,
           double lr, double beta1, double beta2, double eps, double weight_decay,
           bool decoupled_weight_decay, bool maximize) {
  const bool amsgrad = !max_exp_avg_sqs.empty();
  const StepRule rule =
      adam_rule(lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, maximize, amsgrad);
  const Belonging gradient{"gradient", gradients}, exp_avg{"state['exp_avg']", exp_avgs};
  const Belonging exp_avg_sq{"state['exp_avg_sq']", exp_avg_sqs};
  const Belonging largest{"state['max_exp_avg_sq']", max_exp_avg_sqs};
  if (amsgrad) {
    make_step(rule, parameters, {gradient, exp_avg, exp_avg_sq, largest}, steps, grad_scale);
  } else {
    make_step(rule, parameters, {gradient, exp_avg, exp_avg_sq}, steps, grad_scale);
  }
}

void adagrad_(TensorList parameters, TensorList gradients, TensorList sums, TensorList steps,
              std::optional<double> grad_scale, double lr, double lr_decay, double eps,
              double weight_decay, bool maximize) {
  make_step(adagrad_rule(lr, lr_decay, eps, weight_decay, maximize), parameters,
            {{"gradient", gradients}, {"state['sum']", sums}}, steps, grad_scale);
}

void sgd_(TensorList parameters, TensorList gradients, TensorList momentum_buffers,
          std::optional<double> grad_scale, double lr, double momentum, double dampening,
          double weight_decay, bool nesterov, bool maximize, bool begins) {
  const StepRule rule = sgd_rule(lr, momentum, dampening, weight_decay, nesterov, maximize, begins);
  const Belonging gradient{"gradient", gradients};
  const Belonging buffer{"state['momentum_buffer']", momentum_buffers};
  if (momentum != 0) {
    make_step(rule, parameters, {gradient, buffer}, {}, grad_scale);
  } else {
    make_step(rule, parameters, {gradient}, {}, grad_scale);
  }
}

// Nothing is made: fake tensors keep their shapes.
void adam_meta(TensorList, TensorList, TensorList, TensorList, TensorList, TensorList,
               std::optional<double>, double, double, double, double, double, bool, bool) {}
void adagrad_meta(TensorList, TensorList, TensorList, TensorList, std::optional<double>, double,
                  double, double, double, bool) {}
void sgd_meta(TensorList, TensorList, TensorList, std::optional<double>, double, double, double,
              double, bool, bool, bool) {}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  Operation(m,
            "adam_(Tensor(a!)[] parameters, Tensor(b!)[] gradients, Tensor(c!)[] exp_avgs,"
            " Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] steps,"
            " float? grad_scale, float lr, float beta1, float beta2, float eps,"
            " float weight_decay, bool decoupled_weight_decay, bool maximize) -> ()")
      .cpu<adam_>()
      .meta<adam_meta>()
      .in_place();
  Operation(m,
            "adagrad_(Tensor(a!)[] parameters, Tensor(b!)[] gradients, Tensor(c!)[] sums,"
            " Tensor(d!)[] steps, float? grad_scale, float lr, float lr_decay, float eps,"
            " float weight_decay, bool maximize) -> ()")
      .cpu<adagrad_>()
      .meta<adagrad_meta>()
      .in_place();
  Operation(m,
            "sgd_(Tensor(a!)[] parameters, Tensor(b!)[] gradients, Tensor(c!)[] momentum_buffers,"
            " float? grad_scale, float lr, float momentum, float dampening, float weight_decay,"
            " bool nesterov, bool maximize, bool begins) -> ()")
      .cpu<sgd_>()
      .meta<sgd_meta>()
      .in_place();
}

}  // namespace pyens
