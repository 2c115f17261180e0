"""Tables 1 and 2 of "Anti-Distillation" on MNIST, made anew and small, and what they leave open.

    python -m benchmarks.papers.antidistillation --data DIR                   # all parts
    python -m benchmarks.papers.antidistillation --data DIR --part strength   # Table 1: the strength λ
    python -m benchmarks.papers.antidistillation --data DIR --part components # Table 2: J components
    python -m benchmarks.papers.antidistillation --data DIR --part baselines  # one network, and a wide one
    python -m benchmarks.papers.antidistillation --data DIR --part setting    # epochs, models, widths, starts
    python -m benchmarks.papers.antidistillation --data DIR --quick           # a smoke test, seconds

DIR holds the folder mnist, with the idx files as they are downloaded. Every training run has a checkpoint in
the working folder: a run that was killed goes on where it was. What the results hold is not made again. For a
GPU, or a lot of time, the document's:

    --models 20 --epochs 150 --width 1200 --learning-rate .02 --output OTHER --device cuda

A model is J = 2 components 784-width-width-10 with ReLU, AdaGrad whose accumulators begin at .1, zero biases,
uniform weights, cross entropy of each component plus λ times the correlation loss of the logits, one for each
label, summed; the probabilities of the components are averaged. All models of all λ train as one ensemble,
and each λ has models of the same seeds.

What the document leaves open, and what was chosen: the bounds of the uniform weights (±√(6 / (in + out)), as
Keras draws them for such layers), batches of 64, pixels from 0 to 1, no validation rows, and whether models
begin with weights of their own ("independent") or with the same ones and only meet the images in other orders
("same"); both are here. Its 150 epochs of width 1200 became a few epochs of narrow layers, with five times
the learning rate: at .02 a network of width 64 is at 95 % after 8 epochs of batches of 256, at .1 and 64 at
98 %. λ below the document's were added, since its own turned out to be strong here.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.papers import online
from benchmarks.papers.compressed import over_seeds, spread
from benchmarks.papers.pages import Results, markdown_table, provenance, publish
from pyens import EnsembleMLP, metrics, plots
from pyens.data import load_mnist
from pyens.losses import decorrelation_loss, pearson_decorrelation_loss
from pyens.nn import ComponentModels, initialize_
from pyens.optim import fused
from pyens.training import Callback, History, fit
from pyens.training.callbacks import Progress

PARTS = ("strength", "components", "baselines", "setting")
READINGS = ("independent", "same")
CLASSES = 10
# Table 1: log loss, accuracy, Δ1, Δ2, Δ1^L, Δ^H by λ.
PAPER = {
    0.0: (0.615, 0.992, 0.0777, 0.0305, 0.0183, 0.0064),
    0.02: (0.615, 0.992, 0.0040, 0.0025, 0.0052, 0.0038),
    0.05: (0.615, 0.992, 0.0037, 0.0024, 0.0051, 0.0036),
    0.1: (0.616, 0.992, 0.0036, 0.0023, 0.0051, 0.0037),
    0.2: (0.615, 0.992, 0.0036, 0.0024, 0.0052, 0.0035),
    0.5: (0.615, 0.992, 0.0036, 0.0024, 0.0052, 0.0037),
    1.0: (0.619, 0.990, 0.0063, 0.0040, 0.0081, 0.0057),
}
PAPER_LOG_LOSS = PAPER[0.0][0]
# Table 2: accuracy, Δ1, Δ2, Δ1^L by λ and J.
PAPER_COMPONENTS = {
    0.0: {
        2: (0.992, 0.0777, 0.0305, 0.0183),
        4: (0.992, 0.0702, 0.0273, 0.0237),
        6: (0.992, 0.0612, 0.0236, 0.0265),
        8: (0.991, 0.0459, 0.0177, 0.0236),
    },
    0.5: {
        2: (0.992, 0.0036, 0.0024, 0.0052),
        4: (0.992, 0.0018, 0.0012, 0.0037),
        6: (0.992, 0.0012, 0.0008, 0.0029),
        8: (0.992, 0.0009, 0.0006, 0.0024),
    },
}
STRENGTHS = (0.0, 0.0005, 0.002, 0.005, *(s for s in PAPER if s > 0))
SMALL = 0.002  # a λ below the document's, where both are shown
OWN = 0.0005  # of the penalty on a component's own scale
CURVE = (0.0, SMALL, 0.1)
SHARES = (0.1, 0.2, 0.5, 1.0, 2.0)  # of the epochs, in the curve
SUBSETS = 30  # of each number of models, at most


# --- what is trained ------------------------------------------------------------------------------------


def own_scale(outputs: Tensor) -> Tensor:
    """½‖diag C‖² of outputs `[M, J, B, K]`: what the correlation loss leaves out. Nothing is pushed apart."""
    return outputs.square().mean(2).square().sum((1, 2)) / 2


def unshifted(outputs: Tensor) -> Tensor:
    """The correlation loss of logits less their mean over the labels, which softmax does not see."""
    return decorrelation_loss(outputs - outputs.mean(-1, keepdim=True))


@dataclass(frozen=True)
class Kind:
    """A loss that is added, and the strengths that it is tried with."""

    name: str
    decorrelation: Any
    strengths: tuple[float, ...]
    on: Any = "logit"

    def entries(self, reading: str = READINGS[0]) -> list[str]:
        return [entry(self.name, strength, reading) for strength in self.strengths]


CORRELATION = Kind("correlation", "correlation", STRENGTHS)
OTHERS = (
    Kind("covariance", "covariance", (SMALL, 0.02)),
    Kind("correlation of probabilities", "correlation", (1.0, 10.0), "probability"),
    Kind("Pearson correlation", pearson_decorrelation_loss, (0.5,)),
    Kind("correlation without the common shift", unshifted, (OWN, 0.005)),
    Kind("own scale, nothing pushed apart", own_scale, (OWN, 0.005)),
)
APART, OWN_SCALE = OTHERS[-2:]


def entry(name: str, strength: float, reading: str) -> str:
    return f"{name} {strength:g}, {reading}"


@dataclass(frozen=True)
class Data:
    """Images `[N, pixels]` in [0, 1]."""

    images: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, folder: Path, most: int | None) -> Data:
        mnist = load_mnist(folder / "mnist")
        return cls(*(t[:most] for t in (*mnist.train, *mnist.test)))


@dataclass(frozen=True)
class Setting:
    """What the flags set."""

    models: int
    epochs: int
    width: int
    batch_size: int
    learning_rate: float

    @property
    def folder(self) -> str:
        return "-".join(f"{name[:5]}{value:g}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Study:
    """One repetition, with seeds of its own, and where its checkpoints lie."""

    data: Data
    setting: Setting
    repetition: int
    folder: Path
    device: torch.device
    progress: bool

    @property
    def seeds(self) -> list[int]:
        """Of the models of each strength."""
        return [1000 * self.repetition + m for m in range(self.setting.models)]

    def new(
        self, kind: Kind, strengths: Sequence[float], components: int, width: int, same: bool, scale: float
    ) -> ComponentModels:
        """The models of the first strength, then those of the next, ..."""
        total = len(strengths) * self.setting.models
        shape = (self.data.images.shape[1], [width, width], CLASSES)
        model = ComponentModels(
            [EnsembleMLP(total, *shape, activation="relu") for _ in range(components)],
            strength=[strength for strength in strengths for _ in self.seeds],
            decorrelation=kind.decorrelation,
            on=kind.on,
        )
        seeds = [self.seeds[0]] * total if same else self.seeds * len(strengths)
        draw = partial(nn.init.xavier_uniform_, gain=scale)
        return initialize_(model, draw, bias=nn.init.zeros_, seeds=seeds).to(self.device)

    def train(
        self,
        name: str,
        kind: Kind,
        strengths: Sequence[float],
        *,
        components: int = 2,
        width: int | None = None,
        same: bool = False,
        scale: float = 1.0,  # of the first weights
        rate: float = 1.0,  # times the learning rate
        epochs: int | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> tuple[ComponentModels, History]:
        """Models after training; at once, if the checkpoint of this name is that of the last epoch."""
        model = self.new(kind, strengths, components, width or self.setting.width, same, scale)
        self.folder.mkdir(parents=True, exist_ok=True)
        print(f"repetition {self.repetition}, {name}: {model.ensemble_size} models", flush=True)
        adagrad = {"lr": rate * self.setting.learning_rate, "initial_accumulator_value": 0.1}
        history = fit(
            model,
            (self.data.images.to(self.device), self.data.labels.to(self.device)),
            loss="cross_entropy",
            epochs=epochs or self.setting.epochs,
            batch_size=self.setting.batch_size,
            optimizer=lambda p: fused(torch.optim.Adagrad, p, **adagrad),
            validation=0.0,
            seed=self.repetition,
            seeds=self.seeds * len(strengths),
            callbacks=callbacks,
            checkpoint=self.folder / f"{self.repetition}-{name}.pt",
            progress=self.progress,
        )
        return model, history

    def judged(self, name: str, kind: Kind, strengths: Sequence[float], **options: Any) -> list[dict]:
        """What is measured of the models of each strength."""
        model, history = self.train(name, kind, strengths, **options)
        found = [judge(z, self.data.test_labels) for z in self.by_strength(model)]
        label = history.terms["train_label"][-1].reshape(len(strengths), -1).mean(1)
        for measures, loss in zip(found, label, strict=True):
            measures["train"] = float(loss) / len(model.components)
        return found

    def by_strength(self, model: Any) -> tuple[Tensor, ...]:
        """Logits of the test images `[M, J, N, K]`, of each strength."""
        return outputs(model, self.data.test).split(self.setting.models)


@torch.no_grad()
def outputs(model: ComponentModels, images: Tensor) -> Tensor:
    """Logits of the components, `[M, J, N, K]`, on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model.outputs(part.to(device)).cpu() for part in images.split(1000)], 2)


# --- what is measured -----------------------------------------------------------------------------------


def averaged(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Probabilities of models `[M, N, K]` in float64, from logits of components `[M, J, N, K]`."""
    return (logits.double() / temperature).softmax(-1).mean(1)


def log_loss(probabilities: Tensor, labels: Tensor) -> float:
    """In nats, the mean over models and images."""
    return mean(metrics.nll(model, labels).item() for model in probabilities)


def judge(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Of the M models of one strength: quality, prediction differences, and what their logits look like."""
    temperature = best_temperature(logits[:, :, ::2], labels[::2])
    theirs = temperature_of(PAPER_LOG_LOSS, logits, labels)
    alone = differences(averaged(logits[:, :1]), labels)
    return {
        **differences(averaged(logits), labels),
        "temperature": temperature,
        "tempered delta 1": difference(averaged(logits[:, :, 1::2], temperature)),
        "theirs temperature": theirs,
        **{f"theirs {key}": v for key, v in differences(averaged(logits, theirs), labels).items()},
        **{f"one {key}": alone[key] for key in ("accuracy", "delta 1", "delta H")},
        **shape_of(logits, labels),
    }


def differences(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """The columns of Table 1."""
    return {
        "nll": log_loss(probabilities, labels),
        "accuracy": mean(metrics.accuracy(model, labels).item() for model in probabilities),
        "delta 1": difference(probabilities),
        "delta 2": metrics.prediction_difference(probabilities, norm=2).item(),
        "delta L": metrics.label_prediction_difference(probabilities, labels).item(),
        "delta H": metrics.hamming_prediction_difference(probabilities).item(),
    }


def difference(probabilities: Tensor) -> float:
    return metrics.prediction_difference(probabilities).item()


def shape_of(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Scale of the logits, where those of each component lie, and how the components' correlate."""
    z = logits.double()
    centred = z - z.mean(-1, keepdim=True)
    found = {"scale": centred.square().mean().sqrt().item()}
    if z.shape[1] == 1:
        return found
    true = z.gather(-1, labels.expand(*z.shape[:2], -1)[..., None]).squeeze(-1).mean(-1)  # [M, J]
    others = (z.mean((2, 3)) * z.shape[-1] - true) / (z.shape[-1] - 1)
    order = others.argsort(1)  # the component whose logits lie lowest first
    for name, place in (("low", 0), ("high", -1)):
        for what, values in (("true", true), ("others", others)):
            found[f"{name} {what}"] = values.gather(1, order)[:, place].mean().item()
    return found | {"cosine": cosine(z), "cosine centred": cosine(centred)}


def cosine(z: Tensor) -> float:
    """C_ij / √(C_ii C_jj) of `[M, J, N, K]`, the mean over models, pairs i < j and labels."""
    of_label = z.permute(0, 3, 1, 2)
    products = of_label @ of_label.mT
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    i, j = torch.triu_indices(z.shape[1], z.shape[1], 1)
    return (products[..., i, j] / (norms[..., i] * norms[..., j]).clamp_min(1e-300)).mean().item()


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """Of the lowest log loss, from 1/16 to 16, by golden section on a logarithmic scale."""
    low, high, share = -math.log(16), math.log(16), (math.sqrt(5) - 1) / 2

    def loss(at: float) -> float:
        return log_loss(averaged(logits, math.exp(at)), labels)

    inner = [high - share * (high - low), low + share * (high - low)]
    losses = [loss(at) for at in inner]
    for _ in range(16):
        if losses[0] < losses[1]:
            high, inner[1], losses[1] = inner[1], inner[0], losses[0]
            inner[0] = high - share * (high - low)
            losses[0] = loss(inner[0])
        else:
            low, inner[0], losses[0] = inner[0], inner[1], losses[1]
            inner[1] = low + share * (high - low)
            losses[1] = loss(inner[1])
    return math.exp((low + high) / 2)


def temperature_of(log_loss_wanted: float, logits: Tensor, labels: Tensor) -> float:
    """Above 1, at which the log loss is as wanted, or the nearest to it up to 1000."""
    low, high = 0.0, math.log(1000)
    for _ in range(24):
        middle = (low + high) / 2
        if log_loss(averaged(logits, math.exp(middle)), labels) < log_loss_wanted:
            low = middle
        else:
            high = middle
    return math.exp(high)


class Curve(Callback):
    """Measures after some of the epochs, and remembers what it found in the checkpoint."""

    def __init__(self, epochs: Iterable[int], measure: Callable[[Any], list[dict[str, float]]]) -> None:
        self.epochs, self.measure = set(epochs), measure
        self.found: dict[str, list[dict[str, float]]] = {}

    def on_epoch_end(self, progress: Progress) -> None:
        if progress.epoch + 1 in self.epochs:
            self.found[str(progress.epoch + 1)] = self.measure(progress.model)

    def state_dict(self) -> dict[str, Any]:
        return self.found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.found = state


# --- parts ----------------------------------------------------------------------------------------------


def strength(study: Study, results: Results) -> None:
    """Table 1 of one repetition, and the other losses."""
    section = f"strength{study.repetition}"
    for kind in (CORRELATION, *OTHERS):
        for reading in READINGS if kind is CORRELATION else READINGS[:1]:
            if results.has(section, kind.entries(reading)):
                continue
            name = f"{kind.name}, {reading}".replace(" ", "-").replace(",", "")
            found = study.judged(name, kind, kind.strengths, same=reading == "same")
            results.merge(section, dict(zip(kind.entries(reading), found, strict=True)))


def components(study: Study, results: Results) -> None:
    """Table 2."""
    for count in PAPER_COMPONENTS[0.0]:
        strengths = (0.0, SMALL, 0.5)
        names = [f"J {count}, λ {value:g}" for value in strengths]
        if results.has("components", names):
            continue
        found = study.judged(f"components{count}", CORRELATION, strengths, components=count)
        results.merge("components", dict(zip(names, found, strict=True)))


def baselines(study: Study, results: Results) -> None:
    """One network for a model, and a wide one, which has about the parameters of two components."""
    widths = {"one network": study.setting.width, "one wide network": wide(study)}
    for name, width in widths.items():
        strengths = (0.0, OWN)
        section, labels = f"baselines{study.repetition}", [name, f"{name}, own scale {OWN:g}"]
        if results.has(section, labels):
            continue
        stem = name.replace(" ", "-")
        found = study.judged(stem, OWN_SCALE, strengths, components=1, width=width)
        results.merge(
            section, {label: row | {"width": width} for label, row in zip(labels, found, strict=True)}
        )


def parameters(inputs: int, width: int) -> int:
    return (inputs + 1) * width + (width + 1) * width + (width + 1) * CLASSES


def wide(study: Study) -> int:
    inputs, width = study.data.images.shape[1], study.setting.width
    wanted = 2 * parameters(inputs, width)
    return min(range(width, 2 * width + 1), key=lambda w: abs(parameters(inputs, w) - wanted))


STARTS = {
    "a fifth of the learning rate": {"rate": 0.2},
    "first weights three times as large": {"scale": 3.0},
}


def setting(study: Study, results: Results) -> None:
    """Δ1 against epochs, against the number of models, against width, and for other starts."""
    labels, epochs = study.data.test_labels, study.setting.epochs
    places = sorted({max(1, round(share * epochs)) for share in SHARES})

    def measure(model: Any) -> list[dict[str, float]]:
        return [differences(averaged(z), labels) for z in study.by_strength(model)]

    def keep(name: str, rows: Sequence[dict[str, float]]) -> None:
        results.merge(
            "setting", {f"{name}, λ {value:g}": row for value, row in zip(CURVE, rows, strict=True)}
        )

    def has(*names: str) -> bool:
        return results.has("setting", [f"{name}, λ {value:g}" for name in names for value in CURVE])

    curve = Curve(places, measure)
    counts = sorted({2, 3, 4, study.setting.models // 2, study.setting.models})
    counts = [count for count in counts if 2 <= count <= study.setting.models]
    if not has(*(f"epochs {place}" for place in places), *(f"models {count}" for count in counts)):
        model, _ = study.train("curve", CORRELATION, CURVE, epochs=places[-1], callbacks=[curve])
        for place in places:
            keep(f"epochs {place}", curve.found[str(place)])
        of_models = [averaged(z) for z in study.by_strength(model)]
        for count in counts:
            keep(f"models {count}", [of_subsets(p, count) for p in of_models])
    for width in (study.setting.width // 2, 2 * study.setting.width):
        if not has(f"width {width}"):
            model, _ = study.train(f"width{width}", CORRELATION, CURVE, width=width)
            keep(f"width {width}", measure(model))
    for name, options in STARTS.items():
        if not has(name):
            model, _ = study.train(name.replace(" ", "-"), CORRELATION, CURVE, **options)
            keep(name, measure(model))


def of_subsets(probabilities: Tensor, count: int) -> dict[str, float]:
    """Δ1 of `count` of the models: over all subsets, or some of them, mean and deviation."""
    subsets = list(combinations(range(len(probabilities)), count))
    drawn = torch.randperm(len(subsets), generator=torch.Generator().manual_seed(0))[:SUBSETS]
    found = [difference(probabilities[list(subsets[i])]) for i in drawn]
    return {"delta 1": mean(found), "deviation": stdev(found) if len(found) > 1 else 0.0}


# --- the page -------------------------------------------------------------------------------------------


MEASURES = {
    "NLL": ("nll", ".4f"),
    "accuracy": ("accuracy", ".2%"),
    "Δ1": ("delta 1", ".4f"),
    "Δ2": ("delta 2", ".4f"),
    "Δ1^L": ("delta L", ".4f"),
    "Δ^H": ("delta H", ".4f"),
}
FACTORS = {"Δ1 divided by": "delta 1", "Δ^H divided by": "delta H"}
NONE = entry("correlation", 0.0, READINGS[0])


def cells(results: Results, part: str, name: str, columns: dict[str, tuple[str, str]]) -> list[str]:
    return [
        spread(found, form) if (found := over_seeds(results, part, name, key)) else ""
        for key, form in columns.values()
    ]


def factors(results: Results, name: str, none: str, key: str) -> list[float]:
    """How many times smaller than without, in each repetition."""
    with_it, without = (over_seeds(results, "strength", which, key) for which in (name, none))
    return [b / a for a, b in zip(with_it, without, strict=False) if a > 0]


def average(results: Results, part: str, name: str, key: str) -> float:
    return mean(over_seeds(results, part, name, key))


def present(results: Results, part: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if over_seeds(results, part, name, "delta 1")]


def complete(results: Results) -> bool:
    """Whether a repetition of the part "strength" was finished."""
    return bool(present(results, "strength", OWN_SCALE.entries()))


def table_1(results: Results, reading: str) -> list[str]:
    none = entry("correlation", 0.0, reading)
    rows = []
    for value, name in zip(STRENGTHS, CORRELATION.entries(reading), strict=True):
        if present(results, "strength", [name]):
            ours = cells(results, "strength", name, MEASURES)
            printed = PAPER.get(value)
            if printed:
                forms = [form if i else ".3f" for i, (_, form) in enumerate(MEASURES.values())]
                forms[1] = ".1%"
                ours = [
                    f"{cell} <sub>{p:{form}}</sub>"
                    for cell, p, form in zip(ours, printed, forms, strict=True)
                ]
            gains = [
                spread(found, ".2f") if value and (found := factors(results, name, none, key)) else ""
                for key in FACTORS.values()
            ]
            if value and printed:
                for i, place in enumerate((2, 5)):
                    gains[i] += f" <sub>{PAPER[0.0][place] / printed[place]:.1f}</sub>"
            rows.append([f"{value:g}" if value else "none", *ours, *gains])
    return markdown_table(["λ", *MEASURES, *FACTORS], rows)


def first_lines(results: Results, suffix: str) -> list[str]:
    used = results.section("made with")["flags"]
    repetitions = len([name for name in results.content if name.startswith("strength")])
    return [
        "# Anti-distillation on MNIST",
        "",
        "Made by `python -m benchmarks.papers.antidistillation`, which says what was chosen; "
        f"{provenance()}. {used['models']} models of each row, width {used['width']}, {used['epochs']} "
        f"epochs, batches of {used['batch_size']}, learning rate {used['learning_rate']:g}; the document has "
        "20, 1200, 150, not given, .02. "
        f"{f'Over {repetitions} repetitions with other seeds, ± standard deviation. ' * (repetitions > 1)}"
        "NLL: of the averaged probabilities, in nats, the mean over models. Divided by: without the loss "
        "over with it, in each repetition. Small figures are the document's, whose log loss and Δ1^L (its "
        "formula is not legible to a factor of 2) are to be compared with each other only.",
        "",
    ]


def strength_lines(results: Results, suffix: str) -> list[str]:
    if not complete(results):
        return []
    lines = [
        "## Table 1: the strength λ",
        "",
        "Each model begins with weights of its own:",
        "",
        *table_1(results, "independent"),
        "",
        "All models begin with the same weights, and meet the images in orders of their own:",
        "",
        *table_1(results, "same"),
        "",
        f"![Δ against λ](antidistillation-strength{suffix}.png)",
        "",
        "Other losses, with weights of each model's own. The document found covariance alike and "
        "probabilities without effect. Pearson correlation: covariance over both deviations. The common "
        "shift: the mean of an example's ten logits, which softmax does not see. Own scale: ½‖diag C‖², "
        "the very term that the loss leaves out; it holds the logits of each component small and pushes "
        "nothing apart.",
        "",
    ]
    accuracies = [average(results, "strength", at(value), "accuracy") for value in (SMALL, 0.02)]
    mean_of_labels = (
        "Ten losses, one for each label, are summed. Were the document's loss their mean, its λ from 0.02 to "
        f"0.2 would be {SMALL:g} to 0.02 here, where the accuracy goes from {accuracies[0]:.2%} to "
        f"{accuracies[1]:.2%}."
    )
    names = [NONE, *(name for kind in OTHERS for name in kind.entries())]
    rows = [
        [
            label_of(name),
            *cells(results, "strength", name, MEASURES),
            *(
                "" if name == NONE else spread(factors(results, name, NONE, key), ".2f")
                for key in FACTORS.values()
            ),
        ]
        for name in present(results, "strength", names)
    ]
    table = markdown_table(["", *MEASURES, *FACTORS], rows)
    return [*lines, *table, "", mean_of_labels, ""]


def label_of(name: str) -> str:
    kind, _, value = name.removesuffix(f", {READINGS[0]}").rpartition(" ")
    return "none" if name == NONE else f"{kind}, λ = {value}"


def factor_lines(results: Results, suffix: str) -> list[str]:
    """What is behind the factor of the document."""
    if not complete(results):
        return []
    columns = {
        "scale of the logits": ("scale", ".2f"),
        "low: true": ("low true", ".2f"),
        "low: others": ("low others", ".2f"),
        "high: true": ("high true", ".2f"),
        "high: others": ("high others", ".2f"),
        "cosine": ("cosine", ".2f"),
        "without the shift": ("cosine centred", ".2f"),
        "one component: accuracy": ("one accuracy", ".2%"),
        "Δ1": ("one delta 1", ".4f"),
        "Δ^H": ("one delta H", ".4f"),
        "best temperature": ("temperature", ".2f"),
        "Δ1 there": ("tempered delta 1", ".4f"),
        "training loss": ("train", ".4f"),
    }
    names = [*CORRELATION.entries(), *(name for kind in OTHERS for name in kind.entries())]
    rows = [
        [label_of(name), *cells(results, "strength", name, columns)]
        for name in present(results, "strength", names)
    ]
    strongest = max(PAPER[0.0][2] / row[2] for row in PAPER.values())
    of_delta_1, of_hamming = (best(results, key) for key in ("delta 1", "delta H"))

    own, apart = (entry(kind.name, OWN, READINGS[0]) for kind in (OWN_SCALE, APART))

    def figure(name: str, key: str, form: str = ".4f") -> str:
        text = format(average(results, "strength", name, key), form)
        return "0.00" if text == "-0.00" else text

    lines = [
        "## Why not twenty times",
        "",
        f"The document's Δ1 is divided by up to {strongest:.0f}, at nearly every λ. Here the best λ divides "
        f"Δ1 by {spread(factors(results, of_delta_1, NONE, 'delta 1'), '.2f')} ({label_of(of_delta_1)}), and "
        f"Δ^H by {spread(factors(results, of_hamming, NONE, 'delta H'), '.2f')} ({label_of(of_hamming)}; the "
        f"document by {PAPER[0.0][5] / PAPER[0.2][5]:.1f}). What the loss "
        "does to the logits: their root mean square without the common shift of each example; the mean logit "
        "of the true label and of the others, in the component where these are low and where they are high; "
        "the cosine of the components' logits over the test images, as the loss sees them and without the "
        "common shift; the first component as a model of its own; the temperature of the lowest NLL on every "
        "other test image, and Δ1 of the rest there.",
        "",
        *markdown_table(["", *columns], rows),
        "",
        f"- **The components become orthogonal by an offset.** At λ = 0.02 the cosine of the logits is "
        f"{figure(at(0.02), 'cosine', '.2f')}; without the common shift, which no prediction depends on, it "
        f"is {figure(at(0.02), 'cosine centred', '.2f')} (without the loss "
        f"{figure(NONE, 'cosine centred', '.2f')}). In one component the true label has a mean logit of "
        f"{figure(at(0.02), 'low true', '.1f')} and the others {figure(at(0.02), 'low others', '.1f')}, in "
        f"the other one {figure(at(0.02), 'high true', '.1f')} and {figure(at(0.02), 'high others', '.1f')}: "
        "where one of them is far from 0 the other one is near it, and both say the same.",
        f"- **The rest looks like a bound on the scale.** At λ = {SMALL:g} the scale of the logits is "
        f"{figure(at(SMALL), 'scale', '.1f')} where it was {figure(NONE, 'scale', '.1f')}; Δ^H of one "
        f"component alone {figure(at(SMALL), 'one delta H')} where it was {figure(NONE, 'one delta H')}, of "
        f"the pair {figure(at(SMALL), 'delta H')} where it was {figure(NONE, 'delta H')}. A penalty on each "
        f"component's own scale, which pushes nothing apart, gives the pair {figure(own, 'delta H')} and an "
        f"accuracy of {figure(own, 'accuracy', '.2%')} (λ = {OWN:g}); pushing apart what softmax sees, "
        f"{figure(apart, 'delta H')} and {figure(apart, 'accuracy', '.2%')}, with components whose cosine "
        f"without the common shift is {figure(apart, 'cosine centred', '.2f')}.",
    ]
    return [*lines, *at_their_log_loss(results)]


def at(value: float) -> str:
    return entry("correlation", value, READINGS[0])


def best(results: Results, key: str) -> str:
    """The strength of the correlation loss with the lowest mean."""
    names = present(results, "strength", [name for name in CORRELATION.entries() if name != NONE])
    return min(names, key=lambda name: average(results, "strength", name, key))


def at_their_log_loss(results: Results) -> list[str]:
    columns = {"temperature": ("theirs temperature", ".2f")}
    columns |= {title: (f"theirs {key}", form) for title, (key, form) in MEASURES.items()}
    rows = []
    for name in present(results, "strength", [NONE, at(SMALL), at(0.02)]):
        ratio = ratios(results, name, "theirs delta 1", "theirs delta 2")
        rows.append([label_of(name), *cells(results, "strength", name, columns), spread(ratio, ".2f")])
    for value in (0.0, 0.02, 0.2):
        log_loss, accuracy, *deltas = PAPER[value]
        printed = [f"{log_loss:.3f}", f"{accuracy:.1%}", *(f"{d:.4f}" for d in deltas)]
        name = f"the document, λ = {value:g}" if value else "the document, none"
        rows.append([name, "", *printed, f"{deltas[0] / deltas[1]:.2f}"])
    without, with_it = (
        [mean(ratios(results, name, "delta 1", key)) for key in ("delta 2", "delta L")]
        for name in (NONE, at(SMALL))
    )
    none, small = ([PAPER[value][2] / PAPER[value][place] for place in (3, 4)] for value in (0.0, 0.2))
    return [
        "- **The document's row without the loss is of unsaturated outputs.** Differences that are spread "
        "over n labels have a Δ1 of at most √n times Δ2; what of it is the true label's is at most Δ1^L, or "
        "twice that. "
        f"Its Δ1 is {none[0]:.2f} times its Δ2 and {none[1]:.1f} times its Δ1^L: its models differ in how "
        "they share out what the true label leaves. With the loss, at λ = 0.2, the ratios are "
        f"{small[0]:.2f} and {small[1]:.1f}, as of outputs near 0 and 1. Here they are {without[0]:.2f} and "
        f"{without[1]:.1f} without the loss, {with_it[0]:.2f} and {with_it[1]:.1f} at λ = {SMALL:g}: the "
        "loss makes outputs less saturated, not more. A softmax whose temperature lifts our NLL to its log "
        f"loss of {PAPER_LOG_LOSS} changes no component's labels, and multiplies Δ1: a factor in Δ1 may come "
        "of the scale of the logits alone, while Δ^H hardly depends on it:",
        "",
        *markdown_table(["", "temperature", *MEASURES, "Δ1 / Δ2"], rows),
        "",
        "- In the document's Table 2, Δ1 and Δ2 with the loss go as 1/J to all printed digits, and Δ1^L "
        "about as 1/√J; the mean of J components that are alike and independent goes as 1/√J in all three.",
        "",
    ]


def ratios(results: Results, name: str, above: str, below: str) -> list[float]:
    pairs = zip(*(over_seeds(results, "strength", name, key) for key in (above, below)), strict=True)
    return [a / b for a, b in pairs]


def component_lines(results: Results, suffix: str) -> list[str]:
    found = results.section("components")
    if not found:
        return []
    rows = []
    for count in PAPER_COMPONENTS[0.0]:
        for value in (0.0, SMALL, 0.5):
            row = found.get(f"J {count}, λ {value:g}")
            if row is None:
                continue
            shown = {title: f"{row[key]:{form}}" for title, (key, form) in MEASURES.items()}
            if value in PAPER_COMPONENTS:
                accuracy, *deltas = PAPER_COMPONENTS[value][count]
                shown["accuracy"] += f" <sub>{accuracy:.1%}</sub>"
                for title, printed in zip(("Δ1", "Δ2", "Δ1^L"), deltas, strict=True):
                    shown[title] += f" <sub>{printed:.4f}</sub>"
            rows.append([str(count), f"{value:g}" if value else "none", *shown.values()])
    return [
        "## Table 2: J components",
        "",
        "The document's λ is 0.5. First repetition, weights of each model's own; the loss is a sum over "
        "J(J-1)/2 pairs.",
        "",
        *markdown_table(["J", "λ", *MEASURES], rows),
        "",
    ]


def compared(results: Results) -> list[tuple[str, str, str]]:
    """Label, part and entry of what is held against each other: two components, and one network."""
    own = entry(OWN_SCALE.name, OWN, READINGS[0])
    found = [("two components, plain", "strength", NONE)]
    if present(results, "strength", [NONE]):
        for name in dict.fromkeys((best(results, "delta 1"), best(results, "delta H"))):
            found.append((f"two components, {label_of(name)}", "strength", name))
    found.append((f"two components, own scale, λ = {OWN:g}", "strength", own))
    for name in ("one network", "one wide network"):
        found += [(name, "baselines", name)]
        found += [(f"{name}, own scale, λ = {OWN:g}", "baselines", f"{name}, own scale {OWN:g}")]
    return [row for row in found if present(results, row[1], [row[2]])]


def baseline_lines(results: Results, suffix: str) -> list[str]:
    if not present(results, "baselines", ["one network"]):
        return []
    width = average(results, "baselines", "one wide network", "width")
    rows = [[label, *cells(results, part, name, MEASURES)] for label, part, name in compared(results)]
    lines = [
        "## Against one network",
        "",
        f"The wide network has {width:.0f} units in a layer, and about the parameters of two components. The "
        "two components: of the lowest Δ1 and of the lowest Δ^H among the λ of the correlation loss.",
        "",
        *markdown_table(["", *MEASURES], rows),
        "",
    ]
    if complete(results):
        lines += [
            f"![quality against difference](antidistillation-tradeoff{suffix}.png)",
            "",
            "A line goes from small to large strengths. What is far from the plain pair is left out.",
            "",
        ]
    return lines


def setting_lines(results: Results, suffix: str) -> list[str]:
    found = results.section("setting")
    if not found:
        return []
    names = list(dict.fromkeys(name.rpartition(", λ ")[0] for name in found))
    used = results.section("made with")["flags"]
    lines = ["## What the numbers depend on", ""]

    def numbered(kind: str) -> list[str]:
        chosen = [name for name in names if name.partition(" ")[0] == kind]
        return sorted(chosen, key=lambda name: int(name.split()[1]))

    header = [f"{what}, {f'λ = {value:g}' if value else 'none'}" for what in MEASURED for value in CURVE]
    groups = [
        ("epochs", "", numbered("epochs")),
        ("width", f" ({used['epochs']} epochs)", numbered("width")),
        ("start", f" ({used['epochs']} epochs, width {used['width']})", [n for n in STARTS if n in names]),
    ]
    for title, more, rows in groups:
        if rows:
            table = [
                [
                    name.removeprefix(f"{title} "),
                    *(
                        f"{found[f'{name}, λ {value:g}'][key]:{form}}"
                        for key, form in MEASURED.values()
                        for value in CURVE
                    ),
                ]
                for name in rows
            ]
            lines += [*markdown_table([f"{title}{more}", *header], table), ""]
    rows = [
        [
            name.split()[1],
            *(
                f"{row['delta 1']:.4f} ± {row['deviation']:.4f}"
                for value in CURVE
                for row in [found[f"{name}, λ {value:g}"]]
            ),
        ]
        for name in numbered("models")
    ]
    return [
        *lines,
        f"Δ1 of some of the models after the last epoch of the curve, over up to {SUBSETS} subsets (few "
        "models lie nearer to their own mean):",
        "",
        *markdown_table(["models", *(f"λ = {value:g}" if value else "none" for value in CURVE)], rows),
        "",
    ]


MEASURED = {"Δ1": ("delta 1", ".4f"), "Δ^H": ("delta H", ".4f"), "accuracy": ("accuracy", ".2%")}


def choice_lines(results: Results, suffix: str) -> list[str]:
    if not complete(results):
        return []
    names = [name for kind in (CORRELATION, *OTHERS) for name in kind.entries()]
    names = present(results, "strength", names)

    def lowest(key: str, form: str = ".4f") -> str:
        name = min(names, key=lambda name: average(results, "strength", name, key))
        value, without = (average(results, "strength", which, key) for which in (name, NONE))
        return f"{label_of(name)} ({value:{form}} against {without:{form}})"

    lines = [
        "## What to choose",
        "",
        f"- Of two components and all losses above: lowest Δ1 {lowest('delta 1')}; lowest Δ^H "
        f"{lowest('delta H')}; lowest NLL {lowest('nll')}; lowest Δ1 at the best temperature "
        f"{lowest('tempered delta 1')}.",
        f"- The document's smallest λ, {0.02:g}, changes the accuracy by "
        f"{100 * changed(results, at(0.02), 'accuracy'):+.2f} points and Δ^H by "
        f"{changed(results, at(0.02), 'delta H'):+.4f}; {SMALL:g} by "
        f"{100 * changed(results, at(SMALL), 'accuracy'):+.2f} points and "
        f"{changed(results, at(SMALL), 'delta H'):+.4f}. Begin small, and look at the accuracy.",
        "- Compare Δ1 at each model's best temperature, or look at Δ^H: Δ1 and Δ2 follow the scale of the "
        "logits, which the loss changes.",
    ]
    found = results.section("components")
    pair, eight = (found.get(f"J {count}, λ 0") for count in (2, 8))
    if pair and eight:
        lines.append(
            f"- More components need no loss: of eight plain ones Δ1 is {eight['delta 1']:.4f} and Δ^H "
            f"{eight['delta H']:.4f}, of two {pair['delta 1']:.4f} and {pair['delta H']:.4f}."
        )
    lines.append(
        "- Softmax has room for an offset. To push apart what is predicted, take away each example's mean "
        "logit first: `decorrelation=lambda z: decorrelation_loss(z - z.mean(-1, keepdim=True))`."
    )
    return [*lines, ""]


def changed(results: Results, name: str, key: str) -> float:
    return average(results, "strength", name, key) - average(results, "strength", NONE, key)


def online_lines(results: Results, suffix: str) -> list[str]:
    """Table 3, if `benchmarks.papers.online` has left its results beside these."""
    found = online.lines(Results(results.path.with_name(f"{online.STEM}{suffix}.json")), suffix)
    return ["## Table 3: clicks in one pass", "", *found] if found else []


# The page in its order; a section is left out that has nothing yet.
SECTIONS: list[Callable[[Results, str], list[str]]] = [
    first_lines,
    strength_lines,
    factor_lines,
    component_lines,
    baseline_lines,
    setting_lines,
    online_lines,
    choice_lines,
]


def page(results: Results, suffix: str) -> str:
    return "\n".join(line for section in SECTIONS for line in section(results, suffix))


# --- pictures -------------------------------------------------------------------------------------------


def draw(results: Results, folder: Path, suffix: str) -> None:
    if not complete(results):
        return
    figure = plots.new_figure(10, 4)
    for axes, (title, key, place) in zip(
        figure.subplots(1, 2), (("Δ1", "delta 1", 2), ("Δ^H", "delta H", 5)), strict=True
    ):
        draw_strengths(results, axes, key, place)
        axes.set(ylabel=title)
    plots.save_figure(figure, folder / f"antidistillation-strength{suffix}.png")
    figure = plots.new_figure(10, 4.5)
    left, right = figure.subplots(1, 2)
    draw_tradeoff(results, left, "delta 1", "nll", 2.5)
    left.set(xlabel="Δ1", ylabel="NLL")
    draw_tradeoff(results, right, "delta H", "accuracy", 1.7)
    right.set(xlabel="Δ^H", ylabel="error")
    left.legend(frameon=False, fontsize="x-small")
    plots.save_figure(figure, folder / f"antidistillation-tradeoff{suffix}.png")


def draw_strengths(results: Results, axes: Axes, key: str, place: int) -> None:
    for i, reading in enumerate(READINGS):
        found = [
            (value, over_seeds(results, "strength", entry("correlation", value, reading), key))
            for value in STRENGTHS
        ]
        found = [(value, values) for value, values in found if values]
        axes.errorbar(
            [value for value, _ in found],
            [mean(values) for _, values in found],
            [stdev(values) if len(values) > 1 else 0.0 for _, values in found],
            color=plots.COLOURS[i],
            linestyle=plots.LINES[i],
            marker=plots.MARKERS[i],
            capsize=3,
            label={"independent": "weights of each model's own", "same": "same weights"}[reading],
        )
    printed = [row[place] for row in PAPER.values()]
    axes.plot(list(PAPER), printed, color=plots.INK, linestyle=":", marker="D", label="the document")
    axes.set_xscale("symlog", linthresh=min(s for s in STRENGTHS if s > 0))
    axes.set(xlabel="strength λ of the correlation loss", yscale="log")
    axes.legend(frameon=False, fontsize="small")


def draw_tradeoff(results: Results, axes: Axes, difference: str, quality: str, most: float) -> None:
    """Each kind of loss is a line over its strengths, up to `most` times the plain pair's values."""

    def height(part: str, name: str) -> float:
        value = average(results, part, name, quality)
        return 1 - value if quality == "accuracy" else value

    lines = [(kind.name, "strength", kind.entries()) for kind in (CORRELATION, *OTHERS)]
    for name in ("one network", "one wide network"):
        lines.append((f"{name}; own scale", "baselines", [name, f"{name}, own scale {OWN:g}"]))
    for i, (label, part, names) in enumerate(lines):
        if names := present(results, part, names):
            across = [average(results, part, name, difference) for name in names]
            heights = [height(part, name) for name in names]
            style = {"color": plots.COLOURS[i % 6], "linestyle": plots.LINES[i % 4], "label": label}
            axes.plot(across, heights, marker="os^Dv<>P"[i % 8], **style)
            if i == 0:
                for value, *point in zip(STRENGTHS, across, heights, strict=False):
                    axes.annotate(f"{value:g}", point, fontsize="xx-small", color=plots.INK, clip_on=True)
    x, y = average(results, "strength", NONE, difference), height("strength", NONE)
    axes.set(xlim=(0.7 * x, most * x), ylim=(0.7 * y, most * y))


# --- the command ----------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.antidistillation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--output", type=Path, default=harness.RESULTS, help="folder for page and pictures")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/antidistillation"), help="folder for checkpoints"
    )
    parser.add_argument("--part", choices=PARTS, help="default: all")
    parser.add_argument("--models", type=int, default=8, help="of each strength")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=128, help="units of each of the two hidden layers")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--repetitions", type=int, default=3, help="with other seeds")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--quick", action="store_true", help="smoke test: few images, small models")
    flags = parser.parse_args(argv)
    for name, least in {"models": 2, "epochs": 1, "width": 2, "batch_size": 2, "repetitions": 1}.items():
        if (value := getattr(flags, name)) < least:
            parser.error(f"--{name.replace('_', '-')}: expected {least} or more, got {value}")
    suffix = "-quick" if flags.quick else ""
    chosen = Setting(flags.models, flags.epochs, flags.width, flags.batch_size, flags.learning_rate)
    repetitions = flags.repetitions
    if flags.quick:
        chosen, repetitions = Setting(2, 1, 8, 16, 0.1), 2
    try:
        data = Data.load(flags.data, 300 if flags.quick else None)
    except FileNotFoundError as error:
        parser.error(f"--data: {error}")
    results = Results(flags.output / f"antidistillation{suffix}.json")
    used = results.section("made with").get("flags", {})
    expected = asdict(chosen)
    if used and {name: used.get(name) for name in expected} != expected:
        parser.error(f"--output: expected results of {expected}, got {used} in {results.path}: move it away")
    if not used:
        results.merge("made with", {"flags": expected})
    folder = flags.work / ("quick" if flags.quick else chosen.folder)
    for repetition in range(repetitions):
        study = Study(data, chosen, repetition, folder, flags.device, not flags.quick)
        for name, part, each in (
            ("strength", strength, True),
            ("components", components, False),
            ("baselines", baselines, True),
            ("setting", setting, False),
        ):
            if flags.part in (None, name) and (each or repetition == 0):
                part(study, results)
        draw(results, flags.output, suffix)
        publish(page(results, suffix), flags.output / f"antidistillation{suffix}.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
