"""Members that keep few of their weights: against their own dense form, and against what else there is.

784-1200-1200-10 of five members and 1024 examples, and the network of benchmarks.ensemble_conv2d, with 75, 90
and 95 % of the weights zero; five such networks at 95 % against one dense one, of any engine. Peers: a loop
over members with torch's CSR matrices (weights times a batch in columns); the dense network in JAX, ONNX
Runtime and OpenVINO. The targets are for float32 on two CPU threads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.engines.peers import convolution_peers, forward_peers
from benchmarks.ensemble_conv2d import Problem as Images
from benchmarks.peers import Problem, mlp_flops
from pyens.nn import EnsembleMLP, EnsembleSequential

SPARSE, DENSE = "pyens sparse()", "pyens, dense"
SMALL, BYTES = "pyens sparse(), all", "pyens quantize(), all"
MLP_TARGETS = {75: 1.8, 90: 5.0, 95: 9.0}
CONVOLUTION_TARGETS = {75: 1.5, 90: None, 95: 4.0}


def cases(options: harness.Options) -> list[harness.Case]:
    if (options.device.type, options.dtype) != ("cpu", torch.float32):
        return []
    shape = (2, 9, (7, 12, 3)) if options.quick else (5, 1024, (784, 1200, 1200, 10))
    images = (2, 3, 12) if options.quick else (5, 256, 28)
    with_targets = options.threads == 2 and not options.quick

    def target(ratio: float | None) -> tuple[harness.Target, ...]:
        return (harness.Target(SPARSE, ratio, (DENSE,)),) if with_targets and ratio else ()

    made = []
    for zeros, ratio in MLP_TARGETS.items():
        made.append(
            harness.Case(
                f"mlp-{zeros}",
                f"E {shape[0]}, B {shape[1]}, {'-'.join(map(str, shape[2]))}, {zeros} % zeros",
                lambda zeros=zeros: mlp_contestants(shape, zeros / 100, options),
                flops=mlp_flops(*shape) * (1 - zeros / 100),
                targets=target(ratio),
            )
        )
    for zeros, ratio in CONVOLUTION_TARGETS.items():
        made.append(
            harness.Case(
                f"convolutions-{zeros}",
                f"E {images[0]}, B {images[1]}, two convolutions and a layer, {zeros} % zeros",
                lambda zeros=zeros: image_contestants(images, zeros / 100, options),
                targets=target(ratio),
            )
        )
    made.append(
        harness.Case(
            "five-for-one",
            f"{images[0]} members, 95 % zeros, against one dense: B {images[1]}, two convolutions, a layer",
            lambda: five_for_one(images, options),
            targets=(harness.Target(SMALL, 1.0),) if with_targets else (),
        )
    )
    return made


def pruned(weight: Tensor, zeros: float) -> Tensor:
    """The smallest weights of each member zero."""
    flat = weight.flatten(1).abs()
    least = flat.kthvalue(max(1, round(flat.shape[1] * zeros)), 1).values
    return weight.where(weight.abs() > least.view(-1, *[1] * (weight.dim() - 1)), 0)


def mlp_contestants(
    shape: tuple[int, int, Sequence[int]], zeros: float, options: harness.Options
) -> list[harness.Contestant]:
    drawn = Problem.random(*shape, seed=options.seed)
    problem = Problem(drawn.input, tuple(pruned(w, zeros) for w in drawn.weights), drawn.biases)
    expected = problem.expected()
    check = harness.agrees_with(expected, options.dtype)
    x = problem.input

    def model() -> EnsembleMLP:
        made = EnsembleMLP.from_parameters(list(problem.weights), list(problem.biases))
        return made.requires_grad_(False).eval()

    def ours(sparse: bool) -> harness.Run:
        frozen = model().sparse() if sparse else model()
        return lambda: frozen(x)

    def csr() -> harness.Run:
        members = range(problem.ensemble_size)
        weights = [[w[m].to_sparse_csr() for w in problem.weights] for m in members]
        biases = [[b[m].unsqueeze(1) for b in problem.biases] for m in members]
        columns = x.T.contiguous()

        def member(m: int) -> Tensor:
            hidden = columns
            for layer, (weight, bias) in enumerate(zip(weights[m], biases[m], strict=True)):
                hidden = torch.addmm(bias, weight, hidden.relu() if layer else hidden)
            return hidden

        return lambda: torch.stack([member(m) for m in members])

    return [
        harness.Contestant(SPARSE, lambda: ours(True), check, ours=True),
        harness.Contestant(DENSE, lambda: ours(False), check, ours=True),
        harness.Contestant(
            "torch CSR", csr, harness.agrees_with(expected, options.dtype, lambda output: output.mT)
        ),
        *forward_peers(problem, expected, options.threads),
    ]


def image_contestants(
    shape: tuple[int, int, int], zeros: float, options: harness.Options
) -> list[harness.Contestant]:
    problem = Images.random(*shape, options)
    with torch.no_grad():
        for member in problem.members:
            for parameter in member.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(pruned(parameter.unsqueeze(0), zeros)[0])
    expected = problem.expected()
    check = harness.agrees_with(expected, options.dtype)
    images = problem.images
    weights, biases = problem.layers()

    def ours(freeze: Callable[[EnsembleSequential], EnsembleSequential]) -> harness.Run:
        frozen = freeze(EnsembleSequential.from_modules(problem.members))
        return lambda: frozen(images)

    return [
        harness.Contestant(SPARSE, lambda: ours(EnsembleSequential.sparse), check, ours=True),
        harness.Contestant(DENSE, lambda: ours(EnsembleSequential.packed), check, ours=True),
        *convolution_peers(images, weights, biases, expected, options.threads),
    ]


def five_for_one(shape: tuple[int, int, int], options: harness.Options) -> list[harness.Contestant]:
    """Each checked against its own network: the ensemble with few weights, the first member with all."""
    problem = Images.random(*shape, options)
    dense = Images(problem.images, problem.target, copy.deepcopy(problem.members[:1]))
    with torch.no_grad():
        for member in problem.members:
            for parameter in member.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(pruned(parameter.unsqueeze(0), 0.95)[0])
    images, expected, of_one = problem.images, problem.expected(), dense.expected()
    model = EnsembleSequential.from_modules(problem.members)
    small, quantized = model.sparse(), model.quantize(images)
    one = EnsembleSequential.from_modules(dense.members).packed()
    (network,) = dense.members

    def in_torch() -> Tensor:
        with torch.inference_mode():
            return network(images).unsqueeze(0)

    check = harness.agrees_with(of_one, options.dtype)
    return [
        harness.Contestant(
            SMALL, lambda: lambda: small(images), harness.agrees_with(expected, options.dtype), ours=True
        ),
        harness.Contestant(
            BYTES,
            lambda: lambda: quantized(images),
            harness.agrees_with(expected, options.dtype, rms=0.1),
            ours=True,
        ),
        harness.Contestant("pyens, one dense", lambda: lambda: one(images), check, ours=True),
        harness.Contestant("torch, one dense", lambda: in_torch, check),
        *convolution_peers(images, *dense.layers(), of_one, options.threads),
    ]


if __name__ == "__main__":
    raise SystemExit(harness.main("sparse", __doc__, cases))
