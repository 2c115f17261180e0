"""ONNX Runtime.

Input and output are bound once, which is a little faster than `run`. Tried and left out, because it is
slower: members as branches that run at once (`ORT_PARALLEL`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.engines.onnx_model import build


def forward(
    threads: int, form: str, input: np.ndarray, weights: Sequence[np.ndarray], biases: Sequence[np.ndarray]
) -> Callable:
    """Output as `onnx_model.build` says."""
    from onnxruntime import InferenceSession, OrtValue, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    model = build(form, input.shape, weights, biases)
    session = InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    x = np.ascontiguousarray(input.T if form == "transposed" else input)
    y = np.empty(session.get_outputs()[0].shape, np.float32)
    # Kept by the call: the binding does not hold them.
    values = OrtValue.ortvalue_from_numpy(x), OrtValue.ortvalue_from_numpy(y)
    binding.bind_ortvalue_input("x", values[0])
    binding.bind_ortvalue_output("y", values[1])

    def run() -> list[np.ndarray]:
        session.run_with_iobinding(binding)
        return [values[1]]

    return run
