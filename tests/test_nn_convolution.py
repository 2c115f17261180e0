"""EnsembleConv2d, EnsembleSequential and the layers between them, against the modules of torch.nn."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import pyens
from pyens.nn import (
    EnsembleAvgPool2d,
    EnsembleBatchNorm2d,
    EnsembleConv2d,
    EnsembleLinear,
    EnsembleMaxPool2d,
    EnsembleMLP,
    EnsembleSequential,
    Flatten,
)

E = 3


def network(norm: bool = False, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """The network of the compressed ensembles, smaller."""
    return nn.Sequential(
        nn.Conv2d(1, 5, 3),
        *([nn.BatchNorm2d(5)] if norm else []),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 3, padding=1),
        *([nn.BatchNorm2d(6)] if norm else []),
        activation(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.0),
        nn.Linear(6 * 3 * 3, 4),
    )


def members(**options) -> list[nn.Sequential]:
    return [network(**options) for _ in range(E)]


def each(modules, x: Tensor) -> Tensor:
    return torch.stack([module(x) for module in modules])


# --- EnsembleConv2d --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": (3, 5), "padding": "same", "dilation": 2},
        {"kernel_size": 2, "padding": "valid", "bias": False},
    ],
    ids=str,
)
def test_is_its_members(options):
    convs = [nn.Conv2d(2, 4, **options) for _ in range(E)]
    ensemble = EnsembleConv2d.from_modules(convs)
    x = torch.randn(6, 2, 9, 10)
    torch.testing.assert_close(ensemble(x), each(convs, x))
    own = torch.randn(E, 6, 2, 9, 10)
    torch.testing.assert_close(ensemble(own), torch.stack([c(o) for c, o in zip(convs, own, strict=True)]))
    for i, conv in enumerate(ensemble.to_modules()):
        assert torch.equal(conv.weight, convs[i].weight) and (conv.bias is None) == (convs[i].bias is None)
        torch.testing.assert_close(conv(x), convs[i](x))
    stacked, _ = torch.func.stack_module_state(convs)
    assert stacked.keys() == ensemble.state_dict().keys()
    built = EnsembleConv2d(E, 2, 4, **options)
    built.load_state_dict(stacked)
    assert torch.equal(built(x), ensemble(x))
    again = EnsembleConv2d(**ensemble.config())
    again.load_stacked(stacked)
    assert torch.equal(again(x), ensemble(x))


def test_seeds_draw_as_torch_does():
    ensemble = EnsembleConv2d(E, 3, 5, (2, 3), seeds=[7, 8, 9])
    for i, seed in enumerate((7, 8, 9)):
        torch.manual_seed(seed)
        conv = nn.Conv2d(3, 5, (2, 3))
        assert torch.equal(ensemble.weight[i], conv.weight) and torch.equal(ensemble.bias[i], conv.bias)
    chosen = ensemble.select([2, 0])
    assert chosen.ensemble_size == 2 and torch.equal(chosen.weight, ensemble.weight[[2, 0]])


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        ({"ensemble_size": 0}, ValueError, "ensemble_size"),
        ({"out_channels": 0}, ValueError, "out_channels"),
        ({"kernel_size": 0}, ValueError, "kernel_size: expected at least 1"),
        ({"kernel_size": 2.0}, TypeError, "kernel_size: expected an integer or two"),
        ({"stride": (1, 2, 3)}, TypeError, "stride: expected an integer or two"),
        ({"padding": -1}, ValueError, "padding: expected at least 0"),
        ({"padding": "full"}, ValueError, 'padding: expected integers, "same" or "valid"'),
        ({"padding": "same", "kernel_size": 2}, ValueError, '"same" with stride 1 and as many zeros'),
        ({"padding": "same", "stride": 2}, ValueError, '"same" with stride 1'),
        ({"dilation": True}, TypeError, "dilation: expected an integer"),
    ],
    ids=str,
)
def test_refuses_arguments(arguments, error, message):
    given = {"ensemble_size": 2, "in_channels": 3, "out_channels": 4, "kernel_size": 3} | arguments
    with pytest.raises(error, match=message):
        EnsembleConv2d(**given)


@pytest.mark.parametrize(
    "module,message",
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups 1"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "zeros as padding"),
        (nn.Conv2d(4, 5, 3), r"modules\[1\]: expected Conv2d\(4, 4"),
        (nn.Conv2d(4, 4, 3).double(), "float32"),
        (nn.Linear(4, 4), "expected nn.Conv2d, got Linear"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "weights that are parameters"),
    ],
    ids=str,
)
def test_refuses_modules(module, message):
    with pytest.raises(ValueError, match=message):
        EnsembleConv2d.from_modules([nn.Conv2d(4, 4, 3), module])


def test_pruned_weights_are_read():
    ensemble = EnsembleConv2d(E, 2, 3, 2)
    nn.utils.prune.random_unstructured(ensemble, "weight", 0.5)
    x = torch.randn(4, 2, 5, 5)
    plain = EnsembleConv2d(E, 2, 3, 2)
    plain.load_state_dict({"weight": ensemble.weight, "bias": ensemble.bias})
    assert torch.equal(ensemble(x), plain(x)) and (ensemble.weight == 0).any()


# --- batch norm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_batch_norm_is_its_members(shared, affine):
    norms = [nn.BatchNorm2d(4, affine=affine) for _ in range(E)]
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        if affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    ensemble = EnsembleBatchNorm2d.from_modules(norms)
    x = torch.randn(*([] if shared else [E]), 5, 4, 3, 2) * 2 + 1
    for training in (True, False):
        ensemble.train(training)
        own = x.expand(E, 5, 4, 3, 2)
        want = torch.stack([norm.train(training)(o) for norm, o in zip(norms, own, strict=True)])
        torch.testing.assert_close(ensemble(x), want)
        for i, norm in enumerate(ensemble.to_modules()):
            assert isinstance(norm, nn.BatchNorm2d)
            torch.testing.assert_close(norm.running_var, norms[i].running_var)
            torch.testing.assert_close(norm.running_mean, norms[i].running_mean)
    with pytest.raises(ValueError, match=r"EnsembleBatchNorm2d: input: expected \[B, 4, H, W\] or \[3, B, 4"):
        ensemble(torch.randn(5, 3, 3, 2))
    with pytest.raises(ValueError, match="more than one pixel"):
        ensemble.train()(torch.randn(1, 4, 1, 1))
    assert ensemble(torch.randn(1, 4, 1, 2)).shape == (E, 1, 4, 1, 2)


# --- EnsembleSequential ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh])
def test_a_network_is_its_members(activation, norm):
    modules = members(norm=norm, activation=activation)
    ensemble = EnsembleSequential.from_modules(modules)
    assert ensemble.training
    x = torch.randn(7, 1, 14, 14)
    for training in (True, False):
        ensemble.train(training)
        want = each([module.train(training) for module in modules], x)
        torch.testing.assert_close(ensemble(x), want, rtol=1e-4, atol=1e-5)
    own = torch.randn(E, 7, 1, 14, 14)
    want = torch.stack([module(o) for module, o in zip(modules, own, strict=True)])
    torch.testing.assert_close(ensemble(own), want, rtol=1e-4, atol=1e-5)
    for i, module in enumerate(ensemble.to_modules()):
        assert repr(module) == repr(modules[i])
        torch.testing.assert_close(module(x), modules[i](x), rtol=1e-4, atol=1e-5)
    parameters, buffers = torch.func.stack_module_state(modules)
    assert ensemble.state_dict().keys() == (parameters | buffers).keys()


def test_gradients_are_those_of_the_members():
    modules = [m.double() for m in members(norm=True)]
    ensemble = EnsembleSequential.from_modules(modules)
    x = torch.randn(7, 1, 14, 14, dtype=torch.float64)
    y = torch.randint(4, (7,))
    losses = ensemble.loss(x, y, loss="cross_entropy")
    losses.sum().backward()
    for i, module in enumerate(modules):
        loss = nn.functional.cross_entropy(module(x), y)
        loss.backward()
        torch.testing.assert_close(losses[i], loss)
        for (name, want), (_, got) in zip(
            module.named_parameters(), ensemble.named_parameters(), strict=True
        ):
            torch.testing.assert_close(got.grad[i], want.grad, msg=name)


class Counted:
    """How many convolutions had their ReLU and their pooling within the call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, tuple[int, int]]] = []
        convolve = EnsembleConv2d.convolve

        def counting(module, input, activation="identity", max_pool=1):
            self.calls.append((activation, max_pool))
            return convolve(module, input, activation, max_pool)

        monkeypatch.setattr(EnsembleConv2d, "convolve", counting)


@pytest.mark.parametrize(
    "behind,expected",
    [
        ([nn.ReLU(), EnsembleMaxPool2d(2)], ("relu", (2, 2))),
        ([EnsembleMaxPool2d((3, 2)), nn.ReLU()], ("relu", (3, 2))),
        ([nn.ReLU(inplace=True)], ("relu", (1, 1))),
        ([EnsembleMaxPool2d(2)], ("identity", (2, 2))),
        ([EnsembleMaxPool2d(2, ceil_mode=True)], ("identity", 1)),
        ([EnsembleMaxPool2d(3, stride=2)], ("identity", 1)),
        ([nn.ReLU(), EnsembleMaxPool2d(2, padding=1)], ("relu", (1, 1))),
        ([nn.GELU(), EnsembleMaxPool2d(2)], ("identity", 1)),
        ([nn.ReLU(), nn.ReLU()], ("relu", (1, 1))),
    ],
    ids=str,
)
def test_what_follows_a_convolution_is_part_of_its_call(monkeypatch, behind, expected):
    conv = EnsembleConv2d(E, 1, 4, 3)
    x = torch.randn(5, 1, 11, 12)
    want = conv(x)
    for layer in behind:
        want = layer(want)
    counted = Counted(monkeypatch)
    assert torch.equal(EnsembleSequential(conv, *behind)(x), want)
    assert counted.calls == [expected]


def test_hooks_run():
    relu, seen = nn.ReLU(), []
    model = EnsembleSequential(EnsembleConv2d(E, 1, 4, 3), relu, EnsembleMaxPool2d(2))
    x = torch.randn(5, 1, 8, 8)
    want = model(x)
    relu.register_forward_hook(lambda *given: seen.append(given[2].shape))
    assert torch.equal(model(x), want) and seen == [(E, 5, 4, 6, 6)]


def test_packed_folds_batch_norms():
    modules = members(norm=True)
    ensemble = EnsembleSequential.from_modules(modules)
    x = torch.randn(20, 1, 14, 14)
    for _ in range(3):
        ensemble(torch.randn(20, 1, 14, 14))
    before = copy.deepcopy(ensemble.state_dict())
    packed = ensemble.packed()
    assert not any(isinstance(m, (EnsembleBatchNorm2d, nn.Dropout)) for m in packed.modules())
    assert not packed.training and not any(p.requires_grad for p in packed.parameters())
    torch.testing.assert_close(packed(x), ensemble.eval()(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(t, before[name]) for name, t in ensemble.state_dict().items())
    front = EnsembleSequential(EnsembleBatchNorm2d(E, 1), EnsembleConv2d(E, 1, 2, 3))
    with pytest.raises(ValueError, match="right after an EnsembleConv2d"):
        front.packed()


def test_a_subclass_stays_what_it_is():
    class Doubled(EnsembleConv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = EnsembleSequential(Doubled(E, 1, 4, 3), nn.ReLU(), EnsembleMaxPool2d(2)).eval()
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(model.packed()(x), model(x))
    layer = next(model.children())
    for freeze in (model.sparse, lambda: model.quantize(x), layer.sparse, lambda: layer.quantize(x)):
        with pytest.raises(ValueError, match=r"got Doubled with a forward of its own"):
            freeze()
    with pytest.raises(ValueError, match="right after an EnsembleConv2d"):
        EnsembleSequential(Doubled(E, 1, 4, 3), EnsembleBatchNorm2d(E, 4)).packed()


class Scaled(EnsembleMLP):
    def forward(self, input: Tensor, **options) -> Tensor:
        return 10 * super().forward(input, **options)


@pytest.mark.parametrize("freeze", ["packed", "sparse", "quantize"])
def test_what_a_class_or_a_hook_computes_is_kept_or_refused(freeze):
    x = torch.randn(30, 20)

    def frozen(model):
        return getattr(model, freeze)(*([x] if freeze == "quantize" else []))

    with pytest.raises(ValueError, match="got Scaled with a forward of its own"):
        frozen(Scaled(E, 20, [8], 3))
    sequence = EnsembleSequential(Scaled(E, 20, [8], 3)).eval()
    if freeze == "packed":
        assert torch.equal(frozen(sequence)(x), sequence(x))
    else:
        with pytest.raises(ValueError, match=r"layer 0.*got Scaled with a forward of its own"):
            frozen(sequence)
    layer = EnsembleLinear(E, 20, 20)
    layer.register_forward_hook(lambda module, inputs, output: 3 * output)
    for model in (layer, EnsembleSequential(layer)):
        with pytest.raises(
            ValueError, match="expected modules without hooks of forward, got some on EnsembleLinear"
        ):
            frozen(model)


def test_a_layer_used_twice_counts_twice():
    relu, pool = nn.ReLU(), EnsembleMaxPool2d(2)
    model = EnsembleSequential(
        EnsembleConv2d(E, 1, 4, 3, padding=1),
        relu,
        pool,
        EnsembleConv2d(E, 4, 4, 3, padding=1),
        relu,
        pool,
        Flatten(),
        tied := EnsembleLinear(E, 64, 64),
        relu,
        tied,
    ).eval()
    x = torch.randn(20, 1, 16, 16)
    with torch.no_grad():
        want = model(x)
        assert torch.equal(model.packed()(x), want) and torch.equal(model.sparse()(x), want)
        assert (model.quantize(x)(x) - want).square().mean() < 0.01 * want.square().mean()
        for m, member in enumerate(model.to_modules()):
            torch.testing.assert_close(member(x), want[m])
        assert torch.equal(model.select([1])(x), want[1:2])


def test_sequences_in_a_sequence_are_frozen_too():
    inner = EnsembleSequential(EnsembleConv2d(E, 1, 4, 3), EnsembleBatchNorm2d(E, 4), nn.ReLU())
    model = EnsembleSequential(inner, nn.Sequential(Flatten(), EnsembleLinear(E, 144, 5)), nn.ReLU()).eval()
    for module in model.modules():
        if isinstance(module, EnsembleBatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(9, 1, 8, 8)
    with torch.no_grad():
        want = model(x)
        packed = model.packed()
        assert not any(isinstance(module, EnsembleBatchNorm2d) for module in packed.modules())
        torch.testing.assert_close(packed(x), want)
        assert torch.equal(model.sparse()(x), packed(x))
        small = model.quantize(x)
        assert not list(small.parameters())
        assert (small(x) - want).square().mean() < 0.01 * want.square().mean()
        torch.testing.assert_close(model.member(1)(x), want[1])
    inner.register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(ValueError, match="packed: layer 0: expected modules without forward hooks"):
        model.packed()


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = EnsembleLinear(E, 6, 6)

    def forward(self, input: Tensor) -> Tensor:
        return input + self.linear(input)


def test_ensembles_in_other_modules_are_refused_by_name():
    model = EnsembleSequential(EnsembleLinear(E, 6, 6), Wrapped())
    assert model(torch.randn(4, 6)).shape == (E, 4, 6)
    for freeze in (
        model.packed,
        model.sparse,
        lambda: model.quantize(torch.randn(4, 6)),
        lambda: model.member(0),
    ):
        with pytest.raises(
            ValueError, match=r"layer 1: expected layers, .* got a Wrapped with a EnsembleLinear"
        ):
            freeze()


def test_a_class_with_a_constructor_of_its_own():
    class Net(EnsembleSequential):
        def __init__(self, members: int, width: int = 8):
            super().__init__(EnsembleLinear(members, 20, width), nn.ReLU(), EnsembleLinear(members, width, 3))

    model, x = Net(E), torch.randn(9, 20)
    with torch.no_grad():
        assert torch.equal(model.packed()(x), model(x)) and torch.equal(model.sparse()(x), model(x))

    class Other(Net):
        def forward(self, input: Tensor) -> Tensor:
            return -super().forward(input)

    with pytest.raises(ValueError, match="forward of EnsembleSequential alone, got Other"):
        Other(E).packed()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Upsample(scale_factor=2),
        nn.Dropout2d(0.5),
        nn.Softmax(1),
        nn.BatchNorm3d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.GroupNorm(2, 4),
        nn.ReflectionPad2d(1),
        nn.Sequential(nn.ReLU(), nn.Flatten()),
        nn.PixelShuffle(2),
    ],
    ids=str,
)
def test_layers_that_would_mix_members_are_refused(layer):
    with pytest.raises(
        ValueError, match=r"EnsembleSequential: modules\[1\]: expected .* which knows of members"
    ):
        EnsembleSequential(EnsembleConv2d(E, 1, 4, 3), layer)


def test_select_seeds_and_saving():
    model = EnsembleSequential(
        EnsembleConv2d(E, 1, 4, 3), nn.ReLU(), Flatten(), EnsembleLinear(E, 4 * 6 * 6, 2)
    )
    model.reset_parameters(seeds=[1, 2, 3])
    torch.manual_seed(2)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name][1], value)
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(model.select([2, 0])(x), model(x)[[2, 0]])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    other.reset_parameters()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), model(x))
    chosen = copy.deepcopy(model)
    parameters = list(chosen.parameters())
    chosen.select_([1])
    assert all(a is b for a, b in zip(parameters, chosen.parameters(), strict=True))
    assert torch.equal(chosen(x), model(x)[1:2])


def test_fit_trains_it():
    x = torch.randn(60, 1, 8, 8)
    y = (x.mean((1, 2, 3)) > 0).long()
    model = EnsembleSequential(
        EnsembleConv2d(E, 1, 4, 3), nn.ReLU(), EnsembleMaxPool2d(2), Flatten(), EnsembleLinear(E, 36, 2)
    )
    model.reset_parameters(seeds=range(E))
    history = pyens.training.fit(
        model,
        (x, y),
        loss="cross_entropy",
        epochs=30,
        batch_size=20,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        progress=False,
    )
    losses = torch.as_tensor(history.train_loss)
    assert (losses[-1] < 0.5 * losses[0]).all()


@pytest.mark.parametrize(
    "modules,error,message",
    [
        ([nn.ReLU()], ValueError, "expected ensembles of one size, got none"),
        ([EnsembleLinear(2, 3, 4), EnsembleLinear(3, 4, 1)], ValueError, "ensembles of 2, 3 members"),
        ([EnsembleLinear(2, 3, 4), "relu"], TypeError, r"modules\[1\]: expected a module, got str"),
        ([EnsembleConv2d(2, 1, 1, 1), nn.Flatten()], ValueError, "expected pyens.nn.Flatten"),
        ([EnsembleConv2d(2, 1, 1, 1), nn.MaxPool2d(2)], ValueError, "expected EnsembleMaxPool2d"),
        ([EnsembleConv2d(2, 1, 1, 1), nn.BatchNorm2d(2)], ValueError, "expected EnsembleBatchNorm2d"),
    ],
    ids=str,
)
def test_refuses_layers(modules, error, message):
    with pytest.raises(error, match=message):
        EnsembleSequential(*modules)


@pytest.mark.parametrize(
    "change,message",
    [
        (
            lambda m: m.append(nn.LayerNorm(4)),
            r"modules: expected as many layers in each, got \[11, 12\]|layers",
        ),
        (
            lambda m: m.__setitem__(1, nn.GELU()),
            r"modules\[1\]: layer 1: expected ReLU like modules\[0\], got GELU",
        ),
        (lambda m: m.__setitem__(0, nn.Conv2d(1, 5, 5)), r"modules\[1\]: layer 0: expected Conv2d"),
        (lambda m: m.__setitem__(2, nn.MaxPool2d(2, ceil_mode=True)), "layer 2: expected MaxPool2d"),
        (lambda m: m.register_forward_hook(lambda *_: None), "without forward hooks"),
        (lambda m: m[1].register_forward_hook(lambda *_: None), "without forward hooks"),
    ],
    ids=str,
)
def test_refuses_members(change, message):
    modules = [network(), network()]
    change(modules[1])
    with pytest.raises(ValueError, match=message):
        EnsembleSequential.from_modules(modules)


def test_refuses_unknown_layers_by_name():
    with pytest.raises(ValueError, match=r"layer 0: expected Conv2d, Linear.*got LSTM"):
        EnsembleSequential.from_modules([nn.Sequential(nn.LSTM(3, 3))])
    with pytest.raises(ValueError, match=r"expected nn\.Sequential, got Linear"):
        EnsembleSequential.from_modules([nn.Linear(3, 3)])


def test_pools_take_members_and_examples():
    x = torch.randn(E, 4, 2, 7, 8)
    for ours, theirs in (
        (EnsembleMaxPool2d(2, 1, padding=1), nn.MaxPool2d(2, 1, padding=1)),
        (EnsembleAvgPool2d((2, 3), count_include_pad=False), nn.AvgPool2d((2, 3), count_include_pad=False)),
    ):
        assert torch.equal(ours(x), torch.stack([theirs(one) for one in x]))
        assert torch.equal(ours(x[0]), theirs(x[0]))
    assert Flatten()(x).shape == (E, 4, 112) and Flatten()(x[0]).shape == (4, 112)
