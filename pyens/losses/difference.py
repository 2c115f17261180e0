"""Difference losses: components are rewarded for differing on each example, or in their distributions."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pyens._types import Distance, Reduction
from pyens.losses._outputs import by_label, check_positive, in_full_precision, reduce_labels
from pyens.metrics import _checks


@in_full_precision
def difference_loss(
    outputs: Tensor,
    *,
    distance: Distance = "squared",
    inverse: bool = False,
    eps: float = 1e-6,
    reduction: Reduction = "sum",
) -> Tensor:
    """Rewards components for differing on each example.

    ``L' = -2/(J(J-1)) Σ_{i<j} 1/B Σ_b d(z_ib, z_jb)`` with ``d = (z_i - z_j)²`` or ``|z_i - z_j|``; or the
    inverse form ``1/(|L'| + ε)``, whose gradient is large where the components are close. Computed for each
    label.

    Args:
        outputs: ``[J, B]``, ``[J, B, K]`` or ``[M, J, B, K]``.
        distance: ``"squared"`` (L2), or ``"absolute"`` (L1; pair by pair, J(J-1)/2 times the memory).
        inverse: the inverse form. It has no gradient where all components are equal, and is 1/ε there.
        eps: ε of the inverse form, > 0.
        reduction: ``"sum"`` over labels or ``"none"``.

    Returns:
        L' <= 0 without a lower bound, or its inverse form in (0, 1/ε]. With J = 1 or B = 0 the inverse form
        is 0 too: no pair is close.

    Raises:
        TypeError, ValueError: for arguments that are not as above.

    Source: "Anti-Distillation", section 4, equation (7) and the two sentences after it ("norms other than
    L2").
    """
    _checks.choice("difference_loss", "distance", distance, "squared", "absolute")
    _checks.choice("difference_loss", "reduction", reduction, "sum", "none")
    check_positive("difference_loss", "eps", eps)
    z = by_label(outputs)  # [..., K, J, B]
    components = z.shape[-2]
    if distance == "squared":
        # Σ_{i<j} (z_i - z_j)² = J Σ_i (z_i - z̄)², and without the cancellation of squares of large values.
        # Centred twice: of values far from 0 the mean is rounded.
        centred = z - z.mean(-2, keepdim=True)
        total = components * (centred - centred.mean(-2, keepdim=True)).square().sum(-2)
    else:
        i, j = torch.triu_indices(components, components, offset=1, device=z.device)
        total = (z[..., i, :] - z[..., j, :]).abs().sum(-2)  # [..., K, B]
    return reduce_labels(_difference(total, components, inverse, eps), outputs, reduction)


@in_full_precision
def cross_entropy_difference_loss(outputs: Tensor, *, inverse: bool = False, eps: float = 1e-6) -> Tensor:
    """Rewards components for predicting other distributions: the cross entropy between every two of them.

    ``L' = -1/(J(J-1)) Σ_{i≠j} 1/B Σ_b H(p_ib, p_jb)`` with ``H(p, q) = -Σ_k p(k) log q(k)`` in nats, and p
    the softmax of the logits (``[J, B]``: the sigmoid, k its two labels); or ``1/(|L'| + ε)``.

    Args:
        outputs: logits ``[J, B]``, ``[J, B, K]`` or ``[M, J, B, K]``.
        inverse: the inverse form.
        eps: ε of the inverse form, > 0.

    Returns:
        0-dim, or ``[M]``: the cross entropy is over all labels at once.

    Raises:
        TypeError, ValueError: for arguments that are not as above.

    Source: "Anti-Distillation", section 4, "as well as cross entropy losses" after equation (7).
    """
    check_positive("cross_entropy_difference_loss", "eps", eps)
    if outputs.ndim == 2:  # the two labels of a binary logit
        outputs = torch.stack([F.logsigmoid(outputs), F.logsigmoid(-outputs)], -1)
    log_p = outputs.log_softmax(-1)  # [..., J, B, K]
    p = log_p.exp()
    # Σ_{i≠j} p_i log p_j: all pairs without those of a component with itself.
    others = p.sum(-3, keepdim=True) - p
    total = -(others * log_p).sum((-3, -1)) / 2  # [..., B], as if of unordered pairs
    return _difference(total, outputs.shape[-3], inverse, eps)


def _difference(total: Tensor, components: int, inverse: bool, eps: float) -> Tensor:
    """The loss from the sums over pairs [..., B]."""
    pairs, examples = components * (components - 1) // 2, total.shape[-1]
    loss = -total.sum(-1) / max(pairs * examples, 1)
    if not inverse:
        return loss
    return 1 / (loss.abs() + eps) if pairs * examples else 0 * loss
