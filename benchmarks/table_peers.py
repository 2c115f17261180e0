"""The ways people take a training step of an ensemble of models for tables, each at its best.

Embedding tables, numeric columns, an MLP, mean squared error, and Adam on dense gradients. Every member sees
a batch of its own. Layouts and preparation as in `training_peers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Run, agrees_with
from benchmarks.peers import Problem, compiled
from benchmarks.training_peers import (
    GRADIENT_TOLERANCE,
    Form,
    baddbmm_stack,
    mse,
    side_by_side,
    stack_again,
    summed,
    transposed_stack,
)

LEARNING_RATE, EPS = 1e-3, 1e-8

# What a step returns: the losses [E] before it, and what gives the gradients and the parameters after it, in
# the layout of pyens and untimed.
Stepped = tuple[Tensor, Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]]


@dataclass(frozen=True)
class Table:
    """The sizes of a problem."""

    ensemble_size: int
    batch_size: int
    categorical: tuple[tuple[int, int], ...]  # C × (categories, embedding dimension)
    numeric_features: int
    hidden_features: tuple[int, ...]
    out_features: int

    @property
    def features(self) -> tuple[int, ...]:
        """Of the MLP, input and output included."""
        embedded = sum(dim for _, dim in self.categorical)
        return (embedded + self.numeric_features, *self.hidden_features, self.out_features)

    @property
    def parameters(self) -> int:
        """How many numbers all members learn."""
        embedded = sum(n * dim for n, dim in self.categorical)
        return self.ensemble_size * (embedded + sum((i + 1) * o for i, o in pairwise(self.features)))


@dataclass(frozen=True)
class Batch:
    """What the members see in a step, each its own."""

    categorical: Tensor  # int64 [E, B, C]
    numeric: Tensor  # [E, B, F]
    target: Tensor  # [E, B, O]

    def parts(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """Tables, weights and biases out of what stands for `TableProblem.tensors`."""
        tables = self.categorical.shape[2]
        layers = (len(tensors) - tables) // 2
        return tensors[:tables], tensors[tables : tables + layers], tensors[tables + layers :]


@dataclass(frozen=True)
class TableProblem:
    """An ensemble of models for tables before its first step."""

    table: Table
    batch: Batch
    tensors: tuple[Tensor, ...]  # C tables [E, N, D], then L weights [E, out, in], then L biases [E, out]

    @classmethod
    def random(
        cls,
        table: Table,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> TableProblem:
        """Uniform categories, everything else normal."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

        e, b, features = table.ensemble_size, table.batch_size, table.features
        columns = [torch.randint(n, (e, b), generator=generator) for n, _ in table.categorical]
        batch = Batch(
            torch.stack(columns, -1).to(device), draw(e, b, table.numeric_features), draw(e, b, features[-1])
        )
        tensors = (
            *(draw(e, n, d) for n, d in table.categorical),
            *(draw(e, o, i, scale=(2 / i) ** 0.5) for i, o in pairwise(features)),
            *(draw(e, o, scale=0.1) for o in features[1:]),
        )
        return cls(table, batch, tensors)

    def check(self) -> Callable[[Stepped], None]:
        """For the first step from `tensors`: losses, gradients and what Adam does with them, in float64."""
        tensors = [tensor.to(torch.float64, copy=True).requires_grad_() for tensor in self.tensors]
        tables, weights, biases = self.batch.parts(tensors)
        columns = self.batch.categorical.unbind(-1)
        features = [
            torch.cat([*(t[m][c[m]] for t, c in zip(tables, columns, strict=True)), numeric.double()], -1)
            for m, numeric in enumerate(self.batch.numeric)
        ]
        outputs = Problem(torch.stack(features), tuple(weights), tuple(biases)).expected()
        losses = mse(outputs, self.batch.target.double())
        gradients = torch.autograd.grad(losses.sum(), tensors)
        # Both moments of the first step are unbiased to the gradient and to its square.
        updates = [-LEARNING_RATE * g / (g.abs() + EPS) for g in gradients]

        dtype, rms = self.tensors[0].dtype, GRADIENT_TOLERANCE[self.tensors[0].dtype]
        losses_agree = agrees_with(losses.detach(), dtype, lambda stepped: stepped[0].detach())
        gradients_agree = agrees_with(gradients, dtype, lambda stepped: stepped[1]()[0], rms=rms)
        updates_agree = agrees_with(
            updates,
            dtype,
            lambda stepped: [p - start for p, start in zip(stepped[1]()[1], self.tensors, strict=True)],
            rms=rms,
        )

        def check(stepped: Stepped) -> None:
            losses_agree(stepped)
            gradients_agree(stepped)
            updates_agree(stepped)

        return check


def table_peers(*, compile: bool) -> dict[str, Callable[[TableProblem], Run]]:
    """A step of a problem as others take it, by name. The problem may go when the step is prepared."""
    eager: dict[str, Callable[[TableProblem], Run]] = {
        "loop": lambda problem: adam_step(loop(problem)),
        "loop, an Adam each": loop_of_steps,
        "stack": lambda problem: adam_step(stack(problem)),
        "stack transposed": lambda problem: adam_step(stack(problem, transposed=True)),
    }
    made: dict[str, Callable[[TableProblem], Run]] = {
        "stack, compiled": lambda problem: adam_step(stack(problem), compile=True),
        "stack transposed, compiled": lambda problem: adam_step(
            stack(problem, transposed=True), compile=True
        ),
        "stack, one graph": lambda problem: adam_step_of_graph(stack(problem)),
        "stack transposed, one graph": lambda problem: adam_step_of_graph(stack(problem, transposed=True)),
    }
    return eager | (made if compile else {})


def adam(tensors: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(tensors, lr=LEARNING_RATE, eps=EPS, fused=True)


def adam_step(
    form: Form,
    *,
    compile: bool = False,
    optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer] = adam,
) -> Run:
    """The usual way, with one Adam for all. Steps change `form.leaves`."""
    leaves = [leaf.requires_grad_() for leaf in form.leaves]
    state = _state(leaves, form.stacked)
    total, steps = summed(form.losses), optimizer(leaves)
    total = compiled(total) if compile else total

    def run() -> Stepped:
        steps.zero_grad()
        loss, losses = total(leaves)
        loss.backward()
        steps.step()
        return losses, state

    return run


def adam_step_of_graph(form: Form) -> Run:
    """The same with torch.func.grad, compiled: forward and backward are one graph."""
    leaves = [leaf.requires_grad_() for leaf in form.leaves]
    values = [leaf.detach() for leaf in leaves]
    state = _state(leaves, form.stacked)
    gradient, optimizer = compiled(torch.func.grad(summed(form.losses), has_aux=True)), adam(leaves)

    def run() -> Stepped:
        gradients, losses = gradient(values)
        for leaf, found in zip(leaves, gradients, strict=True):
            leaf.grad = found
        optimizer.step()
        return losses, state

    return run


def _state(leaves: Sequence[Tensor], stacked: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> Callable:
    return lambda: (stacked([leaf.grad for leaf in leaves]), stacked([leaf.detach() for leaf in leaves]))


class Model(nn.Module):
    """One member, as one would write it alone."""

    def __init__(self, tables: Sequence[Tensor], mlp: nn.Sequential) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(
            nn.Embedding.from_pretrained(table.clone(), freeze=False) for table in tables
        )
        self.mlp = mlp.requires_grad_()

    def forward(self, columns: Sequence[Tensor], numeric: Tensor) -> Tensor:
        embedded = [embedding(column) for embedding, column in zip(self.embeddings, columns, strict=True)]
        return self.mlp(torch.cat([*embedded, numeric], -1))

    def tensors(self) -> list[Tensor]:
        """Tables, weights and biases."""
        linears = [layer for layer in self.mlp if isinstance(layer, nn.Linear)]
        return [layer.weight for layer in (*self.embeddings, *linears)] + [layer.bias for layer in linears]


def _models(problem: TableProblem) -> tuple[list[Model], list[Callable[[], Tensor]]]:
    """The members, and what computes the loss of each."""
    batch = problem.batch
    tables, weights, biases = batch.parts(problem.tensors)
    mlps = Problem(batch.numeric, weights, biases).modules()
    models = [Model([table[m] for table in tables], mlp) for m, mlp in enumerate(mlps)]
    columns = batch.categorical.movedim(2, 1).contiguous()  # [E, C, B]
    rows = zip(columns.unbind(), batch.numeric, batch.target, strict=True)
    return models, [
        partial(_loss, model, c.unbind(), x, y) for model, (c, x, y) in zip(models, rows, strict=True)
    ]


def _loss(model: Model, columns: Sequence[Tensor], numeric: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(model(columns, numeric), target)


def loop(problem: TableProblem) -> Form:
    """One model after the other, then one Adam for all."""
    models, losses = _models(problem)
    leaves = side_by_side([model.tensors() for model in models])
    return Form(lambda _: torch.stack([loss() for loss in losses]), leaves, stack_again(len(models)))


def loop_of_steps(problem: TableProblem) -> Run:
    """Each model takes its whole step before the next one starts, with an Adam of its own."""
    models, losses = _models(problem)
    optimizers = [adam(model.tensors()) for model in models]
    state = _state(side_by_side([model.tensors() for model in models]), stack_again(len(models)))

    def run() -> Stepped:
        found = []
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            each = loss()
            each.backward()
            optimizer.step()
            found.append(each.detach())
        return torch.stack(found), state

    return run


def stack(problem: TableProblem, *, transposed: bool = False) -> Form:
    """The members' tables one below the other, [E N, D], and a stack of baddbmm in either layout."""
    e, batch, tables = problem.table.ensemble_size, problem.batch, problem.table.categorical
    members = torch.arange(e, device=batch.target.device).unsqueeze(1)
    first_rows = [members * n for n, _ in tables]
    target = batch.target.mT.contiguous() if transposed else batch.target

    def losses(leaves: Sequence[Tensor]) -> Tensor:
        tables, weights, biases = batch.parts(leaves)
        embedded = [
            F.embedding(column + first, table)
            for column, first, table in zip(batch.categorical.unbind(-1), first_rows, tables, strict=True)
        ]
        features = torch.cat([*embedded, batch.numeric], -1)
        if transposed:
            return mse(transposed_stack(weights, biases, features.mT), target)
        return mse(baddbmm_stack(weights, biases, features), target)

    def stacked(leaves: Sequence[Tensor]) -> list[Tensor]:
        tables, weights, biases = batch.parts(leaves)
        return [
            *(t.unflatten(0, (e, -1)) for t in tables),
            *(weights if transposed else (w.mT for w in weights)),
            *(b.squeeze(2 if transposed else 1) for b in biases),
        ]

    own_tables, weights, biases = batch.parts(problem.tensors)
    leaves = [
        *(t.flatten(0, 1) for t in own_tables),
        *(weights if transposed else (w.mT for w in weights)),
        *(b.unsqueeze(2 if transposed else 1) for b in biases),
    ]
    return Form(losses, [leaf.clone(memory_format=torch.contiguous_format) for leaf in leaves], stacked)
