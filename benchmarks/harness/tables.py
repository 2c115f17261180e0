"""Results in words: a table for the terminal, one for a README, targets met and missed."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.cases import Target
from benchmarks.harness.results import Peaks, Report, Result, Timing

ALONE = 0.9  # of the peak: what a machine has to give that nobody else uses


def table(result: Result, peaks: Peaks) -> str:
    """One case as text: what we lose, ours, the peers from fast to slow, then targets in words."""
    peak = result.peak(peaks)
    memory = "memory" if any(t.memory is not None for t in result.timings) else ""
    cpu = "CPU time" if any(t.cpu_seconds for t in result.timings) else ""
    rows = [("", "median", "quartiles", cpu, "rate", "of peak" if peak else "", "vs best peer", memory)]
    for t in sorted(result.timed(), key=lambda t: (not t.ours, t.yardstick, t.median)):
        rate, unit = result.rate(t.median)
        speedup = result.speedup(t.name)
        rows.append(
            (
                ("* " if t.ours else "- " if t.yardstick else "  ") + shown_name(t),
                duration(t.median),
                " – ".join(duration(q) for q in t.quartiles),
                "" if t.cpu_median is None else duration(t.cpu_median),
                f"{rate:.4g} {unit}",
                f"{rate / peak:.0%}" if peak else "",
                "" if speedup is None else f"{speedup:.2f}×",
                "" if t.memory is None else _megabytes(t.memory),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{result.name}: {result.title}", *(f"  SLOWER: {loss}" for loss in losses(result))]
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
    share = result.share_of_machine(peaks)
    if share is not None and share < ALONE:
        lines.append(
            f"  SHARED: between the rounds the machine had {share:.0%} of its peak to give: who needs the "
            f"multiply-adds most loses most"
        )
    lines += [f"  target: {text}" for text in verdicts(result, peaks)]
    return "\n".join(lines)


def verdict(result: Result, target: Target, peaks: Peaks) -> str:
    """A target and what came of it, in words."""
    if target.seconds:
        goal = f"{target.ours} in at most {duration(target.seconds)}"
        mine = next((t for t in result.timed() if t.name == target.ours), None)
        if mine is None:
            return f"{goal}: MISSED, not measured"
        return f"{goal}: {'met' if mine.median <= target.seconds else 'MISSED'}, {duration(mine.median)}"
    if target.flops or target.bytes:
        goal = f"{target.ours} at least {target.ratio:.0%} of what the peaks allow"
        share = result.share_of_floor(target, peaks)
        if share is None:
            return f"{goal}: MISSED, not measured"
        return f"{goal}: {'met' if share >= target.ratio else 'MISSED'}, {share:.0%}"
    goal = f"{target.ours} at least {target.ratio:g}× {' or '.join(target.against) or 'the best peer'}"
    speedup = result.speedup(target.ours, target.against)
    if speedup is None:
        return f"{goal}: MISSED, not measured"
    return f"{goal}: {'met' if speedup >= target.ratio else 'MISSED'}, {speedup:.2f}×"


def verdicts(result: Result, peaks: Peaks) -> list[str]:
    """All targets and what came of them, those of memory too."""
    found = [verdict(result, target, peaks) for target in result.targets]
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
    """The report as a table for a README: speed-ups over the best peer, in one run; what we lose first."""
    ours = list(dict.fromkeys(t.name for r in report.results for t in r.timings if t.ours))
    lines = [
        "| " + " | ".join(["work", "best peer", *ours, "target"]) + " |",
        "|" + "---|" * (len(ours) + 3),
    ]
    for result in sorted(report.results, key=lambda result: not result.lost()):
        best, peak = result.best_peer(), result.peak(report.peaks)
        share = result.share_of_machine(report.peaks)
        shared = f" *({share:.0%} of the machine)*" if share is not None and share < ALONE else ""
        cells = [result.title + shared, f"{shown_name(best)}, {duration(best.median)}" if best else "none"]
        timed = {t.name: t for t in result.timed(ours=True)}
        for name in ours:
            if name not in timed:
                cells.append("excluded" if any(t.name == name for t in result.timings) else "")
                continue
            rate, unit = result.rate(timed[name].median)
            of_peak = f", {rate / peak:.0%}" if peak else ""
            speedup = result.speedup(name)
            ratio = "" if speedup is None else f"**{speedup:.2f}×** "
            cells.append(f"{ratio}{duration(timed[name].median)} ({rate:.3g} {unit}{of_peak})")
        cells.append("; ".join(verdicts(result, report.peaks)) or "none")
        lines.append("| " + " | ".join(cells) + " |")
    machine, peaks = report.machine, report.peaks
    tf32 = " (TF32)" if machine.get("float32_products") == "tf32" else ""
    lines += [
        "",
        f"{report.dtype}{tf32} on {processor(machine)}, {machine['threads']} threads, "
        f"{peaks.kind} peak {peaks.gflops:.0f} GF/s, copy {peaks.copy_gbs:.0f} GB/s, "
        f"{versions(machine)}. "
        f"Median of {report.method['rounds']} interleaved rounds; percentages are of the measured peak.",
    ]
    if any((result.share_of_machine(peaks) or 1) < ALONE for result in report.results):
        lines[-1] += (
            " Where a share of the machine is named, the peak measured between the rounds was no more than "
            "that: others used it, and who needs the multiply-adds most lost most."
        )
    return "\n".join(lines)


def shown_name(timing: Timing) -> str:
    """A contestant's name, and whether it was not held to the others' instruction set."""
    return f"{timing.name} (not capped)" if timing.uncapped else timing.name


def processor(machine: dict[str, Any]) -> str:
    """What computed, and on the CPU with which instruction set, from `machine_info`."""
    isa = machine.get("pyens", {}).get("cpu_capability")
    return str(machine["gpu"]) if machine["gpu"] else machine["cpu"] + (f" ({isa})" if isa else "")


def versions(machine: dict[str, Any]) -> str:
    """Of torch and of this project, and the day, from `machine_info`."""
    commit = (machine["commit"] or "no commit")[:10] + (" with changes" if machine["dirty"] else "")
    return f"torch {machine['torch']}, commit {commit}, {machine['date'][:10]}"


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"
