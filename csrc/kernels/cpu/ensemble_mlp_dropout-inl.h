// Dropout over one tile of hidden activations; what is kept is a function in kernels/dropout.h.

namespace pyens::PYENS_ISA::ensemble_mlp {

// z[u][b] <- kept ? z[u][b] / (1 - p) : 0 over panels [unit][kPanel]. `gradient`, if there is one,
// is the derivative of z by what comes before and goes the same way.
template <class Real>
void apply_dropout(const EnsembleMLPParams& p, int64_t l, int64_t member, int64_t first,
                   int64_t examples, Real* z, Real* gradient = nullptr) {
  using V = Wide<Real>;
  constexpr int N = lanes_of<V>();
  constexpr int64_t P = kPanel<Plain<Real, Real>>;
  using Words = Vec<uint32_t, N>;
  using Mask = Vec<std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>, N>;
  const uint32_t threshold = dropout_threshold(p.dropout.p);
  const V scale = broadcast<V>(static_cast<Real>(1 / (1 - p.dropout.p)));
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
      if (gradient) store(gradient + at, kept ? load<V>(gradient + at) * scale : V{});
    }
  }
}

}  // namespace pyens::PYENS_ISA::ensemble_mlp
