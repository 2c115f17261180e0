"""Serving a prediction and how much an ensemble would vary: one model with an estimator, or the ensemble.

Under torch.inference_mode. `pyens.variation.VariationModel` runs one model and reads the variation off its
hidden units; the peers run all 100 members (and still have to reduce them, which is not counted). The target
is for float32 on two CPU threads.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import torch
from torch import Tensor

import pyens
from benchmarks import harness
from benchmarks.peers import Problem, mlp_peers
from pyens.nn import EnsembleMLP
from pyens.variation import ActivationStatistics, VariationHead, VariationModel
from pyens.variation.head import MAX_DEVIATIONS

OURS, COMPILED, ENSEMBLE = "VariationModel", "VariationModel, compiled", "pyens op, 100 members"

MODEL, ESTIMATOR, MEMBERS = (43, 50, 20, 10, 1), (100, 50), 100
BATCHES = {"serve-1": (1, None), "serve-1024": (1024, 20.0)}  # batch size, target
QUICK = {"tiny": (17, None)}
LIMIT = 10.0  # of the estimated variation


def cases(options: harness.Options) -> list[harness.Case]:
    with_targets = (options.device.type, options.dtype, options.threads) == ("cpu", torch.float32, 2)
    members = 5 if options.quick else MEMBERS
    return [
        harness.Case(
            name=name,
            title=f"B {batch_size}, {'-'.join(map(str, MODEL))}: one model with an estimator, or {members}",
            contestants=partial(contestants, members, batch_size, options),
            targets=(harness.Target(OURS, target),) if with_targets and target else (),
        )
        for name, (batch_size, target) in (QUICK if options.quick else BATCHES).items()
    ]


def contestants(members: int, batch_size: int, options: harness.Options) -> list[harness.Contestant]:
    """Members and estimator are drawn at random: they cost what trained ones do."""
    problem = Problem.random(
        members, batch_size, MODEL, seed=options.seed, device=options.device, dtype=options.dtype
    )
    served = VariationModel(*random_parts(problem, options.seed)).to(options.device)
    expected = problem.expected()
    check = partial(check_served, served, problem.input, expected)

    def ensemble() -> harness.Run:
        return lambda: pyens.ops.ensemble_mlp(problem.input, problem.weights, problem.biases)

    found = [
        harness.Contestant(OURS, lambda: lambda: served(problem.input), check, ours=True),
        harness.Contestant(ENSEMBLE, ensemble, harness.agrees_with(expected, options.dtype), ours=True),
        *mlp_peers(problem, expected, compile=options.compile),
    ]
    if options.compile:
        found.append(
            harness.Contestant(COMPILED, partial(compiled_call, served, problem.input), check, ours=True)
        )
    return found


def random_parts(problem: Problem, seed: int) -> tuple[EnsembleMLP, VariationHead, Tensor, Tensor]:
    """Member 0, an estimator for it, and the statistics of its hidden units."""
    target = EnsembleMLP.from_parameters([w[:1] for w in problem.weights], [b[:1] for b in problem.biases])
    generator = torch.Generator().manual_seed(seed + 1)
    statistics = ActivationStatistics()
    statistics.observe(target, torch.randn(4096, MODEL[0], generator=generator).to(problem.input))
    params = {"task": "regression", "features": "both"}
    mlp = EnsembleMLP(1, 2 * sum(MODEL[1:-1]), ESTIMATOR, 1, seeds=[seed])
    mlp.biases[-1].data.add_(1.0)  # so that not all is clipped
    limit, thresholds = torch.tensor(LIMIT), torch.zeros(4, dtype=torch.float64)
    return target, VariationHead(mlp, params, limit, thresholds), *statistics.compute()


def compiled_call(served: VariationModel, x: Tensor) -> harness.Run:
    compiled = torch.compile(served, fullgraph=True, dynamic=False)
    return lambda: compiled(x)


def check_served(served: VariationModel, x: Tensor, expected: Tensor, got: tuple[Tensor, Tensor]) -> None:
    """Member 0's output, and the estimate of the plain MLP on the strength that the reference gives."""
    weights, biases = ([t.double() for t in tensors] for tensors in served.target.stacked())
    strength = pyens.reference.activation_strength(
        x.double(), weights, biases, served.mean.double(), served.std.double()
    )
    mlp = deepcopy(served.head.mlp).double().member(0)
    value = strength.value[0].clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)
    features = torch.cat([value, strength.active[0].double()], 1)
    estimate = mlp(features)[:, 0].clamp(0, LIMIT)
    harness.agrees_with(expected[0], x.dtype)(got[0])
    harness.agrees_with(estimate, torch.float32)(got[1])


if __name__ == "__main__":
    raise SystemExit(harness.main("serving", __doc__, cases))
