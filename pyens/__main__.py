"""`python -m pyens`: what was built, and some seconds of every operation against its reference.

A new operation gets a function that yields the error of one random problem after another, and a line in
`CHECKS`.
"""

import itertools
import math
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyens import build_info, ops, reference
from pyens.ops.ensemble_embedding import ensemble_embedding_concat
from pyens.ops.ensemble_mlp import ensemble_mlp_packed, prepack
from pyens.reference.activation_strength import pack_bits
from pyens.reference.ensemble_embedding import ensemble_embedding_concat as reference_concat
from pyens.reference.ensemble_mlp import ACTIVATIONS
from pyens.reference.ensemble_mlp_loss import LOSSES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BATCHES = (1, 3, 7, 8, 9, 10, 17, 100)  # the CPU kernel maps those under 8, packed 10, in another way


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


# --- ensemble_mlp --------------------------------------------------------------------------------


def _mlp_problems(dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[dict[str, Any]]:
    """Arguments of `ensemble_mlp`: every dtype, activation and kind of batch with random sizes and values."""
    sizes = random.Random(0)
    values = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=values) * scale).to(dtype)

    for dtype, activation, batch in itertools.product(dtypes, ACTIVATIONS, BATCHES):
        members = sizes.randint(9, 40)
        widths = [sizes.randint(1, 50) for _ in range(sizes.randint(2, 5))]
        layers = list(itertools.pairwise(widths))
        leading = [members, batch] if sizes.random() < 0.5 else [batch]
        yield {
            "input": draw(*leading, widths[0], dtype=dtype),
            "weights": [draw(members, o, i, dtype=dtype, scale=1.4 / i**0.5) for i, o in layers],
            "biases": [draw(members, o, dtype=dtype, scale=0.3) for _, o in layers],
            "activation": activation,
        }


def _in_float64(problem: dict[str, Any]) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(v) for v in value]
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: convert(value) for name, value in problem.items()}


def check_ensemble_mlp() -> Iterator[float]:
    for problem in _mlp_problems():
        exact = reference.ensemble_mlp(**_in_float64(problem))
        yield relative_error(ops.ensemble_mlp(**problem), reference.ensemble_mlp(**problem), exact)


def check_ensemble_mlp_packed() -> Iterator[float]:
    for problem in _mlp_problems():
        exact = reference.ensemble_mlp(**_in_float64(problem))
        got = ensemble_mlp_packed(packed=prepack(problem["weights"], problem["biases"]), **problem)
        yield relative_error(got, reference.ensemble_mlp(**problem), exact)


def check_ensemble_mlp_gradients() -> Iterator[float]:
    # Not in half precision, where a rounding flips a ReLU here and there.
    for problem in _mlp_problems((torch.float32, torch.float64)):
        got = _gradients(ops.ensemble_mlp, problem)
        plain = _gradients(reference.ensemble_mlp, problem)
        exact = _gradients(reference.ensemble_mlp, _in_float64(problem))
        yield max(map(relative_error, got, plain, exact))


def _gradients(function: Callable[..., Tensor], problem: dict[str, Any]) -> tuple[Tensor, ...]:
    x, *parameters = (
        t.detach().requires_grad_() for t in (problem["input"], *problem["weights"], *problem["biases"])
    )
    layers = len(problem["weights"])
    given = {"input": x, "weights": parameters[:layers], "biases": parameters[layers:]}
    return torch.autograd.grad(function(**problem | given).square().mean(), [x, *parameters])


def check_dropout() -> Iterator[float]:
    # A unit that is kept in one and dropped in the other would be an error of 100 %.
    for i, problem in enumerate(_mlp_problems()):
        seeds = torch.arange(problem["weights"][0].shape[0]) - i
        problem |= {"dropout": (i % 9 + 1) / 10, "dropout_seeds": seeds}
        exact = reference.ensemble_mlp(**_in_float64(problem))
        yield relative_error(ops.ensemble_mlp(**problem), reference.ensemble_mlp(**problem), exact)


# --- ensemble_mlp_loss -----------------------------------------------------------------------------


def _loss_problems(dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[dict[str, Any]]:
    """Arguments of `ensemble_mlp_loss`: a loss for each problem in turn, with all its options."""
    losses = itertools.cycle(LOSSES)
    values = torch.Generator().manual_seed(1)
    for i, problem in enumerate(_mlp_problems(dtypes)):
        dtype, loss = problem["input"].dtype, next(losses)
        members, out, _ = problem["weights"][-1].shape
        if loss == "gaussian_nll" and out % 2 == 1:
            loss = "mse"
        if loss == "gaussian_nll":  # no variance so small that it magnifies a rounding to all of the loss
            problem["weights"][-1] *= 0.125
        leading = ([members] if i % 3 == 0 else []) + [problem["input"].shape[-2]]
        outputs = out // 2 if loss == "gaussian_nll" else out
        if loss == "cross_entropy":
            target = torch.randint(out, leading, generator=values)
        else:
            target = torch.rand([*leading, outputs], generator=values).to(dtype)
        yield problem | {
            "target": target,
            "loss": loss,
            "temperature": 0.5 if loss == "cross_entropy" else 1.0,
            "sample_weight": (torch.rand(leading, generator=values) + 0.1).to(dtype) if i % 2 == 0 else None,
            "dropout": 0.2 if i % 5 == 0 else 0.0,
            "dropout_seeds": torch.arange(members) if i % 5 == 0 else None,
        }


def check_ensemble_mlp_loss() -> Iterator[float]:
    for problem in _loss_problems():
        exact = reference.ensemble_mlp_loss(**_in_float64(problem))
        plain = reference.ensemble_mlp_loss(**problem)
        yield relative_error(ops.ensemble_mlp_loss(**problem), plain, exact)


def check_ensemble_mlp_loss_gradients() -> Iterator[float]:
    for problem in _loss_problems((torch.float32, torch.float64)):
        if problem["activation"] == "relu" and problem["input"].dtype == torch.float32:
            continue  # a rounding turns one on or off here and there
        got = _gradients(ops.ensemble_mlp_loss, problem)
        plain = _gradients(reference.ensemble_mlp_loss, problem)
        exact = _gradients(reference.ensemble_mlp_loss, _in_float64(problem))
        yield max(map(relative_error, got, plain, exact))


# --- activation_strength -------------------------------------------------------------------------


def check_activation_strength() -> Iterator[float]:
    values = torch.Generator().manual_seed(2)
    for i, problem in enumerate(_mlp_problems()):
        dtype = torch.float64 if problem["input"].dtype == torch.float64 else torch.float32
        units = sum(weight.shape[1] for weight in problem["weights"][:-1])
        leading = (len(problem["weights"][0]),) if i % 2 else ()
        problem["mean"] = torch.rand(*leading, units, generator=values).to(dtype)
        problem["std"] = (torch.rand(*leading, units, generator=values) + 0.5).to(dtype)
        got = ops.activation_strength(**problem)
        plain = reference.activation_strength(**problem)
        exact = reference.activation_strength(**_in_float64(problem))
        error = relative_error(got.output, plain.output, exact.output)
        if units:
            error = max(error, relative_error(got.value, plain.value, exact.value))
        # A value without mean and std is the activation itself: its sign is known without a rounding, but
        # that float16 rounds what is smallest to 0.
        problem |= {"mean": torch.zeros(units, dtype=dtype), "std": torch.ones(units, dtype=dtype)}
        packed = ops.activation_strength(**problem, bitpack=True)
        positive = packed.value > 0
        for active, expected in ((got.active, positive), (packed.active, pack_bits(positive))):
            if active.shape != expected.shape or active.dtype != expected.dtype:
                error = math.inf
            elif units:
                error = max(error, (active != expected).double().mean().item() / 1e-4)
        yield error


# --- ensemble_embedding --------------------------------------------------------------------------


def check_ensemble_embedding() -> Iterator[float]:
    """One table, and several side by side with numbers: values and gradients in the tables."""
    sizes = random.Random(0)
    values = torch.Generator().manual_seed(0)
    for dtype, members, batch in itertools.product(DTYPES, (1, 40), BATCHES):
        columns = [(sizes.randint(1, 100), sizes.randint(1, 20)) for _ in range(sizes.randint(1, 4))]
        leading = (members, batch) if sizes.random() < 0.5 else (batch,)
        categorical = torch.stack([torch.randint(n, leading, generator=values) for n, _ in columns], -1)
        tables = [torch.randn(members, n, d, generator=values).to(dtype) for n, d in columns]
        numeric = torch.randn(*leading, sizes.randint(1, 30), generator=values).to(dtype)
        sparse = sizes.random() < 0.5

        def single(embedding: Callable[..., Tensor], table: Tensor) -> Tensor:
            return embedding(categorical[..., 0], table, sparse=sparse)  # noqa: B023

        def several(concat: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
            return concat(categorical, leaves[:-1], leaves[-1])  # noqa: B023

        for function, ours, theirs, leaves in (
            (single, ops.ensemble_embedding, reference.ensemble_embedding, tables[:1]),
            (several, ensemble_embedding_concat, reference_concat, [*tables, numeric]),
        ):
            got = _value_and_gradients(function, ours, leaves)
            plain = _value_and_gradients(function, theirs, leaves)
            exact = _value_and_gradients(function, theirs, [t.double() for t in leaves])
            yield max(map(relative_error, got, plain, exact))


def _value_and_gradients(
    function: Callable[..., Tensor], operation: Callable[..., Tensor], tensors: list[Tensor]
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(operation, *leaves)
    gradients = torch.autograd.grad(output.square().sum(), leaves)
    return [output.detach(), *(gradient.to_dense() for gradient in gradients)]


# --- over the member axis ------------------------------------------------------------------------


def _members(
    dtypes: tuple[torch.dtype, ...] = DTYPES, *, classes: tuple[int, ...] = (2, 3, 10, 17, 64, 130)
) -> Iterator[Tensor]:
    """`[E, B, K]` of every dtype with random E and B: members that agree somewhat."""
    sizes = random.Random(0)
    values = torch.Generator().manual_seed(0)
    for dtype, count, _ in itertools.product(dtypes, classes, range(4)):
        members, batch = sizes.randint(2, 40), sizes.randint(8, 100)
        common = torch.randn(batch, count, generator=values)
        yield (common + torch.randn(members, batch, count, generator=values)).to(dtype)


def _components() -> Iterator[tuple[Tensor, str]]:
    """Outputs and a kind of `decorrelation_loss`."""
    return zip(_members(), itertools.cycle(("correlation", "covariance", "residue")), strict=False)


def check_decorrelation_loss() -> Iterator[float]:
    for outputs, kind in _components():
        arguments = {"kind": kind, "reduction": "none"}
        exact = reference.decorrelation_loss(outputs.double(), **arguments)
        plain = reference.decorrelation_loss(outputs, **arguments)
        yield relative_error(ops.decorrelation_loss(outputs, **arguments), plain, exact)


def check_decorrelation_loss_gradients() -> Iterator[float]:
    def gradient(function: Callable[..., Tensor], outputs: Tensor, kind: str) -> Tensor:
        outputs = outputs.detach().requires_grad_()
        return torch.autograd.grad(function(outputs, kind=kind), outputs)[0]

    for outputs, kind in _components():
        exact = gradient(reference.decorrelation_loss, outputs.double(), kind)
        plain = gradient(reference.decorrelation_loss, outputs, kind)
        yield relative_error(gradient(ops.decorrelation_loss, outputs, kind), plain, exact)


def check_predictive_uncertainty() -> Iterator[float]:
    for logits in _members():
        measures = ops.predictive_uncertainty(3 * logits)
        plain = reference.predictive_uncertainty(3 * logits)
        yield max(
            map(relative_error, measures, plain, reference.predictive_uncertainty((3 * logits).double()))
        )


def check_predictive_moments() -> Iterator[float]:
    for outputs in _members():
        variances = outputs.abs()
        moments = ops.predictive_moments(outputs, variances=variances)
        plain = reference.predictive_moments(outputs, variances=variances)
        exact = reference.predictive_moments(outputs.double(), variances=variances.double())
        yield max(map(relative_error, moments, plain, exact))


# --- masksembles ---------------------------------------------------------------------------------


def check_mask_channels() -> Iterator[float]:
    """Values and gradients; what is kept keeps its bits."""
    sizes = random.Random(0)
    values = torch.Generator().manual_seed(0)
    for dtype, batch, inner, indexed in itertools.product(DTYPES, BATCHES, ((), (1,), (5, 7)), (True, False)):
        channels, masks = sizes.randint(1, 100), sizes.randint(1, 8)
        x = torch.randn(batch, channels, *inner, generator=values).to(dtype)
        kept = torch.rand(masks, channels, generator=values) < 0.6
        index = torch.randint(masks, (batch,), generator=values) if indexed else None

        def function(operation: Callable[..., Tensor], x: Tensor) -> Tensor:
            return operation(x, kept, index)  # noqa: B023

        got = _value_and_gradients(function, ops.mask_channels, [x])
        plain = _value_and_gradients(function, reference.mask_channels, [x])
        yield max(map(relative_error, got, plain, [t.double() for t in plain]))


def _masked_problems(dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[dict[str, Any]]:
    """As `_mlp_problems`, of shared weights under masks of all sizes.

    Fewer of them: to the reference each mask is a network of other shapes, slow to set up in half precision.
    """
    sizes = random.Random(0)
    values = torch.Generator().manual_seed(0)
    activations = itertools.cycle(ACTIVATIONS)
    for dtype, batch in itertools.product(dtypes, BATCHES * (8 // len(dtypes))):
        activation, masks = next(activations), sizes.randint(2, 6)
        widths = [sizes.randint(8, 50) for _ in range(sizes.randint(3, 4))]
        layers = list(itertools.pairwise(widths))
        leading = [masks, batch] if sizes.random() < 0.5 else [batch]
        yield {
            "input": torch.randn(*leading, widths[0], generator=values).to(dtype),
            "weights": [(torch.randn(o, i, generator=values) * 1.4 / i**0.5).to(dtype) for i, o in layers],
            "biases": [(torch.randn(o, generator=values) * 0.3).to(dtype) for _, o in layers],
            "masks": [torch.rand(masks, width, generator=values) < 0.5 for width in widths[1:-1]],
            "activation": activation,
        }


def check_masked_mlp() -> Iterator[float]:
    for problem in _masked_problems():
        exact = reference.masked_mlp(**_in_float64(problem))
        yield relative_error(ops.masked_mlp(**problem), reference.masked_mlp(**problem), exact)


def check_masked_mlp_loss() -> Iterator[float]:
    # Gradients too, and so not in half precision, where a rounding flips a ReLU here and there.
    for problem in _masked_problems((torch.float32, torch.float64)):
        leaves = [problem["input"], *problem["weights"], *problem["biases"]]
        layers = len(problem["weights"])
        target = torch.linspace(-1, 1, problem["input"].shape[-2] * len(problem["biases"][-1]))
        target = target.view(problem["input"].shape[-2], -1)

        def function(operation: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
            weights, biases = parameters[:layers], parameters[layers:]  # noqa: B023
            masks, activation = problem["masks"], problem["activation"]  # noqa: B023
            y = target.to(x.dtype)  # noqa: B023
            return operation(x, y, weights, biases, masks, loss="mse", activation=activation)

        got = _value_and_gradients(function, ops.masked_mlp_loss, leaves)
        plain = _value_and_gradients(function, reference.masked_mlp_loss, leaves)
        exact = _value_and_gradients(function, reference.masked_mlp_loss, [t.double() for t in leaves])
        # All in one: a loss for each of a few masks is too little to tell its error from luck.
        yield relative_error(*(torch.cat([t.flatten() for t in ts]) for ts in (got, plain, exact)))


# -------------------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[], Iterator[float]]] = {
    "ensemble_mlp": check_ensemble_mlp,
    "ensemble_mlp, packed": check_ensemble_mlp_packed,
    "ensemble_mlp, gradients": check_ensemble_mlp_gradients,
    "activation_strength": check_activation_strength,
    "ensemble_embedding": check_ensemble_embedding,
    "ensemble_mlp, dropout": check_dropout,
    "ensemble_mlp_loss": check_ensemble_mlp_loss,
    "ensemble_mlp_loss, gradients": check_ensemble_mlp_loss_gradients,
    "decorrelation_loss": check_decorrelation_loss,
    "decorrelation_loss, gradients": check_decorrelation_loss_gradients,
    "predictive_uncertainty": check_predictive_uncertainty,
    "predictive_moments": check_predictive_moments,
    "mask_channels": check_mask_channels,
    "masked_mlp": check_masked_mlp,
    "masked_mlp_loss": check_masked_mlp_loss,
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


def main() -> int:
    print_build()
    print()
    return 0 if self_check() else 1


if __name__ == "__main__":
    sys.exit(main())
