"""Specification of `pyens.ops.keyed_permutation`."""

import torch
from torch import Tensor

from pyens.reference.ensemble_mlp import splitmix

ROUNDS = 6
LEAST_BITS = 10


def keyed_permutation(keys: Tensor, n: int, first: int, count: int) -> Tensor:
    """int64 `[E, count]`: what is at places first to first + count - 1 of a permutation of [0, n), by key.

    A bijection of [0, 2^bits), the least power of two that is not below n, nor below 2^10:

        x <- (x * multiplier + summand) mod 2^bits, then x <- x xor (x >> ceil(bits / 2)), six times

    with an odd multiplier and a summand for each round, from the key by splitmix64; gone through again for as
    long as what comes out is not below n. keys int64 `[E]`.
    """
    bits = max(LEAST_BITS, (n - 1).bit_length())
    mask, half = (1 << bits) - 1, (bits + 1) // 2
    mixed = splitmix(keys).unsqueeze(1)
    rounds = [(splitmix(mixed + 2 * r) | 1, splitmix(mixed + 2 * r + 1)) for r in range(ROUNDS)]
    places = torch.arange(first, first + count, device=keys.device)
    found = places.expand(len(keys), -1)
    outside = torch.ones_like(found, dtype=torch.bool)
    while outside.any():
        x = found
        for multiplier, summand in rounds:
            x = (x * multiplier + summand) & mask
            x = x ^ (x >> half)
        found = torch.where(outside, x, found)
        outside = found >= n
    return found
