"""A backward pass that is asked for some of the gradients gives those, as one that is asked for all."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyens import EnsembleMLP, ops
from pyens.nn import MaskedMLP, TabularEnsemble
from pyens.ops.ensemble_embedding import ensemble_embedding_concat

E, B, F = 3, 5, 4


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def network(own_input: bool) -> list[Tensor]:
    """An input, square weights (so that one gradient would pass for another) and biases."""
    x = drawn(E, B, F) if own_input else drawn(B, F)
    return [x, drawn(E, F, F), drawn(E, F, F), drawn(E, F), drawn(E, F)]


def mlp_loss(x: Tensor, v: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    target = torch.zeros(B, F, dtype=torch.float64)
    return ops.ensemble_mlp_loss(x, target, [v, w], [a, b], loss="mse", activation="tanh")


def mlp(x: Tensor, v: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return ops.ensemble_mlp(x, [v, w], [a, b], activation="tanh")


def embedding(one: Tensor, two: Tensor, numeric: Tensor) -> Tensor:
    index = torch.arange(2 * B).view(B, 2) % 3
    return ensemble_embedding_concat(index, [one, two], numeric).square()


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], list[Tensor]]]] = {
    "loss, shared input": (mlp_loss, lambda: network(False)),
    "loss, own input": (mlp_loss, lambda: network(True)),
    "mlp, shared input": (mlp, lambda: network(False)),
    "mlp, own input": (mlp, lambda: network(True)),
    "embedding": (embedding, lambda: [drawn(E, 3, 2), drawn(E, 3, 2), drawn(E, B, 2)]),
}


@pytest.mark.parametrize("name", CASES)
def test_of_an_operation(name: str) -> None:
    function, draw = CASES[name]
    tensors = draw()
    scale = torch.arange(1.0, E + 1, dtype=torch.float64)
    for weigh in (lambda out: out.sum(), lambda out: (out * scale.view(E, *[1] * (out.dim() - 1))).sum()):
        together = torch.autograd.grad(weigh(function(*tensors)), tensors)
        for size in range(1, len(tensors)):
            for chosen in itertools.combinations(range(len(tensors)), size):
                output = weigh(function(*tensors))
                some = torch.autograd.grad(output, [tensors[i] for i in chosen])
                assert all(torch.equal(g, together[i]) for g, i in zip(some, chosen, strict=True)), chosen


@pytest.mark.parametrize("kind", ["mlp", "masked", "tabular"])
def test_of_the_loss_of_a_model(kind: str) -> None:
    x, y = torch.randn(B, F), torch.randn(B, 1)
    if kind == "tabular":
        model = TabularEnsemble(E, [(3, 2), (3, 2)], F, [8, 8], 1)
        batch = (torch.arange(2 * B).view(B, 2) % 3, x, y)
    else:
        model = EnsembleMLP(E, F, [8, 8], 1) if kind == "mlp" else MaskedMLP(E, F, [8, 8], 1, scale=1.5)
        batch = (x, y)
    parameters = list(model.parameters())
    together = torch.autograd.grad(model.loss(*batch, loss="mse").sum(), parameters)
    for parameter, expected in zip(parameters, together, strict=True):
        (alone,) = torch.autograd.grad(model.loss(*batch, loss="mse").sum(), [parameter])
        assert torch.equal(alone, expected)
        model.zero_grad()
        model.loss(*batch, loss="mse").sum().backward(inputs=[parameter])
        assert torch.equal(parameter.grad, expected)
        assert all(p.grad is None for p in parameters if p is not parameter)
