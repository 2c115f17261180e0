// What follows a layer's matrix products where a member's weights are too wide for one launch: bias, norm,
// activation, dropout, residual and activation strength in one pass over the products.
//
//   h[m, b, o] = dropout(act(z[m, b, o] + bias[m, o])) + x[m, b, o];   the last layer: act(z + bias)
//   value[m, b, u] = (h - mean[u]) * scale[u],   active[m, b, u] = h > 0 as the next layer reads it
//
// z are sums in float32 (float64) as the library leaves them, so that an element is rounded once, with
// its bias and activation; where h is of the same type it may take the place of z.
//
// Mapping: a thread keeps to some neighbouring units of one member and walks down rows of the batch, so
// that bias, statistics and dropout keys stay in registers; neighbouring threads neighbouring units. It
// owns 16 bytes of z where all rows begin at a multiple of them, and one unit otherwise. The next row
// is on its way while one is computed. Bound by memory: z is read once and h written once, 8 bytes an
// element in float32, 6 in 16-bit types; strength adds an element and a byte, a residual an element.
//
// A norm needs whole rows: a kernel of its own gives a row to a warp, or to a block where it is longer than
// kWarpUnits. It reads the row three times, for mean, variance and result, but for the first time out of L1.
// What comes before the norm is computed each time: bound by memory where that is the bias alone, by
// instructions where it is an activation with an exponential.
//
// Flags as bits take a second launch, a thread per byte, which reads h again: bytes start neither where
// layers nor where 16-byte pieces do.
//
// Every element and every byte is one thread's: the same bits in every run.

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/ensemble_mlp.cuh"
#include "kernels/dropout.h"
#include "kernels/ensemble_mlp.h"

namespace pyens {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerThread = 8;
constexpr int kWarpUnits = 2048;  // of a row with a norm that a warp takes

struct Arguments {
  EnsembleMLPEpilogue epilogue;
  MLPLayer layer;
  int out;
  bool norm, residual;  // of a hidden layer that has them
  int64_t ensemble_size, batch;
  Members members;
  Dropout dropout;
  ActivationStrengthParams strength;
  int64_t first_unit;  // of this layer, among those of the strength
  // A block: `lanes` threads side by side, rows_per_block rows of one member.
  int lanes, rows_per_block;
  unsigned column_blocks, row_blocks;
};

// Where a thread works: its column, its member, and the rows first, first + step, .. before past.
struct Place {
  int column, step;
  int64_t member, first, past;
};

__device__ inline Place place_of(const Arguments& a) {
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned rest = blockIdx.x / a.column_blocks;
  const int64_t row = static_cast<int64_t>(rest % a.row_blocks) * a.rows_per_block;
  return {static_cast<int>(blockIdx.x % a.column_blocks) * a.lanes + thread % a.lanes,
          kThreads / a.lanes, rest / a.row_blocks, row + thread / a.lanes,
          min(row + a.rows_per_block, a.epilogue.rows)};
}

// Neighbouring elements, read or written at once.
template <class T, int kUnits>
struct alignas(sizeof(T) * kUnits) Piece {
  T elements[kUnits];
};

// Three blocks: left alone the compiler takes four, and spills in float64.
template <class T, int kUnits>
__global__ void __launch_bounds__(kThreads, 3) epilogue_kernel(const Arguments a) {
  using R = Real<T>;
  const EnsembleMLPEpilogue& e = a.epilogue;
  const ActivationStrengthParams& s = a.strength;
  const Place at = place_of(a);
  const int o = at.column * kUnits;
  if (o >= a.out) return;

  const bool drops = a.dropout.any(), has_strength = s.units > 0;
  const uint64_t layer_key = drops ? dropout_layer_key(a.dropout.seeds[at.member], e.layer) : 0;
  const ApplyDropout<R> apply_dropout(a.dropout, at.member, e.layer);
  const T* const layer_bias = static_cast<const T*>(a.layer.bias.data) +
                              a.members.parameters_of(at.member) * a.layer.bias.member_stride + o;
  const R no_bias = a.members.exists(at.member) ? R(0) : static_cast<R>(NAN);
  const int64_t u = a.first_unit + o;
  R bias[kUnits], mean[kUnits], scale[kUnits];
  uint64_t key[kUnits];
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
    bias[j] = no_bias + (a.layer.bias.data ? to_real(layer_bias[j]) : R(0));
    key[j] = drops ? dropout_unit_key(layer_key, o + j) : 0;
    mean[j] = scale[j] = R(0);
    if (!has_strength) continue;
    const R std = static_cast<const R*>(s.std)[at.member * s.std_member_stride + u + j];
    mean[j] = static_cast<const R*>(s.mean)[at.member * s.mean_member_stride + u + j];
    scale[j] = strength_scale(std);
  }

  using Sums = Piece<R, kUnits>;
  const R* const z = static_cast<const R*>(e.z) + at.member * e.rows * a.out + o;
  const T* const read = static_cast<const T*>(e.x) + at.member * e.x_member_stride + o;
  T* const h = static_cast<T*>(e.h) + at.member * e.h_member_stride + o;
  Sums next{};
  if (at.first < at.past) next = *reinterpret_cast<const Sums*>(z + at.first * a.out);
  for (int64_t row = at.first; row < at.past; row += at.step) {
    const Sums sums = next;
    if (row + at.step < at.past) {
      next = *reinterpret_cast<const Sums*>(z + (row + at.step) * a.out);
    }
    Piece<T, kUnits> stored, value, added{};
    Piece<uint8_t, kUnits> active;
    if (a.residual) {
      added = *reinterpret_cast<const Piece<T, kUnits>*>(read + row * e.x_row_stride);
    }
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      R x = activate(a.layer.activation, sums.elements[j] + bias[j]);
      if (drops) x = apply_dropout(x, e.first_row + row, key[j]);
      if (a.residual) x += to_real(added.elements[j]);
      from_real(x, &stored.elements[j]);
      active.elements[j] = to_real(stored.elements[j]) > R(0);
      from_real(strength_value(x, mean[j], scale[j]), &value.elements[j]);
    }
    *reinterpret_cast<Piece<T, kUnits>*>(h + row * a.out) = stored;
    if (!has_strength) continue;
    const int64_t from = (at.member * a.batch + e.first_row + row) * s.units + u;
    *reinterpret_cast<Piece<T, kUnits>*>(static_cast<T*>(s.value) + from) = value;
    if (!s.bitpack) *reinterpret_cast<Piece<uint8_t, kUnits>*>(s.active + from) = active;
  }
}

// A row to kLanes threads, a warp or the block.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads) norm_epilogue_kernel(const Arguments a) {
  using R = Real<T>;
  PYENS_SHARED(R[kThreads / 32], of_warps);
  const EnsembleMLPEpilogue& e = a.epilogue;
  const ActivationStrengthParams& s = a.strength;
  const MLPLayer& layer = a.layer;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + thread / kLanes;
  if (kLanes == 32 && at >= a.ensemble_size * e.rows)
    return;  // a whole warp, and no barrier follows
  const int64_t member = at / e.rows, row = at % e.rows, example = e.first_row + row;
  const int64_t of_member = a.members.parameters_of(member);
  const R no_bias = a.members.exists(member) ? R(0) : static_cast<R>(NAN);
  const R* const z = static_cast<const R*>(e.z) + at * a.out;
  const T* const read =
      static_cast<const T*>(e.x) + member * e.x_member_stride + row * e.x_row_stride;
  T* const h = static_cast<T*>(e.h) + member * e.h_member_stride + row * a.out;
  const T* const bias =
      static_cast<const T*>(layer.bias.data) + of_member * layer.bias.member_stride;
  const NormParameters<T> parameters(layer.norm, of_member);
  const bool drops = a.dropout.any(), drops_early = drops && a.dropout.before_norm;
  const uint64_t layer_key = drops ? dropout_layer_key(a.dropout.seeds[member], e.layer) : 0;
  const ApplyDropout<R> apply_dropout(a.dropout, member, e.layer);
  const auto dropped = [&](R x, int o) {
    return apply_dropout(x, example, dropout_unit_key(layer_key, o));
  };
  // A thread reads and writes its own units alone: h may be z.
  const auto before_norm = [&](int o) {
    R x = z[o] + (no_bias + (layer.bias.data ? to_real(bias[o]) : R(0)));
    if (layer.norm.after_activation) x = activate(layer.activation, x);
    return drops_early ? dropped(x, o) : x;
  };
  const auto sum = [&](const auto& add) {
    R total = 0;
    for (int o = lane; o < a.out; o += kLanes) total = add(total, o);
    total = sum_lanes(total);
    if (kLanes == 32) return total;
    if (thread % 32 == 0) of_warps[thread / 32] = total;
    __syncthreads();
    total = 0;
    for (int i = 0; i < kThreads / 32; ++i) total += of_warps[i];
    __syncthreads();
    return total;
  };
  const NormOfExample<R> of = norm_of_example<R>(layer.norm, a.out, before_norm, sum);
  for (int o = lane; o < a.out; o += kLanes) {
    R x = parameters((before_norm(o) - of.mean) * of.scale, o);
    if (!layer.norm.after_activation) x = activate(layer.activation, x);
    if (drops && !drops_early) x = dropped(x, o);
    if (a.residual) x += to_real(read[o]);
    from_real(x, h + o);
    if (s.units == 0) continue;
    const int64_t u = a.first_unit + o, from = (member * a.batch + example) * s.units + u;
    const R mean = static_cast<const R*>(s.mean)[member * s.mean_member_stride + u];
    const R std = static_cast<const R*>(s.std)[member * s.std_member_stride + u];
    from_real(strength_value(x, mean, strength_scale(std)), static_cast<T*>(s.value) + from);
    if (!s.bitpack) s.active[from] = to_real(h[o]) > R(0);
  }
}

// Bit u % 8 of byte u / 8, for the units u of this layer.
template <class T>
__global__ void __launch_bounds__(kThreads) bitpack_flags_kernel(const Arguments a) {
  const EnsembleMLPEpilogue& e = a.epilogue;
  const ActivationStrengthParams& s = a.strength;
  const Place at = place_of(a);
  const int before = static_cast<int>(a.first_unit % 8);  // bits of the layer below
  const int o = at.column * 8 - before;
  const int begin = max(-o, 0), end = min(a.out - o, 8);
  if (end <= begin) return;
  for (int64_t row = at.first; row < at.past; row += at.step) {
    const T* const h = static_cast<const T*>(e.h) + at.member * e.h_member_stride + row * a.out + o;
    uint8_t* const byte = s.active +
                          (at.member * a.batch + e.first_row + row) * ((s.units + 7) / 8) +
                          a.first_unit / 8 + at.column;
    unsigned bits = begin > 0 ? *byte : 0u;  // written by an earlier launch
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j >= begin && j < end) bits |= static_cast<unsigned>(to_real(h[j]) > 0) << j;
    }
    *byte = static_cast<uint8_t>(bits);
  }
}

const char* launch_over(void (*kernel)(Arguments), Arguments a, int64_t columns, void* stream) {
  a.lanes = 1;
  while (a.lanes < 32 && a.lanes < columns) a.lanes *= 2;
  a.rows_per_block = kThreads / a.lanes * kRowsPerThread;
  const int64_t column_blocks = ceil_div(columns, a.lanes);
  const int64_t row_blocks = ceil_div(a.epilogue.rows, a.rows_per_block);
  const int64_t blocks = a.ensemble_size * row_blocks * column_blocks;
  if (blocks > INT32_MAX) return "too many blocks for one launch";
  a.column_blocks = static_cast<unsigned>(column_blocks);
  a.row_blocks = static_cast<unsigned>(row_blocks);
  return launch(kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, a);
}

template <class T>
const char* launch_norm(const Arguments& a, void* stream) {
  const bool whole_block = a.out > kWarpUnits;
  const int64_t rows = a.ensemble_size * a.epilogue.rows;
  const int64_t blocks = whole_block ? rows : ceil_div(rows, kThreads / 32);
  if (blocks > INT32_MAX) return "too many blocks for one launch";
  return launch(whole_block ? norm_epilogue_kernel<T, kThreads> : norm_epilogue_kernel<T, 32>,
                static_cast<unsigned>(blocks), kThreads, 0, stream, a);
}

template <class T>
const char* run_as(const Arguments& a, void* stream) {
  constexpr int kUnits = 16 / sizeof(Real<T>);
  const EnsembleMLPEpilogue& e = a.epilogue;
  const ActivationStrengthParams& s = a.strength;
  const auto fits = [&](const void* pointer, size_t element_bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % (kUnits * element_bytes) == 0;
  };
  const bool wide =
      a.out % kUnits == 0 && e.h_member_stride % kUnits == 0 && fits(e.z, sizeof(Real<T>)) &&
      fits(e.h, sizeof(T)) && s.units % kUnits == 0 && a.first_unit % kUnits == 0 &&
      fits(s.value, sizeof(T)) && (s.bitpack || fits(s.active, 1)) &&
      (!a.residual || (fits(e.x, sizeof(T)) && (e.x_member_stride | e.x_row_stride) % kUnits == 0));
  const char* error = a.norm ? launch_norm<T>(a, stream)
                      : wide ? launch_over(epilogue_kernel<T, kUnits>, a, a.out / kUnits, stream)
                             : launch_over(epilogue_kernel<T, 1>, a, a.out, stream);
  if (error || s.units == 0 || !s.bitpack) return error;
  return launch_over(bitpack_flags_kernel<T>, a, ceil_div(a.first_unit % 8 + a.out, 8), stream);
}

}  // namespace

namespace ensemble_mlp_cuda {

const char* run_epilogue(const EnsembleMLPParams& params, const EnsembleMLPEpilogue& epilogue,
                         void* stream) {
  if (epilogue.rows == 0) return nullptr;
  const MLPLayer& layer = params.layers[epilogue.layer];
  if (layer.out > INT32_MAX - 8) return "too many outputs";
  Arguments a{};
  a.epilogue = epilogue;
  a.layer = layer;
  a.out = static_cast<int>(layer.out);
  a.ensemble_size = params.ensemble_size;
  a.batch = params.batch;
  a.members = Members(params);
  if (epilogue.layer + 1 < params.num_layers) {
    a.norm = layer.has_norm();
    a.residual = layer.residual;
    a.dropout = params.dropout;
    a.strength = params.strength;
    for (int64_t l = 0; l < epilogue.layer; ++l) a.first_unit += params.layers[l].out;
  }
  return by_dtype(params.dtype,
                  [&](auto* of) { return run_as<std::remove_pointer_t<decltype(of)>>(a, stream); });
}

}  // namespace ensemble_mlp_cuda
}  // namespace pyens
