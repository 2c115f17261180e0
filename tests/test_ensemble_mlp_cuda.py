"""pyens.ops.ensemble_mlp and activation_strength on CUDA, for members too wide for one launch."""

import itertools

import pytest
import torch
from torch import Tensor

from pyens import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
E, B, WIDTHS = 10, 70, (784, 1200, 1200, 10)
ODD = [(33, 701, 333, 3), (5, *[9] * 40, 2), (70_000, 2), (3, 90_000, 1)]
pytestmark = pytest.mark.cuda


def draw(dtype: torch.dtype, widths=WIDTHS, members: int = E) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x = torch.randn(B, widths[0], device="cuda", dtype=dtype)
    weights = [
        (torch.randn(members, o, i, device="cuda") * (2 / i) ** 0.5).to(dtype)
        for i, o in itertools.pairwise(widths)
    ]
    biases = [(torch.randn(members, o, device="cuda") * 0.3).to(dtype) for o in widths[1:]]
    return x, weights, biases


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def in_float64(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def assert_close(got: Tensor, plain: Tensor, oracle: Tensor) -> None:
    """At most twice the rms error of plain PyTorch in the same dtype, plus one rounding of the output."""
    assert got.is_cuda and got.shape == oracle.shape and got.dtype == plain.dtype
    rounding = torch.finfo(got.dtype).eps * rms(oracle)
    allowed = 32 * rounding if got.dtype == torch.float64 else 2 * rms(plain.double() - oracle) + rounding
    assert rms(got.double() - oracle) <= allowed


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_plain_torch(dtype, dropout):
    x, weights, biases = draw(dtype)
    seeds = torch.arange(E, device="cuda") * 7 if dropout else None
    options = dict(dropout=dropout, dropout_seeds=seeds)
    oracle = reference.ensemble_mlp(x.double(), in_float64(weights), in_float64(biases), **options)
    plain = reference.ensemble_mlp(x, weights, biases, **options)
    assert_close(ops.ensemble_mlp(x, weights, biases, **options), plain, oracle)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strength_as_accurate_as_plain_torch(dtype, pack):
    x, weights, biases = draw(dtype)
    units = sum(WIDTHS[1:-1])
    mean, std = torch.randn(units, device="cuda"), torch.rand(units, device="cuda") + 0.5
    mean, std = mean.to(dtype), std.to(dtype)
    wide = [x.double(), in_float64(weights), in_float64(biases), mean.double(), std.double()]
    oracle = reference.activation_strength(*wide)
    plain = reference.activation_strength(x, weights, biases, mean, std)
    got = ops.activation_strength(x, weights, biases, mean, std, bitpack=pack)
    assert_close(got.output, plain.output, oracle.output)
    assert_close(got.value, plain.value, oracle.value)
    active = oracle.active
    if pack:
        active = reference.activation_strength(*wide, bitpack=True).active
    assert got.active.dtype == active.dtype and got.active.shape == active.shape
    # A rounding flips a sign here and there.
    assert (got.active != active).double().mean() <= (1e-4 if dtype.itemsize > 2 else 0.1)
    assert torch.equal(ops.ensemble_mlp(x, weights, biases), got.output)


@pytest.mark.parametrize(
    "widths", [(33, 701, 333, 3), (5, *[9] * 40, 2), (70_000, 2), (3, 90_000, 1)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_widths_and_many_layers(dtype, widths):
    x, weights, biases = draw(dtype, widths, members=2)
    for b in (biases, None):
        options = dict(activation="tanh")
        oracle = reference.ensemble_mlp(x.double(), in_float64(weights), b and in_float64(b), **options)
        plain = reference.ensemble_mlp(x, weights, b, **options)
        assert_close(ops.ensemble_mlp(x, weights, b, **options), plain, oracle)


def test_inputs_are_read_where_they_lie():
    x, weights, biases = draw(torch.float32)
    padded = torch.cat([x, x.flip(1)], 1)[:, : WIDTHS[0]]  # rows with a gap between them
    column_major = x.mT.contiguous().mT
    peaks = []
    expected = ops.ensemble_mlp(x, weights, biases)
    for same in (x, padded, column_major, x.expand(E, *x.shape)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        got = ops.ensemble_mlp(same, weights, biases)
        peaks.append(torch.cuda.max_memory_allocated())
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        del got
    assert max(peaks) - peaks[0] < E * x.nbytes / 2  # no copy for each member


def test_one_member_stands_for_all():
    x, weights, biases = draw(torch.bfloat16)
    weights, biases = ([t[:1].expand(t.shape) for t in tensors] for tensors in (weights, biases))
    got = ops.ensemble_mlp(x, weights, biases)
    assert all(torch.equal(member, got[0]) for member in got)


def test_empty_batch():
    x, weights, biases = draw(torch.bfloat16)
    assert ops.ensemble_mlp(x[:0], weights, biases).shape == (E, 0, WIDTHS[-1])
    units = torch.ones(sum(WIDTHS[1:-1]), device="cuda")
    strength = ops.activation_strength(x[:0], weights, biases, units, units)
    assert strength.value.shape == (E, 0, len(units))


def test_tf32_only_where_torch_allows_it():
    x, weights, biases = draw(torch.float32)
    oracle = reference.ensemble_mlp(x.double(), in_float64(weights), in_float64(biases))
    exact = rms(ops.ensemble_mlp(x, weights, biases).double() - oracle) / rms(oracle)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        rounded = rms(ops.ensemble_mlp(x, weights, biases).double() - oracle) / rms(oracle)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert exact < 1e-6 and 1e-5 < rounded < 1e-2
