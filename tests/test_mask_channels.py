"""pyens.ops.mask_channels against its reference, bit for bit, and the promises of its docstring."""

import contextlib
import math
import threading

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyens import reference
from pyens.ops import mask_channels

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
# Inner sizes: one element (selected one by one), few, not a multiple of a vector, a 32 x 32 plane.
INNER = [(), (1,), (2,), (3, 11), (32, 32)]


def problem(b: int, c: int, n: int, inner: tuple[int, ...] = (), dtype: torch.dtype = torch.float32):
    """Input without zeros, so that every zero of the output is a masked channel; masks of unequal counts."""
    x = (torch.randn(b, c, *inner).abs() + 0.5).to(dtype)
    masks = torch.rand(n, c) < 0.6
    masks[n // 2] = False
    return x, masks


def index_of_groups(b: int, n: int) -> Tensor:
    return torch.cat([torch.full((len(rows),), i) for i, rows in enumerate(torch.arange(b).tensor_split(n))])


# --- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", INNER, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [0, 1, 4, 7, 30])
def test_matches_the_reference(dtype, inner, b):
    for c, n in ((1, 1), (5, 4), (33, 3), (130, 4)):
        x, masks = problem(b, c, n, inner, dtype)
        for index in (None, torch.randint(n, (b,))):
            got = mask_channels(x, masks, index)
            assert got.dtype == dtype and got.is_contiguous()
            assert torch.equal(got, reference.mask_channels(x, masks, index))


@given(b=st.integers(0, 40), n=st.integers(1, 9), inner=st.sampled_from([(), (3,)]))
def test_without_an_index_groups_are_those_of_tensor_split(b, n, inner):
    x, masks = problem(b, 6, n, inner)
    index = index_of_groups(b, n) if b else torch.zeros(0, dtype=torch.int64)
    assert torch.equal(mask_channels(x, masks), mask_channels(x, masks, index))
    kept = mask_channels(x, masks).flatten(2).ne(0).all(-1) if inner else mask_channels(x, masks).ne(0)
    assert torch.equal(kept, masks[index])


@pytest.mark.parametrize("inner", [(), (5,), (2, 3)], ids=str)
def test_empty_sizes(inner):
    masks = torch.ones(2, 0, dtype=torch.bool)
    assert mask_channels(torch.zeros(3, 0, *inner), masks).shape == (3, 0, *inner)
    x, masks = problem(3, 4, 2)
    assert mask_channels(x.unsqueeze(-1).expand(-1, -1, 0), masks).shape == (3, 4, 0)


def test_an_output_in_huge_pages():
    """From 32 MB on, with a part of a page at either end."""
    x, masks = problem(35, 8, 3, (181, 173))
    assert x.nbytes > 32 << 20
    assert torch.equal(mask_channels(x, masks), reference.mask_channels(x, masks))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [(), (6, 5)], ids=str)
def test_strided_and_misaligned(dtype, inner):
    x, masks = problem(7, 9, 3, inner, dtype)
    index = torch.randint(3, (7,))
    expected = reference.mask_channels(x, masks, index)

    def misaligned(t: Tensor) -> Tensor:
        storage = torch.empty(t.numel() + 1, dtype=t.dtype)
        return storage[1:].view(t.shape).copy_(t)

    def transposed(t: Tensor) -> Tensor:
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def padded(t: Tensor) -> Tensor:
        return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]

    for change in (misaligned, transposed, padded):
        assert torch.equal(mask_channels(change(x), change(masks), change(index)), expected)
    if inner:
        assert torch.equal(mask_channels(x.to(memory_format=torch.channels_last), masks, index), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [(), (7,)], ids=str)
def test_what_is_masked_is_selected(dtype, inner):
    x, masks = problem(6, 10, 3, inner, dtype)
    index = index_of_groups(6, 3)
    expected = mask_channels(x, masks)
    for value in (math.nan, math.inf, -math.inf):
        gone = torch.where(masks[index].view(6, 10, *[1] * len(inner)), x, value)
        assert torch.equal(mask_channels(gone, masks), expected)
        kept = torch.where(masks[index].view(6, 10, *[1] * len(inner)), value, x)
        torch.testing.assert_close(
            mask_channels(kept, masks), reference.mask_channels(kept, masks), equal_nan=True, rtol=0, atol=0
        )


def test_kept_values_keep_their_bits():
    x = torch.tensor([[-0.0, 1e-42, math.nan, 65504.0]] * 2)
    x.view(torch.int32)[:, 2] += 5  # another NaN
    masks = torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(mask_channels(x, masks).view(torch.int32), x.view(torch.int32))
    assert torch.equal(mask_channels(x, ~masks).view(torch.int32), torch.zeros(2, 4, dtype=torch.int32))


@pytest.mark.parametrize("inner", [(), (300,)], ids=str)
def test_same_bits_for_any_number_of_threads(inner):
    x, masks = problem(700, 130, 3, inner)
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            outputs.append(mask_channels(x, masks))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(output, reference.mask_channels(x, masks)) for output in outputs)


# --- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("indexed", [False, True])
def test_gradients(inner, indexed):
    x, masks = problem(5, 4, 3, inner, torch.float64)
    index = torch.tensor([2, 0, 0, 1, 2]) if indexed else None

    def function(x: Tensor) -> Tensor:
        return mask_channels(x.square(), masks, index)  # not linear, so that the second derivative is not 0

    assert torch.autograd.gradcheck(function, x.requires_grad_())
    assert torch.autograd.gradgradcheck(function, x)


def test_gradient_is_masked_by_selection_too():
    x, masks = problem(4, 6, 2)
    x.requires_grad_()
    index = index_of_groups(4, 2)
    grad = torch.where(masks[index], 2.0, math.nan)
    mask_channels(x, masks).backward(grad)
    assert torch.equal(x.grad, torch.where(masks[index], 2.0, 0.0))


# --- the dispatcher and torch.func -------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("inner", [(), (2, 3)], ids=str)
def test_opcheck(requires_grad, indexed, inner):
    x, masks = problem(5, 4, 3, inner)
    index = torch.tensor([2, 0, 0, 1, 2]) if indexed else None
    torch.library.opcheck(torch.ops.pyens.mask_channels, (x.requires_grad_(requires_grad), masks, index))


def test_compile_without_graph_breaks_or_many_recompilations():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, m: mask_channels(x, m).square(), fullgraph=True, backend=counter)
    _, masks = problem(1, 4, 3)
    for b in (5, 7, 12, 16, 33):
        x = torch.randn(b, 4, 2, requires_grad=True)
        got, expected = compiled(x, masks), mask_channels(x, masks).square()
        assert torch.equal(got, expected)
        ours, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (got, expected))
        assert torch.equal(ours, theirs)
    assert counter.frame_count <= 2  # one for the first size, one for all others


def test_compiled_by_inductor():
    torch._dynamo.reset()
    x, masks = problem(5, 4, 3, (6,))
    x.requires_grad_()
    compiled = torch.compile(lambda x: mask_channels(x * 2, masks).sum(-1), fullgraph=True)
    got, expected = compiled(x), mask_channels(x * 2, masks).sum(-1)
    torch.testing.assert_close(got, expected)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected))
    torch.testing.assert_close(ours, theirs)


def test_func():
    x, masks = problem(5, 4, 3, (2,), torch.float64)
    index = torch.tensor([2, 0, 0, 1, 2])
    got = torch.func.grad(lambda x: mask_channels(x, masks, index).square().sum())(x)
    assert torch.equal(got, 2 * mask_channels(x, masks, index))
    got = torch.func.vmap(lambda x: mask_channels(x, masks, index))(torch.stack([x, 2 * x]))
    assert torch.equal(got, torch.stack([mask_channels(x, masks, index), mask_channels(2 * x, masks, index)]))
    got = torch.func.vmap(lambda row, i: mask_channels(row.unsqueeze(0), masks, i.unsqueeze(0)))(x, index)
    assert torch.equal(got.squeeze(1), mask_channels(x, masks, index))
    got = torch.func.vmap(lambda m: mask_channels(x, m))(torch.stack([masks, ~masks]))
    assert torch.equal(got, torch.stack([mask_channels(x, masks), mask_channels(x, ~masks)]))
    # No map reads the masks of another one.
    with pytest.raises(ValueError, match=r"^mask_channels: index: expected"):
        torch.func.vmap(lambda m: mask_channels(x, m, index + 1))(torch.stack([masks, ~masks]))
    primal, tangent = torch.func.jvp(lambda x: mask_channels(x, masks, index), (x,), (2 * x,))
    assert torch.equal(tangent, 2 * primal)


# --- bad input ---------------------------------------------------------------------------------------------

X, MASKS = problem(6, 5, 3)
INDEX = torch.tensor([0, 1, 2, 0, 1, 2])
BAD = {
    "rank of input": ((X[0], MASKS, None), ValueError, r"input: expected \[B, C, \.\.\.\], got shape \[5\]"),
    "integer input": ((X.long(), MASKS, None), TypeError, r"input: expected float32, .*, got Long"),
    "float masks": ((X, MASKS.float(), None), TypeError, r"masks: expected bool, got Float"),
    "rank of masks": ((X, MASKS[0], None), ValueError, r"masks: expected \[N, 5\], got shape \[5\]"),
    "channels of masks": (
        (X, MASKS[:, :4], None),
        ValueError,
        r"masks: expected \[N, 5\], got shape \[3, 4\]",
    ),
    "no masks": ((X, MASKS[:0], None), ValueError, r"masks: expected \[N, 5\], got shape \[0, 5\]"),
    "device of masks": (
        (X, MASKS.to("meta"), None),
        TypeError,
        r"masks: expected the device of input \(cpu\), got meta",
    ),
    "int32 index": ((X, MASKS, INDEX.int()), TypeError, r"index: expected int64, got Int"),
    "rank of index": ((X, MASKS, INDEX[None]), ValueError, r"index: expected \[6\], got shape \[1, 6\]"),
    "rows of index": ((X, MASKS, INDEX[:5]), ValueError, r"index: expected \[6\], got shape \[5\]"),
    "device of index": (
        (X, MASKS, INDEX.to("meta")),
        TypeError,
        r"index: expected the device of input \(cpu\), got meta",
    ),
    "negative index": (
        (X, MASKS, INDEX - 1),
        ValueError,
        r"index: expected masks from 0 to 2, got -1 for row 0",
    ),
    "index too large": (
        (X, MASKS, INDEX + 1),
        ValueError,
        r"index: expected masks from 0 to 2, got 3 for row 2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    (x, masks, index), error, message = BAD[case]
    for call in (
        lambda: mask_channels(x, masks, index),
        lambda: torch.ops.pyens.mask_channels(x, masks, index),
        lambda: mask_channels(x.clone().requires_grad_(x.is_floating_point()), masks, index),
    ):
        with pytest.raises(error, match=r"^mask_channels: " + message):
            call()


def test_bad_input_on_fake_tensors():
    with pytest.raises(ValueError, match=r"mask_channels: masks: expected \[N, 5\], got shape \[3, 4\]"):
        torch.ops.pyens.mask_channels(X.to("meta"), MASKS[:, :4].to("meta"), None)


@pytest.mark.cuda
@pytest.mark.parametrize("inner", INNER, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_on_cuda(dtype, inner):
    for b, c, n in ((0, 3, 2), (1, 1, 1), (7, 33, 4), (30, 130, 3)):
        x, masks = problem(b, c, n, inner, dtype)
        x[..., :1] = math.inf  # selected, not multiplied
        for index in (None, torch.randint(n, (b,))):
            there = x.cuda().requires_grad_()
            on_cuda = None if index is None else index.cuda()
            got = mask_channels(there, masks.cuda(), on_cuda)
            assert torch.equal(got.cpu(), mask_channels(x, masks, index))
            got.sum().backward()
            assert torch.equal(there.grad.cpu(), mask_channels(torch.ones_like(x), masks, index))


@pytest.mark.cuda
@pytest.mark.parametrize("wrong", [-1, 3])
def test_on_cuda_an_index_out_of_range_makes_its_row_nan(wrong):
    x, masks = problem(5, 4, 3)
    index = torch.tensor([0, 1, wrong, 2, 0])
    got = mask_channels(x.cuda(), masks.cuda(), index.cuda()).cpu()
    assert got[2].isnan().all()
    right = torch.tensor([0, 1, 3, 4])
    assert torch.equal(got[right], mask_channels(x[right], masks, index[right]))


def test_an_index_that_changes_while_it_is_read_reads_no_other_memory():
    x, masks = torch.ones(4096, 64), torch.ones(2, 64, dtype=torch.bool)
    index = torch.zeros(4096, dtype=torch.int64)
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            index.fill_(2**40)
            index.fill_(0)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            with contextlib.suppress(ValueError):
                output = mask_channels(x, masks, index)
                assert output.eq(1).all()
    finally:
        stop.set()
        thread.join()
