"""Bins of equal mass and of classes, streaming, the Brier decomposition, the confusion matrix and AUROC."""

import math

import numpy as np
import pytest
import sklearn.calibration
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyens import metrics

DTYPES = [torch.float32, torch.float64]
seeds = st.integers(0, 2**32 - 1)


def draw(examples, classes, seed=0, sharpness=1.5, dtype=torch.float64):
    """Random probabilities [B, K] and labels [B]."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(examples, classes, generator=generator, dtype=torch.float64)
    return logits.softmax(-1).to(dtype), torch.randint(classes, (examples,), generator=generator)


def error_by_counting(claimed, happened, edges):
    """Σ n/B |mean claimed - mean happened| over the bins (lo, hi] between the edges."""
    total = 0.0
    for lo, hi in zip([-math.inf, *edges], [*edges, math.inf], strict=True):
        inside = (claimed > lo) & (claimed <= hi)
        if inside.any():
            gap = claimed[inside].double().mean() - happened[inside].double().mean()
            total += inside.double().mean().item() * abs(gap.item())
    return total


# ------------------------------------------------------------------------------------------------------------
# Bins of equal mass


def test_equal_mass_agrees_with_scikit_learn():
    # Where n divides B - 1 the quantiles of scikit-learn are order statistics: the very edges of ours.
    p, y = draw(501, 2)
    confidence, right = p.amax(-1), p.argmax(-1) == y
    curve = metrics.reliability_curve(p, y, bins=10, binning="mass")
    accuracy, mean = sklearn.calibration.calibration_curve(right, confidence, n_bins=10, strategy="quantile")
    assert curve.count.tolist() == [51] + [50] * 9
    np.testing.assert_allclose(curve.accuracy, accuracy, rtol=1e-12)
    np.testing.assert_allclose(curve.confidence, mean, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("examples", "bins"), [(200, 1), (200, 7), (5, 15), (1, 3)])
def test_equal_mass_agrees_with_sorting_by_hand(dtype, examples, bins):
    p, y = draw(examples, 4, dtype=dtype)
    confidence = p.amax(-1)
    edges = [confidence.sort().values[math.ceil(i * examples / bins) - 1] for i in range(1, bins)]
    expected = error_by_counting(confidence, p.argmax(-1) == y, edges)
    error = metrics.expected_calibration_error(p, y, bins=bins, binning="mass")
    assert error.item() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    count = metrics.reliability_curve(p, y, bins=bins, binning="mass").count
    assert count.sum() == examples and count.max() - count.min() <= 1


def test_equal_confidences_share_a_bin():
    p = torch.tensor([[0.9, 0.1]] * 5 + [[0.6, 0.4]])
    y = torch.tensor([0, 0, 1, 1, 1, 0])
    curve = metrics.reliability_curve(p, y, bins=3, binning="mass")
    assert curve.count.tolist() == [6, 0, 0]  # the second smallest confidence is 0.9 already
    turned = metrics.reliability_curve(p.flip(0), y.flip(0), bins=3, binning="mass")
    torch.testing.assert_close(turned, curve, equal_nan=True)


# ------------------------------------------------------------------------------------------------------------
# Bins of classes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("binning", ["width", "mass"])
def test_classwise_agrees_with_counting(dtype, binning):
    p, y = draw(300, 4, dtype=dtype)
    errors = []
    for k in range(4):
        if binning == "width":
            edges = (torch.arange(1, 10).double() / 10).to(dtype)
        else:
            edges = [p[:, k].sort().values[math.ceil(30 * i) - 1] for i in range(1, 10)]
        errors.append(error_by_counting(p[:, k], y == k, edges))
    error = metrics.classwise_calibration_error(p, y, bins=10, binning=binning)
    assert error.item() == pytest.approx(sum(errors) / 4, rel=1e-6 if dtype is torch.float32 else 1e-12)


def test_classwise_by_hand():
    p = torch.tensor([[0.75, 0.25], [1.0, 0.0]], dtype=torch.float64)
    # Class 0: (.5, .75] claims .75 and is right, (.75, 1] claims 1 and is wrong.
    # Class 1: (0, .25] holds 0 and .25, a mean of 1/8, of which half came true.
    error = metrics.classwise_calibration_error(p, torch.tensor([0, 1]), bins=4)
    assert error.item() == pytest.approx((0.25 / 2 + 1 / 2 + abs(1 / 8 - 1 / 2)) / 2, rel=1e-14)


def test_calibration_of_one_class_is_perfect():
    p, y = torch.ones(3, 1), torch.zeros(3, dtype=torch.int64)
    assert metrics.expected_calibration_error(p, y) == 0
    assert metrics.classwise_calibration_error(p, y) == 0
    assert metrics.reliability_curve(p, y, bins=4).count.tolist() == [0, 0, 0, 3]


def test_calibration_agrees_with_torchmetrics():
    pytest.importorskip("torchmetrics")
    from torchmetrics.functional.classification import multiclass_calibration_error

    p, y = draw(400, 5)
    theirs = multiclass_calibration_error(p, y, num_classes=5, n_bins=15)
    assert metrics.expected_calibration_error(p, y).item() == pytest.approx(theirs.item(), rel=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Streaming


@given(seeds, st.integers(1, 60), st.integers(1, 4), st.integers(1, 20), st.booleans())
def test_streaming_equals_all_at_once(seed, examples, classes, bins, classwise):
    p, y = draw(examples, classes, seed)
    first, second = (metrics.CalibrationError(bins=bins, classwise=classwise) for _ in range(2))
    cut = examples // 3
    for rows in (slice(0, cut), slice(cut, 2 * cut)):
        if cut:
            first.update(p[rows], y[rows])
    second.update(p[2 * cut :], y[2 * cut :])
    first.merge(second)
    first.merge(metrics.CalibrationError(bins=bins, classwise=classwise))  # nothing
    whole = metrics.classwise_calibration_error if classwise else metrics.expected_calibration_error
    torch.testing.assert_close(first.compute(), whole(p, y, bins=bins), rtol=0, atol=1e-13)
    if not classwise:
        curve = metrics.reliability_curve(p, y, bins=bins)
        torch.testing.assert_close(first.curve(), curve, rtol=0, atol=1e-13, equal_nan=True)


def test_streaming_refuses_what_does_not_belong_together():
    error = metrics.CalibrationError(classwise=True)
    with pytest.raises(ValueError, match=r"^CalibrationError.compute: expected at least one update"):
        error.compute()
    error.update(*draw(4, 3))
    with pytest.raises(
        ValueError, match=r"^CalibrationError.update: probabilities: expected K = 3 as before, got 2"
    ):
        error.update(*draw(4, 2))
    with pytest.raises(ValueError, match=r"^CalibrationError.curve: classwise: expected False"):
        error.curve()
    with pytest.raises(
        ValueError, match=r"merge: other: expected bins=15, classwise=True, got bins=15, classwise=False"
    ):
        error.merge(metrics.CalibrationError())
    with pytest.raises(ValueError, match=r"^CalibrationError: bins: expected at least 1, got 0"):
        metrics.CalibrationError(bins=0)
    with pytest.raises(ValueError, match=r"^CalibrationError.update: labels: expected values in 0\.\.2"):
        error.update(draw(2, 3)[0], torch.tensor([0, 3]))


# ------------------------------------------------------------------------------------------------------------
# Brier decomposition


@given(seeds, st.integers(1, 80), st.integers(1, 6), st.integers(1, 12), st.sampled_from(DTYPES))
def test_the_parts_add_up_to_the_brier_score(seed, examples, classes, bins, dtype):
    p, y = draw(examples, classes, seed, dtype=dtype)
    parts = metrics.brier_decomposition(p, y, bins=bins)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bins
    torch.testing.assert_close(total, metrics.brier_score(p, y), rtol=0, atol=1e-13)
    assert all(part >= 0 for part in parts[:3])
    assert parts.uncertainty <= 1 - 1 / classes + 1e-12


def test_brier_decomposition_by_hand():
    p = torch.tensor([[0.8, 0.2]] * 4 + [[0.4, 0.6]] * 4, dtype=torch.float64)
    y = torch.tensor([0, 0, 0, 1, 0, 0, 1, 1])
    parts = metrics.brier_decomposition(p, y, bins=2)
    # Two forecasts, of which .75 and .5 come true; the base rate is 5/8. Both classes give the same.
    assert parts.reliability.item() == pytest.approx(2 * (0.05**2 + 0.1**2) / 2, rel=1e-12)
    assert parts.resolution.item() == pytest.approx(2 * (0.125**2 + 0.125**2) / 2, rel=1e-12)
    assert parts.uncertainty.item() == pytest.approx(2 * 5 / 8 * 3 / 8, rel=1e-12)
    assert parts.within_bins.item() == pytest.approx(0, abs=1e-15)  # every bin holds one value


# ------------------------------------------------------------------------------------------------------------
# Confusion matrix and AUROC


@pytest.mark.parametrize("classes", [2, 5])
def test_confusion_matrix_agrees_with_scikit_learn(classes):
    p, y = draw(200, classes)
    expected = sklearn.metrics.confusion_matrix(y, p.argmax(-1), labels=range(classes))
    assert metrics.confusion_matrix(p, y).tolist() == expected.tolist()
    assert metrics.confusion_matrix(p[:0], y[:0]).tolist() == np.zeros((classes, classes)).tolist()


def test_confusion_of_one_class():
    assert metrics.confusion_matrix(torch.ones(3, 1), torch.zeros(3, dtype=torch.int64)).tolist() == [[3]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_auroc_agrees_with_scikit_learn(dtype):
    scores = torch.randn(300, generator=torch.Generator().manual_seed(0)).round(decimals=1).to(dtype)
    positive = draw(300, 2)[1] == 1
    expected = sklearn.metrics.roc_auc_score(positive, scores)
    assert metrics.auroc(scores, positive).item() == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Devices and bad input


def test_results_stay_on_the_device_and_agree_with_the_cpu(device):
    def measure(p, y):
        stream = metrics.CalibrationError()
        stream.update(p, y)
        return [
            metrics.expected_calibration_error(p, y, binning="mass"),
            metrics.classwise_calibration_error(p, y),
            stream.compute(),
            *metrics.brier_decomposition(p, y),
            metrics.confusion_matrix(p, y),
            metrics.auroc(p[:, 0], y == 0),
        ]

    p, y = draw(100, 4)
    for there, here in zip(measure(p.to(device), y.to(device)), measure(p, y), strict=True):
        assert there.device.type == device.type
        torch.testing.assert_close(there.cpu(), here, rtol=1e-12, atol=1e-14)


P, Y = draw(4, 3)


@pytest.mark.parametrize(
    "metric", [metrics.classwise_calibration_error, metrics.brier_decomposition], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((P[:0], Y[:0]), ValueError, r"probabilities: expected shape \[B, K\] with B >= 1, got \[0, 3\]"),
        ((2 * P, Y), ValueError, "probabilities: expected rows that sum to 1"),
        ((P * math.nan, Y), ValueError, "probabilities: expected no NaN, got 12 of 12"),
        ((P, Y + 3), ValueError, r"labels: expected values in 0\.\.2, got "),
        ((P, Y[:2]), ValueError, r"labels: expected shape \[4\]"),
    ],
)
def test_bad_predictions_are_refused(metric, arguments, error, message):
    with pytest.raises(error, match=f"^{metric.__name__}: {message}"):
        metric(*arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: metrics.expected_calibration_error(P, Y, binning="equal"),
            ValueError,
            "^expected_calibration_error: binning: expected width or mass, got 'equal'",
        ),
        (
            lambda: metrics.reliability_curve(P, Y, bins=True),
            TypeError,
            "^reliability_curve: bins: expected an int, got bool",
        ),
        (
            lambda: metrics.confusion_matrix(P, Y.double()),
            TypeError,
            "^confusion_matrix: labels: expected int64, got float64",
        ),
        (lambda: metrics.auroc(P[:, 0], Y), TypeError, "^auroc: positive: expected bool, got int64"),
        (
            lambda: metrics.auroc(P[:, 0], Y >= 0),
            ValueError,
            "^auroc: positive: expected both False and True, got only True",
        ),
        (
            lambda: metrics.auroc(P[:, 0], Y[:2] > 0),
            ValueError,
            r"^auroc: positive: expected shape \[4\], that of scores, got \[2\]",
        ),
    ],
)
def test_other_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
