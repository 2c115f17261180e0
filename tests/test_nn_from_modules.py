"""pyens.EnsembleMLP.from_modules: members as users of torch build them."""

from typing import Any

import pytest
import torch
from nn_models import assert_same_state
from torch import Tensor, nn
from torch.nn.utils import prune

import pyens
from pyens import EnsembleLinear, EnsembleMLP
from pyens.nn import _sequential

E = 3


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


class PlainLinear(nn.Linear):
    """As users subclass it: another way to begin, the same forward."""

    def reset_parameters(self) -> None:
        nn.init.xavier_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Block(nn.Sequential):
    """Layers that it makes itself, the forward of nn.Sequential."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(PlainLinear(inputs, outputs), nn.ReLU())


class Named(nn.Module):
    """A member with a forward of its own."""

    def __init__(self, second: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), second(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class Other(Named):
    pass


def norm(features: int) -> nn.BatchNorm1d:
    made = nn.BatchNorm1d(features)
    with torch.no_grad():
        for tensor in (made.weight, made.bias, made.running_mean):
            tensor.normal_()
        made.running_var.uniform_(0.5, 2)
    return made.eval()


TAKEN: dict[str, Any] = {
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Sequential(nn.Linear(6, 2))
    ),
    "subclasses": lambda: nn.Sequential(Block(4, 6), Block(6, 5), PlainLinear(5, 2)),
    "identities": lambda: nn.Sequential(
        nn.Identity(), nn.Linear(4, 6), nn.Identity(), nn.Tanh(), nn.Linear(6, 2), nn.Identity()
    ),
    "dropout": lambda: nn.Sequential(
        nn.Linear(4, 6),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(6, 5),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(5, 2),
    ),
    "dropout of 0": lambda: nn.Sequential(
        nn.Dropout(0), nn.Linear(4, 6), nn.Dropout(0), nn.ReLU(), nn.Linear(6, 2), nn.Dropout(0)
    ),
    "norm after the layer": lambda: nn.Sequential(nn.Linear(4, 6), norm(6), nn.GELU(), nn.Linear(6, 2)),
    "norm after the activation": lambda: nn.Sequential(nn.Linear(4, 6), nn.SiLU(), norm(6), nn.Linear(6, 2)),
    "norms everywhere": lambda: nn.Sequential(
        norm(4), nn.Linear(4, 6), norm(6), nn.ReLU(), nn.Dropout(0.1), norm(6), nn.Linear(6, 2), norm(2)
    ),
    "no biases and a norm": lambda: nn.Sequential(
        nn.Linear(4, 6, bias=False), norm(6), nn.ReLU(), nn.Linear(6, 2, bias=False)
    ),
    "in place": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(True), nn.Dropout(0.1, True), nn.Linear(6, 2)),
}


@pytest.mark.parametrize("case", TAKEN)
def test_computes_what_the_members_do(case):
    members = [TAKEN[case]().double().eval() for _ in range(E)]
    model = EnsembleMLP.from_modules(members)
    assert not model.training
    x = torch.randn(7, 4, dtype=torch.float64)
    close(model(x), torch.stack([member(x) for member in members]))


def test_bits_stay_where_nothing_is_folded():
    for case in ("nested", "subclasses", "identities", "dropout"):
        members = [TAKEN[case]() for _ in range(E)]
        model = EnsembleMLP.from_modules(members)
        for i, member in enumerate(members):
            linears = [module for module in member.modules() if isinstance(module, nn.Linear)]
            for layer, linear in enumerate(linears):
                assert torch.equal(model.weights[layer][i], linear.weight)
                assert torch.equal(model.biases[layer][i], linear.bias)


def test_dropout_is_the_rate_of_each_member():
    def member(p: float) -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(p), nn.Linear(6, 2))

    assert EnsembleMLP.from_modules([member(0.25)] * 2).dropout == 0.25
    model = EnsembleMLP.from_modules([member(0.25), member(0.0), member(0.5)])
    assert model.dropout == (0.25, 0.0, 0.5) and model.training
    x, seeds = torch.randn(5, 4), torch.arange(3)
    expected = EnsembleMLP(3, 4, [6], 2, dropout=[0.25, 0.0, 0.5])
    expected.load_state_dict(model.state_dict())
    assert torch.equal(model(x, dropout_seeds=seeds), expected(x, dropout_seeds=seeds))


@pytest.mark.parametrize("second", [nn.Linear, PlainLinear])
def test_layers_of_other_modules(second):
    members = [Named(), Named(second), Other()]
    for layers in (
        lambda m: [m.fc1, nn.ReLU(), m.fc2],
        lambda m: nn.Sequential(m.fc1, nn.ReLU(), m.fc2),
        lambda m: iter([nn.Sequential(m.fc1, nn.ReLU()), m.fc2]),
    ):
        model = EnsembleMLP.from_modules(members, layers=layers)
        x = torch.randn(5, 4)
        torch.testing.assert_close(model(x), torch.stack([member(x) for member in members]))


def test_members_of_different_classes():
    members = [
        nn.Sequential(Block(4, 6), nn.Linear(6, 2)),
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Identity(), PlainLinear(6, 2)),
        nn.Sequential(nn.Sequential(nn.Linear(4, 6)), nn.ReLU(inplace=True), nn.Linear(6, 2)),
    ]
    x = torch.randn(5, 4)
    torch.testing.assert_close(EnsembleMLP.from_modules(members)(x), torch.stack([m(x) for m in members]))


def test_linear_layers_of_subclasses():
    layers = [nn.Linear(4, 2), PlainLinear(4, 2)]
    model = EnsembleLinear.from_modules(layers)
    for layer, back in zip(layers, model.to_modules(), strict=True):
        assert type(back) is nn.Linear
        assert_same_state(back, layer)


# --- refused -------------------------------------------------------------------------------------


def hooked(module: nn.Module, pre: bool = False) -> nn.Module:
    def hook(module: nn.Module, *_: Any) -> None:
        pass

    (module.register_forward_pre_hook if pre else module.register_forward_hook)(hook)
    return module


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class DoubledCall(nn.Linear):
    def __call__(self, input: Tensor) -> Tensor:
        return 2 * super().__call__(input)


class Residual(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


def replaced() -> nn.Linear:
    module = nn.Linear(4, 4)
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def around(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), *layers, nn.Linear(4, 2))


REFUSED: dict[str, Any] = {
    "forward hook": (lambda: around(hooked(nn.ReLU())), r"without forward hooks, got them on ReLU\(\)"),
    "forward pre-hook": (
        lambda: around(nn.Sequential(hooked(nn.Linear(4, 4), True))),
        r"without forward pre-hooks, got them on Linear\(",
    ),
    "hook on the member": (
        lambda: hooked(around(nn.ReLU())),
        "without forward hooks, got them on Sequential",
    ),
    "hook on a sequence": (
        lambda: around(hooked(nn.Sequential(nn.ReLU()), True)),
        "without forward pre-hooks, got them on Sequential",
    ),
    "hook on an identity": (lambda: around(hooked(nn.Identity())), r"hooks, got them on Identity\(\)"),
    "linear with a forward": (lambda: around(Doubled(4, 4)), r"got Doubled\("),
    "linear with a __call__": (lambda: around(DoubledCall(4, 4)), r"got DoubledCall\("),
    "forward of an instance": (lambda: around(replaced()), r"got Linear\(in_features=4"),
    "sequence with a forward": (
        lambda: Residual(nn.Linear(4, 4)),
        "expected nn.Sequential, got Residual with a forward of its own; layers= says",
    ),
    "sequence with a forward inside": (lambda: around(Residual(nn.Linear(4, 4))), r"got Residual\("),
    "dropout before the activation": (
        lambda: around(nn.Dropout(0.1), nn.ReLU()),
        "expected nn.Dropout once in a layer, .*, got dropout, activation in Sequential",
    ),
    "dropout first": (lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 2)), r"got Dropout\(p=0.1"),
    "dropout last": (
        lambda: nn.Sequential(around(nn.ReLU()), nn.Dropout(0.1)),
        "expected an nn.Linear, or that and an activation, as the last layer",
    ),
    "dropout twice": (
        lambda: around(nn.ReLU(), nn.Dropout(0.1), nn.Dropout(0.2)),
        r"once.* got Dropout\(p=0.2",
    ),
    "dropout of all": (lambda: around(nn.ReLU(), nn.Dropout(1.0)), r"with p below 1, got Dropout\(p=1.0"),
    "dropout after a norm": (
        lambda: around(nn.ReLU(), norm(4), nn.Dropout(0.1)),
        r"once.* got Dropout\(p=0.1",
    ),
    "dropout between norm and activation": (
        lambda: around(nn.LayerNorm(4), nn.Dropout(0.1), nn.ReLU()),
        "right before its norm, .*, got norm, dropout, activation in Sequential",
    ),
    "alpha dropout": (lambda: around(nn.ReLU(), nn.AlphaDropout(0.1)), r"got AlphaDropout\("),
    "norm in training": (
        lambda: around(norm(4).train(), nn.ReLU()),
        r"expected BatchNorm1d in evaluation \(eval\(\)\), .* got BatchNorm1d\(4",
    ),
    "norm without statistics": (
        lambda: around(nn.BatchNorm1d(4, track_running_stats=False).eval(), nn.ReLU()),
        r"expected BatchNorm1d with running statistics, .* got BatchNorm1d\(4",
    ),
    "norm of another width": (lambda: around(norm(3), nn.ReLU()), r"batch norm of shape \[4\] .*, got \[3\]"),
    "norm before the activation": (
        lambda: around(nn.ReLU(), norm(4), nn.ReLU()),
        r"expected nn.Linear after nn.BatchNorm1d, which is folded into it, got ReLU",
    ),
    "norm at the end": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), norm(4)),
        "expected nn.Linear after nn.BatchNorm1d",
    ),
    "norm after dropout": (lambda: around(nn.Dropout(0.1), norm(4), nn.ReLU()), r"got BatchNorm1d\(4"),
    "layer norm of one member": (
        lambda: around(nn.LayerNorm(4), nn.ReLU()),
        r"expected the norm of modules\[0\] \(None\), got layer_norm",
    ),
    "layer norm of another width": (
        lambda: around(nn.LayerNorm(3), nn.ReLU()),
        r"expected nn.LayerNorm over the 4 features of the nn.Linear before it, got LayerNorm\(\(3,\)",
    ),
    "RMS norm of two dimensions": (
        lambda: around(nn.ReLU(), nn.RMSNorm((2, 4))),
        r"expected nn.RMSNorm over the 4 features of .*, got RMSNorm\(\(2, 4\)",
    ),
    "norm of one feature": (
        lambda: nn.Sequential(nn.Linear(4, 1), nn.LayerNorm(1), nn.ReLU(), nn.Linear(1, 2)),
        r"expected nn.LayerNorm over more than one feature, got LayerNorm\(",
    ),
    "two norms": (
        lambda: around(nn.LayerNorm(4), nn.ReLU(), nn.RMSNorm(4)),
        r"expected one norm in each layer, after its nn.Linear, got RMSNorm\(",
    ),
    "norm in front": (
        lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)),
        r"one norm .* got LayerNorm\(",
    ),
    "norm last": (lambda: nn.Sequential(around(nn.ReLU()), nn.LayerNorm(2)), "nn.Linear, .* last layer"),
    "norms of several eps": (
        lambda: around(nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4, 1e-3), nn.ReLU()),
        r"expected norms of one eps, got \[0.001, 1e-05\]",
    ),
    "norms in several places": (
        lambda: around(nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4)),
        "expected norms before the activation or after it throughout, got both",
    ),
    "dropout in several places": (
        lambda: around(
            *(nn.Dropout(0.1), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4)),
            *(nn.LayerNorm(4), nn.ReLU(), nn.Dropout(0.1)),
        ),
        "expected nn.Dropout before norms or behind throughout, got both",
    ),
    "norm of another dtype": (
        lambda: around(nn.LayerNorm(4, dtype=torch.float64), nn.ReLU()),
        "expected a weight of nn.LayerNorm of torch.float32 on cpu .*, got torch.float64 on cpu",
    ),
    "hook on a norm": (lambda: around(hooked(nn.LayerNorm(4))), r"forward hooks, got them on LayerNorm\("),
    "pruned norm": (
        lambda: around(prune.l1_unstructured(nn.LayerNorm(4), "weight", amount=0.5), nn.ReLU()),
        "expected weights that are parameters, got one that torch.nn.utils.prune",
    ),
    "residual of two layers": (
        lambda: around(pyens.nn.Residual(nn.Linear(4, 4), nn.Linear(4, 4))),
        r"expected Residual of one nn.Linear and what follows it in its layer, got Residual\(",
    ),
    "residual of other widths": (
        lambda: nn.Sequential(pyens.nn.Residual(nn.Linear(4, 5), nn.ReLU()), nn.Linear(5, 2)),
        r"expected Residual of a layer as wide as what it reads, 4, got Residual\(",
    ),
    "residual last": (
        lambda: nn.Sequential(nn.Linear(4, 2), pyens.nn.Residual(nn.Linear(2, 2))),
        "as the last layer, got Sequential",
    ),
    "residual after a batch norm": (
        lambda: around(norm(4), nn.ReLU(), norm(4), pyens.nn.Residual(nn.Linear(4, 4))),
        r"expected nn.Linear after nn.BatchNorm1d, which is folded into it, got Residual\(",
    ),
    "activation after a residual": (
        lambda: around(pyens.nn.Residual(nn.Linear(4, 4)), nn.ReLU()),
        "expected one activation after each nn.Linear",
    ),
    "instance norm": (lambda: around(nn.InstanceNorm1d(4), nn.ReLU()), r"got InstanceNorm1d\("),
    "convolution": (lambda: around(nn.Conv1d(4, 4, 1)), r"got Conv1d\("),
    "another module": (Named, "expected nn.Sequential, got Named; layers= says what its layers are"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_name(case):
    made, message = REFUSED[case]
    good = around(nn.ReLU())
    with pytest.raises(ValueError, match=r"(?s)^from_modules: modules\[1\]: .*" + message):
        EnsembleMLP.from_modules([good, made()])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (lambda m: [m.fc1, torch.relu, m.fc2], r"expected layers that are modules, got builtin_"),
        (lambda m: [m.fc1, nn.ReLU(), nn.Dropout(0.1)], "expected an nn.Linear, or .*, as the last layer"),
        (lambda m: m, "expected a list from layers, got Named"),
        (lambda m: m.fc1, "expected a list from layers, got Linear"),
    ],
)
def test_layers_refuses(layers, message):
    with pytest.raises(ValueError, match=r"^from_modules: modules\[0\]: .*" + message):
        EnsembleMLP.from_modules([Named()], layers=layers)
    with pytest.raises(ValueError, match="without forward hooks, got them on Named"):
        EnsembleMLP.from_modules([hooked(Named())], layers=layers)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Doubled(4, 2), "expected nn.Linear, got Doubled"),
        (hooked(nn.Linear(4, 2)), "without forward hooks, got them on Linear"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)), r"parameters, got ParametrizedLinear\("),
    ],
)
def test_linear_refuses(module, message):
    with pytest.raises(ValueError, match=r"^from_modules: modules\[0\]: .*" + message):
        EnsembleLinear.from_modules([module])


# --- what the parser reads -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(inplace=True), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.ELU(), "elu"),
        (nn.ELU(alpha=2), "elu(2.0)"),
        (nn.CELU(alpha=0.1), "celu(0.1)"),
        (nn.CELU(), "celu"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.LeakyReLU(0.2, inplace=True), "leaky_relu(0.2)"),
        (nn.Softplus(), "softplus"),
        (nn.Softplus(beta=2), None),
        (nn.Softplus(threshold=5), None),
        (nn.Mish(), "mish"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Hardswish(), "hardswish"),
        (type("Mine", (nn.Tanh,), {})(), "tanh"),
        (nn.Softmax(-1), None),
        (nn.PReLU(), None),
    ],
    ids=str,
)
def test_names_of_activations(module, name):
    assert _sequential.activation_string(module) == name


def test_what_users_note_on_an_activation_changes_nothing():
    module = nn.ELU(alpha=1.0)
    module.place = "after the first layer"
    assert _sequential.activation_string(module) == "elu"


@pytest.mark.parametrize(
    "parts",
    [
        lambda: [nn.ReLU(), pyens.nn.Residual(nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU())],
        lambda: [pyens.nn.Residual(nn.ReLU(), nn.Linear(4, 4))],
        lambda: [nn.ReLU(), pyens.nn.Residual(nn.Dropout(0.5), nn.Linear(4, 4), nn.ReLU())],
    ],
)
def test_what_a_residual_begins_with_is_not_of_the_layer_before(parts):
    with pytest.raises(ValueError, match=r"^from_modules: modules\[0\]: expected "):
        EnsembleMLP.from_modules([nn.Sequential(nn.Linear(3, 4), *parts(), nn.Linear(4, 1))])


@pytest.mark.parametrize("activation", [nn.Identity, nn.Tanh])
def test_a_residual_that_begins_with_a_batch_norm(activation):
    norm = nn.BatchNorm1d(4).double()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    block = pyens.nn.Residual(norm, nn.Linear(4, 4), nn.ReLU())
    member = nn.Sequential(nn.Linear(3, 4), activation(), block, nn.Linear(4, 1)).double().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(EnsembleMLP.from_modules([member])(x)[0], member(x))
