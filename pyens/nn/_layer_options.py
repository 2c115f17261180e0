"""The options of an `EnsembleMLP`'s layers: checked, and kept as tuples where they are sequences."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from pyens._kinds import check_number
from pyens._types import Activation, Norm, Residual
from pyens.reference.activations import activation_module
from pyens.reference.ensemble_mlp import for_each

T = TypeVar("T")
Rates = float | tuple[float, ...] | tuple[tuple[float, ...], ...]

NORMS = ("layer_norm", "rms_norm")
POSITIONS = {
    "norm_position": ("before_activation", "after_activation"),
    "dropout_position": ("after_activation", "before_norm"),
}


def _several(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, (str, bytes))


def _counted(argument: str, given: Sequence[Any], count: int, of: str = "hidden layers") -> tuple[Any, ...]:
    if len(given) != count:
        raise ValueError(
            f"EnsembleMLP: {argument}: expected one, or one for each of the {count} {of}, got {len(given)}"
        )
    return tuple(given)


def checked_activation(
    activation: Activation | Sequence[Activation], hidden: int
) -> Activation | tuple[Activation, ...]:
    if not _several(activation):
        activation_module(activation, "EnsembleMLP")  # type: ignore[arg-type]
        return activation  # type: ignore[return-value]
    for name in activation:
        activation_module(name, "EnsembleMLP")
    return _counted("activation", activation, hidden)


def checked_output_activation(activation: Activation) -> Activation:
    try:
        activation_module(activation, "EnsembleMLP")
    except ValueError as error:
        raise ValueError(str(error).replace(": activation:", ": output_activation:", 1)) from None
    return activation


def checked_norm(
    norm: Norm | Sequence[Norm | None] | None, hidden_features: Sequence[int]
) -> Norm | tuple[Norm | None, ...] | None:
    """The norm of all hidden layers or those of each; None where no layer has one."""
    kept = _counted("norm", norm, len(hidden_features)) if _several(norm) else norm  # type: ignore[arg-type]
    for layer, kind in enumerate(kept if isinstance(kept, tuple) else (kept,)):
        if kind is not None and kind not in NORMS:
            place = f"norm[{layer}]" if isinstance(kept, tuple) else "norm"
            raise ValueError(f'EnsembleMLP: {place}: expected layer_norm, rms_norm or None, got "{kind}"')
    each = norms_of(kept, len(hidden_features))
    for layer, (kind, width) in enumerate(zip(each, hidden_features, strict=True)):
        if kind is not None and width == 1:
            raise ValueError(
                f"EnsembleMLP: norm: expected no norm of hidden layer {layer}, which has one feature, "
                f"got {kind}"
            )
    if isinstance(kept, tuple) and not any(kept):
        return None
    return kept  # type: ignore[return-value]


def norms_of(norm: Any, hidden: int) -> list[Norm | None]:
    """That of each hidden layer."""
    return for_each(norm, hidden)


def checked_eps(norm_eps: float | None) -> float | None:
    if norm_eps is None:
        return None
    check_number("EnsembleMLP", "norm_eps", norm_eps)
    if not 0 < norm_eps < math.inf:
        raise ValueError(f"EnsembleMLP: norm_eps: expected a positive number, got {norm_eps}")
    return float(norm_eps)


def checked_position(argument: str, position: T) -> T:
    if position not in POSITIONS[argument]:
        raise ValueError(
            f"EnsembleMLP: {argument}: expected {' or '.join(POSITIONS[argument])}, got {position!r}"
        )
    return position


def checked_residual(residual: Residual, in_features: int, hidden_features: Sequence[int]) -> Residual:
    """Whether hidden layers have one; False where none has."""
    pairs = list(itertools.pairwise([in_features, *hidden_features]))
    if not isinstance(residual, (bool, Sequence)) or isinstance(residual, str):
        raise TypeError(f"EnsembleMLP: residual: expected a bool, or a sequence of them, got {residual!r}")
    if not isinstance(residual, bool):
        kept = tuple(map(bool, _counted("residual", residual, len(pairs))))
        for layer, (reads, width) in enumerate(pairs):
            if kept[layer] and reads != width:
                raise ValueError(
                    f"EnsembleMLP: residual: expected no residual of hidden layer {layer}, which is not as "
                    f"wide as what it reads, got {reads} inputs and {width} outputs"
                )
        return kept if any(kept) else False
    if residual and all(reads != width for reads, width in pairs):
        raise ValueError("EnsembleMLP: residual: expected a hidden layer as wide as what it reads, got none")
    return residual


def checked_bias(bias: bool | Sequence[bool], layers: int) -> list[bool]:
    """Whether each layer has one."""
    if _several(bias):
        return [bool(one) for one in _counted("bias", bias, layers, "layers")]  # type: ignore[arg-type]
    return [bool(bias)] * layers


def checked_dropout(dropout: Any, ensemble_size: int, hidden: int) -> Rates:
    """The rates in as few numbers as say them: p, one for each member, or of the hidden layers."""
    rates = dropout.tolist() if isinstance(dropout, Tensor) else dropout
    several = _several(rates)
    each: Sequence[Any] = rates if several else [rates]
    deep = several and any(_several(row) for row in each)
    for member, row in enumerate(each):
        for layer, rate in enumerate(row if _several(row) else [row]):
            name = f"dropout[{member}][{layer}]" if deep else f"dropout[{member}]" if several else "dropout"
            check_number("EnsembleMLP", name, rate)
            if not 0 <= rate < 1:
                raise ValueError(f"EnsembleMLP: {name}: expected 0 <= dropout < 1, got {rate}")
    sizes = (ensemble_size, 1) if deep else (ensemble_size,)
    ragged = deep and any(not _several(row) or len(row) != hidden for row in each)
    if several and (len(each) not in sizes or ragged):
        of_layers = f", or [1 or {ensemble_size}, {hidden}] of the hidden layers" if deep else ""
        got = [len(row) if _several(row) else row for row in each] if ragged else len(each)
        raise ValueError(
            f"EnsembleMLP: dropout: expected one rate, or one for each of the {ensemble_size} members"
            f"{of_layers}, got {got}"
        )
    return fewest_rates(each)


def fewest_rates(rates: Sequence[Any]) -> Rates:
    """Rates of dropout of the members, each a number or one for each hidden layer, without what is the same.

    One number where all have that, one row where all have it, and numbers where no layer has its own.
    """
    rows = [tuple(row) if _several(row) else row for row in rates]
    if isinstance(rows[0], tuple):
        if all(len(set(row)) <= 1 for row in rows):
            return fewest_rates([row[0] if row else 0.0 for row in rows])
        return tuple(dict.fromkeys(rows)) if len(set(rows)) == 1 else tuple(rows)
    return rows[0] if len(set(rows)) == 1 else tuple(rows)


def rates_of(rates: Rates, members: Iterable[int]) -> Rates:
    """Those of the members chosen."""
    if not isinstance(rates, tuple) or is_of_layers(rates):
        return rates
    return fewest_rates([rates[member] for member in members])


def is_of_layers(rates: Rates) -> bool:
    """Whether they are `[1, H]`: of the hidden layers, the same for all members."""
    return isinstance(rates, tuple) and len(rates) == 1 and isinstance(rates[0], tuple)


def as_json(value: Any) -> Any:
    """Tuples as lists."""
    return [as_json(one) for one in value] if isinstance(value, tuple) else value
