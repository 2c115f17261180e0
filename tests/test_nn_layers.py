"""pyens.nn with norms, residuals, activations of each layer: against the members as plain torch modules."""

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nn_models import assert_same_state
from torch import Tensor, nn

from pyens import EnsembleLinear, EnsembleMLP
from pyens.nn import MaskedMLP, PackedEnsembleMLP, Residual, TabularEnsemble, fold_batchnorm
from pyens.optim import fused
from pyens.training import Randomness, fit
from pyens.variation import VariationModel, strength_of

E = 3
ACTIVATIONS = [
    "relu",
    "gelu",
    "silu",
    "elu(0.5)",
    "celu(0.125)",
    "leaky_relu(0.2)",
    "mish",
    "gelu_tanh",
    "sin",
]


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def perturbed(model: Any) -> Any:
    """With norms that are not 1 and 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@st.composite
def networks(draw) -> EnsembleMLP:
    hidden = draw(st.lists(st.sampled_from([2, 5, 8]), max_size=3))
    if hidden and draw(st.booleans()):
        hidden = [hidden[0]] * len(hidden)
    widths = [draw(st.sampled_from([3, *hidden[:1]])), *hidden]
    one = st.sampled_from(ACTIVATIONS)
    norm = st.sampled_from([None, "layer_norm", "rms_norm"])
    norms = draw(norm | st.tuples(*[norm] * len(hidden)))
    equal = [a == b for a, b in zip(widths, hidden, strict=False)]
    residual: Any = [same and draw(st.booleans()) for same in equal]
    if any(equal) and draw(st.booleans()):
        residual = True
    torch.manual_seed(draw(st.integers(0, 2**20)))
    model = EnsembleMLP(
        E,
        widths[0],
        hidden,
        draw(st.integers(1, 3)),
        activation=draw(one | st.tuples(*[one] * len(hidden))),
        output_activation=draw(st.sampled_from(["identity", "tanh", "elu(2)"])),
        norm=norms,
        norm_affine=draw(st.booleans()),
        norm_eps=draw(st.sampled_from([None, 0.01])),
        norm_position=draw(st.sampled_from(["before_activation", "after_activation"])),
        residual=residual,
        bias=draw(st.booleans() | st.lists(st.booleans(), min_size=len(widths), max_size=len(widths))),
        dtype=torch.float64,
    )
    return perturbed(model)


@given(networks(), st.booleans())
def test_computes_what_the_members_do(model, own):
    members = model.to_modules()
    x = torch.randn(*([E] if own else []), 6, model.in_features, dtype=torch.float64)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    got = model(ours)
    expected = torch.stack([member(theirs[m] if own else theirs) for m, member in enumerate(members)])
    # Of two features that are nearly the same, a norm with a small eps magnifies every rounding.
    close(got, expected, 1e-7)
    above = torch.randn_like(got)
    got.backward(above)
    expected.backward(above)
    close(ours.grad, theirs.grad, 1e-5)
    stacked = torch.func.stack_module_state(members)[0]
    of_members = EnsembleMLP(**model.config(), dtype=torch.float64)
    gradients = {
        name: torch.stack([dict(member.named_parameters())[name].grad for member in members])
        for name in stacked
    }
    of_members.load_stacked(gradients, layout="out_in")
    for (name, p), (_, q) in zip(model.named_parameters(), of_members.named_parameters(), strict=True):
        scale = 1 + q.abs().max().item()
        assert (p.grad - q).abs().max() <= 1e-5 * scale, name


@given(networks())
def test_there_and_back(model):
    again = type(model)(**json.loads(json.dumps(model.config())), dtype=torch.float64)
    assert again.config() == model.config() and repr(again) == repr(model)
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    again.load_state_dict(model.state_dict())
    x = torch.randn(4, model.in_features, dtype=torch.float64)
    expected = model(x)
    copies = {
        "state": again,
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "select": model.select(range(E)),
        "modules": EnsembleMLP.from_modules(model.to_modules()),
    }
    copies["stacked"] = EnsembleMLP(**model.config(), dtype=torch.float64)
    copies["stacked"].load_stacked(torch.func.stack_module_state(model.to_modules())[0], layout="out_in")
    for name, other in copies.items():
        assert torch.equal(other(x), expected), name
        assert_same_state(other, model)
    members = [2, 0, 2]
    assert torch.equal(model(x, members=members), expected[members])
    assert torch.equal(model.select(members)(x), expected[members])
    in_place = copy.deepcopy(model).select_([1])
    assert torch.equal(in_place(x), expected[[1]])
    assert [len(p) for p in in_place.parameters()] == [1] * len(list(model.parameters()))
    single = copy.deepcopy(model).float()
    assert all(p.dtype == torch.float32 for p in single.parameters())
    torch.testing.assert_close(single(x.float()).double(), model(x), rtol=1e-2, atol=1e-2)
    assert model.to("meta")(x.to("meta")).shape == expected.shape


def test_parameters_by_name():
    model = EnsembleMLP(
        E,
        4,
        [5, 6, 7],
        2,
        norm=["rms_norm", None, "layer_norm"],
        bias=[True, False, True, False],
        activation=["relu", "celu(0.1)", "tanh"],
    )
    shapes = {name: tuple(p.shape[1:]) for name, p in model.state_dict().items()}
    assert shapes == {
        **{"weights.0": (5, 4), "weights.1": (6, 5), "weights.2": (7, 6), "weights.3": (2, 7)},
        **{"biases.0": (5,), "biases.2": (7,)},
        **{"norm_weights.0": (5,), "norm_weights.1": (7,), "norm_biases.1": (7,)},
    }
    assert [b.shape[1] for b in model.stacked()[1]] == [5, 0, 7, 0]
    for name, p in model.named_parameters():
        if "norm" in name:
            assert bool((p == ("weights" in name)).all())
    assert model.activation == ("relu", "celu(0.1)", "tanh") and model.norm == (
        "rms_norm",
        None,
        "layer_norm",
    )
    assert "norm_affine" not in repr(model) and "norm=('rms_norm'" in repr(model).replace("[", "(")


def test_seeds_are_those_of_the_members():
    def members(seeds: list[int]) -> list[nn.Module]:
        made = []
        for seed in seeds:
            torch.manual_seed(seed)
            made.append(
                nn.Sequential(
                    *(nn.Linear(4, 5, bias=False), nn.LayerNorm(5), nn.Mish()),
                    *(nn.Linear(5, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 2, bias=False)),
                )
            )
        return made

    model = EnsembleMLP(
        2,
        4,
        [5, 5],
        2,
        norm="layer_norm",
        activation=["mish", "relu"],
        bias=[False, True, False],
        seeds=[7, 3],
    )
    other = EnsembleMLP.from_modules(members([7, 3]))
    assert_same_state(other, model)
    assert other.config() == model.config()
    perturbed(model).reset_parameters([7, 3])
    assert_same_state(other, model)


# --- members as others write them ----------------------------------------------------------------


class NormedLinear(nn.Linear):
    """As in TD-MPC2: act(LayerNorm(Linear(x))), with dropout in front of the norm."""

    def __init__(self, inputs: int, outputs: int, dropout: float = 0.0, act: nn.Module | None = None) -> None:
        super().__init__(inputs, outputs)
        self.ln = nn.LayerNorm(outputs)
        self.act = nn.Mish(inplace=False) if act is None else act
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.dropout is not None:
            x = self.dropout(x)
        return self.act(self.ln(x))


def plain_linear(layer: nn.Linear) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features)
    made.weight, made.bias = layer.weight, layer.bias
    return made


def of_td_mpc2(member: nn.Sequential) -> list[nn.Module]:
    found: list[nn.Module] = []
    for layer in member:
        found.append(plain_linear(layer) if isinstance(layer, NormedLinear) else layer)
        if isinstance(layer, NormedLinear):
            found += [module for module in (layer.dropout, layer.ln, layer.act) if module is not None]
    return found


def droq() -> nn.Sequential:
    block = [nn.Dropout(0.01), nn.LayerNorm(8), nn.ReLU()]
    other = [nn.Dropout(0.01), nn.LayerNorm(8), nn.ReLU()]
    return nn.Sequential(nn.Linear(5, 8), *block, nn.Linear(8, 8), *other, nn.Linear(8, 1))


def torchani() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 8),
        nn.CELU(0.1),
        nn.Linear(8, 7),
        nn.CELU(0.1),
        nn.Linear(7, 6),
        nn.CELU(0.1),
        nn.Linear(6, 1),
    )


def mbrl() -> nn.Sequential:
    """Hidden layers as sequences of their own, SiLU or LeakyReLU with a slope."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(5, 8), nn.LeakyReLU(negative_slope=0.01)),
        nn.Sequential(nn.Linear(8, 8), nn.SiLU()),
        nn.Linear(8, 4),
    )


OTHERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "DroQ": (
        droq,
        None,
        {"norm": "layer_norm", "dropout": 0.01, "dropout_position": "before_norm", "activation": "relu"},
    ),
    "TD-MPC2": (
        lambda: nn.Sequential(NormedLinear(5, 8, dropout=0.01), NormedLinear(8, 8), nn.Linear(8, 3)),
        of_td_mpc2,
        {
            "norm": "layer_norm",
            "activation": "mish",
            "dropout": ((0.01, 0.0),),
            "dropout_position": "before_norm",
        },
    ),
    "torchani": (torchani, None, {"activation": "celu(0.1)", "norm": None}),
    "mbrl": (mbrl, None, {"activation": ("leaky_relu", "silu")}),
    "RMS norm after the activation": (
        lambda: nn.Sequential(
            nn.Linear(5, 8),
            nn.GELU("tanh"),
            nn.RMSNorm(8, 1e-3),
            nn.Dropout(0.2),
            nn.Linear(8, 2),
            nn.Sigmoid(),
        ),
        None,
        {
            "norm": "rms_norm",
            "norm_eps": 1e-3,
            "norm_position": "after_activation",
            "activation": "gelu_tanh",
            "output_activation": "sigmoid",
            "dropout": 0.2,
        },
    ),
    "dropout between activation and norm": (
        lambda: nn.Sequential(
            nn.Linear(5, 8), nn.ELU(0.5), nn.Dropout(0.2), nn.LayerNorm(8), nn.Linear(8, 2)
        ),
        None,
        {"norm_position": "after_activation", "dropout_position": "before_norm", "activation": "elu(0.5)"},
    ),
    "residuals": (
        lambda: nn.Sequential(
            nn.Linear(5, 8, bias=False),
            nn.Tanh(),
            Residual(nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=False), nn.ReLU(), nn.Dropout(0.1)),
            Residual(nn.Linear(8, 8)),
            nn.Linear(8, 1),
        ),
        None,
        {
            "residual": (False, True, True),
            "norm": (None, "layer_norm", None),
            "norm_affine": False,
            "activation": ("tanh", "relu", "identity"),
            "dropout": ((0.0, 0.1, 0.0),),
        },
    ),
    "some norms with parameters": (
        lambda: nn.Sequential(
            *(nn.Linear(5, 8), nn.LayerNorm(8, bias=False), nn.ReLU()),
            *(nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=False), nn.ReLU(), nn.Linear(8, 1)),
        ),
        None,
        {"norm": "layer_norm", "norm_affine": True},
    ),
    "an identity, whose places are the same": (
        lambda: nn.Sequential(
            *(nn.Linear(5, 8), nn.LayerNorm(8)),
            *(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 1)),
        ),
        None,
        {"norm_position": "after_activation", "activation": ("identity", "relu")},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_members_of_other_libraries(name):
    make, layers, expected = OTHERS[name]
    members = [perturbed_norms(make().double()) for _ in range(E)]
    model = EnsembleMLP.from_modules(members, layers=layers)
    for option, value in expected.items():
        assert getattr(model, option) == value, option
    x = torch.randn(7, 5, dtype=torch.float64)
    for module in (model, *members):
        module.eval()
    close(model(x), torch.stack([member(x) for member in members]), 1e-9)
    y = torch.randn(7, model.out_features, dtype=torch.float64)
    model.loss(x, y, loss="mse").sum().backward()
    for i, member in enumerate(members):
        nn.functional.mse_loss(member(x), y).backward()
        linears = [m for m in member.modules() if isinstance(m, nn.Linear)]
        for layer, linear in enumerate(linears):
            close(model.weights[layer].grad[i], linear.weight.grad, 1e-8)
            if linear.bias is not None:
                close(model.biases[layer].grad[i], linear.bias.grad, 1e-8)
    again = EnsembleMLP(**model.config(), dtype=torch.float64)
    again.load_state_dict(model.state_dict())
    seeds = torch.arange(E)
    assert torch.equal(again(x, dropout_seeds=seeds), model(x, dropout_seeds=seeds))


def perturbed_norms(member: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in member.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    return member


def test_layers_of_some_biases_and_of_members_that_differ():
    model = EnsembleMLP.from_modules(
        [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)) for _ in range(2)]
    )
    assert model.config()["bias"] == [True, False]
    norms = [nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False)]
    members = [nn.Sequential(nn.Linear(3, 4), norm, nn.ReLU(), nn.Linear(4, 2)) for norm in norms]
    x = torch.randn(5, 3)
    torch.testing.assert_close(EnsembleMLP.from_modules(members)(x), torch.stack([m(x) for m in members]))
    with pytest.raises(
        ValueError, match=r"modules\[1\]: expected .* a bias like modules\[0\], got .* no bias"
    ):
        EnsembleMLP.from_modules([nn.Sequential(nn.Linear(3, 2, bias=b)) for b in (True, False)])


def test_from_stacked_and_from_parameters_take_the_options():
    weights, biases = [torch.randn(E, 5, 5), torch.randn(E, 2, 5)], [torch.randn(E, 5), torch.empty(E, 0)]
    scales, shifts = [torch.randn(E, 5)], [torch.randn(E, 5)]
    options: Any = {"norm": "layer_norm", "residual": True, "dropout": [0.1, 0.2, 0.3], "activation": "mish"}
    model = EnsembleMLP.from_stacked(
        [w.mT for w in weights], biases, "in_out", norm_weights=scales, norm_biases=shifts, **options
    )
    other = EnsembleMLP.from_parameters(weights, biases, norm_weights=scales, norm_biases=shifts, **options)
    assert_same_state(model, other)
    assert other.dropout == (0.1, 0.2, 0.3) and list(other.state_dict())[2] == "biases.0"
    begun = EnsembleMLP.from_parameters(weights, biases, **options)
    assert bool((begun.norm_weights[0] == 1).all() and (begun.norm_biases[0] == 0).all())
    without = EnsembleMLP.from_parameters(weights, biases, norm_affine=False, **options)
    x = torch.randn(4, 5)
    assert torch.equal(without.eval()(x), begun.eval()(x)) and "norm_weights.0" not in without.state_dict()
    rms = EnsembleMLP.from_stacked(weights, layout="out_in", norm_weights=scales, norm="rms_norm")
    assert [n for n in rms.state_dict() if "norm" in n] == ["norm_weights.0"]
    for norms, message in (
        ({"norm_weights": []}, "norm_weights: expected one for each of the 1 norms, got 0"),
        ({"norm_biases": [scales[0][:2]]}, r"norm_biases\[0\]: expected shape \[3, 5\], got shape \[2, 5\]"),
    ):
        with pytest.raises(ValueError, match="^from_parameters: " + message):
            EnsembleMLP.from_parameters(weights, biases, **options, **norms)
    with pytest.raises(
        TypeError, match=r"norm_weights\[0\]: expected torch.float32 on cpu like weights\[0\]"
    ):
        EnsembleMLP.from_parameters(weights, biases, norm_weights=[scales[0].double()], **options)


# --- chosen members and dropout ------------------------------------------------------------------


@pytest.mark.parametrize(
    "dropout", [0.5, [0.5, 0.0, 0.25], [[0.5, 0.0]], [[0.5, 0], [0.1, 0.2], [0, 0.9]]], ids=str
)
@pytest.mark.parametrize("chosen", [[2, 0], (1,), torch.tensor([0, 0, 2, 1])], ids=str)
def test_chosen_members_have_their_own_rates(dropout, chosen):
    model = EnsembleMLP(E, 4, [6, 6], 2, dropout=dropout, norm="layer_norm", dropout_position="before_norm")
    n, x, y = len(chosen), torch.randn(5, 4), torch.randn(5, 2)
    seeds = torch.arange(n) + 5
    picked = model.select(list(chosen))
    assert torch.equal(model(x, members=chosen, dropout_seeds=seeds), picked(x, dropout_seeds=seeds))
    got = model.loss(x, y, loss="mse", members=chosen, dropout_seeds=seeds)
    assert torch.equal(got, picked.loss(x, y, loss="mse", dropout_seeds=seeds))
    torch.manual_seed(0)
    drawn = model(x, members=chosen)
    torch.manual_seed(0)
    assert torch.equal(drawn, model(x, members=chosen, dropout_seeds=torch.randint(2**62, (n,))))
    own = torch.randn(n, 5, 4)
    assert torch.equal(model.eval()(own, members=chosen), picked.eval()(own))


def test_chosen_members_without_a_copy():
    model, x = EnsembleMLP(E, 4, [6], 2), torch.randn(5, 4)
    model(x, members=[1]).sum().backward()
    assert all(bool((p.grad[[0, 2]] == 0).all()) and bool((p.grad[1] != 0).any()) for p in model.parameters())
    assert torch.equal(model(x, members=[2]), model(x)[[2]])
    assert model(torch.randn(4), members=[0, 2]).shape == (2, 2)
    assert model(torch.randn(2, 3, 4), shared=True, members=[0, 2]).shape == (2, 2, 3, 2)
    linear = EnsembleLinear(E, 4, 2)
    assert torch.equal(linear(x, members=[2, 0]), linear(x)[[2, 0]])
    assert torch.equal(
        linear.loss(x, torch.zeros(5, 2), loss="mse", members=[1]),
        linear.loss(x, torch.zeros(5, 2), loss="mse")[[1]],
    )
    with pytest.raises(ValueError, match="members"):
        model(x, members=[3])
    with pytest.raises(TypeError, match="ensemble_mlp: members: expected int64, got Int"):
        model(x, members=torch.tensor([1], dtype=torch.int32))


def test_rates_are_kept_in_as_few_numbers_as_say_them():
    def rates(dropout: Any) -> Any:
        return EnsembleMLP(E, 4, [6, 6], 2, dropout=dropout).dropout

    assert rates([[0.5, 0.5]]) == rates([[0.5, 0.5]] * E) == rates([0.5] * E) == 0.5
    assert rates([[0.5, 0.0]]) == rates([[0.5, 0.0]] * E) == ((0.5, 0.0),)
    assert rates([[0.5, 0.5], [0, 0], [0.5, 0.5]]) == (0.5, 0, 0.5)
    each = ((0.5, 0.0), (0.0, 0.5), (0.5, 0.0))
    assert rates(torch.tensor(each)) == each
    model = EnsembleMLP(E, 4, [6, 6], 2, dropout=each)
    assert model.config()["dropout"] == [[0.5, 0.0], [0.0, 0.5], [0.5, 0.0]]
    assert model.select([0, 2]).dropout == ((0.5, 0.0),) and model.select([1, 2]).dropout == each[1:]
    assert model.select_([2, 1]).dropout == each[:0:-1]
    for wrong, message in (
        ([0.1, 0.2], r"one rate, or one for each of the 3 members, got 2"),
        ([[0.1]], r"got \[1\]"),
        ([[0.1, 0.2]] * 2, r"or \[1 or 3, 2\] of the hidden layers, got 2"),
        ([[0.1, 1.0]], ""),
        ([0.1, [0.1, 0.2], 0.3], r"got \[0.1, 2, 0.3\]"),
    ):
        with pytest.raises(ValueError, match=r"^EnsembleMLP: dropout.*: expected .*" + message):
            rates(wrong)


# --- what else builds on them --------------------------------------------------------------------


def test_packed():
    model = EnsembleMLP(E, 4, [6, 5], 2, activation=["mish", "elu(0.5)"], output_activation="tanh")
    packed = model.packed()
    for b in (1, 40):
        x = torch.randn(b, 4)
        assert torch.equal(packed(x), model(x))
        y = torch.randn(b, 2)
        assert torch.equal(packed.loss(x, y, loss="mse"), model.loss(x, y, loss="mse"))
    assert_same_state(packed.select([2, 0]), model.select([2, 0]))
    assert packed.config() == model.config() and packed.select([0]).output_activation == "tanh"
    assert torch.equal(pickle.loads(pickle.dumps(packed))(x), model(x))
    for options, message in (
        ({"norm": "layer_norm"}, "expected norm none in the layers, got layer_norm"),
        ({"residual": [True]}, r"expected residual none in the layers, got \[True\]"),
        ({"bias": [True, False]}, r"expected bias of all layers or of none, got \[True, False\]"),
    ):
        with pytest.raises(ValueError, match="^PackedEnsembleMLP: ensemble: " + message):
            PackedEnsembleMLP(EnsembleMLP(E, 4, [4], 2, **options))


def test_tabular():
    options: Any = {
        "norm": "layer_norm",
        "residual": True,
        "activation": ["mish", "relu"],
        "dropout": [[0.1, 0]],
    }
    model = TabularEnsemble(E, [(5, 2)], 3, [6, 6], 1, bias=[True, True, False], seeds=range(E), **options)
    assert (model.norm, model.residual, model.activation) == ("layer_norm", True, ("mish", "relu"))
    again = TabularEnsemble(**json.loads(json.dumps(model.config())))
    again.load_state_dict(model.state_dict())
    given = torch.randint(5, (4, 1)), torch.randn(4, 3)
    assert torch.equal(again.eval()(*given), model.eval()(*given))
    assert torch.equal(model.select([2])(*given), model(*given)[[2]])
    with pytest.raises(ValueError, match=r"strength_of: module: expected MLPs of .* with norm layer_norm"):
        strength_of(model, *given)


def test_activation_strength_of_lists_alone():
    model = EnsembleMLP(1, 4, [6, 5], 2, activation=["mish", "relu"], bias=[True, False, True])
    x = torch.randn(7, 4)
    got, expected = strength_of(model, x), strength_of(model.member(0), x)
    torch.testing.assert_close(got.value[0], expected.value)
    assert torch.equal(got.output, model(x))
    for options, message in (
        ({"norm": "rms_norm"}, "norm rms_norm"),
        ({"residual": True}, "residual True"),
        ({"output_activation": "tanh"}, "output_activation tanh"),
    ):
        other = EnsembleMLP(1, 4, [4], 2, **options)
        with pytest.raises(ValueError, match=f"^strength_of: module: .* got EnsembleMLP with {message}"):
            strength_of(other, x)
        with pytest.raises(ValueError, match=f"^VariationModel: target: .* with {message}"):
            VariationModel(other, None, None, None)


def test_masked_mlp_has_one_activation():
    model = MaskedMLP(2, 4, [8], 1, scale=2.0, activation="celu(0.1)")
    x = torch.randn(5, 4)
    torch.testing.assert_close(model(x), torch.stack([member(x) for member in model.to_modules()]))


def test_folding_gives_lists():
    parts = [
        EnsembleLinear(E, 4, 6),
        nn.CELU(0.1),
        EnsembleLinear(E, 6, 6),
        EnsembleLinear(E, 6, 2),
        nn.Tanh(),
    ]
    folded = fold_batchnorm(parts)
    assert folded.activation == ("celu(0.1)", "identity") and folded.output_activation == "tanh"


# --- training ------------------------------------------------------------------------------------


X, Y = (torch.randn(48, f, generator=torch.Generator().manual_seed(f)) for f in (5, 1))


def trained_net(members: int = 4) -> EnsembleMLP:
    return EnsembleMLP(
        members,
        5,
        [8, 8],
        1,
        norm=["layer_norm", "rms_norm"],
        residual=True,
        activation=["mish", "celu(0.1)"],
        bias=[False, True, True],
        dropout=[[0.1, 0.0]],
        dropout_position="before_norm",
        seeds=range(members),
    )


def train(model: EnsembleMLP, **options: Any) -> Any:
    settings: Any = {
        "loss": "mse",
        "optimizer": lambda p: fused(torch.optim.Adam, p, lr=0.05),
        "epochs": 12,
        "batch_size": 8,
        "seed": 3,
        "validation": 0.25,
        "progress": False,
    }
    return fit(model, (X, Y), **settings | options)


@pytest.mark.parametrize(
    "options",
    [
        {"early_stopping": 1},
        {"randomness": "R6", "jackknife_groups": 4},
        {"ema": 0.9, "early_stopping": 2},
        {"swa_start": 6},
        {"clip_norm": 0.1},
    ],
    ids=str,
)
def test_fit_trains_each_member_as_if_it_were_alone(options):
    if "randomness" in options:
        options = options | {"randomness": Randomness.from_code(options["randomness"])}
    model, seeds = trained_net(), [3, 1, 4, 2]
    before = [p.detach().clone() for p in model.parameters()]
    history = train(model, seeds=seeds, **options)
    assert model.ensemble_size == 4 and all(len(p) == 4 for p in model.parameters())
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    if "early_stopping" in options:
        assert len({int(epoch) for epoch in history.best_epoch}) > 1  # members left one by one
    alone, own = trained_net().select([2]), {"seeds": [4]}
    if "jackknife_groups" in options:
        own["left_out"] = [int(history.left_out[2])]
    train(alone, **options | own)
    assert_same_state(alone, model.select([2]))


def test_resumes(tmp_path):
    whole, stopped, resumed = (trained_net() for _ in range(3))
    options: Any = {"early_stopping": 2, "ema": 0.8}
    train(whole, **options)
    train(stopped, epochs=5, checkpoint=tmp_path / "run.pt", **options)
    train(resumed, checkpoint=tmp_path / "run.pt", **options)
    assert_same_state(resumed, whole)


def test_saved_and_loaded_by_torch():
    model = trained_net()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(other.eval()(X), model.eval()(X))


def test_compiled_and_functional():
    torch._dynamo.reset()
    model = trained_net().double().eval()
    x = X.double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))
    members = torch.tensor([2, 0])
    call = torch.compile(lambda x: model(x, members=members), fullgraph=True, backend="aot_eager")
    assert torch.equal(call(x), model(x)[[2, 0]])
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    got = torch.func.functional_call(model, doubled, (x,))
    other = copy.deepcopy(model)
    other.load_state_dict(doubled)
    assert torch.equal(got, other(x))


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": ["relu"]}, "activation: expected one, or one for each of the 2 hidden layers, got 1"),
        ({"activation": ["relu", "swish"]}, 'activation: expected one of relu, .*, got "swish"'),
        ({"output_activation": "swish"}, 'output_activation: expected one of relu, .*, got "swish"'),
        ({"output_activation": "tanh(2)"}, r"output_activation: expected tanh, which has no parameter"),
        ({"norm": "batch_norm"}, 'norm: expected layer_norm, rms_norm or None, got "batch_norm"'),
        ({"norm": ["layer_norm", "x"]}, r'norm\[1\]: expected layer_norm, rms_norm or None, got "x"'),
        ({"norm": ["layer_norm"] * 3}, "norm: expected one, or one for each of the 2 hidden layers, got 3"),
        (
            {"norm": "layer_norm", "hidden_features": [1, 2]},
            "norm: expected no norm of hidden layer 0, which has",
        ),
        ({"norm_eps": 0}, "norm_eps: expected a positive number, got 0"),
        (
            {"norm_position": "first"},
            "norm_position: expected before_activation or after_activation, got 'first'",
        ),
        (
            {"dropout_position": "first"},
            "dropout_position: expected after_activation or before_norm, got 'first'",
        ),
        (
            {"dropout_position": "before_norm"},
            "dropout_position: expected after_activation where no layer has",
        ),
        ({"residual": True}, "residual: expected a hidden layer as wide as what it reads, got none"),
        ({"residual": [False, True]}, "residual: expected no residual of hidden layer 1, .* 6 inputs and 7"),
        ({"residual": [True]}, "residual: expected one, or one for each of the 2 hidden layers, got 1"),
        ({"bias": [True, False]}, "bias: expected one, or one for each of the 3 layers, got 2"),
    ],
)
def test_refuses(options, message):
    arguments = {"hidden_features": [6, 7]} | options
    with pytest.raises(ValueError, match="^EnsembleMLP: " + message):
        EnsembleMLP(E, 4, out_features=2, **arguments)
    with pytest.raises(
        TypeError, match=r"^EnsembleMLP: residual: expected a bool, or a sequence of them, got 1"
    ):
        EnsembleMLP(E, 4, [4], 2, residual=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_activation", "tanh"),
        ("norm_eps", 0.5),
        ("norm_position", "after_activation"),
        ("residual", False),
    ],
)
def test_options_that_are_assigned_take_effect(name, value):
    model = EnsembleMLP(E, 4, [4, 5], 2, norm="layer_norm", residual=True, dtype=torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64)
    before = model(x)
    setattr(model, name, value)
    assert not torch.allclose(model(x), before)
    close(model(x), torch.stack([member(x) for member in model.to_modules()]))


def test_rates_follow_a_state_dict_that_is_assigned():
    model = EnsembleMLP(E, 4, [5, 6], 2, dropout=[[0.1, 0.4]])
    with torch.device("meta"):
        other = EnsembleMLP(E, 4, [5, 6], 2, dropout=[[0.1, 0.4]])
    other.load_state_dict(model.state_dict(), assign=True)
    x, seeds = torch.randn(6, 4), torch.arange(E)
    assert torch.equal(other(x, dropout_seeds=seeds), model(x, dropout_seeds=seeds))
