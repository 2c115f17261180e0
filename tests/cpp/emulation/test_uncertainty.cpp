// The CUDA kernels of predictive uncertainty and moments, run on the host, against the CPU's.

#include "kernels/cuda/uncertainty.cu"

#include "emulated_test.h"

namespace {

using namespace emulated_test;
namespace cpu = pyens::uncertainty_cpu;
namespace gpu = pyens::uncertainty_cuda;

// All results behind each other, with the votes as numbers.
template <class T>
struct Results {
  std::vector<T> mean, total, expected, information, pv, disagreement;
  std::vector<int32_t> votes;
};

template <class T>
pyens::UncertaintyParams params_of(int64_t e, int64_t b, int64_t k, bool binary,
                                   bool probabilities) {
  pyens::UncertaintyParams p{};
  p.dtype = dtype_of<T>();
  p.from_probabilities = probabilities;
  p.binary = binary;
  p.ensemble_size = e;
  p.batch = b;
  p.classes = k;
  p.row_stride = binary ? 1 : k + 1;  // rows lie further apart than they are long
  p.member_stride = b * p.row_stride;
  p.sum_tolerance = sizeof(T) == 2 ? 0.01 : 1e-4;
  return p;
}

template <class T>
Results<T> run_cpu(pyens::UncertaintyParams p, const void* members) {
  const auto n = static_cast<size_t>(p.batch), k = static_cast<size_t>(p.classes);
  Results<T> r = {std::vector<T>(p.binary ? n : n * k),
                  std::vector<T>(n),
                  std::vector<T>(n),
                  std::vector<T>(n),
                  std::vector<T>(n),
                  std::vector<T>(n),
                  std::vector<int32_t>(n * k)};
  p.members = members;
  p.mean_probability = r.mean.data();
  p.predictive_entropy = r.total.data();
  p.expected_entropy = r.expected.data();
  p.mutual_information = r.information.data();
  p.distribution_pv = r.pv.data();
  p.vote_disagreement = r.disagreement.data();
  p.votes = r.votes.data();
  const int64_t items = cpu::work_items(p);
  std::vector<int64_t> bad(static_cast<size_t>(items));
  p.bad_rows = bad.data();
  const Scratch scratch(cpu::scratch_bytes(p));
  cpu::run(p, 0, items, scratch.get());
  return r;
}

template <class T>
Results<T> run_gpu(const std::string& what, pyens::UncertaintyParams p, const void* members) {
  const auto n = static_cast<size_t>(p.batch), k = static_cast<size_t>(p.classes);
  Global<T> mean(p.binary ? n : n * k, "mean"), total(n), expected(n), information(n), pv(n),
      disagreement(n);
  Global<int32_t> votes(n * k, "votes");
  Global<char> scratch(gpu::scratch_bytes(p), "scratch");
  p.members = members;
  p.mean_probability = mean.data();
  p.predictive_entropy = total.data();
  p.expected_entropy = expected.data();
  p.mutual_information = information.data();
  p.distribution_pv = pv.data();
  p.vote_disagreement = disagreement.data();
  p.votes = votes.data();
  const char* error = gpu::run(p, scratch.data(), nullptr);
  check(error == nullptr, what + ": " + (error ? error : ""));
  return {mean.host(), total.host(),        expected.host(), information.host(),
          pv.host(),   disagreement.host(), votes.host()};
}

template <class T>
bool same(const Results<T>& a, const Results<T>& b) {
  return same_bits(a.mean, b.mean) && same_bits(a.total, b.total) &&
         same_bits(a.expected, b.expected) && same_bits(a.information, b.information) &&
         same_bits(a.pv, b.pv) && same_bits(a.disagreement, b.disagreement) && a.votes == b.votes;
}

template <class T>
void compare(const std::string& what, const pyens::UncertaintyParams& p, const Values<T>& members,
             bool count_votes = true) {
  ++problems;
  const Results<T> expected = run_cpu<T>(p, members.cpu.data());
  Results<T> got;
  for (const uint64_t seed : {1, 2, 3}) {
    emulation::set_seed(seed);
    const Results<T> again = run_gpu<T>(what, p, members.gpu.data());
    if (seed == 1) got = again;
    check(same(got, again), what + ": other bits in another order");
  }
  check_close(what + ", mean", got.mean, expected.mean);
  check_close(what + ", predictive entropy", got.total, expected.total);
  check_close(what + ", expected entropy", got.expected, expected.expected);
  check_close(what + ", disagreement", got.disagreement, expected.disagreement);
  if (count_votes) check(got.votes == expected.votes, what + ", votes");
  // Differences: measured against what they are differences of.
  const double tolerance = tolerance_of<T>(kTight);
  for (size_t b = 0; b < got.total.size(); ++b) {
    const double entropy = to_double(expected.total[b]);
    const double size = std::isnan(entropy) ? 1 : entropy + 1,
                 e = static_cast<double>(p.ensemble_size);
    const auto near = [&](T x, T y, double scale) {
      const double a = to_double(x), c = to_double(y);
      return std::isnan(a) ? std::isnan(c) : std::abs(a - c) <= tolerance * scale;
    };
    check(near(got.information[b], expected.information[b], size), what + ", mutual information");
    check(near(got.pv[b], expected.pv[b], size * e), what + ", prediction variation");
  }
}

// As rows of `k`, k + 1 apart, that are distributions.
template <class T>
std::vector<T> probabilities(Random& random, int64_t rows, int64_t k, int64_t stride) {
  std::vector<T> values(static_cast<size_t>(rows * stride), from_double<T>(7));
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<double> row;
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      row.push_back(i % 5 == 3 ? 0 : std::exp(static_cast<double>(random() % 100) / 25));
      sum += row.back();
    }
    for (int64_t i = 0; i < k; ++i) {
      values[static_cast<size_t>(r * stride + i)] =
          from_double<T>(row[static_cast<size_t>(i)] / sum);
    }
  }
  return values;
}

template <class T>
void test(int64_t e, int64_t b, int64_t k) {
  Random random(static_cast<uint64_t>(e * 100 + b * 10 + k));
  const std::string shape =
      " of " + std::to_string(e) + ", " + std::to_string(b) + ", " + std::to_string(k);
  const auto p = params_of<T>(e, b, k, false, false);
  const Values<T> logits(random, e * p.member_stride, 3);
  compare("logits" + shape, p, logits);
  const auto q = params_of<T>(e, b, k, false, true);
  const Values<T> rows(probabilities<T>(random, e * b, k, q.row_stride));
  compare("probabilities" + shape, q, rows);
  if (k != 2) return;
  const auto binary = params_of<T>(e, b, 2, true, false);
  std::vector<T> values = normal<T>(random, e * b, 3);
  values[0] = from_double<T>(INFINITY);  // certain of class 1
  compare("binary logits" + shape, binary, Values<T>(values));
  for (T& value : values) value = from_double<T>(static_cast<double>(random() % 101) / 100);
  compare("binary probabilities" + shape, params_of<T>(e, b, 2, true, true), Values<T>(values));
}

// Infinite, equal and NaN logits; rows that are no distribution.
void test_special() {
  Random random(1);
  const auto p = params_of<float>(3, 6, 5, false, false);
  std::vector<float> values = normal<float>(random, 3 * p.member_stride, 2);
  float* row = values.data();
  std::fill(row, row + 5, 1.0f);      // all equal: the first gets the vote
  row[p.row_stride + 2] = -INFINITY;  // probability 0
  std::fill(row + 2 * p.row_stride, row + 2 * p.row_stride + 5, -INFINITY);  // NaN
  row[3 * p.row_stride + 1] = NAN;
  row[4 * p.row_stride + 4] = 1e30f;
  row[4 * p.row_stride + 3] = -3e38f;    // their difference overflows a float
  row[5 * p.row_stride + 1] = INFINITY;  // NaN as softmax has it
  compare("special logits", p, Values<float>(values), /*count_votes=*/false);

  const auto q = params_of<float>(3, 6, 5, false, true);
  values = probabilities<float>(random, 18, 5, q.row_stride);
  const Results<float> right = run_gpu<float>("probabilities", q, Values<float>(values).gpu.data());
  values[static_cast<size_t>(q.row_stride)] = 0.9f;  // of member 0, example 1: too large a sum
  values[static_cast<size_t>(q.member_stride + 3 * q.row_stride)] -= 1.5f;  // and a negative one
  values[static_cast<size_t>(q.member_stride + 3 * q.row_stride + 1)] += 1.5f;
  const Results<float> got =
      run_gpu<float>("wrong probabilities", q, Values<float>(values).gpu.data());
  for (size_t b = 0; b < 6; ++b) {
    const bool wrong = b == 1 || b == 3;
    for (const auto& [x, y] : {std::pair(got.total[b], right.total[b]),
                               {got.expected[b], right.expected[b]},
                               {got.information[b], right.information[b]},
                               {got.pv[b], right.pv[b]},
                               {got.disagreement[b], right.disagreement[b]},
                               {got.mean[b * 5 + 2], right.mean[b * 5 + 2]}}) {
      check(wrong ? std::isnan(x) : x == y, "an example is NaN where a row is no distribution");
    }
  }
}

// Members nearly sure of class 1 by `gap` nats, or nearly equal: information is as right as the CPU's,
// relative to itself; members that are equal have none.
template <class T>
void test_small_disagreement(double gap, double spread) {
  ++problems;
  Random random(7);
  const int64_t e = 5, b = 9, k = 4;
  const auto p = params_of<T>(e, b, k, false, false);
  const std::vector<T> centre = normal<T>(random, p.member_stride, 1);
  std::vector<T> values = normal<T>(random, e * p.member_stride, spread);
  for (size_t i = 0; i < values.size(); ++i) {
    const size_t in_member = i % static_cast<size_t>(p.member_stride);
    const bool sure = in_member % static_cast<size_t>(p.row_stride) == 1;
    values[i] =
        from_double<T>(to_double(values[i]) + to_double(centre[in_member]) + (sure ? gap : 0));
  }
  const Values<T> members(values);
  const Results<T> expected = run_cpu<T>(p, members.cpu.data());
  const Results<T> got = run_gpu<T>("small disagreement", p, members.gpu.data());
  for (size_t i = 0; i < static_cast<size_t>(b); ++i) {
    const double right = to_double(expected.information[i]);
    check(right > 0, "members that differ disagree");
    check(std::abs(to_double(got.information[i]) - right) <= 1e-5 * right, "small information");
    check(std::abs(to_double(got.pv[i]) - 5 * right) <= 5e-5 * right, "small prediction variation");
  }
  for (int64_t m = 1; m < e; ++m) {
    std::copy_n(values.begin(), p.member_stride, values.begin() + m * p.member_stride);
  }
  const Results<T> equal = run_gpu<T>("equal members", p, Values<T>(values).gpu.data());
  for (const T& information : equal.information) {
    check(to_double(information) == 0, "equal members agree");
  }
}

template <class T>
void test_moments(int64_t e, int64_t size, bool with_variances) {
  ++problems;
  Random random(static_cast<uint64_t>(e * 100 + size));
  std::vector<T> values = normal<T>(random, e * (size + 3), 1, 5);
  if (size > 4) {
    for (int64_t m = 0; m < e; ++m)
      values[static_cast<size_t>(m * (size + 3))] = from_double<T>(0.3);
    values[static_cast<size_t>((e - 1) * (size + 3) + 1)] = from_double<T>(NAN);
    values[2] = from_double<T>(INFINITY);
    values[static_cast<size_t>((e - 1) * (size + 3) + 3)] = from_double<T>(-INFINITY);
    // A square that leaves the range of T: a number near the largest of T beside ordinary ones, both signs.
    const double largest = sizeof(T) == 8                      ? 1e308
                           : std::is_same_v<T, pyens::Float16> ? 40000
                                                               : 2e38;
    values[4] = from_double<T>(largest);
    if (e > 1) values[static_cast<size_t>(size + 3 + 4)] = from_double<T>(-largest);
  }
  if (size > 100) {  // and squares that vanish
    for (int64_t m = 0; m < e; ++m) {
      const double smallest = sizeof(T) == 8                      ? 1e-200
                              : std::is_same_v<T, pyens::Float16> ? 1e-6
                                                                  : 1e-30;
      values[static_cast<size_t>(m * (size + 3) + 5)] =
          from_double<T>(smallest * static_cast<double>(m * m + 1));
    }
  }
  const Values<T> outputs(values), variances(random, e * size, 0.1, 2);
  pyens::MomentsParams p{};
  p.dtype = dtype_of<T>();
  p.ensemble_size = e;
  p.size = size;
  p.outputs = outputs.cpu.data();
  p.outputs_stride = size + 3;
  p.variances = with_variances ? variances.cpu.data() : nullptr;
  p.variances_stride = size;
  const auto n = static_cast<size_t>(size);
  std::vector<std::vector<T>> expected(6, std::vector<T>(n));
  const auto set = [&](auto& p_, auto& out) {
    p_.mean = out[0].data();
    p_.std = out[1].data();
    p_.min = out[2].data();
    p_.max = out[3].data();
    p_.epistemic = out[4].data();
    p_.aleatoric = with_variances ? out[5].data() : nullptr;
  };
  set(p, expected);
  const Scratch scratch(cpu::scratch_bytes(p));
  cpu::run(p, 0, cpu::work_items(p), scratch.get());
  std::vector<std::vector<T>> first;
  for (const uint64_t seed : {1, 2}) {
    emulation::set_seed(seed);
    p.outputs = outputs.gpu.data();
    p.variances = with_variances ? variances.gpu.data() : nullptr;
    Global<T> out[6] = {Global<T>(n), Global<T>(n), Global<T>(n),
                        Global<T>(n), Global<T>(n), Global<T>(n)};
    set(p, out);
    const char* error = gpu::run(p, nullptr);
    check(error == nullptr, std::string("moments: ") + (error ? error : ""));
    for (size_t i = 0; i < (with_variances ? 6 : 5); ++i) {
      if (seed == 1) first.push_back(out[i].host());
      check(same_bits(first[i], out[i].host()), "moments: other bits in another order");
    }
  }
  const char* names[] = {"mean", "std", "min", "max", "epistemic", "aleatoric"};
  for (size_t i = 0; i < first.size(); ++i) {
    check_close(std::string("moments, ") + names[i], first[i], expected[i]);
  }
  if (e > 1 && size > 4) check(to_double(first[1][0]) == 0, "equal members have no spread");
  if (e > 1 && size > 4) check(std::isfinite(to_double(first[1][4])), "a large spread is finite");
  if (e > 1 && size > 100) check(to_double(first[1][5]) > 0, "a small spread is one");
}

template <class T>
void test_all() {
  test<T>(1, 1, 1);
  test<T>(3, 9, 2);
  test<T>(5, 17, 10);
  test<T>(33, 3, 7);
  test<T>(2, 5, 32);
  test<T>(2, 3, 70);
  for (const int64_t e : {1, 2, 16, 35}) {
    test_moments<T>(e, 5, true);
    test_moments<T>(e, 129, false);
  }
  test_moments<T>(3, 0, true);
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  test_all<pyens::BFloat16>();
  test_all<pyens::Float16>();
  test_special();
  for (const double gap : {0.0, 12.0, 18.0}) {
    test_small_disagreement<float>(gap, 1);
    test_small_disagreement<double>(gap, 1);
  }
  test_small_disagreement<float>(0, 1e-3);
  test_small_disagreement<double>(0, 1e-3);
  // Where shared memory is too small: one warp to a block, then what is kept in global memory.
  emulation::device.shared_limit = 2000;
  test<float>(2, 5, 70);
  emulation::device.shared_limit = 400;
  test<float>(3, 9, 33);
  test<double>(2, 7, 70);
  return finish();
}
