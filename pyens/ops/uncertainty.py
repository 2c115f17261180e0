"""What an ensemble's outputs say together: predictive uncertainty, and moments over the members."""

from torch import Tensor

from pyens import reference
from pyens._types import Moments, Uncertainty
from pyens.ops._call import Given, first, operation


def predictive_uncertainty(logits: Tensor, *, from_probabilities: bool = False) -> Uncertainty:
    r"""Mean prediction and every measure of its uncertainty in one pass over the members' logits.

    With p_m = softmax(logits[m]), or the sigmoid of one binary logit, and p̄ = mean_m p_m, for each example:

        mean_probability    p̄
        predictive_entropy  H(p̄) = -Σ_k p̄_k log p̄_k              all that is uncertain
        expected_entropy    mean_m H(p_m)                          what every member is unsure of by itself
        mutual_information  H(p̄) - mean_m H(p_m)                   what the members disagree on
        distribution_pv     Σ_m KL(p_m ‖ p̄) = E · mutual_information
        vote_disagreement   1 - (largest number of members that agree on their most probable class) / E

    Args:
        logits: `[E, B, K]`, or `[E, B]` for one binary logit each. B may be 0.
        from_probabilities: they are probabilities already (of class 1, for `[E, B]`).

    Returns:
        `Uncertainty`, a named tuple: mean_probability is `[B, K]` (`[B]`, of class 1, for `[E, B]`), all
        others are `[B]`; in the dtype of the logits, entropies in nats.

    Right for logits of any magnitude: -inf is probability 0, and +inf as a binary logit probability 1. All
    is computed in float64 and rounded once. What members disagree on is a small difference of large
    entropies: from logits, mutual information and prediction variation are right to 1e-4 down to 1e-11 nats
    of mutual information, in float32 too. Entropies of logits are right to 1e-16 nats: relative to
    themselves to 1e-5 at a gap of 30 between the two largest logits, where they are 3e-12, and to 2 % at 40.
    Rounded probabilities have lost that: with `from_probabilities` all are as right as the members' rows sum
    to 1, some 1e-7 in float32 (of `[E, B]`, 1 - p is rounded in their dtype). Members that are equal, and a
    single one, disagree by exactly 0. Of classes that tie for the largest probability, the first gets the
    vote.
    An example with a NaN logit, or with +inf among several, becomes NaN as softmax has it, and no other.
    An example's results are the same bits for any number of threads and any examples beside it.

    Differentiable, twice and more, in all but the votes, which have no derivative: `vote_disagreement` never
    requires a gradient. Probabilities below the smallest normal number have no part in an entropy's gradient.
    Under autocast it runs in float32. Within `torch.func`, grad, vjp, jvp and vmap work (also
    nested).

    Raises:
        ValueError: a shape that does not fit, no member, no class; with `from_probabilities` a row that has a
            negative entry or does not sum to 1 within 1e-4 (16-bit: and a rounding), unless it has a NaN. On
            CUDA such a row raises nothing, and makes its example NaN.
        TypeError: an unsupported dtype.
        NotImplementedError: CUDA tensors where pyens was built without CUDA.

    Source: the prediction variation of "Beyond Point Estimate"; entropies and mutual
    information of "Deep Ensemble"; reference in `pyens.reference.predictive_uncertainty`.
    """
    return Uncertainty(*_predictive_uncertainty(logits, from_probabilities, False)[:6])


def predictive_moments(outputs: Tensor, *, variances: Tensor | None = None) -> Moments:
    r"""Mean and spread over the members, element by element, in one pass.

        mean       mean_m y_m
        std        sqrt(Σ_m (y_m - mean)² / (E - 1)), the value prediction variation
        min, max   over the members
        aleatoric  mean_m of `variances`
        epistemic  1/E Σ_m (y_m - mean)²; with `aleatoric` it adds up to the variance of the mixture

    Args:
        outputs: `[E, B]` or `[E, B, K]`, predictions of any kind; with `variances`, the members' means.
        variances: the members' own variances, shaped as `outputs`, in its units squared.

    Returns:
        `Moments`, a named tuple of `[B]` or `[B, K]` in the dtype of the outputs; `aleatoric` and `epistemic`
        are None without `variances`. For one member std is NaN, as in torch, and epistemic 0.

    All sums are float64, of differences from one of the members: an offset costs no digits, no member is too
    large or too small for its square, and members that are equal have their own value as mean and a std of
    exactly 0.
    NaN and Inf as in torch. The same bits for any number of threads and any elements beside.

    Differentiable, twice and more, as the torch functions are: where the std is 0 its gradient is 0, and
    members that share an extreme share its gradient. Under autocast it runs in float32. Within `torch.func`,
    grad, vjp, jvp and vmap work (also nested).

    Raises:
        ValueError: a shape that does not fit, no member, no output.
        TypeError: mixed or unsupported dtypes, mixed devices.
        NotImplementedError: CUDA tensors where pyens was built without CUDA.

    Source: value PV of "Beyond Point Estimate"; predictive variance of "Deep
    Ensemble", which divides by E; reference in `pyens.reference.predictive_moments`.
    """
    moments = _predictive_moments(outputs, variances)
    return Moments(*(moments if variances is not None else (*moments[:4], None, None)))


def _vmap(n: int, dims: Given, given: Given) -> tuple[Given, int, tuple[int, ...]]:
    # The mapped dimension joins the batch.
    joined, batch = dict(given), 0
    for name, tensor in given.items():
        if isinstance(tensor, Tensor):
            stacked = first(n, tensor, dims[name]).movedim(0, 1)  # [E, n, B, ..]
            joined[name], batch = stacked.flatten(1, 2), stacked.shape[2]
    return joined, 0, (n, batch)


def _reference_uncertainty(logits: Tensor, from_probabilities: bool, with_votes: bool) -> tuple[Tensor, ...]:
    return tuple(reference.predictive_uncertainty(logits, from_probabilities=from_probabilities))


def _reference_moments(outputs: Tensor, variances: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x for x in reference.predictive_moments(outputs, variances=variances) if x is not None)


_predictive_uncertainty = operation(
    "predictive_uncertainty", _reference_uncertainty, _vmap, outputs=lambda _: 6, constant_output=5
)
_predictive_moments = operation(
    "predictive_moments",
    _reference_moments,
    _vmap,
    outputs=lambda given: 4 if given["variances"] is None else 6,
)
