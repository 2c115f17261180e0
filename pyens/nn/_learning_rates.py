"""A learning rate for each member, under optimizers that know only one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class MemberLearningRates:
    """Multiplies the optimizer's learning rate by a factor of each member's own.

    After every `optimizer.step()`, for each member m of each parameter p,

        p[m] <- p_before[m] + factors[m] * (p[m] - p_before[m])

    which is what the optimizer does with learning rate `lr * factors[m]` (to rounding) wherever its step is
    proportional to the learning rate: all of `torch.optim` but ASGD, LBFGS and Rprop. No member depends on
    another. A factor of 1 changes no bit; with a factor of 0 a member stays as it is, while the optimizer's
    averages of its gradients run on. Costs a copy of the parameters during the step.

    Args:
        optimizer: of stacked parameters `[E, ...]`, all of them.
        factors: `[E]`. Assign to `factors`, whole or in part, for a schedule or to stop a member early.

    Raises:
        ValueError: factors that are not one for each member of every parameter.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factors: Sequence[float] | Tensor) -> None:
        self.factors = torch.as_tensor(factors)
        self._before: list[Tensor] = []
        for parameter in _parameters(optimizer):
            self._factors_of(parameter)  # raises where they do not fit
        self._hooks = (
            optimizer.register_step_pre_hook(self._keep),
            optimizer.register_step_post_hook(self._scale),
        )

    def remove(self) -> None:
        """Leaves the optimizer as it was."""
        for hook in self._hooks:
            hook.remove()

    def _factors_of(self, parameter: Tensor) -> Tensor:
        if self.factors.dim() != 1 or parameter.shape[:1] != self.factors.shape:
            raise ValueError(
                f"MemberLearningRates: factors: expected [E] for parameters [E, ...], got shape "
                f"{list(self.factors.shape)} for a parameter of shape {list(parameter.shape)}"
            )
        return self.factors.to(parameter).view(-1, *[1] * (parameter.dim() - 1))

    def _keep(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._before = [p.detach().clone() for p in _parameters(optimizer)]

    @torch.no_grad()
    def _scale(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for after, before in zip(_parameters(optimizer), self._before, strict=True):
            factor = self._factors_of(after)
            # Single roundings, which are the same in every lane; lerp's differ between vectors and tails.
            scaled = before + factor * (after - before)
            after.copy_(torch.where(factor == 1, after, torch.where(factor == 0, before, scaled)))
        self._before = []


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
