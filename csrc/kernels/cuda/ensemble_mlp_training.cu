// One training pass of the ensemble MLP on the GPU: forward, loss and backward in one launch, plain
// multiply-adds.
//
// Mapping: a block takes tiles of up to kTile examples of one member, one tile after another, through
// all layers and back. What each layer reads, and the slope of its activation, lie in shared memory
// [tile][width]; gradients take the slopes' place. A thread computes whole sums, 4 x 4 of them at a
// time, so that 8 reads serve 16 multiply-adds:
//
//   outputs           4 examples x 4 outputs; neighbours are examples, which all read one weight
//   input gradients   4 examples x 4 inputs; neighbours are inputs, which all read one gradient
//   weight gradients  4 outputs x 4 inputs over the tile's examples, added to the span's sums;
//                     neighbours are inputs
//
// A layer with a norm or a residual keeps its slopes on the way back, and the gradient by what it puts out takes
// the place of that. A norm's two passes are a warp to an example, neighbours features; its gradients a
// thread to a feature.
//
// Bound by reads of shared memory and L1: half the rate of the multiply-adds while all threads have
// a block of sums, and narrow layers leave some without. Memory sees the inputs once, the weights once per
// tile from L2, and the sums of a span of tiles once per tile.
//
// Order of summation: outputs and input gradients as in the forward kernel. A parameter's gradient: the
// examples of a tile, the tiles of a span, the spans. The gradient of a shared input: the members. Tiles
// and spans depend on the batch and the layers alone, not on the GPU nor on the members beside. No
// atomics.
//
// Networks too wide for this are left to matrix products above (see training_fits_one_launch).

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/ensemble_mlp.cuh"
#include "kernels/cuda/ensemble_mlp_losses.cuh"
#include "kernels/dropout.h"
#include "kernels/sample_weights.h"

namespace pyens {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTile = 64, kSmallestTile = 8;
constexpr int64_t kSharedBytes = 96 * 1024;  // every GPU from sm_80 on has them
constexpr int64_t kMaxSpans = 32;
constexpr int64_t kSpanElements = int64_t{1} << 21;    // of the spans' sums of one member
constexpr int64_t kMostParameters = int64_t{1} << 19;  // of one member

// Where a layer's numbers lie, in Reals: of a tile's shared memory, of a member's gradients.
struct Place {
  // [tile][bank_stride(in)]: what the layer reads, later the gradient by it where the layer below is rich.
  int64_t reads;
  int64_t gradient;    // [tile][bank_stride(out)]: the sums, the slopes, the gradient by the sums
  int64_t normalized;  // [tile][bank_stride(out)], of a norm: what it normalized
  int64_t scale;       // [tile]: and multiplied it by
  int64_t weight, bias, norm_weight, norm_bias;  // -1: not asked for
};

struct Arguments {
  MLPTrainingCall training;
  MLPCall forward;
  Members members;
  int64_t ensemble_size, num_layers;
  MLPLayer layers[kMaxLayers];
  MLPLayerGradient gradients[kMaxLayers];
  Place places[kMaxLayers];
  int64_t example_weights, losses;  // [tile] each
  int64_t output_slopes;            // [tile][bank_stride(out)], where outputs have an activation
  int64_t example_reals, member_gradients;
  int64_t tile, tiles, tiles_per_span, spans;
  int64_t lowest;  // the lowest layer that is differentiated
  // In scratch: double [E] three times, double [E, spans], Real [spans, E, member_gradients], and for a shared
  // input Real [E, B, I].
  double *weight_scales, *weight_sums, *class_scales, *loss_sums;
  void *span_gradients, *member_inputs;
  size_t scratch_bytes;
};
static_assert(kLeavesRoom<Arguments>);

int64_t count_parameters(const EnsembleMLP& p) {
  int64_t n = 0;
  for (int64_t l = 0; l < p.num_layers; ++l) {
    n += p.layers[l].out * (p.layers[l].in + (p.layers[l].has_norm() ? 3 : 1));
  }
  return n;
}

bool activates_output(const EnsembleMLP& p) {
  return p.layers[p.num_layers - 1].activation.kind != ActivationKind::identity;
}

// The shared memory of an example: how many Reals, and whose they are.
void lay_out(const EnsembleMLP& p, Arguments& a) {
  a.example_reals = 0;
  const auto take = [&](int64_t reals) {
    const int64_t at = a.example_reals;
    a.example_reals += reals;
    return at;
  };
  for (int64_t l = 0; l < p.num_layers; ++l) {
    const MLPLayer& layer = p.layers[l];
    a.places[l].reads = take(bank_stride(layer.in));
    a.places[l].gradient = take(bank_stride(layer.out));
    if (l + 1 == p.num_layers || !layer.has_norm()) continue;
    a.places[l].normalized = take(bank_stride(layer.out));
    a.places[l].scale = take(1);
  }
  if (activates_output(p)) a.output_slopes = take(bank_stride(p.layers[p.num_layers - 1].out));
  a.example_weights = take(1);
  a.losses = take(1);
}

Arguments make_arguments(const EnsembleMLPTraining& t, void* scratch) {
  Arguments a{};
  const EnsembleMLPParams& p = t.forward;
  a.training = t;
  a.forward = p;
  a.members = Members(p);
  a.ensemble_size = p.ensemble_size;
  a.num_layers = p.num_layers;
  const int64_t n = p.num_layers;
  std::copy(p.layers, p.layers + n, a.layers);
  if (t.gradients) std::copy(t.gradients, t.gradients + n, a.gradients);
  lay_out(p, a);
  a.lowest = n;
  for (int64_t l = n; l-- > 0;) {
    const MLPLayer& layer = a.layers[l];
    Place& place = a.places[l];
    const MLPLayerGradient& asked = a.gradients[l];
    const auto sums_of = [&](const void* gradient, int64_t size) -> int64_t {
      if (!gradient) return -1;
      a.member_gradients += size;
      return a.member_gradients - size;
    };
    place.weight = sums_of(asked.weight, layer.out * layer.in);
    place.bias = sums_of(asked.bias, layer.out);
    place.norm_weight = sums_of(asked.norm_weight, layer.out);
    place.norm_bias = sums_of(asked.norm_bias, layer.out);
    if (asked.any()) a.lowest = l;
  }
  if (t.grad_input) a.lowest = 0;

  const auto real = static_cast<int64_t>(p.dtype == DType::float64 ? 8 : 4);
  a.tile = std::min(kTile, kSharedBytes / (a.example_reals * real));
  if (a.tile == 0) return a;  // training_fits_one_launch says no
  a.tiles = ceil_div(p.batch, a.tile);
  // Counts all parameters, so that the set of gradients asked for changes no bit.
  const int64_t most =
      std::max<int64_t>(1, std::min(kMaxSpans, kSpanElements / count_parameters(p)));
  a.tiles_per_span = std::max<int64_t>(1, ceil_div(a.tiles, most));
  a.spans = ceil_div(a.tiles, a.tiles_per_span);

  auto* at = static_cast<char*>(scratch);
  const auto take = [&](int64_t bytes) {
    char* taken = at ? at + a.scratch_bytes : nullptr;
    a.scratch_bytes += static_cast<size_t>(ceil_div(bytes, 256) * 256);
    return taken;
  };
  const int64_t members = p.ensemble_size, shared_input = t.grad_input && t.sum_grad_input;
  a.weight_scales = reinterpret_cast<double*>(take(members * 8));
  a.weight_sums = reinterpret_cast<double*>(take(members * 8));
  a.class_scales = reinterpret_cast<double*>(take(members * 8));
  a.loss_sums = reinterpret_cast<double*>(take(members * a.spans * 8));
  a.span_gradients = take(a.spans * members * a.member_gradients * real);
  a.member_inputs = take(shared_input * members * p.batch * a.layers[0].in * real);
  return a;
}

// --- the sums of the sample weights ----------------------------------------------------------------

__device__ inline bool is_sample_weight(double w) { return w >= 0 && w <= 1.7976931348623157e308; }

template <class R>
__device__ const R* class_weights(const MLPTrainingCall& t, int64_t member) {
  return static_cast<const R*>(t.of_loss.class_weight) +
         member * t.of_loss.class_weight_member_stride;
}
// By what a member's class weights are multiplied. NaN where one of them is negative or not finite.
template <class R>
__device__ double class_weight_scale(const MLPTrainingCall& t, int64_t member, int64_t classes) {
  const R* weight = class_weights<R>(t, member);
  double largest = 0;
  for (int64_t c = 0; c < classes; ++c) {
    const double w = static_cast<double>(weight[c]);
    if (!is_sample_weight(w)) return static_cast<double>(NAN);
    if (w > largest) largest = w;
  }
  return sample_weight_scale(largest);
}

// A block per member: by what its weights are multiplied, and their sum then, each times that of its class
// where classes have weights. NaN where a weight is negative or not finite.
template <class R>
__global__ void __launch_bounds__(kThreads) weight_sums_kernel(const Arguments a) {
  PYENS_SHARED(double[kThreads], found);
  const MLPTrainingCall& t = a.training;
  const int64_t batch = a.forward.batch, m = blockIdx.x;
  const R* weight = static_cast<const R*>(t.sample_weight);
  if (weight) weight += m * t.sample_weight_member_stride;
  double largest = 0, sum = 0;
  for (int64_t b = threadIdx.x; b < batch; b += kThreads) {
    const double w = weight ? static_cast<double>(weight[b]) : 1;
    if (is_sample_weight(w) && w > largest) largest = w;
  }
  found[threadIdx.x] = largest;
  __syncthreads();
  for (int i = 0; i < kThreads; ++i) largest = found[i] > largest ? found[i] : largest;
  const double scale = sample_weight_scale(largest);
  const bool by_class = t.of_loss.class_weight != nullptr;
  const int64_t classes = a.layers[a.num_layers - 1].out;
  const double class_scale = by_class ? class_weight_scale<R>(t, m, classes) : 1;
  for (int64_t b = threadIdx.x; b < batch; b += kThreads) {
    const R given = weight ? weight[b] : R(1);
    const double w = static_cast<double>(given);
    if (!is_sample_weight(w)) {
      sum += static_cast<double>(NAN);
    } else if (!by_class) {
      sum += w * scale;
    } else if (w > 0) {
      const int64_t label = static_cast<const int64_t*>(
          t.target)[m * t.target_member_stride + b * t.target_row_stride];
      const bool exists = label >= 0 && label < classes;
      const R by = exists ? scaled_sample_weight(class_weights<R>(t, m)[label], class_scale)
                          : static_cast<R>(NAN);
      sum += static_cast<double>(scaled_sample_weight(given, scale)) * static_cast<double>(by);
    }
  }
  __syncthreads();
  found[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += found[i];
  a.weight_scales[m] = scale;
  a.weight_sums[m] = sum;
  a.class_scales[m] = class_scale;
}

// --- blocks of sums ----------------------------------------------------------------------------------

constexpr int kSide = 4;

// One side of the blocks of sums: block `group` has elements group, group + groups, ..., so neighbouring
// threads have neighbouring elements. Past the end the last one repeats, and its sum is not stored.
struct Side {
  int size, groups;

  __device__ explicit Side(int size_) : size(size_), groups((size_ + kSide - 1) / kSide) {}
  __device__ int at(int group, int i) const { return min(group + i * groups, size - 1); }
  __device__ bool has(int group, int i) const { return group + i * groups < size; }
};

// f(group of one side, group of the other) for each block, neighbouring threads along `inner`.
template <class F>
__device__ void for_each_block(const Side& inner, const Side& outer, const F& f) {
  for (int i = threadIdx.x; i < inner.groups * outer.groups; i += kThreads) {
    f(i % inner.groups, i / inner.groups);
  }
}

// sums[i][j] += left(i, k) * right(j, k) for k in order.
template <class R, class Left, class Right>
__device__ void add_products(int begin, int end, const Left& left, const Right& right,
                             R (&sums)[kSide][kSide]) {
#pragma unroll 2
  for (int k = begin; k < end; ++k) {
    R x[kSide], y[kSide];
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      x[i] = left(i, k);
      y[i] = right(i, k);
    }
#pragma unroll
    for (int i = 0; i < kSide * kSide; ++i) {
      sums[i / kSide][i % kSide] = fma(x[i / kSide], y[i % kSide], sums[i / kSide][i % kSide]);
    }
  }
}

// f(i, j, sum) for each sum.
template <class R, class F>
__device__ void for_each_sum(const R (&sums)[kSide][kSide], const F& f) {
#pragma unroll
  for (int i = 0; i < kSide * kSide; ++i) f(i / kSide, i % kSide, sums[i / kSide][i % kSide]);
}

// Over all k below size, in chains of kChain that are added to `totals` in order.
template <class R, class Left, class Right>
__device__ void add_chains(int size, const Left& left, const Right& right,
                           R (&totals)[kSide][kSide]) {
  for (int k = 0; k < size; k += kChain) {
    R sums[kSide][kSide] = {};
    add_products(k, min(k + kChain, size), left, right, sums);
#pragma unroll
    for (int i = 0; i < kSide * kSide; ++i) {
      totals[i / kSide][i % kSide] += sums[i / kSide][i % kSide];
    }
  }
}

// --- one tile ------------------------------------------------------------------------------------------

// What a block notes of its member before the first barrier: in shared memory, in front of the tile, because
// registers are short.
struct Notes {
  double rates[kMaxLayers];  // of dropout
  int64_t parameters;        // the member whose they are
  double scale;              // of the gradients, a Real
  double loss;               // of the tiles so far; thread 0's
};
constexpr size_t kNotesBytes = (sizeof(Notes) + 15) / 16 * 16;  // keeps what follows aligned
__device__ inline Notes& notes() { return *dynamic_shared<Notes>(); }

// The tile of a block: `examples` of member `member` from `first` on.
template <class T>
struct Tile {
  using R = Real<T>;
  const Arguments& a;
  R* shared;
  int64_t member, first;
  int examples;  // what counts within a tile are 32-bit numbers: a division of 64 bits is a call

  __device__ R* reads(int64_t l) const { return shared + a.tile * a.places[l].reads; }
  __device__ R* gradient(int64_t l) const { return shared + a.tile * a.places[l].gradient; }
  __device__ R* example_weights() const { return shared + a.tile * a.example_weights; }
  __device__ R* losses() const { return shared + a.tile * a.losses; }
  __device__ R* output_slopes() const { return shared + a.tile * a.output_slopes; }
  __device__ R* normalized(int64_t l) const { return shared + a.tile * a.places[l].normalized; }
  __device__ R* norm_scale(int64_t l) const { return shared + a.tile * a.places[l].scale; }
  __device__ const T* weight(int64_t l) const {
    return static_cast<const T*>(a.layers[l].weight.data) +
           notes().parameters * a.layers[l].weight.member_stride;
  }
  __device__ bool has_late_norm(int64_t l) const {
    return a.layers[l].has_norm() && a.layers[l].norm.after_activation;
  }
  __device__ bool has_early_norm(int64_t l) const {
    return a.layers[l].has_norm() && !a.layers[l].norm.after_activation;
  }
  // Dropout of layer l: right after the sums or the activation, and after the norm.
  __device__ bool drops_before_norm(int64_t l) const {
    return a.forward.dropout.any() && a.forward.dropout.before_norm && a.layers[l].has_norm();
  }
  __device__ bool drops_after_norm(int64_t l) const {
    return a.forward.dropout.any() && !(a.forward.dropout.before_norm && a.layers[l].has_norm());
  }
  __device__ R dropped(int64_t l, R x, int b, int o) const {
    const uint64_t key = dropout_unit_key(dropout_layer_key(a.forward.dropout.seeds[member], l), o);
    return ApplyDropout<R>(notes().rates[l])(x, first + b, key);
  }

  // Examples that are left out become zeros, or a NaN in them would meet a gradient of 0.
  __device__ void load() const {
    const MLPCall& p = a.forward;
    const R* weights = static_cast<const R*>(a.training.sample_weight);
    if (weights) weights += member * a.training.sample_weight_member_stride + first;
    const int in = static_cast<int>(a.layers[0].in), row = bank_stride(in);
    const T* input = static_cast<const T*>(p.input) + member * p.input_member_stride +
                     first * p.input_row_stride;
    for (int i = threadIdx.x; i < examples * in; i += kThreads) {
      const int b = i / in, j = i % in;
      const bool kept = !weights || weights[b] != R(0);
      reads(0)[b * row + j] = kept ? to_real(input[b * p.input_row_stride + j]) : R(0);
    }
    for (int b = threadIdx.x; b < examples; b += kThreads) {
      example_weights()[b] =
          weights ? scaled_sample_weight(weights[b], a.weight_scales[member]) : R(1);
    }
  }

  __device__ void run_layer(int64_t l) const {
    const MLPLayer& layer = a.layers[l];
    const int in = static_cast<int>(layer.in), out = static_cast<int>(layer.out);
    const int in_row = bank_stride(in), out_row = bank_stride(out);
    const T* bias = static_cast<const T*>(layer.bias.data);
    if (bias) bias += notes().parameters * layer.bias.member_stride;
    const R* x = reads(l);
    const Side of_examples(examples), of_outputs(out);
    for_each_block(of_examples, of_outputs, [&](int bs, int os) {
      int row[kSide];
      const T* w[kSide];
      R z[kSide][kSide];
      for (int i = 0; i < kSide; ++i) {
        row[i] = of_examples.at(bs, i) * in_row;
        w[i] = weight(l) + of_outputs.at(os, i) * layer.weight.row_stride;
        for (int j = 0; j < kSide; ++j) z[i][j] = bias ? to_real(bias[of_outputs.at(os, j)]) : R(0);
      }
      add_chains(
          in, [&](int i, int k) { return x[row[i] + k]; },
          [&](int j, int k) { return to_real(w[j][k]); }, z);
      R* const to = gradient(l);
      for_each_sum(z, [&](int i, int j, R sum) {
        if (!of_examples.has(bs, i) || !of_outputs.has(os, j)) return;
        to[of_examples.at(bs, i) * out_row + of_outputs.at(os, j)] = sum;
      });
      // Read back one by one: the code that follows is long, and unrolled it would stand 16 times.
      if (l + 1 == a.num_layers || has_early_norm(l)) return;
#pragma unroll 1
      for (int i = 0; i < kSide * kSide; ++i) {
        if (!of_examples.has(bs, i / kSide) || !of_outputs.has(os, i % kSide)) continue;
        activate_output(l, of_examples.at(bs, i / kSide), of_outputs.at(os, i % kSide));
      }
    });
  }

  // From what the activation reads, in the place of its gradient, to what the next layer or the norm reads, and
  // the slope; dropout is in it where it comes next.
  __device__ void activate_output(int64_t l, int b, int o) const {
    const Activation& activation = a.layers[l].activation;
    const int row = bank_stride(static_cast<int>(a.layers[l].out));
    const R z = gradient(l)[b * row + o];
    R h = activate(activation, z), slope = activation_slope(activation, z, h);
    if (has_late_norm(l) ? drops_before_norm(l) : drops_after_norm(l)) {
      h = dropped(l, h, b, o);
      slope = dropped(l, slope, b, o);
    }
    if (a.layers[l].residual && !has_late_norm(l)) h += reads(l)[b * row + o];
    reads(l + 1)[b * row + o] = h;
    gradient(l)[b * row + o] = slope;
  }

  // The norm of layer l, of the sums or of what the activation has put out, and what follows it.
  __device__ void run_norm(int64_t l) const {
    const MLPLayer& layer = a.layers[l];
    const int out = static_cast<int>(layer.out), row = bank_stride(out);
    const bool late = layer.norm.after_activation, drops_sums = !late && drops_before_norm(l);
    const NormParameters<T> norm(layer.norm, notes().parameters);
    R* const from = late ? reads(l + 1) : gradient(l);
    for (int b = static_cast<int>(threadIdx.x) / 32; b < examples; b += kThreads / 32) {
      R* const x = from + b * row;
      const int lane = static_cast<int>(threadIdx.x) % 32;
      if (drops_sums) {
        for (int o = lane; o < out; o += 32) x[o] = dropped(l, x[o], b, o);
      }
      const NormOfExample<R> of = norm_of_example<R>(
          layer.norm, out, [&](int o) { return x[o]; },
          [&](const auto& add) { return sum_features<R>(out, add); });
      if (lane == 0) norm_scale(l)[b] = of.scale;
      for (int o = lane; o < out; o += 32) {
        const R rest = (x[o] - of.mean) * of.scale;
        normalized(l)[b * row + o] = rest;
        R y = norm(rest, o);
        if (late && drops_after_norm(l)) y = dropped(l, y, b, o);
        if (late && layer.residual) y += reads(l)[b * row + o];
        x[o] = y;
        if (!late) activate_output(l, b, o);
      }
    }
  }

  // From the gradient by what a rich layer puts out, without its residual, in reads(l + 1), to that by its
  // sums, in the place of the slopes. What a slope of 0 cuts off is selected, not multiplied by 0.
  __device__ void run_epilogue_gradient(int64_t l, R* sums, bool first_of_span) const {
    const MLPLayer& layer = a.layers[l];
    const int out = static_cast<int>(layer.out), row = bank_stride(out);
    const R* const given = reads(l + 1);
    R* const slopes = gradient(l);
    const auto times_slope = [&](R g, int i) { return slopes[i] == R(0) ? R(0) : g * slopes[i]; };
    if (!layer.has_norm()) {
      for (int i = threadIdx.x; i < examples * out; i += kThreads) {
        const int at = i / out * row + i % out;
        slopes[at] = times_slope(given[at], at);
      }
      return;
    }
    // By what the norm puts out.
    const bool late = layer.norm.after_activation, drops = late && drops_after_norm(l);
    const auto of_norm = [&](int b, int o) {
      const int at = b * row + o;
      if (!late) return times_slope(given[at], at);
      return drops ? dropped(l, given[at], b, o) : given[at];
    };
    const Place& place = a.places[l];
    if (place.norm_weight >= 0 || place.norm_bias >= 0) {
      for (int o = threadIdx.x; o < out; o += kThreads) {
        R along = 0, sum = 0;
        for (int b = 0; b < examples; ++b) {
          const R g = of_norm(b, o);
          along = fma(g, normalized(l)[b * row + o], along);
          sum += g;
        }
        const auto add = [&](int64_t to, R more) {
          if (to >= 0) sums[to + o] = first_of_span ? more : sums[to + o] + more;
        };
        add(place.norm_weight, along);
        add(place.norm_bias, sum);
      }
      __syncthreads();
    }
    const NormParameters<T> norm(layer.norm, notes().parameters);
    for (int b = static_cast<int>(threadIdx.x) / 32; b < examples; b += kThreads / 32) {
      const R* const x = normalized(l) + b * row;
      const R count = static_cast<R>(out), scale = norm_scale(l)[b];
      const auto scaled = [&](int o) { return of_norm(b, o) * norm.weight_of(o); };
      R mean = 0;
      if (layer.norm.kind == NormKind::layer_norm) {
        mean = sum_features<R>(out, [&](R sum, int o) { return sum + scaled(o); }) / count;
      }
      const R along =
          sum_features<R>(out, [&](R sum, int o) { return fma(scaled(o), x[o], sum); }) / count;
      for (int o = static_cast<int>(threadIdx.x) % 32; o < out; o += 32) {
        R g = (scaled(o) - mean - x[o] * along) * scale;
        if (late) {
          g = times_slope(g, b * row + o);
        } else if (drops_before_norm(l)) {
          g = dropped(l, g, b, o);
        }
        slopes[b * row + o] = g;
      }
    }
  }

  // act(z) of the outputs in their place, and the slopes.
  __device__ void activate_outputs() const {
    const int64_t l = a.num_layers - 1;
    const Activation& activation = a.layers[l].activation;
    const int out = static_cast<int>(a.layers[l].out), row = bank_stride(out);
    R* const z = gradient(l);
    for (int i = threadIdx.x; i < examples * out; i += kThreads) {
      const int at = i / out * row + i % out;
      const R h = activate(activation, z[at]), slope = activation_slope(activation, z[at], h);
      output_slopes()[at] = slope;
      z[at] = h;
    }
  }

  // Loss::none: the gradient of the output is given.
  __device__ void load_output_gradient() const {
    const MLPTrainingCall& t = a.training;
    const int64_t l = a.num_layers - 1;
    const int out = static_cast<int>(a.layers[l].out);
    const T* given = static_cast<const T*>(t.target) + member * t.target_member_stride +
                     first * t.target_row_stride;
    const bool activates = activates_output();
    for (int i = threadIdx.x; i < examples * out; i += kThreads) {
      const int b = i / out, o = i % out;
      const int at = b * bank_stride(out) + o;
      const R g = to_real(given[b * t.target_row_stride + o]);
      gradient(l)[at] = activates ? times_output_slope(g, at) : g;
    }
  }
  __device__ R times_output_slope(R g, int at) const {
    const R slope = output_slopes()[at];
    return slope == R(0) ? R(0) : g * slope;
  }
  __device__ bool activates_output() const {
    return a.layers[a.num_layers - 1].activation.kind != ActivationKind::identity;
  }

  __device__ void run_loss() const {
    const MLPTrainingCall& t = a.training;
    const int64_t l = a.num_layers - 1, out = a.layers[l].out;
    for (int b = threadIdx.x; b < examples; b += kThreads) {
      const R w = example_weights()[b], factor = w * static_cast<R>(notes().scale);
      R* z = gradient(l) + b * bank_stride(out);
      if (w == R(0)) {
        for (int64_t f = 0; f < out; ++f) z[f] = 0;
        losses()[b] = 0;
        continue;
      }
      const int64_t at = member * t.target_member_stride + (first + b) * t.target_row_stride;
      const R* target = static_cast<const R*>(t.target) + at;
      R loss = 0;
      switch (t.loss) {
        case Loss::mse: loss = mse(z, out, target, factor); break;
        case Loss::bce: loss = bce(z, out, target, factor); break;
        case Loss::gaussian_nll: loss = run_gaussian_nll(z, out, target, factor); break;
        case Loss::cross_entropy:
        case Loss::soft_cross_entropy: loss = run_cross_entropy(z, out, at, factor); break;
        case Loss::huber:
        case Loss::smooth_l1:
          loss = huber(z, out, target, loss_delta<R>(t.of_loss.delta), t.loss == Loss::smooth_l1,
                       factor);
          break;
        case Loss::quantile:
          loss = quantile(z, out, target, t.of_loss.quantiles, t.of_loss.num_quantiles, factor);
          break;
        case Loss::poisson_nll: loss = poisson_nll(z, out, target, factor); break;
        case Loss::none: break;
      }
      losses()[b] = w * loss;
      if (!activates_output()) continue;
      for (int f = 0; f < static_cast<int>(out); ++f) {
        z[f] = times_output_slope(z[f], b * bank_stride(static_cast<int>(out)) + f);
      }
    }
  }

  __device__ R run_gaussian_nll(R* z, int64_t out, const R* target, R factor) const {
    const LossParameters& p = a.training.of_loss;
    if (!p.log_variance_min) return gaussian_nll(z, out, target, factor);
    const R* low =
        static_cast<const R*>(p.log_variance_min) + member * p.log_variance_min_member_stride;
    const R* high =
        static_cast<const R*>(p.log_variance_max) + member * p.log_variance_max_member_stride;
    return bounded_gaussian_nll(z, out, target, low, high, factor);
  }

  // The target begins at `at`.
  __device__ R run_cross_entropy(R* z, int64_t out, int64_t at, R factor) const {
    const MLPTrainingCall& t = a.training;
    const R inverse_temperature = static_cast<R>(1 / t.of_loss.temperature);
    const ExpectedClasses<R> expected(t.of_loss.label_smoothing, out);
    if (t.loss == Loss::soft_cross_entropy) {
      const GivenShares<R> shares{static_cast<const R*>(t.target) + at, expected};
      return weighted_cross_entropy(z, out, shares, inverse_temperature, factor);
    }
    const int64_t label = static_cast<const int64_t*>(t.target)[at];
    if (!t.of_loss.class_weight) {
      return cross_entropy(z, out, label, inverse_temperature, expected, factor);
    }
    // A class out of range has made the member's factor NaN.
    const WeightedShares<R> shares{label, class_weights<R>(t, member), a.class_scales[member],
                                   expected};
    return weighted_cross_entropy(z, out, shares, inverse_temperature, factor);
  }

  // Adds to the span's sums, each element always by the same thread.
  __device__ void add_parameter_gradients(int64_t l, R* sums, bool first_of_span) const {
    const MLPLayer& layer = a.layers[l];
    const int in = static_cast<int>(layer.in), out = static_cast<int>(layer.out);
    const int in_row = bank_stride(in), out_row = bank_stride(out);
    const R *x = reads(l), *g = gradient(l);
    const auto add = [&](R* to, R sum) { *to = first_of_span ? sum : *to + sum; };
    if (a.places[l].weight >= 0) {
      R* to = sums + a.places[l].weight;
      const Side of_inputs(in), of_outputs(out);
      for_each_block(of_inputs, of_outputs, [&](int js, int os) {
        int o[kSide], j[kSide];
        for (int i = 0; i < kSide; ++i) {
          o[i] = of_outputs.at(os, i);
          j[i] = of_inputs.at(js, i);
        }
        R total[kSide][kSide] = {};
        add_products(
            0, examples, [&](int i, int b) { return g[b * out_row + o[i]]; },
            [&](int i, int b) { return x[b * in_row + j[i]]; }, total);
        for_each_sum(total, [&](int i, int k, R sum) {
          if (of_outputs.has(os, i) && of_inputs.has(js, k)) add(to + o[i] * in + j[k], sum);
        });
      });
    }
    if (a.places[l].bias >= 0) {
      R* to = sums + a.places[l].bias;
      for (int o = threadIdx.x; o < out; o += kThreads) {
        R sum = 0;
        for (int b = 0; b < examples; ++b) sum += g[b * out_row + o];
        add(to + o, sum);
      }
    }
  }

  // The gradient by what layer l reads: in the place of the slopes below, or out to the input's.
  __device__ void run_input_gradient(int64_t l) const {
    const MLPTrainingCall& t = a.training;
    const MLPLayer& layer = a.layers[l];
    const int in = static_cast<int>(layer.in), out = static_cast<int>(layer.out);
    const int in_row = bank_stride(in), out_row = bank_stride(out);
    const T* w = weight(l);
    const R* g = gradient(l);
    const bool cuts =
        l > 0 && (cuts_off(a.layers[l - 1].activation.kind) || notes().rates[l - 1] > 0);
    const bool rich_below = l > 0 && a.layers[l - 1].rich();
    // The other way to what the layer reads.
    const R* residual = l + 1 < a.num_layers && layer.residual ? reads(l + 1) : nullptr;
    R* input = static_cast<R*>(t.sum_grad_input ? a.member_inputs : t.grad_input);
    const Side of_examples(examples), of_inputs(in);
    for_each_block(of_inputs, of_examples, [&](int js, int bs) {
      int row[kSide], j[kSide];
      for (int i = 0; i < kSide; ++i) {
        row[i] = of_examples.at(bs, i) * out_row;
        j[i] = of_inputs.at(js, i);
      }
      R totals[kSide][kSide] = {};
      if (residual) {
        for (int i = 0; i < kSide; ++i) {
          for (int k = 0; k < kSide; ++k) {
            totals[i][k] = residual[of_examples.at(bs, i) * in_row + j[k]];
          }
        }
      }
      add_chains(
          out, [&](int i, int o) { return g[row[i] + o]; },
          [&](int i, int o) { return to_real(w[o * layer.weight.row_stride + j[i]]); }, totals);
      for_each_sum(totals, [&](int i, int k, R total) {
        if (!of_examples.has(bs, i) || !of_inputs.has(js, k)) return;
        const int b = of_examples.at(bs, i);
        if (rich_below) {
          reads(l)[b * in_row + j[k]] = total;
        } else if (l > 0) {
          // What a ReLU or dropout cut off is selected, not multiplied by 0.
          R* below = gradient(l - 1) + b * in_row + j[k];
          *below = cuts && *below == R(0) ? R(0) : *below * total;
        } else {
          // An example that is left out gets nothing, even of a weight that is infinite.
          input[(member * a.forward.batch + first + b) * in + j[k]] =
              example_weights()[b] == R(0) ? R(0) : total;
        }
      });
    });
  }
};

// As many blocks to a multiprocessor as leave enough registers to spill nothing.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(Real<T>) == 8 ? 1 : 2)
    training_kernel(const Arguments a) {
  using R = Real<T>;
  const MLPTrainingCall& t = a.training;
  const MLPCall& p = a.forward;
  const int64_t span = blockIdx.x, member = blockIdx.y, last = a.num_layers - 1;
  R* sums =
      static_cast<R*>(a.span_gradients) + (span * a.ensemble_size + member) * a.member_gradients;
  const int64_t first_tile = span * a.tiles_per_span;
  const int64_t end = min(first_tile + a.tiles_per_span, a.tiles);
  for (int64_t l = threadIdx.x; l < last; l += kThreads) notes().rates[l] = p.dropout.of(member, l);
  if (threadIdx.x == 0) {
    notes().parameters = a.members.parameters_of(member);
    const double terms = static_cast<double>(loss_terms(t, a.layers[last].out)) *
                         (t.loss == Loss::none ? 1 : a.weight_sums[member]);
    // If all weights are 0 the loss is 0. NaN stays.
    R scale = mean_scale<R>(terms);
    if (t.member_scale) scale *= static_cast<const R*>(t.member_scale)[member];
    notes().scale = static_cast<double>(scale);
    notes().loss = 0;
  }
  const bool activates_output = a.layers[last].activation.kind != ActivationKind::identity;
  for (int64_t i = first_tile; i < end; ++i) {
    const int64_t first = i * a.tile;
    const Tile<T> tile{a, dynamic_shared<R>() + kNotesBytes / sizeof(R), member, first,
                       static_cast<int>(min(a.tile, p.batch - first))};
    tile.load();
    __syncthreads();
    for (int64_t l = 0; l < a.num_layers; ++l) {
      if (l < last || t.loss != Loss::none || activates_output) tile.run_layer(l);
      __syncthreads();
      if (l < last && a.layers[l].has_norm()) {
        tile.run_norm(l);
        __syncthreads();
      }
    }
    if (activates_output) {
      tile.activate_outputs();
      __syncthreads();
    }
    if (t.loss == Loss::none) {
      tile.load_output_gradient();
    } else {
      tile.run_loss();
    }
    __syncthreads();
    if (t.loss != Loss::none && threadIdx.x == 0) {
      for (int64_t b = 0; b < tile.examples; ++b)
        notes().loss += static_cast<double>(tile.losses()[b]);
    }
    for (int64_t l = last; l >= a.lowest; --l) {
      if (l < last && a.layers[l].rich()) {
        tile.run_epilogue_gradient(l, sums, i == first_tile);
        __syncthreads();
      }
      tile.add_parameter_gradients(l, sums, i == first_tile);
      if (l > a.lowest || (l == 0 && t.grad_input)) {
        if (l > 0 && a.layers[l - 1].rich()) __syncthreads();  // its gradient takes what was read
        tile.run_input_gradient(l);
      }
      __syncthreads();
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) a.loss_sums[member * a.spans + span] = notes().loss;
}

// --- the spans' sums, in order ---------------------------------------------------------------------

template <class R>
__global__ void __launch_bounds__(kThreads) add_spans_kernel(const Arguments a) {
  const MLPTrainingCall& t = a.training;
  const int64_t items = a.ensemble_size * a.member_gradients;
  const R* gradients = static_cast<const R*>(a.span_gradients);
  for (int64_t i = first_item(); i < items; i += all_threads()) {
    const int64_t m = i / a.member_gradients, at = i % a.member_gradients;
    R sum = 0;
    for (int64_t s = 0; s < a.spans; ++s) {
      const R of_span = gradients[s * items + i];
      sum = s == 0 ? of_span : sum + of_span;
    }
    if (!a.members.exists(m)) sum = static_cast<R>(NAN);
    for (int64_t l = 0; l < a.num_layers; ++l) {
      const Place& place = a.places[l];
      const MLPLayerGradient& to = a.gradients[l];
      const int64_t out = a.layers[l].out;
      const auto store = [&](void* gradient, int64_t begin, int64_t size) {
        if (begin < 0 || at < begin || at >= begin + size) return;
        static_cast<R*>(gradient)[m * size + at - begin] = sum;
      };
      store(to.weight, place.weight, out * a.layers[l].in);
      store(to.bias, place.bias, out);
      store(to.norm_weight, place.norm_weight, out);
      store(to.norm_bias, place.norm_bias, out);
    }
  }
  const int64_t inputs = a.forward.batch * a.layers[0].in;
  for (int64_t m = 0; t.grad_input && !t.sum_grad_input && m < a.ensemble_size; ++m) {
    if (a.members.exists(m)) continue;
    R* const input = static_cast<R*>(t.grad_input) + m * inputs;
    for (int64_t i = first_item(); i < inputs; i += all_threads()) input[i] = static_cast<R>(NAN);
  }
  if (!t.loss_output) return;
  for (int64_t m = first_item(); m < a.ensemble_size; m += all_threads()) {
    double loss = 0;
    for (int64_t s = 0; s < a.spans; ++s) loss += a.loss_sums[m * a.spans + s];
    const int64_t outputs = a.layers[a.num_layers - 1].out;
    const double terms = a.weight_sums[m] * static_cast<double>(loss_terms(t, outputs));
    static_cast<R*>(t.loss_output)[m] = !a.members.exists(m) ? static_cast<R>(NAN)
                                        : terms == 0         ? R(0)
                                                             : static_cast<R>(loss / terms);
  }
}

template <class R>
__global__ void __launch_bounds__(kThreads) add_members_kernel(const Arguments a) {
  const int64_t size = a.forward.batch * a.layers[0].in;
  const R* inputs = static_cast<const R*>(a.member_inputs);
  for (int64_t i = first_item(); i < size; i += all_threads()) {
    R sum = a.members.exists(0) ? inputs[i] : static_cast<R>(NAN);
    for (int64_t m = 1; m < a.ensemble_size; ++m) {
      sum += a.members.exists(m) ? inputs[m * size + i] : static_cast<R>(NAN);
    }
    static_cast<R*>(a.training.grad_input)[i] = sum;
  }
}

template <class T>
const char* train_as(const Arguments& a, void* stream) {
  using R = Real<T>;
  const MLPTrainingCall& t = a.training;
  const auto members = static_cast<unsigned>(a.ensemble_size);
  const char* error = nullptr;
  if (t.loss != Loss::none) {
    error = launch(weight_sums_kernel<R>, members, kThreads, 0, stream, a);
    if (error) return error;
  }
  const size_t bytes = kNotesBytes + static_cast<size_t>(a.tile * a.example_reals) * sizeof(R);
  error = launch(training_kernel<T>, dim3(static_cast<unsigned>(a.spans), members), kThreads, bytes,
                 stream, a);
  if (error) return error;
  const int64_t items = std::max(a.ensemble_size * a.member_gradients, a.ensemble_size);
  error = launch(add_spans_kernel<R>, striding_blocks(items, kThreads), kThreads, 0, stream, a);
  if (error || !t.grad_input || !t.sum_grad_input) return error;
  return launch(add_members_kernel<R>, striding_blocks(a.forward.batch * a.layers[0].in, kThreads),
                kThreads, 0, stream, a);
}

}  // namespace

namespace ensemble_mlp_cuda {

bool training_fits_one_launch(const EnsembleMLP& p) {
  if (p.num_layers > kMaxLayers || p.ensemble_size > 65535) return false;
  Arguments a{};
  lay_out(p, a);
  const int64_t real = p.dtype == DType::float64 ? 8 : 4;
  return count_parameters(p) <= kMostParameters &&
         a.example_reals * real * kSmallestTile <= kSharedBytes;
}

size_t scratch_bytes(const EnsembleMLPTraining& training) {
  return make_arguments(training, nullptr).scratch_bytes;
}

const char* train(const EnsembleMLPTraining& training, void* scratch, void* stream) {
  if (training.forward.batch == 0) return nullptr;
  if (!training_fits_one_launch(training.forward)) return "layers too wide to train in one launch";
  const Arguments a = make_arguments(training, scratch);
  return by_dtype(training.forward.dtype, [&](auto* of) {
    return train_as<std::remove_pointer_t<decltype(of)>>(a, stream);
  });
}

}  // namespace ensemble_mlp_cuda
}  // namespace pyens
