// The ensemble MLP on the GPU: which kernel a call goes to, and the plain one that takes what is left:
// float64, activation strength, norms and residuals, and few examples of what the others do not take.
//
// Mapping of the plain kernel: a block takes a tile of examples of one member through all layers. Two
// buffers of activations [tile][width] lie in shared memory; a thread computes whole outputs,
// neighbouring threads neighbouring examples, so a warp reads one row of weights (a broadcast) against
// as many rows of activations. Weights are copied to shared memory first, all at once, where they fit.
// Bound by shared-memory reads, two for each multiply-add; with few examples by the latency of memory,
// once, and of chains of multiply-adds.
//
// A norm is a second pass over the buffer, a warp to an example: three reads of an activation in shared memory,
// where its sum took two for each input.
//
// Activation strength is written on the way, layer by layer, from the buffer that the next layer reads:
// neighbouring threads neighbouring units. The output has the bits of a call without it, but for 16-bit
// types and TF32, which such a call gives to tensor cores.
//
// Accumulation as on the CPU: chains of multiply-adds over blocks of 128 inputs, their sums added
// in order to the bias. No atomics: the same bits in every run, for any batch and any members
// beside.

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/ensemble_mlp.cuh"
#include "kernels/dropout.h"
#include "kernels/ensemble_mlp.h"

namespace pyens {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostExamples = 64;  // of a tile

struct Arguments {
  MLPCall call;
  Members members;
  int num_layers;
  MLPLayer layers[kMaxLayers];
  int64_t tile, tiles, row_reals;
  bool weights_in_shared;
};
static_assert(kLeavesRoom<Arguments>);

// Copies the member's weights to shared memory, layer by layer, in rows of bank_stride(in).
template <class T>
__device__ void copy_weights(const Arguments& a, int64_t parameters, T* to) {
  for (int64_t l = 0; l < a.num_layers; ++l) {
    const MLPLayer& layer = a.layers[l];
    const int in = static_cast<int>(layer.in), count = in * static_cast<int>(layer.out);
    const T* const weight =
        static_cast<const T*>(layer.weight.data) + parameters * layer.weight.member_stride;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int o = i / in, k = i % in;
      copy_async(to + o * bank_stride(in) + k, weight + o * layer.weight.row_stride + k);
    }
    to += layer.out * bank_stride(layer.in);
  }
}

// The tile's strengths for a hidden layer of `out` units, the first of them unit `first_unit` of all.
// h: [examples][h_row]; row: the tile's first of [E, B].
template <class T>
__device__ void write_strength(const ActivationStrengthParams& s, const Real<T>* h, int64_t h_row,
                               int examples, int64_t member, int64_t row, int64_t first_unit,
                               int out) {
  using R = Real<T>;
  const R* mean = static_cast<const R*>(s.mean) + member * s.mean_member_stride + first_unit;
  const R* std = static_cast<const R*>(s.std) + member * s.std_member_stride + first_unit;
  T* value = static_cast<T*>(s.value) + row * s.units + first_unit;
  for (int i = threadIdx.x; i < examples * out; i += kThreads) {
    const int b = i / out, o = i % out;
    const R x = h[b * h_row + o];
    from_real(strength_value(x, mean[o], strength_scale(std[o])), value + b * s.units + o);
    if (!s.bitpack) s.active[(row + b) * s.units + first_unit + o] = x > R(0);
  }
  if (!s.bitpack) return;
  // Whole bytes; what a layer below has begun is read back, a barrier after it was written.
  const int64_t row_bytes = (s.units + 7) / 8, first_byte = first_unit / 8;
  const int bytes = static_cast<int>((first_unit + out + 7) / 8 - first_byte);
  for (int i = threadIdx.x; i < examples * bytes; i += kThreads) {
    const int b = i / bytes;
    const int64_t byte = first_byte + i % bytes;
    const int64_t begin = max(byte * 8, first_unit), end = min(byte * 8 + 8, first_unit + out);
    uint8_t* const at = s.active + (row + b) * row_bytes + byte;
    unsigned bits = begin > byte * 8 ? *at : 0u;
    for (int64_t u = begin; u < end; ++u) {
      bits |= static_cast<unsigned>(h[b * h_row + u - first_unit] > R(0)) << (u - byte * 8);
    }
    *at = static_cast<uint8_t>(bits);
  }
}

// The norm of a hidden layer over the tile in z, and what follows it. x: what the layer reads.
template <class T>
__device__ void run_norm(const Arguments& a, int64_t l, int64_t member, int64_t first, int examples,
                         const Real<T>* x, Real<T>* z) {
  using R = Real<T>;
  const MLPLayer& layer = a.layers[l];
  const Dropout& dropout = a.call.dropout;
  const int out = static_cast<int>(layer.out);
  const NormParameters<T> parameters(layer.norm, a.members.parameters_of(member));
  const bool drops = dropout.any() && !dropout.before_norm;
  const uint64_t layer_key = drops ? dropout_layer_key(dropout.seeds[member], l) : 0;
  const ApplyDropout<R> apply_dropout(drops ? dropout.of(member, l) : 0);
  for (int b = static_cast<int>(threadIdx.x) / 32; b < examples; b += kThreads / 32) {
    R* const row = z + b * a.row_reals;
    const NormOfExample<R> of = norm_of_example<R>(
        layer.norm, out, [&](int f) { return row[f]; },
        [&](const auto& add) { return sum_features<R>(out, add); });
    for (int f = static_cast<int>(threadIdx.x) % 32; f < out; f += 32) {
      R h = parameters((row[f] - of.mean) * of.scale, f);
      if (!layer.norm.after_activation) h = activate(layer.activation, h);
      if (drops) h = apply_dropout(h, first + b, dropout_unit_key(layer_key, f));
      row[f] = layer.residual ? h + x[b * a.row_reals + f] : h;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) ensemble_mlp_kernel(const Arguments a) {
  using R = Real<T>;
  const MLPCall& p = a.call;
  // Within a tile, 32-bit numbers: a division of 64 bits is a call.
  const int64_t member = blockIdx.x / a.tiles, first = blockIdx.x % a.tiles * a.tile;
  const int64_t parameters = a.members.parameters_of(member);
  const bool exists = a.members.exists(member);
  const int examples = static_cast<int>(min(a.tile, p.batch - first));
  // [tile][row_reals], twice; then the weights.
  R* x = dynamic_shared<R>();
  R* z = x + a.tile * a.row_reals;
  const T* shared_weight = reinterpret_cast<const T*>(z + a.tile * a.row_reals);
  if constexpr (sizeof(T) >= 4) {
    if (a.weights_in_shared) copy_weights(a, parameters, const_cast<T*>(shared_weight));
  }

  const int in = static_cast<int>(a.layers[0].in);
  const T* input =
      static_cast<const T*>(p.input) + member * p.input_member_stride + first * p.input_row_stride;
  for (int i = threadIdx.x; i < examples * in; i += kThreads) {
    x[i / in * a.row_reals + i % in] = to_real(input[i / in * p.input_row_stride + i % in]);
  }
  if constexpr (sizeof(T) >= 4) wait_for_copies();
  __syncthreads();

  int64_t units = 0;  // of the hidden layers so far
  for (int64_t l = 0; l < a.num_layers; ++l) {
    const MLPLayer& layer = a.layers[l];
    const int out = static_cast<int>(layer.out);
    const bool last = l + 1 == a.num_layers;
    const T* weight =
        static_cast<const T*>(layer.weight.data) + parameters * layer.weight.member_stride;
    int64_t weight_row = layer.weight.row_stride;
    if (a.weights_in_shared) {
      weight = shared_weight;
      weight_row = bank_stride(layer.in);
      shared_weight += out * weight_row;
    }
    const T* bias = static_cast<const T*>(layer.bias.data);
    if (bias) bias += parameters * layer.bias.member_stride;
    // What follows the sums before the norm, or all of it where there is none.
    const bool drops = !last && p.dropout.any() && (!layer.has_norm() || p.dropout.before_norm);
    const bool activates = last || !layer.has_norm() || layer.norm.after_activation;
    T* output = static_cast<T*>(p.output) + (member * p.batch + first) * layer.out;
    for (int i = threadIdx.x; i < examples * out; i += kThreads) {
      const int b = i % examples, o = i / examples;
      const T* w = weight + o * weight_row;
      R total = bias ? to_real(bias[o]) : R(0);
      for (int64_t k = 0; k < layer.in; k += kChain) {
        R sum = 0;
        for (int64_t j = k; j < min(k + kChain, layer.in); ++j) {
          sum = fma(to_real(w[j]), x[b * a.row_reals + j], sum);
        }
        total += sum;
      }
      R h = exists ? total : static_cast<R>(NAN);
      if (activates) h = activate(layer.activation, h);
      if (last) {
        from_real(h, output + int64_t{b} * out + o);
        continue;
      }
      if (drops) {
        const uint64_t key = dropout_unit_key(dropout_layer_key(p.dropout.seeds[member], l), o);
        h = ApplyDropout<R>(p.dropout, member, l)(h, first + b, key);
      }
      if (layer.residual && !layer.has_norm()) h += x[b * a.row_reals + o];
      z[b * a.row_reals + o] = h;
    }
    __syncthreads();
    if (!last && layer.has_norm()) {
      run_norm<T>(a, l, member, first, examples, x, z);
      __syncthreads();
    }
    R* const swap = x;
    x = z;
    z = swap;
    if (last || a.call.strength.units == 0) continue;
    // The next layer writes to the other buffer meanwhile.
    write_strength<T>(a.call.strength, x, a.row_reals, examples, member, member * p.batch + first,
                      units, out);
    units += out;
  }
}

template <class T>
const char* run_as(const EnsembleMLPParams& params, void* stream) {
  Arguments a{};
  a.call = params;
  a.members = Members(params);
  a.num_layers = static_cast<int>(params.num_layers);
  std::copy(params.layers, params.layers + params.num_layers, a.layers);
  int64_t width = params.layers[0].in;
  for (int64_t l = 0; l + 1 < params.num_layers; ++l) width = std::max(width, a.layers[l].out);
  a.row_reals = bank_stride(width);

  const int64_t limit = shared_limit();
  const int64_t bytes_per_example = 2 * a.row_reals * static_cast<int64_t>(sizeof(Real<T>));
  // Two blocks to a multiprocessor where that leaves a tile of some size.
  const int64_t room = bytes_per_example * 8 > limit / 2 ? limit : limit / 2;
  a.tile = std::min<int64_t>({room / bytes_per_example, kMostExamples, params.batch});
  a.tiles = ceil_div(params.batch, a.tile);
  if (params.ensemble_size * a.tiles > INT32_MAX) return "too many tiles for one launch";

  int64_t bytes = a.tile * bytes_per_example, weights = 0;
  for (int64_t l = 0; l < params.num_layers; ++l)
    weights += a.layers[l].out * bank_stride(a.layers[l].in);
  weights *= static_cast<int64_t>(sizeof(T));
  a.weights_in_shared = sizeof(T) >= 4 && bytes + weights <= limit;
  if (a.weights_in_shared) bytes += weights;
  return launch(ensemble_mlp_kernel<T>, static_cast<unsigned>(params.ensemble_size * a.tiles),
                kThreads, static_cast<size_t>(bytes), stream, a);
}

bool plain_takes(const EnsembleMLPParams& params) {
  if (params.num_layers > kMaxLayers) return false;
  const auto element = static_cast<int64_t>(element_size(params.dtype));
  const int64_t real = params.dtype == DType::float64 ? 8 : 4, limit = shared_limit();
  int64_t weights = 0;  // and biases, of a member
  for (int64_t l = 0; l < params.num_layers; ++l) {
    const MLPLayer& layer = params.layers[l];
    weights += (layer.in + 1) * layer.out;
    // One example has to fit too: two buffers of what a layer reads.
    if (weights * element > limit || 2 * bank_stride(layer.in) * real > limit) return false;
  }
  return true;
}

}  // namespace

namespace ensemble_mlp_cuda {

bool fits_one_launch(const EnsembleMLPParams& params, bool tf32) {
  if (ensemble_mlp_mma::takes(params, tf32) || ensemble_mlp_fma::takes(params)) return true;
  // With few examples launches take most of the time, and the library needs several per layer. With many
  // the library is faster than the plain kernel, but not by much in float64, and strength would need
  // another pass. Norms and residuals would be one more of what was written.
  const bool few = params.batch < kFewExamples;
  return plain_takes(params) &&
         (few || params.dtype == DType::float64 || params.strength.units > 0 || params.rich());
}

const char* run(const EnsembleMLPParams& params, bool tf32, void* stream) {
  if (params.batch == 0) return nullptr;
  if (ensemble_mlp_mma::takes(params, tf32)) return ensemble_mlp_mma::run(params, tf32, stream);
  if (ensemble_mlp_fma::takes(params)) return ensemble_mlp_fma::run(params, stream);
  if (!plain_takes(params)) return "layers too wide, or too many, for one launch";
  return by_dtype(params.dtype, [&](auto* of) {
    return run_as<std::remove_pointer_t<decltype(of)>>(params, stream);
  });
}

}  // namespace ensemble_mlp_cuda
}  // namespace pyens
