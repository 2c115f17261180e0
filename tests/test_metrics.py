"""pyens.metrics against scikit-learn and SciPy, against counting by hand, and by the properties they have."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.calibration
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyens import metrics

DTYPES = [torch.float32, torch.float64]


def draw(*shape, seed=0, dtype=torch.float64, sharpness=2.0):
    """Random distributions along the last axis."""
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1).to(dtype)


def draw_labels(examples, classes, seed=1):
    return torch.randint(classes, (examples,), generator=torch.Generator().manual_seed(seed))


def renormalised(probabilities):
    """As float64 whose rows sum to 1 to the last bit or so, which scikit-learn insists on."""
    values = probabilities.double().numpy()
    return values / values.sum(-1, keepdims=True)


seeds = st.integers(0, 2**32 - 1)


@st.composite
def ensembles(draw_, max_members=6):
    """[E, B, K] distributions, from nearly uniform to nearly one-hot."""
    shape = [draw_(st.integers(1, n)) for n in (max_members, 5, 6)]
    return draw(*shape, seed=draw_(seeds), sharpness=draw_(st.sampled_from([0.01, 1.0, 20.0])))


# ------------------------------------------------------------------------------------------------------------
# Classification, against scikit-learn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_classification_scores_agree_with_scikit_learn(dtype, classes):
    p = draw(301, classes, dtype=dtype)
    y = draw_labels(301, classes)
    every_class = np.arange(classes)
    tolerance = {"rel": 1e-6 if dtype is torch.float32 else 1e-12}

    assert metrics.accuracy(p, y).item() == pytest.approx(sklearn.metrics.accuracy_score(y, p.argmax(-1)))
    expected = sklearn.metrics.log_loss(y, renormalised(p), labels=every_class)
    assert metrics.nll(p, y).item() == pytest.approx(expected, **tolerance)
    expected = sklearn.metrics.brier_score_loss(
        y, renormalised(p), labels=every_class, pos_label=1 if classes == 2 else None, scale_by_half=False
    )
    assert metrics.brier_score(p, y).item() == pytest.approx(expected, **tolerance)


def test_classification_scores_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.9, 0.0]], dtype=torch.float64)
    y = torch.tensor([1, 1])
    assert metrics.accuracy(p, y) == 0.5
    assert metrics.nll(p, y).item() == pytest.approx(-(math.log(0.25) + math.log(0.9)) / 2, rel=1e-14)
    assert metrics.brier_score(p, y).item() == pytest.approx((0.25 + 0.5625 + 0.0625 + 0.02) / 2, rel=1e-14)


def test_certain_predictions():
    p = torch.eye(3)
    right, wrong = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    assert [m(p, right).item() for m in (metrics.accuracy, metrics.nll, metrics.brier_score)] == [1, 0, 0]
    assert [m(p, wrong).item() for m in (metrics.accuracy, metrics.nll, metrics.brier_score)] == [
        0,
        math.inf,
        2,
    ]


def test_the_first_of_tied_classes_is_the_prediction():
    p = torch.full((2, 4), 0.25)
    assert metrics.accuracy(p, torch.tensor([0, 1])) == 0.5


def test_float32_input_is_averaged_in_float64():
    p = torch.tensor([[0.9, 0.1]]).expand(2**20, 2)
    y = torch.zeros(2**20, dtype=torch.int64)
    assert metrics.nll(p, y).item() == pytest.approx(-math.log(p[0, 0].item()), rel=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Calibration


def test_reliability_curve_agrees_with_scikit_learn():
    # Two classes whose prediction is class 1 when p_1 > 0.5: then "predicted right" is what calibration_curve
    # calls the positive class.
    p = draw(500, 2, sharpness=1.0)
    y = draw_labels(500, 2)
    curve = metrics.reliability_curve(p, y, bins=10)
    accuracy, confidence = sklearn.calibration.calibration_curve(p.argmax(-1) == y, p.amax(-1), n_bins=10)
    filled = curve.count > 0
    np.testing.assert_allclose(curve.accuracy[filled], accuracy, rtol=1e-12)
    np.testing.assert_allclose(curve.confidence[filled], confidence, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bins", [1, 2, 7, 15])
def test_calibration_agrees_with_a_loop_over_bins(dtype, bins):
    p = draw(400, 5, dtype=dtype, sharpness=1.5)
    y = draw_labels(400, 5)
    confidence, correct = p.amax(-1).double(), p.argmax(-1) == y
    curve = metrics.reliability_curve(p, y, bins=bins)
    expected = 0.0
    for i in range(bins):
        members = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        assert curve.count[i] == members.sum()
        if members.any():
            gap = correct[members].double().mean() - confidence[members].mean()
            expected += members.double().mean() * gap.abs()
            assert curve.confidence[i].item() == pytest.approx(confidence[members].mean().item(), rel=1e-12)
            assert curve.accuracy[i].item() == pytest.approx(
                correct[members].double().mean().item(), rel=1e-12
            )
        else:
            assert curve.confidence[i].isnan() and curve.accuracy[i].isnan()
    ece = metrics.expected_calibration_error(p, y, bins=bins)
    assert ece.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (curve.confidence.dtype, curve.accuracy.dtype, curve.count.dtype) == (
        torch.float64,
        torch.float64,
        torch.int64,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_edge_belongs_to_the_bin_below_it(dtype):
    tenths = torch.arange(1, 11, dtype=torch.float64) / 10
    # Ten classes, so that a maximum of 0.1 exists; the rest is spread evenly over the other nine.
    p = torch.empty(10, 10, dtype=torch.float64)
    p[:, 0] = tenths
    p[:, 1:] = ((1 - tenths) / 9)[:, None]
    p = p.to(dtype)
    p[:, 0] = tenths.to(dtype)
    p[0] = p[0, 0]
    curve = metrics.reliability_curve(p, torch.zeros(10, dtype=torch.int64), bins=10)
    assert curve.count.tolist() == [1] * 10  # (0, .1], (.1, .2], ..., (.9, 1]


def test_confidence_a_rounding_error_above_one_is_in_the_last_bin():
    p = torch.tensor([[1.0000001, 0.0], [1.0, 0.0]])
    assert metrics.reliability_curve(p, torch.tensor([0, 1]), bins=4).count.tolist() == [0, 0, 0, 2]


def test_ece_by_hand():
    p = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.6, 0.4], [0.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 1])  # right, wrong, wrong, right
    expected = 2 / 4 * abs(0.5 - 0.8) + 1 / 4 * 0.6 + 1 / 4 * 0.0
    assert metrics.expected_calibration_error(p, y, bins=10).item() == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Uncertainty over the member axis


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropies_agree_with_scipy(dtype):
    members = draw(7, 50, 4, dtype=dtype)
    tolerance = {"rtol": 2e-6 if dtype is torch.float32 else 1e-11}
    values = members.double().numpy()
    of_mean = scipy.stats.entropy(values.mean(0), axis=-1)
    of_members = scipy.stats.entropy(values, axis=-1).mean(0)
    divergence = scipy.stats.entropy(values, values.mean(0, keepdims=True), axis=-1).mean(0)

    np.testing.assert_allclose(metrics.predictive_entropy(members), of_mean, **tolerance)
    np.testing.assert_allclose(metrics.predictive_entropy(members.mean(0)), of_mean, **tolerance)
    np.testing.assert_allclose(metrics.expected_entropy(members), of_members, **tolerance)
    np.testing.assert_allclose(metrics.mutual_information(members), divergence, atol=1e-7, **tolerance)
    for measure in (metrics.predictive_entropy, metrics.expected_entropy, metrics.mutual_information):
        assert measure(members).dtype == dtype


def test_zero_probabilities_add_nothing_to_an_entropy():
    p = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]])
    assert metrics.predictive_entropy(p).tolist() == pytest.approx([0.0, math.log(2)], rel=1e-6)
    assert metrics.expected_entropy(p).tolist() == pytest.approx([0.0, math.log(2)], rel=1e-6)


def test_certain_members_that_all_differ_have_the_largest_mutual_information():
    members = torch.eye(4, dtype=torch.float64)[:, None]  # [4, 1, 4]
    assert metrics.mutual_information(members).item() == pytest.approx(math.log(4), rel=1e-12)
    assert metrics.expected_entropy(members).item() == 0


@given(ensembles())
def test_entropies_are_ordered_and_bounded(members):
    total = metrics.predictive_entropy(members)
    expected = metrics.expected_entropy(members)
    disagreement = metrics.mutual_information(members)
    bound = math.log(min(members.shape[0], members.shape[2]))
    assert (disagreement >= 0).all() and (disagreement <= bound + 1e-12).all()
    assert (expected >= 0).all() and (total <= math.log(members.shape[2]) + 1e-12).all()
    torch.testing.assert_close(total, expected + disagreement, rtol=0, atol=1e-12)


@given(ensembles(), seeds)
def test_the_order_of_the_members_does_not_matter(members, seed):
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))
    for measure in (
        metrics.predictive_entropy,
        metrics.expected_entropy,
        metrics.mutual_information,
        metrics.predictive_variance,
    ):
        torch.testing.assert_close(measure(members[order]), measure(members), rtol=0, atol=1e-12)


@given(ensembles(max_members=1), st.integers(1, 40))
def test_identical_members_do_not_disagree(member, copies):
    members = member.expand(copies, -1, -1)
    torch.testing.assert_close(
        metrics.mutual_information(members), torch.zeros(member.shape[1]).double(), rtol=0, atol=1e-13
    )
    assert (metrics.mutual_information(members) >= 0).all()
    assert metrics.predictive_variance(members).max() < 1e-30


@pytest.mark.parametrize("shape", [(5, 8), (5, 8, 3)])
@pytest.mark.parametrize("unbiased", [False, True])
def test_variance_agrees_with_torch_and_survives_an_offset(shape, unbiased):
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1000
    expected = outputs.double().var(0, correction=int(unbiased))
    variance = metrics.predictive_variance(outputs, unbiased=unbiased)
    assert variance.dtype == torch.float32
    torch.testing.assert_close(variance.double(), expected, rtol=1e-6, atol=0)


def test_variance_of_one_member():
    outputs = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    assert metrics.predictive_variance(outputs).tolist() == [0, 0, 0, 0]
    assert metrics.predictive_variance(outputs, unbiased=True).isnan().all()


def test_measures_per_example_accept_an_empty_batch():
    members = torch.empty(3, 0, 4)
    for measure in (metrics.predictive_entropy, metrics.expected_entropy, metrics.mutual_information):
        assert measure(members).shape == (0,)
    assert metrics.predictive_variance(members).shape == (0, 4)


@pytest.mark.parametrize(
    "measure", [metrics.predictive_entropy, metrics.expected_entropy, metrics.mutual_information]
)
def test_entropies_are_differentiable(measure):
    logits = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: measure(z.softmax(-1)), logits.requires_grad_())


# ------------------------------------------------------------------------------------------------------------
# Confidence curve


@pytest.mark.parametrize("dtype", DTYPES)
def test_confidence_curve_agrees_with_counting(dtype):
    p = draw(200, 4, dtype=dtype)
    y = draw_labels(200, 4)
    thresholds = [0.9, 0.3, 0.5, 1.0, 0.0]
    curve = metrics.confidence_curve(p, y, thresholds=thresholds)
    confidence, correct = p.amax(-1), p.argmax(-1) == y
    assert curve.threshold.tolist() == thresholds
    for tau, answered, accuracy in zip(*curve, strict=True):
        chosen = confidence >= tau
        assert answered.item() == pytest.approx(chosen.double().mean().item())
        if chosen.any():
            assert accuracy.item() == pytest.approx(correct[chosen].double().mean().item())
        else:
            assert accuracy.isnan()


def test_confidence_equal_to_the_threshold_is_answered():
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4]])  # float32 0.9 is below float64 0.9
    curve = metrics.confidence_curve(p, torch.tensor([0, 1]), thresholds=[0.6, 0.9, 0.95])
    assert curve.answered.tolist() == [1.0, 0.5, 0.0]
    assert curve.accuracy[:2].tolist() == [0.5, 1.0] and curve.accuracy[2].isnan()


def test_confidence_curve_without_labels():
    p = draw(50, 4)
    curve = metrics.confidence_curve(p)
    assert curve.accuracy is None
    assert curve.threshold.tolist() == [i / 100 for i in range(101)]
    assert torch.equal(curve.answered, metrics.confidence_curve(p, draw_labels(50, 4)).answered)


@given(seeds, st.integers(1, 20), st.integers(1, 5))
def test_fewer_are_answered_as_the_threshold_rises(seed, examples, classes):
    p, y = draw(examples, classes, seed=seed), draw_labels(examples, classes, seed=seed)
    curve = metrics.confidence_curve(p, y)
    assert curve.answered[0] == 1 and (curve.answered.diff() <= 0).all()
    assert curve.accuracy[0] == metrics.accuracy(p, y)


# ------------------------------------------------------------------------------------------------------------
# Out-of-distribution AUROC

scores = st.lists(st.integers(-3, 3), min_size=1, max_size=12).map(lambda v: torch.tensor(v).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decimals", [0, 1, 6])  # few decimals: many ties
def test_auroc_agrees_with_scikit_learn(dtype, decimals):
    generator = torch.Generator().manual_seed(decimals)
    inside = torch.randn(300, generator=generator).round(decimals=decimals).to(dtype)
    outside = (torch.randn(170, generator=generator) + 0.7).round(decimals=decimals).to(dtype)
    positive = np.r_[np.zeros(300), np.ones(170)]
    expected = sklearn.metrics.roc_auc_score(positive, torch.cat([inside, outside]))
    assert metrics.ood_auroc(inside, outside).item() == pytest.approx(expected, rel=1e-12)


@given(scores, scores)
def test_auroc_is_the_count_of_pairs(inside, outside):
    pairs = (outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside)
    assert metrics.ood_auroc(inside, outside).item() == pytest.approx(pairs.mean().item(), abs=1e-15)


@given(scores, scores)
def test_auroc_of_the_opposite_question_is_the_complement(inside, outside):
    there, back = metrics.ood_auroc(inside, outside), metrics.ood_auroc(outside, inside)
    assert (there + back).item() == pytest.approx(1.0, abs=1e-15)
    assert metrics.ood_auroc(-inside, -outside).item() == pytest.approx(back.item(), abs=1e-15)


def test_auroc_at_its_limits():
    low, high = torch.tensor([-math.inf, 0.0, 1.0]), torch.tensor([2.0, math.inf])
    assert metrics.ood_auroc(low, high) == 1
    assert metrics.ood_auroc(high, low) == 0
    assert metrics.ood_auroc(torch.zeros(5), torch.zeros(7)) == 0.5


# ------------------------------------------------------------------------------------------------------------
# Devices


def test_results_stay_on_the_device_and_agree_with_the_cpu(device):
    def measure(members, labels):
        mean = members.mean(0)
        return {
            "accuracy": metrics.accuracy(mean, labels),
            "nll": metrics.nll(mean, labels),
            "brier": metrics.brier_score(mean, labels),
            "ece": metrics.expected_calibration_error(mean, labels),
            **metrics.reliability_curve(mean, labels)._asdict(),
            **metrics.confidence_curve(mean, labels)._asdict(),
            "total": metrics.predictive_entropy(members),
            "expected": metrics.expected_entropy(members),
            "disagreement": metrics.mutual_information(members),
            "variance": metrics.predictive_variance(members),
            "auroc": metrics.ood_auroc(mean[:20, 0], mean[20:, 0]),
        }

    members, labels = draw(5, 60, 4), draw_labels(60, 4)
    there = measure(members.to(device), labels.to(device))
    for name, here in measure(members, labels).items():
        assert there[name].device.type == device.type
        torch.testing.assert_close(there[name].cpu(), here, rtol=1e-12, atol=1e-12, equal_nan=True)


# ------------------------------------------------------------------------------------------------------------
# Bad input: (call, error, what the message says)

P = draw(4, 3)
M = draw(2, 4, 3)
Y = torch.tensor([0, 1, 2, 0])
BROKEN = torch.tensor([[0.5, 0.4], [0.5, 0.5]])
LABELLED = [
    metrics.accuracy,
    metrics.nll,
    metrics.brier_score,
    metrics.expected_calibration_error,
    metrics.reliability_curve,
    metrics.confidence_curve,
]
OF_MEMBERS = [metrics.expected_entropy, metrics.mutual_information]


def with_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[1] = math.nan
    return tensor


@pytest.mark.parametrize("metric", LABELLED, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("probabilities", "labels", "error", "message"),
    [
        (P.tolist(), Y, TypeError, "probabilities: expected a tensor, got list"),
        (P.half(), Y, TypeError, "probabilities: expected float32 or float64, got float16"),
        ((P > 0.5), Y, TypeError, "probabilities: expected float32 or float64, got bool"),
        (P[0], Y, ValueError, r"probabilities: expected shape \[B, K\], got \[3\]"),
        (M, Y, ValueError, r"probabilities: expected shape \[B, K\], got \[2, 4, 3\]"),
        (P[:0], Y[:0], ValueError, r"probabilities: expected shape \[B, K\] with B >= 1, got \[0, 3\]"),
        (P[:, :0], Y, ValueError, r"probabilities: expected shape \[B, K\] with K >= 1, got \[4, 0\]"),
        (with_nan(P), Y, ValueError, "probabilities: expected no NaN, got 1 of 12 values NaN"),
        (BROKEN, Y[:2], ValueError, "probabilities: expected rows that sum to 1 .*, got a row with sum 0.9"),
        (
            P * math.inf,
            Y,
            ValueError,
            "probabilities: expected rows that sum to 1 .*, got a row with sum inf",
        ),
        (P.log(), Y, ValueError, "probabilities: expected probabilities >= 0, got -"),
        (P, Y.tolist(), TypeError, "labels: expected a tensor, got list"),
        (P, Y.double(), TypeError, "labels: expected int64, got float64"),
        (P, Y[:3], ValueError, r"labels: expected shape \[4\], .*, got \[3\]"),
        (P, Y[:, None], ValueError, r"labels: expected shape \[4\], .*, got \[4, 1\]"),
        (P, Y + 1, ValueError, r"labels: expected values in 0\.\.2, got 3"),
        (P, Y - 1, ValueError, r"labels: expected values in 0\.\.2, got -1"),
        (P, Y.to("meta"), ValueError, "labels: expected device cpu, .*, got meta"),
    ],
)
def test_bad_predictions_are_refused(metric, probabilities, labels, error, message):
    with pytest.raises(error, match=f"^{metric.__name__}: {message}"):
        metric(probabilities, labels)


@pytest.mark.parametrize("metric", [metrics.expected_calibration_error, metrics.reliability_curve])
@pytest.mark.parametrize(
    ("bins", "error", "message"),
    [
        (0, ValueError, "expected at least 1, got 0"),
        (2.0, TypeError, "expected an int, got float"),
        (True, TypeError, "expected an int, got bool"),
    ],
)
def test_bad_bins_are_refused(metric, bins, error, message):
    with pytest.raises(error, match=f"^{metric.__name__}: bins: {message}"):
        metric(P, Y, bins=bins)


@pytest.mark.parametrize("metric", OF_MEMBERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        (P, ValueError, r"probabilities: expected shape \[E, B, K\], got \[4, 3\]"),
        (M[:0], ValueError, r"probabilities: expected shape \[E, B, K\] with E >= 1, got \[0, 4, 3\]"),
        (M.bfloat16(), TypeError, "probabilities: expected float32 or float64, got bfloat16"),
        (with_nan(M), ValueError, "probabilities: expected no NaN, got 1 of 24"),
        (2 * M, ValueError, "probabilities: expected rows that sum to 1 .*, got a row with sum 2"),
    ],
)
def test_bad_members_are_refused(metric, members, error, message):
    with pytest.raises(error, match=f"^{metric.__name__}: {message}"):
        metric(members)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: metrics.predictive_entropy(P[0]),
            ValueError,
            r"expected shape \[B, K\] or \[E, B, K\], got \[3\]",
        ),
        (
            lambda: metrics.predictive_variance(P[0]),
            ValueError,
            r"expected shape \[E, B\] or \[E, B, K\], got \[3\]",
        ),
        (lambda: metrics.predictive_variance(P[:0]), ValueError, r"with E >= 1, got \[0, 3\]"),
        (
            lambda: metrics.predictive_variance(Y[None]),
            TypeError,
            "outputs: expected float32 or float64, got int64",
        ),
        (lambda: metrics.predictive_variance(with_nan(P)), ValueError, "outputs: expected no NaN"),
        (
            lambda: metrics.confidence_curve(P, thresholds=[1.5]),
            ValueError,
            r"expected values in \[0, 1\], got 1.5",
        ),
        (lambda: metrics.confidence_curve(P, thresholds=[]), ValueError, r"expected shape \[T\] with T >= 1"),
        (
            lambda: metrics.confidence_curve(P, thresholds=P),
            ValueError,
            r"thresholds: expected shape \[T\], got \[4",
        ),
        (
            lambda: metrics.confidence_curve(P, thresholds=Y),
            TypeError,
            "thresholds: expected float32 or float64",
        ),
        (
            lambda: metrics.ood_auroc(P[0], P),
            ValueError,
            r"scores_out: expected shape \[B_out\], got \[4, 3\]",
        ),
        (lambda: metrics.ood_auroc(P[0, :0], P[0]), ValueError, r"scores_in: .* with B_in >= 1, got \[0\]"),
        (
            lambda: metrics.ood_auroc(P[0], with_nan(P[1])),
            ValueError,
            "scores_out: expected no NaN, got 1 of 3",
        ),
        (lambda: metrics.ood_auroc(Y, P[0]), TypeError, "scores_in: expected float32 or float64, got int64"),
    ],
)
def test_other_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
