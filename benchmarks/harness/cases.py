"""What is compared: contestants that do the work of a case, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.remote.blocks import Run


@dataclass(frozen=True)
class Options:
    """What the command line asks for; a script's `cases(options)` builds its cases from it."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    rounds: int
    seed: int
    quick: bool  # a smoke test: one tiny case
    compile: bool  # also the torch.compile'd contestants
    precision: str = "ieee"  # of float32 products on CUDA: ieee, or tf32
    isa: str = ""  # what all contestants are capped to, as far as they can be; empty: nothing


@dataclass(frozen=True)
class Contestant:
    """One way to do the work of a case.

    `setup` prepares everything that a user would prepare once, and returns the call that is timed. `check`
    gets what that call returned and raises if it is wrong. Everyone who is neither `ours` nor a `yardstick`
    is a peer. `calls` says how often one call does the work. `memory` measures the bytes that the work takes
    at its peak: see `peak_memory`. A call that is a `Remote` is timed in its own process. Not `capped` is who
    uses wider vectors than `--isa` allows.
    """

    name: str
    setup: Callable[[], Run]
    check: Callable[[Any], None]
    ours: bool = False
    memory: Callable[[], int | None] | None = None
    yardstick: bool = False  # does other work, and is there to be compared with
    calls: int = 1
    capped: bool = True


@dataclass(frozen=True)
class Target:
    """`ours` should be `ratio` times as fast as the best, in each round, of the peers in `against`.

    With `flops` or `bytes`, as fast as the machine could be: at its peak in so many operations, or in copying
    so many bytes, whichever takes longer. With `seconds`, in so many at most; `ratio` says nothing then.
    """

    ours: str
    ratio: float
    against: tuple[str, ...] = ()  # empty: all peers
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Case:
    """Work of one shape.

    `contestants` is called when the case's turn comes, so that only one case is in memory. `flops` and
    `bytes` count the useful work of one call: GF/s against the arithmetic peak or, where `flops` is 0, GB/s
    against copy bandwidth; calls per second where both are 0. Ours should not take more than `memory_limit`
    bytes, unless that is 0. Before each call every core reads `cold_bytes`, untimed, so that its own caches
    are cold. A block of calls lasts `block_seconds`.
    """

    name: str
    title: str
    contestants: Callable[[], Sequence[Contestant]]
    flops: float = 0.0
    bytes: float = 0.0
    targets: tuple[Target, ...] = ()
    memory_limit: int = 0
    grad: bool = False  # False: under torch.inference_mode
    cold_bytes: int = 0
    block_seconds: float = 0.02


# Largest error allowed, in units of the expected output's root mean square. A wrong result is off by about 1.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def tolerance(dtype: torch.dtype) -> float:
    """`TOLERANCE`; with TF32 allowed, whose products keep as many bits as float16, float32 has float16's."""
    rounded = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return TOLERANCE[torch.float16 if rounded else dtype]


def agrees_with(
    expected: torch.Tensor | Sequence[torch.Tensor],
    dtype: torch.dtype,
    adapt: Callable[[Any], Any] = lambda output: output,
    *,
    rms: float | None = None,
) -> Callable[[Any], None]:
    """A check for `Contestant`: the expected shapes, this dtype, and nearly the expected values.

    `expected` is computed in float64. `adapt` brings a peer's own layout to the expected one, untimed. With
    `rms` the root mean square of the errors may be up to that, and no single error counts.
    """
    references = [expected] if isinstance(expected, torch.Tensor) else list(expected)

    def check(output: Any) -> None:
        output = adapt(output)
        got = [output] if isinstance(output, torch.Tensor) else list(output)
        if len(got) != len(references):
            raise ValueError(f"expected {len(references)} outputs, got {len(got)}")
        for out, want in zip(got, references, strict=True):
            if out.shape != want.shape or out.dtype != dtype:
                raise ValueError(f"expected {dtype} {tuple(want.shape)}, got {out.dtype} {tuple(out.shape)}")
            scale = want.square().mean().sqrt().clamp_min(torch.finfo(want.dtype).tiny)
            if not want.numel():
                continue
            errors = (out.to(want.dtype) - want).abs() / scale
            error = (errors.amax() if rms is None else errors.square().mean().sqrt()).item()
            if not error <= (tolerance(dtype) if rms is None else rms):  # also catches NaN
                kind = "largest" if rms is None else "rms"
                raise ValueError(f"{kind} error is {error:.2g} rms of the expected output")

    return check


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
