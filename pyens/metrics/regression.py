"""How good predicted values and predicted normal distributions are.

A predictive distribution is given by mean and variance: ``[B]``, one normal distribution for each example,
or ``[E, B]``, those of the members, whose even mixture is the prediction. Outputs of several columns are
flattened into B by the caller.
"""

import math

import torch
from torch import Tensor

from pyens.metrics import _checks
from pyens.metrics.correlation import deviations_of


def rmse(predictions: Tensor, targets: Tensor) -> Tensor:
    """Root of the mean squared error: ``sqrt(mean (ŷ - y)²)``, over all elements.

    Args:
        predictions: ``[B]`` or ``[B, K]``; of an ensemble, the mean of its members.
        targets: of the same shape and dtype.

    Returns:
        0-dim float64 in the unit of the targets.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Sparsity", section 3.2.
    """
    _checks.floats("rmse", "predictions", predictions, "[B]", "[B, K]")
    _check_targets("rmse", targets, "predictions", predictions)
    error = predictions.double() - targets.double()
    largest = error.detach().abs().amax()
    scale = torch.where(largest.isfinite() & (largest > 0), largest, 1)  # no square overflows or underflows
    return scale * (error / scale).square().mean().sqrt()


def r_squared(predictions: Tensor, targets: Tensor) -> Tensor:
    """Share of the targets' variance that is explained: ``R² = 1 - Σ_b (ŷ_b - y_b)² / Σ_b (y_b - ȳ)²``.

    Args:
        predictions: ``[B]``.
        targets: ``[B]`` of the same dtype.

    Returns:
        0-dim float64, at most 1; 0 for always predicting the mean, negative for worse. Where all targets are
        equal it is -inf, or NaN if they are predicted exactly.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Beyond Point Estimate", Table 2.
    """
    _checks.floats("r_squared", "predictions", predictions, "[B]")
    _check_targets("r_squared", targets, "predictions", predictions)
    residual, y = predictions.double() - targets.double(), targets.double()
    deviation = deviations_of(y)
    largest = torch.maximum(residual.abs().amax(), deviation.abs().amax()).detach()
    scale = torch.where(largest.isfinite() & (largest > 0), largest, 1)
    return 1 - (residual / scale).square().sum() / (deviation / scale).square().sum()


def gaussian_nll(means: Tensor, variances: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-density in nats: ``-mean_b log mean_m N(y_b; μ_mb, σ²_mb)``, constants included.

    For one distribution ``½ log(2π σ²) + (y - μ)² / (2σ²)``. (The training loss of the same name leaves
    ``½ log 2π`` out.)

    Args:
        means: ``[B]``, or ``[E, B]`` for the even mixture of the members.
        variances: of the same shape and dtype, > 0.
        targets: ``[B]`` of that dtype.

    Returns:
        0-dim float64; depends on the unit of the targets by the logarithm of its scale.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Sparsity", section 3.2: NLL as a proper score of regression, and the members as a uniformly
    weighted mixture.
    """
    means, variances, targets = _distributions("gaussian_nll", means, variances, targets)
    log_density = -0.5 * ((2 * math.pi * variances).log() + (targets - means).square() / variances)
    return (math.log(len(means)) - log_density.logsumexp(0)).mean()


def gaussian_crps(means: Tensor, variances: Tensor, targets: Tensor) -> Tensor:
    """Continuous ranked probability score ``mean_b ∫ (F_b(t) - [t >= y_b])² dt`` of a normal distribution.

    ``σ (z (2Φ(z) - 1) + 2φ(z) - 1/√π)`` with ``z = (y - μ)/σ``; of the even mixture of members, with
    ``A(d, v) = E|N(d, v)| = d (2Φ(d/√v) - 1) + 2 √v φ(d/√v)``,

        mean_m A(y - μ_m, σ²_m) - ½ mean_mn A(μ_m - μ_n, σ²_m + σ²_n).

    Args:
        means: ``[B]``, or ``[E, B]`` for the even mixture of the members: then the work is E² B.
        variances: of the same shape and dtype, > 0.
        targets: ``[B]`` of that dtype.

    Returns:
        0-dim float64, >= 0, in the unit of the targets; less is better.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: a proper score of the predictive distributions that "Deep Ensemble" takes risks from; the forms of
    Gneiting and Raftery (2007) and of Grimit et al. (2006).
    """
    means, variances, targets = _distributions("gaussian_crps", means, variances, targets)
    to_target = _mean_distance(targets - means, variances).mean(0)
    spread = torch.zeros_like(to_target)
    for mean, variance in zip(means, variances, strict=True):  # one member against all: [E, B] at a time
        spread = spread + _mean_distance(mean - means, variance + variances).mean(0)
    return (to_target - spread / (2 * len(means))).mean()


def ensemble_crps(outputs: Tensor, targets: Tensor, *, fair: bool = False) -> Tensor:
    """Continuous ranked probability score of the members' outputs as a sample.

        empirical  mean_b (1/E Σ_m |x_mb - y_b| - 1/(2E²) Σ_mn |x_mb - x_nb|)
        fair       mean_b (1/E Σ_m |x_mb - y_b| - 1/(2E(E-1)) Σ_mn |x_mb - x_nb|)

    The empirical score is that of the step function of the outputs. It is biased against few members: they
    score worse than more members of the same distribution, for E = 1 as the mean absolute error. The fair
    score has the same expectation for every E, that of infinitely many members: it compares ensembles of
    different sizes.

    Args:
        outputs: ``[E, B]`` of the members.
        targets: ``[B]`` of the same dtype.
        fair: the fair score instead of the empirical one; needs E >= 2.

    Returns:
        0-dim float64 in the unit of the targets; less is better. The empirical score is >= 0, the fair one
        may be below 0.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: as `gaussian_crps`, for members that predict no variance; fair: Ferro, "Fair scores for ensemble
    forecasts" (2014), equation (7) of Zamo and Naveau (2018) its estimator.
    """
    _checks.floats("ensemble_crps", "outputs", outputs, "[E, B]")
    if fair and len(outputs) < 2:
        raise ValueError(f"ensemble_crps: outputs: expected two members or more if fair, got {len(outputs)}")
    _check_targets("ensemble_crps", targets, "outputs", outputs[0])
    error = (outputs.double() - targets.double()).sort(0).values  # from the target: no offset to cancel
    members = len(error)
    # Of the i-th smallest, 2i - E - 1 more of the others are below than above.
    rank = torch.arange(1 - members, members, 2, device=error.device, dtype=error.dtype)
    spread = (rank[:, None] * error).sum(0) / (members * (members - 1 if fair else members))
    return (error.abs().mean(0) - spread).mean()


def _check_targets(function: str, targets: Tensor, other: str, model: Tensor) -> None:
    _checks.floats(function, "targets", targets, "[B]", "[B, K]")
    _checks.like(function, "targets", targets, other, model)


def _distributions(
    function: str, means: Tensor, variances: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """float64 `[E, B]`, `[E, B]` and `[B]`, with E = 1 for a single distribution."""
    _checks.floats(function, "means", means, "[B]", "[E, B]")
    _checks.floats(function, "variances", variances, "[B]", "[E, B]")
    _checks.like(function, "variances", variances, "means", means)
    lowest = variances.min().item()
    if lowest <= 0:
        raise ValueError(f"{function}: variances: expected values > 0, got {lowest:.6g}")
    if means.ndim == 1:
        means, variances = means[None], variances[None]
    _check_targets(function, targets, "one example of means", means[0])
    return means.double(), variances.double(), targets.double()


def _mean_distance(difference: Tensor, variance: Tensor) -> Tensor:
    """E|N(difference, variance)|."""
    z = difference / variance.sqrt()
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return difference * torch.erf(z / math.sqrt(2)) + 2 * variance.sqrt() * density
