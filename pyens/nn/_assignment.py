"""Which row of a batch meets which of N masks."""

from typing import get_args

import torch
from torch import Tensor

from pyens._types import AssignmentMode, MaskMode
from pyens.reference.ensemble_mlp import splitmix

MODES: tuple[AssignmentMode, ...] = get_args(AssignmentMode)


def check_mode(function: str, mode: str, modes: tuple[str, ...]) -> None:
    if mode not in modes:
        raise ValueError(f"{function}: mode: expected one of {', '.join(modes)}, got {mode!r}")


def assign_masks(mode: MaskMode, batch_size: int, num_masks: int, seed: Tensor) -> tuple[Tensor, Tensor]:
    """The mask of every row, and the row's number among those of this mask; int64 `[batch_size]` each.

    No mask gets more than ceil(batch_size / num_masks) rows, and no two rows have both in common.

        grouped      contiguous groups of rows, those of `torch.tensor_split`
        round_robin  row b meets mask b mod N
        random       without replacement from ceil(batch_size / N) times all N: a pure function of
                     (seed, batch_size, b); int64 seed, 0-dim
    """
    rows = torch.arange(batch_size, device=seed.device)
    size, longer = batch_size // num_masks, batch_size % num_masks
    if mode == "grouped":  # the first `longer` groups have one row more
        mask = torch.maximum(rows // (size + 1), (rows - longer) // max(size, 1))
        return mask, rows - mask * size - mask.clamp(max=longer)
    if mode == "random":
        places = torch.arange((size + (longer > 0)) * num_masks, device=seed.device)
        # Splitmix is a bijection, so there are no ties: the same order on every device.
        rows = splitmix(splitmix(seed) + places).argsort()[:batch_size]
    return rows % num_masks, rows // num_masks
