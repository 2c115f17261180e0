"""Ensembles of models for tables, trained under a randomness setting, and what varies between their members.

What the reproductions of "Beyond Point Estimate: Inferring Ensemble Prediction Variation from Neuron
Activation Strength in Recommender Systems" have in common. One task under one setting is a unit: it is
trained once, taken up again where it was killed, and its prediction variation and first member are kept in a
working folder for the commands that need them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.papers.pages import markdown_table, provenance
from pyens import _files, metrics, ops, plots
from pyens.data.table import Table
from pyens.nn import TabularEnsemble
from pyens.optim import fused
from pyens.training import History, Randomness, derive_seed, fit, member_seeds
from pyens.training.randomness import CODES

SETTINGS = CODES  # R0 to R7
SOURCES = ("none", "R", "S", "R+S", "J", "R+J", "S+J", "R+S+J")
CHUNK = 1024  # test rows that all members look at together


@dataclass(frozen=True)
class Task:
    """What a model predicts, and how it is trained."""

    name: str
    title: str
    embedding_dims: tuple[int, ...]  # of the categorical columns
    outputs: int  # 1, or the number of classes
    loss: str  # mse, bce or cross_entropy
    temperature: float = 1.0
    hidden: tuple[int, ...] = (50, 20, 10)
    epochs: int = 20
    patience: int | None = 3  # epochs without a lower validation loss
    batch_size: int = 1024
    learning_rate: float = 1e-2
    embedding_std: float = 0.05

    def model(self, members: int, table: Table, *, dropout: float = 0.0) -> TabularEnsemble:
        return TabularEnsemble(
            members,
            list(zip(table.categories, self.embedding_dims, strict=True)),
            table.numeric.shape[1],
            self.hidden,
            self.outputs,
            dropout=dropout,
            embedding_std=self.embedding_std,
        )

    def data(self, table: Table, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `pyens.training.fit` takes."""
        chosen = table.rows(rows)
        return chosen.categorical, chosen.numeric, self.target(chosen.target)

    def target(self, target: Tensor) -> Tensor:
        """Classes of a rating, 0 to 4, or a column of numbers."""
        return target.long() - 1 if self.loss == "cross_entropy" else target.unsqueeze(1)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return fused(torch.optim.Adam, parameters, lr=self.learning_rate)

    def variation(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean prediction (of a class, a probability) and PV of each example, from outputs [E, B, K]."""
        if self.loss == "cross_entropy":
            result = ops.predictive_uncertainty(outputs / self.temperature)
            return result.mean_probability, result.distribution_pv
        moments = ops.predictive_moments(self.predictions(outputs))
        return moments.mean, moments.std

    def predictions(self, outputs: Tensor) -> Tensor:
        """What each member says: a value or probability [E, B], or probabilities of all classes [E, B, K]."""
        if self.loss == "cross_entropy":
            return (outputs / self.temperature).softmax(-1)
        values = outputs.squeeze(-1)
        return values.sigmoid() if self.loss == "bce" else values

    def measures(self, mean: Tensor, pv: Tensor, target: Tensor) -> dict[str, float]:
        """A row of the document's Table 1: how good the ensemble is, and how much its members vary."""
        result = {}
        if self.loss == "mse":
            result["MSE"] = (mean.double() - target).square().mean().item()
            result["ACC"] = (mean.round().clamp(1, 5) == target).double().mean().item()
        elif self.loss == "cross_entropy":
            labels = self.target(target)
            result["ACC"] = metrics.accuracy(mean, labels).item()
            result["NLL"] = metrics.nll(mean, labels).item()
        else:
            result["AUC"] = metrics.auroc(mean, target == 1).item()
            result["NLL"] = F.binary_cross_entropy(mean.double(), target.double()).item()
        result["PV mean"] = pv.double().mean().item()
        result["PV std"] = pv.double().std(correction=0).item()
        if self.loss != "cross_entropy":
            result["coeff"] = metrics.variation_coefficient(pv, mean).item()
        return result


@dataclass(frozen=True)
class Unit:
    """An ensemble after training."""

    task: str
    setting: str
    measures: dict[str, float]
    training_seconds: float
    prediction_seconds: float
    epochs: list[int]  # that each member trained for
    diverged: int  # members
    pv: Tensor  # float32 [test rows]
    mean: Tensor  # float32 [test rows] or [test rows, K]
    member: dict[str, Tensor]  # the weights of member 0
    made: str  # where, by which commit and when

    def aggregates(self) -> dict[str, Any]:
        """What may be published: nothing of a single rating."""
        return {
            "measures": self.measures,
            "training_seconds": self.training_seconds,
            "prediction_seconds": self.prediction_seconds,
            "mean_epochs": sum(self.epochs) / len(self.epochs),
            "member_epochs": sum(self.epochs),
            "diverged": self.diverged,
            "made": self.made,
        }


@dataclass(frozen=True)
class Study:
    """A data set, the folder in which its units are kept, and how they are made."""

    table: Table
    work: Path
    members: int
    seed: int

    def unit(self, task: Task, setting: str) -> Unit:
        """One ensemble: read if it is there, else trained, from its last checkpoint on if there is one."""
        stem = f"{task.name}-{setting}-{self.members}"
        path = self.work / f"{stem}.pt"
        described = self.described(task, setting)
        if path.exists():
            return Unit(**read(path, described)["unit"])
        self.work.mkdir(parents=True, exist_ok=True)
        unit = self._train(task, setting, stem)
        _files.save({"made by": described, "unit": asdict(unit)}, path)
        (self.work / f"{stem}.checkpoint").unlink()
        return unit

    def trained(self, task: Task) -> dict[str, Unit]:
        """The units that are there already, by setting."""
        stems = {setting: f"{task.name}-{setting}-{self.members}.pt" for setting in SETTINGS}
        return {s: self.unit(task, s) for s, stem in stems.items() if (self.work / stem).exists()}

    def _train(self, task: Task, setting: str, stem: str) -> Unit:
        print(f"{task.title}, {setting}, {self.members} members", flush=True)
        model = task.model(self.members, self.table)
        checkpoint = self.work / f"{stem}.checkpoint"
        history = self.fit_ensemble(task, model, setting, checkpoint=checkpoint, checkpoint_every=4)
        history.to_csv(self.work / f"{stem}.csv")
        start = time.perf_counter()
        mean, pv = self.predict(task, model)
        return Unit(
            task.name,
            setting,
            task.measures(mean, pv, self.table.target[self.table.test]),
            float(history.seconds.sum()),
            time.perf_counter() - start,
            history.epochs.tolist(),
            int(history.diverged.sum()),
            pv,
            mean,
            model.select([0]).state_dict(),
            provenance(),
        )

    def fit_ensemble(self, task: Task, model: TabularEnsemble, setting: str, **options: Any) -> History:
        """Trains all members on the training rows; `options` are those of `pyens.training.fit`."""
        return fit(
            model,
            task.data(self.table, self.table.train),
            loss=task.loss,
            temperature=task.temperature,
            epochs=task.epochs,
            batch_size=task.batch_size,
            optimizer=task.optimizer,
            randomness=Randomness.from_code(setting),
            seed=self.seed,
            validation=0.05 if task.patience else 0.0,
            early_stopping=task.patience,
            **options,
        )

    @torch.no_grad()
    def predict(
        self, task: Task, model: TabularEnsemble, *, dropout_seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and PV of all test rows, all members on a chunk of rows at a time."""
        model.eval()
        parts = []
        chunks = self.table.test.split(CHUNK)
        for i, rows in enumerate(tqdm(chunks, desc="predicting", leave=False, disable=None)):
            seeds = {}
            if dropout_seed is not None:
                drawn = [derive_seed(dropout_seed, i, m) for m in range(model.ensemble_size)]
                seeds["dropout_seeds"] = torch.tensor(drawn)
            chosen = self.table.rows(rows)
            parts.append(task.variation(model(chosen.categorical, chosen.numeric, **seeds)))
        mean, pv = (torch.cat(part) for part in zip(*parts, strict=True))
        return mean, pv

    def mc_dropout(self, task: Task, variation: Tensor, *, rate: float = 0.2, passes: int = 100) -> dict:
        """One model trained with dropout; how the PV of its passes compares with an ensemble's."""
        model = task.model(1, self.table, dropout=rate)
        history = self.fit_ensemble(task, model, "R3", seeds=member_seeds(self.seed, 1))
        mean, pv = self.predict(task, model.select([0] * passes), dropout_seed=self.seed)
        return {
            "measures": task.measures(mean, pv, self.table.target[self.table.test]),
            "training_seconds": float(history.seconds.sum()),
            "epochs": int(history.epochs[0]),
            "pearson": metrics.pearson(pv, variation).item(),
            "rmse": metrics.rmse(pv, variation).item(),
            "r_squared": metrics.r_squared(pv, variation).item(),
        }

    def loop(self, task: Task, *, models: int = 2, steps: int = 200) -> float:
        """Seconds of a training step of one plain model in a loop over models, measured on a few.

        A model of `torch.nn`, fused Adam, batches by index_select: what a user would write who trains one
        model after the other. With one thread or all, whichever is faster.
        """
        data = task.data(self.table, self.table.train)
        threads = torch.get_num_threads()
        best = float("inf")
        try:
            for count in {1, threads}:
                torch.set_num_threads(count)
                seconds = [_plain_steps(task, self.table, data, seed, steps) for seed in range(models)]
                best = min(best, sum(seconds) / models)
        finally:
            torch.set_num_threads(threads)
        return best

    def described(self, task: Task, setting: str) -> str:
        """What a file in the working folder was made by."""
        shape = f"{len(self.table.train)} training rows, {len(self.table.test)} test rows"
        return f"{task}, {setting}, {self.members} members, seed {self.seed}, {shape}"


def read(path: Path, described: str) -> dict[str, Any]:
    """A file of the working folder.

    Raises:
        ValueError: one that was made by another task, setting, seed or data.
    """
    saved = _files.load(path)
    if saved["made by"] != described:
        raise ValueError(f"{path} was made by {saved['made by']}, not {described}: move it away")
    return saved


class PlainModel(nn.Module):
    """One member as `torch.nn` has it."""

    def __init__(self, task: Task, table: Table) -> None:
        super().__init__()
        sizes = zip(table.categories, task.embedding_dims, strict=True)
        self.embeddings = nn.ModuleList(nn.Embedding(*size) for size in sizes)
        widths = [sum(task.embedding_dims) + table.numeric.shape[1], *task.hidden]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], task.outputs))

    def forward(self, categorical: Tensor, numeric: Tensor) -> Tensor:
        columns = zip(self.embeddings, categorical.unbind(1), strict=True)
        return self.mlp(torch.cat([*(embedding(column) for embedding, column in columns), numeric], 1))


def _plain_steps(task: Task, table: Table, data: Sequence[Tensor], seed: int, steps: int) -> float:
    """Seconds per step."""
    torch.manual_seed(seed)
    model = PlainModel(task, table)
    optimizer = torch.optim.Adam(model.parameters(), lr=task.learning_rate, fused=True)
    order = torch.randperm(len(data[0]))
    batches = order.split(task.batch_size)
    for step in range(-5, steps):  # the first ones to warm up
        if step == 0:
            start = time.perf_counter()
        categorical, numeric, target = (t.index_select(0, batches[step % len(batches)]) for t in data)
        output = model(categorical, numeric)
        if task.loss == "cross_entropy":
            loss = F.cross_entropy(output / task.temperature, target)
        elif task.loss == "mse":
            loss = F.mse_loss(output, target)
        else:
            loss = F.binary_cross_entropy_with_logits(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / steps


def table_1(entries: dict[str, Any], columns: Sequence[str], paper: Sequence[Sequence[float]]) -> list[str]:
    """The document's Table 1 of one task: our measures, and small beside them the document's."""
    rows = []
    for setting, sources, printed in zip(SETTINGS, SOURCES, paper, strict=True):
        if setting not in entries:
            continue
        entry = entries[setting]
        cells = [
            f"{number(name, entry['measures'][name])} <sub>{number(name, value)}</sub>"
            for name, value in zip(columns, printed, strict=True)
        ]
        minutes = (entry["training_seconds"] + entry["prediction_seconds"]) / 60
        rows.append([f"{setting} {sources}", *cells, f"{entry['mean_epochs']:.1f}", f"{minutes:.1f}"])
    return markdown_table(["setting", *columns, "epochs", "minutes"], rows)


def number(name: str, value: float) -> str:
    return f"{value:.2%}" if name == "coeff" else f"{value:.4f}"


def correlations(units: dict[str, Unit]) -> dict[str, float]:
    """Pearson correlation of PV for each pair of settings, R0 without, as {"R1-R2": ...}."""
    pairs = combinations([setting for setting in SETTINGS[1:] if setting in units], 2)
    return {f"{one}-{other}": metrics.pearson(units[one].pv, units[other].pv).item() for one, other in pairs}


def settings_matrix(pairs: dict[str, float], ax: Axes) -> None:
    """A heat map of what `correlations` found."""
    names = [setting for setting in SETTINGS[1:] if any(setting in pair.split("-") for pair in pairs)]
    if not names:
        return
    matrix = torch.eye(len(names))
    for i, j in combinations(range(len(names)), 2):
        matrix[i, j] = matrix[j, i] = pairs[f"{names[i]}-{names[j]}"]
    plots.correlation_matrix(matrix, names, ax=ax)
