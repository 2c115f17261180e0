"""Measures over the member axis when members come in chunks, so that E of them need not fit in memory.

measure = PredictiveUncertainty()
for chunk in chunks:
    measure.update(chunk(x))  # [e, B, K]
result = measure.compute()
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyens.ops.uncertainty import Moments, Uncertainty
from pyens.reference.uncertainty import entropy


class PredictiveUncertainty:
    """`pyens.ops.predictive_uncertainty` of members that come in chunks.

    Holds, per example, the sum of the members' probabilities, of their entropies, and the votes for each
    class: the memory of one member, whatever E is. Sums of chunks are added in float64.

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
        self._probabilities: Tensor | None = None  # [B, K] or [B] float64, summed
        self._entropies: Tensor | None = None  # [B] float64, summed
        self._votes: Tensor | None = None  # [B, K] int64

    def update(self, members: Tensor) -> None:
        """Adds a chunk of e >= 1 members, `[e, B, K]` or `[e, B]`, always of the same B and K.

        Raises:
            TypeError, ValueError: as `pyens.ops.predictive_uncertainty`, and for another B or K than before.
        """
        if self.count:
            _check_shape("PredictiveUncertainty.update: members", list(members.shape[1:]), self._shape)
        mean, _, expected, _, _, _, votes = torch.ops.pyens.predictive_uncertainty(
            members, self.from_probabilities, True
        )
        chunk = PredictiveUncertainty(from_probabilities=self.from_probabilities)
        chunk.count = len(members)
        chunk._dtype = mean.dtype
        chunk._shape = list(members.shape[1:])
        chunk._probabilities = mean.double() * chunk.count
        chunk._entropies = expected.double() * chunk.count
        chunk._votes = votes.long()
        self.merge(chunk)

    def merge(self, other: PredictiveUncertainty) -> None:
        """Adds the members that `other` has met, for the same examples. `other` stays as it is.

        Raises:
            ValueError: for another B or K.
        """
        if not other.count:
            return
        if self.count:
            _check_shape("PredictiveUncertainty.merge: other", other._shape, self._shape)
            self._probabilities = self._probabilities + other._probabilities
            self._entropies = self._entropies + other._entropies
            self._votes = self._votes + other._votes
        else:
            self._dtype, self._shape = other._dtype, other._shape
            self._probabilities, self._entropies = other._probabilities, other._entropies
            self._votes = other._votes
        self.count += other.count

    def compute(self) -> Uncertainty:
        """The measures of all members so far, in the dtype of the first chunk.

        Raises:
            ValueError: before the first member.
        """
        _check_count("PredictiveUncertainty.compute", self.count)
        mean = self._probabilities / self.count
        both = torch.stack([1 - mean, mean], -1) if mean.dim() == 1 else mean
        total = entropy(both)
        expected = self._entropies / self.count
        information = (total - expected).clamp_min(0)
        disagreement = 1 - self._votes.amax(-1).double() / self.count
        measures = Uncertainty(
            mean_probability=mean,
            predictive_entropy=total,
            expected_entropy=expected,
            mutual_information=information,
            distribution_pv=information * self.count,
            vote_disagreement=torch.where(expected.isnan(), torch.nan, disagreement).detach(),
        )
        return Uncertainty(*(measure.to(self._dtype) for measure in measures))


class PredictiveMoments:
    """`pyens.ops.predictive_moments` of members that come in chunks.

    Holds, per element, mean, squared deviations, minimum and maximum, merged in float64 (Chan), and the sum
    of the members' variances: the memory of a few members, whatever E is. Members that are all equal have a
    std of exactly 0.

    Gradients flow as they do through the op, which keeps every chunk alive: call `update` under
    `torch.no_grad()` where none are needed.

    Source: as `pyens.ops.predictive_moments`.
    """

    def __init__(self) -> None:
        self.count = 0  # members so far
        self._dtype = torch.float32
        self._shape: list[int] = []  # of a member
        # All float64 and shaped as a member.
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None  # Σ_m (y_m - mean)²
        self._min: Tensor | None = None
        self._max: Tensor | None = None
        self._variances: Tensor | None = None  # summed; None without

    def update(self, members: Tensor, variances: Tensor | None = None) -> None:
        """Adds a chunk of e >= 1 members, `[e, B]` or `[e, B, K]`, and their own variances: always or never.

        Raises:
            TypeError, ValueError: as `pyens.ops.predictive_moments`, for another shape than before, and for
                variances with some chunks only.
        """
        if self.count:
            _check_shape("PredictiveMoments.update: members", list(members.shape[1:]), self._shape)
            _check_variances("PredictiveMoments.update: variances", variances, self._variances)
        mean, _, low, high, aleatoric, epistemic = torch.ops.pyens.predictive_moments(members, variances)
        chunk = PredictiveMoments()
        chunk.count = len(members)
        chunk._dtype = mean.dtype
        chunk._shape = list(members.shape[1:])
        chunk._mean, chunk._squares = mean.double(), epistemic.double() * chunk.count
        chunk._min, chunk._max = low.double(), high.double()
        chunk._variances = None if variances is None else aleatoric.double() * chunk.count
        self.merge(chunk)

    def merge(self, other: PredictiveMoments) -> None:
        """Adds the members that `other` has met, for the same examples. `other` stays as it is.

        Raises:
            ValueError: for another shape, or if only one of both has variances.
        """
        if not other.count:
            return
        count = self.count + other.count
        if self.count:
            _check_shape("PredictiveMoments.merge: other", other._shape, self._shape)
            _check_variances("PredictiveMoments.merge: other", other._variances, self._variances)
            difference = other._mean - self._mean
            mean = self._mean + difference * (other.count / count)
            # An infinite mean stays what the sum would be.
            self._mean = torch.where(difference.isfinite(), mean, self._mean + other._mean)
            between = difference.square() * (self.count * other.count / count)
            self._squares = self._squares + other._squares + between
            self._min = torch.minimum(self._min, other._min)
            self._max = torch.maximum(self._max, other._max)
            if self._variances is not None:
                self._variances = self._variances + other._variances
        else:
            self._dtype, self._shape = other._dtype, other._shape
            self._mean, self._squares = other._mean, other._squares
            self._min, self._max, self._variances = other._min, other._max, other._variances
        self.count = count

    def compute(self) -> Moments:
        """The moments of all members so far, in the dtype of the first chunk.

        Raises:
            ValueError: before the first member.
        """
        _check_count("PredictiveMoments.compute", self.count)
        with_variances = self._variances is not None
        moments = Moments(
            mean=self._mean,
            std=(self._squares / (self.count - 1)).sqrt(),
            min=self._min,
            max=self._max,
            aleatoric=self._variances / self.count if with_variances else None,
            epistemic=self._squares / self.count if with_variances else None,
        )
        return Moments(*(None if x is None else x.to(self._dtype) for x in moments))


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
