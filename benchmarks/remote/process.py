"""A contestant's call in a process of its own, so that its threads are nobody else's."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.remote.blocks import Block, warm_up

PATIENCE = 600.0  # seconds for an answer: compilers are slow


class Remote:
    """A call that lives in one process, or in several at once, on the last `threads` cores.

    `program` is "module:function"; `function(threads, *arguments)` prepares, over there, the call that is
    timed: it returns a list of what numpy takes. Tensors in `arguments` arrive as arrays.
    """

    def __init__(
        self,
        program: str,
        *arguments: Any,
        threads: int,
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
    ):
        # What a process has imported and the threads that it has started belong to one engine.
        self._kind = program.partition(":")[0], threads, tuple(sorted((environment or {}).items()))
        self._workers: list[_Worker] = []
        try:
            for _ in range(processes):
                idle = _idle.get(self._kind)
                self._workers.append(idle.pop() if idle else _Worker(environment or {}))
            self._ask("prepare", program, threads, _as_arrays(arguments))
        except BaseException:
            self.close(for_good=True)
            raise

    def __call__(self) -> list[Tensor]:
        """What the call returns; of several processes the first one's, when all are done."""
        return [torch.from_numpy(array) for array in self._ask("run")[0]]

    def measure(self, calls: int, cold_bytes: int = 0) -> Block:
        """Times `calls` calls over there. Several processes run at once: time passed by calls of all."""
        if len(self._workers) == 1:
            return Block(*self._ask("measure", calls, cold_bytes)[0])
        start = time.perf_counter()
        blocks = self._ask("measure", calls, cold_bytes)
        # The slowest ends the block; what each does to wake up, and messages, are within it.
        passed = (time.perf_counter() - start) / (calls + warm_up(calls)) / len(blocks)
        return Block(passed, sum(block.cpu_seconds for block in blocks) / len(blocks))

    def close(self, for_good: bool = False) -> None:
        """Lets the call go. Its processes wait for another one: to start an engine takes seconds."""
        workers, self._workers = self._workers, []
        for worker in workers:
            if not for_good and worker.forgets():
                _idle.setdefault(self._kind, []).append(worker)
            else:
                worker.close()

    def _ask(self, *order: Any) -> list[Any]:
        """One order to every process, and all answers."""
        for worker in self._workers:
            worker.connection.send(order)
        return [worker.answer() for worker in self._workers]


class _Worker:
    def __init__(self, environment: Mapping[str, str]):
        self.connection, theirs = Pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.remote.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=Path(__file__).resolve().parents[2],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
            )

    connection: Connection

    def answer(self) -> Any:
        try:
            if not self.connection.poll(PATIENCE):
                raise TimeoutError(f"no answer within {PATIENCE:.0f} s")
            found = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines() or [""]
            raise RuntimeError(f"the process ended with {self._process.wait()}: {said[-1]}") from error
        if isinstance(found, Exception):
            raise found
        return found

    def forgets(self) -> bool:
        """Whether it has dropped its call and all that came with it, and can take another one."""
        try:
            self.connection.send(("forget",))
            return self.answer() is None
        except (OSError, RuntimeError, TimeoutError):
            return False

    def close(self) -> None:
        self.connection.close()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


_idle: dict[Any, list[_Worker]] = {}


@atexit.register
def end_idle() -> None:
    """Ends the processes that wait."""
    for workers in _idle.values():
        for worker in workers:
            worker.close()
    _idle.clear()


def _as_arrays(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().numpy()
    return type(value)(map(_as_arrays, value)) if isinstance(value, (list, tuple)) else value
