// One training pass of the ensemble MLP: forward, loss, backward, tile by tile.
//
// A tile of examples goes through all layers of one member and back before the next one starts, so
// activations are never stored: they lie in cache, in the panels of ensemble_mlp_panels-inl.h. (A forward
// pass may have kept its sums: then the pass begins with those.) Three products per layer, each bound by
// multiply-adds:
//
//   outputs          z = W x      kRows neurons x kVectors vectors in registers, weights broadcast
//   input gradients  W^T g        the same with the weights read down their columns
//   weight gradients g x^T        see ensemble_mlp_gradients-inl.h
//
// Between the products everything is Real. Where a unit is a pair of bfloat16 (weight_formats-inl.h), the
// operands of a product are rounded and paired on their way into it: along the inputs, along the outputs,
// and along the examples.
//
// Order of summation, fixed by the batch and the layer alone. A weight gradient: one chain of multiply-adds over
// a block's examples; of narrow layers, as every bias: per lane one chain, the lanes in a tree. The blocks of a span
// in order; the (at most kMaxSpans) spans in order. The gradient of a shared input: members in order within each
// of at most kMaxGroups groups, the groups in order. So no bit depends on the number of threads, and
// but for a shared input none on the members beside.

#include "kernels/cpu/register_blocks-inl.h"
#include "kernels/cpu/sparse_rows-inl.h"
#include "kernels/cpu/elementary-inl.h"
#include "kernels/cpu/activations-inl.h"
#include "kernels/cpu/ensemble_mlp_common-inl.h"
#include "kernels/cpu/ensemble_mlp_epilogue-inl.h"
#include "kernels/cpu/ensemble_mlp_losses-inl.h"
#include "kernels/cpu/ensemble_mlp_panels-inl.h"
#include "kernels/cpu/ensemble_mlp_training_plan-inl.h"
#include "kernels/cpu/ensemble_mlp_gradients-inl.h"

namespace pyens::PYENS_ISA::ensemble_mlp {

// --- one member over one tile ----------------------------------------------------------------------

// Which tile of a shared input and of a shared target is in scratch already.
struct InPanels {
  int64_t input = -1, target = -1;
};

template <class A>
void load_tile(const Training& t, const TrainingSchedule<A>& s, const TrainingPartial<A>& partial,
               int64_t member, int64_t tile, const TrainingScratch<A>& scratch,
               InPanels& in_panels) {
  using Real = typename A::Real;
  using Elem = typename A::Elem;
  using Widened = Plain<Elem, Real>;
  const EnsembleMLPParams& p = t.forward;
  const int64_t first = tile * s.tile, examples = std::min(s.tile, p.batch - first);
  const auto* weight = static_cast<const Real*>(t.sample_weight);
  if (weight) weight += member * t.sample_weight_member_stride + first;
  // Examples that are left out are 0 in the input, so that nothing in them reaches a gradient.
  const bool same_for_all = !weight || t.sample_weight_member_stride == 0;
  if (p.input_member_stride != 0 || !same_for_all || in_panels.input != tile) {
    const auto* rows = static_cast<const Elem*>(p.input) + member * p.input_member_stride +
                       first * p.input_row_stride;
    to_panels<Widened>(rows, p.input_row_stride, examples, p.layers[0].in, scratch.input, weight);
    in_panels.input = tile;
    for (int64_t b = 0; b < s.tile; ++b) {
      scratch.example_weight[b] =
          b >= examples ? 0
          : weight      ? scaled_sample_weight(weight[b], partial.weight_scale[member])
                        : 1;
    }
  }
  // A given gradient of activated outputs has been multiplied by the slopes where it was.
  const bool changed = t.loss == Loss::none && keeps(p, p.num_layers - 1);
  if (t.target_member_stride == 0 && in_panels.target == tile && !changed) return;
  in_panels.target = tile;
  const int64_t offset = member * t.target_member_stride + first * t.target_row_stride;
  if (t.loss == Loss::none) {  // into the place of the outputs
    to_panels<Widened>(static_cast<const Elem*>(t.target) + offset, t.target_row_stride, examples,
                       target_features(t), scratch.hidden[p.num_layers - 1]);
  } else if (t.loss == Loss::cross_entropy) {
    const auto* labels = static_cast<const int64_t*>(t.target) + offset;
    for (int64_t b = 0; b < examples; ++b) {
      scratch.target[b] = static_cast<Real>(labels[b * t.target_row_stride]);
    }
    std::fill(scratch.target + examples, scratch.target + s.tile, 0);
  } else {
    to_panels<Plain<Real, Real>>(static_cast<const Real*>(t.target) + offset, t.target_row_stride,
                                 examples, target_features(t), scratch.target);
  }
}

// The way back through rows, from panels of the gradient by the sums of the last layer. `sums`: as in train_tile.
template <class A>
void backward_by_rows(const Training& t, const TrainingSchedule<A>& s, int64_t member,
                      const TrainingScratch<A>& scratch, typename A::Real* sums) {
  using Real = typename A::Real;
  const EnsembleMLPParams& p = t.forward;
  const int64_t examples = p.batch, top = p.num_layers - 1;
  Real* gradient = scratch.gradient[top % 2];
  to_rows(scratch.hidden[top], p.layers[top].out, examples, gradient);
  GradientPlaces<Real> places{member, sums};
  for (int64_t l = top; l >= s.lowest; --l) {
    const MLPLayer& layer = p.layers[l];
    const MLPLayerGradient to = places.next(t, l);
    const auto* x = static_cast<const Real*>(p.input) + member * p.input_member_stride;
    int64_t x_stride = p.input_row_stride;
    if (l > 0 || t.sample_weight || layer.in < kWideLanes<Real>) {
      to_rows(scratch.reads[l], layer.in, examples, scratch.rows[0]);
      x = scratch.rows[0];
      x_stride = row_stride<Real>(layer.in);
    }
    if (to.weight) {
      weight_gradient_of_rows(gradient, layer.out, x, x_stride, layer.in, examples,
                              static_cast<Real*>(to.weight));
    }
    if (to.bias) {
      bias_gradient_of_rows(gradient, layer.out, examples, static_cast<Real*>(to.bias));
    }
    if (l == s.lowest) break;
    const Real* slope = scratch.slope[l - 1];
    if (slope) {
      to_rows(slope, layer.in, examples, scratch.rows[1]);
      slope = scratch.rows[1];
    }
    Real* const result = scratch.gradient[(l - 1) % 2];
    input_gradient_of_rows<A>(p, l, member, examples, gradient, result, x, slope,
                              scratch.example_weight);
    gradient = result;
  }
}

// `losses` become the weighted sums of the examples' losses, one for each block. `sums` are the member's gradients:
// weight and bias of each layer that are asked for, one after the other from the last layer down; nullptr: the results.
template <class A>
void train_tile(const Training& t, const TrainingSchedule<A>& s, int64_t member, int64_t tile,
                typename A::Real scale, const TrainingScratch<A>& scratch, typename A::Real* sums,
                bool first_sum, typename A::Real* shared_input, bool first_member, double* losses) {
  using Real = typename A::Real;
  using Elem = typename A::Elem;
  const EnsembleMLPParams& p = t.forward;
  const int64_t first = tile * s.tile, examples = std::min(s.tile, p.batch - first);
  const int64_t layers = p.num_layers;
  const int64_t out = p.layers[layers - 1].out;
  const int64_t panels = (examples + kPanel<A> - 1) / kPanel<A>;

  const Real* x = scratch.input;
  for (int64_t l = 0; l < layers; ++l) {
    const MLPLayer& layer = p.layers[l];
    const bool last = l + 1 == layers, gradient_given = last && t.loss == Loss::none;
    scratch.reads[l] = x;
    if (gradient_given && !keeps(p, l)) break;
    Real* h = gradient_given ? scratch.output : scratch.hidden[l];
    const Real* const kept = kept_sums<Real>(p, member, l, first);
    if (kept && sums_are_read(p, member, l)) {
      x = kept;
      continue;
    }
    if (!kept) {
      forward_layer<A>(layer, p.parameters_of(member), examples,
                       A::hidden_panels(x, panels, layer.in, scratch.units[0]), h, scratch.weights,
                       scratch.bias);
    }
    // A norm and its way back sum over all lanes.
    if (p.rich() && !kept) clear_padding(h, layer.out, examples);
    if (last) {
      output_activation<Real>(layer, examples, kept ? kept : h, h, scratch.slope[l]);
      break;
    }
    hidden_epilogue<A>(p, l, member, first, examples, kept ? kept : h, h, scratch.slope[l], x,
                       scratch.norm, scratch.normalized[l]);
    if (p.rich()) clear_padding(h, layer.out, examples);
    x = h;
  }

  if (t.of_loss.class_weight) scale_class_weights(t, member, out, scratch.class_weight);
  for (int64_t b = 0; b < examples; b += s.block) {
    losses[b / s.block] =
        loss_tile(t, member, scratch.class_weight, scratch.hidden[layers - 1] + b * out, out,
                  scratch.target + b * target_features(t), target_features(t),
                  scratch.example_weight + b, std::min(s.block, examples - b), scale);
  }

  Real* gradient = scratch.hidden[layers - 1];
  if (s.by_rows) {
    if (s.lowest == layers) return;
    if (scratch.slope[layers - 1]) {
      multiply_by_slope(out, examples, scratch.example_weight, scratch.slope[layers - 1], gradient);
    }
    if constexpr (A::kDirect) backward_by_rows(t, s, member, scratch, sums);
    return;
  }
  GradientPlaces<Real> places{member, sums};
  for (int64_t l = layers; l-- > s.lowest;) {
    const MLPLayer& layer = p.layers[l];
    const int64_t rows = layer.out, in = layer.in;
    const bool goes_on = l > s.lowest || (l == 0 && t.grad_input);
    const MLPLayerGradient to = places.next(t, l);
    Real* const result = l == 0 && shared_input ? shared_input : scratch.gradient[l % 2];
    bool add = l == 0 && shared_input && !first_member;
    if (l + 1 == layers) {
      if (scratch.slope[l]) {
        multiply_by_slope(rows, examples, scratch.example_weight, scratch.slope[l], gradient);
      }
    } else if (layer.rich()) {
      if (layer.residual && goes_on) {  // the other way to what the layer reads
        add_panels(gradient, round_up(examples, kPanel<A>) * rows, result, !add);
        add = true;
      }
      clear_padding(gradient, rows, examples);
      epilogue_gradient<A>(p, l, member, first, examples, scratch, gradient, to, first_sum);
    }
    if (to.weight) {
      const bool given = l == 0 && A::kDirect && !t.sample_weight;  // as rows
      const auto* from = static_cast<const Elem*>(p.input) + member * p.input_member_stride +
                         first * p.input_row_stride;
      weight_gradient<A>(s, p.batch, l == 0, gradient, rows, scratch.reads[l], in, examples,
                         given ? reinterpret_cast<const Real*>(from) : nullptr, p.input_row_stride,
                         static_cast<Real*>(to.weight), first_sum, scratch);
    }
    for (int64_t b = 0; to.bias && b < examples; b += s.block) {
      bias_gradient(gradient + b * rows, rows, p.batch, std::min(s.block, examples - b),
                    static_cast<Real*>(to.bias), first_sum && b == 0);
    }
    if (!goes_on) break;
    const Real* const g = A::hidden_panels(gradient, panels, rows, scratch.units[0]);
    input_gradient<A>(p, l, member, examples, g, result, add, scratch.reads[l],
                      l > 0 ? scratch.slope[l - 1] : nullptr, scratch.example_weight,
                      scratch.weights);
    if (l == 0 && !shared_input) {
      from_panels<Plain<Real, Real>>(
          result, examples, in, static_cast<Real*>(t.grad_input) + (member * p.batch + first) * in);
    }
    gradient = result;
  }
}

// --- the rounds ------------------------------------------------------------------------------------

template <class A>
ensemble_mlp_cpu::TrainingPlan plan_training(const Training& t) {
  const TrainingSchedule<A> s(t);
  const EnsembleMLPParams& p = t.forward;
  ensemble_mlp_cpu::TrainingPlan plan{};
  plan.items = s.items();
  plan.partial_bytes = TrainingPartial<A>(t, s).bytes;
  plan.scratch_bytes = TrainingScratch<A>(t, s, nullptr).bytes;
  double work = 1;
  for (int64_t l = 0; l < p.num_layers; ++l) {
    work += 3 * static_cast<double>(p.layers[l].in * p.layers[l].out * (p.batch + 1));
  }
  plan.grain_size = items_worth_a_thread(kMultiplyAddsWorthAThread,
                                         work * static_cast<double>(p.ensemble_size), plan.items);
  // Parts of members, then tiles of a shared input.
  plan.finish_items = p.ensemble_size * s.finish_parts(t) + (s.input_gradients ? s.tiles : 0);
  const bool sums = s.by_span || s.input_gradients;
  plan.finish_grain_size = sums ? 1 : plan.finish_items;
  return plan;
}

template <class A>
ensemble_mlp_cpu::TrainingError prepare_training(const Training& t, int64_t begin, int64_t end) {
  using Real = typename A::Real;
  using ensemble_mlp_cpu::TrainingError;
  const TrainingPartial<A> partial(t, TrainingSchedule<A>(t));
  const EnsembleMLPParams& p = t.forward;
  const int64_t classes = outputs_of(t);
  const bool own_weights = (t.sample_weight && t.sample_weight_member_stride != 0) ||
                           (t.of_loss.class_weight && (t.of_loss.class_weight_member_stride != 0 ||
                                                       t.target_member_stride != 0));
  for (int64_t m = begin; m < end; ++m) {
    const auto* weight = static_cast<const Real*>(t.sample_weight);
    if (weight) weight += m * t.sample_weight_member_stride;
    double scale = 1, sum = weight ? 0 : static_cast<double>(p.batch);
    if (m > begin && !own_weights) {
      scale = partial.weight_scale[begin];
      sum = partial.weight_sum[begin];
    } else if (weight) {
      Real largest = 0;
      for (int64_t b = 0; b < p.batch; ++b) {
        if (!(weight[b] >= 0) || std::isinf(weight[b])) return TrainingError::sample_weight_invalid;
        largest = std::max(largest, weight[b]);
      }
      scale = sample_weight_scale(static_cast<double>(largest));
      for (int64_t b = 0; b < p.batch; ++b) sum += static_cast<double>(weight[b]) * scale;
    }
    partial.weight_scale[m] = scale;
    partial.weight_sum[m] = sum;
    if (t.loss != Loss::cross_entropy) continue;
    if (m > begin && !own_weights && t.target_member_stride == 0) continue;  // checked already
    const auto* labels = static_cast<const int64_t*>(t.target) + m * t.target_member_stride;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t label = labels[b * t.target_row_stride];
      const bool left_out = weight && weight[b] == 0;
      if (!left_out && (label < 0 || label >= classes)) return TrainingError::target_out_of_range;
    }
    if (!t.of_loss.class_weight) continue;
    // The mean divides by the weights of the examples times those of their classes.
    const auto* of_class = class_weights<Real>(t, m);
    const double class_scale = class_weight_scale(of_class, classes);
    sum = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      if (weight && weight[b] == 0) continue;
      const Real own = weight ? scaled_sample_weight(weight[b], scale) : 1;
      const Real by = scaled_sample_weight(of_class[labels[b * t.target_row_stride]], class_scale);
      sum += static_cast<double>(own) * static_cast<double>(by);
    }
    partial.weight_sum[m] = sum;
  }
  return TrainingError::none;
}

// visit(numbers before it, how many, result, step) for each gradient of a member, in the order of its sums.
template <class Visit>
void for_each_gradient(const Training& t, const Visit& visit) {
  int64_t before = 0;
  const auto of = [&](void* result, int64_t n, const MLPParameterStep& step) {
    if (!result) return;
    visit(before, n, result, step);
    before += n;
  };
  for (int64_t l = t.forward.num_layers; l-- > 0;) {
    const MLPLayer& layer = t.forward.layers[l];
    const MLPLayerGradient to = requested_gradient(t, l);
    const MLPLayerSteps steps = t.steps ? t.steps[l] : MLPLayerSteps{};
    of(to.weight, layer.out * layer.in, steps.weight);
    of(to.bias, layer.out, steps.bias);
    of(to.norm_weight, layer.out, steps.norm_weight);
    of(to.norm_bias, layer.out, steps.norm_bias);
  }
}

// to <- (first ? 0 : to) + sums
template <class Real>
void add_sums(const Real* sums, int64_t n, Real* to, bool first) {
  for (int64_t i = 0; i < n; ++i) to[i] = first ? sums[i] : to[i] + sums[i];
}

// Adds one member's sums over a span to the result: part `part` of so many.
template <class A>
void add_span(const Training& t, int64_t member, const typename A::Real* sums, bool first,
              int64_t part = 0, int64_t parts = 1) {
  using Real = typename A::Real;
  for_each_gradient(t, [&](int64_t before, int64_t n, void* result, const MLPParameterStep&) {
    const int64_t begin = n * part / parts, end = n * (part + 1) / parts;
    add_sums(sums + before + begin, end - begin, static_cast<Real*>(result) + member * n + begin,
             first);
  });
}

// The optimizer's steps of a part of one member, whose gradients are overwritten: 16-bit parameters have theirs
// rounded first, as if they were stored.
template <class A>
void step_member(const Training& t, int64_t member, typename A::Real* gradients, int64_t part = 0,
                 int64_t parts = 1) {
  using Real = typename A::Real;
  using Elem = typename A::Elem;
  for_each_gradient(
      t, [&](int64_t before, int64_t n, void* /*result*/, const MLPParameterStep& step) {
        const int64_t begin = n * part / parts, end = n * (part + 1) / parts;
        Real* const from = gradients + before + begin;
        auto* const to = reinterpret_cast<Elem*>(from);
        if constexpr (!std::is_same_v<Elem, Real>) {
          constexpr int64_t N = kWideLanes<Real>;
          for (int64_t i = 0; i < end - begin; i += N) {
            const int64_t count = std::min(N, end - begin - i);
            store_wide_first<Real>(to + i, load_wide_first<Real>(from + i, count), count);
          }
        }
        optimizers_cpu::step(*step.params, *step.tensor, to, member * n + begin, member * n + end);
      });
}

template <class A>
void train_group(const Training& t, const TrainingSchedule<A>& s, const TrainingPartial<A>& partial,
                 const TrainingScratch<A>& scratch, int64_t span, int64_t group,
                 InPanels& in_panels) {
  using Real = typename A::Real;
  const EnsembleMLPParams& p = t.forward;
  const int64_t first_member = group * s.group_members, first_tile = span * s.tiles_per_span;
  const int64_t last_member = std::min(first_member + s.group_members, p.ensemble_size);
  const int64_t last_tile = std::min(first_tile + s.tiles_per_span, s.tiles);
  for (int64_t m = first_member; m < last_member; ++m) {
    const double terms = partial.weight_sum[m] * static_cast<double>(loss_terms(t));
    Real scale = mean_scale<Real>(terms);
    if (t.member_scale) scale *= static_cast<const Real*>(t.member_scale)[m];
    Real* sums = s.by_span ? partial.gradients + (span * p.ensemble_size + m) * s.member_gradients
                 : s.direct(t) ? nullptr
                               : scratch.member;
    double* const losses = partial.loss_sum + m * s.blocks;
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      Real* shared_input = nullptr;
      if (s.input_gradients) {
        shared_input = partial.input + group * s.input_gradients + tile * s.tile * p.layers[0].in;
      }
      load_tile(t, s, partial, m, tile, scratch, in_panels);
      const bool first = tile == (s.in_order() ? 0 : first_tile);
      train_tile(t, s, m, tile, scale, scratch, sums, first, shared_input, m == first_member,
                 losses + tile * (s.tile / s.block));
    }
    if (s.by_span || s.direct(t)) continue;
    if (!t.steps) {
      add_span<A>(t, m, sums, span == 0);
      continue;
    }
    if (!s.in_order()) add_sums(sums, s.member_gradients, scratch.total, span == 0);
    if (span + 1 == s.spans) step_member<A>(t, m, s.in_order() ? sums : scratch.total);
  }
}

template <class A>
void train(const Training& t, int64_t begin, int64_t end, void* base) {
  const TrainingSchedule<A> s(t);
  const TrainingPartial<A> partial(t, s);
  const TrainingScratch<A> scratch(t, s, base);
  InPanels in_panels;
  if (s.by_span) {
    for (int64_t item = begin; item < end; ++item) {
      train_group(t, s, partial, scratch, item / s.groups, item % s.groups, in_panels);
    }
    return;
  }
  // Members run fastest: a shared input goes to panels once per tile. For steps spans do: the gradients of one member
  // are all that there ever is.
  const int64_t groups = end - begin;
  for (int64_t i = 0; i < groups * s.spans; ++i) {
    const int64_t span = t.steps ? i % s.spans : i / groups;
    const int64_t group = begin + (t.steps ? i / s.spans : i % groups);
    train_group(t, s, partial, scratch, span, group, in_panels);
  }
}

// Adds the groups' gradients of a tile of the shared input, in order.
template <class A>
void finish_shared_input(const Training& t, const TrainingSchedule<A>& s,
                         const TrainingPartial<A>& partial, int64_t tile) {
  using Real = typename A::Real;
  using V = WideOf<A>;
  const int64_t in = t.forward.layers[0].in, first = tile * s.tile;
  const int64_t examples = std::min(s.tile, t.forward.batch - first);
  Real* sum = partial.input + tile * s.tile * in;
  for (int64_t group = 1; group < s.groups; ++group) {
    const Real* more = sum + group * s.input_gradients;
    for (int64_t i = 0; i < s.tile * in; i += lanes_of<V>()) {
      store(sum + i, load<V>(sum + i) + load<V>(more + i));
    }
  }
  from_panels<Plain<Real, Real>>(sum, examples, in, static_cast<Real*>(t.grad_input) + first * in);
}

template <class A>
void finish_training(const Training& t, int64_t begin, int64_t end) {
  using Real = typename A::Real;
  const TrainingSchedule<A> s(t);
  const TrainingPartial<A> partial(t, s);
  const int64_t ensemble_size = t.forward.ensemble_size;
  const int64_t parts = s.finish_parts(t);
  for (int64_t item = begin; item < end; ++item) {
    if (item >= ensemble_size * parts) {
      finish_shared_input(t, s, partial, item - ensemble_size * parts);
      continue;
    }
    const int64_t member = item / parts, part = item % parts;
    if (t.loss_output && part == 0) {
      double loss = 0;
      for (int64_t i = 0; i < s.blocks; ++i) loss += partial.loss_sum[member * s.blocks + i];
      const double terms = partial.weight_sum[member] * static_cast<double>(loss_terms(t));
      static_cast<Real*>(t.loss_output)[member] = terms > 0 ? static_cast<Real>(loss / terms) : 0;
    }
    if (!s.by_span) continue;
    const auto sums_of = [&](int64_t span) {
      return partial.gradients + (span * ensemble_size + member) * s.member_gradients;
    };
    Real* const total = sums_of(0);
    for (int64_t span = 0; !t.steps && span < s.spans; ++span) {
      add_span<A>(t, member, sums_of(span), span == 0, part, parts);
    }
    for (int64_t span = 1; t.steps && span < s.spans; ++span) {
      for_each_gradient(t, [&](int64_t before, int64_t n, void*, const MLPParameterStep&) {
        const int64_t from = n * part / parts, to = n * (part + 1) / parts;
        add_sums(sums_of(span) + before + from, to - from, total + before + from, false);
      });
    }
    if (t.steps) step_member<A>(t, member, total, part, parts);
  }
}

template <class A>
constexpr TrainingFunctions kTrainingFunctionsOf = {plan_training<A>, prepare_training<A>, train<A>,
                                                    finish_training<A>};
#if PYENS_HAS(AVX512_BF16)
constexpr TrainingFunctions kPairTrainingFunctions = kTrainingFunctionsOf<Bfloat16Pairs>;
#else
template <class E, class R>
constexpr TrainingFunctions kTrainingFunctions = kTrainingFunctionsOf<Plain<E, R>>;
#endif

}  // namespace pyens::PYENS_ISA::ensemble_mlp
