"""Text files of millions of lines, cut into fields by column and not by line; errors name file and line."""

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

BLOCK = 1 << 24  # bytes read at a time: the positions of fields take several times as much
MOST_IN_A_LINE = 1 << 24  # bytes: a small gzip file can hold a line longer than the memory
MOST_DIGITS = 18  # of an integer, so that it fits into int64
# Of each byte: its value as a hex digit, or -1.
HEX_DIGITS = np.array([int(chr(b), 16) if chr(b) in "0123456789abcdefABCDEF" else -1 for b in range(256)])


class Fields:
    """Some lines of a file and where their fields begin and end.

    Columns are an index or a slice of them; what is returned is `[N]` or `[N, columns]`.

    Args:
        function: whose errors these are.
        path: of the file.
        first: the number in the file of the first of these lines, from 1.
        content: whole lines, each with its newline, or carriage return and newline.
        separator: of the fields.
        count: of fields in a line.
        layout: what a line looks like, for errors.
    """

    def __init__(
        self,
        function: str,
        path: Path,
        first: int,
        content: bytes,
        separator: str,
        count: int,
        layout: str,
    ) -> None:
        self.function, self.path, self.first = function, path, first
        self._content = content
        self._bytes = np.frombuffer(content, np.uint8)
        ends = np.flatnonzero(self._bytes == ord("\n"))
        starts = np.append(0, ends[:-1] + 1)
        # A carriage return before the newline belongs to it.
        ends = ends - ((ends > starts) & (self._bytes[ends - 1] == ord("\r")))
        found = self._find(separator.encode())
        rows = found.reshape(-1, count - 1) if len(found) == (count - 1) * len(ends) else None
        if rows is None or (rows[:, 0] < starts).any() or (rows[:, -1] >= ends).any():
            # A line with too few of them, and another one with too many, may add up to the right number.
            counts = np.diff(np.searchsorted(found, np.append(starts, len(content)))) + 1
            row = int(np.flatnonzero(counts != count)[0])
            line = content[starts[row] : ends[row]]
            self.refuse(row, f"{count} fields ({layout})", f"{counts[row]} in {_quoted(line)}")
        self.starts = np.concatenate([starts[:, None], rows + len(separator)], 1)  # [N, columns]
        self.ends = np.concatenate([rows, ends[:, None]], 1)

    def __len__(self) -> int:
        return len(self.starts)

    def text(self, column: int) -> list[str]:
        """In latin-1, in which every byte is a character."""
        bounds = zip(self.starts[:, column].tolist(), self.ends[:, column].tolist(), strict=True)
        return [self._content[start:end].decode("latin-1") for start, end in bounds]

    def integers(self, columns: int | slice, *, optional: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """int64 values, 0 for an empty field, and which are given. `optional`: a field may be empty."""
        starts, ends = self.starts[:, columns], self.ends[:, columns]
        given = ends > starts
        negative = given & (self._bytes[starts] == ord("-"))
        starts = starts + negative
        length = ends - starts
        good = (length > 0) & (length <= MOST_DIGITS)
        if optional:
            good |= ~given
        value = np.zeros(starts.shape, np.int64)
        for place in range(min(int(length.max(initial=0)), MOST_DIGITS)):
            inside = place < length
            # A byte below "0" wraps around to a large one.
            digit = self._bytes.take(starts + place, mode="clip") - np.uint8(ord("0"))
            good &= ~inside | (digit < 10)
            value = np.where(inside, value * 10 + digit, value)
        self.require(good, columns, "an integer" + " or nothing" * optional)
        return np.where(negative, -value, value), given

    def hexadecimal(self, columns: int | slice, *, digits: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 values of that many digits, 0 for an empty field, and which are given."""
        starts, ends = self.starts[:, columns], self.ends[:, columns]
        given = ends > starts
        good = ~given | (ends - starts == digits)
        value = np.zeros(starts.shape, np.int64)
        for place in range(digits):
            digit = HEX_DIGITS[self._bytes.take(starts + place, mode="clip")]
            good &= ~given | (digit >= 0)
            value = value * 16 + digit
        self.require(good, columns, f"{digits} hex digits or nothing")
        return np.where(given, value, 0), given

    def require(self, good: np.ndarray, columns: int | slice, expected: str) -> None:
        """Refuses the first field of these columns, line by line, that is not `good`."""
        if good.all():
            return
        row, *rest = np.argwhere(~good)[0]
        column = np.arange(self.starts.shape[1])[columns]
        column = column[rest[0]] if rest else column
        self.refuse(row, expected, _quoted(self._content[self.starts[row, column] : self.ends[row, column]]))

    def refuse(self, row: int, expected: str, got: str) -> NoReturn:
        raise ValueError(
            f"{self.function}: {self.path}:{self.first + int(row)}: expected {expected}, got {got}"
        )

    def _find(self, separator: bytes) -> np.ndarray:
        """Where it stands, from the left and without overlaps, as `bytes.split` has it."""
        match = self._bytes == separator[0]
        for place, byte in enumerate(separator[1:], 1):
            match[:-place] &= self._bytes[place:] == byte
        found = np.flatnonzero(match)
        if (np.diff(found) < len(separator)).any():  # ":::"
            found = np.array([m.start() for m in re.finditer(re.escape(separator), self._content)])
        return found


def read_fields(function: str, path: Path, separator: str, count: int, layout: str) -> Iterator[Fields]:
    """The lines of a file, plain or gzip by its content, in blocks. The last one may lack its newline.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a line with another number of fields than `count`, a gzip file that is cut short or
            damaged, no line at all.
    """
    first, rest = 1, b""
    with path.open("rb") as plain:
        zipped = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        file = gzip.GzipFile(fileobj=plain) if zipped else plain
        while block := _read(function, path, file):
            cut = block.rfind(b"\n") + 1
            if cut:
                fields = Fields(function, path, first, rest + block[:cut], separator, count, layout)
                yield fields
                first, rest = first + len(fields), b""
            rest += block[cut:]
            if len(rest) > MOST_IN_A_LINE:
                raise ValueError(
                    f"{function}: {path}:{first}: expected {count} fields ({layout}), "
                    f"got a line of more than {MOST_IN_A_LINE} bytes"
                )
    if rest:
        yield Fields(function, path, first, rest + b"\n", separator, count, layout)
    elif first == 1:
        raise ValueError(f"{function}: {path}: expected lines of {layout}, got an empty file")


def _read(function: str, path: Path, file: BinaryIO | gzip.GzipFile) -> bytes:
    try:
        return file.read(BLOCK)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{function}: {path}: expected a whole gzip file, got {error}") from error


def _quoted(content: bytes) -> str:
    text = content.decode("latin-1")
    return repr(text if len(text) <= 60 else text[:60] + "...")
