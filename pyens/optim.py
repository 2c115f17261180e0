"""What `torch.optim` needs to train members as if each were alone."""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# torch's widest vectors hold 64 bytes: 16 numbers of float32, more of the shorter types.
_VECTOR = 64

SomeOptimizer = TypeVar("SomeOptimizer", bound=torch.optim.Optimizer)


def fused(kind: type[SomeOptimizer], parameters: Iterable[Tensor], **options: Any) -> SomeOptimizer:
    """`kind(parameters, fused=True, **options)` under which a member's bits do not depend on the others.

    torch's fused CPU optimizers round the last numbers of a tensor, too few to fill a vector, in another way
    than those before them, so the last bits of a member depend on where the tensor ends: on how many members
    there are. Here the optimizer sees each parameter without that rest, as a view of the same memory, and the
    rest as the beginning of a vector of its own. Speed and memory are those of the fused optimizer.

    Args:
        kind: Adam, AdamW, Adagrad or SGD of `torch.optim`, or another that takes `fused=True`.
        parameters: stacked parameters `[E, ...]`, contiguous, of one group.
        options: of the optimizer, but for `fused`.

    Returns:
        The optimizer. Its `zero_grad` and `step` act on `parameters`; its `param_groups` and `state` hold the
        views, so its `state_dict` loads into an optimizer that was made in the same way. Gradients must be
        dense and contiguous, as those of pyens are.

    Raises:
        ValueError: a parameter that is not contiguous, or a sparse gradient in a step.
    """
    owners = list(parameters)
    for i, owner in enumerate(owners):
        if not owner.is_contiguous():
            raise ValueError(f"fused: parameters[{i}]: expected contiguous, got strides {owner.stride()}")
    views = [_Views(owner) for owner in owners]

    class Fused(kind):  # type: ignore[misc, valid-type]
        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad(set_to_none=True)
            for owner in owners:
                if set_to_none or owner.grad is None:
                    owner.grad = None
                else:
                    owner.grad.detach_().zero_()

    Fused.__name__ = Fused.__qualname__ = kind.__name__
    optimizer = Fused([v for view in views for v in view.all], fused=True, **options)

    def before_step(*_: Any) -> None:
        for view in views:
            view.take()

    def after_step(*_: Any) -> None:
        for view in views:
            view.give_back()

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)
    return optimizer


class _Views:
    """A parameter as the optimizer sees it: whole vectors of it where they lie, and a copy of the rest."""

    def __init__(self, owner: Tensor) -> None:
        self.owner = owner
        self.whole = owner.numel() - owner.numel() % (_VECTOR // min(owner.element_size(), 4))
        self.body = nn.Parameter(self._flat()[: self.whole])
        self.rest = nn.Parameter(owner.new_zeros(_VECTOR // min(owner.element_size(), 4)))
        self.all = [self.body] * (self.whole > 0) + [self.rest] * (self.whole < owner.numel())

    def _flat(self) -> Tensor:
        return self.owner.detach().view(-1)

    @torch.no_grad()
    def take(self) -> None:
        # The owner's memory may be another by now (`module.to`, assignment to `.data`).
        rest = self.owner.numel() - self.whole
        self.body.data = self._flat()[: self.whole]
        self.rest[:rest] = self._flat()[self.whole :]
        grad = self.owner.grad
        if grad is None:
            self.body.grad = self.rest.grad = None
            return
        if grad.layout != torch.strided:
            raise ValueError(f"fused: gradient: expected dense, got {grad.layout}")
        flat = grad.contiguous().view(-1)
        self.body.grad = flat[: self.whole]
        self.rest.grad = torch.zeros_like(self.rest)
        self.rest.grad[:rest] = flat[self.whole :]

    @torch.no_grad()
    def give_back(self) -> None:
        self._flat()[self.whole :] = self.rest[: self.owner.numel() - self.whole]
        self.body.grad = self.rest.grad = None
