"""pyens.metrics.PredictiveUncertainty and PredictiveMoments: chunks of members give what all at once give."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyens import metrics
from pyens.ops import predictive_moments, predictive_uncertainty


def chunked(measure, *tensors: Tensor, sizes: list[int]):
    """`measure` after updates with chunks of `sizes` members of each tensor."""
    for chunk in zip(*(x.split(sizes) for x in tensors), strict=True):
        measure.update(*chunk)
    return measure


def merged(make, *tensors: Tensor, sizes: list[int]):
    """The same, each chunk in a measure of its own, merged from the last to the first."""
    parts = [
        chunked(make(), *chunk, sizes=[len(chunk[0])])
        for chunk in zip(*(x.split(sizes) for x in tensors), strict=True)
    ]
    whole = make()
    for part in reversed(parts):
        whole.merge(part)
    return whole


SIZES = [[12], [1, 11], [5, 1, 6], [1] * 12]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("shape", [(12, 7), (12, 7, 3), (12, 5, 150)], ids=str)
@pytest.mark.parametrize("from_probabilities", [False, True])
def test_uncertainty_of_chunks(from_probabilities, shape, sizes):
    members = torch.randn(shape, dtype=torch.float64) * 3
    if from_probabilities:
        members = members.sigmoid() if members.dim() == 2 else members.softmax(-1)

    def make():
        return metrics.PredictiveUncertainty(from_probabilities=from_probabilities)

    expected = predictive_uncertainty(members, from_probabilities=from_probabilities)
    for measure in (chunked(make(), members, sizes=sizes), merged(make, members, sizes=sizes)):
        assert measure.count == 12
        got = measure.compute()
        assert type(got) is type(expected)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("shape", [(12, 7), (12, 7, 3)], ids=str)
@pytest.mark.parametrize("with_variances", [False, True])
def test_moments_of_chunks(with_variances, shape, sizes):
    outputs = torch.randn(shape, dtype=torch.float64) + 1000
    variances = torch.rand(shape, dtype=torch.float64)
    tensors = (outputs, variances) if with_variances else (outputs,)
    expected = predictive_moments(outputs, variances=variances if with_variances else None)
    make = metrics.PredictiveMoments
    for measure in (chunked(make(), *tensors, sizes=sizes), merged(make, *tensors, sizes=sizes)):
        assert measure.count == 12
        got = measure.compute()
        assert type(got) is type(expected)
        for ours, theirs in zip(got, expected, strict=True):
            if theirs is None:
                assert ours is None
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_are_in_the_dtype_of_the_members(dtype):
    members = torch.randn(40, 9, 3).to(dtype)
    uncertainty = chunked(metrics.PredictiveUncertainty(), members, sizes=[13, 27]).compute()
    moments = chunked(metrics.PredictiveMoments(), members, members.abs(), sizes=[13, 27]).compute()
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 40 * torch.finfo(dtype).eps}
    expected = (*predictive_uncertainty(members), *predictive_moments(members, variances=members.abs()))
    for ours, theirs in zip((*uncertainty, *moments), expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, **tolerance)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**31))
def test_equal_members_have_no_spread_however_they_come(sizes, seed):
    torch.manual_seed(seed)
    outputs = (torch.randn(1, 20) * 1000).expand(sum(sizes), -1)
    moments = chunked(metrics.PredictiveMoments(), outputs, outputs.abs(), sizes=sizes).compute()
    assert torch.equal(moments.epistemic, torch.zeros(20)) and torch.equal(moments.mean, outputs[0])
    if sum(sizes) > 1:
        assert torch.equal(moments.std, torch.zeros(20))
    uncertainty = chunked(metrics.PredictiveUncertainty(), outputs / 1000, sizes=sizes).compute()
    assert (uncertainty.distribution_pv >= 0).all()
    assert (uncertainty.distribution_pv <= 1e-15 * sum(sizes)).all()


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@st.composite
def streams(draw):
    """How E members may come: a permutation, sizes of chunks, and of them one or several measures merged."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    return sizes, order, draw(st.sampled_from([chunked, merged])), draw(st.integers(0, 2**31))


def streamed(make, stream, *tensors):
    sizes, order, how, _ = stream
    if how is chunked:
        return chunked(make(), *(x[order] for x in tensors), sizes=sizes).compute()
    return merged(make, *(x[order] for x in tensors), sizes=sizes).compute()


def exact_uncertainty(logits: Tensor) -> list[Tensor]:
    """Mean, H, mean H, MI and PV from logits [E, B, K] or [E, B] in float64, MI as a mean of divergences."""
    z = logits.double()
    z = torch.stack([torch.zeros_like(z), z], -1) if z.dim() == 2 else z
    log_p = z.log_softmax(-1)
    log_mean = log_p.logsumexp(0) - math.log(len(z))
    information = (log_p.exp() * (log_p - log_mean)).sum(-1).mean(0)
    mean = log_mean.exp()
    return [
        mean[..., 1] if logits.dim() == 2 else mean,
        torch.special.entr(mean).sum(-1),
        torch.special.entr(log_p.exp()).sum(-1).mean(0),
        information,
        len(z) * information,
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(streams(), st.sampled_from([(), (3,), (40,)]), st.sampled_from([0.0, 1e-4, 0.01, 1.0, 10.0]))
@settings(max_examples=40, deadline=None)
def test_uncertainty_is_that_of_the_whole(dtype, stream, classes, spread):
    torch.manual_seed(stream[-1])
    logits = (torch.randn(5, *classes) + spread * torch.randn(sum(stream[0]), 5, *classes)).to(dtype)
    got = streamed(metrics.PredictiveUncertainty, stream, logits)
    # Float64 leaves 1e-13 of an MI of .1; of a smaller one, what cancels in a difference of entropies.
    tolerance = {"rtol": max(torch.finfo(dtype).eps, 1e-12), "atol": 1e-14}
    if dtype == torch.float16:
        tolerance["atol"] = 3e-8  # half of its smallest number
    for ours, right in zip(got, exact_uncertainty(logits), strict=False):
        assert ours.dtype == dtype
        scale = len(logits) if right is not got[0] else 1
        torch.testing.assert_close(
            ours.double(), right, rtol=tolerance["rtol"], atol=tolerance["atol"] * scale
        )
    torch.testing.assert_close(got.vote_disagreement, predictive_uncertainty(logits).vote_disagreement)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(streams(), st.sampled_from([(), (3,), (40,)]))
@settings(max_examples=25, deadline=None)
def test_uncertainty_of_probabilities_is_that_of_the_whole(dtype, stream, classes):
    torch.manual_seed(stream[-1])
    logits = torch.randn(sum(stream[0]), 5, *classes, dtype=torch.float64)
    p = (logits.softmax(-1) if classes else logits.sigmoid()).to(dtype)
    got = streamed(lambda: metrics.PredictiveUncertainty(from_probabilities=True), stream, p)
    q = p.double() if classes else torch.stack([1 - p.double(), p.double()], -1)
    information = (torch.special.entr(q.mean(0)) - torch.special.entr(q).mean(0)).sum(-1)
    eps = max(torch.finfo(dtype).eps, 1e-12)
    torch.testing.assert_close(got.mean_probability.double(), p.double().mean(0), rtol=eps, atol=1e-7)
    torch.testing.assert_close(got.mutual_information.double(), information, rtol=eps, atol=1e-7)
    torch.testing.assert_close(got.distribution_pv.double(), len(p) * information, rtol=eps, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(streams(), st.sampled_from([0.0, 1.0, 1e3, 1e6, 1.7e9]), st.sampled_from([0.1, 200.0]))
@settings(max_examples=40, deadline=None)
def test_moments_are_those_of_the_whole(dtype, stream, offset, spread):
    torch.manual_seed(stream[-1])
    outputs = (offset + spread * torch.randn(sum(stream[0]), 7, dtype=torch.float64)).to(dtype)
    outputs = outputs.where(outputs.isfinite(), 1.0)  # beyond the end of float16
    variances = torch.rand(sum(stream[0]), 7, dtype=torch.float64).to(dtype)
    got = streamed(metrics.PredictiveMoments, stream, outputs, variances)
    exact = outputs.double()
    right = [
        exact.mean(0),
        (exact - exact[0]).std(0) if len(exact) > 1 else torch.full((7,), torch.nan, dtype=torch.float64),
        exact.amin(0),
        exact.amax(0),
        variances.double().mean(0),
        (exact - exact[0]).var(0, correction=0),
    ]
    # float16 ends at 65504, and its smallest numbers are 6e-8 apart.
    right = [x.to(dtype).double() for x in right]
    for ours, expected in zip(got, right, strict=True):
        assert ours.dtype == dtype
        eps = max(2 * torch.finfo(dtype).eps, 1e-12)
        torch.testing.assert_close(
            ours.double(), expected, rtol=eps, atol=6e-8 if dtype == torch.float16 else 0, equal_nan=True
        )


def test_the_reported_cases():
    torch.manual_seed(0)
    logits = (torch.randn(1, 500, 10) + 0.05 * torch.randn(100, 500, 10)).bfloat16()
    got = chunked(metrics.PredictiveUncertainty(), logits, sizes=[10] * 10).compute().mutual_information
    error = (got.double() / exact_uncertainty(logits)[3] - 1).abs()
    assert error.max() < 2**-8  # half a rounding; by rounded chunks all of it
    for offset, spread in ((1e6, 0.1), (1.7e9, 200.0)):
        outputs = (offset + spread * torch.randn(1000, 20, dtype=torch.float64)).float()
        got = chunked(metrics.PredictiveMoments(), outputs, sizes=[10] * 100).compute().std
        torch.testing.assert_close(got.double(), outputs.double().std(0), rtol=1e-6, atol=0)
    diverged = torch.tensor([5e18, 1, 1, 1, 1]).unsqueeze(1)
    got = chunked(metrics.PredictiveMoments(), diverged, sizes=[2, 3]).compute()
    assert got.mean.item() == pytest.approx(1e18) and got.std.item() == pytest.approx(5e18 / 5**0.5)


def test_an_offset_in_float64_costs_no_digits():
    outputs = torch.randn(100, 50, dtype=torch.float64) + 1e12
    got = chunked(metrics.PredictiveMoments(), outputs, sizes=[1] * 100).compute()
    torch.testing.assert_close(got.std, (outputs - 1e12).std(0), rtol=1e-12, atol=0)


def test_autocast_gives_float32():
    logits = torch.randn(6, 5, 3).bfloat16()
    with torch.autocast("cpu"):
        got = chunked(metrics.PredictiveUncertainty(), logits, sizes=[2, 4]).compute()
        moments = chunked(metrics.PredictiveMoments(), logits, sizes=[2, 4]).compute()
    assert got.mutual_information.dtype == moments.std.dtype == torch.float32
    torch.testing.assert_close(
        got.mutual_information.double(), exact_uncertainty(logits)[3], rtol=1e-6, atol=0
    )


def test_nan_and_inf_as_at_once():
    outputs = torch.randn(6, 8)
    outputs[0, 0], outputs[5, 1], outputs[2, 2], outputs[4, 3] = (
        float("nan"),
        float("nan"),
        float("inf"),
        -float("inf"),
    )
    outputs[0, 4], outputs[5, 4] = float("inf"), float("inf")
    outputs[0, 5], outputs[5, 5] = float("inf"), -float("inf")
    expected = predictive_moments(outputs)
    for sizes in ([1] * 6, [2, 4], [5, 1]):
        got = chunked(metrics.PredictiveMoments(), outputs, sizes=sizes).compute()
        for ours, theirs in zip(got[:4], expected[:4], strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
    logits = outputs.unsqueeze(-1).expand(-1, -1, 3).clone()
    logits[..., 1] = 0
    for sizes in ([1] * 6, [2, 4]):
        got = chunked(metrics.PredictiveUncertainty(), logits, sizes=sizes).compute()
        for ours, theirs in zip(got, predictive_uncertainty(logits), strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_merging_leaves_the_other_as_it_is():
    logits = torch.randn(9, 5, 3)
    a = chunked(metrics.PredictiveUncertainty(), logits[:4], sizes=[4])
    b = chunked(metrics.PredictiveUncertainty(), logits[4:], sizes=[5])
    before = b.compute()
    a.merge(b)
    a.update(logits[:2])
    a.merge(metrics.PredictiveUncertainty())  # nothing
    assert a.count == 11 and b.count == 5
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(b.compute(), before, strict=True))
    empty = metrics.PredictiveMoments()
    empty.merge(metrics.PredictiveMoments())
    assert empty.count == 0


def test_gradients_flow_through_chunks():
    logits = torch.randn(6, 5, 3, dtype=torch.float64, requires_grad=True)

    def gradient(measures, moments):
        total = sum((i + 1) * x.sum() for i, x in enumerate((*measures[:5], moments.mean, moments.std)))
        return torch.autograd.grad(total, logits)[0]

    got = gradient(
        chunked(metrics.PredictiveUncertainty(), logits, sizes=[2, 4]).compute(),
        chunked(metrics.PredictiveMoments(), logits, sizes=[2, 4]).compute(),
    )
    torch.testing.assert_close(got, gradient(predictive_uncertainty(logits), predictive_moments(logits)))
    assert (
        not chunked(metrics.PredictiveUncertainty(), logits, sizes=[6])
        .compute()
        .vote_disagreement.requires_grad
    )


def test_empty_batch():
    assert chunked(metrics.PredictiveUncertainty(), torch.empty(4, 0, 3), sizes=[1, 3]).compute()[
        1
    ].shape == (0,)
    assert chunked(metrics.PredictiveMoments(), torch.empty(4, 0, 3), sizes=[1, 3]).compute().std.shape == (
        0,
        3,
    )


def uncertainty() -> metrics.PredictiveUncertainty:
    return chunked(metrics.PredictiveUncertainty(), torch.zeros(2, 5, 3), sizes=[2])


def moments(variances: bool = False) -> metrics.PredictiveMoments:
    outputs = torch.zeros(2, 5)
    return chunked(metrics.PredictiveMoments(), *[outputs] * (2 if variances else 1), sizes=[2])


BAD = {
    "classes": (
        lambda: uncertainty().update(torch.zeros(1, 5, 4)),
        r"PredictiveUncertainty.update: members: expected members of shape \[5, 3\] as before, got \[5, 4\]",
    ),
    "rank": (lambda: uncertainty().update(torch.zeros(5, 3)), r"members: expected .* got \[3\]"),
    "no members": (lambda: uncertainty().update(torch.zeros(0, 5, 3)), "expected at least one member"),
    "first of no members": (
        lambda: metrics.PredictiveUncertainty().update(torch.zeros(0, 5, 3)),
        "predictive_uncertainty: logits: expected at least one member",
    ),
    "logits": (
        lambda: metrics.PredictiveUncertainty(from_probabilities=True).update(torch.ones(1, 5, 3)),
        "expected probabilities >= 0 that sum to 1",
    ),
    "other examples": (
        lambda: uncertainty().merge(
            chunked(metrics.PredictiveUncertainty(), torch.zeros(1, 4, 3), sizes=[1])
        ),
        r"PredictiveUncertainty.merge: other: expected members of shape \[5, 3\] as before, got \[4, 3\]",
    ),
    "nothing": (
        lambda: metrics.PredictiveUncertainty().compute(),
        "PredictiveUncertainty.compute: expected at least one member before, got none",
    ),
    "examples of moments": (
        lambda: moments().update(torch.zeros(1, 4)),
        r"PredictiveMoments.update: members: expected members of shape \[5\] as before, got \[4\]",
    ),
    "variances": (
        lambda: moments().update(torch.zeros(1, 5), torch.zeros(1, 5)),
        "PredictiveMoments.update: variances: expected none as before, got some",
    ),
    "no variances": (
        lambda: moments(variances=True).update(torch.zeros(1, 5)),
        "PredictiveMoments.update: variances: expected some as before, got none",
    ),
    "merged without variances": (
        lambda: moments(variances=True).merge(moments()),
        "PredictiveMoments.merge: other: expected some as before, got none",
    ),
    "no moments": (
        lambda: metrics.PredictiveMoments().compute(),
        "PredictiveMoments.compute: expected at least one member before, got none",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_chunk_changes_nothing():
    measure = uncertainty()
    before = measure.compute()
    with pytest.raises(ValueError, match="as before"):
        measure.update(torch.zeros(1, 5, 4))
    assert measure.count == 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(measure.compute(), before, strict=True))
