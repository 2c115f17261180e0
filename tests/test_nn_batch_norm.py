"""pyens.nn.EnsembleBatchNorm against nn.BatchNorm1d, in fit, and folded into linear layers."""

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from nn_models import assert_same_state
from torch import Tensor, nn

from pyens import EnsembleLinear, EnsembleMLP
from pyens.nn import Ensemble, EnsembleBatchNorm, fold_batchnorm
from pyens.optim import fused
from pyens.training import fit

E, B, F = 3, 7, 5


def norms(**options: Any) -> list[nn.BatchNorm1d]:
    """Separate layers, each with parameters and statistics of its own."""
    options = {"dtype": torch.float64} | options
    made = [nn.BatchNorm1d(F, **options) for _ in range(E)]
    for norm in made:
        with torch.no_grad():
            if norm.affine:
                norm.weight.normal_()
                norm.bias.normal_()
            if norm.track_running_stats:
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
    return made


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"affine": False},
    {"momentum": None},
    {"momentum": 0.3, "eps": 1e-2},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_is_that_many_batch_norms(options, shared):
    alone = norms(**options)
    model = EnsembleBatchNorm.from_modules(alone)
    for training in (True, True, False, True, False):
        x = torch.randn((B, F) if shared else (E, B, F), dtype=torch.float64, requires_grad=True)
        theirs = x.detach().clone().requires_grad_()
        above = torch.randn(E, B, F, dtype=torch.float64)
        got = model.train(training)(x)
        expected = torch.stack(
            [n.train(training)(theirs if shared else theirs[i]) for i, n in enumerate(alone)]
        )
        close(got, expected)
        (got * above).sum().backward()
        (expected * above).sum().backward()
        close(x.grad, theirs.grad)
        for i, norm in enumerate(alone):
            for name, parameter in norm.named_parameters():
                close(getattr(model, name).grad[i], parameter.grad)
            for name, buffer in norm.named_buffers():
                close(getattr(model, name)[i], buffer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_other_dtypes(dtype, training, shared):
    alone = [n.train(training) for n in norms(dtype=dtype)]
    model = EnsembleBatchNorm.from_modules(alone)
    x = torch.randn((B, F) if shared else (E, B, F)).to(dtype)
    got = model(x)
    assert got.dtype == dtype and got.shape == (E, B, F)
    expected = torch.stack([n(x if shared else x[i]) for i, n in enumerate(alone)])
    close(got.float(), expected.float(), 1e-5 if dtype == torch.float32 else 5e-2)
    assert model.running_mean.dtype == dtype
    with pytest.raises(
        TypeError, match=r"EnsembleBatchNorm: input: expected the dtype .*, got torch.float64"
    ):
        model(x.double())


def test_16_bits_beside_parameters_in_float32():
    alone = norms(dtype=torch.float32)
    model = EnsembleBatchNorm.from_modules(alone)
    x = torch.randn(E, B, F).bfloat16()
    for training in (True, False):
        got = model.train(training)(x)
        assert got.dtype == torch.bfloat16
        close(got, torch.stack([n.train(training)(x[i]) for i, n in enumerate(alone)]), 1e-2)


def test_members_that_have_seen_different_numbers_of_batches():
    alone = norms(momentum=None)
    for times, norm in enumerate(alone):
        for _ in range(times):
            norm(torch.randn(B, F, dtype=torch.float64))
    model = EnsembleBatchNorm.from_modules(alone)
    assert model.num_batches_tracked.tolist() == [0, 1, 2]
    x = torch.randn(E, B, F, dtype=torch.float64)
    model(x)
    for i, norm in enumerate(alone):
        norm(x[i])
        close(model.running_var[i], norm.running_var)
        close(model.running_mean[i], norm.running_mean)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_there_and_back(options):
    alone = [n.eval() for n in norms(**options)]
    model = EnsembleBatchNorm.from_modules(alone)
    assert not model.training
    for norm, back in zip(alone, model.to_modules(), strict=True):
        assert repr(back) == repr(norm) and back.training == norm.training
        state = norm.state_dict()
        assert list(back.state_dict()) == list(state)
        assert all(torch.equal(back.state_dict()[name], state[name]) for name in state)
    built = EnsembleBatchNorm(**json.loads(json.dumps(model.config())), dtype=torch.float64).eval()
    built.load_state_dict(model.state_dict())
    stacked = EnsembleBatchNorm(**model.config(), dtype=torch.float64).eval()
    parameters, buffers = torch.func.stack_module_state(alone)
    stacked.load_state_dict(parameters | buffers)
    x = torch.randn(B, F, dtype=torch.float64)
    for other in (built, stacked, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x)) and repr(other) == repr(model)


@pytest.mark.parametrize("in_place", [True, False])
def test_select(in_place):
    model = EnsembleBatchNorm.from_modules(norms())
    x = torch.randn(E, B, F, dtype=torch.float64)
    expected, before = model.eval()(x).detach(), copy.deepcopy(model)
    parameter = model.weight
    chosen = model.select_([2, 0]) if in_place else model.select([2, 0])
    assert len(chosen) == 2 and torch.equal(chosen(x[[2, 0]]), expected[[2, 0]])
    assert torch.equal(chosen.running_mean, before.running_mean[[2, 0]])
    assert chosen.num_batches_tracked.shape == (2,)
    chosen.train()(x[:2])
    if in_place:
        assert chosen is model and model.weight is parameter
    else:
        assert_same_state(model, before)


def test_select_of_an_ensemble_with_one():
    model = Normed(E, F).double()
    model(torch.randn(B, F, dtype=torch.float64))
    model.eval()
    x = torch.randn(B, F, dtype=torch.float64)
    expected = model(x)
    for chosen in (model.select([1]), model.member(1), copy.deepcopy(model).select_([1])):
        assert torch.equal(chosen(x)[0], expected[1])


def test_reset_parameters():
    model = EnsembleBatchNorm.from_modules(norms())
    model.reset_parameters([1, 2, 3])
    assert_same_state(model, EnsembleBatchNorm(E, F, dtype=torch.float64))
    assert model.member(0).state_dict().keys() == nn.BatchNorm1d(F).state_dict().keys()


def test_empty_and_meta():
    model = EnsembleBatchNorm(E, F)
    assert model.eval()(torch.randn(0, F)).shape == (E, 0, F)
    assert EnsembleBatchNorm(E, F, device="meta")(torch.empty(B, F, device="meta")).shape == (E, B, F)


def test_functional_call_and_compile():
    model, x = EnsembleBatchNorm.from_modules(norms()), torch.randn(E, B, F, dtype=torch.float64)
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    before = copy.deepcopy(model)
    expected = copy.deepcopy(model)(x)
    assert torch.equal(torch.func.functional_call(model, state, x), expected)
    assert_same_state(model, before)
    assert not torch.equal(state["running_mean"], model.running_mean)
    torch._dynamo.reset()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        model.train(training)
        eager.train(training)
        close(compiled(x), eager(x))
    close(model.running_var, eager.running_var)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EnsembleBatchNorm(0, F), "EnsembleBatchNorm: ensemble_size: expected a positive integer"),
        (lambda: EnsembleBatchNorm(E, 0), "EnsembleBatchNorm: num_features: expected a positive integer"),
        (
            lambda: EnsembleBatchNorm(E, F)(torch.randn(B, 4)),
            r"EnsembleBatchNorm: input: expected \[B, 5\] or \[3, B, 5\], got shape \[7, 4\]",
        ),
        (lambda: EnsembleBatchNorm(E, F)(torch.randn(2, B, F)), r"input: .* got shape \[2, 7, 5\]"),
        (lambda: EnsembleBatchNorm(E, F)(torch.randn(F)), r"input: .* got shape \[5\]"),
        (lambda: EnsembleBatchNorm(E, F)(torch.randn(1, F)), r"input: expected 2 or more rows .*, got 1"),
        (
            lambda: EnsembleBatchNorm(E, F, track_running_stats=False).eval()(torch.randn(E, 1, F)),
            r"input: expected 2 or more rows .*, got 1",
        ),
        (
            lambda: EnsembleBatchNorm.from_modules([nn.Linear(2, 3)]),
            r"from_modules: modules\[0\]: expected nn.BatchNorm1d, got Linear",
        ),
        (
            lambda: EnsembleBatchNorm.from_modules([nn.BatchNorm1d(5), nn.BatchNorm1d(5, eps=0.1)]),
            r"from_modules: modules\[1\]: expected BatchNorm1d\(5, eps=1e-05.* like modules.*, got .*eps=0.1",
        ),
        (
            lambda: EnsembleBatchNorm.from_modules([nn.BatchNorm1d(5), nn.BatchNorm1d(5).double()]),
            r"modules\[1\]: expected .*torch.float32, cpu like modules\[0\], got .*torch.float64, cpu",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- fit -----------------------------------------------------------------------------------------


class Normed(Ensemble):
    """Linear, batch norm, ReLU, linear: a class of one's own."""

    def __init__(self, ensemble_size: int, width: int) -> None:
        super().__init__()
        self.ensemble_size = ensemble_size
        self.layers = nn.Sequential(
            EnsembleLinear(ensemble_size, width, 8),
            EnsembleBatchNorm(ensemble_size, 8),
            nn.ReLU(),
            EnsembleLinear(ensemble_size, 8, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def table(rows: int = 60) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, F, generator=draw)
    return x, (x[:, :1] * x[:, 1:2]).tanh() + 0.1 * torch.randn(rows, 1, generator=draw)


def train(model: Ensemble, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "loss": "mse",
        "optimizer": lambda p: fused(torch.optim.Adam, p, lr=0.05),
        "epochs": 12,
        "batch_size": 16,
        "seed": 3,
        "progress": False,
        "validation": 0.25,
    }
    return fit(model, changes.pop("data", table()), **arguments | changes)


@pytest.mark.filterwarnings("ignore:fit")
def test_trains_and_each_member_keeps_the_statistics_of_its_best_epoch():
    torch.manual_seed(0)
    model = Normed(E, F)
    history = train(model, epochs=60, early_stopping=3, validation=table(40))
    assert len(set(history.epochs)) > 1  # members left on the way
    best = np.nanmin(history.validation_loss, 0)
    assert (best < history.validation_loss[0]).all()
    x, y = table(40)
    with torch.no_grad():
        now = model.eval().loss(x, y, loss="mse")
    torch.testing.assert_close(now, torch.from_numpy(best).float(), rtol=1e-5, atol=1e-6)
    counts = model.layers[1].num_batches_tracked.tolist()
    assert all(count % 4 == 0 for count in counts) and len(set(counts)) > 1  # whole epochs of 4 batches


@pytest.mark.filterwarnings("ignore:fit")
def test_a_member_trains_as_it_would_alone():
    torch.manual_seed(0)
    model = Normed(E, F)
    alone = [model.select([i]) for i in range(E)]
    settings: dict[str, Any] = {"epochs": 40, "early_stopping": 2}
    train(model, seeds=[4, 5, 6], **settings)
    for i, one in enumerate(alone):
        train(one, seeds=[4 + i], **settings)
        for (name, got), expected in zip(
            model.select([i]).state_dict().items(), one.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4, msg=name)


def test_checkpoints_hold_the_statistics(tmp_path):
    torch.manual_seed(0)
    model = Normed(E, F)
    again, whole = copy.deepcopy(model), copy.deepcopy(model)
    train(whole, epochs=6)
    train(model, epochs=3, checkpoint=tmp_path / "run")
    train(again, epochs=6, checkpoint=tmp_path / "run")
    assert_same_state(again, whole)
    assert again.layers[1].num_batches_tracked[0] == 6 * 3


@pytest.mark.parametrize("averages", [{"ema": 0.5}, {"swa_start": 3}], ids=str)
def test_averages_hold_the_statistics_too(averages):
    torch.manual_seed(0)
    model = Normed(E, F)
    plain = copy.deepcopy(model)
    train(model, **averages)
    train(plain)
    norm, other = model.layers[1], plain.layers[1]
    assert torch.equal(norm.num_batches_tracked, other.num_batches_tracked)
    assert not torch.equal(norm.running_mean, other.running_mean)
    assert norm.running_var.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bootstrap": "poisson"}, r"fit: model: expected no EnsembleBatchNorm where members leave rows out"),
        (
            {"sample_weight": (torch.arange(60) % 2).float()},
            r"fit: model: expected no EnsembleBatchNorm where members leave rows out",
        ),
        ({"batch_size": 11}, r"fit: batch_size: expected batches, .* of 2 or more rows .*, got one of 1 row"),
        ({"batch_size": 1}, r"fit: batch_size: .* got one of 1 row"),
        ({"micro_batch_size": 5}, r"fit: batch_size: .* got one of 1 row"),
    ],
    ids=str,
)
def test_fit_refuses_before_anything_is_changed(settings, message):
    model = Normed(E, F)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        train(model, **{"validation": [*range(4)]} | settings)
    assert_same_state(model, before)


# --- folding -------------------------------------------------------------------------------------


def trained_norm(features: int, **options: Any) -> EnsembleBatchNorm:
    norm = EnsembleBatchNorm(E, features, dtype=torch.float64, **options)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            if tensor is not None:
                tensor.normal_()
        if norm.running_var is not None:
            norm.running_var.uniform_(0.5, 2)
    return norm


def linear(inputs: int, outputs: int, bias: bool = True) -> EnsembleLinear:
    return EnsembleLinear(E, inputs, outputs, bias, dtype=torch.float64)


FOLDED: dict[str, Any] = {
    "after the linear layer": lambda: [linear(4, 6), trained_norm(6), nn.ReLU(), linear(6, 2)],
    "after the activation": lambda: [linear(4, 6), nn.ReLU(), trained_norm(6), linear(6, 2)],
    "both": lambda: [linear(4, 6), trained_norm(6), nn.Tanh(), trained_norm(6), linear(6, 2)],
    "in front": lambda: [trained_norm(4), linear(4, 6), nn.GELU(), linear(6, 2)],
    "at the end": lambda: [linear(4, 6), nn.SiLU(), linear(6, 2), trained_norm(2)],
    "two": lambda: [linear(4, 6), nn.ReLU(), trained_norm(6), trained_norm(6), linear(6, 2), trained_norm(2)],
    "no biases": lambda: [
        linear(4, 6, bias=False),
        trained_norm(6),
        nn.ReLU(),
        linear(6, 5, False),
        nn.ReLU(),
        linear(5, 2, False),
    ],
    "not affine": lambda: [linear(4, 6), trained_norm(6, affine=False), nn.ReLU(), linear(6, 2)],
    "no activation": lambda: [linear(4, 6), trained_norm(6), linear(6, 2)],
    "one layer": lambda: [linear(4, 2), trained_norm(2)],
    "nested": lambda: [nn.Sequential(linear(4, 6), trained_norm(6)), nn.Sequential(nn.ReLU(), linear(6, 2))],
    "dropout and identity": lambda: [
        linear(4, 6),
        nn.Dropout(0.9),
        nn.Identity(),
        trained_norm(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        linear(6, 2),
    ],
    "activations of each layer and the last": lambda: [
        linear(4, 6),
        nn.CELU(0.1),
        trained_norm(6),
        linear(6, 5, False),
        nn.Tanh(),
        linear(5, 2),
        nn.Sigmoid(),
    ],
    "no norm": lambda: [linear(4, 6), nn.ReLU(), linear(6, 2)],
}


@pytest.mark.parametrize("case", FOLDED)
@pytest.mark.parametrize("as_list", [True, False])
def test_folding_changes_no_output(case, as_list):
    parts = FOLDED[case]()
    sequence = nn.Sequential(*parts).eval()
    before = copy.deepcopy(sequence)
    folded = fold_batchnorm(parts if as_list else sequence)
    assert type(folded) is EnsembleMLP and not folded.training
    for x in (torch.randn(9, 4).double(), torch.randn(E, 9, 4).double()):
        close(folded(x), sequence(x), 1e-11)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    assert_same_state(sequence, before)


def hooked(module: nn.Module, pre: bool = False) -> nn.Module:
    def hook(module: nn.Module, *_: Any) -> None:
        pass

    (module.register_forward_pre_hook if pre else module.register_forward_hook)(hook)
    return module


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            lambda: [linear(4, 6), trained_norm(6).train(), nn.ReLU(), linear(6, 2)],
            "in evaluation .*in training",
        ),
        (
            lambda: [linear(4, 6), trained_norm(6, track_running_stats=False), linear(6, 2)],
            r"expected EnsembleBatchNorm with running statistics, .* got EnsembleBatchNorm\(",
        ),
        (
            lambda: [linear(4, 6), nn.ReLU(), trained_norm(6)],
            "expected EnsembleLinear after EnsembleBatchNorm",
        ),
        (
            lambda: [linear(4, 6), nn.ReLU(), trained_norm(6), nn.Tanh(), linear(6, 2)],
            r"expected EnsembleLinear after EnsembleBatchNorm, .* got Tanh\(\)",
        ),
        (
            lambda: [linear(4, 6), trained_norm(5), linear(6, 2)],
            r"batch norm of shape \[3, 6\] .* got \[3, 5\]",
        ),
        (lambda: [nn.Linear(4, 6), nn.ReLU(), linear(6, 2)], r"got Linear\(in_features=4"),
        (lambda: [linear(4, 6), nn.BatchNorm1d(6), linear(6, 2)], r"got BatchNorm1d\(6"),
        (lambda: [linear(4, 6), nn.ReLU(), nn.Tanh(), linear(6, 2)], "expected one activation after each"),
        (lambda: [linear(4, 6), nn.Softsign(), linear(6, 2)], r"got Softsign\("),
        (lambda: [linear(4, 6), nn.LayerNorm(6), linear(6, 2)], r"got LayerNorm\("),
        (lambda: [hooked(linear(4, 6)), linear(6, 2)], "without forward hooks, got them on EnsembleLinear"),
        (lambda: [linear(4, 6), hooked(trained_norm(6), True), linear(6, 2)], "without forward pre-hooks"),
        (lambda: [hooked(nn.Sequential(linear(4, 6)))], "without forward hooks, got them on Sequential"),
        (lambda: [linear(4, 6), torch.relu, linear(6, 2)], "expected layers that are modules, got builtin_"),
        (lambda: [], "expected an EnsembleLinear, or that and an activation, as the last layer"),
    ],
)
def test_folding_refuses(parts, message):
    made = parts()
    for module in made:
        if isinstance(module, nn.Module) and "in training" not in message:
            module.eval()
    with pytest.raises(ValueError, match=r"^fold_batchnorm: model: .*" + message):
        fold_batchnorm(made)


def test_folding_refuses_other_modules():
    with pytest.raises(
        ValueError, match=r"fold_batchnorm: model: expected nn.Sequential or a list, got Normed"
    ):
        fold_batchnorm(Normed(E, F))
    assert fold_batchnorm(Normed(E, F).eval().layers).hidden_features == (8,)
