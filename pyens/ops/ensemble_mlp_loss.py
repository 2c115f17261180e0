"""The loss inside the fused ensemble MLP."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyens import reference
from pyens._library import _C
from pyens.reference.ensemble_mlp import ACTIVATIONS
from pyens.reference.ensemble_mlp_loss import LOSSES

_peek_transform = torch._C._functorch.peek_interpreter_stack


def ensemble_mlp_loss(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    loss: str,
    activation: str = "relu",
    temperature: float = 1.0,
    sample_weight: Tensor | None = None,
    dropout: float = 0.0,
    dropout_seeds: Tensor | None = None,
) -> Tensor:
    r"""Each member's own mean loss, computed with its gradient in one pass over the examples.

    With z[m, b] = `ensemble_mlp(input, ...)`[m, b], targets y and K outputs, the loss of an example is

        mse             1/K sum_k (z_k - y_k)^2
        bce             1/K sum_k log(1 + e^z_k) - z_k y_k                                  z are logits
        gaussian_nll    1/K sum_k log(v_k)/2 + (y_k - z_k)^2 / (2 v_k)    v_k = softplus(z_{K+k}) + 1e-6
        cross_entropy   -log softmax(z / temperature)_y                                     y is a class

    in nats, gaussian_nll without its constant, and loss[m] = sum_b w_b loss(m, b) / sum_b w_b. An ensemble
    trains on `loss.sum()`: the sum of its members' losses, never the loss of their mean.

    Where a gradient is needed, it is computed along with the loss, tile by tile, and backward only scales it.
    Nothing of size `[E, B, hidden]` is ever stored. One exception: the gradient of a shared input is computed
    in backward by a second pass, for it sums over members that are scaled differently.

    Args:
        input, weights, biases, activation, dropout, dropout_seeds: as in `pyens.ops.ensemble_mlp`.
        target: `[B, K]`, the same for all members, or `[E, B, K]`, of the input's dtype or float32; K is O,
            and O/2 for gaussian_nll. For cross_entropy int64 `[B]` or `[E, B]`, classes from 0 to O - 1.
        loss: mse, bce, gaussian_nll or cross_entropy.
        temperature: of cross_entropy, positive.
        sample_weight: w, `[B]` or `[E, B]`, at least 0, of the input's dtype or float32; None is all ones. A
            weight of 0 leaves the example out, whatever is in it (NaN, a class that there is not): so a
            member leaves out its jackknife group. Where the weights sum to 0, as with B = 0, the loss is 0.

    Returns:
        `[E]`, float32 (float64 for float64), also for bfloat16 and float16 inputs, whose outputs enter the
        loss unrounded on the CPU. Under autocast the matrices cast as in `F.linear`.

    Differentiable in input, weights and biases, twice and more; target and sample_weight get no gradient.
    The loss and the gradients of weights, biases and an input per member are the same bits for any number of
    threads and any members beside. Within `torch.func`, and on CUDA for members of more than 2^19 parameters
    or layers too wide for shared memory, it is composed of torch operations and `ensemble_mlp`. On CUDA a
    class out of range, or a weight that is negative or infinite, makes its member's loss and gradients NaN.

    Raises:
        ValueError: a shape that does not fit, an unknown loss, a temperature without cross_entropy; a target
            or sample_weight that requires a gradient; on the CPU a class out of range, and a negative or
            infinite weight.
        TypeError: mixed or unsupported dtypes, mixed devices.

    Source: gaussian_nll is eq. 1 of "deep ensembles" with its variance; the temperature and the left-out
    groups (jackknife) are those of "prediction variation". Reference in `pyens.reference.ensemble_mlp_loss`.
    """
    if torch.compiler.is_compiling():
        return torch.ops.pyens.ensemble_mlp_loss(
            input,
            target,
            list(weights),
            list(biases or ()),
            loss,
            activation,
            temperature,
            sample_weight,
            dropout,
            dropout_seeds,
        )
    if _peek_transform() is not None:
        members, outputs = weights[0].shape[0], weights[-1].shape[1]
        check_loss(
            "ensemble_mlp_loss",
            weights[0],
            members,
            input.shape[-2],
            outputs,
            target,
            loss,
            activation,
            temperature,
            sample_weight,
        )
        return reference.ensemble_mlp_loss(
            input,
            target,
            weights,
            biases,
            loss=loss,
            activation=activation,
            temperature=temperature,
            sample_weight=sample_weight,
            dropout=dropout,
            dropout_seeds=dropout_seeds,
        )
    return _C.ensemble_mlp_loss(
        input,
        target,
        weights,
        biases or (),
        loss,
        activation,
        temperature,
        sample_weight,
        dropout,
        dropout_seeds,
    )


def check_loss(
    op: str,
    like: Tensor,
    members: int,
    batch: int,
    outputs: int,
    target: Tensor,
    loss: str,
    activation: str,
    temperature: float,
    sample_weight: Tensor | None,
) -> None:
    """What the operation refuses and torch operations would let pass, or refuse less clearly.

    `like` is the first weight, of `members` MLPs with `outputs` outputs.
    """
    for argument, name, known in (("loss", loss, LOSSES), ("activation", activation, ACTIVATIONS)):
        if name not in known:
            raise ValueError(f'{op}: {argument}: expected one of {", ".join(known)}, got "{name}"')
    if loss == "cross_entropy":
        if not 0 < temperature < math.inf:
            raise ValueError(f"{op}: temperature: expected a positive number, got {temperature}")
    elif temperature != 1:
        raise ValueError(
            f"{op}: temperature: expected 1 (only cross_entropy has one) with loss {loss}, got {temperature}"
        )
    if loss == "gaussian_nll" and outputs % 2:
        raise ValueError(
            f"{op}: weights: expected an even number of outputs for gaussian_nll (means and raw variances), "
            f"got {outputs}"
        )
    each = {"cross_entropy": (), "gaussian_nll": (outputs // 2,)}.get(loss, (outputs,))
    real = (like.dtype, torch.float64 if like.dtype == torch.float64 else torch.float32)
    for argument, tensor, shape, dtypes in (
        ("target", target, (batch, *each), (torch.int64,) if loss == "cross_entropy" else real),
        ("sample_weight", sample_weight, (batch,), real),
    ):
        if tensor is None:
            continue
        if tensor.requires_grad:
            raise ValueError(
                f"{op}: {argument}: expected requires_grad=False (it gets no gradient), got True"
            )
        # Under autocast real numbers are cast.
        cast = dtypes is real and torch.is_autocast_enabled(like.device.type)
        if tensor.dtype not in dtypes and not cast:
            expected = " or ".join(dict.fromkeys(map(str, dtypes)))
            raise TypeError(f"{op}: {argument}: expected {expected}, got {tensor.dtype}")
        if tuple(tensor.shape) not in (shape, (members, *shape)):
            raise ValueError(
                f"{op}: {argument}: expected shape {list(shape)} or {[members, *shape]}, "
                f"got shape {list(tensor.shape)}"
            )
