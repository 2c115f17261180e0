"""Steps of Adam, AdamW, Adagrad and SGD in plain PyTorch, in place, one parameter after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor


def adam_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    grad_scale: float | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> None:
    """With `max_exp_avg_sqs`, one for each parameter or none, amsgrad; decoupled weight decay is AdamW's."""
    coupled = 0.0 if decoupled_weight_decay else weight_decay
    for i, x in enumerate(parameters):
        g = _gradient(x, gradients[i], grad_scale, coupled, maximize)
        step = steps[i].add_(1).item()
        m, v = exp_avgs[i], exp_avg_sqs[i]
        m.lerp_(g, 1 - beta1)
        v.copy_(beta2 * v + (1 - beta2) * g.square())
        if max_exp_avg_sqs:
            v = max_exp_avg_sqs[i].copy_(torch.maximum(max_exp_avg_sqs[i], v))
        m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
        if decoupled_weight_decay:
            x.copy_(x * (1 - lr * weight_decay))
        x.copy_(x - lr * m_hat / (v_hat.sqrt() + eps))


def adagrad_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    sums: Sequence[Tensor],
    steps: Sequence[Tensor],
    grad_scale: float | None,
    lr: float,
    lr_decay: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    for i, x in enumerate(parameters):
        g = _gradient(x, gradients[i], grad_scale, weight_decay, maximize)
        step = steps[i].add_(1).item()
        sums[i].copy_(sums[i] + g.square())
        x.copy_(x - lr / (1 + (step - 1) * lr_decay) * g / (sums[i].sqrt() + eps))


def sgd_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    grad_scale: float | None,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    begins: bool,
) -> None:
    """Without momentum there are no buffers. `begins`: they become the gradients, whatever they hold."""
    for i, x in enumerate(parameters):
        g = _gradient(x, gradients[i], grad_scale, weight_decay, maximize)
        if momentum != 0:
            b = momentum_buffers[i]
            b.copy_(g if begins else momentum * b + (1 - dampening) * g)
            g = g + momentum * b if nesterov else b
        x.copy_(x - lr * g)


def _gradient(
    x: Tensor, gradient: Tensor, grad_scale: float | None, weight_decay: float, maximize: bool
) -> Tensor:
    """What the step goes by; the gradient itself is unscaled for good."""
    if grad_scale is not None:
        gradient.copy_(gradient / grad_scale)
    g = -gradient if maximize else gradient
    return g if weight_decay == 0 else g + weight_decay * x
