"""Examples sorted into bins by what was claimed of them: for calibration and the Brier decomposition."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyens._types import Binning


class Binned(NamedTuple):
    """Per row and bin, the sums over the examples in it, float64."""

    count: Tensor  # type: ignore[assignment]  # [R, bins]
    claimed: Tensor  # [R, bins], of the probabilities
    happened: Tensor  # [R, bins], of the outcomes


def top_label(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The confidence max_k p and whether it was right, as one row: `[1, B]` both."""
    confidence, predicted = probabilities.max(-1)
    return confidence[None], (predicted == labels)[None].double()


def one_vs_rest(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The probability of every class and whether it was the true one: a row per class, `[K, B]` both."""
    return probabilities.T.contiguous(), F.one_hot(labels, probabilities.shape[-1]).T.double()


def bin_of(claimed: Tensor, bins: int, binning: Binning) -> Tensor:
    """The index of the bin `(lo, hi]` that each of the claimed probabilities [R, B] is in, [R, B].

    Only the inner edges count, so that 0 is in the first bin, and a confidence a rounding error above 1 in
    the last. They are in the probabilities' own dtype: float32 0.7 lies on the edge 7/10 and not beside its
    float64 value.
    """
    claimed = claimed.detach().contiguous()
    rows, examples = claimed.shape
    if binning == "width":
        edges = (torch.arange(1, bins, dtype=torch.float64) / bins).to(claimed).expand(rows, -1)
    else:
        last = [
            -(-i * examples // bins) - 1 for i in range(1, bins)
        ]  # ceil(i B / bins) examples lie up to it
        edges = claimed.sort(-1).values[:, last]
    return torch.searchsorted(edges.contiguous(), claimed)


def binned(claimed: Tensor, happened: Tensor, bin_of: Tensor, bins: int) -> Binned:
    # Masked sums and not bincount: the same bits on every run on a GPU too.
    members = [bin_of == i for i in range(bins)]

    def sums(values: Tensor) -> Tensor:
        return torch.stack([values.where(m, 0.0).sum(-1, dtype=torch.float64) for m in members], -1)

    count = torch.stack([m.sum(-1) for m in members], -1).double()
    return Binned(count, sums(claimed), sums(happened))
