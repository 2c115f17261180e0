"""pyens.EnsembleLinear, pyens.EnsembleMLP and its packed copy: modules in, modules out, bit for bit."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import pyens
from pyens import EnsembleLinear, EnsembleMLP
from pyens.nn import PackedEnsembleMLP

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
    weights, biases = model._stack()
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


# --- forward -------------------------------------------------------------------------------------


@kinds
@biases
@pytest.mark.parametrize("b", [0, 1, 5, 40])
def test_forward_agrees_with_the_members_one_by_one(device, kind, bias, b):
    model = make(kind, bias=bias, device=device, dtype=torch.float64)
    shared = torch.randn(b, 6, device=device, dtype=torch.float64)
    each = torch.randn(4, b, 6, device=device, dtype=torch.float64)
    assert model(shared).shape == model(each).shape == (4, b, 3)
    for i, module in enumerate(model.to_modules()):
        torch.testing.assert_close(model(shared)[i], module(shared), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model(each)[i], module(each[i]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", KINDS)
def test_forward_of_every_activation(device, activation):
    model = mlp(activation=activation, device=device, dtype=torch.float64)
    x = torch.randn(20, 6, device=device, dtype=torch.float64)
    for i in range(4):
        assert type(model.member(i)[1]) is KINDS[activation]
        torch.testing.assert_close(model(x)[i], model.member(i)(x), rtol=1e-12, atol=1e-12)


def test_without_hidden_layers(device):
    model = EnsembleMLP(3, 6, [], 2, device=device, dtype=torch.float64)
    assert model.hidden_features == () and len(model.weights) == 1
    x = torch.randn(5, 6, device=device, dtype=torch.float64)
    torch.testing.assert_close(model(x)[1], model.member(1)(x), rtol=1e-12, atol=1e-12)
    assert_same_state(EnsembleMLP.from_modules(model.to_modules()), model)


def test_attributes():
    model = mlp(activation="tanh", dtype=torch.bfloat16)
    assert model.ensemble_size == 4 and model.hidden_features == (9, 5)
    assert (model.in_features, model.out_features) == (6, 3)
    assert [list(w.shape) for w in model.weights] == [[4, 9, 6], [4, 5, 9], [4, 3, 5]]
    assert [list(b.shape) for b in model.biases] == [[4, 9], [4, 5], [4, 3]]
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in model.parameters())
    assert len(mlp(bias=False).biases) == 0
    assert EnsembleLinear(4, 6, 3, bias=False).bias is None
    assert all(p.is_meta for p in mlp(device="meta", seeds=range(4)).parameters())


@kinds
def test_forward_refuses_what_does_not_fit(kind):
    model = make(kind)
    for wrong in (torch.randn(5, 7), torch.randn(6), torch.randn(3, 5, 6)):
        with pytest.raises(
            ValueError, match=r"ensemble_mlp: input: expected \[B, 6\] or \[4, B, 6\], got shape"
        ):
            model(wrong)
    with pytest.raises(TypeError, match="ensemble_mlp: input: expected the dtype of"):
        model(torch.randn(5, 6, dtype=torch.float64))


def test_extra_repr():
    assert repr(EnsembleLinear(4, 6, 3, bias=False)) == (
        "EnsembleLinear(ensemble_size=4, in_features=6, out_features=3, bias=False)"
    )
    expected = (
        "ensemble_size=4, in_features=6, hidden_features=[9, 5], out_features=3, activation=silu, bias=True"
    )
    model = mlp(activation="silu")
    assert model.extra_repr() == model.packed().extra_repr() == expected
    assert mlp(bias=False).packed().extra_repr().endswith("bias=False")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: EnsembleLinear(0, 6, 3),
            r"EnsembleLinear: ensemble_size: expected a positive integer, got 0",
        ),
        (
            lambda: EnsembleLinear(2, -1, 3),
            r"EnsembleLinear: in_features: expected a positive integer, got -1",
        ),
        (lambda: EnsembleLinear(2, 6, 3.0), r"EnsembleLinear: out_features: expected .*, got 3\.0"),
        (lambda: EnsembleMLP(0, 6, [5], 3), r"EnsembleMLP: ensemble_size: expected .*, got 0"),
        (lambda: EnsembleMLP(2, None, [5], 3), r"EnsembleMLP: in_features: expected .*, got None"),
        (lambda: EnsembleMLP(2, 6, [5, 0], 3), r"EnsembleMLP: hidden_features\[1\]: expected .*, got 0"),
        (lambda: EnsembleMLP(2, 6, [5], "3"), r"EnsembleMLP: out_features: expected .*, got '3'"),
        (lambda: mlp(activation="swish"), r'EnsembleMLP: activation: expected one of relu, .*, got "swish"'),
    ],
)
def test_bad_sizes(build, message):
    with pytest.raises(ValueError, match="^" + message):
        build()


def test_hidden_features_must_be_a_sequence():
    with pytest.raises(
        TypeError, match="EnsembleMLP: hidden_features: expected a sequence of widths, got 50"
    ):
        EnsembleMLP(2, 6, 50, 3)


# --- initialisation ------------------------------------------------------------------------------


@dtypes
@biases
def test_a_seed_gives_the_bits_of_torch(device, dtype, bias):
    seeds = [7, 0, 123456789, 7]
    model = mlp(bias=bias, dtype=dtype, device=device, seeds=seeds)
    linear = EnsembleLinear(4, 6, 3, bias, dtype=dtype, device=device, seeds=torch.tensor(seeds))
    for i, seed in enumerate(seeds):
        torch.manual_seed(seed)
        assert_member_is(model, i, sequential(bias=bias))
        torch.manual_seed(seed)
        assert_member_is(linear, i, nn.Linear(6, 3, bias=bias))


def test_seeds_leave_the_default_generator_alone():
    before = torch.get_rng_state()
    mlp(seeds=[1, 2, 3, 4])
    assert torch.equal(torch.get_rng_state(), before)


@dtypes
def test_without_seeds_as_modules_built_one_after_the_other(device, dtype):
    torch.manual_seed(3)
    members = [sequential() for _ in range(4)]
    after = torch.get_rng_state()
    torch.manual_seed(3)
    model = mlp(dtype=dtype, device=device)
    assert torch.equal(torch.get_rng_state(), after)
    for i, member in enumerate(members):
        assert_member_is(model, i, member)
    torch.manual_seed(3)
    layers = [nn.Linear(6, 3) for _ in range(4)]
    torch.manual_seed(3)
    linear = EnsembleLinear(4, 6, 3, dtype=dtype, device=device)
    for i, layer in enumerate(layers):
        assert_member_is(linear, i, layer)


@kinds
def test_reset_parameters(kind):
    model, expected = make(kind), make(kind, seeds=[5, 6, 7, 8])
    own = list(model.parameters())
    model.reset_parameters([5, 6, 7, 8])
    assert_same_state(model, expected)
    assert all(
        p is q for p, q in zip(model.parameters(), own, strict=True)
    )  # an optimizer keeps its parameters
    model.reset_parameters()
    assert not torch.equal(model._stack()[0][0], expected._stack()[0][0])


@given(
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6, unique=True),
    widths=st.lists(st.integers(1, 8), min_size=2, max_size=4),
    data=st.data(),
)
def test_a_member_does_not_depend_on_the_others(seeds, widths, data):
    model = mlp(len(seeds), widths, seeds=seeds)
    order = data.draw(st.permutations(range(len(seeds))))
    assert_same_state(mlp(len(seeds), widths, seeds=[seeds[i] for i in order]), model.select(order))
    assert_same_state(mlp(1, widths, seeds=seeds[-1:]), model.select([-1]))


@kinds
def test_number_of_seeds(kind):
    message = "reset_parameters: seeds: expected one for each of the 4 members, got 3"
    with pytest.raises(ValueError, match=message):
        make(kind, seeds=[1, 2, 3])
    model = make(kind)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        model.reset_parameters([1, 2, 3])
    assert_same_state(model, before)


def test_another_default_device_changes_no_bits():
    expected = mlp(seeds=[1, 2, 3, 4])
    with torch.device("meta"):
        model = mlp(seeds=[1, 2, 3, 4], device="cpu")
        chosen = model.select([2, 0])
    assert_same_state(model, expected)
    assert_same_state(chosen, expected.select([2, 0]))


# --- from modules and back -----------------------------------------------------------------------


@biases
@dtypes
@pytest.mark.parametrize("activation", KINDS)
def test_there_and_back(activation, dtype, bias):
    model = mlp(activation=activation, dtype=dtype, bias=bias)
    again = EnsembleMLP.from_modules(model.to_modules())
    assert again.activation == activation and again.hidden_features == model.hidden_features
    assert_same_state(again, model)
    members = [sequential(activation=KINDS[activation], bias=bias, dtype=dtype) for _ in range(3)]
    for member, back in zip(members, EnsembleMLP.from_modules(members).to_modules(), strict=True):
        assert repr(back) == repr(member)
        assert_same_state(back, member)


@biases
@dtypes
def test_there_and_back_linear(dtype, bias):
    layers = [nn.Linear(6, 3, bias=bias, dtype=dtype) for _ in range(4)]
    model = EnsembleLinear.from_modules(layers)
    assert (model.ensemble_size, model.in_features, model.out_features) == (4, 6, 3)
    for layer, back in zip(layers, model.to_modules(), strict=True):
        assert repr(back) == repr(layer)
        assert_same_state(back, layer)
    assert_same_state(EnsembleLinear.from_modules(model.to_modules()), model)


def test_trained_members_keep_their_bits():
    x, y = torch.randn(64, 6), torch.randn(64, 3)
    members = [sequential(activation=nn.Tanh) for _ in range(3)]
    before = copy.deepcopy(members)
    for member in members:
        optimizer = torch.optim.Adam(member.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(member(x), y).backward()
            optimizer.step()
    model = EnsembleMLP.from_modules(members)
    for i, (trained, untrained) in enumerate(zip(members, before, strict=True)):
        assert_member_is(model, i, trained)
        assert_same_state(model.member(i), trained)
        assert not torch.equal(trained[0].weight, untrained[0].weight)


def test_copies_are_independent():
    members = [sequential() for _ in range(3)]
    model = EnsembleMLP.from_modules(members)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for module in (members[1], model.member(1), model.select([1, 2]), *model.to_modules()):
            for parameter in module.parameters():
                parameter.zero_()
    packed = model.packed()
    assert_same_state(model, reference)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_computes(packed, reference)


@kinds
def test_members_by_negative_index_and_out_of_range(kind):
    model = make(kind)
    assert_same_state(model.member(-1), model.member(3))
    assert not torch.equal(
        model.member(-1).state_dict().popitem()[1], model.member(0).state_dict().popitem()[1]
    )
    for i in (4, -5):
        with pytest.raises(IndexError, match=f"member: i: expected below 4, got {i}"):
            model.member(i)


def test_what_changes_no_function_is_accepted():
    for activation in (
        nn.ReLU(inplace=True),
        nn.ELU(alpha=1, inplace=True),
        nn.Softplus(beta=1, threshold=20),
    ):
        members = [nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 2)).double() for _ in range(2)]
        model = EnsembleMLP.from_modules(members)
        x = torch.randn(5, 4).double()
        for i, member in enumerate(members):
            torch.testing.assert_close(model(x)[i], member(x), rtol=1e-12, atol=1e-12)
    no_activation = [nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)) for _ in range(2)]
    assert EnsembleMLP.from_modules(no_activation).activation == "identity"


def between(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), *layers, nn.Linear(4, 2))


def pruned() -> nn.Sequential:
    member = between(nn.ReLU())
    prune.l1_unstructured(member[0], "weight", amount=0.5)
    return member


def weight_normed() -> nn.Sequential:
    member = between(nn.ReLU())
    parametrizations.weight_norm(member[0])
    return member


REFUSED = {
    "tanh-GELU": ([between(nn.GELU(approximate="tanh"))], r"\[0\]: .* got GELU\(approximate='tanh'\)"),
    "ELU alpha": ([between(nn.ELU(alpha=2))], r"\[0\]: .* got ELU\(alpha=2"),
    "Softplus beta": ([between(nn.Softplus(beta=2))], r"\[0\]: .* got Softplus\(beta=2"),
    "Softplus threshold": ([between(nn.Softplus(threshold=5))], r"\[0\]: .* got Softplus\(.*threshold=5"),
    "Dropout": ([between(nn.ReLU(), nn.Dropout(0.1))], r"\[0\]: .* got Dropout\(p=0.1"),
    "LeakyReLU": ([between(nn.LeakyReLU())], r"\[0\]: .* got LeakyReLU\("),
    "LayerNorm": ([between(nn.LayerNorm(4), nn.ReLU())], r"\[0\]: .* got LayerNorm\("),
    "a subclass of Linear": ([nn.Sequential(nn.LazyLinear(4))], r"\[0\]: .* got LazyLinear\("),
    "nested": ([nn.Sequential(between(nn.ReLU()))], r"\[0\]: .* got Sequential\("),
    "mixed in one member": (
        [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))],
        r"\[0\]: expected one activation throughout, got \['relu', 'tanh'\]",
    ),
    "mixed with none": (
        [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))],
        r"\[0\]: expected one activation throughout, got \['identity', 'relu'\]",
    ),
    "mixed between members": (
        [between(nn.ReLU()), between(nn.Tanh())],
        r"\[1\]: expected the activation of modules\[0\] \(relu\), got tanh",
    ),
    "two in a row": ([between(nn.ReLU(), nn.ReLU())], r"\[0\]: expected one activation after each nn.Linear"),
    "activation first": (
        [nn.Sequential(nn.ReLU(), nn.Linear(4, 2))],
        r"\[0\]: expected one activation after",
    ),
    "activation last": (
        [between(nn.ReLU()), nn.Sequential(nn.Linear(4, 2), nn.ReLU())],
        r"\[1\]: expected an nn.Linear as the last layer",
    ),
    "no layer": ([nn.Sequential()], r"\[0\]: expected an nn.Linear as the last layer"),
    "widths": (
        [sequential([4, 5, 2]), sequential([4, 6, 2])],
        r"\[1\]: expected \[5, 4\], torch.float32, cpu, a bias like modules\[0\], got \[6, 4\]",
    ),
    "dtypes": (
        [sequential([4, 2]), sequential([4, 2], dtype=torch.float64)],
        r"\[1\]: expected \[2, 4\], torch.float32, .* got \[2, 4\], torch.float64",
    ),
    "devices": (
        [sequential([4, 2]), sequential([4, 2]).to("meta")],
        r"\[1\]: expected \[2, 4\], torch.float32, cpu, .* got \[2, 4\], torch.float32, meta",
    ),
    "biases": (
        [sequential([4, 2]), sequential([4, 2], bias=False)],
        r"\[1\]: expected .* a bias like modules\[0\], got .* no bias",
    ),
    "biases in one member": (
        [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))],
        r"\[0\]: expected .* a bias like modules\[0\], got .* no bias",
    ),
    "depths": (
        [sequential([4, 4]), sequential([4, 4, 2])],
        r"\[1\]: expected 1 linear layers, got 2",
    ),
    "pruned": ([between(nn.ReLU()), pruned()], r"\[1\]: expected weights that are parameters"),
    "weight norm": ([weight_normed()], r"\[0\]: .* got ParametrizedLinear\("),
    "none": ([], r": expected at least one, got none"),
    "a Linear": ([nn.Linear(4, 2)], r"\[0\]: expected nn.Sequential, got Linear"),
    "a list": ([[nn.Linear(4, 2)]], r"\[0\]: expected nn.Sequential, got list"),
    "a subclass of Sequential": ([type("Residual", (nn.Sequential,), {})(nn.Linear(4, 2))], r"got Residual"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_from_modules_refuses(case):
    members, message = REFUSED[case]
    with pytest.raises(ValueError, match="^from_modules: modules.*" + message.removeprefix(": ")):
        EnsembleMLP.from_modules(members)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "from_modules: modules: expected at least one, got none"),
        ([nn.Linear(4, 2), between()], r"modules\[1\]: expected nn.Linear, got Sequential"),
        ([nn.Linear(4, 2), nn.Linear(5, 2)], r"modules\[1\]: expected \[2, 4\], .* got \[2, 5\]"),
        (
            [nn.Linear(4, 2), nn.Linear(4, 2, bias=False)],
            r"modules\[1\]: expected .* a bias .* got .* no bias",
        ),
        ([pruned()[0]], r"modules\[0\]: expected weights that are parameters"),
    ],
)
def test_linear_from_modules_refuses(layers, message):
    with pytest.raises(ValueError, match=message):
        EnsembleLinear.from_modules(layers)


def test_pruned_members_once_permanent():
    member = pruned()
    prune.remove(member[0], "weight")
    model = EnsembleMLP.from_modules([member, between(nn.ReLU())])
    assert (model.weights[0][0] == 0).sum() == 8
    assert_member_is(model, 0, member)


@kinds
def test_train_and_eval_are_kept(kind):
    model = make(kind)
    for training in (True, False):
        model.train(training)
        derived = [model.select([0]), model.member(0), *model.to_modules()]
        derived.append(type(model).from_modules(model.to_modules()))
        assert all(module.training == training for d in derived for module in d.modules())


# --- select --------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(
    ("indices", "members"),
    [
        ([2, 0], [2, 0]),
        ((3,), [3]),
        ([1, 1, 1], [1, 1, 1]),
        ([-1, 0, -4], [3, 0, 0]),
        (range(1, 4), [1, 2, 3]),
        (slice(None), [0, 1, 2, 3]),
        (slice(1, None, 2), [1, 3]),
        (slice(-2, None), [2, 3]),
        (torch.tensor([3, 1]), [3, 1]),
        (torch.tensor([3, 1], dtype=torch.uint8), [3, 1]),
        (torch.tensor([False, True, True, False]), [1, 2]),
        ([False, True, True, False], [1, 2]),
        (torch.tensor([-3]), [1]),
    ],
    ids=str,
)
def test_select(kind, indices, members):
    model = make(kind)
    chosen = model.select(indices)
    assert type(chosen) is type(model) and chosen.ensemble_size == len(members)
    for new, old in enumerate(members):
        assert_same_state(chosen.member(new), model.member(old))
    x = torch.randn(3, 6)
    assert torch.equal(chosen(x), model(x)[members])


def test_select_takes_numpy():
    np = pytest.importorskip("numpy")
    model = mlp()
    assert_same_state(model.select(np.array([3, 1])), model.select([3, 1]))
    assert_same_state(model.select(np.array([True, False, True, False])), model.select([0, 2]))
    assert_same_state(model.select([np.int64(2)]), model.select([2]))


@kinds
@pytest.mark.parametrize(
    "indices",
    [[], (), slice(2, 2), torch.tensor([]), torch.zeros(4, dtype=torch.bool), torch.tensor(1)],
    ids=str,
)
def test_select_nothing(kind, indices):
    with pytest.raises(ValueError, match="select: indices: expected at least one member, got"):
        make(kind).select(indices)


@pytest.mark.parametrize("indices", [[0.0], torch.tensor([1.0, 0.0])], ids=str)
def test_select_by_floats(indices):
    with pytest.raises(ValueError, match="select: indices: expected ints, a slice or a boolean mask, got"):
        mlp().select(indices)


@kinds
@pytest.mark.parametrize(
    "indices", [[4], [0, -5], torch.tensor([99]), torch.ones(3, dtype=torch.bool)], ids=str
)
def test_select_out_of_range(kind, indices):
    with pytest.raises(IndexError):
        make(kind).select(indices)


def test_select_on_any_device(device):
    model = mlp(device=device, seeds=range(4))
    for indices in ([2, 0], torch.tensor([2, 0]), torch.tensor([2, 0], device=device)):
        chosen = model.select(indices)
        assert chosen.weights[0].device.type == device.type
        assert torch.equal(chosen.weights[0], model.weights[0][[2, 0]])


@given(e=st.integers(1, 7), b=st.integers(1, 20), data=st.data())
def test_selecting_members_selects_outputs(e, b, data):
    model = mlp(e, seeds=range(e))
    indices = data.draw(st.lists(st.integers(-e, e - 1), min_size=1, max_size=9))
    x = torch.randn(b, 6)
    assert torch.equal(model.select(indices)(x), model(x)[indices])
    assert torch.equal(model.select(indices).packed()(x), model(x)[indices])
    order = data.draw(st.permutations(range(e)))
    back = sorted(range(e), key=order.__getitem__)
    assert_same_state(model.select(order).select(back), model)


# --- load_stacked --------------------------------------------------------------------------------


@biases
@pytest.mark.parametrize("prefix", ["", "backbone.net."])
def test_load_stacked(bias, prefix):
    members = [sequential(bias=bias) for _ in range(4)]
    wrapped: list[nn.Module] = list(members)
    if prefix:
        wrapped = [nn.ModuleDict({"backbone": nn.ModuleDict({"net": member})}) for member in members]
    params, _ = torch.func.stack_module_state(wrapped)
    assert all(name.startswith(prefix) for name in params) and prefix + "0.weight" in params
    model = mlp(bias=bias)
    own = list(model.parameters())
    model.load_stacked(params)
    assert_same_state(model, EnsembleMLP.from_modules(members))
    assert all(p is q and p.requires_grad for p, q in zip(model.parameters(), own, strict=True))
    with torch.no_grad():
        for tensor in params.values():
            tensor.zero_()
    assert_same_state(model, EnsembleMLP.from_modules(members))


def test_load_stacked_with_many_layers():
    widths = [4] * 14  # "10.weight" comes after "2.weight", whatever the alphabet says
    members = [sequential(widths) for _ in range(2)]
    model = mlp(2, widths)
    model.load_stacked(torch.func.stack_module_state(members)[0])
    assert_same_state(model, EnsembleMLP.from_modules(members))


def test_load_stacked_linear_and_another_dtype(device):
    layers = [nn.Linear(6, 3, dtype=torch.float64) for _ in range(4)]
    model = EnsembleLinear(4, 6, 3, device=device)
    model.load_stacked(torch.func.stack_module_state(layers)[0])
    for i, layer in enumerate(layers):
        assert_member_is(model, i, layer)


@pytest.mark.parametrize("case", ["members", "width", "depth", "no biases", "unknown", "two weights swapped"])
def test_load_stacked_refuses_what_does_not_fit(case):
    def stacked(e=4, widths=WIDTHS, bias=True) -> dict[str, Tensor]:
        return torch.func.stack_module_state([sequential(widths, bias=bias) for _ in range(e)])[0]

    good = stacked()
    params, message = {
        "members": (stacked(e=3), r"expected weight tensors of shapes \[\[4, 9, 6\], .*got \[\[3, 9, 6\]"),
        "width": (stacked(widths=[6, 9, 4, 3]), "expected weight tensors of shapes .*got"),
        "depth": (stacked(widths=[6, 9, 5]), "expected weight tensors of shapes .*got"),
        "no biases": (stacked(bias=False), r"expected bias tensors of shapes .*got \[\]"),
        "unknown": ({**good, "1.running_mean": torch.zeros(4)}, r"expected only .*got \['1.running_mean'\]"),
        "two weights swapped": (
            {"0.weight": good["2.weight"], **{k: v for k, v in good.items() if k != "0.weight"}},
            "expected weight tensors of shapes",
        ),
    }[case]
    model = mlp()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="load_stacked: params: " + message):
        model.load_stacked(params)
    assert_same_state(model, before)


# --- state dict, copies --------------------------------------------------------------------------


def saved_and_loaded(state, weights_only=True):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def test_names_in_the_state_dict():
    expected = ["weights.0", "weights.1", "weights.2", "biases.0", "biases.1", "biases.2"]
    assert list(mlp().state_dict()) == list(mlp().packed().state_dict()) == expected
    assert list(mlp(bias=False).state_dict()) == list(mlp(bias=False).packed().state_dict()) == expected[:3]
    assert list(EnsembleLinear(4, 6, 3).state_dict()) == ["weight", "bias"]
    assert list(EnsembleLinear(4, 6, 3, bias=False).state_dict()) == ["weight"]


@kinds
@biases
@dtypes
def test_state_dict_round_trip(kind, bias, dtype):
    model, other = make(kind, bias=bias, dtype=dtype), make(kind, bias=bias, dtype=dtype)
    other.load_state_dict(saved_and_loaded(model.state_dict()))
    assert_same_state(other, model)
    x = torch.randn(3, 6, dtype=dtype)
    assert torch.equal(other(x), model(x))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: saved_and_loaded(module, weights_only=False),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["linear", "mlp", "packed"])
def test_copies(kind, how):
    model = mlp(activation="gelu").packed() if kind == "packed" else make(kind)
    again = COPIES[how](model)
    assert type(again) is type(model) and repr(again) == repr(model) and again.training == model.training
    assert_same_state(again, model)
    for x in (torch.randn(2, 6), torch.randn(40, 6)):
        assert torch.equal(again(x), model(x))
    other = make("mlp" if kind == "packed" else kind)
    expected = other(x)
    before = model(x)
    again.load_state_dict(other.state_dict())
    if kind == "packed":
        again.activation = other.activation
    assert torch.equal(again(x), expected) and torch.equal(model(x), before)


# --- packed --------------------------------------------------------------------------------------


@biases
@dtypes
def test_packed_gives_the_same_bits(dtype, bias):
    model = mlp(19, [6, 17, 9, 3], activation="gelu", bias=bias, dtype=dtype)
    packed = model.packed()
    assert isinstance(packed, PackedEnsembleMLP)
    for b in range(1, 41):
        for x in (torch.randn(b, 6).to(dtype), torch.randn(19, b, 6).to(dtype)):
            assert torch.equal(packed(x), model(x)), b


def test_packed_of_every_activation_and_no_hidden_layer():
    x = torch.randn(3, 6)
    for activation in KINDS:
        model = mlp(activation=activation)
        assert torch.equal(model.packed()(x), model(x))
    model = EnsembleMLP(5, 6, [], 2)
    assert torch.equal(model.packed()(x), model(x))


def test_packed_is_frozen():
    packed = mlp().packed()
    assert list(packed.parameters()) == [] and not packed.training
    assert not packed(torch.randn(2, 6)).requires_grad
    assert packed.ensemble_size == 4 and packed.hidden_features == (9, 5)
    assert (packed.in_features, packed.out_features) == (6, 3)


@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_gives_the_same_bits(bias):
    layer = EnsembleLinear(3, 13, 11, bias)
    packed = layer.packed()
    for b in (0, 1, 3, 9, 10, 40):
        for x in (torch.randn(b, 13), torch.randn(3, b, 13)):
            assert torch.equal(packed(x), layer(x))
    assert not list(packed.parameters())


@pytest.mark.parametrize("assign", [False, True])
def test_packed_and_its_model_interchange_their_state(assign):
    model, other = mlp(), mlp()
    packed = model.packed()
    packed.load_state_dict(other.state_dict(), assign=assign)
    assert_computes(packed, other)
    third = mlp()
    third.load_state_dict(saved_and_loaded(packed.state_dict()))
    assert_computes(packed, third)
    packed.load_state_dict(saved_and_loaded(model.packed().state_dict()), assign=assign)
    assert_computes(packed, model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_packed_follows_another_dtype(dtype):
    model = mlp()
    assert_computes(model.packed().to(dtype), copy.deepcopy(model).to(dtype))
    assert_computes(model.packed().double(), copy.deepcopy(model).double())


def test_packed_inside_another_module_follows_too():
    model, other = mlp(), mlp()
    parent = nn.Sequential(model.packed())
    parent.load_state_dict(nn.Sequential(other).state_dict())
    assert_computes(parent[0], other)
    parent.double()
    assert_computes(parent[0], other.double())
    assert_computes(copy.deepcopy(parent)[0], other)


def test_packed_refuses_the_state_of_another_shape():
    packed, model = mlp().packed(), mlp()
    packed.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for weights\.0"):
        packed.load_state_dict(mlp(5).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        packed.load_state_dict(mlp(bias=False).state_dict())


# --- training ------------------------------------------------------------------------------------


def member_losses(outputs: Tensor, target: Tensor) -> Tensor:
    """Each member's own mean loss, summed."""
    return (outputs - target).square().mean((1, 2)).sum()


@kinds
def test_trains_as_the_members_do_alone(device, kind):
    x = torch.randn(50, 6, device=device, dtype=torch.float64)
    y = torch.randn(50, 3, device=device, dtype=torch.float64)
    model = make(kind, device=device, dtype=torch.float64, seeds=range(4))
    members = model.to_modules()
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (model, *members)]
    losses = []
    for _ in range(10):
        together = member_losses(model(x), y)
        alone = sum(nn.functional.mse_loss(member(x), y) for member in members)
        for optimizer in optimizers:
            optimizer.zero_grad()
        together.backward()
        alone.backward()
        torch.testing.assert_close(together, alone)
        gradients, _ = torch.func.stack_module_state(members)
        gradients = {
            name: torch.stack([dict(m.named_parameters())[name].grad for m in members]) for name in gradients
        }
        expected = make(kind, device=device, dtype=torch.float64)
        expected.load_stacked(gradients)
        for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.data, rtol=1e-9, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(together.item())
    assert losses[-1] < 0.95 * losses[0] and losses == sorted(losses, reverse=True)
    trained = type(model).from_modules(members)
    for ours, theirs in zip(model.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@kinds
def test_functional_call(device, kind):
    model, other = make(kind, device=device), make(kind, device=device)
    x = torch.randn(5, 6, device=device)
    parameters = {name: p.detach() for name, p in other.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, parameters, x), other(x))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, x).square().mean()

    gradients = torch.func.grad(loss)(parameters)
    other(x).square().mean().backward()
    assert set(gradients) == {name for name, _ in other.named_parameters()}
    for name, p in other.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)


def test_compiled_training_step(device):
    torch._dynamo.reset()
    x, y = torch.randn(20, 6, device=device), torch.randn(20, 3, device=device)
    model = mlp(activation="tanh", device=device)
    eager = copy.deepcopy(model)

    def loss(module: EnsembleMLP) -> Tensor:
        return member_losses(module(x), y)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, eager)]
    for _ in range(3):
        for step, module, optimizer in zip((compiled, loss), (model, eager), optimizers, strict=True):
            optimizer.zero_grad()
            step(module).backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert loss(model) < loss(mlp(activation="tanh", device=device))


def test_exported_names():
    assert pyens.EnsembleMLP is EnsembleMLP and pyens.nn.PackedEnsembleMLP is PackedEnsembleMLP
