"""What was measured, and the file that keeps it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.harness.cases import Target
from pyens._files import write_atomically

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass
class Timing:
    """Seconds per call of one contestant, one entry per round; or the reason why it was excluded."""

    name: str
    ours: bool
    seconds: list[float] = field(default_factory=list)
    excluded: str | None = None
    memory: int | None = None  # bytes
    yardstick: bool = False
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads, beside `seconds`
    uncapped: bool = False  # not held to the instruction set that the others are held to

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def cpu_median(self) -> float | None:
        return statistics.median(self.cpu_seconds) if self.cpu_seconds else None

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
    # GF/s of multiply-adds at the beginning of each round, on the CPU: what the machine had to give then.
    peaks_of_rounds: list[float] = field(default_factory=list)

    def timed(self, *, ours: bool | None = None) -> list[Timing]:
        """Ours, the peers, or all of them and the yardsticks."""
        return [
            t
            for t in self.timings
            if not t.excluded and (ours is None or (t.ours == ours and not t.yardstick))
        ]

    def peers(self) -> list[Timing]:
        """Who ours are held against: none that took another instruction set than the rest were held to."""
        return [t for t in self.timed(ours=False) if not t.uncapped]

    def best_peer(self) -> Timing | None:
        return min(self.peers(), key=lambda t: t.median, default=None)

    def speedup(self, name: str, against: Sequence[str] = ()) -> float | None:
        """Median over rounds of (best peer's time / this one's time); None if there is nothing to compare."""
        mine = next((t for t in self.timed() if t.name == name), None)
        peers = [t for t in self.timed() if t.name in against] if against else self.peers()
        if mine is None or not peers:
            return None
        best = [min(round_) for round_ in zip(*(t.seconds for t in peers), strict=True)]
        return statistics.median(b / m for b, m in zip(best, mine.seconds, strict=True))

    def share_of_floor(self, target: Target, peaks: Peaks) -> float | None:
        """How near `target.ours` comes to the speed that the peaks allow; None if it was not timed."""
        mine = next((t for t in self.timed() if t.name == target.ours), None)
        floor = max(target.flops / peaks.gflops, target.bytes / peaks.copy_gbs) / 1e9
        return floor / mine.median if mine else None

    def lost(self) -> bool:
        """Whether a peer beats one of ours."""
        return any((self.speedup(t.name) or 1.0) < 1.0 for t in self.timed(ours=True))

    def rate(self, seconds: float) -> tuple[float, str]:
        """Useful work per second, and its unit."""
        if self.flops:
            return self.flops / seconds / 1e9, "GF/s"
        return (self.bytes / seconds / 1e9, "GB/s") if self.bytes else (1 / seconds, "calls/s")

    def share_of_machine(self, peaks: Peaks) -> float | None:
        """What of its peak the machine had to give while this was measured; None if nobody looked."""
        return statistics.median(self.peaks_of_rounds) / peaks.gflops if self.peaks_of_rounds else None

    def peak(self, peaks: Peaks) -> float | None:
        """The ceiling of `rate` on this machine."""
        return peaks.gflops if self.flops else peaks.copy_gbs if self.bytes else None


@dataclass(frozen=True)
class Peaks:
    """What this machine can do, measured in the same run."""

    gflops: float
    kind: str  # how `gflops` was measured
    copy_gbs: float  # bytes read plus bytes written; on CUDA within the GPU's memory

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
                        "cpu_median": timing.cpu_median,
                        "quartiles": timing.quartiles,
                        "rate": rate,
                        "unit": unit,
                        "speedup_over_best_peer": result.speedup(timing.name),
                    }
        write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

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


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
