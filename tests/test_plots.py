"""pyens.plots: what is drawn are the numbers that were given, on the axes that were given."""

import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pyens import metrics, plots


@pytest.fixture
def ax():
    return Figure().add_subplot()


def predictions(examples=200, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probabilities = (2 * torch.randn(examples, classes, generator=generator)).softmax(-1)
    return probabilities, torch.randint(classes, (examples,), generator=generator)


def line(ax, label):
    (found,) = [line for line in ax.get_lines() if line.get_label() == label]
    return found


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_reliability_diagram_draws_the_bins_that_have_examples(ax):
    curves = {
        "single": metrics.reliability_curve(*predictions(seed=0), bins=10),
        "ensemble": metrics.reliability_curve(*predictions(seed=1), bins=10),
    }
    assert plots.reliability_diagram(curves, ax) is ax
    for name, curve in curves.items():
        filled = curve.count > 0
        assert 0 < filled.sum() < 10  # of four classes the largest probability is never below 1/4
        np.testing.assert_array_equal(line(ax, name).get_xdata(), curve.confidence[filled])
        np.testing.assert_array_equal(line(ax, name).get_ydata(), curve.accuracy[filled])
    np.testing.assert_array_equal(line(ax, "perfectly calibrated").get_xydata(), [[0, 0], [1, 1]])
    assert legend(ax) == ["perfectly calibrated", "single", "ensemble"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("confidence (max p)", "accuracy")


def test_the_line_leaves_out_bins_of_few_examples(ax):
    curve = metrics.reliability_curve(*predictions(), bins=10)
    few = curve.count[curve.count > 0].sort().values[1].item()
    plots.reliability_diagram({"one": curve}, ax, joined=few + 1)
    enough = curve.count > few
    assert 0 < enough.sum() < (curve.count > 0).sum()
    np.testing.assert_array_equal(line(ax, "one").get_xdata(), curve.confidence[enough])
    assert len(ax.collections[0].get_offsets()) == (curve.count > 0).sum()


def test_points_grow_with_the_share_of_examples(ax):
    curve = metrics.reliability_curve(*predictions(), bins=10)
    plots.reliability_diagram({"one": curve}, ax)
    (points,) = ax.collections
    areas, count = points.get_sizes(), curve.count[curve.count > 0]
    assert areas.argsort().tolist() == count.argsort().tolist()


def test_confidence_curves_draw_shares_against_ascending_thresholds(ax):
    p, y = predictions()
    curves = {
        "known": metrics.confidence_curve(p, y),
        "unknown": metrics.confidence_curve(p[:50], thresholds=[0.9, 0.2, 0.5]),
    }
    assert plots.confidence_curves(curves, ax) is ax
    np.testing.assert_array_equal(line(ax, "known").get_ydata(), curves["known"].answered)
    np.testing.assert_array_equal(line(ax, "unknown").get_xdata(), [0.2, 0.5, 0.9])
    np.testing.assert_array_equal(line(ax, "unknown").get_ydata(), curves["unknown"].answered[[1, 2, 0]])
    assert legend(ax) == ["known", "unknown"]
    assert ax.get_xlabel() and ax.get_ylabel()


def test_risk_coverage_curves_draw_risk_against_coverage(ax):
    p, y = predictions()
    curves = {
        "max p": metrics.risk_coverage_curve(p.amax(-1), p.argmax(-1) != y),
        "entropy": metrics.risk_coverage_curve(-metrics.predictive_entropy(p), p.argmax(-1) != y),
    }
    assert plots.risk_coverage_curves(curves, ax, ylabel="error rate") is ax
    for name, curve in curves.items():
        np.testing.assert_array_equal(line(ax, name).get_xdata(), curve.coverage)
        np.testing.assert_array_equal(line(ax, name).get_ydata(), curve.risk)
    assert legend(ax) == ["max p", "entropy"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("coverage (share answered)", "error rate")


def test_confusion_shows_the_shares_of_each_true_class(ax):
    matrix = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 2, 2]])
    assert plots.confusion(matrix, ["a", "b", "c"], ax) is ax
    (image,) = ax.get_images()
    shown = image.get_array().filled(np.nan)
    np.testing.assert_array_equal(shown, [[0.75, 0.25, 0], [np.nan] * 3, [0, 0.5, 0.5]])
    written = {text.get_position(): text.get_text() for text in ax.texts}  # (column, row)
    assert written[0, 0] == "0.75" and written[1, 2] == "0.50" and len(written) == 6
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["a", "b", "c"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")
    assert [t.get_text() for t in plots.confusion(matrix).get_yticklabels()] == ["0", "1", "2"]


def test_correlation_matrix_shows_the_numbers(ax):
    generator = torch.Generator().manual_seed(0)
    variations = torch.rand(1, 50, generator=generator) + 0.2 * torch.rand(3, 50, generator=generator)
    variations[1] = 0.0  # a setting that does not vary has no correlation
    matrix = torch.corrcoef(variations)
    assert plots.correlation_matrix(matrix, ["R0", "R1", "R2"], ax=ax) is ax
    (image,) = ax.get_images()
    np.testing.assert_allclose(image.get_array().filled(np.nan), matrix.double())
    smallest = matrix[0, 2].item()
    low, high = image.get_clim()
    assert high == 1 and low <= smallest < low + 0.1 and low > 0.5
    written = {text.get_position(): text.get_text() for text in ax.texts}  # (column, row)
    assert written == {(c, r): "1.00" if c == r else f"{smallest:.2f}" for c in (0, 2) for r in (0, 2)}
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert [tick.get_text() for tick in labels] == ["R0", "R1", "R2"]


def test_correlation_matrix_of_two_sets():
    matrix = torch.tensor([[-0.95, 0.25], [0.5, 0.75], [1.0, 0.125]])
    ax = plots.correlation_matrix(matrix, ["a", "b", "c"], ["d", "e"], label="rank correlation")
    (image,) = ax.get_images()
    np.testing.assert_array_equal(image.get_array(), matrix)
    assert image.get_clim() == (-1, 1)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b", "c"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["d", "e"]
    assert "rank correlation" in [axes.get_ylabel() for axes in ax.figure.axes]
    alike = plots.correlation_matrix(torch.ones(2, 2), ["a", "b"]).get_images()[0].get_clim()
    assert alike == (0.9, 1)


def test_prediction_differences_are_drawn_over_ascending_strengths(ax):
    differences = {"Δ1": torch.tensor([0.004, 0.08, 0.005]), "Δ2": torch.tensor([0.002, 0.03, 0.003])}
    assert plots.prediction_differences([0.1, 0, 0.05], differences, ax) is ax
    for name, values in differences.items():
        np.testing.assert_array_equal(line(ax, name).get_xdata(), [0, 0.05, 0.1])
        np.testing.assert_array_equal(line(ax, name).get_ydata(), values[[1, 2, 0]].double())
    assert (ax.get_xscale(), ax.get_yscale()) == ("symlog", "log")
    assert legend(ax) == ["Δ1", "Δ2"]
    assert "λ" in ax.get_xlabel() and ax.get_ylabel() == "prediction difference"


def test_histograms_are_shares_of_each_group_over_common_bins(ax):
    generator = torch.Generator().manual_seed(0)
    groups = {
        "known": torch.rand(300, generator=generator),
        "unknown": 1 + torch.rand(40, generator=generator),
    }
    assert plots.uncertainty_histograms(groups, ax, xlabel="mutual information [nats]", bins=8) is ax
    assert ax.get_xlabel() == "mutual information [nats]"
    assert legend(ax) == ["known", "unknown"]
    for bars, values in zip(ax.containers, groups.values(), strict=True):
        edges = np.array([bar.get_x() for bar in bars])
        heights = np.array([bar.get_height() for bar in bars])
        assert heights.sum() == pytest.approx(1)
        expected, expected_edges = np.histogram(
            values.double(), 8, (groups["known"].min().item(), groups["unknown"].max().item())
        )
        np.testing.assert_allclose(edges, expected_edges[:-1])
        np.testing.assert_allclose(heights, expected / len(values))


@pytest.mark.parametrize(
    ("plot", "arguments", "error", "message"),
    [
        (plots.confusion, ([[1]],), TypeError, "confusion: matrix: expected a tensor, got list"),
        (plots.confusion, (torch.ones(2, 3),), ValueError, r"matrix: expected shape \[K, K\].*got \[2, 3\]"),
        (plots.confusion, (-torch.ones(2, 2),), ValueError, "matrix: expected counts >= 0"),
        (plots.confusion, (torch.ones(2, 2), ["a"]), ValueError, "names: expected 2, .*, got 1"),
        (plots.correlation_matrix, ([[1]], ["a"]), TypeError, "matrix: expected a tensor, got list"),
        (plots.correlation_matrix, (torch.ones(2), ["a"]), ValueError, r"expected shape \[R, C\], got \[2\]"),
        (
            plots.correlation_matrix,
            (torch.tensor([[1.1]]), ["a"]),
            ValueError,
            r"correlation_matrix: matrix: expected values in \[-1, 1\], got 1\.1",
        ),
        (plots.correlation_matrix, (torch.ones(2, 2), ["a"]), ValueError, "names: expected 2 names, got 1"),
        (
            plots.correlation_matrix,
            (torch.ones(2, 1), ["a", "b"]),
            ValueError,
            "columns: expected 1 names, got 2",
        ),
        (plots.prediction_differences, ([0.1], {}), ValueError, "differences: expected at least one Tensor"),
        (
            plots.prediction_differences,
            ([0.1, 0.2], {"Δ1": torch.ones(3)}),
            ValueError,
            r"differences\['Δ1'\]: .* \[2\], got shape \[3\]",
        ),
        (
            plots.prediction_differences,
            ([0.1], {"Δ1": torch.zeros(1)}),
            ValueError,
            r"differences\['Δ1'\]: expected finite values > 0",
        ),
        (
            plots.prediction_differences,
            ([-0.1], {"Δ1": torch.ones(1)}),
            ValueError,
            "strengths: expected one or more finite numbers >= 0",
        ),
    ],
)
def test_bad_matrices_and_differences_are_refused(plot, arguments, error, message):
    with pytest.raises(error, match=message):
        plot(*arguments)


def test_lines_differ_in_colour_and_in_style(ax):
    p, _ = predictions()
    plots.confidence_curves({str(i): metrics.confidence_curve(p) for i in range(4)}, ax)
    lines = ax.get_lines()
    assert len({entry.get_color() for entry in lines}) == len({entry.get_linestyle() for entry in lines}) == 4


def test_without_axes_a_figure_is_made_and_pyplot_is_left_alone():
    before = "matplotlib.pyplot" in sys.modules
    ax = plots.confidence_curves({"one": metrics.confidence_curve(predictions()[0])})
    assert isinstance(ax.figure, Figure)
    assert ("matplotlib.pyplot" in sys.modules) == before


@pytest.mark.parametrize(
    ("suffix", "magic"), [("png", b"\x89PNG\r\n\x1a\n"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_save_figure_writes_the_named_format(tmp_path, suffix, magic):
    ax = plots.uncertainty_histograms({"all": torch.arange(9.0)})
    path = plots.save_figure(ax.figure, tmp_path / f"picture.{suffix}")
    assert path.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_picture(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    class Broken(Figure):
        def savefig(self, fname, **options):
            with open(fname, "wb") as file:
                file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        plots.save_figure(Broken(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("plot", "items", "error", "message"),
    [
        (plots.reliability_diagram, [], TypeError, "curves: expected a mapping .*, got list"),
        (plots.reliability_diagram, {}, ValueError, "curves: expected at least one ReliabilityCurve"),
        (
            plots.reliability_diagram,
            {"a": 1},
            TypeError,
            r"curves\['a'\]: expected a ReliabilityCurve, got int",
        ),
        (plots.confidence_curves, {"a": None}, TypeError, r"curves\['a'\]: expected a ConfidenceCurve"),
        (plots.uncertainty_histograms, {}, ValueError, "uncertainties: expected at least one Tensor"),
        (
            plots.uncertainty_histograms,
            {"a": torch.ones(2, 3)},
            ValueError,
            r"uncertainties\['a'\]: .* \[2, 3\]",
        ),
        (plots.uncertainty_histograms, {"a": torch.ones(0)}, ValueError, r"uncertainties\['a'\]: .* \[0\]"),
        (
            plots.uncertainty_histograms,
            {"a": torch.tensor([torch.nan])},
            ValueError,
            "expected finite values",
        ),
    ],
)
def test_bad_input_is_refused(ax, plot, items, error, message):
    with pytest.raises(error, match=message):
        plot(items, ax)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install pyens\[plots\]"):
        plots.new_figure()
