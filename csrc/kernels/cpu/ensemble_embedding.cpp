// Embedding tables per member on the CPU.
//
// Gather copies rows of D elements, scatter zeroes a table and adds rows to it: memory is all that
// counts, so there is one build for all instruction sets. With 4-byte elements the gather moves
//   8 E B T (index) + 2 x 4 E B I (rows in, features out)
// bytes, the scatter
//   4 E sum(N D) (tables out) + 4 E B I (gradient in, a member's share of which stays in L2 from
//   one table to the next) + 8 E B T,
// and the tables are written to memory once, as zeroing and adding happen within the cache.
//
// A work item of the gather is kTile examples of one member: narrow enough that the tile, which is
// written table by table, stays in L1. One of the scatter is a range of rows of one member's table;
// it scans the whole column of the index and adds in ascending b. So neither the ranges nor the
// threads bear on the bits. bfloat16 and float16 are summed in float32 and rounded once.

#include "kernels/ensemble_embedding.h"

#include "kernels/cpu/choose.h"

#define PYENS_ISA base
#define PYENS_ISA_FEATURES 0
#include "kernels/cpu/simd-inl.h"
#undef PYENS_ISA
#undef PYENS_ISA_FEATURES

namespace pyens {
namespace {

using namespace base;

constexpr int64_t kTile = 64;                   // examples
constexpr int64_t kRangeElements = 128 * 1024;  // of a table: half of L2 in float32
constexpr int64_t kMinItems = 16;               // a few for each thread, however few the members
constexpr int64_t kMinRangeElements = 4 * 1024;
constexpr int64_t kBytesWorthAThread = 64 * 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t items_worth_a_thread(int64_t bytes_per_item) {
  return std::max<int64_t>(1, kBytesWorthAThread / std::max<int64_t>(1, bytes_per_item));
}

// f(width), with the width as a constant of the type for the narrow rows that embeddings have: a copy
// is two moves then, not a call.
template <class F>
inline void with_width(int64_t width, const F& f) {
  switch (width) {
    case 1: return f(std::integral_constant<int64_t, 1>());
    case 2: return f(std::integral_constant<int64_t, 2>());
    case 3: return f(std::integral_constant<int64_t, 3>());
    case 4: return f(std::integral_constant<int64_t, 4>());
    case 5: return f(std::integral_constant<int64_t, 5>());
    case 6: return f(std::integral_constant<int64_t, 6>());
    case 7: return f(std::integral_constant<int64_t, 7>());
    case 8: return f(std::integral_constant<int64_t, 8>());
    default: return f(width);
  }
}

// sums[i] += row[i]
template <class Real, class T>
inline void add_row(Real* sums, const T* row, int64_t width) {
  constexpr int kLanes = kNarrowLanes<Real>;
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    store(sums + i, load<Narrow<Real>>(sums + i) + load_first<Real>(row + i, kLanes));
  }
  for (; i < width; ++i) sums[i] += to_float(row[i]);
}

// out[i] = sums[i], rounded
template <class Real, class T>
void round_to(T* out, const Real* sums, int64_t n) {
  for (int64_t i = 0; i < n; i += kNarrowLanes<Real>) {
    store_first<Real>(out + i, load_first<Real>(sums + i, n - i), n - i);
  }
}

// Sums of n elements, begun at 0 and rounded to `out` at the end; in place where they have its type.
template <class T, class Real>
struct Sums {
  T* out;
  Real* at;
  int64_t n;

  Sums(T* out_, int64_t n_, void* scratch) : out(out_), n(n_) {
    if constexpr (std::is_same_v<T, Real>) {
      at = out;
    } else {
      at = static_cast<Real*>(scratch);
    }
    std::memset(at, 0, static_cast<size_t>(n) * sizeof(Real));
  }
  void finish() const {
    if constexpr (!std::is_same_v<T, Real>) round_to(out, at, n);
  }
};

// --- gather --------------------------------------------------------------------------------------

int64_t tiles(int64_t batch) { return ceil_div(batch, kTile); }

// Only the size of T matters.
template <class T>
bool gather(const EmbeddingGather& p, int64_t begin, int64_t end) {
  bool in_range = true;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t m = item / tiles(p.batch), first = item % tiles(p.batch) * kTile;
    const int64_t examples = std::min(kTile, p.batch - first);
    T* features = static_cast<T*>(p.features) + (m * p.batch + first) * p.num_features;
    for (int64_t t = 0; t < p.num_tables; ++t) {
      const EmbeddingTable& table = p.tables[t];
      const T* weight = static_cast<const T*>(table.weight) + m * table.member_stride;
      const int64_t* index = table.index + m * p.index_member_stride + first * p.index_row_stride;
      T* out = features + table.offset;
      with_width(table.dim, [&](auto width) {
        for (int64_t b = 0; b < examples; ++b) {
          const int64_t row = index[b * p.index_row_stride];
          if (row < 0 || row >= table.num_embeddings) {
            in_range = false;
            continue;
          }
          std::memcpy(out + b * p.num_features, weight + row * table.row_stride,
                      static_cast<size_t>(width) * sizeof(T));
        }
      });
    }
    if (p.numeric_features == 0) continue;
    const T* numeric = static_cast<const T*>(p.numeric) + m * p.numeric_member_stride +
                       first * p.numeric_row_stride;
    T* out = features + p.num_features - p.numeric_features;
    for (int64_t b = 0; b < examples; ++b) {
      std::memcpy(out + b * p.num_features, numeric + b * p.numeric_row_stride,
                  static_cast<size_t>(p.numeric_features) * sizeof(T));
    }
  }
  return in_range;
}

// --- scatter -------------------------------------------------------------------------------------

// Rows in one range of a table: so few that the range stays in L2 between zeroing and adding, and
// fewer where there are few members, so that each thread has work.
int64_t range_rows(const EmbeddingScatter& p, const EmbeddingTable& table) {
  const int64_t cached = std::max<int64_t>(1, kRangeElements / table.dim);
  const int64_t fair =
      std::max(ceil_div(table.num_embeddings, ceil_div(kMinItems, p.ensemble_size)),
               ceil_div(kMinRangeElements, table.dim));
  return std::min({table.num_embeddings, cached, fair});
}

int64_t ranges(const EmbeddingScatter& p, const EmbeddingTable& table) {
  return ceil_div(table.num_embeddings, range_rows(p, table));
}

int64_t ranges_per_member(const EmbeddingScatter& p) {
  int64_t n = 0;
  for (int64_t t = 0; t < p.num_tables; ++t) n += ranges(p, p.tables[t]);
  return n;
}

int64_t numeric_items(const EmbeddingScatter& p) {
  if (p.numeric_grad == nullptr) return 0;
  return (p.numeric_shared ? 1 : p.ensemble_size) * tiles(p.batch);
}

template <class T, class Real>
bool scatter_range(const EmbeddingScatter& p, const EmbeddingTable& table, int64_t m, int64_t range,
                   void* scratch) {
  const int64_t first = range * range_rows(p, table);
  const int64_t rows = std::min(range_rows(p, table), table.num_embeddings - first);
  T* out = static_cast<T*>(table.grad) + (m * table.num_embeddings + first) * table.dim;
  const Sums<T, Real> sums(out, rows * table.dim, scratch);
  const T* grad = static_cast<const T*>(p.grad) + m * p.grad_member_stride + table.offset;
  const int64_t* index = table.index + m * p.index_member_stride;
  bool in_range = true;
  with_width(table.dim, [&](auto width) {
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t row = index[b * p.index_row_stride];
      in_range &= row >= 0 && row < table.num_embeddings;
      if (row < first || row >= first + rows) continue;
      add_row(sums.at + (row - first) * width, grad + b * p.grad_row_stride, width);
    }
  });
  sums.finish();
  return in_range;
}

// kTile examples of the gradient of the numeric columns; the sum over members in ascending m.
template <class T, class Real>
void numeric_grad(const EmbeddingScatter& p, int64_t item, void* scratch) {
  const int64_t m = item / tiles(p.batch), first = item % tiles(p.batch) * kTile;
  const int64_t end = std::min(p.batch, first + kTile), width = p.numeric_features;
  const int64_t members = p.numeric_shared ? p.ensemble_size : 1;
  for (int64_t b = first; b < end; ++b) {
    const T* grad = static_cast<const T*>(p.grad) + m * p.grad_member_stride +
                    b * p.grad_row_stride + p.numeric_offset;
    const Sums<T, Real> sums(static_cast<T*>(p.numeric_grad) + (m * p.batch + b) * width, width,
                             scratch);
    for (int64_t i = 0; i < members; ++i) add_row(sums.at, grad + i * p.grad_member_stride, width);
    sums.finish();
  }
}

template <class T, class Real>
bool scatter(const EmbeddingScatter& p, int64_t begin, int64_t end, void* scratch) {
  const int64_t per_member = ranges_per_member(p), table_items = p.ensemble_size * per_member;
  bool in_range = true;
  for (int64_t item = begin; item < end; ++item) {
    if (item >= table_items) {
      numeric_grad<T, Real>(p, item - table_items, scratch);
      continue;
    }
    const EmbeddingTable* table = p.tables;
    int64_t range = item % per_member;
    while (range >= ranges(p, *table)) range -= ranges(p, *table++);
    in_range &= scatter_range<T, Real>(p, *table, item / per_member, range, scratch);
  }
  return in_range;
}

// --- row sums ------------------------------------------------------------------------------------

template <class T, class Real>
bool row_sums(const EmbeddingRowSums& p, int64_t begin, int64_t end, void* scratch) {
  for (int64_t r = begin; r < end; ++r) {
    const EmbeddingRow& row = p.rows[r];
    const T* grad = static_cast<const T*>(p.grad) + row.member * p.grad_member_stride;
    const Sums<T, Real> sums(static_cast<T*>(p.sums) + r * p.dim, p.dim, scratch);
    for (int64_t i = row.begin; i < row.end; ++i) {
      add_row(sums.at, grad + p.order[i] * p.grad_row_stride, p.dim);
    }
    sums.finish();
  }
  return true;
}

bool is_half(DType dtype) { return element_size(dtype) == 2; }

}  // namespace

namespace ensemble_embedding_cpu {

int64_t work_items(const EmbeddingGather& p) { return p.ensemble_size * tiles(p.batch); }

int64_t grain_size(const EmbeddingGather& p) {
  return items_worth_a_thread(kTile * p.num_features * static_cast<int64_t>(element_size(p.dtype)));
}

size_t scratch_bytes(const EmbeddingGather&) { return 0; }

bool run(const EmbeddingGather& p, int64_t begin, int64_t end, void*) {
  switch (element_size(p.dtype)) {
    case 2: return gather<uint16_t>(p, begin, end);
    case 4: return gather<uint32_t>(p, begin, end);
    default: return gather<uint64_t>(p, begin, end);
  }
}

int64_t work_items(const EmbeddingScatter& p) {
  return p.ensemble_size * ranges_per_member(p) + numeric_items(p);
}

int64_t grain_size(const EmbeddingScatter& p) {
  int64_t elements = p.batch * p.numeric_features;
  for (int64_t t = 0; t < p.num_tables; ++t) {
    elements += (p.tables[t].num_embeddings + p.batch) * p.tables[t].dim;
  }
  const auto bytes = elements * p.ensemble_size * static_cast<int64_t>(element_size(p.dtype));
  return items_worth_a_thread(bytes / std::max<int64_t>(1, work_items(p)));
}

size_t scratch_bytes(const EmbeddingScatter& p) {
  if (!is_half(p.dtype)) return 0;
  int64_t elements = p.numeric_features;
  for (int64_t t = 0; t < p.num_tables; ++t) {
    elements = std::max(elements, range_rows(p, p.tables[t]) * p.tables[t].dim);
  }
  return static_cast<size_t>(elements) * sizeof(float);
}

size_t scratch_bytes(const EmbeddingRowSums& p) {
  return is_half(p.dtype) ? static_cast<size_t>(p.dim) * sizeof(float) : 0;
}

int64_t work_items(const EmbeddingRowSums& p) { return p.num_rows; }

int64_t grain_size(const EmbeddingRowSums& p) {
  return items_worth_a_thread(2 * p.dim * static_cast<int64_t>(element_size(p.dtype)));
}

#define PYENS_RUN_BY_DTYPE(function)                                                \
  switch (p.dtype) {                                                                \
    case DType::float64: return function<double, double>(p, begin, end, scratch);   \
    case DType::bfloat16: return function<BFloat16, float>(p, begin, end, scratch); \
    case DType::float16: return function<Float16, float>(p, begin, end, scratch);   \
    default: return function<float, float>(p, begin, end, scratch);                 \
  }

bool run(const EmbeddingScatter& p, int64_t begin, int64_t end, void* scratch) {
  PYENS_RUN_BY_DTYPE(scatter)
}

bool run(const EmbeddingRowSums& p, int64_t begin, int64_t end, void* scratch) {
  PYENS_RUN_BY_DTYPE(row_sums)
}

#undef PYENS_RUN_BY_DTYPE

}  // namespace ensemble_embedding_cpu
}  // namespace pyens
