"""Losses that push the components of an ensemble apart, and ways to combine their outputs into one.

The J components of a model are trained side by side, each on its own label loss; a loss of this module,
times a strength λ, is added; `decorrelation_loss` is `pyens.ops.decorrelation_loss`. All of it is from
"Anti-Distillation: Improving Reproducibility of Deep Networks" ("the paper" below).

Outputs z are ``[J, B]`` (one output, such as a binary logit), ``[J, B, K]``, or ``[M, J, B, K]`` for M
independent models that are trained together. A loss is computed for each of the K labels; with
``reduction="sum"`` these are summed to a 0-dim tensor, or ``[M]``, with ``reduction="none"`` they are ``[K]``
or ``[M, K]``; of ``[J, B]`` the loss is 0-dim either way.

One component (J = 1) has no pair, and an empty batch (B = 0) no example: the loss is 0, with zero gradients.
float16 and bfloat16 are computed in float32, also under autocast, and give float32. Nothing here looks at the
values: NaN stays NaN. Differentiable as often as one likes.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyens.ops import decorrelation_loss as decorrelation_loss

_KINDS = ("correlation", "covariance", "residue")


def _in_full_precision(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Runs it outside of autocast, on at least float32, after the checks on shape and dtype of `outputs`."""

    @functools.wraps(function)
    def wrapper(outputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _check_outputs(function.__name__, outputs)
        with torch.autocast(outputs.device.type, enabled=False):
            wide = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
            return function(wide, *args, **kwargs)

    return wrapper


# ------------------------------------------------------------------------------------------------------------
# Difference losses


@_in_full_precision
def difference_loss(
    outputs: Tensor,
    *,
    distance: str = "squared",
    inverse: bool = False,
    eps: float = 1e-6,
    reduction: str = "sum",
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

    Source: the paper, section 4, equation (7) and the two sentences after it ("norms other than L2").
    """
    _check_choice("difference_loss", "distance", distance, "squared", "absolute")
    _check_choice("difference_loss", "reduction", reduction, "sum", "none")
    _check_positive("difference_loss", "eps", eps)
    z = _by_label(outputs)  # [..., K, J, B]
    components = z.shape[-2]
    if distance == "squared":
        # Σ_{i<j} (z_i - z_j)² = J Σ_i (z_i - z̄)², and without the cancellation of squares of large values.
        total = components * (z - z.mean(-2, keepdim=True)).square().sum(-2)
    else:
        i, j = _pairs(components, z.device)
        total = (z[..., i, :] - z[..., j, :]).abs().sum(-2)  # [..., K, B]
    return _reduce(_difference(total, components, inverse, eps), outputs, reduction)


@_in_full_precision
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

    Source: the paper, section 4, "as well as cross entropy losses" after equation (7).
    """
    _check_positive("cross_entropy_difference_loss", "eps", eps)
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


# ------------------------------------------------------------------------------------------------------------
# Variants of the decorrelation loss


@_in_full_precision
def pearson_decorrelation_loss(outputs: Tensor, *, eps: float = 1e-12, reduction: str = "sum") -> Tensor:
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

    Source: the paper, section 4, equations (3) and (5), on the normalised covariances.
    """
    _check_choice("pearson_decorrelation_loss", "reduction", reduction, "sum", "none")
    _check_positive("pearson_decorrelation_loss", "eps", eps)
    z = _signal(outputs, "covariance")
    deviation = (z.square().sum(-1, keepdim=True) / max(z.shape[-1], 1) + eps).sqrt()
    return _reduce(_below_diagonal(_products(z / deviation)), outputs, reduction)


@_in_full_precision
def gram_schmidt_decorrelation_loss(
    outputs: Tensor, *, kind: str = "correlation", reduction: str = "sum"
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

    Source: the paper, section 4, after equation (6): Gram-Schmidt "on the mini batch vectors z_i before
    applying the AD de-correlation loss", so that it "does not count correlated components more than once".
    The paper gives no formula; this one is our reading.
    """
    _check_choice("gram_schmidt_decorrelation_loss", "kind", kind, *_KINDS)
    _check_choice("gram_schmidt_decorrelation_loss", "reduction", reduction, "sum", "none")
    z = _signal(outputs, kind)
    u = _orthogonal(z)
    products = z @ u.transpose(-1, -2) / max(z.shape[-1], 1)  # [..., K, J, J]
    return _reduce(_below_diagonal(products), outputs, reduction)


@_in_full_precision
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

    Source: the paper, section 4, after equation (6).
    """
    return _from_label(_orthogonal(_by_label(outputs)), outputs)


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
    and the loss is that of ``(1 - α) Ĉ + α C``. A batch with B = 0 changes nothing.

    For small batches, where one C is mostly noise; for large ones the paper expects little of it.

    Args:
        num_components: J.
        num_labels: K of outputs ``[J, B, K]``; None for ``[J, B]``.
        num_models: M of outputs ``[M, J, B, K]``; None for one model.
        kind: ``"correlation"``, ``"covariance"`` or ``"residue"``, equations (2), (3) and (4).
        momentum: α in (0, 1]; 1 is the decorrelation loss without memory.
        reduction: ``"sum"`` over labels or ``"none"``.

    The estimate ``[K, J, J]`` (or ``[J, J]``, ``[M, K, J, J]``) and the number of batches are in the
    `state_dict`.

    Raises:
        TypeError, ValueError: for arguments that are not as above.

    Source: the paper, section 4, the paragraph before equation (7): continuous online training.
    """

    estimate: Tensor
    batches: Tensor

    def __init__(
        self,
        num_components: int,
        num_labels: int | None = None,
        num_models: int | None = None,
        *,
        kind: str = "correlation",
        momentum: float = 0.1,
        reduction: str = "sum",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "RunningDecorrelationLoss"
        _check_choice(name, "kind", kind, *_KINDS)
        _check_choice(name, "reduction", reduction, "sum", "none")
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
        self.register_buffer("estimate", torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, outputs: Tensor) -> Tensor:
        """The loss of outputs ``[J, B]``, ``[J, B, K]`` or ``[M, J, B, K]``."""
        _check_outputs("RunningDecorrelationLoss", outputs)
        return _running(outputs, self)

    def extra_repr(self) -> str:
        shape = list(self.estimate.shape)
        return f"estimate={shape}, kind={self.kind!r}, momentum={self.momentum}, reduction={self.reduction!r}"


@_in_full_precision
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
        return _reduce(_below_diagonal(products), outputs, state.reduction)
    old = state.estimate.to(products.dtype)
    first = state.batches == 0
    estimate = torch.where(first, products, old + state.momentum * (products - old))
    if state.training:
        with torch.no_grad():
            state.estimate.copy_(estimate)
            state.batches.add_(1)
    return _reduce(_below_diagonal(estimate), outputs, state.reduction)


# ------------------------------------------------------------------------------------------------------------
# Combination of outputs


@_in_full_precision
def combine(outputs: Tensor, weights: Tensor | None = None, *, space: str = "probability") -> Tensor:
    """The logits of the ensemble's prediction, averaged over its components in probability or in logit.

    In probability (the paper's Output 1) ``p = Σ_j g_j softmax(z_j)``, in logit (Output 2)
    ``z = Σ_j g_j z_j``, with weights g that are even or come from a gate.

    What comes back are logits of the combined prediction in both cases, so that `F.cross_entropy` or
    `F.binary_cross_entropy_with_logits` takes them and `softmax` or `sigmoid` gives p, without underflow: in
    probability ``log p`` for K labels and ``log p/(1-p)`` for a binary logit.

    Args:
        outputs: logits of the components: ``[J, B]`` (binary), ``[J, B, K]`` or ``[M, J, B, K]``.
        weights: g, >= 0 and summing to 1 over J (neither is checked): ``[J]``, or ``[J, B]`` for every
            example its own, such as `Gate` gives; of ``[M, J, B, K]`` outputs ``[M, J]`` or ``[M, J, B]``.
            None for 1/J.
        space: ``"probability"`` or ``"logit"``.

    Returns:
        ``[B]``, ``[B, K]`` or ``[M, B, K]``.

    Raises:
        TypeError, ValueError: for arguments that are not as above.

    Components are usually trained on their own losses with no gradient from the combined output: give it
    ``outputs.detach()`` then, and only a gate learns from it.

    Source: the paper, section 2 and Figure 1.
    """
    _check_choice("combine", "space", space, "probability", "logit")
    binary = outputs.ndim == 2
    z = outputs[..., None] if binary else outputs  # [..., J, B, K]
    g = _weights(weights, z)
    if space == "logit":
        combined = (g * z).sum(-3)
    else:
        # The smallest number and not log 0 for a weight of 0, which would make its gradient NaN.
        log_g = g.clamp_min(torch.finfo(g.dtype).tiny).log()
        if binary:
            combined = (F.logsigmoid(z) + log_g).logsumexp(-3) - (F.logsigmoid(-z) + log_g).logsumexp(-3)
        else:
            combined = (z.log_softmax(-1) + log_g).logsumexp(-3)
    return combined.squeeze(-1) if binary else combined


class Gate(nn.Module):
    """Learned weights for `combine` from the example's features: ``g(x) = softmax(A x + a)`` over components.

    Starts even, with A = 0 and a = 0.

    Args:
        in_features: I, columns of the features.
        num_components: J.
        bias: whether there is an a.

    Source: the paper, section 2: "as a mixture of experts, with some gating mechanism" (Shazeer et al. 2017,
    the dense part of it).
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
        return self.linear(features).softmax(-1).T


def _weights(weights: Tensor | None, z: Tensor) -> Tensor:
    """Weights as [..., J, B or 1, 1], for outputs [..., J, B, K]."""
    leading = list(z.shape[:-2])  # [J] or [M, J]
    if weights is None:
        return z.new_full((leading[-1], 1, 1), 1 / leading[-1])
    shapes = (leading, [*leading, z.shape[-2]])
    if list(weights.shape) not in shapes:
        raise ValueError(
            f"combine: weights: expected shape {shapes[0]} or {shapes[1]}, got {list(weights.shape)}"
        )
    weights = weights.to(z.dtype)
    return weights[..., None, None] if list(weights.shape) == leading else weights[..., None]


# ------------------------------------------------------------------------------------------------------------
# Shared


def _by_label(outputs: Tensor) -> Tensor:
    """[J, B] as it is, [J, B, K] as [K, J, B], [M, J, B, K] as [M, K, J, B]."""
    return outputs if outputs.ndim == 2 else outputs.movedim(-1, -3)


def _from_label(values: Tensor, outputs: Tensor) -> Tensor:
    return values if outputs.ndim == 2 else values.movedim(-3, -1)


def _signal(outputs: Tensor, kind: str) -> Tensor:
    """What is to be decorrelated, [..., K, J, B]."""
    z = _by_label(outputs)
    if kind == "correlation" or z.shape[-1] == 0:
        return z
    return z - z.mean(-1 if kind == "covariance" else -2, keepdim=True)


def _products(z: Tensor) -> Tensor:
    """C_ij = 1/B Σ_b z_ib z_jb, [..., K, J, J]."""
    return z @ z.transpose(-1, -2) / max(z.shape[-1], 1)


def _below_diagonal(products: Tensor) -> Tensor:
    """Σ_{i<j} C_ij², summed directly: ½(‖C‖² - ‖diag C‖²) cancels once the loss has done its work."""
    return products.tril(-1).square().sum((-2, -1))


def _pairs(components: int, device: torch.device) -> tuple[Tensor, Tensor]:
    i, j = torch.triu_indices(components, components, offset=1, device=device)
    return i, j


def _reduce(losses: Tensor, outputs: Tensor, reduction: str) -> Tensor:
    """Over the labels, the last axis of the losses; those of [J, B] outputs have none."""
    return losses.sum(-1) if reduction == "sum" and outputs.ndim > 2 else losses


def _check_outputs(function: str, outputs: Tensor) -> None:
    if not isinstance(outputs, Tensor):
        raise TypeError(f"{function}: outputs: expected a tensor, got {type(outputs).__name__}")
    if not outputs.is_floating_point():
        raise TypeError(f"{function}: outputs: expected a floating dtype, got {outputs.dtype}")
    if outputs.ndim not in (2, 3, 4):
        raise ValueError(
            f"{function}: outputs: expected shape [J, B], [J, B, K] or [M, J, B, K], "
            f"got {list(outputs.shape)}"
        )
    if outputs.shape[-3 if outputs.ndim > 2 else 0] == 0:
        raise ValueError(f"{function}: outputs: expected J >= 1, got {list(outputs.shape)}")


def _check_choice(function: str, argument: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise ValueError(f"{function}: {argument}: expected {' or '.join(allowed)}, got {value!r}")


def _check_positive(function: str, argument: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{function}: {argument}: expected a number > 0, got {value}")
