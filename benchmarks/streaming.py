"""Training on more rows than fit into memory: rows a second, and memory, against how many there are.

    python -m benchmarks.streaming --work DIR          # 100,000 to 20 million rows; 6 GB of files in DIR
    python -m benchmarks.streaming --quick             # a smoke test, seconds

Rows of 26 categories and 13 numbers, made up: ten members with a table of 1000 × 8 for each category, layers
of 64 and 32, batches of 1024, Adagrad. The same rows lie in memory (tensors, and arrays that are widened by
batch), in memory maps, where every member has its own order of all of them, and in Parquet files, where it
has one within windows of 131,072 rows. Each is trained on in a process of its own, which says how many rows
it took a second, of wall and of processor time, once it is under way, and how much anonymous memory (RssAnon,
what no file stands behind) it had more than a run on a few rows; runs of one size follow each other in turns.
Beside them PyTorch's own way, a DataLoader over the tensors, whose batches all members share. Last, how fast
places of orders are found (`pyens.ops.keyed_permutation`, 1,024 places of 100 members a call, one thread).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyens
from benchmarks.harness import RESULTS, write
from benchmarks.harness.measuring import machine_info
from pyens._files import replacing
from pyens.data import ArrayRows, ArrowRows
from pyens.data.rows import RowSource
from pyens.training import Callback, Progress, Trainer, fit

ROWS = (100_000, 1_000_000, 5_000_000, 20_000_000)
CATEGORIES, NUMBERS, CATEGORY_SIZE = 26, 13, 1000
MEMBERS, BATCH_SIZE, HIDDEN = 10, 1024, (64, 32)
GROUP = 1 << 16  # rows of a row group
MOST_IN_MEMORY = 5_000_000  # as int64 tensors 1.3 GB
SECONDS = 15.0  # of each measurement, after the first steps
FIRST_STEPS = 20
ROUNDS = 3
TENSORS, ARRAYS, MAPS, PARQUET, LOADER = "tensors", "arrays", "memory maps", "Parquet", "DataLoader"
WAYS = (TENSORS, ARRAYS, MAPS, PARQUET, LOADER)
SHAPES = {
    "categories": (np.int32, (CATEGORIES,)),
    "numbers": (np.float32, (NUMBERS,)),
    "clicks": (np.uint8, ()),
}
NAMES = [f"c{i}" for i in range(CATEGORIES)], [f"x{i}" for i in range(NUMBERS)], "click"


# ------------------------------------------------------------------------------------------------------------
# Files


def make(folder: Path, rows: int) -> None:
    """The rows as memory maps and as one Parquet file, a part at a time, unless they are there."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: (folder / name).open("wb") for name in SHAPES}
    for _, part in _parts(rows):
        for name, values in part.items():
            values.tofile(files[name])
    for file in files.values():
        file.close()
    write_parquet(folder / "rows.parquet", rows)
    (folder / "done").touch()


def write_parquet(path: Path, rows: int) -> None:
    import pyarrow
    from pyarrow import parquet

    def table(part: dict[str, np.ndarray]) -> Any:
        columns = {name: part["categories"][:, i] for i, name in enumerate(NAMES[0])}
        columns |= {name: part["numbers"][:, i] for i, name in enumerate(NAMES[1])}
        return pyarrow.table(columns | {NAMES[2]: part["clicks"]})

    with replacing(path) as partial:
        schema = table(next(_parts(1))[1]).schema
        with parquet.ParquetWriter(partial, schema) as writer:
            for _, part in _parts(rows):
                writer.write_table(table(part), row_group_size=GROUP)


def _parts(rows: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    for first in range(0, rows, GROUP):
        n, draw = min(GROUP, rows - first), np.random.default_rng([0, first])
        categories = draw.integers(0, CATEGORY_SIZE, (n, CATEGORIES), dtype=np.int32)
        numbers = draw.standard_normal((n, NUMBERS), dtype=np.float32)
        chance = 1 / (1 + np.exp(-numbers[:, 0] - (categories[:, 0] % 3 - 1)))
        yield (
            first,
            {
                "categories": categories,
                "numbers": numbers,
                "clicks": (draw.random(n) < chance).astype(np.uint8),
            },
        )


def arrays(folder: Path, rows: int) -> list[np.ndarray]:
    return [
        np.memmap(folder / name, dtype, "r", shape=(rows, *shape)) for name, (dtype, shape) in SHAPES.items()
    ]


# ------------------------------------------------------------------------------------------------------------
# One run, in a process of its own


class Enough(Exception):
    pass


class Watch(Callback):
    """Rows a second from the `FIRST_STEPS`-th step on, and the most anonymous memory."""

    def __init__(self, seconds: float) -> None:
        self.limit, self.steps = seconds, 0
        self.memory = 0.0
        self.seconds = self.processor = 0.0

    def step(self) -> None:
        if self.steps == FIRST_STEPS:
            self.began = time.perf_counter(), time.process_time()
        if self.steps % 20 == 0:
            self.memory = max(self.memory, anonymous())
        if self.steps > FIRST_STEPS:
            self.seconds = time.perf_counter() - self.began[0]
            self.processor = time.process_time() - self.began[1]
            if self.seconds > self.limit:
                raise Enough
        self.steps += 1

    def on_step_end(self, progress: Progress) -> None:
        self.step()

    def report(self, memory_before: float) -> dict[str, float]:
        rows = BATCH_SIZE * (self.steps - FIRST_STEPS)
        return {
            "rows_per_second": rows / self.seconds,
            "rows_per_processor_second": rows / self.processor,
            "memory": self.memory - memory_before,
        }


def anonymous() -> float:
    """Megabytes of memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def model() -> pyens.nn.TabularEnsemble:
    sizes = [(CATEGORY_SIZE, 8)] * CATEGORIES
    return pyens.nn.TabularEnsemble(MEMBERS, sizes, NUMBERS, list(HIDDEN), 1, seeds=range(MEMBERS))


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return pyens.optim.fused(torch.optim.Adagrad, parameters, lr=0.02)


def train(data: Sequence[Tensor] | RowSource, watch: Watch) -> None:
    with suppress(Enough):
        fit(
            model(),
            data,
            loss="bce",
            epochs=1000,
            batch_size=BATCH_SIZE,
            optimizer=optimizer,
            validation=0,
            callbacks=[watch],
            progress=False,
            check=not isinstance(data, ArrayRows),  # a pass over all rows, beside which nothing is trained
        )


def train_by_loader(data: Sequence[Tensor], watch: Watch) -> None:
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*data),
        batch_size=None,
        sampler=torch.utils.data.BatchSampler(
            torch.utils.data.RandomSampler(data[0]), BATCH_SIZE, drop_last=True
        ),
    )
    trainer = Trainer(model(), loss="bce", optimizer=optimizer)
    with suppress(Enough):
        while True:
            for batch in loader:
                trainer.step(*batch)
                watch.step()


def one(way: str, folder: Path, rows: int, seconds: float) -> dict[str, float]:
    few = [torch.from_numpy(np.array(values[: 4 * BATCH_SIZE])) for values in arrays(folder, rows)]
    train(ArrayRows(*few), Watch(seconds / 5))  # the model, its gradients, and what freed results keep
    before, watch = anonymous(), Watch(seconds)
    if way == PARQUET:
        train(ArrowRows(folder / "rows.parquet", *NAMES), watch)
    elif way == MAPS:
        train(ArrayRows(*arrays(folder, rows)), watch)
    else:
        held = [torch.from_numpy(np.array(values)) for values in arrays(folder, rows)]
        if way == ARRAYS:
            train(ArrayRows(*held), watch)
        else:
            categories, numbers, clicks = held
            widened = (categories.long(), numbers, clicks.float().unsqueeze(1))
            del held, categories, clicks
            (train if way == TENSORS else train_by_loader)(widened, watch)
    return watch.report(before)


# ------------------------------------------------------------------------------------------------------------
# All of them


def measure(rows: Sequence[int], work: Path, seconds: float, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for n in rows:
        folder = work / f"rows{n}"
        make(folder, n)
        ways = [way for way in WAYS if n <= MOST_IN_MEMORY or way in (MAPS, PARQUET)]
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for number in range(rounds):
            for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                runs[way].append(_in_a_process(way, folder, n, seconds))
                print(f"{n:,} rows, {way}: {runs[way][-1]['rows_per_second']:,.0f} a second", flush=True)
        found[str(n)] = {
            way: {key: float(np.median([run[key] for run in of_way])) for key in of_way[0]}
            for way, of_way in runs.items()
        }
    return found


def permutation_rates(seconds: float) -> dict[str, float]:
    """Places a second, medians over calls."""
    keys, threads = torch.arange(100), torch.get_num_threads()
    torch.set_num_threads(1)
    rates = {}
    for n in (1 << 20, 200_000_000, (1 << 20) + 1, 1 << 33):
        times, end = [], time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            first = 1024 * len(times) % (n - 1024)
            begun = time.perf_counter()
            pyens.ops.keyed_permutation(keys, n, first, 1024)
            times.append(time.perf_counter() - begun)
        rates[f"{n:,}"] = len(keys) * 1024 / float(np.median(times))
    torch.set_num_threads(threads)
    return rates


def _in_a_process(way: str, folder: Path, rows: int, seconds: float) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.streaming",
        "--one",
        way,
        str(folder),
        str(rows),
        str(seconds),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way}, {rows} rows: {done.stderr}")
    report: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return report


def table(found: dict[str, Any]) -> str:
    lines = [
        "| rows | where they are | rows a second | of processor time | against arrays | more memory |",
        "|---|---|---|---|---|---|",
    ]
    for n, ways in found.items():
        for way, run in ways.items():
            ratio = run["rows_per_second"] / ways[ARRAYS]["rows_per_second"] if ARRAYS in ways else None
            lines.append(
                f"| {int(n):,} | {way} | {run['rows_per_second']:,.0f} "
                f"| {run['rows_per_processor_second']:,.0f} "
                f"| {'' if ratio is None else f'{ratio:.2f}'} | {run['memory']:,.0f} MB |"
            )
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for way in WAYS:
        points = [(int(n), ways[way]) for n, ways in found.items() if way in ways]
        for axis, key in zip(axes, ("rows_per_second", "memory"), strict=True):
            axis.plot([n for n, _ in points], [max(run[key], 1) for _, run in points], "o-", label=way)
    axes[0].set(xscale="log", xlabel="rows", ylabel="rows a second", ylim=(0, None))
    axes[1].set(xscale="log", yscale="log", xlabel="rows", ylabel="memory beyond a few rows, MB")
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.streaming",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, default=Path("build/streaming"), help="folder for the rows")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for page and picture")
    parser.add_argument("--quick", action="store_true", help="smoke test: few rows, a second each")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        way, folder, rows, seconds = given.one
        print(json.dumps(one(way, Path(folder), int(rows), float(seconds))))
        return 0
    if given.quick:
        given.rows, given.seconds, given.rounds = [5000], 0.5, 1
    found = measure(given.rows, given.work, given.seconds, given.rounds)
    given.output.mkdir(parents=True, exist_ok=True)
    rates = permutation_rates(min(1.0, given.seconds))
    result = {
        "machine": machine_info(),
        "seconds": given.seconds,
        "rounds": given.rounds,
        "rows": found,
        "places": rates,
    }
    write(given.output / "streaming.json", json.dumps(result, indent=1) + "\n")
    draw(found, given.output / "streaming.png")
    machine = result["machine"]
    page = (
        f"# Rows that need not fit into memory\n\nWritten by `python -m benchmarks.streaming` on "
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, commit "
        f"{str(machine['commit'])[:8]}; medians of {given.rounds} runs, {given.seconds:.0f} seconds each.\n\n"
        + "\n".join(__doc__.split("\n\n", 2)[2].splitlines())
        + f"\n\n{table(found)}\n\n![rows a second and memory](streaming.png)\n\n"
        "| rows that are ordered | places a second |\n|---|---|\n"
        + "".join(f"| {n} | {rate:.2g} |\n" for n, rate in rates.items())
    )
    write(given.output / "streaming.md", page)
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
