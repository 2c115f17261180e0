// The decorrelation kernels against plain loops in double, on buffers that end where the sanitizers
// watch.

#include "kernels/decorrelation.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

namespace {

using pyens::DecorrelationKind;
using pyens::DType;
namespace kernel = pyens::decorrelation_cpu;

int failures = 0;

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, FreeDeleter>;

template <class T>
struct Problem {
  int64_t models, components, batch, labels;
  DecorrelationKind kind;
  bool sum_labels;
  std::vector<T> outputs;

  Problem(int64_t m, int64_t j, int64_t b, int64_t k, DecorrelationKind of_kind, bool sum)
      : models(m), components(j), batch(b), labels(k), kind(of_kind), sum_labels(sum) {
    std::mt19937_64 random(static_cast<uint64_t>(m + 10 * j + 100 * b + 1000 * k));
    std::normal_distribution<double> normal;
    outputs.resize(static_cast<size_t>(m * j * b * k));
    for (T& x : outputs) x = static_cast<T>(normal(random) + 0.5);
  }

  size_t at(int64_t m, int64_t j, int64_t b, int64_t k) const {
    return static_cast<size_t>(((m * components + j) * batch + b) * labels + k);
  }

  struct Result {
    std::vector<T> loss, gradient;
  };

  // Runs both kernels with their work cut into pieces of `step` items.
  Result run(int64_t step) const {
    Result r;
    r.loss.resize(static_cast<size_t>(sum_labels ? models : models * labels));
    r.gradient.resize(outputs.size());
    std::vector<T> correlations(static_cast<size_t>(models * labels * components * components));
    std::vector<T> centre(static_cast<size_t>(2 * models * components * labels));
    std::vector<T> grad(r.loss.size());
    for (size_t i = 0; i < grad.size(); ++i) grad[i] = static_cast<T>(1) + static_cast<T>(i) / 4;
    pyens::DecorrelationParams p{};
    p.dtype = sizeof(T) == 4 ? DType::float32 : DType::float64;
    p.kind = kind;
    p.sum_labels = sum_labels;
    p.models = models;
    p.components = components;
    p.batch = batch;
    p.labels = labels;
    p.outputs = outputs.data();
    p.model_stride = components * batch * labels;
    p.component_stride = batch * labels;
    p.correlations = correlations.data();
    p.centre = centre.data();
    p.loss = r.loss.data();
    p.grad_loss = grad.data();
    p.grad_outputs = r.gradient.data();
    std::vector<T> partials(static_cast<size_t>(kernel::partials_size(p)));
    p.partials = partials.data();
    const size_t bytes = (kernel::scratch_bytes(p) + 63) / 64 * 64;
    const auto in_pieces = [&](auto part) {
      for (int64_t begin = 0; begin < kernel::work_items(p); begin += step) {
        const Buffer scratch(std::aligned_alloc(64, bytes));
        std::memset(scratch.get(), 0xff, bytes);  // NaN, if anything is read before it is written
        part(p, begin, std::min(kernel::work_items(p), begin + step), scratch.get());
      }
    };
    kernel::prepare(p);
    in_pieces(kernel::run);
    kernel::finish(p);
    in_pieces(kernel::run_backward);
    return r;
  }

  // What the kernels should say, and how large the numbers in it are.
  void expected(std::vector<double>& loss, std::vector<double>& gradient) const {
    loss.assign(static_cast<size_t>(sum_labels ? models : models * labels), 0);
    gradient.assign(outputs.size(), 0);
    const auto n = static_cast<size_t>(components);
    for (int64_t m = 0; m < models; ++m) {
      for (int64_t k = 0; k < labels; ++k) {
        std::vector<std::vector<double>> z(n, std::vector<double>(static_cast<size_t>(batch)));
        for (size_t j = 0; j < n; ++j) {
          for (size_t b = 0; b < z[j].size(); ++b) {
            z[j][b] = outputs[at(m, static_cast<int64_t>(j), static_cast<int64_t>(b), k)];
          }
        }
        centre(z);
        std::vector<std::vector<double>> g(n, std::vector<double>(static_cast<size_t>(batch)));
        const auto where = static_cast<size_t>(sum_labels ? m : m * labels + k);
        const double grad = 1 + static_cast<double>(where) / 4;
        for (size_t i = 0; i < n; ++i) {
          for (size_t j = 0; j < n; ++j) {
            if (i == j) continue;
            double c = 0;
            for (size_t b = 0; b < z[i].size(); ++b) c += z[i][b] * z[j][b];
            c /= static_cast<double>(batch);
            if (i < j) loss[where] += c * c;
            for (size_t b = 0; b < z[i].size(); ++b) {
              g[i][b] += 2 * grad * c * z[j][b] / static_cast<double>(batch);
            }
          }
        }
        centre(g);  // the projection is its own transpose
        for (size_t j = 0; j < n; ++j) {
          for (size_t b = 0; b < g[j].size(); ++b) {
            gradient[at(m, static_cast<int64_t>(j), static_cast<int64_t>(b), k)] = g[j][b];
          }
        }
      }
    }
  }

  void centre(std::vector<std::vector<double>>& z) const {
    if (kind == DecorrelationKind::covariance) {
      for (auto& row : z) {
        double mean = 0;
        for (const double x : row) mean += x / static_cast<double>(batch);
        for (double& x : row) x -= mean;
      }
    }
    if (kind == DecorrelationKind::residue) {
      for (size_t b = 0; b < z[0].size(); ++b) {
        double mean = 0;
        for (const auto& row : z) mean += row[b] / static_cast<double>(components);
        for (auto& row : z) row[b] -= mean;
      }
    }
  }
};

template <class T>
double worst(const std::vector<T>& got, const std::vector<double>& expected) {
  double error = 0, size = 1e-30;
  for (size_t i = 0; i < got.size(); ++i) {
    const double difference = std::abs(static_cast<double>(got[i]) - expected[i]);
    error = difference <= error ? error : difference;  // a NaN stays
    size = std::max(size, std::abs(expected[i]));
  }
  return error / size;
}

template <class T>
void test(int64_t m, int64_t j, int64_t b, int64_t k, DecorrelationKind kind, bool sum_labels) {
  const Problem<T> problem(m, j, b, k, kind, sum_labels);
  const auto result = problem.run(1 << 20), in_pieces = problem.run(1);
  std::vector<double> loss, gradient;
  problem.expected(loss, gradient);
  const double tolerance = sizeof(T) == 4 ? 1e-5 : 1e-13;
  const bool loss_ok = worst(result.loss, loss) <= tolerance;
  const bool gradient_ok = worst(result.gradient, gradient) <= tolerance;
  const bool same = result.loss == in_pieces.loss && result.gradient == in_pieces.gradient;
  if (loss_ok && gradient_ok && same) return;
  ++failures;
  std::printf("FAILED:%s%s%s (M %lld, J %lld, B %lld, K %lld, kind %d)\n", loss_ok ? "" : " loss",
              gradient_ok ? "" : " gradient", same ? "" : " same bits for any split of the work",
              static_cast<long long>(m), static_cast<long long>(j), static_cast<long long>(b),
              static_cast<long long>(k), static_cast<int>(kind));
}

}  // namespace

int main() {
  const int64_t shapes[][4] = {
      {1, 2, 1, 1},    {1, 2, 17, 1},  {1, 5, 700, 1},   {1, 26, 300, 1}, {1, 2, 1025, 10},
      {1, 8, 129, 7},  {2, 9, 31, 10}, {1, 13, 40, 32},  {1, 3, 40, 64},  {1, 4, 33, 65},
      {3, 3, 7, 5},    {1, 2, 3, 200}, {1, 3, 2100, 1},  {1, 4, 5000, 1}, {1, 2, 520, 130},
      {2, 7, 16, 128}, {1, 6, 15, 16}, {1, 14, 260, 11},
  };
  int tests = 0;
  for (const auto& s : shapes) {
    for (const auto kind : {DecorrelationKind::correlation, DecorrelationKind::covariance,
                            DecorrelationKind::residue}) {
      test<float>(s[0], s[1], s[2], s[3], kind, tests % 2 == 0);
      test<double>(s[0], s[1], s[2], s[3], kind, tests % 2 == 1);
      ++tests;
    }
  }
  if (failures == 0) std::printf("ok: %d problems\n", tests);
  return failures != 0;
}
