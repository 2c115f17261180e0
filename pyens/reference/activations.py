"""The activations that the kernels know, as `torch.nn` has them with default arguments."""

import torch
from torch import nn

from pyens import _library  # noqa: F401 - registers the operation that lists them
from pyens._types import Activation


def _module(name: str) -> type[nn.Module]:
    """The class of `torch.nn` of that name, whatever its capitals: `nn.SiLU` for "silu"."""
    found: type[nn.Module] = next(getattr(nn, k) for k in dir(nn) if k.lower() == name.replace("_", ""))
    return found


MODULES: dict[Activation, type[nn.Module]] = {name: _module(name) for name in torch.ops.pyens.activations()}
# As functions of a tensor.
ACTIVATIONS: dict[Activation, nn.Module] = {name: module() for name, module in MODULES.items()}
