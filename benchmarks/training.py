"""Training an ensemble of MLPs: the fused loss and whole steps against their peers.

The first cases compute losses and gradients without an optimizer: `ensemble_mlp_loss`, and `ensemble_mlp`
with a loss in torch behind it. A shared input gets no gradient, inputs per member do. The last case is a step
with Adam on a table of MovieLens' size, and its peak memory; only in float32 and float64, for parameters in
bfloat16 or float16 lose most of such a step to rounding. On the CPU the targets are for float32 on two
threads; and with AVX512-BF16 for --dtype bfloat16, beside which the loss in float32 runs, where all layers
read 64 numbers or more. On CUDA there is one large batch of its own, out of CUDA graphs too, and of the step
what needs no compiling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import pyens
from benchmarks import harness
from benchmarks.table_peers import Table, TableProblem, adam_step, table_peers
from benchmarks.training_peers import (
    Form,
    TrainingProblem,
    backward,
    gradient_peers,
    gradients_agree,
    mse,
    training_flops,
)

FLOAT32 = "pyens loss, float32"
LOSS, AUTOGRAD, TABULAR = "pyens loss", "pyens op, then mse", "pyens TabularEnsemble"

PAPER = (32, 50, 20, 10, 1)
SHAPES = {  # name: ensemble size, batch size, features, inputs per member, target
    "paper-1024": (100, 1024, PAPER, False, 2.5),
    "paper-256": (100, 256, PAPER, False, 2.5),
    "wide-256": (10, 256, (64, 256, 256, 1), False, 1.1),
    "deep-200": (5, 1024, (64, 200, 200, 200, 200, 64), False, 1.35),
    "own-inputs": (100, 1024, PAPER, True, 2.2),
}
CUDA_SHAPES = {"paper-8192": (100, 8192, PAPER, False, 4.0)}  # target against all that is compiled
COMPILED = tuple(
    f"{name}{ending}"
    for name in (
        "baddbmm, compiled",
        "baddbmm, one graph",
        "baddbmm transposed, compiled",
        "baddbmm transposed, one graph",
        "baddbmm joined, compiled",
    )
    for ending in ("", ", graph")
)
QUICK = {"tiny": (3, 17, (5, 7, 2), False, None), "tiny-own": (3, 17, (5, 7, 2), True, None)}

MOVIELENS = Table(100, 1024, ((6040, 8), (3883, 8), (7, 3), (21, 5)), 19, (50, 20, 10), 1)
TINY_TABLE = Table(3, 17, ((11, 2), (5, 3)), 4, (7,), 2)
SPARE_BYTES = 100_000_000  # beyond parameters, gradients and optimizer state


def cases(options: harness.Options) -> list[harness.Case]:
    """The table of shapes, and the step; built when their turn comes."""
    with_targets = (options.device.type, options.dtype, options.threads) == ("cpu", torch.float32, 2)
    on_cuda = options.device.type == "cuda" and not options.quick
    on_cuda_targets = on_cuda and options.dtype == torch.float32
    against = COMPILED if on_cuda else ()
    pairs = multiplies_pairs(options) and not options.quick
    made = []
    shapes = QUICK if options.quick else CUDA_SHAPES if on_cuda else SHAPES
    for name, (e, b, features, own_inputs, target) in shapes.items():
        targets = []
        if target and (with_targets or on_cuda_targets):
            targets.append(harness.Target(LOSS, target, against))
        if pairs and min(features[:-1]) >= 64:
            targets.append(harness.Target(LOSS, 1.4, (FLOAT32,)))
        made.append(
            harness.Case(
                name=name,
                title=f"E {e}, B {b}, {'-'.join(map(str, features))}" + ", own inputs" * own_inputs,
                contestants=lambda shape=(e, b, features, own_inputs): gradient_contestants(*shape, options),
                flops=training_flops(e, b, features, own_inputs),
                targets=tuple(targets),
                grad=True,
            )
        )
    if options.dtype in (torch.float32, torch.float64):
        made.append(step_case(options, with_targets=with_targets and not options.quick))
    return made


def multiplies_pairs(options: harness.Options) -> bool:
    """Whether the CPU has dot products for this dtype."""
    capability = pyens.build_info()["cpu_capability"]
    return (options.device.type, options.dtype, capability) == ("cpu", torch.bfloat16, "avx512_bf16")


def gradient_contestants(
    ensemble_size: int, batch_size: int, features: tuple[int, ...], own_inputs: bool, options: harness.Options
) -> list[harness.Contestant]:
    """pyens both ways, the reference, and the peers, on the same numbers."""
    problem = TrainingProblem.random(
        ensemble_size,
        batch_size,
        features,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
        shared=not own_inputs,
    )
    expected = problem.expected()
    check = gradients_agree(expected, options.dtype)

    def form(
        loss: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor],
        problem: TrainingProblem = problem,
    ) -> Form:
        def losses(leaves: Sequence[Tensor]) -> Tensor:
            weights, biases, input = problem.parts(leaves)
            return loss(input, weights, biases)

        return Form(losses, problem.tensors)

    def fused(op: Callable[..., Tensor], problem: TrainingProblem = problem) -> Form:
        return form(
            lambda input, weights, biases: op(input, problem.target, weights, biases, loss="mse"), problem
        )

    def through_output() -> Form:
        op = pyens.ops.ensemble_mlp
        return form(lambda input, weights, biases: mse(op(input, weights, biases), problem.target))

    found = [
        harness.Contestant(LOSS, lambda: backward(fused(pyens.ops.ensemble_mlp_loss)), check, ours=True),
        harness.Contestant(AUTOGRAD, lambda: backward(through_output()), check, ours=True),
        harness.Contestant("reference", lambda: backward(fused(pyens.reference.ensemble_mlp_loss)), check),
        *gradient_peers(problem, expected, compile=options.compile),
    ]
    if multiplies_pairs(options):
        found.append(
            harness.Contestant(
                FLOAT32,
                lambda: backward(fused(pyens.ops.ensemble_mlp_loss, problem.to(torch.float32))),
                gradients_agree(expected, torch.float32),
                yardstick=True,
            )
        )
    return harness.with_graphs(found, options, grad=True)


def step_case(options: harness.Options, *, with_targets: bool) -> harness.Case:
    """One step with Adam, every member on a batch of its own; what is not compiled tells its memory too."""
    table = TINY_TABLE if options.quick else MOVIELENS
    eager = table_peers(compile=False)
    loops = tuple(name for name in eager if name.startswith("loop"))
    compiled = tuple(name for name in table_peers(compile=True) if name not in eager)
    parameter_bytes = table.parameters * options.dtype.itemsize

    def memory(name: str) -> Callable[[], int | None] | None:
        # A compiler's memory is not the step's; a smoke test need not wait for the peers' processes.
        if options.device.type != "cpu" or name in compiled or (options.quick and name != TABULAR):
            return None
        prepare = partial(prepare_step, name)
        return lambda: harness.peak_memory(
            partial(prepare, TINY_TABLE, options), partial(prepare, table, options), options
        )

    def contestants() -> list[harness.Contestant]:
        problem = TableProblem.random(table, seed=options.seed, device=options.device, dtype=options.dtype)
        check = problem.check()
        return [
            harness.Contestant(
                name, partial(prepared, problem), check, ours=name == TABULAR, memory=memory(name)
            )
            for name, prepared in steps(options).items()
        ]

    return harness.Case(
        name="movielens-step",
        title=f"Adam step, E {table.ensemble_size}, B {table.batch_size}, "
        f"{len(table.categorical)} tables, {'-'.join(map(str, table.features))}",
        contestants=contestants,
        # Adam's own: parameter, gradient and two moments, each read and written once.
        bytes=8 * parameter_bytes,
        targets=(
            (harness.Target(TABULAR, 5.0, loops), harness.Target(TABULAR, 2.5, compiled))
            if with_targets
            else ()
        ),
        memory_limit=4 * parameter_bytes + SPARE_BYTES if with_targets else 0,
        grad=True,
    )


def steps(options: harness.Options) -> dict[str, Callable[[TableProblem], harness.Run]]:
    """What prepares a step of a problem, by the names of the contestants."""
    return {TABULAR: lambda problem: adam_step(tabular_ensemble(problem))} | table_peers(
        compile=options.compile and options.device.type == "cpu"
    )


def prepare_step(name: str, table: Table, options: harness.Options) -> harness.Run:
    """A contestant's step, from nothing: for a process of its own."""
    problem = TableProblem.random(table, seed=options.seed, device=options.device, dtype=options.dtype)
    return steps(options)[name](problem)


def tabular_ensemble(problem: TableProblem) -> Form:
    """`pyens.nn.TabularEnsemble` with the problem's parameters."""
    table, batch = problem.table, problem.batch
    model = pyens.nn.TabularEnsemble(
        table.ensemble_size,
        table.categorical,
        table.numeric_features,
        table.hidden_features,
        table.out_features,
        device=batch.numeric.device,
        dtype=batch.numeric.dtype,
    )
    kinds = ("embeddings.{}.weight", "mlp.weights.{}", "mlp.biases.{}")
    parts = batch.parts(problem.tensors)
    names = [kind.format(i) for kind, part in zip(kinds, parts, strict=True) for i in range(len(part))]
    model.load_state_dict(dict(zip(names, problem.tensors, strict=True)))
    parameters = dict(model.named_parameters())

    def losses(_: Sequence[Tensor]) -> Tensor:
        return model.loss(batch.categorical, batch.numeric, batch.target, loss="mse")

    return Form(losses, [parameters[name] for name in names])


if __name__ == "__main__":
    raise SystemExit(harness.main("training", __doc__, cases))
