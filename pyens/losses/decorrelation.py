"""Variants of the decorrelation loss: free of scale, by Gram-Schmidt, and with a running estimate."""

from typing import get_args

import torch
from torch import Tensor, nn

from pyens import ops
from pyens._types import Decorrelation, Reduction
from pyens.losses._outputs import by_label, check_outputs, check_positive, in_full_precision, reduce_labels
from pyens.metrics import _checks

_KINDS = get_args(Decorrelation)


@in_full_precision
def decorrelation_loss(
    outputs: Tensor, *, kind: Decorrelation = "correlation", reduction: Reduction = "sum"
) -> Tensor:
    """`pyens.ops.decorrelation_loss` as a loss of this module: float32 of 16 bits, and 0 of an empty batch,
    where the op is NaN."""
    loss = ops.decorrelation_loss(outputs, kind=kind, reduction=reduction)
    if outputs.shape[1 if outputs.ndim == 2 else -2] > 0:
        return loss
    return torch.zeros_like(loss) + outputs.sum()  # a sum over nothing, with zero gradients


@in_full_precision
def pearson_decorrelation_loss(
    outputs: Tensor, *, eps: float = 1e-12, reduction: Reduction = "sum"
) -> Tensor:
    """Decorrelation that the scale of the outputs cannot satisfy: ``Σ_{i<j} ρ_ij²``, for each label.

    ``ρ_ij = Σ_ij / sqrt((Σ_ii + ε)(Σ_jj + ε))`` with the covariances Σ over the batch of equation (3).

    Args:
        outputs: ``[J, B]``, ``[J, B, K]`` or ``[M, J, B, K]``.
        eps: ε > 0, a variance: a component that does not vary over the batch has no correlation, and adds 0.
        reduction: ``"sum"`` over labels or ``"none"``.

    Returns:
        The loss, 0 to J(J-1)/2 for a label.

    Raises:
        TypeError, ValueError: for arguments that are not as above.

    Source: "Anti-Distillation", section 4, equations (3) and (5), on the normalised covariances.
    """
    _checks.choice("pearson_decorrelation_loss", "reduction", reduction, "sum", "none")
    check_positive("pearson_decorrelation_loss", "eps", eps)
    z = _signal(outputs, "covariance")
    variance: float | Tensor = eps
    if z.shape[-1] > 0:  # so that no square overflows; both cancel in ρ, so neither has a gradient
        scale = z.detach().abs().amax(-1, keepdim=True).clamp_min(1)
        scale = torch.where(scale.isfinite(), scale, 1)
        z, variance = z / scale, eps / scale / scale
    deviation = (z.square().sum(-1, keepdim=True) / max(z.shape[-1], 1) + variance).sqrt()
    return reduce_labels(_below_diagonal(_products(z / deviation)), outputs, reduction)


@in_full_precision
def gram_schmidt_decorrelation_loss(
    outputs: Tensor, *, kind: Decorrelation = "correlation", reduction: Reduction = "sum"
) -> Tensor:
    """Decorrelation that counts what several components share once: ``Σ_{j<i} (1/B Σ_b z_ib u_jb)²``.

    u_1..u_J are the components after `gram_schmidt`: component i is held against what each earlier one adds
    to those before it. (Among themselves the u are orthogonal: a loss of only them would always be 0.) For
    J = 2 it is the decorrelation loss itself. The order of the components matters.

    Args:
        outputs: ``[J, B]``, ``[J, B, K]`` or ``[M, J, B, K]``.
        kind: what is decorrelated: ``"correlation"`` the outputs, ``"covariance"`` without their batch means,
            ``"residue"`` without the mean over the components of each example.
        reduction: ``"sum"`` over labels or ``"none"``.

    Returns:
        The loss, >= 0.

    Raises:
        TypeError, ValueError: for arguments that are not as above.

    Source: "Anti-Distillation", section 4, after equation (6): Gram-Schmidt "on the mini batch vectors
    z_i before applying the AD de-correlation loss", so that it "does not count correlated components more
    than once". It gives no formula; this one is our reading.
    """
    _checks.choice("gram_schmidt_decorrelation_loss", "kind", kind, *_KINDS)
    _checks.choice("gram_schmidt_decorrelation_loss", "reduction", reduction, "sum", "none")
    z = _signal(outputs, kind)
    u = _orthogonal(z)
    products = z @ u.transpose(-1, -2) / max(z.shape[-1], 1)  # [..., K, J, J]
    return reduce_labels(_below_diagonal(products), outputs, reduction)


@in_full_precision
def gram_schmidt(outputs: Tensor) -> Tensor:
    """The components made orthogonal over the batch, for each label by itself and in the order given.

    ``u_j = z_j - Σ_{l<j} (z_j·u_l / u_l·u_l) u_l``, not normalised, with ``x·y = Σ_b x_b y_b``. What is left
    of a component that depends on those before it is rounding: where ``u·u <= eps z·z``, eps that of the
    dtype, u is 0.

    Args:
        outputs: ``[J, B]``, ``[J, B, K]`` or ``[M, J, B, K]``.

    Returns:
        u, of that shape.

    Raises:
        TypeError, ValueError: for outputs that are not as above.

    Source: "Anti-Distillation", section 4, after equation (6).
    """
    u = _orthogonal(by_label(outputs))
    return u if outputs.ndim == 2 else u.movedim(-3, -1)


def _orthogonal(z: Tensor) -> Tensor:
    """Gram-Schmidt over the last axis of [..., J, B], one projection after another: the stable way."""
    tiny = torch.finfo(z.dtype).eps
    done: list[tuple[Tensor, Tensor]] = []  # u and u·u, [..., B] and [..., 1]
    for component in z.unbind(-2):
        u = component
        for previous, square in done:
            u = u - (u * previous).sum(-1, keepdim=True) / square * previous
        square = u.square().sum(-1, keepdim=True)
        dependent = square <= tiny * component.square().sum(-1, keepdim=True)
        # 1 in place of 0 keeps the division and its gradient finite.
        done.append((u.masked_fill(dependent, 0.0), square.masked_fill(dependent, 1.0)))
    return torch.stack([u for u, _ in done], -2)


class RunningDecorrelationLoss(nn.Module):
    """Decorrelation by an estimate of C that runs over the batches: ``L = Σ_{i<j} Ĉ_ij²``, for each label.

    While training, ``Ĉ ← (1 - α) Ĉ + α C`` with C of the batch (of all of it for the first one), and the
    gradient goes through αC alone: old batches are constants. In evaluation mode the estimate stays as it is
    and the loss is that of ``(1 - α) Ĉ + α C``. A batch with B = 0 changes nothing, nor one whose C is not
    finite; `forget` begins anew.

    For small batches, where one C is mostly noise; for large ones the source expects little of it.

    Args:
        num_components: J.
        num_labels: K of outputs ``[J, B, K]``; None for ``[J, B]``.
        num_models: M of outputs ``[M, J, B, K]``; None for one model.
        kind: ``"correlation"``, ``"covariance"`` or ``"residue"``, equations (2), (3) and (4).
        momentum: α in (0, 1]; 1 is the decorrelation loss without memory.
        reduction: ``"sum"`` over labels or ``"none"``.

    The estimate ``[K, J, J]`` (or ``[J, J]``, ``[M, K, J, J]``) and the number of batches (of several models
    ``[M]``) are in the `state_dict`.

    Raises:
        TypeError, ValueError: for arguments that are not as above.

    Source: "Anti-Distillation", section 4, the paragraph before equation (7): continuous online training.
    """

    estimate: Tensor
    batches: Tensor
    member_buffers: tuple[str, ...] = ()  # what is of the models, if there are several: see Ensemble

    def __init__(
        self,
        num_components: int,
        num_labels: int | None = None,
        num_models: int | None = None,
        *,
        kind: Decorrelation = "correlation",
        momentum: float = 0.1,
        reduction: Reduction = "sum",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "RunningDecorrelationLoss"
        _checks.choice(name, "kind", kind, *_KINDS)
        _checks.choice(name, "reduction", reduction, "sum", "none")
        if not 0 < momentum <= 1:
            raise ValueError(f"{name}: momentum: expected a number in (0, 1], got {momentum}")
        if num_models is not None and num_labels is None:
            raise ValueError(f"{name}: num_labels: expected an int where num_models is given, got None")
        sizes = {"num_models": num_models, "num_labels": num_labels, "num_components": num_components}
        for argument, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name}: {argument}: expected at least 1, got {size}")
        self.kind, self.momentum, self.reduction = kind, momentum, reduction
        leading = [size for size in (num_models, num_labels) if size is not None]
        shape = [*leading, num_components, num_components]
        self.member_buffers = ("estimate", "batches") if num_models is not None else ()
        self.register_buffer("estimate", torch.zeros(shape, device=device, dtype=dtype))
        batches = torch.zeros([] if num_models is None else [num_models], dtype=torch.int64, device=device)
        self.register_buffer("batches", batches)

    def forward(self, outputs: Tensor) -> Tensor:
        """The loss of outputs ``[J, B]``, ``[J, B, K]`` or ``[M, J, B, K]``."""
        check_outputs("RunningDecorrelationLoss", outputs)
        return _running(outputs, self)

    @torch.no_grad()
    def forget(self, model: int | None = None) -> None:
        """Begins anew; where there are several models, for one of them or all."""
        one = model is not None and self.batches.dim() > 0
        for buffer in (self.estimate, self.batches):
            (buffer[model] if one else buffer).zero_()

    def extra_repr(self) -> str:
        shape = list(self.estimate.shape)
        return f"estimate={shape}, kind={self.kind!r}, momentum={self.momentum}, reduction={self.reduction!r}"


@in_full_precision
def _running(outputs: Tensor, state: RunningDecorrelationLoss) -> Tensor:
    z = _signal(outputs, state.kind)
    products = _products(z)
    if products.shape != state.estimate.shape:
        *leading, components, _ = state.estimate.shape
        raise ValueError(
            f"RunningDecorrelationLoss: outputs: expected {components} components and (models, labels) "
            f"{leading}, got shape {list(outputs.shape)}"
        )
    if z.shape[-1] == 0:
        return reduce_labels(_below_diagonal(products), outputs, state.reduction)
    old = state.estimate.to(products.dtype)
    first = state.batches == 0
    if first.dim():  # of each model
        first = first.view(-1, *[1] * (products.dim() - 1))
    estimate = torch.where(first, products, old + state.momentum * (products - old))
    if state.training:
        with torch.no_grad():
            # Of a batch that overflows, or has a NaN, nothing is remembered.
            axes = tuple(range(state.batches.dim(), products.dim()))
            sound = products.isfinite().all(dim=axes)
            each = sound.view(*sound.shape, *[1] * len(axes))
            state.estimate.copy_(torch.where(each, estimate.to(old.dtype), old))
            state.batches.add_(sound)
    return reduce_labels(_below_diagonal(estimate), outputs, state.reduction)


def _signal(outputs: Tensor, kind: Decorrelation) -> Tensor:
    """What is to be decorrelated, [..., K, J, B]."""
    z = by_label(outputs)
    if kind == "correlation" or z.shape[-1] == 0:
        return z
    axis = -1 if kind == "covariance" else -2
    z = z - z.mean(axis, keepdim=True)
    return z - z.mean(axis, keepdim=True)  # by how much the first mean was rounded, at an offset


def _products(z: Tensor) -> Tensor:
    """C_ij = 1/B Σ_b z_ib z_jb, [..., K, J, J]."""
    return z @ z.transpose(-1, -2) / max(z.shape[-1], 1)


def _below_diagonal(products: Tensor) -> Tensor:
    """Σ_{i<j} C_ij², summed directly: ½(‖C‖² - ‖diag C‖²) cancels once the loss has done its work."""
    return products.tril(-1).square().sum((-2, -1))
