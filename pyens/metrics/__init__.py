"""Measures of predictions and of their uncertainty: plain functions over tensors of probabilities.

Conventions, the same in every function here:

- Probabilities are ``[B, K]`` (one distribution per example; for an ensemble, the mean of its members) or
  ``[E, B, K]`` (member axis first), float32 or float64, each row summing to 1. Labels are int64 ``[B]``.
- A function sees all examples at once. Streaming are the classes, which hold sums of a fixed size:
  `CalibrationError`.
- Everything is computed in float64 on the tensors' device. A measure of the whole batch is a 0-dim float64
  tensor; a measure per example is ``[B]`` (or ``[B, K]``) in the dtype that came in.
- Entropies are in nats. Out-of-distribution is the positive class. The Brier score sums over the classes
  (0 to 2). Calibration bins are ``(lo, hi]``.
- Input that makes no sense (wrong rank or dtype, label out of range, rows that don't sum to 1, NaN) raises
  TypeError or ValueError before anything is computed. Looking at the values synchronises a GPU.
"""

from pyens.metrics.calibration import (
    CalibrationError,
    ReliabilityCurve,
    classwise_calibration_error,
    expected_calibration_error,
    reliability_curve,
)
from pyens.metrics.classification import (
    BrierDecomposition,
    accuracy,
    auroc,
    brier_decomposition,
    brier_score,
    confusion_matrix,
    nll,
)

from pyens.metrics.difference import (
    hamming_prediction_difference,
    label_prediction_difference,
    prediction_difference,
    relative_prediction_difference,
)

from pyens.metrics.ood import ood_aupr, ood_auroc, ood_fpr95

from pyens.metrics.selective import (
    ConfidenceCurve,
    RiskCoverageCurve,
    aurc,
    confidence_curve,
    risk_coverage_curve,
)
from pyens.metrics.uncertainty import (
    expected_entropy,
    mutual_information,
    predictive_entropy,
    predictive_variance,
)

__all__ = [
    "BrierDecomposition",
    "CalibrationError",
    "ConfidenceCurve",
    "ReliabilityCurve",
    "RiskCoverageCurve",
    "accuracy",
    "aurc",
    "auroc",
    "brier_decomposition",
    "brier_score",
    "classwise_calibration_error",
    "confidence_curve",
    "confusion_matrix",
    "expected_calibration_error",
    "expected_entropy",
    "hamming_prediction_difference",
    "label_prediction_difference",
    "mutual_information",
    "nll",
    "ood_aupr",
    "ood_auroc",
    "ood_fpr95",
    "prediction_difference",
    "predictive_entropy",
    "predictive_variance",
    "relative_prediction_difference",
    "reliability_curve",
    "risk_coverage_curve",
]
