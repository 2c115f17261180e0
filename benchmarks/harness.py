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

import argparse
import gc
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

Run = Callable[[], Any]


# --- what is compared ------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Contestant:
    """One way to do the work of a case.

    `setup` prepares everything that a user would prepare once, and returns the call that is timed. `check`
    gets what that call returned and raises if it is wrong. Everyone who is not `ours` is a peer. `memory`
    measures the bytes that the work takes at its peak: see `peak_memory`.
    """

    name: str
    setup: Callable[[], Run]
    check: Callable[[Any], None]
    ours: bool = False
    memory: Callable[[], int | None] | None = None


@dataclass(frozen=True)
class Target:
    """`ours` should be `ratio` times as fast as the best, in each round, of the peers in `against`."""

    ours: str
    ratio: float
    against: tuple[str, ...] = ()  # empty: all peers


@dataclass(frozen=True)
class Case:
    """Work of one shape.

    `contestants` is called when the case's turn comes, so that only one case is in memory. `flops` and
    `bytes` count the useful work of one call: GF/s against the arithmetic peak or, where `flops` is 0, GB/s
    against copy bandwidth; calls per second where both are 0. Ours should not take more than `memory_limit`
    bytes, unless that is 0.
    """

    name: str
    title: str
    contestants: Callable[[], Sequence[Contestant]]
    flops: float = 0.0
    bytes: float = 0.0
    targets: tuple[Target, ...] = ()
    memory_limit: int = 0
    grad: bool = False  # False: under torch.inference_mode


# Largest error allowed, in units of the expected output's root mean square. A wrong result is off by about 1.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


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
    wanted = [expected] if isinstance(expected, torch.Tensor) else list(expected)

    def check(output: Any) -> None:
        output = adapt(output)
        got = [output] if isinstance(output, torch.Tensor) else list(output)
        if len(got) != len(wanted):
            raise ValueError(f"expected {len(wanted)} outputs, got {len(got)}")
        for out, want in zip(got, wanted, strict=True):
            if out.shape != want.shape or out.dtype != dtype:
                raise ValueError(f"expected {dtype} {tuple(want.shape)}, got {out.dtype} {tuple(out.shape)}")
            scale = want.square().mean().sqrt().clamp_min(torch.finfo(want.dtype).tiny)
            if not want.numel():
                continue
            errors = (out.to(want.dtype) - want).abs() / scale
            error = (errors.amax() if rms is None else errors.square().mean().sqrt()).item()
            if not error <= (TOLERANCE[dtype] if rms is None else rms):  # also catches NaN
                kind = "largest" if rms is None else "rms"
                raise ValueError(f"{kind} error is {error:.2g} rms of the expected output")

    return check


# --- what was measured -----------------------------------------------------------------------------------


@dataclass
class Timing:
    """Seconds per call of one contestant, one entry per round; or the reason why it was excluded."""

    name: str
    ours: bool
    seconds: list[float] = field(default_factory=list)
    excluded: str | None = None
    memory: int | None = None  # bytes

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) == 1:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


@dataclass
class Result:
    """All timings of one case."""

    name: str
    title: str
    flops: float
    bytes: float
    targets: list[Target]
    timings: list[Timing]
    memory_limit: int = 0

    def timed(self, *, ours: bool | None = None) -> list[Timing]:
        return [t for t in self.timings if not t.excluded and ours in (None, t.ours)]

    def best_peer(self) -> Timing | None:
        return min(self.timed(ours=False), key=lambda t: t.median, default=None)

    def speedup(self, name: str, against: Sequence[str] = ()) -> float | None:
        """Median over rounds of (best peer's time / this one's time); None if there is nothing to compare."""
        mine = next((t for t in self.timed() if t.name == name), None)
        peers = [t for t in self.timed(ours=False) if not against or t.name in against]
        if mine is None or not peers:
            return None
        best = [min(round_) for round_ in zip(*(t.seconds for t in peers), strict=True)]
        return statistics.median(b / m for b, m in zip(best, mine.seconds, strict=True))

    def rate(self, seconds: float) -> tuple[float, str]:
        """Useful work per second, and its unit."""
        if self.flops:
            return self.flops / seconds / 1e9, "GF/s"
        return (self.bytes / seconds / 1e9, "GB/s") if self.bytes else (1 / seconds, "calls/s")

    def peak(self, peaks: Peaks) -> float | None:
        """The ceiling of `rate` on this machine."""
        return peaks.gflops if self.flops else peaks.copy_gbs if self.bytes else None


@dataclass(frozen=True)
class Peaks:
    """What this machine can do, measured in the same run."""

    gflops: float
    kind: str  # how `gflops` was measured
    copy_gbs: float  # bytes read plus bytes written

    def or_better(self, other: Peaks) -> Peaks:
        """The higher of both: a busy machine measures too low, and nothing measures too high."""
        gflops = max(self.gflops, other.gflops)
        return replace(self, gflops=gflops, copy_gbs=max(self.copy_gbs, other.copy_gbs))


@dataclass
class Report:
    """Everything a run leaves behind; it is what is in the JSON file."""

    benchmark: str
    device: str
    dtype: str
    machine: dict[str, Any]
    method: dict[str, Any]
    peaks: Peaks
    results: list[Result]

    def save(self, path: Path) -> None:
        content = asdict(self)
        for saved, result in zip(content["results"], self.results, strict=True):
            for entry, timing in zip(saved["timings"], result.timings, strict=True):
                if not timing.excluded:  # for readers of the file; `load` computes these again
                    rate, unit = result.rate(timing.median)
                    entry |= {
                        "median": timing.median,
                        "quartiles": timing.quartiles,
                        "rate": rate,
                        "unit": unit,
                        "speedup_over_best_peer": result.speedup(timing.name),
                    }
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Report:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["peaks"] = Peaks(**content["peaks"])
        content["results"] = [
            Result(
                **saved
                | {
                    "targets": [
                        Target(**target | {"against": tuple(target["against"])})
                        for target in saved["targets"]
                    ],
                    "timings": [
                        Timing(**{key: entry[key] for key in Timing.__dataclass_fields__ if key in entry})
                        for entry in saved["timings"]
                    ],
                }
            )
            for saved in content["results"]
        ]
        return cls(**content)


# --- measuring -------------------------------------------------------------------------------------------


def run_interleaved(case: Case, options: Options, *, block_seconds: float = 0.02) -> Result:
    """Check every contestant of `case`, then time them in rounds of blocks of at least `block_seconds`."""
    torch.compiler.reset()  # compiled code of the case before
    torch.set_num_threads(options.threads)
    shuffle = random.Random(options.seed)
    contestants = case.contestants()
    if len({c.name for c in contestants}) != len(contestants):
        raise ValueError(f"case {case.name}: two contestants have the same name")
    timings = [Timing(c.name, c.ours) for c in contestants]
    runners: list[tuple[Timing, Timer, int]] = []

    with tqdm(
        total=(1 + options.rounds) * len(contestants), desc=case.name, leave=False, disable=None
    ) as bar:
        for contestant, timing in zip(contestants, timings, strict=True):
            bar.set_postfix_str(f"preparing {contestant.name}")
            try:
                run = contestant.setup()
                with torch.inference_mode(not case.grad):
                    contestant.check(run())
                    timer = Timer("run()", globals={"run": run}, num_threads=options.threads)
                    calls = _calls_per_block(timer, block_seconds)
                timing.memory = contestant.memory() if contestant.memory else None
                runners.append((timing, timer, calls))
            except Exception as error:  # a peer may fail in any way; ours too, and then it must be seen
                reason = (str(error).strip().splitlines() or [""])[0]
                timing.excluded = f"{type(error).__name__}: {reason}"
                tqdm.write(f"EXCLUDED from {case.name}: {timing.name}: {timing.excluded}", file=sys.stderr)
                bar.total -= options.rounds
            bar.update()
        with torch.inference_mode(not case.grad):
            for _ in range(options.rounds):
                for timing, timer, calls in shuffle.sample(runners, len(runners)):
                    bar.set_postfix_str(timing.name)
                    timing.seconds.append(timer.timeit(calls).mean)
                    bar.update()

    return Result(
        case.name, case.title, case.flops, case.bytes, list(case.targets), timings, case.memory_limit
    )


def _calls_per_block(timer: Timer, seconds: float) -> int:
    # The fastest of three: one call that waited for a busy core would otherwise pass for a full block.
    calls = 1
    while (took := min(timer.timeit(calls).mean for _ in range(3)) * calls) < seconds:
        calls = max(2 * calls, math.ceil(1.1 * seconds / took * calls))
    return calls


def peak_memory(warm_up: Callable[[], Run], build: Callable[[], Run], options: Options) -> int | None:
    """Bytes that building and calling `build()` take at their peak, in a process of its own.

    All of that process counts but what it held when `warm_up()` had run: the same in tiny, so that libraries
    are loaded and threads are started. Both are pickled. None where the system does not tell (no /proc).
    """
    if not _STATUS.exists():
        return None
    # A fresh interpreter: a fork would begin with this process's memory.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_grown_by, warm_up, build, options.threads).result()


_STATUS = Path("/proc/self/status")


def _grown_by(warm_up: Callable[[], Run], build: Callable[[], Run], threads: int) -> int:
    torch.set_num_threads(threads)
    run = warm_up()
    run()
    run()
    del run
    gc.collect()
    before = _memory("VmRSS")
    run = build()
    for _ in range(3):
        run()
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    # Not ru_maxrss: a child's begins with its parent's, across exec.
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024  # in kB


def measure_peaks(options: Options) -> Peaks:
    """Arithmetic peak and copy bandwidth of the device, the best of several short measurements.

    CPU: fused multiply-adds between registers, in float32 and on every thread; float64 has half the lanes.
    For bfloat16 and float16 the float32 peak stands: that is what their kernels accumulate in.
    CUDA: a large matrix product in this dtype, since no shape reaches the data sheet's number.
    """
    if options.device.type == "cuda":
        gflops, kind = _matmul_peak(options), f"{_dtype_name(options.dtype)} matrix product"
    else:
        gflops, kind = _fma_peak(options), "float32 FMA"
        if options.dtype == torch.float64:
            gflops, kind = gflops / 2, "float64 FMA"
    return Peaks(gflops, kind, _copy_gbs(options))


def _fma_peak(options: Options) -> float:
    from pyens import _C

    if not hasattr(_C, "fma_peak"):
        raise RuntimeError("pyens._C has no fma_peak, so the FMA peak cannot be measured: rebuild pyens")
    torch.set_num_threads(options.threads)
    return max(_C.fma_peak(10.0 if options.quick else 50.0) for _ in range(3 if options.quick else 10))


def _matmul_peak(options: Options) -> float:
    n = 1024 if options.quick else 8192
    a, b = torch.randn(2, n, n, device=options.device).to(options.dtype).unbind()
    timer = Timer("torch.mm(a, b, out=c)", globals={"torch": torch, "a": a, "b": b, "c": torch.empty_like(a)})
    return 2 * n**3 / min(timer.timeit(5).mean for _ in range(5)) / 1e9


def _copy_gbs(options: Options) -> float:
    megabytes = 32 if options.quick else 256 if options.device.type == "cpu" else 2048  # far beyond any cache
    source = torch.ones(megabytes << 20, dtype=torch.uint8, device=options.device)
    copy = torch.empty_like(source)
    timer = Timer("copy.copy_(source)", globals={"copy": copy, "source": source}, num_threads=options.threads)
    return 2 * source.numel() / min(timer.timeit(3).mean for _ in range(3)) / 1e9


def machine_info(options: Options) -> dict[str, Any]:
    """What one must know to read the numbers: processor, threads, versions, commit."""
    import pyens

    cpu = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        models = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        cpu = next(models, f"model name: {cpu}").partition(":")[2].strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": options.threads,
        "gpu": torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pyens": pyens.build_info(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str | None:
    """What git answers; None without git, a repository or a commit."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# --- showing ---------------------------------------------------------------------------------------------


def table(result: Result, peaks: Peaks) -> str:
    """One case as text: ours first, then the peers from fast to slow, then targets and losses in words."""
    peak = result.peak(peaks)
    memory = "memory" if any(t.memory is not None for t in result.timings) else ""
    rows = [("", "median", "quartiles", "rate", "of peak" if peak else "", "vs best peer", memory)]
    for t in sorted(result.timed(), key=lambda t: (not t.ours, t.median)):
        rate, unit = result.rate(t.median)
        speedup = result.speedup(t.name)
        rows.append(
            (
                ("* " if t.ours else "  ") + t.name,
                _time(t.median),
                " – ".join(_time(q) for q in t.quartiles),
                f"{rate:.4g} {unit}",
                f"{rate / peak:.0%}" if peak else "",
                "" if speedup is None else f"{speedup:.2f}×",
                "" if t.memory is None else _megabytes(t.memory),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{result.name}: {result.title}"]
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines += [f"  EXCLUDED {t.name}: {t.excluded}" for t in result.timings if t.excluded]
    if spread := unsteady(result):
        worst = max(spread, key=spread.__getitem__)
        lines.append(
            f"  UNSTEADY: {len(spread)} of {len(result.timed())} contestants, worst {worst}: "
            f"quartiles {spread[worst]:.0%} of the median apart; is the machine busy?"
        )
    lines += [f"  target: {text}" for text in verdicts(result)]
    lines += [f"  SLOWER: {loss}" for loss in losses(result)]
    return "\n".join(lines)


def verdict(result: Result, target: Target) -> str:
    """A target and what came of it, in words."""
    goal = f"{target.ours} at least {target.ratio:g}× {' or '.join(target.against) or 'the best peer'}"
    speedup = result.speedup(target.ours, target.against)
    if speedup is None:
        return f"{goal}: MISSED, not measured"
    return f"{goal}: {'met' if speedup >= target.ratio else 'MISSED'}, {speedup:.2f}×"


def verdicts(result: Result) -> list[str]:
    """All targets and what came of them, those of memory too."""
    found = [verdict(result, target) for target in result.targets]
    for t in result.timings if result.memory_limit else []:
        if t.ours:
            goal = f"{t.name} takes at most {_megabytes(result.memory_limit)}"
            if t.memory is None:
                found.append(f"{goal}: MISSED, not measured")
            else:
                met = "met" if t.memory <= result.memory_limit else "MISSED"
                found.append(f"{goal}: {met}, {_megabytes(t.memory)}")
    return found


def unsteady(result: Result) -> dict[str, float]:
    """Interquartile range over median, where it is so large that something else must be running."""
    spread = {t.name: (t.quartiles[1] - t.quartiles[0]) / t.median for t in result.timed()}
    return {name: value for name, value in spread.items() if value > 0.25}


def losses(result: Result) -> list[str]:
    """A sentence for each of ours that the best peer beats."""
    best = result.best_peer()
    return [
        f"{t.name} runs at {speedup:.2f}× the speed of the best peer of each round (overall: {best.name})"
        for t in result.timed(ours=True)
        if best is not None and (speedup := result.speedup(t.name)) is not None and speedup < 1
    ]


def markdown(report: Report) -> str:
    """The report as a table for a README: speed-ups over the best peer, in one run."""
    ours = list(dict.fromkeys(t.name for r in report.results for t in r.timings if t.ours))
    lines = [
        "| " + " | ".join(["work", "best peer", *ours, "target"]) + " |",
        "|" + "---|" * (len(ours) + 3),
    ]
    for result in report.results:
        best, peak = result.best_peer(), result.peak(report.peaks)
        cells = [result.title, f"{best.name}, {_time(best.median)}" if best else "none"]
        timed = {t.name: t for t in result.timed(ours=True)}
        for name in ours:
            if name not in timed:
                cells.append("excluded" if any(t.name == name for t in result.timings) else "")
                continue
            rate, unit = result.rate(timed[name].median)
            of_peak = f", {rate / peak:.0%}" if peak else ""
            speedup = result.speedup(name)
            ratio = "" if speedup is None else f"**{speedup:.2f}×** "
            cells.append(f"{ratio}{_time(timed[name].median)} ({rate:.3g} {unit}{of_peak})")
        cells.append("; ".join(verdicts(result)) or "none")
        lines.append("| " + " | ".join(cells) + " |")
    machine, peaks = report.machine, report.peaks
    commit = (machine["commit"] or "no commit")[:10] + (" with changes" if machine["dirty"] else "")
    lines += [
        "",
        f"{report.dtype} on {machine['gpu'] or machine['cpu']}, {machine['threads']} threads, "
        f"{peaks.kind} peak {peaks.gflops:.0f} GF/s, copy {peaks.copy_gbs:.0f} GB/s, "
        f"torch {machine['torch']}, commit {commit}, {machine['date'][:10]}. "
        f"Median of {report.method['rounds']} interleaved rounds; percentages are of the measured peak.",
    ]
    return "\n".join(lines)


def plot(report: Report, path: Path) -> None:
    """Grouped bars of the rate with the peak as a line; below, our speed-up over the best peer.

    Where units are mixed, the bars are shares of the peak.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without pyplot: no global state, no display
    from matplotlib.ticker import LogLocator

    results = report.results
    names = list(dict.fromkeys(t.name for ours in (True, False) for r in results for t in r.timed(ours=ours)))
    ours = list(dict.fromkeys(t.name for r in results for t in r.timed(ours=True)))
    peers = [name for name in names if name not in ours]
    blues, greys = colormaps["Blues"], colormaps["YlOrBr"]
    colors = {name: blues(0.95 - 0.5 * i / max(len(ours), 1)) for i, name in enumerate(ours)}
    colors |= {name: greys(0.15 + 0.5 * i / max(len(peers), 1)) for i, name in enumerate(peers)}

    figure = Figure(figsize=(5 + 1.7 * len(results), 8.5), layout="constrained")
    bars, ratios = figure.subplots(2, height_ratios=(3, 2))
    units = list(dict.fromkeys(r.rate(1.0)[1] for r in results))
    peaks = [r.peak(report.peaks) for r in results]
    mixed = len(units) > 1 and all(peaks)
    width = 0.86 / max(1, *(len(r.timed()) for r in results))
    for i, (result, peak) in enumerate(zip(results, peaks, strict=True)):
        scale = peak if mixed else 1.0
        timed = sorted(result.timed(), key=lambda t: names.index(t.name))
        for j, t in enumerate(timed):
            x = i + (j - (len(timed) - 1) / 2) * width
            bars.bar(x, result.rate(t.median)[0] / scale, width, color=colors[t.name])
        if peak is not None:
            bars.hlines(peak / scale, i - 0.47, i + 0.47, color="black", linewidth=1.5)
        for j, name in enumerate(ours):
            x = i + 0.2 * (j - (len(ours) - 1) / 2)
            if (speedup := result.speedup(name)) is not None:
                ratios.plot(x, speedup, "o", color=colors[name], markersize=9, zorder=3)
            for target in result.targets:
                if target.ours == name and not target.against:
                    ratios.hlines(target.ratio, x - 0.09, x + 0.09, color="black", linewidth=2)

    for name in names:
        bars.bar(0, 0, 0, color=colors[name], label=name)
    kinds = {"GF/s": report.peaks.kind, "GB/s": "copy"}
    shown = " or ".join(kinds[unit] for unit in units if unit in kinds)
    bars.plot([], [], color="black", label=f"peak ({shown})")
    bars.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    bars.set_ylabel("share of the peak" if mixed else " or ".join(units))
    bars.set_xticks(range(len(results)), [r.name for r in results])
    bars.set_title(f"{report.benchmark}: {report.dtype}, {report.machine['gpu'] or report.machine['cpu']}")

    ratios.axhline(1.0, color="grey", linewidth=1, linestyle="--")
    ratios.set_yscale("log")
    ratios.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ratios.yaxis.set_major_formatter("{x:g}×")
    ratios.yaxis.set_minor_formatter("")
    for name in ours:
        ratios.plot([], [], "o", color=colors[name], label=name)
    ratios.plot([], [], color="black", label="target")
    ratios.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    ratios.set_ylabel("speed-up over the best peer")
    ratios.set_xticks(range(len(results)), [r.title.replace(", ", "\n") for r in results], fontsize="small")
    ratios.set_xlim(bars.get_xlim())
    for axes in (bars, ratios):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write to: takes `path`'s place when the block ends well, disappears when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- the command line ------------------------------------------------------------------------------------


def main(
    benchmark: str,
    description: str | None,
    cases: Callable[[Options], list[Case]],
    argv: Sequence[str] | None = None,
) -> int:
    """Run the benchmark `benchmark` as the command line asks. 1 if one of ours was excluded, else 0."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=[_dtype_name(d) for d in TOLERANCE], default="float32")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--cases", default="", help="names or beginnings of names, with commas; default: all")
    parser.add_argument("--rounds", type=_positive, help="default: 20")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the order in each round")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile must make")
    parser.add_argument("--quick", action="store_true", help="smoke test: a tiny case, no compilation")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the picture")
    parser.add_argument("--markdown", action="store_true", help="only print the saved result as a table")
    arguments = parser.parse_args(argv)

    part = "-quick" if arguments.quick else "-part" if arguments.cases or arguments.no_compile else ""
    stem = f"{benchmark}-{arguments.device}-{arguments.dtype}{part}"
    saved = arguments.output / f"{stem}.json"
    if arguments.markdown:
        if not saved.exists():
            parser.error(f"--markdown: there is no result {saved}")
        print(markdown(Report.load(saved)))
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")

    options = Options(
        device=torch.device(arguments.device),
        dtype=getattr(torch, arguments.dtype),
        threads=arguments.threads,
        rounds=arguments.rounds or (2 if arguments.quick else 20),
        seed=arguments.seed,
        quick=arguments.quick,
        compile=not (arguments.no_compile or arguments.quick),
    )
    available = cases(options)
    try:
        selected = select(available, arguments.cases)
    except ValueError as error:
        parser.error(f"--cases: {error}")

    torch.set_num_threads(options.threads)
    report = Report(
        benchmark=benchmark,
        device=arguments.device,
        dtype=arguments.dtype,
        machine=machine_info(options),
        method={
            "rounds": options.rounds,
            "seed": options.seed,
            "compiled": options.compile,
            "order": "interleaved, shuffled in every round",
            "ratio": "median over rounds of (best peer of the round / this one in the round)",
        },
        peaks=measure_peaks(options),
        results=[],
    )
    peaks = report.peaks
    print(f"{benchmark}: {arguments.dtype}, {report.machine['gpu'] or report.machine['cpu']}, ", end="")
    print(f"{options.threads} threads; peak {peaks.gflops:.0f} GF/s ({peaks.kind}), ", end="")
    print(f"copy {peaks.copy_gbs:.1f} GB/s; * is pyens\n", flush=True)
    for case in selected:
        report.results.append(run_interleaved(case, options))
        report.peaks = report.peaks.or_better(measure_peaks(options))
        print(table(report.results[-1], report.peaks) + "\n", flush=True)

    picture = saved.with_suffix(".png")
    report.save(saved)
    plot(report, picture)
    print(f"wrote {saved} and {picture.name}")
    return int(any(t.ours and t.excluded for result in report.results for t in result.timings))


def select(cases: Sequence[Case], names: str) -> list[Case]:
    """The cases that `names` lists by name or by the beginning of a name up to a dash; all if it is empty."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if not any(f"{case.name}-".startswith(f"{name}-") for case in cases):
            raise ValueError(f"no case {name!r}; there are {', '.join(case.name for case in cases)}")
    return [c for c in cases if not wanted or any(f"{c.name}-".startswith(f"{name}-") for name in wanted)]


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value
