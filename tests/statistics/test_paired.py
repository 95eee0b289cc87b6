import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import binom

from lirefs.statistics.intervals import (
    Estimate,
    exponential_of_estimate,
    interval,
    mean_of_estimates,
    resample_counts,
    weighted_mean,
    wilson,
)
from lirefs.statistics.paired import (
    difference_of_shares,
    paired_difference,
    paired_ratio,
    ratio_of_shares,
)


def test_a_mean_of_nothing_is_not_a_number():
    found = mean_of_estimates([])
    assert found.n == 0
    assert all(math.isnan(one) for one in (found.value, found.low, found.high))


def test_against_published_intervals():
    # Fagerland, Lydersen and Laake 2014: 1 both, 1 and 7 changed, 21 in all.
    one = difference_of_shares(1, 7, 21)
    assert (one.low, one.high) == (pytest.approx(-0.517, abs=1e-3), pytest.approx(-0.026, abs=1e-3))
    one = ratio_of_shares(1, 1, 7, 21)
    assert (one.low, one.high) == (pytest.approx(0.065, abs=1e-3), pytest.approx(0.907, abs=1e-3))


@pytest.mark.parametrize(("gained", "lost", "n"), [(3, 9, 40), (12, 1, 30), (0, 6, 80)])
def test_limits_of_the_difference_against_a_numerical_likelihood(gained, lost, n):
    found = difference_of_shares(gained, lost, n)
    for limit, z in ((found.low, 1.96), (found.high, -1.96)):

        def surprise(share, limit=limit):
            cells = [share + limit, share, 1 - 2 * share - limit]
            return -sum(k * math.log(p) for k, p in zip([gained, lost, n - gained - lost], cells)
                        if k)  # fmt: skip

        low, high = max(0, -limit) + 1e-10, (1 - limit) / 2 - 1e-10
        share = minimize_scalar(
            surprise, bounds=(low, high), method="bounded", options={"xatol": 1e-10}
        ).x
        variance = n * (2 * share + limit - limit**2)
        assert (gained - lost - n * limit) / math.sqrt(variance) == pytest.approx(z, abs=2e-3)


@pytest.mark.parametrize(("both", "gained", "lost", "n"), [(12, 3, 9, 40), (20, 6, 2, 35)])
def test_limits_of_the_ratio_against_a_numerical_likelihood(both, gained, lost, n):
    found = ratio_of_shares(both, gained, lost, n)
    for limit, z in ((found.low, 1.96), (found.high, -1.96)):

        def cells(x, limit=limit):  # share right in both, share lost; the ratio gives the gained
            return x[0], limit * (x[0] + x[1]) - x[0], x[1], 1 - limit * (x[0] + x[1]) - x[1]

        def surprise(x, cells=cells):
            shares = cells(x)
            if min(shares) <= 0:
                return math.inf
            counts = both, gained, lost, n - both - gained - lost
            return -sum(k * math.log(p) for k, p in zip(counts, shares))

        start = next(
            (a, b) for a, b in itertools.product(np.linspace(0.01, 0.9, 60), repeat=2)
            if min(cells((a, b))) > 0
        )  # fmt: skip
        options = {"xatol": 1e-10, "fatol": 1e-12, "maxiter": 4000}
        a, b = minimize(surprise, start, method="Nelder-Mead", options=options).x
        variance = n * (limit * (1 + limit) * (a + b) - 2 * limit * a)
        score = (both + gained - limit * (both + lost)) / math.sqrt(variance)
        assert score == pytest.approx(z, abs=2e-3)


def test_models_that_agree_everywhere_do_not_differ():
    same = np.array([0.0, 1.0] * 50)
    draws = resample_counts(100, 200, 0)
    difference, ratio = paired_difference(same, same, draws), paired_ratio(same, same, draws)
    assert difference.value == 0
    assert difference.low < 0 < difference.high
    assert difference.high == pytest.approx(1.96**2 / (100 + 1.96**2), abs=1e-4)
    assert ratio.value == 1
    assert ratio.low < 1 < ratio.high
    scores = np.random.default_rng(0).random(100)
    assert paired_difference(scores, scores, draws) == Estimate(0.0, 0.0, 0.0, 100)
    assert paired_ratio(scores, scores, draws) == Estimate(1.0, 1.0, 1.0, 100)


def test_edges():
    assert math.isnan(ratio_of_shares(0, 3, 0, 20).value)
    assert math.isnan(paired_ratio(np.ones(3) / 2, np.zeros(3), resample_counts(3, 9, 0)).high)
    nothing_left = ratio_of_shares(0, 0, 10, 20)
    assert nothing_left.value == nothing_left.low == 0
    assert 0 < nothing_left.high < 1
    all_gained, all_lost = difference_of_shares(9, 0, 9), difference_of_shares(0, 9, 9)
    assert all_gained.high == 1
    assert all_gained.low == pytest.approx(-all_lost.high)
    assert all_lost.low == -1
    for gained, lost in itertools.product(range(8), range(8)):
        difference, ratio = difference_of_shares(gained, lost, 30), ratio_of_shares(
            9, gained, lost, 30
        )  # fmt: skip
        assert (difference.low <= 0 <= difference.high) == (ratio.low <= 1 <= ratio.high)
        assert -1 <= difference.low <= difference.value <= difference.high <= 1
        assert ratio.low <= ratio.value <= ratio.high


def coverage(n, shares, truth, limits, size=5000):
    """How often an interval of counts holds the truth; each table of counts is asked once."""
    rows = np.random.default_rng(0).multinomial(n, shares, size=size)
    rows, times = np.unique(rows, axis=0, return_counts=True)
    found = [limits(row) for row in rows]
    held = np.array([one.low <= truth + 1e-12 and truth - 1e-12 <= one.high for one in found])
    return times[held].sum() / size


@pytest.mark.parametrize(
    ("n", "discordant", "direction"),
    [*itertools.product([40, 100, 400], [0.2, 0.4], [0.0, 0.5]),
     (100, 0.1, 0.5), (100, 0.1, 0.9), (200, 0.05, 0.5), (200, 0.05, 0.9), (400, 0.05, 0.9)],
)  # fmt: skip
def test_coverage_of_a_difference_of_shares(n, discordant, direction):
    truth = discordant * direction
    shares = [(discordant + truth) / 2, (discordant - truth) / 2, 1 - discordant]
    found = coverage(
        n, shares, truth, lambda row: difference_of_shares(int(row[0]), int(row[1]), n)
    )
    assert 0.93 <= found <= 0.97


@pytest.mark.parametrize("direction", [0.0, 0.5, 0.9])
def test_coverage_where_hardly_an_item_changes_errs_to_the_safe_side(direction):
    truth = 0.05 * direction
    shares = [(0.05 + truth) / 2, (0.05 - truth) / 2, 0.95]

    def percentile(row):
        draws = np.random.default_rng(0).multinomial(40, row / 40, size=2000)
        return Estimate(0, *interval((draws[:, 0] - draws[:, 1]) / 40), 40)

    def score(row):
        return difference_of_shares(int(row[0]), int(row[1]), 40)

    assert 0.93 <= coverage(40, shares, truth, score) <= 0.995
    if direction > 0:
        assert coverage(40, shares, truth, percentile) < 0.9


@pytest.mark.parametrize(
    ("n", "base", "ratio", "churn"),
    [(40, 0.9, 0.5, 0.0), (40, 0.6, 0.9, 0.1), (100, 0.6, 0.9, 0.0), (100, 0.6, 0.5, 0.1)],
)
def test_coverage_of_a_ratio_of_shares(n, base, ratio, churn):
    gained = churn * (1 - base)
    both = base * ratio - gained
    shares = [both, gained, base - both, 1 - base - gained]
    found = coverage(n, shares, ratio, lambda row: ratio_of_shares(*map(int, row[:3]), n), 3000)
    assert 0.93 <= found <= 0.97


def test_coverage_of_wilson():
    for n, share in itertools.product([40, 100, 400], [0.05, 0.1, 0.3, 0.5, 0.9]):
        found = [wilson(k, n) for k in range(n + 1)]
        held = np.array([one.low <= share <= one.high for one in found])
        assert 0.93 <= binom.pmf(np.arange(n + 1), n, share)[held].sum() <= 0.97


@pytest.mark.parametrize(("n", "shape"), [(40, 0.5), (30, 2.0)])
def test_coverage_of_a_ratio_of_perplexities(n, shape):
    # Nats per token that texts lose: a few lose most; lengths differ by an order of magnitude.
    generator = np.random.default_rng(2)
    truth, held, percentile = shape * 0.2, 0, 0
    for _ in range(600):
        tokens = np.round(np.exp(generator.normal(4.8, 0.6, n))) + 2
        lost = generator.gamma(shape, 0.2, n)
        draws = resample_counts(n, 500, generator)
        one = weighted_mean(lost, tokens, draws)
        ratio = exponential_of_estimate(one)
        held += ratio.low <= np.exp(truth) <= ratio.high
        low, high = interval((draws @ (tokens * lost)) / (draws @ tokens))
        percentile += low <= truth <= high
    assert 0.93 <= held / 600 <= 0.97
    assert percentile < held


def test_exponential_of_a_log_perplexity():
    assert exponential_of_estimate(Estimate(0.0, -1.0, 1000.0, 7)) == Estimate(
        1.0, pytest.approx(np.exp(-1)), math.inf, 7
    )


def test_weighted_mean_against_a_plain_bootstrap():
    generator = np.random.default_rng(3)
    scores, weights = generator.normal(size=12), generator.integers(5, 90, 12).astype(float)
    draws = resample_counts(12, 300, 4)
    value = np.average(scores, weights=weights)

    def error(rows):
        mean = np.average(scores[rows], weights=weights[rows])
        return np.sqrt(((weights[rows] * (scores[rows] - mean)) ** 2).sum()) / weights[rows].sum()

    ratios = []
    for counts in draws.astype(int):
        rows = np.repeat(np.arange(12), counts)
        ratios.append((np.average(scores[rows], weights=weights[rows]) - value) / error(rows))
    low, high = np.percentile(ratios, [2.5, 97.5], method="inverted_cdf")
    found = weighted_mean(scores, weights, draws)
    assert found.value == pytest.approx(value)
    assert found.low == pytest.approx(value - high * error(np.arange(12)))
    assert found.high == pytest.approx(value - low * error(np.arange(12)))
    one = weighted_mean(np.array([1.0]), np.array([5.0]), resample_counts(1, 10, 0))
    assert one == Estimate(1.0, 1.0, 1.0, 1)


def test_expanded_percentiles_cover_where_plain_ones_do_not():
    generator = np.random.default_rng(5)
    plain = expanded = 0
    for _ in range(1200):
        gap = generator.normal(0.1, 0.3, 12)
        means = resample_counts(12, 400, generator) @ gap / 12
        (a, b), (c, d) = interval(means), interval(means, 12)
        plain += a <= 0.1 <= b
        expanded += c <= 0.1 <= d
    assert plain / 1200 < 0.92
    assert 0.93 <= expanded / 1200 <= 0.97
    assert interval(means, 10**6) == pytest.approx(interval(means), abs=1e-4)


def test_paired_estimates_of_other_scores_are_bootstrapped():
    generator = np.random.default_rng(6)
    base, weights = generator.random(50), generator.integers(1, 9, 50).astype(float)
    scores = base * generator.random(50)
    draws = resample_counts(50, 4000, 0)
    means = [np.average(scores - base, weights=weights * row) for row in draws]
    found = paired_difference(scores, base, draws, weights)
    assert found == Estimate(
        pytest.approx(np.average(scores - base, weights=weights)),
        *map(pytest.approx, interval(np.array(means), 50)), 50,
    )  # fmt: skip
    kept = [np.average(scores, weights=weights * row) / np.average(base, weights=weights * row)
            for row in draws]  # fmt: skip
    found = paired_ratio(scores, base, draws, weights)
    assert found.value == pytest.approx((scores @ weights) / (base @ weights))
    assert (found.low, found.high) == pytest.approx(interval(np.array(kept), 50))


def test_mean_of_estimates_of_different_items():
    one, other = Estimate(0.5, 0.3, 0.8, 10), Estimate(0.9, 0.5, 1.0, 20)
    # Half of sqrt(0.2^2 + 0.4^2) below, half of sqrt(0.3^2 + 0.1^2) above.
    found = mean_of_estimates([one, other])
    assert (found.value, found.n) == (pytest.approx(0.7), 30)
    assert found.low == pytest.approx(0.7 - math.sqrt(0.20) / 2)
    assert found.high == pytest.approx(0.7 + math.sqrt(0.10) / 2)
    assert mean_of_estimates([one]) == Estimate(*map(pytest.approx, (0.5, 0.3, 0.8)), 10)
    assert mean_of_estimates([]).n == 0


def test_coverage_of_a_mean_of_ratios():
    generator = np.random.default_rng(7)
    truth, held, repeats = (0.9 + 0.7 + 0.95) / 3, 0, 1000
    tables = [generator.multinomial(60, [0.9 * ratio, 0, 0.9 * (1 - ratio), 0.1], size=repeats)
              for ratio in (0.9, 0.7, 0.95)]  # fmt: skip
    for rows in zip(*tables):
        one = mean_of_estimates([ratio_of_shares(*map(int, row[:3]), 60) for row in rows])
        held += one.low <= truth <= one.high
    assert 0.93 <= held / repeats <= 0.97
