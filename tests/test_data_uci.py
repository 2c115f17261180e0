"""The loader of the UCI regression sets, on small made-up folders of their layout and on the real ones."""

import numpy as np
import pytest
import torch
from made_up_data import write_uci

from pyens.data import load_uci


def numbers(path):
    return [
        [float(field) for field in line.split()] for line in path.read_text().splitlines() if line.strip()
    ]


@pytest.mark.parametrize("nested", [True, False])
def test_it_reads_what_is_written(tmp_path, nested):
    folder = write_uci(tmp_path / "made-up", nested=nested)
    place = folder / "data" if nested else folder
    data = load_uci(folder)
    table = torch.tensor(numbers(place / "data.txt"), dtype=torch.float64)
    assert data.name == "made-up" and len(data) == 60
    assert torch.equal(data.features, table[:, [0, 2, 3]]) and torch.equal(data.target, table[:, 1])
    assert len(data.train) == len(data.test) == 2
    for i, (train, test) in enumerate(zip(data.train, data.test, strict=True)):
        assert train.tolist() == [int(row) for (row,) in numbers(place / f"index_train_{i}.txt")]
        assert sorted([*train.tolist(), *test.tolist()]) == list(range(60)) and len(test) == 6
        assert train.dtype == torch.int64
    assert load_uci(str(folder)).features.dtype == torch.float64


def test_indices_may_be_written_as_floats_and_lines_may_be_blank(tmp_path):
    expected = load_uci(write_uci(tmp_path / "plain"))
    folder = write_uci(tmp_path / "other") / "data"
    for path in [*folder.glob("index_*"), folder / "n_splits.txt"]:
        np.savetxt(path, np.loadtxt(path, ndmin=1))
    (folder / "data.txt").write_text("\r\n" + (folder / "data.txt").read_text().replace("\n", "\r\n\r\n"))
    data = load_uci(folder.parent)
    for name in ("features", "target"):
        assert torch.equal(getattr(data, name), getattr(expected, name))
    assert all(map(torch.equal, data.train + data.test, expected.train + expected.test))


def test_a_set_of_one_feature_and_one_split(tmp_path):
    data = load_uci(write_uci(tmp_path / "small", features=1, splits=1, rows=10))
    assert data.features.shape == (10, 1) and [len(data.train[0]), len(data.test[0])] == [9, 1]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "data.txt",
            lambda lines: [*lines[:4], lines[4] + " 7", *lines[5:]],
            r":5: expected 4 numbers, got 5",
        ),
        (
            "data.txt",
            lambda lines: ["", "", *lines[:4], "1 2 3", *lines[5:]],
            r":7: expected 4 numbers, got 3",
        ),
        (
            "data.txt",
            lambda lines: [*lines[:2], "1 2 nan 4", *lines[3:]],
            r":3: expected a finite number, got",
        ),
        ("data.txt", lambda lines: [*lines[:2], "1 2 1e999 4"], r":3: expected a finite number, got '1e999'"),
        ("data.txt", lambda lines: [*lines[:2], "1 2 x 4"], r":3: expected a finite number, got 'x'"),
        ("data.txt", lambda lines: [*lines[:2], "1 2 # 4"], r":3: expected a finite number, got '#'"),
        ("data.txt", lambda _: ["", ""], r": expected lines of numbers, got an empty file"),
        ("index_train_1.txt", lambda lines: [*lines[:7], "60"], r":8: expected a row from 0 to 59, got 60"),
        ("index_train_1.txt", lambda lines: [*lines[:7], "-1"], r":8: expected a row from 0 to 59, got -1"),
        ("index_train_1.txt", lambda lines: [*lines[:7], "2.5"], r":8: expected a row from 0 to 59, got 2.5"),
        (
            "index_train_0.txt",
            lambda lines: ["", *lines, lines[3]],
            r":56: expected a row that is not listed",
        ),
        ("index_train_0.txt", lambda lines: [" ".join(lines)], r":1: expected 1 numbers, got 54 in "),
        ("index_features.txt", lambda _: ["0", "4"], r":2: expected a column from 0 to 3, got 4"),
        ("index_features.txt", lambda _: ["0", "1"], r":2: expected a column beside the target's, got 1"),
        ("index_target.txt", lambda _: ["1", "2"], r":2: expected one column, got column 2 too"),
        ("n_splits.txt", lambda _: ["0"], r":1: expected a positive number of splits, got 0"),
    ],
)
def test_what_it_refuses_it_names(tmp_path, file, change, message):
    path = write_uci(tmp_path / "made-up") / "data" / file
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    with pytest.raises(ValueError, match=f"^load_uci: {path}{message}"):
        load_uci(tmp_path / "made-up")


def test_rows_of_both_kinds_are_refused(tmp_path):
    folder = write_uci(tmp_path / "made-up") / "data"
    train, test = folder / "index_train_1.txt", folder / "index_test_1.txt"
    row = train.read_text().splitlines()[5]
    test.write_text(test.read_text() + f"{row}\n")
    with pytest.raises(ValueError, match=rf"{test}:7: expected a row that is not in {train.name}, got {row}"):
        load_uci(folder.parent)


@pytest.mark.parametrize("file", ["data.txt", "index_target.txt", "n_splits.txt", "index_test_1.txt"])
def test_a_missing_file_is_named(tmp_path, file):
    folder = write_uci(tmp_path / "made-up", nested=False)
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"load_uci: {folder}: expected .*, found no {file}; a data"):
        load_uci(folder)


def test_the_real_sets(data_dir):
    """Every one that is there has rows for all of its splits, of equal sizes."""
    folders = [path for path in sorted(data_dir("uci").iterdir()) if path.is_dir()]
    assert folders
    for folder in folders:
        data = load_uci(folder)
        for train, test in zip(data.train, data.test, strict=True):
            assert len(train) + len(test) <= len(data) and abs(len(test) / len(data) - 0.1) < 0.02
