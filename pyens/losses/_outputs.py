"""What the losses share: their outputs checked, by label, in full precision, and reduced over the labels."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pyens._kinds import REAL, check_number, check_tensor
from pyens._types import Reduction

Loss = TypeVar("Loss", bound=Callable[..., Tensor])


def in_full_precision(function: Loss) -> Loss:
    """Runs it outside of autocast, on at least float32, after the checks on shape and dtype of `outputs`."""

    @functools.wraps(function)
    def wrapper(outputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        check_outputs(function.__name__, outputs)
        with torch.autocast(outputs.device.type, enabled=False):
            wide = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
            return function(wide, *args, **kwargs)

    return cast(Loss, wrapper)


def by_label(outputs: Tensor) -> Tensor:
    """[J, B] as it is, [J, B, K] as [K, J, B], [M, J, B, K] as [M, K, J, B]."""
    return outputs if outputs.ndim == 2 else outputs.movedim(-1, -3)


def reduce_labels(losses: Tensor, outputs: Tensor, reduction: Reduction) -> Tensor:
    """Over the labels, the last axis of the losses; those of [J, B] outputs have none."""
    return losses.sum(-1) if reduction == "sum" and outputs.ndim > 2 else losses


def check_outputs(function: str, outputs: Tensor) -> None:
    check_tensor(function, "outputs", outputs)
    if outputs.dtype not in REAL:
        raise TypeError(f"{function}: outputs: expected a floating dtype, got {outputs.dtype}")
    if outputs.ndim not in (2, 3, 4):
        raise ValueError(
            f"{function}: outputs: expected shape [J, B], [J, B, K] or [M, J, B, K], "
            f"got {list(outputs.shape)}"
        )
    if outputs.shape[-3 if outputs.ndim > 2 else 0] == 0:
        raise ValueError(f"{function}: outputs: expected J >= 1, got {list(outputs.shape)}")


def check_positive(function: str, argument: str, value: float) -> None:
    check_number(function, argument, value)
    if not value > 0:
        raise ValueError(f"{function}: {argument}: expected a number > 0, got {value}")
