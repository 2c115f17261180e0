"""Orders of rows as a pure function of a key and a place, for as many rows as one likes."""

from collections.abc import Callable

from torch import Tensor

from pyens.ops._call import operation


def keyed_permutation(keys: Tensor, n: int, first: int = 0, count: int | None = None) -> Tensor:
    r"""output[m, i] = what is at place first + i of a permutation of 0, 1, ..., n - 1 that keys[m] decides.

    `torch.randperm` for more rows than one wants a table of: nothing is stored, and any part of the order
    is made in the time that this part takes. Each member its own order of 200 million rows, in batches:

        rows = pyens.ops.keyed_permutation(keys, 200_000_000, first, 1024)   # [E, 1024]

    A pure function, the same on every device: of a key, all places from 0 to n - 1 together give each number
    once, in an order that looks drawn. (Statistically. It is no cipher: who sees the order can find the key.)

    Args:
        keys: int64 `[E]`, any numbers; neighbours are as good as any.
        n: rows, 0 to 2^62.
        first: a place from 0 to n.
        count: how many places from there on; None: all.

    Returns:
        int64 `[E, count]`.

    Not differentiable, and `torch.func` has no rule for it.

    Raises:
        ValueError: keys not `[E]`, places beyond n.
        TypeError: keys that are not int64.

    Source: ours, formula in `pyens.reference.keyed_permutation`; repeating a bijection of a power of two
    until it falls into the range is from Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.
    """
    if isinstance(n, int) and n > 1 << 62:  # which may be beyond what an operation takes
        raise ValueError(f"keyed_permutation: n: expected rows from 0 to 2^62, got {n}")
    if count is None:  # numbers of another kind are refused by the operation
        count = max(0, n - first) if isinstance(n, int) and isinstance(first, int) else 0
    return _keyed_permutation(keys, n, first, count)


_keyed_permutation: Callable[..., Tensor] = operation("keyed_permutation")
