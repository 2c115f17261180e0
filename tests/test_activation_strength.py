"""pyens.ops.activation_strength against its reference in float64, and the promises of its docstring."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pyens
from benchmarks import activation_strength as benchmark
from benchmarks import harness
from pyens import reference
from pyens.ops import activation_strength, ensemble_mlp
from pyens.reference.activation_strength import pack_bits
from pyens.reference.activations import ACTIVATIONS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# E, B, widths: both mappings of the CPU kernel, its vector widths and panels +- 1, hidden units that fill a
# vector or a byte and that do not.
SHAPES = [
    (1, 1, [5, 3]),
    (1, 1, [1, 1, 1]),
    (1, 1, [43, 50, 20, 10, 1]),
    (9, 1, [5, 3, 2]),
    (3, 2, [8, 8, 8, 8]),
    (2, 7, [33, 17, 9, 7]),
    (3, 8, [20, 40, 3]),
    (2, 9, [30, 12, 4, 10]),
    (2, 17, [127, 31, 1, 3]),
    (3, 63, [16, 50, 20, 10, 1]),
    (1, 65, [3, 1, 1, 1, 4]),
    (2, 129, [128, 13, 16]),
    (1, 40, [257, 193, 385, 2]),
    (2, 300, [6, 11, 2]),
    (1, 1100, [4, 15, 1]),
]


def problem(
    e: int, b: int, widths: list[int], dtype: torch.dtype, *, per_member: bool = False
) -> dict[str, Tensor | list[Tensor]]:
    """Random arguments of a size that keeps activations near 1."""
    layers = list(itertools.pairwise(widths))
    units = sum(widths[1:-1])
    leading = [e] if per_member else []
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "input": torch.randn(*leading, b, widths[0]).to(dtype),
        "weights": [(torch.randn(e, o, i) / i**0.5 * 1.4).to(dtype) for i, o in layers],
        "biases": [(torch.randn(e, o) * 0.3).to(dtype) for _, o in layers],
        "mean": torch.randn(*leading, units).to(statistics),
        "std": (torch.rand(*leading, units) + 0.1).to(statistics),
    }


def in_float64(problem: dict[str, Tensor | list[Tensor]]) -> dict[str, Tensor | list[Tensor]]:
    return {k: [t.double() for t in v] if isinstance(v, list) else v.double() for k, v in problem.items()}


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def with_activations_as_values(problem: dict[str, Tensor | list[Tensor]]) -> dict[str, Tensor | list[Tensor]]:
    return problem | {"mean": torch.zeros_like(problem["mean"]), "std": torch.ones_like(problem["std"])}


# --- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(dtype, shape):
    for activation, per_member in itertools.product(ACTIVATIONS, (False, True)):
        p = problem(*shape, dtype, per_member=per_member)
        got = activation_strength(**p, activation=activation)
        assert torch.equal(got.output, ensemble_mlp(*list(p.values())[:3], activation=activation))
        exact = reference.activation_strength(**in_float64(p), activation=activation)
        plain = reference.activation_strength(**p, activation=activation)
        assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in plain]
        # At most twice the error of plain PyTorch in the same dtype, and roundings of the result.
        rounding = torch.finfo(dtype).eps * rms(exact.value)
        allowed = (
            16 * rounding if dtype == torch.float64 else 2 * rms(plain.value - exact.value) + 2 * rounding
        )
        assert rms(got.value.double() - exact.value) <= allowed

        # Where the value is the activation itself, its sign is known without a rounding; float16 rounds what
        # is smallest to 0.
        itself = activation_strength(**with_activations_as_values(p), activation=activation)
        wrong = itself.active != (itself.value > 0)
        assert not (wrong & (itself.value != 0)).any() and (dtype == torch.float16 or not wrong.any())
        assert torch.equal(got.active, itself.active)
        packed = activation_strength(**p, activation=activation, bitpack=True)
        assert all(map(torch.equal, packed, (got.output, got.value, pack_bits(got.active))))


@pytest.mark.parametrize("b", [1, 5, 70])
def test_packed_bits_are_what_numpy_unpacks(b):
    p = problem(3, b, [6, 9, 7, 3], torch.float32)
    active, packed = activation_strength(**p).active, activation_strength(**p, bitpack=True).active
    assert packed.dtype == torch.uint8 and packed.shape == (3, b, 2)
    bits = np.unpackbits(packed.numpy(), axis=-1, bitorder="little")
    assert (bits == active.numpy()).all()  # 16 units
    p = problem(3, b, [6, 9, 1, 3], torch.float32)
    bits = np.unpackbits(activation_strength(**p, bitpack=True).active.numpy(), axis=-1, bitorder="little")
    assert (bits[..., :10] == activation_strength(**p).active.numpy()).all() and not bits[..., 10:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [3, 20])
def test_dead_units_have_the_value_0(dtype, b):
    p = problem(2, b, [4, 30, 3], dtype)
    tiny = torch.finfo(p["std"].dtype).tiny
    p["std"][:4] = torch.tensor([0.0, -0.0, tiny / 2, -tiny / 2], dtype=p["std"].dtype)
    p["weights"][0][:, [0, 9]] = float("nan")
    value = activation_strength(**p, activation="gelu").value
    assert (value[..., :4] == 0).all() and (value[..., 4:9] != 0).all() and value[..., 9].isnan().all()
    p["std"][:4] = torch.tensor([tiny, -tiny, float("nan"), float("inf")], dtype=p["std"].dtype)
    got = activation_strength(**p, activation="gelu").value
    assert got[..., 2].isnan().all() and (got[..., 3] == 0).all() and not (got[..., :2] == 0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [2, 20])
def test_nan_and_inf_as_in_torch(dtype, b):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 3.0]).to(dtype).repeat(b).unsqueeze(1)
    one = torch.ones(1, 1, 1, dtype=dtype)
    statistics = torch.tensor([0.5], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for activation in ACTIVATIONS:
        got = activation_strength(x, [one, one], None, statistics, statistics, activation=activation)
        expected = reference.activation_strength(
            x.double(),
            [one.double()] * 2,
            None,
            statistics.double(),
            statistics.double(),
            activation=activation,
        )
        torch.testing.assert_close(got.value, expected.value.to(dtype), equal_nan=True)
        assert torch.equal(got.active, expected.active)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [2, 20])
def test_infinite_and_large_statistics_as_in_torch(dtype, b):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 3.0]).to(dtype).repeat(b).unsqueeze(1)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    info = torch.finfo(real)
    inf = float("inf")
    means = torch.tensor([0.0, 0.5, inf, -inf, info.max, 0.5, 0.5, 0.5], dtype=real)
    stds = torch.tensor([inf, -inf, 2.0, inf, info.max, info.tiny, -info.tiny, float("nan")], dtype=real)
    weights = [torch.ones(1, 8, 1, dtype=dtype), torch.ones(1, 1, 8, dtype=dtype)]
    got = activation_strength(x, weights, None, means, stds, activation="identity")
    exact = reference.activation_strength(
        x.double(), [w.double() for w in weights], None, means.double(), stds.double(), activation="identity"
    )
    expected = exact.value
    if real == torch.float32:  # 0.5 / tiny has room in float64 alone
        expected = expected.float()
    torch.testing.assert_close(got.value, expected.to(dtype), equal_nan=True)


def test_a_softplus_is_always_active():
    p = problem(1, 9, [3, 5, 1], torch.float32)
    assert activation_strength(**p, activation="softplus").active.all()


@pytest.mark.parametrize(
    "shape", [(3, 0, [4, 5, 2]), (2, 0, [4, 2]), (2, 5, [4, 2]), (2, 50, [4, 2])], ids=str
)
def test_no_example_and_no_hidden_layer(shape):
    e, b, widths = shape
    for pack in (False, True):
        p = problem(*shape, torch.float32)
        got = activation_strength(**p, bitpack=pack)
        units = sum(widths[1:-1])
        assert torch.equal(got.output, ensemble_mlp(*list(p.values())[:3]))
        assert got.value.shape == (e, b, units)
        assert got.active.shape == (e, b, -(-units // 8) if pack else units)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_results_past_the_cache(dtype):
    # Written by streaming stores; rows of 13 units start anywhere in a cache line.
    for e, b, widths in ((1, 70_001, [3, 12, 13, 1]), (30, 3001, [3, 13, 12, 1]), (2, 33, [3, 40_000, 2])):
        p = problem(e, b, widths, dtype)
        got, packed = activation_strength(**p), activation_strength(**p, bitpack=True)
        p["input"] = p["input"][-10:]
        few = activation_strength(**p)  # in the cache
        assert all(torch.equal(x[:, -10:], y) for x, y in zip(got, few, strict=True))
        assert torch.equal(packed.value, got.value) and torch.equal(packed.active, pack_bits(got.active))
        assert rms(few.value - reference.activation_strength(**p).value) <= torch.finfo(dtype).eps * 8


# --- the same bits -----------------------------------------------------------------------------------------


@given(st.integers(1, 150), st.integers(1, 149), st.sampled_from(DTYPES), st.booleans())
def test_a_split_of_the_batch_changes_no_bit(b, cut, dtype, pack):
    p = problem(2, b, [10, 9, 20, 3], dtype)
    whole = activation_strength(**p, activation="silu", bitpack=pack)
    for rows in (slice(None, cut), slice(cut, None)):
        part = activation_strength(**p | {"input": p["input"][rows]}, activation="silu", bitpack=pack)
        assert all(torch.equal(x, y[:, rows]) for x, y in zip(part, whole, strict=True))


@pytest.mark.parametrize("b", [1, 7, 100, 3000])
def test_neither_threads_nor_members_beside_change_a_bit(b):
    p = problem(5, b, [10, 33, 20, 3], torch.float32, per_member=True)
    expected = activation_strength(**p)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, activation_strength(**p), expected))
    finally:
        torch.set_num_threads(threads)
    order = [3, 0, 4]
    chosen = {k: [t[order] for t in v] if isinstance(v, list) else v[order] for k, v in p.items()}
    got = activation_strength(**chosen)
    assert all(torch.equal(x, y[order]) for x, y in zip(got, expected, strict=True))


def test_strided_and_expanded_arguments():
    p = problem(3, 12, [7, 9, 2], torch.float32, per_member=True)
    expected = activation_strength(**p)
    strided = {
        "input": p["input"].transpose(0, 2).contiguous().transpose(0, 2),
        "weights": [w.transpose(1, 2).contiguous().transpose(1, 2) for w in p["weights"]],
        "biases": [torch.stack([v, v], -1)[..., 0] for v in p["biases"]],
        "mean": p["mean"].t().contiguous().t(),
        "std": torch.stack([p["std"], p["std"]], -1)[..., 1],
    }
    assert all(map(torch.equal, activation_strength(**strided), expected))
    shared = p | {"mean": p["mean"][0], "std": p["std"][0]}
    expanded = p | {"mean": p["mean"][:1].expand(3, -1), "std": p["std"][:1].expand(3, -1)}
    assert all(map(torch.equal, activation_strength(**shared), activation_strength(**expanded)))


def test_statistics_of_16_bit_weights_in_either_dtype():
    p = problem(2, 9, [5, 6, 1], torch.bfloat16)
    narrow = {name: p[name].bfloat16() for name in ("mean", "std")}
    wide = {name: t.float() for name, t in narrow.items()}
    got = activation_strength(**p | narrow)
    assert all(map(torch.equal, got, activation_strength(**p | wide)))
    assert all(map(torch.equal, got, activation_strength(**p | wide | {"std": narrow["std"]})))


@pytest.mark.parametrize("capability", ["base", "avx2", "avx512"])
def test_narrower_instruction_sets(capability):
    code = """
import torch
from tests import test_activation_strength as t
torch.set_num_threads(1)
for dtype in t.DTYPES:
    for shape in t.SHAPES[::2]:
        torch.manual_seed(0)
        t.test_matches_the_reference(dtype, shape)
    t.test_dead_units_have_the_value_0(dtype, 20)
t.test_large_results_past_the_cache(torch.float32)
t.test_packed_bits_are_what_numpy_unpacks(70)
print("ran", t.pyens.build_info()["cpu_capability"])
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYENS_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("ran ")


# --- CUDA --------------------------------------------------------------------------------------------------


def on_cuda(problem: dict[str, Tensor | list[Tensor]]) -> dict[str, Tensor | list[Tensor]]:
    return {k: [t.cuda() for t in v] if isinstance(v, list) else v.cuda() for k, v in problem.items()}


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [s for s in SHAPES if max(s[2]) < 300], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cuda_matches_the_reference(dtype, shape):
    for activation, per_member in itertools.product(ACTIVATIONS, (False, True)):
        p = problem(*shape, dtype, per_member=per_member)
        q = on_cuda(p)
        got = activation_strength(**q, activation=activation)
        assert torch.equal(got.output, ensemble_mlp(*list(q.values())[:3], activation=activation))
        exact = reference.activation_strength(**in_float64(p), activation=activation)
        plain = reference.activation_strength(**p, activation=activation)
        rounding = torch.finfo(dtype).eps * rms(exact.value)
        allowed = (
            16 * rounding if dtype == torch.float64 else 2 * rms(plain.value - exact.value) + 2 * rounding
        )
        assert rms(got.value.cpu().double() - exact.value) <= allowed
        itself = activation_strength(**with_activations_as_values(q), activation=activation)
        assert not ((itself.active != (itself.value > 0)) & (itself.value != 0)).any()
        packed = activation_strength(**q, activation=activation, bitpack=True)
        assert all(map(torch.equal, packed, (got.output, got.value, pack_bits(got.active))))


@pytest.mark.cuda
def test_on_cuda_dead_units_have_the_value_0():
    p = problem(2, 20, [4, 30, 3], torch.float32)
    p["std"][:2] = torch.tensor([0.0, -torch.finfo(torch.float32).tiny / 2])
    p["weights"][0][:, [0, 9]] = float("nan")
    value = activation_strength(**on_cuda(p)).value
    assert (value[..., :2] == 0).all() and value[..., 9].isnan().all() and not value[..., 2:9].isnan().any()


# --- errors ------------------------------------------------------------------------------------------------

BAD = {
    "short mean": (
        {"mean": torch.zeros(8)},
        ValueError,
        r"mean: expected \[9\] or \[2, 9\], .*got shape \[8\]",
    ),
    "std of other members": (
        {"std": torch.ones(3, 9)},
        ValueError,
        r"std: expected \[9\] or \[2, 9\], .*got shape \[3, 9\]",
    ),
    "std without a unit": ({"std": torch.tensor(1.0)}, ValueError, r"std: expected .*got shape \[\]"),
    "rank of mean": ({"mean": torch.zeros(1, 2, 9)}, ValueError, r"mean: expected .*got shape \[1, 2, 9\]"),
    "dtype of std": (
        {"std": torch.ones(9).double()},
        TypeError,
        r"std: expected the dtype of weights\[0\] \(Float\), got Double",
    ),
    "device of mean": (
        {"mean": torch.zeros(9, device="meta")},
        TypeError,
        r"mean: expected the device of weights\[0\] \(cpu\), got meta",
    ),
    "activation": ({"activation": "swish"}, ValueError, r"activation: expected one of relu, .*got \"swish\""),
    "no layer": ({"weights": [], "biases": []}, ValueError, "weights: expected at least one layer"),
    "input": ({"input": torch.zeros(5, 3)}, ValueError, r"input: expected \[B, 4\] .*got shape \[5, 3\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changed, error, message = BAD[case]
    with pytest.raises(error, match="^activation_strength: " + message):
        activation_strength(**problem(2, 5, [4, 6, 3, 1], torch.float32) | changed)


def test_backward_raises():
    p = problem(2, 5, [4, 6, 1], torch.float32)
    p["weights"][0].requires_grad_()
    got = activation_strength(**p)
    assert not got.active.requires_grad
    for tensor in (got.output, got.value):
        with pytest.raises(
            RuntimeError, match="derivative for pyens::activation_strength is not implemented"
        ):
            tensor.sum().backward()


# --- the dispatcher ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("b", [2, 20])
def test_opcheck(b, dtype):
    for per_member, widths, pack in (
        (False, [4, 6, 3, 1], False),
        (True, [4, 5, 2], True),
        (False, [4, 2], True),
    ):
        p = problem(2, b, widths, dtype, per_member=per_member)
        torch.library.opcheck(torch.ops.pyens.activation_strength, (*p.values(), "gelu", pack))


def test_compile_without_graph_breaks_or_many_recompilations():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(x, p):
        got = activation_strength(x * 2, *list(p.values())[1:], bitpack=True)
        return got.output + 1, got.value * 2, got.active

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    p = problem(3, 1, [4, 6, 3, 1], torch.float32)
    with torch.inference_mode():
        for b in (5, 7, 12, 16, 33, 64, 100):
            x = torch.randn(b, 4)
            assert all(map(torch.equal, compiled(x, p), function(x, p)))
    assert counter.frame_count <= 2  # one for the first size, one for all others


def test_compiled_by_inductor():
    torch._dynamo.reset()
    p = problem(1, 20, [4, 6, 3, 1], torch.float32)
    compiled = torch.compile(activation_strength, fullgraph=True)
    assert all(map(torch.equal, compiled(**p), activation_strength(**p)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_the_mlp_and_leaves_the_statistics(dtype):
    p = problem(2, 9, [5, 6, 1], torch.float32)
    with torch.autocast("cpu", dtype):
        got = activation_strength(**p)
    cast = {"input": p["input"].to(dtype)}
    cast |= {name: [t.to(dtype) for t in p[name]] for name in ("weights", "biases")}
    assert got.value.dtype == dtype and all(map(torch.equal, got, activation_strength(**p | cast)))


def test_torch_func_raises():
    p = problem(2, 6, [4, 5, 1], torch.float32)
    x = p.pop("input")
    with pytest.raises(RuntimeError, match="activation_strength"):
        torch.func.vmap(lambda x: activation_strength(x, **p).output)(torch.stack([x, x]))
    with pytest.raises(RuntimeError, match="activation_strength"):
        torch.func.grad(lambda x: activation_strength(x, **p).output.sum())(x)


def test_the_docstring_names_what_is_returned():
    fields = type(activation_strength(**problem(1, 2, [2, 2, 1], torch.float32)))._fields
    assert all(re.search(rf"\b{field}\b", activation_strength.__doc__) for field in fields)
    assert pyens.ops.activation_strength is activation_strength


# --- the benchmark -----------------------------------------------------------------------------------------


def test_benchmark_cases():
    def options(**changes):
        defaults = dict(device=torch.device("cpu"), dtype=torch.float32, threads=2, rounds=4, seed=0)
        return harness.Options(**defaults | dict(quick=False, compile=False) | changes)

    found = benchmark.cases(options())
    assert [case.targets[0].ratio for case in found] == [4.0, 3.0, 3.0]
    assert found[0].bytes == 65_536 * (4 * (43 + 1 + 80) + 80)
    for other in (dict(threads=1), dict(dtype=torch.bfloat16)):
        assert not any(case.targets for case in benchmark.cases(options(**other)))
    # The names of the compiled peers are those that the target is against.
    names = {c.name for c in found[1].contestants()}
    assert {name.removesuffix(", compiled") for name in found[0].targets[0].against} <= names


def test_quick_benchmark(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        command = ["--quick", "--threads", "1", "--output", str(tmp_path)]
        assert harness.main("activation_strength", "", benchmark.cases, command) == 0
    finally:
        torch.set_num_threads(threads)  # a benchmark sets them for the whole process
    (tiny,) = harness.Report.load(tmp_path / "activation_strength-cpu-float32-quick.json").results
    peers = {benchmark.EAGER, benchmark.TRANSPOSED, benchmark.HOOKS}
    assert {timing.name for timing in tiny.timed()} == peers | {benchmark.OP, benchmark.PACKED}
    assert "vs best peer" in capsys.readouterr().out


def test_the_benchmark_excludes_what_is_wrong():
    p = problem(1, 9, [5, 7, 3, 2], torch.float32)
    got = activation_strength(**p)
    benchmark.check_strength(got, torch.float32, got)
    for wrong in (got._replace(value=got.value * 1.01), got._replace(active=~got.active)):
        with pytest.raises(ValueError, match=r"error|wrong"):
            benchmark.check_strength(got, torch.float32, wrong)
