"""The operations: custom kernels on CPU and GPU, each specified by its twin in `pyens.reference`."""

from pyens._types import ActivationStrength, Moments, Uncertainty
from pyens.ops.activation_strength import activation_strength
from pyens.ops.decorrelation import decorrelation_loss
from pyens.ops.ensemble_conv2d import ensemble_conv2d
from pyens.ops.ensemble_embedding import ensemble_embedding
from pyens.ops.ensemble_mlp import ensemble_mlp
from pyens.ops.ensemble_mlp_loss import ensemble_mlp_loss
from pyens.ops.int8 import Int8Weight, ensemble_conv2d_int8, ensemble_mlp_int8, pack_int8
from pyens.ops.keyed_permutation import keyed_permutation
from pyens.ops.mask_channels import mask_channels
from pyens.ops.masked_mlp import masked_mlp, masked_mlp_loss
from pyens.ops.sparse_rows import SparseRows, ensemble_conv2d_sparse, ensemble_mlp_sparse, pack_sparse
from pyens.ops.uncertainty import predictive_moments, predictive_uncertainty

__all__ = [
    "ActivationStrength",
    "Int8Weight",
    "Moments",
    "SparseRows",
    "Uncertainty",
    "activation_strength",
    "decorrelation_loss",
    "ensemble_conv2d",
    "ensemble_conv2d_int8",
    "ensemble_conv2d_sparse",
    "ensemble_embedding",
    "ensemble_mlp",
    "ensemble_mlp_int8",
    "ensemble_mlp_loss",
    "ensemble_mlp_sparse",
    "keyed_permutation",
    "mask_channels",
    "masked_mlp",
    "masked_mlp_loss",
    "pack_int8",
    "pack_sparse",
    "predictive_moments",
    "predictive_uncertainty",
]
