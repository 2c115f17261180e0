"""The state of a training run, and what an epoch does to it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from pyens._types import Bootstrap, Loss
from pyens.nn import Ensemble
from pyens.nn.ensemble import check_temperature, without_left_out
from pyens.optim import clip_member_grad_norm_, keep_members, load_member_state, member_state
from pyens.reference.ensemble_mlp_loss import LOSSES, mean_losses, weighted_mean
from pyens.training import _checks, _data
from pyens.training import checkpoint as checkpoints
from pyens.training.history import DIVERGED, FINISHED, RUNNING, STATUS, STOPPED, History
from pyens.training.randomness import Order, Randomness, generator, member_seeds, partition, split_rows

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
# Outputs [E, B, K] and target -> losses [E, B] or [E].
LossFunction = Callable[[Tensor, Tensor], Tensor]
Penalty = Callable[[Tensor], Tensor]  # outputs -> [E], or one number for all members


class Run:
    """A run between two epochs. `active` are the members that still train, in the order of `model`'s."""

    def __init__(
        self,
        model: Ensemble,
        data: Sequence[Any],
        *,
        loss: Loss | LossFunction,
        penalty: Penalty | None,
        temperature: float,
        sample_weight: Any,
        bootstrap: Bootstrap | None,
        batch_size: int,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None,
        schedule_steps: bool,
        clip_norm: float | None,
        randomness: Randomness | None,
        seed: int,
        seeds: Sequence[int] | None,
        groups: int | None,
        left_out: Sequence[int] | None,
        validation: float | Sequence[Any],
        early_stopping: int | None,
        own_data: bool,
        check: bool,
    ) -> None:
        members = _checks.model(model)
        if not (loss in LOSSES if isinstance(loss, str) else callable(loss)):
            raise ValueError(
                f"fit: loss: expected one of {', '.join(LOSSES)}, got {loss!r}, which is no function either"
            )
        check_temperature("fit", loss, temperature)  # type: ignore[arg-type]
        if bootstrap not in (None, *get_args(Bootstrap)):
            raise ValueError(
                f"fit: bootstrap: expected one of {', '.join(get_args(Bootstrap))}, got {bootstrap!r}"
            )
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"fit: clip_norm: expected a positive number, got {clip_norm}")
        owners, axis = members if own_data else None, int(own_data)
        device, dtype = _checks.home(model)
        data = _data.as_tensors("data", data, dtype, loss, device)
        rows = _checks.data("data", data, members=owners)
        data = _data.as_targets(data, loss, axis)
        _checks.count("batch_size", batch_size)
        sources = randomness or Randomness(shuffle=True)
        own_seeds = member_seeds(seed, members) if seeds is None else [int(s) for s in seeds]
        if len(own_seeds) != members:
            raise ValueError(f"fit: seeds: expected one for each of {members} members, got {len(own_seeds)}")
        if model.shares_parameters and sources.init:
            raise ValueError("fit: randomness: expected no R for members that share their parameters, got it")
        self.groups, self.left_out = _checks.jackknife(sources, members, groups, left_out)

        self.model = model
        self.active = list(range(members))
        self.data, self.rows, self.device = data, rows, device
        double = any(p.dtype == torch.float64 for p in model.parameters())
        self.dtype = torch.float64 if double else torch.float32  # of weights and losses
        self.own_data = own_data
        self.loss, self.penalty, self.temperature, self.batch_size = loss, penalty, temperature, batch_size
        self.schedule_steps, self.clip_norm = schedule_steps, clip_norm
        self.randomness, self.seed = randomness, seed
        self.patience = early_stopping
        share = validation if isinstance(validation, (int, float)) else 0.0
        if not 0 <= share < 1:
            raise ValueError(f"fit: validation: expected a share in [0, 1) or tensors, got {validation}")
        training, held_out = split_rows(rows, share, seed)
        if len(training) == 0:
            raise ValueError(f"fit: data: expected rows beside the validation rows, got {rows} in all")
        weight = _data.check_weights(sample_weight, members, rows, training, device)
        self.validation_weight = None
        if isinstance(validation, (int, float)):
            self.validation = tuple(
                None if t is None else t.index_select(axis, held_out.to(t.device)) for t in data
            )
            self.validation_rows = len(held_out)
            if weight is not None:
                self.validation_weight = weight.index_select(-1, held_out.to(device))
        else:
            given = _data.as_tensors("validation", validation, dtype, loss, device)
            self.validation_rows = _checks.data("validation", given, members=owners)
            self.validation = _data.as_targets(given, loss, axis)
            _checks.alike("validation", self.validation, data, axis)
        if check:
            with _mode(model, training=False):
                _data.check_values("data", data, model, loss, axis, weight)
                if not isinstance(validation, (int, float)) and self.validation_rows > 0:
                    _data.check_values("validation", self.validation, model, loss, axis, None)
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
        self.bootstrap, self.weight = bootstrap, weight
        if bootstrap is not None:
            counts = torch.stack([_resampled(bootstrap, training, rows, own) for own in own_seeds]).to(device)
            self.weight = counts.double() if weight is None else weight * counts
        self._check_members_have_rows()
        # What the optimizer begins with; a schedule changes it, and so does nobody else.
        self.optimizer = optimizer(model.parameters())
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"fit: optimizer: expected a function that gives an optimizer of the parameters, "
                f"got a {type(self.optimizer).__name__} from it"
            )
        self.optimizer_at_first = _described(self.optimizer)
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        _checks.scheduler(self.scheduler, self.optimizer)
        # Whatever the model refuses, before anything is changed.
        with torch.no_grad(), _mode(model, training=False):
            first = self._first_row()
            try:
                with torch.enable_grad():
                    losses = self._losses(self._batch(data, first), penalty=self.penalty)
                if not losses.requires_grad and any(p.requires_grad for p in model.parameters()):
                    raise ValueError("a loss with a gradient was expected, got one without")
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                shapes = ", ".join(str(None if t is None else list(t.shape)) for t in data[:4])
                more = f" and {len(data) - 4} more" * (len(data) > 4)
                raise kind(
                    f"fit: data: expected rows that {type(model).__name__}.loss takes, got tensors of shapes "
                    f"{shapes}{more}, of whose first row alone it says: {error}"
                ) from error

    def _check_members_have_rows(self) -> None:
        """That weights, draws and groups together leave each member rows to train on and to be judged by."""
        members = list(range(self.model.ensemble_size))
        if self.weight is not None or self.order.groups is not None:
            total = torch.zeros(len(members), dtype=torch.float64, device=self.device)
            for rows in self.order.rows.split(self.batch_size):
                weights = self._weights(rows)
                assert weights is not None
                total = total + weights.sum(-1, dtype=torch.float64)
            if not (total > 0).all():
                raise ValueError(
                    "fit: data: expected a training row with weight above 0 for each member, after bootstrap "
                    f"and jackknife, got none for members {(total <= 0).nonzero().flatten().tolist()}"
                )
        weight = self.validation_weight
        if weight is not None and self.validation_rows > 0 and not (weight.sum(-1) > 0).all():
            raise ValueError("fit: sample_weight: expected a validation row with weight above 0, got none")

    def _first_row(self) -> Tensor:
        """int64 `[1]`: the first row that weighs something."""
        rows = torch.arange(self.rows, device=self.device)
        if self.weight is not None:
            weighs = self.weight > 0
            rows = rows[weighs if weighs.dim() == 1 else weighs.any(0)]
        return rows[:1]

    def describe(self) -> dict[str, Any]:
        """What another run must have in common with this one to go on from its checkpoint."""
        arguments = {
            "model": str(self.model),
            "parameters": {name: list(p.shape) for name, p in self.model.named_parameters()},
            "buffers": {
                name: checkpoints.describe_tensor(buffer) for name, buffer in self.model.named_buffers()
            },
            "loss": _name(self.loss),
            "penalty": _name(self.penalty),
            "temperature": self.temperature,
            "optimizer": self.optimizer_at_first,
            "scheduler": None if self.scheduler is None else type(self.scheduler).__name__,
            "schedule_steps": self.schedule_steps,
            "clip_norm": self.clip_norm,
            "bootstrap": self.bootstrap,
            "weights": None if self.weight is None else checkpoints.describe_tensor(self.weight),
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
        self.rates: list[float] = []  # of each epoch, of the optimizer's first group
        self.best = np.full(members, np.inf)
        self.best_epoch = np.full(members, -1)
        self.status = np.full(members, RUNNING)
        self.kept = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.initial = saved["initial"] if saved is not None else _described_all(self.kept)
        self.whole = [
            (module, module.ensemble_size) for module in self.model.modules() if isinstance(module, Ensemble)
        ]
        self.buffers = [
            (module, name, buffer)
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
        ]
        if saved is None:
            return
        self.epoch = saved["epoch"]
        self.active = saved["active"]
        self.losses = list(saved["losses"].numpy())
        self.seconds, self.rates = list(saved["seconds"]), list(saved["rates"])
        self.best, self.best_epoch = saved["best"].numpy(), saved["best_epoch"].numpy()
        self.status = saved["status"].numpy()
        if self.active:
            try:
                if len(self.active) < members:
                    self._leave_all_but(self.active)
                _copy(self.model, saved["parameters"])
                load_member_state(self.optimizer, saved["optimizer"])
                for group, options in zip(self.optimizer.param_groups, saved["options"], strict=True):
                    group.update(options)
                if self.scheduler is not None:
                    self.scheduler.load_state_dict(saved["scheduler"])
            except BaseException:
                self.restore()  # as it was given
                raise
        self.kept = {name: t.to(self.device) for name, t in saved["kept"].items()}

    def check(self, saved: dict[str, Any]) -> None:
        """Refuses what `state` cannot have made, before any of it is used.

        Raises:
            ValueError, or what a wrong type leads to: it says what is wrong.
        """
        members, epoch, active = self.model.ensemble_size, saved["epoch"], saved["active"]
        running = [m for m, status in enumerate(saved["status"].tolist()) if status == RUNNING]
        best_epoch = saved["best_epoch"]
        _require(type(epoch) is int and epoch >= 1, f"epoch {epoch!r}")
        if self.randomness is None:
            present = _described_all(dict(self.model.named_parameters()))
            # Those that the run began with, or the model as that run left it.
            known = present in (saved["initial"], _described_all(saved["kept"]))
            _require(known, "other initial parameters; build the model as it was, or name another file")
        _require(all(type(m) is int for m in active) and active == running, f"active members {active!r}")
        _require(len(saved["rates"]) == epoch, "other rates")
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
        options = saved["options"]
        own_options = [_options(group) for group in self.optimizer.param_groups]
        same = [set(a) for a in own_options] == [set(b) for b in options]
        _require(same, "options of another optimizer")
        states = saved["optimizer"]
        _require(isinstance(states, list) and all(isinstance(s, dict) for s in states), "another optimizer")

    def state(self) -> dict[str, Any]:
        """What `start` takes."""
        return {
            "epoch": self.epoch,
            "active": self.active,
            "losses": torch.from_numpy(np.stack(self.losses)),
            "seconds": self.seconds,
            "rates": self.rates,
            "best": torch.from_numpy(self.best),
            "best_epoch": torch.from_numpy(self.best_epoch),
            "status": torch.from_numpy(self.status),
            "kept": self.kept,
            "initial": self.initial,
            "parameters": {name: p.detach() for name, p in self.model.named_parameters()},
            "optimizer": member_state(self.optimizer),
            "options": [_options(group) for group in self.optimizer.param_groups],
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
        }

    def finish(self) -> History:
        """Gives the model the weights that were kept."""
        self.restore()
        self.status[self.status == RUNNING] = FINISHED
        train, validation = np.stack(self.losses, 1) if self.losses else np.empty((2, 0, len(self.status)))
        status = tuple(STATUS[status] for status in self.status)
        return History(
            train,
            validation,
            self.best_epoch,
            status,
            np.array(self.seconds),
            np.array(self.rates),
            self._groups().numpy(),
            np.array(self.left_out) if self.left_out else np.full(len(self.status), -2),
            None if self.weight is None else (self.weight > 0).cpu().numpy(),
        )

    def _groups(self) -> Tensor:
        """int32 `[N]`: the jackknife group of each row, 0 without, -1 for validation rows."""
        if self.order.groups is not None:
            return self.order.groups
        groups = torch.full((self.rows,), -1, dtype=torch.int32)
        groups[self.order.rows.long()] = 0
        return groups

    def restore(self) -> None:
        """Brings back the members that have left: the model whole, with the weights that were kept."""
        for ensemble, ensemble_size in self.whole:
            ensemble.ensemble_size = ensemble_size
        for module, name, buffer in self.buffers:
            module._buffers[name] = buffer
        for name, parameter in self.model.named_parameters():
            if parameter.shape != self.kept[name].shape:
                parameter.grad, parameter.data = None, torch.empty_like(self.kept[name])
        _copy(self.model, self.kept)

    # --------------------------------------------------------------------------------------------------------
    # An epoch

    def train(self, advance: Callable[[], Any]) -> None:
        """One pass over the training rows."""
        self.begun = time.perf_counter()
        device, members = self.device, self.active
        order = self.order.epoch(self.epoch, members)
        seeds = self._dropout_seeds()
        total, weighed = torch.zeros(2, len(members), dtype=torch.float64, device=device)
        with _mode(self.model, training=True):
            for step, rows in enumerate(order.split(self.batch_size, dim=-1)):
                weights = self._weights(rows)
                losses = self._losses(
                    self._batch(self.data, rows.to(device)),
                    sample_weight=None if weights is None else weights.to(self.dtype),
                    penalty=self.penalty,
                    **({} if seeds is None else {"dropout_seeds": seeds[step]}),
                )
                self.optimizer.zero_grad()
                losses.sum().backward()
                if self.clip_norm is not None:
                    clip_member_grad_norm_(self._trained, self.clip_norm)
                self.optimizer.step()
                if self.scheduler is not None and self.schedule_steps:
                    self.scheduler.step()
                share = rows.shape[-1] if weights is None else weights.sum(-1)
                total += losses.detach() * share
                weighed += share
                advance()
        self.rates.append(float(self.optimizer.param_groups[0]["lr"]))
        if self.scheduler is not None and not self.schedule_steps:
            self.scheduler.step()
        self.train_loss = (total / weighed).cpu().numpy()

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Validation after an epoch: who is best now, who stops, who has diverged."""
        members, active = len(self.status), np.array(self.active)
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
        total, weighed = torch.zeros(2, len(self.active), dtype=torch.float64)
        weight = self.validation_weight
        if weight is not None and weight.dim() == 2:
            weight = weight[self.active]
        with _mode(self.model, training=False):
            for rows in torch.arange(self.validation_rows, device=self.device).split(self.batch_size):
                own = None if weight is None else weight[..., rows].to(self.dtype)
                losses = self._losses(self._batch(self.validation, rows), sample_weight=own)
                share = len(rows) if own is None else own.sum(-1).cpu()
                total += losses.double().cpu() * share
                weighed += share
        means: np.ndarray = (total / weighed).numpy()
        return means

    def _weights(self, rows: Tensor) -> Tensor | None:
        """What these rows, `[B]` or `[E, B]`, weigh for the active members, in one of these shapes."""
        present = self.order.weights(rows, self.active)
        if present is not None:
            present = present.to(self.device)
        if self.weight is None:
            return present
        rows, own = rows.to(self.device).long(), self.weight
        each = torch.arange(len(self.active), device=self.device).unsqueeze(1)
        own = own[rows] if own.dim() == 1 else own[self.active][each, rows]
        return own if present is None else own * present

    def _batch(self, tensors: Sequence[Tensor | None], rows: Tensor) -> list[Tensor | None]:
        """These rows, `[B]` or `[E, B]`, of each tensor, for the active members."""
        if not self.own_data:
            return _rows(tensors, rows)
        owners = torch.tensor(self.active, device=rows.device).unsqueeze(1)
        return [None if t is None else t[owners, rows.long()] for t in tensors]

    def _losses(
        self,
        batch: Sequence[Tensor | None],
        *,
        sample_weight: Tensor | None = None,
        penalty: Penalty | None = None,
        **options: Any,
    ) -> Tensor:
        """Each active member's loss `[E]`."""
        loss, members = self.loss, len(self.active)
        if isinstance(loss, str) and penalty is None:
            if loss == "cross_entropy":
                options["temperature"] = self.temperature
            return self.model.loss(*batch, loss=loss, sample_weight=sample_weight, **options)  # type: ignore[arg-type]
        *inputs, target = batch
        if sample_weight is not None:
            inputs = [without_left_out(t, sample_weight, members) for t in inputs]
        output = self.model(*inputs, **options)
        if isinstance(loss, str):
            assert target is not None
            losses = mean_losses(lambda x: x, output, target, loss, self.temperature, sample_weight)
        else:
            losses = self._reduced(loss(output, target), output, sample_weight)  # type: ignore[arg-type]
        if penalty is None:
            return losses
        added = penalty(output)
        if not isinstance(added, Tensor) or added.shape not in ((), (members,)):
            raise ValueError(
                f"fit: penalty: expected [{members}] or one number, got {_form(added)} from {_name(penalty)}"
            )
        return losses + (added / members if added.dim() == 0 else added)  # of one number, each its share

    def _reduced(self, losses: Tensor, output: Tensor, weight: Tensor | None) -> Tensor:
        members, rows = output.shape[:2]
        form = f"[{members}, {rows}]" + f" or [{members}]" * (weight is None)
        if isinstance(losses, Tensor) and losses.shape == (members, rows):
            if weight is None:
                return losses.mean(-1)
            return weighted_mean(losses, weight)
        if isinstance(losses, Tensor) and losses.shape == (members,) and weight is None:
            return losses
        raise ValueError(f"fit: loss: expected {form}, got {_form(losses)} from {_name(self.loss)}")

    @property
    def _trained(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _dropout_seeds(self) -> Tensor | None:
        """int64 `[steps, members]` for this epoch; None for a model without dropout."""
        if not self.model.dropout:
            return None
        drawn = [
            torch.randint(
                2**62, (self.steps,), generator=generator(self.order.seeds[m], "dropout", self.epoch)
            )
            for m in self.active
        ]
        return torch.stack(drawn, 1).to(self.device)

    def _finite(self) -> np.ndarray:
        """bool, of each active member: whether it has no NaN or infinite parameter."""
        if self.model.shares_parameters:
            return np.array(all(parameter.isfinite().all() for parameter in self.model.parameters()))
        flags = [parameter.isfinite().flatten(1).all(1) for parameter in self.model.parameters()]
        return torch.stack(flags).all(0).cpu().numpy()

    def _keep(self, chosen: np.ndarray) -> None:
        """Remembers the present weights of some of the active members (bool) as the ones to end with."""
        if self.model.shares_parameters:
            if chosen.all():
                self.kept = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            return
        places = torch.from_numpy(np.flatnonzero(chosen)).to(self.device)
        members = torch.tensor(self.active, device=places.device)[places]
        for name, parameter in self.model.named_parameters():
            self.kept[name][members] = parameter.detach()[places]

    def _go_on_with(self, places: np.ndarray) -> None:
        """Leaves all but some of the active members behind, with what the optimizer remembers of them."""
        self.active = [self.active[place] for place in places]
        if not self.active:
            return
        self._leave_all_but(places.tolist())

    def _leave_all_but(self, places: list[int]) -> None:
        """In place: the parameters stay the objects that optimizer, schedule, hooks and user hold."""
        members = self.model.ensemble_size
        keep_members(self.optimizer, places, members)
        self.model.select_(places)


def _require(condition: bool | Tensor, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _rows(tensors: Sequence[Tensor | None], rows: Tensor) -> list[Tensor | None]:
    """`[..., *]` of each tensor `[N, *]`."""
    flat = rows.reshape(-1)
    return [None if t is None else t.index_select(0, flat).view(*rows.shape, *t.shape[1:]) for t in tensors]


def _resampled(kind: Bootstrap, training: Tensor, rows: int, seed: int) -> Tensor:
    """int16 `[rows]`: how often one member meets each row, drawn from its seed; 0 for validation rows."""
    n, drawn_from = len(training), generator(seed, "bootstrap")
    if kind == "poisson":
        drawn = torch.poisson(torch.ones(n), generator=drawn_from)
    else:
        drawn = torch.bincount(torch.randint(n, (n,), generator=drawn_from), minlength=n)
    counts = torch.zeros(rows, dtype=torch.int16)
    counts[training.sort().values.long()] = drawn.short()
    return counts


def _described_all(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: checkpoints.describe_tensor(tensor) for name, tensor in tensors.items()}


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _described(optimizer: torch.optim.Optimizer) -> str:
    """Its kind and the options of its groups."""
    groups = [
        {name: float(v) if isinstance(v, Tensor) else v for name, v in _options(group).items()}
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__} {groups}"


def _name(function: Any) -> str | None:
    if function is None or isinstance(function, str):
        return function
    return getattr(function, "__qualname__", type(function).__name__)


def _form(value: Any) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


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
