"""Rows of Parquet, Arrow and CSV files, read part by part."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyens.data.rows import (
    CHUNK,
    SAMPLES,
    WHOLE,
    Columns,
    Piece,
    RowSource,
    as_tensor,
    file_fingerprint,
)

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = {".parquet": "parquet", ".arrow": "ipc", ".feather": "ipc", ".csv": "csv"}
Column = str | Sequence[str] | None


class ArrowRows(RowSource):
    r"""Rows of one or several files, of which some parts are in memory at a time.

        source = pyens.data.ArrowRows("clicks/*.parquet", ["site", "device"], ["price", "age"], "click")
        pyens.training.fit(model, source, window=200_000, validation=held_out, ...)

    The parts are the row groups of Parquet files; a CSV or Arrow file is one part. `fit` goes through the
    parts in an order that is drawn anew for each epoch, and every member meets the rows that lie within a
    window of these in an order of its own. So write row groups, or files, of some 10,000 to 100,000 rows: of
    one large CSV file the rows outside of a window stay in their order.

    Args:
        files: one, several, a folder of them, or a pattern with `*` in its last part. All are of one kind, by
            their names: .parquet, .arrow or .feather (the file format of Arrow's IPC), .csv with a header. In
            the order of their names; several that are listed in the order given.
        columns: what a model's `loss` takes, the target last. The name of a column is `[N]`, a list of names
            `[N, k]`, of the number type that holds them all; None is an input that the model does without.
            Other columns are not read.
        dtypes: for each of `columns` the type of its numbers, such as `(None, numpy.float32, None)`: whole
            numbers that the model takes as floating point ones, or a CSV file whose first lines look like
            whole numbers. None: that of the files, which have to agree then.

    Raises:
        ImportError: without pyarrow (`pip install "pyens[arrow]"`).
        FileNotFoundError: without a file.
        ValueError, TypeError: a file that is cut short or damaged, columns that are missing, of no number, or
            of another type than in the first file: all when this is made. Missing values, and files that have
            changed since, when they are read, naming file, row group, row and column.

    A CSV file is read once to know how many rows it has, and again in every epoch; Parquet is made for this.
    """

    in_order = True

    def __init__(
        self,
        files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *columns: Column,
        dtypes: Sequence[Any] | None = None,
    ) -> None:
        self._arrow = pyarrow_of("ArrowRows")
        self.files = _files(files)
        self.columns = tuple(_names(i, column) for i, column in enumerate(columns))
        if len(self.columns) < 2 or self.columns[-1] is None or not any(self.columns[:-1]):
            raise TypeError(
                f"ArrowRows: columns: expected names of columns, inputs and target, got {list(columns)}"
            )
        self._dtypes = _dtypes(dtypes, len(columns))
        self._names = list(dict.fromkeys(name for group in self.columns if group for name in group[0]))
        self._cast: dict[
            str, Any
        ] = {}  # of the columns that are brought to a type, one that holds all of these
        for group, dtype in zip(self.columns, self._dtypes, strict=True):
            if group is None or dtype is None:
                continue
            for name in group[0]:
                wide = np.dtype(np.float64 if dtype.kind == "f" else np.int64)
                self._cast[name] = np.result_type(wide, self._cast.get(name, wide))
        kinds = sorted({SUFFIXES[file.suffix] for file in self.files})
        if len(kinds) > 1:
            raise ValueError(f"ArrowRows: files: expected files of one kind, got {' and '.join(kinds)}")
        self.kind = kinds[0]
        self._parts: list[tuple[int, Any, int, int]] = []  # file, fragment, its row group, rows
        self._seen = [(file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        types: dict[str, Any] = {}
        for number, file in enumerate(self.files):
            self._open(number, file, types)
        self._firsts = [0, *accumulate(rows for *_, rows in self._parts)]
        if self._firsts[-1] == 0:
            raise ValueError(f"ArrowRows: files: expected rows, got none in {len(self.files)} files")

    def __len__(self) -> int:
        return self._firsts[-1]

    @property
    def parts(self) -> Sequence[int]:
        return [rows for *_, rows in self._parts]

    def read(self, part: int) -> Iterator[Piece]:
        number, fragment, group, rows = self._parts[part]
        first, met = self._firsts[part], 0
        for batch in self._batches(number, fragment):
            if batch.num_rows == 0:
                continue
            yield Piece(first + met, self.tensors(batch, first + met))
            met += batch.num_rows
        if met != rows:
            raise ValueError(
                f"ArrowRows: {self._place(number, group)}: expected {rows} rows, got {met}: has it changed?"
            )

    def rows(self, index: Tensor) -> Columns:
        """Reads every part that one of them is in: for a few rows, or for rows that lie together."""
        wanted = index.reshape(-1).long()
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"ArrowRows: rows: expected numbers from 0 to {len(self) - 1}, got others")
        part_of = torch.bucketize(wanted, torch.tensor(self._firsts[1:]), right=True)
        found: list[Tensor | None] = [None] * len(self.columns)
        for part in part_of.unique().tolist() or [0]:  # of no rows the columns' forms
            here = (part_of == part).nonzero().flatten()
            for piece in self.read(part):
                count = len(next(c for c in piece.columns if c is not None))
                inside = here[(wanted[here] >= piece.first) & (wanted[here] < piece.first + count)]
                for i, column in enumerate(piece.columns):
                    if column is None:
                        continue
                    own = found[i]
                    if own is None:
                        own = found[i] = column.new_empty(len(wanted), *column.shape[1:])
                    own[inside] = column[wanted[inside] - piece.first]
        return tuple(found)

    def tensors(self, batch: pyarrow.RecordBatch, first: int) -> Columns:
        """The columns of a record batch, whose first row has this number."""
        found: list[Tensor | None] = []
        for group, dtype in zip(self.columns, self._dtypes, strict=True):
            if group is None:
                found.append(None)
                continue
            names, alone = group
            arrays = [self._numbers(batch, name, first) for name in names]
            if dtype is not None:
                arrays = [self._brought(a, dtype, name, first) for a, name in zip(arrays, names, strict=True)]
            column = arrays[0] if alone else np.stack(arrays, 1, dtype=np.result_type(*arrays))
            found.append(as_tensor(np.ascontiguousarray(column)))
        return tuple(found)

    def fingerprint(self) -> str:
        """Of the columns, and of the files' names, sizes and bytes: of a sample of these, spread evenly,
        where they are more than 64 MB."""
        total = sum(size for size, _ in self._seen)
        samples = max(16, SAMPLES // len(self.files))
        said = [
            f"{file.name}, {file_fingerprint(file, samples, -1 if total <= WHOLE else 0)}"
            for file in self.files
        ]
        return f"{self.columns} as {[str(dtype) for dtype in self._dtypes]} of " + "; ".join(said)

    def where(self, row: int) -> str:
        part = bisect.bisect_right(self._firsts, row) - 1
        number, _, group, _ = self._parts[part]
        return f"row {row - self._firsts[part]} of {self._place(number, group)}"

    # --------------------------------------------------------------------------------------------------------
    # Files

    def _open(self, number: int, file: Path, types: dict[str, Any]) -> None:
        """Its parts; columns of other types than before are refused."""
        arrow = self._arrow
        try:
            whole = arrow.dataset.dataset(
                str(file.resolve()), format=self._format(), filesystem=arrow.fs.LocalFileSystem()
            )
            (fragment,) = whole.get_fragments()
            schema, there = fragment.physical_schema, fragment.physical_schema.names
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"ArrowRows: {file}: expected a whole {self.kind} file, got {error}") from error
        for name in self._names:
            if (count := there.count(name)) != 1:
                some = ", ".join(there[:8]) + " and others" * (len(there) > 8)
                raise ValueError(
                    f"ArrowRows: {file}: expected a column {name!r}, got {some}"
                    if count == 0
                    else f"ArrowRows: {file}: expected one column {name!r}, got {count}"
                )
            found = schema.field(name).type
            kinds = arrow.types.is_integer, arrow.types.is_floating, arrow.types.is_boolean
            if not any(is_kind(found) for is_kind in kinds):
                raise TypeError(f"ArrowRows: {file}: expected numbers in column {name!r}, got {found}")
            if types.setdefault(name, found) != found and name not in self._cast:
                raise ValueError(
                    f"ArrowRows: {file}: expected {types[name]} in column {name!r} as in {self.files[0]}, "
                    f"got {found}"
                )
        if self.kind == "parquet":
            groups = list(enumerate(fragment.split_by_row_group()))
            found_parts = [(number, part, group, part.row_groups[0].num_rows) for group, part in groups]
        else:
            count = sum(batch.num_rows for batch in self._batches(number, fragment))
            found_parts = [(number, fragment, -1, count)]
        self._parts += [part for part in found_parts if part[-1] > 0]

    def _format(self) -> Any:
        if self.kind != "csv" or not self._cast:
            return self.kind
        arrow = self._arrow
        types = {name: arrow.from_numpy_dtype(dtype) for name, dtype in self._cast.items()}
        return arrow.dataset.CsvFileFormat(convert_options=arrow.csv.ConvertOptions(column_types=types))

    def _batches(self, number: int, fragment: Any) -> Iterator[Any]:
        """The record batches of a part, read in this thread alone; their errors name the file."""
        file, arrow = self.files[number], self._arrow
        try:
            now = file.stat()
            if (now.st_size, now.st_mtime_ns) != self._seen[number]:
                raise ValueError(
                    f"ArrowRows: {file}: expected the file as it was when it was opened, got another one"
                )
            yield from fragment.to_batches(columns=self._names, batch_size=CHUNK, use_threads=False)
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"ArrowRows: {file}: expected a whole {self.kind} file, got {error}") from error

    def _numbers(self, batch: Any, name: str, first: int) -> np.ndarray:
        column = batch.column(name)
        if column.null_count:
            row = int(np.flatnonzero(np.asarray(column.is_null()))[0])
            raise ValueError(
                f"ArrowRows: {self.where(first + row)}: expected a number in column {name!r}, got none "
                f"(and {column.null_count - 1} more in these {batch.num_rows} rows)"
            )
        numbers: np.ndarray = column.to_numpy(zero_copy_only=False)
        if numbers.dtype.kind == "u" and numbers.dtype.itemsize > 1:  # of which torch knows little
            if numbers.dtype.itemsize == 8 and len(numbers) and numbers.max() >= 1 << 63:
                row = first + int(np.flatnonzero(numbers >= 1 << 63)[0])
                raise ValueError(
                    f"ArrowRows: {self.where(row)}: expected numbers below 2^63 in column {name!r}, got "
                    f"{numbers[row - first]}"
                )
            numbers = numbers.astype(np.int32 if numbers.dtype.itemsize == 2 else np.int64)
        return numbers

    def _brought(self, numbers: np.ndarray, dtype: np.dtype[Any], name: str, first: int) -> np.ndarray:
        """As numbers of this type: whole ones exactly, others rounded."""
        with np.errstate(invalid="ignore", over="ignore"):
            found = numbers.astype(dtype, copy=False)
        if dtype.kind != "f":
            wrong = found.astype(numbers.dtype) != numbers
            if numbers.dtype.kind == "f" and dtype.itemsize == 8:
                wrong |= np.abs(numbers) >= 2.0**63
            if wrong.any():
                row = int(np.flatnonzero(wrong)[0])
                raise ValueError(
                    f"ArrowRows: {self.where(first + row)}: expected a number of {dtype} in column {name!r}, "
                    f"got {numbers[row]}"
                )
        return found

    def _place(self, number: int, group: int) -> str:
        return f"row group {group} of {self.files[number]}" if group >= 0 else str(self.files[number])


def pyarrow_of(function: str) -> Any:
    """The module, with the parts of it that are used here."""
    try:
        import pyarrow
        import pyarrow.csv
        import pyarrow.dataset
        import pyarrow.fs
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f'{function}: expected pyarrow, which reads Parquet and Arrow files: pip install "pyens[arrow]"'
        ) from error
    return pyarrow


def _files(given: Any) -> list[Path]:
    several = isinstance(given, (list, tuple))
    if not all(isinstance(one, (str, os.PathLike)) for one in (given if several else [given])):
        raise TypeError(f"ArrowRows: files: expected a path or a list of them, got a {type(given).__name__}")
    if several:
        found = [Path(file) for file in given]
    else:
        path = Path(given)
        if path.is_dir():
            # As others have it, names that begin so are of what is not yet whole, or says something else.
            listed = (file for file in path.iterdir() if not file.name.startswith((".", "_")))
            found = sorted(file for file in listed if file.suffix in SUFFIXES)
        elif "*" in path.name:
            found = sorted(path.parent.glob(path.name))
        else:
            found = [path]
    if not found:
        raise FileNotFoundError(f"ArrowRows: {given}: expected files of {', '.join(SUFFIXES)}, found none")
    for file in found:
        if not file.is_file():
            raise FileNotFoundError(f"ArrowRows: {file}: expected a file, found none")
        if file.suffix not in SUFFIXES:
            raise ValueError(f"ArrowRows: {file}: expected a name that ends in {', '.join(SUFFIXES)}")
    return found


def _names(place: int, column: Any) -> tuple[tuple[str, ...], bool] | None:
    """The names of one argument, and whether it is one name alone."""
    if column is None:
        return None
    names = (
        (column,) if isinstance(column, str) else tuple(column) if isinstance(column, (list, tuple)) else ()
    )
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"ArrowRows: columns[{place}]: expected the name of a column, a list of them, or None, "
            f"got {column!r}"
        )
    return names, isinstance(column, str)


def _dtypes(given: Any, columns: int) -> tuple[np.dtype[Any] | None, ...]:
    if given is None:
        return (None,) * columns
    if not isinstance(given, (list, tuple)) or len(given) != columns:
        raise ValueError(
            f"ArrowRows: dtypes: expected one or None for each of {columns} columns, got {given!r}"
        )
    try:
        found = tuple(None if one is None else np.dtype(one) for one in given)
    except TypeError as error:
        raise TypeError(f"ArrowRows: dtypes: expected types of numpy, got {given!r}: {error}") from error
    for dtype in found:
        if dtype is not None and (dtype.kind not in "bif" or dtype.itemsize > 8):
            raise TypeError(f"ArrowRows: dtypes: expected types of numbers with a sign, got {dtype}")
    return found
