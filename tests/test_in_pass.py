"""pyens.optim.in_pass: a step within the pass is backward and a step of pyens.optim.fused, to the bit."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW

import pyens
from pyens.nn import EnsembleLinear, EnsembleMLP, MaskedMLP
from pyens.optim import MemberLearningRates, MemberWeightDecay, fused, in_pass, keep_members
from pyens.reference import optimizers as reference
from pyens.training import Trainer, fit

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adam": (Adam, {}),
    "Adam, all": (Adam, {"amsgrad": True, "weight_decay": 0.1, "maximize": True, "eps": 1e-3}),
    "AdamW": (AdamW, {"weight_decay": 0.1, "betas": (0.8, 0.9)}),
    "Adagrad": (Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1}),
    "SGD": (SGD, {"lr": 0.01}),
    "SGD, momentum": (SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    "SGD, damped": (SGD, {"lr": 0.01, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert p.dtype == q.dtype
        # float16 has a 0 for small squares, and so NaN.
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True, msg=name)


def assert_same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        assert set(a.state[p]) == set(b.state[q])
        for name, value in a.state[p].items():
            torch.testing.assert_close(value, b.state[q][name], rtol=0, atol=0, equal_nan=True)


def apart(optimizer: torch.optim.Optimizer, model: Any, *batch: Any, **options: Any) -> torch.Tensor:
    optimizer.zero_grad()
    losses = model.loss(*batch, **options)
    losses.sum().backward()
    optimizer.step()
    return losses.detach()


@pytest.mark.parametrize("batch", [1, 8, 9, 17, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_the_bits_of_backward_and_step(name, dtype, batch):
    kind, options = KINDS[name]
    model = EnsembleMLP(3, 11, [17, 5], 2, dtype=dtype)
    twin = copy.deepcopy(model)
    ours, theirs = in_pass(kind, model.parameters(), **options), fused(kind, twin.parameters(), **options)
    for _ in range(3):
        x, y = drawn(batch, 11, dtype=dtype), drawn(batch, 2, dtype=dtype)
        losses = ours.step_in_pass(model, x, y, loss="mse")
        expected = apart(theirs, twin, x, y, loss="mse")
        torch.testing.assert_close(losses, expected, rtol=0, atol=0, equal_nan=True)
        assert not losses.requires_grad and losses.dtype in (torch.float32, torch.float64)
    assert_same(model, twin)
    assert_same_state(ours, theirs)
    assert all(p.grad is None for p in model.parameters())
    assert [type(v) for s in ours.state_dict()["state"].values() for v in s.values()] == [
        type(v) for s in theirs.state_dict()["state"].values() for v in s.values()
    ]


LARGE = {
    "few members, many tiles": (2, 6000, [3, 4, 1]),
    "one large member": (1, 200, [180, 190, 3]),
    "more tiles than spans": (9, 6000, [3, 4, 1]),
}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", LARGE)
def test_the_bits_however_the_pass_is_cut(name, threads):
    members, batch, (wide, *hidden, out) = LARGE[name]
    model = EnsembleMLP(members, wide, hidden, out)
    twin = copy.deepcopy(model)
    x, y = drawn(batch, wide), drawn(batch, out)
    apart(fused(Adam, twin.parameters()), twin, x, y, loss="mse")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        in_pass(Adam, model.parameters()).step_in_pass(model, x, y, loss="mse")
    finally:
        torch.set_num_threads(before)
    assert_same(model, twin)


NETWORKS: dict[str, dict[str, Any]] = {
    "norms and residuals": {"norm": "layer_norm", "residual": [False, True], "activation": "mish"},
    "dropout": {"dropout": 0.3},
    "dropout of each member": {"dropout": [0.1, 0.2, 0.0, 0.5]},
    "no biases": {"bias": False},
    "some biases": {"bias": [True, False, True]},
    "norms without parameters": {"norm": "rms_norm", "norm_affine": False},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    model = EnsembleMLP(4, 6, [10, 10], 3, **NETWORKS[name])
    twin = copy.deepcopy(model)
    ours, theirs = in_pass(AdamW, model.parameters()), fused(AdamW, twin.parameters())
    seeds = torch.arange(4) if model.dropout else None
    for _ in range(2):
        x, y = drawn(20, 6), torch.randint(3, (20,))
        options = {"loss": "cross_entropy", "label_smoothing": 0.1, "dropout_seeds": seeds}
        options["sample_weight"] = torch.rand(4, 20)
        assert torch.equal(ours.step_in_pass(model, x, y, **options), apart(theirs, twin, x, y, **options))
    assert_same(model, twin)


def test_dropout_draws_as_the_loss_does():
    model = EnsembleMLP(4, 6, [10, 10], 3, dropout=0.3)
    twin = copy.deepcopy(model)
    x, y = drawn(20, 6), drawn(20, 3)
    torch.manual_seed(3)
    losses = in_pass(Adam, model.parameters()).step_in_pass(model, x, y, loss="mse")
    torch.manual_seed(3)
    assert torch.equal(losses, apart(fused(Adam, twin.parameters()), twin, x, y, loss="mse"))
    assert_same(model, twin)


INPUTS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "of each member": (drawn(4, 20, 6), drawn(4, 20, 3), {}),
    "a tuple": ((drawn(20, 2), drawn(20, 4)), drawn(20, 3), {}),
    "shared, of any dimensions": (drawn(2, 5, 6), drawn(2, 5, 3), {"shared": True}),
    "strided": (drawn(6, 20).T, drawn(3, 20).T, {}),
    "expanded": (drawn(1, 6).expand(20, 6), drawn(1, 3).expand(20, 3), {}),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name):
    x, y, options = INPUTS[name]
    model = EnsembleMLP(4, 6, [10], 3)
    twin = copy.deepcopy(model)
    losses = in_pass(Adam, model.parameters()).step_in_pass(model, x, y, loss="mse", **options)
    expected = apart(fused(Adam, twin.parameters()), twin, x, y, loss="mse", **options)
    assert torch.equal(losses, expected)
    assert_same(model, twin)


def test_an_autoencoder_reads_its_target():
    model, x = EnsembleMLP(2, 5, [3], 5), drawn(7, 5)
    twin = copy.deepcopy(model)
    in_pass(Adam, model.parameters()).step_in_pass(model, x, x, loss="mse")
    apart(fused(Adam, twin.parameters()), twin, x, x, loss="mse")
    assert_same(model, twin)


def test_the_formulas_in_float64():
    model = EnsembleLinear(2, 4, 3, dtype=torch.float64)
    weight, bias = (p.detach().clone().requires_grad_() for p in (model.weight, model.bias))
    x, y = drawn(6, 4, dtype=torch.float64), drawn(6, 3, dtype=torch.float64)
    in_pass(Adam, model.parameters(), lr=0.1).step_in_pass(model, x, y, loss="mse")
    loss = ((x @ weight.mT + bias.unsqueeze(1) - y) ** 2).mean((1, 2)).sum()
    gradients = torch.autograd.grad(loss, (weight, bias))
    moments = [[torch.zeros_like(g) for g in gradients] for _ in range(2)]
    steps = [torch.tensor(0.0) for _ in gradients]
    parameters = [weight.detach(), bias.detach()]
    reference.adam_(
        parameters, gradients, *moments, [], steps, None, 0.1, 0.9, 0.999, 1e-8, 0.0, False, False
    )
    torch.testing.assert_close(model.weight.detach(), parameters[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.bias.detach(), parameters[1], rtol=1e-12, atol=1e-12)


def test_groups_have_their_own_options():
    model = EnsembleMLP(3, 5, [7], 2)
    twin = copy.deepcopy(model)

    def groups(of: Any) -> list[dict[str, Any]]:
        return [
            {"params": list(of.biases), "lr": 0.1, "weight_decay": 0.0},
            {"params": [of.weights[1]], "lr": 1e-3, "amsgrad": True},
            {"params": [of.weights[0]], "betas": (0.5, 0.6)},
        ]

    ours, theirs = in_pass(AdamW, groups(model), lr=0.01), fused(AdamW, groups(twin), lr=0.01)
    for _ in range(3):
        x, y = drawn(9, 5), drawn(9, 2)
        ours.step_in_pass(model, x, y, loss="mse")
        apart(theirs, twin, x, y, loss="mse")
    assert_same(model, twin)


def test_frozen_parameters_and_those_of_others_stay():
    model = EnsembleMLP(3, 5, [7], 2)
    model.weights[0].requires_grad_(False)
    before = copy.deepcopy(model)
    optimizer = in_pass(SGD, [model.weights[0], model.weights[1], model.biases[0]], lr=0.1)
    optimizer.step_in_pass(model, drawn(9, 5), drawn(9, 2), loss="mse")
    changed = {
        n: not torch.equal(p, q)
        for (n, p), q in zip(model.named_parameters(), before.parameters(), strict=True)
    }
    assert changed == {"weights.0": False, "weights.1": True, "biases.0": True, "biases.1": False}


def test_both_kinds_of_steps_in_turn_and_state_dicts():
    model = EnsembleMLP(3, 5, [7], 2)
    twin = copy.deepcopy(model)
    ours, theirs = in_pass(Adam, model.parameters()), torch.optim.Adam(twin.parameters())
    batch = drawn(9, 5), drawn(9, 2)
    apart(ours, model, *batch, loss="mse")
    ours.zero_grad()
    ours.step_in_pass(model, *batch, loss="mse")
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    copied = copy.deepcopy(model)
    loaded = in_pass(Adam, copied.parameters())
    loaded.load_state_dict(theirs.state_dict())
    loaded.step_in_pass(copied, *batch, loss="mse")
    ours.step_in_pass(model, *batch, loss="mse")
    assert_same(model, copied)


def test_it_can_be_pickled_and_copied():
    model = EnsembleMLP(3, 5, [7], 2)
    optimizer = in_pass(Adam, model.parameters())
    batch = drawn(9, 5), drawn(9, 2)
    optimizer.step_in_pass(model, *batch, loss="mse")
    again, its = pickle.loads(pickle.dumps((model, optimizer)))
    its.step_in_pass(again, *batch, loss="mse")
    optimizer.step_in_pass(model, *batch, loss="mse")
    assert_same(model, again)


def test_schedules_hooks_rates_and_members_that_leave():
    model = EnsembleMLP(3, 5, [7], 2)
    twin = copy.deepcopy(model)
    calls = []
    pairs = [
        (in_pass(Adam, model.parameters(), lr=0.1), model),
        (fused(Adam, twin.parameters(), lr=0.1), twin),
    ]
    schedules = []
    for optimizer, _ in pairs:
        MemberLearningRates(optimizer, [1.0, 0.5, 0.0])
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        schedules.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    for step in range(4):
        batch = drawn(9, 5), drawn(9, 2)
        pairs[0][0].step_in_pass(model, *batch, loss="mse")
        apart(pairs[1][0], twin, *batch, loss="mse")
        for schedule in schedules:
            schedule.step()
        if step == 1:
            for optimizer, of in pairs:
                optimizer.zero_grad()
                keep_members(optimizer, [2, 0], 3)
                of.select_([2, 0])
    assert_same(model, twin)
    assert len(calls) == 8


def test_an_empty_batch_is_a_step_from_zeros():
    model = EnsembleMLP(3, 5, [7], 2)
    twin = copy.deepcopy(model)
    ours, theirs = in_pass(AdamW, model.parameters()), fused(AdamW, twin.parameters())
    for rows in (4, 0, 4):
        batch = drawn(rows, 5), drawn(rows, 2)
        assert torch.equal(
            ours.step_in_pass(model, *batch, loss="mse"), apart(theirs, twin, *batch, loss="mse")
        )
    assert_same(model, twin)


def test_nan_stays_in_its_member():
    model = EnsembleMLP(3, 5, [7], 2)
    twin = copy.deepcopy(model)
    x = drawn(3, 9, 5)
    x[1, 0, 0] = torch.nan
    batch = x, drawn(9, 2)
    in_pass(Adam, model.parameters()).step_in_pass(model, *batch, loss="mse")
    apart(fused(Adam, twin.parameters()), twin, *batch, loss="mse")
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.isnan(), q.isnan()) and torch.equal(p.nan_to_num(), q.nan_to_num())
        assert not p[0].isnan().any() and not p[2].isnan().any()
    assert model.weights[0][1].isnan().any()


def own_loss() -> Any:
    class Own(EnsembleMLP):
        def loss(self, *args: Any, **options: Any) -> Any:
            return super().loss(*args, **options)

    return Own(3, 5, [7], 2)


def hooked(model: Any) -> Any:
    model.weights[0].register_post_accumulate_grad_hook(lambda p: None)
    return model


def with_gradient(model: Any) -> Any:
    model.biases[1].grad = torch.zeros_like(model.biases[1])
    return model


def tied(model: Any) -> Any:
    model.biases[0] = nn.Parameter(model.weights[0].data[:, :, 0].contiguous())
    model.biases[0].data = model.weights[0].data.view(-1)[: 3 * 7].view(3, 7)
    return model


def with_loss(model: Any) -> Any:
    model.loss = lambda *_, **__: None
    return model


def spectral(model: Any) -> Any:
    torch.nn.utils.parametrizations.spectral_norm(model, "weight")
    return model


def computed(model: Any) -> Any:
    torch.nn.utils.parametrizations.weight_norm(model, "weight")
    return model


REFUSED: dict[str, tuple[Any, dict[str, Any], Any, str]] = {
    "another model": (
        lambda: MaskedMLP(4, 5, [8], 2, scale=2.0),
        {},
        TypeError,
        "model: expected an EnsembleLinear",
    ),
    "a loss of its own": (own_loss, {}, TypeError, "loss, got a Own"),
    "hooks": (lambda: hooked(EnsembleMLP(3, 5, [7], 2)), {}, ValueError, "no hooks of gradients"),
    "accumulation": (lambda: with_gradient(EnsembleMLP(3, 5, [7], 2)), {}, ValueError, "no .grad"),
    "shared memory": (lambda: tied(EnsembleMLP(3, 5, [7], 2)), {}, ValueError, "memory of their own"),
    "computed weights": (lambda: computed(EnsembleLinear(3, 5, 2)), {}, ValueError, "computed from others"),
    "no mean": (None, {"reduction": "none"}, ValueError, "reduction: expected mean, got none"),
    "members": (None, {"members": [0, 2]}, ValueError, "members: expected None"),
    "weights with a gradient": (
        None,
        {"sample_weight": torch.ones(9, requires_grad=True)},
        ValueError,
        "requires_grad=False",
    ),
    "weights out of range": (None, {"sample_weight": -torch.ones(9)}, ValueError, "finite weights"),
    "an unknown loss": (None, {"loss": "hinge"}, ValueError, "loss: expected one of mse"),
    "an unknown option": (None, {"margin": 1.0}, TypeError, "margin: expected an option of loss"),
    "what the model says": (
        None,
        {"activation": "tanh"},
        TypeError,
        "activation: expected an option of loss",
    ),
    "a loss of this one's": (lambda: with_loss(EnsembleMLP(3, 5, [7], 2)), {}, TypeError, "their own loss"),
    "a spectral norm": (lambda: spectral(EnsembleLinear(3, 5, 2)), {}, ValueError, "computed from others"),
    "all frozen": (
        lambda: EnsembleMLP(3, 5, [7], 2).requires_grad_(False),
        {},
        ValueError,
        "parameters of this optimizer that require a gradient, got none",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_nothing_changes(name):
    make, options, kind, message = REFUSED[name]
    model: Any = EnsembleMLP(3, 5, [7], 2) if make is None else make()
    before = copy.deepcopy(model.state_dict())
    optimizer = in_pass(SGD, model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(kind, match=message):
        optimizer.step_in_pass(model, drawn(9, 5), drawn(9, 2), **{"loss": "mse"} | options)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not optimizer.state_dict()["state"]


def test_an_input_that_needs_a_gradient_a_class_out_of_range_and_autocast_are_refused():
    model = EnsembleMLP(3, 5, [7], 2)
    before = copy.deepcopy(model)
    optimizer = in_pass(Adam, model.parameters(), lr=0.1)
    for x, y in ((drawn(9, 5).requires_grad_(), drawn(9, 2)), (drawn(9, 5), drawn(9, 2).requires_grad_())):
        with pytest.raises(ValueError, match="input, target and options: expected requires_grad=False"):
            optimizer.step_in_pass(model, x, y, loss="mse")
    with pytest.raises(ValueError, match="target: expected classes from 0 to 1"):
        optimizer.step_in_pass(model, drawn(9, 5), torch.full((9,), 2), loss="cross_entropy")
    with pytest.raises(ValueError, match="no autocast"), torch.autocast("cpu", torch.bfloat16):
        optimizer.step_in_pass(model, drawn(9, 5), drawn(9, 2), loss="mse")
    with pytest.raises(ValueError, match="parameters of this optimizer that require a gradient"):
        optimizer.step_in_pass(EnsembleMLP(3, 5, [7], 2), drawn(9, 5), drawn(9, 2), loss="mse")

    class OfOnesOwn(MemberWeightDecay):
        pass

    OfOnesOwn(optimizer, [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="no MemberWeightDecay"):
        optimizer.step_in_pass(model, drawn(9, 5), drawn(9, 2), loss="mse")
    assert_same(model, before)
    assert not optimizer.state_dict()["state"]


def test_a_gradient_of_any_parameter_of_the_optimizer_is_refused():
    model, beside = EnsembleMLP(3, 5, [7], 2), nn.Parameter(torch.ones(3))
    beside.grad = torch.ones(3)
    batch = drawn(9, 5), drawn(9, 2)
    with pytest.raises(ValueError, match=r"no \.grad"):
        in_pass(SGD, [*model.parameters(), beside], lr=0.1).step_in_pass(model, *batch, loss="mse")
    model.biases[0].requires_grad_(False).grad = torch.ones(3, 7)
    with pytest.raises(ValueError, match=r"no \.grad"):
        in_pass(SGD, model.parameters(), lr=0.1).step_in_pass(model, *batch, loss="mse")


@pytest.mark.parametrize("kind", [in_pass, fused])
def test_tensors_of_inference_mode(kind):
    model = EnsembleMLP(3, 5, [7], 2)
    twin = copy.deepcopy(model)
    optimizer, theirs = (kind(SGD, of.parameters(), lr=0.1, momentum=0.9) for of in (model, twin))
    batch = drawn(9, 5), drawn(9, 2)
    for _ in range(2):
        apart(theirs, twin, *batch, loss="mse")
    if kind is in_pass:
        with torch.inference_mode():
            optimizer.step_in_pass(model, *batch, loss="mse")
        optimizer.step_in_pass(model, *batch, loss="mse")
        assert_same(model, twin)
    with torch.inference_mode():
        for state in theirs.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].clone()
    before = copy.deepcopy(twin)
    with pytest.raises(ValueError, match=r"no tensor made under torch\.inference_mode"):
        apart(theirs, twin, *batch, loss="mse")
    assert_same(twin, before)


@pytest.mark.parametrize("name", ["exp_avg", "step"])
def test_state_elsewhere_is_refused_by_name(name):
    model = EnsembleMLP(3, 5, [7], 2)
    optimizer = in_pass(Adam, model.parameters())
    batch = drawn(9, 5), drawn(9, 2)
    optimizer.step_in_pass(model, *batch, loss="mse")
    before = copy.deepcopy(model)
    for state in optimizer.state.values():
        state[name] = state[name].to("meta")
    with pytest.raises(TypeError, match=rf"state\['{name}'\]: expected a tensor on cpu, got meta"):
        optimizer.step_in_pass(model, *batch, loss="mse")
    assert_same(model, before)


def test_memory_shared_with_an_option_is_refused():
    model = EnsembleMLP(3, 5, [7], 2)
    with torch.no_grad():
        model.biases[1].abs_()
    weight = model.biases[1].detach()[0]
    with pytest.raises(ValueError, match="memory of their own"):
        in_pass(SGD, model.parameters(), lr=0.5).step_in_pass(
            model, drawn(9, 5), torch.randint(2, (9,)), loss="cross_entropy", class_weight=weight
        )


def test_hooks_of_parameters_that_take_no_part_are_no_matter():
    model, beside = EnsembleMLP(3, 5, [7], 2), nn.Parameter(torch.ones(3))
    beside.register_hook(lambda gradient: gradient)
    before = copy.deepcopy(model)
    optimizer = in_pass(SGD, [*model.parameters(), beside], lr=0.1)
    optimizer.step_in_pass(model, drawn(9, 5), drawn(9, 2), loss="mse")
    assert not torch.equal(model.weights[0], before.weights[0]) and torch.equal(beside, torch.ones(3))


def test_no_state_without_momentum():
    model = EnsembleMLP(3, 5, [7], 2)
    optimizer = in_pass(SGD, model.parameters(), lr=0.1)
    optimizer.step_in_pass(model, drawn(9, 5), drawn(9, 2), loss="mse")
    assert not optimizer.state_dict()["state"]


def test_torch_func_is_refused():
    model = EnsembleMLP(3, 5, [7], 2)
    optimizer = in_pass(SGD, model.parameters(), lr=0.1)
    x = drawn(9, 5)
    with pytest.raises(ValueError, match=r"no torch\.func"):
        torch.func.grad(lambda y: optimizer.step_in_pass(model, x, y, loss="mse").sum())(drawn(9, 2))


@pytest.mark.parametrize("kind", [Adam, SGD])
def test_compiled_code_around_it(kind):
    model = EnsembleMLP(3, 5, [7], 2)
    twin = copy.deepcopy(model)
    optimizer = in_pass(kind, model.parameters(), lr=0.1)
    batch = drawn(9, 5), drawn(9, 2)

    @torch.compile(backend="eager")
    def step(x: Any, y: Any) -> Any:
        return optimizer.step_in_pass(model, x, y, loss="mse") * 2

    expected = apart(fused(kind, twin.parameters(), lr=0.1), twin, *batch, loss="mse") * 2
    assert torch.equal(step(*batch), expected)
    assert_same(model, twin)


def test_without_autograd_around_it():
    model = EnsembleMLP(3, 5, [7], 2)
    twin = copy.deepcopy(model)
    batch = drawn(9, 5), drawn(9, 2)
    with torch.no_grad():
        in_pass(Adam, model.parameters()).step_in_pass(model, *batch, loss="mse")
        weight = computed(EnsembleLinear(3, 5, 2))
        with pytest.raises(ValueError, match="computed from others"):
            in_pass(Adam, weight.parameters()).step_in_pass(weight, *batch, loss="mse")
    apart(fused(Adam, twin.parameters()), twin, *batch, loss="mse")
    assert_same(model, twin)


def test_numpy_is_refused_by_name():
    model = EnsembleMLP(3, 5, [7], 2)
    with pytest.raises(TypeError, match="ensemble_mlp_loss: target: expected a tensor, got numpy"):
        in_pass(Adam, model.parameters()).step_in_pass(model, drawn(9, 5), drawn(9, 2).numpy(), loss="mse")


def test_kinds_of_optimizers():
    with pytest.raises(TypeError, match="in_pass: kind: expected Adam, AdamW, Adagrad or SGD"):
        in_pass(torch.optim.RMSprop, EnsembleLinear(1, 2, 1).parameters())
    with pytest.raises(TypeError, match=r"in_pass: parameters\[0\]: expected a tensor, got a int"):
        in_pass(Adam, [1])  # type: ignore[list-item]


OPTIONS: dict[str, dict[str, Any]] = {
    "early stopping, dropout, a schedule": {
        "early_stopping": 1,
        "scheduler": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
    },
    "bootstrap and an average": {"bootstrap": "poisson", "ema": 0.9},
    "data of their own": {"own_data": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_whole_runs(name):
    options = OPTIONS[name]
    x = drawn(*([4] if "own_data" in options else []), 200, 5)
    y = x[..., :2].sin()
    model = EnsembleMLP(4, 5, [10, 10], 2, dropout=0.1)
    twin = copy.deepcopy(model)
    runs = []
    for of, kind in ((model, in_pass), (twin, fused)):

        def make(p: Any, kind: Any = kind) -> Any:
            return kind(AdamW, p, lr=0.05)

        runs.append(
            fit(of, (x, y), loss="mse", epochs=4, batch_size=16, optimizer=make, progress=False, **options)
        )
    assert_same(model, twin)
    assert (runs[0].train_loss == runs[1].train_loss).all() or (
        runs[0].status == runs[1].status and "stopped" in runs[0].status
    )


def test_single_steps_of_a_trainer():
    model = EnsembleMLP(4, 5, [10], 3)
    twin = copy.deepcopy(model)
    x, y = drawn(30, 5), torch.randint(3, (30,))
    weight = torch.tensor([1.0, 2.0, 0.5])
    trainers = [
        Trainer(of, loss="cross_entropy", optimizer=lambda p, k=k: k(Adam, p), class_weight=weight)
        for of, k in ((model, in_pass), (twin, fused))
    ]
    for _ in range(3):
        losses = [trainer.step(x, y, sample_weight=torch.arange(30.0)) for trainer in trainers]
        assert torch.equal(*losses)
    assert_same(model, twin)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip_norm", {"clip_norm": 1.0}, "clip_norm: expected None"),
        ("clip_value", {"clip_value": 1.0}, "clip_value: expected None"),
        ("micro_batch_size", {"micro_batch_size": 4}, "micro_batch_size: expected None"),
        ("scaler", {"scaler": torch.amp.GradScaler("cpu", enabled=False)}, "scaler: expected None"),
        ("autocast", {"autocast": torch.bfloat16}, "autocast: expected None"),
        ("penalty", {"penalty": lambda outputs: outputs.sum()}, "penalty: expected None"),
        ("loss", {"loss": lambda z, y: (z - y).square().mean((1, 2))}, "loss: expected the name of one"),
    ],
)
def test_what_looks_at_gradients_is_refused_in_training(name, options, message):
    model = EnsembleMLP(4, 5, [10], 3)
    trainer = Trainer(model, **{"loss": "mse", "optimizer": lambda p: in_pass(Adam, p)} | options)
    with pytest.raises(ValueError, match=message):
        trainer.step(drawn(9, 5), drawn(9, 3))


def test_models_and_several_optimizers_are_refused_in_training():
    batch = drawn(9, 5), drawn(9, 3)
    trainer = Trainer(MaskedMLP(4, 5, [8], 3, scale=2.0), loss="mse", optimizer=lambda p: in_pass(Adam, p))
    with pytest.raises(ValueError, match="beside one that steps in the pass, got a MaskedMLP"):
        trainer.step(*batch)
    model = EnsembleMLP(4, 5, [8], 3)

    def two(parameters: Any) -> Any:
        return [in_pass(Adam, model.weights), in_pass(Adam, model.biases)]

    with pytest.raises(ValueError, match="expected one alone"):
        Trainer(model, loss="mse", optimizer=two).step(*batch)


def test_it_is_among_the_names_of_pyens():
    assert pyens.optim.in_pass is in_pass and issubclass(
        type(in_pass(Adam, [nn.Parameter(torch.ones(1))])), Adam
    )
