"""Properties of the statistics, for any input that hypothesis can think of."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lirefs.statistics.intervals import (
    Estimate,
    correlation,
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
from lirefs.statistics.significance import best_of_null, holm, mcnemar, paired_p_value, sign_flip

few = settings(max_examples=60, deadline=None, derandomize=True)
many = settings(max_examples=300, deadline=None, derandomize=True)

counts = st.integers(0, 60)


def close(*pairs):
    return all(a == pytest.approx(b, rel=1e-6, abs=1e-7, nan_ok=True) for a, b in pairs)


def ends(one):
    return one.value, one.low, one.high


# Intervals


@st.composite
def shares(draw):
    n = draw(st.integers(1, 400))
    return draw(st.integers(0, n)), n


@st.composite
def changes(draw):
    """(right on both sides, gained, lost, n)."""
    both, gained, lost, neither = (draw(counts) for _ in range(4))
    assume(both + gained + lost + neither)
    return both, gained, lost, both + gained + lost + neither


@given(shares(), st.integers(2, 20))
@many
def test_wilson(share, times):
    right, n = share
    value, low, high = ends(wilson(right, n))
    assert 0 <= low <= value <= high <= 1
    assert low < high
    other = wilson(n - right, n)
    assert close((other.low, 1 - high), (other.high, 1 - low))
    more = wilson(right * times, n * times)
    assert more.high - more.low < high - low
    # The limits are the shares from which the observed one is 1.96 standard errors away.
    for limit in (low, high):
        if 0 < limit < 1:
            assert close(((value - limit) ** 2, 1.959964**2 * limit * (1 - limit) / n))


@given(changes(), st.integers(2, 5))
@many
def test_difference_of_shares(change, times):
    _, gained, lost, n = change
    found = difference_of_shares(gained, lost, n)
    value, low, high = ends(found)
    assert -1 <= low <= value <= high <= 1
    assert low < high
    other = difference_of_shares(lost, gained, n)
    assert close((other.value, -value), (other.low, -high), (other.high, -low))
    more = difference_of_shares(gained * times, lost * times, n * times)
    assert more.high - more.low < high - low


@given(changes())
@many
def test_ratio_of_shares(change):
    both, gained, lost, n = change
    value, low, high = ends(ratio_of_shares(both, gained, lost, n))
    if both + lost == 0:
        assert math.isnan(value)
        assert math.isnan(low)
        return
    assert 0 <= low <= value <= high
    difference = difference_of_shares(gained, lost, n)
    if abs(difference.low) > 1e-6 and abs(difference.high) > 1e-6:
        assert (low <= 1 <= high) == (difference.low <= 0 <= difference.high)
    if both + gained and low > 1e-6 and high < 1e6:
        turned = ratio_of_shares(both, lost, gained, n)
        assert close((turned.value, 1 / value), (turned.low, 1 / high), (turned.high, 1 / low))


scores = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=2, max_size=12)


@given(st.data(), scores, st.sampled_from([0.25, 2.0, 8.0]), st.integers(-8, 8))
@many
def test_bootstraps_follow_affine_maps(data, base, scale, shift):
    n = len(base)
    values = np.array(data.draw(st.lists(st.integers(-40, 40), min_size=n, max_size=n))) / 8
    weights = np.array(data.draw(st.lists(st.integers(1, 9), min_size=n, max_size=n)), float)
    base, draws = np.array(base), resample_counts(n, 200, seed=0)
    plain = paired_difference(values, base, draws, weights)
    assume(not {*values, *base} <= {0.0, 1.0})  # otherwise it is not a bootstrap
    mapped = paired_difference(scale * values + shift, scale * base + shift, draws, weights)
    if not {*(scale * values + shift), *(scale * base + shift)} <= {0.0, 1.0}:
        assert close(*zip(ends(mapped), scale * np.array(ends(plain))))
    assert plain.low <= plain.high
    mean = weighted_mean(values, weights, draws)
    moved = weighted_mean(scale * values + shift, weights, draws)
    assert mean.low <= mean.value + 1e-9
    assert mean.value <= mean.high + 1e-9
    assert close((moved.value, scale * mean.value + shift))
    ratio = paired_ratio(values + 10, base + 10, draws, weights)
    scaled = paired_ratio(scale * (values + 10), scale * (base + 10), draws, weights)
    assert close(*zip(ends(ratio), ends(scaled)))


estimates = st.tuples(*[st.floats(0, 10)] * 3).map(sorted).map(lambda e: (e[1], e[0], e[2]))


@given(st.lists(estimates, min_size=1, max_size=6))
@few
def test_a_mean_of_estimates_lies_between_them(found):
    mean = mean_of_estimates([Estimate(*one, 5) for one in found])
    values, lows, highs = zip(*found)
    assert min(values) - 1e-9 <= mean.value <= max(values) + 1e-9
    assert np.mean(lows) - 1e-9 <= mean.low <= mean.value <= mean.high <= np.mean(highs) + 1e-9


@given(scores, st.randoms(use_true_random=False))
@few
def test_correlations(values, random):
    other = [random.random() for _ in values]
    for ranks in (False, True):
        found = correlation(np.array(values), np.array(other), ranks)
        turned = correlation(np.array(other), -np.array(values), ranks)
        assert close((turned.value, -found.value))
        if not math.isnan(found.value):
            assert -1 <= found.low <= found.value + 1e-9
            assert found.value - 1e-9 <= found.high <= 1


# Tests


@given(st.integers(0, 40), st.integers(0, 40))
@many
def test_mcnemar_is_the_mid_p_value_of_all_outcomes(gained, lost):
    n, far = gained + lost, abs(gained - lost)
    weight = Counter()
    for heads in range(n + 1):
        weight[abs(2 * heads - n)] += math.comb(n, heads)
    beyond = sum(ways for distance, ways in weight.items() if distance > far)
    exact = Fraction(2 * beyond + weight[far], 2 * 2**n) if far else Fraction(1)
    assert mcnemar(gained, lost) == pytest.approx(float(exact), abs=1e-12)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


@given(st.lists(st.integers(-6, 6), max_size=9), st.sampled_from([-2.0, 0.1, 1000.0]))
@many
def test_sign_flips_are_enumerated(differences, scale):
    p = sign_flip(differences)
    signs = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(sign, differences))) for sign in signs]
    assert p == pytest.approx(np.mean([one >= abs(sum(differences)) for one in sums]))
    assert sign_flip(scale * np.array(differences)) == pytest.approx(p)
    assert 0 < p <= 1


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40))
@few
def test_p_values_are_probabilities(differences):
    values = np.array(differences)
    assert 0 < sign_flip(values, permutations=400) <= 1
    assert 0 < paired_p_value((values > 0).astype(float), (values < -0.5).astype(float)) <= 1
    best = best_of_null(np.stack([values, -values]), permutations=100)
    assert 0 < best.p_value <= 1
    assert best.luck.low - 1e-9 <= best.luck.value <= best.luck.high + 1e-9
    assert best.observed >= 0  # one of the two is not negative


@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=8))
@example([])
@many
def test_holm_rejects_what_its_steps_reject(p_values):
    found = holm(p_values)
    real = [one for one in p_values if not math.isnan(one)]
    for p, adjusted in zip(p_values, found):
        if math.isnan(p):
            assert math.isnan(adjusted)
            continue
        # The largest of (number of p values not below) times p, over those up to this one.
        steps_up_to = [sum(q >= one for q in real) * one for one in real if one <= p]
        assert adjusted == pytest.approx(min(1.0, max(steps_up_to)))
        assert p <= adjusted <= 1
    pairs = [(p, a) for p, a in zip(p_values, found) if not math.isnan(p)]
    assert all(a <= b for (p, a), (q, b) in itertools.product(pairs, pairs) if p <= q)
    assert holm(dict(enumerate(p_values))) == pytest.approx(dict(enumerate(found)), nan_ok=True)
