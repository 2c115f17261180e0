"""The fused ensemble MLP."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyens import reference
from pyens._types import Activation
from pyens.ops._call import Given, join_members, join_rows, mapped, operation


def ensemble_mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    activation: Activation = "relu",
    dropout: float = 0.0,
    dropout_seeds: Tensor | None = None,
) -> Tensor:
    r"""All members of an ensemble of MLPs in one call.

    For every member m, with h_0 = input (or input[m]):

        z_l = h_{l-1} W_l[m]^T + b_l[m],   h_l = act(z_l) for l < L,   output[m] = z_L

    Args:
        input: `[B, I]`, shared by all members and never copied for them, or `[E, B, I]`. B may be 0.
        weights: L >= 1 tensors `[E, out_l, in_l]` with in_1 = I and in_{l+1} = out_l, the layout of
            `nn.Linear.weight` stacked (`torch.func.stack_module_state`).
        biases: L tensors `[E, out_l]`, or None for no biases.
        activation: of the hidden layers: relu, gelu (exact), silu, elu, softplus, tanh or identity, each with
            the default arguments of `torch.nn`. The last layer is linear.
        dropout: p in [0, 1): the share of the hidden activations that becomes 0; the others are multiplied by
            1 / (1 - p).
        dropout_seeds: int64 `[E]`, needed where dropout > 0. Whether a unit is kept is a pure function of
            (dropout_seeds[m], layer, batch row, unit): the same seeds give the same masks, backward draws
            them again, and no member depends on another. A training loop passes new seeds each step; 100
            passes of Monte Carlo dropout are one member's weights, expanded to E = 100, with 100 seeds.

    Returns:
        `[E, B, O]`, contiguous, of the input's dtype.

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
    return _ensemble_mlp(input, weights, () if biases is None else biases, activation, dropout, dropout_seeds)


def _vmap(n: int, dims: Given, given: Given) -> tuple[Given, int, tuple[int, ...]]:
    if mapped(dims) == {"input"} and given["dropout"] == 0:  # which numbers the rows
        return join_rows(n, dims, given, {"input": -2})
    return join_members(n, dims, given, {"weights": 3, "biases": 2, "input": 3, "dropout_seeds": 1})


_ensemble_mlp: Callable[..., Tensor] = operation("ensemble_mlp", reference.ensemble_mlp, _vmap)


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
) -> Tensor:
    """`ensemble_mlp` for inference: the same bits, sooner for small batches.

    `packed` is `prepack(weights, biases)`. Large batches read `weights` and `biases`. Not differentiable:
    backward raises.
    """
    return _ensemble_mlp_packed(input, packed, weights, () if biases is None else biases, activation)


_ensemble_mlp_packed: Callable[..., Tensor] = operation("ensemble_mlp_packed")
