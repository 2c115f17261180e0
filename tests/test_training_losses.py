"""`fit` under the named losses and their options: what it learns, weights of classes in parts and in
validation, what it refuses, and checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_trainer import MEMBERS, STOPPING, adam, assert_close, assert_same, classes, mlp, rows, run, sgd
from torch import Tensor

from pyens import nn
from pyens.training import Trainer

WEIGHT = torch.tensor([1.0, 4.0, 0.5])


def test_quantiles_are_learnt() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(2000, 4, generator=draw)
    y = x[:, 0] + torch.rand(2000, generator=draw)
    model, history = run(
        mlp(2), (x, y), loss="quantile", quantiles=[0.1, 0.9], epochs=30, batch_size=100, validation=0
    )
    low, high = model(x).detach().unbind(-1)
    assert abs((y < low).float().mean() - 0.1) < 0.04 and abs((y < high).float().mean() - 0.9) < 0.04
    assert history.train_loss[-1].max() < history.train_loss[0].min()


def test_rates_are_learnt() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(2000, 4, generator=draw)
    y = torch.poisson((2 * x[:, 0]).exp(), generator=draw).long()  # whole numbers become floating point
    model, _ = run(mlp(1), (x, y), loss="poisson_nll", epochs=30, batch_size=100, validation=0)
    error = model(x).detach()[..., 0] - 2 * x[:, 0]
    assert error.abs().mean() < 0.15


def test_bounded_variances_are_learnt() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2000, 4, generator=draw)
    y = 0.3 * torch.randn(2000, 1, generator=draw)
    bounds = {"log_variance_min": -8.0, "log_variance_max": torch.tensor([0.5])}
    model, _ = run(mlp(2), (x, y), loss="gaussian_nll", epochs=30, batch_size=100, validation=0, **bounds)
    raw = model(x).detach()[..., 1]
    s = -8 + F.softplus(0.5 - F.softplus(0.5 - raw) + 8)
    assert abs(s.mean() - np.log(0.09)) < 0.2


@pytest.mark.parametrize("loss", ["huber", "smooth_l1", "soft_cross_entropy"])
def test_a_loss_is_that_of_torch(loss: str) -> None:
    x, y = rows()
    target = torch.cat([y, -y], 1)
    options: dict[str, Any] = {"delta": 0.3}
    if loss == "soft_cross_entropy":
        target, options = target.softmax(-1), {"temperature": 0.5, "label_smoothing": 0.1}

    def theirs(output: Tensor, target: Tensor) -> Tensor:
        target = target.expand(output.shape)
        if loss == "huber":
            return F.huber_loss(output, target, delta=0.3, reduction="none").mean(-1)
        if loss == "smooth_l1":
            return F.smooth_l1_loss(output, target, beta=0.3, reduction="none").mean(-1)
        logits = output.flatten(0, 1) / 0.5
        each = F.cross_entropy(logits, target.flatten(0, 1), label_smoothing=0.1, reduction="none")
        return each.view(output.shape[:2])

    named, history = run(mlp(2), (x, target), loss=loss, optimizer=sgd, **options)
    own, expected = run(mlp(2), (x, target), loss=theirs, optimizer=sgd)
    penalised, _ = run(
        mlp(2), (x, target), loss=loss, optimizer=sgd, penalty=lambda o: 0 * o.sum(), **options
    )
    assert_close(named, own)
    assert_close(named, penalised)
    np.testing.assert_allclose(history.validation_loss, expected.validation_loss, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_those_of_torch(smoothing: float) -> None:
    x, y = classes()
    options: dict[str, Any] = {"loss": "cross_entropy", "label_smoothing": smoothing, "class_weight": WEIGHT}

    def theirs(output: Tensor, target: Tensor) -> Tensor:
        labels = target.expand(output.shape[:2])
        return torch.stack(
            [
                F.cross_entropy(z, y, WEIGHT, label_smoothing=smoothing)
                for z, y in zip(output, labels, strict=True)
            ]
        )

    own, history = run(mlp(3), (x, y), optimizer=sgd, batch_size=1000, validation=0.2, **options)
    plain, expected = run(mlp(3), (x, y), loss=theirs, optimizer=sgd, batch_size=1000, validation=0.2)
    assert_close(own, plain)
    np.testing.assert_allclose(history.train_loss, expected.train_loss, rtol=1e-4)
    np.testing.assert_allclose(history.validation_loss, expected.validation_loss, rtol=1e-4)
    # In parts, whose weights differ: the whole's; and beside a function of the outputs.
    for extra in ({"micro_batch_size": 7}, {"penalty": lambda o: 0 * o.sum()}):
        parts, again = run(mlp(3), (x, y), optimizer=sgd, batch_size=1000, validation=0.2, **options, **extra)
        assert_close(own, parts)
        np.testing.assert_allclose(history.train_loss, again.train_loss, rtol=1e-4)
    # What the batch size of a validation is changes nothing.
    _, small = run(mlp(3), (x, y), optimizer=lambda p: torch.optim.SGD(p, lr=0.0), batch_size=9, epochs=1,
                     validation=0.2, **options)  # fmt: skip
    _, large = run(mlp(3), (x, y), optimizer=lambda p: torch.optim.SGD(p, lr=0.0), batch_size=999, epochs=1,
                   validation=0.2, **options)  # fmt: skip
    np.testing.assert_allclose(small.validation_loss, large.validation_loss, rtol=1e-5)
    np.testing.assert_allclose(small.train_loss, large.train_loss, rtol=1e-5)


def test_options_of_each_member_stay_with_it() -> None:
    x, y = classes()
    each = torch.stack([WEIGHT * (m + 1) ** torch.arange(3) for m in range(MEMBERS)])
    options: dict[str, Any] = {"loss": "cross_entropy", **STOPPING}
    together, history = run(mlp(3), (x, y), class_weight=each, **options)
    assert len(set(history.epochs)) > 1
    for m in range(MEMBERS):
        alone, _ = run(
            mlp(3).select([m]), (x, y), class_weight=each[m : m + 1], seeds=[Trainer(
                mlp(3), loss="mse", optimizer=adam, seed=3).seeds[m]], **options
        )  # fmt: skip
        assert_same(together.select([m]), alone)


def test_masks_that_share_a_batch_out() -> None:
    x, y = classes()
    options: dict[str, Any] = {"loss": "cross_entropy", "class_weight": WEIGHT, "optimizer": sgd}
    whole = nn.MaskedMLP(2, 4, [8], 3, scale=1.5, seed=0, generator=torch.Generator().manual_seed(0))
    for mode in ("tiled", "round_robin"):
        first, _ = run(whole.select([0, 1]), (x, y), mask_mode=mode, **options)
        second, _ = run(whole.select([0, 1]), (x, y), mask_mode=mode, micro_batch_size=8, **options)
        assert all(p.isfinite().all() for p in [*first.parameters(), *second.parameters()])
        if mode == "tiled":
            assert_close(first, second)


def test_a_checkpoint_knows_the_options(tmp_path: Path) -> None:
    x, y = classes()
    options: dict[str, Any] = {"loss": "cross_entropy", "checkpoint": tmp_path / "run.pt"}
    through, _ = run(mlp(3), (x, y), loss="cross_entropy", class_weight=WEIGHT)
    run(mlp(3), (x, y), class_weight=WEIGHT, **options | {"epochs": 3})
    with pytest.raises(ValueError, match="loss_options"):
        run(mlp(3), (x, y), class_weight=2 * WEIGHT, **options)
    again, _ = run(mlp(3), (x, y), class_weight=WEIGHT, **options)
    assert_same(through, again)
    # Those of versions that knew no such options say nothing of them, and are of the same run as without.
    plain = Trainer(mlp(3), loss="cross_entropy", optimizer=adam, temperature=2.0)
    assert "loss_options" not in plain.describe() and plain.describe()["temperature"] == 2.0


def test_what_is_refused() -> None:
    x, y = classes()
    for options, error, message in (
        ({"loss": "huber", "delta": 0.0}, ValueError, "fit: delta: expected a positive number, got 0"),
        ({"delta": 2.0}, ValueError, r"fit: delta: expected 1 \(only huber .*\) with loss mse, got 2"),
        ({"loss": "quantile"}, ValueError, "fit: quantiles: expected some with loss quantile, got None"),
        (
            {"loss": "gaussian_nll", "log_variance_min": 1.0},
            ValueError,
            "fit: log_variance_max: expected one",
        ),
        ({"class_weight": WEIGHT}, ValueError, r"fit: class_weight: expected None .* with loss mse, got"),
        ({"loss": lambda o, y: o, "delta": 2.0}, ValueError, "fit: delta: expected 1"),
        (
            {"loss": "cross_entropy", "class_weight": -WEIGHT},
            ValueError,
            "fit: class_weight: expected finite",
        ),
        (
            {"loss": "cross_entropy", "class_weight": torch.ones(2, 3)},
            ValueError,
            r"fit: class_weight: expected a row for each of 4 members, got shape \[2, 3\]",
        ),
        ({"nonsense": 1}, TypeError, "fit: nonsense: expected an argument of fit or Trainer, got another"),
    ):
        with pytest.raises(error, match="^" + message):
            run(mlp(3), (x, y if options.get("loss") == "cross_entropy" else rows()[1]), **options)
    with pytest.raises(ValueError, match=r"fit: data: .* class_weight: expected shape"):
        run(mlp(3), (x, y), loss="cross_entropy", class_weight=torch.ones(2))


def test_a_metric_of_huber() -> None:
    _, history = run(loss="huber", metrics=["rmse", "r_squared"], validation=0.2)
    assert np.isfinite(history.metrics["rmse"]).all()


def test_bounds_that_would_not_be_learnt() -> None:
    bounds = [torch.full((1,), bound, requires_grad=True) for bound in (-5.0, 1.0)]
    with pytest.raises(ValueError, match=r"^fit: log_variance_min: expected requires_grad=False \(only"):
        run(mlp(2), rows(), loss="gaussian_nll", log_variance_min=bounds[0], log_variance_max=bounds[1])


def test_what_differs_is_shown_of_long_descriptions(tmp_path: Path) -> None:
    kept = {"checkpoint": tmp_path / "run.pt", "epochs": 1}
    run(mlp(norm="layer_norm"), **kept)
    with pytest.raises(
        ValueError, match=r"expected model .*norm=layer_norm, norm_eps=0\.1.*, got .*norm=layer_norm, bias"
    ):
        run(mlp(norm="layer_norm", norm_eps=0.1), **kept)
