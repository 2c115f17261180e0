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

    Source: the compressed deep ensemble paper (pruning and quantization), section 3.4 and Figure 1.
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


def _thresholds(values: Tensor | Sequence[float] | None) -> Tensor:
    if values is None:
        return torch.arange(101, dtype=torch.float64) / 100
    if not isinstance(values, Tensor):
        values = torch.tensor(values, dtype=torch.float64)
    _checks.floats("confidence_curve", "thresholds", values, "[T]")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            "confidence_curve: thresholds: expected values in [0, 1], "
            f"got {values.min().item():.6g} to {values.max().item():.6g}"
        )
    return values.double().contiguous()  # searchsorted warns about strides
