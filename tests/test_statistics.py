import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from lirefs.statistics import auroc, interval, resample_counts, wilson


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
    resampled = []
    for _ in range(500):
        rows = np.concatenate([generator.choice(np.flatnonzero(labels == k), 100) for k in (0, 1)])
        resampled.append(roc_auc_score(labels[rows], scores[rows]))
    low, high = interval(np.array(resampled))
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)


def test_auroc_intervals_cover_the_truth():
    from scipy.stats import norm

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
