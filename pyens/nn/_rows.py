"""Which row of a batch meets which of N masks."""

import torch
from torch import Tensor

from pyens.reference.ensemble_mlp import _splitmix

MODES = ("grouped", "dealt", "drawn")


def check_mode(function: str, mode: str, modes: tuple[str, ...]) -> None:
    if mode not in modes:
        raise ValueError(f"{function}: mode: expected one of {', '.join(modes)}, got {mode!r}")


def cards(mode: str, batch_size: int, n: int, seed: Tensor) -> Tensor:
    """A card for every row, int64 `[batch_size]`, from ceil(batch_size / n) decks of n.

    Row b meets mask cards[b] % n and is the cards[b] // n -th row to do so; no card is there twice.

        grouped  N contiguous groups of rows, those of `torch.tensor_split`
        dealt    row b meets mask b mod N
        drawn    a random card: a pure function of (seed, batch_size, b); int64 seed, 0-dim
    """
    rows = torch.arange(batch_size, device=seed.device)
    if mode == "dealt":
        return rows
    size, longer = batch_size // n, batch_size % n  # the first `longer` groups have one row more
    if mode == "grouped":
        group = torch.maximum(rows // (size + 1), (rows - longer) // max(size, 1))
        return (rows - group * size - group.clamp(max=longer)) * n + group
    decks = torch.arange((size + (longer > 0)) * n, device=seed.device)
    # Splitmix is a bijection, so there are no ties: the same order on every device.
    return _splitmix(_splitmix(seed) + decks).argsort()[:batch_size]
