"""What every metric asks of its arguments; a check returns nothing or raises, before anything is computed.

Messages read ``function: argument: expected ..., got ...``. Wrong types and dtypes are TypeError, wrong
shapes and values ValueError.
"""

import math

import torch
from torch import Tensor

from pyens._kinds import check_tensor

# A float32 softmax over 1000 classes sums to 1 within about 1e-6; logits and counts are off by far more.
SUM_TOLERANCE = 1e-4


def floats(function: str, argument: str, value: Tensor, *shapes: str, empty_batch: bool = False) -> None:
    """`value` is a float32 or float64 tensor without NaN, of one of `shapes`, such as "[E, B, K]".

    No axis may be empty, except the axis called B where `empty_batch` allows it.
    """
    check_tensor(function, argument, value)
    if value.is_meta:
        raise TypeError(f"{function}: {argument}: expected a tensor with values, got one on meta")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{function}: {argument}: expected float32 or float64, got {_name(value.dtype)}")
    expected = " or ".join(shapes)
    axes = next((a for a in map(_axes, shapes) if len(a) == value.ndim), None)
    if axes is None:
        raise ValueError(f"{function}: {argument}: expected shape {expected}, got {list(value.shape)}")
    for axis, size in zip(axes, value.shape, strict=True):
        if size == 0 and not (empty_batch and axis == "B"):
            raise ValueError(
                f"{function}: {argument}: expected shape {expected} with {axis} >= 1, got {list(value.shape)}"
            )
    # The largest value is NaN if any is: nothing of the size of many members is made for good ones.
    if value.numel() and value.detach().amax().isnan():
        nans = int(value.isnan().sum())
        raise ValueError(f"{function}: {argument}: expected no NaN, got {nans} of {value.numel()} values NaN")


def probabilities(
    function: str, argument: str, value: Tensor, *shapes: str, empty_batch: bool = False
) -> None:
    """`value` passes `floats` and holds distributions along its last axis."""
    floats(function, argument, value, *shapes, empty_batch=empty_batch)
    if value.numel() == 0:
        return
    lowest = value.min().item()
    if lowest < 0:
        raise ValueError(f"{function}: {argument}: expected probabilities >= 0, got {lowest:.6g}")
    sums = value.sum(-1, dtype=torch.float64)
    worst = sums.flatten()[(sums - 1).abs().argmax()].item()
    if abs(worst - 1) > SUM_TOLERANCE:
        raise ValueError(
            f"{function}: {argument}: expected rows that sum to 1 within {SUM_TOLERANCE}, "
            f"got a row with sum {worst:.6g}"
        )


def labels(function: str, value: Tensor, probabilities: Tensor) -> None:
    """`value` is one class index per row of the (already checked) `[B, K]` or `[M, B, K]` probabilities."""
    examples, classes = probabilities.shape[-2:]
    check_tensor(function, "labels", value)
    if value.dtype != torch.int64:
        raise TypeError(f"{function}: labels: expected int64, got {_name(value.dtype)}")
    if value.shape != (examples,):
        raise ValueError(
            f"{function}: labels: expected shape [{examples}], one for each row of probabilities, "
            f"got {list(value.shape)}"
        )
    device(function, "labels", value, "probabilities", probabilities)
    outside = value[(value < 0) | (value >= classes)]
    if outside.numel():
        raise ValueError(f"{function}: labels: expected values in 0..{classes - 1}, got {outside[0].item()}")


def finite(function: str, argument: str, value: Tensor) -> None:
    """`value` (already checked by `floats`) holds no infinity."""
    if not value.numel():
        return
    low, high = value.detach().aminmax()
    if low.isinf() or high.isinf():
        infinite = int(value.isinf().sum())
        raise ValueError(
            f"{function}: {argument}: expected finite values, got {infinite} of {value.numel()} infinite"
        )


def like(function: str, argument: str, value: Tensor, other: str, model: Tensor) -> None:
    """`value` has the shape, dtype and device of `model`, the argument called `other`; both are tensors."""
    shape(function, argument, value, other, model)
    if value.dtype != model.dtype:
        raise TypeError(
            f"{function}: {argument}: expected {_name(model.dtype)}, the dtype of {other}, "
            f"got {_name(value.dtype)}"
        )
    device(function, argument, value, other, model)


def mask(function: str, argument: str, value: Tensor, other: str, model: Tensor) -> None:
    """`value` is a bool tensor of the shape and device of `model`, the argument called `other`."""
    check_tensor(function, argument, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{function}: {argument}: expected bool, got {_name(value.dtype)}")
    shape(function, argument, value, other, model)
    device(function, argument, value, other, model)


def shape(function: str, argument: str, value: Tensor, other: str, model: Tensor) -> None:
    if value.shape != model.shape:
        raise ValueError(
            f"{function}: {argument}: expected shape {list(model.shape)}, that of {other}, "
            f"got {list(value.shape)}"
        )


def device(function: str, argument: str, value: Tensor, other: str, model: Tensor) -> None:
    if value.device != model.device:
        raise ValueError(
            f"{function}: {argument}: expected device {model.device}, that of {other}, got {value.device}"
        )


def other(function: str, own: object, value: object) -> None:
    """`value` is of the class of `own`."""
    if not isinstance(value, type(own)):
        raise TypeError(f"{function}: other: expected {type(own).__name__}, got {type(value).__name__}")


def bins(function: str, value: int) -> None:
    count(function, "bins", value, 1)


def count(function: str, argument: str, value: int, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{function}: {argument}: expected an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{function}: {argument}: expected at least {low}, got {value}")


def number(function: str, argument: str, value: float, low: float, high: float = math.inf) -> None:
    """`value` is a Python number in the closed range."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{function}: {argument}: expected a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{function}: {argument}: expected a number in [{low}, {high}], got {value}")


def share(function: str, argument: str, value: float) -> None:
    """`value` is a Python number strictly between 0 and 1."""
    number(function, argument, value, 0, 1)
    if value in (0, 1):
        raise ValueError(f"{function}: {argument}: expected a number strictly between 0 and 1, got {value}")


def choice(function: str, argument: str, value: str, *allowed: str) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{function}: {argument}: expected {' or '.join(allowed)}, got {value!r}")


def _axes(shape: str) -> list[str]:
    return shape.strip("[]").split(", ")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
