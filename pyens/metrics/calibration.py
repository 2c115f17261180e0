"""Does a confidence of 90 % mean right 90 times in 100? The reliability curve and errors summed over it."""

from typing import NamedTuple

from torch import Tensor

from pyens._types import Binning
from pyens.metrics import _bins, _checks


class ReliabilityCurve(NamedTuple):
    """Per confidence bin, what was claimed and what came true. An empty bin has count 0 and NaN means."""

    confidence: Tensor  # [bins] float64, mean of max_k p
    accuracy: Tensor  # [bins] float64, share of right predictions
    count: Tensor  # type: ignore[assignment]  # [bins] int64, examples in the bin


def reliability_curve(
    probabilities: Tensor, labels: Tensor, *, bins: int = 15, binning: Binning = "width"
) -> ReliabilityCurve:
    """Mean confidence and accuracy in bins ``(lo, hi]`` over the confidence ``max_k p_bk``.

    Bins of equal width: bin i of n is ``(i/n, (i+1)/n]``, its edges rounded to the dtype of the
    probabilities; confidence 1 is in the last bin. Bins of equal mass: the upper edge of bin i is the
    ``⌈(i+1) B/n⌉``-th smallest confidence, so that equal confidences always share a bin.

    Args:
        probabilities: ``[B, K]``, rows sum to 1.
        labels: int64 ``[B]``, in 0..K-1.
        bins: number of bins, at least 1.
        binning: ``"width"`` or ``"mass"``.

    Returns:
        ReliabilityCurve of three ``[bins]`` tensors.

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: the bins behind the expected calibration error as "Deep Ensemble" describes it.
    """
    return _curve(_sums("reliability_curve", probabilities, labels, bins, binning, classwise=False))


def expected_calibration_error(
    probabilities: Tensor, labels: Tensor, *, bins: int = 15, binning: Binning = "width"
) -> Tensor:
    """Gap of confidence and accuracy, averaged over examples: ``Σ_i n_i/B · |accuracy_i - confidence_i|``.

    The bins are those of `reliability_curve`; empty bins add nothing.

    Args:
        probabilities: ``[B, K]``, rows sum to 1.
        labels: int64 ``[B]``, in 0..K-1.
        bins: number of bins, at least 1. The value depends on it: compare only what was binned alike.
        binning: ``"width"``, the usual one, or ``"mass"`` (adaptive).

    Returns:
        0-dim float64 in [0, 1].

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Deep Ensemble", Expected Calibration Error; the binned estimate of the discrepancy that
    "Masksembles", section 4.1, defines as an expectation.
    """
    return _error(_sums("expected_calibration_error", probabilities, labels, bins, binning, classwise=False))


def classwise_calibration_error(
    probabilities: Tensor, labels: Tensor, *, bins: int = 15, binning: Binning = "width"
) -> Tensor:
    """Gap of claimed probability and frequency, for every class: ``1/K Σ_k Σ_i n_ki/B · |f_ki - p̄_ki|``.

    Bin i of class k holds the n_ki examples whose ``p_bk`` is in it, whatever their label; p̄_ki is the mean
    of those probabilities and f_ki the share of those examples that are of class k. The bins are those of
    `reliability_curve`, over ``p_bk`` in place of the confidence; probability 0 is in the first.

    Args:
        probabilities: ``[B, K]``, rows sum to 1.
        labels: int64 ``[B]``, in 0..K-1.
        bins: number of bins, at least 1.
        binning: ``"width"`` or ``"mass"``.

    Returns:
        0-dim float64 in [0, 1].

    Raises:
        TypeError, ValueError: for input that is not as above, or for B = 0.

    Source: "Masksembles", section 4.1, defines the discrepancy over all classes, not over the predicted one
    alone; the binned estimate is that of Kull et al. (2019), classwise ECE.
    """
    return _error(_sums("classwise_calibration_error", probabilities, labels, bins, binning, classwise=True))


class CalibrationError:
    """Streaming `expected_calibration_error` or `classwise_calibration_error`, in bins of equal width.

        error = CalibrationError(bins=15)
        for x, labels in batches:
            error.update(predict(x), labels)
        error.compute(), error.curve()

    Holds three sums for each bin (and class), whatever the number of examples; equal to the functions over
    all examples at once but for the rounding of float64 sums.

    Args:
        bins: number of bins, at least 1.
        classwise: every class and not only the predicted one.

    Raises:
        TypeError, ValueError: for arguments that are not as above.

    Source: those of the two functions.
    """

    def __init__(self, *, bins: int = 15, classwise: bool = False) -> None:
        _checks.bins("CalibrationError", bins)
        self.bins = bins
        self.classwise = classwise
        self._sums: _bins.Binned | None = None

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Adds a batch as the functions take it, of as many classes and on the same device every time."""
        sums = _sums("CalibrationError.update", probabilities, labels, self.bins, "width", self.classwise)
        self._add("CalibrationError.update: probabilities", _bins.Binned(*(part.detach() for part in sums)))

    def merge(self, other: "CalibrationError") -> None:
        """Adds all that `other`, of as many bins and of the same kind, was updated with."""
        _checks.other("CalibrationError.merge", self, other)
        if (other.bins, other.classwise) != (self.bins, self.classwise):
            raise ValueError(
                f"CalibrationError.merge: other: expected bins={self.bins}, classwise={self.classwise}, "
                f"got bins={other.bins}, classwise={other.classwise}"
            )
        if other._sums is not None:
            self._add("CalibrationError.merge: other", other._sums)

    def compute(self) -> Tensor:
        """The error of all batches so far, 0-dim float64. ValueError if there were none."""
        return _error(self._seen("CalibrationError.compute"))

    def curve(self) -> ReliabilityCurve:
        """Their `reliability_curve`. ValueError if there were none, or if the bins are those of classes."""
        if self.classwise:
            raise ValueError("CalibrationError.curve: classwise: expected False, got True")
        return _curve(self._seen("CalibrationError.curve"))

    def _add(self, where: str, sums: _bins.Binned) -> None:
        if self._sums is None:
            self._sums = sums
            return
        rows, expected = len(sums.count), len(self._sums.count)
        if rows != expected:
            raise ValueError(f"{where}: expected K = {expected} as before, got {rows}")
        if sums.count.device != self._sums.count.device:
            raise ValueError(
                f"{where}: expected device {self._sums.count.device} as before, got {sums.count.device}"
            )
        self._sums = _bins.Binned(*(a + b for a, b in zip(self._sums, sums, strict=True)))

    def _seen(self, function: str) -> _bins.Binned:
        if self._sums is None:
            raise ValueError(f"{function}: expected at least one update before, got none")
        return self._sums


def _sums(
    function: str, probabilities: Tensor, labels: Tensor, bins: int, binning: Binning, classwise: bool
) -> _bins.Binned:
    _checks.bins(function, bins)
    _checks.choice(function, "binning", binning, "width", "mass")
    _checks.probabilities(function, "probabilities", probabilities, "[B, K]")
    _checks.labels(function, labels, probabilities)
    claimed, happened = (_bins.one_vs_rest if classwise else _bins.top_label)(probabilities, labels)
    return _bins.binned(claimed, happened, _bins.bin_of(claimed, bins, binning), bins)


def _curve(sums: _bins.Binned) -> ReliabilityCurve:
    (count,) = sums.count  # one row: that of the predicted class
    return ReliabilityCurve(sums.claimed[0] / count, sums.happened[0] / count, count.long())


def _error(sums: _bins.Binned) -> Tensor:
    # n_i |f_i - p̄_i| is the gap of the sums, and 0 for an empty bin; every row counts every example once.
    return (sums.happened - sums.claimed).abs().sum() / sums.count.sum()
