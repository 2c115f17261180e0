"""The reproductions of prediction variation, small and on made-up data."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes

from benchmarks.papers import criteo, movielens
from benchmarks.papers.ensembles import Study
from benchmarks.papers.pages import Results
from pyens import metrics
from pyens.data import load_movielens
from tests.made_up_data import write_criteo, write_movielens
from tests.pictures import saved_figures


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_movielens(tmp_path_factory.mktemp("ml-1m"), users=60, movies=40, ratings=1500)


def arguments(data: Path, tmp_path: Path, *more: str) -> list[str]:
    folders = ["--data", str(data), "--work", str(tmp_path / "work"), "--output", str(tmp_path / "results")]
    return [*folders, "--members", "5", *more]


def shows_correlations(ax: Axes, pairs: dict[str, float], names: list[str]) -> None:
    """The matrix of `pairs` for these settings, symmetric and with ones on the diagonal."""
    (image,) = ax.get_images()
    assert [tick.get_text() for tick in ax.get_xticklabels()] == names
    shown = image.get_array()
    for (i, one), (j, other) in itertools.product(enumerate(names), repeat=2):
        expected = 1 if i == j else pairs[f"{min(one, other)}-{max(one, other)}"]
        assert shown[i, j] == pytest.approx(expected, abs=1e-6)


def test_movielens(
    ratings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = saved_figures(monkeypatch)
    command = arguments(ratings, tmp_path, "--epochs", "1")
    assert movielens.main([*command, "--settings", "R0,R3,R7"]) == 0
    page = (tmp_path / "results" / "movielens-5.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    for text in (
        "Table 1: MovieLens-R",
        "Table 1: MovieLens-C",
        "R0 none",
        "R7 R+S+J",
        "MC dropout",
        "minutes",
    ):
        assert text in page
    assert "R1 R" not in page
    saved = json.loads((tmp_path / "results" / "movielens-5.json").read_text())
    correlations = {key: entry["values"] for key, entry in saved["correlations"].items()}
    regression, classification, between, *_ = figures["movielens-5-correlations.png"].axes
    assert "MovieLens-R" in regression.get_title() and "MovieLens-C" in classification.get_title()
    shows_correlations(regression, correlations["R"], ["R3", "R7"])
    shows_correlations(classification, correlations["C"], ["R3", "R7"])
    heights = {
        label.get_text(): bar.get_height()
        for label, bar in zip(between.get_xticklabels(), between.patches, strict=True)
    }
    assert heights == pytest.approx(correlations["R-C"]) and set(heights) == {"R3", "R7"}
    for task in ("movielens-r", "movielens-c"):
        pv = {setting: entry["measures"]["PV mean"] for setting, entry in saved[task].items()}
        assert pv["R0"] < 1e-6 * 5 < pv["R3"]
    assert saved["movielens-r"]["R0"]["measures"]["PV mean"] == 0

    # Another setting is added; what is there is read, not trained again.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").glob("*.pt")}
    assert len(before) == 6
    movielens.main([*command, "--settings", "R1", "--task", "R"])
    assert all(p.stat().st_mtime_ns == written for p, written in before.items())
    page = (tmp_path / "results" / "movielens-5.md").read_text(encoding="utf-8")
    assert "R1 R" in page and "R7 R+S+J" in page
    assert not list((tmp_path / "work").glob("*.checkpoint"))


def test_a_unit_holds_what_its_ensemble_says(ratings: Path, tmp_path: Path) -> None:
    table = load_movielens(ratings)
    study = Study(table, tmp_path, 4, 0)
    task = movielens.TASKS["R"]
    unit = study.unit(task, "R3")
    again = study.unit(task, "R3")
    assert torch.equal(unit.pv, again.pv) and unit.measures == again.measures
    assert unit.pv.shape == unit.mean.shape == table.test.shape
    rows = table.rows(table.test)
    assert unit.measures["MSE"] == pytest.approx((unit.mean - rows.target).square().mean().item())
    assert unit.measures["PV mean"] == pytest.approx(unit.pv.mean().item())
    assert unit.measures["coeff"] == pytest.approx((unit.pv / unit.mean).mean().item(), rel=1e-4)
    member = task.model(1, table)
    member.load_state_dict(unit.member)
    with torch.no_grad():
        prediction = member(rows.categorical, rows.numeric).flatten()
    assert metrics.rmse(prediction, unit.mean) < 5 * unit.pv.mean()
    with pytest.raises(ValueError, match="was made by"):
        Study(table, tmp_path, 4, 1).unit(task, "R3")


def test_a_killed_unit_goes_on(ratings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = load_movielens(ratings)
    task = movielens.TASKS["C"]
    whole = Study(table, tmp_path / "whole", 3, 0).unit(task, "R7")
    study = Study(table, tmp_path / "parts", 3, 0)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "predict", killed)
    with pytest.raises(KeyboardInterrupt):
        study.unit(task, "R7")
    monkeypatch.undo()
    assert list((tmp_path / "parts").glob("*.checkpoint"))
    resumed = study.unit(task, "R7")
    assert torch.equal(whole.pv, resumed.pv)
    assert resumed.training_seconds > 0


def test_criteo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = saved_figures(monkeypatch)
    data = write_criteo(tmp_path)
    assert criteo.main(arguments(data, tmp_path, "--settings", "R0,R1,R2")) == 0
    page = (tmp_path / "results" / "criteo-5.md").read_text(encoding="utf-8")
    assert "A sample: 270 rows for training, 30 for testing" in page
    assert "Lowest correlation" in page and "R2 S" in page
    assert (tmp_path / "results" / "criteo-5-correlations.png").exists()
    ax, *_ = figures["criteo-5-correlations.png"].axes
    assert ax.get_title() == "Figure 2: PV between settings, Criteo sample"
    lowest = float(page.split("Lowest correlation ")[1].split(" ")[0])
    shows_correlations(ax, {"R1-R2": pytest.approx(lowest, abs=1e-3)}, ["R1", "R2"])


@pytest.mark.parametrize("command", [movielens.main, criteo.main])
def test_missing_data_and_unknown_settings(command, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        command(arguments(tmp_path, tmp_path))
    assert "--data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(arguments(tmp_path, tmp_path, "--settings", "R9"))
    assert "R9" in capsys.readouterr().err


def test_results_merge(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Results(path).merge("task", {"R0": {"value": 1}, "R1": {"value": 2}})
    Results(path).merge("task", {"R1": {"value": 3}})
    section = Results(path).section("task")
    assert {name: entry["value"] for name, entry in section.items()} == {"R0": 1, "R1": 3}
    assert all("torch" in entry["made"] for entry in section.values())
    Results(path).merge("task", {"R2": {"value": 4, "made": "elsewhere"}})  # only read here
    assert Results(path).section("task")["R2"]["made"] == "elsewhere"
