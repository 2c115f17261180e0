// The activations of hidden layers: the one list that names, errors, the CPU's and the GPU's kernels and
// the operations read. Their formulas are in kernels/activation_formulas-inl.h.
#pragma once

#include <optional>
#include <string_view>

#include "kernels/types.h"

// X(name, type of the formulas, default of the parameter), as in torch.nn with default arguments. The
// default is 0 where there is no parameter. gelu is the exact one.
#define PYENS_ACTIVATIONS(X)     \
  X(relu, Relu, 0)               \
  X(gelu, Gelu, 0)               \
  X(silu, Silu, 0)               \
  X(elu, Elu, 1)                 \
  X(softplus, Softplus, 0)       \
  X(tanh, Tanh, 0)               \
  X(identity, Identity, 0)       \
  X(mish, Mish, 0)               \
  X(celu, Celu, 1)               \
  X(leaky_relu, LeakyRelu, 0.01) \
  X(sigmoid, Sigmoid, 0)         \
  X(gelu_tanh, GeluTanh, 0)      \
  X(hardswish, Hardswish, 0)     \
  X(sin, Sin, 0)

namespace pyens {

enum class ActivationKind : int {
#define PYENS_KIND(name, Formulas, parameter) name,
  PYENS_ACTIVATIONS(PYENS_KIND)
#undef PYENS_KIND
};

// Of one layer. `parameter`: the slope of leaky_relu, the alpha of elu and celu.
struct Activation {
  ActivationKind kind = ActivationKind::identity;
  double parameter = 0;
};

#define PYENS_KIND(name, Formulas, parameter) ActivationKind::name,
inline constexpr ActivationKind kActivationKinds[] = {PYENS_ACTIVATIONS(PYENS_KIND)};
#undef PYENS_KIND

inline constexpr int kActivations = sizeof(kActivationKinds) / sizeof(kActivationKinds[0]);

inline constexpr std::string_view kActivationNames[] = {
#define PYENS_NAME(name, Formulas, parameter) #name,
    PYENS_ACTIVATIONS(PYENS_NAME)
#undef PYENS_NAME
};

// "relu, gelu, ...", for errors.
inline constexpr const char* kAllActivationNames =
#define PYENS_NAME(name, Formulas, parameter) ", " #name
    &(PYENS_ACTIVATIONS(PYENS_NAME))[2];
#undef PYENS_NAME

inline constexpr double kDefaultParameters[] = {
#define PYENS_DEFAULT(name, Formulas, parameter) parameter,
    PYENS_ACTIVATIONS(PYENS_DEFAULT)
#undef PYENS_DEFAULT
};

// Whether a gradient where the slope is 0 is 0 whatever it was: selected, as torch does, not multiplied.
PYENS_HOST_DEVICE constexpr bool cuts_off(ActivationKind kind) {
  return kind == ActivationKind::relu || kind == ActivationKind::hardswish;
}

constexpr std::optional<ActivationKind> parse_activation_kind(std::string_view name) {
  for (const ActivationKind kind : kActivationKinds) {
    if (kActivationNames[static_cast<int>(kind)] == name) return kind;
  }
  return std::nullopt;
}

}  // namespace pyens
