"""From activation strength to estimated variation: what `VariationEstimator` trains, in torch alone."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from pyens._kinds import check_real, check_tensor
from pyens._types import ActivationStrength, StrengthFeatures, VariationTask
from pyens.nn import EnsembleMLP

FEATURES, TASKS = get_args(StrengthFeatures), get_args(VariationTask)
# Values count up to this many deviations. A unit that was all but silent in training has a tiny deviation:
# where it does fire it is thousands of them away, and one such example outweighs all others.
MAX_DEVIATIONS = 10.0


def strength_features(strength: ActivationStrength) -> Tensor:
    """The strength of one model's ΣH hidden units as a table: first all values, then all active as 0 or 1.

    Args:
        strength: value `[B, ΣH]` or `[1, B, ΣH]`, active likewise, bool or packed: what
            `pyens.ops.activation_strength` and `pyens.variation.strength_of` return.

    Returns:
        float32 `[B, 2 ΣH]`.

    Raises:
        ValueError: of more than one model, or shapes that do not belong together.
    """
    if not isinstance(strength, tuple) or len(strength) != 3:
        raise TypeError(
            f"strength_features: strength: expected ActivationStrength, got {type(strength).__name__}"
        )
    check_real("strength_features", "strength.value", strength[1])
    check_tensor("strength_features", "strength.active", strength[2])
    value, active = (t[0] if t.dim() == 3 and len(t) == 1 else t for t in strength[1:])
    units = value.shape[-1]
    if active.dtype == torch.uint8:
        bits = active.unsqueeze(-1) >> torch.arange(8, device=active.device)
        active = (bits & 1).flatten(-2)[..., :units]
    if value.dim() != 2 or active.shape != value.shape:
        raise ValueError(
            "strength_features: strength: expected that of one model, value [B, units] or [1, B, units] with "
            f"active alike, got shapes {list(strength.value.shape)} and {list(strength.active.shape)}"
        )
    return torch.cat([value.float(), active.float()], 1)


class VariationHead(nn.Module):
    """An MLP from the strength of one model's hidden units to what it says about the variation.

        regression      clip(MLP(clip(features, -10, 10)), 0, limit)   [B], in the units of the PV
        classification  softmax(MLP(clip(features, -10, 10)))          [B, buckets]

    Made by `VariationEstimator.fit`; `params` are that estimator's parameters.

    Buffers: `limit`, 0-dim, and the `buckets - 1` `thresholds` between the buckets of PV, in float64.
    """

    limit: Tensor
    thresholds: Tensor

    def __init__(self, mlp: EnsembleMLP, params: dict[str, Any], limit: Tensor, thresholds: Tensor) -> None:
        super().__init__()
        self.mlp = mlp
        self.params = {name: _plain(value) for name, value in params.items()}
        self.task: VariationTask = params["task"]
        self.features: StrengthFeatures = params["features"]
        self.register_buffer("limit", limit)
        self.register_buffer("thresholds", thresholds)
        self.requires_grad_(False).eval()

    def forward(self, value: Tensor, active: Tensor) -> Tensor:
        """`[B, ΣH]` or `[1, B, ΣH]` each -> `[B]`, or of a classification `[B, buckets]`."""
        check_real("VariationHead", "value", value)
        check_tensor("VariationHead", "active", active)
        if active.dtype not in (torch.bool, torch.uint8):
            raise TypeError(f"VariationHead: active: expected bool, got {active.dtype}")
        dtype = self.mlp.stacked()[0][0].dtype
        parts = []
        if self.features != "binary":
            parts.append(value.to(dtype).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS))
        if self.features != "value":
            # Eager torch turns bytes to numbers by the vector, and bools one by one; in compiled code bytes
            # would cost five times as much as bools.
            compiling = torch.compiler.is_compiling()
            parts.append(active.to(dtype) if compiling else active.view(torch.uint8))
        return self._answer(torch.cat(parts, -1).to(dtype))

    def estimate(self, features: Tensor) -> Tensor:
        """The same from the columns that the MLP takes, `[B, in_features]`."""
        return self._answer(features.clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS))

    def _answer(self, columns: Tensor) -> Tensor:
        output: Tensor = self.mlp(columns)  # [1, B, 1 or buckets]
        if self.task == "classification":
            return output[0].softmax(1)
        return output.flatten().clamp_min(0).minimum(self.limit)


def _plain(value: Any) -> Any:
    """Without the types of numpy, which a search over parameters brings and a file can not keep."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return value.item() if hasattr(value, "item") else value
