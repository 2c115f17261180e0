"""Specification of `pyens.ops.ensemble_conv2d`."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def ensemble_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "identity",
    max_pool: int | Sequence[int] = 1,
) -> Tensor:
    """Every member's convolution, its ReLU if `activation` is "relu", the maximum of windows side by side.

    input `[B, C, H, W]` or `[E, B, C, H, W]`, weight `[E, O, C, h, w]`, bias `[E, O]`; returns
    `[E, B, O, H', W']`. The members are groups of one convolution.
    """
    members, shared = len(weight), input.dim() == 4
    images = input if shared else input.transpose(0, 1).flatten(1, 2)  # [B, E C, H, W]
    output = F.conv2d(
        images,
        weight.flatten(0, 1),
        None if bias is None else bias.flatten(),
        _pair(stride),
        _pair(padding),
        _pair(dilation),
        groups=1 if shared else members,
    )
    if activation == "relu":
        output = output.relu()
    if _pair(max_pool) != (1, 1):
        output = F.max_pool2d(output, _pair(max_pool))
    return output.reshape(len(output), members, weight.shape[1], *output.shape[2:]).transpose(0, 1)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width
