"""Fast ensembles of neural networks for PyTorch.

    model = pyens.EnsembleMLP(100, in_features=32, hidden_features=[50, 20, 10], out_features=1)
    outputs = model(x)          # [B, 32] -> [100, B, 1], one fused kernel

`pyens.ops` are the operations, `pyens.reference` the same in plain PyTorch, `pyens.nn` the modules,
`pyens.metrics` what ensembles are judged by, `pyens.decisions` what is done about their uncertainty,
`pyens.losses` what keeps their members apart, `pyens.masks` draws the masks of Masksembles, `pyens.training`
runs whole trainings, `pyens.data` reads data sets, `pyens.variation` reads the members' disagreement off the
hidden units of one model.
"""

from pyens._library import build_info
from pyens._version import __version__
from pyens.nn import EnsembleEmbedding, EnsembleLinear, EnsembleMLP

__all__ = ["EnsembleEmbedding", "EnsembleLinear", "EnsembleMLP", "__version__", "build_info"]
