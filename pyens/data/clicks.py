"""Made-up clicks with a known truth, as many as one likes: to learn from in one pass, or to test a stream."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate
from numbers import Integral, Real
from operator import mul
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

VERSION = 1  # of what a row holds: another one wherever a bit of any row changes
ROWS = 1 << 62
MOST_CATEGORIES = 1 << 48
CATEGORIES = (
    *(1_500, 600, 10_000_000, 2_000_000, 300, 25, 12_000, 600, 3, 90_000, 5_500, 8_000_000, 3_000),
    *(25, 15_000, 5_000_000, 10, 5_500, 2_000, 4, 7_000_000, 18, 15, 300_000, 100, 150_000),
)

# Standard deviations of the parts of the logit, and by what each column's falls below the one before it.
CATEGORY_STD = 1.3
PAIR_STD = 0.5
NUMERIC_STD = 0.7
FALL = 0.85
PAIRS = 3

BLOCK = 2048  # rows at a time, whose intermediates stay in the cache
SAMPLE = 1 << 14  # rows that the bias is found from
BYTES = 8 * 255  # the largest sum of the bytes of a hash
BYTE_STD = math.sqrt((256**2 - 1) / 12)
LEVELS = 2 * BYTES + 1

GOLDEN = 0x9E3779B97F4A7C15
LOW_BYTES = np.uint64(0x00FF00FF00FF00FF)
LANES = np.uint64(0x0001000100010001)
MANTISSA = np.int64((1 << 52) - 1)
ONE = np.int64(1023 << 52)

SQRT_2 = 1.4142135623730951
LN_2 = 0.6931471805599453
PI = 3.141592653589793
EXP_2 = [float(Fraction(LN_2) ** k / math.factorial(k)) for k in range(11)]
ATANH = [2 / LN_2 / k for k in range(1, 15, 2)]  # of 2 atanh(s) / ln 2 = log2((1 + s) / (1 - s))
COSINE = [(-1) ** k / math.factorial(2 * k) for k in range(8)]
SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(8)]


class Clicks(NamedTuple):
    """Some rows of a `ClickStream`, as CPU tensors. A loss of one output takes `label.unsqueeze(1)`."""

    categorical: Tensor  # [B, C] int64
    numeric: Tensor  # [B, F] float32
    label: Tensor  # [B] float32, 1 for a click and 0 otherwise
    probability: Tensor  # [B] float64, the true one of a click


class ClickStream:
    r"""2^62 rows of made-up clicks, any of them at any time, with the true probability of each.

    What a model loses against `probability` is what it has still to learn, without the noise of a test set:
    the log loss of the truth is the least that any model reaches. A row depends on the arguments here and on
    its number alone. So rows come in any order and in batches of any size, in any process, and nothing but
    the next row's number is needed to go on after a stop. The stream holds half a megabyte, however many
    rows and categories.

    Column c holds the categories 0 to n - 1, n = ``categories[c]``, by falling frequency. They follow the
    power law of exponent ``zipf`` in steps:

        P(k) = integral of x^-zipf over [k + 1, k + 2] / integral of x^-zipf over [1, n + 1]

    Numbers are log(1 + a count), rounded to float32; the counts are whole and skewed: floor(exp(1 + s z)),
    where s is 1, 1.5, 2 or 2.5 and z about normal. The z of any two columns of a row correlate by 1/2.

    A click is drawn with probability 1 / (1 + exp(-logit)). With the row number r, its categories k_c and its
    numbers x_f,

        angle = 2 pi drift r / rows_of_drift
        logit = bias + sum over c of w_c (cos(angle) a_c(k_c) + sin(angle) b_c(k_c))
                     + sum over p of v_p d_p(k_2p, k_2p+1) + sum over f of u_f g_f(x_f)

    - a, b and d are about normal, one number for each category or pair of categories. Their means over the
      rows are then taken off, so that there are about as many clicks at every angle.
    - The weights w are .85^c for the first half of the columns, scaled to a sum of squares of 1.3^2, and 0
      for the others, which are noise. u falls likewise, with .7 for 1.3; the other half of the numbers tell
      of clicks only by what they share with these.
    - The pairs are columns 0 and 1, 2 and 3, 4 and 5, as far as these are of the first half. Their weights v
      are equal, with a sum of squares of .5^2.
    - g_f is x / s for even f and, for odd ones, a hump, 2 / (1 + (x / s - 1)^2).

    At drift 1 all effects of single categories have turned about after ``rows_of_drift`` rows and are again
    what they were; at .25 what was learned at the start is then of no use. Pairs and numbers do not drift.

    Args:
        seed: of everything, from 0 to 2^64 - 1.
        numeric_features: F, 0 to 1024; above 0 without categorical columns.
        categories: how many each of the C categorical columns has; 1 to 2^48. The default's are about as
            many as in Criteo's data, from 3 to ten million.
        zipf: exponent of the frequencies, above 0.
        click_rate: share of clicks that the bias is made for, above 0 and below 1; it is met to a few per
            cent, over a whole turn of the drift.
        drift: turns of the effects in `rows_of_drift` rows; 0 or more, 0 for none.
        rows_of_drift: 1 or more.

    Attributes: the arguments, and `bias`.

    All bits are the same on every machine: there is nothing but integers, and additions, multiplications,
    divisions and roundings of float64, each by itself. exp, log, cos and sin are sums of these, with relative
    errors of 1e-12.

    Raises:
        TypeError, ValueError: for arguments that are not as above.

    Source: ours. Sizes and rate of clicks are those of the Criteo Display Advertising data, whose true
    probabilities nobody knows. Hashes are chains of the last step of splitmix64, from Steele, Lea and Flood,
    "Fast splittable pseudorandom number generators", 2014.

    Example:
        >>> stream = ClickStream(seed=1)
        >>> stream.rows([7, 10**15]).categorical.shape
        torch.Size([2, 26])
        >>> for batch in stream.batches(256, stop=1_000_000):
        ...     loss = model.loss(batch.categorical, batch.numeric, batch.label.unsqueeze(1), loss="bce")
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        numeric_features: int = 13,
        categories: Sequence[int] = CATEGORIES,
        zipf: float = 1.1,
        click_rate: float = 0.25,
        drift: float = 0.25,
        rows_of_drift: int = 1_000_000,
    ) -> None:
        self.seed = _integer("ClickStream: seed", seed, 0, (1 << 64) - 1)
        self.numeric_features = _integer("ClickStream: numeric_features", numeric_features, 0, 1 << 10)
        if isinstance(categories, str) or not isinstance(categories, Sequence):
            raise TypeError(
                f"ClickStream: categories: expected a list of ints, got {type(categories).__name__}"
            )
        self.categories = tuple(
            _integer(f"ClickStream: categories[{c}]", size, 1, MOST_CATEGORIES)
            for c, size in enumerate(categories)
        )
        if not self.categories and not self.numeric_features:
            raise ValueError("ClickStream: numeric_features: expected 1 or more without categories, got 0")
        self.zipf = _number("ClickStream: zipf", zipf)
        if self.zipf <= 0:
            raise ValueError(f"ClickStream: zipf: expected above 0, got {zipf}")
        self.click_rate = _number("ClickStream: click_rate", click_rate)
        if not 0 < self.click_rate < 1:
            raise ValueError(f"ClickStream: click_rate: expected above 0 and below 1, got {click_rate}")
        self.drift = _number("ClickStream: drift", drift)
        if self.drift < 0:
            raise ValueError(f"ClickStream: drift: expected 0 or more, got {drift}")
        self.rows_of_drift = _integer("ClickStream: rows_of_drift", rows_of_drift, 1, ROWS)
        self._draw()
        self._settle()

    def _draw(self) -> None:
        """What the rows are made from: keys of hashes, weights, tables of what a number may be."""
        columns = len(self.categories)
        told = -(-columns // 2)  # columns that tell something
        pairs = min(PAIRS, told // 2)
        base = _mix(np.array([self.seed], np.uint64) + np.uint64(GOLDEN))
        row, label, common, second, *others = _mix(base + _counted(8) * np.uint64(GOLDEN))
        self._row_key, self._label_key, self._common_key, self._second_key = row, label, common, second
        counts = (columns, told, pairs, self.numeric_features)
        self._cell_keys, self._category_keys, self._pair_keys, self._numeric_keys = (
            _mix(key + _counted(count))[:, None] for key, count in zip(others, counts, strict=True)
        )

        self._last = np.array(self.categories, np.int64)[:, None] - 1
        bits = _log2(self._last + 2.0)  # of the end n + 1 of the law
        # A law this close to 1 / x is no different, and would be computed from differences near 0.
        self._power = 0.0 if abs(self.zipf - 1) < 1e-8 else 1 - self.zipf
        self._end = _exp2((bits * self._power).clip(-1000)) if self._power else bits

        self._weights = _falling(told, CATEGORY_STD) / (math.sqrt(8) * BYTE_STD)
        self._pair_weight = PAIR_STD / math.sqrt(8 * max(pairs, 1)) / BYTE_STD

        # A number comes from the sum of the bytes of two hashes, one of them its own.
        z = (np.arange(LEVELS) - float(BYTES)) / (4 * BYTE_STD)
        spread = 1 + np.arange(self.numeric_features)[:, None] % 4 / 2
        count = np.floor(_exp2((1 + spread * z) / LN_2))
        self._numbers = (_log2(1 + count) * LN_2).astype(np.float32)
        told = -(-self.numeric_features // 2)
        x = self._numbers[:told] / spread[:told]
        hump = 2 / (1 + (x - 1) * (x - 1))
        effect = np.where(np.arange(told)[:, None] % 2 == 0, x, hump)
        self._number_effects = effect * _falling(told, NUMERIC_STD)

        self._rate = np.uint64(round(Fraction(self.drift) / self.rows_of_drift * (1 << 64)) % (1 << 64))

    def _settle(self) -> None:
        """Means of the parts of the logit and the bias, from rows that spread over a turn."""
        turn = (1 << 64) // int(self._rate) if self._rate else 0
        step = max(1, min(turn, ROWS) // SAMPLE)
        row = np.arange(SAMPLE, dtype=np.int64) * step
        self._means, self.bias = [0.0] * 3, 0.0
        parts = np.concatenate([self._block(row[i : i + BLOCK])[2] for i in range(0, SAMPLE, BLOCK)], 1)
        # fsum rounds once, so that the order of the sum does not matter.
        self._means = [math.fsum(part.tolist()) / SAMPLE for part in parts]
        logit = self._logit(row, parts)
        low, high = -700 << 20, 700 << 20  # in steps of 2^-20
        while high - low > 1:
            middle = (low + high) // 2
            rate = math.fsum(_sigmoid(logit + middle / (1 << 20)).tolist()) / SAMPLE
            low, high = (middle, high) if rate < self.click_rate else (low, middle)
        self.bias = high / (1 << 20)

    def rows(self, indices: Tensor | np.ndarray | range | slice | Sequence[int]) -> Clicks:
        """The rows of these numbers, in this order.

        Args:
            indices: B numbers from 0 to 2^62 - 1: integers in a tensor or array `[B]`, a range, a slice with
                an end, or a list. A row may occur more than once.

        Raises:
            TypeError: for indices that are no integers.
            ValueError: for rows out of range, and for a tensor or array of another shape.
        """
        row = _row_numbers(indices)
        categorical = np.empty((len(row), len(self.categories)), np.int64)
        numeric = np.empty((len(row), self.numeric_features), np.float32)
        label = np.empty(len(row), np.float32)
        probability = np.empty(len(row))
        for start in range(0, len(row), BLOCK):
            block = slice(start, start + BLOCK)
            ranks, numbers, parts, draw = self._block(row[block])
            categorical[block] = ranks.T
            numeric[block] = numbers.T
            probability[block] = _sigmoid(self._logit(row[block], parts) + self.bias)
            label[block] = draw < probability[block]
        return Clicks(*map(torch.from_numpy, (categorical, numeric, label, probability)))

    def batches(self, batch_size: int, start: int = 0, stop: int = ROWS) -> Iterator[Clicks]:
        """The rows from `start` to `stop` - 1 in order, `batch_size` at a time; the last batch may be short.

        Args:
            batch_size: 1 or more. Small ones cost little more than large ones: rows are made some thousand at
                a time.
            start: where to begin, as after a stop.
            stop: where to end; by default practically never.

        Raises:
            TypeError, ValueError: for arguments that are not as above, at once and not with the first batch.
        """
        batch_size = _integer("ClickStream.batches: batch_size", batch_size, 1, ROWS)
        start = _integer("ClickStream.batches: start", start, 0, ROWS)
        stop = _integer("ClickStream.batches: stop", stop, start, ROWS)
        return self._batches(batch_size, start, stop)

    def _batches(self, batch_size: int, start: int, stop: int) -> Iterator[Clicks]:
        at_once = batch_size * max(1, BLOCK // batch_size)
        for first in range(start, stop, at_once):
            several = self.rows(range(first, min(first + at_once, stop)))
            for i in range(0, len(several.label), batch_size):
                yield Clicks(*(tensor[i : i + batch_size] for tensor in several))

    def fingerprint(self) -> str:
        """Some 30 characters that differ between streams of different rows, to keep in a checkpoint.

        They hold the version of this code's rows and a digest of the arguments.
        """
        digest = hashlib.sha256(self.extra_repr().encode()).hexdigest()[:16]
        return f"ClickStream/{VERSION}/{digest}"

    def extra_repr(self) -> str:
        names = ("seed", "numeric_features", "categories", "zipf", "click_rate", "drift", "rows_of_drift")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def _block(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Ranks `[C, B]`, numbers `[F, B]`, parts of the logit `[3, B]`, a uniform number `[B]` below 1."""
        key = _mix(row.view(np.uint64) + self._row_key)
        ranks = self._ranks(_uniform(_mix(key + self._cell_keys)))
        own = _byte_sum(_mix(key + self._numeric_keys))
        own += _byte_sum(_mix(key + self._common_key))
        own += np.arange(0, self._numbers.size, LEVELS)[:, None]

        # Sums over columns go column by column: numpy's own may add in an order that depends on the shape.
        still, first, second = parts = np.zeros((3, len(row)))
        for effect in self._number_effects.take(own[: len(self._number_effects)]):
            still += effect
        category = _mix(ranks[: len(self._weights)].view(np.uint64) + self._category_keys)
        for effect in _byte_sum(category) * self._weights:
            first += effect
        for effect in _byte_sum(_mix(category + self._second_key)) * self._weights:
            second += effect
        paired = category[: 2 * len(self._pair_keys)]
        for effect in _byte_sum(_mix(paired[::2] + paired[1::2] + self._pair_keys)) * self._pair_weight:
            still += effect
        return ranks, self._numbers.take(own), parts, _uniform(_mix(key + self._label_key))

    def _ranks(self, uniform: np.ndarray) -> np.ndarray:
        """Categories `[C, B]` of the power law, from numbers in [0, 1)."""
        uniform = 1 - uniform
        if self._power:
            uniform *= 1 - self._end
            uniform += self._end
            bits = _log2(uniform)
            bits /= self._power
        else:
            bits = (1 - uniform) * self._end
        ranks = _exp2(bits).astype(np.int64)
        ranks -= 1
        return ranks.clip(0, self._last, out=ranks)

    def _logit(self, row: np.ndarray, parts: np.ndarray) -> np.ndarray:
        """Without the bias, `[B]`."""
        still, first, second = (part - mean for part, mean in zip(parts, self._means, strict=True))
        cosine, sine = _cos_sin(_uniform(row.view(np.uint64) * self._rate))
        logit: np.ndarray = still + first * cosine + second * sine
        return logit


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    number = int(value)
    if not low <= number <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {number}")
    return number


def _number(name: str, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def _row_numbers(indices: Any) -> np.ndarray:
    """int64 `[B]`."""
    name = "ClickStream.rows: indices"
    if isinstance(indices, slice):
        if indices.stop is None:
            raise ValueError(f"{name}: expected a slice with an end, got {indices}")
        start = 0 if indices.start is None else _integer(f"{name}.start", indices.start, 0, ROWS)
        step = 1 if indices.step is None else _integer(f"{name}.step", indices.step, 1, ROWS)
        indices = range(start, _integer(f"{name}.stop", indices.stop, 0, ROWS), step)
    if isinstance(indices, range):
        if not indices:
            return np.empty(0, np.int64)
        first, last = indices[0], indices[-1]
        _check_rows(name, min(first, last), max(first, last))
        return np.arange(len(indices)) * (indices.step if last != first else 0) + first
    if isinstance(indices, Tensor):
        if indices.is_floating_point() or indices.is_complex():
            raise TypeError(f"{name}: expected integers, got {indices.dtype}")
        indices = indices.cpu().numpy()
    if not isinstance(indices, np.ndarray):
        if not isinstance(indices, Sequence) or isinstance(indices, (str, bytes)):
            raise TypeError(f"{name}: expected row numbers, got {type(indices).__name__}")
        indices = np.array([_integer(name, index, 0, ROWS - 1) for index in indices], np.int64)
    if indices.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {indices.dtype}")
    if indices.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {indices.shape}")
    if indices.size:
        _check_rows(name, int(indices.min()), int(indices.max()))
    return np.ascontiguousarray(indices, np.int64)


def _check_rows(name: str, least: int, most: int) -> None:
    if least < 0 or most >= ROWS:
        raise ValueError(f"{name}: expected rows 0 to 2^62 - 1, got {least if least < 0 else most}")


def _falling(count: int, std: float) -> np.ndarray:
    """Weights `[count, 1]`, each `FALL` of the one before, with the sum of squares std^2."""
    weights = list(accumulate([FALL] * (count - 1), mul, initial=1.0)) if count else []
    norm = math.sqrt(math.fsum(weight * weight for weight in weights))
    return np.array([[std * weight / norm] for weight in weights]).reshape(count, 1)


def _counted(count: int) -> np.ndarray:
    return np.arange(1, 1 + count, dtype=np.uint64)


def _mix(z: np.ndarray) -> np.ndarray:
    """The last step of splitmix64, a permutation of the uint64, in place.

    Numbers that differ by 1 or by a constant come out as if unrelated, so that a sum of a row's or category's
    number and a key of what is asked for makes a hash.
    """
    shifted = z >> np.uint64(30)
    z ^= shifted
    z *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(z, np.uint64(27), out=shifted)
    z ^= shifted
    z *= np.uint64(0x94D049BB133111EB)
    np.right_shift(z, np.uint64(31), out=shifted)
    z ^= shifted
    return z


def _byte_sum(z: np.ndarray) -> np.ndarray:
    """int64: the sum of the eight bytes of each number, about normal with mean 1020."""
    sums = z >> np.uint64(8)
    sums &= LOW_BYTES
    sums += z & LOW_BYTES  # four sums of two bytes, in 16 bits each
    sums *= LANES  # the highest of which becomes the sum of all
    sums >>= np.uint64(48)
    return sums.view(np.int64)


def _uniform(z: np.ndarray) -> np.ndarray:
    """float64: the first 53 bits as a number in [0, 1)."""
    return (z >> np.uint64(11)) * 2.0**-53


def _polynomial(x: np.ndarray, coefficients: list[float]) -> np.ndarray:
    *others, last = coefficients
    total = x * last
    for coefficient in reversed(others[1:]):
        total += coefficient
        total *= x
    total += others[0]
    return total


def _exp2(x: np.ndarray) -> np.ndarray:
    """2^x for -1022 <= x < 1023."""
    whole = np.rint(x)
    power = _polynomial(x - whole, EXP_2)
    bits = whole.astype(np.int64)
    bits <<= 52
    bits += ONE
    power *= bits.view(np.float64)
    return power


def _log2(x: np.ndarray) -> np.ndarray:
    """log2(x) for x of at least 2^-1022."""
    bits = x.view(np.int64)
    mantissa = bits & MANTISSA
    mantissa |= ONE
    m = mantissa.view(np.float64)  # in [1, 2), and s below in [-.172, .172]
    s = (m - SQRT_2) / (m + SQRT_2)
    log = _polynomial(s * s, ATANH)
    log *= s
    log += (bits >> 52) - 1022.5
    return log


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + _exp2(x.clip(-700, 700) * (-1 / LN_2)))


def _cos_sin(turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of angles from 0 to 1 turn."""
    quarters = np.rint(4 * turn)
    rest = (4 * turn - quarters) * (PI / 2)
    square = rest * rest
    cosine, sine = _polynomial(square, COSINE), _polynomial(square, SINE) * rest
    x, y = np.array([[1.0, 0, -1, 0, 1], [0, 1, 0, -1, 0]])[:, quarters.astype(np.int64)]
    return x * cosine - y * sine, y * cosine + x * sine
