"""Prediction difference: how much models that should be the same differ on individual examples.

The M models are trained alike, and each of them may itself be an ensemble: their probabilities are
``[M, B, K]``, models first. With ``P_b(k) = 1/M Σ_m P_bm(k)``, what they predict on average.
"""

import torch
from torch import Tensor

from pyens.metrics import _checks


def prediction_difference(probabilities: Tensor, *, norm: int = 1) -> Tensor:
    """Mean distance of a model from the average of all: ``Δ_p = 1/B Σ_b 1/M Σ_m ‖P_bm - P_b‖_p``.

    For two models of a binary label Δ_1 is the mean of ``|P_b1(1) - P_b2(1)|``.

    Args:
        probabilities: ``[M, B, K]`` of the models, rows sum to 1.
        norm: p, 1 or 2.

    Returns:
        0-dim float64 in [0, 2]; 0 for M = 1.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Anti-Distillation", section 3, equation (1).
    """
    if norm not in (1, 2):
        raise ValueError(f"prediction_difference: norm: expected 1 or 2, got {norm!r}")
    _checks.probabilities("prediction_difference", "probabilities", probabilities, "[M, B, K]")
    models = probabilities.double()
    distances: Tensor = torch.linalg.vector_norm(models - models.mean(0), ord=norm, dim=-1)
    return distances.mean()


def relative_prediction_difference(probabilities: Tensor) -> Tensor:
    """The share of a prediction that differs: ``Δ^r = 1/B Σ_b 1/M Σ_m Σ_k |P_bm(k) - P_b(k)| / P_b(k)``.

    For a binary label given by the probabilities of its positive value alone, the sum over k has that one
    term: ``Δ^r_1``. A label that no model gives any probability adds 0.

    Args:
        probabilities: ``[M, B, K]`` of the models, rows sum to 1, for Δ^r; ``[M, B]`` of the positive label,
            in [0, 1], for Δ^r_1.

    Returns:
        0-dim float64, >= 0; 0 for M = 1.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Anti-Distillation", section 3, relative PD.
    """
    function = "relative_prediction_difference"
    _checks.floats(function, "probabilities", probabilities, "[M, B]", "[M, B, K]")
    if probabilities.ndim == 3:
        _checks.probabilities(function, "probabilities", probabilities, "[M, B, K]")
        return _relative(probabilities.double()).sum(-1).mean()
    low, high = probabilities.min().item(), probabilities.max().item()
    if low < 0 or high > 1:
        raise ValueError(f"{function}: probabilities: expected values in [0, 1], got {low:.6g} to {high:.6g}")
    return _relative(probabilities.double()).mean()


def label_prediction_difference(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Relative difference on the true label: ``Δ^L = 1/B Σ_b 1/M Σ_m |P_bm(y_b) - P_b(y_b)| / P_b(y_b)``.

    A label that no model gives any probability adds 0.

    Args:
        probabilities: ``[M, B, K]`` of the models, rows sum to 1.
        labels: int64 ``[B]``, in 0..K-1.

    Returns:
        0-dim float64, >= 0; 0 for M = 1.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Anti-Distillation", section 3, PD of the observed label. The available scan is damaged at the
    divisor; it is read as P_b(y_b), but a constant factor of ½ would fit as well, so compare values of this
    function with each other rather than with the printed ones.
    """
    function = "label_prediction_difference"
    _checks.probabilities(function, "probabilities", probabilities, "[M, B, K]")
    _checks.labels(function, labels, probabilities)
    models, examples, _ = probabilities.shape
    true_label = probabilities.gather(-1, labels.expand(models, examples)[..., None])
    return _relative(true_label.squeeze(-1).double()).mean()


def hamming_prediction_difference(probabilities: Tensor) -> Tensor:
    """How often two models predict different labels: ``Δ^H``, the mean over pairs of models and examples.

    ``1/B Σ_b 2/(M(M-1)) Σ_{m<n} [argmax_k P_bm(k) ≠ argmax_k P_bn(k)]``, counted from the votes.

    Args:
        probabilities: ``[M, B, K]`` of the models, rows sum to 1. Of classes that tie for the maximum, the
            first is predicted.

    Returns:
        0-dim float64 in [0, 1]; 0 for M = 1, which has no pair.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Anti-Distillation", section 3, Hamming PD.
    """
    _checks.probabilities("hamming_prediction_difference", "probabilities", probabilities, "[M, B, K]")
    models, examples, _ = probabilities.shape
    predicted = probabilities.argmax(-1).T.contiguous().sort(-1).values  # [B, M]
    # A model and all that predict the same as it stand side by side.
    end = torch.searchsorted(predicted, predicted, right=True)
    agreeing = (end - torch.searchsorted(predicted, predicted)).sum() - predicted.numel()  # ordered pairs
    pairs = examples * models * (models - 1)
    return (pairs - agreeing).double() / max(pairs, 1)


def _relative(values: Tensor) -> Tensor:
    """`|v_m - v| / v` with v = mean_m v_m >= 0, and 0 where v is 0."""
    mean = values.mean(0)
    return (values - mean).abs() / mean.masked_fill(mean == 0, 1.0)
