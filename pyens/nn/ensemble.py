"""What every ensemble is: the one thing that `fit`, `variation` and other code know of a model."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from typing_extensions import Self

from pyens._kinds import check_tensor
from pyens._types import Activation, Loss, LossReduction, Norm, Residual
from pyens.nn._buffers import Derived
from pyens.nn._layer_options import Rates, rates_of
from pyens.nn._losses import OPTIONS, check_options, check_values, mean_losses_of
from pyens.reference.ensemble_mlp_loss import LOSSES, example_losses

Indices = Sequence[int] | slice | Tensor


class Ensemble(nn.Module):
    r"""`ensemble_size` members that run as one: inputs `[B, ...]` or `[E, B, ...]` to outputs `[E, B, O]`.

    A class of one's own that is made of ensembles needs no more than this to be trained by
    `pyens.training.fit`, and it can be taken apart:

        class Residual(pyens.nn.Ensemble):
            def __init__(self, ensemble_size, width):
                super().__init__()
                self.ensemble_size = ensemble_size
                self.block = pyens.EnsembleMLP(ensemble_size, width, [64], width)
                self.head = pyens.EnsembleLinear(ensemble_size, width, 1)

            def forward(self, x):
                return self.head(x + self.block(x))

    Parameters are `[E, ...]`, member first, unless the class sets `shares_parameters`. A class that has
    parameters beside those of ensembles also defines `draw`. Buffers are the same for all members and do not
    change in training, but for those that `member_buffers` names; a class with other buffers `[E, ...]`, or
    whose members share their parameters, defines `select` to be taken apart (and may call the one here, which
    then copies those as they are). Ensembles inside have as many members, and choose with their own `select`.

    Attributes:
        ensemble_size: E, the number of members.
        dropout: p, or where they differ a tuple of one for each member, or of tuples `[1, H]` or `[E, H]` of
            hidden layers. Where it is not 0, `forward` and `loss` take `dropout_seeds`, int64 `[E]`, see
            `pyens.ops.ensemble_mlp`, and `fit` gives them. A part that is given none draws its own in
            training, see `EnsembleMLP`: `fit` knows nothing of those, so that a run depends on the generator
            that they come from.
        activation: of the hidden layers, one name or a tuple, where the members are MLPs on top of
            `features`; None for others.
        output_activation, norm, residual: what such MLPs have beyond that, see `EnsembleMLP`.
        shares_parameters: whether all members have the same parameters, without a member axis. `fit` then
            keeps and stops all of them together.
        member_buffers: names of the class's own buffers `[E, ...]` that belong to the members as parameters
            do, such as running statistics: `select` takes the rows of the chosen ones, and `fit` keeps them
            with the weights of the best epoch. Another module in it may have such an attribute too.
        terms_by_rows: of `loss_terms`, the names of those that are no mean over the rows by their weights: of
            micro batches, `fit` adds them up by how many rows there are.
    """

    ensemble_size: int
    dropout: Rates = 0.0
    activation: Activation | tuple[Activation, ...] | None = None
    output_activation: Activation = "identity"
    norm: Norm | tuple[Norm | None, ...] | None = None
    residual: Residual = False
    shares_parameters: bool = False
    member_buffers: tuple[str, ...] = ()
    terms_by_rows: tuple[str, ...] = ()

    def features(self, input: Tensor) -> Tensor:
        """What the members' MLPs take, `[B, I]` or `[E, B, I]`, from the arguments of `forward`."""
        return input

    def stacked(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Weights `[E, out, in]` and biases `[E, out]` of the members' MLPs, layer by layer.

        A layer without a bias has `[E, 0]`; without any the biases are empty.
        """
        raise NotImplementedError(f"stacked: expected an ensemble of MLPs, got a {type(self).__name__}")

    def loss(
        self,
        *batch: Tensor,
        loss: Loss,
        sample_weight: Tensor | None = None,
        reduction: LossReduction = "mean",
        **options: Any,
    ) -> Tensor:
        """Each member's mean loss `[E]`; train on its sum. (Several processes: docs/training.md.)

        Args:
            batch: what `forward` takes, then the target.
            loss, reduction: see `pyens.ops.ensemble_mlp_loss`.
            sample_weight: likewise. With weights, `forward` is given zeros in place of floating point inputs
                that are left out (weight 0), whatever is in them: with weights `[E, B]` as `[E, B, ...]`,
                also where the input was `[B, ...]`.
            options: of the loss, likewise (temperature, label_smoothing, delta, quantiles, class_weight,
                log_variance_min, log_variance_max), and of `forward`, such as `dropout_seeds`.

        Raises:
            ValueError, TypeError: as `pyens.ops.ensemble_mlp_loss`; outputs or a target of another shape. The
                values of target and weights are read in eager code on the CPU, outside `torch.func`.
        """
        if len(batch) < 2:
            raise ValueError(
                f"loss: batch: expected what forward takes, then the target, got {len(batch)} arguments"
            )
        *inputs, target = batch
        if not isinstance(loss, str) or loss not in LOSSES:
            raise ValueError(f'loss: loss: expected one of {", ".join(LOSSES)}, got "{loss}"')
        if reduction not in ("mean", "none"):
            raise ValueError(f'loss: reduction: expected mean or none, got "{reduction}"')
        of_loss = {name: options.pop(name) for name in OPTIONS if name in options}
        check_options("loss", loss, of_loss)
        check_tensor("loss", "target", target)
        if sample_weight is not None:
            check_tensor("loss", "sample_weight", sample_weight)
            for i, tensor in enumerate(inputs):
                if isinstance(tensor, Tensor):
                    check_tensor("loss", f"batch[{i}]", tensor)
            inputs = self.without_left_out(inputs, sample_weight)
        output = self(*inputs, **options)
        check_tensor("loss", "output", output)
        if output.dim() != 3 or len(output) != self.ensemble_size:
            raise ValueError(
                f"loss: output: expected [{self.ensemble_size}, B, O] from forward, "
                f"got shape {list(output.shape)}"
            )
        check_values(output, target, loss, sample_weight, of_loss)
        if reduction == "none":
            return example_losses(lambda output: output, output, target, loss, sample_weight, **of_loss)
        return mean_losses_of(output, target, loss, sample_weight, **of_loss)

    def loss_terms(self, *batch: Any, **options: Any) -> dict[str, Tensor]:
        """What `loss` is the sum of, each `[E]`, by name; here `loss` itself.

        A class whose members learn from more than one thing defines this. `fit` calls it in the place of
        `loss`, also with a `loss` that is a function, and keeps the terms apart in its history. See
        `terms_by_rows`.
        """
        return {"loss": self.loss(*batch, **options)}

    def without_left_out(self, inputs: Sequence[Any], sample_weight: Tensor) -> list[Any]:
        """What `forward` is given instead of its arguments where rows have weight 0, whatever is in them.

        Here zeros in floating point inputs; a class that looks rows up in tables also says which row of them.
        """
        return [_without_left_out(t, sample_weight, self.ensemble_size) for t in inputs]

    def check_inputs(self, *inputs: Tensor | None) -> None:
        """Raises a ValueError for values that `forward` would refuse; `fit` gives it all rows beforehand.

        Here nothing; a class that looks rows up in tables says which row, and which column, is out of range.
        """

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON knows them: `type(model)(**model.config())` is built alike.

        Device and dtype are not among them; the parameters and buffers are in the state dict.
        """
        raise NotImplementedError(f"config: expected a {type(self).__name__} to define it")

    @torch.no_grad()
    def reset_parameters(self, seeds: Sequence[int] | Tensor | None = None) -> None:
        """Draws every member anew, exactly as the modules of `torch.nn` draw (fan-in of one member).

        `seeds[m] = s` gives member m bit for bit the parameters of the same modules (`nn.Linear`,
        `nn.Embedding`, `nn.Sequential`) built in order under `torch.manual_seed(s)` with float32 on the CPU,
        whatever the other members are. Without seeds the members are drawn one after the other from torch's
        default generator.
        """
        drawn_from = generators(self.ensemble_size, seeds)
        if any(parameter.is_meta for parameter in self.parameters()):
            return
        for member, generator in enumerate(drawn_from):
            self.draw(member, generator)

    def draw(self, member: int, generator: torch.Generator | None) -> None:
        """Draws one member anew: on the CPU in float32 and then cast, so that a seed means the same on every
        device and dtype. Here: its parts in every ensemble that this one is made of, in their order."""
        parts = [module for _, module in _walk(self) if isinstance(module, Ensemble)]
        if type(self).draw is Ensemble.draw:
            drawn = {id(parameter) for part in parts for parameter in part.parameters()}
            if left := [name for name, p in self.named_parameters() if id(p) not in drawn]:
                raise NotImplementedError(
                    f"draw: expected a {type(self).__name__} to define it, for its parameters {left}"
                )
        for part in parts:
            if part.ensemble_size != self.ensemble_size:
                raise ValueError(
                    f"draw: expected {self.ensemble_size} members in each part of a {type(self).__name__}, "
                    f"got {part.ensemble_size} in a {type(part).__name__}"
                )
            part.draw(member, generator)

    def select(self, indices: Indices) -> Self:
        """A new ensemble of copies of the chosen members, in the order of `indices` (ints, slice or mask).

        Raises:
            ValueError: no member chosen, or indices of another kind; a part that the members cannot be
                chosen from (see the class), by name. `fit` refuses such a model at once.
            IndexError: an index out of range, or a mask that is not `[E]`.
        """
        members = chosen_members(self.ensemble_size, indices)
        copies: dict[int, Any] = {}  # by id, of what deepcopy is to leave alone
        self._choose(members, copies)
        for module in self.modules():
            for value in vars(module).values():  # what pruning computed last, which deepcopy would refuse
                if isinstance(value, Tensor):
                    copies.setdefault(id(value), value.detach().clone())
        new = copy.deepcopy(self, copies)
        for module in new.modules():
            if isinstance(module, Ensemble):
                module.ensemble_size = len(members)
        return new

    @torch.no_grad()
    def select_(self, indices: Indices) -> Self:
        """Leaves all but the chosen members behind, in place: what `select` copies, the same objects hold.

        Parameters stay the parameters they are (`p.data = p.data[indices]`), and so does all that knows
        them: optimizers and their groups, schedules, hooks, `requires_grad`, attributes. Gradients go. What
        an optimizer remembers of the others is for `pyens.optim.keep_members`. Call it between two steps,
        without a graph that is still to go backward.

        Returns:
            Itself.

        Raises:
            ValueError, IndexError: as `select`, before anything is changed; a `select` of another kind.
            RuntimeError: somebody holds a graph of a parameter, such as DistributedDataParallel.
        """
        members = chosen_members(self.ensemble_size, indices)
        copies: dict[int, Any] = {}
        self._choose(members, copies)  # raises what is to be raised, and knows of parts with their own select
        if type(self).select is not Ensemble.select:
            chosen = self.select(members.tolist())
            if type(chosen) is not type(self):
                raise ValueError(
                    f"select_: expected a class whose select gives its own kind, got a "
                    f"{type(self).__name__}, which gives a {type(chosen).__name__}"
                )
            copies = {id(self): chosen}
        for name, parameter in self.named_parameters():
            if is_held(parameter):
                raise RuntimeError(
                    f"select_: expected no graph that waits for gradients, got one of {name}: of a loss that "
                    "was kept, or of DistributedDataParallel, which needs a new model by select"
                )
        self._take(copies, len(members))
        return self

    def _take(self, copies: dict[int, Any], members: int) -> None:
        """What `_choose` found, into the objects that there are."""
        chosen = copies.get(id(self))
        for place, module in [("", self), *_walk(self)]:
            if module is not self and isinstance(module, Ensemble):
                module._take(copies, members)
                continue
            new = None if chosen is None else chosen.get_submodule(place)
            for name, parameter in module._parameters.items():
                own = copies.get(id(parameter)) if new is None else new._parameters[name]
                if parameter is not None and own is not None:
                    parameter.grad, parameter.data = None, own.data
            for name, buffer in module._buffers.items():
                own = copies.get(id(buffer)) if new is None else new._buffers[name]
                if own is not None:
                    module._buffers[name] = own
        self.ensemble_size = members
        if isinstance(vars(self).get("dropout"), tuple):
            self.dropout = copies[id(self.dropout)] if chosen is None else chosen.dropout
        for _, module in [("", self), *_walk(self)]:
            if isinstance(module, Derived):
                module._derive()  # of the buffers that it has now

    def _choose(self, members: Tensor, copies: dict[int, Any]) -> None:
        """Puts what `select` takes of each parameter, mask of pruning and ensemble inside into `copies`."""
        size, kind = self.ensemble_size, type(self).__name__
        generic = type(self).select is Ensemble.select
        if isinstance(self.dropout, tuple):
            copies[id(self.dropout)] = rates_of(self.dropout, members.tolist())
        if generic and self.shares_parameters:
            raise ValueError(f"select: expected a {kind}, whose members share their parameters, to define it")
        for place, module in [("", self), *_walk(self)]:
            if module is not self and isinstance(module, Ensemble):
                if module.ensemble_size != size:
                    raise ValueError(
                        f"select: {place}: expected {size} members, as the {kind} that it is part of, "
                        f"got {module.ensemble_size}"
                    )
                if type(module).select is Ensemble.select:
                    module._choose(members, copies)
                elif id(module) not in copies:
                    chosen = module.select(members.tolist())
                    if type(chosen) is not type(module):
                        raise ValueError(
                            f"select: {place}: expected a part that gives its own kind, "
                            f"got a {type(module).__name__}, which gives a {type(chosen).__name__}"
                        )
                    copies[id(module)] = chosen
                continue
            masks = set()
            for name, parameter in module._parameters.items():
                if parameter is None or self.shares_parameters:
                    continue
                if parameter.dim() == 0 or len(parameter) != size:
                    raise ValueError(
                        f"select: expected parameters [{size}, ...], got {f'{place}.{name}'.lstrip('.')} of "
                        f"shape {list(parameter.shape)}"
                    )
                rows = parameter.detach()[members.to(parameter.device)]
                copies[id(parameter)] = nn.Parameter(rows, parameter.requires_grad)
                mask = module._buffers.get(masked := name.removesuffix("_orig") + "_mask")
                if mask is not None:
                    copies[id(mask)] = mask[members.to(mask.device)]
                    masks.add(masked)
            for name, buffer in module._buffers.items():
                shape = [] if buffer is None else list(buffer.shape)
                if buffer is not None and name in member_buffers_of(module):
                    copies[id(buffer)] = buffer[members.to(buffer.device)]
                    continue
                # Of one member there is nothing to leave out.
                if generic and shape[:1] == [size] and name not in masks and not len(members) == size == 1:
                    full = f"{place}.{name}".lstrip(".")
                    raise ValueError(
                        f"select: expected a {kind} to define it, for its buffer {full} of shape {shape}, "
                        "which may be [E, ...]"
                    )

    def member(self, i: int) -> nn.Module:
        """Member i alone, with copies of its parameters: a plain module, or here an ensemble of one."""
        self._check_member(i)
        return self.select([i])

    def to_modules(self) -> list[Any]:
        """All members as `member(i)` gives them."""
        return [self.member(i) for i in range(self.ensemble_size)]

    def __len__(self) -> int:
        """`ensemble_size`."""
        return self.ensemble_size

    def __getitem__(self, i: int | slice) -> Any:
        """`model[i]` is `member(i)`, `model[1:3]` is `select(slice(1, 3))`."""
        return self.select(i) if isinstance(i, slice) else self.member(i)

    def __bool__(self) -> bool:
        return True

    def _check_member(self, i: int) -> None:
        if not hasattr(i, "__index__"):
            raise TypeError(f"member: i: expected an integer, got {type(i).__name__}")
        if not -self.ensemble_size <= i < self.ensemble_size:
            raise IndexError(f"member: i: expected below {self.ensemble_size}, got {i}")

    def extra_repr(self) -> str:
        defined = type(self).config is not Ensemble.config
        config = self.config() if defined else {"ensemble_size": getattr(self, "ensemble_size", None)}
        return ", ".join(f"{name}={v}" for name, v in config.items() if name != "dropout" or v)


def member_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What training changes, by name: all parameters, then the `member_buffers` of every ensemble."""
    yield from model.named_parameters()
    for place, module in model.named_modules():
        for name in member_buffers_of(module):
            if (buffer := module._buffers.get(name)) is not None:
                yield f"{place}.{name}".lstrip("."), buffer


def member_buffers_of(module: nn.Module) -> tuple[str, ...]:
    """The names in its `member_buffers`: of an ensemble, or of a module that has some of an ensemble's."""
    names: tuple[str, ...] = getattr(module, "member_buffers", ())
    return names


def _walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules in it with their names, in their order; not those in an ensemble in it, which has them."""
    for name, child in module.named_children():
        yield prefix + name, child
        if not isinstance(child, Ensemble):
            yield from _walk(child, f"{prefix}{name}.")


def _without_left_out(input: Any, weight: Tensor, ensemble_size: int) -> Any:
    """A floating point input `[B, ...]` or `[E, B, ...]` with 0 where the weight `[B]` or `[E, B]` is 0."""
    if not isinstance(input, Tensor) or not input.is_floating_point() or weight.dim() not in (1, 2):
        return input
    batch_size, shape = weight.shape[-1], tuple(input.shape)
    shared = shape[:1] == (batch_size,)
    if shape[:2] == (ensemble_size, batch_size) and not (shared and len(shape) == 2):
        rest = len(shape) - 2
    elif shared:
        rest = len(shape) - 1
    else:
        return input
    present = weight != 0
    return torch.where(present.reshape(*present.shape, *[1] * rest), input, 0)


def is_held(parameter: nn.Parameter) -> bool:
    """Whether somebody holds the node that adds to its gradient, which remembers the shape."""
    if not parameter.requires_grad:
        return False
    whole = parameter.data
    parameter.data = whole.new_empty(0)
    try:  # without one that is held, a new one is made
        node: Any = torch.autograd.graph.get_gradient_edge(parameter).node
        return tuple(node._input_metadata[0].shape) != tuple(parameter.shape)
    finally:
        node = None
        parameter.data = whole


def renew_accumulator(parameter: nn.Parameter) -> None:
    """Parts a parameter from the node that somebody holds, so that it may have another shape.

    The graph that has the node still adds its gradients to the parameter. Hooks on the node are lost, those
    of `register_hook` and `register_post_accumulate_grad_hook` stay.
    """
    whole = parameter.data
    other = torch.float32 if whole.dtype == torch.float64 else torch.float64
    parameter.grad, parameter.data = None, whole.new_empty(0, dtype=other)  # torch forgets it with the dtype
    parameter.data = whole


def parameters_of(module: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The module's parameters of these names, as its attributes are.

    What pruning, weight norm and parametrizations compute from other parameters is computed here, because
    nobody calls a list of parameters, or a `loss`, through the hooks that would do so.
    """
    own: dict[str, Any] = module._parameters
    try:
        return [own[name] for name in names]  # a quarter of what attributes of a module cost
    except KeyError:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (BasePruningMethod, SpectralNorm, WeightNorm)):
                hook(module, None)
        return [getattr(module, name) for name in names]


def reader(names: Sequence[str]) -> Callable[[Mapping[str, Tensor]], Sequence[Tensor]]:
    """The fastest function from a dict to its values of these names; KeyError if one is missing."""
    return itemgetter(*names) if len(names) > 1 else partial(_values, names)


def _values(names: Sequence[str], of: Mapping[str, Tensor]) -> list[Tensor]:
    return [of[name] for name in names]


def chosen_members(ensemble_size: int, indices: Indices) -> Tensor:
    """int64: the members that `select` is asked for."""
    index: Any = indices
    if not isinstance(index, slice):
        try:
            index = torch.as_tensor(index, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            index = None
        # torch takes [] for floats
        if index is None or index.dim() == 0 or (index.is_floating_point() and len(index) > 0):
            raise ValueError(f"select: indices: expected ints, a slice or a boolean mask, got {indices}")
        index = index if index.dtype == torch.bool else index.long()
    chosen = torch.arange(ensemble_size, device="cpu")[index]
    if chosen.dim() != 1 or len(chosen) == 0:
        raise ValueError(f"select: indices: expected at least one member, got {indices}")
    return chosen


def generators(ensemble_size: int, seeds: Sequence[int] | Tensor | None) -> list[torch.Generator | None]:
    """A generator for each member: its own under its seed, without seeds torch's default one (None)."""
    if seeds is None:
        return [None] * ensemble_size
    several = isinstance(seeds, (Sequence, np.ndarray)) or (isinstance(seeds, Tensor) and seeds.dim() == 1)
    if not several or len(seeds) != ensemble_size:
        got = len(seeds) if several else f"{seeds!r} alone"
        raise ValueError(
            f"reset_parameters: seeds: expected one for each of the {ensemble_size} members, got {got}"
        )
    try:
        return [torch.Generator().manual_seed(operator.index(seed)) for seed in seeds]
    except TypeError:
        raise TypeError(f"reset_parameters: seeds: expected integers, got {seeds!r}") from None
