"""Label smoothing of cross_entropy against F.cross_entropy(label_smoothing=), wherever a loss takes it."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pyens
from pyens import nn, reference
from pyens.ops import ensemble_mlp_loss, masked_mlp_loss

SMOOTHINGS = [0.0, 1e-9, 0.1, 0.5, 0.999, 1.0]


def of_logits(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The loss of each row of logits [B, K]: a member each, whose bias they are."""
    b, k = logits.shape
    biases = [logits]
    weights = [torch.zeros(b, k, 1, dtype=logits.dtype, device=logits.device)]
    x = torch.zeros(b, 1, 1, dtype=logits.dtype, device=logits.device)
    return ensemble_mlp_loss(x, target.unsqueeze(1), weights, biases, loss="cross_entropy", **options)


def torch_loss(
    logits: Tensor, target: Tensor, temperature: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    return F.cross_entropy(logits / temperature, target, reduction="none", label_smoothing=label_smoothing)


def gradients(function: Any, logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, target, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def composed(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The same out of torch's own operations."""
    leaf = logits.detach().requires_grad_()
    loss = of_logits(leaf, target, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf, create_graph=True)[0].detach()


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("k", [1, 2, 3, 127, 128, 129, 1000])
def test_as_in_torch(device, k, smoothing):
    logits = 3 * torch.randn(9, k, dtype=torch.float64, device=device)
    target = torch.randint(k, (9,), device=device)
    for temperature in (0.2, 1.0, 5.0):
        options = {"temperature": temperature, "label_smoothing": smoothing}
        expected = gradients(torch_loss, logits, target, **options)
        for got in (gradients(of_logits, logits, target, **options), composed(logits, target, **options)):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_logits_at_the_ends_of_their_range(device, smoothing, dtype):
    rows = [
        [1e4, -1e4, 0],
        [-1e4, -1e4, -1e4],
        [1e4, 1e4, 1e4],
        [20, 0, 0],
        [0, 20, 0],
        [-20, 0, 0],
        [0, 0, 0],
    ]
    logits = torch.tensor([row for row in rows for _ in range(3)], dtype=dtype, device=device)
    target = torch.arange(3, device=device).repeat(len(rows))
    for temperature in (0.5, 1.0):
        options = {"temperature": temperature, "label_smoothing": smoothing}
        exact = gradients(torch_loss, logits.double(), target, **options)
        for got in (gradients(of_logits, logits, target, **options), composed(logits, target, **options)):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got[0].double(), exact[0], rtol=16 * eps, atol=4 * eps)
            torch.testing.assert_close(got[1].double(), exact[1], rtol=16 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_infinite_logits_are_no_worse_than_in_torch(device, smoothing, dtype):
    inf, nan = math.inf, math.nan
    rows = [
        [-inf, 1, 2],
        [-inf, -inf, 0],
        [inf, 0, 0],
        [inf, -inf, 0],
        [nan, 0, 0],
        [-inf, -inf, -inf],
        [inf, inf, 0],
    ]
    logits = torch.tensor([row for row in rows for _ in range(3)], dtype=dtype, device=device)
    target = torch.arange(3, device=device).repeat(len(rows))
    options = {"label_smoothing": smoothing}
    expected = gradients(torch_loss, logits, target, **options)
    for got in (gradients(of_logits, logits, target, **options), composed(logits, target, **options)):
        for ours, theirs in zip(got, expected, strict=True):
            known = ~theirs.isnan()
            torch.testing.assert_close(ours[known], theirs[known])
    # With smoothing every class has a share: the loss is infinite, and the gradient that of probability 0.
    got = gradients(of_logits, logits[:3], target[:3], **options)
    if smoothing > 0:
        assert got[0].eq(inf).all()
        assert got[1].isfinite().all()


@pytest.mark.parametrize("k", [4097, 200_000])
def test_many_classes(device, k):
    # Logits of one sign, of one size and of many: a plain sum in float32 would drift.
    target = torch.tensor([0, k // 2, k - 1], device=device)
    for logits in (torch.full((3, k), 0.1), torch.rand(3, k), torch.randn(3, k)):
        logits = logits.to(device)
        logits[:, 1] = 8
        options = {"label_smoothing": 0.1}
        exact = gradients(torch_loss, logits.double(), target, **options)
        loss, gradient = gradients(of_logits, logits, target, **options)
        plain = gradients(of_logits, logits, target)[0] - torch_loss(logits.double(), target)
        error = (loss - exact[0]).abs().max()
        assert error <= plain.abs().max() + 2e-5 * exact[0].abs().max()
        torch.testing.assert_close(gradient.double(), exact[1], rtol=1e-2, atol=1e-6)


@given(
    seed=st.integers(0, 2**31),
    e=st.integers(1, 4),
    b=st.integers(0, 20),
    k=st.integers(1, 9),
    smoothing=st.floats(0, 1),
    temperature=st.floats(0.1, 10),
    weighted=st.booleans(),
    own=st.booleans(),
)
def test_drawn(seed, e, b, k, smoothing, temperature, weighted, own):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=draw)

    x = normal(*([e] * own), b, 3)
    weights, biases = [normal(e, 5, 3), normal(e, k, 5)], [normal(e, 5), normal(e, k)]
    target = torch.randint(k, (e, b), generator=draw)
    weight = torch.randint(3, (e, b), generator=draw).double() if weighted else torch.ones(e, b).double()
    tensors = [t.requires_grad_() for t in (x, *weights, *biases)]
    options: dict[str, Any] = {"activation": "tanh"}
    output = pyens.ops.ensemble_mlp(x, weights, biases, **options)
    options |= {"loss": "cross_entropy", "temperature": temperature, "label_smoothing": smoothing}
    each = torch_loss(output.flatten(0, 1), target.flatten(), temperature, smoothing).view(e, b)
    expected = (each * weight).sum(1) / weight.sum(1).clamp_min(1)
    of_expected = torch.autograd.grad(expected.sum(), tensors)
    for function in (ensemble_mlp_loss, reference.ensemble_mlp_loss):
        got = function(x, target, weights, biases, sample_weight=weight if weighted else None, **options)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        found = torch.autograd.grad(got.sum(), tensors, create_graph=True)
        torch.testing.assert_close(list(found), list(of_expected), rtol=1e-9, atol=1e-9)
        again = torch.autograd.grad(got.sum(), tensors)
        torch.testing.assert_close(list(again), list(of_expected), rtol=1e-9, atol=1e-9)


def test_every_model_takes_it(device):
    options: dict[str, Any] = {"loss": "cross_entropy", "temperature": 0.5, "label_smoothing": 0.2}
    x, target = torch.randn(7, 4, device=device), torch.randint(3, (7,), device=device)
    columns = torch.randint(5, (7, 1), device=device)
    mlp = pyens.EnsembleMLP(2, 4, [6], 3, device=device)
    models: list[tuple[Any, tuple[Tensor, ...]]] = [
        (mlp, (x,)),
        (mlp.packed(), (x,)),
        (pyens.EnsembleLinear(2, 4, 3, device=device), (x,)),
        (nn.MaskedMLP(2, 4, [6], 3, scale=1.5, device=device), (x,)),
        (nn.TabularEnsemble(2, [(5, 2)], 4, [6], 3, device=device), (columns, x)),
    ]
    for model, inputs in models:
        expected = torch.stack(
            [F.cross_entropy(z / 0.5, target, label_smoothing=0.2) for z in model(*inputs)]
        )
        for loss in (model.loss, lambda *a, model=model, **o: nn.Ensemble.loss(model, *a, **o)):
            torch.testing.assert_close(loss(*inputs, target, **options), expected)
            with pytest.raises(
                ValueError, match=r": label_smoothing: expected a number from 0 to 1, got 1.5"
            ):
                loss(*inputs, target, **options | {"label_smoothing": 1.5})
            with pytest.raises(ValueError, match=r": label_smoothing: expected 0 .* with loss mse, got 0.2"):
                loss(*inputs, torch.randn(7, 3, device=device), loss="mse", label_smoothing=0.2)


def test_second_derivatives_of_the_masked_loss():
    masks = [torch.tensor([[True, True, False, True, False], [True, False, True, True, True]])]
    x, target = torch.randn(3, 3, dtype=torch.float64), torch.tensor([0, 1, 1])
    tensors = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), (2, 5), (5,), (2,))]

    def function(*parameters: Tensor) -> Tensor:
        return masked_mlp_loss(
            x,
            target,
            parameters[:2],
            parameters[2:],
            masks,
            loss="cross_entropy",
            activation="tanh",
            label_smoothing=0.3,
        )

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_autocast_computes_it_in_float32(device):
    x, target = torch.randn(20, 5, device=device), torch.randint(3, (20,), device=device)
    model = pyens.EnsembleMLP(2, 5, [6], 3, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        got = model.loss(x, target, loss="cross_entropy", label_smoothing=0.1)
    expected = model.to(torch.bfloat16).loss(x.bfloat16(), target, loss="cross_entropy", label_smoothing=0.1)
    assert got.dtype == torch.float32 and torch.equal(got, expected)
