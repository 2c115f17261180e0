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
    # What members disagree on is a small difference of large entropies: in float64.
    exact = members.double()
    p = exact if from_probabilities else exact.softmax(-1)
    first = p[0]
    differences = p - first  # exactly 0 for members that are equal
    mean = first + differences.mean(0)
    of_members = entropy(p)
    total, expected = entropy(mean), of_members.mean(0)
    information = (total - entropy(first)) - (of_members - of_members[0]).mean(0)
    information = information.clamp_min(0)
    classes = torch.arange(members.shape[-1], device=members.device)
    votes = (members.argmax(-1, keepdim=True) == classes).sum(0)  # [B, K]; the first of classes that tie
    disagreement = 1 - votes.amax(-1).double() / len(members)
    measures = Uncertainty(
        mean_probability=mean[..., 1] if logits.dim() == 2 else mean,
        predictive_entropy=total,
        expected_entropy=expected,
        mutual_information=information,
        distribution_pv=len(members) * information,
        vote_disagreement=torch.where(expected.isnan(), torch.nan, disagreement).detach(),
    )
    return Uncertainty(*(measure.to(logits.dtype) for measure in measures))


def entropy(p: Tensor) -> Tensor:
    """``-Σ_k p_k log p_k`` over the last axis, in nats; 0 log 0 is 0, with a finite derivative."""
    return (-p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)


def predictive_moments(outputs: Tensor, *, variances: Tensor | None = None) -> Moments:
    """See `pyens.ops.predictive_moments`."""
    # In float64 no square of a float leaves the range; a power of two keeps those of float64 within it.
    x = outputs.double()
    with torch.no_grad():
        half_spread = (x / 2 - x[0] / 2).abs().amax(0)
        exponent = half_spread.where(half_spread.isfinite(), 0).frexp().exponent.clamp(-1000, 1000).double()
    first = x[0].ldexp(-exponent)
    differences = x.ldexp(-exponent) - first
    mean = differences.mean(0)
    squares = (differences - mean).square().sum(0)
    dtype = outputs.dtype
    moments = Moments(
        mean=torch.where(mean.isfinite(), x[0] + mean.ldexp(exponent), x.mean(0)).to(dtype),
        std=(squares / (len(x) - 1)).sqrt().ldexp(exponent).to(dtype),
        min=outputs.amin(0),
        max=outputs.amax(0),
        aleatoric=None,
        epistemic=None,
    )
    if variances is None:
        return moments
    return moments._replace(
        aleatoric=(variances.double() / len(x)).sum(0).to(dtype),
        epistemic=(squares / len(x)).ldexp(2 * exponent).to(dtype),
    )
