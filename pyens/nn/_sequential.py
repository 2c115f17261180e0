"""What an `nn.Sequential` must look like to be a member of an `EnsembleMLP`, and back."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyens._types import Activation
from pyens.reference.activations import MODULES


def activation_module(name: Activation, function: str = "EnsembleMLP") -> nn.Module:
    """`name` as a module, with default arguments; `function` is who asks, for the error."""
    if not isinstance(name, str) or name not in MODULES:
        raise ValueError(f'{function}: activation: expected one of {", ".join(MODULES)}, got "{name}"')
    return MODULES[name]()


def _activation_name(module: nn.Module, argument: str) -> Activation:
    """The name of an activation module; ValueError if the kernels do not compute just this function."""
    for name, kind in MODULES.items():
        if type(module) is kind and _settings(module) == _settings(kind()):
            return name
    raise ValueError(
        f"{argument}: expected nn.Linear and one of {', '.join(k.__name__ for k in MODULES.values())} "
        f"with default arguments, got {module}"
    )


def _settings(activation: nn.Module) -> dict[str, Any]:
    """What the function depends on: not `training`, nor `inplace`, which is about where the result goes."""
    return {
        name: value
        for name, value in vars(activation).items()
        if not name.startswith("_") and name not in ("training", "inplace")
    }


def flatten(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a sequence, and of the sequences in it, in their order."""
    if type(module) is nn.Sequential:
        for child in module:
            yield from flatten(child)
    else:
        yield module


def parse(module: nn.Module, argument: str) -> tuple[list[nn.Linear], Activation]:
    """The linear layers of a member and the activation between them ("relu" if there is no hidden layer).

    `argument` is what errors call the member.
    """
    if type(module) is not nn.Sequential:
        raise ValueError(f"{argument}: expected nn.Sequential, got {type(module).__name__}")
    linears: list[nn.Linear] = []
    activations: set[Activation] = set()
    waiting: list[Activation] = []  # activations since the last linear layer
    for child in module:
        if type(child) is not nn.Linear:
            waiting.append(_activation_name(child, argument))
            if not linears or len(waiting) > 1:
                raise ValueError(f"{argument}: expected one activation after each nn.Linear, got {module}")
            continue
        if linears:
            activations.add(waiting.pop() if waiting else "identity")
        linears.append(child)
    if not linears or waiting:
        raise ValueError(f"{argument}: expected an nn.Linear as the last layer, got {module}")
    if len(activations) > 1:
        raise ValueError(f"{argument}: expected one activation throughout, got {sorted(activations)}")
    return linears, activations.pop() if activations else "relu"


def stack(modules: Sequence[Sequence[nn.Linear]]) -> tuple[list[Tensor], list[Tensor]]:
    """Layer by layer the members' weights `[E, out, in]` and biases `[E, out]` (none: empty), bit for bit."""
    first = modules[0]
    for i, layers in enumerate(modules):
        if not all(isinstance(linear.weight, nn.Parameter) for linear in layers):
            # A hook computes it before each forward pass: what is there now may be out of date.
            raise ValueError(
                f"from_modules: modules[{i}]: expected weights that are parameters, got one that "
                "torch.nn.utils.prune or weight_norm computes from others; make it permanent first"
            )
        for got, expected in zip(layers, first, strict=False):
            same = (
                got.weight.shape == expected.weight.shape
                and (got.bias is None) == (first[0].bias is None)
                and (got.weight.dtype, got.weight.device) == (first[0].weight.dtype, first[0].weight.device)
            )
            if not same:
                raise ValueError(
                    f"from_modules: modules[{i}]: expected {_describe(expected, first[0])} like modules[0], "
                    f"got {_describe(got, got)}"
                )
        if len(layers) != len(first):
            raise ValueError(
                f"from_modules: modules[{i}]: expected {len(first)} linear layers, got {len(layers)}"
            )
    across = list(zip(*modules, strict=True))
    with torch.no_grad():
        weights = [torch.stack([linear.weight for linear in layer]) for layer in across]
        biases = [
            torch.stack([linear.bias for linear in layer]) for layer in across if layer[0].bias is not None
        ]
    return weights, biases


def _describe(linear: nn.Linear, kind: nn.Linear) -> str:
    bias = "no bias" if kind.bias is None else "a bias"
    return f"{list(linear.weight.shape)}, {kind.weight.dtype}, {kind.weight.device}, {bias}"


def unstack(weights: Sequence[Tensor], biases: Sequence[Tensor], member: int) -> list[nn.Linear]:
    """Linear layers with copies of one member's parameters."""
    linears = []
    for layer, weight in enumerate(weights):
        out_features, in_features = weight.shape[1:]
        linear = nn.Linear(in_features, out_features, bias=bool(biases), device="meta", dtype=weight.dtype)
        linear.weight = nn.Parameter(weight[member].detach().clone())
        if biases:
            linear.bias = nn.Parameter(biases[layer][member].detach().clone())
        linears.append(linear)
    return linears
