"""What a shuffle window does to prediction variation: MovieLens-1M read part by part, not shuffled whole.

    python -m benchmarks.papers.windows --data DIR

"Beyond Point Estimate", setting S alone (R2): all members begin alike and differ only in the order in which
they meet the rows. The rows lie in the order of the file, which is that of the users, as rows of a log lie
by day: in parts of 4,096, which come in an order that all members share, and each member shuffles within a
window of them. Regression, as in `benchmarks.papers.movielens`, but of fewer members; the validation rows
are the same for all. What two ensembles of so few members agree on is told by one that shuffles all rows in
other orders.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks import harness
from benchmarks.papers.ensembles import Study
from benchmarks.papers.movielens import TASKS
from benchmarks.papers.pages import Results, markdown_table, publish
from pyens import metrics
from pyens.data import ArrayRows, load_movielens
from pyens.data.table import Table
from pyens.training import Randomness, fit, member_seeds

PART = 4096
WINDOWS = (4096, 16_384, 131_072)
ALL, AGAIN = "all rows", "all rows, other orders"


class Parts(ArrayRows):
    """Arrays in parts of so many rows."""

    size = PART

    @property
    def parts(self) -> list[int]:
        return [min(self.size, self.count - first) for first in range(0, self.count, self.size)]


def train(
    table: Table, members: int, epochs: int, window: int | None, seed: int, orders: int
) -> dict[str, Any]:
    """Measures of an ensemble on the test rows, and the PV of each of these; `orders` seeds the shuffling."""
    task = replace(TASKS["R"], epochs=epochs)
    held = round(0.05 * len(table.train))
    validation, rows = table.train[:held], table.train[held:].sort().values
    model = task.model(members, table)
    history = fit(
        model,
        Parts(*task.data(table, rows)),
        window=window,
        loss="mse",
        epochs=task.epochs,
        batch_size=task.batch_size,
        optimizer=task.optimizer,
        randomness=Randomness(shuffle=True),
        seed=seed,
        seeds=member_seeds(orders, members),
        validation=task.data(table, validation),
        early_stopping=task.patience,
    )
    mean, pv = Study(table, Path(), members, seed).predict(task, model)
    measures = task.measures(mean, pv, table.target[table.test])
    return {"measures": measures, "epochs": float(history.epochs.mean()), "pv": pv}


def page(results: Results, members: int) -> str:
    entries = results.section("windows")
    names = [name for name in (*map(str, WINDOWS), AGAIN, ALL) if name in entries]
    lines = markdown_table(
        ["window, rows", "MSE", "PV mean", "PV std", "coeff", "r with all rows' PV", "epochs"],
        [
            [
                name if name in (ALL, AGAIN) else f"{int(name):,}",
                *(f"{entries[name]['measures'][key]:.4f}" for key in ("MSE", "PV mean", "PV std", "coeff")),
                "" if name == ALL else f"{entries[name]['correlation']:.3f}",
                f"{entries[name]['epochs']:.1f}",
            ]
            for name in names
        ],
    )
    intro = " ".join((__doc__ or "").split("\n\n", 2)[2].split())
    made = next(iter(entries.values()))["made"] if entries else ""
    head = f"Made by `python -m benchmarks.papers.windows`; {made}. {members} members. {intro}"
    return "\n".join(["# A shuffle window", "", head, "", *lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers.windows",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of MovieLens-1M")
    parser.add_argument("--members", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=harness.RESULTS, help="folder of the result page")
    flags = parser.parse_args(argv)
    try:
        table = load_movielens(flags.data, seed=flags.seed)
    except FileNotFoundError as error:
        parser.error(f"--data: {error}")
    results = Results(flags.output / "windows.json")
    whole: Tensor | None = None
    runs = [(ALL, None, flags.seed), (AGAIN, None, flags.seed + 1)]
    for name, window, orders in runs + [(str(window), window, flags.seed) for window in WINDOWS]:
        found = train(table, flags.members, flags.epochs, window, flags.seed, orders)
        pv = found.pop("pv")
        if whole is None:
            whole = pv
        else:
            found["correlation"] = metrics.pearson(pv, whole).item()
        results.merge("windows", {name: found})
    publish(page(results, flags.members), flags.output / "windows.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
