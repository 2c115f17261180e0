"""Channels kept or zeroed, each row of the batch by a mask of its own."""

from collections.abc import Callable

from torch import Tensor

from pyens import reference
from pyens.ops._call import Given, first, operation, shifted
from pyens.reference.mask_channels import grouped


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
    likes. Within `torch.func`, grad, vjp, jvp and vmap work (also nested).

    Raises:
        ValueError: a shape that does not fit; on the CPU an index out of range (on CUDA: NaN).
        TypeError: masks that are not bool, an index that is not int64, an unsupported dtype, mixed devices.

    Source: "Masksembles", section 3; reference in `pyens.reference.mask_channels`.
    """
    return _mask_channels(input, masks, index)


def _vmap(n: int, dims: Given, given: Given) -> tuple[Given, int, tuple[int, ...]]:
    # The mapped dimension joins the rows; masks that are mapped join the masks.
    input, masks = (first(n, given[name], dims[name]) for name in ("input", "masks"))  # [n, B, ..], [n, N, C]
    index = grouped(input[0], masks[0]) if given["index"] is None else given["index"]
    index = shifted(first(n, index, dims["index"]), masks.shape[1])
    joined = {"input": input.flatten(0, 1), "masks": masks.flatten(0, 1), "index": index.flatten()}
    return joined, 0, (n, input.shape[1])


_mask_channels: Callable[..., Tensor] = operation("mask_channels", reference.mask_channels, _vmap)
