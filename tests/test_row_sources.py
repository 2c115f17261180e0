"""Sources of rows: arrays as they are, files of columns, and what `fit` makes of them."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyens import EnsembleMLP
from pyens.data import ArrayRows, ArrowRows, IterableRows, RowSource
from pyens.data import rows as rows_module
from pyens.data._ahead import ahead
from pyens.data.rows import Piece
from pyens.nn import TabularEnsemble
from pyens.training import Callback, Randomness, fit

pa = pytest.importorskip("pyarrow", reason="no pyarrow: pip install 'pyens[arrow]'")
parquet = pytest.importorskip("pyarrow.parquet")

N = 700
CATEGORIES = [5, 300]


def table(n: int = N, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    numbers = draw.normal(size=(n, 2)).astype(np.float32)
    categories = np.stack([draw.integers(0, size, n) for size in CATEGORIES], 1).astype(np.int32)
    click = (numbers[:, 0] + (categories[:, 0] == 2) + draw.normal(size=n) > 0.5).astype(np.uint8)
    return {"categories": categories, "numbers": numbers, "click": click}


def arrow_table(columns: dict[str, np.ndarray]) -> Any:
    return pa.table(
        {
            "c0": columns["categories"][:, 0].astype(np.uint8),
            "c1": columns["categories"][:, 1],
            "unread": ["text"] * len(columns["click"]),
            "x0": columns["numbers"][:, 0],
            "x1": columns["numbers"][:, 1],
            "click": columns["click"],
        }
    )


def write(folder: Path, cuts: tuple[int, ...] = (300, 301), group: int = 128, n: int = N) -> Path:
    """The table in files that end at these rows."""
    columns = table(n)
    for i, (a, b) in enumerate(zip((0, *cuts), (*cuts, n), strict=True)):
        part = arrow_table({name: values[a:b] for name, values in columns.items()})
        parquet.write_table(part, folder / f"part-{i}.parquet", row_group_size=group)
    return folder


def arrow(folder: Path) -> ArrowRows:
    return ArrowRows(folder, ["c0", "c1"], ["x0", "x1"], "click")


def arrays() -> ArrayRows:
    columns = table()
    return ArrayRows(columns["categories"], columns["numbers"], columns["click"])


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    columns = table()
    return (
        torch.from_numpy(columns["categories"]).long(),
        torch.from_numpy(columns["numbers"]),
        torch.from_numpy(columns["click"]).float().unsqueeze(1),
    )


def model(members: int = 3, **options: Any) -> TabularEnsemble:
    sizes = [(size, 4) for size in CATEGORIES]
    return TabularEnsemble(members, sizes, 2, [8], 1, seeds=range(members), **options)


def train(data: Any, own: Any = None, **options: Any) -> tuple[TabularEnsemble, Any]:
    own = model() if own is None else own
    arguments: dict[str, Any] = {"loss": "bce", "epochs": 2, "batch_size": 64, "seed": 7, "validation": 0}
    arguments["optimizer"] = lambda p: torch.optim.Adam(p, lr=1e-2)
    return own, fit(own, data, progress=False, **(arguments | options))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------------
# Arrays as they are


@pytest.mark.parametrize("code", ["R1", "R3", "R6", "R0"])
def test_arrays_train_as_tensors_do(code: str) -> None:
    options = {"randomness": Randomness.from_code(code), "validation": 0.1, "metrics": ["auroc"]}
    whole, expected = train(tensors(), **options)
    found, history = train(arrays(), **options)
    assert same(whole, found)
    assert np.array_equal(history.train_loss, expected.train_loss)
    assert np.array_equal(history.metrics["auroc"], expected.metrics["auroc"])


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.uint8, np.uint16, np.int64, bool])
def test_small_types_stay_small_and_are_widened_by_batch(kind: Any) -> None:
    columns = table()
    categories = (columns["categories"] % 2).astype(kind)
    numbers = columns["numbers"].astype(np.float16)
    source = ArrayRows(categories, numbers, columns["click"].astype(bool))
    assert source.columns[0].numpy().base is not None and source.columns[1].dtype == torch.float16
    found, _ = train(source)
    as_tensors = (
        torch.from_numpy(categories.astype(np.int64)),
        torch.from_numpy(numbers).float(),
        tensors()[2],
    )
    assert same(found, train(as_tensors)[0])


def test_a_read_only_memory_map_is_not_copied(tmp_path: Path) -> None:
    columns = table()
    maps = []
    for name, values in columns.items():
        values.tofile(tmp_path / name)
        maps.append(np.memmap(tmp_path / name, values.dtype, "r", shape=values.shape))
    source = ArrayRows(*maps)
    for column, given in zip(source.columns, maps, strict=True):
        assert column.data_ptr() == given.ctypes.data
    assert same(train(source)[0], train(tensors())[0])
    assert same(train(tuple(maps))[0], train(tensors())[0])  # a tuple of them too


def test_float64_is_narrowed_by_batch_without_a_word(recwarn: Any) -> None:
    columns = table()
    source = ArrayRows(columns["categories"], columns["numbers"].astype(np.float64), columns["click"])
    assert same(train(source)[0], train(tensors())[0]) and not len(recwarn)


def test_rows_that_weigh_nothing_may_hold_anything() -> None:
    columns, weight = table(), torch.ones(N)
    columns["numbers"][5] = np.nan
    weight[5] = 0
    source = ArrayRows(columns["categories"], columns["numbers"], columns["click"])
    found, _ = train(source, sample_weight=weight)
    assert all(p.isfinite().all() for p in found.parameters())
    with pytest.raises(
        ValueError, match=r"fit: data\[1\]: expected finite numbers, got nan in row 5, column 0"
    ):
        train(source)


def test_validation_may_be_a_source() -> None:
    held = tuple(t[:100] for t in tensors())
    columns = table()
    source = ArrayRows(*(columns[name][:100] for name in ("categories", "numbers", "click")))
    options = {"early_stopping": 1, "epochs": 5, "metrics": ["nll", "auroc"]}
    expected = train(tensors(), validation=held, **options)
    found = train(arrays(), validation=source, **options)
    assert same(expected[0], found[0])
    np.testing.assert_array_equal(expected[1].validation_loss, found[1].validation_loss)
    np.testing.assert_array_equal(expected[1].metrics["auroc"], found[1].metrics["auroc"])


class Made(RowSource):
    """Rows that are computed when they are asked for."""

    def __init__(self, columns: Any = None) -> None:
        self.asked = 0
        self.columns = columns

    def __len__(self) -> int:
        return 200

    def rows(self, index: Tensor) -> Any:
        self.asked += len(index)
        x = torch.stack([index.double().sin(), index.double().cos()], 1)
        return (x, x[:, :1] * x[:, 1:]) if self.columns is None else self.columns(index)

    def fingerprint(self) -> str:
        return "made 1"


def mlp(members: int = 3) -> EnsembleMLP:
    return EnsembleMLP(members, 2, [6], 1, seeds=range(members))


def test_a_source_of_ones_own() -> None:
    source = Made()
    found, _ = train(source, mlp(), loss="mse", check=False)
    assert 2 * 3 * 200 <= source.asked < 2 * 3 * 200 + 10  # every member's rows, and one to look at
    index = torch.arange(200)
    x = torch.stack([index.double().sin(), index.double().cos()], 1)
    expected, _ = train((x.float(), (x[:, :1] * x[:, 1:]).float()), mlp(), loss="mse")
    assert same(found, expected)
    parts = [piece for part in range(len(source.parts)) for piece in source.read(part)]
    assert [piece.first for piece in parts] == [0] and len(parts[0].columns[0]) == 200
    assert source.where(3) == "row 3"


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (
            lambda i: torch.zeros(len(i), 2),
            TypeError,
            r"expected a tuple of columns from Made.rows, .* got shape",
        ),
        (lambda i: (torch.zeros(len(i), 2),), TypeError, "expected a tuple of columns from Made.rows"),
        (
            lambda i: (torch.zeros(3, 2), torch.zeros(3)),
            ValueError,
            "expected 1 rows in column 0 of Made.rows",
        ),
        (
            lambda i: ([1.0] * len(i), torch.zeros(len(i))),
            ValueError,
            "expected 1 rows in column 0 of Made.rows, got a list",
        ),
        (
            lambda i: (torch.zeros(len(i), 3), torch.zeros(len(i))),
            ValueError,
            "expected rows that EnsembleMLP",
        ),
    ],
)
def test_a_source_that_gives_something_else(columns: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"fit: data: {message}"):
        train(Made(columns), mlp(), loss="mse")


def test_a_source_without_its_parts() -> None:
    class Lacking(RowSource):
        pass

    with pytest.raises(TypeError, match="Lacking: expected __len__ to be defined"):
        train(Lacking(), mlp(), loss="mse")


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ((), TypeError, "expected arrays .* got 0 of them"),
        ((np.zeros((3, 2)),), TypeError, "expected arrays .* got 1 of them"),
        ((np.zeros((3, 2)), None), TypeError, "expected arrays .* got 2 of them"),
        ((None, np.zeros(3)), TypeError, "expected arrays .* got 2 of them"),
        ((np.zeros((3, 2)), np.zeros(4)), ValueError, r"expected as many rows in all of them, got \[3, 4\]"),
        ((np.array(["a", "b"]), np.zeros(2)), TypeError, "expected an array .* got a ndarray of <U1"),
        (
            (np.zeros(2), np.ma.masked_array([1.0, 2.0], [0, 1])),
            TypeError,
            "expected an array .* MaskedArray of float64",
        ),
        ((torch.zeros(2, dtype=torch.complex64), np.zeros(2)), TypeError, "expected whole numbers, float32"),
        ((torch.zeros(2).to(torch.float8_e5m2), np.zeros(2)), TypeError, "expected whole numbers, float32"),
        ((torch.zeros(2, 2).to_sparse(), np.zeros(2)), TypeError, "expected a dense tensor"),
        (
            (torch.zeros(2, 1, device="meta"), np.zeros(2)),
            TypeError,
            "expected a tensor on the CPU, got one on meta",
        ),
        ((np.zeros(()), np.zeros(2)), TypeError, r"expected \[N, ...\], got shape \[\]"),
    ],
)
def test_arrays_that_are_none(columns: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"ArrayRows: columns.*: {message}"):
        ArrayRows(*columns)


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ValueError, match="fit: data: expected rows, got a ArrayRows without any"):
        train(ArrayRows(np.zeros((0, 2), np.float32), np.zeros(0, np.float32)), mlp(), loss="mse")


@pytest.mark.parametrize(
    ("argument", "value"), [("bootstrap", "poisson"), ("groups", np.zeros(N)), ("own_data", True)]
)
def test_what_needs_all_rows_at_once_is_refused(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"fit: {argument}: expected none beside a ArrayRows"):
        train(arrays(), **{argument: value})


def test_the_fingerprint_of_large_arrays_is_a_sample(monkeypatch: Any) -> None:
    whole = arrays().fingerprint()
    assert whole == arrays().fingerprint() and "sampled" not in whole
    monkeypatch.setattr(rows_module, "WHOLE", 1000)
    monkeypatch.setattr(rows_module, "SAMPLE", 16)
    monkeypatch.setattr(rows_module, "SAMPLES", 10)
    large = np.zeros((5000, 2), np.float32)
    first = ArrayRows(large, np.zeros(5000, np.uint8)).fingerprint()
    assert "sampled" in first
    for row in (0, 4999):
        other = large.copy()
        other[row] = 1
        assert ArrayRows(other, np.zeros(5000, np.uint8)).fingerprint() != first
    assert ArrayRows(large[:-1], np.zeros(4999, np.uint8)).fingerprint() != first
    assert "sampled" not in ArrayRows(large[:, ::2], np.zeros(5000, np.uint8)).fingerprint().split(";")[0]


# ------------------------------------------------------------------------------------------------------------
# Files of columns


def test_parquet_has_the_rows_of_the_table(tmp_path: Path) -> None:
    source = arrow(write(tmp_path))
    columns = table()
    assert len(source) == N and sum(source.parts) == N and max(source.parts) == 128
    categories, numbers, click = source.rows(torch.arange(N))
    assert np.array_equal(categories, columns["categories"]) and categories.dtype == torch.int32
    assert np.array_equal(numbers, columns["numbers"]) and np.array_equal(click, columns["click"])
    index = torch.tensor([699, 0, 300, 299, 300, 301, 5])
    assert np.array_equal(source.rows(index)[1], columns["numbers"][index])
    assert source.rows(torch.zeros(0, dtype=torch.int64))[1] is None or len(source.rows(index[:0])[1]) == 0
    assert source.where(300) == f"row 0 of row group 0 of {tmp_path / 'part-1.parquet'}"
    assert source.where(130) == f"row 2 of row group 1 of {tmp_path / 'part-0.parquet'}"


@pytest.mark.parametrize("kind", ["arrow", "csv"])
def test_other_formats_have_the_same_rows(tmp_path: Path, kind: str) -> None:
    from pyarrow import csv, feather

    content = arrow_table(table())
    if kind == "csv":
        csv.write_csv(content, tmp_path / "all.csv")
    else:
        feather.write_feather(content, str(tmp_path / "all.arrow"))
    source = arrow(tmp_path)
    assert len(source) == N
    for found, expected in zip(source.rows(torch.arange(N)), table().values(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert source.where(5) == f"row 5 of {tmp_path / f'all.{kind}'}"
    assert same(train(source, window=N, epochs=1)[0], train(source, window=N, epochs=1)[0])


def test_windows_meet_each_row_once_and_members_meet_them_in_orders_of_their_own(tmp_path: Path) -> None:
    n = 1000
    numbers = pa.table({"x": np.arange(n, dtype=np.float64), "y": np.zeros(n)})
    parquet.write_table(numbers, tmp_path / "a.parquet", row_group_size=100)
    seen: list[Tensor] = []

    class Watched(EnsembleMLP):
        def loss(self, *batch: Any, **options: Any) -> Tensor:
            if self.training:
                seen.append(batch[0][..., 0].clone())
            return super().loss(*batch, **options)

    def orders(code: str, epochs: int = 2) -> list[Tensor]:
        seen.clear()
        watched = Watched(3, 1, [4], 1)
        train(
            ArrowRows(tmp_path, ["x"], "y"),
            watched,
            loss="mse",
            batch_size=50,
            window=220,
            epochs=epochs,
            randomness=Randomness.from_code(code),
        )
        steps = len(seen) // epochs
        assert steps == 20
        return [torch.cat(seen[e * steps : (e + 1) * steps], -1).long() for e in range(epochs)]

    first, second = orders("R2")
    assert first.shape == (3, n)
    for order in (*first, *second):
        assert torch.equal(order.sort().values, torch.arange(n))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], second[0])
    for start in range(0, n, 250):  # 220 rows are 5 batches of 50: all members have the same ones in a window
        windows = first[:, start : start + 250].sort(1).values
        assert torch.equal(windows[0], windows[1]) and torch.equal(windows[0], windows[2])
    common, again = orders("R0")
    assert common.shape == (n,) and torch.equal(common, again)
    assert torch.equal(common.sort().values, torch.arange(n))
    assert torch.equal(orders("R2")[0], first)


def test_a_window_of_all_rows_is_as_good_as_a_shuffle(tmp_path: Path) -> None:
    source = arrow(write(tmp_path))
    _, history = train(source, window=N, epochs=4)
    _, expected = train(tensors(), epochs=4)
    np.testing.assert_allclose(history.train_loss[-1], expected.train_loss[-1], rtol=0.05)
    # Arrays in windows too, where that is asked for.
    _, windows = train(arrays(), window=100, epochs=4)
    np.testing.assert_allclose(windows.train_loss[-1], expected.train_loss[-1], rtol=0.05)


def test_a_member_of_a_windowed_run_is_as_if_alone(tmp_path: Path) -> None:
    source = arrow(write(tmp_path))
    together, _ = train(source, model(3), window=128, seeds=[5, 6, 7])
    alone, _ = train(
        source, TabularEnsemble(1, [(5, 4), (300, 4)], 2, [8], 1, seeds=[1]), window=128, seeds=[6]
    )
    for p, q in zip(together.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p[1], q[0])


@pytest.mark.parametrize("code", ["R4", "R7"])
def test_jackknife_and_weights_find_their_rows_in_windows(tmp_path: Path, code: str) -> None:
    source = arrow(write(tmp_path))
    options = {"window": 192, "randomness": Randomness.from_code(code), "jackknife_groups": 4}
    weight = torch.rand(N, generator=torch.Generator().manual_seed(0))
    found, history = train(source, sample_weight=weight, **options)
    expected, _ = train(ArrayRowsInParts(source), sample_weight=weight, **options)
    assert same(found, expected) and (history.unseen.sum(1) == N // 4).all()


class ArrayRowsInParts(RowSource):
    """The rows of another source, in memory, in its parts."""

    in_order = True

    def __init__(self, other: RowSource) -> None:
        self.other, self.held = other, ArrayRows(*other.rows(torch.arange(len(other))))

    def __len__(self) -> int:
        return len(self.other)

    def rows(self, index: Tensor) -> Any:
        return self.held.rows(index)

    @property
    def parts(self) -> Any:
        return self.other.parts

    def read(self, part: int) -> Any:
        first = sum(self.parts[:part])
        for start in range(first, first + self.parts[part], 10):  # in small pieces
            end = min(start + 10, first + self.parts[part])
            yield Piece(start, self.held.rows(torch.arange(start, end)))

    def fingerprint(self) -> str:
        return self.other.fingerprint()


def test_dropout_members_that_leave_and_schedules_work_in_windows(tmp_path: Path) -> None:
    source = arrow(write(tmp_path))
    held = tuple(t[:80] for t in tensors())
    own, history = train(
        source,
        model(dropout=0.2),
        window=128,
        epochs=60,
        validation=held,
        early_stopping=1,
        scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 60 * 11),
        schedule="step",
    )
    assert own.ensemble_size == 3 and history.epochs.max() > history.epochs.min() >= 1


# ------------------------------------------------------------------------------------------------------------
# Going on from a checkpoint


class Stop(Exception):
    pass


class StopAt(Callback):
    def __init__(self, epoch: int, step: int) -> None:
        self.at = epoch, step

    def on_step_end(self, progress: Any) -> None:
        if (progress.epoch, progress.step) == self.at:
            raise Stop


@pytest.mark.parametrize("window", [64, 200])
def test_a_run_goes_on_to_the_same_bits(tmp_path: Path, window: int) -> None:
    source = arrow(write(tmp_path))
    expected, _ = train(source, window=window, epochs=3)
    path = tmp_path / "run.pt"
    options = {"window": window, "epochs": 3, "checkpoint": path}
    with pytest.raises(Stop):
        train(source, callbacks=[StopAt(2, 3)], **options)
    before = threading.active_count()
    found, _ = train(arrow(tmp_path), callbacks=[StopAt(9, 9)], **options)
    assert same(found, expected) and threading.active_count() <= before


def test_another_source_or_window_is_refused(tmp_path: Path) -> None:
    source = arrow(write(tmp_path))
    path = tmp_path / "run.pt"
    train(source, window=128, checkpoint=path)
    saved = path.read_bytes()
    with pytest.raises(ValueError, match=r"is of another run: expected order .*windows of 192"):
        train(source, window=192, epochs=3, checkpoint=path)
    (tmp_path / "part-2.parquet").unlink()
    with pytest.raises(ValueError, match="is of another run"):
        train(arrow(tmp_path), window=128, epochs=3, checkpoint=path)
    changed = table()
    changed["numbers"][0] = 99.0
    parquet.write_table(
        arrow_table({k: v[:300] for k, v in changed.items()}), tmp_path / "part-0.parquet", row_group_size=128
    )
    with pytest.raises(ValueError, match="is of another run"):
        train(arrow(tmp_path), window=128, epochs=3, checkpoint=path)
    assert path.read_bytes() == saved


KILLED = """
import sys
sys.path[:0] = [{tests!r}]
import test_row_sources as t
from pathlib import Path
t.train(t.arrow(Path(sys.argv[1])), window=64, epochs=400, checkpoint=Path(sys.argv[1]) / "run.pt")
"""


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "run.pt"
    code = KILLED.format(tests=str(Path(__file__).parent))
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[1])
    try:
        while not path.exists():
            assert child.poll() is None
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    saved = torch.load(path, weights_only=True)["state"]["epoch"]
    found, _ = train(arrow(tmp_path), window=64, epochs=saved + 1, checkpoint=path)
    assert same(found, train(arrow(tmp_path), window=64, epochs=saved + 1)[0])


# ------------------------------------------------------------------------------------------------------------
# What is wrong with files


def test_a_category_out_of_range_is_named_by_file_row_group_row_and_column(tmp_path: Path) -> None:
    columns = table()
    columns["categories"][450, 1] = 300
    for i, (a, b) in enumerate(((0, 400), (400, N))):
        part = arrow_table({name: values[a:b] for name, values in columns.items()})
        parquet.write_table(part, tmp_path / f"{i}.parquet", row_group_size=30)
    message = (
        r"expected categories from 0 to 299 in column 1, got 300 in row 450 "
        rf"\(row 20 of row group 1 of {tmp_path / '1.parquet'}\)"
    )
    for window in (64, 5000):
        with pytest.raises(ValueError, match=message):
            train(arrow(tmp_path), window=window)
    with pytest.raises(ValueError, match=r"in column 1, got 300 in row 450 \(row 450\)"):
        train(ArrayRows(columns["categories"], columns["numbers"], columns["click"]))


def test_missing_values_are_named(tmp_path: Path) -> None:
    content = arrow_table(table())
    x = content["x1"].to_pylist()
    x[333] = x[340] = None
    content = content.set_column(content.schema.get_field_index("x1"), "x1", pa.array(x, pa.float32()))
    parquet.write_table(content, tmp_path / "a.parquet", row_group_size=100)
    message = (
        rf"ArrowRows: row 33 of row group 3 of {tmp_path / 'a.parquet'}: expected a number in column 'x1', "
        r"got none \(and 1 more in these 100 rows\)"
    )
    with pytest.raises(ValueError, match=message):
        train(arrow(tmp_path), window=5000)


def test_files_of_other_columns_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    content = arrow_table(table(10))
    for changed, error, message in (
        (
            content.drop_columns(["x0"]),
            ValueError,
            "3.parquet: expected a column 'x0', got c0, c1, unread, x1",
        ),
        (
            content.set_column(0, "c0", pa.array(range(10), pa.int64())),
            ValueError,
            "3.parquet: expected uint8 in column 'c0' as in .*part-0.parquet, got int64",
        ),
        (
            content.set_column(0, "c0", pa.array(["a"] * 10)),
            TypeError,
            "3.parquet: expected numbers in column 'c0', got string",
        ),
    ):
        parquet.write_table(changed, tmp_path / "part-3.parquet")
        with pytest.raises(error, match=message):
            arrow(tmp_path)


def test_files_cut_short_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "part-0.parquet"
    content = path.read_bytes()
    for broken in (content[:-100], content[: len(content) // 2], b"PAR1", b""):
        path.write_bytes(broken)
        with pytest.raises(
            ValueError, match=r"ArrowRows: .*part-0.parquet: expected a whole parquet file, got "
        ):
            arrow(tmp_path)
    # Its end is whole, its middle is not: an error in the thread that reads, with the last checkpoint intact.
    path.write_bytes(content)
    source, checkpoint = arrow(tmp_path), tmp_path / "run.pt"
    train(source, window=64, checkpoint=checkpoint)
    saved = checkpoint.read_bytes()
    path.write_bytes(content[:4] + bytes(len(content) - 3000) + content[-2996:])
    with pytest.raises(ValueError, match=r"part-0.parquet: expected the file as it was|is of another run"):
        train(source, window=64, epochs=4, checkpoint=checkpoint)
    path.unlink()
    with pytest.raises(
        ValueError, match=r"part-0.parquet: expected a whole parquet file, got .*No such file"
    ):
        train(source, window=64, epochs=4, checkpoint=None)
    assert checkpoint.read_bytes() == saved


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (("x0",), TypeError, "expected names of columns, inputs and target"),
        ((["x0"], None), TypeError, "expected names of columns"),
        (([], "click"), TypeError, r"columns\[0\]: expected the name of a column"),
        (([1], "click"), TypeError, r"columns\[0\]: expected the name of a column"),
        ((["x9"], "click"), ValueError, "expected a column 'x9', got c0, c1, unread"),
        ((["unread"], "click"), TypeError, "expected numbers in column 'unread', got"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, columns: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ArrowRows(write(tmp_path), *columns)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected files of .parquet, .* found none"):
        arrow(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent.parquet: expected a file, found none"):
        arrow(tmp_path / "absent.parquet")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a.txt: expected a name that ends in .parquet"):
        arrow(tmp_path / "a.txt")
    write(tmp_path)
    assert len(ArrowRows(tmp_path / "part-*.parquet", ["x0"], "click")) == N
    assert len(ArrowRows([tmp_path / "part-2.parquet"], ["x0"], "click")) == N - 301
    (tmp_path / "b.csv").write_text("x0,click\n1,2\n")
    with pytest.raises(ValueError, match="expected files of one kind, got csv and parquet"):
        ArrowRows(tmp_path, ["x0"], "click")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"validation": 0.1},
            ValueError,
            "validation: expected 0 or rows of their own beside rows .*, got 0.1",
        ),
        ({"validation": [1, 2]}, ValueError, "validation: expected 0 or rows of their own"),
        ({"window": 0}, ValueError, "window: expected a positive integer, got 0"),
        ({"window": 1.5}, ValueError, "window: expected a positive integer"),
    ],
)
def test_options_beside_windows(tmp_path: Path, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"fit: {message}"):
        train(arrow(write(tmp_path)), **options)


def test_a_window_of_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match="fit: window: expected None beside tensors, got 64"):
        train(tensors(), window=64)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'ArrowRows: expected pyarrow, .* pip install "pyens\[arrow\]"'):
        arrow(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Reading ahead


def test_an_error_of_the_thread_reaches_the_caller() -> None:
    def made() -> Any:
        yield 1
        yield 2
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"), ahead(made) as items:
        assert next(items) == 1
        list(items)


def test_leaving_early_ends_the_thread() -> None:
    stopped = threading.Event()

    def made() -> Any:
        try:
            yield from range(10**9)
        finally:
            stopped.set()

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), ahead(made, depth=2) as items:
        assert [next(items) for _ in range(5)] == list(range(5))
        raise KeyboardInterrupt
    assert threading.active_count() == before
    del items
    assert list_of(ahead(lambda: iter(range(7)))) == list(range(7))


def list_of(context: Any) -> list[int]:
    with context as items:
        return list(items)


def test_no_more_is_read_ahead_than_asked_for() -> None:
    made = []

    def slow() -> Any:
        for i in range(100):
            made.append(i)
            yield i

    with ahead(slow, depth=1) as items:
        next(items)
        time.sleep(0.3)
        assert len(made) <= 4


# ------------------------------------------------------------------------------------------------------------
# Memory


MEMORY = """
import sys, os
sys.path[:0] = [{tests!r}]
import numpy as np, torch, pyens
from pathlib import Path
from pyens.data import ArrayRows, ArrowRows
from pyens.training import Randomness, fit

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

class Watch(pyens.training.Callback):
    most = 0.0
    def on_step_end(self, progress):
        if progress.step % 50 == 0:
            self.most = max(self.most, anonymous())

folder, kind = Path(sys.argv[1]), sys.argv[2]
if kind == "parquet":
    source, options = ArrowRows(folder, [f"x{{i}}" for i in range(8)], "y"), {{"window": 1 << 15}}
else:
    n = (folder / "x").stat().st_size // 32
    shapes = {{"x": (n, 8), "y": (n,)}}
    source = ArrayRows(*(np.memmap(folder / name, np.float32, "r", shape=shapes[name]) for name in "xy"))
    options = {{}}
model = pyens.EnsembleMLP(10, 8, [8], 1)
watch = Watch()
def run(source):
    fit(model, source, loss="mse", epochs=1, batch_size=4096, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3),
        validation=0, callbacks=[watch], progress=False, **options)
few = ArrayRows(torch.zeros(8192, 8), torch.zeros(8192))
run(few)
before = watch.most = anonymous()
run(source)
print(len(source), watch.most - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="no /proc: the memory of a process is read there"
)
@pytest.mark.parametrize("kind", ["parquet", "maps"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, kind: str) -> None:
    n = 1_500_000  # 54 MB of numbers, and 60 MB of int32 an order for each of ten members would take
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(n, 8)).astype(np.float32), np.zeros(n, np.float32)
    if kind == "parquet":
        content = pa.table({**{f"x{i}": x[:, i] for i in range(8)}, "y": y})
        parquet.write_table(content, tmp_path / "a.parquet", row_group_size=1 << 14)
    else:
        x.tofile(tmp_path / "x")
        y.tofile(tmp_path / "y")
    code = MEMORY.format(tests=str(Path(__file__).parent))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), kind],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    assert found.returncode == 0, found.stderr
    rows, grown = found.stdout.split()
    assert int(rows) == n and float(grown) < 45, found.stdout  # MB


# ------------------------------------------------------------------------------------------------------------
# What a reader broke


def test_parts_without_rows_are_left_out(tmp_path: Path) -> None:
    content = arrow_table(table())
    for i, (a, b) in enumerate(((0, 0), (0, 300), (300, 300), (300, N), (N, N))):
        parquet.write_table(content.slice(a, b - a), tmp_path / f"{i}.parquet", row_group_size=100)
    source = arrow(tmp_path)
    assert min(source.parts) > 0 and len(source) == N
    assert len(source.rows(torch.zeros(0, dtype=torch.int64))[0]) == 0
    assert same(train(source, window=128)[0], train(ArrayRowsInParts(source), window=128)[0])
    for wrong in (-1, N):
        with pytest.raises(IndexError, match="expected numbers from 0 to 699"):
            source.rows(torch.tensor([wrong]))


@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.uint64])
def test_columns_without_a_sign(tmp_path: Path, kind: Any) -> None:
    content = arrow_table(table())
    for name in ("c0", "c1", "click"):
        column = pa.array(content[name].to_numpy().astype(kind))
        content = content.set_column(content.schema.get_field_index(name), name, column)
    parquet.write_table(content, tmp_path / "a.parquet", row_group_size=128)
    assert same(train(arrow(tmp_path), window=N)[0], train(merged(tmp_path), window=N)[0])
    if kind is np.uint64:
        large = pa.array(np.full(N, 2**63, np.uint64))
        content = content.set_column(content.schema.get_field_index("c1"), "c1", large)
        parquet.write_table(content, tmp_path / "a.parquet")
        message = (
            r"ArrowRows: row 0 of row group 0 of .*a.parquet: expected numbers below 2\^63 in column 'c1'"
        )
        with pytest.raises(ValueError, match=message):
            arrow(tmp_path).rows(torch.tensor([3]))


def merged(folder: Path) -> RowSource:
    """The rows of the table, in the parts of this folder."""
    source = ArrayRowsInParts(arrow(folder))
    source.held = arrays()
    return source


@pytest.mark.parametrize("kind", ["arrow", "csv", "parquet"])
def test_other_content_of_the_same_size_is_refused(tmp_path: Path, kind: str) -> None:
    from pyarrow import csv, feather

    def write_all(columns: dict[str, np.ndarray]) -> int:
        path = tmp_path / f"all.{kind}"
        if kind == "csv":
            csv.write_csv(arrow_table(columns), path)
        elif kind == "arrow":
            feather.write_feather(arrow_table(columns), str(path))
        else:
            parquet.write_table(arrow_table(columns), path, compression="none", use_dictionary=False)
        return path.stat().st_size

    columns = table()
    size = write_all(columns)
    path = tmp_path / "run.pt"
    source = arrow(tmp_path)
    train(source, window=128, checkpoint=path)
    columns["click"] = columns["click"][::-1].copy() if kind == "parquet" else 1 - columns["click"]
    assert write_all(columns) == size
    with pytest.raises(ValueError, match="is of another run: expected data"):
        train(arrow(tmp_path), window=128, epochs=3, checkpoint=path)
    with pytest.raises(ValueError, match="expected the file as it was when it was opened, got another one"):
        train(source, window=128)  # which was opened before


def test_the_fingerprint_knows_which_column_is_what(tmp_path: Path) -> None:
    write(tmp_path)
    shapes = (
        (["x0", "x1"], "click"),
        (["x1", "x0"], "click"),
        (["x0", "click"], "x1"),
        (["x0"], ["x1", "click"]),
    )
    said = [ArrowRows(tmp_path, *columns).fingerprint() for columns in shapes]
    said.append(ArrowRows(tmp_path, *shapes[0], dtypes=(np.float64, None)).fingerprint())
    assert len(set(said)) == 5 and said[0] == ArrowRows(tmp_path, *shapes[0]).fingerprint()


def test_whole_numbers_as_floating_point_ones(tmp_path: Path) -> None:
    whole = pa.table({"x": np.arange(100), "y": np.arange(100) % 2})
    parquet.write_table(whole, tmp_path / "a.parquet")
    parquet.write_table(pa.table({"x": np.arange(50) / 2, "y": np.arange(50) % 2}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="expected int64 in column 'x'"):
        ArrowRows(tmp_path, ["x"], "y")
    source = ArrowRows(tmp_path, ["x"], "y", dtypes=(np.float32, None))
    x, y = source.rows(torch.tensor([7, 101]))
    assert x.dtype == torch.float32 and x.tolist() == [[7.0], [0.5]] and y.tolist() == [1, 1]
    lines = ["x,y"] + ["1,0"] * 5 + ["1.5,1"]
    (tmp_path / "c.csv").write_text("\n".join(lines))
    held = ArrowRows(tmp_path / "c.csv", ["x"], "y", dtypes=(np.float32, None))
    assert held.rows(torch.arange(6))[0].flatten().tolist() == [1.0] * 5 + [1.5]
    for dtypes, error, message in (
        ((None,), ValueError, "dtypes: expected one or None for each of 2 columns"),
        ((None, np.complex64), TypeError, "dtypes: expected types of numbers with a sign, got complex64"),
    ):
        with pytest.raises(error, match=message):
            ArrowRows(tmp_path / "a.parquet", ["x"], "y", dtypes=dtypes)


def test_validation_rows_of_files_are_read_once_a_pass(tmp_path: Path) -> None:
    reads = []

    class Counted(ArrowRows):
        def read(self, part: int) -> Any:
            reads.append(part)
            return super().read(part)

    held = Counted(write(tmp_path, cuts=(), group=1000), ["c0", "c1"], ["x0", "x1"], "click")
    found = train(tensors(), validation=held, batch_size=32, metrics=["auroc"], epochs=3)
    expected = train(tensors(), validation=tensors(), batch_size=32, metrics=["auroc"], epochs=3)
    np.testing.assert_array_equal(found[1].validation_loss, expected[1].validation_loss)
    np.testing.assert_array_equal(found[1].metrics["auroc"], expected[1].metrics["auroc"])
    assert len(reads) <= 3 * 2 + 3  # a pass for losses and one for metrics, and three before the first epoch


def test_a_source_beside_own_data_is_refused() -> None:
    own = tuple(torch.stack([t] * 3) for t in tensors())
    with pytest.raises(
        ValueError, match=r"validation: expected tensors \[3, N, ...\] under own_data, got a Arr"
    ):
        train(own, own_data=True, validation=arrays(), metrics=["accuracy"])


class Parts(RowSource):
    """50 rows, in parts and pieces as one likes."""

    in_order = True

    def __init__(self, parts: list[int], pieces: Any = None) -> None:
        self._parts, self._pieces = parts, pieces

    def __len__(self) -> int:
        return 50

    @property
    def parts(self) -> list[int]:
        return self._parts

    def rows(self, index: Tensor) -> Any:
        x = index.float().unsqueeze(1).expand(-1, 2)
        return x, x[:, :1]

    def read(self, part: int) -> Any:
        return super().read(part) if self._pieces is None else self._pieces(self, part)

    def fingerprint(self) -> str:
        return "parts"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            Parts([20]),
            "expected parts of 1 row or more that are 50 rows together from Parts.parts, got 1 of 20",
        ),
        (Parts([20, 60]), "got 2 of 80 rows"),
        (Parts([20, 0, 30]), "got 3 of 50 rows"),
        (Parts([50], lambda s, p: [Piece(1, s.rows(torch.arange(50)))]), "expected the piece from row 0 on"),
        (
            Parts([50], lambda s, p: [Piece(0, s.rows(torch.arange(49)))]),
            "expected 50 rows in part 0 .* got 49",
        ),
        (Parts([50], lambda s, p: [Piece(0, (None, None))]), "expected pieces of tensors"),
        (Parts([50], lambda s, p: [Piece(0, (np.zeros((50, 2)), torch.zeros(50)))]), "got a ndarray, shape"),
        (Parts([50], lambda s, p: [Piece(0, (torch.zeros(50, 2), torch.zeros(4)))]), "as many rows each"),
    ],
)
def test_parts_that_are_not_all_rows(source: RowSource, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(source, mlp(), loss="mse", window=20)


def test_several_bad_rows_are_told_as_the_first() -> None:
    columns = table()
    columns["numbers"][100:130] = np.nan
    with pytest.raises(ValueError, match=r"got nan in row 100, column 0; a row .* \(row 100\)$"):
        train(ArrayRows(columns["categories"], columns["numbers"], columns["click"]))


def test_arrays_of_other_layouts() -> None:
    records = np.zeros(N, [("a", "u1"), ("x", "<f4", (2,)), ("y", "u1")])
    records["x"] = table()["numbers"]
    source = ArrayRows(records["x"], records["y"])
    assert np.array_equal(source.rows(torch.arange(N))[0], table()["numbers"])
    backwards = ArrayRows(table()["numbers"][::-1], table()["click"].astype(">i4"))
    assert np.array_equal(backwards.rows(torch.tensor([0]))[0][0], table()["numbers"][-1])
    assert np.array_equal(backwards.rows(torch.arange(N))[1], table()["click"])


def test_files_with_strange_names_and_columns(tmp_path: Path) -> None:
    parquet.write_table(arrow_table(table()), tmp_path / "day:1 50%.parquet")
    assert len(arrow(tmp_path / "day:1 50%.parquet")) == N
    twice = pa.Table.from_arrays([pa.array([1.0])] * 3, names=["x0", "x0", "click"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice.parquet: expected (one column 'x0', got 2|a whole)"):
        ArrowRows(tmp_path / "twice.parquet", ["x0"], "click")
    (tmp_path / "latin.csv").write_bytes("prix_\xe9,y\n1,2\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.csv: expected"):
        ArrowRows(tmp_path / "latin.csv", ["x"], "y")
    with pytest.raises(TypeError, match="files: expected a path or a list of them, got a int"):
        ArrowRows(5, "x", "y")


# ------------------------------------------------------------------------------------------------------------
# Batches as they come


def of_batches(*sizes: int) -> Any:
    def batches() -> Any:
        start = 0
        for size in sizes:
            yield tuple(column[start : start + size] for column in table().values())
            start += size

    return batches


def test_a_loader_or_a_function_is_as_good_as_arrays() -> None:
    dataset = torch.utils.data.TensorDataset(*(torch.from_numpy(c) for c in table().values()))
    loader = torch.utils.data.DataLoader(dataset, batch_size=33)
    expected = train(ArrayRowsInOne(), window=100, validation=arrays())
    for batches in (loader, of_batches(1, 0, 500, 199), list(of_batches(350, 350)())):
        source = IterableRows(batches, rows=N)
        found = train(source, window=100, validation=source)
        assert same(found[0], expected[0])
        np.testing.assert_array_equal(found[1].validation_loss, expected[1].validation_loss)
    index = torch.tensor([699, 0, 33, 34, 0])
    assert np.array_equal(IterableRows(loader, N).rows(index)[1], table()["numbers"][index])


class ArrayRowsInOne(ArrayRows):
    """All rows in one part."""

    def __init__(self) -> None:
        super().__init__(*table().values())

    @property
    def parts(self) -> Any:
        return [N]

    def read(self, part: int) -> Any:
        yield Piece(0, self.columns)


@pytest.mark.parametrize(
    ("batches", "rows", "error", "message"),
    [
        (
            of_batches(700),
            699,
            ValueError,
            "IterableRows: batches: expected 699 rows, got 700 or more by batch 0",
        ),
        (
            of_batches(600),
            700,
            ValueError,
            "IterableRows: batches: expected 700 rows, got 600: has it changed",
        ),
        (
            [(torch.zeros(2, 2),)],
            2,
            TypeError,
            "IterableRows: batches: expected tuples of columns, .* got a tuple",
        ),
        ([torch.zeros(2)], 2, TypeError, "got a Tensor as batch 0"),
        ([(torch.zeros(2), torch.zeros(3))], 2, ValueError, r"got \[2, 3\] in batch 0"),
        (of_batches(700)(), 700, TypeError, "gone through in every epoch, got a generator"),
        (3, 700, TypeError, "expected an iterable or a function, got a int"),
        (of_batches(700), 0, ValueError, "rows: expected a positive integer, got 0"),
        (of_batches(700), 1.5, ValueError, "rows: expected a positive integer, got 1.5"),
    ],
)
def test_batches_that_are_not_as_they_should(batches: Any, rows: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        train(IterableRows(batches, rows), window=5000)


def test_a_name_is_another_run(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train(IterableRows(of_batches(700), N, name="monday"), window=128, checkpoint=path)
    with pytest.raises(ValueError, match="is of another run: expected data"):
        train(IterableRows(of_batches(700), N, name="tuesday"), window=128, checkpoint=path, epochs=3)


def test_rows_that_batches_do_not_have() -> None:
    for wrong in (-1, N):
        with pytest.raises(IndexError, match="expected numbers from 0 to 699"):
            IterableRows(of_batches(N), N).rows(torch.tensor([wrong]))
    with pytest.raises(ValueError, match="expected 1000 rows, got 700"):
        IterableRows(of_batches(N), 1000).rows(torch.tensor([800]))


@pytest.mark.parametrize(
    ("values", "dtype", "got"),
    [
        ([5, 2**32 + 5], np.int32, "4294967301"),
        ([1, 300], np.int8, "300"),
        ([1.0, 1.5], np.int64, "1.5"),
        ([1.0, np.nan], np.int64, "nan"),
        ([1.0, 1e30], np.int64, "1e"),
        ([1.0, 2.0**63], np.int64, "9.22"),
        ([0, 2], np.bool_, "2"),
    ],
)
def test_numbers_that_a_type_does_not_hold(tmp_path: Path, values: Any, dtype: Any, got: str) -> None:
    parquet.write_table(pa.table({"x": values, "y": [0, 1]}), tmp_path / "a.parquet")
    for columns in ("x", ["x"]):
        source = ArrowRows(tmp_path, columns, "y", dtypes=(dtype, None))
        with pytest.raises(
            ValueError, match=rf"row 1 of .*a number of {np.dtype(dtype)} in column 'x', got {got}"
        ):
            source.rows(torch.tensor([0]))


def test_a_column_that_is_taken_twice_keeps_its_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,y\n16777217,1\n3,0\n")
    source = ArrowRows(tmp_path, "id", "id", "y", dtypes=(np.int64, np.float32, None))
    ids, numbers, _ = source.rows(torch.arange(2))
    assert ids.tolist() == [16777217, 3] and numbers.dtype == torch.float32
    plain = ArrowRows(tmp_path, "id", "id", "y", dtypes=(None, np.float32, None))
    assert plain.rows(torch.arange(2))[0].tolist() == [16777217, 3]
    with pytest.raises(TypeError, match="dtypes: expected types of numpy, got"):
        ArrowRows(tmp_path, "id", "y", dtypes=("foo", None))
