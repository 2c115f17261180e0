"""The main job: what does an ensemble know, and what does it know that it does not know?

    python -m pyens.demo

Trains an ensemble on the handwritten digits 0-7 in one batched run, holds 8 and 9 out as classes it never
meets, and compares the ensemble with its single members: a table on the terminal, a picture in the output
folder, and what the numbers say. The data comes with scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyens
import pyens.optim
from pyens import decisions, metrics, ops, plots
from pyens.data import Digits, Split, load_digits
from pyens.training import fit
from pyens.training.randomness import Order, member_seeds, split_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

UNKNOWN = (8, 9)
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
TRAINED_ALONE = 3  # members trained one after another as well, to measure what that costs
CONFIDENT = 0.9  # the confidence from which the summary counts a digit as answered
RISK = 0.01  # the error rate that the summary asks for on the validation digits
LOWER_IS_BETTER = ("NLL [nats]", "Brier score", "ECE", "AURC", "OOD FPR95, entropy")
PICTURE = "ensemble_digits.png"


@dataclass(frozen=True)
class Settings:
    """What the flags set."""

    members: int = 32
    hidden: tuple[int, ...] = (64, 64)
    epochs: int = 25
    seed: int = 0
    device: str = "cpu"
    output: Path = Path("demo_output")


@dataclass(frozen=True)
class Measure:
    """A row of the table. A measure that needs several members has no value for a single one."""

    name: str
    better: str  # "higher" or "lower"
    members: Tensor | None  # [E] float64
    ensemble: float

    @property
    def single(self) -> float:
        """The mean of the members, where they have a value each."""
        assert self.members is not None
        return self.members.mean().item()


@dataclass(frozen=True)
class Timing:
    """Seconds of training: all members together, and a few of the same members one after another."""

    together: float
    alone: float
    trained_alone: int
    members: int
    largest_difference: float  # of any test probability, of a member trained alone and in the batch

    @property
    def all_alone(self) -> float:
        return self.alone * self.members / self.trained_alone


@dataclass(frozen=True)
class Result:
    measures: tuple[Measure, ...]
    timing: Timing
    summary: tuple[str, ...]
    picture: Path | OSError  # why there is none


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of every member for the test and the validation digits, in float64."""

    known: Tensor  # [E, B, K]
    labels: Tensor  # [B]
    unknown: Tensor  # [E, B', K]
    validation: Tensor  # [E, B'', K]
    validation_labels: Tensor  # [B'']


# ------------------------------------------------------------------------------------------------------------
# Training


def train_together(model: pyens.EnsembleMLP, data: Split, seed: int, epochs: int) -> None:
    """All members in one batched run, each in its own order of the data."""
    fit(
        model,
        (data.images, data.labels),
        loss="cross_entropy",
        epochs=epochs,
        batch_size=BATCH_SIZE,
        optimizer=lambda parameters: pyens.optim.fused(torch.optim.Adam, parameters, lr=LEARNING_RATE),
        seed=seed,
        validation=0,
    )


def train_alone(module: nn.Module, data: Split, seed: int, member: int, epochs: int) -> None:
    """The same training for one member by itself, in plain PyTorch."""
    rows, _ = split_rows(len(data.labels), 0, seed)
    order = Order(rows, tuple(member_seeds(seed, member + 1)), shuffle=True, groups=None, left_out=())
    optimizer = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, fused=True)
    for epoch in range(epochs):
        for batch in order.epoch(epoch, [member])[0].to(data.labels.device).split(BATCH_SIZE):
            loss = F.cross_entropy(module(data.images[batch]), data.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def train(settings: Settings, digits: Digits) -> tuple[pyens.EnsembleMLP, Timing]:
    """The trained ensemble, and what it cost against training its members one after another."""
    data, test, seed = digits.train, digits.test, settings.seed
    model = pyens.EnsembleMLP(
        settings.members,
        in_features=data.images.shape[1],
        hidden_features=settings.hidden,
        out_features=len(digits.classes),
        seeds=member_seeds(seed, settings.members),
        device=settings.device,
    )
    # Copies, taken before training: the same initial weights.
    alone = [model.member(m) for m in range(min(TRAINED_ALONE, settings.members))]

    # The first step of a process imports parts of torch and starts its threads: not part of either time.
    warm_up = Split(data.images[:BATCH_SIZE], data.labels[:BATCH_SIZE])
    train_alone(model.member(0), warm_up, seed, 0, epochs=1)

    start = _now(settings.device)
    train_together(model, data, seed, settings.epochs)
    together = _now(settings.device) - start

    start = _now(settings.device)
    for m, module in enumerate(alone):
        train_alone(module, data, seed, m, settings.epochs)
    seconds_alone = _now(settings.device) - start

    batched = predict(model, test.images)[: len(alone)]
    one_by_one = torch.stack([predict(module, test.images) for module in alone])
    difference = (batched - one_by_one).abs().max().item()
    return model, Timing(together, seconds_alone, len(alone), settings.members, difference)


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Class probabilities in float64, so that confidences near 1 do not all round to 1."""
    logits: Tensor = model(images)
    return logits.double().softmax(-1)


def evaluate(predictions: Predictions) -> tuple[Measure, ...]:
    """Every measure for each member by itself and for the ensemble: the mean of the probabilities."""
    known, labels, unknown = predictions.known, predictions.labels, predictions.unknown
    of_members = [_measure(k, labels, u) for k, u in zip(known, unknown, strict=True)]
    # One pass over the members, on the CPU, where the operation is so far.
    together, elsewhere = (
        ops.predictive_uncertainty(p.cpu(), from_probabilities=True) for p in (known, unknown)
    )
    of_ensemble = _measure(together.mean_probability, labels.cpu(), elsewhere.mean_probability)
    disagreement = metrics.ood_auroc(together.mutual_information, elsewhere.mutual_information)
    return (
        *(
            Measure(
                name,
                "lower" if name in LOWER_IS_BETTER else "higher",
                torch.stack([measures[name] for measures in of_members]).cpu(),
                value.item(),
            )
            for name, value in of_ensemble.items()
        ),
        Measure("OOD AUROC, mutual information", "higher", None, disagreement.item()),
    )


def _measure(known: Tensor, labels: Tensor, unknown: Tensor) -> dict[str, Tensor]:
    """What can be said of one set of distributions: [B, K] for known digits, [B', K] for unknown ones."""
    entropies = metrics.predictive_entropy(known), metrics.predictive_entropy(unknown)
    return {
        "accuracy": metrics.accuracy(known, labels),
        "NLL [nats]": metrics.nll(known, labels),
        "Brier score": metrics.brier_score(known, labels),
        "ECE": metrics.expected_calibration_error(known, labels),
        "AURC": metrics.aurc(known.amax(-1), known.argmax(-1) != labels),
        "OOD AUROC, max probability": metrics.ood_auroc(-known.amax(-1), -unknown.amax(-1)),
        "OOD AUROC, entropy": metrics.ood_auroc(*entropies),
        "OOD AUPR, entropy": metrics.ood_aupr(*entropies),
        "OOD FPR95, entropy": metrics.ood_fpr95(*entropies),
    }


# ------------------------------------------------------------------------------------------------------------
# Report


def table(measures: Sequence[Measure], members: int) -> str:
    """The measures as aligned plain text."""
    header = ("", "mean single member", f"ensemble of {members}", "better")
    lines = [header]
    for m in measures:
        single = "n/a" if m.members is None else f"{m.members.mean():.4f} ± {m.members.std(correction=0):.4f}"
        lines.append((m.name, single, f"{m.ensemble:.4f}", m.better))
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rows = [
        f"{name:<{widths[0]}}   {single:>{widths[1]}}   {ensemble:>{widths[2]}}   {better}".rstrip()
        for name, single, ensemble, better in lines
    ]
    return "\n".join([rows[0], "-" * max(map(len, rows)), *rows[1:]])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def timing_report(timing: Timing, device: str) -> str:
    threads = torch.get_num_threads()
    where = device if device != "cpu" else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    few = timing.trained_alone
    return (
        f"Training time ({where})\n"
        f"  all {_count(timing.members, 'member')} in one batched run: {timing.together:.2f} s\n"
        f"  one after another as nn.Sequential: {timing.all_alone:.2f} s, measured on "
        f"{_count(few, 'member')} ({timing.alone:.2f} s) and scaled to {timing.members}\n"
        f"  so one after another takes {timing.all_alone / timing.together:.1f} times as long; the test "
        f"probabilities of those {few} differ by {timing.largest_difference:.0e} at most"
    )


def summarise(measures: Sequence[Measure], predictions: Predictions) -> tuple[str, ...]:
    """Plain sentences; every number and every comparison in them is computed."""
    named = {m.name: m for m in measures}
    examples = len(predictions.labels)
    accuracy, likelihood = named["accuracy"], named["NLL [nats]"]
    wrong = examples * (1 - accuracy.ensemble)
    wrong_single = examples * (1 - accuracy.single)
    likelihoods = _compare(likelihood.ensemble, likelihood.single)
    errors = (
        f"Of {examples} test digits it knows, the ensemble gets {wrong:.0f} wrong and a single member "
        f"{wrong_single:.1f} on average; its NLL is {likelihoods}."
    )

    known, unknown = predictions.known, predictions.unknown
    answered, answered_single = (
        [metrics.confidence_curve(p, thresholds=[CONFIDENT]).answered.item() for p in pair]
        for pair in ((known.mean(0), unknown.mean(0)), (known.flatten(0, 1), unknown.flatten(0, 1)))
    )
    names = " and ".join(map(str, UNKNOWN))
    confidence = (
        f"At a confidence of {CONFIDENT} or more it answers {answered[0]:.1%} of the known digits and "
        f"{answered[1]:.1%} of the {names} it never met; single members answer {answered_single[0]:.1%} "
        f"and {answered_single[1]:.1%}."
    )

    selective = _selective(predictions, names)

    ood = [m for m in measures if m.name.startswith("OOD AUROC")]
    best = max(ood, key=lambda m: m.ensemble)
    detection = f"Unknown digits stand out best by {_score(best)}, with an AUROC of {best.ensemble:.3f}"
    best_single = max((m for m in ood if m.members is not None), key=lambda m: m.single)
    detection += f"; a single member's best is {_score(best_single)}, {best_single.single:.3f} on average."
    return errors, confidence, selective, detection


def _selective(predictions: Predictions, names: str) -> str:
    """What answering only from some confidence on gives, where the validation digits decide from which."""
    validation, known, unknown = (
        p.mean(0) for p in (predictions.validation, predictions.known, predictions.unknown)
    )
    wrong = validation.argmax(-1) != predictions.validation_labels
    threshold = decisions.risk_threshold(validation.amax(-1), wrong, RISK)
    if threshold.isinf():
        return f"No confidence keeps its errors on the validation digits within {RISK:.0%}."
    answers = decisions.predict_or_abstain(known, threshold)
    answered = answers != decisions.ABSTAIN
    wrong = (answers != predictions.labels) & answered
    fooled = decisions.predict_or_abstain(unknown, threshold) != decisions.ABSTAIN
    return (
        f"From a confidence of {threshold:.3f} on, at most {RISK:.0%} of the answers on validation digits "
        f"are wrong; so it answers {answered.double().mean():.1%} of the test digits, {wrong.sum()} of them "
        f"wrong, and {fooled.double().mean():.1%} of the {names}."
    )


def _compare(value: float, reference: float) -> str:
    if value == reference or reference == 0 or not math.isfinite(value) or not math.isfinite(reference):
        return f"{value:.4f} against {reference:.4f}"
    change = abs(value / reference - 1)
    return f"{change:.0%} {'lower' if value < reference else 'higher'} than theirs on average"


def _score(measure: Measure) -> str:
    return measure.name.removeprefix("OOD AUROC, ")


# ------------------------------------------------------------------------------------------------------------
# Picture


def draw(predictions: Predictions, digits: Digits) -> Figure:
    """Calibration, confidence and uncertainty in four panels, below them the digits behind the extremes."""
    known, unknown = predictions.known, predictions.unknown
    members = len(known)
    figure = plots.new_figure(10, 10)
    parts: Any = figure.subfigures(2, 1, height_ratios=[3, 1])
    panels, strips = parts
    figure.suptitle(
        f"{_count(members, 'network')} trained on the digits {digits.classes[0]}-{digits.classes[-1]}; "
        f"{' and '.join(map(str, UNKNOWN))} are unknown to {'them' if members > 1 else 'it'}"
    )
    axes = panels.subplots(2, 2)

    single, of_every_member = known.flatten(0, 1), predictions.labels.repeat(members)
    plots.reliability_diagram(
        {
            "ensemble": metrics.reliability_curve(known.mean(0), predictions.labels),
            "single members, pooled": metrics.reliability_curve(single, of_every_member),
        },
        axes[0, 0],
        joined=10,
    )
    plots.confidence_curves(
        {
            "ensemble, known": metrics.confidence_curve(known.mean(0)),
            "single, known": metrics.confidence_curve(single),
            "ensemble, unknown": metrics.confidence_curve(unknown.mean(0)),
            "single, unknown": metrics.confidence_curve(unknown.flatten(0, 1)),
        },
        axes[0, 1],
    )
    for ax, measure in zip(axes[1], (metrics.predictive_entropy, metrics.mutual_information), strict=True):
        xlabel = f"{measure.__name__.replace('_', ' ')} of the ensemble [nats]"
        plots.uncertainty_histograms(
            {"known": measure(known), "unknown": measure(unknown)}, ax, xlabel=xlabel
        )
    for ax, title in zip(
        axes.flat, ("Reliability", "Confidence", "Total uncertainty", "Disagreement"), strict=True
    ):
        ax.set_title(title)

    rows = strips.subfigures(2, 1)
    truth = torch.tensor(digits.classes, device=digits.test.labels.device)[digits.test.labels]
    unsure = metrics.predictive_entropy(known).argsort(descending=True)
    fooled = unknown.mean(0).amax(-1).argsort(descending=True)
    _draw_digits(
        rows[0],
        "Known digits the ensemble is least sure of",
        digits,
        digits.test,
        truth,
        known.mean(0),
        unsure,
    )
    _draw_digits(
        rows[1],
        "Unknown digits it is most sure of",
        digits,
        digits.unknown,
        digits.unknown.labels,
        unknown.mean(0),
        fooled,
    )
    return figure


def _draw_digits(
    figure: SubFigure, title: str, digits: Digits, split: Split, truth: Tensor, mean: Tensor, order: Tensor
) -> None:
    """A strip of the first images in `order`, each with the true digit, the answer and its confidence."""
    figure.suptitle(title, fontsize="medium")
    for ax, row in zip(figure.subplots(1, 12), order.tolist(), strict=False):
        confidence, answer = mean[row].max(-1)
        ax.imshow(split.images[row].view(8, 8).cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)
        title = f"{truth[row]}: {digits.classes[answer]}? {confidence:.2f}"
        ax.set_title(title, fontsize="x-small", pad=2)
        ax.set(xticks=[], yticks=[])


# ------------------------------------------------------------------------------------------------------------
# The job


def run(settings: Settings) -> Result:
    """Trains, evaluates and draws; what `main` prints is in the result.

    Raises:
        OSError: a folder for the picture that cannot be written to, before anything is trained.
    """
    settings.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=settings.output):
        pass
    digits = _to_device(load_digits(unknown=UNKNOWN, seed=settings.seed), settings.device)
    model, timing = train(settings, digits)
    predictions = Predictions(
        known=predict(model, digits.test.images),
        labels=digits.test.labels,
        unknown=predict(model, digits.unknown.images),
        validation=predict(model, digits.validation.images),
        validation_labels=digits.validation.labels,
    )
    measures = evaluate(predictions)
    picture: Path | OSError
    try:
        picture = plots.save_figure(draw(predictions, digits), settings.output / PICTURE)
    except OSError as error:  # the numbers are there all the same
        picture = error
    return Result(measures, timing, summarise(measures, predictions), picture)


def _to_device(digits: Digits, device: str) -> Digits:
    parts = {
        name: Split(*(tensor.to(device) for tensor in getattr(digits, name)))
        for name in ("train", "validation", "test", "unknown")
    }
    return Digits(classes=digits.classes, **parts)


def parse(arguments: Sequence[str] | None = None) -> Settings:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m pyens.demo", description=__doc__.split("\n\n")[2])

    def flag(
        name: str,
        convert: Callable[[str], Any],
        fits: Callable[[Any], bool],
        expected: str,
        what: str,
        **options: Any,
    ) -> None:
        def checked(text: str) -> Any:
            try:
                if fits(value := convert(text)):
                    return value
            except ValueError:
                pass
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

        parser.add_argument(f"--{name}", type=checked, default=getattr(defaults, name), help=what, **options)

    positive = int, lambda n: n >= 1, "a whole number from 1"
    flag("members", *positive, "size of the ensemble")
    flag("hidden", *positive, "hidden layer sizes", nargs="+")
    flag("epochs", *positive, "passes over the data")
    seed = "a whole number from 0 to 2^63 - 1"
    flag("seed", int, lambda n: 0 <= n < 2**63, seed, "of split, weights and data orders")
    flag("device", str, _present, "cpu, or a cuda or cuda:N that torch sees", "cpu, cuda or cuda:N")
    flag("output", Path, lambda path: not path.is_file(), "a folder", "folder for the picture")
    flags = parser.parse_args(arguments)
    return Settings(**vars(flags) | {"hidden": tuple(flags.hidden)})


def _present(device: str) -> bool:
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    return found is not None and (device == "cpu" or int(found[1] or 0) < torch.cuda.device_count())


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parse(arguments)
    missing = [name for name in ("matplotlib", "sklearn", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"The demo needs {', '.join(missing)}: pip install pyens[demo]", file=sys.stderr)
        return 1
    try:
        result = run(settings)
    except OSError as error:
        print(f"The demo cannot write to {settings.output}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped: nothing is written.", file=sys.stderr)
        return 130
    print()
    print(table(result.measures, settings.members))
    print()
    print(timing_report(result.timing, settings.device))
    print()
    print("\n".join(result.summary))
    print()
    if isinstance(result.picture, OSError):
        print(f"No picture: {result.picture}", file=sys.stderr)
        return 1
    print(f"Picture: {result.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
