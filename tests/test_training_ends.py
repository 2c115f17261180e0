"""What `fit` is given at the ends of its ranges and by mistake, and that it is interrupted anywhere."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyens import EnsembleMLP
from pyens.nn import Ensemble, MaskedMLP, TabularEnsemble
from pyens.optim import MemberLearningRates, MemberWeightDecay, fused
from pyens.training import Callback, Progress, Randomness, Trainer, fit, member_seeds, oof_predictions
from pyens.training.randomness import split_rows

N = 100
SOURCES = Randomness(init=True, shuffle=True)


def rows(n: int = N, outputs: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=draw)
    return x, x[:, :outputs].sin() + 0.3 * torch.randn(n, outputs, generator=draw)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def mlp(members: int = 3, **options: Any) -> EnsembleMLP:
    return EnsembleMLP(members, 6, [8], 1, seeds=range(members), **options)


def run(model: Any = None, data: Any = None, **options: Any) -> Any:
    model = mlp() if model is None else model
    arguments: dict[str, Any] = {"loss": "mse", "epochs": 3, "batch_size": 32, "optimizer": adam}
    history = fit(model, rows() if data is None else data, progress=False, **(arguments | options))
    return model, history


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# --- models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 6])
def test_clipping_of_shared_parameters_is_of_all_together(outputs: int) -> None:
    model = MaskedMLP(4, 6, [6], outputs, scale=1.5, seed=0)
    before = parameters(model)
    options: dict[str, Any] = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0), "validation": 0}
    run(model, rows(outputs=outputs), clip_norm=1e-3, epochs=1, batch_size=N, **options)
    moved = torch.cat([(p - q).flatten() for p, q in zip(parameters(model), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)


def test_shared_parameters_have_seen_what_any_member_has() -> None:
    with pytest.raises(ValueError, match="fit: randomness: expected neither R nor J for members that share"):
        run(MaskedMLP(4, 6, [6], 1, scale=1.5), randomness=Randomness(jackknife=True))
    model, history = run(MaskedMLP(4, 6, [6], 1, scale=1.5), bootstrap="multinomial", validation=0.2)
    seen = ~history.unseen
    assert (seen == seen[0]).all() and 0.8 * N * (1 - 0.37**4) - 6 < seen[0].sum() <= 0.8 * N
    assert oof_predictions(model(rows()[0]).detach(), history).isnan().any()


class Scaled(Ensemble):
    """Of components, with a parameter [E] of its own."""

    def __init__(self, members: int) -> None:
        super().__init__()
        self.ensemble_size = members
        self.mlp = EnsembleMLP(members, 6, [8], 1)
        self.scale = nn.Parameter(torch.ones(members))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.mlp(x) * self.scale[:, None, None]
        return output

    def draw(self, member: int, generator: torch.Generator | None) -> None:
        self.mlp.draw(member, generator)
        self.scale[member] = 1


def test_a_number_for_each_member_is_a_parameter() -> None:
    model, history = run(Scaled(3), early_stopping=1, validation=0.3, epochs=20)
    assert np.isfinite(history.train_loss[0]).all() and (model.scale != 1).all()


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(
        ValueError, match="fit: model: expected parameters to train, got a EnsembleMLP all fro"
    ):
        run(mlp().requires_grad_(False))


def test_gradients_are_computed_whatever_the_mode() -> None:
    with torch.no_grad():
        model, _ = run()
        assert not torch.is_grad_enabled()
    assert same(parameters(model), parameters(run()[0]))


def test_each_part_of_a_model_keeps_its_mode() -> None:
    model = Scaled(3)
    model.mlp.eval()
    run(model)
    assert model.training and not model.mlp.training


def test_a_trainer_is_for_the_members_that_it_was_made_for() -> None:
    model = mlp(4)
    trainer = Trainer(model, loss="mse", optimizer=adam)
    model.select_([2, 3])
    with pytest.raises(ValueError, match="expected the 4 members that this Trainer was made for, got 2"):
        trainer.fit(rows(), epochs=1, batch_size=32, progress=False)


# --- bits -------------------------------------------------------------------------------------------------


def test_sums_of_long_batches_do_not_depend_on_threads_or_neighbours() -> None:
    n = 70_001
    data = rows(n)
    threads = torch.get_num_threads()
    seeds = member_seeds(0, 2)

    def go(members: list[int], number: int, weight: Any, **options: Any) -> list[Tensor]:
        torch.set_num_threads(number)
        model = Scaled(len(members))
        own = {"seeds": [seeds[m] for m in members], "randomness": Randomness(init=True)}
        _, history = run(model, data, batch_size=n, sample_weight=weight, validation=0, **own, **options)
        return [*parameters(model), torch.from_numpy(history.train_loss)]

    try:
        for seed in range(3):
            weight = torch.rand(2, n, generator=torch.Generator().manual_seed(seed))
            assert same(go([0, 1], 1, weight[0]), go([0, 1], 2, weight[0]))
            alone, beside = go([0], 2, weight[:1]), go([0, 1], 2, weight)
            assert same(alone[:-1], [p[:1] for p in beside[:-1]])
        own = {"loss": lambda o, y: (o - y).square().mean(-1)}
        assert same(go([0], 1, None, **own), go([0], 2, None, **own))
        halves = {"micro_batch_size": 40_000}
        assert same(go([0], 1, weight[0], **halves), go([0], 2, weight[0], **halves))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("scale", [1e38, 1e39, 1e308, 1e-50, 1e-44, 2.0**-1074])
def test_weights_of_any_scale(scale: float) -> None:
    plain, expected = run(sample_weight=torch.ones(N), bootstrap="multinomial", validation=0.2)
    weight = torch.full((N,), scale, dtype=torch.float64)
    model, history = run(sample_weight=weight, bootstrap="multinomial", validation=0.2)
    for p, q in zip(parameters(model), parameters(plain), strict=True):
        torch.testing.assert_close(p, q)
    np.testing.assert_allclose(history.validation_loss, expected.validation_loss, rtol=1e-5)


def test_a_penalty_counts_by_rows_beside_weights() -> None:
    weight = torch.zeros(N)
    weight[:10] = 1
    options: dict[str, Any] = {"epochs": 1, "batch_size": N, "validation": 0, "sample_weight": weight}
    options |= {
        "penalty": lambda o: o.square().mean((1, 2)),
        "optimizer": lambda p: torch.optim.SGD(p, lr=1.0),
    }
    whole, _ = run(**options)
    parts, _ = run(micro_batch_size=20, **options)
    for p, q in zip(parameters(whole), parameters(parts), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_own_batches_in_parts() -> None:
    x, y = (torch.stack([t + m for m in range(3)]) for t in rows())
    models = mlp(), mlp()
    for model, options in zip(models, ({}, {"micro_batch_size": 2}), strict=True):
        Trainer(model, loss="mse", optimizer=adam, **options).step(x, y, own_data=True)  # type: ignore[arg-type]
    for p, q in zip(*map(parameters, models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


# --- optimizers -------------------------------------------------------------------------------------------


def table(sparse: bool) -> TabularEnsemble:
    return TabularEnsemble(3, [(5, 2)], 0, [8], 1, sparse=sparse)


CATEGORIES = (torch.arange(N).unsqueeze(1) % 5, None, rows()[1])


@pytest.mark.parametrize(
    ("sparse", "optimizer", "message"),
    [
        (False, torch.optim.LBFGS, "expected one that looks at each number alone, got LBFGS"),
        (False, torch.optim.Adafactor, "expected one that looks at each number alone, got Adafactor"),
        (False, torch.optim.SparseAdam, "expected SparseAdam for sparse tables alone"),
        (True, torch.optim.Adam, "expected SGD, Adagrad or SparseAdam for sparse tables, got Adam"),
        (True, lambda p: fused(torch.optim.SGD, p), "expected SGD, Adagrad or SparseAdam .* got SGD"),
        (False, lambda p: torch.optim.Adam(mlp().parameters()), "expected one of the model's parameters"),
        (False, lambda p: [adam(q := list(p)), adam(q)], "expected each parameter in one, got it again"),
    ],
)
def test_optimizers_that_cannot_be_are_refused(sparse: bool, optimizer: Any, message: str) -> None:
    model = table(sparse)
    before = parameters(model)
    with pytest.raises(ValueError, match=f"^fit: optimizer: {message}"):
        run(model, CATEGORIES, optimizer=optimizer, randomness=SOURCES)
    assert same(parameters(model), before)


def test_momentum_of_sparse_tables_when_members_leave() -> None:
    def stop(progress: Progress) -> None:
        progress.stop([0])

    def go(members: list[int], **options: Any) -> Any:
        model = TabularEnsemble(len(members), [(5, 2)], 0, [8], 1, sparse=True, seeds=members)
        sgd = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)}
        return run(model, CATEGORIES, seeds=members, **sgd, **options)

    together, history = go([0, 1, 2], callbacks=[stop])
    assert history.epochs.tolist() == [1, 3, 3]
    assert same(parameters(together.select([2])), parameters(go([2])[0]))


def test_numbers_of_members_that_are_assigned_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    class Halve(Callback):
        own: Any

        def on_epoch_end(self, progress: Progress) -> None:
            name = "factors" if isinstance(self.own, MemberLearningRates) else "decays"
            setattr(self.own, name, getattr(self.own, name) / 2)

    def go(kind: Any, epochs: int, path: Path | None) -> tuple[list[Tensor], list[float]]:
        halve = Halve()

        def optimizer(p: Any) -> Any:
            made = torch.optim.SGD(p, lr=0.1)
            halve.own = kind(made, [1.0, 0.5, 0.2])
            return made

        model, _ = run(optimizer=optimizer, callbacks=[halve], epochs=epochs, checkpoint=path)
        numbers: Tensor = getattr(halve.own, "factors" if kind is MemberLearningRates else "decays")
        return parameters(model), numbers.tolist()

    for kind in (MemberLearningRates, MemberWeightDecay):
        whole, expected = go(kind, 4, None)
        path = tmp_path / f"{kind.__name__}.pt"
        go(kind, 2, path)
        resumed, numbers = go(kind, 4, path)
        assert same(resumed, whole) and numbers == expected


def test_a_step_that_is_left_out_decays_nothing() -> None:
    for make in (torch.optim.SGD, lambda p, lr: fused(torch.optim.SGD, p, lr=lr)):
        model = mlp()
        before = parameters(model)

        def optimizer(p: Any, make: Any = make) -> Any:
            made = make(p, lr=0.1)
            MemberWeightDecay(made, [1.0, 2.0, 3.0])
            return made

        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        Trainer(model, loss="mse", optimizer=optimizer, scaler=scaler).step(rows()[0], 1e3 * rows()[1])
        assert same(parameters(model), before)


def test_a_refused_fit_leaves_the_optimizer_of_steps() -> None:
    trainer = Trainer(mlp(), loss="mse", optimizer=adam)
    trainer.step(*rows())
    (optimizer,) = trainer.optimizers
    with pytest.raises(TypeError, match="metrics"):
        trainer.fit(rows(), epochs=1, batch_size=32, metrics={"a": lambda o, y: "x"}, progress=False)
    assert trainer.optimizers == [optimizer] and len(optimizer.state) == 4


# --- interruptions ----------------------------------------------------------------------------------------


def test_an_interruption_at_any_line_leaves_weights_of_one_epoch() -> None:
    """A stop at each line that keeps weights, begins, and ends an epoch."""
    after = [parameters(mlp())]
    for epochs in (1, 2):
        after.append(parameters(run(epochs=epochs, validation=0)[0]))
    places = "_keep", "end_epoch", "start", "reset_parameters", "_leave"
    stopped = 0
    for line in range(1, 400, 3):
        count = 0

        def trace(frame: Any, event: str, _: Any, line: int = line) -> Any:
            nonlocal count
            if frame.f_code.co_name in places and "pyens" in frame.f_code.co_filename:
                count += event == "line"
                if count == line:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        model = mlp()
        try:
            sys.settrace(trace)
            run(model, epochs=2, validation=0)
        except KeyboardInterrupt:
            stopped += 1
        finally:
            sys.settrace(None)
        assert any(same(parameters(model), known) for known in after)
        assert model.ensemble_size == 3
        if count < line:
            break
    assert stopped > 10


def test_an_interruption_while_weights_are_drawn_leaves_those_that_were() -> None:
    class Slow(EnsembleMLP):
        armed = False

        def draw(self, member: int, generator: torch.Generator | None) -> None:
            if self.armed and member == 2:
                raise KeyboardInterrupt
            super().draw(member, generator)

    model = Slow(4, 6, [8], 1)
    before = parameters(model)
    model.armed = True
    with pytest.raises(KeyboardInterrupt):
        run(model, randomness=SOURCES)
    assert same(parameters(model), before)


def test_the_same_cell_again_goes_on(tmp_path: Path) -> None:
    """Interrupted between two checkpoints, without randomness: the model is further than the file."""
    path = tmp_path / "run.pt"

    def interrupt(progress: Progress) -> None:
        if progress.epoch == 4:
            raise KeyboardInterrupt

    model = mlp()
    options: dict[str, Any] = {"epochs": 8, "checkpoint": path, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        run(model, callbacks=[interrupt], **options)
    run(model, **options)
    assert same(parameters(model), parameters(run(epochs=8)[0]))
    with pytest.raises(ValueError, match="other initial parameters"):
        run(EnsembleMLP(3, 6, [8], 1), **options)


def test_a_loss_that_a_callback_keeps_does_no_harm() -> None:
    kept: list[Tensor] = []

    def look(progress: Progress) -> None:
        if progress.epoch == 0:
            progress.stop([0])
        else:
            kept.append(progress.model.loss(*rows(), loss="mse"))

    model, _ = run(callbacks=[look])
    model.loss(*rows(), loss="mse").sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_end_may_be_looked_at() -> None:
    seen: list[float] = []

    class Last(Callback):
        def on_fit_end(self, progress: Progress) -> None:
            seen.append(progress.learning_rate + len(progress.optimizers))

    run(callbacks=[Last()])
    assert seen == [1.01]


# --- checkpoints ------------------------------------------------------------------------------------------


def test_numpys_numbers_are_saved_as_pythons(tmp_path: Path) -> None:
    class Best(Callback):
        best: Any = np.inf

        def on_epoch_end(self, progress: Progress) -> None:
            self.best = min(self.best, progress.validation_loss.min())

        def state_dict(self) -> dict[str, Any]:
            return {"best": self.best}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.best = state["best"]

    options: dict[str, Any] = {
        "optimizer": lambda p: torch.optim.Adam(p, lr=np.logspace(-3, -1, 3)[1]),
        "seed": np.int64(3),
        "clip_norm": np.float64(1.0),
        "min_delta": np.float32(0.0),
        "batch_size": np.int64(32),
        "validation": np.float32(0.25),
        "checkpoint": tmp_path / "run.pt",
        "scheduler": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 2]),
    }
    run(callbacks=[Best()], **options, epochs=2)
    resumed, _ = run(callbacks=[Best()], **options, epochs=np.int64(4))
    del options["checkpoint"]
    assert same(parameters(resumed), parameters(run(**options, epochs=4)[0]))


def test_what_could_not_be_read_again_is_refused_at_once(tmp_path: Path) -> None:
    class Odd(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"model": nn.Linear(1, 1)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    model = mlp()
    before = parameters(model)
    with pytest.raises(TypeError, match=r"fit: callbacks\[0\]\['model'\]: expected tensors, .* got a Linear"):
        run(model, callbacks=[Odd()], checkpoint=tmp_path / "run.pt")
    assert same(parameters(model), before)


@pytest.mark.parametrize(
    ("first", "then", "name"),
    [
        ({"scheduler": 0.1}, {"scheduler": 0.5}, "scheduler"),
        ({"scaler": 8.0}, {"scaler": 16.0}, "scaler"),
        ({}, {"frozen": True}, "frozen"),
    ],
)
def test_another_run_is_not_gone_on_with(first: Any, then: Any, name: str, tmp_path: Path) -> None:
    def go(given: dict[str, Any], epochs: int) -> None:
        given, model = dict(given), mlp()
        if given.pop("frozen", False):
            next(model.parameters()).requires_grad_(False)
        if "scheduler" in given:
            gamma = given["scheduler"]
            given["scheduler"] = lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma)
        if "scaler" in given:
            given["scaler"] = torch.amp.GradScaler("cpu", init_scale=given["scaler"])
        run(model, checkpoint=tmp_path / "run.pt", epochs=epochs, **given)

    go(first, 2)
    with pytest.raises(ValueError, match=f"is of another run: expected {name}"):
        go(then, 4)
    go(first, 4)


# --- arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seeds": [0.1, 0.2, 0.3]}, TypeError, "fit: seeds: expected integers"),
        ({"seeds": 5}, TypeError, "fit: seeds: expected integers, got 5"),
        ({"seed": 0.5}, TypeError, "fit: seed: expected integers"),
        ({"seed": None}, TypeError, "fit: seed: expected integers"),
        (
            {"randomness": Randomness(jackknife=True), "left_out": "012"},
            TypeError,
            "fit: left_out: expected int",
        ),
        ({"randomness": "R7"}, TypeError, "fit: randomness: expected a Randomness, got a str"),
        ({"epochs": True}, ValueError, "fit: epochs: expected a positive integer, got True"),
        ({"validation": 0.1, "early_stopping": True}, ValueError, "fit: early_stopping: expected a positive"),
        ({"swa_start": True}, ValueError, "fit: swa_start: expected an integer from 0"),
        ({"swa_start": 3}, ValueError, "fit: swa_start: expected below the 3 epochs, got 3"),
        ({"clip_norm": "1"}, TypeError, "fit: clip_norm: expected "),
        ({"ema": "1"}, TypeError, "fit: ema: expected "),
        ({"min_delta": "1"}, TypeError, "fit: min_delta: expected "),
        (
            {"optimizer": torch.optim.Adam(mlp().parameters())},
            TypeError,
            "fit: optimizer: expected a function",
        ),
        ({"scheduler": 3}, TypeError, "fit: scheduler: expected a function, got a int"),
        ({"callbacks": print}, TypeError, "fit: callbacks: expected a list of them, got a builtin"),
        ({"callbacks": [Callback]}, TypeError, r"fit: callbacks\[0\]: expected a Callback or a function"),
        ({"metrics": [["rmse"]]}, TypeError, "fit: metrics: expected names, got a list"),
        (
            {"metrics": {"epoch": lambda o, y: 0}},
            ValueError,
            "fit: metrics: expected another name than epoch",
        ),
        ({"metrics": {"a": lambda o, y: "x"}}, TypeError, r"fit: metrics\['a'\]: expected one number"),
        (
            {"loss": lambda o, y: o.mean((1, 2)), "sample_weight": torch.ones(N)},
            ValueError,
            "fit: loss: expected",
        ),
        ({"sample_weight": torch.ones(N) * 1j}, TypeError, "fit: sample_weight: expected real numbers"),
        (
            {"sample_weight": torch.ones(N).to_sparse()},
            TypeError,
            "fit: sample_weight: expected a dense tensor",
        ),
        ({"groups": np.array([None] * N)}, TypeError, "fit: groups: expected numbers or strings"),
        (
            {"validation": (np.arange(N) > 80).astype(int)},
            ValueError,
            "a mask of bools, got 100 numbers 0 and 1",
        ),
        (
            {"scheduler": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=2)},
            ValueError,
            "fit: scheduler: expected one for 3 steps, got a OneCycleLR for 2",
        ),
    ],
)
def test_mistakes_are_refused_before_anything_changes(change: Any, error: Any, message: str) -> None:
    model = mlp()
    before = parameters(model)
    with pytest.raises(error, match=message):
        run(model, **({"randomness": SOURCES} | change))
    assert same(parameters(model), before)


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path, ""):
        with pytest.raises(ValueError, match="fit: checkpoint: expected a file, got the folder"):
            run(checkpoint=path)


def test_callbacks_stop_by_a_mask() -> None:
    _, history = run(callbacks=[lambda p: p.stop(np.array([False, True, False]))])
    assert history.epochs.tolist() == [3, 1, 3]
    for bad in ([True], [0.5]):
        with pytest.raises(
            TypeError, match=r"Progress\.stop: members: expected integers, or a bool for each of 3"
        ):
            run(callbacks=[lambda p, bad=bad: p.stop(bad)])


def test_own_rows_that_weigh_nothing_may_hold_anything() -> None:
    x, y = (torch.stack([t] * 3) for t in rows())
    weight = torch.ones(3, N)
    weight[1, 7] = 0
    x[1, 7], y[1, 7] = torch.nan, torch.inf
    model, _ = run(data=(x, y), own_data=True, sample_weight=weight)
    assert all(p.isfinite().all() for p in parameters(model))
    with pytest.raises(
        ValueError, match=r"fit: data\[0\]: expected finite numbers, got nan in member 1, row 7"
    ):
        run(data=(x, y), own_data=True)
    categories = torch.zeros(3, N, 1, dtype=torch.int64)
    categories[2, 9] = 99
    with pytest.raises(ValueError, match=r"expected categories from 0 to 4 in column 0, got 99 in row 9"):
        run(table(False), (categories, None, y.nan_to_num(0, 0, 0)), own_data=True, sample_weight=weight)


def test_unsigned_numbers_are_classes() -> None:
    x, y = rows()
    labels = (y[:, 0] > 0).to(torch.uint8)
    expected = run(EnsembleMLP(2, 6, [8], 2, seeds=[1, 2]), (x, labels.long()), loss="cross_entropy")[0]
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        model = EnsembleMLP(2, 6, [8], 2, seeds=[1, 2])
        run(model, (x, labels.to(dtype)), loss="cross_entropy")
        assert same(parameters(model), parameters(expected))


def test_validation_by_a_list_and_groups_of_a_column() -> None:
    class Column:
        def to_numpy(self) -> Any:
            return np.arange(N) // 10

    assert (run(validation=[3, 5])[1].row_group == -1).nonzero()[0].tolist() == [3, 5]
    row_group = run(groups=Column(), validation=0.2)[1].row_group
    assert (row_group.reshape(10, 10) == row_group[::10, None]).all() and (row_group == -1).sum() == 20


def test_one_huge_group_is_trained_on() -> None:
    groups = torch.cat([torch.zeros(900, dtype=torch.int64), torch.arange(1, 101)])
    for seed in range(20):
        assert len(split_rows(1000, 0.05, seed, groups)[1]) == 50
    assert len(split_rows(1000, 0.05, 0, groups.clamp_max(1))[1]) == 100  # the smaller of two


def test_a_metric_that_is_never_a_number_is_said() -> None:
    with pytest.warns(UserWarning, match=r"members \[0, 1, 2\] stop with the weights that they began with"):
        run(metrics={"a": lambda o, y: float("nan")}, monitor="a", mode="min", early_stopping=1)


def test_out_of_fold_predictions_are_real() -> None:
    _, history = run()
    with pytest.raises(TypeError, match="oof_predictions: outputs: expected floating point numbers"):
        oof_predictions(torch.zeros(3, N, dtype=torch.int64), history)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_learning_rates_of_members_are_numbers_from_0(bad: float) -> None:
    with pytest.raises(ValueError, match="MemberLearningRates: factors: expected numbers from 0"):
        MemberLearningRates(adam(mlp().parameters()), [1.0, bad, 1.0])
