"""The Masksembles layers, and networks that they are put into, against the published semantics."""

import copy
import importlib.util
import pickle
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pyens import reference
from pyens.nn import (
    MaskedConv2d,
    MaskedMLP,
    Masksembles1D,
    Masksembles2D,
    Masksembles3D,
    forward_tiled,
    insert_masksembles_,
    set_mask_mode_,
)
from pyens.nn._assignment import assign_masks

LAYERS = {
    "1d": (Masksembles1D, (12,)),
    "1d over time": (Masksembles1D, (5, 12)),
    "2d": (Masksembles2D, (12, 3, 2)),
    "3d": (Masksembles3D, (12, 3, 2, 2)),
}
MODES = ["grouped", "round_robin", "random"]
layers = pytest.mark.parametrize("kind", LAYERS)


def make(kind: str, n: int = 4, scale: float = 2.0, **kwargs) -> nn.Module:
    return LAYERS[kind][0](12, n, scale, **kwargs)


def data(kind: str, b: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(b, *LAYERS[kind][1]).to(dtype)


def published(x: Tensor, masks: Tensor) -> Tensor:
    """What the official layers compute, restated: N equal groups of rows times a mask each."""
    n = masks.shape[0]
    groups = x.reshape(n, x.shape[0] // n, *x.shape[1:])
    masks = masks.to(x.dtype)
    if x.dim() > 3:
        masks = masks.reshape(n, 1, -1, *[1] * (x.dim() - 2))
    else:
        masks = masks.reshape(n, *[1] * (x.dim() - 1), -1)
    return (groups * masks).reshape(x.shape)


def masks_met(layer: nn.Module, kind: str, b: int) -> list[int]:
    """The mask that each of b rows meets, by what is left of ones. The masks must differ."""
    output = layer(torch.ones_like(data(kind, b)))
    axis = -1 if kind.startswith("1d") else 1
    left = output.movedim(axis, 1).flatten(2)[..., 0] if output.dim() > 2 else output
    masks = [mask.tolist() for mask in layer.masks]
    assert len({tuple(mask) for mask in masks}) == len(masks)
    return [masks.index(row.bool().tolist()) for row in left]


def assert_same_state(got: nn.Module, expected: nn.Module) -> None:
    state = got.state_dict()
    assert list(state) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


class Official(nn.Module):
    """What `from_masksembles` may rely on: the attributes of the official layers."""

    def __init__(self, masks: Tensor, parameter: bool = False) -> None:
        super().__init__()
        self.channels, self.n, self.scale = masks.shape[-1], masks.shape[0], 2.0
        if parameter:  # as versions before 1.1 have it
            self.masks = nn.Parameter(masks, requires_grad=False)
        else:
            self.register_buffer("masks", masks, persistent=False)


# --- what the layers compute -----------------------------------------------------------------------


@layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_computes_what_the_published_layers_do(kind, dtype):
    layer = make(kind)
    for b in (4, 12):
        x = data(kind, b, dtype)
        output = layer(x)
        assert output.dtype == dtype and torch.equal(output, published(x, layer.masks))


@pytest.mark.parametrize("kind", ["1d", "2d"])
def test_parity_with_the_masksembles_package(kind):
    package = pytest.importorskip("masksembles.torch")
    official = getattr(package, f"Masksembles{kind.upper()}")(12, 4, 2.0)
    layer = LAYERS[kind][0].from_masksembles(official)
    assert torch.equal(layer.masks, official.masks.bool())
    x = data(kind, 8)
    x_official = x.clone().requires_grad_()
    x.requires_grad_()
    output, expected = layer(x), official(x_official)
    assert torch.equal(output, expected)
    grad = torch.randn_like(output)
    output.backward(grad)
    expected.backward(grad)
    assert torch.equal(x.grad, x_official.grad)


def test_parity_of_a_network_with_the_masksembles_package():
    """Weights and masks copied: every mask on every example, and a training batch of one mask each."""
    package = pytest.importorskip("masksembles.torch")
    official = nn.Sequential(
        nn.Linear(6, 16),
        nn.ReLU(),
        package.Masksembles1D(16, 4, 2.0),
        nn.Linear(16, 12),
        nn.ReLU(),
        package.Masksembles1D(12, 4, 2.0),
        nn.Linear(12, 3),
    ).double()
    layers = [
        Masksembles1D.from_masksembles(layer) if isinstance(layer, package.Masksembles1D) else layer
        for layer in official
    ]
    network, model = nn.Sequential(*layers), MaskedMLP.from_module(nn.Sequential(*layers))
    x = torch.randn(8, 6).double()
    tiled = official(x.repeat(4, 1)).unflatten(0, (4, 8))
    torch.testing.assert_close(forward_tiled(network, x), tiled)
    torch.testing.assert_close(model(x), tiled)
    assert tiled.std(0).min() > 0

    y = torch.randn(8, 3).double()
    expected = nn.functional.mse_loss(official(x), y)
    loss = model.loss(x, y, loss="mse", mode="grouped")
    torch.testing.assert_close(loss, expected)
    linears = [layer for layer in official if isinstance(layer, nn.Linear)]
    theirs = torch.autograd.grad(expected, [p.weight for p in linears] + [p.bias for p in linears])
    ours = torch.autograd.grad(loss, [*model.weights, *model.biases])
    torch.testing.assert_close(ours, theirs)


@layers
@pytest.mark.parametrize("b", [0, 1, 3, 4, 5, 11, 13])
def test_any_batch_size_in_the_groups_of_tensor_split(kind, b):
    layer = make(kind)
    x = data(kind, b)
    parts = [
        published(part, mask.unsqueeze(0))
        for part, mask in zip(x.tensor_split(4), layer.masks, strict=True)
        if len(part) > 0
    ]
    assert torch.equal(layer(x), torch.cat([x[:0], *parts]))


@given(st.integers(0, 40), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_which_row_meets_which_mask(b, n, seed):
    layer = Masksembles1D(n, n, 1.0, mode="round_robin")
    layer.masks.copy_(torch.eye(n))
    ones = torch.ones(b, n)

    def met() -> list[int]:
        return layer(ones).argmax(1).tolist()

    assert met() == [row % n for row in range(b)]
    layer.mode = "grouped"
    assert met() == [k for k, part in enumerate(torch.arange(b).tensor_split(n)) for _ in part]
    set_mask_mode_(layer, "random", seed=seed)
    assigned = met()
    assert assigned == met()
    counts = [assigned.count(k) for k in range(n)]
    assert max(counts) <= -(-b // n) and sum(counts) == b
    if b % n == 0:
        assert min(counts) == b // n
    index = torch.randint(n, (b,))
    assert layer(ones, index).argmax(1).tolist() == index.tolist()


def test_random_rows_meet_every_mask_equally_often():
    layer = Masksembles1D(3, 3, 1.0)
    layer.masks.copy_(torch.eye(3))
    met = torch.zeros(4, 3)
    for seed in range(900):
        met += set_mask_mode_(layer, "random", seed=seed)(torch.ones(4, 3))
    assert (met / 900 - 1 / 3).abs().max() < 0.08  # five standard errors


@pytest.mark.parametrize("mode", MODES)
def test_rows_meet_the_same_masks_on_every_device(device, mode):
    seed = torch.tensor(5)
    for b in (0, 1, 7, 12):
        there, here = assign_masks(mode, b, 4, seed.to(device)), assign_masks(mode, b, 4, seed)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(there, here, strict=True))


@pytest.mark.cuda
@layers
def test_the_same_bits_on_cuda(kind):
    layer, x = make(kind), data(kind, 7)
    there = make(kind).cuda()
    there.load_state_dict(layer.state_dict())
    for mode in MODES:
        set_mask_mode_(layer, mode, seed=3)
        set_mask_mode_(there, mode, seed=3)
        assert torch.equal(there(x.cuda()).cpu(), layer(x))


@layers
def test_every_mode_has_one_mask_for_all_of_a_row(kind):
    layer = make(kind)
    x = data(kind, 7)
    for mode in MODES:
        set_mask_mode_(layer, mode, seed=3)
        index = torch.tensor(masks_met(layer, kind, 7))
        expected = torch.cat(
            [published(row.unsqueeze(0), layer.masks[k : k + 1]) for row, k in zip(x, index, strict=True)]
        )
        assert torch.equal(layer(x), expected) and torch.equal(layer(x, index), expected)
        assert torch.equal(layer.eval()(x), layer.train()(x))


@layers
def test_tiled(kind):
    layer = make(kind, mode="tiled")
    x = data(kind, 3)
    expected = torch.cat([published(x, mask.unsqueeze(0)) for mask in layer.masks])
    assert torch.equal(layer(x), expected)
    assert layer(x[:0]).shape == (0, *x.shape[1:])


@layers
def test_masked_channels_are_selected_not_multiplied(kind):
    layer = make(kind)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.full_like(data(kind, 4), bad).requires_grad_()
        output = layer(x)
        kept = layer(torch.ones_like(x)).bool()
        assert (output[~kept] == 0).all() and not output[kept].isfinite().any()
        output.backward(torch.ones_like(output))
        assert torch.equal(x.grad, kept.to(x.dtype))


@layers
def test_all_masks_at_scale_one_change_nothing(kind):
    x = data(kind, 6)
    assert torch.equal(make(kind, scale=1.0)(x), x)


@layers
def test_the_order_of_masks_is_that_of_the_groups(kind):
    layer = make(kind)
    order = torch.tensor([2, 0, 3, 1])
    permuted = copy.deepcopy(layer)
    permuted.masks.copy_(layer.masks[order])
    x = data(kind, 3)
    assert torch.equal(forward_tiled(permuted, x), forward_tiled(layer, x)[order])
    permuted.masks.copy_(layer.masks[:1].expand(4, -1))
    same = forward_tiled(permuted, x)
    assert torch.equal(same, same[:1].expand_as(same))


@layers
def test_gradients(kind):
    layer = make(kind)
    for mode in (*MODES, "tiled"):
        layer.mode = mode
        assert torch.autograd.gradcheck(layer, data(kind, 3, torch.float64).requires_grad_())


def test_reference_takes_an_index_or_groups():
    x = torch.randn(5, 3, 2, 2)
    masks = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool)
    expected = x.clone()
    expected[:3, 1] = 0
    expected[3:, 0] = 0
    assert torch.equal(reference.mask_channels(x, masks), expected)
    assert torch.equal(reference.mask_channels(x, masks, torch.tensor([0, 0, 0, 1, 1])), expected)


# --- construction, state, conversion -----------------------------------------------------------------


def test_masks_come_from_the_generator():
    a, b, c = (Masksembles2D(64, 4, 2.0, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a.masks, b.masks) and not torch.equal(a.masks, c.masks)
    assert a.masks.dtype == torch.bool and a.masks.any(0).all()
    assert len(list(a.parameters())) == 0
    assert "64, num_masks=4, scale=2.0, mode=grouped" in repr(a)


@layers
def test_reload_gives_the_same_output(kind, tmp_path):
    layer, other = make(kind), make(kind)
    x = data(kind, 8)
    assert list(layer.state_dict()) == ["masks"] and not torch.equal(layer(x), other(x))
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(layer(x), other(x))
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.double().float()):
        assert torch.equal(again(x), other(x)) and again.masks.dtype == torch.bool


@pytest.mark.parametrize("parameter", [False, True], ids=["buffer", "parameter"])
def test_from_a_live_official_layer(parameter):
    masks = make("2d").masks
    official = Official(masks.float(), parameter).eval()
    state = torch.get_rng_state()
    layer = Masksembles2D.from_masksembles(official)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layer.masks, masks) and layer.masks.data_ptr() != masks.data_ptr()
    assert (layer.channels, layer.num_masks, layer.scale, layer.training) == (12, 4, 2.0, False)
    assert len(list(layer.parameters())) == 0
    x = data("2d", 8)
    assert torch.equal(layer(x), published(x, masks))


def test_from_what_is_no_official_layer():
    with pytest.raises(TypeError, match="expected a layer with masks, n and scale, got Dropout"):
        Masksembles1D.from_masksembles(nn.Dropout())
    good = make("1d").masks.float()
    for masks, message in (
        (good[0], r"expected \[N, C\], got shape \[12\]"),
        (good * 2, "expected zeros and ones, got other values"),
        (good * torch.tensor([1.0, 0, 1, 1]).unsqueeze(1), "expected a one in each, got an empty mask"),
    ):
        with pytest.raises(ValueError, match=f"from_masksembles: masks: {message}"):
            Masksembles1D.from_masksembles(Official(masks))
    wrong = Official(good)
    wrong.n = 3
    with pytest.raises(ValueError, match="module: expected n = 3 masks, got 4"):
        Masksembles1D.from_masksembles(wrong)


def test_loading_refuses_what_are_no_masks():
    layer = make("1d")
    before = layer.masks.clone()
    with pytest.raises(ValueError, match="Masksembles1D: load_state_dict: masks: expected a one in each"):
        layer.load_state_dict({"masks": torch.zeros(4, 12)})
    with pytest.raises(ValueError, match="masks: expected zeros and ones"):
        layer.load_state_dict({"masks": torch.full((4, 12), 0.5)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({"masks": torch.ones(3, 12)})
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})
    assert torch.equal(layer.masks, before)


def test_bad_arguments():
    for kwargs, message in (
        ({"channels": 0}, "channels: expected a positive integer, got 0"),
        ({"num_masks": 0}, "num_masks: expected a positive integer, got 0"),
        ({"scale": 0.9}, "scale: expected at least 1, got 0.9"),
        ({"mode": "each"}, "mode: expected one of grouped, round_robin, random, tiled, got 'each'"),
    ):
        with pytest.raises(ValueError, match=f"Masksembles3D: {message}"):
            Masksembles3D(**({"channels": 8, "num_masks": 4, "scale": 2.0} | kwargs))


def test_bad_inputs():
    for layer, shapes, expected in (
        (Masksembles1D(8, 2, 2.0), [(8,), (3, 7), (3, 8, 7)], "[B, 8] or [B, T, 8]"),
        (Masksembles2D(8, 2, 2.0), [(3, 8), (3, 7, 8, 8), (3, 8, 2, 2, 2)], "[B, 8, H, W]"),
        (Masksembles3D(8, 2, 2.0), [(3, 8, 2, 2), (3, 7, 8, 8, 8)], "[B, 8, D, H, W]"),
    ):
        for shape in shapes:
            message = f"{type(layer).__name__}: input: expected {expected}, got shape {list(shape)}"
            with pytest.raises(ValueError, match=re.escape(message)):
                layer(torch.zeros(shape))


# --- networks ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers by name, a module used twice, and one of a kind that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, bias=False),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1, groups=4),
        )
        self.hidden = nn.Linear(12, 12)
        self.again = self.hidden
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean((2, 3))
        x = torch.relu(self.again(torch.relu(self.hidden(x)))).unsqueeze(1)
        return self.head(torch.relu(self.attention(x, x, x)[0])).squeeze(1)


def masked_names(model: nn.Module) -> list[str]:
    kinds = (Masksembles1D, Masksembles2D, Masksembles3D)
    found = [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, kinds)]
    return [name.removesuffix(".mask") for name in found]


def test_insert_keeps_the_weights():
    model = Net().eval()
    plain = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    assert insert_masksembles_(model, 4, 1.0) is model
    assert masked_names(model) == ["features.2", "features.4", "hidden", "again", "head"]
    assert model.hidden is model.again and isinstance(model.features[2], MaskedConv2d)
    renamed = {re.sub(r"\.(conv|linear)\b", "", name): p for name, p in model.named_parameters()}
    assert renamed.keys() == parameters.keys()
    assert all(renamed[name] is parameter for name, parameter in parameters.items())
    assert not any(module.training for module in model.modules())
    x = torch.randn(6, 3, 8, 8)
    assert torch.equal(model(x), plain(x))  # scale 1: masks of ones


def test_insert_masks_the_inputs_of_layers():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 2))
    first, second, third = model[0], model[2], model[4]
    insert_masksembles_(model, 4, 2.0, generator=torch.Generator().manual_seed(0))
    assert masked_names(model) == ["2", "4"]
    x = torch.randn(8, 6)
    hidden = second(published(torch.relu(first(x)), model[2].mask.masks))
    expected = third(published(torch.tanh(hidden), model[4].mask.masks))
    torch.testing.assert_close(model(x), expected)
    # All masks on all examples: those that the official way has, a batch given N times over.
    tiled = forward_tiled(model, x)
    assert torch.equal(tiled, model(x.repeat(4, 1)).view(4, 8, 2)) and tiled.std(0).min() > 0


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, ["head"], ["features.2", "features.4", "hidden", "again"]),
        (["features.*"], [], ["features.0", "features.2", "features.4"]),
        (["head", "features.?"], ["*.4"], ["features.0", "features.2", "head"]),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    model = insert_masksembles_(Net(), 2, 2.0, include=include, exclude=exclude)
    assert masked_names(model) == expected
    # A second call leaves masked layers as they are.
    remaining = {"features.0", "features.2", "features.4", "hidden", "again", "head"} - set(expected)
    insert_masksembles_(model, 2, 2.0, include=sorted(remaining))
    assert set(masked_names(model)) == {*expected, *remaining}


def test_insert_refuses():
    model = Net()
    before = repr(model)
    for kwargs, message in (
        ({"include": ["heads"]}, "include: expected names of .*head.*, got 'heads'"),
        ({"exclude": ["attention.*"]}, "exclude: expected names of .* layers"),
        ({"include": ["head"], "exclude": ["head"]}, "module: expected layers to put masks before"),
        ({"num_masks": 0}, "num_masks: expected a positive integer"),
        ({"scale": 0.5}, "scale: expected at least 1, got 0.5"),
        ({"mode": "tiled"}, "mode: expected one of grouped, round_robin, random, got 'tiled'"),
    ):
        with pytest.raises(ValueError, match=f"insert_masksembles_: {message}"):
            insert_masksembles_(model, **({"num_masks": 4, "scale": 2.0} | kwargs))
        assert repr(model) == before
    with pytest.raises(ValueError, match="module: expected layers to put masks before, got none"):
        insert_masksembles_(nn.Linear(3, 3), 4, 2.0)
    with pytest.raises(ValueError, match=r"there are none"):
        insert_masksembles_(nn.ReLU(), 4, 2.0, include=["*"])


def test_conv3d():
    model = nn.Sequential(nn.Conv3d(1, 8, 3), nn.ReLU(), nn.Conv3d(8, 2, 3))
    insert_masksembles_(model, 2, 2.0)
    x = torch.randn(4, 1, 6, 6, 6)
    hidden = published(torch.relu(model[0](x)), model[2].mask.masks)
    torch.testing.assert_close(model(x), model[2].conv(hidden))


def test_inserted_network_trains_and_reloads():
    model = insert_masksembles_(Net(), 4, 2.0)
    x, y = torch.randn(10, 3, 8, 8), torch.randn(10, 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        set_mask_mode_(model, "random", seed=step)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    other = insert_masksembles_(Net(), 4, 2.0)
    assert not torch.equal(forward_tiled(other, x), forward_tiled(model, x))
    other.load_state_dict(model.state_dict())
    assert_same_state(other, model)
    assert torch.equal(forward_tiled(other, x), forward_tiled(model, x))


@pytest.mark.parametrize("mode", MODES)
def test_all_layers_give_a_row_the_same_mask(mode):
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 2))
    insert_masksembles_(model, 4, 3.0)
    set_mask_mode_(model, mode, seed=5)
    x = torch.randn(11, 6)
    met = masks_met(model[2].mask, "1d", 11)
    tiled = forward_tiled(model, x)
    assert model[2].mask.mode == mode  # as before
    torch.testing.assert_close(model(x), tiled[met, torch.arange(11)])


def test_a_tiling_layer_saves_what_comes_before_it():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 2))
    insert_masksembles_(model, 4, 3.0)
    x = torch.randn(7, 6)
    expected = forward_tiled(model, x)
    model[2].mask.mode = "tiled"
    torch.testing.assert_close(model(x).view(4, 7, 2), expected)
    torch.testing.assert_close(forward_tiled(model, x), expected)


def test_network_helpers_refuse():
    plain = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="forward_tiled: module: expected one with Masksembles layers"):
        forward_tiled(plain, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="set_mask_mode_: module: expected one with Masksembles layers"):
        set_mask_mode_(plain, "round_robin")
    mixed = nn.Sequential(Masksembles1D(6, 2, 2.0), Masksembles1D(6, 3, 2.0))
    with pytest.raises(
        ValueError, match=r"forward_tiled: module: expected one number of masks, got \[2, 3\]"
    ):
        forward_tiled(mixed, torch.zeros(2, 6))
    with pytest.raises(
        ValueError, match="set_mask_mode_: mode: expected one of grouped, round_robin, random"
    ):
        set_mask_mode_(mixed, "tiled")


def test_forward_tiled_restores_the_modes_after_an_error():
    layer = Masksembles1D(6, 2, 2.0, mode="round_robin")
    with pytest.raises(ValueError, match="Masksembles1D: input"):
        forward_tiled(layer, torch.zeros(2, 5))
    assert layer.mode == "round_robin"


# --- torch-uncertainty -------------------------------------------------------------------------------


def test_state_of_torch_uncertainty_loads():
    """Its layers keep float64 masks in `mask.masks` beside `linear` or `conv`."""
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    insert_masksembles_(model, 4, 2.0)
    conv = MaskedConv2d(12, 5, 3, 4, 2.0)
    masks = make("1d").masks
    weights = {"weight": torch.randn(3, 12), "bias": torch.randn(3)}
    state = model.state_dict() | {"2.mask.masks": masks.double()}
    state |= {f"2.linear.{name}": tensor for name, tensor in weights.items()}
    model.load_state_dict(state)
    x = torch.randn(8, 6)
    expected = nn.functional.linear(published(torch.relu(model[0](x)), masks), **weights)
    torch.testing.assert_close(model(x), expected)

    weights = {"weight": torch.randn(5, 12, 3, 3), "bias": torch.randn(5)}
    conv.load_state_dict({"mask.masks": masks.double()} | {f"conv.{k}": v for k, v in weights.items()})
    x = torch.randn(8, 12, 5, 5)
    torch.testing.assert_close(conv(x), nn.functional.conv2d(published(x, masks), **weights))


def torch_uncertainty_layers() -> ModuleType:
    """The file of its masked layers alone: the package imports lightning, and they need numpy and torch."""
    if (package := importlib.util.find_spec("torch_uncertainty")) is None:
        pytest.skip("torch-uncertainty is not installed")
    file = Path(package.origin).parent / "layers" / "masksembles.py"
    spec = importlib.util.spec_from_file_location("torch_uncertainty_masksembles", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parity_with_torch_uncertainty():
    package = torch_uncertainty_layers()
    for theirs, ours, x in (
        (package.MaskedConv2d(12, 5, 3, 4, 2.0), MaskedConv2d(12, 5, 3, 4, 2.0), data("2d", 8)),
        (
            package.MaskedLinear(12, 5, 4, 2.0),
            insert_masksembles_(nn.ModuleDict({"x": nn.Linear(12, 5)}), 4, 2.0, include=["x"])["x"],
            data("1d", 8),
        ),
    ):
        if x.dim() == 4:
            x = nn.functional.interpolate(x, 6)
        assert not torch.equal(ours.mask.masks, theirs.mask.masks.bool())
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours.mask.masks, theirs.mask.masks.bool())
        torch.testing.assert_close(ours(x), theirs(x))


def test_a_network_of_torch_uncertainty_loads():
    """The keys of a network with its layers are those of the same network after `insert_masksembles_`."""
    package = torch_uncertainty_layers()
    theirs = nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.ReLU(),
        package.MaskedConv2d(12, 16, 3, 4, 2.0, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        package.MaskedLinear(16, 5, 4, 2.0),
    )
    ours = nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    insert_masksembles_(ours, 4, 2.0)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(8, 3, 5, 5)
    torch.testing.assert_close(forward_tiled(ours, x).flatten(0, 1), theirs(x.repeat(4, 1, 1, 1)))


def test_compiles():
    layer = Masksembles2D(12, 4, 2.0)
    for mode in (*MODES, "tiled"):
        layer.mode = mode
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for b in (4, 7):
            x = data("2d", b)
            assert torch.equal(compiled(x), layer(x))
