"""How uncertain an ensemble is about each example, and how much of that is its members disagreeing.

The total, the entropy of the mean prediction, splits into what every member is unsure of by itself (expected
entropy) and what they disagree on (mutual information).
"""

from torch import Tensor

from pyens.metrics import _checks
from pyens.ops.uncertainty import predictive_uncertainty
from pyens.reference.uncertainty import entropy


def predictive_entropy(probabilities: Tensor) -> Tensor:
    """Entropy of the mean prediction, in nats: ``H(p̄) = -Σ_k p̄_k log p̄_k`` with ``p̄ = mean_m p_m``.

    Args:
        probabilities: ``[E, B, K]`` of the members, or ``[B, K]`` averaged already, or of one model; rows sum
            to 1.

    Returns:
        ``[B]`` in the dtype of the input, in [0, log K]. ``0 log 0`` is 0.

    Raises:
        TypeError, ValueError: for input that is not as above.

    Source: "Deep Ensemble", Predictive Entropy for Total Uncertainty; "Masksembles", section 4.1, ENT.
    """
    _checks.probabilities(
        "predictive_entropy", "probabilities", probabilities, "[B, K]", "[E, B, K]", empty_batch=True
    )
    mean = probabilities.double() if probabilities.ndim == 2 else probabilities.double().mean(0)
    return entropy(mean).to(probabilities.dtype)


def expected_entropy(probabilities: Tensor) -> Tensor:
    """Mean of the members' own entropies, in nats: ``mean_m H(p_m)``, the part that no member could resolve.

    Args:
        probabilities: ``[E, B, K]``, rows sum to 1.

    Returns:
        ``[B]`` in the dtype of the input, in [0, log K], at most the predictive entropy.

    Raises:
        TypeError, ValueError: for input that is not as above.

    Source: "Deep Ensemble", second term of the formula for Mutual Information.
    """
    _checks.probabilities("expected_entropy", "probabilities", probabilities, "[E, B, K]", empty_batch=True)
    return entropy(probabilities.double()).mean(0).to(probabilities.dtype)


def mutual_information(probabilities: Tensor) -> Tensor:
    """Disagreement of the members, in nats: ``MI = H(p̄) - mean_m H(p_m)``, the epistemic part.

    It equals the mean Kullback-Leibler divergence of the members from their mean, so it is never negative;
    what rounding would leave below 0 is 0. Of members nearly sure of one class, only logits still tell it:
    `pyens.ops.predictive_uncertainty`, which computes this too, takes them.

    Args:
        probabilities: ``[E, B, K]``, rows sum to 1.

    Returns:
        ``[B]`` in the dtype of the input, in [0, min(log E, log K)]; exactly 0 for members that are equal.

    Raises:
        TypeError, ValueError: for input that is not as above.

    Source: "Deep Ensemble", Mutual Information for Purely Epistemic Uncertainty.
    """
    _checks.probabilities("mutual_information", "probabilities", probabilities, "[E, B, K]", empty_batch=True)
    return predictive_uncertainty(probabilities, from_probabilities=True).mutual_information


def predictive_variance(outputs: Tensor, *, unbiased: bool = False) -> Tensor:
    """Variance of the members' outputs: ``1/E Σ_m (f_m - f̄)²``, or with ``1/(E-1)`` if `unbiased`.

    Args:
        outputs: ``[E, B]`` or ``[E, B, K]``, predictions of any kind: probabilities, logits, values.
        unbiased: divide by E - 1 instead of E. NaN for E = 1, as in torch.

    Returns:
        The input's shape without its member axis, in its dtype, >= 0; in the outputs' units squared.

    Raises:
        TypeError, ValueError: for input that is not as above.

    Source: "Deep Ensemble", Predictive Variance as Epistemic Uncertainty, which divides by E.
    """
    _checks.floats("predictive_variance", "outputs", outputs, "[E, B]", "[E, B, K]", empty_batch=True)
    deviations = outputs.double() - outputs[0].double()  # exactly 0 for equal members, at any offset
    squares = (deviations - deviations.mean(0)).square().sum(0)
    return (squares / (len(outputs) - int(unbiased))).to(outputs.dtype)
