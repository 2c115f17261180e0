"""Pictures of what `pyens.metrics` measures. Needs matplotlib: ``pip install pyens[plots]``.

Every plot draws on the matplotlib axes it is given and returns them; without axes it makes a figure of its
own (``ax.figure``). There is no pyplot in here: a figure belongs to the caller alone, and no window opens.

    ax = reliability_diagram({"ensemble": metrics.reliability_curve(probabilities, labels)})
    save_figure(ax.figure, "reliability.png")
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pyens.metrics import ConfidenceCurve, ReliabilityCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

# Okabe and Ito's colours, told apart by readers with any colour vision; line styles and markers tell the
# curves apart once more in black and white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D")
INK = "#404040"


def new_figure(width: float = 5.0, height: float = 4.0) -> Figure:
    """An empty figure of this size in inches that lays itself out and draws into memory.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pyens.plots needs matplotlib: pip install pyens[plots]") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 150) -> Path:
    """Writes the figure, in the format that the ending of `path` names, completely or not at all."""
    path = Path(path)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(unfinished, dpi=dpi)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def reliability_diagram(curves: Mapping[str, ReliabilityCurve], ax: Axes | None = None) -> Axes:
    """Accuracy against confidence, one line for each named curve, beside the diagonal of perfect calibration.

    A point is one bin that has examples; its area grows with the bin's share of them.

    Args:
        curves: what `pyens.metrics.reliability_curve` returns, by the name for the legend.
        ax: axes to draw on; None for a new figure.
    """
    ax = _prepare("reliability_diagram", "curves", curves, ReliabilityCurve, ax)
    ax.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":", label="perfectly calibrated")
    for (name, curve), colour, line, marker in zip(
        curves.items(), cycle(COLOURS), cycle(LINES), cycle(MARKERS), strict=False
    ):
        count = _array(curve.count)
        filled = count > 0
        confidence, accuracy = _array(curve.confidence)[filled], _array(curve.accuracy)[filled]
        ax.plot(confidence, accuracy, color=colour, linestyle=line, linewidth=1.5, label=name)
        area = 12 + 120 * count[filled] / count.sum()
        ax.scatter(confidence, accuracy, s=area, color=colour, marker=marker, alpha=0.8, linewidths=0)
    ax.set(xlabel="confidence (max p)", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    ax.legend(frameon=False, fontsize="small")
    return ax


def confidence_curves(curves: Mapping[str, ConfidenceCurve], ax: Axes | None = None) -> Axes:
    """Share of examples answered against the confidence threshold, one line for each named curve.

    Args:
        curves: what `pyens.metrics.confidence_curve` returns, by the name for the legend.
        ax: axes to draw on; None for a new figure.
    """
    ax = _prepare("confidence_curves", "curves", curves, ConfidenceCurve, ax)
    for (name, curve), colour, line in zip(curves.items(), cycle(COLOURS), cycle(LINES), strict=False):
        threshold = _array(curve.threshold)
        order = threshold.argsort()
        ax.plot(
            threshold[order],
            _array(curve.answered)[order],
            color=colour,
            linestyle=line,
            linewidth=1.5,
            label=name,
        )
    ax.set(xlabel="confidence threshold τ", ylabel="share answered (max p ≥ τ)", xlim=(0, 1), ylim=(0, 1.02))
    ax.legend(frameon=False, fontsize="small")
    return ax


def uncertainty_histograms(
    uncertainties: Mapping[str, Tensor],
    ax: Axes | None = None,
    *,
    xlabel: str = "predictive entropy [nats]",
    bins: int = 30,
) -> Axes:
    """Histogram of an uncertainty for each named group, over common bins and each as shares of its own group.

    Args:
        uncertainties: ``[B]`` values of each group, by the name for the legend; groups may differ in size.
        ax: axes to draw on; None for a new figure.
        xlabel: which uncertainty it is, with its unit.
        bins: number of bins between the smallest and the largest value of all groups.
    """
    ax = _prepare("uncertainty_histograms", "uncertainties", uncertainties, torch.Tensor, ax)
    groups = {name: _array(values) for name, values in uncertainties.items()}
    for name, values in groups.items():
        if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
            raise ValueError(
                f"uncertainty_histograms: uncertainties[{name!r}]: expected finite values of shape [B] "
                f"with B >= 1, got shape {list(values.shape)}"
            )
    edges = np.histogram_bin_edges(np.concatenate(list(groups.values())), bins=bins)
    for (name, values), colour, line in zip(groups.items(), cycle(COLOURS), cycle(LINES), strict=False):
        share = np.full(len(values), 1 / len(values))
        ax.hist(values, edges, weights=share, color=colour, alpha=0.35, label=name)
        ax.hist(values, edges, weights=share, color=colour, histtype="step", linestyle=line, linewidth=1.5)
    ax.set(xlabel=xlabel, ylabel="share of examples", xlim=(edges[0], edges[-1]))
    ax.legend(frameon=False, fontsize="small")
    return ax


def _prepare(function: str, argument: str, items: Mapping, kind: type, ax: Axes | None) -> Axes:
    """Checks the named items, then gives the axes to draw them on, in the common style."""
    if not isinstance(items, Mapping):
        raise TypeError(
            f"{function}: {argument}: expected a mapping from name to {kind.__name__}, "
            f"got {type(items).__name__}"
        )
    if not items:
        raise ValueError(f"{function}: {argument}: expected at least one {kind.__name__}, got none")
    for name, item in items.items():
        if not isinstance(item, kind):
            raise TypeError(
                f"{function}: {argument}[{name!r}]: expected a {kind.__name__}, got {type(item).__name__}"
            )
    if ax is None:
        ax = new_figure().add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#E5E5E5", linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()
