// The uncertainty and moments kernels against plain loops in double, on buffers that end where the
// sanitizers watch.

#include "kernels/uncertainty.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

namespace {

using pyens::DType;
namespace kernel = pyens::uncertainty_cpu;

int failures = 0;

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, FreeDeleter>;

// Runs a kernel with its work cut into pieces of `step` items.
template <class Params>
void run_in_pieces(const Params& p, int64_t step) {
  const size_t bytes = (kernel::scratch_bytes(p) + 63) / 64 * 64;
  for (int64_t begin = 0; begin < kernel::work_items(p); begin += step) {
    const Buffer scratch(std::aligned_alloc(64, bytes));
    std::memset(scratch.get(), 0xff, bytes);  // NaN, if anything is read before it is written
    kernel::run(p, begin, std::min(kernel::work_items(p), begin + step), scratch.get());
  }
}

template <class T>
constexpr DType kDType = sizeof(T) == 4 ? DType::float32 : DType::float64;

template <class T>
std::vector<T> draw(int64_t n, double scale) {
  std::mt19937_64 random(static_cast<uint64_t>(n));
  std::normal_distribution<double> normal;
  std::vector<T> values(static_cast<size_t>(n));
  for (T& x : values) x = static_cast<T>(normal(random) * scale);
  return values;
}

template <class T>
bool close(const std::vector<T>& got, const std::vector<double>& expected, double scale) {
  const double tolerance = (sizeof(T) == 4 ? 2e-6 : 1e-13) * scale;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!(std::abs(static_cast<double>(got[i]) - expected[i]) <= tolerance)) return false;
  }
  return true;
}

void check(bool condition, const char* what, int64_t e, int64_t b, int64_t k) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s (E %lld, B %lld, K %lld)\n", what, static_cast<long long>(e),
              static_cast<long long>(b), static_cast<long long>(k));
}

template <class T>
struct Uncertainty {
  std::vector<T> mean, total, expected, information, pv, disagreement;
  std::vector<int32_t> votes;
  std::vector<int64_t> bad_rows;

  Uncertainty(const std::vector<T>& members, int64_t e, int64_t b, int64_t k, bool binary,
              bool from_probabilities, int64_t step) {
    pyens::UncertaintyParams p{};
    p.dtype = kDType<T>;
    p.from_probabilities = from_probabilities;
    p.binary = binary;
    p.ensemble_size = e;
    p.batch = b;
    p.classes = k;
    p.members = members.data();
    p.row_stride = binary ? 1 : k;
    p.member_stride = b * p.row_stride;
    p.sum_tolerance = 1e-4;
    const auto numbers = [&](std::vector<T>& of, int64_t n) -> void* {
      of.resize(static_cast<size_t>(n));
      return of.data();
    };
    p.mean_probability = numbers(mean, binary ? b : b * k);
    p.predictive_entropy = numbers(total, b);
    p.expected_entropy = numbers(expected, b);
    p.mutual_information = numbers(information, b);
    p.distribution_pv = numbers(pv, b);
    p.vote_disagreement = numbers(disagreement, b);
    votes.resize(static_cast<size_t>(b * k));
    p.votes = votes.data();
    bad_rows.assign(static_cast<size_t>(kernel::work_items(p)), -2);
    p.bad_rows = bad_rows.data();
    run_in_pieces(p, step);
  }

  bool operator==(const Uncertainty& o) const {
    return mean == o.mean && total == o.total && expected == o.expected &&
           information == o.information && pv == o.pv && disagreement == o.disagreement &&
           votes == o.votes && bad_rows == o.bad_rows;
  }
};

double entropy(const std::vector<double>& p) {
  double h = 0;
  for (const double x : p) h -= x > 0 ? x * std::log(x) : 0;
  return h;
}

template <class T>
void test_uncertainty(int64_t e, int64_t b, int64_t k, bool binary, bool from_probabilities) {
  std::vector<T> members = draw<T>(e * b * (binary ? 1 : k), 3);
  // The members' distributions in double; what the kernel gets is what they are made of.
  std::vector<std::vector<double>> p(static_cast<size_t>(e * b));
  for (size_t row = 0; row < p.size(); ++row) {
    const auto classes = static_cast<size_t>(k);
    std::vector<double> z(classes, 0);
    for (size_t i = binary ? 1 : 0; i < classes; ++i) {
      z[i] = members[binary ? row : row * classes + i];
    }
    const double largest = *std::max_element(z.begin(), z.end());
    double sum = 0;
    for (double& x : z) sum += x = std::exp(x - largest);
    for (double& x : z) x /= sum;
    if (from_probabilities) {
      for (size_t i = binary ? 1 : 0; i < classes; ++i) {
        T& member = members[binary ? row : row * classes + i];
        z[i] = member = static_cast<T>(z[i]);
      }
      if (binary) z[0] = 1 - z[1];
    }
    p[row] = z;
  }
  std::vector<double> mean, total, expected, information, pv, disagreement;
  std::vector<int32_t> votes;
  for (int64_t x = 0; x < b; ++x) {
    std::vector<double> average(static_cast<size_t>(k));
    std::vector<int32_t> count(static_cast<size_t>(k));
    double of_members = 0;
    for (int64_t m = 0; m < e; ++m) {
      const auto& row = p[static_cast<size_t>(m * b + x)];
      for (size_t i = 0; i < row.size(); ++i) average[i] += row[i] / static_cast<double>(e);
      of_members += entropy(row) / static_cast<double>(e);
      ++count[static_cast<size_t>(std::max_element(row.begin(), row.end()) - row.begin())];
    }
    mean.insert(mean.end(), average.begin() + (binary ? 1 : 0), average.end());
    votes.insert(votes.end(), count.begin(), count.end());
    total.push_back(entropy(average));
    expected.push_back(of_members);
    information.push_back(std::max(0.0, total.back() - of_members));
    pv.push_back(information.back() * static_cast<double>(e));
    const int32_t most = *std::max_element(count.begin(), count.end());
    disagreement.push_back(1 - most / static_cast<double>(e));
  }
  const Uncertainty<T> got(members, e, b, k, binary, from_probabilities, 1 << 20);
  check(close(got.mean, mean, 1), "mean probability", e, b, k);
  check(close(got.total, total, 1), "predictive entropy", e, b, k);
  check(close(got.expected, expected, 1), "expected entropy", e, b, k);
  check(close(got.information, information, 1), "mutual information", e, b, k);
  check(close(got.pv, pv, static_cast<double>(e)), "distribution PV", e, b, k);
  check(close(got.disagreement, disagreement, 1), "vote disagreement", e, b, k);
  check(got.votes == votes, "votes", e, b, k);
  for (const int64_t bad : got.bad_rows) check(bad == -1, "bad rows", e, b, k);
  check(got == Uncertainty<T>(members, e, b, k, binary, from_probabilities, 1),
        "same bits for any split of the work", e, b, k);

  if (!from_probabilities || b == 0) return;
  const int64_t m = e / 2, x = b - 1;
  members[static_cast<size_t>(m * b + x) * (binary ? 1 : static_cast<size_t>(k))] += 2;
  const Uncertainty<T> bad(members, e, b, k, binary, true, 1);
  check(bad.bad_rows.back() == m * b + x, "the bad row is found", e, b, k);
}

template <class T>
void test_moments(int64_t e, int64_t size, bool with_variances) {
  const std::vector<T> outputs = draw<T>(e * size, 2);
  std::vector<T> variances = draw<T>(e * size, 1);
  for (T& v : variances) v = std::abs(v);
  const auto n = static_cast<size_t>(size);
  std::vector<double> expected[6];
  for (size_t i = 0; i < n; ++i) {
    double mean = 0, squares = 0, aleatoric = 0, low = outputs[i], high = outputs[i];
    for (size_t at = i; at < outputs.size(); at += n) {
      mean += outputs[at] / static_cast<double>(e);
      aleatoric += variances[at] / static_cast<double>(e);
      low = std::min<double>(low, outputs[at]);
      high = std::max<double>(high, outputs[at]);
    }
    for (size_t at = i; at < outputs.size(); at += n) {
      squares += (outputs[at] - mean) * (outputs[at] - mean);
    }
    const double std = std::sqrt(squares / static_cast<double>(e - 1));
    const double all[] = {mean, std, low, high, squares / static_cast<double>(e), aleatoric};
    for (int j = 0; j < 6; ++j) expected[j].push_back(all[j]);
  }
  std::vector<T> got[6], in_pieces[6];
  for (auto* results : {got, in_pieces}) {
    for (int j = 0; j < 6; ++j) results[j].resize(n);
    pyens::MomentsParams p{};
    p.dtype = kDType<T>;
    p.ensemble_size = e;
    p.size = size;
    p.outputs = outputs.data();
    p.outputs_stride = size;
    p.mean = results[0].data();
    p.std = results[1].data();
    p.min = results[2].data();
    p.max = results[3].data();
    p.epistemic = results[4].data();
    if (with_variances) {
      p.variances = variances.data();
      p.variances_stride = size;
      p.aleatoric = results[5].data();
    }
    run_in_pieces(p, results == got ? 1 << 20 : 1);
  }
  const char* names[] = {"mean", "std", "min", "max", "epistemic", "aleatoric"};
  for (int j = 0; j < (with_variances ? 6 : 5); ++j) {
    if (j == 1 && e == 1) {
      for (const T x : got[j]) check(x != x, "std of one member", e, size, 1);
      continue;
    }
    check(close(got[j], expected[j], 10), names[j], e, size, 1);
    check(got[j] == in_pieces[j], "same bits for any split of the work", e, size, 1);
  }
}

}  // namespace

int main() {
  int tests = 0;
  for (const int64_t k : {1, 2, 3, 4, 5, 7, 8, 10, 17, 64, 127, 128, 130, 200}) {
    for (const int64_t b : {1, 3, 4, 7, 8, 9, 15, 16, 17, 33, 70}) {
      const int64_t e = 1 + tests * 7 % 40;
      test_uncertainty<float>(e, b, k, false, tests % 2 == 0);
      test_uncertainty<double>(e, b, k, false, tests % 2 == 1);
      ++tests;
    }
  }
  for (const int64_t b : {1, 3, 4, 7, 8, 9, 15, 16, 17, 300, 3000}) {
    for (const bool from_probabilities : {false, true}) {
      test_uncertainty<float>(1 + tests % 40, b, 2, true, from_probabilities);
      test_uncertainty<double>(1 + tests % 40, b, 2, true, from_probabilities);
    }
    for (const int64_t e : {1, 2, 15, 16, 17, 40}) {
      test_moments<float>(e, b, tests % 2 == 0);
      test_moments<double>(e, b, tests % 2 == 1);
      ++tests;
    }
  }
  if (failures == 0) std::printf("ok: %d problems\n", tests);
  return failures != 0;
}
