"""Rows that come in batches, from a DataLoader or a function of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from pyens.data.rows import Columns, Piece, RowSource, as_tensor


class IterableRows(RowSource):
    r"""What a DataLoader gives, or anything that gives tuples of columns anew each time it is gone through.

        loader = torch.utils.data.DataLoader(dataset, batch_size=1000, num_workers=4)
        source = pyens.data.IterableRows(loader, rows=len(dataset))
        pyens.training.fit(model, source, ...)

    `fit` shuffles within a window of what comes, and cuts it into batches of its own. To learn from what
    comes once, and from as much as there is, `Trainer.partial_fit` takes it as it is.

    Args:
        batches: gives tuples of tensors or arrays `[n, ...]`, inputs and target. A function without arguments
            that returns such an iterator will do. A generator will not: it is empty after one epoch.
        rows: how many there are in all, in every pass.
        name: what a checkpoint calls this data; another name is another run.

    Raises:
        TypeError, ValueError: arguments that are not as above; while rows are read, more or fewer than
            `rows`, or batches of another form, by their number.
    """

    in_order = True

    def __init__(
        self, batches: Iterable[Any] | Callable[[], Iterable[Any]], rows: int, *, name: str = ""
    ) -> None:
        if isinstance(batches, Iterator):
            raise TypeError(
                f"IterableRows: batches: expected what can be gone through in every epoch, got a "
                f"{type(batches).__name__}, which is empty after one"
            )
        if not isinstance(batches, Iterable) and not callable(batches):
            raise TypeError(
                f"IterableRows: batches: expected an iterable or a function, got a {type(batches).__name__}"
            )
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ValueError(f"IterableRows: rows: expected a positive integer, got {rows!r}")
        self._batches, self._rows, self._name = batches, rows, name

    def __len__(self) -> int:
        return self._rows

    @property
    def parts(self) -> list[int]:
        return [self._rows]

    def read(self, part: int) -> Iterator[Piece]:
        first = 0
        iterable = self._batches if isinstance(self._batches, Iterable) else self._batches()
        for number, given in enumerate(iterable):
            columns = columns_of("IterableRows: batches", given, number)
            count = len(columns[-1])  # type: ignore[arg-type]
            if first + count > self._rows:
                raise ValueError(
                    f"IterableRows: batches: expected {self._rows} rows, got {first + count} or more by "
                    f"batch {number}"
                )
            if count:  # copies, for it may fill the same memory again
                yield Piece(first, tuple(None if c is None else c.clone() for c in columns))
            first += count
        if first < self._rows:
            raise ValueError(
                f"IterableRows: batches: expected {self._rows} rows, got {first}: has it changed?"
            )

    def rows(self, index: Tensor) -> Columns:
        """Goes through the batches until the last of these rows has come."""
        wanted = index.reshape(-1).long()
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self._rows):
            raise IndexError(f"IterableRows: rows: expected numbers from 0 to {self._rows - 1}, got others")
        last = int(wanted.max()) if len(wanted) else 0
        found: list[Tensor | None] = []
        for first, columns in self.read(0):
            inside = (wanted >= first) & (wanted < first + len(columns[-1]))  # type: ignore[arg-type]
            for i, column in enumerate(columns):
                if len(found) <= i:
                    new = None if column is None else column.new_empty(len(wanted), *column.shape[1:])
                    found.append(new)
                own = found[i]
                if own is not None and column is not None:
                    own[inside] = column[wanted[inside] - first]
            if first + len(columns[-1]) > last:  # type: ignore[arg-type]
                break
        return tuple(found)

    def fingerprint(self) -> str:
        """What is known of them without a pass: kind, name and number."""
        return f"{type(self._batches).__name__} {self._name!r} of {self._rows} rows"


def columns_of(who: str, given: Any, number: int) -> Columns:
    """A batch as columns, of tensors or arrays."""
    if not isinstance(given, (tuple, list)) or len(given) < 2:
        raise TypeError(
            f"{who}: expected tuples of columns, inputs and target, got a {type(given).__name__} as batch "
            f"{number}"
        )
    columns = tuple(None if c is None else as_tensor(c) for c in given)
    there: list[Any] = [c for c in columns if c is not None]
    if columns[-1] is None or not all(isinstance(c, Tensor) and c.dim() > 0 for c in there):
        raise TypeError(
            f"{who}: expected tensors or arrays [B, ...], got "
            f"{', '.join(type(c).__name__ for c in given)} as batch {number}"
        )
    if len({len(c) for c in there}) > 1:
        raise ValueError(
            f"{who}: expected as many rows in all columns, got {[len(c) for c in there]} in batch {number}"
        )
    return columns
