"""How well an uncertainty tells unknown inputs from known ones. Unknown is the positive class."""

from torch import Tensor

from pyens.metrics import _checks, _ranks


def ood_auroc(scores_in: Tensor, scores_out: Tensor) -> Tensor:
    """Area under the ROC curve of a score that should be higher out of distribution (the positive class).

    ``P(s_out > s_in) + ½ P(s_out = s_in)`` over all pairs of one example from outside and one from inside,
    counted exactly from the ranks (Mann-Whitney U) in ``O(n log n)``.

    Args:
        scores_in: ``[B_in]``, uncertainties of in-distribution examples: an entropy, 1 - max p, ...
        scores_out: ``[B_out]``, uncertainties of out-of-distribution examples. Scores may be infinite.

    Returns:
        0-dim float64: 1 separates perfectly, 0.5 is chance.

    Raises:
        TypeError, ValueError: for input that is not as above, for an empty side, or for two devices.

    Source: "Masksembles", section 4.1, OOD ROC.
    """
    _check("ood_auroc", scores_in, scores_out)
    return _ranks.auroc(scores_in, scores_out)


def ood_aupr(scores_in: Tensor, scores_out: Tensor) -> Tensor:
    """Area under the precision-recall curve, as average precision: the mean over outside examples of

        precision at their score = #{s_out >= s} / (#{s_out >= s} + #{s_in >= s}).

    That is ``Σ_i (R_i - R_{i-1}) P_i`` over the distinct scores in descending order, without interpolation;
    examples that tie are detected together.

    Args:
        scores_in: ``[B_in]``, uncertainties of in-distribution examples.
        scores_out: ``[B_out]``, uncertainties of out-of-distribution examples, the positive class.

    Returns:
        0-dim float64 in (0, 1]: 1 separates perfectly, ``B_out / (B_in + B_out)`` is chance.

    Raises:
        TypeError, ValueError: for input that is not as above, for an empty side, or for two devices.

    Source: "Masksembles", section 4.1, OOD PR.
    """
    _check("ood_aupr", scores_in, scores_out)
    detected = _ranks.at_least(scores_out, scores_out)
    false_alarms = _ranks.at_least(scores_in, scores_out)
    return (detected / (detected + false_alarms).double()).mean()


def ood_fpr95(scores_in: Tensor, scores_out: Tensor) -> Tensor:
    """False alarms at the price of detecting 95 %: the share of ``s_in >= τ``.

    τ is the highest threshold with ``s_out >= τ`` for at least 95 % of the outside examples, the
    ``⌈0.95 B_out⌉``-th highest of their scores.

    Args:
        scores_in: ``[B_in]``, uncertainties of in-distribution examples.
        scores_out: ``[B_out]``, uncertainties of out-of-distribution examples, the positive class. Papers
            that call the inside positive fix the share of the inside instead, and report another number.

    Returns:
        0-dim float64 in [0, 1]: 0 separates perfectly, about 0.95 is chance.

    Raises:
        TypeError, ValueError: for input that is not as above, for an empty side, or for two devices.

    Source: a point of the ROC curve of "Masksembles", section 4.1.
    """
    _check("ood_fpr95", scores_in, scores_out)
    rank = -(-95 * len(scores_out) // 100)
    threshold = scores_out.detach().double().sort(descending=True).values[rank - 1]
    return (scores_in.detach().double() >= threshold).double().mean()


def _check(function: str, scores_in: Tensor, scores_out: Tensor) -> None:
    _checks.floats(function, "scores_in", scores_in, "[B_in]")
    _checks.floats(function, "scores_out", scores_out, "[B_out]")
    _checks.device(function, "scores_out", scores_out, "scores_in", scores_in)
