"""Tests, corrections for many tests, and what a sample can detect: arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import nan
from typing import TypeVar, overload

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import binom, nct
from scipy.stats import t as student

from lirefs.errors import SettingError, checked_seed
from lirefs.statistics.intervals import Estimate, interval
from lirefs.statistics.resamples import CHUNK, Floats

Key = TypeVar("Key")

CLEAR = 20
"""Once this many random sign patterns reach the observed one, the p-value is not small."""
PATTERNS = 200_000
"""Most random sign patterns of a test."""
ENUMERATED = 12
"""Up to this many differing items, all sign patterns are tried instead of random ones."""


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided McNemar test that two paired shares are equal, from the items that changed.

    The mid-p value of the exact (binomial) test (Fagerland, Lydersen and Laake 2013). Its type I
    error at level 0.05 is 0.037 on average from n = 40, against 0.022 for the exact test, which
    misses more true differences. It can exceed the level only where nearly every item changes
    (0.077 at most, at n = 16).

    Args:
        gained: Items wrong before and right after.
        lost: Items right before and wrong after.

    Raises:
        SettingError: If a count is negative.
    """
    if gained < 0 or lost < 0:
        raise SettingError(f"counts of changed items cannot be negative: {gained}, {lost}")
    return float(_mid_p(np.array(min(gained, lost)), np.array(gained + lost)))


def sign_flip(
    differences: npt.ArrayLike,
    permutations: int = PATTERNS,
    seed: int = 0,
    weights: npt.ArrayLike | None = None,
) -> float:
    """Two-sided paired permutation test that a mean difference is 0, for any scores.

    Fisher's randomization test: exchanging an item's two scores flips the sign of its difference.
    Up to `ENUMERATED` differing items, all sign patterns are tried and the p-value is exact. Above,
    the observed pattern counts as one of the random ones, so the p-value is valid and never 0
    (Phipson and Smyth 2010). Sampling stops after a twentieth of the patterns if `CLEAR` of them
    reach the observed one (Besag and Clifford 1991): only small p-values need the rest.

    Args:
        differences: Score after minus score before, one per item, shape (n,).
        permutations: Largest number of random sign patterns.
        seed: Seed of the patterns.
        weights: Weight of each item in the mean, shape (n,); None for equal weights.

    Raises:
        SettingError: If a difference is not finite.
    """
    seed = checked_seed(seed)
    parts = np.asarray(differences, dtype=np.float64)
    if weights is not None:
        parts = parts * np.asarray(weights, dtype=np.float64)
    (found,) = _sign_flips([parts], permutations, seed)
    return found


def _sign_flips(tests: Sequence[Floats], permutations: int, seed: int) -> list[float]:
    """`sign_flip` of several tests, in which all that differ in as many items share the signs."""
    if not all(np.isfinite(parts).all() for parts in tests):
        raise SettingError(
            "a paired test needs finite differences; leave out items without a score"
        )
    tests = [parts[parts != 0] for parts in tests]
    found = np.empty(len(tests))
    for n in {len(parts) for parts in tests}:
        (rows,) = np.nonzero([len(parts) == n for parts in tests])
        table = np.stack([tests[row] for row in rows])
        # Sums that are equal on paper may differ in their last digits.
        observed = np.abs(table.sum(axis=1)) - 1e-9 * np.abs(table).sum(axis=1)
        if n <= ENUMERATED:
            bits = (np.arange(1 << n)[:, None] >> np.arange(n)) & 1
            found[rows] = (np.abs((1 - 2 * bits) @ table.T) >= observed).mean(axis=0)
            continue
        reached, tried = np.zeros(len(rows)), np.zeros(len(rows))
        for share, part in ((1, seed), (19, seed + 1)):
            count = permutations * share // 20
            (small,) = np.nonzero(reached < CLEAR)
            for sums in _flipped(table[small], count, part) if small.size else ():
                reached[small] += (np.abs(sums) >= observed[small]).sum(axis=0)
            tried[small] += count
        found[rows] = (1 + reached) / (1 + tried)
    return found.tolist()


def paired_p_value(
    scores: Floats, base: Floats, weights: Floats | None = None, seed: int = 0
) -> float:
    """`mcnemar` for scores of 0 and 1 of equal weight, `sign_flip` with `seed` for all others.

    Scores, those of the unchanged model and weights (None: equal) have shape (n,).
    """
    (found,) = paired_p_values([(scores, base, weights)], checked_seed(seed))
    return found


def paired_p_values(
    pairs: Sequence[tuple[Floats, Floats, Floats | None]], seed: int = 0
) -> list[float]:
    """`paired_p_value` of several triples of its arguments, which takes little longer than one."""
    found, tests = {}, {}
    for index, (scores, base, weights) in enumerate(pairs):
        if is_binary(scores, base, weights):
            found[index] = mcnemar(int((scores > base).sum()), int((scores < base).sum()))
        else:
            tests[index] = (scores - base) * (1.0 if weights is None else weights)
    found |= zip(tests, _sign_flips(list(tests.values()), PATTERNS, seed), strict=True)
    return [found[index] for index in range(len(pairs))]


def paired_detectable(scores: Floats, base: Floats, weights: Floats | None = None) -> float:
    """Difference detectable at p <= 0.05 with 80 % power, given the sample's items and noise.

    `detectable_difference` for scores of 0 and 1 of equal weight, `detectable_mean` for all
    others. Arguments as in `paired_p_value`; the result is in the unit of the scores.
    """
    n = len(scores)
    if is_binary(scores, base, weights):
        return detectable_difference(n, float((scores != base).mean()))
    share = np.ones(n) if weights is None else weights / weights.mean()
    gap = scores - base
    error = share * (gap - (share * gap).mean())  # each item's part in that of the weighted mean
    return detectable_mean(n, float(np.sqrt((error**2).sum() / max(n - 1, 1))))


def is_binary(scores: Floats, base: Floats, weights: Floats | None = None) -> bool:
    """Whether all scores are 0 or 1 and all weights equal, so that items can be counted."""
    equal = weights is None or bool((weights == weights[0]).all())
    return equal and bool(np.isin(scores, (0, 1)).all() and np.isin(base, (0, 1)).all())


@overload
def holm(p_values: Mapping[Key, float]) -> dict[Key, float]: ...
@overload
def holm(p_values: Sequence[float]) -> list[float]: ...
def holm(p_values: Mapping[Key, float] | Sequence[float]) -> dict[Key, float] | list[float]:
    """p-values of a family of tests, adjusted by Holm's step-down procedure (1979).

    Rejecting those up to alpha keeps the chance of any false rejection in the family at alpha or
    below, however the tests depend on each other. NaN is not counted as a test and stays NaN.
    """
    if isinstance(p_values, Mapping):
        return dict(zip(p_values, holm(list(p_values.values())), strict=True))
    values = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(len(values), np.nan)
    order = np.argsort(values)[: np.isfinite(values).sum()]  # NaN sorts last
    steps = values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return [float(one) for one in adjusted]


def expected_best(share: float, n: int, k: int) -> float:
    """Mean excess of the best of k settings' shares over the true share, which is the same for all.

    Each setting is tried on n items of its own; on common ones the gain is smaller, see
    `best_of_null`.
    """
    below = binom.cdf(np.arange(n), n, share) ** k
    return float((1 - below).sum() / n - share)


@dataclass(frozen=True)
class BestOf:
    """The best of several settings, and what the best would be by luck alone.

    Attributes:
        observed: Largest mean difference.
        luck: Mean largest difference if no setting has an effect, with its 95 % range.
        p_value: How often luck reaches `observed`: one-sided, corrected for the number of settings.
        k: Number of settings.
    """

    observed: float
    luck: Estimate
    p_value: float
    k: int


def best_of_null(differences: npt.ArrayLike, permutations: int = 10000, seed: int = 0) -> BestOf:
    """What the best of k settings gains over the unchanged model by luck, on common items.

    Settings of one sweep change the same items alike, so they are fewer than k independent tries.
    Flipping the signs of an item's differences together keeps the correlation between settings
    and makes every mean difference 0 (Westfall and Young 1993). It is exact if an item's
    differences are symmetric about 0, otherwise for large n (Chernozhukov and others 2013).

    Args:
        differences: Score minus the unchanged model's, positive where better, shape (k, n).
        permutations: Number of random sign patterns.
        seed: Seed of the patterns.

    Raises:
        SettingError: No differences, or one is not finite.
    """
    table = np.atleast_2d(np.asarray(differences, dtype=np.float64))
    if table.size == 0 or not np.isfinite(table).all():
        raise SettingError("the best of several settings needs finite differences, shape (k, n)")
    k, n = table.shape
    observed = float(table.mean(axis=1).max())
    sums = _flipped(table, permutations, seed)
    best = np.concatenate([one.max(axis=1) for one in sums]) / n
    reached = (best >= observed - 1e-9 * np.abs(table).max()).sum()
    luck = Estimate(float(best.mean()), *interval(best), n)
    return BestOf(observed, luck, float((1 + reached) / (1 + permutations)), k)


def detectable_difference(
    n: int, discordant: float, power: float = 0.8, alpha: float = 0.05
) -> float:
    """Smallest true difference of two paired shares that `mcnemar` finds with a given power.

    The power is exact, summed over the numbers of items that change and that are gained. The
    result is NaN where even a change of every item is not detectable (n < 5 at 0.05).

    Args:
        n: Number of items.
        discordant: Share of items that change, which bounds the difference. Where no difference
            within it is detectable, all changes are taken to be gains and their share grows.
        power: Probability of p <= alpha.
        alpha: Level of the test.
    """

    def excess(difference: float) -> float:
        return _power(n, max(discordant, difference), difference, alpha) - power

    if n < 1 or excess(1.0) < 0:
        return nan
    return float(brentq(excess, 0.0, 1.0, xtol=1e-6)) if excess(0.0) < 0 else 0.0


def detectable_mean(n: int, deviation: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest true mean difference that a paired t-test finds with a given power.

    For scores that are not 0 or 1; `sign_flip` has nearly the same power. The result has the unit
    of `deviation`, the standard deviation of the n items' differences, and is NaN for n below 2;
    `power` is the probability of p <= `alpha`, the level of the test.
    """
    if n < 2:
        return nan
    limit = student.ppf(1 - alpha / 2, n - 1)

    # The other tail adds nothing at any useful power.
    shift = brentq(lambda shift: float(nct.sf(limit, n - 1, shift)) - power, 0.0, 5 * limit)
    return float(shift * deviation / np.sqrt(n))


def _mid_p(fewer: npt.NDArray[np.int64], changed: npt.NDArray[np.int64]) -> Floats:
    """Two-sided mid-p value of `fewer` of `changed` fair coins, fewer <= changed / 2."""
    tails: Floats = 2 * binom.cdf(fewer, changed, 0.5) - binom.pmf(fewer, changed, 0.5)
    return np.minimum(tails, 1.0)


def _power(n: int, discordant: float, difference: float, alpha: float) -> float:
    """Probability that `mcnemar` gives p <= alpha."""
    changed = np.arange(n + 1)
    likely = binom.pmf(changed, n, min(discordant, 1.0))
    changed, likely = changed[likely > 1e-12], likely[likely > 1e-12]
    limit = _largest_significant(n, alpha)[changed]
    gain = 0.5 * (1 + difference / discordant) if discordant > 0 else 0.5
    found = binom.cdf(limit, changed, gain) + binom.cdf(limit, changed, 1 - gain)
    return float(likely @ found)


@lru_cache(maxsize=64)
def _largest_significant(n: int, alpha: float) -> npt.NDArray[np.int64]:
    """For 0 to n changed items, the largest smaller side that is significant; -1 where none is."""
    changed = np.arange(n + 1)
    # A step from the quantile to either side.
    limit: npt.NDArray[np.int64] = binom.ppf(alpha / 2, changed, 0.5).astype(np.int64) + 1
    high = np.ones(len(limit), bool)
    while high.any():
        high = (limit >= 0) & ((2 * limit > changed) | (_mid_p(limit, changed) > alpha))
        limit = limit - high
    return limit


def _flipped(table: Floats, permutations: int, seed: int) -> Iterator[Floats]:
    """Row sums of a (k, n) table under random signs of its columns, shape (permutations, k).

    In blocks of as many patterns as `CHUNK` allows.
    """
    generator = np.random.default_rng(checked_seed(seed))
    n = table.shape[1]
    step = max(1, CHUNK // n)
    for begin in range(0, permutations, step):
        size = min(step, permutations - begin)
        signs = 2.0 * generator.integers(0, 2, (size, n), dtype=np.int8) - 1
        yield signs @ table.T
