"""pyens.EnsembleEmbedding: what it computes, keeps and learns, with dense and with sparse gradients."""

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from nn_models import assert_same_state, dtypes
from torch import Tensor, nn
from torch.nn.utils import prune

import pyens
from pyens import EnsembleEmbedding

SEEDS = [7, 0, 123456789, 7]
both = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])


def make(**kwargs) -> EnsembleEmbedding:
    return EnsembleEmbedding(4, 50, 3, **kwargs)


def batches(steps: int = 6) -> list[Tensor]:
    """Few enough rows in each for most to be left out of most."""
    return [torch.randint(50, (4, 9)) for _ in range(steps)]


def train(
    model: nn.Module,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    indices: list[Tensor],
    weights: Tensor,
) -> nn.Module:
    opt = optimizer(model.parameters())
    for index in indices:
        opt.zero_grad()
        (model(index) * weights).square().sum().backward()
        opt.step()
    return model


# --- forward -------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("b", [0, 1, 40])
def test_forward_is_that_of_the_members(sparse, b):
    model = make(sparse=sparse)
    shared, each = torch.randint(50, (b,)), torch.randint(50, (4, b))
    assert model(shared).shape == model(each).shape == (4, b, 3)
    for i, module in enumerate(model.to_modules()):
        assert torch.equal(model(shared)[i], module(shared))
        assert torch.equal(model(each)[i], module(each[i]))


def test_attributes_and_repr():
    model = make(dtype=torch.float16, sparse=True)
    assert (model.ensemble_size, model.num_embeddings, model.embedding_dim) == (4, 50, 3)
    assert list(model.state_dict()) == ["weight"] and model.weight.shape == (4, 50, 3)
    assert model.weight.dtype == torch.float16 and model.weight.requires_grad
    assert repr(model) == (
        "EnsembleEmbedding(ensemble_size=4, num_embeddings=50, embedding_dim=3, sparse=True)"
    )
    assert make(device="meta", seeds=SEEDS).weight.is_meta
    assert pyens.nn.EnsembleEmbedding is pyens.EnsembleEmbedding
    assert not hasattr(model, "packed")


@pytest.mark.parametrize("argument", ["ensemble_size", "num_embeddings", "embedding_dim"])
def test_bad_sizes(argument):
    sizes = {"ensemble_size": 2, "num_embeddings": 3, "embedding_dim": 4}
    for wrong in (0, -1, 2.0, "3"):
        message = rf"^EnsembleEmbedding: {argument}: expected a positive integer, got {wrong!r}"
        with pytest.raises(ValueError, match=message):
            EnsembleEmbedding(**{**sizes, argument: wrong})


def test_forward_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="ensemble_embedding: index: expected 0 to 49, got 50"):
        make()(torch.tensor([0, 50]))
    with pytest.raises(ValueError, match=r"ensemble_embedding: index: expected \[B\] or \[4, B\]"):
        make()(torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(TypeError, match="ensemble_embedding: index: expected int64, got Int"):
        make()(torch.tensor([0], dtype=torch.int32))


# --- initialisation ------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("size", [(50, 3), (5, 1), (3, 7)], ids=str)
def test_a_seed_gives_the_bits_of_torch(dtype, size):
    model = EnsembleEmbedding(4, *size, dtype=dtype, seeds=SEEDS)
    for i, seed in enumerate(SEEDS):
        torch.manual_seed(seed)
        assert torch.equal(model.weight[i], nn.Embedding(*size).weight.to(dtype))


def test_without_seeds_as_modules_built_one_after_the_other():
    torch.manual_seed(3)
    members = [nn.Embedding(50, 3) for _ in range(4)]
    after = torch.get_rng_state()
    torch.manual_seed(3)
    model = make()
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(model.weight[i], member.weight) for i, member in enumerate(members))
    weight = model.weight
    model.reset_parameters(torch.tensor(SEEDS))
    assert model.weight is weight and torch.equal(weight, make(seeds=SEEDS).weight)
    with pytest.raises(ValueError, match="reset_parameters: seeds: expected one for each of the 4 members"):
        make(seeds=[1, 2])


# --- members -------------------------------------------------------------------------------------


@dtypes
@both
def test_there_and_back(dtype, sparse):
    model = make(dtype=dtype, sparse=sparse).eval()
    members = model.to_modules()
    assert all(type(member) is nn.Embedding and member.sparse == sparse for member in members)
    again = EnsembleEmbedding.from_modules(members)
    assert_same_state(again, model)
    assert repr(again) == repr(model) and again.training == model.training
    with torch.no_grad():
        members[1].weight.zero_()
    assert torch.equal(again.weight, model.weight)
    chosen = model.select([2, 0])
    assert torch.equal(chosen.weight, model.weight[[2, 0]]) and chosen.sparse == sparse
    assert torch.equal(model.member(-1).weight, model.weight[3])
    with pytest.raises(IndexError, match="member: i: expected below 4, got 4"):
        model.member(4)


def test_load_stacked():
    members = [nn.Embedding(50, 3) for _ in range(4)]
    params, _ = torch.func.stack_module_state(members)
    model = make()
    model.load_stacked(params)
    assert torch.equal(model.weight, torch.stack([member.weight for member in members]))
    with pytest.raises(ValueError, match=r"load_stacked: params: expected weight tensors of shapes"):
        model.load_stacked({"weight": torch.randn(4, 50, 2)})
    with pytest.raises(ValueError, match=r"load_stacked: params: expected bias tensors of shapes \[\]"):
        model.load_stacked({**params, "bias": torch.randn(4, 3)})


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(3, 50), r"expected nn\.Embedding, got Linear"),
        (nn.EmbeddingBag(50, 3), r"expected nn\.Embedding, got EmbeddingBag"),
        (nn.Embedding(50, 3, padding_idx=0), r"expected padding_idx=None, got 0"),
        (nn.Embedding(50, 3, max_norm=1.0), r"expected max_norm=None, got 1\.0"),
        (nn.Embedding(50, 3, scale_grad_by_freq=True), r"expected scale_grad_by_freq=False, got True"),
        (nn.Embedding(50, 3, sparse=True), r"expected .*sparse=False like modules\[0\], got .*sparse=True"),
        (nn.Embedding(50, 4), r"expected \[50, 3\], .* like modules\[0\], got \[50, 4\]"),
        (nn.Embedding(50, 3).double(), r"expected .*float32.*, got .*float64"),
        (
            prune.identity(nn.Embedding(50, 3), "weight"),
            r"expected a weight that is a parameter, got one computed from others",
        ),
    ],
)
def test_from_modules_refuses_by_name(module, message):
    with pytest.raises(ValueError, match=r"^from_modules: modules\[1\]: " + message):
        EnsembleEmbedding.from_modules([nn.Embedding(50, 3), module])


def test_from_no_modules():
    with pytest.raises(ValueError, match="from_modules: modules: expected at least one, got none"):
        EnsembleEmbedding.from_modules([])


# --- training ------------------------------------------------------------------------------------

DENSE = {
    "Adam": lambda p: torch.optim.Adam(p, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
}
SPARSE = {
    "SparseAdam": lambda p: torch.optim.SparseAdam(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}
CASES = [(False, name) for name in DENSE] + [(True, name) for name in SPARSE]


# torch.optim.Adagrad makes sparse tensors without saying whether they are to be checked.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize(("sparse", "name"), CASES)
def test_trains_as_the_members_do_alone(sparse, name):
    optimizer = (SPARSE if sparse else DENSE)[name]
    model = make(sparse=sparse, seeds=SEEDS, dtype=torch.float64)
    before = model.weight.detach().clone()
    members = model.to_modules()
    indices, weights = batches(), torch.randn(4, 9, 3, dtype=torch.float64)
    train(model, optimizer, indices, weights)
    for i, member in enumerate(members):
        train(member, optimizer, [index[i] for index in indices], weights[i])
        torch.testing.assert_close(model.weight[i], member.weight, rtol=1e-12, atol=1e-12)
        assert not torch.equal(model.weight[i], before[i])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize(("sparse", "name"), CASES)
def test_trains_to_the_same_bits_whichever_members_are_beside(sparse, name):
    optimizer = (SPARSE if sparse else DENSE)[name]
    model = make(sparse=sparse, seeds=SEEDS)
    some = model.select([2, 1])
    indices, weights = batches(), torch.randn(4, 9, 3)
    train(model, optimizer, indices, weights)
    train(some, optimizer, [index[[2, 1]] for index in indices], weights[[2, 1]])
    assert torch.equal(some.weight, model.weight[[2, 1]])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("name", ["Adagrad", "SGD", "SGD with momentum"])
def test_sparse_trains_as_dense_where_the_docstring_says_so(name):
    indices, weights = batches(), torch.randn(4, 9, 3)
    dense, sparse = make(seeds=SEEDS), make(seeds=SEEDS, sparse=True)
    train(dense, SPARSE[name], indices, weights)
    train(sparse, SPARSE[name], indices, weights)
    torch.testing.assert_close(sparse.weight, dense.weight, rtol=1e-6, atol=1e-7)


def test_sparse_adam_leaves_alone_what_was_not_looked_up():
    indices, weights = [torch.tensor([1, 2, 3]), torch.tensor([4])], torch.randn(4, 1, 3)
    dense, sparse = make(seeds=SEEDS), make(seeds=SEEDS, sparse=True)
    first = train(copy.deepcopy(sparse), SPARSE["SparseAdam"], indices[:1], weights)
    train(sparse, SPARSE["SparseAdam"], indices, weights)
    train(dense, DENSE["Adam"], indices, weights)
    assert torch.equal(sparse.weight[:, 1:4], first.weight[:, 1:4])  # only 4 was looked up since then
    assert not torch.equal(dense.weight[:, 1:4], first.weight[:, 1:4])  # moves on by its momentum
    torch.testing.assert_close(sparse.weight[:, 4], dense.weight[:, 4])


def test_what_sparse_gradients_do_not_go_with():
    index, weights = [torch.tensor([1, 2])], torch.ones(1)
    for optimizer in (
        lambda p: torch.optim.Adam(p),
        lambda p: torch.optim.Adagrad(p, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
        lambda p: torch.optim.Adagrad(p, fused=True),
    ):
        with pytest.raises(RuntimeError, match="sparse"):
            train(make(sparse=True), optimizer, index, weights)


def test_functional_call_and_compile():
    model, other = make(), make()
    index = torch.randint(50, (4, 9))
    parameters = {"weight": other.weight.detach()}
    assert torch.equal(torch.func.functional_call(model, parameters, index), other(index))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, index).square().sum()

    other(index).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(loss)(parameters)["weight"], other.weight.grad)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(index), model(index))
