"""MaskedMLP, and the specification of masked_mlp."""

import copy
import pickle
import re

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from masked_models import activations, biases, close, dense, mlp, seeded, sequential
from nn_models import KINDS, assert_same_state
from torch import Tensor, nn

from pyens import reference
from pyens.nn import (
    MaskedMLP,
    Masksembles1D,
    set_mask_mode_,
)

# --- the specification -------------------------------------------------------------------------------


@activations
@biases
def test_specification_is_the_dense_network_masked(activation, bias):
    model = mlp(activation=activation, bias=bias, dtype=torch.float64)
    for x in (torch.randn(5, 6).double(), torch.randn(4, 5, 6).double(), torch.randn(0, 6).double()):
        close(model(x), dense(model, x))


def test_an_empty_mask_computes_the_last_bias():
    model = mlp(dtype=torch.float64)
    masks = list(model.masks.buffers())
    masks[1][2] = False
    x = torch.randn(5, 6).double()
    output = model(x)
    close(output, dense(model, x))
    assert torch.equal(output[2], model.biases[2].expand(5, 3))
    close(model.compact()(x), output)


def test_what_a_mask_leaves_out_takes_no_part():
    model = mlp(dtype=torch.float64)
    x = torch.randn(5, 6).double()
    clean = model(x)
    masks = list(model.masks.buffers())
    member, unit = (~masks[0]).nonzero()[0].tolist()
    with torch.no_grad():
        model.weights[0][unit] = float("nan")
        model.weights[1][:, unit] = float("inf")
    output = model(x)
    without = ~masks[0][:, unit]
    assert without[member] and torch.equal(output[without], clean[without])
    assert output[~without].isnan().any()
    kept = [mask[without] for mask in masks]
    MaskedMLP.from_parameters(list(model.weights), list(model.biases), kept)(x).sum().backward()
    assert model.weights[0].grad.isfinite().all() and model.weights[1].grad.isfinite().all()
    close(model.compact()(x)[without], clean[without])


def test_gradients():
    model = mlp(widths=[3, 5, 4, 2], activation="tanh", dtype=torch.float64)
    weights, vectors = list(model.weights), list(model.biases)
    masks = list(model.masks.buffers())

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return reference.masked_mlp(x, parameters[:3], parameters[3:], masks, activation="tanh")

    for x in (torch.randn(2, 3), torch.randn(4, 2, 3)):
        assert torch.autograd.gradcheck(run, (x.double().requires_grad_(), *weights, *vectors))


# --- MaskedMLP ---------------------------------------------------------------------------------------


@biases
def test_parameters_and_state(bias):
    model = mlp(bias=bias, seed=7)
    torch.manual_seed(7)
    linears = [layer for layer in sequential(bias=bias) if isinstance(layer, nn.Linear)]
    for layer, linear in enumerate(linears):
        assert torch.equal(model.weights[layer], linear.weight)
        assert not bias or torch.equal(model.biases[layer], linear.bias)
    names = [f"weights.{i}" for i in range(3)] + [f"biases.{i}" for i in range(3) if bias]
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == [*names, "masks.0", "masks.1"]
    masks = list(model.masks.buffers())
    assert [mask.shape for mask in masks] == [(4, 12), (4, 10)]
    for mask in masks:
        assert mask.dtype == torch.bool and mask.any(0).all() and len(set(mask.sum(1).tolist())) == 1
    assert "ensemble_size=4, in_features=6, hidden_features=[12, 10], out_features=3" in repr(model)


def test_reset_parameters():
    model = mlp(seed=7)
    before = copy.deepcopy(model)
    model.reset_parameters(8)
    masks, others = list(model.masks.buffers()), list(before.masks.buffers())
    assert all(torch.equal(a, b) for a, b in zip(masks, others, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(model.weights, before.weights, strict=True))
    model.reset_parameters(7)
    assert_same_state(model, before)


def test_masks_come_from_the_generator():
    a, b, c = (list(mlp(generator=torch.Generator().manual_seed(s)).masks.buffers()) for s in (1, 1, 2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0])


def test_reload_gives_the_same_output(tmp_path):
    model, other = mlp(), mlp()
    x = torch.randn(5, 6)
    assert not torch.equal(model(x), other(x))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for again in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*masks\.0"):
        other.load_state_dict({k: v for k, v in model.state_dict().items() if k != "masks.0"})


@activations
def test_masks_of_ones_are_the_plain_network(activation):
    model = mlp(scale=1.0, activation=activation, dtype=torch.float64, seed=3)
    torch.manual_seed(3)
    plain = sequential(KINDS[activation]).double()
    plain.load_state_dict(
        {
            f"{2 * i}.{name}": t
            for i, (w, b) in enumerate(zip(model.weights, model.biases, strict=True))
            for name, t in (("weight", w), ("bias", b))
        }
    )
    x = torch.randn(5, 6).double()
    for output in model(x):
        close(output, plain(x))


def test_equal_masks_and_permuted_masks():
    model = mlp()
    masks = list(model.masks.buffers())
    x = torch.randn(5, 6)
    order = [2, 0, 3, 1]
    permuted = MaskedMLP.from_parameters(
        list(model.weights), list(model.biases), [mask[order] for mask in masks]
    )
    assert torch.equal(permuted(x), model(x)[order])
    assert torch.equal(permuted.compact()(x), model.compact()(x)[order])
    equal = MaskedMLP.from_parameters(
        list(model.weights), list(model.biases), [mask[:1].expand(4, -1) for mask in masks]
    )
    assert torch.equal(equal(x), equal(x)[:1].expand(4, -1, -1))


@given(
    st.integers(0, 13),
    st.integers(1, 6),
    st.sampled_from(["grouped", "round_robin", "random"]),
    st.integers(0, 2**32 - 1),
)
def test_each_example_meets_the_mask_that_a_layer_gives_it(b, n, mode, seed):
    model = mlp(n, dtype=torch.float64)
    layer = Masksembles1D(n, n, 1.0)
    layer.masks.copy_(torch.eye(n))
    met = set_mask_mode_(layer, mode, seed=seed)(torch.ones(b, n)).argmax(1)
    x = torch.randn(b, 6).double()
    output = model(x, mode=mode, seed=seed)
    assert output.shape == (b, 3)
    close(output, model(x)[met, torch.arange(b)])
    assert torch.equal(output, model(x, mode=mode, seed=torch.tensor(seed)))


def test_on_devices(device):
    model = mlp(dtype=torch.float64)
    x = torch.randn(7, 6).double()
    there = copy.deepcopy(model).to(device)
    close(there.compact()(x.to(device)).cpu(), model(x))
    close(there(x.to(device)).cpu(), model(x))
    for mode in ("grouped", "round_robin", "random"):
        close(there(x.to(device), mode=mode, seed=5).cpu(), model(x, mode=mode, seed=5))


def test_gradients_with_a_mask_each():
    model = mlp(dtype=torch.float64)
    x = torch.randn(7, 6).double().requires_grad_()
    grad = torch.randn(7, 3).double()
    parameters = [x, *model.parameters()]
    got = torch.autograd.grad(model(x, mode="round_robin"), parameters, grad)
    met, rows = torch.arange(7) % 4, torch.arange(7)
    expected = torch.autograd.grad(dense(model, x)[met, rows], parameters, grad)
    for a, b in zip(got, expected, strict=True):
        close(a, b)


LOSSES = {
    "mse": (lambda b: torch.randn(b, 3).double(), nn.functional.mse_loss),
    "bce": (lambda b: torch.rand(b, 3).double(), nn.functional.binary_cross_entropy_with_logits),
    "cross_entropy": (lambda b: torch.randint(3, (b,)), nn.functional.cross_entropy),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mode", ["tiled", "grouped", "round_robin", "random"])
def test_loss_is_the_mean_over_the_examples(loss, mode):
    model = mlp(activation="silu", dtype=torch.float64)
    draw, function = LOSSES[loss]
    for b in (1, 3, 8, 11):  # fewer rows than masks, and rows that are not shared out evenly
        x, y = torch.randn(b, 6).double().requires_grad_(), draw(b)
        got = model.loss(x, y, loss=loss, mode=mode, seed=5)
        output = model(x, mode=mode, seed=5)
        expected = torch.stack([function(z, y) for z in output]) if mode == "tiled" else function(output, y)
        close(got, expected)
        parameters = [x, *model.parameters()]
        ours, theirs = (torch.autograd.grad(value.sum(), parameters) for value in (got, expected))
        for a, b_ in zip(ours, theirs, strict=True):
            close(a, b_)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_groups_of_one_size_have_the_bits_of_rows_that_are_sorted(dtype, loss, reduction):
    model = mlp(dtype=dtype)
    for b in (4, 12, 20, 100):
        x, y = torch.randn(b, 6).to(dtype), LOSSES[loss][0](b)
        y = y.to(dtype) if y.is_floating_point() else y
        given = [None, torch.ones(b, dtype=dtype)]  # weights are not looked at: those rows are sorted
        views, rows = (
            model.loss(x, y, loss=loss, mode="grouped", sample_weight=w, reduction=reduction) for w in given
        )
        assert torch.equal(views, rows)
        ours, theirs = (torch.autograd.grad(v.sum(), [*model.parameters()]) for v in (views, rows))
        assert all(map(torch.equal, ours, theirs))


def test_wide_groups_have_the_bits_of_rows_that_are_sorted():
    # Wider than a vector, and whole vectors of examples: there kernels have a choice to make.
    model = MaskedMLP(4, 33, [8], 64, scale=1.5, seed=0)
    x, y = torch.randn(4 * 128, 33), torch.randn(4 * 128, 64)
    losses = [
        model.loss(x, y, loss="mse", mode="grouped", sample_weight=w) for w in (None, torch.ones(len(x)))
    ]
    ours, theirs = (torch.autograd.grad(v, [*model.parameters()]) for v in losses)
    assert torch.equal(*losses) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("mode", ["tiled", "grouped", "round_robin", "random"])
def test_loss_with_weights(mode):
    model = mlp(dtype=torch.float64)
    x, y = torch.randn(11, 6).double(), torch.randint(3, (11,))
    weight = torch.rand(11).double()
    weight[3:6] = 0
    x[4] = float("nan")  # left out
    got = model.loss(
        x, y, loss="cross_entropy", mode=mode, temperature=0.5, label_smoothing=0.2, sample_weight=weight
    )
    output = model(torch.nan_to_num(x), mode=mode) / 0.5
    losses = nn.functional.cross_entropy(
        output.movedim(-1, 1), y.expand(output.shape[:-1]), reduction="none", label_smoothing=0.2
    )
    close(got, (losses * weight).sum(-1) / weight.sum())
    for nothing in (
        model.loss(x[:0], y[:0], loss="cross_entropy", mode=mode),
        model.loss(x, y, loss="cross_entropy", mode=mode, sample_weight=0 * weight),
    ):
        assert torch.equal(nothing, torch.zeros(4 if mode == "tiled" else (), dtype=torch.float64))
        nothing.sum().backward()
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())
        model.zero_grad()


@pytest.mark.parametrize("mode", ["tiled", "grouped", "round_robin", "random"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_loss_with_weights_at_the_ends_of_their_range(mode, loss):
    model = mlp()
    exact = copy.deepcopy(model).double()
    x, y = torch.randn(11, 6), torch.randint(3, (11,)) if loss == "cross_entropy" else torch.randn(11, 3)
    weight = torch.randint(1, 5, (11,)) / 4.0
    weight[2] = 0
    expected = exact.loss(
        x.double(), y if loss == "cross_entropy" else y.double(),
        loss=loss, mode=mode, sample_weight=weight.double(),
    )  # fmt: skip
    gradients = torch.autograd.grad(expected.sum(), list(exact.parameters()))
    for scale in (2.0**-140, 2.0**127):  # subnormal; their sum overflows
        got = model.loss(x, y, loss=loss, mode=mode, sample_weight=weight * scale)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)
        for a, b in zip(torch.autograd.grad(got.sum(), list(model.parameters())), gradients, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_of_other_dtypes(dtype):
    model = mlp(dtype=dtype)
    x, y = torch.randn(11, 6).to(dtype), torch.randn(11, 3).to(dtype)
    weight = torch.rand(11).to(dtype)
    for mode in ("tiled", "round_robin"):
        got = model.loss(x, y, loss="mse", mode=mode, sample_weight=weight)
        exact = copy.deepcopy(model).double()
        expected = exact.loss(x.double(), y.double(), loss="mse", mode=mode, sample_weight=weight.double())
        assert got.dtype == torch.float32
        assert (got - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_bad_losses():
    model = mlp()
    x, y = torch.zeros(5, 6), torch.zeros(5, 3)
    for arguments, message in (
        ({"input": x[0]}, "input: expected [B, 6], got shape [6]"),
        ({"target": y[:4]}, "target: expected the 5 examples of the input first, got shape [4, 3]"),
        (
            {"sample_weight": torch.ones(4, 5)},
            "sample_weight: expected the 5 examples of the input first, got shape [4, 5]",
        ),
        ({"mode": "all"}, "mode: expected one of tiled, grouped, round_robin, random, got 'all'"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"MaskedMLP: {message}")):
            model.loss(**({"input": x, "target": y, "loss": "mse", "mode": "round_robin"} | arguments))
    with pytest.raises(ValueError, match=r'loss: expected .*, got "mae"'):
        model.loss(x, y, loss="mae")


def test_training_in_one_pass_is_training():
    together, apart = mlp(seed=1, generator=seeded(2)), mlp(seed=1, generator=seeded(2))
    x, y = torch.randn(30, 6), torch.randint(3, (30,))
    for step in range(5):
        losses = (
            together.loss(x, y, loss="cross_entropy", mode="random", seed=step),
            nn.functional.cross_entropy(apart(x, mode="random", seed=step), y),
        )
        for model, loss in zip((together, apart), losses, strict=True):
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_search_for_what_masks_keep_is_made_once(monkeypatch):
    from pyens.nn import masked_mlp as module

    model = mlp()
    calls = []
    plan = module.plan_masks
    monkeypatch.setattr(module, "plan_masks", lambda masks: calls.append(1) or plan(masks))
    x = torch.randn(5, 6)
    for mode in ("tiled", "round_robin"):
        model(x, mode=mode)
        model.loss(x, torch.zeros(5, 3), loss="mse", mode=mode).sum().backward()
    assert not calls


CHANGES = {
    "load_state_dict": lambda model, other: model.load_state_dict(other.state_dict()),
    "load_state_dict, assigned": lambda model, other: model.load_state_dict(other.state_dict(), assign=True),
    "of a network around it": lambda model, other: nn.Sequential(model).load_state_dict(
        nn.Sequential(other).state_dict()
    ),
    "in place": lambda model, other: (
        [
            tensor.data.copy_(value)
            for (name, value) in other.state_dict().items()
            for tensor in [model.state_dict(keep_vars=True)[name]]
            if not name.startswith("masks")
        ]
        + [a.copy_(b) for a, b in zip(model.masks.buffers(), other.masks.buffers(), strict=True)]
    ),
}


@pytest.mark.parametrize("how", CHANGES)
def test_other_masks_are_planned_anew(how):
    model, other = mlp(), mlp()
    x = torch.randn(5, 6)
    model(x)
    CHANGES[how](model, other)
    assert torch.equal(model(x), other(x))


def test_copies_have_plans_of_their_own():
    model = mlp()
    x = torch.randn(5, 6)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double()):
        assert torch.allclose(again(x.to(again.weights[0].dtype)).float(), model(x), atol=1e-5)
        before = model(x)
        next(again.masks.buffers()).fill_(False)
        again(x.to(again.weights[0].dtype))
        assert torch.equal(model(x), before)
    with torch.inference_mode():
        made = mlp()
        assert made(x).shape == (4, 5, 3)
    empty = mlp(device="meta")
    there = empty.to_empty(device="cpu")
    there.load_state_dict(model.state_dict())
    assert torch.equal(there(x), model(x))


@pytest.mark.parametrize("mode", ["tiled", "grouped", "round_robin", "random"])
def test_compiles(mode):
    torch._dynamo.reset()
    model = mlp()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, y: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        return model(x, mode=mode, seed=seed).square().mean(), model.loss(
            x, y, loss="mse", mode=mode, seed=seed
        ).mean()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    parameters = list(model.parameters())
    for b in (5, 8, 11, 30):
        x, y, seed = torch.randn(b, 6), torch.randn(b, 3), torch.tensor(b)
        got, expected = compiled(x, y, seed), step(x, y, seed)
        torch.testing.assert_close(got, expected)
        ours, theirs = (torch.autograd.grad(sum(values), parameters) for values in (got, expected))
        torch.testing.assert_close(ours, theirs)
    other = mlp()
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x, y, seed), step(x, y, seed))


def test_bad_arguments():
    good = {"ensemble_size": 4, "in_features": 6, "hidden_features": [5, 5], "out_features": 1, "scale": 2.0}
    for kwargs, message in (
        ({"ensemble_size": 0}, "ensemble_size: expected a positive integer, got 0"),
        ({"hidden_features": [5, 0]}, r"hidden_features\[1\]: expected a positive integer, got 0"),
        ({"hidden_features": []}, "hidden_features: expected at least one hidden layer, got none"),
        ({"scale": 0.5}, "scale: expected at least 1, got 0.5"),
        ({"activation": "swish"}, 'activation: expected one of relu, .*, got "swish"'),
        (
            {"activation": ["relu", "tanh"]},
            r"activation: expected one name for all hidden layers, got \['relu', 'tanh'\]",
        ),
    ):
        with pytest.raises(ValueError, match=f"MaskedMLP: {message}"):
            MaskedMLP(**(good | kwargs))
    with pytest.raises(TypeError, match="MaskedMLP: hidden_features: expected a sequence of widths, got 5"):
        MaskedMLP(**(good | {"hidden_features": 5}))


def test_bad_inputs():
    model = mlp()
    for x in (torch.zeros(6), torch.zeros(5, 7), torch.zeros(3, 5, 6), torch.zeros(4, 5, 7)):
        message = f"MaskedMLP: input: expected [B, 6] or [4, B, 6], got shape {list(x.shape)}"
        with pytest.raises(ValueError, match=re.escape(message)):
            model(x)
    with pytest.raises(ValueError, match=re.escape("input: expected [B, 6], got shape [4, 5, 6]")):
        model(torch.zeros(4, 5, 6), mode="round_robin")
    with pytest.raises(
        ValueError, match="mode: expected one of tiled, grouped, round_robin, random, got 'all'"
    ):
        model(torch.zeros(5, 6), mode="all")
