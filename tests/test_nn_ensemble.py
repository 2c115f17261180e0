"""pyens.nn.Ensemble: what every ensemble promises, and what a class of one's own has to say."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from nn_models import assert_same_state
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from pyens import EnsembleEmbedding, EnsembleLinear, EnsembleMLP
from pyens.nn import Ensemble, MaskedMLP, TabularEnsemble
from pyens.optim import fused
from pyens.reference.ensemble_mlp_loss import mean_losses
from pyens.training import Randomness, fit

E, ROWS = 3, 40


class Residual(Ensemble):
    """As in the docstring of `Ensemble`."""

    def __init__(self, ensemble_size: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.ensemble_size = ensemble_size
        self.dropout = dropout
        self.block = EnsembleMLP(ensemble_size, width, [6], width, activation="tanh", dropout=dropout)
        self.head = nn.ModuleList([EnsembleLinear(ensemble_size, width, 1)])

    def forward(self, x: Tensor, dropout_seeds: Tensor | None = None) -> Tensor:
        return self.head[0](x + self.block(x, dropout_seeds=dropout_seeds))


ENSEMBLES: dict[str, tuple[Ensemble, tuple[Tensor, ...]]] = {
    "linear": (EnsembleLinear(E, 4, 2, bias=False), (torch.randn(5, 4),)),
    "mlp": (EnsembleMLP(E, 4, [6, 5], 2, activation="gelu", dropout=0.25), (torch.randn(5, 4),)),
    "embedding": (EnsembleEmbedding(E, 7, 4, sparse=True), (torch.tensor([0, 6, 2]),)),
    "tabular": (
        TabularEnsemble(E, [(7, 3), (4, 2)], 2, [6], 1, bias=False, dropout=0.1, embedding_std=0.5),
        (torch.tensor([[0, 3], [6, 1]]), torch.randn(2, 2)),
    ),
    "masked": (MaskedMLP(E, 4, [8, 6], 2, scale=2.0, activation="silu"), (torch.randn(5, 4),)),
}
kinds = pytest.mark.parametrize("kind", ENSEMBLES)


def table() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 4, generator=draw)
    return x, (x[:, :1] * x[:, 1:2]).tanh() + 0.1 * torch.randn(ROWS, 1, generator=draw)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return fused(torch.optim.Adam, parameters, lr=0.02)


def train(model: Ensemble, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "loss": "mse",
        "epochs": 4,
        "batch_size": 8,
        "optimizer": adam,
        "progress": False,
    }
    return fit(model, table(), **arguments | changes)


@kinds
def test_config_rebuilds_it(kind):
    model, inputs = ENSEMBLES[kind]
    model.eval()
    rebuilt = type(model)(**json.loads(json.dumps(model.config()))).eval()
    assert rebuilt.config() == model.config() and str(rebuilt) == str(model)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(*inputs), model(*inputs))


@kinds
def test_chosen_members(kind):
    model, inputs = ENSEMBLES[kind]
    model.eval()
    chosen, whole = model.select([2, 0]), model(*inputs)
    assert type(chosen) is type(model) and chosen.ensemble_size == 2 and not chosen.training
    assert torch.equal(chosen(*inputs), whole[[2, 0]])
    own = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in own or not p.requires_grad for p in chosen.parameters())
    assert chosen.config() == model.config() | {"ensemble_size": 2}
    for i, member in enumerate(model.to_modules()):
        torch.testing.assert_close(member(*inputs).reshape(whole[i].shape), whole[i])
        torch.testing.assert_close(model.member(i)(*inputs).reshape(whole[i].shape), whole[i])
    for bad in (E, -E - 1):
        with pytest.raises(IndexError, match="member: i: expected below 3"):
            model.member(bad)


# --- a class of one's own ----------------------------------------------------------------------------------


def test_a_class_of_ones_own():
    model, x = Residual(E, 4), torch.randn(5, 4)
    model.reset_parameters([5, 6, 7])
    for i, seed in enumerate((5, 6, 7)):
        torch.manual_seed(seed)
        block, head = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), nn.Linear(4, 1)
        torch.testing.assert_close(model(x)[i], head(x + block(x)))
    alone = model.member(1)
    assert isinstance(alone, Residual) and alone.block.ensemble_size == alone.head[0].ensemble_size == 1
    assert torch.equal(alone(x)[0], model(x)[1])
    with pytest.raises(NotImplementedError, match="config: expected a Residual to define it"):
        model.config()
    with pytest.raises(NotImplementedError, match="stacked: expected an ensemble of MLPs, got a Residual"):
        model.stacked()


@pytest.mark.parametrize("loss", ["mse", "bce", "gaussian_nll", "cross_entropy"])
def test_losses_are_those_of_the_operation(loss):
    class Plain(EnsembleMLP):
        loss = Ensemble.loss

    model = EnsembleMLP(E, 4, [6], 4, dtype=torch.float64)
    plain = Plain(**model.config(), dtype=torch.float64)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(7, 4, dtype=torch.float64)
    target = {
        "cross_entropy": torch.randint(4, (7,)),
        "gaussian_nll": torch.randn(E, 7, 2, dtype=torch.float64),
    }.get(loss, torch.rand(7, 4, dtype=torch.float64))
    options: dict[str, Any] = {"loss": loss, "sample_weight": torch.rand(E, 7).double().round(decimals=1)}
    if loss == "cross_entropy":
        options |= {"temperature": 2.0, "label_smoothing": 0.2}
    got, expected = plain.loss(x, target, **options), model.loss(x, target, **options)
    torch.testing.assert_close(got, expected)
    gradients = [
        torch.autograd.grad(values.sum(), list(m.parameters()))
        for values, m in ((got, plain), (expected, model))
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("tiny", [1e-42, 1e38], ids=["subnormal", "sum overflows"])
@pytest.mark.parametrize("loss", ["mse", "bce", "gaussian_nll"])
def test_weights_at_the_ends_of_the_range_are_those_of_any_scale(loss, tiny):
    draw = torch.Generator().manual_seed(0)
    output, shares = torch.randn(2, 50, 2, generator=draw), torch.randint(1, 5, (50,), generator=draw)
    target = torch.rand(50, 1 if loss == "gaussian_nll" else 2, generator=draw)
    results = []
    for weight in (shares.double() / 4, tiny / 4 * shares.float()):
        dtype = weight.dtype  # float64 on the left is the independent computation
        leaf = output.to(dtype).requires_grad_()
        identity = lambda x: x  # noqa: E731
        losses = mean_losses(identity, leaf, target.to(dtype), loss, weight)
        results.append((losses, *torch.autograd.grad(losses.sum(), leaf)))
    for exact, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-3 if tiny < 1 else 1e-5, atol=1e-6)


def test_an_ensemble_is_a_sequence_of_its_members():
    model, x = EnsembleMLP(E, 4, [5], 2), torch.randn(3, 4)
    assert len(model) == E and bool(model)
    outputs = model(x)
    for i, member in enumerate(model):
        torch.testing.assert_close(member(x), outputs[i])
    assert i == E - 1
    torch.testing.assert_close(model[-1](x), outputs[-1])
    assert type(model[1:]) is EnsembleMLP and torch.equal(model[1:](x), outputs[1:])
    with pytest.raises(IndexError, match="member: i: expected below 3, got 3"):
        model[E]


def test_from_modules_takes_a_generator():
    kinds = {
        EnsembleMLP: lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)),
        EnsembleLinear: lambda: nn.Linear(4, 2),
        EnsembleEmbedding: lambda: nn.Embedding(4, 2),
    }
    for kind, make in kinds.items():
        modules = [make() for _ in range(2)]
        lazily, at_once = kind.from_modules(m for m in modules), kind.from_modules(modules)
        assert len(lazily) == 2
        for a, b in zip(lazily.parameters(), at_once.parameters(), strict=True):
            assert torch.equal(a, b)
        with pytest.raises(ValueError, match="from_modules: modules: expected at least one, got none"):
            kind.from_modules(iter(()))


def test_losses_refuse():
    model, x = Residual(E, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r'loss: loss: expected one of mse, .*, got "l1"'):
        model.loss(x, torch.zeros(5, 1), loss="l1")
    for target in (torch.zeros(5), torch.zeros(1, 5, 1), torch.zeros(5, 2)):
        with pytest.raises(ValueError, match=r"loss: target: expected shape \[5, 1\] or \[3, 5, 1\], got"):
            model.loss(x, target, loss="mse")

    class NoMembers(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(0)

    with pytest.raises(
        ValueError, match=r"loss: output: expected \[3, B, O\] from forward, got shape \[5, 1\]"
    ):
        NoMembers(E, 4).loss(x, torch.zeros(5, 1), loss="mse")


@pytest.mark.parametrize("of_each", [False, True])
@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize("batch_size", [5, E])
def test_what_is_left_out_has_no_say(of_each, per_member, batch_size):
    model, target = Residual(E, 4), torch.randn(batch_size, 1)
    x = torch.randn(E, batch_size, 4) if of_each else torch.randn(batch_size, 4)
    weight = torch.rand(E, batch_size) + 0.5 if per_member else torch.rand(batch_size) + 0.5
    weight[..., 1] = 0
    poisoned, clean = x.clone(), x.clone()
    poisoned[..., 1, :], clean[..., 1, :] = torch.nan, 7
    got, expected = (model.loss(x, target, loss="mse", sample_weight=weight) for x in (poisoned, clean))
    assert torch.equal(got, expected) and got.isfinite().all()
    parameters = list(model.parameters())
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            torch.autograd.grad(got.sum(), parameters),
            torch.autograd.grad(expected.sum(), parameters),
            strict=True,
        )
    )
    labels = torch.full((batch_size,), 0).index_fill(0, torch.tensor([1]), 99)
    model.loss(x, labels, loss="cross_entropy", sample_weight=weight)


def test_members_leave_out_their_own():
    model, (x, y) = Residual(E, 4), table()
    x[3] = torch.nan
    weight = torch.ones(E, ROWS)
    weight[1, 3] = 0
    losses = model.loss(x, y, loss="mse", sample_weight=weight)
    assert losses.isfinite().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(losses[1], model.head[0].weight)
    assert gradient[1].isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 2.0},
        {"temperature": -1.0},
        {"label_smoothing": 0.5},
        {"label_smoothing": -0.5, "loss": "cross_entropy", "target": torch.zeros(5).long()},
        {"label_smoothing": float("nan"), "loss": "cross_entropy", "target": torch.zeros(5).long()},
        {"sample_weight": torch.ones(3)},
        {"sample_weight": torch.ones(E, 1)},
        {"sample_weight": -torch.ones(5)},
        {"sample_weight": torch.full((5,), torch.inf)},
        {"sample_weight": torch.ones(5).double()},
        {"sample_weight": torch.ones(5, requires_grad=True)},
        {"target": torch.ones(5, 2).long()},
        {"target": torch.ones(5, 2).double()},
        {"target": torch.ones(5, 2, requires_grad=True)},
        {"loss": "cross_entropy", "target": torch.full((5,), 2)},
        {"loss": "cross_entropy", "target": torch.full((5,), -1)},
        {"loss": "cross_entropy", "target": torch.zeros(5).int()},
        {"loss": "l1"},
    ],
    ids=str,
)
def test_losses_refuse_what_the_operation_does(changes):
    model, arguments = EnsembleMLP(E, 4, [6], 2), {"loss": "mse", "target": torch.ones(5, 2)} | changes
    x, target = torch.randn(5, 4), arguments.pop("target")
    with pytest.raises((ValueError, TypeError)) as expected:
        model.loss(x, target, **arguments)
    with pytest.raises(type(expected.value)) as found:
        Ensemble.loss(model, x, target, **arguments)
    operation, *texts = str(expected.value).split("got")[0].split(" (Float)")[0].split(": ")
    assert operation == "ensemble_mlp_loss"
    assert str(found.value).startswith(": ".join(["loss", *texts]).replace("weights[0]", "output"))


def test_a_loss_without_inputs_is_named():
    with pytest.raises(ValueError, match="loss: batch: expected what forward takes, then the target, got 0"):
        Residual(E, 4).loss(loss="mse")
    with pytest.raises(ValueError, match="loss: output: expected an even number of outputs for gaussian_nll"):
        Residual(E, 4).loss(torch.randn(5, 4), torch.randn(5, 1), loss="gaussian_nll")


def test_parameters_of_ones_own_are_drawn_by_draw():
    class Scaled(Residual):
        def __init__(self) -> None:
            super().__init__(E, 4)
            self.scale = nn.Parameter(torch.ones(E, 1, 1))

    class Drawn(Scaled):
        def draw(self, member: int, generator: torch.Generator | None) -> None:
            super().draw(member, generator)
            nn.init.normal_(self.scale[member], generator=generator)

    with pytest.raises(NotImplementedError, match=r"draw: expected a Scaled to define it, .*\['scale'\]"):
        Scaled().reset_parameters()
    model = Drawn()
    model.reset_parameters([5, 5, 6])
    assert torch.equal(model.scale[0], model.scale[1]) and len(model.scale.unique()) == 2
    assert torch.equal(model.select([2]).scale, model.scale[2:])


# --- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["own", "own with dropout", "mlp with dropout"])
def test_members_train_as_if_alone(kind):
    def make(members: int) -> Ensemble:
        if kind == "mlp with dropout":
            return EnsembleMLP(members, 4, [6], 1, dropout=0.3)
        return Residual(members, 4, dropout=0.3 if "dropout" in kind else 0.0)

    settings: dict[str, Any] = {
        "randomness": Randomness(init=True, shuffle=True),
        "early_stopping": 1,
        "epochs": 20,
    }
    model = make(E)
    history = train(model, seeds=[4, 5, 6], validation=0.2, **settings)
    assert len(set(history.epochs)) > 1  # so that members were left behind on the way
    for i in range(E):
        alone = make(1)
        train(alone, seeds=[4 + i], validation=0.2, **settings)
        assert_same_state(alone, model.select([i]))
    assert (np.nanmin(history.train_loss, 0) < history.train_loss[0]).all()


def test_dropout_is_for_training_alone():
    dropped, plain = (EnsembleMLP(E, 4, [6], 1, dropout=p, seeds=[1, 2, 3]) for p in (0.5, 0.0))
    for model in (dropped, plain):
        history = train(model, validation=table())
        x, y = table()
        with torch.no_grad():
            expected = model.eval().loss(x, y, loss="mse")
        torch.testing.assert_close(torch.from_numpy(history.validation_loss[-1]).float(), expected)
    assert not torch.equal(dropped.weights[0], plain.weights[0])


def test_dropout_of_an_mlp_is_that_of_its_seeds():
    model, plain = (EnsembleMLP(E, 4, [6], 2, dropout=p, seeds=[1, 2, 3]) for p in (0.5, 0.0))
    x, y, seeds = torch.randn(5, 4), torch.randn(5, 2), torch.arange(E)
    for call in (lambda m, **kw: m(x, **kw), lambda m, **kw: m.loss(x, y, loss="mse", **kw)):
        expected = call(plain, dropout=0.5, dropout_seeds=seeds)
        assert not torch.equal(expected, call(plain))
        for mode in (True, False):  # Monte Carlo dropout
            assert torch.equal(call(model.train(mode), dropout_seeds=seeds), expected)
        assert torch.equal(call(model.eval()), call(plain))
        assert torch.equal(call(model.train(), dropout=0.0), call(plain))
    assert "dropout=0.5" in repr(model) and "dropout" not in repr(plain)
    assert model.select([1]).dropout == 0.5


def test_members_that_share_their_parameters_train_as_one(tmp_path):
    def make() -> MaskedMLP:
        return MaskedMLP(E, 4, [12], 1, scale=2.0, seed=3, generator=torch.Generator().manual_seed(0))

    settings: dict[str, Any] = {"validation": 0.25, "early_stopping": 2, "epochs": 40}
    model = make()
    history = train(model, **settings)
    means = history.validation_loss.mean(1)
    best = int(means.argmin())
    assert set(history.best_epoch) == {best} and set(history.epochs) == {best + 3} and best > 0
    assert set(history.status) == {"stopped"}
    # The weights are those of that epoch, and a run that was interrupted ends with the same.
    shorter = make()
    train(shorter, **settings | {"epochs": best + 1})
    assert_same_state(shorter, model)
    resumed, path = make(), tmp_path / "run.pt"
    train(resumed, **settings | {"epochs": best}, checkpoint=path)
    train(resumed, **settings, checkpoint=path)
    assert_same_state(resumed, model)
    # One step by hand: the weights go by the sum of the masks' gradients.
    model, start = make(), make()
    one_step = {"epochs": 1, "batch_size": ROWS, "validation": 0, "randomness": Randomness(), "seed": 3}
    train(model, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **one_step)
    start.loss(*table(), loss="mse").sum().backward()
    for ours, theirs in zip(model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad)
    with pytest.raises(ValueError, match="randomness: expected neither R nor J for members that share"):
        train(make(), randomness=Randomness(init=True))


def test_members_that_share_their_parameters_diverge_together():
    model = MaskedMLP(E, 4, [12], 1, scale=2.0, seed=3)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match=r"members \[0, 1, 2\] diverged in epoch 0"):
        history = train(model, optimizer=lambda p: torch.optim.SGD(p, lr=1e30))
    assert set(history.status) == {"diverged"}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


# --- parameters that others compute ------------------------------------------------------------------------


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def holder(model: Ensemble) -> tuple[nn.Module, str]:
    """Who has the weight of the first layer, and its name."""
    return (model, "weight") if isinstance(model, EnsembleLinear) else (model.weights, "0")


def models() -> list[Ensemble]:
    return [
        EnsembleLinear(E, 4, 2),
        EnsembleMLP(E, 4, [6, 5, 4], 2, seeds=[1, 2, 3]),
        EnsembleMLP(E, 4, [], 2, bias=False),
        MaskedMLP(E, 4, [8], 2, scale=2.0),
    ]


def compute(way: str, module: nn.Module, name: str) -> None:
    if way == "prune":
        prune.random_unstructured(module, name, amount=0.5)
    elif way == "parametrize":
        parametrize.register_parametrization(module, name, Half())
    elif way == "weight norm":
        parametrizations.weight_norm(module, name, dim=None)
        with torch.no_grad():
            getattr(module.parametrizations, name).original0.mul_(3)
    else:
        torch.nn.utils.weight_norm(module, name, dim=None)
        with torch.no_grad():
            getattr(module, f"{name}_g").mul_(3)


@pytest.mark.parametrize("way", ["prune", "parametrize", "weight norm", "weight norm of old"])
@pytest.mark.parametrize("place", range(4))
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_computed_weights_are_used(way, place):
    model, x, y = models()[place], torch.randn(7, 4), torch.randn(7, 2)
    plain = type(model)(**model.config())
    plain.load_state_dict(model.state_dict())
    module, name = holder(model)
    compute(way, module, name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # what is computed follows the parameters
        if way == "prune":
            weight = getattr(module, f"{name}_orig") * getattr(module, f"{name}_mask")
        elif way == "weight norm of old":
            direction = getattr(module, f"{name}_v")
            weight = getattr(module, f"{name}_g") * direction / direction.norm()
        else:
            weight = getattr(module, name)
        with torch.no_grad():
            expected = dict(plain.named_parameters())
            for key, value in model.named_parameters():
                if key in expected:
                    expected[key].copy_(value)
            first = expected["weight" if module is model else f"weights.{name}"]
            assert not torch.equal(first, weight)
            first.copy_(weight)
        torch.testing.assert_close(model(x), plain(x))
        torch.testing.assert_close(model.loss(x, y, loss="mse"), plain.loss(x, y, loss="mse"))
        torch.testing.assert_close(model.member(1)(x), plain.member(1)(x))
        if way in ("prune", "parametrize"):  # the others have parameters without a member axis here
            torch.testing.assert_close(model.select([2, 0])(x), plain.select([2, 0])(x))
        optimizer.zero_grad()
        model.loss(x, y, loss="mse").sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.numel() > 1)
        optimizer.step()
    if not isinstance(model, MaskedMLP):
        with pytest.raises(
            ValueError, match="reset_parameters: expected parameters, got a weight that is comp"
        ):
            model.reset_parameters()


def test_pruned_members_are_chosen_and_made_permanent():
    model, x = EnsembleMLP(E, 4, [6], 2), torch.randn(7, 4)
    for layer in ("0", "1"):
        prune.random_unstructured(model.weights, layer, amount=0.5)
    before = model(x)
    chosen = model.select([2, 0])
    torch.testing.assert_close(chosen(x), before[[2, 0]])
    model.load_state_dict(model.state_dict())
    prune.remove(model.weights, "0")  # now the last of the list's parameters
    assert torch.equal(model(x), before)
    prune.remove(model.weights, "1")
    assert torch.equal(model(x), before) and set(EnsembleMLP(E, 4, [6], 2).state_dict()) == set(
        model.state_dict()
    )


def test_parametrized_ensembles_compile_and_work_with_functional_call():
    model, x = EnsembleMLP(E, 4, [6], 2), torch.randn(7, 4)
    parametrize.register_parametrization(model.weights, "0", Half())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    parameters = {name: 2 * p.detach() for name, p in model.named_parameters()}
    got = torch.func.functional_call(model, parameters, x)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(parameters[name])
    assert torch.equal(got, model(x))


# --- what members cannot be chosen from --------------------------------------------------------------------


class With(Residual):
    """A Residual with one more part."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(E, 4)
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)


class Sharing(Ensemble):
    shares_parameters = True

    def __init__(self) -> None:
        super().__init__()
        self.ensemble_size = E
        self.trunk, self.masked = nn.Linear(4, E), MaskedMLP(E, E, [8], 1, scale=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.masked(self.trunk(x))


@pytest.mark.parametrize(
    "parts, message",
    [
        (
            {"trunk": nn.Linear(4, 4)},
            r"select: expected parameters \[3, ...\], got trunk.weight of shape \[4",
        ),
        ({"gain": nn.Parameter(torch.ones(()))}, r"select: expected parameters \[3, ...\], got gain of sh"),
        ({"other": nn.ModuleList([EnsembleLinear(2, 4, 1)])}, r"select: other.0: expected 3 members, as the"),
        (
            {"seen": torch.ones(E, 1)},
            r"select: expected a With to define it, for its buffer seen of shape \[",
        ),
        ({"frozen": EnsembleMLP(E, 4, [], 1).packed()}, "select: frozen: expected a part that gives its own"),
    ],
)
def test_members_are_not_chosen_from_what_has_none(parts, message):
    model = With(**parts)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for refuse in (lambda: model.select([0, 2]), lambda: model.member(1)):
        with pytest.raises(ValueError, match=message):
            refuse()
    # fit says so before anything is changed, and not when the first member stops.
    with pytest.raises(ValueError, match=r"select: |fit: model: expected parameters \[3, ...\]"):
        train(model, randomness=Randomness(init=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_buffers_of_all_members_are_copied_and_those_of_each_left_to_the_class():
    shift = torch.arange(4.0)
    model = With(shift=shift)
    assert torch.equal(model.select([2, 0]).shift, shift) and model.select([1]).shift is not model.shift
    assert With(shift=shift[None]).member(1).select([0]).shift.shape == (1, 4)

    class Own(With):
        def select(self, indices):
            new = super().select(indices)
            new.each = self.each[indices]
            return new

    chosen = Own(each=torch.tensor([5, 6, 7])).select([2, 0])
    assert chosen.each.tolist() == [7, 5] and chosen.ensemble_size == chosen.block.ensemble_size == 2


def test_members_that_share_their_parameters_are_chosen_by_their_class():
    x = torch.randn(5, 4)
    model = Sharing()
    with pytest.raises(ValueError, match="select: expected a Sharing, whose members share their parameters"):
        model.member(1)

    class Own(Sharing):
        def select(self, indices):
            return super().select(indices)

    model = Own()
    assert torch.equal(model.select([2, 0])(x), model(x)[[2, 0]])
    train(model, early_stopping=1)  # together, so that nobody is left behind


def test_parts_choose_with_their_own_select():
    masked, x = MaskedMLP(E, 4, [8], E, scale=2.0), torch.randn(5, 4)
    model = With(masked=masked, again=masked, tied=EnsembleLinear(E, 4, 1))
    model.tied.weight = model.head[0].weight
    chosen = model.select([2, 0])
    assert torch.equal(chosen.masked(x), masked(x)[[2, 0]]) and chosen.again is chosen.masked
    assert chosen.tied.weight is chosen.head[0].weight
    with pytest.raises(ValueError, match=r"fit: model: expected parameters \[3, ...\], got masked"):
        train(model)
    alike = With(masked=MaskedMLP(E, 4, [E, E], E, scale=1.0))  # E wide, as if there were members first
    with pytest.raises(ValueError, match=r"fit: model: expected members with parameters of .* a MaskedMLP"):
        train(alike)


def test_chosen_masks_have_the_model_as_it_is():
    class Own(MaskedMLP):
        pass

    model, x = Own(E, 4, [8], 2, scale=2.0), torch.randn(5, 4)
    model.note = "kept"
    model.biases.requires_grad_(False)
    prune.random_unstructured(model.weights, "0", amount=0.5)
    with torch.no_grad():
        model.weights.get_parameter("0_orig").mul_(3)  # what pruning computed last is stale now
    chosen = model.select([2, 0])
    assert type(chosen) is Own and chosen.note == "kept" and chosen.scale == 2.0
    assert set(chosen.state_dict()) == set(model.state_dict())
    assert [p.requires_grad for p in chosen.parameters()] == [p.requires_grad for p in model.parameters()]
    assert torch.equal(chosen(x), model(x)[[2, 0]])


def test_a_member_of_a_pruned_table_is_as_the_table_is_now():
    model, rows = EnsembleEmbedding(E, 7, 4), torch.arange(7)
    prune.random_unstructured(model, "weight", amount=0.5)
    with torch.no_grad():
        model.weight_orig.mul_(3)
    assert torch.equal(model.member(1)(rows), model(rows)[1])


# --- clear errors ------------------------------------------------------------------------------------------


class Unfinished(Ensemble):
    def forward(self, x: Tensor) -> Tensor:
        return x


def ones(*shapes: tuple[int, ...], **options: Any) -> list[Tensor]:
    return [torch.ones(shape, **options) for shape in shapes]


MASK = torch.ones(2, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: EnsembleMLP(E, 4, [], 1).reset_parameters(5),
            r"seeds: expected one for each .* got 5 alone",
        ),
        (lambda: EnsembleMLP(E, 4, [], 1).select(2), r"select: indices: expected ints, a slice or .* got 2"),
        (
            lambda: EnsembleMLP(E, 4, [], 1).select("ab"),
            r"select: indices: expected ints, a slice or .* got ab",
        ),
        (
            lambda: EnsembleMLP(E, 4, [], 1).select(torch.tensor(1)),
            r"select: indices: expected ints, a slice or .* got 1",
        ),
        (
            lambda: With(other=EnsembleLinear(4, 4, 1)).reset_parameters(),
            r"draw: expected 3 members in each part of a With, got 4 in a EnsembleLinear",
        ),
        (lambda: train(Unfinished()), r"fit: model: expected Unfinished to set ensemble_size, got None"),
        (lambda: EnsembleMLP.from_parameters([], []), r"from_parameters: weights: expected at least one"),
        (
            lambda: EnsembleMLP.from_parameters(ones((6, 4)), []),
            r"weights\[0\]: expected \[E, out, in\], got",
        ),
        (
            lambda: EnsembleMLP.from_parameters(ones((3, 6, 4), (3, 2, 5)), []),
            r"weights\[1\]: expected \[3, out, 6\], got shape \[3, 2, 5\]",
        ),
        (
            lambda: EnsembleMLP.from_parameters(ones((3, 6, 4), (2, 2, 6)), []),
            r"weights\[1\]: expected \[3, out, 6\], got shape \[2, 2, 6\]",
        ),
        (
            lambda: EnsembleMLP.from_parameters(ones((3, 6, 4), (3, 2, 6)), ones((3, 6))),
            "biases: expected none or 2, got 1",
        ),
        (
            lambda: EnsembleMLP.from_parameters(ones((3, 6, 4)), ones((6,))),
            r"biases\[0\]: expected shape \[3, 6\], got shape \[6\]",
        ),
        (
            lambda: EnsembleMLP.from_parameters(ones((3, 6, 4)), ones((3, 6), dtype=torch.float64)),
            r"biases\[0\]: expected torch.float32 on cpu like weights\[0\], got torch.float64",
        ),
        (
            lambda: MaskedMLP.from_parameters(ones((6, 4), (2, 5)), [], [MASK]),
            r"weights\[1\]: expected \[out, 6\], got shape \[2, 5\]",
        ),
        (
            lambda: MaskedMLP.from_parameters(ones((6, 4), (2, 6)), [], []),
            "masks: expected one for each of 1 hidden layers, got 0",
        ),
        (
            lambda: MaskedMLP.from_parameters(ones((6, 4), (2, 6)), [], [MASK.float()]),
            r"masks\[0\]: expected bool \[N, 6\], got torch.float32",
        ),
        (
            lambda: MaskedMLP.from_parameters(ones((6, 4), (2, 6)), [], [MASK[:, :5]]),
            r"masks\[0\]: expected bool \[N, 6\], got torch.bool of shape \[2, 5\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_an_ensemble_shows_itself_before_it_has_a_size():
    assert repr(Unfinished()) == "Unfinished(ensemble_size=None)"
