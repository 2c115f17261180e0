"""Measures of predictions and of their uncertainty: plain functions over tensors of probabilities.

Conventions, the same in every function here:

- Probabilities are ``[B, K]`` (one distribution per example; for an ensemble, the mean of its members) or
  ``[E, B, K]`` (member axis first), float32 or float64, each row summing to 1. Labels are int64 ``[B]``.
- Everything is computed in float64 on the tensors' device. A measure of the whole batch is a 0-dim float64
  tensor; a measure per example is ``[B]`` (or ``[B, K]``) in the dtype that came in.
- Entropies are in nats. Out-of-distribution is the positive class. The Brier score sums over the classes
  (0 to 2). Calibration bins are ``(lo, hi]``.
- Input that makes no sense (wrong rank or dtype, label out of range, rows that don't sum to 1, NaN) raises
  TypeError or ValueError before anything is computed. Looking at the values synchronises a GPU.
"""

from pyens.metrics.calibration import ReliabilityCurve, expected_calibration_error, reliability_curve
from pyens.metrics.classification import accuracy, brier_score, nll
from pyens.metrics.confidence import ConfidenceCurve, confidence_curve
from pyens.metrics.ood import ood_auroc
from pyens.metrics.streaming import PredictiveMoments, PredictiveUncertainty
from pyens.metrics.uncertainty import (
    expected_entropy,
    mutual_information,
    predictive_entropy,
    predictive_variance,
)

__all__ = [
    "ConfidenceCurve",
    "PredictiveMoments",
    "PredictiveUncertainty",
    "ReliabilityCurve",
    "accuracy",
    "brier_score",
    "confidence_curve",
    "expected_calibration_error",
    "expected_entropy",
    "mutual_information",
    "nll",
    "ood_auroc",
    "predictive_entropy",
    "predictive_variance",
    "reliability_curve",
]
