#include "emulation.h"

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>

#include "kernels/cpu/isa.h"
#include "kernels/types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#define PYENS_ISA base
#define PYENS_ISA_FEATURES 0
#include "kernels/cpu/simd-inl.h"
#undef PYENS_ISA
#undef PYENS_ISA_FEATURES

// Where the program's own constants lie.
extern "C" char __executable_start, _end;

namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kWarp = 32;
constexpr uint32_t kNobody = ~uint32_t{0};

// --- memory --------------------------------------------------------------------------------------

// Who did it, and after how many barriers of its block and its warp.
struct Access {
  uint32_t thread = kNobody, block_epoch = 0, warp_epoch = 0;
  bool atomic = false;
};

// Of one byte since the launch began: its last write and two later reads, by two threads if there
// were two. A read that is pushed out is seen under another seed.
struct Cell {
  Access write, read[2];
};

struct Memory {
  std::string name;
  uintptr_t begin = 0;
  size_t bytes = 0;
  std::vector<bool> initialised;
  std::vector<Cell> cells;

  Memory(const char* of, void* at, size_t n, bool filled)
      : name(of), begin(reinterpret_cast<uintptr_t>(at)), bytes(n), initialised(n, filled) {}
};

// --- threads -------------------------------------------------------------------------------------

enum class Wait { nothing, block, warp, exchange, returned };

// A place to come back to. The compiler's own jumps between stacks: swapcontext would ask the kernel
// for the signal mask each time, and the address sanitizer would clear its notes of the whole stack.
using Place = void* [5];

struct Fiber {
  std::unique_ptr<char[]> stack;  // none yet: it has to be started
  Place place;
  Wait wait = Wait::nothing;
  int line = 0;
  TileWords given = {}, received[kWarp] = {};  // by an exchange
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };
  std::vector<Copy> copies;  // begun
};

struct State {
  std::mt19937_64 random;
  std::map<uintptr_t, Memory> memories;  // by address: global, and shared of the block that runs
  std::map<const void*, std::unique_ptr<char[]>> shared;  // of this block, by whose it is
  std::vector<Fiber> fibers;
  std::vector<uint32_t> warp_epochs;
  uint32_t block_epoch = 0, block_number = 0;
  uint32_t current = 0;  // thread within its block
  Place scheduler;
  void (*call)(const void*) = nullptr;
  const void* arguments = nullptr;
  size_t argument_bytes = 0, dynamic_bytes = 0;
  std::string fault;
  bool watching = false;  // whether it is the kernel's code that runs
  bool atomic = false;
};
State state;

Fiber& current() { return state.fibers[state.current]; }

std::string text(const char* format, unsigned long long a, unsigned long long b = 0,
                 unsigned long long c = 0) {
  char buffer[160];
  std::snprintf(buffer, sizeof buffer, format, a, b, c);
  return buffer;
}

std::string name_of(uint32_t thread) {
  const auto threads = static_cast<uint32_t>(state.fibers.size());
  return text("thread %llu of block %llu", thread % threads, thread / threads);
}

uint32_t number_of_current() {
  return state.block_number * static_cast<uint32_t>(state.fibers.size()) + state.current;
}

// Held while the kernel's code has called in here: what is done here is not watched.
struct Paused {
  Paused() { state.watching = false; }
  ~Paused() { state.watching = true; }
};

__attribute__((noinline)) void switch_to_scheduler() {
  if (__builtin_setjmp(current().place) == 0) __builtin_longjmp(state.scheduler, 1);
}

void wait_for(Wait what, int line) {
  current().wait = what;
  current().line = line;
  switch_to_scheduler();
}

// --- checks --------------------------------------------------------------------------------------

bool is_ordered_before_current(const Access& earlier) {
  const uint32_t me = number_of_current();
  if (earlier.thread == kNobody || earlier.thread == me) return true;
  const auto threads = static_cast<uint32_t>(state.fibers.size());
  if (earlier.thread / threads != state.block_number) return false;
  if (earlier.block_epoch != state.block_epoch) return true;
  const uint32_t warp = state.current / kWarp;
  return earlier.thread % threads / kWarp == warp && earlier.warp_epoch != state.warp_epochs[warp];
}

[[noreturn]] void fail_access(const char* what, bool write, uintptr_t at, size_t bytes,
                              const std::string& where) {
  fail(std::string(what) + ": " + name_of(number_of_current()) +
       text(write ? " writes %llu bytes at byte %lld of " : " reads %llu bytes at byte %lld of ",
            bytes, at) +
       where);
}

void check_access(uintptr_t at, size_t bytes, bool write) {
  const auto within = [&](uintptr_t begin, size_t size) {
    return at >= begin && at + bytes <= begin + size;
  };
  if (within(reinterpret_cast<uintptr_t>(current().stack.get()), kStackBytes)) return;
  if (!write) {
    const auto program = reinterpret_cast<uintptr_t>(&__executable_start);
    if (within(program, reinterpret_cast<uintptr_t>(&_end) - program)) return;
    if (within(reinterpret_cast<uintptr_t>(state.arguments), state.argument_bytes)) return;
  }
  // The memory that begins last at or before it, so the fault names what was run over.
  auto found = state.memories.upper_bound(at);
  if (found == state.memories.begin()) fail_access("out of bounds", write, at, bytes, "no memory");
  Memory& memory = std::prev(found)->second;
  if (!within(memory.begin, memory.bytes)) {
    fail_access("out of bounds", write, at - memory.begin, bytes,
                memory.name + text(" of %llu bytes", memory.bytes));
  }
  if (memory.cells.empty()) memory.cells.resize(memory.bytes);
  const Access access = {number_of_current(), state.block_epoch,
                         state.warp_epochs[state.current / kWarp], state.atomic};
  for (size_t i = at - memory.begin; i < at - memory.begin + bytes; ++i) {
    if (!write && !memory.initialised[i])
      fail_access("uninitialised", write, i, bytes, memory.name);
    Cell& cell = memory.cells[i];
    const auto check_order = [&](const Access& earlier, const char* did) {
      if (is_ordered_before_current(earlier) || (earlier.atomic && access.atomic)) return;
      fail_access(
          "race", write, i, bytes,
          memory.name + ", which " + name_of(earlier.thread) + did + " with no barrier between");
    };
    check_order(cell.write, " wrote");
    if (write) {
      check_order(cell.read[0], " read");
      check_order(cell.read[1], " read");
      cell = Cell{};
      cell.write = access;
      memory.initialised[i] = true;
    } else {
      if (cell.read[0].thread != access.thread) cell.read[1] = cell.read[0];
      cell.read[0] = access;
    }
  }
}

void add_memory(const char* name, void* begin, size_t bytes, bool initialised) {
  state.memories.insert_or_assign(reinterpret_cast<uintptr_t>(begin),
                                  Memory(name, begin, bytes, initialised));
}

void* add_shared(const void* key, const char* name, size_t bytes) {
  constexpr size_t kAlignment = 256;
  auto& memory = state.shared[key];
  const bool is_new = !memory;
  if (is_new) memory.reset(new char[bytes + kAlignment]);
  char* begin = memory.get() + kAlignment - reinterpret_cast<uintptr_t>(memory.get()) % kAlignment;
  if (is_new) {
    std::memset(begin, 0xff, bytes);  // NaN
    add_memory(name, begin, bytes, false);
  }
  return begin;
}

void set_fault(const std::string& what) {
  if (state.fault.empty()) state.fault = what;
}

// --- scheduling ----------------------------------------------------------------------------------

// A fiber lives from launch to launch, a thread of one block after another.
void run_threads() {
  for (;;) {
    state.watching = true;
    state.call(state.arguments);
    state.watching = false;
    if (!current().copies.empty()) set_fault("copies: a thread ends that has not waited for them");
    current().wait = Wait::returned;
    switch_to_scheduler();
  }
}

__attribute__((noinline)) void switch_to(Fiber& fiber) {
  if (__builtin_setjmp(state.scheduler) != 0) return;
  if (fiber.stack) __builtin_longjmp(fiber.place, 1);
  fiber.stack.reset(new char[kStackBytes]);
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack.get();
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, run_threads, 0);
  setcontext(&start);
}

// Releases [begin, end) if all of them wait for the same; whether it did.
bool release(unsigned begin, unsigned end, Wait wait) {
  const auto first = state.fibers.begin() + begin, last = state.fibers.begin() + end;
  if (!std::all_of(first, last, [&](const Fiber& f) { return f.wait == wait; })) return false;
  if (!std::all_of(first, last, [&](const Fiber& f) { return f.line == first->line; })) {
    set_fault(text("barrier: threads of one block or warp wait at different lines, one at %llu",
                   static_cast<unsigned>(first->line)));
    return false;
  }
  for (auto to = first; to != last; ++to) {
    to->wait = Wait::nothing;
    if (wait == Wait::exchange) {
      for (auto from = first; from != last; ++from) to->received[from - first] = from->given;
    }
  }
  // Shuffles and votes wait for the warp, but say nothing about what memory it sees.
  if (wait == Wait::warp) ++state.warp_epochs[begin / kWarp];
  if (wait == Wait::block) ++state.block_epoch;
  return true;
}

void run_block(Dim3 block) {
  const auto threads = static_cast<unsigned>(state.fibers.size());
  state.block_epoch = 0;
  state.warp_epochs.assign(threads / kWarp, 0);
  std::vector<unsigned> ready(threads);
  std::iota(ready.begin(), ready.end(), 0u);
  for (Fiber& fiber : state.fibers) fiber.wait = Wait::nothing;
  while (!ready.empty()) {
    std::swap(ready[state.random() % ready.size()], ready.back());
    const unsigned t = ready.back();
    state.current = t;
    thread_index = Dim3(t % block.x, t / block.x % block.y, t / block.x / block.y);
    switch_to(state.fibers[t]);
    if (!state.fault.empty()) return;
    const Wait wait = state.fibers[t].wait;
    if (wait == Wait::nothing) continue;
    ready.pop_back();
    if (wait == Wait::returned) continue;
    const unsigned begin = wait == Wait::block ? 0 : t / kWarp * kWarp;
    const unsigned end = wait == Wait::block ? threads : begin + kWarp;
    if (release(begin, end, wait)) {
      for (unsigned i = begin; i < end; ++i) ready.push_back(i);
    }
    if (!state.fault.empty()) return;
  }
  for (const Fiber& fiber : state.fibers) {
    if (fiber.wait == Wait::returned) continue;
    set_fault(text("barrier: some threads wait at line %llu where others never come",
                   static_cast<unsigned>(fiber.line)));
  }
}

void remove_shared() {
  for (const auto& [key, memory] : state.shared) {
    auto found = state.memories.upper_bound(reinterpret_cast<uintptr_t>(memory.get()));
    state.memories.erase(found);
  }
  state.shared.clear();
}

}  // namespace

// --- numbers -------------------------------------------------------------------------------------

float widen_half(uint16_t bits) { return pyens::base::to_float(pyens::Float16{bits}); }
float widen_bfloat16(uint16_t bits) { return pyens::base::to_float(pyens::BFloat16{bits}); }
uint16_t round_to_half(float x) {
  pyens::Float16 rounded;
  pyens::base::store_first<float>(&rounded, pyens::base::Narrow<float>{} + x, 1);
  return rounded.bits;
}
uint16_t round_to_bfloat16(float x) {
  pyens::BFloat16 rounded;
  pyens::base::store_first<float>(&rounded, pyens::base::Narrow<float>{} + x, 1);
  return rounded.bits;
}

uint32_t round_to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (!std::isfinite(x)) return std::isnan(x) ? 0x7fc00000u : bits;
  return (bits + 0x1000) & ~uint32_t{0x1fff};
}

// --- for tests and stand-ins ---------------------------------------------------------------------

void set_seed(uint64_t seed) { state.random.seed(seed); }
const std::string& fault() { return state.fault; }

void add_global(void* begin, size_t bytes, const char* name, bool initialised) {
  add_memory(name, begin, bytes, initialised);
}
void remove_global(void* begin) { state.memories.erase(reinterpret_cast<uintptr_t>(begin)); }

const char* run(Dim3 grid, Dim3 block, size_t shared_bytes, void (*call)(const void*),
                const void* arguments, size_t argument_bytes) {
  const unsigned threads = block.x * block.y * block.z;
  state.fault.clear();
  if (threads == 0 || threads > 1024) return "emulation: not 1 to 1024 threads in a block";
  if (threads % kWarp != 0) return "emulation: only whole warps";
  if (shared_bytes > static_cast<size_t>(device.shared_limit)) return "too much shared memory";
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (blocks == 0 || grid.y > 65535 || grid.z > 65535) return "invalid configuration argument";
  state.call = call;
  state.arguments = arguments;
  state.argument_bytes = argument_bytes;
  state.dynamic_bytes = shared_bytes;
  for (auto& [address, memory] : state.memories) memory.cells.clear();
  state.fibers.resize(threads);
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), state.random);
  block_size = block;
  grid_size = grid;
  for (const uint32_t number : order) {
    state.block_number = number;
    block_index = Dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
    add_shared(nullptr, "dynamic shared memory", shared_bytes);
    run_block(block);
    remove_shared();
    if (!state.fault.empty()) {
      state.fibers.clear();  // they stopped in the middle
      return state.fault.c_str();
    }
  }
  return nullptr;
}

void* dynamic_shared() { return shared_of(nullptr, 0); }

void* shared_of(const void* key, size_t bytes) {
  const Paused paused;
  // `launch` asks for all there is as dynamic then.
  if (key && state.dynamic_bytes > 48 * 1024) {
    set_fault("launch: static shared memory beside more than 48 KB of dynamic");
  }
  return add_shared(key, "static shared memory", bytes);
}

void block_barrier(int line) {
  const Paused paused;
  wait_for(Wait::block, line);
}

void warp_barrier(int line) {
  const Paused paused;
  wait_for(Wait::warp, line);
}

namespace {

// Those of all lanes, until this one's next exchange.
const TileWords* exchange_words(const TileWords& words, int line) {
  const Paused paused;
  current().given = words;
  wait_for(Wait::exchange, line);
  return current().received;
}

float element(TileElements elements, uint32_t word, int i) {
  const auto half = static_cast<uint16_t>(word >> 16 * i);
  if (elements == TileElements::float16) return widen_half(half);
  if (elements == TileElements::bfloat16) return widen_bfloat16(half);
  if (word & 0x1fff) fail("tensor cores: a number that was not rounded to TF32");
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

}  // namespace

void multiply_tiles(TileElements elements, float* c, const TileWords& words, int line) {
  const TileWords* const lanes = exchange_words(words, line);
  const unsigned g = lane() / 4, t = lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {  // rows g and g + 8, columns 2 t and 2 t + 1
    for (unsigned k = 0; k < 8; ++k) {
      const uint32_t a = lanes[4 * g + k % 4].a[i / 2 + k / 4 * 2];
      const uint32_t b = lanes[4 * (2 * t + i % 2) + k % 4].b[k / 4];
      for (int e = 0; e < (elements == TileElements::tf32 ? 1 : 2); ++e) {
        c[i] += element(elements, a, e) * element(elements, b, e);
      }
    }
  }
}

uint64_t exchange(uint64_t bits, unsigned from, int line) {
  TileWords words = {};
  words.a[0] = static_cast<uint32_t>(bits);
  words.a[1] = static_cast<uint32_t>(bits >> 32);
  words = exchange_words(words, line)[from];
  return words.a[0] | uint64_t{words.a[1]} << 32;
}

unsigned ballot(bool vote, int line) {
  TileWords words = {};
  words.a[0] = vote;
  const TileWords* const all = exchange_words(words, line);
  unsigned votes = 0;
  for (unsigned i = 0; i < kWarp; ++i) votes |= all[i].a[0] << i;
  return votes;
}

void copy_async(void* to, const void* from, size_t bytes) {
  const Paused paused;
  current().copies.push_back({to, from, bytes});
}

void wait_for_copies() {
  const Paused paused;
  for (const Fiber::Copy& copy : current().copies) {
    check_access(reinterpret_cast<uintptr_t>(copy.from), copy.bytes, false);
    check_access(reinterpret_cast<uintptr_t>(copy.to), copy.bytes, true);
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  current().copies.clear();
}

unsigned lane() { return state.current % kWarp; }

void fail(const std::string& what) {
  const Paused paused;
  set_fault(what);
  switch_to_scheduler();  // and never back
  std::abort();
}

Atomic::Atomic() { state.atomic = true; }
Atomic::~Atomic() {
  const Paused paused;
  state.atomic = false;
  switch_to_scheduler();
}

namespace {

void on_access(const void* at, size_t bytes, bool write) {
  if (!state.watching) return;
  state.watching = false;  // the library's own code may have been compiled with such calls
  check_access(reinterpret_cast<uintptr_t>(at), bytes, write);
  state.watching = true;
}

}  // namespace
}  // namespace emulation

// --- what -fsanitize=thread calls ----------------------------------------------------------------

extern "C" {
#define EMULATION_HOOKS(bytes)                                                            \
  void __tsan_read##bytes(void* at) { emulation::on_access(at, bytes, false); }           \
  void __tsan_write##bytes(void* at) { emulation::on_access(at, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* at) { emulation::on_access(at, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* at) { emulation::on_access(at, bytes, true); } \
  void __tsan_read_write##bytes(void* at) { emulation::on_access(at, bytes, true); }      \
  void __tsan_unaligned_read_write##bytes(void* at) { emulation::on_access(at, bytes, true); }
EMULATION_HOOKS(1)
EMULATION_HOOKS(2)
EMULATION_HOOKS(4)
EMULATION_HOOKS(8)
EMULATION_HOOKS(16)
#undef EMULATION_HOOKS
void __tsan_read_range(void* at, size_t bytes) { emulation::on_access(at, bytes, false); }
void __tsan_write_range(void* at, size_t bytes) { emulation::on_access(at, bytes, true); }
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  emulation::on_access(from, bytes, false);
  emulation::on_access(to, bytes, true);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  emulation::on_access(to, bytes, true);
  return std::memset(to, value, bytes);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
