// What follows the sums of a hidden layer over one tile: activation and dropout. A norm or a residual would
// come in between.

namespace pyens::PYENS_ISA::ensemble_mlp {

// z[u][b] <- kept ? z[u][b] / (1 - p) : 0 over panels [unit][kPanel]. `slope`, if there is one, is the
// derivative of z by what comes before and goes the same way. What is kept: kernels/dropout.h.
template <class Real>
void apply_dropout(const EnsembleMLPParams& p, int64_t l, int64_t member, int64_t first,
                   int64_t examples, Real* z, Real* slope) {
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>();
  constexpr int64_t P = kPanelOf<Real>;
  using Words = Vec<uint32_t, N>;
  using Mask = Vec<std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>, N>;
  const double rate = p.dropout.of(member);
  const uint32_t threshold = dropout_threshold(rate);
  const V scale = broadcast<V>(static_cast<Real>(1 / (1 - rate)));
  const uint64_t layer_key = dropout_layer_key(p.dropout.seeds[member], l);
  const int64_t out = p.layers[l].out;
  Words lane{};
  for (int i = 0; i < N; ++i) lane[i] = static_cast<uint32_t>(i);
  for (int64_t u = 0; u < out; ++u) {
    const uint64_t key = dropout_unit_key(layer_key, u);
    for (int64_t b = 0; b < examples; b += N) {
      const Words hash = dropout_hash(lane + static_cast<uint32_t>(first + b), key);
      const Mask kept = __builtin_convertvector(hash >= threshold, Mask);
      const int64_t at = (b / P * out + u) * P + b % P;
      store(z + at, kept ? load<V>(z + at) * scale : V{});
      if (slope) store(slope + at, kept ? load<V>(slope + at) * scale : V{});
    }
  }
}

// Of hidden layer l, panels of sums; `slope`, or nullptr: by which the backward pass multiplies.
template <class Real>
void hidden_epilogue(const EnsembleMLPParams& p, int64_t l, int64_t member, int64_t first,
                     int64_t examples, Real* z, Real* slope) {
  using V = Wide<Real>;
  const MLPLayer& layer = p.layers[l];
  const int64_t n = round_up(examples, kPanelOf<Real>) * layer.out;
  if (slope) {
    activate_with_slope<V>(layer.activation.kind, z, slope, n);
  } else {
    activate<V>(layer.activation.kind, z, n);
  }
  if (p.dropout.of(member) > 0) apply_dropout(p, l, member, first, examples, z, slope);
}

}  // namespace pyens::PYENS_ISA::ensemble_mlp
