"""pyens.ops.ensemble_embedding and its concatenation against their reference, and their promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pyens import reference
from pyens.ops import ensemble_embedding
from pyens.ops.ensemble_embedding import ensemble_embedding_concat
from pyens.reference.ensemble_embedding import ensemble_embedding_concat as reference_concat

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# E, B, N, D: the widths that are compiled in, those beside them, tiles of 64 examples +- 1, and tables that
# the backward cuts into ranges: for few members, and for their size.
SHAPES = [
    (1, 1, 1, 1),
    (3, 5, 4, 2),
    (2, 63, 7, 3),
    (4, 64, 9, 4),
    (2, 65, 21, 5),
    (1, 130, 10, 6),
    (3, 33, 3, 7),
    (20, 40, 100, 8),
    (2, 17, 5, 9),
    (2, 9, 6, 16),
    (2, 8, 3, 33),
    (1, 300, 5000, 8),
    (17, 70, 40_000, 4),
    (2, 3, 2, 150_000),
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
both = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
indexed = pytest.mark.parametrize("per_member", [False, True], ids=["shared", "per member"])


def problem(e: int, b: int, n: int, d: int, dtype: torch.dtype, per_member: bool) -> tuple[Tensor, Tensor]:
    index = torch.randint(n, (e, b) if per_member else (b,))
    return index, torch.randn(e, n, d, dtype=torch.float64).to(dtype)


def gradient(index: Tensor, weight: Tensor, grad: Tensor, sparse: bool = False) -> Tensor:
    weight = weight.detach().requires_grad_()
    return torch.autograd.grad(ensemble_embedding(index, weight, sparse=sparse), weight, grad)[0]


def exact_gradient(index: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    weight = weight.detach().double().requires_grad_()
    return torch.autograd.grad(reference.ensemble_embedding(index, weight), weight, grad.double())[0]


def features(
    e: int, b: int, f: int, dtype: torch.dtype, per_member: bool = True
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Columns like those of MovieLens, and f numeric ones."""
    sizes = [(60, 8), (38, 8), (7, 3), (21, 5)]
    leading = [e, b] if per_member else [b]
    categorical = torch.stack([torch.randint(n, leading) for n, _ in sizes], -1)
    tables = [torch.randn(e, n, d, dtype=torch.float64).to(dtype) for n, d in sizes]
    return categorical, tables, torch.randn(*leading, f, dtype=torch.float64).to(dtype)


# --- values ------------------------------------------------------------------------------------------------


@dtypes
@shapes
@indexed
def test_has_the_bits_of_the_table(shape, dtype, per_member):
    index, weight = problem(*shape, dtype, per_member)
    got = ensemble_embedding(index, weight)
    assert got.is_contiguous() and torch.equal(got, reference.ensemble_embedding(index, weight))
    for m in range(shape[0]):
        rows = index[m] if per_member else index
        assert torch.equal(got[m], nn.functional.embedding(rows, weight[m]))


@dtypes
@shapes
@indexed
def test_gradient_is_rounded_once(shape, dtype, per_member):
    index, weight = problem(*shape, dtype, per_member)
    grad = torch.randn(shape[0], shape[1], shape[3], dtype=torch.float64).to(dtype)
    got, exact = gradient(index, weight, grad), exact_gradient(index, weight, grad)
    assert got.dtype == dtype and got.is_contiguous()
    if dtype.itemsize == 2:
        # float32 sums of up to 300 terms are off by less than what can move the rounding by one.
        assert ((got.double() - exact).abs() <= torch.finfo(dtype).eps * (0.51 * exact.abs() + 1e-3)).all()
    else:
        # In ascending b from 0: the very sums of index_add_, one member at a time.
        rows = index.expand(shape[0], -1)
        for m in range(shape[0]):
            sums = torch.zeros_like(weight[m])
            for b in range(shape[1]):
                sums[rows[m, b]] += grad[m, b]
            assert torch.equal(got[m], sums)


@dtypes
@shapes
@indexed
def test_sparse_gradient_has_the_bits_of_the_dense_one(shape, dtype, per_member):
    e, b, n, d = shape
    index, weight = problem(*shape, dtype, per_member)
    grad = torch.randn(e, b, d, dtype=torch.float64).to(dtype)
    got = gradient(index, weight, grad, sparse=True)
    assert got.layout == torch.sparse_coo and got.is_coalesced() and got.dtype == dtype
    assert got.shape == (e, n, d) and got.sparse_dim() == 2
    expected = [(m, r) for m in range(e) for r in sorted(set(index.expand(e, -1)[m].tolist()))]
    assert got.indices().T.tolist() == [list(pair) for pair in expected]
    assert torch.equal(got.to_dense(), gradient(index, weight, grad))


@dtypes
@pytest.mark.parametrize("f", [0, 1, 19])
@indexed
def test_concat_is_what_the_parts_are(dtype, f, per_member):
    categorical, tables, numeric = features(5, 70, f, dtype, per_member)
    for numbers in (numeric, numeric if per_member else numeric.expand(5, -1, -1), None):
        got = ensemble_embedding_concat(categorical, tables, numbers)
        assert got.is_contiguous() and torch.equal(got, reference_concat(categorical, tables, numbers))


@dtypes
@pytest.mark.parametrize("shared_numeric", [False, True])
@indexed
def test_concat_gradients_are_those_of_the_parts(dtype, per_member, shared_numeric):
    categorical, tables, numeric = features(5, 70, 19, dtype, per_member)
    numeric = numeric.reshape(-1, 70, 19)[0] if shared_numeric else numeric.expand(5, -1, -1).clone()
    grad = torch.randn(5, 70, 43, dtype=torch.float64).to(dtype)
    leaves = [t.requires_grad_() for t in (*tables, numeric)]
    output = ensemble_embedding_concat(categorical, leaves[:-1], leaves[-1])
    got = torch.autograd.grad(output, leaves, grad)
    offset = 0
    for t, table in enumerate(tables):
        columns = grad[..., offset : offset + table.shape[2]]
        assert torch.equal(got[t], gradient(categorical[..., t], table, columns))
        offset += table.shape[2]
    if shared_numeric:
        total = torch.zeros(70, 19, dtype=torch.promote_types(dtype, torch.float32))
        for m in range(5):
            total += grad[m, :, offset:]
        assert torch.equal(got[-1], total.to(dtype))
    else:
        assert torch.equal(got[-1], grad[..., offset:])


@both
def test_empty_batch(sparse):
    for shape in ((0,), (3, 0)):
        index, weight = torch.empty(shape, dtype=torch.long), torch.randn(3, 4, 5)
        assert ensemble_embedding(index, weight, sparse=sparse).shape == (3, 0, 5)
        got = gradient(index, weight, torch.empty(3, 0, 5), sparse)
        assert torch.equal(got.to_dense(), torch.zeros(3, 4, 5))
    categorical, tables, numeric = features(3, 0, 2, torch.float32)
    leaves = [t.requires_grad_() for t in (*tables, numeric)]
    output = ensemble_embedding_concat(categorical, leaves[:-1], leaves[-1])
    assert output.shape == (3, 0, 26)
    for got, leaf in zip(torch.autograd.grad(output.sum(), leaves), leaves, strict=True):
        assert torch.equal(got, torch.zeros_like(leaf))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_expanded_and_misaligned(dtype, sparse):
    index, weight = problem(4, 50, 9, 5, dtype, True)
    grad = torch.randn(4, 50, 5).to(dtype)
    output, expected = ensemble_embedding(index, weight), gradient(index, weight, grad)

    def misaligned(t: Tensor) -> Tensor:
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    def transposed(t: Tensor) -> Tensor:  # last dimension not contiguous
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)

    def padded(t: Tensor) -> Tensor:  # rows with gaps
        return torch.cat([t, torch.full_like(t, 99)], -1)[..., : t.shape[-1]]

    for change in (misaligned, transposed, padded):
        assert torch.equal(ensemble_embedding(change(index), change(weight)), output)
        got = gradient(change(index), change(weight), change(grad), sparse)
        assert torch.equal(got.to_dense(), expected)
        columns = [change(index), change(index)]
        both = ensemble_embedding_concat(torch.stack(columns, -1), [change(weight), weight], change(output))
        assert torch.equal(both, torch.cat([output] * 3, -1))
    shared = ensemble_embedding(index[0], weight)
    assert torch.equal(ensemble_embedding(index[0].expand(4, -1), weight), shared)
    assert torch.equal(
        ensemble_embedding(index[0], weight[:1].expand(4, -1, -1)), shared[:1].expand(4, -1, -1)
    )
    ones = torch.ones(1, 1, 1, dtype=dtype).expand(4, 50, 5)
    got = gradient(index, weight, ones, sparse)
    assert torch.equal(got.to_dense(), gradient(index, weight, ones.contiguous()))


def test_nan_stays_where_it_is():
    index, weight = problem(3, 40, 6, 4, torch.float32, True)
    weight[1, 2, 3] = float("nan")
    wrong = ensemble_embedding(index, weight).isnan()
    assert torch.equal(wrong[1, :, 3], index[1] == 2) and wrong.sum() == (index[1] == 2).sum()
    grad = torch.randn(3, 40, 4)
    grad[2, 7, 0] = float("inf")
    for sparse in (False, True):
        got = gradient(index, weight, grad, sparse).to_dense().isfinite().logical_not()
        assert got.nonzero().tolist() == [[2, index[2, 7].item(), 0]]


@dtypes
@both
def test_nan_and_inf_as_in_torch(dtype, sparse):
    index, weight = problem(3, 40, 6, 4, dtype, True)
    inf, large = float("inf"), torch.finfo(dtype).max
    weight[1, 2] = torch.tensor([inf, -inf, float("nan"), large], dtype=dtype)
    expected = reference.ensemble_embedding(index, weight)
    assert torch.equal(ensemble_embedding(index, weight).nan_to_num(7.0), expected.nan_to_num(7.0))
    index[2] = 1
    index[2, :2] = 3
    grad = torch.randn(3, 40, 4, dtype=torch.float64).to(dtype)
    # inf + inf, inf - inf, a sum that overflows, and -inf.
    grad[2, :2] = torch.tensor([[inf, inf, large, -inf], [inf, -inf, large, 1.0]], dtype=dtype)
    exact = exact_gradient(index, weight, grad).to(dtype)
    assert exact[2, 3].isinf().tolist() == [True, False, True, True] and exact[2, 3, 1].isnan()
    got = gradient(index, weight, grad, sparse).to_dense()
    torch.testing.assert_close(got, exact, equal_nan=True, rtol=0.05, atol=0.1)


# --- the same bits -----------------------------------------------------------------------------------------


@dtypes
@both
@pytest.mark.parametrize("shape", [(1, 5000, 3000, 8), (7, 2000, 500, 5), (40, 500, 60, 3)], ids=str)
def test_same_bits_for_any_number_of_threads(dtype, sparse, shape):
    index, weight = problem(*shape, dtype, True)
    grad = torch.randn(shape[0], shape[1], shape[3]).to(dtype)
    categorical, tables, numeric = features(shape[0], shape[1], 1, dtype)
    leaves = [*(t.requires_grad_() for t in tables), numeric[0].requires_grad_()]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            output = ensemble_embedding_concat(categorical, leaves[:-1], leaves[-1])
            results.append(
                [
                    ensemble_embedding(index, weight),
                    gradient(index, weight, grad, sparse).to_dense(),
                    output,
                    *torch.autograd.grad(output, leaves, output.detach()),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for result in results:
        assert all(torch.equal(got, first) for got, first in zip(result, results[0], strict=True))


@dtypes
@both
def test_same_bits_for_any_members_beside(dtype, sparse):
    index, weight = problem(30, 200, 50, 5, dtype, True)
    grad = torch.randn(30, 200, 5).to(dtype)
    output = ensemble_embedding(index, weight)
    whole = gradient(index, weight, grad, sparse).to_dense()
    for members in (slice(0, 1), slice(4, 5), slice(2, 30)):
        assert torch.equal(ensemble_embedding(index[members], weight[members]), output[members])
        part = gradient(index[members], weight[members], grad[members], sparse)
        assert torch.equal(part.to_dense(), whole[members])


@given(
    e=st.integers(1, 20),
    b=st.integers(0, 80),
    n=st.integers(1, 30),
    d=st.integers(1, 20),
    sparse=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_permuting_members_permutes_all(e, b, n, d, sparse, seed):
    torch.manual_seed(seed)
    index, weight = problem(e, b, n, d, torch.float32, True)
    grad, order = torch.randn(e, b, d), torch.randperm(e)
    output = ensemble_embedding(index, weight)
    assert torch.equal(ensemble_embedding(index[order], weight[order]), output[order])
    whole = gradient(index, weight, grad, sparse).to_dense()
    part = gradient(index[order], weight[order], grad[order], sparse).to_dense()
    assert torch.equal(part, whole[order])


# --- gradients ---------------------------------------------------------------------------------------------


@indexed
def test_gradcheck(per_member):
    index, weight = problem(3, 7, 4, 3, torch.float64, per_member)
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: ensemble_embedding(index, w), weight)
    assert torch.autograd.gradgradcheck(lambda w: ensemble_embedding(index, w), weight)


@pytest.mark.parametrize("numeric", ["shared", "per member", "none"])
@indexed
def test_gradcheck_concat(per_member, numeric):
    categorical = torch.stack([torch.randint(n, (2, 4) if per_member else (4,)) for n in (3, 5)], -1)
    leaves = [torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(2, 5, 1, dtype=torch.float64)]
    if numeric != "none":
        leaves.append(torch.randn(*([4] if numeric == "shared" else [2, 4]), 3, dtype=torch.float64))

    def function(*leaves: Tensor) -> Tensor:
        return ensemble_embedding_concat(categorical, leaves[:2], leaves[2] if len(leaves) > 2 else None)

    for needs_grad in ([True] * len(leaves), [False, True, False][: len(leaves)]):
        inputs = [t.detach().requires_grad_(r) for t, r in zip(leaves, needs_grad, strict=True)]
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
        got = function(*inputs).sum()
        got.backward()
        assert [t.grad is not None for t in inputs] == needs_grad


def test_sparse_gradient_has_no_derivative():
    index, weight = problem(2, 5, 4, 3, torch.float64, True)
    weight.requires_grad_()
    output = ensemble_embedding(index, weight, sparse=True).square().sum()
    (grad,) = torch.autograd.grad(output, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="ensemble_embedding_sparse_backward"):
        grad.to_dense().sum().backward()


def test_gradients_accumulate():
    index, weight = problem(2, 9, 4, 3, torch.float64, True)
    expected = 2 * gradient(index, weight, torch.ones(2, 9, 3, dtype=torch.float64))
    for kinds in ((False, False), (True, True), (True, False), (False, True)):
        leaf = weight.detach().requires_grad_()
        for sparse in kinds:
            ensemble_embedding(index, leaf, sparse=sparse).sum().backward()
        assert torch.equal(leaf.grad.to_dense(), expected)


# --- the dispatcher ----------------------------------------------------------------------------------------


@indexed
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(per_member, requires_grad):
    ops = torch.ops.pyens
    index, weight = problem(3, 5, 4, 6, torch.float32, per_member)
    grad = torch.randn(3, 5, 6, requires_grad=requires_grad)
    torch.library.opcheck(ops.ensemble_embedding, (index, weight.requires_grad_(requires_grad), False))
    torch.library.opcheck(ops.ensemble_embedding_backward, (grad, index, 4))
    categorical, tables, numeric = features(3, 5, 2, torch.float32, per_member)
    leaves = [t.requires_grad_(requires_grad) for t in (*tables, numeric)]
    torch.library.opcheck(ops.ensemble_embedding_concat, (categorical, leaves[:-1], leaves[-1]))
    torch.library.opcheck(ops.ensemble_embedding_concat, (categorical, leaves[:-1], None))
    grad = torch.randn(3, 5, 26, requires_grad=requires_grad)
    sizes = [60, 38, 7, 21], [8, 8, 3, 5]
    for needs_grad, shared in (([0, 1, 2, 3], False), ([1, 4], True), ([4], False)):
        torch.library.opcheck(
            ops.ensemble_embedding_concat_backward, (grad, categorical, *sizes, needs_grad, shared)
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@indexed
def test_compile_without_graph_breaks_or_many_recompilations(backend, per_member):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    _, tables, _ = features(3, 1, 2, torch.float32)
    leaves = [t.requires_grad_() for t in tables]

    def function(categorical: Tensor, numeric: Tensor, *tables: Tensor) -> Tensor:
        single = ensemble_embedding(categorical[..., 0], tables[0])
        return torch.cat([single, ensemble_embedding_concat(categorical, tables, numeric)], -1).square()

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for b in (5, 7, 12, 64):
        categorical, _, numeric = features(3, b, 2, torch.float32, per_member)
        got, expected = compiled(categorical, numeric, *leaves), function(categorical, numeric, *leaves)
        assert torch.equal(got, expected)
        for ours, theirs in zip(
            torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count <= 2  # one for the first size, one for all others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_dtype_alone(dtype):
    index, weight = problem(2, 5, 4, 3, dtype, True)
    categorical, tables, numeric = features(2, 5, 2, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert ensemble_embedding(index, weight).dtype == dtype
        assert nn.functional.embedding(index[0], weight[0]).dtype == dtype
        assert ensemble_embedding_concat(categorical, tables, numeric).dtype == dtype


# --- torch.func --------------------------------------------------------------------------------------------


def test_func_grad():
    index, weight = problem(3, 7, 4, 3, torch.float64, True)
    for sparse in (False, True):
        got = torch.func.grad(lambda w: ensemble_embedding(index, w, sparse=sparse).square().sum())(weight)  # noqa: B023
        torch.testing.assert_close(got, gradient(index, weight, 2 * ensemble_embedding(index, weight)))


@indexed
def test_func_vmap(per_member):
    index, weight = problem(3, 7, 4, 5, torch.float32, per_member)
    expected = ensemble_embedding(index, weight)
    got = torch.func.vmap(lambda i: ensemble_embedding(i.unsqueeze(-1), weight), in_dims=-1)(index)
    assert torch.equal(got.squeeze(-2).movedim(0, 1), expected)
    models = torch.randn(6, 3, 4, 5)
    got = torch.func.vmap(lambda w: ensemble_embedding(index, w))(models)
    assert all(torch.equal(got[i], ensemble_embedding(index, w)) for i, w in enumerate(models))


def test_func_per_example_gradients():
    index, weight = problem(3, 7, 4, 5, torch.float64, True)

    def loss(weight: Tensor, index: Tensor) -> Tensor:
        return ensemble_embedding(index.unsqueeze(-1), weight).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(weight, index)
    for b in range(7):
        rows = index[:, b : b + 1]
        torch.testing.assert_close(got[b], gradient(rows, weight, 2 * ensemble_embedding(rows, weight)))


def test_func_concat():
    categorical, tables, numeric = features(2, 6, 3, torch.float64)

    def loss(tables: list[Tensor], numeric: Tensor) -> Tensor:
        return ensemble_embedding_concat(categorical, tables, numeric).square().sum()

    got, got_numeric = torch.func.grad(loss, argnums=(0, 1))(tables, numeric)
    leaves = [t.clone().requires_grad_() for t in (*tables, numeric)]
    expected = torch.autograd.grad(loss(leaves[:-1], leaves[-1]), leaves)
    for ours, theirs in zip((*got, got_numeric), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    expected = ensemble_embedding_concat(categorical, tables, numeric)
    rows = torch.func.vmap(
        lambda c, x: ensemble_embedding_concat(c.unsqueeze(-2), tables, x.unsqueeze(-2)), in_dims=(-2, -2)
    )(categorical, numeric)
    assert torch.equal(rows.squeeze(-2).movedim(0, 1), expected)
    many = [torch.stack([t, 2 * t]) for t in tables]
    both = torch.func.vmap(lambda t: ensemble_embedding_concat(categorical, t, numeric))(many)
    assert torch.equal(both[1], ensemble_embedding_concat(categorical, [2 * t for t in tables], numeric))
    assert torch.equal(both[0], expected)


def test_func_forward_mode():
    index, weight = problem(3, 7, 4, 3, torch.float64, True)
    tangent = torch.randn_like(weight)
    primal, derivative = torch.func.jvp(lambda w: ensemble_embedding(index, w), (weight,), (tangent,))
    assert torch.equal(primal, ensemble_embedding(index, weight))
    assert torch.equal(derivative, ensemble_embedding(index, tangent))


# --- bad input ---------------------------------------------------------------------------------------------

INDEX, WEIGHT = torch.tensor([0, 3, 1]), torch.randn(2, 4, 5)
BAD = {
    "integer type": ((INDEX.int(), WEIGHT), TypeError, r"index: expected int64, got Int"),
    "float index": ((INDEX.float(), WEIGHT), TypeError, r"index: expected int64, got Float"),
    "integer table": ((INDEX, WEIGHT.long()), TypeError, r"weight: expected float32, .*got Long"),
    "device": (
        (INDEX.to("meta"), WEIGHT),
        TypeError,
        r"index: expected the device of weight \(cpu\), got meta",
    ),
    "rank of index": ((INDEX[0], WEIGHT), ValueError, r"index: expected \[B\] or \[2, B\], got shape \[\]"),
    "members of index": (
        (INDEX.expand(3, 3), WEIGHT),
        ValueError,
        r"index: expected \[B\] or \[2, B\], got shape \[3, 3\]",
    ),
    "rank of weight": ((INDEX, WEIGHT[0]), ValueError, r"weight: expected \[E, N, D\], got shape \[4, 5\]"),
    "no rows": (
        (INDEX, WEIGHT[:, :0]),
        ValueError,
        r"weight: expected \[E, N, D\], none of them 0, got shape",
    ),
    "vector": ((INDEX, WEIGHT[0, 0]), ValueError, r"weight: expected \[E, N, D\], got shape \[5\]"),
    "no columns": ((INDEX, WEIGHT[..., :0]), ValueError, r"weight: expected .* none of them 0"),
    "too large": ((torch.tensor([0, 9, 7]), WEIGHT), ValueError, r"index: expected 0 to 3, got 9"),
    "negative": ((torch.tensor([[0, 1], [2, -1]]), WEIGHT), ValueError, r"index: expected 0 to 3, got -1"),
    "huge": ((torch.tensor([2**62]), WEIGHT), ValueError, rf"index: expected 0 to 3, got {2**62}"),
}


@both
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, sparse):
    (index, weight), error, message = BAD[case]
    calls = (
        lambda: ensemble_embedding(index, weight, sparse=sparse),
        lambda: torch.ops.pyens.ensemble_embedding(index, weight, sparse),
        lambda: ensemble_embedding(
            index, weight.clone().requires_grad_(weight.is_floating_point()), sparse=sparse
        ),
    )
    for call in calls:
        with pytest.raises(error, match=r"^ensemble_embedding: " + message):
            call()


CATEGORICAL, NUMERIC = torch.tensor([[0, 1], [3, 0]]), torch.randn(2, 3)
OTHER = torch.randn(2, 6, 1)
BAD_CONCAT = {
    "no tables": ((CATEGORICAL, [], None), ValueError, r"tables: expected at least one, got an empty list"),
    "columns": (
        (CATEGORICAL, [WEIGHT], None),
        ValueError,
        r"categorical: expected \[B, 1\] or \[2, B, 1\], got shape \[2, 2\]",
    ),
    "members of categorical": (
        (CATEGORICAL.expand(3, 2, 2), [WEIGHT, OTHER], None),
        ValueError,
        r"categorical: expected .*, got shape \[3, 2, 2\]",
    ),
    "type of categorical": (
        (CATEGORICAL.int(), [WEIGHT, OTHER], None),
        TypeError,
        r"categorical: expected int64",
    ),
    "rank of a table": (
        (CATEGORICAL, [WEIGHT, OTHER[0]], None),
        ValueError,
        r"tables\[1\]: expected \[E, N, D\]",
    ),
    "members of a table": (
        (CATEGORICAL, [WEIGHT, OTHER[:1]], None),
        ValueError,
        r"tables\[1\]: expected the ensemble size of tables\[0\] \(2\), got shape",
    ),
    "dtype of a table": (
        (CATEGORICAL, [WEIGHT, OTHER.double()], None),
        TypeError,
        r"tables\[1\]: expected the dtype of tables\[0\] \(Float\), got Double",
    ),
    "dtype of numeric": (
        (CATEGORICAL, [WEIGHT, OTHER], NUMERIC.half()),
        TypeError,
        r"numeric: expected the dtype of tables\[0\] \(Float\), got Half",
    ),
    "examples of numeric": (
        (CATEGORICAL, [WEIGHT, OTHER], NUMERIC[:1]),
        ValueError,
        r"numeric: expected \[2, F\] or \[2, 2, F\], got shape \[1, 3\]",
    ),
    "members of numeric": (
        (CATEGORICAL, [WEIGHT, OTHER], NUMERIC.expand(3, 2, 3)),
        ValueError,
        r"numeric: expected .*, got shape \[3, 2, 3\]",
    ),
    "out of range": (
        (CATEGORICAL + torch.tensor([0, 6]), [WEIGHT, OTHER], NUMERIC),
        ValueError,
        r"categorical\[\.\.\., 1\]: expected 0 to 5, got 7",
    ),
}


@pytest.mark.parametrize("case", BAD_CONCAT)
def test_bad_input_to_concat(case):
    (categorical, tables, numeric), error, message = BAD_CONCAT[case]
    for leaves in (tables, [t.clone().requires_grad_() for t in tables]):
        with pytest.raises(error, match=r"^ensemble_embedding_concat: " + message):
            ensemble_embedding_concat(categorical, leaves, numeric)


def test_bad_input_to_the_backward_operations():
    ops, grad = torch.ops.pyens, torch.randn(2, 3, 5)
    wrong = torch.tensor([0, 4, 1])
    for backward in (ops.ensemble_embedding_backward, ops.ensemble_embedding_sparse_backward):
        with pytest.raises(ValueError, match="index: expected 0 to 3, got 4"):
            backward(grad, wrong, 4)
        with pytest.raises(ValueError, match=r"grad: expected \[E, 3, features\], got shape \[2, 2, 5\]"):
            backward(grad[:, :2], INDEX, 4)
        with pytest.raises(ValueError, match="num_embeddings: expected at least 1, got 0"):
            backward(grad, INDEX, 0)
        with pytest.raises(TypeError, match=r"grad: expected float32, .*got Long"):
            backward(grad.long(), INDEX, 4)
    for sizes, message in {
        ((4, 4), (2, 2), (0, 1)): r"categorical\[\.\.\., 0\]: expected 0 to 3, got 4",
        ((5, 5), (3, 3), (0, 1)): r"grad: expected at least 6 features, got shape \[2, 3, 5\]",
        ((5, 5), (2,), (0, 1)): r"dims: expected one for each of the 2 tables, got 1",
        ((5, 5), (2, 0), (0, 1)): r"num_embeddings and dims of table 1: expected at least 1, got 5 and 0",
        ((5, 5), (2, 2), (1, 0)): r"needs_grad: expected ascending positions from 0 to 2",
        ((5, 5), (2, 2), (3,)): r"needs_grad: expected ascending positions from 0 to 2",
    }.items():
        with pytest.raises(ValueError, match=message):
            ops.ensemble_embedding_concat_backward(grad, torch.stack([wrong, wrong], -1), *sizes, False)


def test_an_index_that_changes_before_backward_is_noticed():
    index, weight = INDEX.clone(), WEIGHT.clone().requires_grad_()
    output = ensemble_embedding(index, weight).sum()
    index[0] = 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_bad_input_on_fake_tensors():
    with pytest.raises(ValueError, match=r"index: expected \[B\] or \[2, B\]"):
        torch.ops.pyens.ensemble_embedding(INDEX.expand(3, 3).to("meta"), WEIGHT.to("meta"), False)


# --- CUDA --------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@dtypes
@shapes
@indexed
def test_the_same_bits_on_cuda(shape, dtype, per_member):
    e, b, _, d = shape
    index, weight = problem(*shape, dtype, per_member)
    grad = torch.randn(e, b, d, dtype=torch.float64).to(dtype)
    there = [t.cuda() for t in (index, weight, grad)]
    assert torch.equal(ensemble_embedding(*there[:2]).cpu(), ensemble_embedding(index, weight))
    assert torch.equal(gradient(*there).cpu(), gradient(index, weight, grad))
    got, expected = gradient(*there, sparse=True).cpu(), gradient(index, weight, grad, sparse=True)
    assert got.is_coalesced() and torch.equal(got.indices(), expected.indices())
    assert torch.equal(got.values(), expected.values())


@pytest.mark.cuda
@dtypes
@indexed
def test_features_of_a_table_have_the_same_bits_on_cuda(dtype, per_member):
    categorical, tables, numeric = features(3, 70, 6, dtype, per_member)
    grad = torch.randn(3, 70, 30).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in (*tables, numeric)]
        output = ensemble_embedding_concat(categorical.to(device), leaves[:-1], leaves[-1])
        results.append([output, *torch.autograd.grad(output, leaves, grad.to(device))])
    for here, there in zip(*results, strict=True):
        assert torch.equal(here, there.cpu())


@pytest.mark.cuda
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("wrong", [-1, 4])
def test_on_cuda_an_index_out_of_range_makes_its_example_nan(wrong, sparse):
    index = INDEX.clone()
    index[1] = wrong
    weight = WEIGHT.cuda().requires_grad_()
    got = ensemble_embedding(index.cuda(), weight, sparse=sparse)
    assert got[:, 1].isnan().all()
    assert torch.equal(got[:, [0, 2]].cpu(), WEIGHT[:, [0, 1]])
    got.backward(torch.ones_like(got))
    expected = torch.zeros_like(WEIGHT)
    expected[:, [0, 1]] = 1
    assert torch.equal(weight.grad.to_dense().cpu(), expected)
