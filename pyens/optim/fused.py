"""Optimizers of torch under which a member's bits do not depend on the others."""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam

from pyens._kinds import REAL
from pyens.ops.optimizers import adagrad_, adam_, sgd_

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
    optimizer: SomeOptimizer = fused_kind("fused", kind)(parameters, fused=True, **options)
    return optimizer


def fused_kind(function: str, kind: Any) -> Any:
    """The class of such optimizers; errors call it `function`."""
    if not any(isinstance(kind, type) and issubclass(kind, base) for base in _UPDATES):
        raise TypeError(
            f"{function}: kind: expected Adam, AdamW, Adagrad or SGD of torch.optim, got {kind!r}"
        )
    if all(inspect.unwrap(kind.step) is not inspect.unwrap(base.step) for base in _UPDATES):
        raise TypeError(
            f"{function}: kind: expected the step of torch's own class, got another one in {kind!r}"
        )
    return _fused(kind)


@functools.cache
def _fused(kind: Any) -> Any:
    # Within the hooks, which are around our own step.
    step_of_kind = inspect.unwrap(kind.step)
    update = update_of(kind)

    class Fused(kind):  # type: ignore[misc]
        _step_supports_amp_scaling = True
        param_groups: list[dict[str, Any]]
        # In the place of a step from gradients, while there is one: see pyens.optim.in_pass.
        _pass: Callable[[], Any] | None = None
        _made_by = "fused"

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            if self._pass is not None:
                return self._pass()
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
                        update.step(self, group, here, _gradients(here), scale)
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
                _check_parameters(self._made_by, param_group["params"])
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


def _check_parameters(function: str, parameters: list[Any]) -> None:
    place: dict[Tensor, int] = {}
    for i, named in enumerate(parameters):
        parameter = named[1] if isinstance(named, tuple) else named
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"{function}: parameters[{i}]: expected a tensor, got a {type(parameter).__name__}"
            )
        if parameter.dtype not in REAL:
            expected = "float32, float64, bfloat16 or float16"
            raise TypeError(f"{function}: parameters[{i}]: expected {expected}, got {parameter.dtype}")
        if not parameter.is_contiguous():
            raise ValueError(
                f"{function}: parameters[{i}]: expected contiguous, got strides {parameter.stride()}"
            )
        if not parameter.is_leaf:
            raise ValueError(
                f"{function}: parameters[{i}]: expected a leaf, got what is computed from others"
            )
        if place.setdefault(parameter, i) != i:
            raise ValueError(
                f"{function}: parameters[{i}]: expected each parameter once, "
                f"got parameters[{place[parameter]}] again"
            )


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    gradients: list[Any] = [p.grad for p in parameters]
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            raise ValueError(f"fused: gradient: expected dense, got {gradient.layout}")
    return gradients


@dataclass(frozen=True)
class Update:
    """How an optimizer updates parameters of a group that are on the CPU."""

    name: str  # of the operations
    # From their gradients, which are divided by the last argument.
    step: Callable[[Any, dict[str, Any], list[Tensor], list[Tensor], float | None], None]
    # For a step within a pass, of one parameter: the numbers and what is remembered, in the order in which
    # csrc/ops/ensemble_mlp_loss_step.cpp reads them.
    numbers: Callable[[dict[str, Any], bool], list[float]]  # True: it has been updated before
    remembered: Callable[[dict[str, Any]], list[str]]
    lists: int  # which _init_group fills


def update_of(kind: type) -> Update:
    return next(update for base, update in _UPDATES.items() if issubclass(kind, base))


def _adam(optimizer: Any, group: Any, parameters: Any, gradients: Any, scale: float | None) -> None:
    states, (beta1, beta2) = states_of(optimizer, group, parameters, 6), group["betas"]
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
    states = states_of(optimizer, group, parameters, 4)
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


_UPDATES: dict[Any, Update] = {
    Adam: Update(
        "adam",
        _adam,
        lambda g, _: [
            float(g["lr"]),
            *map(float, g["betas"]),
            float(g["eps"]),
            float(g["weight_decay"]),
            float(g["decoupled_weight_decay"]),
            float(g["maximize"]),
            float(g["amsgrad"]),
        ],
        lambda g: ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * g["amsgrad"]],
        6,
    ),
    Adagrad: Update(
        "adagrad",
        _adagrad,
        lambda g, _: [float(g[name]) for name in ("lr", "lr_decay", "eps", "weight_decay", "maximize")],
        lambda g: ["sum"],
        4,
    ),
    SGD: Update(
        "sgd",
        _sgd,
        lambda g, before: [
            float(g["lr"]),
            float(g["momentum"]),
            float(g["dampening"]),
            float(g["weight_decay"]),
            float(g["nesterov"]),
            float(g["maximize"]),
            float(not before),
        ],
        lambda g: ["momentum_buffer"] * (g["momentum"] != 0),
        0,
    ),
}


def states_of(
    optimizer: Any, group: dict[str, Any], parameters: list[Tensor], lists: int
) -> list[dict[str, Tensor]]:
    """What is remembered of each. What is missing torch makes, which adds it to so many lists too."""
    states = [optimizer.state[p] for p in parameters]
    if not all(states):
        new = [p for p, state in zip(parameters, states, strict=True) if not state]
        optimizer._init_group(group | {"params": new}, *([] for _ in range(lists)))
    return states
