"""What one model's hidden units say about how much an ensemble of such models would differ.

    model = ensemble.select([0])
    statistics = ActivationStatistics()
    statistics.observe(model, x_train)                           # or batch by batch
    strength = strength_of(model, x, mean=statistics.mean, std=statistics.std)
    estimator = VariationEstimator().fit(strength, value_variation(ensemble(x)[..., 0]))
    serving = VariationModel(model, estimator.head_, *statistics.compute())
    output, variation = serving(x_new)

`VariationEstimator` and `fit_together` need scikit-learn; the rest, serving included, does not.
"""

from typing import TYPE_CHECKING, Any

from pyens._types import ActivationStrength
from pyens.variation.head import VariationHead, strength_features
from pyens.variation.model import VariationModel
from pyens.variation.statistics import ActivationStatistics
from pyens.variation.strength import ACTIVATION_MODULES, strength_of

if TYPE_CHECKING:
    from pyens.variation.estimator import VariationEstimator, fit_together

__all__ = [
    "ACTIVATION_MODULES",
    "ActivationStatistics",
    "ActivationStrength",
    "VariationEstimator",
    "VariationHead",
    "VariationModel",
    "fit_together",
    "strength_features",
    "strength_of",
]


def __getattr__(name: str) -> Any:
    if name in ("VariationEstimator", "fit_together"):
        from pyens.variation import estimator

        return getattr(estimator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
