"""One MLP under several masks of its hidden units, without the work that they mask."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from pyens import _kinds
from pyens._types import Activation, Loss, LossOptions, LossReduction
from pyens.ops._call import Given, first, in_transform, operation, shifted
from pyens.ops.ensemble_mlp import ensemble_mlp
from pyens.ops.ensemble_mlp_loss import ensemble_mlp_loss, loss_options
from pyens.reference.activations import activation_module
from pyens.reference.masked_mlp import masked_weights as reference_weights


def plan_masks(masks: Sequence[Tensor]) -> list[Tensor]:
    """The hidden units that each mask keeps: for each layer int64 `[N, largest number kept]`, padded with -1.

    What `masked_mlp` computes from its masks; make it once where the masks stay the same, and outside of what
    `torch.compile` compiles: the widths are read off the masks' values. At least one unit wide, so that empty
    masks make an MLP too.
    """
    plan = []
    for mask in masks:
        # On "meta" there is nothing to read: as many as there could be, which changes no output.
        kept = mask.shape[1] if mask.is_meta else max(1, int(mask.sum(1).max()))
        units = torch.arange(mask.shape[1], device=mask.device).where(mask, mask.shape[1])
        first = units.sort(1).values[:, :kept]
        plan.append(first.where(first < mask.shape[1], -1))
    return plan


def masked_weights(
    weights: Sequence[Tensor], biases: Sequence[Tensor] | None, num_masks: int, plan: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The rows and columns of shared weights that each mask keeps, stacked: an ensemble of N smaller MLPs.

    Units that pad the plan get zeros on both sides, so they change nothing.
    """
    rows, columns = [*plan, None], [None, *plan]
    member_weights = [
        _masked_weights(w, r, c, num_masks) for w, r, c in zip(weights, rows, columns, strict=True)
    ]
    member_biases = [
        _masked_weights(b.unsqueeze(1), r, None, num_masks).squeeze(2)
        for b, r in zip(() if biases is None else biases, rows, strict=False)
    ]
    return member_weights, member_biases


def _vmap(n: int, dims: Given, given: Given) -> tuple[Given, int, tuple[int, ...]]:
    # The mapped matrices lie one below the other, and there are n times as many masks.
    weight = first(n, given["weight"], dims["weight"])
    num_masks = given["num_masks"]
    rows, columns = given["rows"], given["columns"]
    if rows is None:
        rows = torch.arange(weight.shape[1], device=weight.device).expand(num_masks, -1)
        dims = dims | {"rows": None}
    rows = shifted(first(n, rows, dims["rows"]), weight.shape[1]).flatten(0, 1)
    columns = None if columns is None else first(n, columns, dims["columns"]).flatten(0, 1)
    joined = {"weight": weight.flatten(0, 1), "rows": rows, "columns": columns, "num_masks": n * num_masks}
    return joined, 0, (n, num_masks)


_masked_weights = operation("masked_weights", reference_weights, _vmap)


def masked_mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    masks: Sequence[Tensor],
    *,
    activation: Activation = "relu",
    plan: Sequence[Tensor] | None = None,
) -> Tensor:
    r"""One MLP under N masks of its hidden units: every mask on every example.

    For every mask n, with h_0 = input (or input[n]):

        z_l = h_{l-1} W_l^T + b_l,   h_l = act(z_l) where masks[l][n], else 0, for l < L,   output[n] = z_L

    Only the rows and columns that a mask keeps are computed: they are gathered into an ensemble of N small
    MLPs, and `ensemble_mlp` does the rest. Nothing is rescaled.

    Args:
        input: `[B, I]`, or `[N, B, I]` with examples of its own for each mask.
        weights: L >= 2 matrices `[out_l, in_l]`, shared by all masks, as in `nn.Linear`.
        biases: L vectors `[out_l]`, or None.
        masks: L - 1 tensors bool `[N, out_l]`, one per hidden layer. A mask may keep nothing.
        activation: as in `pyens.ops.ensemble_mlp`; the mask comes after it.
        plan: `plan_masks(masks)`, to save the search for what is kept. It must be that of these masks.

    Returns:
        `[N, B, O]`.

    Differentiable in input, weights and biases, twice and more; the masks' gradients are added into the
    shared weights in their order, so the bits are the same for any number of threads. Within `torch.func`,
    grad, vjp, jvp and vmap work (also nested), vmap over anything but masks.

    NaN and Inf in weights that a mask leaves out do not reach its output. Masks of a layer that keep fewer
    units than another of them are padded with units of weight 0: there an Inf in the example itself, or one
    that comes up on the way, makes the output NaN where the reference may have Inf or less. The masks that
    `pyens.masks` draws all keep the same number.

    Raises:
        ValueError: a shape that does not fit, an unknown activation.
        TypeError: masks that are not bool, mixed or unsupported dtypes, mixed devices.
        NotImplementedError: as `pyens.ops.ensemble_mlp`.

    Source: "Masksembles", section 3, and the structure that its section 5 leaves as future work; reference in
    `pyens.reference.masked_mlp`.
    """
    try:
        num_masks = _check("masked_mlp", input, weights, biases, masks, activation, plan)
        parameters = masked_weights(weights, biases, num_masks, plan_masks(masks) if plan is None else plan)
        return ensemble_mlp(input, *parameters, activation=activation)
    except Exception:
        _kinds.check("masked_mlp", _KINDS, (input, weights, biases, masks, activation, plan))
        raise


def masked_mlp_loss(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    masks: Sequence[Tensor],
    *,
    loss: Loss,
    activation: Activation = "relu",
    sample_weight: Tensor | None = None,
    plan: Sequence[Tensor] | None = None,
    reduction: LossReduction = "mean",
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""Each mask's own mean loss, its gradient computed in the same pass.

    loss[n] = sum_b w_b loss(output[n, b], target_b) / sum_b w_b with the outputs of `masked_mlp`; the losses,
    and all that concerns targets and weights with its errors, are those of `pyens.ops.ensemble_mlp_loss`.

    Args:
        input, weights, biases, masks, activation, plan: as in `masked_mlp`.
        target, loss, sample_weight, reduction, options: as in `pyens.ops.ensemble_mlp_loss`, with N for E.

    Returns:
        `[N]`, or with reduction "none" `[N, B]`, float32 (float64 for float64). A model trains on its sum or
        mean.

    Raises:
        ValueError, TypeError, NotImplementedError: as `masked_mlp` and `pyens.ops.ensemble_mlp_loss`.

    Source: as `masked_mlp`; reference in `pyens.reference.masked_mlp_loss`.
    """
    try:
        num_masks = _check("masked_mlp_loss", input, weights, biases, masks, activation, plan)
        parameters = masked_weights(weights, biases, num_masks, plan_masks(masks) if plan is None else plan)
        return ensemble_mlp_loss(
            input,
            target,
            *parameters,
            loss=loss,
            activation=activation,
            sample_weight=sample_weight,
            reduction=reduction,
            **options,
        )
    except Exception:
        _check_kinds(input, target, weights, biases, masks, loss, activation, sample_weight, plan, options)
        raise


def _check_kinds(
    input: Any,
    target: Any,
    weights: Any,
    biases: Any,
    masks: Any,
    loss: Any,
    activation: Any,
    sample_weight: Any,
    plan: Any,
    options: LossOptions,
) -> None:
    network = (input, weights, biases, masks, activation, plan)
    kinds, values = [*_KINDS, *_LOSS_KINDS], [*network, target, loss, sample_weight]
    for kind in _OPTION_KINDS:
        if kind[0] in options:
            kinds.append(kind)
            values.append(options[kind[0]])  # type: ignore[literal-required]
    _kinds.check("masked_mlp_loss", kinds, values)


def masked_mlp_total_loss(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    masks: Sequence[Tensor],
    mask_weight: Tensor,
    *,
    loss: Loss,
    activation: Activation = "relu",
    sample_weight: Tensor | None = None,
    plan: Sequence[Tensor] | None = None,
    **options: Unpack[LossOptions],
) -> Tensor:
    r"""sum_n mask_weight[n] loss[n] of the losses of `masked_mlp_loss`, for examples that each meet one mask.

    On the CPU one operation: some masks at a time are gathered, trained on and added into the gradients of
    the shared weights, in cache. All at once they write their weights and gradients to memory.

    Args:
        input: `[N, B, I]`, the examples of each mask; target and sample_weight with N first too.
        mask_weight: `[N]`; it gets no gradient.
        the others: as in `masked_mlp_loss`.

    Returns:
        0-dim, float32 (float64 for float64).

    Differentiable in input, weights and biases, twice and more; the bits are the same for any number of
    threads.

    Raises:
        ValueError, TypeError, NotImplementedError: as `masked_mlp_loss`, which errors name.

    Source: as `masked_mlp`; the reference is that sum over `pyens.reference.masked_mlp_loss`.
    """
    if not _is_one_operation(input, target, mask_weight, sample_weight, options):
        losses = masked_mlp_loss(
            input,
            target,
            weights,
            biases,
            masks,
            loss=loss,
            activation=activation,
            sample_weight=sample_weight,
            plan=plan,
            **options,
        )
        return (losses * mask_weight.to(losses.dtype)).sum()
    try:
        _check("masked_mlp_loss", input, weights, biases, masks, activation, plan)
        return _masked_mlp_total_loss(
            input,
            target,
            weights,
            () if biases is None else biases,
            plan_masks(masks) if plan is None else plan,
            mask_weight,
            *loss_options(
                input=input,
                target=target,
                weights=weights,
                loss=loss,
                activation=activation,
                sample_weight=sample_weight,
                **options,
            ),
        )
    except Exception:
        _check_kinds(input, target, weights, biases, masks, loss, activation, sample_weight, plan, options)
        raise


_masked_mlp_total_loss: Callable[..., Tensor] = operation("masked_mlp_total_loss")


def _is_one_operation(
    input: Tensor, target: Tensor, mask_weight: Tensor, sample_weight: Tensor | None, options: LossOptions
) -> bool:
    """Elsewhere it is composed: of what torch.func and torch.compile see through, and whose input learns."""
    if torch.compiler.is_compiling() or in_transform():
        return False
    if not input.is_cpu or input.dim() != 3 or len(input) == 0 or torch.is_autocast_enabled("cpu"):
        return False
    # Bounds of log variances may learn. Of other options not all have a meaning for masks.
    if not options.keys() <= {"temperature", "label_smoothing", "delta", "quantiles", "class_weight"}:
        return False
    given = (input, target, mask_weight, sample_weight, *options.values())
    return not any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in given)


# The arguments, with the names that schemas have for types.
_KINDS = (
    ("input", "Tensor"),
    ("weights", "List[Tensor]"),
    ("biases", "Optional[List[Tensor]]"),
    ("masks", "List[Tensor]"),
    ("activation", "str"),
    ("plan", "Optional[List[Tensor]]"),
)
_LOSS_KINDS = (
    ("target", "Tensor"),
    ("loss", "str"),
    ("sample_weight", "Optional[Tensor]"),
)
_OPTION_KINDS = (
    ("temperature", "float"),
    ("label_smoothing", "float"),
    ("delta", "float"),
    ("class_weight", "Optional[Tensor]"),
)


def _check(
    op: str,
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    masks: Sequence[Tensor],
    activation: Activation,
    plan: Sequence[Tensor] | None,
) -> int:
    """The number of masks."""
    for argument, tensors in (("weights", weights), ("biases", biases), ("masks", masks), ("plan", plan)):
        if isinstance(tensors, Tensor):  # whose rows would pass for a list
            _kinds.check_tensors(op, argument, tensors)
    activation_module(activation, op)  # raises if there is none of this name
    if len(masks) == 0 or len(masks) != len(weights) - 1:
        raise ValueError(
            f"{op}: masks: expected one for each hidden layer, of at least one, with {len(weights)} weights, "
            f"got {len(masks)}"
        )
    if biases is not None and len(biases) not in (0, len(weights)):
        raise ValueError(f"{op}: biases: expected {len(weights)}, or none, got {len(biases)}")
    if plan is not None and len(plan) != len(masks):
        raise ValueError(f"{op}: plan: expected one for each of the {len(masks)} masks, got {len(plan)}")
    _kinds.check_real(op, "weights[0]", weights[0])
    for layer, weight in enumerate(weights):
        if weight.dim() != 2 or (layer > 0 and weight.shape[1] != weights[layer - 1].shape[0]):
            fan_in = "in" if layer == 0 else weights[layer - 1].shape[0]
            raise ValueError(
                f"{op}: weights[{layer}]: expected [out, {fan_in}], got shape {list(weight.shape)}"
            )
        _check_kind(op, f"weights[{layer}]", weight, weights[0])
        if biases is not None and len(biases) > 0:
            if biases[layer].shape != weight.shape[:1]:
                raise ValueError(
                    f"{op}: biases[{layer}]: expected [{weight.shape[0]}], "
                    f"got shape {list(biases[layer].shape)}"
                )
            _check_kind(op, f"biases[{layer}]", biases[layer], weights[0])
    num_masks = masks[0].shape[0] if masks[0].dim() else 0
    for layer, mask in enumerate(masks):
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: masks[{layer}]: expected bool, got {mask.dtype}")
        _check_device(op, f"masks[{layer}]", mask, weights[0])
        if mask.dim() != 2 or num_masks < 1 or mask.shape != (num_masks, weights[layer].shape[0]):
            raise ValueError(
                f"{op}: masks[{layer}]: expected [{max(num_masks, 1)}, {weights[layer].shape[0]}], "
                f"got shape {list(mask.shape)}"
            )
    features = weights[0].shape[1]
    shared = input.dim() == 2 and input.shape[1] == features
    if not shared and not (input.dim() == 3 and input.shape[::2] == (num_masks, features)):
        raise ValueError(
            f"{op}: input: expected [B, {features}] or [{num_masks}, B, {features}], "
            f"got shape {list(input.shape)}"
        )
    _check_kind(op, "input", input, weights[0])
    return num_masks


def _check_kind(op: str, argument: str, tensor: Tensor, like: Tensor) -> None:
    # Under autocast all of them are cast.
    if tensor.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
        raise TypeError(
            f"{op}: {argument}: expected the dtype of weights[0] ({like.dtype}), got {tensor.dtype}"
        )
    _check_device(op, argument, tensor, like)


def _check_device(op: str, argument: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise TypeError(
            f"{op}: {argument}: expected the device of weights[0] ({like.device}), got {tensor.device}"
        )
