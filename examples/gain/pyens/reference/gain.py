"""Specification of `pyens.ops.gain`."""

from torch import Tensor


def gain(input: Tensor, scale: Tensor) -> Tensor:
    """input `[B, D]` or `[E, B, D]`, scale `[E, D]` -> `[E, B, D]`."""
    return input * scale.unsqueeze(1)
