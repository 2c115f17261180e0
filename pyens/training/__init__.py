"""Training runs of ensembles: every member its own randomness, one command, safe to kill."""

from pyens.training._fit import fit
from pyens.training.callbacks import Callback, Progress
from pyens.training.history import History, oof_predictions
from pyens.training.randomness import Randomness, derive_seed, member_seeds
from pyens.training.trainer import Trainer

__all__ = [
    "Callback",
    "History",
    "Progress",
    "Randomness",
    "Trainer",
    "derive_seed",
    "fit",
    "member_seeds",
    "oof_predictions",
]
