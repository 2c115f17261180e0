"""A factor for each feature of each member: the op against plain PyTorch."""

from __future__ import annotations

import torch

import pyens
from benchmarks import harness

SHAPES = {"tall": (100, 1024, 50), "wide": (8, 1024, 1024)}  # E, B, D
QUICK = {"tiny": (3, 17, 4)}


def cases(options: harness.Options) -> list[harness.Case]:
    return [
        harness.Case(
            name=name,
            title=f"E {e}, B {b}, D {d}",
            contestants=lambda shape=(e, b, d): contestants(*shape, options),
            bytes=2 * e * b * d * options.dtype.itemsize,  # read and written
        )
        for name, (e, b, d) in (QUICK if options.quick else SHAPES).items()
    ]


def contestants(e: int, b: int, d: int, options: harness.Options) -> list[harness.Contestant]:
    generator = torch.Generator().manual_seed(options.seed)
    input, scale = (
        torch.randn(shape, generator=generator).to(options.device, options.dtype)
        for shape in ([e, b, d], [e, d])
    )
    check = harness.agrees_with(pyens.reference.gain(input.double(), scale.double()), options.dtype)
    return [
        harness.Contestant("pyens op", lambda: lambda: pyens.ops.gain(input, scale), check, ours=True),
        harness.Contestant("reference", lambda: lambda: pyens.reference.gain(input, scale), check),
    ]


if __name__ == "__main__":
    raise SystemExit(harness.main("gain", __doc__, cases))
