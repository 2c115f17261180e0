"""Training over rows that there are, epoch by epoch: who meets what, who is judged how, who stops."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from pyens import _files
from pyens._kinds import check_number
from pyens._types import Bootstrap
from pyens.data.rows import RowSource
from pyens.nn import Ensemble
from pyens.nn.ensemble import is_held, member_tensors, renew_accumulator
from pyens.reference.ensemble_mlp_loss import row_sums
from pyens.training import _checks, _data
from pyens.training import checkpoint as checkpoints
from pyens.training import metrics as measures
from pyens.training._bar import bar
from pyens.training._source import Source, Whole, Window, Windows, check_source, window_of
from pyens.training.callbacks import Callback, Progress, call
from pyens.training.history import DIVERGED, FINISHED, RUNNING, STATUS, STOPPED, History
from pyens.training.randomness import ORDER, Order, Randomness, generator, partition, split_rows

if TYPE_CHECKING:
    from pyens.training.trainer import Trainer


class Run:
    """A run between two epochs. `active` are the members that still train, in the order of the model's."""

    def __init__(
        self,
        trainer: Trainer,
        data: Sequence[Any] | RowSource,
        *,
        batch_size: int,
        window: int | None,
        sample_weight: Any,
        bootstrap: Bootstrap | None,
        randomness: Randomness | None,
        groups: Any,
        jackknife_groups: int | None,
        left_out: Sequence[int] | None,
        validation: Any,
        metrics: Sequence[str] | Mapping[str, measures.Metric],
        early_stopping: int | None,
        monitor: str,
        mode: measures.Mode | None,
        min_delta: float,
        callbacks: Sequence[Callback | Callable[[Progress], Any]],
        own_data: bool,
        check: bool,
    ) -> None:
        model, loss, device = trainer.model, trainer.loss, trainer.device
        members = _checks.model(model)
        if bootstrap not in (None, *get_args(Bootstrap)):
            raise ValueError(
                f"fit: bootstrap: expected one of {', '.join(get_args(Bootstrap))}, got {bootstrap!r}"
            )
        _checks.dense(model, trainer.clip_norm, trainer.clip_value)
        owners, axis = members if own_data else None, int(own_data)
        batch_size = _checks.count("batch_size", batch_size)
        self.data: Source | tuple[Tensor | None, ...]
        if isinstance(data, RowSource):
            check_source(data, {"own_data": own_data, "bootstrap": bootstrap, "groups": groups})
            self.data = Source("data", data, trainer.dtype, loss, device)
            rows, in_windows = len(self.data), window_of(data, window, batch_size)
        else:
            if window is not None:
                raise ValueError(f"fit: window: expected None beside tensors, got {window}")
            tensors = _data.as_tensors("data", data, trainer.dtype, loss, device)
            rows, in_windows = _checks.data("data", tensors, members=owners), None
            self.data = _data.as_targets(tensors, loss, axis)
        if randomness is not None and not isinstance(randomness, Randomness):
            raise TypeError(f"fit: randomness: expected a Randomness, got a {type(randomness).__name__}")
        sources = randomness or Randomness(shuffle=True)
        if model.shares_parameters and (sources.init or sources.jackknife):
            raise ValueError(
                f"fit: randomness: expected neither R nor J for members that share their parameters, got "
                f"{sources.code}"
            )
        self.parts, self.left_out = _checks.jackknife(sources, members, jackknife_groups, left_out)

        self.trainer, self.model = trainer, model
        trainer.members = list(range(members))
        self.rows, self.device, self.axis = rows, device, axis
        self.batch_size, self.randomness = batch_size, randomness
        self.patience = early_stopping
        chosen = _data.check_validation(validation, rows)
        share = chosen if isinstance(chosen, float) else 0.0
        held = chosen if isinstance(chosen, Tensor) else None
        together = _data.check_groups(groups, rows)
        training, held_out = split_rows(rows, share, trainer.seed, together, held)
        if len(training) == 0:
            of = "" if groups is None else f" and {int(together.max()) + 1} groups"  # type: ignore[union-attr]
            raise ValueError(f"fit: data: expected rows beside the validation rows, got {rows} in all{of}")
        weight = _data.check_weights(sample_weight, members, rows, training, device)
        self.validation_weight = None
        self.validation: Source | tuple[Tensor | None, ...]
        if isinstance(chosen, (float, Tensor)):
            if in_windows is not None and len(held_out) > 0:
                raise ValueError(
                    "fit: validation: expected 0 or rows of their own beside rows that are read in windows, "
                    f"got {chosen if isinstance(chosen, float) else 'rows of data'}"
                )
            self.validation = tuple(self._batch(self.data, held_out.to(device), range(members)))
            self.validation_rows = len(held_out)
            if weight is not None:
                self.validation_weight = weight.index_select(-1, held_out.to(device))
        elif isinstance(chosen, RowSource):
            if own_data:
                raise ValueError(
                    f"fit: validation: expected tensors [{members}, N, ...] under own_data, got a "
                    f"{type(chosen).__name__}"
                )
            self.validation = Source("validation", chosen, trainer.dtype, loss, device)
            self.validation_rows = len(self.validation)
        else:
            given = _data.as_tensors("validation", chosen, trainer.dtype, loss, device)
            self.validation_rows = _checks.data("validation", given, members=owners)
            self.validation = _data.as_targets(given, loss, axis)
        if not isinstance(chosen, (float, Tensor)):
            _checks.alike("validation", self._form(self.validation), self._form(self.data))
        self.check_windows = check and in_windows is not None
        if check:
            with training_mode(model, False):
                if in_windows is None:
                    self._check_values("data", self.data, weight)
                if not isinstance(chosen, (float, Tensor)):
                    self._check_values("validation", self.validation, None)
        if early_stopping is not None:
            early_stopping = self.patience = _checks.count("early_stopping", early_stopping)
            if self.validation_rows == 0:
                raise ValueError("fit: early_stopping: expected validation rows, got none")
        self.metrics = measures.resolve(metrics, loss, trainer.loss_options.get("temperature", 1.0))
        self.metric_names = list(self.metrics)
        if self.metrics and self.validation_rows == 0:
            raise ValueError("fit: metrics: expected validation rows, got none")
        self.monitor = monitor
        self.direction = measures.direction(metrics, monitor, mode)  # 1: lower is better, -1: higher
        check_number("fit", "min_delta", min_delta)
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"fit: min_delta: expected a number from 0, got {min_delta}")
        self.min_delta = min_delta
        if not isinstance(callbacks, (list, tuple)):
            raise TypeError(f"fit: callbacks: expected a list of them, got a {type(callbacks).__name__}")
        for i, callback in enumerate(callbacks):
            if isinstance(callback, type) or not (isinstance(callback, Callback) or callable(callback)):
                raise TypeError(
                    f"fit: callbacks[{i}]: expected a Callback or a function of the progress, "
                    f"got a {type(callback).__name__}"
                )
        self.callbacks = list(callbacks)
        in_part = None
        if sources.jackknife:
            units, what = len(training), "training rows"
            if together is not None:
                units, what = len(together[training.long()].unique()), "groups of training rows"
            if self.parts > units:
                raise ValueError(
                    f"fit: jackknife_groups: expected at most the {units} {what}, got {self.parts}"
                )
            in_part = partition(training, rows, self.parts, trainer.seed, together)
        self.order = Order(training, tuple(trainer.seeds), sources.shuffle, in_part, self.left_out)
        self.windows: Windows | None = None
        if in_windows is not None:
            assert isinstance(self.data, Source)
            self.windows = Windows(self.data, self.order, in_windows, trainer.seed)
        self.steps = math.ceil(len(training) / batch_size)
        self.bootstrap, self.weight = bootstrap, weight
        if bootstrap is not None:
            counts = torch.stack([_resampled(bootstrap, training, rows, own) for own in trainer.seeds])
            counts = counts.to(device)
            self.weight = counts.double() if weight is None else weight * counts
        own = own_data or bootstrap is not None or sources.jackknife
        if trainer.mask_mode != "tiled" and (own or (weight is not None and weight.dim() == 2)):
            raise ValueError(
                f"fit: mask_mode: expected 'tiled' for members with rows or weights of their own, "
                f"got {trainer.mask_mode!r}"
            )
        self._check_members_have_rows()
        without = self.order.groups is not None
        if self.weight is not None:
            without |= bool((self.weight[..., training.long().to(device)] == 0).any())
        _checks.statistics(model, len(training), batch_size, trainer.micro_batch_size, without)
        # Whatever the model refuses, before anything is changed.
        with torch.no_grad(), training_mode(model, False):
            first = self._first_row()
            weights = self._weights(first)
            try:
                with torch.enable_grad():
                    losses = trainer.losses(
                        self._batch(self.data, first),
                        weight=None if weights is None else weights.to(trainer.real),
                        penalty=trainer.penalty,
                    )
                if not losses.requires_grad and any(p.requires_grad for p in model.parameters()):
                    raise ValueError("a loss with a gradient was expected, got one without")
            except (TypeError, ValueError) as error:
                if str(error).startswith("fit: "):
                    raise
                kind = TypeError if isinstance(error, TypeError) else ValueError
                seen = self._batch(self.data, first) if isinstance(self.data, Source) else self.data
                shapes = ", ".join(str(None if t is None else list(t.shape)) for t in seen[:4])
                more = f" and {len(seen) - 4} more" * (len(seen) > 4)
                raise kind(
                    f"fit: data: expected rows that {type(model).__name__}.loss takes, got tensors of shapes "
                    f"{shapes}{more}, of whose first row alone it says: {error}"
                ) from error
            self.term_names = list(trainer.terms)
            columns = {f"{part}_{name}" for part in ("train", "validation") for name in self.term_names}
            if taken := columns.intersection(self.metrics):
                raise ValueError(
                    f"fit: metrics: expected other names than those of the loss's terms, got {sorted(taken)}"
                )
            if self.metrics:
                self._measure()
        trainer.begin()
        # What the optimizer begins with; a schedule changes it, and so does nobody else.
        self.described_at_first = trainer.describe()

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
        if self.weight is None:
            return torch.zeros(1, dtype=torch.int64, device=self.device)
        weighs = self.weight > 0
        return (weighs if weighs.dim() == 1 else weighs.any(0)).nonzero()[:1, 0]

    def describe(self) -> dict[str, Any]:
        """What another run must have in common with this one to go on from its checkpoint."""
        trained = dict(member_tensors(self.model))
        arguments = {
            **self.described_at_first,
            "parameters": {name: list(p.shape) for name, p in member_tensors(self.model)},
            "buffers": {
                name: checkpoints.describe_tensor(buffer)
                for name, buffer in self.model.named_buffers()
                if name not in trained
            },
            "bootstrap": self.bootstrap,
            "weights": None if self.weight is None else checkpoints.describe_tensor(self.weight),
            "batch_size": self.batch_size,
            "randomness": None if self.randomness is None else self.randomness.code,
            "jackknife_groups": self.parts,
            "left_out": list(self.left_out),
            "training rows": checkpoints.describe_tensor(self.order.rows),
            "order": ORDER if self.windows is None else f"{ORDER}, windows of {self.windows.rows}",
            "parts": None if self.order.groups is None else checkpoints.describe_tensor(self.order.groups),
            "metrics": self.metric_names,
            "early_stopping": self.patience,
            "monitor": [self.monitor, self.direction, self.min_delta],
        }
        return checkpoints.describe(arguments, self.data, self.validation)

    def through(
        self, epochs: int, path: Path | None, every: int, progress: bool | Literal["bar", "lines"]
    ) -> History:
        """All epochs, with checkpoints, callbacks and a bar."""
        described = {} if path is None else self.describe()
        saved = None if path is None else checkpoints.load(path, described)
        if saved is not None:
            try:
                self.check(saved)
            except Exception as error:
                raise ValueError(
                    f"fit: checkpoint: {path}: expected the state of such a run, got {error}"
                ) from error
            if saved["epoch"] > epochs:
                raise ValueError(
                    f"fit: epochs: expected at least the {saved['epoch']} of {path}, got {epochs}"
                )
        self._check_schedule_lasts(epochs)
        if path is not None:
            _files.plain([callback.state_dict() for callback in self._remembering()], "fit: callbacks")
            _files.plain(self.trainer.state(), "fit: checkpoint")
        self.remember()
        seen = Progress(self)
        try:
            self.start(saved)
            first = self.epoch
            self._call("on_fit_begin", seen)
            self._stop_those()
            with bar(progress, epochs - first, self.steps) as shown:
                for epoch in range(first, epochs):
                    if not self.active:
                        break
                    self.train(shown.update, seen)
                    self.end_epoch()
                    self._call("on_epoch_end", seen)
                    self._stop_those()
                    shown.epoch(epoch, self.summary())
                    if path is not None and (epoch + 1) % every == 0:
                        checkpoints.save(path, described, self.state())
            if path is not None and self.epoch > first and self.epoch % every != 0:
                checkpoints.save(path, described, self.state())
            self.status[self.status == RUNNING] = FINISHED
            self.restore()
            self._call("on_fit_end", seen)
        except BaseException:
            self.restore()
            _left[self.model] = self.initial, _described_all(self.kept)
            raise
        finally:
            # What the optimizers remember is of those who stayed.
            self.trainer.optimizers, self.trainer.schedulers = [], []
            self.trainer.history = self.history()
        return self.trainer.history

    def _check_schedule_lasts(self, epochs: int) -> None:
        steps = epochs * (self.steps if self.trainer.schedule == "step" else 1)
        for scheduler in self.trainer.schedulers:
            total = getattr(scheduler, "total_steps", steps)
            if isinstance(total, int) and total < steps:
                kind = type(scheduler).__name__
                raise ValueError(f"fit: scheduler: expected one for {steps} steps, got a {kind} for {total}")

    # --------------------------------------------------------------------------------------------------------
    # Beginning and end

    def remember(self) -> None:
        """What `restore` brings back, and the record of a run that has not begun."""
        members = self.model.ensemble_size
        self.epoch, self.current, self.step = 0, -1, -1
        self.losses: list[np.ndarray] = []  # of each epoch [2, E]: train, validation
        self.metric_values: list[np.ndarray] = []  # of each epoch [metrics, E]
        self.term_values: list[np.ndarray] = []  # of each epoch [2, terms, E]: train, validation
        self.seconds: list[float] = []  # of each epoch
        self.rates: list[float] = []  # of each epoch, of the optimizer's first group
        self.best = np.full(members, np.inf)  # of what is monitored, its sign such that lower is better
        self.best_epoch = np.full(members, -1)
        self.status = np.full(members, RUNNING)
        self.to_stop: set[int] = set()
        self.step_loss = torch.empty(0)
        self.kept = {name: p.detach().clone() for name, p in member_tensors(self.model)}
        self.initial = _described_all(self.kept)
        self.whole = [
            (module, module.ensemble_size, vars(module).get("dropout"))
            for module in self.model.modules()
            if isinstance(module, Ensemble)
        ]
        self.buffers = [
            (module, name, buffer)
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
        ]

    def start(self, saved: dict[str, Any] | None) -> None:
        """Begins the run, or takes it up where it was saved."""
        members = self.model.ensemble_size
        if saved is None:
            if self.randomness is not None:
                seeds = self.trainer.seeds if self.randomness.init else [self.trainer.seed] * members
                self.model.reset_parameters(list(seeds))
                self.kept = {name: p.detach().clone() for name, p in member_tensors(self.model)}
                self.initial = _described_all(self.kept)
            return
        self.initial = saved["initial"]
        self.epoch = saved["epoch"]
        self.current = self.epoch - 1
        self.losses = list(saved["losses"].numpy())
        self.metric_values = list(saved["metrics"].numpy())
        self.term_values = list(self._saved_terms(saved).numpy())
        self.seconds, self.rates = list(saved["seconds"]), list(saved["rates"])
        self.best, self.best_epoch = saved["best"].numpy(), saved["best_epoch"].numpy()
        self.status = saved["status"].numpy()
        if active := saved["active"]:
            if len(active) < members:
                self.trainer.keep(active)
            copy_into(self.model, saved["parameters"])
            self.trainer.load_state(saved["trainer"])
        else:
            self.trainer.members = []
        for callback, state in zip(self._remembering(), saved["callbacks"], strict=True):
            callback.load_state_dict(state)
        self.kept = {name: t.to(self.device) for name, t in saved["kept"].items()}

    @property
    def active(self) -> list[int]:
        """Who trains on."""
        return self.trainer.members

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
            present = _described_all(dict(member_tensors(self.model)))
            # Those that the run began with, or the model as that run left it.
            began, left = _left.get(self.model, (None, None))
            known = present in (saved["initial"], _described_all(saved["kept"]))
            known |= began == saved["initial"] and left == present  # interrupted, and begun again
            _require(known, "other initial parameters; build the model as it was, or name another file")
        _require(all(type(m) is int for m in active) and active == running, f"active members {active!r}")
        _require(len(saved["rates"]) == epoch, "other rates")
        _require(len(saved["seconds"]) == epoch and all(s >= 0 for s in saved["seconds"]), "other seconds")
        for name, shape, dtype in (
            ("losses", (epoch, 2, members), torch.float64),
            ("metrics", (epoch, len(self.metrics), members), torch.float64),
            ("terms", (epoch, 2, len(self.term_names), members), torch.float64),
            ("best", (members,), torch.float64),
            ("best_epoch", (members,), torch.int64),
            ("status", (members,), torch.int64),
        ):
            found = self._saved_terms(saved) if name == "terms" else saved[name]
            _require(found.shape == shape and found.dtype == dtype, f"{name} of another form")
        _require(((saved["status"] >= 0) & (saved["status"] < len(STATUS))).all(), "an unknown status")
        _require(((best_epoch >= -1) & (best_epoch < epoch)).all(), "a best epoch that has not been")
        groups = {"kept": best_epoch >= 0}
        if active:
            groups["parameters"] = torch.ones(len(active), dtype=torch.bool)
        for group, trained in groups.items():
            own = dict(member_tensors(self.model))
            _require(saved[group].keys() == own.keys(), f"{group} of other names")
            for name, tensor in saved[group].items():
                shared = self.model.shares_parameters
                expected = own[name].shape if shared else (len(trained), *own[name].shape[1:])
                same = tensor.shape == expected and tensor.dtype == own[name].dtype
                _require(same, f"{group}[{name!r}] of another form")
                if trained.any():
                    known = tensor if shared else tensor[trained]
                    _require(known.isfinite().all(), f"{group}[{name!r}] with NaN or Inf")
        self.trainer.check_state(saved["trainer"])
        _require(len(saved["callbacks"]) == len(self._remembering()), "other callbacks")

    def _saved_terms(self, saved: dict[str, Any]) -> Tensor:
        """NaN in files that are older than terms are."""
        shape = saved["epoch"], 2, len(self.term_names), len(saved["status"])
        found: Tensor = saved.get("terms", torch.full(shape, math.nan, dtype=torch.float64))
        return found

    def state(self) -> dict[str, Any]:
        """What `start` takes."""
        return {
            "epoch": self.epoch,
            "active": self.active,
            "losses": torch.from_numpy(np.stack(self.losses)),
            "metrics": torch.from_numpy(np.stack(self.metric_values)),
            "terms": torch.from_numpy(np.stack(self.term_values)),
            "seconds": self.seconds,
            "rates": self.rates,
            "best": torch.from_numpy(self.best),
            "best_epoch": torch.from_numpy(self.best_epoch),
            "status": torch.from_numpy(self.status),
            "kept": self.kept,
            "initial": self.initial,
            "parameters": {name: p.detach() for name, p in member_tensors(self.model)},
            "trainer": self.trainer.state(),
            "callbacks": [callback.state_dict() for callback in self._remembering()],
        }

    def history(self) -> History:
        """Of the epochs so far."""
        members, epochs = len(self.status), len(self.seconds)  # whole ones: seconds are noted last
        train, validation = np.reshape(self.losses[:epochs], (epochs, 2, members)).swapaxes(0, 1)
        shape = epochs, len(self.metrics), members
        values = np.reshape(self.metric_values[:epochs], shape).swapaxes(0, 1)
        of_terms = np.reshape(self.term_values[:epochs], (epochs, 2, len(self.term_names), members))
        return History(
            train,
            validation,
            self.best_epoch.copy(),
            tuple(STATUS[status] for status in self.status),
            np.array(self.seconds),
            np.array(self.rates[:epochs]),
            self._groups().numpy(),
            np.array(self.left_out) if self.left_out else np.full(members, -2),
            self._weighed(),
            dict(zip(self.metric_names, values, strict=True)),
            {
                f"{part}_{name}": of_terms[:, p, t]
                for t, name in enumerate(self.term_names)
                for p, part in enumerate(("train", "validation"))
            },
        )

    def _weighed(self) -> np.ndarray | None:
        if self.weight is None:
            return None
        weighed = self.weight > 0
        if self.model.shares_parameters and weighed.dim() == 2:
            weighed = weighed.any(0)  # what one of them was trained on, all were
        of_rows: np.ndarray = weighed.cpu().numpy()
        return of_rows

    def _groups(self) -> Tensor:
        """int32 `[N]`: the jackknife group of each row, 0 without, -1 for validation rows."""
        if self.order.groups is not None:
            return self.order.groups
        groups = torch.full((self.rows,), -1, dtype=torch.int32)
        groups[self.order.rows.long()] = 0
        return groups

    def restore(self) -> None:
        """Brings back the members that have left: the model whole, with the weights that were kept."""
        for ensemble, ensemble_size, dropout in self.whole:
            ensemble.ensemble_size = ensemble_size
            if dropout is not None:
                ensemble.dropout = dropout
        for module, name, buffer in self.buffers:
            module._buffers[name] = buffer
        for name, parameter in self.model.named_parameters():
            if parameter.shape != self.kept[name].shape:
                if is_held(parameter):
                    renew_accumulator(parameter)
                parameter.grad, parameter.data = None, torch.empty_like(self.kept[name])
        copy_into(self.model, self.kept)
        self.trainer.members = list(range(self.model.ensemble_size))

    def _remembering(self) -> list[Any]:
        """The callbacks with a state."""
        return [callback for callback in self.callbacks if hasattr(callback, "load_state_dict")]

    def _call(self, name: str, progress: Progress) -> None:
        call(self.callbacks, name, progress)

    # --------------------------------------------------------------------------------------------------------
    # An epoch

    def train(self, advance: Callable[[], Any], seen: Progress) -> None:
        """One pass over the training rows."""
        self.begun = time.perf_counter()
        trainer, device, members = self.trainer, self.device, self.active
        self.current = self.epoch
        drawn = trainer.draw("", self.epoch, self.steps)
        self.sums = np.zeros((len(self.term_names) + 2, len(members)))  # by weight, and of weights (the last)
        done: list[tuple[list[Tensor], Tensor | int]] = []  # losses, terms and weights of the last steps
        with training_mode(self.model, True), self._windows() as windows:
            for step, (data, rows, numbers) in enumerate(self._batches(windows)):
                weights = self._weights(numbers)
                batch = self._batch(data, rows.to(device))
                losses = trainer.step_on(
                    batch,
                    None if weights is None else weights.to(trainer.real),
                    drawn[step],
                    axis=max(rows.dim() - 1, self.axis),
                )
                counts = trainer.counts(batch[-1], weights)
                share = rows.shape[-1] if counts is None else row_sums(counts)
                done.append(([losses, *trainer.terms.values()], share))
                if len(done) == 1024:
                    self._add_up(done)
                advance()
                if self.callbacks:
                    self.step, self.step_loss = step, losses
                    self._call("on_step_end", seen)
                trainer.end_step()
        self.rates.append(trainer.learning_rate)
        trainer.end_epoch(self.epoch)
        self._add_up(done)
        self.train_loss, *self.train_terms = self.sums[:-1] / self.sums[-1]

    def _windows(self) -> AbstractContextManager[Iterator[Whole | Window]]:
        """What this epoch goes through, one after the other."""
        if self.windows is not None:
            return self.windows.epoch(self.epoch, self.active)
        return nullcontext(iter([Whole(self.data, self.order, self.order.keys(self.active, self.epoch))]))

    def _batches(self, windows: Iterator[Whole | Window]) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """The data, rows of it, `[B]` or `[E, B]`, and the numbers that these have in the run."""
        for window in windows:
            if isinstance(window, Window) and self.check_windows:
                self._check_window(window)
            for first in range(0, len(window), self.batch_size):
                rows = window.places(first, self.batch_size)
                if self.trainer.mask_mode != "tiled" and rows.dim() == 2:
                    rows = rows[0]  # all masks are one model, whose batch they share out
                yield window.data, rows, window.numbers(rows)
        self.check_windows = False  # all rows have been seen

    def _add_up(self, done: list[tuple[list[Tensor], Tensor | int]]) -> None:
        """Adds these steps to `sums`, one after the other; in one go, for a step is short."""
        each = torch.stack([of_one for of_step, _ in done for of_one in of_step]).double().cpu().numpy()
        losses = each.reshape(len(done), -1, each.shape[-1])
        weights = [share.double().cpu().numpy() if isinstance(share, Tensor) else share for _, share in done]
        for of_step, share in zip(losses, weights, strict=True):
            self.sums += np.stack([*(of_step * share), np.broadcast_to(share, of_step.shape[1:])])
        done.clear()

    def end_epoch(self) -> None:
        """Validation after an epoch: who is best now, who stops, who has diverged."""
        members, active = len(self.status), np.array(self.active)
        losses = np.full((2, members), np.nan)
        losses[0, active] = self.train_loss
        values = np.full((len(self.metrics), members), np.nan)
        terms = np.full((2, len(self.term_names), members), np.nan)
        if self.term_names:
            terms[0][:, active] = self.train_terms
        healthy = np.isfinite(self.train_loss) & self._finite()
        with torch.no_grad(), self.trainer.averaged():
            if self.validation_rows > 0:
                watched, *of_terms = self._validate()
                losses[1, active] = watched
                if self.term_names:
                    terms[1][:, active] = of_terms
                healthy &= np.isfinite(watched)
                if self.metrics:
                    values[:, active] = self._measure()
                if self.monitor != "loss":
                    watched = self.direction * values[self.metric_names.index(self.monitor), active]
            if self.model.shares_parameters:
                healthy[:] = healthy.all()
            improved = healthy.copy()
            if self.validation_rows > 0:
                if self.model.shares_parameters:
                    watched = np.full_like(watched, watched.mean())
                if self.patience is not None:
                    improved &= watched < self.best[active] - self.min_delta
                self.best[active[improved]] = watched[improved]
            self.losses.append(losses)
            self.metric_values.append(values)
            self.term_values.append(terms)
            self.best_epoch[active[improved]] = self.epoch
            self._keep(improved)
        self.status[active[~healthy]] = DIVERGED
        if not healthy.all():
            _checks.warn(
                f"fit: members {active[~healthy].tolist()} diverged in epoch {self.epoch}: they keep their "
                f"last good weights, the others go on"
            )
        if self.patience is not None:
            patient = self.epoch - self.best_epoch[active] < self.patience
            leaving = active[healthy & ~patient]
            self.status[leaving] = STOPPED
            if (never := leaving[self.best_epoch[leaving] < 0]).size:
                _checks.warn(
                    f"fit: members {never.tolist()} stop with the weights that they began with: their "
                    f"{self.monitor} was never a number"
                )
        self.epoch += 1
        self._leave()
        self.seconds.append(time.perf_counter() - self.begun)

    def _leave(self) -> None:
        """Leaves behind whoever no longer runs."""
        stay = np.flatnonzero(self.status[self.active] == RUNNING).tolist()
        if not stay:
            self.trainer.members = []
        elif len(stay) < len(self.active):
            self.trainer.keep(stay)

    def _stop_those(self) -> None:
        """Whom a callback has asked to stop."""
        leaving = [m for m in self.active if m in self.to_stop]
        if self.model.shares_parameters and leaving:
            leaving = list(self.active)
        self.to_stop.clear()
        if leaving:
            self.status[leaving] = STOPPED
            self._leave()

    def summary(self) -> str:
        """Losses and metrics of the last epoch, over the members that trained in it."""
        texts = []
        shown = dict(zip(("train", "validation"), self.losses[-1], strict=True))
        shown |= zip(self.term_names, self.term_values[-1][0], strict=True)
        shown |= zip(self.metric_names, self.metric_values[-1], strict=True)
        for name, values in shown.items():
            values = values[np.isfinite(values)]
            if len(values) > 0:
                texts.append(f"{name} {values.mean():.4f} ± {values.std():.4f}")
        return ", ".join([*texts, f"{len(self.active)} members"])

    def _validate(self) -> np.ndarray:
        """Each member's mean loss over the validation rows, and its terms, float64 `[1 + terms, active]`."""
        members = len(self.active)
        total = torch.zeros(1 + len(self.term_names), members, dtype=torch.float64)
        weighed = torch.zeros(members, dtype=torch.float64)
        weight = self._own_validation_weight()
        with training_mode(self.model, False):
            for rows, batch in self._validation_batches():
                own = None if weight is None else weight[..., rows].to(self.trainer.real)
                losses = self.trainer.losses(batch, weight=own)
                counts = self.trainer.counts(batch[-1], own)
                share = len(rows) if counts is None else counts.sum(-1).cpu()
                total += torch.stack([losses, *self.trainer.terms.values()]).double().cpu() * share
                weighed += share
        means: np.ndarray = (total / weighed).numpy()
        return means

    def _measure(self) -> np.ndarray:
        """float64 `[metrics, active]`: the metrics of each member on the validation rows."""
        outputs, targets = [], []
        weight = self._own_validation_weight()
        for rows, (*inputs, target) in self._validation_batches():
            if weight is not None:
                inputs = self.model.without_left_out(inputs, weight[..., rows])
            outputs.append(self.trainer.outputs(inputs))
            assert target is not None
            targets.append(target)
        present = None if weight is None else weight > 0
        target = torch.cat(targets, self.axis)
        return measures.evaluate(self.metrics, torch.cat(outputs, 1), target, bool(self.axis), present)

    def _validation_batches(self) -> Iterator[tuple[Tensor, list[Tensor | None]]]:
        """The validation rows one after the other: their numbers, and the batch."""
        if isinstance(self.validation, Source):
            yield from self.validation.in_batches(self.batch_size)
            return
        for rows in torch.arange(self.validation_rows, device=self.device).split(self.batch_size):
            yield rows, self._batch(self.validation, rows)

    def _own_validation_weight(self) -> Tensor | None:
        weight = self.validation_weight
        return weight[self.active] if weight is not None and weight.dim() == 2 else weight

    def _weights(self, rows: Tensor) -> Tensor | None:
        """What these rows, `[B]` or `[E, B]`, weigh for the active members, in one of these shapes."""
        present = self.order.weights(rows, self.active)
        if present is not None:
            present = present.to(self.device)
        if self.weight is None:
            return present
        rows, own = rows.to(self.device).long(), self.weight
        owners = torch.tensor(self.active, device=self.device).unsqueeze(1)
        own = own[rows] if own.dim() == 1 else own[owners, rows]  # never a copy of all rows
        return own if present is None else own * present

    def _batch(
        self,
        data: Source | Sequence[Tensor | None],
        rows: Tensor,
        members: Sequence[int] | None = None,
    ) -> list[Tensor | None]:
        """These rows, `[B]` or `[E, B]`, of each column, for the active members or these."""
        if isinstance(data, Source):
            return data.batch(rows)
        if not self.axis:
            return _rows(data, rows)
        members = self.active if members is None else members
        owners = torch.tensor(list(members), device=rows.device).unsqueeze(1)
        return [None if t is None else t[owners, rows.long()] for t in data]

    def _form(self, data: Source | Sequence[Tensor | None]) -> list[tuple[int, ...] | None]:
        """The shapes of one row."""
        if isinstance(data, Source):
            return data.form
        return [None if t is None else tuple(t.shape[self.axis + 1 :]) for t in data]

    def _check_values(
        self, argument: str, data: Source | Sequence[Tensor | None], weight: Tensor | None
    ) -> None:
        if not isinstance(data, Source):
            _data.check_values(argument, data, self.model, self.trainer.loss, self.axis, weight)
            return
        data.check(partial(_data.check_values, argument, model=self.model, loss=self.trainer.loss), weight)

    def _check_window(self, window: Window) -> None:
        """What `_check_values` looks at before the first step, for rows that are read as one goes."""
        check = partial(_data.check_values, "data", model=self.model, loss=self.trainer.loss)
        assert self.windows is not None
        columns = window.data.source.columns  # type: ignore[attr-defined]
        with training_mode(self.model, False):
            self.windows.data.check_rows(check, columns, window.rows, self.weight)

    def _finite(self) -> np.ndarray:
        """bool, of each active member: whether it has no NaN or Inf in parameters and statistics."""
        if self.model.shares_parameters:
            return np.array(all(parameter.isfinite().all() for parameter in self.model.parameters()))
        flags = [p.isfinite().reshape(len(p), -1).all(1) for _, p in member_tensors(self.model)]
        return torch.stack(flags).all(0).cpu().numpy()

    def _keep(self, chosen: np.ndarray) -> None:
        """Remembers the present weights of some of the active members (bool) as the ones to end with."""
        if not chosen.any():
            return
        # In one assignment: whatever interrupts this, what is kept is of one epoch.
        if self.model.shares_parameters or (chosen.all() and len(chosen) == len(self.status)):
            self.kept = {name: p.detach().clone() for name, p in member_tensors(self.model)}
            return
        places = torch.from_numpy(np.flatnonzero(chosen)).to(self.device)
        members = torch.tensor(self.active, device=places.device)[places]
        self.kept = {
            name: self.kept[name].index_copy(0, members, p.detach()[places])
            for name, p in member_tensors(self.model)
        }


# Models that an interrupted run left: the initial parameters of that run, and those that it left them with.
_left: weakref.WeakKeyDictionary[nn.Module, tuple[dict[str, str], dict[str, str]]] = (
    weakref.WeakKeyDictionary()
)


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


@torch.no_grad()
def copy_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, own in member_tensors(model):
        if name in tensors:
            own.copy_(tensors[name])


@contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in this mode; then each part of it in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
