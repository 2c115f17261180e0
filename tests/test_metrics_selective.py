"""Risk-coverage and AURC, OOD AUPR and FPR95: against scikit-learn, by hand, and averaged over orders."""

import itertools
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyens import metrics

DTYPES = [torch.float32, torch.float64]
small = st.integers(-3, 3)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------
# Risk-coverage curve


def test_risk_coverage_by_hand():
    confidence = torch.tensor([0.2, 0.9, 0.5, 0.7])
    curve = metrics.risk_coverage_curve(confidence, torch.tensor([True, False, False, True]))
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4], rel=1e-15)
    assert torch.equal(curve.threshold, torch.tensor([0.9, 0.7, 0.5, 0.2]))
    area = metrics.aurc(confidence, torch.tensor([True, False, False, True]))
    assert area.item() == pytest.approx((1 / 2 + 1 / 3 + 2 / 4) / 4, rel=1e-15)


@given(st.lists(st.tuples(st.integers(0, 2), small), min_size=1, max_size=5))
def test_ties_count_as_any_order_does_on_average(examples):
    confidence, losses = (tensor(v) for v in zip(*examples, strict=True))
    risks = []
    for order in itertools.permutations(range(len(examples))):
        order = sorted(order, key=lambda i: -confidence[i].item())  # stable: ties stay in the order drawn
        running = losses[list(order)].cumsum(0)
        risks.append(running / torch.arange(1, len(examples) + 1))
    curve = metrics.risk_coverage_curve(confidence, losses)
    torch.testing.assert_close(curve.risk, torch.stack(risks).mean(0), rtol=0, atol=1e-12)


@given(st.lists(st.tuples(small, small), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_the_order_of_the_examples_does_not_matter(examples, random):
    shuffled = random.sample(examples, len(examples))
    curves = [
        metrics.risk_coverage_curve(*(tensor(v) for v in zip(*e, strict=True))) for e in (examples, shuffled)
    ]
    torch.testing.assert_close(curves[0], curves[1], rtol=0, atol=1e-12)
    mean = tensor([loss for _, loss in examples]).mean()
    torch.testing.assert_close(curves[0].risk[-1], mean, rtol=0, atol=1e-12)


@given(st.lists(st.tuples(small, st.booleans()), min_size=1, max_size=20))
def test_the_best_and_the_worst_confidence_bound_the_area(examples):
    confidence = tensor([c for c, _ in examples])
    losses = torch.tensor([wrong for _, wrong in examples])
    errors = losses.double()
    best, worst = metrics.aurc(-errors, losses), metrics.aurc(errors, losses)
    assert best - 1e-12 <= metrics.aurc(confidence, losses) <= worst + 1e-12
    torch.testing.assert_close(metrics.aurc(0 * errors, losses), errors.mean(), rtol=0, atol=1e-12)


def test_infinite_confidence_and_float_losses():
    confidence = torch.tensor([-math.inf, math.inf, 0.0])
    curve = metrics.risk_coverage_curve(confidence, torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64))
    assert curve.risk.tolist() == [1, 1.5, 2]
    assert curve.threshold.tolist() == [math.inf, 0, -math.inf]


# ------------------------------------------------------------------------------------------------------------
# Out of distribution


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decimals", [0, 1, 6])  # few decimals: many ties
@pytest.mark.parametrize("outside", [1, 19, 20, 21, 100, 170])
def test_ood_scores_agree_with_scikit_learn(dtype, decimals, outside):
    generator = torch.Generator().manual_seed(decimals)
    inside = torch.randn(300, generator=generator).round(decimals=decimals).to(dtype)
    out = (torch.randn(outside, generator=generator) + 0.7).round(decimals=decimals).to(dtype)
    positive, scores = np.r_[np.zeros(300), np.ones(outside)], torch.cat([inside, out])
    expected = sklearn.metrics.average_precision_score(positive, scores)
    assert metrics.ood_aupr(inside, out).item() == pytest.approx(expected, rel=1e-12)
    fpr, tpr, _ = sklearn.metrics.roc_curve(positive, scores, drop_intermediate=False)
    enough = np.round(tpr * outside) * 100 >= 95 * outside  # in whole examples: 19/20 is enough
    assert metrics.ood_fpr95(inside, out).item() == pytest.approx(fpr[enough][0], abs=1e-15)


def test_ood_scores_at_their_limits():
    low, high = torch.tensor([-math.inf, 0.0, 1.0]), torch.tensor([2.0, math.inf])
    assert metrics.ood_aupr(low, high) == 1 and metrics.ood_fpr95(low, high) == 0
    assert metrics.ood_fpr95(high, low) == 1
    assert metrics.ood_aupr(torch.zeros(5), torch.zeros(15)) == 0.75
    assert metrics.ood_fpr95(torch.zeros(5), torch.zeros(15)) == 1


def test_ood_by_hand():
    inside, outside = tensor([1, 2, 4]), tensor([3, 5])
    # 5 is detected alone, 3 together with 5 at the price of a false alarm, 4.
    assert metrics.ood_aupr(inside, outside).item() == pytest.approx((1 + 2 / 3) / 2, rel=1e-15)
    assert metrics.ood_fpr95(inside, outside).item() == pytest.approx(1 / 3, rel=1e-15)


# ------------------------------------------------------------------------------------------------------------
# Devices and bad input


def test_results_stay_on_the_device_and_agree_with_the_cpu(device):
    def measure(confidence, losses):
        return [
            *metrics.risk_coverage_curve(confidence, losses),
            metrics.aurc(confidence, losses > 0),
            metrics.ood_aupr(confidence, losses),
            metrics.ood_fpr95(confidence, losses),
        ]

    x = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).double()
    for there, here in zip(measure(*x.to(device)), measure(*x), strict=True):
        assert there.device.type == device.type
        torch.testing.assert_close(there.cpu(), here, rtol=1e-12, atol=1e-12)


X = torch.tensor([0.5, 0.25, 1.0])


@pytest.mark.parametrize("metric", [metrics.risk_coverage_curve, metrics.aurc], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.tolist(), X), TypeError, "confidence: expected a tensor, got list"),
        ((X[None], X), ValueError, r"confidence: expected shape \[B\], got \[1, 3\]"),
        ((X[:0], X[:0]), ValueError, r"confidence: expected shape \[B\] with B >= 1, got \[0\]"),
        ((X * math.nan, X), ValueError, "confidence: expected no NaN, got 3 of 3"),
        ((X, X[:2]), ValueError, r"losses: expected shape \[3\], that of confidence, got \[2\]"),
        ((X, X[:2] > 0), ValueError, r"losses: expected shape \[3\], that of confidence, got \[2\]"),
        ((X, X.long()), TypeError, "losses: expected float32 or float64, got int64"),
        ((X, X / 0), ValueError, "losses: expected finite values, got 3 of 3 infinite"),
        ((X, X.to("meta") > 0), ValueError, "losses: expected device cpu, that of confidence, got meta"),
    ],
)
def test_bad_losses_are_refused(metric, arguments, error, message):
    with pytest.raises(error, match=f"^{metric.__name__}: {message}"):
        metric(*arguments)


@pytest.mark.parametrize("metric", [metrics.ood_aupr, metrics.ood_fpr95], ids=lambda f: f.__name__)
def test_bad_scores_are_refused(metric):
    with pytest.raises(ValueError, match=rf"^{metric.__name__}: scores_in: .* with B_in >= 1, got \[0\]"):
        metric(X[:0], X)
    with pytest.raises(ValueError, match=rf"^{metric.__name__}: scores_out: expected no NaN"):
        metric(X, X * math.nan)
