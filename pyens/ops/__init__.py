"""The operations: custom kernels on CPU and GPU, each specified by its twin in `pyens.reference`."""

from pyens.ops.decorrelation import decorrelation_loss
from pyens.ops.ensemble_mlp import ensemble_mlp
from pyens.ops.uncertainty import predictive_moments, predictive_uncertainty

__all__ = ["decorrelation_loss", "ensemble_mlp", "predictive_moments", "predictive_uncertainty"]
