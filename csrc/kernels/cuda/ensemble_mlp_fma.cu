// The ensemble MLP in float32 by plain multiply-adds, for batches; every layer in one launch.
//
// Mapping: a block takes a span of the examples of one member and lays the member's weights into shared
// memory, [in][out], outputs padded to 8. A lane takes kExamples examples through all layers: what it
// computes only it reads, so after the weights are there no thread waits for another. Per input it
// reads its examples' activations and 8 weights, the same as all lanes of the warp, for 8 kExamples
// multiply-adds.
//
// Bound by the multiply-adds where there is room for 4 examples a lane: 32 of them for three loads,
// which shared memory delivers in 6 cycles of an SM if a broadcast takes one, and the arithmetic needs 8. With
// 2 examples shared memory binds (4 cycles for 4), with 1 too.
//
// Accumulation as in ensemble_mlp.cu, by the same chains: the same bits.

#include <algorithm>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/ensemble_mlp.cuh"
#include "kernels/dropout.h"

namespace pyens {
namespace ensemble_mlp_fma {
namespace {

constexpr int kOutputs = 8;  // of a lane at once
constexpr int kMostWarps = 8;

struct Layer {
  MLPLayer given;
  int in, out, padded_out;
  int weights, biases;  // where they begin in shared memory, in floats
};

struct Arguments {
  MLPCall call;
  Members members;
  int num_layers;
  Layer layers[kMaxLayers];
  int floats;        // of all weights and biases
  int widths[2];     // of a lane's two rows of activations
  bool input_in_16;  // every row of the input begins at 16 bytes
  Spans spans;       // of tiles of 32 kExamples
};
static_assert(kLeavesRoom<Arguments>);

// Biases of a member that does not exist are NaN.
__device__ inline void lay_down_weights(const Arguments& a, int64_t member, float* shared) {
  const int64_t parameters = a.members.parameters_of(member);
  const float no_bias = a.members.exists(member) ? 0.0f : static_cast<float>(NAN);
  for (int l = 0; l < a.num_layers; ++l) {
    const Layer& layer = a.layers[l];
    const float* weight = static_cast<const float*>(layer.given.weight.data) +
                          parameters * layer.given.weight.member_stride;
    for (int i = threadIdx.x; i < layer.padded_out * layer.in; i += blockDim.x) {
      const int o = i / layer.in, k = i % layer.in;  // neighbours read neighbours
      shared[layer.weights + k * layer.padded_out + o] =
          o < layer.out ? weight[o * layer.given.weight.row_stride + k] : 0.0f;
    }
    const float* bias = static_cast<const float*>(layer.given.bias.data);
    if (bias) bias += parameters * layer.given.bias.member_stride;
    for (int o = threadIdx.x; o < layer.padded_out; o += blockDim.x) {
      shared[layer.biases + o] = no_bias + (bias && o < layer.out ? bias[o] : 0.0f);
    }
  }
}

// A lane's activations of one unit: [width][lane][examples] in shared memory.
template <int kExamples>
struct alignas(4 * kExamples) Examples {
  float of[kExamples];
};

// An input's activations and the weights that they are multiplied by.
template <int kExamples>
struct Operands {
  Examples<kExamples> own;
  float4 low, high;  // weights

  __device__ Operands(const Examples<kExamples>* x, const float* weights)
      : own(*x),
        low(*reinterpret_cast<const float4*>(weights)),
        high(*reinterpret_cast<const float4*>(weights + 4)) {}
  __device__ float weight(int o) const {
    const float w[kOutputs] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    return w[o];
  }
};

template <int kExamples>
__device__ void read_input(const Arguments& a, const float* input, int first,
                           Examples<kExamples>* x) {
  const int in = a.layers[0].in, lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < kExamples; ++e) {
    const int b = first + e * 32 + lane;
    const float* const row = input + b * a.call.input_row_stride;
    int k = 0;
    if (b < a.call.batch && a.input_in_16) {
      for (; k + 4 <= in; k += 4) {
        const float4 four = *reinterpret_cast<const float4*>(row + k);
        x[(k + 0) * 32 + lane].of[e] = four.x;
        x[(k + 1) * 32 + lane].of[e] = four.y;
        x[(k + 2) * 32 + lane].of[e] = four.z;
        x[(k + 3) * 32 + lane].of[e] = four.w;
      }
    }
    for (; k < in; ++k) x[k * 32 + lane].of[e] = b < a.call.batch ? row[k] : 0.0f;
  }
}

template <int kExamples>
__global__ void __launch_bounds__(32 * kMostWarps, 1) ensemble_mlp_fma_kernel(const Arguments a) {
  float* const shared = dynamic_shared<float>();
  const int member = static_cast<int>(blockIdx.x) / a.spans.per_member;
  const int span = static_cast<int>(blockIdx.x) % a.spans.per_member;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  lay_down_weights(a, member, shared);
  __syncthreads();

  using Own = Examples<kExamples>;
  Own* const rows[2] = {
      reinterpret_cast<Own*>(shared + a.floats) + warp * (a.widths[0] + a.widths[1]) * 32,
      reinterpret_cast<Own*>(shared + a.floats) +
          (warp * (a.widths[0] + a.widths[1]) + a.widths[0]) * 32};
  const int last = a.num_layers - 1;
  const float* const input =
      static_cast<const float*>(a.call.input) + member * a.call.input_member_stride;
  float* const output = static_cast<float*>(a.call.output) +
                        member * a.call.batch * static_cast<int64_t>(a.layers[last].out);
  const int end = min((span + 1) * a.spans.tiles_each, a.spans.tiles);
  for (int tile = span * a.spans.tiles_each + warp; tile < end; tile += warps) {
    const int first = tile * 32 * kExamples;
    read_input(a, input, first, rows[0]);
    for (int l = 0; l <= last; ++l) {
      const Layer& layer = a.layers[l];
      const Own* const x = (l % 2 == 0 ? rows[0] : rows[1]) + lane;
      Own* const z = (l % 2 == 0 ? rows[1] : rows[0]) + lane;
      for (int o = 0; o < layer.out; o += kOutputs) {
        float total[kOutputs][kExamples];
        const float* const bias = shared + layer.biases + o;
#pragma unroll
        for (int i = 0; i < kOutputs * kExamples; ++i) {
          total[i / kExamples][i % kExamples] = bias[i / kExamples];
        }
        const float* weights = shared + layer.weights + o;
        for (int k = 0; k < layer.in; k += kChain) {
          float sum[kOutputs][kExamples] = {};
          const int stop = min(k + kChain, layer.in);
          // Load the next input's operands while this one's multiply: a scheduler has only one warp here.
          Operands<kExamples> next(x + k * 32, weights);
#pragma unroll 4
          for (int j = k; j < stop; ++j) {
            const Operands<kExamples> now = next;
            weights += layer.padded_out;
            if (j + 1 < stop) next = Operands<kExamples>(x + (j + 1) * 32, weights);
#pragma unroll
            for (int i = 0; i < kOutputs * kExamples; ++i) {
              float& s = sum[i / kExamples][i % kExamples];
              s = fma(now.weight(i / kExamples), now.own.of[i % kExamples], s);
            }
          }
#pragma unroll
          for (int i = 0; i < kOutputs * kExamples; ++i) {
            total[i / kExamples][i % kExamples] += sum[i / kExamples][i % kExamples];
          }
        }
        with_activation<float>(layer.given.activation, [&](const auto& act) {
#pragma unroll
          for (int i = 0; i < kOutputs * kExamples; ++i) {
            float& t = total[i / kExamples][i % kExamples];
            t = act(t);
          }
        });
        if (l == last) {
#pragma unroll
          for (int i = 0; i < kOutputs * kExamples; ++i) {
            const int b = first + i % kExamples * 32 + lane, unit = o + i / kExamples;
            if (b < a.call.batch && unit < layer.out) {
              output[int64_t{b} * layer.out + unit] = total[i / kExamples][i % kExamples];
            }
          }
          continue;
        }
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
          if (o + i >= layer.out) continue;
          Own own;
#pragma unroll
          for (int e = 0; e < kExamples; ++e) own.of[e] = total[i][e];
          if (a.call.dropout.any()) {
            const ApplyDropout<float> apply_dropout(a.call.dropout, member, l);
            const uint64_t key =
                dropout_unit_key(dropout_layer_key(a.call.dropout.seeds[member], l), o + i);
#pragma unroll
            for (int e = 0; e < kExamples; ++e) {
              own.of[e] = apply_dropout(own.of[e], first + e * 32 + lane, key);
            }
          }
          z[(o + i) * 32] = own;
        }
      }
    }
  }
}

// --- launch --------------------------------------------------------------------------------------

// The shape of a block; warps 0: no room for one.
struct Plan {
  int64_t floats = 0, widths[2] = {};
  int examples = 4, warps = 0;
  int64_t bytes_per_warp() const { return (widths[0] + widths[1]) * 32 * examples * 4; }
  int64_t shared_bytes() const { return floats * 4 + warps * bytes_per_warp(); }
};

// Also fills `layers`, if given.
Plan plan_of(const EnsembleMLPParams& params, Layer* layers) {
  Plan plan;
  for (int64_t l = 0; l < params.num_layers; ++l) {
    const MLPLayer& given = params.layers[l];
    const int64_t padded_out = ceil_div(given.out, kOutputs) * kOutputs;
    plan.widths[l % 2] = std::max(plan.widths[l % 2], given.in);
    if (layers) {
      layers[l] = {given,
                   static_cast<int>(given.in),
                   static_cast<int>(given.out),
                   static_cast<int>(padded_out),
                   static_cast<int>(plan.floats),
                   static_cast<int>(plan.floats + given.in * padded_out)};
    }
    plan.floats += (given.in + 1) * padded_out;
  }
  // As many examples to a lane as leave a warp to each quarter of a multiprocessor.
  const int64_t room = shared_limit() - plan.floats * 4;
  while (plan.examples > 1 && plan.bytes_per_warp() * 4 > room) plan.examples /= 2;
  if (room > 0) {
    plan.warps = static_cast<int>(std::min<int64_t>(room / plan.bytes_per_warp(), kMostWarps));
  }
  return plan;
}

template <int kExamples>
const char* launch_as(const EnsembleMLPParams& params, const Plan& plan, Arguments& a,
                      void* stream) {
  const char* const error = a.spans.cut(params, 32 * kExamples, plan.warps, 1);
  if (error) return error;
  return launch(ensemble_mlp_fma_kernel<kExamples>, a.spans.blocks,
                static_cast<unsigned>(32 * plan.warps), static_cast<size_t>(plan.shared_bytes()),
                stream, a);
}

}  // namespace

bool takes(const EnsembleMLPParams& params) {
  return params.dtype == DType::float32 && params.num_layers <= kMaxLayers &&
         params.strength.units == 0 && !params.rich() && params.batch >= kFewExamples &&
         plan_of(params, nullptr).warps > 0;
}

const char* run(const EnsembleMLPParams& params, void* stream) {
  Arguments a{};
  a.call = params;
  a.members = Members(params);
  a.num_layers = static_cast<int>(params.num_layers);
  const Plan plan = plan_of(params, a.layers);
  a.floats = static_cast<int>(plan.floats);
  a.widths[0] = static_cast<int>(plan.widths[0]);
  a.widths[1] = static_cast<int>(plan.widths[1]);
  a.input_in_16 = reinterpret_cast<uintptr_t>(params.input) % 16 == 0 &&
                  (params.input_row_stride | params.input_member_stride) % 4 == 0;
  switch (plan.examples) {
    case 4: return launch_as<4>(params, plan, a, stream);
    case 2: return launch_as<2>(params, plan, a, stream);
    default: return launch_as<1>(params, plan, a, stream);
  }
}

}  // namespace ensemble_mlp_fma
}  // namespace pyens
