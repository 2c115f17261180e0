"""Criteo's display advertising data, from the user's own file: which advertisement was clicked."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyens.data._text import Fields, read_fields
from pyens.data.table import Table, split

INTEGERS = 13
CATEGORIES = 26
FIELDS = 1 + INTEGERS + CATEGORIES
LAYOUT = f"label, {INTEGERS} integers, {CATEGORIES} hex categories"
TRAIN_SHARE = 0.9
NAMES = ("train.txt", "train.txt.gz")


@dataclass(frozen=True, eq=False)
class Criteo(Table):
    """Advertisements shown, one row each, in the order of the file.

    The categorical columns are the 26 of the file, hashed; the first 13 numeric ones are log(1 + max(x, 0))
    of its integers and 0 for a missing one, the last 13 are 1 where that integer is missing and 0 elsewhere.
    The target is 1 for a click and 0 otherwise.
    """

    @property
    def label(self) -> Tensor:
        """The target: 0 or 1, float32 `[N]`."""
        return self.target


def load_criteo(
    path: str | os.PathLike[str], *, buckets: int | Sequence[int] = 1000, seed: int = 0
) -> Criteo:
    """The Criteo Display Advertising data, or a part of it, with a random split into 90 % and 10 %.

    Reads lines of 40 fields between tabs, without a header: label, 13 integers, 26 categories of 8 hex
    digits; an empty field is a missing value. Lines may end as on Windows. (`test.txt`, which has no labels,
    is of no use here.)

    Args:
        path: the file, plain or gzip by its content, or the folder where `train.txt` or `train.txt.gz` lies.
        buckets: how many categories a column has after hashing, for all columns or for each of the 26: at
            least 2. Bucket 0 holds what is missing; the category h, which is a hash already, goes into bucket
            1 + h mod (buckets - 1), with others that happen to fall there.
        seed: of the permutation of all rows whose first round(0.9 N) are `train`.

    Returns:
        Criteo, the same for the same file and arguments, in every process. It takes 324 bytes a row, and
        twice that while it is read.

    Raises:
        FileNotFoundError: without the file.
        TypeError, ValueError: for `buckets` that are not as above.
        ValueError: for a line of another form, naming file and line: another number of fields, a label that
            is not 0 or 1, what is not an integer or not 8 hex digits; for a damaged gzip file, naming it.

    Source: data set of "Beyond Point Estimate", sections 3 and 4, with 37 million rows for training and 4.4
    million for testing; 90 % and 10 % is that ratio. How numbers are transformed and categories hashed is not
    said there: the logarithm is customary for this data, the rest is ours.
    """
    sizes = _sizes(buckets)
    columns = [
        _columns(fields, sizes) for fields in read_fields("load_criteo", _file(path), "\t", FIELDS, LAYOUT)
    ]
    categorical, numeric, label = (torch.cat(parts) for parts in zip(*columns, strict=True))
    train, test = split(len(label), TRAIN_SHARE, seed)
    return Criteo(categorical, numeric, label, tuple(sizes.tolist()), train, test)


def _columns(fields: Fields, sizes: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """What a block of lines says: categorical, numeric, target."""
    label, _ = fields.integers(0)
    fields.require((label == 0) | (label == 1), 0, "a label 0 or 1")
    count, given = fields.integers(slice(1, 1 + INTEGERS), optional=True)
    numeric = np.concatenate([np.log1p(count.clip(min=0)), ~given], 1, dtype=np.float32)
    category, given = fields.hexadecimal(slice(1 + INTEGERS, None), digits=8)
    bucket = np.where(given, 1 + category % (sizes - 1), 0)
    return torch.from_numpy(bucket), torch.from_numpy(numeric), torch.from_numpy(label.astype(np.float32))


def _sizes(buckets: int | Sequence[int]) -> np.ndarray:
    """int64 [26]."""
    if not isinstance(buckets, (Integral, Sequence)):
        raise TypeError(
            f"load_criteo: buckets: expected an int or a list of them, got {type(buckets).__name__}"
        )
    sizes: list[Any] = [buckets] * CATEGORIES if isinstance(buckets, Integral) else list(buckets)
    if len(sizes) != CATEGORIES:
        raise ValueError(f"load_criteo: buckets: expected 1 or {CATEGORIES} numbers, got {len(sizes)}")
    for size in sizes:
        if not hasattr(size, "__index__"):
            raise TypeError(f"load_criteo: buckets: expected ints, got {type(size).__name__}")
        if size < 2:
            raise ValueError(f"load_criteo: buckets: expected at least 2, got {size}")
        if size >= 1 << 63:
            raise ValueError(f"load_criteo: buckets: expected below 2^63, got {size}")
    return np.array(sizes, np.int64)


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    for candidate in (path, *(path / name for name in NAMES)):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"load_criteo: {path}: expected a file, or {' or '.join(NAMES)} in this folder, found neither; it is "
        "part of https://www.kaggle.com/c/criteo-display-ad-challenge"
    )
