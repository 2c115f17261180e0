"""The steps of pyens.optim.fused: the kernel against the formulas, torch's optimizers and itself."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from pyens.ops import optimizers as ops
from pyens.optim import fused
from pyens.reference import optimizers as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (0, 1, 2, 7, 15, 16, 17, 31, 33, 64, 65, 1000, 70_001)

ADAM = (0.01, 0.9, 0.99, 1e-6)
# The operation, which lists of state it takes, whether steps, and the options.
CALLS: dict[str, tuple[str, int, bool, tuple[Any, ...]]] = {
    "Adam": ("adam_", 2, True, (None, *ADAM, 0.0, False, False)),
    "Adam, all": ("adam_", 3, True, (4.0, *ADAM, 0.1, False, True)),
    "AdamW": ("adam_", 2, True, (None, *ADAM, 0.1, True, False)),
    "AdamW, amsgrad": ("adam_", 3, True, (None, *ADAM, 0.1, True, True)),
    "Adagrad": ("adagrad_", 1, True, (None, 0.01, 0.0, 1e-6, 0.0, False)),
    "Adagrad, all": ("adagrad_", 1, True, (4.0, 0.01, 0.1, 1e-6, 0.1, True)),
    "SGD": ("sgd_", 0, False, (None, 0.1, 0.0, 0.0, 0.0, False, False, False)),
    "SGD, decay": ("sgd_", 0, False, (4.0, 0.1, 0.0, 0.0, 0.1, False, True, False)),
    "SGD, begins": ("sgd_", 1, False, (None, 0.1, 0.9, 0.5, 0.1, False, False, True)),
    "SGD, momentum": ("sgd_", 1, False, (None, 0.1, 0.9, 0.5, 0.1, False, True, False)),
    "SGD, nesterov": ("sgd_", 1, False, (None, 0.1, 0.9, 0.0, 0.1, True, False, False)),
}


def problem(name: str, dtype: torch.dtype, sizes: tuple[int, ...] = SIZES) -> list[Any]:
    """Arguments of the operation: lists of parameters, gradients, state and steps, then options."""
    operation, states, counts, options = CALLS[name]
    draw = torch.Generator().manual_seed(len(name))
    lists = [[torch.randn(n, generator=draw).to(dtype) for n in sizes] for _ in range(2)]
    for i in range(states):
        of_squares = operation == "adagrad_" or (operation == "adam_" and i > 0)
        state = [torch.randn(n, generator=draw) / 4 for n in sizes]
        lists.append([(s.square() if of_squares else s).to(dtype) for s in state])
    if operation == "adam_" and states == 2:
        lists.append([])
    if operation == "sgd_" and states == 0:
        lists.append([])
    if counts:
        lists.append([torch.tensor(float(i)) for i in range(len(sizes))])
    return [*lists, *options]


def copied(arguments: list[Any], dtype: torch.dtype | None = None) -> list[Any]:
    def copy(tensor: Tensor) -> Tensor:
        return tensor.clone() if dtype is None or tensor.dim() == 0 else tensor.to(dtype, copy=True)

    return [[copy(t) for t in value] if isinstance(value, list) else value for value in arguments]


def tensors(arguments: list[Any]) -> Iterator[list[Tensor]]:
    return (value for value in arguments if isinstance(value, list))


def called(name: str, arguments: list[Any], module: Any = ops) -> list[Any]:
    getattr(module, CALLS[name][0])(*arguments)
    return arguments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_formulas(name, dtype):
    start = problem(name, dtype)
    ours, plain = called(name, copied(start)), called(name, copied(start), reference)
    exact = called(name, copied(start, torch.float64), reference)
    eps = torch.finfo(dtype).eps
    for mine, theirs, right in zip(tensors(ours), tensors(plain), tensors(exact), strict=True):
        for a, b, x in zip(mine, theirs, right, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            if x.numel() == 0:
                continue
            error, plain_error = ((t.double() - x.double()).square().mean().sqrt() for t in (a, b))
            largest = x.double().abs().max()
            assert error <= (4 if dtype == torch.float64 else 2) * (plain_error + eps * largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_no_bit_depends_on_what_is_beside_it_or_on_the_threads(name, dtype):
    threads = torch.get_num_threads()
    sizes = (40 * 33, 40 * 7, 40 * 700, 40)
    start = [
        [t.view(40, -1) if t.dim() else t for t in value] if isinstance(value, list) else value
        for value in problem(name, dtype, sizes)
    ]
    try:
        torch.set_num_threads(1)
        whole = called(name, copied(start))
        for members, count in (([0], 1), ([39], 2), ([2, 11, 20], 3), (list(range(1, 40)), 4)):
            torch.set_num_threads(count)
            part = [
                [t[members] if t.dim() else t for t in value] if isinstance(value, list) else value
                for value in start
            ]
            called(name, part := copied(part))
            for mine, theirs in zip(tensors(part), tensors(whole), strict=True):
                for a, b in zip(mine, theirs, strict=True):
                    assert torch.equal(a, b[members] if b.dim() else b)
    finally:
        torch.set_num_threads(threads)


OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "Adam": (Adam, {"lr": 0.01}),
    "Adam maximize": (
        Adam,
        {"lr": torch.tensor(0.01, dtype=torch.float64), "maximize": True, "weight_decay": 0.1},
    ),
    "Adam amsgrad": (Adam, {"lr": 0.01, "amsgrad": True, "betas": (0.5, 0.7), "eps": 1e-3}),
    "Adam decoupled": (Adam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "AdamW": (AdamW, {"lr": 0.01, "amsgrad": True, "maximize": True}),
    "Adagrad": (Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
    "Adagrad maximize": (Adagrad, {"lr": 0.05, "weight_decay": 0.1, "lr_decay": 0.1, "maximize": True}),
    "SGD": (SGD, {"lr": torch.tensor(0.1, dtype=torch.float64), "weight_decay": 0.1}),
    "SGD momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "maximize": True}),
    "SGD nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
}


def trained(make: Callable[..., Optimizer], name: str, gradients: list[list[Tensor]]) -> list[Tensor]:
    """Parameters and state after steps with these gradients."""
    kind, options = OPTIMIZERS[name]
    draw = torch.Generator().manual_seed(0)
    stack = [torch.randn(g.shape, generator=draw).to(g.dtype).requires_grad_() for g in gradients[0]]
    optimizer = make(kind, stack, **options)
    for of_step in gradients:
        for p, gradient in zip(stack, of_step, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
    state = [value for p in stack for _, value in sorted(optimizer.state[p].items())]
    return [*(p.detach() for p in stack), *state]


def plain(kind: Any, parameters: list[Tensor], **options: Any) -> Optimizer:
    return kind(parameters, foreach=False, **options)


def torch_fused(kind: Any, parameters: list[Tensor], **options: Any) -> Optimizer:
    return kind(parameters, fused=True, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_zero_are_no_others(name, dtype):
    # Rows that nobody looked up, whole vectors and parts: Adagrad and plain SGD do not even read them.
    sizes = (33, 1000, 70_001)
    arguments = problem(name, dtype, sizes)
    for parameter, gradient in zip(arguments[0], arguments[1], strict=True):
        drawn = torch.rand(-(-len(gradient) // 40), generator=torch.Generator().manual_seed(1)) < 0.6
        gradient[drawn.repeat_interleave(40)[: len(gradient)]] = 0
        parameter[::3] = -0.0
    others = copied(arguments)
    for gradient in others[1]:
        gradient[gradient == 0] = -0.0  # which is not skipped
    operation, states, _, _ = CALLS[name]
    before = copied(arguments)
    for each in (arguments, others):
        getattr(ops, operation)(*each)
    for i in range(2 + states):
        if i == 1:
            continue
        for one, other in zip(arguments[i], others[i], strict=True):
            assert torch.equal(one, other)
    if name in ("Adagrad", "SGD"):
        for parameter, gradient, was in zip(arguments[0], arguments[1], before[0], strict=True):
            rest = gradient == 0
            assert torch.equal(parameter[rest], was[rest])
            assert torch.equal(parameter[rest].signbit(), was[rest].signbit())


def test_adagrad_without_an_eps_divides_zero_by_zero_as_torch_does():
    parameter, gradient, total = torch.ones(40), torch.zeros(40), torch.zeros(40)
    ops.adagrad_([parameter], [gradient], [total], [torch.tensor(0.0)], None, 0.01, 0.0, 0.0, 0.0, False)
    assert parameter.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torchs_optimizers_within_some_roundings(name, dtype):
    draw = torch.Generator().manual_seed(1)
    gradients = [[torch.randn(n, generator=draw).to(dtype) for n in SIZES] for _ in range(6)]
    some = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        trained(fused, name, gradients), trained(plain, name, gradients), rtol=some, atol=some
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_16_bits_are_a_rounding_a_step_off(name, dtype):
    draw = torch.Generator().manual_seed(1)
    gradients = [[torch.randn(n, generator=draw).to(dtype) for n in SIZES] for _ in range(3)]
    exact = trained(plain, name, [[g.double() for g in of_step] for of_step in gradients])
    ours = trained(fused, name, gradients)
    assert all(t.dtype == dtype for t in ours if t.dim())
    some = 8 * torch.finfo(dtype).eps
    for mine, right in zip(ours, exact, strict=True):
        off = (mine.double() - right.double()).abs() > some * (1 + right.double().abs())
        # One in ten thousand has a gradient whose square is a few times the smallest number, or cancels.
        assert off.sum() <= off.numel() / 10_000


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_edges_of_numbers_are_those_of_torch(name):
    edges = [math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-30, 1e-42, -1e-45, 0.0, -0.0, 3e38, 1e20]
    one = torch.tensor(edges + [1.0] * 9)
    gradients = [[one], [one.roll(3)], [one.roll(5)]]
    torch.testing.assert_close(
        trained(fused, name, gradients),
        trained(torch_fused, name, gradients),
        rtol=1e-5,
        atol=1e-7,
        equal_nan=True,
    )


def test_what_is_not_contiguous_is_updated_where_it_is():
    start = problem("Adam, all", torch.float32, (12, 12))
    start = [
        [t.view(3, 4) if t.dim() else t for t in value] if isinstance(value, list) else value
        for value in start
    ]
    straight, strided = called("Adam, all", copied(start)), copied(start)
    for of in strided[1:5]:
        of[1] = of[1].t().contiguous().t()
        assert not of[1].is_contiguous()
    called("Adam, all", strided)
    for mine, theirs in zip(tensors(strided), tensors(straight), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_steps_count_in_double_too():
    one, two = (problem("Adam", torch.float32, (5,)) for _ in range(2))
    one[5], two[5] = [torch.tensor(7.0)], [torch.tensor(7.0, dtype=torch.float64)]
    called("Adam", one)
    called("Adam", two)
    assert one[5][0] == two[5][0] == 8 and torch.equal(one[0][0], two[0][0])


def test_versions_are_counted():
    weight = torch.ones(3, 2, requires_grad=True)
    optimizer = fused(SGD, [weight], lr=0.1)
    used = (weight * weight).sum()
    weight.grad = torch.ones(3, 2)
    version = weight.grad._version
    optimizer.step()
    assert weight.grad._version == version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.backward()


def test_momentum_begins_where_the_first_gradient_comes():
    ours, theirs = ([torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)] for _ in range(2))
    mine = fused(SGD, ours, lr=0.1, momentum=0.9, dampening=0.5)
    right = SGD(theirs, lr=0.1, momentum=0.9, dampening=0.5, foreach=False)
    for late in (True, False, False):
        for stack, optimizer in ((ours, mine), (theirs, right)):
            for p in stack:
                p.grad = torch.full_like(p, 2.0)
            if late:
                stack[1].grad = None
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_on_the_same_memory_are_updated_one_after_the_other(name):
    kind, options = OPTIMIZERS[name]

    def updated(make: Callable[..., Optimizer], threads: int) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        memory = torch.randn(90_000, generator=draw)
        stack = [memory[:60_000].requires_grad_(), memory[30_000:].requires_grad_()]
        optimizer = make(kind, stack, **options)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            for _ in range(3):
                for p in stack:
                    p.grad = torch.randn(p.shape, generator=draw)
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        return memory

    alone = updated(fused, 1)
    assert all(torch.equal(updated(fused, 4), alone) for _ in range(5))
    torch.testing.assert_close(alone, updated(plain, 1), rtol=1e-5, atol=1e-5)


def test_a_skipped_step_leaves_no_state_behind():
    weight = torch.ones(3, 2, requires_grad=True)
    optimizer: Any = fused(SGD, [weight], lr=0.1, momentum=0.9)
    weight.grad = torch.full((3, 2), math.inf)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    assert (weight == 1).all() and not optimizer.state.get(weight)
    weight.grad = torch.full((3, 2), 4.0)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3, 2), 0.8))
    assert (weight.grad == 2).all() and (optimizer.state[weight]["momentum_buffer"] == 2).all()


def test_refusals():
    arguments = problem("Adam, all", torch.float32, (6, 6))

    def refuses(error: type[Exception], match: str, place: int, new: list[Tensor]) -> None:
        changed = copied(arguments)
        before = copied(changed)
        changed[place] = new
        with pytest.raises(error, match=match):
            called("Adam, all", changed)
        kept = (i for i, value in enumerate(changed) if isinstance(value, list) and i != place)
        assert all(torch.equal(a, b) for i in kept for a, b in zip(changed[i], before[i], strict=True))

    good = torch.ones(6)
    refuses(
        ValueError, r"^fused: state\['exp_avg'\]: expected shape, dtype and device", 2, [good, torch.ones(5)]
    )
    refuses(ValueError, r"^fused: gradient: expected shape, dtype and device", 1, [good, good.double()])
    refuses(
        ValueError, r"^fused: state\['exp_avg_sq'\]: expected one for each of 2 parameters, got 1", 3, [good]
    )
    refuses(ValueError, r"^fused: state\['step'\]: expected one number, got shape \[6\]", 5, [good, good])
    refuses(TypeError, r"^fused: state\['step'\]: expected float32 or float64", 5, [torch.tensor(1)] * 2)
    refuses(ValueError, r"^fused: state\['step'\]: expected one for each of 2", 5, [torch.tensor(1.0)])
    refuses(
        ValueError,
        r"^fused: parameters\[0\]: expected contiguous, got strides \[1, 3\]",
        0,
        [torch.ones(2, 3).t(), good],
    )
    refuses(TypeError, r"^fused: parameters\[1\]: expected float32, .* got Int", 0, [good, good.int()])
    overlapping = torch.ones(1).expand(6)
    refuses(RuntimeError, "single memory location", 1, [good, overlapping])


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    op = getattr(torch.ops.pyens, CALLS[name][0])
    torch.library.opcheck(op.default, tuple(problem(name, torch.float32, (3, 17))))
