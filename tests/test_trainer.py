"""`pyens.training.Trainer`: callbacks, metrics, splits, what a step is made of, and single steps."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, log_loss, mean_squared_error, r2_score, roc_auc_score
from sklearn.model_selection import GroupShuffleSplit
from torch import Tensor, nn

from pyens import EnsembleMLP
from pyens.nn import MaskedMLP, TabularEnsemble
from pyens.optim import MemberLearningRates, MemberWeightDecay, fused, member_options
from pyens.training import Callback, History, Progress, Randomness, Trainer, derive_seed, fit, member_seeds
from pyens.training.randomness import partition, split_rows

N = 203
MEMBERS = 4


def rows(n: int = N) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=draw)
    return x, x[:, :1].sin() + 0.3 * torch.randn(n, 1, generator=draw)


def classes() -> tuple[Tensor, Tensor]:
    x, y = rows()
    return x, (y[:, 0] > 0).long() + (y[:, 0] > 1).long()


def adam(parameters: Any) -> torch.optim.Optimizer:
    return fused(torch.optim.Adam, parameters, lr=1e-2)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def mlp(outputs: int = 1, **options: Any) -> EnsembleMLP:
    return EnsembleMLP(MEMBERS, 4, [6, 5], outputs, activation="silu", seeds=range(MEMBERS), **options)


def run(model: Any = None, data: Any = None, **options: Any) -> tuple[Any, History]:
    model = mlp() if model is None else model
    arguments: dict[str, Any] = {"loss": "mse", "epochs": 6, "batch_size": 32, "optimizer": adam, "seed": 3}
    history = fit(model, rows() if data is None else data, progress=False, **(arguments | options))
    return model, history


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def assert_close(a: nn.Module, b: nn.Module, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


STOPPING: dict[str, Any] = {"epochs": 30, "early_stopping": 1, "validation": 0.2}


# --- callbacks ---------------------------------------------------------------------------------------------


class Seen(Callback):
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.members: list[list[int]] = []
        self.sizes: list[int] = []
        self.steps = 0

    def on_fit_begin(self, progress: Progress) -> None:
        self.calls.append("begin")
        assert progress.epoch == -1 and np.isnan(progress.train_loss).all() and progress.metrics == {}

    def on_step_end(self, progress: Progress) -> None:
        assert progress.step_loss.shape == (len(progress.members),)
        assert not progress.step_loss.requires_grad
        assert progress.step == self.steps % 6
        self.steps += 1

    def on_epoch_end(self, progress: Progress) -> None:
        self.calls.append(f"epoch {progress.epoch}")
        self.members.append(progress.members)
        self.sizes.append(progress.model.ensemble_size)
        assert progress.learning_rate == 1e-2 and len(progress.optimizers) == 1
        assert progress.history.train_loss.shape == (progress.epoch + 1, MEMBERS)
        assert np.isfinite(progress.train_loss[progress.members]).all()
        assert np.array_equal(progress.validation_loss, progress.history.validation_loss[-1], equal_nan=True)
        assert np.array_equal(progress.metrics["rmse"], progress.history.metrics["rmse"][-1], equal_nan=True)

    def on_fit_end(self, progress: Progress) -> None:
        self.calls.append("end")
        assert progress.members == [] and progress.model.ensemble_size == MEMBERS


def test_callbacks_see_the_run() -> None:
    seen = Seen()
    _, history = run(callbacks=[seen], metrics=["rmse"], **STOPPING)
    epochs = len(history.train_loss)
    assert seen.calls == ["begin", *(f"epoch {e}" for e in range(epochs)), "end"]
    assert len(set(history.epochs)) > 1
    for epoch, (members, size) in enumerate(zip(seen.members, seen.sizes, strict=True)):
        assert members == [m for m in range(MEMBERS) if history.epochs[m] > epoch + 1]
        assert size == max(len(members), 1) or not members
    assert seen.steps == epochs * 6


def test_a_callback_changes_no_bit() -> None:
    assert_same(run(callbacks=[Seen()], metrics=["rmse"], **STOPPING)[0], run(**STOPPING)[0])


def test_a_callback_stops_members() -> None:
    def stop(progress: Progress) -> None:
        if progress.epoch == 1:
            progress.stop([2])
        if progress.epoch == 3:
            progress.stop()

    model, history = run(callbacks=[stop])
    assert history.epochs.tolist() == [4, 4, 2, 4]
    assert history.status == ("stopped",) * MEMBERS
    assert_same(model.select([2]), run(epochs=2)[0].select([2]))
    assert_same(model.select([1]), run(epochs=4)[0].select([1]))
    with pytest.raises(ValueError, match=r"Progress.stop: members: expected from 0 to 3, got \[9\]"):
        run(callbacks=[lambda progress: progress.stop([9])])


def test_members_that_share_parameters_stop_together() -> None:
    model = MaskedMLP(3, 4, [12], 1, scale=2.0)
    _, history = run(model, callbacks=[lambda progress: progress.stop([1])], metrics=["rmse"])
    assert history.epochs.tolist() == [1, 1, 1] and history.metrics["rmse"].shape == (1, 3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_callback_that_raises_leaves_model_and_checkpoint_whole(error: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"

    def interrupt(progress: Progress) -> None:
        if progress.epoch == 3:
            raise error

    model = mlp()
    trainer = Trainer(model, loss="mse", optimizer=adam, seed=3)
    arguments: dict[str, Any] = {"epochs": 6, "batch_size": 32, "progress": False, "checkpoint": path}
    with pytest.raises(error):
        trainer.fit(rows(), callbacks=[interrupt], **arguments)
    assert trainer.history is not None and len(trainer.history.train_loss) == 4
    assert_same(model, run(epochs=4)[0])
    assert trainer.members == list(range(MEMBERS))
    again = mlp()
    Trainer(again, loss="mse", optimizer=adam, seed=3).fit(rows(), **arguments)
    assert_same(again, run()[0])


def test_what_a_callback_remembers_is_in_the_checkpoint(tmp_path: Path) -> None:
    class Counts(Callback):
        count = 0

        def on_epoch_end(self, progress: Progress) -> None:
            self.count += 1

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    path = tmp_path / "run.pt"
    run(callbacks=[Counts()], checkpoint=path, epochs=2)
    counts = Counts()
    run(callbacks=[counts], checkpoint=path, epochs=5)
    assert counts.count == 5
    with pytest.raises(ValueError, match="other callbacks"):
        run(callbacks=[], checkpoint=path, epochs=6)
    run(callbacks=[lambda progress: None, counts], checkpoint=path, epochs=6)


# --- metrics -----------------------------------------------------------------------------------------------


def test_metrics_are_those_of_scikit_learn() -> None:
    x, y = classes()
    held_out = torch.arange(40)
    names = ["accuracy", "nll", "brier_score", "expected_calibration_error"]
    model, history = run(
        mlp(3), (x, y), loss="cross_entropy", temperature=2.0, metrics=names, validation=held_out
    )
    probability = (model(x[:40]).double() / 2).softmax(-1).detach().numpy()
    for m in range(MEMBERS):
        got = {name: history.metrics[name][-1, m] for name in names}
        assert got["accuracy"] == accuracy_score(y[:40], probability[m].argmax(-1))
        assert got["nll"] == pytest.approx(log_loss(y[:40], probability[m]), rel=1e-6)
        one_hot = F.one_hot(y[:40], 3).numpy()
        assert got["brier_score"] == pytest.approx(((probability[m] - one_hot) ** 2).sum(-1).mean(), rel=1e-6)


def test_metrics_of_two_classes() -> None:
    x, y = classes()
    y = y.clamp_max(1)
    held_out = torch.arange(40)
    options: dict[str, Any] = {"metrics": ["auroc", "accuracy", "nll"], "validation": held_out}
    for outputs, loss in ((2, "cross_entropy"), (1, "bce")):
        model, history = run(mlp(outputs), (x, y), loss=loss, **options)
        output = model(x[:40]).double().detach()
        p = (output.softmax(-1)[..., 1] if outputs == 2 else output.sigmoid()[..., 0]).numpy()
        for m in range(MEMBERS):
            assert history.metrics["auroc"][-1, m] == pytest.approx(roc_auc_score(y[:40], p[m]))
            assert history.metrics["accuracy"][-1, m] == accuracy_score(y[:40], p[m] > 0.5)
            assert history.metrics["nll"][-1, m] == pytest.approx(log_loss(y[:40], p[m]), rel=1e-6)


def test_metrics_of_values() -> None:
    x, y = rows()
    for outputs, loss in ((1, "mse"), (2, "gaussian_nll")):
        model, history = run(
            mlp(outputs), loss=loss, metrics=["rmse", "r_squared"], validation=torch.arange(N) < 40
        )
        predicted = model(x[:40])[..., :1].detach()
        for m in range(MEMBERS):
            expected = mean_squared_error(y[:40], predicted[m]) ** 0.5
            assert history.metrics["rmse"][-1, m] == pytest.approx(expected, rel=1e-6)
            assert history.metrics["r_squared"][-1, m] == pytest.approx(
                r2_score(y[:40], predicted[m]), rel=1e-4
            )


def test_metrics_of_ones_own_with_rows_of_ones_own_and_weights() -> None:
    x, y = rows()
    own = tuple(torch.stack([t + m for m in range(MEMBERS)]) for t in (x, y))
    weight = torch.ones(MEMBERS, N)
    weight[:, :10] = 0
    measure = {"worst": lambda output, target: (output - target).abs().max()}
    held_out = torch.arange(40)
    model, history = run(
        mlp(), own, own_data=True, metrics=measure, sample_weight=weight, validation=held_out
    )
    expected = (model(own[0][:, 10:40]) - own[1][:, 10:40]).abs().flatten(1).amax(1)
    np.testing.assert_allclose(history.metrics["worst"][-1], expected.detach(), rtol=1e-6)


def test_stopping_by_a_metric_in_either_direction() -> None:
    model, by_accuracy = run(
        mlp(3),
        classes(),
        loss="cross_entropy",
        metrics=["accuracy"],
        monitor="accuracy",
        **{**STOPPING, "early_stopping": 2},
    )
    accuracy = by_accuracy.metrics["accuracy"]
    for m in range(MEMBERS):
        own = accuracy[: by_accuracy.epochs[m], m]
        assert by_accuracy.best_epoch[m] == own.argmax()  # the first of the best
        assert by_accuracy.epochs[m] in (30, own.argmax() + 3)
    x, y = classes()
    _, validation = split_rows(N, 0.2, 3)
    best = (model(x[validation]).argmax(-1) == y[validation]).double().mean(-1)
    np.testing.assert_allclose(best, accuracy[by_accuracy.best_epoch, range(MEMBERS)])

    def error(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean()

    lower, _ = run(metrics={"error": error}, monitor="error", mode="min", **STOPPING)
    higher, _ = run(metrics={"error": lambda o, y: -error(o, y)}, monitor="error", mode="max", **STOPPING)
    assert_same(lower, higher)
    assert_same(lower, run(**STOPPING)[0])


def test_a_value_must_be_better_by_min_delta() -> None:
    _, history = run(min_delta=1e9, **STOPPING)
    assert history.epochs.tolist() == [2] * MEMBERS and history.best_epoch.tolist() == [0] * MEMBERS


def test_a_diverged_member_has_no_metrics() -> None:
    model = mlp()
    with torch.no_grad():
        model.get_parameter("weights.0")[1] = 1e30

    with pytest.warns(UserWarning, match=r"members \[1\] diverged") as said:
        _, history = run(model, metrics=["rmse"], optimizer=sgd)
    assert said[0].filename == __file__
    assert np.isfinite(history.metrics["rmse"][:, [0, 2, 3]]).all()
    assert np.isnan(history.metrics["rmse"][1:, 1]).all()


def test_metrics_are_in_the_history_and_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    options: dict[str, Any] = {"metrics": ["rmse", "r_squared"], "monitor": "r_squared"}
    run(checkpoint=path, **{**STOPPING, **options, "epochs": 2})
    model, resumed = run(checkpoint=path, **STOPPING, **options)
    whole_model, whole = run(**STOPPING, **options)
    assert_same(model, whole_model)
    for name in options["metrics"]:
        np.testing.assert_array_equal(resumed.metrics[name], whole.metrics[name])
    resumed.to_csv(tmp_path / "history.csv")
    head, first, *_ = (tmp_path / "history.csv").read_text().splitlines()
    assert head == "epoch,member,train_loss,validation_loss,rmse,r_squared"
    assert float(first.split(",")[4]) == whole.metrics["rmse"][0, 0]
    assert whole.member(1).metrics["rmse"].shape == (whole.epochs[1], 1)
    with pytest.raises(ValueError, match="expected monitor"):
        run(checkpoint=path, **STOPPING, metrics=options["metrics"])


# --- which rows --------------------------------------------------------------------------------------------


def test_validation_rows_by_index_and_mask() -> None:
    groups = np.arange(N) // 7
    training, held_out = next(
        GroupShuffleSplit(1, test_size=0.2, random_state=0).split(groups, groups=groups)
    )
    mask = np.zeros(N, bool)
    mask[held_out] = True
    by_index, history = run(validation=held_out)
    assert_same(by_index, run(validation=mask)[0])
    assert_same(by_index, run(validation=torch.from_numpy(mask))[0])
    assert set(np.flatnonzero(history.row_group == -1)) == set(held_out)
    assert set(np.flatnonzero(history.row_group == 0)) == set(training)


def test_groups_stay_together() -> None:
    names = np.array([f"user {i % 37}" for i in range(N)])
    _, history = run(groups=names, validation=0.2, randomness=Randomness(jackknife=True), jackknife_groups=5)
    of_group = {name: set(history.row_group[names == name].tolist()) for name in set(names)}
    assert all(len(parts) == 1 for parts in of_group.values())
    assert set(history.row_group.tolist()) == {-1, 0, 1, 2, 3, 4}
    held_out = (history.row_group == -1).sum()
    assert abs(held_out - 0.2 * N) <= 3  # a group has 5 or 6 rows
    sizes = np.bincount(history.row_group[history.row_group >= 0])
    assert sizes.max() - sizes.min() <= 6  # a group has 5 or 6 rows
    # Another seed, another draw; no groups, as before.
    assert not np.array_equal(
        run(groups=names, seed=4, validation=0.2)[1].row_group < 0, history.row_group < 0
    )


def test_parts_of_unequal_groups() -> None:
    groups = torch.repeat_interleave(torch.arange(6), torch.tensor([10, 1, 1, 3, 3, 2]))
    rows = torch.randperm(20)
    part = partition(rows, 20, 2, 0, groups)
    assert np.bincount(part).tolist() == [10, 10]
    assert all(len(part[groups == g].unique()) == 1 for g in range(6))


# --- what a step is made of --------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, "rows", "members"])
@pytest.mark.parametrize("own_data", [False, True])
def test_parts_of_a_batch_add_up(weights: str | None, own_data: bool) -> None:
    weight = None if weights is None else torch.rand(N) * (torch.rand(N) > 0.3)
    if weights == "members":
        weight = torch.rand(MEMBERS, N) * 1e30 * (torch.rand(MEMBERS, N) > 0.3)
    data = tuple(torch.stack([t + m for m in range(MEMBERS)]) for t in rows()) if own_data else rows()
    # A small rate: with rows far from 0 a large one multiplies what parts and whole round differently.
    gently = partial(torch.optim.SGD, lr=0.02)
    options: dict[str, Any] = {
        "sample_weight": weight,
        "optimizer": gently,
        "own_data": own_data,
        "data": data,
    }
    whole, expected = run(**options)
    parts, history = run(micro_batch_size=5, **options)
    assert_close(parts, whole)
    np.testing.assert_allclose(history.train_loss, expected.train_loss, rtol=1e-4)
    assert_same(run(micro_batch_size=32, **options)[0], whole)


def test_parts_of_a_batch_drop_units_of_their_own() -> None:
    seen: list[Tensor] = []

    class Watched(EnsembleMLP):
        def loss(self, *batch: Any, **options: Any) -> Tensor:
            if self.training:
                seen.append(options["dropout_seeds"].clone())
            return super().loss(*batch, **options)

    model = Watched(2, 4, [6], 1, dropout=0.5)
    run(model, micro_batch_size=10, epochs=1, batch_size=N)
    assert len(seen) == 20  # 193 rows
    assert len({tuple(seeds.tolist()) for seeds in seen}) == 20


def test_averages_of_weights() -> None:
    """Against a loop with averages of its own, in float64."""
    x, y = rows()
    training, _ = split_rows(N, 0.05, 3)
    for options in ({"ema": 0.8}, {"swa_start": 2}):
        model, history = run(optimizer=sgd, randomness=Randomness(), epochs=5, **options)
        alone = EnsembleMLP(MEMBERS, 4, [6, 5], 1, activation="silu", seeds=[3] * MEMBERS)
        optimizer = sgd(alone.parameters())
        average: list[Tensor] = []
        count = 0
        for epoch in range(5):
            for batch in training.long().split(32):
                optimizer.zero_grad()
                alone.loss(x[batch], y[batch], loss="mse").sum().backward()
                optimizer.step()
                now = [p.detach().double() for p in alone.parameters()]
                if "ema" in options:
                    average = [0.8 * a + 0.2 * p for a, p in zip(average or now, now, strict=True)]
            if epoch >= options.get("swa_start", 9):
                count += 1
                average = [a + (p - a) / count for a, p in zip(average or now, now, strict=True)]
        for p, a in zip(model.parameters(), average, strict=True):
            torch.testing.assert_close(p.double(), a, rtol=1e-4, atol=1e-6)
        # It is the average that was judged last.
        _, held_out = split_rows(N, 0.05, 3)
        judged = model.loss(x[held_out], y[held_out], loss="mse")
        np.testing.assert_allclose(history.validation_loss[-1], judged.detach(), rtol=1e-5)


def test_values_of_gradients_are_clipped_as_in_torch() -> None:
    x, y = rows()
    model, _ = run(
        clip_value=0.01, optimizer=sgd, batch_size=N, epochs=3, randomness=Randomness(), validation=0
    )
    alone = EnsembleMLP(MEMBERS, 4, [6, 5], 1, activation="silu", seeds=[3] * MEMBERS)
    optimizer = sgd(alone.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        alone.loss(x, y, loss="mse").sum().backward()
        nn.utils.clip_grad_value_(alone.parameters(), 0.01)
        optimizer.step()
    assert_close(model, alone, atol=1e-6)


def test_lower_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model, history = run(autocast=dtype, epochs=20)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        exact, expected = run(epochs=20)
        assert not torch.equal(next(model.parameters()), next(exact.parameters()))
        np.testing.assert_allclose(history.train_loss[-1], expected.train_loss[-1], rtol=0.1)
    own = run(autocast=torch.bfloat16, loss=lambda o, y: (o.float() - y).square().mean(-1), metrics={})[1]
    assert np.isfinite(own.train_loss).all()


def test_a_gradient_scaler(tmp_path: Path) -> None:
    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=5)

    plain, _ = run(clip_norm=0.05)
    scaled, _ = run(scaler=torch.amp.GradScaler("cpu", init_scale=8.0), clip_norm=0.05)
    assert_close(scaled, plain)
    # A scale that overflows is brought down by steps that are left out, and saved as it is.
    path = tmp_path / "run.pt"
    options: dict[str, Any] = {"autocast": torch.float16, "checkpoint": path}
    run(scaler=scaler(), epochs=3, **options)
    used = scaler()
    resumed, history = run(scaler=used, **options)
    assert 1 < used.get_scale() < 2.0**40 and np.isfinite(history.train_loss).all()
    assert_same(resumed, run(scaler=scaler(), autocast=torch.float16)[0])


# --- sparse tables, several optimizers, members with options of their own ----------------------------------


def tables(sparse: bool) -> TabularEnsemble:
    return TabularEnsemble(MEMBERS, [(50, 3), (7, 2)], 4, [6], 1, sparse=sparse, seeds=range(MEMBERS))


def tabular() -> tuple[Tensor, Tensor, Tensor]:
    x, y = rows()
    return torch.stack([torch.arange(N) % 50, torch.arange(N) % 7], 1), x, y


def test_sparse_tables() -> None:
    data = tabular()
    sparse, _ = run(tables(True), data, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    dense, _ = run(tables(False), data, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert_close(sparse, dense)
    for argument in ("clip_norm", "clip_value"):
        with pytest.raises(ValueError, match=rf"fit: {argument}: expected dense gradients, got those of"):
            run(tables(True), data, optimizer=sgd, **{argument: 1.0})


def test_several_optimizers(tmp_path: Path) -> None:
    def both(model: TabularEnsemble) -> Any:
        return lambda _: [
            torch.optim.SparseAdam(list(model.embeddings.parameters()), lr=1e-2),
            fused(torch.optim.Adam, model.mlp.parameters(), lr=1e-2),
        ]

    def go(epochs: int, path: Path | None = None) -> tuple[Any, History]:
        model = tables(True)
        return run(
            model,
            tabular(),
            optimizer=both(model),
            scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
            checkpoint=path,
            **{**STOPPING, "epochs": epochs},
        )

    go(3, tmp_path / "run.pt")
    resumed, history = go(30, tmp_path / "run.pt")
    whole, _ = go(30)
    assert_same(resumed, whole)
    assert len(set(history.epochs)) > 1
    assert history.learning_rate[2] == pytest.approx(1e-2 * 0.9**2)
    with pytest.raises(ValueError, match="expected optimizer"):
        run(tables(True), tabular(), optimizer=sgd, checkpoint=tmp_path / "run.pt", **STOPPING)


def test_weight_decay_of_each_member() -> None:
    """Against AdamW on each alone."""
    x, y = rows()
    decays = [0.0, 0.1, 1.0, 3.0]
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    own = MemberWeightDecay(optimizer, decays)
    alone = [mlp().select([m]) for m in range(MEMBERS)]
    theirs = [
        torch.optim.AdamW(a.parameters(), lr=1e-2, weight_decay=d) for a, d in zip(alone, decays, strict=True)
    ]
    for _ in range(10):
        for network, step in zip([model, *alone], [optimizer, *theirs], strict=True):
            step.zero_grad()
            network.loss(x, y, loss="mse").sum().backward()
            step.step()
    for m in range(MEMBERS):
        assert_close(model.select([m]), alone[m], atol=1e-6)
    ((name, numbers),) = member_options(optimizer)
    assert name == "MemberWeightDecay" and numbers.tolist() == pytest.approx(decays)
    own.remove()
    assert member_options(optimizer) == []
    for bad in ([-0.1] * 4, [float("nan")] * 4, [0.1] * 3):
        with pytest.raises(ValueError, match="MemberWeightDecay: decays: expected"):
            MemberWeightDecay(optimizer, bad)
    assert member_options(optimizer) == []


def test_a_rate_of_dropout_for_each_member(tmp_path: Path) -> None:
    rates, seeds = [0.0, 0.1, 0.5, 0.3], member_seeds(3, MEMBERS)

    def go(members: list[int], **options: Any) -> tuple[Any, History]:
        own = {"seeds": [seeds[m] for m in members]}
        model = EnsembleMLP(
            len(members), 4, [6, 5], 1, dropout=[rates[m] for m in members], seeds=[*map(int, own["seeds"])]
        )
        return run(model, **{**STOPPING, **own, **options})

    together, history = go([0, 1, 2, 3])
    assert len(set(history.epochs)) > 1 and together.dropout == tuple(rates)
    for m in range(MEMBERS):
        assert_same(together.select([m]), go([m])[0])
    go([0, 1, 2, 3], checkpoint=tmp_path / "run.pt", epochs=int(min(history.epochs)))
    assert_same(go([0, 1, 2, 3], checkpoint=tmp_path / "run.pt")[0], together)


def test_label_smoothing_is_torchs() -> None:
    x, y = classes()
    own, history = run(mlp(3), (x, y), loss="cross_entropy", label_smoothing=0.2, optimizer=sgd)

    def smoothed(output: Tensor, target: Tensor) -> Tensor:
        labels = target.expand(output.shape[:2]).flatten()
        each = F.cross_entropy(output.flatten(0, 1), labels, label_smoothing=0.2, reduction="none")
        return each.view(output.shape[:2])

    theirs, expected = run(mlp(3), (x, y), loss=smoothed, optimizer=sgd)
    penalised, _ = run(
        mlp(3),
        (x, y),
        loss="cross_entropy",
        label_smoothing=0.2,
        optimizer=sgd,
        penalty=lambda o: 0 * o.sum(),
    )
    assert_close(own, theirs)
    assert_close(own, penalised)
    np.testing.assert_allclose(history.train_loss, expected.train_loss, rtol=1e-4)
    np.testing.assert_allclose(history.validation_loss, expected.validation_loss, rtol=1e-4)
    with pytest.raises(ValueError, match="fit: label_smoothing: expected 0"):
        run(label_smoothing=0.1)


def test_a_checkpoint_knows_what_members_have_of_their_own(tmp_path: Path) -> None:
    def make(kind: Any, numbers: list[float]) -> Any:
        def made(parameters: Any) -> torch.optim.Optimizer:
            optimizer = adam(parameters)
            kind(optimizer, numbers)
            return optimizer

        return made

    for kind in (MemberLearningRates, MemberWeightDecay):
        path = tmp_path / f"{kind.__name__}.pt"
        run(optimizer=make(kind, [1, 0.5, 0.2, 0.1]), checkpoint=path, epochs=2)
        with pytest.raises(ValueError, match="expected optimizer"):
            run(optimizer=make(kind, [1, 0.5, 0.2, 0.2]), checkpoint=path)
        run(optimizer=make(kind, [1, 0.5, 0.2, 0.1]), checkpoint=path)


@pytest.mark.parametrize("mode", ["grouped", "round_robin", "random"])
def test_masks_that_are_drawn(mode: str, tmp_path: Path) -> None:
    """Against a loop that says so itself, and resumed."""

    def model() -> MaskedMLP:
        torch.manual_seed(0)
        return MaskedMLP(3, 4, [12], 1, scale=2.0)

    x, y = rows()
    ours, history = run(model(), mask_mode=mode, optimizer=sgd, epochs=4, randomness=Randomness())
    alone = model()
    alone.reset_parameters([3] * 3)
    optimizer = sgd(alone.parameters())
    training, _ = split_rows(N, 0.05, 3)
    for epoch in range(4):
        for step, batch in enumerate(training.long().split(32)):
            optimizer.zero_grad()
            seed = derive_seed(3, "masks", epoch, step)
            (3 * alone.loss(x[batch], y[batch], loss="mse", mode=mode, seed=seed)).backward()
            optimizer.step()
    assert_close(ours, alone)
    assert (history.train_loss == history.train_loss[:, :1]).all()
    assert not (history.validation_loss == history.validation_loss[:, :1]).all()  # by each mask
    path = tmp_path / "run.pt"
    run(model(), mask_mode=mode, epochs=2, checkpoint=path, micro_batch_size=10)
    resumed, _ = run(model(), mask_mode=mode, checkpoint=path, micro_batch_size=10)
    assert_same(resumed, run(model(), mask_mode=mode, micro_batch_size=10)[0])
    for options in ({"penalty": lambda o: o.sum()}, {"loss": lambda o, y: o.sum()}):
        with pytest.raises(ValueError, match="fit: mask_mode: expected 'tiled' beside functions"):
            run(model(), mask_mode=mode, **options)
    for options in ({"bootstrap": "poisson"}, {"sample_weight": torch.ones(3, N)}):
        with pytest.raises(ValueError, match="fit: mask_mode: expected 'tiled' for members with rows or"):
            run(model(), mask_mode=mode, **options)
    with pytest.raises(ValueError, match="fit: mask_mode: expected 'tiled' for a EnsembleMLP"):
        run(mask_mode=mode)


# --- what others hold --------------------------------------------------------------------------------------


def test_losses_that_somebody_keeps_do_not_stop_a_run() -> None:
    x, y = rows()
    model = mlp()
    hooked: list[int] = []
    parameter = next(model.parameters())
    parameter.register_post_accumulate_grad_hook(lambda p: hooked.append(len(p.grad)))
    kept = model.loss(x, y, loss="mse")
    copies = [p.clone() for p in model.parameters()]
    _, history = run(model, **STOPPING)
    assert len(set(history.epochs)) > 1 and min(hooked) < MEMBERS
    assert_same(model, run(**STOPPING)[0])
    assert kept.requires_grad
    sum(copy.sum() for copy in copies).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_an_unknown_category_that_weighs_nothing_with_a_loss_of_ones_own() -> None:
    categorical, x, y = tabular()
    categorical = categorical.clone()
    categorical[3] = 999
    x = x.clone()
    x[3] = torch.nan
    weight = torch.ones(N)
    weight[3] = 0
    own: dict[str, Any] = {"loss": lambda o, y: (o - y).square().mean(-1)}
    for options in (own, {"penalty": lambda o: 0 * o.sum((1, 2))}, {}):
        model, _ = run(tables(False), (categorical, x, y), sample_weight=weight, **options)
        assert all(p.isfinite().all() for p in model.parameters())


def test_numbers_of_another_byte_order() -> None:
    x, y = (t.numpy() for t in rows())
    swapped = [t.astype(t.dtype.newbyteorder(">")) for t in (x, y)]
    assert_same(run(data=tuple(swapped))[0], run()[0])


# --- what is shown -----------------------------------------------------------------------------------------


def test_a_line_for_each_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    fit(
        mlp(), rows(), loss="mse", epochs=3, batch_size=32, optimizer=adam, progress="lines", metrics=["rmse"]
    )
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1", "epoch 2", "epoch 3"]
    assert all("train" in line and "validation" in line and "rmse" in line for line in lines)


# --- a trainer ---------------------------------------------------------------------------------------------


def test_fit_is_a_trainer() -> None:
    model = mlp()
    trainer = Trainer(model, loss="mse", optimizer=adam, seed=3)
    history = trainer.fit(rows(), epochs=6, batch_size=32, progress=False)
    assert trainer.history is history
    assert_same(model, run()[0])
    # Once more: a new optimizer, from the weights that are there.
    trainer.fit(rows(), epochs=1, batch_size=32, progress=False)
    assert_same(model, run(run()[0], epochs=1)[0])


def test_steps_of_ones_own() -> None:
    x, y = rows()
    schedule = {"scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9), "schedule": "step"}
    model, alone = mlp(), mlp()
    trainer = Trainer(model.eval(), loss="mse", optimizer=adam, clip_norm=0.1, **schedule)  # type: ignore[arg-type]
    whole = run(
        alone,
        optimizer=adam,
        clip_norm=0.1,
        batch_size=N,
        epochs=5,
        validation=0,
        randomness=None,
        **schedule,
    )[1]
    losses = torch.stack([trainer.step(x, y) for _ in range(5)])
    assert losses.shape == (5, MEMBERS) and not losses.requires_grad and not model.training
    np.testing.assert_allclose(losses, whole.train_loss, rtol=1e-4)
    assert_close(model, alone)
    assert trainer.learning_rate == pytest.approx(1e-2 * 0.9**5)
    with pytest.raises(ValueError, match=r"Trainer.step: batch: expected what EnsembleMLP.loss takes"):
        trainer.step(x)


def test_steps_with_dropout_and_weights_are_reproducible() -> None:
    x, y = rows()
    seeds = member_seeds(0, 9)

    def go(members: list[int]) -> EnsembleMLP:
        own = [seeds[m] for m in members]
        model = EnsembleMLP(len(members), 4, [6], 1, dropout=0.5, seeds=own)
        trainer = Trainer(model, loss="mse", optimizer=adam, seeds=own, micro_batch_size=50)
        for _ in range(3):
            trainer.step(x, y, sample_weight=torch.arange(N) % 3 * 1.0)
        return model

    assert_same(go([4, 7, 2]).select([1]), go([7]))


def test_no_warning_is_lost_in_our_own_files() -> None:
    x, y = rows()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(data=(x.double(), y.double()))
    assert [w.filename for w in said if "float64, cast" in str(w.message)] == [__file__]
