"""pyens.EnsembleLinear, pyens.EnsembleMLP and its packed copy: what they compute, keep and learn."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nn_models import (
    KINDS,
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

import pyens
from pyens import EnsembleLinear, EnsembleMLP
from pyens.nn import PackedEnsembleMLP

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
    for wrong in (torch.randn(5, 7), torch.tensor(6.0), torch.randn(3, 5, 6), torch.randn(4, 5, 2, 6)):
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
    assert not torch.equal(model.stacked()[0][0], expected.stacked()[0][0])


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
