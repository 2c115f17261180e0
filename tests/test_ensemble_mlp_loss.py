"""pyens.ops.ensemble_mlp_loss against its reference in float64: values, weights, and the same bits."""

import copy
import itertools
import random
from collections.abc import Callable

import pytest
import torch
from loss_problems import (
    ACTIVATIONS,
    CLASSES,
    DTYPES,
    LOSSES,
    SHAPES,
    SMOOTHED,
    WEIGHTED,
    Problem,
    assert_matches_the_reference,
    cast,
    differentiable,
    multiplies_pairs,
    problem,
    rms,
    with_gradients,
)
from torch import Tensor

from pyens import reference
from pyens.ops import ensemble_mlp, ensemble_mlp_loss

# --- values and gradients ----------------------------------------------------------------------------------


# On the grid of the problems only ReLU's kinks are met exactly in every layer.
SMOOTH = [a for a in ACTIVATIONS if a not in ("leaky_relu", "hardswish")]
# Losses and activations are two parts of the kernel that do not know each other: all losses with two of the
# activations, all activations with two of the losses.
PAIRS = [
    (activation, loss, smoothing)
    for activation in ACTIVATIONS
    for loss, smoothing in SMOOTHED
    if activation in ("relu", "gelu") or loss in ("mse", "gaussian_nll")
]


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
        activation=choose.choice(["relu", *SMOOTH]),
        per_member=choose.random() < 0.5,
        own_target=choose.random() < 0.5,
        weighted=choose.choice(WEIGHTED),
        bias=choose.random() < 0.8,
        smoothing=choose.choice([0.0, 0.1, 1.0]),
    )
    upstream = torch.linspace(-1, 2, shape[0], device=device) if choose.random() < 0.5 else None
    assert_matches_the_reference(arguments, upstream)


@pytest.mark.parametrize(("activation", "loss"), [pair[:2] for pair in PAIRS if pair[2] == 0.0], ids=str)
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
            smoothing=0.1 if per_member else 0.0,
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
    exact = cast(arguments, torch.float64)
    if multiplies_pairs(dtype):  # the hidden activations are rounded, the outputs are not
        (first, last), (bias, *biases) = exact["weights"], exact["biases"]
        hidden = reference.ensemble_mlp(exact["input"], [first], [bias], output_activation="tanh")
        exact |= {"input": hidden.to(dtype).double(), "weights": [last], "biases": biases}
    expected = reference.ensemble_mlp_loss(**exact)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("widths", [[64, 64, 64, 64], [65, 97, 130, 3], [100, 129, 128, 1]], ids=str)
def test_bfloat16_products_of_wide_layers(loss, widths):
    # Off the grid, where every operand of every product is rounded.
    arguments = problem(2, 150, widths, loss, torch.bfloat16, activation="gelu", weighted="shared")
    for name in ("weights", "biases"):
        arguments[name] = [(t + torch.randn_like(t) / 16).bfloat16() for t in arguments[name]]
    arguments["input"] = torch.randn(2, 150, widths[0]).bfloat16()
    assert_matches_the_reference(arguments, torch.tensor([1.0, -0.75]))


def test_bfloat16_gradients_are_sums_of_products_in_float32():
    # One layer: its gradients by given ones of the outputs, which are bfloat16 already, are rounded once.
    x, w = (torch.randn(s).bfloat16().requires_grad_() for s in ((3, 1000, 65), (3, 33, 65)))
    above = torch.randn(3, 1000, 33).bfloat16()
    got = torch.autograd.grad(ensemble_mlp(x, [w]), [x, w], above)
    exact = above.double() @ w.double(), above.double().mT @ x.double()
    for ours, expected in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=2**-8, atol=1e-4)
        assert rms(ours - expected) < 2**-9 * rms(expected)


@pytest.mark.parametrize(
    "loss", ["mse", "bce", "gaussian_nll", "cross_entropy", "huber", "smooth_l1", "soft_cross_entropy"]
)
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


@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
@pytest.mark.parametrize("b", [9, 300])
def test_strided_and_expanded_arguments(device, loss, smoothing, b):
    def transposed(t: Tensor) -> Tensor:  # last dimension not contiguous
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t

    def padded(t: Tensor) -> Tensor:  # rows with gaps
        bad = torch.full_like(t, -7 if not t.is_floating_point() else float("nan"))
        return (
            torch.stack([t, bad], -1)[..., 0] if t.dim() == 1 else torch.cat([t, bad], -1)[..., : t.shape[-1]]
        )

    arguments = problem(
        4,
        b,
        [6, 9, 5],
        loss,
        torch.float32,
        device,
        per_member=True,
        own_target=True,
        weighted="own",
        smoothing=smoothing,
    )
    expected = with_gradients(ensemble_mlp_loss, arguments)
    for change in (transposed, padded):
        changed = {
            name: [change(v) for v in value] if isinstance(value, list) else change(value)
            for name, value in arguments.items()
            if isinstance(value, list | Tensor) and name != "quantiles"
        }
        tensors = differentiable(arguments | changed)
        got = ensemble_mlp_loss(**arguments | changed)
        assert torch.equal(got, expected[0])
        for tensor in tensors:
            tensor.requires_grad_()
        got = torch.autograd.grad(ensemble_mlp_loss(**arguments | changed).sum(), tensors)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected[1:], strict=True))

    # One tensor for all members, expanded: the same numbers; the input's gradient is each member's own.
    shared = problem(4, b, [6, 9, 5], loss, torch.float32, device, weighted="shared", smoothing=smoothing)
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
    poisoned["target"][left_out] = -100 if loss in CLASSES else bad
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


def of_all_three(arguments: Problem) -> dict[str, list[Tensor]]:
    """Loss and gradients by the kernel, composed of torch's operations, and by the reference."""
    composed = cast(arguments, arguments["input"].dtype, arguments["input"].device)
    tensors = [t.requires_grad_() for t in differentiable(composed)]
    loss = ensemble_mlp_loss(**composed)
    again = torch.autograd.grad(loss.sum(), tensors, create_graph=True, materialize_grads=True)
    return {
        "kernel": with_gradients(ensemble_mlp_loss, arguments),
        "composed": [loss.detach(), *(t.detach() for t in again)],
        "reference": with_gradients(reference.ensemble_mlp_loss, arguments),
    }


@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_of_zero_excuses_the_same_everywhere(device, loss, smoothing, own, bad, dtype):
    arguments = problem(
        3,
        21,
        [5, 8, 3],
        loss,
        dtype,
        device,
        per_member=own,
        own_target=own,
        weighted="own" if own else "shared",
        smoothing=smoothing,
    )
    clean = of_all_three(arguments)
    left_out = arguments["sample_weight"] == 0
    arguments["input"][left_out] = bad
    arguments["target"][left_out] = -100 if loss in CLASSES else bad
    for way, got in of_all_three(arguments).items():
        for ours, theirs in zip(got, clean[way], strict=True):
            assert torch.equal(ours, theirs), way
        assert got[0].isfinite().all() and not got[1][left_out].any()
    # Nor does it meet an infinite parameter: its zeros there would make NaN of the loss and of its gradient.
    arguments["weights"][-1][0] = float("inf")
    got = of_all_three(arguments)
    for way in got:
        torch.testing.assert_close(got[way][0], got["reference"][0], equal_nan=True, rtol=0.01, atol=0.01)
        by_input = got[way][1]
        assert not (by_input if own else by_input[left_out])[left_out if own else ...].any(), way


# The largest is 4 times 2^exponent or less, the smallest 1/4 of it: subnormal, or their sum overflows.
EXPONENTS = {
    torch.float32: (-140, 125),
    torch.float64: (-1066, 1021),
    torch.bfloat16: (-129, 125),
    torch.float16: (-21, 13),
}


@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_at_the_ends_of_their_range(device, loss, smoothing, own, dtype):
    arguments = problem(
        3,
        21,
        [5, 8, 3],
        loss,
        dtype,
        device,
        per_member=own,
        weighted="own" if own else "shared",
        smoothing=smoothing,
    )
    weight = arguments["sample_weight"].double()
    weight[..., 1] = 0.25
    exact = with_gradients(
        reference.ensemble_mlp_loss,
        cast(arguments, torch.float64, device) | {"sample_weight": weight},
    )
    rtol = {torch.float32: 1e-4, torch.float64: 1e-11}.get(dtype, 0.05)
    for exponent in EXPONENTS[dtype]:
        # In two steps, neither of which overflows.
        half = exponent // 2
        scaled = (weight * 2.0**half * 2.0 ** (exponent - half)).to(dtype)
        assert torch.equal(scaled.double() * 2.0**-half * 2.0 ** (half - exponent), weight)
        for way, got in of_all_three(arguments | {"sample_weight": scaled}).items():
            for ours, theirs in zip(got, exact, strict=True):
                error = (ours.double() - theirs).abs().max()
                assert error <= rtol * theirs.abs().max(), (way, exponent)


@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_weight_so_large_that_the_others_do_not_count(device, loss, smoothing, own, dtype):
    arguments = problem(3, 21, [5, 8, 3], loss, dtype, device, per_member=own, smoothing=smoothing)
    weight = torch.full((3, 21) if own else (21,), torch.finfo(dtype).tiny / 8, dtype=dtype, device=device)
    weight[..., 4] = torch.finfo(dtype).max
    weight[..., 5:7] = 0
    if own:
        weight[1] = 0  # a member that has nothing
    one_hot = torch.zeros_like(weight)
    one_hot[..., 4] = 1
    one_hot *= weight != 0
    exact = with_gradients(
        reference.ensemble_mlp_loss, cast(arguments | {"sample_weight": one_hot}, torch.float64, device)
    )
    for way, got in of_all_three(arguments | {"sample_weight": weight}).items():
        for ours, theirs in zip(got, exact, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6, msg=way)
    # They are there: what is wrong in one of them is not excused.
    arguments["input"][..., 2, :] = float("nan")
    members = [0, 2] if own else [0, 1, 2]
    for way, got in of_all_three(arguments | {"sample_weight": weight}).items():
        assert got[0][members].isnan().all(), way


# --- NaN and Inf -------------------------------------------------------------------------------------------


def kind_of(x: Tensor) -> Tensor:
    """0 where finite, 1 and -1 where infinite, 2 where NaN."""
    return torch.where(x.isnan(), 2, x.isinf() * x.sign()).nan_to_num(2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "softplus"])
@pytest.mark.parametrize("b", [1, 7, 19, 130])
def test_lanes_without_an_example_meet_no_infinite_weight(device, b, activation, dtype):
    # Inputs are positive: a weight of -inf shuts the unit, but times the 0 of an empty lane it is NaN.
    arguments = problem(2, b, [3, 4, 2], "mse", dtype, device, activation=activation)
    arguments["input"] = arguments["input"].abs() + 0.25
    arguments["weights"][0][1, 2, 1] = -float("inf")
    got = with_gradients(ensemble_mlp_loss, arguments)
    exact = with_gradients(reference.ensemble_mlp_loss, cast(arguments, torch.float64, device))
    assert exact[0].isfinite().all() and exact[2].isfinite().all() and exact[3].isfinite().all()
    for ours, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0.05, atol=0.05, equal_nan=True)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dropped_unit_meets_no_infinite_gradient(device, activation, dtype):
    arguments = problem(2, 19, [3, 8, 2], "mse", dtype, device, activation=activation, per_member=True)
    arguments |= {"dropout": 0.5, "dropout_seeds": torch.tensor([3, 8], device=device)}
    arguments["target"][4] = float("inf")
    got = with_gradients(ensemble_mlp_loss, arguments)
    exact = with_gradients(reference.ensemble_mlp_loss, cast(arguments, torch.float64, device))
    assert exact[2].isfinite().any() and not exact[2].isfinite().all()
    for ours, theirs in zip(got, exact, strict=True):
        assert torch.equal(kind_of(ours), kind_of(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bce_of_infinite_logits_as_in_torch(device, dtype):
    large = torch.finfo(dtype).max
    for z in (float("inf"), -float("inf"), large, -large, large / 2):
        for y in (0.0, 0.5, 1.0, 2.0):
            logit, target = torch.tensor([[z]], dtype=dtype), torch.tensor([[y]], dtype=dtype)
            one = torch.ones(1, 1, 1, dtype=dtype, device=device)
            got = ensemble_mlp_loss(logit.to(device), target.to(device), [one], loss="bce")
            exact = torch.nn.functional.binary_cross_entropy_with_logits(logit, target)
            torch.testing.assert_close(got[0].cpu(), exact, equal_nan=True)


@pytest.mark.parametrize(
    ("activation", "loss", "smoothing", "dtype"),
    [
        *((*pair, torch.float32) for pair in PAIRS),
        *((*pair, dtype) for pair in PAIRS if pair[0] in ("relu", "gelu") for dtype in DTYPES[1:]),
    ],
    ids=str,
)
def test_nan_and_inf_as_in_torch(device, activation, loss, smoothing, dtype):
    # 19 examples fill no vector.
    clean = problem(
        2, 19, [5, 6, 3], loss, dtype, device, activation=activation, per_member=True, smoothing=smoothing
    )
    clean_results = with_gradients(ensemble_mlp_loss, clean)
    large = 1e200 if dtype == torch.float64 else torch.finfo(dtype).max  # its square overflows
    for value in (float("inf"), -float("inf"), float("nan"), large, -large):
        for place in ("input", "target", "weights", "biases", "last weights", "last biases"):
            arguments = copy.deepcopy(clean)
            if place == "target":
                if loss in CLASSES:
                    continue
                arguments["target"] = arguments["target"].expand(2, -1, -1).clone()
                arguments["target"][1, 4, 0] = value
            elif place == "input":
                arguments["input"][1, 4, 0] = value
            else:
                layers = arguments[place.removeprefix("last ")]
                layers[-1 if place.startswith("last") else 0][1].view(-1)[0] = value
            got = with_gradients(ensemble_mlp_loss, arguments)
            # Where float64 has room that this dtype has not, either may be right.
            same = with_gradients(reference.ensemble_mlp_loss, arguments)
            wide = with_gradients(reference.ensemble_mlp_loss, cast(arguments, torch.float64, device))
            for i, (ours, a, b) in enumerate(zip(got, same, wide, strict=True)):
                kinds = kind_of(ours)
                right = (kinds == kind_of(a)) | (kinds == kind_of(b.to(ours.dtype)))
                if abs(value) == large:  # where torch has overflowed, ours may later or not
                    right |= ~a.isfinite() & ~ours.isnan()
                    # The loss of one example, at the largest number itself, may round to either side of it.
                    right |= ours.isinf() & (
                        b.abs() * clean["target"].numel() > 0.999 * torch.finfo(dtype).max
                    )
                if activation == "hardswish":  # times Inf: at -1.5 its slope is 0, or the rounding of a third
                    right |= ~a.isfinite() & ~ours.isfinite()
                assert right.all(), (value, place, i, ours[~right], a[~right], b[~right])
                assert torch.equal(ours[0], clean_results[i][0])  # of the other member


@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
@pytest.mark.parametrize("own", [False, True])
def test_a_left_out_example_might_as_well_not_be_there(device, loss, smoothing, own):
    arguments = problem(3, 50, [5, 8, 3], loss, device=device, per_member=own, smoothing=smoothing)
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


@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
def test_weights_that_sum_to_zero(device, loss, smoothing):
    arguments = problem(3, 20, [5, 8, 3], loss, device=device, per_member=True, smoothing=smoothing)
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


@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(device, dtype, loss, smoothing):
    for weighted in (None, "own"):
        arguments = problem(3, 4, [4, 5, 2], loss, dtype, device, weighted=weighted, smoothing=smoothing)
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
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


@pytest.mark.parametrize("batch", [4, 7, 8, 16, 64, 128, 160, 256, 300, 513])
@pytest.mark.parametrize(
    "features",
    [(20, 8), (33, 40, 1), (100, 20, 10), (15, 50, 20, 10, 1), (300, 128, 9), (256, 33, 512, 3)],
    ids=str,
)
def test_no_bit_of_a_gradient_depends_on_who_else_is_there(features, batch):
    """Sample weights of one, threads, a gradient of the input, other members, how far rows lie apart."""
    e = 3
    weights = [torch.randn(e, o, i, requires_grad=True) for i, o in itertools.pairwise(features)]
    biases = [torch.randn(e, o, requires_grad=True) for o in features[1:]]
    x, y = torch.randn(e, batch, features[0]), torch.randn(batch, features[-1])

    def gradients(x=x, weights=weights, biases=biases, **options):
        loss = ensemble_mlp_loss(x, y, weights, biases, loss="mse", **options)
        return torch.autograd.grad(loss.sum(), [*weights, *biases])

    def apart(tensor, more):
        rows = torch.empty(*tensor.shape[:-1], tensor.shape[-1] + more)[..., : tensor.shape[-1]]
        rows.copy_(tensor.detach())
        return rows.requires_grad_(tensor.requires_grad)

    expected = gradients()
    others = [gradients(sample_weight=torch.ones(batch)), gradients(x.clone().requires_grad_())]
    others += [gradients(apart(x, more), [apart(w, more) for w in weights]) for more in (3, 256)]
    threads = torch.get_num_threads()
    try:
        for n in (1, 3, 16):
            torch.set_num_threads(n)
            others.append(gradients())
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert all(map(torch.equal, other, expected))
    for m in range(e):
        own = ([t[m : m + 1].detach().requires_grad_() for t in tensors] for tensors in (weights, biases))
        alone = gradients(x[m : m + 1], *own)
        assert all(torch.equal(a[0], b[m]) for a, b in zip(alone, expected, strict=True))
