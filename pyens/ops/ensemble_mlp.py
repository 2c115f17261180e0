"""The fused ensemble MLP."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyens import reference
from pyens._library import _C

_peek_transform = torch._C._functorch.peek_interpreter_stack


def ensemble_mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    activation: str = "relu",
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
    `F.linear` does. Within `torch.func`, grad, vjp and vmap work (also nested); forward-mode differentiation
    raises.

    Raises:
        ValueError: a shape that does not fit, no layer, an unknown activation, dropout out of range or
            without seeds.
        TypeError: mixed or unsupported dtypes, mixed devices.
        NotImplementedError: CUDA tensors where pyens was built without CUDA.

    Source: the members are those of "deep ensembles"; reference in `pyens.reference.ensemble_mlp`.
    """
    # In this order: while compiling, there is always a transform to peek at.
    if torch.compiler.is_compiling():
        return torch.ops.pyens.ensemble_mlp(
            input, list(weights), list(biases or ()), activation, dropout, dropout_seeds
        )
    if _peek_transform() is not None:
        biases = biases or ()
        options = (activation, dropout)
        return _Transformed.apply(input, dropout_seeds, options, len(weights), *weights, *biases)
    return _C.ensemble_mlp(input, weights, biases or (), activation, dropout, dropout_seeds)


class _Transformed(torch.autograd.Function):
    """The same operation for `torch.func`, which knows nothing of autograd functions written in C++."""

    @staticmethod
    def forward(
        input: Tensor, seeds: Tensor | None, options: tuple[str, float], layers: int, *parameters: Tensor
    ) -> Tensor:
        weights, biases = parameters[:layers], parameters[layers:]
        return torch.ops.pyens.ensemble_mlp(input, weights, biases, *options, seeds)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, seeds, ctx.options, ctx.layers, *parameters = inputs
        ctx.save_for_backward(input, seeds, *parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, seeds, *parameters = ctx.saved_tensors
        activation, dropout = ctx.options

        def forward(input: Tensor, *parameters: Tensor) -> Tensor:
            weights, biases = parameters[: ctx.layers], parameters[ctx.layers :]
            return reference.ensemble_mlp(
                input, weights, biases, activation=activation, dropout=dropout, dropout_seeds=seeds
            )

        _, vjp = torch.func.vjp(forward, input, *parameters)
        grad_input, *grad_parameters = vjp(grad)
        return grad_input, None, None, None, *grad_parameters

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        input: Tensor,
        seeds: Tensor | None,
        options: tuple[str, float],
        layers: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, int]:
        input_dim, seeds_dim, _, _, *parameter_dims = in_dims
        n = info.batch_size
        if all(dim is None for dim in (seeds_dim, *parameter_dims)) and options[1] == 0:
            # Only the input is mapped: the mapped dimension joins the batch.
            stacked = input.movedim(input_dim, -3)  # [N, B, I] or [E, N, B, I]
            output = _Transformed.apply(stacked.flatten(-3, -2), seeds, options, layers, *parameters)
            return output.unflatten(1, (n, stacked.shape[-2])), 1

        # The mapped dimension joins the members.
        def join(tensor: Tensor, dim: int | None) -> Tensor:
            mapped = tensor.expand(n, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return mapped.flatten(0, 1)

        members = [join(p, dim) for p, dim in zip(parameters, parameter_dims, strict=True)]
        member_seeds = None if seeds is None else join(seeds, seeds_dim)
        ensemble_size = members[0].shape[0] // n
        if input_dim is None:
            stacked = input if input.dim() == 2 else input.expand(n, *input.shape).flatten(0, 1)
        else:
            stacked = input.movedim(input_dim, 0)
            if stacked.dim() == 3:
                stacked = stacked.unsqueeze(1).expand(-1, ensemble_size, -1, -1)
            stacked = stacked.flatten(0, 1)
        output = _Transformed.apply(stacked, member_seeds, options, layers, *members)
        return output.unflatten(0, (n, ensemble_size)), 0


def pack(weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> Tensor:
    """The weights in the order in which the kernel reads them for small batches: uint8 `[E, bytes]`.

    The layout belongs to the instruction set that this process runs on: make it at run time, never store it.
    """
    return torch.ops.pyens.ensemble_mlp_pack(list(weights), list(biases or ()))


def ensemble_mlp_packed(
    input: Tensor,
    packed: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    activation: str = "relu",
) -> Tensor:
    """`ensemble_mlp` for inference: the same bits, sooner for small batches.

    `packed` is `pack(weights, biases)`. Large batches read `weights` and `biases`. Not differentiable:
    backward raises.
    """
    if torch.compiler.is_compiling():
        return torch.ops.pyens.ensemble_mlp_packed(
            input, packed, list(weights), list(biases or ()), activation
        )
    return _C.ensemble_mlp_packed(input, packed, weights, biases or (), activation)
