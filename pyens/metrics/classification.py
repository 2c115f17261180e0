"""How good the predicted class probabilities are: accuracy and the two usual proper scores."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyens.metrics import _bins, _checks, _ranks


class BrierDecomposition(NamedTuple):
    """``Brier score = reliability - resolution + uncertainty + within_bins``; all 0-dim float64."""

    reliability: Tensor  # squared gap of claimed and observed frequencies: less is better
    resolution: Tensor  # how far the frequencies in the bins are from the base rates: more is better
    uncertainty: Tensor  # of the labels alone, the score of always predicting the base rates
    within_bins: Tensor  # what is lost by treating the probabilities in a bin as one


def accuracy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Share of examples whose most probable class is the true one: ``mean_b [argmax_k p_bk = y_b]``.

    Args:
        probabilities: ``[B, K]``, rows sum to 1.
        labels: int64 ``[B]``, in 0..K-1.

    Returns:
        0-dim float64 in [0, 1]. Of classes that tie for the maximum, the first counts as the prediction.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Masksembles", section 4.1.
    """
    _checks.probabilities("accuracy", "probabilities", probabilities, "[B, K]")
    _checks.labels("accuracy", labels, probabilities)
    return (probabilities.argmax(-1) == labels).double().mean()


def nll(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the true class, in nats: ``-mean_b log p_b,y``.

    Nothing is clipped: a true class that was given probability 0 makes the result infinite.

    Args:
        probabilities: ``[B, K]``, rows sum to 1.
        labels: int64 ``[B]``, in 0..K-1.

    Returns:
        0-dim float64, >= 0 up to the rounding of the rows' sums.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Sparsity", sections 3.2 and 3.4.
    """
    _checks.probabilities("nll", "probabilities", probabilities, "[B, K]")
    _checks.labels("nll", labels, probabilities)
    true_class = probabilities.gather(-1, labels[:, None]).double()
    return -true_class.log().mean()


def brier_score(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean squared distance from the one-hot label, summed over classes: ``mean_b Σ_k (p_bk - [k = y_b])²``.

    Args:
        probabilities: ``[B, K]``, rows sum to 1.
        labels: int64 ``[B]``, in 0..K-1.

    Returns:
        0-dim float64 in [0, 2]: 0 for certain and right, 2 for certain and wrong. For two classes it is twice
        the score that looks at one of them only.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Sparsity", sections 3.2 and 3.4.
    """
    _checks.probabilities("brier_score", "probabilities", probabilities, "[B, K]")
    _checks.labels("brier_score", labels, probabilities)
    target = F.one_hot(labels, probabilities.shape[-1])
    return (probabilities.double() - target).square().sum(-1).mean()


def brier_decomposition(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> BrierDecomposition:
    """The Brier score as calibration, sharpness and difficulty; each class against the rest, summed.

    With the n_ki examples whose p_bk is in bin i of class k, of mean probability p̄_ki and of which a share
    f_ki is of class k, and with the base rate f_k of the class:

        reliability = Σ_k Σ_i n_ki/B (p̄_ki - f_ki)²
        resolution  = Σ_k Σ_i n_ki/B (f_ki - f_k)²
        uncertainty = Σ_k f_k (1 - f_k)
        within_bins = Σ_k 1/B Σ_i Σ_{b in i} (p_bk - p̄_ki)² - 2 (p_bk - p̄_ki) ([y_b = k] - f_ki)

    The last is 0 where all probabilities in a bin are equal. Bins are of equal width, those of
    `classwise_calibration_error`.

    Args:
        probabilities: ``[B, K]``, rows sum to 1.
        labels: int64 ``[B]``, in 0..K-1.
        bins: number of bins, at least 1.

    Returns:
        BrierDecomposition; the first three parts are >= 0.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: Murphy (1973), with the terms within bins of Stephenson, Coelho and Jolliffe (2008); the score is
    that of "Sparsity", section 3.4.
    """
    _checks.bins("brier_decomposition", bins)
    _checks.probabilities("brier_decomposition", "probabilities", probabilities, "[B, K]")
    _checks.labels("brier_decomposition", labels, probabilities)
    claimed, happened = _bins.one_vs_rest(probabilities.double(), labels)  # [K, B]
    bin_of = _bins.bin_of(claimed.to(probabilities), bins, "width")
    sums = _bins.binned(claimed, happened, bin_of, bins)
    filled = sums.count.clamp_min(1)  # sums over an empty bin are 0, and so is its weight
    mean, frequency = sums.claimed / filled, sums.happened / filled  # [K, bins]
    base_rate = happened.mean(-1, keepdim=True)  # [K, 1]
    weight = sums.count / len(labels)
    spread = claimed - mean.gather(-1, bin_of)
    surprise = happened - frequency.gather(-1, bin_of)
    return BrierDecomposition(
        reliability=(weight * (mean - frequency).square()).sum(),
        resolution=(weight * (frequency - base_rate).square()).sum(),
        uncertainty=(base_rate * (1 - base_rate)).sum(),
        within_bins=(spread * (spread - 2 * surprise)).sum() / len(labels),
    )


def auroc(scores: Tensor, positive: Tensor) -> Tensor:
    """Area under the ROC curve of a binary prediction: ``P(s_1 > s_0) + ½ P(s_1 = s_0)``.

    Over all pairs of a positive example and a negative one, counted exactly in ``O(n log n)``.

    Args:
        scores: ``[B]``, higher for more probably positive: a probability, a logit, ... May be infinite.
        positive: bool ``[B]``, True for the examples of label 1; both kinds present.

    Returns:
        0-dim float64: 1 separates perfectly, 0.5 is chance.

    Raises:
        TypeError, ValueError: for input that is not as above.

    Source: "Beyond Point Estimate", Criteo AUC in Table 1.
    """
    _checks.floats("auroc", "scores", scores, "[B]")
    _checks.mask("auroc", "positive", positive, "scores", scores)
    if positive.all() or not positive.any():
        raise ValueError(f"auroc: positive: expected both False and True, got only {positive[0].item()}")
    return _ranks.auroc(scores[~positive], scores[positive])


def confusion_matrix(probabilities: Tensor, labels: Tensor) -> Tensor:
    """How often class j was predicted for examples of class i: ``C_ij = Σ_b [y_b = i][argmax_k p_bk = j]``.

    Args:
        probabilities: ``[B, K]``, rows sum to 1. B may be 0.
        labels: int64 ``[B]``, in 0..K-1.

    Returns:
        int64 ``[K, K]``, a row per true class. Of classes that tie for the maximum, the first is predicted.

    Raises:
        TypeError, ValueError: for input that is not as above.

    Source: "Beyond Point Estimate", Figure 5, which shows it divided by its row sums.
    """
    _checks.probabilities("confusion_matrix", "probabilities", probabilities, "[B, K]", empty_batch=True)
    _checks.labels("confusion_matrix", labels, probabilities)
    classes = probabilities.shape[-1]
    cell = labels * classes + probabilities.argmax(-1)
    return torch.bincount(cell, minlength=classes * classes).view(classes, classes)
