"""Each member's gradients clipped by their norm in plain PyTorch, in place."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def clip_member_grad_norm_(
    gradients: Sequence[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    """Of gradients `[E, ...]`; returns the norms `[E]`, float32 at least."""
    flat = torch.cat([g.reshape(len(g), math.prod(g.shape[1:])) for g in gradients], 1)
    kind = torch.promote_types(flat.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(flat, norm_type, dim=1, dtype=kind)
    if error_if_nonfinite and not norms.isfinite().all():
        raise RuntimeError(f"clip_member_grad_norm_: expected finite norms, got {norms.tolist()}")
    factors = (max_norm / (norms + 1e-6)).clamp(max=1)
    for g in gradients:
        g.copy_(g * factors.view(-1, *[1] * (g.dim() - 1)))
    return norms
