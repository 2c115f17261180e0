"""Ensembles frozen with their weights in bytes."""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pyens import _kinds
from pyens._types import Activation
from pyens.nn._buffers import BufferList
from pyens.nn._frozen import FrozenConv2d, FrozenMLP
from pyens.nn._sequential import check_unchanged
from pyens.nn.ensemble import Ensemble, Indices, chosen_members
from pyens.nn.ensemble_conv2d import EnsembleConv2d
from pyens.nn.sparse import SparseWeight, check_plain
from pyens.ops.ensemble_mlp import ensemble_mlp
from pyens.ops.int8 import Int8Weight, ensemble_conv2d_int8, ensemble_mlp_int8, pack_int8
from pyens.ops.sparse_rows import pack_sparse

Observer = Callable[[], Any]


class KeepsFloat32(nn.Module):
    """A module whose numbers stay float32 under `double()`, `half()` and `to(dtype)`."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in list(self.named_buffers()):
            if buffer.dtype != before[name].dtype:
                place, _, own = name.rpartition(".")
                setattr(self.get_submodule(place), own, before[name].to(buffer.device))
        return self


class Int8Layer(nn.Module):
    """The weights of a layer in bytes as buffers: those of `pyens.ops.Int8Weight`.

    `sparse`: the state dict has `values.values`, `.columns`, `.starts`, `.order` and `.shape` (see
    `pyens.ops.SparseRows`) in the place of `values`, two bytes for each weight that is not zero. In memory
    there are all of them too, made anew where those have changed.
    """

    scale: Tensor
    offset: Tensor
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, weight: Int8Weight, sparse: bool) -> None:
        super().__init__()
        if sparse:
            self.values = SparseWeight(pack_sparse(weight.values))
        else:
            self.register_buffer("values", weight.values)
        for name in ("scale", "offset", "input_scale", "input_zero_point"):
            self.register_buffer(name, getattr(weight, name))
        # Made of what, in which state, and what it is. Compiled code does not look: it is told by the hook.
        self._dense: tuple[list[Tensor], list[int], Tensor] | None = None
        if sparse:
            self._whole_values()
            self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    @property
    def sparse(self) -> bool:
        return isinstance(self.values, SparseWeight)

    def _whole_values(self) -> Tensor:
        """All bytes of the weights, of those that are kept."""
        if self._dense is not None and torch.compiler.is_compiling():
            return self._dense[2]
        values: Any = self.values
        rows = values.rows()
        tensors = list(rows[:4])
        versions = [0 if t.is_inference() else t._version for t in tensors]
        if self._dense is not None:
            of, then, whole = self._dense
            if then == versions and all(map(operator.is_, of, tensors)):
                return whole
        self._dense = tensors, versions, rows.dense()
        return self._dense[2]

    def weight(self) -> Int8Weight:
        values: Any = self._whole_values() if self.sparse else self.values
        return Int8Weight(values, self.scale, self.offset, self.input_scale, self.input_zero_point)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_dense": None}

    def extra_repr(self) -> str:
        values: Any = self.values
        if not self.sparse:
            return f"{list(values.shape)}, {values.numel()} weights"
        shape = values.rows().shape
        kept = len(values.values)
        return f"{list(shape)}, {math.prod(shape)} weights, {kept} of them not zero"


# Not a lambda, which could not be pickled.
def _forget(layer: Int8Layer, incompatible_keys: Any) -> None:
    layer._dense = None


class Int8EnsembleMLP(KeepsFloat32, FrozenMLP):
    """An `EnsembleMLP` frozen with its weights in bytes, whose layers' inputs become bytes too.

    A quarter of the memory, and with the processor's instructions for bytes (VNNI) several times the speed;
    see `pyens.ops.ensemble_mlp_int8` for what is computed. Inputs and outputs are float32. In the state dict
    a layer has `layers.{l}.values`, `.scale`, `.offset`, `.input_scale` and `.input_zero_point`, and
    `biases.{l}`. There are no parameters: it does not train. On the CPU.

    Norms and residuals are refused, dropout is left out. Made by `EnsembleMLP.quantize()` and
    `EnsembleLinear.quantize()`, which say what the arguments are.
    """

    _operation = staticmethod(ensemble_mlp_int8)

    @torch.no_grad()
    def __init__(
        self,
        ensemble: Any,
        data: Tensor | Iterable[Tensor],
        *,
        observer: Observer | None = None,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        check_plain("quantize", ensemble)
        weights, biases = ensemble.stacked()
        check_float32("quantize", weights)
        self.ensemble_size = ensemble.ensemble_size
        self.activation: Activation | tuple[Activation, ...] = ensemble.activation
        self.output_activation = ensemble.output_activation
        hidden = self.activation
        activations = [hidden] * (len(weights) - 1) if isinstance(hidden, str) else list(hidden)
        batches = calibration_data(data)
        layers = []
        for i, weight in enumerate(weights):
            scale, zero_point = observe(batches, self.ensemble_size, 2, observer)
            layers.append(Int8Layer(pack_int8(weight.detach(), scale, zero_point), sparse))
            if i + 1 < len(weights):
                bias = [biases[i]] if len(biases) > 0 else None
                with as_they_are():
                    batches = [
                        ensemble_mlp(batch, [weight], bias, output_activation=activations[i])
                        for batch in batches
                    ]
        self.layers = nn.ModuleList(layers)
        self.biases = BufferList(biases)
        check_finite_biases("quantize", self.biases.buffers())
        self.eval()

    def _weights(self) -> list[Int8Weight]:
        layers: Any = self.layers
        return [layer.weight() for layer in layers]

    def select(self, indices: Indices) -> "Int8EnsembleMLP":
        chosen = chosen_members(self.ensemble_size, indices)
        new = Int8EnsembleMLP.__new__(Int8EnsembleMLP)
        Ensemble.__init__(new)
        new.ensemble_size = len(chosen)
        new.activation, new.output_activation = self.activation, self.output_activation
        layers = cast(list[Int8Layer], list(self.layers))
        new.layers = nn.ModuleList(_layer_of(layer, chosen) for layer in layers)
        new.biases = BufferList([bias[chosen] for bias in self.biases.buffers()])
        return new.train(self.training)


class Int8EnsembleConv2d(KeepsFloat32, FrozenConv2d):
    """An `EnsembleConv2d` frozen with its weights in bytes, as `Int8EnsembleMLP` is.

    Buffers `weight.values`, `.scale`, `.offset`, `.input_scale`, `.input_zero_point`, and `bias`. Made by
    `EnsembleConv2d.quantize()`.
    """

    _operation = staticmethod(ensemble_conv2d_int8)

    @torch.no_grad()
    def __init__(
        self,
        ensemble: EnsembleConv2d,
        data: Tensor | Iterable[Tensor],
        *,
        observer: Observer | None = None,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        check_unchanged("quantize", ensemble, EnsembleConv2d)
        ((weight,), biases) = ensemble.stacked()
        check_float32("quantize", [weight])
        check_finite_biases("quantize", biases)
        scale, zero_point = observe(calibration_data(data), ensemble.ensemble_size, 4, observer)
        self.ensemble_size = ensemble.ensemble_size
        self.stride, self.padding, self.dilation = ensemble.stride, ensemble.padding, ensemble.dilation
        self.weight = Int8Layer(pack_int8(weight.detach(), scale, zero_point), sparse)
        self.register_buffer("bias", biases[0].detach().clone() if biases else None)
        self.eval()

    def _weight(self) -> Int8Weight:
        return self.weight.weight()

    def select(self, indices: Indices) -> "Int8EnsembleConv2d":
        chosen = chosen_members(self.ensemble_size, indices)
        new = Int8EnsembleConv2d.__new__(Int8EnsembleConv2d)
        Ensemble.__init__(new)
        new.ensemble_size = len(chosen)
        new.stride, new.padding, new.dilation = self.stride, self.padding, self.dilation
        new.weight = _layer_of(self.weight, chosen)
        new.register_buffer("bias", None if self.bias is None else self.bias[chosen])
        return new.train(self.training)


# --- calibration ---------------------------------------------------------------------------------------


def calibration_data(data: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The batches that ranges are found from: float32, finite, at least one example."""
    batches = [data] if isinstance(data, Tensor) else list(data)
    for i, batch in enumerate(batches):
        name = "data" if isinstance(data, Tensor) else f"data[{i}]"
        _kinds.check_tensor("quantize", name, batch)
        if batch.dtype != torch.float32:
            raise TypeError(f"quantize: {name}: expected float32, got {batch.dtype}")
        if not batch.isfinite().all():
            raise ValueError(f"quantize: {name}: expected finite numbers, got NaN or Inf")
    if sum(batch.numel() for batch in batches) == 0:
        raise ValueError("quantize: data: expected at least one example, got none")
    return [batch for batch in batches if batch.numel() > 0]


def as_they_are() -> torch.autocast:
    """Where nothing is computed in another dtype than that of the weights."""
    return torch.autocast("cpu", enabled=False)


def observe(
    batches: Sequence[Tensor], members: int, dims: int, observer: Observer | None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point, both `[E]`, of a layer's inputs, of `dims` dimensions where they are shared."""
    for batch in batches:
        own = batch.dim() == dims + 1 and len(batch) == members
        if batch.dim() != dims and not own:
            raise ValueError(
                f"quantize: data: expected {dims} dimensions, or {dims + 1} with {members} members first, "
                f"got shape {list(batch.shape)}"
            )
        if not batch.isfinite().all():
            raise ValueError(
                "quantize: data: expected numbers that stay finite in all layers, got NaN or Inf"
            )
    if isinstance(observer, nn.Module):
        raise TypeError(
            "quantize: observer: expected a function that makes one, such as its class, got "
            f"{type(observer).__name__}"
        )
    shared = all(batch.dim() == dims for batch in batches)
    found = []
    for m in range(1 if shared else members):
        observed = _least_and_largest() if observer is None else observer()
        least, largest = getattr(observed, "quant_min", 0), getattr(observed, "quant_max", 255)
        if (least, largest) != (0, 255):
            raise ValueError(
                "quantize: observer: expected one of bytes from 0 to 255 (dtype torch.uint8), got "
                f"{observed} of {least} to {largest}"
            )
        for batch in batches:
            observed(batch if batch.dim() == dims else batch[m])
        scale, zero_point = observed.calculate_qparams()
        one = scale.numel() == 1 and zero_point.numel() == 1
        if not one or not 0 <= int(zero_point) <= 255:
            raise ValueError(
                "quantize: observer: expected one scale and a zero point from 0 to 255, got "
                f"{scale} and {zero_point}"
            )
        if not scale.isfinite().all():
            raise ValueError("quantize: data: expected a range that float32 holds, got a larger one")
        found.append((scale.float().reshape(()), zero_point.to(torch.uint8).reshape(())))
    scales, zero_points = (torch.stack(column) for column in zip(*found, strict=True))
    return scales.expand(members).contiguous(), zero_points.expand(members).contiguous()


def _least_and_largest() -> Any:
    from torch.ao.quantization import MinMaxObserver

    return MinMaxObserver(dtype=torch.uint8, eps=torch.finfo(torch.float32).tiny)


def check_float32(function: str, weights: Sequence[Tensor]) -> None:
    for weight in weights:
        if weight.dtype != torch.float32:
            raise TypeError(f"{function}: ensemble: expected weights of float32, got {weight.dtype}")


def check_finite_biases(function: str, biases: Iterable[Tensor]) -> None:
    for bias in biases:
        if not bias.isfinite().all():
            raise ValueError(f"{function}: ensemble: expected finite biases, got NaN or Inf")


# --- members -------------------------------------------------------------------------------------------


def _layer_of(layer: Int8Layer, chosen: Tensor) -> Int8Layer:
    return Int8Layer(Int8Weight(*(tensor[chosen] for tensor in layer.weight())), layer.sparse)
