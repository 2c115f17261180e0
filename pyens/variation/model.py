"""A trained model and its variation estimator as one module, for serving."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

import pyens.nn
from pyens import _files
from pyens._kinds import check_real
from pyens.nn import Ensemble, EnsembleMLP
from pyens.ops.activation_strength import activation_strength
from pyens.variation.head import VariationHead
from pyens.variation.strength import plain_layers

FORMAT = "pyens.variation 1"


class VariationModel(nn.Module):
    r"""One model that also says how much an ensemble of such models would differ: `x -> (output, variation)`.

    The model's forward pass is `pyens.ops.activation_strength`, which writes down its hidden units on the
    way; the head's MLP reads them. For inference only: it holds copies without gradients, and dropout is
    off. It can be compiled, exported by `torch.export`, and kept in one file:

        model = VariationModel(ensemble.select([0]), estimator.head_, *statistics.compute())
        output, variation = model(x)
        model.save("model.pt")
        model = VariationModel.load("model.pt")
        torch.export.export(model, (x,))

    Args:
        target: a `pyens.nn.Ensemble` of MLPs with one member, such as an `EnsembleMLP`; of a `MaskedMLP` what
            `compact` gives.
        head: the `head_` of a fitted `VariationEstimator`.
        mean, std: of the target's hidden units over its training data, `[ΣH]` or `[1, ΣH]`: those with which
            the estimator's strengths were made; what `ActivationStatistics` finds.

    Raises:
        TypeError: another kind of target or head.
        ValueError: more than one member, norms, residuals or an output activation, a head that was fitted on
            another number of hidden units, mean or std of another length.

    Source: "Beyond Point Estimate", section 6.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, target: Ensemble, head: VariationHead, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        if not isinstance(target, Ensemble) or target.activation is None or target.shares_parameters:
            raise TypeError(
                "VariationModel: target: expected an ensemble of MLPs with parameters of their own, "
                f"got {type(target).__name__}"
            )
        plain_layers("VariationModel", "target", target)
        if target.ensemble_size != 1:
            raise ValueError(
                f"VariationModel: target: expected one member, got {target.ensemble_size}: take select([0])"
            )
        if not isinstance(head, VariationHead):
            raise TypeError(
                "VariationModel: head: expected a VariationHead, the head_ of a fitted VariationEstimator, "
                f"got {type(head).__name__}"
            )
        self.target = target.select([0]).requires_grad_(False)
        self.head = deepcopy(head)
        weights, _ = self.target.stacked()
        self.units = sum(weight.shape[1] for weight in weights[:-1])
        expected = self.units * (2 if head.features == "both" else 1)
        if head.mlp.in_features != expected:
            raise ValueError(
                f"VariationModel: head: expected one fitted on the {self.units} hidden units of target, "
                f"{expected} columns, got one of {head.mlp.in_features}"
            )
        for name, statistic in (("mean", mean), ("std", std)):
            check_real("VariationModel", name, statistic)
            if statistic.numel() != self.units or statistic.shape[-1:] != (self.units,):
                raise ValueError(
                    f"VariationModel: {name}: expected [{self.units}], a number for each hidden unit, "
                    f"got shape {list(statistic.shape)}"
                )
            real = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
            self.register_buffer(name, statistic.detach().reshape(-1).to(weights[0].device, real))
        self.eval()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What the target takes -> its output `[B, O]`, and the estimated variation `[B]`; of an estimator
        that classifies the probabilities of the buckets, `[B, buckets]`."""
        target = self.target
        assert target.activation is not None
        weights, biases = target.stacked()
        output, value, active = activation_strength(
            target.features(*inputs), weights, biases, self.mean, self.std, activation=target.activation
        )
        return output[0], self.head(value, active)

    def save(self, path: str | Path) -> None:
        """Writes the target model, the head and the statistics to one file, atomically.

        Raises:
            ValueError: a target of a class that `pyens.nn` does not have, which `load` could not find; one
                that is pruned or has weights computed from others, which it could not build.
        """
        name = type(self.target).__name__
        if getattr(pyens.nn, name, None) is not type(self.target):
            raise ValueError(f"VariationModel.save: target: expected a class of pyens.nn, got {name}")
        expected = type(self.target)(**self.target.config(), device="meta").state_dict()
        if set(found := self.target.state_dict()) != set(expected):
            raise ValueError(
                f"VariationModel.save: target: expected the state of a {name} as it is built, "
                f"{sorted(expected)}, got {sorted(found)}: make pruning or parametrizations permanent first"
            )
        content = {
            "format": FORMAT,
            "target": name,
            "arguments": self.target.config(),
            "head": {"columns": self.head.mlp.in_features, "params": self.head.params},
            "state": self.state_dict(),
        }
        _files.save(content, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote, on the CPU. `VariationEstimator.from_model` gives the estimator.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is damaged or of another kind; it names the file.
        """
        content = _files.load(path)
        if content.get("format") != FORMAT:
            raise ValueError(f"VariationModel.load: {path}: expected a file of VariationModel.save")
        try:
            model = cls._from_content(content)
        except Exception as error:
            raise ValueError(
                f"VariationModel.load: {path}: expected what VariationModel.save writes, got {error!r}"
            ) from error
        return model.requires_grad_(False)

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> Self:
        kind = getattr(pyens.nn, content["target"])
        if not issubclass(kind, Ensemble):
            raise TypeError(f"{content['target']}, no ensemble")
        state = content["state"]
        target = kind(**{"ensemble_size": 1, **content["arguments"]}, device="meta")
        params = content["head"]["params"]
        mlp = EnsembleMLP(
            1,
            content["head"]["columns"],
            params["hidden_features"],
            params["buckets"] if params["task"] == "classification" else 1,
            device="meta",
        )
        head = VariationHead(mlp, params, state["head.limit"], state["head.thresholds"])
        model = cls(target, head, state["mean"], state["std"])
        if other := [name for name, t in state.items() if not t.is_floating_point()]:
            raise TypeError(f"{other[0]} of {state[other[0]].dtype}")
        model.load_state_dict(state, assign=True)
        return model

    def extra_repr(self) -> str:
        return f"units={self.units}, task={self.head.task!r}, features={self.head.features!r}"
