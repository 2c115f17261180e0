"""The experiments of anti-distillation, small and on made-up data."""

import json
import shutil
import struct

import pytest
import torch

from benchmarks.papers import antidistillation as anti
from tests.pictures import saved_figures


@pytest.fixture
def folder(tmp_path):
    drawn = torch.Generator().manual_seed(0)
    (tmp_path / "mnist").mkdir()
    for file in ("train", "t10k"):
        labels = torch.arange(60) % 10
        noise = torch.randint(50, (60, 6, 6), generator=drawn)
        images = (labels.view(-1, 1, 1) * 20 + noise).to(torch.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels.to(torch.uint8))):
            header = struct.pack(f">BBBB{array.dim()}I", 0, 0, 8, array.dim(), *array.shape)
            (tmp_path / "mnist" / f"{file}-{kind}-ubyte").write_bytes(header + array.numpy().tobytes())
    return tmp_path


def command(folder, *more):
    output, work = folder / "results", folder / "work"
    return ["--data", str(folder), "--output", str(output), "--work", str(work), "--quick", *more]


def saved_results(folder):
    saved = json.loads((folder / "results" / "antidistillation-quick.json").read_text())
    return {s: {row: {**v, "made": 0} for row, v in rows.items()} for s, rows in saved.items()}


def test_quick_run(folder, monkeypatch, capsys):
    figures = saved_figures(monkeypatch)
    assert anti.main(command(folder)) == 0
    names = {"antidistillation-strength-quick.png", "antidistillation-tradeoff-quick.png"}
    assert {path.name for path in (folder / "results").iterdir()} == {
        "antidistillation-quick.md",
        "antidistillation-quick.json",
        *names,
    }
    saved = saved_results(folder)
    sections = {"made with", "strength0", "strength1", "components", "baselines0", "baselines1", "setting"}
    assert saved.keys() == sections
    others = [kind.entries() for kind in anti.OTHERS]
    rows = [anti.CORRELATION.entries("independent"), anti.CORRELATION.entries("same"), *others]
    for section in ("strength0", "strength1"):
        assert saved[section].keys() == {name for part in rows for name in part}
    assert len(saved["components"]) == 4 * 3 and len(saved["baselines0"]) == 4
    for section in sections - {"made with", "setting"}:
        for row in saved[section].values():
            check(row)
    # The loss weighs nothing: the models of both losses are the same.
    plain = saved["strength0"][anti.NONE]
    assert saved["components"]["J 2, λ 0"] == plain
    assert saved["setting"]["epochs 1, λ 0"]["delta 1"] == plain["delta 1"]
    assert plain["train"] > 0 and plain != saved["strength1"][anti.NONE]
    page = (folder / "results" / "antidistillation-quick.md").read_text()
    titles = [line for line in page.split("\n") if line.startswith("## ")]
    assert titles == [
        "## Table 1: the strength λ",
        "## Why not twenty times",
        "## Table 2: J components",
        "## Against one network",
        "## What the numbers depend on",
        "## What to choose",
    ]
    assert "Made by" in page and "nan" not in page and "None" not in page
    assert all(f"]({name})" in page for name in names)
    assert page.count("<sub>0.0777</sub>") == 3 and page.count("\n| 0.0005 | ") == 2
    for axes in figures["antidistillation-strength-quick.png"].axes:
        assert axes.get_legend_handles_labels()[1][-2:] == ["weights of each model's own", "same weights"]
        assert len(axes.lines[0].get_xdata()) in (len(anti.PAPER), len(anti.STRENGTHS))
    # Again: nothing is trained anew, and nothing changes, where there is an entry, a checkpoint, or both.
    monkeypatch.setattr(anti.ComponentModels, "loss", None)
    assert anti.main(command(folder)) == 0
    assert saved_results(folder) == saved
    path = folder / "results" / "antidistillation-quick.json"
    content = json.loads(path.read_text())
    del content["strength1"], content["setting"], content["components"]["J 4, λ 0"], content["baselines0"]
    path.write_text(json.dumps(content))
    assert anti.main(command(folder)) == 0
    assert saved_results(folder) == saved
    shutil.rmtree(folder / "work")
    capsys.readouterr()
    assert anti.main(command(folder)) == 0
    assert saved_results(folder) == saved


def check(row):
    assert 0 <= row["accuracy"] <= 1 and row["nll"] > 0 and row["scale"] > 0
    assert 0 < row["delta 2"] <= row["delta 1"] <= 2 and row["delta L"] > 0 and 0 <= row["delta H"] <= 1
    assert 1 / 16 <= row["temperature"] <= 16 and row["theirs temperature"] >= 1
    assert abs(row.get("cosine", 0)) <= 1 and abs(row.get("cosine centred", 0)) <= 1


def test_a_part_alone(folder, capsys):
    assert anti.main(command(folder, "--part", "setting")) == 0
    assert saved_results(folder).keys() == {"made with", "setting"}
    page = (folder / "results" / "antidistillation-quick.md").read_text()
    assert "## What the numbers depend on" in page and "## Table" not in page
    # Results of one setting are not mixed with those of another.
    results = folder / "results" / "antidistillation-quick.json"
    content = json.loads(results.read_text())
    content["made with"]["flags"]["epochs"] = 7
    results.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        anti.main(command(folder, "--part", "setting"))
    assert "move it away" in capsys.readouterr().err


def study(folder, name):
    data = anti.Data.load(folder, 300)
    return anti.Study(data, anti.Setting(2, 2, 8, 16, 0.1), 0, folder / name, torch.device("cpu"), False)


@pytest.mark.parametrize("same", [False, True])
def test_a_strength_alone(folder, same, capsys):
    """Its models are those that train beside others, to the bit."""
    together = study(folder, "together").judged("all", anti.CORRELATION, (0.0, 0.02, 0.5), same=same)
    for i, value in enumerate((0.0, 0.02, 0.5)):
        (alone,) = study(folder, f"alone{i}").judged("one", anti.CORRELATION, (value,), same=same)
        assert alone == together[i]
    assert together[0] != together[1] != together[2]


def test_curve_goes_on(folder, capsys):
    """A run that was ended is taken up again, with what was measured before."""

    def measure(model):
        return [{"sum": model.components[0].stacked()[0][0].sum().item()}]

    whole = anti.Curve((1, 2, 3), measure)
    study(folder, "whole").train("curve", anti.CORRELATION, (0.1,), epochs=3, callbacks=[whole])
    first, then = (anti.Curve((1, 2, 3), measure) for _ in range(2))
    study(folder, "parts").train("curve", anti.CORRELATION, (0.1,), epochs=2, callbacks=[first])
    assert first.found.keys() == {"1", "2"}
    study(folder, "parts").train("curve", anti.CORRELATION, (0.1,), epochs=3, callbacks=[then])
    assert then.found == whole.found


def test_losses():
    z = torch.randn(3, 2, 7, 4, dtype=torch.float64)
    products = torch.einsum("mibk,mjbk->mkij", z, z) / 7
    own = products.diagonal(dim1=-2, dim2=-1).square().sum((1, 2)) / 2
    torch.testing.assert_close(anti.own_scale(z), own)
    shift = torch.randn(3, 2, 7, 1, dtype=torch.float64)
    torch.testing.assert_close(anti.unshifted(z + shift), anti.unshifted(z))
    apart = torch.stack([torch.eye(4), -torch.eye(4)]).double()[None]  # [1, 2, 4, 4]
    assert anti.cosine(apart) == pytest.approx(-1) and anti.cosine(apart.abs()) == pytest.approx(1)


def test_temperatures():
    labels = torch.arange(40) % 4
    sure = 9.0 * torch.nn.functional.one_hot(labels, 4).float()
    sure[::10] = sure[1::10]  # a tenth is wrong, and as sure
    logits = sure.expand(2, 2, 40, 4)
    found = anti.best_temperature(logits, labels)
    loss = anti.log_loss(anti.averaged(logits, found), labels)
    for near in (0.95 * found, 1.05 * found):
        assert anti.log_loss(anti.averaged(logits, near), labels) > loss
    there = anti.temperature_of(1.0, logits / found, labels)
    assert anti.log_loss(anti.averaged(logits, there * found), labels) == pytest.approx(1.0, abs=1e-4)


def test_no_data(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        anti.main(["--data", str(tmp_path)])
    assert end.value.code == 2 and "--data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        anti.main(["--data", str(tmp_path), "--models", "1"])
    assert "--models: expected 2 or more, got 1" in capsys.readouterr().err
