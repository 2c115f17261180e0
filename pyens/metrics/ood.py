"""How well an uncertainty tells unknown inputs from known ones."""

import torch
from torch import Tensor

from pyens.metrics import _checks


def ood_auroc(scores_in: Tensor, scores_out: Tensor) -> Tensor:
    """Area under the ROC curve of a score that should be higher out of distribution (the positive class).

    ``P(s_out > s_in) + ½ P(s_out = s_in)`` over all pairs of one example from outside and one from inside,
    counted exactly from the ranks (Mann-Whitney U) in ``O(n log n)``.

    Args:
        scores_in: ``[B_in]``, uncertainties of in-distribution examples: an entropy, 1 - max p, ...
        scores_out: ``[B_out]``, uncertainties of out-of-distribution examples. Infinite scores are in order.

    Returns:
        0-dim float64: 1 separates perfectly, 0.5 is chance.

    Raises:
        TypeError, ValueError: for input that is not as above, for an empty side, or for two devices.

    Source: "Masksembles for Uncertainty Estimation", section 4.1, OOD ROC.
    """
    _checks.floats("ood_auroc", "scores_in", scores_in, "[B_in]")
    _checks.floats("ood_auroc", "scores_out", scores_out, "[B_out]")
    if scores_out.device != scores_in.device:
        raise ValueError(
            f"ood_auroc: scores_out: expected device {scores_in.device}, that of scores_in, "
            f"got {scores_out.device}"
        )
    inside = scores_in.detach().double().sort().values
    outside = scores_out.detach().double().contiguous()  # searchsorted warns about strides
    below = torch.searchsorted(inside, outside).sum()
    below_or_equal = torch.searchsorted(inside, outside, right=True).sum()
    return (below + below_or_equal).double() / (2 * len(inside) * len(outside))
