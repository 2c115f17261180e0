"""Modules: thin Python over `pyens.ops`."""

from pyens.nn.ensemble_embedding import EnsembleEmbedding
from pyens.nn.ensemble_mlp import EnsembleLinear, EnsembleMLP, PackedEnsembleMLP
from pyens.nn.tabular import TabularEnsemble

__all__ = ["EnsembleEmbedding", "EnsembleLinear", "EnsembleMLP", "PackedEnsembleMLP", "TabularEnsemble"]
