"""Table 3 of "Anti-Distillation": clicks learned in one pass, and how much equal models come to differ.

    python -m benchmarks.papers.online                          # a million made-up clicks
    python -m benchmarks.papers.online --long 10000000          # and ten million of others, by few settings
    python -m benchmarks.papers.online --data DIR               # and a sample of Criteo
    python -m benchmarks.papers.online --data DIR --quick       # a smoke test, seconds

DIR holds train.txt or train.txt.gz of the Criteo Display Advertising data, or a part of it. A pass that was
killed goes on from its last checkpoint in the working folder, to the same bits.

All models begin with the same weights and learn from the same clicks: each shuffles within a window of the
stream, by a seed of its own, as examples come in other orders where training is asynchronous. Progressive
validation: before any model learns from a window, all predict its clicks. A model is three towers, whose
probabilities are averaged, and which may be pushed apart. Figures are of the second half of the pass: log
loss; excess, the expected log loss beyond that of the true probability, where that is known; rank loss, which
is 1 - AUC; and Δr1, the share of a predicted probability by which a model differs from the average of all.

The document trains on hundreds of billions of private examples. What it leaves open, and what was chosen: the
clicks (made up, with a drift; a sample of Criteo), embeddings of 8 numbers for each of 26 categorical
columns, of at most 1000 rows (category modulo size), for each tower its own; towers of 64, 32 and 16 units;
batches of 256 in windows of 16, of 64 in windows of 8 for Criteo; Adagrad, with the rate and the first sums
that a small trial without decorrelation liked best. Weights begin as truncated normal numbers (cut at two
standard deviations) of standard deviation 1/√(fan in), and tables as the weights of the first layer, whose
fan in is all that a tower reads; s multiplies the tables' variance.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate, combinations, cycle, groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.papers.ensembles import read
from benchmarks.papers.pages import Results, markdown_table, publish
from pyens import _files, metrics, plots
from pyens.data import ClickStream, load_criteo
from pyens.losses import combine, difference_loss
from pyens.nn import ComponentModels, TabularEnsemble, initialize_
from pyens.optim import fused
from pyens.training import Trainer
from pyens.training.checkpoint import describe_tensor
from pyens.training.randomness import generator

CHUNK = 256  # clicks that all models look at together
BLOCK_ROWS = 250_000  # at most, of the blocks by which figures are kept
REPETITIONS = 5  # of the pass over the sample, which is short

PUSHES: dict[str, Any] = {  # what ComponentModels takes
    "correlation": "correlation",
    "covariance": "covariance",
    "difference": difference_loss,
    "inverse difference": partial(difference_loss, inverse=True, eps=0.1),
}


@dataclass(frozen=True)
class Setting:
    """How components are pushed apart, and by how much their tables vary at the start."""

    kind: str  # one of PUSHES
    strength: float  # λ
    variance: float = 1.0  # s
    on: str = "logit"

    @property
    def name(self) -> str:
        pushed = f"{self.loss} {self.strength:g}" if self.strength else "none"
        return f"{pushed}, s {self.variance:g}"

    @property
    def loss(self) -> str:
        return self.kind if self.on == "logit" else f"{self.kind} of probabilities"

    @property
    def group(self) -> tuple[str, str, float]:
        """Settings that have this in common learn side by side, as models of one ensemble."""
        return self.kind, self.on, self.variance


STRENGTHS = (0.5, 1.0, 5.0)  # the document's
SMALL = (0.001, 0.002, 0.01)  # the same divided by 500: see `lines`
VARIANCES = (1.0, 5.0, 10.0)
SETTINGS = (
    *(
        Setting("correlation", strength, variance)
        for variance in VARIANCES
        for strength in (0.0, *SMALL, 0.1, *STRENGTHS)
    ),
    *(Setting("correlation", strength, on="probability") for strength in STRENGTHS),
    *(Setting("covariance", strength) for strength in (0.002, 0.01, 0.5, 1.0)),
    *(Setting("difference", strength) for strength in (0.005, 0.01)),
    *(Setting("inverse difference", strength) for strength in (0.01, 0.1)),
)
LONG = tuple(Setting("correlation", strength) for strength in (0.0, *SMALL, 0.1, 0.5))
NONE, SHOWN, DIFFERENCE = SETTINGS[0], Setting("correlation", 0.01), Setting("difference", 1.0)
# Of the document: change of log loss and of rank loss in per cent, and Δr1. The scan marks some of its first
# column with what may be a minus or nothing; the changes of .379 and .018 below carry the same mark.
PAPER = {
    NONE: (0.0, 0.0, 0.0650),
    Setting("correlation", 0.5): (0.379, 0.073, 0.0473),
    Setting("correlation", 1.0): (0.903, 0.126, 0.0422),
    Setting("correlation", 5.0): (4.660, 0.342, 0.0288),
    Setting("correlation", 0.5, 5.0): (0.379, 0.071, 0.0452),
    Setting("correlation", 1.0, 5.0): (0.903, 0.128, 0.0403),
    Setting("correlation", 5.0, 5.0): (4.656, 0.324, 0.0288),
    Setting("correlation", 0.5, 10.0): (0.381, 0.078, 0.0411),
    Setting("correlation", 1.0, 10.0): (0.907, 0.143, 0.0365),
    Setting("correlation", 5.0, 10.0): (4.660, 0.349, 0.0266),
    Setting("covariance", 1.0): (-0.018, 0.011, 0.0612),
    DIFFERENCE: (-0.069, 0.120, 0.0521),
}


class Clicks(NamedTuple):
    """Some rows of a source."""

    categorical: Tensor  # [B, C] int64, rows of the tables
    numeric: Tensor  # [B, F]
    label: Tensor  # [B], 0 or 1
    probability: Tensor | None  # [B] float64, the true one where it is known


@dataclass(frozen=True, eq=False)
class Source:
    """What is learned from, in one pass."""

    described: str
    rows: int
    sizes: tuple[int, ...]  # of the tables
    numeric: int  # columns
    read: Callable[[int, int], Clicks]  # rows from the first to before the last


def made_up(rows: int, table: int = 1000, stream: ClickStream | None = None) -> Source:
    """The first rows of a stream, whose categories share tables of at most so many rows."""
    clicks = ClickStream() if stream is None else stream
    sizes = tuple(min(size, table) for size in clicks.categories)
    modulus = torch.tensor(sizes)

    def rows_of(start: int, stop: int) -> Clicks:
        found = clicks.rows(range(start, stop))
        return Clicks(found.categorical % modulus, found.numeric, found.label, found.probability)

    described = f"{rows} rows of {clicks.fingerprint()}, tables of {table}"
    return Source(described, rows, sizes, clicks.numeric_features, rows_of)


def criteo(path: Path, table: int = 1000, most: int | None = None) -> Source:
    """The sample in the order of its file, or the first rows of it."""
    sample = load_criteo(path, buckets=table)
    rows = len(sample) if most is None else min(most, len(sample))
    described = f"{rows} rows of Criteo, {describe_tensor(sample.categorical)}"

    def rows_of(start: int, stop: int) -> Clicks:
        return Clicks(*sample.rows(slice(start, stop)), None)

    return Source(described, rows, sample.categories, sample.numeric.shape[1], rows_of)


@dataclass(frozen=True)
class Plan:
    """What the models are, and how they learn."""

    models: int = 4  # of each setting
    components: int = 3
    hidden: tuple[int, ...] = (64, 32, 16)
    embedding: int = 8  # numbers of a category
    batch: int = 256
    window: int = 16  # batches within which a model shuffles
    learning_rate: float = 0.05
    accumulator: float = 1e-6  # where Adagrad's sums begin
    blocks: int = 20  # or more, by which figures are kept

    @property
    def window_rows(self) -> int:
        return self.batch * self.window

    def model(self, source: Source, settings: Sequence[Setting], seed: int) -> ComponentModels:
        """So many models of each setting, one setting after the other; all begin as one."""
        (kind, on, variance), *others = {setting.group for setting in settings}
        if others:
            raise ValueError(f"model: settings: expected those of one group, got {len(others) + 1} groups")
        models = len(settings) * self.models
        tables = [(size, self.embedding) for size in source.sizes]
        model = ComponentModels(
            [TabularEnsemble(models, tables, source.numeric, self.hidden, 1) for _ in range(self.components)],
            strength=[setting.strength for setting in settings for _ in range(self.models)],
            decorrelation=PUSHES[kind],
            on=on,  # type: ignore[arg-type]
        )
        width = len(tables) * self.embedding + source.numeric  # of what the towers take
        return initialize_(
            model,
            truncated_normal_,
            table=partial(truncated_normal_, width=width),
            bias=nn.init.zeros_,
            input_variance=variance,
            seeds=[seed] * models,
        )

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return fused(
            torch.optim.Adagrad,
            parameters,
            lr=self.learning_rate,
            initial_accumulator_value=self.accumulator,
        )

    def orders(self, rows: int, window: int, seed: int) -> Tensor:
        """In which order each model meets the rows of a window, `[M, rows]`."""
        own = [generator(seed, "order", m, window) for m in range(self.models)]
        return torch.stack([torch.randperm(rows, generator=g) for g in own])


def truncated_normal_(
    weight: Tensor, generator: torch.Generator | None = None, width: int | None = None
) -> None:
    """Of variance 1 / width, cut at two standard deviations; by default the width is the fan in."""
    std = (width or weight.shape[-1]) ** -0.5
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


class Pass:
    """One pass of one group of settings over a source: models, figures so far, and where it stands."""

    def __init__(self, source: Source, plan: Plan, settings: Sequence[Setting], seed: int) -> None:
        self.source, self.plan, self.settings, self.seed = source, plan, settings, seed
        batches = source.rows // plan.batch
        self.starts = [i * plan.batch for i in range(0, batches, plan.window)]
        self.stop = batches * plan.batch
        if len(self.starts) < 2:  # of which the first is before all learning
            least = plan.window_rows + plan.batch
            raise ValueError(f"Pass: source: expected {least} rows or more, got {source.rows}")
        self.blocks = min(max(plan.blocks, math.ceil(self.stop / BLOCK_ROWS)), len(self.starts))
        self.model = plan.model(source, settings, seed)
        self.trainer = Trainer(self.model, loss="bce", optimizer=plan.optimizer)
        self.trainer.begin()
        self.window = 0  # the next one
        self.logits: list[Tensor] = []  # [S M, J, rows] of the block's windows so far
        self.clicks: list[tuple[Tensor, Tensor | None]] = []
        self.figures: list[dict[str, Any]] = []  # of each block: rows, and of each setting its figures

    @property
    def done(self) -> bool:
        return self.window == len(self.starts)

    def advance(self) -> None:
        """Predicts a window, learns from it, and adds up the block that it ends."""
        start = self.starts[self.window]
        clicks = self.source.read(start, min(start + self.plan.window_rows, self.stop))
        self.logits.append(self.predict(clicks))
        self.clicks.append((clicks.label, clicks.probability))
        self.learn(clicks)
        block, self.window = self.block_of(self.window), self.window + 1
        if self.done or self.block_of(self.window) > block:
            self.finish_block()

    def block_of(self, window: int) -> int:
        return window * self.blocks // len(self.starts)

    @torch.inference_mode()
    def predict(self, clicks: Clicks) -> Tensor:
        """Logits of the components, `[S M, J, B]`."""
        self.model.eval()
        parts = zip(clicks.categorical.split(CHUNK), clicks.numeric.split(CHUNK), strict=True)
        return torch.cat([self.model.outputs(*part).squeeze(-1) for part in parts], -1)

    def learn(self, clicks: Clicks) -> None:
        """Every model in its own order, which is the same in all settings."""
        plan, target = self.plan, clicks.label.unsqueeze(1)
        orders = plan.orders(len(target), self.window, self.seed).repeat(len(self.settings), 1)
        for chosen in orders.split(plan.batch, 1):
            flat = chosen.flatten()
            batch = [
                t.index_select(0, flat).view(*chosen.shape, -1)
                for t in (clicks.categorical, clicks.numeric, target)
            ]
            self.trainer.step(*batch, own_data=True)

    def finish_block(self) -> None:
        logits, labels = torch.cat(self.logits, -1), torch.cat([label for label, _ in self.clicks])
        known = [probability for _, probability in self.clicks if probability is not None]
        truth = torch.cat(known) if known else None
        figures = []
        for place, of_setting in enumerate(logits.split(self.plan.models)):
            before = self.figures[-1]["settings"][place] if self.figures else {"scale": 1.0, "shift": 0.0}
            figures.append(measures(of_setting, labels, truth, before["scale"], before["shift"]))
        self.figures.append({"rows": len(labels), "settings": figures})
        self.logits, self.clicks = [], []

    def state(self) -> dict[str, Any]:
        return {
            "window": self.window,
            "model": self.model.state_dict(),
            "trainer": self.trainer.state(),
            "logits": self.logits,
            "clicks": self.clicks,
            "figures": self.figures,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.trainer.load_state(state["trainer"])
        self.window, self.figures = state["window"], state["figures"]
        self.logits, self.clicks = state["logits"], state["clicks"]


def measures(
    logits: Tensor, labels: Tensor, probability: Tensor | None, scale: float = 1.0, shift: float = 0.0
) -> dict[str, float]:
    """Means over the models of one setting, from logits of their components `[M, J, B]`.

    Args:
        scale, shift: of the logits, by which they are recalibrated.
    """
    # What has diverged counts as certain of something.
    logits, labels = logits.double().nan_to_num().clamp(-1e6, 1e6), labels.double()
    together = combine(logits.unsqueeze(-1)).squeeze(-1)  # [M, B]
    recalibrated = scale * together + shift
    found = {
        "log loss": log_loss(together, labels).mean(),
        "rank loss": 1 - torch.stack([metrics.auroc(one, labels == 1) for one in together]).mean(),
        "difference": metrics.relative_prediction_difference(together.sigmoid()),
        "component log loss": log_loss(logits, labels).mean(),
        "recalibrated log loss": log_loss(recalibrated, labels).mean(),
        "recalibrated difference": metrics.relative_prediction_difference(recalibrated.sigmoid()),
    }
    pairs = list(combinations(range(logits.shape[1]), 2))
    between = [metrics.pearson(one[i], one[j]) for i, j in pairs for one in logits]
    # A tower may be dead, and constant.
    found["correlation"] = torch.stack(between).nan_to_num().mean() if between else logits.new_zeros(())
    if probability is not None:
        # Expected over the labels: what is lost beyond the true probability, without the labels' noise.
        least = torch.special.entr(probability) + torch.special.entr(1 - probability)
        found["excess"] = (log_loss(together, probability) - least).mean()
        found["least log loss"] = least.mean()
    values = {name: value.item() for name, value in found.items()}
    values["scale"], values["shift"] = calibration(together, labels)
    return values


def log_loss(logits: Tensor, probability: Tensor) -> Tensor:
    """Expected if a click has this probability, which may be 0 or 1."""
    return F.softplus(logits) - probability * logits


def calibration(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """The scale and the shift of logits `[M, B]` with the least log loss, by Newton's method."""
    fitted = torch.tensor([1.0, 0.0], dtype=torch.float64)
    columns = torch.stack([logits.flatten(), torch.ones_like(logits).flatten()], 1)
    targets = labels.expand_as(logits).flatten()
    for _ in range(20):
        p = (columns @ fitted).sigmoid()
        gradient = columns.T @ (p - targets)
        curvature = (columns * (p * (1 - p)).unsqueeze(1)).T @ columns
        change = torch.linalg.lstsq(curvature, gradient).solution
        fitted -= change
        if change.abs().max() < 1e-9:
            break
    scale, shift = fitted.tolist()
    return (scale, shift) if math.isfinite(scale) and math.isfinite(shift) else (1.0, 0.0)


def unit(
    source: Source, plan: Plan, settings: Sequence[Setting], seed: int, stem: Path, every: float
) -> list[dict[str, Any]]:
    """The figures of one pass by block: read if they are there, else made, from its checkpoint on.

    Args:
        stem: of the files in the working folder.
        every: seconds between checkpoints.
    """
    described = f"{source.described}, {plan}, {[setting.name for setting in settings]}, seed {seed}"
    path, checkpoint = stem.with_name(f"{stem.name}.pt"), stem.with_name(f"{stem.name}.checkpoint")
    if path.exists():
        return read(path, described)["figures"]
    stem.parent.mkdir(parents=True, exist_ok=True)
    with _files.only_writer(checkpoint, "online: checkpoint"):
        run = Pass(source, plan, settings, seed)
        if checkpoint.exists():
            run.load_state(read(checkpoint, described)["state"])
        saved = time.monotonic()
        while not run.done:
            run.advance()
            if time.monotonic() - saved >= every and not run.done:
                _files.save({"made by": described, "state": run.state()}, checkpoint)
                print(f"{run.window} of {len(run.starts)} windows", flush=True)
                saved = time.monotonic()
        _files.save({"made by": described, "figures": run.figures}, path)
        checkpoint.unlink(missing_ok=True)
    return run.figures


def run(
    results: Results,
    section: str,
    source: Source,
    plan: Plan,
    *,
    work: Path,
    seeds: Sequence[int] = (0,),
    settings: Sequence[Setting] = SETTINGS,
    every: float = 120.0,
) -> None:
    """Fills a section of the results: of each setting its figures, by seed and block.

    A section of another source or plan is dropped. Each group of settings is saved when it is done, and not
    made again.

    Args:
        work: folder of the passes that are done, and of checkpoints.
        seeds: of initialisations and orders, one pass for each.
        every: seconds between checkpoints.
    """
    of = {"source": source.described, "plan": str(plan), "seeds": list(seeds)}
    if any(entry.get("of") != of for entry in results.section(section).values()):
        del results.content[section]
    for group, members in groupby(settings, lambda setting: setting.group):
        together = list(members)
        if results.has(section, (setting.name for setting in together)):
            continue
        name = "-".join([section, *map(str, group)]).replace(" ", "-")
        print(f"{section}: {', '.join(setting.name for setting in together)}", flush=True)
        begun = time.perf_counter()
        passes = [unit(source, plan, together, seed, work / f"{name}-seed{seed}", every) for seed in seeds]
        seconds = time.perf_counter() - begun
        entries: dict[str, Any] = {}
        for place, setting in enumerate(together):
            figures = [[block["settings"][place] for block in blocks] for blocks in passes]
            entries[setting.name] = {
                "setting": asdict(setting),
                "of": of,
                "models": plan.models,
                "rows": [block["rows"] for block in passes[0]],
                "figures": {
                    key: [[float(f"{block[key]:.7g}") for block in blocks] for blocks in figures]
                    for key in figures[0][0]
                },
            }
        results.merge(section, entries)
        print(f"{seconds:.0f} s", flush=True)


# --- the page --------------------------------------------------------------------------------------------


def units(entry: dict[str, Any], figure: str) -> list[float]:
    """Of the second half: by block of the one pass, or by pass if there are several."""
    passes = [blocks[len(blocks) // 2 :] for blocks in entry["figures"][figure]]
    return passes[0] if len(passes) == 1 else [mean(blocks) for blocks in passes]


def changes(entry: dict[str, Any], none: dict[str, Any], figure: str) -> list[float]:
    """In per cent of what it is without decorrelation at s 1, unit by unit."""
    pairs = zip(units(entry, figure), units(none, figure), strict=True)
    return [100 * (value / base - 1) for value, base in pairs]


def spread(values: Sequence[float], form: str) -> str:
    text = format(mean(values), form)
    return text if len(values) == 1 else f"{text} ± {format(stdev(values), form.removeprefix('+'))}"


def printed(value: float | None, form: str) -> str:
    """The document's, small."""
    return "" if value is None else f" <sub>{format(value, form)}</sub>"


def table(section: dict[str, Any]) -> list[str]:
    """Table 3 with the columns that it has beside ours."""
    none = section[NONE.name]
    known = "excess" in none["figures"]
    rows = []
    for setting in SETTINGS:
        if setting.name not in section:
            continue
        entry = section[setting.name]
        loss, rank, difference = PAPER.get(setting, (None, None, None))
        ratio = mean(units(entry, "difference")) / mean(units(none, "difference"))
        cells = [
            setting.loss if setting.strength else "none",
            f"{setting.strength:g}",
            f"{setting.variance:g}",
            f"{mean(units(entry, 'log loss')):.4f}",
            spread(changes(entry, none, "log loss"), "+.2f") + printed(loss, "+.2f"),
            *([f"{mean(units(entry, 'excess')):.4f}"] if known else []),
            spread(changes(entry, none, "rank loss"), "+.2f") + printed(rank, "+.2f"),
            spread(units(entry, "difference"), ".4f") + printed(difference, ".4f"),
            f"{ratio:.2f}" + printed(difference and difference / PAPER[NONE][2], ".2f"),
            f"{mean(units(entry, 'correlation')):.2f}",
            spread(changes(entry, none, "recalibrated log loss"), "+.2f"),
            f"{mean(units(entry, 'recalibrated difference')):.4f}",
        ]
        rows.append(cells)
    header = [
        *("loss", "λ", "s", "log loss", "change %"),
        *(["excess"] if known else []),
        *(
            "rank loss, change %",
            "Δr1",
            "of none's",
            "correlation",
            "recalibrated: log loss, change %",
            "Δr1",
        ),
    ]
    return markdown_table(header, rows)


STEM = "antidistillation-online"
TITLES = {
    "stream": "Made-up clicks",
    "long": "More made-up clicks, fewer settings",
    "criteo": "A sample of Criteo",
}


def about(section: dict[str, Any]) -> str:
    none = section[NONE.name]
    rows, passes = none["rows"], len(none["figures"]["log loss"])
    half = rows[len(rows) // 2 :]
    over = f"{len(half)} blocks" if passes == 1 else f"{passes} passes, each from another initialisation"
    text = (
        f"One pass over {sum(rows):,} rows, figures of the last {sum(half):,}. {none['models']} models of "
        f"each setting; ± is the standard deviation over {over}, where a change is taken in each by itself."
    )
    if "least log loss" in none["figures"]:
        text += f" The true probabilities have a log loss of {mean(units(none, 'least log loss')):.4f}."
    if SHOWN.name in section:
        shown, parts = section[SHOWN.name], []
        for which in ("", "recalibrated "):
            ratio = mean(units(shown, f"{which}difference")) / mean(units(none, f"{which}difference"))
            cost = mean(changes(shown, none, f"{which}log loss"))
            parts.append(f"{ratio:.0%} of Δr1 without it at {cost:+.2f} % log loss")
        text += f" {SHOWN.name.capitalize()}: {parts[0]}; recalibrated, {parts[1]}."
    return text


def lines(results: Results, suffix: str = "") -> list[str]:
    """The part of a page that shows these results, for the sections that there are; nothing without any."""
    if not any(NONE.name in results.section(name) for name in TITLES):
        return []
    loss, rank, difference = PAPER[DIFFERENCE]
    text = [
        "Models of three towers that begin alike, learn from the same clicks in one pass, each in an order "
        "of its own, and predict every click before they learn from it. Changes are against no "
        "decorrelation at s 1; small figures are the document's, of other data. Excess: expected log loss "
        "beyond the true probability's. Correlation: of the logits of two towers, on average. Recalibrated: "
        "logits times a scale plus a shift, the same for all models of a setting, fitted to the block "
        "before; what remains of a change then is not one of scale.",
        "",
        "λ multiplies a loss of the batch beside mean label losses. The document does not say how its label "
        "losses are reduced, and what it pays for a λ of .5, 1 and 5 is paid here for much smaller ones; so "
        "the table has these three and the same divided by 500. Nothing bounds the difference loss from "
        "below: of larger λ than here, logits grow without end; the document has, of λ 1, a log loss of "
        f"{loss:+.2f} %, a rank loss of {rank:+.2f} % and a Δr1 of {difference:.4f}. In the scan, the log "
        "losses of covariance and difference have what may be a sign.",
        "",
    ]
    for name, title in TITLES.items():
        section = results.section(name)
        if NONE.name not in section:
            continue
        text += [f"### {title}", "", about(section), "", *table(section), ""]
        if name == "criteo":
            text += [
                "So few clicks teach a model little, and small changes are noise; more passes over the same "
                "clicks would not be progressive validation.",
                "",
            ]
        text += [f"![Δr1 against log loss]({STEM}-{name}{suffix}.png)"]
        text += [f"![Δr1 over the pass]({STEM}-{name}-rows{suffix}.png)", ""]
    return text


def draw(results: Results, folder: Path, suffix: str = "") -> None:
    """The pictures that `lines` shows."""
    for name, title in TITLES.items():
        section = results.section(name)
        if NONE.name not in section:
            continue
        figure = plots.new_figure(11.0, 4.5)
        left, right = figure.subplots(1, 2, sharey=True)
        trade(section, left, "")
        trade(section, right, "recalibrated ")
        left.set(title=title, xlabel="log loss, change %", ylabel="Δr1, of that without decorrelation")
        right.set(title="recalibrated", xlabel="log loss, change %")
        left.set_ylim(bottom=0)
        left.legend(frameon=False, fontsize="small")
        plots.save_figure(figure, folder / f"{STEM}-{name}{suffix}.png")
        figure = plots.new_figure(6.0, 4.0)
        over_rows(section, figure.add_subplot())
        plots.save_figure(figure, folder / f"{STEM}-{name}-rows{suffix}.png")


def trade(section: dict[str, Any], ax: Axes, which: str) -> None:
    """Δr1 against what it costs in log loss, a line for each loss and s, from no decorrelation on."""
    none = section[NONE.name]
    base = mean(units(none, f"{which}difference"))
    drawn: dict[str, list[tuple[float, float]]] = {}
    for setting in SETTINGS:
        if setting.name in section:
            entry = section[setting.name]
            point = (
                mean(changes(entry, none, f"{which}log loss")),
                mean(units(entry, f"{which}difference")) / base,
            )
            first = [] if setting.kind == "correlation" and setting.on == "logit" else [(0.0, 1.0)]
            drawn.setdefault(f"{setting.loss}, s {setting.variance:g}", first).append(point)
    if not which:
        own = [s for s in PAPER if s.kind == "correlation"]
        for variance in VARIANCES[::2]:
            of = [PAPER[s] for s in own if s.variance == variance or not s.strength]
            drawn[f"document, s {variance:g}"] = [(loss, d / PAPER[NONE][2]) for loss, _, d in of]
    for (name, points), colour, marker in zip(
        drawn.items(), cycle(plots.COLOURS), cycle("os^Dv"), strict=False
    ):
        of_document = name.startswith("document")
        line = ":" if of_document else "-" if name.startswith("correlation, ") else "--"
        style = {"color": "black" if of_document else colour, "linestyle": line}
        ax.plot(*zip(*points, strict=True), marker=marker, label=name, linewidth=1.5, markersize=4, **style)
    ax.set_xscale("symlog", linthresh=1.0)
    ax.grid(alpha=0.3)


def over_rows(section: dict[str, Any], ax: Axes) -> None:
    """Δr1 over the rows seen, of the correlation loss at s 1."""
    for setting in SETTINGS:
        if (
            setting.group == NONE.group
            and setting.strength in (0, 0.002, *STRENGTHS)
            and setting.name in section
        ):
            entry = section[setting.name]
            values = [mean(of_block) for of_block in zip(*entry["figures"]["difference"], strict=True)]
            label = f"λ {setting.strength:g}" if setting.strength else "none"
            ax.plot(list(accumulate(entry["rows"])), values, marker=".", label=label)
    ax.set(xlabel="rows seen", ylabel="Δr1", yscale="log")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize="small")


def page(results: Results, suffix: str) -> str:
    stamps = {entry["made"] for name in TITLES for entry in results.section(name).values()}
    return "\n".join(
        [
            "# Anti-distillation in one pass over a stream",
            "",
            "Made by `python -m benchmarks.papers.online`, which says what was chosen: Table 3 of "
            '"Anti-Distillation".',
            "",
            *lines(results, suffix),
            "### Where it ran",
            "",
            *(f"- {stamp}" for stamp in sorted(stamps)),
            "",
        ]
    )


PLANS = {
    "stream": Plan(),
    "long": Plan(),
    "criteo": Plan(batch=64, window=8, blocks=6),
}
QUICK = Plan(models=2, hidden=(8, 4), embedding=2, batch=32, window=4, blocks=6)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.online",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, help="folder of the Criteo data, or the file; default: only made-up clicks"
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="made-up clicks; 0 for none")
    parser.add_argument("--long", type=int, default=0, help="made-up clicks of a second, longer stream")
    parser.add_argument(
        "--models", type=int, default=PLANS["stream"].models, help="of each setting, 2 or more"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/online"), help="folder for checkpoints")
    parser.add_argument("--output", type=Path, default=harness.RESULTS, help="folder for page and pictures")
    parser.add_argument("--quick", action="store_true", help="smoke test: few rows, small models")
    flags = parser.parse_args(argv)
    plans = {
        name: QUICK if flags.quick else replace(plan, models=flags.models) for name, plan in PLANS.items()
    }
    least = 2 * plans["stream"].window_rows
    if flags.models < 2:
        parser.error(f"--models: expected 2 or more, whose predictions can differ, got {flags.models}")
    if flags.rows and flags.rows < least:
        parser.error(f"--rows: expected 0, or two windows of {least // 2} rows or more, got {flags.rows}")
    if flags.long and flags.long < least:
        parser.error(f"--long: expected 0, or two windows of {least // 2} rows or more, got {flags.long}")
    if not flags.rows and not flags.long and flags.data is None:
        parser.error("--rows: expected some without --data, got 0")
    suffix, tables = ("-quick", 50) if flags.quick else ("", 1000)
    sources = {}
    if flags.rows:
        sources["stream"] = made_up(min(flags.rows, 1500) if flags.quick else flags.rows, tables)
    if flags.long:
        sources["long"] = made_up(
            min(flags.long, 1500) if flags.quick else flags.long, tables, ClickStream(seed=1)
        )
    if flags.data is not None:
        try:
            sources["criteo"] = criteo(flags.data, tables, 300 if flags.quick else None)
        except FileNotFoundError as error:
            parser.error(f"--data: {error}")
    results = Results(flags.output / f"{STEM}{suffix}.json")
    for name, source in sources.items():
        seeds = range(REPETITIONS if name == "criteo" and not flags.quick else 1)
        work = flags.work / f"{source.rows}-rows-{plans[name].models}-models{suffix}"
        settings = LONG if name == "long" else SETTINGS
        run(results, name, source, plans[name], work=work, seeds=seeds, settings=settings)
    draw(results, flags.output, suffix)
    publish(page(results, suffix), flags.output / f"{STEM}{suffix}.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
