"""Blocks of calls, timed: alike in the benchmark's own process and in others."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Run = Callable[[], Any]

COLD_CALLS = 30  # of a block whose calls find cold caches: each reads megabytes first


class Block(NamedTuple):
    """Seconds of one call, the mean over a block of calls."""

    seconds: float
    cpu_seconds: float  # of all threads of the process


def warm_up(calls: int) -> int:
    """How many calls go before."""
    return max(calls // 100, 2) if calls > 1 else 0


def measure(run: Run, calls: int, cold_bytes: int = 0, wait: Callable[[], Any] = lambda: None) -> Block:
    """Times `calls` calls, after a few that wake what sleeps; a single one is long enough to need none.

    With `cold_bytes` each call is timed alone, after every core has read so many bytes, which is not timed;
    the median of the calls counts. `wait` waits for a device.
    """
    for _ in range(warm_up(calls)):
        run()
    wait()
    if cold_bytes:
        return _measure_cold(run, calls, cold_bytes)
    collects = gc.isenabled()
    gc.disable()
    try:
        cpu, start = time.process_time(), time.perf_counter()
        for _ in repeat(None, calls):
            run()
        wait()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    finally:
        if collects:
            gc.enable()
    return Block(seconds / calls, cpu_seconds / calls)


def _measure_cold(run: Run, calls: int, cold_bytes: int) -> Block:
    each, cpu_seconds = [], 0.0
    reader = Reader(cold_bytes)
    try:
        for _ in repeat(None, calls):
            reader()
            cpu, start = time.process_time(), time.perf_counter()
            run()
            each.append(time.perf_counter() - start)
            cpu_seconds += time.process_time() - cpu
    finally:
        reader.close()
    return Block(statistics.median(each), cpu_seconds / calls)


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """All threads of this process, and those that they start, on the last `count` of its cores."""
    tasks = Path("/proc/self/task")
    if not (hasattr(os, "sched_setaffinity") and tasks.exists()):
        yield
        return
    before = os.sched_getaffinity(0)

    def move(cores: set[int]) -> None:
        for task in tasks.iterdir():
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(int(task.name), cores)

    move(set(sorted(before)[-count:]))
    try:
        yield
    finally:
        move(before)


class Reader:
    """Reads so many bytes on every core that this process may use: their own caches hold nothing else then.

    A thread for each core does it: the calling thread stays where it is. When the call returns, those threads
    wait for the next one: each holds the interpreter until it does.
    """

    def __init__(self, count: int):
        self._buffer: np.ndarray | None = np.ones(count // 8)
        self._locks: list[tuple[threading.Lock, threading.Lock]] = []
        for core in sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]:
            start, end = threading.Lock(), threading.Lock()
            start.acquire()
            end.acquire()
            self._locks.append((start, end))
            threading.Thread(target=self._serve, args=(core, start, end), daemon=True).start()

    def __call__(self) -> None:
        for start, _ in self._locks:
            start.release()
        for _, end in self._locks:
            end.acquire()

    def close(self) -> None:
        """Ends the threads."""
        self._buffer = None
        self()

    def _serve(self, core: int | None, start: threading.Lock, end: threading.Lock) -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})  # of this thread alone
        while True:
            start.acquire()
            if (buffer := self._buffer) is not None:
                buffer.sum()
            end.release()
            if buffer is None:
                return
