"""The process at the other end of `benchmarks.remote.process.Remote`; started by that."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.remote.blocks import Run, measure, on_cores


def main(descriptor: int) -> None:
    """Prepares a call, then runs and times it as asked, until the other end closes."""
    connection = Connection(descriptor)
    nothing: Run = lambda: None  # noqa: E731
    run, stack = nothing, contextlib.ExitStack()
    while True:
        try:
            order, *arguments = connection.recv()
        except EOFError:
            return
        try:
            answer: Any = None
            if order == "prepare":
                program, threads, rest = arguments
                stack.enter_context(on_cores(threads))  # some engines know no other limit of threads
                run = prepare(program, threads, rest)
                arguments = rest = []
            elif order == "forget":
                run = nothing
                stack.close()
            elif order == "run":
                answer = [np.asarray(array) for array in run()]
            elif order == "measure":
                answer = measure(run, *arguments)
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        connection.send(answer)


def prepare(program: str, threads: int, arguments: Sequence[Any]) -> Run:
    """What `program`, "module:function", makes of its arguments."""
    module, _, function = program.partition(":")
    made: Run = getattr(importlib.import_module(module), function)(threads, *arguments)
    return made


if __name__ == "__main__":
    main(int(sys.argv[1]))
