"""Rows from a `RowSource`: batches as the model takes them, and the order in which members meet them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pyens.data._ahead import ahead
from pyens.data.rows import ArrayRows, Columns, Piece, RowSource
from pyens.ops import keyed_permutation
from pyens.training import _checks, _data
from pyens.training.randomness import Order, derive_seed

Check = Callable[..., None]  # of `tensors`, and of their rows' `weight`
WINDOW = 1 << 17  # rows shuffled among where the caller says nothing


class Source:
    """A `RowSource` whose columns become what the model takes, batch by batch."""

    def __init__(
        self, argument: str, source: RowSource, dtype: torch.dtype, loss: Any, device: torch.device
    ) -> None:
        self.argument, self.source, self.dtype, self.loss, self.device = argument, source, dtype, loss, device
        try:
            self.count = len(source)
        except (NotImplementedError, TypeError) as error:
            raise TypeError(
                f"fit: {argument}: expected a source that says how many rows it has: {error}"
            ) from error
        if self.count == 0:
            raise ValueError(f"fit: {argument}: expected rows, got a {type(source).__name__} without any")
        self.parts = list(source.parts)
        self.firsts = [0, *accumulate(self.parts)]  # and the number of all rows
        if self.firsts[-1] != self.count or any(rows < 1 for rows in self.parts):
            raise ValueError(
                f"fit: {argument}: expected parts of 1 row or more that are {self.count} rows together from "
                f"{type(source).__name__}.parts, got {len(self.parts)} of {self.firsts[-1]} rows"
            )
        self.form = _form(self.batch(torch.zeros(1, dtype=torch.int64)))

    def __len__(self) -> int:
        return self.count

    def over(self, source: RowSource) -> Source:
        """The same for rows that have been read."""
        return Source(self.argument, source, self.dtype, self.loss, self.device)

    def batch(self, rows: Tensor) -> list[Tensor | None]:
        """`[..., *]` of each column for rows `[...]`, on the model's device and of its dtypes."""
        flat = rows.reshape(-1).cpu().long()
        return self.taken(self.source.rows(flat), tuple(rows.shape))

    def taken(self, columns: Columns, shape: tuple[int, ...]) -> list[Tensor | None]:
        """Columns `[n, ...]` as the model takes them, `[*shape, ...]`."""
        kind = type(self.source).__name__
        if not isinstance(columns, (tuple, list)) or len(columns) < 2 or not isinstance(columns[-1], Tensor):
            raise TypeError(
                f"fit: {self.argument}: expected a tuple of columns from {kind}.rows, inputs and target, got "
                f"{_said(columns)}"
            )
        count = 1
        for size in shape:
            count *= size
        found: list[Tensor | None] = []
        for i, column in enumerate(columns):
            if column is not None:
                if not isinstance(column, Tensor) or column.dim() == 0 or len(column) != count:
                    raise ValueError(
                        f"fit: {self.argument}: expected {count} rows in column {i} of {kind}.rows, got "
                        f"{_said(column)}"
                    )
                column = _data.as_taken(column, self.dtype, self.loss, i == len(columns) - 1).to(self.device)
                column = column.view(*shape, *column.shape[1:])
            found.append(column)
        return list(_data.as_targets(found, self.loss, len(shape) - 1))

    def pieces(self, part: int) -> Iterator[Piece]:
        """The rows of a part, one after the other: those that the source says it has there, and no others."""
        kind = type(self.source).__name__
        begin = expected = self.firsts[part]
        for piece in self.source.read(part):
            first, columns = piece
            columns = tuple(columns)
            there = [c for c in columns if c is not None]
            if (
                not there
                or columns[-1] is None
                or not all(isinstance(c, Tensor) and c.dim() > 0 and len(c) == len(there[0]) for c in there)
            ):
                raise ValueError(
                    f"fit: {self.argument}: expected pieces of tensors with as many rows each from "
                    f"{kind}.read, got {', '.join(_said(c) for c in columns)} in part {part}"
                )
            if first != expected:
                raise ValueError(
                    f"fit: {self.argument}: expected the piece from row {expected} on in part {part} of "
                    f"{kind}, got one from row {first} on"
                )
            expected += len(there[0])
            yield Piece(first, columns)
        if expected != self.firsts[part + 1]:
            raise ValueError(
                f"fit: {self.argument}: expected {self.firsts[part + 1] - begin} rows in part {part} of "
                f"{kind}, got {expected - begin}: has it changed?"
            )

    def in_batches(self, batch_size: int) -> Iterator[tuple[Tensor, list[Tensor | None]]]:
        """All rows in their order: their numbers, int64 `[B]`, and the batch."""
        if not self.source.in_order:
            for first in range(0, self.count, batch_size):
                rows = torch.arange(first, min(first + batch_size, self.count))
                yield rows, self.batch(rows)
            return
        pieces = (piece.columns for part in range(len(self.parts)) for piece in self.pieces(part))
        first = 0
        for columns in rebatched(pieces, batch_size):
            rows = torch.arange(first, first + len(columns[-1]))  # type: ignore[arg-type]
            first += len(rows)
            yield rows, self.taken(columns, (len(rows),))

    def check(self, check: Check, weight: Tensor | None = None) -> None:
        """`check` for all rows, part by part; an error says where its row is."""
        for part in range(len(self.parts)):
            for first, columns in self.pieces(part):
                count = len(columns[-1])  # type: ignore[arg-type]
                self.check_rows(check, columns, torch.arange(first, first + count), weight)

    def check_rows(self, check: Check, columns: Columns, numbers: Tensor, weight: Tensor | None) -> None:
        """`check` for these rows, whose numbers in the source are given; weight is `[N]` or `[E, N]`."""

        def refused(start: int, end: int) -> ValueError | None:
            part = tuple(None if c is None else c[start:end] for c in columns)
            own = None if weight is None else weight[..., numbers[start:end].to(weight.device)]
            try:
                check(tensors=self.taken(part, (end - start,)), weight=own)
            except ValueError as error:
                return error
            return None

        found = refused(0, len(numbers))
        if found is None:
            return
        low, high = 0, len(numbers)  # the first row that is refused is among these
        while high - low > 1:
            middle = (low + high) // 2
            if refused(low, middle) is None:
                low = middle
            else:
                high = middle
        alone = refused(low, high) or found
        row = int(numbers[low])
        text = re.sub(r" and \d+ more", "", str(alone).replace(" row 0", f" row {row}"))  # of that row alone
        raise ValueError(f"{text} ({self.source.where(row)})") from alone

    def describe(self) -> str:
        return f"{type(self.source).__name__} of {self.count} rows: {self.source.fingerprint()}"


class Whole:
    """All rows, of which every member meets each once an epoch, in an order of its own."""

    def __init__(self, data: Any, order: Order, keys: Tensor | None) -> None:
        self.data, self._order, self._keys = data, order, keys

    def __len__(self) -> int:
        return len(self._order)

    def places(self, first: int, count: int) -> Tensor:
        """Rows of `data`, `[B]` or `[E, B]`: at most `count` of them, from this place of the order on."""
        return self._order.batch(self._keys, first, count)

    def numbers(self, places: Tensor) -> Tensor:
        """Of these rows of `data`, what they are called in the run."""
        return places


class Window:
    """Rows that were read together, of which every member meets each once, in an order of its own."""

    def __init__(self, data: Source, numbers: Tensor, keys: Tensor | None, common: Tensor) -> None:
        self.data, self.rows, self._keys, self._common = data, numbers, keys, common

    def __len__(self) -> int:
        return len(self.rows)

    def places(self, first: int, count: int) -> Tensor:
        count = min(count, len(self) - first)
        if self._keys is None:
            return keyed_permutation(self._common, len(self), first, count)[0]
        return keyed_permutation(self._keys, len(self), first, count)

    def numbers(self, places: Tensor) -> Tensor:
        return self.rows[places]


class Windows:
    """How a run goes through a source part by part: parts in a common order, rows within a window in each
    member's own."""

    def __init__(self, data: Source, order: Order, rows: int, seed: int) -> None:
        self.data, self.order, self.rows, self.seed = data, order, rows, seed

    def epoch(self, epoch: int, members: Sequence[int]) -> AbstractContextManager[Iterator[Window]]:
        """The windows of an epoch, the next one read in a thread while one is trained on."""
        return ahead(lambda: self._windows(epoch, list(members)))

    def _windows(self, epoch: int, members: Sequence[int]) -> Iterator[Window]:
        for number, (columns, numbers) in enumerate(self._filled(epoch)):
            keys = self.order.keys(members, epoch, number)
            yield Window(self.data.over(ArrayRows(*columns)), numbers, keys, self._common(number))

    def _common(self, window: int) -> Tensor:
        """int64 `[1]`: of the order that all members have without S."""
        return torch.tensor([derive_seed(self.seed, "order", "window", window)])

    def _filled(self, epoch: int) -> Iterator[tuple[Columns, Tensor]]:
        """Windows of `rows` rows, the last one smaller: their columns, and the rows' numbers."""
        key = derive_seed(self.seed, "parts", epoch if self.order.shuffle else 0)
        pieces: list[tuple[Columns, Tensor]] = []
        held = 0
        for part in keyed_permutation(torch.tensor([key]), len(self.data.parts))[0].tolist():
            for first, columns in self.data.pieces(part):
                count = len(columns[-1])  # type: ignore[arg-type]
                pieces.append((columns, torch.arange(first, first + count)))
                held += count
                while held >= self.rows:
                    window, pieces = cut(pieces, self.rows)
                    held -= self.rows
                    yield window
        if pieces:
            yield cut(pieces, held)[0]


def cut(pieces: list[tuple[Columns, Tensor]], rows: int) -> tuple[tuple[Columns, Tensor], list[Any]]:
    """The first `rows` rows of pieces, joined, and the pieces that are left."""
    taken, left, missing = [], [], rows
    for columns, numbers in pieces:
        count = min(missing, len(numbers))
        if count:
            taken.append(([None if c is None else c[:count] for c in columns], numbers[:count]))
        if count < len(numbers):
            left.append((tuple(None if c is None else c[count:] for c in columns), numbers[count:]))
        missing -= count
    joined: list[Tensor | None] = []
    forms = [_form(columns) for columns, _ in taken]
    if any(form != forms[0] for form in forms):
        raise ValueError(f"data: expected rows of one form, got shapes {forms[0]} and {forms[-1]} of a row")
    for of_all in zip(*(columns for columns, _ in taken), strict=True):
        there = [column for column in of_all if column is not None]
        joined.append(torch.cat(there) if there else None)
    return (tuple(joined), torch.cat([numbers for _, numbers in taken])), left


def rebatched(pieces: Iterable[Columns], batch_size: int) -> Iterator[Columns]:
    """The same rows in batches of that size; the last one may be smaller."""
    held: list[tuple[Columns, Tensor]] = []
    count = 0
    for columns in pieces:
        rows = len(columns[-1])  # type: ignore[arg-type]
        held.append((columns, torch.empty(rows, 0)))
        count += rows
        while count >= batch_size:
            (batch, _), held = cut(held, batch_size)
            count -= batch_size
            yield batch
    if count:
        yield cut(held, count)[0][0]


def _form(batch: Sequence[Tensor | None]) -> list[tuple[int, ...] | None]:
    """The shapes of one row."""
    return [None if t is None else tuple(t.shape[1:]) for t in batch]


def _said(value: Any) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def check_source(source: RowSource, options: dict[str, Any]) -> None:
    """Refuses what needs all rows at once."""
    for argument, value in options.items():
        if value is not None and value is not False:
            raise ValueError(
                f"fit: {argument}: expected none beside a {type(source).__name__}, whose rows are read when "
                f"they are needed, got one"
            )


def window_of(source: RowSource, window: Any, batch_size: int) -> int | None:
    """Rows of a window, whole batches; None where every member shuffles all rows."""
    if window is None and not source.in_order:
        return None
    rows = WINDOW if window is None else _checks.count("window", window)
    return -(-rows // batch_size) * batch_size
