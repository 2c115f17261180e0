"""What may look on while members train, and end it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyens.nn import Ensemble
from pyens.training.history import RUNNING, History

if TYPE_CHECKING:
    from pyens.training._run import Run


class Callback:
    """Is called in the course of `fit`; a subclass defines what it wants to see. A plain function of the
    progress is `on_epoch_end`.

    What a callback raises ends the run as Ctrl-C does: the model is whole, with each member's kept weights,
    and the checkpoint is that of the epoch before. Those with `state_dict` and `load_state_dict` are saved
    with the checkpoint, in their order; others may come and go when a run is taken up again.
    """

    def on_fit_begin(self, progress: Progress) -> None:
        """Before the first epoch, also of a run that is taken up again."""

    def on_step_end(self, progress: Progress) -> None:
        """After each step of the optimizer, before the moving average of weights takes it in."""

    def on_epoch_end(self, progress: Progress) -> None:
        """After an epoch, its validation, and the departure of those who stop."""

    def on_fit_end(self, progress: Progress) -> None:
        """After the last epoch, when all members are back with the weights that they keep."""


class Progress:
    """Where a run is; to be read. Losses and metrics are of all E members, NaN for those who have left."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def model(self) -> Ensemble:
        """The members that train on, in the order of `members`; after the last epoch all of them."""
        return self._run.trainer.model

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """One, unless several were made."""
        return self._run.trainer.optimizers

    @property
    def members(self) -> list[int]:
        """Who trains on."""
        return [m for m, status in enumerate(self._run.status) if status == RUNNING]

    @property
    def epoch(self) -> int:
        """The last epoch that began, from 0; -1 before the first."""
        return self._run.current

    @property
    def step(self) -> int:
        """The last step within its epoch, from 0."""
        return self._run.step

    @property
    def step_loss(self) -> Tensor:
        """Of the last step, `[len(members)]`, detached."""
        return self._run.step_loss

    @property
    def train_loss(self) -> np.ndarray:
        """float64 `[E]`, of the last whole epoch."""
        return self._last(0)

    @property
    def validation_loss(self) -> np.ndarray:
        """float64 `[E]`, after the last whole epoch."""
        return self._last(1)

    @property
    def metrics(self) -> Mapping[str, np.ndarray]:
        """float64 `[E]` each, after the last whole epoch."""
        names, values = self._run.metric_names, self._run.metric_values
        return {name: values[-1][i].copy() for i, name in enumerate(names)} if values else {}

    @property
    def terms(self) -> Mapping[str, np.ndarray]:
        """float64 `[E]` each, of the last whole epoch: what losses are the sum of, see `History.terms`."""
        return {name: values[-1].copy() for name, values in self.history.terms.items() if len(values)}

    @property
    def best_epoch(self) -> np.ndarray:
        """int64 `[E]`: whose weights each member would end with; -1: those before the first epoch."""
        best: np.ndarray = self._run.best_epoch.copy()
        return best

    @property
    def learning_rate(self) -> float:
        """Of the first group of the optimizer, now."""
        return self._run.trainer.learning_rate

    @property
    def history(self) -> History:
        """Of the whole epochs so far."""
        return self._run.history()

    def stop(self, members: Iterable[int] | None = None) -> None:
        """These members (numbers, or a bool for each of E), or all, train no more once the callbacks of
        this epoch are through; they end with
        the weights that they would have kept had they stopped early here."""
        known = range(len(self._run.status))
        asked = np.asarray(self.members if members is None else list(members))
        if asked.dtype == bool and asked.shape == (len(known),):
            asked = np.flatnonzero(asked)
        if asked.size and asked.dtype.kind not in "iu":
            raise TypeError(
                f"Progress.stop: members: expected integers, or a bool for each of {len(known)}, got "
                f"{asked.dtype} of shape {list(asked.shape)}"
            )
        chosen = [int(m) for m in asked.reshape(-1)]
        if unknown := [m for m in chosen if m not in known]:
            raise ValueError(f"Progress.stop: members: expected from 0 to {len(known) - 1}, got {unknown}")
        self._run.to_stop.update(chosen)

    def _last(self, place: int) -> np.ndarray:
        losses = self._run.losses
        if not losses:
            return np.full(len(self._run.status), np.nan)
        last: np.ndarray = losses[-1][place].copy()
        return last


def call(callbacks: Iterable[Any], name: str, progress: Progress) -> None:
    for callback in callbacks:
        if isinstance(callback, Callback):
            getattr(callback, name)(progress)
        elif name == "on_epoch_end":
            callback(progress)
