"""pyens.ops.ensemble_mlp_loss against its reference in float64, and the promises of its docstring."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pyens import reference
from pyens.ops import ensemble_mlp, ensemble_mlp_loss
from pyens.reference.ensemble_mlp import ACTIVATIONS as ACTIVATION_FUNCTIONS

ACTIVATIONS = list(ACTIVATION_FUNCTIONS)
LOSSES = ["mse", "bce", "gaussian_nll", "cross_entropy"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WEIGHTED = [None, "shared", "own"]
CPU = torch.device("cpu")
# E, B, widths: panels, tiles (of at most 256 examples) and spans (at most 16 in a batch) of the kernel, its
# vectors and blocks, all +- 1.
SHAPES = [
    (1, 1, [1, 1]),
    (3, 1, [5, 3, 2]),
    (2, 7, [33, 17, 9, 7]),
    (3, 8, [8, 8, 8]),
    (2, 9, [15, 16, 17]),
    (9, 15, [4, 3]),
    (1, 63, [16, 50, 20, 10, 1]),
    (2, 64, [7, 31, 1, 6]),
    (4, 65, [3, 1, 1, 4]),
    (2, 255, [6, 9, 12]),
    (17, 256, [6, 11, 2]),
    (3, 257, [32, 50, 20, 10, 1]),
    (2, 33, [129, 130, 131]),
    (1, 40, [257, 193, 385]),
    (1, 130, [4000, 130, 2]),  # wide enough for smaller tiles
    (8, 520, [6, 11, 2]),
    (3, 5000, [5, 9, 3]),
]

Problem = dict[str, Any]


def problem(
    e: int,
    b: int,
    widths: Sequence[int],
    loss: str,
    dtype: torch.dtype = torch.float64,
    device: torch.device = CPU,
    *,
    activation: str = "tanh",
    per_member: bool = False,
    own_target: bool = False,
    weighted: str | None = None,
    bias: bool = True,
) -> Problem:
    """Arguments of `ensemble_mlp_loss` on a coarse grid.

    There the outputs of a ReLU network are exact in every dtype but half precision's roundings: no rounding
    turns a ReLU on or off, which would change a gradient by far more than a rounding.
    """

    def grid(*shape: int, scale: float = 1.0, step: float = 0.125) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * scale / step).round() * step

    *hidden, out = widths
    layers = list(itertools.pairwise([*hidden, 2 * out if loss == "gaussian_nll" else out]))
    arguments = {
        "input": grid(*([e] if per_member else []), b, widths[0], step=0.25),
        "weights": [grid(e, o, i, scale=1.4 / i**0.5) for i, o in layers],
        "biases": [grid(e, o, scale=0.3) for _, o in layers] if bias else None,
        "loss": loss,
        "activation": activation,
    }
    target_shape = [e, b] if own_target else [b]
    if loss == "cross_entropy":
        arguments["target"] = torch.randint(out, target_shape)
        arguments["temperature"] = 0.75
    elif loss == "bce":
        arguments["target"] = torch.randint(9, (*target_shape, out)) / 8
    else:
        arguments["target"] = grid(*target_shape, out)
    if weighted:
        weight = torch.randint(9, [e, b] if weighted == "own" else [b]) / 4
        weight[..., ::5] = 0
        weight[..., 0] = 0.5 if b == 1 else 0  # never all of them
        arguments["sample_weight"] = weight
    return cast(arguments, dtype, device)


def cast(arguments: Problem, dtype: torch.dtype, device: torch.device = CPU) -> Problem:
    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(device, dtype if value.is_floating_point() else value.dtype)

    return {name: convert(value) for name, value in arguments.items()}


def with_gradients(
    function: Callable[..., Tensor], arguments: Problem, upstream: Tensor | None = None, **kwargs: Any
) -> list[Tensor]:
    """Loss, and gradients of input, weights and biases."""
    arguments = cast(arguments, arguments["input"].dtype, arguments["input"].device) | kwargs
    tensors = differentiable(arguments)
    for tensor in tensors:
        tensor.requires_grad_()
    loss = function(**arguments)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    return [loss.detach(), *torch.autograd.grad(loss, tensors, upstream)]


def differentiable(arguments: Problem) -> list[Tensor]:
    return [arguments["input"], *arguments["weights"], *(arguments["biases"] or ())]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_matches_the_reference(arguments: Problem, upstream: Tensor | None = None, **kwargs: Any) -> None:
    """Loss and gradients: at most twice the rms error of plain PyTorch in the same dtype, plus roundings.

    The float64 oracle is plain PyTorch itself: there, some roundings along the way are all that may differ.
    """
    dtype = arguments["input"].dtype
    got = with_gradients(ensemble_mlp_loss, arguments, upstream, **kwargs)
    plain = with_gradients(reference.ensemble_mlp_loss, arguments, upstream, **kwargs)
    in_float64 = cast(arguments, torch.float64, arguments["input"].device)
    exact = with_gradients(reference.ensemble_mlp_loss, in_float64, upstream, **kwargs)
    loss_dtype = dtype if dtype == torch.float64 else torch.float32
    for i, (ours, theirs, oracle) in enumerate(zip(got, plain, exact, strict=True)):
        assert ours.shape == oracle.shape and ours.dtype == (dtype if i else loss_dtype)
        rounding = torch.finfo(ours.dtype).eps * rms(oracle)
        # Squares of numbers on a grid mostly end in bits that are rounded down, hence the 24.
        roundings = 32 if dtype == torch.float64 else 24 if i == 0 else 2
        allowed = (0 if dtype == torch.float64 else 2 * rms(theirs - oracle)) + roundings * rounding
        error = rms(ours - oracle)
        assert error <= allowed, f"{'loss' if i == 0 else f'gradient {i - 1}'}: {error / allowed} of allowed"


# --- values and gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(device, shape, loss, dtype):
    choose = random.Random(f"{shape} {loss} {dtype}")
    arguments = problem(
        *shape,
        loss,
        dtype,
        device,
        activation=choose.choice(["relu", *ACTIVATIONS]),
        per_member=choose.random() < 0.5,
        own_target=choose.random() < 0.5,
        weighted=choose.choice(WEIGHTED),
        bias=choose.random() < 0.8,
    )
    upstream = torch.linspace(-1, 2, shape[0], device=device) if choose.random() < 0.5 else None
    assert_matches_the_reference(arguments, upstream)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_combination_of_arguments(device, activation, loss):
    dtypes = itertools.cycle([torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float16])
    for per_member, own_target, weighted, bias in itertools.product(
        (False, True), (False, True), WEIGHTED, (False, True)
    ):
        arguments = problem(
            3,
            21,
            [6, 9, 5],
            loss,
            next(dtypes),
            device,
            activation=activation,
            per_member=per_member,
            own_target=own_target,
            weighted=weighted,
            bias=bias,
        )
        assert_matches_the_reference(arguments)


@pytest.mark.parametrize("b", [1, 7, 8, 9, 63, 64, 65, 255, 256, 257, 520, 5000])
@pytest.mark.parametrize("e", [1, 2, 9])
def test_relu_at_every_edge_of_the_batch(device, e, b):
    for per_member in (False, True):
        arguments = problem(
            e, b, [4, 7, 3], "mse", torch.float32, device, activation="relu", per_member=per_member
        )
        assert_matches_the_reference(arguments, torch.linspace(1, 3, e, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_target_and_sample_weight_may_be_float32(device, loss, dtype):
    arguments = problem(2, 30, [5, 8, 3], loss, dtype, device, weighted="own")
    wide = {
        name: arguments[name].float() if arguments[name].is_floating_point() else arguments[name]
        for name in ("target", "sample_weight")
    }
    got, expected = (with_gradients(ensemble_mlp_loss, a) for a in (arguments | wide, arguments))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_outputs_enter_the_loss_unrounded(loss, dtype):
    # Random values, so that outputs and hidden activations do not fit the dtype.
    arguments = problem(2, 300, [20, 33, 4], loss, dtype)
    arguments["input"] = torch.randn(300, 20).to(dtype)
    got = ensemble_mlp_loss(**arguments)
    exact = reference.ensemble_mlp_loss(**cast(arguments, torch.float64))
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_outputs(device, loss, dtype):
    # Where exponentials overflow, if anything is exponentiated that should not be.
    z = torch.tensor([-1e4, -200.0, -30.0, -1.0, 0.0, 1.0, 19.9, 20.1, 30.0, 200.0, 1e4])
    arguments: Problem = {"weights": [torch.ones(1, 1, 1)], "biases": None, "loss": loss}
    if loss == "cross_entropy":
        arguments |= {"weights": [torch.tensor([[[1.0], [-1.0], [0.5]]])], "target": torch.arange(11) % 3}
        arguments["temperature"] = 0.5
    elif loss == "gaussian_nll":  # mean and raw variance from an input each
        arguments["weights"] = [torch.eye(2).unsqueeze(0)]
        arguments["target"] = torch.linspace(-2, 2, 11).unsqueeze(1)
    else:
        arguments["target"] = torch.linspace(0, 1, 11).unsqueeze(1)
    for i in range(11):
        x = (
            z[i].reshape(1, 1)
            if loss != "gaussian_nll"
            else torch.stack([torch.tensor(0.5), z[i]]).view(1, 2)
        )
        one = cast(arguments | {"input": x, "target": arguments["target"][i : i + 1]}, dtype, device)
        got = with_gradients(ensemble_mlp_loss, one)
        exact = with_gradients(reference.ensemble_mlp_loss, cast(one, torch.float64, device))
        for ours, theirs in zip(got, exact, strict=True):
            rtol = 64 * torch.finfo(dtype).eps
            torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=torch.finfo(dtype).eps)


def test_temperature_divides_the_logits(device):
    arguments = problem(2, 9, [4, 5, 3], "cross_entropy", device=device)
    for temperature in (0.2, 1.0, 10.0):
        hotter = arguments | {
            "temperature": 1.0,
            "weights": [arguments["weights"][0], arguments["weights"][1] / temperature],
            "biases": [arguments["biases"][0], arguments["biases"][1] / temperature],
        }
        got = ensemble_mlp_loss(**arguments | {"temperature": temperature})
        torch.testing.assert_close(got, ensemble_mlp_loss(**hotter), rtol=1e-13, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("b", [9, 300])
def test_strided_and_expanded_arguments(device, loss, b):
    def transposed(t: Tensor) -> Tensor:  # last dimension not contiguous
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t

    def padded(t: Tensor) -> Tensor:  # rows with gaps
        bad = torch.full_like(t, -7 if not t.is_floating_point() else float("nan"))
        return (
            torch.stack([t, bad], -1)[..., 0] if t.dim() == 1 else torch.cat([t, bad], -1)[..., : t.shape[-1]]
        )

    arguments = problem(
        4, b, [6, 9, 5], loss, torch.float32, device, per_member=True, own_target=True, weighted="own"
    )
    expected = with_gradients(ensemble_mlp_loss, arguments)
    for change in (transposed, padded):
        changed = {
            name: [change(v) for v in value] if isinstance(value, list) else change(value)
            for name, value in arguments.items()
            if isinstance(value, list | Tensor)
        }
        tensors = differentiable(arguments | changed)
        got = ensemble_mlp_loss(**arguments | changed)
        assert torch.equal(got, expected[0])
        for tensor in tensors:
            tensor.requires_grad_()
        got = torch.autograd.grad(ensemble_mlp_loss(**arguments | changed).sum(), tensors)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected[1:], strict=True))

    # One tensor for all members, expanded: the same numbers; the input's gradient is each member's own.
    shared = problem(4, b, [6, 9, 5], loss, torch.float32, device, weighted="shared")
    expanded = {
        name: shared[name].expand(4, *shared[name].shape) for name in ("input", "target", "sample_weight")
    }
    expected = with_gradients(ensemble_mlp_loss, shared)
    x = expanded["input"].detach().requires_grad_()
    assert x.stride(0) == 0
    got = ensemble_mlp_loss(**shared | expanded | {"input": x})
    assert torch.equal(got, expected[0])
    (by_input,) = torch.autograd.grad(got.sum(), x)
    assert by_input.shape == (4, b, 6) and not torch.equal(by_input[0], by_input[1])
    torch.testing.assert_close(by_input.sum(0), expected[1])
    for member in range(4):
        alone = {name: [v[member : member + 1] for v in shared[name]] for name in ("weights", "biases")}
        assert torch.equal(with_gradients(ensemble_mlp_loss, shared | alone)[1], by_input[member])


def test_expanded_weights_get_the_sum_of_the_members_gradients():
    arguments = problem(1, 40, [6, 9, 5], "mse", torch.float64)
    own = torch.randn(7, 40, 6, dtype=torch.float64)
    stack = {name: [v.expand(7, *v.shape[1:]) for v in arguments[name]] for name in ("weights", "biases")}
    arguments["weights"][0].requires_grad_()
    stack["weights"][0] = arguments["weights"][0].expand(7, -1, -1)
    ensemble_mlp_loss(**arguments | stack | {"input": own}).sum().backward()
    got, arguments["weights"][0].grad = arguments["weights"][0].grad, None
    for x in own:
        ensemble_mlp_loss(**arguments | {"input": x}).sum().backward()
    torch.testing.assert_close(got, arguments["weights"][0].grad)


# --- sample weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_of_zero_leaves_out_whatever_is_there(device, loss, own, bad):
    e, b = 3, 70
    arguments = problem(
        e, b, [5, 8, 3], loss, torch.float32, device, per_member=own, own_target=own,
        weighted="own" if own else "shared",
    )  # fmt: skip
    expected = with_gradients(ensemble_mlp_loss, arguments)
    left_out = arguments["sample_weight"] == 0
    assert left_out.any()
    poisoned = {"input": arguments["input"].clone(), "target": arguments["target"].clone()}
    poisoned["input"][left_out] = bad
    poisoned["target"][left_out] = -100 if loss == "cross_entropy" else bad
    got = with_gradients(ensemble_mlp_loss, arguments | poisoned)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))
    assert torch.equal(got[1][left_out], torch.zeros_like(got[1][left_out]))
    # The same when the gradient is composed, for a second derivative.
    poisoned_arguments = arguments | poisoned
    tensors = [t.requires_grad_() for t in differentiable(poisoned_arguments)]
    again = torch.autograd.grad(
        ensemble_mlp_loss(**poisoned_arguments).sum(), tensors, create_graph=True, materialize_grads=True
    )
    for ours, theirs in zip(again, expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("own", [False, True])
def test_a_left_out_example_might_as_well_not_be_there(device, loss, own):
    arguments = problem(3, 50, [5, 8, 3], loss, device=device, per_member=own)
    weight = torch.ones(50, dtype=torch.float64, device=device)
    weight[30:] = 0
    got = with_gradients(ensemble_mlp_loss, arguments, sample_weight=weight)
    rest = arguments | {
        "input": arguments["input"][..., :30, :],
        "target": arguments["target"][:30],
    }
    expected = with_gradients(ensemble_mlp_loss, rest)
    expected[1] = torch.nn.functional.pad(expected[1], (0, 0, 0, 20))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_that_sum_to_zero(device, loss):
    arguments = problem(3, 20, [5, 8, 3], loss, device=device, per_member=True)
    arguments["sample_weight"] = torch.ones(3, 20, dtype=torch.float64, device=device)
    expected = with_gradients(ensemble_mlp_loss, arguments)
    arguments["sample_weight"][1] = 0
    got = with_gradients(ensemble_mlp_loss, arguments)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours[[0, 2]], theirs[[0, 2]])
        assert torch.equal(ours[1], torch.zeros_like(ours[1]))
    tensors = [t.requires_grad_() for t in differentiable(arguments)]
    composed = torch.autograd.grad(ensemble_mlp_loss(**arguments).sum(), tensors, create_graph=True)
    torch.testing.assert_close(list(composed), got[1:])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(device, dtype, loss):
    for weighted in (None, "own"):
        arguments = problem(3, 4, [4, 5, 2], loss, dtype, device, weighted=weighted)
        empty = arguments | {"input": arguments["input"][:0], "target": arguments["target"][:0]}
        if weighted:
            empty["sample_weight"] = arguments["sample_weight"][:, :0]
        loss_value, *gradients = with_gradients(ensemble_mlp_loss, empty)
        assert torch.equal(loss_value, loss_value.new_zeros(3))
        for gradient, tensor in zip(gradients, differentiable(empty), strict=True):
            assert torch.equal(gradient, torch.zeros_like(tensor))


# --- the same bits -----------------------------------------------------------------------------------------


def on_threads(threads: int, call: Callable[[], list[Tensor]]) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize(
    ("e", "b"), [(1, 5000), (2, 700), (3, 300), (4, 1030), (5, 4100), (20, 90), (100, 10)]
)
def test_same_bits_for_any_number_of_threads(e, b, per_member, dtype):
    loss = LOSSES[e % 4]
    arguments = problem(
        e, b, [13, 20, 7], loss, dtype, activation="gelu", per_member=per_member, weighted="own"
    )
    upstream = torch.linspace(0.5, 2, e)

    def call() -> list[Tensor]:
        return with_gradients(ensemble_mlp_loss, arguments, upstream)

    one = on_threads(1, call)
    for threads in (2, 3, 7):
        many = on_threads(threads, call)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(many, one, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize("b", [1, 13, 300, 4200])
def test_same_bits_for_any_members_beside(b, per_member, dtype):
    loss = LOSSES[b % 4]
    arguments = problem(
        100,
        b,
        [5, 9, 2],
        loss,
        dtype,
        activation="silu",
        per_member=per_member,
        own_target=True,
        weighted="own",
    )
    whole = with_gradients(ensemble_mlp_loss, arguments)
    for chosen in ([3, 50, 99], [99], list(range(40, 60))):
        subset = {
            name: [v[chosen] for v in value] if isinstance(value, list) else value[chosen]
            for name, value in arguments.items()
            if isinstance(value, list | Tensor) and (per_member or name != "input")
        }
        part = with_gradients(ensemble_mlp_loss, arguments | subset)
        for i, (ours, theirs) in enumerate(zip(part, whole, strict=True)):
            if i != 1 or per_member:  # a shared input's gradient sums over the members
                assert torch.equal(ours, theirs[chosen])


@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize("b", [30, 300])
def test_backward_of_the_outputs_has_the_same_bits_for_any_threads_and_members(b, per_member):
    arguments = problem(9, b, [13, 20, 7], "mse", torch.float32, activation="gelu", per_member=per_member)
    upstream = torch.randn(9, b, 7)

    def gradients(chosen: list[int]) -> list[Tensor]:
        x, *parameters = [
            (t if t.dim() == 2 and i == 0 else t[chosen]).detach().requires_grad_()
            for i, t in enumerate(differentiable(arguments))
        ]
        output = ensemble_mlp(x, parameters[:2], parameters[2:], activation="gelu")
        return list(torch.autograd.grad(output, [x, *parameters], upstream[chosen]))

    everyone = list(range(9))
    whole = on_threads(1, lambda: gradients(everyone))
    for threads in (2, 3, 7):
        many = on_threads(threads, lambda: gradients(everyone))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(many, whole, strict=True))
    part = gradients([4, 8])
    for i, (ours, theirs) in enumerate(zip(part, whole, strict=True)):
        if i > 0 or per_member:
            assert torch.equal(ours, theirs[[4, 8]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("b", [20, 600])
def test_nan_in_one_member_touches_no_other(b, loss, per_member, bad):
    arguments = problem(5, b, [7, 9, 3], loss, torch.float32, activation="relu", per_member=per_member)
    clean = with_gradients(ensemble_mlp_loss, arguments)
    arguments["weights"][0][2] = bad
    got = with_gradients(ensemble_mlp_loss, arguments)
    others = [0, 1, 3, 4]
    for i, (ours, theirs) in enumerate(zip(got, clean, strict=True)):
        if i != 1 or per_member:
            assert torch.equal(ours[others], theirs[others])
    assert not got[0][2].isfinite()


# --- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "silu"])
@pytest.mark.parametrize("per_member", [False, True])
def test_first_and_second_derivatives(device, loss, activation, per_member):
    weighted = {"relu": None, "tanh": "own", "gelu": "shared", "silu": None}[activation]
    arguments = problem(
        2, 3, [2, 3, 2], loss, device=device, activation=activation, per_member=per_member, weighted=weighted
    )
    tensors = [t + 0.1 * torch.rand_like(t) for t in differentiable(arguments)]  # off the kinks
    seeds = torch.tensor([5, 6], device=device)

    def function(x: Tensor, *parameters: Tensor, **kwargs: Any) -> Tensor:
        given = {"input": x, "weights": parameters[:2], "biases": parameters[2:]}
        return ensemble_mlp_loss(**arguments | given | kwargs)

    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)
    if activation == "tanh":

        def dropped(*tensors: Tensor) -> Tensor:
            return function(*tensors, dropout=0.4, dropout_seeds=seeds)

        assert torch.autograd.gradcheck(dropped, tensors)
        assert torch.autograd.gradgradcheck(dropped, tensors)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("per_member", [False, True])
def test_a_penalty_on_the_gradient(device, loss, per_member):
    # create_graph through the loss, in float32, against the reference: the first gradient and the second.
    def penalty(function: Callable[..., Tensor], arguments: Problem) -> list[Tensor]:
        arguments = cast(arguments, arguments["input"].dtype, device)
        tensors = [t.requires_grad_() for t in differentiable(arguments)]
        first = torch.autograd.grad(function(**arguments).square().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
        return [t.detach() for t in first] + list(second)

    arguments = problem(3, 33, [5, 8, 3], loss, torch.float32, device, per_member=per_member, weighted="own")
    arguments |= {"dropout": 0.5, "dropout_seeds": torch.tensor([1, 2, 3], device=device)}
    got = penalty(ensemble_mlp_loss, arguments)
    exact = penalty(reference.ensemble_mlp_loss, cast(arguments, torch.float64, device))
    for ours, theirs in zip(got, exact, strict=True):
        assert rms(ours - theirs) <= 2e-6 * rms(theirs)


@pytest.mark.parametrize("per_member", [False, True])
def test_only_wanted_gradients_are_computed(per_member):
    arguments = problem(2, 30, [5, 8, 3], "mse", torch.float32, per_member=per_member)
    tensors = differentiable(arguments)
    whole = with_gradients(ensemble_mlp_loss, arguments)[1:]
    given = (
        arguments["input"],
        arguments["target"],
        arguments["weights"],
        arguments["biases"],
        "mse",
        "tanh",
    )
    rest = (1.0, None, 0.0, None, None)
    for wanted in itertools.product((False, True), repeat=5):
        _, found = torch.ops.pyens.ensemble_mlp_loss_with_gradients(*given, *rest, list(wanted))
        assert len(found) == sum(wanted)
        expected = [gradient for gradient, asked in zip(whole, wanted, strict=True) if asked]
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)
        for tensor, asked in zip(tensors, wanted, strict=True):
            tensor.grad = None
            tensor.requires_grad_(asked)
        loss = ensemble_mlp_loss(**arguments)
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.sum().backward()
        for tensor, gradient, asked in zip(tensors, whole, wanted, strict=True):
            assert torch.equal(tensor.grad, gradient) if asked else tensor.grad is None


def test_no_activations_are_kept_for_backward():
    arguments = problem(3, 500, [5, 80, 40, 2], "mse", torch.float32)
    tensors = [t.requires_grad_() for t in differentiable(arguments)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ensemble_mlp_loss(**arguments)
    # The arguments, and a gradient for each of the parameters.
    expected = [*tensors, arguments["target"], *tensors[1:]]
    assert sorted(t.shape for t in kept) == sorted(t.shape for t in expected)


def test_backward_twice_and_with_other_gradients_from_above(device):
    for per_member in (False, True):
        arguments = problem(3, 30, [5, 8, 3], "mse", device=device, per_member=per_member)
        _, *ones = with_gradients(ensemble_mlp_loss, arguments)
        tensors = [t.requires_grad_() for t in differentiable(arguments)]
        loss = ensemble_mlp_loss(**arguments)
        for factors in ([1, 1, 1], [2, 0, -1], [0.5, 3, 1]):
            upstream = torch.tensor(factors, dtype=torch.float64, device=device)
            got = torch.autograd.grad(loss, tensors, upstream, retain_graph=True)
            for i, (ours, theirs) in enumerate(zip(got, ones, strict=True)):
                if i > 0 or per_member:
                    factor = upstream.view(-1, *[1] * (theirs.dim() - 1))
                    torch.testing.assert_close(ours, theirs * factor)
            exact = with_gradients(reference.ensemble_mlp_loss, arguments, upstream)[1:]
            torch.testing.assert_close(list(got), exact)


def test_changing_a_gradient_in_place_does_not_corrupt_the_next(device):
    arguments = problem(3, 30, [5, 8, 3], "mse", torch.float32, device)
    expected = with_gradients(ensemble_mlp_loss, arguments)[1:]
    tensors = [t.requires_grad_() for t in differentiable(arguments)]
    loss = ensemble_mlp_loss(**arguments).sum()
    for _ in range(3):
        loss.backward(retain_graph=True)
        for tensor, gradient in zip(tensors, expected, strict=True):
            assert torch.equal(tensor.grad, gradient)
            tensor.grad.mul_(float("nan"))
            tensor.grad = None


def test_gradients_accumulate(device):
    arguments = problem(3, 30, [5, 8, 3], "mse", torch.float32, device)
    expected = with_gradients(ensemble_mlp_loss, arguments)[1:]
    tensors = [t.requires_grad_() for t in differentiable(arguments)]
    loss = ensemble_mlp_loss(**arguments).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    for tensor, gradient in zip(tensors, expected, strict=True):
        assert torch.equal(tensor.grad, 2 * gradient)


def test_weights_changed_before_backward_raise():
    arguments = problem(3, 30, [5, 8, 3], "mse", torch.float32)
    for tensor in differentiable(arguments):
        tensor.requires_grad_()
    loss = ensemble_mlp_loss(**arguments).sum()
    with torch.no_grad():
        arguments["weights"][0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["target", "sample_weight"])
def test_target_and_sample_weight_get_no_gradient(device, name):
    arguments = problem(2, 6, [3, 4, 2], "mse", torch.float32, device, weighted="shared")
    arguments[name].requires_grad_()
    for tracked in (False, True):
        arguments["weights"][0].requires_grad_(tracked)
        with pytest.raises(
            ValueError, match=rf"^ensemble_mlp_loss: {name}: expected requires_grad=False .*, got True"
        ):
            ensemble_mlp_loss(**arguments)


def test_trains(device):
    torch.manual_seed(1)
    x = torch.rand(400, 2, device=device) * 2 - 1
    y = (x[:, :1] * x[:, 1:]).contiguous()
    weights = [torch.randn(5, o, i, device=device) / i**0.5 for i, o in ((2, 16), (16, 1))]
    biases = [torch.zeros(5, o, device=device) for o in (16, 1)]
    parameters = [t.requires_grad_() for t in weights + biases]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    losses = []
    for _ in range(200):
        loss = ensemble_mlp_loss(x, y, weights, biases, loss="mse", activation="tanh")
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        losses.append(loss.detach())
    assert (losses[-1] < 0.05 * losses[0]).all()


# --- the dispatcher ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_opcheck(device, loss):
    per_member = loss in ("bce", "cross_entropy")
    a = problem(3, 5, [4, 6, 2], loss, torch.float32, device, per_member=per_member, weighted="own")
    seeds = torch.arange(3, device=device)
    for tracked in (False, True):
        for tensor in differentiable(a)[:3]:
            tensor.requires_grad_(tracked)
        given = (a["input"], a["target"], a["weights"], a["biases"], loss, "tanh", 1.0)
        torch.library.opcheck(torch.ops.pyens.ensemble_mlp_loss, (*given, a["sample_weight"], 0.25, seeds))
        torch.library.opcheck(torch.ops.pyens.ensemble_mlp_loss, (*given, None, 0.0, None))


@pytest.mark.parametrize("per_member", [False, True])
def test_opcheck_with_gradients(per_member):
    a = problem(3, 5, [4, 6, 2], "mse", torch.bfloat16, per_member=per_member, weighted="own")
    seeds, scale = torch.arange(3), torch.rand(3)
    given = (a["input"], a["target"], a["weights"], a["biases"], "mse", "gelu", 1.0)
    for wanted in ([True] * 5, [False, True, False, False, True]):
        op = torch.ops.pyens.ensemble_mlp_loss_with_gradients
        torch.library.opcheck(op, (*given, a["sample_weight"], 0.25, seeds, scale, wanted))
        torch.library.opcheck(op, (*given, None, 0.0, None, None, wanted))


@pytest.mark.parametrize("per_member", [False, True])
def test_opcheck_backward(device, per_member):
    a = problem(3, 5, [4, 6, 2], "mse", torch.float32, device, per_member=per_member)
    seeds = torch.arange(3, device=device)
    for grad in (torch.randn(3, 5, 2, device=device), torch.ones((), device=device).expand(3, 5, 2)):
        given = (grad, a["input"], a["weights"], a["biases"], "relu")
        for wanted in ([True] * 5, [False, True, False, False, True]):
            op = torch.ops.pyens.ensemble_mlp_backward
            torch.library.opcheck(op, (*given, 0.25, seeds, wanted))
            torch.library.opcheck(op, (*given, 0.0, None, wanted))


@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_compile_without_graph_breaks_or_many_recompilations(device, loss, per_member):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    seeds = torch.arange(3, device=device)

    def step(x: Tensor, y: Tensor, w: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        return ensemble_mlp_loss(
            x, y, weights, biases, loss=loss, activation="tanh", sample_weight=w, dropout=0.25,
            dropout_seeds=seeds,
        ).square()  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    first = problem(3, 5, [4, 6, 2], loss, torch.float32, device)
    parameters = [t.requires_grad_() for t in differentiable(first)[1:]]
    for b in (5, 7, 12, 16, 33, 64, 100):
        a = problem(3, b, [4, 6, 2], loss, torch.float32, device, per_member=per_member, weighted="shared")
        x = a["input"].requires_grad_()
        given = (x, a["target"], a["sample_weight"], parameters[:2], parameters[2:])
        got, expected = compiled(*given), step(*given)
        assert torch.equal(got, expected)
        for ours, theirs in zip(
            torch.autograd.grad(got.sum(), [x, *parameters]),
            torch.autograd.grad(expected.sum(), [x, *parameters]),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count <= 2  # one for the first size, one for all others


def test_compiled_by_inductor(device):
    torch._dynamo.reset()
    a = problem(3, 20, [4, 6, 2], "mse", torch.float32, device)
    tensors = [t.requires_grad_() for t in differentiable(a)]

    def step(x: Tensor, y: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        return ensemble_mlp_loss(x * 2, y, weights, biases, loss="mse").sum()

    given = (tensors[0], a["target"], tensors[1:3], tensors[3:])
    expected = torch.autograd.grad(step(*given), tensors)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(*given), tensors)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast(device, dtype, loss):
    a = problem(2, 20, [5, 6, 3], loss, torch.float32, device, weighted="own")
    # Off the grid, where nothing fits half precision.
    a["input"] = torch.randn(20, 5, device=device)
    tensors = [t.requires_grad_() for t in differentiable(a)]
    with torch.autocast(device.type, dtype):
        got = ensemble_mlp_loss(**a)
    half = {
        "input": a["input"].to(dtype),
        "weights": [w.to(dtype) for w in a["weights"]],
        "biases": [v.to(dtype) for v in a["biases"]],
    }
    expected = ensemble_mlp_loss(**a | half)
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    gradients = torch.autograd.grad(got.sum(), tensors)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), tensors), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


# --- torch.func --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_func_grad(device, loss):
    a = problem(2, 6, [3, 4, 2], loss, device=device, weighted="own")

    def total(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b: function(**a | {"input": x, "weights": w, "biases": b}).square().sum()

    given = (a["input"], a["weights"], a["biases"])
    got = torch.func.grad(total(ensemble_mlp_loss), argnums=(0, 1, 2))(*given)
    expected = torch.func.grad(total(reference.ensemble_mlp_loss), argnums=(0, 1, 2))(*given)
    torch.testing.assert_close(got, expected)
    tensors = [t.requires_grad_() for t in differentiable(a)]
    eager = torch.autograd.grad(ensemble_mlp_loss(**a).square().sum(), tensors)
    torch.testing.assert_close([got[0], *got[1], *got[2]], list(eager))


@pytest.mark.parametrize("loss", LOSSES)
def test_func_per_example_gradients(device, loss):
    a = problem(2, 6, [3, 4, 2], loss, device=device)

    def total(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def one(w: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
            given = {"input": x.unsqueeze(0), "target": y.unsqueeze(0), "weights": w}
            return function(**a | given).sum()

        return one

    per_example = torch.func.vmap(torch.func.grad(total(ensemble_mlp_loss)), in_dims=(None, 0, 0))
    got = per_example(a["weights"], a["input"], a["target"])
    weights = [w.requires_grad_() for w in a["weights"]]
    for i in range(6):
        one = total(ensemble_mlp_loss)(weights, a["input"][i], a["target"][i])
        torch.testing.assert_close([g[i] for g in got], list(torch.autograd.grad(one, weights)))


@pytest.mark.parametrize("loss", LOSSES)
def test_func_vmap_over_models(device, loss):
    problems = [problem(2, 6, [3, 4, 2], loss, device=device) for _ in range(4)]
    stacked = [torch.stack([p["weights"][layer] for p in problems]) for layer in range(2)]
    a = problems[0]
    got = torch.func.vmap(lambda w: ensemble_mlp_loss(**a | {"weights": w}))(stacked)
    for i, other in enumerate(problems):
        torch.testing.assert_close(got[i], ensemble_mlp_loss(**a | {"weights": other["weights"]}))


# --- bad input ---------------------------------------------------------------------------------------------

E, B = 3, 6
X, W, V = (
    torch.randn(B, 5),
    [torch.randn(E, 4, 5), torch.randn(E, 2, 4)],
    [torch.zeros(E, 4), torch.zeros(E, 2)],
)
Y, LABELS = torch.randn(B, 2), torch.randint(2, (B,))
GOOD = {"input": X, "target": Y, "weights": W, "biases": V, "loss": "mse"}
CLASSES = {"target": LABELS, "loss": "cross_entropy"}
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "loss": ({"loss": "l1"}, ValueError, r'loss: expected one of mse, .*cross_entropy, got "l1"'),
    "activation": ({"activation": "swish"}, ValueError, r'activation: expected one of relu, .*got "swish"'),
    "no layers": ({"weights": [], "biases": []}, ValueError, r"weights: expected at least one layer"),
    "number of biases": ({"biases": V[:1]}, ValueError, r"biases: expected one for each of the 2 layers"),
    "chain of weights": ({"weights": [W[0], W[0]]}, ValueError, r"weights\[1\]: expected in = out of"),
    "shape of biases": ({"biases": [V[0], V[0]]}, ValueError, r"biases\[1\]: expected \[3, 2\], got shape"),
    "features of input": ({"input": X[:, 1:]}, ValueError, r"input: expected \[B, 5\] or \[3, B, 5\], got"),
    "members of input": ({"input": X.expand(2, B, 5)}, ValueError, r"input: expected .*\[2, 6, 5\]"),
    "dtype of input": ({"input": X.double()}, TypeError, r"input: expected the dtype of weights\[0\]"),
    "rank of target": ({"target": Y[:, 0]}, ValueError, r"target: expected shape \[6, 2\] or \[3, 6, 2\]"),
    "a column for K": ({"target": Y[:, :1]}, ValueError, r"target: expected .*, got shape \[6, 1\]"),
    "batch of target": ({"target": Y[:1]}, ValueError, r"target: expected .*, got shape \[1, 2\]"),
    "members of target": ({"target": Y.expand(1, B, 2)}, ValueError, r"target: .*got shape \[1, 6, 2\]"),
    "dtype of target": ({"target": Y.double()}, TypeError, r"target: expected the dtype of .* got Double"),
    "integer target": ({"target": Y.long()}, TypeError, r"target: expected the dtype .* got Long"),
    "device of target": ({"target": Y.to("meta")}, TypeError, r"target: expected the device .*got meta"),
    "K of gaussian_nll": ({"loss": "gaussian_nll"}, ValueError, r"target: expected .*\[6, 1\] or .*\[6, 2\]"),
    "odd outputs": (
        {"loss": "gaussian_nll", "weights": [torch.randn(E, 3, 5)], "biases": None},
        ValueError,
        r"weights\[0\]: expected an even number of outputs .*, got 3",
    ),
    "float classes": (CLASSES | {"target": LABELS.float()}, TypeError, r"target: expected int64 .*got Float"),
    "int32 classes": (CLASSES | {"target": LABELS.int()}, TypeError, r"target: expected int64 .*got Int"),
    "one-hot classes": (CLASSES | {"target": LABELS.expand(2, B)}, ValueError, r"target: expected shape"),
    "class too large": (CLASSES | {"target": LABELS + 1}, ValueError, r"target: expected .* 0 to 1, got"),
    "class too small": (CLASSES | {"target": LABELS - 1}, ValueError, r"target: expected .* 0 to 1, got"),
    "huge class": (CLASSES | {"target": LABELS + 2**40}, ValueError, r"target: expected .* 0 to 1, got"),
    "temperature of mse": ({"temperature": 2.0}, ValueError, r"temperature: expected 1 .*loss mse, got 2"),
    "temperature 0": (CLASSES | {"temperature": 0.0}, ValueError, r"temperature: expected .* got 0"),
    "temperature -1": (CLASSES | {"temperature": -1.0}, ValueError, r"temperature: expected .* got -1"),
    "temperature inf": (CLASSES | {"temperature": float("inf")}, ValueError, r"temperature: .* got inf"),
    "temperature nan": (CLASSES | {"temperature": float("nan")}, ValueError, r"temperature: .* got nan"),
    "shape of sample_weight": (
        {"sample_weight": torch.ones(B, 1)},
        ValueError,
        r"sample_weight: expected shape \[6\] or \[3, 6\], got shape \[6, 1\]",
    ),
    "dtype of sample_weight": (
        {"sample_weight": torch.ones(B, dtype=torch.bool)},
        TypeError,
        r"sample_weight: expected the dtype of weights\[0\] \(Float\), got Bool",
    ),
    "device of sample_weight": (
        {"sample_weight": torch.ones(B, device="meta")},
        TypeError,
        r"sample_weight: expected the device of .*got meta",
    ),
} | {
    f"sample_weight {bad}": (
        {"sample_weight": torch.tensor([1, bad, 1, 0, 1, 1])},
        ValueError,
        r"sample_weight: expected finite weights of at least 0, got one that is not",
    )
    for bad in (-1.0, -1e-30, float("nan"), float("inf"))
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    arguments = GOOD | changes
    ensemble_mlp_loss(**GOOD)
    ensemble_mlp_loss(**GOOD | CLASSES)
    for tracked in (False, True):
        given = arguments | {"weights": [w.clone().requires_grad_(tracked) for w in arguments["weights"]]}
        with pytest.raises(error, match=r"^ensemble_mlp_loss: " + message):
            ensemble_mlp_loss(**given)


def test_a_bad_value_of_any_member_is_found():
    for member, example in ((0, 0), (1, 3), (2, 5)):
        labels = LABELS.repeat(E, 1)
        labels[member, example] = 2
        with pytest.raises(ValueError, match="target: expected classes"):
            ensemble_mlp_loss(**GOOD | CLASSES | {"target": labels})
        weight = torch.ones(E, B)
        weight[member, example] = -1
        with pytest.raises(ValueError, match="sample_weight: expected finite"):
            ensemble_mlp_loss(**GOOD | {"sample_weight": weight})
        # Left out by one member only.
        shared, weight = LABELS.clone(), torch.ones(E, B)
        shared[example] = -100
        weight[:, example] = 0
        ensemble_mlp_loss(**GOOD | CLASSES | {"target": shared, "sample_weight": weight})
        weight[member, example] = 1
        with pytest.raises(ValueError, match="target: expected classes"):
            ensemble_mlp_loss(**GOOD | CLASSES | {"target": shared, "sample_weight": weight})


def test_bad_input_on_fake_tensors():
    fake = cast(GOOD, torch.float32, torch.device("meta"))
    assert ensemble_mlp_loss(**fake).shape == (E,)
    with pytest.raises(ValueError, match="ensemble_mlp_loss: target: expected shape"):
        ensemble_mlp_loss(**fake | {"target": fake["target"][:, :1]})


# --- CUDA --------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_on_cuda_wrong_values_make_their_member_nan():
    cuda = torch.device("cuda")
    arguments = problem(E, B, [4, 5, 3], "cross_entropy", device=cuda, own_target=True, weighted="own")
    right = with_gradients(ensemble_mlp_loss, arguments)
    for name, value in (("target", -1), ("target", 3), ("sample_weight", -1)):
        wrong = arguments | {key: arguments[key].clone() for key in ("target", "sample_weight")}
        wrong["sample_weight"][1, 2] = 1
        wrong[name][1, 2] = value
        got = with_gradients(ensemble_mlp_loss, wrong)
        others = [m for m in range(E) if m != 1]
        # The input's gradient is the sum over the members.
        for ours, expected in zip((got[0], *got[2:]), (right[0], *right[2:]), strict=True):
            assert ours[1].isnan().all() and torch.equal(ours[others], expected[others])


@pytest.mark.cuda
def test_on_cuda_what_is_too_wide_for_one_launch_is_composed():
    assert_matches_the_reference(problem(2, 9, [4, 600, 900, 3], "mse", torch.float64, torch.device("cuda")))


@pytest.mark.cuda
def test_on_cuda_more_than_32_layers_are_refused():
    with pytest.raises(NotImplementedError, match="more than 32 layers"):
        ensemble_mlp_loss(**problem(2, 9, [4, *[9] * 32, 2], "mse", device=torch.device("cuda")))


@pytest.mark.cuda
def test_on_cuda_the_same_bits_in_every_run_and_with_any_members_beside():
    cuda = torch.device("cuda")
    arguments = problem(5, 700, [32, 50, 20, 10, 1], "mse", torch.float32, cuda, per_member=True)
    whole = with_gradients(ensemble_mlp_loss, arguments)
    for a, b in zip(whole, with_gradients(ensemble_mlp_loss, arguments), strict=True):
        assert torch.equal(a, b)
    part = {
        name: [t[1:3] for t in value] if isinstance(value, list) else value
        for name, value in arguments.items()
    }
    part["input"] = arguments["input"][1:3]
    for a, b in zip(with_gradients(ensemble_mlp_loss, part), whole, strict=True):
        assert torch.equal(a, b[1:3])


# --- what the internal operations and other ways in refuse -------------------------------------------------


def small() -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    return torch.randn(5, 4), torch.randn(5, 2), [torch.randn(3, 2, 4)], [torch.randn(3, 2)]


def test_backward_operations_check_what_they_read():
    x, y, weights, biases = small()
    wanted = [True, True, True]
    backward = torch.ops.pyens.ensemble_mlp_backward
    for grad, error in ((torch.randn(3, 4, 2), ValueError), (torch.randn(3, 5, 2).double(), TypeError)):
        with pytest.raises(error, match=r"^ensemble_mlp: grad: expected"):
            backward(grad, x, weights, biases, "relu", 0.0, None, wanted)
    with_gradients = torch.ops.pyens.ensemble_mlp_loss_with_gradients
    with pytest.raises(ValueError, match=r"^ensemble_mlp_loss: member_scale: expected"):
        with_gradients(
            x, y, weights, biases, "mse", "relu", 1.0, None, 0.0, None, torch.ones(2), [False, True, True]
        )


def test_forward_mode_raises():
    x, y, weights, biases = small()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises((RuntimeError, NotImplementedError)):
            ensemble_mlp_loss(dual, y, weights, biases, loss="mse")


def test_within_torch_func_nothing_is_guessed():
    x, y, weights, biases = small()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return ensemble_mlp_loss(x, y, weights, biases, loss="mse").sum()

    with pytest.raises(ValueError, match=r"^ensemble_mlp_loss: target: expected shape"):
        torch.func.grad(loss)(x, y[:, :1])
    with pytest.raises(ValueError, match=r"^ensemble_mlp_loss: target: expected requires_grad=False"):
        torch.func.grad(loss, argnums=1)(x, y)
