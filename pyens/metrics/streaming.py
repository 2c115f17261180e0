"""Measures over the member axis when members come in chunks, so that E of them need not fit in memory.

measure = PredictiveUncertainty()
for chunk in chunks:
    measure.update(chunk(x))  # [e, B, K]
result = measure.compute()
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyens._kinds import check_real
from pyens._types import Moments, Uncertainty
from pyens.metrics import _checks
from pyens.reference.uncertainty import entropy, predictive_uncertainty


class PredictiveUncertainty:
    """`pyens.ops.predictive_uncertainty` of members that come in chunks.

    Holds, per example, the mean of the members' probabilities, the sum of their entropies and of their
    divergences from that mean, and the votes for each class: the memory of a member or two, whatever E is.
    All of it is float64, and so is what is computed of a chunk: only `compute` rounds. Two chunks r of n_r
    members with the mean probabilities p̄_r have together, without a difference of entropies,

        Σ_m KL(p_m ‖ p̄) = Σ_r (Σ_{m in r} KL(p_m ‖ p̄_r) + n_r KL(p̄_r ‖ p̄))

    Gradients flow as they do through the op, which keeps every chunk alive: call `update` under
    `torch.no_grad()` where none are needed.

    Args:
        from_probabilities: the members are probabilities, not logits.

    Source: as `pyens.ops.predictive_uncertainty`.
    """

    def __init__(self, *, from_probabilities: bool = False) -> None:
        self.from_probabilities = from_probabilities
        self.count = 0  # members so far
        self._dtype = torch.float32
        self._shape: list[int] = []  # of a member
        # The first members bring the rest.
        self._mean: Tensor  # [B, K] or [B] float64, of the probabilities
        self._entropies: Tensor  # [B] float64, summed
        self._divergences: Tensor  # [B] float64, Σ_m KL(p_m ‖ mean)
        self._votes: Tensor  # [B, K] int64

    def update(self, members: Tensor) -> None:
        """Adds a chunk of e >= 1 members, `[e, B, K]` or `[e, B]`, always of the same B and K.

        Raises:
            TypeError, ValueError: as `pyens.ops.predictive_uncertainty`, and for another B or K than before.
        """
        check_real("PredictiveUncertainty.update", "members", members)
        if self.count:
            _check_shape("PredictiveUncertainty.update: members", list(members.shape[1:]), self._shape)
        op = torch.ops.pyens.predictive_uncertainty
        chunk = PredictiveUncertainty(from_probabilities=self.from_probabilities)
        chunk._dtype = op(_no_example(members), self.from_probabilities, False)[0].dtype
        if self.from_probabilities:
            # Those of 16 bits sum to 1 to their own rounding, which the op does not forgive in float64.
            votes = op(members.detach(), True, True)[6]
            mean, _, expected, _, divergences, _ = predictive_uncertainty(
                members.double(), from_probabilities=True
            )
        else:
            mean, _, expected, _, divergences, _, votes = op(members.double(), False, True)
        chunk.count = len(members)
        chunk._shape = list(members.shape[1:])
        chunk._mean, chunk._entropies = mean, expected * chunk.count
        chunk._divergences = divergences
        chunk._votes = votes.long()
        self.merge(chunk)

    def merge(self, other: PredictiveUncertainty) -> None:
        """Adds the members that `other` has met, for the same examples. `other` stays as it is.

        Raises:
            ValueError: for another B or K.
        """
        _checks.other("PredictiveUncertainty.merge", self, other)
        if not other.count:
            return
        if self.count:
            _check_shape("PredictiveUncertainty.merge: other", other._shape, self._shape)
            mean = self._mean + (other._mean - self._mean) * (other.count / (self.count + other.count))
            own, others = (
                part._divergences + part.count * _divergence(_classes(part._mean), _classes(mean))
                for part in (self, other)
            )
            self._mean, self._divergences = mean, own + others
            self._entropies = self._entropies + other._entropies
            self._votes = self._votes + other._votes
        else:
            self._dtype, self._shape = other._dtype, other._shape
            self._mean, self._entropies = other._mean, other._entropies
            self._divergences, self._votes = other._divergences, other._votes
        self.count += other.count

    def compute(self) -> Uncertainty:
        """The measures of all members so far, in the dtype of the first chunk.

        Raises:
            ValueError: before the first member.
        """
        _check_count("PredictiveUncertainty.compute", self.count)
        expected = self._entropies / self.count
        disagreement = 1 - self._votes.amax(-1).double() / self.count
        measures = Uncertainty(
            mean_probability=self._mean,
            predictive_entropy=entropy(_classes(self._mean)),
            expected_entropy=expected,
            mutual_information=self._divergences / self.count,
            distribution_pv=self._divergences,
            vote_disagreement=torch.where(expected.isnan(), torch.nan, disagreement).detach(),
        )
        return Uncertainty(*(measure.to(self._dtype) for measure in measures))


class PredictiveMoments:
    """`pyens.ops.predictive_moments` of members that come in chunks.

    Holds, per element, a member, the mean of the differences from it, squared deviations, minimum and
    maximum, merged (Chan), and the sum of the members' variances: the memory of a few members, whatever E is.
    All of it is float64, and so is what is computed of a chunk: only `compute` rounds. An offset costs no
    digits, and members that are all equal have a std of exactly 0.

    Gradients flow as they do through the op, which keeps every chunk alive: call `update` under
    `torch.no_grad()` where none are needed.

    Source: as `pyens.ops.predictive_moments`.
    """

    def __init__(self) -> None:
        self.count = 0  # members so far
        self._dtype = torch.float32
        self._shape: list[int] = []  # of a member
        # The first members bring the rest, all float64 and shaped as a member.
        self._member: Tensor  # one of them, 0 where it is not finite
        self._offset: Tensor  # mean - member
        self._squares: Tensor  # Σ_m (y_m - mean)²
        self._min: Tensor
        self._max: Tensor
        self._variances: Tensor | None = None  # summed; None without

    def update(self, members: Tensor, variances: Tensor | None = None) -> None:
        """Adds a chunk of e >= 1 members, `[e, B]` or `[e, B, K]`, and their own variances: always or never.

        Raises:
            TypeError, ValueError: as `pyens.ops.predictive_moments`, for another shape than before, and for
                variances with some chunks only.
        """
        check_real("PredictiveMoments.update", "members", members)
        if variances is not None:
            check_real("PredictiveMoments.update", "variances", variances)
        if self.count:
            _check_shape("PredictiveMoments.update: members", list(members.shape[1:]), self._shape)
            _check_variances("PredictiveMoments.update: variances", variances, self._variances)
        op = torch.ops.pyens.predictive_moments
        chunk = PredictiveMoments()
        chunk._dtype = op(_no_example(members), None if variances is None else _no_example(variances))[
            0
        ].dtype
        exact = members.double()
        chunk._member = torch.where(exact[0].isfinite(), exact[0], 0).detach()
        chunk._offset, _, _, _, aleatoric, epistemic = op(
            exact - chunk._member, None if variances is None else variances.double()
        )
        chunk.count = len(members)
        chunk._shape = list(members.shape[1:])
        chunk._squares = epistemic * chunk.count
        chunk._min, chunk._max = exact.amin(0), exact.amax(0)
        chunk._variances = None if variances is None else aleatoric * chunk.count
        self.merge(chunk)

    def merge(self, other: PredictiveMoments) -> None:
        """Adds the members that `other` has met, for the same examples. `other` stays as it is.

        Raises:
            ValueError: for another shape, or if only one of both has variances.
        """
        _checks.other("PredictiveMoments.merge", self, other)
        if not other.count:
            return
        count = self.count + other.count
        if self.count:
            _check_shape("PredictiveMoments.merge: other", other._shape, self._shape)
            _check_variances("PredictiveMoments.merge: other", other._variances, self._variances)
            difference = (other._member - self._member) + (other._offset - self._offset)
            offset = self._offset + difference * (other.count / count)
            # An infinite mean stays what the sum would be.
            self._offset = torch.where(difference.isfinite(), offset, self._offset + other._offset)
            between = difference.square() * (self.count * other.count / count)
            self._squares = self._squares + other._squares + between
            self._min = torch.minimum(self._min, other._min)
            self._max = torch.maximum(self._max, other._max)
            if self._variances is not None and other._variances is not None:
                self._variances = self._variances + other._variances
        else:
            self._dtype, self._shape = other._dtype, other._shape
            self._member, self._offset = other._member, other._offset
            self._squares, self._variances = other._squares, other._variances
            self._min, self._max = other._min, other._max
        self.count = count

    def compute(self) -> Moments:
        """The moments of all members so far, in the dtype of the first chunk.

        Raises:
            ValueError: before the first member.
        """
        _check_count("PredictiveMoments.compute", self.count)
        variances = self._variances
        return Moments(
            mean=(self._member + self._offset).to(self._dtype),
            std=(self._squares / (self.count - 1)).sqrt().to(self._dtype),
            min=self._min.to(self._dtype),
            max=self._max.to(self._dtype),
            aleatoric=None if variances is None else (variances / self.count).to(self._dtype),
            epistemic=None if variances is None else (self._squares / self.count).to(self._dtype),
        )


def _no_example(members: Tensor) -> Tensor:
    """What the op checks and gives the dtype of its result for, at no cost."""
    return members.detach()[:, :0] if members.dim() > 1 else members


def _classes(probabilities: Tensor) -> Tensor:
    """`[B, K]`, also of `[B]` probabilities of class 1."""
    p = probabilities
    return torch.stack([1 - p, p], -1) if p.dim() == 1 else p


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) over the last axis as ``Σ_k p_k (x - log(1 + x))``, x = q_k/p_k - 1: no term is negative, and
    where p is near q the logarithms do not cancel. q is 0 only where p is."""
    present = p >= torch.finfo(p.dtype).tiny
    # 1 where there is no p keeps the division and its gradient finite.
    x = (q - p) / torch.where(present, p, 1)
    return torch.where(present, p * (x - x.log1p()), q).sum(-1)


def _check_shape(argument: str, shape: list[int], expected: list[int]) -> None:
    if shape != expected:
        raise ValueError(f"{argument}: expected members of shape {expected} as before, got {shape}")


def _check_variances(argument: str, variances: Tensor | None, before: Tensor | None) -> None:
    if (variances is None) != (before is None):
        expected, got = ("none", "some") if before is None else ("some", "none")
        raise ValueError(f"{argument}: expected {expected} as before, got {got}")


def _check_count(function: str, count: int) -> None:
    if count == 0:
        raise ValueError(f"{function}: expected at least one member before, got none")
