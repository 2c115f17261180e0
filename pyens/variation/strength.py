"""Activation strength of any module: the op for ensembles of this library, forward hooks for all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyens._kinds import check_real
from pyens._types import Activation, ActivationStrength
from pyens.nn import Ensemble
from pyens.ops.activation_strength import activation_strength
from pyens.reference.activation_strength import pack_bits, strength
from pyens.reference.activations import ACTIVATIONS

# Each once: nn.GELU is exact or not.
ACTIVATION_MODULES = tuple(
    dict.fromkeys(type(one) for one in ACTIVATIONS.values() if type(one) is not nn.Identity)
)


@torch.no_grad()
def strength_of(
    module: nn.Module,
    *args: Any,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    bitpack: bool = False,
    activations: tuple[type[nn.Module], ...] = ACTIVATION_MODULES,
    **kwargs: Any,
) -> ActivationStrength:
    """Runs `module(*args, **kwargs)` and tells how strongly each of its units was active.

    A `pyens.nn.Ensemble` of MLPs, such as `EnsembleMLP` or `TabularEnsemble`, goes through
    `pyens.ops.activation_strength` and gives its `[E, B, ΣH]`, without dropout. For any other module forward
    hooks collect what its activation modules return, in the order of their calls and each flattened to
    `[B, units]`: slower, and for an `nn.Sequential` of linear layers and activations the same numbers without
    the member axis. Of any other ensemble the activations must be `[E, B, ...]`, and the strengths have its
    member axis; hidden units within `EnsembleMLP`s in it are not modules and not among them. A module in
    training mode runs as it is, dropout included.

    Args:
        module: the model. An activation after its last layer counts as well.
        args, kwargs: what it is called with; its own arguments can not be called as those here are.
        mean, std: `[ΣH]`, or `[E, ΣH]` for an ensemble: see `pyens.ops.activation_strength`. Without them
            (both or neither) the value is the activation h itself, as it is for mean 0 and std 1.
        bitpack: eight units to a byte, as in `pyens.ops.activation_strength`.
        activations: the kinds of modules that hooks are put on.

    Returns:
        `ActivationStrength`: output is what the module returns; value `[B, ΣH]` and active bool `[B, ΣH]`, or
        uint8 `[B, ⌈ΣH/8⌉]`; with a leading E for an ensemble. Nothing of it has a gradient.

    Raises:
        ValueError: an ensemble of MLPs with norms, residuals or an output activation (its `member(i)` can be
            given); a module without any of the activations, activations of different batch sizes, mean or
            std alone or of another length than there are units.
        TypeError: what such a module returns is not a tensor of floating point numbers.
    """
    if (mean is None) != (std is None):
        missing = "mean" if mean is None else "std"
        raise ValueError(f"strength_of: {missing}: expected both of mean and std, or neither, got None")
    if isinstance(module, Ensemble) and module.activation is not None:
        weights, biases, activation = plain_layers("strength_of", "module", module)
        if mean is None or std is None:
            dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
            units = sum(weight.shape[1] for weight in weights[:-1])
            mean = torch.zeros(units, dtype=dtype, device=weights[0].device)
            std = torch.ones_like(mean)
        features = module.features(*args, **kwargs)
        return activation_strength(
            features, weights, biases, mean, std, activation=activation, bitpack=bitpack
        )
    members = module.ensemble_size if isinstance(module, Ensemble) else None
    output, h = _hooked(module, activations, args, kwargs, members)
    if mean is None or std is None:
        value, active = h, h > 0
    else:
        for name, statistic in (("mean", mean), ("std", std)):
            check_real("strength_of", name, statistic)
            each = h.shape[-1:]
            if statistic.shape != each and (members is None or statistic.shape != (members, *each)):
                raise ValueError(
                    f"strength_of: {name}: expected {list(each)}, a number for each unit, "
                    f"got shape {list(statistic.shape)}"
                )
        value, active = strength(h, *(s.unsqueeze(-2) if s.dim() == 2 else s for s in (mean, std)))
    return ActivationStrength(output, value, pack_bits(active) if bitpack else active)


def plain_layers(
    function: str, argument: str, ensemble: Ensemble
) -> tuple[Sequence[Tensor], Sequence[Tensor], Activation | tuple[Activation, ...]]:
    """Weights, biases and activations of an ensemble of MLPs that have nothing else.

    Raises:
        ValueError: norms, residuals or an output activation, which `activation_strength` does not have.
    """
    for name, plain in (("norm", None), ("residual", False), ("output_activation", "identity")):
        if (got := getattr(ensemble, name)) != plain:
            raise ValueError(
                f"{function}: {argument}: expected MLPs of linear layers and activations between them, "
                f"got {type(ensemble).__name__} with {name} {got}"
            )
    assert ensemble.activation is not None  # it has MLPs
    return *ensemble.stacked(), ensemble.activation


def _hooked(
    module: nn.Module,
    kinds: tuple[type[nn.Module], ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    members: int | None,
) -> tuple[Any, Tensor]:
    """The module's output, and its activations `[B, ΣH]`, of so many members `[E, B, ΣH]`."""
    rows = 1 if members is None else 2  # the dimensions before those of units
    found: list[Tensor] = []

    def collect(activation: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            got = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(
                f"strength_of: module: expected floating point tensors from {activation}, got {got}"
            )
        few = output.dim() < rows if members is None else output.dim() <= rows or len(output) != members
        if few or (found and output.shape[:rows] != found[0].shape[:rows]):
            axes = [] if members is None else [str(members)]
            batch = str(found[0].shape[rows - 1]) if found else "B"
            expected = f"[{', '.join([*axes, batch, '...'])}]"
            raise ValueError(
                f"strength_of: module: expected {expected} from {activation}, got shape {list(output.shape)}"
            )
        # A copy, for the next module may work in place.
        found.append(output.detach().reshape(*output.shape[:rows], -1).clone())

    handles = [m.register_forward_hook(collect) for m in module.modules() if isinstance(m, kinds)]
    try:
        output = module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"strength_of: module: expected one that calls {names}, got {type(module).__name__}")
    return output, torch.cat(found, -1)
