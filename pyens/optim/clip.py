"""The norm of each member's gradients, clipped."""

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from pyens._kinds import REAL, check_number
from pyens.ops.clip_member_grad_norm import clip_member_grad_norm_ as clip_here


def clip_member_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` of each member: scales its gradients where their norm is too large.

    With n[m] the norm of all gradients of member m together,

        p.grad[m] <- p.grad[m] * min(1, max_norm / (n[m] + 1e-6))

    A member's bits do not depend on the others, nor does a NaN or Inf in one of them reach another: its own
    gradients are then what torch makes of them, NaN for a norm of NaN, zeros and NaN for one of Inf. No
    square overflows or vanishes on the way to a norm.

    Args:
        parameters: stacked parameters `[E, ...]`; those without a gradient are left out.
        max_norm: the largest norm that a member may have.
        norm_type: 1, 2 or inf.
        error_if_nonfinite: raise, and change nothing, where a member's norm is NaN or Inf.

    Returns:
        The norms before clipping, `[E]`, in the gradients' type, float32 at least; `[0]` without a gradient.

    Raises:
        RuntimeError: see `error_if_nonfinite`.
        ValueError: a `max_norm` below 0 or NaN, another `norm_type`, gradients of different numbers of
            members, or sparse.
    """
    if norm_type not in (1, 2, math.inf):
        raise ValueError(f"clip_member_grad_norm_: norm_type: expected 1, 2 or inf, got {norm_type!r}")
    check_number("clip_member_grad_norm_", "max_norm", max_norm)
    if not max_norm >= 0:
        raise ValueError(f"clip_member_grad_norm_: max_norm: expected a number from 0, got {max_norm}")
    gradients: list[Tensor] = []
    for i, parameter in enumerate([parameters] if isinstance(parameters, Tensor) else parameters):
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.layout != torch.strided:
            raise ValueError(
                f"clip_member_grad_norm_: parameters[{i}].grad: expected dense, got {gradient.layout}"
            )
        if gradient.dim() == 0 or (gradients and len(gradient) != len(gradients[0])):
            expected = f"[{len(gradients[0])}, ...]" if gradients else "[E, ...]"
            raise ValueError(
                f"clip_member_grad_norm_: parameters[{i}].grad: expected {expected}, "
                f"got shape {list(gradient.shape)}"
            )
        gradients.append(gradient)
    if not gradients:
        return torch.zeros(0)
    if all(g.is_cpu and g.dtype in REAL for g in gradients):
        return clip_here(gradients, float(max_norm), float(norm_type), error_if_nonfinite)
    with torch.no_grad():
        gradients = [g.detach() for g in gradients]
        norms = _member_norms(gradients, norm_type)
        if error_if_nonfinite and not norms.isfinite().all():
            raise RuntimeError(
                f"clip_member_grad_norm_: expected finite norms, got {norms[~norms.isfinite()].tolist()} for "
                f"members {(~norms.isfinite()).nonzero().flatten().tolist()}"
            )
        factors = (max_norm / (norms + 1e-6)).clamp_(max=1.0)
        of_type = {g.dtype: factors.to(g.dtype) for g in gradients}
        torch._foreach_mul_(gradients, [of_type[g.dtype].view(-1, *[1] * (g.dim() - 1)) for g in gradients])
    kind = functools.reduce(torch.promote_types, {g.dtype for g in gradients}, torch.float32)
    return norms.to(kind)


def _member_norms(gradients: list[Tensor], norm_type: float) -> Tensor:
    """Each member's norm in float64, `[E]`."""
    rows = [g.reshape(len(g), math.prod(g.shape[1:])) for g in gradients]
    norms = _added_up(rows, norm_type)
    # Where squares may have left the range of numbers, which each member finds by itself: once more, from
    # gradients divided by their largest.
    safe = (norms > 1e-12) & (norms < 1e15)
    if norm_type == math.inf or safe.all():
        return norms
    odd = [row[~safe].to(torch.promote_types(row.dtype, torch.float32)) for row in rows]
    largest = _added_up(odd, math.inf)
    by = torch.where(largest == 0, 1, largest)[:, None]
    own = largest * _added_up([row / by.to(row) for row in odd], norm_type)
    norms[~safe] = torch.where(largest.isinf(), math.inf, own)
    return norms


def _added_up(rows: list[Tensor], norm_type: float) -> Tensor:
    """The norm of each row over all of `[E, *]`; its bits depend on this row alone."""
    norms = []
    for row in rows:
        if norm_type == math.inf:
            norms.append(row.abs().amax(1) if row.shape[1] else row.new_zeros(len(row)))
            continue
        # torch adds up rows one by one, the same way however many there are, unless there is one alone.
        several = row.contiguous() if row.shape[0] > 1 else row.contiguous().expand(2, -1)
        kind = torch.promote_types(row.dtype, torch.float32)
        norms.append(torch.linalg.vector_norm(several, norm_type, dim=1, dtype=kind)[: row.shape[0]])
    of_each = torch.stack([norm.double() for norm in norms])
    if norm_type == math.inf:
        return of_each.amax(0)
    first, *others = (of_each * of_each if norm_type == 2 else of_each).unbind()
    total = functools.reduce(torch.add, others, first)
    return total.sqrt() if norm_type == 2 else total
