"""A sequence of layers per member, as convolutional networks are."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pyens.nn import _sequential
from pyens.nn._members import listed
from pyens.nn._stacked_mlp import StackedMLP
from pyens.nn.batch_norm import EnsembleBatchNorm, EnsembleBatchNorm2d
from pyens.nn.ensemble import Ensemble
from pyens.nn.ensemble_conv2d import EnsembleConv2d
from pyens.nn.ensemble_mlp import EnsembleLinear, PackedEnsembleMLP
from pyens.nn.int8 import Int8EnsembleConv2d, as_they_are, calibration_data
from pyens.nn.pooling import EnsembleAvgPool2d, EnsembleMaxPool2d, Flatten
from pyens.nn.sparse import SparseEnsembleConv2d


class EnsembleSequential(Ensemble):
    r"""Layers of an ensemble one after the other, as `nn.Sequential` has those of one network.

    Args:
        modules: `EnsembleConv2d`, `EnsembleLinear`, `EnsembleMLP`, `EnsembleBatchNorm`, `EnsembleBatchNorm2d`
            and other ensembles, all of one size; `EnsembleMaxPool2d`, `EnsembleAvgPool2d`, `Flatten`; and
            what treats each number for itself, such as `nn.ReLU` and `nn.Dropout`.

    An `nn.ReLU` and an `EnsembleMaxPool2d` behind an `EnsembleConv2d` are computed within its call, unless
    one of them has hooks, or windows that are not side by side. Names in the state dict are those of an
    `nn.Sequential` of the members' layers, so it takes what `torch.func.stack_module_state` gives for layers
    that have `weight` and `bias`.

    Example:
        >>> model = EnsembleSequential(
        ...     EnsembleConv2d(5, 1, 28, 3), nn.ReLU(), EnsembleMaxPool2d(2),
        ...     EnsembleConv2d(5, 28, 32, 5), nn.ReLU(), EnsembleMaxPool2d(2),
        ...     Flatten(), EnsembleLinear(5, 512, 10),
        ... )
        >>> model(torch.randn(8, 1, 28, 28)).shape
        torch.Size([5, 8, 10])

    Raises:
        ValueError: no ensemble among the modules, or ensembles of different sizes; an `nn.Flatten` or a
            pooling layer of torch.nn, which would take members for examples.
        TypeError: an argument that is no module.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        for i, module in enumerate(modules):
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"EnsembleSequential: modules[{i}]: expected a module, got {type(module).__name__}"
                )
            for part in _sequential.flatten(module):
                if instead := _instead(part):
                    raise ValueError(
                        f"EnsembleSequential: modules[{i}]: expected {instead}, which knows of members, "
                        f"got {part}"
                    )
            self.add_module(str(i), module)
        sizes = {part.ensemble_size for part in self.children() if isinstance(part, Ensemble)}
        if len(sizes) != 1:
            got = "none" if not sizes else f"ensembles of {', '.join(map(str, sorted(sizes)))} members"
            raise ValueError(f"EnsembleSequential: modules: expected ensembles of one size, got {got}")
        (self.ensemble_size,) = sizes

    @classmethod
    def from_modules(cls, modules: Iterable[nn.Sequential]) -> Self:
        """An ensemble of copies of trained networks, layer by layer alike.

        Args:
            modules: `nn.Sequential` (also nested) of `nn.Conv2d`, `nn.Linear`, `nn.BatchNorm2d`,
                `nn.BatchNorm1d`, `nn.MaxPool2d`, `nn.AvgPool2d`, `nn.Flatten`, `nn.Dropout`, `nn.Identity`
                and the activations of `EnsembleMLP`.

        Raises:
            ValueError: any other layer, by name; hooks that run in forward; networks that differ.
        """
        members = []
        for i, module in enumerate(modules := listed(modules)):
            argument = f"from_modules: modules[{i}]"
            if not _sequential.is_plain(module, nn.Sequential):
                raise ValueError(f"{argument}: expected nn.Sequential, got {type(module).__name__}")
            for container in module.modules():
                if _sequential.is_plain(container, nn.Sequential):
                    _sequential.check_hooks(container, argument)
            members.append(list(_sequential.flatten(module)))
        lengths = [len(layers) for layers in members]
        if len(set(lengths)) != 1:
            raise ValueError(f"from_modules: modules: expected as many layers in each, got {lengths}")
        new = cls(*(_stacked_layer(place, column) for place, column in enumerate(zip(*members, strict=True))))
        return new.train(modules[0].training)

    def forward(self, input: Tensor) -> Tensor:
        """`[B, ...]` (shared by all members) or `[E, B, ...]` -> `[E, B, ...]`."""
        layers = list(self._modules.values())
        at = 0
        while at < len(layers):
            layer = layers[at]
            at += 1
            if any(_is_bare(layer, kind) for kind in _CONVOLUTIONS):
                relu, window, count = _behind(layers[at : at + 2])
                if count > 0:
                    conv = cast(EnsembleConv2d | SparseEnsembleConv2d | Int8EnsembleConv2d, layer)
                    input = conv.convolve(input, "relu" if relu else "identity", window)
                    at += count
                    continue
            input = cast(nn.Module, layer)(input)
        return input

    def member(self, i: int) -> nn.Sequential:
        """Member i as an `nn.Sequential` of the layers of torch.nn, with copies of its parameters."""
        self._check_member(i)
        layers = [_member_layer(layer, i) for layer in self._layers("member")]
        return nn.Sequential(*layers).train(self.training)

    def _layers(self, function: str) -> list[nn.Module]:
        """The layers in their order, one that is used twice twice, those of plain sequences in it one by one.

        Raises:
            ValueError: a forward of its own; hooks on a sequence; an ensemble within another kind of module.
        """
        if not _sequential.is_plain(self, EnsembleSequential):
            raise ValueError(
                f"{function}: expected a class that leaves the forward of EnsembleSequential alone, "
                f"got {type(self).__name__}"
            )
        return list(_flat(function, self))

    @torch.no_grad()
    def packed(self) -> "EnsembleSequential":
        """The ensemble frozen for inference, in evaluation: a copy without gradients, batch norms folded.

        The layers of sequences in it follow each other in one.

        With scale s = weight / sqrt(running_var + eps) and shift t = bias - running_mean s, a norm right
        after a convolution or a linear layer makes W <- s W, b <- s b + t of it, in float64, then rounded.

        Raises:
            ValueError: a batch norm that stands elsewhere, or has no running statistics; a class, or a layer
                with weights, with a forward of its own, or hooks; an ensemble within another kind of module.
        """
        layers: list[nn.Module] = []
        for i, layer in enumerate(self._layers("packed")):
            argument = f"packed: layer {i}"
            if isinstance(layer, EnsembleBatchNorm):
                before = layers[-1] if layers else None
                if before is None or not _has_plain_weights(before):
                    raise ValueError(
                        f"{argument}: expected a batch norm right after an EnsembleConv2d or an "
                        f"EnsembleLinear, got {layer}"
                    )
                _sequential.fold_after(before, layer.select(slice(None)).eval(), argument)
            elif _has_plain_weights(layer):
                _sequential.check_unchanged(argument, layer, EnsembleConv2d, EnsembleLinear)
                layers.append(_plain(cast(EnsembleConv2d | EnsembleLinear, layer)))
            elif isinstance(layer, Ensemble):
                layers.append(layer.select(slice(None)))
            elif not isinstance(layer, (nn.Dropout, nn.Identity)):
                layers.append(copy.deepcopy(layer))
        return EnsembleSequential(*layers).requires_grad_(False).eval()

    def sparse(self) -> "EnsembleSequential":
        """The ensemble frozen with the weights that are not zero, as after `torch.nn.utils.prune`.

        Batch norms are folded first, as `packed` does, and leave zeros zero.

        Raises:
            ValueError: an ensemble in it that has no sparse form; and as `packed`.
        """
        layers: list[nn.Module] = []
        for i, layer in enumerate(self.packed().children()):
            freeze = _freezer("sparse", i, layer)
            layers.append(layer if freeze is None else freeze())
        return EnsembleSequential(*layers).eval()

    @torch.no_grad()
    def quantize(
        self,
        data: Tensor | Iterable[Tensor],
        *,
        observer: Callable[[], Any] | None = None,
        sparse: bool = False,
    ) -> "EnsembleSequential":
        """The ensemble frozen with weights in bytes, layer by layer as `EnsembleMLP.quantize` does it.

        Batch norms are folded first, as `packed` does. Between the layers are numbers of float32.

        Raises:
            ValueError: an ensemble in it that has no form in bytes; and as `packed` and
                `EnsembleMLP.quantize`.
        """
        batches = [batch.clone() for batch in calibration_data(data)]  # which layers in place may change
        layers: list[nn.Module] = []
        for i, layer in enumerate(frozen := list(self.packed().children())):
            freeze = _freezer("quantize", i, layer)
            layers.append(layer if freeze is None else freeze(batches, observer=observer, sparse=sparse))
            if i + 1 < len(frozen):
                with as_they_are():
                    batches = [layer(batch) for batch in batches]
        return EnsembleSequential(*layers).eval()


def _flat(function: str, sequence: nn.Module) -> Iterator[nn.Module]:
    for name, layer in sequence._modules.items():
        if layer is None:
            continue
        if _sequential.is_plain(layer, nn.Sequential) or _sequential.is_plain(layer, EnsembleSequential):
            _sequential.check_hooks(layer, f"{function}: layer {name}")
            yield from _flat(function, layer)
            continue
        inside = [part for part in layer.modules() if part is not layer and isinstance(part, Ensemble)]
        if inside and not isinstance(layer, Ensemble):
            raise ValueError(
                f"{function}: layer {name}: expected layers, and sequences of them, got a "
                f"{type(layer).__name__} with a {type(inside[0]).__name__} in it"
            )
        yield layer


# Layers of torch.nn that take the first dimension, or the first two, for examples and channels.
_INSTEAD: dict[type[nn.Module], str] = {
    nn.Flatten: "pyens.nn.Flatten",
    nn.MaxPool2d: "EnsembleMaxPool2d",
    nn.AvgPool2d: "EnsembleAvgPool2d",
    nn.Conv2d: "EnsembleConv2d",
    nn.Linear: "EnsembleLinear",
    nn.BatchNorm1d: "EnsembleBatchNorm",
    nn.BatchNorm2d: "EnsembleBatchNorm2d",
}


_CONVOLUTIONS = (EnsembleConv2d, SparseEnsembleConv2d, Int8EnsembleConv2d)


# What else of torch.nn does: the modules of these files, and some others.
_OF_IMAGES = (
    "batchnorm",
    "channelshuffle",
    "conv",
    "fold",
    "instancenorm",
    "padding",
    "pixelshuffle",
    "pooling",
)
_BY_CHANNEL = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout, nn.GroupNorm)
_BY_PLACE = (nn.LocalResponseNorm, nn.CrossMapLRN2d, nn.Softmax2d, nn.Unflatten)


def _instead(layer: nn.Module) -> str | None:
    """What a layer of torch.nn would have to be, if it does not treat each number for itself."""
    kind = type(layer)
    if kind in _INSTEAD:
        return _INSTEAD[kind]
    package, _, file = kind.__module__.rpartition(".")
    if package == "torch.nn.modules" and file in (*_OF_IMAGES, "upsampling"):
        return "a layer"
    if kind in _BY_CHANNEL or kind in _BY_PLACE:
        return "a layer"
    dim = getattr(layer, "dim", -1)
    if kind in (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU) and (dim is None or dim >= 0):
        return f"{kind.__name__} with a dim counted from the end"
    return None


def _has_plain_weights(layer: nn.Module) -> bool:
    return _sequential.is_plain(layer, EnsembleConv2d) or _sequential.is_plain(layer, EnsembleLinear)


def _freezer(name: str, i: int, layer: nn.Module) -> Callable[..., Any] | None:
    """The method of that name of a layer that is an ensemble; None for what has no parameters."""
    if not isinstance(layer, Ensemble):
        return None
    freeze: Callable[..., Any] | None = getattr(layer, name, None)
    if isinstance(layer, (EnsembleConv2d, StackedMLP)):
        known = (EnsembleConv2d, StackedMLP, PackedEnsembleMLP)
        _sequential.check_unchanged(f"{name}: layer {i}", layer, *known)
    if not callable(freeze):
        raise ValueError(
            f"{name}: layer {i}: expected EnsembleConv2d, EnsembleLinear or EnsembleMLP, "
            f"got {type(layer).__name__}"
        )
    return freeze


def _plain(layer: EnsembleConv2d | EnsembleLinear) -> EnsembleConv2d | EnsembleLinear:
    """A copy with the weights as they are now, also where pruning or weight norm compute them."""
    kind = EnsembleConv2d if isinstance(layer, EnsembleConv2d) else EnsembleLinear
    (weight,), biases = layer.stacked()
    new = kind(**layer.config(), device="meta", dtype=weight.dtype)
    new.weight = nn.Parameter(weight.detach().clone())
    new.bias = nn.Parameter(biases[0].detach().clone()) if biases else None
    return new


def _is_bare(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether calling it is no more than its class's own forward."""
    if module is None or not _sequential.is_plain(module, kind):
        return False
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _behind(layers: list[nn.Module | None]) -> tuple[bool, tuple[int, int], int]:
    """Whether a ReLU follows, the window of a maximum that does, and how many layers these are."""
    relu, window, count = False, (1, 1), 0
    for layer in layers:
        if not relu and _is_bare(layer, nn.ReLU):
            relu = True
        elif window == (1, 1) and _is_bare(layer, EnsembleMaxPool2d):
            pool: Any = layer
            size, stride = _pair(pool.kernel_size), _pair(pool.stride)
            plain = _pair(pool.padding) == (0, 0) and _pair(pool.dilation) == (1, 1)
            beside = size == stride and plain and not pool.ceil_mode and not pool.return_indices
            if not beside or size[0] * size[1] > 255:
                break
            window = size
        else:
            break
        count += 1
    return relu, window, count


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


_ENSEMBLES: dict[type[nn.Module], Callable[[Any], Ensemble]] = {
    nn.Conv2d: EnsembleConv2d.from_modules,
    nn.Linear: EnsembleLinear.from_modules,
    nn.BatchNorm2d: EnsembleBatchNorm2d.from_modules,
    nn.BatchNorm1d: EnsembleBatchNorm.from_modules,
}


def _stacked_layer(place: int, column: tuple[nn.Module, ...]) -> nn.Module:
    """One layer of an ensemble from that of each member."""
    first = column[0]
    for i, layer in enumerate(column):
        if type(layer) is not type(first):
            raise ValueError(
                f"from_modules: modules[{i}]: layer {place}: expected {type(first).__name__} like "
                f"modules[0], got {type(layer).__name__}"
            )
    for kind, stack in _ENSEMBLES.items():
        if _sequential.is_plain(first, kind):
            try:
                return stack(column)
            except ValueError as error:
                raise ValueError(str(error).replace("]: ", f"]: layer {place}: ", 1)) from None
    made = _without_parameters(first)
    if made is None:
        kinds = (*(kind.__name__ for kind in _ENSEMBLES), "MaxPool2d", "AvgPool2d", "Flatten", "Dropout")
        raise ValueError(
            f"from_modules: modules[0]: layer {place}: expected {', '.join(kinds)}, Identity or an "
            f"activation of EnsembleMLP, got {first}"
        )
    for i, layer in enumerate(column):
        _sequential.check_hooks(layer, f"from_modules: modules[{i}]: layer {place}")
        if repr(layer) != repr(first):
            raise ValueError(
                f"from_modules: modules[{i}]: layer {place}: expected {first} like modules[0], got {layer}"
            )
    return made


_MAX = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")
_AVG = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


def _without_parameters(layer: nn.Module) -> nn.Module | None:
    """The same for members side by side; None for what is not known."""
    any_layer: Any = layer
    if _sequential.is_plain(layer, nn.MaxPool2d) and not any_layer.return_indices:
        return EnsembleMaxPool2d(*(getattr(layer, name) for name in _MAX))
    if _sequential.is_plain(layer, nn.AvgPool2d):
        return EnsembleAvgPool2d(*(getattr(layer, name) for name in _AVG))
    if _sequential.is_plain(layer, nn.Flatten) and (any_layer.start_dim, any_layer.end_dim) == (1, -1):
        return Flatten()
    known = _sequential.is_plain(layer, nn.Dropout) or _sequential.is_plain(layer, nn.Identity)
    if known or _sequential.activation_string(layer) is not None:
        return copy.deepcopy(layer)
    return None


def _member_layer(layer: nn.Module, i: int) -> nn.Module:
    if isinstance(layer, Ensemble):
        return layer.member(i)
    if _sequential.is_plain(layer, EnsembleMaxPool2d):
        return nn.MaxPool2d(*(getattr(layer, name) for name in _MAX))
    if _sequential.is_plain(layer, EnsembleAvgPool2d):
        return nn.AvgPool2d(*(getattr(layer, name) for name in _AVG))
    if _sequential.is_plain(layer, Flatten):
        return nn.Flatten()
    return copy.deepcopy(layer)
