"""What `pyens.training.fit` leaves to its user: losses, weights, schedules, clipping, data as people have it;
and that members which leave do so in place."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyens import EnsembleMLP
from pyens.losses import decorrelation_loss
from pyens.nn import MaskedMLP, TabularEnsemble
from pyens.optim import MemberLearningRates, MemberWeightDecay, fused
from pyens.training import Randomness, derive_seed, fit, member_seeds, oof_predictions
from pyens.training.randomness import generator, partition, split_rows

N = 203
SEEDS = member_seeds(3, 20)


def rows(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=draw)
    return x, x[:, :1].sin() + 0.3 * torch.randn(n, 1, generator=draw)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return fused(torch.optim.Adam, parameters, lr=1e-2)


def hyper(members: Any) -> Any:
    """A learning rate and a weight decay for each member."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        made = adam(parameters)
        MemberLearningRates(made, [0.5 + 0.1 * m for m in members])
        MemberWeightDecay(made, [0.2 * m for m in members])
        return made

    return make


def trained(members: Any = range(5), data: Any = None, model: Any = None, **options: Any) -> Any:
    """A model and its history. Members beside each other keep the seeds that they have alone."""
    model = EnsembleMLP(len(members), 4, [6, 5], 1, activation="silu") if model is None else model
    arguments: dict[str, Any] = {
        "loss": "mse",
        "epochs": 6,
        "batch_size": 32,
        "optimizer": adam,
        "randomness": Randomness(init=True, shuffle=True),
        "seed": 3,
        "seeds": [SEEDS[m] for m in members],
        "progress": False,
    }
    arguments |= options
    if arguments["optimizer"] == "of members":
        arguments["optimizer"] = hyper(members)
    return model, fit(model, rows() if data is None else data, **arguments)


def assert_same(a: Any, b: Any) -> None:
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# --- members that leave ------------------------------------------------------------------------------------

STOPPING: dict[str, Any] = {"epochs": 30, "early_stopping": 1, "validation": 0.2}


def test_members_leave_in_place() -> None:
    model = EnsembleMLP(5, 4, [6, 5], 1, activation="silu")
    model.weights[1].requires_grad_(False)
    model.class_weight = torch.ones(3)
    own, seen, hooked = list(model.parameters()), [], []
    model.weights[0].register_hook(lambda grad: hooked.append(len(grad)))
    made = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1, momentum=0.9))
        made[0].register_step_post_hook(lambda *_: seen.append(model.ensemble_size))
        return made[0]

    frozen = model.weights[1].detach().clone()
    _, history = trained(model=model, optimizer=optimizer, randomness=None, **STOPPING)
    assert len(made) == 1 and len(set(history.epochs)) > 2
    assert all(p is q for p, q in zip(model.parameters(), own, strict=True))
    assert torch.equal(model.weights[1], frozen) and not model.weights[1].requires_grad
    assert hooked == seen and len(set(seen)) > 2  # fewer and fewer
    assert model.ensemble_size == 5 and len(model.weights[0]) == 5 and len(model.class_weight) == 3
    assert model(rows()[0]).shape == (5, N, 1)


@pytest.mark.parametrize("kind", ["prune", "parametrize"])
def test_members_leave_a_model_with_computed_weights(kind: str) -> None:
    def build(members: Any) -> EnsembleMLP:
        model = EnsembleMLP(len(members), 4, [6, 5], 1, activation="silu", seeds=[SEEDS[m] for m in members])
        if kind == "prune":
            mask = torch.ones(len(members), 6, 4)
            mask[:, ::2, 1] = 0
            torch.nn.utils.prune.custom_from_mask(model.weights, "0", mask)
        else:
            torch.nn.utils.parametrize.register_parametrization(model.weights, "0", torch.nn.Tanh())
        return model

    options: dict[str, Any] = {**STOPPING, "randomness": None}
    together, history = trained(model=build(range(5)), **options)
    assert len(set(history.epochs)) > 2
    x = rows()[0]
    for m in range(5):
        alone, _ = trained([m], model=build([m]), **options)
        assert torch.equal(together(x)[m], alone(x)[0])


def test_select_in_place() -> None:
    model = EnsembleMLP(5, 4, [6], 1)
    chosen, own = model.select([3, 1]), list(model.parameters())
    model.weights[0].grad = torch.ones_like(model.weights[0])
    assert model.select_([3, 1]) is model and model.ensemble_size == 2
    assert all(p is q for p, q in zip(model.parameters(), own, strict=True)) and model.weights[0].grad is None
    assert_same(model, chosen)
    before = [p.clone() for p in model.parameters()]
    for bad, error in (([7], IndexError), ([], ValueError)):
        with pytest.raises(error):
            model.select_(bad)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_schedule_does_not_begin_again() -> None:
    rates: dict[int, list[float]] = {}
    for stop in (None, 1):
        made = []

        def optimizer(parameters: Any, made: list[Any] = made) -> torch.optim.Optimizer:
            made.append(adam(parameters))
            return made[0]

        found: list[float] = []

        def schedule(optimizer: Any, found: list[float] = found) -> Any:
            optimizer.register_step_post_hook(lambda o, *_: found.append(o.param_groups[0]["lr"]))
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)

        options = {**STOPPING, "early_stopping": stop, "optimizer": optimizer, "scheduler": schedule}
        _, history = trained(**options)
        rates[stop or 0] = found
    steps = len(rates[1])
    assert len(set(history.epochs)) > 2 and len(set(found)) > 5
    assert rates[1] == rates[0][:steps]


@pytest.mark.parametrize("schedule", ["epoch", "step"])
def test_a_schedule_is_torchs(schedule: Any) -> None:
    def halved(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)

    model, _ = trained(
        range(1),
        scheduler=halved,
        schedule=schedule,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        validation=0,
        epochs=3,
        batch_size=100,
        randomness=Randomness(),
    )
    alone = EnsembleMLP(1, 4, [6, 5], 1, activation="silu", seeds=[3])
    x, y = rows()
    order = torch.randperm(N, generator=generator(3, "validation"))
    order = order[torch.randperm(N, generator=generator(3, "order"))]
    plain = torch.optim.SGD(alone.parameters(), lr=0.1)
    rate = halved(plain)
    for _ in range(3):
        for batch in order.split(100):
            plain.zero_grad()
            F.mse_loss(alone(x[batch])[0], y[batch]).backward()
            plain.step()
            if schedule == "step":
                rate.step()
        if schedule == "epoch":
            rate.step()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rates_of_members_know_who_remains() -> None:
    def optimizer(factors: list[float]) -> Any:
        def make(parameters: Any) -> torch.optim.Optimizer:
            made = adam(parameters)
            MemberLearningRates(made, factors)
            return made

        return make

    factors = [1.0, 0.5, 0.0, 0.25, 2.0]
    together, history = trained(optimizer=optimizer(factors), **STOPPING)
    assert len(set(history.epochs)) > 2
    for m in range(5):
        alone, _ = trained([m], optimizer=optimizer([factors[m]]), **STOPPING)
        assert_same(together.select([m]), alone)


# --- a member alone is the member among others -------------------------------------------------------------

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "loss": [{}, {"loss": lambda o, y: (o - y).abs().mean(-1)}],
    "penalty": [{}, {"penalty": lambda o: 0.01 * o.square().mean((1, 2))}],
    "weights": [{}, {"sample_weight": torch.linspace(0, 2, N)}],
    "bootstrap": [{}, {"bootstrap": "poisson"}, {"bootstrap": "multinomial"}],
    "schedule": [{}, {"scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)}],
    "clip": [{}, {"clip_norm": 0.05}, {"clip_value": 0.01, "clip_norm": 0.05}],
    "parts": [{}, {"micro_batch_size": 10}],
    "average": [{}, {"ema": 0.9}, {"swa_start": 1}],
    "metrics": [{}, {"metrics": {"size": lambda o, y: o.abs().mean()}, "monitor": "size", "mode": "max"}],
    "precision": [{}, {"autocast": torch.bfloat16}],
    "decay": [{}, {"optimizer": "of members"}],
    "stopping": [{}, STOPPING],
    "sources": [{}, {"randomness": Randomness(init=True, shuffle=True, jackknife=True)}],
}


@given(st.tuples(*(st.integers(0, len(choices) - 1) for choices in OPTIONS.values())))
def test_no_option_makes_members_depend_on_each_other(chosen: tuple[int, ...]) -> None:
    options: dict[str, Any] = {}
    for choices, i in zip(OPTIONS.values(), chosen, strict=True):
        options |= choices[i]

    def run(members: list[int]) -> Any:
        groups = {}
        if chosen[-1]:
            groups = {"jackknife_groups": 10, "left_out": [m % 10 for m in members]}
        return trained(members, **{"epochs": 3, **options, **groups})[0]

    together, alone = run([0, 1, 2, 3]), run([2])
    assert_same(together.select([2]), alone)


@pytest.mark.parametrize("options", [*itertools.chain(*OPTIONS.values())], ids=str)
def test_every_option_resumes_to_the_bit(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    rest = {**options, "validation": 0.2}
    trained(checkpoint=path, **{**rest, "epochs": 3})
    resumed, _ = trained(checkpoint=path, **{**rest, "epochs": 9})
    whole, _ = trained(**{**rest, "epochs": 9})
    assert_same(resumed, whole)


# --- losses and weights ------------------------------------------------------------------------------------


def test_a_function_is_the_loss_of_the_same_name() -> None:
    named, _ = trained(validation=0.2, epochs=2)
    for loss in (lambda o, y: (o - y).square().mean(-1), lambda o, y: (o - y).square().mean((1, 2))):
        own, history = trained(loss=loss, validation=0.2, epochs=2)
        for a, b in zip(own.parameters(), named.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert np.isfinite(history.validation_loss).all()


def test_label_smoothing_and_weights_of_classes() -> None:
    x, _ = rows()
    y = (x[:, 0] > 0).long() + (x[:, 1] > 1).long()
    weight = torch.tensor([1.0, 2.0, 0.5])

    def smoothed(output: Tensor, target: Tensor) -> Tensor:
        labels = target.expand(output.shape[:2]).flatten()
        each = F.cross_entropy(output.flatten(0, 1), labels, label_smoothing=0.1, reduction="none")
        return each.view(output.shape[:2])

    model = EnsembleMLP(2, 4, [6], 3)
    options: dict[str, Any] = {"members": range(2), "data": (x, y), "epochs": 40}
    trained(model=model, loss=smoothed, **options)
    assert (model(x).argmax(-1) == y).double().mean() > 0.8
    # The same in torch: the weighted mean of a whole batch.
    first = EnsembleMLP(1, 4, [6], 3, seeds=[5])
    ours, _ = trained(
        range(1),
        (x, y),
        model=first.select([0]),
        loss="cross_entropy",
        sample_weight=weight[y],
        randomness=None,
        validation=0,
        epochs=1,
        batch_size=N,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
    )
    plain = torch.optim.SGD(first.parameters(), lr=0.5)
    F.cross_entropy(first(x)[0], y, weight).backward()
    plain.step()
    for a, b in zip(ours.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_penalty_is_added() -> None:
    def spread(model: EnsembleMLP) -> float:
        return float(decorrelation_loss(model(rows()[0]).detach(), kind="correlation"))

    without, _ = trained(epochs=20)
    with_penalty, _ = trained(epochs=20, penalty=lambda o: 2 * decorrelation_loss(o, kind="correlation"))
    assert spread(with_penalty) < 0.8 * spread(without)


@pytest.mark.parametrize("kind", ["poisson", "multinomial"])
def test_bootstrap_weights(kind: Any) -> None:
    """One step over all rows is that of the rows as often as they were drawn."""
    model = EnsembleMLP(1, 4, [6], 1, seeds=[9])
    x, y = rows()
    options: dict[str, Any] = {"randomness": None, "validation": 0, "epochs": 1, "batch_size": N}
    options |= {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
    ours, history = trained(range(1), model=model.select([0]), bootstrap=kind, **options)
    drawn = torch.Generator().manual_seed(derive_seed(SEEDS[0], "bootstrap"))
    if kind == "poisson":
        counts = torch.poisson(torch.ones(N), generator=drawn)
    else:
        counts = torch.bincount(torch.randint(N, (N,), generator=drawn), minlength=N).float()
        assert counts.sum() == N
    losses = (model(x)[0] - y).square().squeeze(1)
    expected = (losses * counts).sum() / counts.sum()
    assert history.train_loss[0, 0] == pytest.approx(float(expected), rel=1e-5)
    expected.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_loss_of_the_jackknife_counts_the_rows_that_are_there() -> None:
    """Batches of one row: those of the group that is left out have no loss, not the loss 0."""
    x = torch.randn(12, 4)
    model = EnsembleMLP(2, 4, [3], 1)
    _, history = trained(
        range(2),
        (x, torch.ones(12, 1)),
        model=model,
        randomness=Randomness(jackknife=True),
        jackknife_groups=2,
        validation=0,
        epochs=1,
        batch_size=1,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
    )
    losses = (model(x) - 1).square().squeeze(-1).detach()  # [2, 12]; with rate 0 the weights stay
    group = partition(split_rows(12, 0, 3)[0], 12, 2, 3)
    for m in range(2):
        assert history.train_loss[0, m] == pytest.approx(float(losses[m, group != m].mean()), rel=1e-6)


def test_clipping_is_of_each_member() -> None:
    """A member with large gradients does not slow the others down."""
    x, y = rows()
    targets = torch.stack([y, 1e6 * y])
    options: dict[str, Any] = {"own_data": True, "epochs": 2, "clip_norm": 1.0}
    both, _ = trained(range(2), (x.expand(2, -1, -1), targets), **options)
    calm, _ = trained(range(1), (x[None], y[None]), **options)
    assert_same(both.select([0]), calm)


# --- data as people have it --------------------------------------------------------------------------------


def test_numpy_float64_and_flat_targets() -> None:
    x, y = rows()
    expected, _ = trained(epochs=2)
    for data in ((x.numpy(), y.squeeze(1).numpy()), (x, y.squeeze(1)), (x.numpy()[::-1][::-1], y.numpy())):
        assert_same(trained(data=data, epochs=2)[0], expected)
    with pytest.warns(UserWarning, match=r"^fit: data\[0\], data\[1\]: float64, cast to torch.float32 once$"):
        assert_same(trained(data=(x.double(), y.numpy().astype("f8")), epochs=2)[0], expected)


def test_columns_of_frames_and_whole_targets() -> None:
    x, y = rows()

    class Column:  # what fit asks of pandas
        def __init__(self, values: Tensor) -> None:
            self.values = values

        def to_numpy(self) -> np.ndarray:
            return self.values.numpy()

    label = y.squeeze(1) > 0
    expected, _ = trained(data=(x, label.float().unsqueeze(1)), loss="bce", epochs=2)
    for target in (label, label.int(), label.long().unsqueeze(1), Column(label)):
        assert_same(trained(data=(Column(x), target), loss="bce", epochs=2)[0], expected)
    classes, _ = trained(data=(x, label.long()), model=EnsembleMLP(5, 4, [6], 2), loss="cross_entropy")
    assert_same(
        trained(data=(x, label.to(torch.int32)), model=EnsembleMLP(5, 4, [6], 2), loss="cross_entropy")[0],
        classes,
    )


def test_tables_of_one_kind_of_column() -> None:
    _, y = rows()
    ids = torch.arange(N).remainder(7).unsqueeze(1)
    only_ids = TabularEnsemble(3, [(7, 2)], 0, [5], 1)
    trained(range(3), (ids.int().numpy(), None, y), model=only_ids, epochs=1)
    only_numbers = TabularEnsemble(3, [], 4, [5], 1)
    trained(range(3), (None, rows()[0], y), model=only_numbers, epochs=1)


def test_data_of_its_own_that_is_a_view_is_not_copied() -> None:
    x, y = rows()
    shared, _ = trained(range(3), (x.expand(3, -1, -1), y.expand(3, -1, -1)), own_data=True, epochs=2)
    copied, _ = trained(range(3), (x.repeat(3, 1, 1), y.repeat(3, 1, 1)), own_data=True, epochs=2)
    assert_same(shared, copied)


def with_value(value: float, row: int, column: int, which: int = 0) -> tuple[Tensor, Tensor]:
    data = rows()
    data[which][row, column] = value
    return data


BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": (
        {"data": with_value(float("nan"), 57, 2)},
        r"data\[0\]: expected finite numbers, got nan in row 57, column 2 and 0 more",
    ),
    "infinite target": (
        {"data": with_value(float("inf"), 9, 0, 1)},
        r"data\[1\]: expected finite numbers, got inf in row 9, column 0",
    ),
    "validation": (
        {"validation": with_value(float("nan"), 3, 1)},
        r"validation\[0\]: expected finite numbers, got nan in row 3, column 1",
    ),
    "class": (
        {
            "data": (rows()[0], torch.arange(N) - 1),
            "loss": "cross_entropy",
        },
        r"data\[1\]: expected classes from 0 to 0, got -1 in row 0",
    ),
    "weight": ({"sample_weight": torch.full((N,), -1.0)}, "sample_weight: expected finite weights"),
    "weights of a member": (
        {"sample_weight": torch.ones(5, N) * torch.tensor([1.0, 1, 1, 0, 1])[:, None]},
        "sample_weight: expected a training row with weight above 0, got none of member 3",
    ),
    "shape of weights": (
        {"sample_weight": torch.ones(3)},
        r"sample_weight: expected shape \[203\] or \[5, 203\]",
    ),
    "bootstrap": (
        {"bootstrap": "jack"},
        "bootstrap: expected one of poisson, multinomial, got 'jack'",
    ),
    "clip": ({"clip_norm": 0.0}, "clip_norm: expected a positive number, got 0"),
    "schedule": ({"schedule": "batch"}, "schedule: expected 'epoch' or 'step', got 'batch'"),
    "scheduler": (
        {"scheduler": lambda o: 3},
        "scheduler: expected a function that gives an LRScheduler, got",
    ),
    "plateau": (
        {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau},
        "scheduler: expected a schedule of epochs or steps, got a ReduceLROnPlateau",
    ),
    "scheduler of another": (
        {"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], 0.1), 1)},
        "scheduler: expected one of the optimizer that it is given, got a StepLR of another",
    ),
    "optimizer": ({"optimizer": lambda p: list(p)}, "optimizer: expected a function that gives an optimizer"),
    "loss of another shape": (
        {"loss": lambda o, y: (o - y).square().mean()},
        r"loss: expected \[5, 1\] or \[5\], got shape \[\]",
    ),
    "loss without gradient": ({"loss": lambda o, y: (o - y).detach().mean(-1)}, "a loss with a gradient"),
    "penalty": ({"penalty": lambda o: o}, r"penalty: expected \[5\] or one number, got shape \[5, 1, 1\]"),
    "folder": ({"checkpoint": "nowhere/run.pt"}, "checkpoint: expected a file in a folder that exists"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values_are_refused_before_anything_changes(case: str) -> None:
    change, message = BAD_VALUES[case]
    model = EnsembleMLP(5, 4, [6, 5], 1)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises((ValueError, TypeError), match=message):
        trained(model=model, **change)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_categories_are_looked_at_beforehand() -> None:
    ids = torch.zeros(N, 2, dtype=torch.int64)
    ids[81, 1] = 5
    model = TabularEnsemble(2, [(7, 2), (5, 1)], 0, [3], 1)
    message = "categorical: expected categories from 0 to 4 in column 1, got 5 in row 81"
    with pytest.raises(ValueError, match=message):
        trained(range(2), (ids, None, rows()[1]), model=model)
    trained(
        range(2), (ids, None, rows()[1]), model=model, sample_weight=(torch.arange(N) != 81).float(), epochs=1
    )


def test_what_weighs_nothing_may_hold_anything() -> None:
    weight = torch.ones(N)
    weight[57] = 0
    clean, _ = trained(sample_weight=weight, validation=0)
    got, _ = trained(data=with_value(float("nan"), 57, 2), sample_weight=weight, validation=0)
    assert_same(got, clean)


def test_unchecked_data_is_the_users_own() -> None:
    with pytest.warns(UserWarning, match="diverged"):
        trained(data=with_value(float("nan"), 57, 2), check=False, epochs=1)


# --- interrupted, and taken up by others -------------------------------------------------------------------


def test_an_interruption_leaves_the_model_whole() -> None:
    model, steps = EnsembleMLP(5, 4, [6, 5], 1, activation="silu"), []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made = adam(parameters)

        def count(*_: Any) -> None:
            steps.append(model.ensemble_size)
            if model.ensemble_size < 5:
                raise KeyboardInterrupt

        made.register_step_post_hook(count)
        return made

    with pytest.raises(KeyboardInterrupt):
        trained(model=model, optimizer=optimizer, **STOPPING)
    assert steps[-1] < 5 == model.ensemble_size
    expected, _ = trained(**{**STOPPING, "epochs": len(steps) // 6})  # 163 rows: 6 steps an epoch
    assert_same(model, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": lambda p: fused(torch.optim.Adam, p, lr=1.0)}, "expected optimizer"),
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=1e-2)}, "expected optimizer"),
        ({"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1)}, "expected"),
        ({"clip_norm": 1.0}, "expected clip_norm"),
        ({"bootstrap": "poisson"}, "expected bootstrap"),
        ({"sample_weight": torch.rand(N) + 0.1}, "expected weights"),
        ({"epochs": 2}, "epochs: expected at least the 3 of"),
        (
            {"model": EnsembleMLP(5, 4, [6, 5], 1, activation="silu", seeds=[5] * 5)},
            "got other initial parameters",
        ),
    ],
    ids=["rate", "optimizer", "scheduler", "clip", "bootstrap", "weights", "epochs", "initial"],
)
def test_another_run_does_not_go_on_from_a_checkpoint(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.pt"

    def build() -> EnsembleMLP:
        return EnsembleMLP(5, 4, [6, 5], 1, activation="silu", seeds=SEEDS[:5])

    options: dict[str, Any] = {"checkpoint": path, "randomness": None}
    trained(model=build(), **options, epochs=3)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        trained(**({"model": build(), "epochs": 4} | options | change))
    assert path.read_bytes() == content
    trained(model=build(), **options, epochs=4)  # which is this one


def test_rows_are_predicted_by_the_members_that_left_them_out() -> None:
    x, _ = rows()
    sources = Randomness(init=True, jackknife=True)
    model, history = trained(range(4), randomness=sources, jackknife_groups=4, validation=0.1, epochs=2)
    training, held_out = split_rows(N, 0.1, 3)
    group = partition(training, N, 4, 3)
    outputs = model(x).detach()
    predicted = oof_predictions(outputs, history)
    for row in range(N):
        own = outputs[:, row] if row in held_out else outputs[int(group[row]), row][None]
        torch.testing.assert_close(predicted[row], own.mean(0))
    assert history.member(2).unseen.shape == (1, N)
    with pytest.raises(
        ValueError, match=r"oof_predictions: outputs: expected \[4, 203\] first, got shape \[4, 9"
    ):
        oof_predictions(outputs[:, :9], history)
    _, everything = trained(range(2), validation=0, epochs=1)
    assert oof_predictions(outputs[:2], everything).isnan().all()
    _, drawn = trained(range(2), validation=0, epochs=1, bootstrap="multinomial")
    assert 0.3 < drawn.unseen.mean() < 0.45  # 1 / e


def test_the_history_knows_the_learning_rates() -> None:
    _, history = trained(epochs=3, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5))
    assert history.learning_rate.tolist() == [1e-2, 5e-3, 2.5e-3]


def test_classes_are_looked_at_without_dropout() -> None:
    model = EnsembleMLP(2, 4, [6], 3, dropout=0.2)
    trained(range(2), (rows()[0], torch.arange(N) % 3), model=model, loss="cross_entropy", epochs=1)


def test_members_left_without_rows_are_refused() -> None:
    for weight in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match=r"after bootstrap and jackknife, got none for members \[[01]\]"):
            trained(
                range(2),
                (torch.randn(2, 4), torch.randn(2, 1)),
                sample_weight=weight,
                randomness=Randomness(jackknife=True),
                jackknife_groups=2,
                validation=0,
            )
    _, held_out = split_rows(N, 0.1, 3)
    weight = torch.ones(N)
    weight[held_out] = 0
    with pytest.raises(ValueError, match="expected a validation row with weight above 0"):
        trained(sample_weight=weight, validation=0.1)


def test_a_first_row_that_weighs_nothing() -> None:
    ids = torch.zeros(N, 1, dtype=torch.int64)
    ids[0] = 99
    model = TabularEnsemble(2, [(7, 2)], 0, [3], 1)
    trained(
        range(2), (ids, None, rows()[1]), model=model, sample_weight=(torch.arange(N) > 0).float(), epochs=1
    )


def test_inputs_become_what_the_parameters_are() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model = EnsembleMLP(2, 4, [6], 1, dtype=dtype)
        _, history = trained(range(2), model=model, epochs=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        assert np.isfinite(history.train_loss).all()


def test_a_checkpoint_that_cannot_be_taken_up_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.pt"
    _, whole = trained(**STOPPING)
    epochs = sorted(whole.epochs)
    assert epochs[0] < epochs[-1] - 1
    trained(checkpoint=path, **{**STOPPING, "epochs": int(epochs[0]) + 1})  # some have left, some train
    model = EnsembleMLP(5, 4, [6, 5], 1, activation="silu")
    before = [p.detach().clone() for p in model.parameters()]

    def refuse(*_: Any) -> None:
        raise ValueError("not this one")

    monkeypatch.setattr("pyens.training.trainer.load_member_state", refuse)
    with pytest.raises(ValueError, match="not this one"):
        trained(model=model, checkpoint=path, **STOPPING)
    assert model.ensemble_size == 5
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_select_in_place_of_models_with_what_is_derived() -> None:
    x = torch.randn(6, 4)
    model = MaskedMLP(4, 4, [12], 1, scale=2.0, seed=3)
    expected = model(x).detach()[[2, 0]]
    assert torch.equal(model.select_([2, 0])(x), expected) and model.ensemble_size == 2
    packed = EnsembleMLP(3, 4, [6], 1).packed()
    with pytest.raises(
        ValueError, match=r"select_: expected a class .* got a PackedEnsembleMLP, which gives"
    ):
        packed.select_([0])
    assert packed(x).shape == (3, 6, 1)
