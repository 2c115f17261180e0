"""pyens.ops.decorrelation_loss against its reference in float64, and the promises of its docstring."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import decorrelation, harness
from pyens import reference
from pyens.ops import decorrelation_loss

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = ["correlation", "covariance", "residue"]
REDUCTIONS = ["sum", "none"]
# [J, B], [J, B, K], [M, J, B, K]: blocks of components, lanes, periods and chunks +- 1, few and many labels.
SHAPES = [
    (2, 1),
    (2, 17),
    (5, 130),
    (7, 2049),
    (26, 700),
    (2, 1, 1),
    (3, 2, 16),
    (8, 129, 7),
    (2, 1025, 10),
    (9, 31, 10),
    (13, 40, 32),
    (3, 40, 64),
    (4, 33, 65),
    (3, 520, 129),
    (2, 3, 4, 5),
    (3, 7, 100, 3),
    (2, 4, 9, 70),
]


def draw(shape: tuple[int, ...], dtype: torch.dtype, offset: float = 0.0) -> Tensor:
    """Components that have something in common, so that no correlation is all rounding."""
    own = torch.randn(shape, dtype=torch.float64)
    common = torch.randn(shape, dtype=torch.float64).narrow(-2 if len(shape) == 2 else -3, 0, 1)
    return (own + common + offset).to(dtype)


def loss_and_gradient(function, outputs: Tensor, kind: str, reduction: str = "sum") -> tuple[Tensor, Tensor]:
    outputs = outputs.detach().requires_grad_()
    loss = function(outputs, kind=kind, reduction=reduction)
    weights = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return loss.detach(), torch.autograd.grad((loss * weights).sum(), outputs)[0]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_close(got: Tensor, plain: Tensor, oracle: Tensor) -> None:
    """At most twice the rms error of plain PyTorch in the same dtype, plus two roundings."""
    assert got.shape == oracle.shape and got.dtype == plain.dtype
    rounding = torch.finfo(got.dtype).eps * rms(oracle)
    # The float64 oracle is plain PyTorch itself: there, some roundings along the way are all that may differ.
    allowed = 16 * rounding if got.dtype == torch.float64 else 2 * (rms(plain.double() - oracle) + rounding)
    assert rms(got.double() - oracle) <= allowed


# --- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_reference(dtype, kind, shape):
    outputs = draw(shape, dtype)
    for reduction in REDUCTIONS:
        got = loss_and_gradient(decorrelation_loss, outputs, kind, reduction)
        plain = loss_and_gradient(reference.decorrelation_loss, outputs, kind, reduction)
        oracle = loss_and_gradient(reference.decorrelation_loss, outputs.double(), kind, reduction)
        for ours, theirs, exact in zip(got, plain, oracle, strict=True):
            assert_close(ours, theirs, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_is_half_the_difference_of_the_norms(kind):
    z = draw((5, 40), torch.float64)
    if kind == "covariance":
        z_of_kind = z - z.mean(1, keepdim=True)
    else:
        z_of_kind = z - z.mean(0) if kind == "residue" else z
    c = sum(torch.outer(example, example) for example in z_of_kind.T) / 40
    expected = (c.square().sum() - c.diag().square().sum()) / 2
    torch.testing.assert_close(decorrelation_loss(z, kind=kind), expected, rtol=1e-12, atol=0)


def test_two_components_by_hand():
    z = torch.tensor([[1.0, 2.0, 3.0, 6.0], [2.0, 0.0, 1.0, 1.0]])
    assert decorrelation_loss(z).item() == ((2 + 0 + 3 + 6) / 4) ** 2
    assert decorrelation_loss(z, kind="covariance").item() == (2.75 - 3.0 * 1.0) ** 2
    half = torch.tensor([-0.5, 1.0, 1.0, 2.5])  # half the difference; the residues are plus and minus that
    assert decorrelation_loss(z, kind="residue").item() == half.square().mean().square().item()


def test_orthogonal_components_have_no_loss():
    hadamard = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    assert decorrelation_loss(hadamard).item() == 0
    # Only the first row's mean is not 0: centring leaves the others as they are.
    assert decorrelation_loss(hadamard, kind="covariance").item() == 0


def test_labels_and_models_have_losses_of_their_own():
    outputs = draw((3, 4, 50, 6), torch.float64)
    for kind in KINDS:
        got = decorrelation_loss(outputs, kind=kind, reduction="none")
        assert got.shape == (3, 6)
        for m, k in itertools.product(range(3), range(6)):
            alone = decorrelation_loss(outputs[m, :, :, k], kind=kind)
            torch.testing.assert_close(got[m, k], alone, rtol=1e-12, atol=0)
        torch.testing.assert_close(decorrelation_loss(outputs, kind=kind), got.sum(-1))


@pytest.mark.parametrize("shape", [(4, 3000), (3, 900, 10), (2, 4, 300, 70)], ids=str)
@pytest.mark.parametrize("kind", ["covariance", "residue"])
@pytest.mark.parametrize("offset", [1e3, -3e4])
def test_an_offset_costs_no_digits(kind, offset, shape):
    outputs = draw(shape, torch.float32, offset)
    got = loss_and_gradient(decorrelation_loss, outputs, kind, "none")
    oracle = loss_and_gradient(reference.decorrelation_loss, outputs.double(), kind, "none")
    for ours, exact in zip(got, oracle, strict=True):
        assert rms(ours.double() - exact) <= 3e-6 * rms(exact)


def test_covariance_is_right_when_the_first_examples_are_unlike_the_others():
    outputs = draw((4, 3000), torch.float32)
    outputs[:, :16] += 1000  # what the data is shifted by
    got = loss_and_gradient(decorrelation_loss, outputs, "covariance")
    oracle = loss_and_gradient(reference.decorrelation_loss, outputs.double(), "covariance")
    for ours, exact in zip(got, oracle, strict=True):
        assert rms(ours.double() - exact) <= 1e-4 * rms(exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_component_has_no_loss(dtype, kind):
    for shape in ((1, 20), (1, 20, 3), (2, 1, 20, 3)):
        outputs = draw(shape, dtype)
        outputs[..., 0] = float("nan")  # it does not even look
        loss, gradient = loss_and_gradient(decorrelation_loss, outputs, kind)
        assert torch.equal(loss, torch.zeros_like(loss)) and torch.equal(gradient, torch.zeros_like(outputs))


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch_and_no_models(kind):
    for shape, result in (((3, 0), ()), ((3, 0, 4), (4,)), ((2, 3, 0, 4), (2, 4))):
        loss, gradient = loss_and_gradient(decorrelation_loss, torch.empty(shape), kind, "none")
        assert loss.shape == result and loss.isnan().all() and gradient.shape == shape
    loss, gradient = loss_and_gradient(decorrelation_loss, torch.empty(0, 3, 5, 4), kind)
    assert loss.shape == (0,) and gradient.shape == (0, 3, 5, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [5, 70])
def test_nan_stays_in_its_model_and_label(kind, k):
    outputs = draw((2, 3, 40, k), torch.float32)
    clean = loss_and_gradient(decorrelation_loss, outputs, kind, "none")
    outputs[1, 0, 20, 3] = float("nan")
    loss, gradient = loss_and_gradient(decorrelation_loss, outputs, kind, "none")
    hit = torch.zeros(2, k, dtype=torch.bool)
    hit[1, 3] = True
    assert loss[hit].isnan().all() and gradient[1, :, :, 3].isnan().all()
    assert torch.equal(loss[~hit], clean[0][~hit])
    others = ~hit[:, None, None].expand_as(gradient)
    assert torch.equal(gradient[others], clean[1][others])


def kind_of(x: Tensor) -> Tensor:
    """0 where finite, 1 and -1 where infinite, 2 where NaN."""
    return torch.where(x.isnan(), 2, x.isinf() * x.sign()).nan_to_num(2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 37), (3, 2, 5), (2, 4, 37, 5), (2, 3, 40, 70)], ids=str)
def test_nan_and_inf_as_in_torch(shape, kind, dtype):
    clean = draw(shape, dtype)
    large = 1e200 if dtype == torch.float64 else torch.finfo(dtype).max  # its square overflows
    for value in (float("inf"), -float("inf"), float("nan"), large, -large):
        for twice in (False, True):
            outputs = clean.clone()
            last = outputs[-1] if outputs.dim() == 4 else outputs  # the model, the component, the label
            last[-1].view(-1)[-1] = value
            if twice:
                last[0].view(-1)[-1] = -value
            got = loss_and_gradient(decorrelation_loss, outputs, kind, "none")
            # Where float64 has room that this dtype has not, either may be right.
            same = loss_and_gradient(reference.decorrelation_loss, outputs, kind, "none")
            wide = loss_and_gradient(reference.decorrelation_loss, outputs.double(), kind, "none")
            for ours, a, b in zip(got, same, wide, strict=True):
                kinds = kind_of(ours)
                right = (kinds == kind_of(a)) | (kinds == kind_of(b.to(ours.dtype)))
                # The reference multiplies what it leaves out by 0: NaN where the gradient is infinite.
                right |= ours.isinf() & a.isnan() if ours is got[1] else False
                assert right.all(), (value, twice, ours[~right], a[~right], b[~right])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_strided_expanded_and_misaligned(dtype, kind):
    outputs = draw((2, 4, 50, 6), dtype)
    expected = loss_and_gradient(decorrelation_loss, outputs, kind)
    storage = torch.empty(outputs.numel() + 1, dtype=dtype)
    padded = torch.cat([outputs, torch.full_like(outputs, float("nan"))], -1)[..., :6]
    for changed in (
        storage[1:].view(outputs.shape).copy_(outputs),
        outputs.transpose(-1, -2).contiguous().transpose(-1, -2),
        outputs.transpose(0, 1).contiguous().transpose(0, 1),
        outputs.movedim(2, 0).contiguous().movedim(0, 2),
        padded,
    ):
        got = loss_and_gradient(decorrelation_loss, changed, kind)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    same = outputs[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(
        decorrelation_loss(same, kind=kind), decorrelation_loss(same.contiguous(), kind=kind)
    )


# --- the same bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5000), (9, 3000, 10), (5, 2, 700, 70)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_any_number_of_threads(kind, shape):
    outputs = draw(shape, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(loss_and_gradient(decorrelation_loss, outputs, kind))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(loss, results[0][0]) for loss, _ in results)
    assert all(torch.equal(gradient, results[0][1]) for _, gradient in results)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_any_models_beside(kind):
    outputs = draw((5, 4, 300, 10), torch.float32)
    loss, gradient = loss_and_gradient(decorrelation_loss, outputs, kind, "none")
    assert torch.equal(decorrelation_loss(outputs[2:3], kind=kind, reduction="none"), loss[2:3])
    alone = outputs[4].clone().requires_grad_()
    (
        decorrelation_loss(alone, kind=kind, reduction="none") * torch.linspace(0.5, 2, 50)[40:]
    ).sum().backward()
    assert torch.equal(alone.grad, gradient[4])


# --- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 4), (3, 5), (3, 4, 2), (2, 3, 4, 2)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, reduction, shape):
    outputs = draw(shape, torch.float64).requires_grad_()

    def function(outputs):
        return decorrelation_loss(outputs, kind=kind, reduction=reduction)

    assert torch.autograd.gradcheck(function, outputs)
    assert torch.autograd.gradgradcheck(function, outputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_create_graph_gives_the_same_gradient(kind, dtype):
    outputs = draw((4, 30, 5), dtype).requires_grad_()
    loss = decorrelation_loss(outputs, kind=kind)
    (composed,) = torch.autograd.grad(loss, outputs, create_graph=True)
    (from_the_kernel,) = torch.autograd.grad(loss, outputs)
    assert composed.requires_grad and composed.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(composed, from_the_kernel, rtol=0, atol=30 * eps * rms(from_the_kernel))


def test_no_gradient_is_computed_where_none_is_needed():
    assert not decorrelation_loss(draw((3, 5), torch.float32)).requires_grad


def test_the_kernels_beneath_have_no_derivative():
    outputs = draw((3, 5), torch.float32).requires_grad_()
    loss, correlations, _ = torch.ops.pyens.decorrelation_loss_forward(outputs, "correlation", "sum")
    for result in (loss, correlations):
        with pytest.raises(RuntimeError, match="not implemented"):
            result.sum().backward()


# --- the dispatcher ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, reduction, requires_grad):
    for shape in ((3, 5), (3, 5, 2), (2, 3, 5, 2)):
        outputs = draw(shape, torch.float32).requires_grad_(requires_grad)
        torch.library.opcheck(torch.ops.pyens.decorrelation_loss, (outputs, kind, reduction))
    outputs = outputs.detach()
    torch.library.opcheck(torch.ops.pyens.decorrelation_loss_forward, (outputs, kind, reduction))
    loss, *saved = torch.ops.pyens.decorrelation_loss_forward(outputs, kind, reduction)
    torch.library.opcheck(
        torch.ops.pyens.decorrelation_loss_backward, (loss, outputs, *saved, kind, reduction)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_compile_without_graph_breaks_or_many_recompilations(kind):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda z: decorrelation_loss(z * 2, kind=kind), fullgraph=True, backend=counter)
    for b in (5, 7, 12, 16, 33, 64, 100):
        outputs = draw((3, b, 4), torch.float32).requires_grad_()
        got, expected = compiled(outputs), decorrelation_loss(outputs * 2, kind=kind)
        assert torch.equal(got, expected)
        for ours, theirs in zip(
            torch.autograd.grad(got, outputs), torch.autograd.grad(expected, outputs), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count <= 2  # one for the first size, one for all others


def test_compiled_by_inductor():
    torch._dynamo.reset()
    outputs = draw((3, 20, 4), torch.float32).requires_grad_()
    compiled = torch.compile(lambda z: decorrelation_loss(z.tanh(), kind="residue"), fullgraph=True)
    expected = decorrelation_loss(outputs.tanh(), kind="residue")
    got = compiled(outputs)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, outputs), torch.autograd.grad(expected, outputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_in_float32(dtype):
    outputs = draw((3, 20, 4), dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = decorrelation_loss(outputs)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, decorrelation_loss(outputs.float()))
    loss.backward()
    assert outputs.grad.dtype == dtype
    with torch.autocast("cpu", dtype):
        assert decorrelation_loss(outputs.double()).dtype == torch.float64


# --- torch.func --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_func_grad(kind):
    outputs = draw((3, 6, 2), torch.float64)

    def once(function):
        return torch.func.grad(lambda z: function(z, kind=kind))

    def twice(function):
        return torch.func.grad(lambda z: once(function)(z).square().sum())

    for derivative in (once, twice):
        torch.testing.assert_close(
            derivative(decorrelation_loss)(outputs), derivative(reference.decorrelation_loss)(outputs)
        )


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 2), (2, 3, 6, 2)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_func_vmap(reduction, shape, dim):
    batches = torch.stack([draw(shape, torch.float64) for _ in range(4)], dim)

    def function(z):
        return decorrelation_loss(z, kind="covariance", reduction=reduction)

    expected = torch.stack([function(z) for z in batches.unbind(dim)])
    torch.testing.assert_close(torch.func.vmap(function, in_dims=dim)(batches), expected)
    gradients = torch.func.vmap(torch.func.grad(lambda z: function(z).sum()), in_dims=dim)(batches)
    expected = [torch.func.grad(lambda z: function(z).sum())(z) for z in batches.unbind(dim)]
    torch.testing.assert_close(gradients, torch.stack(expected))


def test_func_forward_mode():
    outputs, tangents = draw((3, 6), torch.float64), draw((3, 6), torch.float64)
    got, expected = (
        torch.func.jvp(function, (outputs,), (tangents,))
        for function in (decorrelation_loss, reference.decorrelation_loss)
    )
    torch.testing.assert_close(got, expected)
    got, expected = (
        torch.func.hessian(function)(outputs)
        for function in (decorrelation_loss, reference.decorrelation_loss)
    )
    torch.testing.assert_close(got, expected)


# --- properties --------------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 7), st.integers(1, 40), st.integers(1, 20))


@given(shape=sizes, kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31))
def test_permuting_components_changes_nothing(shape, kind, seed):
    torch.manual_seed(seed)
    outputs, order = draw(shape, torch.float64), torch.randperm(shape[0])
    loss = decorrelation_loss(outputs, kind=kind)
    torch.testing.assert_close(decorrelation_loss(outputs[order], kind=kind), loss, rtol=1e-11, atol=1e-20)
    assert loss >= 0


@given(shape=sizes, kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31))
def test_the_gradient_points_along_the_outputs(shape, kind, seed):
    # The loss is of the fourth degree in the outputs (Euler): z · dloss/dz = 4 loss.
    torch.manual_seed(seed)
    outputs = draw(shape, torch.float64).requires_grad_()
    loss = decorrelation_loss(outputs, kind=kind)
    (gradient,) = torch.autograd.grad(loss, outputs)
    torch.testing.assert_close((gradient * outputs).sum(), 4 * loss, rtol=1e-9, atol=1e-14)


@given(shape=sizes, seed=st.integers(0, 2**31))
def test_what_is_removed_does_not_matter(shape, seed):
    torch.manual_seed(seed)
    outputs = draw(shape, torch.float64)
    of_component, of_example = torch.randn(shape[0], 1, shape[2]), torch.randn(shape[1:])
    for kind, shift in (("covariance", of_component), ("residue", of_example)):
        torch.testing.assert_close(
            decorrelation_loss(outputs + shift, kind=kind),
            decorrelation_loss(outputs, kind=kind),
            rtol=1e-10,
            atol=1e-20,
        )


# --- bad input ---------------------------------------------------------------------------------------------

Z = torch.randn(3, 5, 2)
BAD = {
    "rank 1": (
        (Z[0, :, 0], "correlation", "sum"),
        ValueError,
        r"outputs: expected \[J, B\].*got shape \[5\]",
    ),
    "rank 5": ((Z[None, None], "correlation", "sum"), ValueError, r"outputs: .*got shape \[1, 1, 3, 5, 2\]"),
    "no component": ((Z[:0], "correlation", "sum"), ValueError, r"outputs: expected at least one component"),
    "no label": ((Z[..., :0], "residue", "sum"), ValueError, r"outputs: expected .* one label, got shape"),
    "integers": ((Z.long(), "correlation", "sum"), TypeError, r"outputs: expected float32, .*got Long"),
    "kind": ((Z, "pearson", "sum"), ValueError, r'kind: expected correlation, .*residue, got "pearson"'),
    "reduction": ((Z, "residue", "mean"), ValueError, r'reduction: expected sum or none, got "mean"'),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    (outputs, kind, reduction), error, message = BAD[case]
    calls = (
        lambda: decorrelation_loss(outputs, kind=kind, reduction=reduction),
        lambda: torch.ops.pyens.decorrelation_loss(outputs, kind, reduction),
        lambda: torch.ops.pyens.decorrelation_loss(outputs.to("meta"), kind, reduction),
        lambda: decorrelation_loss(
            outputs.clone().requires_grad_(outputs.is_floating_point()), kind=kind, reduction=reduction
        ),
    )
    for call in calls:
        with pytest.raises(error, match=r"^decorrelation_loss: " + message):
            call()


def test_backward_refuses_what_does_not_belong_to_the_outputs():
    loss, correlations, centre = torch.ops.pyens.decorrelation_loss_forward(Z, "covariance", "none")
    backward = torch.ops.pyens.decorrelation_loss_backward
    with pytest.raises(ValueError, match=r"grad: expected the shape of the loss \[2\], got shape \[\]"):
        backward(loss.sum(), Z, correlations, centre, "covariance", "none")
    with pytest.raises(ValueError, match="correlations: expected what decorrelation_loss_forward returns"):
        backward(loss, Z, correlations[:, :1], centre, "covariance", "none")
    with pytest.raises(ValueError, match="centre: expected what decorrelation_loss_forward returns"):
        backward(loss, Z, correlations, centre[:1], "covariance", "none")
    with pytest.raises(TypeError, match="grad: expected the dtype of outputs"):
        backward(loss.double(), Z, correlations, centre, "covariance", "none")


# --- CUDA --------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_on_cuda(dtype, shape, kind):
    for reduction in REDUCTIONS:
        outputs = draw(shape, dtype, offset=0.5)

        def on_cuda(z: Tensor, **options: str) -> Tensor:
            return decorrelation_loss(z.cuda(), **options).cpu()

        got = loss_and_gradient(on_cuda, outputs, kind, reduction)
        again = loss_and_gradient(on_cuda, outputs, kind, reduction)
        plain = loss_and_gradient(reference.decorrelation_loss, outputs, kind, reduction)
        oracle = loss_and_gradient(reference.decorrelation_loss, outputs.double(), kind, reduction)
        for g, a, p, o in zip(got, again, plain, oracle, strict=True):
            assert torch.equal(g, a)
            assert_close(g, p, o)


# --- the benchmark -----------------------------------------------------------------------------------------


def test_quick_benchmark(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        command = ["--quick", "--threads", "1", "--output", str(tmp_path)]
        assert harness.main("decorrelation", "", decorrelation.cases, command) == 0
    finally:
        torch.set_num_threads(threads)  # a benchmark sets them for the whole process
    (tiny,) = harness.Report.load(tmp_path / "decorrelation-cpu-float32-quick.json").results
    assert {timing.name for timing in tiny.timed()} == {"pyens op", "reference"}
    assert "vs best peer" in capsys.readouterr().out
