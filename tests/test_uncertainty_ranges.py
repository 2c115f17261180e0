"""What members disagree on when they are nearly sure or nearly equal, and moments at the ends of the range:
pyens.ops.predictive_uncertainty and predictive_moments against mpmath."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp, mpf
from uncertainty_members import INF, NAN

from pyens import metrics, reference
from pyens.ops import predictive_moments, predictive_uncertainty

FUNCTIONS = {"op": predictive_uncertainty, "reference": reference.predictive_uncertainty}
MOMENTS = {"op": predictive_moments, "reference": reference.predictive_moments}
mp.dps = 50


def exact_information(logits: torch.Tensor) -> torch.Tensor:
    """mean_m KL(p_m ‖ p̄) of `[E, B, K]` logits, from 50 digits."""
    e, b, k = logits.shape
    values = []
    for x in range(b):
        rows = []
        for m in range(e):
            terms = [mp.exp(mpf(z)) for z in logits[m, x].double().tolist()]
            rows.append([t / sum(terms) for t in terms])
        mean = [sum(row[i] for row in rows) / e for i in range(k)]
        divergence = sum(row[i] * mp.log(row[i] / mean[i]) for row in rows for i in range(k))
        values.append(float(divergence / e))
    return torch.tensor(values, dtype=torch.float64)


def nearly_sure(gap: float, dtype: torch.dtype, k: int = 5) -> torch.Tensor:
    """Members that give class 1 some `gap` nats more than the others."""
    logits = torch.randn(6, 12, k, dtype=torch.float64)
    logits[..., 1] += gap
    return logits.to(dtype)


# --- mutual information ------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gap", [0, 8, 12, 14, 16, 20, 22])
def test_information_of_members_that_are_nearly_sure(gap, dtype, function):
    logits = nearly_sure(gap, dtype)
    expected = exact_information(logits)
    assert expected.max() > 1e-11  # down to what is promised
    got = function(logits)
    tolerance = {torch.bfloat16: 4e-3}.get(dtype, 1e-4)
    torch.testing.assert_close(got.mutual_information.double(), expected, rtol=tolerance, atol=1e-15)
    torch.testing.assert_close(got.distribution_pv.double(), 6 * expected, rtol=tolerance, atol=1e-14)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4, 2e-5])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_information_of_members_that_are_nearly_equal(function, spread, shift):
    logits = torch.randn(1, 10, 7) + spread * torch.randn(8, 10, 7) + shift * torch.randn(8, 1, 1)
    expected = exact_information(logits)
    assert expected.min() > 1e-11
    got = function(logits).mutual_information.double()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


def test_information_of_many_classes():
    logits = torch.randn(1, 4, 150) + 1e-3 * torch.randn(3, 4, 150)
    logits[..., 149] += 12
    got = predictive_uncertainty(logits).mutual_information.double()
    torch.testing.assert_close(got, exact_information(logits), rtol=1e-4, atol=0)


def test_one_member_unlike_many_that_are_equal():
    for first in (0, 500):
        logits = torch.zeros(1000, 3, 2)
        logits[first, :, 1] = torch.tensor([5.0, 46.0, -46.0])
        got = predictive_uncertainty(logits).mutual_information.double()
        torch.testing.assert_close(got, exact_information(logits), rtol=1e-5, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(9,), (9, 3), (9, 10), (9, 200)], ids=str)
@pytest.mark.parametrize("copies", [1, 2, 33, 1000])
@pytest.mark.parametrize("from_probabilities", [False, True])
def test_equal_members_agree_to_the_last_bit(from_probabilities, copies, shape, dtype, function):
    members = (4 * torch.randn(1, *shape)).double()
    if from_probabilities:
        members = members.sigmoid() if len(shape) == 1 else members.softmax(-1)
    got = function(members.to(dtype).expand(copies, *shape), from_probabilities=from_probabilities)
    assert torch.equal(got.mutual_information, torch.zeros(9, dtype=dtype))
    assert torch.equal(got.distribution_pv, torch.zeros(9, dtype=dtype))


def test_a_million_equal_members_agree():
    got = predictive_uncertainty(torch.tensor([[0.3, -1.1, 2.0]]).expand(1_000_000, 1, 3))
    assert got.mutual_information == 0 and got.distribution_pv == 0


@pytest.mark.parametrize("name", ["mutual_information", "distribution_pv"])
@pytest.mark.parametrize("gap", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_of_members_that_are_nearly_sure(dtype, gap, name):
    # d MI / d z_mk = p_mk (l_mk - sum_j p_mj l_mj) / E with l = log(p_m / p̄)
    logits = nearly_sure(gap, dtype)
    expected = []
    for x in range(logits.shape[1]):
        rows = []
        for m in range(6):
            terms = [mp.exp(mpf(z)) for z in logits[m, x].double().tolist()]
            rows.append([t / sum(terms) for t in terms])
        mean = [sum(row[i] for row in rows) / 6 for i in range(5)]
        ratios = [[mp.log(p / q) for p, q in zip(row, mean, strict=True)] for row in rows]
        of_example = []
        for row, line in zip(rows, ratios, strict=True):
            divergence = sum(p * ratio for p, ratio in zip(row, line, strict=True))
            of_example.append(
                [float(p * (ratio - divergence) / 6) for p, ratio in zip(row, line, strict=True)]
            )
        expected.append(torch.tensor(of_example, dtype=torch.float64))
    expected = torch.stack(expected, 1) * (6 if name == "distribution_pv" else 1)
    for function in FUNCTIONS.values():
        leaf = logits.clone().requires_grad_()
        getattr(function(leaf), name).sum().backward()
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-16)


@given(st.integers(0, 2**31), st.sampled_from([2, 5, 130]), st.floats(-5, 0), st.floats(0, 18))
def test_information_has_the_digits_it_promises(seed, k, log_spread, gap):
    torch.manual_seed(seed)
    logits = torch.randn(1, 3, k) + 10**log_spread * torch.randn(4, 3, k)
    logits[..., 0] += gap
    expected = exact_information(logits)
    got = predictive_uncertainty(logits).mutual_information.double()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-14)


def test_masked_classes_beside_members_that_are_nearly_sure():
    logits = nearly_sure(14, torch.float32)
    masked = torch.cat([logits, torch.full((6, 12, 2), -INF)], -1)
    for ours, theirs in zip(
        predictive_uncertainty(masked)[1:], predictive_uncertainty(logits)[1:], strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    some = logits.clone()
    some[0, :, 2] = -INF  # of one member
    assert predictive_uncertainty(some).mutual_information.isfinite().all()


# --- moments -----------------------------------------------------------------------------------------------


def exact_moments(column: torch.Tensor) -> tuple[float, float, float, torch.Tensor, torch.Tensor]:
    """Mean, std, epistemic variance, and the gradients of the last two, from 700 digits."""
    with mp.workdps(700):
        members = [mpf(v) for v in column.double().tolist()]
        e = len(members)
        mean = sum(members) / e
        squares = sum((v - mean) ** 2 for v in members)
        std = mp.sqrt(squares / (e - 1))
        of_std = [float((v - mean) / std / (e - 1)) if std else 0.0 for v in members]
        of_epistemic = [float(2 * (v - mean) / e) for v in members]
        gradients = (torch.tensor(g, dtype=torch.float64) for g in (of_std, of_epistemic))
        return float(mean), float(std), float(squares / e), *gradients


ENDS = {
    "one diverged": [5e18, 1, 1, 1, 1],
    "a square overflows": [1e20, 1],
    "squares vanish": [1e-30, 1e-23],
    "both ends": [1e-38, 3e38, -3e38, 0],
    "the largest": [3e38, 3e38, 3e38],
    "the largest, apart": [3.4e38, -3.4e38],
    "subnormal": [1e-45, 3e-45, 1.4e-44],
    "subnormal and 1": [1.0, 1e-45],
    "an offset": [1e6, 1e6 + 0.125, 1e6 + 0.25],
}
ENDS_OF_DOUBLE = {
    "a square overflows": [1e200, 1.0],
    "the largest": [1.7e308, 1.7e308, 1.6e308],
    "the largest, apart": [1.7e308, -1.7e308, 1.0],
    "squares vanish": [1e-200, 3e-200, 2.5e-200],
    "subnormal": [5e-324, 1e-322, 5e-323],
    "both ends": [1e-320, 1e300, -1e299],
}
CASES = [(name, torch.float32, values) for name, values in ENDS.items()]
CASES += [(name, torch.float64, values) for name, values in {**ENDS, **ENDS_OF_DOUBLE}.items()]


over_the_ends = pytest.mark.parametrize(
    ("dtype", "values"),
    [(dtype, values) for _, dtype, values in CASES],
    ids=[f"{name}, {dtype}" for name, dtype, _ in CASES],
)


@pytest.mark.parametrize("function", MOMENTS.values(), ids=MOMENTS)
@over_the_ends
def test_moments_at_the_ends_of_the_range(dtype, values, function):
    column = torch.tensor(values, dtype=dtype)
    eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    mean, std, epistemic, _, _ = exact_moments(column)
    aleatoric = exact_moments(column.abs())[0]
    beside = torch.randn(len(values), 20, dtype=dtype)
    for order in (range(len(values)), reversed(range(len(values)))):
        outputs = beside.clone()
        outputs[:, 7] = column[list(order)]
        got = function(outputs, variances=outputs.abs())
        # The mean of members of both signs is as right as they are.
        for ours, theirs, scale in (
            (got.mean, mean, float(column.abs().max())),
            (got.std, std, std),
            (got.epistemic, epistemic, epistemic),
            (got.aleatoric, aleatoric, aleatoric),
        ):
            expected = torch.tensor(theirs, dtype=torch.float64).to(dtype)
            torch.testing.assert_close(ours[7], expected, rtol=0, atol=8 * eps * min(scale, 1e308) + smallest)
        if function is predictive_moments:
            alone = function(outputs[:, [7]], variances=outputs[:, [7]].abs())
            assert all(torch.equal(whole[[7]], part) for whole, part in zip(got, alone, strict=True))
            assert torch.equal(metrics.value_variation(outputs), got.std)


@over_the_ends
def test_gradients_of_moments_at_the_ends_of_the_range(dtype, values):
    column = torch.tensor(values, dtype=dtype)
    *_, of_std, of_epistemic = exact_moments(column)

    def gradient(name):
        leaf = column[:, None].clone().requires_grad_()
        getattr(predictive_moments(leaf, variances=leaf.detach().abs()), name).sum().backward()
        return leaf.grad[:, 0]

    eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient("std"), of_std.to(dtype), rtol=4 * eps, atol=4 * eps)
    scale = float(of_epistemic.abs().max())
    torch.testing.assert_close(
        gradient("epistemic"), of_epistemic.to(dtype), rtol=0, atol=8 * eps * scale + 2 * smallest
    )


@pytest.mark.parametrize("function", MOMENTS.values(), ids=MOMENTS)
def test_an_infinite_member_is_not_a_diverged_one(function):
    outputs = torch.tensor([[INF, -INF, INF, NAN, 3e38], [1.0, 1.0, -INF, INF, 3e38]])
    got = function(outputs)
    torch.testing.assert_close(
        got.mean, torch.tensor([INF, -INF, NAN, NAN, 3e38]), equal_nan=True, rtol=1e-6, atol=0
    )
    assert got.std[:4].isnan().all() and got.std[4] == 0
