"""Dropout of EnsembleMLP and TabularEnsemble without seeds: drawn in training, and for MC dropout."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyens import EnsembleLinear, EnsembleMLP
from pyens.nn import Ensemble, TabularEnsemble
from pyens.optim import fused
from pyens.training import fit

E, B, F = 3, 8, 4
X = torch.randn(B, F, generator=torch.Generator().manual_seed(0))
Y = torch.randn(B, 2, generator=torch.Generator().manual_seed(1))
RATES = [0.5, 0.0, 0.25]


def mlp(dropout: Any = 0.5) -> EnsembleMLP:
    return EnsembleMLP(E, F, [16, 16], 2, dropout=dropout, seeds=[1, 2, 3])


def tabular(dropout: Any = 0.5) -> TabularEnsemble:
    return TabularEnsemble(E, [], F, [16, 16], 2, dropout=dropout, seeds=[1, 2, 3])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(generator: torch.Generator | None = None) -> Tensor:
    return torch.randint(2**62, (E,), generator=generator)


def forward(model: Any, **options: Any) -> Tensor:
    return model(*inputs(model), **options)


def loss(model: Any, **options: Any) -> Tensor:
    return model.loss(*inputs(model), Y, loss="mse", **options)


def inputs(model: Any) -> tuple[Tensor | None, ...]:
    return (None, X) if isinstance(model, TabularEnsemble) else (X,)


models = pytest.mark.parametrize("make", [mlp, tabular])
rates = pytest.mark.parametrize("rate", [0.5, RATES], ids=str)
calls = pytest.mark.parametrize("call", [forward, loss])


@models
@rates
@calls
def test_training_draws_seeds_once_a_call(make, rate, call):
    model = make(rate)
    torch.manual_seed(5)
    got = [call(model), call(model)]
    after = torch.get_rng_state()
    torch.manual_seed(5)
    expected = [call(model, dropout_seeds=drawn()), call(model, dropout_seeds=drawn())]
    assert torch.equal(torch.get_rng_state(), after)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(*got)


@models
@rates
@calls
def test_a_generator_of_ones_own(make, rate, call):
    model = make(rate)
    model.dropout_generator = seeded(7)
    before = torch.get_rng_state()
    got = [call(model), call(model)]
    assert torch.equal(torch.get_rng_state(), before)
    generator = seeded(7)
    for one in got:
        assert torch.equal(one, call(model, dropout_seeds=drawn(generator)))


@models
@rates
@calls
def test_evaluation_drops_only_for_mc_dropout(make, rate, call):
    model, plain = make(rate).eval(), make(0.0)
    before = torch.get_rng_state()
    assert torch.equal(call(model), call(plain))
    assert torch.equal(torch.get_rng_state(), before)
    model.mc_dropout = True
    got = call(model)
    torch.set_rng_state(before)
    assert torch.equal(got, call(model, dropout_seeds=drawn())) and not torch.equal(got, call(plain))


@models
@calls
def test_seeds_that_are_given_win_and_nothing_else_is_drawn(make, call):
    model = make()
    before, seeds = torch.get_rng_state(), torch.arange(E)
    expected = call(model.eval(), dropout_seeds=seeds)
    for mc in (False, True):
        model.mc_dropout = mc
        for training in (False, True):
            assert torch.equal(call(model.train(training), dropout_seeds=seeds), expected)
    for without in (make(0.0), EnsembleLinear(E, F, 2, seeds=range(E))):
        without.mc_dropout = True
        call(without)
    assert torch.equal(torch.get_rng_state(), before)


@calls
def test_a_rate_of_the_call(call):
    model = mlp(0.0)
    torch.manual_seed(3)
    got = call(model, dropout=0.5)
    torch.manual_seed(3)
    seeds = drawn()
    assert torch.equal(got, call(model, dropout=0.5, dropout_seeds=seeds))
    torch.manual_seed(3)
    assert torch.equal(call(model, dropout=RATES), call(model, dropout=RATES, dropout_seeds=seeds))
    assert torch.equal(call(mlp(), dropout=0.0), call(model))
    with pytest.raises(ValueError, match=r"dropout_seeds: expected int64 \[3\] with dropout 0.5, got None"):
        call(model.eval(), dropout=0.5)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "select": lambda model: model.select(range(E)),
}


@pytest.mark.parametrize("how", [*COPIES, "torch.save"])
@models
def test_copies_go_on_where_the_generator_is(make, how):
    model = make()
    model.dropout_generator, model.mc_dropout = seeded(7), True
    forward(model)
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = COPIES[how](model)
    assert other.dropout_generator is not model.dropout_generator and other.mc_dropout
    for _ in range(2):
        assert torch.equal(forward(other.eval()), forward(model.eval()))


def test_the_same_masks_backward():
    model = mlp(0.5).double()
    x = X.double()
    model.dropout_generator = seeded(1)
    model(x).square().sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x, dropout_seeds=drawn(seeded(1))).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(got, model.parameters(), strict=True))


def test_activation_checkpointing():
    model = mlp(0.5).double()
    x = X.double().requires_grad_()
    torch.manual_seed(2)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum().backward()
    got = x.grad
    torch.manual_seed(2)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(got, expected)


def test_another_default_device():
    model = mlp()
    with torch.device("meta"):
        output = model(X)
    assert output.device.type == "cpu"
    assert model.to("meta")(X.to("meta")).is_meta


@calls
@rates
def test_compiled(call, rate):
    torch._dynamo.reset()
    model = mlp(rate)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    one, other = compiled(model), compiled(model)
    assert one.shape == call(model).shape and not torch.equal(one, other)
    torch.manual_seed(4)
    one = compiled(model)
    torch.manual_seed(4)
    assert torch.equal(compiled(model), one)
    seeds = torch.arange(E)
    torch.testing.assert_close(compiled(model, dropout_seeds=seeds), call(model, dropout_seeds=seeds))
    torch._dynamo.reset()
    model.dropout_generator = seeded(3)
    broken = torch.compile(call, backend="aot_eager")(model)
    torch.testing.assert_close(broken, call(model, dropout_seeds=drawn(seeded(3))))


def test_vmap_draws_as_torch_has_it():
    model = mlp()
    x = torch.randn(2, B, F)
    with pytest.raises(RuntimeError, match="random operation"):
        torch.func.vmap(model)(x)
    torch.manual_seed(1)
    got = torch.func.vmap(model, randomness="same")(x)
    torch.manual_seed(1)
    seeds = drawn()
    torch.testing.assert_close(got, torch.stack([model(one, dropout_seeds=seeds) for one in x]))
    different = torch.func.vmap(model, randomness="different")(x[:1].expand(2, B, F))
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize(
    ("generator", "got"), [(3, "int"), (torch.tensor(1), "Tensor"), ("meta", "str")], ids=str
)
def test_refuses_another_generator(generator, got):
    model = mlp()
    model.dropout_generator = generator
    with pytest.raises(
        TypeError, match=f"^EnsembleMLP: dropout_generator: expected a torch.Generator on the CPU, got {got}$"
    ):
        model(X)


# --- fit -----------------------------------------------------------------------------------------


def train(model: Ensemble) -> Any:
    return fit(
        model,
        (X, Y),
        loss="mse",
        optimizer=lambda p: fused(torch.optim.SGD, p, lr=0.01),
        epochs=2,
        batch_size=4,
        seed=1,
        validation=0.25,
        progress=False,
    )


def test_fit_draws_its_own():
    model = mlp()
    model.dropout_generator = seeded(3)
    state = model.dropout_generator.get_state()
    before = torch.get_rng_state()
    train(model)
    assert torch.equal(model.dropout_generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_class_of_ones_own_need_not_pass_seeds_on():
    class Own(Ensemble):
        def __init__(self) -> None:
            super().__init__()
            self.ensemble_size = E
            self.layers = nn.Sequential(mlp(), nn.ReLU(), EnsembleLinear(E, 2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    model = Own()
    model.layers[0].dropout_generator = seeded(3)
    again = copy.deepcopy(model)
    for one in (model, again):
        assert torch.isfinite(torch.tensor(train(one).train_loss)).all()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
