"""Specification of `pyens.ops.ensemble_mlp`."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def ensemble_mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    activation: str = "relu",
) -> Tensor:
    """See `pyens.ops.ensemble_mlp`."""
    act = ACTIVATIONS[activation]
    hidden = input if input.dim() == 3 else input.unsqueeze(0)  # [E or 1, B, I]
    for layer, weight in enumerate(weights):  # [E, out, in]
        if layer > 0:
            hidden = act(hidden)
        hidden = torch.matmul(hidden, weight.transpose(1, 2))  # [E, B, out]
        if biases:
            hidden = hidden + biases[layer].unsqueeze(1)
    return hidden
