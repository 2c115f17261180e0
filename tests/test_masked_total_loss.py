"""pyens.ops.masked_mlp.masked_mlp_total_loss: one operation for masks that meet examples of their own."""

import copy

import pytest
import torch
import torch._dynamo
from test_masked_mlp import DTYPES, problem, unequal
from torch import Tensor

from pyens import reference
from pyens.nn import MaskedMLP
from pyens.ops import masked_mlp_loss
from pyens.ops.masked_mlp import masked_mlp_total_loss, plan_masks

# N, B, widths: one mask, no examples, masks that go some at a time (300 x 300 are 90 KB and more each).
SHAPES = [
    (1, 1, [1, 1, 1]),
    (3, 0, [4, 5, 2]),
    (5, 3, [33, 17, 9, 7]),
    (9, 12, [40, 700, 600, 3]),
    (40, 2, [16, 32, 1]),
]


def arguments(n: int, b: int, widths: list[int], dtype: torch.dtype = torch.float32) -> dict:
    x, weights, biases, masks = problem(n, b, widths, dtype, per_mask=True)
    return {
        "input": x,
        "target": torch.randn(n, b, widths[-1], dtype=torch.float64).to(dtype),
        "weights": [w.requires_grad_() for w in weights],
        "biases": [v.requires_grad_() for v in biases],
        "masks": masks,
    }


def exact(given: dict) -> dict:
    def double(value):
        if isinstance(value, list):
            return [double(one) for one in value]
        needs = value.requires_grad
        return value.detach().double().requires_grad_(needs) if value.is_floating_point() else value

    return {name: double(value) for name, value in given.items()}


def parameters(given: dict) -> list[Tensor]:
    return [*given["weights"], *given["biases"]]


def shares(n: int) -> Tensor:
    return torch.linspace(-0.5, 2, n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("equal", [True, False], ids=["drawn", "of all sizes"])
def test_against_the_reference_in_float64(shape, dtype, equal):
    n, b, widths = shape
    given = arguments(n, b, widths, dtype)
    if not equal:
        given["masks"] = unequal(given["masks"])
    # Rounded to 16 bits, a number beside 0 would change sides of a ReLU.
    loss = {"loss": "mse", "activation": "tanh" if dtype.itemsize == 2 else "relu"}
    total = masked_mlp_total_loss(**given, mask_weight=shares(n), **loss)
    assert total.shape == () and total.dtype == (dtype if dtype == torch.float64 else torch.float32)
    expected_of = exact(given)
    losses = reference.masked_mlp_loss(**expected_of, **loss)
    expected = (losses * shares(n).double()).sum()
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}.get(dtype, 4e-2)
    torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=tolerance)
    found = torch.autograd.grad(total, parameters(given), allow_unused=True)
    wanted = torch.autograd.grad(expected, parameters(expected_of), allow_unused=True)
    for ours, theirs, parameter in zip(found, wanted, parameters(given), strict=True):
        assert ours.shape == parameter.shape and ours.dtype == dtype
        if theirs is None:
            assert not ours.any()
            continue
        scale = max(theirs.abs().max().item(), 1e-3)
        torch.testing.assert_close(ours.double() / scale, theirs / scale, rtol=tolerance, atol=tolerance)


def test_same_bits_for_any_number_of_threads():
    given = arguments(9, 12, [40, 700, 600, 3])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            total = masked_mlp_total_loss(**given, mask_weight=shares(9), loss="mse")
            results.append([total, *torch.autograd.grad(total, parameters(given))])
    finally:
        torch.set_num_threads(before)
    assert all(g.any() for g in results[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.0])
def test_backward_scales_and_may_come_again(factor):
    given = arguments(5, 3, [33, 17, 9, 7])
    of_one = masked_mlp_total_loss(**given, mask_weight=shares(5), loss="mse")
    wanted = [g.clone() * factor for g in torch.autograd.grad(of_one, parameters(given))]
    total = masked_mlp_total_loss(**given, mask_weight=shares(5), loss="mse") * factor
    first = torch.autograd.grad(total, parameters(given), retain_graph=True)
    for gradient in first:
        gradient.mul_(0)  # what a hook may do
    second = torch.autograd.grad(total, parameters(given))
    for ours, theirs in zip(second, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_gradients_of_some():
    given = arguments(5, 3, [33, 17, 9, 7])
    full = torch.autograd.grad(
        masked_mlp_total_loss(**given, mask_weight=shares(5), loss="mse"), parameters(given)
    )
    given["weights"][1].requires_grad_(False)
    given["biases"][0].requires_grad_(False)
    total = masked_mlp_total_loss(**given, mask_weight=shares(5), loss="mse")
    total.backward(inputs=[given["weights"][0], given["biases"][2]])
    assert torch.equal(given["weights"][0].grad, full[0]) and torch.equal(given["biases"][2].grad, full[5])
    assert all(t.grad is None for t in (*given["weights"][1:], *given["biases"][:2]))
    with torch.no_grad():
        alone = masked_mlp_total_loss(**given, mask_weight=shares(5), loss="mse")
    assert not alone.requires_grad and torch.equal(alone, total)


def test_second_derivatives():
    given = arguments(3, 2, [4, 6, 2], torch.float64)
    x, y, masks = given["input"], given["target"], given["masks"]

    def total(w0: Tensor, w1: Tensor, b0: Tensor, b1: Tensor) -> Tensor:
        return masked_mlp_total_loss(
            x, y, [w0, w1], [b0, b1], masks, shares(3).double(), loss="mse", activation="tanh"
        )

    assert torch.autograd.gradcheck(total, parameters(given))
    assert torch.autograd.gradgradcheck(total, parameters(given))


def test_options_that_masks_have_of_their_own():
    n, b = 6, 5
    given = arguments(n, b, [7, 300, 400, 4])
    given["target"] = torch.randint(4, (n, b))
    options = {
        "loss": "cross_entropy",
        "label_smoothing": 0.1,
        "temperature": 2.0,
        "class_weight": torch.rand(n, 4) + 0.1,
        "sample_weight": torch.rand(n, b).round(decimals=1),
    }
    total = masked_mlp_total_loss(**given, mask_weight=shares(n), **options)
    expected = (masked_mlp_loss(**given, **options) * shares(n)).sum()
    torch.testing.assert_close(total, expected)
    for ours, theirs in zip(
        torch.autograd.grad(total, parameters(given)),
        torch.autograd.grad(expected, parameters(given)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_one_target_for_all_masks():
    given = arguments(4, 3, [5, 8, 2])
    given["target"] = given["target"][0]
    total = masked_mlp_total_loss(**given, mask_weight=shares(4), loss="mse")
    torch.testing.assert_close(total, (masked_mlp_loss(**given, loss="mse") * shares(4)).sum())


def test_where_it_is_composed_the_result_is_the_same():
    given = arguments(5, 3, [9, 17, 2])
    total = masked_mlp_total_loss(**given, mask_weight=shares(5), loss="mse")
    wanted = torch.autograd.grad(total, parameters(given))
    given["input"].requires_grad_()
    by_input = masked_mlp_total_loss(**given, mask_weight=shares(5), loss="mse")
    torch.testing.assert_close(by_input, total)
    of_input, *others = torch.autograd.grad(by_input, [given["input"], *parameters(given)])
    assert of_input.any()
    for ours, theirs in zip(others, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    given["input"].requires_grad_(False)

    def of_weights(weights: list[Tensor]) -> Tensor:
        return masked_mlp_total_loss(**given | {"weights": weights}, mask_weight=shares(5), loss="mse")

    for ours, theirs in zip(torch.func.grad(of_weights)(given["weights"]), wanted, strict=False):
        torch.testing.assert_close(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        low = masked_mlp_total_loss(**given, mask_weight=shares(5), loss="mse")
    torch.testing.assert_close(low, total, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("mode", ["grouped", "round_robin", "random"])
@pytest.mark.parametrize("size", [12, 13, 3])
def test_a_model_compiled_trains_as_it_is(mode, size):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MaskedMLP(4, 6, [12, 10], 3, scale=2.0)
    x, y = torch.randn(size, 6), torch.randint(3, (size,))
    other = copy.deepcopy(model)

    def loss(model: MaskedMLP) -> Tensor:
        return model.loss(x, y, loss="cross_entropy", mode=mode)

    loss(model).backward()
    compiled = torch.compile(lambda: loss(other), backend="aot_eager", fullgraph=True)
    compiled().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.grad.any()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_fake_tensors_have_its_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = arguments(5, 3, [33, 17, 9, 7])
    plan = [torch.zeros(5, 8, dtype=torch.int64), torch.zeros(5, 4, dtype=torch.int64)]
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {
            name: [mode.from_tensor(t) for t in value] if isinstance(value, list) else mode.from_tensor(value)
            for name, value in given.items()
        }
        total = masked_mlp_total_loss(
            **fake, mask_weight=torch.ones(5), loss="mse", plan=[mode.from_tensor(p) for p in plan]
        )
        found = torch.autograd.grad(total, [*fake["weights"], *fake["biases"]])
    assert total.shape == () and [g.shape for g in found] == [p.shape for p in parameters(given)]


def test_a_sum_beyond_float32_is_infinite():
    given = arguments(5, 3, [6, 17, 4]) | {"target": torch.full((5, 3, 4), 0.4e19)}
    total = masked_mlp_total_loss(**given, mask_weight=torch.full((5,), 10.0), loss="mse")
    assert total == torch.inf


def test_other_options_are_those_of_the_ensemble():
    given = arguments(5, 3, [6, 17, 4]) | {"loss": "mse"}
    norm = {"norm": "layer_norm", "norm_weights": [torch.full((5, 8), 3.0)]}
    kept = max(int(mask.sum(1).max()) for mask in given["masks"])
    norm["norm_weights"] = [torch.full((5, kept), 3.0)]
    total = masked_mlp_total_loss(**given, mask_weight=torch.ones(5), **norm)
    torch.testing.assert_close(total, masked_mlp_loss(**given, **norm).sum())


MODEL_CASES = [
    ({"reduction": "sum"}, ValueError, "reduction: expected mean or none"),
    ({"class_weight": torch.ones(7, 3)}, ValueError, "class_weight: expected shape"),
    ({"class_weight": torch.ones(2)}, ValueError, "class_weight: expected shape"),
    ({"class_weight": [1.0, 1.0, 1.0]}, TypeError, "class_weight"),
    ({"class_weight": torch.ones(3), "loss": "mse"}, (TypeError, ValueError), "class_weight|target"),
    ({"class_weight": torch.ones(3), "target": torch.randn(12, 3)}, TypeError, "target: expected int64"),
    ({"class_weight": torch.ones(3, requires_grad=True)}, ValueError, "class_weight: expected requires_grad"),
    ({"sample_weight": torch.ones(12, 2)}, ValueError, r"sample_weight: expected \[12\]"),
    (
        {"sample_weight": torch.ones(12, requires_grad=True)},
        ValueError,
        "sample_weight: expected requires_grad",
    ),
    ({"foo": 1}, TypeError, "ensemble_mlp_loss.. got an unexpected keyword"),
    (
        {
            "loss": "quantile",
            "target": torch.randn(12, 1),
            "quantiles": torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, requires_grad=True),
        },
        ValueError,
        "quantiles: expected requires_grad",
    ),
]


@pytest.mark.parametrize("mode", ["grouped", "random"])
@pytest.mark.parametrize(("change", "error", "message"), MODEL_CASES)
def test_errors_of_a_model_name_what_was_given(change, error, message, mode):
    model = MaskedMLP(4, 6, [12, 10], 3, scale=2.0)
    given = {"input": torch.randn(12, 6), "target": torch.arange(12) % 3, "loss": "cross_entropy"} | change
    with pytest.raises(error, match=message):
        model.loss(**given, mode=mode)


def test_the_operation_alone_refuses_what_python_never_gives():
    given = arguments(5, 3, [6, 17, 2])
    plan = plan_masks(given["masks"])

    def run(**change) -> Tensor:
        values = given | {"plan": plan, "mask_weight": torch.ones(5), "loss": "mse"} | change
        bounds = values.get("log_variance_min"), values.get("log_variance_max")
        return torch.ops.pyens.masked_mlp_total_loss(
            values["input"],
            values["target"],
            values["weights"],
            values["biases"],
            values["plan"],
            values["mask_weight"],
            values["loss"],
            1.0,
            0.0,
            values.get("sample_weight"),
            1.0,
            None,
            None,
            *bounds,
            "relu",
        )

    assert run().isfinite()
    with pytest.raises(ValueError, match="log_variance_max: expected one beside"):
        run(loss="gaussian_nll", target=torch.randn(5, 3, 1), log_variance_min=torch.zeros(1))
    with pytest.raises(ValueError, match="input"):
        empty = torch.zeros(0, 8, dtype=torch.int64)
        run(input=torch.randn(0, 3, 6), mask_weight=torch.ones(0), plan=[empty])
    with pytest.raises(ValueError, match="sample_weight: expected requires_grad"):
        run(sample_weight=torch.ones(5, 3, requires_grad=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.randn(7, 3, 7)}, "target: expected 5 masks first"),
        ({"target": torch.randn(3, 3, 7)}, "target: expected 5 masks first"),
        ({"sample_weight": torch.ones(7, 3)}, "sample_weight: expected 5 masks first"),
        ({"mask_weight": torch.ones(4)}, r"mask_weight: expected \[5\], got shape \[4\]"),
        ({"target": torch.randn(5, 4, 7)}, r"target: expected shape \[3, 7\] or \[5, 3, 7\]"),
        ({"sample_weight": -torch.ones(5, 3)}, "sample_weight"),
        ({"loss": "l1"}, "loss: expected one of"),
        ({"plan": [torch.zeros(5, 2, dtype=torch.int64)]}, "plan: expected one for each of the 2 masks"),
        ({"plan": [torch.full((5, 2), 99), torch.zeros(5, 2, dtype=torch.int64)]}, "from -1 .padding. to 16"),
        (
            {"plan": [torch.zeros(3, 2, dtype=torch.int64)] * 2},
            r"plan: expected \[5, kept\], got shape \[3, 2\]",
        ),
    ],
)
def test_errors(change, message):
    given = arguments(5, 3, [33, 17, 9, 7]) | {"mask_weight": shares(5), "loss": "mse"} | change
    with pytest.raises(ValueError, match=message):
        masked_mlp_total_loss(**given)
