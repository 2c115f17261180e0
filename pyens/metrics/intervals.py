"""Intervals and risks from the predictive distribution, the even mixture of what the members predict.

A variance of 0 makes a member a point; with all of them 0, the distribution steps from mean to mean.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyens.metrics import _checks


class Interval(NamedTuple):
    """A central interval of the predictive distribution."""

    lower: Tensor  # [B]
    upper: Tensor  # [B]


def mixture_cdf(means: Tensor, variances: Tensor, values: Tensor) -> Tensor:
    """Probability of a target up to the value: ``F_b(t_b) = 1/E Σ_m Φ((t_b - μ_mb) / σ_mb)``.

    Args:
        means: ``[E, B]`` of the members. B may be 0.
        variances: ``[E, B]`` of the same dtype, >= 0.
        values: t, ``[B]`` of that dtype; with the targets here, the results of a calibrated prediction are
            uniform in [0, 1]. May be infinite.

    Returns:
        ``[B]`` in that dtype, in [0, 1]. Differentiable, except by the standard deviation of a point.

    Raises:
        TypeError, ValueError: for input that is not as above.

    Source: the predictive distribution behind "Deep Ensemble", Financial Risk Modeling.
    """
    _check("mixture_cdf", means, variances)
    _checks.floats("mixture_cdf", "values", values, "[B]", empty_batch=True)
    _checks.like("mixture_cdf", "values", values, "one member's means", means[0])
    return _cdf(means.double(), variances.double(), values.double()).to(means.dtype)


def mixture_quantile(means: Tensor, variances: Tensor, probability: float) -> Tensor:
    """The value that the target stays below with this probability: ``min {t : F_b(t) >= probability}``.

    Found by 64 bisections between the least and the greatest of the members' own quantiles, in float64.

    Args:
        means: ``[E, B]`` of the members, finite. B may be 0.
        variances: ``[E, B]`` of the same dtype, >= 0 and finite.
        probability: strictly between 0 and 1.

    Returns:
        ``[B]`` in that dtype, in the unit of the means. Not differentiable: it has no gradient.

    Raises:
        TypeError, ValueError: for input that is not as above.

    Source: "Deep Ensemble", Financial Risk Modeling, dynamic decision thresholds.
    """
    _checks.share("mixture_quantile", "probability", probability)
    return _quantile("mixture_quantile", means, variances, probability)


def mixture_interval(means: Tensor, variances: Tensor, *, coverage: float = 0.9) -> Interval:
    """Central interval: the quantiles of ``(1 - coverage)/2`` and ``(1 + coverage)/2``.

    Args:
        means: ``[E, B]`` of the members, finite. B may be 0.
        variances: ``[E, B]`` of the same dtype, >= 0 and finite.
        coverage: the probability inside, strictly between 0 and 1.

    Returns:
        Interval of two ``[B]`` tensors in that dtype, in the unit of the means, without gradients.

    Raises:
        TypeError, ValueError: for input that is not as above.

    Source: "Masksembles", section 2: for regression, the uncertainty is a variance or a confidence interval.
    """
    _checks.share("mixture_interval", "coverage", coverage)
    lower, upper = (
        _quantile("mixture_interval", means, variances, (1 + sign * coverage) / 2) for sign in (-1, 1)
    )
    return Interval(lower, upper)


def value_at_risk(means: Tensor, variances: Tensor, *, level: float = 0.05) -> Tensor:
    """The loss that is exceeded with probability `level`: ``VaR_b = -min {t : F_b(t) >= level}``.

    The predicted quantity is a gain, so that a loss is its negative; pass ``-means`` for predicted losses.

    Args:
        means: ``[E, B]`` of the members, finite. B may be 0.
        variances: ``[E, B]`` of the same dtype, >= 0 and finite.
        level: probability of the tail, strictly between 0 and 1.

    Returns:
        ``[B]`` in that dtype, in the unit of the means, without gradient; negative where even the tail gains.
        Of targets that follow the prediction, a share of 1 - level is covered by [-VaR, ∞): see
        `interval_coverage`.

    Raises:
        TypeError, ValueError: for input that is not as above.

    Source: "Deep Ensemble", Financial Risk Modeling.
    """
    _checks.share("value_at_risk", "level", level)
    return -_quantile("value_at_risk", means, variances, level)


def interval_coverage(lower: Tensor, upper: Tensor, targets: Tensor) -> Tensor:
    """Prediction interval coverage probability (PICP): ``mean_b [lower_b <= y_b <= upper_b]``.

    Args:
        lower: ``[B]``; -inf for intervals that are open below.
        upper: ``[B]`` of the same dtype, nowhere below `lower`; inf for intervals that are open above.
        targets: ``[B]`` of that dtype.

    Returns:
        0-dim float64 in [0, 1], to be held against the coverage that was asked for.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: the check on the intervals of "Deep Ensemble", Financial Risk Modeling.
    """
    for name, value in (("lower", lower), ("upper", upper), ("targets", targets)):
        _checks.floats("interval_coverage", name, value, "[B]")
        _checks.like("interval_coverage", name, value, "lower", lower)
    crossed = int((lower > upper).sum())
    if crossed:
        raise ValueError(
            f"interval_coverage: upper: expected values >= lower, got {crossed} of {len(lower)} below"
        )
    return ((lower <= targets) & (targets <= upper)).double().mean()


def _check(function: str, means: Tensor, variances: Tensor) -> None:
    for name, value in (("means", means), ("variances", variances)):
        _checks.floats(function, name, value, "[E, B]", empty_batch=True)
        _checks.finite(function, name, value)
    _checks.like(function, "variances", variances, "means", means)
    if variances.numel() and variances.min() < 0:
        raise ValueError(f"{function}: variances: expected values >= 0, got {variances.min().item():.6g}")


def _cdf(means: Tensor, variances: Tensor, values: Tensor) -> Tensor:
    point = variances == 0
    z = (values - means) / variances.masked_fill(point, 1.0).sqrt()
    below = torch.special.erfc(z * -math.sqrt(0.5)) / 2  # ndtr has lost its digits in the lower tail
    return torch.where(point, (z >= 0).double(), below).mean(0)


@torch.no_grad()
def _quantile(function: str, means: Tensor, variances: Tensor, probability: float) -> Tensor:
    _check(function, means, variances)
    mu, variance = means.double(), variances.double()
    z: Tensor = torch.special.ndtri(torch.tensor(probability, dtype=torch.float64, device=mu.device))
    of_members = mu + z * variance.sqrt()
    low, high = of_members.amin(0), of_members.amax(0)
    for _ in range(64):
        middle = low + (high - low) / 2
        reached = _cdf(mu, variance, middle) >= probability
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return high.to(means.dtype)
