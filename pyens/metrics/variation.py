"""Prediction variation (PV): how much an ensemble's members differ on each example.

It is the standard deviation of what they say (value PV: regression, or the probability of a binary label) or
their divergence from their mean (distribution PV: several classes). Members that come in chunks:
`PredictiveMoments.compute().std` and `PredictiveUncertainty.compute().distribution_pv` are the same. Whether
the PVs of two settings rise together says `pearson`, of several settings that of every two.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyens._types import PredictionVariation
from pyens.metrics import _checks
from pyens.ops.uncertainty import predictive_moments, predictive_uncertainty

# Numbers of the universe that are looked at together: the draws from them are copied.
BLOCK = 1 << 22


def value_variation(outputs: Tensor) -> Tensor:
    """Value PV: ``PV(x) = sqrt(Σ_m (y_m(x) - ȳ(x))² / (E - 1))``.

    Args:
        outputs: ``[E, B]`` of the members: values, or probabilities of a binary label's positive class. With
            ``[E, B, K]`` each of the K values counts for itself.

    Returns:
        ``[B]`` or ``[B, K]`` in the dtype and the units of the input, >= 0; exactly 0 where all members are
        equal. NaN for E = 1, of which nothing can be said.

    Raises:
        TypeError, ValueError: for input that is not as above.

    Source: "Beyond Point Estimate", section 4; computed by `pyens.ops.predictive_moments`, whose `std` it is.
    """
    _checks.floats("value_variation", "outputs", outputs, "[E, B]", "[E, B, K]", empty_batch=True)
    return predictive_moments(outputs).std


def distribution_variation(probabilities: Tensor) -> Tensor:
    """Distribution PV, in nats: ``PV(x) = Σ_m KL(p_m(·|x) ‖ p̄(·|x))`` with ``p̄ = mean_m p_m``.

    It is E times the `mutual_information`: it grows with the number of members.

    Args:
        probabilities: ``[E, B, K]`` of the members, rows sum to 1.

    Returns:
        ``[B]`` in the dtype of the input, in [0, E min(log E, log K)]. What rounding would leave below 0 is
        0; where all members are equal, and for E = 1, it is exactly 0.

    Raises:
        TypeError, ValueError: for input that is not as above.

    Source: "Beyond Point Estimate", section 4; computed by `pyens.ops.predictive_uncertainty`, which also
    takes logits: `distribution_pv` there.
    """
    _checks.probabilities(
        "distribution_variation", "probabilities", probabilities, "[E, B, K]", empty_batch=True
    )
    return predictive_uncertainty(probabilities, from_probabilities=True).distribution_pv


def variation_coefficient(variation: Tensor, mean: Tensor) -> Tensor:
    """PV coefficient, the share of the prediction that sways: ``1/B Σ_x PV(x) / |ȳ(x)|``.

    An example with PV 0 adds 0, whatever its mean.

    Args:
        variation: value PV ``[B]``, finite, >= 0.
        mean: ``[B]``, finite: the ensemble's mean prediction ȳ, of the same dtype.

    Returns:
        0-dim float64, >= 0; infinite where a mean is 0 and its PV is not.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Beyond Point Estimate", Table 1, where all means are above 0.
    """
    for name, value in (("variation", variation), ("mean", mean)):
        _checks.floats("variation_coefficient", name, value, "[B]")
        _checks.finite("variation_coefficient", name, value)
    _checks.like("variation_coefficient", "mean", mean, "variation", variation)
    lowest = variation.min().item()
    if lowest < 0:
        raise ValueError(f"variation_coefficient: variation: expected values >= 0, got {lowest:.6g}")
    share = variation.double() / mean.double().abs()
    return share.masked_fill(variation == 0, 0.0).mean()


class DeltaRatio(NamedTuple):
    """How far the PV of small ensembles is from that of the universe they are drawn from; all float64."""

    mean: Tensor  # [S], over the draws of each size
    std: Tensor  # [S], with draws - 1
    ratios: Tensor  # [S, draws]


@torch.no_grad()
def delta_ratio(
    universe: Tensor,
    sizes: Sequence[int],
    *,
    variation: PredictionVariation = "value",
    draws: int = 20,
    seed: int = 0,
) -> DeltaRatio:
    """What is lost by estimating PV with N members: ``dr_N = mean_x |PV_N(x) - PV_gt(x)| / mean_x PV_gt(x)``.

    PV_gt is of all members, PV_N of N that are drawn from them without replacement; 1 - dr_N is the share of
    the variation that N members capture.

    Args:
        universe: of E members, ``[E, B]`` for value PV, ``[E, B, K]`` probabilities for distribution PV. A
            draw copies no more than some megabytes of it at a time.
        sizes: the S values of N, each in 2..E.
        variation: "value" or "distribution". Distribution PV grows with the number of members, so there it is
            divided by that number: what is compared is the mutual information.
        draws: for each size, 2 or more.
        seed: of `draws` permutations of the members: draw d of N members is the first N of permutation d, so
            that the result for one size does not depend on the other sizes.

    Returns:
        DeltaRatio, on the CPU.

    Raises:
        TypeError, ValueError: for input that is not as above, for B = 0, or for PV_gt 0 everywhere.

    Source: "Beyond Point Estimate", Appendix A.1, Definition A.1 and Figure 6, which have value PV and E =
    1000.
    """
    _checks.choice("delta_ratio", "variation", variation, "value", "distribution")
    shape = "[E, B]" if variation == "value" else "[E, B, K]"
    _checks.floats("delta_ratio", "universe", universe, shape)
    _checks.finite("delta_ratio", "universe", universe)
    _checks.count("delta_ratio", "draws", draws, 2)
    if not isinstance(sizes, Sequence):
        raise TypeError(f"delta_ratio: sizes: expected a list of ints, got {type(sizes).__name__}")
    members, examples = universe.shape[:2]
    for size in sizes:
        _checks.count("delta_ratio", "sizes", size, 2)
        if size > members:
            raise ValueError(f"delta_ratio: sizes: expected at most the {members} of universe, got {size}")
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(members, generator=generator, device="cpu") for _ in range(draws)]
    drawn = [order.to(universe.device) for order in drawn]

    difference = torch.zeros(len(sizes), draws, dtype=torch.float64)
    total = 0.0
    for block in universe.split(max(1, BLOCK * examples // universe.numel()), dim=1):
        if variation == "distribution":
            _checks.probabilities("delta_ratio", "universe", block, shape)
        block = block.contiguous()  # selecting members from a slice takes ten times as long
        truth = _per_member(block, variation)
        total += truth.sum().item()
        for row, size in enumerate(sizes):
            for column, order in enumerate(drawn):
                found = _per_member(block.index_select(0, order[:size]), variation)
                difference[row, column] += (found - truth).abs().sum().cpu()
    if total == 0:
        raise ValueError("delta_ratio: universe: expected members that differ, got PV 0 everywhere")
    ratios = difference / total
    return DeltaRatio(ratios.mean(1), ratios.std(1), ratios)


def _per_member(members: Tensor, variation: PredictionVariation) -> Tensor:
    """PV `[B]` in float64 of members that were checked, that of distributions divided by their number."""
    if variation == "value":
        return predictive_moments(members).std.double()
    return predictive_uncertainty(members, from_probabilities=True).mutual_information.double()
