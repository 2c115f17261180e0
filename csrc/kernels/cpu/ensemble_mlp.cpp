// Chooses the instruction set and the element type of the ensemble MLP; the work is in
// ensemble_mlp-inl.h.

#include "kernels/ensemble_mlp.h"

#include "kernels/cpu/choose.h"
#include "kernels/dropout.h"

namespace pyens {
namespace {

struct MLPFunctions {
  int64_t (*work_items)(const ensemble_mlp_cpu::Forward&);
  size_t (*scratch_bytes)(const ensemble_mlp_cpu::Forward&);
  void (*run)(const ensemble_mlp_cpu::Forward&, int64_t begin, int64_t end, void* scratch);
  ensemble_mlp_cpu::PrepackedLayout layout;
  void (*prepack)(const EnsembleMLP&, int64_t begin, int64_t end,
                  ensemble_mlp_cpu::PrepackedWeights* prepacked);
};

}  // namespace
}  // namespace pyens

#define PYENS_KERNEL_SOURCE "kernels/cpu/ensemble_mlp-inl.h"
#define PYENS_KERNEL_AVX512_BF16
#include "kernels/cpu/foreach_isa.h"

namespace pyens {
namespace {

const MLPFunctions& functions(DType format) {
  static const Chosen<MLPFunctions> chosen{
#if defined(__x86_64__)
      {kAvx512Bf16, {nullptr, nullptr, &avx512_bf16::ensemble_mlp::kPairFunctions, nullptr}},
#endif
      PYENS_VARIANTS(ensemble_mlp, kFunctions)};
  return chosen[format];
}

// All layers have one format.
const MLPFunctions& functions(const EnsembleMLP& mlp) {
  return functions(mlp.layers[0].weight.format);
}

}  // namespace

namespace ensemble_mlp_cpu {

int64_t work_items(const Forward& p) { return p.batch == 0 ? 0 : functions(p).work_items(p); }

int64_t grain_size(const Forward& p) {
  double total = 0;
  for (int64_t l = 0; l < p.num_layers; ++l) {
    // The small-batch kernel reads every weight once, however few the examples.
    const double examples = static_cast<double>(std::max<int64_t>(p.batch, 4));
    total += static_cast<double>(p.layers[l].in * p.layers[l].out) * examples;
  }
  return items_worth_a_thread(kMultiplyAddsWorthAThread,
                              total * static_cast<double>(p.ensemble_size), work_items(p));
}

size_t scratch_bytes(const Forward& p) { return functions(p).scratch_bytes(p); }

void run(const Forward& p, int64_t begin, int64_t end, void* scratch) {
  functions(p).run(p, begin, end, scratch);
}

PrepackedLayout prepacked_layout(DType format) { return functions(format).layout; }

PrepackedWeights describe_prepacked(const EnsembleMLP& mlp) {
  PrepackedWeights description{};
  description.format = mlp.layers[0].weight.format;
  description.layout = prepacked_layout(description.format);
  description.ensemble_size = mlp.ensemble_size;
  description.num_layers = mlp.num_layers;
  description.bytes = sizeof(PrepackedWeights);
  for (int64_t l = 0; l < mlp.num_layers; ++l) {
    const MLPLayer& layer = mlp.layers[l];
    description.widths = splitmix(description.widths + static_cast<uint64_t>(layer.in));
    description.widths = splitmix(description.widths + static_cast<uint64_t>(layer.out));
    description.widths = splitmix(description.widths + (layer.bias.data != nullptr));
    description.bytes += mlp.ensemble_size * description.layout.layer_bytes(layer.out, layer.in);
  }
  return description;
}

void prepack(const EnsembleMLP& mlp, PrepackedWeights* prepacked) {
  *prepacked = describe_prepacked(mlp);
  functions(mlp).prepack(mlp, 0, mlp.ensemble_size, prepacked);
}

const char* check_prepacked(const EnsembleMLP& mlp, const void* prepacked, int64_t bytes) {
  PrepackedWeights found{};
  if (bytes < static_cast<int64_t>(sizeof(found))) return "too few bytes";
  std::memcpy(&found, prepacked, sizeof(found));
  const PrepackedWeights expected = describe_prepacked(mlp);
  if (found.magic != expected.magic) return "bytes that are no prepacked weights";
  if (found.format != expected.format) return "weights of another dtype";
  if (found.layout != expected.layout) return "weights for another instruction set";
  if (found.num_layers != expected.num_layers || found.widths != expected.widths)
    return "layers of other sizes";
  if (found.ensemble_size != expected.ensemble_size) return "another number of members";
  return bytes == expected.bytes && found.bytes == bytes ? nullptr : "another number of bytes";
}

}  // namespace ensemble_mlp_cpu
}  // namespace pyens
