"""Several processes at once on the same cores: what small calls cost when nobody has the machine alone.

N processes, each with `--threads` threads, share as many cores. Every one makes the same calls, and the time
of a call is the time that passes over the calls of all. Where nothing is lost it stays what it is for N = 1;
threads that spin while they wait take time from the others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import harness
from benchmarks.engines.peers import forward_peers, gradient_peers
from benchmarks.ensemble_mlp import OP, PACKED
from benchmarks.peers import Problem, mlp_flops
from benchmarks.training import LOSS
from benchmarks.training_peers import TrainingProblem, gradients_agree, training_flops

Shape = tuple[int, int, tuple[int, ...]]  # ensemble size, batch size, features
PAPER = (32, 50, 20, 10, 1)
SHAPES: dict[str, Shape] = {
    "forward-16": (100, 16, PAPER),
    "forward-256": (100, 256, PAPER),
    "training-64": (100, 64, PAPER),
}
QUICK: dict[str, Shape] = {"forward": (3, 17, (5, 7, 2)), "training": (3, 17, (5, 7, 2))}
PROCESSES = (1, 2, 4)
ENGINES = ("transposed", "gemm")  # the forms that are best at these sizes


def cases(options: harness.Options) -> list[harness.Case]:
    """Every shape with every number of processes; none elsewhere than on the CPU and in float32."""
    if (options.device.type, options.dtype) != ("cpu", torch.float32):
        return []
    return [
        harness.Case(
            name=f"{name}-processes-{processes}",
            title=f"{processes} × {name.partition('-')[0]}, E {e}, B {b}, {'-'.join(map(str, features))}",
            contestants=partial(contestants, name, (e, b, features), processes, options),
            flops=(
                mlp_flops(e, b, features)
                if name.startswith("forward")
                else training_flops(e, b, features, False)
            ),
            block_seconds=0.02 if options.quick else 0.2,
        )
        for name, (e, b, features) in (QUICK if options.quick else SHAPES).items()
        for processes in ((2,) if options.quick else PROCESSES)
    ]


def contestants(
    name: str, shape: Shape, processes: int, options: harness.Options
) -> list[harness.Contestant]:
    """All in processes of their own, ours too."""
    if name.startswith("forward"):
        function, ours, torchs = "forward", (OP, PACKED), ("baddbmm", "baddbmm transposed")
        problem = Problem.random(*shape, seed=options.seed)
        expected = problem.expected()
        agree = harness.agrees_with(expected, options.dtype)
        transposed = harness.agrees_with(expected, options.dtype, lambda found: found[0].mT)
        engines = forward_peers(problem, expected, options.threads, processes=processes)
    else:
        function, ours, torchs = "gradients", (LOSS,), ("baddbmm", "baddbmm transposed")
        training = TrainingProblem.random(*shape, seed=options.seed)
        answer = training.expected()
        trained = gradients_agree(answer, options.dtype)
        agree = transposed = lambda found: trained((found[0], lambda: found[1:]))
        engines = gradient_peers(training, answer, options.threads, processes=processes)

    def contestant(name: str, check: Callable[[Any], None], **kind: bool) -> harness.Contestant:
        program = f"benchmarks.engines.torch_process:{function}"
        setup = partial(
            harness.Remote,
            program,
            name,
            shape,
            options.seed,
            threads=options.threads,
            processes=processes,
        )
        return harness.Contestant(name, setup, check, **kind)

    return [
        *(contestant(name, agree, ours=True) for name in ours),
        *(contestant(name, transposed if "transposed" in name else agree) for name in torchs),
        *(engine for engine in engines if engine.name.endswith(ENGINES)),
    ]


if __name__ == "__main__":
    raise SystemExit(harness.main("contention", __doc__, cases, by_threads=True))
