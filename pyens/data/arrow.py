"""Rows of Parquet, Arrow and CSV files, read part by part."""

from __future__ import annotations

import bisect
import os
import zlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyens.data.rows import CHUNK, Columns, Piece, RowSource, as_tensor

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = {".parquet": "parquet", ".arrow": "ipc", ".feather": "ipc", ".csv": "csv"}
Column = str | Sequence[str] | None


class ArrowRows(RowSource):
    r"""Rows of one or several files, of which one row group (Parquet) or record batch is in memory at a time.

        source = pyens.data.ArrowRows("clicks/*.parquet", ["site", "device"], ["price", "age"], "click")
        pyens.training.fit(model, source, window=200_000, validation=held_out, ...)

    `fit` goes through the row groups in an order drawn anew for each epoch, and every member meets the rows
    that lie within a window of these in an order of its own.

    Args:
        files: one, several, a folder of them, or a pattern with `*`. All are of one kind, by their names:
            .parquet, .arrow or .feather (the file format of Arrow's IPC), .csv with a header. In the order of
            their names; several that are listed in the order given.
        columns: what a model's `loss` takes, the target last. The name of a column is `[N]`, a list of names
            `[N, k]`, of the number type that holds them all; None is an input that the model does without.
            Other columns are not read.

    Raises:
        ImportError: without pyarrow (`pip install "pyens[arrow]"`).
        FileNotFoundError: without a file.
        ValueError, TypeError: a file that is cut short or damaged, columns that are missing, of no number, or
            of another type than in the first file: all when this is made. Missing values when they are
            read, naming file, row group, row and column.

    A CSV file is read once to know how many rows it has, and again in every epoch; Parquet is made for this.
    """

    in_order = True

    def __init__(
        self, files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *columns: Column
    ) -> None:
        self._arrow = pyarrow_of("ArrowRows")
        self.files = _files(files)
        self.columns = tuple(_names(i, column) for i, column in enumerate(columns))
        if len(self.columns) < 2 or self.columns[-1] is None or not any(self.columns[:-1]):
            raise TypeError(
                f"ArrowRows: columns: expected names of columns, inputs and target, got {list(columns)}"
            )
        self._names = list(dict.fromkeys(name for group in self.columns if group for name in group[0]))
        kinds = sorted({SUFFIXES[file.suffix] for file in self.files})
        if len(kinds) > 1:
            raise ValueError(f"ArrowRows: files: expected files of one kind, got {' and '.join(kinds)}")
        self.kind = kinds[0]
        self._parts: list[tuple[int, Any, int, int]] = []  # file, fragment, its row group, rows
        self._described: list[str] = []
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
        for group in self.columns:
            if group is None:
                found.append(None)
                continue
            names, alone = group
            arrays = [self._numbers(batch, name, first) for name in names]
            column = arrays[0] if alone else np.stack(arrays, 1, dtype=np.result_type(*arrays))
            found.append(as_tensor(np.ascontiguousarray(column)))
        return tuple(found)

    def fingerprint(self) -> str:
        """Of names, sizes and what the files say of themselves (Parquet: where each column lies, its least
        and largest value), not of all they hold."""
        return f"{self._names} of " + "; ".join(self._described)

    def where(self, row: int) -> str:
        part = bisect.bisect_right(self._firsts, row) - 1
        number, _, group, _ = self._parts[part]
        return f"row {row - self._firsts[part]} of {self._place(number, group)}"

    # --------------------------------------------------------------------------------------------------------
    # Files

    def _open(self, number: int, file: Path, types: dict[str, Any]) -> None:
        """Its parts, and what the fingerprint says of it; columns of other types than before are refused."""
        arrow = self._arrow
        try:
            whole = arrow.dataset.dataset(str(file), format=self.kind)
            (fragment,) = whole.get_fragments()
            schema = fragment.physical_schema
        except (arrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"ArrowRows: {file}: expected a whole {self.kind} file, got {error}") from error
        for name in self._names:
            if schema.get_field_index(name) < 0:
                some = ", ".join(schema.names[:8]) + " and others" * (len(schema.names) > 8)
                raise ValueError(f"ArrowRows: {file}: expected a column {name!r}, got {some}")
            found = schema.field(name).type
            if not (
                arrow.types.is_integer(found)
                or arrow.types.is_floating(found)
                or arrow.types.is_boolean(found)
            ):
                raise TypeError(f"ArrowRows: {file}: expected numbers in column {name!r}, got {found}")
            if types.setdefault(name, found) != found:
                raise ValueError(
                    f"ArrowRows: {file}: expected {types[name]} in column {name!r} as in {self.files[0]}, "
                    f"got {found}"
                )
        said = f"{file.name}, {file.stat().st_size} bytes"
        if self.kind == "parquet":
            for group, part in enumerate(fragment.split_by_row_group()):
                self._parts.append((number, part, group, part.row_groups[0].num_rows))
            said += f", footer crc32 {_footer(file):08x}"
        else:
            self._parts.append(
                (number, fragment, -1, sum(b.num_rows for b in self._batches(number, fragment)))
            )
        self._described.append(said)

    def _batches(self, number: int, fragment: Any) -> Iterator[Any]:
        """The record batches of a part, read in this thread alone; their errors name the file."""
        try:
            yield from fragment.to_batches(columns=self._names, batch_size=CHUNK, use_threads=False)
        except (self._arrow.ArrowInvalid, OSError) as error:
            raise ValueError(
                f"ArrowRows: {self.files[number]}: expected a whole {self.kind} file, got {error}"
            ) from error

    def _numbers(self, batch: Any, name: str, first: int) -> np.ndarray:
        column = batch.column(name)
        if column.null_count:
            row = int(np.flatnonzero(np.asarray(column.is_null()))[0])
            raise ValueError(
                f"ArrowRows: {self.where(first + row)}: expected a number in column {name!r}, got none "
                f"(and {column.null_count - 1} more in these {batch.num_rows} rows)"
            )
        numbers: np.ndarray = column.to_numpy(zero_copy_only=False)
        return numbers

    def _place(self, number: int, group: int) -> str:
        return f"row group {group} of {self.files[number]}" if group >= 0 else str(self.files[number])


def _footer(file: Path) -> int:
    """CRC-32 of what a Parquet file says of itself at its end: length, four bytes, and PAR1 are its last."""
    with file.open("rb") as opened:
        opened.seek(-8, os.SEEK_END)
        length = int.from_bytes(opened.read(4), "little")
        opened.seek(-8 - length, os.SEEK_END)
        return zlib.crc32(opened.read(length))


def pyarrow_of(function: str) -> Any:
    """The module, with the parts of it that are used here."""
    try:
        import pyarrow
        import pyarrow.dataset
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f'{function}: expected pyarrow, which reads Parquet and Arrow files: pip install "pyens[arrow]"'
        ) from error
    return pyarrow


def _files(given: Any) -> list[Path]:
    if isinstance(given, (list, tuple)):
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
