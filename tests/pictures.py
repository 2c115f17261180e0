"""What a picture shows: figures as they are saved, and pixels of a file."""

from pathlib import Path

import numpy as np
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


def same_pixels(one: Path, other: Path) -> bool:
    a, b = imread(one), imread(other)
    return a.shape == b.shape and bool(np.array_equal(a, b))
