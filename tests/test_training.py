"""`pyens.training.fit`: what makes members differ, when they stop, and that none depends on another."""

import csv
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyens import EnsembleLinear, EnsembleMLP
from pyens.nn import TabularEnsemble
from pyens.optim import fused
from pyens.reference import keyed_permutation
from pyens.training import History, Randomness, derive_seed, fit, member_seeds
from pyens.training.randomness import CODES, partition, split_rows

N = 203  # rows: no multiple of anything below
OPTIMIZERS = {
    "fused adam": lambda p: fused(torch.optim.Adam, p, lr=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, fused=False),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=False),
}


def table(rows: int = N, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    categorical = torch.stack([torch.randint(k, (rows,), generator=draw) for k in (7, 3)], 1)
    numeric = torch.randn(rows, 4, generator=draw)
    target = numeric[:, :1].sin() + categorical[:, :1] / 7 + 0.3 * torch.randn(rows, 1, generator=draw)
    return categorical, numeric, target


def ensemble(members: int, dropout: float = 0.0) -> TabularEnsemble:
    return TabularEnsemble(members, [(7, 3), (3, 2)], 4, [6, 5], 1, dropout=dropout, activation="silu")


def trained(
    code: str | None, members: Sequence[int] = range(5), *, dropout: float = 0.0, **options: Any
) -> tuple[list[Tensor], History]:
    """The parameters of some of many members, and the history of their training."""
    model = ensemble(len(members), dropout)
    seeds = member_seeds(3, 100)
    arguments: dict[str, Any] = {
        "loss": "mse",
        "epochs": 4,
        "batch_size": 32,
        "optimizer": OPTIMIZERS["fused adam"],
        "randomness": None if code is None else Randomness.from_code(code),
        "seed": 3,
        "seeds": [seeds[m] for m in members],
        "progress": False,
    }
    if code is not None and Randomness.from_code(code).jackknife:
        arguments |= {"jackknife_groups": 10, "left_out": [m % 10 for m in members]}
    history = fit(model, table(), **(arguments | options))
    return [p.detach() for p in model.parameters()], history


def test_the_codes_are_the_documents() -> None:
    letters = ["none", "R", "S", "R+S", "J", "R+J", "S+J", "R+S+J"]
    for code, sources in zip(CODES, letters, strict=True):
        randomness = Randomness.from_code(code)
        assert randomness.init == ("R" in sources)
        assert randomness.shuffle == ("S" in sources)
        assert randomness.jackknife == ("J" in sources)
        assert randomness.code == code
    with pytest.raises(ValueError, match=r"from_code: code: expected one of R0, .*, R7, got 'R8'"):
        Randomness.from_code("R8")


def test_without_randomness_all_members_are_equal() -> None:
    parameters, history = trained("R0")
    for parameter in parameters:
        assert torch.equal(parameter, parameter[:1].expand_as(parameter))
    assert (history.train_loss == history.train_loss[:, :1]).all()
    assert (history.validation_loss == history.validation_loss[:, :1]).all()


@pytest.mark.parametrize("code", CODES[1:])
def test_with_randomness_all_members_differ(code: str) -> None:
    parameters, _ = trained(code)
    for i in range(5):
        for j in range(i):
            assert any(not torch.equal(p[i], p[j]) for p in parameters)


@pytest.mark.parametrize("code", CODES[1:])
@pytest.mark.parametrize("early_stopping", [None, 1])
def test_a_member_does_not_depend_on_those_beside_it(code: str, early_stopping: int | None) -> None:
    options = {"early_stopping": early_stopping, "epochs": 6, "dropout": 0.2}
    many = list(range(23))
    all_parameters, all_history = trained(code, many, **options)
    for few in ([4, 11, 17], [22]):
        parameters, history = trained(code, few, **options)
        for one, other in zip(parameters, all_parameters, strict=True):
            assert torch.equal(one, other[few])
        epochs = len(history.validation_loss)
        np.testing.assert_array_equal(history.validation_loss, all_history.validation_loss[:epochs, few])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_remembers_goes_on_when_others_stop(name: str) -> None:
    options = {"early_stopping": 1, "epochs": 8, "optimizer": OPTIMIZERS[name]}
    together, history = trained("R3", list(range(12)), **options)
    assert len(set(history.epochs)) > 1  # some stopped while others went on
    for m in range(12):
        alone, _ = trained("R3", [m], **options)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one[0], other[m])


def test_the_same_bits_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    first, _ = trained("R7")
    try:
        torch.set_num_threads(1)
        second, _ = trained("R7")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("code", ["R1", "R3", "R5", "R7"])
def test_it_is_what_a_loop_over_models_does(code: str) -> None:
    """Member by member with torch alone, in float64, from the same definitions."""
    members, epochs, batch_size, seed = 3, 2, 32, 3
    x = torch.randn(N, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = x.prod(1, keepdim=True)
    model = EnsembleMLP(members, 4, [6], 1, activation="tanh", dtype=torch.float64)
    seeds = [11, 12, 13]
    randomness = Randomness.from_code(code)
    fit(
        model,
        (x, y),
        loss="mse",
        epochs=epochs,
        batch_size=batch_size,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        randomness=randomness,
        seed=seed,
        seeds=seeds,
        progress=False,
    )
    common, validation = split_rows(N, 0.05, seed)
    assert sorted([*common.tolist(), *validation.tolist()]) == list(range(N))
    group = partition(common, N, members, seed)
    for m in range(members):
        torch.manual_seed(seeds[m])
        alone = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
        for epoch in range(epochs):
            order = common.long()
            if randomness.shuffle:
                key = torch.tensor([derive_seed(seeds[m], "order", epoch)])
                order = order[keyed_permutation(key, len(order), 0, len(order))[0]]
            for rows in order.split(batch_size):
                if randomness.jackknife:
                    rows = rows[group[rows] != m]
                optimizer.zero_grad()
                nn.functional.mse_loss(alone(x[rows]), y[rows]).backward()
                optimizer.step()
        for one, other in zip(alone.parameters(), model.member(m).parameters(), strict=True):
            torch.testing.assert_close(one, other)


def test_groups_are_disjoint_complete_and_equal_and_outside_the_validation_rows() -> None:
    for rows, groups in ((203, 100), (203, 7), (50, 47), (9, 2)):
        training, validation = split_rows(rows, 0.05, seed=1)
        group = partition(training, rows, groups, seed=1)
        assert (group[validation] == -1).all()
        assert (group[training.long()] >= 0).all()
        sizes = torch.bincount(group[training.long()].long(), minlength=groups)
        assert len(sizes) == groups
        assert sizes.max() - sizes.min() <= 1
        assert len(validation) == max(1, round(0.05 * rows))
    assert not torch.equal(split_rows(203, 0.05, 1)[1], split_rows(203, 0.05, 2)[1])


def test_left_out_rows_do_not_reach_a_member_whatever_is_in_them() -> None:
    categorical, numeric, target = table()
    training, _ = split_rows(N, 0.05, seed=3)
    group = partition(training, N, 5, seed=3)
    poisoned = target.clone()
    poisoned[group == 2] = torch.nan
    results = []
    for y in (target, poisoned):
        model = ensemble(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # member 1 diverges
            fit(
                model,
                (categorical, numeric, y),
                loss="mse",
                epochs=2,
                batch_size=16,
                check=False,
                optimizer=OPTIMIZERS["fused adam"],
                randomness=Randomness.from_code("R5"),
                seed=3,
                jackknife_groups=5,
                left_out=[2, 0],
                progress=False,
            )
        results.append([p.detach() for p in model.parameters()])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean[0], poisoned[0])
        assert not torch.equal(clean[1], poisoned[1])


def test_a_diverged_member_is_frozen_and_reported_and_the_others_do_not_change() -> None:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    data = (x, x.sum(1, keepdim=True))

    def train(broken: bool) -> tuple[EnsembleMLP, History]:
        model = EnsembleMLP(3, 3, [8], 1, seeds=[0, 1, 2])
        if broken:
            with torch.no_grad():
                model.weights[0][1] = 1e30
        history = fit(
            model,
            data,
            loss="mse",
            epochs=3,
            batch_size=16,
            optimizer=OPTIMIZERS["fused adam"],
            progress=False,
        )
        return model, history

    clean, _ = train(broken=False)
    with pytest.warns(UserWarning, match=r"fit: members \[1\] diverged in epoch 0"):
        model, history = train(broken=True)
    assert history.status == ("finished", "diverged", "finished")
    assert history.diverged.tolist() == [False, True, False]
    assert history.best_epoch.tolist() == [2, -1, 2]
    for one, other in zip(clean.parameters(), model.parameters(), strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
    assert (model.weights[0][1] == 1e30).all()  # the last good weights are the first ones


def test_early_stopping_keeps_the_best_weights_of_each_member() -> None:
    data, validation = table(), table(60, seed=9)
    model = ensemble(8)
    history = fit(
        model,
        data,
        loss="mse",
        epochs=40,
        batch_size=16,
        optimizer=lambda p: fused(torch.optim.Adam, p, lr=3e-2),
        randomness=Randomness.from_code("R3"),
        validation=validation,
        early_stopping=2,
        progress=False,
    )
    with torch.no_grad():
        losses = model.loss(*validation, loss="mse").double().numpy()
    best = np.nanmin(history.validation_loss, 0)
    np.testing.assert_allclose(losses, best, rtol=1e-5)
    np.testing.assert_array_equal(np.nanargmin(history.validation_loss, 0), history.best_epoch)
    assert "stopped" in history.status
    for m, status in enumerate(history.status):
        assert status in ("stopped", "finished")
        if status == "stopped":
            assert history.epochs[m] == history.best_epoch[m] + 3  # the best one, and two without success


def test_without_early_stopping_the_last_weights_stay_and_validation_is_reported() -> None:
    _, history = trained("R1", epochs=3)
    assert history.train_loss.shape == history.validation_loss.shape == (3, 5)
    assert np.isfinite(history.validation_loss).all()
    assert history.best_epoch.tolist() == [2] * 5
    assert history.status == ("finished",) * 5
    _, history = trained("R1", epochs=3, validation=0)
    assert np.isnan(history.validation_loss).all()


def test_the_validation_loss_is_that_of_the_rows_held_out() -> None:
    model = ensemble(4)
    data = table()
    history = fit(
        model,
        data,
        loss="mse",
        epochs=1,
        batch_size=3,
        optimizer=OPTIMIZERS["adam"],
        validation=0.2,
        seed=5,
        progress=False,
    )
    _, held_out = split_rows(N, 0.2, 5)
    categorical, numeric, target = (t[held_out] for t in data)
    with torch.no_grad():
        expected = (model(categorical, numeric) - target).square().mean((1, 2))
    np.testing.assert_allclose(history.validation_loss[0], expected.double().numpy(), rtol=1e-5)


def test_none_keeps_the_weights_and_shuffles() -> None:
    start = EnsembleLinear(3, 4, 2, seeds=[0, 0, 0])
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    data = (x, x[:, :2].abs())
    optimizer = {"lr": 0.0}
    fit(
        start,
        data,
        loss="mse",
        epochs=1,
        batch_size=10,
        optimizer=lambda p: torch.optim.SGD(p, **optimizer),
        progress=False,
    )
    expected = EnsembleLinear(3, 4, 2, seeds=[0, 0, 0])
    for one, other in zip(start.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    optimizer["lr"] = 0.1
    fit(
        start,
        data,
        loss="mse",
        epochs=1,
        batch_size=10,
        optimizer=lambda p: torch.optim.SGD(p, **optimizer),
        progress=False,
    )
    assert not torch.equal(start.weight[0], start.weight[1])  # from the same weights, in other orders


def test_classes_and_temperature() -> None:
    x = torch.randn(120, 2, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    model = EnsembleMLP(4, 2, [16], 3)
    history = fit(
        model,
        (x, labels),
        loss="cross_entropy",
        temperature=0.2,
        epochs=20,
        batch_size=20,
        optimizer=lambda p: fused(torch.optim.Adam, p, lr=1e-2),
        randomness=Randomness.from_code("R3"),
        progress=False,
    )
    assert (history.train_loss[-1] < 0.5 * history.train_loss[0]).all()
    with torch.no_grad():
        assert (model(x).mean(0).argmax(1) == labels).double().mean() > 0.9


def test_the_history_is_shown_in_a_line() -> None:
    nothing = np.zeros((404, 3))
    status = ("stopped", "finished", "stopped")
    none = np.zeros(404)
    history = History(nothing, nothing, np.zeros(3, int), status, none, none, np.zeros(9), -np.ones(3), None)
    assert repr(history) == "History(epochs=404, members=3: 1 finished, 2 stopped)"


def test_the_history_as_csv(tmp_path) -> None:
    _, history = trained("R3", epochs=8, early_stopping=1)
    history.to_csv(tmp_path / "history.csv")
    with open(tmp_path / "history.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == history.epochs.sum()
    for line in lines:
        epoch, member = int(line["epoch"]), int(line["member"])
        assert float(line["train_loss"]) == history.train_loss[epoch, member]
        assert float(line["validation_loss"]) == history.validation_loss[epoch, member]


def test_without_tqdm_there_is_no_bar_and_it_is_said_once(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.warns(UserWarning, match="fit: no bar of its progress without tqdm: pip install") as said:
        for _ in range(2):
            trained("R3", epochs=1, progress=True)
        trained("R3", epochs=1, progress=False)
    assert len(said) == 1 and said[0].filename == __file__


def test_the_bar_shows_mean_and_spread(capsys) -> None:
    trained("R3", epochs=1, progress=True)
    shown = capsys.readouterr().err
    assert "train " in shown and " ± " in shown and "validation " in shown


@pytest.mark.parametrize("code", ["R4", "R7"])
def test_trains_where_the_model_is(device: torch.device, code: str) -> None:
    model = ensemble(4, dropout=0.1).to(device)
    history = fit(
        model,
        tuple(t.to(device) for t in table()),
        loss="mse",
        epochs=8,
        batch_size=16,
        optimizer=OPTIMIZERS["fused adam"],
        randomness=Randomness.from_code(code),
        early_stopping=3,
        progress=False,
    )
    assert (np.nanmin(history.validation_loss, 0) < history.validation_loss[0]).all()
    assert all(p.device.type == device.type for p in model.parameters())


def test_the_mode_of_the_model_is_left_as_it_was() -> None:
    model = ensemble(2, dropout=0.1).eval()
    fit(
        model,
        table(),
        loss="mse",
        epochs=1,
        batch_size=64,
        optimizer=OPTIMIZERS["adam"],
        progress=False,
    )
    assert not model.training


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss": "mae"}, ValueError, r"fit: loss: expected one of .*, got 'mae'"),
        ({"epochs": 0}, ValueError, "fit: epochs: expected a positive integer, got 0"),
        ({"batch_size": 1.5}, ValueError, "fit: batch_size: expected a positive integer, got 1.5"),
        ({"seeds": [1, 2]}, ValueError, "fit: seeds: expected one for each of 3 members, got 2"),
        ({"jackknife_groups": 5}, ValueError, "fit: jackknife_groups: expected None without"),
        ({"left_out": [0, 1, 2]}, ValueError, "fit: left_out: expected None without"),
        (
            {"randomness": Randomness(jackknife=True), "left_out": [0, 1, 3]},
            ValueError,
            "from 0 to 2 for each",
        ),
        ({"randomness": Randomness(jackknife=True), "left_out": [0, 1]}, ValueError, "for each of 3 members"),
        ({"randomness": Randomness(jackknife=True), "jackknife_groups": 1}, ValueError, "at least 2"),
        ({"randomness": Randomness(jackknife=True), "jackknife_groups": N}, ValueError, "training rows"),
        ({"validation": 1.0}, ValueError, r"fit: validation: expected a share in \[0, 1\)"),
        ({"validation": -0.1}, ValueError, r"fit: validation: expected a share in \[0, 1\)"),
        ({"validation": table()[1:]}, ValueError, "fit: validation: expected rows like those of data"),
        ({"validation": 0, "early_stopping": 1}, ValueError, "fit: early_stopping: expected validation rows"),
        ({"early_stopping": 0}, ValueError, "fit: early_stopping: expected a positive integer"),
        ({"checkpoint_every": 0}, ValueError, "fit: checkpoint_every: expected a positive integer"),
        ({"data": table()[:1]}, TypeError, r"fit: data: expected tensors \[N, ...\], inputs and target"),
        (
            {"data": (*table()[:2], table()[2][:-1])},
            ValueError,
            "fit: data: expected the same number of rows",
        ),
        ({"data": tuple(t[:0] for t in table())}, ValueError, "fit: data: .* at least one"),
        (
            {"data": tuple(t[:1] for t in table())},
            ValueError,
            "fit: data: expected rows beside the validation",
        ),
        ({"data": (table()[0], table()[1][:, 1:], table()[2])}, ValueError, "TabularEnsemble: numeric"),
        ({"randomness": Randomness(init=True), "loss": "cross_entropy"}, TypeError, "target"),
        ({"temperature": 7.0}, ValueError, r"fit: temperature: expected 1 .*with loss mse, got 7.0"),
        ({"temperature": 0.0, "loss": "cross_entropy"}, ValueError, "fit: temperature: expected a positive"),
        ({"data": table()[2]}, TypeError, "fit: data: expected a tuple of tensors .*, got a Tensor$"),
        (
            {"data": torch.utils.data.DataLoader([1] * 9)},
            TypeError,
            r"fit: data: expected a tuple of .*, or a pyens.data.RowSource of them, got a DataLoader$",
        ),
        ({"data": [np.zeros(2)] * 1000}, TypeError, r"shapes \[2\], \[2\], \[2\], \[2\] and 996 more"),
        ({"validation": torch.zeros(3)}, TypeError, "fit: validation: expected a share or .* got a Tensor$"),
        (
            {"validation": torch.tensor([0, N])},
            ValueError,
            f"validation: expected rows from 0 to {N - 1}, got 0",
        ),
        ({"validation": torch.tensor([], dtype=torch.int64)}, ValueError, "fit: validation: .* got none"),
        (
            {"validation": np.ones(3, bool)},
            ValueError,
            f"fit: validation: expected a mask of {N} rows, got 3",
        ),
        ({"validation": np.ones(N, bool)}, ValueError, "fit: data: expected rows beside the validation rows"),
        ({"groups": [1, 2]}, ValueError, rf"fit: groups: expected one for each of {N} rows, got shape \[2\]"),
        ({"groups": [np.nan] * N}, ValueError, "fit: groups: expected no NaN"),
        ({"groups": ["one"] * N}, ValueError, "fit: data: expected rows beside .* in all and 1 groups"),
        (
            {"groups": np.arange(N) % 3, "randomness": Randomness(jackknife=True)},
            ValueError,
            "fit: jackknife_groups: expected at most the 2 groups of training rows, got 3",
        ),
        ({"metrics": "rmse"}, TypeError, "fit: metrics: expected a list of names or a dict of functions"),
        ({"metrics": ["accuracy"]}, ValueError, "metrics: expected some of r_squared, rmse with loss mse"),
        ({"metrics": {"mine": 3}}, TypeError, r"fit: metrics\['mine'\]: expected a function, got a int"),
        (
            {"metrics": {"mine": lambda o, y: o}},
            TypeError,
            r"metrics\['mine'\]: expected one number .* shape",
        ),
        ({"metrics": {"mine": lambda o, y: o[99]}}, IndexError, "99"),
        ({"metrics": {"loss": lambda o, y: 0}}, ValueError, "fit: metrics: expected another name than loss"),
        ({"metrics": ["rmse"], "validation": 0}, ValueError, "fit: metrics: expected validation rows"),
        ({"monitor": "rmse"}, ValueError, "fit: monitor: expected loss, got 'rmse'"),
        ({"mode": "up"}, ValueError, "fit: mode: expected 'min' or 'max', got 'up'"),
        ({"mode": "max"}, ValueError, "fit: mode: expected 'min' for loss, got 'max'"),
        (
            {"metrics": {"mine": lambda o, y: 0}, "monitor": "mine"},
            ValueError,
            "fit: mode: expected 'min' or 'max' for mine, got None",
        ),
        ({"min_delta": -1.0}, ValueError, "fit: min_delta: expected a number from 0"),
        ({"callbacks": [None]}, TypeError, r"fit: callbacks\[0\]: expected a Callback or .* got a NoneType"),
        ({"micro_batch_size": 0}, ValueError, "fit: micro_batch_size: expected a positive integer"),
        ({"clip_value": 0.0}, ValueError, "fit: clip_value: expected a positive number"),
        ({"autocast": torch.int8}, ValueError, "fit: autocast: expected torch.bfloat16 or torch.float16"),
        ({"scaler": 3}, TypeError, "fit: scaler: expected a torch.amp.GradScaler, got a int"),
        ({"ema": 1.0}, ValueError, "fit: ema: expected a decay between 0 and 1"),
        ({"swa_start": -1}, ValueError, "fit: swa_start: expected an integer from 0"),
        ({"swa_start": 1, "ema": 0.9}, ValueError, "fit: swa_start: expected None beside ema"),
        ({"optimizer": lambda p: []}, ValueError, "fit: optimizer: expected one at least, got none"),
        ({"optimizer": lambda p: [3]}, TypeError, "fit: optimizer: expected a function .* got a int"),
        ({"progress": "bars"}, ValueError, "fit: progress: expected True, False, 'bar' or 'lines'"),
        ({"data": (np.zeros((N, 2), np.longdouble), *table()[1:])}, TypeError, "fit: data"),
        (
            {"data": (*table()[:2], table()[2].expand(-1, 2))},
            ValueError,
            rf"fit: data: expected rows that TabularEnsemble.loss takes, .* \[{N}, 2\], of whose first row",
        ),
        ({"model": nn.Linear(3, 3)}, TypeError, "fit: model: expected a pyens.nn.Ensemble, got Linear"),
    ],
)
def test_bad_arguments_change_nothing(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model = ensemble(3)
    before = [p.clone() for p in model.parameters()]
    arguments: dict[str, Any] = {
        "model": model,
        "data": table(),
        "loss": "mse",
        "epochs": 1,
        "batch_size": 8,
        "optimizer": OPTIMIZERS["adam"],
        "progress": False,
    }
    with pytest.raises(error, match=message):
        fit(**(arguments | change))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# --- data of one's own --------------------------------------------------------------------------------------


def own_tables(members: Sequence[int]) -> tuple[Tensor, ...]:
    """Tables of different data, member first."""
    return tuple(torch.stack(columns) for columns in zip(*(table(seed=m) for m in members), strict=True))


@pytest.mark.parametrize("code", [None, "R0", "R7"])
def test_with_data_of_its_own_a_member_is_what_it_is_alone(code: str | None) -> None:
    members, options = list(range(7)), {"epochs": 25, "early_stopping": 1, "dropout": 0.2, "own_data": True}
    torch.manual_seed(1)
    model = ensemble(7, 0.2)
    arguments: dict[str, Any] = {
        "loss": "mse",
        "batch_size": 32,
        "optimizer": OPTIMIZERS["fused adam"],
        "randomness": None if code is None else Randomness.from_code(code),
        "seed": 3,
        "progress": False,
    }
    if code == "R7":
        arguments["jackknife_groups"] = 10
    arguments |= {name: value for name, value in options.items() if name != "dropout"}
    begun = [p.detach().clone() for p in model.parameters()]
    seeds = member_seeds(3, 7)
    lefts = {"left_out": members} if code == "R7" else {}
    history = fit(model, own_tables(members), seeds=seeds, **lefts, **arguments)
    assert len(set(history.epochs)) > 1  # some stopped while others went on
    for m in members:
        alone = ensemble(1, 0.2)
        for parameter, start in zip(alone.parameters(), begun, strict=True):
            parameter.data.copy_(start[[m]])
        lefts = {"left_out": [m]} if code == "R7" else {}
        # Once with an axis of members, once as everybody's data.
        for data, own in ((own_tables([m]), True), (table(seed=m), False)):
            same = fit(alone, data, seeds=[seeds[m]], **lefts, **arguments | {"own_data": own})
            for one, other in zip(alone.parameters(), model.parameters(), strict=True):
                assert torch.equal(one[0], other[m])
            part = history.member(m)
            np.testing.assert_array_equal(same.train_loss, part.train_loss)
            np.testing.assert_array_equal(same.validation_loss, part.validation_loss)
            assert same.status == part.status and same.best_epoch == part.best_epoch
            assert len(part.seconds) == history.epochs[m]
            for parameter, start in zip(alone.parameters(), begun, strict=True):
                parameter.data.copy_(start[[m]])


def test_validation_rows_of_its_own() -> None:
    model = ensemble(3)
    own, apart = own_tables([0, 1, 2]), own_tables([5, 6, 7])
    history = fit(
        model,
        own,
        loss="mse",
        epochs=1,
        batch_size=50,
        optimizer=OPTIMIZERS["fused adam"],
        validation=apart,
        own_data=True,
        progress=False,
    )
    losses = model.loss(*apart, loss="mse").detach().numpy()
    np.testing.assert_allclose(history.validation_loss[0], losses, rtol=1e-5)
    for tensors, argument in (
        ((own, [t[:2] for t in apart]), "validation"),
        (([t[0] for t in own], 0.1), "data"),
    ):
        with pytest.raises(ValueError, match=rf"{argument}: expected tensors \[3, N, ...\] under own_data"):
            fit(
                model,
                tensors[0],
                loss="mse",
                epochs=1,
                batch_size=50,
                optimizer=OPTIMIZERS["fused adam"],
                validation=tensors[1],
                own_data=True,
                progress=False,
            )
