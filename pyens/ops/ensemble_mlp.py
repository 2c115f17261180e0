"""The fused ensemble MLP."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyens import _kinds, reference
from pyens._types import Activation, Dropout
from pyens.ops._call import Given, join_members, join_rows, mapped, operation
from pyens.ops._inputs import as_given, as_rows, is_unusual


def ensemble_mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    activation: Activation = "relu",
    dropout: Dropout = 0.0,
    dropout_seeds: Tensor | None = None,
    shared: bool = False,
) -> Tensor:
    r"""All members of an ensemble of MLPs in one call.

    For every member m, with h_0 = input (or input[m]):

        z_l = h_{l-1} W_l[m]^T + b_l[m],   h_l = act(z_l) for l < L,   output[m] = z_L

    Args:
        input: `[B, I]`, shared by all members and never copied for them, or `[E, B, I]`. B may be 0. Also
            `[I]`, one row, and `[1, B, I]`, which is shared unless E is 1.
        weights: L >= 1 tensors `[E, out_l, in_l]` with in_1 = I and in_{l+1} = out_l, the layout of
            `nn.Linear.weight` stacked (`torch.func.stack_module_state`).
        biases: L tensors `[E, out_l]`, or None for no biases.
        activation: of the hidden layers: relu, gelu (exact), silu, elu, softplus, tanh or identity, each with
            the default arguments of `torch.nn`. The last layer is linear.
        dropout: p in [0, 1): the share of the hidden activations that becomes 0; the others are multiplied by
            1 / (1 - p). Or one rate for each member, as numbers or as a tensor `[E]`, 0 for some if need be:
            a member then has the bits that it has where its rate is that of all. It gets no gradient. On CUDA
            a rate out of range, in a tensor, makes its member's output NaN.
        dropout_seeds: int64 `[E]`, needed where dropout > 0. Whether a unit is kept is a pure function of
            (dropout_seeds[m], layer, batch row, unit): the same seeds give the same masks, backward draws
            them again, and no member depends on another. A training loop passes new seeds each step; 100
            passes of Monte Carlo dropout are one member's weights, expanded to E = 100, with 100 seeds.
        shared: whether the input is the same for all members, whatever its dimensions: `[..., I]`. Without
            it, an input of three is `[E, B, I]`. Dropout numbers its rows as `input.flatten(0, -2)` has them.

    Returns:
        `[E, B, O]`, contiguous, of the input's dtype; `[E, O]` for `[I]`, and `[E, ..., O]` with `shared`.

    float32 and float64 are computed as such; bfloat16 and float16 accumulate in float32 and keep the hidden
    activations in float32, except where the processor's bfloat16 dot products read them as bfloat16. Every
    output is the same bits for any number of threads, any split of the batch (without dropout, which numbers
    the rows) and any other members beside it, per device and instruction set; and so are the gradients of the
    weights, the biases and an input per member for any number of threads and any members beside. Strided and
    expanded tensors are read where they lie as long as their last dimension is contiguous.

    On CUDA the forward pass rounds hidden activations of 16-bit types to themselves, and float32 follows
    torch's TF32 setting for matrix products. Layers that are too wide for one launch (a member's weights do
    not fit into a block's shared memory), or more than 32, are the library's batched products: their bits may
    depend on the batch and the members beside.

    Differentiable in input, weights and biases, twice and more. Backward computes the activations again, tile
    by tile, instead of keeping them; to train, `ensemble_mlp_loss` saves that too. Under autocast it casts as
    `F.linear` does. Within `torch.func`, grad, vjp, jvp and vmap work (also nested).

    Raises:
        ValueError: a shape that does not fit, no layer, an unknown activation, dropout out of range or
            without seeds.
        TypeError: mixed or unsupported dtypes, mixed devices.
        NotImplementedError: CUDA tensors where pyens was built without CUDA.

    Source: the members are those of "Deep Ensemble"; reference in `pyens.reference.ensemble_mlp`.
    """
    rates = None
    if not isinstance(dropout, (float, int)):
        dropout, rates = member_rates("ensemble_mlp", dropout, input)
    biases = () if biases is None else biases
    if shared or is_unusual(input):
        input, lead = as_rows(input, weights, shared)
        output = _ensemble_mlp(input, weights, biases, activation, dropout, dropout_seeds, rates)
        return as_given(output, lead)
    return _ensemble_mlp(input, weights, biases, activation, dropout, dropout_seeds, rates)


def member_rates(op: str, dropout: Dropout, input: Tensor) -> tuple[float, Tensor | None]:
    """The options dropout and dropout_rates of a rate for each member: float64 `[E]`, as exact as a number.

    What is neither several numbers nor a tensor of them stays what it is.
    """
    if isinstance(dropout, Tensor) and dropout.dim() > 0:
        _kinds.check_real(op, "dropout", dropout)
        if dropout.requires_grad:
            raise ValueError(f"{op}: dropout: expected requires_grad=False (it gets no gradient), got True")
        return 0.0, dropout.double()
    if not isinstance(dropout, Sequence) or isinstance(dropout, (str, bytes)):
        return dropout, None  # type: ignore[return-value]
    for member, rate in enumerate(dropout):
        _kinds.check_number(op, f"dropout[{member}]", rate)
        if not 0 <= rate < 1:
            raise ValueError(f"{op}: dropout[{member}]: expected 0 <= dropout < 1, got {rate}")
    return 0.0, torch.tensor(dropout, dtype=torch.float64, device=getattr(input, "device", None))


def one_dropout(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A reference that is given dropout and dropout_rates, as the schema has them."""

    def call(*, dropout: float, dropout_rates: Tensor | None, **given: Any) -> Tensor:
        return of(**given, dropout=dropout if dropout_rates is None else dropout_rates)

    return call


def _vmap(n: int, dims: Given, given: Given) -> tuple[Given, int, tuple[int, ...]]:
    dropped = given["dropout"] != 0 or given["dropout_rates"] is not None  # which numbers the rows
    if mapped(dims) == {"input"} and not dropped:
        return join_rows(n, dims, given, {"input": -2})
    ranks = {"weights": 3, "biases": 2, "input": 3, "dropout_seeds": 1, "dropout_rates": 1}
    return join_members(n, dims, given, ranks)


_ensemble_mlp: Callable[..., Tensor] = operation("ensemble_mlp", one_dropout(reference.ensemble_mlp), _vmap)


def prepack(weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> Tensor:
    """The weights in the order in which the kernel reads them for small batches: uint8 `[bytes]`.

    The layout belongs to the instruction set that this process runs on: make it at run time, never store it.
    """
    packed: Tensor = torch.ops.pyens.ensemble_mlp_prepack(
        list(weights), [] if biases is None else list(biases)
    )
    return packed


def ensemble_mlp_packed(
    input: Tensor,
    packed: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    activation: Activation = "relu",
    shared: bool = False,
) -> Tensor:
    """`ensemble_mlp` for inference: the same bits, sooner for small batches.

    `packed` is `prepack(weights, biases)`. Large batches read `weights` and `biases`. Not differentiable:
    backward raises.
    """
    biases = () if biases is None else biases
    if shared or is_unusual(input):
        input, lead = as_rows(input, weights, shared)
        return as_given(_ensemble_mlp_packed(input, packed, weights, biases, activation), lead)
    return _ensemble_mlp_packed(input, packed, weights, biases, activation)


_ensemble_mlp_packed: Callable[..., Tensor] = operation("ensemble_mlp_packed")
