"""The forward pass of an ensemble of MLPs: the op, `EnsembleMLP` and `packed()` against their peers.

Under torch.inference_mode, one input shared by all members. The targets are for float32 on two CPU threads.
"""

from __future__ import annotations

import torch

import pyens
from benchmarks import harness
from benchmarks.peers import Problem, mlp_flops, mlp_peers

OP, MODULE, PACKED = "pyens op", "pyens module", "pyens packed()"

PAPER = (32, 50, 20, 10, 1)
SHAPES = {  # name: ensemble size, batch size, features, targets
    "paper-1": (100, 1, PAPER, {OP: 2.3, PACKED: 4.0}),
    "paper-64": (100, 64, PAPER, {OP: 2.0}),
    "paper-1024": (100, 1024, PAPER, {OP: 2.8}),
    "paper-8192": (100, 8192, PAPER, {OP: 4.0}),
    "deep-200": (5, 1024, (64, 200, 200, 200, 200, 64), {OP: 1.2}),
    "wide-256": (50, 256, (64, 256, 256, 256, 1), {OP: 1.2}),
    "wide-1200": (5, 1024, (784, 1200, 1200, 10), {OP: 1.1}),
    "wide-512": (32, 256, (128, 512, 512, 512, 10), {OP: 1.1}),
}
QUICK = {"tiny": (3, 17, (5, 7, 2), {})}


def cases(options: harness.Options) -> list[harness.Case]:
    """The table of shapes, built when its turn comes."""
    with_targets = (options.device.type, options.dtype, options.threads) == ("cpu", torch.float32, 2)
    made = []
    for name, (ensemble_size, batch_size, features, targets) in (QUICK if options.quick else SHAPES).items():
        made.append(
            harness.Case(
                name=name,
                title=f"E {ensemble_size}, B {batch_size}, {'-'.join(map(str, features))}",
                contestants=lambda shape=(ensemble_size, batch_size, features): contestants(*shape, options),
                flops=mlp_flops(ensemble_size, batch_size, features),
                targets=tuple(harness.Target(*t) for t in targets.items()) if with_targets else (),
            )
        )
    return made


def contestants(
    ensemble_size: int, batch_size: int, features: tuple[int, ...], options: harness.Options
) -> list[harness.Contestant]:
    """pyens in its three forms, the reference, and the peers, on the same numbers."""
    problem = Problem.random(
        ensemble_size, batch_size, features, seed=options.seed, device=options.device, dtype=options.dtype
    )
    expected = problem.expected()
    check = harness.agrees_with(expected, options.dtype)
    x, weights, biases = problem.input, problem.weights, problem.biases

    def module() -> pyens.EnsembleMLP:
        return pyens.EnsembleMLP.from_modules(problem.modules())

    def call(model: torch.nn.Module) -> harness.Run:
        return lambda: model(x)

    return [
        harness.Contestant(OP, lambda: lambda: pyens.ops.ensemble_mlp(x, weights, biases), check, ours=True),
        harness.Contestant(MODULE, lambda: call(module()), check, ours=True),
        harness.Contestant(PACKED, lambda: call(module().packed()), check, ours=True),
        harness.Contestant(
            "reference", lambda: lambda: pyens.reference.ensemble_mlp(x, weights, biases), check
        ),
        *mlp_peers(problem, expected, compile=options.compile),
    ]


if __name__ == "__main__":
    raise SystemExit(harness.main("ensemble_mlp", __doc__, cases))
