"""What a picture shows: figures as they are saved, and pixels of a file."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from pyens import plots


def saved_figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """By file name, every figure that `pyens.plots.save_figure` writes from now on."""
    figures: dict[str, Figure] = {}
    save = plots.save_figure

    def record(figure: Figure, path: Path, **options: int) -> Path:
        figures[Path(path).name] = figure
        return save(figure, path, **options)

    monkeypatch.setattr(plots, "save_figure", record)
    return figures


def same_picture(one: Path, other: Path) -> bool:
    """Whether all pixels agree but for a few at edges.

    In 2 of 330 drawings of the same numbers, two of matplotlib's pixels differed; other numbers change
    thousands.
    """
    a, b = imread(one), imread(other)
    return a.shape == b.shape and bool((a != b).any(-1).mean() < 1e-5)
