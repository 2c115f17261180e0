"""OpenVINO, tuned for latency: one request at a time, in float32.

With several threads `start_async` and `wait` take less time than `infer`, with one thread mostly more: the
faster one, in a trial, is it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.engines.onnx_model import build
from benchmarks.remote.blocks import measure


def forward(
    threads: int, form: str, input: np.ndarray, weights: Sequence[np.ndarray], biases: Sequence[np.ndarray]
) -> Callable:
    """Output as `onnx_model.build` says."""
    import openvino

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model = core.read_model(model=build(form, input.shape, weights, biases))
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    x = openvino.Tensor(np.ascontiguousarray(input.T if form == "transposed" else input))
    request.set_input_tensor(x)

    def in_turn() -> list[np.ndarray]:
        request.infer()
        return [request.get_output_tensor(0).data]

    def beside() -> list[np.ndarray]:
        request.start_async()
        request.wait()
        return [request.get_output_tensor(0).data]

    return min((in_turn, beside), key=lambda run: min(measure(run, 20).seconds for _ in range(3)))
