"""Specification of `pyens.ops.ensemble_mlp_loss`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyens._types import Loss
from pyens.reference.ensemble_mlp import ensemble_mlp


def _mse(output: Tensor, target: Tensor, temperature: float, smoothing: float) -> Tensor:
    return (output - target).square().mean(-1)


def _bce(output: Tensor, target: Tensor, temperature: float, smoothing: float) -> Tensor:
    target = target.expand_as(output)
    return F.binary_cross_entropy_with_logits(output, target, reduction="none").mean(-1)


def _gaussian_nll(output: Tensor, target: Tensor, temperature: float, smoothing: float) -> Tensor:
    mean, raw = output.chunk(2, -1)
    variance = F.softplus(raw) + 1e-6
    return (0.5 * variance.log() + (target - mean).square() / (2 * variance)).mean(-1)


def _cross_entropy(output: Tensor, target: Tensor, temperature: float, smoothing: float) -> Tensor:
    labels = target.expand(output.shape[:2]).unsqueeze(-1)
    logs = F.log_softmax(output / temperature, -1)
    if smoothing == 0:
        return -logs.gather(-1, labels).squeeze(-1)
    if smoothing == 1:  # then the label does not count, even if its probability is 0
        return -logs.mean(-1)
    return -(1 - smoothing) * logs.gather(-1, labels).squeeze(-1) - smoothing * logs.mean(-1)


# Outputs [E, B, O], target, temperature, label smoothing -> the loss of each example, [E, B].
LOSSES: dict[Loss, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "mse": _mse,
    "bce": _bce,
    "gaussian_nll": _gaussian_nll,
    "cross_entropy": _cross_entropy,
}


def ensemble_mlp_loss(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    loss: Loss,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    **network: Any,
) -> Tensor:
    """See `pyens.ops.ensemble_mlp_loss`; `network` are the options of `ensemble_mlp`."""

    def run(input: Tensor) -> Tensor:
        return ensemble_mlp(input, weights, biases, **network)

    return mean_losses(run, input, target, loss, temperature, sample_weight, label_smoothing)


def mean_losses(
    run: Callable[[Tensor], Tensor],
    input: Tensor,
    target: Tensor,
    loss: Loss,
    temperature: float,
    sample_weight: Tensor | None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The mean loss `[E]` of each member, whose outputs `[E, B, O]` are run(input)."""
    weight = torch.ones_like(input[..., 0]) if sample_weight is None else sample_weight  # [B] or [E, B]
    # Selected, not multiplied by 0: what is left out may be NaN.
    present = weight != 0
    input = torch.where(present.unsqueeze(-1), input, 0)
    target = torch.where(present if loss == "cross_entropy" else present.unsqueeze(-1), target, 0)
    output = run(input)
    if output.dtype != torch.float64:
        output, target = output.float(), _to_float(target)
    return weighted_mean(LOSSES[loss](output, target, temperature, label_smoothing), weight)


def weighted_mean(losses: Tensor, weight: Tensor) -> Tensor:
    """`[E]` of losses `[E, B]` with weights `[B]` or `[E, B]`; 0 where all of them are 0."""
    present = weight != 0
    if weight.shape[-1] > 0:  # the largest to 1: a division by a subnormal total has a gradient of NaN
        largest = weight.detach().double().amax(-1, keepdim=True)
        weight = weight.double() / torch.where(largest > 0, largest, 1)
    weight = weight.to(losses.dtype)
    # What is too small beside the largest stays above 0.
    info = torch.finfo(weight.dtype)
    smallest = info.smallest_normal * info.eps
    weight = torch.where(present & (weight == 0), smallest, weight)
    losses = torch.where(present, losses, 0)
    total = row_sums(weight)
    # Never a division by 0, whose gradient would be NaN even where it is not selected.
    mean = row_sums(losses * weight) / torch.where(total > 0, total, 1)
    return torch.where(total > 0, mean, 0)


def row_sums(rows: Tensor) -> Tensor:
    """`rows.sum(-1)` of `[B]` or `[E, B]`, bit for bit the same for any number of threads and of other rows.

    torch splits the sum of a single long row among the threads, but adds up each of several rows whole.
    """
    if rows.dim() == 2 and len(rows) != 1:
        return rows.sum(-1)
    return rows.reshape(1, -1).expand(2, -1).sum(-1)[0].reshape(rows.shape[:-1])


def _to_float(target: Tensor) -> Tensor:
    return target.float() if target.is_floating_point() else target
