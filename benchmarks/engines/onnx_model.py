"""An ensemble as a model in ONNX's format, which ONNX Runtime and OpenVINO read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class _Graph:
    """A model that is put together, from "x" to "y"."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"{kind}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, array: np.ndarray) -> str:
        from onnx import numpy_helper

        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def model(self, output: str, x: Sequence[int], y: Sequence[int]) -> bytes:
        from onnx import TensorProto, helper

        graph = helper.make_graph(
            [*self.nodes, helper.make_node("Identity", [output], ["y"])],
            "ensemble",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        return bytes(model.SerializeToString())


def build(
    form: str, input_shape: Sequence[int], weights: Sequence[np.ndarray], biases: Sequence[np.ndarray]
) -> bytes:
    """The model of MLPs, or where the first weights are [E, O, C, h, w] of convolutions and MLPs behind them.

    form of MLPs:
        matmul: stacked products, x [B, I], y [E, B, O]
        transposed: the same with the batch as the last axis, x [I, B], y [E, O, B]
        gemm: a chain of products for each member, x [B, I], y [E, B, O]
    form of convolutions, x [B, C, H, W], y [E, B, O]; a ReLU and the maximum of 2 x 2 pixels follow each:
        grouped: the members are groups of channels
        loop: a chain for each member
    """
    if weights[0].ndim == 5:
        return _convolutions(form, input_shape, weights, biases)
    return _products(form, input_shape[0], weights, biases)


def _convolutions(
    form: str, input_shape: Sequence[int], weights: Sequence[np.ndarray], biases: Sequence[np.ndarray]
) -> bytes:
    graph = _Graph()
    node, constant = graph.node, graph.constant
    ensemble_size, last = len(weights[0]), weights[-1]
    layers = list(zip(weights, biases, strict=True))

    def convolve(hidden: str, weight: np.ndarray, bias: np.ndarray, groups: int) -> str:
        hidden = node("Conv", hidden, constant(weight), constant(bias), group=groups)
        return node("MaxPool", node("Relu", hidden), kernel_shape=[2, 2], strides=[2, 2])

    def chain(member: int) -> str:
        hidden, flat = "x", False
        for weight, bias in layers:
            if weight.ndim == 5:
                hidden = convolve(hidden, weight[member], bias[member], 1)
                continue
            hidden = node("Relu", hidden) if flat else node("Flatten", hidden, axis=1)
            flat = True
            hidden = node("Gemm", hidden, constant(weight[member]), constant(bias[member]), transB=1)
        return node("Unsqueeze", hidden, axis)

    def grouped() -> str:
        hidden, flat = "x", False
        for layer, (weight, bias) in enumerate(layers):
            if weight.ndim == 5:
                joined = weight.reshape(-1, *weight.shape[2:]), bias.reshape(-1)
                hidden = convolve(hidden, *joined, ensemble_size if layer else 1)
                continue
            if flat:
                hidden = node("Relu", hidden)
            else:
                shape = constant(np.array([input_shape[0], ensemble_size, weight.shape[2]]))
                hidden = node("Transpose", node("Reshape", hidden, shape), perm=[1, 0, 2])
            flat = True
            product = node("MatMul", hidden, constant(weight.swapaxes(1, 2)))
            hidden = node("Add", product, constant(bias[:, None]))
        return hidden

    if form == "loop":
        axis = constant(np.zeros(1, np.int64))
        output = node("Concat", *map(chain, range(ensemble_size)), axis=0)
    else:
        output = grouped()
    return graph.model(output, input_shape, [ensemble_size, input_shape[0], last.shape[1]])


def _products(
    form: str, batch_size: int, weights: Sequence[np.ndarray], biases: Sequence[np.ndarray]
) -> bytes:
    graph = _Graph()
    node, constant = graph.node, graph.constant

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
    return graph.model(output, x, y)
