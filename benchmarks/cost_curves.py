"""What a member costs, against ensemble size, batch size, width and depth: forward and training.

Ours against the best of the peers that need no compiler. A cliff is a step between neighbours on a curve that
costs more than it should: the larger one takes more than 1.3 times as long per useful operation, or the
smaller one more than 1.3 times as long as the larger one does in all. Cheaper operations at larger sizes are
no cliff.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import ensemble_mlp, harness, training
from benchmarks.ensemble_mlp import OP, PACKED
from benchmarks.harness.tables import duration, processor
from benchmarks.peers import mlp_flops
from benchmarks.training import LOSS
from benchmarks.training_peers import training_flops
from pyens.plots import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Shape = tuple[int, int, tuple[int, ...]]  # ensemble size, batch size, features
PAPER = (32, 50, 20, 10, 1)
LARGEST_STEP = 1.3
CHEAP = (OP, PACKED, LOSS, "reference", "baddbmm", "baddbmm transposed")
KINDS = ("forward", "training")

# What is varied, in words, and its values; with vectors of 8 and 16 numbers, sizes around their multiples.
AXES = {
    "members": ("E", (1, 2, 3, 4, 7, 8, 9, 12, 15, 16, 17, 24, 32, 50, 64, 100, 128, 250, 500, 1000)),
    "batch": (
        "B",
        (
            *(1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 192),
            *(255, 256, 257, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536),
        ),
    ),
    "width": (
        "width",
        (8, 12, 16, 17, 24, 32, 33, 50, 64, 65, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048),
    ),
    "layers": ("layers", tuple(range(1, 9))),
}
QUICK = {"members": (1, 3), "batch": (4, 17), "width": (5, 8), "layers": (1, 2)}


def shape(axis: str, value: int) -> Shape:
    """The shape at a point of a curve."""
    return {
        "members": (value, 64, PAPER),
        "batch": (32, value, PAPER),
        "width": (10, 64, (32, value, value, 1)),
        "layers": (100, 64, (32, *[50] * (value - 1), 1)),
    }[axis]


def cases(options: harness.Options) -> list[harness.Case]:
    """A case for every point of every curve; none elsewhere than on the CPU."""
    if options.device.type != "cpu":
        return []
    made = []
    for kind in KINDS:
        for axis, (_, values) in AXES.items():
            for value in QUICK[axis] if options.quick else values:
                e, b, features = shape(axis, value)
                made.append(
                    harness.Case(
                        name=f"{kind}-{axis}-{value}",
                        title=f"{kind}, E {e}, B {b}, {'-'.join(map(str, features))}",
                        contestants=partial(contestants, kind, (e, b, features), options),
                        flops=(
                            mlp_flops(e, b, features)
                            if kind == "forward"
                            else training_flops(e, b, features, False)
                        ),
                        grad=kind == "training",
                    )
                )
    return made


def contestants(kind: str, shape: Shape, options: harness.Options) -> list[harness.Contestant]:
    """Ours and the peers that are ready in no time."""
    if kind == "forward":
        found = ensemble_mlp.contestants(*shape, options)
    else:
        found = training.gradient_contestants(*shape, False, options)
    return [contestant for contestant in found if contestant.name in CHEAP]


def curves(report: harness.Report, name: str) -> dict[tuple[str, str], list[tuple[int, harness.Result]]]:
    """The points of each curve, by kind and axis, at which `name` was timed."""
    found: dict[tuple[str, str], list[tuple[int, harness.Result]]] = {}
    for result in report.results:
        if any(t.name == name for t in result.timed()):
            kind, axis, value = result.name.split("-")
            found.setdefault((kind, axis), []).append((int(value), result))
    return found


def median(result: harness.Result, name: str) -> float:
    return next(t.median for t in result.timed() if t.name == name)


def cliffs(report: harness.Report) -> list[str]:
    """A sentence for each."""
    found = []
    for name in (OP, PACKED, LOSS):
        for (kind, axis), points in curves(report, name).items():
            for (small, before), (large, after) in pairwise(points):
                growth = median(after, name) / median(before, name)
                dearer = growth / (after.flops / before.flops)
                step = f"{name}, {kind}, {AXES[axis][0]} {small} to {large}"
                if dearer > LARGEST_STEP:
                    found.append(f"{step}: an operation costs {dearer:.2f}× as much")
                elif growth < 1 / LARGEST_STEP:
                    found.append(f"{step}: the smaller one takes {1 / growth:.2f}× as long")
    return found


def verdict(report: harness.Report) -> str:
    """The target and what came of it, in words."""
    found = cliffs(report)
    came = f"MISSED, {len(found)} are" if found else "met"
    return f"no step between neighbours larger than {LARGEST_STEP}×: {came}"


def remarks(report: harness.Report) -> list[str]:
    """What there is to say about all curves together."""
    return [f"target: {verdict(report)}", *(f"CLIFF {text}" for text in cliffs(report))]


def plot(report: harness.Report, path: Path) -> None:
    """Draws the curves into a file."""
    save_figure(draw(report), path, dpi=100)


def draw(report: harness.Report) -> Figure:
    """Forward above, training below."""
    figure = new_figure(20, 9)
    panels = figure.subplots(len(KINDS), len(AXES), squeeze=False)
    for row, kind in zip(panels, KINDS, strict=True):
        for axes, (axis, (words, _)) in zip(row, AXES.items(), strict=True):
            for name, color in ((OP, "tab:blue"), (PACKED, "tab:cyan"), (LOSS, "tab:blue")):
                points = curves(report, name).get((kind, axis), [])
                per_member = [1e6 * median(r, name) / shape(axis, value)[0] for value, r in points]
                if points:
                    axes.plot([value for value, _ in points], per_member, "o-", color=color, label=name, ms=3)
            best = [
                (value, 1e6 * peer.median / shape(axis, value)[0])
                for value, r in curves(report, LOSS if kind == "training" else OP).get((kind, axis), [])
                if (peer := r.best_peer())
            ]
            if best:
                axes.plot(*zip(*best, strict=True), "o-", color="tab:orange", label="best peer", ms=3)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_xlabel(words)
            axes.set_ylabel("µs per member")
            axes.set_title(f"{kind}: {_fixed(axis)}")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.lines:
                axes.legend(frameon=False)
    machine = report.machine
    figure.suptitle(
        f"{report.benchmark}: {report.dtype}, {processor(machine)}, {machine['threads']} threads. "
        f"{verdict(report)}"
    )
    return figure


def _fixed(axis: str) -> str:
    """A panel's shape, without what is varied."""
    e, b, features = shape(axis, 1)
    sizes = {"members": f"B {b}", "batch": f"E {e}"}.get(axis, f"E {e}, B {b}")
    widths = {"width": "32-w-w-1", "layers": "32-50-…-50-1"}.get(axis, "-".join(map(str, features)))
    return f"{sizes}, {widths}"


def summary(report: harness.Report) -> str:
    """For the page of results: the ends of our curves, and the cliffs."""
    lines = ["| curve | ours at its beginning, a member | at its end |", "|---|---|---|"]
    for name in (OP, LOSS):
        for (kind, axis), points in curves(report, name).items():
            cells = [f"{kind}, {_fixed(axis)}"]
            for value, result in (points[0], points[-1]):
                time = duration(median(result, name) / shape(axis, value)[0])
                cells.append(f"{AXES[axis][0]} {value}: {time}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Target: {verdict(report)}.", *(f"- {text}" for text in cliffs(report))])


if __name__ == "__main__":
    raise SystemExit(
        harness.main("cost_curves", __doc__, cases, by_threads=True, picture=plot, remarks=remarks)
    )
