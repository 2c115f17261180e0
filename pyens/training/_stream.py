"""Learning from rows as they come, once each: predict, score, learn; and go on after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pyens import _files
from pyens._files import only_writer
from pyens.data._ahead import ahead
from pyens.data.iterable import columns_of
from pyens.data.rows import Columns, RowSource
from pyens.nn.ensemble import member_tensors
from pyens.training import _checks, _data
from pyens.training._source import rebatched

if TYPE_CHECKING:
    from pyens.training.trainer import Trainer

FORMAT = "pyens.training stream 1"


class Scores(Protocol):
    """What is told each prediction before the model learns from the row, such as
    `pyens.metrics.ProgressiveScores`."""

    def update(self, outputs: Tensor, target: Tensor) -> None: ...

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Stream:
    """One pass of a `Trainer` over rows, from where its checkpoint stands."""

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
        self.data = data
        self.place = 0  # rows met of this data
        self.taker = Taker(trainer)

    def run(self) -> None:
        alone = nullcontext() if self.path is None else only_writer(self.path, "partial_fit: checkpoint")
        with alone:
            first = self._resume()
            with ahead(lambda: self._batches(first)) as batches:
                self._learn(batches)

    def _learn(self, batches: Iterator[Columns]) -> None:
        trainer, saved = self.trainer, time.monotonic()
        for columns in batches:
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
        if self.path is not None:
            self.save()

    def _check(self, batch: Sequence[Tensor | None]) -> None:
        try:
            with torch.no_grad():
                _data.check_values("data", batch, self.trainer.model, self.trainer.loss)
        except ValueError as error:
            raise ValueError(
                f"partial_fit: {error} (of the rows from number {self.place} on, not learnt from)"
            ) from error

    def _batches(self, first: int) -> Iterator[Columns]:
        """Batches of the rows from number `first` on, of whatever columns are in."""
        if isinstance(self.data, RowSource):
            yield from rebatched(_pieces(self.data, first), self.batch_size)
        else:
            yield from rebatched(_beyond(self.data, first), self.batch_size)

    # --------------------------------------------------------------------------------------------------------
    # Checkpoints

    def describe(self) -> dict[str, Any]:
        data = self.data.fingerprint() if isinstance(self.data, RowSource) else "an iterable"
        return self.trainer.describe() | {"batch_size": self.batch_size, "data": data}

    def save(self) -> None:
        assert self.path is not None
        trainer = self.trainer
        state = {
            "rows": trainer.rows_met,
            "place": self.place,
            "steps": trainer._steps,
            "parameters": {name: t.detach() for name, t in member_tensors(trainer.model)},
            "trainer": trainer.state(),
            "scores": None if self.scores is None else dict(self.scores.state_dict()),
        }
        _files.save({"format": FORMAT, "run": self.described, "state": state}, self.path)

    def _resume(self) -> int:
        """Takes the checkpoint up, if there is one and the trainer has not learnt; how many rows it met."""
        from pyens.training import checkpoint as checkpoints

        trainer = self.trainer
        if not trainer.optimizers:
            trainer.begin()
        if self.path is None:
            return 0
        self.described = self.describe()
        saved = None if trainer._steps else checkpoints.load(self.path, self.described, FORMAT)
        if saved is None:
            return 0
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
        except Exception as error:
            raise ValueError(
                f"partial_fit: checkpoint: {self.path}: expected the state of such a run, got {error}"
            ) from error
        with torch.no_grad():
            for name, tensor in parameters.items():
                tensor.copy_(saved["parameters"][name])
        trainer.load_state(saved["trainer"])
        trainer._steps, trainer.rows_met = saved["steps"], saved["rows"]
        if self.scores is not None:
            self.scores.load_state_dict(saved["scores"])
        self.place = saved["place"]
        return self.place


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


def _pieces(source: RowSource, first: int) -> Iterator[Columns]:
    """The rows of a source in its own order, from number `first` on."""
    start = 0
    for part, rows in enumerate(source.parts):
        if start + rows > first:
            for piece in source.read(part):
                skipped = max(0, first - piece.first)
                if skipped < len(piece.columns[-1]):  # type: ignore[arg-type]
                    yield tuple(None if c is None else c[skipped:] for c in piece.columns)
        start += rows


def _beyond(batches: Iterable[Any], first: int) -> Iterator[Columns]:
    """What an iterable gives, without its first rows."""
    for number, given in enumerate(batches):
        columns = columns_of("partial_fit: data", given, number)
        rows = len(columns[-1])  # type: ignore[arg-type]
        skipped = min(first, rows)
        first -= skipped
        if skipped < rows:
            yield tuple(None if c is None else c[skipped:] for c in columns)


def check_arguments(
    data: Any, batch_size: Any, scores: Any, checkpoint: Any, every: Any
) -> tuple[int, Path | None]:
    """The size of a batch, and the path of the checkpoint."""
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
    _checks.positive("checkpoint_every", every)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"partial_fit: checkpoint: expected a file in a folder that exists, got {path}")
    return batch_size, path
