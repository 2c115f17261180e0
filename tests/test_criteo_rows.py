"""Criteo's text as Parquet: the rows of the loader, in constant memory, going on after a kill."""

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_data import write_criteo

from pyens.data import CriteoRows, _text, convert_criteo, criteo_rows, load_criteo
from pyens.nn import TabularEnsemble
from pyens.training import fit

pytest.importorskip("pyarrow", reason="no pyarrow: pip install 'pyens[arrow]'")


@pytest.fixture
def small(monkeypatch: Any) -> None:
    """Files of about 100 rows, of row groups of some lines."""
    monkeypatch.setattr(_text, "BLOCK", 3000)
    monkeypatch.setattr(criteo_rows, "ROWS", 100)
    monkeypatch.setattr(criteo_rows, "GROUP", 25)


def check(rows: CriteoRows, path: Path, buckets: Any = 1000) -> None:
    expected = load_criteo(path, buckets=buckets)
    assert len(rows) == len(expected) and rows.categories == expected.categories
    categorical, numeric, label = rows.rows(torch.arange(len(rows)))
    assert torch.equal(categorical, expected.categorical) and torch.equal(numeric, expected.numeric)
    assert torch.equal(label, expected.label) and label.dtype == torch.uint8


@pytest.mark.parametrize("zipped", [False, True])
def test_the_rows_of_the_loader(tmp_path: Path, small: None, zipped: bool) -> None:
    path = write_criteo(tmp_path) / "train.txt"
    if zipped:
        content = path.read_bytes()
        path.unlink()
        path = tmp_path / "train.txt.gz"
        path.write_bytes(gzip.compress(content))
    folder = tmp_path / "columns" / "new"
    rows = convert_criteo(tmp_path, folder, progress=False)
    assert len(rows) == 300 and len(rows.files) == 3 and len(rows.parts) > 6
    check(rows, path)
    for buckets in (2, 50, [2 + 37 * c for c in range(26)], 2**40):
        check(CriteoRows(folder, buckets), path, buckets)
    assert CriteoRows(folder, 50).fingerprint() != CriteoRows(folder, 51).fingerprint()
    written = [file.stat().st_mtime_ns for file in rows.files]
    assert [f.stat().st_mtime_ns for f in convert_criteo(tmp_path, folder, progress=False).files] == written


def test_extremes(tmp_path: Path) -> None:
    lines = [
        "\t".join(["1"] + ["-3"] * 13 + ["ffffffff"] * 26),
        "\t".join(["0"] + ["999999999999999999"] * 13 + ["00000000"] * 26),
        "\t".join(["1"] + [""] * 39),
        "\t".join(["0"] + ["-999999999999999999"] * 13 + ["ABCDEF09"] * 26),
    ]
    (tmp_path / "train.txt").write_text("\r\n".join(lines))
    check(convert_criteo(tmp_path, tmp_path / "c", progress=False), tmp_path)


def test_it_goes_on_behind_the_last_whole_file(tmp_path: Path, small: None) -> None:
    path = write_criteo(tmp_path) / "train.txt"
    folder = tmp_path / "columns"
    lines = path.read_text().splitlines(keepends=True)
    bad = lines.copy()
    bad[250] = "click" + bad[250][1:]
    path.write_text("".join(bad))
    with pytest.raises(
        ValueError, match=r"convert_criteo: .*train\.txt:251: expected an integer, got 'click'"
    ):
        convert_criteo(tmp_path, folder, progress=False)
    assert sorted(file.name for file in folder.iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    with pytest.raises(FileNotFoundError, match=r"expected criteo\.json, which convert_criteo writes"):
        CriteoRows(folder)
    path.write_text("".join(lines))  # which has another size
    with pytest.raises(ValueError, match=r"part-00000\.parquet: expected a part of .*; name another folder"):
        convert_criteo(tmp_path, folder, progress=False)
    whole = tmp_path / "again"
    convert_criteo(tmp_path, whole, progress=False)
    (whole / "part-00002.parquet").unlink()
    (whole / "criteo.json").unlink()
    before = [(whole / f"part-0000{i}.parquet").stat().st_mtime_ns for i in range(2)]
    rows = convert_criteo(tmp_path, whole, progress=False)
    assert [(whole / f"part-0000{i}.parquet").stat().st_mtime_ns for i in range(2)] == before
    check(rows, path)


def test_rows_of_another_file_are_refused(tmp_path: Path, small: None) -> None:
    write_criteo(tmp_path)
    convert_criteo(tmp_path, tmp_path / "c", progress=False)
    assert json.loads((tmp_path / "c" / "criteo.json").read_text())["rows"] == 300
    write_criteo(tmp_path, rows=301)
    with pytest.raises(
        ValueError, match=r"expected an empty folder or one with rows of pyens.criteo 1, train.txt"
    ):
        convert_criteo(tmp_path, tmp_path / "c", progress=False)


def test_what_is_missing_or_more_in_the_folder(tmp_path: Path, small: None) -> None:
    path = write_criteo(tmp_path) / "train.txt"
    folder = tmp_path / "c"
    rows = convert_criteo(tmp_path, folder, progress=False)
    (folder / "backup.parquet").write_bytes(rows.files[0].read_bytes())
    assert len(CriteoRows(folder)) == 300
    rows.files[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"part-00001\.parquet: expected a file, found none"):
        CriteoRows(folder)
    check(convert_criteo(tmp_path, folder, progress=False), path)  # which makes it again
    (folder / "part-00001.parquet").write_bytes(rows.files[0].read_bytes())
    with pytest.raises(ValueError, match="c: expected 300 rows, got"):
        CriteoRows(folder)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\n1", b"\n0", 1))  # of the same size
    with pytest.raises(ValueError, match="expected an empty folder or one with rows of"):
        convert_criteo(tmp_path, folder, progress=False)
    for wrong in ("{", "[]", "{}", '{"format": "other", "of": "", "rows": 1, "files": 1}'):
        (folder / "criteo.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"criteo\.json: expected what convert_criteo writes, got"):
            CriteoRows(folder)
    (folder / "criteo.json").unlink()
    (folder / "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        ValueError, match=r"part-00000\.parquet: expected a whole Parquet file, got .*remove it"
    ):
        convert_criteo(tmp_path, folder, progress=False)


def test_a_damaged_file_and_a_missing_one(tmp_path: Path) -> None:
    path = write_criteo(tmp_path) / "train.txt"
    path.write_bytes(gzip.compress(path.read_bytes())[:-9])
    with pytest.raises(ValueError, match=r"convert_criteo: .*train\.txt: expected a whole gzip file"):
        convert_criteo(path, tmp_path / "c", progress=False)
    with pytest.raises(FileNotFoundError, match=r"convert_criteo: .*absent"):
        convert_criteo(tmp_path / "absent", tmp_path / "c", progress=False)
    with pytest.raises(ValueError, match="CriteoRows: buckets: expected at least 2, got 1"):
        CriteoRows(tmp_path, 1)


def test_a_model_learns_from_them(tmp_path: Path, small: None) -> None:
    write_criteo(tmp_path)
    rows = convert_criteo(tmp_path, tmp_path / "c", progress=False)
    model = TabularEnsemble(3, [(size, 2) for size in rows.categories], 26, [8], 1, seeds=range(3))
    history = fit(
        model,
        rows,
        loss="bce",
        epochs=8,
        batch_size=32,
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-2),
        validation=0,
        window=128,
        progress=False,
    )
    assert (history.train_loss[-1] < history.train_loss[0]).all()


KILLED = """
import sys
from pyens.data import _text, convert_criteo, criteo_rows
_text.BLOCK, criteo_rows.ROWS = 3000, 100
print("begun", flush=True)
convert_criteo(sys.argv[1], sys.argv[2], progress=False)
"""


@pytest.mark.parametrize("after", [0.0, 0.05, 0.2])
def test_killed_at_any_moment(tmp_path: Path, small: None, after: float) -> None:
    path = write_criteo(tmp_path, rows=4000) / "train.txt"
    command = [sys.executable, "-c", KILLED, str(path), str(tmp_path / "c")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    assert child.stdout is not None and child.stdout.readline() == b"begun\n"
    time.sleep(after)
    child.kill()
    child.wait()
    child.stdout.close()
    check(convert_criteo(path, tmp_path / "c", progress=False), path)
    assert not list((tmp_path / "c").glob(".*"))
