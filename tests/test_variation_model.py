"""pyens.variation.VariationModel: prediction and estimated variation from one module, exported and kept."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils import prune

import pyens
from pyens import _files
from pyens.nn import MaskedMLP, TabularEnsemble
from pyens.variation import (
    ActivationStatistics,
    VariationEstimator,
    VariationHead,
    VariationModel,
    strength_of,
)

TARGETS = ("mlp", "packed", "tabular")
SMALL = {"hidden_features": (16, 8), "batch_size": 32, "max_epochs": 3}


def target_and_inputs(kind: str, rows: int = 201) -> tuple[Any, tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(0)
    numeric = torch.randn(rows, 6, generator=draw)
    if kind == "tabular":
        model = TabularEnsemble(
            1, [(7, 3), (3, 2)], 6, [9, 5], 2, dropout=0.3, activation="silu", bias=False, seeds=[1]
        )
        categorical = torch.stack([torch.randint(k, (rows,), generator=draw) for k in (7, 3)], 1)
        return model, (categorical, numeric)
    mlp = pyens.EnsembleMLP(1, 6, [9, 5], 2, seeds=[1])
    return mlp.packed() if kind == "packed" else mlp, (numeric,)


def serving(kind: str, **params: Any) -> tuple[VariationModel, VariationEstimator, tuple[Tensor, ...]]:
    target, inputs = target_and_inputs(kind)
    target.eval()
    statistics = ActivationStatistics()
    statistics.observe(target, *inputs)
    mean, std = statistics.compute()
    strength = strength_of(target, *inputs, mean=mean, std=std)
    pv = 0.3 + 0.1 * strength.value[0].tanh().mean(1)
    estimator = VariationEstimator(**SMALL | params).fit(strength, pv)
    return VariationModel(target, estimator.head_, mean, std), estimator, inputs


@pytest.mark.parametrize("features", ["binary", "value", "both"])
@pytest.mark.parametrize("kind", TARGETS)
def test_it_is_the_target_and_the_estimator(kind, features):
    model, estimator, inputs = serving(kind, features=features)
    target, _ = target_and_inputs(kind)
    output, variation = model(*inputs)
    assert output.shape == (201, 2) and variation.shape == (201,)
    assert torch.equal(output, target.eval()(*inputs)[0])
    strength = strength_of(target, *inputs, mean=model.mean, std=model.std)
    np.testing.assert_array_equal(variation.numpy(), estimator.predict(strength))
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_probabilities_of_buckets():
    model, estimator, inputs = serving("mlp", task="classification", buckets=4)
    strength = strength_of(model.target, *inputs, mean=model.mean, std=model.std)
    assert model(*inputs)[1].shape == (201, 4)
    np.testing.assert_array_equal(model(*inputs)[1].numpy(), estimator.predict_proba(strength))


def test_a_batch_in_pieces_gives_the_same_bits():
    model, _, inputs = serving("tabular")
    whole = model(*inputs)
    for size in (1, 7, 64):
        pieces = [model(*(t[start : start + size] for t in inputs)) for start in range(0, 201, size)]
        for part, expected in zip(zip(*pieces, strict=True), whole, strict=True):
            assert torch.equal(torch.cat(part), expected)
    assert model(*(t[:0] for t in inputs))[1].shape == (0,)


def assert_same_answers(other, model, inputs, rows):
    """For the first so many rows of the inputs."""
    for count in rows:
        part = tuple(t[:count] for t in inputs)
        for got, expected in zip(other(*part), model(*part), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", TARGETS)
def test_it_compiles_whole(kind):
    model, _, inputs = serving(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_answers(compiled, model, inputs, rows=(201, 64, 33))


@pytest.mark.parametrize("task", ["regression", "classification"])
@pytest.mark.parametrize("kind", TARGETS)
def test_it_is_exported(kind, task, tmp_path):
    model, _, inputs = serving(kind, task=task)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, inputs, dynamic_shapes=(tuple({0: batch} for _ in inputs),))
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert_same_answers(loaded, model, inputs, rows=(201, 64, 2))


@pytest.mark.parametrize("task", ["regression", "classification"])
@pytest.mark.parametrize("kind", TARGETS)
def test_one_file_holds_all(kind, task, tmp_path):
    model, estimator, inputs = serving(kind, task=task, learning_rate=np.float64(3e-3))
    model.save(tmp_path / "model.pt")
    loaded = VariationModel.load(tmp_path / "model.pt")
    for got, expected in zip(loaded(*inputs), model(*inputs), strict=True):
        assert torch.equal(got, expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    again = VariationEstimator.from_model(loaded)
    assert again.get_params() == estimator.get_params()
    strength = strength_of(model.target, *inputs, mean=model.mean, std=model.std)
    np.testing.assert_array_equal(again.predict(strength), estimator.predict(strength))
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt"}


def test_a_target_in_float64():
    model, _, (x,) = serving("mlp")
    wide = VariationModel(model.target.double(), model.head, model.mean.double(), model.std.double())
    output, variation = wide(x.double())
    assert output.dtype == torch.float64 and variation.dtype == torch.float32
    torch.testing.assert_close(variation, serving("mlp")[0](x)[1], rtol=1e-4, atol=1e-4)


def test_it_keeps_copies():
    model, estimator, inputs = serving("mlp")
    before = model(*inputs)
    estimator.head_.mlp.weights[0].zero_()
    assert all(torch.equal(a, b) for a, b in zip(model(*inputs), before, strict=True))


def test_what_is_refused(tmp_path):
    model, estimator, _ = serving("mlp")
    target, mean, std = model.target, model.mean, model.std
    with pytest.raises(TypeError, match=r"target: expected an ensemble of MLPs .* got Sequential"):
        VariationModel(target.member(0), model.head, mean, std)
    with pytest.raises(ValueError, match=r"target: expected one member, got 2: take select\(\[0\]\)"):
        VariationModel(target.select([0, 0]), model.head, mean, std)
    for other in (pyens.EnsembleEmbedding(1, 3, 2), MaskedMLP(1, 6, [9, 5], 2, scale=1.0)):
        with pytest.raises(TypeError, match=rf"target: expected an ensemble .* got {type(other).__name__}"):
            VariationModel(other, model.head, mean, std)
    with pytest.raises(TypeError, match=r"head: expected a VariationHead, .* got VariationEstimator"):
        VariationModel(target, estimator, mean, std)
    for inputs in ((), (torch.zeros(2, 6), torch.zeros(2, 6))):
        with pytest.raises(TypeError, match=r"features\(\) .*positional argument"):
            model(*inputs)
    other = pyens.EnsembleMLP(1, 6, [9, 6], 2)
    with pytest.raises(
        ValueError, match=r"fitted on the 15 hidden units of target, 30 columns, got one of 28"
    ):
        VariationModel(other, model.head, torch.zeros(15), torch.ones(15))
    for name, statistics in (("mean", (mean[1:], std)), ("std", (mean, std.view(2, 7)))):
        with pytest.raises(ValueError, match=rf"{name}: expected \[14\], a number for each hidden unit, got"):
            VariationModel(target, model.head, *statistics)
    _files.save({"format": "another"}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: expected a file of VariationModel\.save"):
        VariationModel.load(tmp_path / "other.pt")

    model.save(tmp_path / "model.pt")
    content = _files.load(tmp_path / "model.pt")
    state = content["state"]
    for change in (
        {"target": "forward_tiled"},
        {"target": "NoSuchClass"},
        {"target": 3},
        {"arguments": None},
        {"head": {}},
        {"state": {}},
        {"state": state | {"mean": torch.tensor(0.0)}},
        {"state": {name: t.to(torch.int64) for name, t in state.items()}},
    ):
        _files.save(content | change, tmp_path / "crafted.pt")
        with pytest.raises(ValueError, match=r"^VariationModel\.load: .*crafted\.pt: expected what"):
            VariationModel.load(tmp_path / "crafted.pt")

    class Own(pyens.EnsembleMLP):
        pass

    own = VariationModel(Own(1, 6, [9, 5], 2), model.head, mean, std)
    with pytest.raises(ValueError, match=r"^VariationModel.save: .* a class of pyens.nn, got Own"):
        own.save(tmp_path / "own.pt")


def test_a_head_alone_is_enough():
    model, estimator, inputs = serving("mlp")
    assert isinstance(estimator.head_, VariationHead)
    rebuilt = VariationModel(model.target, estimator.head_, model.mean, model.std)
    assert torch.equal(rebuilt(*inputs)[1], model(*inputs)[1])


@pytest.mark.parametrize("kind", ["prune", "weight norm"])
def test_a_target_that_could_not_be_loaded_is_not_saved(tmp_path, kind):
    model, _, inputs = serving("mlp")
    weights = model.target.weights
    if kind == "prune":
        prune.random_unstructured(weights, "0", amount=0.5)
    else:
        torch.nn.utils.weight_norm(weights, "0")
    path = tmp_path / "model.pt"
    with pytest.raises(
        ValueError, match=r"VariationModel.save: target: expected the state of a EnsembleMLP as"
    ):
        model.save(path)
    assert not path.exists()
    if kind == "prune":
        prune.remove(weights, "0")
        model.save(path)
        assert torch.equal(VariationModel.load(path)(*inputs)[0], model(*inputs)[0])
