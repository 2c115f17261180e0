// Optimizer steps against plain loops in double, on buffers that end where the sanitizers watch. An element's bits
// are those that it has in a tensor of its own, whatever is beside it and however the work is split.

#include "kernels/optimizers.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using pyens::Optimizer;

int failures = 0, problems = 0;

struct Case {
  Optimizer optimizer;
  bool amsgrad, maximize, scaled;
  double weight_decay, shrink, momentum;
  bool nesterov, begins;
};

constexpr double kScale = 4, kBeta1 = 0.9, kBeta2 = 0.99, kEps = 1e-6, kDampening = 0.25;
constexpr double kRate = 0.01, kRootCorrection = 1.75;

int states_of(const Case& c) {
  if (c.optimizer == Optimizer::adam) return c.amsgrad ? 3 : 2;
  return c.optimizer == Optimizer::adagrad || c.momentum != 0;
}

// A parameter, its gradient and its state: five rows of numbers.
template <class T>
struct Problem {
  std::vector<T> rows[5];

  explicit Problem(int64_t size = 0) {
    for (auto& row : rows) row.resize(static_cast<size_t>(size));
    for (int64_t i = 0; i < size; ++i) {
      const auto at = static_cast<size_t>(i);
      rows[0][at] = static_cast<T>(i % 13) - T(5.5);
      rows[1][at] = (static_cast<T>((i * 7) % 29) - T(14.3)) / T(8);
      rows[2][at] = (static_cast<T>((i * 5) % 11) - T(3.7)) / T(16);
      rows[3][at] = static_cast<T>((i * 3) % 17 + 1) / T(32);
      rows[4][at] = static_cast<T>((i * 2) % 19 + 1) / T(32);
    }
  }
};

template <class T>
pyens::StepTensor tensor_of(Problem<T>& problem, const Case& c, int64_t first_item) {
  pyens::StepTensor t{};
  t.dtype = sizeof(T) == 4 ? pyens::DType::float32 : pyens::DType::float64;
  t.size = static_cast<int64_t>(problem.rows[0].size());
  t.first_item = first_item;
  t.parameter = problem.rows[0].data();
  t.gradient = problem.rows[1].data();
  // Adagrad's sum is no less than 0, as the squares of Adam.
  const int first = c.optimizer == Optimizer::adagrad ? 3 : 2;
  for (int s = 0; s < states_of(c); ++s) t.state[s] = problem.rows[first + s].data();
  t.rate = kRate;
  t.root_correction = kRootCorrection;
  return t;
}

template <class T>
void run(std::vector<Problem<T>>& problem, const Case& c, int64_t pieces) {
  std::vector<pyens::StepTensor> tensors;
  int64_t items = 0;
  for (auto& one : problem) {
    tensors.push_back(tensor_of(one, c, items));
    items += pyens::optimizers_cpu::items_of(tensors.back().size);
  }
  pyens::StepParams p{};
  p.optimizer = c.optimizer;
  p.tensors = tensors.data();
  p.count = static_cast<int64_t>(tensors.size());
  p.grad_scale = c.scaled ? &kScale : nullptr;
  p.maximize = c.maximize;
  p.weight_decay = c.weight_decay;
  p.shrink = c.shrink;
  p.beta1 = kBeta1;
  p.beta2 = kBeta2;
  p.amsgrad = c.amsgrad;
  p.eps = kEps;
  p.momentum = c.momentum;
  p.dampening = kDampening;
  p.nesterov = c.nesterov;
  p.begins = c.begins;
  const int64_t step = std::max<int64_t>(1, (items + pieces - 1) / pieces);
  for (int64_t begin = 0; begin < pyens::optimizers_cpu::work_items(p); begin += step) {
    pyens::optimizers_cpu::run(p, begin, std::min(items, begin + step));
  }
}

// The formulas for one element, in double.
template <class T>
void expect(Problem<T>& problem, const Case& c, size_t i) {
  const auto at = [&](int row) { return static_cast<double>(problem.rows[row][i]); };
  const auto set = [&](int row, double v) {
    problem.rows[row][i] = static_cast<T>(v);
    return v;
  };
  double x = at(0), g = at(1);
  if (c.scaled) g = set(1, g / kScale);
  if (c.maximize) g = -g;
  g += c.weight_decay * x;
  if (c.optimizer == Optimizer::adam) {
    const double m = set(2, kBeta1 * at(2) + (1 - kBeta1) * g);
    double v = set(3, kBeta2 * at(3) + (1 - kBeta2) * g * g);
    if (c.amsgrad) v = set(4, std::max(at(4), v));
    x = c.shrink * x - kRate * m / (std::sqrt(v) * kRootCorrection + kEps);
  } else if (c.optimizer == Optimizer::adagrad) {
    const double s = set(3, at(3) + g * g);
    x -= kRate * g / (std::sqrt(s) + kEps);
  } else {
    if (c.momentum != 0) {
      const double b = set(2, c.begins ? g : c.momentum * at(2) + (1 - kDampening) * g);
      g = c.nesterov ? g + c.momentum * b : b;
    }
    x -= kRate * g;
  }
  set(0, x);
}

template <class T>
bool close(const std::vector<T>& a, const std::vector<T>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    const double allowed = 8 * static_cast<double>(std::numeric_limits<T>::epsilon());
    const double size = std::max(1.0, std::abs(static_cast<double>(b[i])));
    if (!(std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])) <= allowed * size)) {
      return false;
    }
  }
  return true;
}

template <class T>
void test_step(const Case& c, int64_t size) {
  ++problems;
  const auto fail = [&](const char* what) {
    ++failures;
    std::printf("FAILED: %s (optimizer %d, size %d)\n", what, static_cast<int>(c.optimizer),
                static_cast<int>(size));
  };
  Problem<T> expected(size);
  for (size_t i = 0; i < static_cast<size_t>(size); ++i) expect(expected, c, i);
  std::vector<Problem<T>> whole{Problem<T>(3), Problem<T>(size), Problem<T>(0), Problem<T>(70)};
  run(whole, c, 1);
  for (int r = 0; r < 5; ++r) {
    if (!close(whole[1].rows[r], expected.rows[r])) fail("formulas");
  }
  for (const int64_t pieces : {int64_t{2}, int64_t{3}, int64_t{1000}}) {
    std::vector<Problem<T>> split{Problem<T>(3), Problem<T>(size), Problem<T>(0), Problem<T>(70)};
    run(split, c, pieces);
    for (size_t k = 0; k < split.size(); ++k) {
      for (int r = 0; r < 5; ++r) {
        if (split[k].rows[r] != whole[k].rows[r]) fail("split");
      }
    }
  }
  for (size_t i = 0; i < static_cast<size_t>(size); ++i) {
    std::vector<Problem<T>> alone(1);
    const Problem<T> start(size);
    for (int r = 0; r < 5; ++r) alone[0].rows[r] = {start.rows[r][i]};
    run(alone, c, 1);
    for (int r = 0; r < 5; ++r) {
      if (alone[0].rows[r][0] != whole[1].rows[r][i]) fail("an element alone");
    }
  }
}

// NaN stays in the largest square, from either side; an infinite parameter meets no decay of 0.
void test_special_numbers() {
  ++problems;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Case c{Optimizer::adam, true, false, false, 0, 1, 0, false, false};
  std::vector<Problem<float>> problem{Problem<float>(20)};
  problem[0].rows[4][1] = nan;
  problem[0].rows[1][18] = nan;
  run(problem, c, 1);
  for (size_t i = 0; i < 20; ++i) {
    if (std::isnan(problem[0].rows[4][i]) != (i == 1 || i == 18) ||
        std::isnan(problem[0].rows[0][i]) != (i == 1 || i == 18)) {
      ++failures;
      std::printf("FAILED: NaN at %d\n", static_cast<int>(i));
    }
  }
  c.optimizer = Optimizer::sgd;
  problem = {Problem<float>(20)};
  problem[0].rows[0][19] = std::numeric_limits<float>::infinity();
  run(problem, c, 1);
  if (!std::isinf(problem[0].rows[0][19])) {
    ++failures;
    std::printf("FAILED: an infinite parameter\n");
  }
}

}  // namespace

int main() {
  const Case cases[] = {
      {Optimizer::adam, false, false, false, 0, 1, 0, false, false},
      {Optimizer::adam, true, true, true, 0.01, 1, 0, false, false},
      {Optimizer::adam, false, false, true, 0, 0.999, 0, false, false},
      {Optimizer::adagrad, false, false, false, 0, 1, 0, false, false},
      {Optimizer::adagrad, false, true, true, 0.01, 1, 0, false, false},
      {Optimizer::sgd, false, false, false, 0, 1, 0, false, false},
      {Optimizer::sgd, false, true, true, 0.01, 1, 0.9, false, false},
      {Optimizer::sgd, false, false, false, 0.01, 1, 0.9, true, false},
      {Optimizer::sgd, false, false, false, 0, 1, 0.9, false, true},
  };
  for (const Case& c : cases) {
    for (const int64_t size : {0, 1, 3, 4, 7, 8, 9, 15, 16, 17, 63, 64, 65, 129, 200}) {
      test_step<float>(c, size);
      test_step<double>(c, size);
    }
  }
  test_special_numbers();
  if (failures == 0) std::printf("ok: %d problems\n", problems);
  return failures != 0;
}
