import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm, ttest_1samp

from lirefs.errors import SettingError
from lirefs.statistics.significance import (
    best_of_null,
    detectable_difference,
    detectable_mean,
    expected_best,
    holm,
    mcnemar,
    paired_detectable,
    paired_p_value,
    sign_flip,
)


def test_mcnemar_against_the_binomial_distribution():
    # Fagerland, Lydersen and Laake 2013, airway hyper-responsiveness: 1 and 7 changed, 0.039.
    assert mcnemar(1, 7) == pytest.approx(0.0391, abs=1e-4)
    for gained, lost in itertools.product(range(9), range(9)):
        changed = gained + lost
        exact = binomtest(gained, changed).pvalue if changed else 1.0
        half = binom.pmf(gained, changed, 0.5) if gained != lost else 0.0
        assert mcnemar(gained, lost) == pytest.approx(exact - half)
    assert mcnemar(0, 0) == 1
    with pytest.raises(SettingError, match="negative"):
        mcnemar(-1, 3)


def test_mcnemar_keeps_its_level_where_the_exact_test_is_far_below_it():
    # P(p <= 0.05) under the null for each number of changed items, then over its distribution.
    rejected, rejected_exactly = np.zeros((2, 101))
    for changed in range(1, 101):
        fewer = np.arange(changed + 1)
        chance = binom.pmf(fewer, changed, 0.5)
        half = [mcnemar(k, changed - k) for k in range(changed // 2 + 1)]
        p = np.array([*half, *half[(changed - 1) // 2 :: -1]])
        rejected[changed] = chance[p <= 0.05].sum()
        rejected_exactly[changed] = chance[p + chance * (2 * fewer != changed) <= 0.05].sum()
    sizes, exact = [], []
    for n, discordant in itertools.product([10, 20, 40, 60, 100], np.arange(0.02, 0.61, 0.02)):
        likely = binom.pmf(np.arange(n + 1), n, discordant)
        sizes.append(likely @ rejected[: n + 1])
        exact.append(likely @ rejected_exactly[: n + 1])
    assert max(sizes) <= 0.05
    assert np.mean(sizes[60:]) > 0.035
    assert np.mean(exact[60:]) < 0.028


def test_sign_flip_against_every_sign_pattern():
    generator = np.random.default_rng(0)
    differences, weights = generator.normal(0.4, 1, 9), generator.integers(1, 50, 9)
    for weight in (None, weights):
        parts = differences if weight is None else differences * weight
        sums = [abs(np.dot(s, parts)) for s in itertools.product([1, -1], repeat=9)]
        expected = np.mean(np.array(sums) >= abs(parts.sum()) - 1e-12)
        assert sign_flip(differences, weights=weight) == expected
    long = generator.normal(0.3, 1, 14)
    signs = np.array(list(itertools.product([1, -1], repeat=14)))
    expected = np.mean(np.abs(signs @ long) >= abs(long.sum()) - 1e-12)
    assert sign_flip(long) == pytest.approx(expected, abs=0.015)
    clear = generator.normal(1.0, 1, 14)  # a small p-value takes all the patterns there are
    expected = np.mean(np.abs(signs @ clear) >= abs(clear.sum()) - 1e-12)
    assert expected < 0.005
    assert sign_flip(clear) == pytest.approx(expected, rel=0.15)
    assert sign_flip(long, seed=3) == sign_flip(long, seed=3)


def test_sign_flip_of_counts_is_the_exact_binomial_test():
    for gained, lost in [(0, 5), (3, 8), (6, 6), (12, 4)]:
        differences = [1.0] * gained + [-1.0] * lost + [0.0] * 30
        exact = binomtest(gained, gained + lost).pvalue
        assert sign_flip(differences) == pytest.approx(exact, abs=0.012)


def test_sign_flip_at_the_edges():
    assert sign_flip(np.zeros(5)) == 1
    assert sign_flip([]) == 1
    assert sign_flip(np.full(100, 0.1)) == pytest.approx(1 / 200001)
    with pytest.raises(SettingError, match="finite"):
        sign_flip([0.1, math.nan])


def test_paired_p_value_counts_what_can_be_counted():
    base = np.array([0.0, 0, 0, 1, 1, 0, 0, 0])
    scores = np.array([1.0, 1, 1, 1, 0, 1, 1, 1])
    assert paired_p_value(scores, base) == mcnemar(6, 1)
    assert paired_p_value(scores, base, np.full(8, 3.0)) == mcnemar(6, 1)
    weights = np.arange(1.0, 9)
    assert paired_p_value(scores, base, weights) == sign_flip(scores - base, weights=weights)
    assert paired_p_value(scores / 2, base) == sign_flip(scores / 2 - base)


def test_holm_by_hand():
    # Sorted 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1 -> 0.06 because it may not fall.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    found = holm({"a": 0.03, "b": math.nan, "c": 0.01, "d": 0.9})
    assert math.isnan(found.pop("b"))
    assert found == pytest.approx({"a": 0.06, "c": 0.03, "d": 0.9})
    assert holm([]) == []
    assert holm([0.7, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95])
def test_holm_controls_the_family_wise_error(correlation):
    # Eight true null hypotheses beside two false ones, which must not make the others fall.
    generator = np.random.default_rng(1)
    shared = generator.normal(size=(4000, 1))
    noise = generator.normal(size=(4000, 10))
    scores = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * noise
    scores[:, :2] += 4
    adjusted = np.array([holm(row) for row in (2 * norm.sf(np.abs(scores))).tolist()])
    wrong = (adjusted[:, 2:] <= 0.05).any(axis=1).mean()
    assert wrong <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 4000)
    if correlation == 0:
        assert wrong > 0.035  # neither is it needlessly strict
    assert (adjusted[:, :2] <= 0.05).mean() > 0.8


def test_expected_best_against_simulation():
    assert expected_best(0.3, 200, 29) == pytest.approx(0.067, abs=5e-4)
    assert expected_best(0.3, 100, 29) == pytest.approx(0.095, abs=5e-4)
    assert expected_best(0.3, 50, 1) == pytest.approx(0)
    draws = np.random.default_rng(0).binomial(60, 0.7, size=(40000, 5)).max(axis=1) / 60
    assert expected_best(0.7, 60, 5) == pytest.approx(draws.mean() - 0.7, abs=1e-3)


def settings(generator, n, k, correlation):
    """Differences of k settings without effect; an item changes under all of them alike."""
    changed = (generator.random(n) < 0.4) * generator.random(n)
    common = generator.choice([-1.0, 1.0], n)
    own = generator.choice([-1.0, 1.0], (k, n))
    return changed * np.where(generator.random((k, n)) < correlation, common, own)


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_best_of_null_against_simulation(correlation):
    generator = np.random.default_rng(2)
    truth = [settings(generator, 100, 8, correlation).mean(axis=1).max() for _ in range(4000)]
    found = [best_of_null(settings(generator, 100, 8, correlation), 400) for _ in range(400)]
    assert np.mean([one.luck.value for one in found]) == pytest.approx(np.mean(truth), rel=0.03)
    low, high = np.percentile(truth, [2.5, 97.5])
    assert np.mean([one.luck.low for one in found]) == pytest.approx(low, abs=0.005)
    assert np.mean([one.luck.high for one in found]) == pytest.approx(high, abs=0.005)
    p_values = np.array([one.p_value for one in found])
    for level in (0.05, 0.2):
        error = np.sqrt(level * (1 - level) / len(found))
        assert (p_values <= level).mean() == pytest.approx(level, abs=2.5 * error)


def test_settings_that_move_together_gain_less_by_luck():
    generator = np.random.default_rng(3)
    apart, together = (best_of_null(settings(generator, 100, 20, c)) for c in (0.0, 0.9))
    assert together.luck.value < 0.7 * apart.luck.value
    assert together.k == 20
    table = settings(generator, 100, 20, 0.0)
    table[7, :30] = 1
    assert best_of_null(table).p_value < 0.01
    with pytest.raises(SettingError, match="finite"):
        best_of_null([[math.nan, 1.0]])


@pytest.mark.parametrize(
    ("n", "discordant"), [(60, 0.3), (100, 0.1), (200, 0.05), (300, 0.4), (40, 0.02)]
)
def test_detectable_difference_against_simulation(n, discordant):
    difference = detectable_difference(n, discordant)
    changing = max(discordant, difference)
    shares = [(changing + difference) / 2, (changing - difference) / 2, 1 - changing]
    counts = np.random.default_rng(4).multinomial(n, np.clip(shares, 0, 1), size=6000)
    pairs, times = np.unique(counts[:, :2], axis=0, return_counts=True)
    found = np.array([mcnemar(int(gained), int(lost)) <= 0.05 for gained, lost in pairs])
    assert times[found].sum() / 6000 == pytest.approx(0.8, abs=0.03)


def test_detectable_difference_at_the_edges():
    assert math.isnan(detectable_difference(4, 0.5))
    assert detectable_difference(200, 0.0) == pytest.approx(detectable_difference(200, 0.01))
    sizes = [detectable_difference(n, 0.2) for n in (20, 50, 100, 400)]
    assert sizes == sorted(sizes, reverse=True)
    shares = [detectable_difference(200, share) for share in (0.05, 0.1, 0.3)]
    assert shares == sorted(shares)
    assert detectable_difference(100, 0.2, power=0.9) > detectable_difference(100, 0.2)
    assert detectable_difference(100, 0.2, alpha=0.01) > detectable_difference(100, 0.2)


def test_detectable_mean_against_simulation():
    generator = np.random.default_rng(5)
    for n in (8, 30):
        rows = generator.normal(detectable_mean(n, 2.0), 2.0, size=(4000, n))
        assert (ttest_1samp(rows, 0, axis=1).pvalue <= 0.05).mean() == pytest.approx(0.8, abs=0.02)
        flips = [sign_flip(row, 300) <= 0.05 for row in rows[:400]]
        assert np.mean(flips) == pytest.approx(0.8, abs=0.05)
    assert math.isnan(detectable_mean(1, 1.0))


def test_paired_detectable_takes_the_noise_from_the_sample():
    base, scores = np.array([0.0, 1.0] * 30), np.array([1.0, 1.0] * 10 + [0.0, 1.0] * 20)
    assert paired_detectable(scores, base) == detectable_difference(60, 1 / 6)
    gap = np.random.default_rng(6).normal(size=30)
    found = paired_detectable(gap, np.zeros(30))
    assert found == pytest.approx(detectable_mean(30, float(gap.std(ddof=1))))
    assert paired_detectable(gap, np.zeros(30), np.full(30, 7.0)) == pytest.approx(found)


def test_scores_of_0_and_1_with_unequal_weights_are_not_counted():
    scores, base = np.array([1.0, 0.0, 1.0, 1.0]), np.array([0.0, 0.0, 1.0, 0.0])
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    share = weights / weights.mean()
    error = share * (scores - base - np.average(scores - base, weights=weights))
    expected = detectable_mean(4, float(np.sqrt((error**2).sum() / 3)))
    assert paired_detectable(scores, base, weights) == pytest.approx(expected)
    assert paired_detectable(scores, base, weights) != paired_detectable(scores, base)


def test_paired_detectable_with_weights_against_simulation():
    generator = np.random.default_rng(7)
    weights = generator.integers(20, 200, 60).astype(float)
    rows = generator.normal(size=(400, 60))
    noise = [paired_detectable(row, np.zeros(60), weights) for row in rows]
    shifted = rows + np.mean(noise)
    found = [sign_flip(row, 300, weights=weights) <= 0.05 for row in shifted]
    assert np.mean(found) == pytest.approx(0.8, abs=0.05)
