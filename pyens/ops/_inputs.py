"""Inputs of other leading dimensions than `[B, I]` and `[E, B, I]`, and of several parts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyens._kinds import check_real

Lead = tuple[int, ...]


def is_unusual(input: Tensor | tuple[Tensor, ...]) -> bool:
    """Whether an input is none of `[B, I]` and `[E, B, I]`; quick where it is, for every call asks."""
    if isinstance(input, tuple):  # asked first: compiled code cannot catch what a tuple's `ndim` raises
        return True
    try:
        dims = input.ndim
        return dims != 2 and (dims != 3 or input.shape[0] == 1)
    except (AttributeError, RuntimeError):  # no tensor, or a nested one
        return False


def put_together(op: str, parts: tuple[Any, ...]) -> Tensor:
    """A tuple of inputs, such as a state and an action, side by side: `[..., I_1 + I_2 + ..]`.

    A part `[B, I]` beside one `[E, B, I]` is the same for all members; where all are shared, so is the whole.
    """
    if not parts:
        raise ValueError(f"{op}: input: expected a tensor, or a tuple of at least one, got an empty tuple")
    for i, part in enumerate(parts):
        _check_part(op, i, part, parts[0])
    try:
        lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    except RuntimeError:
        shapes = [list(part.shape) for part in parts]
        raise ValueError(
            f"{op}: input: expected parts that differ in their last dimension alone, got shapes {shapes}"
        ) from None
    return torch.cat([part.expand(*lead, part.shape[-1]) for part in parts], -1)


def _check_part(op: str, i: int, part: Any, first: Tensor) -> None:
    """Raises for what torch.cat would refuse by another name, or convert."""
    name = f"input[{i}]"
    check_real(op, name, part)
    if part.dim() == 0:
        raise ValueError(f"{op}: {name}: expected [..., features], got a tensor without dimensions")
    if part.device != first.device:
        raise TypeError(f"{op}: {name}: expected the device of input[0] ({first.device}), got {part.device}")
    if part.dtype != first.dtype and not torch.is_autocast_enabled(part.device.type):
        raise TypeError(f"{op}: {name}: expected the dtype of input[0] ({first.dtype}), got {part.dtype}")


def as_rows(
    op: str, input: Tensor | tuple[Tensor, ...], weights: Sequence[Tensor], shared: bool
) -> tuple[Tensor, Lead | None]:
    """The input as `[B, I]` or `[E, B, I]`, and the dimensions that stand for B; None where B does.

    `[I]` is one row, `[1, B, I]` is shared by the members unless there is one, and with `shared` so is any
    `[..., I]`. What is none of these stays what it is, for the operation to refuse.
    """
    if isinstance(input, tuple):
        input = put_together(op, input)
    if not isinstance(input, Tensor) or input.layout is not torch.strided or input.is_nested:
        return input, None
    dims = input.dim()
    if dims == 1:
        return input.unsqueeze(0), ()
    if shared and dims > 2:
        return input.flatten(0, -2), tuple(input.shape[:-1])
    if dims == 3 and not shared and input.shape[0] == 1 and _members(weights) != 1:
        return input[0], None
    return input, None


def of_rows(tensor: Any, lead: Lead | None, rank: int, members: int) -> Any:
    """A target or weights that go with such an input: as of the rows `[B, ...]`, or of `[E, B, ...]`.

    Args:
        tensor: `[*lead, ...]`, or `[E, *lead, ...]`.
        lead: of the input, from `as_rows`; None for an input that was `[1, B, I]`, with which it may be
            `[1, B, ...]`.
        rank: how many dimensions it has after those of the rows.
        members: E.
    """
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_nested:
        return tensor
    if lead is None:
        return tensor[0] if tensor.dim() == rank + 2 and tensor.shape[0] == 1 != members else tensor
    shape = tuple(tensor.shape)
    for axis in (0, 1):
        if shape[axis : axis + len(lead)] == lead and len(shape) == axis + len(lead) + rank:
            return tensor.unsqueeze(axis) if not lead else tensor.flatten(axis, axis + len(lead) - 1)
    return tensor


def as_given(output: Tensor, lead: Lead | None) -> Tensor:
    """`[E, B, O]` with the dimensions of the input in the place of B."""
    if lead is None:
        return output
    return output.unflatten(1, lead) if lead else output.squeeze(1)


def _members(weights: Any) -> int:
    """E, or 1 where that cannot be said."""
    try:
        return int(weights[0].shape[0])
    except (TypeError, IndexError, AttributeError, KeyError):
        return 1
