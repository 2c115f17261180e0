"""What `fit` refuses."""

from __future__ import annotations

import math
import operator
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyens._kinds import check_number, check_tensor, name_of
from pyens.nn import ComponentModels, Ensemble, EnsembleBatchNorm
from pyens.nn._stacked_mlp import StackedMLP
from pyens.optim import InPass
from pyens.training.randomness import Randomness


def count(argument: str, value: Any, least: int = 1) -> int:
    if (
        isinstance(value, (bool, np.bool_))
        or not hasattr(value, "__index__")
        or operator.index(value) < least
    ):
        kind = "a positive integer" if least == 1 else f"an integer from {least}"
        raise ValueError(f"fit: {argument}: expected {kind}, got {value!r}")
    return operator.index(value)


def integers(argument: str, values: Any) -> list[int]:
    """Seeds, members, groups: nothing that would have to be rounded."""
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(f"fit: {argument}: expected integers, got {values!r}") from None


def positive(argument: str, value: Any) -> None:
    if value is None:
        return
    check_number("fit", argument, value)
    if not 0 < value < math.inf:
        raise ValueError(f"fit: {argument}: expected a positive number, got {value}")


def optimizers(made: Any, model: nn.Module) -> list[torch.optim.Optimizer]:
    """A list of them, none of which makes a member depend on others or cannot read the gradients."""
    found = list(made) if isinstance(made, (list, tuple)) else [made]
    if not found:
        raise ValueError("fit: optimizer: expected one at least, got none")
    own = {id(p) for p in model.parameters()}
    sparse = {
        id(p)
        for module in model.modules()
        if getattr(module, "sparse", None) is True
        for p in module.parameters(recurse=False)
    }
    seen: set[int] = set()
    for optimizer in found:
        kind = type(optimizer).__name__
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"fit: optimizer: expected a function that gives an optimizer of the parameters, "
                f"got a {kind} from it"
            )
        if kind in ("LBFGS", "Adafactor", "Muon"):
            raise ValueError(
                f"fit: optimizer: expected one that looks at each number alone, got {kind}, by which a "
                "member's step would depend on the others"
            )
        parameters = [id(p) for group in optimizer.param_groups for p in group["params"]]
        if not own.issuperset(parameters):
            raise ValueError(f"fit: optimizer: expected one of the model's parameters, got {kind} of others")
        if not seen.isdisjoint(parameters):
            raise ValueError(f"fit: optimizer: expected each parameter in one, got it again in {kind}")
        seen.update(parameters)
        with_tables = not sparse.isdisjoint(parameters)
        readers = torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam
        known = type(optimizer).__module__.split(".")[0] in ("torch", "pyens")
        if with_tables and known and (type(optimizer) not in readers):
            raise ValueError(
                f"fit: optimizer: expected SGD, Adagrad or SparseAdam for sparse tables, got {kind}"
            )
        if isinstance(optimizer, torch.optim.SparseAdam) and not sparse.issuperset(parameters):
            raise ValueError("fit: optimizer: expected SparseAdam for sparse tables alone, got it for others")
    return found


def model(model: nn.Module) -> int:
    if not isinstance(model, Ensemble):
        raise TypeError(f"fit: model: expected a pyens.nn.Ensemble, got {type(model).__name__}")
    members = getattr(model, "ensemble_size", None)
    if not isinstance(members, int):
        raise ValueError(f"fit: model: expected {type(model).__name__} to set ensemble_size, got {members!r}")
    for name, parameter in model.named_parameters():
        if not model.shares_parameters and (parameter.dim() == 0 or parameter.shape[0] != members):
            raise ValueError(
                f"fit: model: expected parameters [{members}, ...], got {name} of shape "
                f"{list(parameter.shape)}"
            )
    if not model.shares_parameters:
        for name, module in model.named_modules():
            if isinstance(module, Ensemble) and module.shares_parameters:
                raise ValueError(
                    f"fit: model: expected members with parameters of their own, or shares_parameters, "
                    f"got {name}, a {type(module).__name__}"
                )
        model.select([0])  # members that stop leave the others by it: raises now if it cannot be
    return members


def statistics(
    model: nn.Module, rows: int, batch_size: int, micro_batch_size: int | None, left_out: bool
) -> None:
    """Refuses rows that what is computed over a batch cannot be computed from."""
    kinds = {
        type(module)
        for module in model.modules()
        if isinstance(module, EnsembleBatchNorm)
        or (isinstance(module, ComponentModels) and module.strength is not None)
    }
    if not kinds:
        return
    if left_out and any(issubclass(kind, EnsembleBatchNorm) for kind in kinds):
        raise ValueError(
            "fit: model: expected no EnsembleBatchNorm where members leave rows out (bootstrap, jackknife, a "
            "sample_weight of 0): such rows would enter its statistics as zeros, got one"
        )
    sizes = {min(batch_size, rows), rows % batch_size}
    if micro_batch_size is not None:
        sizes |= {min(micro_batch_size, size) for size in sizes} | {size % micro_batch_size for size in sizes}
    if 1 in sizes:
        raise ValueError(
            "fit: batch_size: expected batches, and parts of them, of 2 or more rows for "
            f"{', '.join(sorted(kind.__name__ for kind in kinds))}, got one of 1 row ({rows} training rows, "
            f"batch_size {batch_size}, micro_batch_size {micro_batch_size})"
        )


def dense(model: nn.Module, clip_norm: float | None, clip_value: float | None) -> None:
    for argument, value in (("clip_norm", clip_norm), ("clip_value", clip_value)):
        if value is None:
            continue
        for module in model.modules():
            if getattr(module, "sparse", None) is True:
                kind = type(module).__name__
                raise ValueError(f"fit: {argument}: expected dense gradients, got those of a sparse {kind}")


def tensors(argument: str, data: Any) -> None:
    """Before anything iterates: a DataLoader would read all of its batches, a tensor fall into rows."""
    if not isinstance(data, (tuple, list)):
        share = "a share or " * (argument == "validation")
        raise TypeError(
            f"fit: {argument}: expected {share}a tuple of tensors [N, ...], inputs and target, or a "
            f"pyens.data.RowSource of them, got a {type(data).__name__}"
        )


def home(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the parameters are, and of what precision: their first floating one's."""
    found = [p for p in model.parameters() if p.is_floating_point()]
    if found and not any(p.requires_grad for p in found):
        raise ValueError(f"fit: model: expected parameters to train, got a {type(model).__name__} all frozen")
    if found:
        return found[0].device, found[0].dtype
    raise ValueError(f"fit: model: expected parameters to train, got a {type(model).__name__} without")


def in_pass(optimizers: Sequence[torch.optim.Optimizer], model: Ensemble, trainer: Any) -> InPass | None:
    """The optimizer that steps within the pass, if it is one, and nothing has to look at gradients."""
    for optimizer in optimizers:
        if not isinstance(optimizer, InPass):
            continue
        if len(optimizers) > 1:
            raise ValueError(
                f"fit: optimizer: expected one alone that steps in the pass, got {len(optimizers)}"
            )
        refused: dict[str, Any] = {
            name: getattr(trainer, name)
            for name in ("clip_norm", "clip_value", "micro_batch_size", "scaler", "autocast", "penalty")
        }
        if not isinstance(trainer.loss, str):
            raise ValueError(
                f"fit: loss: expected the name of one beside an optimizer that steps in the pass, "
                f"got {name_of(trainer.loss)}"
            )
        for name, value in refused.items():
            if value is not None:
                raise ValueError(
                    f"fit: {name}: expected None beside an optimizer that steps in the pass (pyens.optim."
                    f"in_pass; nothing sees its gradients), got {value if isinstance(value, float) else name}"
                )
        if not isinstance(model, StackedMLP):
            raise ValueError(
                "fit: optimizer: expected an EnsembleLinear or EnsembleMLP beside one that steps in the "
                f"pass, got a {type(model).__name__}"
            )
        return optimizer
    return None


def scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    if scheduler is None:
        return
    kind = type(scheduler).__name__
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError(
            f"fit: scheduler: expected a schedule of epochs or steps, got a {kind}, by which a member's rate "
            "would depend on the losses of the others"
        )
    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise TypeError(
            f"fit: scheduler: expected a function that gives an LRScheduler, got a {kind} from it"
        )
    if scheduler.optimizer is not optimizer:
        raise ValueError(
            f"fit: scheduler: expected one of the optimizer that it is given, got a {kind} of another"
        )


def alike(argument: str, form: Sequence[Any], like: Sequence[Any]) -> None:
    """Rows of the same form."""
    if form != like:
        raise ValueError(f"fit: {argument}: expected rows like those of data, got shapes {form}")


def data(argument: str, data: Sequence[Any], *, members: int | None = None) -> int:
    """The number of rows; with `members` every member has as many of its own, `[E, N, ...]`."""
    axis, form = (0, "[N, ...]") if members is None else (1, f"[{members}, N, ...]")
    given = [t for t in data[:-1] if t is not None] + list(data[-1:])
    if len(given) < 2 or not all(isinstance(t, Tensor) and t.dim() > axis for t in given):
        got = [
            f"shape {list(t.shape)}" if isinstance(t, Tensor) else f"a {type(t).__name__}" for t in data[:4]
        ]
        more = f" and {len(data) - 4} more" * (len(data) > 4)
        raise TypeError(
            f"fit: {argument}: expected tensors {form}, inputs and target, "
            f"got {', '.join(got) or 'none'}{more}"
        )
    if members is not None and any(t.shape[0] != members for t in given):
        raise ValueError(
            f"fit: {argument}: expected tensors {form} under own_data, got shapes "
            f"{[list(t.shape) for t in given]}"
        )
    if len({t.shape[axis] for t in given}) > 1 or given[0].shape[axis] == 0:
        raise ValueError(
            f"fit: {argument}: expected the same number of rows in all, at least one, "
            f"got {[t.shape[axis] for t in given]}"
        )
    if len({t.device for t in given}) > 1:
        raise TypeError(f"fit: {argument}: expected one device, got {sorted({str(t.device) for t in given})}")
    for t in given:
        check_tensor("fit", argument, t)
    rows: int = given[0].shape[axis]
    return rows


def jackknife(
    sources: Randomness, members: int, groups: int | None, left_out: Sequence[int] | None
) -> tuple[int, tuple[int, ...]]:
    if not sources.jackknife:
        for argument, value in (("jackknife_groups", groups), ("left_out", left_out)):
            if value is not None:
                raise ValueError(f"fit: {argument}: expected None without randomness.jackknife, got {value}")
        return 0, ()
    groups = members if groups is None else count("jackknife_groups", groups)
    if groups < 2:
        raise ValueError("fit: jackknife_groups: expected at least 2, or nothing is left, got 1")
    chosen = tuple(range(members)) if left_out is None else tuple(integers("left_out", left_out))
    if len(chosen) != members or not all(0 <= group < groups for group in chosen):
        raise ValueError(
            f"fit: left_out: expected a group from 0 to {groups - 1} for each of {members} members, "
            f"got {list(chosen)}"
        )
    return groups, chosen


def warn(message: str) -> None:
    """Warns whoever called into this folder."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(os.path.dirname(__file__)):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
