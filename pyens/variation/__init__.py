"""What one model's hidden units say about how much an ensemble of such models would differ."""

from pyens.reference.activation_strength import ActivationStrength
from pyens.variation.statistics import ActivationStatistics
from pyens.variation.strength import ACTIVATION_MODULES, strength_of

__all__ = ["ACTIVATION_MODULES", "ActivationStatistics", "ActivationStrength", "strength_of"]
