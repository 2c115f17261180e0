"""The benchmark harness: contestants, interleaved rounds, tables, JSON and pictures.

A benchmark script says what is compared, as a list of `Case`s, and hands them to `main`:

    def cases(options: harness.Options) -> list[harness.Case]: ...

    if __name__ == "__main__":
        raise SystemExit(harness.main("ensemble_mlp", __doc__, cases))

How it measures. All contestants of a case live in one process and take turns: in every round each of them
runs one block of calls, in a new random order, so that a slow spell of the machine hits all of them alike.
Ratios are formed within a round, and the median over rounds is reported. A contestant whose output is wrong
is not timed: it is excluded, and says so wherever results are shown.
"""

from __future__ import annotations

from benchmarks.harness.cases import TOLERANCE, Case, Contestant, Options, Run, Target, agrees_with
from benchmarks.harness.command import main, select
from benchmarks.harness.graphs import EMPTY_KERNEL, empty_kernel, graphed, with_graphs
from benchmarks.harness.measuring import machine_info, measure_peaks, peak_memory, run_interleaved
from benchmarks.harness.pictures import plot
from benchmarks.harness.results import RESULTS, Peaks, Report, Result, Timing, write
from benchmarks.harness.tables import losses, markdown, table, unsteady, verdict, verdicts, versions
from benchmarks.remote.process import Remote

__all__ = [
    "EMPTY_KERNEL",
    "RESULTS",
    "TOLERANCE",
    "Case",
    "Contestant",
    "Options",
    "Peaks",
    "Remote",
    "Report",
    "Result",
    "Run",
    "Target",
    "Timing",
    "agrees_with",
    "empty_kernel",
    "graphed",
    "losses",
    "machine_info",
    "main",
    "markdown",
    "measure_peaks",
    "peak_memory",
    "plot",
    "run_interleaved",
    "select",
    "table",
    "unsteady",
    "verdict",
    "verdicts",
    "versions",
    "with_graphs",
    "write",
]
