"""Specification of the operations on `pyens.ops.Int8Weight`: whole numbers in float64, which holds sums."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pyens._types import Activation
from pyens.reference.activations import activation_module
from pyens.reference.ensemble_conv2d import ensemble_conv2d
from pyens.reference.ensemble_mlp import for_each


class Weight(Protocol):
    """What an `Int8Weight` is here."""

    values: Tensor
    scale: Tensor
    offset: Tensor
    input_scale: Tensor
    input_zero_point: Tensor


def quantize(input: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Bytes less the zero point, of `[E, ...]`; as `torch.quantize_per_tensor` has them for each member."""
    each = (-1, *[1] * (input.dim() - 1))
    zero = zero_point.float().view(each)
    return (input * (1 / scale.view(each))).round().clamp(-zero, 255 - zero)


def ensemble_mlp_int8(
    input: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor] | None = None,
    *,
    activation: Activation | Sequence[Activation] = "relu",
    output_activation: Activation = "identity",
) -> Tensor:
    """See `pyens.ops.ensemble_mlp_int8`."""
    activations = [*for_each(activation, len(weights) - 1), output_activation]
    h = input.expand(weights[0].values.shape[0], *input.shape[-2:])
    nan = h.isnan().any(-1, keepdim=True)
    for i, weight in enumerate(weights):
        q = quantize(h, weight.input_scale, weight.input_zero_point)
        sums = q.nan_to_num(0).double() @ weight.values.double().mT
        h = sums.float() * (weight.scale * weight.input_scale.unsqueeze(-1)).unsqueeze(1)
        if biases is not None and biases[i].shape[1] > 0:
            h = h + biases[i].unsqueeze(1)
        h = activation_module(activations[i])(h)
        if i + 1 < len(weights):
            nan = nan | h.isnan().any(-1, keepdim=True)
    return h.masked_fill(nan, float("nan"))


def ensemble_conv2d_int8(
    input: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "identity",
    max_pool: int | Sequence[int] = 1,
) -> Tensor:
    """See `pyens.ops.ensemble_conv2d_int8`."""
    h = input.expand(weight.values.shape[0], *input.shape[-4:])
    nan = h.flatten(2).isnan().any(-1)
    q = quantize(h, weight.input_scale, weight.input_zero_point).nan_to_num(0)
    sums = ensemble_conv2d(
        q.double(), weight.values.double(), stride=stride, padding=padding, dilation=dilation
    )
    z = sums.float() * (weight.scale * weight.input_scale.unsqueeze(-1))[:, None, :, None, None]
    if bias is not None:
        z = z + bias[:, None, :, None, None]
    z = torch.relu(z) if activation == "relu" else z
    window = [max_pool] * 2 if isinstance(max_pool, int) else list(max_pool)
    z = F.max_pool2d(z.flatten(0, 1), window).unflatten(0, z.shape[:2])
    output: Tensor = z.masked_fill(nan[:, :, None, None, None], float("nan"))
    return output
