"""Fast ensembles of neural networks for PyTorch.

    model = pyens.EnsembleMLP(100, in_features=32, hidden_features=[50, 20, 10], out_features=1)
    outputs = model(x)          # [B, 32] -> [100, B, 1], one fused kernel

Modules, each imported on first use:

    pyens.nn          ensembles as modules; `Ensemble` is what they and one's own have in common
    pyens.training    whole training runs            pyens.optim      optimizers that keep members apart
    pyens.losses      losses over members            pyens.metrics    measures of quality
    pyens.decisions   acting on uncertainty          pyens.variation  members' disagreement from one model
    pyens.masks       masks of Masksembles           pyens.compress   pruning, and sizes
    pyens.data        data sets                      pyens.adapters   other libraries' layouts
    pyens.plots       pictures
    pyens.ops         the operations                 pyens.reference  the same in plain PyTorch
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from pyens._library import build_info, release_memory
from pyens._version import __version__
from pyens.nn import Ensemble, EnsembleEmbedding, EnsembleLinear, EnsembleMLP

if TYPE_CHECKING:  # who checks types does not see what `__getattr__` imports
    from pyens import (  # noqa: F401
        adapters,
        compress,
        data,
        decisions,
        losses,
        masks,
        metrics,
        optim,
        plots,
        training,
        variation,
    )

_MODULES = (
    "adapters",
    "compress",
    "data",
    "decisions",
    "losses",
    "masks",
    "metrics",
    "nn",
    "ops",
    "optim",
    "plots",
    "reference",
    "select",
    "training",
    "variation",
)

__all__ = [
    "Ensemble",
    "EnsembleEmbedding",
    "EnsembleLinear",
    "EnsembleMLP",
    "__version__",
    "build_info",
    "release_memory",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        if name == "select":  # the import below would blame importlib: the warning is given here, once
            warnings.warn("pyens.select is now pyens.decisions", DeprecationWarning, stacklevel=2)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                return importlib.import_module("pyens.select")
        return importlib.import_module(f"pyens.{name}")
    raise AttributeError(f"module 'pyens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
