"""The command for the tables of variation estimation, on made-up data."""

import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks.papers import estimation, movielens, variation
from benchmarks.papers.ensembles import Study
from benchmarks.papers.estimation import Estimation
from benchmarks.papers.pages import Results
from pyens.data import load_movielens
from pyens.variation import VariationModel
from tests.made_up_data import write_criteo, write_movielens
from tests.pictures import saved_figures

SMALL = ["--members", "4", "--epochs", "1", "--estimator-epochs", "2", "--universe", "10"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_movielens(folder, users=40, movies=30, ratings=500)
    write_criteo(folder, rows=1500)
    return folder


def run(folder: Path, output: Path, *more: str) -> dict:
    arguments = [*SMALL, "--work", str(output / "work"), "--criteo-work", str(output / "criteo")]
    assert variation.main([*arguments, "--output", str(output), *more]) == 0
    return json.loads((output / "variation-4.json").read_text())


def shows_the_saved(saved: dict, page: str) -> None:
    """Every part of the page with its numbers."""
    parts = dict(zip(variation.TITLES, page.split(" (Table 2)\n")[1:], strict=True))
    for name, part in parts.items():
        rows = [line.split(" | ") for line in part.splitlines()]
        for setting, entry in saved[f"{name} table 2"].items():
            (row,) = [row for row in rows if row[0] == f"| {setting}" and "<sub>" in row[1]]
            assert row[1].startswith(f"{entry['r_squared']:.4f} ")
        buckets, delta = saved[f"{name} buckets"]["R3"], saved[f"{name} delta"]["R3"]
        fresh = [f"{entry['r_squared']:.4f}" for entry in saved[f"{name} table 4"].values()]
        for text in (
            f"binary features alone {saved[f'{name} table 3']['binary']['r_squared']:.4f}",
            f"Table 4, 5 fresh target models: R² {', '.join(fresh)};",
            f"AUC {', '.join(f'{value:.3f}' for value in buckets['auc'])}.",
            f"({saved[f'{name} neurons']['silent']['units']} of the units never change)",
            "Does an estimator of one setting serve another?",
            "Target model or PV?",
            f"| 2 | {delta['mean'][0]:.2%} | {delta['std'][0]:.2%} |",
        ):
            assert text in part
    assert "![buckets](variation-4-buckets.png)" in page and "![curves](variation-4-curves.png)" in page


def shows_buckets(saved: dict, figure: Figure) -> None:
    bars, *tables = [ax for ax in figure.axes if ax.get_title()]
    heights = [[bar.get_height() for bar in group] for group in bars.containers]
    assert heights == [saved[f"{name} buckets"]["R3"]["auc"] for name in variation.TITLES]
    assert [group.get_label() for group in bars.containers] == list(variation.TITLES.values())
    for ax, name in zip(tables, variation.TITLES, strict=True):
        counts = torch.tensor(saved[f"{name} buckets"]["R3"]["confusion"])
        shares = (counts / counts.sum(1, keepdim=True)).double()
        shown = torch.from_numpy(ax.get_images()[0].get_array().filled(float("nan")))
        torch.testing.assert_close(shown, shares, equal_nan=True, rtol=0, atol=1e-6)


def shows_curves(saved: dict, figure: Figure) -> None:
    deltas, kept = figure.axes
    lines = iter(deltas.containers)
    for name in variation.TITLES:
        entry = saved[f"{name} delta"]["R3"]
        for suffix in ("", "_alive"):
            line, _, (bars,) = next(lines)
            assert line.get_xydata().tolist() == [
                [n, ratio] for n, ratio in zip(entry["sizes"], entry[f"mean{suffix}"], strict=True)
            ]
            spans = [high - low for (_, low), (_, high) in bars.get_segments()]
            assert spans == pytest.approx([2 * std for std in entry[f"std{suffix}"]])
    drawn = {line.get_label(): line.get_xydata().tolist() for line in kept.lines}
    for name, title in variation.TITLES.items():
        entries = saved[f"{name} neurons"]
        for order in ("important", "random"):
            found = [[e["units"], e["r_squared"]] for key, e in entries.items() if key.startswith(order)]
            assert drawn[f"{title}, {order}"] == sorted(found)


def test_all_parts_of_all_tasks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = saved_figures(monkeypatch)
    data = ["--data", str(folder), "--criteo", str(folder / "train.txt")]
    first = run(folder, tmp_path, *data)
    for name in variation.TITLES:
        assert set(first[f"{name} table 2"]) == {f"R{i}" for i in range(1, 8)}
        assert len(first[f"{name} table 4"]) == 5
        assert len(first[f"{name} buckets"]["R3"]["auc"]) == 5
        assert set(first[f"{name} transfer"]["R2"]["own"]) == {f"R{i}" for i in range(1, 8)}
        targets = first[f"{name} targets"]
        assert set(targets) == {f"R{i}" for i in range(8)}
        for setting, entry in targets.items():
            assert set(entry["r_squared"]) == {f"R{i}" for i in range(1, 8)}
            assert entry["epochs"] == 1 and 0 <= entry["silent"] < 80
            if setting == "R0":  # has no PV
                continue
            own = first[f"{name} table 2"][setting]["r_squared"]
            assert entry["r_squared"][setting] == own  # the estimator of Table 2
            assert len({own, *entry["r_squared"].values()}) > 1  # and others for other PVs
        delta = first[f"{name} delta"]["R3"]
        assert delta["sizes"] == [2, 5] and delta["mean"][0] > delta["mean"][1] > 0
        # The universe begins with the members of the ensemble.
        assert delta["pearson_of_the_ensemble"] > 0.9999
        kept = first[f"{name} neurons"]
        assert kept["important 1"]["units"] == 80 == sum(kept[f"layer {i}"]["units"] for i in (1, 2, 3))
    shows_the_saved(first, (tmp_path / "variation-4.md").read_text())
    shows_buckets(first, figures["variation-4-buckets.png"])
    shows_curves(first, figures["variation-4-curves.png"])

    # What is there is not made again, and comes out the same.
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.pt")}
    again = run(folder, tmp_path, *data, "--part", "tables,delta")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.pt")} == files
    for section, entries in first.items():
        for name, entry in entries.items():
            stays = {key: value for key, value in entry.items() if key != "made"}
            assert {k: v for k, v in again[section][name].items() if k != "made"} == stays, (section, name)


def test_one_setting_at_a_time_gives_the_same(folder: Path, tmp_path: Path) -> None:
    data = ["--data", str(folder), "--task", "R", "--part", "tables"]
    together = run(folder, tmp_path / "a", *data, "--settings", "R1,R2,R5")
    for setting in ("R2", "R5", "R1"):
        apart = run(folder, tmp_path / "b", *data, "--settings", setting)
    section = "movielens-r table 2"
    for setting in ("R1", "R2", "R5"):
        one, other = together[section][setting], apart[section][setting]
        assert {**one, "made": ""} == {**other, "made": ""}


def test_an_estimator_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    study = Study(load_movielens(folder), tmp_path, 3, 0)
    made = Estimation(study, movielens.TASKS["R"], {"max_epochs": 1})
    sources = made.sources(["R1", "R2"])
    models = made.models("both", {"R1": sources["R1"]})
    assert set(models) == {"R1"} and isinstance(models["R1"], VariationModel)
    with pytest.raises(ValueError, match="was made of another model"):
        made.models("both", {"R1": sources["R2"]})
    with pytest.raises(ValueError, match="or with other parameters"):
        made.models("both", {"R1": sources["R1"]}, features="value")


def test_halves_are_of_the_test_rows(folder: Path, tmp_path: Path) -> None:
    made = Estimation(Study(load_movielens(folder), tmp_path, 3, 0), movielens.TASKS["R"])
    first, second = made.halves
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(200)) and len(first) == 100


def test_which_units_are_kept() -> None:
    ranking = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.3, 0.0])
    masks = estimation.kept_units(ranking, [3, 2, 1], [1 / 3, 1])
    assert masks["important 0.333333"].tolist() == [False, True, False, True, False, False]
    assert masks["random 0.333333"].sum() == 2 and masks["random 1"].all()
    assert masks["layer 2"].tolist() == [False, False, False, True, True, False]


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "expected --data or --criteo"),
        (["--data", str(tmp_path)], "found no ratings.dat"),
        (["--data", str(tmp_path), "--part", "tables,figures"], "expected some of tables, neurons"),
        (["--data", str(tmp_path), "--settings", "R0"], "expected some of R1"),
    ):
        with pytest.raises(SystemExit):
            variation.main(arguments)
        assert message in capsys.readouterr().err


def test_the_page_of_nothing(tmp_path: Path) -> None:
    text = variation.page(Results(tmp_path / "none.json"), {}, 100)
    assert text.startswith("# Variation estimation") and "| " not in text and "![" not in text
    assert [line for line in text.splitlines() if line.startswith("##")] == ["## Pictures", "## Where it ran"]


@pytest.mark.parametrize("classes", [None, 3])
def test_a_dead_member_is_told_and_left_out(classes: int | None) -> None:
    shape = (30, 40) if classes is None else (30, 40, classes)
    universe = torch.rand(shape) / 10 + 1
    universe[7] = universe[7, 0]
    if classes:
        universe = universe / universe.sum(-1, keepdim=True)
    found = estimation.delta(universe, [2, 10], distribution=classes is not None, seed=0)
    alive = torch.cat([universe[:7], universe[8:]])
    without = estimation.delta(alive, [2, 10], distribution=classes is not None, seed=0)
    assert (found["dead"], without["dead"]) == (1, 0)
    assert found["mean_alive"] == without["mean"] == without["mean_alive"] != found["mean"]
    assert estimation.delta(universe[6:9], [2, 3], distribution=classes is not None, seed=0)["sizes"] == [2]
