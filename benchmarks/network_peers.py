"""Networks that public projects train in ensembles, each as its project computes it.

What is compared is how the members are put together, so these are the projects' layers in few lines of our
own: a product over all members, a loop over modules, or vmap over stacked parameters. All give `[E, B, O]`.
Weights lie as the project has them; `from_members` fills them with those of `nn.Sequential`s.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Peer(nn.Module):
    """Members that are `nn.Sequential`s of the same layers, evaluated together."""

    @classmethod
    def from_members(cls, members: Sequence[nn.Sequential]) -> Peer:
        raise NotImplementedError


class Loop(Peer):
    """The members one after the other: torchani, and the critics of DroQ."""

    def __init__(self, members: Sequence[nn.Sequential]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    @classmethod
    def from_members(cls, members: Sequence[nn.Sequential]) -> Loop:
        return cls(copy.deepcopy(list(members)))

    def forward(self, x: Tensor) -> Tensor:
        each = x if x.dim() == 3 else [x] * len(self.members)
        return torch.stack([member(rows) for member, rows in zip(self.members, each, strict=True)])


class Vmapped(Peer):
    """One member's module under `vmap` over stacked parameters: TD-MPC2, and the critics of torchrl."""

    def __init__(self, template: nn.Sequential, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self._template = [template]  # not a submodule: its parameters are not trained
        self._names = list(parameters)
        self.stacked = nn.ParameterList(parameters.values())

    @classmethod
    def from_members(cls, members: Sequence[nn.Sequential]) -> Vmapped:
        parameters, _ = torch.func.stack_module_state(list(members))  # type: ignore[arg-type]
        return cls(copy.deepcopy(members[0]), {name: p.detach().clone() for name, p in parameters.items()})

    def forward(self, x: Tensor) -> Tensor:
        template = self._template[0].train(self.training)

        def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            output: Tensor = torch.func.functional_call(template, parameters, (x,))
            return output

        stacked = dict(zip(self._names, self.stacked, strict=True))
        dims = (0, 0 if x.dim() == 3 else None)
        return torch.func.vmap(call, dims, randomness="different")(stacked, x)


class Products(Peer):
    """Weights `[E, in, out]`, a product over all members a layer: SAC-N, EDAC and mbrl-lib."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor], between: nn.Module) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList(biases)  # [E, 1, out]
        self.between = between

    @classmethod
    def from_members(cls, members: Sequence[nn.Sequential]) -> Products:
        linears = [[layer for layer in member if isinstance(layer, nn.Linear)] for member in members]
        across = list(zip(*linears, strict=True))
        return cls(
            [torch.stack([one.weight.detach().T for one in layer]) for layer in across],
            [torch.stack([one.bias.detach() for one in layer]).unsqueeze(1) for layer in across],
            nn.Sequential(
                *(copy.deepcopy(layer) for layer in members[0][1 : 1 + _layers_between(members[0])])
            ),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = x if x.dim() == 3 else x.unsqueeze(0).expand(len(self.weights[0]), -1, -1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, self.between(h) if layer else h, weight)
        return h


class RowsFirst(Products):
    """The same with the members between rows and features, `[B, E, ...]`: TabM's packed ensemble."""

    def forward(self, x: Tensor) -> Tensor:
        members = len(self.weights[0])
        h = x.transpose(0, 1) if x.dim() == 3 else x.unsqueeze(1).expand(-1, members, -1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            product = (self.between(h) if layer else h).transpose(0, 1) @ weight
            h = product.transpose(0, 1) + bias.squeeze(1)
        return h.transpose(0, 1)


def _layers_between(member: nn.Sequential) -> int:
    """How many layers follow each linear one."""
    places = [i for i, layer in enumerate(member) if isinstance(layer, nn.Linear)]
    return places[1] - places[0] - 1 if len(places) > 1 else 0


def members(
    count: int,
    widths: Sequence[int],
    between: Callable[[int], Sequence[nn.Module]],
    seed: int = 0,
) -> list[nn.Sequential]:
    """Networks of linear layers with what `between(width)` gives after each but the last one."""
    made = []
    for member in range(count):
        with torch.random.fork_rng():
            torch.manual_seed(seed + member)
            layers: list[nn.Module] = []
            for layer, (inputs, outputs) in enumerate(pairwise(widths)):
                layers.append(nn.Linear(inputs, outputs))
                if layer + 2 < len(widths):
                    layers += between(outputs)
        made.append(nn.Sequential(*layers))
    return made
