"""What `pyens.ops.ensemble_mlp_loss` refuses, for losses that are computed of any model's outputs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyens._kinds import check_number, check_tensor, name_of
from pyens._types import Loss
from pyens.ops.ensemble_mlp_loss import ensemble_mlp_loss
from pyens.reference.ensemble_mlp_loss import LOSS_OPTIONS, mean_losses, row_sums, weighted_mean

# Of the options that not every loss has: what leaves them out, and which have them.
OPTIONS: dict[str, tuple[float | None, str]] = {
    "temperature": (1, "cross_entropy and soft_cross_entropy have one"),
    "label_smoothing": (0, "cross_entropy and soft_cross_entropy have it"),
    "delta": (1, "huber and smooth_l1 have one"),
    "quantiles": (None, "quantile has them"),
    "class_weight": (None, "cross_entropy has them"),
    "log_variance_min": (None, "gaussian_nll has one"),
    "log_variance_max": (None, "gaussian_nll has one"),
}


def check_options(function: str, loss: Loss | Any, options: Mapping[str, Any]) -> None:
    """Refuses options of a wrong kind, out of range, or of another loss; `loss` may be a function."""
    own: Sequence[str] = LOSS_OPTIONS.get(loss, ()) if isinstance(loss, str) else ()  # type: ignore[call-overload]
    for name, value in options.items():
        none, losses = OPTIONS[name]
        if none is not None:
            check_number(function, name, value)
        elif value is None:
            continue
        elif isinstance(value, Tensor) or name == "class_weight":
            check_tensor(function, name, value)
        elif name != "quantiles":
            check_number(function, name, value)
        if name not in own and (none is None or value != none):
            got = f"a {type(value).__name__}" if none is None else value
            raise ValueError(
                f"{function}: {name}: expected {none} (only {losses}) with loss {loss}, got {got}"
            )
    for name in ("temperature", "delta"):
        if not 0 < options.get(name, 1) < math.inf:
            raise ValueError(f"{function}: {name}: expected a positive number, got {options[name]}")
    if not 0 <= options.get("label_smoothing", 0) <= 1:
        raise ValueError(
            f"{function}: label_smoothing: expected a number from 0 to 1, got {options['label_smoothing']}"
        )
    quantiles, least, most = (options.get(n) for n in ("quantiles", "log_variance_min", "log_variance_max"))
    if "quantiles" in own and quantiles is None:
        raise ValueError(f"{function}: quantiles: expected some with loss quantile, got None")
    if quantiles is not None:
        _check_quantiles(function, quantiles)
    for name, bound, other in (("min", least, "max"), ("max", most, "min")):
        if bound is None and (least is not None or most is not None):
            raise ValueError(
                f"{function}: log_variance_{name}: expected one beside log_variance_{other}, got None"
            )
        if bound is not None and not _holds(torch.isfinite, bound):
            raise ValueError(f"{function}: log_variance_{name}: expected finite numbers, got one that is not")
    if least is not None and _meet(least, most) and not _holds(lambda gap: gap >= 0, most - least):
        raise ValueError(f"{function}: log_variance_min: expected at most log_variance_max, got one above it")
    weight = options.get("class_weight")
    if weight is not None and not _holds(lambda w: w.isfinite() & (w >= 0), weight):
        raise ValueError(
            f"{function}: class_weight: expected finite weights of at least 0, got one that is not"
        )


def _check_quantiles(function: str, quantiles: Any) -> None:
    if isinstance(quantiles, Tensor):
        if quantiles.dim() != 1 or len(quantiles) == 0:
            raise ValueError(
                f"{function}: quantiles: expected [Q], at least one, got shape {list(quantiles.shape)}"
            )
        if not _holds(lambda q: (q > 0) & (q < 1), quantiles):
            raise ValueError(
                f"{function}: quantiles: expected numbers above 0 and below 1, got one that is not"
            )
        return
    if not isinstance(quantiles, Sequence) or isinstance(quantiles, (str, bytes)):
        raise TypeError(
            f"{function}: quantiles: expected a sequence of numbers, got {type(quantiles).__name__}"
        )
    if len(quantiles) == 0:
        raise ValueError(f"{function}: quantiles: expected [Q], at least one, got shape [0]")
    for i, quantile in enumerate(quantiles):
        check_number(function, f"quantiles[{i}]", quantile)
        if not 0 < quantile < 1:
            raise ValueError(
                f"{function}: quantiles[{i}]: expected a number above 0 and below 1, got {quantile}"
            )


def _meet(one: Any, other: Any) -> bool:
    """Whether they can be compared number by number: what else they are is found out later."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return True
    return one.device == other.device and one.shape[-1:] == other.shape[-1:]


def _holds(all: Any, value: Any) -> bool:
    """Whether it holds of all of them; True where they cannot be looked at."""
    if not isinstance(value, Tensor):
        value = torch.tensor(float(value), dtype=torch.float64)
    return not _is_readable(value) or bool(all(value.detach()).all())


def _is_readable(tensor: Tensor) -> bool:
    in_transform = torch._C._functorch.peek_interpreter_stack() is not None
    return not (torch.compiler.is_compiling() or in_transform or tensor.device.type != "cpu")


def check_values(
    output: Tensor, target: Tensor, loss: Loss, weight: Tensor | None, options: Mapping[str, Any]
) -> None:
    """Refuses tensors that do not fit outputs `[E, B, O]`."""
    members, rows, outputs = output.shape
    targets: tuple[int, ...] = (outputs,)
    if loss == "gaussian_nll":
        if outputs % 2:
            raise ValueError(
                "loss: output: expected an even number of outputs for gaussian_nll (means, then raw "
                f"variances), got {outputs}"
            )
        targets = (outputs // 2,)
    elif loss == "quantile":
        count = len(options["quantiles"])
        if outputs % count:
            raise ValueError(
                f"loss: output: expected a multiple of {count} outputs (each target's quantiles), "
                f"got {outputs}"
            )
        targets = (outputs // count,)
    elif loss == "cross_entropy":
        targets = ()
    given: dict[str, tuple[Any, tuple[int, ...]]] = {
        "target": (target, (members, rows, *targets)),
        "sample_weight": (weight, (members, rows)),
        "class_weight": (options.get("class_weight"), (members, outputs)),
        "log_variance_min": (options.get("log_variance_min"), (members, *targets)),
        "log_variance_max": (options.get("log_variance_max"), (members, *targets)),
    }
    for name, (tensor, shape) in given.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.shape not in (shape, shape[1:]):
            raise ValueError(
                f"loss: {name}: expected shape {list(shape[1:])} or {list(shape)}, "
                f"got shape {list(tensor.shape)}"
            )
        if name == "target" and loss == "cross_entropy":
            if tensor.dtype != torch.int64:
                raise TypeError(f"loss: target: expected int64 classes for cross_entropy, got {tensor.dtype}")
        elif tensor.dtype not in (output.dtype, torch.float32) or (
            output.dtype == torch.float64 != tensor.dtype
        ):
            raise TypeError(
                f"loss: {name}: expected the dtype of output ({output.dtype}), got {tensor.dtype}"
            )
        if tensor.requires_grad and not name.startswith("log_variance"):
            raise ValueError(f"loss: {name}: expected requires_grad=False (it gets no gradient), got True")
    if not _is_readable(output):
        return
    if weight is not None and not bool((weight.isfinite() & (weight >= 0)).all()):
        raise ValueError("loss: sample_weight: expected finite weights of at least 0, got one that is not")
    if loss == "cross_entropy":
        wrong = (target < 0) | (target >= outputs)
        if bool((wrong if weight is None else wrong & (weight != 0)).any()):
            raise ValueError(f"loss: target: expected classes from 0 to {outputs - 1}, got one that is not")


def mean_losses_of(
    output: Tensor, target: Tensor, loss: Loss, weight: Tensor | None = None, **options: Any
) -> Tensor:
    """The mean loss `[E]` of outputs `[E, B, O]`: no bit of a member's gradient depends on the others.

    torch's exp, and what is made of it, rounds the last numbers of a tensor, which fill no vector, unlike the
    rest. So losses that take it of single numbers are computed by the kernel, on top of a layer that changes
    nothing; the others by the reference.
    """
    layer = _as_layer(output, target, loss, weight, options)
    if layer is None:
        return mean_losses(lambda x: x, output, target, loss, weight, **options)
    outputs, targets, weights = layer
    width = outputs.shape[-1]
    same = torch.eye(width, dtype=outputs.dtype, device=output.device).expand(len(output), -1, -1)
    with torch.autocast(output.device.type, enabled=False):
        return ensemble_mlp_loss(outputs, targets, [same], loss=loss, sample_weight=weights, **options)


def _as_layer(
    output: Tensor, target: Tensor, loss: Loss, weight: Tensor | None, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Outputs, target and weights with a row for each number of the target; None: not to be done."""
    if loss not in ("bce", "gaussian_nll", "poisson_nll") or not _is_readable(output):
        return None
    if any(isinstance(value, Tensor) for value in options.values()):
        return None  # bounds of the log variance of each target
    if output.dtype != torch.float64:
        output = output.float()
    parts = output.chunk(2, -1) if loss == "gaussian_nll" else (output,)
    columns = parts[0].shape[-1]
    outputs = torch.stack([part.flatten(1) for part in parts], -1)
    if weight is not None and columns > 1:
        weight = weight.repeat_interleave(columns, -1)
    return outputs, target.to(output.dtype).flatten(-2).unsqueeze(-1), weight


def mean_of_function(
    argument: str, function: Any, output: Tensor, target: Any, weight: Tensor | None
) -> Tensor:
    """The mean `[E]` of what a user's loss makes of outputs: `[E, B]`, or without weights also `[E]`."""
    losses = function(output, target)
    members, rows = output.shape[:2]
    if isinstance(losses, Tensor) and losses.shape == (members, rows):
        return row_sums(losses) / rows if weight is None else weighted_mean(losses, weight)
    if isinstance(losses, Tensor) and losses.shape == (members,) and weight is None:
        return losses
    form = f"[{members}, {rows}]" + f" or [{members}]" * (weight is None)
    got = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
    raise ValueError(f"{argument}: expected {form}, got {got} from {name_of(function)}")
