"""No bit of the CPU kernels changes unnoticed: see tests/checksums.py."""

import pytest

from tests import checksums


@pytest.mark.parametrize("capability", checksums.CAPABILITIES)
def test_bits(capability: str) -> None:
    used, found = checksums.record_of(capability)
    if used != capability:
        pytest.skip(f"this processor has no {capability}")
    assert checksums.differences(checksums.saved()[capability], found) == []


def test_every_case_is_recorded_of_the_common_processors() -> None:
    saved = checksums.saved()
    assert all(None not in saved[capability].values() for capability in ("base", "avx2"))
    assert all(saved[capability].keys() == saved["base"].keys() for capability in checksums.CAPABILITIES)


def test_a_changed_bit_is_a_difference() -> None:
    name, tensors = next(checksums.cases())
    expected: dict[str, str | None] = {name: checksums.digest(tensors)}
    tensors[0].data.flatten()[0] *= -1
    assert checksums.differences(expected, {name: checksums.digest(tensors)}) == [name]
    assert checksums.differences({}, {name: checksums.digest(tensors)}) == [name]  # one that is new
