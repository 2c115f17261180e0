"""Every operation of `pyens.ops` in plain PyTorch: the specification that the kernels are tested against."""

from pyens.reference.decorrelation import decorrelation_loss
from pyens.reference.ensemble_mlp import ensemble_mlp
from pyens.reference.uncertainty import predictive_moments, predictive_uncertainty

__all__ = ["decorrelation_loss", "ensemble_mlp", "predictive_moments", "predictive_uncertainty"]
