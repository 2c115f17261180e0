"""What happens when an ensemble answers only where it is confident enough."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyens.metrics import _checks


class ConfidenceCurve(NamedTuple):
    """Per confidence threshold, how many examples are answered and how many of those answers are right."""

    threshold: Tensor  # [T] float64
    answered: Tensor  # [T] float64, share of the examples with max_k p >= threshold
    accuracy: Tensor | None  # [T] float64, among the answered, NaN where none is; None without labels


class RiskCoverageCurve(NamedTuple):
    """Per number of answered examples 1..B, the most confident first."""

    coverage: Tensor  # [B] float64, share of the examples that are answered
    risk: Tensor  # [B] float64, their mean loss
    threshold: Tensor  # [B], the lowest confidence among them, in its own dtype


def confidence_curve(
    probabilities: Tensor,
    labels: Tensor | None = None,
    *,
    thresholds: Tensor | Sequence[float] | None = None,
) -> ConfidenceCurve:
    """Share of examples with ``max_k p_bk >= τ``, and the accuracy among them, for every threshold τ.

    Args:
        probabilities: ``[B, K]``, rows sum to 1.
        labels: int64 ``[B]``, in 0..K-1; None for examples of no known class, which have no accuracy.
        thresholds: ``[T]`` values in [0, 1], in any order; 0, 0.01, ..., 1 if not given. They are compared in
            the dtype of the probabilities: float32 0.9 reaches the threshold 0.9.

    Returns:
        ConfidenceCurve of ``[T]`` tensors.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Sparsity", section 3.4 and Figure 1.
    """
    _checks.probabilities("confidence_curve", "probabilities", probabilities, "[B, K]")
    if labels is not None:
        _checks.labels("confidence_curve", labels, probabilities)
    thresholds = _thresholds(thresholds).to(probabilities.device)

    confidence, order = probabilities.detach().amax(-1).sort()  # ascending
    examples = len(confidence)
    refused = torch.searchsorted(confidence, thresholds.to(confidence.dtype))  # number with confidence < τ
    answered = examples - refused
    accuracy = None
    if labels is not None:
        most_confident_first = (probabilities.argmax(-1) == labels)[order].flip(0)
        right = torch.cat(
            [answered.new_zeros(1), most_confident_first.cumsum(0)]
        )  # of the first 0, 1, ..., B
        accuracy = right[answered].double() / answered  # 0/0 is NaN
    return ConfidenceCurve(thresholds, answered.double() / examples, accuracy)


def risk_coverage_curve(confidence: Tensor, losses: Tensor) -> RiskCoverageCurve:
    """Mean loss of the i most confident examples, for i = 1..B: ``risk_i = 1/i Σ_{j <= i} loss_(j)``.

    Examples that tie count with their mean loss: what any order among them gives on average, so that the
    order of the input changes nothing. (One threshold cannot separate them: `pyens.decisions` answers all or
    none.)

    Args:
        confidence: ``[B]``, higher where an answer is more trusted: max p, the negative of an entropy or of a
            variance, ... May be infinite.
        losses: ``[B]`` finite floats, in any unit; or bool, True where the answer is wrong: then the risk is
            the error rate.

    Returns:
        RiskCoverageCurve of ``[B]`` tensors; coverage rises to 1, where the risk is the mean of all losses.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Deep Ensemble", Selective Classification.
    """
    return _risk_coverage("risk_coverage_curve", confidence, losses)


def aurc(confidence: Tensor, losses: Tensor) -> Tensor:
    """Area under the risk-coverage curve, ``1/B Σ_i risk_i``: how well confidence sorts out the losses.

    The mean over all B coverages of `risk_coverage_curve`, ties as there.

    Args:
        confidence: ``[B]``, higher where an answer is more trusted.
        losses: ``[B]`` finite floats, or bool, True where the answer is wrong.

    Returns:
        0-dim float64 in the unit of the losses; a confidence that says nothing gives their mean.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Deep Ensemble", Selective Classification; the area as Geifman, Uziel and El-Yaniv (2019) define
    it.
    """
    return _risk_coverage("aurc", confidence, losses).risk.mean()


def _risk_coverage(function: str, confidence: Tensor, losses: Tensor) -> RiskCoverageCurve:
    confidence, losses = checked_losses(function, confidence, losses)
    descending, order = confidence.detach().sort(descending=True)
    before = -descending  # ascending, for searchsorted
    first = torch.searchsorted(before, before)  # of those that tie with it
    end = torch.searchsorted(before, before, right=True)
    total = torch.cat([losses.new_zeros(1), losses[order].cumsum(0)])  # of the first 0, 1, ..., B
    mean_of_tied = (total[end] - total[first]) / (end - first)
    answered = torch.arange(1, len(before) + 1, device=before.device)
    risk = (total[first] + (answered - first) * mean_of_tied) / answered
    return RiskCoverageCurve(answered.double() / len(before), risk, descending)


def checked_losses(function: str, confidence: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Both after the checks that `risk_coverage_curve` promises; the losses in float64."""
    _checks.floats(function, "confidence", confidence, "[B]")
    if isinstance(losses, Tensor) and losses.dtype == torch.bool:
        _checks.mask(function, "losses", losses, "confidence", confidence)
        return confidence, losses.double()
    _checks.floats(function, "losses", losses, "[B]")
    _checks.finite(function, "losses", losses)
    _checks.like(function, "losses", losses.to(confidence.dtype), "confidence", confidence)
    return confidence, losses.double()


def _thresholds(values: Tensor | Sequence[float] | None) -> Tensor:
    if values is None:
        return torch.arange(101, dtype=torch.float64) / 100
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor(values, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            got = type(values).__name__
            raise TypeError(f"confidence_curve: thresholds: expected a list of numbers, got {got}") from None
    _checks.floats("confidence_curve", "thresholds", values, "[T]")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            "confidence_curve: thresholds: expected values in [0, 1], "
            f"got {values.min().item():.6g} to {values.max().item():.6g}"
        )
    return values.double().contiguous()  # searchsorted warns about strides
