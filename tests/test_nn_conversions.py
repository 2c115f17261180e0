"""pyens.nn: modules in, modules out, members chosen, stacked parameters loaded, bit for bit."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nn_models import (
    KINDS,
    WIDTHS,
    assert_computes,
    assert_member_is,
    assert_same_state,
    biases,
    dtypes,
    kinds,
    make,
    mlp,
    sequential,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from pyens import EnsembleLinear, EnsembleMLP

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
    "infinite alpha": ([between(nn.ELU(alpha=math.inf))], r"\[0\]: .* got ELU\(alpha=inf"),
    "Softplus beta": ([between(nn.Softplus(beta=2))], r"\[0\]: .* got Softplus\(beta=2"),
    "Softplus threshold": ([between(nn.Softplus(threshold=5))], r"\[0\]: .* got Softplus\(.*threshold=5"),
    "PReLU": ([between(nn.PReLU())], r"\[0\]: .* got PReLU\("),
    "LazyLinear": ([nn.Sequential(nn.LazyLinear(4))], r"\[0\]: .* got them on LazyLinear\("),
    "mixed between members": (
        [between(nn.ReLU()), between(nn.Tanh())],
        r"\[1\]: expected the activation of modules\[0\] \(relu\), got tanh",
    ),
    "two in a row": ([between(nn.ReLU(), nn.ReLU())], r"\[0\]: expected one activation after each nn.Linear"),
    "activation first": (
        [nn.Sequential(nn.ReLU(), nn.Linear(4, 2))],
        r"\[0\]: expected one activation after",
    ),
    "activation of one member last": (
        [between(nn.ReLU()), nn.Sequential(between(nn.ReLU()), nn.Tanh())],
        r"\[1\]: expected the output_activation of modules\[0\] \(identity\), got tanh",
    ),
    "two activations last": (
        [nn.Sequential(between(nn.ReLU()), nn.Tanh(), nn.Tanh())],
        r"\[0\]: expected one activation after each nn.Linear",
    ),
    "no layer": ([nn.Sequential()], r"\[0\]: expected an nn.Linear, or .*, as the last layer"),
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
    "depths": (
        [sequential([4, 4]), sequential([4, 4, 2])],
        r"\[1\]: expected 1 linear layers, got 2",
    ),
    "pruned": ([between(nn.ReLU()), pruned()], r"\[1\]: expected weights that are parameters"),
    "weight norm": ([weight_normed()], r"\[0\]: .* got ParametrizedLinear\("),
    "none": ([], r": expected at least one, got none"),
    "a Linear": ([nn.Linear(4, 2)], r"\[0\]: expected nn.Sequential, got Linear"),
    "a list": ([[nn.Linear(4, 2)]], r"\[0\]: expected nn.Sequential, got list"),
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
    [[], (), slice(2, 2), torch.tensor([]), torch.zeros(4, dtype=torch.bool), torch.tensor([[1]])],
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


def test_load_stacked_does_not_guess_the_layout_of_square_layers():
    for model in (EnsembleMLP(3, 4, [4], 4), EnsembleLinear(3, 4, 4)):
        before = [p.detach().clone() for p in model.parameters()]
        layers = len(model.stacked()[0])
        weights = {f"{i}.weight": torch.randn(3, 4, 4) for i in range(layers)}
        params = weights | {f"{i}.bias": torch.randn(3, 4) for i in range(layers)}
        with pytest.raises(
            ValueError, match=r"load_stacked: layout: expected out_in .*all layers are square"
        ):
            model.load_stacked(params)
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        model.load_stacked(params, layout="out_in")
        x = torch.randn(2, 4)
        other = type(model)(**model.config())
        transposed = {name: t.mT if name.endswith("weight") else t for name, t in params.items()}
        other.load_stacked(transposed, layout="in_out")
        assert torch.equal(other(x), model(x))
    narrow = EnsembleMLP(3, 5, [4], 4)
    wrong = {"0.weight": torch.randn(3, 5, 4), "1.weight": torch.randn(3, 4, 4)}
    wrong |= {f"{i}.bias": torch.randn(3, 4) for i in range(2)}
    with pytest.raises(ValueError, match="load_stacked: params: expected weight tensors"):
        narrow.load_stacked(wrong)
    narrow.load_stacked(wrong, layout="in_out")
    assert torch.equal(narrow.weights[0], wrong["0.weight"].mT)
    with pytest.raises(ValueError, match="load_stacked: layout: expected out_in, in_out or None, got 'io'"):
        narrow.load_stacked(wrong, layout="io")
    EnsembleLinear(3, 1, 1).load_stacked({"weight": torch.ones(3, 1, 1), "bias": torch.ones(3, 1)})


def test_load_stacked_with_many_layers():
    widths = [4] * 14  # "10.weight" comes after "2.weight", whatever the alphabet says
    members = [sequential(widths) for _ in range(2)]
    model = mlp(2, widths)
    model.load_stacked(torch.func.stack_module_state(members)[0], layout="out_in")
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


def test_stacked_parameters_of_another_kind_change_nothing():
    model = EnsembleMLP(2, 3, [4], 1)
    given = {"0.weight": (2, 4, 3), "0.bias": (2, 4), "1.weight": (2, 1, 4), "1.bias": (2, 1)}
    given = {name: torch.zeros(shape) for name, shape in given.items()}
    before = [p.detach().clone() for p in model.parameters()]
    for bad in (given["1.bias"].numpy(), given["1.bias"] * 1j):
        with pytest.raises(TypeError, match=r"load_stacked: params\['1.bias'\]: expected"):
            model.load_stacked(given | {"1.bias": bad})
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_seeds_are_integers():
    with pytest.raises(TypeError, match="reset_parameters: seeds: expected integers"):
        EnsembleMLP(2, 3, [4], 1, seeds=[0.5, 1])
