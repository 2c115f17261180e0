"""pyens.variation: the estimator as scikit-learn wants it, and what the document asks of it."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.base import clone, is_regressor
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor

import pyens
from pyens.variation import (
    ActivationStatistics,
    ActivationStrength,
    VariationEstimator,
    fit_together,
    strength_features,
    strength_of,
)

UNITS = 13
SMALL = {"hidden_features": (16, 8), "batch_size": 32, "learning_rate": 1e-2, "max_epochs": 30}


def made_up(rows: int = 403, seed: int = 0) -> tuple[ActivationStrength, Tensor]:
    """The strength of a small model's units, and a PV that depends on values and on who is active."""
    draw = torch.Generator().manual_seed(seed)
    model = pyens.EnsembleMLP(1, 6, [8, 5], 1, seeds=[3])
    x = torch.randn(rows, 6, generator=draw)
    statistics = ActivationStatistics()
    statistics.observe(model, x)
    strength = strength_of(model, x, mean=statistics.mean, std=statistics.std)
    value, active = strength.value[0], strength.active[0]
    pv = 0.2 + 0.05 * value[:, :3].sum(1) + 0.1 * active[:, 3:6].sum(1)
    return strength, (pv + 0.01 * torch.randn(rows, generator=draw)).clamp_min(0)


# --- scikit-learn -----------------------------------------------------------------------------------------


@parametrize_with_checks(
    [VariationEstimator(hidden_features=(20,), batch_size=16, learning_rate=1e-2, max_epochs=40)]
)
def test_scikit_learn(estimator, check):
    check(estimator)


def test_it_is_cloned_and_cross_validated():
    strength, pv = made_up()
    table = strength_features(strength).numpy()
    estimator = VariationEstimator(**SMALL)
    copy = clone(estimator.fit(table, pv))
    assert copy.get_params() == estimator.get_params() and not hasattr(copy, "head_")
    assert is_regressor(estimator)
    scores = cross_val_score(estimator, table, pv.numpy(), cv=3)
    assert (scores > 0.8).all()
    assert cross_val_score(VariationEstimator(task="classification", **SMALL), table, pv.numpy(), cv=3)[
        0
    ] > 1.5 * (1 / 5)


def test_a_search_chooses_between_features():
    strength, pv = made_up()
    search = GridSearchCV(
        make_pipeline(StandardScaler(), VariationEstimator(**SMALL)),
        {"variationestimator__features": ["binary", "both"]},
        cv=2,
    ).fit(strength_features(strength).numpy(), pv.numpy())
    assert search.best_params_ == {"variationestimator__features": "both"}


def test_without_scikit_learn_the_rest_works_and_the_error_names_it():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import pyens.variation as v; v.VariationModel, v.strength_of\n"
        "try: v.VariationEstimator\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "VariationEstimator needs scikit-learn" in done.stdout


# --- what it learns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
def test_features_are_values_then_bits(pack):
    model = pyens.EnsembleMLP(1, 6, [8, 5], 1)
    x = torch.randn(50, 6)
    strength = strength_of(model, x, bitpack=pack)
    plain = strength_of(model.member(0), x)
    table = strength_features(strength)
    assert table.dtype == torch.float32 and table.shape == (50, 26)
    assert torch.equal(table[:, :13], strength.value[0])
    assert torch.equal(table[:, 13:], plain.active.float())
    assert torch.equal(strength_features(plain)[:, 13:], table[:, 13:])


@pytest.mark.parametrize("features", ["binary", "value", "both"])
def test_only_the_chosen_features_count(features):
    strength, pv = made_up()
    estimator = VariationEstimator(features=features, **SMALL).fit(strength, pv)
    assert estimator.head_.mlp.in_features == {"binary": 13, "value": 13, "both": 26}[features]
    table = strength_features(strength).numpy()
    expected = estimator.predict(table)
    np.testing.assert_array_equal(estimator.predict(strength), expected)
    for columns, unused in ((slice(0, 13), "binary"), (slice(13, 26), "value")):
        other = table.copy()
        other[:, columns] = 1 - other[:, columns]
        assert np.array_equal(estimator.predict(other), expected) == (features == unused)


def test_both_features_say_more_than_either():
    strength, pv = made_up(2000)
    test, truth = made_up(500, seed=1)
    score = {
        features: VariationEstimator(features=features, **SMALL).fit(strength, pv).score(test, truth)
        for features in ("binary", "value", "both")
    }
    assert score["both"] > max(score["binary"], score["value"]) and score["both"] > 0.9


def test_the_prediction_is_clipped_and_in_units_of_the_pv():
    strength, pv = made_up()
    thousandfold = VariationEstimator(**SMALL).fit(strength, 1000 * pv)
    estimator = VariationEstimator(**SMALL).fit(strength, pv)
    np.testing.assert_allclose(thousandfold.predict(strength), 1000 * estimator.predict(strength), rtol=2e-2)
    far = 1e6 * np.random.default_rng(0).normal(size=(200, 26)).astype(np.float32)
    found = estimator.predict(far)
    limit = (pv.double().mean() + 3 * pv.double().std(correction=0)).item()
    assert found.min() == 0 and found.max() == pytest.approx(limit)


def test_buckets_are_percentiles_of_training():
    strength, pv = made_up(1000)
    for task in ("regression", "classification"):
        estimator = VariationEstimator(task=task, **SMALL).fit(strength, pv)
        thresholds = np.quantile(pv.double().numpy(), [0.2, 0.4, 0.6, 0.8])
        np.testing.assert_array_equal(estimator.head_.thresholds.numpy(), thresholds)
        buckets = estimator.predict_bucket(strength)
        truth = np.digitize(pv.numpy(), thresholds)
        assert np.bincount(truth).tolist() == [200] * 5
        assert (buckets == truth).mean() > 0.6
        assert (abs(buckets - truth) <= 1).mean() > 0.95
        if task == "classification":
            probabilities = estimator.predict_proba(strength)
            np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
            np.testing.assert_array_equal(estimator.predict(strength), probabilities.argmax(1))
            assert estimator.score(strength, pv) == pytest.approx((buckets == truth).mean())
        else:
            assert not hasattr(estimator, "predict_proba")
            residual = pv.numpy() - estimator.predict(strength)
            assert estimator.score(strength, pv) == pytest.approx(
                1 - residual.var() / pv.numpy().var(), abs=1e-2
            )


def test_values_count_up_to_ten_deviations():
    strength, pv = made_up()
    value = strength.value.clone()
    value[0, ::7, 12] = 1e6  # a unit that fires where it hardly ever did
    outliers = VariationEstimator(**SMALL).fit(strength._replace(value=value), pv)
    assert (outliers.history_.validation_loss < 2).all()
    value[0, ::7, 12] = 10
    same = VariationEstimator(**SMALL).fit(strength._replace(value=value), pv)
    np.testing.assert_array_equal(same.predict(strength), outliers.predict(strength))


def test_early_stopping_keeps_the_best_epoch():
    strength, pv = made_up()
    stopped = VariationEstimator(**SMALL | {"max_epochs": 200, "patience": 2}).fit(strength, pv)
    history = stopped.history_
    assert history.status == ("stopped",) and len(history.train_loss) < 200
    assert history.best_epoch[0] == history.validation_loss[:, 0].argmin() == len(history.train_loss) - 3
    whole = VariationEstimator(**SMALL | {"max_epochs": 4, "validation": 0}).fit(strength, pv)
    assert whole.history_.epochs.tolist() == [4] and np.isnan(whole.history_.validation_loss).all()


def test_variation_that_is_the_same_everywhere():
    strength, pv = made_up()
    for same in (0.0, 0.1, 0.25):
        estimator = VariationEstimator(**SMALL).fit(strength, torch.full_like(pv, same))
        np.testing.assert_allclose(estimator.predict(strength), same, rtol=1e-6)


# --- bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_together_is_bit_for_bit_as_alone(task):
    problems = [made_up(seed=seed) for seed in range(4)]
    params = SMALL | {"task": task, "patience": 2}
    together = fit_together([VariationEstimator(**params) for _ in problems], *zip(*problems, strict=True))
    ends = set()
    for estimator, (strength, pv) in zip(together, problems, strict=True):
        alone = VariationEstimator(**params).fit(strength, pv)
        state = alone.head_.state_dict()
        assert all(torch.equal(state[name], t) for name, t in estimator.head_.state_dict().items())
        np.testing.assert_array_equal(alone.history_.validation_loss, estimator.history_.validation_loss)
        assert alone.history_.status == estimator.history_.status
        ends.add(len(alone.history_.train_loss))
    assert len(ends) > 1  # some stopped while others went on


def test_the_same_bits_for_any_number_of_threads_and_any_seed_its_own():
    strength, pv = made_up()
    threads = torch.get_num_threads()
    first = VariationEstimator(**SMALL).fit(strength, pv).predict(strength)
    try:
        torch.set_num_threads(threads + 1)
        second = VariationEstimator(**SMALL).fit(strength, pv).predict(strength)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, VariationEstimator(**SMALL, seed=1).fit(strength, pv).predict(strength))


def test_bfloat16_counts_as_the_float32_it_is():
    strength, pv = made_up(100)
    table, pv = strength_features(strength).bfloat16(), pv.bfloat16()
    low = VariationEstimator(**SMALL).fit(table, pv)
    same = VariationEstimator(**SMALL).fit(table.float(), pv.float())
    np.testing.assert_array_equal(low.predict(table), same.predict(table.float()))
    assert low.score(table, pv) == same.score(table.float(), pv.float())


def test_it_is_pickled():
    strength, pv = made_up(100)
    estimator = VariationEstimator(**SMALL).fit(strength, pv)
    copy = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(copy.predict(strength), estimator.predict(strength))


# --- bad input --------------------------------------------------------------------------------------------


def test_what_is_refused():
    strength, pv = made_up(60)
    estimator = VariationEstimator(**SMALL)
    with pytest.raises(NotFittedError, match="not fitted"):
        estimator.predict(strength)
    with pytest.raises(NotFittedError, match="not fitted"):
        estimator.score(strength, pv)
    empty = ActivationStrength(*(t[:, :0] for t in strength))
    with pytest.raises(ValueError, match=r"0 sample\(s\)"):
        estimator.fit(empty, pv[:0])
    with pytest.raises(ValueError, match="Input y contains NaN"):
        estimator.fit(strength, torch.where(torch.arange(60) == 7, torch.nan, pv))
    with pytest.raises(ValueError, match="Input X contains NaN"):
        estimator.fit(strength._replace(value=strength.value.log()), pv)
    with pytest.raises(ValueError, match=r"y: expected variations >= 0, got -0\.3"):
        estimator.fit(strength, torch.where(torch.arange(60) == 7, -0.3, pv))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        estimator.fit(strength, pv[:-1])
    two = ActivationStrength(*(torch.cat([t, t]) for t in strength))
    with pytest.raises(ValueError, match=r"strength: expected that of one model.*got shapes \[2, 60, 13\]"):
        estimator.fit(two, pv)
    with pytest.raises(ValueError, match=r"task: expected one of regression, classification, got 'rank'"):
        VariationEstimator(task="rank").fit(strength, pv)
    with pytest.raises(ValueError, match=r"features: expected one of binary, value, both, got 'bits'"):
        VariationEstimator(features="bits").fit(strength, pv)
    for buckets in (1, 0, 2.5):
        for task in ("regression", "classification"):
            with pytest.raises(ValueError, match=rf"buckets: expected an integer from 2, got {buckets}"):
                VariationEstimator(task=task, buckets=buckets).fit(strength, pv)
    with pytest.raises(TypeError, match=r"VariationEstimator: seed: expected an integer, got None"):
        VariationEstimator(seed=None).fit(strength, pv)
    with pytest.raises(
        ValueError, match=r"X: expected values and as many active for features='value', got 25"
    ):
        VariationEstimator(features="value").fit(strength_features(strength)[:, 1:], pv)


def test_a_fitted_one_answers_only_to_what_it_was_fitted_with():
    strength, pv = made_up(60)
    estimator = VariationEstimator(features="value", **SMALL).fit(strength, pv)
    with pytest.raises(ValueError, match=r"X has 24 features, but VariationEstimator is expecting 26"):
        estimator.predict(strength_features(strength)[:, 2:])
    estimator.set_params(features="both")
    with pytest.raises(ValueError, match=r"features: expected 'value' as it was fitted with, got 'both'"):
        estimator.predict(strength)


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_no_score_for_what_is_no_variation(task):
    strength, pv = made_up(60)
    estimator = VariationEstimator(task=task, **SMALL).fit(strength, pv)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="Input y contains"):
            estimator.score(strength, torch.where(torch.arange(60) == 7, bad, pv))
    with pytest.raises(ValueError, match=r"expected shape \[60\], .*got \[59\]"):
        estimator.score(strength, pv[:-1])


def test_what_does_not_fit_together():
    strength, pv = made_up(60)
    one, other = VariationEstimator(), VariationEstimator(max_epochs=3)
    with pytest.raises(ValueError, match=r"estimators\[1\]: expected VariationEstimator\(\), got"):
        fit_together([one, other], [strength, strength], [pv, pv])
    with pytest.raises(ValueError, match=r"expected as many as strengths and variations, .* got 2, 1 and 1"):
        fit_together([one, one], [strength], [pv])
    short = ActivationStrength(*(t[:, 1:] for t in strength))
    with pytest.raises(ValueError, match=r"strengths\[1\]: expected the shape of the first, \[60, 26\], got"):
        fit_together([one, clone(one)], [strength, short], [pv, pv[1:]])
