// Loads pyens/_operations.abi3.so into a process that has torch but no Python, and runs an operation:
//
//   load_operations pyens/_operations.abi3.so
//
// Exits with 0 if the outputs and their gradients are right.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdio>
#include <cstdlib>

namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  require(argc == 2, "usage: load_operations LIBRARY");
  require(dlsym(RTLD_DEFAULT, "Py_Initialize") == nullptr, "there is no Python in this process");
  if (dlopen(argv[1], RTLD_NOW) == nullptr) require(false, dlerror());
  require(dlsym(RTLD_DEFAULT, "Py_Initialize") == nullptr,
          "the operations bring no Python with them");

  // Two members, one of which is twice the other: outputs x W^T and 2 x W^T.
  const at::Tensor weight = at::rand({1, 3, 4});
  const at::Tensor weights = at::cat({weight, 2 * weight}).requires_grad_();
  const at::Tensor input = at::rand({5, 4});
  using List = at::TensorList;
  using Name = std::string_view;
  using Optional = const std::optional<at::Tensor>&;
  using Operation = at::Tensor(
      const at::Tensor& input, List weights, List biases, List norm_weights, List norm_biases,
      Name activation, double dropout, Optional dropout_seeds, Optional dropout_rates,
      bool dropout_before_norm, Name output_activation, Name norm, double norm_eps,
      bool norm_after_activation, Name residual, Optional members, std::optional<bool> save_hidden);
  const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("pyens::ensemble_mlp", "").typed<Operation>();
  const std::optional<at::Tensor> none;
  const at::Tensor output = op.call(input, {weights}, {}, {}, {}, "relu", 0.0, none, none, false,
                                    "identity", "none", 1e-5, false, "", none, std::nullopt);
  require(output.sizes() == at::IntArrayRef({2, 5, 3}), "the shape of the outputs");
  require(at::allclose(output[0], at::linear(input, weight[0])), "the outputs of member 0");
  require(at::allclose(output[1], 2 * output[0]), "the outputs of member 1");

  const auto gradient = torch::autograd::grad({output.sum()}, {weights})[0];
  require(at::allclose(gradient, input.sum(0).expand({2, 3, 4})), "the gradients of the weights");
  std::printf("ok\n");
  return 0;
}
