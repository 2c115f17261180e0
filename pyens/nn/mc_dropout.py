"""Monte Carlo dropout as masks that are shared by the examples."""

import itertools

import torch
from torch import Tensor, nn

from pyens.masks import check_masks
from pyens.nn import _sequential, _stacking
from pyens.nn.masked_mlp import MaskedMLP


@torch.no_grad()
def mc_dropout(
    model: nn.Sequential, num_masks: int, p: float | None = None, generator: torch.Generator | None = None
) -> MaskedMLP:
    """`num_masks` passes of Monte Carlo dropout through an MLP, as one model: `[B, I]` -> `[N, B, O]`.

    Each pass has its own mask, drawn once: every unit is kept with probability 1 - p and then multiplied by
    1 / (1 - p), by the weights that follow it. All examples of a pass meet the same mask, so a pass is one
    function; `EnsembleMLP(..., dropout=p)`, with its attribute `mc_dropout` or with `dropout_seeds`, draws
    for each example instead. Masksembles with S = 1 / (1 - p) and N going to infinity comes to the same, but
    for the rescaling.

    Args:
        model: Linear, activation, ..., Linear, with or without `nn.Dropout` after activations. Where there is
            one, units are dropped; if there is none at all, after every activation. It is copied.
        num_masks: N >= 1.
        p: in [0, 1), for all places; None: the rates of the model's own dropout layers.
        generator: to draw from, on the CPU.

    Raises:
        ValueError: another kind of model, num_masks or p out of range, p None without dropout layers.

    Source: "Masksembles", section 3.4, "Dropout".
    """
    if not isinstance(num_masks, int) or num_masks < 1:
        raise ValueError(f"mc_dropout: num_masks: expected a positive integer, got {num_masks!r}")
    layers = list(_sequential.flatten(model))
    rates: list[float | None] = []  # of each linear layer's outputs
    for layer, following in itertools.pairwise([*layers, None]):
        if type(layer) is nn.Dropout:
            if not _sequential.is_plain(following, nn.Linear) or not rates:
                raise ValueError(
                    "mc_dropout: model: expected nn.Dropout between an activation and an nn.Linear, "
                    f"got {model}"
                )
            rates[-1] = layer.p
        elif _sequential.is_plain(layer, nn.Linear):
            rates.append(None)
    rest = nn.Sequential(*(layer for layer in layers if type(layer) is not nn.Dropout))
    linears, activation = _sequential.parse_plain(rest, "mc_dropout: model")
    del rates[-1]
    if not rates:
        raise ValueError("mc_dropout: model: expected at least one hidden layer, got none")
    if p is None and all(rate is None for rate in rates):
        raise ValueError("mc_dropout: p: expected a rate for a model without nn.Dropout, got None")
    if p is not None:
        everywhere = all(rate is None for rate in rates)
        rates = [p if everywhere or rate is not None else None for rate in rates]
    for rate in rates:
        if rate is not None and not 0 <= rate < 1:
            raise ValueError(f"mc_dropout: p: expected 0 <= p < 1, got {rate}")
    check_masks("mc_dropout", num_masks, num_masks=max(len(linear.weight) for linear in linears[:-1]))
    stacked = _stacking.stack([linears])
    weights, biases = ([tensor[0] for tensor in tensors] for tensors in stacked)
    masks: list[Tensor] = []
    for i, rate in enumerate(rates):
        shape = (num_masks, len(linears[i].weight))
        kept = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu") >= (rate or 0)
        masks.append(kept.to(weights[0].device))
        weights[i + 1] /= 1 - (rate or 0)
    return MaskedMLP.from_parameters(weights, biases, masks, activation=activation).train(model.training)
