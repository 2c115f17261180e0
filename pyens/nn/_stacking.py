"""Members that `_sequential` has read, put together: their parameters stacked, their options compared."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyens.nn._sequential import Layer


def stack(members: Sequence[Sequence[Layer]]) -> tuple[list[Tensor], list[Tensor]]:
    """Layer by layer the members' weights `[E, out, in]` and biases `[E, out]`, bit for bit.

    A layer without a bias gives `[E, 0]`, and where no layer has one there are none. Where a batch norm was
    folded into that of a member, the others' biases are zeros if they had none.
    """
    first = members[0]
    with torch.no_grad():
        for column in zip(*members, strict=False):
            if any(layer.folded for layer in column):
                for layer in column:
                    if layer.bias is None:
                        layer.bias = layer.weight.new_zeros(layer.weight.shape[:-1])
        for i, layers in enumerate(members):
            for got, expected in zip(layers, first, strict=False):
                kind = first[0].weight
                same = (
                    got.weight.shape == expected.weight.shape
                    and (got.bias is None) == (expected.bias is None)
                    and (got.weight.dtype, got.weight.device) == (kind.dtype, kind.device)
                )
                if not same:
                    raise ValueError(
                        f"from_modules: modules[{i}]: expected {_described(expected, kind)} like modules[0], "
                        f"got {_described(got, got.weight)}"
                    )
            if len(layers) != len(first):
                raise ValueError(
                    f"from_modules: modules[{i}]: expected {len(first)} linear layers, got {len(layers)}"
                )
        across = list(zip(*members, strict=True))
        weights = [torch.stack([layer.weight for layer in one]) for one in across]
        biases = [
            torch.stack([layer.weight.new_empty(0) if layer.bias is None else layer.bias for layer in one])
            for one in across
        ]
    return weights, none_if_empty(biases)


def none_if_empty(biases: Sequence[Tensor]) -> list[Tensor]:
    return list(biases) if any(bias.shape[-1] > 0 for bias in biases) else []


def _described(layer: Layer, kind: Tensor) -> str:
    bias = "no bias" if layer.bias is None else "a bias"
    return f"{list(layer.weight.shape)}, {kind.dtype}, {kind.device}, {bias}"


def stack_norms(members: Sequence[Sequence[Layer]]) -> dict[str, Any]:
    """`norm_affine`, `norm_weights` and `norm_biases` of the members' norms, as `from_parameters` takes them.

    Where one has a parameter and another none, the other gets ones or zeros, and so does an nn.LayerNorm with
    weights alone. An nn.RMSNorm has a bias `[E, 0]`.
    """
    across = [column for column in zip(*members, strict=True) if column[0].norm is not None]
    if not across:
        return {}
    norms = [[layer.norm for layer in column] for column in across]
    if all(norm.weight is None for column in norms for norm in column):
        return {"norm_affine": False}
    found: dict[str, Any] = {"norm_weights": [], "norm_biases": []}
    for name, initial in (("weight", 1.0), ("bias", 0.0)):
        for column in across:
            tensors = [getattr(layer.norm, name, None) for layer in column]
            size = 0 if name == "bias" and _norm_kind(column[0].norm) == "rms_norm" else len(column[0].weight)
            of = [
                layer.weight.new_full((size,), initial) if t is None else t.detach()
                for layer, t in zip(column, tensors, strict=True)
            ]
            found[f"norm_{name}{'s' if name == 'weight' else 'es'}"].append(torch.stack(of))
    return found


def one_of_all(values: Sequence[Any], empty: Any) -> Any:
    """One value where all layers have the same, otherwise a tuple; `empty` without layers."""
    if not values:
        return empty
    return values[0] if len(set(values)) == 1 else tuple(values)


def options_of(layers: Sequence[Layer], argument: str) -> dict[str, Any]:
    """What `EnsembleMLP` is to be given of a member's layers, but for the rates of dropout."""
    hidden = layers[:-1]
    kinds = [_norm_kind(layer.norm) for layer in hidden]
    return {
        "activation": one_of_all([layer.activation for layer in hidden], "relu"),
        "output_activation": layers[-1].activation or "identity",
        "norm": one_of_all(kinds, None),
        "norm_eps": _eps([layer.norm for layer in hidden if layer.norm is not None], argument),
        "norm_position": _norm_position(hidden, argument),
        "residual": one_of_all([layer.residual for layer in hidden], False),
        "dropout_position": _dropout_position(hidden, argument),
    }


def _norm_kind(norm: nn.Module | None) -> str | None:
    if norm is None:
        return None
    return "layer_norm" if isinstance(norm, nn.LayerNorm) else "rms_norm"


def _eps(norms: Sequence[Any], argument: str) -> float | None:
    """That of all norms; None where it is that which a norm has by itself."""
    found = {norm.eps for norm in norms}
    if len(found) > 1:
        shown = sorted(found, key=str)
        raise ValueError(f"{argument}: expected norms of one eps, got {shown}")
    (eps,) = found or {None}
    return None if eps == 1e-5 and any(isinstance(norm, nn.LayerNorm) for norm in norms) else eps


def _norm_position(hidden: Sequence[Layer], argument: str) -> str:
    # Before and after the identity are the same place.
    layers = [layer for layer in hidden if layer.norm is not None and layer.activation != "identity"]
    found = {layer.order.index("norm") < layer.order.index("activation") for layer in layers}
    if len(found) > 1:
        raise ValueError(f"{argument}: expected norms before the activation or after it throughout, got both")
    return "after_activation" if found == {False} else "before_activation"


def _dropout_position(hidden: Sequence[Layer], argument: str) -> str:
    layers = [layer for layer in hidden if layer.norm is not None and layer.dropout]
    found = {layer.order.index("dropout") < layer.order.index("norm") for layer in layers}
    if len(found) > 1:
        raise ValueError(f"{argument}: expected nn.Dropout before norms or behind throughout, got both")
    return "before_norm" if found == {True} else "after_activation"


def compare(options: Sequence[dict[str, Any]]) -> None:
    """Refuses members that differ in what all have together."""
    for i, own in enumerate(options):
        for name, expected in options[0].items():
            if own[name] != expected:
                raise ValueError(
                    f"from_modules: modules[{i}]: expected the {name} of modules[0] ({expected}), "
                    f"got {own[name]}"
                )


def unstack(weights: Sequence[Tensor], biases: Sequence[Tensor], member: int) -> list[nn.Linear]:
    """Linear layers with copies of one member's parameters."""
    linears = []
    for layer, weight in enumerate(weights):
        out_features, in_features = weight.shape[1:]
        bias = len(biases) > 0 and biases[layer].shape[1] > 0
        linear = nn.Linear(in_features, out_features, bias=bias, device="meta", dtype=weight.dtype)
        linear.weight = nn.Parameter(weight[member].detach().clone())
        if bias:
            linear.bias = nn.Parameter(biases[layer][member].detach().clone())
        linears.append(linear)
    return linears


def norm_module(
    kind: str, width: int, eps: float | None, weight: Tensor | None, bias: Tensor | None
) -> nn.Module:
    """`nn.LayerNorm` or `nn.RMSNorm` with copies of one member's parameters."""
    affine = weight is not None
    norm: Any
    if kind == "layer_norm":
        norm = nn.LayerNorm(width, 1e-5 if eps is None else eps, affine, device="meta")
    else:
        norm = nn.RMSNorm(width, eps, affine, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            setattr(norm, name, nn.Parameter(tensor.detach().clone()))
    made: nn.Module = norm
    return made
