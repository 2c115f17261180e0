"""A small call of every operation that has a CUDA kernel, forward and, where there is one, backward.

`python -m tests.cuda_operations` runs all of them once on the GPU, or those of the dtypes that are named: for
compute-sanitizer.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyens import ops
from pyens.ops.ensemble_embedding import ensemble_embedding_concat
from pyens.ops.masked_mlp import plan_masks

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
E, B, WIDTHS = 3, 70, (13, 17, 9, 4)
WIDE = (13, 520, 400, 4)  # a member's weights are more than a block's shared memory in every dtype

Operation = Callable[[], Sequence[Tensor]]


def operations(
    dtype: torch.dtype, device: torch.device | str, wrap: Callable[[Callable], Callable] = lambda call: call
) -> dict[str, Operation]:
    """By name, calls that return all that the operation computes from the same arguments each time.

    `wrap`, `torch.compile` for example, is applied to each forward pass.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    def draw_integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator).to(device)

    x = draw(B, WIDTHS[0])
    weights = [draw(E, o, i, scale=i**-0.5) for i, o in itertools.pairwise(WIDTHS)]
    biases = [draw(E, o, scale=0.3) for o in WIDTHS[1:]]
    outputs, seeds = draw(E, B, WIDTHS[-1]), draw_integers(99, E)
    rates = torch.tensor([0.3, 0.0, 0.6], dtype=torch.float64, device=device)
    labels, units = draw_integers(WIDTHS[-1], B), sum(WIDTHS[1:-1])
    real = torch.float64 if dtype == torch.float64 else torch.float32
    mean, std = torch.zeros(units, device=device, dtype=real), torch.ones(units, device=device, dtype=real)
    index, tables = draw_integers(7, E, B, 2), [draw(E, 7, 3), draw(E, 90, 5)]
    numeric, maps = draw(B, 4), draw(B, 12, 5)
    masks = torch.rand(E, 12, generator=generator).gt(0.4).to(device)
    plan = plan_masks([masks])  # reads the masks' values: neither a graph nor a compiler takes that in
    mlp = [x, *weights, *biases]
    wide = [draw(E, o, i, scale=i**-0.5) for i, o in itertools.pairwise(WIDE)]
    wide_biases = [draw(E, o, scale=0.3) for o in WIDE[1:]]
    wide_mlp = [x, *wide, *wide_biases]
    wide_units = torch.linspace(-0.5, 0.5, sum(WIDE[1:-1]), device=device, dtype=real)

    def with_gradients(function: Callable[..., Tensor], leaves: list[Tensor]) -> Operation:
        forward = wrap(function)

        def run() -> Sequence[Tensor]:
            fresh = [leaf.detach().requires_grad_() for leaf in leaves]
            result = forward(*fresh)
            return [result.detach(), *torch.autograd.grad(result.square().sum(), fresh)]

        return run

    def of_mlp(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        n = len(weights)
        return lambda x, *rest: function(x, list(rest[:n]), list(rest[n:]))

    def loss(x: Tensor, w: list[Tensor], b: list[Tensor]) -> Tensor:
        return ops.ensemble_mlp_loss(x, labels, w, b, loss="cross_entropy", label_smoothing=0.1)

    def dropped(x: Tensor, w: list[Tensor], b: list[Tensor]) -> Tensor:
        return ops.ensemble_mlp(x, w, b, dropout=0.3, dropout_seeds=seeds)

    def dropped_each(x: Tensor, w: list[Tensor], b: list[Tensor]) -> Tensor:
        return ops.ensemble_mlp(x, w, b, dropout=rates, dropout_seeds=seeds)

    def layered(x: Tensor, w: list[Tensor], b: list[Tensor]) -> Tensor:
        widths = [one.shape[1] for one in w[:-1]]
        norms = [torch.full((E, width), 0.9, device=device, dtype=dtype) for width in widths]
        return ops.ensemble_mlp(
            x,
            w,
            b,
            activation=["mish", "celu(0.5)"],
            output_activation="tanh",
            norm="layer_norm",
            norm_weights=norms,
            residual=[i == o for i, o in itertools.pairwise([x.shape[-1], *widths])],
            dropout=[[0.2, 0.4]],
            dropout_seeds=seeds,
            dropout_position="before_norm",
            members=torch.tensor([2, 0, 2], device=device),
        )

    def smooth(x: Tensor, w: list[Tensor], b: list[Tensor]) -> Tensor:  # no ReLU to flip
        return ops.ensemble_mlp(x, w, b, activation="gelu")

    def smooth_dropped(x: Tensor, w: list[Tensor], b: list[Tensor]) -> Tensor:
        return ops.ensemble_mlp(x, w, b, activation="gelu", dropout=rates, dropout_seeds=seeds)

    def smooth_loss(x: Tensor, w: list[Tensor], b: list[Tensor]) -> Tensor:
        return ops.ensemble_mlp_loss(
            x, labels, w, b, loss="cross_entropy", label_smoothing=0.1, activation="gelu"
        )

    def loss_with(loss: str, *y: Tensor, **options: Any) -> Callable[..., Tensor]:
        return lambda x, w, b: ops.ensemble_mlp_loss(x, *y, w, b, loss=loss, **options)

    four, two = 2 * x[:, :4].detach().abs(), x[:, :2].detach()
    shares = four / four.sum(1, keepdim=True)
    each = torch.tensor([0.5, 2.0, 0.0, 1.0], device=device, dtype=real)
    with_options = {
        "huber": loss_with("huber", four, delta=0.5),
        "smooth_l1": loss_with("smooth_l1", four, delta=0.5),
        "quantile": loss_with("quantile", two, quantiles=[0.25, 0.75]),
        "poisson_nll": loss_with("poisson_nll", four),
        "soft_cross_entropy": loss_with("soft_cross_entropy", shares, temperature=0.5),
        "gaussian_nll": loss_with("gaussian_nll", two, log_variance_min=-2.0, log_variance_max=0.5),
        "class_weight": loss_with("cross_entropy", labels, class_weight=each, label_smoothing=0.1),
        "examples": loss_with("cross_entropy", labels, class_weight=each, reduction="none"),
    }

    def wide_strength(pack: bool) -> Operation:
        return wrap(
            lambda: ops.activation_strength(
                x, wide, wide_biases, wide_units, wide_units + 1, activation="gelu", bitpack=pack
            )
        )

    return {
        "ensemble_mlp": with_gradients(of_mlp(ops.ensemble_mlp), mlp),
        "ensemble_mlp, wide": with_gradients(of_mlp(smooth), wide_mlp),
        "ensemble_mlp, wide, dropout": with_gradients(of_mlp(smooth_dropped), wide_mlp),
        "ensemble_mlp_loss, wide": with_gradients(of_mlp(smooth_loss), wide_mlp),
        "activation_strength, wide": wide_strength(False),
        "activation_strength, wide, packed": wide_strength(True),
        "ensemble_mlp, dropout": with_gradients(of_mlp(dropped), mlp),
        "ensemble_mlp, dropout of each member": with_gradients(of_mlp(dropped_each), mlp),
        "ensemble_mlp, layers": with_gradients(of_mlp(layered), mlp),
        "ensemble_mlp, wide, layers": with_gradients(of_mlp(layered), wide_mlp),
        "ensemble_mlp_loss": with_gradients(of_mlp(loss), mlp),
        **{
            f"ensemble_mlp_loss, {name}": with_gradients(of_mlp(function), mlp)
            for name, function in with_options.items()
        },
        "activation_strength": wrap(lambda: ops.activation_strength(x, weights, biases, mean, std)),
        "activation_strength, packed": wrap(
            lambda: ops.activation_strength(x, weights, biases, mean, std, bitpack=True)
        ),
        "ensemble_embedding": with_gradients(
            lambda a, b, c: ensemble_embedding_concat(index, [a, b], c), [*tables, numeric]
        ),
        "ensemble_conv2d": with_gradients(
            lambda m, w: ops.ensemble_conv2d(m, w, padding=1, activation="relu", max_pool=2),
            [draw(B, 3, 6, 5), draw(3, 4, 3, 2, 2)],
        ),
        "keyed_permutation": wrap(lambda: ops.keyed_permutation(index[:, 0, 0], 10**6, 5, 70)),
        "mask_channels": with_gradients(lambda m: ops.mask_channels(m, masks), [maps]),
        "masked_mlp": with_gradients(
            lambda x, v, w: ops.masked_mlp(x, [v, w], None, [masks], plan=plan),
            [x, draw(12, WIDTHS[0]), draw(4, 12)],
        ),
        "masked_mlp_loss": with_gradients(
            lambda x, v, w: ops.masked_mlp_loss(
                x, labels, [v, w], None, [masks], loss="cross_entropy", plan=plan
            ),
            [x, draw(12, WIDTHS[0]), draw(4, 12)],
        ),
        "decorrelation_loss": with_gradients(lambda z: ops.decorrelation_loss(z, kind="residue"), [outputs]),
        "predictive_uncertainty": wrap(lambda: ops.predictive_uncertainty(outputs)),
        "predictive_moments": wrap(lambda: ops.predictive_moments(outputs, variances=outputs.square())),
    }


def main(names: Sequence[str]) -> None:
    for dtype in [getattr(torch, name) for name in names] or DTYPES:
        for name, run in operations(dtype, "cuda").items():
            run()
            torch.cuda.synchronize()
            print(f"{dtype}: {name}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
