"""Counting by ranks, exactly and with ties: what areas under curves and rank correlation share."""

import torch
from torch import Tensor


def auroc(negative: Tensor, positive: Tensor) -> Tensor:
    """`P(positive > negative) + ½ P(equal)` over all pairs (Mann-Whitney U), 0-dim float64."""
    negative = _ascending(negative)
    positive = positive.detach().double().contiguous()  # searchsorted warns about strides
    below = torch.searchsorted(negative, positive).sum()
    below_or_equal = torch.searchsorted(negative, positive, right=True).sum()
    return (below + below_or_equal).double() / (2 * len(negative) * len(positive))


def at_least(values: Tensor, thresholds: Tensor) -> Tensor:
    """For every threshold the number of values that are not below it, int64."""
    below = torch.searchsorted(_ascending(values), thresholds.detach().double().contiguous())
    return len(values) - below


def average_ranks(values: Tensor) -> Tensor:
    """1 for the smallest value; those that tie share the mean of their ranks. float64."""
    ordered = _ascending(values)
    values = values.detach().double().contiguous()
    below = torch.searchsorted(ordered, values)
    below_or_equal = torch.searchsorted(ordered, values, right=True)
    return (below + below_or_equal + 1).double() / 2


def _ascending(values: Tensor) -> Tensor:
    return values.detach().double().sort().values
