"""The rows that `fit` trains on: brought to tensors once, and looked at before the first step."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyens._kinds import REAL, check_tensor
from pyens._types import Loss
from pyens.data.rows import RowSource, as_tensor
from pyens.nn import Ensemble
from pyens.training import _checks

_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
_INTEGERS = (torch.bool, *_SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
Row = Tensor | None  # None stands for an input that the model does without


def as_tensors(
    argument: str, data: Any, dtype: torch.dtype, loss: Any, device: torch.device
) -> tuple[Row, ...]:
    """Tensors of what people have: arrays of numpy, columns and frames of pandas, numbers of other types.

    Floating point numbers of another precision become `dtype`, the parameters' (16-bit models keep float32
    targets), small integers int64, and so do bools; a target of one of the named losses on real numbers
    becomes `dtype` and, where it is one number a row, `[N, 1]`.
    """
    _checks.tensors(argument, data)
    tensors: list[Row] = []
    said = []
    for i, given in enumerate(data):
        tensor = _tensor(given, device)
        if isinstance(tensor, Tensor):
            check_tensor("fit", argument, tensor)
            if tensor.is_floating_point() and tensor.dtype not in REAL:
                raise TypeError(
                    f"fit: {argument}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}"
                )
            target, real = i == len(data) - 1, isinstance(loss, str) and loss != "cross_entropy"
            wanted = _dtype(tensor.dtype, dtype, target=target, real=target and real)
            if wanted != tensor.dtype:
                if tensor.dtype == torch.float64:
                    said.append(f"{argument}[{i}]")
                tensor = tensor.to(wanted)
        tensors.append(tensor)
    if said:
        named = ", ".join(said[:4]) + f" and {len(said) - 4} more" * (len(said) > 4)
        _checks.warn(f"fit: {named}: float64, cast to {dtype} once")
    return tuple(tensors)


def as_taken(column: Tensor, dtype: torch.dtype, loss: Any, target: bool) -> Tensor:
    """One column of a batch of a source, as `as_tensors` has it, without a word about float64."""
    real = target and isinstance(loss, str) and loss != "cross_entropy"
    return column.to(_dtype(column.dtype, dtype, target=target, real=real))


def _tensor(given: Any, device: torch.device) -> Any:
    if hasattr(given, "to_numpy"):
        given = given.to_numpy()
    tensor = as_tensor(given)
    return tensor.to(device) if tensor is not given and isinstance(tensor, Tensor) else tensor


def _dtype(own: torch.dtype, parameters: torch.dtype, *, target: bool, real: bool) -> torch.dtype:
    if own.is_floating_point:
        half = parameters in (torch.bfloat16, torch.float16)
        return own if own == parameters or (target and half and own == torch.float32) else parameters
    if own in _INTEGERS:
        return parameters if real else torch.int64
    return own


def as_targets(tensors: Sequence[Row], loss: Any, axis: int) -> tuple[Row, ...]:
    """With a target `[..., 1]` where it is one number a row, for the named losses on real numbers."""
    *inputs, target = tensors
    named = isinstance(loss, str) and loss not in ("cross_entropy", "soft_cross_entropy")
    if named and isinstance(target, Tensor) and target.dim() == axis + 1:
        target = target.unsqueeze(-1)
    return (*inputs, target)


def check_values(
    argument: str,
    tensors: Sequence[Row],
    model: Ensemble,
    loss: Loss | Any,
    axis: int = 0,
    weight: Tensor | None = None,
) -> None:
    """Refuses what would surface in the middle of an epoch, or as members that diverge: by row and column.

    Rows that weigh nothing for any member may hold anything.
    """
    present = None if weight is None else weight != 0
    if present is not None and present.dim() == 2 and axis == 0:
        present = present.any(0)
    if present is not None and axis == 1:
        members = next(t for t in tensors if t is not None).shape[0]
        present = present.expand(members, -1)
    for i, tensor in enumerate(tensors):
        if tensor is None or not tensor.is_floating_point():
            continue
        bad = ~tensor.isfinite()
        if present is not None:
            bad &= present.to(bad.device).reshape(*present.shape, *[1] * (bad.dim() - present.dim()))
        if bad.any():
            where = bad.nonzero()[0].tolist()
            value = float(tensor[tuple(where)])
            raise ValueError(
                f"fit: {argument}[{i}]: expected finite numbers, got {value} in {_place(where, axis)} and "
                f"{int(bad.sum()) - 1} more; a row with sample_weight 0 may hold anything"
            )
    *inputs, target = tensors
    if present is None:
        model.check_inputs(*inputs)
    else:  # rows that weigh something stand in for those that may hold anything
        model.check_inputs(*model.without_left_out(inputs, present))
    if loss == "cross_entropy" and target is not None and not target.is_floating_point():
        with torch.no_grad():
            classes = model(*(None if t is None else t.narrow(axis, 0, 1) for t in inputs)).shape[-1]
        wrong = (target < 0) | (target >= classes)
        if present is not None:
            wrong &= present.to(wrong.device)
        if wrong.any():
            where = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"fit: {argument}[{len(tensors) - 1}]: expected classes from 0 to {classes - 1}, "
                f"got {int(target[tuple(where)])} in {_place(where, axis)}"
            )


def _place(index: list[int], axis: int) -> str:
    member = f"member {index[0]}, " if axis else ""
    column = f", column {', '.join(map(str, index[axis + 1 :]))}" if len(index) > axis + 1 else ""
    return f"{member}row {index[axis]}{column}"


def check_weights(
    weight: Any, members: int, rows: int, training: Tensor, device: torch.device
) -> Tensor | None:
    """`sample_weight` as a tensor `[N]` or `[E, N]`, or None."""
    if weight is None:
        return None
    weight = _tensor(weight, device)
    if not isinstance(weight, Tensor):
        raise TypeError(f"fit: sample_weight: expected a tensor, got a {type(weight).__name__}")
    if list(weight.shape) not in ([rows], [members, rows]):
        raise ValueError(
            f"fit: sample_weight: expected shape [{rows}] or [{members}, {rows}], got {list(weight.shape)}"
        )
    check_tensor("fit", "sample_weight", weight)
    if weight.is_complex():
        raise TypeError(f"fit: sample_weight: expected real numbers, got {weight.dtype}")
    weight = weight.double()
    if not (weight.isfinite() & (weight >= 0)).all():
        raise ValueError("fit: sample_weight: expected finite weights of at least 0, got one that is not")
    total = weight.index_select(-1, training.to(weight.device)).sum(-1)
    if not (total > 0).all():
        who = f" of member {int((total <= 0).nonzero()[0])}" if total.dim() else ""
        raise ValueError(f"fit: sample_weight: expected a training row with weight above 0, got none{who}")
    # Only their ratios count: by a power of two into the range of float32 and of sums of many.
    largest = float(weight.max())
    if not 1e-30 < largest < 1e30:
        half, rest = divmod(-math.floor(math.log2(largest)), 2)  # 2 to the whole of it may be beyond float64
        weight = weight * 2.0**half * 2.0 ** (half + rest)
    checked: Tensor = weight
    return checked


def check_validation(validation: Any, rows: int) -> float | Tensor | Any:
    """A share, bool `[N]` of the rows that are meant, or rows of their own, which `as_tensors` takes."""
    if isinstance(validation, numbers.Real):
        if isinstance(validation, bool) or not 0 <= float(validation) < 1:
            raise ValueError(
                f"fit: validation: expected a share in [0, 1), indices of rows, or rows, got {validation}"
            )
        return float(validation)
    if isinstance(validation, RowSource):
        return validation
    if (
        isinstance(validation, list)
        and validation
        and all(isinstance(i, (int, np.integer)) for i in validation)
    ):
        validation = np.array(validation)
    index = None if isinstance(validation, (tuple, list)) else _tensor(validation, torch.device("cpu"))
    if not isinstance(index, Tensor) or index.dim() != 1 or index.is_floating_point():
        _checks.tensors("validation", validation)
        return validation
    index = index.cpu()
    if index.dtype == torch.bool:
        if len(index) != rows:
            raise ValueError(f"fit: validation: expected a mask of {rows} rows, got {len(index)}")
        return index
    if len(index) == rows > 2 and index.max() <= 1:
        raise ValueError(
            f"fit: validation: expected indices of rows or a mask of bools, got {rows} numbers 0 and 1"
        )
    if len(index) == 0 or index.min() < 0 or index.max() >= rows:
        got = f"{int(index.min())} to {int(index.max())}" if len(index) else "none"
        raise ValueError(f"fit: validation: expected rows from 0 to {rows - 1}, got {got}")
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[index.long()] = True
    return mask


def check_groups(groups: Any, rows: int) -> Tensor | None:
    """int64 `[N]`: `groups` numbered from 0, or None."""
    if groups is None:
        return None
    if hasattr(groups, "to_numpy"):
        groups = groups.to_numpy()
    values = groups.cpu().numpy() if isinstance(groups, Tensor) else np.asarray(groups)
    if values.dtype.kind == "O":
        if not all(isinstance(value, str) for value in values.flat):
            raise TypeError("fit: groups: expected numbers or strings, got others among them")
        values = values.astype(str)
    if values.shape != (rows,):
        raise ValueError(f"fit: groups: expected one for each of {rows} rows, got shape {list(values.shape)}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("fit: groups: expected no NaN or Inf, got one")
    return torch.from_numpy(np.unique(values, return_inverse=True)[1].astype(np.int64))
