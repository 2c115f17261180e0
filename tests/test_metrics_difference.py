"""Prediction difference against its definitions written out, and the properties it has."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyens import metrics

DIFFERENCES = [
    metrics.prediction_difference,
    metrics.relative_prediction_difference,
    metrics.hamming_prediction_difference,
]


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1).to(dtype)


@st.composite
def models(draw_):
    shape = [draw_(st.integers(1, 5)) for _ in range(3)]
    return draw(*shape, seed=draw_(st.integers(0, 2**32 - 1)))


@given(models())
def test_agree_with_their_definitions(p):
    count, examples, classes = p.shape
    labels = torch.arange(examples) % classes
    sums = dict.fromkeys(("1", "2", "r", "L", "H"), 0.0)
    for b in range(examples):
        mean = [sum(p[m, b, k].item() for m in range(count)) / count for k in range(classes)]
        for m in range(count):
            gaps = [abs(p[m, b, k].item() - mean[k]) for k in range(classes)]
            sums["1"] += sum(gaps) / count
            sums["2"] += math.sqrt(sum(g * g for g in gaps)) / count
            sums["r"] += sum(g / v for g, v in zip(gaps, mean, strict=True)) / count
            sums["L"] += gaps[labels[b]] / mean[labels[b]] / count
            for n in range(m):
                differ = p[m, b].argmax() != p[n, b].argmax()
                sums["H"] += differ.item() * 2 / (count * (count - 1))
    close = {name: pytest.approx(value / examples, rel=1e-10, abs=1e-12) for name, value in sums.items()}
    assert metrics.prediction_difference(p).item() == close["1"]
    assert metrics.prediction_difference(p, norm=2).item() == close["2"]
    assert metrics.relative_prediction_difference(p).item() == close["r"]
    assert metrics.label_prediction_difference(p, labels).item() == close["L"]
    assert metrics.hamming_prediction_difference(p).item() == close["H"]


@given(models(), st.integers(0, 2**32 - 1))
def test_the_order_of_the_models_does_not_matter(p, seed):
    order = torch.randperm(len(p), generator=torch.Generator().manual_seed(seed))
    for difference in DIFFERENCES:
        torch.testing.assert_close(difference(p[order]), difference(p), rtol=1e-12, atol=1e-12)


@given(models())
def test_norms_bound_each_other(p):
    first, second = metrics.prediction_difference(p), metrics.prediction_difference(p, norm=2)
    assert second <= first + 1e-12
    assert first <= math.sqrt(p.shape[-1]) * second + 1e-12
    assert 0 <= first <= 2


def test_two_models_of_a_binary_label():
    # What section 3 of the paper says of M = 2: the mean of |P_1(1) - P_2(1)|.
    p = draw(2, 50, 2)
    expected = (p[0, :, 1] - p[1, :, 1]).abs().mean()
    torch.testing.assert_close(metrics.prediction_difference(p), expected)


def test_the_positive_label_alone():
    p = torch.tensor(
        [[0.2, 0.0], [0.6, 0.0]], dtype=torch.float64
    )  # of the second example, no model says yes
    difference = metrics.relative_prediction_difference(p)
    assert difference.item() == pytest.approx((0.2 / 0.4) / 2, rel=1e-14)
    both = torch.stack([1 - p, p], -1)
    of_negative = (0.2 / 0.6) / 2
    expected = difference.item() + of_negative
    assert metrics.relative_prediction_difference(both).item() == pytest.approx(expected, rel=1e-14)


def test_labels_no_model_gives_any_probability_add_nothing():
    p = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    assert metrics.relative_prediction_difference(p) == 0
    assert metrics.label_prediction_difference(p, torch.tensor([1])) == 0


@pytest.mark.parametrize("count", [1, 4])
def test_models_that_agree_do_not_differ(count):
    p = draw(1, 20, 3).expand(count, -1, -1)
    labels = torch.zeros(20, dtype=torch.int64)
    for difference in DIFFERENCES:
        assert difference(p).abs() < 1e-14
    assert metrics.label_prediction_difference(p, labels).abs() < 1e-14


def test_certain_models_that_all_differ():
    p = torch.eye(3)[:, None]  # [3, 1, 3]
    assert metrics.hamming_prediction_difference(p) == 1
    assert metrics.prediction_difference(p).item() == pytest.approx(4 / 3, rel=1e-6)
    assert metrics.label_prediction_difference(p, torch.tensor([0])).item() == pytest.approx(4 / 3, rel=1e-6)


def test_results_stay_on_the_device_and_agree_with_the_cpu(device):
    def measure(p, labels):
        return [*(d(p) for d in DIFFERENCES), metrics.label_prediction_difference(p, labels)]

    p, labels = draw(4, 60, 3), torch.arange(60) % 3
    for there, here in zip(measure(p.to(device), labels.to(device)), measure(p, labels), strict=True):
        assert there.device.type == device.type
        torch.testing.assert_close(there.cpu(), here, rtol=1e-12, atol=0)


P = draw(2, 4, 3)


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("probabilities", "error", "message"),
    [
        (P.half(), TypeError, "probabilities: expected float32 or float64, got float16"),
        (P[0, 0], ValueError, r"probabilities: expected shape .*\[M, B, K\], got \[3\]"),
        (P[:0], ValueError, r"with M >= 1, got \[0, 4, 3\]"),
        (P[:, :0], ValueError, r"with B >= 1, got \[2, 0, 3\]"),
        (P / 2, ValueError, "probabilities: expected rows that sum to 1"),
        (P * math.nan, ValueError, "probabilities: expected no NaN"),
    ],
)
def test_bad_probabilities_are_refused(difference, probabilities, error, message):
    with pytest.raises(error, match=f"^{difference.__name__}: .*{message}"):
        difference(probabilities)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"^prediction_difference: norm: expected 1 or 2, got 3"):
        metrics.prediction_difference(P, norm=3)
    with pytest.raises(ValueError, match=r"^label_prediction_difference: labels: expected values in 0\.\.2"):
        metrics.label_prediction_difference(P, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"^label_prediction_difference: labels: expected shape \[4\]"):
        metrics.label_prediction_difference(P, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"probabilities: expected values in \[0, 1\], got .* to 1.5"):
        metrics.relative_prediction_difference(torch.tensor([[0.5, 1.5]]))
