"""pyens.ops.masked_mlp and masked_mlp_loss against their references in float64, and their promises."""

import itertools
import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyens import reference
from pyens.masks import masks_for_channels
from pyens.ops import ensemble_mlp, masked_mlp, masked_mlp_loss
from pyens.ops.masked_mlp import masked_weights, plan_masks
from pyens.reference.activations import ACTIVATIONS as ACTIVATION_FUNCTIONS

ACTIVATIONS = list(ACTIVATION_FUNCTIONS)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# N, B, widths: both mappings of the kernel behind, its vector widths and blocks +- 1.
SHAPES = [
    (1, 1, [1, 1, 1]),
    (3, 0, [4, 5, 2]),
    (40, 1, [32, 50, 20, 10, 1]),
    (2, 7, [33, 17, 9, 7]),
    (3, 9, [8, 2, 8, 3]),
    (4, 17, [127, 31, 3]),
    (5, 65, [3, 129, 1, 33, 4]),
    (2, 40, [257, 193, 385, 5]),
]

Problem = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]


def problem(
    n: int, b: int, widths: list[int], dtype: torch.dtype = torch.float32, per_mask: bool = False
) -> Problem:
    """Random input, weights and biases that keep activations near 1; masks of one size, about half of it."""
    x = torch.randn(*([n] if per_mask else []), b, widths[0], dtype=torch.float64)
    layers = list(itertools.pairwise(widths))
    weights = [torch.randn(o, i, dtype=torch.float64) / i**0.5 * 1.4 for i, o in layers]
    biases = [torch.randn(o, dtype=torch.float64) * 0.3 for _, o in layers]
    masks = [masks_for_channels(width, n, 2.0) for width in widths[1:-1]]
    return x.to(dtype), [w.to(dtype) for w in weights], [v.to(dtype) for v in biases], masks


def unequal(masks: list[Tensor], empty: bool = True) -> list[Tensor]:
    """Masks of all sizes, where asked with an empty one in every layer."""
    made = [torch.rand(mask.shape) < torch.linspace(0.1, 0.9, len(mask)).unsqueeze(1) for mask in masks]
    for layer, mask in enumerate(made):
        if empty:
            mask[layer % len(mask)] = False
    return made


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_close(got: Tensor, problem: Problem, activation: str) -> None:
    """At most twice the rms error of plain PyTorch in the same dtype, plus one rounding of the output."""
    x, weights, biases, masks = problem
    oracle = reference.masked_mlp(x.double(), doubled(weights), doubled(biases), masks, activation=activation)
    plain = reference.masked_mlp(x, weights, biases, masks, activation=activation)
    assert got.shape == oracle.shape and got.dtype == x.dtype
    if got.numel() == 0:
        return
    scale = torch.finfo(x.dtype).eps * rms(oracle)
    # The float64 oracle is plain PyTorch itself: there, some roundings along the way are all that may differ.
    allowed = 16 * scale if x.dtype == torch.float64 else 2 * rms(plain.double() - oracle) + scale
    assert rms(got.double() - oracle) <= allowed


# --- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_the_reference(dtype, activation, shape):
    for per_mask in (False, True):
        x, weights, biases, masks = problem(*shape, dtype, per_mask)
        for chosen in (masks, unequal(masks)):
            got = masked_mlp(x, weights, biases, chosen, activation=activation)
            assert_close(got, (x, weights, biases, chosen), activation)
            planned = masked_mlp(x, weights, biases, chosen, activation=activation, plan=plan_masks(chosen))
            assert torch.equal(planned, got)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("b", [3, 40])
def test_empty_masks_leave_the_last_bias(activation, b):
    x, weights, biases, masks = problem(4, b, [9, 6, 5, 2])
    for layer in (0, 1):
        masks[layer][1] = False
        output = masked_mlp(x, weights, biases, masks, activation=activation)
        if layer == 1:
            assert torch.equal(output[1], biases[2].expand(b, 2))
        assert_close(output, (x, weights, biases, masks), activation)
    for mask in masks:
        mask.fill_(False)
    output = masked_mlp(x, weights, biases, masks, activation=activation)
    assert torch.equal(output, biases[2].expand(4, b, 2))
    assert torch.equal(masked_mlp(x, weights, None, masks, activation=activation), torch.zeros(4, b, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [3, 40])
def test_without_biases(dtype, b):
    x, weights, biases, masks = problem(3, b, [9, 6, 5], dtype)
    zeros = [torch.zeros_like(v) for v in biases]
    for none in (None, [], ()):
        assert torch.equal(masked_mlp(x, weights, none, masks), masked_mlp(x, weights, zeros, masks))


@pytest.mark.parametrize("b", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_expanded_and_misaligned(b, dtype):
    x, weights, biases, masks = problem(4, b, [6, 9, 5], dtype, per_mask=True)
    expected = masked_mlp(x, weights, biases, masks)

    def misaligned(t: Tensor) -> Tensor:
        storage = torch.empty(t.numel() + 1, dtype=t.dtype)
        return storage[1:].view(t.shape).copy_(t)

    def transposed(t: Tensor) -> Tensor:
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def padded(t: Tensor) -> Tensor:
        return torch.stack([t, torch.ones_like(t)], -1)[..., 0]

    for change in (misaligned, transposed, padded):
        changed = [[change(t) for t in tensors] for tensors in (weights, biases, masks)]
        assert torch.equal(masked_mlp(change(x), *changed), expected)
    expected = masked_mlp(x[0], weights, biases, masks)
    assert torch.equal(masked_mlp(x[:1].expand(4, -1, -1), weights, biases, masks), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("b", [3, 40])
def test_what_a_mask_leaves_out_takes_no_part(value, b):
    x, weights, biases, masks = problem(4, b, [6, 12, 10, 3])
    clean = masked_mlp(x, weights, biases, masks)
    unit = int((~masks[0]).any(0).nonzero()[0])
    without = ~masks[0][:, unit]
    weights[0][unit] = value
    biases[0][unit] = value
    weights[1][:, unit] = value
    for tensor in (*weights, *biases):
        tensor.requires_grad_()
    output = masked_mlp(x, weights, biases, masks)
    assert torch.equal(output[without], clean[without]) and not output[~without].isfinite().all()
    # Nor does it get a gradient from there, or give one.
    parameters = [*weights, *biases]
    for gradient in torch.autograd.grad(output[without].sum(), parameters):
        assert gradient.isfinite().all() or not without.all()
    kept = [mask[without] for mask in masks]
    gradients = torch.autograd.grad(masked_mlp(x, weights, biases, kept).sum(), parameters)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert torch.equal(gradients[0][unit], torch.zeros(6))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_in_an_example_stay_there(value):
    x, weights, biases, masks = problem(4, 9, [6, 12, 10, 3])
    clean = masked_mlp(x, weights, biases, masks)
    x = x.clone()
    x[2, 1] = value
    output = masked_mlp(x, weights, biases, masks)
    rows = [0, 1, *range(3, 9)]
    assert torch.equal(output[:, rows], clean[:, rows])
    expected = reference.masked_mlp(
        x.double(), *[[t.double() for t in ts] for ts in (weights, biases)], masks
    )
    torch.testing.assert_close(output[:, 2].double(), expected[:, 2], equal_nan=True, rtol=1e-4, atol=1e-5)


# --- properties --------------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 5),
    b=st.integers(0, 20),
    widths=st.lists(st.integers(1, 30), min_size=3, max_size=5),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 2**31),
)
def test_permuted_equal_and_full_masks(n, b, widths, activation, seed):
    torch.manual_seed(seed)
    x, weights, biases, masks = problem(n, b, widths)
    order = torch.randperm(n)
    output = masked_mlp(x, weights, biases, masks, activation=activation)
    permuted = masked_mlp(x, weights, biases, [mask[order] for mask in masks], activation=activation)
    assert torch.equal(permuted, output[order])
    equal = masked_mlp(x, weights, biases, [mask[:1].expand(n, -1) for mask in masks], activation=activation)
    assert torch.equal(equal, output[:1].expand(n, -1, -1))
    full = masked_mlp(x, weights, biases, [torch.ones_like(mask) for mask in masks], activation=activation)
    dense = ensemble_mlp(x, [w[None] for w in weights], [v[None] for v in biases], activation=activation)
    assert torch.equal(full, dense.expand(n, -1, -1))


@pytest.mark.parametrize("b", [1, 300])
def test_same_bits_for_any_number_of_threads(b):
    x, weights, biases, masks = problem(5, b, [140, 330, 80, 2])
    tensors = [t.requires_grad_() for t in (*weights, *biases)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            output = masked_mlp(x, weights, biases, masks)
            loss = masked_mlp_loss(x, torch.ones(b, 2), weights, biases, masks, loss="mse")
            results.append(
                [output, loss]
                + [g for y in (output, loss) for g in torch.autograd.grad(y.square().sum(), tensors)]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


# --- plan and gathered weights -----------------------------------------------------------------------------


def test_plan():
    masks = [torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]).bool(), torch.zeros(2, 3, dtype=torch.bool)]
    first, second = plan_masks(masks)
    assert first.tolist() == [[0, 2, 3], [1, -1, -1]] and second.tolist() == [[-1], [-1]]
    assert first.dtype == second.dtype == torch.int64


def test_gathered_weights_are_rows_and_columns():
    _, weights, biases, masks = problem(3, 1, [4, 9, 7, 2], torch.float64)
    members, vectors = masked_weights(weights, biases, 3, plan_masks(masks))
    for n in range(3):
        a, b = masks[0][n], masks[1][n]
        expected = weights[0][a], weights[1][b][:, a], weights[2][:, b]
        assert all(torch.equal(got[n], want) for got, want in zip(members, expected, strict=True))
        expected = biases[0][a], biases[1][b], biases[2]
        assert all(torch.equal(got[n], want) for got, want in zip(vectors, expected, strict=True))


def index(n: int, size: int, limit: int) -> Tensor:
    """Ascending, padded with -1, as a plan's."""
    rows = [torch.randperm(limit)[: max(0, size - i)].sort().values for i in range(n)]
    return torch.stack([torch.cat([r, torch.full((size - len(r),), -1)]) for r in rows])


def gathered(weight: Tensor, rows: Tensor | None, columns: Tensor | None, n: int) -> Tensor:
    """`masked_weights` in plain torch."""
    weight = torch.nn.functional.pad(weight, (0, 1, 0, 1))  # what -1 points at
    rows = torch.arange(weight.shape[0] - 1).expand(n, -1) if rows is None else rows
    columns = torch.arange(weight.shape[1] - 1).expand(n, -1) if columns is None else columns
    return weight[rows.unsqueeze(2), columns.unsqueeze(1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["rows", "columns", "both", "neither"])
def test_gather_and_its_transpose(which, dtype):
    weight = torch.randn(7, 9, dtype=torch.float64).to(dtype)
    rows = index(4, 3, 7) if which in ("rows", "both") else None
    columns = index(4, 5, 9) if which in ("columns", "both") else None
    got = torch.ops.pyens.masked_weights(weight, rows, columns, 4)
    assert torch.equal(got, gathered(weight, rows, columns, 4))

    grad = torch.randn(got.shape, dtype=torch.float64).to(dtype)
    leaf = weight.double().requires_grad_()
    expected = torch.autograd.grad(gathered(leaf, rows, columns, 4), leaf, grad.double())[0]
    scattered = torch.ops.pyens.masked_weights_backward(grad, rows, columns, 7, 9)
    assert scattered.dtype == dtype
    # Sums of at most four, in float32 or float64.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(scattered.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("which", ["rows", "columns", "both", "neither"])
def test_opcheck(which, requires_grad):
    rows = index(4, 3, 7) if which in ("rows", "both") else None
    columns = index(4, 5, 9) if which in ("columns", "both") else None
    weight = torch.randn(7, 9, requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.pyens.masked_weights, (weight, rows, columns, 4))
    shape = 4, 7 if rows is None else 3, 9 if columns is None else 5
    grad = torch.randn(shape, requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.pyens.masked_weights_backward, (grad, rows, columns, 7, 9))


# --- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("per_mask", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients(activation, per_mask, with_bias):
    x, weights, biases, masks = problem(3, 2, [3, 5, 4, 2], torch.float64, per_mask)
    masks = unequal(masks)
    tensors = [t.requires_grad_() for t in (x, *weights, *(biases if with_bias else []))]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return masked_mlp(x, parameters[:3], parameters[3:], masks, activation=activation)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_mask", [False, True])
def test_gradients_match_the_reference(dtype, per_mask):
    # Smooth, so that no rounding flips a ReLU.
    x, weights, biases, masks = problem(3, 70, [20, 33, 5], dtype, per_mask)
    tensors = [x, *weights, *biases]

    def gradients(function, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, *parameters = [t.detach().to(dtype).requires_grad_() for t in tensors]
        output = function(x, parameters[:2], parameters[2:], masks, activation="tanh")
        return torch.autograd.grad(output.double().square().mean(), [x, *parameters])

    got = gradients(masked_mlp, dtype)
    oracle = gradients(reference.masked_mlp, torch.float64)
    plain = gradients(reference.masked_mlp, dtype)
    for ours, exact, theirs in zip(got, oracle, plain, strict=True):
        assert ours.dtype == dtype
        allowed = 2 * rms(theirs.double() - exact) + 2 * torch.finfo(dtype).eps * rms(exact)
        assert rms(ours.double() - exact) <= allowed


def test_only_needed_gradients_are_computed():
    x, weights, biases, masks = problem(2, 3, [3, 4, 2])
    weights[1].requires_grad_()
    masked_mlp(x, weights, biases, masks).sum().backward()
    assert weights[1].grad is not None and weights[0].grad is None and x.grad is None
    assert not masked_mlp(x, [w.detach() for w in weights], biases, masks).requires_grad


# --- the loss ----------------------------------------------------------------------------------------------

LOSSES = {
    "mse": lambda n, b, o: torch.randn(b, o),
    "bce": lambda n, b, o: torch.rand(n, b, o),
    "gaussian_nll": lambda n, b, o: torch.randn(b, o // 2),
    "cross_entropy": lambda n, b, o: torch.randint(o, (b,)),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("per_mask", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_its_gradients_match_the_reference(loss, per_mask, weighted):
    for b in (0, 1, 23):
        x, weights, biases, masks = problem(3, b, [5, 9, 7, 4], torch.float64, per_mask)
        masks = unequal(masks)
        target = LOSSES[loss](3, b, 4)
        target = target if loss == "cross_entropy" else target.double()
        sample_weight = (torch.rand(3, b) * (torch.rand(3, b) < 0.7)).double() if weighted else None
        tensors = [t.requires_grad_() for t in (x, *weights, *biases)]
        options = {"loss": loss, "activation": "silu", "sample_weight": sample_weight}
        if loss == "cross_entropy":
            options |= {"temperature": 0.7, "label_smoothing": 0.2 if weighted else 0.0}
        got = masked_mlp_loss(x, target, weights, biases, masks, **options)
        expected = reference.masked_mlp_loss(x, target, weights, biases, masks, **options)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        ours, theirs = (torch.autograd.grad((y * y).sum(), tensors) for y in (got, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_loss_is_differentiable_twice():
    x, weights, biases, masks = problem(2, 3, [3, 5, 2], torch.float64)
    target = torch.randn(3, 2).double()
    tensors = [t.requires_grad_() for t in (x, *weights, *biases)]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return masked_mlp_loss(
            x, target, parameters[:2], parameters[2:], masks, loss="mse", activation="tanh"
        )

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


# --- compilers, autocast, torch.func -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_graph_breaks_or_many_recompilations(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    _, weights, biases, masks = problem(3, 1, [4, 9, 6, 2])
    plan = plan_masks(masks)

    def step(x: Tensor, y: Tensor, weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, Tensor]:
        output = masked_mlp(x, weights, biases, masks, plan=plan)
        return output.square().sum(), masked_mlp_loss(
            x, y, weights, biases, masks, loss="mse", plan=plan
        ).sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    parameters = [t.requires_grad_() for t in (*weights, *biases)]
    for b in (5, 7, 12, 33):
        x, y = torch.randn(b, 4), torch.randn(b, 2)
        got, expected = compiled(x, y, weights, biases), step(x, y, weights, biases)
        torch.testing.assert_close(got, expected)
        ours, theirs = (torch.autograd.grad(sum(values), parameters) for values in (got, expected))
        torch.testing.assert_close(ours, theirs)
    assert counter.frame_count <= 2  # one for the first size, one for all others


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    x, weights, biases, masks = problem(2, 20, [5, 8, 3])
    weights = [w.requires_grad_() for w in weights]
    with torch.autocast("cpu", dtype):
        got = masked_mlp(x, weights, biases, masks)
        assert torch.equal(masked_mlp(x.to(dtype), weights, biases, masks), got)
    half = [t.detach().to(dtype) for t in weights]
    assert torch.equal(got, masked_mlp(x.to(dtype), half, [v.to(dtype) for v in biases], masks))
    got.float().sum().backward()
    assert all(w.grad.dtype == torch.float32 for w in weights)


def test_func():
    x, weights, biases, masks = problem(3, 6, [3, 9, 7, 2], torch.float64)
    y = torch.randn(6, 2).double()

    def loss(weights: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = masked_mlp(x, weights, biases, masks, activation="tanh")
        return output.square().sum() + masked_mlp_loss(x, y, weights, biases, masks, loss="mse").sum()

    for leaf in weights:
        leaf.requires_grad_()
    expected = torch.autograd.grad(loss(weights, x, y), weights)
    torch.testing.assert_close(torch.func.grad(loss)(weights, x, y), list(expected))
    plain = [w.detach() for w in weights]
    rows = torch.func.vmap(lambda x: masked_mlp(x.unsqueeze(0), plain, biases, masks))(x)
    torch.testing.assert_close(rows.squeeze(2).transpose(0, 1), masked_mlp(x, plain, biases, masks))
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(plain, x.unsqueeze(1), y.unsqueeze(1))
    for i in range(6):
        one = torch.autograd.grad(loss(weights, x[i : i + 1], y[i : i + 1]), weights)
        torch.testing.assert_close([gradient[i] for gradient in each], list(one))
    models = [torch.stack([w, 2 * w]) for w in plain]
    both = torch.func.vmap(lambda w: masked_mlp(x, w, biases, masks))(models)
    for i in range(2):
        expected = masked_mlp(x, [w[i] for w in models], biases, masks)
        torch.testing.assert_close(both[i], expected)
    tangents = [torch.randn_like(w) for w in plain]
    ours, theirs = (
        torch.func.jvp(lambda w: function(x, w, biases, masks, activation="tanh"), (plain,), (tangents,))  # noqa: B023
        for function in (masked_mlp, reference.masked_mlp)
    )
    torch.testing.assert_close(ours, theirs)


def test_func_of_the_gather():
    index = torch.tensor([[2, 0, -1], [1, 3, 0]])
    weight = torch.randn(4, 5, dtype=torch.float64)
    expected = torch.func.jacrev(lambda w: masked_weights([w, w.mT], None, 2, [index])[0][0])(weight)
    matrix = torch.func.jacfwd(lambda w: masked_weights([w, w.mT], None, 2, [index])[0][0])(weight)
    assert torch.equal(matrix, expected) and expected.sum() == 25


# --- bad input ---------------------------------------------------------------------------------------------

X, (W, W2), (V, V2), (M,) = problem(3, 6, [5, 4, 2])
BAD = {
    "no hidden layer": (
        (X, [W], [V], []),
        ValueError,
        r"masks: expected one for each hidden layer, of at least one, with 1 weights, got 0",
    ),
    "number of masks": ((X, [W, W2], [V, V2], [M, M]), ValueError, r"masks: expected one for .*got 2"),
    "number of biases": ((X, [W, W2], [V], [M]), ValueError, r"biases: expected 2, or none, got 1"),
    "rank of weights": (
        (X, [W[0], W2], [V, V2], [M]),
        ValueError,
        r"weights\[0\]: expected \[out, in\], got shape \[5\]",
    ),
    "chain of weights": (
        (X, [W, W], [V, V], [M]),
        ValueError,
        r"weights\[1\]: expected \[out, 4\], got shape \[4, 5\]",
    ),
    "shape of biases": (
        (X, [W, W2], [V, V], [M]),
        ValueError,
        r"biases\[1\]: expected \[2\], got shape \[4\]",
    ),
    "float masks": ((X, [W, W2], [V, V2], [M.float()]), TypeError, r"masks\[0\]: expected bool, got torch.f"),
    "width of masks": (
        (X, [W, W2], [V, V2], [M[:, :3]]),
        ValueError,
        r"masks\[0\]: expected \[3, 4\], got shape \[3, 3\]",
    ),
    "rank of masks": (
        (X, [W, W2], [V, V2], [M[0]]),
        ValueError,
        r"masks\[0\]: expected \[4, 4\], got shape \[4\]",
    ),
    "no masks": (
        (X, [W, W2], [V, V2], [M[:0]]),
        ValueError,
        r"masks\[0\]: expected \[1, 4\], got shape \[0, 4\]",
    ),
    "counts of masks": (
        (X, [W, torch.randn(4, 4), W2], [V, V, V2], [M, M[:2]]),
        ValueError,
        r"masks\[1\]: expected \[3, 4\], got shape \[2, 4\]",
    ),
    "device of masks": (
        (X, [W, W2], [V, V2], [M.to("meta")]),
        TypeError,
        r"masks\[0\]: expected the device of weights\[0\] \(cpu\), got meta",
    ),
    "rank of input": (
        (X[0], [W, W2], [V, V2], [M]),
        ValueError,
        r"input: expected \[B, 5\] or \[3, B, 5\], got shape \[5\]",
    ),
    "features of input": (
        (X[:, :4], [W, W2], [V, V2], [M]),
        ValueError,
        r"input: expected .*, got shape \[6, 4\]",
    ),
    "masks of input": (
        (X.expand(2, 6, 5), [W, W2], [V, V2], [M]),
        ValueError,
        r"input: expected .*, got shape \[2, 6, 5\]",
    ),
    "dtype of input": (
        (X.double(), [W, W2], [V, V2], [M]),
        TypeError,
        r"input: expected the dtype of weights\[0\] \(torch.float32\), got torch.float64",
    ),
    "mixed dtypes": (
        (X, [W, W2.double()], [V, V2], [M]),
        TypeError,
        r"weights\[1\]: expected the dtype of weights\[0\] .*, got torch.float64",
    ),
    "dtype of biases": (
        (X, [W, W2], [V, V2.half()], [M]),
        TypeError,
        r"biases\[1\]: expected the dtype of weights\[0\] .*, got torch.float16",
    ),
    "device of input": (
        (X.to("meta"), [W, W2], [V, V2], [M]),
        TypeError,
        r"input: expected the device of weights\[0\] \(cpu\), got meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=r"^masked_mlp: " + message):
        masked_mlp(*arguments)
    x, *rest = arguments
    with pytest.raises(error, match=r"^masked_mlp_loss: " + message):
        masked_mlp_loss(x, torch.zeros(6, 2), *rest, loss="mse")


Y, CLASSES = torch.randn(6, 2), torch.zeros(6, dtype=torch.int64)
BAD_LOSSES = {
    "unknown loss": (Y, {"loss": "l1"}, ValueError, 'loss: expected one of mse, .*, got "l1"'),
    "temperature of mse": (Y, {"loss": "mse", "temperature": 2.0}, ValueError, "temperature: expected 1 "),
    "label smoothing of mse": (
        Y,
        {"loss": "mse", "label_smoothing": 0.5},
        ValueError,
        "label_smoothing: expected 0 ",
    ),
    "label smoothing": (
        CLASSES,
        {"loss": "cross_entropy", "label_smoothing": 2.0},
        ValueError,
        "label_smoothing: expected a number from 0 to 1, got 2",
    ),
    "temperature": (
        CLASSES,
        {"loss": "cross_entropy", "temperature": -1.0},
        ValueError,
        "temperature: expected a positive number, got -1",
    ),
    "outputs of target": (Y[:, :1], {"loss": "mse"}, ValueError, r"target: expected shape \[6, 2\]"),
    "batch of target": (
        Y[:1],
        {"loss": "bce"},
        ValueError,
        r"target: expected shape \[6, 2\] or \[3, 6, 2\]",
    ),
    "masks of target": (Y.expand(2, 6, 2), {"loss": "mse"}, ValueError, r"target: .*got shape \[2, 6, 2\]"),
    "shape of classes": (CLASSES[:1], {"loss": "cross_entropy"}, ValueError, r"target: expected shape \[6\]"),
    "shape of gaussian": (Y, {"loss": "gaussian_nll"}, ValueError, r"target: expected shape \[6, 1\]"),
    "dtype of target": (
        Y.double(),
        {"loss": "mse"},
        TypeError,
        r"target: expected .*, got (Double|torch.float64)",
    ),
    "dtype of classes": (Y[:, 0], {"loss": "cross_entropy"}, TypeError, "target: expected .*int64"),
    "weights": (
        Y,
        {"loss": "mse", "sample_weight": torch.ones(1)},
        ValueError,
        r"sample_weight: expected shape \[6\]",
    ),
    "dtype of weights": (
        Y,
        {"loss": "mse", "sample_weight": torch.ones(6).long()},
        TypeError,
        "sample_weight: expected",
    ),
    "gradient of target": (
        Y.clone().requires_grad_(),
        {"loss": "mse"},
        ValueError,
        r"target: expected requires_grad=False",
    ),
}


@pytest.mark.parametrize("case", BAD_LOSSES)
def test_bad_losses_are_refused_within_torch_func_too(case):
    target, options, error, message = BAD_LOSSES[case]

    def loss(x: Tensor) -> Tensor:
        return masked_mlp_loss(x, target, [W, W2], [V, V2], [M], **options).sum()

    for call in (loss, torch.func.grad(loss)):
        with pytest.raises(error, match=rf"^ensemble_mlp_loss: ({message})"):
            call(X.clone().requires_grad_())
    good = {"loss": "cross_entropy", "sample_weight": torch.ones(3, 6), "temperature": 0.5}
    torch.func.grad(lambda x: masked_mlp_loss(x, CLASSES, [W, W2], [V, V2], [M], **good).sum())(X)


def test_unknown_activations_are_refused_everywhere():
    options = {"activation": "swish"}
    for function in (
        lambda x: masked_mlp(x, [W, W2], [V, V2], [M], **options).sum(),
        lambda x: masked_mlp_loss(x, Y, [W, W2], [V, V2], [M], loss="mse", **options).sum(),
    ):
        for call in (function, torch.func.grad(function)):
            message = r'^masked_mlp(_loss)?: activation: expected one of relu, .*, got "swish"'
            with pytest.raises(ValueError, match=message):
                call(X)


def test_bad_plans():
    with pytest.raises(ValueError, match=r"^masked_mlp: plan: expected one for each of the 1 masks, got 2"):
        masked_mlp(X, [W, W2], [V, V2], [M], plan=plan_masks([M, M]))
    (plan,) = plan_masks([M])
    for wrong, message in (
        (plan[:2], r"rows: expected \[3, kept\], got shape \[2, "),
        (plan + 4, r"rows: expected from -1 \(padding\) to 3, got"),
        (plan - 2, r"rows: expected from -1 \(padding\) to 3, got -2"),
    ):
        with pytest.raises(ValueError, match=r"^masked_weights: " + message):
            masked_mlp(X, [W, W2], [V, V2], [M], plan=[wrong])
    with pytest.raises(TypeError, match=r"^masked_weights: rows: expected int64, got Int"):
        masked_mlp(X, [W, W2], [V, V2], [M], plan=[plan.int()])


def test_bad_input_of_the_gather():
    rows = index(3, 2, 4)
    for arguments, error, message in (
        ((W[0], rows, None, 3), ValueError, r"weight: expected \[rows, columns\], got shape \[5\]"),
        ((W.long(), rows, None, 3), TypeError, r"weight: expected float32, .*, got Long"),
        ((W, rows, None, 0), ValueError, r"num_masks: expected at least 1, got 0"),
        ((W, rows[0], None, 3), ValueError, r"rows: expected \[3, kept\], got shape \[2\]"),
        ((W, rows, None, 2), ValueError, r"rows: expected \[2, kept\], got shape \[3, 2\]"),
        ((W, None, rows + 4, 3), ValueError, r"columns: expected from -1 \(padding\) to 4, got"),
        (
            (W, None, rows.to("meta"), 3),
            TypeError,
            r"columns: expected the device of the weight",
        ),
    ):
        with pytest.raises(error, match=r"^masked_weights: " + message):
            torch.ops.pyens.masked_weights(*arguments)
    grad = torch.zeros(3, 2, 5)
    for arguments, message in (
        ((grad[0], rows, None, 4, 5), r"grad: expected \[N, 2, 5\], got shape \[2, 5\]"),
        ((grad, rows, None, 4, 6), r"grad: expected \[N, 2, 6\], got shape \[3, 2, 5\]"),
        ((grad, rows[0], None, 4, 5), r"rows: expected \[N, kept\], got shape \[2\]"),
        ((grad, rows[:2], None, 4, 5), r"rows: expected \[3, kept\], got shape \[2, 2\]"),
    ):
        with pytest.raises(ValueError, match=r"^masked_weights: " + message):
            torch.ops.pyens.masked_weights_backward(*arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_on_cuda_are_the_same_bits(dtype):
    for n, _, widths in SHAPES:
        _, weights, biases, masks = problem(n, 1, widths, dtype)
        masks = unequal(masks)
        here = masked_weights(weights, biases, n, plan_masks(masks))
        on_cuda = [[t.cuda() for t in tensors] for tensors in (weights, biases, masks)]
        there = masked_weights(*on_cuda[:2], n, plan_masks(on_cuda[2]))
        for a, b in zip([*here[0], *here[1]], [*there[0], *there[1]], strict=True):
            assert torch.equal(a, b.cpu())


@pytest.mark.cuda
def test_gradients_on_cuda():
    for n, b, widths in SHAPES[3:6]:
        x, weights, biases, masks = problem(n, b, widths, torch.float64)
        grads = []
        for device in ("cpu", "cuda"):
            leaves = [t.to(device).requires_grad_() for t in (x, *weights, *biases)]
            split = 1 + len(weights)
            kept = [mask.to(device) for mask in masks]
            output = masked_mlp(leaves[0], leaves[1:split], leaves[split:], kept, activation="gelu")
            grads.append(torch.autograd.grad(output.square().sum(), leaves))
        for here, there in zip(*grads, strict=True):
            torch.testing.assert_close(there.cpu(), here)


@pytest.mark.cuda
def test_on_cuda_a_row_that_there_is_not_becomes_nan():
    weight, rows = torch.randn(4, 5), torch.tensor([[0, 4], [-2, 1]])
    got = torch.ops.pyens.masked_weights(weight.cuda(), rows.cuda(), None, 2).cpu()
    assert torch.equal(got[0, 0], weight[0]) and torch.equal(got[1, 1], weight[1])
    assert got[0, 1].isnan().all() and got[1, 0].isnan().all()
