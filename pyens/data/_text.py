"""Text files of millions of lines, cut into fields by column and not by line; errors name file and line."""

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
from numpy.lib.stride_tricks import as_strided

BLOCK = 1 << 18  # bytes read at a time: positions and values of their fields stay in the cache
MOST_IN_A_LINE = 1 << 24  # bytes: a small gzip file can hold a line longer than the memory
MOST_DIGITS = 18  # of an integer, so that it fits into int64
WORD = 8  # digits that are read at once, in the bytes of a uint64
# Of a word whose last bytes, so many of them, are meant: the bytes before them.
BEFORE = np.array([(1 << 8 * (WORD - length)) - 1 for length in range(WORD + 1)], np.uint64)
ONES = np.uint64(0x0101010101010101)
LOW = np.uint64(0x0F0F0F0F0F0F0F0F)
FIGURES = np.uint64(0x3030303030303030)  # "00000000"


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
        whole = content if len(content) >= WORD else content + bytes(WORD)
        # Eight bytes from each byte on.
        self._words = as_strided(np.frombuffer(whole, np.uint64, 1), (len(whole) - WORD + 1,), (1,))
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
        length = ends - starts - negative
        good = (length > 0) & (length <= MOST_DIGITS)
        if optional:
            good |= ~given
        value, figures = _decimal(self._last(ends, np.minimum(length, WORD)))
        good &= figures
        if length.max(initial=0) > WORD:
            long = length > WORD
            rest, figures = _decimal(self._last(ends[long] - WORD, np.minimum(length[long] - WORD, WORD)))
            high, more = _decimal(self._last(ends[long] - 2 * WORD, (length[long] - 2 * WORD).clip(0, WORD)))
            value[long] += 10**WORD * rest + 10 ** (2 * WORD) * np.where(good[long], high, 0)
            good[long] &= figures & more
        self.require(good, columns, "an integer" + " or nothing" * optional)
        return np.where(negative, -value, value), given

    def hexadecimal(self, columns: int | slice) -> tuple[np.ndarray, np.ndarray]:
        """int64 values of 8 digits each, 0 for an empty field, and which are given."""
        starts, ends = self.starts[:, columns], self.ends[:, columns]
        length = ends - starts
        given = length > 0
        value, good = _hexadecimal(self._words[np.minimum(starts, len(self._words) - 1)])
        good &= length == WORD
        good |= ~given
        self.require(good, columns, f"{WORD} hex digits or nothing")
        return value * given, given

    def _last(self, ends: np.ndarray, length: np.ndarray) -> np.ndarray:
        """The last `length` bytes before `ends`, 8 at most, in the bytes of a uint64, the first one lowest.

        Before them stand figures 0."""
        words = self._words[np.maximum(ends - WORD, 0)]
        if (near := ends < WORD).any():
            words[near] <<= (8 * (WORD - ends[near])).astype(np.uint64)
        figures: np.ndarray = words ^ (words ^ FIGURES) & BEFORE[np.maximum(length, 0)]
        return figures

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


class Block(NamedTuple):
    """Some lines of a file."""

    first: int  # number of the first of them, from 1
    start: int  # bytes before it, of what a gzip file holds
    content: bytes  # whole lines, each with its newline

    @property
    def lines(self) -> int:
        return int(np.count_nonzero(np.frombuffer(self.content, np.uint8) == ord("\n")))

    @property
    def end(self) -> int:
        return self.start + len(self.content)


def read_fields(function: str, path: Path, separator: str, count: int, layout: str) -> Iterator[Fields]:
    """The lines of a file, plain or gzip by its content, in blocks. The last one may lack its newline.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a line with another number of fields than `count`, a gzip file that is cut short or
            damaged, no line at all.
    """
    for block in read_blocks(function, path, count, layout):
        yield Fields(function, path, block.first, block.content, separator, count, layout)


def read_blocks(
    function: str, path: Path, count: int, layout: str, *, first: int = 1, start: int = 0
) -> Iterator[Block]:
    """The lines of a file as `read_fields` has them, from line `first` on, which is at byte `start`."""
    rest = b""
    with path.open("rb") as plain:
        zipped = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        file = gzip.GzipFile(fileobj=plain) if zipped else plain
        _skip(function, path, file, start)
        while block := _read(function, path, file):
            cut = block.rfind(b"\n") + 1
            if cut:
                found = Block(first, start, rest + block[:cut])
                yield found
                first, start, rest = first + found.lines, found.end, b""
            rest += block[cut:]
            if len(rest) > MOST_IN_A_LINE:
                raise ValueError(
                    f"{function}: {path}:{first}: expected {count} fields ({layout}), "
                    f"got a line of more than {MOST_IN_A_LINE} bytes"
                )
    if rest:
        yield Block(first, start, rest + b"\n")
    elif start == 0:
        raise ValueError(f"{function}: {path}: expected lines of {layout}, got an empty file")


def _skip(function: str, path: Path, file: BinaryIO | gzip.GzipFile, start: int) -> None:
    try:
        file.seek(start)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{function}: {path}: expected a whole gzip file, got {error}") from error


def _decimal(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 of eight figures in the bytes of a word, the first one lowest, and whether all are figures.

    Neighbours are joined three times, in all bytes at once: two digits, then four, then eight.
    """
    digits = words ^ FIGURES  # 0 to 9; what is no figure becomes 10 or more
    good = (digits | digits + ONES * np.uint64(0x76)) & (ONES << np.uint64(7)) == 0
    for base, shift, mask in (
        (10, 8, 0x00FF00FF00FF00FF),
        (100, 16, 0x0000FFFF0000FFFF),
        (10_000, 32, 0x00000000FFFFFFFF),
    ):
        digits = digits * np.uint64(base) + (digits >> np.uint64(shift)) & np.uint64(mask)
    return digits.astype(np.int64), good


def _hexadecimal(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of hexadecimal digits: a letter has bit 6, a figure has not, and counts its low half + 9."""
    letter = words >> np.uint64(6) & ONES
    digits = (words & LOW) + letter * np.uint64(9)
    # What the digits are written as in small letters is what was read, if they are digits at all.
    small = words | letter << np.uint64(5)
    good = small == digits + FIGURES + letter * np.uint64(0x27)
    good &= (digits + ONES * np.uint64(6) & ~LOW) >> np.uint64(4) == letter
    good &= digits & ~LOW == 0
    for shift, mask in ((4, 0x00FF00FF00FF00FF), (8, 0x0000FFFF0000FFFF), (16, 0x00000000FFFFFFFF)):
        digits = (digits << np.uint64(shift) | digits >> np.uint64(2 * shift)) & np.uint64(mask)
    return digits.astype(np.int64), good


def _read(function: str, path: Path, file: BinaryIO | gzip.GzipFile) -> bytes:
    try:
        return file.read(BLOCK)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{function}: {path}: expected a whole gzip file, got {error}") from error


def _quoted(content: bytes) -> str:
    text = content.decode("latin-1")
    return repr(text if len(text) <= 60 else text[:60] + "...")
