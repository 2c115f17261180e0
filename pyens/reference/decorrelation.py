"""Specification of `pyens.ops.decorrelation_loss`."""

from torch import Tensor

from pyens._types import Decorrelation, Reduction


def decorrelation_loss(
    outputs: Tensor, *, kind: Decorrelation = "correlation", reduction: Reduction = "sum"
) -> Tensor:
    """See `pyens.ops.decorrelation_loss`."""
    z = outputs.unsqueeze(-1) if outputs.dim() == 2 else outputs  # [J, B, K] or [M, J, B, K]
    z = z.movedim(-1, -3)  # [.., K, J, B]
    if kind == "covariance":
        z = z - z.mean(-1, keepdim=True)
    if kind == "residue":
        z = z - z.mean(-2, keepdim=True)
    c = z @ z.mT / z.shape[-1]  # [.., K, J, J]
    loss = c.triu(1).square().sum((-2, -1))  # [.., K]; no difference of norms, which would cancel
    return loss.sum(-1) if reduction == "sum" or outputs.dim() == 2 else loss
