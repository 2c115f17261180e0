"""What `torch.optim` needs to train members as if each were alone."""

import functools
import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam

from pyens._kinds import REAL, check_number
from pyens.ops.clip_member_grad_norm import clip_member_grad_norm_ as clip_here
from pyens.ops.optimizers import adagrad_, adam_, sgd_

__all__ = [
    "MemberLearningRates",
    "MemberWeightDecay",
    "clip_member_grad_norm_",
    "fused",
    "keep_members",
    "load_member_options",
    "load_member_state",
    "member_options",
    "member_state",
]

SomeOptimizer = TypeVar("SomeOptimizer", bound=torch.optim.Optimizer)


def fused(
    kind: type[SomeOptimizer], parameters: Iterable[Tensor] | Iterable[dict[str, Any]], **options: Any
) -> SomeOptimizer:
    """`kind(parameters, fused=True, **options)` under which a member's bits do not depend on the others.

    torch's fused CPU optimizers round the last numbers of a tensor, those that do not fill a vector,
    differently from the others. So the bits of a member depend on where the tensor ends, that is on how many
    members there are. Here a kernel of our own makes the step, of a whole group at once, and rounds all
    numbers alike. Elsewhere than on the CPU torch does so itself, and makes the step.

    All else is as in torch: `param_groups` hold the parameters, so groups, schedulers, hooks, closures and
    `torch.amp.GradScaler` act on these and their gradients; `state` is torch's own, so `state_dict` goes to
    and from a plain `kind`, fused or not.

    Args:
        kind: Adam, AdamW, Adagrad or SGD of `torch.optim`.
        parameters: stacked parameters `[E, ...]`, contiguous, or groups of them as torch takes them: float32,
            float64, bfloat16 or float16. The 16-bit ones and their state are computed with in float32, and
            rounded once.
        options: of the optimizer, but for `fused`.

    It can be pickled and copied, together with the parameters; hooks are left behind, as in torch.

    Raises:
        TypeError: another kind, one with a step of its own, or a parameter that is no tensor or of another
            dtype.
        ValueError: a parameter that is not contiguous, that is computed from others, or given twice; in a
            step a sparse gradient, or state of another shape than its parameter's.
    """
    plain: Any = kind
    if not any(isinstance(kind, type) and issubclass(kind, base) for base in _UPDATES):
        raise TypeError(f"fused: kind: expected Adam, AdamW, Adagrad or SGD of torch.optim, got {kind!r}")
    if all(inspect.unwrap(plain.step) is not inspect.unwrap(base.step) for base in _UPDATES):
        raise TypeError(f"fused: kind: expected the step of torch's own class, got another one in {kind!r}")
    optimizer: SomeOptimizer = _fused(plain)(parameters, fused=True, **options)
    return optimizer


@functools.cache
def _fused(kind: Any) -> Any:
    # Within the hooks, which are around our own step.
    step_of_kind = inspect.unwrap(kind.step)
    update: Update = next(update for base, update in _UPDATES.items() if issubclass(kind, base))

    class Fused(kind):  # type: ignore[misc]
        _step_supports_amp_scaling = True
        param_groups: list[dict[str, Any]]

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            with torch.no_grad():
                # A GradScaler that did not unscale the gradients leaves these to the step.
                scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
                skipped = found_inf is not None and found_inf.item() != 0
                scale = None if scale is None else scale.item()
                elsewhere = []
                for group in self.param_groups:
                    parameters = [p for p in group["params"] if p.grad is not None]
                    here = [p for p in parameters if p.is_cpu]
                    if here and not skipped:
                        update(self, group, here, _gradients(here), scale)
                    if len(here) < len(parameters):
                        elsewhere.append(group | {"params": [p for p in parameters if not p.is_cpu]})
                if elsewhere:
                    groups, self.param_groups = self.param_groups, elsewhere
                    try:
                        step_of_kind(self)
                    finally:
                        self.param_groups = groups
            return loss

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            if isinstance(param_group, dict) and not isinstance(param_group["params"], set):
                given = param_group["params"]
                param_group["params"] = [given] if isinstance(given, Tensor) else list(given)
                _check_parameters(param_group["params"])
            super().add_param_group(param_group)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            # An optimizer that is not fused says so in its groups; this one stays what it is.
            groups = [group | {"fused": True, "foreach": None} for group in state_dict["param_groups"]]
            super().load_state_dict(state_dict | {"param_groups": groups})

        def __reduce__(self) -> tuple[Any, ...]:
            return _blank, (kind,), self.__getstate__()

    Fused.__name__ = Fused.__qualname__ = kind.__name__
    return Fused


def _blank(kind: Any) -> Any:
    return object.__new__(_fused(kind))


def _check_parameters(parameters: list[Any]) -> None:
    place: dict[Tensor, int] = {}
    for i, named in enumerate(parameters):
        parameter = named[1] if isinstance(named, tuple) else named
        if not isinstance(parameter, Tensor):
            raise TypeError(f"fused: parameters[{i}]: expected a tensor, got a {type(parameter).__name__}")
        if parameter.dtype not in REAL:
            expected = "float32, float64, bfloat16 or float16"
            raise TypeError(f"fused: parameters[{i}]: expected {expected}, got {parameter.dtype}")
        if not parameter.is_contiguous():
            raise ValueError(f"fused: parameters[{i}]: expected contiguous, got strides {parameter.stride()}")
        if not parameter.is_leaf:
            raise ValueError(f"fused: parameters[{i}]: expected a leaf, got what is computed from others")
        if place.setdefault(parameter, i) != i:
            raise ValueError(
                f"fused: parameters[{i}]: expected each parameter once, "
                f"got parameters[{place[parameter]}] again"
            )


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    gradients: list[Any] = [p.grad for p in parameters]
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            raise ValueError(f"fused: gradient: expected dense, got {gradient.layout}")
    return gradients


# A step of parameters of a group that are on the CPU; their gradients are divided by the last argument.
Update = Callable[[Any, dict[str, Any], list[Tensor], list[Tensor], float | None], None]


def _adam(optimizer: Any, group: Any, parameters: Any, gradients: Any, scale: float | None) -> None:
    states, (beta1, beta2) = _states(optimizer, group, parameters, 6), group["betas"]
    adam_(
        parameters,
        gradients,
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else [],
        [s["step"] for s in states],
        scale,
        float(group["lr"]),
        float(beta1),
        float(beta2),
        group["eps"],
        float(group["weight_decay"]),
        group["decoupled_weight_decay"],
        group["maximize"],
    )


def _adagrad(optimizer: Any, group: Any, parameters: Any, gradients: Any, scale: float | None) -> None:
    states = _states(optimizer, group, parameters, 4)
    adagrad_(
        parameters,
        gradients,
        [s["sum"] for s in states],
        [s["step"] for s in states],
        scale,
        float(group["lr"]),
        group["lr_decay"],
        group["eps"],
        float(group["weight_decay"]),
        group["maximize"],
    )


def _sgd(optimizer: Any, group: Any, parameters: Any, gradients: Any, scale: float | None) -> None:
    momentum = group["momentum"]
    options = group["dampening"], float(group["weight_decay"]), group["nesterov"], group["maximize"]
    if momentum == 0:
        sgd_(parameters, gradients, [], scale, float(group["lr"]), momentum, *options, False)
        return
    states = [optimizer.state[p] for p in parameters]
    begins = [state.get("momentum_buffer") is None for state in states]
    for first in {*begins}:  # all or none, unless the gradient of one came later
        chosen = [i for i, begin in enumerate(begins) if begin == first]
        of = [parameters[i] for i in chosen]
        buffers = (
            [torch.empty_like(p) for p in of] if first else [states[i]["momentum_buffer"] for i in chosen]
        )
        sgd_(
            of, [gradients[i] for i in chosen], buffers, scale, float(group["lr"]), momentum, *options, first
        )
        for i, buffer in zip(chosen, buffers, strict=True):
            states[i]["momentum_buffer"] = buffer


_UPDATES: dict[Any, Update] = {Adam: _adam, Adagrad: _adagrad, SGD: _sgd}


def _states(
    optimizer: Any, group: dict[str, Any], parameters: list[Tensor], lists: int
) -> list[dict[str, Tensor]]:
    """What is remembered of each. What is missing torch makes, which adds it to so many lists too."""
    states = [optimizer.state[p] for p in parameters]
    if not all(states):
        new = [p for p, state in zip(parameters, states, strict=True) if not state]
        optimizer._init_group(group | {"params": new}, *([] for _ in range(lists)))
    return states


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
    return [(type(own).__name__, getattr(own, own._name)) for own in _own(optimizer)]


def load_member_options(optimizer: torch.optim.Optimizer, options: Sequence[tuple[str, Tensor]]) -> None:
    """Gives an optimizer what `member_options` took from one that was made alike.

    Raises:
        ValueError: another number of them, or of other classes.
    """
    own = _own(optimizer)
    if [type(of).__name__ for of in own] != [name for name, _ in options]:
        expected = [type(of).__name__ for of in own]
        raise ValueError(f"load_member_options: options: expected {expected}, got {[n for n, _ in options]}")
    for of, (_, numbers) in zip(own, options, strict=True):
        setattr(of, of._name, numbers.clone())


def _own(optimizer: torch.optim.Optimizer) -> list[_OfMembers]:
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
    for own in _own(optimizer):
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


def clip_member_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` of each member: scales its gradients where their norm is too large.

    With n[m] the norm of all gradients of member m together,

        p.grad[m] <- p.grad[m] * min(1, max_norm / (n[m] + 1e-6))

    A member's bits do not depend on the others, nor does a NaN or Inf in one of them reach another: its own
    gradients are then what torch makes of them, NaN for a norm of NaN, zeros and NaN for one of Inf. No
    square overflows or vanishes on the way to a norm.

    Args:
        parameters: stacked parameters `[E, ...]`; those without a gradient are left out.
        max_norm: the largest norm that a member may have.
        norm_type: 1, 2 or inf.
        error_if_nonfinite: raise, and change nothing, where a member's norm is NaN or Inf.

    Returns:
        The norms before clipping, `[E]`, in the gradients' type, float32 at least; `[0]` without a gradient.

    Raises:
        RuntimeError: see `error_if_nonfinite`.
        ValueError: a `max_norm` below 0 or NaN, another `norm_type`, gradients of different numbers of
            members, or sparse.
    """
    if norm_type not in (1, 2, math.inf):
        raise ValueError(f"clip_member_grad_norm_: norm_type: expected 1, 2 or inf, got {norm_type!r}")
    check_number("clip_member_grad_norm_", "max_norm", max_norm)
    if not max_norm >= 0:
        raise ValueError(f"clip_member_grad_norm_: max_norm: expected a number from 0, got {max_norm}")
    gradients: list[Tensor] = []
    for i, parameter in enumerate([parameters] if isinstance(parameters, Tensor) else parameters):
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.layout != torch.strided:
            raise ValueError(
                f"clip_member_grad_norm_: parameters[{i}].grad: expected dense, got {gradient.layout}"
            )
        if gradient.dim() == 0 or (gradients and len(gradient) != len(gradients[0])):
            expected = f"[{len(gradients[0])}, ...]" if gradients else "[E, ...]"
            raise ValueError(
                f"clip_member_grad_norm_: parameters[{i}].grad: expected {expected}, "
                f"got shape {list(gradient.shape)}"
            )
        gradients.append(gradient)
    if not gradients:
        return torch.zeros(0)
    if all(g.is_cpu and g.dtype in REAL for g in gradients):
        return clip_here(gradients, float(max_norm), float(norm_type), error_if_nonfinite)
    with torch.no_grad():
        gradients = [g.detach() for g in gradients]
        norms = _member_norms(gradients, norm_type)
        if error_if_nonfinite and not norms.isfinite().all():
            raise RuntimeError(
                f"clip_member_grad_norm_: expected finite norms, got {norms[~norms.isfinite()].tolist()} for "
                f"members {(~norms.isfinite()).nonzero().flatten().tolist()}"
            )
        factors = (max_norm / (norms + 1e-6)).clamp_(max=1.0)
        of_type = {g.dtype: factors.to(g.dtype) for g in gradients}
        torch._foreach_mul_(gradients, [of_type[g.dtype].view(-1, *[1] * (g.dim() - 1)) for g in gradients])
    kind = functools.reduce(torch.promote_types, {g.dtype for g in gradients}, torch.float32)
    return norms.to(kind)


def _member_norms(gradients: list[Tensor], norm_type: float) -> Tensor:
    """Each member's norm in float64, `[E]`."""
    rows = [g.reshape(len(g), math.prod(g.shape[1:])) for g in gradients]
    norms = _added_up(rows, norm_type)
    # Where squares may have left the range of numbers, which each member finds by itself: once more, from
    # gradients divided by their largest.
    safe = (norms > 1e-12) & (norms < 1e15)
    if norm_type == math.inf or safe.all():
        return norms
    odd = [row[~safe].to(torch.promote_types(row.dtype, torch.float32)) for row in rows]
    largest = _added_up(odd, math.inf)
    by = torch.where(largest == 0, 1, largest)[:, None]
    own = largest * _added_up([row / by.to(row) for row in odd], norm_type)
    norms[~safe] = torch.where(largest.isinf(), math.inf, own)
    return norms


def _added_up(rows: list[Tensor], norm_type: float) -> Tensor:
    """The norm of each row over all of `[E, *]`; its bits depend on this row alone."""
    norms = []
    for row in rows:
        if norm_type == math.inf:
            norms.append(row.abs().amax(1) if row.shape[1] else row.new_zeros(len(row)))
            continue
        # torch adds up rows one by one, the same way however many there are, unless there is one alone.
        several = row.contiguous() if row.shape[0] > 1 else row.contiguous().expand(2, -1)
        kind = torch.promote_types(row.dtype, torch.float32)
        norms.append(torch.linalg.vector_norm(several, norm_type, dim=1, dtype=kind)[: row.shape[0]])
    of_each = torch.stack([norm.double() for norm in norms])
    if norm_type == math.inf:
        return of_each.amax(0)
    first, *others = (of_each * of_each if norm_type == 2 else of_each).unbind()
    total = functools.reduce(torch.add, others, first)
    return total.sqrt() if norm_type == 2 else total


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
