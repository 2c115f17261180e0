"""Modules: thin Python over `pyens.ops`."""

from pyens.nn.batch_norm import EnsembleBatchNorm, EnsembleBatchNorm2d, fold_batchnorm
from pyens.nn.component_models import ComponentModels
from pyens.nn.ensemble import Ensemble
from pyens.nn.ensemble_conv2d import EnsembleConv2d
from pyens.nn.ensemble_embedding import EnsembleEmbedding
from pyens.nn.ensemble_mlp import EnsembleLinear, EnsembleMLP, PackedEnsembleMLP
from pyens.nn.ensemble_sequential import EnsembleSequential
from pyens.nn.initialize import initialize_
from pyens.nn.int8 import Int8EnsembleConv2d, Int8EnsembleMLP
from pyens.nn.masked_conv import MaskedConv2d
from pyens.nn.masked_mlp import MaskedMLP
from pyens.nn.masked_networks import forward_tiled, insert_masksembles_, set_mask_mode_
from pyens.nn.masksembles import Masksembles1D, Masksembles2D, Masksembles3D
from pyens.nn.mc_dropout import mc_dropout
from pyens.nn.pooling import EnsembleAvgPool2d, EnsembleMaxPool2d, Flatten
from pyens.nn.residual import Residual
from pyens.nn.sparse import SparseEnsembleConv2d, SparseEnsembleMLP
from pyens.nn.tabular import TabularEnsemble

__all__ = [
    "ComponentModels",
    "Ensemble",
    "EnsembleAvgPool2d",
    "EnsembleBatchNorm",
    "EnsembleBatchNorm2d",
    "EnsembleConv2d",
    "EnsembleEmbedding",
    "EnsembleLinear",
    "EnsembleMLP",
    "EnsembleMaxPool2d",
    "EnsembleSequential",
    "Flatten",
    "Int8EnsembleConv2d",
    "Int8EnsembleMLP",
    "MaskedConv2d",
    "MaskedMLP",
    "Masksembles1D",
    "Masksembles2D",
    "Masksembles3D",
    "PackedEnsembleMLP",
    "Residual",
    "SparseEnsembleConv2d",
    "SparseEnsembleMLP",
    "TabularEnsemble",
    "fold_batchnorm",
    "forward_tiled",
    "initialize_",
    "insert_masksembles_",
    "mc_dropout",
    "set_mask_mode_",
]
