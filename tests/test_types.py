"""pyens._types: the names that the types allow are those that are accepted, and no others."""

import re
from typing import Literal, get_args, get_origin

import pytest
import torch

import pyens
from pyens import _types, decisions, losses, metrics, nn, ops, variation
from pyens.reference.activations import ACTIVATIONS
from pyens.reference.ensemble_mlp_loss import LOSSES
from pyens.training import fit

X, MEMBERS = torch.rand(4, 6), torch.rand(3, 4, 2)
WEIGHTS, MASKS = [torch.rand(3, 5, 6), torch.rand(3, 2, 5)], [torch.ones(3, 5, dtype=torch.bool)]
SHARED = [weight[0] for weight in WEIGHTS]
PROBABILITIES, LABELS = MEMBERS.softmax(-1), torch.tensor([0, 1, 1, 0])
STRENGTH = torch.rand(30, 4)


def target(loss):
    return (
        LABELS if loss == "cross_entropy" else torch.rand(4, 1 if loss in ("gaussian_nll", "quantile") else 2)
    )


def options(loss):
    return {"quantiles": [0.1, 0.9]} if loss == "quantile" else {}


def train(loss):
    data, model = (X, target(loss)), pyens.EnsembleMLP(3, 6, [5], 2)
    optimizer = torch.optim.SGD
    settings = {"epochs": 1, "batch_size": 4, "validation": 0, "progress": False, **options(loss)}
    fit(model, data, loss=loss, optimizer=lambda p: optimizer(p, lr=0.1), **settings)


def estimate(**kind):
    estimator = variation.VariationEstimator(hidden_features=[4], max_epochs=1, **kind)
    estimator.fit(STRENGTH, torch.rand(30))


def conv(**options):
    return nn.MaskedConv2d(6, 2, 1, 3, 2.0, **options)


def resample(bootstrap):
    pyens.training.fit(
        pyens.EnsembleMLP(2, 3, [4], 1),
        (torch.rand(9, 3), torch.rand(9, 1)),
        loss="mse",
        epochs=1,
        batch_size=9,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        bootstrap=bootstrap,
        progress=False,
    )


CALLS = [
    ("Norm", lambda n: ops.ensemble_mlp(X, WEIGHTS, norm=n)),
    ("NormPosition", lambda n: ops.ensemble_mlp(X, WEIGHTS, norm="layer_norm", norm_position=n)),
    ("DropoutPosition", lambda n: ops.ensemble_mlp(X, WEIGHTS, norm="rms_norm", dropout_position=n)),
    ("ActivationName", lambda n: ops.ensemble_mlp(X, WEIGHTS, activation=n)),
    ("ActivationName", lambda n: ops.ensemble_mlp_loss(X, target("mse"), WEIGHTS, loss="mse", activation=n)),
    ("ActivationName", lambda n: ops.masked_mlp(X, SHARED, None, MASKS, activation=n)),
    ("ActivationName", lambda n: pyens.EnsembleMLP(3, 6, [5], 2, activation=n)),
    ("ActivationName", lambda n: nn.MaskedMLP(3, 6, [5], 2, scale=2.0, activation=n)),
    ("ActivationName", lambda n: nn.TabularEnsemble(3, [], 6, [5], 2, activation=n)),
    ("Loss", lambda n: ops.ensemble_mlp_loss(X, target(n), WEIGHTS, loss=n, **options(n))),
    ("Loss", lambda n: ops.masked_mlp_loss(X, target(n), SHARED, None, MASKS, loss=n, **options(n))),
    (
        "Loss",
        lambda n: nn.Ensemble.loss(pyens.EnsembleMLP(3, 6, [5], 2), X, target(n), loss=n, **options(n)),
    ),
    ("Loss", train),
    (
        "LossReduction",
        lambda n: pyens.EnsembleMLP(3, 6, [5], 2).loss(X, target("mse"), loss="mse", reduction=n),
    ),
    (
        "LossReduction",
        lambda n: nn.Ensemble.loss(
            pyens.EnsembleMLP(3, 6, [5], 2), X, target("mse"), loss="mse", reduction=n
        ),
    ),
    ("Decorrelation", lambda n: ops.decorrelation_loss(MEMBERS, kind=n)),
    ("Decorrelation", lambda n: losses.gram_schmidt_decorrelation_loss(MEMBERS, kind=n)),
    ("Decorrelation", lambda n: losses.RunningDecorrelationLoss(3, 2, kind=n)),
    ("Reduction", lambda n: ops.decorrelation_loss(MEMBERS, reduction=n)),
    ("Reduction", lambda n: losses.pearson_decorrelation_loss(MEMBERS, reduction=n)),
    ("Reduction", lambda n: losses.difference_loss(MEMBERS, reduction=n)),
    ("Distance", lambda n: losses.difference_loss(MEMBERS, distance=n)),
    ("Bootstrap", lambda n: resample(n)),
    ("Space", lambda n: losses.combine(MEMBERS, space=n)),
    ("AssignmentMode", lambda n: nn.set_mask_mode_(nn.Masksembles1D(6, 3, 2.0), n)),
    (
        "AssignmentMode",
        lambda n: nn.insert_masksembles_(
            torch.nn.Sequential(torch.nn.Linear(6, 2)), 3, 2.0, include=["0"], mode=n
        ),
    ),
    ("MaskMode", lambda n: nn.Masksembles1D(6, 3, 2.0, mode=n)),
    ("MaskMode", lambda n: nn.MaskedMLP(3, 6, [5], 2, scale=2.0)(X, mode=n)),
    ("MaskMode", lambda n: conv(mode=n)),
    ("PaddingMode", lambda n: conv(padding_mode=n)),
    (
        "WeightLayout",
        lambda n: pyens.EnsembleLinear(3, 6, 6, bias=False).load_stacked(
            {"weight": torch.rand(3, 6, 6)}, layout=n
        ),
    ),
    ("Binning", lambda n: metrics.reliability_curve(PROBABILITIES[0], LABELS, binning=n)),
    (
        "PredictionVariation",
        lambda n: metrics.delta_ratio(MEMBERS[..., 0] if n == "value" else PROBABILITIES, [2], variation=n),
    ),
    ("UncertaintyScore", lambda n: decisions.uncertainty_sampling(PROBABILITIES, 2, by=n)),
    ("VariationTask", lambda n: estimate(task=n)),
    ("StrengthFeatures", lambda n: estimate(features=n)),
]


@pytest.mark.parametrize("name, call", CALLS)
def test_what_the_type_allows_is_what_is_accepted(name, call):
    names = get_args(getattr(_types, name))
    for accepted in names:
        call(accepted)
    with pytest.raises(ValueError) as refused:
        call("nonsense")
    # "expected one of a, b, got ...", and torch's "must be one of {'a', 'b'}, but got ..."
    listed = re.search(r"(?:expected|must be)(?: one of)? (.*?),(?: but)? got", str(refused.value))
    assert listed, refused.value
    assert set(re.findall(r"\w+", listed[1])) - {"or", "None"} == set(names)


def test_every_set_of_names_is_tried():
    sets = {name for name, value in vars(_types).items() if get_origin(value) is Literal}
    assert sets == {name for name, _ in CALLS}


def test_the_references_know_the_same_names():
    assert tuple(ACTIVATIONS) == get_args(_types.ActivationName)
    assert tuple(LOSSES) == get_args(_types.Loss)
