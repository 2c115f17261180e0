"""Specification of `pyens.ops.mask_channels`."""

import torch
from torch import Tensor


def mask_channels(input: Tensor, masks: Tensor, index: Tensor | None = None) -> Tensor:
    """Channel c of row b where masks[index[b], c], else 0.

    input `[B, C, *]`, masks bool `[N, C]`, index int64 `[B]`; None: N groups of rows one after the other, the
    parts of `torch.tensor_split`. What is masked is selected, not multiplied: NaN and Inf go.
    """
    kept = masks[grouped(input, masks) if index is None else index]  # [B, C]
    return torch.where(kept.reshape(*kept.shape, *[1] * (input.dim() - 2)), input, 0)


def grouped(input: Tensor, masks: Tensor) -> Tensor:
    """int64 `[B]`: the group of each row where N contiguous groups are as equal as can be."""
    groups = torch.arange(input.shape[0], device=input.device).tensor_split(masks.shape[0])
    return torch.cat([torch.full_like(rows, n) for n, rows in enumerate(groups)])
