"""What MaskedMLP is made from and compacts to; MaskedConv2d and Monte Carlo dropout."""

import copy
import re

import pytest
import torch
import torch._dynamo.testing
from masked_models import activations, biases, close, dense, mlp, seeded, sequential
from nn_models import DTYPES, KINDS, assert_same_state
from torch import nn

from pyens import EnsembleMLP
from pyens.nn import (
    MaskedConv2d,
    MaskedMLP,
    Masksembles1D,
    forward_tiled,
    insert_masksembles_,
    mc_dropout,
    set_mask_mode_,
)

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
    for mode in ("grouped", "round_robin", "random"):
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
        ([linear(), nn.ReLU(), linear()], "expected Masksembles1D layers of one num_masks, got none"),
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
            r"expected Masksembles1D layers of one num_masks, got \[2, 3\]",
        ),
        ([Masksembles1D(8, 2, 2.0), linear()], "expected Masksembles1D between an activation and"),
        ([linear(), Masksembles1D(8, 2, 2.0), nn.Softplus(), linear()], "expected Masksembles1D between"),
        ([linear(), nn.ReLU(), linear(), Masksembles1D(8, 2, 2.0)], "expected Masksembles1D between"),
        ([linear(), nn.Softsign(), Masksembles1D(8, 2, 2.0), linear()], "expected nn.Linear and one of"),
        ([linear(), nn.LayerNorm(8), Masksembles1D(8, 2, 2.0), linear()], "expected nn.Linear and one of"),
        (
            [linear(), nn.ReLU(), Masksembles1D(8, 2, 2.0), linear(), nn.ReLU()],
            "expected an nn.Linear as the last layer",
        ),
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
        loss = nn.functional.mse_loss(model(x, mode="random", seed=step), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    torch.testing.assert_close(model.compact()(x), model(x))


# --- MaskedConv2d ------------------------------------------------------------------------------------


def test_masked_conv_masks_its_input():
    layer = MaskedConv2d(12, 5, 3, 4, 2.0, stride=2, padding=1, bias=False, mode="round_robin")
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
        ((network, 0, 0.1), "num_masks: expected a positive integer, got 0"),
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


def test_dropout_of_an_ensemble_draws_for_each_example_and_mc_dropout_for_each_pass():
    """What the docstring of `mc_dropout` says of the two."""
    layers = torch.nn.Sequential(torch.nn.Linear(3, 400, bias=False), torch.nn.Linear(400, 1, bias=False))
    with torch.no_grad():
        for layer in (layers[0], layers[1]):
            layer.weight.fill_(1 / layer.in_features)
    x = torch.ones(6, 3)  # all examples alike
    layers = torch.nn.Sequential(layers[0], torch.nn.Identity(), layers[1])
    passes = mc_dropout(layers, 5, 0.5)(x)
    assert (passes == passes[:, :1]).all() and len(passes[:, 0].unique()) > 1
    model = EnsembleMLP(5, 3, [400], 1, activation="identity", bias=False, dropout=0.5)
    with torch.no_grad():
        for own, layer in zip(model.weights, (layers[0], layers[2]), strict=True):
            own.copy_(layer.weight.expand_as(own))
    each = model(x, dropout_seeds=torch.arange(5))
    assert all(len(member.unique()) > 1 for member in each)
