"""Acting on uncertainty: answering only where it is low, and labelling first where it is high.

    tau = risk_threshold(confidence(validation), wrong(validation), risk=0.01)
    labels = predict_or_abstain(probabilities, tau)  # -1 where the ensemble had better not answer

    rows = uncertainty_sampling(pool_probabilities, 100, by="mutual_information")

Everything is answered or chosen by the values given, on their device; nothing here is random but the order of
exact ties, which a generator decides.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pyens import metrics
from pyens._kinds import check_number
from pyens._types import UncertaintyScore
from pyens.metrics import _checks
from pyens.metrics.selective import checked_losses
from pyens.ops import predictive_uncertainty

__all__ = [
    "ABSTAIN",
    "coverage_threshold",
    "most_uncertain",
    "predict_or_abstain",
    "risk_threshold",
    "uncertainty_sampling",
]

ABSTAIN = -1  # the label of `predict_or_abstain` for an example that is not answered


def coverage_threshold(confidence: Tensor, coverage: float) -> Tensor:
    """The confidence τ from which to answer at which a given share of validation examples is answered.

    The highest τ with ``mean_b [confidence_b >= τ] >= coverage``: the ``⌈coverage · B⌉``-th highest
    confidence. More are answered where others tie with it.

    Args:
        confidence: ``[B]`` of validation examples, higher where an answer is more trusted: max p, the
            negative of an entropy or of a variance, ...
        coverage: the share, in [0, 1].

    Returns:
        0-dim, in the dtype of the confidence, for `predict_or_abstain`; inf for coverage 0.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Deep Ensemble", Selective Classification.
    """
    _checks.number("coverage_threshold", "coverage", coverage, 0, 1)
    _checks.floats("coverage_threshold", "confidence", confidence, "[B]")
    descending = confidence.detach().sort(descending=True).values
    examples = len(descending)
    # The least number whose share, as a float64 division gives it, is enough: 3/10 for 0.3.
    shares = torch.arange(1, examples + 1, dtype=torch.float64) / examples
    answered = int((shares < coverage).sum()) + 1
    return descending[answered - 1] if coverage > 0 else descending.new_tensor(torch.inf)


def risk_threshold(confidence: Tensor, losses: Tensor, risk: float) -> Tensor:
    """The lowest confidence τ from which to answer at a mean loss of at most `risk` on validation examples.

    The lowest of the confidences with ``mean(loss_b : confidence_b >= τ) <= risk``. That is the risk on these
    examples, without a margin for their number: on new ones it is near and can be higher.

    Args:
        confidence: ``[B]`` of validation examples, higher where an answer is more trusted.
        losses: ``[B]`` finite floats; or bool, True where the answer is wrong: then `risk` is an error rate.
        risk: the highest mean loss, in the unit of the losses.

    Returns:
        0-dim, in the dtype of the confidence; inf if no threshold is good enough: then nothing is answered.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Deep Ensemble", Selective Classification.
    """
    _checks.number("risk_threshold", "risk", risk, -torch.inf)
    checked_losses("risk_threshold", confidence, losses)
    curve = metrics.risk_coverage_curve(confidence, losses)
    # Only where those that tie end can a threshold part the examples.
    ends = torch.ones_like(curve.threshold, dtype=torch.bool)
    ends[:-1] = curve.threshold[1:] < curve.threshold[:-1]
    good = curve.threshold[ends & (curve.risk <= risk)]
    return good[-1] if len(good) else curve.threshold.new_tensor(torch.inf)


def predict_or_abstain(
    probabilities: Tensor, threshold: Tensor | float, *, confidence: Tensor | None = None
) -> Tensor:
    """The most probable class where the confidence reaches the threshold, and -1 (`ABSTAIN`) elsewhere.

    Args:
        probabilities: ``[B, K]``, rows sum to 1: of an ensemble, the mean of its members. B may be 0.
        threshold: 0-dim or a number: what `coverage_threshold` or `risk_threshold` gave.
        confidence: ``[B]``, of the kind that the threshold was made of; max p if not given.

    Returns:
        int64 ``[B]``. Of classes that tie for the maximum, the first is predicted.

    Raises:
        TypeError, ValueError: for input that is not as above, or for a NaN threshold.

    Source: "Deep Ensemble", Selective Classification.
    """
    function = "predict_or_abstain"
    _checks.probabilities(function, "probabilities", probabilities, "[B, K]", empty_batch=True)
    highest, predicted = probabilities.detach().max(-1)
    if confidence is None:
        confidence = highest
    else:
        _checks.floats(function, "confidence", confidence, "[B]", empty_batch=True)
        _checks.shape(function, "confidence", confidence, "the predictions", predicted)
        _checks.device(function, "confidence", confidence, "probabilities", probabilities)
    if not isinstance(threshold, Tensor):
        check_number(function, "threshold", threshold)
    # In the dtype of the confidence: float32 0.9 reaches the threshold 0.9.
    threshold = torch.as_tensor(threshold, dtype=confidence.dtype, device=confidence.device)
    if threshold.ndim or threshold.isnan():
        raise ValueError(f"{function}: threshold: expected one number, got {threshold.tolist()}")
    return predicted.where(confidence >= threshold, ABSTAIN)


def _vote_disagreement(probabilities: Tensor) -> Tensor:
    return predictive_uncertainty(probabilities, from_probabilities=True).vote_disagreement


def _small_margin(probabilities: Tensor) -> Tensor:
    mean = probabilities.double() if probabilities.ndim == 2 else probabilities.double().mean(0)
    if mean.shape[-1] == 1:
        return 1 - mean[:, 0]  # there is no second class
    first, second = mean.topk(2).values.unbind(-1)
    return 1 - (first - second)


# What `uncertainty_sampling` can go by: the score, and whether it needs the members.
_SCORES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "entropy": (metrics.predictive_entropy, False),
    "margin": (_small_margin, False),
    "mutual_information": (metrics.mutual_information, True),
    "variation_ratio": (_vote_disagreement, True),
}


def uncertainty_sampling(
    probabilities: Tensor,
    count: int,
    *,
    by: UncertaintyScore = "entropy",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The examples of a pool that the ensemble is least certain of: those to label next.

    Uncertain by

    - ``"entropy"``: of the mean prediction, ``H(p̄)``;
    - ``"margin"``: one minus the gap between the two largest of p̄;
    - ``"mutual_information"``: ``H(p̄) - mean_m H(p_m)``;
    - ``"variation_ratio"``: the `vote_disagreement` of `pyens.ops.predictive_uncertainty`, one minus the
      largest share of the members' votes.

    Args:
        probabilities: ``[E, B, K]`` of the members, or for entropy and margin ``[B, K]``; rows sum to 1.
        count: how many to choose, 0..B.
        by: one of the four.
        generator: decides the order of examples that tie exactly, drawn on the CPU; torch's default generator
            if not given. The same state gives the same choice.

    Returns:
        int64 ``[count]`` of different row numbers, the most uncertain first.

    Raises:
        TypeError, ValueError: for input that is not as above.

    Source: "Deep Ensemble", Active & Efficient Learning.
    """
    function = "uncertainty_sampling"
    _checks.choice(function, "by", by, *_SCORES)
    score, needs_members = _SCORES[by]
    shapes = ("[E, B, K]",) if needs_members else ("[E, B, K]", "[B, K]")
    _checks.probabilities(function, "probabilities", probabilities, *shapes, empty_batch=True)
    return _highest(function, score(probabilities.detach()), count, generator)


def most_uncertain(scores: Tensor, count: int, *, generator: torch.Generator | None = None) -> Tensor:
    """`uncertainty_sampling` by scores of the caller's own, such as a predictive variance.

    Args:
        scores: ``[B]``, higher for less certain. B may be 0.
        count: how many to choose, 0..B.
        generator: decides the order of examples that tie exactly.

    Returns:
        int64 ``[count]`` of different row numbers, the highest score first.

    Raises:
        TypeError, ValueError: for input that is not as above.

    Source: "Deep Ensemble", Active & Efficient Learning.
    """
    _checks.floats("most_uncertain", "scores", scores, "[B]", empty_batch=True)
    return _highest("most_uncertain", scores.detach(), count, generator)


def _highest(function: str, scores: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    _checks.count(function, "count", count, 0)
    if count > len(scores):
        raise ValueError(f"{function}: count: expected at most B = {len(scores)}, got {count}")
    shuffled = torch.randperm(len(scores), generator=generator).to(scores.device)
    return shuffled[scores[shuffled].argsort(descending=True, stable=True)[:count]]
