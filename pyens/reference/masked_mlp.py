"""Specification of `pyens.ops.masked_mlp` and `masked_mlp_loss`, and of the gather under them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from pyens._types import Activation, Loss, LossOptions, LossReduction
from pyens.reference.activations import activation_module
from pyens.reference.ensemble_mlp_loss import example_losses, mean_losses


def masked_mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    masks: Sequence[Tensor],
    *,
    activation: Activation = "relu",
) -> Tensor:
    """One MLP under N masks: mask n leaves, of each hidden layer l, the units of masks[l][n].

    input `[B, I]` (shared) or `[N, B, I]`, weights `[O, I]` as in `nn.Linear`, biases `[O]` or None, masks
    bool `[N, H_l]`, one for each hidden layer; returns `[N, B, O]`. Masking comes after the activation. The
    rows and columns of units that a mask leaves out take no part, so NaN and Inf in them do not either.
    """
    act = activation_module(activation)
    outputs = []
    for n in range(masks[0].shape[0]):
        hidden = input if input.dim() == 2 else input[n]  # [B, I]
        for layer, weight in enumerate(weights):  # [out, in]
            bias = biases[layer] if biases else None
            if layer > 0:
                weight = weight[:, masks[layer - 1][n]]
            if layer < len(masks):
                weight = weight[masks[layer][n]]
                bias = None if bias is None else bias[masks[layer][n]]
            hidden = F.linear(hidden, weight, bias)
            if layer < len(masks):
                hidden = act(hidden)
        outputs.append(hidden)
    return torch.stack(outputs)


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
    reduction: LossReduction = "mean",
    **options: Unpack[LossOptions],
) -> Tensor:
    """The loss of each mask's outputs, `[N]` or `[N, B]`, as `pyens.reference.ensemble_mlp_loss` has it."""

    def run(input: Tensor) -> Tensor:
        return masked_mlp(input, weights, biases, masks, activation=activation)

    of_examples = example_losses if reduction == "none" else mean_losses
    return of_examples(run, input, target, loss, sample_weight, **options)


def masked_weights(weight: Tensor, rows: Tensor | None, columns: Tensor | None, num_masks: int) -> Tensor:
    """weight[rows[n]][:, columns[n]] for each mask n, and 0 where an index is -1; None stands for all.

    weight `[R, C]`, rows and columns int64 `[N, kept]`; returns `[N, kept rows, kept columns]`.
    """
    if rows is None:
        rows = torch.arange(weight.shape[0], device=weight.device).expand(num_masks, -1)
    if columns is None:
        columns = torch.arange(weight.shape[1], device=weight.device).expand(num_masks, -1)
    row, column = rows.unsqueeze(2), columns.unsqueeze(1)
    return torch.where((row >= 0) & (column >= 0), weight[row.clamp_min(0), column.clamp_min(0)], 0)
