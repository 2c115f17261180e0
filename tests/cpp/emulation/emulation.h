// Runs CUDA kernels on the host, one thread at a time, and watches every access they make to memory.
//
// A test includes the kernel's own .cu; include/ stands in for the CUDA headers, and `launch` of
// kernels/cuda/common.cuh comes here. Each thread of a block is a fiber that runs until its next
// barrier, shuffle, vote or atomic; then the seed says who is next, as it says the order of blocks.
//
// The compiler is asked for calls at every load and store (-fsanitize=thread), and they are answered
// here, not by that sanitizer: so each byte is known that a thread reads or writes. What is a fault:
//
//   out of bounds   any byte that is not of a Global, of the block's shared memory or the thread's own
//   uninitialised   reading a byte of these that nobody wrote
//   race            two threads, one of them writing, no barrier between: __syncthreads, or __syncwarp
//                   in one warp; shuffles and votes are none, and threads of two blocks have none
//   barrier         one that not all threads of the block, or lanes of the warp, arrive at
//
// Races are found from who accessed what since when, not from results that came out wrong, so no
// lucky order hides one. What the C library does inside its own calls (memcpy) is not seen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

namespace emulation {

// --- for tests -----------------------------------------------------------------------------------

// The order of blocks and threads from here on.
void set_seed(uint64_t seed);
// What the first fault of the last launch was; empty if there was none.
const std::string& fault();

// What cudaDeviceGetAttribute says.
struct DeviceProperties {
  int shared_limit = 227 * 1024, multiprocessors = 3;
};
inline DeviceProperties device;

void add_global(void* begin, size_t bytes, const char* name, bool initialised);
void remove_global(void* begin);

// Global memory: just so many elements, at an address that is aligned as cudaMalloc's.
template <class T>
class Global {
 public:
  explicit Global(size_t n, const char* name = "global memory") : size_(n) {
    data_ = static_cast<T*>(::operator new(n * sizeof(T) + 1, kAlignment));
    std::memset(static_cast<void*>(data_), 0xff, n * sizeof(T));  // NaN
    add_global(data_, n * sizeof(T), name, false);
  }
  explicit Global(const std::vector<T>& values, const char* name = "global memory")
      : size_(values.size()) {
    data_ = static_cast<T*>(::operator new(size_ * sizeof(T) + 1, kAlignment));
    if (size_ > 0) std::memcpy(static_cast<void*>(data_), values.data(), size_ * sizeof(T));
    add_global(data_, size_ * sizeof(T), name, true);
  }
  ~Global() {
    remove_global(data_);
    ::operator delete(data_, kAlignment);
  }
  Global(const Global&) = delete;
  Global& operator=(const Global&) = delete;

  T* data() const { return data_; }
  std::vector<T> host() const { return std::vector<T>(data_, data_ + size_); }

 private:
  static constexpr std::align_val_t kAlignment{256};
  T* data_;
  size_t size_;
};

// --- for the stand-ins of the CUDA headers -------------------------------------------------------

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline Dim3 thread_index, block_index, block_size, grid_size;  // of the thread that runs

// Calls call(arguments) as each thread; nullptr, or what went wrong. All may read the arguments.
const char* run(Dim3 grid, Dim3 block, size_t shared_bytes, void (*call)(const void*),
                const void* arguments, size_t argument_bytes);

void* dynamic_shared();
void* shared_of(const void* key, size_t bytes);
template <class T>
T& static_shared(const void* key) {
  return *static_cast<T*>(shared_of(key, sizeof(T)));
}
void block_barrier(int line);
void warp_barrier(int line);
// Every lane gives bits; returns those of lane `from`.
uint64_t exchange(uint64_t bits, unsigned from, int line);
// Copies are made, and memory is looked at, no sooner than the thread waits for them.
void copy_async(void* to, const void* from, size_t bytes);
void wait_for_copies();
// C += A B of the warp, whose lanes hold words as kernels/cuda/common.cuh has it.
struct TileWords {
  uint32_t a[4], b[2];
};
enum class TileElements { tf32, float16, bfloat16 };
void multiply_tiles(TileElements elements, float* c, const TileWords& words, int line);
unsigned ballot(bool vote, int line);
unsigned lane();
[[noreturn]] void fail(const std::string& what);

float widen_half(uint16_t bits);
float widen_bfloat16(uint16_t bits);
uint16_t round_to_half(float x);
uint16_t round_to_bfloat16(float x);
uint32_t round_to_tf32(float x);  // 10 bits of mantissa, ties away from zero

// Accesses to memory within its life are atomic; others may run after it.
struct Atomic {
  Atomic();
  ~Atomic();
};

template <class... P, class... A>
const char* launch(void (*kernel)(P...), Dim3 grid, Dim3 block, size_t shared_bytes,
                   const A&... args) {
  const auto body = [=]() { kernel(args...); };
  const auto call = [](const void* it) { (*static_cast<const decltype(body)*>(it))(); };
  return run(grid, block, shared_bytes, call, &body, sizeof body);
}

}  // namespace emulation
