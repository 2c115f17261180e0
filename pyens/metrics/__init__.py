"""Measures of predictions and of their uncertainty: plain functions over tensors of probabilities.

Conventions, the same in every function here:

- Probabilities are ``[B, K]`` (one distribution per example; for an ensemble, the mean of its members) or
  ``[E, B, K]`` (member axis first), float32 or float64, each row summing to 1. Labels are int64 ``[B]``.
- Values are ``[B]``, outputs of members and their variances ``[E, B]``, in units of the caller's.
- A function sees all examples at once. Streaming are the classes, which hold sums of a fixed size:
  `CalibrationError` over examples, `PredictiveUncertainty` and `PredictiveMoments` over members.
- Everything is computed in float64 on the tensors' device. A measure of the whole batch is a 0-dim float64
  tensor; a measure per example is ``[B]`` (or ``[B, K]``) in the dtype that came in. What `pyens.ops` reduces
  over the members (the streaming classes, the PVs) is computed as the operation says.
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
from pyens.metrics.correlation import pearson, spearman
from pyens.metrics.difference import (
    hamming_prediction_difference,
    label_prediction_difference,
    prediction_difference,
    relative_prediction_difference,
)
from pyens.metrics.intervals import (
    Interval,
    interval_coverage,
    mixture_cdf,
    mixture_interval,
    mixture_quantile,
    value_at_risk,
)
from pyens.metrics.ood import ood_aupr, ood_auroc, ood_fpr95
from pyens.metrics.progressive import ProgressiveScores
from pyens.metrics.regression import ensemble_crps, gaussian_crps, gaussian_nll, r_squared, rmse
from pyens.metrics.selective import (
    ConfidenceCurve,
    RiskCoverageCurve,
    aurc,
    confidence_curve,
    risk_coverage_curve,
)
from pyens.metrics.streaming import PredictiveMoments, PredictiveUncertainty
from pyens.metrics.uncertainty import (
    expected_entropy,
    mutual_information,
    predictive_entropy,
    predictive_variance,
)
from pyens.metrics.variation import (
    DeltaRatio,
    delta_ratio,
    distribution_variation,
    value_variation,
    variation_coefficient,
)

__all__ = [
    "BrierDecomposition",
    "CalibrationError",
    "ConfidenceCurve",
    "DeltaRatio",
    "Interval",
    "PredictiveMoments",
    "PredictiveUncertainty",
    "ProgressiveScores",
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
    "delta_ratio",
    "distribution_variation",
    "ensemble_crps",
    "expected_calibration_error",
    "expected_entropy",
    "gaussian_crps",
    "gaussian_nll",
    "hamming_prediction_difference",
    "interval_coverage",
    "label_prediction_difference",
    "mixture_cdf",
    "mixture_interval",
    "mixture_quantile",
    "mutual_information",
    "nll",
    "ood_aupr",
    "ood_auroc",
    "ood_fpr95",
    "pearson",
    "prediction_difference",
    "predictive_entropy",
    "predictive_variance",
    "r_squared",
    "relative_prediction_difference",
    "reliability_curve",
    "risk_coverage_curve",
    "rmse",
    "spearman",
    "value_at_risk",
    "value_variation",
    "variation_coefficient",
]
