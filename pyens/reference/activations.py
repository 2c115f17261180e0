"""The activations that the kernels know: a name, or a name and its parameter, as in "elu(0.5)"."""

import math

import torch
from torch import Tensor, nn

from pyens import _library  # noqa: F401 - registers the operation that lists them
from pyens._types import ActivationName

# What the parameter of those that have one is called in torch.nn.
PARAMETERS: dict[str, str] = {"elu": "alpha", "celu": "alpha", "leaky_relu": "negative_slope"}


class Sin(nn.Module):
    """sin(x), which torch.nn does not have."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.sin(input)


def _module(name: str) -> type[nn.Module]:
    """The class of `torch.nn` of that name, whatever its capitals: `nn.SiLU` for "silu"."""
    if name == "sin":
        return Sin
    if name == "gelu_tanh":
        return nn.GELU
    found: type[nn.Module] = next(getattr(nn, k) for k in dir(nn) if k.lower() == name.replace("_", ""))
    return found


MODULES: dict[ActivationName, type[nn.Module]] = {
    name: _module(name) for name in torch.ops.pyens.activations()
}


def activation_module(activation: str, function: str = "ensemble_mlp") -> nn.Module:
    """The activation as a module; `function` is who asks, for errors.

    Raises:
        ValueError: an unknown name, a parameter that is none, or of one that has none.
    """
    text = activation if isinstance(activation, str) else ""
    name, opened, parameter = text.partition("(")
    if name not in MODULES:
        raise ValueError(f'{function}: activation: expected one of {", ".join(MODULES)}, got "{activation}"')
    if not opened:
        return MODULES[name](**({"approximate": "tanh"} if name == "gelu_tanh" else {}))
    if name not in PARAMETERS:
        raise ValueError(f"{function}: activation: expected {name}, which has no parameter, got {activation}")
    try:
        number = float(parameter.removesuffix(")")) if parameter.endswith(")") else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{function}: activation: expected {name}(a finite number), got {activation}")
    if name == "celu" and number <= 0:
        raise ValueError(f"{function}: activation: expected celu(alpha) with alpha > 0, got {activation}")
    return MODULES[name](**{PARAMETERS[name]: number})


# With default arguments, as functions of a tensor.
ACTIVATIONS: dict[ActivationName, nn.Module] = {name: activation_module(name) for name in MODULES}
