// The loss inside the ensemble MLP, and a step of an optimizer within the same pass, on the CPU:
//
//   ensemble_mlp_loss_step_   per-member mean loss [E] before the step
//
// In place: parameters, state and counts of steps. The numbers are those of ensemble_mlp_loss, its backward and
// then a step of ops/optimizers.cpp; the gradients are in no memory but that of the thread which computes them.
// Its only caller is pyens.optim.in_pass, and errors of parameters and state speak of that.

#include "ops/torch.h"

#include <vector>

#include "ops/ensemble_mlp_loss.h"
#include "ops/in_place.h"
#include "ops/operation.h"
#include "ops/optimizers.h"

namespace pyens {
namespace {

using at::Tensor;
using at::TensorList;

constexpr char kOp[] = "in_pass";

using Numbers = c10::ArrayRef<double>;

// The rule of one parameter: as many numbers as its optimizer has, in the order of torch's names.
StepRule read_rule(std::string_view optimizer, Numbers n) {
  if (optimizer == "adam") {
    return adam_rule(n[0], n[1], n[2], n[3], n[4], n[5] != 0, n[6] != 0, n[7] != 0);
  }
  if (optimizer == "adagrad") return adagrad_rule(n[0], n[1], n[2], n[3], n[4] != 0);
  return sgd_rule(n[0], n[1], n[2], n[3], n[4] != 0, n[5] != 0, n[6] != 0);
}

size_t numbers_of(std::string_view optimizer) {
  if (optimizer == "adam") return 8;
  if (optimizer == "adagrad") return 5;
  TORCH_CHECK_VALUE(optimizer == "sgd", kOp, ": optimizer: expected adam, adagrad or sgd, got \"",
                    optimizer, "\"");
  return 7;
}

// `which` of the network's tensors behind its input make a step, each by its own `numbers`; `states` of each, one
// after the other, and its count of steps, where its optimizer has one.
Tensor ensemble_mlp_loss_step_(const LossOptions& options, const Tensor& input,
                               const Tensor& target, TensorList weights, TensorList biases,
                               TensorList norm_weights, TensorList norm_biases,
                               at::IntArrayRef which, std::string_view optimizer, Numbers numbers,
                               TensorList states, TensorList steps) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.mlp.members};
  check_loss(network, target, options);
  check_loss_values(options);
  PYENS_CHECK_VALUE(!options.mlp.members, kOp, "members",
                    "None (all members make a step, or their moments would run apart)", "some");
  const size_t count = numbers_of(optimizer);
  PYENS_CHECK_VALUE(numbers.size() == count * which.size(), kOp, "numbers",
                    c10::str(count, " for each of ", which.size(), " parameters"), numbers.size());
  std::vector<StepRule> rules;
  std::vector<StepTensor> tensors(which.size());
  std::vector<MLPParameterStep> of_network(network.tensors() - 1);
  rules.reserve(which.size());
  InPlace in_place;
  size_t next = 0;
  for (size_t i = 0; i < which.size(); ++i) {
    const auto place = static_cast<size_t>(which[i]);
    PYENS_CHECK_VALUE(which[i] >= 0 && place < of_network.size() && !of_network[place].tensor, kOp,
                      "which", "tensors of the network, each once", which[i]);
    const Tensor& parameter = network.tensor(1 + place);
    check_parameter(kOp, static_cast<int64_t>(i), parameter);
    const StepRule& rule =
        rules.emplace_back(read_rule(optimizer, numbers.slice(i * count, count)));
    StepTensor& t = tensors[i];
    t.dtype = kernel_dtype(parameter.scalar_type());
    t.size = parameter.numel();
    t.parameter = in_place.memory(parameter, true);
    for (size_t k = 0; k < rule.states(); ++k, ++next) {
      PYENS_CHECK_VALUE(next < states.size(), kOp, "state", "that of every parameter",
                        states.size());
      check_belongs(kOp, "state", states[next], parameter);
      t.state[k] = in_place.memory(states[next], true);
    }
    of_network[place] = {&rule.params, &t};
  }
  PYENS_CHECK_VALUE(next == states.size(), kOp, "state", c10::str(next, " tensors"), states.size());
  const bool counts = !rules.empty() && rules[0].counts_steps();
  PYENS_CHECK_VALUE(steps.size() == (counts ? which.size() : 0), kOp, "state['step']",
                    "one for each parameter", steps.size());
  for (const Tensor& step : steps) check_count(kOp, step);
  bool shared = in_place.overlaps() || in_place.overlaps(input) || in_place.overlaps(target);
  for (size_t i = 0; i < of_network.size(); ++i) {  // of those that make no step
    shared = shared || (!of_network[i].tensor && in_place.overlaps(network.tensor(1 + i)));
  }
  for (const OptionalTensor& read :
       {options.sample_weight, options.quantiles, options.class_weight, options.log_variance_min,
        options.log_variance_max, options.mlp.dropout_seeds, options.mlp.dropout_rates}) {
    shared = shared || (read && in_place.overlaps(*read));
  }
  PYENS_CHECK_VALUE(!shared, kOp, "parameters", "memory of their own",
                    "some on that of another parameter, of the state, input or target");
  PYENS_CHECK_VALUE(network.batch() > 0, kOp, "input", "at least one example", "none");

  const at::AutoDispatchBelowADInplaceOrView no_graph;
  NeedsGrad no_gradients;
  no_gradients.resize(network.tensors(), false);
  LossCall call(network, target, options, {}, no_gradients);
  call.make_steps(network, of_network);
  // Counted up only when nothing is refused any more.
  call.run(kLossOp, [&] {
    for (size_t i = 0; i < which.size(); ++i) {
      rules[i].set_numbers(tensors[i], counts ? count_up(steps[i]) : 0);
    }
  });
  in_place.done();
  return call.mean;
}

Tensor ensemble_mlp_loss_step_meta(const LossOptions& options, const Tensor& input,
                                   const Tensor& target, TensorList weights, TensorList biases,
                                   TensorList norm_weights, TensorList norm_biases,
                                   at::IntArrayRef /*which*/, std::string_view /*optimizer*/,
                                   Numbers /*numbers*/, TensorList /*states*/,
                                   TensorList /*steps*/) {
  const Network network{input, weights, biases, norm_weights, norm_biases, options.mlp.members};
  check_loss(network, target, options);
  return at::empty_symint({network.members()},
                          input.options().dtype(accumulation_type(input.scalar_type())));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  Operation(m,
            std::string("ensemble_mlp_loss_step_(Tensor input, Tensor target, Tensor(a!)[] weights,"
                        " Tensor(b!)[] biases, Tensor(c!)[] norm_weights,"
                        " Tensor(d!)[] norm_biases, int[] which, str optimizer, float[] numbers,"
                        " Tensor(e!)[] states, Tensor(f!)[] steps") +
                LossOptions::kSchema + MLPOptions::kSchema + ") -> Tensor")
      .cpu<ensemble_mlp_loss_step_>()
      .meta<ensemble_mlp_loss_step_meta>()
      .in_place();
}

}  // namespace pyens
