"""The ensembles that the tests of pyens.nn are made with, and what they compare."""

import itertools

import pytest
import torch
from torch import nn

from pyens import EnsembleLinear, EnsembleMLP

KINDS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WIDTHS = [6, 9, 5, 3]


def sequential(widths=WIDTHS, activation=nn.ReLU, bias=True, dtype=None) -> nn.Sequential:
    """A member as a user of torch writes it."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, bias=bias, dtype=dtype), activation()]
    return nn.Sequential(*layers[:-1])


def mlp(ensemble_size=4, widths=WIDTHS, **kwargs) -> EnsembleMLP:
    return EnsembleMLP(ensemble_size, widths[0], widths[1:-1], widths[-1], **kwargs)


def make(kind: str, **kwargs) -> EnsembleLinear | EnsembleMLP:
    return EnsembleLinear(4, 6, 3, **kwargs) if kind == "linear" else mlp(**kwargs)


def assert_same_state(got: nn.Module, expected: nn.Module) -> None:
    got_state, expected_state = got.state_dict(), expected.state_dict()
    assert list(got_state) == list(expected_state) and len(got_state) > 0
    for name, tensor in expected_state.items():
        assert got_state[name].dtype == tensor.dtype and torch.equal(got_state[name], tensor), name


def assert_member_is(model: EnsembleMLP | EnsembleLinear, i: int, module: nn.Module) -> None:
    """Member i has the bits of `module`."""
    weights, biases = model.stacked()
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    assert len(linears) == len(weights)
    for layer, linear in enumerate(linears):
        assert torch.equal(weights[layer][i].cpu(), linear.weight.to(weights[layer].dtype))
        if linear.bias is None:
            assert len(biases) == 0
        else:
            assert torch.equal(biases[layer][i].cpu(), linear.bias.to(biases[layer].dtype))


def assert_computes(packed: nn.Module, model: EnsembleMLP) -> None:
    """Small batches, which read the packed weights, and large ones, which read the others."""
    assert_same_state(packed, model)
    for b in (1, 40):
        x = torch.randn(b, 6).to(model.weights[0].dtype)
        assert torch.equal(packed(x), model(x))


kinds = pytest.mark.parametrize("kind", ["linear", "mlp"])
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
