"""The Criteo columns of Table 1 of the prediction variation document, on a sample of the data.

    python -m benchmarks.papers.criteo --data DIR

"Beyond Point Estimate: Inferring Ensemble Prediction Variation from Neuron Activation Strength in Recommender
Systems" (Chen et al., 2020). DIR holds train.txt or train.txt.gz of the Criteo Display Advertising data, or a
part of it: 13 numbers, 26 categories, and whether the advertisement was clicked. The document trains on 37
million rows. With a sample of some ten thousand the models know far less, so the numbers stand beside the
document's for the shape of the table only: which sources of randomness count, and how much PV there is.

What the document leaves open, and what was chosen: 1000 buckets for each category, embeddings of 8 numbers
drawn with standard deviation 0.05, Adam with learning rate 3e-3, batches of 64 (a sample has too few steps
otherwise), one epoch as in the document, 90 % of the rows for training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness
from benchmarks.papers.ensembles import SETTINGS, Study, Task, correlations, settings_matrix, table_1
from benchmarks.papers.pages import Results, publish
from pyens import plots
from pyens.data import load_criteo

TASK = Task(
    "criteo",
    "Criteo",
    (8,) * 26,
    outputs=1,
    loss="bce",
    epochs=1,
    patience=None,
    batch_size=64,
    learning_rate=3e-3,
)
COLUMNS = ("AUC", "PV mean", "PV std", "coeff")
PAPER = (
    (0.7956, 0, 0, 0),
    (0.7991, 0.0300, 0.0162, 0.163),
    (0.7999, 0.0359, 0.0179, 0.207),
    (0.7999, 0.0358, 0.0181, 0.204),
    (0.8003, 0.0394, 0.0198, 0.229),
    (0.8002, 0.0396, 0.0199, 0.229),
    (0.8002, 0.0409, 0.0200, 0.235),
    (0.8000, 0.0407, 0.0202, 0.236),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.criteo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data, or the file")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="which of R0 to R7")
    parser.add_argument("--members", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/criteo"), help="folder of trained ensembles")
    parser.add_argument("--output", type=Path, default=harness.RESULTS, help="folder of the result page")
    flags = parser.parse_args(argv)
    settings = flags.settings.split(",")
    if unknown := [setting for setting in settings if setting not in SETTINGS]:
        parser.error(f"--settings: expected some of {', '.join(SETTINGS)}, got {unknown}")
    try:
        table = load_criteo(flags.data, seed=flags.seed)
    except FileNotFoundError as error:
        parser.error(f"--data: {error}")
    study = Study(table, flags.work, flags.members, flags.seed)
    stem = "criteo" if flags.members == 100 else f"criteo-{flags.members}"
    results = Results(flags.output / f"{stem}.json")
    for setting in settings:
        results.merge("criteo", {setting: study.unit(TASK, setting).aggregates()})
    between = correlations(study.trained(TASK))
    figure = plots.new_figure(5.2, 4.4)
    ax = figure.add_subplot()
    settings_matrix(between, ax)
    ax.set_title("Figure 2: PV between settings, Criteo sample")
    plots.save_figure(figure, flags.output / f"{stem}-correlations.png")

    lines = [
        "# Prediction variation on a sample of Criteo",
        "",
        "Made by `python -m benchmarks.papers.criteo`, which says what was chosen. A sample: "
        f"{len(table.train)} rows for training, {len(table.test)} for testing, where the document (small "
        f"figures) has 37 and 4.4 million. Ensembles of {flags.members}. PV is of the predicted probability.",
        "",
        *table_1(results.section("criteo"), COLUMNS, PAPER),
        "",
        f"![correlations of PV]({stem}-correlations.png)",
    ]
    if between:
        lowest = min(between, key=between.__getitem__)
        lines += ["", f"Lowest correlation {between[lowest]:.3f} ({lowest}); the document's is about 0.92."]
    stamps = sorted({entry["made"] for entry in results.section("criteo").values()})
    lines += ["", "## Where it ran", "", *(f"- {stamp}" for stamp in stamps), ""]
    publish("\n".join(lines), flags.output / f"{stem}.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
