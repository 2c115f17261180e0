"""pyens.ops.keyed_permutation: a bijection, the reference's bits, and orders that look drawn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyens import ops, reference
from pyens.ops import keyed_permutation

KEYS = torch.tensor([0, 1, -1, 123456789, 2**63 - 1, -(2**63)])
SIZES = [1, 2, 3, 10, 1023, 1024, 1025, 4097, 100_003]
LARGE = [2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40 - 7, 2**61 + 1, 2**62]


@pytest.mark.parametrize("n", SIZES)
def test_each_number_comes_once(n):
    found = keyed_permutation(KEYS, n)
    assert found.shape == (len(KEYS), n) and found.dtype == torch.int64
    assert torch.equal(found.sort(1).values, torch.arange(n).expand(len(KEYS), -1))


@pytest.mark.parametrize("n", SIZES + LARGE)
def test_the_bits_of_the_reference(n):
    count = min(n, 300)
    for first in {0, n // 3 if n // 3 + count <= n else 0, n - count}:
        found = keyed_permutation(KEYS, n, first, count)
        assert torch.equal(found, reference.keyed_permutation(KEYS, n, first, count))
        assert found.min() >= 0 and found.max() < n


@given(
    key=st.integers(-(2**63), 2**63 - 1),
    n=st.integers(1, 2**62),
    share=st.floats(0, 1),
    count=st.integers(0, 40),
    cut=st.integers(0, 40),
)
def test_parts_are_of_one_order(key, n, share, count, cut):
    count = min(count, n)
    first = min(int(share * (n - count)), n - count)
    cut = min(cut, count)
    keys = torch.tensor([key])
    whole = keyed_permutation(keys, n, first, count)
    parts = [keyed_permutation(keys, n, first, cut), keyed_permutation(keys, n, first + cut, count - cut)]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert len(whole.unique()) == count


def test_a_member_depends_on_its_own_key_alone():
    together = keyed_permutation(KEYS, 5000, 17, 2000)
    for m in range(len(KEYS)):
        assert torch.equal(keyed_permutation(KEYS[m : m + 1], 5000, 17, 2000)[0], together[m])


def test_the_same_bits_for_any_number_of_threads():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(keyed_permutation(KEYS, 1_000_003, 5, 200_000))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_nothing_to_give():
    assert keyed_permutation(KEYS, 0).shape == (6, 0)
    assert keyed_permutation(KEYS, 10, 10).shape == (6, 0)
    assert keyed_permutation(KEYS, 2**62, 2**62 - 1, 0).shape == (6, 0)
    assert keyed_permutation(KEYS[:0], 10).shape == (0, 10)


def test_strided_keys():
    keys = torch.stack([KEYS, KEYS + 1], 1)[:, 0]
    assert torch.equal(keyed_permutation(keys, 100), keyed_permutation(KEYS, 100))


# ------------------------------------------------------------------------------------------------------------
# Orders that look drawn. Keys are fixed, so what holds once holds always.


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_every_order_of_a_few_rows_comes_equally_often(n):
    orders, each = math.factorial(n), 200
    found = keyed_permutation(torch.arange(orders * each), n)
    counts = (found * n ** torch.arange(n)).sum(1).unique(return_counts=True)[1].double()
    assert len(counts) == orders
    chi2 = float(((counts - each) ** 2 / each).sum())
    assert chi2 < orders - 1 + 5 * math.sqrt(2 * (orders - 1)) + 10


@pytest.mark.parametrize("bits", [10, 11, 14, 20, 31, 33])
def test_bits_of_places_and_results_go_together_by_chance(bits):
    n, count, keys = 2**bits, 1024, torch.arange(200) * 7919
    found = keyed_permutation(keys, n, 0, count)
    signs = 1 - 2.0 * ((found.unsqueeze(-1) >> torch.arange(bits)) & 1)  # [keys, places, bits]
    places = 1 - 2.0 * ((torch.arange(count).unsqueeze(-1) >> torch.arange(10)) & 1)
    together = torch.einsum("pa,kpb->kab", places, signs) / math.sqrt(count)  # about normal
    assert abs(float(together.pow(2).mean()) - 1) < 0.1
    assert float(together.pow(2).mean(0).max()) < 1.7
    for distance in (1, 2, 512):  # of pairs of places, which bits of the results differ
        pairs = torch.arange(count)[torch.arange(count) & distance == 0]
        differ = found[:, pairs] ^ found[:, pairs ^ distance]
        signs = 1 - 2.0 * ((differ.unsqueeze(-1) >> torch.arange(bits)) & 1)
        assert abs(float((signs.sum(1) ** 2 / len(pairs)).mean()) - 1) < 0.15


@pytest.mark.parametrize("n", [1000, 4097, 100_003, 20_000_003])
def test_neighbours_lie_anywhere(n):
    found = keyed_permutation(torch.arange(100), n, n // 2, min(n // 2, 4000))
    for values in (found, (found[:, 1:] - found[:, :-1]) % n):
        counts = torch.bincount((values * 16 // n).reshape(-1), minlength=16).double()
        chi2 = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        assert chi2 < 60  # 15 degrees of freedom; without replacement it is less


def test_members_and_neighbouring_keys_have_orders_of_their_own():
    found = keyed_permutation(torch.arange(50), 1000).numpy()
    same = np.array([(found[i] == found[j]).sum() for i in range(50) for j in range(i)])
    assert abs(same.mean() - 1) < 0.15 and same.max() < 8  # as often as two drawn orders agree: once


# ------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((KEYS.int(), 10), TypeError, "keys: expected int64, got Int"),
        ((KEYS.double(), 10), TypeError, "keys: expected int64"),
        ((KEYS.view(2, 3), 10), ValueError, r"keys: expected \[E\], got shape \[2, 3\]"),
        ((KEYS, -1), ValueError, r"n: expected rows from 0 to 2\^62, got -1"),
        ((KEYS, 2**62 + 1, 0, 1), ValueError, "n: expected rows"),
        ((KEYS, 10, -1), ValueError, "first: expected a place from 0 to 10, got -1"),
        ((KEYS, 10, 11), ValueError, "first: expected a place from 0 to 10, got 11"),
        ((KEYS, 10, 3, 8), ValueError, "count: expected places up to 7 of 10 from 3 on, got 8"),
        ((KEYS, 10, 3, -1), ValueError, "count: expected places"),
        ((KEYS, 2**63), ValueError, r"n: expected rows from 0 to 2\^62, got 9223372036854775808"),
        ((KEYS, "5"), TypeError, "n: expected"),
        ((KEYS, 5, "1"), TypeError, "first: expected"),
    ],
)
def test_what_is_refused(arguments, error, message):
    with pytest.raises(error, match=f"keyed_permutation: {message}"):
        ops.keyed_permutation(*arguments)


def test_opcheck():
    torch.library.opcheck(torch.ops.pyens.keyed_permutation.default, (KEYS, 100, 10, 20))


def test_compiled():
    compiled = torch.compile(keyed_permutation, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(KEYS, 1000, 3, 50), keyed_permutation(KEYS, 1000, 3, 50))
