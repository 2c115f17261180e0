"""Does a confidence of 90 % mean right 90 times in 100? The reliability curve and the error it sums up to."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyens.metrics import _checks


class ReliabilityCurve(NamedTuple):
    """Per confidence bin, what was claimed and what came true. An empty bin has count 0 and NaN means."""

    confidence: Tensor  # [bins] float64, mean of max_k p
    accuracy: Tensor  # [bins] float64, share of right predictions
    count: Tensor  # [bins] int64, examples in the bin


def reliability_curve(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> ReliabilityCurve:
    """Mean confidence and accuracy in bins of equal width over the confidence ``max_k p_bk``.

    Bin i of n is ``(i/n, (i+1)/n]``, its edges rounded to the dtype of the probabilities; confidence 1 is in
    the last bin.

    Args:
        probabilities: ``[B, K]``, rows sum to 1.
        labels: int64 ``[B]``, in 0..K-1.
        bins: number of bins, at least 1.

    Returns:
        ReliabilityCurve of three ``[bins]`` tensors.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: the bins behind the expected calibration error as the glossary page "Deep Ensemble" describes it.
    """
    return _reliability_curve("reliability_curve", probabilities, labels, bins)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> Tensor:
    """Gap of confidence and accuracy, averaged over examples: ``Σ_i n_i/B · |accuracy_i - confidence_i|``.

    The bins are those of `reliability_curve`: equal width, ``(lo, hi]``; empty bins add nothing.

    Args:
        probabilities: ``[B, K]``, rows sum to 1.
        labels: int64 ``[B]``, in 0..K-1.
        bins: number of bins, at least 1. The value depends on it: compare only what was binned alike.

    Returns:
        0-dim float64 in [0, 1].

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: glossary page "Deep Ensemble", Expected Calibration Error; the binned estimate of the discrepancy
    that "Masksembles for Uncertainty Estimation", section 4.1, defines as an expectation.
    """
    curve = _reliability_curve("expected_calibration_error", probabilities, labels, bins)
    gap = (curve.accuracy - curve.confidence).abs()
    filled = curve.count > 0
    return (curve.count[filled] * gap[filled]).sum() / len(labels)


def _reliability_curve(function: str, probabilities: Tensor, labels: Tensor, bins: int) -> ReliabilityCurve:
    _checks.bins(function, bins)
    _checks.probabilities(function, "probabilities", probabilities, "[B, K]")
    _checks.labels(function, labels, probabilities)
    confidence = probabilities.amax(-1)  # [B]
    correct = probabilities.argmax(-1) == labels  # [B]

    # Edges in the confidences' own dtype: float32 0.7 lies on the edge 7/10 and not beside its float64 value.
    # Only the inner edges, so that a confidence a rounding error above 1 is still in the last bin.
    inner_edges = (torch.arange(1, bins, dtype=torch.float64) / bins).to(confidence)
    bin_of = torch.bucketize(confidence.detach(), inner_edges)  # [B], lower edge out, upper edge in

    # A product with the one-hot bins and not bincount: the same bits on every run on a GPU too.
    membership = F.one_hot(bin_of, bins).double()  # [B, bins]
    count = membership.sum(0)
    return ReliabilityCurve(
        confidence=confidence.double() @ membership / count,
        accuracy=correct.double() @ membership / count,
        count=count.long(),
    )
