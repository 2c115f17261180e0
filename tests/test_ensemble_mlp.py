"""pyens.ops.ensemble_mlp against its reference in float64, and the promises of its docstring."""

import itertools

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pyens
from pyens import reference
from pyens.ops import ensemble_mlp
from pyens.ops.ensemble_mlp import ensemble_mlp_packed, prepack
from pyens.reference.activations import ACTIVATIONS as ACTIVATION_FUNCTIONS

ACTIVATIONS = list(ACTIVATION_FUNCTIONS)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# E, B, widths: both mappings of the CPU kernel, their vector widths and blocks +- 1.
SHAPES = [
    (1, 1, [1, 1]),
    (1, 1, [5, 3, 2]),
    (3, 2, [8, 8, 8]),
    (100, 1, [32, 50, 20, 10, 1]),
    (2, 7, [33, 17, 9, 7]),
    (3, 8, [20, 40, 3]),
    (2, 9, [30, 12, 10]),
    (2, 10, [130, 9, 2]),
    (2, 15, [4, 3]),
    (2, 16, [7, 5, 6]),
    (2, 17, [127, 31, 3]),
    (3, 63, [16, 50, 20, 10, 1]),
    (1, 65, [3, 1, 1, 1, 4]),
    (2, 129, [128, 13, 16]),
    (2, 33, [129, 130, 131]),
    (1, 3, [300, 70, 65]),
    (1, 40, [257, 193, 385]),
    (4, 520, [6, 11, 2]),
]

Problem = tuple[Tensor, list[Tensor], list[Tensor]]


def problem(
    e: int, b: int, widths: list[int], device: torch.device, dtype: torch.dtype, per_member: bool = False
) -> Problem:
    """Random input, weights and biases, of a size that keeps activations near 1."""
    x = torch.randn(*([e] if per_member else []), b, widths[0], dtype=torch.float64)
    layers = list(itertools.pairwise(widths))
    weights = [torch.randn(e, o, i, dtype=torch.float64) / i**0.5 * 1.4 for i, o in layers]
    biases = [torch.randn(e, o, dtype=torch.float64) * 0.3 for _, o in layers]
    return x.to(device, dtype), [w.to(device, dtype) for w in weights], [v.to(device, dtype) for v in biases]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_close(
    got: Tensor, x: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str
) -> None:
    """At most twice the rms error of plain PyTorch in the same dtype, plus one rounding of the output."""
    oracle = reference.ensemble_mlp(
        x.double(), [w.double() for w in weights], [v.double() for v in biases], activation=activation
    )
    plain = reference.ensemble_mlp(x, weights, biases, activation=activation)
    assert got.shape == oracle.shape and got.dtype == x.dtype
    scale = torch.finfo(x.dtype).eps * rms(oracle)
    # The float64 oracle is plain PyTorch itself: there, some roundings along the way are all that may differ.
    allowed = 16 * scale if x.dtype == torch.float64 else 2 * rms(plain.double() - oracle) + scale
    assert rms(got.double() - oracle) <= allowed


# --- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("activation", "shape"),
    # Shapes and activations do not know each other: the first seven at all shapes, the others at some.
    [(a, s) for i, a in enumerate(ACTIVATIONS) for s in (SHAPES if i < 7 else SHAPES[3::5])],
    ids=str,
)
def test_matches_the_reference(device, dtype, activation, shape):
    for per_member in (False, True):
        x, weights, biases = problem(*shape, device, dtype, per_member)
        got = ensemble_mlp(x, weights, biases, activation=activation)
        assert_close(got, x, weights, biases, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [3, 40])
def test_without_biases(device, dtype, b):
    x, weights, _ = problem(3, b, [9, 6, 5], device, dtype)
    zeros = [w.new_zeros(w.shape[:2]) for w in weights]
    for none in (None, [], ()):
        assert torch.equal(ensemble_mlp(x, weights, none), ensemble_mlp(x, weights, zeros))


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_over_their_whole_range(device, dtype, activation):
    # One input, weight 1: the hidden activation is the function itself, and so is the output.
    grid = torch.cat(
        [torch.linspace(-30, 30, 6001), torch.logspace(-30, 2, 500), -torch.logspace(-30, 2, 500)]
    )
    x = grid.to(device, dtype).unsqueeze(1)
    one = torch.ones(1, 1, 1, device=device, dtype=dtype)
    got = ensemble_mlp(x, [one, one], activation=activation)[0].double()
    exact = ACTIVATION_FUNCTIONS[activation](x.double())
    # torch's own gelu cancels below zero; there ours is closer to the exact value than the oracle.
    if activation == "gelu":
        exact = 0.5 * x.double() * torch.special.erfc(-x.double() / 2**0.5)
    if activation == "gelu_tanh":
        inner = (2 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3)
        exact = x.double() / (1 + torch.exp(-2 * inner))
    eps = torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).tiny
    # e^(-x^2/2) magnifies the rounding of its argument.
    magnified = {"gelu": 3 * x.double() ** 2, "gelu_tanh": x.double().abs() ** 3}
    ulps = 4 + magnified.get(activation, x.double().abs()).clamp(max=3000)
    if activation == "sin":  # near its zeros the argument's own rounding counts
        tiny = eps / 4
    assert ((got - exact).abs() <= eps * ulps * exact.abs() + 4 * tiny).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [2, 20])
def test_nan_and_inf_as_in_torch(device, dtype, b):
    for activation in ACTIVATIONS:
        x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 3.0], device=device, dtype=dtype)
        x = x.repeat(b).unsqueeze(1)
        one = torch.ones(1, 1, 1, device=device, dtype=dtype)
        got = ensemble_mlp(x, [one, one], activation=activation)
        # In float64, where torch's own gelu(inf) is inf; its vectorised float32 one gives NaN.
        expected = reference.ensemble_mlp(x.double(), [one.double()] * 2, activation=activation)
        torch.testing.assert_close(got, expected.to(dtype), equal_nan=True)


@pytest.mark.parametrize("b", [4, 50])
def test_nan_stays_where_it_is(device, b):
    x, weights, biases = problem(5, b, [7, 6, 3], device, torch.float32)
    clean = ensemble_mlp(x, weights, biases)
    poisoned = [w.clone() for w in weights]
    poisoned[0][2, 1, 1] = float("nan")
    got = ensemble_mlp(x, poisoned, biases)
    others = [0, 1, 3, 4]
    assert torch.equal(got[others], clean[others]) and got[2].isnan().all()
    x = x.clone()
    x[1, 0] = float("inf")
    x[3, 2] = float("nan")
    got = ensemble_mlp(x, weights, biases)
    rows = [i for i in range(b) if i not in (1, 3)]
    assert torch.equal(got[:, rows], clean[:, rows]) and got[:, 3].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(device, dtype):
    x, weights, biases = problem(3, 0, [4, 5, 2], device, dtype)
    assert ensemble_mlp(x, weights, biases).shape == (3, 0, 2)
    weights = [w.requires_grad_() for w in weights]
    ensemble_mlp(x, weights, biases).sum().backward()
    assert all(torch.equal(w.grad, torch.zeros_like(w)) for w in weights)


@pytest.mark.parametrize("b", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_expanded_and_misaligned(device, dtype, b):
    x, weights, biases = problem(4, b, [6, 9, 5], device, dtype, per_member=True)
    expected = ensemble_mlp(x, weights, biases)

    def misaligned(t: Tensor) -> Tensor:
        storage = torch.empty(t.numel() + 1, device=device, dtype=dtype)
        return storage[1:].view(t.shape).copy_(t)

    def transposed(t: Tensor) -> Tensor:  # last dimension not contiguous
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)

    def padded(t: Tensor) -> Tensor:  # rows with gaps
        return torch.cat([t, torch.full_like(t, float("nan"))], -1)[..., : t.shape[-1]]

    for change in (misaligned, transposed, padded):
        got = ensemble_mlp(change(x), [change(w) for w in weights], [change(v) for v in biases])
        assert torch.equal(got, expected)
    got = ensemble_mlp(x.transpose(0, 1).contiguous().transpose(0, 1), weights, biases)
    assert torch.equal(got, expected)
    shared = x[0]
    expected = ensemble_mlp(shared, weights, biases)
    assert torch.equal(ensemble_mlp(shared.expand(4, b, 6), weights, biases), expected)
    one = [w[:1] for w in weights], [v[:1] for v in biases]
    got = ensemble_mlp(shared, [w.expand(4, -1, -1) for w in one[0]], [v.expand(4, -1) for v in one[1]])
    assert torch.equal(got, expected[:1].expand(4, -1, -1))


def test_more_than_2_31_elements():
    members, batch = 64, 2**25 + 3
    need = members * batch * 2
    free = _free_memory()
    if free < 2 * need:
        pytest.skip(f"needs {2 * need >> 30} GiB of free memory, {free >> 30} are there")
    x = torch.randn(batch, 1).bfloat16()
    weight = torch.randn(members, 1, 1).bfloat16()
    output = ensemble_mlp(x, [weight])
    assert output.numel() > 2**31
    for rows in (slice(0, 5), slice(batch - 5, batch)):
        assert torch.equal(output[-1, rows], x[rows] * weight[-1])


def _free_memory() -> int:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return 0


# --- the same bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_member", [False, True])
def test_same_bits_for_any_split_of_the_batch(device, dtype, per_member):
    x, weights, biases = problem(3, 300, [140, 33, 9, 2], device, dtype, per_member)
    whole = ensemble_mlp(x, weights, biases, activation="gelu")
    for sizes in ([300 - 17, 17], [16, 15, 269], [1, 2, 7, 8, 9, 273], [128, 172]):
        parts = [ensemble_mlp(part, weights, biases, activation="gelu") for part in x.split(sizes, -2)]
        assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_however_far_rows_lie_apart(device, dtype):
    x, weights, biases = problem(2, 300, [256, 40, 512, 3], device, dtype)
    whole = ensemble_mlp(x, weights, biases)
    assert torch.equal(torch.cat([ensemble_mlp(part, weights, biases) for part in x.split(100)], 1), whole)
    for more in (1, 256):
        padded = [torch.nn.functional.pad(w, (0, more))[..., : w.shape[-1]] for w in weights]
        assert torch.equal(ensemble_mlp(x, padded, biases), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [1, 13, 300])
def test_same_bits_for_any_members_beside(device, dtype, b):
    x, weights, biases = problem(9, b, [140, 33, 2], device, dtype, per_member=True)
    whole = ensemble_mlp(x, weights, biases, activation="tanh")
    for members in (slice(0, 1), slice(4, 5), slice(2, 9)):
        part = ensemble_mlp(
            x[members], [w[members] for w in weights], [v[members] for v in biases], activation="tanh"
        )
        assert torch.equal(part, whole[members])


@pytest.mark.parametrize("b", [1, 300, 2000])
def test_same_bits_for_any_number_of_threads(b):
    x, weights, biases = problem(7, b, [140, 33, 2], torch.device("cpu"), torch.float32)
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            outputs.append(ensemble_mlp(x, weights, biases))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_gives_the_same_bits(dtype, shape):
    x, weights, biases = problem(*shape, torch.device("cpu"), dtype)
    for given_biases in (biases, []):
        packed = prepack(weights, given_biases)
        got = ensemble_mlp_packed(x, packed, weights, given_biases, activation="silu")
        assert torch.equal(got, ensemble_mlp(x, weights, given_biases, activation="silu"))


def test_packed_refuses_what_does_not_belong_to_the_weights():
    x, weights, biases = problem(3, 2, [4, 5, 2], torch.device("cpu"), torch.float32)
    packed = prepack(weights, biases)
    cut, moved, unbiased = packed[:-1], packed[64:], prepack(weights)
    for wrong in (cut, moved, unbiased, packed.float(), packed.unsqueeze(0), packed[:8], packed[:0]):
        with pytest.raises(ValueError, match="packed: expected what ensemble_mlp_prepack makes"):
            ensemble_mlp_packed(x, wrong, weights, biases)
    with pytest.raises(TypeError, match="packed: expected the device of weights"):
        ensemble_mlp_packed(x, packed.to("meta"), weights, biases)


# --- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients(device, activation, per_member, with_bias):
    x, weights, biases = problem(2, 3, [3, 4, 2], device, torch.float64, per_member)
    biases = biases if with_bias else []
    tensors = [t.requires_grad_() for t in (x, *weights, *biases)]

    def function(x, *parameters):
        return ensemble_mlp(x, parameters[:2], parameters[2:], activation=activation)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_member", [False, True])
def test_gradients_match_the_reference(device, dtype, per_member):
    # Smooth, so that no rounding flips a ReLU.
    x, weights, biases = problem(3, 70, [20, 33, 5], device, dtype, per_member)
    tensors = [x, *weights, *biases]

    def gradients(function, dtype):
        x, *parameters = [t.detach().to(dtype).requires_grad_() for t in tensors]
        output = function(x, parameters[:2], parameters[2:], activation="tanh")
        return torch.autograd.grad(output.double().square().mean(), [x, *parameters])

    got = gradients(ensemble_mlp, dtype)
    oracle = gradients(reference.ensemble_mlp, torch.float64)
    plain = gradients(reference.ensemble_mlp, dtype)
    for ours, exact, theirs in zip(got, oracle, plain, strict=True):
        assert ours.dtype == dtype
        assert rms(ours.double() - exact) <= 2 * rms(theirs.double() - exact) + torch.finfo(dtype).eps * rms(
            exact
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_every_shape(device, dtype, shape):
    e, b, widths = shape
    layers = len(widths) - 1
    activation = ACTIVATIONS[sum(widths) % 7] if b % 2 else "relu"
    # On a grid on which the outputs of a ReLU network are exact, so that no rounding flips a ReLU.
    x, weights, biases = problem(e, b, widths, device, torch.float64, per_member=sum(widths) % 3 == 0)
    tensors = [(t * 8).round() / 8 for t in (x, *weights, *biases)]
    grad = torch.randn(e, b, widths[-1], device=device).to(dtype)

    def gradients(function, dtype):
        x, *parameters = [t.to(dtype).requires_grad_() for t in tensors]
        output = function(x, parameters[:layers], parameters[layers:], activation=activation)
        return torch.autograd.grad(output, [x, *parameters], grad.to(dtype))

    got = gradients(ensemble_mlp, dtype)
    plain = gradients(reference.ensemble_mlp, dtype)
    exact = gradients(reference.ensemble_mlp, torch.float64)
    for ours, theirs, oracle in zip(got, plain, exact, strict=True):
        assert ours.shape == oracle.shape and ours.dtype == dtype
        rounding = torch.finfo(dtype).eps * rms(oracle)
        plain_error = 0 if dtype == torch.float64 else 2 * rms(theirs.double() - oracle)
        assert rms(ours.double() - oracle) <= plain_error + (32 if dtype == torch.float64 else 8) * rounding


@pytest.mark.parametrize(("e", "out"), [(1, 1), (1, 3), (4, 1), (4, 3)])
@pytest.mark.parametrize("b", [1, 5, 40])
def test_gradients_from_above_of_any_strides(device, e, out, b):
    x, weights, biases = problem(e, b, [4, 6, out], device, torch.float32)
    tensors = [t.requires_grad_() for t in (x, *weights, *biases)]
    output = ensemble_mlp(x, weights, biases)
    grad = torch.randn(e, b, out, device=device)
    for strided in (
        torch.ones((), device=device).expand(e, b, out),
        grad[:1].expand(e, b, out),
        grad[:, :1].expand(e, b, out),
        grad[..., :1].expand(e, b, out),
        grad.transpose(0, 2).contiguous().transpose(0, 2),
        torch.cat([grad, grad * float("nan")], -1)[..., :out],
    ):
        got = torch.autograd.grad(output, tensors, strided, retain_graph=True)
        plain = strided.clone(memory_format=torch.contiguous_format)
        expected = torch.autograd.grad(output, tensors, plain, retain_graph=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


def test_backward_computes_only_what_is_needed():
    x, weights, biases = problem(3, 20, [4, 6, 2], torch.device("cpu"), torch.float32)
    grad = torch.randn(3, 20, 2)

    def backward(needs_grad):
        op = torch.ops.pyens.ensemble_mlp_backward
        return op(grad, x, weights, biases, [], [], None, list(needs_grad), "gelu")

    whole = backward([True] * 5)
    for needs_grad in itertools.product((False, True), repeat=5):
        found = backward(needs_grad)
        expected = [gradient for gradient, needed in zip(whole, needs_grad, strict=True) if needed]
        assert len(found) == len(expected)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_only_gradients_that_are_needed_are_computed(device):
    x, weights, biases = problem(2, 3, [3, 4, 2], device, torch.float32)
    weights[1].requires_grad_()
    ensemble_mlp(x, weights, biases).sum().backward()
    assert weights[1].grad is not None and weights[0].grad is None and x.grad is None
    assert not ensemble_mlp(x, [w.detach() for w in weights], biases).requires_grad


def test_packed_has_no_derivative():
    x, weights, biases = problem(2, 3, [3, 4, 2], torch.device("cpu"), torch.float32)
    output = ensemble_mlp_packed(x.requires_grad_(), prepack(weights, biases), weights, biases)
    with pytest.raises(RuntimeError, match="not implemented"):
        output.sum().backward()


# --- the dispatcher ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, per_member, requires_grad):
    x, weights, biases = problem(3, 5, [4, 6, 2], device, torch.float32, per_member)
    if requires_grad:
        x, weights = x.requires_grad_(), [w.requires_grad_() for w in weights]
    torch.library.opcheck(torch.ops.pyens.ensemble_mlp, (x, weights, biases, [], [], "relu"))
    torch.library.opcheck(torch.ops.pyens.ensemble_mlp, (x, weights, [], [], [], "gelu"))


def test_opcheck_packed():
    x, weights, biases = problem(3, 5, [4, 6, 2], torch.device("cpu"), torch.float32)
    torch.library.opcheck(torch.ops.pyens.ensemble_mlp_prepack, (weights, biases))
    packed = prepack(weights, biases)
    torch.library.opcheck(torch.ops.pyens.ensemble_mlp_packed, (x, packed, weights, biases, "relu"))


def test_compile_without_graph_breaks_or_many_recompilations(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, w, b: ensemble_mlp(x, w, b).square(), fullgraph=True, backend=counter)
    _, weights, biases = problem(3, 1, [4, 6, 2], device, torch.float32)
    weights = [w.requires_grad_() for w in weights]
    for b in (5, 7, 12, 16, 33, 64, 100):
        x = torch.randn(b, 4, device=device)
        got, expected = compiled(x, weights, biases), ensemble_mlp(x, weights, biases).square()
        assert torch.equal(got, expected)
        for ours, theirs in zip(
            torch.autograd.grad(got.sum(), weights), torch.autograd.grad(expected.sum(), weights), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count <= 2  # one for the first size, one for all others


def test_compiled_by_inductor(device):
    torch._dynamo.reset()
    model = pyens.EnsembleMLP(3, 4, [6], 2, device=device)
    x = torch.randn(20, 4, device=device)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    if device.type == "cpu":
        packed = model.packed()
        torch.testing.assert_close(torch.compile(packed, fullgraph=True)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, dtype):
    x, weights, biases = problem(2, 20, [5, 6, 3], device, torch.float32)
    weights = [w.requires_grad_() for w in weights]
    with torch.autocast(device.type, dtype):
        got = ensemble_mlp(x, weights, biases)
        assert got.dtype == torch.nn.functional.linear(x, weights[0][0]).dtype == dtype
    half = [t.detach().to(dtype) for t in weights]
    assert torch.equal(got, ensemble_mlp(x.to(dtype), half, [v.to(dtype) for v in biases]))
    got.float().sum().backward()
    assert all(w.grad.dtype == torch.float32 for w in weights)


# --- torch.func --------------------------------------------------------------------------------------------


def test_func_grad(device):
    x, weights, biases = problem(2, 6, [3, 4, 2], device, torch.float64)

    def loss(function):
        return lambda x, w, b: function(x, w, b, activation="tanh").square().sum()

    got = torch.func.grad(loss(ensemble_mlp), argnums=(0, 1, 2))(x, weights, biases)
    expected = torch.func.grad(loss(reference.ensemble_mlp), argnums=(0, 1, 2))(x, weights, biases)
    torch.testing.assert_close(got, expected)

    def twice(function):
        return torch.func.grad(lambda x: torch.func.grad(loss(function))(x, weights, biases).square().sum())(
            x
        )

    torch.testing.assert_close(twice(ensemble_mlp), twice(reference.ensemble_mlp))


@pytest.mark.parametrize("per_member", [False, True])
def test_func_vmap_over_examples(device, per_member):
    x, weights, biases = problem(2, 6, [3, 4, 2], device, torch.float32, per_member)
    got = torch.func.vmap(lambda row: ensemble_mlp(row.unsqueeze(-2), weights, biases), in_dims=-2)(x)
    expected = ensemble_mlp(x, weights, biases)
    assert torch.equal(got.squeeze(-2).movedim(0, 1), expected)


@pytest.mark.parametrize("input_mapped", [False, True])
@pytest.mark.parametrize("per_member", [False, True])
def test_func_vmap_over_models(device, input_mapped, per_member):
    problems = [problem(2, 6, [3, 4, 2], device, torch.float32, per_member) for _ in range(5)]
    stacked = [torch.stack([w[layer] for _, w, _ in problems]) for layer in range(2)]
    bias = problems[0][2]
    xs = torch.stack([x for x, _, _ in problems])
    if input_mapped:
        got = torch.func.vmap(lambda x, w: ensemble_mlp(x, w, bias))(xs, stacked)
    else:
        got = torch.func.vmap(lambda w: ensemble_mlp(xs[0], w, bias))(stacked)
    for i, (_, w, _) in enumerate(problems):
        assert torch.equal(got[i], ensemble_mlp(xs[i if input_mapped else 0], w, bias))


def test_func_per_example_gradients(device):
    x, weights, biases = problem(2, 6, [3, 4, 2], device, torch.float64)

    def loss(function):
        return lambda w, row: function(row.unsqueeze(0), w, biases, activation="tanh").square().sum()

    got = torch.func.vmap(torch.func.grad(loss(ensemble_mlp)), in_dims=(None, 0))(weights, x)
    expected = torch.func.vmap(torch.func.grad(loss(reference.ensemble_mlp)), in_dims=(None, 0))(weights, x)
    torch.testing.assert_close(got, expected)


def test_func_forward_mode(device):
    x, weights, biases = problem(2, 6, [3, 4, 2], device, torch.float64)
    tangents = [torch.randn_like(w) for w in weights]

    def jvp(function):
        def run(x, w):
            return torch.func.jvp(lambda w: function(x, w, biases, activation="tanh"), (w,), (tangents,))

        return (*run(x, weights), *torch.func.vmap(run, in_dims=(0, None))(x.unsqueeze(1), weights))

    torch.testing.assert_close(jvp(ensemble_mlp), jvp(reference.ensemble_mlp))


# --- properties --------------------------------------------------------------------------------------------


@given(
    e=st.integers(1, 6),
    b=st.integers(0, 40),
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 2**31),
)
def test_permuting_members_permutes_outputs(e, b, widths, activation, seed):
    torch.manual_seed(seed)
    x, weights, biases = problem(e, b, widths, torch.device("cpu"), torch.float32)
    order = torch.randperm(e)
    output = ensemble_mlp(x, weights, biases, activation=activation)
    permuted = ensemble_mlp(x, [w[order] for w in weights], [v[order] for v in biases], activation=activation)
    assert torch.equal(permuted, output[order])


@given(
    b=st.integers(1, 40),
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 2**31),
)
def test_one_member_is_an_nn_sequential(b, widths, activation, seed):
    torch.manual_seed(seed)
    model = pyens.EnsembleMLP(
        1, widths[0], widths[1:-1], widths[-1], activation=activation, dtype=torch.float64
    )
    x = torch.randn(b, widths[0], dtype=torch.float64)
    assert isinstance(model.member(0), nn.Sequential)
    torch.testing.assert_close(model(x)[0], model.member(0)(x), rtol=1e-12, atol=1e-12)


# --- bad input ---------------------------------------------------------------------------------------------

W, V = torch.randn(3, 4, 5), torch.randn(3, 4)
W2, V2 = torch.randn(3, 2, 4), torch.randn(3, 2)
X = torch.randn(6, 5)
BAD = {
    "no layers": (
        (X, [], [], "relu"),
        ValueError,
        r"weights: expected at least one layer, got an empty list",
    ),
    "number of biases": (
        (X, [W, W2], [V], "relu"),
        ValueError,
        r"biases: expected one for each of the 2 layers",
    ),
    "rank of input": (
        (X[None, None], [W], [V], "relu"),
        ValueError,
        r"input: expected \[B, 5\] or \[3, B, 5\], got shape \[1, 1, \d+, 5\]",
    ),
    "features of input": (
        (X[:, :4], [W], [V], "relu"),
        ValueError,
        r"input: expected .*, got shape \[6, 4\]",
    ),
    "members of input": ((X.expand(2, 6, 5), [W], [V], "relu"), ValueError, r"input: expected .*\[2, 6, 5\]"),
    "rank of weights": (
        (X, [W[0]], [V], "relu"),
        ValueError,
        r"weights\[0\]: expected \[E, out, in\], got shape",
    ),
    "empty weights": ((X, [W[:0]], [V[:0]], "relu"), ValueError, r"weights\[0\]: expected .* none of them 0"),
    "chain of weights": (
        (X, [W, W], [V, V], "relu"),
        ValueError,
        r"weights\[1\]: expected in = out of weights\[0\] \(4\)",
    ),
    "members of weights": (
        (X, [W, W2[:2]], [], "relu"),
        ValueError,
        r"weights\[1\]: expected the ensemble size of .*\(3\)",
    ),
    "shape of biases": (
        (X, [W, W2], [V, V], "relu"),
        ValueError,
        r"biases\[1\]: expected \[3, 2\], got shape \[3, 4\]",
    ),
    "activation": ((X, [W], [V], "swish"), ValueError, r'activation: expected one of relu, .*, got "swish"'),
    "integer input": (
        (X.long(), [W], [V], "relu"),
        TypeError,
        r"input: expected the dtype of weights\[0\] \(Float\), got Long",
    ),
    "integer weights": (
        (X.long(), [W.long()], [], "relu"),
        TypeError,
        r"weights\[0\]: expected float32, .*got Long",
    ),
    "mixed dtypes": (
        (X, [W, W2.double()], [], "relu"),
        TypeError,
        r"weights\[1\]: expected the dtype .*got Double",
    ),
    "dtype of biases": (
        (X, [W], [V.half()], "relu"),
        TypeError,
        r"biases\[0\]: expected the dtype .*got Half",
    ),
    "mixed devices": (
        (X, [W], [V.to("meta")], "relu"),
        TypeError,
        r"biases\[0\]: expected the device .*got meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, error, message = BAD[case]
    x, weights, biases, activation = arguments
    calls = (
        lambda: ensemble_mlp(x, weights, biases, activation=activation),
        lambda: torch.ops.pyens.ensemble_mlp(x, weights, biases, [], [], activation),
        lambda: ensemble_mlp(
            x,
            [w.clone().requires_grad_(w.is_floating_point()) for w in weights],
            biases,
            activation=activation,
        ),
    )
    for call in calls:
        with pytest.raises(error, match=r"^ensemble_mlp: " + message):
            call()


def test_bad_input_on_fake_tensors():
    with pytest.raises(ValueError, match="weights\\[1\\]: expected in = out"):
        torch.ops.pyens.ensemble_mlp(X.to("meta"), [W.to("meta"), W.to("meta")], [], [], [], "relu")
