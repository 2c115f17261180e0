"""Ensembles frozen with those of their weights that are not zero."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyens._types import Activation
from pyens.nn._buffers import BufferList
from pyens.nn._frozen import FrozenConv2d, FrozenMLP
from pyens.nn._sequential import check_unchanged
from pyens.nn._stacked_mlp import StackedMLP
from pyens.nn.ensemble import Indices, chosen_members
from pyens.nn.ensemble_conv2d import EnsembleConv2d
from pyens.nn.ensemble_mlp import PackedEnsembleMLP
from pyens.ops.sparse_rows import SparseRows, ensemble_conv2d_sparse, ensemble_mlp_sparse, pack_sparse


class SparseWeight(nn.Module):
    """The kept weights of a layer as buffers: those of `pyens.ops.SparseRows`, and `shape`, int64.

    A state dict with another number of weights loads too, if the layer has the same shape.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    order: Tensor
    shape: Tensor

    def __init__(self, rows: SparseRows) -> None:
        super().__init__()
        self.row_shape = rows.row_shape
        self.register_buffer("shape", torch.tensor(rows.shape))
        for name in ("values", "columns", "starts", "order"):
            self.register_buffer(name, getattr(rows, name))

    def rows(self) -> SparseRows:
        buffers: dict[str, Any] = self._buffers
        return SparseRows(
            buffers["values"], buffers["columns"], buffers["starts"], buffers["order"], self.row_shape
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any, **options: Any
    ) -> None:
        shape = state_dict.get(prefix + "shape")
        fits = isinstance(shape, Tensor) and shape.tolist() == list(self.rows().shape)
        if isinstance(shape, Tensor) and not fits:
            errors: list[str] = arguments[-1]
            errors.append(
                f"size mismatch for {prefix[:-1]}: weights of shape {shape.tolist()} in the state dict, "
                f"{list(self.rows().shape)} here"
            )
            return
        for name in ("values", "columns"):
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if fits and isinstance(given, Tensor) and given.dim() == 1 and given.shape != own.shape:
                setattr(self, name, own.new_empty(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)

    def extra_repr(self) -> str:
        members, rows, *_ = self.rows().shape
        dense = members * rows * int(torch.tensor(self.row_shape).prod())
        return f"{list(self.rows().shape)}, {len(self.values)} of {dense} weights"


class SparseEnsembleMLP(FrozenMLP):
    """An `EnsembleMLP` frozen with the weights that are not zero: one multiply-add for each of them.

    Outputs are, bit for bit, those of the ensemble it was made of, where all is finite. In the state dict a
    layer has `layers.{l}.values`, `.columns`, `.starts`, `.order` (see `pyens.ops.SparseRows`) and
    `.shape`, and `biases.{l}`. There are no parameters: it does not train. On the CPU, in float32 and
    float64.

    Norms and residuals are refused, dropout is left out. Made by `EnsembleMLP.sparse()` and
    `EnsembleLinear.sparse()`.
    """

    _operation = staticmethod(ensemble_mlp_sparse)

    def __init__(self, ensemble: Any, masks: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        check_plain("sparse", ensemble)
        weights, biases = ensemble.stacked()
        if masks is not None and len(masks) != len(weights):
            raise ValueError(
                f"sparse: masks: expected one for each of the {len(weights)} layers, got {len(masks)}"
            )
        each = [None] * len(weights) if masks is None else masks
        rows = [pack_sparse(w.detach(), m) for w, m in zip(weights, each, strict=True)]
        self.ensemble_size = ensemble.ensemble_size
        self.activation: Activation | tuple[Activation, ...] = ensemble.activation
        self.output_activation = ensemble.output_activation
        self.layers = nn.ModuleList(map(SparseWeight, rows))
        self.biases = BufferList(biases)
        self.eval()

    def _weights(self) -> list[SparseRows]:
        layers: Any = self.layers
        return [layer.rows() for layer in layers]

    def select(self, indices: Indices) -> "SparseEnsembleMLP":
        masks = [_kept(rows) for rows in self._weights()]
        dense = self.dense().select(indices)
        chosen = chosen_members(self.ensemble_size, indices)
        return SparseEnsembleMLP(dense, [mask[chosen] for mask in masks])


class SparseEnsembleConv2d(FrozenConv2d):
    """An `EnsembleConv2d` frozen with the weights that are not zero, as `SparseEnsembleMLP` is.

    Buffers `weight.values`, `.columns`, `.starts`, `.order`, `.shape`, and `bias`. Made by
    `EnsembleConv2d.sparse()`.
    """

    _operation = staticmethod(ensemble_conv2d_sparse)

    def __init__(self, ensemble: EnsembleConv2d, masks: Tensor | None = None) -> None:
        super().__init__()
        check_unchanged("sparse", ensemble, EnsembleConv2d)
        ((weight,), biases) = ensemble.stacked()
        self.ensemble_size = ensemble.ensemble_size
        self.stride, self.padding, self.dilation = ensemble.stride, ensemble.padding, ensemble.dilation
        self.weight = SparseWeight(pack_sparse(weight.detach(), masks))
        self.register_buffer("bias", biases[0].detach().clone() if biases else None)
        self.eval()

    def _weight(self) -> SparseRows:
        return self.weight.rows()

    def select(self, indices: Indices) -> "SparseEnsembleConv2d":
        mask = _kept(self.weight.rows())
        chosen = chosen_members(self.ensemble_size, indices)
        return SparseEnsembleConv2d(self.dense().select(indices), mask[chosen])


def check_plain(function: str, ensemble: Any) -> None:
    """Refuses an MLP with more between its layers than an activation and dropout, or that computes more."""
    check_unchanged(function, ensemble, StackedMLP, PackedEnsembleMLP)
    for name, there_is in {"norm": ensemble.norm, "residual": ensemble.residual}.items():
        if there_is is not None and there_is is not False:
            raise ValueError(
                f"{function}: ensemble: expected no {name}, which such layers do not have, got "
                f"{ensemble.config()[name]}"
            )


def _kept(rows: SparseRows) -> Tensor:
    """bool: which weights are kept."""
    return rows._replace(values=torch.ones_like(rows.values)).dense() != 0
