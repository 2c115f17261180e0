"""pyens.ops.predictive_uncertainty against its reference in float64, and the promises of its docstring; and
both operations in the dispatcher, the compiler and torch.func."""

import math
import re

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from uncertainty_members import DTYPES, EPS, INF, NAN, as_probabilities, assert_close, draw, with_threads

from benchmarks import harness, uncertainty
from pyens import reference
from pyens.ops import predictive_moments, predictive_uncertainty

# [E, B] and [E, B, K]: both mappings of the CPU kernel, lanes, tiles and blocks of members +- 1.
SHAPES = [
    (1, 1),
    (3, 15),
    (33, 17),
    (100, 300),
    (2, 1, 1),
    (5, 7, 2),
    (4, 16, 3),
    (32, 33, 4),
    (33, 31, 5),
    (70, 9, 10),
    (3, 300, 10),
    (2, 40, 64),
    (3, 17, 127),
    (34, 5, 128),
    (4, 9, 200),
    (5, 3, 1000),
]
DIFFERENTIABLE = [
    "mean_probability",
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "distribution_pv",
]

# --- predictive_uncertainty: values ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("from_probabilities", [False, True])
def test_matches_the_reference(dtype, shape, from_probabilities):
    members = draw(shape, dtype)
    if from_probabilities:
        members = as_probabilities(members)
    got = predictive_uncertainty(members, from_probabilities=from_probabilities)
    plain = reference.predictive_uncertainty(members, from_probabilities=from_probabilities)
    oracle = reference.predictive_uncertainty(members.double(), from_probabilities=from_probabilities)
    assert type(got) is type(oracle)
    for name in got._fields:
        scale = {  # differences of entropies are off by what the entropies are off
            "mutual_information": oracle.predictive_entropy,
            "distribution_pv": oracle.predictive_entropy * shape[0],
            "vote_disagreement": torch.ones(()),
        }.get(name)
        assert_close(getattr(got, name), getattr(plain, name), getattr(oracle, name), scale)


def test_agrees_with_scipy():
    logits = draw((7, 50, 4), torch.float64)
    p = scipy.special.softmax(logits.numpy(), axis=-1)
    mean = p.mean(0)
    got = predictive_uncertainty(logits)
    np.testing.assert_allclose(got.mean_probability, mean, rtol=1e-12)
    np.testing.assert_allclose(got.predictive_entropy, scipy.stats.entropy(mean, axis=-1), rtol=1e-12)
    np.testing.assert_allclose(got.expected_entropy, scipy.stats.entropy(p, axis=-1).mean(0), rtol=1e-12)
    divergence = scipy.stats.entropy(p, mean[None], axis=-1)  # [E, B], KL of each member from the mean
    np.testing.assert_allclose(got.mutual_information, divergence.mean(0), rtol=1e-10)
    np.testing.assert_allclose(got.distribution_pv, divergence.sum(0), rtol=1e-10)
    winners = scipy.stats.mode(p.argmax(-1), axis=0).count / 7
    np.testing.assert_allclose(got.vote_disagreement, 1 - winners, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_binary_logit_is_two_classes(dtype):
    logits = draw((9, 70), dtype)
    two = predictive_uncertainty(torch.stack([torch.zeros_like(logits), logits], -1))
    one = predictive_uncertainty(logits)
    assert torch.equal(one.mean_probability, two.mean_probability[:, 1])
    for name in one._fields[1:]:
        assert torch.equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("k", [10, 130])
def test_probabilities_give_what_their_logits_give(k):
    logits = draw((20, 40, k), torch.float64)
    got = predictive_uncertainty(logits.softmax(-1), from_probabilities=True)
    for ours, expected in zip(got, predictive_uncertainty(logits), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)


def test_entropies_over_the_whole_range():
    # One member, p and 1 - p: the entropy is made of two logarithms, each right to some roundings.
    p = torch.cat([torch.logspace(-30, -0.3, 3000), torch.linspace(0.5, 1, 3000)])
    got = predictive_uncertainty(p[None], from_probabilities=True).expected_entropy
    exact = torch.special.entr(p.double()) + torch.special.entr((1 - p).double())
    torch.testing.assert_close(got.double(), exact, rtol=3e-7, atol=0)
    z = torch.cat([torch.linspace(-85, 85, 5001), torch.logspace(-30, 1, 500)])
    got = predictive_uncertainty(z[None]).expected_entropy
    exact = torch.nn.functional.softplus(-z.double().abs()) + z.double().abs() * torch.sigmoid(
        -z.double().abs()
    )
    # log(1 + e^-|z|): what is small beside 1 is off by a rounding of 1.
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1.2e-7)


@pytest.mark.parametrize("k", [5, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_magnitude(dtype, k):
    largest = torch.finfo(dtype).max
    logits = torch.zeros(3, 4, k, dtype=dtype)
    logits[:, 0, 2] = largest  # certain
    logits[:, 0, 3] = -largest
    logits[:, 1] = -largest  # all alike
    logits[:, 2, 1:] = -INF  # masked
    logits[:, 3] += 1e4 + torch.arange(k)
    got = predictive_uncertainty(logits)
    one_hot = torch.eye(k, dtype=dtype)
    assert torch.equal(got.mean_probability[0], one_hot[2])
    torch.testing.assert_close(got.mean_probability[1], torch.full((k,), 1 / k, dtype=dtype))
    assert torch.equal(got.mean_probability[2], one_hot[0])
    torch.testing.assert_close(got.mean_probability[3], torch.arange(k, dtype=dtype).softmax(0))
    torch.testing.assert_close(
        got.predictive_entropy[:3], torch.tensor([0, math.log(k), 0], dtype=dtype), rtol=1e-6, atol=0
    )
    assert (got.mutual_information <= 1e-6).all() and (got.mutual_information >= 0).all()


def test_votes_of_classes_that_tie_go_to_the_first():
    for k in (3, 150):
        logits = torch.zeros(4, 20, k)
        logits[2:, :, 1] = 1
        assert torch.equal(predictive_uncertainty(logits).vote_disagreement, torch.full((20,), 0.5))
        votes = torch.ops.pyens.predictive_uncertainty(logits, False, True)[6]
        assert torch.equal(votes, torch.tensor([2, 2] + [0] * (k - 2), dtype=torch.int32).expand(20, k))
    zero = torch.ops.pyens.predictive_uncertainty(torch.zeros(4, 5), False, True)
    assert torch.equal(zero[6], torch.tensor([4, 0], dtype=torch.int32).expand(5, 2))
    assert torch.ops.pyens.predictive_uncertainty(torch.zeros(4, 5), False, False)[6].shape == (0,)


@pytest.mark.parametrize("k", [None, 6, 130])
@pytest.mark.parametrize("from_probabilities", [False, True])
def test_nan_stays_in_its_example(k, from_probabilities):
    members = draw((5, 50) if k is None else (5, 50, k), torch.float32)
    if from_probabilities:
        members = as_probabilities(members)
    clean = predictive_uncertainty(members, from_probabilities=from_probabilities)
    bad = torch.zeros(50, dtype=torch.bool)
    bad[[0, 20, 49]] = True
    members[2, 0] = NAN
    members[4, 20, ...] = NAN
    members[0, 49] = NAN if from_probabilities else INF  # inf - inf
    if k is not None:
        members[2, 0, : k - 1] = 0  # only one of the classes is
    got = predictive_uncertainty(members, from_probabilities=from_probabilities)
    # Without logits, only the mean of the class that is NaN is NaN.
    assert got.mean_probability[0].isnan().any()
    if k is None and not from_probabilities:
        bad[49] = False  # one infinite binary logit is a certain one
        assert got.mean_probability[49] > clean.mean_probability[49]
    for name in got._fields:
        ours, expected = getattr(got, name), getattr(clean, name)
        if name == "mean_probability":
            assert ours[[20]].isnan().all()
        else:
            assert ours[bad].isnan().all()
        untouched = [b for b in range(50) if b not in (0, 20, 49)]
        assert torch.equal(ours[untouched], expected[untouched])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_member_one_class_and_no_example(dtype):
    logits = draw((1, 40, 6), dtype)
    got = predictive_uncertainty(logits)
    tolerance = {"rtol": 8 * EPS[dtype], "atol": 8 * EPS[dtype]}
    torch.testing.assert_close(got.mean_probability, logits[0].double().softmax(-1).to(dtype), **tolerance)
    torch.testing.assert_close(got.predictive_entropy, got.expected_entropy, **tolerance)
    assert (got.mutual_information == 0).all() and (got.distribution_pv == 0).all()
    assert torch.equal(got.vote_disagreement, torch.zeros(40, dtype=dtype))
    for measure, expected in zip(
        predictive_uncertainty(draw((3, 40, 1), dtype)), [1, 0, 0, 0, 0, 0], strict=True
    ):
        assert (measure == expected).all()
    for shape in ((3, 0), (3, 0, 4), (3, 0, 200)):
        empty = predictive_uncertainty(torch.empty(shape, dtype=dtype))
        assert empty.mean_probability.shape == shape[1:]
        assert all(measure.shape == (0,) for measure in empty[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 40), (5, 40, 3), (5, 40, 11), (5, 20, 140)], ids=str)
def test_strided_expanded_and_misaligned(dtype, shape):
    members = draw(shape, dtype)
    expected = predictive_uncertainty(members)
    storage = torch.empty(members.numel() + 1, dtype=dtype)
    last = shape[-1]
    for changed in (
        storage[1:].view(shape).copy_(members),
        members.transpose(-1, -2).contiguous().transpose(-1, -2),
        members.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([members, torch.full_like(members, NAN)], -1)[..., :last],
    ):
        for ours, theirs in zip(predictive_uncertainty(changed), expected, strict=True):
            assert torch.equal(ours, theirs)
    same = members[:1].expand(7, *shape[1:])
    for ours, theirs in zip(
        predictive_uncertainty(same), predictive_uncertainty(same.contiguous()), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(40, 1000), (40, 1000, 10), (35, 100, 300)], ids=str)
def test_same_bits_for_any_number_of_threads_and_any_examples_beside(shape):
    members = draw(shape, torch.float32)
    whole, *others = with_threads(lambda: predictive_uncertainty(members))
    assert all(torch.equal(other, whole) for other in others)
    parts = [predictive_uncertainty(part) for part in members.split([1, 15, 30, shape[1] - 46], 1)]
    for ours, theirs in zip(zip(*parts, strict=True), predictive_uncertainty(members), strict=True):
        assert torch.equal(torch.cat(ours), theirs)


# --- predictive_uncertainty: properties --------------------------------------------------------------------


@st.composite
def ensembles(draw_value) -> Tensor:
    e, b = draw_value(st.integers(1, 40)), draw_value(st.integers(0, 20))
    k = draw_value(st.sampled_from([1, 2, 3, 10, 130]))
    torch.manual_seed(draw_value(st.integers(0, 2**31)))
    return draw((e, b, k), torch.float32, scale=draw_value(st.sampled_from([1e-4, 1.0, 30.0, 1e4])))


@given(ensembles(), st.integers(0, 2**31))
def test_measures_are_bounded_and_members_interchangeable(logits, seed):
    got = predictive_uncertainty(logits)
    e, _, k = logits.shape
    assert (got.mutual_information >= 0).all() and (got.distribution_pv >= 0).all()
    assert (got.mutual_information <= math.log(min(e, k)) + 2e-6).all()
    assert (got.expected_entropy >= 0).all() and (got.predictive_entropy <= math.log(k) + 2e-6).all()
    assert ((got.vote_disagreement >= 0) & (got.vote_disagreement <= 1 - 1 / min(e, k) + 1e-6)).all()
    torch.testing.assert_close(got.distribution_pv, e * got.mutual_information)
    order = torch.randperm(e, generator=torch.Generator().manual_seed(seed))
    for ours, theirs in zip(predictive_uncertainty(logits[order]), got, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6 * e)


@given(ensembles(), st.integers(1, 100))
def test_members_that_are_equal_do_not_disagree(logits, copies):
    got = predictive_uncertainty(logits[:1].expand(copies, -1, -1))
    assert (got.mutual_information == 0).all() and (got.distribution_pv == 0).all()
    assert torch.equal(got.vote_disagreement, torch.zeros_like(got.vote_disagreement))


# --- predictive_uncertainty: gradients ---------------------------------------------------------------------


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 2, 4), (3, 4)], ids=str)
@pytest.mark.parametrize("from_probabilities", [False, True])
def test_gradients(from_probabilities, shape, name):
    members = draw(shape, torch.float64, scale=1.0).requires_grad_()

    def function(logits):
        # Probabilities stay distributions only if they come from somewhere.
        members = logits
        if from_probabilities:
            members = logits.sigmoid() if logits.dim() == 2 else logits.softmax(-1)
        return getattr(predictive_uncertainty(members, from_probabilities=from_probabilities), name)

    assert torch.autograd.gradcheck(function, members)
    assert torch.autograd.gradgradcheck(function, members)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_all_measures_together(dtype):
    logits = draw((6, 30, 5), dtype)

    def gradient(function, logits):
        logits = logits.detach().requires_grad_()
        measures = function(logits)
        sum((i + 1) * x.sum() for i, x in enumerate(measures[1:5])).backward()
        return logits.grad

    got = gradient(predictive_uncertainty, logits)
    plain = gradient(reference.predictive_uncertainty, logits)
    assert_close(got, plain, gradient(reference.predictive_uncertainty, logits.double()))


@pytest.mark.parametrize("from_probabilities", [False, True])
def test_gradients_of_certain_members_are_finite(from_probabilities):
    members = torch.tensor([[[0.0, -INF, -200.0], [300.0, 0.0, -300.0]]]).expand(2, -1, -1).clone()
    if from_probabilities:
        members = members.softmax(-1)
    members.requires_grad_()
    got = predictive_uncertainty(members, from_probabilities=from_probabilities)
    sum(x.sum() for x in got[:5]).backward()
    assert members.grad.isfinite().all()


def test_votes_have_no_gradient():
    logits = draw((3, 4, 5), torch.float32).requires_grad_()
    got = predictive_uncertainty(logits)
    assert all(getattr(got, name).requires_grad for name in DIFFERENTIABLE)
    assert not got.vote_disagreement.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        got.vote_disagreement.sum().backward()


# --- predictive_uncertainty: bad input ---------------------------------------------------------------------

P = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]]).expand(4, 3, 2)


def with_row(m: int, b: int, row: list[float], k: int = 2) -> Tensor:
    members = torch.zeros(4, 3, k)
    members[..., :2] = P
    members[m, b, : len(row)] = torch.tensor(row)
    return members


BAD_UNCERTAINTY = {
    "rank 1": (P[0, 0], False, ValueError, r"logits: expected \[E, B\] or \[E, B, K\], got shape \[2\]"),
    "rank 4": (P[None], False, ValueError, r"logits: expected .*, got shape \[1, 4, 3, 2\]"),
    "no member": (P[:0], False, ValueError, r"logits: expected at least one member .*shape \[0, 3, 2\]"),
    "no class": (P[..., :0], True, ValueError, r"logits: expected .* class or output, got shape"),
    "integers": (P.long(), False, TypeError, r"logits: expected float32, .*got Long"),
    "sum": (
        with_row(2, 1, [0.5, 0.6]),
        True,
        ValueError,
        r"logits: expected probabilities >= 0 that sum to 1 within 0.0001, got a row with sum 1.1 and "
        r"smallest 0.5 \(member 2, example 1\)",
    ),
    "negative": (
        with_row(1, 2, [-0.25, 1.25]),
        True,
        ValueError,
        r".* smallest -0.25 \(member 1, example 2\)",
    ),
    "infinite": (with_row(1, 2, [INF, 0]), True, ValueError, r".*sum inf .*\(member 1, example 2\)"),
    "sum of many": (with_row(3, 2, [0.5, 0.6], 200), True, ValueError, r".*1.1 .*\(member 3, example 2\)"),
    "negative of many": (with_row(0, 0, [-0.25, 1.25], 200), True, ValueError, r".*\(member 0, example 0\)"),
    "binary": (
        torch.tensor([[0.5, 0.5], [0.5, 1.5]]),
        True,
        ValueError,
        r"logits: expected probabilities in \[0, 1\], got 1.5 of member 1, example 1",
    ),
}


@pytest.mark.parametrize("case", BAD_UNCERTAINTY)
def test_bad_input(case):
    members, from_probabilities, error, message = BAD_UNCERTAINTY[case]
    for needs_grad in (False, members.is_floating_point()):
        leaf = members.clone().requires_grad_(needs_grad)
        with pytest.raises(error, match=r"^predictive_uncertainty: " + message):
            predictive_uncertainty(leaf, from_probabilities=from_probabilities)


@pytest.mark.parametrize("case", ["rank 4", "no member", "no class", "integers"])
def test_bad_input_on_fake_tensors(case):
    members, from_probabilities, error, message = BAD_UNCERTAINTY[case]
    with pytest.raises(error, match=message):
        torch.ops.pyens.predictive_uncertainty(members.to("meta"), from_probabilities, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [10, 150])
def test_rounded_probabilities_are_probabilities(dtype, k):
    p = draw((20, 50, k), torch.float64).softmax(-1).to(dtype)
    assert (predictive_uncertainty(p, from_probabilities=True).predictive_entropy > 0).all()
    # Logits by mistake: wrong by far more than a rounding.
    with pytest.raises(ValueError, match="expected probabilities"):
        predictive_uncertainty(p * 1.1, from_probabilities=True)


# --- the dispatcher ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 2)], ids=str)
def test_opcheck(shape, requires_grad):
    members = draw(shape, torch.float32).requires_grad_(requires_grad)
    for with_votes in (False, True):
        torch.library.opcheck(torch.ops.pyens.predictive_uncertainty, (members, False, with_votes))
    p = as_probabilities(members.detach()).requires_grad_(requires_grad)
    # Its random gradients would leave the simplex: only what does not move the probabilities.
    torch.library.opcheck(torch.ops.pyens.predictive_uncertainty, (p, True, False))
    variances = torch.rand(shape).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.pyens.predictive_moments, (members, None))
    torch.library.opcheck(torch.ops.pyens.predictive_moments, (members, variances))


def of_everything(logits: Tensor) -> Tensor:
    measures = predictive_uncertainty(logits * 2)
    moments = predictive_moments(logits, variances=logits.exp())
    return sum(x.sum() for x in (*measures, *moments))


def test_compile_without_graph_breaks_or_many_recompilations():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(of_everything, fullgraph=True, backend=counter)
    for b in (5, 7, 12, 16, 33, 64, 100):
        logits = draw((3, b, 4), torch.float32).requires_grad_()
        got, expected = compiled(logits), of_everything(logits)
        assert torch.equal(got, expected)
        for ours, theirs in zip(
            torch.autograd.grad(got, logits), torch.autograd.grad(expected, logits), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count <= 2  # one for the first size, one for all others


def test_compiled_by_inductor():
    torch._dynamo.reset()
    logits = draw((3, 20, 4), torch.float32).requires_grad_()
    got, expected = torch.compile(of_everything, fullgraph=True)(logits), of_everything(logits)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, logits), torch.autograd.grad(expected, logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_in_float32(dtype):
    logits = draw((3, 20, 4), dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        got = (*predictive_uncertainty(logits), *predictive_moments(logits, variances=logits.abs()))
    single = logits.float()
    expected = (*predictive_uncertainty(single), *predictive_moments(single, variances=single.abs()))
    assert all(
        ours.dtype == torch.float32 and torch.equal(ours, x) for ours, x in zip(got, expected, strict=True)
    )
    sum(x.sum() for x in got).backward()
    assert logits.grad.dtype == dtype


# --- torch.func --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 4)], ids=str)
def test_func_grad(shape):
    logits = draw(shape, torch.float64, scale=1.0)

    def loss(uncertainty, moments):
        def function(z):
            measures, with_variances = uncertainty(z), moments(z, variances=z.exp())
            return sum((x * x).sum() for x in (*measures[:5], *with_variances, *moments(z)[:4]))

        return function

    ours = loss(predictive_uncertainty, predictive_moments)
    theirs = loss(reference.predictive_uncertainty, reference.predictive_moments)
    torch.testing.assert_close(torch.func.grad(ours)(logits), torch.func.grad(theirs)(logits))

    def twice(function):
        return torch.func.grad(lambda z: torch.func.grad(function)(z).square().sum())

    torch.testing.assert_close(twice(ours)(logits), twice(theirs)(logits))


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 4)], ids=str)
def test_func_vmap(shape, dim):
    batches = torch.stack([draw(shape, torch.float64) for _ in range(5)], dim)
    variances = torch.rand(shape, dtype=torch.float64)

    def function(z):
        return (
            *predictive_uncertainty(z),
            *predictive_moments(z, variances=variances),
            *predictive_moments(z)[:4],
            *predictive_moments(variances, variances=z.exp()),
        )

    got = torch.func.vmap(function, in_dims=dim)(batches)
    for i, z in enumerate(batches.unbind(dim)):
        for ours, theirs in zip(got, function(z), strict=True):
            torch.testing.assert_close(ours[i], theirs)
    gradients = torch.func.vmap(
        torch.func.grad(lambda z: sum(x.sum() for x in function(z)[:5])), in_dims=dim
    )(batches)
    for i, z in enumerate(batches.unbind(dim)):
        leaf = z.clone().requires_grad_()
        sum(x.sum() for x in function(leaf)[:5]).backward()
        torch.testing.assert_close(gradients[i], leaf.grad)


@pytest.mark.parametrize("function", [predictive_uncertainty, predictive_moments])
def test_func_forward_mode(function):
    members, tangents = draw((3, 6), torch.float64, scale=1.0), draw((3, 6), torch.float64, scale=1.0)
    got, expected = (
        torch.func.jvp(lambda x: tuple(f(x)[:4]), (members,), (tangents,))  # noqa: B023
        for f in (function, getattr(reference, function.__name__))
    )
    torch.testing.assert_close(got, expected)


def test_the_docstrings_say_what_the_reference_says():
    # The named tuples' fields are documented where the operations are.
    for function in (predictive_uncertainty, predictive_moments):
        fields = type(function(draw((3, 4), torch.float32)))._fields
        assert all(re.search(rf"\b{field}\b", function.__doc__) for field in fields)


# --- CUDA --------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("from_probabilities", [False, True])
def test_on_cuda(dtype, shape, from_probabilities):
    members = draw(shape, dtype)
    if from_probabilities:
        members = as_probabilities(members)
    there = predictive_uncertainty(members.cuda(), from_probabilities=from_probabilities)
    again = predictive_uncertainty(members.cuda(), from_probabilities=from_probabilities)
    plain = reference.predictive_uncertainty(members, from_probabilities=from_probabilities)
    oracle = reference.predictive_uncertainty(members.double(), from_probabilities=from_probabilities)
    for name in there._fields:
        scale = {
            "mutual_information": oracle.predictive_entropy,
            "distribution_pv": oracle.predictive_entropy * shape[0],
            "vote_disagreement": torch.ones(()),
        }.get(name)
        got = getattr(there, name)
        assert torch.equal(got, getattr(again, name))
        assert_close(got.cpu(), getattr(plain, name), getattr(oracle, name), scale)


@pytest.mark.cuda
def test_on_cuda_a_row_that_is_no_distribution_makes_its_example_nan():
    members = as_probabilities(draw((3, 5, 4), torch.float32))
    wrong = members.clone()
    wrong[1, 2, 0] += 0.5
    wrong[0, 4] = torch.tensor([-0.5, 0.5, 0.5, 0.5])
    got = predictive_uncertainty(wrong.cuda(), from_probabilities=True)
    expected = predictive_uncertainty(members.cuda(), from_probabilities=True)
    for a, b in zip(got, expected, strict=True):
        assert a[[2, 4]].isnan().all() and torch.equal(a[[0, 1, 3]], b[[0, 1, 3]])


@pytest.mark.cuda
def test_gradients_on_cuda():
    logits = draw((4, 6, 3), torch.float64)
    for function in (predictive_uncertainty, predictive_moments):
        grads = []
        for device in ("cpu", "cuda"):
            leaf = logits.to(device).requires_grad_()
            results = [x for x in function(leaf) if x is not None and x.requires_grad]
            grads.append(torch.autograd.grad(sum(x.square().sum() for x in results), leaf)[0].cpu())
        torch.testing.assert_close(*grads)


# --- the benchmark -----------------------------------------------------------------------------------------


def test_quick_benchmark(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        command = ["--quick", "--threads", "1", "--output", str(tmp_path)]
        assert harness.main("uncertainty", "", uncertainty.cases, command) == 0
    finally:
        torch.set_num_threads(threads)  # a benchmark sets them for the whole process
    tiny, moments = harness.Report.load(tmp_path / "uncertainty-cpu-float32-quick.json").results
    assert {timing.name for timing in tiny.timed()} == {"pyens op", "reference", "without float64"}
    assert {t.name for t in moments.timed()} >= {"pyens op", "std_mean, aminmax", "mean, std, amin, amax"}
    assert "vs best peer" in capsys.readouterr().out
