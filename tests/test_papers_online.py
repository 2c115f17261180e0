"""Clicks learned in one pass: what comes before what, what is equal, what a killed pass goes on to."""

import json
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from benchmarks.papers import online
from benchmarks.papers.online import NONE, Pass, Plan, Setting
from benchmarks.papers.pages import Results
from pyens.data import ClickStream
from tests.made_up_data import write_criteo
from tests.pictures import saved_figures

PLAN = Plan(models=3, hidden=(6, 3), embedding=2, batch=32, window=3)
STREAM = ClickStream(3, numeric_features=2, categories=(5, 40, 500, 7))
STRONG = Setting("correlation", 1.0)


def source(windows: float = 4) -> online.Source:
    return online.made_up(int(windows * PLAN.window_rows), 30, STREAM)


def after(settings: list[Setting], windows: int = 2, plan: Plan = PLAN) -> torch.Tensor:
    """Logits of the next window after so many: `[S, M, J, B]`."""
    passed = Pass(source(), plan, settings, 0)
    for _ in range(windows):
        passed.advance()
    clicks = passed.source.read(passed.starts[windows], passed.starts[windows] + plan.window_rows)
    return passed.predict(clicks).unflatten(0, (len(settings), -1))


def test_quick_run(tmp_path, monkeypatch, capsys):
    output, work = tmp_path / "results", tmp_path / "work"
    command = ["--data", str(write_criteo(tmp_path)), "--output", str(output), "--work", str(work), "--quick"]
    command += ["--long", "1400"]
    drawn = saved_figures(monkeypatch)
    assert online.main(command) == 0
    stem = "antidistillation-online"
    kinds = {"stream": online.SETTINGS, "long": online.LONG, "criteo": online.SETTINGS}
    pictures = {f"{stem}-{name}{which}-quick.png" for name in kinds for which in ("", "-rows")}
    assert {path.name for path in output.iterdir()} == {f"{stem}-quick.md", f"{stem}-quick.json", *pictures}
    saved = json.loads((output / f"{stem}-quick.json").read_text())
    for name, settings in kinds.items():
        assert set(saved[name]) == {setting.name for setting in settings}
        for entry in saved[name].values():
            figures = entry["figures"]
            assert ("excess" in figures) == (name != "criteo")
            (losses,), (ranks,), (differences,) = (
                figures[f] for f in ("log loss", "rank loss", "difference")
            )
            assert len(losses) == len(entry["rows"]) and all(0 < loss < 2 for loss in losses)
            assert all(0 <= rank <= 1 for rank in ranks) and all(0 <= d < 1 for d in differences)
            for excess in figures.get("excess", [[]])[0]:
                assert 0 < excess < 1
    assert sum(saved["stream"][NONE.name]["rows"]) == 1500 // 32 * 32
    page = (output / f"{stem}-quick.md").read_text()
    assert sum(saved["long"][NONE.name]["rows"]) == 1400 // 32 * 32
    assert page.count("\n| ") == sum(len(settings) + 2 for settings in kinds.values())
    assert "| correlation | 0.5 | 1 |" in page and "<sub>0.0473</sub>" in page
    assert all(f"({picture})" in page for picture in pictures)
    left, right = drawn[f"{stem}-stream-quick.png"].axes
    labels = [line.get_label() for line in left.lines]
    assert labels[:3] == [f"correlation, s {s}" for s in (1, 5, 10)] and "document, s 10" in labels
    assert len(right.lines) == len(left.lines) - 2
    # Again: nothing is learned anew, and nothing changes.
    monkeypatch.setattr(Pass, "learn", None)
    assert online.main(command) == 0
    again = json.loads((output / f"{stem}-quick.json").read_text())
    assert without_stamps(again) == without_stamps(saved)


def without_stamps(content: dict) -> dict:
    return {
        section: {name: {**entry, "made": 0} for name, entry in entries.items()}
        for section, entries in content.items()
    }


def test_models_are_asked_before_they_learn():
    passed = Pass(source(), PLAN, [NONE], 0)
    fresh = PLAN.model(source(), [NONE], 0)
    for window in range(2):
        clicks = passed.source.read(passed.starts[window], passed.starts[window] + PLAN.window_rows)
        before = passed.predict(clicks)
        if window == 0:
            assert torch.equal(before, fresh.outputs(clicks.categorical, clicks.numeric).squeeze(-1))
        asked: list[torch.Tensor] = []
        passed.predict = lambda given, asked=asked: asked.append(Pass.predict(passed, given)) or asked[0]
        passed.advance()
        del passed.predict
        assert torch.equal(asked[0], before) and not torch.equal(passed.predict(clicks), before)


def test_models_begin_alike_and_meet_the_same_clicks_in_other_orders():
    passed = Pass(source(), PLAN, [NONE, STRONG], 0)
    for parameter in passed.model.parameters():
        assert torch.equal(parameter, parameter[:1].expand_as(parameter))
    first, second, _ = passed.model.components
    assert not torch.equal(first.mlp.stacked()[0][0], second.mlp.stacked()[0][0])
    met: list[torch.Tensor] = []
    passed.trainer.step = lambda *batch, own_data: met.append(batch[1])
    clicks = source().read(0, PLAN.window_rows)
    passed.learn(clicks)
    assert [list(batch.shape) for batch in met] == [[6, 32, 2]] * 3
    numeric = torch.cat(met, 1)
    assert torch.equal(numeric[:3], numeric[3:])  # in all settings the same
    for one in numeric[:3]:
        assert torch.equal(one.sort(0).values, clicks.numeric.sort(0).values)
        assert not torch.equal(one, clicks.numeric)
    assert not torch.equal(numeric[0], numeric[1])
    more = replace(PLAN, models=5)
    assert torch.equal(more.orders(96, 2, 0)[:3], PLAN.orders(96, 2, 0))
    assert not torch.equal(PLAN.orders(96, 1, 0), PLAN.orders(96, 2, 0))


def test_without_strength_all_settings_are_one_and_no_model_depends_on_others():
    alone, beside = after([NONE])[0], after([NONE, STRONG])
    assert torch.equal(beside[0], alone) and not torch.equal(beside[1], alone)
    for other in (
        Setting("covariance", 0.0),
        Setting("difference", 0.0),
        Setting("inverse difference", 0.0),
        Setting("correlation", 0.0, on="probability"),
    ):
        assert torch.equal(after([other])[0], alone)
    assert torch.equal(after([NONE], plan=replace(PLAN, models=2))[0], alone[:2])
    assert not torch.equal(alone[0], alone[1])


def test_the_tables_vary_more_at_the_start_and_nothing_else():
    plain = PLAN.model(source(), [NONE], 0).state_dict()
    wide = PLAN.model(source(), [Setting("correlation", 0.0, 4.0)], 0).state_dict()
    for name, tensor in plain.items():
        assert torch.equal(wide[name], tensor * (2 if "embeddings" in name else 1))
        if "bias" in name:
            assert not tensor.any()
    big = Plan(models=1, embedding=4)
    weights = big.model(online.made_up(2 * big.window_rows), [NONE], 0).state_dict()
    width = 26 * 4 + 13
    for name in ("components.0.embeddings.0.weight", "components.1.mlp.weights.0"):
        scaled = weights[name] * width**0.5
        assert scaled.abs().max() <= 2 and scaled.std().item() == pytest.approx(0.88, abs=0.03)


def test_a_killed_pass_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    settings = [NONE, STRONG, Setting("covariance", 1.0)]

    def made(name: str) -> dict:
        results = Results(tmp_path / f"{name}.json")
        online.run(
            results,
            "stream",
            source(6.5),
            PLAN,
            work=tmp_path / name,
            settings=settings,
            every=0,
            seeds=[0, 1],
        )
        return without_stamps(json.loads((tmp_path / f"{name}.json").read_text()))

    whole = made("whole")
    assert whole["stream"][NONE.name]["rows"] == [96] * 6 + [32]
    assert len(whole["stream"][NONE.name]["figures"]["excess"]) == 2
    advance, count = Pass.advance, [0]

    def killed(passed):
        count[0] += 1
        if count[0] % 5 == 0:
            raise KeyboardInterrupt
        advance(passed)

    monkeypatch.setattr(Pass, "advance", killed)
    stops = 0
    while True:
        try:
            resumed = made("killed")
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == count[0] // 5 > 4 and count[0] == 4 * 7 + stops
    assert resumed == whole
    assert not list((tmp_path / "killed").glob("*.checkpoint"))


def test_files_and_results_of_another_plan(tmp_path):
    results, other = Results(tmp_path / "r.json"), replace(PLAN, learning_rate=0.1)
    online.run(results, "stream", source(2), PLAN, work=tmp_path, settings=[NONE, STRONG])
    with pytest.raises(ValueError, match="was made by"):
        online.run(results, "stream", source(2), other, work=tmp_path, settings=[NONE])
    online.run(results, "stream", source(2), other, work=tmp_path / "other", settings=[NONE])
    assert list(results.section("stream")) == [NONE.name]
    with pytest.raises(ValueError, match="source: expected 128 rows or more, got 127"):
        Pass(online.made_up(127, 30, STREAM), PLAN, [NONE], 0)
    with pytest.raises(ValueError, match="expected those of one group, got 2 groups"):
        Pass(source(), PLAN, [NONE, Setting("covariance", 1.0)], 0)


def test_figures():
    clicks = source(20).read(0, 900)
    truth = clicks.probability.logit()
    found = online.measures(truth.expand(2, 3, -1), clicks.label, clicks.probability)
    assert found["excess"] == pytest.approx(0, abs=1e-12) and found["difference"] == pytest.approx(
        0, abs=1e-12
    )
    assert found["log loss"] == pytest.approx(log_loss(clicks.label, clicks.probability))
    assert found["component log loss"] == pytest.approx(found["log loss"])
    assert found["rank loss"] == pytest.approx(1 - roc_auc_score(clicks.label, clicks.probability))
    assert found["correlation"] == pytest.approx(1)
    expected = clicks.probability * clicks.probability.log()
    expected += (1 - clicks.probability) * (1 - clicks.probability).log()
    assert found["least log loss"] == pytest.approx(-expected.mean().item())
    # Two models that say p (1 + d) and p (1 - d) differ by d from their mean.
    p = 0.4 * clicks.probability
    models = torch.stack([1.1 * p, 0.9 * p]).logit().unsqueeze(1)
    found = online.measures(models, clicks.label, None)
    assert found["difference"] == pytest.approx(0.1) and "excess" not in found
    assert found["correlation"] == 0  # of one tower
    assert online.measures(models.fill_(1e30), clicks.label, None)["log loss"] > 1e5


def test_logits_are_recalibrated_by_the_block_before():
    truth = torch.randn(50_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    distorted = (truth.expand(3, -1) + 1) / 5
    assert online.calibration(distorted, truth.sigmoid()) == pytest.approx((5, -1))
    found = online.measures(distorted.unsqueeze(1), truth.sigmoid() > 0.5, truth.sigmoid(), 5, -1)
    assert found["recalibrated log loss"] < found["log loss"]
    passed = Pass(source(), PLAN, [NONE], 0)
    while not passed.done:
        passed.advance()
    first, second, *_ = (block["settings"][0] for block in passed.figures)
    assert first["recalibrated log loss"] == first["log loss"]
    assert second["recalibrated log loss"] != second["log loss"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--models", "1"], "--models: expected 2 or more"),
        (["--rows", "8191"], "--rows: expected 0, or two windows of 4096 rows or more, got 8191"),
        (["--rows", "0"], "--rows: expected some without --data"),
        (["--data", "nowhere"], "--data: load_criteo: nowhere"),
    ],
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        online.main(flags)
    assert end.value.code == 2 and message in capsys.readouterr().err
