"""pyens.nn.TabularEnsemble: as many plain models as it has members, bit for bit where that is promised."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyens import ops
from pyens.nn import EnsembleMLP, TabularEnsemble

CATEGORICAL = [(30, 8), (20, 8), (7, 3), (21, 5)]
SEEDS = [7, 0, 123456789]
E, B, NUMERIC, OUT = 3, 40, 4, 2
sparse_or_dense = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
columns = pytest.mark.parametrize(
    ("categorical", "numeric"),
    [(CATEGORICAL, NUMERIC), (CATEGORICAL[:1], 0), ([], NUMERIC)],
    ids=["both", "categorical", "numeric"],
)


class Plain(nn.Module):
    """A member as a user of torch writes it."""

    def __init__(self, categorical=CATEGORICAL, numeric=NUMERIC, hidden=(9, 5), out=OUT, bias=True):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(*column) for column in categorical)
        widths = [sum(dim for _, dim in categorical) + numeric, *hidden, out]
        self.linears = nn.ModuleList(nn.Linear(i, o, bias=bias) for i, o in itertools.pairwise(widths))

    def forward(self, categorical: Tensor | None, numeric: Tensor | None) -> Tensor:
        features = [embedding(categorical[:, t]) for t, embedding in enumerate(self.embeddings)]
        hidden = torch.cat(features if numeric is None else [*features, numeric], -1)
        for linear in self.linears[:-1]:
            hidden = torch.tanh(linear(hidden))
        return self.linears[-1](hidden)


def make(categorical=CATEGORICAL, numeric=NUMERIC, **kwargs) -> TabularEnsemble:
    return TabularEnsemble(
        E, categorical, numeric, [9, 5], OUT, **{"activation": "tanh", "embedding_std": 1.0, **kwargs}
    )


def plain(model: TabularEnsemble, i: int) -> Plain:
    """Member i as a plain model."""
    categorical = [(e.num_embeddings, e.embedding_dim) for e in model.embeddings]
    member = Plain(categorical, model.numeric_features).to(model.mlp.weights[0].dtype)
    with torch.no_grad():
        for parameter, stacked in zip(parameters_of(member), stacked_parameters(model), strict=True):
            parameter.copy_(stacked[i])
    return member


def parameters_of(member: Plain) -> list[Tensor]:
    return [
        *(embedding.weight for embedding in member.embeddings),
        *(linear.weight for linear in member.linears),
        *(linear.bias for linear in member.linears if linear.bias is not None),
    ]


def stacked_parameters(model: TabularEnsemble) -> list[Tensor]:
    return [*(embedding.weight for embedding in model.embeddings), *model.mlp.weights, *model.mlp.biases]


def data(
    categorical=CATEGORICAL, numeric=NUMERIC, *, dtype=torch.float64, each=(True, True), batch=B
) -> tuple[Tensor | None, Tensor | None]:
    """The columns, of each member its own or shared."""
    leading = [[E, batch] if own else [batch] for own in each]
    return (
        torch.stack([torch.randint(n, leading[0]) for n, _ in categorical], -1) if categorical else None,
        torch.randn(*leading[1], numeric, dtype=dtype) if numeric else None,
    )


def of_member(x: Tensor | None, i: int) -> Any:
    return x if x is None or x.dim() == 2 else x[i]


# --- forward and gradients -----------------------------------------------------------------------


@columns
@sparse_or_dense
@pytest.mark.parametrize("each", list(itertools.product([False, True], repeat=2)), ids=str)
def test_is_what_its_members_are_alone(categorical, numeric, sparse, each):
    model = make(categorical, numeric, dtype=torch.float64, sparse=sparse)
    inputs = data(categorical, numeric, each=each)
    weights = torch.randn(E, B, OUT, dtype=torch.float64)
    output = model(*inputs)
    assert output.shape == (E, B, OUT)
    (output * weights).sum().backward()
    for i in range(E):
        member = plain(model, i)
        alone = member(*(of_member(x, i) for x in inputs))
        torch.testing.assert_close(output[i], alone, rtol=1e-12, atol=1e-12)
        (alone * weights[i]).sum().backward()
        for ours, theirs in zip(stacked_parameters(model), parameters_of(member), strict=True):
            grad = ours.grad.to_dense()[i]
            torch.testing.assert_close(grad, theirs.grad, rtol=1e-11, atol=1e-12)


@sparse_or_dense
@pytest.mark.parametrize("shared", [False, True])
def test_gradient_of_the_numeric_columns(sparse, shared):
    model = make(dtype=torch.float64, sparse=sparse)
    categorical, numeric = data(each=(True, not shared))
    numeric.requires_grad_()
    model(categorical, numeric).square().sum().backward()
    expected = torch.zeros_like(numeric)
    for i in range(E):
        own = of_member(numeric.detach(), i).clone().requires_grad_()
        plain(model, i)(categorical[i], own).square().sum().backward()
        if shared:
            expected += own.grad
        else:
            expected[i] = own.grad
    torch.testing.assert_close(numeric.grad, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("each", list(itertools.product([False, True], repeat=2)), ids=str)
def test_sparse_has_the_bits_of_dense(dtype, each):
    dense, sparse = make(seeds=SEEDS, dtype=dtype), make(seeds=SEEDS, dtype=dtype, sparse=True)
    inputs = data(dtype=dtype, each=each)
    outputs = [model(*inputs) for model in (dense, sparse)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.float().square().sum().backward()
    for ours, theirs in zip(stacked_parameters(sparse), stacked_parameters(dense), strict=True):
        assert torch.equal(ours.grad.to_dense(), theirs.grad)
    assert all(embedding.weight.grad.is_sparse for embedding in sparse.embeddings)


def test_the_same_bits_whichever_members_are_beside():
    model, one = make(seeds=SEEDS), make(seeds=SEEDS).select([0])
    categorical, numeric = data(dtype=torch.float32, batch=300)
    output = model(categorical, numeric)
    output.square().sum().backward()
    for i, seed in enumerate(SEEDS):
        one.reset_parameters([seed])
        one.zero_grad()
        alone = one(categorical[i], numeric[i])
        assert torch.equal(alone[0], output[i])
        alone.square().sum().backward()
        for ours, theirs in zip(stacked_parameters(one), stacked_parameters(model), strict=True):
            assert torch.equal(ours.grad[0], theirs.grad[i])


def test_empty_batch():
    model = make()
    inputs = data(dtype=torch.float32, batch=0)
    output = model(*inputs)
    assert output.shape == (E, 0, OUT)
    output.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_autocast_and_compile():
    model = make()
    inputs = data(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(*inputs).dtype == torch.bfloat16


def test_functional_call():
    model, other = make(dtype=torch.float64), make(dtype=torch.float64)
    inputs = data()
    parameters = {name: p.detach() for name, p in other.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, parameters, inputs), other(*inputs))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, inputs).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    other(*inputs).square().sum().backward()
    for name, p in other.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)


# --- initialisation, state -----------------------------------------------------------------------


@columns
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_seed_gives_the_bits_of_a_plain_model(categorical, numeric, dtype, bias):
    before = torch.get_rng_state()
    model = make(categorical, numeric, dtype=dtype, bias=bias, seeds=SEEDS)
    assert torch.equal(torch.get_rng_state(), before)
    for i, seed in enumerate(SEEDS):
        torch.manual_seed(seed)
        member = Plain(categorical, numeric, bias=bias)
        for ours, theirs in zip(stacked_parameters(model), parameters_of(member), strict=True):
            assert torch.equal(ours[i], theirs.to(dtype))


def test_without_seeds_as_models_built_one_after_the_other():
    torch.manual_seed(3)
    members = [Plain() for _ in range(E)]
    after = torch.get_rng_state()
    torch.manual_seed(3)
    model = make()
    assert torch.equal(torch.get_rng_state(), after)
    for i, member in enumerate(members):
        for ours, theirs in zip(stacked_parameters(model), parameters_of(member), strict=True):
            assert torch.equal(ours[i], theirs)


def test_reset_parameters():
    model, expected = make(), make(seeds=SEEDS)
    own = list(model.parameters())
    model.reset_parameters(torch.tensor(SEEDS))
    for got, before, theirs in zip(model.parameters(), own, expected.parameters(), strict=True):
        assert got is before and torch.equal(got, theirs)
    for build in (lambda: model.reset_parameters([1, 2]), lambda: make(seeds=[1, 2])):
        with pytest.raises(ValueError, match="seeds: expected one for each of the 3 members, got 2"):
            build()
    on_meta = make(device="meta", seeds=SEEDS)
    assert all(p.is_meta for p in on_meta.parameters())
    with torch.device("meta"):
        assert all(p.is_meta for p in make().parameters())
        here = make(device="cpu", seeds=SEEDS)
    assert torch.equal(here.mlp.weights[0], expected.mlp.weights[0])


def test_state_dict_and_repr():
    model = make(dropout=0.5)
    names = [f"embeddings.{t}.weight" for t in range(4)]
    names += [f"mlp.{kind}.{layer}" for kind in ("weights", "biases") for layer in range(3)]
    assert list(model.state_dict()) == names
    other = make()
    other.load_state_dict(model.state_dict())
    inputs = data(dtype=torch.float32)
    assert torch.equal(other(*inputs), model.eval()(*inputs))
    assert isinstance(model.mlp, EnsembleMLP) and model.mlp.in_features == 24 + NUMERIC
    assert model.extra_repr() == (
        "ensemble_size=3, numeric_features=4, dropout=0.5, embedding_std=1.0, sparse=False"
    )


@pytest.mark.parametrize("indices", [[2, 0], slice(1, None), torch.tensor([False, True, False])])
def test_select(indices):
    model = make(dropout=0.25, seeds=SEEDS, embedding_std=0.1).eval()
    chosen = model.select(indices)
    inputs = data(dtype=torch.float32)
    shared = [t if t is None or t.dim() == 2 else t[0] for t in inputs]
    assert torch.equal(chosen(*shared), model(*shared)[indices])
    assert not chosen.training and chosen.dropout == 0.25 and chosen.embedding_std == 0.1
    with torch.no_grad():
        for parameter in chosen.parameters():
            parameter.add_(1)  # copies
    assert torch.equal(model.mlp.weights[0], make(seeds=SEEDS).mlp.weights[0])
    with pytest.raises(ValueError, match="select: indices: expected at least one member"):
        model.select([])


def test_embedding_std_scales_the_tables_alone():
    model, plain = make(seeds=SEEDS, embedding_std=0.25), make(seeds=SEEDS)
    for one, other in zip(model.embeddings, plain.embeddings, strict=True):
        assert torch.equal(one.weight, other.weight * 0.25)
    for one, other in zip(model.mlp.parameters(), plain.mlp.parameters(), strict=True):
        assert torch.equal(one, other)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="TabularEnsemble: embedding_std: expected a positive number"):
            make(embedding_std=bad)


# --- dropout -------------------------------------------------------------------------------------


def test_dropout_is_for_training():
    model = make(dropout=0.5)
    inputs = data(dtype=torch.float32)
    assert not torch.equal(model(*inputs), model(*inputs))
    without = make()
    without.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(*inputs), without(*inputs))
    assert torch.equal(without(*inputs, dropout_seeds=torch.arange(E)), without(*inputs))


def test_dropout_is_that_of_the_operation():
    inputs, seeds = data([], NUMERIC, dtype=torch.float32), torch.tensor([5, 6, 7])
    model = make([], NUMERIC, dropout=0.5)
    expected = ops.ensemble_mlp(
        inputs[1],
        list(model.mlp.weights),
        list(model.mlp.biases),
        activation="tanh",
        dropout=0.5,
        dropout_seeds=seeds,
    )
    for module in (model.train(), model.eval()):
        got = module(*inputs, dropout_seeds=seeds)
        assert torch.equal(got, expected) and not torch.equal(got, module.eval()(*inputs))


# --- loss ----------------------------------------------------------------------------------------


@sparse_or_dense
@pytest.mark.parametrize("each", list(itertools.product([False, True], repeat=2)), ids=str)
def test_loss_is_that_of_the_outputs(sparse, each):
    model = make(dtype=torch.float64, sparse=sparse)
    inputs = data(each=each)
    target = torch.randn(E, B, OUT, dtype=torch.float64)
    losses = model.loss(*inputs, target, loss="mse")
    expected = (model(*inputs) - target).square().mean((1, 2))
    assert losses.shape == (E,)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    parameters = stacked_parameters(model)
    scale = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for got, theirs in zip(
        torch.autograd.grad((losses * scale).sum(), parameters),
        torch.autograd.grad((expected * scale).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(got.to_dense(), theirs.to_dense(), rtol=1e-11, atol=1e-13)


@sparse_or_dense
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("own_weights", [False, True])
def test_a_row_of_weight_zero_may_have_an_unseen_category(sparse, each, own_weights):
    model = make(dtype=torch.float64, sparse=sparse)
    categorical, numeric = data(each=(each, each))
    target = torch.randn(E, B, OUT, dtype=torch.float64)
    weight = torch.rand(E, B, dtype=torch.float64) if own_weights else torch.rand(B, dtype=torch.float64)
    weight[..., 1:3] = 0
    expected = model.loss(categorical, numeric, target, loss="mse", sample_weight=weight)
    gradients = torch.autograd.grad(expected.sum(), stacked_parameters(model))
    unseen = categorical.clone()
    unseen[..., 1, :], unseen[..., 2, 0] = 10**6, -1
    got = model.loss(unseen, numeric, target, loss="mse", sample_weight=weight)
    assert torch.equal(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), stacked_parameters(model)), gradients, strict=True
    ):
        torch.testing.assert_close(ours.to_dense(), theirs.to_dense(), rtol=0, atol=0)
    weight[(0, 1) if own_weights else 1] = 1  # of the first member alone
    with pytest.raises(ValueError, match=r"out of range|expected .* got"):
        model.loss(unseen, numeric, target, loss="mse", sample_weight=weight)


def test_loss_passes_its_arguments_on():
    model = make(dtype=torch.float64)
    inputs, classes = data(), torch.randint(OUT, (E, B))
    weight = torch.rand(E, B, dtype=torch.float64)
    got = model.loss(
        *inputs, classes, loss="cross_entropy", temperature=0.2, label_smoothing=0.3, sample_weight=weight
    )
    logits = model(*inputs) / 0.2
    each = F.cross_entropy(
        logits.flatten(0, 1), classes.flatten(), reduction="none", label_smoothing=0.3
    ).view(E, B)
    torch.testing.assert_close(got, (each * weight).sum(1) / weight.sum(1), rtol=1e-12, atol=1e-12)


def test_loss_with_dropout_is_that_of_the_outputs_with_it():
    model = make(dropout=0.3, dtype=torch.float64)
    inputs, target, seeds = data(), torch.randn(B, OUT, dtype=torch.float64), torch.tensor([5, 6, 7])
    got = model.loss(*inputs, target, loss="mse", dropout_seeds=seeds)
    expected = (model(*inputs, dropout_seeds=seeds) - target).square().mean((1, 2))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(got, model.eval().loss(*inputs, target, loss="mse"))


def test_loss_trains():
    model = TabularEnsemble(E, CATEGORICAL, NUMERIC, [16], 1, seeds=SEEDS)
    categorical, numeric = data(dtype=torch.float32, each=(False, False), batch=200)
    target = numeric[:, :1] + (categorical[:, 2:3] > 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, foreach=False)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(categorical, numeric, target, loss="mse")
        loss.sum().backward()
        optimizer.step()
        losses.append(loss.detach())
    assert (losses[-1] < 0.2 * losses[0]).all()


def test_loss_trains_to_the_same_bits_whichever_members_are_beside():
    def trained(model: TabularEnsemble, members: list[int]) -> list[Tensor]:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, foreach=False)
        for categorical, numeric, target in batches:
            optimizer.zero_grad()
            model.loss(categorical[members], numeric[members], target[members], loss="mse").sum().backward()
            optimizer.step()
        return stacked_parameters(model)

    batches = [(*data(dtype=torch.float32), torch.randn(E, B, OUT)) for _ in range(5)]
    together = trained(make(seeds=SEEDS), [0, 1, 2])
    for i in range(E):
        model = make(seeds=SEEDS).select([i])
        for ours, theirs in zip(trained(model, [i]), together, strict=True):
            assert torch.equal(ours[0], theirs[i])


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make([(0, 3)]), r"categorical\[0\]\[0\]: expected a positive integer, got 0"),
        (lambda: make([(4, 3), (3, -1)]), r"categorical\[1\]\[1\]: expected a positive integer, got -1"),
        (lambda: make(numeric=-1), r"numeric_features: expected an integer from 0, got -1"),
        (lambda: make(numeric=2.0), r"numeric_features: expected an integer from 0, got 2\.0"),
        (lambda: make([], 0), r"numeric_features: expected 1 or more without categorical, got 0"),
        (lambda: make(dropout=1.0), r"dropout: expected 0 <= dropout < 1, got 1\.0"),
        (lambda: make(dropout=-0.1), r"dropout: expected 0 <= dropout < 1, got -0\.1"),
    ],
)
def test_bad_sizes(build, message):
    with pytest.raises(ValueError, match="^(TabularEnsemble|EnsembleMLP): " + message):
        build()


def test_sizes_of_the_mlp_are_its_own():
    with pytest.raises(ValueError, match=r"EnsembleMLP: hidden_features\[0\]: expected .*, got 0"):
        TabularEnsemble(2, CATEGORICAL, 1, [0], 1)
    with pytest.raises(ValueError, match="activation: expected one of relu"):
        make(activation="swish")


@sparse_or_dense
def test_forward_refuses_what_does_not_fit(sparse):
    model = make(sparse=sparse)
    x, y = data(dtype=torch.float32, each=(False, False))
    columns = r"expected \[B, 4\] or \[3, B, 4\], got "
    for inputs, message in [
        ((None, y), "categorical: " + columns + "None"),
        ((x, None), "numeric: " + columns + "None"),
        ((x[:, :3], y), "categorical: " + columns + r"shape \[40, 3\]"),
        ((x, y[:, :3]), "numeric: " + columns + r"shape \[40, 3\]"),
        ((x[0], y), "categorical: " + columns + r"shape \[4\]"),
        ((x.expand(2, B, 4), y), "categorical: " + columns + r"shape \[2, 40, 4\]"),
        ((x, y.expand(2, B, 4)), "numeric: " + columns + r"shape \[2, 40, 4\]"),
        ((x, y[:1]), r"numeric: expected the 40 examples of categorical, got shape \[1, 4\]"),
    ]:
        for call in (
            lambda inputs=inputs: model(*inputs),
            lambda inputs=inputs: model.loss(*inputs, torch.zeros(B, OUT), loss="mse"),
        ):
            with pytest.raises(ValueError, match="^(TabularEnsemble|EnsembleMLP): " + message):
                call()
    with pytest.raises(ValueError, match=r"expected 0 to 6, got 9"):
        model(x + torch.tensor([0, 0, 9, 0]) * (x[:, 2:3] == 0), y)
    for wrong in ((x.int(), y), (x, y.double())):
        with pytest.raises(TypeError, match=r"expected int64|expected the dtype"):
            model(*wrong)
    with pytest.raises(ValueError, match=r"TabularEnsemble: categorical: expected None, got shape \[40, 4\]"):
        make([], NUMERIC)(x, y)
    with pytest.raises(ValueError, match=r"TabularEnsemble: numeric: expected None, got shape \[40, 4\]"):
        make(CATEGORICAL, 0)(x, y)
