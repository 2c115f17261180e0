"""The old name of `pyens.decisions`; goes with the next version."""

import warnings

from pyens.decisions import *  # noqa: F403
from pyens.decisions import __all__ as __all__

warnings.warn("pyens.select is now pyens.decisions", DeprecationWarning, stacklevel=2)
