"""The outputs of the components combined into one prediction: evenly, or by a learned gate."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyens._kinds import check_real
from pyens._types import Space
from pyens.losses._outputs import in_full_precision
from pyens.metrics import _checks


@in_full_precision
def combine(outputs: Tensor, weights: Tensor | None = None, *, space: Space = "probability") -> Tensor:
    """The logits of the ensemble's prediction, averaged over its components in probability or in logit.

    In probability (Output 1 in the source) ``p = Σ_j g_j softmax(z_j)``, in logit (Output 2)
    ``z = Σ_j g_j z_j``, with weights g that are even or come from a gate.

    What comes back are logits of the combined prediction in both cases, so that `F.cross_entropy` or
    `F.binary_cross_entropy_with_logits` takes them and `softmax` or `sigmoid` gives p, without underflow: in
    probability ``log p`` for K labels and ``log p/(1-p)`` for a binary logit (no K, or K = 1).

    Args:
        outputs: logits of the components: ``[J, B]`` (binary), ``[J, B, K]`` or ``[M, J, B, K]``.
        weights: g, >= 0 and summing to 1 over J (neither is checked): ``[J]``, or ``[J, B]`` for every
            example its own, such as `Gate` gives; of ``[M, J, B, K]`` outputs ``[M, J]`` or ``[M, J, B]``.
            None for 1/J. In probability 0 leaves a component out.
        space: ``"probability"`` or ``"logit"``.

    Returns:
        ``[B]``, ``[B, K]`` or ``[M, B, K]``.

    Raises:
        TypeError, ValueError: for arguments that are not as above.

    Components are usually trained on their own losses with no gradient from the combined output: give it
    ``outputs.detach()`` then, and only a gate learns from it.

    Source: "Anti-Distillation", section 2 and Figure 1.
    """
    _checks.choice("combine", "space", space, "probability", "logit")
    z = outputs[..., None] if outputs.ndim == 2 else outputs  # [..., J, B, K]
    g = _weights(weights, z)
    left_out = g == 0  # whatever is there
    if space == "logit":
        combined = torch.where(left_out, 0, g * z).sum(-3)
    else:
        # A weight of 0 has gradient 0: log 0 would make it NaN.
        log_g = torch.where(left_out, 1, g).log()

        def average(log_p: Tensor) -> Tensor:
            return torch.where(left_out, -torch.inf, log_p + log_g).logsumexp(-3)

        if z.shape[-1] == 1:
            combined = average(F.logsigmoid(z)) - average(F.logsigmoid(-z))
        else:
            combined = average(z.log_softmax(-1))
    return combined.squeeze(-1) if outputs.ndim == 2 else combined


class Gate(nn.Module):
    """Learned weights for `combine` from the example's features: ``g(x) = softmax(A x + a)`` over components.

    Starts even, with A = 0 and a = 0.

    Args:
        in_features: I, columns of the features.
        num_components: J.
        bias: whether there is an a.

    Source: "Anti-Distillation", section 2: "as a mixture of experts, with some gating mechanism" (Shazeer et
    al. 2017, the dense part of it).
    """

    def __init__(
        self,
        in_features: int,
        num_components: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_components, bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """Weights ``[J, B]`` from features ``[B, I]``."""
        check_real("Gate", "features", features)
        logits: Tensor = self.linear(features)
        return logits.softmax(-1).T


def _weights(weights: Tensor | None, z: Tensor) -> Tensor:
    """Weights as [..., J, B or 1, 1], for outputs [..., J, B, K]."""
    leading = list(z.shape[:-2])  # [J] or [M, J]
    if weights is None:
        return z.new_full((leading[-1], 1, 1), 1 / leading[-1])
    check_real("combine", "weights", weights)
    shapes = (leading, [*leading, z.shape[-2]])
    if list(weights.shape) not in shapes:
        raise ValueError(
            f"combine: weights: expected shape {shapes[0]} or {shapes[1]}, got {list(weights.shape)}"
        )
    weights = weights.to(z.dtype)
    return weights[..., None, None] if list(weights.shape) == leading else weights[..., None]
