// An optimizer's step within a training pass: the same bits as the gradients and then the step, however the pass is cut
// and the threads split it, on buffers that end where the sanitizers watch.

#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/ensemble_mlp.h"

namespace {

using namespace pyens;

int failures = 0;

struct Case {
  DType dtype;
  Optimizer optimizer;
  int64_t ensemble_size, batch;
  std::vector<int64_t> widths;
  bool normed;
};

// A tensor of any element type, filled with numbers that it holds.
struct Buffer {
  size_t size = 0;
  std::unique_ptr<char[]> data;

  Buffer(DType dtype, int64_t elements, std::mt19937& draw, double least, double most)
      : size(static_cast<size_t>(elements) * element_size(dtype)), data(new char[size]) {
    std::uniform_real_distribution<float> number(static_cast<float>(least),
                                                 static_cast<float>(most));
    for (int64_t i = 0; i < elements; ++i) {
      const float f = number(draw);
      char* const at = data.get() + static_cast<size_t>(i) * element_size(dtype);
      uint32_t bits = 0;
      std::memcpy(&bits, &f, 4);
      if (dtype == DType::float32) std::memcpy(at, &f, 4);
      if (dtype == DType::float64) {
        const double d = f;
        std::memcpy(at, &d, 8);
      }
      if (dtype == DType::bfloat16) std::memcpy(at, reinterpret_cast<char*>(&bits) + 2, 2);
      if (dtype == DType::float16) {  // of normal numbers
        const uint32_t exponent = (bits >> 23 & 0xff) - 127 + 15;
        const bool tiny = (bits >> 23 & 0xff) < 127 - 14;
        const auto half = static_cast<uint16_t>((bits >> 16 & 0x8000) |
                                                (tiny ? 0 : exponent << 10 | (bits >> 13 & 0x3ff)));
        std::memcpy(at, &half, 2);
      }
    }
  }
  Buffer(const Buffer& other) : size(other.size), data(new char[other.size]) {
    std::memcpy(data.get(), other.data.get(), size);
  }
  bool operator==(const Buffer& other) const {
    return size == other.size && std::memcmp(data.get(), other.data.get(), size) == 0;
  }
};

// A network's parameters with what an optimizer remembers of them.
struct Model {
  std::vector<Buffer> tensors, states;  // three states of each
  std::vector<int64_t> sizes;
};

StepParams step_params(Optimizer optimizer) {
  StepParams p{};
  p.optimizer = optimizer;
  p.weight_decay = 0.01;
  p.shrink = 0.99;
  p.beta1 = 0.9;
  p.beta2 = 0.99;
  p.amsgrad = true;
  p.eps = 1e-6;
  p.momentum = 0.9;
  return p;
}

size_t states_of(Optimizer optimizer) { return optimizer == Optimizer::adam ? 3 : 1; }

void run(const Case& c) {
  std::mt19937 draw(static_cast<unsigned>(c.batch * 31 + c.ensemble_size));
  const auto count = static_cast<int64_t>(c.widths.size()) - 1;
  const DType real = c.dtype == DType::float64 ? DType::float64 : DType::float32;
  Model model;
  const auto add = [&](int64_t elements) {
    model.sizes.push_back(elements);
    model.tensors.emplace_back(c.dtype, elements, draw, -0.5, 0.5);
    for (int s = 0; s < 3; ++s) model.states.emplace_back(c.dtype, elements, draw, 0.125, 1);
  };
  // Of each layer weight and bias, and of the first one those of its norm.
  for (int64_t l = 0; l < count; ++l) {
    const int64_t in = c.widths[static_cast<size_t>(l)], out = c.widths[static_cast<size_t>(l) + 1];
    add(c.ensemble_size * out * in);
    add(c.ensemble_size * out);
    if (l == 0 && c.normed) {
      add(c.ensemble_size * out);
      add(c.ensemble_size * out);
    }
  }
  const Buffer input(c.dtype, c.batch * c.widths[0], draw, -1, 1);
  const Buffer target(real, c.batch * c.widths.back(), draw, -1, 1);

  // A pass over a copy of the model: with steps, or with gradients and then steps.
  const auto train = [&](bool in_pass, int threads, int64_t chunk) {
    Model own = model;
    std::vector<MLPLayer> layers(static_cast<size_t>(count));
    std::vector<MLPLayerGradient> gradients(layers.size());
    std::vector<MLPLayerSteps> steps(layers.size());
    std::vector<Buffer> gradient_data;
    std::vector<StepTensor> tensors(own.tensors.size());
    const StepParams params = step_params(c.optimizer);
    for (size_t i = 0; i < own.tensors.size(); ++i) {
      gradient_data.emplace_back(real, own.sizes[i], draw, 7, 8);
      StepTensor& t = tensors[i];
      t.dtype = c.dtype;
      t.size = own.sizes[i];
      t.parameter = own.tensors[i].data.get();
      for (size_t s = 0; s < states_of(c.optimizer); ++s) {
        t.state[s] = own.states[3 * i + s].data.get();
      }
      t.rate = 0.01;
      t.root_correction = 1.5;
    }
    size_t next = 0;
    for (int64_t l = 0; l < count; ++l) {
      MLPLayer& layer = layers[static_cast<size_t>(l)];
      layer.in = c.widths[static_cast<size_t>(l)];
      layer.out = c.widths[static_cast<size_t>(l) + 1];
      const auto take = [&](void*& gradient, MLPParameterStep& step) -> const void* {
        const size_t i = next++;
        step = {&params, &tensors[i]};
        gradient = in_pass ? tensors[i].parameter : gradient_data[i].data.get();
        return tensors[i].parameter;
      };
      MLPLayerGradient& gradient = gradients[static_cast<size_t>(l)];
      MLPLayerSteps& step = steps[static_cast<size_t>(l)];
      layer.weight = {take(gradient.weight, step.weight), layer.out * layer.in, layer.in, c.dtype};
      layer.bias = {take(gradient.bias, step.bias), layer.out};
      layer.activation.kind = l + 1 < count ? ActivationKind::relu : ActivationKind::identity;
      if (l == 0 && c.normed) {
        layer.norm.kind = NormKind::layer_norm;
        layer.norm.epsilon = 1e-5;
        layer.norm.weight = {take(gradient.norm_weight, step.norm_weight), layer.out};
        layer.norm.bias = {take(gradient.norm_bias, step.norm_bias), layer.out};
      }
    }
    ensemble_mlp_cpu::Training t{};
    EnsembleMLPParams& p = t.forward;
    p.dtype = c.dtype;
    p.ensemble_size = c.ensemble_size;
    p.num_layers = count;
    p.layers = layers.data();
    p.batch = c.batch;
    p.input = input.data.get();
    p.input_row_stride = c.widths[0];
    t.loss = Loss::mse;
    t.target = target.data.get();
    t.target_row_stride = c.widths.back();
    Buffer losses(real, c.ensemble_size, draw, 7, 8);
    t.loss_output = losses.data.get();
    t.gradients = gradients.data();
    t.steps = in_pass ? steps.data() : nullptr;
    t.threads = threads;
    const auto plan = ensemble_mlp_cpu::plan_training(t);
    const std::unique_ptr<char[]> partial(new char[plan.partial_bytes + 64]);
    const std::unique_ptr<char[]> scratch(new char[plan.scratch_bytes + 64]);
    const auto aligned = [](char* at) {
      return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(at) + 63) / 64 * 64);
    };
    t.partial = aligned(partial.get());
    ensemble_mlp_cpu::prepare_training(t, 0, c.ensemble_size);
    for (int64_t i = 0; i < plan.items; i += chunk) {
      ensemble_mlp_cpu::train(t, i, std::min(plan.items, i + chunk), aligned(scratch.get()));
    }
    for (int64_t i = 0; i < plan.finish_items; i += chunk) {
      ensemble_mlp_cpu::finish_training(t, i, std::min(plan.finish_items, i + chunk));
    }
    if (!in_pass) {
      for (size_t i = 0; i < tensors.size(); ++i) {
        // 16-bit parameters have 16-bit gradients: rounded by a step of SGD from 0 with a rate of -1.
        Buffer rounded(c.dtype, own.sizes[i], draw, 0, 0);
        const void* gradient = gradient_data[i].data.get();
        if (c.dtype != real) {
          for (int64_t e = 0; e < own.sizes[i]; ++e) {
            float f;
            std::memcpy(&f, gradient_data[i].data.get() + 4 * e, 4);
            uint16_t h = 0;
            if (c.dtype == DType::bfloat16) {
              uint32_t bits;
              std::memcpy(&bits, &f, 4);
              h = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
            } else {
              const _Float16 half = static_cast<_Float16>(f);
              std::memcpy(&h, &half, 2);
            }
            std::memcpy(rounded.data.get() + 2 * e, &h, 2);
          }
          gradient = rounded.data.get();
        }
        optimizers_cpu::step(params, tensors[i], gradient, 0, own.sizes[i]);
      }
    }
    own.tensors.push_back(losses);
    return own;
  };

  const Model expected = train(false, 1, 1 << 20);
  for (const int threads : {1, 2, 7}) {
    for (const int64_t chunk : {int64_t{1}, int64_t{3}, int64_t{1} << 20}) {
      const Model found = train(true, threads, chunk);
      bool same = true, changed = false;
      for (size_t i = 0; i < found.tensors.size(); ++i) {
        same = same && found.tensors[i] == expected.tensors[i];
        changed = changed || (i < model.tensors.size() && !(found.tensors[i] == model.tensors[i]));
      }
      for (size_t i = 0; i < found.states.size(); ++i) {
        same = same && found.states[i] == expected.states[i];
      }
      if (same && changed) continue;
      ++failures;
      std::printf("FAILED: dtype %d, optimizer %d, E %lld, B %lld, threads %d, chunk %lld: %s\n",
                  static_cast<int>(c.dtype), static_cast<int>(c.optimizer),
                  static_cast<long long>(c.ensemble_size), static_cast<long long>(c.batch), threads,
                  static_cast<long long>(chunk), same ? "nothing changed" : "other bits");
    }
  }
}

}  // namespace

int main() {
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    for (const Optimizer optimizer : {Optimizer::adam, Optimizer::adagrad, Optimizer::sgd}) {
      for (const int64_t batch : {1, 5, 17, 300}) {
        run({dtype, optimizer, 3, batch, {11, 19, 2}, false});
        run({dtype, optimizer, 3, batch, {11, 19, 7, 2}, true});
      }
    }
  }
  // Several blocks of a large network, and more tiles than spans.
  run({DType::float32, Optimizer::adam, 1, 200, {180, 190, 3}, false});
  run({DType::float32, Optimizer::adam, 2, 5000, {3, 4, 1}, false});
  run({DType::bfloat16, Optimizer::adam, 2, 5000, {3, 4, 1}, false});
  if (failures != 0) return 1;
  std::printf("ensemble_mlp_loss_step: fine on %s\n", pyens::cpu_capability());
  return 0;
}
