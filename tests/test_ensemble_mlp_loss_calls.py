"""Ways to call pyens.ops.ensemble_mlp_loss: compiler, autocast, torch.func; and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_problems import NO_OPTIONS, SMOOTHED, cast, differentiable, problem
from torch import Tensor

from pyens import reference
from pyens.ops import ensemble_mlp_loss

# --- the dispatcher ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
def test_opcheck(device, loss, smoothing):
    per_member = loss in ("bce", "cross_entropy")
    a = problem(
        3,
        5,
        [4, 6, 2],
        loss,
        torch.float32,
        device,
        per_member=per_member,
        weighted="own",
        smoothing=smoothing,
    )
    seeds = torch.arange(3, device=device)
    for tracked in (False, True):
        for tensor in differentiable(a)[:3]:
            tensor.requires_grad_(tracked)
        given = (a["input"], a["target"], a["weights"], a["biases"], [], [], a["loss"], 1.0, smoothing)
        quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, device=device)
        options = (
            a.get("delta", 1.0),
            quantiles if loss == "quantile" else None,
            *(a.get(name) for name in ("class_weight", "log_variance_min", "log_variance_max")),
        )
        for op in (torch.ops.pyens.ensemble_mlp_loss, torch.ops.pyens.ensemble_mlp_example_losses):
            torch.library.opcheck(op, (*given, a["sample_weight"], *options, "tanh", 0.25, seeds))
            torch.library.opcheck(op, (*given, None, *options, "tanh"))


@pytest.mark.parametrize("per_member", [False, True])
def test_opcheck_with_gradients(per_member):
    a = problem(3, 5, [4, 6, 2], "mse", torch.bfloat16, per_member=per_member, weighted="own")
    seeds, scale = torch.arange(3), torch.rand(3)
    given = (a["input"], a["target"], a["weights"], a["biases"], [], [])
    for needs_grad in ([True] * 5, [False, True, False, False, True]):
        op = torch.ops.pyens.ensemble_mlp_loss_with_gradients
        weighted = ("mse", 1.0, 0.0, a["sample_weight"], *NO_OPTIONS, "gelu", 0.25, seeds)
        torch.library.opcheck(op, (*given, scale, needs_grad, *weighted))
        torch.library.opcheck(op, (*given, None, needs_grad, "mse", 1.0, 0.0, None, *NO_OPTIONS, "gelu"))


@pytest.mark.parametrize("per_member", [False, True])
def test_opcheck_backward(device, per_member):
    a = problem(3, 5, [4, 6, 2], "mse", torch.float32, device, per_member=per_member)
    seeds = torch.arange(3, device=device)
    for grad in (torch.randn(3, 5, 2, device=device), torch.ones((), device=device).expand(3, 5, 2)):
        given = (grad, a["input"], a["weights"], a["biases"], [], [], None)
        for needs_grad in ([True] * 5, [False, True, False, False, True]):
            op = torch.ops.pyens.ensemble_mlp_backward
            torch.library.opcheck(op, (*given, needs_grad, "relu", 0.25, seeds))
            torch.library.opcheck(op, (*given, needs_grad, "relu"))


@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
def test_compile_without_graph_breaks_or_many_recompilations(device, loss, smoothing, per_member):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    seeds = torch.arange(3, device=device)
    first = problem(3, 5, [4, 6, 2], loss, torch.float32, device, smoothing=smoothing)
    given_once = ("loss", "delta", "quantiles", "class_weight", "log_variance_min", "log_variance_max")
    options = {name: first[name] for name in given_once if name in first}

    def step(x: Tensor, y: Tensor, w: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        return ensemble_mlp_loss(
            x, y, weights, biases, activation="tanh", label_smoothing=smoothing, sample_weight=w,
            dropout=0.25, dropout_seeds=seeds, **options,
        ).square()  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    parameters = [t.requires_grad_() for t in differentiable(first)[1:]]
    for b in (5, 7, 12, 16, 33, 64, 100):
        a = problem(
            3,
            b,
            [4, 6, 2],
            loss,
            torch.float32,
            device,
            per_member=per_member,
            weighted="shared",
            smoothing=smoothing,
        )
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
@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
def test_autocast(device, dtype, loss, smoothing):
    a = problem(2, 20, [5, 6, 3], loss, torch.float32, device, weighted="own", smoothing=smoothing)
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


@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
def test_func_grad(device, loss, smoothing):
    a = problem(2, 6, [3, 4, 2], loss, device=device, weighted="own", smoothing=smoothing)

    def total(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b: function(**a | {"input": x, "weights": w, "biases": b}).square().sum()

    given = (a["input"], a["weights"], a["biases"])
    got = torch.func.grad(total(ensemble_mlp_loss), argnums=(0, 1, 2))(*given)
    expected = torch.func.grad(total(reference.ensemble_mlp_loss), argnums=(0, 1, 2))(*given)
    torch.testing.assert_close(got, expected)
    tensors = [t.requires_grad_() for t in differentiable(a)]
    eager = torch.autograd.grad(ensemble_mlp_loss(**a).square().sum(), tensors)
    torch.testing.assert_close([got[0], *got[1], *got[2]], list(eager))


@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
def test_func_per_example_gradients(device, loss, smoothing):
    a = problem(2, 6, [3, 4, 2], loss, device=device, smoothing=smoothing)

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


@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
def test_func_vmap_over_models(device, loss, smoothing):
    problems = [problem(2, 6, [3, 4, 2], loss, device=device, smoothing=smoothing) for _ in range(4)]
    stacked = [torch.stack([p["weights"][layer] for p in problems]) for layer in range(2)]
    a = problems[0]
    got = torch.func.vmap(lambda w: ensemble_mlp_loss(**a | {"weights": w}))(stacked)
    for i, other in enumerate(problems):
        torch.testing.assert_close(got[i], ensemble_mlp_loss(**a | {"weights": other["weights"]}))


@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
def test_func_vmap_over_targets_weights_and_seeds(device, loss, smoothing):
    problems = [
        problem(2, 6, [3, 4, 2], loss, device=device, weighted="own", smoothing=smoothing) for _ in range(3)
    ]
    a = problems[0] | {"dropout": 0.5, "dropout_seeds": torch.arange(2, device=device)}
    for names in (("target",), ("sample_weight",), ("dropout_seeds",), ("input", "target", "biases")):
        own = [{name: p[name] for name in names if name in p} for p in problems]
        if "dropout_seeds" in names:
            own = [{"dropout_seeds": torch.arange(2, device=device) + 9 * i} for i in range(3)]
        many = torch.utils._pytree.tree_map(lambda *tensors: torch.stack(tensors), *own)
        got = torch.func.vmap(lambda mapped: ensemble_mlp_loss(**a | mapped))(many)
        for i, changes in enumerate(own):
            torch.testing.assert_close(got[i], ensemble_mlp_loss(**a | changes))


def test_func_forward_mode():
    a = problem(2, 6, [3, 4, 2], "mse", torch.float64, weighted="own")
    tangents = [torch.randn_like(w) for w in a["weights"]]

    def jvp(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda w: function(**a | {"weights": w}), (a["weights"],), (tangents,))

    torch.testing.assert_close(jvp(ensemble_mlp_loss), jvp(reference.ensemble_mlp_loss))


# --- bad input ---------------------------------------------------------------------------------------------

E, B = 3, 6
X, W, V = (
    torch.randn(B, 5),
    [torch.randn(E, 4, 5), torch.randn(E, 2, 4)],
    [torch.zeros(E, 4), torch.zeros(E, 2)],
)
Y, LABELS = torch.randn(B, 2), torch.tensor([0, 1, 1, 0, 1, 0])
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
    "smoothing of mse": (
        {"label_smoothing": 0.1},
        ValueError,
        r"label_smoothing: expected 0 .*loss mse, got 0.1",
    ),
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
    f"smoothing {bad}": (
        CLASSES | {"label_smoothing": bad},
        ValueError,
        rf"label_smoothing: expected a number from 0 to 1, got {bad}",
    )
    for bad in (-0.1, 1.5, float("nan"), float("inf"))
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
    # The same checks and words within torch.func.
    with pytest.raises(error, match=r"^ensemble_mlp_loss: " + message):
        torch.func.grad(lambda x: ensemble_mlp_loss(**arguments | {"input": x}).sum())(arguments["input"])


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


# --- what the internal operations and other ways in refuse -------------------------------------------------


def small() -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    return torch.randn(5, 4), torch.randn(5, 2), [torch.randn(3, 2, 4)], [torch.randn(3, 2)]


def test_backward_operations_check_what_they_read():
    x, y, weights, biases = small()
    needs_grad = [True, True, True]
    backward = torch.ops.pyens.ensemble_mlp_backward
    for grad, error in ((torch.randn(3, 4, 2), ValueError), (torch.randn(3, 5, 2).double(), TypeError)):
        with pytest.raises(error, match=r"^ensemble_mlp: grad: expected"):
            backward(grad, x, weights, biases, [], [], None, needs_grad, "relu")
    with_gradients = torch.ops.pyens.ensemble_mlp_loss_with_gradients
    with pytest.raises(ValueError, match=r"^ensemble_mlp_loss: member_scale: expected"):
        options = ("mse", 1.0, 0.0, None, *NO_OPTIONS, "relu")
        with_gradients(x, y, weights, biases, [], [], torch.ones(2), [False, True, True], *options)


def test_forward_mode_raises():
    x, y, weights, biases = small()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises((RuntimeError, NotImplementedError)):
            ensemble_mlp_loss(dual, y, weights, biases, loss="mse")


def test_targets_and_weights_get_no_gradient_within_torch_func():
    x, y, weights, biases = small()

    def loss(y: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        return ensemble_mlp_loss(x, y, weights, biases, loss="mse", sample_weight=sample_weight).sum()

    with pytest.raises(ValueError, match=r"^ensemble_mlp_loss: target: expected requires_grad=False"):
        torch.func.grad(loss)(y)
    with pytest.raises(ValueError, match=r"^ensemble_mlp_loss: sample_weight: expected requires_grad=False"):
        torch.func.grad(loss, argnums=1)(y, torch.ones(5))
