"""Variation estimators of trained ensembles, and how well they do: what `variation.py` reports.

The test rows of a task fall into two seeded halves: De1, on which estimators are trained, and De2, on which
everything is measured. Statistics of hidden units are over the training rows of the target model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.papers.ensembles import CHUNK, Study, Task, read
from pyens import _files, metrics, ops
from pyens.data.table import split
from pyens.nn import TabularEnsemble
from pyens.training import derive_seed, member_seeds
from pyens.variation import (
    ActivationStatistics,
    VariationEstimator,
    VariationModel,
    fit_together,
    strength_features,
    strength_of,
)

BLOCK = 8192  # rows that one model looks at together


@dataclass(frozen=True)
class Source:
    """What an estimator is trained on: a target model, and the PV of an ensemble."""

    state: dict[str, Tensor]  # weights of the model
    pv: Tensor  # [test rows]


@dataclass(frozen=True)
class Estimation:
    """A task whose ensembles a study has trained, and the estimators made of them."""

    study: Study
    task: Task
    params: Mapping[str, Any] = field(default_factory=dict)  # of the estimators, where not the defaults

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """De1 and De2: places in the test rows."""
        return split(len(self.study.table.test), 0.5, derive_seed(self.study.seed, "De"))

    def sources(self, settings: Iterable[str]) -> dict[str, Source]:
        """Member 0 and PV of the ensembles, which are trained if they are not there."""
        units = {setting: self.study.unit(self.task, setting) for setting in settings}
        return {setting: Source(unit.member, unit.pv) for setting, unit in units.items()}

    def models(self, kind: str, sources: Mapping[str, Source], **params: Any) -> dict[str, VariationModel]:
        """Target model and estimator of each source, read if they are there; all others are trained at once.

        `kind` tells apart, in the names of the files, estimators of different `params`.
        """
        params = {**self.params, **params}
        stem = f"{self.task.name}-{{}}-{self.study.members}-{kind}.pt"
        paths = {name: self.study.work / stem.format(name) for name in sources}
        missing = [name for name, path in paths.items() if not path.exists()]
        if missing:
            print(f"{self.task.title}: estimators ({kind}) of {', '.join(missing)}", flush=True)
            first, _ = self.halves
            targets = {name: self.target(sources[name]) for name in missing}
            statistics = {name: self.statistics(targets[name]) for name in missing}
            estimators = fit_together(
                [VariationEstimator(**params, progress=True) for _ in missing],
                [self.features(targets[name], *statistics[name], first) for name in missing],
                [sources[name].pv[first] for name in missing],
            )
            for name, estimator in zip(missing, estimators, strict=True):
                VariationModel(targets[name], estimator.head_, *statistics[name]).save(paths[name])
        models = {name: VariationModel.load(path) for name, path in paths.items()}
        for name, model in models.items():
            expected = VariationEstimator(**params, progress=True).get_params()
            same = all(
                torch.equal(sources[name].state[key], t) for key, t in model.target.state_dict().items()
            )
            if not same or model.head.params != expected:
                raise ValueError(f"{paths[name]} was made of another model or with other parameters: move it")
        return models

    def target(self, source: Source) -> TabularEnsemble:
        model = self.task.model(1, self.study.table)
        model.load_state_dict(source.state)
        return model.eval()

    def statistics(self, target: TabularEnsemble) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the hidden units over the training rows."""
        statistics = ActivationStatistics()
        for rows in self.study.table.train.split(BLOCK):
            statistics.observe(target, *self._inputs(rows))
        return statistics.mean, statistics.std

    def features(self, target: TabularEnsemble, mean: Tensor, std: Tensor, places: Tensor) -> Tensor:
        """What estimators take, `[len(places), 2 ΣH]`, of these test rows."""
        parts = [
            strength_features(strength_of(target, *self._inputs(rows), mean=mean, std=std))
            for rows in self.study.table.test[places].split(BLOCK)
        ]
        return torch.cat(parts)

    def serve(self, model: VariationModel, places: Tensor) -> Tensor:
        """The estimated variation of these test rows."""
        blocks = self.study.table.test[places].split(BLOCK)
        return torch.cat([model(*self._inputs(rows))[1] for rows in blocks])

    def fresh(self, count: int) -> dict[str, Source]:
        """Target models trained under R3 with seeds of their own; the PV is that of the ensemble under R3."""
        path = self.study.work / f"{self.task.name}-fresh-{count}.pt"
        described = self.study.described(self.task, f"R3, {count} fresh")
        if not path.exists():
            print(f"{self.task.title}: {count} fresh target models", flush=True)
            model = self.task.model(count, self.study.table)
            seeds = [derive_seed(self.study.seed, "fresh", i) for i in range(count)]
            self.study.fit_ensemble(self.task, model, "R3", seeds=seeds)
            states = [model.select([i]).state_dict() for i in range(count)]
            _files.save({"made by": described, "states": states}, path)
        pv = self.study.unit(self.task, "R3").pv
        return {f"fresh{i + 1}": Source(state, pv) for i, state in enumerate(read(path, described)["states"])}

    def universe(self, members: int, rows: int) -> Tensor:
        """What many members say on the first test rows, under R3: float32 `[E, rows]`, or `[E, rows, K]`
        probabilities.

        They are trained in chunks of the study's number of members, and a chunk that is there is not trained
        again. The first are the members of the ensemble under R3.
        """
        seeds = member_seeds(self.study.seed, members)
        chunks = []
        for start in range(0, members, self.study.members):
            stop = min(start + self.study.members, members)
            stem = f"{self.task.name}-universe-{start}-{stop}"
            path = self.study.work / f"{stem}.pt"
            described = self.study.described(self.task, f"R3, members {start} to {stop}, {rows} rows")
            if not path.exists():
                print(f"{self.task.title}: members {start} to {stop} of {members}", flush=True)
                model = self.task.model(stop - start, self.study.table)
                checkpoint = self.study.work / f"{stem}.checkpoint"
                self.study.fit_ensemble(
                    self.task,
                    model,
                    "R3",
                    seeds=seeds[start:stop],
                    checkpoint=checkpoint,
                    checkpoint_every=4,
                )
                _files.save({"made by": described, "outputs": self._outputs(model, rows)}, path)
                checkpoint.unlink()
            chunks.append(read(path, described)["outputs"])
        return torch.cat(chunks)

    @torch.no_grad()
    def _outputs(self, model: TabularEnsemble, rows: int) -> Tensor:
        model.eval()
        parts = []
        for block in tqdm(self.study.table.test[:rows].split(CHUNK), leave=False, disable=None):
            parts.append(self.task.predictions(model(*self._inputs(block))))
        return torch.cat(parts, 1)

    def _inputs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = self.study.table.rows(rows)
        return chosen.categorical, chosen.numeric


def quality(estimate: Tensor, pv: Tensor) -> dict[str, float]:
    """A row of the document's Table 2, and what a best straight line through the estimates would explain."""
    return {
        "mse": metrics.rmse(estimate, pv).item() ** 2,
        "r_squared": metrics.r_squared(estimate, pv).item(),
        "pearson": metrics.pearson(estimate, pv).item(),
    }


def buckets(probabilities: Tensor, pv: Tensor, thresholds: Tensor) -> dict[str, Any]:
    """Figures 4 and 5: AUC of each bucket against the others, and the confusion matrix in counts."""
    bucket = torch.searchsorted(thresholds, pv.double(), right=True)
    present = range(probabilities.shape[1])
    return {
        "auc": [metrics.auroc(probabilities[:, k].contiguous(), bucket == k).item() for k in present],
        "accuracy": metrics.accuracy(probabilities, bucket).item(),
        "confusion": metrics.confusion_matrix(probabilities, bucket).tolist(),
        "thresholds": thresholds.tolist(),
    }


def importance(
    estimator: VariationEstimator, features: Tensor, pv: Tensor, *, rows: int = 20_000, seed: int = 0
) -> Tensor:
    """float64 `[ΣH]`: how much the squared error grows when a unit's columns are those of other examples."""
    features, pv = features[:rows], pv[:rows]
    units = features.shape[1] // 2
    other = torch.randperm(len(pv), generator=torch.Generator().manual_seed(seed))

    def error(table: Tensor) -> float:
        return metrics.rmse(torch.from_numpy(estimator.predict(table)), pv).item() ** 2

    whole = error(features)
    growth = []
    for unit in range(units):
        mixed = features.clone()
        mixed[:, [unit, units + unit]] = features[other][:, [unit, units + unit]]
        growth.append(error(mixed) - whole)
    return torch.tensor(growth, dtype=torch.float64)


def kept_units(
    ranking: Tensor, widths: Sequence[int], shares: Sequence[float], seed: int = 0
) -> dict[str, Tensor]:
    """bool `[ΣH]` masks of which units are kept: the most important, random ones, or one layer's."""
    units = len(ranking)
    descending = ranking.argsort(descending=True)
    drawn = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    masks = {}
    for share in shares:
        count = max(1, round(share * units))
        for name, order in (("important", descending), ("random", drawn)):
            masks[f"{name} {share:g}"] = torch.zeros(units, dtype=torch.bool).index_fill(
                0, order[:count], True
            )
    layer = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
    masks |= {f"layer {i + 1}": layer == i for i in range(len(widths))}
    return masks


def delta(universe: Tensor, sizes: Sequence[int], *, distribution: bool, seed: int) -> dict[str, Any]:
    """Figure 6, from 20 draws of each size: of all members, and without those that say the same of every row.

    Such a member has died in training, its last hidden units silent for whatever comes in. One among many is
    as far from the others as ten of them, so whether a draw has it decides about the whole ratio.
    """
    kind = "distribution" if distribution else "value"
    spread = universe.amax(1) - universe.amin(1)
    alive = spread.reshape(len(spread), -1).amax(1) > 1e-4
    sizes = [size for size in sizes if size <= int(alive.sum())]
    entry: dict[str, Any] = {"sizes": sizes, "dead": int((~alive).sum())}
    for suffix, members in (("", universe), ("_alive", universe[alive])):
        found = metrics.delta_ratio(members, sizes, variation=kind, seed=seed)
        entry |= {f"mean{suffix}": found.mean.tolist(), f"std{suffix}": found.std.tolist()}
    return entry


def variation_of(universe: Tensor) -> Tensor:
    """PV `[rows]` of what `Estimation.universe` returns."""
    if universe.dim() == 3:
        return ops.predictive_uncertainty(universe, from_probabilities=True).distribution_pv
    return ops.predictive_moments(universe).std
