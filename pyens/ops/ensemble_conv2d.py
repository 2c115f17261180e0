"""A convolution per member."""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from pyens import reference
from pyens.ops._call import Given, join_members, join_rows, mapped, operation

Size = int | Sequence[int]


def ensemble_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    activation: Literal["identity", "relu"] = "identity",
    max_pool: Size = 1,
) -> Tensor:
    r"""E convolutions in one call, each with a ReLU and a maximum of windows behind it.

        z[m, b, o, y, x] = bias[m, o]
                           + sum_{c, i, j} weight[m, o, c, i, j] image[c, y s + i d - p, x s + j d - p]
        output[m, b] = max over windows of act(z[m, b])

    with image = input[b] or input[m, b], zeros around it, and stride s, dilation d, padding p of each axis.

    Args:
        input: images `[B, C, H, W]`, shared by all members, or `[E, B, C, H, W]`. B may be 0.
        weight: `[E, O, C, h, w]`, the layout of `nn.Conv2d.weight` stacked. float32, float64, bfloat16,
            float16; 16-bit ones are computed in float32.
        bias: `[E, O]`, or None.
        stride, padding, dilation: as in `nn.Conv2d`: one for both axes, or (vertical, horizontal).
        activation: "relu" or "identity".
        max_pool: the window whose maximum is taken, as `nn.MaxPool2d(max_pool)` does: side by side, and what
            is left over at the end is not read. Up to 255 pixels; 1: none.

    Returns:
        `[E, B, O, H', W']`, contiguous, H' = ((H + 2 p - d (h - 1) - 1) // s + 1) // window.

    Differentiable in input, weight and bias, twice and more. On the CPU outputs and gradients have the same
    bits for any number of threads and any members beside, outputs for any batch too; Inf and NaN go where
    `nn.Conv2d`, `nn.ReLU` and `nn.MaxPool2d` send them, except that a weight that is not finite makes NaN of
    the padding it meets. On CUDA the members are groups of torch's own convolution. Autocast lowers it as
    `conv2d`. Within `torch.func`, grad, vjp, jvp and vmap work (also nested).

    Raises:
        ValueError: a shape that does not fit, a kernel or window larger than what it is to be laid on, an
            empty image, a stride, dilation or window below 1, a padding below 0.
        TypeError: an unsupported dtype, mixed dtypes or devices.

    Source: the networks of "Sparsity"; reference in `pyens.reference.ensemble_conv2d`.
    """
    return _ensemble_conv2d(
        input, weight, bias, pair(stride), pair(padding), pair(dilation), activation, pair(max_pool)
    )


def pair(value: Size) -> Size:
    """(vertical, horizontal) of one number for both; what is no number goes on as it is."""
    return [value, value] if isinstance(value, int) else value


def _vmap(n: int, dims: Given, given: Given) -> tuple[Given, int, tuple[int, ...]]:
    if mapped(dims) == {"input"}:
        return join_rows(n, dims, given, {"input": -4})
    return join_members(n, dims, given, {"weight": 5, "input": 5, "bias": 2})


_ensemble_conv2d: Callable[..., Tensor] = operation("ensemble_conv2d", reference.ensemble_conv2d, _vmap)
