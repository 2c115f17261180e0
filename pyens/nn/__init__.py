"""Modules: thin Python over `pyens.ops`."""

from pyens.nn.ensemble_mlp import EnsembleLinear, EnsembleMLP, PackedEnsembleMLP

__all__ = ["EnsembleLinear", "EnsembleMLP", "PackedEnsembleMLP"]
