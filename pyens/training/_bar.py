"""What is seen of a run while it goes on."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal

from pyens.training._checks import warn


def bar(progress: bool | Literal["bar", "lines"], epochs: int, steps: int) -> AbstractContextManager[Any]:
    """Something to `update()` after each step and to tell the summary of each `epoch`."""
    if progress == "lines":
        return nullcontext(_Lines())
    if progress:
        try:
            from tqdm import tqdm

            return _Bar(tqdm(total=max(0, epochs) * steps, unit="step"))
        except ImportError:
            _say_once("fit: no bar of its progress without tqdm: pip install tqdm, or progress=False")
    return nullcontext(_Nothing())


@cache
def _say_once(message: str) -> None:
    warn(message)


class _Nothing:
    def update(self) -> None:
        pass

    def epoch(self, epoch: int, summary: str) -> None:
        pass


class _Lines(_Nothing):
    """A line an epoch on the error output, for the log of a batch job."""

    def epoch(self, epoch: int, summary: str) -> None:
        print(f"epoch {epoch + 1}: {summary}", file=sys.stderr, flush=True)


class _Bar:
    def __init__(self, shown: Any) -> None:
        self.shown, self.update = shown, shown.update

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.shown.close()

    def epoch(self, epoch: int, summary: str) -> None:
        self.shown.set_postfix_str(summary)
