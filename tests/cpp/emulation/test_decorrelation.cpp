// The CUDA kernels of the decorrelation loss, run on the host, against the CPU's.

#include "kernels/cuda/decorrelation.cu"

#include "emulated_test.h"

namespace {

using namespace emulated_test;
using pyens::DecorrelationKind;
namespace cpu = pyens::decorrelation_cpu;
namespace gpu = pyens::decorrelation_cuda;

// In the outputs of one component at one example and label, of which all others are free.
struct Planted {
  double value = 0;
  bool twice = false;  // in another component too
};

template <class T>
void test(int64_t models, int64_t components, int64_t batch, int64_t labels, DecorrelationKind kind,
          bool sum_labels, double offset = 0.5, const Planted& planted = {}) {
  using R = RealFor<T>;
  ++problems;
  const std::string what = "decorrelation, kind " + std::to_string(static_cast<int>(kind)) +
                           " of " + std::to_string(models) + ", " + std::to_string(components) +
                           ", " + std::to_string(batch) + ", " + std::to_string(labels);
  Random random(static_cast<uint64_t>(models + 10 * components + 100 * batch + 1000 * labels));
  const int64_t stride = batch * labels + 3;  // components lie further apart than they are long
  std::vector<T> values = normal<T>(random, models * components * stride, 1, offset);
  if (planted.value != 0) {
    const auto at = static_cast<size_t>((components > 2 ? stride : 0) + (batch / 2) * labels);
    values[at] = from_double<T>(planted.value);
    if (planted.twice) values[at + static_cast<size_t>(stride)] = from_double<T>(-planted.value);
  }
  const Values<T> outputs(values);
  const auto losses = static_cast<size_t>(sum_labels ? models : models * labels);
  std::vector<R> grad_values(losses);
  for (size_t i = 0; i < losses; ++i) grad_values[i] = static_cast<R>(1) + static_cast<R>(i) / 4;
  const Values<R> grad(grad_values, "grad");
  const auto square = static_cast<size_t>(models * labels * components * components);
  const auto centres = static_cast<size_t>(2 * models * components * labels);
  const auto size = static_cast<size_t>(models * components * batch * labels);

  pyens::DecorrelationParams p{};
  p.dtype = dtype_of<T>();
  p.kind = kind;
  p.sum_labels = sum_labels;
  p.models = models;
  p.components = components;
  p.batch = batch;
  p.labels = labels;
  p.model_stride = components * stride;
  p.component_stride = stride;

  std::vector<R> loss(losses), correlations(square), centre(centres);
  std::vector<T> gradient(size);
  {
    p.outputs = outputs.cpu.data();
    p.grad_loss = grad.cpu.data();
    std::vector<R> partials(static_cast<size_t>(cpu::partials_size(p)));
    p.loss = loss.data();
    p.correlations = correlations.data();
    p.centre = centre.data();
    p.partials = partials.data();
    p.grad_outputs = gradient.data();
    const Scratch scratch(cpu::scratch_bytes(p));
    cpu::prepare(p);
    cpu::run(p, 0, cpu::work_items(p), scratch.get());
    cpu::finish(p);
    cpu::run_backward(p, 0, cpu::work_items(p), scratch.get());
  }
  std::vector<R> first_loss;
  std::vector<T> first_gradient;
  for (const uint64_t seed : {1, 2}) {
    emulation::set_seed(seed);
    Global<R> gpu_loss(losses, "loss"), gpu_correlations(square, "correlations");
    Global<R> gpu_centre(centres, "centre");
    Global<T> gpu_gradient(size, "gradient");
    p.outputs = outputs.gpu.data();
    p.grad_loss = grad.gpu.data();
    p.loss = gpu_loss.data();
    p.correlations = gpu_correlations.data();
    p.centre = gpu_centre.data();
    p.grad_outputs = gpu_gradient.data();
    const char* error;
    {
      Global<char> scratch(gpu::scratch_bytes(p), "scratch");
      error = gpu::run(p, scratch.data(), nullptr);
    }
    if (error == nullptr) {
      Global<char> scratch(gpu::backward_scratch_bytes(p), "scratch");
      error = gpu::run_backward(p, scratch.data(), nullptr);
    }
    if (error) return check(false, what + ": " + error);
    if (seed == 1) {
      first_loss = gpu_loss.host();
      first_gradient = gpu_gradient.host();
    }
    check(same_bits(first_loss, gpu_loss.host()), what + ": another loss in another order");
    check(same_bits(first_gradient, gpu_gradient.host()), what + ": another gradient");
  }
  check_close(what + ", loss", first_loss, loss);
  check_close(what + ", gradient", first_gradient, gradient);
}

}  // namespace

int main() {
  const int64_t shapes[][4] = {{1, 2, 1, 1}, {1, 5, 700, 1}, {2, 9, 31, 10},  {1, 3, 40, 65},
                               {3, 3, 7, 5}, {1, 2, 3, 300}, {1, 4, 35, 257}, {1, 1, 5, 2}};
  int i = 0;
  for (const auto& s : shapes) {
    for (const auto kind : {DecorrelationKind::correlation, DecorrelationKind::covariance,
                            DecorrelationKind::residue}) {
      test<float>(s[0], s[1], s[2], s[3], kind, i % 2 == 0);
      test<double>(s[0], s[1], s[2], s[3], kind, i % 2 == 1);
      if (s[2] < 100) test<pyens::BFloat16>(s[0], s[1], s[2], s[3], kind, i % 2 == 1);
      ++i;
    }
  }
  test<pyens::Float16>(2, 3, 9, 4, DecorrelationKind::residue, true);
  // Infinite numbers, NaN, and those whose squares overflow.
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double value : {infinity, -infinity, double{NAN}, 3e38, 6e4}) {
    for (const auto kind : {DecorrelationKind::correlation, DecorrelationKind::covariance,
                            DecorrelationKind::residue}) {
      const int64_t small[][4] = {{2, 3, 20, 4}, {1, 2, 3, 70}};
      for (const auto& s : small) {
        const Planted planted{value, i++ % 2 == 0};
        test<float>(s[0], s[1], s[2], s[3], kind, i % 3 == 0, 0.5, planted);
        test<double>(s[0], s[1], s[2], s[3], kind, i % 3 == 1, 0.5, planted);
        test<pyens::BFloat16>(s[0], s[1], s[2], s[3], kind, i % 3 == 2, 0.5, planted);
        test<pyens::Float16>(s[0], s[1], s[2], s[3], kind, i % 3 == 0, 0.5, planted);
      }
    }
  }
  // Far from zero.
  test<float>(1, 3, 200, 2, DecorrelationKind::covariance, true, 1000);
  test<float>(1, 3, 200, 2, DecorrelationKind::residue, true, 1000);
  return finish();
}
