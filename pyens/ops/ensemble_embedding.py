"""Embedding tables per member."""

from collections.abc import Callable, Sequence

from torch import Tensor

from pyens import reference
from pyens.ops._call import Given, join_members, join_rows, mapped, operation
from pyens.reference.ensemble_embedding import ensemble_embedding_concat as reference_concat


def ensemble_embedding(index: Tensor, weight: Tensor, *, sparse: bool = False) -> Tensor:
    r"""Rows of a table that each member has for itself.

        output[m, b] = weight[m, index[b]]      or      weight[m, index[m, b]]

    Args:
        index: int64 `[B]`, shared by all members, or `[E, B]`, each in 0 ... N - 1. B may be 0.
        weight: `[E, N, D]`, the layout of `nn.Embedding.weight` stacked. float32, float64, bfloat16, float16.
        sparse: the gradient of `weight` is a coalesced sparse COO tensor `[E, N, D]` with two sparse
            dimensions (member, row) and values `[nnz, D]`: one row for each that was looked up. It is made
            without anything of the size of `weight`. (In `.grad` torch drops the flag of being coalesced,
            not the fact.) See `pyens.EnsembleEmbedding` for what takes it.

    Returns:
        `[E, B, D]`, contiguous, of the dtype of `weight`.

    The gradient of a row is the sum over the examples that looked it up, in ascending b (bfloat16 and float16
    in float32, rounded once): the same bits for any number of threads and any other members beside. The dense
    one costs the rows touched and one zeroing of the table. Strided and expanded tensors are read where they
    lie as long as the last dimension of `weight` is contiguous.

    Differentiable in `weight`, twice and more; with `sparse` once, and not under `torch.compile`. Autocast
    leaves it alone, as it does `F.embedding`. Within `torch.func`, grad, vjp, jvp and vmap work (also
    nested), and the gradient is dense.

    On CUDA the sums go by a sorted index, to the same bits; only the sparse gradient waits for the device. An
    index out of range raises nothing there: its example becomes NaN, and no row gets its gradient.

    Raises:
        ValueError: a shape that does not fit; on the CPU an index out of range.
        TypeError: an index that is not int64, an unsupported dtype, mixed devices.
        NotImplementedError: CUDA tensors where pyens was built without CUDA.

    Source: the categorical features of the click and rating models in "Beyond Point Estimate"; reference in
    `pyens.reference.ensemble_embedding`.
    """
    return _ensemble_embedding(index, weight, sparse)


def ensemble_embedding_concat(
    categorical: Tensor, tables: Sequence[Tensor], numeric: Tensor | None = None
) -> Tensor:
    r"""Rows of C tables side by side, then numbers: the features of a table of data, written once.

        output[m, b] = tables[0][m, i_0], ..., tables[C-1][m, i_{C-1}], numeric[m, b],   i = categorical[m, b]

    Args:
        categorical: int64 `[B, C]`, shared by all members, or `[E, B, C]`: a column for each table.
        tables: C >= 1 tensors `[E, N_t, D_t]`.
        numeric: `[B, F]` or `[E, B, F]`, of the dtype of the tables; or None.

    Returns:
        `[E, B, sum of D_t, then F]`, contiguous.

    In everything else as `ensemble_embedding` with `sparse=False`; differentiable in `numeric` too, where it
    is shared as the sum over the members in ascending order.
    """
    return _ensemble_embedding_concat(categorical, tables, numeric)


def _vmap(n: int, dims: Given, given: Given) -> tuple[Given, int, tuple[int, ...]]:
    if mapped(dims) == {"index"}:
        return join_rows(n, dims, given, {"index": -1})
    return join_members(n, dims, given, {"weight": 3, "index": 2})


def _vmap_concat(n: int, dims: Given, given: Given) -> tuple[Given, int, tuple[int, ...]]:
    if "tables" not in mapped(dims):
        return join_rows(n, dims, given, {"categorical": -2, "numeric": -2})
    return join_members(n, dims, given, {"tables": 3, "categorical": 3, "numeric": 3})


_ensemble_embedding: Callable[..., Tensor] = operation(
    "ensemble_embedding", reference.ensemble_embedding, _vmap
)
_ensemble_embedding_concat: Callable[..., Tensor] = operation(
    "ensemble_embedding_concat", reference_concat, _vmap_concat
)
