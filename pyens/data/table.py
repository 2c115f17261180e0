"""Data sets of users, items and clicks: columns of categories, columns of numbers, and a target."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Some rows of a `Table`."""

    categorical: Tensor  # [B, C] int64
    numeric: Tensor  # [B, F] float32
    target: Tensor  # [B] float32


@dataclass(frozen=True, eq=False)
class Table:
    """N examples as CPU tensors, and which of them to learn from.

    `TabularEnsemble(E, list(zip(table.categories, dims)), table.numeric.shape[1], ...)` is a model of it.
    """

    categorical: Tensor  # [N, C] int64, column c in 0..categories[c]-1
    numeric: Tensor  # [N, F] float32
    target: Tensor  # [N] float32
    categories: tuple[int, ...]  # of each categorical column
    train: Tensor  # [R] int64, rows in random order
    test: Tensor  # [N - R] int64, the others, in random order

    def __len__(self) -> int:
        return len(self.target)

    def rows(self, index: Tensor | slice) -> Rows:
        """The features and targets of some examples, such as `table.rows(table.test)`."""
        return Rows(self.categorical[index], self.numeric[index], self.target[index])


def split(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The first `round(share * count)` of a seeded permutation of the rows, and the others."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator, device="cpu")
    train, test = order.tensor_split((round(share * count),))
    return train, test
