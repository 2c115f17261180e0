"""Activation strength of one model: the op against plain PyTorch, and against hooks (`strength_of`).

Under torch.inference_mode: the prediction, and for each hidden unit its value and whether it is active. The
targets are for float32 on two CPU threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyens
from benchmarks import harness
from benchmarks.peers import Problem
from pyens.reference.activation_strength import pack_bits
from pyens.variation import ActivationStatistics, strength_of

OP, PACKED = "pyens op", "pyens op, packed bits"
EAGER, TRANSPOSED, HOOKS = "eager", "eager transposed", "hooks on nn.Sequential"

MODEL = (43, 50, 20, 10, 1)
SHAPES = {  # name: batch size, features, targets of the op: (ratio, against; all peers if empty)
    "one-65536": (65_536, MODEL, ((4.0, (f"{EAGER}, compiled", f"{TRANSPOSED}, compiled")),)),
    "one-1": (1, MODEL, ((3.0, ()),)),
    "one-1024": (1024, MODEL, ((3.0, ()),)),
}
QUICK = {"tiny": (17, (5, 7, 3, 2), ())}


def cases(options: harness.Options) -> list[harness.Case]:
    """The table of shapes, built when its turn comes."""
    with_targets = (options.device.type, options.dtype, options.threads) == ("cpu", torch.float32, 2)
    made = []
    for name, (batch_size, features, targets) in (QUICK if options.quick else SHAPES).items():
        inputs, *hidden, outputs = features
        itemsize = options.dtype.itemsize
        made.append(
            harness.Case(
                name=name,
                title=f"one model, B {batch_size}, {'-'.join(map(str, features))}",
                contestants=partial(contestants, batch_size, features, options),
                bytes=batch_size * ((inputs + outputs + sum(hidden)) * itemsize + sum(hidden)),
                targets=tuple(harness.Target(OP, *t) for t in targets) if with_targets else (),
            )
        )
    return made


def contestants(
    batch_size: int, features: tuple[int, ...], options: harness.Options
) -> list[harness.Contestant]:
    """The same numbers from all of them; what a model needs is made ready beforehand."""
    problem = Problem.random(
        1, batch_size, features, seed=options.seed, device=options.device, dtype=options.dtype
    )
    x, weights, biases = problem.input, problem.weights, problem.biases
    model = problem.modules()[0]
    statistics = ActivationStatistics()
    generator = torch.Generator().manual_seed(options.seed + 1)
    statistics.observe(model, torch.randn(4096, features[0], generator=generator).to(x))
    mean, std = statistics.compute()
    wide = [t.double() for t in (*weights, *biases)]
    expected = pyens.reference.activation_strength(
        x.double(), wide[: len(weights)], wide[len(weights) :], mean.double(), std.double()
    )
    check = partial(check_strength, [t[0] for t in expected], options.dtype)
    check_op = partial(check_strength, list(expected), options.dtype)
    packed = [*expected[:2], pack_bits(expected.active)]
    check_packed = partial(check_strength, packed, options.dtype)

    def op(pack: bool) -> harness.Run:
        return lambda: pyens.ops.activation_strength(x, weights, biases, mean, std, bitpack=pack)

    found = [
        harness.Contestant(OP, lambda: op(False), check_op, ours=True),
        harness.Contestant(PACKED, lambda: op(True), check_packed, ours=True),
        harness.Contestant(HOOKS, lambda: lambda: strength_of(model, x, mean=mean, std=std), check),
    ]
    plain_mean, plain_std = mean.to(options.dtype), std.to(options.dtype)
    layers = [(w[0], b[0]) for w, b in zip(weights, biases, strict=True)]
    transposed = [(w.t().contiguous(), b) for w, b in layers]
    for name, function, parameters in ((EAGER, plain, layers), (TRANSPOSED, plain_transposed, transposed)):
        call = partial(function, x, parameters, plain_mean, plain_std)
        found.append(harness.Contestant(name, lambda call=call: call, check))
        if options.compile:
            compiled = partial(compiled_call, function, x, parameters, plain_mean, plain_std)
            found.append(harness.Contestant(f"{name}, compiled", compiled, check))
    return found


def compiled_call(function: Callable[..., Any], *args: Any) -> harness.Run:
    compiled = torch.compile(function)
    return lambda: compiled(*args)


def plain(
    x: Tensor, layers: Sequence[tuple[Tensor, Tensor]], mean: Tensor, std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = []
    for weight, bias in layers[:-1]:
        x = F.linear(x, weight, bias).relu_()
        hidden.append(x)
    h = torch.cat(hidden, -1)
    return F.linear(x, *layers[-1]), (h - mean) / std, h > 0


def plain_transposed(
    x: Tensor, layers: Sequence[tuple[Tensor, Tensor]], mean: Tensor, std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = []
    for weight, bias in layers[:-1]:
        x = torch.addmm(bias, x, weight).relu_()
        hidden.append(x)
    h = torch.cat(hidden, -1)
    return torch.addmm(layers[-1][1], x, layers[-1][0]), (h - mean).div_(std), h > 0


def check_strength(expected: Sequence[Tensor], dtype: torch.dtype, got: Sequence[Tensor]) -> None:
    """Output and value as they should be, and all but a few of the bits: a rounding can flip one."""
    harness.agrees_with(expected[:2], dtype)(got[:2])
    if got[2].shape != expected[2].shape or got[2].dtype != expected[2].dtype:
        raise ValueError(f"expected {expected[2].dtype} {tuple(expected[2].shape)}, got {got[2].dtype}")
    wrong = (got[2] != expected[2]).double().mean().item()
    allowed = {torch.float64: 0.0, torch.float32: 1e-4}.get(dtype, 1e-1)
    if wrong > allowed:
        raise ValueError(f"{wrong:.2%} of active are wrong")


if __name__ == "__main__":
    raise SystemExit(harness.main("activation_strength", __doc__, cases))
