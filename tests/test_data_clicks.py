"""Made-up clicks: rows at random, the law of the categories, the truth of the probabilities, the drift."""

import hashlib
import itertools
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyens.data import ClickStream
from pyens.data import clicks as module
from pyens.data.clicks import BLOCK, ROWS
from pyens.nn import TabularEnsemble

SMALL = (1500, 7, 100_000, 3, 40)
DEFAULT = ClickStream()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def joined(batches):
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def logit(probability):
    return torch.log(probability) - torch.log1p(-probability)


def log_loss(probability, label):
    return -(label * torch.log(probability) + (1 - label) * torch.log1p(-probability))


# Rows.


def test_shapes_types_and_ranges():
    rows = DEFAULT.rows(range(5000))
    assert rows.categorical.shape == (5000, 26) and rows.categorical.dtype == torch.int64
    assert rows.numeric.shape == (5000, 13) and rows.numeric.dtype == torch.float32
    assert rows.label.shape == (5000,) and rows.label.dtype == torch.float32
    assert rows.probability.shape == (5000,) and rows.probability.dtype == torch.float64
    assert all(tensor.is_contiguous() for tensor in rows)
    assert (rows.categorical >= 0).all() and (rows.categorical < torch.tensor(DEFAULT.categories)).all()
    assert rows.label.unique().tolist() == [0, 1]
    assert rows.probability.min() > 0 and rows.probability.max() < 1
    assert rows.numeric.isfinite().all() and (rows.numeric >= 0).all()


def test_numbers_are_logarithms_of_skewed_counts():
    numeric = DEFAULT.rows(range(20_000)).numeric.double()
    counts = numeric.expm1()
    assert torch.allclose(counts, counts.round(), rtol=1e-5, atol=1e-5)
    assert (counts.mean(0) > 1.3 * counts.quantile(0.5, 0)).all()
    assert (numeric.std(0) > 0.5).all()
    correlation = np.corrcoef(numeric.numpy(), rowvar=False)
    assert correlation.min() > 0.4  # 1/2 before the exponential and the floor
    # Those without an effect tell something of the click nevertheless, by what they share with the others.
    with_truth = np.corrcoef(numeric.numpy(), logit(DEFAULT.rows(range(20_000)).probability), rowvar=False)
    assert (with_truth[-1, :-1] > 0.15).all()


def test_the_default_stream_has_these_bits():
    """On every machine and from now on; other bits need another `VERSION`."""
    rows = DEFAULT.rows([0, 1, 2, 10**6, 10**12, ROWS - 1, *range(5000, 8000)])
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in rows)).hexdigest()
    assert (module.VERSION, digest[:16]) == (1, "3edde4ae142e26fd")
    assert DEFAULT.fingerprint() == "ClickStream/1/683edd95ba8e9962"


U64 = (1 << 64) - 1


def mix(z):
    z ^= z >> 30
    z = z * 0xBF58476D1CE4E5B9 & U64
    z ^= z >> 27
    z = z * 0x94D049BB133111EB & U64
    return z ^ z >> 31


def test_a_row_is_what_the_formulas_say():
    """Row by row in integers and with the functions of `math`."""
    sizes, zipf, drift, rows_of_drift = (1000, 20, 50, 2**40, 3, 7, 8, 9), 1.2, 0.7, 1000
    stream = ClickStream(
        99, numeric_features=6, categories=sizes, zipf=zipf, drift=drift, rows_of_drift=rows_of_drift
    )
    golden = 0x9E3779B97F4A7C15
    base = mix((99 + golden) & U64)
    row_key, label_key, common_key, second_key, *others = (
        mix((base + i * golden) & U64) for i in range(1, 9)
    )
    cell, category, pair, number = ([mix((key + i) & U64) for i in range(1, 9)] for key in others)

    def hashed(*terms):
        return mix(sum(terms) & U64)

    def normal(z):
        return (sum(z.to_bytes(8, "little")) - 1020) / math.sqrt(8 * (256**2 - 1) / 12)

    def weights(count, std):
        falling = [0.85**i for i in range(count)]
        return [std * w / math.hypot(*falling) for w in falling]

    rows = range(0, 40_000, 97)
    drawn = stream.rows(rows)
    clicks, logits = [], []
    for i, row in enumerate(rows):
        key = hashed(row, row_key)
        ranks = []
        for c, size in enumerate(sizes):
            v = 1 - (hashed(key, cell[c]) >> 11) / 2**53
            end = (size + 1) ** (1 - zipf)
            ranks.append(min(int((end + v * (1 - end)) ** (1 / (1 - zipf))) - 1, size - 1))
        assert drawn.categorical[i].tolist() == ranks

        common = normal(hashed(key, common_key))
        spreads = [1 + f % 4 / 2 for f in range(6)]
        z = [(normal(hashed(key, number[f])) + common) / math.sqrt(2) for f in range(6)]
        numbers = [math.log1p(math.floor(math.exp(1 + s * x))) for s, x in zip(spreads, z, strict=True)]
        assert drawn.numeric[i].tolist() == pytest.approx(numbers, rel=1e-6)

        x = [value / s for value, s in zip(drawn.numeric[i].tolist(), spreads, strict=True)]
        shapes = [x[0], 2 / (1 + (x[1] - 1) ** 2), x[2]]
        u, w = weights(3, 0.7), weights(4, 1.3)
        hashes = [hashed(rank, key) for rank, key in zip(ranks, category, strict=False)]
        pairs = [hashed(hashes[0], hashes[1], pair[0]), hashed(hashes[2], hashes[3], pair[1])]
        angle = 2 * math.pi * drift * row / rows_of_drift
        logits.append(
            math.cos(angle) * math.fsum(w[c] * normal(hashes[c]) for c in range(4))
            + math.sin(angle) * math.fsum(w[c] * normal(hashed(hashes[c], second_key)) for c in range(4))
            + math.fsum(0.5 / math.sqrt(2) * normal(h) for h in pairs)
            + math.fsum(a * b for a, b in zip(u, shapes, strict=True))
        )
        clicks.append((hashed(key, label_key) >> 11) / 2**53)

    # What is taken off are three numbers, of the parts that do not turn and of those with cosine and sine.
    turns = 2 * np.pi * drift * np.array(rows) / rows_of_drift
    off = logit(drawn.probability).numpy() - np.array(logits)
    parts = np.column_stack([np.ones_like(turns), np.cos(turns), np.sin(turns)])
    rest = off - parts @ np.linalg.lstsq(parts, off, rcond=None)[0]
    assert np.abs(rest).max() < 1e-9
    assert drawn.label.tolist() == (torch.tensor(clicks) < drawn.probability).tolist()


def test_functions_of_floats():
    x = np.concatenate([np.linspace(-300, 300, 10_007), np.linspace(-2, 2, 1001)])
    np.testing.assert_allclose(module._exp2(x), np.exp2(x), rtol=1e-12)
    np.testing.assert_allclose(module._log2(np.exp2(x)), x, rtol=1e-12, atol=1e-12)
    assert (module._exp2(np.arange(-1022.0, 1023)) == [math.ldexp(1, e) for e in range(-1022, 1023)]).all()
    turn = np.linspace(0, 1, 1001)[:-1]
    cosine, sine = module._cos_sin(turn)
    np.testing.assert_allclose(cosine, np.cos(2 * np.pi * turn), atol=1e-14)
    np.testing.assert_allclose(sine, np.sin(2 * np.pi * turn), atol=1e-14)
    np.testing.assert_allclose(module._sigmoid(x / 10), 1 / (1 + np.exp(-x / 10)), rtol=1e-11)


@given(st.lists(st.integers(0, U64), max_size=20))
def test_the_hash_is_a_permutation(numbers):
    def unshift(z, by):
        x = z
        for _ in range(64 // by):
            x = z ^ x >> by
        return x

    hashed = module._mix(np.array(numbers, np.uint64)).tolist()
    assert hashed == [mix(z) for z in numbers]
    for number, z in zip(numbers, hashed, strict=True):
        z = unshift(z, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & U64
        z = unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & U64
        assert unshift(z, 30) == number


@given(st.lists(st.integers(0, U64), max_size=20))
def test_sums_of_bytes(numbers):
    sums = module._byte_sum(np.array(numbers, np.uint64))
    assert sums.tolist() == [sum(number.to_bytes(8, "big")) for number in numbers]


# Random access.

INDEX = st.one_of(st.integers(0, 3 * BLOCK), st.integers(0, ROWS - 1))


@given(st.lists(INDEX, max_size=12), st.sampled_from([13, 1, 0]), st.sampled_from([SMALL, (2,), (5, 6)]))
def test_rows_do_not_depend_on_what_is_asked_with_them(indices, numeric_features, categories):
    stream = ClickStream(5, numeric_features=numeric_features, categories=categories, drift=3.0)
    together = stream.rows(indices)
    assert len(together.label) == len(indices)
    for i, index in enumerate(indices):
        assert same(stream.rows([index]), [tensor[i : i + 1] for tensor in together])


def test_any_order_gives_the_bits_of_reading_in_order():
    count = 2 * BLOCK + 77
    in_order = DEFAULT.rows(range(count))
    assert not same(in_order, ClickStream(1).rows(range(count)))
    order = torch.randperm(count)
    assert same(DEFAULT.rows(order), [tensor[order] for tensor in in_order])
    assert same(DEFAULT.rows(range(count - 1, -1, -3)), [tensor.flip(0)[::3] for tensor in in_order])
    assert same(joined([DEFAULT.rows(part) for part in order.split(1009)]), DEFAULT.rows(order))


def test_kinds_of_indices():
    expected = DEFAULT.rows([3, 5, 7])
    wide = torch.arange(9).view(3, 3).T
    for indices in (
        torch.tensor([3, 5, 7]),
        torch.tensor([3, 5, 7], dtype=torch.uint8),
        np.array([3, 5, 7], np.uint64),
        np.array([3, 5, 7], np.int16),
        range(3, 9, 2),
        slice(3, 8, 2),
        (3, np.int64(5), 7),
    ):
        assert same(DEFAULT.rows(indices), expected)
    assert same(DEFAULT.rows(wide[0]), DEFAULT.rows([0, 3, 6]))  # not contiguous
    assert same(DEFAULT.rows(slice(4)), DEFAULT.rows(range(4)))
    assert same(DEFAULT.rows(range(ROWS - 1, ROWS + 10**29, 10**30)), DEFAULT.rows([ROWS - 1]))


@pytest.mark.parametrize(
    "nothing", [[], (), range(0), range(5, 5), slice(0), torch.empty(0, dtype=torch.int64), np.empty(0, int)]
)
def test_no_rows(nothing):
    rows = DEFAULT.rows(nothing)
    assert [tuple(tensor.shape) for tensor in rows] == [(0, 26), (0, 13), (0,), (0,)]
    assert rows.categorical.dtype == torch.int64 and rows.probability.dtype == torch.float64


def test_streams_without_numbers_or_categories():
    rows = ClickStream(numeric_features=0, categories=SMALL).rows(range(10))
    assert rows.numeric.shape == (10, 0) and rows.categorical.shape == (10, 5)
    rows = ClickStream(numeric_features=3, categories=()).rows(range(10))
    assert rows.numeric.shape == (10, 3) and rows.categorical.shape == (10, 0)


@pytest.mark.parametrize("batch_size", [1, 64, 1000, BLOCK, BLOCK + 1, 10_000])
def test_batches_cover_the_rows_once(batch_size):
    stream = ClickStream(categories=SMALL)
    start, stop = 17, 4321
    batches = list(stream.batches(batch_size, start=start, stop=stop))
    sizes = [len(batch.label) for batch in batches]
    whole, rest = divmod(stop - start, batch_size)
    assert sizes == [batch_size] * whole + [rest] * (rest > 0)
    assert same(joined(batches), stream.rows(range(start, stop)))
    later = joined(itertools.islice(stream.batches(batch_size, start, stop), len(sizes) // 2, None))
    from_there = stream.batches(batch_size, start + len(sizes) // 2 * batch_size, stop)
    assert same(later, joined(from_there))


def test_batches_may_go_on_for_ever_or_not_begin():
    stream = ClickStream(categories=SMALL)
    three = list(itertools.islice(stream.batches(100, start=10**15), 3))
    assert same(joined(three), stream.rows(range(10**15, 10**15 + 300)))
    assert list(stream.batches(100, start=5, stop=5)) == []
    last = list(stream.batches(100, start=ROWS - 150))
    assert [len(batch.label) for batch in last] == [100, 50]


def test_no_generator_is_touched():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    ClickStream(3, categories=SMALL).rows(range(10))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_a_copy_gives_the_same_rows():
    stream = ClickStream(8, categories=SMALL, drift=1.5)
    copy = pickle.loads(pickle.dumps(stream))
    assert same(copy.rows(range(100)), stream.rows(range(100)))
    assert copy.fingerprint() == stream.fingerprint()
    assert len(pickle.dumps(DEFAULT)) < 500_000  # no tables as long as categories


OTHERS = {
    "seed": 1,
    "numeric_features": 12,
    "categories": (1501, *SMALL[1:]),
    "zipf": 1.2,
    "click_rate": 0.26,
    "drift": 0.5,
    "rows_of_drift": 2_000_000,
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_argument_counts(name):
    arguments = {"categories": SMALL}
    stream, other = ClickStream(**arguments), ClickStream(**arguments | {name: OTHERS[name]})
    assert getattr(other, name) == OTHERS[name]
    assert other.fingerprint() != stream.fingerprint() and repr(other) != repr(stream)
    assert not same(other.rows(range(10_000)), stream.rows(range(10_000)))


def test_names_of_a_stream():
    stream = ClickStream(2, numeric_features=3, categories=[4, 5], zipf=1, drift=0)
    assert repr(stream) == (
        "ClickStream(seed=2, numeric_features=3, categories=(4, 5), zipf=1.0, click_rate=0.25, drift=0.0, "
        "rows_of_drift=1000000)"
    )
    assert eval(repr(stream)).fingerprint() == stream.fingerprint()
    same_one = ClickStream(np.int64(2), numeric_features=3, categories=(4, np.int32(5)), zipf=1.0, drift=0.0)
    assert same_one.fingerprint() == stream.fingerprint()
    assert re.fullmatch(r"ClickStream/1/[0-9a-f]{16}", stream.fingerprint())


def test_seeds_have_nothing_in_common():
    one, other = (ClickStream(seed, categories=(2**40,) * 4, zipf=0.01) for seed in (0, 1))
    a, b = (stream.rows(range(50_000)) for stream in (one, other))
    assert not (a.categorical == b.categorical).any()
    columns = np.column_stack([a.categorical, a.numeric, b.categorical, b.numeric]).astype(float)
    between = np.corrcoef(columns, rowvar=False)[:17, 17:]
    assert np.abs(between).max() < 5 / math.sqrt(50_000)
    shifted = np.corrcoef(a.categorical[1:, 0], b.categorical[:-1, 0])[0, 1]
    assert abs(shifted) < 5 / math.sqrt(50_000)


# The law of the categories.


def share_below(rank, size, zipf):
    """Of the categories 0..rank-1."""
    if zipf == 1:
        return math.log1p(rank) / math.log1p(size)
    return math.expm1((1 - zipf) * math.log1p(rank)) / math.expm1((1 - zipf) * math.log1p(size))


@pytest.mark.parametrize("zipf", [0.3, 0.9, 1, 1 + 1e-9, 1 + 1e-7, 1.1, 2, 4.5])
@pytest.mark.parametrize("size", [1, 2, 10, 10**6, 2**40])
def test_categories_follow_the_law(size, zipf):
    count = 40_000
    stream = ClickStream(11, numeric_features=0, categories=(7, size), zipf=zipf)
    ranks = stream.rows(range(count)).categorical[:, 1].numpy()
    assert ranks.min() >= 0 and ranks.max() < size
    # Each of the first ranks, then all from one power of two to the next.
    edges = sorted({0, *(r for r in (1, 2, 3, 4, 5, 6, 7) if r < size), *(2**k for k in range(3, 48))})
    edges = [edge for edge in edges if edge < size] + [size]
    shares = np.diff([share_below(edge, size, zipf) for edge in edges])
    assert shares.sum() == pytest.approx(1)
    found = np.histogram(ranks, edges)[0]
    if size < 8:
        assert set(ranks.tolist()) == set(range(size))
    expected = count * shares
    known = expected > 10
    z = (found - expected)[known] / np.sqrt(expected * (1 - shares) + 1e-9)[known]
    assert np.abs(z).max() < 4.5
    assert found[~known].sum() <= 5 * (1 + expected[~known].sum())


def test_the_law_within_a_power_of_two():
    size, zipf, count = 10**6, 1.1, 200_000
    ranks = ClickStream(3, numeric_features=0, categories=(size,), zipf=zipf).rows(range(count)).categorical
    shares = np.diff([share_below(rank, size, zipf) for rank in range(65)])
    found = torch.bincount(ranks[ranks < 64], minlength=64).numpy()
    z = (found - count * shares) / np.sqrt(count * shares * (1 - shares))
    assert np.abs(z).max() < 4.5 and 0.7 < (z**2).mean() < 1.5


def test_extreme_exponents():
    for zipf in (1e-300, 50, 1e6, 1e300):
        ranks = ClickStream(categories=(1, 2, 2**48), zipf=zipf).rows(range(2000)).categorical
        assert (ranks >= 0).all() and (ranks < torch.tensor([1, 2, 2**48])).all()
        assert (ranks == 0).all() if zipf >= 50 else ranks[:, 2].double().mean() > 2**46


def test_columns_are_independent():
    """Ranks that are about uniform; the label, given its probability, is one column more."""
    count = 100_000
    stream = ClickStream(4, numeric_features=1, categories=(2**40,) * 11, zipf=0.001)
    rows = stream.rows(range(count))
    surprise = (rows.label - rows.probability) / (rows.probability * (1 - rows.probability)).sqrt()
    columns = np.column_stack([rows.categorical.double(), rows.numeric, surprise])
    columns = np.column_stack([columns[1:], columns[:-1]])  # beside the row before
    correlation = np.corrcoef(columns, rowvar=False) - np.eye(26)
    assert np.abs(correlation).max() < 5 / math.sqrt(count)
    assert np.abs(np.corrcoef(columns**2, rowvar=False) - np.eye(26)).max() < 5 / math.sqrt(count)
    assert columns[:, :11].mean(0) == pytest.approx(2**39, rel=0.01)


# The truth.


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("click_rate", [0.01, 0.25, 0.9])
def test_the_rate_of_clicks_is_met(click_rate, seed):
    for drift in (0, 0.25):
        stream = ClickStream(seed, click_rate=click_rate, drift=drift)
        rows = stream.rows(range(7, 4_000_000, 80))  # a turn of the drift
        rate = rows.probability.mean().item()
        assert abs(logit(torch.tensor(rate)) - logit(torch.tensor(click_rate))) < 0.05
        variance = (rows.probability * (1 - rows.probability)).sum()
        assert abs(rows.label.sum() - rows.probability.sum()) < 4.5 * variance.sqrt()


def test_the_rate_does_not_drift():
    stream = ClickStream()
    for start in range(0, 4_000_000, 500_000):
        assert 0.23 < stream.rows(range(start, start + 20_000)).probability.mean() < 0.27


@pytest.mark.parametrize("click_rate", [1e-250, 1e-12, 1 - 1e-12])
def test_rates_near_0_and_1(click_rate):
    rows = ClickStream(click_rate=click_rate, categories=SMALL).rows(range(2000))
    rate = rows.probability.mean().item()
    assert rate == pytest.approx(click_rate, rel=0.2)
    assert rows.label.unique().tolist() == [round(click_rate)]


def test_labels_are_calibrated():
    rows = DEFAULT.rows(range(200_000))
    order = rows.probability.argsort()
    spread = 0.0
    for part in order.split(10_000):
        probability, label = rows.probability[part], rows.label[part].double()
        z = (label - probability).sum() / (probability * (1 - probability)).sum().sqrt()
        assert abs(z) < 4.5
        spread += z.item() ** 2 / 20
    assert 0.3 < spread < 2.2
    assert rows.probability[order[10_000]] < 0.05 and rows.probability[order[-10_000]] > 0.6


def test_no_other_probability_loses_less():
    rows = DEFAULT.rows(range(200_000))
    truth = log_loss(rows.probability, rows.label)
    entropy = log_loss(rows.probability, rows.probability)
    assert abs((truth - entropy).mean()) < 4.5 * (truth - entropy).std() / math.sqrt(len(truth))
    noise = torch.randn(len(truth), dtype=torch.float64)
    true_logit = logit(rows.probability)
    for other in (
        true_logit + 0.2,
        true_logit - 0.2,
        true_logit * 1.2,
        true_logit * 0.8,
        true_logit + 0.3 * noise,
        true_logit.roll(1),
        torch.full_like(true_logit, math.log(0.25 / 0.75)),
    ):
        other = other.sigmoid()
        more = log_loss(other, rows.label) - truth
        error = more.std() / math.sqrt(len(more))
        assert more.mean() > 4.5 * error
        known = log_loss(other, rows.probability) - entropy  # Kullback-Leibler divergence
        assert (known > -1e-12).all() and abs(more.mean() - known.mean()) < 4.5 * error


def test_the_first_half_of_the_columns_matter():
    stream = ClickStream(6, categories=(50,) * 8, numeric_features=0, zipf=0.5, drift=0)
    rows = stream.rows(range(200_000))
    effect = logit(rows.probability)
    explained = []
    for column in rows.categorical.T:
        count = torch.bincount(column, minlength=50)
        mean = torch.bincount(column, effect, minlength=50) / count
        explained.append((mean[column].var() / effect.var()).item())
    assert min(explained[:4]) > 0.05 and max(explained[4:]) < 0.001
    # With the pairs of columns on top, it is 1.
    assert 0.7 < sum(explained) < 0.98
    groups = {}
    for key, value in zip(rows.categorical[:, :4].tolist(), effect.tolist(), strict=True):
        groups.setdefault(tuple(key), set()).add(value)
    assert all(len(values) == 1 for values in groups.values())


def test_effects_are_about_normal():
    sizes = (10**12,)
    rows = ClickStream(2, categories=sizes, numeric_features=0, zipf=0.01, drift=0).rows(range(100_000))
    effect = logit(rows.probability)
    z = (effect - effect.mean()) / effect.std()
    assert effect.std() == pytest.approx(1.3, rel=0.02)
    assert abs((z**3).mean()) < 0.05 and abs((z**4).mean() - 2.85) < 0.1
    for bound, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert (z.abs() < bound).double().mean() == pytest.approx(share, abs=0.01)


# Drift.


def gap(stream, row):
    """Between the logits of two categories, about this row."""
    rows = stream.rows(range(row, row + 64))
    category = rows.categorical[:, 0]
    logits = logit(rows.probability)
    return (logits[category == 1][0] - logits[category == 0][0]).item()


def test_effects_turn():
    def stream(drift):
        return ClickStream(1, numeric_features=0, categories=(2,), drift=drift, rows_of_drift=10**9)

    turn = 2 * 10**9
    first, quarter = gap(stream(0.5), 0), gap(stream(0.5), turn // 4)
    assert abs(first) > 0.1 and abs(quarter) > 0.1
    for eighth in range(30):
        angle = math.pi / 4 * eighth
        expected = math.cos(angle) * first + math.sin(angle) * quarter
        assert gap(stream(0.5), eighth * turn // 8) == pytest.approx(expected, abs=1e-5)
    assert gap(stream(0), 0) == pytest.approx(first, abs=1e-5)
    for row in (turn // 4, turn // 2, 10**15, ROWS - 64):
        assert gap(stream(0), row) == pytest.approx(first, abs=1e-9)
    assert gap(stream(0.25), turn // 2) == pytest.approx(quarter, abs=1e-5)


def test_after_a_quarter_of_a_turn_what_was_known_is_of_no_use():
    """Of the logits of the same categories, by column: at the start, then, and half a turn later."""

    def means(start):
        rows = stream.rows(range(start, start + 100_000))
        sums = torch.bincount(rows.categorical[:, 0], logit(rows.probability), minlength=2000)
        return (sums / torch.bincount(rows.categorical[:, 0], minlength=2000)).numpy()

    stream = ClickStream(categories=(2000,), numeric_features=0, zipf=0.2, rows_of_drift=10**12)
    start, quarter, half = means(0), means(10**12), means(2 * 10**12)
    assert abs(np.corrcoef(start, quarter)[0, 1]) < 5 / math.sqrt(2000)
    assert np.corrcoef(start, half)[0, 1] < -0.999
    assert np.corrcoef(start, means(4 * 10**12))[0, 1] > 0.999


def test_a_model_learns_in_one_pass():
    stream = ClickStream(categories=(30, 300, 10, 5000), drift=0)
    model = TabularEnsemble(2, [(size, 4) for size in stream.categories], 13, [16], 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses, baseline, truth = [], [], []
    for batch in stream.batches(256, stop=256 * 250):
        loss = model.loss(batch.categorical, batch.numeric, batch.label.unsqueeze(1), loss="bce")
        losses.append(loss.mean().item())  # before learning from it
        baseline.append(log_loss(torch.full_like(batch.probability, 0.25), batch.label).mean().item())
        truth.append(log_loss(batch.probability, batch.label).mean().item())
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    loss, base, least = (sum(values[150:]) / 100 for values in (losses, baseline, truth))
    assert least < loss < (least + base) / 2


# What is refused.

ARGUMENTS = {
    "a float seed": (dict(seed=1.0), TypeError, "seed: expected an integer, got float"),
    "a negative seed": (dict(seed=-1), ValueError, "seed: expected 0 to 18446744073709551615, got -1"),
    "a large seed": (dict(seed=1 << 64), ValueError, "seed: expected 0 to"),
    "numbers": (dict(numeric_features=-1), ValueError, "numeric_features: expected 0 to 1024, got -1"),
    "true": (dict(numeric_features=True), TypeError, "numeric_features: expected an integer, got bool"),
    "no columns": (
        dict(numeric_features=0, categories=()),
        ValueError,
        "numeric_features: expected 1 or more without categories, got 0",
    ),
    "one number": (dict(categories=5), TypeError, "categories: expected a list of ints, got int"),
    "a word": (dict(categories="55"), TypeError, "categories: expected a list of ints, got str"),
    "no category": (
        dict(categories=(3, 0)),
        ValueError,
        "categories[1]: expected 1 to 281474976710656, got 0",
    ),
    "many": (dict(categories=(2**48 + 1,)), ValueError, "categories[0]: expected 1 to 281474976710656, got"),
    "a size": (dict(categories=(3, 2.0)), TypeError, "categories[1]: expected an integer, got float"),
    "zipf 0": (dict(zipf=0), ValueError, "zipf: expected above 0, got 0"),
    "zipf < 0": (dict(zipf=-1.5), ValueError, "zipf: expected above 0, got -1.5"),
    "zipf nan": (dict(zipf=math.nan), ValueError, "zipf: expected a finite number, got nan"),
    "zipf inf": (dict(zipf=math.inf), ValueError, "zipf: expected a finite number, got inf"),
    "zipf text": (dict(zipf="1"), TypeError, "zipf: expected a number, got str"),
    "rate 0": (dict(click_rate=0), ValueError, "click_rate: expected above 0 and below 1, got 0"),
    "rate 1": (dict(click_rate=1.0), ValueError, "click_rate: expected above 0 and below 1, got 1.0"),
    "rate nan": (dict(click_rate=math.nan), ValueError, "click_rate: expected a finite number, got nan"),
    "drift": (dict(drift=-0.1), ValueError, "drift: expected 0 or more, got -0.1"),
    "drift nan": (dict(drift=math.nan), ValueError, "drift: expected a finite number, got nan"),
    "drift none": (dict(drift=None), TypeError, "drift: expected a number, got NoneType"),
    "rows 0": (dict(rows_of_drift=0), ValueError, "rows_of_drift: expected 1 to 4611686018427387904, got 0"),
    "rows": (dict(rows_of_drift=1e6), TypeError, "rows_of_drift: expected an integer, got float"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments(case):
    arguments, error, message = ARGUMENTS[case]
    with pytest.raises(error, match=re.escape(f"ClickStream: {message}")):
        ClickStream(**arguments)


RANGE = "expected rows 0 to 2^62 - 1, got "
INDICES = {
    "negative": (torch.tensor([3, -2, 5]), ValueError, f": {RANGE}-2"),
    "large": (np.array([1, ROWS]), ValueError, f": {RANGE}{ROWS}"),
    "larger": (np.array([U64], np.uint64), ValueError, f": {RANGE}{U64}"),
    "a list": ([0, -1], ValueError, ": expected 0 to 4611686018427387903, got -1"),
    "a large list": ([0, 10**30], ValueError, f": expected 0 to 4611686018427387903, got {10**30}"),
    "range": (range(5, -2, -1), ValueError, f": {RANGE}-1"),
    "long range": (range(0, 1 << 80, 1 << 70), ValueError, f": {RANGE}"),
    "slice": (slice(-5, 3), ValueError, ".start: expected 0 to 4611686018427387904, got -5"),
    "slice down": (slice(5, 3, -1), ValueError, ".step: expected 1 to 4611686018427387904, got -1"),
    "no end": (slice(5, None), ValueError, ": expected a slice with an end, got slice(5, None, None)"),
    "floats": (torch.tensor([1.0]), TypeError, ": expected integers, got torch.float32"),
    "halves": (torch.tensor([1.0]).bfloat16(), TypeError, ": expected integers, got torch.bfloat16"),
    "a mask": (torch.tensor([True]), TypeError, ": expected integers, got bool"),
    "float array": (np.array([]), TypeError, ": expected integers, got float64"),
    "float list": ([1.5], TypeError, ": expected an integer, got float"),
    "bool list": ([True], TypeError, ": expected an integer, got bool"),
    "one": (3, TypeError, ": expected row numbers, got int"),
    "text": ("12", TypeError, ": expected row numbers, got str"),
    "scalar": (torch.tensor(3), ValueError, ": expected one dimension, got shape ()"),
    "matrix": (np.zeros((2, 3), int), ValueError, ": expected one dimension, got shape (2, 3)"),
}


@pytest.mark.parametrize("case", INDICES)
def test_bad_indices(case):
    indices, error, message = INDICES[case]
    with pytest.raises(error, match=re.escape(f"ClickStream.rows: indices{message}")):
        DEFAULT.rows(indices)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "batch_size: expected 1 to 4611686018427387904, got 0"),
        ((2.0,), TypeError, "batch_size: expected an integer, got float"),
        ((5, -1), ValueError, "start: expected 0 to 4611686018427387904, got -1"),
        ((5, 7, 6), ValueError, "stop: expected 7 to 4611686018427387904, got 6"),
        ((5, 7, ROWS + 1), ValueError, f"stop: expected 7 to 4611686018427387904, got {ROWS + 1}"),
    ],
)
def test_bad_batches_are_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=re.escape(f"ClickStream.batches: {message}")):
        DEFAULT.batches(*arguments)
