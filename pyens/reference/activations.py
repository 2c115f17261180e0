"""The activations that the kernels know, as `torch.nn` has them with default arguments."""

import torch
from torch import nn

from pyens import _library  # noqa: F401 - registers the operation that lists them


def _module(name: str) -> type[nn.Module]:
    """The class of `torch.nn` of that name, whatever its capitals: `nn.SiLU` for "silu"."""
    return next(getattr(nn, kind) for kind in dir(nn) if kind.lower() == name.replace("_", ""))


MODULES: dict[str, type[nn.Module]] = {name: _module(name) for name in torch.ops.pyens.activations()}
# As functions of a tensor.
ACTIVATIONS: dict[str, nn.Module] = {name: module() for name, module in MODULES.items()}
