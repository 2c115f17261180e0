"""Specification of `pyens.ops.ensemble_embedding` and of the features that tables are turned into."""

from collections.abc import Sequence

import torch
from torch import Tensor


def ensemble_embedding(index: Tensor, weight: Tensor, *, sparse: bool = False) -> Tensor:
    """See `pyens.ops.ensemble_embedding`. `sparse` is the layout of the gradient; here it is always dense."""
    members, _, dim = weight.shape
    rows = index.expand(members, -1)  # [E, B]
    return torch.gather(weight, 1, rows.unsqueeze(-1).expand(-1, -1, dim))


def ensemble_embedding_concat(
    categorical: Tensor, tables: Sequence[Tensor], numeric: Tensor | None = None
) -> Tensor:
    """See `pyens.ops.ensemble_embedding.ensemble_embedding_concat`."""
    blocks = [ensemble_embedding(categorical[..., t], table) for t, table in enumerate(tables)]
    if numeric is not None:
        blocks.append(numeric.expand(len(blocks[0]), -1, -1))
    return torch.cat(blocks, -1)  # [E, B, sum of D, then F]
