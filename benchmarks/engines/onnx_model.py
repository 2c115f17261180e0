"""An ensemble of MLPs as a model in ONNX's format, which ONNX Runtime and OpenVINO read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def build(form: str, batch_size: int, weights: Sequence[np.ndarray], biases: Sequence[np.ndarray]) -> bytes:
    """The model, from "x" to "y".

    form:
        matmul: stacked products, x [B, I], y [E, B, O]
        transposed: the same with the batch as the last axis, x [I, B], y [E, O, B]
        gemm: a chain of products for each member, x [B, I], y [E, B, O]
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: list[Any] = []

    def node(kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind}{len(nodes)}"
        nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(array: np.ndarray) -> str:
        name = f"constant{len(constants)}"
        constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def stack(transposed: bool) -> str:
        hidden = "x"
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            hidden = node("Relu", hidden) if layer else hidden
            if transposed:
                product, shift = node("MatMul", constant(weight), hidden), bias[:, :, None]
            else:
                product, shift = node("MatMul", hidden, constant(weight.swapaxes(1, 2))), bias[:, None]
            hidden = node("Add", product, constant(shift))
        return hidden

    def chain(member: int) -> str:
        hidden = "x"
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            hidden = node("Relu", hidden) if layer else hidden
            hidden = node("Gemm", hidden, constant(weight[member]), constant(bias[member]), transB=1)
        return node("Unsqueeze", hidden, axis)

    ensemble_size, features, outputs = len(weights[0]), weights[0].shape[2], weights[-1].shape[1]
    x, y = [batch_size, features], [ensemble_size, batch_size, outputs]
    if form == "gemm":
        axis = constant(np.zeros(1, np.int64))
        output = node("Concat", *map(chain, range(ensemble_size)), axis=0)
    elif form == "transposed":
        x, y = x[::-1], [y[0], y[2], y[1]]
        output = stack(True)
    else:
        output = stack(False)
    nodes.append(helper.make_node("Identity", [output], ["y"]))
    graph = helper.make_graph(
        nodes,
        "ensemble",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())
