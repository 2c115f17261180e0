"""A whole step of models of components that are pushed apart: losses, gradients, Adagrad.

    mnist   20 models of two components, 784-1200-1200-10, the correlation loss on logits, B 256: the
            anti-distillation document's
    click   8 models of three narrowing towers on 13 numbers and 26 embeddings of 8, B 512, one output

Against a stack of all components, `baddbmm` over `[M J, in, out]` or `[M J, out, in]`, with the same losses
written in torch and torch's fused Adagrad, eager and compiled. And against our own components that are not
decorrelated, whose loss is then in the kernel: that should be at most three per cent faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import pyens
from benchmarks import harness
from benchmarks.peers import mlp_flops
from benchmarks.training_peers import baddbmm_stack, transposed_stack
from pyens.nn import ComponentModels
from pyens.optim import fused

OURS, WITHOUT = "pyens", "pyens, not decorrelated"
STRENGTH = 0.1
ADAGRAD = {"lr": 1e-4, "initial_accumulator_value": 0.1}


@dataclass(frozen=True)
class Problem:
    """Models of components of one shape, and a batch."""

    models: int
    components: int
    features: tuple[int, ...]
    rows: int

    @property
    def loss(self) -> str:
        return "bce" if self.features[-1] == 1 else "cross_entropy"

    def batch(self, options: harness.Options) -> tuple[Tensor, Tensor]:
        drawn = torch.Generator().manual_seed(options.seed)
        x = torch.rand(self.rows, self.features[0], generator=drawn).to(options.dtype)
        if self.features[-1] == 1:
            return x, torch.randint(2, (self.rows, 1), generator=drawn).to(options.dtype)
        return x, torch.randint(self.features[-1], (self.rows,), generator=drawn)

    def model(self, strength: float | None, dtype: torch.dtype) -> ComponentModels:
        inputs, *hidden, outputs = self.features
        towers = [
            pyens.EnsembleMLP(self.models, inputs, hidden, outputs, dtype=dtype)
            for _ in range(self.components)
        ]
        made = ComponentModels(towers, strength=strength)
        made.reset_parameters(range(self.models))
        return made


PROBLEMS = {  # and what is asked of it against the best peer
    "mnist": (Problem(20, 2, (784, 1200, 1200, 10), 256), 1.1),
    "click": (Problem(8, 3, (13 + 26 * 8, 64, 32, 16, 1), 512), None),
}
QUICK = {"tiny": (Problem(2, 2, (5, 7, 3), 9), None)}


def cases(options: harness.Options) -> list[harness.Case]:
    if options.device.type != "cpu" or options.dtype not in (torch.float32, torch.float64):
        return []
    asked = options.dtype == torch.float32 and not options.quick
    made = []
    for name, (problem, ratio) in (QUICK if options.quick else PROBLEMS).items():
        shape = "-".join(map(str, problem.features))
        flops = 3 * mlp_flops(problem.models * problem.components, problem.rows, problem.features)
        # No gradient of the inputs.
        flops -= mlp_flops(problem.models * problem.components, problem.rows, problem.features[:2])
        targets = [harness.Target(OURS, 0.97, (WITHOUT,))] if asked else []
        if asked and ratio:
            targets += [harness.Target(OURS, ratio), harness.Target(OURS, 0.75, flops=flops)]
        made.append(
            harness.Case(
                name,
                f"M {problem.models} x J {problem.components}, {shape}, B {problem.rows}",
                partial(contestants, problem, options),
                flops=flops,
                targets=tuple(targets),
                grad=True,
            )
        )
    return made


def contestants(problem: Problem, options: harness.Options) -> list[harness.Contestant]:
    x, y = problem.batch(options)
    exact = problem.model(STRENGTH, torch.float64)
    wide = y.double() if y.is_floating_point() else y
    expected = exact.loss(x.double(), wide, loss=problem.loss).detach()

    def check(losses: Tensor, part: str = "") -> None:
        of = exact.loss_terms(x.double(), wide, loss=problem.loss)[part].detach() if part else expected
        torch.testing.assert_close(losses.double(), of, rtol=2e-2, atol=1e-3)  # after some steps of 1e-4

    def ours(strength: float | None) -> harness.Run:
        model = problem.model(strength, options.dtype)
        optimizer = fused(torch.optim.Adagrad, model.parameters(), **ADAGRAD)
        return step(lambda: model.loss(x, y, loss=problem.loss), optimizer)

    found = [
        harness.Contestant(OURS, partial(ours, STRENGTH), check, ours=True),
        harness.Contestant(WITHOUT, partial(ours, None), partial(check, part="label"), ours=True),
    ]
    for compile in (False, True) if options.compile else (False,):
        for layout, stack in (("in_out", baddbmm_stack), ("out_in", transposed_stack)):
            name = f"baddbmm {layout}" + ", compiled" * compile
            found.append(
                harness.Contestant(name, partial(peer, problem, options, layout, stack, compile), check)
            )
    return found


def peer(
    problem: Problem,
    options: harness.Options,
    layout: str,
    stack: Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], Tensor],
    compile: bool,
) -> harness.Run:
    """All components of all models as one stack, with torch's own operations."""
    x, y = problem.batch(options)
    m, j, rows = problem.models, problem.components, problem.rows
    components = [part.stacked() for part in problem.model(STRENGTH, options.dtype).components]
    leaves: list[Tensor] = []
    for layer in range(len(problem.features) - 1):  # [M, J, ...], model by model
        weight = torch.stack([part[0][layer].detach() for part in components], 1).flatten(0, 1)
        leaves.append(weight.mT.contiguous() if layout == "in_out" else weight)
    for layer in range(len(problem.features) - 1):
        bias = torch.stack([part[1][layer].detach() for part in components], 1).flatten(0, 1)
        leaves.append(bias.unsqueeze(1 if layout == "in_out" else 2))
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    layers = len(leaves) // 2
    hidden = (x if layout == "in_out" else x.T.contiguous()).expand(m * j, -1, -1)

    def losses() -> Tensor:
        z = stack(leaves[:layers], leaves[layers:], hidden)
        by_row = z if layout == "in_out" else z.mT
        by_label = (z.mT if layout == "in_out" else z).unflatten(0, (m, j)).transpose(1, 2)  # [M, K, J, B]
        if problem.loss == "bce":
            each = F.binary_cross_entropy_with_logits(by_row, y.expand(m * j, rows, 1), reduction="none")
        else:
            labels = y.expand(m * j, rows).reshape(-1)
            each = F.cross_entropy(by_row.reshape(m * j * rows, -1), labels, reduction="none")
        label = each.view(m, j, rows).mean(-1).sum(-1)
        products = by_label @ by_label.mT / rows
        return label + STRENGTH * products.tril(-1).square().sum((1, 2, 3))

    optimizer = torch.optim.Adagrad(leaves, fused=True, **ADAGRAD)
    return step(torch.compile(losses) if compile else losses, optimizer)


def step(losses: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> harness.Run:
    def run() -> Tensor:
        optimizer.zero_grad()
        found = losses()
        found.sum().backward()
        optimizer.step()
        return found.detach()

    return run


if __name__ == "__main__":
    raise SystemExit(harness.main("component_models", __doc__, cases))
