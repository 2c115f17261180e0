"""The experiment of shuffle windows runs on made-up ratings, and says what it found."""

import json

from made_up_data import write_movielens

from benchmarks.papers import windows


def test_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(windows, "WINDOWS", (64, 256))
    monkeypatch.setattr(windows.Parts, "size", 50)
    (folder := tmp_path / "data").mkdir()
    write_movielens(folder)
    output = tmp_path / "results"
    arguments = ["--data", str(folder), "--members", "3", "--epochs", "2", "--output", str(output)]
    assert windows.main(arguments) == 0
    found = json.loads((output / "windows.json").read_text())["windows"]
    assert list(found) == ["256", "64", "all rows", "all rows, other orders"]
    assert all(entry["measures"]["PV mean"] > 0 for entry in found.values())
    assert -1 <= found["64"]["correlation"] <= 1 and "correlation" not in found["all rows"]
    page = (output / "windows.md").read_text()
    assert "| 256 |" in page and "| all rows |" in page and page in capsys.readouterr().out
