"""A report as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.results import Report
from benchmarks.harness.tables import processor
from pyens.plots import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(report: Report, path: Path) -> None:
    """Draws a report into a file."""
    save_figure(draw(report), path, dpi=120)


def draw(report: Report) -> Figure:
    """Grouped bars of the rate with the peak as a line; below, our speed-up over the best peer.

    Where units are mixed, the bars are shares of the peak.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator

    results = report.results
    names = list(dict.fromkeys(t.name for ours in (True, False) for r in results for t in r.timed(ours=ours)))
    ours = list(dict.fromkeys(t.name for r in results for t in r.timed(ours=True)))
    peers = [name for name in names if name not in ours]
    blues, greys = colormaps["Blues"], colormaps["YlOrBr"]
    colors = {name: blues(0.95 - 0.5 * i / max(len(ours), 1)) for i, name in enumerate(ours)}
    colors |= {name: greys(0.15 + 0.5 * i / max(len(peers), 1)) for i, name in enumerate(peers)}

    figure = new_figure(5 + 1.7 * len(results), 8.5)
    bars, ratios = figure.subplots(2, height_ratios=(3, 2))
    units = list(dict.fromkeys(r.rate(1.0)[1] for r in results))
    peaks = [r.peak(report.peaks) for r in results]
    mixed = len(units) > 1 and all(peaks)
    width = 0.86 / max(1, *(len(r.timed(ours=True) + r.timed(ours=False)) for r in results))
    for i, (result, peak) in enumerate(zip(results, peaks, strict=True)):
        scale = peak if mixed else 1.0
        timed = sorted(result.timed(ours=True) + result.timed(ours=False), key=lambda t: names.index(t.name))
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
                if target.ours == name and not (target.against or target.flops or target.bytes):
                    ratios.hlines(target.ratio, x - 0.09, x + 0.09, color="black", linewidth=2)

    for name in names:
        bars.bar(0, 0, 0, color=colors[name], label=name)
    kinds = {"GF/s": report.peaks.kind, "GB/s": "copy"}
    shown = " or ".join(kinds[unit] for unit in units if unit in kinds)
    bars.plot([], [], color="black", label=f"peak ({shown})")
    bars.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    bars.set_ylabel("share of the peak" if mixed else " or ".join(units))
    bars.set_xticks(range(len(results)), [r.name for r in results])
    bars.set_title(f"{report.benchmark}: {report.dtype}, {processor(report.machine)}")

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
    return figure
