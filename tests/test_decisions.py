"""pyens.decisions: thresholds hold on the examples they were made of; ties are in a seeded order."""

import importlib
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyens
from pyens import decisions, metrics

shares = st.one_of(st.sampled_from([0, 0.1, 0.3, 0.5, 0.7, 1]), st.floats(0, 1))
examples = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=20)
MEASURES = ["entropy", "margin", "mutual_information", "variation_ratio"]


def split(pairs):
    confidence, wrong = zip(*pairs, strict=True)
    return torch.tensor(confidence, dtype=torch.float32), torch.tensor(wrong)


def draw(*shape, seed=0):
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()).softmax(-1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------
# Thresholds


@given(examples, shares)
def test_the_coverage_threshold_is_the_highest_that_covers_enough(pairs, coverage):
    confidence, _ = split(pairs)
    threshold = decisions.coverage_threshold(confidence, coverage)
    assert threshold.dtype == confidence.dtype

    def covered(tau):
        return (confidence >= tau).double().mean().item()

    assert covered(threshold) >= coverage
    for higher in confidence[confidence > threshold]:
        assert covered(higher) < coverage
    if coverage == 0:
        assert threshold == math.inf


@given(examples, shares)
def test_the_risk_threshold_is_the_lowest_that_is_good_enough(pairs, risk):
    confidence, wrong = split(pairs)
    threshold = decisions.risk_threshold(confidence, wrong, risk)

    def risk_at(tau):
        return wrong[confidence >= tau].double().mean().item()

    if threshold == math.inf:
        assert all(risk_at(tau) > risk for tau in confidence)
    else:
        assert threshold in confidence and risk_at(threshold) <= risk + 1e-12
        assert all(risk_at(tau) > risk - 1e-12 for tau in confidence[confidence < threshold])


def test_thresholds_by_hand():
    confidence = torch.tensor([0.9, 0.8, 0.8, 0.4])
    wrong = torch.tensor([False, True, False, True])
    assert decisions.coverage_threshold(confidence, 0.5) == confidence[1]  # its tie is answered too
    assert decisions.coverage_threshold(torch.arange(10.0), 0.3) == 7  # three of ten, whatever 0.3 rounds to
    assert decisions.risk_threshold(confidence, wrong, 0.0) == confidence[0]
    assert decisions.risk_threshold(confidence, wrong, 0.4) == confidence[1]  # 1 of 3
    assert decisions.risk_threshold(confidence, wrong, 0.5) == confidence[3]
    assert decisions.risk_threshold(confidence, ~wrong, 0.3) == math.inf
    assert decisions.risk_threshold(confidence, torch.tensor([4.0, 1.0, 1.0, 9.0]), 2) == confidence[1]


def test_a_threshold_decides_new_examples():
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.5, 0.5]])
    assert decisions.predict_or_abstain(p, 0.7).tolist() == [0, 1, -1]  # float32 0.7 reaches 0.7
    assert decisions.predict_or_abstain(p, torch.tensor(math.inf)).tolist() == [-1, -1, -1]
    negative_entropy = -metrics.predictive_entropy(p)
    threshold = decisions.coverage_threshold(negative_entropy, 1 / 3)
    assert decisions.predict_or_abstain(p, threshold, confidence=negative_entropy).tolist() == [0, -1, -1]
    assert decisions.predict_or_abstain(p[:0], 0.5).shape == (0,)


# ------------------------------------------------------------------------------------------------------------
# Uncertainty sampling


def score(p, by):
    mean = p.mean(0)
    if by == "entropy":
        return metrics.predictive_entropy(p)
    if by == "mutual_information":
        return metrics.mutual_information(p)
    if by == "margin":
        ordered = np.sort(mean.numpy(), -1)
        return torch.tensor(-(ordered[:, -1] - ordered[:, -2]))
    votes = [np.bincount(v, minlength=p.shape[-1]).max() for v in p.argmax(-1).T.numpy()]
    return torch.tensor(-np.array(votes, dtype=float))


@pytest.mark.parametrize("by", MEASURES)
def test_the_most_uncertain_come_first(by):
    p = draw(7, 40, 4)
    rows = decisions.uncertainty_sampling(p, 15, by=by, generator=seeded(0))
    scores = score(p, by)
    assert rows.dtype == torch.int64 and len(set(rows.tolist())) == 15
    assert (scores[rows].diff() <= 1e-12).all()
    rest = torch.ones(40, dtype=torch.bool)
    rest[rows] = False
    assert scores[rest].max() <= scores[rows].min() + 1e-12


@pytest.mark.parametrize("by", ["entropy", "margin"])
def test_the_mean_prediction_is_enough(by):
    p = draw(7, 40, 4)
    assert torch.equal(
        decisions.uncertainty_sampling(p, 10, by=by), decisions.uncertainty_sampling(p.mean(0), 10, by=by)
    )


@given(st.lists(st.integers(0, 2), max_size=12), st.integers(0, 2**32 - 1))
def test_ties_are_in_an_order_of_the_seed(values, seed):
    scores = torch.tensor(values, dtype=torch.float64)
    everything = decisions.most_uncertain(scores, len(values), generator=seeded(seed))
    assert sorted(everything.tolist()) == list(range(len(values)))
    assert scores[everything].tolist() == sorted(values, reverse=True)
    assert torch.equal(everything, decisions.most_uncertain(scores, len(values), generator=seeded(seed)))
    few = decisions.most_uncertain(scores, len(values) // 2, generator=seeded(seed))
    assert torch.equal(few, everything[: len(values) // 2])


def test_every_tied_example_has_its_turn():
    first = [decisions.most_uncertain(torch.zeros(4), 1, generator=seeded(s)).item() for s in range(400)]
    assert min(np.bincount(first, minlength=4)) > 60  # 100 each on average


def test_without_a_generator_torchs_own_decides():
    torch.manual_seed(5)
    once = decisions.uncertainty_sampling(torch.full((20, 2), 0.5), 10)
    torch.manual_seed(5)
    assert torch.equal(once, decisions.uncertainty_sampling(torch.full((20, 2), 0.5), 10))
    assert not torch.equal(once, decisions.uncertainty_sampling(torch.full((20, 2), 0.5), 10))


@pytest.mark.parametrize("by", MEASURES)
@pytest.mark.parametrize("shape", [(1, 3, 2), (4, 3, 1), (2, 0, 3)])
def test_the_smallest_pools_work(by, shape):
    p = draw(*shape)
    rows = decisions.uncertainty_sampling(p, shape[1], by=by)
    assert sorted(rows.tolist()) == list(range(shape[1]))


# ------------------------------------------------------------------------------------------------------------
# Devices and bad input


def test_results_stay_on_the_device_and_agree_with_the_cpu(device):
    def chosen(p, wrong):
        confidence = p[0].amax(-1)
        return [
            decisions.coverage_threshold(confidence, 0.4),
            decisions.risk_threshold(confidence, wrong, 0.3),
            decisions.predict_or_abstain(p[0], decisions.coverage_threshold(confidence.cpu(), 0.4)),
            *(decisions.uncertainty_sampling(p, 9, by=by, generator=seeded(1)) for by in MEASURES),
        ]

    p, wrong = draw(3, 30, 4), torch.arange(30) % 3 == 0
    for there, here in zip(chosen(p.to(device), wrong.to(device)), chosen(p, wrong), strict=True):
        assert there.device.type == device.type
        torch.testing.assert_close(there.cpu(), here)


P = draw(2, 4, 3)
C = torch.tensor([0.5, 0.25, 1.0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: decisions.coverage_threshold(C, 1.1),
            ValueError,
            r"^coverage_threshold: coverage: .* \[0, 1\]",
        ),
        (
            lambda: decisions.coverage_threshold(C, "all"),
            TypeError,
            "^coverage_threshold: coverage: .* got str",
        ),
        (
            lambda: decisions.coverage_threshold(C[:0], 0.5),
            ValueError,
            "^coverage_threshold: confidence: .* B >= 1",
        ),
        (
            lambda: decisions.risk_threshold(C, C / 0, 0.5),
            ValueError,
            "^risk_threshold: losses: expected finite",
        ),
        (lambda: decisions.risk_threshold(C, C, math.nan), ValueError, "^risk_threshold: risk: .* got nan"),
        (
            lambda: decisions.predict_or_abstain(P, 0.5),
            ValueError,
            r"^predict_or_abstain: .* \[B, K\], got \[2, 4",
        ),
        (
            lambda: decisions.predict_or_abstain(P[0], C),
            ValueError,
            "^predict_or_abstain: threshold: expected one number",
        ),
        (
            lambda: decisions.predict_or_abstain(P[0], math.nan),
            ValueError,
            "^predict_or_abstain: threshold: .* nan",
        ),
        (
            lambda: decisions.predict_or_abstain(P[0], 0.5, confidence=C),
            ValueError,
            r"^predict_or_abstain: confidence: expected shape \[4\], that of the predictions, got \[3\]",
        ),
        (
            lambda: decisions.uncertainty_sampling(P, 1, by="variance"),
            ValueError,
            "^uncertainty_sampling: by: expected entropy or .* got 'variance'",
        ),
        (
            lambda: decisions.uncertainty_sampling(P[0], 1, by="mutual_information"),
            ValueError,
            r"^uncertainty_sampling: probabilities: expected shape \[E, B, K\], got \[4, 3\]",
        ),
        (
            lambda: decisions.uncertainty_sampling(P, 5),
            ValueError,
            "^uncertainty_sampling: count: .* B = 4, got 5",
        ),
        (
            lambda: decisions.uncertainty_sampling(P, -1),
            ValueError,
            "^uncertainty_sampling: count: .* at least 0",
        ),
        (
            lambda: decisions.uncertainty_sampling(P, 1.0),
            TypeError,
            "^uncertainty_sampling: count: .* got float",
        ),
        (lambda: decisions.uncertainty_sampling(2 * P, 1), ValueError, "^uncertainty_sampling: .* sum to 1"),
        (
            lambda: decisions.most_uncertain(C * math.nan, 1),
            ValueError,
            "^most_uncertain: scores: expected no NaN",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_old_name_warns_and_gives_the_same():
    sys.modules.pop("pyens.select", None)
    with pytest.warns(DeprecationWarning, match="pyens.select is now pyens.decisions") as caught:
        old = importlib.import_module("pyens.select")
    assert len(caught) == 1
    assert old.__all__ and all(getattr(old, name) is getattr(decisions, name) for name in old.__all__)


@pytest.mark.parametrize("use", ["pyens.select.ABSTAIN", "exec('from pyens import select')"])
def test_the_old_name_warns_whoever_uses_it(use):
    vars(pyens).pop("select", None)
    sys.modules.pop("pyens.select", None)
    with pytest.warns(DeprecationWarning, match="pyens.select is now pyens.decisions") as caught:
        eval(compile(use, "the user's file", "eval"), {"pyens": pyens})
    assert len(caught) == 1 and caught[0].filename in ("the user's file", "<string>")
