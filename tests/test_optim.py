"""Stacked parameters under torch.optim: members train as if alone, each at its own learning rate if asked."""

import copy
import functools
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

from pyens import EnsembleMLP
from pyens.ops import ensemble_mlp_loss
from pyens.optim import MemberLearningRates, fused, member_state

E, STEPS = 23, 8
SUBSETS = ([0], [E - 1], [2, 11, 20], list(range(4, 20)))
Make = Callable[[list[Tensor]], Optimizer]


def parameters(widths: Sequence[int], members: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    *hidden, out = widths[1:]
    model = EnsembleMLP(len(members), widths[0], hidden, out, activation="silu", seeds=members, dtype=dtype)
    return list(model.parameters())


@functools.cache
def batches(features: int, outputs: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(E, 50, features, generator=draw),
            torch.randn(E, 50, outputs, generator=draw),
            torch.randint(3, (E, 50), generator=draw),
        )
        for _ in range(STEPS)
    ]


def train(
    make: Make,
    members: Sequence[int],
    widths: Sequence[int] = (5, 9, 7, 3),
    dtype: torch.dtype = torch.float32,
    factors: Tensor | None = None,
) -> list[Tensor]:
    """The parameters of some of E members after some steps, on data, order and dropout of each one's own."""
    stack = parameters(widths, members, dtype)
    layers = len(widths) - 1
    optimizer = make(stack)
    for step, batch in enumerate(batches(widths[0], widths[-1])):
        x, y, weight = (t[members].to(dtype) for t in batch)
        loss = ensemble_mlp_loss(
            x,
            y,
            stack[:layers],
            stack[layers:],
            loss="mse",
            activation="silu",
            sample_weight=weight,
            dropout=0.1,
            dropout_seeds=torch.tensor(members) * STEPS + step,
        )
        optimizer.zero_grad()
        (loss if factors is None else factors[members].to(loss) * loss).sum().backward()
        optimizer.step()
    return [p.detach() for p in stack]


def assert_members_train_as_if_alone(make: Make, **kwargs: Any) -> None:
    everyone = list(range(E))
    before = parameters(kwargs.get("widths", (5, 9, 7, 3)), everyone, kwargs.get("dtype", torch.float32))
    whole = train(make, everyone, **kwargs)
    assert all((new != old).any() and new.isfinite().all() for new, old in zip(whole, before, strict=True))
    for members in SUBSETS:
        part = train(make, members, **kwargs)
        assert all(torch.equal(ours, theirs[members]) for ours, theirs in zip(part, whole, strict=True))


OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.1}),
    "SGD momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
    "SGD nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "Adam": (Adam, {"lr": 0.01}),
    "Adam amsgrad": (Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01}),
    "AdamW": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "Adagrad": (Adagrad, {"lr": 0.05, "weight_decay": 0.01, "lr_decay": 0.1}),
    "RMSprop": (RMSprop, {"lr": 0.01, "weight_decay": 0.01}),
    "RMSprop centered": (RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9}),
    "NAdam": (NAdam, {"lr": 0.01, "weight_decay": 0.01}),
    "RAdam": (RAdam, {"lr": 0.01, "weight_decay": 0.01}),
    "Adamax": (Adamax, {"lr": 0.01, "weight_decay": 0.01}),
    "Adadelta": (Adadelta, {"lr": 1.0, "weight_decay": 0.01}),
}


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_members_train_as_if_alone(name, foreach):
    kind, options = OPTIMIZERS[name]
    assert_members_train_as_if_alone(lambda stack: kind(stack, foreach=foreach, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Adagrad, {"lr": 0.05}),
        (Adagrad, {"lr": 0.05, "weight_decay": 0.01, "lr_decay": 0.1}),
        (SGD, {"lr": 0.1}),
        (SGD, {"lr": 0.1, "weight_decay": 0.01}),
    ],
    ids=str,
)
def test_members_train_as_if_alone_under_fused_optimizers(kind, options, dtype):
    assert_members_train_as_if_alone(lambda stack: kind(stack, fused=True, **options), dtype=dtype)


FUSED: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "Adam": (Adam, {"lr": 0.01}),
    "Adam amsgrad": (Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01}),
    "AdamW": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "Adagrad": (Adagrad, {"lr": 0.05, "weight_decay": 0.01, "lr_decay": 0.1}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("widths", [(5, 9, 7, 3), (5, 16, 32, 16), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_members_train_as_if_alone_under_pyens_fused(name, widths, dtype):
    kind, options = FUSED[name]
    assert_members_train_as_if_alone(lambda p: fused(kind, p, **options), widths=widths, dtype=dtype)
    plain = train(lambda p: kind(p, **options), range(E), widths=widths, dtype=dtype)
    ours = train(lambda p: fused(kind, p, **options), range(E), widths=widths, dtype=dtype)
    torch.testing.assert_close(ours, plain, rtol=1e-3 if dtype == torch.float32 else 1e-10, atol=1e-5)


# Why there is pyens.optim.fused: torch's own rounds the last numbers of a tensor, too few to fill a vector,
# in another way than those before them. Where torch does not, the test says so by being skipped.
def test_the_end_of_a_tensor_is_rounded_like_the_rest():
    def differences(make: Make) -> int:
        """How often the state of a member that trains alone is another one than beside two others."""
        draw = torch.Generator().manual_seed(0)
        count = 0
        for _ in range(50):
            start, gradients = torch.randn(3, 9, generator=draw), torch.randn(8, 3, 9, generator=draw)
            ends = []
            for members in (slice(0, 3), slice(0, 1)):
                parameter = start[members].clone().requires_grad_()
                optimizer = make([parameter])
                for gradient in gradients:
                    parameter.grad = gradient[members].clone()
                    optimizer.step()
                ends.append(member_state(optimizer)[0]["exp_avg_sq"][0])
            count += not torch.equal(*ends)
        return count

    assert differences(lambda p: fused(Adam, p, lr=0.01)) == 0
    if differences(lambda p: Adam(p, lr=0.01, fused=True)) == 0:
        pytest.skip(f"the fused Adam of torch {torch.__version__} rounds all numbers alike here")


def test_fused_with_a_state_dict():
    members, options = list(range(5)), {"lr": 0.01, "weight_decay": 0.1}
    draw = torch.Generator().manual_seed(0)
    gradients = [
        [torch.randn(p.shape, generator=draw) for p in parameters((5, 9, 3), members, torch.float32)]
        for _ in range(4)
    ]

    def step(stack: list[Tensor], optimizer: Optimizer, gradient: list[Tensor]) -> None:
        for p, g in zip(stack, gradient, strict=True):
            p.grad = g.clone()
        optimizer.step()

    straight = parameters((5, 9, 3), members, torch.float32)
    optimizer = fused(AdamW, straight, **options)
    for gradient in gradients[:2]:
        step(straight, optimizer, gradient)
    resumed = [p.detach().clone().requires_grad_() for p in straight]
    second = fused(AdamW, resumed, **options)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for gradient in gradients[2:]:
        step(straight, optimizer, gradient)
        step(resumed, second, gradient)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_fused_zero_grad_and_parameters_without_gradient():
    used, unused = torch.ones(3, 5, requires_grad=True), torch.ones(3, 5, requires_grad=True)
    optimizer = fused(SGD, [used, unused], lr=1.0)
    used.grad = torch.ones(3, 5)
    optimizer.step()
    assert (used == 0).all() and (unused == 1).all() and used.grad is not None
    optimizer.zero_grad(set_to_none=False)
    assert (used.grad == 0).all() and unused.grad is None
    optimizer.zero_grad()
    assert used.grad is None
    with torch.no_grad():
        used += 3  # changed from outside, the rest of a vector too
    used.grad = torch.ones(3, 5)
    optimizer.step()
    assert (used == 2).all()


@pytest.mark.parametrize("kind", [Adam, AdamW, SGD, Adagrad], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_a_copy_of_fused_goes_on_with_a_copy_of_its_parameters(kind, way):
    options = {"lr": 0.01, **({"momentum": 0.9} if kind is SGD else {})}
    own = parameters((5, 9, 3), range(3), torch.float32)
    optimizer = fused(kind, own, **options)

    def step(optimizer: Optimizer, parameters: list[Tensor], seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()

    step(optimizer, own, 0)
    optimizer.param_groups[0]["lr"] = 0.1
    if way == "deepcopy":
        copied, copies = copy.deepcopy((optimizer, own))
    elif way == "pickle":
        copied, copies = pickle.loads(pickle.dumps((optimizer, own)))
    else:
        file = io.BytesIO()
        torch.save((optimizer, own), file)
        file.seek(0)
        copied, copies = torch.load(file, weights_only=False)
    held = copied.param_groups[0]["params"]
    assert held[0] is not own[0] and all(a is b for a, b in zip(held, copies, strict=True))
    assert type(copied) is type(optimizer) and isinstance(copied, kind)
    assert copied.param_groups[0]["lr"] == 0.1
    for seed in (1, 2):
        step(optimizer, own, seed)
        step(copied, copies, seed)
    assert all(torch.equal(a, b) for a, b in zip(own, copies, strict=True))


def test_fused_takes_each_parameter_once_and_only_parameters():
    one, two = (torch.nn.Parameter(torch.zeros(2, 20)) for _ in range(2))
    with pytest.raises(ValueError, match=r"fused: parameters\[2\]: .* once, got parameters\[0\] again"):
        fused(Adam, [one, two, one])
    with pytest.raises(ValueError, match=r"fused: parameters\[1\]: expected a leaf"):
        fused(Adam, [one, two * 2])
    with pytest.raises(TypeError, match=r"fused: parameters\[1\]: expected a tensor, got a dict"):
        fused(Adam, [one, {"params": [two]}])
    with pytest.raises(ValueError, match="more than one parameter group"):
        fused(Adam, [{"params": [one]}, {"params": [two, one]}])
    with pytest.raises(TypeError, match=r"fused: kind: expected Adam, .* got <class .*RMSprop"):
        fused(RMSprop, [one])


def test_fused_refuses_what_it_cannot_do():
    with pytest.raises(
        ValueError, match=r"^fused: parameters\[1\]: expected contiguous, got strides \(1, 3\)"
    ):
        fused(SGD, [torch.ones(2, 2), torch.ones(2, 3).t()], lr=1.0)
    weight = torch.ones(3, 5, requires_grad=True)
    optimizer = fused(SGD, [weight], lr=1.0)
    weight.grad = torch.ones(3, 5).to_sparse()
    with pytest.raises(ValueError, match=r"^fused: gradient: expected dense"):
        optimizer.step()


def test_fused_with_learning_rates():
    weight = torch.ones(3, 5, requires_grad=True)
    optimizer = fused(SGD, [weight], lr=1.0)
    MemberLearningRates(optimizer, [1.0, 0.5, 0.0])
    weight.grad = torch.ones(3, 5)
    optimizer.step()
    assert weight.tolist() == [[0] * 5, [0.5] * 5, [1] * 5]


# --- learning rates ----------------------------------------------------------------------------------------

FACTORS = torch.linspace(0.1, 1.7, E)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_member_at_its_own_learning_rate(name):
    kind, options = OPTIMIZERS[name]

    def with_rates(members: Sequence[int]) -> Make:
        def make(stack: list[Tensor]) -> Optimizer:
            optimizer = kind(stack, **options)
            MemberLearningRates(optimizer, FACTORS[members])
            return optimizer

        return make

    whole = train(with_rates(range(E)), range(E), dtype=torch.float64)
    for member in (0, 9, E - 1):
        own = options | {"lr": options["lr"] * FACTORS[member].item()}
        alone = train(lambda stack, own=own: kind(stack, **own), [member], dtype=torch.float64)
        torch.testing.assert_close([p[[member]] for p in whole], alone, rtol=1e-8, atol=1e-10)

    whole = train(with_rates(range(E)), range(E))
    for members in SUBSETS:
        part = train(with_rates(members), members)
        assert all(torch.equal(ours, theirs[members]) for ours, theirs in zip(part, whole, strict=True))


def test_factors_of_1_and_0():
    factors = torch.ones(E)
    factors[4] = 0

    def make(stack: list[Tensor]) -> Optimizer:
        optimizer = Adam(stack, lr=0.01)
        MemberLearningRates(optimizer, factors)
        return optimizer

    members = list(range(E))
    start = parameters((5, 9, 7, 3), members, torch.float32)
    plain = train(lambda stack: Adam(stack, lr=0.01), members)
    for got, free, old in zip(train(make, members), plain, start, strict=True):
        assert torch.equal(got[4], old[4])
        others = [m for m in members if m != 4]
        assert torch.equal(got[others], free[others])


def test_factors_may_change_from_step_to_step():
    weight = torch.ones(3, 2, requires_grad=True)
    optimizer = SGD([weight], lr=1.0)
    rates = MemberLearningRates(optimizer, [1.0, 0.5, 0.0])

    def step() -> Tensor:
        weight.grad = torch.ones_like(weight)
        old = weight.detach().clone()
        optimizer.step()
        return (old - weight.detach())[:, 0]

    assert step().tolist() == [1, 0.5, 0]
    rates.factors[2] = 0.25
    assert step().tolist() == [1, 0.5, 0.25]
    rates.factors = torch.tensor([2.0, 2.0, 0.0])
    assert step().tolist() == [2, 2, 0]
    weight.grad = torch.full_like(weight, float("nan"))
    optimizer.step()
    assert weight.isnan().all(1).tolist() == [True, True, False]
    rates.remove()
    with torch.no_grad():
        weight.fill_(1)
    assert step().tolist() == [1, 1, 1]


def test_a_closure():
    weight = torch.ones(2, 2, requires_grad=True)
    optimizer = SGD([weight], lr=1.0)
    MemberLearningRates(optimizer, [1.0, 0.5])

    def closure() -> float:
        weight.grad = torch.ones_like(weight)
        return 0.0

    optimizer.step(closure)
    assert weight.tolist() == [[0, 0], [0.5, 0.5]]


@pytest.mark.parametrize("factors", [torch.ones(2), torch.ones(3, 1), torch.ones(())], ids=lambda f: f.shape)
def test_factors_that_do_not_fit(factors):
    optimizer = SGD([torch.ones(3, 2, requires_grad=True)], lr=1.0)
    with pytest.raises(ValueError, match=r"^MemberLearningRates: factors: expected \[E\] for parameters"):
        MemberLearningRates(optimizer, factors)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_under_sgd_a_factor_of_the_loss_is_one_of_the_learning_rate(options):
    def make(stack: list[Tensor]) -> Optimizer:
        return SGD(stack, lr=0.1, **options)

    assert_members_train_as_if_alone(make, factors=FACTORS)
    whole = train(make, range(E), dtype=torch.float64, factors=FACTORS)
    for member in (0, E - 1):
        rate = 0.1 * FACTORS[member].item()
        alone = train(lambda stack, lr=rate: SGD(stack, lr=lr, **options), [member], dtype=torch.float64)
        torch.testing.assert_close([p[[member]] for p in whole], alone, rtol=1e-8, atol=1e-10)
