"""The results of "Masksembles for Uncertainty Estimation" (Durasov et al., 2021), made anew with pyens.

    python -m benchmarks.papers.masksembles --data DIR           # minutes
    python -m benchmarks.papers.masksembles --data DIR --quick   # a smoke test, seconds

DIR holds the folders mnist, fashion-mnist and notmnist-small, with the idx files as they are downloaded. Made
are Figure 4, the masks' IoU and the model's size against S (section 3.4), Table 1 and Figure 6.

What differs from the paper, and why:

- Table 1 and Figure 6 are of MNIST, with Fashion-MNIST and notMNIST as out of distribution, and of MLPs
  784-256-256-10, where the paper has CIFAR-10, SVHN and Wide-ResNet-16-4: that runs on a CPU in minutes, and
  on the engine of this library. MNIST is easy, so accuracies lie close together; calibration and OOD scores
  say more. The paper's numbers stand beside for the order of the methods, not to be met.
- Masksembles has S = 2 and N = 4, and layers so wide (480) that each mask leaves 256 units: 2.3 times the
  parameters of the single model, as the setting that the paper chose for its Table 1.
- Figure 6 has Gaussian noise of 5 severities in place of 19 corruptions.
- Figure 4: the paper gives the range of x, N, M and S; sinusoids, noise (0.1), network (2-M-M-2) and training
  (500 steps of Adam on 400 points) are ours. The sinusoids are in opposite phase, so that they cross. Where
  one lies above the other, a single line parts them, and every model continues it in the same way: away from
  the data even the members of an ensemble agree, and there is nothing to see.

MC dropout has one rate for both hidden layers, the best of some by the likelihood of held-out training
images; it trains with a mask for each example and predicts with 4 that all examples share.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import harness
from benchmarks.papers.pages import markdown_table, provenance
from benchmarks.papers.sinusoids import two_sinusoids
from pyens import metrics, plots
from pyens.data import Split, load_idx, load_mnist
from pyens.masks import expected_iou, generate_masks, mask_iou, masks_for_channels, model_size
from pyens.nn import EnsembleMLP, MaskedMLP, mc_dropout

N = 4
FIGURE_SCALES = (1.1, 2.0, 3.0, 10.0)
SEVERITIES = (0.1, 0.2, 0.3, 0.4, 0.5)  # standard deviations of the noise, pixels being 0 to 1
VALIDATION = 1 / 12  # share of the training images
PAPER_TABLE = {  # CIFAR-10 and SVHN: accuracy, ECE, size, minutes, OOD ROC, OOD PR
    "single": (0.89, 0.06, 1.0, 10, 0.91, 0.94),
    "MC dropout": (0.90, 0.01, 1.0, 12, 0.92, 0.95),
    "Masksembles": (0.92, 0.01, 2.3, 16, 0.94, 0.96),
    "ensemble": (0.92, 0.01, 4.0, 40, 0.94, 0.96),
}


@dataclass(frozen=True)
class Settings:
    """What the flags set, and what `--quick` makes small."""

    data: Path
    output: Path
    seed: int
    quick: bool

    @property
    def suffix(self) -> str:
        return "-quick" if self.quick else ""

    @property
    def epochs(self) -> int:
        return 1 if self.quick else 10

    @property
    def hidden(self) -> tuple[int, int]:
        """Units that a mask leaves: the hidden layers of the single model."""
        return (16, 16) if self.quick else (256, 256)

    @property
    def rates(self) -> tuple[float, ...]:
        return (0.1, 0.3) if self.quick else (0.05, 0.1, 0.2, 0.3, 0.5)

    @property
    def figure_steps(self) -> int:
        return 20 if self.quick else 500

    @property
    def figure_seeds(self) -> range:
        """The first of them is drawn."""
        return range(self.seed, self.seed + (1 if self.quick else 5))

    @property
    def largest(self) -> int | None:
        """Images of each part that are used."""
        return 600 if self.quick else None


BATCH_SIZE = 128
LEARNING_RATE = 1e-3


# --- training --------------------------------------------------------------------------------------------


def train(
    parameters: Sequence[Tensor],
    loss: Callable[[Tensor, Tensor, int], Tensor],
    data: Split,
    orders: list[torch.Generator],
    epochs: int,
    name: str,
) -> float:
    """Adam on `loss(images, labels, step)`; the seconds it took.

    With several `orders` each member meets the images in its own: images are `[E, b, I]` then.
    """
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
    batches = -(-len(data.labels) // BATCH_SIZE)
    step = 0
    start = time.perf_counter()
    with tqdm(total=epochs * batches, desc=f"training {name}", leave=False, disable=None) as bar:
        for _ in range(epochs):
            order = torch.stack([torch.randperm(len(data.labels), generator=g) for g in orders])
            for rows in order.squeeze(0).split(BATCH_SIZE, dim=-1):
                value = loss(data.images[rows], data.labels[rows], step)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                step += 1
                bar.update()
    return time.perf_counter() - start


def generators(seed: int, count: int = 1) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]


def train_ensemble(
    size: int, widths: Sequence[int], data: Split, settings: Settings, dropout: float = 0.0
) -> tuple[EnsembleMLP, float]:
    """`size` independent models: each its own initial weights and order of the data."""
    seeds = [settings.seed * 100 + m for m in range(size)]
    model = EnsembleMLP(size, widths[0], widths[1:-1], widths[-1], seeds=seeds)

    def loss(images: Tensor, labels: Tensor, step: int) -> Tensor:
        # Another seed each step and member.
        draw = torch.arange(size) + step * size if dropout else None
        losses = model.loss(images, labels, loss="cross_entropy", dropout=dropout, dropout_seeds=draw)
        return losses.sum()

    name = f"ensemble of {size}" if size > 1 else f"with dropout {dropout:g}" if dropout else "a single model"
    orders = generators(settings.seed, size)
    seconds = train(list(model.parameters()), loss, data, orders, settings.epochs, name)
    return model.eval(), seconds


def train_masksembles(model: MaskedMLP, data: Split, settings: Settings) -> float:
    """As in the paper: each example meets one mask, here another one each time that it comes."""

    def loss(images: Tensor, labels: Tensor, step: int) -> Tensor:
        return model.loss(images, labels, loss="cross_entropy", mode="random", seed=step)

    orders = generators(settings.seed)
    return train(list(model.parameters()), loss, data, orders, settings.epochs, "Masksembles")


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Class probabilities `[B, K]` in float64: the mean over members, masks or passes."""
    parts = [model(part).double().softmax(-1).mean(0) for part in images.split(4096)]
    return torch.cat(parts)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- Table 1 and Figure 6 --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A trained method, and what training the one model that is used cost."""

    name: str
    model: nn.Module  # images -> logits [N, B, K]
    seconds: float
    parameters: int


def train_methods(
    data: Split, validation: Split, settings: Settings
) -> tuple[list[Method], dict[str, float]]:
    """The four of Table 1; and the validation NLL of MC dropout for each rate."""
    classes = int(data.labels.max()) + 1
    widths = (data.images.shape[1], *settings.hidden, classes)
    # A process's first step imports parts of torch and starts its threads: no method is to pay for that.
    warm_up = Split(data.images[:BATCH_SIZE], data.labels[:BATCH_SIZE])
    train_ensemble(1, widths, warm_up, settings)

    single, seconds = train_ensemble(1, widths, data, settings)
    methods = [Method("single", single, seconds, parameter_count(single))]

    tried: dict[str, float] = {}
    best: Method | None = None
    for rate in settings.rates:
        model, seconds = train_ensemble(1, widths, data, settings, dropout=rate)
        passes = mc_dropout(model.member(0), N, rate, *generators(settings.seed + 1))
        nll = metrics.nll(predict(passes, validation.images), validation.labels).item()
        if not tried or nll < min(tried.values()):
            best = Method("MC dropout", passes, seconds, parameter_count(model))
        tried[f"{rate:g}"] = nll
    assert best is not None
    methods.append(best)

    # Layers of C = M S (1 - (1 - 1/S)^N) channels, of which each of N masks leaves M.
    wide = [round(m * 2.0 * (1 - 0.5**N)) for m in settings.hidden]
    masked = MaskedMLP(
        N,
        widths[0],
        wide,
        classes,
        scale=2.0,
        seed=settings.seed,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    seconds = train_masksembles(masked, data, settings)
    methods.append(Method("Masksembles", masked.eval(), seconds, parameter_count(masked)))

    ensemble, seconds = train_ensemble(N, widths, data, settings)
    methods.append(Method("ensemble", ensemble, seconds, parameter_count(ensemble)))
    return methods, tried


def table_1(methods: Sequence[Method], test: Split, outside: dict[str, Tensor]) -> list[str]:
    """Rows of markdown, beside those of the paper."""
    single = methods[0]
    names = list(outside)
    header = ["", "accuracy", "ECE", "size", "training"]
    header += [f"{name} {curve}" for name in names for curve in ("ROC", "PR")]
    header += ["paper: accuracy", "ECE", "size", "time", "SVHN ROC", "PR"]
    lines = []
    for method in methods:
        known = predict(method.model, test.images)
        entropy = metrics.predictive_entropy(known)
        cells = [
            method.name,
            f"{metrics.accuracy(known, test.labels):.4f}",
            f"{metrics.expected_calibration_error(known, test.labels):.4f}",
            f"{method.parameters / single.parameters:.1f}×",
            f"{method.seconds:.1f} s ({method.seconds / single.seconds:.1f}×)",
        ]
        for images in outside.values():
            scores = metrics.predictive_entropy(predict(method.model, images))
            cells.append(f"{metrics.ood_auroc(entropy, scores):.4f}")
            cells.append(f"{metrics.ood_aupr(entropy, scores):.4f}")
        accuracy, ece, size, minutes, roc, pr = PAPER_TABLE[method.name]
        cells += [f"{accuracy:.2f}", f"{ece:.2f}", f"{size:g}×", f"{minutes} m", f"{roc:.2f}", f"{pr:.2f}"]
        lines.append(cells)
    return markdown_table(header, lines)


def noise_table(methods: Sequence[Method], test: Split, seed: int, path: Path) -> list[str]:
    """Accuracy and ECE under Gaussian noise, as rows of markdown and as a picture."""
    generator = torch.Generator().manual_seed(seed)
    levels = (0.0, *SEVERITIES)
    noisy = [
        (test.images + level * torch.randn(test.images.shape, generator=generator)).clamp(0, 1)
        for level in levels
    ]
    found: dict[str, dict[str, list[float]]] = {"accuracy": {}, "ECE": {}}
    for method in methods:
        predicted = [predict(method.model, images) for images in noisy]
        found["accuracy"][method.name] = [metrics.accuracy(p, test.labels).item() for p in predicted]
        found["ECE"][method.name] = [
            metrics.expected_calibration_error(p, test.labels).item() for p in predicted
        ]
    header = ["", *(f"severity {i}, σ {level:g}" if i else "clean" for i, level in enumerate(levels))]
    lines = []
    for measure, of_method in found.items():
        for name, values in of_method.items():
            lines.append([f"{measure}, {name}", *(f"{value:.4f}" for value in values)])

    figure = plots.new_figure(9, 3.6)
    for ax, (measure, of_method) in zip(figure.subplots(1, 2), found.items(), strict=True):
        for (name, values), colour, line in zip(of_method.items(), plots.COLOURS, plots.LINES, strict=False):
            ax.plot(range(len(levels)), values, marker="o", color=colour, linestyle=line, label=name)
        ax.set(xlabel="severity of the noise", ylabel=measure)
        ax.legend(frameon=False)
    plots.save_figure(figure, path)
    return markdown_table(header, lines)


# --- Figure 4, IoU and size ------------------------------------------------------------------------------


def figure_4(settings: Settings, path: Path) -> list[str]:
    """From a single model through Masksembles to an ensemble: a picture, and entropies as rows of markdown.

    The picture is of the first seed; entropies are means over `figure_seeds`, near the data (at the training
    points) and far from them (points of the picture further than 1 from each).
    """
    size = 40 if settings.quick else 200
    edge = torch.linspace(-8, 8, size)
    grid = torch.cartesian_prod(edge, edge)
    found: dict[str, list[tuple[float, float, float]]] = {}  # near, far, disagreement, for each seed
    figure = plots.new_figure(12, 7.6)
    axes = list(figure.subplots(2, 3).flat)
    for seed in settings.figure_seeds:
        points = two_sinusoids(
            400, noise=0.1, gap=0.0, phase=math.pi, generator=torch.Generator().manual_seed(seed)
        )
        x, y = points.positions, points.labels
        far = torch.cdist(grid, x).amin(1) > 1
        for place, (name, model) in enumerate(_figure_models(settings, seed).items()):
            _fit(model, x, y, settings.figure_steps, f"{name}, seed {seed}")
            entropy = metrics.predictive_entropy(predict(model, grid))
            near = metrics.predictive_entropy(predict(model, x)).mean().item()
            with torch.inference_mode():
                labels = model(grid[far]).argmax(-1)  # [N, points]
            disagree = (labels != labels[0]).any(0).double().mean().item()
            found.setdefault(name, []).append((near, entropy[far].mean().item(), disagree))
            if seed == settings.seed:
                ax = axes[place]
                values = entropy.view(size, size).T.numpy()
                mesh = ax.pcolormesh(edge.numpy(), edge.numpy(), values, vmin=0, vmax=math.log(2))
                for label, colour in enumerate(("#D55E00", "#56B4E9")):
                    chosen = x[y == label]
                    ax.plot(chosen[:, 0].numpy(), chosen[:, 1].numpy(), ".", color=colour, markersize=3)
                ax.set_title(name)
                ax.set_aspect("equal")
    figure.colorbar(mesh, ax=figure.axes, label="predictive entropy [nats]")
    plots.save_figure(figure, path)
    header = ["", "entropy at the data", "entropy far from it", "far points on which members disagree"]
    lines = []
    for name, values in found.items():
        near, away, disagree = (torch.tensor(v) for v in zip(*values, strict=True))
        cells = [f"{near.mean():.3f}", f"{away.mean():.3f}", f"{disagree.mean():.0%}"]
        if len(values) > 1:
            cells[1] += f" ± {away.std():.3f}"
        lines.append([name, *cells])
    return markdown_table(header, lines)


def _figure_models(settings: Settings, seed: int) -> dict[str, EnsembleMLP | MaskedMLP]:
    m = 16 if settings.quick else 100
    seeds = [seed * 100 + i for i in range(N)]
    models: dict[str, EnsembleMLP | MaskedMLP] = {"single": EnsembleMLP(1, 2, [m, m], 2, seeds=seeds[:1])}
    for scale in FIGURE_SCALES:
        generator = torch.Generator().manual_seed(seed)
        # M is fixed: the masks of the paper, whose layers grow with S.
        masks = [generate_masks(m, N, scale, generator=generator) for _ in range(2)]
        widths = [mask.shape[1] for mask in masks]
        drawn = MaskedMLP(N, 2, widths, 2, scale=scale, seed=seed, generator=generator)
        models[f"Masksembles, S = {scale:g}"] = MaskedMLP.from_parameters(
            list(drawn.weights), list(drawn.biases), masks
        )
    models["ensemble"] = EnsembleMLP(N, 2, [m, m], 2, seeds=seeds)
    return models


def _fit(model: EnsembleMLP | MaskedMLP, x: Tensor, y: Tensor, steps: int, name: str) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    for step in tqdm(range(steps), desc=f"Figure 4, {name}", leave=False, disable=None):
        if isinstance(model, MaskedMLP):
            loss = model.loss(x, y, loss="cross_entropy", mode="random", seed=step)
        else:
            loss = model.loss(x, y, loss="cross_entropy").sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def iou_and_size(settings: Settings, path: Path) -> list[str]:
    """The masks' IoU against 1 / (2 S - 1), and parameters against S, as rows of markdown and a picture."""
    scales = (1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
    m, channels, draws = 100, 256, 3 if settings.quick else 50
    features, hidden, classes = 784, (256, 256), 10
    single = model_size(features, hidden, classes, 1, 1.0)
    names = f"generate_masks({m}, {N}, S)", f"masks_for_channels({channels}, {N}, S)"
    header = ["S", "1/(2S-1)", *(f"IoU, {name}" for name in names), "size, expected", "size, drawn"]
    lines = []
    rows = []
    for scale in scales:
        generator = torch.Generator().manual_seed(settings.seed)

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        drawn = [mask_iou(generate_masks(m, N, scale, generator=generator)) for _ in range(draws)]
        fitted = [mask_iou(masks_for_channels(channels, N, scale, generator=generator)) for _ in range(draws)]
        widths = [generate_masks(ones, N, scale, generator=generator).shape[1] for ones in hidden]
        model = MaskedMLP(N, features, widths, classes, scale=scale, generator=generator)
        expected = model_size(features, hidden, classes, N, scale) / single
        ious = expected_iou(scale), mean(drawn), mean(fitted)
        sizes = expected, parameter_count(model) / single
        rows.append((scale, *ious, *sizes))
        lines.append([f"{scale:g}", *(f"{v:.3f}" for v in ious), *(f"{v:.2f}×" for v in sizes)])
    columns = list(zip(*rows, strict=True))
    figure = plots.new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    left.plot(columns[0], columns[1], color=plots.INK, label="1 / (2S - 1)")
    left.plot(columns[0], columns[2], "o", color=plots.COLOURS[0], label=names[0])
    left.plot(columns[0], columns[3], "s", color=plots.COLOURS[1], label=names[1])
    left.set(xlabel="scale S", ylabel="mean IoU of two masks")
    right.plot(columns[0], columns[4], color=plots.INK, label="expected")
    right.plot(columns[0], columns[5], "o", color=plots.COLOURS[0], label="parameters of a MaskedMLP")
    right.axhline(1, color=plots.COLOURS[2], linestyle="--", label="single model")
    right.axhline(N, color=plots.COLOURS[1], linestyle="--", label=f"ensemble of {N}")
    right.set(xlabel="scale S", ylabel="size against the single model")
    for ax in (left, right):
        ax.legend(frameon=False)
    plots.save_figure(figure, path)
    return markdown_table(header, lines)


# --- the job ---------------------------------------------------------------------------------------------


def run(settings: Settings) -> Path:
    """Trains, evaluates, draws, and writes masksembles.md and its pictures; the path of the page."""
    part = slice(settings.largest)
    digits, test = load_mnist(settings.data / "mnist")
    outside = {
        "Fashion-MNIST": load_idx(settings.data / "fashion-mnist", "t10k").images,
        "notMNIST": load_idx(settings.data / "notmnist-small", "notMNIST_small").images,
    }
    # Shuffled, for notMNIST is sorted by class.
    shuffle = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(digits.labels), generator=shuffle)[part]
    held_out = round(VALIDATION * len(order))
    validation, training = (
        Split(digits.images[rows], digits.labels[rows]) for rows in order.tensor_split((held_out,))
    )
    test = Split(test.images[part], test.labels[part])
    outside = {
        name: images[torch.randperm(len(images), generator=shuffle)[part]] for name, images in outside.items()
    }

    settings.output.mkdir(parents=True, exist_ok=True)
    stem = f"masksembles{settings.suffix}"
    pictures = {what: settings.output / f"{stem}-{what}.png" for what in ("figure4", "masks", "noise")}
    entropies = figure_4(settings, pictures["figure4"])
    masks = iou_and_size(settings, pictures["masks"])
    methods, rates = train_methods(training, validation, settings)
    table = table_1(methods, test, outside)
    noise = noise_table(methods, test, settings.seed, pictures["noise"])

    widths = "-".join(map(str, (digits.images.shape[1], *settings.hidden, int(digits.labels.max()) + 1)))
    page = [
        "# Masksembles",
        "",
        "Made by `python -m benchmarks.papers.masksembles`, which says what differs from the paper, and why.",
        "",
        f"float32, seed {settings.seed}, on {provenance()}.",
        "",
        f"## Table 1: MNIST, MLPs {widths}, N = {N}, {settings.epochs} epochs",
        "",
        *table,
        "",
        f"{len(training.labels)} training images, {len(test.labels)} test images, out of distribution "
        + " and ".join(f"{len(images)} of {name}" for name, images in outside.items())
        + "; the score is the predictive entropy. Sizes and times against the single model's. The paper's "
        "columns are of CIFAR-10 and SVHN, with Wide-ResNet-16-4.",
        "",
        "MC dropout's rate by the NLL on validation images: "
        + ", ".join(f"{rate}: {nll:.4f}" for rate, nll in rates.items())
        + ". Its time is that of one rate.",
        "",
        "## Figure 6: accuracy and ECE under Gaussian noise",
        "",
        *noise,
        "",
        f"![accuracy and ECE]({pictures['noise'].name})",
        "",
        "## Figure 4: from a single model to an ensemble",
        "",
        f"![two sinusoids]({pictures['figure4'].name})",
        "",
        *entropies,
        "",
        f"Predictive entropies in nats, means over {len(settings.figure_seeds)} seeds of data, masks and "
        "weights (± standard deviation); far is further than 1 from every training point, in the picture.",
        "",
        "## Masks: IoU and size against S",
        "",
        *masks,
        "",
        f"![IoU and size]({pictures['masks'].name})",
        "",
        f"Sizes are of MLPs 784-256-256-10 for N = {N}. The matrix between two hidden layers holds weights "
        "that no mask uses, ever more of them as S grows, which an ensemble has not: so the size goes beyond "
        f"{N}×. `MaskedMLP.compact()` leaves them out.",
        *_speed(settings),
        "",
    ]
    path = settings.output / f"{stem}.md"
    harness.write(path, "\n".join(page))
    return path


SPEED_NOTES = (
    "On the targets. 10× the layer was set against a layer of 141 ms, which this one is far from. "
    "It multiplies whole matrices, of which a mask leaves 1 in 2.7 "
    "weights, so 10× would take a layer at about a quarter of the speed of pyens in operations per second, "
    "and pyens is near the machine's peak: there is little left to gain. `copy_` writes into a buffer that "
    "is there already; `mask_channels` makes a new tensor, whose pages the system has to provide first, as "
    "`clone` does: it is slower than the one and faster than the other."
)


def _speed(settings: Settings) -> list[str]:
    """The saved result of benchmarks.masksembles, where there is one."""
    stem = f"masksembles-cpu-float32{settings.suffix}"
    saved = settings.output / f"{stem}.json"
    if not saved.exists():
        return []
    lines = ["", "## Speed", "", "Made by `python -m benchmarks.masksembles`.", ""]
    lines += [harness.markdown(harness.Report.load(saved)), "", SPEED_NOTES, "", f"![speed]({stem}.png)"]
    if (settings.output / f"{stem}-scale.png").exists():
        lines += ["", f"![cost against S]({stem}-scale.png)"]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.masksembles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--output", type=Path, default=harness.RESULTS, help="folder for page and pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="smoke test: few images, small models")
    flags = parser.parse_args(argv)
    try:
        path = run(Settings(flags.data, flags.output, flags.seed, flags.quick))
    except FileNotFoundError as error:
        parser.error(f"--data: {error}")
    print(path.read_text(encoding="utf-8"))
    print(f"wrote {path} and its pictures")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
