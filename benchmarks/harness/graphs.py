"""Contestants out of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.harness.cases import Contestant, Options, Run

EMPTY_KERNEL = "empty kernel, graph"


def graphed(run: Run, calls: int = 1) -> Run:
    """Replays `calls` calls of `run`, captured in one CUDA graph, and returns what the last one returned.

    `run` must do the same on the same memory each time, and must not wait for the GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(f"graphed: expected a CUDA device, but torch {torch.__version__} finds none")
    # What is done once, such as compiling or choosing an algorithm, is done before.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph, output = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        for _ in range(calls):
            output = run()

    def replay() -> object:
        graph.replay()
        return output

    return replay


def with_graphs(
    contestants: Sequence[Contestant], options: Options, *, calls: int = 1, grad: bool = False
) -> list[Contestant]:
    """On CUDA each contestant, and the same once more out of a graph of `calls` calls; elsewhere as they are.

    With many calls in a graph, what a replay costs the CPU is shared by so many. `grad` as of the `Case`.
    """
    if options.device.type != "cuda":
        return list(contestants)

    def setup(contestant: Contestant) -> Run:
        run = contestant.setup()
        with torch.inference_mode(not grad):
            return graphed(run, calls)

    return [
        made
        for contestant in contestants
        for made in (
            contestant,
            replace(
                contestant,
                name=f"{contestant.name}, graph",
                setup=partial(setup, contestant),
                calls=calls,
                memory=None,
            ),
        )
    ]


def empty_kernel(calls: int) -> Contestant:
    """A yardstick: a kernel of one thread that does nothing, out of a graph of so many."""

    def setup() -> Run:
        return graphed(lambda: torch.cuda._sleep(0), calls)

    nothing: Callable[[object], None] = lambda _: None  # noqa: E731
    return Contestant(EMPTY_KERNEL, setup, nothing, yardstick=True, calls=calls)
