"""Training runs: all members in one batched pass, each with its own randomness and its own end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pyens._files import only_writer
from pyens._types import Bootstrap, Loss
from pyens.nn import Ensemble
from pyens.training import _checks
from pyens.training import checkpoint as checkpoints
from pyens.training._run import LossFunction, MakeOptimizer, MakeScheduler, Penalty, Run
from pyens.training.history import History
from pyens.training.randomness import Randomness


def fit(
    model: Ensemble,
    data: Sequence[Any],
    *,
    loss: Loss | LossFunction,
    epochs: int,
    batch_size: int,
    optimizer: MakeOptimizer,
    scheduler: MakeScheduler | None = None,
    schedule: Literal["epoch", "step"] = "epoch",
    clip_norm: float | None = None,
    penalty: Penalty | None = None,
    sample_weight: Any = None,
    bootstrap: Bootstrap | None = None,
    randomness: Randomness | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    jackknife_groups: int | None = None,
    left_out: Sequence[int] | None = None,
    temperature: float = 1.0,
    validation: float | Sequence[Any] = 0.05,
    early_stopping: int | None = None,
    own_data: bool = False,
    check: bool = True,
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
            for a `TabularEnsemble` `(categorical, numeric, target)`, None for what it does without. Tensors
            on the model's device, numpy arrays, columns or frames of pandas. Floating point numbers become
            the parameters' dtype, once (float64 with a warning), smaller integers and bools int64; a target
            of             mse, bce or gaussian_nll becomes floating point, and `[N, 1]` where it is `[N]`.
        loss: one of those of `pyens.ops.ensemble_mlp_loss`; or a function of the outputs `[E, B, K]` and the
            target that gives `[E, B]` or, without weights, `[E]`. Each member minimises its own mean loss.
        temperature: of cross_entropy.
        penalty: a function of the outputs that gives `[E]`, or one number for all members together, to be
            added to the training loss: `lambda outputs: 0.1 * pyens.losses.decorrelation_loss(outputs)`.
            One that looks at several members makes their weights depend on each other.
        sample_weight: `[N]` or `[E, N]`, what each row weighs, in validation rows drawn from `data` too; for
            weights of the classes `class_weight[target]`.
        bootstrap: "multinomial" weighs each row by how often it is among N drawn with replacement, "poisson"
            by a Poisson(1) number, for every member from its own seed, beside `sample_weight` and jackknife.
        epochs: the most any member trains for.
        batch_size: examples of a step for each member; the last batch of an epoch may be smaller.
        optimizer: makes an optimizer of the parameters, `lambda p: pyens.optim.fused(torch.optim.Adam, p)`.
            Called once. Members that stop leave it and the model in place, see `Ensemble.select_`.
        scheduler: makes a schedule of `torch.optim.lr_scheduler` of that optimizer; stepped after every
            epoch, or after every step where `schedule` says so, and resumed from a checkpoint.
        clip_norm: each member's gradient is scaled down to this norm, over all of its parameters.
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
        check: whether all values are looked at before the first step: numbers finite, classes and categories
            in range. False saves a pass over data that is known to be good.
        own_data: whether every member has rows of its own, the same number: all tensors of `data` (and
            `validation`) are then `[E, N, ...]`, member first, and a row number means another row for each.
            For models that are trained together because they have the same shape.
        checkpoint: a file, written atomically and with a checksum. If it is there the run goes on where it
            was saved, to the bit; a damaged file, one of another run (other arguments, another optimizer or
            rate, without `randomness` other initial weights), or with other data, is refused. `epochs` alone
            may be larger; of functions (`loss`, `penalty`) only the names are compared. Only one run at a
            time may use it.
        checkpoint_every: epochs between two checkpoints; there is always one at the end.
        progress: a bar with mean and spread of the members' losses, where tqdm is installed.

    A member whose loss or parameters become NaN or infinite is frozen with its last good weights (those of
    its best epoch so far under early stopping) and reported by a warning; it changes no bit of the others.

    While members have left, `model.ensemble_size` is that of the others; whatever ends the run, Ctrl-C too,
    leaves the model whole, with each member's weights as far as they had come.

    Returns:
        The losses of every member in every epoch.

    Raises:
        TypeError, ValueError: arguments that do not fit each other, before anything is changed.
        RuntimeError: another run uses the checkpoint.

    Source: "Beyond Point Estimate", section on randomness; definitions in `Randomness`. Without S one fixed
    seeded permutation serves all members in all epochs.
    """
    _checks.count("epochs", epochs)
    _checks.count("checkpoint_every", checkpoint_every)
    if schedule not in ("epoch", "step"):
        raise ValueError(f"fit: schedule: expected 'epoch' or 'step', got {schedule!r}")
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"fit: checkpoint: expected a file in a folder that exists, got {path}")
    with nullcontext() if path is None else only_writer(path, "fit: checkpoint"):
        run = Run(
            model,
            data,
            loss=loss,
            penalty=penalty,
            temperature=temperature,
            sample_weight=sample_weight,
            bootstrap=bootstrap,
            batch_size=batch_size,
            optimizer=optimizer,
            scheduler=scheduler,
            schedule_steps=schedule == "step",
            clip_norm=clip_norm,
            randomness=randomness,
            seed=seed,
            seeds=seeds,
            groups=jackknife_groups,
            left_out=left_out,
            validation=validation,
            early_stopping=early_stopping,
            own_data=own_data,
            check=check,
        )
        described = {} if path is None else run.describe()
        saved = None if path is None else checkpoints.load(path, described)
        if saved is not None:
            try:
                run.check(saved)
            except Exception as error:
                raise ValueError(
                    f"fit: checkpoint: {path}: expected the state of such a run, got {error}"
                ) from error
            if saved["epoch"] > epochs:
                raise ValueError(
                    f"fit: epochs: expected at least the {saved['epoch']} of {path}, got {epochs}"
                )
        run.start(saved)
        first = run.epoch
        try:
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
        except BaseException:
            run.restore()
            raise
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
