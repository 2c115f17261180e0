// Rows packed to the columns that a mask keeps, and spread back, on one instruction set.
//
// A mask's columns ascend, so they are bits: a vector of a row is packed by one permutation (AVX-512 has it as an
// instruction, AVX2 by a table of 256 orders), and spread by its inverse. What it takes is the row's columns in vectors,
// kept or not, some 4 cycles each; one element after the other took 2 cycles for each that is kept. The rest is memory.

#include "kernels/cpu/simd-inl.h"

namespace pyens::PYENS_ISA::masked_weights {

template <class T>
void pack_each(const T* from, const KeptColumns& kept, T* to) {
  for (int64_t c = 0; c < kept.count; ++c) to[c] = from[kept.at[c]];
}
template <class T>
void add_each(const T* from, const KeptColumns& kept, T* to) {
  for (int64_t c = 0; c < kept.count; ++c) to[kept.at[c]] += from[c];
}

#if PYENS_HAS(AVX512)
// What is masked is not touched: neither beyond a row nor, in `to`, of another thread.
inline __m512 load_lanes(uint32_t lanes, const float* p) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), p);
}
inline __m512d load_lanes(uint32_t lanes, const double* p) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), p);
}
inline void store_lanes(float* p, uint32_t lanes, __m512 v) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(lanes), v);
}
inline void store_lanes(double* p, uint32_t lanes, __m512d v) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lanes), v);
}
inline __m512 pack_lanes(uint32_t lanes, __m512 v) {
  return _mm512_maskz_compress_ps(static_cast<__mmask16>(lanes), v);
}
inline __m512d pack_lanes(uint32_t lanes, __m512d v) {
  return _mm512_maskz_compress_pd(static_cast<__mmask8>(lanes), v);
}
inline __m512 spread_lanes(uint32_t lanes, __m512 v) {
  return _mm512_maskz_expand_ps(static_cast<__mmask16>(lanes), v);
}
inline __m512d spread_lanes(uint32_t lanes, __m512d v) {
  return _mm512_maskz_expand_pd(static_cast<__mmask8>(lanes), v);
}
inline __m512 add_lanes(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
inline __m512d add_lanes(__m512d a, __m512d b) { return _mm512_add_pd(a, b); }

// visit(first column, its lanes as bits, how many) for each vector of which something is kept.
template <class T, class Visit>
inline __attribute__((always_inline)) void for_vectors(const KeptColumns& kept,
                                                       const Visit& visit) {
  constexpr int N = kWideLanes<T>;
  for (int64_t first = 0; first < kept.columns; first += N) {
    const uint32_t lanes = (kept.bits[first / 16] >> (first % 16)) & ((1u << N) - 1);
    if (lanes != 0) visit(first, lanes, __builtin_popcount(lanes));
  }
}

template <class T>
void pack_row(const T* from, const KeptColumns& kept, T* to) {
  for_vectors<T>(kept, [&](int64_t first, uint32_t lanes, int count) {
    store_lanes(to, (1u << count) - 1, pack_lanes(lanes, load_lanes(lanes, from + first)));
    to += count;
  });
}
template <class T>
void add_row(const T* from, const KeptColumns& kept, T* to) {
  for_vectors<T>(kept, [&](int64_t first, uint32_t lanes, int count) {
    const auto v = spread_lanes(lanes, load_lanes((1u << count) - 1, from));
    store_lanes(to + first, lanes, add_lanes(load_lanes(lanes, to + first), v));
    from += count;
  });
}

#elif PYENS_HAS(AVX2)
// Of each set of 8 lanes, which lane goes where: to the front, and back.
struct Orders {
  uint8_t pack[256][8] = {}, spread[256][8] = {};
  constexpr Orders() {
    for (int lanes = 0; lanes < 256; ++lanes) {
      int count = 0;
      for (int i = 0; i < 8; ++i) {
        if ((lanes >> i & 1) == 0) continue;
        pack[lanes][count] = static_cast<uint8_t>(i);
        spread[lanes][i] = static_cast<uint8_t>(count++);
      }
    }
  }
};
inline constexpr Orders kOrders;

inline __m256 reorder(__m256 v, const uint8_t* order) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(order));
  return _mm256_permutevar8x32_ps(v, _mm256_cvtepu8_epi32(bytes));
}

// visit(first column, its lanes as bits, how many) for each vector that lies within the row.
template <class Visit>
inline __attribute__((always_inline)) void for_vectors(const KeptColumns& kept,
                                                       const Visit& visit) {
  for (int64_t first = 0; first + 8 <= kept.columns; first += 8) {
    const uint32_t lanes = (kept.bits[first / 16] >> (first % 16)) & 255u;
    visit(first, lanes, __builtin_popcount(lanes));
  }
}

template <class T>
void pack_row(const T* from, const KeptColumns& kept, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    int64_t done = 0;
    for_vectors(kept, [&](int64_t first, uint32_t lanes, int count) {
      if (done + 8 > kept.count) return;  // the vector would go beyond: below
      _mm256_storeu_ps(to + done, reorder(_mm256_loadu_ps(from + first), kOrders.pack[lanes]));
      done += count;
    });
    for (; done < kept.count; ++done) to[done] = from[kept.at[done]];
  } else {
    pack_each(from, kept, to);
  }
}
template <class T>
void add_row(const T* from, const KeptColumns& kept, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    int64_t done = 0;
    for_vectors(kept, [&](int64_t first, uint32_t lanes, int count) {
      if (done + 8 > kept.count) return;
      const __m256 v = reorder(_mm256_loadu_ps(from + done), kOrders.spread[lanes]);
      const __m256i bits = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), lane);
      const __m256 is_kept = _mm256_castsi256_ps(_mm256_cmpeq_epi32(bits, lane));
      const __m256 sum = _mm256_loadu_ps(to + first);
      _mm256_storeu_ps(to + first, _mm256_blendv_ps(sum, _mm256_add_ps(sum, v), is_kept));
      done += count;
    });
    for (; done < kept.count; ++done) to[kept.at[done]] += from[done];
  } else {
    add_each(from, kept, to);
  }
}

#else
template <class T>
void pack_row(const T* from, const KeptColumns& kept, T* to) {
  pack_each(from, kept, to);
}
template <class T>
void add_row(const T* from, const KeptColumns& kept, T* to) {
  add_each(from, kept, to);
}
#endif

template <class T>
void add_all(const T* from, int64_t count, T* to) {
  constexpr int64_t N = kWideLanes<T>;
  int64_t c = 0;
  for (; c + N <= count; c += N) store(to + c, load<Wide<T>>(to + c) + load<Wide<T>>(from + c));
  for (; c < count; ++c) to[c] += from[c];
}

template <class T>
constexpr RowFunctions kRows = {
    [](const void* from, const KeptColumns& kept, void* to) {
      pack_row(static_cast<const T*>(from), kept, static_cast<T*>(to));
    },
    [](const void* from, const KeptColumns& kept, void* to) {
      add_row(static_cast<const T*>(from), kept, static_cast<T*>(to));
    },
    [](const void* from, int64_t count, void* to) {
      add_all(static_cast<const T*>(from), count, static_cast<T*>(to));
    },
};

}  // namespace pyens::PYENS_ISA::masked_weights
