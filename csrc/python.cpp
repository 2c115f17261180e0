// The Python front door, pyens._C: each function calls the dispatcher's operation of the same name, a
// microsecond or two sooner than torch.ops does. The operations are in a library of their own, which
// pyens/_library.py loads first.

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "ops/handle.h"
#include "ops/ensemble_mlp_options.h"

namespace {

using at::Tensor;
using at::TensorList;
using pyens::ForwardOptions;
using pyens::LossOptions;
using pyens::OptionalTensor;

// A tensor argument, or a list of them, as Python gives it. `plain` are tensors that no class or mode which
// overrides torch's functions stands before, in a list or a tuple.
template <class T>
struct Given {
  T value{};
  bool plain = true;
};

bool read(PyObject* from, Tensor& to) {
  if (!THPVariable_CheckExact(from) || at::impl::torch_function_mode_enabled()) return false;
  to = THPVariable_Unpack(from);
  return true;
}
bool read(PyObject* from, OptionalTensor& to) {
  return from == Py_None || read(from, to.emplace());
}
bool read(PyObject* from, std::vector<Tensor>& to) {
  if (!PyList_Check(from) && !PyTuple_Check(from)) return false;
  to.resize(static_cast<size_t>(PySequence_Fast_GET_SIZE(from)));
  for (size_t i = 0; i < to.size(); ++i) {
    if (!read(PySequence_Fast_GET_ITEM(from, static_cast<Py_ssize_t>(i)), to[i])) return false;
  }
  return true;
}

template <class T>
const T& value(const T& argument) {
  return argument;
}
template <class T>
const T& value(const Given<T>& argument) {
  return argument.value;
}
template <class T>
bool is_plain(const T& /*argument*/) {
  return true;
}
template <class T>
bool is_plain(const Given<T>& argument) {
  return argument.plain;
}

// What pybind makes of a Python argument, to become what the dispatcher takes.
template <class T>
struct FromPython {
  using type = T;
};
template <>
struct FromPython<const Tensor&> {
  using type = const Given<Tensor>&;
};
template <>
struct FromPython<const OptionalTensor&> {
  using type = const Given<OptionalTensor>&;
};
template <>
struct FromPython<TensorList> {
  using type = const Given<std::vector<Tensor>>&;
};
template <class T>
struct FromPython<at::ArrayRef<T>> {
  using type = const std::vector<T>&;
};

}  // namespace

template <class T>
struct pybind11::detail::type_caster<Given<T>> {
  PYBIND11_TYPE_CASTER(Given<T>, make_caster<T>::name);
  bool load(handle source, bool /*convert*/) {
    value.plain = read(source.ptr(), value.value);
    return true;
  }
};

namespace {

// None where the arguments are not plain: torch.ops calls what overrides it, and refuses what is no tensor.
// True where the operation returns nothing.
template <class Signature>
struct Door;
template <class R, class... A>
struct Door<R(A...)> {
  static void open(pybind11::module_& m, const char* name) {
    const pyens::Handle<R(A...)> handle(name);
    m.def(
        name,
        [handle](typename FromPython<A>::type... arguments)
            -> std::optional<std::conditional_t<std::is_void_v<R>, bool, R>> {
          if (!(is_plain(arguments) && ...)) return std::nullopt;
          if constexpr (std::is_void_v<R>) {
            handle(value(arguments)...);
            return true;
          } else {
            return handle(value(arguments)...);
          }
        },
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
  def<Tensor(const ForwardOptions&, const Tensor&, TensorList, TensorList, TensorList, TensorList)>(
      m, "ensemble_mlp");
  using OfLoss = Tensor(const LossOptions&, const Tensor&, const Tensor&, TensorList, TensorList,
                        TensorList, TensorList);
  def<OfLoss>(m, "ensemble_mlp_loss");
  def<OfLoss>(m, "ensemble_mlp_example_losses");
  def<Tensor(const LossOptions&, const Tensor&, const Tensor&, TensorList, TensorList, TensorList,
             TensorList, at::IntArrayRef, string_view, at::ArrayRef<double>, TensorList,
             TensorList)>(m, "ensemble_mlp_loss_step_");
  def<Tensor(const Tensor&, const Tensor&, TensorList, TensorList, string_view, string_view)>(
      m, "ensemble_mlp_packed");
  using at::IntArrayRef;
  def<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, IntArrayRef, IntArrayRef,
             IntArrayRef, string_view, IntArrayRef)>(m, "ensemble_conv2d");
  def<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, IntArrayRef,
             const OptionalTensor&, IntArrayRef, IntArrayRef, IntArrayRef, string_view,
             IntArrayRef)>(m, "ensemble_conv2d_sparse");
  def<Tensor(const Tensor&, TensorList, TensorList, TensorList, TensorList, IntArrayRef, TensorList,
             string_view, string_view)>(m, "ensemble_mlp_sparse");
  def<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
             const Tensor&, const OptionalTensor&, IntArrayRef, IntArrayRef, IntArrayRef,
             string_view, IntArrayRef)>(m, "ensemble_conv2d_int8");
  def<Tensor(const Tensor&, TensorList, TensorList, TensorList, TensorList, TensorList, TensorList,
             string_view, string_view)>(m, "ensemble_mlp_int8");
  def<Three(const Tensor&, TensorList, TensorList, const Tensor&, const Tensor&, string_view,
            bool)>(m, "activation_strength");
  def<Tensor(const Tensor&, int64_t, int64_t, int64_t)>(m, "keyed_permutation");
  def<Tensor(const Tensor&, const Tensor&, const OptionalTensor&)>(m, "mask_channels");
  def<Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t)>(
      m, "masked_weights");
  def<Tensor(const LossOptions&, const Tensor&, const Tensor&, TensorList, TensorList, TensorList,
             const Tensor&)>(m, "masked_mlp_total_loss");
  def<Tensor(const Tensor&, const Tensor&, bool)>(m, "ensemble_embedding");
  def<Tensor(const Tensor&, TensorList, const OptionalTensor&)>(m, "ensemble_embedding_concat");
  def<Tensor(const Tensor&, string_view, string_view)>(m, "decorrelation_loss");
  def<Seven(const Tensor&, bool, bool)>(m, "predictive_uncertainty");
  def<Six(const Tensor&, const OptionalTensor&)>(m, "predictive_moments");
  using Scale = std::optional<double>;
  def<void(TensorList, TensorList, TensorList, TensorList, TensorList, TensorList, Scale, double,
           double, double, double, double, bool, bool)>(m, "adam_");
  def<void(TensorList, TensorList, TensorList, TensorList, Scale, double, double, double, double,
           bool)>(m, "adagrad_");
  def<void(TensorList, TensorList, TensorList, Scale, double, double, double, double, bool, bool,
           bool)>(m, "sgd_");
  def<Tensor(TensorList, double, double, bool)>(m, "clip_member_grad_norm_");
  def<double(double)>(m, "fma_peak");
  def<double(const Tensor&, bool, int64_t)>(m, "fma_peak_cuda");
}
