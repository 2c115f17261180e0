"""The forward pass of an ensemble of MLPs: the op, `EnsembleMLP` and `packed()` against their peers.

Under torch.inference_mode, one input shared by all members. On the CPU the targets are for float32 on two
threads. On CUDA shapes and targets are others, and all but the module run out of a CUDA graph too; of small
batches a graph holds many calls, and the time of each is held against an empty kernel's.
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

WIDE = (784, 1200, 1200, 10)
CUDA_SHAPES = {  # name: ensemble size, batch size, features
    "paper-1": (100, 1, PAPER),
    "paper-16": (100, 16, PAPER),
    "paper-256": (100, 256, PAPER),
    "paper-65536": (100, 65_536, PAPER),
    "wide-1200": (10, 1024, WIDE),
}
# TF32 makes no difference to what a launch costs.
LARGE = ("paper-65536", "wide-1200")
GRAPH = f"{OP}, graph"
COMPILED = ("baddbmm, compiled", "baddbmm transposed, compiled")
GRAPHED = tuple(f"{name}, graph" for name in ("baddbmm", "baddbmm transposed", *COMPILED))


def cases(options: harness.Options) -> list[harness.Case]:
    """The table of shapes, built when its turn comes."""
    with_targets = (options.device.type, options.dtype, options.threads) == ("cpu", torch.float32, 2)
    on_cuda = options.device.type == "cuda" and not options.quick
    shapes = QUICK if options.quick else SHAPES
    if on_cuda:
        shapes = {
            name: (*shape, {})
            for name, shape in CUDA_SHAPES.items()
            if options.precision == "ieee" or name in LARGE
        }
    made = []
    for name, (ensemble_size, batch_size, features, targets) in shapes.items():
        shape = (ensemble_size, batch_size, features)
        goals = tuple(harness.Target(*t) for t in targets.items()) if with_targets else ()
        made.append(
            harness.Case(
                name=name,
                title=f"E {ensemble_size}, B {batch_size}, {'-'.join(map(str, features))}",
                contestants=lambda shape=shape: contestants(*shape, options),
                flops=mlp_flops(*shape),
                targets=cuda_targets(name, options) if on_cuda else goals,
            )
        )
    return made


def cuda_targets(name: str, options: harness.Options) -> tuple[harness.Target, ...]:
    """What is asked for on an H200."""
    float32, bfloat16 = options.dtype == torch.float32, options.dtype == torch.bfloat16
    if name == "paper-65536" and (float32 or bfloat16):
        times = 3.0 if float32 and options.precision == "ieee" else 5.0
        compiled = harness.Target(OP, times, COMPILED)
        return (compiled, harness.Target(OP, 0.3, **padded_floor(name))) if bfloat16 else (compiled,)
    if name in ("paper-1", "paper-16", "paper-256") and (float32 or bfloat16):
        stacks = harness.Target(GRAPH, 4.0, GRAPHED)
        node = harness.Target(GRAPH, 0.5, (harness.EMPTY_KERNEL,))
        return (stacks, node) if name == "paper-1" else (stacks,)
    if name == "wide-1200" and bfloat16:
        return (harness.Target(OP, 1.0),)
    return ()


def padded_floor(name: str) -> dict[str, float]:
    """Operations of tensor cores on 16-bit numbers, widths rounded up to 16, and bytes read and written."""
    ensemble_size, batch_size, features = CUDA_SHAPES[name]
    padded = [-(-width // 16) * 16 for width in features]
    numbers = batch_size * (features[0] + ensemble_size * features[-1])
    return dict(flops=mlp_flops(ensemble_size, batch_size, padded), bytes=2.0 * numbers)


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

    op = harness.Contestant(OP, lambda: lambda: pyens.ops.ensemble_mlp(x, weights, biases), check, ours=True)
    as_module = harness.Contestant(MODULE, lambda: call(module()), check, ours=True)
    packed = harness.Contestant(PACKED, lambda: call(module().packed()), check, ours=True)
    reference = harness.Contestant(
        "reference", lambda: lambda: pyens.reference.ensemble_mlp(x, weights, biases), check
    )
    peers = mlp_peers(problem, expected, compile=options.compile)
    if options.device.type != "cuda":
        return [op, as_module, packed, reference, *peers]
    calls = 10 if batch_size <= 256 else 1
    return [
        *harness.with_graphs([op], options, calls=calls),
        as_module,  # packed() packs nothing on CUDA
        reference,
        *harness.with_graphs(peers, options, calls=calls),
        *([harness.empty_kernel(calls)] if batch_size <= 256 else []),
    ]


if __name__ == "__main__":
    raise SystemExit(harness.main("ensemble_mlp", __doc__, cases))
