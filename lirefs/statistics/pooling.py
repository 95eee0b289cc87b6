"""Estimates of several runs, such as seeds of one training recipe, as one estimate."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, nan, sqrt

import numpy as np
from scipy.stats import t as student

from lirefs.errors import SettingError
from lirefs.statistics.intervals import Estimate, mean_of_estimates

_TOO_ALIKE = 0.25
"""Runs that agree more closely than this share of what their items leave open agree by luck."""


def pool_estimates(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over independent runs, with a 95 % interval for runs that have not been made.

    Each estimate is off by the luck of its run and by that of its items, and their spread holds
    both: the interval is Student's for the mean, with one run less than there are as degrees of
    freedom (in meta-analysis: Hartung and Knapp 2001, with equal weights). Where runs agree far
    more closely than their items allow, as at 0 or 100 %, the spread says nothing, and the interval
    is that of the items alone (`mean_of_estimates`).

    Args:
        estimates: One from each run, of the same quantity on a scale where means make sense: shares
            or differences as they are, perplexities and ratios as logarithms.

    Returns:
        The mean; n is the number of items of all runs. One run alone gives no interval (it is
        infinite), and a value that is not finite makes all of it NaN.

    Raises:
        SettingError: `estimates` is empty.
    """
    if not estimates:
        raise SettingError("there is nothing to pool: give one estimate for each run")
    values = np.array([one.value for one in estimates])
    n = sum(one.n for one in estimates)
    if not np.isfinite(values).all():
        return Estimate(nan, nan, nan, n)
    value, runs = float(values.mean()), len(values)
    if runs == 1:
        return Estimate(value, -inf, inf, n)
    half = float(student.ppf(0.975, runs - 1) * values.std(ddof=1) / sqrt(runs))
    items = mean_of_estimates(estimates)
    if isfinite(items.low + items.high) and half < _TOO_ALIKE * (items.high - items.low) / 2:
        return items
    return Estimate(value, value - half, value + half, n)
