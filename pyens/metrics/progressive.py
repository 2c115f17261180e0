"""How good predictions of yes or no are, of an ensemble's members and of all together, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyens.metrics import _checks

RANGE = 32.0  # of logits that are told apart


class ProgressiveScores:
    r"""Scores of a stream whose labels are known after each prediction, such as clicks.

        scores = pyens.metrics.ProgressiveScores()
        for x, clicked in stream:
            scores.update(model(x), clicked)    # before it learns from them
        scores.compute()["auroc"]               # [E + 1]

    Each score is of every member and then of the ensemble, whose probability is the mean of theirs. What is
    kept does not grow with the rows: sums, and for the AUC a histogram of the logits of each label.

    - log_loss: ``mean_b [-y log p - (1 - y) log(1 - p)]``, from logits: infinite only where these are.
    - auroc: as `pyens.metrics.auroc`, but that logits of one bin count as equal: it is off by no more than
      auroc_error, half of the share of pairs of a 1 and a 0 that share one.
    - calibration: the mean probability divided by the share of ones: 1 if as many are predicted as there are.
    - variation: the mean over the rows of the standard deviation of the members' probabilities, E - 1 below
      (`value_variation`), and variation_coefficient, the mean of its ratio to the ensemble's probability. One
      number each.

    Args:
        bins: of logits from -32 to 32; what lies beyond is in the outermost ones.

    Raises:
        TypeError, ValueError: an argument that is not as above.

    Source: progressive validation and rank loss (1 - AUC) as in "Anti-Distillation", section 5; variation of
    "Beyond Point Estimate", section 4.
    """

    def __init__(self, *, bins: int = 8192) -> None:
        _checks.bins("ProgressiveScores", bins)
        self.bins = bins
        self.rows = 0
        self._sums: Tensor | None = None  # float64 [2, E + 1]: of log losses, of probabilities
        self._counts: Tensor | None = None  # int64 [2, E + 1, bins], of zeros and of ones
        self._ones = 0.0
        self._variation = [0.0, 0.0]

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch: logits of a 1 `[E, B]` or `[E, B, 1]`, labels 0 or 1, `[B]` or `[B, 1]`.

        A NaN makes the scores of its member, and those of the ensemble, NaN from here on.
        """
        logits, labels = _as_rows(logits, labels)
        if self._counts is not None and self._counts.shape[1] != len(logits) + 1:
            raise ValueError(
                f"ProgressiveScores.update: logits: expected {self._counts.shape[1] - 1} members as before, "
                f"got {len(logits)}"
            )
        z, y = logits.double(), labels.double()
        # Of the ensemble: log of the mean of p, and of 1 - p, without p.
        log_p = F.logsigmoid(z).logsumexp(0) - math.log(len(z))
        log_q = F.logsigmoid(-z).logsumexp(0) - math.log(len(z))
        z = torch.cat([z, (log_p - log_q).unsqueeze(0)])
        own = F.softplus(torch.where(y > 0, -z[:-1], z[:-1]))
        losses = torch.cat([own, -torch.where(y > 0, log_p, log_q).unsqueeze(0)])
        p = torch.cat([z[:-1].sigmoid(), log_p.exp().unsqueeze(0)])
        sums = torch.stack([losses.sum(1), p.sum(1)])
        self._sums = sums if self._sums is None else self._sums.to(sums.device) + sums
        self._ones += float(y.sum())
        self.rows += len(y)
        counts = self._binned(z, y)
        self._counts = counts if self._counts is None else self._counts.to(counts.device) + counts
        if len(z) > 2:
            deviation = p[:-1].std(0)
            self._variation[0] += float(deviation.sum())
            self._variation[1] += float(torch.where(deviation == 0, 0, deviation / p[-1]).sum())

    def compute(self) -> dict[str, Tensor]:
        """The scores of all rows so far, float64. NaN where they say nothing: an AUC without both labels."""
        if self._sums is None or self._counts is None:
            raise ValueError("ProgressiveScores.compute: expected an update before, got none")
        losses, sums = self._sums
        zeros, ones = self._counts.double()
        pairs = zeros.sum(-1) * ones.sum(-1)
        below = zeros.cumsum(-1) - zeros
        lost = losses.isnan()
        found = {
            "log_loss": losses / self.rows,
            "auroc": ((below + zeros / 2) * ones).sum(-1) / pairs,
            "auroc_error": (zeros * ones).sum(-1) / 2 / pairs,
            "calibration": sums / (self._ones or math.nan),
        }
        found = {name: torch.where(lost, math.nan, value) for name, value in found.items()}
        several = len(losses) > 2
        for name, total in zip(("variation", "variation_coefficient"), self._variation, strict=True):
            found[name] = torch.tensor(total / self.rows if several else math.nan, dtype=torch.float64)
        return found

    def reset(self) -> None:
        """Forgets all rows: for scores of each hour, or of each million."""
        self.rows, self._sums, self._counts, self._ones, self._variation = 0, None, None, 0.0, [0.0, 0.0]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes; numbers and tensors."""
        return {
            "bins": self.bins,
            "rows": self.rows,
            "sums": self._sums,
            "counts": self._counts,
            "ones": self._ones,
            "variation": list(self._variation),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        expected = self.state_dict().keys()
        if set(state) != set(expected):
            raise ValueError(
                f"ProgressiveScores.load_state_dict: state: expected {', '.join(expected)}, "
                f"got {', '.join(map(str, state)) or 'nothing'}"
            )
        if state["bins"] != self.bins:
            raise ValueError(
                f"ProgressiveScores.load_state_dict: state: expected {self.bins} bins, got {state['bins']}"
            )
        self.rows, self._sums, self._counts = state["rows"], state["sums"], state["counts"]
        self._ones, self._variation = state["ones"], list(state["variation"])

    def _binned(self, z: Tensor, y: Tensor) -> Tensor:
        place = (
            (z.nan_to_num(0.0, RANGE, -RANGE).clamp(-RANGE, RANGE) + RANGE) * (self.bins / 2 / RANGE)
        ).long()
        place = place.clamp(max=self.bins - 1) + self.bins * torch.arange(len(z), device=z.device).unsqueeze(
            1
        )
        place = place + self.bins * len(z) * (y > 0).long()
        counts = torch.bincount(place.flatten(), minlength=2 * len(z) * self.bins)
        return counts.view(2, len(z), self.bins)


def _as_rows(logits: Any, labels: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"ProgressiveScores.update: logits: expected a floating point tensor, got {kind}")
    if not isinstance(labels, Tensor) or labels.is_complex():
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"ProgressiveScores.update: labels: expected a tensor of real numbers, got {kind}")
    if logits.dim() == 3 and logits.shape[-1] == 1:
        logits = logits.squeeze(-1)
    if logits.dim() != 2 or logits.numel() == 0:
        raise ValueError(
            f"ProgressiveScores.update: logits: expected [E, B] or [E, B, 1], none of them 0, got shape "
            f"{list(logits.shape)}"
        )
    if labels.dim() == 2 and labels.shape[-1] == 1:
        labels = labels.squeeze(-1)
    if labels.shape != logits.shape[1:]:
        raise ValueError(
            f"ProgressiveScores.update: labels: expected shape [{logits.shape[1]}], got {list(labels.shape)}"
        )
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("ProgressiveScores.update: labels: expected 0 or 1, got another number")
    return logits, labels
