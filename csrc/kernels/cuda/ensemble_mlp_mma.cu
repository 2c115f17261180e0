// The ensemble MLP on tensor cores: bfloat16, float16, and float32 rounded to TF32; every layer in one
// launch, activations in registers from the input to the output.
//
// Mapping: a block takes a span of the examples of one member, and lays the member's weights into
// shared memory in the order in which lanes will read them: 16 bytes to a lane, a warp 512 in a row.
// A warp takes 16 kTiles examples at a time through all layers. A product of tensor cores leaves a lane
// with outputs 2 t and 2 t + 1 of rows g and g + 8; rounded, these are words of the next
// layer's operand for some order of its columns, so nothing moves between lanes, and the weights are
// laid down in that order. Layers are cut into steps of 16 outputs, padded with zeros.
//
// Bound by the tensor cores' rate for `mma.sync`, if all goes well: with kTiles = 2 a lane reads 16 bytes
// of weights for 4 products of 2048 multiply-adds (4 of 1024 in TF32). An SM delivers these in 4 cycles
// and multiplies in 4 at the best. Beside it, each step costs some 8 instructions a product to
// start from the bias, to activate and to round.
//
// Sums are the tensor cores', float32, and begin with the bias. Hidden activations are rounded to the
// element type, as by a loop over layers. A row of the result does not depend on the rows beside it.

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/ensemble_mlp.cuh"
#include "kernels/dropout.h"

namespace pyens {
namespace ensemble_mlp_mma {
namespace {

constexpr int kOutputs = 16;  // of a step: two products side by side

// The depth of a product, in elements; how many products read the outputs of one step.
template <class T>
constexpr int kDepth = 8 * kWordElements<T>;
template <class T>
constexpr int kProducts = kOutputs / kDepth<T>;

// Many registers are needed, so there are few warps: the weights of wide layers are for one block alone.
template <int kSteps>
constexpr int kThreads = kSteps > 4 ? 256 : 128;
template <class T, int kSteps, bool kPlain>
constexpr int kBlocks = kSteps > 4       ? 1
                        : !kPlain        ? 2
                        : sizeof(T) == 2 ? 4
                                         : 3;  // to a multiprocessor

struct Layer {
  MLPLayer given;
  int out, steps, products;  // steps and products: outputs / kOutputs, inputs / kDepth, rounded up
  int first_words, biases;   // where they begin in shared memory: in 16, and in 4 bytes
};

struct Arguments {
  MLPCall call;
  Members members;
  int num_layers;
  Layer layers[kMaxLayers];
  int words, biases;  // of all layers
  Spans spans;        // of tiles of 16 kTiles examples
  bool whole_words;   // the input can be read by words of 4 bytes
};
static_assert(kLeavesRoom<Arguments>);

// Where the two words that lane t holds of a row begin among a product's columns: as the step before
// has left its outputs.
template <class T>
__device__ int column(int t, int word) {
  return 2 * t + word * (kWordElements<T> == 1 ? 1 : 8);
}

// What lies in shared memory: the words of all layers, the biases, with dropout the units' keys.
struct Laid {
  uint4* words;
  float* biases;
  uint64_t* keys;

  __device__ explicit Laid(const Arguments& a)
      : words(dynamic_shared<uint4>()),
        biases(reinterpret_cast<float*>(words + a.words)),
        keys(reinterpret_cast<uint64_t*>(biases + a.biases)) {}
};

// Biases of a member that does not exist are NaN.
template <class T>
__device__ void lay_down_weights(const Arguments& a, int64_t member, const Laid& laid) {
  const int64_t parameters = a.members.parameters_of(member);
  const float no_bias = a.members.exists(member) ? 0.0f : static_cast<float>(NAN);
  for (int l = 0; l < a.num_layers; ++l) {
    const Layer& layer = a.layers[l];
    const int in = static_cast<int>(layer.given.in), out = layer.out;
    const T* weight = static_cast<const T*>(layer.given.weight.data) +
                      parameters * layer.given.weight.member_stride;
    for (int i = threadIdx.x; i < layer.steps * layer.products * 32; i += blockDim.x) {
      const int g = i % 32 / 4, t = i % 4, block = i / 32;
      const int first_column = block % layer.products * kDepth<T>;
      uint32_t word[4];
      for (int j = 0; j < 4; ++j) {  // two words of output g, two of output g + 8
        const int o = block / layer.products * kOutputs + j / 2 * 8 + g;
        float x[kWordElements<T>];
        for (int e = 0; e < kWordElements<T>; ++e) {
          const int k = first_column + column<T>(t, j % 2) + e;
          const bool inside = o < out && k < in;
          x[e] = inside ? to_real(weight[o * layer.given.weight.row_stride + k]) : 0.0f;
        }
        word[j] = to_word(x, weight);
      }
      laid.words[layer.first_words + i] = {word[0], word[1], word[2], word[3]};
    }
    const T* bias = static_cast<const T*>(layer.given.bias.data);
    if (bias) bias += parameters * layer.given.bias.member_stride;
    for (int o = threadIdx.x; o < layer.steps * kOutputs; o += blockDim.x) {
      laid.biases[layer.biases + o] = no_bias + (bias && o < out ? to_real(bias[o]) : 0.0f);
    }
    if (!a.call.dropout.any()) continue;
    const uint64_t layer_key = dropout_layer_key(a.call.dropout.seeds[member], l);
    for (int o = threadIdx.x; o < layer.steps * kOutputs; o += blockDim.x) {
      laid.keys[layer.biases + o] = dropout_unit_key(layer_key, o);
    }
  }
}

// What a lane holds of an operand: rows g and g + 8 of an input tile, from this column on.
template <class T>
__device__ void read_input(const Arguments& a, const T* rows, int row, int first_column,
                           uint32_t (&word)[4]) {
  const int in = static_cast<int>(a.layers[0].given.in), t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int b = row + j % 2 * 8, k = first_column + column<T>(t, j / 2);
    const T* const x = rows + b * a.call.input_row_stride + k;
    if (sizeof(T) == 2 && a.whole_words) {
      word[j] = b < a.call.batch && k < in ? *reinterpret_cast<const uint32_t*>(x) : 0;
      continue;
    }
    float elements[kWordElements<T>];
#pragma unroll
    for (int e = 0; e < kWordElements<T>; ++e) {
      elements[e] = b < a.call.batch && k + e < in ? to_real(x[e]) : 0.0f;
    }
    word[j] = to_word(elements, x);
  }
}

// Of one step and one tile: [two products][words of C].
using Sums = float[2][4];

template <int kTiles>
__device__ void begin_with_bias(const float* bias, Sums (&sums)[kTiles]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float2 of_two = *reinterpret_cast<const float2*>(bias + n * 8 + 2 * t);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      sums[i][n][0] = sums[i][n][2] = of_two.x;
      sums[i][n][1] = sums[i][n][3] = of_two.y;
    }
  }
}

// both: false if the second product would be of padding alone.
template <class T, int kTiles>
__device__ void add_products(const uint4& weights, const uint32_t (&x)[kTiles][4], bool both,
                             Sums (&sums)[kTiles]) {
  constexpr const T* kType = nullptr;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) multiply_tiles(sums[i][0], x[i], weights.x, weights.y, kType);
  if (!both) return;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) multiply_tiles(sums[i][1], x[i], weights.z, weights.w, kType);
}

__device__ inline bool has_both(const Layer& layer, int step) {
  return layer.out > step * kOutputs + 8;
}

// x <- f(x, i) for each of a step's sums.
template <int kTiles, class F>
__device__ inline void for_each_sum(Sums (&sums)[kTiles], const F& f) {
#pragma unroll
  for (int i = 0; i < kTiles * 8; ++i) {
    float& x = sums[i / 8][i / 4 % 2][i % 4];
    x = f(x, i);
  }
}

template <int kTiles>
__device__ void activate_sums(const Activation& activation, Sums (&sums)[kTiles]) {
  with_activation<float>(activation, [&](const auto& act) {
    for_each_sum(sums, [&](float x, int) { return act(x); });
  });
}

// Activation and dropout of a step of hidden layer l; 0 for what pads it, which the next layer multiplies
// by weights of 0: an Inf that this layer read has made it NaN.
template <bool kPlain, int kTiles>
__device__ void activate_step(const Arguments& a, int member, const Laid& laid, int l, int step,
                              int row, Sums (&sums)[kTiles]) {
  const Layer& layer = a.layers[l];
  const auto each = [&](const auto& f) { for_each_sum(sums, f); };
  if constexpr (kPlain) {
    each([](float x, int) { return Relu::value(x); });
  } else {
    activate_sums(layer.given.activation, sums);
  }
  // The first output that lane holds; those of sum i are `i / 4 % 2 * 8 + i % 2` further.
  const int first = step * kOutputs + static_cast<int>(threadIdx.x) % 4 * 2;
  if (!kPlain && a.call.dropout.any()) {
    const ApplyDropout<float> apply_dropout(a.call.dropout, member, l);
    const uint64_t* const keys = laid.keys + layer.biases + first;
    each([&](float x, int i) {
      return apply_dropout(x, row + i / 8 * 16 + i / 2 % 2 * 8, keys[i / 4 % 2 * 8 + i % 2]);
    });
  }
  if ((step + 1) * kOutputs <= layer.out) return;
  each([&](float x, int i) { return first + i / 4 % 2 * 8 + i % 2 < layer.out ? x : 0.0f; });
}

// A step's outputs as words of the next layer's operand.
template <class T>
__device__ void step_to_words(const Sums& sums, uint32_t (&x)[kProducts<T>][4]) {
  constexpr const T* kType = nullptr;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      x[0][j] = to_word({sums[j / 2][j % 2 * 2], sums[j / 2][j % 2 * 2 + 1]}, kType);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {  // a[0], a[1]: the even columns of rows g and g + 8
      x[j / 4][j % 4] = to_word({sums[j / 4][j % 2 * 2 + j % 4 / 2]}, kType);
    }
  }
}

template <class T, int kTiles>
__device__ void write_step(const Arguments& a, int out, T* output, int step, int row,
                           const Sums (&sums)[kTiles]) {
  const int first = step * kOutputs + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int j = 0; j < kTiles * 2; ++j) {
    const int b = row + j * 8;
    if (b >= a.call.batch) continue;
    T* const to = output + int64_t{b} * out + first;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int o = c / 2 * 8 + c % 2;
      if (first + o < out) from_real(sums[j / 2][c / 2][j % 2 * 2 + c % 2], to + o);
    }
  }
}

// sums[step] for a `step` known at run time only: registers have no addresses, so all are compared.
template <int kSteps, int kTiles>
__device__ void choose(int step, const Sums (&sums)[kSteps][kTiles], Sums (&chosen)[kTiles]) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (s != step) continue;
#pragma unroll
    for (int i = 0; i < kTiles * 8; ++i) {
      chosen[i / 8][i / 4 % 2][i % 4] = sums[s][i / 8][i / 4 % 2][i % 4];
    }
  }
}

// A step's outputs as words of the next layer's operand, x of [products][tiles].
template <class T, int kHidden, int kTiles>
__device__ void keep_step(int step, const Sums (&sums)[kTiles], uint32_t (&x)[kHidden][kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    uint32_t words[kProducts<T>][4];
    step_to_words<T>(sums[i], words);
#pragma unroll
    for (int p = 0; p < kHidden; ++p) {
      if (p / kProducts<T> != step) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) x[p][i][j] = words[p % kProducts<T>][j];
    }
  }
}

// The sums of a step of a layer that reads `x`.
template <class T, int kHidden, int kTiles>
__device__ void multiply_step(const Laid& laid, const Layer& layer, int step,
                              const uint32_t (&x)[kHidden][kTiles][4], Sums (&sums)[kTiles]) {
  begin_with_bias(laid.biases + layer.biases + step * kOutputs, sums);
  const uint4* const of_lane =
      laid.words + layer.first_words + step * layer.products * 32 + threadIdx.x % 32;
  const bool both = has_both(layer, step);
#pragma unroll
  for (int k = 0; k < kHidden; ++k) {
    if (k < layer.products) add_products<T>(of_lane[k * 32], x[k], both, sums);
  }
}

// Hidden layers of up to 16 kSteps outputs. kPlain: ReLU without dropout, outputs that are the sums; each step
// is code of its own.
// Otherwise it is a turn of a loop, for the other activations are long; registers are selected then.
template <class T, int kSteps, int kTiles, bool kPlain>
__global__ void __launch_bounds__(kThreads<kSteps>, kBlocks<T, kSteps, kPlain>)
    ensemble_mlp_mma_kernel(const Arguments a) {
  [[maybe_unused]] constexpr int kUnrolled = kPlain ? kSteps : 1;
  constexpr int kWarps = kThreads<kSteps> / 32;
  constexpr int kHidden = kSteps * kProducts<T>;
  const int member = static_cast<int>(blockIdx.x) / a.spans.per_member;
  const int span = static_cast<int>(blockIdx.x) % a.spans.per_member;
  const int last = a.num_layers - 1;
  const Laid laid(a);
  lay_down_weights<T>(a, member, laid);
  __syncthreads();

  const int lane = threadIdx.x % 32, out = a.layers[last].out;
  const T* const input = static_cast<const T*>(a.call.input) + member * a.call.input_member_stride;
  T* const output = static_cast<T*>(a.call.output) + member * a.call.batch * out;
  const int end = min((span + 1) * a.spans.tiles_each, a.spans.tiles);
  for (int tile = span * a.spans.tiles_each + threadIdx.x / 32; tile < end; tile += kWarps) {
    const int row = tile * 16 * kTiles + lane / 4;
    uint32_t hidden[kHidden][kTiles][4] = {};
    {  // All outputs of the first layer at once: the input goes by and is not kept.
      const Layer& layer = a.layers[0];
      Sums sums[kSteps][kTiles] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (s < layer.steps) begin_with_bias(laid.biases + layer.biases + s * kOutputs, sums[s]);
      }
      for (int k = 0; k < layer.products; ++k) {
        uint32_t x[kTiles][4];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) read_input(a, input, row + 16 * i, k * kDepth<T>, x[i]);
        const uint4* const of_lane = laid.words + layer.first_words + k * 32 + lane;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          if (s < layer.steps) {
            add_products<T>(of_lane[s * layer.products * 32], x, has_both(layer, s), sums[s]);
          }
        }
      }
#pragma unroll kUnrolled
      for (int s = 0; s < kSteps; ++s) {
        if (s >= layer.steps) continue;
        Sums of_step[kTiles] = {};
        choose(s, sums, of_step);
        activate_step<kPlain>(a, member, laid, 0, s, row, of_step);
        keep_step<T>(s, of_step, hidden);
      }
    }
    for (int l = 1; l < last; ++l) {
      const Layer& layer = a.layers[l];
      uint32_t next[kHidden][kTiles][4] = {};
#pragma unroll kUnrolled
      for (int s = 0; s < kSteps; ++s) {
        if (s >= layer.steps) continue;
        Sums sums[kTiles];
        multiply_step<T>(laid, layer, s, hidden, sums);
        activate_step<kPlain>(a, member, laid, l, s, row, sums);
        keep_step<T>(s, sums, next);
      }
#pragma unroll
      for (int i = 0; i < kHidden * kTiles * 4; ++i) {
        hidden[i / 4 / kTiles][i / 4 % kTiles][i % 4] = next[i / 4 / kTiles][i / 4 % kTiles][i % 4];
      }
    }
    for (int s = 0; s < a.layers[last].steps; ++s) {
      Sums sums[kTiles];
      multiply_step<T>(laid, a.layers[last], s, hidden, sums);
      if constexpr (!kPlain) activate_sums(a.layers[last].given.activation, sums);
      write_step<T>(a, out, output, s, row, sums);
    }
  }
}

// --- launch --------------------------------------------------------------------------------------

// What a lane keeps: two tiles while hidden layers have at most 64 outputs, else one, and up to
// kMostSteps steps of it.
template <class T>
constexpr int kMostSteps = sizeof(T) == 2 ? 16 : 8;

struct Plan {
  int64_t steps = 1;  // of the widest hidden layer
  int64_t words = 0, biases = 0, keys = 0;
  int64_t shared_bytes() const { return words * 16 + biases * 4 + keys * 8; }
};

// Also fills `layers`, if given.
template <class T>
Plan plan_of(const EnsembleMLPParams& params, Layer* layers) {
  Plan plan;
  for (int64_t l = 0; l < params.num_layers; ++l) {
    const MLPLayer& given = params.layers[l];
    const int64_t steps = ceil_div(given.out, kOutputs), products = ceil_div(given.in, kDepth<T>);
    if (l + 1 < params.num_layers) plan.steps = std::max(plan.steps, steps);
    if (layers) {
      layers[l] = {given,
                   static_cast<int>(given.out),
                   static_cast<int>(steps),
                   static_cast<int>(products),
                   static_cast<int>(plan.words),
                   static_cast<int>(plan.biases)};
    }
    plan.words += steps * products * 32;
    plan.biases += steps * kOutputs;
  }
  if (params.dropout.any()) plan.keys = plan.biases;
  return plan;
}

template <class T>
bool takes(const EnsembleMLPParams& params) {
  const Plan plan = plan_of<T>(params, nullptr);
  return plan.steps <= kMostSteps<T> && plan.shared_bytes() <= shared_limit();
}

template <class T, int kSteps, int kTiles, bool kPlain>
const char* launch_as(const EnsembleMLPParams& params, const Plan& plan, Arguments& a,
                      void* stream) {
  const char* const error =
      a.spans.cut(params, 16 * kTiles, kThreads<kSteps> / 32, kBlocks<T, kSteps, kPlain>);
  if (error) return error;
  return launch(ensemble_mlp_mma_kernel<T, kSteps, kTiles, kPlain>, a.spans.blocks,
                kThreads<kSteps>, static_cast<size_t>(plan.shared_bytes()), stream, a);
}

template <class T>
const char* run_as(const EnsembleMLPParams& params, void* stream) {
  Arguments a{};
  a.call = params;
  a.members = Members(params);
  a.num_layers = static_cast<int>(params.num_layers);
  const Plan plan = plan_of<T>(params, a.layers);
  a.words = static_cast<int>(plan.words);
  a.biases = static_cast<int>(plan.biases);
  a.whole_words =
      reinterpret_cast<uintptr_t>(params.input) % 4 == 0 &&
      (params.layers[0].in | params.input_row_stride | params.input_member_stride) % 2 == 0;
  const auto is_relu = [](const MLPLayer& layer) {
    return layer.activation.kind == ActivationKind::relu;
  };
  const MLPLayer* const last = params.layers + params.num_layers - 1;
  const bool plain = !params.dropout.any() && std::all_of(params.layers, last, is_relu) &&
                     last->activation.kind == ActivationKind::identity;
  const auto launch = plan.steps <= 4 ? plain ? launch_as<T, 4, 2, true> : launch_as<T, 4, 2, false>
                      : plain         ? launch_as<T, kMostSteps<T>, 1, true>
                                      : launch_as<T, kMostSteps<T>, 1, false>;
  return launch(params, plan, a, stream);
}

// f(type of the tensor-core products), or `otherwise` for a dtype without them.
template <class R, class F>
R by_type(DType dtype, bool tf32, R otherwise, const F& f) {
  switch (dtype) {
    case DType::float32: return tf32 ? f(static_cast<float*>(nullptr)) : otherwise;
    case DType::bfloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case DType::float16: return f(static_cast<__half*>(nullptr));
    default: return otherwise;
  }
}

}  // namespace

bool takes(const EnsembleMLPParams& params, bool tf32) {
  return params.num_layers >= 2 && params.num_layers <= kMaxLayers && params.strength.units == 0 &&
         !params.rich() && by_type<bool>(params.dtype, tf32, false, [&](auto* of) {
           return takes<std::remove_pointer_t<decltype(of)>>(params);
         });
}

const char* run(const EnsembleMLPParams& params, bool tf32, void* stream) {
  return by_type<const char*>(params.dtype, tf32, "not on tensor cores", [&](auto* of) {
    return run_as<std::remove_pointer_t<decltype(of)>>(params, stream);
  });
}

}  // namespace ensemble_mlp_mma
}  // namespace pyens
