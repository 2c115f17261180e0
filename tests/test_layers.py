"""What a layer of ensemble_mlp may be beyond sums and an activation: against composed torch.

In every mixture: norms, residuals, activations of each layer, an output activation, places of dropout, chosen
members, biases of some layers; forward, backward and double backward, with the hidden sums kept and computed
again.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loss_problems import NO_OPTIONS
from torch import Tensor

from pyens import reference
from pyens.ops import ensemble_mlp, ensemble_mlp_loss
from pyens.reference.activations import MODULES, activation_module

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


# --- every mixture ---------------------------------------------------------------------------------------


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


# --- promises ----------------------------------------------------------------------------------------------

RICH = {
    "norm": "layer_norm",
    "residual": [False, True],
    "output_activation": "sigmoid",
    "dropout": [[0.25, 0.5]],
    "dropout_position": "before_norm",
}


def rich(e=3, b=40, dtype=torch.float32, **options) -> Network:
    options = RICH | {"activations": ["elu(0.5)", "mish"]} | options
    norms = options.pop("norm")
    return network(e, b, [6, 17, 17, 3], norms=norms, **options).to(dtype)


PLAIN = {"dropout": 0.0, "norm": None, "residual": False, "dropout_position": "after_activation"}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("position", ["before_activation", "after_activation"])
def test_no_worse_than_plain_pytorch_in_the_same_dtype(dtype, own, position):
    of = rich(b=130, dtype=dtype, own=own, norm_position=position)
    exact, plain, got = of.to(torch.float64).reference(), of.reference(), of.call()
    rms = [(x.double() - exact).square().mean().sqrt().item() for x in (got, plain)]
    rounding = torch.finfo(dtype).eps * exact.square().mean().sqrt().item()
    assert got.dtype == dtype and rms[0] <= 2 * rms[1] + (16 if dtype == torch.float64 else 1) * rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", [1, 7, 8, 9, 63, 64, 65, 257])
def test_kept_sums_change_no_bit(dtype, b):
    for options in ({}, PLAIN):
        of = rich(b=b, dtype=dtype, **options)
        found = []
        for keeps in (True, False, "auto"):
            tensors = of.requires_grad()
            output = of.call(tensors, save_hidden=keeps)
            found.append([output.detach(), *gradients(of, tensors, output)])
        for kept, computed, auto in zip(*found, strict=True):
            assert torch.equal(kept, computed) and torch.equal(kept, auto)


def test_same_bits_for_any_threads_and_members_beside():
    of = rich(e=5, b=300, own=True, dropout=0.25, dropout_seeds=torch.arange(5))
    of.options["dropout_seeds"] = torch.arange(5)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            tensors = of.requires_grad()
            found.append([of.call(tensors), *gradients(of, tensors, of.call(tensors))])
    finally:
        torch.set_num_threads(threads)
    for others in zip(*found, strict=True):
        assert all(torch.equal(others[0], other) for other in others)
    alone = Network(
        of.x[3:4], *([t[3:4] for t in ts] for ts in (of.weights, of.biases, of.norm_weights, of.norm_biases))
    )
    alone.options = of.options | {"dropout_seeds": torch.tensor([3])}
    assert torch.equal(alone.call()[0], of.call()[3])


def test_same_bits_for_any_split_of_the_batch():
    of = rich(b=200, dropout=0.0, dropout_position="after_activation")
    whole = of.call()
    for size in (1, 7, 8, 64, 100):
        for first in range(0, 200, size):
            part = Network(of.x[first : first + size], of.weights, of.biases, of.norm_weights, of.norm_biases)
            part.options = of.options
            assert torch.equal(part.call(), whole[:, first : first + size])


@pytest.mark.parametrize("b", [1, 5, 40])
def test_chosen_members_are_those_of_all_and_their_gradients_add_up(b):
    for options in ({}, PLAIN):
        of = rich(e=4, b=b, **options)
        if "dropout_seeds" in of.options:
            of.options["dropout_seeds"] = torch.arange(4)
        chosen = torch.tensor([2, 0, 2])
        of_chosen = dict(of.options)
        if "dropout_seeds" in of_chosen:
            of_chosen["dropout_seeds"] = of.options["dropout_seeds"][chosen]
        ours, theirs = of.requires_grad(), of.requires_grad()
        whole = of.call(theirs)
        of.options = of_chosen | {"members": chosen}
        got = of.call(ours)
        assert torch.equal(got, whole[chosen])
        above = torch.randn(got.shape)
        for one, other in zip(
            torch.autograd.grad(got, ours, above, retain_graph=True),
            torch.autograd.grad(whole[chosen], theirs, above),
            strict=True,
        ):
            torch.testing.assert_close(one, other)
        # Nothing of the others, and no NaN from them.
        for t in ours[1:]:
            with torch.no_grad():
                t[1] = float("nan")
        assert torch.equal(of.call(ours), got)
        for gradient in torch.autograd.grad(of.call(ours), ours[1:], above):
            assert gradient.shape[0] == 4 and not gradient[[1, 3]].any() and gradient.isfinite().all()


def test_what_is_kept_is_bounded_and_only_where_it_pays():
    wide = network(2, 64, [64, 64, 64, 1]).to(torch.float32)
    bytes_before = 2 * 64 * 128 * 4
    for keeps, most in ((False, 0), (True, bytes_before), ("auto", bytes_before)):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, f=found: f.append(t.numel()) or t, lambda t: t
        ):
            wide.call(wide.requires_grad(), save_hidden=keeps)
        assert (most // 4 in found) == bool(most)


@pytest.mark.parametrize("activation", [*ACTIVATIONS])
def test_output_activations_and_their_derivatives(activation):
    if activation == "sin":
        x = torch.randn(30, 1, dtype=torch.float64) * 1e3
    else:
        x = torch.linspace(-6, 6, 101, dtype=torch.float64).unsqueeze(1)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        given = x.to(dtype).requires_grad_()
        got = ensemble_mlp(given, [one.to(dtype)], output_activation=activation)[0]
        reference_given = given.detach().double().requires_grad_()
        expected = activation_module(activation)(reference_given)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
        (slope,) = torch.autograd.grad(got.sum(), given)
        (exact,) = torch.autograd.grad(expected.sum(), reference_given)
        torch.testing.assert_close(slope.double(), exact, rtol=4 * tolerance, atol=4 * tolerance)


def test_a_norm_is_that_of_torch():
    x, weight, bias = torch.randn(3, 9, 8), torch.randn(3, 8), torch.randn(3, 8)
    eye = torch.eye(8).expand(3, 8, 8).contiguous()
    layers = ensemble_mlp(
        x, [eye, eye], activation="identity", norm="layer_norm", norm_weights=[weight], norm_biases=[bias]
    )
    rms = ensemble_mlp(x, [eye, eye], activation="identity", norm="rms_norm", norm_weights=[weight])
    for m in range(3):
        torch.testing.assert_close(layers[m], F.layer_norm(x[m], (8,), weight[m], bias[m]))
        torch.testing.assert_close(rms[m], F.rms_norm(x[m], (8,), weight[m]))


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e15])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_norms_at_the_ends_of_the_range(norm, offset, scale):
    x = (torch.randn(40, 16) + offset) * scale
    eye = torch.eye(16).unsqueeze(0)
    for dtype, tolerance in (
        (torch.float32, 1e-3 if offset and norm == "layer_norm" else 1e-5),
        (torch.float64, 1e-9),
    ):
        given = x.to(dtype)
        got = ensemble_mlp(given, [eye.to(dtype)] * 2, activation="identity", norm=norm, norm_eps=1e-5)
        expected = reference.ensemble_mlp(
            given.double(), [eye.double()] * 2, activation="identity", norm=norm, norm_eps=1e-5
        )
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_nan_and_inf_stay_in_their_example_and_member():
    of = rich(e=3, b=20, own=True, dropout=0.0, dropout_position="after_activation")
    clean = of.call()
    for bad in (float("nan"), float("inf"), -float("inf")):
        of.x[1, 4, 2] = bad
        got = of.call()
        changed = ~((got == clean) | (got.isnan() & clean.isnan()))
        assert changed[1, 4].any() and changed.sum() <= 3 and not changed[0].any()
        tensors = of.requires_grad()
        for gradient in gradients(of, tensors, of.call(tensors))[1:]:
            assert gradient[[0, 2]].isfinite().all()


# --- derivatives, compilers, torch.func --------------------------------------------------------------------


@pytest.mark.parametrize("norm", [None, "layer_norm", "rms_norm"])
@pytest.mark.parametrize("position", ["before_activation", "after_activation"])
@pytest.mark.parametrize("members", [None, [1, 1, 0]])
def test_gradcheck_and_gradgradcheck(norm, position, members):
    of = network(
        2,
        3,
        [2, 4, 4, 2],
        activations=["mish", "silu"],
        norms=norm,
        residual=[False, True],
        output_activation="tanh",
        norm_position=position,
        norm_eps=0.1,
        chosen=members,
    )
    function = lambda *tensors: of.call(tensors)  # noqa: E731
    assert torch.autograd.gradcheck(function, of.requires_grad())
    assert torch.autograd.gradgradcheck(function, of.requires_grad(), fast_mode=True)


def dispatcher_arguments(of: Network, *options) -> tuple:
    return (of.x, of.weights, of.biases, of.norm_weights, of.norm_biases, *options)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    of = rich(e=3, b=9)
    if requires_grad:
        for t in of.tensors():
            t.requires_grad_()
    seeds, rates = torch.arange(2), torch.tensor([[0.25, 0.5]], dtype=torch.float64)
    members = torch.tensor([2, 0])
    layers = ("elu(0.5), mish", 0.0, seeds, rates, True, "sigmoid", "layer_norm", 1e-5, False, "01", members)
    for keeps in (None, True, False):
        torch.library.opcheck(torch.ops.pyens.ensemble_mlp, dispatcher_arguments(of, *layers, keeps))
    target = torch.rand(9, 3)
    loss = ("mse", 1.0, 0.0, None, *NO_OPTIONS)
    given = (of.x, target, of.weights, of.biases, of.norm_weights, of.norm_biases, *loss, *layers)
    torch.library.opcheck(torch.ops.pyens.ensemble_mlp_loss, given)
    if requires_grad:
        return
    torch.library.opcheck(torch.ops.pyens.ensemble_mlp_keeping, dispatcher_arguments(of, *layers))
    _, kept = torch.ops.pyens.ensemble_mlp_keeping(*dispatcher_arguments(of, *layers))
    for saved in (kept, None):
        torch.library.opcheck(
            torch.ops.pyens.ensemble_mlp_backward,
            (torch.randn(2, 9, 3), *dispatcher_arguments(of, saved, [True] * 11, *layers)),
        )


def test_compiled_without_graph_breaks_or_many_recompilations():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    of = rich(e=3, b=9)
    compiled = torch.compile(lambda *tensors: of.call(tensors).square(), fullgraph=True, backend=counter)
    for b in (9, 12, 33, 64, 100):
        of.x = torch.randn(b, 6)
        ours, theirs = of.requires_grad(), of.requires_grad()
        got, expected = compiled(*ours), of.call(theirs).square()
        assert torch.equal(got, expected)
        for one, other in zip(
            torch.autograd.grad(got.sum(), ours), torch.autograd.grad(expected.sum(), theirs), strict=True
        ):
            torch.testing.assert_close(one, other)
    assert counter.frame_count <= 3


def test_torch_func():
    of = rich(e=3, b=7, dtype=torch.float64)
    tensors = of.tensors()

    def total(*tensors):
        return of.call(tensors).square().sum()

    wanted = tuple(range(len(tensors)))
    got = torch.func.grad(total, argnums=wanted)(*tensors)
    given = of.requires_grad()
    for one, other in zip(got, torch.autograd.grad(total(*given), given), strict=True):
        torch.testing.assert_close(one, other)
    several = [torch.stack([t, t.flip(0)]) for t in tensors]
    many = torch.func.vmap(lambda *ts: of.call(ts))(*several)
    for i in range(2):
        torch.testing.assert_close(many[i], of.call([t[i] for t in several]))
    of.options["members"] = torch.tensor([0])
    with pytest.raises(NotImplementedError, match="members: expected None in vmap"):
        torch.func.vmap(lambda *ts: of.call(ts))(*several)


def test_autocast_casts_all_of_them():
    of = rich(e=2, b=20)
    with torch.autocast("cpu", torch.bfloat16):
        got = of.call()
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, of.to(torch.bfloat16).call())


# --- bad input ---------------------------------------------------------------------------------------------

X, W = torch.randn(5, 4), [torch.randn(3, 6, 4), torch.randn(3, 6, 6), torch.randn(3, 2, 6)]
ONE = [torch.randn(3, 1, 4), torch.randn(3, 2, 1)]
LONG = torch.tensor([0, 3])
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "activations": (
        {"activation": ["relu"] * 3},
        ValueError,
        "activation: expected one for all hidden layers",
    ),
    "no parameter": (
        {"activation": "relu(1)"},
        ValueError,
        "activation: expected relu, which has no parameter",
    ),
    "alpha": ({"activation": "celu(0)"}, ValueError, r"activation: expected celu\(alpha\) with alpha > 0"),
    "number": ({"activation": "elu(x)"}, ValueError, r"activation: expected elu\(a finite number\)"),
    "infinite": ({"activation": "elu(inf)"}, ValueError, r"activation: expected elu\(a finite number\)"),
    "open": ({"activation": "elu(1"}, ValueError, r"activation: expected elu\(a finite number\)"),
    "name": ({"activation": ["relu", "x"]}, ValueError, 'activation: expected one of relu, .* got "x"'),
    "kind": ({"activation": 3}, TypeError, "activation: expected a name, or a sequence of them, got 3"),
    "output": ({"output_activation": "x"}, ValueError, "output_activation: expected one of relu"),
    "norm": (
        {"norm": "batch_norm"},
        ValueError,
        'norm: expected layer_norm, rms_norm or None, got "batch_norm"',
    ),
    "norms": ({"norm": [None] * 3}, ValueError, "norm: expected one for all hidden layers"),
    "norm of one feature": (
        {"norm": "rms_norm", "weights": ONE},
        ValueError,
        "norm: expected no norm of hidden layer 0",
    ),
    "eps": (
        {"norm": "layer_norm", "norm_eps": 0.0},
        ValueError,
        "norm_eps: expected a positive number, got 0",
    ),
    "norm_weights": (
        {"norm": "layer_norm", "norm_weights": [torch.ones(3, 6)]},
        ValueError,
        "norm_weights: expected one for each of the 2 norms, or none, got 1",
    ),
    "norm without": (
        {"norm_biases": [torch.ones(3, 6)]},
        ValueError,
        "norm_biases: expected one for each of the 0",
    ),
    "shape of norm": (
        {"norm": ["layer_norm", None], "norm_weights": [torch.ones(3, 5)]},
        ValueError,
        r"norm_weights\[0\]: expected \[3, 6\], got shape \[3, 5\]",
    ),
    "dtype of norm": (
        {"norm": ["layer_norm", None], "norm_weights": [torch.ones(3, 6).double()]},
        TypeError,
        r"norm_weights\[0\]: expected",
    ),
    "norm_position": (
        {"norm": "rms_norm", "norm_position": "x"},
        ValueError,
        "norm_position: expected before_activ",
    ),
    "dropout_position": (
        {"dropout_position": "x"},
        ValueError,
        "dropout_position: expected after_activation or",
    ),
    "early dropout": (
        {"dropout_position": "before_norm"},
        ValueError,
        "dropout_position: expected after_activation where no layer has a norm",
    ),
    "residual": ({"residual": [True, True]}, ValueError, "residual: expected no residual of hidden layer 0"),
    "no activations": ({"activation": []}, ValueError, "activation: expected one for all .* of the 2, got 0"),
    "an activation": ({"activation": ["tanh"]}, ValueError, "activation: expected one for .* the 2, got 1"),
    "no norms": ({"norm": []}, ValueError, "norm: expected one for all .* of the 2, got 0"),
    "a norm": ({"norm": ["rms_norm"]}, ValueError, "norm: expected one for all .* of the 2, got 1"),
    "kind of norm": ({"norm": 1}, TypeError, "norm: expected a name, or a sequence of them, got 1"),
    "no residuals": ({"residual": []}, ValueError, "residual: expected one for all .* of the 2, got 0"),
    "kind of residual": ({"residual": 1.5}, TypeError, "residual: expected a bool, or a sequence of them"),
    "kind of residuals": ({"residual": [None, None]}, TypeError, "residual: expected a bool, or a sequence"),
    "residuals": ({"residual": [True]}, ValueError, "residual: expected one for all hidden layers"),
    "no residual": (
        {"residual": True, "weights": ONE},
        ValueError,
        "residual: expected a hidden layer as wide as",
    ),
    "members": ({"members": LONG}, ValueError, "members: expected members from 0 to 2, got 3"),
    "negative member": ({"members": -LONG}, ValueError, "members: expected members from 0 to 2, got -3"),
    "no members": ({"members": LONG[:0]}, ValueError, r"members: expected \[n\], at least one"),
    "kind of members": ({"members": LONG.int()}, TypeError, "members: expected int64"),
    "members of input": ({"members": LONG[:1], "input": torch.randn(3, 5, 4)}, ValueError, "input: expected"),
    "list of members": ({"members": [0]}, TypeError, "members: expected a tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, error, message = BAD[case]
    given = {"input": X, "weights": W} | arguments
    x, weights = given.pop("input"), given.pop("weights")
    with pytest.raises(error, match=f"^ensemble_mlp: {message}"):
        ensemble_mlp(x, weights, **given)
    target = torch.zeros(5, 2)
    with pytest.raises(error, match=f"^ensemble_mlp_loss: {message}"):
        ensemble_mlp_loss(x, target, weights, loss="mse", **given)
