// The index of the extension: every operation's schema, and the Python front door.
//
// The dispatcher owns the semantics (autograd, autocast, fake tensors, devices). The functions of
// this module call the same dispatcher operations, only with less overhead than torch.ops.

#include <ATen/Parallel.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/fma_peak.h"
#include "ops/checks.h"
#include "ops/dispatch.h"
#include "ops/launch.h"

using at::Tensor;
using at::TensorList;
using pyens::dispatcher_op;

TORCH_LIBRARY(pyens, m) {
  m.def(
      "ensemble_mlp(Tensor input, Tensor[] weights, Tensor[] biases, str activation,"
      " float dropout=0.0, Tensor? dropout_seeds=None) -> Tensor");
  m.def(
      "ensemble_mlp_backward(Tensor grad, Tensor input, Tensor[] weights, Tensor[] biases,"
      " str activation, float dropout, Tensor? dropout_seeds, bool[] wanted) -> Tensor[]");
  m.def("ensemble_mlp_pack(Tensor[] weights, Tensor[] biases) -> Tensor");
  m.def(
      "ensemble_mlp_packed(Tensor input, Tensor packed, Tensor[] weights, Tensor[] biases,"
      " str activation) -> Tensor");
  m.def(
      "ensemble_mlp_loss(Tensor input, Tensor target, Tensor[] weights, Tensor[] biases, str loss,"
      " str activation, float temperature, Tensor? sample_weight, float dropout,"
      " Tensor? dropout_seeds) -> Tensor");
  m.def(
      "ensemble_mlp_loss_with_gradients(Tensor input, Tensor target, Tensor[] weights,"
      " Tensor[] biases, str loss, str activation, float temperature, Tensor? sample_weight,"
      " float dropout, Tensor? dropout_seeds, Tensor? member_scale, bool[] wanted)"
      " -> (Tensor, Tensor[])");
  m.def(
      "activation_strength(Tensor input, Tensor[] weights, Tensor[] biases, Tensor mean, Tensor "
      "std,"
      " str activation, bool pack) -> (Tensor output, Tensor value, Tensor active)");
  m.def("mask_channels(Tensor input, Tensor masks, Tensor? index) -> Tensor");
  m.def("masked_weights(Tensor weight, Tensor? rows, Tensor? columns, int num_masks) -> Tensor");
  m.def(
      "masked_weights_backward(Tensor grad, Tensor? rows, Tensor? columns, SymInt num_rows,"
      " SymInt num_columns) -> Tensor");
  m.def("ensemble_embedding(Tensor index, Tensor weight, bool sparse) -> Tensor");
  m.def("ensemble_embedding_backward(Tensor grad, Tensor index, SymInt num_embeddings) -> Tensor");
  m.def(
      "ensemble_embedding_sparse_backward(Tensor grad, Tensor index, SymInt num_embeddings)"
      " -> Tensor");
  m.def(
      "ensemble_embedding_concat(Tensor categorical, Tensor[] tables, Tensor? numeric) -> Tensor");
  m.def(
      "ensemble_embedding_concat_backward(Tensor grad, Tensor categorical, SymInt[] num_embeddings,"
      " SymInt[] dims, int[] wanted, bool numeric_shared) -> Tensor[]");

  m.def("decorrelation_loss(Tensor outputs, str kind, str reduction) -> Tensor");
  m.def(
      "decorrelation_loss_forward(Tensor outputs, str kind, str reduction)"
      " -> (Tensor loss, Tensor correlations, Tensor centre)");
  m.def(
      "decorrelation_loss_backward(Tensor grad, Tensor outputs, Tensor correlations, Tensor centre,"
      " str kind, str reduction) -> Tensor");

  m.def(
      "predictive_uncertainty(Tensor logits, bool from_probabilities, bool with_votes)"
      " -> (Tensor mean_probability, Tensor predictive_entropy, Tensor expected_entropy,"
      " Tensor mutual_information, Tensor distribution_pv, Tensor vote_disagreement, Tensor "
      "votes)");
  m.def(
      "predictive_moments(Tensor outputs, Tensor? variances)"
      " -> (Tensor mean, Tensor std, Tensor min, Tensor max, Tensor aleatoric, Tensor epistemic)");
}

namespace {

Tensor ensemble_mlp(const Tensor& input, const std::vector<Tensor>& weights,
                    const std::vector<Tensor>& biases, const std::string& activation,
                    double dropout, const std::optional<Tensor>& dropout_seeds) {
  static const auto op =
      dispatcher_op<Tensor(const Tensor&, TensorList, TensorList, std::string_view, double,
                           const std::optional<Tensor>&)>("pyens::ensemble_mlp");
  return op.call(input, weights, biases, activation, dropout, dropout_seeds);
}

Tensor ensemble_mlp_loss(const Tensor& input, const Tensor& target,
                         const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                         const std::string& loss, const std::string& activation, double temperature,
                         const std::optional<Tensor>& sample_weight, double dropout,
                         const std::optional<Tensor>& dropout_seeds) {
  static const auto op =
      dispatcher_op<Tensor(const Tensor&, const Tensor&, TensorList, TensorList, std::string_view,
                           std::string_view, double, const std::optional<Tensor>&, double,
                           const std::optional<Tensor>&)>("pyens::ensemble_mlp_loss");
  return op.call(input, target, weights, biases, loss, activation, temperature, sample_weight,
                 dropout, dropout_seeds);
}

Tensor ensemble_mlp_packed(const Tensor& input, const Tensor& packed,
                           const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                           const std::string& activation) {
  static const auto op =
      dispatcher_op<Tensor(const Tensor&, const Tensor&, TensorList, TensorList, std::string_view)>(
          "pyens::ensemble_mlp_packed");
  return op.call(input, packed, weights, biases, activation);
}

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

ThreeTensors activation_strength(const Tensor& input, const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& biases, const Tensor& mean,
                                 const Tensor& std, const std::string& activation, bool pack) {
  static const auto op = dispatcher_op<ThreeTensors(
      const Tensor&, TensorList, TensorList, const Tensor&, const Tensor&, std::string_view, bool)>(
      "pyens::activation_strength");
  return op.call(input, weights, biases, mean, std, activation, pack);
}

Tensor mask_channels(const Tensor& input, const Tensor& masks, const std::optional<Tensor>& index) {
  static const auto op =
      dispatcher_op<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&)>(
          "pyens::mask_channels");
  return op.call(input, masks, index);
}

Tensor masked_weights(const Tensor& weight, const std::optional<Tensor>& rows,
                      const std::optional<Tensor>& columns, int64_t num_masks) {
  static const auto op =
      dispatcher_op<Tensor(const Tensor&, const std::optional<Tensor>&,
                           const std::optional<Tensor>&, int64_t)>("pyens::masked_weights");
  return op.call(weight, rows, columns, num_masks);
}

Tensor ensemble_embedding(const Tensor& index, const Tensor& weight, bool sparse) {
  static const auto op =
      dispatcher_op<Tensor(const Tensor&, const Tensor&, bool)>("pyens::ensemble_embedding");
  return op.call(index, weight, sparse);
}

Tensor ensemble_embedding_concat(const Tensor& categorical, const std::vector<Tensor>& tables,
                                 const std::optional<Tensor>& numeric) {
  static const auto op =
      dispatcher_op<Tensor(const Tensor&, TensorList, const std::optional<Tensor>&)>(
          "pyens::ensemble_embedding_concat");
  return op.call(categorical, tables, numeric);
}

Tensor decorrelation_loss(const Tensor& outputs, const std::string& kind,
                          const std::string& reduction) {
  static const auto op = dispatcher_op<Tensor(const Tensor&, std::string_view, std::string_view)>(
      "pyens::decorrelation_loss");
  return op.call(outputs, kind, reduction);
}

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SevenTensors predictive_uncertainty(const Tensor& logits, bool from_probabilities,
                                    bool with_votes) {
  static const auto op =
      dispatcher_op<SevenTensors(const Tensor&, bool, bool)>("pyens::predictive_uncertainty");
  return op.call(logits, from_probabilities, with_votes);
}

SixTensors predictive_moments(const Tensor& outputs, const std::optional<Tensor>& variances) {
  static const auto op = dispatcher_op<SixTensors(const Tensor&, const std::optional<Tensor>&)>(
      "pyens::predictive_moments");
  return op.call(outputs, variances);
}

// Multiply-add rate in GF/s of all of torch's threads together, measured for about `milliseconds`.
double fma_peak(double milliseconds) {
  TORCH_CHECK_VALUE(milliseconds > 0, "fma_peak: milliseconds: expected a positive number, got ",
                    milliseconds);
  const int threads = at::get_num_threads();
  std::atomic<double> rate{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      using Clock = std::chrono::steady_clock;
      float sink = 0;
      double flops = 0, seconds = 0;
      const auto start = Clock::now();
      do {
        flops += pyens::fma_peak_cpu::run(100'000, &sink);
        seconds = std::chrono::duration<double>(Clock::now() - start).count();
      } while (seconds * 1e3 < milliseconds);
      for (double old = rate; !rate.compare_exchange_weak(old, old + flops / seconds);) {
      }
    }
  });
  return rate / 1e9;
}

// Runs one launch of multiply-add chains of the sink's type on its GPU; returns their operations.
double fma_peak_cuda([[maybe_unused]] const Tensor& sink, [[maybe_unused]] bool tf32,
                     [[maybe_unused]] int64_t rounds) {
#if defined(PYENS_WITH_CUDA)
  TORCH_CHECK_VALUE(sink.is_cuda() && sink.numel() > 0,
                    "fma_peak_cuda: sink: expected a number on a GPU, got shape ", sink.sizes(),
                    " on ", sink.device());
  const pyens::DType dtype = pyens::kernel_dtype(sink.scalar_type());
  double operations = 0;
  pyens::launch_cuda("fma_peak_cuda", sink, [&](void* stream) {
    operations = pyens::fma_peak_cuda::operations(dtype, tf32, rounds);
    auto* const to = static_cast<float*>(sink.mutable_data_ptr());
    return pyens::fma_peak_cuda::run(dtype, tf32, rounds, to, stream);
  });
  return operations;
#else
  TORCH_CHECK(false, "fma_peak_cuda: pyens was built without CUDA");
#endif
}

// What only the extension knows; the rest of pyens.build_info() is in the file that setup.py writes.
std::map<std::string, std::string> build_info() {
  return {{"cpu_capability", pyens::cpu_capability()}, {"compiler", __VERSION__}};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using no_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("ensemble_mlp", ensemble_mlp, no_gil());
  m.def("ensemble_mlp_packed", ensemble_mlp_packed, no_gil());
  m.def("ensemble_mlp_loss", ensemble_mlp_loss, no_gil());
  m.def("activation_strength", activation_strength, no_gil());
  m.def("mask_channels", mask_channels, no_gil());
  m.def("masked_weights", masked_weights, no_gil());
  m.def("ensemble_embedding", ensemble_embedding, no_gil());
  m.def("ensemble_embedding_concat", ensemble_embedding_concat, no_gil());
  m.def("decorrelation_loss", decorrelation_loss, no_gil());
  m.def("predictive_uncertainty", predictive_uncertainty, no_gil());
  m.def("predictive_moments", predictive_moments, no_gil());
  m.def("fma_peak", fma_peak, no_gil(), pybind11::arg("milliseconds"));
  m.def("fma_peak_cuda", fma_peak_cuda, no_gil(), pybind11::arg("sink"), pybind11::arg("tf32"),
        pybind11::arg("rounds"));
  m.def("build_info", build_info);
}
