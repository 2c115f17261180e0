"""What the tests of `benchmarks.remote` run in processes of their own."""

import os
import time
from collections.abc import Callable, Sequence

import numpy as np


def double(threads: int, array: np.ndarray, rest: Sequence[np.ndarray]) -> Callable:
    """Twice the array, the sum of the others, and the cores that it may use."""
    return lambda: [2 * array, sum(rest), np.array(sorted(os.sched_getaffinity(0)))]


def sleep(threads: int, seconds: float) -> Callable:
    """Waits and works, half of the time each."""

    def run() -> list[np.ndarray]:
        time.sleep(seconds / 2)
        end = time.process_time() + seconds / 2
        while time.process_time() < end:
            pass
        return [np.zeros(1)]

    return run


def fail(threads: int) -> Callable:
    raise ValueError("nothing to prepare")


def die(threads: int) -> Callable:
    os._exit(3)


def process(threads: int) -> Callable:
    return lambda: [np.array(os.getpid())]
