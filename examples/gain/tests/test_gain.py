"""pyens.ops.gain against its reference in float64, and the promises of its docstring."""

import math

import pytest
import torch
from torch import Tensor

from benchmarks import gain as benchmark
from benchmarks import harness
from pyens import reference
from pyens.ops import gain

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# E, B, D: nothing, one, vectors of 4 to 16 numbers +- 1, more than one thread takes.
SHAPES = [(0, 2, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1), (2, 3, 9), (4, 5, 16), (3, 1, 33), (5, 90, 101)]
per_member = pytest.mark.parametrize("per_member", [False, True], ids=["shared", "per member"])


def problem(e: int, b: int, d: int, per_member: bool, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * e + 10 * b + d)
    input = torch.randn([e, b, d] if per_member else [b, d], generator=generator, dtype=torch.float64)
    return input.to(dtype), torch.randn(e, d, generator=generator, dtype=torch.float64).to(dtype)


# --- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@per_member
def test_is_the_product_rounded_once(shape, dtype, per_member):
    input, scale = problem(*shape, per_member, dtype)
    got = gain(input, scale)
    assert got.shape == shape and got.is_contiguous()
    # In float64 the product of two narrower numbers is exact.
    assert torch.equal(got, reference.gain(input.double(), scale.double()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_expanded(dtype):
    input, scale = problem(3, 5, 7, True, dtype)
    expected = reference.gain(input, scale)
    for change in (
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: torch.stack([t, t + 1], -1)[..., 0],
        lambda t: torch.cat([t, t + 1], -1)[..., : t.shape[-1]],
    ):
        assert torch.equal(gain(change(input), change(scale)), expected)
    for one in (input[:1].expand(3, 5, 7), input[:, :1].expand(3, 5, 7), input[..., :1].expand(3, 5, 7)):
        assert torch.equal(gain(one, scale), reference.gain(one, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf(dtype):
    input, scale = problem(2, 9, 17, True, dtype)
    input[0, 3, 16], input[1, 0, 0], input[1, 8, 2] = math.nan, math.inf, -math.inf
    scale[1, 0], scale[0, 5] = 0, math.nan  # inf * 0 is NaN
    got, expected = gain(input, scale), reference.gain(input, scale)
    assert got.isnan().sum() == 11
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=0, atol=0)


# --- gradients ---------------------------------------------------------------------------------------------


@per_member
def test_gradients(per_member):
    leaves = [t.requires_grad_() for t in problem(3, 4, 2, per_member, torch.float64)]
    assert torch.autograd.gradcheck(gain, leaves)
    assert torch.autograd.gradgradcheck(gain, leaves)


@pytest.mark.parametrize("requires_grad", [(True, False), (False, True)])
def test_gradients_are_those_of_the_reference(requires_grad):
    leaves = [t.requires_grad_(r) for t, r in zip(problem(3, 4, 2, False), requires_grad, strict=True)]
    (leaf,) = (t for t in leaves if t.requires_grad)
    ours, theirs = (torch.autograd.grad(f(*leaves).exp().sum(), leaf)[0] for f in (gain, reference.gain))
    torch.testing.assert_close(ours, theirs)


# --- the dispatcher, autocast, the compiler and torch.func -------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@per_member
def test_opcheck(requires_grad, per_member):
    leaves = tuple(t.requires_grad_(requires_grad) for t in problem(3, 4, 2, per_member))
    torch.library.opcheck(torch.ops.pyens.gain, leaves)


def test_autocast_casts_both():
    input, scale = problem(3, 4, 5, True)
    with torch.autocast("cpu", torch.bfloat16):
        got = gain(input.bfloat16(), scale.requires_grad_())
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, gain(input.bfloat16(), scale.bfloat16()))
    assert torch.autograd.grad(got.sum(), scale)[0].dtype == torch.float32


def test_compile_without_graph_breaks_or_many_recompilations():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, s: gain(x, s).square(), fullgraph=True, backend=counter)
    for b in (5, 7, 12, 16, 33):
        leaves = [t.requires_grad_() for t in problem(3, b, 4, False)]
        got, expected = compiled(*leaves), gain(*leaves).square()
        assert torch.equal(got, expected)
        for ours, theirs in zip(
            *(torch.autograd.grad(y.sum(), leaves) for y in (got, expected)), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count <= 2  # one for the first size, one for all others


@per_member
def test_func(per_member):
    input, scale = problem(3, 4, 2, per_member, torch.float64)
    inputs, scales = torch.stack([input, -2 * input]), torch.stack([scale, 3 * scale], 1)
    for dims in ((0, None), (None, 1), (0, 1)):
        arguments = (input if dims[0] is None else inputs, scale if dims[1] is None else scales)
        ours, theirs = (torch.func.vmap(f, dims)(*arguments) for f in (gain, reference.gain))
        assert torch.equal(ours, theirs)
        ours, theirs = (
            torch.func.vmap(torch.func.grad(lambda x, s, f=f: f(x, s).exp().sum(), (0, 1)), dims)(*arguments)
            for f in (gain, reference.gain)
        )
        torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.func.jvp(f, (input, scale), (input + 1, scale - 1)) for f in (gain, reference.gain))
    torch.testing.assert_close(ours, theirs)


# --- bad input, benchmark ----------------------------------------------------------------------------------

INPUT, SCALE = problem(3, 4, 2, True)
BAD = {
    "integer input": ((INPUT.long(), SCALE), TypeError, r"input: expected float32, .*, got Long"),
    "rank of input": ((INPUT[0, 0], SCALE), ValueError, r"input: expected \[B, D\] or .*, got shape \[2\]"),
    "dtype of scale": (
        (INPUT, SCALE.double()),
        TypeError,
        r"scale: expected the dtype of input \(Float\), got Double",
    ),
    "device of scale": (
        (INPUT, SCALE.to("meta")),
        TypeError,
        r"scale: expected the device of input \(cpu\), got meta",
    ),
    "rank of scale": ((INPUT, SCALE[0]), ValueError, r"scale: expected \[E, 2\], got shape \[2\]"),
    "features": ((INPUT, SCALE[:, :1]), ValueError, r"scale: expected \[E, 2\], got shape \[3, 1\]"),
    "members": ((INPUT, SCALE[:2]), ValueError, r"scale: expected \[3, 2\], got shape \[2, 2\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, error, message = BAD[case]
    for call in (gain, torch.ops.pyens.gain):
        with pytest.raises(error, match=f"^gain: {message}"):
            call(*arguments)


def test_quick_benchmark(tmp_path):
    command = ["--quick", "--threads", "1", "--output", str(tmp_path)]
    assert harness.main("gain", benchmark.__doc__, benchmark.cases, command) == 0
    assert [path.stem for path in tmp_path.glob("*.json")] == ["gain-cpu-float32-quick"]
