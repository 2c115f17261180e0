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

from pyens.data._criteo_lines import CATEGORIES, FIELDS, LAYOUT, Lines, parsed
from pyens.data._text import read_blocks
from pyens.data.table import Table, split

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
        twice that while it is read: `convert_criteo` is for more rows than that allows.

    Raises:
        FileNotFoundError: without the file.
        TypeError, ValueError: for `buckets` that are not as above.
        ValueError: for a line of another form, naming file and line: another number of fields, a label that
            is not 0 or 1, what is not an integer or not 8 hex digits; for a damaged gzip file, naming it.

    Source: data set of "Beyond Point Estimate", sections 3 and 4, with 37 million rows for training and 4.4
    million for testing; 90 % and 10 % is that ratio. How numbers are transformed and categories hashed is not
    said there: the logarithm is customary for this data, the rest is ours.
    """
    sizes = _sizes("load_criteo", buckets)
    columns = []
    file = _file("load_criteo", path)
    for block in read_blocks("load_criteo", file, FIELDS, LAYOUT):
        lines = parsed("load_criteo", file, block)
        columns.append((*features(lines, sizes), torch.from_numpy(lines.label.astype(np.float32))))
    categorical, numeric, label = (torch.cat(parts) for parts in zip(*columns, strict=True))
    train, test = split(len(label), TRAIN_SHARE, seed)
    return Criteo(categorical.long(), numeric, label, tuple(sizes.tolist()), train, test)


def features(lines: Lines, sizes: np.ndarray) -> tuple[Tensor, Tensor]:
    """Buckets `[N, 26]`, int32 where they fit, and numbers float32 `[N, 26]`."""
    numeric = np.concatenate([np.log1p(lines.counts.clip(min=0)), ~lines.counted], 1, dtype=np.float32)
    bucket = np.where(lines.categorized, 1 + lines.category.astype(np.int64) % (sizes - 1), 0)
    if sizes.max() < 1 << 31:
        bucket = bucket.astype(np.int32)
    return torch.from_numpy(bucket), torch.from_numpy(numeric)


def _sizes(function: str, buckets: int | Sequence[int]) -> np.ndarray:
    """int64 [26]."""
    if not isinstance(buckets, (Integral, Sequence)):
        raise TypeError(
            f"{function}: buckets: expected an int or a list of them, got {type(buckets).__name__}"
        )
    sizes: list[Any] = [buckets] * CATEGORIES if isinstance(buckets, Integral) else list(buckets)
    if len(sizes) != CATEGORIES:
        raise ValueError(f"{function}: buckets: expected 1 or {CATEGORIES} numbers, got {len(sizes)}")
    for size in sizes:
        if not hasattr(size, "__index__"):
            raise TypeError(f"{function}: buckets: expected ints, got {type(size).__name__}")
        if size < 2:
            raise ValueError(f"{function}: buckets: expected at least 2, got {size}")
        if size >= 1 << 63:
            raise ValueError(f"{function}: buckets: expected below 2^63, got {size}")
    return np.array(sizes, np.int64)


def _file(function: str, path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    for candidate in (path, *(path / name for name in NAMES)):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{function}: {path}: expected a file, or {' or '.join(NAMES)} in this folder, found neither; it is "
        "part of https://www.kaggle.com/c/criteo-display-ad-challenge"
    )
