"""Masksembles in existing networks: insert mask layers, set their mode, run under all masks."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyens._kinds import check_tensor
from pyens._types import AssignmentMode
from pyens.masks import check, check_masks
from pyens.nn._assignment import MODES, check_mode
from pyens.nn.masked_conv import MaskedConv2d
from pyens.nn.masksembles import Masksembles1D, Masksembles2D, Masksembles3D, _Masksembles


def insert_masksembles_(
    module: nn.Module,
    num_masks: int,
    scale: float,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    mode: AssignmentMode = "grouped",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Puts a mask layer before layers of an existing network, in place; their parameters stay what they are.

    An `nn.Linear`, `nn.Conv2d` or `nn.Conv3d` becomes an `nn.Sequential` of `mask` and `linear` or `conv`
    (for a Conv2d with groups = 1 a `MaskedConv2d`, which is one): the mask is on the layer's inputs, that is
    after the activation before it. In the state dict, `fc.weight` becomes `fc.linear.weight` beside
    `fc.mask.masks`; torch-uncertainty's masked layers have the same names.

    Args:
        module: the network, which holds the layers.
        num_masks, scale, mode, generator: of the masks, see `Masksembles1D`.
        include: names of layers, as `module.named_modules()` gives them, with `*` and `?` as in the shell.
            None: all but the first, which sees the data.
        exclude: layers to leave out of these, in the same way. Layers that have masks already stay as they
            are, and so do subclasses, such as the projection within `nn.MultiheadAttention`.

    Returns:
        `module`.

    Raises:
        ValueError: num_masks or scale below 1, an unknown mode, a pattern that names no layer, no layer left.
            Nothing is changed then.
    """
    check("insert_masksembles_", scale, num_masks=num_masks)
    check_mode("insert_masksembles_", mode, MODES)
    layers: dict[str, Any] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        if name and type(layer) in (nn.Linear, nn.Conv2d, nn.Conv3d):
            parent = module.get_submodule(name.rpartition(".")[0])
            if not isinstance(getattr(parent, "mask", None), _Masksembles):
                layers[name] = layer

    def named(argument: str, patterns: Sequence[str]) -> set[str]:
        found = [fnmatch.filter(layers, pattern) for pattern in patterns]
        for pattern, names in zip(patterns, found, strict=True):
            if not names:
                raise ValueError(
                    f"insert_masksembles_: {argument}: expected names of nn.Linear, nn.Conv2d or nn.Conv3d "
                    f"layers ({', '.join(layers) or 'there are none'}), got {pattern!r}"
                )
        return {name for names in found for name in names}

    chosen = set(list(layers)[1:]) if include is None else named("include", include)
    chosen -= named("exclude", exclude)
    if not chosen:
        raise ValueError("insert_masksembles_: module: expected layers to put masks before, got none")
    for name in chosen:  # before anything is changed
        layer = layers[name]
        inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        check_masks("insert_masksembles_", num_masks, **{f"num_masks (of {name})": inputs})
    masked: dict[nn.Module, nn.Sequential] = {}  # a layer in two places stays one
    for name, layer in layers.items():
        if name in chosen:
            if layer not in masked:
                masked[layer] = _masked(layer, num_masks, scale, mode, generator)
            parent_name, _, child_name = name.rpartition(".")
            setattr(module.get_submodule(parent_name), child_name, masked[layer])
    return module


def _masked(
    layer: nn.Linear | nn.Conv2d | nn.Conv3d,
    num_masks: int,
    scale: float,
    mode: AssignmentMode,
    generator: torch.Generator | None,
) -> nn.Sequential:
    device = layer.weight.device
    masked = nn.Sequential()
    if isinstance(layer, nn.Linear):
        mask: _Masksembles = Masksembles1D(
            layer.in_features, num_masks, scale, mode=mode, generator=generator, device=device
        )
        masked.add_module("mask", mask)
        masked.add_module("linear", layer)
    elif isinstance(layer, nn.Conv2d) and layer.groups == 1:
        masked = MaskedConv2d.from_conv(layer, num_masks, scale, mode=mode, generator=generator)
    else:
        kind = Masksembles2D if isinstance(layer, nn.Conv2d) else Masksembles3D
        mask = kind(layer.in_channels, num_masks, scale, mode=mode, generator=generator, device=device)
        masked.add_module("mask", mask)
        masked.add_module("conv", layer)
    return masked.train(layer.training)


def set_mask_mode_(module: nn.Module, mode: AssignmentMode, *, seed: int = 0) -> nn.Module:
    """Sets which row meets which mask (grouped, round_robin or random) in all mask layers of a network.

    Every layer then has the same masks for the same rows, so that mask n of all of them is one member. With
    "random", pass a new seed each step. See `Masksembles1D`.

    Raises:
        ValueError: another mode, or a module without mask layers.
    """
    check_mode("set_mask_mode_", mode, MODES)
    for layer in _mask_layers("set_mask_mode_", module):
        layer.mode = mode
        layer.seed.fill_(seed)
    return module


def forward_tiled(module: nn.Module, input: Tensor) -> Tensor:
    """Every mask on every example: `[B, *]` -> `[N, B, *]`, one output per mask.

    Gives the network the batch N times over, whatever the mode of its mask layers.

    Raises:
        ValueError: a module without mask layers, or with layers of different numbers of masks.
    """
    layers = _mask_layers("forward_tiled", module)
    check_tensor("forward_tiled", "input", input)
    num_masks, *others = {layer.num_masks for layer in layers}
    if others:
        found = sorted([num_masks, *others])
        raise ValueError(f"forward_tiled: module: expected one number of masks, got {found}")
    modes = [layer.mode for layer in layers]
    try:
        for layer in layers:
            layer.mode = "grouped"
        output: Tensor = module(input.expand(num_masks, *input.shape).flatten(0, 1))
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.mode = mode
    return torch.unflatten(output, 0, (num_masks, input.shape[0]))


def _mask_layers(function: str, module: nn.Module) -> list[_Masksembles]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{function}: module: expected an nn.Module, got {type(module).__name__}")
    layers = [layer for layer in module.modules() if isinstance(layer, _Masksembles)]
    if not layers:
        raise ValueError(f"{function}: module: expected one with Masksembles layers, got none")
    return layers
