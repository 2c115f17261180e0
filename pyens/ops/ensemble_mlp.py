"""The fused ensemble MLP."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyens import _kinds, reference
from pyens._types import Activation, Dropout, DropoutPosition, Norm, NormPosition
from pyens.ops._call import Given, join_members, join_rows, mapped, operation
from pyens.ops._inputs import as_given, as_rows, is_unusual
from pyens.reference.ensemble_mlp import default_norm_eps, for_each, residual_layers


def ensemble_mlp(
    input: Tensor | tuple[Tensor, ...],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    activation: Activation | Sequence[Activation] = "relu",
    output_activation: Activation = "identity",
    norm: Norm | Sequence[Norm | None] | None = None,
    norm_weights: Sequence[Tensor] | None = None,
    norm_biases: Sequence[Tensor] | None = None,
    norm_eps: float | None = None,
    norm_position: NormPosition = "before_activation",
    residual: bool | Sequence[bool] = False,
    dropout: Dropout = 0.0,
    dropout_seeds: Tensor | None = None,
    dropout_position: DropoutPosition = "after_activation",
    members: Tensor | None = None,
    save_hidden: bool | Literal["auto"] = "auto",
    shared: bool = False,
) -> Tensor:
    r"""All members of an ensemble of MLPs in one call.

    For every member m, with h_0 = input (or input[m]):

        z_l = h_{l-1} W_l[m]^T + b_l[m],   h_l = act(z_l) for l < L,   output[m] = act_out(z_L)

    and of a hidden layer, in this order, what is asked for of

        dropout ("before_norm"), norm ("before_activation"), activation, norm ("after_activation"), dropout
        ("after_activation"), + h_{l-1}  (residual)

    where a norm of x with n features is (x - mean) / sqrt(var + eps) * weight + bias, var with n; rms_norm
    takes the mean as 0.

    Args:
        input: `[B, I]`, shared by all members and never copied for them, or `[E, B, I]`. B may be 0. Also
            `[I]`, one row, and `[1, B, I]`, which is shared unless E is 1. A tuple of such inputs, as of a
            state and an action, is put together along the features first.
        weights: L >= 1 tensors `[E, out_l, in_l]` with in_1 = I and in_{l+1} = out_l, the layout of
            `nn.Linear.weight` stacked (`torch.func.stack_module_state`).
        biases: L tensors `[E, out_l]`, `[E, 0]` for a layer without one, or None for no biases.
        activation: of the hidden layers, one for all or one for each: relu, gelu (exact), silu, elu,
            softplus, tanh, identity, mish, celu, leaky_relu, sigmoid, gelu_tanh, hardswish or sin, each with
            the default arguments of `torch.nn`; or with the alpha of elu and celu, or the slope of
            leaky_relu: "elu(0.5)".
        output_activation: likewise, of the last layer.
        norm: layer_norm, rms_norm or None, of all hidden layers or of each.
        norm_weights, norm_biases: `[E, out_l]` for each layer that has a norm, in their order; None: ones and
            zeros.
        norm_eps: None: 1e-5 where there is a layer_norm, else that of `nn.RMSNorm`.
        residual: whether a hidden layer adds what it reads, all (True: all that are as wide as that) or each.
        dropout: p in [0, 1): the share of the hidden activations that becomes 0; the others are multiplied by
            1 / (1 - p). Or one rate for each member, as numbers or as a tensor `[E]`, 0 for some if need be:
            a member then has the bits that it has where its rate is that of all. Or one for each of H hidden
            layers, `[1, H]` or `[E, H]`. It gets no gradient. On CUDA a rate out of range, in a tensor,
            makes its member's output NaN.
        dropout_seeds: int64 `[E]`, needed where dropout > 0. Whether a unit is kept is a pure function of
            (dropout_seeds[m], layer, batch row, unit): the same seeds give the same masks, backward draws
            them again, and no member depends on another. A training loop passes new seeds each step; 100
            passes of Monte Carlo dropout are one member's weights, expanded to E = 100, with 100 seeds.
        dropout_position: before_norm: of layers that have a norm; the others have it after the activation.
        members: int64 `[n]`: only these members are computed, in this order, their parameters read where they
            lie; E is n then for all but the parameters, which get gradients of their own shape: 0 for who is
            not among `members`, the sum for who is several times. On CUDA an index out of range makes that
            output NaN.
        save_hidden: whether backward is left the hidden sums, one number a hidden unit, or computes them
            again. "auto": where that is cheaper, up to 1 GB. The gradients have the same bits. On CUDA
            nothing is kept.
        shared: whether the input is the same for all members, whatever its dimensions: `[..., I]`. Without
            it, an input of three is `[E, B, I]`. Dropout numbers its rows as `input.flatten(0, -2)` has them.

    Returns:
        `[E, B, O]`, contiguous, of the input's dtype; `[E, O]` for `[I]`, and `[E, ..., O]` with `shared`.

    float32 and float64 are computed as such; bfloat16 and float16 accumulate in float32 and keep the hidden
    activations in float32, except where the processor's bfloat16 dot products read them as bfloat16, and on
    the way back the gradients of the layers' sums, as `F.linear` does (subnormal ones as 0). Every
    output is the same bits for any number of threads, any split of the batch (without dropout, which numbers
    the rows) and any other members beside it, per device and instruction set; and so are the gradients of the
    weights, the biases and an input per member for any number of threads and any members beside. Strided and
    expanded tensors are read where they lie as long as their last dimension is contiguous.

    On CUDA the forward pass rounds hidden activations of 16-bit types to themselves, and float32 follows
    torch's TF32 setting for matrix products. Layers that are too wide for one launch (a member's weights do
    not fit into a block's shared memory), or more than 32, are the library's batched products: their bits may
    depend on the batch and the members beside.

    Differentiable in input, weights, biases and the norms' parameters, twice and more. Under autocast it
    casts all of them as `F.linear` does. Within `torch.func`, grad, vjp, jvp and vmap work (also nested).

    Raises:
        ValueError: a shape that does not fit, no layer, an unknown activation or norm, a parameter of an
            activation that has none, a norm of one feature, a residual between unequal widths, members out
            of range, dropout out of range or without seeds.
        TypeError: mixed or unsupported dtypes, mixed devices.
        NotImplementedError: CUDA tensors where pyens was built without CUDA.

    Source: the members are those of "Deep Ensemble"; reference in `pyens.reference.ensemble_mlp`.
    """
    keeps: Any = None if isinstance(save_hidden, str) and save_hidden == "auto" else save_hidden
    layers = layer_options(
        "ensemble_mlp",
        weights,
        activation,
        output_activation,
        norm,
        norm_eps,
        norm_position,
        residual,
        dropout_position,
    )
    norms = () if norm_weights is None else norm_weights, () if norm_biases is None else norm_biases
    biases = () if biases is None else biases
    return call_ensemble_mlp(
        input, weights, biases, norms, layers, dropout, dropout_seeds, members, keeps, shared
    )


# The options of a network that are no tensors, in the order of the schema.
Layers = tuple[str, bool, str, str, float, bool, str]
Norms = tuple[Sequence[Tensor], Sequence[Tensor]]  # weights and biases


def call_ensemble_mlp(
    input: Any,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Norms,
    layers: Layers,
    dropout: Dropout,
    seeds: Tensor | None,
    members: Tensor | None,
    keeps: bool | None,
    shared: bool,
) -> Tensor:
    """`ensemble_mlp` of options that `layer_options` has made: a module does so once."""
    lead = None
    if shared or is_unusual(input):
        input, lead = as_rows("ensemble_mlp", input, weights if members is None else [members], shared)
    rates = None
    if not isinstance(dropout, (float, int)):
        dropout, rates = member_rates("ensemble_mlp", dropout, input)
    norm_weights, norm_biases = norms
    activation, early, output_activation, norm, eps, late, residual = layers
    output = _ensemble_mlp(
        input,
        weights,
        biases,
        norm_weights,
        norm_biases,
        activation,
        dropout,
        seeds,
        rates,
        early,
        output_activation,
        norm,
        eps,
        late,
        residual,
        members,
        keeps,
    )
    return output if lead is None else as_given(output, lead)


def layer_options(
    op: str,
    weights: Sequence[Tensor],
    activation: Activation | Sequence[Activation],
    output_activation: Activation,
    norm: Norm | Sequence[Norm | None] | None,
    norm_eps: float | None,
    norm_position: NormPosition,
    residual: bool | Sequence[bool],
    dropout_position: DropoutPosition,
) -> Layers:
    """These options as the schema has them. Of the weights it reads shapes and dtype, where it reads them."""
    if not isinstance(activation, str):
        names = joined(op, "activation", activation)
        check_count(op, "activation", activation, weights)
        activation = names
    if norm is None and residual is False and dropout_position == "after_activation":
        return activation, False, output_activation, "none", 1e-5, False, ""
    if dropout_position not in ("after_activation", "before_norm"):
        raise ValueError(
            f'{op}: dropout_position: expected after_activation or before_norm, got "{dropout_position}"'
        )
    if norm_position not in ("before_activation", "after_activation"):
        raise ValueError(
            f'{op}: norm_position: expected before_activation or after_activation, got "{norm_position}"'
        )
    _kinds.check_tensors(op, "weights", weights)
    early, late = dropout_position == "before_norm", norm_position == "after_activation"
    if norm is not None and not isinstance(norm, (str, Sequence)):
        raise TypeError(f"{op}: norm: expected a name, or a sequence of them, got {norm!r}")
    norms, eps, residuals = for_each(norm, 1), 1e-5, ""
    names = joined(op, "norm", ["none" if one is None else one for one in norms])
    if norm is not None and not isinstance(norm, str):
        check_count(op, "norm", norms, weights)
    if norm_eps is None and len(weights) > 0:
        eps = default_norm_eps(norms, weights[0].dtype)
    elif norm_eps is not None:
        _kinds.check_number(op, "norm_eps", norm_eps)
        eps = norm_eps
    if residual is not False:
        several = isinstance(residual, Sequence) and all(isinstance(one, int) for one in residual)
        if residual is not True and (not several or isinstance(residual, (str, bytes))):
            raise TypeError(f"{op}: residual: expected a bool, or a sequence of them, got {residual!r}")
        has = residual_layers(residual, weights)
        check_count(op, "residual", has, weights)
        if residual is True and not any(has):
            raise ValueError(f"{op}: residual: expected a hidden layer as wide as what it reads, got none")
        residuals = "".join("1" if one else "0" for one in has)
    return activation, early, output_activation, names, eps, late, residuals


def schema_options(
    op: str,
    input: Any,
    weights: Sequence[Tensor],
    activation: Activation | Sequence[Activation],
    output_activation: Activation,
    norm: Norm | Sequence[Norm | None] | None,
    norm_weights: Sequence[Tensor] | None,
    norm_biases: Sequence[Tensor] | None,
    norm_eps: float | None,
    norm_position: NormPosition,
    residual: bool | Sequence[bool],
    dropout: Dropout,
    dropout_seeds: Tensor | None,
    dropout_position: DropoutPosition,
    members: Tensor | None,
) -> tuple[Sequence[Tensor], Sequence[Tensor], tuple[Any, ...]]:
    """Weights and biases of the norms, and the options of a network in the order of the schema."""
    rates = None
    if not isinstance(dropout, (float, int)):
        dropout, rates = member_rates(op, dropout, input)
    activation, *layers = layer_options(
        op,
        weights,
        activation,
        output_activation,
        norm,
        norm_eps,
        norm_position,
        residual,
        dropout_position,
    )
    return (
        () if norm_weights is None else norm_weights,
        () if norm_biases is None else norm_biases,
        (activation, dropout, dropout_seeds, rates, *layers, members),
    )


def check_count(op: str, argument: str, given: Sequence[Any], weights: Sequence[Tensor]) -> None:
    """Raises unless it is one for each hidden layer: joined, one name and a list of one are the same."""
    try:
        hidden = len(weights) - 1
    except TypeError:  # no list, which is refused for other reasons
        return
    if hidden >= 0 and len(given) != hidden:
        _kinds.check_tensors(op, "weights", weights)
        raise ValueError(
            f"{op}: {argument}: expected one for all hidden layers, or one for each of the {hidden}, "
            f"got {len(given)}"
        )


def joined(op: str, argument: str, names: Any) -> str:
    """Names one after the other, as the schema has them."""
    if isinstance(names, Sequence) and all(isinstance(name, str) for name in names):
        return ", ".join(names) if names else "identity" if argument == "activation" else "none"
    raise TypeError(f"{op}: {argument}: expected a name, or a sequence of them, got {names!r}")


def member_rates(op: str, dropout: Dropout, input: Tensor) -> tuple[float, Tensor | None]:
    """The options dropout and dropout_rates of a rate for each member, or each layer: float64, as exact as a
    number.

    What is neither several numbers nor a tensor of them stays what it is.
    """
    if isinstance(dropout, Tensor) and dropout.dim() > 0:
        _kinds.check_real(op, "dropout", dropout)
        if dropout.requires_grad:
            raise ValueError(f"{op}: dropout: expected requires_grad=False (it gets no gradient), got True")
        return 0.0, dropout.double()
    if not isinstance(dropout, Sequence) or isinstance(dropout, (str, bytes)):
        return dropout, None  # type: ignore[return-value]
    for member, rates in enumerate(dropout):
        several = isinstance(rates, Sequence) and not isinstance(rates, str)
        each: Any = rates if several else [rates]
        for layer, rate in enumerate(each):
            place = f"dropout[{member}][{layer}]" if several else f"dropout[{member}]"
            _kinds.check_number(op, place, rate)
            if not 0 <= rate < 1:
                raise ValueError(f"{op}: {place}: expected 0 <= dropout < 1, got {rate}")
    counts = {len(rates) if isinstance(rates, Sequence) else 0 for rates in dropout}
    if len(counts) > 1:
        raise ValueError(f"{op}: dropout: expected as many rates of each member, got {list(dropout)}")
    return 0.0, torch.tensor(dropout, dtype=torch.float64, device=getattr(input, "device", None))


def from_schema(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A reference that is given the options as the schema has them."""

    def call(
        *,
        activation: str,
        dropout: float,
        dropout_rates: Tensor | None,
        dropout_before_norm: bool,
        norm: str,
        norm_after_activation: bool,
        residual: str,
        save_hidden: bool | None = None,
        **given: Any,
    ) -> Tensor:
        norms = [None if name == "none" else name for name in norm.split(", ")]
        return of(
            **given,
            activation=activation.split(", ") if "," in activation else activation,
            dropout=dropout if dropout_rates is None else dropout_rates,
            dropout_position="before_norm" if dropout_before_norm else "after_activation",
            norm=norms if "," in norm else norms[0],
            norm_position="after_activation" if norm_after_activation else "before_activation",
            residual=[one == "1" for one in residual] if residual else False,
        )

    return call


def _vmap(n: int, dims: Given, given: Given) -> tuple[Given, int, tuple[int, ...]]:
    dropped = given["dropout"] != 0 or given["dropout_rates"] is not None  # which numbers the rows
    if mapped(dims) == {"input"} and not dropped:
        return join_rows(n, dims, given, {"input": -2})
    if given["members"] is not None:
        raise NotImplementedError(
            "ensemble_mlp: members: expected None in vmap over more than an input without dropout, "
            "got a tensor"
        )
    return join_members(n, dims, given, member_ranks(dims, given))


def member_ranks(dims: Given, given: Given) -> dict[str, int]:
    """The dimensions of each tensor that may have a member axis, that axis counted."""
    ranks = {"weights": 3, "biases": 2, "norm_weights": 2, "norm_biases": 2, "input": 3, "dropout_seeds": 1}
    rates, dim = given["dropout_rates"], dims["dropout_rates"]
    if rates is None:
        return ranks
    own = rates.dim() - (dim is not None)
    if own == 2 and dim is None and len(rates) == 1:
        return ranks  # of the layers, shared by all
    return ranks | {"dropout_rates": own}


_ensemble_mlp: Callable[..., Tensor] = operation("ensemble_mlp", from_schema(reference.ensemble_mlp), _vmap)


def prepack(weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> Tensor:
    """The weights in the order in which the kernel reads them for small batches: uint8 `[bytes]`.

    The layout belongs to the instruction set that this process runs on: make it at run time, never store it.
    """
    packed: Tensor = torch.ops.pyens.ensemble_mlp_prepack(
        list(weights), [] if biases is None else list(biases)
    )
    return packed


def ensemble_mlp_packed(
    input: Tensor | tuple[Tensor, ...],
    packed: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    activation: Activation | Sequence[Activation] = "relu",
    output_activation: Activation = "identity",
    shared: bool = False,
) -> Tensor:
    """`ensemble_mlp` for inference: the same bits, sooner for small batches.

    `packed` is `prepack(weights, biases)`. Large batches read `weights` and `biases`. Not differentiable:
    backward raises.
    """
    if not isinstance(activation, str):
        activation = joined("ensemble_mlp", "activation", activation)
    biases = () if biases is None else biases
    lead = None
    if shared or is_unusual(input):
        input, lead = as_rows("ensemble_mlp", input, weights, shared)
    output = _ensemble_mlp_packed(input, packed, weights, biases, activation, output_activation)
    return output if lead is None else as_given(output, lead)


_ensemble_mlp_packed: Callable[..., Tensor] = operation("ensemble_mlp_packed")
