"""Contestants that run in other engines, each in a process of its own. In float32, on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.engines.xla import YNN
from benchmarks.harness import Contestant, Remote, agrees_with
from benchmarks.peers import Problem
from benchmarks.training_peers import TrainingProblem, gradients_agree

MODULES = {"jax": "xla", "onnxruntime": "onnx_runtime", "openvino": "open_vino"}
FORMS = {  # of a forward pass, and JAX's of gradients
    "jax": ("vmap", "lax.map", "einsum", "transposed"),
    "onnxruntime": ("matmul", "transposed", "gemm"),
    "openvino": ("matmul", "transposed", "gemm"),
}
# Products of ONNX Runtime and JAX ask the processor alone: under XLA's cap to SSE4.2 they reach three times
# the peak that it leaves. OpenVINO heeds ONEDNN_MAX_CPU_ISA: under it
# the primitives of a compiled model (`get_runtime_model`) are named avx2.
UNCAPPED = ("onnxruntime", "jax")


def forward_peers(
    problem: Problem, expected: Tensor, threads: int, *, processes: int = 1
) -> list[Contestant]:
    """The forward pass of `problem`, whose input is shared; `processes` of each at once."""
    dtype = problem.input.dtype
    member_first = agrees_with(expected, dtype)
    batch_last = agrees_with(expected, dtype, lambda output: output[0].mT)

    def contestant(engine: str, form: str, flags: str = "") -> Contestant:
        arguments = form, problem.input, problem.weights, problem.biases
        check = batch_last if form == "transposed" else member_first
        return _contestant(engine, "forward", form, arguments, threads, check, flags, processes)

    found = [contestant(engine, form) for engine, forms in FORMS.items() for form in forms]
    return [*found, contestant("jax", "transposed", YNN)]


CONVOLUTION_FORMS = {"onnxruntime": ("grouped", "loop"), "openvino": ("grouped", "loop")}


def convolution_peers(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], expected: Tensor, threads: int
) -> list[Contestant]:
    """The forward pass of convolutions, each with a ReLU and a maximum behind it, and an MLP behind them."""
    check = agrees_with(expected, input.dtype)
    return [
        _contestant(engine, "forward", form, (form, input, weights, biases), threads, check)
        for engine, forms in CONVOLUTION_FORMS.items()
        for form in forms
    ]


def gradient_peers(
    problem: TrainingProblem, expected: tuple[Tensor, list[Tensor]], threads: int, *, processes: int = 1
) -> list[Contestant]:
    """Losses and gradients of `problem`, whose input is shared: of these engines JAX alone has any."""
    agree = gradients_agree(expected, problem.target.dtype)

    def check(found: list[Tensor]) -> None:
        agree((found[0], lambda: found[1:]))

    return [
        _contestant(
            "jax", "gradients", form, _of_training(form, problem), threads, check, processes=processes
        )
        for form in FORMS["jax"]
    ]


def adam_peers(
    problem: TrainingProblem, check: Callable[[list[Tensor]], None], threads: int
) -> list[Contestant]:
    """Steps with Adam; `check` gets the losses and the parameters after the first one."""
    return [
        _contestant("jax", "adam_step", form, _of_training(form, problem), threads, check)
        for form in FORMS["jax"]
    ]


def _of_training(form: str, problem: TrainingProblem) -> Sequence[Any]:
    return form, problem.mlp.input, problem.target, problem.mlp.weights, problem.mlp.biases


def _contestant(
    engine: str,
    function: str,
    form: str,
    arguments: Sequence[Any],
    threads: int,
    check: Callable[[list[Tensor]], None],
    flags: str = "",
    processes: int = 1,
) -> Contestant:
    name = f"{engine} {form}{', ynn' if flags == YNN else ''}"
    return Contestant(
        name,
        partial(
            Remote,
            f"benchmarks.engines.{MODULES[engine]}:{function}",
            *arguments,
            threads=threads,
            processes=processes,
            environment={"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()},
        ),
        check,
        capped=not any(part in name for part in UNCAPPED),
    )
