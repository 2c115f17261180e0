"""Trainer.partial_fit: rows as they come, scored before they are learnt from, going on to the bit."""

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

import pyens
from pyens.data import ArrayRows, ClickStream, RowSource
from pyens.data.rows import Piece
from pyens.metrics import ProgressiveScores
from pyens.nn import TabularEnsemble
from pyens.training import Trainer

CATEGORIES = (7, 40, 3)


class Clicks(RowSource):
    """Rows of a stream without end, as many as one likes."""

    def __init__(self, rows: int = 1000, seed: int = 0) -> None:
        self.count, self.stream = rows, ClickStream(seed=seed, categories=CATEGORIES, numeric_features=2)

    def __len__(self) -> int:
        return self.count

    def rows(self, index: Tensor) -> Any:
        found = self.stream.rows(index)
        return found.categorical, found.numeric, found.label

    def fingerprint(self) -> str:
        return f"{self.count} of {self.stream.fingerprint()}"


def trainer(members: int = 3, **options: Any) -> Trainer:
    sizes = [(size, 4) for size in CATEGORIES]
    model = TabularEnsemble(members, sizes, 2, [8], 1, dropout=0.1, seeds=range(members))
    arguments: dict[str, Any] = {"loss": "bce", "optimizer": lambda p: torch.optim.Adagrad(p, lr=0.05)}
    return Trainer(model, **(arguments | options))


def parameters(one: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in one.model.parameters()]


def same(a: Trainer, b: Trainer) -> bool:
    return all(torch.equal(p, q) for p, q in zip(parameters(a), parameters(b), strict=True))


def columns(rows: int = 1000) -> tuple[Tensor, ...]:
    return Clicks(rows).rows(torch.arange(rows))


def by_hand(rows: int = 1000, batch_size: int = 64) -> tuple[Trainer, ProgressiveScores]:
    own, scores = trainer(), ProgressiveScores()
    for batch in zip(*(c.split(batch_size) for c in columns(rows)), strict=True):
        categorical, numeric, label = batch
        own.model.eval()
        with torch.no_grad():
            scores.update(own.model(categorical, numeric), label)
        own.step(categorical, numeric, label.unsqueeze(1))
    return own, scores


def batches(*sizes: int) -> Any:
    start = 0
    for size in sizes:
        yield tuple(c[start : start + size] for c in columns())
        start += size


WAYS: dict[str, Any] = {
    "source": Clicks,
    "tuple": columns,
    "list": lambda: list(columns()),
    "arrays": lambda: tuple(c.numpy() for c in columns()),
    "generator": lambda: batches(1, 500, 63, 436),
    "list of tuples": lambda: list(batches(100, 900)),
    "loader": lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*columns()), batch_size=10),
    "small types": lambda: ArrayRows(columns()[0].numpy().astype(np.int8), columns()[1], columns()[2].bool()),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_a_loop_of_steps(way: str) -> None:
    expected, scores = by_hand()
    found, own = trainer(), ProgressiveScores()
    assert found.partial_fit(WAYS[way](), batch_size=64, scores=own) is found
    assert same(found, expected) and found.rows_met == 1000
    for name, value in scores.compute().items():
        assert torch.equal(own.compute()[name], value)


def test_scores_are_of_rows_that_nobody_has_learnt_from() -> None:
    own, scores = trainer(), ProgressiveScores()
    own.partial_fit(Clicks(64), batch_size=64, scores=scores)  # one batch: predicted by untrained members
    untrained = trainer()
    categorical, numeric, label = columns(64)
    expected = ProgressiveScores()
    expected.update(untrained.outputs([categorical, numeric]), label)
    assert torch.equal(scores.compute()["log_loss"], expected.compute()["log_loss"])
    later = ProgressiveScores()
    trainer().partial_fit(Clicks(20_000), batch_size=64, scores=later)
    assert float(later.compute()["auroc"][-1]) > 0.55


def test_calls_go_on_where_the_last_one_was() -> None:
    expected, _ = by_hand()
    found = trainer()
    for start, stop in ((0, 64), (64, 640), (640, 1000)):
        found.partial_fit(tuple(c[start:stop] for c in columns()), batch_size=64)
    assert same(found, expected) and found.rows_met == 1000


def test_a_member_is_as_if_alone() -> None:
    together = trainer(3, seeds=[4, 5, 6]).partial_fit(Clicks(300), batch_size=32)
    alone = Trainer(
        TabularEnsemble(1, [(size, 4) for size in CATEGORIES], 2, [8], 1, dropout=0.1, seeds=[1]),
        loss="bce",
        optimizer=lambda p: torch.optim.Adagrad(p, lr=0.05),
        seeds=[5],
    ).partial_fit(Clicks(300), batch_size=32)
    for p, q in zip(parameters(together), parameters(alone), strict=True):
        assert torch.equal(p[1], q[0])


class Stop(Exception):
    pass


def stop_at(step: int) -> Any:
    def stop(trainer: Trainer, losses: Tensor) -> None:
        assert losses.shape == (3,)
        if trainer._steps == step:
            raise Stop

    return stop


@pytest.mark.parametrize("way", ["source", "generator", "loader"])
@pytest.mark.parametrize("step", [1, 7, 16])
def test_it_goes_on_from_a_checkpoint_to_the_bit(tmp_path: Path, way: str, step: int) -> None:
    expected, scores = by_hand()
    path = tmp_path / "stream.pt"
    options: dict[str, Any] = {"batch_size": 64, "checkpoint": path, "checkpoint_every": 1e-9}
    threads = threading.active_count()
    if step < 16:
        with pytest.raises(Stop):
            trainer().partial_fit(
                WAYS[way](), scores=ProgressiveScores(), callback=stop_at(step + 1), **options
            )
    else:
        trainer().partial_fit(WAYS[way](), scores=ProgressiveScores(), **options)
    found, own = trainer(), ProgressiveScores()
    found.partial_fit(WAYS[way](), scores=own, **options)
    assert same(found, expected) and found.rows_met == 1000 and threading.active_count() == threads
    for name, value in scores.compute().items():
        assert torch.equal(own.compute()[name], value)


KILLED = """
import sys
sys.path[:0] = [{tests!r}]
import test_partial_fit as t
scores = t.ProgressiveScores()
t.trainer().partial_fit(
    t.Clicks(10**6), batch_size=64, scores=scores, checkpoint=sys.argv[1], checkpoint_every=1e-9
)
"""


@pytest.mark.parametrize("after", [0.0, 0.13])
def test_killed_at_any_moment(tmp_path: Path, after: float) -> None:
    path = tmp_path / "stream.pt"
    code = KILLED.format(tests=str(Path(__file__).parent))
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[1])
    try:
        while not path.exists():
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(after)
    finally:
        child.kill()
        child.wait()
    met = torch.load(path, weights_only=True)["state"]["rows"]
    assert 0 < met < 10**6 and met % 64 == 0
    source = Clicks(10**6)
    end = met // 64 + 3

    def run(one: Trainer, scores: ProgressiveScores, checkpoint: Path | None) -> None:
        with pytest.raises(Stop):
            one.partial_fit(
                source, batch_size=64, scores=scores, checkpoint=checkpoint, callback=stop_at(end)
            )

    found, own = trainer(), ProgressiveScores()
    run(found, own, path)
    expected, scores = trainer(), ProgressiveScores()
    run(expected, scores, None)
    assert same(found, expected)
    assert torch.equal(own.compute()["log_loss"], scores.compute()["log_loss"])


def test_files_of_another_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stream.pt"
    trainer().partial_fit(Clicks(200), batch_size=64, checkpoint=path)
    saved = path.read_bytes()
    for one, data, options, message in (
        (trainer(), Clicks(300), {}, "data: expected what .* has met, Clicks of 200"),
        (trainer(), Clicks(200, seed=1), {}, "data: expected what .* has met, Clicks of 200"),
        (trainer(), columns(200), {}, "data: expected what .* has met, Clicks of 200"),
        (trainer(), Clicks(200), {"batch_size": 32}, "is of another run: expected batch_size"),
        (trainer(4), Clicks(200), {}, "is of another run"),
        (trainer(seed=1), Clicks(200), {}, "is of another run: expected seed"),
        (
            trainer(),
            Clicks(200),
            {"scores": ProgressiveScores()},
            r"expected the state of such a run, got ValueError\(.no scores",
        ),
    ):
        arguments: dict[str, Any] = {"batch_size": 64, "checkpoint": path} | options
        with pytest.raises(ValueError, match=message):
            one.partial_fit(data, **arguments)
    path.write_bytes(saved[:-40])
    with pytest.raises(ValueError):
        trainer().partial_fit(Clicks(200), batch_size=64, checkpoint=path)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.zeros(3), TypeError, "data: expected a tuple of tensors, a RowSource, or .* got a Tensor"),
        (3, TypeError, "data: expected a tuple of tensors"),
        ("rows", TypeError, "data: expected a tuple of tensors"),
        ((torch.zeros(2, 3),), TypeError, "data: expected tuples of columns, inputs and target, got a tuple"),
        ([torch.zeros(2, 3), None], TypeError, "data: expected tensors or arrays"),
        (iter([torch.zeros(2, 3)]), TypeError, "data: expected tuples of columns.* got a Tensor as batch 0"),
        (iter([(torch.zeros(2, 3), torch.zeros(3))]), ValueError, r"data: .* as many rows .* got \[2, 3\]"),
        (
            iter([(torch.zeros(2), "no")]),
            TypeError,
            "data: expected tensors or arrays.* got Tensor, str as batch 0",
        ),
    ],
)
def test_data_that_are_none(data: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"partial_fit: {message}"):
        trainer().partial_fit(data, batch_size=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected a positive integer"),
        ({"scores": 3}, TypeError, "scores: expected an object with update, got a int"),
        ({"checkpoint": "/"}, ValueError, "checkpoint: expected a file in a folder that exists"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every: expected a positive number"),
        ({"checkpoint_every": None}, ValueError, "checkpoint_every: expected a positive number, got None"),
    ],
)
def test_arguments_that_are_none(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        trainer().partial_fit(Clicks(10), **({"batch_size": 2} | options))


def test_a_bad_row_is_refused_before_it_is_learnt_from() -> None:
    categorical, numeric, label = columns()
    numeric[700, 1] = np.nan
    own = trainer()
    with pytest.raises(ValueError, match=r"finite numbers, got nan in row 60, .* from number 640 on"):
        own.partial_fit((categorical, numeric, label), batch_size=64)
    assert own.rows_met == 640 and all(p.isfinite().all() for p in parameters(own))
    numeric[700, 1], categorical[650, 1] = 0, 40
    with pytest.raises(ValueError, match="expected categories from 0 to 39 in column 1, got 40"):
        trainer().partial_fit((categorical, numeric, label), batch_size=64)


def test_an_error_of_the_stream_reaches_the_caller() -> None:
    def broken() -> Any:
        yield from batches(100, 100)
        raise OSError("the line is dead")

    own = trainer()
    with pytest.raises(OSError, match="the line is dead"):
        own.partial_fit(broken(), batch_size=64)
    assert own.rows_met in (128, 192)


def test_schedules_and_averages_of_steps() -> None:
    own = trainer(
        scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 16), schedule="step", ema=0.9
    )
    own.partial_fit(Clicks(1000), batch_size=64)
    assert own.learning_rate == pytest.approx(0.005)
    before = parameters(own)
    with own.averaged():
        assert any(not torch.equal(p, q) for p, q in zip(parameters(own), before, strict=True))


# ------------------------------------------------------------------------------------------------------------
# What a reader broke


def days() -> list[tuple[Tensor, ...]]:
    return [tuple(c[start:stop] for c in columns()) for start, stop in ((0, 300), (300, 520), (520, 1000))]


@pytest.mark.parametrize("stop", [(0, 2), (1, 1), (1, 4), (2, 3), None])
def test_several_calls_with_one_file_go_on_together(tmp_path: Path, stop: Any) -> None:
    def run(own: Trainer, scores: ProgressiveScores, path: Path | None, stop: Any = None) -> None:
        for number, day in enumerate(days()):
            begun = own._steps
            at = None if stop is None or stop[0] != number else stop_at(begun + stop[1])
            own.partial_fit(
                day, batch_size=64, scores=scores, checkpoint=path, checkpoint_every=1e-9, callback=at
            )

    expected, scores = trainer(), ProgressiveScores()
    run(expected, scores, None)
    path = tmp_path / "days.pt"
    if stop is None:
        run(trainer(), ProgressiveScores(), path)
    else:
        with pytest.raises(Stop):
            run(trainer(), ProgressiveScores(), path, stop)
    found, own = trainer(), ProgressiveScores()
    run(found, own, path)
    assert same(found, expected) and found.rows_met == 1000 == own.rows
    assert torch.equal(own.compute()["log_loss"], scores.compute()["log_loss"])


def test_a_schedule_of_steps_goes_on(tmp_path: Path) -> None:
    def scheduled() -> Trainer:
        return trainer(scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5), schedule="step")

    expected, path = scheduled(), tmp_path / "s.pt"
    for day in days():
        expected.partial_fit(day, batch_size=64)
    for _ in range(2):
        found = scheduled()
        for day in days():
            found.partial_fit(day, batch_size=64, checkpoint=path)
    assert same(found, expected) and found.learning_rate == expected.learning_rate


def test_files_that_this_trainer_has_not_written_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "stream.pt"
    trainer().partial_fit(Clicks(200), batch_size=64, checkpoint=path)
    saved = path.read_bytes()
    stepped, fitted = trainer(), trainer()
    stepped.step(*columns(64)[:2], columns(64)[2].unsqueeze(1))
    fitted.fit(columns(100), epochs=1, batch_size=50, progress=False)
    for own in (stepped, fitted):
        before = parameters(own)
        with pytest.raises(ValueError, match="expected a Trainer that has not learnt yet"):
            own.partial_fit(Clicks(200), batch_size=64, checkpoint=path)
        assert all(torch.equal(p, q) for p, q in zip(parameters(own), before, strict=True))
    assert path.read_bytes() == saved
    other = tmp_path / "fit.pt"
    trainer().fit(columns(100), epochs=1, batch_size=50, progress=False, checkpoint=other)
    with pytest.raises(ValueError, match="expected a checkpoint of partial_fit, got another file"):
        trainer().partial_fit(Clicks(200), batch_size=64, checkpoint=other)


def test_less_than_was_met_and_other_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stream.pt"
    options: dict[str, Any] = {"batch_size": 64, "checkpoint": path, "checkpoint_every": 1e-9}
    with pytest.raises(Stop):
        trainer().partial_fit(columns(), callback=stop_at(5), **options)
    with pytest.raises(ValueError, match=r"data: expected what .* has met, torch.int64"):
        trainer().partial_fit(tuple(c.flip(0) for c in columns()), **options)
    stream = tmp_path / "generator.pt"
    options["checkpoint"] = stream
    with pytest.raises(Stop):
        trainer().partial_fit(batches(500, 500), callback=stop_at(5), **options)
    with pytest.raises(ValueError, match=r"expected the 256 rows that .* has met, and others .* got 100"):
        trainer().partial_fit(batches(100), **options)


def test_scores_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "stream.pt"
    trainer().partial_fit(Clicks(200), batch_size=64, checkpoint=path, scores=ProgressiveScores(bins=64))
    own = trainer()
    for wrong in (ProgressiveScores(bins=32), OtherScores()):
        with pytest.raises(ValueError, match="expected the state of such a run, got"):
            own.partial_fit(Clicks(200), batch_size=64, checkpoint=path, scores=wrong)
    own.partial_fit(Clicks(200), batch_size=64, checkpoint=path, scores=ProgressiveScores(bins=64))
    assert own.rows_met == 200


class OtherScores:
    def update(self, outputs: Tensor, target: Tensor) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"other": 1}

    def load_state_dict(self, state: Any) -> None:
        assert state["other"] == 1


def test_statistics_of_batches_are_those_of_steps(tmp_path: Path) -> None:
    def own() -> Trainer:
        model = pyens.nn.EnsembleSequential(
            pyens.EnsembleLinear(2, 8, 6), pyens.nn.EnsembleBatchNorm(2, 6), pyens.EnsembleLinear(2, 6, 3)
        )
        model.reset_parameters([0, 1])
        return Trainer(model, loss="cross_entropy", optimizer=lambda p: torch.optim.SGD(p, lr=0.1))

    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(160, 8, generator=draw), torch.randint(3, (160,), generator=draw)
    expected = own()
    for start in range(0, 160, 16):
        expected.step(x[start : start + 16], y[start : start + 16])
    path = tmp_path / "s.pt"
    options: dict[str, Any] = {"batch_size": 16, "checkpoint": path, "checkpoint_every": 1e-9}

    def stop(trainer: Trainer, losses: Tensor) -> None:
        if trainer._steps == 6:
            raise Stop

    with pytest.raises(Stop):
        own().partial_fit((x, y), callback=stop, **options)
    found = own()
    found.partial_fit((x, y), **options)
    assert same(found, expected)
    theirs = dict(expected.model.named_buffers())
    assert theirs and all(torch.equal(b, theirs[n]) for n, b in found.model.named_buffers())


def test_a_generator_may_fill_its_memory_again() -> None:
    def refilled() -> Any:
        held = tuple(torch.empty_like(c[:50]) for c in columns())
        for start in range(0, 1000, 50):
            for place, column in zip(held, columns(), strict=True):
                place.copy_(column[start : start + 50])
            yield held

    expected, _ = by_hand()
    assert same(trainer().partial_fit(refilled(), batch_size=64), expected)


class Short(Clicks):
    @property
    def parts(self) -> list[int]:
        return [len(self)]

    def read(self, part: int) -> Any:
        yield Piece(0, self.rows(torch.arange(50)))


def test_sources_and_batches_that_are_not_as_they_say() -> None:
    with pytest.raises(ValueError, match="partial_fit: data: expected 1000 rows in part 0 of Short, got 50"):
        trainer().partial_fit(Short(), batch_size=64)
    wide = (torch.zeros(10, 3, dtype=torch.int64), torch.zeros(10, 3), torch.zeros(10))
    with pytest.raises(ValueError, match="partial_fit: data: expected rows of one form, got shapes"):
        trainer().partial_fit([next(batches(10)), wide], batch_size=64)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"swa_start": 1}, "swa_start: expected None, for there are no epochs here, got 1"),
        (
            {"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 2)},
            "schedule: expected 'step', for there are no epochs here, got 'epoch'",
        ),
    ],
)
def test_what_needs_epochs_is_refused(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"partial_fit: {message}"):
        trainer(**made).partial_fit(Clicks(10), batch_size=5)
