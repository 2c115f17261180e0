"""The state of a training run, and what an epoch does to it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyens._types import Loss
from pyens.nn import Ensemble
from pyens.nn.ensemble import check_temperature
from pyens.optim import load_member_state, member_state
from pyens.reference.ensemble_mlp_loss import LOSSES
from pyens.training import _checks
from pyens.training import checkpoint as checkpoints
from pyens.training.history import DIVERGED, FINISHED, RUNNING, STATUS, STOPPED, History
from pyens.training.randomness import Order, Randomness, generator, member_seeds, partition, split_rows

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Run:
    """A run between two epochs. `active` are the members that still train, in the order of `model`'s."""

    def __init__(
        self,
        model: Ensemble,
        data: Sequence[Tensor],
        *,
        loss: Loss,
        temperature: float,
        batch_size: int,
        optimizer: MakeOptimizer,
        randomness: Randomness | None,
        seed: int,
        seeds: Sequence[int] | None,
        groups: int | None,
        left_out: Sequence[int] | None,
        validation: float | Sequence[Tensor],
        early_stopping: int | None,
        own_data: bool,
    ) -> None:
        members = _checks.model(model)
        _checks.tensors("data", data)
        owners = members if own_data else None
        rows = _checks.data("data", data, members=owners)
        _checks.count("batch_size", batch_size)
        if not isinstance(loss, str) or loss not in LOSSES:
            raise ValueError(f"fit: loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
        check_temperature("fit", loss, temperature)
        sources = randomness or Randomness(shuffle=True)
        own_seeds = member_seeds(seed, members) if seeds is None else [int(s) for s in seeds]
        if len(own_seeds) != members:
            raise ValueError(f"fit: seeds: expected one for each of {members} members, got {len(own_seeds)}")
        if model.shares_parameters and sources.init:
            raise ValueError("fit: randomness: expected no R for members that share their parameters, got it")
        self.groups, self.left_out = _checks.jackknife(sources, members, groups, left_out)

        self.model = self.working = model
        self.active = list(range(members))
        self.data = tuple(data)
        self.own_data = own_data
        self.loss, self.temperature, self.batch_size = loss, temperature, batch_size
        self.make_optimizer = optimizer
        self.randomness, self.seed = randomness, seed
        self.patience = early_stopping
        share = validation if isinstance(validation, (int, float)) else 0.0
        if not 0 <= share < 1:
            raise ValueError(f"fit: validation: expected a share in [0, 1) or tensors, got {validation}")
        training, held_out = split_rows(rows, share, seed)
        if len(training) == 0:
            raise ValueError(f"fit: data: expected rows beside the validation rows, got {rows} in all")
        if isinstance(validation, (int, float)):
            self.validation = tuple(t.index_select(int(own_data), held_out.to(t.device)) for t in data)
        else:
            _checks.tensors("validation", validation)
            self.validation = tuple(validation)
            _checks.data("validation", self.validation, like=data, members=owners)
        self.validation_rows = self.validation[0].shape[int(own_data)]
        if early_stopping is not None:
            _checks.count("early_stopping", early_stopping)
            if self.validation_rows == 0:
                raise ValueError("fit: early_stopping: expected validation rows, got none")
        in_group = None
        if sources.jackknife:
            if self.groups > len(training):
                raise ValueError(
                    f"fit: jackknife_groups: expected at most the {len(training)} training rows, "
                    f"got {self.groups}"
                )
            in_group = partition(training, rows, self.groups, seed)
        self.order = Order(training, tuple(own_seeds), sources.shuffle, in_group, self.left_out)
        self.steps = math.ceil(len(training) / batch_size)
        # Whatever the model refuses, before anything is changed.
        with torch.no_grad(), _mode(model, training=False):
            first = torch.zeros(1, dtype=torch.int64, device=data[0].device)
            try:
                self._losses(self._batch(data, first))
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(
                    f"fit: data: expected rows that {type(model).__name__}.loss takes, got tensors of shapes "
                    f"{[list(t.shape) for t in data]}, of whose first row alone it says: {error}"
                ) from error

    def describe(self) -> dict[str, Any]:
        """What another run must have in common with this one to go on from its checkpoint."""
        arguments = {
            "model": str(self.model),
            "parameters": {name: list(p.shape) for name, p in self.model.named_parameters()},
            "buffers": {
                name: checkpoints.describe_tensor(buffer) for name, buffer in self.model.named_buffers()
            },
            "loss": self.loss,
            "temperature": self.temperature,
            "batch_size": self.batch_size,
            "randomness": None if self.randomness is None else self.randomness.code,
            "seed": self.seed,
            "seeds": list(self.order.seeds),
            "jackknife_groups": self.groups,
            "left_out": list(self.left_out),
            "early_stopping": self.patience,
        }
        return checkpoints.describe(arguments, self.data, self.validation)

    # --------------------------------------------------------------------------------------------------------
    # Beginning and end

    def start(self, saved: dict[str, Any] | None) -> None:
        """Begins the run, or takes it up where it was saved."""
        members = self.model.ensemble_size
        if saved is None and self.randomness is not None:
            own = self.randomness.init
            self.model.reset_parameters(list(self.order.seeds) if own else [self.seed] * members)
        self.epoch = 0
        self.losses: list[np.ndarray] = []  # of each epoch [2, E]: train, validation
        self.seconds: list[float] = []  # of each epoch
        self.best = np.full(members, np.inf)
        self.best_epoch = np.full(members, -1)
        self.status = np.full(members, RUNNING)
        if saved is None:
            self.kept = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            self.optimizer = self.make_optimizer(self.working.parameters())
            return
        self.epoch = saved["epoch"]
        self.active = saved["active"]
        self.losses = list(saved["losses"].numpy())
        self.seconds = list(saved["seconds"])
        self.best, self.best_epoch = saved["best"].numpy(), saved["best_epoch"].numpy()
        self.status = saved["status"].numpy()
        self.kept = {name: t.to(self.data[0].device) for name, t in saved["kept"].items()}
        if self.active:
            if len(self.active) < members:
                self.working = self.model.select(self.active)
            _copy(self.working, saved["parameters"])
            self.optimizer = self.make_optimizer(self.working.parameters())
            load_member_state(self.optimizer, saved["optimizer"])

    def check(self, saved: dict[str, Any]) -> None:
        """Refuses what `state` cannot have made, before any of it is used.

        Raises:
            ValueError, or what a wrong type leads to: it says what is wrong.
        """
        members, epoch, active = self.model.ensemble_size, saved["epoch"], saved["active"]
        running = [m for m, status in enumerate(saved["status"].tolist()) if status == RUNNING]
        best_epoch = saved["best_epoch"]
        _require(type(epoch) is int and epoch >= 1, f"epoch {epoch!r}")
        _require(all(type(m) is int for m in active) and active == running, f"active members {active!r}")
        _require(len(saved["seconds"]) == epoch and all(s >= 0 for s in saved["seconds"]), "other seconds")
        for name, shape, dtype in (
            ("losses", (epoch, 2, members), torch.float64),
            ("best", (members,), torch.float64),
            ("best_epoch", (members,), torch.int64),
            ("status", (members,), torch.int64),
        ):
            _require(saved[name].shape == shape and saved[name].dtype == dtype, f"{name} of another form")
        _require(((saved["status"] >= 0) & (saved["status"] < len(STATUS))).all(), "an unknown status")
        _require(((best_epoch >= -1) & (best_epoch < epoch)).all(), "a best epoch that has not been")
        groups = {"kept": best_epoch >= 0}
        if active:
            groups["parameters"] = torch.ones(len(active), dtype=torch.bool)
        for group, trained in groups.items():
            own = dict(self.model.named_parameters())
            _require(saved[group].keys() == own.keys(), f"{group} of other names")
            for name, tensor in saved[group].items():
                shared = self.model.shares_parameters
                expected = own[name].shape if shared else (len(trained), *own[name].shape[1:])
                same = tensor.shape == expected and tensor.dtype == own[name].dtype
                _require(same, f"{group}[{name!r}] of another form")
                if trained.any():
                    known = tensor if shared else tensor[trained]
                    _require(known.isfinite().all(), f"{group}[{name!r}] with NaN or Inf")
        states = saved["optimizer"]
        _require(isinstance(states, list) and all(isinstance(s, dict) for s in states), "another optimizer")

    def state(self) -> dict[str, Any]:
        """What `start` takes."""
        return {
            "epoch": self.epoch,
            "active": self.active,
            "losses": torch.from_numpy(np.stack(self.losses)),
            "seconds": self.seconds,
            "best": torch.from_numpy(self.best),
            "best_epoch": torch.from_numpy(self.best_epoch),
            "status": torch.from_numpy(self.status),
            "kept": self.kept,
            "parameters": {name: p.detach() for name, p in self.working.named_parameters()},
            "optimizer": member_state(self.optimizer),
        }

    def finish(self) -> History:
        """Gives the model the weights that were kept."""
        _copy(self.model, self.kept)
        self.status[self.status == RUNNING] = FINISHED
        train, validation = np.stack(self.losses, 1) if self.losses else np.empty((2, 0, len(self.status)))
        status = tuple(STATUS[status] for status in self.status)
        return History(train, validation, self.best_epoch, status, np.array(self.seconds))

    # --------------------------------------------------------------------------------------------------------
    # An epoch

    def train(self, advance: Callable[[], Any]) -> None:
        """One pass over the training rows."""
        self.begun = time.perf_counter()
        device, members = self.data[0].device, self.active
        double = any(p.dtype == torch.float64 for p in self.working.parameters())
        dtype = torch.float64 if double else torch.float32
        order = self.order.epoch(self.epoch, members)
        seeds = self._dropout_seeds()
        total = torch.zeros(len(members), dtype=torch.float64, device=device)
        with _mode(self.working, training=True):
            for step, rows in enumerate(order.split(self.batch_size, dim=-1)):
                weights = self.order.weights(rows, members)
                losses = self._losses(
                    self._batch(self.data, rows.to(device)),
                    sample_weight=None if weights is None else weights.to(device, dtype),
                    **({} if seeds is None else {"dropout_seeds": seeds[step]}),
                )
                self.optimizer.zero_grad()
                losses.sum().backward()
                self.optimizer.step()
                total += losses.detach() * rows.shape[-1]
                advance()
        self.train_loss = (total / order.shape[-1]).cpu().numpy()

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Validation after an epoch: who is best now, who stops, who has diverged."""
        members, active = self.model.ensemble_size, np.array(self.active)
        losses = np.full((2, members), np.nan)
        losses[0, active] = self.train_loss
        healthy = np.isfinite(self.train_loss) & self._finite()
        if self.validation_rows > 0:
            losses[1, active] = validation = self._validate()
            healthy &= np.isfinite(validation)
        if self.model.shares_parameters:
            healthy[:] = healthy.all()
        improved = healthy.copy()
        if self.validation_rows > 0:
            if self.model.shares_parameters:
                validation = np.full_like(validation, validation.mean())
            if self.patience is not None:
                improved &= validation < self.best[active]
            self.best[active[improved]] = validation[improved]
        self.losses.append(losses)
        self.best_epoch[active[improved]] = self.epoch
        self._keep(improved)
        self.status[active[~healthy]] = DIVERGED
        if not healthy.all():
            warnings.warn(
                f"fit: members {active[~healthy].tolist()} diverged in epoch {self.epoch}: they keep their "
                f"last good weights, the others go on",
                stacklevel=3,
            )
        if self.patience is not None:
            patient = self.epoch - self.best_epoch[active] < self.patience
            self.status[active[healthy & ~patient]] = STOPPED
        self.epoch += 1
        stay = self.status[active] == RUNNING
        if not stay.all():
            self._go_on_with(np.flatnonzero(stay))
        self.seconds.append(time.perf_counter() - self.begun)

    def summary(self) -> str:
        """Losses of the last epoch, over the members that trained in it, for the progress bar."""
        texts = []
        for name, losses in zip(("train", "validation"), self.losses[-1], strict=True):
            losses = losses[np.isfinite(losses)]
            if len(losses) > 0:
                texts.append(f"{name} {losses.mean():.4f} ± {losses.std():.4f}")
        return ", ".join([*texts, f"{len(self.active)} members"])

    def _validate(self) -> np.ndarray:
        """Each member's mean loss over the validation rows, float64."""
        count = self.validation_rows
        total = torch.zeros(len(self.active), dtype=torch.float64)
        with _mode(self.working, training=False):
            for rows in torch.arange(count, device=self.data[0].device).split(self.batch_size):
                total += self._losses(self._batch(self.validation, rows)).double().cpu() * len(rows)
        return (total / count).numpy()

    def _batch(self, tensors: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """These rows, `[B]` or `[E, B]`, of each tensor, for the active members."""
        if not self.own_data:
            return _rows(tensors, rows)
        owners = torch.tensor(self.active, device=rows.device).unsqueeze(1)
        return _rows([t.flatten(0, 1) for t in tensors], owners * tensors[0].shape[1] + rows)

    def _losses(self, batch: Sequence[Tensor], **options: Any) -> Tensor:
        if self.loss == "cross_entropy":
            options["temperature"] = self.temperature
        return self.working.loss(*batch, loss=self.loss, **options)

    def _dropout_seeds(self) -> Tensor | None:
        """int64 `[steps, members]` for this epoch; None for a model without dropout."""
        if not self.working.dropout:
            return None
        drawn = [
            torch.randint(
                2**62, (self.steps,), generator=generator(self.order.seeds[m], "dropout", self.epoch)
            )
            for m in self.active
        ]
        return torch.stack(drawn, 1).to(self.data[0].device)

    def _finite(self) -> np.ndarray:
        """bool, of each active member: whether it has no NaN or infinite parameter."""
        if self.model.shares_parameters:
            return np.array(all(parameter.isfinite().all() for parameter in self.working.parameters()))
        flags = [parameter.isfinite().flatten(1).all(1) for parameter in self.working.parameters()]
        return torch.stack(flags).all(0).cpu().numpy()

    def _keep(self, chosen: np.ndarray) -> None:
        """Remembers the present weights of some of the active members (bool) as the ones to end with."""
        if self.model.shares_parameters:
            if chosen.all():
                self.kept = {name: p.detach().clone() for name, p in self.working.named_parameters()}
            return
        places = torch.from_numpy(np.flatnonzero(chosen)).to(self.data[0].device)
        members = torch.tensor(self.active, device=places.device)[places]
        for name, parameter in self.working.named_parameters():
            self.kept[name][members] = parameter.detach()[places]

    def _go_on_with(self, places: np.ndarray) -> None:
        """Leaves all but some of the active members behind, with what the optimizer remembers of them."""
        self.active = [self.active[place] for place in places]
        if not self.active:
            return
        chosen = torch.from_numpy(places).to(self.data[0].device)
        remembered = [
            {
                name: value[chosen] if isinstance(value, Tensor) and value.dim() > 0 else value
                for name, value in state.items()
            }
            for state in member_state(self.optimizer)
        ]
        self.working = self.working.select(places.tolist())
        self.optimizer = self.make_optimizer(self.working.parameters())
        load_member_state(self.optimizer, remembered)


def _require(condition: bool | Tensor, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _rows(tensors: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """`[..., *]` of each tensor `[N, *]`."""
    flat = rows.reshape(-1)
    return [t.index_select(0, flat).view(*rows.shape, *t.shape[1:]) for t in tensors]


@torch.no_grad()
def _copy(model: nn.Module, parameters: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(parameters[name])


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    was = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(was)
