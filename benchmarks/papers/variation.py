"""Variation estimation of the prediction variation document: Tables 2 to 4, Figures 4 to 6, and beyond them.

    python -m benchmarks.papers.variation --data DIR                          # MovieLens, all parts
    python -m benchmarks.papers.variation --criteo DIR                        # the same for a Criteo sample
    python -m benchmarks.papers.variation --data DIR --part tables --task R   # one part of one task

"Beyond Point Estimate: Inferring Ensemble Prediction Variation from Neuron Activation Strength in Recommender
Systems" (Chen et al., 2020). The ensembles are those of `benchmarks.papers.movielens` and `criteo`, read from
their working folders; what is missing is trained. The target model of a task under a setting is member 0 of
its ensemble. The parts, each of which can be killed and takes up what it had finished:

    tables    Table 2 (R² under R1 to R7), Table 3 (binary features only), Table 4 (five fresh target models),
              Figures 4 and 5 (buckets)
    neurons   R² against the share of hidden units that the estimator sees
    transfer  whether an estimator that was fitted under one setting serves another
    targets   whether a low R² is due to the target model or to the PV: every PV from every target model
    delta     Figure 6: the PV of N members against that of a universe of 1000

What the document leaves open, and what was chosen: 10 % of De1 for early stopping, after 10 epochs without a
lower loss; the PV is standardised for training (the learning rate is the document's).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.axes import Axes

from benchmarks import harness
from benchmarks.papers import criteo, estimation, movielens
from benchmarks.papers.ensembles import SETTINGS, Study
from benchmarks.papers.estimation import Estimation, Source
from benchmarks.papers.pages import Results, markdown_table, publish
from pyens import metrics, plots
from pyens.data import load_criteo, load_movielens
from pyens.variation import VariationEstimator, fit_together

PARTS = ("tables", "neurons", "transfer", "targets", "delta")
TITLES = {task.name: task.title for task in (*movielens.TASKS.values(), criteo.TASK)}
FRESH = 5
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
UNIVERSE_ROWS = 20_000
SIZES = (2, 5, 10, 20, 50, 100, 200, 500)
# R² of R1 to R7 (Table 2); of binary features alone (Table 3); deviation of R² (Table 4).
PAPER = {
    "movielens-r": ((0.5416, 0.5636, 0.5514, 0.3885, 0.5219, 0.4938, 0.5123), 0.4196, 0.0190),
    "movielens-c": ((0.4586, 0.4683, 0.4569, 0.3386, 0.4646, 0.4125, 0.4368), 0.3408, 0.0133),
    "criteo": ((0.7617, 0.7863, 0.8100, 0.7817, 0.7868, 0.7739, 0.7761), 0.6210, 0.0098),
}


# --- parts ----------------------------------------------------------------------------------------------


def tables(made: Estimation, results: Results, flags: argparse.Namespace) -> None:
    """Tables 2 to 4, Figures 4 and 5."""
    _, second = made.halves
    name = made.task.name
    sources = made.sources(flags.settings)
    for setting, model in made.models("both", sources).items():
        entry = estimation.quality(made.serve(model, second), sources[setting].pv[second])
        results.merge(f"{name} table 2", {setting: entry})
    if "R3" not in flags.settings:
        return
    pv = sources["R3"].pv[second]
    binary = made.models("binary", {"R3": sources["R3"]}, features="binary")["R3"]
    entry = estimation.quality(made.serve(binary, second), pv)
    results.merge(f"{name} table 3", {"binary": entry})
    for run, model in made.models("both", made.fresh(FRESH)).items():
        results.merge(f"{name} table 4", {run: estimation.quality(made.serve(model, second), pv)})
    model = made.models("buckets", {"R3": sources["R3"]}, task="classification")["R3"]
    entry = estimation.buckets(made.serve(model, second), pv, model.head.thresholds)
    results.merge(f"{name} buckets", {"R3": entry})


def neurons(made: Estimation, results: Results, flags: argparse.Namespace) -> None:
    """R² of estimators that see some of the hidden units, under R3; the columns of the others are 0."""
    first, second = made.halves
    source = made.sources(["R3"])["R3"]
    model = made.models("both", {"R3": source})["R3"]
    features = made.features(model.target, model.mean, model.std, first)
    whole = VariationEstimator.from_model(model)
    ranking = estimation.importance(whole, features, source.pv[first], seed=flags.seed)
    masks = estimation.kept_units(ranking, model.target.mlp.hidden_features, SHARES, seed=flags.seed)
    estimators = fit_together(
        [VariationEstimator(**made.params, progress=True) for _ in masks],
        [features * mask.repeat(2) for mask in masks.values()],
        [source.pv[first]] * len(masks),
    )
    features = made.features(model.target, model.mean, model.std, second)
    for (name, mask), estimator in zip(masks.items(), estimators, strict=True):
        estimate = torch.from_numpy(estimator.predict(features * mask.repeat(2)))
        entry = {"units": int(mask.sum())} | estimation.quality(estimate, source.pv[second])
        results.merge(f"{made.task.name} neurons", {name: entry})
    silent = int((model.std == 0).sum())
    results.merge(f"{made.task.name} neurons", {"silent": {"units": silent}})


def transfer(made: Estimation, results: Results, flags: argparse.Namespace) -> None:
    """Each estimator on PVs of other settings: with its own target model, and with the other's."""
    _, second = made.halves
    sources = made.sources(flags.settings)
    models = made.models("both", sources)
    for setting, model in models.items():
        own = made.serve(model, second)
        entry: dict[str, Any] = {"own": {}, "other": {}}
        for other, their in models.items():
            pv = sources[other].pv[second]
            entry["own"][other] = estimation.quality(own, pv)
            moved = type(model)(their.target, model.head, their.mean, their.std)
            entry["other"][other] = estimation.quality(made.serve(moved, second), pv)
        results.merge(f"{made.task.name} transfer", {setting: entry})


def targets(made: Estimation, results: Results, flags: argparse.Namespace) -> None:
    """The PV of each setting from the target model of each, and of R0, with an estimator for every pair."""
    _, second = made.halves
    sources = made.sources(flags.settings)
    for setting, source in (made.sources(["R0"]) | sources).items():
        pairs = {other: setting if other == setting else f"{setting}-{other}" for other in sources}
        models = made.models(
            "both", {pair: Source(source.state, sources[other].pv) for other, pair in pairs.items()}
        )
        std = next(iter(models.values())).std
        entry = {
            "epochs": made.study.unit(made.task, setting).epochs[0],
            "silent": int((std == 0).sum()),
            "r_squared": {
                other: metrics.r_squared(made.serve(models[pair], second), sources[other].pv[second]).item()
                for other, pair in pairs.items()
            },
        }
        results.merge(f"{made.task.name} targets", {setting: entry})


def delta(made: Estimation, results: Results, flags: argparse.Namespace) -> None:
    """Figure 6."""
    rows = min(UNIVERSE_ROWS, len(made.study.table.test))
    universe = made.universe(flags.universe, rows)
    sizes = [size for size in SIZES if size < flags.universe]
    entry = estimation.delta(universe, sizes, distribution=made.task.loss == "cross_entropy", seed=flags.seed)
    ensemble = made.study.unit(made.task, "R3").pv[:rows]
    again = estimation.variation_of(universe[: flags.members])
    entry |= {
        "members": flags.universe,
        "rows": rows,
        "pearson_of_the_ensemble": metrics.pearson(again, ensemble).item(),
    }
    results.merge(f"{made.task.name} delta", {"R3": entry})


# --- the page -------------------------------------------------------------------------------------------


def page(results: Results, pictures: Mapping[str, str], members: int) -> str:
    """The whole result page, from the aggregates of all runs so far."""
    lines = [
        "# Variation estimation",
        "",
        "Made by `python -m benchmarks.papers.variation`, which says what the document leaves open and what "
        f"was chosen. PV of ensembles of {members}, estimated from the hidden units of member 0; the smaller "
        "figures are the document's. All numbers are of De2. Criteo is a sample of some ten thousand rows, "
        "where the document has 45 million: its numbers show that the method runs, not what it reaches.",
    ]
    for name in TITLES:
        for section in (_table_2, _features_and_fresh, _buckets, _neurons, _transfer, _targets, _delta):
            text = section(results, name)
            lines += ["", *text] if text else []
    lines += ["", "## Pictures", ""]
    lines += [f"![{title}]({path})" for title, path in pictures.items()]
    stamps = {entry["made"] for section in results.content.values() for entry in section.values()}
    lines += ["", "## Where it ran", "", *(f"- {stamp}" for stamp in sorted(stamps)), ""]
    return "\n".join(lines)


def _beside(value: float, printed: float | None) -> str:
    return f"{value:.4f}" + ("" if printed is None else f" <sub>{printed:.4f}</sub>")


def _table_2(results: Results, name: str) -> list[str]:
    entries = results.section(f"{name} table 2")
    if not entries:
        return []
    paper = dict(zip(SETTINGS[1:], PAPER[name][0], strict=True))
    rows = [
        [
            setting,
            _beside(e["r_squared"], paper[setting]),
            f"{e['mse']:.3g}",
            f"{e['pearson']:.4f}",
        ]
        for setting, e in sorted(entries.items())
    ]
    average = mean(e["r_squared"] for e in entries.values())
    if len(entries) == len(paper):
        rows.append(["mean", _beside(average, mean(paper.values())), "", ""])
    return [
        f"## {TITLES[name]}: R² of the estimated PV (Table 2)",
        "",
        *markdown_table(["setting", "R²", "MSE", "Pearson"], rows),
    ]


def _features_and_fresh(results: Results, name: str) -> list[str]:
    binary, fresh = results.section(f"{name} table 3"), results.section(f"{name} table 4")
    both = results.section(f"{name} table 2").get("R3")
    if not (binary and fresh and both):
        return []
    r_squared = torch.tensor([e["r_squared"] for e in fresh.values()])
    return [
        f"Table 3, R3: binary features alone {_beside(binary['binary']['r_squared'], PAPER[name][1])}, both "
        f"{_beside(both['r_squared'], PAPER[name][0][2])}. Table 4, {len(fresh)} fresh target models: R² "
        f"{', '.join(f'{value:.4f}' for value in r_squared)}; their deviation is "
        f"{_beside(r_squared.std(correction=0).item(), PAPER[name][2])}.",
    ]


def _buckets(results: Results, name: str) -> list[str]:
    entry = results.section(f"{name} buckets").get("R3")
    if not entry:
        return []
    auc = ", ".join(f"{value:.3f}" for value in entry["auc"])
    thresholds = ", ".join(f"{value:.4f}" for value in entry["thresholds"])
    return [
        f"Buckets (Figures 4 and 5, R3), lowest PV first: AUC {auc}. The document's mean over its three "
        f"tasks is .92 for the first and .89 for the last. Thresholds: {thresholds}.",
    ]


def _neurons(results: Results, name: str) -> list[str]:
    entries = results.section(f"{name} neurons")
    if not entries:
        return []
    silent = entries["silent"]["units"]
    rows = [
        [kept, str(e["units"]), f"{e['r_squared']:.4f}"] for kept, e in entries.items() if kept != "silent"
    ]
    return [
        f"Which neurons matter, {TITLES[name]} under R3 ({silent} of the units never change): R² of "
        "estimators that see only some of them. Important are those whose columns, exchanged between "
        "examples of De1, raise the error most.",
        "",
        *markdown_table(
            ["kept", "units", "R²"], sorted(rows, key=lambda row: (row[0].split()[0], int(row[1])))
        ),
    ]


def _transfer(results: Results, name: str) -> list[str]:
    entries = dict(sorted(results.section(f"{name} transfer").items()))
    if not entries:
        return []
    lines = [
        f"Does an estimator of one setting serve another? {TITLES[name]}, fitted under the setting of the "
        "row, judged by the PV of the setting of the column: R², and in brackets the squared correlation, "
        "which does not mind a PV of another size.",
    ]
    for kind, title in (
        ("own", "With its own target model"),
        ("other", "With the target model of the column"),
    ):
        rows = [
            [
                setting,
                *(
                    f"{entry[kind][other]['r_squared']:.2f} ({entry[kind][other]['pearson'] ** 2:.2f})"
                    if other in entry[kind]
                    else ""
                    for other in entries
                ),
            ]
            for setting, entry in entries.items()
        ]
        lines += ["", f"{title}:", "", *markdown_table(["", *entries], rows)]
    return lines


def _targets(results: Results, name: str) -> list[str]:
    entries = dict(sorted(results.section(f"{name} targets").items()))
    if not entries:
        return []
    found = {setting: entry["r_squared"] for setting, entry in entries.items()}
    own = {setting: row[setting] for setting, row in found.items() if setting in row}
    rows = [
        [setting, str(e["epochs"]), str(e["silent"]), *(_cell(found[setting].get(other)) for other in own)]
        for setting, e in entries.items()
    ]
    lines = [
        f"Target model or PV? {TITLES[name]}, R² of the PV of the column from the units of the target model "
        "of the row, each pair with an estimator of its own. Epochs are those that the target model trained "
        "for (it keeps the weights of the best); silent units never changed in training.",
        "",
        *markdown_table(["target model of", "epochs", "silent units", *(f"PV of {k}" for k in own)], rows),
    ]
    low = min(own, key=own.__getitem__)
    elsewhere = {setting: row[low] for setting, row in found.items() if setting != low and low in row}
    others = [value for setting, value in found[low].items() if setting != low]
    if elsewhere and others:
        best = max(elsewhere, key=elsewhere.__getitem__)
        lines += [
            "",
            f"The lowest with its own model is {low}, {own[low]:.2f}. From the other models its PV is "
            f"estimated with {min(elsewhere.values()):.2f} to {elsewhere[best]:.2f} ({best}); from its model "
            f"the PVs of the others with {min(others):.2f} to {max(others):.2f}. It trained for "
            f"{entries[low]['epochs']} epochs, that of {best} for {entries[best]['epochs']}.",
        ]
    return lines


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _delta(results: Results, name: str) -> list[str]:
    entry = results.section(f"{name} delta").get("R3")
    if not entry:
        return []
    columns = [entry[key] for key in ("mean", "std", "mean_alive", "std_alive")]
    rows = [
        [str(size), *(f"{value:.2%}" for value in values)]
        for size, *values in zip(entry["sizes"], *columns, strict=True)
    ]
    return [
        f"Delta ratio (Figure 6), {TITLES[name]}: how far the PV of N members is from that of "
        f"{entry['members']}, on {entry['rows']} test rows, mean and deviation of 20 draws. The document: "
        f"about 7 % at N = 100. {entry['dead']} of the members died in training and say the same of every "
        "row: with them, and without.",
        "",
        *markdown_table(["N", "delta ratio", "deviation", "without the dead", "deviation"], rows),
    ]


def draw_buckets(results: Results, path: Path) -> bool:
    """Figures 4 and 5."""
    found = {name: entry["R3"] for name in TITLES if (entry := results.section(f"{name} buckets"))}
    if not found:
        return False
    figure = plots.new_figure(4.5 * (1 + len(found)), 4)
    axes = figure.subplots(1, 1 + len(found), squeeze=False)[0]
    for i, (name, entry) in enumerate(found.items()):
        places = [k + 1 + (i - (len(found) - 1) / 2) * 0.8 / len(found) for k in range(len(entry["auc"]))]
        axes[0].bar(places, entry["auc"], 0.8 / len(found), color=plots.COLOURS[i], label=TITLES[name])
        names = [str(k + 1) for k in range(len(entry["auc"]))]
        plots.confusion(torch.tensor(entry["confusion"]), names, axes[i + 1])
        axes[i + 1].set(
            title=f"Figure 5: {TITLES[name]}, R3", xlabel="predicted bucket", ylabel="bucket of PV"
        )
    axes[0].set(ylim=(0.5, 1), xlabel="bucket of PV", ylabel="AUC", title="Figure 4: AUC of each bucket, R3")
    axes[0].legend(frameon=False, fontsize="small")
    plots.save_figure(figure, path)
    return True


def draw_curves(results: Results, path: Path) -> bool:
    """Figure 6, and R² against the share of units."""
    deltas = {name: entry["R3"] for name in TITLES if (entry := results.section(f"{name} delta"))}
    kept = {name: entry for name in TITLES if (entry := results.section(f"{name} neurons"))}
    if not deltas and not kept:
        return False
    figure = plots.new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    for colour, (name, entry) in zip(plots.COLOURS, deltas.items(), strict=False):
        for suffix, line, label in (("", ":", "all members"), ("_alive", "-", "without the dead")):
            mean_, std = entry[f"mean{suffix}"], entry[f"std{suffix}"]
            label = f"{TITLES[name]}, {label}"
            left.errorbar(entry["sizes"], mean_, std, fmt=line, color=colour, marker="o", label=label)
    left.set(
        xscale="log",
        xlabel="members N",
        ylabel="delta ratio",
        title="Figure 6: PV of N members",
        ylim=(0, None),
    )
    for colour, (name, entries) in zip(plots.COLOURS, kept.items(), strict=False):
        for order, line in (("important", "-"), ("random", ":")):
            points = sorted((e["units"], e["r_squared"]) for k, e in entries.items() if k.startswith(order))
            label = f"{TITLES[name]}, {order}"
            right.plot(*zip(*points, strict=True), line, color=colour, marker="o", label=label)
    right.set(xlabel="hidden units that the estimator sees", ylabel="R²", title="Which neurons matter, R3")
    for ax in (left, right):
        _tidy(ax)
    plots.save_figure(figure, path)
    return True


def _tidy(ax: Axes) -> None:
    ax.grid(color="#E5E5E5", linewidth=0.6)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize="small")


# --- the command ----------------------------------------------------------------------------------------


def estimations(flags: argparse.Namespace) -> list[Estimation]:
    """The tasks whose data is given."""
    params = {"max_epochs": flags.estimator_epochs}
    found = []
    if flags.data:
        study = Study(load_movielens(flags.data, seed=flags.seed), flags.work, flags.members, flags.seed)
        for key in flags.task:
            found.append(Estimation(study, replace(movielens.TASKS[key], epochs=flags.epochs), params))
    if flags.criteo:
        table = load_criteo(flags.criteo, seed=flags.seed)
        study = Study(table, flags.criteo_work, flags.members, flags.seed)
        found.append(Estimation(study, criteo.TASK, params))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.variation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def some_of(choices: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            if unknown := [name for name in text.split(",") if name not in choices]:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(choices)}, got {unknown}")
            return text.split(",")

        return parse

    settings = SETTINGS[1:]
    parser.add_argument("--data", type=Path, help="folder of MovieLens-1M")
    parser.add_argument("--criteo", type=Path, help="folder of the Criteo data, or the file")
    parser.add_argument("--part", type=some_of(PARTS), default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--task", type=some_of(tuple(movielens.TASKS)), default=["R", "C"], help="R, C")
    parser.add_argument("--settings", type=some_of(settings), default=list(settings), help="some of R1 to R7")
    parser.add_argument("--members", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=20, help="of the MovieLens ensembles")
    parser.add_argument("--estimator-epochs", type=int, default=150)
    parser.add_argument("--universe", type=int, default=1000, help="members for the delta ratio")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/movielens"), help="folder of the ensembles")
    parser.add_argument("--criteo-work", type=Path, default=Path("runs/criteo"), help="the same for Criteo")
    parser.add_argument("--output", type=Path, default=harness.RESULTS, help="folder of the result page")
    flags = parser.parse_args(argv)
    if not (flags.data or flags.criteo):
        parser.error("expected --data or --criteo")
    try:
        found = estimations(flags)
    except FileNotFoundError as error:
        parser.error(str(error))
    usual = (flags.members, flags.epochs, flags.estimator_epochs) == (100, 20, 150)
    stem = "variation" if usual else f"variation-{flags.members}"
    results = Results(flags.output / f"{stem}.json")
    functions = {
        "tables": tables,
        "neurons": neurons,
        "transfer": transfer,
        "targets": targets,
        "delta": delta,
    }
    for part in flags.part:
        for made in found:
            functions[part](made, results, flags)
    pictures = {}
    for name, draw in (("buckets", draw_buckets), ("curves", draw_curves)):
        path = flags.output / f"{stem}-{name}.png"
        if draw(results, path):
            pictures[name] = path.name
    text = page(results, pictures, flags.members)
    publish(text, flags.output / f"{stem}.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
