"""`python -m pyens`: prints the build, and finds a wrong kernel."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyens
from pyens import __main__ as main
from pyens import ops
from pyens.ops.ensemble_mlp import ensemble_mlp, ensemble_mlp_packed

LINE = re.compile(
    r"^  (?P<name>\S.*?) +(?P<problems>\d+) +(?P<error>\d+\.\d+|inf)  (?P<verdict>ok|FAILED)$", re.M
)


def verdicts(output: str) -> dict[str, str]:
    return {match["name"]: match["verdict"] for match in LINE.finditer(output)}


def test_as_a_command():
    result = subprocess.run(
        [sys.executable, "-m", "pyens"],
        cwd=Path(pyens.__file__).parents[1],
        env={**os.environ, "PYENS_CPU_CAPABILITY": "base"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    info = pyens.build_info()
    assert f"pyens {info['version']}\n" in result.stdout
    assert re.search(
        rf"built for torch +{re.escape(torch.__version__)}, Python {info['python']}\n", result.stdout
    )
    assert re.search(r"CPU kernels +base \(PYENS_CPU_CAPABILITY=base\)\n", result.stdout)
    assert re.search(rf"CUDA kernels +{re.escape(info['cuda'])}\n", result.stdout)
    assert re.search(r"threads +\d+\n", result.stdout)
    assert verdicts(result.stdout) == dict.fromkeys(main.CHECKS, "ok")
    for match in LINE.finditer(result.stdout):
        assert int(match["problems"]) > 50 and 0 < float(match["error"]) <= 1


def test_every_public_operation_is_checked():
    assert set(ops.__all__) <= set(main.CHECKS)


def one_output(y):
    y = y.clone()
    y.view(-1)[-1] += y.double().square().mean().sqrt().to(y.dtype)
    return y


def only_small_batches(y):
    return y * 1.001 if y.shape[1] < 16 else y


def only_bfloat16(y):
    return y * 1.2 if y.dtype == torch.bfloat16 else y


WRONG = {
    "a little": lambda y: y * (1 + 3e-6),
    "one output": one_output,
    "NaN": lambda y: y * float("nan"),
    "infinite": lambda y: y + float("inf"),
    "zero": torch.zeros_like,
    "members swapped": lambda y: y.flip(0),
    "shape": lambda y: y[..., :1].expand(*y.shape[:2], y.shape[2] + 1),
    "dtype": lambda y: y.double(),
    "small batches": only_small_batches,
    "bfloat16": only_bfloat16,
}


@pytest.mark.parametrize("how", WRONG)
def test_finds_a_wrong_kernel(monkeypatch, capsys, how):
    wrong = WRONG[how]
    monkeypatch.setattr(ops, "ensemble_mlp", lambda *a, **k: wrong(ensemble_mlp(*a, **k)))
    monkeypatch.delitem(main.CHECKS, "ensemble_mlp, gradients")
    assert main.main() == 1
    expected = {**dict.fromkeys(main.CHECKS, "ok"), "ensemble_mlp": "FAILED"}
    assert verdicts(capsys.readouterr().out) == expected


def test_finds_a_wrong_packed_kernel(monkeypatch, capsys):
    monkeypatch.setattr(main, "ensemble_mlp_packed", lambda *a, **k: one_output(ensemble_mlp_packed(*a, **k)))
    assert main.main() == 1
    expected = {**dict.fromkeys(main.CHECKS, "ok"), "ensemble_mlp, packed": "FAILED"}
    assert verdicts(capsys.readouterr().out) == expected


def test_finds_a_wrong_gradient(monkeypatch, capsys):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + 1e-5)

    monkeypatch.setattr(ops, "ensemble_mlp", lambda *a, **k: Wrong.apply(ensemble_mlp(*a, **k)))
    assert main.main() == 1
    expected = {**dict.fromkeys(main.CHECKS, "ok"), "ensemble_mlp, gradients": "FAILED"}
    assert verdicts(capsys.readouterr().out) == expected


def test_relative_error():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    plain = exact.float()
    eps = torch.finfo(torch.float32).eps
    assert main.relative_error(plain, plain, exact) == 0
    # Plain PyTorch is exact here, so two roundings are allowed; of those, eight are four times too many.
    assert main.relative_error(plain * (1 + 8 * eps), plain, exact) == pytest.approx(4)
    # An error of plain PyTorch's allows twice as much.
    off = plain * (1 + 8 * eps)
    assert main.relative_error(off, off, exact) == pytest.approx(8 / (2 * 8 + 2))
    assert main.relative_error(exact * (1 + 2**-48), exact, exact) == pytest.approx(1)
    zero = torch.zeros(2)
    assert main.relative_error(zero, zero, zero.double()) == 0
    assert main.relative_error(zero + 1, zero, zero.double()) == float("inf")
