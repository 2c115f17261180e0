"""Specification of `pyens.ops.ensemble_mlp_loss`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from pyens._types import Loss, LossOptions, LossReduction
from pyens.reference.ensemble_mlp import ensemble_mlp


def _mse(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(-1)


def _bce(output: Tensor, target: Tensor) -> Tensor:
    target = target.expand_as(output)
    return F.binary_cross_entropy_with_logits(output, target, reduction="none").mean(-1)


def _gaussian_nll(
    output: Tensor,
    target: Tensor,
    log_variance_min: Tensor | float | None = None,
    log_variance_max: Tensor | float | None = None,
) -> Tensor:
    mean, raw = output.chunk(2, -1)
    if log_variance_min is None or log_variance_max is None:
        variance = F.softplus(raw) + 1e-6
        return (0.5 * variance.log() + (target - mean).square() / (2 * variance)).mean(-1)
    low, high = _for_examples(log_variance_min, output), _for_examples(log_variance_max, output)
    s = low + _softplus(high - _softplus(high - raw) - low)
    return (s + (target - mean).square() * (-s).exp()).mean(-1) / 2


def _cross_entropy(
    output: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
) -> Tensor:
    labels = target.expand(output.shape[:2]).unsqueeze(-1)
    logs = F.log_softmax(output / temperature, -1)
    smoothing = label_smoothing
    if class_weight is not None:
        classes = torch.arange(output.shape[-1], device=labels.device)
        shares = (labels == classes).to(output.dtype) * (1 - smoothing) + smoothing / output.shape[-1]
        return _weighted_logs(logs, shares * _for_examples(class_weight, output))
    if smoothing == 0:
        return -logs.gather(-1, labels).squeeze(-1)
    if smoothing == 1:  # then the label does not count, even if its probability is 0
        return -logs.mean(-1)
    return -(1 - smoothing) * logs.gather(-1, labels).squeeze(-1) - smoothing * logs.mean(-1)


def _soft_cross_entropy(
    output: Tensor, target: Tensor, temperature: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    shares = target if label_smoothing == 0 else _smoothed(target, label_smoothing)
    return _weighted_logs(F.log_softmax(output / temperature, -1), shares)


def _huber(output: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    cut = (output - target).clamp(-_delta(delta, output), _delta(delta, output))
    return (cut * (output - target - cut / 2)).mean(-1)


def _smooth_l1(output: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    cut = (output - target).clamp(-_delta(delta, output), _delta(delta, output))
    return (cut / _delta(delta, output) * (output - target - cut / 2)).mean(-1)


def _quantile(output: Tensor, target: Tensor, quantiles: Sequence[float] | Tensor) -> Tensor:
    tau = quantiles
    if not isinstance(tau, Tensor):
        tau = torch.tensor(tau, dtype=torch.float64, device=output.device)
    error = target.unsqueeze(-1) - output.unflatten(-1, (-1, len(tau)))  # [E, B, K, Q]
    # The derivative, 0 where nothing is wrong and NaN where it is not known.
    slope = torch.where(error < 0, (tau - 1).to(error.dtype), error.detach())
    slope = torch.where(error > 0, tau.to(error.dtype), slope)
    losses: Tensor = (error * slope).flatten(-2).mean(-1)
    return losses


def _poisson_nll(output: Tensor, target: Tensor) -> Tensor:
    return (output.exp() - torch.where(target == 0, 0, target * output)).mean(-1)


# Outputs [E, B, O], target, options -> the loss of each example, [E, B].
LOSSES: dict[Loss, Callable[..., Tensor]] = {
    "mse": _mse,
    "bce": _bce,
    "gaussian_nll": _gaussian_nll,
    "cross_entropy": _cross_entropy,
    "huber": _huber,
    "smooth_l1": _smooth_l1,
    "quantile": _quantile,
    "poisson_nll": _poisson_nll,
    "soft_cross_entropy": _soft_cross_entropy,
}
# The options that each of them has.
LOSS_OPTIONS: dict[Loss, tuple[str, ...]] = {
    "gaussian_nll": ("log_variance_min", "log_variance_max"),
    "cross_entropy": ("temperature", "label_smoothing", "class_weight"),
    "soft_cross_entropy": ("temperature", "label_smoothing"),
    "huber": ("delta",),
    "smooth_l1": ("delta",),
    "quantile": ("quantiles",),
}


def ensemble_mlp_loss(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    loss: Loss,
    sample_weight: Tensor | None = None,
    reduction: LossReduction = "mean",
    **options: Any,
) -> Tensor:
    """See `pyens.ops.ensemble_mlp_loss`; `options` are those of the loss and of `ensemble_mlp`."""
    of_loss: Any = {name: options.pop(name) for name in LossOptions.__annotations__ if name in options}

    def run(input: Tensor) -> Tensor:
        return ensemble_mlp(input, weights, biases, **options)

    of_examples = example_losses if reduction == "none" else mean_losses
    return of_examples(run, input, target, loss, sample_weight, **of_loss)


def mean_losses(
    run: Callable[[Tensor], Tensor],
    input: Tensor,
    target: Tensor,
    loss: Loss,
    sample_weight: Tensor | None = None,
    **options: Unpack[LossOptions],
) -> Tensor:
    """The mean loss `[E]` of each member, whose outputs `[E, B, O]` are run(input)."""
    if sample_weight is None and options.get("class_weight") is None:
        losses, _ = _losses(run, input, target, loss, None, options)
        return row_sums(losses) / max(losses.shape[-1], 1)
    weight = torch.ones_like(input[..., 0]) if sample_weight is None else sample_weight  # [B] or [E, B]
    of_class = options.get("class_weight")
    if of_class is not None:
        options["class_weight"] = of_class = scaled_weights(of_class, _real(of_class))
    losses, target = _losses(run, input, target, loss, weight, options)
    return weighted_mean(losses, weight, None if of_class is None else weights_of(of_class, target, losses))


def example_losses(
    run: Callable[[Tensor], Tensor],
    input: Tensor,
    target: Tensor,
    loss: Loss,
    sample_weight: Tensor | None = None,
    **options: Unpack[LossOptions],
) -> Tensor:
    """The loss of each example times its weight, `[E, B]`."""
    if sample_weight is None:
        return _losses(run, input, target, loss, None, options)[0]
    losses, _ = _losses(run, input, target, loss, sample_weight, options)
    return torch.where(sample_weight != 0, losses, 0) * sample_weight.to(losses.dtype)


def _losses(
    run: Callable[[Tensor], Tensor],
    input: Tensor,
    target: Tensor,
    loss: Loss,
    weight: Tensor | None,
    options: Any,
) -> tuple[Tensor, Tensor]:
    """The losses of the examples `[E, B]`, and the target, without what is left out."""
    if weight is not None:  # selected, not multiplied by 0: what is left out may be NaN
        present = weight != 0
        input = torch.where(present.unsqueeze(-1), input, 0)
        target = torch.where(present if loss == "cross_entropy" else present.unsqueeze(-1), target, 0)
    output = run(input)
    if output.dtype != torch.float64:
        output = output.float()
    if target.is_floating_point():
        target = target.to(output.dtype)
    own = {name: options[name] for name in LOSS_OPTIONS.get(loss, ()) if name in options}
    return LOSSES[loss](output, target, **own), target


def weighted_mean(losses: Tensor, weight: Tensor, of_labels: Tensor | None = None) -> Tensor:
    """`[E]` of losses `[E, B]` with weights `[B]` or `[E, B]`; 0 where all of them are 0.

    of_labels: `[E, B]`, the weights of the examples' classes, with which the losses have been multiplied.
    """
    present = weight != 0
    weight = scaled_weights(weight, losses.dtype)
    losses = torch.where(present, losses, 0)
    total = row_sums(weight if of_labels is None else weight * of_labels)
    # Never a division by 0, whose gradient would be NaN even where it is not selected.
    mean = row_sums(losses * weight) / torch.where(total > 0, total, 1)
    return torch.where(total > 0, mean, 0)


def scaled_weights(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of which only ratios count, with 1 for the largest: a division by a subnormal total has a
    gradient of NaN. What is too small beside the largest stays above 0."""
    present = weight != 0
    if weight.shape[-1] > 0:
        largest = weight.detach().double().amax(-1, keepdim=True)
        weight = weight.double() / torch.where(largest > 0, largest, 1)
    weight = weight.to(dtype)
    info = torch.finfo(dtype)
    return torch.where(present & (weight == 0), info.smallest_normal * info.eps, weight)


def weights_of(class_weight: Tensor, labels: Tensor, like: Tensor) -> Tensor:
    """`[E, B]`, as `like`: the weights `[K]` or `[E, K]` of the classes of labels `[B]` or `[E, B]`."""
    each = class_weight.unsqueeze(1) if class_weight.dim() == 2 else class_weight
    index = labels.expand(like.shape).unsqueeze(-1)
    found = each.expand(*like.shape, class_weight.shape[-1]).gather(-1, index).squeeze(-1)
    return found.to(like.dtype)


def row_sums(rows: Tensor) -> Tensor:
    """`rows.sum(-1)` of `[B]` or `[E, B]`, bit for bit the same for any number of threads and of other rows.

    torch splits the sum of a single long row among the threads, but adds up each of several rows whole.
    """
    if rows.dim() == 2 and len(rows) != 1:
        return rows.sum(-1)
    return rows.reshape(1, -1).expand(2, -1).sum(-1)[0].reshape(rows.shape[:-1])


def _for_examples(value: Tensor | float, output: Tensor) -> Tensor:
    """What `[K]` or `[E, K]`, or one number for all, has for outputs `[E, B, K]`."""
    if not isinstance(value, Tensor):
        return output.new_full((), value)
    value = value.to(output.dtype)
    return value.unsqueeze(1) if value.dim() == 2 else value


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=50 if x.dtype == torch.float64 else 20)  # beyond it nothing is seen


def _weighted_logs(logs: Tensor, shares: Tensor) -> Tensor:
    """A share of 0 leaves its class out, even where its probability is 0."""
    return -(torch.where(shares == 0, 0, logs) * shares).sum(-1)


def _smoothed(target: Tensor, smoothing: float) -> Tensor:
    return target * (1 - smoothing) + smoothing / target.shape[-1]


def _delta(delta: float, output: Tensor) -> float:
    info = torch.finfo(output.dtype)
    return min(max(delta, info.smallest_normal), info.max)


def _real(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
