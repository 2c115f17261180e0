"""pyens.ops.ensemble_conv2d against its reference, and the promises of its docstring."""

import itertools
import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pyens import reference
from pyens.ops import ensemble_conv2d

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# E, B, C, O, image, kernel, options.
CASES = {
    "one": (1, 1, 1, 1, (1, 1), (1, 1), {}),
    "first": (5, 17, 1, 28, (28, 28), (3, 3), {"activation": "relu", "max_pool": 2}),
    "second": (3, 33, 28, 9, (13, 13), (5, 5), {"activation": "relu", "max_pool": 2}),
    "padded": (2, 8, 3, 7, (9, 8), (3, 3), {"padding": 1, "activation": "relu"}),
    "strided": (2, 20, 3, 5, (15, 14), (3, 3), {"stride": 2, "padding": 1}),
    "uneven": (2, 5, 2, 3, (12, 17), (2, 4), {"stride": (3, 2), "padding": (2, 0), "dilation": (2, 3)}),
    "long stride": (2, 16, 2, 4, (9, 10), (2, 1), {"stride": (3, 4)}),
    "many taps": (2, 9, 40, 13, (6, 6), (3, 3), {"max_pool": (4, 1)}),
    "left over": (2, 3, 2, 3, (10, 9), (2, 2), {"max_pool": (2, 5), "activation": "relu"}),
    "wide kernel": (2, 3, 1, 2, (4, 20), (4, 15), {"padding": (0, 7)}),
}
SHARED = (False, True)


def problem(case: str, shared: bool, dtype: torch.dtype = torch.float32, batch: int | None = None):
    e, b, c, o, image, kernel, options = CASES[case]
    b = b if batch is None else batch
    x = torch.randn(*([] if shared else [e]), b, c, *image)
    weight = torch.randn(e, o, c, *kernel) * (2 / (c * math.prod(kernel))) ** 0.5
    return x.to(dtype), weight.to(dtype), (torch.randn(e, o) / 4).to(dtype), options


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, options: dict) -> Tensor:
    bias = None if bias is None else bias.double()
    return reference.ensemble_conv2d(x.double(), weight.double(), bias, **options)


def rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()


def threads_are(threads: int, run):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


# --- values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case, dtype, shared):
    x, weight, bias, options = problem(case, shared, dtype)
    for b in (bias, None):
        got = ensemble_conv2d(x, weight, b, **options)
        expected = exact(x, weight, b, options)
        assert got.dtype == dtype and got.is_contiguous() and got.shape == expected.shape
        plain = reference.ensemble_conv2d(x, weight, b, **options)
        scale = rms(expected) + 1e-30
        assert rms(got - expected) <= 2 * rms(plain - expected) + 2 * torch.finfo(dtype).eps * scale


def test_reference_is_torchs_own_network():
    x, weight, bias, options = problem("second", False, torch.float64)
    got = reference.ensemble_conv2d(x, weight, bias, **options)
    for m in range(len(weight)):
        conv = nn.Conv2d(28, 9, 5, dtype=torch.float64)
        conv.weight.data, conv.bias.data = weight[m], bias[m]
        torch.testing.assert_close(got[m], nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2))(x[m]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_examples(dtype):
    x, weight, bias, options = problem("first", True, dtype, batch=0)
    assert ensemble_conv2d(x, weight, bias, **options).shape == (5, 0, 28, 13, 13)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    ensemble_conv2d(*leaves, **options).sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in leaves)


@pytest.mark.parametrize("shared", SHARED)
def test_strided_and_misaligned(shared):
    x, weight, bias, options = problem("padded", shared)
    expected = ensemble_conv2d(x, weight, bias, **options)

    def misaligned(t: Tensor) -> Tensor:
        return torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t)

    def transposed(t: Tensor) -> Tensor:
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def padded(t: Tensor) -> Tensor:
        return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]

    for change in (misaligned, transposed, padded):
        assert torch.equal(ensemble_conv2d(change(x), change(weight), change(bias), **options), expected)
    if shared:
        last = x.to(memory_format=torch.channels_last)
        assert torch.equal(ensemble_conv2d(last, weight, bias, **options), expected)
        own = x.expand(2, *x.shape)
        assert torch.equal(ensemble_conv2d(own, weight, bias, **options), expected)
        every_other = torch.stack([x, x + 1], 1).flatten(0, 1)[::2]
        assert torch.equal(ensemble_conv2d(every_other, weight, bias, **options), expected)


@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 4),
    image=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    relu=st.booleans(),
    shared=st.booleans(),
)
@pytest.mark.hypothesis
def test_any_geometry(sizes, image, kernel, stride, padding, dilation, window, relu, shared):
    e, b, c, o = sizes
    x = torch.randn(*([] if shared else [e]), b, c, *image, dtype=torch.float64)
    weight = torch.randn(e, o, c, *kernel, dtype=torch.float64)
    bias = torch.randn(e, o, dtype=torch.float64)
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "max_pool": window,
        "activation": "relu" if relu else "identity",
    }
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    try:
        expected = reference.ensemble_conv2d(*leaves, **options)
    except RuntimeError:  # a kernel or a window that does not fit
        with pytest.raises(ValueError, match=r"ensemble_conv2d: (input|max_pool): expected"):
            ensemble_conv2d(*leaves, **options)
        return
    got = ensemble_conv2d(*leaves, **options)
    torch.testing.assert_close(got, expected)
    above = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(out, leaves, above) for out in (got, expected))
    torch.testing.assert_close(found, wanted)


# --- the same bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["first", "second", "strided", "many taps"])
def test_bits_depend_on_nothing_beside(case, dtype):
    x, weight, bias, options = problem(case, False, dtype, batch=41)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    output = ensemble_conv2d(*leaves, **options)
    above = torch.randn_like(output)

    def run(*of: Tensor, above: Tensor = above) -> list[Tensor]:
        output = ensemble_conv2d(*of, **options)
        return [output, *torch.autograd.grad(output, of, above)]

    expected = run(*leaves)
    for threads in (1, 2, 3, 16):
        assert all(map(torch.equal, threads_are(threads, lambda: run(*leaves)), expected))
    alone = run(*(t[1:2].detach().requires_grad_() for t in leaves), above=above[1:2])
    assert all(torch.equal(a, b[1:2]) for a, b in zip(alone, expected, strict=True))
    with torch.no_grad():
        for size in (1, 2, 7, 8, 9, 16, 40):
            parts = [ensemble_conv2d(part, weight, bias, **options) for part in x.split(size, 1)]
            assert torch.equal(torch.cat(parts, 1), expected[0])


def test_shared_images_are_the_same_as_copies():
    x, weight, bias, options = problem("first", True)
    above = torch.randn(5, 17, 28, 13, 13)
    own = x.expand(5, *x.shape).contiguous().requires_grad_()
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    shared = torch.autograd.grad(ensemble_conv2d(*leaves, **options), leaves, above)
    apart = torch.autograd.grad(ensemble_conv2d(own, weight, bias, **options), [own, weight, bias], above)
    assert torch.equal(shared[1], apart[1]) and torch.equal(shared[2], apart[2])
    total = apart[0][0]
    for one in apart[0][1:]:
        total = total + one
    assert torch.equal(shared[0], total)


# --- gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients(case, dtype, shared):
    """Against float64, which chooses the same pixels: of 16-bit numbers the inputs are whole ones."""
    x, weight, bias, options = problem(case, shared, dtype)
    if dtype not in (torch.float32, torch.float64):  # integers, so that sums are exact
        x, weight, bias = (t.mul(3).round() for t in (x, weight, bias))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    output = ensemble_conv2d(*leaves, **options)
    above = torch.randn_like(output)
    found = torch.autograd.grad(output, leaves, above)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(reference.ensemble_conv2d(*doubles, **options), doubles, above.double())
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype
        assert rms(got - want) <= 20 * torch.finfo(dtype).eps * (rms(want) + 1e-30)


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=3))[1:], ids=str)
def test_gradients_of_some(needed):
    x, weight, bias, options = problem("padded", False)
    leaves = [t.requires_grad_(need) for t, need in zip((x, weight, bias), needed, strict=True)]
    output = ensemble_conv2d(*leaves, **options)
    above = torch.randn_like(output)
    output.backward(above)
    every = [t.detach().clone().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(ensemble_conv2d(*every, **options), every, above)
    for leaf, need, want in zip(leaves, needed, expected, strict=True):
        assert torch.equal(leaf.grad, want) if need else leaf.grad is None


def test_without_a_bias():
    x, weight, _, options = problem("padded", True)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    found = torch.autograd.grad(ensemble_conv2d(*leaves, None, **options).square().sum(), leaves)
    expected = torch.autograd.grad(reference.ensemble_conv2d(*leaves, None, **options).square().sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize(
    "activation,max_pool", [("identity", 1), ("relu", 1), ("relu", 2), ("identity", (1, 2))]
)
def test_gradcheck(activation, max_pool, shared):
    x = torch.randn(*([] if shared else [2]), 3, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ensemble_conv2d(x, weight, bias, padding=1, activation=activation, max_pool=max_pool)

    assert torch.autograd.gradcheck(run, (x, weight, bias))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias))


def test_ties_and_zeros_choose_as_torch_does():
    """The first of equal pixels; a sum of exactly 0 passes no gradient through a ReLU."""
    x = torch.zeros(1, 1, 1, 4, 4)
    x[0, 0, 0, 2:, 2:] = 1.0
    x.requires_grad_()
    weight = torch.ones(1, 1, 1, 1, 1)
    for activation in ("identity", "relu"):
        out = ensemble_conv2d(x, weight, activation=activation, max_pool=2)
        (got,) = torch.autograd.grad(out.sum(), x)
        (want,) = torch.autograd.grad(
            reference.ensemble_conv2d(x, weight, activation=activation, max_pool=2).sum(), x
        )
        assert torch.equal(got, want)


def test_many_pixels_of_a_window():
    x = torch.randperm(2 * 3 * 255).float().view(2, 3, 1, 15, 17).requires_grad_()
    weight, bias = torch.tensor([1.0, -1.0, 2.0, -0.5]).view(2, 2, 1, 1, 1), torch.zeros(2, 2)
    out = ensemble_conv2d(x, weight, bias, max_pool=(15, 17))
    want = reference.ensemble_conv2d(x, weight, bias, max_pool=(15, 17))
    torch.testing.assert_close(out, want)
    above = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, x, above)[0], torch.autograd.grad(want, x, above)[0])


# --- ends of the range -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("batch", [1, 40])
def test_nan_and_inf_of_images(batch, value):
    """Forward and backward they are where torch has them, and stay with their member."""
    x, weight, bias, options = problem("padded", False, batch=batch)
    options = options | {"max_pool": 2}
    x[1, batch // 2, 1, 4, 3] = value
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    got, want = ensemble_conv2d(*leaves, **options), reference.ensemble_conv2d(*leaves, **options)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    assert got[0].isfinite().all()
    above = torch.randn_like(got)
    found, wanted = (torch.autograd.grad(out, leaves, above) for out in (got, want))
    for a, b in zip(found, wanted, strict=True):
        assert a[0].isfinite().all()
        assert torch.equal(a[1].isnan(), b[1].isnan())


@pytest.mark.parametrize("scale", [1e-30, 1e-42, 1e18])
def test_ends_of_the_range(scale):
    x, weight, bias, options = problem("second", True)
    x, bias = x * scale, bias * scale
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    got = ensemble_conv2d(*leaves, **options)
    want = exact(x, weight, bias, options)
    assert (
        rms((got - want) / scale) <= 1e-5 * rms(want / scale) + 2e-44 / scale
    )  # each step of subnormal numbers
    above = torch.randn_like(got)
    for gradient in torch.autograd.grad(got, leaves, above):
        assert gradient.isfinite().all()


# --- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"input": torch.zeros(2, 3, 4, 5, 6)}, ValueError, r"input: expected \[B, 2, H, W\]"),
        (
            {"input": torch.zeros(3, 3, 2, 5, 6)},
            ValueError,
            r"or \[2, B, 2, H, W\], got shape \[3, 3, 2, 5, 6\]",
        ),
        ({"input": torch.zeros(2, 5, 6)}, ValueError, "input: expected"),
        ({"input": torch.zeros(3, 2, 0, 6)}, ValueError, "an image that a kernel of 3"),
        ({"input": torch.zeros(3, 2, 2, 6)}, ValueError, "input: expected an image that a kernel of 3"),
        ({"input": torch.zeros(3, 2, 5, 6).double()}, TypeError, "input: expected the dtype of weight"),
        ({"weight": torch.zeros(2, 4, 2, 3)}, ValueError, r"weight: expected \[E, O, C, height, width\]"),
        ({"weight": torch.zeros(2, 0, 2, 3, 3)}, ValueError, "none of them 0"),
        ({"weight": torch.zeros(2, 4, 2, 3, 3).long()}, TypeError, "weight: expected float32"),
        ({"bias": torch.zeros(2, 5)}, ValueError, r"bias: expected \[2, 4\], got shape \[2, 5\]"),
        ({"bias": torch.zeros(2, 4).double()}, TypeError, "bias: expected the dtype"),
        ({"stride": 0}, ValueError, "stride: expected from 1"),
        ({"stride": (1, 2, 3)}, ValueError, "stride: expected two integers, got 3"),
        ({"stride": 1.5}, TypeError, "stride: expected integers, got float"),
        ({"padding": -1}, ValueError, "padding: expected from 0"),
        ({"padding": 2**40}, ValueError, "padding: expected from 0"),
        ({"dilation": (1, 0)}, ValueError, "dilation: expected from 1"),
        ({"dilation": 3}, ValueError, "a kernel of 3 with dilation 3"),
        ({"max_pool": 0}, ValueError, "max_pool: expected from 1"),
        ({"max_pool": 4}, ValueError, "max_pool: expected a window that the 3 outputs"),
        ({"max_pool": 16}, ValueError, "up to 255 pixels"),
        ({"activation": "gelu"}, ValueError, 'activation: expected relu or identity, got "gelu"'),
        ({"input": [[1.0]]}, TypeError, "input: expected a tensor"),
    ],
    ids=str,
)
def test_errors(change, error, message):
    given = {
        "input": torch.zeros(3, 2, 5, 6),
        "weight": torch.zeros(2, 4, 2, 3, 3),
        "bias": torch.zeros(2, 4),
    } | change
    with pytest.raises(error, match=message) as raised:
        ensemble_conv2d(**given)
    assert str(raised.value).startswith("ensemble_conv2d: ")


# --- the dispatcher --------------------------------------------------------------------------------------


def arguments(case: str = "padded", shared: bool = False, grad: bool = True) -> tuple:
    x, weight, bias, options = problem(case, shared)
    for t in (x, weight, bias):
        t.requires_grad_(grad)

    def pair(value):
        return [value, value] if isinstance(value, int) else list(value)

    options = {"stride": 1, "padding": 0, "dilation": 1, "activation": "identity", "max_pool": 1} | options
    return x, weight, bias, *(v if isinstance(v, str) else pair(v) for v in options.values())


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("case", ["padded", "strided", "left over"])
def test_opcheck(case, shared):
    torch.library.opcheck(torch.ops.pyens.ensemble_conv2d, arguments(case, shared))
    given = arguments(case, shared, grad=False)
    torch.library.opcheck(torch.ops.pyens.ensemble_conv2d_choosing, given)
    output, chosen = torch.ops.pyens.ensemble_conv2d_choosing(*given)
    x, weight, _, *options = given
    torch.library.opcheck(
        torch.ops.pyens.ensemble_conv2d_backward,
        (torch.randn_like(output), x, weight, chosen, *options, [True, True, True]),
    )


def test_backward_refuses_what_another_call_chose():
    x, weight, bias, *options = arguments("first", True, grad=False)
    output, chosen = torch.ops.pyens.ensemble_conv2d_choosing(x, weight, bias, *options)
    for wrong in (chosen[:1], chosen.float(), chosen.transpose(0, 1)):
        with pytest.raises(ValueError, match="chosen: expected what ensemble_conv2d_choosing gives"):
            torch.ops.pyens.ensemble_conv2d_backward(output, x, weight, wrong, *options, [True] * 3)


def test_compiled_once_for_all_batches():
    x, weight, bias, options = problem("first", True)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(
        lambda x: ensemble_conv2d(x, weight, bias, **options).sum(1),
        fullgraph=True,
        backend=counter,
        dynamic=True,
    )
    for batch in (2, 5, 9, 40):
        x = torch.randn(batch, 1, 28, 28)
        assert torch.equal(compiled(x), ensemble_conv2d(x, weight, bias, **options).sum(1))
    assert counter.frame_count == 1


def test_compiled_gradients():
    x, weight, bias, options = problem("padded", False)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def loss(*of: Tensor) -> Tensor:
        return ensemble_conv2d(*of, **options).square().sum()

    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(loss(*leaves), leaves), rtol=1e-4, atol=1e-4)


def test_torch_func():
    x, weight, bias, options = problem("padded", True, torch.float64)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ensemble_conv2d(x, weight, bias, **options)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.ensemble_conv2d(x, weight, bias, **options)

    given = (x, weight, bias)
    for of in (0, 1, 2):
        got = torch.func.grad(lambda *a: run(*a).square().sum(), of)(*given)
        torch.testing.assert_close(got, torch.func.grad(lambda *a: plain(*a).square().sum(), of)(*given))
    tangents = tuple(torch.randn_like(t) for t in given)
    torch.testing.assert_close(torch.func.jvp(run, given, tangents), torch.func.jvp(plain, given, tangents))
    several = tuple(torch.stack([t, 2 * t, -t]) for t in given)
    for dims in itertools.product((0, None), repeat=3):
        if dims == (None, None, None):
            continue
        mapped = tuple(many if d == 0 else one for many, one, d in zip(several, given, dims, strict=True))
        got = torch.func.vmap(run, dims)(*mapped)
        want = torch.stack(
            [
                run(*(many[i] if d == 0 else many for many, d in zip(mapped, dims, strict=True)))
                for i in range(3)
            ]
        )
        torch.testing.assert_close(got, want)
    each = torch.func.vmap(torch.func.grad(lambda w, x: run(x[None], w, bias).square().sum()), (None, 0))(
        weight, x
    )
    assert each.shape == (len(x), *weight.shape)
    torch.testing.assert_close(each.sum(0), torch.func.grad(lambda w: run(x, w, bias).square().sum())(weight))


def test_second_derivatives_within_vmap():
    x, weight, bias, options = problem("padded", True, torch.float64)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(
        ensemble_conv2d(x, weight, bias, **options).square().sum(), weight, create_graph=True
    )
    rows = torch.randn(2, *weight.shape, dtype=torch.float64)
    got = torch.autograd.grad(gradient, weight, rows, is_grads_batched=True, retain_graph=True)[0]
    want = torch.stack([torch.autograd.grad(gradient, weight, row, retain_graph=True)[0] for row in rows])
    torch.testing.assert_close(got, want)


def test_autocast_lowers_it():
    x, weight, bias, options = problem("padded", True)
    with torch.autocast("cpu", torch.bfloat16):
        got = ensemble_conv2d(x, weight, bias, **options)
    low = (t.bfloat16() for t in (x, weight, bias))
    assert got.dtype == torch.bfloat16 and torch.equal(got, ensemble_conv2d(*low, **options))


def test_on_meta():
    x, weight, bias, options = problem("first", True)
    meta = [t.to("meta").requires_grad_() for t in (x, weight, bias)]
    output = ensemble_conv2d(*meta, **options)
    assert output.shape == (5, 17, 28, 13, 13) and output.is_meta
    assert torch.autograd.grad(output.sum(), meta[1])[0].shape == weight.shape


def test_what_other_devices_run():
    """Composed of torch's operations: on CUDA and elsewhere. Here through second derivatives' forward."""
    x, weight, bias, options = problem("strided", False, torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    output = ensemble_conv2d(*leaves, **options)
    above = torch.randn_like(output)
    kernel = torch.autograd.grad(output, leaves, above, retain_graph=True)
    composed = torch.autograd.grad(output, leaves, above, create_graph=True)
    torch.testing.assert_close(kernel, composed)
    assert all(t.requires_grad for t in composed)


def test_modules_of_torch_agree_with_functional():
    x = torch.randn(3, 2, 8, 8)
    conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
    got = ensemble_conv2d(x, conv.weight[None], conv.bias[None], stride=2, padding=1)
    torch.testing.assert_close(got[0], F.conv2d(x, conv.weight, conv.bias, 2, 1))
