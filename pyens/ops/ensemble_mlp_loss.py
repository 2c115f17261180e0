"""The loss inside the fused ensemble MLP."""

from collections.abc import Callable, Sequence

from torch import Tensor

from pyens import reference
from pyens._types import Activation, Dropout, DropoutPosition, Loss, Norm, NormPosition
from pyens.ops._call import Given, join_members, operation
from pyens.ops._inputs import as_rows, is_unusual, of_rows
from pyens.ops.ensemble_mlp import (
    Layers,
    Norms,
    from_schema,
    layer_options,
    member_ranks,
    member_rates,
)


def ensemble_mlp_loss(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    loss: Loss,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
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
) -> Tensor:
    r"""Each member's own mean loss, computed with its gradient in one pass over the examples.

    With z[m, b] = `ensemble_mlp(input, ...)`[m, b], targets y and K outputs, the loss of an example is

        mse             1/K sum_k (z_k - y_k)^2
        bce             1/K sum_k log(1 + e^z_k) - z_k y_k                                  z are logits
        gaussian_nll    1/K sum_k log(v_k)/2 + (y_k - z_k)^2 / (2 v_k)    v_k = softplus(z_{K+k}) + 1e-6
        cross_entropy   (1 - s) l_y + s/K sum_k l_k    l = -log softmax(z / temperature), y is a class

    in nats, gaussian_nll without its constant, and loss[m] = sum_b w_b loss(m, b) / sum_b w_b. An ensemble
    trains on `loss.sum()`: the sum of its members' losses, never the loss of their mean.

    Where a gradient is needed, it is computed along with the loss, tile by tile, and backward only scales it.
    Nothing of size `[E, B, hidden]` is ever stored. One exception: the gradient of a shared input is computed
    in backward by a second pass, for it sums over members that are scaled differently.

    Args:
        input, weights, biases, and what follows sample_weight: as in `pyens.ops.ensemble_mlp`. Where the
            input has other dimensions than B, target and sample_weight have those instead of B (`[..., K]` or
            `[E, ..., K]`), and the mean is over all of them.
        target: `[B, K]`, the same for all members, or `[E, B, K]`, of the input's dtype or float32; K is O,
            and O/2 for gaussian_nll. For cross_entropy int64 `[B]` or `[E, B]`, classes from 0 to O - 1.
        loss: mse, bce, gaussian_nll or cross_entropy.
        temperature: of cross_entropy, positive.
        label_smoothing: s of cross_entropy, in [0, 1], as in `F.cross_entropy`: the classes together are to
            get the share s, the label the rest. As there, with s > 0 the loss of a logit -inf is infinite,
            and its gradient finite.
        sample_weight: w, `[B]` or `[E, B]`, at least 0, of the input's dtype or float32; None is all ones. A
            weight of 0 leaves the example out, whatever is in it (NaN, an out-of-range class): so a
            member leaves out its jackknife group. Where the weights sum to 0, as with B = 0, the loss is 0.

    Returns:
        `[E]`, float32 (float64 for float64), also for bfloat16 and float16 inputs, whose outputs enter the
        loss unrounded on the CPU. Under autocast the matrices cast as in `F.linear`.

    Differentiable in input, weights, biases and the norms' parameters, twice and more; target and
    sample_weight get no gradient. The loss and the gradients of parameters and an input per member are the
    same bits for any number of threads and any members beside. Within `torch.func`, grad, vjp, jvp and vmap
    work (also nested).

    On CUDA the loss of members of more than 2^19 parameters, or of layers too wide for shared memory, is
    composed of torch operations and `ensemble_mlp`; and a class out of range, or a weight that is negative or
    infinite, makes its member's loss and gradients NaN.

    Raises:
        ValueError: a shape that does not fit, an unknown loss, a temperature or label smoothing out of range
            or without cross_entropy; a target or sample_weight that requires a gradient; on the CPU a class
            out of range, and a negative or infinite weight.
        TypeError: mixed or unsupported dtypes, mixed devices.

    Source: gaussian_nll is eq. 1 of "Deep Ensemble" with its variance; the temperature and the left-out
    groups (jackknife) are those of "Beyond Point Estimate". Reference in `pyens.reference.ensemble_mlp_loss`.
    """
    layers = layer_options(
        "ensemble_mlp_loss",
        weights,
        activation,
        output_activation,
        norm,
        norm_eps,
        norm_position,
        residual,
        dropout_position,
    )
    return call_ensemble_mlp_loss(
        input,
        target,
        weights,
        () if biases is None else biases,
        (() if norm_weights is None else norm_weights, () if norm_biases is None else norm_biases),
        (loss, temperature, label_smoothing, sample_weight),
        layers,
        dropout,
        dropout_seeds,
        members,
        shared,
    )


def call_ensemble_mlp_loss(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Norms,
    of_loss: tuple[Loss, float, float, Tensor | None],
    layers: Layers,
    dropout: Dropout,
    seeds: Tensor | None,
    members: Tensor | None,
    shared: bool,
) -> Tensor:
    """`ensemble_mlp_loss` of options that `layer_options` has made: a module does so once.

    `of_loss`: loss, temperature, label_smoothing and sample_weight.
    """
    rates = None
    if not isinstance(dropout, (float, int)):
        dropout, rates = member_rates("ensemble_mlp_loss", dropout, input)
    loss, temperature, label_smoothing, sample_weight = of_loss
    if shared or is_unusual(input):
        computed = weights if members is None else [members]
        given, (input, lead) = input, as_rows(input, computed, shared)
        if input is not given:
            target = of_rows(target, lead, 0 if loss == "cross_entropy" else 1, len(computed[0]))
            sample_weight = of_rows(sample_weight, lead, 0, len(computed[0]))
    norm_weights, norm_biases = norms
    activation, early, output_activation, norm, eps, late, residual = layers
    return _ensemble_mlp_loss(
        input,
        target,
        weights,
        biases,
        norm_weights,
        norm_biases,
        loss,
        temperature,
        label_smoothing,
        sample_weight,
        activation,
        dropout,
        seeds,
        rates,
        early,
        output_activation,
        norm,
        eps,
        late,
        residual,
        members,
    )


def _vmap(n: int, dims: Given, given: Given) -> tuple[Given, int, tuple[int, ...]]:
    if given["members"] is not None:
        raise NotImplementedError("ensemble_mlp_loss: members: expected None in vmap, got a tensor")
    target = 3 if given["target"].is_floating_point() else 2
    return join_members(n, dims, given, member_ranks(dims, given) | {"sample_weight": 2, "target": target})


_ensemble_mlp_loss: Callable[..., Tensor] = operation(
    "ensemble_mlp_loss",
    from_schema(reference.ensemble_mlp_loss),
    _vmap,
    constants=("target", "sample_weight"),
)
