"""Criteo's display advertising data as files of columns, for more rows than fit into memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyens._files import only_writer, replacing, write_atomically
from pyens.data._criteo_lines import CATEGORIES, FIELDS, INTEGERS, LAYOUT, Lines, parsed
from pyens.data._text import Block, read_blocks
from pyens.data.arrow import ArrowRows, pyarrow_of
from pyens.data.criteo import _file, _sizes, features
from pyens.data.rows import Columns, file_fingerprint

FORMAT = "pyens.criteo 1"
DONE = "criteo.json"
COUNTS = [f"I{i + 1}" for i in range(INTEGERS)]
HASHES = [f"C{i + 1}" for i in range(CATEGORIES)]
GROUP = 1 << 16  # rows of a row group, which is read at once
ROWS = 1 << 20  # of a file; both, and what their last block of lines has beyond them


def convert_criteo(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> CriteoRows:
    """Criteo's text as Parquet files, in constant memory; once, for all runs that follow.

    Files of a million rows each, `part-00000.parquet` and so on: label, the 13 integers and the 26
    categories as they are, missing ones as missing. Each is there whole or not at all, so after a kill the
    same call goes on behind the last one.

    Args:
        path: as `load_criteo` takes it.
        folder: is made if it is not there. What it holds already must be of this file, by name, size and
            bytes (a sample of these where they are more than 64 MB).
        progress: a bar of the rows written, where tqdm is installed.

    Returns:
        The rows, as `CriteoRows(folder)` gives them.

    Raises:
        ImportError: without pyarrow (`pip install "pyens[arrow]"`).
        FileNotFoundError, ValueError: as `load_criteo`, naming file and line; a folder with the rows of
            another file.
        RuntimeError: another conversion is writing to this folder.
    """
    pyarrow_of("convert_criteo")
    file, folder = _file("convert_criteo", path), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder / DONE, "convert_criteo: folder"):
        for left in folder.glob(".*.partial.*"):  # of a conversion that was killed
            left.unlink()
        said = f"{FORMAT}, {file.name}, {file_fingerprint(file)}"
        if not _is_done(folder, said):
            _Conversion(file, folder, said).run(progress)
    return CriteoRows(folder)


class CriteoRows(ArrowRows):
    """The rows that `convert_criteo` has written, as `Criteo` has them: buckets, numbers, label.

    Args:
        folder: that it has written to.
        buckets: as `load_criteo` takes them; hashed when rows are read, so other numbers need no conversion.

    Attributes:
        categories: how many each of the 26 categorical columns has.
    """

    def __init__(self, folder: str | os.PathLike[str], buckets: int | Sequence[int] = 1000) -> None:
        self._sizes = _sizes("CriteoRows", buckets)
        self.categories: tuple[int, ...] = tuple(self._sizes.tolist())
        about = _about(Path(folder))
        if about is None:
            raise FileNotFoundError(
                f"CriteoRows: {folder}: expected {DONE}, which convert_criteo writes when it is through, "
                "found none"
            )
        super().__init__(_parts(Path(folder), about["files"]), HASHES, COUNTS, "label")
        if len(self) != about["rows"]:
            raise ValueError(f"CriteoRows: {folder}: expected {about['rows']} rows, got {len(self)}")

    def tensors(self, batch: Any, first: int) -> Columns:
        n = batch.num_rows
        count, counted = np.zeros((n, INTEGERS), np.int64), np.zeros((n, INTEGERS), bool)
        category, categorized = np.zeros((n, CATEGORIES), np.uint32), np.zeros((n, CATEGORIES), bool)
        for names, values, given in ((COUNTS, count, counted), (HASHES, category, categorized)):
            for i, name in enumerate(names):
                column = batch.column(name)
                given[:, i] = True if column.null_count == 0 else np.asarray(column.is_valid())
                values[:, i] = column.fill_null(0).to_numpy(zero_copy_only=False)
        label = self._numbers(batch, "label", first)
        lines = Lines(label, count, counted, category, categorized)
        return (*features(lines, self._sizes), torch.from_numpy(label.copy()))

    def fingerprint(self) -> str:
        return f"buckets {self.categories}; {super().fingerprint()}"


class _Conversion:
    """From where the last whole file ends."""

    def __init__(self, file: Path, folder: Path, said: str) -> None:
        self.arrow = pyarrow_of("convert_criteo")
        self.file, self.folder, self.said = file, folder, said
        self.parts, self.rows, self.start = 0, 0, 0
        while (part := self._part()).is_file():
            try:
                found = self.arrow.parquet.read_metadata(part).metadata or {}
            except (self.arrow.ArrowException, OSError) as error:
                raise ValueError(
                    f"convert_criteo: {part}: expected a whole Parquet file, got {error}; remove it"
                ) from error
            if found.get(b"pyens.of", b"").decode() != said:
                raise ValueError(
                    f"convert_criteo: {part}: expected a part of {file} ({said}), got one of "
                    f"{found.get(b'pyens.of', b'another file').decode()}; name another folder"
                )
            self.parts += 1
            self.rows, self.start = int(found[b"pyens.rows"]), int(found[b"pyens.end"])

    def _part(self) -> Path:
        return self.folder / f"part-{self.parts:05d}.parquet"

    def run(self, progress: bool) -> None:
        blocks = read_blocks(
            "convert_criteo", self.file, FIELDS, LAYOUT, first=self.rows + 1, start=self.start
        )
        with _bar(self.rows, progress) as shown:
            for block in blocks:
                self._write_part(block, blocks, shown)
        about = {"format": FORMAT, "of": self.said, "rows": self.rows, "files": self.parts}
        write_atomically(self.folder / DONE, json.dumps(about, indent=1).encode() + b"\n")

    def _write_part(self, block: Block, rest: Iterator[Block], shown: Callable[[int], Any]) -> None:
        """A file of the lines from this block on."""
        rows, held, end = 0, [], block.end
        with (
            replacing(self._part()) as partial,
            self.arrow.parquet.ParquetWriter(partial, self._schema()) as writer,
        ):
            last = False
            while not last:
                held.append(parsed("convert_criteo", self.file, block))
                rows, end = rows + len(held[-1].label), block.end
                shown(len(held[-1].label))
                following = next(rest, None) if rows < ROWS else None
                last, block = following is None, following or block
                if last or sum(len(lines.label) for lines in held) >= GROUP:
                    table = self._table(held)
                    writer.write_table(table, row_group_size=table.num_rows)
                    held = []
            said = {"pyens.of": self.said, "pyens.rows": str(self.rows + rows), "pyens.end": str(end)}
            writer.add_key_value_metadata(said)
        self.parts, self.rows = self.parts + 1, self.rows + rows

    def _schema(self) -> Any:
        arrow = self.arrow
        fields = [arrow.field("label", arrow.uint8())]
        fields += [arrow.field(name, arrow.int64()) for name in COUNTS]
        fields += [arrow.field(name, arrow.uint32()) for name in HASHES]
        return arrow.schema(fields)

    def _table(self, parts: Sequence[Lines]) -> Any:
        lines = Lines(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        columns = [self.arrow.array(lines.label.astype(np.uint8))]
        for values, given, kind in (
            (lines.counts, lines.counted, np.int64),
            (lines.category, lines.categorized, np.uint32),
        ):
            for i in range(values.shape[1]):
                columns.append(self.arrow.array(values[:, i].astype(kind), mask=~given[:, i]))
        return self.arrow.table(columns, schema=self._schema())


@contextmanager
def _bar(rows: int, progress: bool) -> Iterator[Callable[[int], Any]]:
    """Something to tell how many rows more there are."""
    try:
        if not progress:
            raise ImportError
        from tqdm import tqdm
    except ImportError:
        yield lambda more: None
        return
    with tqdm(initial=rows, unit="row", unit_scale=True) as shown:
        yield shown.update


def _parts(folder: Path, count: int) -> list[Path]:
    return [folder / f"part-{i:05d}.parquet" for i in range(count)]


def _about(folder: Path) -> dict[str, Any] | None:
    """What the last file that is written says of all; None if it is not there."""
    done = folder / DONE
    if not done.is_file():
        return None
    try:
        about = json.loads(done.read_text(encoding="utf-8"))
        if about["format"] != FORMAT or not isinstance(about["of"], str):
            raise ValueError(f"format {about['format']!r}")
        return {"of": about["of"], "rows": int(about["rows"]), "files": int(about["files"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"CriteoRows: {done}: expected what convert_criteo writes, got {error!r}") from error


def _is_done(folder: Path, said: str) -> bool:
    about = _about(folder)
    if about is None:
        return False
    if about["of"] != said:
        raise ValueError(
            f"convert_criteo: {folder}: expected an empty folder or one with rows of {said}, "
            f"got {about['of']}"
        )
    return all(part.is_file() for part in _parts(folder, about["files"]))
