"""Members whose weights are bytes: the format, and the operations on it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyens import _kinds
from pyens.ops._call import operation
from pyens.ops.ensemble_conv2d import pair
from pyens.ops.sparse_rows import hidden_names


class Int8Weight(NamedTuple):
    """The weights `[E, rows, ...]` of a layer in bytes, and how its inputs become bytes: made by `pack_int8`.

    Weight = values * scale, input = (byte - input_zero_point) * input_scale.
    """

    values: Tensor  # int8 [E, out, in], or [E, O, C, h, w] of a convolution; from -127 to 127
    scale: Tensor  # float32 [E, out], of each row
    offset: Tensor  # int32 [E, out], -input_zero_point times the sum of the row's values
    input_scale: Tensor  # float32 [E], of each member
    input_zero_point: Tensor  # uint8 [E], the byte of an input of 0

    @property
    def shape(self) -> torch.Size:
        """Of the weights."""
        return self.values.shape

    def dense(self) -> Tensor:
        """The weights as float32."""
        return self.values * self.scale.reshape(*self.scale.shape, *[1] * (self.values.dim() - 2))


@torch.no_grad()
def pack_int8(weights: Tensor, input_scale: Tensor, input_zero_point: Tensor) -> Int8Weight:
    """The weights of a layer in bytes: symmetric for each member and row, by the largest weight of the row.

    Args:
        weights: `[E, out, in]`, or of a convolution `[E, O, C, h, w]`; float32. A row of zeros is its bias
            alone.
        input_scale: float32 `[E]`, positive; input_zero_point: uint8 `[E]`. What an observer of torch finds
            (`torch.ao.quantization.MinMaxObserver`, say) for the inputs of each member; or see
            `pyens.nn.EnsembleMLP.quantize`.

    Returns:
        `Int8Weight`, for `pyens.ops.ensemble_mlp_int8` and `ensemble_conv2d_int8`.

    Raises:
        TypeError: another dtype.
        ValueError: another shape; what is not finite; a scale that is not positive and normal; rows so long
            that a sum might leave int32: that is looked at here, and not in each call.
    """
    op = "pack_int8"
    kinds = {"weights": torch.float32, "input_scale": torch.float32, "input_zero_point": torch.uint8}
    tensors = {"weights": weights, "input_scale": input_scale, "input_zero_point": input_zero_point}
    for name, tensor in tensors.items():
        _kinds.check_tensor(op, name, tensor)
        if tensor.dtype != kinds[name]:
            raise TypeError(f"{op}: {name}: expected {_short(kinds[name])}, got {tensor.dtype}")
    if weights.dim() not in (3, 5) or weights.numel() == 0:
        raise ValueError(
            f"{op}: weights: expected [E, out, in] or [E, O, C, h, w], none of them 0, "
            f"got shape {list(weights.shape)}"
        )
    members = weights.shape[0]
    for name in ("input_scale", "input_zero_point"):
        if tensors[name].shape != (members,):
            raise ValueError(f"{op}: {name}: expected shape [{members}], got {list(tensors[name].shape)}")
    if not weights.isfinite().all():
        raise ValueError(f"{op}: weights: expected finite numbers, got NaN or Inf")
    tiny = torch.finfo(torch.float32).tiny
    if not (input_scale.isfinite() & (input_scale >= tiny)).all():
        raise ValueError(f"{op}: input_scale: expected finite numbers of at least {tiny}, got {input_scale}")
    rows = weights.flatten(2)
    scale = (rows.abs().amax(-1) / 127).clamp_min(tiny)
    values = (rows / scale.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    # A sum begins at the offset and passes through these at most.
    offset = -input_zero_point.long().unsqueeze(-1) * values.sum(-1, dtype=torch.int64)
    largest = offset.abs() + 255 * values.abs().sum(-1, dtype=torch.int64)
    if int(largest.max()) >= 2**31:
        e, row = divmod(int(largest.argmax()), largest.shape[1])
        raise ValueError(
            f"{op}: weights: expected rows whose sums stay below 2^31 in bytes, got row {row} of member {e}: "
            f"{rows.shape[-1]} inputs may add up to {int(largest.max())}"
        )
    if not (scale * input_scale.unsqueeze(-1) * largest).isfinite().all():
        raise ValueError(
            f"{op}: weights: expected products with the inputs that float32 holds, got larger ones"
        )
    return Int8Weight(
        values.view(weights.shape), scale, offset.int(), input_scale.clone(), input_zero_point.clone()
    )


def ensemble_mlp_int8(
    input: Tensor,
    weights: Sequence[Int8Weight],
    biases: Sequence[Tensor] | None = None,
    *,
    activation: str | Sequence[str] = "relu",
    output_activation: str = "identity",
) -> Tensor:
    r"""`pyens.ops.ensemble_mlp` of weights in bytes, whose layers' inputs become bytes too.

    .. math::
        q_k = \mathrm{clamp}(\mathrm{round}(x_k / s) + z, 0, 255), \qquad
        y_o = s\, s_o \sum_k w_{ok} (q_k - z) + b_o

    with the input's scale s and zero point z of the member, and the row's scale :math:`s_o`.

    Args:
        input: `[B, I]`, shared by all members, or `[E, B, I]`; float32.
        weights: an `Int8Weight` for each layer.
        biases: L tensors float32 `[E, out_l]`, `[E, 0]` for a layer without one, or None.
        activation, output_activation: as in `pyens.ops.ensemble_mlp`.

    Returns:
        `[E, B, O]`, float32. With ReLU, leaky ReLU and identity the same bits on every processor, for sums
        are of whole numbers, and what follows is rounded alike; with any activation the same for any number
        of threads, any split of the batch and any members beside. An example that meets a NaN is NaN; Inf
        is the largest or the smallest byte.

    Inference on the CPU: nothing has a gradient. Four inputs a lane and instruction where the processor has
    VNNI, two in two instructions elsewhere.

    Raises:
        ValueError, TypeError: shapes, dtypes and devices that do not fit.
        NotImplementedError: another device.
        RuntimeError: a gradient that is asked for, when it is computed.

    Reference in `pyens.reference.ensemble_mlp_int8`.
    """
    _check_weights("ensemble_mlp_int8", weights)
    return _ensemble_mlp_int8(
        input,
        *_columns(weights),
        () if biases is None else biases,
        hidden_names(activation, len(weights)),
        output_activation,
    )


def ensemble_conv2d_int8(
    input: Tensor,
    weight: Int8Weight,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "identity",
    max_pool: int | Sequence[int] = 1,
) -> Tensor:
    """`pyens.ops.ensemble_conv2d` of weights in bytes, as `ensemble_mlp_int8` has them.

    An image that meets a NaN is NaN in all its outputs.
    """
    _check_weights("ensemble_conv2d_int8", [weight])
    return _ensemble_conv2d_int8(
        input, *weight, bias, pair(stride), pair(padding), pair(dilation), activation, pair(max_pool)
    )


def _columns(weights: Sequence[Int8Weight]) -> list[list[Tensor]]:
    """The fields of all layers, field by field."""
    return [[layer[field] for layer in weights] for field in range(len(Int8Weight._fields))]


def _check_weights(op: str, weights: Any) -> None:
    if isinstance(weights, Tensor) or not all(isinstance(one, Int8Weight) for one in weights):
        raise TypeError(f"{op}: weights: expected Int8Weight, as pack_int8 makes it, got another kind")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_ensemble_mlp_int8: Callable[..., Tensor] = operation("ensemble_mlp_int8")
_ensemble_conv2d_int8: Callable[..., Tensor] = operation("ensemble_conv2d_int8")
