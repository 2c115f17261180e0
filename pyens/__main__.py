"""`python -m pyens`: what was built, and some seconds of every operation against its reference.

A new operation gets a function that draws a problem and a line in `CHECKS`.
"""

import argparse
import itertools
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyens import build_info, ops, reference
from pyens._types import Activation
from pyens.ops import clip_member_grad_norm as clip
from pyens.ops import optimizers as steps
from pyens.ops.ensemble_embedding import ensemble_embedding_concat
from pyens.ops.ensemble_mlp import ensemble_mlp_packed, prepack
from pyens.reference import clip_member_grad_norm as reference_clip
from pyens.reference import optimizers as reference_steps
from pyens.reference.activation_strength import pack_bits
from pyens.reference.activations import ACTIVATIONS
from pyens.reference.ensemble_embedding import ensemble_embedding_concat as reference_concat
from pyens.reference.ensemble_mlp_loss import LOSSES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# For gradients: in the others a rounding turns a ReLU on or off; in float32 those with a kink are left out.
FULL = (torch.float32, torch.float64)
BATCHES = (1, 3, 7, 8, 9, 10, 17, 100)  # the CPU kernel maps those under 8, packed 10, in another way

Problem = dict[str, Any]  # the arguments of an operation
Operation = Callable[..., Any]
Results = Callable[[Operation, Problem], list[Tensor]]


def relative_error(got: Tensor, plain: Tensor, exact: Tensor) -> float:
    """RMS error of `got` in units of what is allowed: 1 is the limit.

    Allowed are twice the error of plain PyTorch in the same dtype (`plain`) and two roundings of the result;
    in float64, where plain PyTorch itself counts as `exact`, 16 roundings.
    """
    if got.shape != exact.shape or got.dtype != plain.dtype:
        return math.inf
    rounding = torch.finfo(got.dtype).eps * _rms(exact)
    plain_error = _rms(plain.double() - exact)
    allowed = 16 * rounding if got.dtype == torch.float64 else 2 * (plain_error + rounding)
    error = _rms(got.double() - exact)
    if error == 0:
        return 0.0
    return error / allowed if error < math.inf and allowed > 0 else math.inf


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


# ------------------------------------------------------------------------------------------------------------
# Problems: each the arguments of an operation, of random sizes and values, the same in every run


class Draw:
    """What the problem of this number is made of."""

    def __init__(self, number: int, dtype: torch.dtype, batch: int, activation: Activation) -> None:
        self.number, self.dtype, self.batch, self.activation = number, dtype, batch, activation
        self.size = random.Random(number).randint
        self.generator = torch.Generator().manual_seed(number)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def index(self, end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, generator=self.generator)

    def leading(self, members: int) -> list[int]:
        """Of inputs that every member has of its own, or that all share."""
        return [members, self.batch] if self.size(0, 1) else [self.batch]

    def layers(self, widths: list[int], *members: int) -> dict[str, Any]:
        """Input, weights and biases of an MLP."""
        pairs = list(itertools.pairwise(widths))
        return {
            "input": self.normal(*self.leading(*members or [1]), widths[0]),
            "weights": [self.normal(*members, o, i, scale=1.4 / i**0.5) for i, o in pairs],
            "biases": [self.normal(*members, o, scale=0.3) for _, o in pairs],
            "activation": self.activation,
        }


def mlp(draw: Draw) -> Problem:
    return draw.layers([draw.size(1, 50) for _ in range(draw.size(2, 5))], draw.size(9, 40))


def mlp_dropout(draw: Draw) -> Problem:
    # A unit that is kept in one and dropped in the other would be an error of 100 %.
    problem = mlp(draw)
    seeds = torch.arange(len(problem["biases"][0])) - draw.number
    return problem | {"dropout": (draw.number % 9 + 1) / 10, "dropout_seeds": seeds}


def mlp_layers(draw: Draw) -> Problem:
    """What a layer may have beyond an activation."""
    width, members = draw.size(9, 40), draw.size(9, 40)
    problem = draw.layers([draw.size(1, 50), width, width, draw.size(1, 5)], members)
    chosen = draw.index(members, draw.size(9, 20))
    leading = [len(chosen), draw.batch] if problem["input"].dim() == 3 else [draw.batch]
    early = draw.number % 3 == 0
    return problem | {
        "input": draw.normal(*leading, problem["input"].shape[-1]),
        "activation": [draw.activation, "mish"],
        "output_activation": "sigmoid",
        "norm": ["rms_norm", "layer_norm"] if draw.number % 2 else "layer_norm",
        "norm_weights": [1 + draw.normal(members, width, scale=0.2) for _ in range(2)],
        "norm_biases": [draw.normal(members, width, scale=0.2) for _ in range(2)],
        # A small one magnifies roundings where features are few and alike.
        "norm_eps": 0.1,
        "norm_position": "after_activation" if draw.number % 5 == 0 else "before_activation",
        "residual": True,
        "dropout": 0.25 if draw.number % 4 == 1 else 0.0,
        "dropout_seeds": torch.arange(len(chosen)) - draw.number,
        "dropout_position": "before_norm" if early else "after_activation",
        "members": chosen,
    }


def mlp_loss(draw: Draw) -> Problem:
    """A loss with all its options."""
    problem, i, loss = mlp(draw), draw.number, list(LOSSES)[draw.number % len(LOSSES)]
    members, out = problem["biases"][-1].shape
    if loss in ("gaussian_nll", "quantile") and out % 2 == 1:
        loss = "mse"
    if loss in ("gaussian_nll", "poisson_nll"):  # no exponent that magnifies a rounding to all of the loss
        problem["weights"][-1] *= 0.125
    columns = out // 2 if loss in ("gaussian_nll", "quantile") else out
    leading = draw.leading(members)
    labels, values = draw.index(out, *leading), draw.uniform(*leading, columns).to(draw.dtype)
    options: Problem = {}
    if loss in ("cross_entropy", "soft_cross_entropy"):
        options = {"temperature": 0.5, "label_smoothing": 0.1 if i % 8 == 7 else 0.0}
    if loss == "cross_entropy" and i % 4 > 1:
        options["class_weight"] = (draw.uniform(out) + 0.1).to(draw.dtype)
    if loss == "gaussian_nll" and i % 4 > 1:
        options |= {"log_variance_min": -2.0, "log_variance_max": 0.5}
    if loss == "quantile":  # no error whose sign depends on a rounding
        values = values + 20 * (2 * draw.index(2, *leading, columns) - 1).to(draw.dtype)
        options["quantiles"] = [0.25, 0.9]
    if loss in ("huber", "smooth_l1"):
        options["delta"] = 0.5
    return problem | {
        "target": labels if loss == "cross_entropy" else values,
        "loss": loss,
        **options,
        "sample_weight": (draw.uniform(*leading) + 0.1).to(draw.dtype) if i % 2 == 0 else None,
        "dropout": 0.2 if i % 5 == 0 else 0.0,
        "dropout_seeds": torch.arange(members) if i % 5 == 0 else None,
    }


def strength(draw: Draw) -> Problem:
    problem = mlp(draw)
    dtype = torch.float64 if draw.dtype == torch.float64 else torch.float32
    units = sum(bias.shape[1] for bias in problem["biases"][:-1])
    shape = [len(problem["biases"][0]), units] if draw.number % 2 else [units]
    return problem | {"mean": draw.uniform(*shape).to(dtype), "std": (draw.uniform(*shape) + 0.5).to(dtype)}


def concat(draw: Draw) -> Problem:
    """Tables side by side, with numbers."""
    members = draw.size(1, 40)
    leading = draw.leading(members)
    columns = [(draw.size(1, 100), draw.size(1, 20)) for _ in range(draw.size(1, 4))]
    return {
        "categorical": torch.stack([draw.index(n, *leading) for n, _ in columns], -1),
        "tables": [draw.normal(members, n, d) for n, d in columns],
        "numeric": draw.normal(*leading, draw.size(1, 30)),
    }


def embedding(draw: Draw) -> Problem:
    columns = concat(draw)
    return {
        "index": columns["categorical"][..., 0],
        "weight": columns["tables"][0],
        "sparse": draw.number % 2 == 0,
    }


def outputs_of_members(draw: Draw) -> Tensor:
    """`[E, B, K]` of members that agree somewhat."""
    members, batch, classes = draw.size(2, 40), draw.size(8, 100), draw.size(2, 130)
    return draw.normal(batch, classes) + draw.normal(members, batch, classes)


def components(draw: Draw) -> Problem:
    kind = ("correlation", "covariance", "residue")[draw.number % 3]
    return {"outputs": outputs_of_members(draw), "kind": kind}


def moments(draw: Draw) -> Problem:
    outputs = outputs_of_members(draw)
    return {"outputs": outputs, "variances": outputs.abs()}


def permuted(draw: Draw) -> Problem:
    rows = (draw.batch + 1) * (1, 1000, 10**12)[draw.number % 3]
    keys = draw.index(1 << 40, draw.size(1, 5)) - (1 << 39)
    return {"keys": keys, "n": rows, "first": rows - draw.batch - 1, "count": draw.batch}


def channels(draw: Draw) -> Problem:
    width, masks, inner = draw.size(1, 100), draw.size(1, 8), ((), (1,), (5, 7))[draw.number % 3]
    return {
        "input": draw.normal(draw.batch, width, *inner),
        "masks": draw.uniform(masks, width) < 0.6,
        "index": draw.index(masks, draw.batch) if draw.number % 2 else None,
    }


def images(draw: Draw) -> Problem:
    """A convolution alone, of every geometry."""
    members, inputs, outputs, i = draw.size(2, 5), draw.size(1, 12), draw.size(1, 30), draw.number
    height, width = draw.size(1, 3), draw.size(1, 4)
    weight = draw.normal(members, outputs, inputs, height, width) / (inputs * height * width) ** 0.5
    return {
        "input": draw.normal(*draw.leading(members), inputs, draw.size(7, 14), draw.size(9, 17)),
        "weight": weight,
        "bias": draw.normal(members, outputs),
        "stride": [1 + i % 2, 1 + i % 3],
        "padding": [i % 3, i % 2],
        "dilation": [1 + i % 2, 1],
    }


def pooled_images(draw: Draw) -> Problem:
    problem, i = images(draw), draw.number
    return problem | {"activation": "relu" if i % 3 else "identity", "max_pool": [1 + i % 2, 1 + i % 3]}


def masked(draw: Draw) -> Problem:
    """As `mlp`, of shared weights under masks of all sizes."""
    masks, widths = draw.size(2, 6), [draw.size(8, 50) for _ in range(draw.size(3, 4))]
    problem = draw.layers(widths)
    problem["input"] = draw.normal(*draw.leading(masks), widths[0])
    return problem | {"masks": [draw.uniform(masks, width) < 0.5 for width in widths[1:-1]]}


def masked_loss(draw: Draw) -> Problem:
    problem = masked(draw)
    target = draw.normal(draw.batch, len(problem["biases"][-1]))
    return problem | {"target": target, "loss": "mse"}


def step(draw: Draw, *state: str, counts: bool) -> Problem:
    """Of an optimizer: the tensors that it updates."""
    sizes = [draw.size(1, 200) for _ in range(3)]
    lists = {name: [draw.normal(n) for n in sizes] for name in ("parameters", "gradients", *state)}
    for name in {"exp_avg_sqs", "max_exp_avg_sqs", "sums"} & lists.keys():
        lists[name] = [t.square() for t in lists[name]]
    steps = {"steps": [torch.tensor(float(n)) for n in sizes]} if counts else {}
    return lists | steps | {"grad_scale": 4.0 if draw.number % 3 == 0 else None}


def adam(draw: Draw) -> Problem:
    """Also AdamW and amsgrad."""
    problem, i = step(draw, "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", counts=True), draw.number
    if i % 5 < 3:
        problem["max_exp_avg_sqs"] = []
    problem |= {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.1 * (i % 2)}
    return problem | {"decoupled_weight_decay": i % 4 > 1, "maximize": i % 8 > 3}


def adagrad(draw: Draw) -> Problem:
    problem, i = step(draw, "sums", counts=True), draw.number
    problem |= {"lr": 0.1, "lr_decay": 0.1 * (i % 4 > 1), "eps": 1e-3, "weight_decay": 0.1 * (i % 2)}
    return problem | {"maximize": i % 8 > 3}


def sgd(draw: Draw) -> Problem:
    problem, i = step(draw, "momentum_buffers", counts=False), draw.number
    if i % 4 == 0:
        problem["momentum_buffers"] = []
    problem |= {"lr": 0.1, "momentum": 0.9 * (i % 4 > 0), "dampening": 0.5 * (i % 2), "weight_decay": 0.1}
    return problem | {"nesterov": i % 8 > 3, "maximize": i % 3 > 1, "begins": i % 5 > 3}


def gradients_to_clip(draw: Draw) -> Problem:
    """Of which about every other member is clipped."""
    members, i = draw.size(9, 40), draw.number
    shapes = [(members, draw.size(1, 99)), (members, draw.size(1, 30), draw.size(1, 30)), (members,)]
    norm = (1.0, 2.0, math.inf)[i % 3]
    problem = {"gradients": [draw.normal(*s) for s in shapes], "max_norm": (300.0, 15.0, 3.0)[i % 3]}
    return problem | {"norm_type": norm, "error_if_nonfinite": i % 2 == 0}


def problems(
    make: Callable[[Draw], Problem], dtypes: tuple[torch.dtype, ...] = DTYPES, each: int = 2
) -> Iterator[Problem]:
    """Every dtype and batch size, each so often, with the activations in turn."""
    for number, (dtype, batch, i) in enumerate(itertools.product(dtypes, BATCHES, range(each))):
        activation = list(ACTIVATIONS)[i % len(ACTIVATIONS)]
        if dtypes is not FULL or dtype == torch.float64 or activation not in ("relu", "leaky_relu"):
            yield make(Draw(number, dtype, batch, activation))


# ------------------------------------------------------------------------------------------------------------
# What is compared


def convert(problem: Problem, function: Callable[[Tensor], Tensor]) -> Problem:
    """The problem with `function` of each of its floating tensors."""

    def of(value: Any) -> Any:
        if isinstance(value, list):
            return [of(v) for v in value]
        return function(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: of(value) for name, value in problem.items()}


def outputs(operation: Operation, problem: Problem) -> list[Tensor]:
    result = operation(**problem)
    return [result] if isinstance(result, Tensor) else list(result)


def gradients(operation: Operation, problem: Problem) -> list[Tensor]:
    """Of the sum of squares of the output, or of a single number itself, in all that can be learned."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    fixed = ("target", "sample_weight", "class_weight")
    constant = {name: problem[name] for name in fixed if name in problem}
    output = operation(**convert({k: v for k, v in problem.items() if k not in constant}, leaf), **constant)
    total = output.square().sum() if output.dim() else output
    return [g.to_dense() for g in torch.autograd.grad(total, leaves)]


def both(operation: Operation, problem: Problem) -> list[Tensor]:
    return outputs(operation, problem) + gradients(operation, problem)


def places(operation: Operation, problem: Problem) -> list[Tensor]:
    """Whole numbers, as numbers that are compared."""
    return [output.double() for output in outputs(operation, problem)]


def joined(operation: Operation, problem: Problem) -> list[Tensor]:
    """All of it as one vector: a loss for each of a few masks is too little to tell its error from luck."""
    return [torch.cat([t.flatten() for t in both(operation, problem)])]


def updated(operation: Operation, problem: Problem) -> list[Tensor]:
    """What an operation that returns nothing makes of its tensors, those of each list as one."""
    copies = convert(problem, Tensor.clone)
    operation(*copies.values())
    lists = [value for name, value in copies.items() if isinstance(value, list) and name != "steps"]
    return [torch.cat(tensors) for tensors in lists if tensors]


def clipped(operation: Operation, problem: Problem) -> list[Tensor]:
    """The norms, and the gradients as one."""
    copies = convert(problem, Tensor.clone)
    norms = operation(*copies.values())
    return [norms, torch.cat([g.flatten() for g in copies["gradients"]])]


def numbers(operation: Operation, problem: Problem) -> list[Tensor]:
    """Output and values of `activation_strength`; without a hidden unit there are no values."""
    output, value, _ = operation(**problem)
    return [output, value] if value.numel() else [output]


def check(
    ours: Operation, theirs: Operation, problems: Iterator[Problem], results: Results = outputs
) -> Iterator[float]:
    """The largest error of each problem."""
    for problem in problems:
        exact = results(theirs, convert(problem, Tensor.double))
        yield max(map(relative_error, results(ours, problem), results(theirs, problem), exact))


def check_active() -> Iterator[float]:
    """The active bits, against the signs of the values: with mean 0 and std 1 those are the activations.

    But for what float16 rounds to 0: one bit of 10,000 may be another.
    """
    for problem in problems(strength):
        problem |= {"mean": torch.zeros_like(problem["mean"]), "std": torch.ones_like(problem["std"])}
        bits, packed = ops.activation_strength(**problem), ops.activation_strength(**problem, bitpack=True)
        positive = packed.value > 0
        error = 0.0
        for active, expected in ((bits.active, positive), (packed.active, pack_bits(positive))):
            if active.shape != expected.shape or active.dtype != expected.dtype:
                error = math.inf
            elif active.numel():
                error = max(error, (active != expected).double().mean().item() / 1e-4)
        yield error


def check_packed() -> Iterator[float]:
    def packed(**problem: Any) -> Tensor:
        return ensemble_mlp_packed(packed=prepack(problem["weights"], problem["biases"]), **problem)

    return check(packed, reference.ensemble_mlp, problems(mlp, each=7))


def check_sparse() -> Iterator[float]:
    def some_zero(draw: Draw) -> Problem:
        problem = mlp(draw)
        return problem | {"weights": [w.where(draw.uniform(*w.shape) < 0.3, 0) for w in problem["weights"]]}

    def sparse(weights: list[Tensor], **problem: Any) -> Tensor:
        return ops.ensemble_mlp_sparse(weights=[ops.pack_sparse(w) for w in weights], **problem)

    return check(sparse, reference.ensemble_mlp, problems(some_zero, (torch.float32, torch.float64), 7))


def check_sparse_images() -> Iterator[float]:
    def some_zero(draw: Draw) -> Problem:
        problem = pooled_images(draw)
        weight = problem["weight"]
        return problem | {"weight": weight.where(draw.uniform(*weight.shape) < 0.3, 0)}

    def sparse(weight: Tensor, **problem: Any) -> Tensor:
        return ops.ensemble_conv2d_sparse(weight=ops.pack_sparse(weight), **problem)

    return check(sparse, reference.ensemble_conv2d, problems(some_zero, (torch.float32, torch.float64), 4))


def bytes_of(draw: Draw, weights: Tensor) -> ops.Int8Weight:
    """Those weights in bytes, inputs of some range and zero point."""
    scales = 0.01 + 0.03 * draw.uniform(len(weights))
    return ops.pack_int8(weights, scales, draw.index(256, len(weights)).to(torch.uint8))


def check_bits(ours: Operation, theirs: Operation, problems: Iterator[Problem]) -> Iterator[float]:
    """Whole numbers, and what is rounded alike: no error, or any."""
    for problem in problems:
        yield 0.0 if torch.equal(ours(**problem), theirs(**problem)) else math.inf


def check_int8() -> Iterator[float]:
    def in_bytes(draw: Draw) -> Problem:
        problem = mlp(draw)
        activation = ("relu", "leaky_relu", "identity")[draw.number % 3]
        weights = [bytes_of(draw, w) for w in problem["weights"]]
        return problem | {"weights": weights, "activation": activation}

    return check_bits(
        ops.ensemble_mlp_int8, reference.ensemble_mlp_int8, problems(in_bytes, (torch.float32,), 14)
    )


def check_int8_images() -> Iterator[float]:
    def in_bytes(draw: Draw) -> Problem:
        problem = pooled_images(draw)
        return problem | {"weight": bytes_of(draw, problem["weight"])}

    return check_bits(
        ops.ensemble_conv2d_int8, reference.ensemble_conv2d_int8, problems(in_bytes, (torch.float32,), 8)
    )


def of(
    name: str,
    make: Callable[[Draw], Problem],
    results: Results = outputs,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    each: int = 2,
) -> Callable[[], Iterator[float]]:
    """The check of `pyens.ops.<name>`, which is looked up when it runs."""
    return lambda: check(getattr(ops, name), getattr(reference, name), problems(make, dtypes, each), results)


def of_step(name: str, make: Callable[[Draw], Problem]) -> Callable[[], Iterator[float]]:
    """The check of a step of an optimizer."""
    return lambda: check(getattr(steps, name), getattr(reference_steps, name), problems(make), updated)


CHECKS: dict[str, Callable[[], Iterator[float]]] = {
    "ensemble_mlp": of("ensemble_mlp", mlp, each=7),
    "ensemble_mlp, packed": check_packed,
    "ensemble_mlp_sparse": check_sparse,
    "ensemble_conv2d_sparse": check_sparse_images,
    "ensemble_mlp_int8": check_int8,
    "ensemble_conv2d_int8": check_int8_images,
    "ensemble_mlp, gradients": of("ensemble_mlp", mlp, gradients, FULL, 7),
    "ensemble_mlp, dropout": of("ensemble_mlp", mlp_dropout, each=7),
    "ensemble_mlp, layers": of("ensemble_mlp", mlp_layers, each=7),
    "ensemble_mlp, gradients of layers": of("ensemble_mlp", mlp_layers, gradients, FULL, 7),
    "ensemble_mlp_loss": of("ensemble_mlp_loss", mlp_loss, each=7),
    "ensemble_mlp_loss, gradients": of("ensemble_mlp_loss", mlp_loss, gradients, FULL, 7),
    "activation_strength": of("activation_strength", strength, numbers, each=7),
    "activation_strength, active": check_active,
    "ensemble_conv2d": of("ensemble_conv2d", pooled_images),
    "ensemble_conv2d, gradients": of("ensemble_conv2d", images, gradients),
    "ensemble_embedding": of("ensemble_embedding", embedding, both),
    "ensemble_embedding, concatenated": lambda: check(
        ensemble_embedding_concat, reference_concat, problems(concat), both
    ),
    "decorrelation_loss": of("decorrelation_loss", lambda d: components(d) | {"reduction": "none"}),
    "decorrelation_loss, gradients": of("decorrelation_loss", components, gradients),
    "predictive_uncertainty": of("predictive_uncertainty", lambda d: {"logits": 3 * outputs_of_members(d)}),
    "predictive_moments": of("predictive_moments", moments),
    "keyed_permutation": of("keyed_permutation", permuted, places),
    "mask_channels": of("mask_channels", channels, both),
    "masked_mlp": of("masked_mlp", masked),
    "masked_mlp_loss": of("masked_mlp_loss", masked_loss, joined, FULL, 4),
    "adam_": of_step("adam_", adam),
    "adagrad_": of_step("adagrad_", adagrad),
    "sgd_": of_step("sgd_", sgd),
    "clip_member_grad_norm_": lambda: check(
        clip.clip_member_grad_norm_,
        reference_clip.clip_member_grad_norm_,
        problems(gradients_to_clip, each=3),
        clipped,
    ),
}


def print_build() -> None:
    info = build_info()
    cap = os.environ.get("PYENS_CPU_CAPABILITY")
    print(f"pyens {info['version']}")
    for name, value in {
        "built for torch": f"{info['torch']}, Python {info['python']}",
        "compiler": info["compiler"],
        "CPU kernels": info["cpu_capability"] + (f" (PYENS_CPU_CAPABILITY={cap})" if cap else ""),
        "CUDA kernels": info["cuda"],
        "threads": info["threads"],
    }.items():
        print(f"  {name:<16} {value}")


def self_check() -> bool:
    """Prints a line per operation; whether all are within their tolerance."""
    width = max(map(len, CHECKS))
    print("Self-check on the CPU: error against the reference in float64, in units of what is allowed")
    print(f"  {'':<{width}}  problems  worst error")
    all_ok = True
    for name, check in CHECKS.items():
        errors = list(check())
        ok = max(errors) <= 1
        all_ok &= ok
        print(
            f"  {name:<{width}}  {len(errors):>8}  {max(errors):>11.2f}  {'ok' if ok else 'FAILED'}",
            flush=True,
        )
    return all_ok


def main(arguments: Sequence[str] = ()) -> int:
    description = "Prints what was built, and checks every operation against its reference for some seconds."
    argparse.ArgumentParser(prog="python -m pyens", description=description).parse_args(arguments)
    print_build()
    print()
    return 0 if self_check() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
