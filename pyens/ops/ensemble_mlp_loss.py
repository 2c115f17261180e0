"""The loss inside the fused ensemble MLP."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyens import _kinds, reference
from pyens._types import Activation, Dropout, DropoutPosition, Loss, LossReduction, Norm, NormPosition
from pyens.ops._call import Given, join_members, operation
from pyens.ops._inputs import as_given, as_rows, is_unusual, of_rows
from pyens.ops.ensemble_mlp import from_schema, member_ranks, schema_options


def ensemble_mlp_loss(
    input: Tensor | tuple[Tensor, ...],
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    loss: Loss,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    delta: float = 1.0,
    quantiles: Sequence[float] | Tensor | None = None,
    class_weight: Tensor | None = None,
    log_variance_min: Tensor | float | None = None,
    log_variance_max: Tensor | float | None = None,
    sample_weight: Tensor | None = None,
    activation: Activation | Sequence[Activation] = "relu",
    output_activation: Activation = "identity",
    norm: Norm | Sequence[Norm | None] | None = None,
    norm_weights: Sequence[Tensor] | None = None,
    norm_biases: Sequence[Tensor] | None = None,
    norm_eps: float | None = None,
    norm_position: NormPosition = "before_activation",
    residual: bool | Sequence[bool] = False,
    dropout: Dropout = 0.0,
    dropout_seeds: Tensor | None = None,
    dropout_position: DropoutPosition = "after_activation",
    members: Tensor | None = None,
    shared: bool = False,
    reduction: LossReduction = "mean",
) -> Tensor:
    r"""Each member's own mean loss, computed with its gradient in one pass over the examples.

    With z[m, b] = `ensemble_mlp(input, ...)`[m, b], targets y and K outputs, the loss of an example is

        mse                 1/K sum_k (z_k - y_k)^2
        bce                 1/K sum_k log(1 + e^z_k) - z_k y_k                              z are logits
        gaussian_nll        1/K sum_k log(v_k)/2 + (y_k - z_k)^2 / (2 v_k)   v_k = softplus(z_{K+k}) + 1e-6
                            with bounds v_k = e^s_k, see log_variance_min
        cross_entropy       (1 - s) l_y + s/K sum_k l_k   l = -log softmax(z / temperature), y is a class
        soft_cross_entropy  sum_k ((1 - s) y_k + s/K) l_k                   y are the classes' probabilities
        huber               1/K sum_k e_k^2/2 where |e_k| <= delta, else delta (|e_k| - delta/2)   e = z - y
        smooth_l1           huber / delta
        quantile            1/KQ sum_kq max(t_q e_kq, (t_q - 1) e_kq)  e_kq = y_k - z_{kQ+q}  t are quantiles
        poisson_nll         1/K sum_k e^z_k - z_k y_k                         z are logarithms of rates

    in nats, gaussian_nll and poisson_nll without what depends on y alone, and
    loss[m] = sum_b w_b loss(m, b) / sum_b w_b. An ensemble trains on `loss.sum()`: the sum of its members'
    losses, never the loss of their mean.

    Where a gradient is needed, it is computed along with the loss, tile by tile, and backward only scales it.
    Nothing of size `[E, B, hidden]` is ever stored. One exception: the gradient of a shared input is computed
    in backward by a second pass, for it sums over members that are scaled differently.

    Args:
        input, weights, biases, and what follows sample_weight: as in `pyens.ops.ensemble_mlp`. Where the
            input has other dimensions than B, target and sample_weight have those instead of B (`[..., K]` or
            `[E, ..., K]`), the mean is over all of them, and reduction "none" gives `[E, ...]`.
        target: `[B, K]`, the same for all members, or `[E, B, K]`, of the input's dtype or float32; K is O,
            O/2 for gaussian_nll, and O/Q for quantile. For cross_entropy int64 `[B]` or `[E, B]`, classes
            from 0 to O - 1. Not looked at are whether targets are probabilities or counts.
        loss: one of those above.
        temperature: of cross_entropy and soft_cross_entropy, positive.
        label_smoothing: s of cross_entropy and soft_cross_entropy, in [0, 1], as in `F.cross_entropy`: the
            classes together are to get the share s, the label the rest. As there, with s > 0 the loss of a
            logit -inf is infinite, and its gradient finite. A share of 0 leaves its class out, also at -inf.
        delta: of huber and smooth_l1 (`F.smooth_l1_loss` calls it beta), positive: from which error on the
            loss grows no faster than the error.
        quantiles: of quantile: Q numbers t in (0, 1); a sequence, or a tensor `[Q]`. The outputs are target
            by target: output k Q + q is quantile q of target k. The gradient where an error is 0 is 0.
        class_weight: of cross_entropy: c, `[K]` or `[E, K]`, finite and at least 0, of the input's dtype or
            float32. As in `F.cross_entropy` each l_k counts c_k times, and the mean divides by the weights
            of the labels: loss[m] = sum_b w_b loss(m, b) / sum_b w_b c_{y_b}.
        log_variance_min, log_variance_max: of gaussian_nll, both or neither: `[K]`, `[E, K]` or a number for
            all. They bound the logarithm of the variance softly, as in PETS: s <- max - softplus(max - z),
            then s <- min + softplus(s - min); the loss is 1/K sum_k (s_k + (y_k - z_k)^2 e^-s_k) / 2, z the
            output K + k. Bounds that require a gradient get one: then the loss is composed of torch
            operations and `ensemble_mlp`. (PETS adds 0.01 (sum max - sum min) to the loss.)
        sample_weight: w, `[B]` or `[E, B]`, at least 0, of the input's dtype or float32; None is all ones. A
            weight of 0 leaves the example out, whatever is in it (NaN, an out-of-range class): so a
            member leaves out its jackknife group. Where the weights sum to 0, as with B = 0, the loss is 0.
        reduction: "mean", or "none" for w_b loss(m, b) itself, composed of torch operations and
            `ensemble_mlp`, whose outputs 16-bit types round. Its last bits depend on the shapes and on the
            number of threads, as those of torch's operations do.

    Returns:
        `[E]`, or with reduction "none" `[E, B]`; float32 (float64 for float64), also for bfloat16 and float16
        inputs, whose outputs enter the mean loss unrounded on the CPU. Under autocast the matrices cast as in
        `F.linear`.

    Differentiable in input, weights, biases, the norms' parameters and the bounds of log variances, twice and
    more; all others get no gradient. The mean loss and the gradients of parameters and an input per member
    are the same bits for any number of threads and any members beside. Within `torch.func`, grad, vjp, jvp
    and vmap work (also nested).

    On CUDA the loss of members of more than 2^19 parameters, or of layers too wide for shared memory, is
    composed of torch operations and `ensemble_mlp`; and a class out of range, or a weight that is negative or
    infinite, makes its member's loss and gradients NaN; quantiles and bounds are not looked at. The same
    holds where the composed loss is compiled.

    Raises:
        ValueError: a shape that does not fit, an unknown loss or reduction, an option out of range or of
            another loss; a target, weight or quantiles that require a gradient; on the CPU a class out of
            range, a negative or infinite weight, quantiles out of (0, 1), bounds that cross or are infinite.
        TypeError: mixed or unsupported dtypes, mixed devices.

    Source: gaussian_nll is eq. 1 of "Deep Ensemble" with its variance, its bounds are those of PETS ("Deep
    Reinforcement Learning in a Handful of Trials using Probabilistic Dynamics Models", appendix A.1); the
    temperature and the left-out groups (jackknife) are those of "Beyond Point Estimate". Reference in
    `pyens.reference.ensemble_mlp_loss`.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f'ensemble_mlp_loss: reduction: expected mean or none, got "{reduction}"')
    arguments, lead = _arguments(
        input,
        target,
        weights,
        biases,
        loss,
        temperature,
        label_smoothing,
        delta,
        quantiles,
        class_weight,
        log_variance_min,
        log_variance_max,
        sample_weight,
        activation,
        output_activation,
        norm,
        norm_weights,
        norm_biases,
        norm_eps,
        norm_position,
        residual,
        dropout,
        dropout_seeds,
        dropout_position,
        members,
        shared,
    )
    if reduction == "mean":
        return _ensemble_mlp_loss(*arguments)
    return as_given(_ensemble_mlp_example_losses(*arguments), lead)


_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(ensemble_mlp_loss).parameters.items()
    if name != "reduction"
}


def ensemble_mlp_loss_step_(step: tuple[Any, ...], **given: Any) -> Tensor:
    """The mean losses of `ensemble_mlp_loss(**given)`, and a step of an optimizer within the pass, in place.

    Args:
        step: which of the network's parameters, the optimizer and its numbers for them, what is remembered of
            them, and their counts of steps: see csrc/ops/ensemble_mlp_loss_step.cpp.

    For `pyens.optim.in_pass`, on the CPU. Its reference is the loss, its gradient and then
    `pyens.reference.optimizers`.
    """
    arguments, _ = _arguments(**_DEFAULTS | given)
    network, options = arguments[:6], arguments[6:]
    return _ensemble_mlp_loss_step_(*network, *step, *options)


def loss_options(**given: Any) -> tuple[Any, ...]:
    """What the schema of an operation with this loss has behind the network, in its order."""
    return _arguments(**_DEFAULTS | given)[0][6:]


def _arguments(
    input: Any,
    target: Any,
    weights: Any,
    biases: Any,
    loss: Any,
    temperature: Any,
    label_smoothing: Any,
    delta: Any,
    quantiles: Any,
    class_weight: Any,
    log_variance_min: Any,
    log_variance_max: Any,
    sample_weight: Any,
    activation: Any,
    output_activation: Any,
    norm: Any,
    norm_weights: Any,
    norm_biases: Any,
    norm_eps: Any,
    norm_position: Any,
    residual: Any,
    dropout: Any,
    dropout_seeds: Any,
    dropout_position: Any,
    members: Any,
    shared: Any,
) -> tuple[tuple[Any, ...], Any]:
    """What the operations take, and the dimensions that the input had in the place of B."""
    lead = None
    if shared or is_unusual(input):
        computed = weights if members is None else [members]
        given, (input, lead) = input, as_rows("ensemble_mlp_loss", input, computed, shared)
        if input is not given:
            target = of_rows(target, lead, 0 if loss == "cross_entropy" else 1, len(computed[0]))
            sample_weight = of_rows(sample_weight, lead, 0, len(computed[0]))
    norm_weights, norm_biases, options = schema_options(
        "ensemble_mlp_loss",
        input,
        weights,
        activation,
        output_activation,
        norm,
        norm_weights,
        norm_biases,
        norm_eps,
        norm_position,
        residual,
        dropout,
        dropout_seeds,
        dropout_position,
        members,
    )
    if quantiles is not None:
        quantiles = _quantiles(quantiles, input)
    if log_variance_min is not None or log_variance_max is not None:
        log_variance_min = _bound("log_variance_min", log_variance_min, weights)
        log_variance_max = _bound("log_variance_max", log_variance_max, weights)
    of_loss = loss, temperature, label_smoothing, sample_weight, delta, quantiles, class_weight
    bounds = log_variance_min, log_variance_max
    network = input, target, weights, () if biases is None else biases, norm_weights, norm_biases
    return (*network, *of_loss, *bounds, *options), lead


def _quantiles(quantiles: Sequence[float] | Tensor, input: Any) -> Tensor:
    """float64 `[Q]`, as exact as numbers are. A tensor's values are looked at by the operation."""
    if isinstance(quantiles, Tensor):
        _kinds.check_real("ensemble_mlp_loss", "quantiles", quantiles)
        return quantiles.double()
    if not isinstance(quantiles, Sequence) or isinstance(quantiles, (str, bytes)):
        raise TypeError(
            f"ensemble_mlp_loss: quantiles: expected a sequence of numbers, got {type(quantiles).__name__}"
        )
    for i, quantile in enumerate(quantiles):
        _kinds.check_number("ensemble_mlp_loss", f"quantiles[{i}]", quantile)
        if not 0 < quantile < 1:
            raise ValueError(
                f"ensemble_mlp_loss: quantiles[{i}]: expected a number above 0 and below 1, got {quantile}"
            )
    return torch.tensor(quantiles, dtype=torch.float64, device=getattr(input, "device", None))


def _bound(name: str, bound: Tensor | float | None, weights: Sequence[Tensor]) -> Tensor | None:
    """`[K]` of a number."""
    if bound is None or isinstance(bound, Tensor):
        return bound
    _kinds.check_number("ensemble_mlp_loss", name, bound)
    if not weights or not isinstance(weights[-1], Tensor) or weights[-1].dim() != 3:
        return None  # which is refused for other reasons
    last = weights[-1]
    real = torch.float64 if last.dtype == torch.float64 else torch.float32
    return torch.full((last.shape[1] // 2,), bound, dtype=real, device=last.device)


def _vmap(n: int, dims: Given, given: Given) -> tuple[Given, int, tuple[int, ...]]:
    if given["members"] is not None:
        raise NotImplementedError("ensemble_mlp_loss: members: expected None in vmap, got a tensor")
    ranks = {"sample_weight": 2, "target": 3 if given["target"].is_floating_point() else 2}
    ranks |= {"class_weight": 2, "log_variance_min": 2, "log_variance_max": 2}
    return join_members(n, dims, given, member_ranks(dims, given) | ranks)


_CONSTANTS = ("target", "sample_weight", "quantiles", "class_weight")
_ensemble_mlp_loss: Callable[..., Tensor] = operation(
    "ensemble_mlp_loss", from_schema(reference.ensemble_mlp_loss), _vmap, constants=_CONSTANTS
)
_ensemble_mlp_loss_step_: Callable[..., Tensor] = operation(
    "ensemble_mlp_loss_step_", function="ensemble_mlp_loss"
)
_ensemble_mlp_example_losses: Callable[..., Tensor] = operation(
    "ensemble_mlp_example_losses",
    from_schema(partial(reference.ensemble_mlp_loss, reduction="none")),
    _vmap,
    constants=_CONSTANTS,
    function="ensemble_mlp_loss",
)
