"""Training runs: all members in one batched pass, each with its own randomness and its own end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import Unpack

from pyens._types import Bootstrap, Loss, LossOptions, MaskMode
from pyens.data.rows import RowSource
from pyens.nn import Ensemble
from pyens.training.callbacks import Callback, Progress
from pyens.training.history import History
from pyens.training.metrics import Metric, Mode
from pyens.training.randomness import Randomness
from pyens.training.trainer import LossFunction, MakeOptimizer, MakeScheduler, Penalty, Trainer


def fit(
    model: Ensemble,
    data: Sequence[Any] | RowSource,
    *,
    loss: Loss | LossFunction,
    epochs: int,
    batch_size: int,
    window: int | None = None,
    optimizer: MakeOptimizer,
    scheduler: MakeScheduler | None = None,
    schedule: Literal["epoch", "step"] = "epoch",
    clip_norm: float | None = None,
    clip_value: float | None = None,
    penalty: Penalty | None = None,
    mask_mode: MaskMode = "tiled",
    micro_batch_size: int | None = None,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    ema: float | None = None,
    swa_start: int | None = None,
    sample_weight: Any = None,
    bootstrap: Bootstrap | None = None,
    randomness: Randomness | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
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
    **loss_options: Unpack[LossOptions],
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
            of any loss but cross_entropy becomes floating point, and `[N, 1]` where it is `[N]`. Or a
            `pyens.data.RowSource`, for rows that need not fit into memory, whose batches become so.
        loss: one of those of `pyens.ops.ensemble_mlp_loss`; or a function of the outputs `[E, B, K]` and the
            target that gives `[E, B]` or, without weights, `[E]`. Each member minimises its own mean loss.
        loss_options: temperature, label_smoothing, delta, quantiles, class_weight, log_variance_min and
            log_variance_max, as `pyens.ops.ensemble_mlp_loss` has them. Validation losses have them too.
            Bounds that are learnt belong into a model of one's own, whose `loss` gives them.
        penalty: a function of the outputs that gives `[E]`, or one number for all members together, to be
            added to the training loss: `lambda outputs: 0.1 * pyens.losses.decorrelation_loss(outputs)`.
            One that looks at several members makes their weights depend on each other.
        sample_weight: `[N]` or `[E, N]`, what each row weighs, in validation rows drawn from `data` too.
        bootstrap: "multinomial" weighs each row by how often it is among N drawn with replacement, "poisson"
            by a Poisson(1) number, for every member from its own seed, beside `sample_weight` and jackknife.
        epochs: the most any member trains for.
        batch_size: examples of a step for each member; the last batch of an epoch may be smaller.
        window: of a source of rows: it is read part by part, the parts in an order that is drawn for each
            epoch and common to all members, and every member has its own order of the rows within a window
            of so many (rounded up to whole batches). None: 131,072 for a source that is read in order
            (files), and for others every member its own order of all rows.
        optimizer: makes an optimizer of the parameters, `lambda p: pyens.optim.fused(torch.optim.Adam, p)`.
            Called once. Members that stop leave it and the model in place, see `Ensemble.select_`. It may
            give several that share the parameters out, such as SparseAdam for the tables of a sparse
            `TabularEnsemble` beside Adam for the rest; a schedule is then made for each.
        scheduler: makes a schedule of `torch.optim.lr_scheduler` of that optimizer; stepped after every
            epoch, or after every step where `schedule` says so, and resumed from a checkpoint.
        clip_norm: each member's gradient is scaled down to this norm, over all of its parameters.
        clip_value: each number of a gradient is brought into [-clip_value, clip_value], before `clip_norm`.
        mask_mode: of a `MaskedMLP`: "tiled" trains every mask on every row; under the others each row meets
            one mask, anew in every step, at the cost of one model (see `MaskedMLP.loss`, whose gradient this
            has times the number of masks: what they add up to under "tiled").
        micro_batch_size: a step's batch is computed in parts of at most so many rows, whose gradients add up
            to the whole's but for rounding ("gradient accumulation"). What `penalty`, or a `loss` that gives
            `[E]`, makes of each part counts by its rows.
        autocast: torch.bfloat16 or torch.float16, in which the model is computed (`torch.autocast`); the
            parameters stay as they are.
        scaler: a `torch.amp.GradScaler`, for float16. It has one scale for all members, and leaves a step out
            for all where one overflows: the one option besides `penalty` that lets members depend on others.
        ema: the decay of a moving average of each member's weights over the steps. It is what validation
            looks at, and what the members have in the end.
        swa_start: the epoch from which on the weights after each epoch are averaged evenly, likewise.
        randomness: the sources of randomness. If given, `model.reset_parameters` is called first, for frozen
            parameters too: with `seeds` under R, else with `seed` for all members. None keeps the weights the
            model has, and every member shuffles.
        seed: feeds what the members have in common: validation rows, jackknife groups, weights without R, the
            order without S.
        seeds: one per member, feeds its weights (R), its order (S) and its dropout, which a model with
            dropout has under every setting. None derives them from `seed`, member m's the same however many
            members there are.
        groups: `[N]`, numbers or names: rows of one group (a patient, a user) stay together, on one side of
            the validation share, and in one jackknife group.
        jackknife_groups: under J into how many groups, equal to within one row, the training rows fall; None:
            ensemble_size.
        left_out: under J the group that each member leaves out; None: m.
        validation: the share of the rows, drawn by `seed` and the same for all members, that nobody trains
            on; or which rows, int indices or a bool mask `[N]`, as scikit-learn's splitters give them (by
            time: `validation=when >= cutoff`); or other rows, as `data`. 0: none. Beside rows that are read
            in windows: other rows, or 0.
        metrics: what is measured of each member on the validation rows after every epoch, and kept in the
            history. Names, for the named losses: accuracy, auroc, brier_score, expected_calibration_error and
            nll (cross_entropy, bce), r_squared and rmse (mse, huber, smooth_l1, gaussian_nll), all of
            `pyens.metrics`. Or a dict of functions of one member's outputs `[B, K]` and the target that give
            a number. Rows with weight 0 are left out, all others count once.
        early_stopping: after how many epochs without a better value of `monitor` a member stops; it then
            costs nothing more. Every member ends with the weights of its best epoch. None: all epochs, and
            the weights of the last.
        monitor: the validation "loss", or one of the metrics.
        mode: whether lower ("min") or higher ("max") is better, for a metric of one's own.
        min_delta: by how much a value must be better to count.
        callbacks: see `pyens.training.Callback`; a function of the progress is called after each epoch.
        check: whether all values are looked at before the first step: numbers finite, classes and categories
            in range; in windows as they are read in the first epoch. False saves a pass over data that is
            known to be good.
        own_data: whether every member has rows of its own, the same number: all tensors of `data` (and
            `validation`) are then `[E, N, ...]`, member first, and a row number means another row for each.
            For models that are trained together because they have the same shape.
        checkpoint: a file, written atomically and with a checksum. If it is there the run goes on where it
            was saved, to the bit; a damaged file, one of another run (other arguments, another optimizer or
            rate, without `randomness` other initial weights), or with other data, is refused. `epochs` alone
            may be larger; of functions (`loss`, `penalty`) only the names are compared. Only one run at a
            time may use it.
        checkpoint_every: epochs between two checkpoints; there is always one at the end.
        progress: a bar with mean and spread of the members' losses, where tqdm is installed; "lines": a line
            for each epoch on the error output. False: nothing.

    A member whose loss or parameters become NaN or infinite is frozen with its last good weights (those of
    its best epoch so far under early stopping) and reported by a warning; it changes no bit of the others.

    While members have left, `model.ensemble_size` is that of the others; whatever ends the run, Ctrl-C too,
    leaves the model whole, with each member's weights as far as they had come.

    This is `Trainer(model, ...).fit(data, ...)`; a `Trainer` can also make single steps.

    Returns:
        The losses of every member in every epoch.

    Raises:
        TypeError, ValueError: arguments that do not fit each other, before anything is changed; rows that are
            read in windows, or files that have changed, when they are met.
        RuntimeError: another run uses the checkpoint.

    Source: "Beyond Point Estimate", section on randomness; definitions in `Randomness`. Without S one fixed
    seeded permutation serves all members in all epochs.
    """
    trainer = Trainer(
        model,
        loss=loss,
        optimizer=optimizer,
        scheduler=scheduler,
        schedule=schedule,
        penalty=penalty,
        clip_norm=clip_norm,
        clip_value=clip_value,
        mask_mode=mask_mode,
        micro_batch_size=micro_batch_size,
        autocast=autocast,
        scaler=scaler,
        ema=ema,
        swa_start=swa_start,
        seed=seed,
        seeds=seeds,
        **loss_options,
    )
    return trainer.fit(
        data,
        epochs=epochs,
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
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )
