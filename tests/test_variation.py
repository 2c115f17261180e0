"""pyens.variation: activation strength of any module, and its statistics in one pass."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pyens
from pyens import EnsembleLinear, EnsembleMLP
from pyens.nn import Ensemble, EnsembleEmbedding, MaskedMLP, TabularEnsemble
from pyens.ops import activation_strength
from pyens.reference.activation_strength import pack_bits
from pyens.variation import ActivationStatistics, ActivationStrength, strength_of

# --- strength_of -------------------------------------------------------------------------------------------


def statistics_of(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    statistics = ActivationStatistics()
    statistics.observe(module, x)
    return {"mean": statistics.mean, "std": statistics.std}


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "elu", "softplus", "tanh"])
def test_hooks_on_a_sequential_give_what_the_op_gives(activation, pack):
    ensemble = pyens.EnsembleMLP(3, 8, [9, 7], 2, activation=activation, dtype=torch.float64)
    x = torch.randn(200, 8, dtype=torch.float64)
    for i in range(3):
        member = ensemble.member(i)
        found = statistics_of(member, x)
        got = strength_of(member, x, **found, bitpack=pack)
        one = ensemble.select([i])
        expected = activation_strength(
            x, list(one.weights), list(one.biases), **found, activation=activation, bitpack=pack
        )
        assert isinstance(got, ActivationStrength)
        torch.testing.assert_close(got.output, expected.output[0])
        torch.testing.assert_close(got.value, expected.value[0])
        assert torch.equal(got.active, expected.active[0])
        assert not got.output.requires_grad and not got.value.requires_grad


def test_without_statistics_the_value_is_the_activation():
    ensemble = pyens.EnsembleMLP(2, 5, [6, 4], 1)
    x = torch.randn(30, 5)
    for member, model in ((slice(None), ensemble), (0, ensemble.member(0))):
        value = strength_of(model, x).value
        weights, biases = list(ensemble.weights), list(ensemble.biases)
        first = torch.einsum("bi,eoi->ebo", x, weights[0]).add(biases[0].unsqueeze(1)).relu()
        second = torch.einsum("ebi,eoi->ebo", first, weights[1]).add(biases[1].unsqueeze(1)).relu()
        torch.testing.assert_close(value, torch.cat([first, second], -1)[member].detach())
        assert torch.equal(strength_of(model, x).active, value > 0)


def test_ensembles_go_through_the_op():
    ensemble = pyens.EnsembleMLP(4, 5, [6, 4], 1, activation="silu")
    x = torch.randn(30, 5)
    found = statistics_of(ensemble, x)
    assert found["mean"].shape == (4, 10)
    expected = activation_strength(
        x, list(ensemble.weights), list(ensemble.biases), **found, activation="silu", bitpack=True
    )
    for model in (ensemble, ensemble.packed()):
        assert all(map(torch.equal, strength_of(model, x, **found, bitpack=True), expected))
        assert torch.equal(expected.output, model(x))


def test_of_a_tabular_ensemble():
    model = TabularEnsemble(3, [(10, 4), (7, 3)], 2, [6, 5], 1, dropout=0.2).eval()
    categorical, numeric = torch.randint(7, (20, 2)), torch.randn(20, 2)
    found = ActivationStatistics()
    output = found.observe(model, categorical, numeric)
    assert torch.equal(output, model(categorical, numeric))
    got = strength_of(model, categorical, numeric=numeric, mean=found.mean, std=found.std)
    assert torch.equal(got.output, output) and got.value.shape == (3, 20, 11)
    alive = found.std > 0
    torch.testing.assert_close(got.value.mean(1)[alive], torch.zeros(int(alive.sum())), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.value.std(1, correction=0)[alive], torch.ones(int(alive.sum())))


class Branches(nn.Module):
    """An activation that is called twice, one of them followed by a step in place, and one of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)
        self.linear = nn.Linear(6, 3)
        self.relu = nn.ReLU(inplace=True)
        self.gelu = nn.GELU()

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        maps = self.relu(self.conv(x.unsqueeze(1)))
        rows = self.relu(self.linear(x)).mul_(100)
        return self.gelu(rows * scale), maps


def test_any_module_in_the_order_of_its_calls():
    model, x = Branches(), torch.randn(5, 6)
    got = strength_of(model, x, scale=0.5)
    maps = model.conv(x.unsqueeze(1)).relu()
    rows = model.linear(x).relu()
    expected = torch.cat([maps.flatten(1), rows, nn.functional.gelu(rows * 50)], 1)
    torch.testing.assert_close(got.value, expected.detach())
    assert isinstance(got.output, tuple) and torch.equal(got.output[1], maps)
    assert torch.equal(got.active, expected > 0)
    only = strength_of(model, x, activations=(nn.GELU,))
    torch.testing.assert_close(only.value, nn.functional.gelu(rows * 100).detach())
    assert torch.equal(strength_of(model, x, bitpack=True, scale=0.5).active, pack_bits(got.active))
    # No hook stays behind.
    assert not any(m._forward_hooks for m in model.modules())


def test_no_hook_stays_behind_an_error():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(5, 1))
    with pytest.raises(RuntimeError):
        strength_of(model, torch.randn(2, 3))
    assert not any(m._forward_hooks for m in model.modules())


def test_masked_members_are_those_of_the_compact_ensemble():
    model, x = MaskedMLP(3, 4, [8, 6], 2, scale=2.0), torch.randn(5, 4)
    assert all(map(torch.equal, strength_of(model, x), strength_of(model.compact(), x)))


SEQUENTIAL = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
BAD = {
    "no activation": (nn.Linear(3, 4), {}, r"expected one that calls ReLU, .*got Linear"),
    "no MLP": (EnsembleEmbedding(2, 3, 4), {}, r"expected one that calls ReLU, .*got EnsembleEmbedding"),
    "mean alone": (SEQUENTIAL, {"mean": torch.zeros(4)}, r"std: expected both of mean and std, or neither"),
    "std alone": (SEQUENTIAL, {"std": torch.ones(4)}, r"mean: expected both of mean and std, or neither"),
    "length": (
        SEQUENTIAL,
        {"mean": torch.zeros(4), "std": torch.ones(5)},
        r"std: expected \[4\], .*got shape \[5\]",
    ),
    "batch": (
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(0), nn.ReLU()),
        {},
        r"module: expected \[2, ...\] from ReLU\(\), got shape \[8\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    module, arguments, message = BAD[case]
    x = torch.tensor([0, 2]) if isinstance(module, EnsembleEmbedding) else torch.randn(2, 3)
    with pytest.raises(ValueError, match=f"^strength_of: .*{message}"):
        strength_of(module, x, **arguments)


# --- ActivationStatistics ----------------------------------------------------------------------------------


def activations(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """With an offset that one-pass sums of squares would not survive."""
    return (torch.randn(shape, dtype=torch.float64) + 1000 * torch.randn(shape[-1])).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1000, 7), (3, 1000, 7)], ids=str)
@pytest.mark.parametrize("size", [1, 7, 333, 1000])
def test_one_pass_finds_what_two_passes_find(size, shape, dtype):
    h = activations(shape, dtype)
    statistics, parts = ActivationStatistics(), []
    for batch in h.split(size, dim=-2):
        statistics.update(batch)
        parts.append(ActivationStatistics())
        parts[-1].update(batch)
    merged = ActivationStatistics()
    for part in reversed(parts):
        merged.merge(part)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    for found in (statistics, merged):
        mean, std = found.compute()
        assert found.count == 1000 and mean.dtype == std.dtype == expected
        torch.testing.assert_close(mean, h.double().mean(-2).to(expected), **tolerance)
        torch.testing.assert_close(std, h.double().std(-2, correction=0).to(expected), **tolerance)
        assert torch.equal(found.mean, mean) and torch.equal(found.std, std)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_batches_of_any_size(sizes):
    h = activations((sum(sizes), 3), torch.float64)
    statistics = ActivationStatistics()
    for batch in h.split(sizes):
        statistics.update(batch)
    assert statistics.count == len(h)
    if len(h) == 0:
        with pytest.raises(ValueError, match=r"^ActivationStatistics.mean: expected at least one example"):
            statistics.compute()
        return
    torch.testing.assert_close(statistics.mean, h.mean(0))
    torch.testing.assert_close(statistics.std, h.std(0, correction=0), atol=1e-9, rtol=1e-9)


def test_a_unit_that_never_changes_has_no_deviation():
    h = torch.randn(1001, 4)
    h[:, 0], h[:, 1] = 0.1, 0
    statistics = ActivationStatistics()
    for batch in h.split(17):
        statistics.update(batch)
    assert statistics.std[:2].tolist() == [0, 0] and (statistics.std[2:] > 0).all()
    assert statistics.mean[:2].tolist() == [h[0, 0].item(), 0]


def test_nan_and_inf_stay_in_their_unit():
    h = torch.randn(60, 4)
    clean = ActivationStatistics()
    clean.update(h)
    for at in (0, 7, 33):
        poisoned = h.clone()
        poisoned[at, 1], poisoned[at, 2] = float("nan"), float("inf")
        statistics = ActivationStatistics()
        for batch in poisoned.split(10):
            statistics.update(batch)
        torch.testing.assert_close(statistics.mean[::3], clean.mean[::3])
        torch.testing.assert_close(statistics.std[::3], clean.std[::3])
        assert statistics.mean[1].isnan() and statistics.mean[2] == float("inf")
        assert statistics.std[1:3].isnan().all()


def test_merging_leaves_the_other_as_it_is():
    one, two, empty = ActivationStatistics(), ActivationStatistics(), ActivationStatistics()
    h = torch.randn(20, 3)
    one.update(h[:5])
    two.update(h[5:])
    before = [t.clone() for t in two.compute()]
    one.merge(empty)
    one.merge(two)
    one.update(h)
    assert all(map(torch.equal, two.compute(), before))
    torch.testing.assert_close(one.mean, h.mean(0))
    empty.merge(two)
    empty.update(h)
    assert all(map(torch.equal, two.compute(), before)) and empty.count == 35


def test_no_gradient_is_kept():
    statistics = ActivationStatistics()
    statistics.update(torch.randn(5, 3, requires_grad=True) * 2)
    assert not statistics.mean.requires_grad and not statistics.std.requires_grad


def test_bad_activations():
    statistics = ActivationStatistics()
    for name in ("mean", "std"):
        with pytest.raises(ValueError, match=rf"^ActivationStatistics.{name}: expected at least one example"):
            getattr(statistics, name)
    with pytest.raises(TypeError, match=r"activations: expected floating point, got torch.int64"):
        statistics.update(torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"activations: expected \[B, units\] or .*got shape \[3\]"):
        statistics.update(torch.zeros(3))
    statistics.update(torch.zeros(3, 2))
    for shape in ((3, 4), (2, 3, 2)):
        with pytest.raises(ValueError, match=r"expected units of shape \[2\] as before, got"):
            statistics.update(torch.zeros(shape))


def test_with_real_layers_of_every_size():
    # What `observe` finds is what the modules' own activations are.
    x = torch.randn(500, 6, dtype=torch.float64)
    for widths in itertools.product((1, 8), (3, 9)):
        model = nn.Sequential(
            nn.Linear(6, widths[0]), nn.ELU(), nn.Linear(*widths), nn.SiLU(), nn.Linear(widths[1], 1)
        )
        model.double()
        found = ActivationStatistics()
        for batch in x.split(64):
            assert torch.equal(found.observe(model, batch), model(batch))
        h = torch.cat([model[:2](x), model[:4](x)], 1).detach()
        torch.testing.assert_close(found.mean, h.mean(0))
        torch.testing.assert_close(found.std, h.std(0, correction=0))


# --- strength_of an ensemble of one's own ------------------------------------------------------------------


class Own(Ensemble):
    def __init__(self, members: int, between: nn.Module) -> None:
        super().__init__()
        self.ensemble_size = members
        self.net = nn.Sequential(EnsembleLinear(members, 6, 9), between, EnsembleLinear(members, 9, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("members, rows", [(3, 5), (1, 5), (4, 4)])
def test_an_ensemble_of_ones_own_keeps_its_member_axis(members, rows):
    mlp, own, x = EnsembleMLP(members, 6, [9], 2), Own(members, nn.ReLU()), torch.randn(rows, 6)
    for layer in (0, 1):
        own.net[2 * layer].weight, own.net[2 * layer].bias = mlp.weights[layer], mlp.biases[layer]
    each = {"mean": torch.randn(members, 9), "std": torch.rand(members, 9) + 0.5}
    for found in ({}, {name: value[0] for name, value in each.items()}, each):
        got, expected = (strength_of(model, x, **found, bitpack=True) for model in (own, mlp))
        assert got.value.shape == (members, rows, 9)
        torch.testing.assert_close(got.value, expected.value)
        assert torch.equal(got.active, expected.active) and torch.equal(got.output, own(x))


def test_activations_without_members_are_named():
    own = Own(3, nn.Sequential(nn.Flatten(0, 1), nn.ReLU(), nn.Unflatten(0, (3, -1))))
    with pytest.raises(
        ValueError, match=r"strength_of: module: expected \[3, B, ...\] from ReLU\(\), got shape"
    ):
        strength_of(own, torch.randn(5, 6))
