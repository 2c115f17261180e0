"""Modules: thin Python over `pyens.ops`."""

from pyens.nn._learning_rates import MemberLearningRates
from pyens.nn.ensemble_mlp import EnsembleLinear, EnsembleMLP, PackedEnsembleMLP

__all__ = ["EnsembleLinear", "EnsembleMLP", "MemberLearningRates", "PackedEnsembleMLP"]
