"""Members whose weights are bytes: against their own float32 form, and against what else there is.

784-1200-1200-10 of five members and 1024 examples, 100 small members, and the network of
benchmarks.ensemble_conv2d, calibrated on the inputs that are timed. Peers: a loop over members with torch's
own operations on bytes (those of oneDNN that the quantizer of torchao lowers to, with bytes between the
layers); the network of float32 in JAX, ONNX Runtime and OpenVINO. The targets are for two CPU threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import pyens
from benchmarks import harness
from benchmarks.engines.peers import convolution_peers, forward_peers
from benchmarks.ensemble_conv2d import Problem as Images
from benchmarks.peers import Problem, mlp_flops
from pyens.nn import EnsembleMLP, EnsembleSequential
from pyens.ops import Int8Weight

INT8, DENSE, TORCH = "pyens quantize()", "pyens, float32", "torch int8, loop"
RMS = 0.05  # of the outputs' own, what bytes may cost


def cases(options: harness.Options) -> list[harness.Case]:
    if (options.device.type, options.dtype) != ("cpu", torch.float32):
        return []
    vnni = pyens.build_info()["cpu_capability"] in ("avx_vnni", "avx512_vnni", "avx512_bf16")
    shapes = {"wide": ((5, 1024, (784, 1200, 1200, 10)), 1.8 if vnni else 0.9)}
    shapes["narrow"] = ((100, 1024, (32, 50, 20, 10, 1)), None)
    shapes["one"] = ((5, 1, (784, 1200, 1200, 10)), None)
    images = {"images": (5, 256, 28), "one-image": (5, 1, 28)}
    if options.quick:
        shapes, images = {"wide": ((2, 9, (7, 12, 3)), None)}, {"images": (2, 3, 12)}
    made = []
    for name, (shape, ratio) in shapes.items():
        judged = ratio is not None and options.threads == 2
        made.append(
            harness.Case(
                name,
                f"E {shape[0]}, B {shape[1]}, {'-'.join(map(str, shape[2]))}",
                lambda shape=shape: mlp_contestants(shape, options),
                flops=mlp_flops(*shape),
                targets=(harness.Target(INT8, ratio, (DENSE,)),) if judged else (),
            )
        )
    for name, sizes in images.items():
        made.append(
            harness.Case(
                name,
                f"E {sizes[0]}, B {sizes[1]}, two convolutions and a layer",
                lambda sizes=sizes: image_contestants(sizes, options),
            )
        )
    return made


def mlp_contestants(
    shape: tuple[int, int, Sequence[int]], options: harness.Options
) -> list[harness.Contestant]:
    problem = Problem.random(*shape, seed=options.seed)
    expected = problem.expected()
    x = problem.input
    model = EnsembleMLP.from_parameters(list(problem.weights), list(problem.biases))
    model.requires_grad_(False).eval()
    quantized = model.quantize(x)
    layers = [layer.weight() for layer in quantized.layers]

    def torch_int8() -> harness.Run:
        following = [*layers[1:], None]

        def member(m: int) -> Callable[[], Tensor]:
            first = bytes_of(layers[0], m)
            linears = [
                linear_of(layer, problem.biases[i], m, len(x), following[i]) for i, layer in enumerate(layers)
            ]

            def forward() -> Tensor:
                hidden = first(x)
                for linear in linears:
                    hidden = linear(hidden)
                return hidden

            return forward

        members = [member(m) for m in range(problem.ensemble_size)]
        return lambda: torch.stack([forward() for forward in members])

    nearly = harness.agrees_with(expected, options.dtype, rms=RMS)
    return [
        harness.Contestant(INT8, lambda: lambda: quantized(x), nearly, ours=True),
        harness.Contestant(
            DENSE, lambda: lambda: model(x), harness.agrees_with(expected, options.dtype), ours=True
        ),
        harness.Contestant(TORCH, torch_int8, nearly),
        *forward_peers(problem, expected, options.threads),
    ]


def image_contestants(shape: tuple[int, int, int], options: harness.Options) -> list[harness.Contestant]:
    problem = Images.random(*shape, options)
    expected = problem.expected()
    images = problem.images
    weights, biases = problem.layers()
    model = EnsembleSequential.from_modules(problem.members).packed()
    quantized = model.quantize(images)
    first, second, last = (quantized.get_submodule(name) for name in ("0", "3", "7"))
    of_layers = [first.weight.weight(), second.weight.weight(), last.layers[0].weight()]

    def torch_int8() -> harness.Run:
        def member(m: int) -> Callable[[], Tensor]:
            convolutions = [
                convolution_of(of_layers[i], biases[i], m, of_layers[i + 1], size)
                for i, size in enumerate(sizes_of(problem))
            ]
            linear = linear_of(of_layers[2], biases[2], m, len(images), None)
            first = bytes_of(of_layers[0], m)

            def forward() -> Tensor:
                hidden = first(images)
                for convolution in convolutions:
                    hidden = maximum(convolution(hidden))
                return linear(hidden.flatten(1))

            return forward

        members = [member(m) for m in range(len(problem.members))]
        return lambda: torch.stack([forward() for forward in members])

    nearly = harness.agrees_with(expected, options.dtype, rms=RMS)
    return [
        harness.Contestant(INT8, lambda: lambda: quantized(images), nearly, ours=True),
        harness.Contestant(
            DENSE, lambda: lambda: model(images), harness.agrees_with(expected, options.dtype), ours=True
        ),
        harness.Contestant(TORCH, torch_int8, nearly),
        *convolution_peers(images, weights, biases, expected, options.threads),
    ]


# --- torch's own operations ----------------------------------------------------------------------------


def maximum(x: Tensor) -> Tensor:
    """Of windows of 2 x 2. torch's own pooling refuses bytes whose channels are last, which these are."""
    above, below = x[..., 0::2, :], x[..., 1::2, :]
    rows = torch.maximum(above[..., : below.shape[-2], :], below)
    left, right = rows[..., 0::2], rows[..., 1::2]
    return torch.maximum(left[..., : right.shape[-1]], right)


def scale_of(layer: Int8Weight, m: int) -> tuple[float, int]:
    return layer.input_scale[m].item(), int(layer.input_zero_point[m])


def bytes_of(layer: Int8Weight, m: int) -> Callable[[Tensor], Tensor]:
    import torch.ao.quantization.fx._decomposed  # registers the operation

    by = scale_of(layer, m)
    return lambda x: torch.ops.quantized_decomposed.quantize_per_tensor(x, *by, 0, 255, torch.uint8)


def after(following: Int8Weight | None, m: int) -> tuple[float, int, torch.dtype, str]:
    """Scale, zero point, dtype and activation of an output: bytes for a following layer."""
    return (
        (1.0, 0, torch.float32, "none")
        if following is None
        else (*scale_of(following, m), torch.uint8, "relu")
    )


def linear_of(
    layer: Int8Weight, bias: Tensor, m: int, rows: int, following: Int8Weight | None
) -> Callable[[Tensor], Tensor]:
    values, own = layer.values[m], bias[m]
    packed = torch.ops.onednn.qlinear_prepack(values, [rows, values.shape[1]])
    scale, zero = layer.scale[m], torch.zeros(len(values), dtype=torch.int)
    by, (to, point, dtype, activation) = scale_of(layer, m), after(following, m)
    return lambda x: torch.ops.onednn.qlinear_pointwise(
        x, *by, packed, scale, zero, own, to, point, dtype, activation, [], ""
    )


def sizes_of(problem: Images) -> list[list[int]]:
    """The shapes of the images that the two convolutions read."""
    batch, channels, size, _ = problem.images.shape
    first = problem.layers()[0][0]
    inner = (size - first.shape[-1] + 1) // 2
    return [[batch, channels, size, size], [batch, first.shape[1], inner, inner]]


def convolution_of(
    layer: Int8Weight, bias: Tensor, m: int, following: Int8Weight, shape: list[int]
) -> Callable[[Tensor], Tensor]:
    scale, zero = layer.scale[m], torch.zeros(layer.values.shape[1], dtype=torch.int)
    where: list[list[int] | int] = [[1, 1], [0, 0], [1, 1], 1]  # stride, padding, dilation, groups
    by, own = scale_of(layer, m), bias[m]
    packed = torch.ops.onednn.qconv_prepack(layer.values[m], scale, *by, *where, shape)
    to, point, dtype, activation = after(following, m)
    return lambda x: torch.ops.onednn.qconv2d_pointwise(
        x, *by, packed, scale, zero, own, *where, to, point, dtype, activation, [], None
    )


if __name__ == "__main__":
    raise SystemExit(harness.main("int8", __doc__, cases))
