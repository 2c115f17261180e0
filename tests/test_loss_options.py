"""Options of the losses of pyens.ops.ensemble_mlp_loss against torch's own losses in float64, at the ends of
their range too; bounds of log variances, weights of classes, quantiles, and the losses of single examples."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_problems import LOSSES, SMOOTHED, cast, differentiable, problem, with_gradients
from torch import Tensor

import pyens
from pyens import nn, reference
from pyens.ops import ensemble_mlp, ensemble_mlp_loss, masked_mlp_loss

INF, NAN = math.inf, math.nan
EDGES = [0.0, -0.0, 1e-45, -1e-40, 1e-20, 1.0, -1.0, 20.0, -20.0, 20.5, 88.0, -88.0, 104.0, -104.0, 1e4, -1e4]
HUGE = [1e30, -1e30, 3e38, -3e38]
WAYS = ("kernel", "composed", "example", "reference")


def of_outputs(way: str, z: Tensor, target: Tensor, **options: Any) -> list[Tensor]:
    """The loss of each row of outputs [B, O] and its gradient: a member each, whose bias they are."""
    leaf = z.detach().requires_grad_()
    weights = [torch.zeros(len(z), z.shape[1], 1, dtype=z.dtype, device=z.device)]
    x = torch.zeros(len(z), 1, 1, dtype=z.dtype, device=z.device)
    function = reference.ensemble_mlp_loss if way == "reference" else ensemble_mlp_loss
    if way == "example":
        options["reduction"] = "none"
    loss = function(x, target.unsqueeze(1), weights, [leaf], **options).flatten()
    (gradient,) = torch.autograd.grad(loss.sum(), leaf, create_graph=way == "composed")
    return [loss.detach(), gradient.detach()]


def by_torch(function: Callable[..., Tensor], z: Tensor, target: Tensor) -> list[Tensor]:
    leaf = z.detach().double().requires_grad_()
    loss = function(leaf, target.double() if target.is_floating_point() else target)
    return [loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]]


def pinball(quantiles: list[float]) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        tau = torch.tensor(quantiles, dtype=torch.float64, device=z.device)
        error = y.unsqueeze(-1) - z.unflatten(-1, (-1, len(quantiles)))
        return torch.maximum(tau * error, (tau - 1) * error).mean((-1, -2))

    return loss


def bounded(least: float, most: float) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        mean, raw = z.chunk(2, -1)
        # max - softplus(max - raw), min + softplus(s - min), without cancellation.
        s = -torch.logaddexp(torch.full_like(raw, -most), -raw)
        s = torch.logaddexp(torch.full_like(raw, least), s)
        return (s + (y - mean).square() * (-s).exp()).mean(-1) / 2

    return loss


# Options, and torch's loss of each row of outputs [B, O].
BY_TORCH: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "huber": ({}, lambda z, y: F.huber_loss(z, y, reduction="none").mean(-1)),
    "huber, small": ({"delta": 1e-3}, lambda z, y: F.huber_loss(z, y, delta=1e-3, reduction="none").mean(-1)),
    "huber, large": ({"delta": 1e6}, lambda z, y: F.huber_loss(z, y, delta=1e6, reduction="none").mean(-1)),
    "smooth_l1": ({}, lambda z, y: F.smooth_l1_loss(z, y, reduction="none").mean(-1)),
    "smooth_l1, small": (
        {"delta": 1e-6},
        lambda z, y: F.smooth_l1_loss(z, y, beta=1e-6, reduction="none").mean(-1),
    ),
    "smooth_l1, large": (
        {"delta": 50.0},
        lambda z, y: F.smooth_l1_loss(z, y, beta=50.0, reduction="none").mean(-1),
    ),
    "quantile": ({"quantiles": [0.5]}, pinball([0.5])),
    "quantile, two": ({"quantiles": (0.05, 0.95)}, pinball([0.05, 0.95])),
    "poisson_nll": ({}, lambda z, y: F.poisson_nll_loss(z, y, reduction="none").mean(-1)),
    "gaussian_nll": ({"log_variance_min": -10.0, "log_variance_max": 0.5}, bounded(-10.0, 0.5)),
    "gaussian_nll, one": ({"log_variance_min": 2.0, "log_variance_max": 2.0}, bounded(2.0, 2.0)),
    "gaussian_nll, wide": ({"log_variance_min": -40.0, "log_variance_max": 30.0}, bounded(-40.0, 30.0)),
}


def assert_right(
    ours: Tensor, exact: Tensor, dtype: torch.dtype, what: Any, roundings: float, least: float
) -> None:
    """Within roundings, or out of the range of the dtype as the exact number is."""
    info = torch.finfo(torch.float32 if dtype != torch.float64 else dtype)
    in_range = exact.abs() < info.max / 4
    known = ~exact.isnan() & in_range
    error = (ours.double() - exact).abs()
    wrong = known & ~(error <= roundings * info.eps * exact.abs() + info.smallest_normal + least)
    assert not wrong.any(), (what, ours[wrong], exact[wrong], wrong.nonzero())
    far = ~exact.isnan() & ~in_range & (exact.abs() > 4 * info.max)
    assert bool((ours[far].double() == exact[far].sign() * INF).all()), (what, ours[far], exact[far])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", BY_TORCH)
def test_as_in_torch_at_the_ends_of_the_range(device, case, way, dtype):
    options, exact = BY_TORCH[case]
    loss = case.partition(", ")[0]
    # torch squares an error before it meets a small precision.
    values = EDGES if loss == "poisson_nll" or (loss == "gaussian_nll" and way != "kernel") else EDGES + HUGE
    outputs = 2 if loss == "gaussian_nll" else len(options.get("quantiles", [1]))
    targets = [0.0, 1.0, 3.0, 1e4] if loss == "poisson_nll" else [0.0, 1.0, -3.0, 20.0, 1e4]
    rows = [[z, *other] for z in values for other in ([[]] if outputs == 1 else [[v] for v in values])]
    z = torch.tensor([row for row in rows for _ in targets], dtype=dtype, device=device)
    y = torch.tensor([[t] for _ in rows for t in targets], dtype=dtype, device=device)
    got = of_outputs(way, z, y, loss=loss, **options)
    expected = by_torch(exact, z, y)
    # The rounding of an exponent is magnified by it; softplus cancels to the rounding of a bound.
    roundings = 400 if loss in ("gaussian_nll", "poisson_nll") else 16
    bound = max(abs(options.get("log_variance_min", 0)), abs(options.get("log_variance_max", 0)))
    least = 4 * (1 if way == "kernel" else max(bound, 1)) * torch.finfo(dtype).eps * (loss == "gaussian_nll")
    at_kink = (y.double() == z.double()) if loss == "quantile" else torch.zeros_like(z, dtype=torch.bool)
    for name, ours, theirs in zip(("loss", "gradient"), got, expected, strict=True):
        if name == "gradient":
            assert not ours[at_kink].any()
            theirs = theirs.masked_fill(at_kink, NAN)
            if (
                loss == "gaussian_nll" and dtype == torch.float32
            ):  # not where a square meets a subnormal slope
                theirs[:, 1].masked_fill_((z[:, 0].abs() > 1e3) & (z[:, 1].abs() > 80), NAN)
        assert_right(ours, theirs, dtype, (case, name), roundings, least)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", BY_TORCH)
def test_nan_and_inf(device, case, way):
    options, exact = BY_TORCH[case]
    loss = case.partition(", ")[0]
    outputs = 2 if loss == "gaussian_nll" else len(options.get("quantiles", [1]))
    rows = [[z, *[0.5] * (outputs - 1)] for z in (INF, -INF, NAN)]
    z, y = torch.tensor(rows, device=device), torch.tensor([[1.0]] * 3, device=device)
    got, expected = of_outputs(way, z, y, loss=loss, **options), by_torch(exact, z, y)
    torch.testing.assert_close(got[0].double(), expected[0], equal_nan=True)
    assert got[0][2].isnan() and got[1][2].isnan().any()
    if loss == "gaussian_nll":  # an infinite raw log variance is at a bound, and its gradient 0
        z = torch.tensor([[0.5, INF], [0.5, -INF], [0.5, 1e30], [0.5, -1e30]], device=device)
        got, expected = (
            of_outputs(way, z, y[:1].expand(4, 1), loss=loss, **options),
            by_torch(exact, z, y[:1]),
        )
        torch.testing.assert_close([t.double() for t in got], expected, rtol=1e-5, atol=1e-6)
        assert not got[1][:, 1].any()


def soft(z: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(z, y, reduction="none", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("way", WAYS)
def test_shares_of_classes(device, way, smoothing, dtype):
    rows = [
        [1e4, -1e4, 0],
        [20, 0, 0],
        [0, 20, 0],
        [-20, 0, 0],
        [0, 0, 0],
        [1e30, 0, -1e30],
        [1e38, -1e38, 0],
        [1e-45, 0, -1e-45],
    ]
    shares = [[1, 0, 0], [0, 0.25, 0.75], [0.2, 0.3, 0.5], [0, 0, 0], [2, 1, 0]]
    z = torch.tensor([row for row in rows for _ in shares], dtype=dtype, device=device)
    y = torch.tensor(shares * len(rows), dtype=dtype, device=device)
    got = of_outputs(way, z, y, loss="soft_cross_entropy", label_smoothing=smoothing)
    exact = by_torch(lambda z, y: soft(z, y, label_smoothing=smoothing), z, y)
    for ours, theirs in zip(got, exact, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), theirs, rtol=16 * eps, atol=4 * eps)


@pytest.mark.parametrize("way", WAYS)
def test_a_share_of_0_leaves_its_class_out(device, way):
    z = torch.tensor([[-INF, 1.0, 2.0]] * 2, device=device)
    y = torch.tensor([[0.0, 0.5, 0.5], [0.5, 0.5, 0.0]], device=device)
    loss, gradient = of_outputs(way, z, y, loss="soft_cross_entropy")
    expected = soft(z[:1, 1:], y[:1, 1:])
    torch.testing.assert_close(loss, torch.cat([expected, torch.tensor([INF], device=device)]))
    assert gradient.isfinite().all()
    # Of a label too, where its class weighs nothing.
    label = torch.tensor([0, 1], device=device)
    weight = torch.tensor([0.0, 1.0, 2.0], device=device)
    options: dict[str, Any] = {"loss": "cross_entropy", "class_weight": weight}
    loss, gradient = of_outputs(way, z, label, **options)
    assert loss.isfinite().all() and loss[0] == 0 and not gradient[0].any()


@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 200])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("way", ["kernel", "composed", "reference"])
def test_class_weights_as_in_torch(device, way, smoothing, k):
    e, b = 3, 29
    draw = torch.Generator().manual_seed(k)
    x = torch.randn(b, 4, dtype=torch.float64, generator=draw).to(device)
    weights = [torch.randn(e, k, 4, dtype=torch.float64, generator=draw).to(device).requires_grad_()]
    target = torch.randint(k, (e, b), generator=draw).to(device)
    class_weight = torch.rand(e, k, dtype=torch.float64, generator=draw).to(device)
    class_weight[:, 0] = 0 if k > 1 else 2
    output = ensemble_mlp(x, weights)
    for own in (False, True):
        of = class_weight if own else class_weight[1]
        expected = torch.stack(
            [
                F.cross_entropy(
                    z / 0.5, target[m], of[m] if own else of, label_smoothing=smoothing, reduction="mean"
                )
                for m, z in enumerate(output)
            ]
        )
        function = reference.ensemble_mlp_loss if way == "reference" else ensemble_mlp_loss
        got = function(
            x,
            target,
            weights,
            loss="cross_entropy",
            temperature=0.5,
            label_smoothing=smoothing,
            class_weight=of,
        )
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        by = torch.autograd.grad(got.sum(), weights, create_graph=way == "composed")
        exact = torch.autograd.grad(expected.sum(), weights, retain_graph=True)
        torch.testing.assert_close(by, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_only_ratios_of_class_weights_count(device, own, dtype):
    a = problem(2, 21, [5, 8, 3], "cross_entropy, weighted", dtype, device, own_target=own, weighted="own")
    a["label_smoothing"] = 0.2
    exact = with_gradients(reference.ensemble_mlp_loss, cast(a, torch.float64, device))
    rtol = {torch.float32: 1e-4, torch.float64: 1e-11}.get(dtype, 0.05)
    for exponent in {torch.float64: (-1066, 1020), torch.float16: (-21, 13)}.get(dtype, (-129, 124)):
        half = exponent // 2
        scaled = (a["class_weight"].double() * 2.0**half * 2.0 ** (exponent - half)).to(dtype)
        for function in (ensemble_mlp_loss, reference.ensemble_mlp_loss):
            for ours, theirs in zip(
                with_gradients(function, a | {"class_weight": scaled}), exact, strict=True
            ):
                assert (ours.double() - theirs).abs().max() <= rtol * theirs.abs().max(), exponent


def test_class_weights_of_0_leave_nothing(device):
    a = problem(2, 5, [4, 3], "cross_entropy, weighted", torch.float32, device)
    got = with_gradients(ensemble_mlp_loss, a | {"class_weight": torch.zeros(3, device=device)})
    assert not any(t.any() for t in got)


# --- bounds of log variances -------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_bounds_get_gradients(device, own):
    a = problem(2, 7, [3, 4, 2], "gaussian_nll, bounded", device=device, own_target=own, weighted="own")
    names = ("log_variance_min", "log_variance_max")
    kernel = with_gradients(ensemble_mlp_loss, a)
    tensors = [*differentiable(a), *(a[name] for name in names)]
    tensors = [t.requires_grad_() for t in tensors]

    def function(*given: Tensor, of: Any = ensemble_mlp_loss) -> Tensor:
        changed = {"input": given[0], "weights": given[1:3], "biases": given[3:5]}
        return of(**a | changed | dict(zip(names, given[5:], strict=True)))

    got = torch.autograd.grad(function(*tensors).sum(), tensors)
    exact = torch.autograd.grad(function(*tensors, of=reference.ensemble_mlp_loss).sum(), tensors)
    torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(list(got[:5]), kernel[1:], rtol=1e-11, atol=1e-12)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)
    by_one = torch.func.grad(lambda b: function(*tensors[:5], b, tensors[6]).sum())(tensors[5].detach())
    torch.testing.assert_close(by_one, got[5])


def test_bounds_that_are_learnt_are_checked_and_compile():
    a = problem(2, 5, [3, 2], "gaussian_nll, bounded", torch.float32, weighted="own")
    least = a["log_variance_min"].clone().requires_grad_()
    with pytest.raises(ValueError, match="sample_weight: expected finite"):
        ensemble_mlp_loss(**a | {"log_variance_min": least, "sample_weight": -a["sample_weight"]})
    with pytest.raises(ValueError, match="log_variance_min: expected at most log_variance_max, got"):
        ensemble_mlp_loss(**a | {"log_variance_min": least, "log_variance_max": least.detach() - 1})

    def step(bound: Tensor) -> Tensor:
        return ensemble_mlp_loss(**a | {"log_variance_min": bound})

    torch._dynamo.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(least)
    torch.testing.assert_close(got, step(least))
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), least), torch.autograd.grad(step(least).sum(), least)
    )


def test_bounds_are_those_of_a_gaussian(device):
    a = problem(1, 9, [3, 4, 2], "gaussian_nll", device=device)
    mean, raw = ensemble_mlp(a["input"], a["weights"], a["biases"], activation="tanh").chunk(2, -1)
    s = 1.5 - F.softplus(1.5 - raw)
    variance = (-3 + F.softplus(s + 3)).exp()
    got = ensemble_mlp_loss(**a, log_variance_min=-3.0, log_variance_max=1.5)
    torch.testing.assert_close(got[0], F.gaussian_nll_loss(mean, a["target"].expand_as(mean), variance))


def test_bounds_may_be_numbers(device):
    a = problem(2, 9, [3, 4, 2], "gaussian_nll", torch.float32, device)
    one = torch.ones(2, device=device)
    got = ensemble_mlp_loss(**a, log_variance_min=-3, log_variance_max=1.5)
    expected = ensemble_mlp_loss(**a, log_variance_min=-3 * one, log_variance_max=(1.5 * one).expand(2, 2))
    assert torch.equal(got, expected)


def test_quantiles_may_be_a_tensor(device):
    a = problem(2, 9, [3, 4, 2], "quantile", torch.float32, device)
    given = torch.tensor(a["quantiles"], dtype=torch.float64, device=device)
    assert torch.equal(ensemble_mlp_loss(**a), ensemble_mlp_loss(**a | {"quantiles": given}))


# --- losses of the examples --------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
@pytest.mark.parametrize("weighted", [None, "shared", "own"])
def test_losses_of_the_examples(device, loss, smoothing, weighted):
    a = problem(
        3, 13, [5, 8, 3], loss, device=device, weighted=weighted, own_target=True, smoothing=smoothing
    )
    x = differentiable(a)
    got = with_gradients(ensemble_mlp_loss, a, torch.ones(3, 13), reduction="none")
    expected = with_gradients(reference.ensemble_mlp_loss, a, torch.ones(3, 13), reduction="none")
    assert got[0].shape == (3, 13)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    # Their weighted mean is the loss, but for the weights of classes.
    if "class_weight" not in a:
        weight = a.get("sample_weight", torch.ones(13, device=device, dtype=torch.float64))
        mean = got[0].sum(1) / weight.expand(3, 13).sum(1)
        torch.testing.assert_close(mean, ensemble_mlp_loss(**a), rtol=1e-11, atol=1e-12)
    tensors = [(t + 0.1 * torch.rand_like(t)).requires_grad_() for t in x]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        changed = {"input": x, "weights": parameters[:2], "biases": parameters[2:]}
        return ensemble_mlp_loss(**a | changed, reduction="none")

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_examples_that_are_left_out(device, loss, dtype):
    a = problem(3, 13, [5, 8, 3], loss, dtype, device, weighted="own", own_target=True, per_member=True)
    clean = with_gradients(ensemble_mlp_loss, a, torch.ones(3, 13), reduction="none")
    assert clean[0].dtype == torch.float32
    left_out = a["sample_weight"] == 0
    a["input"][left_out] = NAN
    a["target"][left_out] = -100 if a["target"].dtype == torch.int64 else NAN
    got = with_gradients(ensemble_mlp_loss, a, torch.ones(3, 13), reduction="none")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, clean, strict=True))
    assert not got[0][left_out].any() and not got[1][left_out].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_examples_are_the_same_whatever_members_are_beside(loss):
    a = problem(3, 40, [5, 8, 3], loss, torch.float32, own_target=True, per_member=True)
    whole = with_gradients(ensemble_mlp_loss, a, torch.ones(3, 40), reduction="none")
    for m in range(3):
        chosen = {
            name: [t[m : m + 1] for t in value]
            if name in ("weights", "biases")
            else value[m : m + 1]
            if isinstance(value, Tensor)
            else value
            for name, value in a.items()
        }
        alone = with_gradients(ensemble_mlp_loss, chosen, torch.ones(1, 40), reduction="none")
        for ours, theirs in zip(alone, whole, strict=True):
            torch.testing.assert_close(ours[0], theirs[m], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_examples_compiled_and_in_torch_func(device, loss):
    torch._dynamo.reset()
    a = problem(3, 9, [5, 8, 3], loss, torch.float32, device, weighted="own")
    tensors = [t.requires_grad_() for t in differentiable(a)]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        changed = {"input": x, "weights": list(parameters[:2]), "biases": list(parameters[2:])}
        return ensemble_mlp_loss(**a | changed, reduction="none")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = function(*tensors)
    by = torch.autograd.grad(expected.square().sum(), tensors)
    torch.testing.assert_close(compiled(*tensors), expected)
    torch.testing.assert_close(torch.autograd.grad(compiled(*tensors).square().sum(), tensors), by)
    plain = [t.detach() for t in tensors]
    found = torch.func.grad(lambda *t: function(*t).square().sum(), argnums=tuple(range(5)))(*plain)
    torch.testing.assert_close(found, by, rtol=1e-4, atol=1e-5)
    several = torch.stack([plain[0], plain[0] / 2])
    mapped = torch.func.vmap(lambda x: function(x, *plain[1:]))(several)
    torch.testing.assert_close(mapped[1], function(several[1], *plain[1:]))
    with torch.autocast(device.type, torch.bfloat16):
        assert function(*plain).dtype == torch.float32
    assert function(*(t.detach() for t in tensors)).shape == (3, 9)


def test_options_within_vmap(device):
    a = problem(2, 7, [3, 4, 2], "cross_entropy, weighted", device=device)
    b = problem(2, 7, [3, 4, 2], "gaussian_nll, bounded", device=device)
    for given, name in ((a, "class_weight"), (b, "log_variance_min")):
        several = torch.stack([given[name], given[name] - 0.125])
        got = torch.func.vmap(lambda v, given=given, name=name: ensemble_mlp_loss(**given | {name: v}))(
            several
        )
        torch.testing.assert_close(got[1], ensemble_mlp_loss(**given | {name: several[1]}))


def test_examples_of_nothing(device):
    for loss in LOSSES:
        a = problem(2, 1, [3, 2], loss, torch.float32, device)
        empty = a | {"input": a["input"][:0], "target": a["target"][:0]}
        got = with_gradients(ensemble_mlp_loss, empty, torch.ones(2, 0), reduction="none")
        assert got[0].shape == (2, 0) and not any(t.any() for t in got)
        assert not ensemble_mlp_loss(**empty).any()


# --- what is refused ---------------------------------------------------------------------------------------

E, B = 2, 5
WEIGHTS = [torch.randn(E, 4, 3)]
REAL: dict[str, Any] = {"loss": "mse", "target": torch.zeros(B, 4)}
LABELS: dict[str, Any] = {"loss": "cross_entropy", "target": torch.zeros(B, dtype=torch.int64)}
GAUSS: dict[str, Any] = {"loss": "gaussian_nll", "target": torch.zeros(B, 2)}
SOFT: dict[str, Any] = {"loss": "soft_cross_entropy", "target": torch.zeros(B, 4)}
HUBER: dict[str, Any] = {"loss": "huber", "target": torch.zeros(B, 4)}
QUANTILE: dict[str, Any] = {"loss": "quantile", "target": torch.zeros(B, 2), "quantiles": [0.1, 0.9]}
TWO = torch.zeros(2)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "loss": (
        REAL | {"loss": "mae"},
        ValueError,
        r'loss: expected one of mse, .*, soft_cross_entropy, got "mae"',
    ),
    "reduction": (REAL | {"reduction": "sum"}, ValueError, r'reduction: expected mean or none, got "sum"'),
    "delta 0": (HUBER | {"delta": 0.0}, ValueError, r"delta: expected a positive number, got 0"),
    "delta -1": (HUBER | {"delta": -1}, ValueError, r"delta: expected a positive number, got -1"),
    "delta inf": (HUBER | {"delta": INF}, ValueError, r"delta: expected a positive number, got inf"),
    "delta nan": (HUBER | {"delta": NAN}, ValueError, r"delta: expected a positive number, got nan"),
    "delta word": (HUBER | {"delta": "1"}, TypeError, r"delta: expected a number, got str"),
    "delta of mse": (
        REAL | {"delta": 2.0},
        ValueError,
        r"delta: expected 1 \(only huber and smooth_l1 have one\) with loss mse, got 2",
    ),
    "no quantiles": (
        QUANTILE | {"quantiles": None},
        ValueError,
        r"quantiles: expected some with loss quantile, got None",
    ),
    "empty quantiles": (QUANTILE | {"quantiles": []}, ValueError, r"quantiles: expected \[Q\], at least one"),
    "quantile 0": (
        QUANTILE | {"quantiles": [0.5, 0.0]},
        ValueError,
        r"quantiles\[1\]: expected a number above 0 and below 1, got 0",
    ),
    "quantile nan": (QUANTILE | {"quantiles": [NAN]}, ValueError, r"quantiles\[0\]: expected .* got nan"),
    "quantile word": (QUANTILE | {"quantiles": ["a"]}, TypeError, r"quantiles\[0\]: expected a number"),
    "one quantile": (QUANTILE | {"quantiles": 0.5}, TypeError, r"quantiles: expected a sequence of numbers"),
    "quantiles of mse": (
        REAL | {"quantiles": [0.5]},
        ValueError,
        r"quantiles: expected None \(only quantile has them\) with loss mse, got",
    ),
    "too many quantiles": (
        QUANTILE | {"quantiles": [0.1, 0.5, 0.9]},
        ValueError,
        r"(weights\[.\]|output): expected a multiple of 3 outputs \(each target's quantiles\), got 4",
    ),
    "target of quantiles": (
        QUANTILE | {"target": torch.zeros(B, 4)},
        ValueError,
        r"target: expected shape \[5, 2\] or \[2, 5, 2\], got shape \[5, 4\]",
    ),
    "weights of classes": (
        SOFT | {"class_weight": torch.ones(4)},
        ValueError,
        r"class_weight: expected None \(only cross_entropy has them\) with loss soft_cross_entropy, got",
    ),
    "shape of class_weight": (
        LABELS | {"class_weight": torch.ones(3)},
        ValueError,
        r"class_weight: expected shape \[4\] or \[2, 4\], got shape \[3\]",
    ),
    "dtype of class_weight": (
        LABELS | {"class_weight": torch.ones(4, dtype=torch.int64)},
        TypeError,
        r"class_weight: expected the dtype of",
    ),
    "list of class weights": (LABELS | {"class_weight": [1.0] * 4}, TypeError, r"class_weight: expected a t"),
    "one bound": (
        GAUSS | {"log_variance_min": TWO},
        ValueError,
        r"log_variance_max: expected one beside log_variance_min, got None",
    ),
    "other bound": (
        GAUSS | {"log_variance_max": 1.0},
        ValueError,
        r"log_variance_min: expected one beside log_variance_max, got None",
    ),
    "crossed bounds": (
        GAUSS | {"log_variance_min": TWO + 1, "log_variance_max": torch.tensor([2.0, 0.5])},
        ValueError,
        r"log_variance_min: expected at most log_variance_max, got one above it",
    ),
    "infinite bound": (
        GAUSS | {"log_variance_min": TWO, "log_variance_max": TWO + INF},
        ValueError,
        r"log_variance_max: expected finite numbers, got one that is not",
    ),
    "shape of bound": (
        GAUSS | {"log_variance_min": torch.zeros(4), "log_variance_max": TWO},
        ValueError,
        r"log_variance_min: expected shape \[2\] or \[2, 2\], got shape \[4\]",
    ),
    "bounds of mse": (
        REAL | {"log_variance_min": TWO, "log_variance_max": TWO},
        ValueError,
        r"log_variance_min: expected None \(only gaussian_nll has one\) with loss mse, got",
    ),
    "word for a bound": (
        GAUSS | {"log_variance_min": "a", "log_variance_max": TWO},
        TypeError,
        r"log_variance_min: expected a number, got str",
    ),
    "classes of soft": (SOFT | {"target": LABELS["target"]}, (TypeError, ValueError), r"target: expected"),
    "learnt class_weight": (
        LABELS | {"class_weight": torch.ones(4, requires_grad=True)},
        ValueError,
        r"class_weight: expected requires_grad=False \(it gets no gradient\), got True",
    ),
} | {
    f"class_weight {bad}": (
        LABELS | {"class_weight": torch.tensor([1, bad, 1, 1])},
        ValueError,
        r"class_weight: expected finite weights of at least 0, got one that is not",
    )
    for bad in (-1.0, NAN, INF)
} | {
    f"quantiles {bad}": (
        QUANTILE | {"quantiles": torch.tensor([bad, 0.5])},
        ValueError,
        r"quantiles: expected numbers above 0 and below 1, got one that is not",
    )
    for bad in (0.0, 1.0, -0.5, NAN)
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    given, error, message = BAD[case]
    x = torch.randn(B, 3)
    target, options = given["target"], {k: v for k, v in given.items() if k != "target"}
    model = pyens.EnsembleLinear(E, 3, 4)
    for reduction in ("mean", "none"):
        own = {"reduction": reduction} | options
        with pytest.raises(error, match=r"^ensemble_mlp_loss: " + message):
            ensemble_mlp_loss(x, target, WEIGHTS, **own)
        with pytest.raises(error, match=r"^ensemble_mlp_loss: " + message):
            model.loss(x, target, **own)
        with pytest.raises(error, match=r"^loss: " + message):
            nn.Ensemble.loss(model, x, target, **own)
        masks = [torch.ones(E, 3, dtype=torch.bool)]
        with pytest.raises(error, match=r"^(ensemble|masked)_mlp_loss: " + message):
            masked_mlp_loss(x, target, [torch.randn(3, 3), torch.randn(4, 3)], None, masks, **own)


def test_values_that_only_examples_show():
    x = torch.randn(B, 3)
    for change, message in (
        ({"target": LABELS["target"] + 4}, "target: expected classes from 0 to 3, got one that is not"),
        ({"sample_weight": -torch.ones(B)}, "sample_weight: expected finite weights of at least 0"),
    ):
        given = LABELS | {"reduction": "none"} | change
        with pytest.raises(ValueError, match="^ensemble_mlp_loss: " + message):
            ensemble_mlp_loss(x, given.pop("target"), WEIGHTS, **given)
    with pytest.raises(ValueError, match=r"^ensemble_mlp_loss: target: expected requires_grad=False"):
        ensemble_mlp_loss(x, torch.zeros(B, 4, requires_grad=True), WEIGHTS, loss="mse", reduction="none")


# --- models ------------------------------------------------------------------------------------------------

OF_MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "huber": (2, {"delta": 0.5}),
    "smooth_l1": (2, {"delta": 0.5}),
    "quantile": (1, {"quantiles": [0.25, 0.75]}),
    "poisson_nll": (2, {}),
    "soft_cross_entropy": (2, {"label_smoothing": 0.1, "temperature": 0.5}),
    "gaussian_nll": (1, {"log_variance_min": -2.0, "log_variance_max": 1.0}),
    "cross_entropy": (0, {"class_weight": torch.tensor([0.5, 2.0])}),
}


@pytest.mark.parametrize("loss", OF_MODELS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_model_takes_it(device, loss, reduction):
    columns, options = OF_MODELS[loss]
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    x, weight = torch.randn(7, 4, device=device), torch.tensor([1.0, 0, 2, 1, 1, 3, 0], device=device)
    target = torch.rand(7, columns, device=device) if columns else torch.randint(2, (7,), device=device)
    categories = torch.randint(5, (7, 1), device=device)
    mlp = pyens.EnsembleMLP(2, 4, [6], 2, device=device)
    masked = nn.MaskedMLP(2, 4, [6], 2, scale=1.5, device=device)
    models: list[tuple[Any, tuple[Tensor, ...]]] = [
        (mlp, (x,)),
        (mlp.packed(), (x,)),
        (pyens.EnsembleLinear(2, 4, 2, device=device), (x,)),
        (masked, (x,)),
        (nn.TabularEnsemble(2, [(5, 2)], 4, [6], 2, device=device), (categories, x)),
    ]
    for model, inputs in models:
        output = model(*inputs)
        identity = [torch.eye(2, device=device).expand(2, 2, 2)]
        for sample_weight in (None, weight):
            given = options | {"loss": loss, "reduction": reduction, "sample_weight": sample_weight}
            expected = reference.ensemble_mlp_loss(output, target, identity, **given)
            got = [model.loss(*inputs, target, **given), nn.Ensemble.loss(model, *inputs, target, **given)]
            for one in got:
                torch.testing.assert_close(one, expected)
    # Each row under one mask.
    output = masked(x, mode="random", seed=3).unsqueeze(0)
    given = options | {"loss": loss, "reduction": reduction, "sample_weight": weight}
    got = masked.loss(x, target, mode="random", seed=3, **given)
    expected = reference.ensemble_mlp_loss(output, target, [torch.eye(2, device=device)[None]], **given)[0]
    torch.testing.assert_close(got, expected)


def test_class_weights_of_each_mask():
    x, target = torch.randn(40, 4), torch.randint(2, (40,))
    masked = nn.MaskedMLP(2, 4, [6], 2, scale=1.5)
    weight = torch.tensor([[1.0, 3.0], [100.0, 20.0]])
    got = masked.loss(x, target, loss="cross_entropy", mode="round_robin", class_weight=weight)
    output = masked(x, mode="round_robin")
    own = weight[torch.arange(40) % 2].gather(1, target.unsqueeze(1)).squeeze(1)
    each = F.cross_entropy(output, target, reduction="none")
    if not torch.allclose(output, masked(x)[torch.arange(40) % 2, torch.arange(40)], atol=1e-6):
        pytest.skip("rows meet masks in another order")
    torch.testing.assert_close(got, (own * each).sum() / own.sum())
