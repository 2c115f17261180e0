"""How good the predicted class probabilities are: accuracy and the two usual proper scores."""

from torch import Tensor
from torch.nn import functional as F

from pyens.metrics import _checks


def accuracy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Share of examples whose most probable class is the true one: ``mean_b [argmax_k p_bk = y_b]``.

    Args:
        probabilities: ``[B, K]``, rows sum to 1.
        labels: int64 ``[B]``, in 0..K-1.

    Returns:
        0-dim float64 in [0, 1]. Of classes that tie for the maximum, the first counts as the prediction.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Masksembles for Uncertainty Estimation", section 4.1.
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

    Source: the compressed deep ensemble paper (pruning and quantization), sections 3.2 and 3.4.
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

    Source: the compressed deep ensemble paper (pruning and quantization), sections 3.2 and 3.4.
    """
    _checks.probabilities("brier_score", "probabilities", probabilities, "[B, K]")
    _checks.labels("brier_score", labels, probabilities)
    target = F.one_hot(labels, probabilities.shape[-1])
    return (probabilities.double() - target).square().sum(-1).mean()
