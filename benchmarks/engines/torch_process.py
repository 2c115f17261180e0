"""Ours, and torch's own ways, in a process of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks.ensemble_mlp import contestants
from benchmarks.harness import Contestant, Options
from benchmarks.training import gradient_contestants


def forward(threads: int, name: str, shape: tuple, seed: int) -> Callable:
    """The contestant `name` of `benchmarks.ensemble_mlp`, on a random problem of this seed."""
    run = _prepared(contestants(*shape, _options(threads, seed)), name)

    def call() -> Sequence[np.ndarray]:
        with torch.inference_mode():
            return [run()]

    return call


def gradients(threads: int, name: str, shape: tuple, seed: int) -> Callable:
    """The contestant `name` of `benchmarks.training`: losses and gradients."""
    run = _prepared(gradient_contestants(*shape, False, _options(threads, seed)), name)
    return lambda: _Trained(*run())


class _Trained(Sequence):
    """Losses, and gradients where they are asked for."""

    def __init__(self, losses: torch.Tensor, gradients: Callable[[], Sequence[torch.Tensor]]):
        self._losses, self._gradients = losses, gradients

    def __len__(self) -> int:
        return 1 + len(self._gradients())

    def __getitem__(self, index: int) -> torch.Tensor:
        return [self._losses.detach(), *self._gradients()][index]


def _prepared(found: Sequence[Contestant], name: str) -> Callable:
    (contestant,) = [contestant for contestant in found if contestant.name == name]
    return contestant.setup()


def _options(threads: int, seed: int) -> Options:
    torch.set_num_threads(threads)
    return Options(
        torch.device("cpu"), torch.float32, threads, rounds=1, seed=seed, quick=False, compile=False
    )
