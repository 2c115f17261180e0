"""The old name of `pyens.decisions`; goes with the next version."""

import warnings

from pyens.decisions import (
    ABSTAIN,
    coverage_threshold,
    most_uncertain,
    predict_or_abstain,
    risk_threshold,
    uncertainty_sampling,
)

__all__ = [
    "ABSTAIN",
    "coverage_threshold",
    "most_uncertain",
    "predict_or_abstain",
    "risk_threshold",
    "uncertainty_sampling",
]

warnings.warn("pyens.select is now pyens.decisions", DeprecationWarning, stacklevel=2)
