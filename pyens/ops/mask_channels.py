"""Channels kept or zeroed, each row of the batch by a mask of its own."""

import torch
from torch import Tensor

from pyens import reference
from pyens._library import _C

_peek_transform = torch._C._functorch.peek_interpreter_stack


def mask_channels(input: Tensor, masks: Tensor, index: Tensor | None = None) -> Tensor:
    r"""output[b, c, ...] = input[b, c, ...] if masks[index[b], c] else 0.

    Nothing is rescaled. What is masked is selected, not multiplied by 0: there Inf and NaN give 0.

    Args:
        input: `[B, C, ...]`, float32, float64, bfloat16 or float16. B may be 0.
        masks: bool `[N, C]`.
        index: int64 `[B]`, the mask of each row; None cuts the batch into N contiguous groups, the first ones
            longer by one where N does not divide B (`torch.tensor_split`), and gives group n mask n.

    Returns:
        As the input, contiguous.

    One pass over memory, and of the masked channels nothing is read. Differentiable in input, as often as one
    likes. Within `torch.func` it is composed of torch operations.

    Raises:
        ValueError: a shape that does not fit; on the CPU an index out of range (on CUDA: NaN).
        TypeError: masks that are not bool, an index that is not int64, an unsupported dtype, mixed devices.

    Source: "Masksembles", section 3; reference in `pyens.reference.mask_channels`.
    """
    if torch.compiler.is_compiling():
        return torch.ops.pyens.mask_channels(input, masks, index)
    if _peek_transform() is not None:
        return reference.mask_channels(input, masks, index)
    return _C.mask_channels(input, masks, index)
