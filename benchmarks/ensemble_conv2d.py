"""Convolutional members: the network of the compressed ensembles, forward and in training.

Conv 3 × 3, 28 channels; max pool 2; conv 5 × 5, 32 channels; max pool 2; dense 10. Five members on the same
images of 28 × 28. Peers: the members one after the other, also with channels last; one convolution with the
members as its groups; both compiled; on the CPU ONNX Runtime and OpenVINO, likewise. The targets are for
float32 on two CPU threads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.engines.peers import convolution_peers
from benchmarks.peers import compiled
from benchmarks.training_peers import GRADIENT_TOLERANCE
from pyens.nn import EnsembleSequential
from pyens.ops import ensemble_conv2d

MODULE, OP = "pyens EnsembleSequential", "pyens op"


@dataclass(frozen=True)
class Problem:
    """An ensemble of such networks, images and classes."""

    images: Tensor  # [B, C, H, W]
    target: Tensor  # [B]
    members: list[nn.Sequential]

    @classmethod
    def random(cls, ensemble_size: int, batch_size: int, size: int, options: harness.Options) -> Problem:
        torch.manual_seed(options.seed)
        kernel, last = (3, 5) if size == 28 else (3, 3), {28: 4, 12: 1}[size]

        def member() -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(1, 28, kernel[0]),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(28, 32, kernel[1]),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(32 * last * last, 10),
            ).to(options.device, options.dtype)

        images = torch.randn(batch_size, 1, size, size).to(options.device, options.dtype)
        target = torch.randint(10, (batch_size,)).to(options.device)
        return cls(images, target, [member() for _ in range(ensemble_size)])

    def expected(self) -> Tensor:
        return torch.stack([copy.deepcopy(m).double()(self.images.double()) for m in self.members]).detach()

    def layers(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases `[E, ...]` of the three layers."""
        layers = [[m[i] for m in self.members] for i in (0, 3, 7)]
        stacked = [torch.stack([layer.weight.detach() for layer in column]) for column in layers]
        return stacked, [torch.stack([layer.bias.detach() for layer in column]) for column in layers]

    def flops_of_first(self) -> float:
        """Those of the first convolution."""
        weight = self.layers()[0][0]
        return 2.0 * len(self.images) * weight.numel() * (self.images.shape[-1] - weight.shape[-1] + 1) ** 2

    def flops(self, convolutions_alone: bool = False) -> float:
        """Useful operations of a forward pass."""
        size, total = self.images.shape[-1], 0
        weights, _ = self.layers()
        for weight in weights[:2]:
            members, outputs, *taps = weight.shape
            size = size - taps[-1] + 1
            total += members * outputs * size**2 * taps[0] * taps[1] * taps[2]
            size //= 2
        total += 0 if convolutions_alone else weights[2].numel()
        return 2.0 * len(self.images) * total


def grouped(images: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The members as groups of channels."""
    members, hidden = len(weights[0]), images
    for layer, (weight, bias) in enumerate(zip(weights[:2], biases[:2], strict=True)):
        hidden = F.conv2d(hidden, weight.flatten(0, 1), bias.flatten(), groups=members if layer else 1)
        hidden = F.max_pool2d(hidden.relu_(), 2)
    rows = hidden.reshape(len(images), members, -1).transpose(0, 1)
    return torch.baddbmm(biases[2].unsqueeze(1), rows, weights[2].transpose(1, 2))


def cases(options: harness.Options) -> list[harness.Case]:
    ensemble_size, size = (2, 12) if options.quick else (5, 28)
    batches = (3,) if options.quick else (256, 16, 1)
    with_targets = (options.device.type, options.dtype, options.threads, options.quick) == (
        "cpu",
        torch.float32,
        2,
        False,
    )

    def problem(batch: int) -> Problem:
        return Problem.random(ensemble_size, batch, size, options)

    def targets(batch: int, *them: harness.Target) -> tuple[harness.Target, ...]:
        return them if with_targets and batch == 256 else ()

    made = []
    for batch in batches:
        flops, alone = problem(batch).flops(), problem(batch).flops(convolutions_alone=True)
        shape = f"E {ensemble_size}, B {batch}"
        made += [
            harness.Case(
                f"forward-{batch}",
                f"forward, {shape}",
                lambda batch=batch: forward_contestants(problem(batch), options),
                flops=flops,
                targets=targets(batch, harness.Target(MODULE, 1.3)),
            ),
            harness.Case(
                f"convolutions-{batch}",
                f"the two convolutions alone, with ReLU and maximum, {shape}",
                lambda batch=batch: convolution_contestants(problem(batch), options),
                flops=alone,
                targets=targets(batch, harness.Target(OP, 0.75, flops=alone)),
            ),
            harness.Case(
                f"training-{batch}",
                f"forward, cross entropy, backward, {shape}",
                lambda batch=batch: training_contestants(problem(batch), options),
                flops=3 * flops - problem(batch).flops_of_first(),  # nobody asks for the images' gradient
                targets=targets(batch, harness.Target(MODULE, 1.3)),
                grad=True,
            ),
        ]
    return made


def forward_contestants(problem: Problem, options: harness.Options) -> list[harness.Contestant]:
    images = problem.images
    expected = problem.expected()
    check = harness.agrees_with(expected, options.dtype)
    weights, biases = problem.layers()
    last = images.to(memory_format=torch.channels_last)
    on_cpu = (options.device.type, options.dtype) == ("cpu", torch.float32)

    def ours() -> harness.Run:
        model = EnsembleSequential.from_modules(problem.members).packed()
        return lambda: model(images)

    def loop(x: Tensor) -> Callable[[], Tensor]:
        layout = torch.channels_last if x is last else torch.contiguous_format
        members = nn.ModuleList(copy.deepcopy(problem.members)).to(memory_format=layout)  # type: ignore[call-overload]
        members.requires_grad_(False)
        return lambda: torch.stack([member(x) for member in members])

    found = [
        harness.Contestant(MODULE, ours, check, ours=True),
        *_peers("loop", lambda: loop(images), check, options),
        *_peers("loop, channels last", lambda: loop(last), check, options),
        *_peers("grouped", lambda: lambda: grouped(images, weights, biases), check, options),
    ]
    if on_cpu:
        found += convolution_peers(images, weights, biases, expected, options.threads)
    return found


def convolution_contestants(problem: Problem, options: harness.Options) -> list[harness.Contestant]:
    images, members = problem.images, len(problem.members)
    weights, biases = problem.layers()

    def expected() -> Tensor:
        found = [copy.deepcopy(m).double()[:6](images.double()) for m in problem.members]
        return torch.stack(found).detach()

    check = harness.agrees_with(expected(), options.dtype)

    def ours() -> Tensor:
        hidden = images
        for weight, bias in zip(weights[:2], biases[:2], strict=True):
            hidden = ensemble_conv2d(hidden, weight, bias, activation="relu", max_pool=2)
        return hidden

    def groups() -> Tensor:
        hidden = images
        for layer, (weight, bias) in enumerate(zip(weights[:2], biases[:2], strict=True)):
            hidden = F.conv2d(hidden, weight.flatten(0, 1), bias.flatten(), groups=members if layer else 1)
            hidden = F.max_pool2d(hidden.relu_(), 2)
        return hidden.unflatten(1, (members, -1)).transpose(0, 1)

    def loop(layout: torch.memory_format) -> Callable[[], Tensor]:
        own = nn.ModuleList(copy.deepcopy(m)[:6] for m in problem.members).to(memory_format=layout)  # type: ignore[call-overload]
        x = images.to(memory_format=layout)
        return lambda: torch.stack([m(x) for m in own])

    return [
        harness.Contestant(OP, lambda: ours, check, ours=True),
        *_peers("loop", lambda: loop(torch.contiguous_format), check, options),
        *_peers("loop, channels last", lambda: loop(torch.channels_last), check, options),
        *_peers("grouped", lambda: groups, check, options),
    ]


def training_contestants(problem: Problem, options: harness.Options) -> list[harness.Contestant]:
    images, target, members = problem.images, problem.target, len(problem.members)
    exact = [copy.deepcopy(m).double() for m in problem.members]
    of_member = [
        list(torch.autograd.grad(F.cross_entropy(m(images.double()), target), m.parameters())) for m in exact
    ]
    expected = [torch.stack(column) for column in zip(*of_member, strict=True)]
    # A sum next to zero, or next to another of its window, goes either way: errors count in their mean.
    rms = GRADIENT_TOLERANCE[options.dtype]
    check = harness.agrees_with(expected, options.dtype, rms=rms)
    by_member = harness.agrees_with(
        expected,
        options.dtype,
        lambda found: [torch.stack(found[i :: len(expected)]) for i in range(len(expected))],
        rms=rms,
    )

    def step(
        outputs: Callable[[], Tensor], parameters: Sequence[Tensor], compile: bool = False
    ) -> harness.Run:
        def loss() -> Tensor:
            return members * F.cross_entropy(outputs().flatten(0, 1), target.repeat(members))

        run = compiled(loss) if compile else loss
        return lambda: list(torch.autograd.grad(run(), parameters))

    def ours() -> harness.Run:
        model = EnsembleSequential.from_modules(problem.members)
        parameters = list(model.parameters())
        return lambda: list(
            torch.autograd.grad(model.loss(images, target, loss="cross_entropy").sum(), parameters)
        )

    def loop(compile: bool, channels_last: bool) -> harness.Run:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        own = nn.ModuleList(copy.deepcopy(problem.members)).to(memory_format=layout)  # type: ignore[call-overload]
        x = images.to(memory_format=layout)
        return step(lambda: torch.stack([m(x) for m in own]), list(own.parameters()), compile)

    def groups(compile: bool) -> harness.Run:
        weights, biases = ([t.clone().requires_grad_() for t in tensors] for tensors in problem.layers())
        parameters = [t for pair in zip(weights, biases, strict=True) for t in pair]
        return step(lambda: grouped(images, weights, biases), parameters, compile)

    def both(name: str, make: Callable[[bool], harness.Run], check: Callable) -> list[harness.Contestant]:
        found = [harness.Contestant(name, lambda: make(False), check)]
        if options.compile:
            found.append(harness.Contestant(f"{name}, compiled", lambda: make(True), check))
        return found

    return [
        harness.Contestant(MODULE, ours, check, ours=True),
        *both("loop", lambda c: loop(c, False), by_member),
        *both("loop, channels last", lambda c: loop(c, True), by_member),
        *both("grouped", groups, check),
    ]


def _peers(
    name: str, make: Callable[[], Callable[[], Tensor]], check: Callable, options: harness.Options
) -> list[harness.Contestant]:
    """A peer as it is, and compiled."""
    found = [harness.Contestant(name, make, check)]
    if options.compile:
        found.append(harness.Contestant(f"{name}, compiled", lambda: compiled(make()), check))
    return found


if __name__ == "__main__":
    raise SystemExit(harness.main("ensemble_conv2d", __doc__, cases))
