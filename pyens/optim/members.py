"""What members have of their own in an optimizer of stacked parameters, and what it remembers of them."""

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class _OfMembers:
    """Numbers `[E]`, one for each member, that hooks of an optimizer read: the attribute `_name`."""

    _name: str

    def __init__(self, optimizer: torch.optim.Optimizer, numbers: Sequence[float] | Tensor) -> None:
        given = torch.as_tensor(numbers)
        setattr(self, self._name, given)
        if not bool((given.isfinite() & (given >= 0)).all()):
            raise ValueError(
                f"{type(self).__name__}: {self._name}: expected numbers from 0, got {given.tolist()}"
            )
        for parameter in _parameters(optimizer):
            self._of(parameter)  # raises where they do not fit
        self._order = next(_made)
        self._hooks = self._register(optimizer)
        _of_members.setdefault(optimizer, weakref.WeakSet()).add(self)

    def _register(self, optimizer: torch.optim.Optimizer) -> Sequence[Any]:
        raise NotImplementedError

    def remove(self) -> None:
        """Leaves the optimizer as it was."""
        for hook in self._hooks:
            hook.remove()
        for of_optimizer in _of_members.values():
            of_optimizer.discard(self)

    def _of(self, parameter: Tensor) -> Tensor:
        """The numbers as the parameter's first axis."""
        numbers = getattr(self, self._name)
        if numbers.dim() != 1 or parameter.shape[:1] != numbers.shape:
            raise ValueError(
                f"{type(self).__name__}: {self._name}: expected [E] for parameters [E, ...], got shape "
                f"{list(numbers.shape)} for a parameter of shape {list(parameter.shape)}"
            )
        of: Tensor = numbers.to(parameter).view(-1, *[1] * (parameter.dim() - 1))
        return of


_made = itertools.count()
# For keep_members and checkpoints, which are given the optimizer alone.
_of_members: "weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.WeakSet[_OfMembers]]" = (
    weakref.WeakKeyDictionary()
)


class MemberLearningRates(_OfMembers):
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

    _name = "factors"
    factors: Tensor

    def __init__(self, optimizer: torch.optim.Optimizer, factors: Sequence[float] | Tensor) -> None:
        self._before: list[Tensor] = []
        super().__init__(optimizer, factors)

    def _register(self, optimizer: torch.optim.Optimizer) -> Sequence[Any]:
        return (
            optimizer.register_step_pre_hook(self._keep),
            optimizer.register_step_post_hook(self._scale),
        )

    def _keep(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._before = [p.detach().clone() for p in _parameters(optimizer)]

    @torch.no_grad()
    def _scale(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for after, before in zip(_parameters(optimizer), self._before, strict=True):
            factor = self._of(after)
            # Single roundings, which are the same in every lane; lerp's differ between vectors and tails.
            scaled = before + factor * (after - before)
            after.copy_(torch.where(factor == 1, after, torch.where(factor == 0, before, scaled)))
        self._before = []


class MemberWeightDecay(_OfMembers):
    """Gives each member a weight decay of its own, for ensembles over hyperparameters.

    Before every `optimizer.step()`, for each member m of each parameter p that has a gradient,

        p[m] <- p[m] * (1 - lr * decays[m])

    with the learning rate of p's group: what AdamW does with `weight_decay=decays[m]`, beside any optimizer,
    whose own weight decay is then best 0. No member depends on another; a decay of 0 changes no bit. Beside
    `MemberLearningRates` make those first: their factors then scale the decay too, as a learning rate does.

    Args:
        optimizer: of stacked parameters `[E, ...]`, all of them.
        decays: `[E]`, at least 0. May be assigned to.

    Raises:
        ValueError: decays that are negative, not finite, or not one for each member of every parameter.

    Source: Wenzel et al., "Hyperparameter Ensembles for Robustness and Uncertainty Quantification".
    """

    _name = "decays"
    decays: Tensor

    def __init__(self, optimizer: torch.optim.Optimizer, decays: Sequence[float] | Tensor) -> None:
        super().__init__(optimizer, decays)

    def _register(self, optimizer: torch.optim.Optimizer) -> Sequence[Any]:
        return (optimizer.register_step_pre_hook(self._shrink),)

    @torch.no_grad()
    def _shrink(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and found_inf.item() != 0:
            return  # a step that GradScaler leaves out
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    lr = float(group["lr"])
                    parameter.mul_((1 - lr * self._of(parameter).double()).to(parameter.dtype))


def member_options(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """What the members of an optimizer have of their own, in the order in which it was given to them: the
    class that gives it, and a number for each member."""
    return [(type(own).__name__, getattr(own, own._name)) for own in numbers_of_members(optimizer)]


def load_member_options(optimizer: torch.optim.Optimizer, options: Sequence[tuple[str, Tensor]]) -> None:
    """Gives an optimizer what `member_options` took from one that was made alike.

    Raises:
        ValueError: another number of them, or of other classes.
    """
    own = numbers_of_members(optimizer)
    if [type(of).__name__ for of in own] != [name for name, _ in options]:
        expected = [type(of).__name__ for of in own]
        raise ValueError(f"load_member_options: options: expected {expected}, got {[n for n, _ in options]}")
    for of, (_, numbers) in zip(own, options, strict=True):
        setattr(of, of._name, numbers.clone())


def numbers_of_members(optimizer: torch.optim.Optimizer) -> list[_OfMembers]:
    return sorted(_of_members.get(optimizer, ()), key=lambda own: own._order)


def keep_members(
    optimizer: torch.optim.Optimizer, indices: Sequence[int] | Tensor, ensemble_size: int
) -> None:
    """Leaves all but some members behind, in what the optimizer remembers.

    The optimizer stays the same object, and so do its groups, schedulers, hooks, `MemberLearningRates` and
    `MemberWeightDecay`, whose numbers are those of the members that are kept. It does not touch parameters
    and gradients: take the same members of them, before or after, by `p.data = p.data[indices]` and
    `p.grad = None`. The members that are kept then train on bit for bit as they would have with the others
    beside them.

    Args:
        optimizer: of stacked parameters `[E, ...]`, all of them; plain or `fused`.
        indices: which members are kept, in this order.
        ensemble_size: E, how many members there are before.

    Raises:
        TypeError: indices that are no integers.
        ValueError: no such member, or something remembered whose first axis is not of E members.
    """
    kept = torch.as_tensor(indices)
    if kept.dim() != 1 or len(kept) == 0:
        raise ValueError(f"keep_members: indices: expected some members, got shape {list(kept.shape)}")
    if kept.dtype == torch.bool or kept.is_floating_point() or kept.is_complex():
        raise TypeError(f"keep_members: indices: expected integers, got {kept.dtype}")
    if kept.min() < 0 or kept.max() >= ensemble_size:
        raise ValueError(
            f"keep_members: indices: expected from 0 to {ensemble_size - 1}, got {kept.min()} to {kept.max()}"
        )
    new: list[tuple[dict[str, Any], str, Tensor]] = []
    for state in optimizer.state.values():
        for name, value in state.items():
            if (isinstance(value, Tensor) and value.dim() == 0) or isinstance(value, int | float | None):
                continue
            if not isinstance(value, Tensor) or len(value) != ensemble_size:
                got = list(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise ValueError(
                    f"keep_members: state[{name!r}]: expected {ensemble_size} members first, got {got}"
                )
            new.append((state, name, value.index_select(0, kept.to(value.device))))
    numbers: list[tuple[_OfMembers, Tensor]] = []
    for own in numbers_of_members(optimizer):
        present: Tensor = getattr(own, own._name)
        if len(present) != ensemble_size:
            raise ValueError(
                f"keep_members: {own._name}: expected one for each of {ensemble_size} members, "
                f"got {len(present)}"
            )
        numbers.append((own, present[kept.to(present.device)]))
    for state, name, value in new:
        state[name] = value
    for own, those in numbers:
        setattr(own, own._name, those)


def member_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What an optimizer of stacked parameters remembers: for each parameter a dict, its tensors `[E, ...]`.

    Members can be taken out of it: index the tensors that are not 0-dim. The tensors are the optimizer's own.
    """
    return [dict(optimizer.state.get(parameter, {})) for parameter in _parameters(optimizer)]


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
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != parameter.shape:
                raise ValueError(
                    f"load_member_state: states[{i}][{name!r}]: expected shape {list(parameter.shape)}, "
                    f"got {list(value.shape)}"
                )
    # A count of steps is on the parameter's device only where the optimizer wants it there, as in torch.
    counts_there = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for parameter, state in zip(parameters, states, strict=True):
        optimizer.state[parameter] = {
            name: value.to(parameter.device if value.dim() > 0 or counts_there else value.device, copy=True)
            if isinstance(value, Tensor)
            else value
            for name, value in state.items()
        }


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
