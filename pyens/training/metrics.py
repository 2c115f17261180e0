"""What `fit` measures of each member beside its loss, on the validation rows."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyens import metrics
from pyens._kinds import name_of

# One member's outputs [B, K] and the target -> one number.
Metric = Callable[[Tensor, Tensor], Any]
Mode = Literal["min", "max"]


class Named(NamedTuple):
    """A measure of `pyens.metrics`, which way it is better, and the losses whose outputs it can read."""

    function: Metric
    mode: Mode
    losses: tuple[str, ...]


def _binary(function: Metric) -> Metric:
    """Of probabilities `[B, K]` and labels, for `bce`: each column a question with two answers."""

    def of(probability: Tensor, target: Tensor) -> Any:
        return function(torch.stack([1 - probability, probability], -1).flatten(0, -2), _labels(target))

    return of


def _labels(target: Tensor) -> Tensor:
    labels = target.reshape(-1)
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError("expected a target of zeros and ones for this metric, got another value")
    return labels.long()


def _auroc(probability: Tensor, target: Tensor) -> Tensor:
    if probability.shape[-1] == 2:  # of cross_entropy
        return metrics.auroc(probability[:, 1].contiguous(), target == 1)
    if target.is_floating_point() and probability.shape[-1] == 1:
        return metrics.auroc(probability.reshape(-1), _labels(target) == 1)
    raise ValueError(f"expected two classes, or one column of bce, got {probability.shape[-1]}")


def _values(function: Metric) -> Metric:
    def of(prediction: Tensor, target: Tensor) -> Any:
        return function(prediction.double().reshape(-1), target.double().reshape(-1))

    return of


_CLASSES, _REAL = ("cross_entropy", "bce"), ("mse", "gaussian_nll", "huber", "smooth_l1")
METRICS: dict[str, Named] = {
    "accuracy": Named(metrics.accuracy, "max", _CLASSES),
    "auroc": Named(_auroc, "max", _CLASSES),
    "brier_score": Named(metrics.brier_score, "min", _CLASSES),
    "expected_calibration_error": Named(metrics.expected_calibration_error, "min", _CLASSES),
    "nll": Named(metrics.nll, "min", _CLASSES),
    "r_squared": Named(_values(metrics.r_squared), "max", _REAL),
    "rmse": Named(_values(metrics.rmse), "min", _REAL),
}


def resolve(asked: Sequence[str] | Mapping[str, Metric], loss: Any, temperature: float) -> dict[str, Metric]:
    """Functions of one member's outputs `[B, K]` and the target, by name."""
    if isinstance(asked, str) or not isinstance(asked, (Sequence, Mapping)):
        raise TypeError(
            f"fit: metrics: expected a list of names or a dict of functions, got a {type(asked).__name__}"
        )
    found: dict[str, Metric] = {}
    for name in asked:
        if not isinstance(name, str):
            raise TypeError(f"fit: metrics: expected names, got a {type(name).__name__}")
        if isinstance(asked, Mapping):
            function = asked[name]
            if not callable(function):
                raise TypeError(
                    f"fit: metrics[{name!r}]: expected a function, got a {type(function).__name__}"
                )
            found[name] = function
            continue
        named = METRICS.get(name)
        if named is None or loss not in named.losses:
            fit = [n for n, m in METRICS.items() if loss in m.losses]
            expected = f"some of {', '.join(fit)}" if fit else "a dict of functions"
            raise ValueError(f"fit: metrics: expected {expected} with loss {name_of(loss)}, got {name!r}")
        found[name] = _of_outputs(named.function, loss, temperature, name)
    for name in found:
        if name in ("loss", "train_loss", "validation_loss", "epoch", "member"):
            raise ValueError(f"fit: metrics: expected another name than {name}, which is there already")
    return found


def direction(asked: Sequence[str] | Mapping[str, Metric], monitor: str, mode: Mode | None) -> int:
    """1 where a lower value of what is monitored is better, -1 where a higher one is."""
    if mode not in (None, "min", "max"):
        raise ValueError(f"fit: mode: expected 'min' or 'max', got {mode!r}")
    if monitor != "loss" and monitor not in asked:
        raise ValueError(f"fit: monitor: expected {', '.join(['loss', *asked])}, got {monitor!r}")
    known: Mode | None = "min"
    if monitor != "loss":
        known = None if isinstance(asked, Mapping) else METRICS[monitor].mode
    if mode is not None and known is not None and mode != known:
        raise ValueError(f"fit: mode: expected {known!r} for {monitor}, got {mode!r}")
    if mode is None and known is None:
        raise ValueError(f"fit: mode: expected 'min' or 'max' for {monitor}, got None")
    return 1 if (mode or known) == "min" else -1


def _of_outputs(function: Metric, loss: str, temperature: float, name: str) -> Metric:
    def of(output: Tensor, target: Tensor) -> Any:
        output = output.double()
        if loss == "cross_entropy":
            return function((output / temperature).softmax(-1), target)
        if loss == "bce":
            probability = output.sigmoid()
            return (function if name == "auroc" else _binary(function))(probability, target)
        return function(output.chunk(2, -1)[0] if loss == "gaussian_nll" else output, target)

    return of


def evaluate(
    asked: Mapping[str, Metric], outputs: Tensor, target: Tensor, own_data: bool, present: Tensor | None
) -> np.ndarray:
    """float64 `[metrics, E]` of outputs `[E, B, K]`; rows that are not `present`, `[B]` or `[E, B]`, are left
    out. NaN for a member with outputs that are not finite."""
    values = np.full((len(asked), len(outputs)), np.nan)
    for m, output in enumerate(outputs):
        own = target[m] if own_data else target
        if present is not None:
            rows = present if present.dim() == 1 else present[m]
            output, own = output[rows], own[rows]
        if not output.isfinite().all():
            continue  # of a member that has diverged
        for i, (name, function) in enumerate(asked.items()):
            try:
                value = function(output, own)
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"fit: metrics[{name!r}]: {error}") from error
            number = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, numbers.Number)
            if not number and not (isinstance(value, np.ndarray) and value.size == 1):
                got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(
                    f"fit: metrics[{name!r}]: expected one number of a member's outputs [B, K] and the "
                    f"target, got {got}"
                )
            values[i, m] = float(value)
    return values
