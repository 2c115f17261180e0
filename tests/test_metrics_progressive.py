"""Streaming scores of clicks against the plain functions over all rows at once."""

import math

import pytest
import torch

from pyens import metrics
from pyens.metrics import ProgressiveScores


def draw(members: int = 4, rows: int = 3000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    truth = torch.randn(rows, generator=g) * 2 - 1
    logits = truth + 0.7 * torch.randn(members, rows, generator=g)
    return logits, (torch.rand(rows, generator=g) < truth.sigmoid()).float()


def of_parts(logits: torch.Tensor, labels: torch.Tensor, *cuts: int, **options: int) -> ProgressiveScores:
    scores = ProgressiveScores(**options)
    for z, y in zip(logits.tensor_split(cuts, 1), labels.tensor_split(cuts), strict=True):
        if len(y):
            scores.update(z, y)
    return scores


@pytest.mark.parametrize("cuts", [(), (1, 2, 700), (1500,)])
def test_they_are_those_of_all_rows(cuts):
    logits, labels = draw()
    found = of_parts(logits, labels, *cuts).compute()
    p = logits.double().sigmoid()
    for m, probability in enumerate([*p, p.mean(0)]):
        assert float(found["log_loss"][m]) == pytest.approx(
            float(torch.nn.functional.binary_cross_entropy(probability, labels.double())), rel=1e-12
        )
        exact = float(metrics.auroc(probability, labels == 1))
        assert abs(float(found["auroc"][m]) - exact) <= float(found["auroc_error"][m]) < 1e-3
        expected = float(probability.mean() / labels.double().mean())
        assert float(found["calibration"][m]) == pytest.approx(expected, rel=1e-12)
    variation = metrics.value_variation(p)
    assert float(found["variation"]) == pytest.approx(float(variation.mean()), rel=1e-9)
    coefficient = metrics.variation_coefficient(variation, p.mean(0))
    assert float(found["variation_coefficient"]) == pytest.approx(float(coefficient), rel=1e-9)


@pytest.mark.parametrize("bins", [2, 64, 100_000])
def test_the_auc_is_off_by_no_more_than_it_says(bins):
    logits, labels = draw(rows=500)
    found = of_parts(logits, labels, bins=bins).compute()
    for m, z in enumerate(logits):
        off = abs(float(found["auroc"][m]) - float(metrics.auroc(z, labels == 1)))
        assert off <= float(found["auroc_error"][m]) + 1e-12
    assert (found["auroc_error"] > 0.1).all() == (bins == 2)


def test_logits_at_the_ends_of_the_range():
    logits = torch.tensor([[800.0, -800.0, 0.0, 40.0], [math.inf, -math.inf, -50.0, 45.0]])
    right = torch.tensor([1, 0, 0, 1])
    found = of_parts(logits, right).compute()
    assert found["log_loss"].isfinite().all() and (found["auroc"] == 1).all()
    wrong = of_parts(logits, 1 - right).compute()
    assert float(wrong["log_loss"][0]) == pytest.approx((800 + 800 + math.log(2) + 40) / 4)
    assert float(wrong["log_loss"][1]) == math.inf and (wrong["auroc"] == 0).all()
    assert float(wrong["log_loss"][2]) > 100 and not wrong["log_loss"].isnan().any()


def test_a_member_that_diverges_takes_no_other_along():
    logits, labels = draw()
    expected = of_parts(logits, labels).compute()
    logits[2, 5] = math.nan
    found = of_parts(logits, labels).compute()
    for name in ("log_loss", "auroc", "auroc_error", "calibration"):
        assert found[name][[2, 4]].isnan().all()
        assert torch.equal(found[name][[0, 1, 3]], expected[name][[0, 1, 3]])


def test_what_can_not_be_said_is_nan():
    found = of_parts(torch.zeros(1, 5), torch.zeros(5)).compute()
    assert found["auroc"].isnan().all() and found["variation"].isnan() and found["calibration"].isnan().all()
    assert found["log_loss"].tolist() == pytest.approx([math.log(2)] * 2)


def test_state_goes_on_and_is_forgotten():
    logits, labels = draw()
    scores = of_parts(logits[:, :1000], labels[:1000])
    again = ProgressiveScores()
    again.load_state_dict(scores.state_dict())
    for one in (scores, again):
        one.update(logits[:, 1000:], labels[1000:])
    for name, value in scores.compute().items():
        assert torch.equal(value, again.compute()[name])
    again.reset()
    with pytest.raises(ValueError, match="compute: expected an update before, got none"):
        again.compute()
    with pytest.raises(ValueError, match="expected 10 bins, got 8192"):
        ProgressiveScores(bins=10).load_state_dict(scores.state_dict())
    with pytest.raises(ValueError, match=r"state: expected bins, rows, .* got other"):
        ProgressiveScores().load_state_dict({"other": 1})


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        ([0.0], torch.zeros(1), TypeError, "logits: expected a floating point tensor, got list"),
        (torch.zeros(2, 3).long(), torch.zeros(3), TypeError, "logits: .* got torch.int64"),
        (torch.zeros(3), torch.zeros(3), ValueError, r"logits: expected \[E, B\] .* got shape \[3\]"),
        (torch.zeros(2, 0), torch.zeros(0), ValueError, "logits: expected"),
        (torch.zeros(2, 3, 2), torch.zeros(3), ValueError, "logits: expected"),
        (torch.zeros(2, 3), torch.zeros(4), ValueError, r"labels: expected shape \[3\], got \[4\]"),
        (torch.zeros(2, 3), [0, 1, 0], TypeError, "labels: expected a tensor of real numbers, got list"),
        (torch.zeros(2, 3), torch.tensor([0, 1, 2]), ValueError, "labels: expected 0 or 1"),
        (torch.zeros(2, 3), torch.tensor([0, 1, math.nan]), ValueError, "labels: expected 0 or 1"),
    ],
)
def test_what_is_refused(logits, labels, error, message):
    with pytest.raises(error, match=f"ProgressiveScores.update: {message}"):
        ProgressiveScores().update(logits, labels)


def test_members_stay_as_many():
    scores = of_parts(*draw())
    with pytest.raises(ValueError, match="expected 4 members as before, got 3"):
        scores.update(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises((TypeError, ValueError), match="bins"):
        ProgressiveScores(bins=0)
