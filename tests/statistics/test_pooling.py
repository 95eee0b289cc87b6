import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from lirefs.errors import SettingError
from lirefs.statistics import Estimate, mean_of_estimates, pool_estimates, wilson


def test_the_interval_is_students_for_the_mean():
    values = [0.2, 0.5, 0.3]
    found = pool_estimates([Estimate(value, value - 0.1, value + 0.1, 80) for value in values])
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((1 / 3, low, high))
    assert found.n == 240


def test_runs_that_agree_by_luck_have_the_interval_of_their_items():
    alike = [wilson(0, 80)] * 3
    assert pool_estimates(alike) == mean_of_estimates(alike)
    assert pool_estimates(alike).high > 0.02


def test_one_run_says_nothing_of_others_and_none_is_refused():
    alone = pool_estimates([Estimate(0.5, 0.4, 0.6, 10)])
    assert (alone.value, alone.low, alone.high) == (0.5, -math.inf, math.inf)
    with pytest.raises(SettingError, match="one estimate for each run"):
        pool_estimates([])


def test_a_run_without_a_number_leaves_none():
    found = pool_estimates([Estimate(0.5, 0.4, 0.6, 10), Estimate(math.nan, 0, 0, 5)])
    assert math.isnan(found.value)
    assert math.isnan(found.low)
    assert found.n == 15


@pytest.mark.parametrize(
    ("share", "spread", "most"),
    [(0.5, 0.0, 0.97), (0.5, 0.03, 0.97), (0.5, 0.1, 0.97), (0.1, 0.03, 0.97), (0.01, 0.0, 1.0)],
)
def test_coverage_over_three_runs(share, spread, most):
    """Of the mean over runs that have not been made; at the boundary it errs to the safe side."""
    draw = np.random.default_rng(0)
    truth = float(np.clip(draw.normal(share, spread, 10**6), 0, 1).mean())
    runs = np.clip(draw.normal(share, spread, (2000, 3)), 0, 1)
    right = draw.binomial(80, runs)
    found = [pool_estimates([wilson(int(one), 80) for one in row]) for row in right]
    covered = np.mean([one.low <= truth <= one.high for one in found])
    assert 0.93 <= covered <= most
