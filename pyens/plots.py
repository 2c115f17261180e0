"""Pictures of what `pyens.metrics` measures. Needs matplotlib: ``pip install pyens[plots]``.

Every plot draws on the matplotlib axes it is given and returns them; without axes it makes a figure of its
own (``ax.figure``). There is no pyplot in here: a figure belongs to the caller alone, and no window opens.

    ax = reliability_diagram({"ensemble": metrics.reliability_curve(probabilities, labels)})
    save_figure(ax.figure, "reliability.png")
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyens import _files
from pyens.metrics import ConfidenceCurve, ReliabilityCurve, RiskCoverageCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = [
    "confidence_curves",
    "confusion",
    "correlation_matrix",
    "new_figure",
    "prediction_differences",
    "reliability_diagram",
    "risk_coverage_curves",
    "save_figure",
    "uncertainty_histograms",
]

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
    with _files.replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=dpi)
    return path


def reliability_diagram(
    curves: Mapping[str, ReliabilityCurve], ax: Axes | None = None, *, joined: int = 1
) -> Axes:
    """Accuracy against confidence, one line for each named curve, beside the diagonal of perfect calibration.

    A point is one bin that has examples; its area grows with the bin's share of them.

    Args:
        curves: what `pyens.metrics.reliability_curve` returns, by the name for the legend.
        ax: axes to draw on; None for a new figure.
        joined: how many examples a bin needs for the line to pass through its point. The accuracy of a few
            examples is 0 or 1 by chance.
    """
    ax = _prepare("reliability_diagram", "curves", curves, ReliabilityCurve, ax)
    ax.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":", label="perfectly calibrated")
    for curve, style, marker in _styled(curves):
        count = _array(curve.count)
        filled = count > 0
        confidence, accuracy = _array(curve.confidence)[filled], _array(curve.accuracy)[filled]
        enough = count[filled] >= joined
        ax.plot(confidence[enough], accuracy[enough], **style)
        area = 12 + 120 * count[filled] / count.sum()
        ax.scatter(confidence, accuracy, s=area, color=style["color"], marker=marker, alpha=0.8, linewidths=0)
    return _labelled(ax, xlabel="confidence (max p)", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))


def confidence_curves(curves: Mapping[str, ConfidenceCurve], ax: Axes | None = None) -> Axes:
    """Share of examples answered against the confidence threshold, one line for each named curve.

    Args:
        curves: what `pyens.metrics.confidence_curve` returns, by the name for the legend.
        ax: axes to draw on; None for a new figure.
    """
    ax = _prepare("confidence_curves", "curves", curves, ConfidenceCurve, ax)
    for curve, style, _ in _styled(curves):
        threshold = _array(curve.threshold)
        order = threshold.argsort()
        ax.plot(threshold[order], _array(curve.answered)[order], **style)
    labels = {"xlabel": "confidence threshold τ", "ylabel": "share answered (max p ≥ τ)"}
    return _labelled(ax, **labels, xlim=(0, 1), ylim=(0, 1.02))


def risk_coverage_curves(
    curves: Mapping[str, RiskCoverageCurve],
    ax: Axes | None = None,
    *,
    ylabel: str = "error rate of the answers",
) -> Axes:
    """Mean loss of the answered examples against their share, one line for each named curve.

    Args:
        curves: what `pyens.metrics.risk_coverage_curve` returns, by the name for the legend.
        ax: axes to draw on; None for a new figure.
        ylabel: which risk it is, with its unit.
    """
    ax = _prepare("risk_coverage_curves", "curves", curves, RiskCoverageCurve, ax)
    for curve, style, _ in _styled(curves):
        ax.plot(_array(curve.coverage), _array(curve.risk), **style)
    return _labelled(ax, xlabel="coverage (share answered)", ylabel=ylabel, xlim=(0, 1))


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
    edges = np.histogram_bin_edges(np.concatenate(list(groups.values())), bins=bins).tolist()
    for values, style, _ in _styled(groups):
        share = np.full(len(values), 1 / len(values))
        ax.hist(values, edges, weights=share, color=style["color"], alpha=0.35, label=style.pop("label"))
        ax.hist(values, edges, weights=share, histtype="step", **style)
    return _labelled(ax, xlabel=xlabel, ylabel="share of examples", xlim=(edges[0], edges[-1]))


def confusion(matrix: Tensor, names: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Confusion matrix as a picture: of each true class (row), the share predicted as each class (column).

    Args:
        matrix: ``[K, K]`` counts >= 0, what `pyens.metrics.confusion_matrix` returns. The row of a class
            without examples stays empty.
        names: of the K classes; their numbers if not given.
        ax: axes to draw on; None for a new figure.
    """
    if not isinstance(matrix, torch.Tensor):
        raise TypeError(f"confusion: matrix: expected a tensor, got {type(matrix).__name__}")
    counts = _array(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.size == 0:
        raise ValueError(f"confusion: matrix: expected shape [K, K] with K >= 1, got {list(counts.shape)}")
    if not (counts >= 0).all():
        raise ValueError("confusion: matrix: expected counts >= 0, got others")
    names = [str(k) for k in range(len(counts))] if names is None else list(names)
    if len(names) != len(counts):
        raise ValueError(f"confusion: names: expected {len(counts)}, one for each class, got {len(names)}")
    total = counts.sum(1, keepdims=True)
    shares = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    ax = _table(shares, names, names, ax, 0.0, "share of the true class")
    ax.set(xlabel="predicted class", ylabel="true class")
    return ax


def correlation_matrix(
    matrix: Tensor,
    names: Sequence[str],
    columns: Sequence[str] | None = None,
    ax: Axes | None = None,
    *,
    label: str = "Pearson correlation",
) -> Axes:
    """Correlations between two sets of things, or within one, as a picture with the numbers in it.

    The colours begin at the smallest correlation, rounded down to a tenth: they also tell apart what is all
    close to 1.

    Args:
        matrix: ``[R, C]`` in [-1, 1], such as `torch.corrcoef` of the prediction variations of R settings.
            Where it is NaN, for a setting without variation, the field stays empty.
        names: of the R rows.
        columns: names of the C columns; those of the rows if not given.
        ax: axes to draw on; None for a new figure.
        label: which correlation it is.
    """
    if not isinstance(matrix, torch.Tensor):
        raise TypeError(f"correlation_matrix: matrix: expected a tensor, got {type(matrix).__name__}")
    values = _array(matrix)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"correlation_matrix: matrix: expected shape [R, C], got {list(values.shape)}")
    outside = values[np.abs(values) > 1 + 1e-6]  # a rounding beyond 1 is no mistake
    if outside.size:
        raise ValueError(f"correlation_matrix: matrix: expected values in [-1, 1], got {outside[0]:.6g}")
    columns = names if columns is None else columns
    for argument, given, size in (("names", names, len(values)), ("columns", columns, values.shape[1])):
        if len(given) != size:
            raise ValueError(f"correlation_matrix: {argument}: expected {size} names, got {len(given)}")
    smallest = values[np.isfinite(values)].min(initial=0.9)
    return _table(values, names, columns, ax, np.floor(10 * smallest) / 10, label)


def prediction_differences(
    strengths: Sequence[float],
    differences: Mapping[str, Tensor],
    ax: Axes | None = None,
    *,
    xlabel: str = "strength λ of the decorrelation loss",
) -> Axes:
    """Prediction difference against the strength λ, on logarithmic axes, one line for each named measure.

    Args:
        strengths: the L values of λ >= 0, in any order. The axis is linear around 0, which is no such loss.
        differences: ``[L]`` finite values > 0 of each measure, by the name for the legend (Δ1, Δ2, ...).
        ax: axes to draw on; None for a new figure.
        xlabel: what λ is.
    """
    ax = _prepare("prediction_differences", "differences", differences, torch.Tensor, ax)
    x = np.asarray(strengths, dtype=float)
    if x.ndim != 1 or x.size == 0 or not (np.isfinite(x) & (x >= 0)).all():
        raise ValueError("prediction_differences: strengths: expected one or more finite numbers >= 0")
    order = x.argsort()
    for values, style, marker in _styled(differences):
        heights, name = _array(values), style["label"]
        if heights.shape != x.shape or not (np.isfinite(heights) & (heights > 0)).all():
            raise ValueError(
                f"prediction_differences: differences[{name!r}]: expected finite values > 0 of shape "
                f"[{len(x)}], got shape {list(heights.shape)}"
            )
        ax.plot(x[order], heights[order], **style, marker=marker)
    positive = x[x > 0]
    ax.set_xscale("symlog", linthresh=positive.min() if positive.size else 1.0)
    return _labelled(ax, xlabel=xlabel, ylabel="prediction difference", yscale="log")


def _table(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    ax: Axes | None,
    low: float,
    label: str,
) -> Axes:
    """Numbers from `low` to 1, each in a field of its colour; NaN leaves it empty."""
    if ax is None:
        ax = new_figure().add_subplot()
    image = ax.imshow(values, cmap="Blues", vmin=low, vmax=1)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = "white" if value > (low + 1) / 2 else INK
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize="x-small")
    ax.set(xticks=range(len(columns)), yticks=range(len(rows)), xticklabels=columns, yticklabels=rows)
    ax.figure.colorbar(image, ax=ax, label=label, fraction=0.05)
    return ax


def _prepare(function: str, argument: str, items: Mapping[str, Any], kind: type, ax: Axes | None) -> Axes:
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


def _styled(items: Mapping[str, Any]) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """Each item with the style of its line, its label included, and with a marker."""
    for (name, item), colour, line, marker in zip(
        items.items(), cycle(COLOURS), cycle(LINES), cycle(MARKERS), strict=False
    ):
        yield item, {"color": colour, "linestyle": line, "linewidth": 1.5, "label": name}, marker


def _labelled(ax: Axes, **settings: Any) -> Axes:
    ax.set(**settings)
    ax.legend(frameon=False, fontsize="small")
    return ax


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()
