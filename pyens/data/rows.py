"""Rows to learn from that need not be in memory: what `pyens.training.fit` takes in the place of tensors."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyens._kinds import REAL, check_tensor

CHUNK = 1 << 16  # rows that are read at once where a source has no parts of its own
WHOLE = 1 << 26  # bytes of a column up to which its fingerprint is of all of them
SAMPLES, SAMPLE = 1 << 10, 1 << 12  # blocks of bytes, evenly spread, that stand for a larger one

Columns = tuple[Tensor | None, ...]


class Piece(NamedTuple):
    """Rows of a source that lie together."""

    first: int  # number of the first of them in the source
    columns: Columns  # [n, ...] each


class RowSource:
    """N rows, each of several columns, in the order in which a model's `loss` takes them, the target last.

    A class of one's own says how many rows there are, gives those of an index, and says what they are:

        class Simulated(pyens.data.RowSource):
            def __len__(self):
                return 10_000_000

            def rows(self, index):
                x = features_of(index)            # [B, F]
                return x, target_of(x)

            def fingerprint(self):
                return "simulated 1"

    Columns are CPU tensors `[B, ...]`, or None for an input that the model does without. Each batch becomes
    what `fit` makes of tensors: floating point numbers the parameters' dtype, all others int64.

    Attributes:
        in_order: whether only rows that lie together are read fast. `fit` then goes through such a source
            part by part, and shuffles within a window.
    """

    in_order: bool = False

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__}: expected __len__ to be defined")

    def rows(self, index: Tensor) -> Columns:
        """The columns of some rows, int64 `[B]`, in any order and any of them more than once."""
        raise NotImplementedError(f"{type(self).__name__}: expected rows to be defined")

    def fingerprint(self) -> str:
        """What a run that goes on from a checkpoint compares: other rows say something else."""
        raise NotImplementedError(f"{type(self).__name__}: expected fingerprint to be defined")

    @property
    def parts(self) -> Sequence[int]:
        """The numbers of rows of the parts that are read one after the other, together all rows."""
        count = len(self)
        return [min(CHUNK, count - first) for first in range(0, count, CHUNK)]

    def read(self, part: int) -> Iterator[Piece]:
        """The rows of a part in their order, a piece at a time."""
        first = sum(self.parts[:part])
        yield Piece(first, self.rows(torch.arange(first, first + self.parts[part])))

    def where(self, row: int) -> str:
        """How an error names a row."""
        return f"row {row}"


class ArrayRows(RowSource):
    r"""Tensors, arrays of numpy, or memory maps, as they are: not copied, if torch knows such memory.

        categories = np.memmap("categories.int32", np.int32, "r", shape=(n, 26))
        source = pyens.data.ArrayRows(categories, numbers, clicks)
        pyens.training.fit(model, source, ...)

    A tuple of tensors that `fit` is given is brought to the model's dtypes once and as a whole; these are
    brought there batch by batch, so int32 categories, uint8 pixels and float16 numbers stay as small as they
    are. Rows that a memory map reads stay in the system's cache, which is not the process's own memory.

    Args:
        columns: `[N, ...]` each, on the CPU, the target last; None for an input that the model does without.

    Raises:
        TypeError, ValueError: columns of no number, or not all with the same number of rows.
    """

    def __init__(self, *columns: Any) -> None:
        if len(columns) < 2 or columns[-1] is None or all(column is None for column in columns[:-1]):
            raise TypeError(
                f"ArrayRows: columns: expected arrays [N, ...], inputs and target, got {len(columns)} of them"
            )
        self.columns = tuple(
            None if column is None else _column(i, as_tensor(column)) for i, column in enumerate(columns)
        )
        counts = [len(column) for column in self.columns if column is not None]
        if len(set(counts)) > 1:
            raise ValueError(f"ArrayRows: columns: expected as many rows in all of them, got {counts}")
        self.count = counts[0]

    def __len__(self) -> int:
        return self.count

    def rows(self, index: Tensor) -> Columns:
        # Ten times as fast as column[index].
        return tuple(None if column is None else column.index_select(0, index) for column in self.columns)

    def read(self, part: int) -> Iterator[Piece]:
        first = sum(self.parts[:part])
        last = first + self.parts[part]
        columns = tuple(None if c is None else c[first:last] for c in self.columns)
        yield Piece(first, columns)

    def fingerprint(self) -> str:
        """Of columns above 64 MB a sample, 4 MB of them spread evenly: a pass over all would take minutes."""
        return "; ".join("none" if column is None else _fingerprint(column) for column in self.columns)


def as_tensor(given: Any) -> Any:
    """A tensor on the memory of an array, be it read-only; what is no array of numbers as it is.

    A copy where torch knows no such memory: other byte orders, negative strides, fields of records.
    """
    if hasattr(given, "to_numpy"):
        given = given.to_numpy()
    if not isinstance(given, np.ndarray) or isinstance(given, np.ma.MaskedArray):
        return given
    if given.dtype.kind not in "bifu" or given.dtype.itemsize > 8:
        return given
    given = given.astype(given.dtype.newbyteorder("="), copy=False)
    if any(stride < 0 or stride % given.itemsize for stride in given.strides):
        given = given.copy()
    with warnings.catch_warnings():  # torch warns that it could be written to
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(given)


def _column(place: int, column: Any) -> Tensor:
    name = f"columns[{place}]"
    if not isinstance(column, Tensor):
        kind = type(column).__name__ + (f" of {column.dtype}" if isinstance(column, np.ndarray) else "")
        raise TypeError(f"ArrayRows: {name}: expected an array or tensor of numbers [N, ...], got a {kind}")
    check_tensor("ArrayRows", name, column)
    if column.dim() == 0:
        raise TypeError(f"ArrayRows: {name}: expected [N, ...], got shape []")
    if column.device.type != "cpu":
        raise TypeError(f"ArrayRows: {name}: expected a tensor on the CPU, got one on {column.device}")
    if column.is_complex() or (column.is_floating_point() and column.dtype not in REAL):
        raise TypeError(
            f"ArrayRows: {name}: expected whole numbers, float32, float64, bfloat16 or float16, "
            f"got {column.dtype}"
        )
    return column


def _fingerprint(column: Tensor) -> str:
    form = f"{column.dtype} {list(column.shape)}"
    size = column.element_size() * column.numel()
    if not column.is_contiguous():
        if size > WHOLE:
            column = column[:: math.ceil(len(column) / SAMPLES)]
        column = column.contiguous()
    return f"{form} {sampled(column.reshape(-1).view(torch.uint8).numpy())}"


def sampled(content: np.ndarray, samples: int = 0, whole: int = -1) -> str:
    """The CRC-32 of bytes, uint8 `[n]`, or of so many blocks of them (0: `SAMPLES`) where there are more than
    `whole` (-1: `WHOLE`)."""
    samples, whole = samples or SAMPLES, WHOLE if whole < 0 else whole
    size = len(content)
    if size <= max(whole, SAMPLE):
        return f"crc32 {zlib.crc32(content.data):08x}"
    crc = 0
    for i in range(samples):
        start = (size - SAMPLE) * i // max(1, samples - 1)
        crc = zlib.crc32(content[start : start + SAMPLE].data, crc)
    return f"sampled crc32 {crc:08x}"


def file_fingerprint(path: Path, samples: int = 0, whole: int = -1) -> str:
    """Its size, and `sampled` of its bytes."""
    size = path.stat().st_size
    content = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    return f"{size} bytes {sampled(content, samples, whole)}"
