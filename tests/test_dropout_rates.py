"""A rate of dropout for each member: the bits of a member where its rate is that of all."""

import copy
import io
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_problems import NO_OPTIONS
from test_dropout import DTYPES, problem
from torch import Tensor

from pyens import reference
from pyens.nn import EnsembleMLP, TabularEnsemble
from pyens.ops import ensemble_mlp, ensemble_mlp_loss

RATES = [0.1, 0.0, 0.7, 0.3]
E = len(RATES)


def everything(
    rates: Any, seeds: Tensor, x: Tensor, weights: list[Tensor], biases: list[Tensor], **options: Any
) -> list[Tensor]:
    """Outputs, losses and the gradients of both, each of the members."""
    tensors = [t.detach().requires_grad_() for t in (x, *weights, *biases)]
    x, parameters, n = tensors[0], tensors[1:], len(weights)
    options |= {"dropout": rates, "dropout_seeds": seeds}
    output = ensemble_mlp(x, parameters[:n], parameters[n:], **options)
    target = torch.zeros(output.shape[1:], dtype=x.dtype, device=x.device)
    loss = ensemble_mlp_loss(x, target, parameters[:n], parameters[n:], loss="mse", **options)
    found = [output.detach(), loss.detach()]
    for total in (output.float().square().sum(), loss.sum()):
        found += torch.autograd.grad(total, tensors, retain_graph=True)
        composed = torch.autograd.grad(total, tensors, create_graph=True)
        for ours, theirs in zip(composed, found[-len(tensors) :], strict=True):  # not to the bit
            size = theirs.double().square().mean().sqrt().nan_to_num(1)
            error = (ours.double() - theirs.double()).square().mean().sqrt().nan_to_num(0)
            assert error <= 32 * torch.finfo(x.dtype).eps * size
    return [t.detach() for t in found]


def assert_each_as_alone(rates: Any, arguments: tuple[Any, ...], seeds: Tensor, **options: Any) -> None:
    x, weights, biases = arguments
    got = everything(rates, seeds, *arguments, **options)
    for m, rate in enumerate(rates):
        member = (x[m : m + 1], [w[m : m + 1] for w in weights], [b[m : m + 1] for b in biases])
        alone = everything(float(rate), seeds[m : m + 1], *member, **options)
        for ours, theirs in zip(got, alone, strict=True):
            assert torch.equal(ours[m], theirs[0]), (m, rate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("b", [1, 5, 70, 300])
def test_a_member_has_the_bits_of_its_rate(dtype, activation, b):
    arguments = problem(E, b, [5, 19, 16, 2], dtype, per_member=True)
    for rates in (RATES, tuple(RATES), torch.tensor(RATES, dtype=torch.float64)):
        assert_each_as_alone(rates, arguments, torch.arange(E) * 9, activation=activation)


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(0, 0.99)), min_size=1, max_size=5),
    st.integers(0, 40),
    st.integers(0, 2**40),
)
def test_drawn_rates(rates, b, seed):
    arguments = problem(len(rates), b, [3, 7, 2], torch.float32, per_member=True)
    seeds = torch.arange(seed, seed + len(rates))
    assert_each_as_alone(rates, arguments, seeds)
    output = ensemble_mlp(*arguments, dropout=rates, dropout_seeds=seeds)
    exact = reference.ensemble_mlp(*arguments, dropout=rates, dropout_seeds=seeds)
    torch.testing.assert_close(output, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_the_reference(device, dtype):
    x, weights, biases = problem(E, 70, [13, 30, 4], dtype, device)
    options: Any = {"dropout": torch.tensor(RATES, device=device), "activation": "gelu"}
    options["dropout_seeds"] = torch.arange(E, device=device)
    got = ensemble_mlp(x, weights, biases, **options).double()
    exact = reference.ensemble_mlp(
        x.double(), [w.double() for w in weights], [b.double() for b in biases], **options
    )
    plain = reference.ensemble_mlp(x, weights, biases, **options).double()
    rounding = torch.finfo(dtype).eps * exact.square().mean().sqrt()
    error, of_plain = ((y - exact).square().mean().sqrt() for y in (got, plain))
    assert error <= 16 * rounding if dtype == torch.float64 else error <= 2 * (of_plain + rounding)


def test_a_member_of_rate_0_meets_what_one_without_dropout_meets():
    arguments = problem(E, 9, [3, 8, 2], torch.float32, per_member=True)
    for tensors in (arguments[1], arguments[2]):
        tensors[-1][1] = float("inf")
    got = everything(RATES, torch.arange(E), *arguments, activation="tanh")
    x, weights, biases = arguments
    plain = everything(
        0.0, torch.arange(1), x[1:2], [w[1:2] for w in weights], [b[1:2] for b in biases], activation="tanh"
    )
    for ours, theirs in zip(got, plain, strict=True):
        torch.testing.assert_close(ours[1], theirs[0], rtol=0, atol=0, equal_nan=True)


def test_derivatives(device):
    x, weights, biases = problem(2, 3, [3, 6, 5, 2], torch.float64, device)
    options: Any = {"activation": "tanh", "dropout": [0.4, 0.1]}
    options["dropout_seeds"] = torch.tensor([3, 4], device=device)
    tensors = [t.requires_grad_() for t in (x, *weights, *biases)]
    target = torch.zeros(3, 2, dtype=torch.float64, device=device)

    def output(x: Tensor, *parameters: Tensor) -> Tensor:
        return ensemble_mlp(x, parameters[:3], parameters[3:], **options)

    def loss(x: Tensor, *parameters: Tensor) -> Tensor:
        return ensemble_mlp_loss(x, target, parameters[:3], parameters[3:], loss="mse", **options)

    for function in (output, loss):
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_torch_func(device):
    x, weights, biases = problem(3, 6, [4, 9, 2], torch.float64, device)
    seeds, rates = torch.arange(3, device=device), torch.tensor([0.5, 0.0, 0.2], device=device)
    target = torch.zeros(6, 2, dtype=torch.float64, device=device)

    def output(rates: Any, w: list[Tensor]) -> Tensor:
        return ensemble_mlp(x, w, biases, activation="tanh", dropout=rates, dropout_seeds=seeds)

    def loss(rates: Any, w: list[Tensor]) -> Tensor:
        return ensemble_mlp_loss(
            x, target, w, biases, loss="mse", activation="tanh", dropout=rates, dropout_seeds=seeds
        )

    tensors = [w.requires_grad_() for w in weights]
    for function in (output, loss):
        got = torch.func.grad(lambda w, f=function: f(rates, w).square().sum())([w.detach() for w in weights])
        expected = torch.autograd.grad(function(rates, weights).square().sum(), tensors)
        torch.testing.assert_close(list(got), list(expected))
        several = torch.stack([rates, rates.flip(0), rates / 2])
        many = torch.func.vmap(function, in_dims=(0, None))(several, [w.detach() for w in weights])
        for i in range(3):
            assert torch.equal(many[i], function(several[i], weights))


def test_vmap_over_inputs_numbers_the_rows_anew(device):
    _, weights, biases = problem(2, 1, [4, 9, 2], torch.float32, device)
    xs, seeds = torch.randn(5, 6, 4, device=device), torch.arange(2, device=device)

    def call(x: Tensor) -> Tensor:
        return ensemble_mlp(x, weights, biases, dropout=[0.5, 0.2], dropout_seeds=seeds)

    for i, got in enumerate(torch.func.vmap(call)(xs)):
        assert torch.equal(got, call(xs[i]))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    x, weights, biases = problem(3, 5, [4, 6, 2], torch.float32, device)
    weights = [w.requires_grad_(requires_grad) for w in weights]
    seeds = torch.arange(3, device=device)
    rates = torch.tensor([0.5, 0.0, 0.1], dtype=torch.float64, device=device)
    options = ("relu", 0.0, seeds, rates)
    torch.library.opcheck(torch.ops.pyens.ensemble_mlp, (x, weights, biases, [], [], *options))
    given = (
        x,
        torch.zeros(5, 2, device=device),
        weights,
        biases,
        [],
        [],
        "mse",
        1.0,
        0.0,
        None,
        *NO_OPTIONS,
        *options,
    )
    torch.library.opcheck(torch.ops.pyens.ensemble_mlp_loss, given)
    if not requires_grad:
        backward = (
            torch.randn(3, 5, 2, device=device),
            x,
            weights,
            biases,
            [],
            [],
            None,
            [True] * 5,
            *options,
        )
        torch.library.opcheck(torch.ops.pyens.ensemble_mlp_backward, backward)


def test_compiled(device):
    torch._dynamo.reset()
    model = EnsembleMLP(3, 4, [6], 2, dropout=[0.5, 0.0, 0.1], device=device)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, y: Tensor, seeds: Tensor) -> Tensor:
        return model.loss(x, y, loss="mse", dropout_seeds=seeds).sum() + model(x, dropout_seeds=seeds).sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i, b in enumerate((5, 7, 12)):
        given = (torch.randn(b, 4, device=device), torch.randn(b, 2, device=device))
        seeds = torch.arange(3, device=device) + 10 * i
        got, expected = compiled(*given, seeds), step(*given, seeds)
        torch.testing.assert_close(got, expected)
        parameters = list(model.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters)
        )
    assert counter.frame_count <= 2


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "number": ([0.1, 0.2], ValueError, r"dropout: expected a number, or \[3\], .*, got shape \[2\]"),
    "none": ([], ValueError, r"dropout: expected a number, or \[3\], .*, got shape \[0\]"),
    "shape": (
        torch.ones(3, 2) / 2,
        ValueError,
        r"dropout: expected a number, or \[3\], .*, got shape \[3, 2\]",
    ),
    "1": ([0.1, 1.0, 0.2], ValueError, r"dropout\[1\]: expected 0 <= dropout < 1, got 1"),
    "ragged": ([[0.1], [0.1, 0.2], [0.1]], ValueError, "dropout: expected as many rates of each member, got"),
    "nan": ([0.1, 0.2, float("nan")], ValueError, r"dropout\[2\]: expected 0 <= dropout < 1, got nan"),
    "1 in a tensor": (
        torch.tensor([0.1, 1, 0]),
        ValueError,
        r"dropout: expected 0 <= dropout < 1 .*, got 1 of",
    ),
    "nan in a tensor": (
        torch.tensor([0, torch.nan, 0]),
        ValueError,
        r"dropout: expected .*, got nan of member 1",
    ),
    "-1 in a tensor": (
        torch.tensor([0, 0, -0.1]),
        ValueError,
        r"dropout: expected .*, got -0.1.* of member 2",
    ),
    "string": (["a", 0.1, 0.2], TypeError, r"dropout\[0\]: expected a number, got str"),
    "bool": (torch.ones(3, dtype=torch.bool), TypeError, r"dropout: expected float32, .*, got torch.bool"),
    "device": (torch.zeros(3, device="meta"), TypeError, r"dropout: expected the device of .*, got meta"),
    "gradient": (torch.zeros(3, requires_grad=True), ValueError, r"dropout: expected requires_grad=False"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rates(case):
    rates, error, message = BAD[case]
    x, weights, biases = problem(3, 5, [4, 6, 2], torch.float32)
    options: Any = {"dropout": rates, "dropout_seeds": torch.arange(3)}

    def output(x: Tensor) -> Tensor:
        return ensemble_mlp(x, weights, biases, **options).sum()

    def loss(x: Tensor) -> Tensor:
        return ensemble_mlp_loss(x, torch.zeros(5, 2), weights, biases, loss="mse", **options).sum()

    for name, function in (("ensemble_mlp", output), ("ensemble_mlp_loss", loss)):
        for call in (function, torch.func.grad(function)):
            with pytest.raises(error, match=f"^{name}: {message}"):
                call(x)
    with pytest.raises(
        ValueError, match=r"dropout_seeds: expected int64 \[3\] with a dropout of each member"
    ):
        ensemble_mlp(x, weights, biases, dropout=[0.1, 0.2, 0.3])


# --- modules -----------------------------------------------------------------------------------------------


def make(kind: type, rates: Any, **options: Any) -> Any:
    if kind is EnsembleMLP:
        return EnsembleMLP(len(rates), 3, [8], 2, dropout=rates, **options)
    return TabularEnsemble(len(rates), [(5, 2)], 3, [8], 2, dropout=rates, **options)


def inputs(kind: type) -> tuple[Tensor, ...]:
    x = torch.randn(7, 3)
    return (x,) if kind is EnsembleMLP else (torch.randint(5, (7, 1)), x)


@pytest.mark.parametrize("kind", [EnsembleMLP, TabularEnsemble])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_chosen_member_takes_its_rate_along(kind, in_place):
    given, seeds = inputs(kind), torch.tensor([4, 5, 6, 7])
    for chosen in ([2, 0], [3, 2, 1, 0], [0, 2, 2], [1], [3], [True, False, False, True]):
        model = make(kind, RATES)
        expected = model(*given, dropout_seeds=seeds).detach()[torch.tensor(chosen)]
        part = model.select_(chosen) if in_place else model.select(chosen)
        mine = torch.tensor(RATES, dtype=torch.float64)[torch.tensor(chosen)].tolist()
        assert part.dropout == (tuple(mine) if len(mine) > 1 else mine[0])
        got = part(*given, dropout_seeds=seeds[torch.tensor(chosen)])
        assert torch.equal(got, expected)
        again = part.select(range(len(part)))
        assert again.dropout == part.dropout
    if not in_place:
        assert model.dropout == tuple(RATES)


@pytest.mark.parametrize("kind", [EnsembleMLP, TabularEnsemble])
def test_members_modules_configurations_and_copies(kind):
    given, seeds = inputs(kind), torch.arange(E)
    model = make(kind, RATES)
    expected = model(*given, dropout_seeds=seeds)
    config = json.loads(json.dumps(model.config()))
    assert config["dropout"] == RATES
    built = kind(**config)
    assert built.dropout == tuple(RATES)
    built.load_state_dict(model.state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (built, copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(*given, dropout_seeds=seeds), expected)
    assert not any("rate" in name or "derived" in name for name in model.state_dict())
    assert "0.7" in repr(model)
    plain = model.eval().to_modules()
    output = model(*given)
    for m in range(E):
        one = model.member(m)
        got = one(*given)
        torch.testing.assert_close(got if got.dim() == 2 else got[0], output[m])
    assert len(plain) == E


def test_equal_rates_are_one():
    for rates in ([0.5] * 3, torch.full((3,), 0.5)):
        assert EnsembleMLP(3, 2, [4], 1, dropout=rates).dropout == 0.5
    model = EnsembleMLP(3, 2, [4], 1, dropout=[0.0, 0.0, 0.0])
    assert not model.dropout and model(torch.randn(4, 2)).shape == (3, 4, 1)  # needs no seeds
    mixed = EnsembleMLP(3, 2, [4], 1, dropout=[0.0, 0.5, 0.0])
    assert mixed.dropout and not mixed.select([0, 2]).dropout
    x = torch.randn(4, 2)
    assert not torch.equal(mixed(x)[1], mixed(x)[1]) and torch.equal(mixed(x)[0], mixed(x)[0])
    assert torch.equal(mixed.eval()(x)[0], mixed(x, dropout_seeds=torch.arange(3))[0])


def test_the_rates_keep_their_precision_and_follow_the_parameters():
    x, seeds = torch.randn(50, 3), torch.arange(E)
    model = make(EnsembleMLP, RATES).to(torch.bfloat16)
    for m, rate in enumerate(RATES):
        alone = model.select([m])
        assert alone.dropout == rate
        got = alone(x.bfloat16(), dropout_seeds=seeds[m : m + 1])
        assert torch.equal(got[0], model(x.bfloat16(), dropout_seeds=seeds)[m])
    there = make(EnsembleMLP, RATES).to("meta")
    assert there(x.to("meta"), dropout_seeds=seeds.to("meta")).shape == (E, 50, 2)
    model.dropout = (0.1, 0.2, 0.3, 0.4)  # assigned, not built with
    expected = model(x.bfloat16(), dropout=[0.1, 0.2, 0.3, 0.4], dropout_seeds=seeds)
    assert torch.equal(model(x.bfloat16(), dropout_seeds=seeds), expected)


@pytest.mark.parametrize("kind", [EnsembleMLP, TabularEnsemble])
def test_losses(kind):
    given, seeds, target = inputs(kind), torch.arange(E), torch.randn(7, 2)
    model = make(kind, RATES)
    got = model.loss(*given, target, loss="mse", dropout_seeds=seeds)
    torch.testing.assert_close(got, (model(*given, dropout_seeds=seeds) - target).square().mean((1, 2)))


@pytest.mark.parametrize(
    ("rates", "error", "message"),
    [
        ([0.1, 0.2], ValueError, r"dropout: expected one rate, or one for each of the 4 members, got 2"),
        ([0.1, 0.2, 1.0, 0.0], ValueError, r"dropout\[2\]: expected 0 <= dropout < 1, got 1.0"),
        ([0.1, "a", 0.2, 0.0], TypeError, r"dropout\[1\]: expected a number, got str"),
        (-0.5, ValueError, r"dropout: expected 0 <= dropout < 1, got -0.5"),
        ("0.5", TypeError, r"dropout: expected a number, got str"),
        (None, TypeError, r"dropout: expected a number, got None"),
    ],
)
def test_modules_refuse(rates, error, message):
    with pytest.raises(error, match="^EnsembleMLP: " + message):
        EnsembleMLP(4, 3, [8], 2, dropout=rates)
