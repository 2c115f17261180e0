// The decorrelation loss on the GPU.
//
//   C_ij = 1/B sum_b z_ib z_jb,   loss = sum_{i<j} C_ij^2,   d loss / d z_i = sum_j W_ij z_j
//
// with W = 2/B grad C, diagonal 0; z are the outputs, less their mean over the batch (covariance) or
// over the components (residue, relative to the first component). The residue's gradient removes that
// mean again, which takes from each column of W its mean.
//
// Mapping of the products: a block has 4 + 4 components of one model, a chunk of the batch and up to
// 256 labels; its threads are labels times examples, so they read neighbouring elements of [B, K]
// whatever K is. 8 loads feed 16 multiply-adds; each component is read J / 4 times, all but once from
// L2. Chunks depend on B, J and K alone; their sums are added in double, in order, by a second kernel.
// Bound by L2 for many components, by launches (3 to 4 of them) for few.
//
// Gradient: a thread per element of [B, K] and 4 components; z is read J / 4 times.
// No atomics: the same bits in every run.

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/common.cuh"
#include "kernels/decorrelation.h"

namespace pyens {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;    // components of a block, on either side
constexpr int kTerms = 32;  // products in a row before they join a larger sum
constexpr int64_t kMaxModels = 65535;

// How a block's threads share examples and labels; how chunks cut the batch.
struct Layout {
  int64_t labels,
      examples;  // of a block at a time: thread t has label t % labels, example t / labels
  int64_t label_tiles, chunk_examples, chunks, row_tiles, row_pairs;

  explicit Layout(const DecorrelationParams& p)
      : labels(std::min<int64_t>(p.labels, kThreads)),
        examples(kThreads / labels),
        label_tiles(ceil_div(p.labels, labels)),
        // Long enough that the chunks' sums are an eighth of the outputs.
        chunk_examples(std::max(kTerms * examples, 8 * p.components)),
        chunks(ceil_div(p.batch, chunk_examples)),
        row_tiles(ceil_div(p.components, kRows)),
        row_pairs(row_tiles * (row_tiles + 1) / 2) {}
};

// Real [M, chunks, J, J, K], those of i < j; then what the residue subtracts, Real [M, B, K].
int64_t partial_sums(const DecorrelationParams& p, const Layout& l) {
  return p.models * l.chunks * p.components * p.components * p.labels;
}
int64_t residue_size(const DecorrelationParams& p) {
  return p.kind == DecorrelationKind::residue ? p.models * p.batch * p.labels : 0;
}

// What the components' residue is relative to: the first of them, so that a common offset cancels exactly;
// unless it is so far off that differences overflow.
template <class R>
__device__ inline R anchor(R first) {
  const R far = sizeof(R) == 8 ? R(0x1p970) : R(0x1p102f);
  return first < far && first > -far ? first : R(0);
}

// z of one model.
template <class T>
struct Outputs {
  using R = Real<T>;
  const T* from;
  int64_t component_stride;
  DecorrelationKind kind;
  const R *mean, *mean_rest;  // covariance: [J, K]
  int64_t labels;
  const R* residue;  // [B, K]

  __device__ Outputs(const DecorrelationParams& p, int64_t model, const R* residues)
      : from(static_cast<const T*>(p.outputs) + model * p.model_stride),
        component_stride(p.component_stride),
        kind(p.kind),
        mean(static_cast<const R*>(p.centre) + model * p.components * p.labels),
        mean_rest(mean + p.models * p.components * p.labels),
        labels(p.labels),
        residue(residues + model * p.batch * p.labels) {}

  // Of component j at element e = b K + k.
  __device__ R operator()(int64_t j, int64_t e, int64_t k) const {
    const R z = to_real(from[j * component_stride + e]);
    if (kind == DecorrelationKind::covariance) {
      return z - mean[j * labels + k] - mean_rest[j * labels + k];
    }
    if (kind == DecorrelationKind::residue) return z - anchor(to_real(from[e])) - residue[e];
    return z;
  }
};

// centre = the mean over the batch, in two parts. A block has a component of a model, and as many
// labels as fit.
template <class T>
__global__ void __launch_bounds__(kThreads)
    mean_kernel(const DecorrelationParams p, const Layout l) {
  using R = Real<T>;
  PYENS_SHARED(double[kThreads], sums);
  const int64_t tile = blockIdx.x % l.label_tiles, row = blockIdx.x / l.label_tiles;
  const int64_t model = row / p.components, j = row % p.components;
  const int64_t thread = threadIdx.x, k = tile * l.labels + thread % l.labels;
  const T* z = static_cast<const T*>(p.outputs) + model * p.model_stride + j * p.component_stride;
  double sum = 0;
  if (thread < l.labels * l.examples && k < p.labels) {
    for (int64_t b = thread / l.labels; b < p.batch; b += l.examples) {
      sum += static_cast<double>(to_real(z[b * p.labels + k]));
    }
  }
  sums[thread] = sum;
  __syncthreads();
  if (thread >= l.labels || k >= p.labels) return;
  sum = 0;
  for (int64_t i = 0; i < l.examples; ++i) sum += sums[i * l.labels + thread];
  const double mean = sum / static_cast<double>(p.batch);
  R* centre = static_cast<R*>(p.centre) + row * p.labels + k;
  *centre = static_cast<R>(mean);
  centre[p.models * p.components * p.labels] = static_cast<R>(mean - static_cast<double>(*centre));
}

// The mean over the components of their difference from the first one.
template <class T>
__global__ void __launch_bounds__(kThreads)
    residue_kernel(const DecorrelationParams p, Real<T>* residues) {
  using R = Real<T>;
  const int64_t elements = p.batch * p.labels;
  for (int64_t i = first_item(); i < p.models * elements; i += all_threads()) {
    const T* z = static_cast<const T*>(p.outputs) + i / elements * p.model_stride + i % elements;
    const R own = to_real(*z), first = anchor(own);
    R sum = own - first;
    for (int64_t j = 1; j < p.components; ++j) sum += to_real(z[j * p.component_stride]) - first;
    residues[i] = sum / static_cast<R>(p.components);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    products_kernel(const DecorrelationParams p, const Layout l, Real<T>* partials,
                    const Real<T>* residues) {
  using R = Real<T>;
  R* sums = dynamic_shared<R>();  // [16][kThreads]
  const int64_t tile = blockIdx.x % l.label_tiles, rest = blockIdx.x / l.label_tiles;
  const int64_t chunk = rest % l.chunks, model = blockIdx.y;
  int64_t pair = rest / l.chunks, i = 0;  // the pair-th of (0, 0), (0, 1), ..., (1, 1), ...
  for (; pair >= l.row_tiles - i; ++i) pair -= l.row_tiles - i;
  const int64_t first_i = i * kRows, first_j = (i + pair) * kRows;
  const int64_t rows_i = min(int64_t{kRows}, p.components - first_i);
  const int64_t rows_j = min(int64_t{kRows}, p.components - first_j);

  const int64_t thread = threadIdx.x, k = tile * l.labels + thread % l.labels;
  const int64_t begin = chunk * l.chunk_examples;
  const int64_t end = min(begin + l.chunk_examples, p.batch);
  R total[kRows][kRows] = {};
  if (thread < l.labels * l.examples && k < p.labels) {
    const Outputs<T> z(p, model, residues);
    for (int64_t block = begin + thread / l.labels; block < end; block += kTerms * l.examples) {
      R sum[kRows][kRows] = {};
      for (int64_t b = block; b < min(block + kTerms * l.examples, end); b += l.examples) {
        R x[kRows], y[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          x[r] = r < rows_i ? z(first_i + r, b * p.labels + k, k) : R(0);
          y[r] = r < rows_j ? z(first_j + r, b * p.labels + k, k) : R(0);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int c = 0; c < kRows; ++c) sum[r][c] = fma(x[r], y[c], sum[r][c]);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kRows; ++c) total[r][c] += sum[r][c];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kRows; ++c) sums[(r * kRows + c) * kThreads + thread] = total[r][c];
  }
  __syncthreads();
  R* out = partials + (model * l.chunks + chunk) * p.components * p.components * p.labels;
  for (int64_t at = thread; at < kRows * kRows * l.labels; at += kThreads) {
    const int64_t label = at % l.labels, r = at / l.labels / kRows, c = at / l.labels % kRows;
    const int64_t row = first_i + r, column = first_j + c, out_k = tile * l.labels + label;
    if (row >= column || column >= p.components || out_k >= p.labels) continue;
    R sum = 0;
    for (int64_t e = 0; e < l.examples; ++e) {
      sum += sums[(r * kRows + c) * kThreads + e * l.labels + label];
    }
    out[(row * p.components + column) * p.labels + out_k] = sum;
  }
}

// C from the chunks' sums, for all i and j.
template <class R>
__global__ void __launch_bounds__(kThreads)
    correlations_kernel(const DecorrelationParams p, const Layout l, const R* partials) {
  const int64_t n = p.components, of_model = n * n * p.labels;
  for (int64_t at = first_item(); at < p.models * of_model; at += all_threads()) {
    const int64_t model = at / of_model, k = at % p.labels;
    const int64_t i = at / p.labels / n % n, j = at / p.labels % n;
    const int64_t from = (min(i, j) * n + max(i, j)) * p.labels + k;
    double sum = 0;
    if (i != j) {
      for (int64_t c = 0; c < l.chunks; ++c) {
        sum += static_cast<double>(partials[(model * l.chunks + c) * of_model + from]);
      }
      sum /= static_cast<double>(p.batch);
    }
    static_cast<R*>(p.correlations)[((model * p.labels + k) * n + i) * n + j] = static_cast<R>(sum);
  }
}

// A block per loss, a warp per row of C.
template <class R>
__global__ void __launch_bounds__(kThreads) loss_kernel(const DecorrelationParams p) {
  constexpr int kWarps = kThreads / 32;
  PYENS_SHARED(double[kWarps], sums);
  const int64_t n = p.components, rows = n * (p.sum_labels ? p.labels : 1);
  const R* correlations = static_cast<const R*>(p.correlations) + blockIdx.x * rows * n;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double sum = 0;
  for (int64_t row = warp; row < rows; row += kWarps) {
    const R* const of_row = correlations + row * n;
#pragma unroll 4
    for (int64_t j = row % n + 1 + lane; j < n; j += 32) {
      const double c = static_cast<double>(of_row[j]);
      sum += c * c;
    }
  }
  sum = sum_lanes(sum);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += sums[w];
  static_cast<R*>(p.loss)[blockIdx.x] = static_cast<R>(sum);
}

// --- backward ------------------------------------------------------------------------------------

// W [M, J, J, K]: labels last, as the threads that read it have them.
template <class R>
__global__ void __launch_bounds__(kThreads)
    weights_kernel(const DecorrelationParams p, R* weights) {
  const int64_t n = p.components, of_model = n * n * p.labels;
  for (int64_t at = first_item(); at < p.models * of_model; at += all_threads()) {
    const int64_t model = at / of_model, k = at % p.labels;
    const int64_t i = at / p.labels / n % n, j = at / p.labels % n;
    const R* column = static_cast<const R*>(p.correlations) + ((model * p.labels + k) * n + j) * n;
    R mean = 0;
    if (p.kind == DecorrelationKind::residue) {
      for (int64_t r = 0; r < n; ++r) mean += column[r];
      mean /= static_cast<R>(n);
    }
    const R grad = static_cast<const R*>(p.grad_loss)[p.sum_labels ? model : model * p.labels + k];
    weights[at] = R(2) * grad / static_cast<R>(p.batch) * (column[i] - mean);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    gradient_kernel(const DecorrelationParams p, const Real<T>* weights, const Real<T>* residues) {
  using R = Real<T>;
  const int64_t elements = p.batch * p.labels, n = p.components;
  const int64_t model = blockIdx.z, first = int64_t{blockIdx.y} * kRows;
  const int64_t rows = min(int64_t{kRows}, n - first);
  const Outputs<T> z(p, model, residues);
  const R* w = weights + (model * n + first) * n * p.labels;
  T* out = static_cast<T*>(p.grad_outputs) + (model * n + first) * elements;
  for (int64_t e = first_item(); e < elements; e += all_threads()) {
    const int64_t k = e % p.labels;
    R sum[kRows] = {};
    for (int64_t j = 0; j < n; ++j) {
      const R x = z(j, e, k);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < rows) sum[r] = fma(w[(r * n + j) * p.labels + k], x, sum[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < rows) from_real(sum[r], out + r * elements + e);
    }
  }
}

// --- launches ------------------------------------------------------------------------------------

template <class T>
const char* compute_residues(const DecorrelationParams& p, Real<T>* residues, void* stream) {
  if (residue_size(p) == 0) return nullptr;
  return launch(residue_kernel<T>, striding_blocks(residue_size(p), kThreads), kThreads, 0, stream,
                p, residues);
}

template <class T>
const char* run_as(const DecorrelationParams& p, void* scratch, void* stream) {
  using R = Real<T>;
  const Layout l(p);
  R* partials = static_cast<R*>(scratch);
  R* residues = partials + partial_sums(p, l);
  if (const char* error = compute_residues<T>(p, residues, stream)) return error;
  if (p.kind == DecorrelationKind::covariance) {
    const auto blocks = static_cast<unsigned>(p.models * p.components * l.label_tiles);
    if (const char* error = launch(mean_kernel<T>, blocks, kThreads, 0, stream, p, l)) return error;
  }
  if (l.chunks > 0) {
    const int64_t blocks = l.row_pairs * l.chunks * l.label_tiles;
    if (blocks > INT32_MAX) return "too many pairs of components and chunks for one launch";
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.models));
    const size_t bytes = kRows * kRows * kThreads * sizeof(R);
    const char* error =
        launch(products_kernel<T>, grid, kThreads, bytes, stream, p, l, partials, residues);
    if (error) return error;
  }
  const int64_t size = p.models * p.labels * p.components * p.components;
  const char* error = launch(correlations_kernel<R>, striding_blocks(size, kThreads), kThreads, 0,
                             stream, p, l, static_cast<const R*>(partials));
  if (error) return error;
  const auto losses = static_cast<unsigned>(p.sum_labels ? p.models : p.models * p.labels);
  return launch(loss_kernel<R>, losses, kThreads, 0, stream, p);
}

template <class T>
const char* run_backward_as(const DecorrelationParams& p, void* scratch, void* stream) {
  using R = Real<T>;
  const int64_t size = p.models * p.labels * p.components * p.components;
  R* weights = static_cast<R*>(scratch);
  R* residues = weights + size;
  if (const char* error = compute_residues<T>(p, residues, stream)) return error;
  const char* error =
      launch(weights_kernel<R>, striding_blocks(size, kThreads), kThreads, 0, stream, p, weights);
  if (error) return error;
  const dim3 grid(striding_blocks(p.batch * p.labels, kThreads),
                  static_cast<unsigned>(ceil_div(p.components, kRows)),
                  static_cast<unsigned>(p.models));
  return launch(gradient_kernel<T>, grid, kThreads, 0, stream, p, static_cast<const R*>(weights),
                static_cast<const R*>(residues));
}

size_t real_bytes(const DecorrelationParams& p, int64_t reals) {
  return static_cast<size_t>(reals) * (p.dtype == DType::float64 ? 8 : 4);
}

const char* too_large(const DecorrelationParams& p) {
  if (p.models > kMaxModels) return "more than 65535 models";
  if (p.components > kMaxModels) return "more than 65535 components";
  return p.models * p.components * p.labels > INT32_MAX ? "too many labels" : nullptr;
}

}  // namespace

namespace decorrelation_cuda {

size_t scratch_bytes(const DecorrelationParams& p) {
  return real_bytes(p, partial_sums(p, Layout(p)) + residue_size(p));
}

size_t backward_scratch_bytes(const DecorrelationParams& p) {
  return real_bytes(p, p.models * p.labels * p.components * p.components + residue_size(p));
}

const char* run(const DecorrelationParams& p, void* scratch, void* stream) {
  if (p.models == 0) return nullptr;
  if (const char* error = too_large(p)) return error;
  return by_dtype(p.dtype, [&](auto* of) {
    return run_as<std::remove_pointer_t<decltype(of)>>(p, scratch, stream);
  });
}

const char* run_backward(const DecorrelationParams& p, void* scratch, void* stream) {
  if (p.models == 0 || p.batch == 0) return nullptr;
  if (const char* error = too_large(p)) return error;
  return by_dtype(p.dtype, [&](auto* of) {
    return run_backward_as<std::remove_pointer_t<decltype(of)>>(p, scratch, stream);
  });
}

}  // namespace decorrelation_cuda
}  // namespace pyens
