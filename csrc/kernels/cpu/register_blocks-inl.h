// A block of kRows rows x kVectors vectors that stays in registers while the inputs run by, as the kernels whose
// sums are bound by multiply-adds have it: kVectors loads and kRows broadcasts feed kRows * kVectors multiply-adds.

#include "kernels/cpu/wide-inl.h"

namespace pyens::PYENS_ISA {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

constexpr int64_t kBlock = 128;  // of the accumulation contract, in inputs
#if PYENS_HAS(AVX512)
constexpr int kVectors = 4;  // 6 x 4 accumulators + 4 inputs + 1 weight of 32 registers
#else
constexpr int kVectors = 2;  // 6 x 2 + 2 + 1 of 16
#endif
constexpr int kRows = 6;

// One number of each of R rows, `stride` apart. Three rows share a pointer, because p, p + stride and p + 2 stride are
// addresses that an x86 instruction forms by itself; pointers to all rows would not stay in registers.
template <class T, int R>
class RowNumbers {
 public:
  inline __attribute__((always_inline)) RowNumbers(const T* first, int64_t stride)
      : stride_(stride) {
#pragma GCC unroll 3
    for (int i = 0; i < kPointers; ++i) third_[i] = first + 3 * i * stride;
  }
  inline __attribute__((always_inline)) T operator[](int r) const {
    return third_[r / 3][r % 3 * stride_];
  }
  inline __attribute__((always_inline)) void advance(int64_t by) {
#pragma GCC unroll 3
    for (int i = 0; i < kPointers; ++i) {
      third_[i] += by;
      asm("" : "+r"(third_[i]));  // or the compiler would make a pointer of each row after all
    }
  }

 private:
  static constexpr int kPointers = (R + 2) / 3;
  const T* third_[kPointers];
  int64_t stride_;
};

// Memory that is read next, of rows `stride` bytes apart, asked for in L2 some lines at a time while registers are
// busy with what is there. Rows of weights are short pieces on many pages, which no prefetcher of a processor
// follows.
struct Ahead {
  const char* at = nullptr;
  int64_t stride = 0, row_bytes = 0, rows = 0;
  int64_t lines = 0;  // at a time

  Ahead() = default;
  // In `times` calls of ask.
  Ahead(const void* first, int64_t row_stride, int64_t bytes, int64_t count, int64_t times)
      : at(static_cast<const char*>(first)),
        stride(row_stride),
        row_bytes(bytes),
        rows(count),
        lines(((bytes + kLine - 1) / kLine * count + times - 1) / times) {}

  void ask() {
    for (int64_t i = 0; i < lines && rows > 0; ++i) {
      __builtin_prefetch(at + done_, 0, 2);
      done_ += kLine;
      if (done_ >= row_bytes) done_ = 0, at += stride, --rows;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  int64_t done_ = 0;
};

// Blocks that run_rows makes of so many rows, with two vectors or more.
inline int64_t row_blocks(int64_t rows) { return (rows + kRows - 1) / kRows; }

// block.run<R, NV, V>(row) for all rows.
template <int NV, class V, class Block>
void run_rows(int64_t rows, const Block& block) {
  // One vector needs 8 chains: two multiply-adds a cycle, each waiting for four.
  constexpr int64_t kMost = NV == 1 ? 8 : kRows;
  // Balanced blocks: 50 neurons are 5 blocks of 6 and 4 of 5, never one of 2.
  const int64_t blocks = (rows + kMost - 1) / kMost;
  for (int64_t b = 0, row = 0; b < blocks; ++b) {
    const int64_t count = rows / blocks + (b < rows % blocks);
    switch (count) {
      case 8: block.template run<NV == 1 ? 8 : 1, NV, V>(row); break;
      case 7: block.template run<NV == 1 ? 7 : 1, NV, V>(row); break;
      case 6: block.template run<6, NV, V>(row); break;
      case 5: block.template run<5, NV, V>(row); break;
      case 4: block.template run<4, NV, V>(row); break;
      case 3: block.template run<3, NV, V>(row); break;
      case 2: block.template run<2, NV, V>(row); break;
      default: block.template run<1, NV, V>(row); break;
    }
    row += count;
  }
}

}  // namespace pyens::PYENS_ISA
