"""The experiments of the compressed ensembles, small and on made-up data."""

import json
import struct

import pytest
import torch

from benchmarks.papers import compressed
from tests.pictures import saved_figures


@pytest.fixture
def folder(tmp_path):
    parts = {"mnist": ("train", "t10k"), "notmnist-small": ("notMNIST_small",)}
    for name, files in parts.items():
        (tmp_path / name).mkdir()
        for file in files:
            labels = torch.arange(60) % 10
            images = (labels.view(-1, 1, 1) * 20 + torch.randint(50, (60, 12, 12))).to(torch.uint8)
            for kind, array in (("images-idx3", images), ("labels-idx1", labels.to(torch.uint8))):
                header = struct.pack(f">BBBB{array.dim()}I", 0, 0, 8, array.dim(), *array.shape)
                (tmp_path / name / f"{file}-{kind}-ubyte").write_bytes(header + array.numpy().tobytes())
    return tmp_path


def test_quick_run(folder, monkeypatch, capsys):
    output, work = folder / "results", folder / "work"
    command = ["--data", str(folder), "--output", str(output), "--work", str(work), "--quick"]
    figures = saved_figures(monkeypatch)
    assert compressed.main(command) == 0
    pictures = {f"compressed-{what}-quick.png" for what in ("confidence", "confidence-other", "uncertainty")}
    assert {path.name for path in output.iterdir()} == {
        "compressed-quick.md",
        "compressed-quick.json",
        *pictures,
    }
    levels = ["dense", "0% + int8", "25% + int8", "50% + int8", "75% + int8", "95% + int8"]
    for name in ("confidence", "confidence-other"):
        (axes,) = figures[f"compressed-{name}-quick.png"].axes
        assert [line.get_label() for line in axes.lines] == levels
    saved = json.loads((output / "compressed-quick.json").read_text())
    tables = saved["tables0"]
    sizes = [tables[level]["size"] for level in levels]
    assert sizes == sorted(sizes, reverse=True) and tables["dense"]["ratio"] == 1
    for level in levels:
        assert 0 <= tables[level]["accuracy"] <= 1 and 0 < tables[level]["entropy other"] <= 2.31
        assert tables[f"{level}, one"]["disagreement other"] == pytest.approx(0, abs=1e-9)
    open_rows = saved["open0"]
    assert len(open_rows) == 11 and open_rows["deep ensemble"]["member epochs"] == 5
    page = (output / "compressed-quick.md").read_text()
    assert page.count("\n| ") >= len(levels) * 2 + 4 + 4 + 11 and "one dense member" in page
    # Again: nothing is trained anew, and nothing changes.
    assert compressed.main(command) == 0
    again = json.loads((output / "compressed-quick.json").read_text())
    for section, rows in saved.items():
        for row, values in rows.items():
            assert {**again[section][row], "made": 0} == {**values, "made": 0}


def test_no_data(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        compressed.main(["--data", str(tmp_path)])
    assert end.value.code == 2 and "--data" in capsys.readouterr().err
