"""The loader of the Criteo data, on small made-up files of the same format and on the real sample."""

import gzip
import math
import re

import pytest
import torch
from made_up_data import write_criteo

from pyens.data import _text, load_criteo


def check(path, lines, buckets):
    """Every feature of each line, computed the plain way."""
    data = load_criteo(path, buckets=buckets)
    sizes = [buckets] * 26 if isinstance(buckets, int) else buckets
    assert data.categories == tuple(sizes)
    assert data.categorical.shape == data.numeric.shape == (len(lines), 26)
    assert (data.categorical.dtype, data.numeric.dtype) == (torch.int64, torch.float32)
    assert data.label.dtype == torch.float32 and data.label is data.target
    for line, categorical, numeric, label in zip(
        lines, data.categorical.tolist(), data.numeric.tolist(), data.label.tolist(), strict=True
    ):
        click, *values = line.split("\t")
        assert label == int(click)
        logs = [math.log1p(max(int(v), 0)) if v else 0.0 for v in values[:13]]
        assert numeric == pytest.approx([*logs, *(float(v == "") for v in values[:13])], rel=1e-6)
        hashed = zip(values[13:], sizes, strict=True)
        assert categorical == [1 + int(v, 16) % (size - 1) if v else 0 for v, size in hashed]
    return data


def test_features_are_those_of_the_lines(tmp_path, monkeypatch):
    path = write_criteo(tmp_path) / "train.txt"
    lines = path.read_text().splitlines()
    for block in (1 << 24, 1000, 64):
        monkeypatch.setattr(_text, "BLOCK", block)
        data = check(path, lines, 50)
    check(path, lines, [2 + 37 * c for c in range(26)])
    assert data.numeric[:, :13].min() == 0 < data.numeric[:, :13].max()
    assert 0 < data.label.mean() < 1


def test_file_folder_and_gzip(tmp_path):
    plain = write_criteo(tmp_path) / "train.txt"
    expected = load_criteo(plain)
    assert torch.equal(load_criteo(tmp_path).categorical, expected.categorical)
    zipped = tmp_path / "sample"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    assert torch.equal(load_criteo(zipped).categorical, expected.categorical)
    plain.unlink()
    zipped.rename(tmp_path / "train.txt.gz")
    data = load_criteo(str(tmp_path))
    assert torch.equal(data.categorical, expected.categorical)
    assert torch.equal(data.numeric, expected.numeric) and torch.equal(data.label, expected.label)


@pytest.mark.parametrize("zipped", [False, True])
def test_lines_may_end_as_on_windows(tmp_path, monkeypatch, zipped):
    plain = write_criteo(tmp_path) / "train.txt"
    expected = load_criteo(plain)
    content = plain.read_bytes().replace(b"\n", b"\r\n")
    assert b"\t\r\n" in content  # a line whose last category is missing
    for block in (1 << 24, 999):
        monkeypatch.setattr(_text, "BLOCK", block)
        for text in (content, content.removesuffix(b"\n"), content.removesuffix(b"\r\n")):
            plain.write_bytes(gzip.compress(text) if zipped else text)
            data = load_criteo(plain)
            assert torch.equal(data.categorical, expected.categorical)
            assert torch.equal(data.numeric, expected.numeric) and torch.equal(data.label, expected.label)
    plain.write_bytes(content.replace(b"\r\n", b"\r\r\n", 1))
    with pytest.raises(ValueError, match=r"train\.txt:1: expected 8 hex digits or nothing, got '.*\\r'"):
        load_criteo(plain)


def test_a_line_without_an_end_is_not_read_whole(tmp_path, monkeypatch):
    # A few bytes of gzip hold as much of it as one likes.
    monkeypatch.setattr(_text, "BLOCK", 1000)
    monkeypatch.setattr(_text, "MOST_IN_A_LINE", 5000)
    path = write_criteo(tmp_path) / "train.txt"
    first = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(gzip.compress(first + b"a" * 10**6))
    with pytest.raises(
        ValueError, match=r"train\.txt:2: expected 40 fields .*, got a line of more than 5000 bytes"
    ):
        load_criteo(path)


def test_extremes(tmp_path):
    lines = [
        "\t".join(["1"] + ["-3"] * 13 + ["ffffffff"] * 26),
        "\t".join(["0"] + ["999999999999999999"] * 13 + ["00000000"] * 26),
        "\t".join(["1"] + [""] * 39),
        "\t".join(["0"] + ["0"] * 13 + ["ABCDEF09"] * 26),
    ]
    (tmp_path / "train.txt").write_text("\n".join(lines))  # without the last newline
    for buckets in (2, 3, 2**40):
        check(tmp_path, lines, buckets)
    # A missing value is neither a 0 nor a category.
    data = load_criteo(tmp_path, buckets=2)
    assert data.categorical.tolist() == [[1] * 26, [1] * 26, [0] * 26, [1] * 26]
    assert data.numeric[2].tolist() == [0.0] * 13 + [1.0] * 13 and data.numeric[3].tolist() == [0.0] * 26


@pytest.mark.parametrize("rows", [1, 4, 5, 300])
def test_split(tmp_path, rows):
    write_criteo(tmp_path, rows=rows)
    data, again, other = (load_criteo(tmp_path, seed=seed) for seed in (0, 0, 1))
    assert len(data) == rows and len(data.train) == round(0.9 * rows)
    assert torch.cat([data.train, data.test]).sort().values.tolist() == list(range(rows))
    assert torch.equal(data.train, again.train) and torch.equal(data.test, again.test)
    assert rows < 300 or not torch.equal(data.test.sort().values, other.test.sort().values)


BAD = {  # column, what it becomes, message
    "label": (0, "2", "expected a label 0 or 1, got '2'"),
    "no label": (0, "", "expected an integer, got ''"),
    "a word": (0, "click", "expected an integer, got 'click'"),
    "integer": (5, "1.5", "expected an integer or nothing, got '1.5'"),
    "minus": (13, "-", "expected an integer or nothing, got '-'"),
    "hex": (14, "0123456g", "expected 8 hex digits or nothing, got '0123456g'"),
    "short": (39, "0123456", "expected 8 hex digits or nothing, got '0123456'"),
    "long": (20, "012345678", "expected 8 hex digits or nothing, got '012345678'"),
    "a field more": (7, "1\t2", "expected 40 fields (label, 13 integers, 26 hex categories), got 41 in '"),
}


@pytest.mark.parametrize("block", [1 << 24, 700])
@pytest.mark.parametrize("case", BAD)
def test_bad_lines_are_named(tmp_path, monkeypatch, case, block):
    monkeypatch.setattr(_text, "BLOCK", block)
    column, value, message = BAD[case]
    path = write_criteo(tmp_path) / "train.txt"
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    lines[41][column] = value
    path.write_text("\n".join("\t".join(fields) for fields in lines))
    with pytest.raises(ValueError, match=r"^load_criteo: ") as raised:
        load_criteo(tmp_path)
    assert f"{path}:42: {message}" in str(raised.value)


def test_a_file_cut_short_is_named(tmp_path):
    path = write_criteo(tmp_path) / "train.txt"
    content = path.read_bytes()
    path.write_bytes(content[:-50])
    with pytest.raises(ValueError, match=r"train\.txt:300: expected 40 fields .*, got \d+ in "):
        load_criteo(tmp_path)
    damaged = bytearray(gzip.compress(content))
    damaged[len(damaged) // 2] ^= 255
    for broken in (gzip.compress(content)[:-9], bytes(damaged)):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"train\.txt: expected a whole gzip file, got "):
            load_criteo(tmp_path)
    for empty in (b"", gzip.compress(b"")):
        path.write_bytes(empty)
        with pytest.raises(ValueError, match=r"train\.txt: expected lines of label, .*, got an empty file"):
            load_criteo(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        message = rf"load_criteo: {re.escape(str(path))}: expected a file, or train\.txt or train\.txt\.gz"
        with pytest.raises(FileNotFoundError, match=message):
            load_criteo(path)


@pytest.mark.parametrize(
    ("buckets", "error", "message"),
    [
        (1, ValueError, "expected at least 2, got 1"),
        ([10] * 25, ValueError, "expected 1 or 26 numbers, got 25"),
        ([10] * 25 + [0], ValueError, "expected at least 2, got 0"),
        (2**63, ValueError, r"expected below 2\^63, got 9223372036854775808"),
        ([10] * 25 + [2**70], ValueError, r"expected below 2\^63, got"),
        ([10] * 25 + [2.5], TypeError, "expected ints, got float"),
        (1e3, TypeError, "expected an int or a list of them, got float"),
    ],
)
def test_bad_buckets_are_refused(tmp_path, buckets, error, message):
    with pytest.raises(error, match=f"^load_criteo: buckets: {message}"):
        load_criteo(tmp_path, buckets=buckets)


def test_real_sample(data_dir):
    data = load_criteo(data_dir("criteo-sample"), buckets=10_000)
    assert len(data) == 25_337 and round(data.label.mean().item(), 4) == 0.2432
    assert (data.categorical == 0).sum() == 73_224
    assert data.numeric[:, 13:].sum(0)[1] == 0 < data.numeric[:, 13:].sum()
