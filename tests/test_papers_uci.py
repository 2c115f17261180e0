"""The UCI regression table: scores against SciPy, a problem whose answer is known, small made-up folders."""

import csv
import math

import numpy as np
import pytest
import torch
from made_up_data import write_uci
from scipy import integrate, optimize, stats

from benchmarks.papers import uci
from pyens.data import load_uci
from tests.pictures import saved_figures


@pytest.fixture(autouse=True)
def _one_thread():
    """For models as small as these; the script sets torch's thread count for the whole process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(work, **changes) -> uci.Settings:
    return uci.Settings(**dict(work=work, members=5, epochs=2, splits=None, seed=0, quick=True) | changes)


def run(tmp_path, *more) -> int:
    folders = ["--data", str(tmp_path / "data"), "--work", str(tmp_path / "work"), "--threads", "1"]
    return uci.main([*folders, "--output", str(tmp_path / "output"), *more])


def scores_of(path) -> dict[tuple[str, int, int], dict[str, float]]:
    """By data set, split and M."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {
        (row["data set"], int(row["split"]), int(row["M"])): {name: float(row[name]) for name in uci.SCORES}
        for row in rows
    }


def drawn_members() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return 3 + draw(4, 6), (0.5 * draw(4, 6)).exp(), 3 + 2 * draw(6)


# --- scores


def by_scipy(means, variances, targets) -> dict[str, float]:
    """Of numpy arrays [M, B], one row at a time: moments, density, an integral and two roots."""
    squares, nll, crps, inside = [], [], [], []
    for mu, var, y in zip(means.T, variances.T, targets, strict=True):
        std = np.sqrt(var)

        def cdf(t, mu=mu, std=std):
            return stats.norm.cdf(t, mu, std).mean()

        mean, variance = mu.mean(), (var + mu**2).mean() - mu.mean() ** 2
        squares.append((y - mean) ** 2)
        nll.append(-stats.norm.logpdf(y, mean, math.sqrt(variance)))
        low, high = min(mu.min() - 40, y), max(mu.max() + 40, y)
        parts = [(low, y, lambda t, f=cdf: f(t) ** 2), (y, high, lambda t, f=cdf: (f(t) - 1) ** 2)]
        crps.append(sum(integrate.quad(f, a, b, limit=500, epsabs=1e-12)[0] for a, b, f in parts))
        ends = [optimize.brentq(lambda t, q=q, f=cdf: f(t) - q, low, high) for q in (0.025, 0.975)]
        inside.append(ends[0] <= y <= ends[1])
    return dict(
        zip(uci.SCORES, [math.sqrt(np.mean(squares)), *map(np.mean, (nll, crps, inside))], strict=True)
    )


def test_scores_of_several_members_are_those_of_scipy():
    means, variances, targets = drawn_members()
    expected = by_scipy(means.numpy(), variances.numpy(), targets.numpy())
    assert uci.score(means, variances, targets) == pytest.approx(expected, rel=1e-8)
    assert 0 < expected["coverage"] < 1


def test_scores_of_single_members_are_the_mean_of_their_own():
    means, variances, targets = drawn_members()
    own = [uci.score(means[[m]], variances[[m]], targets) for m in range(4)]
    expected = {name: np.mean([scores[name] for scores in own]) for name in uci.SCORES}
    assert uci.score_alone(means, variances, targets) == pytest.approx(expected, rel=1e-12)
    z = (targets - means) / variances.sqrt()
    assert (
        uci.score_alone(means, variances, targets)["coverage"]
        == (z.abs() < 1.959963984540054).double().mean()
    )


def test_the_moments_do_not_cancel():
    means, variances, _ = drawn_members()
    mean, variance = uci.moments(means + 1e8, variances)
    exact = variances.mean(0) + means.var(0, correction=0)
    torch.testing.assert_close(variance, exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean - 1e8, means.mean(0), rtol=1e-6, atol=1e-6)


def test_predictions_are_in_the_unit_of_the_target(tmp_path):
    data = load_uci(write_uci(tmp_path / "made-up"))
    model = uci.EnsembleMLP(3, 3, [50], 2, seeds=[0, 1, 2])
    means, variances, targets = uci.predict(model, data, 1)
    train, test = data.train[1], data.test[1]
    x, y = data.features, data.target
    standard = (x[test] - x[train].mean(0)) / x[train].std(0, correction=0)
    for m, member in enumerate(model.double().to_modules()):
        mean, raw = member(standard).unbind(-1)
        std = y[train].std(correction=0)
        torch.testing.assert_close(means[m], y[train].mean() + std * mean, rtol=1e-6, atol=1e-5)
        expected = std**2 * ((1 + raw.exp()).log() + 1e-6)
        torch.testing.assert_close(variances[m], expected, rtol=1e-5, atol=0)
    assert torch.equal(targets, y[test]) and means.dtype == torch.float64


def test_mean_and_standard_error_over_the_splits():
    found = [dict.fromkeys(uci.SCORES, value) for value in (1.0, 2.0, 6.0)]
    scored = uci.Scored(None, [], 0, {5: found, 1: found[:1]})
    assert scored.mean(5, "NLL") == pytest.approx((3.0, math.sqrt(7 / 3)))
    assert scored.mean(1, "NLL") == (1.0, pytest.approx(math.nan, nan_ok=True))


# --- training


def test_rows_are_standardised_by_the_training_rows_of_the_split(tmp_path):
    data = load_uci(write_uci(tmp_path / "made-up"))
    x, y, weight = uci.split_data(data, 2)
    assert x.shape == (2, 54, 3) and y.shape == (2, 54, 1) and weight is None
    for t in (x, y):
        torch.testing.assert_close(t.mean(1), torch.zeros_like(t[:, 0]), atol=1e-6, rtol=0)
        torch.testing.assert_close(t.std(1, correction=0), torch.ones_like(t[:, 0]), atol=1e-5, rtol=0)


def test_a_constant_column_stays_finite():
    scale = uci.Scale.of(torch.full((7, 1), 3.0, dtype=torch.float64))
    assert scale.standard(torch.tensor([[3.0], [4.0]], dtype=torch.float64)).tolist() == [[0.0], [1.0]]


def unequal(folder):
    """Split 1 with three training rows less."""
    path = write_uci(folder) / "data" / "index_train_1.txt"
    path.write_text("\n".join(path.read_text().splitlines()[3:]))
    return load_uci(folder)


def test_splits_of_unequal_sizes_are_filled_up_with_rows_of_no_weight(tmp_path):
    data = unequal(tmp_path / "made-up")
    x, _, weight = uci.split_data(data, 2)
    assert weight.sum(1).tolist() == [54, 51] and (x[1][weight[1] == 0] == 0).all()
    assert uci.split_data(data, 1)[2] is None
    scored = uci.run(data, settings(tmp_path))
    assert all(
        math.isfinite(value) for found in scored.scores.values() for s in found for value in s.values()
    )


def test_a_member_does_not_depend_on_the_splits_and_members_beside(tmp_path):
    data = load_uci(write_uci(tmp_path / "made-up"))

    def weights(name, rates):
        seeds = uci.seeds_of(0, "member", len(rates), len(rates[0]))
        made = settings(tmp_path, epochs=5)
        return uci.train(data, rates, seeds, made, validation=0.0, checkpoint=tmp_path / name)[0].weights

    both = weights("both", [[0.01, 0.02], [0.03, 0.03]])
    for own, of_both in zip(weights("one", [[0.01]]), both, strict=True):
        torch.testing.assert_close(own[0], of_both[0], rtol=1e-4, atol=1e-5)
    for own, of_both in zip(weights("two", [[0.01], [0.03]]), both, strict=True):
        assert torch.equal(own, of_both[[0, 2]])


def test_the_rate_is_that_of_the_lowest_loss_on_held_out_rows(tmp_path):
    data = load_uci(write_uci(tmp_path / "made-up"))
    made = settings(tmp_path, quick=False, epochs=3)
    chosen = uci.choose_rates(data, 2, made, tmp_path / "rates")
    for split, rate in enumerate(chosen):
        losses = {}
        for other in uci.RATES:  # each alone: split `split` of both
            own = uci.seeds_of(0, "rate", 2, uci.TRIALS)
            rates = [[other] * uci.TRIALS] * 2
            file = tmp_path / f"{split}-{other}"
            history = uci.train(data, rates, own, made, validation=uci.HELD_OUT, checkpoint=file)[1]
            losses[other] = history.validation_loss[-1].reshape(2, -1)[split].mean()
        assert rate == min(losses, key=losses.__getitem__)


def test_a_rate_under_which_members_diverge_is_not_chosen(tmp_path, monkeypatch):
    data = load_uci(write_uci(tmp_path / "made-up"))
    monkeypatch.setattr(uci, "RATES", (1e-3, 1e-3, 1e-2, 1e20))
    with pytest.warns(UserWarning, match="diverged"):
        assert uci.choose_rates(data, 2, settings(tmp_path), tmp_path / "rates") == [1e-2, 1e-2]


def test_linear_data_with_noise_of_a_known_size(tmp_path):
    """Nearly as good as the distribution that the targets are drawn from, on the same rows; not better."""
    data = load_uci(write_uci(tmp_path / "made-up", rows=3000, splits=2))
    scored = uci.run(data, settings(tmp_path, quick=False, epochs=30))
    truth = 20 + 5 * data.features.sum(1) / 3**0.5
    known = [
        uci.score(truth[None, rows], torch.full_like(truth[None, rows], 1.5**2), data.target[rows])
        for rows in data.test
    ]
    for split, expected in enumerate(known):
        ours = scored.scores[5][split]
        for name in ("RMSE", "NLL", "CRPS"):
            assert ours[name] == pytest.approx(expected[name], rel=0.05)
        assert ours["coverage"] == pytest.approx(expected["coverage"], abs=0.03)
        assert ours["NLL"] < scored.scores[1][split]["NLL"]
    # And that distribution is what the closed forms say, but for 300 draws.
    assert known[0]["RMSE"] == pytest.approx(1.5, rel=0.15)
    assert known[0]["CRPS"] == pytest.approx(1.5 / math.sqrt(math.pi), rel=0.15)
    assert known[0]["NLL"] == pytest.approx(math.log(1.5) + 0.5 * math.log(2 * math.pi * math.e), rel=0.15)
    assert scored.diverged == 0


# --- the command


def test_quick_run(tmp_path, capsys, monkeypatch):
    for name in ("yacht-made-up", "other"):
        write_uci(tmp_path / "data" / name, splits=3, nested=name == "other")
    (tmp_path / "data" / "no data set").mkdir()
    figures = saved_figures(monkeypatch)
    assert run(tmp_path, "--quick") == 0
    output = tmp_path / "output"
    assert {path.name for path in output.iterdir()} == {f"uci-quick.{end}" for end in ("md", "csv", "png")}
    text = (output / "uci-quick.md").read_text()
    assert text in capsys.readouterr().out and "commit" in text

    scores = scores_of(output / "uci-quick.csv")
    assert set(scores) == {
        (name, s, m) for name in ("yacht-made-up", "other") for s in (0, 1) for m in (1, 2, 5)
    }
    assert all(math.isfinite(value) for found in scores.values() for value in found.values())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    other_1, other_5, yacht_1, yacht_5 = rows[2:6]
    assert [row[:2] for row in rows[2:6]] == [["other", "1"], ["", "5"], ["yacht-made-up", "1"], ["", "5"]]
    assert yacht_5[-2:] == ["1.58", "1.18"] and all(
        row[-2:] == ["", ""] for row in (other_1, other_5, yacht_1)
    )
    for row, name, m in ((other_1, "other", 1), (yacht_5, "yacht-made-up", 5)):
        for cell, score in zip(row[2:6], uci.SCORES, strict=True):
            a, b = (scores[name, split, m][score] for split in (0, 1))
            mean, error = map(float, cell.split(" ± "))
            assert mean == pytest.approx((a + b) / 2, rel=1e-3) and error == pytest.approx(
                abs(a - b) / 2, rel=0.1
            )
    assert rows[8][:5] == ["other", "60", "3", "2", "54"] and rows[8][-1] == "0"

    figure = figures["uci-quick.png"]
    assert [ax.get_title() for ax in figure.axes] == ["other", "other", "yacht-made-up", "yacht-made-up"]
    for ax, score in zip(figure.axes, ("RMSE", "NLL") * 2, strict=True):
        curve = ax.lines[0].get_xydata()
        name = ax.get_title()
        expected = [sum(scores[name, split, m][score] for split in (0, 1)) / 2 for m in (1, 2, 5)]
        assert curve[:, 0].tolist() == [1, 2, 5] and curve[:, 1].tolist() == pytest.approx(expected)
        quoted = [line for line in ax.lines if line.get_label().startswith("paper")]
        assert [line.get_ydata()[0] for line in quoted] == [uci.PAPER["yacht"][score == "NLL"]] * (
            name != "other"
        )


def test_the_page_follows_from_the_seed_and_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    write_uci(tmp_path / "data" / "made-up")

    def made(*more):
        assert run(tmp_path, "--quick", *more) == 0
        text = (tmp_path / "output" / "uci-quick.md").read_text()
        table = (tmp_path / "output" / "uci-quick.csv").read_text()
        return [line for line in text.splitlines() if "commit" not in line], table

    first = made()
    assert made("--work", str(tmp_path / "another")) == first
    assert made("--seed", "1", "--work", str(tmp_path / "another")) != first
    monkeypatch.setattr("pyens.training._run.Run.train", None)
    assert made() == first


def test_a_run_that_was_killed_goes_on(tmp_path, monkeypatch):
    data = load_uci(write_uci(tmp_path / "made-up"))
    (tmp_path / "whole").mkdir()
    expected = uci.run(data, settings(tmp_path / "whole", epochs=14)).scores
    fit, finished = uci.fit, []

    def killed(*arguments, epochs, **options):
        fit(*arguments, epochs=epochs if options["validation"] else 10, **options)
        finished.append(epochs)
        if not options["validation"]:
            raise KeyboardInterrupt

    def history_of(*arguments, **options):
        killed(*arguments, **options)
        return fit(*arguments, **options)

    monkeypatch.setattr(uci, "fit", history_of)
    with pytest.raises(KeyboardInterrupt):
        uci.run(data, settings(tmp_path, epochs=14))
    assert finished == [14, 14]
    monkeypatch.setattr(uci, "fit", fit)
    assert uci.run(data, settings(tmp_path, epochs=14)).scores == expected


def test_chosen_sets_and_sizes(tmp_path):
    for name in ("one", "two"):
        write_uci(tmp_path / "data" / name)
    assert run(tmp_path, "--only", "TW,", "--members", "3", "--epochs", "1", "--splits", "1") == 0
    scores = scores_of(tmp_path / "output" / "uci-part.csv")
    assert set(scores) == {("two", 0, m) for m in (1, 2, 3)}
    assert " ± " not in (tmp_path / "output" / "uci-part.md").read_text().partition("| two |")[2]


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        uci.main([*map(str, arguments)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_it_says_what_it_needs(tmp_path, capsys):
    assert "--data: expected the folder of the UCI data sets, each in a folder of its own" in refused(capsys)
    assert f"--data: expected a folder, got {tmp_path / 'no'}" in refused(capsys, "--data", tmp_path / "no")
    assert "expected folders with data.txt" in refused(capsys, "--data", tmp_path)
    write_uci(tmp_path / "made-up")
    text = refused(capsys, "--data", tmp_path, "--only", "yacht,wine")
    assert "names that begin with yacht,wine, found made-up" in text
    path = tmp_path / "made-up" / "data" / "data.txt"
    path.write_text(path.read_text() + "1 2\n")
    assert f"--data: load_uci: {path}:61: expected 4 numbers, got 2" in refused(capsys, "--data", tmp_path)
    assert "expected at least 1, got 0" in refused(capsys, "--members", 0)
    assert [file for file in tmp_path.iterdir() if file.name != "made-up"] == []


def test_the_real_sets(data_dir, tmp_path):
    command = ["--data", str(data_dir("uci")), "--quick", "--work", str(tmp_path), "--threads", "1"]
    assert uci.main([*command, "--output", str(tmp_path)]) == 0
