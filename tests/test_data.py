"""pyens.data: the digits, their split, and what is refused."""

import dataclasses
import sys

import pytest
import sklearn.datasets
import torch

from pyens.data import load_digits


def rows(*splits):
    """The images as a sorted list of byte strings, to compare what splits hold whatever its order."""
    return sorted(image.numpy().tobytes() for split in splits for image in split.images)


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_shapes_ranges_and_labels(digits):
    assert digits.classes == (0, 1, 2, 3, 4, 5, 6, 7)
    for split in (digits.train, digits.validation, digits.test, digits.unknown):
        assert split.images.shape == (len(split.labels), 64)
        assert (split.images.dtype, split.labels.dtype) == (torch.float32, torch.int64)
        assert split.images.min() == 0 and split.images.max() == 1
    for split in (digits.train, digits.validation, digits.test):
        assert split.labels.unique().tolist() == list(range(8))
    assert digits.unknown.labels.unique().tolist() == [8, 9]


def test_every_image_is_in_exactly_one_part(digits):
    images = torch.from_numpy(sklearn.datasets.load_digits().data).float() / 16
    everything = sorted(image.numpy().tobytes() for image in images)
    assert len(set(everything)) == len(everything)  # no duplicates, so equal lists mean disjoint parts
    assert rows(digits.train, digits.validation, digits.test, digits.unknown) == everything


def test_parts_have_the_asked_size():
    digits = load_digits(fractions=(0.25, 0.25, 0.5))
    sizes = [len(split.labels) for split in (digits.train, digits.validation, digits.test)]
    known = sum(sizes)
    assert known == 1797 - len(digits.unknown.labels)
    assert sizes == [round(known / 4), round(known / 2) - round(known / 4), known - round(known / 2)]


def test_labels_count_the_known_classes_without_gaps():
    digits = load_digits(unknown=[0, 4])
    assert digits.classes == (1, 2, 3, 5, 6, 7, 8, 9)
    bundled = sklearn.datasets.load_digits()
    truth = {
        image.numpy().tobytes(): digit
        for image, digit in zip(torch.from_numpy(bundled.data).float() / 16, bundled.target, strict=True)
    }
    for image, label in zip(*digits.test, strict=True):
        assert digits.classes[label] == truth[image.numpy().tobytes()]
    for image, label in zip(*digits.unknown, strict=True):
        assert label == truth[image.numpy().tobytes()]


def test_the_seed_decides_the_split(digits):
    again, other = load_digits(seed=0), load_digits(seed=1)
    assert torch.equal(again.train.images, digits.train.images)
    assert torch.equal(again.test.labels, digits.test.labels)
    assert rows(other.train) != rows(digits.train)
    assert rows(other.unknown) == rows(digits.unknown)


def test_the_default_generator_is_not_touched():
    state = torch.get_rng_state()
    load_digits(seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_digits_are_frozen(digits):
    with pytest.raises(dataclasses.FrozenInstanceError):
        digits.train = digits.test


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"unknown": [10]}, ValueError, r"unknown: expected digits in 0\.\.9, got 10"),
        ({"unknown": [-1]}, ValueError, r"unknown: expected digits in 0\.\.9, got -1"),
        ({"unknown": "89"}, TypeError, "unknown: expected ints, got str"),
        ({"unknown": range(9)}, ValueError, "unknown: expected two known classes or more to be left, got 1"),
        ({"fractions": (0.5, 0.5)}, ValueError, r"fractions: expected 3 \(train, validation, test\), got 2"),
        ({"fractions": (0.5, 0.5, 0.5)}, ValueError, "fractions: expected shares above 0 that sum to 1"),
        ({"fractions": (1.0, 0.0, 0.0)}, ValueError, "fractions: expected shares above 0 that sum to 1"),
        ({"fractions": (1.2, -0.4, 0.2)}, ValueError, "fractions: expected shares above 0 that sum to 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=f"^load_digits: {message}"):
        load_digits(**arguments)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"needs scikit-learn: pip install pyens\[demo\]"):
        load_digits()
