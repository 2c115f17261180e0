"""Inputs of one row, of a first dimension of 1, and of any dimensions with `shared=True`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pyens import EnsembleLinear, EnsembleMLP, ops
from pyens.ops.ensemble_mlp import ensemble_mlp_packed, prepack

E, B, F, K = 3, 5, 4, 2


def mlp(ensemble_size: int = E, **options) -> EnsembleMLP:
    return EnsembleMLP(ensemble_size, F, [6], K, dtype=torch.float64, **options)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, F, dtype=torch.float64)


def targets(loss: str, *shape: int) -> Tensor:
    if loss == "cross_entropy":
        return torch.randint(K, shape)
    return torch.rand(*shape, K // 2 if loss == "gaussian_nll" else K, dtype=torch.float64)


def calls(model: EnsembleMLP):
    """The output by every way to it."""
    weights, biases = model.stacked()
    packed = prepack(weights, biases)
    frozen = model.packed()
    yield model
    yield lambda x, **options: ops.ensemble_mlp(x, weights, biases, **options)
    yield lambda x, **options: ensemble_mlp_packed(x, packed, weights, biases, **options)
    yield frozen


WAYS = range(4)
losses = pytest.mark.parametrize("loss", ["mse", "bce", "gaussian_nll", "cross_entropy"])


@pytest.mark.parametrize("way", WAYS)
def test_one_row(way):
    model = mlp()
    call, x = list(calls(model))[way], rows()
    assert call(x).shape == (E, K)
    assert torch.equal(call(x), model(x.unsqueeze(0))[:, 0])
    assert torch.equal(call(x, shared=True), call(x))


@pytest.mark.parametrize("way", WAYS)
def test_a_first_dimension_of_one_is_shared(way):
    model = mlp()
    call, x = list(calls(model))[way], rows(1, B)
    assert torch.equal(call(x), model(x[0]))
    one = mlp(1)
    assert torch.equal(list(calls(one))[way](x), one(x[0])) and one(x).shape == (1, B, K)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "lead", [(), (B,), (1, B), (2, B), (E, B), (2, 3, B), (1, 1, 1), (0, 3), (3, 0)], ids=str
)
def test_shared_is_the_same_for_all_members(way, lead):
    for members in (E, 1):
        model = mlp(members)
        call, x = list(calls(model))[way], rows(*lead)
        got = call(x, shared=True)
        assert got.shape == (members, *lead, K)
        assert torch.equal(got, model(x.reshape(-1, F) if x.numel() else rows(0)).reshape(got.shape))


def test_members_and_shared_are_told_apart():
    model, x = mlp(), rows(E, B)
    assert model(x).shape == (E, B, K) and model(x, shared=True).shape == (E, E, B, K)
    assert torch.equal(model(x)[1], model(x, shared=True)[1, 1])
    for wrong in (rows(2, B), rows(2, E, B), rows(E, 2, B), torch.tensor(1.0).double()):
        with pytest.raises(ValueError, match=r"^ensemble_mlp: input: expected \[B, 4\] or \[3, B, 4\], got"):
            model(wrong)
    for wrong in (torch.randn(5).double(), torch.randn(2, 2, 5).double()):
        with pytest.raises(ValueError, match=r"^ensemble_mlp: input: expected \[B, 4\] or \[3, B, 4\], got"):
            model(wrong, shared=True)


def test_strided_inputs():
    model, x = mlp(), rows(B, 2)
    assert torch.equal(model(x.transpose(0, 1), shared=True), model(x, shared=True).transpose(1, 2))
    wide = torch.randn(2, B, 2 * F, dtype=torch.float64)[..., ::2]
    assert torch.equal(model(wide, shared=True), model(wide.contiguous(), shared=True))
    one = torch.randn(F, 2, dtype=torch.float64)[:, 0]
    assert torch.equal(model(one), model(one.clone()))


def test_a_linear_layer():
    layer = EnsembleLinear(E, F, K, dtype=torch.float64)
    x = rows(2, B)
    for i, alone in enumerate(layer.to_modules()):
        torch.testing.assert_close(layer(x, shared=True)[i], alone(x))
        torch.testing.assert_close(layer(x[0, 0])[i], alone(x[0, 0]))


@losses
@pytest.mark.parametrize("lead", [(), (1, B), (2, B), (E, B), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_of_shared_inputs(loss, lead, weighted):
    model, x = mlp(), rows(*lead).requires_grad_()
    flat = x.detach().reshape(-1, F).requires_grad_()
    n = len(flat)
    for each in ((), (E,)):
        y = targets(loss, *each, *lead)
        w = torch.rand((*each, *lead), dtype=torch.float64) if weighted else None
        got = model.loss(x, y, loss=loss, sample_weight=w, shared=True)
        of_rows = y.reshape(*each, n, *y.shape[len(each) + len(lead) :])
        flat_weight = None if w is None else w.reshape(*each, n)
        expected = model.loss(flat, of_rows, loss=loss, sample_weight=flat_weight)
        assert got.shape == (E,) and torch.equal(got, expected)
        one, other = torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(expected.sum(), flat)[0]
        assert torch.equal(one.reshape(-1, F), other)
        each_example = model.loss(x, y, loss=loss, sample_weight=w, shared=True, reduction="none")
        expected = model.loss(flat, of_rows, loss=loss, sample_weight=flat_weight, reduction="none")
        assert torch.equal(each_example, expected.reshape(E, *lead))


@losses
def test_losses_of_one_row_and_of_a_first_dimension_of_one(loss):
    model = mlp()
    for each in ((), (E,)):
        x, y = rows(), targets(loss, *each)
        whole = y.unsqueeze(len(each))
        expected = model.loss(x[None], whole, loss=loss)
        assert torch.equal(model.loss(x, y, loss=loss), expected)
        assert model.loss(x, y, loss=loss, reduction="none").shape == (E,)
    x, w = rows(1, B), torch.rand(1, B, dtype=torch.float64)
    y = targets(loss, 1, B)
    expected = model.loss(x[0], y[0], loss=loss, sample_weight=w[0])
    assert torch.equal(model.loss(x, y, loss=loss, sample_weight=w), expected)
    assert torch.equal(model.loss(x, y[0], loss=loss, sample_weight=w[0]), expected)
    each = targets(loss, E, B)
    assert torch.equal(model.loss(x, each, loss=loss), model.loss(x[0], each, loss=loss))
    one = mlp(1)
    assert torch.equal(
        one.loss(x, y, loss=loss, sample_weight=w), one.loss(x[0], y[0], loss=loss, sample_weight=w[0])
    )


def test_targets_that_do_not_fit():
    model = mlp()
    for x, y, shared in (
        (rows(2, B), torch.rand(2, 4, K).double(), True),
        (rows(), torch.rand(2, K).double(), False),
        (rows(1, B), torch.rand(2, B, K).double(), False),
    ):
        with pytest.raises(ValueError, match=r"^ensemble_mlp_loss: target: expected .*, got shape"):
            model.loss(x, y, loss="mse", shared=shared)


def test_derivatives_and_dropout():
    model, x = mlp(dropout=0.5), rows(2, B)
    seeds = torch.arange(E)
    flat = model(x.flatten(0, 1), dropout_seeds=seeds)
    assert torch.equal(model(x, dropout_seeds=seeds, shared=True), flat.reshape(E, 2, B, K))
    plain = mlp()
    assert torch.autograd.gradcheck(lambda x: plain(x, shared=True), (rows(2, 2).requires_grad_(),))
    assert torch.autograd.gradcheck(plain, (rows().requires_grad_(),))
    jacobian = torch.func.vmap(torch.func.jacrev(plain))(rows(B))
    assert jacobian.shape == (B, E, K, F)
    each = torch.func.vmap(plain)(rows(B))
    assert each.shape == (B, E, K)


def test_compiled():
    torch._dynamo.reset()
    model = mlp()

    def call(x: Any, shared: bool = False) -> Tensor:
        return model(x, shared=shared)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for x, shared in (
        (rows(), False),
        (rows(1, B), False),
        (rows(2, B), True),
        (rows(E, B), False),
        (rows(B), True),
    ):
        torch.testing.assert_close(compiled(x, shared), call(x, shared))
    y = torch.rand(2, B, K, dtype=torch.float64)
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    x = rows(2, B)
    torch.testing.assert_close(loss(x, y, loss="mse", shared=True), model.loss(x, y, loss="mse", shared=True))
    parts = x[..., :3], x[..., 3:]
    torch.testing.assert_close(compiled(parts, True), call(x, True))
    torch.testing.assert_close(
        loss(parts, y, loss="mse", shared=True), model.loss(x, y, loss="mse", shared=True)
    )


def test_on_meta():
    model = mlp().to("meta")
    assert model(rows(2, B).to("meta"), shared=True).shape == (E, 2, B, K)
    assert model(rows().to("meta")).shape == (E, K)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("own", [(False, False), (False, True), (True, True)])
def test_a_tuple_is_put_together(way, own):
    model = mlp()
    call = list(calls(model))[way]
    lead = [(E, B) if one else (B,) for one in own]
    state = torch.randn(*lead[0], 3, dtype=torch.float64)
    action = torch.randn(*lead[1], 1, dtype=torch.float64)
    expected = model(torch.cat([state.expand(*lead[1], 3), action], -1))
    assert torch.equal(call((state, action)), expected)
    if way > 1:
        return
    state.requires_grad_()
    action.requires_grad_()
    for one in torch.autograd.grad(call((state, action)).square().sum(), (state, action)):
        assert one.isfinite().all() and one.any()


def test_a_tuple_in_compiled_code():
    model, state, action = mlp(), torch.randn(B, 3).double(), torch.randn(E, B, 1).double()
    compiled = torch.compile(lambda *parts: model(parts), fullgraph=True, backend="eager")
    assert torch.equal(compiled(state, action), model((state, action)))
    weights, biases = model.stacked()
    target = targets("mse", B)

    def loss(*parts: Tensor) -> Tensor:
        return ops.ensemble_mlp_loss(parts, target, weights, biases, loss="mse")

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(state, action), loss(state, action))


def test_autocast_casts_the_parts_of_a_tuple():
    model = EnsembleMLP(E, F, [6], K)
    state, action = torch.randn(B, 3), torch.randn(B, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model((state, action.bfloat16().float()))
        assert torch.equal(model((state, action.bfloat16())), expected)


def test_the_loss_of_a_tuple():
    model, state, action = mlp(), torch.randn(B, 3).double(), torch.randn(E, B, 1).double()
    whole = torch.cat([state.expand(E, -1, -1), action], -1)
    target = targets("mse", B)
    assert torch.equal(model.loss((state, action), target, loss="mse"), model.loss(whole, target, loss="mse"))


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ((), ValueError, "input: expected a tensor, or a tuple of at least one, got an empty tuple"),
        ((torch.ones(5, 3), 2), TypeError, r"input\[1\]: expected a tensor, got int"),
        ((torch.ones(5, 3), torch.ones(4, 1)), ValueError, "input: expected parts that differ in their last"),
        ((torch.ones(5, 3), torch.ones(5, 2)), ValueError, r"input: expected \[B, 4\]"),
        ((torch.ones(5, 3), torch.ones(())), ValueError, r"input\[1\]: expected \[\.\.\., features\]"),
        ((torch.ones(5, 3), torch.ones(5, 1).long()), TypeError, r"input\[1\]: expected float32, float64, "),
        ((torch.ones(5, 3), torch.ones(5, 1).half()), TypeError, r"input\[1\]: expected the dtype of in"),
        ((torch.ones(5, 3), torch.ones(5, 1).to("meta")), TypeError, r"input\[1\]: expected the device of"),
    ],
)
def test_tuples_that_do_not_fit(parts, error, message):
    with pytest.raises(error, match=f"^ensemble_mlp: {message}"):
        EnsembleMLP(E, F, [6], K)(parts)
