"""Every operation of `pyens.ops` in plain PyTorch: the specification that the kernels are tested against."""

from pyens.reference.activation_strength import activation_strength
from pyens.reference.decorrelation import decorrelation_loss
from pyens.reference.ensemble_conv2d import ensemble_conv2d
from pyens.reference.ensemble_embedding import ensemble_embedding
from pyens.reference.ensemble_mlp import ensemble_mlp
from pyens.reference.ensemble_mlp_loss import ensemble_mlp_loss
from pyens.reference.int8 import ensemble_conv2d_int8, ensemble_mlp_int8
from pyens.reference.keyed_permutation import keyed_permutation
from pyens.reference.mask_channels import mask_channels
from pyens.reference.masked_mlp import masked_mlp, masked_mlp_loss
from pyens.reference.sparse_rows import ensemble_conv2d_sparse, ensemble_mlp_sparse
from pyens.reference.uncertainty import predictive_moments, predictive_uncertainty

__all__ = [
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
    "predictive_moments",
    "predictive_uncertainty",
]
