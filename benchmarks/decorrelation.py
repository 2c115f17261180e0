"""The decorrelation loss of a training step, forward and backward: the op against plain PyTorch.

The targets are for float32 on two CPU threads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import pyens
from benchmarks import harness

OP = "pyens op"

SHAPES = {  # name: components, batch size, labels, target
    "few-2": (2, 1024, 10, 8.0),
    "few-8": (8, 4096, 10, 8.0),
    "many-100": (100, 8192, 1, 2.5),
}
QUICK = {"tiny": (3, 17, 4, None)}


def cases(options: harness.Options) -> list[harness.Case]:
    """The table of shapes, built when its turn comes."""
    with_targets = (options.device.type, options.dtype, options.threads) == ("cpu", torch.float32, 2)
    made = []
    for name, (components, batch, labels, target) in (QUICK if options.quick else SHAPES).items():
        numbers = components * batch * labels
        many = components > 10  # multiply-adds bind, not memory: J/2 forward and J backward for each number
        made.append(
            harness.Case(
                name=name,
                title=f"J {components}, B {batch}, K {labels}",
                contestants=lambda shape=(components, batch, labels): contestants(*shape, options),
                flops=3 * (components - 1) * numbers if many else 0,
                bytes=0 if many else 3 * numbers * options.dtype.itemsize,  # read, read, written
                targets=(harness.Target(OP, target),) if with_targets and target else (),
                grad=True,
            )
        )
    return made


def contestants(
    components: int, batch: int, labels: int, options: harness.Options
) -> list[harness.Contestant]:
    """The op, the reference, and the reference compiled, on the same numbers."""
    generator = torch.Generator().manual_seed(options.seed)
    outputs = torch.randn(components, batch, labels, generator=generator) + 0.5  # with something in common
    outputs = outputs.to(options.device, options.dtype).requires_grad_()
    expected = step(pyens.reference.decorrelation_loss, outputs.detach().double().requires_grad_())()
    check = harness.agrees_with(expected, options.dtype)
    found = [
        harness.Contestant(OP, lambda: step(pyens.ops.decorrelation_loss, outputs), check, ours=True),
        harness.Contestant("reference", lambda: step(pyens.reference.decorrelation_loss, outputs), check),
    ]
    if options.compile:
        found.append(
            harness.Contestant(
                "reference, compiled",
                lambda: step(torch.compile(pyens.reference.decorrelation_loss), outputs),
                check,
            )
        )
    return found


def step(function: Callable[[Tensor], Tensor], outputs: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    def run() -> tuple[Tensor, Tensor]:
        loss = function(outputs)
        return loss.detach(), torch.autograd.grad(loss, outputs)[0]

    return run


if __name__ == "__main__":
    raise SystemExit(harness.main("decorrelation", __doc__, cases))
