"""Batches of no examples, through every operation and every option: none may end the process."""

import pytest
import torch
from torch import Tensor

from pyens import ops
from pyens.nn import EnsembleMLP
from pyens.ops.masked_mlp import masked_mlp, masked_mlp_loss

SEEDS = torch.arange(3)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ACTIVATIONS = ["relu", "gelu", "silu", "elu", "softplus", "tanh", "identity"]
TARGETS = {
    "mse": (4,),
    "bce": (4,),
    "gaussian_nll": (2,),
    "cross_entropy": (),
    "huber": (4,),
    "smooth_l1": (4,),
    "quantile": (2,),
    "poisson_nll": (4,),
    "soft_cross_entropy": (4,),
}


def layers(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    widths = [(5, 3), (4, 5)]
    weights = [torch.randn(3, *width).to(dtype).requires_grad_() for width in widths]
    return weights, [torch.randn(3, out).to(dtype).requires_grad_() for out, _ in widths]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_member", [False, True])
def test_ensemble_mlp(dtype: torch.dtype, activation: str, dropout: float, per_member: bool) -> None:
    weights, biases = layers(dtype)
    x = torch.zeros((3, 0, 3) if per_member else (0, 3), dtype=dtype, requires_grad=True)
    options = {"activation": activation, "dropout": dropout, "dropout_seeds": SEEDS if dropout else None}
    output = ops.ensemble_mlp(x, weights, biases, **options)
    assert output.shape == (3, 0, 4)
    grads = torch.autograd.grad(output.sum(), [x, *weights, *biases], create_graph=True)
    for grad, of in zip(grads, [x, *weights, *biases], strict=True):
        assert torch.equal(grad, torch.zeros_like(of))
    second = torch.autograd.grad(sum(g.sum() for g in grads), weights, allow_unused=True)
    assert all(g is None or torch.equal(g, torch.zeros_like(g)) for g in second)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("loss", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ensemble_mlp_loss(dtype: torch.dtype, loss: str, dropout: float, weighted: bool) -> None:
    weights, biases = layers(dtype)
    x = torch.zeros(0, 3, dtype=dtype)
    target = torch.zeros(0, *TARGETS[loss], dtype=torch.int64 if loss == "cross_entropy" else dtype)
    found = ops.ensemble_mlp_loss(
        x,
        target,
        weights,
        biases,
        loss=loss,
        quantiles=[0.25, 0.5] if loss == "quantile" else None,
        dropout=dropout,
        dropout_seeds=SEEDS if dropout else None,
        sample_weight=torch.zeros(0) if weighted and dtype != torch.float64 else None,
    )
    assert torch.equal(found, torch.zeros(3, dtype=found.dtype))
    grads = torch.autograd.grad(found.sum(), [*weights, *biases], create_graph=True)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_within_vmap_compiled_and_through_a_module(activation: str) -> None:
    weights, biases = layers(torch.float32)

    def with_seeds(seeds: Tensor) -> Tensor:
        return ops.ensemble_mlp(
            torch.zeros(0, 3), weights, biases, activation=activation, dropout=0.5, dropout_seeds=seeds
        )

    assert torch.func.vmap(with_seeds)(SEEDS.repeat(2, 1)).shape == (2, 3, 0, 4)
    assert torch.compile(with_seeds, fullgraph=True)(SEEDS).shape == (3, 0, 4)
    model = EnsembleMLP(3, 3, [5], 4, activation=activation)
    assert model(torch.zeros(0, 3)).shape == (3, 0, 4)
    assert model.packed()(torch.zeros(0, 3)).shape == (3, 0, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_other_operations(dtype: torch.dtype) -> None:
    weights, biases = layers(dtype)
    x = torch.zeros(0, 3, dtype=dtype)
    strength = ops.activation_strength(x, weights, biases, torch.zeros(5).to(dtype), torch.ones(5).to(dtype))
    assert strength.value.shape == (3, 0, 5)

    masks = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
    shared = [w[0].detach().requires_grad_() for w in weights]
    assert masked_mlp(x, shared, None, [masks]).shape == (2, 0, 4)
    target = torch.zeros(0, 4, dtype=dtype)
    masked_mlp_loss(x, target, shared, None, [masks], loss="mse").sum().backward()
    assert all(torch.equal(w.grad, torch.zeros_like(w)) for w in shared)
    assert ops.mask_channels(torch.zeros(0, 5, 2, dtype=dtype), masks).shape == (0, 5, 2)

    table = torch.randn(3, 7, 2).to(dtype).requires_grad_()
    rows = ops.ensemble_embedding(torch.zeros(0, dtype=torch.int64), table)
    rows.sum().backward()
    assert rows.shape == (3, 0, 2)
    assert torch.equal(table.grad, torch.zeros_like(table))

    assert ops.predictive_uncertainty(torch.zeros(3, 0, 4, dtype=dtype)).mean_probability.shape == (0, 4)
    assert ops.predictive_moments(torch.zeros(3, 0, dtype=dtype)).mean.shape == (0,)
    for kind in ("correlation", "covariance", "residue"):
        outputs = torch.zeros(1, 0, 4, dtype=dtype, requires_grad=True)
        ops.decorrelation_loss(outputs, kind=kind).backward()
        assert outputs.grad.shape == (1, 0, 4)
