"""Specification of the operations on `pyens.ops.SparseRows`: the dense ones, of weights with their zeros."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from pyens.reference.ensemble_conv2d import ensemble_conv2d
from pyens.reference.ensemble_mlp import ensemble_mlp


class Rows(Protocol):
    """What a `SparseRows` is here."""

    def dense(self) -> Tensor: ...


def ensemble_mlp_sparse(
    input: Tensor, weights: Sequence[Rows], biases: Sequence[Tensor] | None = None, **options: Any
) -> Tensor:
    """`ensemble_mlp` of the dense weights; options: activation, output_activation."""
    return ensemble_mlp(input, [rows.dense() for rows in weights], biases, **options)


def ensemble_conv2d_sparse(input: Tensor, weight: Rows, bias: Tensor | None = None, **options: Any) -> Tensor:
    """`ensemble_conv2d` of the dense weight; options: stride, padding, dilation, activation, max_pool."""
    return ensemble_conv2d(input, weight.dense(), bias, **options)
