import tracemalloc

import numpy as np
import pytest
from scipy.stats import norm, pearsonr, spearmanr
from sklearn.metrics import roc_auc_score

from lirefs.statistics.intervals import (
    auroc,
    correlation,
    interval,
    resample_counts,
    roc_areas,
    wilson,
)


def test_wilson_against_published_values():
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        found = wilson(successes, n)
        assert (found.low, found.high) == (
            pytest.approx(low, abs=1e-4),
            pytest.approx(high, abs=1e-4),
        )


def test_auroc_and_its_interval():
    generator = np.random.default_rng(0)
    labels = np.arange(200) % 2
    scores = np.round(generator.normal(size=200) + labels, 1)  # rounded: ties
    found = auroc(scores, labels)
    assert found.value == pytest.approx(roc_auc_score(labels, scores))
    rows = np.concatenate(
        [generator.choice(np.flatnonzero(labels == k), (100, 500)) for k in (0, 1)]
    )
    low, high = interval(roc_areas(scores[rows], np.repeat([0, 1], 100)))
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)


def test_auroc_bootstrap_is_that_of_all_pairs(monkeypatch):
    generator = np.random.default_rng(2)
    labels = np.arange(61) % 3 // 2
    scores = generator.integers(0, 7, size=61).astype(float)
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = np.sign(positive[:, None] - negative) / 2 + 0.5
    rows, columns = resample_counts(20, 300, seed=0), resample_counts(41, 300, seed=1)
    expected = interval(((rows @ wins) * columns).sum(axis=1) / wins.size)
    whole = auroc(scores, labels, resamples=300)
    assert (whole.low, whole.high) == expected
    monkeypatch.setattr("lirefs.statistics.intervals.CHUNK", 61 * 7)
    assert auroc(scores, labels, resamples=300) == whole


def test_memory_of_auroc_does_not_grow_with_the_pairs():
    scores = np.random.default_rng(0).normal(size=8000)
    tracemalloc.start()
    auroc(scores, np.arange(8000) % 2, resamples=20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4000 * 4000 * 8 / 4


def test_auroc_intervals_cover_the_truth():
    truth = norm.cdf(1 / np.sqrt(2))
    generator = np.random.default_rng(1)
    labels = np.arange(120) % 2
    covered = 0
    for _ in range(300):
        found = auroc(generator.normal(size=120) + labels, labels, resamples=400)
        covered += found.low <= truth <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_resamples_draw_n_items_each():
    draws = resample_counts(7, 50, seed=0)
    assert draws.shape == (50, 7)
    assert (draws.sum(axis=1) == 7).all()
    assert (resample_counts(7, 50, seed=0) == draws).all()


def test_interval_ignores_what_is_not_finite():
    assert interval(np.array([np.nan, np.inf])) == (pytest.approx(np.nan, nan_ok=True),) * 2
    assert interval(np.array([1.0, np.nan])) == (1.0, 1.0)


def test_many_areas_at_once_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 5, size=(30, 3, 2)).astype(float)  # with ties
    labels = np.arange(30) % 2
    for place in np.ndindex(3, 2):
        expected = roc_auc_score(labels, scores[(slice(None), *place)])
        assert roc_areas(scores, labels)[place] == pytest.approx(expected)
    each = np.stack([generator.permutation(labels) for _ in range(2)], axis=1)
    expected = roc_auc_score(each[:, 1], scores[:, 2, 1])
    assert roc_areas(scores, each[:, None])[2, 1] == pytest.approx(expected)


def test_correlations_are_those_of_scipy():
    generator = np.random.default_rng(0)
    one = generator.normal(size=50)
    other = np.exp(one + 0.5 * generator.normal(size=50))
    assert correlation(one, other).value == pytest.approx(pearsonr(one, other).statistic)
    rank = correlation(one, other, ranks=True)
    assert rank.value == pytest.approx(spearmanr(one, other).statistic)
    assert rank.low < rank.value < rank.high
    known = pearsonr(one, other).confidence_interval()
    assert correlation(one, other).low == pytest.approx(known.low, abs=1e-6)
    assert np.isnan(correlation(one, np.ones(50)).value)
