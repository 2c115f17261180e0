"""The variation estimator: learns an ensemble's prediction variation from one member's hidden units."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

try:
    from sklearn.base import BaseEstimator, RegressorMixin
    from sklearn.utils import Tags, assert_all_finite
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "pyens.variation.VariationEstimator needs scikit-learn 1.6 or later: pip install pyens[variation]"
    ) from error

from pyens import metrics
from pyens._types import ActivationStrength, StrengthFeatures, VariationTask
from pyens.nn import EnsembleMLP
from pyens.optim import fused
from pyens.training import fit
from pyens.variation.head import FEATURES, MAX_DEVIATIONS, TASKS, VariationHead, strength_features
from pyens.variation.model import VariationModel

Strength = ActivationStrength | Tensor | np.ndarray


def _classifies(estimator: VariationEstimator) -> bool:
    return estimator.task == "classification"


class VariationEstimator(RegressorMixin, BaseEstimator):
    """Estimates from the hidden units of one model how much an ensemble of such models would differ.

        strength = strength_of(model, x, mean=statistics.mean, std=statistics.std)
        estimator = VariationEstimator().fit(strength, pv)       # pv [B] of an ensemble on the same x
        estimator.predict(strength_of(model, new, mean=statistics.mean, std=statistics.std))

    An MLP that is trained with Adam and early stopping. A scikit-learn estimator: it can be cloned,
    cross-validated and searched over. Its X is the table `[B, 2 ΣH]` that `strength_features` makes: first
    the values of all units, then whether they are active. Wherever X is expected an `ActivationStrength` will
    do.

    Args:
        task: "regression" predicts the PV, clipped to [0, mean + 3 std] of the PVs that it was trained on;
            "classification" predicts one of the buckets.
        features: which columns of X are used: "binary" (active), "value", or "both".
        hidden_features: widths of the MLP's hidden layers.
        batch_size, learning_rate: of Adam.
        max_epochs: the most it trains for.
        validation: the share of the examples held out for early stopping; 0: no early stopping.
        patience: epochs without a lower validation loss after which it stops. The weights are those of the
            best epoch.
        buckets: how many buckets of equal size the PVs of training fall into, by their percentiles. Bucket 0
            has the lowest; a PV at a threshold belongs to the higher one.
        seed: of the initial weights, the validation examples and the order of the others.
        progress: a bar; needs tqdm.

    Attributes:
        head_: the `VariationHead` that was trained.
        history_: the `pyens.training.History` of its training.
        n_features_in_: columns of X.

    The same bits for the same arguments, data and seed, on the CPU, for any number of threads. The PVs are
    standardised for training, so the learning rate does not depend on their unit. Values count up to 10
    deviations from the mean, for units that were all but silent in training.

    Raises:
        ValueError: no example or only one; NaN or Inf in X or PV, a PV below 0; X of another width than in
            training; features or a task other than those it was fitted with; an unknown task or features.
        sklearn.exceptions.NotFittedError: before fit.
        ImportError: without scikit-learn.

    Source: "Beyond Point Estimate", section 6.1. There the target is not standardised
    and values have no limit; patience and the share for early stopping are not given.
    """

    head_: VariationHead

    def __init__(
        self,
        *,
        task: VariationTask = "regression",
        features: StrengthFeatures = "both",
        hidden_features: Sequence[int] = (100, 50),
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        max_epochs: int = 150,
        validation: float = 0.1,
        patience: int = 10,
        buckets: int = 5,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.task = task
        self.features = features
        self.hidden_features = hidden_features
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.max_epochs = max_epochs
        self.validation = validation
        self.patience = patience
        self.buckets = buckets
        self.seed = seed
        self.progress = progress

    @classmethod
    def from_model(cls, model: VariationModel) -> Self:
        """The fitted estimator that a `VariationModel` was made of, such as one read from a file."""
        estimator = cls(**model.head.params)
        estimator.head_ = model.head
        estimator.n_features_in_ = 2 * model.units
        return estimator

    def fit(self, X: Strength, y: Tensor | np.ndarray) -> Self:
        """Trains on the strength of B examples and their PV, `[B]`."""
        fit_together([self], [X], [y])
        return self

    def predict(self, X: Strength) -> np.ndarray:
        """PV, float32 `[B]`; of a classification the bucket, int64 `[B]`."""
        if self.task == "classification":
            return self.predict_bucket(X)
        return self._estimate(X)

    def predict_bucket(self, X: Strength) -> np.ndarray:
        """int64 `[B]`: the most probable bucket; of a regression the one that the PV falls into."""
        estimate = self._estimate(X)
        return np.argmax(estimate, 1) if self.task == "classification" else self._bucket(estimate)

    @available_if(_classifies)
    def predict_proba(self, X: Strength) -> np.ndarray:
        """float32 `[B, buckets]`, of a classification."""
        return self._estimate(X)

    def score(self, X: Strength, y: Tensor | np.ndarray) -> float:
        """R² of the PV; of a classification the share of the examples whose bucket is right."""
        pv = np.asarray(_array(y))
        assert_all_finite(pv, input_name="y")
        if self.task == "classification":
            probabilities, bucket = self._estimate(X), self._bucket(pv)
            return metrics.accuracy(torch.from_numpy(probabilities), torch.from_numpy(bucket)).item()
        predicted, expected = (torch.from_numpy(np.float64(values)) for values in (self.predict(X), pv))
        return metrics.r_squared(predicted, expected).item()

    def _bucket(self, pv: np.ndarray) -> np.ndarray:
        check_is_fitted(self)
        return np.searchsorted(self.head_.thresholds.numpy(), pv, side="right")

    def _estimate(self, X: Strength) -> np.ndarray:
        check_is_fitted(self)
        for name in ("task", "features"):
            fitted, now = getattr(self.head_, name), getattr(self, name)
            if fitted != now:
                raise ValueError(
                    f"VariationEstimator: {name}: expected {fitted!r} as it was fitted with, got {now!r}: "
                    "fit again"
                )
        table = validate_data(self, _table(X), dtype=np.float32, reset=False)
        with torch.no_grad():
            return self.head_.estimate(self._columns(table)).numpy()

    def _columns(self, table: np.ndarray) -> Tensor:
        """What the MLP takes of X, `[B, F]`."""
        width = table.shape[1]
        if self.features != "both" and width % 2:
            raise ValueError(
                f"VariationEstimator: X: expected values and as many active for features={self.features!r}, "
                f"got {width} columns"
            )
        start, stop = {"both": (0, width), "value": (0, width // 2), "binary": (width // 2, width)}[
            self.features
        ]
        return torch.from_numpy(np.require(table[:, start:stop], requirements=["C", "W"]))

    def _check_parameters(self) -> None:
        for name, choices in (("task", TASKS), ("features", FEATURES)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"VariationEstimator: {name}: expected one of {', '.join(choices)}, "
                    f"got {getattr(self, name)!r}"
                )
        if not isinstance(self.buckets, Integral) or self.buckets < 2:
            raise ValueError(f"VariationEstimator: buckets: expected an integer from 2, got {self.buckets!r}")
        if not isinstance(self.seed, Integral):
            raise TypeError(f"VariationEstimator: seed: expected an integer, got {self.seed!r}")

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = True
        if self.task == "classification":  # of buckets, from PVs: neither kind of scikit-learn's
            tags.estimator_type = None
            tags.regressor_tags = None
        return tags


def fit_together(
    estimators: Sequence[VariationEstimator],
    strengths: Sequence[Strength],
    variations: Sequence[Tensor | np.ndarray],
) -> list[VariationEstimator]:
    """Fits several estimators at once, such as one for each target model: bit for bit as each alone would be.

    They are the members of one `EnsembleMLP`, each with its own data and its own end.

    Args:
        estimators: with the same parameters.
        strengths: what `fit` takes as X, one for each, all of the same shape.
        variations: what `fit` takes as y, one for each.

    Returns:
        The estimators.

    Raises:
        ValueError: what `VariationEstimator.fit` refuses; other parameters or shapes than those of the first.
    """
    if not len(estimators) == len(strengths) == len(variations) > 0:
        raise ValueError(
            "fit_together: estimators: expected as many as strengths and variations, at least one, got "
            f"{len(estimators)}, {len(strengths)} and {len(variations)}"
        )
    first = estimators[0]
    params = first.get_params()
    columns, pvs = [], []
    for i, (estimator, X, y) in enumerate(zip(estimators, strengths, variations, strict=True)):
        if estimator.get_params() != params:
            raise ValueError(f"fit_together: estimators[{i}]: expected {first}, got {estimator}")
        estimator._check_parameters()
        table, pv = validate_data(
            estimator, _table(X), _array(y), dtype=np.float32, y_numeric=True, ensure_min_samples=2
        )
        if pv.min() < 0:
            raise ValueError(f"VariationEstimator: y: expected variations >= 0, got {pv.min():.6g}")
        columns.append(estimator._columns(table))
        pvs.append(torch.from_numpy(pv.astype(np.float64)))
        if columns[i].shape != columns[0].shape:
            raise ValueError(
                f"fit_together: strengths[{i}]: expected the shape of the first, {list(columns[0].shape)}, "
                f"got {list(columns[i].shape)}"
            )
    _train(estimators, torch.stack(columns).clamp_(-MAX_DEVIATIONS, MAX_DEVIATIONS), torch.stack(pvs), params)
    return list(estimators)


def _train(
    estimators: Sequence[VariationEstimator], columns: Tensor, pvs: Tensor, params: dict[str, Any]
) -> None:
    """Gives every estimator its head, from columns `[E, B, F]` and PVs `[E, B]` in float64."""
    shared = estimators[0]
    members = len(estimators)
    shares = torch.arange(1, shared.buckets, dtype=torch.float64) / shared.buckets
    thresholds = torch.stack([_quantiles(pv, shares) for pv in pvs])
    mean, std = pvs.mean(1, keepdim=True), pvs.std(1, correction=0, keepdim=True)
    if classifies := shared.task == "classification":
        target = torch.searchsorted(thresholds, pvs, right=True)
    else:
        target = ((pvs - mean) / torch.where(std > 0, std, 1)).float().unsqueeze(2)
    seeds = [shared.seed] * members
    mlp = EnsembleMLP(
        members,
        columns.shape[2],
        shared.hidden_features,
        shared.buckets if classifies else 1,
        seeds=seeds,
    )
    history = fit(
        mlp,
        (columns, target),
        loss="cross_entropy" if classifies else "mse",
        epochs=shared.max_epochs,
        batch_size=shared.batch_size,
        optimizer=lambda p: fused(torch.optim.Adam, p, lr=shared.learning_rate),
        seed=shared.seed,
        seeds=seeds,
        validation=shared.validation,
        early_stopping=shared.patience if shared.validation > 0 else None,
        own_data=True,
        progress=shared.progress,
    )
    if not classifies:  # the last layer answers in the units of the PV
        with torch.no_grad():
            weight, bias = mlp.weights[-1], mlp.biases[-1]
            weight.copy_(weight.double() * std.unsqueeze(2))
            bias.copy_(bias.double() * std + mean)
    limit = (mean + 3 * std).squeeze(1).float()
    for i, estimator in enumerate(estimators):
        estimator.head_ = VariationHead(mlp.select([i]), params, limit[i].clone(), thresholds[i].clone())
        estimator.history_ = history.member(i)


def _quantiles(pv: Tensor, shares: Tensor) -> Tensor:
    # numpy's, for torch refuses more than 16 million values.
    return torch.from_numpy(np.quantile(pv.numpy(), shares.numpy()))


def _table(X: Strength) -> Any:
    return _array(strength_features(X) if isinstance(X, ActivationStrength) else X)


def _array(values: Any) -> Any:
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # numpy has no bfloat16
