"""The bits that the CPU kernels give, as checksums: what a change of structure must not change.

    python -m tests.checksums                 compares this process's instruction set with checksums.json
    python -m tests.checksums --write         replaces what the file says of it
    python -m tests.checksums --json          prints it instead

`PYENS_CPU_CAPABILITY` chooses the instruction set. Inputs are whole numbers times powers of two, drawn by
numpy's PCG64: the same everywhere. Of float64 there is only what needs no function of the C library (no
exponential, no logarithm), which differs from machine to machine; gradients that torch composes are left out.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyens
from pyens import ops

FILE = Path(__file__).with_name("checksums.json")
CAPABILITIES = ("base", "avx2", "avx512", "avx512_bf16")

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
ACTIVATIONS = ("relu", "gelu", "silu", "elu", "softplus", "tanh", "identity")
EXACT = ("relu", "identity")  # activations that are right to the bit in float64
SHAPES = {
    "narrow": (3, [32, 50, 20, 10, 1]),
    "odd": (2, [129, 13, 17]),
    "wide": (1, [140, 200, 3]),
    "linear": (5, [7, 2]),
}
BATCHES = (1, 2, 7, 8, 9, 10, 17, 64, 65, 300, 1000)


class Numbers:
    """Draws k / 2^10 with k uniform in (-2^10, 2^10): three per cent of them 0 or a power of two."""

    def __init__(self, *seed: Any) -> None:
        words = hashlib.sha256(repr(seed).encode()).digest()[:8]
        self.generator = np.random.Generator(np.random.PCG64(int.from_bytes(words, "little")))

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        whole = self.generator.integers(-1023, 1024, shape)
        return torch.from_numpy(whole.astype(np.float64) / 1024 * scale).to(dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.from_numpy(self.generator.integers(0, high, shape))


def digest(tensors: Sequence[Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(torch.uint8)
        sha.update(str(tuple(tensor.shape)).encode() + bits.numpy().tobytes())
    return sha.hexdigest()[:12]


def network(
    draw: Numbers, e: int, widths: list[int], dtype: torch.dtype, bias: bool
) -> tuple[list[Tensor], list[Tensor]]:
    pairs = list(itertools.pairwise(widths))
    weights = [draw(e, o, i, dtype=dtype, scale=2.0 ** -(i.bit_length() // 2)) for i, o in pairs]
    return weights, [draw(e, o, dtype=dtype) for _, o in pairs] if bias else []


def gradients(loss: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss.sum(), of))


def mlp_cases() -> Iterator[tuple[str, list[Tensor]]]:
    choices = itertools.cycle(itertools.product((False, True), (True, False), (0.0, 0.25)))
    for (kind, dtype), activation, (shape, (e, widths)), batch in itertools.product(
        DTYPES.items(), ACTIVATIONS, SHAPES.items(), BATCHES
    ):
        if kind == "f64" and activation not in EXACT:
            continue
        own, bias, dropout = next(choices)
        name = f"mlp {kind} {activation} {shape} B{batch}{' own' * own}{' bias' * bias} p{dropout}"
        draw = Numbers(name)
        weights, biases = network(draw, e, widths, dtype, bias)
        parameters = [t.requires_grad_() for t in (*weights, *biases)]
        x = draw(*([e] * own), batch, widths[0], dtype=dtype).requires_grad_()
        options: dict[str, Any] = {"activation": activation, "dropout": dropout}
        options["dropout_seeds"] = draw.integers(2**40, e) if dropout else None
        output = ops.ensemble_mlp(x, weights, biases, **options)
        from_above = draw(*output.shape, dtype=dtype)
        yield name, [output, *torch.autograd.grad(output, [x, *parameters], from_above)]
        if dropout == 0 and batch < 20:
            strided = draw(batch, 2 * widths[0], dtype=dtype)[:, ::2]
            yield f"{name} strided", [ops.ensemble_mlp(strided, weights, biases, activation=activation)]


def layer_cases() -> Iterator[tuple[str, list[Tensor]]]:
    """Norms, residuals, other activations, chosen members; of float64 as above."""
    choices = itertools.cycle(itertools.product(("before", "after"), (False, True), (0.0, 0.25)))
    activations = itertools.cycle(
        ("mish", "celu(0.5)", "leaky_relu(0.25)", "sigmoid", "gelu_tanh", "hardswish", "sin", "elu(2)")
    )
    for (kind, dtype), norm, width, batch in itertools.product(
        DTYPES.items(), ("none", "layer_norm", "rms_norm"), (5, 64, 130), (1, 9, 65, 300)
    ):
        place, own, dropout = next(choices)
        activation = "leaky_relu(0.25)" if kind == "f64" else next(activations)
        name = f"layers {kind} {norm} {place} {activation} {width} B{batch}{' own' * own} p{dropout}"
        draw = Numbers(name)
        weights, biases = network(draw, 3, [7, width, width, 2], dtype, True)
        norms = [draw(3, width, dtype=dtype) for _ in range(0 if norm == "none" else 4)]
        chosen = torch.tensor([2, 0, 2, 1])
        x = draw(*([4] * own), batch, 7, dtype=dtype).requires_grad_()
        parameters = [t.requires_grad_() for t in (*weights, *biases, *norms)]
        output = ops.ensemble_mlp(
            x,
            weights,
            biases,
            activation=activation,
            output_activation=activation,
            norm=None if norm == "none" else norm,
            norm_weights=norms[:2],
            norm_biases=norms[2:],
            norm_position=f"{place}_activation",
            residual=[False, True],
            dropout=dropout,
            dropout_seeds=draw.integers(2**40, 4),
            dropout_position="before_norm" if own and norm != "none" else "after_activation",
            members=chosen,
        )
        from_above = draw(*output.shape, dtype=dtype)
        yield name, [output, *torch.autograd.grad(output, [x, *parameters], from_above)]


def packed_and_strength_cases() -> Iterator[tuple[str, list[Tensor]]]:
    for (kind, dtype), (shape, (e, widths)), batch in itertools.product(
        DTYPES.items(), SHAPES.items(), (1, 3, 9, 10, 70)
    ):
        name = f"{kind} {shape} B{batch}"
        draw = Numbers("packed", name)
        model = pyens.EnsembleMLP(e, widths[0], widths[1:-1], widths[-1], dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(draw(*parameter.shape, dtype=dtype, scale=0.25))
        x = draw(batch, widths[0], dtype=dtype)
        yield f"packed {name}", [model.packed()(x)]
        units = sum(widths[1:-1])
        mean, std = draw(units, dtype=dtype), draw(e, units, dtype=dtype).abs() + 0.25
        for bitpack in (False, True):
            found = ops.activation_strength(
                x, list(model.weights), list(model.biases), mean, std.to(dtype), bitpack=bitpack
            )
            yield f"strength {name}{' bits' * bitpack}", list(found)


def loss_cases() -> Iterator[tuple[str, list[Tensor]]]:
    losses = ("mse", "bce", "gaussian_nll", "cross_entropy")
    choices = itertools.cycle(itertools.product((0.0, 0.5), (False, True), (False, True)))
    for (kind, dtype), loss, (shape, (e, widths)), batch in itertools.product(
        DTYPES.items(), losses, {**SHAPES, "few": (40, [9, 6, 4])}.items(), (1, 8, 65, 300, 1000)
    ):
        if kind == "f64" and loss != "mse":
            continue
        dropout, own, weighted = next(choices)
        name = f"loss {kind} {loss} {shape} B{batch} p{dropout}{' own' * own}{' weighted' * weighted}"
        draw = Numbers(name)
        widths = [*widths[:-1], widths[-1] + widths[-1] % 2]
        weights, biases = network(draw, e, widths, dtype, True)
        parameters = [t.requires_grad_() for t in (*weights, *biases)]
        x = draw(*([e] * own), batch, widths[0], dtype=dtype).requires_grad_()
        columns = widths[-1] // 2 if loss == "gaussian_nll" else widths[-1]
        real = torch.float64 if kind == "f64" else torch.float32
        if loss == "cross_entropy":
            target = draw.integers(widths[-1], batch)
        else:
            target = draw(*([e] * own), batch, columns, dtype=real).abs()
        found = ops.ensemble_mlp_loss(
            x,
            target,
            weights,
            biases,
            loss=loss,
            activation="relu" if kind == "f64" else "tanh" if batch == 65 else "relu",
            temperature=2.0 if loss == "cross_entropy" else 1.0,
            sample_weight=draw.integers(3, batch).to(real) if weighted else None,
            dropout=dropout,
            dropout_seeds=draw.integers(2**40, e) if dropout else None,
        )
        yield name, [found, *gradients(found, [x, *parameters])]


def smoothed_cases() -> Iterator[tuple[str, list[Tensor]]]:
    for (kind, dtype), (k, batch) in itertools.product(
        DTYPES.items(), ((1, 9), (2, 65), (10, 300), (300, 8))
    ):
        if kind == "f64":
            continue
        name = f"smoothed loss {kind} K{k} B{batch}"
        draw = Numbers(name)
        weights, biases = network(draw, 3, [9, 13, k], dtype, True)
        parameters = [t.requires_grad_() for t in (*weights, *biases)]
        x, target = draw(batch, 9, dtype=dtype), draw.integers(k, batch)
        found = ops.ensemble_mlp_loss(
            x, target, weights, biases, loss="cross_entropy", temperature=0.5, label_smoothing=0.125
        )
        yield name, [found, *gradients(found, parameters)]


OPTIONS: dict[str, dict[str, Any]] = {
    "huber": {"delta": 0.25},
    "smooth_l1": {"delta": 0.25},
    "quantile": {"quantiles": [0.125, 0.5, 0.75]},
    "poisson_nll": {},
    "soft_cross_entropy": {"temperature": 0.5, "label_smoothing": 0.125},
    "cross_entropy": {"class_weight": None},
    "gaussian_nll": {"log_variance_min": -1.5, "log_variance_max": 0.25},
}


def option_cases() -> Iterator[tuple[str, list[Tensor]]]:
    for (kind, dtype), loss, (k, batch) in itertools.product(
        DTYPES.items(), OPTIONS, ((6, 9), (6, 65), (12, 300), (300, 8))
    ):
        if kind == "f64" and loss not in ("huber", "smooth_l1", "quantile"):
            continue
        name = f"options of {loss} {kind} K{k} B{batch}"
        draw = Numbers(name)
        weights, biases = network(draw, 3, [9, 13, k], dtype, True)
        parameters = [t.requires_grad_() for t in (*weights, *biases)]
        x, target = draw(batch, 9, dtype=dtype), draw(batch, k, dtype=dtype).abs()
        options = dict(OPTIONS[loss])
        if loss == "cross_entropy":
            target, options["class_weight"] = draw.integers(k, batch), draw(3, k, dtype=dtype).abs()
        elif loss in ("quantile", "gaussian_nll"):
            target = target[:, : k // (3 if loss == "quantile" else 2)]
        found = ops.ensemble_mlp_loss(x, target, weights, biases, loss=loss, **options)
        yield name, [found, *gradients(found, parameters)]


def rate_cases() -> Iterator[tuple[str, list[Tensor]]]:
    for (kind, dtype), activation, batch in itertools.product(DTYPES.items(), EXACT, (3, 65, 300)):
        name = f"rates {kind} {activation} B{batch}"
        draw = Numbers(name)
        weights, biases = network(draw, 4, [9, 21, 13, 2], dtype, True)
        parameters = [t.requires_grad_() for t in (*weights, *biases)]
        x = draw(batch, 9, dtype=dtype).requires_grad_()
        options: dict[str, Any] = {"activation": activation, "dropout_seeds": draw.integers(2**40, 4)}
        options["dropout"] = torch.tensor([0.25, 0.0, 0.7, 0.5], dtype=torch.float64)
        output = ops.ensemble_mlp(x, weights, biases, **options)
        from_above = draw(*output.shape, dtype=dtype)
        loss = ops.ensemble_mlp_loss(x, from_above[0], weights, biases, loss="mse", **options)
        of_output = torch.autograd.grad(output, [x, *parameters], from_above)
        yield name, [output, *of_output, loss, *gradients(loss, [x, *parameters])]


def mask_cases() -> Iterator[tuple[str, list[Tensor]]]:
    for (kind, dtype), batch in itertools.product(DTYPES.items(), (1, 5, 70)):
        draw = Numbers("masks", kind, batch)
        masks = [draw.integers(2, 4, width) == 1 for width in (13, 6)]
        channels = draw(batch, 13, 3, dtype=dtype)
        index = draw.integers(4, batch)
        yield (
            f"mask_channels {kind} B{batch}",
            [
                ops.mask_channels(channels, masks[0]),
                ops.mask_channels(channels, masks[0], index),
            ],
        )
        shared = [draw(o, i, dtype=dtype).requires_grad_() for i, o in ((9, 13), (13, 6), (6, 2))]
        biases = [draw(w.shape[0], dtype=dtype).requires_grad_() for w in shared]
        x = draw(batch, 9, dtype=dtype)
        output = ops.masked_mlp(x, shared, biases, masks)
        from_above = draw(*output.shape, dtype=dtype)
        yield (
            f"masked_mlp {kind} B{batch}",
            [
                output,
                *torch.autograd.grad(output, [*shared, *biases], from_above),
            ],
        )
        loss = ops.masked_mlp_loss(x, draw(batch, 2, dtype=dtype), shared, biases, masks, loss="mse")
        yield f"masked_mlp_loss {kind} B{batch}", [loss, *gradients(loss, [*shared, *biases])]


def permutation_cases() -> Iterator[tuple[str, list[Tensor]]]:
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])
    for rows in (1, 5, 1024, 1025, 10**6 + 3, 2**32, 2**32 + 1, 2**62):
        places = [
            ops.keyed_permutation(keys, rows, first, min(70, rows)) for first in (0, rows - min(70, rows))
        ]
        yield f"keyed_permutation {rows}", places


def convolution_cases() -> Iterator[tuple[str, list[Tensor]]]:
    shapes = {
        "padded": ((3, 9, 12), (20, 3, 3, 3), [1, 1], [1, 1], [1, 1], "relu", [2, 2]),
        "strided": ((2, 11, 10), (5, 2, 3, 2), [2, 3], [1, 0], [2, 1], "identity", [1, 1]),
        "many taps": ((30, 6, 7), (7, 30, 3, 3), [1, 1], [0, 0], [1, 1], "relu", [1, 1]),
    }
    for (kind, dtype), (shape, (image, kernel, *options)), batch in itertools.product(
        DTYPES.items(), shapes.items(), (1, 9, 35)
    ):
        own = batch == 9
        name = f"conv2d {kind} {shape} B{batch}{' own' * own}"
        draw = Numbers(name)
        x = draw(*([3] * own), batch, *image, dtype=dtype).requires_grad_()
        weight = draw(3, *kernel, dtype=dtype, scale=0.125).requires_grad_()
        bias = draw(3, kernel[0], dtype=dtype).requires_grad_()
        output = torch.ops.pyens.ensemble_conv2d(x, weight, bias, *options)
        from_above = draw(*output.shape, dtype=dtype)
        yield name, [output, *torch.autograd.grad(output, [x, weight, bias], from_above)]
        with torch.no_grad():
            yield f"{name} forward", [torch.ops.pyens.ensemble_conv2d(x, weight, bias, *options)]


def int8_cases() -> Iterator[tuple[str, list[Tensor]]]:
    def in_bytes(draw: Numbers, *shape: int) -> ops.Int8Weight:
        scales, zeros = draw.integers(40, shape[0]) / 1024 + 0.01, draw.integers(256, shape[0])
        return ops.pack_int8(draw(*shape, dtype=torch.float32), scales, zeros.to(torch.uint8))

    for activation, batch, own in itertools.product(("relu", "gelu"), (1, 9, 70), (False, True)):
        draw = Numbers("int8", activation, batch, own)
        weights = [in_bytes(draw, 3, 21, 13), in_bytes(draw, 3, 5, 21)]
        biases = [draw(3, 21, dtype=torch.float32), draw(3, 5, dtype=torch.float32)]
        x = draw(*([3] * own), batch, 13, dtype=torch.float32)
        name = f"int8 {activation} B{batch}{' own' * own}"
        yield name, [ops.ensemble_mlp_int8(x, weights, biases, activation=activation)]
    for channels, batch in itertools.product((1, 6), (1, 9, 35)):
        draw = Numbers("int8 conv2d", channels, batch)
        weight = in_bytes(draw, 3, 7, channels, 3, 5)
        x, bias = draw(batch, channels, 9, 12, dtype=torch.float32), draw(3, 7, dtype=torch.float32)
        output = ops.ensemble_conv2d_int8(x, weight, bias, padding=1, activation="relu", max_pool=2)
        yield f"int8 conv2d C{channels} B{batch}", [output]


def embedding_cases() -> Iterator[tuple[str, list[Tensor]]]:
    for (kind, dtype), batch, own in itertools.product(DTYPES.items(), (1, 70, 300), (False, True)):
        name = f"{kind} B{batch}{' own' * own}"
        draw = Numbers("embedding", name)
        tables = [draw(3, rows, dim, dtype=dtype).requires_grad_() for rows, dim in ((11, 1), (200, 9))]
        index = torch.stack([draw.integers(t.shape[1], *([3] * own), batch) for t in tables], -1)
        numeric = draw(*([3] * own), batch, 4, dtype=dtype).requires_grad_()
        rows = ops.ensemble_embedding(index[..., 1], tables[1])
        from_above = draw(*rows.shape, dtype=dtype)
        sparse = ops.ensemble_embedding(index[..., 1], tables[1], sparse=True)
        coo = torch.autograd.grad(sparse, tables[1], from_above)[0].coalesce()
        dense = torch.autograd.grad(rows, tables[1], from_above)[0]
        yield f"embedding {name}", [rows, dense, coo.indices(), coo.values()]
        features = torch.ops.pyens.ensemble_embedding_concat(index, tables, numeric)
        from_above = draw(*features.shape, dtype=dtype)
        yield (
            f"concat {name}",
            [
                features,
                *torch.autograd.grad(features, [*tables, numeric], from_above),
            ],
        )


def member_cases() -> Iterator[tuple[str, list[Tensor]]]:
    """The kernels over the member axis."""
    for (kind, dtype), e, batch in itertools.product(DTYPES.items(), (1, 2, 9, 33), (1, 17, 300)):
        name = f"{kind} E{e} B{batch}"
        for loss_kind, classes in itertools.product(("correlation", "covariance", "residue"), (1, 3)):
            draw = Numbers("decorrelation", name, loss_kind, classes)
            outputs = draw(e, batch, classes, dtype=dtype).requires_grad_()
            loss = ops.decorrelation_loss(outputs, kind=loss_kind)
            yield f"decorrelation {name} {loss_kind} K{classes}", [loss, *gradients(loss, [outputs])]
        draw = Numbers("uncertainty", name)
        outputs, variances = draw(e, batch, 5, dtype=dtype), draw(e, batch, 5, dtype=dtype).abs()
        yield (
            f"moments {name}",
            [t for t in ops.predictive_moments(outputs, variances=variances) if t is not None],
        )
        if kind == "f64":
            continue
        for classes in (0, 1, 2, 10):
            logits = draw(e, batch, *([classes] * (classes > 0)), dtype=dtype, scale=4.0)
            yield f"uncertainty {name} K{classes}", list(ops.predictive_uncertainty(logits))
        even = torch.full((e, batch, 4), 0.25, dtype=dtype)
        yield f"probabilities {name}", list(ops.predictive_uncertainty(even, from_probabilities=True))


def optimizer_cases() -> Iterator[tuple[str, list[Tensor]]]:
    """Steps of every kind. Powers of these betas are exact, whatever the C library."""
    betas: dict[str, Any] = {"betas": (0.625, 0.875)}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "Adam": (torch.optim.Adam, betas),
        "Adam amsgrad": (torch.optim.Adam, betas | {"amsgrad": True, "weight_decay": 0.125}),
        "AdamW": (torch.optim.AdamW, betas | {"weight_decay": 0.125, "maximize": True}),
        "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.125, "weight_decay": 0.125}),
        "SGD": (torch.optim.SGD, {"weight_decay": 0.125}),
        "SGD momentum": (torch.optim.SGD, {"momentum": 0.75, "dampening": 0.25}),
        "SGD nesterov": (torch.optim.SGD, {"momentum": 0.75, "nesterov": True}),
    }
    for (kind, dtype), (name, (optimizer, options)) in itertools.product(DTYPES.items(), kinds.items()):
        draw = Numbers("optimizer", kind, name)
        shapes = [(3, 5), (3, 16), (3, 333)]
        parameters = [draw(*shape, dtype=dtype).requires_grad_() for shape in shapes]
        made = pyens.optim.fused(optimizer, parameters, lr=0.0625, **options)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = draw(*parameter.shape, dtype=dtype)
            made.step()
        state = [t for of in pyens.optim.member_state(made) for t in of.values()]
        yield f"step {kind} {name}", [*parameters, *state]


def clip_cases() -> Iterator[tuple[str, list[Tensor]]]:
    """Some members are clipped, others are not."""
    for (kind, dtype), norm in itertools.product(DTYPES.items(), (1.0, 2.0, math.inf)):
        draw = Numbers("clip", kind, norm)
        parameters = [draw(*shape, dtype=dtype).requires_grad_() for shape in ((3, 5), (3, 16), (3, 9001))]
        for parameter in parameters:
            parameter.grad = draw(*parameter.shape, dtype=dtype)
            parameter.grad[1] /= 2**15
        norms = pyens.optim.clip_member_grad_norm_(parameters, 0.75, norm)
        yield f"clip {kind} norm {norm}", [norms, *(p.grad for p in parameters if p.grad is not None)]


def cases() -> Iterator[tuple[str, list[Tensor]]]:
    yield from mlp_cases()
    yield from layer_cases()
    yield from packed_and_strength_cases()
    yield from loss_cases()
    yield from smoothed_cases()
    yield from option_cases()
    yield from rate_cases()
    yield from mask_cases()
    yield from embedding_cases()
    yield from convolution_cases()
    yield from int8_cases()
    yield from member_cases()
    yield from optimizer_cases()
    yield from clip_cases()
    yield from permutation_cases()


def record() -> dict[str, str]:
    """One checksum for all batches of a case, and what else its name says after the first ` B`."""
    found: dict[str, list[str]] = {}
    for name, tensors in cases():
        found.setdefault(name.split(" B")[0], []).append(digest(tensors))
    return {name: hashlib.sha256("".join(every).encode()).hexdigest()[:12] for name, every in found.items()}


def record_of(capability: str) -> tuple[str, dict[str, str]]:
    """What a process of its own records under that cap, and the instruction set that it then used."""
    environment = {**os.environ, "PYENS_CPU_CAPABILITY": capability}
    command = [sys.executable, "-m", "tests.checksums", "--json"]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    return found["capability"], found["checksums"]


def saved() -> dict[str, dict[str, str | None]]:
    """None: changed on purpose where there was no such processor, and not recorded since."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def differences(expected: Mapping[str, str | None], found: Mapping[str, str]) -> list[str]:
    names = dict.fromkeys([*expected, *found])
    return [name for name in names if expected.get(name, "") not in (None, found.get(name))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    capability, found = pyens.build_info()["cpu_capability"], record()
    if arguments.json:
        print(json.dumps({"capability": capability, "checksums": found}))
    elif arguments.write:
        FILE.write_text(json.dumps({**saved(), capability: found}, indent=0, sort_keys=True) + "\n")
        print(f"{FILE.name}: {len(found)} checksums of {capability}")
    else:
        different = differences(saved().get(capability, {}), found)
        print("\n".join(different[:50]))
        sys.exit(f"{len(different)} of {len(found)} differ on {capability}" if different else 0)


if __name__ == "__main__":
    main()
