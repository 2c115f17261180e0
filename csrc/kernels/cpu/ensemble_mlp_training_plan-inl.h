// How the work of a training pass is cut, and the memory that its parts take.

namespace pyens::PYENS_ISA::ensemble_mlp {

using ensemble_mlp_cpu::Training;

constexpr int64_t kMaxSpans = 16;
constexpr int64_t kMaxGroups = 8;
constexpr int64_t kLargeNetwork = 32768;  // weights

// Neurons of a block of dot products.
template <class Real>
constexpr int kNeurons = kWideLanes<Real> <= 4 ? 1 : kWideLanes<Real> / 4;

// Of rows of so many numbers.
template <class Real>
int64_t row_stride(int64_t width) {
  return round_up(width, kWideLanes<Real>);
}

// Examples that go back through rows: of one panel of two vectors, or of one vector of a panel of four.
template <class Real>
constexpr int64_t kFewExamples = kVectors == 2 ? kPanelOf<Real> : kWideLanes<Real>;

inline MLPLayerGradient requested_gradient(const Training& t, int64_t l) {
  return t.gradients ? t.gradients[l] : MLPLayerGradient{};
}

template <class A>
struct TrainingSchedule {
  using Real = typename A::Real;
  int64_t block,
      blocks;  // examples that are summed in one go: fixed by the batch and the network alone
  int64_t tile, tiles;  // examples that go through the layers together: one block, or several
  int64_t tiles_per_span, spans;
  int64_t group_members, groups;  // a group's members add to one gradient of a shared input
  int64_t member_gradients;       // weights and biases of one member, those asked for
  int64_t input_gradients;        // of one group
  bool by_span;                   // spans run apart: an item is a span of a group
  bool by_rows;                   // gradients go through rows: see ensemble_mlp_gradients-inl.h
  int64_t lowest;                 // the lowest layer that is differentiated

  explicit TrainingSchedule(const Training& t) {
    const EnsembleMLPParams& p = t.forward;
    int64_t widths = p.layers[0].in, weights = 0;
    for (int64_t l = 0; l < p.num_layers; ++l) {
      widths += p.layers[l].out;
      weights += p.layers[l].in * p.layers[l].out;
    }
    int64_t largest = kMaxTile;
    while (largest > kPanel<A> && largest * widths > (int64_t{1} << 20)) largest /= 2;
    const int64_t largest_tile = largest;
    // A small batch of a large network in several blocks, so that one member alone has work for several threads.
    if (weights >= kLargeNetwork && p.batch <= 512) {
      largest = std::min<int64_t>(largest, std::max<int64_t>(kPanel<A>, p.batch <= 128 ? 64 : 128));
    }
    blocks = std::max<int64_t>(1, (p.batch + largest - 1) / largest);  // of an empty batch too
    block = round_up((p.batch + blocks - 1) / blocks, kPanel<A>);
    blocks = (p.batch + block - 1) / block;
    tile = block;
    tiles = blocks;
    tiles_per_span = (tiles + kMaxSpans - 1) / kMaxSpans;
    spans = (tiles + tiles_per_span - 1) / tiles_per_span;

    member_gradients = 0;
    lowest = p.num_layers;
    for (int64_t l = p.num_layers; l-- > 0;) {
      const MLPLayerGradient requested = requested_gradient(t, l);
      if (requested.weight) member_gradients += p.layers[l].out * p.layers[l].in;
      for (const void* of : {requested.bias, requested.norm_weight, requested.norm_bias}) {
        if (of) member_gradients += p.layers[l].out;
      }
      if (requested.any()) lowest = l;
    }
    if (t.grad_input) lowest = 0;

    const bool shared = t.grad_input && t.sum_grad_input;
    group_members = shared ? (p.ensemble_size + kMaxGroups - 1) / kMaxGroups : 1;
    groups = (p.ensemble_size + group_members - 1) / group_members;
    // Where members alone would leave threads idle for longer than sums of each span cost: some 12 bytes for each
    // weight against 6 multiply-adds for each weight and example. It changes no bit.
    constexpr double kMostBytes = 1 << 29, kRecycledBytes = 32 << 20;  // beyond: fresh pages
    const int64_t rounds = (groups + t.threads - 1) / std::max(t.threads, 1);
    const double busy = static_cast<double>(groups) / static_cast<double>(rounds * t.threads);
    const double bytes = static_cast<double>(spans * p.ensemble_size * member_gradients) *
                         static_cast<double>(sizeof(Real));
    const double cost = 20 * static_cast<double>(spans) / static_cast<double>(p.batch) *
                        (bytes > kRecycledBytes ? 3 : 1);
    by_span = t.threads > 1 && spans > 1 && groups < 4 * t.threads && 1 - busy > cost &&
              bytes < kMostBytes;
    // With work enough for all threads, weights pass once for several blocks. (A norm's sums are of a whole tile.)
    if (!by_span && tiles_per_span == 1 && !p.rich() && block < largest_tile) {
      tile = block * (largest_tile / block);
      tiles = spans = (p.batch + tile - 1) / tile;
    }
    input_gradients = shared ? tiles * tile * p.layers[0].in : 0;
    by_rows = A::kDirect && p.batch <= kFewExamples<Real> && !t.grad_input && !p.rich() &&
              !p.dropout.any() && !p.kept;
  }

  // Sums of tiles are added up as they come, all in one place.
  bool in_order() const { return !by_span && (spans == 1 || tiles_per_span == 1); }
  // That place is the result.
  bool direct(const Training& t) const { return in_order() && !t.steps; }
  int64_t items() const { return by_span ? spans * groups : groups; }
  // Into how many parts the last round cuts what it does for one member.
  int64_t finish_parts(const Training& t) const {
    return by_span ? std::clamp<int64_t>(2 * t.threads / t.forward.ensemble_size, 1, 16) : 1;
  }
};

// Where the gradients of a member go, from its last layer down: into the results, or one after the other.
template <class Real>
struct GradientPlaces {
  int64_t member;
  Real* sums;  // nullptr: results

  MLPLayerGradient next(const Training& t, int64_t l) {
    MLPLayerGradient to = requested_gradient(t, l);
    const MLPLayer& layer = t.forward.layers[l];
    const auto take = [&](void*& place, int64_t size) {
      if (!place) return;
      place = sums ? std::exchange(sums, sums + size) : static_cast<Real*>(place) + member * size;
    };
    take(to.weight, layer.out * layer.in);
    for (void** place : {&to.bias, &to.norm_weight, &to.norm_bias}) take(*place, layer.out);
    return to;
  }
};

// Shared by all threads: what one round leaves for the next.
template <class A>
struct TrainingPartial {
  using Real = typename A::Real;
  double* weight_scale;  // [E], by which sample weights are multiplied
  double* weight_sum;    // [E], of weights times that
  double* loss_sum;      // [E, blocks]
  Real* gradients;       // [spans, E, member_gradients], by_span
  Real* input;           // [groups, tiles, panels of in], of a shared input
  size_t bytes;

  TrainingPartial(const Training& t, const TrainingSchedule<A>& s) {
    const int64_t e = t.forward.ensemble_size;
    bytes = 0;
    auto take = [&](int64_t size) {
      char* at = t.partial ? static_cast<char*>(t.partial) + bytes : nullptr;
      bytes += static_cast<size_t>(round_up(size, 64));
      return at;
    };
    const auto real = static_cast<int64_t>(sizeof(Real)),
               wide = static_cast<int64_t>(sizeof(double));
    weight_scale = reinterpret_cast<double*>(take(e * wide));
    weight_sum = reinterpret_cast<double*>(take(e * wide));
    loss_sum = reinterpret_cast<double*>(take(e * s.blocks * wide));
    gradients =
        reinterpret_cast<Real*>(take(s.by_span ? s.spans * e * s.member_gradients * real : 0));
    input = reinterpret_cast<Real*>(take(s.groups * s.input_gradients * real));
  }
};

inline int64_t outputs_of(const Training& t) {
  return t.forward.layers[t.forward.num_layers - 1].out;
}
inline int64_t target_features(const Training& t) { return target_features(t, outputs_of(t)); }
inline int64_t loss_terms(const Training& t) { return loss_terms(t, outputs_of(t)); }

// Whether the derivative of layer l's activation gets panels of its own.
inline bool needs_slope(const EnsembleMLPParams& p, int64_t l) {
  const MLPLayer& layer = p.layers[l];
  const bool identity = layer.activation.kind == ActivationKind::identity;
  if (l + 1 == p.num_layers || layer.rich())
    return !identity && !(l + 1 < p.num_layers && slope_shows(layer));
  return !slope_shows(layer);
}

// Room for a tile's features in units, where a unit is not a Real.
template <class A>
int64_t units_of_tile(int64_t tile, int64_t features) {
  return A::kPerUnit == 1 ? 0 : tile * units<A>(features);
}

// Of one thread.
template <class A>
struct TrainingScratch {
  using Real = typename A::Real;
  Real* input;                   // panels of the tile's input
  Real* target;                  // panels of its targets
  Real* example_weight;          // [tile], scaled; 0 behind the last example
  Real* class_weight;            // [out], scaled, where there are some
  Real** hidden;                 // [layers]: panels of what each layer puts out
  const Real** reads;            // [layers]: panels of what each layer reads
  Real** slope;                  // [layers]: derivative of the activation there, where it is needed
  Normalized<Real>* normalized;  // [layers]: of a norm there
  Real* output;                  // where the outputs' place has their gradient, the outputs
  Real* gradient[2];             // by what a layer reads, in turn
  Real* rows[2];                 // by_rows: what a layer reads, and the slopes there
  Real* units[2];                // what a product reads, where a unit is not a Real
  Real* weights;                 // a block of weights, converted
  Real* input_rows;              // inputs for a weight gradient, as rows
  Real* bias;                    // of one layer
  Real* norm;                    // weights and biases of one norm
  Real* norm_sums;               // their gradients over the tile, lane by lane
  Real* member;  // gradients of one member: over one of several spans, or for a step
  Real* total;   // for a step after several spans: over all of them
  size_t bytes;

  TrainingScratch(const Training& t, const TrainingSchedule<A>& s, void* base) {
    const EnsembleMLPParams& p = t.forward;
    bytes = 0;
    auto take = [&](int64_t size) {
      char* at = base ? static_cast<char*>(base) + bytes : nullptr;
      bytes += static_cast<size_t>(round_up(size, 64));
      return at;
    };
    auto reals = [&](int64_t n) {
      return reinterpret_cast<Real*>(take(n * static_cast<int64_t>(sizeof(Real))));
    };
    const int64_t pointers = p.num_layers * static_cast<int64_t>(sizeof(Real*));
    hidden = reinterpret_cast<Real**>(take(pointers));
    reads = reinterpret_cast<const Real**>(take(pointers));
    slope = reinterpret_cast<Real**>(take(pointers));
    normalized = reinterpret_cast<Normalized<Real>*>(
        take(p.num_layers * static_cast<int64_t>(sizeof(Normalized<Real>))));
    input = reals(s.tile * p.layers[0].in);
    target = reals(s.tile * target_features(t));
    example_weight = reals(s.tile);
    class_weight = reals(t.of_loss.class_weight ? outputs_of(t) : 0);
    int64_t widest = t.grad_input ? p.layers[0].in : 0;  // of the layers' inputs
    for (int64_t l = 0; l < p.num_layers; ++l) {
      const bool last = l + 1 == p.num_layers;
      const MLPLayer& layer = p.layers[l];
      const bool has_slope = l >= s.lowest && needs_slope(p, l);
      const bool has_norm = l >= s.lowest && layer.has_norm();
      Real* h = reals(s.tile * layer.out);
      Real* d = reals(has_slope ? s.tile * layer.out : 0);
      Real* x = reals(has_norm ? s.tile * layer.out : 0);
      Real* r = reals(has_norm ? s.tile : 0);
      if (base) {
        hidden[l] = h, slope[l] = has_slope ? d : nullptr;
        normalized[l] = has_norm ? Normalized<Real>{x, r} : Normalized<Real>{};
      }
      if (!last) widest = std::max(widest, layer.out);
    }
    const int64_t outputs = p.layers[p.num_layers - 1].out;
    output = reals(t.loss == Loss::none && keeps(p, p.num_layers - 1) ? s.tile * outputs : 0);
    if (s.by_rows) widest = row_stride<Real>(std::max(widest, p.layers[p.num_layers - 1].out));
    for (Real*& g : gradient) g = reals(s.lowest < p.num_layers ? s.tile * widest : 0);
    for (Real*& r : rows) {
      r = reals(s.by_rows ? s.tile * row_stride<Real>(std::max(widest, p.layers[0].in)) : 0);
    }
    const int64_t most_units = units_of_tile<A>(s.tile, std::max(p.layers[0].in, max_width(p)));
    for (Real*& of_product : units) of_product = reals(most_units);
    weights = reals(kNeuronBlock * kBlock);
    input_rows = reals(s.tile * kPanelOf<Real>);
    bias = reals(round_up(max_width(p), kNarrowLanes<Real>));
    norm = reals(p.rich() ? 2 * max_width(p) : 0);
    norm_sums = reals(p.rich() ? 2 * max_width(p) * lanes_of<Wide<Real>>() : 0);
    member = reals(s.by_span || s.direct(t) ? 0 : s.member_gradients);
    total = reals(s.by_span || s.in_order() ? 0 : s.member_gradients);
  }
};

}  // namespace pyens::PYENS_ISA::ensemble_mlp
