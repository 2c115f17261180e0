"""Predictive uncertainty and moments over the members: the ops against plain PyTorch.

Under torch.inference_mode. The targets are for float32 on two CPU threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import pyens
from benchmarks import harness

OP, SEPARATE = "pyens op", "mean, std, amin, amax"

UNCERTAINTY = {  # name: ensemble size, batch size, classes, target
    "classes-10": (100, 8192, 10, 5.0),
    "classes-1000": (32, 1024, 1000, 4.0),
}
MOMENTS = {"moments": (100, 65_536, 10.0)}  # name: ensemble size, batch size, target against SEPARATE
QUICK_UNCERTAINTY = {"tiny": (3, 17, 4, None)}
QUICK_MOMENTS = {"tiny-moments": (3, 70, None)}


def cases(options: harness.Options) -> list[harness.Case]:
    """The tables of shapes, built when their turn comes."""
    with_targets = (options.device.type, options.dtype, options.threads) == ("cpu", torch.float32, 2)

    def case(
        name: str,
        title: str,
        numbers: int,
        target: float | None,
        contestants: Callable[[], Sequence[harness.Contestant]],
        against: tuple[str, ...] = (),
    ) -> harness.Case:
        targets = (harness.Target(OP, target, against),) if with_targets and target else ()
        bytes_read = numbers * options.dtype.itemsize
        return harness.Case(name, title, contestants, bytes=bytes_read, targets=targets)

    made = []
    for name, (e, b, k, target) in (QUICK_UNCERTAINTY if options.quick else UNCERTAINTY).items():
        found = partial(uncertainty, (e, b, k), options)
        made.append(case(name, f"E {e}, B {b}, K {k}", e * b * k, target, found))
    for name, (e, b, target) in (QUICK_MOMENTS if options.quick else MOMENTS).items():
        found = partial(moments, (e, b), options)
        made.append(case(name, f"moments, E {e}, B {b}", e * b, target, found, (SEPARATE,)))
    return made


def uncertainty(shape: tuple[int, ...], options: harness.Options) -> list[harness.Contestant]:
    """All measures of the same logits."""
    logits = draw(shape, options)
    expected = pyens.reference.predictive_uncertainty(logits.double())

    def single(logits: Tensor) -> tuple[Tensor, ...]:
        # As people write it, in the logits' own precision, which loses what nearly equal members disagree on.
        p = logits.softmax(-1)
        mean = p.mean(0)
        tiny = torch.finfo(p.dtype).tiny
        total, members = (-(q * q.clamp_min(tiny).log()).sum(-1) for q in (mean, p))
        of_members = members.mean(0)
        information = (total - of_members).clamp_min(0)
        winners = logits.argmax(-1).mode(0)
        most = (logits.argmax(-1) == winners.values).sum(0) / len(logits)
        return mean, total, of_members, information, len(logits) * information, 1 - most

    peers = {"reference": pyens.reference.predictive_uncertainty, "without float64": single}
    return contestants(pyens.ops.predictive_uncertainty, peers, logits, expected, options)


def moments(shape: tuple[int, ...], options: harness.Options) -> list[harness.Contestant]:
    """Mean, std, minimum and maximum of the same outputs."""
    outputs = draw(shape, options)
    expected = pyens.reference.predictive_moments(outputs.double())[:4]

    def two_passes(outputs: Tensor) -> tuple[Tensor, ...]:
        std, mean = torch.std_mean(outputs, 0)
        return mean, std, *torch.aminmax(outputs, dim=0)

    def four_passes(outputs: Tensor) -> tuple[Tensor, ...]:
        return outputs.mean(0), outputs.std(0), outputs.amin(0), outputs.amax(0)

    peers = {
        "reference": lambda outputs: pyens.reference.predictive_moments(outputs)[:4],
        "std_mean, aminmax": two_passes,
        SEPARATE: four_passes,
    }
    return contestants(
        lambda outputs: pyens.ops.predictive_moments(outputs)[:4], peers, outputs, expected, options
    )


def contestants(
    op: Callable[[Tensor], tuple[Tensor, ...]],
    peers: dict[str, Callable[[Tensor], tuple[Tensor, ...]]],
    members: Tensor,
    expected: tuple[Tensor, ...],
    options: harness.Options,
) -> list[harness.Contestant]:
    """The op, and each peer as it is and compiled."""
    check = harness.agrees_with(expected, options.dtype)

    def call(function: Callable[[Tensor], tuple[Tensor, ...]]) -> harness.Run:
        return lambda: function(members)

    found = [harness.Contestant(OP, lambda: call(op), check, ours=True)]
    for name, peer in peers.items():
        found.append(harness.Contestant(name, lambda peer=peer: call(peer), check))
        if options.compile:
            found.append(
                harness.Contestant(f"{name}, compiled", lambda peer=peer: call(torch.compile(peer)), check)
            )
    return found


def draw(shape: tuple[int, ...], options: harness.Options) -> Tensor:
    """Members that agree somewhat."""
    generator = torch.Generator().manual_seed(options.seed)
    own, common = torch.randn(shape, generator=generator), torch.randn(shape[1:], generator=generator)
    return (2 * (own + common)).to(options.device, options.dtype)


if __name__ == "__main__":
    raise SystemExit(harness.main("uncertainty", __doc__, cases))
