"""What `torch.optim` needs to train members as if each were alone."""

import functools
import inspect
import math
import operator
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam

__all__ = [
    "MemberLearningRates",
    "MemberWeightDecay",
    "clip_member_grad_norm_",
    "fused",
    "keep_members",
    "load_member_state",
    "member_options",
    "member_state",
]

# torch's widest vectors hold 64 bytes: 16 numbers of float32, more of the shorter types.
_VECTOR = 64
# Tensors of fewer numbers are cheaper to copy than to give to the kernel one by one.
_SMALL = 8192

SomeOptimizer = TypeVar("SomeOptimizer", bound=torch.optim.Optimizer)


def fused(
    kind: type[SomeOptimizer], parameters: Iterable[Tensor] | Iterable[dict[str, Any]], **options: Any
) -> SomeOptimizer:
    """`kind(parameters, fused=True, **options)` under which a member's bits do not depend on the others.

    torch's fused CPU optimizers round the last numbers of a tensor, those that do not fill a vector,
    differently from the others. So the bits of a member depend on where the tensor ends, that is on how many
    members there are. Here torch's kernel sees small tensors as one that is filled up to whole vectors, and
    the ends of large tensors a second time in it; what it made of them there counts.

    All else is as in torch: `param_groups` hold the parameters, so groups, schedulers, hooks, closures and
    `torch.amp.GradScaler` act on these and their gradients; `state` holds tensors of a parameter's shape, so
    `state_dict` goes to and from a plain `kind`, fused or not.

    Args:
        kind: Adam, AdamW, Adagrad or SGD of `torch.optim`.
        parameters: stacked parameters `[E, ...]`, contiguous, or groups of them as torch takes them.
        options: of the optimizer, but for `fused`.

    It can be pickled and copied, together with the parameters; hooks are left behind, as in torch. A step
    may move what `state` holds into other tensors, as `load_state_dict` does.

    Raises:
        TypeError: another kind, or a parameter that is no tensor.
        ValueError: a parameter that is not contiguous, that is computed from others, or given twice; in a
            step a sparse gradient, or state of another shape than its parameter's.
    """
    if not (isinstance(kind, type) and issubclass(kind, (Adam, Adagrad, SGD))):
        raise TypeError(f"fused: kind: expected Adam, AdamW, Adagrad or SGD of torch.optim, got {kind!r}")
    plain: Any = kind
    optimizer: SomeOptimizer = _fused(plain)(parameters, fused=True, **options)
    return optimizer


@functools.cache
def _fused(kind: Any) -> Any:
    # Within the hooks, which are around our own step, and without torch's switch of grad mode.
    step_of_kind = inspect.unwrap(kind.step)

    class Fused(kind):  # type: ignore[misc]
        _step_supports_amp_scaling = True
        _plan: "_Plan | None" = None

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            with torch.no_grad():
                trained = _trained(self)
                if self._plan is None or not self._plan.holds(self, trained):
                    self._plan = _Plan(self, trained)
                if not self._plan.step(self, step_of_kind):
                    self._plan = None
            return loss

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            if isinstance(param_group, dict) and not isinstance(param_group["params"], (Tensor, set)):
                param_group["params"] = list(param_group["params"])
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
        if not parameter.is_contiguous():
            raise ValueError(f"fused: parameters[{i}]: expected contiguous, got strides {parameter.stride()}")
        if not parameter.is_leaf:
            raise ValueError(f"fused: parameters[{i}]: expected a leaf, got what is computed from others")
        if place.setdefault(parameter, i) != i:
            raise ValueError(
                f"fused: parameters[{i}]: expected each parameter once, "
                f"got parameters[{place[parameter]}] again"
            )


def _trained(optimizer: torch.optim.Optimizer) -> list[list[Tensor]]:
    """The parameters that have a gradient, of each group."""
    trained: list[list[Tensor]] = []
    for group in optimizer.param_groups:
        trained.append(there := [])
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None:
                if gradient.layout is not torch.strided:
                    raise ValueError(f"fused: gradient: expected dense, got {gradient.layout}")
                there.append(parameter)
    return trained


_form = operator.attrgetter("shape", "dtype", "device")


class _Plan:
    """What torch's step is given instead of the parameters, for as long as these and the state are the same.

    Parameters of a group that have the same kinds of state, and made as many steps, go together.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, trained: list[list[Tensor]]) -> None:
        self.trained = trained
        self.forms = [[*map(_form, there)] for there in trained]
        # For each call of the kernel the group whose options it takes, and its tensors.
        self.calls: list[tuple[int, list[Tensor]]] = []
        self.joined: list[_Joined] = []
        self.large: list[Tensor] = []
        for i, there in enumerate(trained):
            alike: dict[Any, list[Tensor]] = {}
            for parameter in there:
                alike.setdefault(_kind_of_state(optimizer, parameter), []).append(parameter)
            for parameters in alike.values():
                self.calls.append((i, self._tensors(optimizer, parameters)))
        self.memory = _memory(optimizer)

    def _tensors(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> list[Tensor]:
        if not parameters[0].is_cpu:  # Elsewhere torch rounds all numbers alike.
            return parameters
        small = [p for p in parameters if p.numel() < _SMALL]
        if len(small) == 1 and _beyond_vectors(small[0]) == 0:
            small = []
        copied = {id(p) for p in small}
        large = [p for p in parameters if id(p) not in copied]
        self.large += large
        cut = [p for p in large if _beyond_vectors(p)]
        if not small and not cut:
            return large
        self.joined.append(_Joined(optimizer, small, cut))
        return [*large, self.joined[-1].tensor]

    def holds(self, optimizer: torch.optim.Optimizer, trained: list[list[Tensor]]) -> bool:
        return (
            [[*map(id, there)] for there in trained] == [[*map(id, there)] for there in self.trained]
            and [[*map(_form, there)] for there in trained] == self.forms
            and [*map(id, _memory(optimizer))] == [*map(id, self.memory)]
            and all(joined.holds() for joined in self.joined)
        )

    def step(self, optimizer: torch.optim.Optimizer, step_of_kind: Callable[..., Any]) -> bool:
        """A step; whether the plan has all the state that there is now."""
        for parameter in self.large:
            if not parameter.is_contiguous():
                raise ValueError(f"fused: parameter: expected contiguous, got strides {parameter.stride()}")
            gradient: Any = parameter.grad
            if not gradient.is_contiguous():
                parameter.grad = gradient.contiguous()  # The kernel looks at no strides.
        groups = optimizer.param_groups
        for joined in self.joined:
            joined.take(optimizer)
        try:
            optimizer.param_groups = [groups[i] | {"params": tensors} for i, tensors in self.calls]
            step_of_kind(optimizer)
        finally:
            optimizer.param_groups = groups
            states = [optimizer.state.pop(joined.tensor, {}) for joined in self.joined]
        unscaled = getattr(optimizer, "grad_scale", None) is not None
        for joined, state in zip(self.joined, states, strict=True):
            joined.give_back(optimizer, state, unscaled)
        return sum(map(len, optimizer.state.values())) == len(self.memory)


def _kind_of_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Any:
    """Equal for parameters of the same names in their state and as many steps; makes the state fit."""
    state = optimizer.state.get(parameter, {})
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            if _form(value) != _form(parameter):
                raise ValueError(
                    f"fused: state[{name!r}]: expected shape, dtype and device of the parameter, "
                    f"{_form(parameter)}, got {_form(value)}"
                )
            state[name] = value.contiguous()
    names = frozenset(name for name, value in state.items() if isinstance(value, Tensor))
    steps = state["step"].item() if "step" in state and parameter.is_cpu else None
    return parameter.is_cpu, parameter.dtype, names, steps


def _memory(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [value for state in optimizer.state.values() for value in state.values()]


def _beyond_vectors(tensor: Tensor) -> int:
    """How many numbers of it, the last ones, do not fill a vector."""
    return tensor.numel() % (_VECTOR // min(tensor.element_size(), 4))


def _end(tensor: Tensor) -> Tensor:
    return tensor.view(-1)[tensor.numel() - _beyond_vectors(tensor) :]


class _Joined:
    """Small parameters and the ends of large ones as one tensor of whole vectors.

    The state of the small ones lives here, as that of the whole; each has views of it. All else is copied
    in every step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, small: list[Tensor], cut: list[Tensor]) -> None:
        self.small, self.cut = small, cut
        self.places = [p.data_ptr() for p in cut]
        self.pieces = [*small, *map(_end, cut)]
        like, state = self.pieces[0], optimizer.state.get((small or cut)[0], {})
        lengths = [piece.numel() for piece in self.pieces]
        rest = -sum(lengths) % (_VECTOR // min(like.element_size(), 4))

        def room() -> tuple[Tensor, list[Tensor]]:
            whole = torch.zeros(sum(lengths) + rest, dtype=like.dtype, device=like.device)
            parts = whole.split_with_sizes([*lengths, rest])[:-1]
            return whole, [part.view(piece.shape) for part, piece in zip(parts, self.pieces, strict=True)]

        self.tensor, self.values = room()
        self.tensor.grad, self.gradients = room()
        self.state: dict[str, Tensor] = {}
        self.ends: list[Tensor] = []  # of the state of large parameters, and where they go
        self.copies_of_ends: list[Tensor] = []
        for name in [n for n, value in state.items() if isinstance(value, Tensor) and value.dim() > 0]:
            self.state[name], parts = room()
            for parameter, part in zip(small, parts, strict=False):
                part.copy_(optimizer.state[parameter][name])
                optimizer.state[parameter][name] = part
            self.ends += [_end(optimizer.state[parameter][name]) for parameter in cut]
            self.copies_of_ends += parts[len(small) :]
        self.steps: list[Tensor] = []
        if "step" in state:
            # The first counts for the whole, the others are those of the small parameters.
            steps = state["step"].repeat(1 + len(small))
            self.state["step"], *own = steps.unbind()
            for parameter, step in zip(small, own, strict=True):
                optimizer.state[parameter]["step"] = step
            self.others = steps[1:]
            self.steps = [steps, *(optimizer.state[p]["step"] for p in cut)]

    def holds(self) -> bool:
        """Whether memory is where it was and all made as many steps: somebody may have changed it."""
        counts = {n for steps in self.steps for n in steps.reshape(-1).tolist()}
        return len(counts) <= 1 and [p.data_ptr() for p in self.cut] == self.places

    def take(self, optimizer: torch.optim.Optimizer) -> None:
        gradients: list[Any] = [p.grad for p in self.small]
        gradients += [_end(gradient) for gradient in [p.grad for p in self.cut] if gradient is not None]
        torch._foreach_copy_(
            self.values + self.gradients + self.copies_of_ends, self.pieces + gradients + self.ends
        )
        optimizer.state[self.tensor] = dict(self.state)

    def give_back(self, optimizer: torch.optim.Optimizer, state: dict[str, Tensor], unscaled: bool) -> None:
        """To the parameters what torch made of the whole; `state` is what it remembers of it."""
        to, parts = self.pieces + self.ends, self.values + self.copies_of_ends
        if unscaled:
            to = to + [p.grad for p in self.small if p.grad is not None]
            parts = parts + self.gradients[: len(self.small)]
        torch._foreach_copy_(to, parts)
        if self.steps:
            self.others.copy_(self.state["step"])
        for name in [name for name in state if name not in self.state]:
            self._remember(optimizer, name, state[name])

    def _remember(self, optimizer: torch.optim.Optimizer, name: str, value: Tensor) -> None:
        """Something that torch made in this step."""
        start = 0
        for i, (parameter, piece) in enumerate(zip([*self.small, *self.cut], self.pieces, strict=True)):
            part = value if value.dim() == 0 else value[start : start + piece.numel()].view(piece.shape)
            start += piece.numel()
            if i < len(self.small):
                optimizer.state[parameter][name] = part.clone()
            elif value.dim() > 0:
                _end(optimizer.state[parameter][name]).copy_(part)


class _OfMembers:
    """Numbers `[E]`, one for each member, that hooks of an optimizer read: the attribute `_name`."""

    _name: str

    def __init__(self, optimizer: torch.optim.Optimizer, numbers: Sequence[float] | Tensor) -> None:
        setattr(self, self._name, torch.as_tensor(numbers))
        for parameter in _parameters(optimizer):
            self._of(parameter)  # raises where they do not fit
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
        if not bool((self.decays.isfinite() & (self.decays >= 0)).all()):
            self.remove()
            raise ValueError(
                f"MemberWeightDecay: decays: expected numbers from 0, got {self.decays.tolist()}"
            )

    def _register(self, optimizer: torch.optim.Optimizer) -> Sequence[Any]:
        return (optimizer.register_step_pre_hook(self._shrink),)

    @torch.no_grad()
    def _shrink(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    lr = float(group["lr"])
                    parameter.mul_((1 - lr * self._of(parameter).double()).to(parameter.dtype))


def member_options(optimizer: torch.optim.Optimizer) -> dict[str, list[float]]:
    """What the members of an optimizer have of their own, by the name of the class that gives it to them."""
    return {type(own).__name__: getattr(own, own._name).tolist() for own in _own(optimizer)}


def _own(optimizer: torch.optim.Optimizer) -> list[_OfMembers]:
    return sorted(_of_members.get(optimizer, ()), key=lambda own: type(own).__name__)


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
            new.append((state, name, value[kept.to(value.device)]))
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
        ValueError: another `norm_type`, gradients of different numbers of members, or sparse.
    """
    if norm_type not in (1, 2, math.inf):
        raise ValueError(f"clip_member_grad_norm_: norm_type: expected 1, 2 or inf, got {norm_type}")
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
        gradients.append(gradient.detach())
    if not gradients:
        return torch.zeros(0)
    with torch.no_grad():
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
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[:1] != parameter.shape[:1]:
                raise ValueError(
                    f"load_member_state: states[{i}][{name!r}]: expected {parameter.shape[0]} members first, "
                    f"got shape {list(value.shape)}"
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
