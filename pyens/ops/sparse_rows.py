"""Members that keep few of their weights: the format, and the operations on it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyens import _kinds
from pyens.ops._call import operation
from pyens.ops.ensemble_conv2d import pair

BLOCK = 128  # inputs, of csrc/kernels/sparse_rows.h


class SparseRows(NamedTuple):
    """The weights `[E, rows, ...]` of a layer that are kept: plain tensors, made by `pack_sparse`.

    The inputs of a row are cut into blocks of 128. In each block of each member the rows stand in ascending
    order of how many weights they keep there.
    """

    values: Tensor  # [numbers], member after member, block after block, row after row
    columns: Tensor  # uint8 [numbers], the input of each, counted in its block
    starts: Tensor  # int32 [E, blocks, rows + 1], where each row begins; the last one: where the block ends
    order: Tensor  # int32 [E, blocks, rows], which row each is
    row_shape: tuple[int, ...]  # of the weights of one row: (in,), or (C, h, w) of a convolution

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights with their zeros."""
        return (self.order.shape[0], self.order.shape[2], *self.row_shape)

    def dense(self) -> Tensor:
        """The weights with their zeros.

        Raises:
            ValueError: starts, rows or columns out of range.
        """
        members, blocks, rows = self.order.shape
        self._check()
        inputs = int(torch.tensor(self.row_shape).prod())
        counts = self.starts.diff().long().flatten()
        weights = self.values.new_zeros(members, rows, blocks * BLOCK)
        place = torch.arange(counts.numel(), device=self.values.device).repeat_interleave(counts)
        member, block = place // (blocks * rows), place // rows % blocks
        row = self.order.flatten()[place].long()
        weights[member, row, block * BLOCK + self.columns.long()] = self.values
        return weights[:, :, :inputs].reshape(self.shape)

    def _check(self) -> None:
        """What the operations look at too, who would read and write out of range."""
        blocks, rows = self.order.shape[1:]
        inputs, numbers = int(torch.tensor(self.row_shape).prod()), len(self.values)
        ends = torch.cat([self.starts[..., :1].new_zeros(1), self.starts[..., -1].flatten()])
        if (self.starts.diff() < 0).any() or (self.starts < 0).any() or int(ends.max()) > numbers:
            raise ValueError(
                f"SparseRows: starts: expected ascending within the {numbers} values, got others"
            )
        if not torch.equal(
            self.order.sort(-1).values, torch.arange(rows).to(self.order).expand_as(self.order)
        ):
            raise ValueError(f"SparseRows: order: expected each row from 0 to {rows - 1} once, got others")
        for block in range(blocks):
            most = min(BLOCK, inputs - block * BLOCK)
            for begin, end in zip(self.starts[:, block, 0], self.starts[:, block, -1], strict=True):
                if (self.columns[begin:end] >= most).any():
                    raise ValueError(
                        f"SparseRows: columns: expected below {most} in block {block}, got others"
                    )


@torch.no_grad()
def pack_sparse(weights: Tensor, masks: Tensor | None = None) -> SparseRows:
    """The weights of a layer that are not zero, or of which `masks` says so.

    Args:
        weights: `[E, out, in]`, or of a convolution `[E, O, C, h, w]`; float32 or float64; or int8, for
            storage.
        masks: bool of that shape, which weights to keep, zeros among them too; None: those that are not zero.
            A row, and a member, may keep nothing: it is its bias alone.

    Returns:
        `SparseRows`, for `pyens.ops.ensemble_mlp_sparse` and `ensemble_conv2d_sparse`.

    Raises:
        TypeError: another dtype, masks that are not bool.
        ValueError: another shape; masks of another one; 2^31 weights or more.
    """
    _kinds.check_tensor("pack_sparse", "weights", weights)
    if weights.dtype not in (torch.float32, torch.float64, torch.int8):
        raise TypeError(f"pack_sparse: weights: expected float32, float64 or int8, got {weights.dtype}")
    if weights.dim() not in (3, 5) or weights.numel() == 0:
        raise ValueError(
            "pack_sparse: weights: expected [E, out, in] or [E, O, C, h, w], none of them 0, "
            f"got shape {list(weights.shape)}"
        )
    if masks is not None:
        _kinds.check_tensor("pack_sparse", "masks", masks)
        if masks.dtype != torch.bool:
            raise TypeError(f"pack_sparse: masks: expected bool, got {masks.dtype}")
        if masks.shape != weights.shape:
            raise ValueError(
                f"pack_sparse: masks: expected shape {list(weights.shape)}, got {list(masks.shape)}"
            )
    kept = weights != 0 if masks is None else masks
    rows = weights.flatten(2)
    inputs = rows.shape[2]
    blocks = -(-inputs // BLOCK)

    def in_blocks(t: Tensor) -> Tensor:  # [E, blocks, out, BLOCK]
        padded = torch.nn.functional.pad(t.flatten(2), (0, blocks * BLOCK - inputs))
        return padded.view(*padded.shape[:2], blocks, BLOCK).transpose(1, 2)

    kept = in_blocks(kept)
    counts, order = kept.sum(-1).sort(stable=True, dim=-1)
    by_count = order.unsqueeze(-1).expand(-1, -1, -1, BLOCK)
    kept, numbers = kept.gather(2, by_count), in_blocks(rows).gather(2, by_count)
    if int(counts.sum()) >= 2**31:
        raise ValueError("pack_sparse: weights: expected fewer than 2^31 to be kept")
    ends = counts.flatten().cumsum(0).view(counts.shape)
    starts = torch.cat([ends[..., :1] - counts[..., :1], ends], -1)
    columns = torch.arange(BLOCK, dtype=torch.uint8, device=weights.device).expand_as(kept)
    return SparseRows(
        numbers[kept], columns[kept], starts.int(), order.int(), tuple(int(n) for n in weights.shape[2:])
    )


def ensemble_mlp_sparse(
    input: Tensor,
    weights: Sequence[SparseRows],
    biases: Sequence[Tensor] | None = None,
    *,
    activation: str | Sequence[str] = "relu",
    output_activation: str = "identity",
) -> Tensor:
    """`pyens.ops.ensemble_mlp` of weights of which few are kept: one multiply-add for each of them.

    Args:
        input: `[B, I]`, shared by all members, or `[E, B, I]`.
        weights: a `SparseRows` for each layer.
        biases: L tensors `[E, out_l]`, `[E, 0]` for a layer without one, or None.
        activation, output_activation: as in `pyens.ops.ensemble_mlp`.

    Returns:
        `[E, B, O]`. Where all is finite, the bits of `ensemble_mlp` of the weights with their zeros (which
        meets an Inf as NaN, where this does not look); the same for any number of threads, any split of the
        batch and any members beside.

    Inference on the CPU, in float32 and float64: nothing has a gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes and devices that do not fit; rows, columns and starts out of
            range.
        NotImplementedError: another device.
        RuntimeError: a gradient that is asked for, when it is computed.

    Reference in `pyens.reference.ensemble_mlp_sparse`: the dense network of `SparseRows.dense`.
    """
    _check_rows("ensemble_mlp_sparse", weights)
    return _ensemble_mlp_sparse(
        input,
        [w.values for w in weights],
        [w.columns for w in weights],
        [w.starts for w in weights],
        [w.order for w in weights],
        [w.row_shape[0] if len(w.row_shape) == 1 else -1 for w in weights],
        () if biases is None else biases,
        hidden_names(activation, len(weights)),
        output_activation,
    )


def ensemble_conv2d_sparse(
    input: Tensor,
    weight: SparseRows,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "identity",
    max_pool: int | Sequence[int] = 1,
) -> Tensor:
    """`pyens.ops.ensemble_conv2d` of weights of which few are kept, as `ensemble_mlp_sparse` has them."""
    _check_rows("ensemble_conv2d_sparse", [weight])
    return _ensemble_conv2d_sparse(
        input,
        weight.values,
        weight.columns,
        weight.starts,
        weight.order,
        list(weight.row_shape),
        bias,
        pair(stride),
        pair(padding),
        pair(dilation),
        activation,
        pair(max_pool),
    )


def hidden_names(activation: str | Sequence[str], layers: int) -> str:
    """As the dispatcher takes them; of one layer there are none."""
    names = activation if isinstance(activation, str) else ", ".join(activation)
    return "relu" if layers == 1 and names == "" else names


def _check_rows(op: str, weights: Sequence[SparseRows]) -> None:
    if isinstance(weights, Tensor) or not all(isinstance(one, SparseRows) for one in weights):
        raise TypeError(f"{op}: weights: expected SparseRows, as pack_sparse makes them, got another kind")


_ensemble_mlp_sparse: Callable[..., Tensor] = operation("ensemble_mlp_sparse")
_ensemble_conv2d_sparse: Callable[..., Tensor] = operation("ensemble_conv2d_sparse")
