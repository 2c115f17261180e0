"""pyens.EnsembleMLP.from_stacked: weights that are stacked over the members, in either layout."""

import itertools

import pytest
import torch
from nn_models import assert_same_state, dtypes, mlp
from torch import Tensor

from pyens import EnsembleMLP

E = 3


def tensors(
    widths=(5, 7, 4, 2), layout="out_in", bias="flat", **options
) -> tuple[list[Tensor], list[Tensor]]:
    pairs = list(itertools.pairwise(widths))
    weights = [torch.randn((E, o, i) if layout == "out_in" else (E, i, o), **options) for i, o in pairs]
    shapes = {"flat": [(E, o) for _, o in pairs], "row": [(E, 1, o) for _, o in pairs], "none": []}[bias]
    return weights, [torch.randn(shape, **options) for shape in shapes]


def by_hand(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """An ensemble as its users write it: products of batches, weights `[E, in, out]`."""
    for layer, weight in enumerate(weights):
        x = (x.tanh() if layer else x) @ weight
        x = x + biases[layer].reshape(E, 1, -1) if biases else x
    return x


@pytest.mark.parametrize("bias", ["flat", "row", "none"])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("given", [True, False], ids=["given", "from the shapes"])
def test_computes_what_its_users_compute(layout, bias, given):
    weights, biases = tensors(layout=layout, bias=bias, dtype=torch.float64)
    x = torch.randn(6, 5, dtype=torch.float64)
    model = EnsembleMLP.from_stacked(weights, biases, layout if given else None, activation="tanh")
    turned = weights if layout == "in_out" else [w.mT for w in weights]
    torch.testing.assert_close(model(x), by_hand(x, turned, biases), rtol=1e-12, atol=1e-12)
    assert model.hidden_features == (7, 4) and len(model.biases) == len(biases)
    assert all(p.is_contiguous() and p.requires_grad and p.is_leaf for p in model.parameters())


@dtypes
def test_is_a_copy_bit_for_bit(dtype):
    model = mlp(dtype=dtype)
    turned = [w.mT for w in model.weights]
    again = EnsembleMLP.from_stacked(turned, model.biases, "in_out")
    assert_same_state(again, model)
    assert_same_state(EnsembleMLP.from_stacked(model.weights, model.biases), model)
    again(torch.randn(3, 6).to(dtype)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    assert all((p != 0).any() for p in model.parameters())


def test_biases_tell_the_layout_of_one_layer():
    weight = torch.randn(E, 4, 6)
    assert EnsembleMLP.from_stacked([weight], [torch.randn(E, 6)]).out_features == 6
    assert EnsembleMLP.from_stacked([weight], [torch.randn(E, 1, 4)]).out_features == 4
    with pytest.raises(ValueError, match=r"from_stacked: layout: expected .* where the shapes fit both; got"):
        EnsembleMLP.from_stacked([weight])
    assert EnsembleMLP.from_stacked([weight], layout="in_out").out_features == 6


def test_square_layers_need_a_layout():
    weights, biases = tensors((4, 4, 4))
    with pytest.raises(ValueError, match=r"from_stacked: layout: expected out_in \(.* the shapes fit both"):
        EnsembleMLP.from_stacked(weights, biases)
    x = torch.randn(5, 4)
    one = EnsembleMLP.from_stacked(weights, biases, layout="out_in")
    other = EnsembleMLP.from_stacked([w.mT for w in weights], biases, layout="in_out")
    assert torch.equal(one(x), other(x))


def refused(case: str):
    weights, biases = tensors()
    if case == "layout":
        return (
            weights,
            biases,
            "in_out",
            ValueError,
            (r"layout: expected out_in, which the shapes of the weights \[\[3, 7, 5\], .*\] fit, got in_out"),
        )
    if case == "unknown layout":
        return weights, biases, "io", ValueError, r"layout: expected out_in, in_out or None, got 'io'"
    if case == "widths":
        weights[1] = torch.randn(E, 4, 6)
        return (
            weights,
            biases,
            None,
            ValueError,
            (r"weights\[1\]: expected \[3, out, 7\], got shape \[3, 4, 6\]"),
        )
    if case == "members":
        weights[2] = torch.randn(2, 2, 4)
        return (
            weights,
            biases,
            None,
            ValueError,
            r"weights\[2\]: expected \[3, out, 4\], got shape \[2, 2, 4\]",
        )
    if case == "a bias":
        biases[1] = torch.randn(E, 7)
        return weights, biases, None, ValueError, r"biases\[1\]: expected shape \[3, 4\], got shape \[3, 7\]"
    if case == "number of biases":
        return weights, biases[:2], None, ValueError, r"biases: expected none or 3, got 2"
    if case == "rank":
        return (
            [weights[0][0]],
            None,
            None,
            ValueError,
            r"weights\[0\]: expected \[E, out, in\], got shape \[7, 5\]",
        )
    if case == "none":
        return [], None, None, ValueError, r"weights: expected at least one, got none"
    if case == "dtypes":
        turned = [w.mT for w in weights]
        return (
            [turned[0].double(), *turned[1:]],
            biases,
            None,
            TypeError,
            (r"weights\[1\]: expected torch.float64 on cpu like weights\[0\], got torch.float32 on cpu"),
        )
    return (
        weights[0],
        biases,
        None,
        TypeError,
        r"weights: expected a list of tensors, got one tensor of shape",
    )


@pytest.mark.parametrize(
    "case",
    [
        "layout",
        "unknown layout",
        "widths",
        "members",
        "a bias",
        "number of biases",
        "rank",
        "none",
        "dtypes",
        "a tensor",
    ],
)
def test_refuses(case):
    weights, biases, layout, error, message = refused(case)
    with pytest.raises(error, match="^from_stacked: " + message):
        EnsembleMLP.from_stacked(weights, biases, layout)
