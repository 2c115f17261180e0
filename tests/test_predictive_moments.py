"""pyens.ops.predictive_moments against its reference in float64, and the promises of its docstring."""

import pytest
import torch
from uncertainty_members import DTYPES, INF, NAN, assert_close, draw, with_threads

from pyens import reference
from pyens.ops import predictive_moments

MOMENT_SHAPES = [(1, 5), (2, 17), (15, 33), (16, 64), (17, 3000), (100, 33), (3, 7, 2), (40, 300, 10)]


@pytest.mark.parametrize("shape", MOMENT_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_match_the_reference(dtype, shape):
    outputs, variances = draw(shape, dtype), torch.rand(shape).to(dtype)
    got = predictive_moments(outputs, variances=variances)
    plain = reference.predictive_moments(outputs, variances=variances)
    oracle = reference.predictive_moments(outputs.double(), variances=variances.double())
    assert type(got) is type(oracle)
    for name in got._fields:
        if name == "std" and shape[0] == 1:
            assert got.std.isnan().all() and got.std.dtype == dtype
        else:
            assert_close(getattr(got, name), getattr(plain, name), getattr(oracle, name))
    without = predictive_moments(outputs)
    assert without.aleatoric is None and without.epistemic is None
    assert all(torch.equal(a, b) or a.isnan().all() for a, b in zip(without[:4], got[:4], strict=True))


@pytest.mark.parametrize("offset", [1e3, -3e5])
def test_an_offset_costs_the_moments_no_digits(offset):
    outputs = draw((100, 500), torch.float32) + offset
    got = predictive_moments(outputs, variances=torch.ones_like(outputs))
    torch.testing.assert_close(got.std.double(), outputs.double().std(0), rtol=2e-6, atol=0)
    torch.testing.assert_close(
        got.epistemic.double(), outputs.double().var(0, correction=0), rtol=4e-6, atol=0
    )
    torch.testing.assert_close(got.mean.double(), outputs.double().mean(0), rtol=3e-7, atol=0)


def test_one_member_unlike_the_others():
    outputs = draw((100, 500), torch.float32)
    outputs[0] += 1e4  # what the deviations of the first block are relative to
    got = predictive_moments(outputs)
    torch.testing.assert_close(got.std.double(), outputs.double().std(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("members", [2, 16, 100])
def test_moments_of_equal_members(dtype, members):
    outputs = (torch.randn(1, 70) * 1000 + 0.1).to(dtype).expand(members, -1)
    got = predictive_moments(outputs, variances=outputs.abs())
    assert torch.equal(got.std, torch.zeros_like(got.std))
    assert torch.equal(got.epistemic, torch.zeros_like(got.epistemic))
    for extreme in (got.mean, got.min, got.max):
        assert torch.equal(extreme, outputs[0])


@pytest.mark.parametrize("members", [3, 40])
def test_moments_of_nan_and_inf_as_in_torch(members):
    outputs = torch.randn(members, 40)
    outputs[0, 1], outputs[1, 2], outputs[-1, 3] = NAN, NAN, NAN
    outputs[0, 4], outputs[1, 5], outputs[-1, 6] = INF, -INF, INF
    outputs[0, 7], outputs[1, 7] = INF, -INF
    outputs[0, 8], outputs[1, 8] = INF, NAN
    got = predictive_moments(outputs, variances=torch.ones_like(outputs))
    expected = (outputs.mean(0), outputs.std(0), outputs.amin(0), outputs.amax(0))
    for ours, theirs in zip(got[:4], expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.epistemic, outputs.var(0, correction=0), equal_nan=True)


def test_aleatoric_and_epistemic_add_up_to_the_variance_of_the_mixture():
    means, variances = torch.randn(5, 4, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    got = predictive_moments(means, variances=variances)
    second = (means.square() + variances).mean(0)
    torch.testing.assert_close(got.aleatoric + got.epistemic, second - means.mean(0).square())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_of_no_example(dtype):
    for shape in ((3, 0), (3, 0, 4)):
        got = predictive_moments(torch.empty(shape, dtype=dtype))
        assert all(x.shape == shape[1:] and x.dtype == dtype for x in got[:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_of_strided_expanded_and_misaligned(dtype):
    outputs = draw((20, 30, 7), dtype)
    expected = predictive_moments(outputs, variances=outputs.abs())
    storage = torch.empty(outputs.numel() + 1, dtype=dtype)
    for changed in (
        storage[1:].view(outputs.shape).copy_(outputs),
        outputs.transpose(1, 2).contiguous().transpose(1, 2),
        outputs.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([outputs, outputs], -1)[..., :7],
        torch.cat([outputs, outputs], 1)[:, :30],
    ):
        got = predictive_moments(changed, variances=changed.abs())
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


def test_same_moments_for_any_number_of_threads_and_any_examples_beside():
    outputs = draw((40, 20_000), torch.float32)
    whole, *others = with_threads(lambda: predictive_moments(outputs, variances=outputs.abs()))
    assert all(torch.equal(other, whole) for other in others)
    parts = [predictive_moments(part) for part in outputs.split([1, 99, 900, 19_000], 1)]
    for ours, theirs in zip(
        zip(*(part[:4] for part in parts), strict=True), predictive_moments(outputs)[:4], strict=True
    ):
        assert torch.equal(torch.cat(ours), theirs)


@pytest.mark.parametrize("name", ["mean", "std", "min", "max", "aleatoric", "epistemic"])
def test_gradients_of_moments(name):
    outputs = draw((4, 3, 2), torch.float64).requires_grad_()
    variances = torch.rand(4, 3, 2, dtype=torch.float64).requires_grad_()

    def function(outputs, variances):
        return getattr(predictive_moments(outputs, variances=variances), name)

    assert torch.autograd.gradcheck(function, (outputs, variances))
    if name in ("std", "epistemic"):  # all others are linear
        assert torch.autograd.gradgradcheck(lambda x: function(x, variances), outputs)


def test_gradients_of_moments_as_in_torch():
    # Members that tie share the gradient of the extreme; where all are equal that of std is 0.
    outputs = torch.randint(0, 3, (6, 50)).double()
    outputs[:, 0] = 1

    def gradient(measures):
        x = outputs.clone().requires_grad_()
        sum((i + 1) * m.sum() for i, m in enumerate(measures(x))).backward()
        return x.grad

    ours = gradient(lambda x: predictive_moments(x)[:4])
    theirs = gradient(lambda x: (x.mean(0), x.std(0), x.amin(0), x.amax(0)))
    torch.testing.assert_close(ours, theirs)


def test_only_needed_gradients_of_moments_are_computed():
    outputs, variances = torch.randn(4, 3), torch.rand(4, 3)
    predictive_moments(outputs.requires_grad_(), variances=variances).mean.sum().backward()
    assert outputs.grad is not None and variances.grad is None
    got = predictive_moments(outputs.detach(), variances=variances.requires_grad_())
    got.aleatoric.sum().backward()
    torch.testing.assert_close(variances.grad, torch.full((4, 3), 0.25))


BAD_MOMENTS = {
    "rank": (
        (torch.zeros(3), None),
        ValueError,
        r"outputs: expected \[E, B\] or \[E, B, K\], got shape \[3\]",
    ),
    "no member": ((torch.zeros(0, 3), None), ValueError, r"outputs: expected at least one member"),
    "integers": ((torch.zeros(2, 3).int(), None), TypeError, r"outputs: expected float32, .*got Int"),
    "shape of variances": (
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        ValueError,
        r"variances: expected the shape of outputs \[2, 3\], got shape \[2, 4\]",
    ),
    "dtype of variances": (
        (torch.zeros(2, 3), torch.zeros(2, 3).double()),
        TypeError,
        r"variances: expected the dtype of outputs \(Float\), got Double",
    ),
    "device of variances": (
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta")),
        TypeError,
        r"variances: expected the device of outputs \(cpu\), got meta",
    ),
}


@pytest.mark.parametrize("case", BAD_MOMENTS)
def test_bad_input_of_moments(case):
    (outputs, variances), error, message = BAD_MOMENTS[case]
    for needs_grad in (False, outputs.is_floating_point()):
        with pytest.raises(error, match=r"^predictive_moments: " + message):
            predictive_moments(outputs.clone().requires_grad_(needs_grad), variances=variances)


# --- CUDA --------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("shape", MOMENT_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cuda(dtype, shape):
    outputs, variances = draw(shape, dtype), torch.rand(shape).to(dtype)
    there = predictive_moments(outputs.cuda(), variances=variances.cuda())
    plain = reference.predictive_moments(outputs, variances=variances)
    oracle = reference.predictive_moments(outputs.double(), variances=variances.double())
    for name in there._fields:
        got = getattr(there, name).cpu()
        if name == "std" and shape[0] == 1:
            assert got.isnan().all()
        else:
            assert_close(got, getattr(plain, name), getattr(oracle, name))
