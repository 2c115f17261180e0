"""Specification of `pyens.ops.ensemble_mlp`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyens._types import Activation, Dropout, DropoutPosition, Norm, NormPosition
from pyens.reference.activations import activation_module


def ensemble_mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    activation: Activation | Sequence[Activation] = "relu",
    output_activation: Activation = "identity",
    norm: Norm | Sequence[Norm | None] | None = None,
    norm_weights: Sequence[Tensor] | None = None,
    norm_biases: Sequence[Tensor] | None = None,
    norm_eps: float | None = None,
    norm_position: NormPosition = "before_activation",
    residual: bool | Sequence[bool] = False,
    dropout: Dropout = 0.0,
    dropout_seeds: Tensor | None = None,
    dropout_position: DropoutPosition = "after_activation",
    members: Tensor | None = None,
) -> Tensor:
    """See `pyens.ops.ensemble_mlp`."""
    hidden_layers = len(weights) - 1
    activations, norms = for_each(activation, hidden_layers), for_each(norm, hidden_layers)
    residuals = residual_layers(residual, weights)
    epsilon = default_norm_eps(norms, input.dtype) if norm_eps is None else norm_eps
    norm_weight, norm_bias = iter(norm_weights or ()), iter(norm_biases or ())

    def of_members(parameter: Tensor) -> Tensor:
        return parameter if members is None else parameter[members]

    def apply_norm(h: Tensor, layer: int) -> Tensor:
        kind = norms[layer]
        assert kind is not None
        x = h.to(torch.promote_types(h.dtype, torch.float32))
        if kind == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
        if norm_weights:
            y = y * of_members(next(norm_weight)).unsqueeze(1)
        if norm_biases:
            y = y + of_members(next(norm_bias)).unsqueeze(1)
        return y.to(h.dtype)

    def apply_dropout(h: Tensor, layer: int) -> Tensor:
        rates = dropout_rates(dropout, layer, h.device)
        if not isinstance(rates, Tensor) and rates == 0:
            return h
        assert dropout_seeds is not None
        _, rows, units = h.shape
        kept = kept_by_dropout(dropout_seeds, layer, rows, units, rates)
        # As exact as a division by a number.
        exact = torch.promote_types(h.dtype, torch.float32)
        share = (1 - rates).to(exact) if isinstance(rates, Tensor) else 1 - rates
        return torch.where(kept, (h / share).to(h.dtype), 0)

    h = input if input.dim() == 3 else input.unsqueeze(0)  # [E or 1, B, I]
    for layer, weight in enumerate(weights):  # [E, out, in]
        read = h
        h = torch.matmul(h, of_members(weight).transpose(1, 2))  # [E, B, out]
        if biases and biases[layer].shape[1] > 0:
            h = h + of_members(biases[layer]).unsqueeze(1)
        if layer == hidden_layers:
            output: Tensor = activation_module(output_activation)(h)
            return output
        has_norm = norms[layer] is not None
        drops_early = has_norm and dropout_position == "before_norm"
        for position in ("before_activation", "after_activation"):
            if position == "after_activation":
                h = activation_module(activations[layer])(h)
            if has_norm and norm_position == position:
                if drops_early:
                    h = apply_dropout(h, layer)
                h = apply_norm(h, layer)
        if not drops_early:
            h = apply_dropout(h, layer)
        if residuals[layer]:
            h = h + read
    raise ValueError("ensemble_mlp: weights: expected at least one layer, got an empty list")


def for_each(given: Any, layers: int) -> list[Any]:
    """One thing for all layers, or one for each of them."""
    if given is None or isinstance(given, (str, bool)):
        return [given] * layers
    return list(given)


def residual_layers(residual: bool | Sequence[bool], weights: Sequence[Tensor]) -> list[bool]:
    """Which hidden layers have one; True: those that are as wide as what they read."""
    if residual is True:
        return [weight.shape[1] == weight.shape[2] for weight in weights[:-1]]
    return for_each(residual, len(weights) - 1)


def default_norm_eps(norms: Sequence[Norm | None], dtype: torch.dtype) -> float:
    """That of `nn.LayerNorm`, or where all are rms_norm that of `nn.RMSNorm`: of 16-bit types, which are
    normalized in float32, that of float32."""
    if "layer_norm" in norms:
        return 1e-5
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def dropout_rates(dropout: Dropout, layer: int, device: torch.device) -> float | Tensor:
    """The rate of a hidden layer, or float64 [E or 1, 1, 1]."""
    if isinstance(dropout, (float, int)):
        return dropout
    rates = torch.as_tensor(dropout, dtype=torch.float64, device=device)
    return (rates if rates.dim() == 1 else rates[:, layer]).view(-1, 1, 1)


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
