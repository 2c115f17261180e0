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
from pyens.ops.ensemble_mlp_loss import ensemble_mlp_loss

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
        # Copies, bits and bytes.
        copies = "keyed_permutation", "mask_channels", "activation_strength, active"
        exact = match["name"] in copies or "int8" in match["name"]
        assert int(match["problems"]) > 50 and 0 <= float(match["error"]) <= 1
        assert (float(match["error"]) == 0) == exact


def test_help_checks_nothing(monkeypatch, capsys):
    monkeypatch.setattr(main, "self_check", None)  # calling it would be a TypeError
    for flags, code in ((["--help"], 0), (["--fast"], 2)):
        with pytest.raises(SystemExit) as end:
            main.main(flags)
        assert end.value.code == code
        assert "python -m pyens" in "".join(capsys.readouterr())


def test_every_public_operation_is_checked():
    # The rest are types, and what packs weights.
    operations = {name for name in ops.__all__ if name.islower() and not name.startswith("pack_")}
    assert len(operations) >= 10 and operations <= set(main.CHECKS)


def only(monkeypatch, *names: str) -> None:
    """Leaves out the other checks, for they take their time."""
    monkeypatch.setattr(main, "CHECKS", {name: main.CHECKS[name] for name in names})


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
    only(monkeypatch, "ensemble_mlp", "ensemble_mlp, packed")
    monkeypatch.setattr(ops, "ensemble_mlp", lambda *a, **k: wrong(ensemble_mlp(*a, **k)))
    assert main.main() == 1
    expected = {**dict.fromkeys(main.CHECKS, "ok"), "ensemble_mlp": "FAILED"}
    assert verdicts(capsys.readouterr().out) == expected


def test_finds_a_wrong_packed_kernel(monkeypatch, capsys):
    only(monkeypatch, "ensemble_mlp", "ensemble_mlp, packed")
    monkeypatch.setattr(main, "ensemble_mlp_packed", lambda *a, **k: one_output(ensemble_mlp_packed(*a, **k)))
    assert main.main() == 1
    assert verdicts(capsys.readouterr().out) == {"ensemble_mlp": "ok", "ensemble_mlp, packed": "FAILED"}


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 1e-5)


def test_finds_a_wrong_gradient(monkeypatch, capsys):
    only(monkeypatch, "ensemble_mlp", "ensemble_mlp, gradients")
    monkeypatch.setattr(ops, "ensemble_mlp", lambda *a, **k: WrongGradient.apply(ensemble_mlp(*a, **k)))
    assert main.main() == 1
    assert verdicts(capsys.readouterr().out) == {"ensemble_mlp": "ok", "ensemble_mlp, gradients": "FAILED"}


def test_finds_another_mask_of_dropout(monkeypatch, capsys):
    def with_one_other_seed(*args, dropout_seeds=None, **kwargs):
        if dropout_seeds is not None:
            dropout_seeds = dropout_seeds.clone()
            dropout_seeds[-1] += 1
        return ensemble_mlp(*args, dropout_seeds=dropout_seeds, **kwargs)

    only(monkeypatch, "ensemble_mlp", "ensemble_mlp, dropout")
    monkeypatch.setattr(ops, "ensemble_mlp", with_one_other_seed)
    assert main.main() == 1
    assert verdicts(capsys.readouterr().out) == {"ensemble_mlp": "ok", "ensemble_mlp, dropout": "FAILED"}


def without_weights(*args, sample_weight=None, **kwargs):
    return ensemble_mlp_loss(*args, **kwargs)


def without_temperature(*args, temperature=1.0, **kwargs):
    return ensemble_mlp_loss(*args, **kwargs)


WRONG_LOSS = {
    "a little": lambda *a, **k: ensemble_mlp_loss(*a, **k) * (1 + 3e-6),
    "one member": lambda *a, **k: one_output(ensemble_mlp_loss(*a, **k)),
    "members swapped": lambda *a, **k: ensemble_mlp_loss(*a, **k).flip(0),
    "dtype": lambda *a, **k: ensemble_mlp_loss(*a, **k).double(),
    "without weights": without_weights,
    "without temperature": without_temperature,
}


@pytest.mark.parametrize("how", WRONG_LOSS)
def test_finds_a_wrong_loss(monkeypatch, capsys, how):
    only(monkeypatch, "ensemble_mlp", "ensemble_mlp_loss")
    monkeypatch.setattr(ops, "ensemble_mlp_loss", WRONG_LOSS[how])
    assert main.main() == 1
    assert verdicts(capsys.readouterr().out) == {"ensemble_mlp": "ok", "ensemble_mlp_loss": "FAILED"}


def test_finds_a_wrong_gradient_of_the_loss(monkeypatch, capsys):
    only(monkeypatch, "ensemble_mlp_loss", "ensemble_mlp_loss, gradients")
    monkeypatch.setattr(
        ops, "ensemble_mlp_loss", lambda *a, **k: WrongGradient.apply(ensemble_mlp_loss(*a, **k))
    )
    assert main.main() == 1
    expected = {"ensemble_mlp_loss": "ok", "ensemble_mlp_loss, gradients": "FAILED"}
    assert verdicts(capsys.readouterr().out) == expected


@pytest.mark.parametrize("name", ["ensemble_embedding", "ensemble_embedding_concat"])
def test_finds_a_wrong_embedding(monkeypatch, capsys, name):
    module = ops if name in ops.__all__ else main
    right = getattr(module, name)
    only(monkeypatch, "ensemble_embedding", "ensemble_embedding, concatenated")
    monkeypatch.setattr(module, name, lambda *a, **k: right(*a, **k) * (1 + 3e-6))
    assert main.main() == 1
    verdict = {True: "FAILED", False: "ok"}
    assert verdicts(capsys.readouterr().out) == {
        "ensemble_embedding": verdict[module is ops],
        "ensemble_embedding, concatenated": verdict[module is main],
    }


@pytest.mark.parametrize("name", ["mask_channels", "masked_mlp", "masked_mlp_loss"])
def test_finds_a_wrong_masked_operation(monkeypatch, capsys, name):
    right = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *a, **k: right(*a, **k) * (1 + 1e-5))
    for other in set(main.CHECKS) - {name, "ensemble_embedding"}:
        monkeypatch.delitem(main.CHECKS, other)
    assert main.main() == 1
    assert verdicts(capsys.readouterr().out) == {"ensemble_embedding": "ok", name: "FAILED"}


WRONG_STRENGTH = {
    "a little": lambda strength: strength._replace(value=strength.value * (1 + 1e-5)),
    "output": lambda strength: strength._replace(output=strength.output * (1 + 1e-5)),
    "one bit of a thousand": lambda strength: strength._replace(active=other_bits(strength.active)),
    "dtype of active": lambda strength: strength._replace(active=strength.active.char()),
}


def other_bits(active):
    active = active.clone()
    active.view(-1)[::1000] ^= True
    return active


@pytest.mark.parametrize("how", WRONG_STRENGTH)
def test_finds_a_wrong_activation_strength(monkeypatch, capsys, how):
    wrong, right = WRONG_STRENGTH[how], ops.activation_strength
    only(monkeypatch, "activation_strength", "activation_strength, active")
    monkeypatch.setattr(ops, "activation_strength", lambda *a, **k: wrong(right(*a, **k)))
    assert main.main() == 1
    numbers, bits = ("FAILED", "ok") if how in ("a little", "output") else ("ok", "FAILED")
    assert verdicts(capsys.readouterr().out) == {
        "activation_strength": numbers,
        "activation_strength, active": bits,
    }


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
