"""pyens.masks: what the masks promise, for ordinary settings and for any."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyens.masks import expected_iou, generate_masks, mask_iou, masks_for_channels, model_size

CHANNELS = [10, 16, 32, 64, 100, 128, 256, 512, 1024, 2048]
NUM_MASKS = [2, 4, 8, 16, 32, 64]
SCALES = [1.1, 1.5, 2.0, 3.0, 6.0]

seeds = st.integers(0, 2**32 - 1)
scales = st.one_of(st.floats(1, 8), st.sampled_from([1.0, 1.001, 100.0, 1e9, math.inf]))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ones_for(channels: float, num_masks: int, scale: float) -> int:
    """M as the docstring has it."""
    columns_per_one = scale * (1 - (1 - 1 / scale) ** num_masks)
    return min(
        round(channels), max(round(channels / columns_per_one), math.ceil(round(channels) / num_masks))
    )


def target(num_masks: int, num_ones: int, scale: float) -> float:
    return num_masks * (num_masks - 1) * num_ones / scale


def overlap(masks: Tensor) -> int:
    """The sum of c (c - 1) over the channels: how many ones all ordered pairs of masks share."""
    counts = masks.sum(0)
    return int((counts * (counts - 1)).sum())


def assert_are_masks(masks: Tensor, num_masks: int, channels: int, num_ones: int) -> None:
    assert masks.dtype == torch.bool and masks.shape == (num_masks, channels)
    assert masks.sum(1).tolist() == [num_ones] * num_masks
    assert masks.any(0).all()


# --- masks_for_channels --------------------------------------------------------------------------


@pytest.mark.parametrize("num_masks", NUM_MASKS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_ordinary_settings(channels, num_masks):
    for scale in SCALES:
        masks = masks_for_channels(channels, num_masks, scale, generator=seeded())
        num_ones = ones_for(channels, num_masks, scale)
        assert_are_masks(masks, num_masks, channels, num_ones)
        # Where counts as equal as can be share less than the paper expects, the expectation is met: the sum
        # is even, so within 1. Two masks have no choice: each channel is in one of them or in both.
        low, extra = divmod(num_masks * num_ones, channels)
        least = channels * low * (low - 1) + 2 * extra * low
        off = overlap(masks) - target(num_masks, num_ones, scale)
        if num_masks == 2 or off > 1:
            assert overlap(masks) == least
        else:
            assert abs(off) <= 1
        # M and the counts are whole numbers, which few channels feel.
        assert mask_iou(masks) == pytest.approx(expected_iou(scale), abs=1 / channels + 0.002)


@given(st.integers(1, 60), st.integers(1, 12), scales, seeds)
def test_any_setting(channels, num_masks, scale, seed):
    masks = masks_for_channels(channels, num_masks, scale, generator=seeded(seed))
    assert_are_masks(masks, num_masks, channels, int(masks[0].sum()))
    if scale < 1e6:  # where the formula in one line is accurate; 1e-9 apart, a half rounds up and down
        around = [ones_for(channels * (1 + sign * 1e-9), num_masks, scale) for sign in (-1, 1)]
        assert around[0] <= masks[0].sum() <= around[1]
    assert torch.equal(masks, masks_for_channels(channels, num_masks, scale, generator=seeded(seed)))


@functools.cache
def attainable(channels: int, num_masks: int, total: int) -> list[int]:
    """Every sum of c (c - 1) that counts in 1..N of this total can have, by counting them all."""
    return sorted(
        {
            sum(c * (c - 1) for c in counts)
            for counts in itertools.combinations_with_replacement(range(1, num_masks + 1), channels)
            if sum(counts) == total
        }
    )


@pytest.mark.parametrize("channels", range(1, 7))
@pytest.mark.parametrize("num_masks", range(1, 11))
def test_counts_come_as_near_as_counts_can(channels, num_masks):
    for scale in (1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.3, 2.5, 3.0, 4.0, 6.0, 10.0, 1e9):
        masks = masks_for_channels(channels, num_masks, scale, generator=seeded())
        num_ones = int(masks[0].sum())
        goal = target(num_masks, num_ones, scale)
        nearest = min(abs(t - goal) for t in attainable(channels, num_masks, num_masks * num_ones))
        assert abs(overlap(masks) - goal) == pytest.approx(nearest, abs=1e-9)


def test_the_ends_of_the_continuum():
    assert masks_for_channels(12, 4, 1.0).all()
    disjoint = masks_for_channels(12, 4, math.inf, generator=seeded())
    assert disjoint.sum(0).tolist() == [1] * 12 and disjoint.sum(1).tolist() == [3] * 4
    assert masks_for_channels(12, 1, 5.0).all()  # every channel is used, by the only mask
    assert masks_for_channels(1, 7, 3.0).all()


def test_no_two_masks_are_special():
    """All pairs share as much, on average: labels and columns are exchangeable."""
    shared = torch.zeros(6, 6)
    generator = seeded()
    for _ in range(400):
        masks = masks_for_channels(30, 6, 2.0, generator=generator).float()
        shared += masks @ masks.T / 400
    first, second = torch.triu_indices(6, 6, offset=1)
    pairs = shared[first, second]
    assert (pairs - pairs.mean()).abs().max() < 0.3  # of 7.7; the standard error is below 0.1
    columns = torch.stack([masks_for_channels(30, 6, 2.0, generator=generator).sum(0) for _ in range(400)])
    assert (columns.double().mean(0) - columns.double().mean()).abs().max() < 0.3


def test_draws_only_from_the_generator_given():
    state = torch.get_rng_state()
    a, b = (masks_for_channels(64, 4, 2.0, generator=seeded(s)) for s in (1, 2))
    generate_masks(8, 4, 2.0, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), state) and not torch.equal(a, b)
    torch.manual_seed(1)
    assert torch.equal(masks_for_channels(64, 4, 2.0), a)
    with torch.device("meta"):
        assert torch.equal(masks_for_channels(64, 4, 2.0, generator=seeded(1)), a)


@pytest.mark.parametrize("bad", [0, -1, 2.5, None], ids=str)
def test_bad_sizes(bad):
    for function, arguments in (
        (masks_for_channels, ("channels", "num_masks")),
        (generate_masks, ("num_ones", "num_masks")),
    ):
        for argument in arguments:
            sizes = dict.fromkeys(arguments, 4) | {argument: bad}
            message = f"{function.__name__}: {argument}: expected a positive integer, got {bad}"
            with pytest.raises(ValueError, match=message):
                function(*sizes.values(), 2.0)


@pytest.mark.parametrize("scale", [0.99, 0.0, -2.0, math.nan], ids=str)
def test_bad_scales(scale):
    for function in (masks_for_channels, generate_masks):
        with pytest.raises(ValueError, match=f"{function.__name__}: scale: expected at least 1, got {scale}"):
            function(16, 4, scale)
    with pytest.raises(ValueError, match="expected_iou: scale: expected at least 1"):
        expected_iou(scale)
    with pytest.raises(ValueError, match="model_size: scale: expected at least 1"):
        model_size(2, [4], 2, 4, scale)
    with pytest.raises(ValueError, match="generate_masks: scale: expected a finite number, got inf"):
        generate_masks(16, 4, math.inf)


# --- generate_masks ------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 8), st.floats(1, 8), seeds)
def test_generated_masks(num_ones, num_masks, scale, seed):
    masks = generate_masks(num_ones, num_masks, scale, generator=seeded(seed))
    assert_are_masks(masks, num_masks, masks.shape[1], num_ones)
    assert num_ones <= masks.shape[1] <= round(num_ones * scale)
    assert torch.equal(masks, generate_masks(num_ones, num_masks, scale, generator=seeded(seed)))


def test_generated_masks_at_the_ends():
    assert generate_masks(5, 3, 1.0).shape == (3, 5)
    single = generate_masks(5, 1, 4.0)
    assert single.shape == (1, 5) and single.all()


def test_generated_masks_have_the_expected_overlap_and_width():
    generator = seeded()
    for num_masks, scale in itertools.product((2, 4, 16), (1.1, 2.0, 6.0)):
        drawn = [generate_masks(200, num_masks, scale, generator=generator) for _ in range(20)]
        iou = sum(mask_iou(masks) for masks in drawn) / 20
        assert iou == pytest.approx(expected_iou(scale), rel=0.1)
        width = sum(masks.shape[1] for masks in drawn) / 20
        assert width == pytest.approx(200 * scale * (1 - (1 - 1 / scale) ** num_masks), rel=0.02)


# --- measures ------------------------------------------------------------------------------------


def test_expected_iou():
    assert [expected_iou(s) for s in (1, 2, 3)] == [1, 1 / 3, 1 / 5]
    assert expected_iou(math.inf) == 0


def test_mask_iou_by_hand():
    masks = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert mask_iou(masks[:2]) == pytest.approx(1 / 3)
    assert mask_iou(masks[:3]) == pytest.approx(1 / 9)
    assert mask_iou(masks[2:]) == 1
    assert mask_iou(torch.ones(3, 5, dtype=torch.bool)) == 1
    with pytest.raises(TypeError, match="mask_iou: masks: expected bool, got float32"):
        mask_iou(masks.float())
    for bad in (masks[:1], masks[0], masks.unsqueeze(0)):
        with pytest.raises(ValueError, match=r"mask_iou: masks: expected \[N, C\] with N >= 2, got shape"):
            mask_iou(bad)


def test_model_size_is_the_papers():
    # 4 (M S - D), with D expected to be M S (1 - 1/S)^N.
    assert model_size(2, [100], 2, 4, 2.0, bias=False) == pytest.approx(4 * 200 * (1 - 0.5**4))
    single = sum(p.numel() for p in torch.nn.Linear(7, 5).parameters()) + 5 * 2 + 2
    assert model_size(7, [5], 2, 1, 3.0) == model_size(7, [5], 2, 4, 1.0) == single
    assert model_size(2, [100], 2, 4, math.inf, bias=False) == 4 * model_size(2, [100], 2, 1, 1.0, bias=False)
    wide = [3 * 4 * (1 - 0.75**4), 5 * 4 * (1 - 0.75**4)]
    expected = (7 + 1) * wide[0] + (wide[0] + 1) * wide[1] + (wide[1] + 1) * 2
    assert model_size(7, [3, 5], 2, 4, 4.0) == pytest.approx(expected)


def test_model_size_is_that_of_generated_masks():
    generator = seeded()
    width = sum(generate_masks(50, 4, 2.0, generator=generator).shape[1] for _ in range(50)) / 50
    assert model_size(3, [50], 2, 4, 2.0) == pytest.approx((3 + 1) * width + (width + 1) * 2, rel=0.02)


def test_model_size_refuses():
    with pytest.raises(ValueError, match=r"model_size: num_ones\[1\]: expected a positive integer, got 0"):
        model_size(2, [4, 0], 2, 4, 2.0)
