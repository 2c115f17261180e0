"""The ways people train an ensemble of MLPs in PyTorch today, each at its best.

Every peer keeps its parameters in the layout that suits it, and what a user prepares once happens outside of
the timed call. Tried on a CPU and left out, because they gained nothing: a copied instead of an expanded
shared input, a backward pass for each member of a loop, a compiled loss of one member in a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Contestant, Run, agrees_with
from benchmarks.peers import Problem, compiled, mlp_flops

# Largest root mean square of a gradient's errors, in units of the gradient's own. A bound on every single
# error would fail the right ones: a ReLU whose input is within rounding of zero may go either way, and takes
# one example's share of a few gradients with it.
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 2e-1}

# What a timed call returns: the losses [E], and what gives the gradients in the layout of pyens, untimed.
Trained = tuple[Tensor, Callable[[], Sequence[Tensor]]]


@dataclass(frozen=True)
class Form:
    """One way to write the members' losses: in its own layout, with the way back to that of pyens."""

    losses: Callable[[Sequence[Tensor]], Tensor]  # of what stands for `leaves`; [E]
    leaves: Sequence[Tensor]
    stacked: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Each member's own mean loss [E]."""
    return (output - target).square().mean((1, 2))


def member_loss(
    weights: Sequence[Tensor], biases: Sequence[Tensor], hidden: Tensor, target: Tensor
) -> Tensor:
    """One member's: what an nn.Sequential calls, without the time that modules take."""
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        hidden = F.linear(hidden.relu() if layer else hidden, weight, bias)
    return F.mse_loss(hidden, target)


def baddbmm_stack(weights: Sequence[Tensor], biases: Sequence[Tensor], hidden: Tensor) -> Tensor:
    """hidden [E, B, in], weights [E, in, out], biases [E, 1, out]."""
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        hidden = torch.baddbmm(bias, hidden.relu_() if layer else hidden, weight)
    return hidden


def transposed_stack(weights: Sequence[Tensor], biases: Sequence[Tensor], hidden: Tensor) -> Tensor:
    """hidden [E, in, B], weights [E, out, in], biases [E, out, 1]."""
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        hidden = torch.baddbmm(bias, weight, hidden.relu_() if layer else hidden)
    return hidden


def summed(losses: Callable[[Sequence[Tensor]], Tensor]) -> Callable:
    """What gives the sum to differentiate, and the losses."""

    def total(leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        each = losses(leaves)
        return each.sum(), each

    return total


def side_by_side(members: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Every member's first tensor, then every member's second one, and so on."""
    return [tensor for kind in zip(*members, strict=True) for tensor in kind]


def stack_again(ensemble_size: int) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What makes one tensor of each kind that is `side_by_side`."""
    return lambda tensors: [
        torch.stack(list(tensors[i : i + ensemble_size])) for i in range(0, len(tensors), ensemble_size)
    ]


# --- losses and gradients --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingProblem:
    """An ensemble and what it is to learn. Inputs per member get a gradient too, a shared one gets none."""

    mlp: Problem
    target: Tensor  # [B, O], or [E, B, O] where the input is [E, B, I]

    @classmethod
    def random(
        cls, ensemble_size: int, batch_size: int, features: Sequence[int], *, seed: int, **options
    ) -> TrainingProblem:
        """`Problem.random` and a normal target."""
        mlp = Problem.random(ensemble_size, batch_size, features, seed=seed, **options)
        generator = torch.Generator().manual_seed(seed + 1)
        target = torch.randn(*mlp.input.shape[:-1], features[-1], generator=generator)
        return cls(mlp, target.to(mlp.input))

    def to(self, dtype: torch.dtype) -> TrainingProblem:
        """The same numbers, as far as `dtype` has them."""
        weights, biases = ([t.to(dtype) for t in tensors] for tensors in (self.mlp.weights, self.mlp.biases))
        return TrainingProblem(
            Problem(self.mlp.input.to(dtype), tuple(weights), tuple(biases)), self.target.to(dtype)
        )

    @property
    def own_inputs(self) -> bool:
        return self.mlp.input.dim() == 3

    @property
    def tensors(self) -> list[Tensor]:
        """What gets a gradient: weights, biases, and inputs per member."""
        return [*self.mlp.weights, *self.mlp.biases, *([self.mlp.input] if self.own_inputs else [])]

    def parts(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor]:
        """Weights, biases and input out of what stands for `tensors`."""
        layers = len(self.mlp.weights)
        return tensors[:layers], tensors[layers : 2 * layers], [*tensors, self.mlp.input][2 * layers]

    def expected(self) -> tuple[Tensor, list[Tensor]]:
        """The losses [E] and the gradients of their sum, in float64 and the order of `tensors`."""
        tensors = [tensor.to(torch.float64, copy=True).requires_grad_() for tensor in self.tensors]
        weights, biases, input = self.parts(tensors)
        losses = mse(Problem(input, tuple(weights), tuple(biases)).expected(), self.target.double())
        return losses.detach(), list(torch.autograd.grad(losses.sum(), tensors))


def training_flops(ensemble_size: int, batch_size: int, features: Sequence[int], own_inputs: bool) -> float:
    """Useful operations: output, weight gradient and input gradient of every layer, if anyone asks for it."""
    unasked = 0.0 if own_inputs else mlp_flops(ensemble_size, batch_size, features[:2])
    return 3 * mlp_flops(ensemble_size, batch_size, features) - unasked


def gradients_agree(expected: tuple[Tensor, list[Tensor]], dtype: torch.dtype) -> Callable[[Trained], None]:
    """A check of `Trained` against `TrainingProblem.expected()`."""
    # To dtype: pyens gives float32 losses for bfloat16 and float16.
    losses = agrees_with(expected[0], dtype, lambda trained: trained[0].detach().to(dtype))
    gradients = agrees_with(expected[1], dtype, lambda trained: trained[1](), rms=GRADIENT_TOLERANCE[dtype])

    def check(trained: Trained) -> None:
        losses(trained)
        gradients(trained)

    return check


def gradient_peers(
    problem: TrainingProblem, expected: tuple[Tensor, list[Tensor]], *, compile: bool
) -> list[Contestant]:
    """Losses and gradients of `problem` as others compute them; `expected` is `problem.expected()`."""
    eager: dict[str, Callable[[], Run]] = {
        "loop": lambda: backward(loop(problem)),
        "vmap(grad)": lambda: vmap_grad(problem),
        "baddbmm": lambda: backward(baddbmm(problem)),
        "baddbmm transposed": lambda: backward(baddbmm_transposed(problem)),
    }
    made = {
        "loop, compiled": lambda: backward(loop(problem), compile=True),
        "vmap(grad), compiled": lambda: vmap_grad(problem, compile=True),
        "baddbmm, compiled": lambda: backward(baddbmm(problem), compile=True),
        "baddbmm, one graph": lambda: one_graph(baddbmm(problem)),
        "baddbmm transposed, compiled": lambda: backward(baddbmm_transposed(problem), compile=True),
        "baddbmm transposed, one graph": lambda: one_graph(baddbmm_transposed(problem)),
    }
    if not problem.own_inputs:
        made["baddbmm joined, compiled"] = lambda: backward(
            baddbmm_transposed(problem, joined=True), compile=True
        )
    if problem.target.is_cuda:  # 100 members would compile for minutes; see mlp_peers
        del made["loop, compiled"], made["vmap(grad), compiled"]
    check = gradients_agree(expected, problem.target.dtype)
    return [Contestant(name, setup, check) for name, setup in (eager | (made if compile else {})).items()]


def backward(form: Form, *, compile: bool = False) -> Run:
    """The usual way: the losses, then `backward()` into gradients that were None."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in form.leaves]
    total = compiled(summed(form.losses)) if compile else summed(form.losses)

    def gradients() -> Sequence[Tensor]:
        return form.stacked([leaf.grad for leaf in leaves])

    def run() -> Trained:
        for leaf in leaves:
            leaf.grad = None
        loss, losses = total(leaves)
        loss.backward()
        return losses, gradients

    return run


def one_graph(form: Form) -> Run:
    """torch.func.grad, compiled: forward and backward are one graph."""
    gradient = compiled(torch.func.grad(summed(form.losses), has_aux=True))

    def run() -> Trained:
        gradients, losses = gradient(form.leaves)
        return losses, lambda: form.stacked(gradients)

    return run


def vmap_grad(problem: TrainingProblem, *, compile: bool = False) -> Run:
    """vmap(grad_and_value) over stacked parameters."""

    def loss(tensors: Sequence[Tensor], target: Tensor) -> Tensor:
        return member_loss(*problem.parts(tensors), target)

    in_dims = (0, 0 if problem.own_inputs else None)
    batched = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=in_dims)
    batched = compiled(batched) if compile else batched
    tensors = problem.tensors

    def run() -> Trained:
        gradients, losses = batched(tensors, problem.target)
        return losses, lambda: gradients

    return run


def loop(problem: TrainingProblem) -> Form:
    """One member after the other, each with tensors of its own."""
    e = problem.mlp.ensemble_size
    targets = problem.target.expand(e, *problem.target.shape[-2:]).unbind()

    def losses(leaves: Sequence[Tensor]) -> Tensor:
        members = [problem.parts(leaves[m::e]) for m in range(e)]
        return torch.stack([member_loss(*parts, y) for parts, y in zip(members, targets, strict=True)])

    members = zip(*(tensor.unbind() for tensor in problem.tensors), strict=True)
    return Form(losses, side_by_side(list(members)), stack_again(e))


def baddbmm(problem: TrainingProblem) -> Form:
    """A stack of baddbmm, weights laid out as [E, in, out]: x [E, B, I] times W."""
    e, layers = problem.mlp.ensemble_size, len(problem.mlp.weights)

    def losses(leaves: Sequence[Tensor]) -> Tensor:
        weights, biases, input = problem.parts(leaves)
        return mse(baddbmm_stack(weights, biases, input.expand(e, *input.shape[-2:])), problem.target)

    def stacked(leaves: Sequence[Tensor]) -> list[Tensor]:
        weights, biases, rest = leaves[:layers], leaves[layers : 2 * layers], leaves[2 * layers :]
        return [*(w.mT for w in weights), *(b.squeeze(1) for b in biases), *rest]

    weights, biases, rest = problem.mlp.weights, problem.mlp.biases, problem.tensors[2 * layers :]
    leaves = [*(w.mT.contiguous() for w in weights), *(b.unsqueeze(1) for b in biases), *rest]
    return Form(losses, leaves, stacked)


def baddbmm_transposed(problem: TrainingProblem, *, joined: bool = False) -> Form:
    """The same with the batch as the last axis: W [E, out, in] as it is, times x [E, I, B].

    `joined`: the first layers of all members as one product with the input that they share.
    """
    e, layers = problem.mlp.ensemble_size, len(problem.mlp.weights)
    shared, target = problem.mlp.input.mT.contiguous(), problem.target.mT.contiguous()

    def losses(leaves: Sequence[Tensor]) -> Tensor:
        weights, biases, rest = leaves[:layers], leaves[layers : 2 * layers], leaves[2 * layers :]
        if joined:
            hidden = torch.addmm(biases[0].flatten(0, 1), weights[0].flatten(0, 1), shared)
            hidden = hidden.unflatten(0, weights[0].shape[:2]).relu()
            return mse(transposed_stack(weights[1:], biases[1:], hidden), target)
        input = rest[0] if rest else shared.expand(e, *shared.shape)
        return mse(transposed_stack(weights, biases, input), target)

    def stacked(leaves: Sequence[Tensor]) -> list[Tensor]:
        weights, biases, rest = leaves[:layers], leaves[layers : 2 * layers], leaves[2 * layers :]
        return [*weights, *(b.squeeze(2) for b in biases), *(x.mT for x in rest)]

    inputs = [shared] if problem.own_inputs else []
    leaves = [*problem.mlp.weights, *(b.unsqueeze(2) for b in problem.mlp.biases), *inputs]
    return Form(losses, leaves, stacked)
