"""Learning from rows as they come, once each: predict, score, learn; and go on after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyens import _files
from pyens._files import only_writer
from pyens.data._ahead import ahead
from pyens.data.iterable import columns_of
from pyens.data.rows import Columns, RowSource
from pyens.nn.ensemble import member_tensors
from pyens.training import _checks, _data
from pyens.training import checkpoint as checkpoints
from pyens.training._run import training_mode
from pyens.training._source import Source, rebatched

if TYPE_CHECKING:
    from pyens.training.trainer import Trainer

FORMAT = "pyens.training stream 1"


class Scores(Protocol):
    """What is told each prediction before the model learns from the row, such as
    `pyens.metrics.ProgressiveScores`."""

    def update(self, outputs: Tensor, target: Tensor) -> None: ...

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Met(NamedTuple):
    """What one call has learnt from."""

    data: str  # what is known of it
    rows: int


class Stream:
    """One call of a `Trainer`: its rows, from where the checkpoint stands."""

    def __init__(
        self,
        trainer: Trainer,
        data: Any,
        batch_size: int,
        scores: Scores | None,
        path: Path | None,
        every: float,
        callback: Callable[[Trainer, Tensor], Any] | None,
        check: bool,
    ) -> None:
        self.trainer, self.scores, self.path, self.every = trainer, scores, path, every
        self.batch_size, self.callback, self.check = batch_size, callback, check
        self.source: Source | None = None
        if isinstance(data, RowSource):
            self.source = Source("data", data, trainer.dtype, trainer.loss, trainer.device)
        self.data = data
        self.taker = Taker(trainer)
        self.described = "" if path is None else self._describe_data()
        self.place = 0  # rows met of this data

    def run(self) -> None:
        alone = nullcontext() if self.path is None else only_writer(self.path, "partial_fit: checkpoint")
        with alone:
            first = self._begin()
            with ahead(lambda: self._batches(first)) as batches:
                self._learn(batches)
            if self.place < first:
                raise ValueError(
                    f"partial_fit: data: expected the {first} rows that {self.path} has met, and others "
                    f"behind them, got {self.place}"
                )
            if self.path is not None:
                if not self.trainer.to_meet:
                    self.save()
                self.trainer.met.append(Met(self.described, self.place))

    def _learn(self, batches: Iterator[Columns]) -> None:
        trainer, saved = self.trainer, time.monotonic()
        for columns in batches:
            if trainer.to_meet:
                raise ValueError(
                    f"partial_fit: data: expected {self.place} rows, after which {self.path} has met others, "
                    "got more"
                )
            batch = self.taker.taken(columns)
            if self.check:
                self._check(batch)
            if self.scores is not None:
                *inputs, target = batch
                assert target is not None
                self.scores.update(trainer.outputs(inputs), target)
            losses = trainer.step(*batch)
            rows = len(columns[-1])  # type: ignore[arg-type]
            trainer.rows_met, self.place = trainer.rows_met + rows, self.place + rows
            if self.callback is not None:
                self.callback(trainer, losses)
            if self.path is not None and time.monotonic() - saved >= self.every:
                self.save()
                saved = time.monotonic()

    def _check(self, batch: Sequence[Tensor | None]) -> None:
        model = self.trainer.model
        try:
            with torch.no_grad(), training_mode(model, False):
                _data.check_values("data", batch, model, self.trainer.loss)
        except ValueError as error:
            raise ValueError(f"{error} (of the rows from number {self.place} on, not learnt from)") from error

    def _batches(self, first: int) -> Iterator[Columns]:
        """Batches of the rows from number `first` on, of whatever columns are in."""
        if self.source is None:
            yield from rebatched(self._beyond(first), self.batch_size)
        else:
            yield from rebatched(self._pieces(self.source, first), self.batch_size)

    def _pieces(self, source: Source, first: int) -> Iterator[Columns]:
        """The rows of a source in its own order, from number `first` on."""
        self.place = min(first, len(source))
        for part, end in enumerate(source.firsts[1:]):
            if end <= first:
                continue
            for piece in source.pieces(part):
                skipped = max(0, first - piece.first)
                if skipped < len(piece.columns[-1]):  # type: ignore[arg-type]
                    yield tuple(None if c is None else c[skipped:] for c in piece.columns)

    def _beyond(self, first: int) -> Iterator[Columns]:
        """What an iterable gives, without its first rows; copies, for it may fill the same memory again."""
        for number, given in enumerate(self.data):
            columns = columns_of("data", given, number)
            rows = len(columns[-1])  # type: ignore[arg-type]
            skipped = min(first - self.place, rows) if self.place < first else 0
            self.place += skipped
            if skipped < rows:
                first = 0
                kept = tuple(None if c is None else c[skipped:] for c in columns)
                yield (
                    kept
                    if isinstance(self.data, list)
                    else tuple(None if c is None else c.clone() for c in kept)
                )

    # --------------------------------------------------------------------------------------------------------
    # Checkpoints

    def _describe_data(self) -> str:
        """A source says itself what it is, tensors are looked at, of others nothing is known."""
        if self.source is not None:
            return self.source.describe()
        if isinstance(self.data, list):
            batches = [columns_of("data", given, i) for i, given in enumerate(self.data)]
            return "; ".join(
                ", ".join("none" if c is None else checkpoints.describe_tensor(c) for c in columns)
                for columns in batches
            )
        return "an iterable"

    def save(self) -> None:
        assert self.path is not None
        trainer = self.trainer
        met = [*trainer.met, Met(self.described, self.place)]
        state = {
            "rows": trainer.rows_met,
            "met": [list(one) for one in met],
            "steps": trainer._steps,
            "parameters": {name: t.detach() for name, t in member_tensors(trainer.model)},
            "trainer": trainer.state(),
            "scores": None if self.scores is None else dict(self.scores.state_dict()),
        }
        run = trainer.described_at_first | {"batch_size": self.batch_size}
        _files.save({"format": FORMAT, "run": run, "state": state}, self.path)
        trainer.own_files.add(self.path.resolve())

    def _begin(self) -> int:
        """Takes the checkpoint up, if there is one; how many rows of this data to pass over."""
        trainer = self.trainer
        if not trainer.optimizers:
            trainer.begin()
        if not trainer.described_at_first:
            trainer.described_at_first = trainer.describe()
        if self.path is None:
            return 0
        if self.path.exists() and self.path.resolve() not in trainer.own_files:
            if trainer._steps or trainer.history is not None:
                raise ValueError(
                    f"partial_fit: checkpoint: expected a Trainer that has not learnt yet, to go on from "
                    f"{self.path}, or another file, got one that has learnt"
                )
            self._resume()
        if not trainer.to_meet:
            return 0
        described, rows = trainer.to_meet.pop(0)
        if described != self.described:
            raise ValueError(
                f"partial_fit: data: expected what {self.path} has met, {described}, got {self.described}"
            )
        return rows

    def _resume(self) -> None:
        trainer, path = self.trainer, self.path
        assert path is not None
        run = trainer.described_at_first | {"batch_size": self.batch_size}
        saved = checkpoints.load(path, run, FORMAT, "partial_fit")
        if saved is None:
            return
        parameters = dict(member_tensors(trainer.model))
        try:
            trainer.check_state(saved["trainer"])
            fits = saved["parameters"].keys() == parameters.keys() and all(
                t.shape == parameters[name].shape for name, t in saved["parameters"].items()
            )
            if not fits:
                raise ValueError("parameters of another form")
            if (saved["scores"] is None) != (self.scores is None):
                raise ValueError("scores" if self.scores is None else "no scores")
            to_meet = [Met(str(data), int(rows)) for data, rows in saved["met"]]
            steps, rows_met = int(saved["steps"]), int(saved["rows"])
            if self.scores is not None:
                self.scores.load_state_dict(saved["scores"])
        except Exception as error:
            raise ValueError(
                f"partial_fit: checkpoint: {path}: expected the state of such a run, got {error!r}"
            ) from error
        with torch.no_grad():
            for name, tensor in parameters.items():
                tensor.copy_(saved["parameters"][name])
        trainer.load_state(saved["trainer"])
        trainer._steps, trainer.rows_met, trainer.to_meet = steps, rows_met, to_meet
        trainer.own_files.add(path.resolve())


class Taker:
    """Columns of rows as the model of a trainer takes them."""

    def __init__(self, trainer: Trainer) -> None:
        self.dtype, self.loss, self.device = trainer.dtype, trainer.loss, trainer.device

    def taken(self, columns: Columns) -> list[Tensor | None]:
        last = len(columns) - 1
        found = [
            None if c is None else _data.as_taken(c, self.dtype, self.loss, i == last).to(self.device)
            for i, c in enumerate(columns)
        ]
        return list(_data.as_targets(found, self.loss, 0))


@contextmanager
def named() -> Iterator[None]:
    """Errors of what is shared with `fit` by the name of this function."""
    try:
        yield
    except (TypeError, ValueError) as error:
        for other in ("fit: ", "data: "):
            if str(error).startswith(other):
                text = str(error).removeprefix("fit: ")
                raise type(error)(f"partial_fit: {text}") from error
        raise


def check_arguments(
    trainer: Trainer, data: Any, batch_size: Any, scores: Any, checkpoint: Any, every: Any
) -> tuple[int, Path | None]:
    """The size of a batch, and the path of the checkpoint."""
    with named():
        batch_size = _checks.count("batch_size", batch_size)
    if not isinstance(data, (RowSource, Iterable)) or isinstance(data, (str, bytes, Tensor)):
        raise TypeError(
            f"partial_fit: data: expected a tuple of tensors, a RowSource, or an iterable of tuples, got a "
            f"{type(data).__name__}"
        )
    for method in ("update", "state_dict", "load_state_dict"):
        if scores is not None and not callable(getattr(scores, method, None)):
            raise TypeError(
                f"partial_fit: scores: expected an object with {method}, got a {type(scores).__name__}"
            )
    if isinstance(every, bool) or not isinstance(every, (int, float)) or not every > 0:
        raise ValueError(f"partial_fit: checkpoint_every: expected a positive number, got {every!r}")
    if trainer.swa_start is not None:
        raise ValueError(
            f"partial_fit: swa_start: expected None, for there are no epochs here, got {trainer.swa_start}; "
            "ema averages over steps"
        )
    if trainer.scheduled and trainer.schedule != "step":
        raise ValueError(
            f"partial_fit: schedule: expected 'step', for there are no epochs here, got {trainer.schedule!r}"
        )
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"partial_fit: checkpoint: expected a file in a folder that exists, got {path}")
    return batch_size, path
