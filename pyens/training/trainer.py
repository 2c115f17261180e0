"""How an ensemble learns from a batch: losses, gradients, clipping, an optimizer's step, averaged weights."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pyens._files import only_writer
from pyens._kinds import name_of
from pyens._types import Bootstrap, Loss, LossOptions, MaskMode
from pyens.data.rows import RowSource
from pyens.nn import Ensemble, MaskedMLP
from pyens.nn._losses import OPTIONS, check_options, check_values, mean_losses_of, mean_of_function
from pyens.nn.ensemble import is_held, member_tensors, renew_accumulator
from pyens.optim import (
    InPass,
    clip_member_grad_norm_,
    keep_members,
    load_member_options,
    load_member_state,
    member_options,
    member_state,
)
from pyens.reference.ensemble_mlp_loss import LOSSES, row_sums, weights_of
from pyens.training import _checks
from pyens.training._run import Run, copy_into, training_mode
from pyens.training._stream import Met, Scores, Stream, check_arguments, named
from pyens.training.callbacks import Callback, Progress
from pyens.training.checkpoint import describe_tensor
from pyens.training.history import History
from pyens.training.metrics import Metric, Mode
from pyens.training.randomness import Randomness, derive_seed, generator, member_seeds

# An optimizer of the parameters, or several that share them out.
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer | Sequence[torch.optim.Optimizer]]
MakeScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
# Outputs [E, B, K] and target -> losses [E, B] or [E].
LossFunction = Callable[[Tensor, Tensor], Tensor]
Penalty = Callable[[Tensor], Tensor]  # outputs -> [E], or one number for all members


class Trainer:
    r"""A model with all that makes it learn. `fit` trains over rows that there are, `step` on one batch.

        trainer = Trainer(model, loss="mse", optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
        history = trainer.fit((x, y), epochs=20, batch_size=64)   # as pyens.training.fit
        losses = trainer.step(x, y)                               # one step of a loop of one's own, [E]

    Args: as `pyens.training.fit`, which documents them.

    With `ema`, `with trainer.averaged():` is where the model has its averaged weights.

    Attributes:
        model: the ensemble. While members have left, it is that of the others.
        members: the members that still train, in the order of the model's.
        optimizers: what `optimizer` made; each `fit` makes them anew, and so does the first `step` after it.
        rows_met: how many rows `partial_fit` has learnt from.
        history: of the last `fit`, also where it was interrupted; None before.
    """

    def __init__(
        self,
        model: Ensemble,
        *,
        loss: Loss | LossFunction,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        schedule: Literal["epoch", "step"] = "epoch",
        penalty: Penalty | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        mask_mode: MaskMode = "tiled",
        micro_batch_size: int | None = None,
        autocast: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        ema: float | None = None,
        swa_start: int | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        **loss_options: Unpack[LossOptions],
    ) -> None:
        members = _checks.model(model)
        if not (loss in LOSSES if isinstance(loss, str) else callable(loss)):
            raise ValueError(
                f"fit: loss: expected one of {', '.join(LOSSES)}, got {loss!r}, which is no function either"
            )
        for name in loss_options:
            if name not in OPTIONS:
                raise TypeError(f"fit: {name}: expected an argument of fit or Trainer, got another")
        check_options("fit", loss, loss_options)
        if schedule not in ("epoch", "step"):
            raise ValueError(f"fit: schedule: expected 'epoch' or 'step', got {schedule!r}")
        _checks.positive("clip_norm", clip_norm)
        _checks.positive("clip_value", clip_value)
        for argument, function in (("optimizer", optimizer), ("scheduler", scheduler), ("penalty", penalty)):
            if not callable(function) and not (function is None and argument != "optimizer"):
                raise TypeError(f"fit: {argument}: expected a function, got a {type(function).__name__}")
        if mask_mode not in get_args(MaskMode):
            raise ValueError(
                f"fit: mask_mode: expected one of {', '.join(get_args(MaskMode))}, got {mask_mode!r}"
            )
        if mask_mode != "tiled" and not isinstance(model, MaskedMLP):
            raise ValueError(
                f"fit: mask_mode: expected 'tiled' for a {type(model).__name__}, got {mask_mode!r}"
            )
        if mask_mode != "tiled" and (penalty is not None or not isinstance(loss, str)):
            raise ValueError(
                f"fit: mask_mode: expected 'tiled' beside functions of the outputs of all members, "
                f"got {mask_mode!r}"
            )
        if micro_batch_size is not None:
            micro_batch_size = _checks.count("micro_batch_size", micro_batch_size)
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"fit: autocast: expected torch.bfloat16 or torch.float16, got {autocast}")
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"fit: scaler: expected a torch.amp.GradScaler, got a {type(scaler).__name__}")
        _checks.positive("ema", ema)
        if ema is not None and not ema < 1:
            raise ValueError(f"fit: ema: expected a decay between 0 and 1, got {ema}")
        if swa_start is not None:
            swa_start = _checks.count("swa_start", swa_start, least=0)
        if ema is not None and swa_start is not None:
            raise ValueError(f"fit: swa_start: expected None beside ema, got {swa_start}")
        (seed,) = _checks.integers("seed", [seed])
        own_seeds = member_seeds(seed, members) if seeds is None else _checks.integers("seeds", seeds)
        if len(own_seeds) != members:
            raise ValueError(f"fit: seeds: expected one for each of {members} members, got {len(own_seeds)}")
        self.model = model
        self.members = list(range(members))
        self.loss, self.penalty = loss, penalty
        self.schedule, self.clip_norm, self.clip_value = schedule, clip_norm, clip_value
        self.mask_mode, self.micro_batch_size = mask_mode, micro_batch_size
        self.autocast, self.scaler, self.ema, self.swa_start = autocast, scaler, ema, swa_start
        self.seed, self.seeds = seed, own_seeds
        self.device, self.dtype = _checks.home(model)
        double = any(p.dtype == torch.float64 for p in model.parameters())
        self.real = torch.float64 if double else torch.float32  # of weights and losses
        self.loss_options = self._own_options(loss_options)
        self.history: History | None = None
        # What the last losses were the sum of, where they are of more than one term: name -> [E].
        self.terms: dict[str, Tensor] = {}
        self._has_terms = type(model).loss_terms is not Ensemble.loss_terms
        if self._has_terms and penalty is not None:
            raise ValueError(
                f"fit: penalty: expected None for a {type(model).__name__}, whose loss has terms of its own, "
                f"got {name_of(penalty)}"
            )
        self._make_optimizer, self._make_scheduler = optimizer, scheduler
        self.optimizers: list[torch.optim.Optimizer] = []
        self._in_pass: InPass | None = None  # the one optimizer, if its steps are made in the pass
        self.schedulers: list[torch.optim.lr_scheduler.LRScheduler] = []
        self._averages: dict[str, Tensor] = {}  # of the weights, by ema or swa_start; empty: none yet
        self._averaged = 0  # how many are in them
        self._steps = 0  # of `step`
        self.rows_met = 0  # of `partial_fit`
        self.met: list[Met] = []  # by the calls of it that were with a checkpoint
        self.to_meet: list[Met] = []  # of its calls to come: what the checkpoint has met already
        self.own_files: set[Path] = set()  # checkpoints that it has taken up or written
        self.described_at_first: dict[str, Any] = {}

    # --------------------------------------------------------------------------------------------------------
    # For users

    def fit(
        self,
        data: Sequence[Any] | RowSource,
        *,
        epochs: int,
        batch_size: int,
        window: int | None = None,
        sample_weight: Any = None,
        bootstrap: Bootstrap | None = None,
        randomness: Randomness | None = None,
        groups: Any = None,
        jackknife_groups: int | None = None,
        left_out: Sequence[int] | None = None,
        validation: Any = 0.05,
        metrics: Sequence[str] | Mapping[str, Metric] = (),
        early_stopping: int | None = None,
        monitor: str = "loss",
        mode: Mode | None = None,
        min_delta: float = 0.0,
        callbacks: Sequence[Callback | Callable[[Progress], Any]] = (),
        own_data: bool = False,
        check: bool = True,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 1,
        progress: bool | Literal["bar", "lines"] = True,
    ) -> History:
        """Trains from the start, for `epochs` passes over `data`: see `pyens.training.fit`."""
        epochs = _checks.count("epochs", epochs)
        checkpoint_every = _checks.count("checkpoint_every", checkpoint_every)
        if self.swa_start is not None and self.swa_start >= epochs:
            raise ValueError(f"fit: swa_start: expected below the {epochs} epochs, got {self.swa_start}")
        if self.model.ensemble_size != len(self.seeds):
            raise ValueError(
                f"fit: model: expected the {len(self.seeds)} members that this Trainer was made for, "
                f"got {self.model.ensemble_size}; make another Trainer"
            )
        if progress not in (True, False, "bar", "lines"):
            raise ValueError(f"fit: progress: expected True, False, 'bar' or 'lines', got {progress!r}")
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None and (path.is_dir() or not path.name):
            raise ValueError(f"fit: checkpoint: expected a file, got the folder {path}")
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"fit: checkpoint: expected a file in a folder that exists, got {path}")
        alone = nullcontext() if path is None else only_writer(path, "fit: checkpoint")
        with alone, torch.enable_grad():
            run = Run(
                self,
                data,
                batch_size=batch_size,
                window=window,
                sample_weight=sample_weight,
                bootstrap=bootstrap,
                randomness=randomness,
                groups=groups,
                jackknife_groups=jackknife_groups,
                left_out=left_out,
                validation=validation,
                metrics=metrics,
                early_stopping=early_stopping,
                monitor=monitor,
                mode=mode,
                min_delta=min_delta,
                callbacks=callbacks,
                own_data=own_data,
                check=check,
            )
            return run.through(epochs, path, checkpoint_every, progress)

    def step(
        self, *batch: Tensor | None, sample_weight: Tensor | None = None, own_data: bool = False
    ) -> Tensor:
        """One step of all members on one batch, in training mode: a loop of one's own is made of these.

        Args:
            batch: what `model.loss` takes, the target last: all `[B, ...]`.
            sample_weight: `[B]` or `[E, B]`.
            own_data: whether every member has a batch of its own, all of `batch` `[E, B, ...]`.

        Returns:
            Each member's loss before the step, `[E]`.

        Dropout draws from the members' `seeds` and the number of steps so far. A schedule is stepped here
        where `schedule` is "step"; at the end of an epoch it is for the caller, by `trainer.schedulers`.
        """
        if not self.optimizers:
            self.begin()
        if len(batch) < 2 or batch[-1] is None:
            raise ValueError(
                f"Trainer.step: batch: expected what {type(self.model).__name__}.loss takes, the target "
                f"last, got {len(batch)} arguments"
            )
        drawn = self.draw(" of step", self._steps, 1)[0]
        with torch.enable_grad(), training_mode(self.model, True):
            losses = self.step_on(batch, sample_weight, drawn, int(own_data))
            self.end_step()
        self._steps += 1
        return losses

    def partial_fit(
        self,
        data: Sequence[Any] | RowSource | Iterable[Sequence[Any]],
        *,
        batch_size: int,
        scores: Scores | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: float = 60.0,
        callback: Callable[[Trainer, Tensor], Any] | None = None,
        check: bool = True,
    ) -> Trainer:
        """Learns from rows as they come, once each and in their order; all members meet the same.

            scores = pyens.metrics.ProgressiveScores()
            trainer.partial_fit(stream, batch_size=256, scores=scores, checkpoint="online.pt")
            scores.compute()["auroc"]

        With `scores`, each batch is predicted and scored before the model learns from it: progressive
        validation, by rows that nobody has learnt from yet. Each batch is then a `step`.

        Args:
            data: a tuple of tensors or arrays `[N, ...]`, as `fit` takes it: the next rows. Or a `RowSource`,
                or what gives such tuples one after the other (a DataLoader, a generator), whose rows are cut
                into batches anew. Read in a thread, ahead of training.
            batch_size: rows of a step; the last one may have fewer.
            scores: `update(outputs [E, B, K], target)` is called with each batch, in evaluation mode.
            checkpoint: a file, written atomically. If it is there, a Trainer that has not learnt yet goes on
                where it was saved, to the bit: the same calls as before pass over the rows that they had met,
                also several calls with one file. A file of another run is refused, and so are other data, as
                far as they can be known: a source says what it is, tensors are compared, of a generator or a
                DataLoader nothing is known.
            checkpoint_every: seconds between two; there is always one at the end.
            callback: called with this Trainer and the losses `[E]` after each step.
            check: whether each batch is looked at before it is learnt from: numbers finite, classes and
                categories in range.

        Returns:
            This Trainer; `rows_met` says how many rows it has met in all calls.

        Raises:
            TypeError, ValueError: arguments, or rows, that are not as above. What has been learnt stays.
            RuntimeError: another run uses the checkpoint.
        """
        batch_size, path = check_arguments(self, data, batch_size, scores, checkpoint, checkpoint_every)
        if isinstance(data, (tuple, list)):
            data = list(data) if data and isinstance(data[0], (tuple, list)) else [tuple(data)]
        with named():
            Stream(self, data, batch_size, scores, path, checkpoint_every, callback, check).run()
        return self

    # --------------------------------------------------------------------------------------------------------
    # For a run

    def begin(self) -> None:
        """Makes optimizers and schedules anew; changes nothing of the model."""
        optimizers = _checks.optimizers(self._make_optimizer(self.model.parameters()), self.model)
        schedulers = []
        if self._make_scheduler is not None:
            for optimizer in optimizers:
                schedulers.append(self._make_scheduler(optimizer))
                _checks.scheduler(schedulers[-1], optimizer)
        self._in_pass = _checks.in_pass(optimizers, self.model, self)
        self.optimizers, self.schedulers = optimizers, schedulers
        self._averages, self._averaged = {}, 0

    def losses(
        self,
        batch: Sequence[Tensor | None],
        *,
        weight: Tensor | None = None,
        penalty: Penalty | None = None,
        share: Tensor | float = 1,
        share_of_rows: float = 1,
        **options: Any,
    ) -> Tensor:
        """Each member's loss `[E]` times `share`, with what `penalty` adds, times `share_of_rows`."""
        with self._precision():
            loss, self.terms = self.loss, {}
            if self._has_terms or (isinstance(loss, str) and penalty is None):
                options |= self._loss_options() | {"loss": loss, "sample_weight": weight}
                return self._sum_of(self._of_model(batch, share, share_of_rows, options))
            *inputs, target = batch
            if weight is not None:
                inputs = self.model.without_left_out(inputs, weight)
            output = self.model(*inputs, **options)
            if isinstance(loss, str):
                assert target is not None
                check_values(output, target, loss, weight, self._loss_options())
                losses = mean_losses_of(output, target, loss, weight, **self._loss_options())
            else:
                losses = mean_of_function("fit: loss", loss, output, target, weight)
            losses = losses * share
            if penalty is None:
                return losses
            added = penalty(output)
            members = len(self.members)
            if not isinstance(added, Tensor) or added.shape not in ((), (members,)):
                raise ValueError(
                    f"fit: penalty: expected [{members}] or one number, got {_form(added)} from "
                    f"{name_of(penalty)}"
                )
            own = (added / members).expand(members) if added.dim() == 0 else added  # of one, each its share
            return self._sum_of({"loss": losses, "penalty": own * share_of_rows})

    def _of_model(
        self, batch: Sequence[Any], share: Any, share_of_rows: float, options: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The terms of the model's loss, each as a part of a batch counts in it."""
        model, members = self.model, len(self.members)
        terms = model.loss_terms(*batch, **options)
        found = {}
        for name, term in terms.items():
            # Where each row has met one mask, a loss of the model, which is every member's.
            if not self._has_terms and term.dim() == 0:
                term = term.expand(members)
            if self._has_terms and (not isinstance(term, Tensor) or term.shape != (members,)):
                raise ValueError(
                    f"fit: model: expected terms [{members}] from {type(model).__name__}.loss_terms, got "
                    f"{_form(term)} as {name!r}"
                )
            found[name] = term * (share_of_rows if name in model.terms_by_rows else share)
        return found

    def _sum_of(self, terms: dict[str, Tensor]) -> Tensor:
        """The sum of terms `[E]`, which are kept where there are several."""
        total, *others = terms.values()
        if others:
            self.terms = {name: term.detach() for name, term in terms.items()}
            for term in others:
                total = total + term
        return total

    def outputs(self, inputs: Sequence[Tensor | None]) -> Tensor:
        """`[E, B, K]` in evaluation, without a gradient."""
        with torch.no_grad(), training_mode(self.model, False), self._precision():
            output: Tensor = self.model(*inputs)
        return output

    def step_on(
        self, batch: Sequence[Tensor | None], weight: Tensor | None, drawn: dict[str, Any], axis: int = 0
    ) -> Tensor:
        """A step on a batch whose rows are along `axis`, with what `draw` has for it; each member's loss
        before it, `[E]`."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self._in_pass is None:
            total = self._step_apart(batch, weight, drawn, axis)
        else:
            options = drawn | self._loss_options() | {"loss": self.loss, "sample_weight": weight}
            total = self._in_pass.step_in_pass(self.model, *batch, **options)  # type: ignore[arg-type]
        if self.schedule == "step":
            for scheduler in self.schedulers:
                scheduler.step()
        return total

    def end_step(self) -> None:
        """What follows a step and those who look at it: the moving average."""
        if self.ema is not None:
            self._add_to_averages(1 - self.ema)

    def end_epoch(self, epoch: int) -> None:
        """What follows the last step of an epoch: schedules of epochs, and the average of epochs."""
        if self.schedule == "epoch":
            for scheduler in self.schedulers:
                scheduler.step()
        if self.swa_start is not None and epoch >= self.swa_start:
            self._add_to_averages(1 / (self._averaged + 1))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights, where there are any."""
        if not self._averages:
            yield
            return
        own = {name: t.detach().clone() for name, t in member_tensors(self.model)}
        try:
            copy_into(self.model, self._averages)
            yield
        finally:
            copy_into(self.model, own)

    def keep(self, places: list[int]) -> None:
        """Leaves all but some members behind, in place: the parameters stay the objects that all hold."""
        members = self.model.ensemble_size
        for optimizer in self.optimizers:
            keep_members(optimizer, places, members)
        for name, average in self._averages.items():
            if not self.model.shares_parameters:
                self._averages[name] = average[places]
        for parameter in self.model.parameters():
            if is_held(parameter):  # by a loss that somebody kept: its graph stays with what it saw
                renew_accumulator(parameter)
        self.model.select_(places)
        self.members = [self.members[place] for place in places]

    def draw(self, purpose: str, number: int, steps: int) -> list[dict[str, Any]]:
        """For each step what the model's loss takes that is drawn: seeds of dropout, or of masks."""
        if self.mask_mode != "tiled":
            seed = functools.partial(derive_seed, self.seed, f"masks{purpose}", number)
            return [{"mode": self.mask_mode, "seed": seed(step)} for step in range(steps)]
        if not self.model.dropout:
            return [{}] * steps
        drawn = [
            torch.randint(2**62, (steps,), generator=generator(self.seeds[m], f"dropout{purpose}", number))
            for m in self.members
        ]
        return [{"dropout_seeds": seeds} for seeds in torch.stack(drawn, 1).to(self.device)]

    @property
    def scheduled(self) -> bool:
        return self._make_scheduler is not None

    @property
    def learning_rate(self) -> float:
        """Of the first group of the first optimizer."""
        return float(self.optimizers[0].param_groups[0]["lr"])

    def describe(self) -> dict[str, Any]:
        """What another run must have in common with this one to go on from its checkpoint."""
        options = {
            name: describe_tensor(value) if isinstance(value, Tensor) else value
            for name, value in self.loss_options.items()
            if name not in ("temperature", "label_smoothing")
        }
        # Only where there are some: files that are older than they are say nothing of them.
        return ({"loss_options": options} if options else {}) | {
            "model": str(self.model),
            "loss": name_of(self.loss),
            "penalty": name_of(self.penalty),
            "temperature": self.loss_options.get("temperature", 1.0),
            "label_smoothing": self.loss_options.get("label_smoothing", 0.0),
            "optimizer": [_described(optimizer) for optimizer in self.optimizers],
            "scheduler": [_said(scheduler) for scheduler in self.schedulers],
            "frozen": [name for name, p in self.model.named_parameters() if not p.requires_grad],
            "schedule": self.schedule,
            "clip_norm": self.clip_norm,
            "clip_value": self.clip_value,
            "mask_mode": self.mask_mode,
            "micro_batch_size": self.micro_batch_size,
            "autocast": str(self.autocast),
            "scaler": None if self.scaler is None else _said(self.scaler),
            "ema": self.ema,
            "swa_start": self.swa_start,
            "seed": self.seed,
            "seeds": list(self.seeds),
        }

    def state(self) -> dict[str, Any]:
        """What `load_state` takes: of optimizers, schedules, scaler and averages."""
        return {
            "optimizer": [member_state(optimizer) for optimizer in self.optimizers],
            "options": [[_options(g) for g in optimizer.param_groups] for optimizer in self.optimizers],
            "of members": [member_options(optimizer) for optimizer in self.optimizers],
            "scheduler": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "averages": self._averages,
            "averaged": self._averaged,
        }

    def check_state(self, saved: Mapping[str, Any]) -> None:
        """Refuses what `state` cannot have made, before any of it is used."""
        own = [[set(_options(g)) for g in optimizer.param_groups] for optimizer in self.optimizers]
        there = [[set(options) for options in groups] for groups in saved["options"]]
        states = saved["optimizer"]
        fits = isinstance(states, list) and len(states) == len(self.optimizers)
        if own != there:
            raise ValueError("options of another optimizer")
        if not fits or not all(isinstance(s, dict) for of_one in states for s in of_one):
            raise ValueError("another optimizer")
        parameters = dict(member_tensors(self.model))
        averages = saved["averages"]
        if not set(averages) <= set(parameters) or type(saved["averaged"]) is not int:
            raise ValueError("averages of other names")
        of_members = [[name for name, _ in member_options(optimizer)] for optimizer in self.optimizers]
        if of_members != [[name for name, _ in numbers] for numbers in saved["of members"]]:
            raise ValueError("other numbers of members")
        for name, average in averages.items():
            if average.shape[1:] != parameters[name].shape[1:] or not average.isfinite().all():
                raise ValueError(f"averages[{name!r}] of another form")

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """Takes up what `state` gave, for the members that there are now."""
        for optimizer, state, options in zip(
            self.optimizers, saved["optimizer"], saved["options"], strict=True
        ):
            load_member_state(optimizer, state)
            for group, own in zip(optimizer.param_groups, options, strict=True):
                group.update(own)
        for optimizer, numbers in zip(self.optimizers, saved["of members"], strict=True):
            load_member_options(optimizer, numbers)
        for scheduler, state in zip(self.schedulers, saved["scheduler"], strict=True):
            scheduler.load_state_dict(state)
        if self.scaler is not None:
            self.scaler.load_state_dict(saved["scaler"])
        self._averages = {name: t.to(self.device) for name, t in saved["averages"].items()}
        self._averaged = saved["averaged"]

    # --------------------------------------------------------------------------------------------------------
    # Parts of a step

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    def _own_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options of the loss that say anything, tensors of them where the model is."""
        own: dict[str, Any] = {}
        for name, value in given.items():
            if value is None or (OPTIONS[name][0] is not None and value == OPTIONS[name][0]):
                continue
            if isinstance(value, Tensor):
                if value.requires_grad:
                    raise ValueError(
                        f"fit: {name}: expected requires_grad=False (only the model's parameters are "
                        "trained), got True"
                    )
                value = value.detach().to(self.device, torch.float64 if name == "quantiles" else self.real)
                if name != "quantiles" and value.dim() == 2 and len(value) != len(self.members):
                    raise ValueError(
                        f"fit: {name}: expected a row for each of {len(self.members)} members, "
                        f"got shape {list(value.shape)}"
                    )
            elif isinstance(value, Sequence):
                value = tuple(float(one) for one in value)
            own[name] = value
        return own

    def _loss_options(self) -> LossOptions:
        """Those of the members that there are now."""
        options: Any = {
            name: value[self.members] if isinstance(value, Tensor) and value.dim() == 2 else value
            for name, value in self.loss_options.items()
        }
        own: LossOptions = options
        return own

    def counts(self, target: Tensor | None, weight: Tensor | None) -> Tensor | None:
        """What each row of a batch counts in the mean loss, float64 `[B]` or `[E, B]`; None: all the same."""
        class_weight = self._loss_options().get("class_weight")
        if class_weight is None or target is None:
            return None if weight is None else weight.double()
        labels = target.clamp(0, class_weight.shape[-1] - 1)  # what is left out may be any number
        members = len(self.members) if class_weight.dim() == 2 else 1
        like = torch.empty(
            *(labels.shape if labels.dim() == 2 else (members, len(labels))),
            dtype=torch.float64,
            device=labels.device,
        )
        counts = weights_of(class_weight, labels, like)
        counts = counts[0] if labels.dim() == 1 and members == 1 else counts
        return counts if weight is None else counts * weight.double()

    def _parts(
        self, batch: Sequence[Tensor | None], axis: int, weight: Tensor | None, drawn: dict[str, Any]
    ) -> Iterator[tuple[Sequence[Tensor | None], Tensor | None, dict[str, Any]]]:
        """Parts of at most `micro_batch_size` rows: rows, weights, and the options of `losses`: what is
        drawn, and what the part counts of the whole."""
        size, target = self.micro_batch_size, batch[-1]
        assert target is not None
        rows = target.shape[axis]
        if size is None or rows <= size:
            yield batch, weight, drawn
            return
        counts = self.counts(target, weight)
        whole = None if counts is None else row_sums(counts)
        for i, start in enumerate(range(0, rows, size)):
            length = min(size, rows - start)
            part = [None if t is None else t.narrow(axis, start, length) for t in batch]
            # What a row drops follows from the seed and its place in what is computed at once.
            options = {k: v if k == "mode" else v ^ _of_part(i) for k, v in drawn.items()}
            options["share"] = options["share_of_rows"] = length / rows
            own = None if weight is None else weight.narrow(-1, start, length)
            if counts is not None and whole is not None:
                share = row_sums(counts.narrow(-1, start, length)) / torch.where(whole > 0, whole, 1)
                options["share"] = share.to(self.real)
            yield part, own, options

    def _step_apart(
        self, batch: Sequence[Tensor | None], weight: Tensor | None, drawn: dict[str, Any], axis: int
    ) -> Tensor:
        """Losses, gradients, clipping and the optimizers' steps, one after the other."""
        total: Tensor | None = None
        terms: dict[str, Tensor] = {}
        for part, own, options in self._parts(batch, axis, weight, drawn):
            losses = self.losses(part, weight=own, penalty=self.penalty, **options)
            loss = losses.sum()
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            total = losses.detach() if total is None else total + losses.detach()
            terms = {name: terms[name] + t if name in terms else t for name, t in self.terms.items()}
        assert total is not None
        self.terms = terms
        self._clip()
        for optimizer in self.optimizers:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()
        return total

    def _clip(self) -> None:
        if self.clip_norm is None and self.clip_value is None:
            return
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        parameters = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self.clip_value)
        if self.clip_norm is not None and self.model.shares_parameters:  # one model
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        elif self.clip_norm is not None:
            clip_member_grad_norm_(parameters, self.clip_norm)

    @torch.no_grad()
    def _add_to_averages(self, share: float) -> None:
        """average <- average + share * (weights - average), each rounded by itself, in float32 at least.

        Running statistics are averaged like weights."""
        parameters = {name: t for name, t in member_tensors(self.model) if t.is_floating_point()}
        self._averaged += 1
        if not self._averages:
            self._averages = {
                name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
                for name, p in parameters.items()
            }
            return
        averages = list(self._averages.values())
        change = torch._foreach_sub(
            [p.detach().to(a.dtype) for p, a in zip(parameters.values(), averages, strict=True)], averages
        )
        torch._foreach_mul_(change, share)
        torch._foreach_add_(averages, change)


def _of_part(part: int) -> int:
    """0 for the first part of a batch, and another number for each other."""
    return (part * 0x9E3779B97F4A7C15) % 2**62


def _form(value: Any) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _described(optimizer: torch.optim.Optimizer) -> str:
    """Its kind, the options of its groups, and what members have of their own."""
    groups = [
        {name: float(v) if isinstance(v, Tensor) else v for name, v in _options(group).items()}
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__} {groups} {[(n, v.tolist()) for n, v in member_options(optimizer)]}"


def _said(made: Any) -> str:
    """Its kind and what it begins with, without the addresses of objects."""
    return re.sub(r" at 0x[0-9a-f]+", "", f"{type(made).__name__} {made.state_dict()}")
