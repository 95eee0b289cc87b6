"""Bootstraps and tests in blocks: the numbers of one matrix, in memory that does not grow."""

import tracemalloc

import numpy as np
import pytest

from lirefs.statistics import (
    Resamples,
    mean_estimate,
    paired_difference,
    paired_p_value,
    paired_ratio,
    permutation_p,
    resample_counts,
    resamples,
    sign_flip,
    significance,
    weighted_mean,
)
from lirefs.statistics.intervals import weighted_mean_resampled
from lirefs.statistics.paired import difference_resampled, ratio_resampled
from lirefs.statistics.resamples import finished
from lirefs.statistics.significance import paired_p_values


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(resamples, "CHUNK", 400)


@pytest.fixture
def scores():
    generator = np.random.default_rng(1)
    base = generator.random(31)
    return base + generator.normal(0.05, 0.2, 31), base, generator.integers(1, 9, 31).astype(float)


def test_blocks_are_the_rows_of_the_matrix(small_blocks):
    draws = Resamples(31, 50, seed=3)
    blocks = list(draws.blocks())
    assert [len(one) for one in blocks] == [8] * 6 + [2]
    whole = resample_counts(31, 50, seed=3)
    assert (np.concatenate(blocks) == whole).all()
    table = np.random.default_rng(0).normal(size=(31, 3))
    assert draws @ table == pytest.approx(whole @ table)
    assert draws @ table[:, 0] == pytest.approx(whole @ table[:, 0])


def test_estimates_are_those_of_the_matrix(small_blocks, scores):
    some, base, weights = scores
    whole, blocks = (
        [
            paired_difference(some, base, draws, weights),
            paired_ratio(some, base, draws),
            weighted_mean(some, weights, draws),
        ]
        for draws in (resample_counts(31, 200, 5), Resamples(31, 200, 5))
    )
    for one, other in zip(whole, blocks, strict=True):
        assert list(one.to_dict().values()) == pytest.approx(list(other.to_dict().values()))
        assert one.low < one.value < one.high


@pytest.mark.parametrize("waiting", [1, 500, 1 << 24])
def test_estimates_that_share_a_pass_do_not_mix(monkeypatch, scores, waiting):
    monkeypatch.setattr(resamples, "WAITING", waiting)
    some, base, weights = scores
    draws, right = Resamples(31, 200, 5), np.ones(31)
    expected = [
        weighted_mean(some, weights, draws),
        paired_difference(right, right, draws),
        paired_ratio(some, base, draws, weights),
        paired_difference(base, some, draws),
    ]
    together = finished(
        draws,
        [
            weighted_mean_resampled(some, weights),
            difference_resampled(right, right),  # needs no resamples
            ratio_resampled(some, base, weights),
            difference_resampled(base, some),
        ],
    )
    assert together == expected


def test_tests_that_share_their_signs_do_not_mix(monkeypatch, scores):
    some, base, weights = scores
    monkeypatch.setattr(significance, "PATTERNS", 4000)
    few = base.copy()
    few[:5] += 0.1
    pairs = [
        (some, base, weights),
        (base, base, None),
        (few, base, None),
        (some + 0.2, base, None),
        (np.ones(31), np.zeros(31), None),
        (base[:20] * 2, base[:20], None),
    ]
    assert paired_p_values(pairs) == [paired_p_value(*one) for one in pairs]
    assert paired_p_values(pairs)[0] == sign_flip(some - base, 4000, weights=weights)
    assert paired_p_values([]) == []


def test_one_random_sign_serves_all_tests_of_as_many_items(monkeypatch, scores):
    some, base, _ = scores
    made = []
    original = significance._flipped
    monkeypatch.setattr(
        significance, "_flipped", lambda *given: made.append(given) or original(*given)
    )
    paired_p_values([(some + shift / 20, base, None) for shift in range(12)])
    assert [len(table) for table, _, _ in made] == [12, len(made[1][0])]


@pytest.mark.parametrize(
    "use",
    [
        lambda x: mean_estimate(x),
        lambda x: paired_difference(x, x**2, Resamples(len(x), 1500, 0)),
        lambda x: weighted_mean(x, x + 1, Resamples(len(x), 1500, 0)),
        lambda x: permutation_p(x, x**2 + np.roll(x, 3)),
    ],
    ids=["mean", "difference", "weighted mean", "permutation"],
)
def test_memory_does_not_grow_with_the_items(use):
    """All at once, the smallest of these would take 50 MB, the largest 200."""
    x = np.random.default_rng(0).random(2_500)
    tracemalloc.start()
    use(x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6


def test_the_shuffles_of_a_correlation_are_those_of_their_seed():
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=(2, 12))
    found = [permutation_p(one, other, 500, seed) for seed in (1, 1, 2, 3, 4)]
    assert found[0] == found[1]
    assert len(set(found)) > 1
