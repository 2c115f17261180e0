"""MaskedMLP, MaskedConv2d, what they compact to, Monte Carlo dropout, and the specification of masked_mlp."""

import copy
import itertools
import pickle
import re

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from nn_models import DTYPES, KINDS, assert_same_state
from torch import Tensor, nn

from pyens import EnsembleMLP, reference
from pyens.nn import (
    MaskedConv2d,
    MaskedMLP,
    Masksembles1D,
    forward_tiled,
    insert_masksembles_,
    mc_dropout,
    set_mask_mode_,
)

WIDTHS = [6, 12, 10, 3]
activations = pytest.mark.parametrize("activation", KINDS)
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


def mlp(ensemble_size: int = 4, scale: float = 2.0, widths: list[int] = WIDTHS, **kwargs) -> MaskedMLP:
    return MaskedMLP(ensemble_size, widths[0], widths[1:-1], widths[-1], scale=scale, **kwargs)


def sequential(
    activation: type[nn.Module] = nn.ReLU, dropout: float | None = None, **kwargs
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(fan_in, fan_out, **kwargs), activation()]
        if dropout is not None:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers[: -1 if dropout is None else -2])


def dense(model: MaskedMLP, x: Tensor) -> Tensor:
    """All units, masked after the activation, as the paper has it."""
    act = KINDS[model.activation]()
    hidden = x if x.dim() == 3 else x.unsqueeze(0)
    masks = list(model.masks.buffers())
    for layer, weight in enumerate(model.weights):
        hidden = hidden @ weight.T
        if len(model.biases) > 0:
            hidden = hidden + model.biases[layer]
        if layer < len(masks):
            hidden = act(hidden) * masks[layer].unsqueeze(1)
    return hidden


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# --- the specification -------------------------------------------------------------------------------


@activations
@biases
def test_specification_is_the_dense_network_masked(activation, bias):
    model = mlp(activation=activation, bias=bias, dtype=torch.float64)
    for x in (torch.randn(5, 6).double(), torch.randn(4, 5, 6).double(), torch.randn(0, 6).double()):
        close(model(x), dense(model, x))


def test_an_empty_mask_computes_the_last_bias():
    model = mlp(dtype=torch.float64)
    masks = list(model.masks.buffers())
    masks[1][2] = False
    x = torch.randn(5, 6).double()
    output = model(x)
    close(output, dense(model, x))
    assert torch.equal(output[2], model.biases[2].expand(5, 3))
    close(model.compact()(x), output)


def test_what_a_mask_leaves_out_takes_no_part():
    model = mlp(dtype=torch.float64)
    x = torch.randn(5, 6).double()
    clean = model(x)
    masks = list(model.masks.buffers())
    member, unit = (~masks[0]).nonzero()[0].tolist()
    with torch.no_grad():
        model.weights[0][unit] = float("nan")
        model.weights[1][:, unit] = float("inf")
    output = model(x)
    without = ~masks[0][:, unit]
    assert without[member] and torch.equal(output[without], clean[without])
    assert output[~without].isnan().any()
    kept = [mask[without] for mask in masks]
    MaskedMLP.from_parameters(list(model.weights), list(model.biases), kept)(x).sum().backward()
    assert model.weights[0].grad.isfinite().all() and model.weights[1].grad.isfinite().all()
    close(model.compact()(x)[without], clean[without])


def test_gradients():
    model = mlp(widths=[3, 5, 4, 2], activation="tanh", dtype=torch.float64)
    weights, vectors = list(model.weights), list(model.biases)
    masks = list(model.masks.buffers())

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return reference.masked_mlp(x, parameters[:3], parameters[3:], masks, activation="tanh")

    for x in (torch.randn(2, 3), torch.randn(4, 2, 3)):
        assert torch.autograd.gradcheck(run, (x.double().requires_grad_(), *weights, *vectors))


# --- MaskedMLP ---------------------------------------------------------------------------------------


@biases
def test_parameters_and_state(bias):
    model = mlp(bias=bias, seed=7)
    torch.manual_seed(7)
    linears = [layer for layer in sequential(bias=bias) if isinstance(layer, nn.Linear)]
    for layer, linear in enumerate(linears):
        assert torch.equal(model.weights[layer], linear.weight)
        assert not bias or torch.equal(model.biases[layer], linear.bias)
    names = [f"weights.{i}" for i in range(3)] + [f"biases.{i}" for i in range(3) if bias]
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == [*names, "masks.0", "masks.1"]
    masks = list(model.masks.buffers())
    assert [mask.shape for mask in masks] == [(4, 12), (4, 10)]
    for mask in masks:
        assert mask.dtype == torch.bool and mask.any(0).all() and len(set(mask.sum(1).tolist())) == 1
    assert "ensemble_size=4, in_features=6, hidden_features=[12, 10], out_features=3" in repr(model)


def test_reset_parameters():
    model = mlp(seed=7)
    before = copy.deepcopy(model)
    model.reset_parameters(8)
    masks, others = list(model.masks.buffers()), list(before.masks.buffers())
    assert all(torch.equal(a, b) for a, b in zip(masks, others, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(model.weights, before.weights, strict=True))
    model.reset_parameters(7)
    assert_same_state(model, before)


def test_masks_come_from_the_generator():
    a, b, c = (list(mlp(generator=torch.Generator().manual_seed(s)).masks.buffers()) for s in (1, 1, 2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0])


def test_reload_gives_the_same_output(tmp_path):
    model, other = mlp(), mlp()
    x = torch.randn(5, 6)
    assert not torch.equal(model(x), other(x))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for again in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*masks\.0"):
        other.load_state_dict({k: v for k, v in model.state_dict().items() if k != "masks.0"})


@activations
def test_masks_of_ones_are_the_plain_network(activation):
    model = mlp(scale=1.0, activation=activation, dtype=torch.float64, seed=3)
    torch.manual_seed(3)
    plain = sequential(KINDS[activation]).double()
    plain.load_state_dict(
        {
            f"{2 * i}.{name}": t
            for i, (w, b) in enumerate(zip(model.weights, model.biases, strict=True))
            for name, t in (("weight", w), ("bias", b))
        }
    )
    x = torch.randn(5, 6).double()
    for output in model(x):
        close(output, plain(x))


def test_equal_masks_and_permuted_masks():
    model = mlp()
    masks = list(model.masks.buffers())
    x = torch.randn(5, 6)
    order = [2, 0, 3, 1]
    permuted = MaskedMLP.from_parameters(
        list(model.weights), list(model.biases), [mask[order] for mask in masks]
    )
    assert torch.equal(permuted(x), model(x)[order])
    assert torch.equal(permuted.compact()(x), model.compact()(x)[order])
    equal = MaskedMLP.from_parameters(
        list(model.weights), list(model.biases), [mask[:1].expand(4, -1) for mask in masks]
    )
    assert torch.equal(equal(x), equal(x)[:1].expand(4, -1, -1))


@given(
    st.integers(0, 13),
    st.integers(1, 6),
    st.sampled_from(["grouped", "dealt", "drawn"]),
    st.integers(0, 2**32 - 1),
)
def test_each_example_meets_the_mask_that_a_layer_gives_it(b, n, mode, seed):
    model = mlp(n, dtype=torch.float64)
    layer = Masksembles1D(n, n, 1.0)
    layer.masks.copy_(torch.eye(n))
    met = set_mask_mode_(layer, mode, seed=seed)(torch.ones(b, n)).argmax(1)
    x = torch.randn(b, 6).double()
    output = model(x, mode=mode, seed=seed)
    assert output.shape == (b, 3)
    close(output, model(x)[met, torch.arange(b)])
    assert torch.equal(output, model(x, mode=mode, seed=torch.tensor(seed)))


def test_on_devices(device):
    model = mlp(dtype=torch.float64)
    x = torch.randn(7, 6).double()
    there = copy.deepcopy(model).to(device)
    close(there.compact()(x.to(device)).cpu(), model(x))
    close(there(x.to(device)).cpu(), model(x))
    for mode in ("grouped", "dealt", "drawn"):
        close(there(x.to(device), mode=mode, seed=5).cpu(), model(x, mode=mode, seed=5))


def test_gradients_with_a_mask_each():
    model = mlp(dtype=torch.float64)
    x = torch.randn(7, 6).double().requires_grad_()
    grad = torch.randn(7, 3).double()
    parameters = [x, *model.parameters()]
    got = torch.autograd.grad(model(x, mode="dealt"), parameters, grad)
    met, rows = torch.arange(7) % 4, torch.arange(7)
    expected = torch.autograd.grad(dense(model, x)[met, rows], parameters, grad)
    for a, b in zip(got, expected, strict=True):
        close(a, b)


LOSSES = {
    "mse": (lambda b: torch.randn(b, 3).double(), nn.functional.mse_loss),
    "bce": (lambda b: torch.rand(b, 3).double(), nn.functional.binary_cross_entropy_with_logits),
    "cross_entropy": (lambda b: torch.randint(3, (b,)), nn.functional.cross_entropy),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mode", ["tiled", "grouped", "dealt", "drawn"])
def test_loss_is_the_mean_over_the_examples(loss, mode):
    model = mlp(activation="silu", dtype=torch.float64)
    draw, function = LOSSES[loss]
    for b in (1, 3, 8, 11):  # fewer rows than masks, and rows that are not shared out evenly
        x, y = torch.randn(b, 6).double().requires_grad_(), draw(b)
        got = model.loss(x, y, loss=loss, mode=mode, seed=5)
        output = model(x, mode=mode, seed=5)
        expected = torch.stack([function(z, y) for z in output]) if mode == "tiled" else function(output, y)
        close(got, expected)
        parameters = [x, *model.parameters()]
        ours, theirs = (torch.autograd.grad(value.sum(), parameters) for value in (got, expected))
        for a, b_ in zip(ours, theirs, strict=True):
            close(a, b_)


@pytest.mark.parametrize("mode", ["tiled", "grouped", "dealt", "drawn"])
def test_loss_with_weights(mode):
    model = mlp(dtype=torch.float64)
    x, y = torch.randn(11, 6).double(), torch.randint(3, (11,))
    weight = torch.rand(11).double()
    weight[3:6] = 0
    x[4] = float("nan")  # left out
    got = model.loss(x, y, loss="cross_entropy", mode=mode, temperature=0.5, sample_weight=weight)
    output = model(torch.nan_to_num(x), mode=mode) / 0.5
    losses = nn.functional.cross_entropy(output.movedim(-1, 1), y.expand(output.shape[:-1]), reduction="none")
    close(got, (losses * weight).sum(-1) / weight.sum())
    for nothing in (
        model.loss(x[:0], y[:0], loss="cross_entropy", mode=mode),
        model.loss(x, y, loss="cross_entropy", mode=mode, sample_weight=0 * weight),
    ):
        assert torch.equal(nothing, torch.zeros(4 if mode == "tiled" else (), dtype=torch.float64))
        nothing.sum().backward()
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())
        model.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_of_other_dtypes(dtype):
    model = mlp(dtype=dtype)
    x, y = torch.randn(11, 6).to(dtype), torch.randn(11, 3).to(dtype)
    weight = torch.rand(11).to(dtype)
    for mode in ("tiled", "dealt"):
        got = model.loss(x, y, loss="mse", mode=mode, sample_weight=weight)
        exact = copy.deepcopy(model).double()
        expected = exact.loss(x.double(), y.double(), loss="mse", mode=mode, sample_weight=weight.double())
        assert got.dtype == torch.float32
        assert (got - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_bad_losses():
    model = mlp()
    x, y = torch.zeros(5, 6), torch.zeros(5, 3)
    for arguments, message in (
        ({"input": x[0]}, "input: expected [B, 6], got shape [6]"),
        ({"target": y[:4]}, "target: expected the 5 examples of the input first, got shape [4, 3]"),
        (
            {"sample_weight": torch.ones(4, 5)},
            "sample_weight: expected the 5 examples of the input first, got shape [4, 5]",
        ),
        ({"mode": "all"}, "mode: expected one of tiled, grouped, dealt, drawn, got 'all'"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"MaskedMLP: {message}")):
            model.loss(**({"input": x, "target": y, "loss": "mse", "mode": "dealt"} | arguments))
    with pytest.raises(ValueError, match=r'loss: expected .*, got "mae"'):
        model.loss(x, y, loss="mae")


def test_training_in_one_pass_is_training():
    together, apart = mlp(seed=1, generator=seeded(2)), mlp(seed=1, generator=seeded(2))
    x, y = torch.randn(30, 6), torch.randint(3, (30,))
    for step in range(5):
        losses = (
            together.loss(x, y, loss="cross_entropy", mode="drawn", seed=step),
            nn.functional.cross_entropy(apart(x, mode="drawn", seed=step), y),
        )
        for model, loss in zip((together, apart), losses, strict=True):
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_search_for_what_masks_keep_is_made_once(monkeypatch):
    from pyens.nn import masked_mlp as module

    model = mlp()
    calls = []
    plan = module.plan_masks
    monkeypatch.setattr(module, "plan_masks", lambda masks: calls.append(1) or plan(masks))
    x = torch.randn(5, 6)
    for mode in ("tiled", "dealt"):
        model(x, mode=mode)
        model.loss(x, torch.zeros(5, 3), loss="mse", mode=mode).sum().backward()
    assert not calls


CHANGES = {
    "load_state_dict": lambda model, other: model.load_state_dict(other.state_dict()),
    "load_state_dict, assigned": lambda model, other: model.load_state_dict(other.state_dict(), assign=True),
    "of a network around it": lambda model, other: nn.Sequential(model).load_state_dict(
        nn.Sequential(other).state_dict()
    ),
    "in place": lambda model, other: (
        [
            tensor.data.copy_(value)
            for (name, value) in other.state_dict().items()
            for tensor in [model.state_dict(keep_vars=True)[name]]
            if not name.startswith("masks")
        ]
        + [a.copy_(b) for a, b in zip(model.masks.buffers(), other.masks.buffers(), strict=True)]
    ),
}


@pytest.mark.parametrize("how", CHANGES)
def test_other_masks_are_planned_anew(how):
    model, other = mlp(), mlp()
    x = torch.randn(5, 6)
    model(x)
    CHANGES[how](model, other)
    assert torch.equal(model(x), other(x))


def test_copies_have_plans_of_their_own():
    model = mlp()
    x = torch.randn(5, 6)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double()):
        assert torch.allclose(again(x.to(again.weights[0].dtype)).float(), model(x), atol=1e-5)
        before = model(x)
        next(again.masks.buffers()).fill_(False)
        again(x.to(again.weights[0].dtype))
        assert torch.equal(model(x), before)
    with torch.inference_mode():
        made = mlp()
        assert made(x).shape == (4, 5, 3)
    empty = mlp(device="meta")
    there = empty.to_empty(device="cpu")
    there.load_state_dict(model.state_dict())
    assert torch.equal(there(x), model(x))


@pytest.mark.parametrize("mode", ["tiled", "grouped", "dealt", "drawn"])
def test_compiles(mode):
    torch._dynamo.reset()
    model = mlp()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, y: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        return model(x, mode=mode, seed=seed).square().mean(), model.loss(
            x, y, loss="mse", mode=mode, seed=seed
        ).mean()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    parameters = list(model.parameters())
    for b in (5, 8, 11, 30):
        x, y, seed = torch.randn(b, 6), torch.randn(b, 3), torch.tensor(b)
        got, expected = compiled(x, y, seed), step(x, y, seed)
        torch.testing.assert_close(got, expected)
        ours, theirs = (torch.autograd.grad(sum(values), parameters) for values in (got, expected))
        torch.testing.assert_close(ours, theirs)
    other = mlp()
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x, y, seed), step(x, y, seed))


def test_bad_arguments():
    good = {"ensemble_size": 4, "in_features": 6, "hidden_features": [5, 5], "out_features": 1, "scale": 2.0}
    for kwargs, message in (
        ({"ensemble_size": 0}, "ensemble_size: expected a positive integer, got 0"),
        ({"hidden_features": [5, 0]}, r"hidden_features\[1\]: expected a positive integer, got 0"),
        ({"hidden_features": []}, "hidden_features: expected at least one hidden layer, got none"),
        ({"scale": 0.5}, "scale: expected at least 1, got 0.5"),
        ({"activation": "mish"}, 'activation: expected one of relu, .*, got "mish"'),
    ):
        with pytest.raises(ValueError, match=f"MaskedMLP: {message}"):
            MaskedMLP(**(good | kwargs))
    with pytest.raises(TypeError, match="MaskedMLP: hidden_features: expected a sequence of widths, got 5"):
        MaskedMLP(**(good | {"hidden_features": 5}))


def test_bad_inputs():
    model = mlp()
    for x in (torch.zeros(6), torch.zeros(5, 7), torch.zeros(3, 5, 6), torch.zeros(4, 5, 7)):
        message = f"MaskedMLP: input: expected [B, 6] or [4, B, 6], got shape {list(x.shape)}"
        with pytest.raises(ValueError, match=re.escape(message)):
            model(x)
    with pytest.raises(ValueError, match=re.escape("input: expected [B, 6], got shape [4, 5, 6]")):
        model(torch.zeros(4, 5, 6), mode="dealt")
    with pytest.raises(ValueError, match="mode: expected one of tiled, grouped, dealt, drawn, got 'all'"):
        model(torch.zeros(5, 6), mode="all")


# --- from networks with mask layers ------------------------------------------------------------------


@activations
@biases
def test_from_a_network_with_mask_layers(activation, bias):
    network = sequential(KINDS[activation], bias=bias).double()
    insert_masksembles_(network, 4, 2.0)
    model = MaskedMLP.from_module(network.eval())
    assert not model.training and model.activation == activation
    x = torch.randn(9, 6).double()
    close(model(x), forward_tiled(network, x))
    for mode in ("grouped", "dealt", "drawn"):
        set_mask_mode_(network, mode, seed=2)
        close(model(x, mode=mode, seed=2), network(x))
    # A copy.
    with torch.no_grad():
        network[0].weight.zero_()
    assert model.weights[0].abs().min() > 0


def test_from_a_network_with_some_masks():
    mask = Masksembles1D(10, 3, 2.0)
    shared = nn.ReLU()
    network = nn.Sequential(
        nn.Linear(6, 12), shared, nn.Linear(12, 10), shared, mask, nn.Linear(10, 3)
    ).double()
    model = MaskedMLP.from_module(network)
    first, second = model.masks.buffers()
    assert first.all() and torch.equal(second, mask.masks)
    x = torch.randn(9, 6).double()
    close(model(x), forward_tiled(network, x))


def test_from_other_networks():
    def linear() -> nn.Linear:
        return nn.Linear(8, 8)

    for layers, message in (
        ([linear(), nn.ReLU(), linear()], "expected Masksembles1D layers of one n, got none"),
        (
            [
                linear(),
                nn.ReLU(),
                Masksembles1D(8, 2, 2.0),
                linear(),
                nn.ReLU(),
                Masksembles1D(8, 3, 2.0),
                linear(),
            ],
            r"expected Masksembles1D layers of one n, got \[2, 3\]",
        ),
        ([Masksembles1D(8, 2, 2.0), linear()], "expected Masksembles1D between an activation and"),
        ([linear(), Masksembles1D(8, 2, 2.0), nn.Softplus(), linear()], "expected Masksembles1D between"),
        ([linear(), nn.ReLU(), linear(), Masksembles1D(8, 2, 2.0)], "expected Masksembles1D between"),
        ([linear(), nn.Mish(), Masksembles1D(8, 2, 2.0), linear()], "expected nn.Linear and one of"),
    ):
        with pytest.raises(ValueError, match=f"from_module: module: {message}"):
            MaskedMLP.from_module(nn.Sequential(*layers))
    with pytest.raises(
        ValueError, match=r"from_module: module: expected nn.Linear and one of .*, got Conv2d"
    ):
        MaskedMLP.from_module(nn.Conv2d(3, 3, 3))


# --- compact -----------------------------------------------------------------------------------------


@activations
@biases
def test_compact_is_a_smaller_ensemble_of_the_same_outputs(activation, bias):
    model = mlp(activation=activation, bias=bias, dtype=torch.float64).eval()
    ensemble = model.compact()
    assert type(ensemble) is EnsembleMLP and not ensemble.training
    ones = tuple(int(mask[0].sum()) for mask in model.masks.buffers())
    assert ensemble.hidden_features == ones and ones[0] < 12 and ones[1] < 10
    for x in (torch.randn(20, 6).double(), torch.randn(4, 3, 6).double()):
        close(ensemble(x), model(x))
    for k, member in enumerate(ensemble.to_modules()):
        x = torch.randn(5, 6).double()
        close(member(x), model(x)[k])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compact_keeps_the_dtype_and_copies(dtype):
    model = mlp(dtype=dtype)
    ensemble = model.compact()
    x = torch.randn(20, 6).to(dtype)
    expected = model(x).double()
    assert ensemble.weights[0].dtype == dtype
    assert (ensemble(x).double() - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(ensemble(x).double().abs() > 0, expected.abs() > 0)


@activations
def test_compact_with_masks_of_different_sizes(activation):
    model = mlp(activation=activation, dtype=torch.float64)
    for mask in model.masks.buffers():
        mask.copy_(torch.rand(mask.shape) < 0.4)
        mask[1] = False
    x = torch.randn(5, 6).double()
    close(model.compact()(x), dense(model, x))
    most = tuple(int(mask.sum(1).max()) for mask in model.masks.buffers())
    assert model.compact().hidden_features == most


def test_a_trained_model_compacts():
    model = mlp()
    x, y = torch.randn(64, 6), torch.randn(64, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x, mode="drawn", seed=step), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    torch.testing.assert_close(model.compact()(x), model(x))


# --- MaskedConv2d ------------------------------------------------------------------------------------


def test_masked_conv_masks_its_input():
    layer = MaskedConv2d(12, 5, 3, 4, 2.0, stride=2, padding=1, bias=False, mode="dealt")
    assert [name for name, _ in layer.named_children()] == ["mask", "conv"]
    assert list(layer.state_dict()) == ["mask.masks", "conv.weight"]
    x = torch.randn(7, 12, 6, 5)
    kept = layer.mask.masks[torch.arange(7) % 4].view(7, 12, 1, 1)
    expected = nn.functional.conv2d(torch.where(kept, x, 0), layer.conv.weight, stride=2, padding=1)
    assert torch.equal(layer(x), expected)


def test_masked_conv_gradients():
    layer = MaskedConv2d(4, 2, 2, 2, 2.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(layer, torch.randn(3, 4, 3, 3).double().requires_grad_())


@biases
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_masked_conv_compacts(bias, padding_mode):
    layer = MaskedConv2d(
        12, 8, (3, 2), 4, 2.0, stride=(1, 2), padding=1, dilation=2, bias=bias, padding_mode=padding_mode
    )
    layer.double().eval()
    x = torch.randn(3, 12, 9, 8).double()
    expected = forward_tiled(layer, x)
    members = layer.compact()
    assert len(members) == 4 and not members.training
    for k, member in enumerate(members):
        assert member[1].in_channels == layer.mask.masks[k].sum() < 12
        close(member(x), expected[k])
    masks = torch.rand(4, 8) < 0.5
    for k, member in enumerate(layer.compact(out_masks=masks, select=False)):
        close(member(x[:, layer.mask.masks[k]]), expected[k][:, masks[k]])


def test_a_chain_of_convolutions_compacts():
    chain = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Conv2d(12, 5, 1)
    )
    insert_masksembles_(chain.double(), 4, 2.0)
    first, second = chain[2], chain[4]
    x = torch.randn(2, 3, 8, 8).double()
    expected = forward_tiled(chain, x)
    hidden = torch.relu(chain[0](x))
    firsts = first.compact(out_masks=second.mask.masks)
    seconds = second.compact(select=False)
    for k in range(4):
        close(nn.Sequential(firsts[k], nn.ReLU(), seconds[k])(hidden), expected[k])


def test_masked_conv_refuses():
    with pytest.raises(ValueError, match="MaskedConv2d: in_channels: expected a positive integer, got 0"):
        MaskedConv2d(0, 4, 3, 4, 2.0)
    with pytest.raises(ValueError, match=r"MaskedConv2d: scale: expected at least 1, got 0\.5"):
        MaskedConv2d(4, 4, 3, 4, 0.5)
    with pytest.raises(ValueError, match="from_conv: conv: expected groups = 1, got 2"):
        MaskedConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=2), 4, 2.0)
    layer = MaskedConv2d(4, 6, 3, 4, 2.0)
    with pytest.raises(TypeError, match="compact: out_masks: expected bool, got float32"):
        layer.compact(out_masks=torch.ones(4, 6))
    with pytest.raises(ValueError, match=r"compact: out_masks: expected shape \[4, 6\], got \[4, 4\]"):
        layer.compact(out_masks=torch.ones(4, 4, dtype=torch.bool))


# --- mc_dropout --------------------------------------------------------------------------------------


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@activations
@biases
def test_mc_dropout_is_dropout_with_one_mask_per_pass(activation, bias):
    network = sequential(KINDS[activation], bias=bias).double().eval()
    before = copy.deepcopy(network)
    model = mc_dropout(network, 7, 0.3, seeded())
    assert_same_state(network, before)
    assert model.ensemble_size == 7 and not model.training
    x = torch.randn(5, 6).double()
    for k, output in enumerate(model(x)):
        hidden = x
        for layer, mask in zip(range(0, 6, 2), [*(m[k] for m in model.masks.buffers()), None], strict=True):
            hidden = network[layer](hidden)
            if mask is not None:
                hidden = network[layer + 1](hidden) * mask / 0.7
        close(output, hidden)


def test_mc_dropout_draws_from_the_generator_at_the_rate():
    network = sequential()
    state = torch.get_rng_state()
    a, b, c = (mc_dropout(network, 500, 0.3, seeded(s)).masks for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for x, y, z in zip(a.buffers(), b.buffers(), c.buffers(), strict=True):
        assert torch.equal(x, y) and not torch.equal(x, z)
        assert x.double().mean().item() == pytest.approx(0.7, abs=0.03)  # five standard errors
    assert all(mask.all() for mask in mc_dropout(network, 3, 0.0).masks.buffers())


def test_mc_dropout_of_a_linear_hidden_layer_is_unbiased():
    network = sequential(nn.Identity)
    x = torch.randn(4, 6)
    passes = mc_dropout(network, 4000, 0.2, seeded())(x)
    error = passes.std(0) / 4000**0.5
    assert ((passes.mean(0) - network(x)).abs() < 5 * error).all()


def test_mc_dropout_where_the_model_has_dropout():
    network = sequential(dropout=0.5)
    del network[2]  # the first of two
    for p, expected in ((None, 0.5), (0.25, 0.75)):
        model = mc_dropout(network, 400, p, seeded())
        first, second = model.masks.buffers()
        assert first.all() and second.double().mean().item() == pytest.approx(expected, abs=0.04)
        torch.testing.assert_close(model.weights[2], network[5].weight / expected)
        assert torch.equal(model.weights[1], network[2].weight)
    x = torch.randn(3, 6)
    torch.testing.assert_close(mc_dropout(sequential(dropout=0.5), 3, 0.0)(x).std(0), torch.zeros(3, 3))


def test_mc_dropout_compacts():
    model = mc_dropout(sequential().double(), 20, 0.5, seeded())
    x = torch.randn(30, 6).double()
    close(model.compact()(x), model(x))


def test_mc_dropout_refuses():
    network = sequential()
    for args, message in (
        ((network, 0, 0.1), "num_samples: expected a positive integer, got 0"),
        ((network, 4, 1.0), "p: expected 0 <= p < 1, got 1.0"),
        ((network, 4, -0.1), "p: expected 0 <= p < 1, got -0.1"),
        ((network, 4, float("nan")), "p: expected 0 <= p < 1, got nan"),
        ((sequential(dropout=1.0), 4), "p: expected 0 <= p < 1, got 1.0"),
        ((network, 4), "p: expected a rate for a model without nn.Dropout, got None"),
        ((nn.Sequential(nn.Linear(3, 3)), 4, 0.1), "model: expected at least one hidden layer, got none"),
        ((nn.Conv2d(3, 3, 3), 4, 0.1), "model: expected nn.Linear and one of"),
        ((nn.Sequential(nn.Dropout(), *network), 4, 0.1), "model: expected nn.Dropout between"),
        ((nn.Sequential(*network, nn.Dropout()), 4, 0.1), "model: expected nn.Dropout between"),
    ):
        with pytest.raises(ValueError, match=f"mc_dropout: {re.escape(message)}"):
            mc_dropout(*args)
