"""What `torch.optim` needs to train members as if each were alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["MemberLearningRates", "fused", "load_member_state", "member_state"]

# torch's widest vectors hold 64 bytes: 16 numbers of float32, more of the shorter types.
_VECTOR = 64

SomeOptimizer = TypeVar("SomeOptimizer", bound=torch.optim.Optimizer)


def fused(kind: type[SomeOptimizer], parameters: Iterable[Tensor], **options: Any) -> SomeOptimizer:
    """`kind(parameters, fused=True, **options)` under which a member's bits do not depend on the others.

    torch's fused CPU optimizers round the last numbers of a tensor, those that do not fill a vector,
    differently from the others. So the bits of a member depend on where the tensor ends, that is on how many
    members there are. Here the optimizer sees each parameter as a view without these last numbers, and them
    as the beginning of a vector of its own. Speed and memory are those of the fused optimizer.

    Args:
        kind: Adam, AdamW, Adagrad or SGD of `torch.optim`, or another that takes `fused=True`.
        parameters: stacked parameters `[E, ...]`, contiguous, of one group.
        options: of the optimizer, but for `fused`.

    Returns:
        The optimizer. Its `zero_grad` and `step` act on `parameters`; its `param_groups` and `state` hold the
        views, so its `state_dict` loads into an optimizer that was made in the same way.

    It can be pickled and copied, together with the parameters; hooks are left behind, as in torch.

    Raises:
        TypeError: a group of parameters, or something else that is no tensor.
        ValueError: a parameter that is not contiguous, that is computed from others, or given twice; in a
            step a sparse gradient, or a closure.
    """
    owners = list(parameters)
    place: dict[Tensor, int] = {}
    for i, owner in enumerate(owners):
        if not isinstance(owner, Tensor):
            raise TypeError(f"fused: parameters[{i}]: expected a tensor, got a {type(owner).__name__}")
        if not owner.is_contiguous():
            raise ValueError(f"fused: parameters[{i}]: expected contiguous, got strides {owner.stride()}")
        if not owner.is_leaf:
            raise ValueError(f"fused: parameters[{i}]: expected a leaf, got what is computed from others")
        if place.setdefault(owner, i) != i:
            raise ValueError(
                f"fused: parameters[{i}]: expected each parameter once, got parameters[{place[owner]}] again"
            )
    views = [_Views(owner) for owner in owners]

    class Fused(kind):  # type: ignore[misc, valid-type]
        # For the functions below: what the caller calls parameters, and how the optimizer sees each of them.
        members = owners
        pieces: ClassVar = {owner: view.all for owner, view in zip(owners, views, strict=True)}

        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad(set_to_none=True)
            for owner in owners:
                if set_to_none or owner.grad is None:
                    owner.grad = None
                else:
                    owner.grad.detach_().zero_()

        def __reduce__(self) -> tuple[Any, ...]:
            # Views and hooks are made anew: a copy of them would no longer be of the parameters.
            return _again, (kind, owners, options, self.state_dict())

    Fused.__name__ = Fused.__qualname__ = kind.__name__
    optimizer = Fused([v for view in views for v in view.all], fused=True, **options)

    def before_step(_: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The instance comes first. A closure would make its gradients when they have been taken already.
        if any(closure is not None for closure in (*args[1:], *kwargs.values())):
            raise ValueError("fused: step: expected no closure, got one")
        for view in views:
            view.take()

    def after_step(*_: Any) -> None:
        for view in views:
            view.give_back()

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)
    return optimizer


def _again(
    kind: type[torch.optim.Optimizer],
    parameters: list[Tensor],
    options: dict[str, Any],
    state: dict[str, Any],
) -> torch.optim.Optimizer:
    optimizer = fused(kind, parameters, **options)
    optimizer.load_state_dict(state)
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
        if rest:
            self.rest.grad = torch.zeros_like(self.rest)
            self.rest.grad[:rest] = flat[self.whole :]

    @torch.no_grad()
    def give_back(self) -> None:
        self._flat()[self.whole :] = self.rest[: self.owner.numel() - self.whole]
        self.body.grad = self.rest.grad = None


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


def member_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What an optimizer of stacked parameters remembers: for each parameter a dict, its tensors `[E, ...]`.

    Unlike `state_dict` it has no trace of how `fused` cuts the parameters up, so members can be taken out of
    it: index the tensors that are not 0-dim. Tensors may share memory with the optimizer's.
    """
    states = []
    for parameter in _parameters(optimizer):
        pieces = _pieces(optimizer, parameter)
        remembered = [optimizer.state.get(piece, {}) for piece in pieces]
        state = {}
        for name, value in remembered[0].items():
            if isinstance(value, Tensor) and value.shape == pieces[0].shape and pieces[0] is not parameter:
                flat = torch.cat([memory[name] for memory in remembered])
                value = flat[: parameter.numel()].view(parameter.shape)
            state[name] = value
        states.append(state)
    return states


def load_member_state(optimizer: torch.optim.Optimizer, states: Sequence[Mapping[str, Any]]) -> None:
    """Gives an optimizer a copy of what `member_state` took from one of the same kind, members chosen or not.

    Raises:
        ValueError: not one state for each parameter, or tensors that do not fit the parameters.
    """
    parameters = _parameters(optimizer)
    if len(states) != len(parameters):
        raise ValueError(
            f"load_member_state: states: expected one for each of {len(parameters)} parameters, "
            f"got {len(states)}"
        )
    for i, (parameter, state) in enumerate(zip(parameters, states, strict=True)):
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[:1] != parameter.shape[:1]:
                raise ValueError(
                    f"load_member_state: states[{i}][{name!r}]: expected {parameter.shape[0]} members first, "
                    f"got shape {list(value.shape)}"
                )
        pieces, start = _pieces(optimizer, parameter), 0
        for piece in pieces:
            optimizer.state[piece] = {
                name: _piece(_there(value, optimizer, parameter), parameter, piece, start)
                if isinstance(value, Tensor)
                else value
                for name, value in state.items()
            }
            start += piece.numel()


def _there(value: Tensor, optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """On the parameter's device; a count of steps only where the optimizer wants it there, as in torch."""
    groups = optimizer.param_groups
    counts_there = any(group.get("fused") or group.get("capturable") for group in groups)
    return value.to(parameter.device) if value.dim() > 0 or counts_there else value


def _pieces(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """The tensors that stand for a parameter inside the optimizer; together they may be longer than it."""
    pieces = getattr(optimizer, "pieces", None)
    return [parameter] if pieces is None else pieces[parameter]


def _piece(value: Tensor, parameter: Tensor, piece: Tensor, start: int) -> Tensor:
    """A copy of the part of a parameter's state that belongs to one of its pieces."""
    if piece is parameter or value.shape != parameter.shape:
        return value.clone()
    part = value.new_zeros(piece.shape)
    there = value.reshape(-1)[start : start + piece.numel()]
    part[: there.numel()] = there
    return part


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    own = getattr(optimizer, "members", None)
    return own or [p for group in optimizer.param_groups for p in group["params"]]
