"""Mean and standard deviation of every hidden unit over the training data, in one pass over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyens._kinds import REAL, check_tensor
from pyens.variation.strength import strength_of


class ActivationStatistics:
    """Mean and population standard deviation of hidden activations that come in batches.

        statistics = ActivationStatistics()
        for x in batches:
            statistics.update(strength_of(model, x).value)  # or: statistics.observe(model, x)
        strength_of(model, x, mean=statistics.mean, std=statistics.std)

    Holds mean and squared deviations of each unit in float64; batches are merged as Chan et al. do, so that
    an offset costs no digits. A unit that never changed has a std of exactly 0: it is dead, and its value in
    `pyens.ops.activation_strength` is 0. NaN and Inf in a unit reach its own statistics only.

    Source: the value feature of "Beyond Point Estimate".
    """

    def __init__(self) -> None:
        self.count = 0  # examples so far
        self._dtype = torch.float32
        # [ΣH] or [E, ΣH], float64
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None  # Σ_b (h_b - mean)²

    @torch.no_grad()
    def update(self, activations: Tensor) -> None:
        """Adds a batch of hidden activations, `[B, ΣH]` or `[E, B, ΣH]`, always of the same E and ΣH.

        Raises:
            TypeError: not floating point.
            ValueError: another shape than before.
        """
        check_tensor("ActivationStatistics.update", "activations", activations)
        if activations.dtype not in REAL:
            raise TypeError(
                f"ActivationStatistics.update: activations: expected floating point, got {activations.dtype}"
            )
        if activations.dim() not in (2, 3):
            raise ValueError(
                "ActivationStatistics.update: activations: expected [B, units] or [E, B, units], "
                f"got shape {list(activations.shape)}"
            )
        batch = ActivationStatistics()
        batch.count = activations.shape[-2]
        batch._dtype = activations.dtype
        h = activations.double()
        # Relative to one example: units that never change then have deviations of exactly 0.
        first = h[..., :1, :]
        shift = torch.where(first.isfinite(), first, 0) if batch.count else h.new_zeros(())
        deviation = h - shift
        offset = deviation.sum(-2) / max(batch.count, 1)
        batch._mean = offset + (shift.squeeze(-2) if batch.count else 0)
        batch._squares = (deviation - offset.unsqueeze(-2)).square().sum(-2)
        self.merge(batch)

    def observe(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Runs `module(*args, **kwargs)`, adds its hidden activations, and returns its output.

        They are those of `pyens.variation.strength_of`, with its errors.
        """
        output, value, _ = strength_of(module, *args, **kwargs)
        self.update(value)
        return output

    def merge(self, other: ActivationStatistics) -> None:
        """Adds the examples that `other` has met. `other` stays as it is.

        Raises:
            ValueError: for other units.
        """
        if not isinstance(other, ActivationStatistics):
            got = type(other).__name__
            raise TypeError(f"ActivationStatistics.merge: other: expected ActivationStatistics, got {got}")
        if other._mean is None or other._squares is None:
            return
        if self._mean is None or self._squares is None:
            self.count, self._dtype = other.count, other._dtype
            self._mean, self._squares = other._mean, other._squares
            return
        if other._mean.shape != self._mean.shape:
            raise ValueError(
                f"ActivationStatistics: activations: expected units of shape {list(self._mean.shape)} as "
                f"before, got {list(other._mean.shape)}"
            )
        if other.count == 0:
            return
        count = self.count + other.count
        difference = other._mean - self._mean
        self._squares = (
            self._squares + other._squares + difference.square() * (self.count * other.count / count)
        )
        mean = self._mean + difference * (other.count / count)
        # An infinite mean stays what the sum would be.
        self._mean = torch.where(difference.isfinite(), mean, self._mean + other._mean)
        self.count = count

    @property
    def mean(self) -> Tensor:
        """`[ΣH]` or `[E, ΣH]`: float32, or float64 if the activations are.

        Raises:
            ValueError: before the first example.
        """
        return self._checked("mean", self._mean)

    @property
    def std(self) -> Tensor:
        """The population's, shaped and typed as `mean`.

        Raises:
            ValueError: before the first example.
        """
        return self._checked("std", None if self._squares is None else (self._squares / self.count).sqrt())

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and std."""
        return self.mean, self.std

    def _checked(self, name: str, statistic: Tensor | None) -> Tensor:
        if self.count == 0 or statistic is None:
            raise ValueError(f"ActivationStatistics.{name}: expected at least one example before, got none")
        return statistic.to(torch.float64 if self._dtype == torch.float64 else torch.float32)
