"""A trained model and its variation estimator as one module, for serving."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pyens import _files
from pyens.nn import EnsembleMLP, PackedEnsembleMLP, TabularEnsemble
from pyens.ops.activation_strength import activation_strength
from pyens.variation.head import VariationHead

if TYPE_CHECKING:
    from pyens.variation.estimator import VariationEstimator

FORMAT = "pyens.variation 1"
Target = EnsembleMLP | PackedEnsembleMLP | TabularEnsemble


class VariationModel(nn.Module):
    r"""One model that also says how much an ensemble of such models would differ: `x -> (output, variation)`.

    The model's forward pass is `pyens.ops.activation_strength`, which writes down its hidden units on the
    way; the estimator's MLP reads them. For inference only: it holds copies without gradients, and dropout is
    off. It can be compiled, exported by `torch.export`, and kept in one file:

        model = VariationModel(ensemble.select([0]), estimator, *statistics.compute())
        output, variation = model(x)
        model.save("model.pt")
        model = VariationModel.load("model.pt")
        torch.export.export(model, (x,))

    Args:
        target: an `EnsembleMLP`, `PackedEnsembleMLP` or `TabularEnsemble` of one member.
        estimator: a fitted `VariationEstimator`, or the `head_` of one.
        mean, std: of the target's hidden units over its training data, `[ΣH]` or `[1, ΣH]`: those with which
            the estimator's strengths were made; what `ActivationStatistics` finds.

    Raises:
        TypeError: another kind of target or estimator.
        ValueError: more than one member, an estimator that is not fitted or was fitted on another number of
            hidden units, mean or std of another length.

    Source: "prediction variation and activation strength", section 6.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, target: Target, estimator: VariationEstimator | VariationHead, mean: Tensor, std: Tensor
    ) -> None:
        super().__init__()
        if not isinstance(target, Target):
            raise TypeError(
                "VariationModel: target: expected an EnsembleMLP, PackedEnsembleMLP or TabularEnsemble, "
                f"got {type(target).__name__}"
            )
        if target.ensemble_size != 1:
            raise ValueError(
                f"VariationModel: target: expected one member, got {target.ensemble_size}: take select([0])"
            )
        head = estimator if isinstance(estimator, VariationHead) else _fitted(estimator)
        if isinstance(target, PackedEnsembleMLP):
            target = EnsembleMLP._from_stack(*_stack(target), target.activation)
        self.target = target.select([0]).requires_grad_(False)
        self.head = deepcopy(head)
        weights, _ = self._stack()
        self.units = sum(weight.shape[1] for weight in weights[:-1])
        expected = self.units * (2 if head.features == "both" else 1)
        if head.mlp.in_features != expected:
            raise ValueError(
                f"VariationModel: estimator: expected one fitted on the {self.units} hidden units of target, "
                f"{expected} columns, got one of {head.mlp.in_features}"
            )
        for name, statistic in (("mean", mean), ("std", std)):
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
        if isinstance(target, TabularEnsemble):
            mlp, features = target.mlp, target._features(*inputs)
        elif len(inputs) == 1:
            mlp, features = target, inputs[0]
        else:
            raise TypeError(f"VariationModel: inputs: expected one tensor, as the target, got {len(inputs)}")
        output, value, active = activation_strength(
            features, *mlp._stack(), self.mean, self.std, activation=mlp.activation
        )
        return output[0], self.head(value, active)

    def save(self, path: str | Path) -> None:
        """Writes the target model, the estimator and the statistics to one file, atomically."""
        target, mlp = self.target, self._mlp
        arguments: dict[str, Any] = {
            "hidden_features": mlp.hidden_features,
            "out_features": mlp.out_features,
            "activation": mlp.activation,
            "bias": len(mlp.biases) > 0,
        }
        if isinstance(target, TabularEnsemble):
            arguments |= {
                "categorical": [(e.num_embeddings, e.embedding_dim) for e in target.embeddings],
                "numeric_features": target.numeric_features,
                "dropout": target.dropout,
                "embedding_std": target.embedding_std,
                "sparse": target.sparse,
            }
        else:
            arguments["in_features"] = mlp.in_features
        content = {
            "format": FORMAT,
            "target": type(target).__name__,
            "arguments": arguments,
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
        kind = {"EnsembleMLP": EnsembleMLP, "TabularEnsemble": TabularEnsemble}[content["target"]]
        state = content["state"]
        target = kind(1, **content["arguments"], device="meta")
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
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False)

    @property
    def _mlp(self) -> EnsembleMLP:
        return self.target.mlp if isinstance(self.target, TabularEnsemble) else self.target

    def _stack(self) -> tuple[list[Tensor], list[Tensor]]:
        return self._mlp._stack()

    def extra_repr(self) -> str:
        return f"units={self.units}, task={self.head.task!r}, features={self.head.features!r}"


def _stack(packed: PackedEnsembleMLP) -> tuple[list[Tensor], list[Tensor]]:
    return list(packed.weights.buffers()), list(packed.biases.buffers())


def _fitted(estimator: VariationEstimator) -> VariationHead:
    head = getattr(estimator, "head_", None)
    if isinstance(head, VariationHead):
        return head
    if hasattr(estimator, "predict_bucket"):
        raise ValueError("VariationModel: estimator: expected a fitted one, got one before fit")
    raise TypeError(
        f"VariationModel: estimator: expected a VariationEstimator, got {type(estimator).__name__}"
    )
