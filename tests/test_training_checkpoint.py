"""Checkpoints: a run that was killed goes on to the bit, and a file is there whole or not at all."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyens import EnsembleLinear, _files
from pyens.nn import TabularEnsemble
from pyens.optim import fused
from pyens.training import History, Randomness, fit

N, MEMBERS = 150, 6


def table() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    categorical = torch.randint(5, (N, 1), generator=draw)
    numeric = torch.randn(N, 3, generator=draw)
    return categorical, numeric, numeric[:, :1] * categorical + torch.randn(N, 1, generator=draw)


def run(
    path: Path | None, epochs: int, device: torch.device | str = "cpu", **options: Any
) -> tuple[list[Tensor], History]:
    model = TabularEnsemble(MEMBERS, [(5, 2)], 3, [7], 1, dropout=0.1, device=device)
    arguments: dict[str, Any] = {
        "data": tuple(t.to(device) for t in table()),
        "loss": "mse",
        "batch_size": 16,
        "optimizer": lambda p: fused(torch.optim.Adam, p, lr=3e-2),
        "randomness": Randomness.from_code("R7"),
        "seed": 1,
        "early_stopping": 2,
        "progress": False,
    }
    history = fit(model, epochs=epochs, checkpoint=path, **(arguments | options))
    return [p.detach() for p in model.parameters()], history


def assert_same(one: tuple[list[Tensor], History], other: tuple[list[Tensor], History]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    for name in ("train_loss", "validation_loss", "best_epoch"):
        np.testing.assert_array_equal(getattr(one[1], name), getattr(other[1], name))
    assert one[1].status == other[1].status


def test_a_run_in_pieces_is_the_run_in_one(tmp_path: Path, device: torch.device) -> None:
    whole = run(None, 12, device)
    assert {"stopped"} <= set(whole[1].status)
    assert len(set(whole[1].epochs)) > 1
    for epochs in (1, 2, 3, 5, 8, 11, 12):
        pieces = run(tmp_path / "run.pt", epochs, device)
    assert_same(pieces, whole)
    assert_same(run(tmp_path / "run.pt", 12, device), whole)  # nothing is left to do


@pytest.mark.parametrize("every", [2, 5, 100])
def test_fewer_checkpoints(tmp_path: Path, every: int) -> None:
    run(tmp_path / "run.pt", 3, checkpoint_every=every)
    assert_same(run(tmp_path / "run.pt", 7, checkpoint_every=every), run(None, 7))


@pytest.mark.parametrize("kind", ["adam", "sgd", "adagrad"])
def test_other_optimizers_resume_too(tmp_path: Path, kind: str) -> None:
    make = {
        "adam": lambda p: torch.optim.Adam(p, lr=3e-2, amsgrad=True, fused=False),
        "sgd": lambda p: fused(torch.optim.SGD, p, lr=1e-2, momentum=0.9),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-1, initial_accumulator_value=0.1),
    }[kind]
    for epochs in (2, 6):
        pieces = run(tmp_path / "run.pt", epochs, optimizer=make)
    assert_same(pieces, run(None, 6, optimizer=make))


def test_a_diverged_member_stays_so(tmp_path: Path) -> None:
    def broken(path: Path | None, epochs: int) -> tuple[list[Tensor], History]:
        optimizer = lambda p: torch.optim.SGD(p, lr=0.35)  # noqa: E731
        return run(path, epochs, optimizer=optimizer, early_stopping=None)

    with pytest.warns(UserWarning, match="diverged"):
        whole = broken(None, 9)
        for epochs in (1, 4, 9):
            pieces = broken(tmp_path / "run.pt", epochs)
    assert whole[1].diverged.any()
    assert_same(pieces, whole)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 17},
        {"seed": 2},
        {"seeds": [5, 4, 3, 2, 1, 0]},
        {"randomness": Randomness.from_code("R5")},
        {"left_out": [5, 4, 3, 2, 1, 0]},
        {"early_stopping": 3},
        {"validation": 0.1},
        {"data": (*table()[:2], table()[2] + 1)},
    ],
)
def test_another_run_is_refused_and_the_file_stays(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "run.pt"
    run(path, 1)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"run.pt is of another run: expected .*; name another file"):
        run(path, 2, **change)
    assert path.read_bytes() == content


class Shifted(EnsembleLinear):
    def __init__(self, shift: float, hidden: int = 2) -> None:
        super().__init__(3, 4, 1, seeds=[1, 2, 3])
        self.register_buffer("shift", torch.tensor([shift, 0.0]))
        self.unused = torch.nn.Parameter(torch.zeros(3, hidden))

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return super().forward(x) + self.shift[0]


@pytest.mark.parametrize(
    "change, message",
    [(Shifted(2.0), "expected buffers {'shift'"), (Shifted(1.0, hidden=3), "expected parameters {'weight'")],
)
def test_another_model_of_the_same_repr_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    path, x = tmp_path / "run.pt", torch.randn(20, 4)

    def train(model: Any, epochs: int) -> None:
        fit(
            model,
            (x, x[:, :1]),
            loss="mse",
            epochs=epochs,
            batch_size=5,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            checkpoint=path,
            progress=False,
        )

    train(Shifted(1.0), 1)
    train(Shifted(1.0), 2)
    assert str(change) == str(Shifted(1.0))
    with pytest.raises(ValueError, match=f"run.pt is of another run: {message}"):
        train(change, 3)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "half", "another"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "run.pt"
    if content == "half":
        run(path, 1)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content == "another":
        torch.save({"weights": torch.ones(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run.pt"):
        run(path, 2)


def test_checkpoints_load_as_weights_only(tmp_path: Path) -> None:
    run(tmp_path / "run.pt", 2)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert saved["state"]["epoch"] == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "run.pt"]


def test_a_second_run_on_one_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"

    def second(parameters: Any) -> torch.optim.Optimizer:
        with pytest.raises(RuntimeError, match=r"run\.pt: expected one run at a time"):
            run(path, 1)
        return fused(torch.optim.Adam, parameters, lr=3e-2)

    assert_same(run(path, 4, optimizer=second), run(None, 4))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -5},
        {"epoch": "3"},
        {"epoch": None},
        {"active": [0]},
        {"active": 3},
        {"losses": torch.zeros(2)},
        {"seconds": []},
        {"best": torch.zeros(2, dtype=torch.float64)},
        {"best_epoch": torch.full((MEMBERS,), 9)},
        {"status": torch.full((MEMBERS,), 7)},
        {"status": None},
        {"kept": {}},
        {"parameters": "nan"},
        {"parameters": "scalar"},
        {"trainer": None},
        {"callbacks": [{}]},
        {"metrics": torch.zeros(3)},
    ],
)
def test_a_crafted_file_is_named_and_changes_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "run.pt"
    run(path, 3)
    saved = _files.load(path)
    ((name, value),) = change.items()
    if name == "parameters":
        bad = torch.tensor(torch.nan) if value == "scalar" else None
        value = {key: t * torch.nan if bad is None else bad for key, t in saved["state"][name].items()}
    for state in (saved["state"] | {name: value}, {k: v for k, v in saved["state"].items() if k != name}):
        _files.save(saved | {"state": state}, path)
        model = TabularEnsemble(MEMBERS, [(5, 2)], 3, [7], 1, dropout=0.1)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=r"^fit: checkpoint: .*run\.pt: expected the state of such"):
            fit(
                model,
                table(),
                loss="mse",
                epochs=5,
                batch_size=16,
                optimizer=lambda p: fused(torch.optim.Adam, p, lr=3e-2),
                randomness=Randomness.from_code("R7"),
                seed=1,
                early_stopping=2,
                progress=False,
                checkpoint=path,
            )
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for part in ("run", "state"):
        _files.save(saved | {part: None}, path)
        with pytest.raises(ValueError, match=r"^fit: checkpoint: .*run\.pt: expected a checkpoint of fit"):
            run(path, 5)


SCRIPT = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_training_checkpoint import run
torch.set_num_threads(1)
print("ready", flush=True)
run(Path(sys.argv[1]), 10_000, early_stopping=None)
"""


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    """A run that checkpoints all the time is killed again and again, and goes on from where it was."""
    path = tmp_path / "run.pt"
    draw = np.random.default_rng(0)
    reached = 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(path), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        before = path.stat().st_mtime_ns if path.exists() else 0
        while not path.exists() or path.stat().st_mtime_ns == before:  # until it has saved something new
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        epoch = torch.load(path, weights_only=True)["state"]["epoch"]
        assert epoch > reached
        reached = epoch
    resumed = run(path, reached + 3, early_stopping=None)
    assert_same(resumed, run(None, reached + 3, early_stopping=None))


def test_writing_is_all_or_nothing_under_kill_9(tmp_path: Path) -> None:
    """Large files, so that most kills hit while one is written."""
    script = """
import sys
from pyens import EnsembleLinear, _files
print("ready", flush=True)
i = 0
while True:
    i = (i + 1) % 200
    _files.write_atomically(sys.argv[1], bytes([i]) * 20_000_000)
"""
    path = tmp_path / "large"
    _files.write_atomically(path, b"\x00" * 20_000_000)
    draw = np.random.default_rng(1)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(draw.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        content = path.read_bytes()
        assert len(content) == 20_000_000
        assert len(set(content)) == 1
