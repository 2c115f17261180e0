"""Gradients of pyens.ops.ensemble_mlp_loss: first and second, those that are needed, a training run."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_problems import NO_OPTIONS, SMOOTHED, Problem, cast, differentiable, problem, rms, with_gradients
from torch import Tensor

from pyens import reference
from pyens.ops import ensemble_mlp_loss

# --- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "silu"])
@pytest.mark.parametrize("per_member", [False, True])
def test_first_and_second_derivatives(device, loss, smoothing, activation, per_member):
    weighted = {"relu": None, "tanh": "own", "gelu": "shared", "silu": None}[activation]
    arguments = problem(
        2,
        3,
        [2, 3, 2],
        loss,
        device=device,
        activation=activation,
        per_member=per_member,
        weighted=weighted,
        smoothing=smoothing,
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


@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
@pytest.mark.parametrize("per_member", [False, True])
def test_a_penalty_on_the_gradient(device, loss, smoothing, per_member):
    # create_graph through the loss, in float32, against the reference: the first gradient and the second.
    def penalty(function: Callable[..., Tensor], arguments: Problem) -> list[Tensor]:
        arguments = cast(arguments, arguments["input"].dtype, device)
        tensors = [t.requires_grad_() for t in differentiable(arguments)]
        first = torch.autograd.grad(function(**arguments).square().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
        return [t.detach() for t in first] + list(second)

    arguments = problem(
        3,
        33,
        [5, 8, 3],
        loss,
        torch.float32,
        device,
        per_member=per_member,
        weighted="own",
        smoothing=smoothing,
    )
    arguments |= {"dropout": 0.5, "dropout_seeds": torch.tensor([1, 2, 3], device=device)}
    got = penalty(ensemble_mlp_loss, arguments)
    exact = penalty(reference.ensemble_mlp_loss, cast(arguments, torch.float64, device))
    for ours, theirs in zip(got, exact, strict=True):
        assert rms(ours - theirs) <= 2e-6 * rms(theirs)


@pytest.mark.parametrize("per_member", [False, True])
def test_only_gradients_that_are_needed_are_computed(per_member):
    arguments = problem(2, 30, [5, 8, 3], "mse", torch.float32, per_member=per_member)
    tensors = differentiable(arguments)
    whole = with_gradients(ensemble_mlp_loss, arguments)[1:]
    given = (
        arguments["input"],
        arguments["target"],
        arguments["weights"],
        arguments["biases"],
        [],
        [],
        None,
    )
    options = ("mse", 1.0, 0.0, None, *NO_OPTIONS, "tanh")
    for needs_grad in itertools.product((False, True), repeat=5):
        _, found = torch.ops.pyens.ensemble_mlp_loss_with_gradients(*given, list(needs_grad), *options)
        assert len(found) == sum(needs_grad)
        expected = [gradient for gradient, needed in zip(whole, needs_grad, strict=True) if needed]
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)
        for tensor, needed in zip(tensors, needs_grad, strict=True):
            tensor.grad = None
            tensor.requires_grad_(needed)
        loss = ensemble_mlp_loss(**arguments)
        assert loss.requires_grad == any(needs_grad)
        if any(needs_grad):
            loss.sum().backward()
        for tensor, gradient, needed in zip(tensors, whole, needs_grad, strict=True):
            assert torch.equal(tensor.grad, gradient) if needed else tensor.grad is None


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
