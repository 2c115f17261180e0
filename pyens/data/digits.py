"""scikit-learn's bundled handwritten digits, with some of the classes held out as unknown."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Images and labels, row by row."""

    images: Tensor  # [N, 64] float32 in [0, 1], rows of 8 x 8 pixels
    labels: Tensor  # [N] int64


@dataclass(frozen=True)
class Digits:
    """The digits a model may learn, in three disjoint parts, and those it never meets.

    In `train`, `validation` and `test` label k means the digit ``classes[k]``, so labels are 0..K-1 whichever
    classes are held out. In `unknown` the label is the digit itself.
    """

    classes: tuple[int, ...]
    train: Split
    validation: Split
    test: Split
    unknown: Split


def load_digits(
    *,
    unknown: Sequence[int] = (8, 9),
    fractions: tuple[float, float, float] = (0.5, 0.1, 0.4),
    seed: int = 0,
) -> Digits:
    """The 1,797 images of 8 x 8 pixels that come with scikit-learn: real data without a download.

    Args:
        unknown: digits to hold out, all their images into `Digits.unknown`. Two classes or more must stay.
        fractions: shares of the known digits' images for train, validation and test; above 0, together 1.
        seed: of the permutation that decides which image goes where.

    Returns:
        Digits, of CPU tensors, the same for the same arguments.

    Raises:
        ImportError: without scikit-learn.
        TypeError, ValueError: for arguments that are not as above.
    """
    classes = _known_classes(unknown)
    _check_fractions(fractions)
    images, digits = _read()

    known = torch.isin(digits, torch.tensor(classes))
    labels = torch.searchsorted(
        torch.tensor(classes), digits
    )  # index in classes; only meant for known digits
    rows = known.nonzero().squeeze(1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    # Rounded cumulated shares: the parts cover every row once whatever the fractions round to.
    first, second = round(fractions[0] * len(rows)), round((fractions[0] + fractions[1]) * len(rows))
    train, validation, test = (Split(images[r], labels[r]) for r in rows.tensor_split((first, second)))
    return Digits(classes, train, validation, test, unknown=Split(images[~known], digits[~known]))


def _known_classes(unknown: Sequence[int]) -> tuple[int, ...]:
    for digit in unknown:
        if not isinstance(digit, Integral):
            raise TypeError(f"load_digits: unknown: expected ints, got {type(digit).__name__}")
        if not 0 <= digit <= 9:
            raise ValueError(f"load_digits: unknown: expected digits in 0..9, got {digit}")
    classes = tuple(digit for digit in range(10) if digit not in unknown)
    if len(classes) < 2:
        raise ValueError(
            f"load_digits: unknown: expected two known classes or more to be left, got {len(classes)}"
        )
    return classes


def _check_fractions(fractions: tuple[float, float, float]) -> None:
    if len(fractions) != 3:
        raise ValueError(
            f"load_digits: fractions: expected 3 (train, validation, test), got {len(fractions)}"
        )
    if not all(f > 0 for f in fractions) or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"load_digits: fractions: expected shares above 0 that sum to 1, got {tuple(fractions)}"
        )


def _read() -> tuple[Tensor, Tensor]:
    """Images [1797, 64] scaled to [0, 1], digits [1797]."""
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise ImportError("pyens.data.load_digits needs scikit-learn: pip install pyens[demo]") from error
    images, digits = bundled(return_X_y=True)
    return torch.from_numpy(images).float() / 16, torch.from_numpy(digits).long()
