"""Named conversions between pyens' member-first layout and the layouts of other libraries.

All of them are views wherever torch can make one. Nothing else in pyens guesses a layout.
"""

import torch
from torch import Tensor

from pyens._kinds import check_tensor

__all__ = ["from_masksembles", "from_tabm", "to_masksembles", "to_tabm"]


def from_tabm(x: Tensor) -> Tensor:
    """`[B, k, D]` (TabM: members in the middle) -> `[E, B, D]`, E = k."""
    _check_rank("from_tabm", x, "[B, k, D]")
    return x.transpose(0, 1)


def to_tabm(x: Tensor) -> Tensor:
    """`[E, B, D]` -> `[B, k, D]` (TabM: members in the middle), k = E."""
    _check_rank("to_tabm", x, "[E, B, D]")
    return x.transpose(0, 1)


def from_masksembles(x: Tensor, ensemble_size: int) -> Tensor:
    """`[(m b), D]` (Masksembles: the members' batches one after the other) -> `[E, B, D]`, E = m."""
    check_tensor("from_masksembles", "x", x)
    if not isinstance(ensemble_size, int):
        got = type(ensemble_size).__name__
        raise TypeError(f"from_masksembles: ensemble_size: expected an integer, got {got}")
    if x.dim() < 1 or ensemble_size < 1 or x.shape[0] % ensemble_size:
        raise ValueError(
            f"from_masksembles: x: expected [(m b), ...] with m = ensemble_size = {ensemble_size}, "
            f"got shape {list(x.shape)}"
        )
    return torch.unflatten(x, 0, (ensemble_size, x.shape[0] // ensemble_size))


def to_masksembles(x: Tensor) -> Tensor:
    """`[E, B, D]` -> `[(m b), D]` (Masksembles: the members' batches one after the other), m = E."""
    _check_rank("to_masksembles", x, "[E, B, D]")
    return x.flatten(0, 1)


def _check_rank(name: str, x: Tensor, expected: str) -> None:
    check_tensor(name, "x", x)
    if x.dim() != 3:
        raise ValueError(f"{name}: x: expected {expected}, got shape {list(x.shape)}")
