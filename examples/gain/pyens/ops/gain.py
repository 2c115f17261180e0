"""A factor for each feature of each member."""

from collections.abc import Callable

from torch import Tensor

from pyens import reference
from pyens.ops._call import Given, join_members, operation


def gain(input: Tensor, scale: Tensor) -> Tensor:
    r"""output[m, b, d] = input[m, b, d] * scale[m, d]

    Args:
        input: `[B, D]` (shared by all members) or `[E, B, D]`, float32, float64, bfloat16 or float16.
        scale: `[E, D]`, of the same dtype and device. Any size may be 0.

    Returns:
        `[E, B, D]`, contiguous. The product is rounded once.

    Differentiable in both, as often as one likes. Under autocast both are cast to its dtype. Within
    `torch.func`, grad, vjp, jvp and vmap work (also nested).

    Raises:
        ValueError: a shape that does not fit.
        TypeError: an unsupported dtype, mixed dtypes or devices.

    Source: "BatchEnsemble", section 3.2, its r alone; reference in `pyens.reference.gain`.
    """
    return _gain(input, scale)


def _vmap(n: int, dims: Given, given: Given) -> tuple[Given, int, tuple[int, ...]]:
    return join_members(n, dims, given, {"scale": 2, "input": 3})


_gain: Callable[..., Tensor] = operation("gain", reference.gain, _vmap)
