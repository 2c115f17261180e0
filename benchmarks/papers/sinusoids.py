"""Two noisy sinusoids to be told apart: uncertainty that fits in a picture."""

from typing import NamedTuple

import torch
from torch import Tensor


class Points(NamedTuple):
    """Points of the plane and their classes, row by row."""

    positions: Tensor  # [N, 2] float32: x, y
    labels: Tensor  # [N] int64, 0 or 1


def two_sinusoids(
    num_points: int,
    *,
    noise: float = 0.3,
    gap: float = 2.0,
    phase: float = 0.0,
    generator: torch.Generator | None = None,
) -> Points:
    """Points around two sinusoids: y = sin(x + label phase) + (label - 1/2) gap + noise N(0, 1).

    With the defaults one lies above the other, and one line parts them. With gap 0 and phase pi they cross.

    Args:
        num_points: N >= 1; half of them, or one less, are of class 1.
        noise: standard deviation, at least 0.
        gap: vertical distance of the two.
        phase: by which class 1 is ahead.
        generator: to draw x, uniform in [-5, 5], and the noise from.

    Raises:
        ValueError: num_points below 1, noise below 0.

    Source: "Masksembles", Figure 4, which gives the range of x and no more.
    """
    if num_points < 1:
        raise ValueError(f"two_sinusoids: num_points: expected at least 1, got {num_points}")
    if not noise >= 0:
        raise ValueError(f"two_sinusoids: noise: expected at least 0, got {noise}")
    labels = torch.arange(num_points, device="cpu") % 2
    x = torch.rand(num_points, generator=generator, device="cpu") * 10 - 5
    y = (x + labels * phase).sin() + (labels - 0.5) * gap
    y = y + noise * torch.randn(num_points, generator=generator, device="cpu")
    return Points(torch.stack([x, y], 1), labels)
