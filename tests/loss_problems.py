"""Problems for pyens.ops.ensemble_mlp_loss, and its reference in float64 to hold results against."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import pyens
from pyens import reference
from pyens.ops import ensemble_mlp_loss
from pyens.reference.activations import ACTIVATIONS as ACTIVATION_FUNCTIONS

ACTIVATIONS = list(ACTIVATION_FUNCTIONS)
# What follows a comma are the options that `problem` gives.
LOSSES = [
    "mse",
    "bce",
    "gaussian_nll",
    "gaussian_nll, bounded",
    "cross_entropy",
    "cross_entropy, weighted",
    "huber",
    "smooth_l1",
    "quantile",
    "poisson_nll",
    "soft_cross_entropy",
]
CLASSES = ("cross_entropy", "cross_entropy, weighted")
# With what label smoothing.
SMOOTHED = [*((loss, 0.0) for loss in LOSSES), *((loss, 0.2) for loss in (*CLASSES, "soft_cross_entropy"))]
# What stands behind sample_weight in the schema where there is nothing to say: delta, quantiles,
# class_weight, log_variance_min, log_variance_max.
NO_OPTIONS = (1.0, None, None, None, None)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WEIGHTED = [None, "shared", "own"]
CPU = torch.device("cpu")
# E, B, widths: panels, tiles (of at most 256 examples) and spans (at most 16 in a batch) of the kernel, its
# vectors and blocks, all +- 1.
SHAPES = [
    (1, 1, [1, 1]),
    (3, 1, [5, 3, 2]),
    (2, 7, [33, 17, 9, 7]),
    (3, 8, [8, 8, 8]),
    (2, 9, [15, 16, 17]),
    (9, 15, [4, 3]),
    (1, 63, [16, 50, 20, 10, 1]),
    (2, 64, [7, 31, 1, 6]),
    (4, 65, [3, 1, 1, 4]),
    (2, 255, [6, 9, 12]),
    (17, 256, [6, 11, 2]),
    (3, 257, [32, 50, 20, 10, 1]),
    (2, 33, [129, 130, 131]),
    (1, 40, [257, 193, 385]),
    (1, 130, [4000, 130, 2]),  # wide enough for smaller tiles
    (8, 520, [6, 11, 2]),
    (3, 5000, [5, 9, 3]),
]

Problem = dict[str, Any]


def problem(
    e: int,
    b: int,
    widths: Sequence[int],
    loss: str,
    dtype: torch.dtype = torch.float64,
    device: torch.device = CPU,
    *,
    activation: str = "tanh",
    per_member: bool = False,
    own_target: bool = False,
    weighted: str | None = None,
    bias: bool = True,
    smoothing: float = 0.0,
) -> Problem:
    """Arguments of `ensemble_mlp_loss` on a coarse grid.

    There the outputs of a ReLU network are exact in every dtype but half precision's roundings: no rounding
    turns a ReLU on or off, which would change a gradient by far more than a rounding.
    """

    def grid(*shape: int, scale: float = 1.0, step: float = 0.125) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * scale / step).round() * step

    *hidden, out = widths
    loss, _, options = loss.partition(", ")
    outputs = {"gaussian_nll": 2, "quantile": 3}.get(loss, 1) * out
    layers = list(itertools.pairwise([*hidden, outputs]))
    arguments = {
        "input": grid(*([e] if per_member else []), b, widths[0], step=0.25),
        "weights": [grid(e, o, i, scale=1.4 / i**0.5) for i, o in layers],
        "biases": [grid(e, o, scale=0.3) for _, o in layers] if bias else None,
        "loss": loss,
        "activation": activation,
    }
    target_shape = [e, b] if own_target else [b]
    of_option = [e, out] if own_target else [out]  # of each member too
    if loss == "cross_entropy":
        arguments["target"] = torch.randint(out, target_shape)
        arguments |= {"temperature": 0.75, "label_smoothing": smoothing}
        if options == "weighted":
            arguments["class_weight"] = torch.randint(1, 9, of_option) / 4
    elif loss == "soft_cross_entropy":
        shares = torch.randint(4, (*target_shape, out)) + torch.eye(out)[0]
        arguments["target"] = shares / shares.sum(-1, keepdim=True)
        arguments |= {"temperature": 0.75, "label_smoothing": smoothing}
    elif loss == "bce":
        arguments["target"] = torch.randint(9, (*target_shape, out)) / 8
    elif loss == "poisson_nll":
        arguments["target"] = torch.randint(5, (*target_shape, out)).double()
        arguments["weights"][-1] /= 4  # no rates that half precision cannot hold
    else:
        arguments["target"] = grid(*target_shape, out)
    if loss in ("huber", "smooth_l1"):
        arguments["delta"] = 0.7
    if loss == "quantile":
        arguments["quantiles"] = [0.1, 0.5, 0.875]
        arguments["target"] += torch.randint(2, arguments["target"].shape) * 16 - 8  # off the kinks
    if options == "bounded":
        least = grid(*of_option)
        arguments |= {"log_variance_min": least, "log_variance_max": least + 1.5}
    if weighted:
        weight = torch.randint(9, [e, b] if weighted == "own" else [b]) / 4
        weight[..., ::5] = 0
        weight[..., 0] = 0.5 if b == 1 else 0  # never all of them
        arguments["sample_weight"] = weight
    return cast(arguments, dtype, device)


def cast(arguments: Problem, dtype: torch.dtype, device: torch.device = CPU) -> Problem:
    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(device, dtype if value.is_floating_point() else value.dtype)

    return {name: convert(value) for name, value in arguments.items()}


def with_gradients(
    function: Callable[..., Tensor], arguments: Problem, upstream: Tensor | None = None, **kwargs: Any
) -> list[Tensor]:
    """Loss, and gradients of input, weights and biases."""
    arguments = cast(arguments, arguments["input"].dtype, arguments["input"].device) | kwargs
    tensors = differentiable(arguments)
    for tensor in tensors:
        tensor.requires_grad_()
    loss = function(**arguments)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    return [loss.detach(), *torch.autograd.grad(loss, tensors, upstream)]


def differentiable(arguments: Problem) -> list[Tensor]:
    return [arguments["input"], *arguments["weights"], *(arguments["biases"] or ())]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def multiplies_pairs(dtype: torch.dtype, device: torch.device = CPU) -> bool:
    """Whether training rounds to bfloat16 what it multiplies, as `nn.Linear` does."""
    pairs = pyens.build_info()["cpu_capability"] == "avx512_bf16"
    return dtype == torch.bfloat16 and device.type == "cpu" and pairs


def assert_matches_the_reference(arguments: Problem, upstream: Tensor | None = None, **kwargs: Any) -> None:
    """Loss and gradients: at most twice the rms error of plain PyTorch in the same dtype, plus roundings.

    The float64 oracle is plain PyTorch itself: there, some roundings along the way are all that may differ.
    """
    dtype = arguments["input"].dtype
    got = with_gradients(ensemble_mlp_loss, arguments, upstream, **kwargs)
    plain = with_gradients(reference.ensemble_mlp_loss, arguments, upstream, **kwargs)
    in_float64 = cast(arguments, torch.float64, arguments["input"].device)
    exact = with_gradients(reference.ensemble_mlp_loss, in_float64, upstream, **kwargs)
    loss_dtype = dtype if dtype == torch.float64 else torch.float32
    for i, (ours, theirs, oracle) in enumerate(zip(got, plain, exact, strict=True)):
        assert ours.shape == oracle.shape and ours.dtype == (dtype if i else loss_dtype)
        rounding = torch.finfo(ours.dtype).eps * rms(oracle)
        # Squares of numbers on a grid mostly end in bits that are rounded down, hence the 24.
        # The slope of mish is a sum of two of opposite sign. An exponential multiplies the rounding of an
        # output by its size (exp(-x) is off by |x| times as much), and where one example outweighs the others
        # plain PyTorch's own error is chance, as that of a few numbers is.
        exponential = arguments.get("loss") in ("gaussian_nll", "poisson_nll")
        hard = exponential or arguments.get("activation") == "mish"
        few = 16 if exponential else 4 if hard or ours.numel() < 32 else 2
        roundings = 32 if dtype == torch.float64 else 24 if i == 0 else few
        if i == 0 and multiplies_pairs(dtype, arguments["input"].device):
            # Plain PyTorch's error of a few means is chance: it may be next to nothing.
            roundings, rounding = 2, torch.finfo(dtype).eps * rms(oracle)
        allowed = (0 if dtype == torch.float64 else 2 * rms(theirs - oracle)) + roundings * rounding
        error = rms(ours - oracle)
        assert error <= allowed, f"{'loss' if i == 0 else f'gradient {i - 1}'}: {error / allowed} of allowed"
