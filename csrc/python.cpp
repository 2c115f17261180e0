// The Python front door, pyens._C: each function calls the dispatcher's operation of the same name, a
// microsecond or two sooner than torch.ops does. The operations are in a library of their own, which
// pyens/_library.py loads first.

#include <torch/csrc/utils/pybind.h>

#include <string>
#include <tuple>
#include <vector>

#include "ops/handle.h"
#include "ops/ensemble_mlp_options.h"

namespace {

using at::Tensor;
using at::TensorList;
using pyens::LossOptions;
using pyens::MLPOptions;
using pyens::OptionalTensor;

// What pybind makes of a Python argument, to become what the dispatcher takes.
template <class T>
struct FromPython {
  using type = T;
};
template <>
struct FromPython<TensorList> {
  using type = const std::vector<Tensor>&;
};

template <class Signature>
struct Door;
template <class R, class... A>
struct Door<R(A...)> {
  static void open(pybind11::module_& m, const char* name) {
    const pyens::Handle<R(A...)> handle(name);
    m.def(
        name,
        [handle](typename FromPython<A>::type... arguments) -> R { return handle(arguments...); },
        pybind11::call_guard<pybind11::gil_scoped_release>());
  }
};

// A function that calls the operation of that name, whose signature must be that of its schema.
template <class Signature>
void def(pybind11::module_& m, const char* name) {
  Door<pyens::FlatSignature<Signature>>::open(m, name);
}

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using std::string_view;
  def<Tensor(const MLPOptions&, const Tensor&, TensorList, TensorList)>(m, "ensemble_mlp");
  def<Tensor(const LossOptions&, const Tensor&, const Tensor&, TensorList, TensorList)>(
      m, "ensemble_mlp_loss");
  def<Tensor(const Tensor&, const Tensor&, TensorList, TensorList, string_view)>(
      m, "ensemble_mlp_packed");
  def<Three(const Tensor&, TensorList, TensorList, const Tensor&, const Tensor&, string_view,
            bool)>(m, "activation_strength");
  def<Tensor(const Tensor&, const Tensor&, const OptionalTensor&)>(m, "mask_channels");
  def<Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t)>(
      m, "masked_weights");
  def<Tensor(const Tensor&, const Tensor&, bool)>(m, "ensemble_embedding");
  def<Tensor(const Tensor&, TensorList, const OptionalTensor&)>(m, "ensemble_embedding_concat");
  def<Tensor(const Tensor&, string_view, string_view)>(m, "decorrelation_loss");
  def<Seven(const Tensor&, bool, bool)>(m, "predictive_uncertainty");
  def<Six(const Tensor&, const OptionalTensor&)>(m, "predictive_moments");
  def<double(double)>(m, "fma_peak");
  def<double(const Tensor&, bool, int64_t)>(m, "fma_peak_cuda");
}
