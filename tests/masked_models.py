"""Masked models and what they are held against."""

import itertools

import pytest
import torch
import torch._dynamo.testing
from nn_models import KINDS
from torch import Tensor, nn

from pyens.nn import (
    MaskedMLP,
)

WIDTHS = [6, 12, 10, 3]
activations = pytest.mark.parametrize("activation", KINDS)
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


def mlp(ensemble_size: int = 4, scale: float = 2.0, widths: list[int] = WIDTHS, **kwargs) -> MaskedMLP:
    return MaskedMLP(ensemble_size, widths[0], widths[1:-1], widths[-1], scale=scale, **kwargs)


def sequential(
    activation: type[nn.Module] = nn.ReLU, dropout: float | None = None, **kwargs
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(fan_in, fan_out, **kwargs), activation()]
        if dropout is not None:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers[: -1 if dropout is None else -2])


def dense(model: MaskedMLP, x: Tensor) -> Tensor:
    """All units, masked after the activation, as the paper has it."""
    act = KINDS[model.activation]()
    hidden = x if x.dim() == 3 else x.unsqueeze(0)
    masks = list(model.masks.buffers())
    for layer, weight in enumerate(model.weights):
        hidden = hidden @ weight.T
        if len(model.biases) > 0:
            hidden = hidden + model.biases[layer]
        if layer < len(masks):
            hidden = act(hidden) * masks[layer].unsqueeze(1)
    return hidden


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
