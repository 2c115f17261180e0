"""An optimizer's step within the pass that computes the gradients."""

import functools
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pyens._types import Loss
from pyens.nn._losses import OPTIONS as OF_LOSSES
from pyens.nn._stacked_mlp import StackedMLP
from pyens.ops._call import in_transform
from pyens.ops.ensemble_mlp_loss import ensemble_mlp_loss_step_
from pyens.optim.fused import fused_kind, states_of, update_of
from pyens.optim.members import MemberWeightDecay, numbers_of_members


class InPass(torch.optim.Optimizer):
    """What `in_pass` makes: an optimizer of `pyens.optim.fused` with one method more."""

    def step_in_pass(
        self,
        model: StackedMLP,
        input: Tensor | tuple[Tensor, ...],
        target: Tensor,
        *,
        loss: Loss,
        **options: Any,
    ) -> Tensor:
        """One step of `model` on a batch, its loss and its gradients in the same pass.

        What the three calls do, to the bit,

            losses = model.loss(input, target, loss=loss, **options)
            losses.sum().backward()
            optimizer.step()

        for the parameters of this optimizer, but that nobody sees a gradient: it is used up, member by
        member, while it is in cache. There is no gradient in memory, no graph, and each parameter is read
        once and written once. Hooks of `step`, schedules, `MemberLearningRates` and `keep_members` act as
        ever; hooks before a step run before the pass, and see no gradient that they could clip.

        Args:
            model: an `EnsembleLinear` or `EnsembleMLP`.
            input, target, loss, options: those of its `loss`.

        Returns:
            Each member's mean loss before the step, `[E]`, without a graph.

        On CUDA, and for a batch without examples, it makes the three calls, and gains nothing.

        Raises:
            TypeError: another model, or one with a loss of its own.
            ValueError: what needs a gradient to look at: a `.grad` of this optimizer's that is to be added
                to, hooks of parameters, an input, target or bounds that require a gradient,
                `MemberWeightDecay`, a `GradScaler`, autocast, `torch.func`, reduction "none"; `members`,
                without which moments would run apart; weights that are computed from others; a model none of
                whose parameters are this optimizer's and require a gradient. Nothing is changed then, nor by
                what the loss refuses.
        """
        raise NotImplementedError  # in_pass makes classes that have it


def in_pass(
    kind: type[torch.optim.Optimizer], parameters: Iterable[Tensor] | Iterable[dict[str, Any]], **options: Any
) -> InPass:
    """`pyens.optim.fused` whose step can be made within the pass that computes the gradients.

        optimizer = pyens.optim.in_pass(torch.optim.Adam, model.parameters(), lr=1e-3)
        losses = optimizer.step_in_pass(model, x, y, loss="mse")   # [E], before the step

    `pyens.training.fit` and `Trainer` take it as any other, and then make all steps so. What it saves counts
    most for small batches, see csrc/README.md. Whatever has to look at gradients is refused by name:
    clipping, accumulation, `GradScaler`. With gradients in `.grad` its `step()` is that of `fused`.

    Args, errors: as `pyens.optim.fused`.
    """
    plain: Any = kind
    optimizer: InPass = _of_kind(plain)(parameters, fused=True, **options)
    return optimizer


@functools.cache
def _of_kind(kind: Any) -> Any:
    fused = fused_kind("in_pass", kind)

    class Stepping(fused, InPass):  # type: ignore[misc, valid-type]
        _made_by = "in_pass"

        def step_in_pass(
            self,
            model: StackedMLP,
            input: Tensor | tuple[Tensor, ...],
            target: Tensor,
            *,
            loss: Loss,
            **options: Any,
        ) -> Tensor:
            if is_dynamo_compiling():  # which has ideas of its own of a `step`; it runs this one as it is
                raise NotImplementedError("step_in_pass: expected eager code, got compiled code")
            options["loss"] = loss
            if torch.is_inference_mode_enabled():  # what begins here is to go on outside of it
                with torch.inference_mode(False):
                    return self.step_in_pass(model, input, target, **options)
            network = _checked(self, model, (input, target), options)
            own = [_own(group, network) for group in self.param_groups]
            if not any(own):
                raise _refused("model", "parameters of this optimizer that require a gradient", "none")
            if not network[0].is_cpu or (isinstance(target, Tensor) and target.numel() == 0):
                return _apart(self, model, input, target, options, [network[i] for of in own for i in of])
            # By way of `step`, so that its hooks run, and of this optimizer's own, which a schedule may have
            # wrapped. It finds there what to do in the place of a step from gradients.
            here: Any = self
            here._pass = functools.partial(_step, self, own, network, model, input, target, options)
            try:
                return cast(Tensor, self.step())
            finally:
                here._pass = None

        def __reduce__(self) -> tuple[Any, ...]:
            return _blank, (kind,), self.__getstate__()

    Stepping.__name__ = Stepping.__qualname__ = kind.__name__
    return Stepping


def _blank(kind: Any) -> Any:
    return object.__new__(_of_kind(kind))


# What `loss` of these models takes.
_OPTIONS = {"loss", "sample_weight", "dropout", "dropout_seeds", "members", "shared", "reduction", *OF_LOSSES}


def _checked(optimizer: Any, model: Any, batch: tuple[Any, Any], options: dict[str, Any]) -> list[Tensor]:
    """The tensors of the network, in the order of the operation's."""
    own_loss = not isinstance(model, StackedMLP) or type(model).loss is not StackedMLP.loss
    if own_loss or "loss" in model.__dict__:
        raise TypeError(
            "step_in_pass: model: expected an EnsembleLinear or EnsembleMLP with their own loss, got a "
            f"{type(model).__name__}"
        )
    if unknown := options.keys() - _OPTIONS:
        raise TypeError(f"step_in_pass: {min(unknown)}: expected an option of loss, got another")
    if any("parametrizations" in part._modules for part in (model, *model.children())):
        raise _refused("model", "parameters", "a weight that is computed from others")
    with torch.enable_grad():  # or a computed weight would look like one that is frozen
        network = [tensor for of_kind in model.network() for tensor in of_kind]
    if getattr(optimizer, "grad_scale", None) is not None:
        raise _refused("optimizer", "no GradScaler (no gradient is there to be scaled)", "one")
    if any(isinstance(numbers, MemberWeightDecay) for numbers in numbers_of_members(optimizer)):
        raise _refused("optimizer", "no MemberWeightDecay (it would come before the gradient)", "one")
    if in_transform():
        raise _refused("model", "no torch.func", "a transform")
    device = network[0].device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        raise _refused("model", "no autocast", "autocast")
    if options.get("reduction", "mean") != "mean":
        raise _refused("reduction", "mean", str(options["reduction"]))
    if options.get("members") is not None:
        raise _refused("members", "None (all make a step, or their moments would run apart)", "some")
    for given in (*batch, *options.values()):
        for tensor in given if isinstance(given, tuple) else (given,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                raise _refused(
                    "input, target and options", "requires_grad=False (they get no gradient)", "True"
                )
    if not all(tensor.is_leaf for tensor in network):
        raise _refused("model", "parameters", "a weight that is computed from others")
    return network


def _refused(argument: str, expected: str, got: str) -> ValueError:
    return ValueError(f"step_in_pass: {argument}: expected {expected}, got {got}")


def _own(group: dict[str, Any], network: list[Tensor]) -> list[int]:
    """Which tensors of the network are in the group and make a step."""
    for tensor in group["params"]:  # the network's and others, which a step from gradients would update too
        if tensor.grad is not None:
            raise _refused(
                "model",
                "no .grad (a step within the pass adds to none: call zero_grad)",
                f"one of a parameter of shape {list(tensor.shape)}",
            )
    parameters = set(map(id, group["params"]))
    own = [i for i, tensor in enumerate(network) if id(tensor) in parameters and tensor.requires_grad]
    for tensor in map(network.__getitem__, own):
        if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
            raise _refused(
                "model",
                "no hooks of gradients (nothing would call them)",
                f"one of a parameter of shape {list(tensor.shape)}",
            )
    return own


@torch.no_grad()
def _step(
    optimizer: Any,
    own: list[list[int]],
    network: list[Tensor],
    model: StackedMLP,
    input: Any,
    target: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """`own`: of each group, the places of its tensors in the network."""
    dropping = {name: options[name] for name in ("dropout", "dropout_seeds") if name in options}
    arguments = options | model.of_loss(**dropping)
    arguments.pop("reduction", None)
    update = update_of(type(optimizer))
    new = [network[i] for places in own for i in places if not optimizer.state.get(network[i])]
    numbers: list[float] = []
    states: list[Tensor] = []
    steps: list[Tensor] = []
    begun: dict[Tensor, Tensor] = {}  # momentum buffers
    for group, places in zip(optimizer.param_groups, own, strict=True):
        remembered, goes_on = update.remembered(group), update.numbers(group, True)
        for place in places:
            parameter = network[place]
            state = _state(optimizer, parameter, group, update.lists)
            if update.lists:
                steps.append(_there(state, "step", parameter))
            elif remembered and state.get("momentum_buffer") is None:
                begun[parameter] = torch.empty_like(parameter)
                numbers += update.numbers(group, False)
                states.append(begun[parameter])
                continue
            numbers += goes_on
            states += [_there(state, name, parameter) for name in remembered]
    which = [place for places in own for place in places]
    try:
        losses = ensemble_mlp_loss_step_(
            (which, update.name, numbers, states, steps), input=input, target=target, **arguments
        )
    except BaseException:
        for parameter in new:  # as it was
            optimizer.state.pop(parameter, None)
        raise
    for parameter, buffer in begun.items():
        optimizer.state[parameter]["momentum_buffer"] = buffer
    return losses


def _state(optimizer: Any, parameter: Tensor, group: dict[str, Any], lists: int) -> dict[str, Any]:
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    if lists and not state:
        # torch's own function makes it, if there is a gradient of the parameter's shape: one number will do.
        parameter.grad = parameter.new_zeros(()).expand_as(parameter)
        try:
            (state,) = states_of(optimizer, group, [parameter], lists)
        finally:
            parameter.grad = None
    return state


def _there(state: dict[str, Any], name: str, parameter: Tensor) -> Tensor:
    """What is remembered under that name, where the parameter is: nobody computes with what is not."""
    tensor = state[name]
    if not isinstance(tensor, Tensor) or tensor.device != parameter.device:
        got = tensor.device if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
        raise TypeError(f"step_in_pass: state[{name!r}]: expected a tensor on {parameter.device}, got {got}")
    return tensor


def _apart(
    optimizer: Any,
    model: StackedMLP,
    input: Any,
    target: Tensor,
    options: dict[str, Any],
    parameters: list[Tensor],
) -> Tensor:
    """Loss, gradients and step one after the other."""
    with torch.enable_grad():
        losses = model.loss(input, target, **options)
    for parameter, gradient in zip(parameters, torch.autograd.grad(losses.sum(), parameters), strict=True):
        parameter.grad = gradient
    try:
        optimizer.step()
    finally:
        for parameter in parameters:
            parameter.grad = None
    return losses.detach()
