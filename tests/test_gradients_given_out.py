"""What a backward pass returns is its caller's: to change in place, to ask for again, also in batches."""

import pytest
import torch
from torch import Tensor

from pyens import ops


def problem() -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    weights = [torch.randn(3, 5, 4).requires_grad_(), torch.randn(3, 2, 5).requires_grad_()]
    biases = [torch.randn(3, 5).requires_grad_(), torch.randn(3, 2).requires_grad_()]
    return torch.randn(7, 4), torch.randn(7, 2), weights, biases


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_gradient_of_the_loss_may_be_changed_in_place(scale):
    x, y, weights, biases = problem()
    loss = scale * ops.ensemble_mlp_loss(x, y, weights, biases, loss="mse").sum()
    first = torch.autograd.grad(loss, [*weights, *biases], retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.mul_(0)  # as a hook clips or masks
    second = torch.autograd.grad(loss, [*weights, *biases])
    assert all(torch.equal(a, b) for a, b in zip(second, kept, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in second)


@pytest.mark.parametrize("own_input", [False, True])
@pytest.mark.parametrize("operation", ["ensemble_mlp", "ensemble_mlp_loss"])
def test_gradients_in_batches(operation, own_input):
    x, y, weights, biases = problem()
    x = (x.expand(3, -1, -1).clone() if own_input else x).requires_grad_()
    leaves = [x, *weights, *biases]
    if operation == "ensemble_mlp":
        output = ops.ensemble_mlp(x, weights, biases, activation="tanh")
    else:
        output = ops.ensemble_mlp_loss(x, y, weights, biases, loss="mse", activation="tanh")
    from_above = torch.randn(4, *output.shape)
    batched = torch.autograd.grad(output, leaves, from_above, retain_graph=True, is_grads_batched=True)
    for i, one in enumerate(from_above):
        single = torch.autograd.grad(output, leaves, one, retain_graph=True)
        for ours, theirs in zip(batched, single, strict=True):
            torch.testing.assert_close(ours[i], theirs)


def test_vectorized_jacobian():
    x, y, weights, biases = problem()

    def loss(weight: Tensor) -> Tensor:
        return ops.ensemble_mlp_loss(x, y, [weight, weights[1]], biases, loss="mse")

    found = torch.autograd.functional.jacobian(loss, weights[0], vectorize=True)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(loss, weights[0]))
