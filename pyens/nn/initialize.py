"""Members drawn by other rules than those of `torch.nn`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyens._kinds import check_number
from pyens.nn.batch_norm import EnsembleBatchNorm
from pyens.nn.component_models import ComponentModels
from pyens.nn.ensemble import Ensemble, generators
from pyens.nn.ensemble_embedding import EnsembleEmbedding

SomeEnsemble = TypeVar("SomeEnsemble", bound=Ensemble)
Draw = Callable[..., Any]  # (tensor of one member, generator=...), in place, such as nn.init.xavier_uniform_


@torch.no_grad()
def initialize_(
    model: SomeEnsemble,
    weight: Draw | None = None,
    *,
    bias: Draw | None = None,
    table: Draw | None = None,
    input_variance: float = 1.0,
    seeds: Sequence[int] | Tensor | None = None,
) -> SomeEnsemble:
    r"""Draws every member anew, in place, by functions of `torch.nn.init`.

    What no function is given for is drawn as `reset_parameters` does, which comes first; parameters of norms
    stay as it leaves them.

        initialize_(model, nn.init.xavier_uniform_, bias=nn.init.zeros_, seeds=range(20))

    Args:
        model: an ensemble. Parameters that several of its parts share are drawn once.
        weight: for weights of linear layers `[out, in]` and of convolutions `[out, in, kH, kW]`: is called
            with that of one member, float32 on the CPU, and with `generator=` if it takes one; otherwise
            torch's default generator is seeded for it.
        bias: likewise for biases `[out]`.
        table: likewise for embeddings `[num_embeddings, embedding_dim]`.
        input_variance: s > 0, by which the variance of what reads the inputs is multiplied (its numbers by
            √s): of the tables, and in parts without tables of the weights of their first layer, in the order
            in which they were defined. Of a `ComponentModels` every component is a part.
        seeds: one for each member, which then depends on it alone; None: torch's default generator.

    Returns:
        The model.

    Raises:
        ValueError, TypeError: an input_variance that is not positive; seeds of another number.

    Source of s: "Anti-Distillation", section 5, Table 3.
    """
    check_number("initialize_", "input_variance", input_variance)
    if not 0 < input_variance < math.inf:
        raise ValueError(f"initialize_: input_variance: expected a positive number, got {input_variance}")
    for argument, draw in (("weight", weight), ("bias", bias), ("table", table)):
        if draw is not None and not callable(draw):
            raise TypeError(f"initialize_: {argument}: expected a function, got a {type(draw).__name__}")
    if not isinstance(model, Ensemble):
        raise TypeError(f"initialize_: model: expected an Ensemble, got a {type(model).__name__}")
    drawn: dict[int, tuple[Tensor, Draw | None, bool]] = {}
    for tensor, kind, reads_inputs in _kinds(model):
        draw = {"weight": weight, "bias": bias, "table": table}[kind]
        drawn.setdefault(id(tensor), (tensor, draw, reads_inputs))
    for member, generator in enumerate(generators(model.ensemble_size, seeds)):
        model.draw(member, generator)
        for tensor, draw, reads_inputs in drawn.values():
            if draw is not None:
                own = torch.empty(tensor.shape[1:], dtype=torch.float32, device="cpu")
                _call(draw, own, generator)
                tensor[member] = own.to(tensor)
            if reads_inputs and input_variance != 1:
                tensor[member] *= math.sqrt(input_variance)
    return model


def _call(draw: Draw, tensor: Tensor, generator: torch.Generator | None) -> None:
    try:
        draw(tensor, generator=generator)
        return
    except TypeError as error:
        if "generator" not in str(error):
            raise
    if generator is None:
        draw(tensor)
        return
    with torch.random.fork_rng(devices=[]):  # it draws from torch's default generator, if it draws at all
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        draw(tensor)


def _kinds(model: Ensemble) -> Iterator[tuple[Tensor, str, bool]]:
    """The parameters that may be drawn, their kind, and whether they read the inputs."""
    inside: set[int] = set()
    for models in model.modules():
        if not isinstance(models, ComponentModels):
            continue
        for part in models.parts():  # each of which reads the inputs
            if id(part) not in inside and part is not model:
                yield from _kinds(part)
            inside.update(map(id, part.modules()))
    modules = dict(model.named_modules())
    first = not any(isinstance(module, EnsembleEmbedding) for module in modules.values())
    for name, parameter in model.named_parameters():
        place = name.rpartition(".")[0]
        owner = modules[place]
        of_norm = place.rpartition(".")[2] in ("norm_weights", "norm_biases")
        if id(owner) in inside or of_norm or isinstance(owner, EnsembleBatchNorm):
            continue
        if isinstance(owner, EnsembleEmbedding):
            yield parameter, "table", True
        elif parameter.dim() > 2:
            yield parameter, "weight", first
            first = False
        else:
            yield parameter, "bias", False
