"""What a layer of ensemble_mlp may be beyond sums and an activation: against composed torch.

In every mixture: norms, residuals, activations of each layer, an output activation, places of dropout, chosen
members, biases of some layers; forward, backward and double backward, with the hidden sums kept and computed
again.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyens import reference
from pyens.ops import ensemble_mlp, ensemble_mlp_loss
from pyens.reference.activations import MODULES

ACTIVATIONS = [*MODULES, "elu(0.5)", "celu(0.125)", "celu(2)", "leaky_relu(0.2)", "leaky_relu(-0.5)"]
# Of celu torch forms the derivative with an alpha that is rounded to float32.
SMOOTH = [a for a in ACTIVATIONS if not a.startswith(("relu", "leaky", "hardswish"))]


@dataclass
class Network:
    """Arguments of ensemble_mlp, and which of them are parameters."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    norm_weights: list[Tensor]
    norm_biases: list[Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        return [self.x, *self.weights, *self.biases, *self.norm_weights, *self.norm_biases]

    def call(self, tensors=None, of=ensemble_mlp, **more: Any) -> Tensor:
        x, *rest = self.tensors() if tensors is None else tensors
        lists = []
        for like in (self.weights, self.biases, self.norm_weights, self.norm_biases):
            lists.append(rest[: len(like)])
            rest = rest[len(like) :]
        weights, biases, norm_weights, norm_biases = lists
        given = self.options | more
        if norm_weights or norm_biases:
            given |= {"norm_weights": norm_weights, "norm_biases": norm_biases}
        return of(x, weights, biases, **given)

    def reference(self, tensors=None) -> Tensor:
        return self.call(tensors, reference.ensemble_mlp)

    def to(self, dtype: torch.dtype) -> "Network":
        lists = [
            [t.to(dtype) for t in ts]
            for ts in (self.weights, self.biases, self.norm_weights, self.norm_biases)
        ]
        return Network(self.x.to(dtype), *lists, self.options)

    def requires_grad(self) -> list[Tensor]:
        return [t.detach().clone().requires_grad_() for t in self.tensors()]


def network(
    e: int,
    b: int,
    widths: list[int],
    *,
    activations: list[str] | str = "tanh",
    norms: list[str | None] | str | None = None,
    affine: bool = True,
    own: bool = False,
    no_bias: tuple[int, ...] = (),
    chosen: list[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> Network:
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    layers = list(itertools.pairwise(widths))
    n = e if chosen is None else len(chosen)
    x = randn(*([n] if own else []), b, widths[0])
    weights = [randn(e, o, i) / i**0.5 * 1.4 for i, o in layers]
    biases = [randn(e, 0 if layer in no_bias else o) * 0.3 for layer, (_, o) in enumerate(layers)]
    kinds = norms if isinstance(norms, list) else [norms] * (len(layers) - 1)
    normed = [o for (_, o), kind in zip(layers, kinds, strict=False) if kind is not None]
    norm_weights = [1 + 0.3 * randn(e, o) for o in normed if affine]
    norm_biases = [0.3 * randn(e, o) for o in normed if affine]
    options |= {"activation": activations, "norm": norms}
    if chosen is not None:
        options["members"] = torch.tensor(chosen)
    if "dropout" in options:
        options["dropout_seeds"] = torch.arange(n) * 7919 - 3
    return Network(x, weights, biases, norm_weights, norm_biases, options)


@st.composite
def networks(draw, activations: list[str] = SMOOTH) -> Network:
    e, b = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 5, 8, 9, 17, 33, 70]))
    hidden = draw(st.lists(st.sampled_from([3, 5, 8, 16, 17]), max_size=3))
    if hidden and draw(st.booleans()):  # residuals want equal widths
        hidden = [hidden[0]] * len(hidden)
    widths = [draw(st.sampled_from([1, 3, *hidden[:1]])), *hidden, draw(st.integers(1, 3))]
    h = len(hidden)
    each = draw(st.booleans()) and h > 0
    norm = st.sampled_from(["layer_norm", "rms_norm", None])
    norms = [draw(norm) for _ in hidden] if each else draw(norm)
    has_norm = h > 0 and (any(norms) if isinstance(norms, list) else norms is not None)
    equal = [i == o for i, o in itertools.pairwise(widths[:-1])]
    options: dict[str, Any] = {
        "output_activation": draw(st.sampled_from(["identity", "identity", *activations])),
        "norm_position": draw(st.sampled_from(["before_activation", "after_activation"])),
        "residual": [same and draw(st.booleans()) for same in equal],
    }
    if any(equal) and draw(st.booleans()):
        options["residual"] = True
    # Of a few features that are nearly the same, a norm with a small one magnifies every rounding.
    options["norm_eps"] = draw(st.sampled_from([0.02, 0.1]))
    chosen = draw(st.none() | st.lists(st.integers(0, e - 1), min_size=1, max_size=5))
    n = e if chosen is None else len(chosen)
    if draw(st.booleans()):
        rate = st.sampled_from([0.0, 0.25, 0.5])
        options["dropout"] = draw(
            st.sampled_from([0.0, 0.3])
            | st.lists(rate, min_size=n, max_size=n)
            | st.lists(st.lists(rate, min_size=h, max_size=h), min_size=n, max_size=n)
            | st.lists(st.lists(rate, min_size=h, max_size=h), min_size=1, max_size=1)
        )
        if has_norm and draw(st.booleans()):
            options["dropout_position"] = "before_norm"
    of_layers = [draw(st.sampled_from(activations)) for _ in hidden]
    return network(
        e,
        b,
        widths,
        activations=of_layers if each else draw(st.sampled_from(activations)),
        norms=norms,
        affine=draw(st.booleans()),
        own=draw(st.booleans()),
        no_bias=tuple(layer for layer in range(len(widths) - 1) if draw(st.integers(0, 3)) == 0),
        chosen=chosen,
        seed=draw(st.integers(0, 2**20)),
        **options,
    )


def gradients(of: Network, tensors: list[Tensor], output: Tensor, create_graph: bool = False) -> list[Tensor]:
    above = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad(
        output,
        tensors,
        above.to(output.dtype),
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    scale = expected.abs().max().item() + 1 if expected.numel() else 1
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=tolerance * scale)


# --- every mixture -----------------------------------------------------------------------------------------


@given(networks(), st.booleans())
def test_any_mixture_matches_composed_torch(of, save_hidden):
    ours, theirs = of.requires_grad(), of.requires_grad()
    got, expected = of.call(ours, save_hidden=save_hidden), of.reference(theirs)
    assert_near(got, expected, 1e-11)
    assert torch.equal(got, of.call())  # without a gradient, the same bits
    for one, other in zip(gradients(of, ours, got), gradients(of, theirs, expected), strict=True):
        assert_near(one, other, 1e-9)


@given(networks(ACTIVATIONS), st.booleans())
def test_any_mixture_in_float32(of, save_hidden):
    single = of.to(torch.float32)
    got = single.call(save_hidden=save_hidden)
    expected = single.to(torch.float64).reference()
    assert_near(got, expected, 2e-5)


@given(networks())
def test_second_derivatives_of_any_mixture(of):
    ours, theirs = of.requires_grad(), of.requires_grad()
    first = gradients(of, ours, of.call(ours), create_graph=True)
    second = gradients(of, theirs, of.reference(theirs), create_graph=True)
    sums = [sum((g.square().sum() for g in found), torch.zeros(())) for found in (first, second)]
    found = [
        torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)
        for total, tensors in zip(sums, (ours, theirs), strict=True)
    ]
    for one, other in zip(*found, strict=True):
        assert_near(one, other, 1e-8)


@given(networks(), st.sampled_from(["mse", "bce", "cross_entropy"]), st.sampled_from([None, 0, 1]))
def test_the_loss_of_any_mixture(of, loss, weighted):
    out, b, n = of.weights[-1].shape[1], of.x.shape[-2], of.call().shape[0]
    draw = torch.Generator().manual_seed(2)
    if loss == "cross_entropy":
        target = torch.randint(out, (b,), generator=draw)
    else:
        target = torch.rand(b, out, generator=draw, dtype=torch.float64)
    weight = None
    if weighted is not None:
        weight = torch.rand(*([n] if weighted else []), b, generator=draw, dtype=torch.float64)
        weight = torch.where(weight < 0.3, 0, weight)

    def run(tensors, of_loss, **more):
        def call(x, weights, biases, **given):
            return of_loss(x, target, weights, biases, loss=loss, sample_weight=weight, **given)

        return of.call(tensors, call, **more)

    ours, theirs = of.requires_grad(), of.requires_grad()
    got, expected = run(ours, ensemble_mlp_loss), run(theirs, reference.ensemble_mlp_loss)
    assert_near(got, expected, 1e-11)
    assert torch.equal(got, run(None, ensemble_mlp_loss))
    for one, other in zip(gradients(of, ours, got), gradients(of, theirs, expected), strict=True):
        assert_near(one, other, 1e-9)
