"""Prediction variation against its definitions written out in float64, and the properties it has."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyens import metrics
from pyens.metrics import variation


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 3).to(dtype)


def distributions(*shape, seed=0, dtype=torch.float64):
    return (2 * draw(*shape, seed=seed)).softmax(-1).to(dtype)


def value_pv(column):
    mean = sum(column) / len(column)
    return math.sqrt(sum((y - mean) ** 2 for y in column) / (len(column) - 1))


def distribution_pv(members):
    mean = [sum(p) / len(p) for p in zip(*members, strict=True)]
    return sum(p * math.log(p / q) for member in members for p, q in zip(member, mean, strict=True))


seeds = st.integers(0, 2**32 - 1)


@given(st.integers(2, 9), st.integers(1, 40), st.sampled_from([torch.float64, torch.float32]), seeds)
def test_value_variation_is_its_definition(members, examples, dtype, seed):
    y = draw(members, examples, seed=seed, dtype=dtype)
    expected = torch.tensor([value_pv(column) for column in y.T.tolist()], dtype=torch.float64)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    found = metrics.value_variation(y)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.square(), metrics.predictive_variance(y, unbiased=True))


@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 6), seeds)
def test_distribution_variation_is_its_definition(members, examples, classes, seed):
    p = distributions(members, examples, classes, seed=seed)
    rows = p.transpose(0, 1).tolist()
    expected = torch.tensor([distribution_pv(row) for row in rows], dtype=torch.float64)
    found = metrics.distribution_variation(p)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, members * metrics.mutual_information(p), rtol=1e-10, atol=1e-12)
    assert (found >= 0).all()
    single = metrics.distribution_variation(p.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-6 * members)


def test_each_output_has_a_value_variation():
    y = draw(5, 7, 3)
    found = metrics.value_variation(y)
    assert found.shape == (7, 3)
    for k in range(3):
        torch.testing.assert_close(found[:, k], metrics.value_variation(y[:, :, k]))
    assert metrics.value_variation(y[:, :0]).shape == (0, 3)
    assert metrics.distribution_variation(distributions(5, 1, 3)[:, :0]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_members_do_not_vary(dtype):
    y, p = draw(1, 1001, dtype=dtype), distributions(1, 1001, 5, dtype=dtype)
    assert (metrics.value_variation(y.expand(100, -1) / 3) == 0).all()
    assert (metrics.value_variation(y.repeat(7, 1) * 1e6) == 0).all()
    found = metrics.distribution_variation(p.repeat(100, 1, 1))
    assert (found >= 0).all() and found.max() <= 1e-6 * 100


def test_one_member():
    assert metrics.value_variation(draw(1, 4)).isnan().all()
    assert metrics.distribution_variation(distributions(1, 4, 3)).abs().max() < 1e-12


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), seeds)
def test_members_in_chunks(chunks, seed):
    total = sum(chunks) + 1
    y, p = draw(total, 9, seed=seed), distributions(total, 9, 4, seed=seed)
    moments, uncertainty = metrics.PredictiveMoments(), metrics.PredictiveUncertainty(from_probabilities=True)
    for values, probabilities in zip(y.split([*chunks, 1]), p.split([*chunks, 1]), strict=True):
        moments.update(values)
        uncertainty.update(probabilities)
    torch.testing.assert_close(moments.compute().std, metrics.value_variation(y))
    pv = uncertainty.compute().distribution_pv
    torch.testing.assert_close(pv, metrics.distribution_variation(p), rtol=1e-9, atol=1e-12)


def test_coefficient():
    y = draw(6, 50)
    pv, mean = metrics.value_variation(y), y.mean(0)
    pairs = zip(pv.tolist(), mean.tolist(), strict=True)
    expected = sum(v / abs(m) for v, m in pairs) / 50
    assert metrics.variation_coefficient(pv, mean).item() == pytest.approx(expected, rel=1e-12)
    assert metrics.variation_coefficient(pv, -mean).item() == pytest.approx(expected, rel=1e-12)
    scaled = metrics.variation_coefficient(metrics.value_variation(7 * y), 7 * mean)
    assert scaled.item() == pytest.approx(expected, rel=1e-12)
    single = metrics.variation_coefficient(pv.float(), mean.float())
    assert single.dtype == torch.float64 and single.item() == pytest.approx(expected, rel=1e-6)


def test_coefficient_where_mean_or_variation_is_0():
    pv, mean = torch.tensor([0.0, 0.5]), torch.tensor([0.0, 2.0])
    assert metrics.variation_coefficient(pv, mean).item() == 0.125
    assert metrics.variation_coefficient(pv.flip(0), mean).item() == math.inf


def written_out(universe, sizes, draws, seed, pv):
    """Definition A.1, with the permutations of `delta_ratio`. `pv` of a list of members' rows."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(universe), generator=generator).tolist() for _ in range(draws)]
    examples = universe.transpose(0, 1).tolist()
    truth = [pv(members) for members in examples]
    ratios = []
    for size in sizes:
        found = [[pv([members[m] for m in order[:size]]) for members in examples] for order in drawn]
        deltas = [sum(abs(a - b) for a, b in zip(row, truth, strict=True)) for row in found]
        ratios.append([delta / sum(truth) for delta in deltas])
    return torch.tensor(ratios, dtype=torch.float64)


@pytest.mark.parametrize("block", [1 << 22, 60, 1])
@pytest.mark.parametrize("kind", ["value", "distribution"])
def test_delta_ratio_is_its_definition(monkeypatch, kind, block):
    monkeypatch.setattr(variation, "BLOCK", block)
    sizes, draws, seed = [2, 11, 3, 6], 4, 5
    if kind == "value":
        universe, pv = draw(11, 13), value_pv
    else:
        universe, pv = distributions(11, 13, 3), lambda members: distribution_pv(members) / len(members)
    found = metrics.delta_ratio(universe, sizes, variation=kind, draws=draws, seed=seed)
    expected = written_out(universe, sizes, draws, seed, pv)
    torch.testing.assert_close(found.ratios, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.mean, expected.mean(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.std, expected.std(1), rtol=1e-9, atol=1e-12)
    assert found.ratios.dtype == torch.float64 and found.ratios[1].max() < 1e-12  # of all members


def test_blocks_of_examples_give_what_one_gives(monkeypatch):
    universe = draw(30, 200, dtype=torch.float32)
    whole = metrics.delta_ratio(universe, [5, 20], draws=3)
    monkeypatch.setattr(variation, "BLOCK", 30 * 17)
    parts = metrics.delta_ratio(universe, [5, 20], draws=3)
    torch.testing.assert_close(parts.ratios, whole.ratios, rtol=1e-10, atol=0)


def test_the_result_for_one_size_does_not_depend_on_the_others():
    universe = draw(40, 50)
    both = metrics.delta_ratio(universe, [30, 10])
    one = metrics.delta_ratio(universe, [10])
    assert both.ratios.shape == (2, 20) and torch.equal(both.ratios[1:], one.ratios)
    assert torch.equal(metrics.delta_ratio(universe, [10]).ratios, one.ratios)
    assert not torch.equal(metrics.delta_ratio(universe, [10], seed=1).ratios, one.ratios)
    state = torch.get_rng_state()
    metrics.delta_ratio(universe, [10], draws=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["value", "distribution"])
def test_larger_ensembles_are_closer_to_the_universe(kind):
    universe = draw(400, 300) if kind == "value" else distributions(400, 300, 4)
    mean = metrics.delta_ratio(universe, [5, 20, 80, 320], variation=kind).mean
    assert all(a > 1.5 * b for a, b in itertools.pairwise(mean.tolist()))
    if kind == "value":
        # The std of N normal outputs has itself a std of about sqrt(1 / 2(N-1)), of which mean |.| is
        # sqrt(2 / pi); drawn without replacement, by the share that is left.
        assert mean[1].item() == pytest.approx(math.sqrt(2 / math.pi / (2 * 19) * (1 - 20 / 400)), rel=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuse_what_is_no_number(bad):
    y, p = draw(3, 4), distributions(3, 4, 2)
    y[1, 2] = p[1, 2, 0] = bad
    what = "NaN" if math.isnan(bad) else "finite"
    with pytest.raises(ValueError, match=f"^delta_ratio: universe: expected .*{what}"):
        metrics.delta_ratio(y, [2])
    with pytest.raises(ValueError, match=r"^distribution_variation: probabilities: expected "):
        metrics.distribution_variation(p)
    with pytest.raises(ValueError, match=f"^variation_coefficient: mean: expected .*{what}"):
        metrics.variation_coefficient(torch.ones(4).double(), y[1])
    if math.isnan(bad):
        with pytest.raises(ValueError, match=r"^value_variation: outputs: expected no NaN, got 1 of 12"):
            metrics.value_variation(y)


ONES = torch.ones(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: metrics.value_variation(ONES),
            ValueError,
            r"value_variation: outputs: expected shape \[E, B\]",
        ),
        (
            lambda: metrics.value_variation(torch.ones(2, 3).long()),
            TypeError,
            "value_variation: outputs: expected",
        ),
        (
            lambda: metrics.distribution_variation(torch.ones(2, 3, 2)),
            ValueError,
            "distribution_variation: probabilities: expected rows that sum to 1",
        ),
        (
            lambda: metrics.distribution_variation(torch.ones(2, 3)),
            ValueError,
            r"distribution_variation: probabilities: expected shape \[E, B, K\]",
        ),
        (
            lambda: metrics.variation_coefficient(-ONES, ONES),
            ValueError,
            "variation_coefficient: variation: expected values >= 0, got -1",
        ),
        (
            lambda: metrics.variation_coefficient(ONES, ONES[:3]),
            ValueError,
            r"variation_coefficient: mean: expected shape \[4\]",
        ),
        (lambda: metrics.variation_coefficient(ONES, ONES.double()), TypeError, "mean: expected float32"),
        (lambda: metrics.delta_ratio(draw(5, 3), [1]), ValueError, "sizes: expected at least 2, got 1"),
        (
            lambda: metrics.delta_ratio(draw(5, 3), [6]),
            ValueError,
            "sizes: expected at most the 5 of universe, got 6",
        ),
        (lambda: metrics.delta_ratio(draw(5, 3), [2.0]), TypeError, "sizes: expected an int, got float"),
        (
            lambda: metrics.delta_ratio(draw(5, 3), [2], draws=1),
            ValueError,
            "draws: expected at least 2, got 1",
        ),
        (
            lambda: metrics.delta_ratio(draw(5, 3), [2], variation="entropy"),
            ValueError,
            "variation: expected value or distribution, got 'entropy'",
        ),
        (lambda: metrics.delta_ratio(draw(5, 3, 2), [2]), ValueError, r"universe: expected shape \[E, B\]"),
        (
            lambda: metrics.delta_ratio(draw(5, 3, 2), [2], variation="distribution"),
            ValueError,
            "universe: expected rows that sum to 1",
        ),
        (
            lambda: metrics.delta_ratio(draw(1, 3).repeat(5, 1), [2]),
            ValueError,
            "universe: expected members that differ",
        ),
        (lambda: metrics.delta_ratio(draw(5, 0), [2]), ValueError, "universe: expected shape .* with B >= 1"),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
