// Clipping of members against plain loops in long double, on buffers that end where the sanitizers watch. A member's
// bits are those that it has alone, however the work is split.

#include "kernels/clip_member_grad_norm.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

namespace kernel = pyens::clip_member_grad_norm_cpu;
using pyens::Norm;

int failures = 0, problems = 0;

void fail(const char* what, Norm norm, int64_t size) {
  ++failures;
  std::printf("FAILED: %s (norm %d, size %d)\n", what, static_cast<int>(norm),
              static_cast<int>(size));
}

// Gradients [members, size] of several sizes, and the norms that were found.
template <class T>
struct Problem {
  int64_t members;
  std::vector<std::vector<T>> gradients;
  std::vector<double> norms;
};

// Member m's numbers are about 4^-m.
template <class T>
Problem<T> make(int64_t members, const std::vector<int64_t>& sizes) {
  Problem<T> made{members, {}, std::vector<double>(static_cast<size_t>(members))};
  for (const int64_t size : sizes) {
    std::vector<T>& g = made.gradients.emplace_back();
    for (int64_t m = 0; m < members; ++m) {
      for (int64_t i = 0; i < size; ++i) {
        const double x = static_cast<double>((i * 7 + m * 3) % 29) - 14.3;
        g.push_back(static_cast<T>(std::ldexp(x, -2 * static_cast<int>(m))));
      }
    }
  }
  return made;
}

enum class Way { at_once, in_three };

template <class T>
void clip(Problem<T>& problem, Norm norm, double max_norm, Way way = Way::at_once,
          int64_t pieces = 1) {
  std::vector<pyens::ClipTensor> tensors;
  int64_t first_part = 0;
  for (auto& g : problem.gradients) {
    const int64_t size =
        problem.members == 0 ? 0 : static_cast<int64_t>(g.size()) / problem.members;
    const auto dtype = std::is_same_v<T, float> ? pyens::DType::float32 : pyens::DType::float64;
    tensors.push_back({dtype, size, first_part, g.data()});
    first_part += kernel::parts_of(size);
  }
  pyens::ClipParams p{};
  p.tensors = tensors.data();
  p.count = static_cast<int64_t>(tensors.size());
  p.members = problem.members;
  p.norm = norm;
  p.max_norm = max_norm;
  std::vector<pyens::ClipPart> parts(static_cast<size_t>(p.members * kernel::parts_of_member(p)));
  p.parts = parts.data();
  p.norms = problem.norms.data();
  const auto run = [&](auto* function, int64_t items) {
    const int64_t step = std::max<int64_t>(1, (items + pieces - 1) / pieces);
    for (int64_t begin = 0; begin < items; begin += step) {
      function(p, begin, std::min(items, begin + step));
    }
  };
  const auto items = static_cast<int64_t>(parts.size());
  if (way == Way::at_once) {
    run(kernel::clip, p.members);
  } else {
    run(kernel::measure, items);
    run(kernel::add_up, p.members);
    run(kernel::scale, items);
  }
}

template <class T>
long double norm_of(const Problem<T>& problem, int64_t m, Norm norm) {
  long double sum = 0;
  for (const auto& g : problem.gradients) {
    const size_t size = g.size() / static_cast<size_t>(problem.members);
    for (size_t i = 0; i < size; ++i) {
      const long double x = std::abs(g[static_cast<size_t>(m) * size + i]);
      if (norm == Norm::largest) sum = std::max(sum, x);
      if (norm == Norm::one) sum += x;
      if (norm == Norm::two) sum += x * x;
    }
  }
  return norm == Norm::two ? std::sqrt(sum) : sum;
}

bool close(long double a, long double b, double allowed) {
  return std::abs(a - b) <= allowed * std::abs(b);
}

template <class T>
void test(Norm norm, int64_t size) {
  ++problems;
  const std::vector<int64_t> sizes{3, size, 0, 70};
  constexpr int64_t kMembers = 5;
  const Problem<T> start = make<T>(kMembers, sizes);
  const auto max_norm = static_cast<double>(norm_of(start, 2, norm));
  Problem<T> whole = start;
  clip(whole, norm, max_norm);
  for (int64_t m = 0; m < kMembers; ++m) {
    const long double expected = norm_of(start, m, norm);
    if (!close(whole.norms[static_cast<size_t>(m)], expected, 1e-14)) fail("norm", norm, size);
    const long double factor = std::min<long double>(1, max_norm / (expected + 1e-6));
    for (size_t k = 0; k < sizes.size(); ++k) {
      for (int64_t i = m * sizes[k]; i < (m + 1) * sizes[k]; ++i) {
        const auto at = static_cast<size_t>(i);
        const T before = start.gradients[k][at], after = whole.gradients[k][at];
        if (m > 2 ? after != before
                  : !close(after, before * factor, 2 * std::numeric_limits<T>::epsilon() + 1e-14)) {
          fail("clipped", norm, size);
        }
      }
    }
    Problem<T> alone{1, {}, {0}};
    for (size_t k = 0; k < sizes.size(); ++k) {
      const T* from = start.gradients[k].data() + m * sizes[k];
      alone.gradients.emplace_back(from, from + sizes[k]);
    }
    clip(alone, norm, max_norm);
    if (alone.norms[0] != whole.norms[static_cast<size_t>(m)]) fail("norm alone", norm, size);
    for (size_t k = 0; k < sizes.size(); ++k) {
      if (!std::equal(alone.gradients[k].begin(), alone.gradients[k].end(),
                      whole.gradients[k].begin() + m * sizes[k])) {
        fail("a member alone", norm, size);
      }
    }
  }
  for (const Way way : {Way::at_once, Way::in_three}) {
    for (const int64_t pieces : {int64_t{1}, int64_t{2}, int64_t{3}, int64_t{1000}}) {
      Problem<T> split = start;
      clip(split, norm, max_norm, way, pieces);
      if (split.norms != whole.norms || split.gradients != whole.gradients) {
        fail("split", norm, size);
      }
    }
  }
}

// Two parts of one member, in whatever ranges of double: a norm that can be written is found.
void test_ranges() {
  const double sizes[] = {0,      5e-324, 1e-310, 1e-300, 1e-200, 1e-160, 1e-150,
                          1e-140, 1e-135, 1e-130, 1e-10,  1,      1e100,  1e140,
                          1e147,  1e148,  1e155,  1e200,  1e300};
  for (const double a : sizes) {
    for (const double b : sizes) {
      ++problems;
      Problem<double> problem{1, {{a, -a, a}, {b}}, {0}};
      clip(problem, Norm::two, 1e308);
      const long double expected = std::hypot(std::sqrt(3.0L) * a, static_cast<long double>(b));
      if (std::abs(problem.norms[0] - expected) > 1e-15L * expected + 5e-324L) {
        fail("a range", Norm::two, 3);
      }
    }
  }
}

// NaN and infinity, wherever they are, are of their member alone; all of it is then NaN or zero, as in torch.
template <class T>
void test_special_numbers(Norm norm) {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  for (const int64_t place : {0, 7, 31, 32, 33, 99}) {
    ++problems;
    Problem<T> problem = make<T>(4, {100, 9});
    const Problem<T> start = problem;
    problem.gradients[0][static_cast<size_t>(100 + place)] = nan;
    problem.gradients[0][static_cast<size_t>(200 + place)] = -inf;
    clip(problem, norm, 1e9);
    if (!std::isnan(problem.norms[1]) || !std::isinf(problem.norms[2])) fail("norms", norm, place);
    for (size_t k = 0; k < 2; ++k) {
      const size_t size = problem.gradients[k].size() / 4;
      for (size_t i = 0; i < 4 * size; ++i) {
        const T x = problem.gradients[k][i];
        const bool own = k == 0 && i == static_cast<size_t>(200 + place);
        const size_t m = i / size;
        if (m == 1 || own ? !std::isnan(x) : m == 2 ? x != 0 : x != start.gradients[k][i]) {
          fail("special numbers", norm, place);
        }
      }
    }
  }
}

}  // namespace

int main() {
  for (const Norm norm : {Norm::one, Norm::two, Norm::largest}) {
    for (const int64_t size :
         {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 8191, 8192, 8193, 20000}) {
      test<float>(norm, size);
      test<double>(norm, size);
    }
    test_special_numbers<float>(norm);
    test_special_numbers<double>(norm);
  }
  test_ranges();
  Problem<float> nobody = make<float>(0, {3, 4});
  clip(nobody, Norm::two, 1);
  Problem<float> nothing = make<float>(3, {0});
  clip(nothing, Norm::two, 1);
  if (nothing.norms != std::vector<double>(3)) fail("nothing", Norm::two, 0);
  if (failures == 0) std::printf("ok: %d problems\n", problems);
  return failures != 0;
}
