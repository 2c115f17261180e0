"""The main job, run small: what it prints, the picture, that a seed decides everything, and refused flags."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from pictures import same_picture

import pyens
from pyens import demo, metrics
from pyens.data import load_digits
from pyens.training import member_seeds

SMALL = {"members": 4, "hidden": (16,), "epochs": 2}
KINDS = ("known", "unknown")
FLAGS = ["--members", "4", "--hidden", "16", "--epochs", "2"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return demo.run(demo.Settings(**SMALL, output=tmp_path_factory.mktemp("demo")))


def values(result):
    return [(m.name, None if m.members is None else m.members.tolist(), m.ensemble) for m in result.measures]


def test_the_measures(result):
    names = [m.name for m in result.measures]
    assert names == [
        "accuracy",
        "NLL [nats]",
        "Brier score",
        "ECE",
        "AURC",
        "OOD AUROC, max probability",
        "OOD AUROC, entropy",
        "OOD AUPR, entropy",
        "OOD FPR95, entropy",
        "OOD AUROC, mutual information",
    ]
    for measure in result.measures:
        assert 0 <= measure.ensemble <= (math.inf if measure.name == "NLL [nats]" else 2)
    *of_single, disagreement = result.measures
    assert all(m.members.shape == (4,) for m in of_single)
    assert disagreement.members is None
    # Averaging cannot lose on a convex score (Jensen), so this holds for any seed.
    for name in ("NLL [nats]", "Brier score"):
        measure = next(m for m in result.measures if m.name == name)
        assert measure.ensemble <= measure.members.mean() + 1e-12


def test_two_epochs_learn_something(result):
    accuracy = result.measures[0]
    assert accuracy.ensemble > 0.25  # an eighth is chance


def test_the_table_holds_the_measures(result):
    table = demo.table(result.measures, members=4)
    header, rule, *rows = table.splitlines()
    assert "mean single member" in header and "ensemble of 4" in header
    assert set(rule) == {"-"}
    assert len(rows) == len(result.measures)
    for row, measure in zip(rows, result.measures, strict=True):
        assert row.startswith(measure.name)
        assert f"{measure.ensemble:.4f}" in row and row.endswith(measure.better)
        single = "n/a" if measure.members is None else f"{measure.members.mean():.4f} ±"
        assert single in row


def test_the_picture_shows_the_predictions():
    digits = load_digits(unknown=demo.UNKNOWN)
    model = pyens.EnsembleMLP(3, 64, (16,), 8, seeds=[1, 2, 3])
    known, unknown, validation = (
        demo.predict(model, part.images) for part in (digits.test, digits.unknown, digits.validation)
    )
    labels = digits.test.labels
    figure = demo.draw(demo.Predictions(known, labels, unknown, validation, digits.validation.labels), digits)
    panels, strips = figure.subfigs
    assert "3 networks" in figure.get_suptitle() and "8 and 9 are unknown" in figure.get_suptitle()
    reliability, confidence, total, disagreement = panels.axes
    drawn = {
        ax.get_title(): {line.get_label(): line.get_xydata() for line in ax.lines}
        for ax in (reliability, confidence)
    }
    curve = metrics.reliability_curve(known.mean(0), labels)
    filled = curve.count >= 10  # the others are points alone
    expected = torch.stack([curve.confidence, curve.accuracy], 1)[filled].numpy()
    assert (drawn["Reliability"]["ensemble"] == expected).all()
    assert set(drawn["Confidence"]) == {f"{who}, {what}" for who in ("ensemble", "single") for what in KINDS}
    answered = metrics.confidence_curve(unknown.mean(0)).answered.numpy()
    assert (drawn["Confidence"]["ensemble, unknown"][:, 1] == answered).all()
    for ax, title, measure in (
        (total, "Total uncertainty", metrics.predictive_entropy),
        (disagreement, "Disagreement", metrics.mutual_information),
    ):
        assert ax.get_title() == title and "[nats]" in ax.get_xlabel()
        assert [text.get_text() for text in ax.get_legend().get_texts()] == list(KINDS)
        values = torch.cat([measure(known), measure(unknown)])
        assert ax.get_xlim() == (values.min(), values.max())
    least_sure, most_sure = (
        [(ax.images[0].get_array().data.flatten().tolist(), ax.get_title()) for ax in strip.axes]
        for strip in strips.subfigs
    )
    row = metrics.predictive_entropy(known).argmax()
    highest, answer = known.mean(0)[row].max(-1)
    assert len(least_sure) == 12
    title = f"{digits.classes[labels[row]]}: {digits.classes[answer]}? {highest:.2f}"
    assert least_sure[0] == (digits.test.images[row].tolist(), title)
    row = unknown.mean(0).amax(-1).argmax()
    assert len(most_sure) == 12 and most_sure[0][0] == digits.unknown.images[row].tolist()
    assert most_sure[0][1].startswith(f"{digits.unknown.labels[row]}: ")  # 8 or 9


def test_the_picture_is_the_only_file(result):
    assert result.picture.name == "ensemble_digits.png"
    assert list(result.picture.parent.iterdir()) == [result.picture]  # nothing half-written is left


def test_the_timing_is_scaled_as_it_says(result):
    timing = result.timing
    assert (timing.trained_alone, timing.members) == (3, 4)
    assert timing.all_alone == pytest.approx(timing.alone * 4 / 3)
    report = demo.timing_report(timing, "cpu")
    assert "measured on 3 members" in report and "scaled to 4" in report
    assert timing.largest_difference < 1e-3


def test_the_seed_decides_the_table_and_the_picture(result, tmp_path):
    again = demo.run(demo.Settings(**SMALL, output=tmp_path / "again"))
    other = demo.run(demo.Settings(**SMALL, output=tmp_path / "other", seed=1))
    assert same_picture(again.picture, result.picture)
    assert not same_picture(other.picture, result.picture)
    assert values(again) == values(result)
    assert again.summary == result.summary
    assert values(other) != values(result)


def test_members_train_in_the_batch_as_they_do_alone():
    data = load_digits().train
    model = pyens.EnsembleMLP(3, 64, (16,), 8, seeds=member_seeds(7, 3))
    modules = model.to_modules()
    untrained = demo.predict(model, data.images)
    demo.train_together(model, data, seed=7, epochs=3)
    together = demo.predict(model, data.images)
    for m, module in enumerate(modules):
        torch.testing.assert_close(demo.predict(module, data.images), untrained[m], rtol=0, atol=1e-6)
        demo.train_alone(module, data, seed=7, member=m, epochs=3)
        torch.testing.assert_close(demo.predict(module, data.images), together[m], rtol=0, atol=1e-3)
    assert (together - untrained).abs().max() > 0.1


def measures(ensemble, members):
    """Rows as `evaluate` gives them, with these values in turn."""
    names = ("accuracy", "NLL [nats]", "OOD AUROC, max probability", "OOD AUROC, entropy")
    rows = [
        demo.Measure(name, "higher", torch.tensor(v, dtype=torch.float64), e)
        for name, v, e in zip(names, members, ensemble, strict=False)
    ]
    return [*rows, demo.Measure("OOD AUROC, mutual information", "higher", None, ensemble[-1])]


def test_the_summary_follows_the_numbers():
    certain = torch.eye(2, dtype=torch.float64)
    unsure = torch.full((2, 2), 0.5, dtype=torch.float64)
    predictions = demo.Predictions(
        known=torch.stack([certain, unsure]),
        labels=torch.tensor([0, 1]),
        unknown=torch.stack([unsure, unsure]),
        validation=torch.stack([certain, unsure]),
        validation_labels=torch.tensor([0, 1]),
    )
    better = measures([1.0, 0.2, 0.7, 0.8, 0.9], [[0.5, 0.5], [0.3, 0.5], [0.6, 0.6], [0.5, 0.5]])
    errors, confidence, selective, detection = demo.summarise(better, predictions)
    assert "gets 0 wrong and a single member 1.0 on average" in errors
    assert "NLL is 50% lower than theirs" in errors
    assert "answers 0.0% of the known digits and 0.0% of the 8 and 9" in confidence  # means of 1 and 1/2
    assert "single members answer 50.0% and 0.0%" in confidence
    # All validation digits are right at a confidence of 3/4, and so are both test digits.
    assert "From a confidence of 0.750 on" in selective
    assert "answers 100.0% of the test digits, 0 of them wrong, and 0.0% of the 8 and 9" in selective
    assert "best by mutual information, with an AUROC of 0.900" in detection
    assert "a single member's best is max probability, 0.600" in detection

    worse = measures([0.5, 0.6, 0.7, 0.8, 0.1], [[1.0, 1.0], [0.3, 0.5], [0.6, 0.6], [0.9, 0.9]])
    errors, _, _, detection = demo.summarise(worse, predictions)
    assert "gets 1 wrong and a single member 0.0 on average" in errors
    assert "NLL is 50% higher than theirs" in errors
    assert "best by entropy, with an AUROC of 0.800" in detection
    assert "a single member's best is entropy, 0.900" in detection

    never_right = dataclasses.replace(predictions, validation_labels=torch.tensor([1, 0]))
    assert demo.summarise(worse, never_right)[2].startswith("No confidence keeps its errors")

    infinite = measures([0.5, 0.6, 0.7, 0.8, 0.1], [[1.0, 1.0], [0.3, math.inf], [0.6, 0.6], [0.9, 0.9]])
    assert "NLL is 0.6000 against inf" in demo.summarise(infinite, predictions)[0]


def test_main_prints_table_times_summary_and_picture(tmp_path, capsys):
    folder = tmp_path / "made" / "for it"
    assert demo.main([*FLAGS, "--seed", "7", "--output", str(folder)]) == 0
    out, err = capsys.readouterr()
    for text in ("ensemble of 4", "one after another as nn.Sequential", "test digits it knows", "Picture: "):
        assert text in out
    assert (folder / "ensemble_digits.png").is_file()
    assert "4 members" in err and "train " in err  # the progress bar


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "train", None)  # calling it would be a TypeError
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "below", Path("/proc/none")):
        assert demo.main([*FLAGS, "--output", str(folder)]) == 1
        assert f"The demo cannot write to {folder}: " in capsys.readouterr().err

    def full(**options):
        raise OSError("no space left")

    (tmp_path / "full").mkdir()
    monkeypatch.setattr(demo.tempfile, "TemporaryFile", full)
    assert demo.main([*FLAGS, "--output", str(tmp_path / "full")]) == 1
    assert "no space left" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_does_not_cost_the_table(tmp_path, monkeypatch, capsys):
    def fail(figure, path):
        raise OSError("no space left")

    monkeypatch.setattr(demo.plots, "save_figure", fail)
    assert demo.main([*FLAGS, "--output", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "accuracy" in out and "No picture: no space left" in err


def test_ctrl_c_ends_it_in_a_line(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupted)
    assert demo.main([*FLAGS, "--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nStopped: nothing is written.\n"


@pytest.mark.parametrize("members", [1, 2])
def test_the_smallest_ensembles_work(members, tmp_path):
    result = demo.run(demo.Settings(members=members, hidden=(8,), epochs=1, output=tmp_path))
    assert result.timing.trained_alone == members
    words = demo.timing_report(result.timing, "cpu")
    assert ("all 1 member in" if members == 1 else "all 2 members in") in words
    if members == 1:
        for measure in result.measures[:-1]:
            assert measure.ensemble == pytest.approx(measure.members.item())
        assert result.measures[-1].ensemble == 0.5  # one member cannot disagree


def test_flags_become_settings(tmp_path):
    assert demo.parse([]) == demo.Settings()
    settings = demo.parse(
        [*FLAGS, "--hidden", "32", "8", "--seed", "5", "--device", "cpu", "--output", str(tmp_path)]
    )
    assert settings == demo.Settings(4, (32, 8), 2, 5, "cpu", tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--members", "0"], "argument --members: expected a whole number from 1, got '0'"),
        (["--members", "many"], "argument --members: expected a whole number from 1, got 'many'"),
        (["--hidden", "64", "-3"], "--hidden"),
        (["--hidden"], "argument --hidden: expected at least one argument"),
        (["--epochs", "1.5"], "argument --epochs: expected a whole number from 1, got '1.5'"),
        (["--seed", "-1"], "argument --seed: expected a whole number from 0 to 2^63 - 1, got '-1'"),
        (
            ["--device", "toaster"],
            "argument --device: expected cpu, or a cuda or cuda:N that torch sees, got",
        ),
        (["--device", "cuda:99"], "that torch sees, got 'cuda:99'"),
        (["--output", __file__], "argument --output: expected a folder, got '"),
        (["--depth", "3"], "unrecognized arguments: --depth 3"),
    ],
)
def test_bad_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_packages_are_named_before_anything_runs(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tqdm" else find_spec(name))
    assert demo.main(FLAGS) == 1
    assert "needs tqdm: pip install pyens[demo]" in capsys.readouterr().err
