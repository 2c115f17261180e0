"""Masks for Masksembles: N sets of units, of one size, that overlap as much as asked.

    masks = masks_for_channels(512, num_masks=4, scale=2.0)   # bool [4, 512]

Source: "Masksembles", 3.2 to 3.4. All that is drawn comes from the generator (torch's default one without),
on the CPU; the same state gives the same masks.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from pyens._kinds import check_number, check_tensor

MOST_PLACES = 1 << 26  # of a set of masks

__all__ = ["expected_iou", "generate_masks", "mask_iou", "masks_for_channels", "model_size"]


def generate_masks(
    num_ones: int, num_masks: int, scale: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """Masks of Masksembles: N vectors of round(M S) positions with M random ones each, less the unused ones.

    Args:
        num_ones: M >= 1, the ones of each mask.
        num_masks: N >= 1.
        scale: S >= 1. Two masks share M / S ones on average.
        generator: to draw from.

    Returns:
        bool `[N, C]`. C <= round(M S) is random, about M S (1 - (1 - 1/S)^N); every column is used.

    Raises:
        ValueError: M, N or S below 1, or S infinite; more than 2^26 places in all masks.
    """
    check("generate_masks", scale, num_ones=num_ones, num_masks=num_masks)
    if math.isinf(scale):
        raise ValueError(f"generate_masks: scale: expected a finite number, got {scale}")
    check_masks("generate_masks", num_masks, num_ones=num_ones * scale)
    positions = round(num_ones * scale)
    masks = torch.zeros(num_masks, positions, dtype=torch.bool, device="cpu")
    for mask in masks:
        mask[torch.randperm(positions, generator=generator, device="cpu")[:num_ones]] = True
    return masks[:, masks.any(0)]


def masks_for_channels(
    channels: int, num_masks: int, scale: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """Masks for C existing channels: every channel is used, and all masks have the same number of ones.

    Each mask has M = max(round(C / (S (1 - (1 - 1/S)^N))), ceil(C / N)) ones, at most C: with that many, C is
    the number of columns that `generate_masks` keeps on average. The number of masks that share a channel, c,
    is chosen so that the sum of c (c - 1) over the channels is as near the expectation of "Masksembles",
    N (N - 1) M / S, as such counts can be; so the masks' mean IoU is near `expected_iou(scale)`. Which masks
    share which channels is random.

    Args:
        channels: C >= 1.
        num_masks: N >= 1.
        scale: S >= 1; 1 gives masks of ones, infinity masks as disjoint as C and M let them be.
        generator: to draw from.

    Returns:
        bool `[N, C]`.

    Raises:
        ValueError: C, N or S below 1; more than 2^26 places in all masks.
    """
    check("masks_for_channels", scale, channels=channels, num_masks=num_masks)
    check_masks("masks_for_channels", num_masks, channels=channels)
    num_ones = min(
        channels, max(round(channels / _columns_per_one(num_masks, scale)), -(-channels // num_masks))
    )
    counts = _column_counts(channels, num_masks, num_ones, num_masks * (num_masks - 1) * num_ones / scale)
    counts = counts[torch.randperm(channels, generator=generator, device="cpu")]
    # Zeros are placed in the same way, and sooner where there are fewer.
    if 2 * num_ones > channels:
        return ~_place(num_masks - counts, num_masks, channels - num_ones, generator)
    return _place(counts, num_masks, num_ones, generator)


def expected_iou(scale: float) -> float:
    """The expected intersection over union of two masks: 1 / (2 S - 1), whatever N and M are."""
    check("expected_iou", scale)
    return 1 / (2 * scale - 1)


def mask_iou(masks: Tensor) -> float:
    """The mean intersection over union of all pairs of `masks`, bool `[N, C]`; that of two empty masks is 1.

    Raises:
        TypeError: masks that are not boolean.
        ValueError: another shape, or fewer than two masks.
    """
    check_tensor("mask_iou", "masks", masks)
    if masks.dtype != torch.bool:
        raise TypeError(f"mask_iou: masks: expected bool, got {str(masks.dtype).removeprefix('torch.')}")
    if masks.dim() != 2 or masks.shape[0] < 2:
        raise ValueError(f"mask_iou: masks: expected [N, C] with N >= 2, got shape {list(masks.shape)}")
    ones = masks.double()
    shared = ones @ ones.T
    sizes = shared.diagonal()
    union = sizes.unsqueeze(0) + sizes.unsqueeze(1) - shared
    iou = torch.where(union > 0, shared / union, 1)
    first, second = torch.triu_indices(len(iou), len(iou), offset=1)
    return iou[first, second].mean().item()


def model_size(
    in_features: int,
    num_ones: Sequence[int],
    out_features: int,
    num_masks: int,
    scale: float,
    *,
    bias: bool = True,
) -> float:
    """The expected number of parameters of an MLP whose hidden layers are as wide as their masks.

    Hidden layer l, under N masks of M_l ones, is M_l S (1 - (1 - 1/S)^N) wide on average: M_l S less the
    positions that no mask uses. With N = 1 or S = 1 that is M_l, the single model; with S going to infinity
    N M_l, that of an ensemble of N.

    Args:
        in_features, out_features: of the MLP.
        num_ones: M_l of each hidden layer, the units that one mask leaves.
        num_masks: N.
        scale: S; may be infinite.
        bias: whether biases count.

    Raises:
        ValueError: a size, N or S below 1.
    """
    if not isinstance(num_ones, Sequence):
        raise TypeError(f"model_size: num_ones: expected a list of ints, got {type(num_ones).__name__}")
    hidden = {f"num_ones[{layer}]": ones for layer, ones in enumerate(num_ones)}
    check(
        "model_size", scale, in_features=in_features, out_features=out_features, num_masks=num_masks, **hidden
    )
    columns_per_one = float(_columns_per_one(num_masks, scale))
    widths = [in_features, *(ones * columns_per_one for ones in num_ones), out_features]
    return float(sum((widths[i] + bias) * widths[i + 1] for i in range(len(widths) - 1)))


def check(function: str, scale: float = 1.0, **sizes: int) -> None:
    """Raises a ValueError that names the function and the argument unless sizes are 1 or more, and scale."""
    for argument, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{function}: {argument}: expected a positive integer, got {size!r}")
        if size >= 1 << 40:
            raise ValueError(f"{function}: {argument}: expected below 2^40, got {size}")
    check_number(function, "scale", scale)
    if not scale >= 1:
        raise ValueError(f"{function}: scale: expected at least 1, got {scale}")


def check_masks(function: str, num_masks: int, /, **widths: float) -> None:
    """Raises a ValueError for masks that nobody could wait for: drawing takes some time for each place."""
    for argument, width in widths.items():
        if num_masks * width > MOST_PLACES:
            raise ValueError(
                f"{function}: {argument}: expected at most {MOST_PLACES} places in all masks, "
                f"got {num_masks} masks of {width:.6g}"
            )


def _columns_per_one(num_masks: int, scale: float) -> Fraction:
    """S (1 - (1 - 1/S)^N): the columns in use for each one of a mask.

    Exact: in floats it cancels for a large scale, and C divided by it is just beside a half where it is one.
    """
    if math.isinf(scale):
        return Fraction(num_masks)
    exact = Fraction(scale)
    return exact * (1 - (1 - 1 / exact) ** num_masks)


def _column_counts(channels: int, num_masks: int, num_ones: int, target: float) -> Tensor:
    """C counts c in 1..N with sum N M and the sum of c (c - 1) as near `target` as possible; int64 `[C]`.

    From counts as equal as possible on, two equal ones part until the target is met: that adds 2 at a time,
    all that an even sum can, and makes the distribution a bell. Few channels, or a target near the largest
    sum, can leave no equal counts to part before; then the rest is searched.
    """
    low, extra = divmod(num_masks * num_ones, channels)
    histogram = [0] * (num_masks + 2)  # of the counts
    histogram[low] += channels - extra
    histogram[low + 1] += extra
    missing = round((target - sum(n * c * (c - 1) for c, n in enumerate(histogram))) / 2)
    parted = True
    while parted and missing > 0:
        parted = False
        for count in range(2, num_masks):
            pairs = min(missing, (histogram[count] + 2) // 4)
            if pairs > 0:
                histogram[count - 1] += pairs
                histogram[count] -= 2 * pairs
                histogram[count + 1] += pairs
                missing -= pairs
                parted = True
    counts = [count for count, n in enumerate(histogram) for _ in range(n)]
    if missing > 0:
        counts = _nearest_counts(counts[::-1], num_masks, target + num_masks * num_ones)
    return torch.tensor(counts, device="cpu")


def _nearest_counts(start: list[int], largest: int, target: float) -> list[int]:
    """Counts in 1..largest with the sum of `start` and the sum of squares nearest `target`.

    `start` descends. Depth first, column by column, with the values near `start` first; a branch ends where
    neither the most equal nor the most unequal counts that could follow come nearer than what is found. That
    is exact, and takes some thousand steps with up to 100 masks; after 50,000 the best so far has to do.
    """
    best, error = start, abs(sum(c * c for c in start) - target)
    branches: list[tuple[int, int, int, int, Any]] = [(len(start), sum(start), largest, 0, None)]
    for _ in range(50_000):
        if error <= 1 or not branches:  # sums of squares are all odd or all even
            break
        columns, left, cap, squares, chosen = branches.pop()
        if columns == 0:
            if abs(squares - target) < error:
                best, error = [], abs(squares - target)
                while chosen:
                    count, chosen = chosen
                    best.append(count)
            continue
        low, extra = divmod(left, columns)
        least = columns * low * low + extra * (2 * low + 1)
        full, rest = divmod(left - columns, cap - 1) if cap > 1 else (0, 0)
        most = columns + full * (cap * cap - 1) + rest * (rest + 2)
        if squares + least - target >= error or target - squares - most >= error:
            continue
        first, last = -(-left // columns), min(cap, left - columns + 1)
        if columns == 2:  # the two whose squares have the right sum, rounded to either side
            root = (left + math.isqrt(max(0, int(2 * (target - squares)) - left * left))) // 2
            first, last = max(first, min(root, last)), min(last, max(root + 1, first))
        near = start[-columns]
        for count in sorted(range(first, last + 1), key=lambda count: -abs(count - near)):
            branches.append((columns - 1, left - count, count, squares + count * count, (count, chosen)))
    return best


def _place(counts: Tensor, num_masks: int, num_ones: int, generator: torch.Generator | None) -> Tensor:
    """bool `[N, C]` with counts[c] ones in column c and `num_ones` in each row; these agree in sum.

    All masks stand in a queue `num_ones` times over, each time in a new random order, and every column takes
    its count from the front. A column that comes to the end of one order takes the rest from the next one,
    passing over the masks that it has already. That never fails, and every order is used up.
    """
    keys = torch.rand(num_ones, num_masks, generator=generator, dtype=torch.float64, device="cpu")
    orders = iter(keys.argsort(1).tolist())
    rows: list[int] = []
    queue: list[int] = []
    for count in counts.tolist():
        if count > len(queue):
            held, queue = set(queue), next(orders)
            taken = [mask for mask in queue if mask not in held][: count - len(held)]
            rows += [*held, *taken]
            gone = set(taken)
            queue = [mask for mask in queue if mask not in gone]
        else:
            rows += queue[:count]
            queue = queue[count:]
    masks = torch.zeros(num_masks, len(counts), dtype=torch.bool, device="cpu")
    columns = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
    masks[torch.tensor(rows, dtype=torch.int64, device="cpu"), columns] = True
    return masks
