"""Forward pass and training on the CPU against every engine: torch's ways, JAX, ONNX Runtime, OpenVINO.

    python -m benchmarks.every_engine --threads 1
    python -m benchmarks.every_engine --threads 1 --isa avx2    # on a processor that has more

Float32, E 100 and 32-50-20-10-1 unless the row says something else. Engines with threads of their own run in
processes of their own. In the rows named `cold` every core reads 16 MB before each call, untimed. Targets are
those of the instruction set in use: on AVX2 some are lower. Compilers here are XLA and OpenVINO:
torch.compile is a peer of benchmarks.ensemble_mlp and benchmarks.training, and would take half an hour more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pyens
from benchmarks import ensemble_mlp, fit, harness, training
from benchmarks.engines.peers import adam_peers, forward_peers, gradient_peers
from benchmarks.ensemble_mlp import OP, PACKED
from benchmarks.peers import Problem, mlp_flops
from benchmarks.table_peers import EPS, LEARNING_RATE, adam_step
from benchmarks.training import LOSS
from benchmarks.training_peers import (
    GRADIENT_TOLERANCE,
    Form,
    TrainingProblem,
    baddbmm,
    baddbmm_transposed,
    training_flops,
)

STEP_IN_PASS = "pyens Adam in the pass"
STEP, STEP_TORCH = "pyens loss, pyens fused Adam", "pyens loss, torch's fused Adam"

Shape = tuple[int, int, tuple[int, ...]]  # ensemble size, batch size, features
PAPER = (32, 50, 20, 10, 1)
CLASSIFIER = (784, 256, 256, 10)
FORWARD: dict[str, Shape] = {
    "forward-1": (100, 1, PAPER),
    "forward-4": (100, 4, PAPER),
    "forward-16": (100, 16, PAPER),
    "forward-64": (100, 64, PAPER),
    "forward-1024": (100, 1024, PAPER),
    "forward-8192": (100, 8192, PAPER),
    "forward-wide-512": (8, 1024, (128, 512, 512, 512, 10)),
    "forward-wide-1200": (2, 1024, (784, 1200, 1200, 10)),
    "forward-single": (1, 256, CLASSIFIER),
}
TRAINING: dict[str, Shape] = {
    "training-1": (100, 1, PAPER),
    "training-4": (100, 4, PAPER),
    "training-16": (100, 16, PAPER),
    "training-64": (100, 64, PAPER),
    "training-256": (100, 256, PAPER),
    "training-1024": (100, 1024, PAPER),
    "training-wide-256": (10, 256, (64, 256, 256, 1)),
    "training-wide-512": (10, 256, (128, 512, 512, 512, 10)),
    "training-wide-1200": (2, 256, (784, 1200, 1200, 10)),
    "training-single": (1, 256, CLASSIFIER),
}
STEPS: dict[str, Shape] = {
    "adam-step-4": (100, 4, PAPER),
    "adam-step-16": (100, 16, PAPER),
    "adam-step-64": (100, 64, PAPER),
    "adam-step-256": (100, 256, PAPER),
    "adam-step-wide-256": (10, 256, (64, 256, 256, 1)),
    "adam-step-single": (1, 256, CLASSIFIER),
}
COLD_BYTES = 16 << 20
COLD = (
    *(f"forward-{b}" for b in (1, 4, 16, 64, 1024, "single")),
    *(f"training-{b}" for b in (1, 4, 16, 64, 256, "single")),
)
QUICK = (3, 17, (5, 7, 2))
SMALL_TABLES = [(10, 50, 8)] * 10


def cases(options: harness.Options) -> list[harness.Case]:
    """The rows, built when their turn comes; none elsewhere than on the CPU and in float32."""
    if (options.device.type, options.dtype) != ("cpu", torch.float32):
        return []
    forwards, trainings, cold = FORWARD, TRAINING, COLD
    if options.quick:
        forwards, trainings, cold = {"forward": QUICK}, {"training": QUICK}, ("forward", "training")
    made = []
    for name, shape in (forwards | trainings).items():
        grad = name.startswith("training")
        what = f"{'training' if grad else 'forward'}, {title(shape)}"
        for cold_bytes in (0, COLD_BYTES) if name in cold else (0,):
            full_name = f"cold-{name}" if cold_bytes else name
            made.append(
                harness.Case(
                    name=full_name,
                    title=f"{'cold, ' if cold_bytes else ''}{what}",
                    contestants=partial(
                        gradient_contestants if grad else forward_contestants, shape, options
                    ),
                    flops=training_flops(*shape, False) if grad else mlp_flops(*shape),
                    targets=() if options.quick else targets(full_name, shape, options.threads),
                    grad=grad,
                    cold_bytes=cold_bytes,
                )
            )
    judged = isa() and not options.quick
    for name, shape in ({"adam-step": QUICK} if options.quick else STEPS).items():
        least = 1.1 if name == "adam-step-256" else 1.0
        made.append(
            harness.Case(
                name=name,
                title=f"Adam step, {title(shape)}",
                contestants=partial(step_contestants, shape, options),
                flops=training_flops(*shape, False),
                targets=(harness.Target(STEP_IN_PASS, least, (STEP_TORCH,)),) if judged else (),
                grad=True,
            )
        )
    tables = SMALL_TABLES[:1] if options.quick else SMALL_TABLES
    made.append(
        harness.Case(
            name="adam-tables",
            title=f"Adam alone, {fit.described(tables)}",
            contestants=partial(fit.optimizers, torch.optim.Adam, {}, tables, options),
            bytes=7.0 * sum(torch.Size(table).numel() for table in tables) * options.dtype.itemsize,
            targets=(harness.Target(fit.FUSED, 1.0, (fit.TORCH,)),) if judged else (),
            grad=True,
        )
    )
    return made


def title(shape: Shape) -> str:
    ensemble_size, batch_size, features = shape
    return f"E {ensemble_size}, B {batch_size}, {'-'.join(map(str, features))}"


def isa() -> str:
    """The instruction set that targets are for: avx2, avx512, or none of these."""
    capability = str(pyens.build_info()["cpu_capability"])
    return next((known for known in ("avx2", "avx512") if capability.startswith(known)), "")


def targets(name: str, shape: Shape, threads: int) -> tuple[harness.Target, ...]:
    """What is asked for, on one thread and on two."""
    ratios: dict[str, float] = {}
    share, seconds = 0.0, 0.0
    kind, _, size = name.partition("-")
    if not isa():
        return ()
    if name == "cold-forward-1":
        ratios = {OP: 1.2, PACKED: 1.7}
    elif kind == "forward" and size == "1":
        ratios = {OP: 1.2, PACKED: 1.8}
    elif kind == "forward" and size in ("4", "16", "64"):
        ratios = {OP: 1.3}
    elif kind == "forward" and size in ("1024", "8192"):
        ratios, share = {OP: 1.5}, 0.85
    elif kind == "forward" and "wide" in size:
        ratios, share = {OP: 1.1}, 0.85
    elif kind == "forward" and size == "single":
        ratios = {OP: 1.1}
    elif kind == "training" and size in ("1", "4", "16", "64"):
        ratios = {} if size == "1" else {LOSS: 1.3}
        if (isa(), threads) == ("avx2", 1):
            seconds = {"1": 200e-6, "4": 200e-6, "16": 350e-6, "64": 0.0}[size]
    elif kind == "training" and size in ("256", "1024"):
        ratios, share = {LOSS: 2.0}, 0.8
    elif kind == "training" and "wide" in size:
        ratios, share = {LOSS: 1.0 if isa() == "avx2" else 1.2}, 0.8
    elif kind == "training" and size == "single":
        ratios = {LOSS: 1.1}
    ours = LOSS if kind == "training" else OP
    work = training_flops(*shape, False) if kind == "training" else mlp_flops(*shape)
    found = [harness.Target(name, ratio) for name, ratio in ratios.items()]
    found += [harness.Target(ours, share, flops=work)] if share else []
    found += [harness.Target(ours, 1.0, seconds=seconds)] if seconds else []
    return tuple(found)


def forward_contestants(shape: Shape, options: harness.Options) -> list[harness.Contestant]:
    """Those of `benchmarks.ensemble_mlp`, and the engines, on the same numbers."""
    problem = Problem.random(*shape, seed=options.seed)
    return [
        *ensemble_mlp.contestants(*shape, options),
        *forward_peers(problem, problem.expected(), options.threads),
    ]


def gradient_contestants(shape: Shape, options: harness.Options) -> list[harness.Contestant]:
    """Those of `benchmarks.training`, and JAX, on the same numbers."""
    problem = TrainingProblem.random(*shape, seed=options.seed)
    return [
        *training.gradient_contestants(*shape, False, options),
        *gradient_peers(problem, problem.expected(), options.threads),
    ]


def step_contestants(shape: Shape, options: harness.Options) -> list[harness.Contestant]:
    """Whole steps: loss, gradients and Adam. Ours with torch's Adam is what ours in the pass must beat."""
    problem = TrainingProblem.random(*shape, seed=options.seed)
    check = step_check(problem)

    def fused_loss() -> Form:
        def losses(leaves: Sequence[Tensor]) -> Tensor:
            weights, biases, input = problem.parts(leaves)
            return pyens.ops.ensemble_mlp_loss(input, problem.target, weights, biases, loss="mse")

        return own_leaves(Form(losses, problem.tensors))

    def own_leaves(form: Form) -> Form:
        return Form(form.losses, [leaf.clone() for leaf in form.leaves], form.stacked)

    def step_of(form: Callable[[], Form], **how: Any) -> Callable[[], harness.Run]:
        def setup() -> harness.Run:
            run = adam_step(form(), **how)

            def step() -> tuple[Tensor, Callable[[], Sequence[Tensor]]]:
                losses, state = run()
                return losses, lambda: state()[1]

            return step

        return setup

    def in_pass() -> harness.Run:
        weights, biases, input = problem.parts(problem.tensors)
        model = pyens.EnsembleMLP.from_stacked(weights, biases, "out_in")
        optimizer = pyens.optim.in_pass(torch.optim.Adam, model.parameters(), lr=LEARNING_RATE, eps=EPS)
        parameters = [*model.weights, *model.biases]

        def step() -> tuple[Tensor, Callable[[], Sequence[Tensor]]]:
            losses = optimizer.step_in_pass(model, input, problem.target, loss="mse")
            return losses, lambda: [parameter.detach() for parameter in parameters]

        return step

    ours = partial(pyens.optim.fused, torch.optim.Adam, lr=LEARNING_RATE, eps=EPS)
    peers: dict[str, Callable[[], harness.Run]] = {}
    for name, form in (("baddbmm", baddbmm), ("baddbmm transposed", baddbmm_transposed)):
        made = partial(lambda form: own_leaves(form(problem)), form)
        peers[name] = step_of(made)
    return [
        harness.Contestant(STEP_IN_PASS, in_pass, check, ours=True),
        harness.Contestant(STEP, step_of(fused_loss, make=ours), check, ours=True),
        harness.Contestant(STEP_TORCH, step_of(fused_loss), check, yardstick=True),
        *(harness.Contestant(name, setup, check) for name, setup in peers.items()),
        *adam_peers(problem, lambda found: check((found[0], lambda: found[1:])), options.threads),
    ]


def step_check(problem: TrainingProblem) -> Callable[[Any], None]:
    """For the first step: its losses, and how far it moved the parameters, in float64."""
    losses, gradients = problem.expected()
    # Both moments of the first step are unbiased to the gradient and to its square.
    updates = [-LEARNING_RATE * gradient / (gradient.abs() + EPS) for gradient in gradients]
    dtype = problem.target.dtype

    def moved(stepped: Any) -> list[Tensor]:
        return [after - before for after, before in zip(stepped[1](), problem.tensors, strict=True)]

    losses_agree = harness.agrees_with(losses, dtype, lambda stepped: stepped[0].detach())
    updates_agree = harness.agrees_with(updates, dtype, moved, rms=GRADIENT_TOLERANCE[dtype])

    def check(stepped: Any) -> None:
        losses_agree(stepped)
        updates_agree(stepped)

    return check


if __name__ == "__main__":
    raise SystemExit(harness.main("every_engine", __doc__, cases, by_threads=True, compiles=False))
