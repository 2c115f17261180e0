"""Specification of `pyens.ops.activation_strength`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyens._types import Activation, ActivationStrength
from pyens.reference.activations import activation_module
from pyens.reference.ensemble_mlp import for_each


def activation_strength(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    mean: Tensor,
    std: Tensor,
    *,
    activation: Activation | Sequence[Activation] = "relu",
    bitpack: bool = False,
) -> ActivationStrength:
    """See `pyens.ops.activation_strength`."""
    x = input if input.dim() == 3 else input.expand(len(weights[0]), -1, -1)  # [E, B, I]
    hidden, activations = [], for_each(activation, len(weights) - 1)
    for layer, weight in enumerate(weights):  # [E, out, in]
        if layer > 0:
            x = activation_module(activations[layer - 1])(x)
            hidden.append(x)
        x = torch.matmul(x, weight.transpose(1, 2))  # [E, B, out]
        if biases and biases[layer].shape[1] > 0:
            x = x + biases[layer].unsqueeze(1)
    h = torch.cat(hidden, -1) if hidden else x[..., :0]
    value, active = strength(h, mean.expand(len(h), -1).unsqueeze(1), std.expand(len(h), -1).unsqueeze(1))
    return ActivationStrength(x, value, pack_bits(active) if bitpack else active)


def strength(h: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Value and active of hidden activations `[.., H]`, given statistics that broadcast against them."""
    real = torch.float64 if h.dtype == torch.float64 else torch.float32
    mean, std = mean.to(real), std.to(real)
    value = torch.where(std.abs() < torch.finfo(real).tiny, 0, (h - mean) / std)
    return value.to(h.dtype), h > 0


def pack_bits(active: Tensor) -> Tensor:
    """bool `[.., H]` to uint8 `[.., ⌈H/8⌉]`: unit u is bit u % 8 of byte u // 8, the lowest bit first."""
    eights: Tensor = F.pad(active, (0, -active.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (eights << torch.arange(8, device=active.device)).sum(-1).to(torch.uint8)
