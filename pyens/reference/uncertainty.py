"""Specification of `pyens.ops.predictive_uncertainty` and `pyens.ops.predictive_moments`."""

import torch
from torch import Tensor

from pyens._types import Moments, Uncertainty


def predictive_uncertainty(logits: Tensor, *, from_probabilities: bool = False) -> Uncertainty:
    """See `pyens.ops.predictive_uncertainty`."""
    members = logits  # [E, B, K]
    if logits.dim() == 2 and from_probabilities:
        members = torch.stack([1 - logits, logits], -1)
    elif logits.dim() == 2:
        certain = logits.clamp_max(
            torch.finfo(logits.dtype).max
        )  # sigmoid(inf) is 1, though inf - inf is NaN
        members = torch.stack([torch.zeros_like(logits), certain], -1)
    p = members if from_probabilities else members.softmax(-1)
    mean = p.mean(0)
    total, expected = entropy(mean), entropy(p).mean(0)
    information = (total - expected).clamp_min(0)
    classes = torch.arange(members.shape[-1], device=members.device)
    votes = (members.argmax(-1, keepdim=True) == classes).sum(0)  # [B, K]; the first of classes that tie
    disagreement = 1 - votes.amax(-1).to(logits.dtype) / len(members)
    return Uncertainty(
        mean_probability=mean[..., 1] if logits.dim() == 2 else mean,
        predictive_entropy=total,
        expected_entropy=expected,
        mutual_information=information,
        distribution_pv=len(members) * information,
        vote_disagreement=torch.where(expected.isnan(), torch.nan, disagreement).detach(),
    )


def entropy(p: Tensor) -> Tensor:
    """``-Σ_k p_k log p_k`` over the last axis, in nats; 0 log 0 is 0, with a finite derivative."""
    return (-p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)


def predictive_moments(outputs: Tensor, *, variances: Tensor | None = None) -> Moments:
    """See `pyens.ops.predictive_moments`."""
    mean = outputs.mean(0)
    squares = (outputs - mean).square().sum(0)
    return Moments(
        mean=mean,
        std=(squares / (len(outputs) - 1)).sqrt(),
        min=outputs.amin(0),
        max=outputs.amax(0),
        aleatoric=None if variances is None else variances.mean(0),
        epistemic=None if variances is None else squares / len(outputs),
    )
