"""The ways people evaluate an ensemble of MLPs in PyTorch today, each at its best.

What a user would prepare once (stacking, transposing, expanding a shared input) happens outside of the timed
call. Tried on a CPU and left out, because they gained nothing: `mode="max-autotune-no-cudagraphs"`, freezing
in inductor, and baddbmm on a transposed view of the weights or on a copied instead of an expanded input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.harness import Contestant, Run, agrees_with


@dataclass(frozen=True)
class Problem:
    """An ensemble of ReLU MLPs and its input, in the layout of pyens."""

    input: Tensor  # [B, I] shared by all members, or [E, B, I]
    weights: tuple[Tensor, ...]  # L × [E, out, in]
    biases: tuple[Tensor, ...]  # L × [E, out]

    @classmethod
    def random(
        cls,
        ensemble_size: int,
        batch_size: int,
        features: Sequence[int],
        *,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        shared: bool = True,
    ) -> Problem:
        """Normal input; weights scaled so that every layer's output is of the same size."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

        e = ensemble_size
        return cls(
            draw(batch_size, features[0]) if shared else draw(e, batch_size, features[0]),
            tuple(draw(e, o, i, scale=(2 / i) ** 0.5) for i, o in pairwise(features)),
            tuple(draw(e, o, scale=0.1) for o in features[1:]),
        )

    @property
    def ensemble_size(self) -> int:
        return self.weights[0].shape[0]

    @property
    def member_inputs(self) -> Tensor:
        """The input as every member sees it, [E, B, I], without a copy."""
        return self.input.expand(self.ensemble_size, *self.input.shape[-2:])

    def modules(self) -> list[nn.Sequential]:
        """The members as plain modules, for inference."""
        members = []
        for m in range(self.ensemble_size):
            layers: list[nn.Module] = []
            for weight, bias in zip(self.weights, self.biases, strict=True):
                _, out_features, in_features = weight.shape
                linear = nn.Linear(in_features, out_features, device=weight.device, dtype=weight.dtype)
                with torch.no_grad():
                    linear.weight.copy_(weight[m])
                    linear.bias.copy_(bias[m])
                layers += [linear, nn.ReLU(inplace=True)]
            members.append(nn.Sequential(*layers[:-1]).requires_grad_(False))
        return members

    def expected(self) -> Tensor:
        """The output [E, B, O] in float64, one member after the other."""
        outputs = []
        for m, hidden in enumerate(self.member_inputs):
            hidden = hidden.double()
            for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                hidden = hidden.relu() if layer else hidden
                hidden = nn.functional.linear(hidden, weight[m].double(), bias[m].double())
            outputs.append(hidden)
        return torch.stack(outputs)


def mlp_flops(ensemble_size: int, batch_size: int, features: Sequence[int]) -> float:
    """Useful operations of a forward pass: one multiplication and one addition per weight and example."""
    return 2.0 * ensemble_size * batch_size * sum(i * o for i, o in pairwise(features))


def mlp_peers(problem: Problem, expected: Tensor, *, compile: bool) -> list[Contestant]:
    """The forward pass of `problem` as others do it; `expected` is `problem.expected()`.

    On CUDA only the stacks are compiled: a loop over 100 members would compile for minutes to save what a
    CUDA graph saves, its launches.
    """
    dtype, cuda = problem.weights[0].dtype, problem.weights[0].is_cuda
    member_first = agrees_with(expected, dtype)
    transposed = agrees_with(expected, dtype, lambda output: output.transpose(1, 2))
    batch_first = agrees_with(expected, dtype, lambda output: output.transpose(0, 1))

    def contestants(name: str, prepare: Callable[[bool], Run], check: Callable) -> list[Contestant]:
        eager = Contestant(name, lambda: prepare(False), check)
        compiled = Contestant(f"{name}, compiled", lambda: prepare(True), check)
        return [eager, compiled] if compile and not (cuda and name in ("loop", "vmap")) else [eager]

    return [
        *contestants("loop", lambda c: loop(problem, compile=c), member_first),
        *contestants("vmap", lambda c: vmap(problem, compile=c), member_first),
        *contestants("baddbmm", lambda c: baddbmm(problem, compile=c), member_first),
        *contestants("baddbmm transposed", lambda c: baddbmm_transposed(problem, compile=c), transposed),
        Contestant("tabm", lambda: tabm_linear_ensemble(problem), batch_first),
    ]


def loop(problem: Problem, *, compile: bool) -> Run:
    """One nn.Sequential after the other."""
    members = nn.ModuleList(problem.modules())
    inputs = problem.member_inputs.unbind()

    def forward() -> Tensor:
        return torch.stack([member(x) for member, x in zip(members, inputs, strict=True)])

    return compiled(forward) if compile else forward


def vmap(problem: Problem, *, compile: bool) -> Run:
    """functional_call over stack_module_state."""
    members = problem.modules()
    parameters, buffers = torch.func.stack_module_state(members)
    parameters = {name: p.detach() for name, p in parameters.items()}

    def member(state: tuple, x: Tensor) -> Tensor:
        return torch.func.functional_call(members[0], state, (x,))

    batched = torch.func.vmap(member, in_dims=(0, None if problem.input.dim() == 2 else 0))
    batched = compiled(batched) if compile else batched
    return lambda: batched((parameters, buffers), problem.input)


def baddbmm(problem: Problem, *, compile: bool) -> Run:
    """A stack of baddbmm, weights laid out as [E, in, out]: x [E, B, I] times W."""
    weights = [w.transpose(1, 2).contiguous() for w in problem.weights]
    biases = [b.unsqueeze(1) for b in problem.biases]
    inputs = problem.member_inputs

    def forward() -> Tensor:
        hidden = inputs
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            hidden = hidden.relu_() if layer else hidden
            hidden = torch.baddbmm(bias, hidden, weight)
        return hidden

    return compiled(forward) if compile else forward


def baddbmm_transposed(problem: Problem, *, compile: bool) -> Run:
    """The same with the batch as the last axis: W [E, out, in] as it is, times x [E, I, B].

    The least known of the peers and, from some 50 examples on, the fastest one for narrow layers.
    """
    biases = [b.unsqueeze(2) for b in problem.biases]
    inputs = problem.member_inputs.transpose(1, 2).contiguous()

    def forward() -> Tensor:
        hidden = inputs
        for layer, (weight, bias) in enumerate(zip(problem.weights, biases, strict=True)):
            hidden = hidden.relu_() if layer else hidden
            hidden = torch.baddbmm(bias, weight, hidden)
        return hidden

    return compiled(forward) if compile else forward


def tabm_linear_ensemble(problem: Problem) -> Run:
    """tabm.LinearEnsemble in its own layout, [B, k, D]."""
    from tabm import LinearEnsemble

    layers: list[nn.Module] = []
    for weight, bias in zip(problem.weights, problem.biases, strict=True):
        e, out_features, in_features = weight.shape
        linear = LinearEnsemble(in_features, out_features, k=e, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight.transpose(1, 2))
            linear.bias.copy_(bias)
        layers += [linear, nn.ReLU(inplace=True)]
    model = nn.Sequential(*layers[:-1]).requires_grad_(False)
    inputs = problem.member_inputs.transpose(0, 1)
    return lambda: model(inputs)


def compiled(function: Callable) -> Callable:
    """`function` compiled whole."""
    # One shape per case: static shapes are the best that torch.compile can do for a peer.
    return torch.compile(function, fullgraph=True, dynamic=False)
