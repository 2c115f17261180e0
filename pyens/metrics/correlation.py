"""Do two quantities rise together, such as the prediction variations of two settings or two tasks?"""

import math

from torch import Tensor

from pyens.metrics import _checks, _ranks


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Linear correlation: ``Σ_b (x_b - x̄)(y_b - ȳ) / sqrt(Σ_b (x_b - x̄)² Σ_b (y_b - ȳ)²)``.

    Args:
        x: ``[B]``, finite.
        y: ``[B]``, finite, of the same dtype.

    Returns:
        0-dim float64 in [-1, 1]; NaN where x or y is constant, and for B = 1.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Beyond Point Estimate", Figures 2 and 3.
    """
    _check("pearson", x, y)
    return _pearson(x.double(), y.double())


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Rank correlation: the `pearson` of the ranks, where values that tie share the mean of their ranks.

    Args:
        x: ``[B]``, finite.
        y: ``[B]``, finite, of the same dtype.

    Returns:
        0-dim float64 in [-1, 1]: 1 for any increasing relation. NaN where x or y is constant, and for B = 1.
        Ranks have no gradient, and neither has the result.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: the companion of the Pearson correlation in "Beyond Point Estimate", Figures 2 and 3, for
    relations that are not linear.
    """
    _check("spearman", x, y)
    return _pearson(_ranks.average_ranks(x), _ranks.average_ranks(y))


def _check(function: str, x: Tensor, y: Tensor) -> None:
    for name, value in (("x", x), ("y", y)):
        _checks.floats(function, name, value, "[B]")
        _checks.finite(function, name, value)
    _checks.like(function, "y", y, "x", x)


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    return (_direction(x) * _direction(y)).sum().clamp(-1.0, 1.0)


def _direction(values: Tensor) -> Tensor:
    """The deviations from the mean divided by their norm; NaN (0/0) where there are none."""
    # To numbers below 1 by a power of 2, which rounds nothing, so that no sum overflows or underflows.
    exponent = math.frexp(values.detach().abs().amax().item())[1]
    deviations = deviations_of(values * math.ldexp(1.0, -max(exponent, -1000)))
    deviations = deviations / deviations.detach().abs().amax()  # so that no square overflows
    norm: Tensor = deviations.norm()
    return deviations / norm


def deviations_of(values: Tensor) -> Tensor:
    """From the mean: exactly 0 where all are equal, and right where they are equal but for a rounding."""
    # The first mean may be off by a rounding of the values, which the second one finds.
    deviations = values - values.mean()
    deviations = deviations - deviations.mean()
    return deviations.masked_fill((values == values[0]).all(), 0.0)
