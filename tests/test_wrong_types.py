"""Every public callable refuses what is not of the kind that it takes: a TypeError, short, that names the
function and the argument."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import pyens
from pyens import adapters, decisions, losses, masks, metrics, ops, variation
from pyens import nn as pyens_nn
from pyens.ops.ensemble_mlp import ensemble_mlp_packed, prepack
from pyens.optim import fused
from pyens.training import fit

E, B, INPUTS, HIDDEN, OUTPUTS = 3, 4, 5, 6, 2
SHORT = 400

X = torch.randn(B, INPUTS, generator=torch.Generator().manual_seed(0))
WEIGHTS = [torch.randn(E, HIDDEN, INPUTS), torch.randn(E, OUTPUTS, HIDDEN)]
BIASES = [torch.randn(E, HIDDEN), torch.randn(E, OUTPUTS)]
SHARED_WEIGHTS = [torch.randn(HIDDEN, INPUTS), torch.randn(OUTPUTS, HIDDEN)]
SHARED_BIASES = [torch.randn(HIDDEN), torch.randn(OUTPUTS)]
MASKS = [torch.arange(E * HIDDEN).view(E, HIDDEN) % 2 == 0]
TARGET = torch.randn(B, OUTPUTS)
WEIGHT = torch.ones(B)
SEEDS = torch.arange(E)
INDEX = torch.zeros(B, dtype=torch.int64)
VALUES = torch.randn(E, B)
VARIANCES = torch.rand(E, B) + 1
COMPONENTS = torch.randn(E, B, OUTPUTS)
LOGITS = torch.randn(E, B, OUTPUTS)
MEMBERS = LOGITS.softmax(-1)
P = MEMBERS.mean(0)
LABELS = torch.zeros(B, dtype=torch.int64)
SCORES = torch.rand(B)
POSITIVE = torch.arange(B) < 2
MLP = pyens.EnsembleMLP(E, INPUTS, [HIDDEN], OUTPUTS)
TABLES = [torch.randn(E, 4, 2)]
COLUMNS = torch.zeros(B, 1, dtype=torch.int64)
TABULAR = pyens_nn.TabularEnsemble(E, [(4, 2)], INPUTS, [HIDDEN], OUTPUTS)
MASKED = pyens_nn.MaskedMLP(E, INPUTS, [HIDDEN], OUTPUTS, scale=2.0)
ONE = MLP.select([0])
STATISTICS = torch.zeros(HIDDEN), torch.ones(HIDDEN)
STRENGTH = variation.strength_of(ONE, X, mean=STATISTICS[0], std=STATISTICS[1])
HEAD = variation.VariationEstimator(max_epochs=1, hidden_features=(4,)).fit(STRENGTH, SCORES).head_


class OwnEnsemble(pyens.Ensemble):
    """An ensemble with the `loss` that every ensemble has."""

    def __init__(self) -> None:
        super().__init__()
        self.ensemble_size = E
        self.layer = pyens.EnsembleLinear(E, INPUTS, OUTPUTS)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.layer(input)


@dataclass
class Case:
    """A call that is right, and which of its arguments are tensors, lists of them, and others."""

    call: Callable[..., Any]
    right: dict[str, Any]
    names: str = ""  # a pattern of who may be named
    optional: tuple[str, ...] = ()
    other: dict[str, Any] = field(default_factory=dict)  # wrong values of arguments that are no tensors
    together: bool = False  # whether an optional argument may not be left out alone
    any_dtype: bool = False
    called: dict[str, str] = field(default_factory=dict)  # patterns of arguments that errors call differently


def in_bytes(weights: torch.Tensor) -> ops.Int8Weight:
    return ops.pack_int8(weights, torch.ones(E), torch.zeros(E, dtype=torch.uint8))


def positional(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` with the arguments by position, for those that take `*inputs`."""
    return lambda **arguments: call(*arguments.values())


def by_loss(model: Any) -> Callable[..., Any]:
    return lambda **arguments: model.loss(loss="mse", **arguments)


def own_loss(input: Any, target: Any, loss: Any = "mse", **options: Any) -> Any:
    return OwnEnsemble().loss(input, target, loss=loss, **options)


def trained(data: Any, validation: Any = 0.0) -> Any:
    def optimizer(parameters: Any) -> Any:
        return fused(torch.optim.SGD, parameters, lr=0.1)

    options: dict[str, Any] = {"loss": "mse", "epochs": 1, "batch_size": 2, "progress": False}
    return fit(MLP.select([0, 1]), data, optimizer=optimizer, validation=validation, **options)


def metric(name: str, **right: Any) -> Case:
    return Case(getattr(metrics, name), right, name)


def streaming(make: Callable[[], Any], **right: Any) -> Case:
    name = type(make()).__name__
    return Case(lambda **arguments: make().update(**arguments), right, rf"{name}\.update")


NUMBER: tuple[Any, ...] = ("0.1", [0.1], None)
RATES: tuple[Any, ...] = ("0.1", ["0.1"], [None], None)
STRING: tuple[Any, ...] = (3, None, ["relu"], torch.ones(2))
STRINGS: tuple[Any, ...] = (3, None, ["relu", 3], [None], torch.ones(2))  # one, or a sequence of them
NETWORK: dict[str, Any] = {"input": X, "weights": WEIGHTS, "biases": BIASES}
MASKED_NETWORK: dict[str, Any] = {
    "input": X,
    "weights": SHARED_WEIGHTS,
    "biases": SHARED_BIASES,
    "masks": MASKS,
}
PROBABILITIES: dict[str, Any] = {"probabilities": P, "labels": LABELS}
TWO: dict[str, Any] = {"means": VALUES, "variances": VARIANCES}

CASES = {
    "ops.ensemble_mlp": Case(
        ops.ensemble_mlp,
        NETWORK | {"dropout_seeds": SEEDS},
        "ensemble_mlp",
        ("biases", "dropout_seeds"),
        {"dropout": RATES, "activation": STRINGS},
    ),
    "ops.ensemble_mlp_loss": Case(
        ops.ensemble_mlp_loss,
        NETWORK | {"target": TARGET, "loss": "mse", "sample_weight": WEIGHT, "dropout_seeds": SEEDS},
        "ensemble_mlp_loss",
        ("biases", "dropout_seeds", "sample_weight"),
        {
            "dropout": NUMBER,
            "temperature": NUMBER,
            "label_smoothing": NUMBER,
            "delta": NUMBER,
            "activation": STRINGS,
            "loss": STRING,
        },
    ),
    "ensemble_mlp_packed": Case(
        ensemble_mlp_packed,
        NETWORK | {"packed": prepack(WEIGHTS, BIASES)},
        "ensemble_mlp|ensemble_mlp_packed",
        ("biases",),
        {"activation": STRINGS},
        together=True,
    ),
    "ops.activation_strength": Case(
        ops.activation_strength,
        NETWORK | {"mean": STATISTICS[0], "std": STATISTICS[1]},
        "activation_strength",
        ("biases",),
        {"activation": STRINGS},
    ),
    "ops.masked_mlp": Case(ops.masked_mlp, MASKED_NETWORK, "masked_mlp", ("biases",), {"activation": STRING}),
    "ops.masked_mlp_loss": Case(
        ops.masked_mlp_loss,
        MASKED_NETWORK | {"target": TARGET, "loss": "mse", "sample_weight": WEIGHT},
        "masked_mlp_loss|ensemble_mlp_loss",
        ("biases", "sample_weight"),
        {
            "temperature": NUMBER,
            "label_smoothing": NUMBER,
            "delta": NUMBER,
            "activation": STRING,
            "loss": STRING,
        },
    ),
    "ops.keyed_permutation": Case(
        ops.keyed_permutation,
        {"keys": INDEX, "n": 10, "first": 2, "count": 3},
        "keyed_permutation",
        (),
        {"n": NUMBER, "first": NUMBER, "count": ("3", [3])},
    ),
    "ops.mask_channels": Case(
        ops.mask_channels,
        {"input": X, "masks": torch.ones(2, INPUTS, dtype=torch.bool), "index": INDEX},
        "mask_channels",
        ("index",),
    ),
    "ops.ensemble_conv2d": Case(
        ops.ensemble_conv2d,
        {"input": torch.randn(2, 3, 4, 4), "weight": torch.randn(E, 2, 3, 2, 2), "bias": torch.randn(E, 2)},
        "ensemble_conv2d",
        ("bias",),
        {"activation": STRING},
    ),
    "ops.ensemble_conv2d_sparse": Case(
        partial(ops.ensemble_conv2d_sparse, weight=ops.pack_sparse(torch.ones(E, 2, 3, 2, 2))),
        {"input": torch.randn(2, 3, 4, 4), "bias": torch.randn(E, 2)},
        "ensemble_conv2d_sparse|ensemble_conv2d",
        ("bias",),
        {"activation": STRING},
    ),
    "ops.ensemble_mlp_sparse": Case(
        partial(ops.ensemble_mlp_sparse, weights=[ops.pack_sparse(w) for w in WEIGHTS]),
        {"input": X, "biases": BIASES},
        "ensemble_mlp_sparse",
        ("biases",),
    ),
    "ops.pack_sparse": Case(
        ops.pack_sparse, {"weights": WEIGHTS[0], "masks": WEIGHTS[0] > 0}, "pack_sparse", ("masks",)
    ),
    "ops.ensemble_conv2d_int8": Case(
        partial(ops.ensemble_conv2d_int8, weight=in_bytes(torch.ones(E, 2, 3, 2, 2))),
        {"input": torch.randn(2, 3, 4, 4), "bias": torch.randn(E, 2)},
        "ensemble_conv2d_int8|ensemble_conv2d",
        ("bias",),
        {"activation": STRING},
    ),
    "ops.ensemble_mlp_int8": Case(
        partial(ops.ensemble_mlp_int8, weights=[in_bytes(w) for w in WEIGHTS]),
        {"input": X, "biases": BIASES},
        "ensemble_mlp_int8",
        ("biases",),
    ),
    "ops.pack_int8": Case(
        ops.pack_int8,
        {
            "weights": WEIGHTS[0],
            "input_scale": torch.ones(E),
            "input_zero_point": torch.zeros(E, dtype=torch.uint8),
        },
        "pack_int8",
    ),
    "ops.ensemble_embedding": Case(
        ops.ensemble_embedding, {"index": INDEX, "weight": TABLES[0]}, "ensemble_embedding"
    ),
    "ops.decorrelation_loss": Case(
        ops.decorrelation_loss,
        {"outputs": COMPONENTS},
        "decorrelation_loss",
        other={"kind": STRING, "reduction": STRING},
    ),
    "ops.predictive_uncertainty": Case(
        ops.predictive_uncertainty, {"logits": LOGITS}, "predictive_uncertainty"
    ),
    "ops.predictive_moments": Case(
        ops.predictive_moments,
        {"outputs": VALUES, "variances": VARIANCES},
        "predictive_moments",
        ("variances",),
    ),
    "nn.EnsembleMLP": Case(MLP, {"input": X, "dropout_seeds": SEEDS}, "ensemble_mlp", ("dropout_seeds",)),
    "nn.EnsembleMLP.loss": Case(
        by_loss(MLP),
        {"input": X, "target": TARGET, "sample_weight": WEIGHT},
        "ensemble_mlp_loss",
        ("sample_weight",),
    ),
    "nn.EnsembleLinear": Case(pyens.EnsembleLinear(E, INPUTS, OUTPUTS), {"input": X}, "ensemble_mlp"),
    "nn.PackedEnsembleMLP": Case(MLP.packed(), {"input": X}, "ensemble_mlp|ensemble_mlp_packed"),
    "nn.EnsembleBatchNorm": Case(pyens_nn.EnsembleBatchNorm(E, INPUTS), {"input": X}, "EnsembleBatchNorm"),
    "nn.EnsembleMLP.from_stacked": Case(
        pyens.EnsembleMLP.from_stacked,
        {"weights": WEIGHTS, "biases": BIASES},
        "from_stacked",
        ("biases",),
        called={"weights": r"weights(\[\d\])?", "biases": r"biases(\[\d\])?"},
    ),
    "nn.EnsembleEmbedding": Case(pyens.EnsembleEmbedding(E, 4, 2), {"index": INDEX}, "ensemble_embedding"),
    "nn.Ensemble": Case(
        own_loss,
        {"input": X, "target": TARGET, "sample_weight": WEIGHT},
        "loss|ensemble_mlp",
        ("sample_weight",),
        {"loss": STRING, "temperature": NUMBER, "label_smoothing": NUMBER, "delta": NUMBER},
        called={"input": r"(input|batch\[0\])"},
    ),
    "nn.TabularEnsemble": Case(
        TABULAR, {"categorical": COLUMNS, "numeric": X}, "TabularEnsemble|ensemble_embedding_concat"
    ),
    "nn.TabularEnsemble.loss": Case(
        by_loss(TABULAR),
        {"categorical": COLUMNS, "numeric": X, "target": TARGET, "sample_weight": WEIGHT},
        "TabularEnsemble|ensemble_embedding_concat|ensemble_mlp_loss",
        ("sample_weight",),
    ),
    "nn.MaskedMLP": Case(MASKED, {"input": X}, "MaskedMLP|masked_mlp"),
    "nn.MaskedMLP.loss": Case(
        by_loss(MASKED),
        {"input": X, "target": TARGET, "sample_weight": WEIGHT},
        "MaskedMLP|ensemble_mlp_loss",
        ("sample_weight",),
    ),
    "nn.MaskedMLP.loss grouped": Case(
        lambda **arguments: MASKED.loss(loss="mse", mode="grouped", **arguments),
        {"input": X, "target": TARGET, "sample_weight": WEIGHT},
        "MaskedMLP|ensemble_mlp_loss",
        ("sample_weight",),
    ),
    "nn.mc_dropout": Case(
        pyens_nn.mc_dropout(nn.Sequential(nn.Linear(INPUTS, 4), nn.ReLU(), nn.Linear(4, 1)), 2, 0.5),
        {"input": X},
        "MaskedMLP|masked_mlp",
    ),
    "nn.Masksembles1D": Case(
        pyens_nn.Masksembles1D(INPUTS, 2, 2.0),
        {"input": X, "index": INDEX},
        "Masksembles1D|mask_channels",
        ("index",),
    ),
    "nn.Masksembles2D": Case(
        pyens_nn.Masksembles2D(3, 2, 2.0), {"input": torch.randn(2, 3, 4, 4)}, "Masksembles2D|mask_channels"
    ),
    "nn.Masksembles3D": Case(
        pyens_nn.Masksembles3D(3, 2, 2.0),
        {"input": torch.randn(2, 3, 4, 4, 4)},
        "Masksembles3D|mask_channels",
    ),
    "nn.EnsembleBatchNorm2d": Case(
        pyens_nn.EnsembleBatchNorm2d(E, 3), {"input": torch.randn(2, 3, 4, 4)}, "EnsembleBatchNorm2d"
    ),
    "nn.EnsembleConv2d": Case(
        pyens_nn.EnsembleConv2d(E, 3, 2, 3), {"input": torch.randn(2, 3, 4, 4)}, "ensemble_conv2d"
    ),
    "nn.EnsembleSequential": Case(
        pyens_nn.EnsembleSequential(
            pyens_nn.EnsembleConv2d(E, 3, 2, 3), pyens_nn.Flatten(), pyens.EnsembleLinear(E, 8, 2)
        ),
        {"input": torch.randn(2, 3, 4, 4)},
        "ensemble_conv2d",
    ),
    "nn.ComponentModels": Case(
        positional(pyens_nn.ComponentModels([MLP, MLP], average="logit")), {"input": X}, "ensemble_mlp"
    ),
    "nn.ComponentModels.loss": Case(
        lambda input, target, sample_weight=None: pyens_nn.ComponentModels([MLP, MLP], average="logit").loss(
            input, target, loss="mse", sample_weight=sample_weight
        ),
        {"input": X, "target": TARGET, "sample_weight": WEIGHT},
        "ensemble_mlp|loss",
        optional=("sample_weight",),
        called={"input": r"input|batch\[0\]"},
    ),
    "nn.SparseEnsembleMLP": Case(MLP.sparse(), {"input": X}, "ensemble_mlp_sparse"),
    "nn.SparseEnsembleConv2d": Case(
        pyens_nn.EnsembleConv2d(E, 3, 2, 3).sparse(),
        {"input": torch.randn(2, 3, 4, 4)},
        "ensemble_conv2d_sparse|ensemble_conv2d",
    ),
    "nn.Int8EnsembleMLP": Case(MLP.quantize(X), {"input": X}, "ensemble_mlp_int8"),
    "nn.Int8EnsembleConv2d": Case(
        pyens_nn.EnsembleConv2d(E, 3, 2, 3).quantize(torch.randn(2, 3, 4, 4)),
        {"input": torch.randn(2, 3, 4, 4)},
        "ensemble_conv2d_int8|ensemble_conv2d",
    ),
    "nn.EnsembleMaxPool2d": Case(
        pyens_nn.EnsembleMaxPool2d(2), {"input": torch.randn(2, 3, 4, 4)}, "EnsembleMaxPool2d", any_dtype=True
    ),
    "nn.EnsembleAvgPool2d": Case(
        pyens_nn.EnsembleAvgPool2d(2), {"input": torch.randn(2, 3, 4, 4)}, "EnsembleAvgPool2d", any_dtype=True
    ),
    "nn.Flatten": Case(pyens_nn.Flatten(), {"input": torch.randn(2, 3, 4, 4)}, "Flatten", any_dtype=True),
    "nn.MaskedConv2d": Case(
        pyens_nn.MaskedConv2d(3, 2, 3, 2, 2.0),
        {"input": torch.randn(2, 3, 4, 4)},
        "Masksembles2D|mask_channels",
    ),
    "nn.forward_tiled": Case(
        lambda input: pyens_nn.forward_tiled(pyens_nn.Masksembles1D(INPUTS, 2, 2.0), input),
        {"input": X},
        "forward_tiled|mask_channels",
    ),
    "losses.decorrelation_loss": Case(
        losses.decorrelation_loss, {"outputs": COMPONENTS}, "decorrelation_loss", other={"kind": STRING}
    ),
    "losses.pearson_decorrelation_loss": Case(
        losses.pearson_decorrelation_loss,
        {"outputs": COMPONENTS},
        "pearson_decorrelation_loss",
        other={"eps": NUMBER, "reduction": STRING},
    ),
    "losses.gram_schmidt": Case(losses.gram_schmidt, {"outputs": COMPONENTS}, "gram_schmidt"),
    "losses.gram_schmidt_decorrelation_loss": Case(
        losses.gram_schmidt_decorrelation_loss,
        {"outputs": COMPONENTS},
        "gram_schmidt_decorrelation_loss",
        other={"kind": STRING, "reduction": STRING},
    ),
    "losses.difference_loss": Case(
        losses.difference_loss,
        {"outputs": COMPONENTS},
        "difference_loss",
        other={"eps": NUMBER, "distance": STRING, "reduction": STRING},
    ),
    "losses.cross_entropy_difference_loss": Case(
        losses.cross_entropy_difference_loss,
        {"outputs": COMPONENTS},
        "cross_entropy_difference_loss",
        other={"eps": NUMBER},
    ),
    "losses.combine": Case(
        losses.combine,
        {"outputs": COMPONENTS, "weights": torch.full((E,), 1 / E)},
        "combine",
        ("weights",),
        {"space": STRING},
    ),
    "losses.Gate": Case(losses.Gate(INPUTS, E), {"features": X}, "Gate"),
    "losses.RunningDecorrelationLoss": Case(
        losses.RunningDecorrelationLoss(E, OUTPUTS), {"outputs": COMPONENTS}, "RunningDecorrelationLoss"
    ),
    **{
        f"metrics.{name}": metric(name, **PROBABILITIES)
        for name in (
            "accuracy",
            "brier_decomposition",
            "brier_score",
            "classwise_calibration_error",
            "confusion_matrix",
            "expected_calibration_error",
            "nll",
            "reliability_curve",
        )
    },
    "metrics.confidence_curve": Case(
        metrics.confidence_curve, PROBABILITIES, "confidence_curve", ("labels",)
    ),
    "metrics.auroc": metric("auroc", scores=SCORES, positive=POSITIVE),
    "metrics.aurc": metric("aurc", confidence=SCORES, losses=SCORES),
    "metrics.risk_coverage_curve": metric("risk_coverage_curve", confidence=SCORES, losses=SCORES),
    "metrics.delta_ratio": Case(
        metrics.delta_ratio,
        {"universe": VALUES, "sizes": [2]},
        "delta_ratio",
        other={"sizes": (2, "ab", None, [2.5]), "draws": ("a", 2.5, None), "variation": STRING},
    ),
    "metrics.value_variation": metric("value_variation", outputs=VALUES),
    "metrics.distribution_variation": metric("distribution_variation", probabilities=MEMBERS),
    "metrics.variation_coefficient": metric("variation_coefficient", variation=SCORES, mean=SCORES),
    **{
        f"metrics.{name}": metric(name, probabilities=MEMBERS)
        for name in (
            "expected_entropy",
            "hamming_prediction_difference",
            "mutual_information",
            "prediction_difference",
            "predictive_entropy",
            "relative_prediction_difference",
        )
    },
    "metrics.label_prediction_difference": metric(
        "label_prediction_difference", probabilities=MEMBERS, labels=LABELS
    ),
    "metrics.predictive_variance": metric("predictive_variance", outputs=VALUES),
    "metrics.ensemble_crps": metric("ensemble_crps", outputs=VALUES, targets=SCORES),
    "metrics.gaussian_crps": metric("gaussian_crps", **TWO, targets=SCORES),
    "metrics.gaussian_nll": metric("gaussian_nll", **TWO, targets=SCORES),
    "metrics.r_squared": metric("r_squared", predictions=SCORES, targets=VALUES[0]),
    "metrics.rmse": metric("rmse", predictions=SCORES, targets=VALUES[0]),
    "metrics.pearson": metric("pearson", x=SCORES, y=VALUES[0]),
    "metrics.spearman": metric("spearman", x=SCORES, y=VALUES[0]),
    "metrics.interval_coverage": metric("interval_coverage", lower=SCORES, upper=SCORES + 1, targets=SCORES),
    "metrics.mixture_cdf": metric("mixture_cdf", **TWO, values=SCORES),
    "metrics.mixture_quantile": Case(
        metrics.mixture_quantile,
        {**TWO, "probability": 0.5},
        "mixture_quantile",
        other={"probability": NUMBER},
    ),
    "metrics.mixture_interval": Case(
        metrics.mixture_interval, TWO, "mixture_interval", other={"coverage": NUMBER}
    ),
    "metrics.value_at_risk": Case(metrics.value_at_risk, TWO, "value_at_risk", other={"level": NUMBER}),
    **{
        f"metrics.{name}": metric(name, scores_in=SCORES, scores_out=SCORES + 1)
        for name in ("ood_aupr", "ood_auroc", "ood_fpr95")
    },
    "metrics.CalibrationError": streaming(metrics.CalibrationError, **PROBABILITIES),
    "metrics.PredictiveUncertainty": streaming(metrics.PredictiveUncertainty, members=LOGITS),
    "metrics.PredictiveMoments": Case(
        lambda **arguments: metrics.PredictiveMoments().update(**arguments),
        {"members": VALUES, "variances": VARIANCES},
        r"PredictiveMoments\.update",
        ("variances",),
    ),
    "masks.mask_iou": Case(masks.mask_iou, {"masks": MASKS[0]}, "mask_iou"),
    "masks.generate_masks": Case(
        masks.generate_masks,
        {"num_ones": 2, "num_masks": 2, "scale": 2.0},
        "generate_masks",
        other={"num_ones": ("2", 2.5, None), "num_masks": ("2", 2.5, None), "scale": NUMBER},
    ),
    "masks.masks_for_channels": Case(
        masks.masks_for_channels,
        {"channels": 4, "num_masks": 2, "scale": 2.0},
        "masks_for_channels",
        other={"channels": ("2", 2.5, None), "num_masks": ("2", 2.5, None), "scale": NUMBER},
    ),
    "masks.expected_iou": Case(masks.expected_iou, {"scale": 2.0}, "expected_iou", other={"scale": NUMBER}),
    "masks.model_size": Case(
        masks.model_size,
        {"in_features": 3, "num_ones": [2], "out_features": 1, "num_masks": 2, "scale": 2.0},
        "model_size",
        other={"in_features": ("2", 2.5, None), "num_ones": (2, None, ["a"]), "scale": NUMBER},
    ),
    "variation.strength_of": Case(
        lambda **arguments: variation.strength_of(ONE, arguments.pop("input"), **arguments),
        {"input": X, "mean": STATISTICS[0], "std": STATISTICS[1]},
        "strength_of|activation_strength",
        ("mean", "std"),
        together=True,
    ),
    "variation.strength_of a module": Case(
        lambda **arguments: variation.strength_of(nn.Sequential(nn.ReLU()), X[:, :1], **arguments),
        {"mean": torch.zeros(1), "std": torch.ones(1)},
        "strength_of",
        ("mean", "std"),
        together=True,
    ),
    "variation.strength_features": Case(
        variation.strength_features,
        {"strength": STRENGTH},
        "strength_features",
        other={"strength": (3, X, None)},
    ),
    "variation.ActivationStatistics": streaming(variation.ActivationStatistics, activations=X),
    "variation.VariationHead": Case(
        HEAD, {"value": STRENGTH.value, "active": STRENGTH.active}, "VariationHead"
    ),
    "variation.VariationModel": Case(
        lambda **arguments: variation.VariationModel(ONE, HEAD, **arguments),
        {"mean": STATISTICS[0], "std": STATISTICS[1]},
        "VariationModel",
    ),
    "variation.VariationModel.forward": Case(
        positional(variation.VariationModel(ONE, HEAD, *STATISTICS)), {"input": X}, "activation_strength"
    ),
    "decisions.coverage_threshold": Case(
        decisions.coverage_threshold,
        {"confidence": SCORES, "coverage": 0.5},
        "coverage_threshold",
        other={"coverage": NUMBER},
    ),
    "decisions.risk_threshold": Case(
        decisions.risk_threshold,
        {"confidence": SCORES, "losses": SCORES, "risk": 0.5},
        "risk_threshold",
        other={"risk": NUMBER},
    ),
    "decisions.predict_or_abstain": Case(
        decisions.predict_or_abstain,
        {"probabilities": P, "threshold": 0.5, "confidence": SCORES},
        "predict_or_abstain",
        ("confidence",),
        {"threshold": ("a", None, [[0.1], [0.2]])},
    ),
    "decisions.uncertainty_sampling": Case(
        decisions.uncertainty_sampling,
        {"probabilities": MEMBERS, "count": 1},
        "uncertainty_sampling",
        other={"count": ("a", 1.5, None), "by": STRING},
    ),
    "decisions.most_uncertain": Case(
        decisions.most_uncertain,
        {"scores": SCORES, "count": 1},
        "most_uncertain",
        other={"count": ("a", 1.5, None)},
    ),
    **{
        f"adapters.{name}": Case(getattr(adapters, name), {"x": COMPONENTS}, name, any_dtype=True)
        for name in ("from_tabm", "to_tabm", "to_masksembles")
    },
    "adapters.from_masksembles": Case(
        adapters.from_masksembles,
        {"x": X, "ensemble_size": 2},
        "from_masksembles",
        other={"ensemble_size": ("a", 1.5, None)},
        any_dtype=True,
    ),
    "training.fit": Case(trained, {"data": [X, TARGET]}, "fit"),
}
# What is no function of tensors: named tuples, constants, and what builds or changes modules.
NOT_CALLED_WITH_TENSORS = {
    "ops": {"ActivationStrength", "Int8Weight", "Moments", "SparseRows", "Uncertainty"},
    "nn": {
        "Residual",
        "fold_batchnorm",
        "initialize_",
        "insert_masksembles_",
        "set_mask_mode_",
    },  # or by torch's modules
    "metrics": {
        "BrierDecomposition",
        "ProgressiveScores",  # its own test has what it refuses
        "ConfidenceCurve",
        "DeltaRatio",
        "Interval",
        "ReliabilityCurve",
        "RiskCoverageCurve",
    },
    "decisions": {"ABSTAIN"},
    "variation": {"ACTIVATION_MODULES", "ActivationStrength", "VariationEstimator", "fit_together"},
}


@pytest.mark.parametrize(
    "name", ["adapters", "decisions", "losses", "masks", "metrics", "nn", "ops", "variation"]
)
def test_every_public_name_is_here(name: str) -> None:
    module = getattr(pyens, name)
    here = {case.split()[0].split(".")[1] for case in CASES if case.startswith(f"{name}.")}
    assert here | NOT_CALLED_WITH_TENSORS.get(name, set()) == set(module.__all__)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_right_arguments_are_right(case: Case) -> None:
    case.call(**case.right)
    for name in case.optional:
        if not case.together:
            case.call(**case.right | {name: None})


class Something:
    """No tensor of any kind."""


def wrong_tensors(right: torch.Tensor) -> dict[str, Any]:
    """What may come in the place of a tensor, by kind."""
    real = right.float()
    wrong = {
        "numpy": right.numpy(),
        "list of numbers": right.tolist(),
        "batch": [right, right],
        "tuple batch": (right, right),
        "dict": {"x": right},
        "str": "x",
        "number": 1.5,
        "object": Something(),
        "module": nn.Linear(2, 2),
        "COO": right.to_sparse(),
        "quantized": torch.quantize_per_tensor(real, 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([real, real]),
        "jagged": torch.nested.nested_tensor([real, real], layout=torch.jagged),
        "complex": right.to(torch.complex64),
        "float8": right.to(torch.float8_e4m3fn),
    }
    if right.dim() > 1 and right.dtype == torch.float32:
        wrong["CSR"] = right.to_sparse_csr() if right.dim() in (2, 3) else right.to_sparse()
        wrong["mkldnn"] = right.to_mkldnn()
    return wrong


def wrong_values(case: Case, argument: str) -> dict[str, Any]:
    """What may come in the place of this argument of a call that is right otherwise."""
    right = case.right.get(argument)
    wrong: dict[str, Any] = {}
    if isinstance(right, torch.Tensor):
        wrong = wrong_tensors(right)
    elif isinstance(right, list) and isinstance(right[0], torch.Tensor):
        for kind, value in wrong_tensors(right[0]).items():
            wrong[f"a list with {kind}"] = [value, *right[1:]]
        wrong |= {"stacked": torch.stack([right[0]] * len(right)), "number": 1, "object": Something()}
    if case.any_dtype:
        wrong = {kind: value for kind, value in wrong.items() if kind not in ("complex", "float8")}
    if wrong and argument not in case.optional:
        wrong["None"] = None
    return wrong | {f"{i}": value for i, value in enumerate(case.other.get(argument, ()))}


CALLS = [
    pytest.param(case, argument, id=f"{name}-{argument}")
    for name, case in CASES.items()
    for argument in {**case.right, **case.other}
]


@pytest.mark.filterwarnings("ignore:.*(prototype|beta|deprecated|will be removed).*")
@pytest.mark.parametrize(("case", "argument"), CALLS)
def test_wrong_kinds_are_refused_by_name(case: Case, argument: str) -> None:
    said = rf"\b({case.names}): {case.called.get(argument, argument)}(\W.*)?: expected .*, got "
    bad = []
    for kind, value in wrong_values(case, argument).items():
        if case.call is trained and kind == "a list with numpy":
            continue  # which `fit` takes
        try:
            found: Any = case.call(**case.right | {argument: value})
        except (TypeError, ValueError) as error:
            found = str(error)
            if re.search(said, found, re.DOTALL) and len(found) <= SHORT:
                continue
        except Exception as error:
            found = repr(error)
        bad.append(f"{kind}: {str(found)[:SHORT]}")
    assert not bad, "\n".join(bad)


@pytest.mark.filterwarnings("ignore:.*will be removed")
def test_hints_say_what_is_meant() -> None:
    for value, hint in (
        (X.numpy(), "got numpy.ndarray: torch.from_numpy makes a tensor of it"),
        (X.tolist(), "got list: torch.tensor makes a tensor of numbers"),
        ([X, TARGET], "got list of 2, with tensors in it: of a batch of a DataLoader, .* entry 0"),
        (X.to_sparse(), "got torch.sparse_coo: to_dense makes a dense one"),
        (
            torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
            "got a quantized one: dequantize makes a dense one",
        ),
    ):
        with pytest.raises(TypeError, match=rf"^ensemble_mlp: input: expected a .*tensor, {hint}"):
            MLP(value)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, TARGET), batch_size=2)
    with pytest.raises(TypeError, match=r"DataLoader"):
        MLP(next(iter(loader)))


def test_others_are_refused_by_name_too() -> None:
    masked_3d = pyens_nn.Masksembles1D(INPUTS, 2, 2.0)
    for call, said in (
        (lambda: MLP.member("0"), "member: i"),
        (lambda: MASKED.member(0.5), "member: i"),
        (lambda: masked_3d(X.unsqueeze(1), [0] * B), "Masksembles1D: index"),
        (lambda: MASKED(X, mode="random", seed="1"), "MaskedMLP: seed"),
        (lambda: pyens_nn.set_mask_mode_(MASKS, "random"), "set_mask_mode_: module"),
        (lambda: pyens_nn.forward_tiled(MASKS, X), "forward_tiled: module"),
        (lambda: metrics.CalibrationError().merge([1]), r"CalibrationError\.merge: other"),
        (lambda: metrics.PredictiveMoments().merge([1]), r"PredictiveMoments\.merge: other"),
        (lambda: metrics.PredictiveUncertainty().merge([1]), r"PredictiveUncertainty\.merge: other"),
        (lambda: variation.ActivationStatistics().merge([1]), r"ActivationStatistics\.merge: other"),
        (lambda: metrics.confidence_curve(P, thresholds="a"), "confidence_curve: thresholds"),
        (lambda: MLP(X, members=3), "EnsembleMLP: members"),
        (lambda: MLP(X, members=[0.5]), "EnsembleMLP: members"),
        (lambda: MLP(X, members=[True, False]), "EnsembleMLP: members"),
    ):
        with pytest.raises(TypeError, match=rf"^{said}: expected .*, got [\w\[]+"):
            call()
    for wrong in (3, [3], ["swish"], "elu(x)"):
        with pytest.raises(ValueError, match=r"activation: expected .*, got"):
            pyens.EnsembleMLP(E, INPUTS, [HIDDEN], OUTPUTS, activation=wrong)


def test_numbers_out_of_range_are_short_too() -> None:
    with pytest.raises(TypeError, match=r"^ensemble_mlp: dropout: expected a number, got int$"):
        ops.ensemble_mlp(X, WEIGHTS, dropout=10**400)


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_modules_of_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    modules = {
        r"ensemble_mlp: weights\[0\]": pyens.EnsembleMLP(E, INPUTS, [HIDDEN], OUTPUTS).to(dtype),
        r"ensemble_embedding: weight": pyens.EnsembleEmbedding(E, 4, 2, dtype=dtype),
        r"MaskedMLP: input|masked_mlp: weights\[0\]": pyens_nn.MaskedMLP(
            E, INPUTS, [HIDDEN], OUTPUTS, scale=2.0
        ).to(dtype),
    }
    for said, module in modules.items():
        for input in (X, X.to(dtype)) if "embedding" not in said else (INDEX,):
            with pytest.raises(TypeError, match=rf"^({said}|ensemble_mlp: input): expected .*, got "):
                module(input)


def test_any_sequence_of_tensors_is_a_list() -> None:
    expected = ops.ensemble_mlp(X, WEIGHTS, BIASES)
    for make in (tuple, nn.ParameterList, iter, lambda tensors: (tensor for tensor in tensors)):
        assert torch.equal(ops.ensemble_mlp(X, make(WEIGHTS), make(BIASES)), expected)
    with pytest.raises(ValueError, match=r"weights\[1\]: expected in = out of weights\[0\]"):
        ops.ensemble_mlp(X, iter(WEIGHTS[:1] * 2), BIASES)


def test_within_transforms_and_for_derivatives() -> None:
    for run in (torch.func.grad, torch.func.vmap):
        with pytest.raises(TypeError, match=r"^ensemble_mlp: biases: expected a list of tensors, got one"):
            run(lambda x: ops.ensemble_mlp(x.reshape(1, -1), WEIGHTS, BIASES[0]).sum())(X)
    with pytest.raises(TypeError, match=r"^ensemble_mlp_loss: target: expected a tensor, got list"):
        torch.func.grad(lambda w: ops.ensemble_mlp_loss(X, [1.0], [w, WEIGHTS[1]], loss="mse").sum())(
            WEIGHTS[0]
        )


class Logged(torch.Tensor):
    """A tensor that writes down what is called with it."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


class Mode(torch.overrides.TorchFunctionMode):
    """A mode that writes down what is called in it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


class Stranger:
    """No tensor; answers torch's functions itself."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return str(func)


OPERATIONS = [name for name in CASES if name.startswith("ops.") and not name.startswith("ops.pack")]


@pytest.mark.parametrize("name", OPERATIONS)
def test_classes_and_modes_that_override_functions_see_the_operation(name: str) -> None:
    case, op = CASES[name], name.removeprefix("ops.").replace("masked_mlp", "ensemble_mlp")
    expected = case.call(**case.right)
    with Mode() as mode:
        case.call(**case.right)
    assert f"pyens.{op}.default" in mode.seen
    for argument, right in case.right.items():
        if isinstance(right, (str, int)):
            continue
        in_list = isinstance(right, list)
        logged = [right[0].as_subclass(Logged), *right[1:]] if in_list else right.as_subclass(Logged)
        Logged.seen.clear()
        found = case.call(**case.right | {argument: logged})
        if argument != "masks" or op == "mask_channels":  # of masked_mlp the masks reach no operation
            assert f"pyens.{op}.default" in Logged.seen
        for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
            if argument != "masks" or op == "mask_channels":
                assert type(one) is Logged
            assert torch.equal(one.as_subclass(torch.Tensor), other)


def test_what_is_no_tensor_may_override_functions_too() -> None:
    assert ops.ensemble_mlp(Stranger(), WEIGHTS) == "pyens.ensemble_mlp.default"
    assert ops.ensemble_mlp(X, [Stranger(), WEIGHTS[1]]) == "pyens.ensemble_mlp.default"


def test_a_class_that_overrides_functions_has_gradients_and_modules() -> None:
    x = X.clone().as_subclass(Logged).requires_grad_()
    Logged.seen.clear()
    MLP(x).sum().backward()
    assert "pyens.ensemble_mlp.default" in Logged.seen
    plain = X.clone().requires_grad_()
    MLP(plain).sum().backward()
    assert torch.equal(x.grad.as_subclass(torch.Tensor), plain.grad)
    with torch.device("cpu"):  # a mode of torch's own
        assert torch.equal(MLP(X), MLP(plain.detach()))


def test_on_meta() -> None:
    packed = prepack(WEIGHTS, BIASES)
    x, weights, biases = X.to("meta"), [w.to("meta") for w in WEIGHTS], [b.to("meta") for b in BIASES]
    for arguments in (
        (X, packed.to("meta"), WEIGHTS, BIASES),
        (x, packed, weights, biases),
        (x, packed.to("meta"), WEIGHTS, BIASES),
        (X, packed.to("meta"), WEIGHTS),
    ):
        with pytest.raises(TypeError, match=r"(packed|input): expected the device of weights\[0\]"):
            ensemble_mlp_packed(*arguments)
    assert ensemble_mlp_packed(x, packed.to("meta"), weights, biases).is_meta
    with pytest.raises(TypeError, match=r"^nll: probabilities: expected a tensor with values, got"):
        metrics.nll(P.to("meta"), LABELS)


@pytest.mark.parametrize("mode", ["tiled", "grouped", "round_robin", "random"])
def test_masked_models_on_meta_say_shapes(mode: str) -> None:
    network = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUTPUTS))
    for model in (
        pyens_nn.MaskedMLP(E, INPUTS, [HIDDEN, 7], OUTPUTS, scale=2.0, device="meta"),
        pyens_nn.MaskedMLP(E, INPUTS, [HIDDEN], OUTPUTS, scale=2.0).to("meta"),
        pyens_nn.mc_dropout(network, E, 0.5).to("meta"),
        pyens_nn.mc_dropout(network.to("meta"), E, 0.5),
    ):
        output = model(X.to("meta"), mode=mode)
        assert output.is_meta and output.shape == ((E, B, OUTPUTS) if mode == "tiled" else (B, OUTPUTS))
        loss = model.loss(X.to("meta"), TARGET.to("meta"), loss="mse", mode=mode)
        assert loss.is_meta and loss.shape == ((E,) if mode == "tiled" else ())
        with pytest.raises(ValueError, match=r"stacked: expected masks .*, got masks on meta"):
            model.stacked()


def test_absurd_sizes_are_refused_at_once() -> None:
    huge = 2**62
    mlp = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    for call, said in (
        (lambda: pyens_nn.Masksembles1D(huge, 3, 2.0), "Masksembles1D: channels"),
        (lambda: pyens_nn.Masksembles2D(2**30, 3, 2.0), "Masksembles2D: channels"),
        (lambda: pyens_nn.Masksembles1D(3, 2**39, 2.0), "Masksembles1D: channels"),
        (lambda: pyens_nn.MaskedConv2d(2**30, 1, 1, 3, 2.0), "MaskedConv2d: in_channels"),
        (lambda: pyens_nn.MaskedMLP(3, 2, [4, 2**30], 1, scale=2.0), r"MaskedMLP: hidden_features\[1\]"),
        (lambda: pyens_nn.mc_dropout(mlp, 2**30, 0.5), "mc_dropout: num_masks"),
        (lambda: pyens_nn.insert_masksembles_(mlp, 2**30, 2.0), r"insert_masksembles_: num_masks \(of 2\)"),
        (lambda: masks.masks_for_channels(2**30, 3, 2.0), "masks_for_channels: channels"),
        (lambda: masks.generate_masks(2**30, 3, 2.0), "generate_masks: num_ones"),
        (lambda: masks.generate_masks(2, 3, 1e300), "generate_masks: num_ones"),
        (lambda: pyens.EnsembleMLP(huge, 2, [3], 1), "EnsembleMLP: ensemble_size"),
        (lambda: pyens.EnsembleLinear(2, huge, 1), "EnsembleLinear: in_features"),
        (lambda: pyens.EnsembleEmbedding(2, huge, 1), "EnsembleEmbedding: num_embeddings"),
    ):
        with pytest.raises(ValueError, match=rf"^{said}: expected .*, got "):
            call()
    assert type(mlp[2]) is nn.Linear
