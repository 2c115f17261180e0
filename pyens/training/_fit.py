"""Training runs: all members in one batched pass, each with its own randomness and its own end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from pyens._files import only_writer
from pyens._types import Loss
from pyens.nn import Ensemble
from pyens.training import _checks
from pyens.training import checkpoint as checkpoints
from pyens.training._run import MakeOptimizer, Run
from pyens.training.history import History
from pyens.training.randomness import Randomness


def fit(
    model: Ensemble,
    data: Sequence[Tensor],
    *,
    loss: Loss,
    epochs: int,
    batch_size: int,
    optimizer: MakeOptimizer,
    randomness: Randomness | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    jackknife_groups: int | None = None,
    left_out: Sequence[int] | None = None,
    temperature: float = 1.0,
    validation: float | Sequence[Tensor] = 0.05,
    early_stopping: int | None = None,
    own_data: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1,
    progress: bool = True,
) -> History:
    r"""Trains all members of an ensemble together, each as if it were alone.

    A member's weights, bit for bit, follow from its own seed, the common `seed`, its left-out group, the data
    and the arguments; which members are beside it, how many threads there are, and whether the run was killed
    and taken up again make no difference. (On the CPU, with an optimizer for which that holds: see
    `pyens.optim`.)

    Args:
        model: any `pyens.nn.Ensemble`. Its members have their trained weights afterwards. Members that share
            their parameters (`pyens.nn.MaskedMLP`) are one model to this function: they stop together, by the
            mean of their validation losses.
        data: the training rows `[N, ...]`, in the order in which `model.loss` takes them: `(input, target)`,
            for a `TabularEnsemble` `(categorical, numeric, target)`. On the model's device.
        loss, temperature: see `pyens.ops.ensemble_mlp_loss`. Each member minimises its own mean loss. Only
            cross_entropy has a temperature.
        epochs: the most any member trains for.
        batch_size: examples of a step for each member; the last batch of an epoch may be smaller.
        optimizer: makes an optimizer of the parameters, `lambda p: pyens.optim.fused(torch.optim.Adam, p)`.
            Called again when members have stopped; what it remembers of the others goes on.
        randomness: the sources of randomness. If given, `model.reset_parameters` is called first: with
            `seeds` under R, else with `seed` for all members. None keeps the weights the model has, and every
            member shuffles.
        seed: feeds what the members have in common: validation rows, jackknife groups, weights without R, the
            order without S.
        seeds: one per member, feeds its weights (R), its order (S) and its dropout, which a model with
            dropout has under every setting. None derives them from `seed`, member m's the same however many
            members there are.
        jackknife_groups: under J into how many groups, equal to within one row, the training rows fall; None:
            ensemble_size.
        left_out: under J the group that each member leaves out; None: m.
        validation: the share of the rows, drawn by `seed` and the same for all members, that nobody trains
            on; or other rows, as `data`. 0: none.
        early_stopping: after how many epochs without a lower validation loss a member stops; it then costs
            nothing more. Every member ends with the weights of its best epoch. None: all epochs, and the
            weights of the last.
        own_data: whether every member has rows of its own, the same number: all tensors of `data` (and
            `validation`) are then `[E, N, ...]`, member first, and a row number means another row for each.
            For models that are trained together because they have the same shape.
        checkpoint: a file, written atomically and with a checksum. If it is there the run goes on where it
            was saved, to the bit; a damaged file, one of another run, or with other data, is refused.
            `epochs` alone may differ. Only one run at a time may use it.
        checkpoint_every: epochs between two checkpoints; there is always one at the end.
        progress: a bar with mean and spread of the members' losses, where tqdm is installed.

    A member whose loss or parameters become NaN or infinite is frozen with its last good weights (those of
    its best epoch so far under early stopping) and reported by a warning; it changes no bit of the others.

    Returns:
        The losses of every member in every epoch.

    Raises:
        TypeError, ValueError: arguments that do not fit each other, before anything is changed.
        RuntimeError: another run uses the checkpoint.

    Source: "Beyond Point Estimate", section on randomness; definitions in `Randomness`. Without S one fixed
    seeded permutation serves all members in all epochs.
    """
    run = Run(
        model,
        data,
        loss=loss,
        temperature=temperature,
        batch_size=batch_size,
        optimizer=optimizer,
        randomness=randomness,
        seed=seed,
        seeds=seeds,
        groups=jackknife_groups,
        left_out=left_out,
        validation=validation,
        early_stopping=early_stopping,
        own_data=own_data,
    )
    _checks.count("epochs", epochs)
    _checks.count("checkpoint_every", checkpoint_every)
    path = None if checkpoint is None else Path(checkpoint)
    described = {} if path is None else run.describe()
    with nullcontext() if path is None else only_writer(path, "fit: checkpoint"):
        saved = None if path is None else checkpoints.load(path, described)
        if saved is not None:
            try:
                run.check(saved)
            except Exception as error:
                raise ValueError(
                    f"fit: checkpoint: {path}: expected the state of such a run, got {error}"
                ) from error
        run.start(saved)
        first = run.epoch
        with _bar(progress, epochs - first, run.steps) as bar:
            for epoch in range(first, epochs):
                if not run.active:
                    break
                run.train(bar.update)
                run.end_epoch()
                bar.set_postfix_str(run.summary())
                if path is not None and (epoch + 1) % checkpoint_every == 0:
                    checkpoints.save(path, described, run.state())
        if path is not None and run.epoch > first and run.epoch % checkpoint_every != 0:
            checkpoints.save(path, described, run.state())
        return run.finish()


@contextmanager
def _bar(progress: bool, epochs: int, steps: int) -> Iterator[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        if progress:
            _say_once("fit: no bar of its progress without tqdm: pip install tqdm, or progress=False")
        progress = False
    if not progress:
        yield _NoBar()
        return
    with tqdm(total=max(0, epochs) * steps, unit="step") as bar:
        yield bar


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=5)


class _NoBar:
    def update(self) -> None:
        pass

    def set_postfix_str(self, text: str) -> None:
        pass
