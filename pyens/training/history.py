"""What a training run leaves on record."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyens._files import write_atomically

RUNNING, FINISHED, STOPPED, DIVERGED = range(4)
STATUS = ("running", "finished", "stopped", "diverged")


@dataclass(frozen=True, eq=False, repr=False)
class History:
    """Losses of every member after every epoch; NaN from the epoch on in which a member no longer trained.

    Epochs count from 0. A member is "finished" after its last epoch, "stopped" if it stopped early,
    "diverged" if its loss or a parameter became NaN or infinite.
    """

    train_loss: np.ndarray  # float64 [epochs, E], mean over the epoch's batches while the weights move
    validation_loss: np.ndarray  # float64 [epochs, E], after the epoch; NaN without validation
    best_epoch: np.ndarray  # int64 [E], whose weights the member has; -1: those before the first epoch
    status: tuple[str, ...]  # of each member
    seconds: np.ndarray  # float64 [epochs], of training and validation; checkpoints not included
    learning_rate: np.ndarray  # float64 [epochs], of the optimizer's first group when the epoch ended
    row_group: np.ndarray  # int32 [N], the jackknife group of each row of the data, 0 without; -1: validation
    left_out: np.ndarray  # int64 [E], the group that each member left out; -2: none
    weighed: np.ndarray | None  # bool [E, N] or [N], whether a row had a weight above 0; None: all had
    metrics: Mapping[str, np.ndarray] = field(default_factory=dict)  # float64 [epochs, E], after the epoch
    # What the losses are the sum of, if there are several terms: "train_label", "validation_label", ...
    terms: Mapping[str, np.ndarray] = field(default_factory=dict)  # float64 [epochs, E]

    def __repr__(self) -> str:
        counts = {status: self.status.count(status) for status in STATUS if status in self.status}
        ends = ", ".join(f"{count} {status}" for status, count in counts.items())
        return f"History(epochs={len(self.train_loss)}, members={len(self.status)}: {ends})"

    @property
    def epochs(self) -> np.ndarray:
        """int64 `[E]`: how many epochs each member trained for."""
        epochs: np.ndarray = np.isfinite(self.train_loss).sum(0)
        return epochs

    @property
    def unseen(self) -> np.ndarray:
        """bool `[E, N]`: the rows of the data that each member was not trained on."""
        left_out = (self.row_group == -1) | (self.row_group == self.left_out[:, None])
        unseen: np.ndarray = left_out if self.weighed is None else left_out | ~self.weighed
        return unseen

    @property
    def diverged(self) -> np.ndarray:
        """bool `[E]`."""
        return np.array([status == STATUS[DIVERGED] for status in self.status], dtype=bool)

    def member(self, i: int) -> History:
        """The history of member i alone, without the epochs after its last."""
        epochs = self.epochs[i]
        train, validation = (loss[:epochs, [i]] for loss in (self.train_loss, self.validation_loss))
        return History(
            train,
            validation,
            self.best_epoch[[i]],
            (self.status[i],),
            self.seconds[:epochs],
            self.learning_rate[:epochs],
            self.row_group,
            self.left_out[[i]],
            self.weighed[[i]] if self.weighed is not None and self.weighed.ndim == 2 else self.weighed,
            {name: values[:epochs, [i]] for name, values in self.metrics.items()},
            {name: values[:epochs, [i]] for name, values in self.terms.items()},
        )

    def to_csv(self, path: str | Path) -> None:
        """Writes a line per epoch and member that trained in it, atomically."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = {"train_loss": self.train_loss, "validation_loss": self.validation_loss}
        columns |= {**self.terms, **self.metrics}
        writer.writerow(["epoch", "member", *columns])
        for epoch, member in zip(*np.nonzero(~np.isnan(self.train_loss)), strict=True):
            values = [float(column[epoch, member]) for column in columns.values()]
            writer.writerow([epoch, member, *("" if np.isnan(value) else repr(value) for value in values)])
        write_atomically(path, text.getvalue().encode())


def oof_predictions(outputs: Tensor, history: History) -> Tensor:
    """Each row's prediction by the members that were not trained on it ("out of fold"), their mean.

    Under the jackknife every row is predicted as if it were new, validation rows by all members.

    Args:
        outputs: `[E, N, ...]` for the rows of `fit`'s data: values, probabilities.
        history: of that run.

    Returns:
        `[N, ...]` in the dtype of the outputs; NaN for a row that no member was left without.

    Raises:
        ValueError: outputs of other members or rows.
    """
    if not outputs.is_floating_point():
        raise TypeError(f"oof_predictions: outputs: expected floating point numbers, got {outputs.dtype}")
    unseen = torch.from_numpy(history.unseen).to(outputs.device)
    if outputs.shape[:2] != unseen.shape:
        raise ValueError(
            f"oof_predictions: outputs: expected {list(unseen.shape)} first, got shape {list(outputs.shape)}"
        )
    each = unseen.reshape(*unseen.shape, *[1] * (outputs.dim() - 2))
    exact = torch.where(each, outputs.double(), 0)
    return (exact.sum(0) / each.sum(0)).to(outputs.dtype)
