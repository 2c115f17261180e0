"""Scores of values and distributions, intervals, correlations: against SciPy, scikit-learn and integrals."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyens import metrics

DTYPES = [torch.float32, torch.float64]
seeds = st.integers(0, 2**32 - 1)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_members(members, examples, seed=0, dtype=torch.float64):
    """Means and variances [E, B], and targets [B]."""
    means = 2 * draw(members, examples, seed=seed)
    variances = (0.5 * draw(members, examples, seed=seed + 1)).exp()
    targets = 2 * draw(examples, seed=seed + 2)
    return means.to(dtype), variances.to(dtype), targets.to(dtype)


def cdf(means, variances, t):
    return scipy.stats.norm.cdf(t, means, variances**0.5).mean(0)


# ------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_agree_with_scikit_learn(dtype):
    y, predicted = draw(200, dtype=dtype) + 3, draw(200, seed=1, dtype=dtype) + 3
    expected = sklearn.metrics.root_mean_squared_error(y.double(), predicted.double())
    assert metrics.rmse(predicted, y).item() == pytest.approx(expected, rel=1e-12)
    expected = sklearn.metrics.r2_score(y.double(), predicted.double())
    assert metrics.r_squared(predicted, y).item() == pytest.approx(expected, rel=1e-11)
    assert metrics.rmse(predicted.view(50, 4), y.view(50, 4)) == metrics.rmse(predicted, y)


def test_r_squared_at_its_limits():
    y = torch.tensor([1.0, 2.0, 3.0])
    assert metrics.r_squared(y, y) == 1
    assert metrics.r_squared(torch.full((3,), 2.0), y) == 0
    constant = torch.full((3,), 0.1)
    assert metrics.r_squared(y, constant) == -math.inf
    assert metrics.r_squared(constant, constant).isnan()


# ------------------------------------------------------------------------------------------------------------
# Distributions


@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_nll_agrees_with_scipy(dtype):
    means, variances, y = draw_members(5, 40, dtype=dtype)
    m, v, t = (x.double().numpy() for x in (means, variances, y))
    density = scipy.stats.norm.pdf(t, m, v**0.5)
    tolerance = {"rel": 1e-12}
    assert metrics.gaussian_nll(means, variances, y).item() == pytest.approx(
        -np.log(density.mean(0)).mean(), **tolerance
    )
    expected = -np.log(density[0]).mean()
    assert metrics.gaussian_nll(means[0], variances[0], y).item() == pytest.approx(expected, **tolerance)
    assert metrics.gaussian_nll(means[:1], variances[:1], y).item() == pytest.approx(expected, **tolerance)


def test_gaussian_nll_far_from_every_member_is_finite():
    means, variances = torch.zeros(3, 1), torch.ones(3, 1)
    nll = metrics.gaussian_nll(means, variances, torch.tensor([1e4]))
    assert nll.item() == pytest.approx(0.5e8 + 0.5 * math.log(2 * math.pi), rel=1e-12)


@pytest.mark.parametrize("members", [1, 4])
def test_gaussian_crps_is_the_integral(members):
    means, variances, y = draw_members(members, 3)
    total = 0.0
    for b in range(3):
        m, v, t = means[:, b].numpy(), variances[:, b].numpy(), y[b].item()
        below = scipy.integrate.quad(lambda x, m=m, v=v: cdf(m, v, x) ** 2, -np.inf, t)[0]
        above = scipy.integrate.quad(lambda x, m=m, v=v: (1 - cdf(m, v, x)) ** 2, t, np.inf)[0]
        total += below + above
    assert metrics.gaussian_crps(means, variances, y).item() == pytest.approx(total / 3, rel=1e-7)


def test_gaussian_crps_of_one_distribution_is_the_closed_form():
    means, variances, y = draw_members(1, 50)
    z, sd = ((y - means[0]) / variances[0].sqrt()).numpy(), variances[0].sqrt().numpy()
    norm = scipy.stats.norm
    closed = sd * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    assert metrics.gaussian_crps(means[0], variances[0], y).item() == pytest.approx(closed.mean(), rel=1e-12)
    assert metrics.gaussian_crps(means, variances, y).item() == pytest.approx(closed.mean(), rel=1e-12)


@given(seeds, st.integers(1, 6), st.integers(1, 5), st.sampled_from([0, 1, 1e6]))
def test_ensemble_crps_is_its_definition_at_any_offset(seed, members, examples, offset):
    x, y = draw(members, examples, seed=seed) + offset, draw(examples, seed=seed + 1) + offset
    spread = (x[:, None] - x).abs().mean((0, 1)) / 2
    expected = ((x - y).abs().mean(0) - spread).mean()
    score = metrics.ensemble_crps(x, y)
    torch.testing.assert_close(score, expected, rtol=0, atol=1e-12)
    assert score >= -1e-15


@given(seeds, st.integers(3, 6), st.integers(1, 4))
def test_the_fair_crps_does_not_depend_on_the_number_of_members(seed, members, examples):
    """The mean over all ensembles of 2 and of 3 of the members is that of all members: no bias."""
    x, y = draw(members, examples, seed=seed), draw(examples, seed=seed + 1)
    whole = metrics.ensemble_crps(x, y, fair=True)
    pairwise = (x[:, None] - x).abs().sum((0, 1)) / (2 * members * (members - 1))
    torch.testing.assert_close(whole, ((x - y).abs().mean(0) - pairwise).mean(), rtol=1e-12, atol=1e-14)
    biased = []
    for size in (2, 3):
        chosen = [list(c) for c in itertools.combinations(range(members), size)]
        mean = torch.stack([metrics.ensemble_crps(x[c], y, fair=True) for c in chosen]).mean()
        torch.testing.assert_close(mean, whole, rtol=1e-11, atol=1e-13)
        biased.append(torch.stack([metrics.ensemble_crps(x[c], y) for c in chosen]).mean())
    assert biased[0] > biased[1] > whole


def test_the_fair_crps_is_that_of_the_distribution():
    """Of ensembles of 3 normal members: 2φ(0)... of N(0, 1) at y = 0, (√2 - 1)/√π, which SciPy integrates."""
    right, _ = scipy.integrate.quad(lambda t: (scipy.stats.norm.cdf(t) - (t >= 0)) ** 2, -8, 8, points=[0])
    x, y = draw(3, 200_000), torch.zeros(200_000, dtype=torch.float64)
    assert metrics.ensemble_crps(x, y, fair=True).item() == pytest.approx(right, abs=4e-3)
    bias = 1 / (3 * math.sqrt(math.pi))  # E|x - x'| / (2E)
    assert metrics.ensemble_crps(x, y).item() == pytest.approx(right + bias, abs=4e-3)


def test_ensemble_crps_is_the_limit_of_narrow_normals():
    x, y = draw(6, 30), draw(30, seed=1)
    narrow = metrics.gaussian_crps(x, torch.full_like(x, 1e-16), y)
    torch.testing.assert_close(metrics.ensemble_crps(x, y), narrow, rtol=0, atol=1e-8)


def test_ensemble_crps_agrees_with_torchmetrics():
    pytest.importorskip("torchmetrics")
    from torchmetrics.functional.regression import continuous_ranked_probability_score

    x, y = draw(6, 30), draw(30, seed=1)
    theirs = continuous_ranked_probability_score(x.T, y)
    torch.testing.assert_close(metrics.ensemble_crps(x, y), theirs, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------------
# Intervals


@pytest.mark.parametrize("probability", [1e-15, 1e-6, 0.05, 0.5, 0.975])
def test_quantiles_agree_with_a_root_of_scipys_cdf(probability):
    means, variances, _ = draw_members(7, 10)
    quantile = metrics.mixture_quantile(means, variances, probability)
    for b in range(10):
        m, v = means[:, b].numpy(), variances[:, b].numpy()
        root = scipy.optimize.brentq(lambda t, m=m, v=v: cdf(m, v, t) / probability - 1, -40, 40, xtol=1e-14)
        assert quantile[b].item() == pytest.approx(root, rel=1e-9, abs=1e-9)


@given(seeds, st.integers(1, 6), st.integers(0, 5), st.floats(0.001, 0.999))
def test_the_quantile_inverts_the_cdf(seed, members, examples, probability):
    means, variances, y = draw_members(members, examples, seed=seed)
    quantile = metrics.mixture_quantile(means, variances, probability)
    assert quantile.shape == (examples,)
    back = metrics.mixture_cdf(means, variances, quantile)
    torch.testing.assert_close(back, torch.full_like(back, probability), rtol=0, atol=1e-12)
    share = metrics.mixture_cdf(means, variances, y)
    np.testing.assert_allclose(share, cdf(means.numpy(), variances.numpy(), y.numpy()), rtol=1e-11)


@given(seeds, st.integers(1, 9), st.floats(0.01, 0.99))
def test_the_quantile_of_points_is_that_of_the_sample(seed, members, probability):
    points = draw(members, 4, seed=seed)
    quantile = metrics.mixture_quantile(points, torch.zeros_like(points), probability)
    expected = np.quantile(points, probability, axis=0, method="inverted_cdf")
    np.testing.assert_allclose(quantile, expected, rtol=1e-14)
    assert (metrics.mixture_cdf(points, torch.zeros_like(points), quantile) >= probability - 1e-15).all()


def test_float32_members_give_float32_bounds():
    means, variances, _ = draw_members(3, 5, dtype=torch.float32)
    wide = metrics.mixture_quantile(means.double(), variances.double(), 0.3)
    narrow = metrics.mixture_quantile(means, variances, 0.3)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, wide.float(), rtol=0, atol=0)


def test_intervals_and_risks_cover_what_they_promise():
    # 100 targets each: the search for 200 quantiles is quick, and 20,000 targets are many.
    examples, each = 200, 100
    means, variances, _ = draw_members(5, examples, seed=3)
    generator = torch.Generator().manual_seed(0)
    member = torch.randint(5, (each, examples), generator=generator)
    mean, variance = means.gather(0, member), variances.gather(0, member)
    noise = torch.randn(each, examples, generator=generator, dtype=torch.float64)
    targets = (mean + variance.sqrt() * noise).flatten()

    interval = metrics.mixture_interval(means, variances, coverage=0.8)
    lower, upper = (bound.repeat(each) for bound in interval)
    assert metrics.interval_coverage(lower, upper, targets).item() == pytest.approx(0.8, abs=0.01)
    assert (targets < lower).double().mean().item() == pytest.approx(0.1, abs=0.01)
    at_risk = metrics.value_at_risk(means, variances, level=0.05)
    assert torch.equal(at_risk, -metrics.mixture_quantile(means, variances, 0.05))
    above = -at_risk.repeat(each)
    covered = metrics.interval_coverage(above, torch.full_like(above, math.inf), targets)
    assert covered.item() == pytest.approx(0.95, abs=0.01)


def test_coverage_by_hand():
    lower, upper = torch.tensor([0.0, 0.0, 1.0, -math.inf]), torch.tensor([1.0, 1.0, 1.0, 5.0])
    assert metrics.interval_coverage(lower, upper, torch.tensor([0.0, 1.5, 1.0, -9.0])) == 0.75


def test_the_interval_of_one_member_is_the_normal_one():
    interval = metrics.mixture_interval(torch.tensor([[2.0]]), torch.tensor([[9.0]]), coverage=0.95)
    z = scipy.stats.norm.ppf(0.975)
    assert interval.lower.item() == pytest.approx(2 - 3 * z, rel=1e-6)
    assert interval.upper.item() == pytest.approx(2 + 3 * z, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Correlation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decimals", [0, 1, 6])  # few decimals: many ties
def test_correlations_agree_with_scipy(dtype, decimals):
    x = draw(300).round(decimals=decimals).to(dtype)
    y = (draw(300, seed=1) + x.double()).round(decimals=decimals).to(dtype)
    assert metrics.pearson(x, y).item() == pytest.approx(scipy.stats.pearsonr(x.double(), y.double())[0])
    expected = scipy.stats.spearmanr(x.double(), y.double())[0]
    assert metrics.spearman(x, y).item() == pytest.approx(expected, rel=1e-12)


@given(seeds, st.integers(2, 20), st.sampled_from([1e-200, 1, 1e200]), st.sampled_from([0, 1e6]))
def test_pearson_ignores_scale_and_offset(seed, examples, scale, offset):
    x, y = draw(2, examples, seed=seed)
    expected = metrics.pearson(x, y)
    torch.testing.assert_close(metrics.pearson((x + offset) * scale, y), expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(metrics.pearson(-x, y), -expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(metrics.spearman(x.exp(), y), metrics.spearman(x, y), rtol=0, atol=1e-12)
    assert -1 <= expected <= 1 and metrics.pearson(x, x) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([1.0, 1 + 2**-52], [1.0, 0.0]),  # one rounding apart
        ([0.1, 0.1 + 2**-56, 0.1], [3.0, 1.0, 2.9]),
        ([1e307, -1e307, 9e307, 1.7e308], [1.0, 2.0, 0.5, 0.25]),  # whose sum overflows
        ([1.7e308, -1.7e308, 1e308], [1.7e308, -1.7e308, 1e308]),
        ([5e-324, 0.0], [0.0, 1.0]),
        ([1e-310, 3e-310, 2e-310], [1.0, 5.0, 0.0]),
    ],
)
def test_correlations_at_the_ends_of_the_range(x, y):
    with mpmath.workdps(700):

        def deviations(values):
            exact = [mpmath.mpf(v) for v in values]
            return [v - sum(exact) / len(exact) for v in exact]

        a, b = deviations(x), deviations(y)
        product = sum(u * v for u, v in zip(a, b, strict=True))
        right = float(product / mpmath.sqrt(sum(u * u for u in a) * sum(v * v for v in b)))
    x, y = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    assert metrics.pearson(x, y).item() == pytest.approx(right, rel=1e-14)
    assert metrics.spearman(x, y).item() == pytest.approx(scipy.stats.spearmanr(x, y)[0], rel=1e-14)


def test_errors_at_the_ends_of_the_range():
    y = torch.tensor([1.0, 1 + 2**-52], dtype=torch.float64)
    assert metrics.r_squared(y.flip(0), y).item() == -3  # 1 - 2 ulp² / (ulp² / 2)
    for scale in (1e-200, 1e200, 1e307):
        y = scale * torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
        predicted = scale * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
        assert metrics.rmse(predicted, y).item() == pytest.approx(scale / 2, rel=1e-14)
        assert metrics.r_squared(predicted, y).item() == pytest.approx(1 - 1 / 8.75, rel=1e-13)
    y, predicted = torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.inf])
    assert metrics.rmse(predicted, y).item() == torch.inf
    assert metrics.r_squared(predicted, y).item() == -torch.inf


def test_what_does_not_vary_has_no_correlation():
    x = torch.arange(3.0)
    for correlation in (metrics.pearson, metrics.spearman):
        assert correlation(x, torch.full((3,), 0.1)).isnan()
        assert correlation(x[:1], x[:1]).isnan()


# ------------------------------------------------------------------------------------------------------------
# Gradients, devices, bad input


def test_scores_are_differentiable():
    means, variances, y = draw_members(3, 4)
    inputs = [means.requires_grad_(), variances.requires_grad_(), y.requires_grad_()]
    for score in (metrics.gaussian_nll, metrics.gaussian_crps, metrics.mixture_cdf):
        assert torch.autograd.gradcheck(score, inputs)
    assert torch.autograd.gradcheck(metrics.ensemble_crps, [means, y])
    assert torch.autograd.gradcheck(metrics.pearson, [means[0], y])
    assert not metrics.mixture_quantile(means, variances, 0.5).requires_grad


def test_results_stay_on_the_device_and_agree_with_the_cpu(device):
    def measure(means, variances, y):
        return [
            metrics.rmse(means[0], y),
            metrics.r_squared(means[0], y),
            metrics.gaussian_nll(means, variances, y),
            metrics.gaussian_crps(means, variances, y),
            metrics.ensemble_crps(means, y),
            *metrics.mixture_interval(means, variances),
            metrics.value_at_risk(means, variances),
            metrics.mixture_cdf(means, variances, y),
            metrics.interval_coverage(*metrics.mixture_interval(means, variances), y),
            metrics.pearson(means[0], y),
            metrics.spearman(means[0], y),
        ]

    data = draw_members(4, 30)
    for there, here in zip(measure(*(x.to(device) for x in data)), measure(*data), strict=True):
        assert there.device.type == device.type
        torch.testing.assert_close(there.cpu(), here, rtol=1e-10, atol=1e-12)


X, V = draw(3, 4), draw(3, 4).exp()
Y = draw(4, seed=1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: metrics.rmse(X, Y),
            ValueError,
            r"rmse: targets: expected shape \[3, 4\], that of predictions",
        ),
        (lambda: metrics.rmse(Y[:0], Y[:0]), ValueError, r"rmse: predictions: expected .* with B >= 1"),
        (
            lambda: metrics.rmse(Y, Y.float()),
            TypeError,
            "rmse: targets: expected float64, the dtype of predictions, got float32",
        ),
        (lambda: metrics.rmse(Y, Y * math.nan), ValueError, "rmse: targets: expected no NaN, got 4 of 4"),
        (lambda: metrics.r_squared(X, X), ValueError, r"r_squared: predictions: expected shape \[B\]"),
        (lambda: metrics.gaussian_nll(X, V[:2], Y), ValueError, r"gaussian_nll: variances: expected shape"),
        (
            lambda: metrics.gaussian_nll(X, 0 * V, Y),
            ValueError,
            "gaussian_nll: variances: expected values > 0",
        ),
        (
            lambda: metrics.gaussian_crps(X, V, X),
            ValueError,
            r"gaussian_crps: targets: expected shape \[4\], that of one example of means, got \[3, 4\]",
        ),
        (lambda: metrics.gaussian_crps(X[:0], V[:0], Y), ValueError, r"gaussian_crps: means: .* with E >= 1"),
        (lambda: metrics.ensemble_crps(Y, Y), ValueError, r"ensemble_crps: outputs: expected shape \[E, B\]"),
        (
            lambda: metrics.mixture_quantile(X, V, 1.0),
            ValueError,
            "mixture_quantile: probability: expected a number strictly between 0 and 1, got 1.0",
        ),
        (
            lambda: metrics.mixture_quantile(X, V, Y),
            TypeError,
            "mixture_quantile: probability: expected a number, got Tensor",
        ),
        (lambda: metrics.mixture_interval(X, V, coverage=1.5), ValueError, "coverage: expected a number in"),
        (
            lambda: metrics.mixture_interval(X, -V),
            ValueError,
            "mixture_interval: variances: expected values >= 0",
        ),
        (lambda: metrics.value_at_risk(X / 0, V), ValueError, "value_at_risk: means: expected finite values"),
        (lambda: metrics.value_at_risk(X, V, level=0), ValueError, "value_at_risk: level: expected a number"),
        (
            lambda: metrics.mixture_cdf(X, V, X),
            ValueError,
            r"mixture_cdf: values: expected shape \[B\], got \[3, 4\]",
        ),
        (
            lambda: metrics.interval_coverage(Y, Y - 1, Y),
            ValueError,
            "interval_coverage: upper: expected values >= lower, got 4 of 4 below",
        ),
        (lambda: metrics.interval_coverage(Y, Y[:2], Y), ValueError, r"interval_coverage: upper: .* \[4\]"),
        (lambda: metrics.pearson(Y, Y[:2]), ValueError, r"pearson: y: expected shape \[4\], that of x"),
        (lambda: metrics.spearman(Y / 0, Y), ValueError, "spearman: x: expected finite values, got 4 of 4"),
        (lambda: metrics.spearman(Y.long(), Y), TypeError, "spearman: x: expected float32 or float64"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
