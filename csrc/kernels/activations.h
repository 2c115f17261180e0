// The activations of hidden layers: the one list that names, errors, the CPU's and the GPU's kernels and
// the operations read. Their formulas are in kernels/activation_formulas-inl.h.
#pragma once

#include <optional>
#include <string_view>

// X(name, type of the formulas), as in torch.nn with default arguments; gelu is the exact one.
#define PYENS_ACTIVATIONS(X) \
  X(relu, Relu)              \
  X(gelu, Gelu)              \
  X(silu, Silu)              \
  X(elu, Elu)                \
  X(softplus, Softplus)      \
  X(tanh, Tanh)              \
  X(mish, Mish)              \
  X(identity, Identity)

namespace pyens {

enum class ActivationKind : int {
#define PYENS_KIND(name, Formulas) name,
  PYENS_ACTIVATIONS(PYENS_KIND)
#undef PYENS_KIND
};

// Of one layer. `parameter` is the place of a slope or an alpha; none of the present ones has any.
struct Activation {
  ActivationKind kind = ActivationKind::identity;
  float parameter = 0;
};

#define PYENS_KIND(name, Formulas) ActivationKind::name,
inline constexpr ActivationKind kActivationKinds[] = {PYENS_ACTIVATIONS(PYENS_KIND)};
#undef PYENS_KIND

inline constexpr int kActivations = sizeof(kActivationKinds) / sizeof(kActivationKinds[0]);

inline constexpr std::string_view kActivationNames[] = {
#define PYENS_NAME(name, Formulas) #name,
    PYENS_ACTIVATIONS(PYENS_NAME)
#undef PYENS_NAME
};

// "relu, gelu, ...", for errors.
inline constexpr const char* kAllActivationNames =
#define PYENS_NAME(name, Formulas) ", " #name
    &(PYENS_ACTIVATIONS(PYENS_NAME))[2];
#undef PYENS_NAME

constexpr std::optional<ActivationKind> parse_activation_kind(std::string_view name) {
  for (const ActivationKind kind : kActivationKinds) {
    if (kActivationNames[static_cast<int>(kind)] == name) return kind;
  }
  return std::nullopt;
}

}  // namespace pyens
