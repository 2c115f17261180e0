"""Specification of `pyens.ops.ensemble_mlp`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyens._types import Activation, Dropout
from pyens.reference.activations import ACTIVATIONS


def ensemble_mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    activation: Activation = "relu",
    dropout: Dropout = 0.0,
    dropout_seeds: Tensor | None = None,
) -> Tensor:
    """See `pyens.ops.ensemble_mlp`."""
    act = ACTIVATIONS[activation]
    hidden = input if input.dim() == 3 else input.unsqueeze(0)  # [E or 1, B, I]
    rate, rates = 0.0, None  # of all members, or of each [E, 1, 1]
    if isinstance(dropout, (float, int)):
        rate = dropout
    else:
        rates = torch.as_tensor(dropout, dtype=torch.float64, device=input.device).view(-1, 1, 1)
    for layer, weight in enumerate(weights):  # [E, out, in]
        if layer > 0:
            hidden = act(hidden)
            if rates is not None or rate > 0:
                assert dropout_seeds is not None
                _, rows, units = hidden.shape
                kept = kept_by_dropout(dropout_seeds, layer - 1, rows, units, dropout)
                # As exact as a division by a number.
                exact = torch.promote_types(hidden.dtype, torch.float32)
                share = 1 - rate if rates is None else (1 - rates).to(exact)
                hidden = torch.where(kept, (hidden / share).to(hidden.dtype), 0)
        hidden = torch.matmul(hidden, weight.transpose(1, 2))  # [E, B, out]
        if biases:
            hidden = hidden + biases[layer].unsqueeze(1)
    return hidden


def kept_by_dropout(seeds: Tensor, layer: int, batch_size: int, features: int, dropout: Dropout) -> Tensor:
    """The units that dropout keeps, bool `[E, batch_size, features]`: a pure function of its arguments.

    64 bits mixed from (seed, layer, unit) key a 32-bit hash of the batch row; a unit is kept where the hash
    is at least dropout * 2^32. Numbers without a sign lie in int64.
    """
    low = (1 << 32) - 1
    rows = torch.arange(batch_size, device=seeds.device).unsqueeze(1)
    units = torch.arange(features, device=seeds.device)
    key = splitmix(splitmix(splitmix(seeds) + layer).unsqueeze(1) + units).unsqueeze(1)  # [E, 1, units]
    x = (rows + (key & low)) & low
    x = ((x ^ x >> 16) * 0x21F0AAAD) & low
    x = x ^ x >> 15 ^ _shift_right(key, 32)
    x = (x * 0x735A2D97) & low
    rates = torch.as_tensor(dropout, dtype=torch.float64, device=seeds.device).reshape(-1, 1, 1)
    return (x ^ x >> 15) >= (rates * 2**32).long()


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix(x: Tensor) -> Tensor:
    """A bijection of 64-bit numbers whose values look random: the finalizer of splitmix64."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ _shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shift_right(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shift_right(x, 31)
