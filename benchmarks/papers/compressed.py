"""The results of "Sparsity" (compressed deep ensembles), made anew, and what the document leaves open.

    python -m benchmarks.papers.compressed --data DIR                # all parts and seeds
    python -m benchmarks.papers.compressed --data DIR --part tables  # Table 2, Figures 1 and 2
    python -m benchmarks.papers.compressed --data DIR --part open    # pruned at the start, or from one model
    python -m benchmarks.papers.compressed --data DIR --quick        # a smoke test, seconds

DIR holds the folders mnist and notmnist-small, with the idx files as they are downloaded. Every training run
has a checkpoint in the working folder: a run that was killed goes on where it was.

Model of Table 1: 3 x 3 x 28 convolution, maximum, 5 x 5 x 32 convolution, maximum, dense 10; five members,
Adam, 20 epochs, 5 of retraining after each step of pruning (25, 50, 75 and 95 % of the smallest weights of
each layer, biases left alone), validation split .1; then weights of 8 bits, calibrated on 1000 training
images. What the document leaves open, and what was chosen: batches of 128, a learning rate of 1e-3, the
weights of the last epoch, pixels from 0 to 1. Size: of the file that torch.save makes, deflated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

import pyens
from benchmarks import harness
from benchmarks.papers.pages import Results, markdown_table, provenance, publish
from pyens import compress, metrics, plots
from pyens.data import load_idx, load_mnist
from pyens.nn import EnsembleConv2d, EnsembleLinear, EnsembleMaxPool2d, EnsembleSequential, Flatten
from pyens.training import fit

MEMBERS = 5
SPARSITIES = (0.25, 0.5, 0.75, 0.95)
CALIBRATION = 1000
PARTS = ("tables", "open")
SCOPES = {"layer": "step by step, 95% of each layer", "global": "step by step, 95% of all weights"}
TAU = 0.9
# Of the document: change of accuracy in points, and how many times smaller the ensemble is.
PAPER = {0.25: (0.04, 4), 0.5: (-0.01, 5), 0.75: (-0.05, 8), 0.95: (-1.0, None)}


@dataclass(frozen=True)
class Data:
    """Images `[N, 1, H, W]` in [0, 1]."""

    images: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    other: Tensor  # out of distribution

    @classmethod
    def load(cls, folder: Path, quick: bool) -> Data:
        mnist, letters = load_mnist(folder / "mnist"), load_idx(folder / "notmnist-small", "notMNIST_small")

        def square(images: Tensor) -> Tensor:
            side = int(images.shape[1] ** 0.5)
            return images.view(-1, 1, side, side)

        shuffled = torch.randperm(len(letters.images), generator=torch.Generator().manual_seed(0))
        most = 300 if quick else None
        return cls(
            square(mnist.train.images)[:most],
            mnist.train.labels[:most],
            square(mnist.test.images)[:most],
            mnist.test.labels[:most],
            square(letters.images[shuffled])[:most],
        )


@dataclass(frozen=True)
class Study:
    """One seed of the experiment, and where its checkpoints lie."""

    data: Data
    seed: int
    folder: Path
    quick: bool
    progress: bool

    @property
    def epochs(self) -> int:
        return 1 if self.quick else 20

    @property
    def retraining(self) -> int:
        return 1 if self.quick else 5

    def seeds(self, members: int) -> list[int]:
        return [1000 * self.seed + m for m in range(members)]

    def new(self, members: int = MEMBERS) -> EnsembleSequential:
        size = self.data.images.shape[-1]
        channels, kernel = (3, 3) if self.quick else (28, 5)
        inner = (size - 2) // 2
        last = (inner - kernel + 1) // 2
        outputs = 4 if self.quick else 32
        model = EnsembleSequential(
            EnsembleConv2d(members, 1, channels, 3),
            nn.ReLU(),
            EnsembleMaxPool2d(2),
            EnsembleConv2d(members, channels, outputs, kernel),
            nn.ReLU(),
            EnsembleMaxPool2d(2),
            Flatten(),
            EnsembleLinear(members, outputs * last * last, 10),
        )
        model.reset_parameters(self.seeds(members))
        return model

    def arguments(self, members: int, epochs: int) -> dict[str, Any]:
        return {
            "loss": "cross_entropy",
            "epochs": epochs,
            "batch_size": 128,
            "optimizer": lambda p: pyens.optim.fused(torch.optim.Adam, p, lr=1e-3),
            "validation": 0.1,
            "seed": self.seed,
            "seeds": self.seeds(members),
            "progress": self.progress,
        }

    def rows(self) -> tuple[Tensor, Tensor]:
        return self.data.images, self.data.labels

    def file(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"seed{self.seed}-{name}"

    def dense(self) -> EnsembleSequential:
        model = self.new()
        checkpoint = self.file("dense.pt")
        fit(model, self.rows(), checkpoint=checkpoint, **self.arguments(MEMBERS, self.epochs))
        return model.eval()

    def quantized(self, model: EnsembleSequential, sparse: bool = False) -> EnsembleSequential:
        return model.quantize(self.data.images[:CALIBRATION], sparse=sparse)


@torch.inference_mode()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Probabilities `[E, B, K]` in float64."""
    return torch.cat([model(part).double().softmax(-1) for part in images.split(1024)], 1)


def quality(members: Tensor, other: Tensor, data: Data) -> dict[str, float]:
    """Of probabilities of the test images and of those out of distribution: what the document reports."""
    average, away = members.mean(0), other.mean(0)
    return {
        "accuracy": metrics.accuracy(average, data.test_labels).item(),
        "nll": metrics.nll(average, data.test_labels).item(),
        "brier": metrics.brier_score(average, data.test_labels).item(),
        "answered": (average.amax(-1) >= TAU).double().mean().item(),
        "answered other": (away.amax(-1) >= TAU).double().mean().item(),
        "entropy other": metrics.predictive_entropy(away).mean().item(),
        # sum_m KL(p_m || mean): members times the mutual information.
        "disagreement other": len(other) * metrics.mutual_information(other).mean().item(),
        "auroc": metrics.ood_auroc(
            metrics.predictive_entropy(average), metrics.predictive_entropy(away)
        ).item(),
    }


def tables(study: Study, results: Results, figures: dict[str, Any]) -> None:
    """Table 2 and Figures 1 and 2 of one seed."""
    data, dense = study.data, study.dense()
    section = f"tables{study.seed}"
    dense_size = compress.compressed_size(dense)

    def judge(name: str, model: nn.Module, size: int) -> None:
        inside, outside = outputs(model, data.test), outputs(model, data.other)
        entry = quality(inside, outside, data) | {"size": size, "ratio": dense_size / size}
        results.merge(section, {name: entry})
        single = quality(inside[:1], outside[:1], data)
        results.merge(section, {f"{name}, one": single})
        figures[name] = (inside, outside)

    judge("dense", dense, dense_size)
    one = dense.select([0])
    results.merge(section, {"sizes": {"one dense": compress.compressed_size(one)}})

    def after(sparsity: float, model: EnsembleSequential) -> None:
        model.eval()
        name = f"{sparsity:.0%}"
        small = study.quantized(model)
        judge(f"{name} + int8", small, compress.compressed_size(small))
        encoded = compress.compressed_size(study.quantized(model, sparse=True))
        alone = compress.compressed_size(small.select([0]))
        results.merge(section, {f"{name} sizes": {"encoded": encoded, "one": alone}})
        inside, outside = outputs(model, data.test), outputs(model, data.other)
        results.merge(section, {f"{name}, float32": quality(inside, outside, data)})

    small = study.quantized(dense)
    judge("0% + int8", small, compress.compressed_size(small))
    compress.iterative_pruning(
        dense.train(),
        study.rows(),
        sparsity=SPARSITIES,
        after_step=after,
        checkpoints=study.file("pruned"),
        **study.arguments(MEMBERS, study.retraining),
    )


def open_questions(study: Study, results: Results) -> None:
    """Pruning at initialisation, and a diverse ensemble out of one trained model."""
    data, section = study.data, f"open{study.seed}"

    def judge(name: str, model: EnsembleSequential, cost: float) -> None:
        model.eval()
        inside, outside = outputs(model, data.test), outputs(model, data.other)
        results.merge(section, {name: quality(inside, outside, data) | {"member epochs": cost}})

    dense = study.dense()
    judge("deep ensemble", dense, MEMBERS * study.epochs)
    for sparsity in (0.75, 0.95):
        for method in ("random", "magnitude", "snip"):
            model = study.new()
            scores = scores_at_start(method, model, study)
            train_masked(study, model, scores, sparsity, study.epochs, f"{method}-{sparsity}.pt")
            judge(f"{method} at initialisation, {sparsity:.0%}", model, MEMBERS * study.epochs)
    for name in ("random", "magnitude"):
        model = dense.select([0] * MEMBERS).train()
        own = compress.random_scores(model, study.seeds(MEMBERS))
        scores = own if name == "random" else compress.magnitude_scores(model)
        train_masked(study, model, scores, 0.75, study.retraining, f"from-one-{name}.pt")
        judge(f"one trained model, {name} masks, 75%", model, study.epochs + MEMBERS * study.retraining)
    # Where the zeros are: the first layer has 252 of 27,612 weights, of which a share of each leaves 13.
    for scope in ("layer", "global"):
        model = study.dense().train()
        compress.iterative_pruning(
            model,
            study.rows(),
            sparsity=SPARSITIES,
            scope=scope,
            checkpoints=study.file("pruned" if scope == "layer" else "pruned-global"),
            **study.arguments(MEMBERS, study.retraining),
        )
        cost = MEMBERS * (study.epochs + len(SPARSITIES) * study.retraining)
        judge(SCOPES[scope], model, cost)


def scores_at_start(method: str, model: EnsembleSequential, study: Study) -> dict[str, Tensor]:
    if method == "random":
        return compress.random_scores(model, study.seeds(MEMBERS))
    if method == "magnitude":
        return compress.magnitude_scores(model)
    images, labels = (t[:1024] for t in study.rows())
    return compress.snip_scores(model, images, labels, loss="cross_entropy")


def train_masked(
    study: Study, model: EnsembleSequential, scores: Any, sparsity: float, epochs: int, name: str
) -> None:
    masks = compress.make_masks(scores, sparsity)
    compress.apply_masks(model, masks)
    fit(
        model,
        study.rows(),
        checkpoint=study.file(name),
        callbacks=[compress.KeepMasks(masks)],
        **study.arguments(MEMBERS, epochs),
    )


# --- the page --------------------------------------------------------------------------------------------


def draw(figures: dict[str, tuple[Tensor, Tensor]], data: Data, folder: Path, suffix: str) -> None:
    """Figures 1 and 2 of the first seed."""
    for name, index in (("confidence", 0), ("confidence-other", 1)):
        figure = plots.new_figure()
        curves = {
            level: metrics.confidence_curve(both[index].mean(0), data.test_labels if index == 0 else None)
            for level, both in figures.items()
        }
        plots.confidence_curves(curves, figure.add_subplot())
        plots.save_figure(figure, folder / f"compressed-{name}{suffix}.png")
    figure = plots.new_figure(9.0, 4.0)
    measures: dict[str, Callable[[Tensor], Tensor]] = {
        "entropy": lambda p: metrics.predictive_entropy(p.mean(0)),
        "disagreement": lambda p: len(p) * metrics.mutual_information(p),
    }
    for place, (label, measure) in enumerate(measures.items()):
        axes = figure.add_subplot(1, 2, place + 1)
        plots.uncertainty_histograms({level: measure(both[1]) for level, both in figures.items()}, axes)
        axes.set_xlabel(f"{label} (notMNIST)")
    plots.save_figure(figure, folder / f"compressed-uncertainty{suffix}.png")


def spread(values: Sequence[float], form: str) -> str:
    text = format(mean(values), form)
    return text if len(values) == 1 else f"{text} ± {format(stdev(values), form)}"


def over_seeds(results: Results, part: str, entry: str, key: str) -> list[float]:
    sections = [content for name, content in results.content.items() if name.startswith(part)]
    return [section[entry][key] for section in sections if entry in section]


COLUMNS = {
    "accuracy": ("accuracy", ".4f"),
    "NLL": ("nll", ".4f"),
    "Brier": ("brier", ".4f"),
    "MNIST answered": ("answered", ".3f"),
    "notMNIST answered": ("answered other", ".3f"),
    "entropy": ("entropy other", ".3f"),
    "disagreement": ("disagreement other", ".3f"),
    "OOD AUROC": ("auroc", ".3f"),
}


def table(results: Results, part: str, names: Sequence[str], more: dict[str, tuple[str, str]]) -> list[str]:
    columns = COLUMNS | more
    rows = []
    for name in names:
        found = {
            title: over_seeds(results, part, name, key)
            for title, (key, _) in columns.items()
            if any(key in section.get(name, {}) for section in results.content.values())
        }
        if found:
            rows.append([name, *(spread(found[t], columns[t][1]) if t in found else "" for t in columns)])
    return markdown_table(["", *columns], rows)


def page(results: Results, suffix: str) -> str:
    levels = ["dense", "0% + int8", *(f"{s:.0%} + int8" for s in SPARSITIES)]
    floats = [f"{s:.0%}, float32" for s in SPARSITIES]
    size = {"bytes": ("size", ",.0f"), "times smaller": ("ratio", ".2f")}
    starts = [
        f"{method} at initialisation, {s}"
        for s in ("75%", "95%")
        for method in ("random", "magnitude", "snip")
    ]
    from_one = [f"one trained model, {masks} masks, 75%" for masks in ("random", "magnitude")]
    seeds = len([name for name in results.content if name.startswith("tables")])
    lines = [
        "# Compressed deep ensembles on MNIST",
        "",
        f"Made by `python -m benchmarks.papers.compressed`; {provenance()}. Means over {seeds} seeds, "
        f"± standard deviation. Answered: the share of images with a confidence of {TAU} or more; entropy "
        "and disagreement (the sum of the members' KL divergences to their mean), in nats, are of notMNIST.",
        "",
        "## Table 2: five members",
        "",
        *table(results, "tables", levels, size),
        "",
        "The document has, in points of accuracy and times smaller: "
        + "; ".join(
            f"{s:.0%}: {change:+.2f}" + (f", {ratio}×" if ratio else "")
            for s, (change, ratio) in PAPER.items()
        )
        + ".",
        "",
        "The same before their weights became bytes:",
        "",
        *table(results, "tables", floats, {}),
        "",
        "One member alone:",
        "",
        *table(results, "tables", [f"{level}, one" for level in levels], {}),
        "",
        *sizes(results),
        f"![confidence](compressed-confidence{suffix}.png) "
        f"![confidence](compressed-confidence-other{suffix}.png)",
        "",
        f"![uncertainty](compressed-uncertainty{suffix}.png)",
        "",
    ]
    if any(name.startswith("open") for name in results.content):
        lines += [
            "## What the document leaves open",
            "",
            "Members that are pruned before they are trained, and members out of one trained model: five "
            "copies, each with masks and an order of the data of its own, or all with the mask of the "
            "smallest weights, trained on for five epochs. Last, the pruning of the table above, and the "
            "same with the smallest weights of the whole network. Weights of float32; cost in epochs of one "
            "member.",
            "",
            *table(
                results,
                "open",
                ["deep ensemble", *starts, *from_one, *SCOPES.values()],
                {"member epochs": ("member epochs", ".0f")},
            ),
            "",
        ]
    return "\n".join(lines)


def sizes(results: Results) -> list[str]:
    dense = over_seeds(results, "tables", "sizes", "one dense")
    if not dense:
        return []
    rows = []
    for s in SPARSITIES:
        five = over_seeds(results, "tables", f"{s:.0%} + int8", "size")
        encoded = over_seeds(results, "tables", f"{s:.0%} sizes", "encoded")
        if five:
            rows.append(
                [
                    f"{s:.0%} + int8",
                    spread(five, ",.0f"),
                    spread(encoded, ",.0f"),
                    spread([a / b for a, b in zip(five, dense, strict=False)], ".2f"),
                ]
            )
    return [
        f"Five members against one dense member of float32, {spread(dense, ',.0f')} bytes deflated:",
        "",
        *markdown_table(["", "bytes", "bytes, zeros left out (`sparse=True`)", "of one dense member"], rows),
        "",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.compressed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--output", type=Path, default=harness.RESULTS, help="folder for page and pictures")
    parser.add_argument("--work", type=Path, default=Path("runs/compressed"), help="folder for checkpoints")
    parser.add_argument("--part", choices=PARTS, help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="smoke test: few images, small models")
    flags = parser.parse_args(argv)
    suffix = "-quick" if flags.quick else ""
    try:
        data = Data.load(flags.data, flags.quick)
    except FileNotFoundError as error:
        parser.error(f"--data: {error}")
    results = Results(flags.output / f"compressed{suffix}.json")
    for seed in flags.seeds[:1] if flags.quick else flags.seeds:
        study = Study(
            data, seed, flags.work / ("quick" if flags.quick else "full"), flags.quick, not flags.quick
        )
        figures: dict[str, tuple[Tensor, Tensor]] = {}
        if flags.part in (None, "tables"):
            tables(study, results, figures)
            if seed == flags.seeds[0]:
                draw(figures, data, flags.output, suffix)
        if flags.part in (None, "open") and seed == flags.seeds[0]:
            open_questions(study, results)
        publish(page(results, suffix), flags.output / f"compressed{suffix}.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
