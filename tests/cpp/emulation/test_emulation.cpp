// That the emulation catches what it is there for: kernels with a planted fault, each beside the same
// kernel without it.

#include "emulation.h"

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/cuda/common.cuh"

namespace {

using emulation::Global;
using pyens::dynamic_shared;
using pyens::kWholeWarp;

int failures = 0;

void check(bool condition, const char* what) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s (fault: \"%s\")\n", what, emulation::fault().c_str());
}

// Runs under several orders; `expected` is how the fault of each begins, or nullptr.
template <class Launch>
void expect(const char* what, const char* expected, const Launch& launch) {
  for (const uint64_t seed : {1, 2, 3, 4, 5}) {
    emulation::set_seed(seed);
    const char* error = launch();
    const std::string& fault = emulation::fault();
    if (expected == nullptr) {
      check(error == nullptr && fault.empty(), what);
    } else {
      check(error != nullptr && fault.rfind(expected, 0) == 0, what);
    }
  }
}

constexpr int kThreads = 64;

// --- the planted faults ----------------------------------------------------------------------------

enum class Plant { none, barrier, write, read, uninitialised, race, diverged };

// out[i] = x[kThreads - 1 - i] + x[0], through shared memory.
template <Plant plant>
__global__ void reverse(const float* x, float* out) {
  float* shared = dynamic_shared<float>();
  const int i = static_cast<int>(threadIdx.x), last = kThreads - 1;
  const int block = static_cast<int>(blockIdx.x) * kThreads;
  shared[i] = x[block + i + (plant == Plant::read && i == last && blockIdx.x == gridDim.x - 1)];
  if (plant == Plant::diverged && i == 7) return;
  if (plant != Plant::barrier) __syncthreads();
  const float first = shared[plant == Plant::uninitialised ? kThreads : 0];
  out[block + i + (plant == Plant::write && i == last && blockIdx.x == gridDim.x - 1)] =
      shared[last - i] + first;
  // Written while others may still read it.
  if (plant == Plant::race) shared[i] = 0;
}

template <Plant plant>
const char* run_reverse(Global<float>& x, Global<float>& out) {
  const size_t bytes = (kThreads + 1) * sizeof(float);
  return pyens::launch(reverse<plant>, 3, kThreads, bytes, nullptr, x.data(), out.data());
}

void test_planted() {
  std::vector<float> values(3 * kThreads), expected(values.size());
  std::iota(values.begin(), values.end(), 1.0f);
  for (size_t i = 0; i < values.size(); ++i) {
    const size_t block = i / kThreads * kThreads;
    expected[i] = values[block + kThreads - 1 - i % kThreads] + values[block];
  }
  Global<float> x(values, "x"), out(values.size(), "out");
  expect("no fault", nullptr, [&] { return run_reverse<Plant::none>(x, out); });
  check(out.host() == expected, "the right result");
  // What is read is what nobody wrote yet, or what another thread wrote just now.
  for (const uint64_t seed : {1, 2, 3, 4, 5}) {
    emulation::set_seed(seed);
    run_reverse<Plant::barrier>(x, out);
    const std::string& fault = emulation::fault();
    check(fault.rfind("race: ", 0) == 0 || fault.rfind("uninitialised: ", 0) == 0,
          "a missing barrier");
  }
  expect("a write out of bounds",
         "out of bounds: thread 63 of block 2 writes 4 bytes at byte 768 of out",
         [&] { return run_reverse<Plant::write>(x, out); });
  expect("a read out of bounds",
         "out of bounds: thread 63 of block 2 reads 4 bytes at byte 768 of x",
         [&] { return run_reverse<Plant::read>(x, out); });
  expect("reading what nobody wrote",
         "uninitialised: ", [&] { return run_reverse<Plant::uninitialised>(x, out); });
  expect("a race", "race: ", [&] { return run_reverse<Plant::race>(x, out); });
  expect("a barrier that one thread does not reach",
         "barrier: ", [&] { return run_reverse<Plant::diverged>(x, out); });
}

// --- shared and global memory ----------------------------------------------------------------------

__global__ void past_the_end(float* out) {
  PYENS_SHARED(float[kThreads], values);
  float* const next = values + 1;
  next[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void both_kinds(int* out) {
  PYENS_SHARED(int, kept);
  dynamic_shared<int>()[threadIdx.x] = 1;
  if (threadIdx.x == 0) kept = 2;
  __syncthreads();
  out[threadIdx.x] = dynamic_shared<int>()[threadIdx.x] + kept;
}

__global__ void count(int* counter, bool atomically) {
  if (atomically) {
    atomicAdd(counter, 1);
  } else {
    *counter += 1;
  }
}

// Every block writes the same place: the last one wins.
__global__ void collide(int* out) {
  if (threadIdx.x == 0) *out = static_cast<int>(blockIdx.x);
}

__global__ void through_the_stack(int** shared_pointer, int* out) {
  int own = static_cast<int>(threadIdx.x);
  if (threadIdx.x == 0) *shared_pointer = &own;
  __syncthreads();
  out[threadIdx.x] = **shared_pointer + own;
}

enum class Copies { right, not_waited_for, read_too_soon, no_barrier };

template <Copies copies>
__global__ void copy(const float* x, float* out) {
  float* const shared = dynamic_shared<float>();
  const int i = static_cast<int>(threadIdx.x);
  pyens::copy_async(shared + i, x + i);
  if (copies == Copies::read_too_soon) out[i] = shared[i];
  if (copies != Copies::not_waited_for) pyens::wait_for_copies();
  if (copies != Copies::no_barrier) __syncthreads();
  if (copies != Copies::not_waited_for) out[i] = shared[kThreads - 1 - i];
}

void test_copies() {
  std::vector<float> values(kThreads), expected(kThreads);
  std::iota(values.begin(), values.end(), 1.0f);
  std::reverse_copy(values.begin(), values.end(), expected.begin());
  Global<float> x(values, "x"), out(kThreads, "out"), few(std::vector<float>(kThreads - 1), "few");
  const size_t bytes = kThreads * sizeof(float);
  const auto run = [&](auto* kernel, Global<float>& from) {
    return pyens::launch(kernel, 1, kThreads, bytes, nullptr, from.data(), out.data());
  };
  expect("copies", nullptr, [&] { return run(copy<Copies::right>, x); });
  check(out.host() == expected, "what was copied");
  expect("copies that nobody waits for",
         "copies: ", [&] { return run(copy<Copies::not_waited_for>, x); });
  expect("a copy that is read too soon",
         "uninitialised: ", [&] { return run(copy<Copies::read_too_soon>, x); });
  for (const uint64_t seed : {1, 2, 3, 4, 5}) {
    emulation::set_seed(seed);
    run(copy<Copies::no_barrier>, x);
    check(!emulation::fault().empty(), "copies without a barrier");
  }
  expect("a copy from out of bounds",
         "out of bounds: ", [&] { return run(copy<Copies::right>, few); });
}

void test_memory() {
  Global<float> floats(kThreads);
  expect("past the end of static shared memory",
         "out of bounds: thread 63 of block 0 writes 4 bytes",
         [&] { return pyens::launch(past_the_end, 1, kThreads, 0, nullptr, floats.data()); });
  Global<int> counter(std::vector<int>{0});
  expect("an atomic counter", nullptr,
         [&] { return pyens::launch(count, 3, kThreads, 0, nullptr, counter.data(), true); });
  check(counter.host()[0] == 5 * 3 * kThreads, "atomics count every thread");
  expect("a counter that is not atomic", "race: ", [&] {
    return pyens::launch(count, 1, kThreads, 0, nullptr, counter.data(), false);
  });
  expect("blocks that write one place",
         "race: ", [&] { return pyens::launch(collide, 3, kThreads, 0, nullptr, counter.data()); });
  Global<int*> pointer(1);
  Global<int> ints(kThreads);
  const auto run_both_kinds = [&](size_t bytes) {
    return pyens::launch(both_kinds, 1, kThreads, bytes, nullptr, ints.data());
  };
  expect("static beside dynamic shared memory", nullptr, [&] { return run_both_kinds(48 * 1024); });
  expect("static beside more dynamic shared memory than needs no asking",
         "launch: ", [&] { return run_both_kinds(48 * 1024 + 16); });
  expect("another thread's local variable", "out of bounds: ", [&] {
    return pyens::launch(through_the_stack, 1, kThreads, 0, nullptr, pointer.data(), ints.data());
  });
}

// --- warps -----------------------------------------------------------------------------------------

enum class Warp { right, no_syncwarp, shuffle_instead, half_of_it };

template <Warp warp>
__global__ void exchange(int* out) {
  PYENS_SHARED(int[kThreads], given);
  const int i = static_cast<int>(threadIdx.x), lane = i % 32;
  given[i] = i;
  if (warp == Warp::right || warp == Warp::half_of_it) __syncwarp();
  if (warp == Warp::shuffle_instead) __shfl_sync(kWholeWarp, i, 0);
  int sum = given[i ^ 1];  // within the warp: no barrier of the block is needed
  if (warp == Warp::half_of_it && lane < 16) return;
  sum += pyens::sum_lanes(lane, 8);
  sum += 1000 * __shfl_down_sync(kWholeWarp, lane, 3) + 100000 * __shfl_sync(kWholeWarp, i, 5);
  sum += __popc(__ballot_sync(kWholeWarp, lane % 3 == 0)) * 10000000;
  out[i] = sum;
}

template <Warp warp>
const char* run_exchange(Global<int>& out) {
  return pyens::launch(exchange<warp>, 1, kThreads, 0, nullptr, out.data());
}

void test_warps() {
  Global<int> out(kThreads);
  expect("shuffles and votes", nullptr, [&] { return run_exchange<Warp::right>(out); });
  const std::vector<int> got = out.host();
  for (int i = 0; i < kThreads; ++i) {
    const int lane = i % 32, group = lane / 8 * 8;
    const int sum_of_group = 8 * group + 28, down = lane + 3 < 32 ? lane + 3 : lane;
    const int expected =
        (i ^ 1) + sum_of_group + 1000 * down + 100000 * (i / 32 * 32 + 5) + 11 * 10000000;
    check(got[static_cast<size_t>(i)] == expected, "shuffles and votes give the right numbers");
  }
  expect("a shuffle that half of the warp makes",
         "barrier: ", [&] { return run_exchange<Warp::half_of_it>(out); });
  expect("a shuffle is no barrier for memory",
         "race: ", [&] { return run_exchange<Warp::shuffle_instead>(out); });
  for (const uint64_t seed : {1, 2, 3, 4, 5}) {
    emulation::set_seed(seed);
    run_exchange<Warp::no_syncwarp>(out);
    check(!emulation::fault().empty(), "a missing __syncwarp");
  }
}

// --- tensor cores ----------------------------------------------------------------------------------

// C = A B + C for one warp, the operands row by row in memory.
template <class T, bool rounded>
__global__ void multiply(const float* a, const float* b, float* c) {
  constexpr int kElements = pyens::kWordElements<T>, kDepth = 8 * kElements;
  constexpr const T* kType = nullptr;
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const auto word = [&](const float* row, int column, int stride) {
    float x[kElements];
    for (int e = 0; e < kElements; ++e) x[e] = row[(column * kElements + e) * stride];
    if (rounded) return pyens::to_word(x, kType);
    uint32_t bits;
    memcpy(&bits, x, 4);
    return bits;
  };
  const uint32_t of_a[4] = {word(a + g * kDepth, t, 1), word(a + (g + 8) * kDepth, t, 1),
                            word(a + g * kDepth, t + 4, 1), word(a + (g + 8) * kDepth, t + 4, 1)};
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  pyens::multiply_tiles(sums, of_a, word(b + g, t, 8), word(b + g, t + 4, 8), kType);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

template <class T>
void test_tiles() {
  constexpr int kDepth = 8 * pyens::kWordElements<T>;
  std::vector<float> a(16 * kDepth), b(kDepth * 8), c(16 * 8);
  // Whole numbers that every type holds; no two entries that a wrong lane could exchange unseen.
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i * 37 % 101) - 50;
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i * 29 % 97) - 48;
  for (size_t i = 0; i < c.size(); ++i) c[i] = static_cast<float>(i);
  std::vector<float> expected = c;
  for (size_t row = 0; row < 16; ++row) {
    for (size_t column = 0; column < 8; ++column) {
      for (size_t k = 0; k < kDepth; ++k) {
        expected[row * 8 + column] += a[row * kDepth + k] * b[k * 8 + column];
      }
    }
  }
  for (const uint64_t seed : {1, 2, 3}) {
    emulation::set_seed(seed);
    Global<float> of_a(a), of_b(b), sums(c);
    pyens::launch(multiply<T, true>, 1, 32, 0, nullptr, of_a.data(), of_b.data(), sums.data());
    check(emulation::fault().empty() && sums.host() == expected, "a product of tensor cores");
  }
}

void test_numbers_for_tensor_cores() {
  test_tiles<float>();
  test_tiles<__half>();
  test_tiles<__nv_bfloat16>();
  Global<float> a(std::vector<float>(16 * 8, 1 / 3.0f)), b(std::vector<float>(8 * 8, 1.0f)),
      c(std::vector<float>(16 * 8, 0.0f));
  expect("a number that was not rounded to TF32", "tensor cores: ", [&] {
    return pyens::launch(multiply<float, false>, 1, 32, 0, nullptr, a.data(), b.data(), c.data());
  });
  const auto rounded = [](float x) {
    const uint32_t bits = emulation::round_to_tf32(x);
    float back;
    std::memcpy(&back, &bits, sizeof back);
    return back;
  };
  check(rounded(1 + 0x1p-11f) == 1 + 0x1p-10f && rounded(-1 - 0x1p-12f) == -1 &&
            std::isnan(rounded(NAN)) && std::isinf(rounded(INFINITY)),
        "rounding to TF32");
}

// --- launches --------------------------------------------------------------------------------------

template <class T, class Bits>
void test_rounding(float (*widen)(Bits), Bits (*round)(float), int bits_of_mantissa) {
  for (const float x : {0.0f, -1.0f, 3.140625f, 65504.0f, 0x1p-14f, -0x1p-15f}) {
    const float got = widen(round(x));
    check(got == x || std::abs(got - x) <= std::abs(x) * std::ldexp(0.5f, -bits_of_mantissa),
          "rounding");
  }
  check(std::isnan(widen(round(NAN))), "rounding keeps NaN");
}

}  // namespace

int main() {
  test_planted();
  test_memory();
  test_copies();
  test_warps();
  test_numbers_for_tensor_cores();
  test_rounding<__half>(emulation::widen_half, emulation::round_to_half, 10);
  test_rounding<__nv_bfloat16>(emulation::widen_bfloat16, emulation::round_to_bfloat16, 7);
  Global<float> x(3 * kThreads), out(3 * kThreads);
  const auto too_much = static_cast<size_t>(emulation::device.shared_limit) + 1;
  check(pyens::launch(reverse<Plant::none>, 3, kThreads, too_much, nullptr, x.data(), out.data()),
        "too much shared memory is refused");
  if (failures == 0) std::printf("ok\n");
  return failures != 0;
}
