"""The experiments of the Masksembles paper, small and on made-up data; and their two sinusoids."""

import itertools
import math
import struct

import pytest
import torch

from benchmarks.papers import masksembles
from benchmarks.papers.sinusoids import two_sinusoids
from pyens.masks import expected_iou
from tests.pictures import saved_figures


def shows_entropies_of(figure, names):
    """Figure 4: a map of the entropy and the points of both classes for each model."""
    *panels, colours = [ax for ax in figure.axes if ax.get_title() or ax.get_ylabel()]
    assert [ax.get_title() for ax in panels] == names
    assert colours.get_ylabel() == "predictive entropy [nats]"
    maps = [ax.collections[0].get_array() for ax in panels]
    for ax, values in zip(panels, maps, strict=True):
        assert values.shape == (40, 40) and 0 <= values.min() < values.max() <= math.log(2) + 1e-6
        assert [len(line.get_xdata()) for line in ax.lines] == [200, 200]
        y = torch.from_numpy(ax.lines[1].get_ydata()) + torch.from_numpy(ax.lines[1].get_xdata()).sin()
        assert 0.05 < y.std() < 0.15  # the second is -sin, with noise .1
    assert all((one != other).any() for one, other in itertools.pairwise(maps))


def shows_iou_and_size(figure):
    iou, size = figure.axes
    expected, *found = [dict(line.get_xydata().tolist()) for line in iou.lines]
    assert expected == {scale: expected_iou(scale) for scale in expected} and len(expected) == 12
    for values in found:
        assert all(abs(values[scale] - expected[scale]) < 0.1 for scale in expected)
    expected, found = [dict(line.get_xydata().tolist()) for line in size.lines[:2]]
    assert expected[1.0] == found[1.0] == 1 and expected[10.0] > 4  # N = 4 masks
    assert [line.get_label() for line in size.lines[2:]] == ["single model", "ensemble of 4"]


def shows_noise(figure, rows):
    for ax, measure in zip(figure.axes, ("accuracy", "ECE"), strict=True):
        assert ax.get_ylabel() == measure and ax.get_xlabel() == "severity of the noise"
        assert len(ax.lines) == 4
        for line in ax.lines:
            cells = rows[f"{measure}, {line.get_label()}"][1:]
            assert [float(cell.strip(" |")) for cell in cells] == pytest.approx(line.get_ydata(), abs=1e-4)


def test_quick_run(tmp_path, capsys, monkeypatch):
    parts = {"mnist": ("train", "t10k"), "fashion-mnist": ("t10k",), "notmnist-small": ("notMNIST_small",)}
    for folder, names in parts.items():
        (tmp_path / folder).mkdir()
        for name in names:
            labels = torch.arange(40) % 10
            images = (labels.view(-1, 1, 1) * 20 + torch.randint(50, (40, 5, 5))).to(torch.uint8)
            for kind, array in (("images-idx3", images), ("labels-idx1", labels.to(torch.uint8))):
                header = struct.pack(f">BBBB{array.dim()}I", 0, 0, 8, array.dim(), *array.shape)
                (tmp_path / folder / f"{name}-{kind}-ubyte").write_bytes(header + array.numpy().tobytes())
    output = tmp_path / "results"
    command = ["--data", str(tmp_path), "--output", str(output), "--quick"]
    figures = saved_figures(monkeypatch)
    assert masksembles.main(command) == 0
    pictures = {f"masksembles-quick-{what}.png" for what in ("figure4", "masks", "noise")}
    assert {path.name for path in output.iterdir()} == {"masksembles-quick.md", *pictures}
    assert set(figures) == pictures
    names = ["single", *(f"Masksembles, S = {s:g}" for s in masksembles.FIGURE_SCALES), "ensemble"]
    shows_entropies_of(figures["masksembles-quick-figure4.png"], names)
    shows_iou_and_size(figures["masksembles-quick-masks.png"])
    page = (output / "masksembles-quick.md").read_text()
    assert page in capsys.readouterr().out
    table_1, _, figure_4 = page.partition("## Figure 4")
    rows, entropies = (
        {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in part.splitlines()}
        for part in (table_1, figure_4)
    )
    for name, size in (("single", "1.0×"), ("MC dropout", "1.0×"), ("ensemble", "4.0×")):
        assert rows[name][3] == size
        numbers = [float(cell) for cell in (*rows[name][1:3], *rows[name][5:9])]
        assert all(0 <= number <= 1 for number in numbers)
    for name in ("single", "Masksembles, S = 1.1", "Masksembles, S = 10", "ensemble"):
        assert all(0 <= float(cell) <= math.log(2) for cell in entropies[name][1:3])
    assert entropies["single"][3] == "0% |"  # one member
    shows_noise(figures["masksembles-quick-noise.png"], rows)
    assert len(rows["accuracy, Masksembles"]) == len(rows["ECE, Masksembles"]) == 7
    assert "commit" in page and "## Speed" not in page


def test_it_names_a_missing_file(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        masksembles.main(["--data", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"--data: load_idx: expected {tmp_path / 'mnist'}" in capsys.readouterr().err


def test_two_sinusoids():
    points = two_sinusoids(1001, noise=0.0, gap=3.0, generator=torch.Generator().manual_seed(1))
    x, y = points.positions.T
    assert points.labels.bincount().tolist() == [501, 500]
    assert -5 <= x.min() < -4.9 and 4.9 < x.max() <= 5
    torch.testing.assert_close(y, x.sin() + torch.where(points.labels == 1, 1.5, -1.5))
    noisy = two_sinusoids(1001, noise=0.5, gap=3.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(noisy.positions[:, 0], x) and torch.equal(noisy.labels, points.labels)
    assert abs((noisy.positions[:, 1] - y).std().item() - 0.5) < 0.05
    again = two_sinusoids(1001, noise=0.5, gap=3.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.positions, noisy.positions)


def test_two_sinusoids_that_cross():
    points = two_sinusoids(500, noise=0.0, gap=0.0, phase=math.pi, generator=torch.Generator().manual_seed(1))
    x, y = points.positions.T
    torch.testing.assert_close(y, torch.where(points.labels == 1, -x.sin(), x.sin()), atol=1e-5, rtol=0)


def test_two_sinusoids_refuse():
    with pytest.raises(ValueError, match="two_sinusoids: num_points: expected at least 1, got 0"):
        two_sinusoids(0)
    with pytest.raises(ValueError, match="two_sinusoids: noise: expected at least 0, got nan"):
        two_sinusoids(5, noise=math.nan)
